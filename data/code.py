"""HumanEval, MBPP and EvalPlus' further tests: rows from their files, programs from answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=len(text))]


def without_fence(text: str) -> str:
    """What continues an opened block of code: the text, without a fence that opens it once more."""
    return text.lstrip().partition("\n")[2] if text.lstrip().startswith("```") else text


# ---- HumanEval ----


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
        reference, inputs = plus["prompt"] + plus["canonical_solution"], plus["base_input"]
        row["plus_tests"] = plus_tests(plus, reference, inputs + plus["plus_input"])
        rows.append(row | {"completion": f"{humaneval_chat(row)[1]}{code}```"})
    return {"test": rows}


# ---- MBPP ----


def mbpp_program(row: Row, completion: str, form: str) -> str:
    """What was written: the block, or plain text up to [DONE]."""
    if form == "chat":
        return cut(without_fence(completion), ["```"])
    return cut(completion, MBPP_STOPS)


def convert_mbpp(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """mbpp.jsonl as rows by split (the shots are ids 2, 3, 4), MBPP+'s test tasks as split plus."""
    made = {}
    for source in json_lines(files["all"]):  # its code ends lines with \r\n
        shown = "\n".join(source["test_list"])
        texts = (source["code"], shown, f"{source['test_setup_code']}\n{shown}")
        code, shown, tests = (text.replace("\r\n", "\n") for text in texts)
        name = f"Mbpp/{source['task_id']}"
        made[source["task_id"]] = mbpp_row(name, source["text"], code, shown, tests)
    rows = {split: [made[i] for i in range(*ids)] for split, ids in MBPP_SPLITS.items()}
    rows |= {"shots": rows["prompt"][1:4], "plus": []}
    for source in json_lines(files["plus"]):
        number = int(source["task_id"].removeprefix("Mbpp/"))
        if number in range(*MBPP_SPLITS["test"]):
            rows["plus"].append(mbpp_plus_row(source, number))
    return rows


def mbpp_row(name: str, text: str, code: str, shown: str, tests: str) -> Row:
    """One row; `shown` are the asserts that the model sees."""
    ask = "You are an expert Python programmer, and here is your task:"
    prompt = f"{ask} {text} Your code should pass these tests:\n\n{shown}"
    row = {"id": name, "prompt": prompt, "completion": f"```python\n{code}\n```"}
    return row | {"answer": "", "code": code, "tests": tests}


def mbpp_plus_row(source: Row, number: int) -> Row:
    """One task of MBPP+, whose prompt is a docstring of the sentence and the asserts."""
    text, _, asserts = source["prompt"].strip().strip('"').strip().partition("\nassert")
    code = source["canonical_solution"]
    base = [restore_types(number, args) for args in source["base_input"] or []]
    more = [restore_types(number, args) for args in source["plus_input"] or []]
    tests = plus_tests(source, code, base)
    row = mbpp_row(source["task_id"], text, code.strip("\n"), f"assert{asserts}", tests)
    row["entry_point"] = source["entry_point"]
    return row | {"plus_tests": plus_tests(source, code, base + more)}


# ---- EvalPlus: a program compares with the reference solution on many inputs ----

# evalplus 0.3.1, eval/_special_oracle.py: which answers are right beside the reference's own.
AS_SETS = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum".split()
AS_SETS += ["intersection_array", "find_dissimilar", "Diff"]
NONE_OR_NOT = ["check_str", "text_match_three", "text_starta_endb"]
SPECIAL = {
    "are_equivalent": "True",
    "sum_div": "got == 0",
    "find_zero": "abs(sum(c * got ** i for i, c in enumerate(args[0]))) <= ATOL",
    "surface_Area": (
        "got == round(args[0] ** 2 + 2 * args[0] * ((args[0] / 2) ** 2 + args[1] ** 2) ** 0.5)"
    ),
    "digit_distance_nums": (
        "got == sum(abs(int(a) - int(b)) for a, b in "
        "zip(*(str(n).zfill(max(len(str(m)) for m in args)) for n in args)))"
    ),
}
PROGRAM = """
def _check(candidate):
    import copy
    import math
    inf, nan = math.inf, math.nan
    space = {{"__name__": "reference"}}
    exec({reference!r}, space)
    ATOL = {atol!r}

    def close(got, want, atol):
        if isinstance(want, (list, tuple)):
            return len(got) == len(want) and all(close(g, w, atol) for g, w in zip(got, want))
        if got == want or isinstance(want, str):
            return got == want
        return abs(got - want) <= atol + 1e-7 * abs(want)

    def floats(x):
        if isinstance(x, (list, tuple)):
            return len(x) > 0 and all(isinstance(i, float) for i in x)
        return isinstance(x, float)

    for args in {inputs!r}:
        want = space[{name!r}](*copy.deepcopy(args))
        got = candidate(*copy.deepcopy(args))
        atol = ATOL or (1e-6 if floats(want) else 0)
        assert {right}, (
            f"{name}{{tuple(args)!r:.200}}: expected {{want!r:.200}}, found {{got!r:.200}}")
_check({name})
"""


def plus_tests(source: Row, reference: str, inputs: list[list[Any]]) -> str:
    """A program that asserts agreement with the reference solution on every input."""
    name = source["entry_point"]
    right = "got == want or (atol and type(got) == type(want) and close(got, want, atol))"
    if name in AS_SETS:
        right = "set(got) == set(want)"
    elif name in NONE_OR_NOT:
        truth = "({0} if isinstance({0}, bool) else {0} is not None)"
        right = f"{truth.format('got')} == {truth.format('want')}"
    elif name in SPECIAL:
        right = SPECIAL[name] if name == "find_zero" else f"{right} or {SPECIAL[name]}"
    atol = source["atol"]
    return PROGRAM.format(name=name, right=right, reference=reference, atol=atol, inputs=inputs)


# evalplus 0.3.1, data/mbpp.py: JSON has lists only; which tasks' arguments are tuples at what depth,
TUPLES = {
    1: "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    2: "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
    -2: "259 401 445 278 580 615 791",
}
FIRST = {0: "250 307 405 446 617 720 763 808", 1: "75 413 444 753"}  # or their first argument alone


def tuples(depth: int, value: Any) -> Any:
    """Lists become tuples at this depth below `value`; depth < 0: from depth -depth - 1 on."""
    if not isinstance(value, list):
        return value
    if depth < 0:
        parts = [tuples(min(depth + 1, -1), v) for v in value]
        return tuple(parts) if depth == -1 else parts
    return tuple(value) if depth == 0 else [tuples(depth - 1, v) for v in value]


def restore_types(number: int, args: list[Any]) -> list[Any]:
    """The arguments of MBPP task `number` as its own tests write them."""
    for depth, numbers in TUPLES.items():
        if str(number) in numbers.split():
            return tuples(depth, args)
    first, *rest = args
    for depth, numbers in FIRST.items():
        if str(number) in numbers.split():
            first = tuples(depth, first)
    if number in (106, 750):
        rest = [tuple(rest[0])]
    elif number == 115:
        first = [set(v) if isinstance(v, list) and v else {} for v in first]
    elif number == 124:
        first, rest = float(first), [complex(rest[0])]
    elif number == 252:
        first = complex(first)
    elif number == 722:
        first = {key: tuple(value) for key, value in first.items()}
    return [first, *rest]
