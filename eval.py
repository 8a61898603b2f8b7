"""Score a backbone, alone or with an adapter and side path, on benchmarks: python eval.py --help.

load rows -> prompts -> likelihoods or answers -> extract -> grade. All but the model's part are
pure functions; an example is a line of records.jsonl, which --rescore judges without a model.

Shapes: B rows, R replies, T tokens, D hidden size, V vocabulary, N positions.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import ROOT, Record, atomic, check_numbers, choose_device, choose_dtype, file_hash
from common import folder_hash, keep_freed_memory, open_ranks, parse_object, read_json, read_lines
from common import read_record, run_header, run_script, setting, write_json
from data.chat import Tokenizer, load_tokenizer
from data.code import cut, without_fence
from data.sandbox import Limits, missing_protections, run_programs
from data.tasks import LETTERS, OWN, TASKS, Prompt, Task, ask, choose_shots, find_tasks, judge
from data.tasks import load_items, load_pool
from model import Cache, Transformer, generate, load_model, pad_rows
from talan import cached_dora_norms, load_adapter, recorded_backbone

TINY = ROOT / "data/tiny/model"
Z95 = 1.959963984540054  # half of a 95 % interval, in standard errors


@dataclass(frozen=True)
class Settings:
    """Score a backbone, alone or with a saved adapter and side path, on benchmarks."""

    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's, or the tiny")
    adapter: str = setting("", "run folder or PEFT folder; empty: the bare backbone")
    tasks: tuple[str, ...] = setting(("math", "word", "science", "code"), "names, or .jsonl files")
    out: str = setting("", "folder for records and results; empty: ADAPTER/eval, or runs/eval")
    limit: int = setting(0, "first items of each task; 0: all")
    format: str = setting("chat", "chat: the model's template, thinking off; plain: no markup")
    shots: int = setting(0, "worked examples before each question")
    samples: int = setting(1, "answers to each question; more than one needs a temperature")
    pass_at: tuple[str, ...] = setting((), "report pass@k for these k; empty: 1 and --samples")
    max_new_tokens: int = setting(0, "longest answer; 0: each task's own")
    batch_rows: int = setting(64, "answers generated at once")
    batch_tokens: int = setting(8192, "tokens, padding included, read at once")
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "sample from the smallest set of tokens of this probability")
    seed: int = setting(0, "seeds sampling")
    stop_token: str = setting("", "one more token that ends an answer")
    reference: bool = setting(True, "also record the log-likelihood of reference solutions")
    allow_code_execution: bool = setting(False, "tasks of code: run what the model writes")
    seconds: float = setting(10.0, "time limit of a program; three times that with plus tests")
    memory_mb: int = setting(4096, "memory limit of a program")
    workers: int = setting(0, "programs at once in each process; 0: one a core")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on a GPU")
    check_references: bool = setting(False, "judge the reference solutions, without a model")
    rescore: str = setting("", "records.jsonl to extract and grade again, without a model")

    def __post_init__(self) -> None:
        check_numbers(self, limit=0, shots=0, max_new_tokens=0, workers=0, memory_mb=64)
        check_numbers(self, samples=1, batch_rows=1, batch_tokens=1, seconds=0.001)
        if self.format not in ("chat", "plain"):
            raise ValueError(f"format: expected chat or plain, found {self.format!r}")
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(f"samples: {self.samples} greedy answers are one; set --temperature")


# ---- likelihoods ----

Item = tuple[list[int], list[list[int]]]  # ids of a prefix, and of its replies


def split_replies(prompt: Prompt, encode: Callable[[str], list[int]]) -> Item:
    """The ids that text and every text + reply share, and what follows them in each.

    A merge over the border makes the shared part shorter than the text, for every reply alike.
    Raises ValueError on a reply without a token of its own.
    """
    whole = [encode(prompt.text + reply) for reply in prompt.replies]
    same = 0
    for column in zip(encode(prompt.text), *whole):
        if len(set(column)) > 1:
            break
        same += 1
    replies = [ids[same:] for ids in whole]
    if not same or not all(replies):
        found = f"{prompt.text[-99:]!r} and {prompt.replies}"
        raise ValueError(f"expected a prompt and replies with tokens of their own, found {found}")
    return whole[0][:same], replies


def log_likelihoods(model: Transformer, items: Any, batch_tokens: int = 8192) -> list[list[float]]:
    """sum_t log p(reply_t | prefix, reply_<t) in nats, of each reply of each (prefix, replies)."""
    out: list[list[float]] = [[] for _ in items]
    longest = [len(prefix) + max(map(len, replies), default=0) for prefix, replies in items]
    cost = [len(replies) * n for (_, replies), n in zip(items, longest)]
    order = sorted((i for i in range(len(items)) if cost[i]), key=lambda i: -cost[i])
    was_training = model.training
    model.eval()
    with tqdm(total=len(order), desc="likelihood", unit="prompt", disable=None) as bar:
        while order:
            size = max(1, batch_tokens // cost[order[0]])
            batch, order = order[:size], order[size:]
            for i, sums in zip(batch, batch_likelihoods(model, [items[i] for i in batch])):
                out[i] = sums
            bar.update(len(batch))
    model.train(was_training)
    return out


@torch.no_grad()
def batch_likelihoods(model: Transformer, items: Sequence[Item]) -> list[list[float]]:
    """log_likelihoods of one batch: a prefix runs once, its replies share what it left."""
    device, dtype = model.head_weight.device, model.head_weight.dtype
    tokens, lengths = pad_rows([prefix for prefix, _ in items], device)  # (B,T)
    flat = [reply for _, replies in items for reply in replies]
    targets, sizes = pad_rows(flat, device)  # (R,T')
    counts = torch.tensor([len(replies) for _, replies in items])
    owner = torch.arange(len(items)).repeat_interleave(counts)  # (R,)
    cache = Cache(model.config, len(items), tokens.shape[1] + targets.shape[1], device, dtype)
    hidden = model(tokens, cache, lengths)[torch.arange(len(items)), lengths - 1]  # (B,D)
    cache.select_rows(owner.tolist())
    hidden = hidden[owner][:, None]  # (R,1,D)
    if targets.shape[1] > 1:
        hidden = torch.cat([hidden, model(targets[:, :-1], cache, sizes - 1)], 1)  # (R,T',D)
    real = (torch.arange(targets.shape[1]) < sizes[:, None]).to(device)  # (R,T')
    parts = log_probs(model, hidden[real], targets[real]).split(sizes.tolist())
    sums = torch.stack([part.double().sum() for part in parts])  # (R,)
    return [each.tolist() for each in sums.split(counts.tolist())]


def log_probs(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] of hidden (N,D), targets (N,) -> (N,) float32 on the CPU."""
    parts = []
    for h, t in zip(hidden.split(512), targets.split(512)):  # logits (512,V) at once
        parts.append(model.logits(h).float().log_softmax(-1).gather(-1, t[:, None])[:, 0])
    return torch.cat(parts).cpu()  # (N,)


# ---- answers ----


def write_answers(
    task: Task, prompts: Any, numbers: Any, model: Any, tokenizer: Tokenizer, settings: Settings
) -> list[Record]:
    """`samples` completions of each prompt's ids: {sample, completion, tokens, truncated}."""
    plain, n = settings.format == "plain", settings.samples
    fence = ("```",) if task.kind == "code" else ()
    stops = task.stops if plain else fence

    def ended(ids: list[int]) -> bool:
        """Has a stop been written? The last tokens say whether to look at the whole."""
        if not any(stop in tokenizer.decode(ids[-16:]) for stop in stops):
            return False
        text = tokenizer.decode(ids) if plain else without_fence(tokenizer.decode(ids))
        return any(stop in text for stop in stops)

    answers = generate(
        model,
        [ids for ids in prompts for _ in range(n)],
        settings.max_new_tokens or task.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        eos_ids=tokenizer.eos_ids,
        batch_rows=settings.batch_rows,
        prefill_tokens=settings.batch_tokens,
        ended=ended if stops else None,
        numbers=[n * number + i for number in numbers for i in range(n)],
    )
    records = []
    for i, ids in enumerate(answers):
        stopped = bool(ids) and ids[-1] in tokenizer.eos_ids
        text = tokenizer.decode(ids[:-1] if stopped else ids)
        record = {"sample": i % n, "completion": cut(text, task.stops) if plain else text}
        is_whole = stopped or (bool(stops) and ended(ids))
        record |= {"tokens": len(ids), "truncated": not is_whole}
        records.append(record)
    return records


def run_tests(task: Task, records: Any, items: Any, settings: Settings) -> list[Record]:
    """Verdicts on programs, in the sandbox: base, and plus where there are such tests."""
    assert task.program  # kind code has one
    by_id = {item["id"]: item for item in items}
    limits = Limits(seconds=settings.seconds, memory_mb=settings.memory_mb)
    longer = replace(limits, seconds=3 * settings.seconds)  # the reference runs beside it
    programs = [task.program(by_id[r["id"]], r["completion"], r["format"]) for r in records]
    jobs = [(program, by_id[r["id"]]["tests"]) for program, r in zip(programs, records)]
    base = run_programs(jobs, limits, settings.workers)
    more = [i for i, r in enumerate(records) if base[i].passed and "plus_tests" in by_id[r["id"]]]
    jobs = [(programs[i], by_id[records[i]["id"]]["plus_tests"]) for i in more]
    plus = dict(zip(more, run_programs(jobs, longer, settings.workers)))
    judged = []
    for i, record in enumerate(records):
        verdicts, why = {"base": base[i].passed}, {"base": base[i].why}
        if "plus_tests" in by_id[record["id"]]:
            verdicts["plus"] = i in plus and plus[i].passed
        if i in plus:
            why["plus"] = plus[i].why
        judged.append({**record, "why": why, "verdicts": verdicts, "correct": base[i].passed})
    return judged


# ---- statistics and tables ----


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, a = right / n, Z95 * Z95 / n
    half = Z95 * math.sqrt(p * (1 - p) / n + a / (4 * n))
    return max(0.0, (p + a / 2 - half) / (1 + a)), min(1.0, (p + a / 2 + half) / (1 + a))


def pass_at(k: int, n: int, c: int) -> float:
    """1 - prod_{i=n-c+1..n} (1 - k/i): is one of k right, c of n being so? (HumanEval, 2.1)"""
    if n - c < k:
        return 1.0
    return 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


def interval(means: Sequence[float], samples: int) -> list[float]:
    """95 %, in per cent: Wilson's for one sample an item, else mean -+ 1.96 standard errors."""
    n, mean = len(means), sum(means) / len(means)
    if samples == 1:
        return [100 * end for end in wilson(sum(means), n)]
    half = Z95 * math.sqrt(sum((x - mean) ** 2 for x in means) / max(1, n - 1) / n)
    return [100 * max(0.0, mean - half), 100 * min(1.0, mean + half)]


def summarize(rows: Sequence[Record], ks: Sequence[int] = ()) -> Record:
    """Of one task's records: n, score, interval, pass@k under each rule; the first is the score."""
    rules = list(dict.fromkeys(rule for row in rows for rule in row["verdicts"]))
    scores = {rule: summarize_rule(rows, rule, ks) for rule in rules}
    summary = {**scores[rules[0]], "rules": scores}
    summary["unparsed"] = sum(row.get("extracted", {}).get(rules[0], "") is None for row in rows)
    summary["truncated"] = sum(row["truncated"] for row in rows)
    tokens = sum(row.get("reference_tokens") or 0 for row in rows)
    logprob = sum(row.get("reference_logprob") or 0 for row in rows)
    summary["reference_logprob_per_token"] = logprob / tokens if tokens else None
    return summary


def summarize_rule(rows: Sequence[Record], rule: str, ks: Sequence[int]) -> Record:
    """n, samples, score, interval and pass@k of one rule."""
    right: dict[str, list[bool]] = {}
    for row in rows:
        if rule in row["verdicts"]:
            right.setdefault(row["id"], []).append(row["verdicts"][rule])
    means = [sum(verdicts) / len(verdicts) for verdicts in right.values()]
    samples, n = max(map(len, right.values())), len(right)
    summary: Record = {"n": n, "samples": samples, "score": 100 * sum(means) / n}
    summary["interval95"] = interval(means, samples)
    for k in ks:
        passed = [pass_at(k, len(verdicts), sum(verdicts)) for verdicts in right.values()]
        summary[f"pass@{k}"] = 100 * sum(passed) / n
    return summary


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text columns, the first aligned left, the others right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *rest in cells:
        aligned = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def score_table(summaries: dict[str, Record]) -> str:
    """One line a task, further ones for its other rules, and the mean of the scores."""
    found = [key for s in summaries.values() for key in s if key.startswith("pass@")]
    ks = list(dict.fromkeys(found))
    rows: list[list[Any]] = []
    for task, summary in summaries.items():
        for i, (rule, r) in enumerate(summary["rules"].items()):
            name = f"  {rule}" if i else task if len(summary["rules"]) == 1 else f"{task} {rule}"
            ends = ["", ""] if i else [summary["unparsed"], summary["truncated"]]
            low, high = r["interval95"]
            shown = [f"{r['score']:.1f}", f"{low:.1f} to {high:.1f}", *ends]
            rows.append([name, r["n"], *shown, *(f"{r[k]:.1f}" if k in r else "" for k in ks)])
    mean = sum(summary["score"] for summary in summaries.values()) / len(summaries)
    head = ["task", "n", "score %", "95 % interval", "unparsed", "truncated", *ks]
    return table(head, [*rows, ["mean", "", f"{mean:.1f}", *[""] * (len(head) - 3)]])


def compare_table(base: dict[str, Record], adapted: dict[str, Record]) -> str:
    """task, n, base, adapted, difference; the last line is the mean over tasks."""
    rows = [[task, base[task]["n"], base[task]["score"], adapted[task]["score"]] for task in base]
    _, _, before, after = zip(*rows)
    rows.append(["mean", "", sum(before) / len(before), sum(after) / len(after)])
    shown = [[task, n, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"] for task, n, a, b in rows]
    return table(["task", "n", "base", "adapted", "difference"], shown)


# ---- scoring ----


def score(settings: Settings) -> dict[str, Record]:
    """Score every item; writes records.jsonl and results.json, prints and returns the summaries.

    torchrun's processes share the items. Raises ValueError.
    """
    tasks = find_tasks(settings.tasks)
    check_permission(tasks, settings.allow_code_execution)
    items = {task.name: load_items(task, settings.limit) for task in tasks}
    pools = {task.name: load_pool(task) for task in tasks if settings.shots}
    ks = pass_ks(settings, settings.samples)
    ranks, device = open_ranks(), choose_device(settings.device)
    backbone = settings.backbone or recorded_backbone(settings.adapter) or str(TINY)
    keep_freed_memory()
    model = load_model(backbone, device, choose_dtype(settings.dtype, device))
    run = read_run(settings.adapter or settings.backbone)
    tokenizer = load_tokenizer(backbone, settings.stop_token or run.get("stop_token", ""))
    if settings.adapter:
        load_adapter(model, settings.adapter)
    records: list[Record] = []
    summaries, began = {}, time.perf_counter()
    for task in tasks:
        numbered = list(enumerate(items[task.name]))[ranks.rank :: ranks.world]
        with cached_dora_norms(model):
            pool = pools.get(task.name, [])
            found = ranks.gather(run_task(task, numbered, pool, model, tokenizer, settings))
        done = [record for samples in found for record in samples]
        summaries[task.name] = summarize(done, ks)
        records += done
    if ranks.is_main:
        folder = Path(settings.adapter) / "eval" if settings.adapter else "runs/eval"
        out, seconds = Path(settings.out or folder), time.perf_counter() - began
        speed = round(sum(record["tokens"] for record in records) / seconds)
        results = {**run_header(settings, device), "backbone": backbone, "world": ranks.world}
        results |= {"run_seed": run.get("seed"), "seconds": round(seconds, 2), "tasks": summaries}
        results["conditions"] = conditions(results, tasks, model, records)
        with atomic(out / "records.jsonl") as tmp, open(tmp, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_json(out / "results.json", results)
        what = f"{backbone} + {settings.adapter}" if settings.adapter else backbone
        count = f"{len(records)} answers in {seconds:.1f} s ({speed:,} tokens/s)"
        print(f"{what}: {count}, records in {out}\n{score_table(summaries)}")
    return summaries


def check_permission(tasks: Sequence[Task], allowed: bool) -> None:
    """Raise ValueError when programs would run unallowed; else print what the sandbox lacks."""
    names = [task.name for task in tasks if task.kind == "code"]
    if names and not allowed:
        raise ValueError(f"{', '.join(names)}: run what the model writes; --allow-code-execution")
    if names:
        print("".join(f"sandbox: {line}\n" for line in missing_protections()), end="", flush=True)


def run_task(
    task: Task, items: Any, pool: Any, model: Transformer, tokenizer: Tokenizer, settings: Settings
) -> list[list[Record]]:
    """Likelihoods, answers, verdicts of (number, item) pairs: of each a record a sample."""
    begin = tokenizer.begin if settings.format == "plain" else []  # a template writes its own BOS

    def encode(text: str) -> list[int]:
        return [*begin, *tokenizer.encode(text)]

    prompts, parts = [], []
    for _, item in items:
        shots = choose_shots(task, item, pool, settings.shots)
        prompt = ask(task, item, shots, settings.format, tokenizer)
        wanted = prompt.replies and (task.kind == "choice" or settings.reference)
        prompts.append(prompt)
        parts.append(split_replies(prompt, encode) if wanted else (encode(prompt.text), []))
    likelihoods = log_likelihoods(model, parts, settings.batch_tokens)
    records = []
    for (_, item), prompt, (_, replies), sums in zip(items, prompts, parts, likelihoods):
        record: Record = {"task": task.name, "id": item["id"], "sample": 0}
        record["format"] = settings.format
        record |= {"prompt": prompt.text, "answer": item["answer"], "tokens": 0, "truncated": False}
        right = LETTERS.index(item["answer"]) if task.kind == "choice" else 0
        record["reference_logprob"] = sums[right] if sums else None
        record["reference_tokens"] = len(replies[right]) if sums else None
        if task.kind == "choice":
            record |= {"choices": item["choices"], "logprobs": sums}
            record["tokens"] = sum(map(len, replies))
        records.append(record)
    if task.kind == "choice":
        return [[judge(task, record)] for record in records]
    n, numbers = settings.samples, [number for number, _ in items]
    encoded = [encode(prompt.text) for prompt in prompts]
    answers = write_answers(task, encoded, numbers, model, tokenizer, settings)
    records = [{**records[i // n], **answer} for i, answer in enumerate(answers)]
    if task.kind == "code":
        records = run_tests(task, records, [item for _, item in items], settings)
    else:
        records = [judge(task, record) for record in records]
    return [records[i : i + n] for i in range(0, len(records), n)]


def pass_ks(settings: Settings, samples: int) -> list[int]:
    """The k of pass@k. Raises ValueError on one above the number of samples."""
    ks = [int(k) for k in settings.pass_at] or ([1, samples] if samples > 1 else [])
    if ks and not 0 < min(ks) <= max(ks) <= samples:
        raise ValueError(f"pass_at: expected numbers from 1 to the {samples} samples, found {ks}")
    return ks


def read_run(folder: str) -> Record:
    """The settings of the run of train.py in a folder; {} where there is none."""
    file = Path(folder or ".") / "settings.json"
    return read_json(file) if folder and file.exists() else {}


def conditions(
    results: Record, tasks: Sequence[Task], model: Transformer, records: Sequence[Record]
) -> Record:
    """What must be equal where scores are compared: settings, code, backbone, items, prompts."""
    free = ("backbone", "adapter", "out", "rescore", "workers", "device", "dtype", "tasks")
    found = {k: v for k, v in results["settings"].items() if k not in free}
    found |= {"torch": results["torch"], "commit": results["commit"]}
    found |= {"device": model.head_weight.device.type, "dtype": str(model.head_weight.dtype)[6:]}
    begun = read_record(Path(results["backbone"])).get("backbone_sha256")  # of a run of scope full
    found["backbone"] = begun or folder_hash(Path(model.folder or ""))
    for task in tasks:
        prompts = "\0".join(record["prompt"] for record in records if record["task"] == task.name)
        found[f"{task.name} rows"] = file_hash(task.path)
        found[f"{task.name} prompts"] = hashlib.sha256(prompts.encode()).hexdigest()
    return found


def rescore(settings: Settings) -> dict[str, Record]:
    """Judge stored records again; prints how many verdicts changed. Raises ValueError."""
    by_task: dict[str, list[Record]] = {}
    for where, line in read_lines(settings.rescore):
        record = parse_object(line, where)
        others = by_task.setdefault(str(record.get("task")), [])
        judged = {"logprobs", "choices"} if "logprobs" in [*others, record][0] else {"completion"}
        known = {"task", "id", "answer", "truncated", "verdicts", *judged} <= set(record)
        if not known or len(record.get("choices", ())) != len(record.get("logprobs", ())):
            raise ValueError(f"{where}: expected a record of eval.py, found {list(record)}")
        others.append(record)
    if not by_task:
        raise ValueError(f"{settings.rescore}: no records")
    changed, summaries = 0, {}
    for name, old in by_task.items():
        kind = "choice" if "logprobs" in old[0] else "text"
        new = judge_again(TASKS.get(name) or replace(OWN, name=name, kind=kind), old, settings)
        changed += sum(a["verdicts"] != b["verdicts"] for a, b in zip(old, new))
        samples = min(Counter(record["id"] for record in old).values())
        summaries[name] = summarize(new, pass_ks(settings, samples))
    count = sum(map(len, by_task.values()))
    print(f"{settings.rescore}: {count} records, {changed} verdicts changed")
    print(score_table(summaries))
    return summaries


def judge_again(task: Task, records: Sequence[Record], settings: Settings) -> list[Record]:
    """The verdicts of one task's records, new. Raises ValueError where programs may not run."""
    check_permission([task], settings.allow_code_execution)
    if task.kind == "code":
        return run_tests(task, records, load_items(task), settings)
    return [judge(task, record) for record in records]


def check_references(settings: Settings) -> dict[str, Record]:
    """The verdicts on the reference solutions; prints the table. Raises ValueError."""
    summaries = {}
    for task in find_tasks(settings.tasks):
        records = []
        for item in load_items(task, settings.limit):
            solution = item.get("code", item.get("completion"))
            if task.kind == "choice" or solution is None:
                raise ValueError(f"{task.name}: {item['id']} has no solution to judge")
            record = {"task": task.name, "id": item["id"], "sample": 0, "format": "chat"}
            record |= {"answer": item["answer"], "completion": solution, "truncated": False}
            records.append(record)
        summaries[task.name] = summarize(judge_again(task, records, settings))
    print(score_table(summaries))
    return summaries


def main(overrides: Record) -> None:
    """Score, or judge again what is stored. Raises ValueError."""
    settings = Settings(**overrides)
    if settings.check_references:
        check_references(settings)
    elif settings.rescore:
        rescore(settings)
    else:
        score(settings)


if __name__ == "__main__":
    run_script(main, Settings, "eval.py")
