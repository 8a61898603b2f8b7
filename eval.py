"""Evaluation: `python eval.py [score] --adapter RUN`, `python eval.py compare --baseline RUN... --candidate RUN...`.

One task = load rows, build the prompt, generate or compare likelihoods, extract the answer, grade it: pure functions but for the
model's part, one JSONL record an example, so that records can be scored again without a model. What differs between benchmarks
is in data/; how they are run, and what may be concluded from the scores, is here.

B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.settings import given, setting

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """Score a backbone, alone or with a saved adapter and side path, on benchmarks. Other commands: compare (--help after the word)."""

    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's own, else the embedded one")
    adapter: str = setting("", "run folder or PEFT folder; empty: the bare backbone")
    tasks: tuple[str, ...] = setting(("math", "word", "science", "code"), "benchmarks by name, or JSONL files of {prompt or messages, answer}")
    out: str = setting("", "folder for records.jsonl and results.json; empty: ADAPTER/eval, or runs/eval for a bare backbone")
    limit: int = setting(0, "first items of each task; 0: all")
    format: str = setting("chat", "chat: the model's own template, thinking off; plain: text without markup")
    shots: int = setting(0, "worked examples before each question")
    samples: int = setting(1, "answers to each question; more than one needs a temperature")
    pass_at: tuple[int, ...] = setting((), "report pass@k for these k; empty: 1 and --samples")
    max_new_tokens: int = setting(0, "longest answer in tokens, a longer one counts as truncated; 0: each task's own")
    batch_rows: int = setting(64, "answers generated at once")
    batch_tokens: int = setting(8192, "tokens, padding included, read at once: prompts, and choices whose likelihoods are compared")
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    seed: int = setting(0, "seeds sampling")
    reference: bool = setting(True, "also record the log-likelihood of each reference solution")
    allow_code_execution: bool = setting(False, "run the programs that the model writes, in the sandbox of data/sandbox.py")
    seconds: float = setting(10.0, "time limit of one program")
    workers: int = setting(0, "programs run at once; 0: one a core")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on a GPU")
    rescore: str = setting("", "records.jsonl of an earlier run: extract and grade again, without a model")

    def __post_init__(self) -> None:
        """Raises ValueError that lists every setting out of range."""
        wrong = [f"{name}: expected at least {low}, found {getattr(self, name)}" for name, low in (
            ("limit", 0), ("shots", 0), ("samples", 1), ("max_new_tokens", 0), ("batch_rows", 1), ("batch_tokens", 1), ("workers", 0))
            if getattr(self, name) < low]
        if self.format not in ("chat", "plain"):
            wrong.append(f"format: expected chat or plain, found {self.format!r}")
        if self.samples > 1 and not self.temperature > 0:
            wrong.append(f"samples: {self.samples} greedy answers would be the same one; expected --temperature above 0")
        if not self.seconds > 0:
            wrong.append(f"seconds: expected more than 0, found {self.seconds}")
        try:
            ks = [int(k) for k in self.pass_at]
        except ValueError:
            ks = [0]
        if not all(1 <= k <= self.samples for k in ks):
            wrong.append(f"pass_at: expected whole numbers from 1 to --samples {self.samples}, found {', '.join(map(str, self.pass_at))}")
        if wrong:
            raise ValueError("settings: " + "\n  ".join(wrong))


COMMANDS = {"score": Settings}
WORD = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else "score"
GIVEN = given(COMMANDS[WORD], sys.argv[1 + (sys.argv[1:2] == [WORD]):]) if __name__ == "__main__" else {}  # --help needs no torch

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from data.rows import check_messages, parse_object, read_lines
from data.task import Task, choose, cut, opened
from data.tasks import TASKS, own

if TYPE_CHECKING:  # torch is imported where a model is used: rescoring and comparing need none
    from torch import Tensor

    from model import Tokenizer, Transformer

Record = dict[str, Any]
CHUNK = 512  # positions whose logits (V) exist at once


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: rows and prompts
# ---------------------------------------------------------------------------------------------------------------------

def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; a path ending in .jsonl is a task of one's own. Raises ValueError that lists the unknown ones."""
    unknown = [name for name in names if name not in TASKS and not name.endswith(".jsonl")]
    if unknown or not names:
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)} or JSONL files, found {', '.join(unknown) or 'none'}")
    tasks = [TASKS.get(name) or own(Path(name).stem, str(Path(name).resolve())) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"tasks: each name may come once, found {', '.join(task.name for task in tasks)}")
    return tasks


def load_items(task: Task, limit: int = 0) -> list[Record]:
    """The rows to score. Raises ValueError with file:line on a row that does not fit the task, or naming what prepares the file."""
    if not task.path.exists() and task.name in TASKS:
        raise ValueError(f"{task.path}: not there yet; prepare it with: python data/prepare.py {task.path.parent.name}")
    items = [parse_item(line, where, task.kind) for where, line in read_lines(task.path)]
    if not items:
        raise ValueError(f"{task.path}: no items")
    return items[:limit or None]


def parse_item(line: bytes, where: str, kind: str = "generate") -> Record:
    """{"prompt" or "messages", "answer", "id" (else the line's number), ...} as data/task.py says. Raises ValueError."""
    row = parse_object(line, where)
    check_messages(row["messages"] if "messages" in row else [{"role": "user", "content": row.get("prompt")}], where)
    if not isinstance(row.get("answer"), str):
        raise ValueError(f"{where}: expected an answer in text, found {row.get('answer')!r}")
    choices = row.get("choices")
    if kind == "choose" and not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
                                 and row["answer"] in tuple("ABCDEFGHIJ"[:len(choices)])):
        raise ValueError(f"{where}: expected choices in text and the right one's letter, found {str(choices)[:200]} and {row['answer']!r}")
    if kind == "code" and not all(isinstance(row.get(key), str) for key in ("prompt", "code", "tests")):
        raise ValueError(f"{where}: expected prompt, code and tests in text, found {sorted(row)}")
    return {**row, "id": str(row.get("id", where.rpartition(":")[2]))}


def load_shots(task: Task, item: Record, pool: Sequence[Record], count: int) -> list[Record]:
    """The first rows of the pool with the item's subject. Raises ValueError when there are too few."""
    shots = [row for row in pool if row.get("subject") == item.get("subject")][:count]
    if len(shots) < count:
        raise ValueError(f"{task.name}: expected {count} examples for {item['id']}, found {len(shots)}; use --shots {len(shots)}")
    return shots


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and the replies whose likelihoods are asked for: the choices, or the one reference solution."""

    text: str
    replies: list[str]


def ask(task: Task, item: Record, shots: Sequence[Record], form: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt of one item in chat or plain form. Raises ValueError on messages in plain form."""
    if form == "chat":
        turns = [turn for shot in shots for turn in (("user", task.chat(shot)[0]), ("assistant", shot["completion"]))]
        user, begin = ("", "") if "messages" in item else task.chat(item)
        turns += [("user", user)] if "messages" not in item else [(m["role"], m["content"]) for m in item["messages"]]
        turns[0] = (turns[0][0], task.header(item) + turns[0][1])
        text = tokenizer.render([{"role": role, "content": content} for role, content in turns], add_generation_prompt=True) + begin
        replies = item.get("choices") or [item["completion"].removeprefix(begin) for _ in range("completion" in item)]
        return Prompt(text, replies)
    if "messages" in item:
        raise ValueError(f"{task.name}: {item['id']} is a list of messages, which has no plain form; use --format chat")
    example = lambda row: "".join(task.plain(row)) + task.between + row.get("code", row.get("completion", "")) + task.end  # noqa: E731
    text = task.header(item) + "\n\n".join([*map(example, shots), "".join(task.plain(item))])
    replies = item.get("choices") or [item.get("code", item.get("completion")) for _ in range("completion" in item)]
    return Prompt(text, [task.between + reply for reply in replies])


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods
# ---------------------------------------------------------------------------------------------------------------------

def split_replies(prompt: Prompt, encode: Callable[[str], list[int]]) -> tuple[list[int], list[list[int]]]:
    """Token ids that all of text + reply share with the text, and what follows them in each.

    A merge across the join makes the shared part shorter than the text, for every reply alike. Raises ValueError on a reply
    without a token of its own, and on a text that shares none.
    """
    alone, whole = encode(prompt.text), [encode(prompt.text + reply) for reply in prompt.replies]
    same = next((i for i, ids in enumerate(zip(alone, *whole)) if len(set(ids)) > 1), min(map(len, [alone, *whole])))
    if not same or any(len(ids) == same for ids in whole):
        raise ValueError(f"expected a prompt and replies of at least one token each, found {prompt.text[-100:]!r} and {prompt.replies}")
    return alone[:same], [ids[same:] for ids in whole]


def log_likelihoods(model: Transformer, items: Sequence[tuple[list[int], list[list[int]]]], batch_tokens: int = 8192) -> list[list[float]]:
    """sum_t log p(reply_t | prefix, reply_<t) in nats for every reply of every (prefix, replies), in float32.

    A prefix runs once; its keys, values and side-path state are shared by its replies. Raises ValueError on an empty part.
    """
    import torch
    from tqdm import tqdm

    if any(not prefix or not all(replies) for prefix, replies in items):
        raise ValueError("log_likelihoods: expected prefixes and replies of at least one token")
    out: list[list[float]] = [[] for _ in items]
    cost = [len(replies) * (len(prefix) + max(map(len, replies), default=0)) for prefix, replies in items]
    order = sorted((i for i in range(len(items)) if cost[i]), key=lambda i: -cost[i])
    training, bar = model.training, tqdm(total=len(order), desc="likelihood", unit="prompt", disable=None)
    model.eval()
    while order:
        take = order[:max(1, batch_tokens // cost[order[0]])]
        order = order[len(take):]
        with torch.no_grad():
            for i, sums in zip(take, batch_likelihoods(model, [items[i] for i in take])):
                out[i] = sums
        bar.update(len(take))
    bar.close()
    model.train(training)
    return out


def batch_likelihoods(model: Transformer, items: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """The same for items that fit one batch."""
    import torch

    from model import Cache, pad_rows

    device = model.head_weight.device
    tokens, lengths = pad_rows([prefix for prefix, _ in items], device)  # (B,T)
    replies = [reply for _, each in items for reply in each]
    owner = [b for b, (_, each) in enumerate(items) for _ in each]
    targets, sizes = pad_rows(replies, device)  # (R,T')
    cache = Cache(model.config, len(items), tokens.shape[1] + targets.shape[1], device, model.head_weight.dtype)
    hidden = model(tokens, cache, lengths)[torch.arange(len(items)), lengths - 1]  # (B,D)
    cache.keep(owner)
    hidden = hidden[torch.tensor(owner)][:, None]  # (R,1,D)
    if targets.shape[1] > 1:
        hidden = torch.cat([hidden, model(targets[:, :-1], cache, sizes - 1)], 1)  # (R,T',D)
    real = (torch.arange(targets.shape[1]) < sizes[:, None]).to(device)
    sums = iter([float(part.double().sum()) for part in log_probs(model, hidden[real], targets[real]).split(sizes.tolist())])
    return [[next(sums) for _ in each] for _, each in items]


def log_probs(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] of hidden (N,D) and targets (N,) -> (N,) float32 on the CPU."""
    import torch

    parts = [model.logits(h).float().log_softmax(-1).gather(-1, t[:, None])[:, 0] for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK))]
    return torch.cat(parts).cpu()  # (N,)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

def judge(task: Task, record: Record) -> Record:
    """The record with its verdict under each rule; `correct` is the first. Kind code: `run_tests` does it."""
    if task.kind == "choose":
        chosen = {rule: "ABCDEFGHIJ"[choose(record["logprobs"], record["choices"], rule)] for rule in ("acc", "acc_norm")}
    else:
        chosen = {name: rule.extract(record["completion"]) for name, rule in task.rules.items()}
    verdicts = {rule: found is not None and (found == record["answer"] if task.kind == "choose" else task.rules[rule].grade(found, record["answer"]))
                for rule, found in chosen.items()}
    return {**record, "extracted": chosen, "verdicts": verdicts, "correct": next(iter(verdicts.values()))}


def run_tests(task: Task, records: Sequence[Record], items: Sequence[Record], settings: Settings) -> list[Record]:
    """The same for programs, in the sandbox: base, and, where there are plus tests, plus (both have to pass)."""
    from data.sandbox import Limits, missing_protections, run_programs

    by_id, limits = {item["id"]: item for item in items}, Limits(seconds=settings.seconds)
    print("".join(f"sandbox: {line}\n" for line in missing_protections()), end="", flush=True)
    programs = [task.program(by_id[r["id"]], r["completion"], r["format"]) for r in records]
    base = run_programs([(p, by_id[r["id"]]["tests"]) for p, r in zip(programs, records)], limits, settings.workers)
    again = [i for i, r in enumerate(records) if base[i].passed and "plus_tests" in by_id[r["id"]]]
    plus = dict(zip(again, run_programs([(programs[i], by_id[records[i]["id"]]["plus_tests"]) for i in again], limits, settings.workers)))
    judged = []
    for i, record in enumerate(records):
        verdicts = {"base": base[i].passed} | ({"plus": i in plus and plus[i].passed} if "plus_tests" in by_id[record["id"]] else {})
        why = {"base": base[i].why} | ({"plus": plus[i].why} if i in plus else {})
        judged.append({**record, "why": why, "verdicts": verdicts, "correct": base[i].passed})
    return judged


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and tables
# ---------------------------------------------------------------------------------------------------------------------

def wilson(right: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, a = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + a / (4 * n))
    return max(0.0, (p + a / 2 - half) / (1 + a)), min(1.0, (p + a / 2 + half) / (1 + a))


def pass_at(k: int, n: int, c: int) -> float:
    """Probability that one of k out of n samples is right when c of the n are: 1 - prod_{i=n-c+1..n} (1 - k/i). HumanEval paper, section 2.1."""
    return 1.0 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


def interval(means: Sequence[float], samples: int) -> list[float]:
    """95 % interval in per cent: Wilson's for one sample an item, else mean -+ 1.96 standard errors over the items."""
    n, mean = len(means), sum(means) / len(means)
    if samples == 1:
        return [100 * x for x in wilson(sum(means), n)]
    half = 1.959963984540054 * math.sqrt(sum((x - mean) ** 2 for x in means) / max(1, n - 1) / n)
    return [100 * max(0.0, mean - half), 100 * min(1.0, mean + half)]


def summarize(records: Iterable[Record], ks: Sequence[int] = ()) -> dict[str, Record]:
    """Per task: n, score and its 95 % interval in per cent under each rule, unparsed and truncated answers, pass@k."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    return {task: summary(rows, ks) for task, rows in by_task.items()}


def summary(rows: Sequence[Record], ks: Sequence[int] = ()) -> Record:
    """The same for the records of one task; the rule in front is the score."""
    rules = list(dict.fromkeys(rule for r in rows for rule in r["verdicts"]))
    scores = {rule: rule_summary(rule, [r for r in rows if rule in r["verdicts"]], ks) for rule in rules}
    replies = [r for r in rows if r.get("reference_tokens")]
    likelihood = sum(r["reference_logprob"] for r in replies) / sum(r["reference_tokens"] for r in replies) if replies else None
    return {**scores[rules[0]], "rules": scores, "unparsed": sum(r.get("extracted", {}).get(rules[0], "") is None for r in rows),
            "truncated": sum(r["truncated"] for r in rows), "reference_logprob_per_token": likelihood}


def rule_summary(rule: str, rows: Sequence[Record], ks: Sequence[int]) -> Record:
    """n, samples, score, interval and pass@k of one rule."""
    right: dict[str, list[bool]] = {}
    for r in rows:
        right.setdefault(r["id"], []).append(r["verdicts"][rule])
    means, samples = [sum(v) / len(v) for v in right.values()], max(map(len, right.values()))
    passed = {f"pass@{k}": 100 * sum(pass_at(k, len(v), sum(v)) for v in right.values()) / len(right) for k in ks}
    return {"n": len(right), "samples": samples, "score": 100 * sum(means) / len(means), "interval95": interval(means, samples), **passed}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text columns, the first aligned left, the others right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells)


def score_table(summaries: dict[str, Record]) -> str:
    """One line a task, further ones for its other rules, and the mean of the scores."""
    ks = list(dict.fromkeys(key for s in summaries.values() for key in s if key.startswith("pass@")))
    rows = []
    for task, s in summaries.items():
        for i, (rule, r) in enumerate(s["rules"].items()):
            name = [task if len(s["rules"]) == 1 else f"{task} {rule}", s["unparsed"], s["truncated"]] if i == 0 else [f"  {rule}", "", ""]
            rows.append([name[0], r["n"], f"{r['score']:.1f}", "{:.1f} to {:.1f}".format(*r["interval95"]), *name[1:],
                         *(f"{r[k]:.1f}" if k in r else "" for k in ks)])
    mean = sum(s["score"] for s in summaries.values()) / len(summaries)
    head = ["task", "n", "score %", "95 % interval", "unparsed", "truncated", *ks]
    return table(head, [*rows, ["mean", "", f"{mean:.1f}", *[""] * (len(head) - 3)]])


def compare_table(base: dict[str, Record], adapted: dict[str, Record]) -> str:
    """task, n, base, adapted, difference; the last line is the mean over tasks."""
    pairs = [(task, base[task]["n"], base[task]["score"], adapted[task]["score"]) for task in base]
    mean = [sum(pair[i] for pair in pairs) / len(pairs) for i in (2, 3)]
    rows = [[task, n, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"] for task, n, a, b in [*pairs, ("mean", "", *mean)]]
    return table(["task", "n", "base", "adapted", "difference"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------

def score(settings: Settings) -> dict[str, Record]:
    """Score every item; writes records.jsonl and results.json, prints the table, returns the summaries. Raises ValueError."""
    from model import choose_device, choose_dtype, header, load_model, load_tokenizer
    from talan import load_adapter

    tasks = find_tasks(settings.tasks)
    if (code := [task.name for task in tasks if task.kind == "code"]) and not settings.allow_code_execution:
        raise ValueError(f"{', '.join(code)}: scoring runs programs that the model wrote; say --allow-code-execution if it may")
    items = {task.name: load_items(task, settings.limit) for task in tasks}
    pools = {task.name: load_pool(task) if settings.shots else [] for task in tasks}
    device, backbone = choose_device(settings.device), settings.backbone or recorded_backbone(settings.adapter)
    model, tokenizer = load_model(backbone, device, choose_dtype(settings.dtype, device)), load_tokenizer(backbone)
    if settings.adapter:
        load_adapter(model, settings.adapter)
    out = Path(settings.out or (Path(settings.adapter) / "eval" if settings.adapter else "runs/eval"))
    records, summaries, speed, began = [], {}, {}, time.perf_counter()
    for task in tasks:
        start, each = time.perf_counter(), items[task.name]
        prompts = [ask(task, item, load_shots(task, item, pools[task.name], settings.shots), settings.format, tokenizer) for item in each]
        done = run_task(task, each, prompts, model, tokenizer, settings)
        records += done
        speed[task.name] = measure(done, time.perf_counter() - start)
        summaries[task.name] = {**summary(done, pass_ks(settings)), "data_sha256": sha256(task.path.read_bytes()),
                                "prompt_sha256": sha256("\0".join(p.text for p in prompts).encode())}
    total = measure(records, time.perf_counter() - began)
    results = {**header(asdict(settings), device), "backbone": backbone, "fingerprint": model.fingerprint, "run_seed": run_seed(settings.adapter),
               "adapter_sha256": adapter_sha256(settings.adapter), "dtype": str(model.head_weight.dtype).removeprefix("torch."),
               "tasks": summaries, "speed": speed, **total}
    write_results(out, records, results)
    print(f"{backbone}{' + ' + settings.adapter if settings.adapter else ''}: {len(records)} answers in {total['seconds']:.1f} s "
          f"({total['tokens_per_second']:,} tokens/s), records in {out}\n{score_table(summaries)}")
    return summaries


def pass_ks(settings: Settings) -> list[int]:
    """The k of pass@k."""
    return [int(k) for k in settings.pass_at] or ([1, settings.samples] if settings.samples > 1 else [])


def measure(records: Sequence[Record], seconds: float) -> Record:
    """Seconds, and tokens written (kind choose: scored) a second."""
    return {"seconds": round(seconds, 2), "tokens_per_second": round(sum(r["tokens"] for r in records) / seconds)}


def load_pool(task: Task) -> list[Record]:
    """Rows to take examples from. Raises ValueError when the task has none."""
    if not task.shots:
        raise ValueError(f"{task.name}: there are no rows to take examples from; use --shots 0")
    return load_items(replace(task, file=task.shots))


def write_results(out: Path, records: Sequence[Record], results: Record) -> None:
    """records.jsonl and results.json, each complete or as it was."""
    from model import atomic

    with atomic(out / "records.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    with atomic(out / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=2) + "\n")


def recorded_backbone(adapter: str) -> str:
    """The backbone that an adapter folder names, or the embedded one."""
    from model import read_json
    from talan import checkpoint_folder

    for name in ("adapter_config.json", "talan_config.json") if adapter else ():
        if (file := checkpoint_folder(adapter) / name).exists() and (base := read_json(file).get("base_model_name_or_path")):
            return base
    return str(HERE / "data/tiny/model")


def run_seed(adapter: str) -> int | None:
    """The seed that a run of train.py was started with; None for a folder that says nothing of it."""
    from model import read_json

    file = Path(adapter or ".") / "settings.json"
    return read_json(file).get("seed") if adapter and file.exists() else None


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def adapter_sha256(adapter: str) -> str | None:
    """One hash of the adapter's and the side path's weights."""
    from talan import checkpoint_folder

    files = sorted(checkpoint_folder(adapter).glob("*.safetensors")) if adapter else []
    parts = [f for f in files if f.name in ("adapter_model.safetensors", "talan.safetensors")]
    return sha256(b"".join(sha256(f.read_bytes()).encode() for f in parts)) if parts else None


def run_task(task: Task, items: Sequence[Record], prompts: Sequence[Prompt], model: Transformer, tokenizer: Tokenizer, settings: Settings) -> list[Record]:
    """Likelihoods, generation and verdicts of one task: one record an item and sample."""
    begin = tokenizer.core.encode("").ids if settings.format == "plain" else []  # a chat template writes its own BOS
    encode = lambda text: begin + tokenizer.encode(text)  # noqa: E731
    wanted = task.kind == "choose" or settings.reference
    parts = [split_replies(p, encode) if wanted and p.replies else (encode(p.text), []) for p in prompts]
    likelihoods = log_likelihoods(model, parts, settings.batch_tokens)
    records = [make_record(task, item, prompt, sums, [len(reply) for reply in replies], settings.format)
               for item, prompt, sums, (_, replies) in zip(items, prompts, likelihoods, parts)]
    if task.kind == "choose":
        return [judge(task, record) for record in records]
    answers = write_answers(task, [encode(p.text) for p in prompts], model, tokenizer, settings)
    records = [{**record, **answer} for record, some in zip(records, answers) for answer in some]
    return run_tests(task, records, items, settings) if task.kind == "code" else [judge(task, record) for record in records]


def make_record(task: Task, item: Record, prompt: Prompt, sums: Sequence[float], sizes: Sequence[int], form: str) -> Record:
    """What was asked and how likely the reference solution is, in nats; kind choose: how likely each choice."""
    record = {"task": task.name, "id": item["id"], "sample": 0, "format": form, "prompt": prompt.text, "answer": item["answer"],
              "tokens": 0, "truncated": False, "reference_logprob": None, "reference_tokens": None}
    if task.kind == "choose":
        right = ord(item["answer"]) - ord("A")
        return {**record, "choices": item["choices"], "logprobs": list(sums), "tokens": sum(sizes),
                "reference_logprob": sums[right], "reference_tokens": sizes[right]}
    return {**record, "reference_logprob": sums[0], "reference_tokens": sizes[0]} if sums else record


def write_answers(task: Task, prompts: Sequence[list[int]], model: Transformer, tokenizer: Tokenizer, settings: Settings) -> list[list[Record]]:
    """`samples` completions of each prompt: {sample, completion, tokens, truncated}; plain text is cut at the task's stops."""
    from model import generate

    plain = settings.format == "plain"
    stops = task.stops if plain else ("```",) if task.kind == "code" else ()

    def ended(ids: list[int]) -> bool:
        """Has a stop been written? The last tokens say whether to look at the whole."""
        if not any(stop in tokenizer.decode(ids[-16:]) for stop in stops):
            return False
        text = tokenizer.decode(ids)
        return any(stop in (text if plain else opened(text)) for stop in stops)

    limit, n = settings.max_new_tokens or task.max_new_tokens, settings.samples
    answers = generate(model, [ids for ids in prompts for _ in range(n)], limit, temperature=settings.temperature, top_p=settings.top_p,
                       seed=settings.seed, eos_ids=tokenizer.eos_ids, batch_rows=settings.batch_rows, prefill_tokens=settings.batch_tokens,
                       ended=ended if stops else None)
    out = []
    for i, ids in enumerate(answers):
        stopped = bool(ids) and ids[-1] in tokenizer.eos_ids
        text = tokenizer.decode(ids[:-1] if stopped else ids)
        out.append({"sample": i % n, "completion": cut(text, task.stops) if plain else text, "tokens": len(ids),
                    "truncated": not stopped and not (bool(stops) and ended(ids))})
    return [out[i:i + n] for i in range(0, len(out), n)]


def rescore(settings: Settings) -> dict[str, Record]:
    """Judge stored records again, offline; prints the table and how many verdicts changed. Raises ValueError."""
    file, by_task = settings.rescore, {}
    try:
        stored = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
        for old in stored:
            by_task.setdefault(old["task"], []).append(old)
        records = [new for name, rows in by_task.items() for new in rejudge(TASKS.get(name) or own(name, str(Path(file).resolve())), rows, settings)]
        changed = sum(new["verdicts"] != old["verdicts"] for new, old in zip(records, (old for rows in by_task.values() for old in rows)))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected records written by eval.py, one JSON object a line: {error!r}") from None
    if not records:
        raise ValueError(f"{file}: no records")
    print(f"{file}: {len(records)} records, {changed} verdicts changed\n{score_table(summaries := summarize(records))}")
    return summaries


def rejudge(task: Task, rows: Sequence[Record], settings: Settings) -> list[Record]:
    """The verdicts of one task again. Raises ValueError when programs would have to run and may not."""
    if task.kind != "code":
        return [judge(task, row) for row in rows]
    if not settings.allow_code_execution:
        raise ValueError(f"{task.name}: scoring runs programs that the model wrote; say --allow-code-execution if it may")
    return run_tests(task, rows, load_items(task), settings)


def main(word: str, explicit: dict[str, Any]) -> None:
    """Run the command. Raises ValueError on bad input."""
    settings = COMMANDS[word](**explicit)
    if settings.rescore:
        rescore(settings)
    else:
        score(settings)


if __name__ == "__main__":
    try:
        main(WORD, GIVEN)
    except ValueError as error:
        raise SystemExit(f"eval.py: {error}") from None
