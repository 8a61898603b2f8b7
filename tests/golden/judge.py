"""Our evaluator on the verdicts: python tests/golden/check_verdicts.py tests.golden.judge:judge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.tasks import TASKS, best_choice


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """What data/ says of one case: its rule is TASK.NAME, for answers, programs or choices."""
    name, _, rule = case["rule"].partition(".")
    if "choices" in case:
        return {"chosen": best_choice(case["logprobs"], case["choices"], rule)}
    if "prompt" in case:
        return {"program": TASKS[name].program(case, case["completion"], rule)}
    way = TASKS["math" if name == "tiny" else name].rules[rule]  # the embedded tasks share one rule
    found = way.extract(case["completion"])
    return {"extracted": found, "correct": found is not None and way.equal(found, case["answer"])}
