"""MBPP (500 test tasks, ids 11-510), and MBPP+ (224 of them, with its own requests and asserts): a Python function from a sentence."""

from __future__ import annotations

from dataclasses import replace

from data.plus import mbpp_inputs, plus_tests
from data.task import Row, Task, cut, fenced, json_lines

SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}


def chat(row: Row) -> tuple[str, str]:
    """The request, and a reply that has opened a block of code."""
    return row["prompt"], "```python\n"


def plain(row: Row) -> tuple[str, str]:
    """The request and the mark at which the code begins."""
    return row["prompt"], "\n[BEGIN]\n"


def program(row: Row, completion: str, form: str) -> str:
    """What was written, up to the end of the block or to [DONE]."""
    return fenced(completion) if form == "chat" else cut(completion, TASK.stops)


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{"task_id", "text", "code", "test_list", "test_setup_code"} -> rows by split, the shots being ids 2, 3, 4; MBPP+ -> split plus."""
    sources = {s["task_id"]: s for s in json_lines(files["all"])}
    rows = {split: [convert_row(sources[i]) for i in ids] for split, ids in SPLITS.items()}
    plus = [convert_plus(s) for s in json_lines(files["plus"]) if int(s["task_id"][5:]) in SPLITS["test"]]
    return {**rows, "shots": rows["prompt"][1:4], "plus": plus}


def make_row(name: str, text: str, code: str, shown: str, tests: str) -> Row:
    """One row; `shown` are the asserts that the model sees."""
    ask = f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{shown}"
    return {"id": name, "prompt": ask, "completion": f"```python\n{code}\n```", "answer": "", "code": code, "tests": tests}


def convert_row(source: Row) -> Row:
    """One task of MBPP; the source ends its lines with \\r\\n."""
    code, setup, tests = (text.replace("\r\n", "\n") for text in (source["code"], source["test_setup_code"], "\n".join(source["test_list"])))
    return make_row(f"Mbpp/{source['task_id']}", source["text"], code, tests, f"{setup}\n{tests}")


def convert_plus(source: Row) -> Row:
    """One task of MBPP+, whose prompt is a docstring of the sentence and the asserts."""
    text, _, shown = source["prompt"].strip().strip('"').strip().partition("\nassert")
    base, plus = (mbpp_inputs(int(source["task_id"][5:]), source[key] or []) for key in ("base_input", "plus_input"))  # {} where there are none
    base_tests, every = (plus_tests(source, source["canonical_solution"], inputs) for inputs in (base, base + plus))
    row = make_row(source["task_id"], text, source["canonical_solution"].strip("\n"), f"assert{shown}", base_tests)
    return {**row, "entry_point": source["entry_point"], "plus_tests": every}


TASK = Task("mbpp", "code", convert=convert, shots="mbpp/shots.jsonl", chat=chat, plain=plain, program=program, between="", end="\n[DONE]",
            stops=("[DONE]",))
PLUS = replace(TASK, name="mbpp_plus", file="mbpp/plus.jsonl", convert=None)
