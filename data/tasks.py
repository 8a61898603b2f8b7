"""Every benchmark by name."""

from __future__ import annotations

from data import arc, gsm8k, humaneval, math500, mbpp, mmlu_stem, svamp
from data.task import Rule, Task
from data.tiny.tasks import TASKS as EMBEDDED
from data.tiny.tasks import extract, grade


def own(name: str, file: str) -> Task:
    """Rows whose answer follows the last ####: the embedded tasks, and files of one's own."""
    return Task(name, file=file, rules={"answer": Rule(extract, grade)}, stops=("Question:",), between="\n", max_new_tokens=128)


TASKS = {task.name: task for task in (
    *(own(name, f"tiny/test/{name}.jsonl") for name in EMBEDDED), gsm8k.TASK, math500.TASK, svamp.TASK, mmlu_stem.TASK, arc.CHALLENGE,
    arc.EASY, humaneval.TASK, mbpp.TASK, mbpp.PLUS)}
