"""HumanEval, MBPP and EvalPlus' further tests: rows from their files, programs from answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

Row = dict[str, Any]
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("[DONE]",)
MBPP_SPLITS = {"prompt": (1, 11), "test": (11, 511), "validation": (511, 601), "train": (601, 975)}


def json_lines(content: bytes) -> list[Row]:
    """The objects of a JSONL file; only a line feed ends a line."""
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]


def cut(text: str, stops: Sequence[str]) -> str:
    """What comes before the first of the stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def without_fence(text: str) -> str:
    """What continues an opened block of code: the text, without a fence that opens it once more."""
    return text.lstrip().partition("\n")[2] if text.lstrip().startswith("```") else text


def humaneval_chat(row: Row) -> tuple[str, str]:
    """The request, and a reply that has written the prompt already."""
    ask = "Write a solution to the following problem and make sure that it passes the tests:"
    begun = f"Here is the completed function:\n```python\n{row['prompt']}\n"
    return f"{ask}\n```python\n{row['prompt']}\n```\n", begun


def humaneval_program(row: Row, completion: str, form: str) -> str:
    """The prompt and what was written after it: its block, or plain text up to a new statement."""
    if form == "chat":
        return f"{row['prompt']}\n{cut(without_fence(completion), ['```'])}"
    return row["prompt"] + cut(completion, HUMANEVAL_STOPS)


def convert_humaneval(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """HumanEval.jsonl and HumanEval+'s inputs, task by task, as rows. Raises ValueError."""
    rows = []
    for source, plus in zip(json_lines(files["test"]), json_lines(files["plus"]), strict=True):
        name, code, entry = source["task_id"], source["canonical_solution"], source["entry_point"]
        if plus["task_id"] != name:
            raise ValueError(f"{name}: expected its plus tests, found those of {plus['task_id']}")
        row = {"id": name, "prompt": source["prompt"], "code": code, "answer": ""}
        row |= {"entry_point": entry, "tests": f"{source['test']}\ncheck({entry})"}
        reference = plus["prompt"] + plus["canonical_solution"]
        row["plus_tests"] = plus_tests(plus, reference, plus["base_input"] + plus["plus_input"])
        rows.append(row | {"completion": f"{humaneval_chat(row)[1]}{code}```"})
    return {"test": rows}


def mbpp_program(row: Row, completion: str, form: str) -> str:
    """What was written: the block, or plain text up to [DONE]."""
    if form == "chat":
        return cut(without_fence(completion), ["```"])
    return cut(completion, MBPP_STOPS)


def convert_mbpp(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """mbpp.jsonl as rows by split (the shots are ids 2, 3, 4), MBPP+'s test tasks as split plus."""
    made = {}
    for source in json_lines(files["all"]):  # its code ends lines with \r\n
        texts = (source["code"], "\n".join(source["test_list"]), source["test_setup_code"])
        code, shown, setup = (text.replace("\r\n", "\n") for text in texts)
        row = mbpp_row(f"Mbpp/{source['task_id']}", source["text"], code, shown)
        made[source["task_id"]] = row | {"tests": f"{setup}\n{shown}"}
    rows = {}
    for split, ids in MBPP_SPLITS.items():
        rows[split] = [made[i] for i in range(*ids)]
    names = {row["id"] for row in rows["test"]}
    plus = [mbpp_plus_row(s) for s in json_lines(files["plus"]) if s["task_id"] in names]
    return rows | {"shots": rows["prompt"][1:4], "plus": plus}


def mbpp_row(name: str, text: str, code: str, shown: str) -> Row:
    """One row without its tests; `shown` are the asserts that the model sees."""
    ask = f"You are an expert Python programmer, and here is your task: {text}"
    prompt = f"{ask} Your code should pass these tests:\n\n{shown}"
    completion = f"```python\n{code}\n```"
    return {"id": name, "prompt": prompt, "completion": completion, "answer": "", "code": code}


def mbpp_plus_row(source: Row) -> Row:
    """One task of MBPP+, whose prompt is a docstring of the sentence and the asserts."""
    name, code = source["task_id"], source["canonical_solution"]
    text, _, shown = source["prompt"].strip().strip('"').strip().partition("\nassert")
    base, more = (restore_types(name, source[f"{kind}_input"] or []) for kind in ("base", "plus"))
    row = mbpp_row(name, text, code.strip("\n"), f"assert{shown}")
    row |= {"tests": plus_tests(source, code, base), "entry_point": source["entry_point"]}
    return row | {"plus_tests": plus_tests(source, code, base + more)}


# evalplus 0.3.1, eval/_special_oracle.py: when an answer is right, in general and by entry point.
CLOSE = "got == want or (atol and type(got) == type(want) and close(got, want, atol))"
AREA = "got == round(args[0] ** 2 + 2 * args[0] * ((args[0] / 2) ** 2 + args[1] ** 2) ** 0.5)"
DIGITS = "zip(*(str(n).zfill(max(len(str(m)) for m in args)) for n in args))"
RIGHT = {
    "are_equivalent": f"{CLOSE} or True",
    "sum_div": f"{CLOSE} or got == 0",
    "find_zero": "abs(sum(c * got ** i for i, c in enumerate(args[0]))) <= ATOL",
    "surface_Area": f"{CLOSE} or {AREA}",
    "digit_distance_nums": f"{CLOSE} or got == sum(abs(int(a) - int(b)) for a, b in {DIGITS})",
}
AS_SETS = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum"
AS_SETS += " intersection_array find_dissimilar Diff"
RIGHT |= dict.fromkeys(AS_SETS.split(), "set(got) == set(want)")
ONE_TRUTH = "len({x if isinstance(x, bool) else x is not None for x in (got, want)}) == 1"
RIGHT |= dict.fromkeys(["check_str", "text_match_three", "text_starta_endb"], ONE_TRUTH)
PROGRAM = """
def _check(candidate):
    from copy import deepcopy
    from math import inf, nan
    space, ATOL = {{"__name__": "reference"}}, {atol!r}
    exec({reference!r}, space)

    def close(a, b, atol):
        if isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(close(*pair, atol) for pair in zip(a, b))
        return a == b or (not isinstance(b, str) and abs(a - b) <= atol + 1e-7 * abs(b))

    for args in {inputs!r}:
        want, got = [solve(*deepcopy(args)) for solve in (space[{name!r}], candidate)]
        values = want if isinstance(want, (list, tuple)) else [want]
        atol = ATOL or (1e-6 if all(isinstance(x, float) for x in values) else 0)
        assert {right}, f"{name}{{tuple(args)!r:.99}}: expected {{want!r:.99}}, found {{got!r:.99}}"
_check({name})
"""


def plus_tests(source: Row, reference: str, inputs: list[list[Any]]) -> str:
    """A program that asserts agreement with the reference solution on every input."""
    name, atol = source["entry_point"], source["atol"]
    right = RIGHT.get(name, CLOSE)
    return PROGRAM.format(name=name, right=right, reference=reference, atol=atol, inputs=inputs)


# evalplus 0.3.1, data/mbpp.py: what JSON's lists are in the arguments of these test tasks.
TYPES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "116 132 143 222 250 261 273 307 394 399 405 421 424 429 470": lambda a: tuples((1,), a),
    "63 64 70 75 94 120 237 272 299 400 409 413 417 438 444 473": lambda a: tuples((2,), a),
    "259 278 401 445": lambda a: tuples(range(1, 99), a),
    "106": lambda a: [a[0], tuple(a[1])],
    "115": lambda a: [[set(v) if isinstance(v, list) and v else {} for v in a[0]]],
    "124": lambda a: [float(a[0]), complex(a[1])],
    "252": lambda a: [complex(a[0])],
    "446": lambda a: [tuple(a[0]), a[1]],
}


def tuples(levels: Collection[int], value: Any, level: int = 0) -> Any:
    """Lists become tuples at these levels, `value` being level 0."""
    if not isinstance(value, list):
        return value
    parts = [tuples(levels, part, level + 1) for part in value]
    return tuple(parts) if level in levels else parts


def restore_types(name: str, inputs: list[list[Any]]) -> list[list[Any]]:
    """The arguments of Mbpp/N from JSON as its own tests write them."""
    for numbers, restore in TYPES.items():
        if name.removeprefix("Mbpp/") in numbers.split():
            return [restore(args) for args in inputs]
    return inputs
