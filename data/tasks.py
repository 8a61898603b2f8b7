"""Every benchmark by name; their rows, prompts and verdicts. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr
from typing import TYPE_CHECKING

from data import arc, gsm8k, humaneval, math500, mbpp, mmlu_stem, svamp
from data.rows import check_messages, parse_object, read_lines
from data.settings import nearest
from data.task import Row, Rule, Task, choose
from data.tiny.tasks import TASKS as EMBEDDED
from data.tiny.tasks import extract, grade

if TYPE_CHECKING:
    from model import Tokenizer


def own(name: str, file: str) -> Task:
    """Rows whose answer follows the last ####: the embedded tasks, and files of one's own."""
    return Task(name, file=file, rules={"answer": Rule(extract, grade)}, stops=("Question:",), between="\n", max_new_tokens=128)


TASKS = {task.name: task for task in (
    *(own(name, f"tiny/test/{name}.jsonl") for name in EMBEDDED), gsm8k.TASK, math500.TASK, svamp.TASK, mmlu_stem.TASK, arc.CHALLENGE,
    arc.EASY, humaneval.TASK, mbpp.TASK, mbpp.PLUS)}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; a path ending in .jsonl is a task of one's own. Raises ValueError that lists the unknown and the misnamed ones."""
    unknown = [name for name in names if name not in TASKS and not name.endswith(".jsonl")]
    if unknown or not names:
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)} or JSONL files, found "
                         + (", ".join(name + nearest(name, TASKS) for name in unknown) or "none"))
    tasks = [TASKS.get(name) or own(Path(name).stem, str(Path(name).resolve())) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"tasks: each name may come once, found {', '.join(task.name for task in tasks)}")
    if taken := [name for name, task in zip(names, tasks) if task.rules != TASKS.get(task.name, task).rules]:  # records have its name alone
        raise ValueError(f"tasks: --rescore would judge these by the rules of the benchmarks of that name; rename them: {', '.join(taken)}")
    return tasks


def load_items(task: Task, limit: int = 0) -> list[Row]:
    """The rows to score. Raises ValueError with file:line on a row that does not fit the task, or naming what prepares the file."""
    if not task.path.exists() and task.name in TASKS:
        raise ValueError(f"{task.path}: not there yet; prepare it with: python data/prepare.py {task.path.parent.name}")
    items = [parse_item(line, where, task.kind) for where, line in read_lines(task.path)]
    if not items or (twice := [name for name, count in Counter(item["id"] for item in items).items() if count > 1]):
        raise ValueError(f"{task.path}: " + (f"expected a different id in each row, found twice: {', '.join(twice)}" if items else "no items"))
    return items[:limit or None]


def load_pool(task: Task) -> list[Row]:
    """Rows to take examples from. Raises ValueError when the task has none."""
    if not task.shots:
        raise ValueError(f"{task.name}: there are no rows to take examples from; use --shots 0")
    return load_items(replace(task, file=task.shots))


def parse_item(line: bytes, where: str, kind: str = "generate") -> Row:
    """{"prompt" or "messages", "answer", "id" (else the line's number), ...} as data/task.py says. Raises ValueError."""
    row = parse_object(line, where)
    messages = check_messages(row["messages"] if "messages" in row else [{"role": "user", "content": row.get("prompt")}], where)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: expected messages up to the assistant's answer, found it among them: {repr(messages[-1]['content'])}")
    if not isinstance(row.get("answer"), str) or not isinstance(written := row.get("completion", "none"), str) or not written:
        raise ValueError(f"{where}: expected an answer, and a completion if there is one, not empty, in text, found {repr(row)}")
    if not isinstance(name := row.get("id", where.rpartition(":")[2]), (str, int)):
        raise ValueError(f"{where}: expected an id, a text or a whole number, found {repr(name)}")
    choices = row.get("choices")
    if kind == "choose" and not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
                                 and row["answer"] in tuple("ABCDEFGHIJ"[:len(choices)])):
        raise ValueError(f"{where}: expected choices in text and the right one's letter, found {repr(choices)} and {row['answer']!r}")
    if kind == "code" and not all(isinstance(row.get(key), str) for key in ("prompt", "code", "tests")):
        raise ValueError(f"{where}: expected prompt, code and tests in text, found {sorted(row)}")
    return {**row, "id": str(name)}


def load_shots(task: Task, item: Row, pool: Sequence[Row], count: int) -> list[Row]:
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


def ask(task: Task, item: Row, shots: Sequence[Row], form: str, tokenizer: Tokenizer) -> Prompt:
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


def judge(task: Task, record: Row) -> Row:
    """The record with its verdict under each rule; `correct` is the first. Kind code: `run_tests` does it."""
    if task.kind == "choose":
        chosen: dict[str, str | None] = {rule: "ABCDEFGHIJ"[choose(record["logprobs"], record["choices"], rule)] for rule in ("acc", "acc_norm")}
    else:
        chosen = {name: rule.extract(record["completion"]) for name, rule in task.rules.items()}
    verdicts = {rule: found is not None and (found == record["answer"] if task.kind == "choose" else task.rules[rule].grade(found, record["answer"]))
                for rule, found in chosen.items()}
    return {**record, "extracted": chosen, "verdicts": verdicts, "correct": next(iter(verdicts.values()))}
