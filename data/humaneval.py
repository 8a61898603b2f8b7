"""HumanEval and its plus tests: complete a Python function; program = prompt + completion, right when all its tests ran to the end."""

from __future__ import annotations

from data.plus import plus_tests
from data.task import Row, Task, cut, fenced, json_lines

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def chat(row: Row) -> tuple[str, str]:
    """The request, and a reply that has already written the prompt."""
    ask = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
    return f"{ask}{row['prompt']}\n```\n", f"Here is the completed function:\n```python\n{row['prompt']}\n"


def program(row: Row, completion: str, form: str) -> str:
    """The prompt and what was written after it, up to the end of its block (plain: to the next top-level statement)."""
    return f"{row['prompt']}\n{fenced(completion)}" if form == "chat" else row["prompt"] + cut(completion, STOPS)


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{"task_id", "prompt", "canonical_solution", "test", "entry_point"}, and HumanEval+'s inputs -> rows."""
    sources, plus = (json_lines(files[name]) for name in ("test", "plus"))
    return {"test": [convert_row(source, extra) for source, extra in zip(sources, plus, strict=True)]}


def convert_row(source: Row, extra: Row) -> Row:
    """One row. Raises ValueError when the plus tests are another task's."""
    if source["task_id"] != extra["task_id"]:
        raise ValueError(f"{source['task_id']}: expected its plus tests in the same place, found those of {extra['task_id']}")
    row = {"id": source["task_id"], "prompt": source["prompt"], "code": source["canonical_solution"], "answer": "",
           "entry_point": source["entry_point"], "tests": f"{source['test']}\ncheck({source['entry_point']})",
           "plus_tests": plus_tests(extra, extra["prompt"] + extra["canonical_solution"], extra["base_input"] + extra["plus_input"])}
    return {**row, "completion": f"{chat(row)[1]}{row['code']}```"}


TASK = Task("humaneval", "code", convert=convert, chat=chat, program=program, between="", stops=STOPS)
