"""Evaluation: `python eval.py [score] --adapter RUN`, `python eval.py compare --baseline RUN... --candidate RUN...`, internals, overhead.

One task = load rows, build the prompt, generate or compare likelihoods, extract the answer, grade it: pure functions but for the
model's part, one JSONL record an example, so that records can be scored again without a model. What differs between benchmarks
is in data/; how they are run, and what may be concluded from the scores, is here.

B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.settings import given, setting

HERE = Path(__file__).resolve().parent
RESCORED = ("rescore", "pass_at", "allow_code_execution", "seconds", "memory_mb", "workers")  # settings that --rescore goes by


@dataclass(frozen=True)
class Settings:
    """Score a backbone, alone or with a saved adapter and side path, on benchmarks.

    Other commands, --help after the word: compare, internals, overhead.
    """

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
    seconds: float = setting(10.0, "time limit of one program; three times that with plus tests, which run the reference solution beside it")
    memory_mb: int = setting(4096, "memory limit of one program")
    workers: int = setting(0, "programs run at once in each process; 0: one a core, the cores shared by torchrun's processes")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on a GPU")
    check_references: bool = setting(False, "judge the reference solutions instead of a model's answers: what a perfect model would score")
    rescore: str = setting("", "records.jsonl of an earlier run: extract and grade again, without a model")

    def __post_init__(self) -> None:
        """Raises ValueError that lists every setting out of range."""
        wrong = [f"{name}: expected at least {low}, found {getattr(self, name)}" for name, low in (
            ("limit", 0), ("shots", 0), ("samples", 1), ("max_new_tokens", 0), ("batch_rows", 1), ("batch_tokens", 1), ("memory_mb", 64),
            ("workers", 0)) if getattr(self, name) < low]
        if self.format not in ("chat", "plain"):
            wrong.append(f"format: expected chat or plain, found {self.format!r}")
        if self.samples > 1 and not self.temperature > 0:
            wrong.append(f"samples: {self.samples} greedy answers would be the same one; expected --temperature above 0")
        if not 0 < self.seconds < 1e6:
            wrong.append(f"seconds: expected more than 0, less than a million, found {self.seconds}")
        try:
            ks = [int(k) for k in self.pass_at]
        except ValueError:
            ks = [0]
        if not all(1 <= k <= (math.inf if self.rescore else self.samples) for k in ks):
            wrong.append(f"pass_at: expected whole numbers from 1 to --samples {self.samples}, found {', '.join(map(str, self.pass_at))}")
        if wrong:
            raise ValueError("settings: " + "\n  ".join(wrong))


@dataclass(frozen=True)
class CompareSettings:
    """Compare scored runs with scored runs: runs are paired by training seed, and by backbone where there are several, items by id."""

    baseline: tuple[str, ...] = setting((), "runs, one a seed: folders with records.jsonl and results.json, or with eval or eval-adapted in them")
    candidate: tuple[str, ...] = setting((), "runs of the same seeds, scored on the same items with the same settings")
    out: str = setting("", "folder for comparison.json and comparison.png; empty: comparison in the first candidate's folder")
    ignore: tuple[str, ...] = setting((), "settings that may differ all the same, by the names that the error lists")
    resamples: int = setting(10_000, "draws of the bootstrap")
    seed: int = setting(0, "seeds the bootstrap")


@dataclass(frozen=True)
class InternalsSettings:
    """Measure what adapter and side path do to the residual stream: sizes, directions, growth with depth, memory, losses without them."""

    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's own, else the embedded one")
    adapter: str = setting("", "run folder or PEFT folder")
    data: str = setting("", "training or held-out rows, JSONL, .gz allowed; empty: the embedded held-out rows, for the embedded backbone")
    rows: int = setting(64, "rows, drawn with --seed; 0: all")
    max_tokens: int = setting(512, "longer rows are cut")
    batch_tokens: int = setting(4096, "tokens, padding included, read at once")
    out: str = setting("", "folder for internals.json and internals.png; empty: internals in the adapter's folder")
    resamples: int = setting(1000, "draws of the bootstrap over rows")
    seed: int = setting(0, "seeds the draw of the rows, who gets whose memory, and the bootstrap")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("float32", "float32 or bfloat16, whose rounding alone moves the stream as much as a small perturbation does; auto")

    def __post_init__(self) -> None:
        """Raises ValueError that lists every setting out of range."""
        wrong = [f"{name}: expected at least {low}, found {getattr(self, name)}" for name, low in (
            ("rows", 0), ("max_tokens", 2), ("batch_tokens", 1), ("resamples", 100), ("seed", 0)) if getattr(self, name) < low]
        wrong += ["adapter: name the run to look into"] * (not self.adapter)
        if wrong:
            raise ValueError("settings: " + "\n  ".join(wrong))


@dataclass(frozen=True)
class OverheadSettings:
    """Time prefill and decoding of backbone, merged and live adapter, with and without the side path; --configs: count, without weights."""

    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's own, else the embedded one")
    adapter: str = setting("", "run folder or PEFT folder; empty: a fresh adapter and side path of the shape that the flags below give")
    configs: tuple[str, ...] = setting(("none",), "only count: config.json files or folders with one; without a value: data/shapes.json", nargs="*")
    out: str = setting("", "folder for overhead.json; empty: ADAPTER/overhead, or runs/overhead; with --configs: not written")
    forms: tuple[str, ...] = setting(("backbone", "merged", "live"), "what to time, without and with the side path")
    batches: tuple[int, ...] = setting((1, 16), "rows at once")
    prompt: int = setting(128, "tokens a row in the prefill")
    steps: int = setting(8, "tokens a row decoded after it, one by one; the time is that of one step")
    repeats: int = setting(10, "rounds at least; a round times every variant once")
    seconds: float = setting(20.0, "further rounds until a batch size has taken this long")
    clock: str = setting("wall", "wall, or cpu: seconds of this process's own threads together, which other processes disturb less")
    context: int = setting(1024, "positions that a token attends to, in the count of FLOPs")
    rank: int = setting(16, "adapter on all seven projections: rank")
    layers: tuple[str, ...] = setting(("0.75",), "side path: layers, as indices or fractions of the depth")
    slots: int = setting(8, "side path: memory slots")
    width: int = setting(64, "side path: memory width")
    mixer: str = setting("linear", "side path: linear, mlp or attention")
    writeback: str = setting("gate", "side path: add, gate or bounded")
    resamples: int = setting(10_000, "draws of the bootstrap")
    seed: int = setting(0, "seeds tokens, order, fresh weights and the bootstrap")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on a GPU")

    def __post_init__(self) -> None:
        """Batches as numbers. Raises ValueError that lists every setting out of range."""
        wrong = [f"{name}: expected at least 1, found {getattr(self, name)}" for name in ("prompt", "steps", "repeats", "context", "resamples")
                 if getattr(self, name) < 1]
        words = [str(x) for x in self.batches]
        if not words or not all(x.isdecimal() and int(x) > 0 for x in words):
            wrong.append(f"batches: expected whole numbers from 1, found {', '.join(words) or 'none'}")
        if not 0 <= self.seconds < float("inf"):
            wrong.append(f"seconds: expected at least 0, found {self.seconds}")
        if self.clock not in ("wall", "cpu"):
            wrong.append(f"clock: expected wall or cpu, found {self.clock!r}")
        if not self.forms or set(self.forms) - {"backbone", "merged", "live"}:
            wrong.append(f"forms: expected some of backbone, merged, live, found {', '.join(self.forms) or 'none'}")
        axes = ("configs", "rank", "layers", "slots", "width", "mixer", "writeback")
        if self.adapter and (asked := [name for name in axes if getattr(self, name) != self.__dataclass_fields__[name].default]):
            wrong.append(f"{', '.join(asked)}: for a run without --adapter; {self.adapter} has a shape of its own")
        if wrong:
            raise ValueError("settings: " + "\n  ".join(wrong))
        object.__setattr__(self, "batches", tuple(dict.fromkeys(map(int, words))))


COMMANDS = {"score": Settings, "compare": CompareSettings, "internals": InternalsSettings, "overhead": OverheadSettings}
WORD = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else "score"
GIVEN = given(COMMANDS[WORD], sys.argv[1 + (sys.argv[1:2] == [WORD]):]) if __name__ == "__main__" else {}  # --help needs no torch

import contextlib
import difflib
import functools
import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.figures import draw_comparison, shown
from data.rows import parse_object, read_lines
from data.task import Task, cut, opened
from data.tasks import TASKS, Prompt, ask, find_tasks, judge, load_items, load_pool, load_shots, own

if TYPE_CHECKING:  # torch is imported where a model is used: rescoring and comparing need none
    from torch import Tensor

    from model import Tokenizer, Transformer

Record = dict[str, Any]
CHUNK = 512  # positions whose logits (V) exist at once
Z95 = 1.959963984540054  # half the width of a 95 % interval, in standard errors


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

def run_tests(task: Task, records: Sequence[Record], items: Sequence[Record], settings: Settings) -> list[Record]:
    """The same for programs, in the sandbox: base, and, where there are plus tests, plus (both have to pass)."""
    from data.sandbox import Limits, run_programs

    assert task.program  # kind code has one
    say_protections()
    by_id, limits = {item["id"]: item for item in items}, Limits(seconds=settings.seconds, memory_mb=settings.memory_mb)
    programs = [task.program(by_id[r["id"]], r["completion"], r["format"]) for r in records]
    base = run_programs([(p, by_id[r["id"]]["tests"]) for p, r in zip(programs, records)], limits, settings.workers)
    again = [i for i, r in enumerate(records) if base[i].passed and "plus_tests" in by_id[r["id"]]]
    found = run_programs([(programs[i], by_id[records[i]["id"]]["plus_tests"]) for i in again], replace(limits, seconds=3 * limits.seconds),
                         settings.workers)
    plus = dict(zip(again, found))
    judged = []
    for i, record in enumerate(records):
        verdicts = {"base": base[i].passed} | ({"plus": i in plus and plus[i].passed} if "plus_tests" in by_id[record["id"]] else {})
        why = {"base": base[i].why} | ({"plus": plus[i].why} if i in plus else {})
        judged.append({**record, "why": why, "verdicts": verdicts, "correct": base[i].passed})
    return judged


@functools.cache
def say_protections() -> None:
    """Print, once, what the sandbox lacks on this system."""
    from data.sandbox import missing_protections

    print("".join(f"sandbox: {line}\n" for line in missing_protections()), end="", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and tables
# ---------------------------------------------------------------------------------------------------------------------

def wilson(right: float, n: int, z: float = Z95) -> tuple[float, float]:
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
    half = Z95 * math.sqrt(sum((x - mean) ** 2 for x in means) / max(1, n - 1) / n)
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
    pairs: list[tuple[Any, ...]] = [(task, base[task]["n"], base[task]["score"], adapted[task]["score"]) for task in base]
    mean = [sum(pair[i] for pair in pairs) / len(pairs) for i in (2, 3)]
    rows = [[task, n, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"] for task, n, a, b in [*pairs, ("mean", "", *mean)]]
    return table(["task", "n", "base", "adapted", "difference"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------

def score(settings: Settings) -> dict[str, Record]:
    """Score every item, shared by torchrun's processes; writes records.jsonl and results.json, prints and returns the summaries.
    Raises ValueError."""
    from data.ranks import open_ranks
    from model import atomic, choose_device, choose_dtype, keep_freed_memory, load_model, load_tokenizer
    from talan import gains_kept, load_adapter

    tasks = find_tasks(settings.tasks)
    check_permission(tasks, settings.allow_code_execution)
    items = {task.name: load_items(task, settings.limit) for task in tasks}
    pools = {task.name: load_pool(task) if settings.shots else [] for task in tasks}
    ranks = open_ranks()
    device, backbone = choose_device(ranks.device(settings.device)), settings.backbone or recorded_backbone(settings.adapter)
    keep_freed_memory()
    model, tokenizer = load_model(backbone, device, choose_dtype(settings.dtype, device)), load_tokenizer(backbone)
    if settings.adapter:
        load_adapter(model, settings.adapter)
    out = Path(settings.out or (Path(settings.adapter) / "eval" if settings.adapter else "runs/eval"))
    prompts = {task.name: [ask(task, item, load_shots(task, item, pools[task.name], settings.shots), settings.format, tokenizer)
                           for item in items[task.name]] for task in tasks}
    hashes = {task.name: {"data_sha256": sha256(task.path.read_bytes()),
                          "prompt_sha256": sha256("\0".join(p.text for p in prompts[task.name]).encode())} for task in tasks}
    about = {**ranks.from_first(lambda: describe_run(settings, model, device)), "backbone": backbone, "world": ranks.world}
    records: list[Record] = []
    summaries, speed = {}, {}
    for task in tasks:
        part, key = out / f".{task.name}.part", sha256(json.dumps([about, hashes[task.name]], sort_keys=True).encode())
        began = time.perf_counter()
        done, seconds = ranks.from_first(functools.partial(load_part, part, key))
        if not done:
            mine = slice(ranks.rank, None, ranks.world)
            with gains_kept(model):
                answers = run_task(task, items[task.name][mine], prompts[task.name][mine], range(len(items[task.name]))[mine], model, tokenizer,
                                   settings)
            done, seconds = [record for each in ranks.join(answers) for record in each], time.perf_counter() - began
            if ranks.first:
                write_lines(part, [{"key": key, "seconds": seconds}, *done])
        records, speed[task.name] = records + done, measure(done, seconds)
        summaries[task.name] = {**summary(done, pass_ks(settings, settings.samples)), **hashes[task.name]}
    total = measure(records, sum(each["seconds"] for each in speed.values()))
    if ranks.first:
        write_lines(out / "records.jsonl", records)
        with atomic(out / "results.json") as tmp:
            tmp.write_text(json.dumps({**about, "tasks": summaries, "speed": speed, **total}, indent=2) + "\n")
        for task in tasks:
            (out / f".{task.name}.part").unlink(missing_ok=True)
        print(f"{backbone}{' + ' + settings.adapter if settings.adapter else ''}: {len(records)} answers in {total['seconds']:.1f} s "
              f"({total['tokens_per_second']:,} tokens/s), records in {out}\n{score_table(summaries)}")
    return summaries


def check_permission(tasks: Sequence[Task], allowed: bool) -> None:
    """Raises ValueError that lists the tasks which would run programs, unless that was allowed."""
    if (code := [task.name for task in tasks if task.kind == "code"]) and not allowed:
        raise ValueError(f"{', '.join(code)}: scoring runs programs that the model wrote; say --allow-code-execution if it may")


def load_part(part: Path, key: str) -> tuple[list[Record], float]:
    """(records, seconds) of a task that an interrupted run of the same command finished; ([], 0) where there are none."""
    if not part.exists():
        return [], 0.0
    with contextlib.suppress(ValueError, LookupError, TypeError):  # something else than `score` writes
        stored, *records = [json.loads(line) for line in part.read_text(encoding="utf-8").split("\n")[:-1]]
        if stored["key"] == key:
            return records, stored["seconds"]
    return [], 0.0


def pass_ks(settings: Settings, samples: int) -> list[int]:
    """The k of pass@k."""
    return [int(k) for k in settings.pass_at] or ([1, samples] if samples > 1 else [])


def measure(records: Sequence[Record], seconds: float) -> Record:
    """Seconds, and tokens written (kind choose: scored) a second."""
    return {"seconds": round(seconds, 2), "tokens_per_second": round(sum(r["tokens"] for r in records) / max(seconds, 1e-9))}


def write_lines(file: Path, rows: Iterable[Record]) -> None:
    """JSONL, complete or as it was."""
    from model import atomic

    with atomic(file) as tmp:
        tmp.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def recorded_backbone(adapter: str) -> str:
    """The backbone that an adapter folder names, or the embedded one."""
    from model import read_json
    from talan import checkpoint_folder

    for name in ("adapter_config.json", "talan_config.json") if adapter else ():
        if (file := checkpoint_folder(adapter) / name).exists() and (base := read_json(file).get("base_model_name_or_path")):
            return str(base)
    return str(HERE / "data/tiny/model")


def describe_run(settings: Settings, model: Transformer, device: Any) -> Record:
    """What results.json says but for scores: one hash of the backbone's weights, of a run of --scope full also of those it began with, ..."""
    from data.record import describe, read_record

    assert model.folder  # it was loaded from one
    run, found = settings.adapter or settings.backbone, describe(asdict(settings), (), model, device)
    begun = read_record(model.folder) if Path(run).resolve() == model.folder.resolve() else {}
    files = {"backbone_sha256": found["backbone_sha256"], "trained_from_sha256": begun.get("backbone_sha256", {})}
    weights = {name: sorted(pair for pair in hashes.items() if pair[0].endswith(".safetensors")) for name, hashes in files.items()}
    hashes = {name: sha256(json.dumps(pairs).encode()) for name, pairs in weights.items() if pairs}
    return {**{name: value for name, value in found.items() if name != "data_sha256"}, **hashes, "run_seed": run_seed(run),
            "adapter_sha256": adapter_sha256(settings.adapter), "dtype": str(model.head_weight.dtype).removeprefix("torch.")}


def run_seed(folder: str) -> int | None:
    """The seed that a run of train.py was started with; None for a folder that says nothing of it."""
    from model import read_json

    file = Path(folder or ".") / "settings.json"
    seed = read_json(file).get("seed") if folder and file.exists() else None
    return seed if type(seed) is int else None


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def adapter_sha256(adapter: str) -> str | None:
    """One hash of the adapter's and the side path's weights."""
    from talan import checkpoint_folder

    files = sorted(checkpoint_folder(adapter).glob("*.safetensors")) if adapter else []
    parts = [f for f in files if f.name in ("adapter_model.safetensors", "talan.safetensors")]
    return sha256(b"".join(sha256(f.read_bytes()).encode() for f in parts)) if parts else None


def run_task(task: Task, items: Sequence[Record], prompts: Sequence[Prompt], numbers: Sequence[int], model: Transformer, tokenizer: Tokenizer,
             settings: Settings) -> list[list[Record]]:
    """Likelihoods, generation and verdicts of one task: for each item a record of each sample. numbers: which items they are, for sampling."""
    begin = list(tokenizer.begin) if settings.format == "plain" else []  # a chat template writes its own BOS
    encode = lambda text: begin + tokenizer.encode(text)  # noqa: E731
    wanted = task.kind == "choose" or settings.reference
    parts = [split_replies(p, encode) if wanted and p.replies else (encode(p.text), []) for p in prompts]
    likelihoods = log_likelihoods(model, parts, settings.batch_tokens)
    records = [make_record(task, item, prompt, sums, [len(reply) for reply in replies], settings.format)
               for item, prompt, sums, (_, replies) in zip(items, prompts, likelihoods, parts)]
    if task.kind == "choose":
        return [[judge(task, record)] for record in records]
    answers = write_answers(task, [encode(p.text) for p in prompts], numbers, model, tokenizer, settings)
    records = [{**record, **answer} for record, some in zip(records, answers) for answer in some]
    records = run_tests(task, records, items, settings) if task.kind == "code" else [judge(task, record) for record in records]
    return [records[i:i + settings.samples] for i in range(0, len(records), settings.samples)]


def make_record(task: Task, item: Record, prompt: Prompt, sums: Sequence[float], sizes: Sequence[int], form: str) -> Record:
    """What was asked and how likely the reference solution is, in nats; kind choose: how likely each choice."""
    record = {"task": task.name, "id": item["id"], "sample": 0, "format": form, "prompt": prompt.text, "answer": item["answer"],
              "tokens": 0, "truncated": False, "reference_logprob": None, "reference_tokens": None}
    if task.kind == "choose":
        right = ord(item["answer"]) - ord("A")
        return {**record, "choices": item["choices"], "logprobs": list(sums), "tokens": sum(sizes),
                "reference_logprob": sums[right], "reference_tokens": sizes[right]}
    return {**record, "reference_logprob": sums[0], "reference_tokens": sizes[0]} if sums else record


def write_answers(task: Task, prompts: Sequence[list[int]], numbers: Sequence[int], model: Transformer, tokenizer: Tokenizer,
                  settings: Settings) -> list[list[Record]]:
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
                       ended=ended if stops else None, numbers=[n * number + i for number in numbers for i in range(n)])
    out = []
    for i, ids in enumerate(answers):
        stopped = bool(ids) and ids[-1] in tokenizer.eos_ids
        text = tokenizer.decode(ids[:-1] if stopped else ids)
        out.append({"sample": i % n, "completion": cut(text, task.stops) if plain else text, "tokens": len(ids),
                    "truncated": not stopped and not (bool(stops) and ended(ids))})
    return [out[i:i + n] for i in range(0, len(out), n)]


def rescore(settings: Settings) -> dict[str, Record]:
    """Judge stored records again, offline; prints the table and how many verdicts changed. Raises ValueError."""
    if idle := [name for name, f in settings.__dataclass_fields__.items() if name not in RESCORED and getattr(settings, name) != f.default]:
        print(f"warning: without effect on --rescore, which judges all that is recorded: {', '.join(idle)}", file=sys.stderr)
    file = settings.rescore
    by_task: dict[str, list[Record]] = {}
    try:
        stored = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
        for old in stored:
            by_task.setdefault(old["task"], []).append(old)
        samples = min(Counter((old["task"], old["id"]) for old in stored).values(), default=1)
        if max(ks := pass_ks(settings, samples), default=1) > samples:
            raise ValueError(f"pass_at: expected whole numbers from 1 to the {samples} samples in {file}, found {', '.join(map(str, ks))}")
        records = [new for name, rows in by_task.items() for new in rejudge(TASKS.get(name) or own(name, str(Path(file).resolve())), rows, settings)]
        changed = sum(new["verdicts"] != old["verdicts"] for new, old in zip(records, (old for rows in by_task.values() for old in rows)))
        summaries = summarize(records, ks)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{file}: expected records written by eval.py, one JSON object a line: {error!r}") from None
    if not records:
        raise ValueError(f"{file}: no records")
    print(f"{file}: {len(records)} records, {changed} verdicts changed\n{score_table(summaries)}")
    return summaries


def rejudge(task: Task, rows: Sequence[Record], settings: Settings) -> list[Record]:
    """The verdicts of one task again. Raises ValueError when programs would have to run and may not."""
    check_permission([task], settings.allow_code_execution)
    return run_tests(task, rows, load_items(task), settings) if task.kind == "code" else [judge(task, row) for row in rows]


def check_references(settings: Settings) -> dict[str, Record]:
    """The verdicts on the reference solutions, without a model; prints the table. Raises ValueError where there are none to judge."""
    tasks, summaries = find_tasks(settings.tasks), {}
    if choice := [task.name for task in tasks if task.kind == "choose"]:
        raise ValueError(f"{', '.join(choice)}: choices are compared by likelihood, there is nothing to judge")
    for task in tasks:
        items = load_items(task, settings.limit)
        if without := [item["id"] for item in items if "code" not in item and "completion" not in item]:
            raise ValueError(f"{task.path}: expected a reference solution, a completion, in each row; items without one, {some(without)}")
        rows = [{"task": task.name, "id": item["id"], "sample": 0, "format": "chat", "answer": item["answer"], "truncated": False,
                 "completion": item.get("code", item.get("completion"))} for item in items]
        summaries[task.name] = summary(rejudge(task, rows, settings))
    print(score_table(summaries))
    return summaries


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs: reading and pairing
# ---------------------------------------------------------------------------------------------------------------------

Key = tuple[str, str, int]  # task, id, sample
OWN = ("backbone", "adapter", "out", "rescore")  # settings that may differ between runs; what follows may not
BACKBONE = ("fingerprint", "backbone_sha256")
FOUND = ("dtype", "device", "fingerprint", "commit")  # stand beside the settings; dtype and device are never "auto" there


class Cell(NamedTuple):
    """What is compared of one record: verdicts by rule, the reference solution's log-likelihood (None: not recorded) and length."""

    verdicts: dict[str, bool]
    logprob: float | None
    tokens: int


class Scored(NamedTuple):
    """One scored run: its folder, its backbone's name, the seed it was trained with, what must be the same in all runs, its cells."""

    folder: str
    backbone: str
    seed: int | None
    facts: Record
    cells: dict[Key, Cell]


def some(names: Sequence[Any]) -> str:
    """How many there are, and the first ten."""
    shown = ["/".join(map(str, name)) if isinstance(name, tuple) else name for name in names[:10]]
    return f"{len(names)}: " + ", ".join(shown) + ", ..." * (len(names) > 10)


def find_scores(run: str) -> tuple[Path, Path]:
    """(records, results) in RUN, else in RUN/eval or RUN/eval-adapted. Raises ValueError when there are none, or both of the latter."""
    files = [folder / f"records.jsonl{end}" for folder in (Path(run), Path(run, "eval"), Path(run, "eval-adapted")) for end in ("", ".gz")]
    found = {file.parent: file for file in reversed(files) if file.is_file() and (file.parent / "results.json").is_file()}
    if Path(run) not in found and len(found) != 1:
        raise ValueError(f"{run}: expected records.jsonl or records.jsonl.gz, and results.json, in it, in {run}/eval or in {run}/eval-adapted, "
                         f"found them in {' and '.join(map(str, found)) or 'none'}")
    folder = Path(run) if Path(run) in found else next(iter(found))
    return found[folder], folder / "results.json"


def read_cell(line: bytes, where: str) -> tuple[Key, Cell]:
    """One record; an old one, without "verdicts", has the rule "score". Raises ValueError that names every bad field."""
    row = {"sample": 0, "reference_logprob": None, "reference_tokens": None, **parse_object(line, where)}
    verdicts, logprob, tokens = row.get("verdicts", {"score": row.get("correct")}), row["reference_logprob"], row["reference_tokens"]
    fits = {"task": isinstance(row.get("task"), str), "id": isinstance(row.get("id"), str), "sample": type(row["sample"]) is int,
            "verdicts" if "verdicts" in row else "correct":
                isinstance(verdicts, dict) and verdicts and all(isinstance(v, bool) for v in verdicts.values()),
            "reference_logprob": logprob is None or type(logprob) in (int, float) and abs(logprob) < 1e15,
            "reference_tokens": logprob is None or type(tokens) is int and tokens >= 0}
    if bad := [f"{name} {str(row.get(name, 'absent'))[:60]}" for name, fine in fits.items() if not fine]:
        raise ValueError(f"{where}: expected a record written by eval.py, found {', '.join(bad)}")
    return (row["task"], row["id"], row["sample"]), Cell(verdicts, logprob, tokens or 0)


def read_facts(file: Path) -> tuple[str, int | None, Record]:
    """The backbone's name, the training seed, and by name what must be the same in all runs: settings, code, backbone, data, prompts.
    Raises ValueError."""
    row = {"run_seed": None, **parse_object(file.read_bytes(), str(file))}
    settings, versions, tasks = (row.get(name) for name in ("settings", "versions", "tasks"))
    if not (isinstance(settings, dict) and isinstance(versions, dict) and isinstance(tasks, dict) and type(row["run_seed"]) in (int, type(None))
            and all(isinstance(summary, dict) for summary in tasks.values())):
        raise ValueError(f"{file}: expected settings, versions, tasks with a summary each, and run_seed, a whole number or null")
    hashes = {f"{name}.{task}": summary.get(name) for task, summary in tasks.items() for name in ("data_sha256", "prompt_sha256")}
    facts = {**dict.fromkeys(FOUND), **{name: value for name, value in settings.items() if name not in OWN}, "torch": versions.get("torch"), **hashes}
    facts |= {name: row[name] for name in (*FOUND, "backbone_sha256") if name in row}
    facts |= {"backbone_sha256": row["trained_from_sha256"]} if "trained_from_sha256" in row else {}
    return Path(str(row.get("backbone"))).name, row["run_seed"], facts | {"device": facts["device"] and str(facts["device"]).partition(":")[0]}


def read_scored(run: str) -> Scored:
    """One scored run. Raises ValueError that lists its bad lines."""
    records, results = find_scores(run)
    cells: dict[Key, Cell] = {}
    problems = []
    for where, line in read_lines(records):
        try:
            key, cell = read_cell(line, where)
            if cells.setdefault(key, cell) is not cell:
                raise ValueError(f"{where}: {'/'.join(map(str, key))} came before")
        except ValueError as error:
            problems.append(str(error))
    if problems or not cells:
        raise ValueError("\n  ".join([f"{records}: bad records, {len(problems)}:", *problems[:10]]) if problems else f"{records}: no records")
    return Scored(run, *read_facts(results), cells)


def check_seeds(baseline: Sequence[Scored], candidate: Sequence[Scored]) -> list[str]:
    """The seeds without exactly one run on each side. One run a side may lack its seed: a bare backbone beside what was trained from it."""
    if len(baseline) == len(candidate) == 1 and None in (baseline[0].seed, candidate[0].seed):
        return []
    found = {seed: [[run.folder for run in side if run.seed == seed] for side in (baseline, candidate)]
             for seed in dict.fromkeys(run.seed for run in (*baseline, *candidate))}
    return [f"seed {'not recorded' if seed is None else seed}: expected one run a side, found " + " | ".join(", ".join(s) or "none" for s in sides)
            for seed, sides in found.items() if seed is None or [len(s) for s in sides] != [1, 1]]


def check_facts(baseline: Sequence[Scored], candidate: Sequence[Scored], ignore: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is wrong, what differs but is in `ignore`): "name: value (its runs) | value (its runs)" of each fact that is not the same in all
    runs. A name in `ignore` is a fact's, or its part before the dot: data_sha256 stands for that of every task."""
    names = list(dict.fromkeys(name for run in (*baseline, *candidate) for name in run.facts))
    known = sorted({spelling for name in names for spelling in (name, name.partition(".")[0])})
    wrong = [f"--ignore {name}: the nearest name is {difflib.get_close_matches(name, known, 1, 0)[0]}" for name in ignore if name not in known]
    passed: list[str] = []
    for name in names:
        sides: list[dict[str, list[str]]] = [{}, {}]
        for values, side in zip(sides, (baseline, candidate)):
            for run in side:
                values.setdefault(json.dumps(run.facts[name], sort_keys=True) if name in run.facts else "absent", []).append(run.folder)
        if len(sides[0] | sides[1]) > 1:
            text = " | ".join(", ".join(f"{value[:80]} ({', '.join(folders)})" for value, folders in values.items()) for values in sides)
            (passed if name in ignore or name.partition(".")[0] in ignore else wrong).append(f"{name}: {text}")
    return wrong, passed


def check_cells(runs: Sequence[Scored]) -> list[str]:
    """The items that a run lacks, judges by other rules, or has a reference solution of another length for."""
    every: dict[Key, int] = {}
    rules: dict[Key, set[str]] = {}
    for run in runs:
        every |= {key: every.get(key) or (cell.logprob is not None) * cell.tokens for key, cell in run.cells.items()}
    problems = []
    for run in runs:
        others = [key for key, cell in run.cells.items() if cell.verdicts.keys() != rules.setdefault(key, set(cell.verdicts))]
        lengths = [key for key, cell in run.cells.items() if cell.logprob is not None and cell.tokens != every[key]]
        problems += [f"{run.folder}: {what}, {some(keys)}" for what, keys in (
            ("lacks items of other runs", sorted(every.keys() - run.cells.keys())), ("verdicts by other rules", others),
            ("another reference_tokens", lengths)) if keys]
    return problems


def by_backbone(baseline: Sequence[Scored], candidate: Sequence[Scored]) -> dict[str, list[list[Scored]]]:
    """Both sides by backbone, where the same several are on both; else all runs together, for check_facts to find the difference."""
    which = lambda run: "+".join(str(run.facts[name]) for name in BACKBONE if name in run.facts)
    prints = [list(dict.fromkeys(map(which, side))) for side in (baseline, candidate)]
    names = {which(run): run.backbone for run in (*baseline, *candidate)}
    if len(prints[0]) == 1 or set(prints[0]) != set(prints[1]):
        return {"": [list(baseline), list(candidate)]}
    clear = len(set(names.values())) == len(names)
    of = lambda one: [[run for run in side if which(run) == one] for side in (baseline, candidate)]
    return {names[one] if clear else f"{names[one]}-{'+'.join(part[:6] for part in one.split('+'))}": of(one) for one in prints[0]}


def check_groups(groups: Mapping[str, Sequence[Sequence[Scored]]], ignore: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is wrong, what was let pass): the seeds of each backbone, that these are the same everywhere, and the facts of all together."""
    several = len(groups) > 1
    problems = [f"{name}{': ' * several}{text}" for name, sides in groups.items() for text in check_seeds(*sides)]
    seeds = {name: sorted({run.seed for side in sides for run in side if run.seed is not None}) for name, sides in groups.items()}
    if len(set(map(str, seeds.values()))) > 1:
        shown = "; ".join(f"{name} {', '.join(map(str, found))}" for name, found in seeds.items())
        problems.append(f"expected the same seeds for each backbone, found {shown}")
    alike = lambda run: run._replace(facts={name: value for name, value in run.facts.items() if not several or name not in BACKBONE})
    together = [[alike(run) for sides in groups.values() for run in sides[n]] for n in (0, 1)]
    wrong, passed = check_facts(together[0], together[1], ignore)
    return [*problems, *wrong, *check_cells(together[0] + together[1])], passed


def pair_runs(settings: CompareSettings) -> tuple[dict[str, list[tuple[Scored, Scored]]], list[str]]:
    """By backbone (of one: "") the (baseline, candidate) of each seed, ascending, and notes on what was let pass. Raises ValueError that
    lists all that does not match."""
    problems = [f"{name}: expected at least {least}, found {value}" for name, value, least in (
        ("baseline runs", len(settings.baseline), 1), ("candidate runs", len(settings.candidate), 1),
        ("resamples", settings.resamples, 100), ("seed", settings.seed, 0)) if value < least]
    sides: list[list[Scored]] = [[], []]
    for side, runs in zip(sides, (settings.baseline, settings.candidate)):
        for run in runs:
            try:
                side.append(read_scored(run))
            except (ValueError, OSError) as error:
                problems.append(str(error))
    if not problems:
        groups = by_backbone(*sides)
        problems, passed = check_groups(groups, settings.ignore)
    if problems:
        raise ValueError("\n  ".join(["compare: these runs cannot be compared (--ignore NAMES lets settings differ):", *problems]))
    facts, notes = sides[0][0].facts, [f"ignored: {text}" for text in passed]
    if dirty := sorted({str(run.facts["commit"]) for run in sides[0] + sides[1] if str(run.facts["commit"]).endswith("-dirty")}):
        notes.append(f"warning: scored with uncommitted changes, perhaps not the same ones: {', '.join(dirty)}")
    if unknown := [name for name in facts if facts[name] is None]:
        notes.append(f"warning: not recorded, so not compared: {', '.join(unknown)}")
    return {name: list(zip(*(sorted(side, key=lambda run: run.seed or 0) for side in group))) for name, group in groups.items()}, notes


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs: statistics
# ---------------------------------------------------------------------------------------------------------------------

class Grid(NamedTuple):
    """One task's items, S seeds by N items. Rows: K rules (value: per cent of the samples that are right, size: 1), then the reference
    solution (value: log-likelihood, size: tokens, for each sample); both 0 where an item has none. A figure is sum of values / sum of sizes."""

    rules: list[str]
    values: np.ndarray  # (K + 1, 2, S, N): baseline and candidate
    sizes: np.ndarray  # (K + 1, N)
    partial: int  # items whose log-likelihood some of the runs lack; they count as without one


Part = tuple[Any, Any, Any, Any, Any]  # a row's sums over items: values (2,S), size (), of R resamples gaps (R,), sizes (R,); its n and size


def build_grid(pairs: Sequence[tuple[Scored, Scored]], task: str) -> Grid:
    """The paired cells of one task, items in the order of their ids, the samples of an item together."""
    keys = sorted(key for key in pairs[0][0].cells if key[0] == task)
    rules = list(dict.fromkeys(rule for key in keys for rule in pairs[0][0].cells[key].verdicts))
    place = {name: n for n, name in enumerate(dict.fromkeys(key[1] for key in keys))}
    values, sizes, partial = np.zeros((len(rules) + 1, 2, len(pairs), len(place))), np.zeros((len(rules) + 1, len(place))), 0
    for key in keys:
        n, cells = place[key[1]], [[run.cells[key] for run in side] for side in zip(*pairs)]
        values[:-1, :, :, n] += [[[cell.verdicts.get(rule, 0) for cell in side] for side in cells] for rule in rules]
        sizes[:-1, n] += [rule in cells[0][0].verdicts for rule in rules]  # plus tests, say, are not there for every program
        known = [cell.logprob for side in cells for cell in side if cell.logprob is not None]
        if len(known) == 2 * len(pairs):
            values[-1, :, :, n] += np.reshape(known, (2, len(pairs)))
            sizes[-1, n] += cells[0][0].tokens
        partial += 0 < len(known) < 2 * len(pairs)
    values[:-1] *= 100 / np.maximum(sizes[:-1], 1)[:, None, None]
    sizes[:-1] = sizes[:-1] > 0
    return Grid(rules, values, sizes, partial)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p = min(1, 2 P(X <= min(gained, lost))), X ~ Binomial(gained + lost, 1/2), in whole numbers up to the last division.
    It takes item-seed pairs as independent. Over several seeds they are not, an item comes once a seed: go by the interval then."""
    n, fewer = gained + lost, min(gained, lost)
    chosen = accumulate(range(fewer), lambda c, k: c * (n - k) // (k + 1), initial=1)  # C(n, 0), ..., C(n, fewer)
    return min(1.0, 2 * sum(chosen) / 2**n)


def draw_counts(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """(rows, n): in each row, how often each of n things comes up in n draws with replacement."""
    draws = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def resample(grid: Grid, seeds: np.ndarray, rng: np.random.Generator, cells: int = 1 << 20) -> list[Part]:
    """Hierarchical bootstrap. seeds (R,S): how often resample r drew seed s; w (R,N): how often it drew item i, for all seeds at once, as
    items are crossed with seeds: gap_r = sum_s seeds_rs / S sum_i w_ri (candidate_si - baseline_si), size_r = sum_i w_ri size_i.
    With few seeds the interval is too narrow: the variance between seeds comes out (S - 1) / S of what it is."""
    rows, _, count, n = grid.values.shape
    flat, step = (grid.values[:, 1] - grid.values[:, 0]).reshape(rows * count, n), max(1, cells // n)
    gaps, sizes = [], []
    for m in (seeds[first:first + step] for first in range(0, len(seeds), step)):
        w = draw_counts(rng, len(m), n)
        gaps.append(np.einsum("rks,rs->kr", (w @ flat.T).reshape(len(m), rows, count), m / count))
        sizes.append(grid.sizes @ w.T)
    counts = np.stack([(grid.sizes > 0).sum(-1), grid.sizes.sum(-1)], 1)
    return list(zip(grid.values.sum(-1), grid.sizes.sum(-1), np.concatenate(gaps, 1), np.concatenate(sizes, 1), counts))


def estimate(parts: Sequence[Part]) -> Record:
    """Of parts added together: sum of values / sum of sizes on both sides, the difference, its 95 % percentile interval, how many seeds the
    candidate wins, n items and their size. Reference solutions: sum_i (log p_candidate(solution_i) - log p_baseline(solution_i)) /
    sum_i tokens_i, in nats per token; above 0, the candidate finds them likelier."""
    values, size, gaps, sizes, (n, total) = (sum(column) for column in zip(*parts))
    by_seed = (values[1] - values[0]) / size
    ahead = np.sign(np.round(by_seed, 10))
    interval = np.nanpercentile(gaps / np.where(sizes > 0, sizes, np.nan), [2.5, 97.5])  # a resample may hold no reference solution at all
    return {"n": int(n), "size": int(total), "baseline": float(values[0].mean() / size), "candidate": float(values[1].mean() / size),
            "difference": float(by_seed.mean()), "interval95": interval.tolist(), "by_seed": by_seed.tolist(),
            "seeds_won": int((ahead > 0).sum()), "seeds_tied": int((ahead == 0).sum())}


def flips(gaps: np.ndarray) -> Record:
    """Item-seed pairs that became right and wrong (with several samples: right more often and less often), and McNemar's p."""
    gained, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
    return {"gained": gained, "lost": lost, "mcnemar_p": mcnemar(gained, lost)}


def statistics(grids: Mapping[str, Grid], settings: CompareSettings) -> Record:
    """Every rule and the reference solution of each task; pooled, the first rules and the reference solutions, as the mean of tasks, which
    count alike, and over all items. A resample draws its seeds once for all tasks, and items within each task: the same ones for every
    backbone, whose grids are named BACKBONE/TASK."""
    seeds = draw_counts(np.random.default_rng(settings.seed), settings.resamples, next(iter(grids.values())).values.shape[2])
    items = lambda task: np.random.default_rng([settings.seed, zlib.crc32(task.rpartition("/")[2].encode())])
    parts = {task: resample(grid, seeds, items(task)) for task, grid in grids.items()}
    gaps = {task: grid.values[:, 1] - grid.values[:, 0] for task, grid in grids.items()}
    tasks = {task: {"rules": {rule: estimate([parts[task][k]]) | flips(gaps[task][k]) for k, rule in enumerate(grid.rules)},
                    "reference": estimate(parts[task][-1:]) if grid.sizes[-1].any() else None} for task, grid in grids.items()}
    alike = lambda parts: [(values / n, 1, gaps / np.where(sizes > 0, sizes, np.nan), np.ones_like(gaps), counts)
                           for values, n, gaps, sizes, counts in parts]
    first, last = [part[0] for part in parts.values()], [part[-1] for part in parts.values() if part[-1][1] > 0]
    every = flips(np.concatenate([gap[0] for gap in gaps.values()], 1))
    pooled = {"mean of tasks": {"rules": {"first": estimate(alike(first))}, "reference": estimate(alike(last)) if last else None},
              "all items": {"rules": {"first": estimate(first) | every}, "reference": estimate(last) if last else None}}
    return {"tasks": tasks, "pooled": pooled}


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs: table and picture
# ---------------------------------------------------------------------------------------------------------------------

def least_zero(tasks: Mapping[str, Record]) -> str:
    """How many differences are at least 0, in per cent and in likelihood; rounded as `estimate` does for seeds."""
    first = [round(next(iter(entry["rules"].values()))["difference"], 10) for entry in tasks.values()]
    last = [round(entry["reference"]["difference"], 10) for entry in tasks.values() if entry["reference"]]
    return "differences of at least 0: " + ", ".join(f"{sum(x >= 0 for x in found)} of {len(found)} {what}" for what, found in (
        ("in per cent", first), ("in log-likelihood", last)) if found)


def comparison_table(result: Record) -> str:
    """A line a rule and the pooled lines, then the same for the reference solutions, then the notes."""
    show = lambda line, digits: [f"{line['baseline']:.{digits}f}", f"{line['candidate']:.{digits}f}", f"{line['difference']:+.{digits}f}",
                                 "{:+.{d}f} to {:+.{d}f}".format(*line["interval95"], d=digits)]
    won = lambda line: f"{line['seeds_won']} of {len(result['seeds'])}" + (f" ({line['seeds_tied']} tied)" if line["seeds_tied"] else "")
    verdicts, references = [], []
    for name, entry in shown(result).items():
        for k, (rule, line) in enumerate(entry["rules"].items()):
            label = f"  {rule}" if k else f"{name} {rule}" if len(entry["rules"]) > 1 else name
            verdicts.append([label, line["n"], *show(line, 2), *([f"+{line['gained']} -{line['lost']}", f"{line['mcnemar_p']:.3g}"]
                                                                  if "gained" in line else ["", ""]), won(line)])
        if line := entry["reference"]:
            references.append([name, line["n"], *show(line, 5), line["size"], won(line)])
    columns = ["difference", "95 % interval"]
    text = table(["task", "n", "baseline %", "candidate %", *columns, "flips", "McNemar p", "seeds won"], verdicts)
    if references:
        text += "\n\nlog-likelihood of the reference solution, nats per token\n" + table(
            ["task", "n", "baseline", "candidate", *columns, "tokens", "seeds won"], references)
    if len(result["tasks"]) > 1:
        text += f"\n{least_zero(result['tasks'])}"
    return "\n".join([text, *result["notes"]])


def compared(settings: CompareSettings) -> Record:
    """Pair and compare the runs; returns what comparison.json holds. Raises ValueError."""
    groups, notes = pair_runs(settings)
    grids = {f"{name}{'/' * bool(name)}{task}": build_grid(pairs, task) for name, pairs in groups.items()
             for task in dict.fromkeys(key[0] for key in pairs[0][0].cells)}
    pairs = next(iter(groups.values()))
    facts = pairs[0][0].facts
    if len(groups) > 1:
        facts = facts | {fact: {name: found[0][0].facts.get(fact) for name, found in groups.items()} for fact in BACKBONE if fact in facts}
    notes += [f"warning: {task}: a reference log-likelihood is missing in some of the runs for {grid.partial} items, which are left out of it"
              for task, grid in grids.items() if grid.partial]
    notes += ["one seed: the intervals hold the variation over items alone, none over seeds"] * (len(pairs) == 1)
    return {"settings": asdict(settings), "seeds": [b.seed if c.seed is None else c.seed for b, c in pairs], "notes": notes,
            "runs": [{"baseline": b.folder, "candidate": c.folder} for pairs in groups.values() for b, c in pairs],
            "facts": facts, **statistics(grids, settings)}


def compare(settings: CompareSettings, name: str = "comparison") -> Record:
    """Compare the runs: prints the table, writes NAME.json and NAME.png, returns what the JSON holds. Raises ValueError."""
    result = compared(settings)
    out = Path(settings.out or Path(settings.candidate[0], "comparison"))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier comparison
    picture = f" and {name}.png" if draw_comparison(result, out / f"{name}.png") else "; no picture: matplotlib is not installed"
    print(f"{comparison_table(result)}\nwrote {out / f'{name}.json'}{picture}")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

def main(word: str, explicit: dict[str, Any]) -> None:
    """Run the command. Raises ValueError on bad input."""
    settings = COMMANDS[word](**explicit)
    if word == "score":
        (check_references if settings.check_references else rescore if settings.rescore else score)(settings)
    elif word == "compare":
        compare(settings)
    elif word == "internals":
        from data.internals import internals

        internals(settings)
    else:
        from data.overhead import overhead

        overhead(settings)


if __name__ == "__main__":
    try:
        main(WORD, GIVEN)
        if "data.ranks" in sys.modules:
            sys.modules["data.ranks"].close_ranks()
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.py: {error}") from None
