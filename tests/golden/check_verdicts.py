"""Compare an evaluator with verdicts.jsonl: fixed completions and what must be read from them.

    python tests/golden/check_verdicts.py module:function    function(case) -> the expected fields,
                                                             importable from the current folder
    python tests/golden/check_verdicts.py FILE.jsonl         the same, one a line, in order

A case holds `rule` and its inputs: `completion` and `answer`, or `prompt`, `entry_point` and
`completion`, or `choices` and `logprobs`. Expected are `extracted` and `correct`, or `program`, or
`chosen`, compared exactly; other fields are ignored, missing ones fail. Standard library only.
Exit code: 0 all pass, 1 something fails, 2 bad call.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIT = Path(__file__).resolve().parent
EXPECTED = ("extracted", "correct", "program", "chosen")
Case = dict[str, Any]
Function = Callable[[Case], Any]


@dataclass(frozen=True)
class Result:
    """One case and what is wrong with its answer, field by field; nothing: it passes."""

    case: Case
    notes: list[str]


def read_lines(file: Path) -> list[Any]:
    """A JSONL file. Raises ValueError where it is missing or a line is no JSON."""
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: unreadable: {error}") from None
    found = []
    for n, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}:{n}: not JSON: {error}") from None
    return found


def read_cases() -> list[Case]:
    """The kit's cases in order."""
    return read_lines(KIT / "verdicts.jsonl")


def inputs(case: Case) -> Case:
    """The case as an evaluator sees it: without what is expected, and without why."""
    return {key: value for key, value in case.items() if key not in (*EXPECTED, "why")}


def short(value: Any) -> str:
    """A value as JSON, else as Python shows it; the middle of a long one is left out."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]} ({len(text)} characters)"


def equal(expected: Any, found: Any) -> bool:
    """The same value; true and false are no numbers."""
    return isinstance(expected, bool) == isinstance(found, bool) and bool(expected == found)


def compare(case: Case, found: Any) -> Result:
    """One answer against its case."""
    if not isinstance(found, dict):
        return Result(case, [f"expected an object, found {short(found)}"])
    notes = []
    for field in (field for field in EXPECTED if field in case):
        if field not in found:
            notes.append(f"{field}: missing")
        elif not equal(case[field], found[field]):
            notes.append(f"{field}: expected {short(case[field])}, found {short(found[field])}")
    return Result(case, notes)


def run_function(function: Function, case: Case) -> Result:
    """Ask somebody's evaluator; whatever it raises is a failure of the case."""
    try:
        found = function(inputs(json.loads(json.dumps(case))))
    except Exception as error:
        if not isinstance(error, NotImplementedError):
            traceback.print_exc()
        return Result(case, [f"raised {type(error).__name__}: {error}"])
    return compare(case, found)


def import_function(spec: str) -> Function:
    """The function of "module:function", sought in the current folder first. Raises ValueError."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec}: {error} (neither such a module nor a .jsonl file)") from None
    except AttributeError:
        raise ValueError(f"{spec}: the module {module} has no {name!r}") from None
    return function


def check(target: str, patterns: Sequence[str] | None = None) -> list[Result]:
    """Results of a "module:function" or a file for the rules that match. Raises ValueError."""
    cases, chosen = read_cases(), set()
    rules = dict.fromkeys(case["rule"] for case in cases)
    for pattern in patterns or ["*"]:
        chosen |= set(fnmatch.filter(rules, pattern))
    if not chosen:
        raise ValueError(f"no rule matches {patterns}; there are: {', '.join(rules)}")
    if not target.endswith(".jsonl"):
        function = import_function(target)
        return [run_function(function, case) for case in cases if case["rule"] in chosen]
    answers = read_lines(Path(target))
    if len(answers) != len(cases):
        problem = f"{len(answers)} lines for {len(cases)} cases"
        raise ValueError(
            f"{target}: {problem}: one a line, in order ({{}} where there is no answer)"
        )
    pairs = zip(cases, answers)
    return [compare(case, answer) for case, answer in pairs if case["rule"] in chosen]


def table(results: list[Result]) -> str:
    """Rule, passed of cases; then each failing case with its inputs."""
    lines = [f"{'rule':16} passed  cases"]
    for rule in dict.fromkeys(r.case["rule"] for r in results):
        passed = [not r.notes for r in results if r.case["rule"] == rule]
        lines.append(f"{rule:16} {sum(passed):6} {len(passed):6}{'' if all(passed) else '  FAIL'}")
    for r in results:
        if r.notes:
            lines += ["", f"{r.case['rule']}: {r.case['why']}"]
            given = {key: value for key, value in inputs(r.case).items() if key != "rule"}
            lines += [f"    {key}: {short(value)}" for key, value in given.items()]
            lines += [f"    -> {note}" for note in r.notes]
    return "\n".join(lines)


def main() -> int:
    """Print the table and the count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", help="module:function, or a .jsonl file of answers")
    parser.add_argument(
        "--rule", nargs="+", metavar="NAME", help="only these; * and ? as in a shell"
    )
    args = parser.parse_args()
    try:
        results = check(args.target, args.rule)
    except ValueError as error:
        print(f"check_verdicts.py: {error}", file=sys.stderr)
        return 2
    print(table(results))
    failed = sum(bool(r.notes) for r in results)
    print(f"{len(results)} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
