"""Compare an implementation of TALAN with the golden kit. Needs numpy and safetensors only.

    python tests/golden/check.py module:function    function(case, inputs) -> {tensor name: array},
                                                    module importable from the current folder
    python tests/golden/check.py FOLDER             FOLDER/<case name>.safetensors, by any program

A tensor passes when its shape is the expected one and |found - expected| <= tolerance everywhere;
where the expected value is nan (padding) nothing is compared. Missing and unexpected tensors fail.
Exit code: 0 all pass, 1 something fails, 2 bad call.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

KIT = Path(__file__).resolve().parent
Case = dict[str, Any]
Tensors = dict[str, np.ndarray]
Function = Callable[[Case, Tensors], Tensors]


@dataclass(frozen=True)
class Result:
    """One line of the table: the largest |found - expected|, and what is wrong, where first."""

    case: str
    tensor: str
    tolerance: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Is nothing wrong?"""
        return not self.note


def read_cases(patterns: list[str] | None = None) -> list[Case]:
    """The cases whose name matches a pattern, * and ? as in a shell. Raises ValueError."""
    cases = json.loads((KIT / "cases.json").read_text(encoding="utf-8"))["cases"]
    names = [case["name"] for case in cases]
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        chosen |= set(fnmatch.filter(names, pattern))
    if not chosen:
        raise ValueError(f"no case matches {patterns}; there are: {', '.join(names)}")
    return [case for case in cases if case["name"] in chosen]


def read_tensors(file: Path) -> Tensors:
    """The tensors of one file by name. Raises ValueError when it is not a safetensors file."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: missing or unreadable: {error}") from None


def read_inputs(case: Case) -> Tensors:
    """Every tensor of the case's input files by name: weights, adapter, side path, batch."""
    found: Tensors = {}
    for file in case["inputs"]:
        found |= read_tensors(KIT / file)
    return found


def read_expected(case: Case) -> Tensors:
    """The case's expected tensors by name."""
    return read_tensors(KIT / "expected" / f"{case['name']}.safetensors")


def compare(name: str, tensor: str, tolerance: float, expected: np.ndarray, found: Any) -> Result:
    """One tensor against its expectation, in float64."""
    failed = partial(Result, name, tensor, tolerance)
    try:
        want, have = np.asarray(expected, np.float64), np.asarray(found).astype(np.float64)
    except (TypeError, ValueError) as error:
        return failed(note=f"not a numeric array: {error}")
    if want.shape != have.shape:
        return failed(note=f"shape: expected {want.shape}, found {have.shape}")
    with np.errstate(invalid="ignore"):
        off = np.where(np.isnan(want) | (have == want), 0.0, np.abs(have - want))
    bad = np.argwhere(~(off <= tolerance))  # a nan that was found is bad too
    largest = float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))
    if len(bad) == 0:
        return Result(name, tensor, tolerance, largest)
    first = tuple(bad[0].tolist())
    values = f"expected {want[first]:.9g}, found {have[first]:.9g}"
    count = f"{len(bad)} of {want.size} values deviate"
    return failed(largest, f"first at {list(first)}: {values}; {count}")


def check_case(case: Case, found: Tensors) -> Iterator[Result]:
    """Every expected tensor in the order of cases.json, then the unexpected ones."""
    expected, name = read_expected(case), case["name"]
    for tensor, tolerance in case["tolerance"].items():
        if tensor in found:
            yield compare(name, tensor, tolerance, expected[tensor], found[tensor])
        else:
            yield Result(name, tensor, tolerance, note="missing")
    for tensor in sorted(set(found) - set(case["tolerance"])):
        yield Result(name, tensor, note="unexpected")


def run_function(function: Function, case: Case) -> list[Result]:
    """Call somebody's implementation on one case; whatever it raises is a failure of the case."""
    inputs = read_inputs(case)
    try:
        found = function(json.loads(json.dumps(case)), inputs)
    except Exception as error:
        if not isinstance(error, NotImplementedError):
            traceback.print_exc()
        return [Result(case["name"], "*", note=f"raised {type(error).__name__}: {error}")]
    if not isinstance(found, dict):
        note = f"expected a dict of arrays, found {type(found).__name__}"
        return [Result(case["name"], "*", note=note)]
    return list(check_case(case, found))


def run_folder(folder: Path, case: Case) -> list[Result]:
    """Compare FOLDER/<case name>.safetensors."""
    try:
        found = read_tensors(folder / f"{case['name']}.safetensors")
    except ValueError as error:
        return [Result(case["name"], "*", note=str(error))]
    return list(check_case(case, found))


def import_function(spec: str) -> Function:
    """The function of "module:function", sought in the current folder first. Raises ValueError."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec}: {error} (neither such a module nor such a folder)") from None
    except AttributeError:
        raise ValueError(f"{spec}: the module {module} has no {name!r}") from None
    return function


def table(results: list[Result]) -> str:
    """Case, tensor, tolerance, largest error, pass or FAIL, first place that deviates."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.1e}" if x else "0"

    rows = [("case", "tensor", "tolerance", "error", "")]
    for r in results:
        verdict = "pass" if r.passed else "FAIL"
        rows.append((r.case, r.tensor, number(r.tolerance), number(r.error), verdict))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row, note in zip(rows, ["", *(r.note for r in results)]):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([*cells, note]).rstrip())
    return "\n".join(lines)


def check(target: str, patterns: list[str] | None = None) -> list[Result]:
    """Results of a "module:function" or of a folder. Raises ValueError."""
    cases, results = read_cases(patterns), []
    function = None if Path(target).is_dir() else import_function(target)
    for case in cases:
        found = run_function(function, case) if function else run_folder(Path(target), case)
        results += found
    return results


def main() -> int:
    """Print the table and the count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", help="module:function, or a folder of <case name>.safetensors")
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help="only these; * and ? as in a shell"
    )
    args = parser.parse_args()
    try:
        results = check(args.target, args.case)
    except ValueError as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    failed = sum(not r.passed for r in results)
    print(table(results))
    print(f"{len({r.case for r in results})} cases, {len(results)} tensors, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
