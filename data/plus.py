"""The extra tests of EvalPlus (HumanEval+, MBPP+) as programs: the reference solution and the candidate answer the same inputs.

What is compared how, and which JSON lists stand for tuples, are facts of evalplus 0.3.1 (eval/_special_oracle.py, data/mbpp.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data.task import Row

SETS = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array",
        "find_dissimilar", "Diff"}  # the order of the result is free
EXISTS = {"check_str", "text_match_three", "text_starta_endb"}  # only whether the result is None is compared
SPECIAL = {  # entry point -> when an answer is right although it is not the reference's
    "are_equivalent": "True",
    "sum_div": "got == 0",
    "find_zero": "abs(sum(c * got ** i for i, c in enumerate(args[0]))) <= ATOL",
    "surface_Area": "got == round(args[0] ** 2 + 2 * args[0] * ((args[0] / 2) ** 2 + args[1] ** 2) ** 0.5)",
    "digit_distance_nums": "got == sum(abs(int(a) - int(b)) for a, b in zip(*(str(n).zfill(max(len(str(m)) for m in args)) for n in args)))",
}
PROGRAM = '''
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
        return got == want or (not isinstance(want, str) and abs(got - want) <= atol + 1e-7 * abs(want))

    def floats(x):
        return isinstance(x, float) or (isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(i, float) for i in x))

    for args in {inputs!r}:
        want = space[{name!r}](*copy.deepcopy(args))
        got = candidate(*copy.deepcopy(args))
        atol = ATOL or (1e-6 if floats(want) else 0)
        assert {right}, f"{name}{{tuple(args)!r:.200}}: expected {{want!r:.200}}, found {{got!r:.200}}"
_check({name})
'''


def plus_tests(source: Row, reference: str, inputs: list[list[Any]]) -> str:
    """A program that asserts agreement with the reference on every input."""
    name = source["entry_point"]
    right = "got == want or (atol and type(got) == type(want) and close(got, want, atol))"
    if name in SETS:
        right = "set(got) == set(want)"
    elif name in EXISTS:
        right = "(got if isinstance(got, bool) else got is not None) == (want if isinstance(want, bool) else want is not None)"
    elif name in SPECIAL:
        right = SPECIAL[name] if name == "find_zero" else f"{right} or {SPECIAL[name]}"
    return PROGRAM.format(reference=reference, atol=source["atol"], inputs=inputs, name=name, right=right)


# ---------------------------------------------------------------------------------------------------------------------
# MBPP+: JSON has lists only
# ---------------------------------------------------------------------------------------------------------------------

def tuples(depth: int, value: Any) -> Any:
    """Lists become tuples at this depth below `value`, and, where depth is negative, at every depth from -depth - 1 on."""
    if not isinstance(value, list):
        return value
    if depth < 0:
        parts = [tuples(min(depth + 1, -1), v) for v in value]
        return tuple(parts) if depth == -1 else parts
    return tuple(value) if depth == 0 else [tuples(depth - 1, v) for v in value]


Fix = Callable[[list[Any]], list[Any]]
FIXES: list[tuple[set[int], Fix]] = [
    ({2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809}, lambda a: tuples(1, a)),
    ({63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}, lambda a: tuples(2, a)),
    ({75, 413, 444, 753}, lambda a: [tuples(1, a[0]), *a[1:]]),
    ({106, 750}, lambda a: [a[0], tuple(a[1])]),
    ({115}, lambda a: [[set(v) if isinstance(v, list) and v else {} for v in a[0]]]),
    ({124}, lambda a: [float(a[0]), complex(a[1])]),
    ({250, 405, 446, 617, 720, 763, 808, 307}, lambda a: [tuple(a[0]), *a[1:]]),
    ({259, 401, 445, 278, 580, 615, 791}, lambda a: tuples(-2, a)),
    ({722}, lambda a: [{key: tuple(value) for key, value in a[0].items()}, *a[1:]]),
    ({252}, lambda a: [complex(a[0])]),
]


def mbpp_inputs(task_id: int, inputs: list[list[Any]]) -> list[list[Any]]:
    """The arguments as the task's own tests write them."""
    fix = next((fix for ids, fix in FIXES if task_id in ids), lambda a: a)
    return [fix(args) for args in inputs]
