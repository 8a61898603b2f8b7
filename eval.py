"""Evaluation: `python eval.py [score] --adapter RUN`, `python eval.py --rescore records.jsonl`.

One task = load rows, render the prompt, generate, extract the answer, grade it: pure functions but for the generation, one
JSONL record an example, so that records can be scored again without a model.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from data.settings import given, setting

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """Score a backbone, alone or with a saved adapter and side path, on tasks of prompts with one right answer."""

    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's own, else the embedded one")
    adapter: str = setting("", "run folder or PEFT folder; empty: the bare backbone")
    tasks: tuple[str, ...] = setting(("math", "word", "science", "code"), "embedded tasks, or JSONL files of {prompt or messages, answer}")
    out: str = setting("", "folder for records.jsonl and results.json; empty: ADAPTER/eval, or runs/eval for a bare backbone")
    limit: int = setting(0, "first items of each task; 0: all")
    max_new_tokens: int = setting(128, "longest answer in tokens; a longer one counts as truncated")
    batch_rows: int = setting(64, "answers generated at once")
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    seed: int = setting(0, "seeds sampling")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on a GPU")
    rescore: str = setting("", "records.jsonl of an earlier run: extract and grade again, without a model")


GIVEN = given(Settings, sys.argv[2:] if sys.argv[1:2] == ["score"] else sys.argv[1:]) if __name__ == "__main__" else {}  # --help needs no torch

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data.rows import check_messages, parse_object, read_lines
from data.tiny.tasks import TASKS, extract, grade

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """Where the rows are, how an answer is found in a completion, and when it is right."""

    name: str
    file: Path
    extract: Callable[[str], str | None] = extract
    grade: Callable[[str, str], bool] = grade


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; a path ending in .jsonl is a task of one's own. Raises ValueError that lists the unknown ones."""
    known = {name: Task(name, HERE / "data/tiny/test" / f"{name}.jsonl") for name in TASKS}
    unknown = [name for name in names if name not in known and not name.endswith(".jsonl")]
    if unknown or not names:
        raise ValueError(f"tasks: expected some of {', '.join(known)} or JSONL files, found {', '.join(unknown) or 'none'}")
    tasks = [known.get(name) or Task(Path(name).stem, Path(name)) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"tasks: each name may come once, found {', '.join(task.name for task in tasks)}")
    return tasks


def load_items(task: Task, limit: int = 0) -> list[Record]:
    """Rows {id, messages, answer} of a task. Raises ValueError with file:line on a row without a prompt or an answer."""
    items = [parse_item(line, where) for where, line in read_lines(task.file)]
    if not items:
        raise ValueError(f"{task.file}: no items")
    return items[:limit or None]


def parse_item(line: bytes, where: str) -> Record:
    """{"prompt" or "messages", "answer", "id" (else the line's number)} -> {id, messages, answer}. Raises ValueError."""
    row = parse_object(line, where)
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row.get("prompt")}]
    if not isinstance(row.get("answer"), str):
        raise ValueError(f"{where}: expected an answer in text, found {row.get('answer')!r}")
    return {"id": str(row.get("id", where.rpartition(":")[2])), "messages": check_messages(messages, where), "answer": row["answer"]}


def make_record(task: Task, item: Record, completion: str, tokens: int, truncated: bool) -> Record:
    """One example's line: what was asked, what came back, what was read from it, and the verdict."""
    found = task.extract(completion)
    return {"task": task.name, "id": item["id"], "messages": item["messages"], "completion": completion, "tokens": tokens,
            "truncated": truncated, "extracted": found, "answer": item["answer"],
            "correct": found is not None and task.grade(found, item["answer"])}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and tables
# ---------------------------------------------------------------------------------------------------------------------

def wilson(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, a = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + a / (4 * n))
    return max(0.0, (p + a / 2 - half) / (1 + a)), min(1.0, (p + a / 2 + half) / (1 + a))


def summarize(records: Iterable[Record]) -> dict[str, Record]:
    """Per task: n, score and its 95 % interval in per cent, and how many answers were unparsed or truncated."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    return {task: summary(rows) for task, rows in by_task.items()}


def summary(rows: Sequence[Record]) -> Record:
    """The same for the records of one task."""
    right = sum(r["correct"] for r in rows)
    return {"n": len(rows), "score": 100 * right / len(rows), "interval95": [100 * x for x in wilson(right, len(rows))],
            "unparsed": sum(r["extracted"] is None for r in rows), "truncated": sum(r["truncated"] for r in rows)}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text columns, the first aligned left, the others right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells)


def score_table(summaries: dict[str, Record]) -> str:
    """One line a task and their mean."""
    rows = [[task, s["n"], f"{s['score']:.1f}", "{:.1f} to {:.1f}".format(*s["interval95"]), s["unparsed"], s["truncated"]]
            for task, s in summaries.items()]
    mean = sum(s["score"] for s in summaries.values()) / len(summaries)
    return table(["task", "n", "score %", "95 % interval", "unparsed", "truncated"], [*rows, ["mean", "", f"{mean:.1f}", "", "", ""]])


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
    """Generate and grade every item; writes records.jsonl and results.json, prints the table, returns the summaries."""
    from model import atomic, choose_device, choose_dtype, header, load_model, load_tokenizer
    from talan import load_adapter

    tasks = find_tasks(settings.tasks)
    items = {task.name: load_items(task, settings.limit) for task in tasks}
    device, backbone = choose_device(settings.device), settings.backbone or recorded_backbone(settings.adapter)
    model, tokenizer = load_model(backbone, device, choose_dtype(settings.dtype, device)), load_tokenizer(backbone)
    if settings.adapter:
        load_adapter(model, settings.adapter)
    began, records = time.perf_counter(), []
    for task in tasks:
        records += run_task(task, items[task.name], model, tokenizer, settings)
    seconds, summaries = time.perf_counter() - began, summarize(records)
    out = Path(settings.out or (Path(settings.adapter) / "eval" if settings.adapter else "runs/eval"))
    results = {**header(asdict(settings), device), "backbone": backbone, "fingerprint": model.fingerprint, "tasks": summaries,
               "seconds": round(seconds, 2), "tokens_per_second": round(sum(r["tokens"] for r in records) / seconds)}
    with atomic(out / "records.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    with atomic(out / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{backbone}{' + ' + settings.adapter if settings.adapter else ''}: {len(records)} answers in {seconds:.1f} s "
          f"({results['tokens_per_second']:,} tokens/s), records in {out}\n{score_table(summaries)}")
    return summaries


def recorded_backbone(adapter: str) -> str:
    """The backbone that an adapter folder names, or the embedded one."""
    from model import read_json
    from talan import checkpoint_folder

    for name in ("adapter_config.json", "talan_config.json") if adapter else ():
        if (file := checkpoint_folder(adapter) / name).exists() and (base := read_json(file).get("base_model_name_or_path")):
            return base
    return str(HERE / "data/tiny/model")


def run_task(task: Task, items: list[Record], model: Any, tokenizer: Any, settings: Settings) -> Iterator[Record]:
    """Generate an answer to every item of one task and yield its record."""
    from model import generate

    prompts = [tokenizer.encode(tokenizer.render(item["messages"], add_generation_prompt=True)) for item in items]
    answers = generate(model, prompts, settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p,
                       seed=settings.seed, eos_ids=tokenizer.eos_ids, batch_rows=settings.batch_rows)
    for item, ids in zip(items, answers):
        stopped = ids and ids[-1] in tokenizer.eos_ids
        yield make_record(task, item, tokenizer.decode(ids[:-1] if stopped else ids), len(ids), not stopped)


def rescore(file: str) -> dict[str, Record]:
    """Extract and grade stored completions again, offline; prints the table and how many verdicts changed. Raises ValueError."""
    own, records, changed = {name: Task(name, Path(name)) for name in TASKS}, [], 0
    try:
        stored = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
        for old in stored:
            task = own.get(old["task"]) or Task(old["task"], Path(file))
            records.append(new := make_record(task, old, old["completion"], old["tokens"], old["truncated"]))
            changed += new["correct"] != old["correct"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected records written by eval.py, one JSON object a line: {error!r}") from None
    if not records:
        raise ValueError(f"{file}: no records")
    print(f"{file}: {len(records)} records, {changed} verdicts changed\n{score_table(summaries := summarize(records))}")
    return summaries


def main(explicit: dict[str, Any]) -> None:
    """Run the command. Raises SystemExit with one message on bad input."""
    settings = Settings(**explicit)
    if settings.rescore:
        rescore(settings.rescore)
    else:
        score(settings)


if __name__ == "__main__":
    try:
        main(GIVEN)
    except ValueError as error:
        raise SystemExit(f"eval.py: {error}") from None
