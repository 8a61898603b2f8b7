"""Rows whose answers depend on something said once, at the start, for the whole text.

    python data/tiny/probe.py --out runs/probe      train.jsonl, dev.jsonl and test.jsonl

The first sentence says whether plus and minus are exchanged; then come sentences that do not
matter, then a sum. In half of the rows each worked line has the sign that the prompt does not have.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Record, run_script, setting
from data.tiny.prepare import write_rows
from data.tiny.tasks import GAINS, LOSSES, NAMES, TOP, apply, equation

SPLITS = {"train": 4000, "dev": 256, "test": 256}
RULES = {"Keep the signs.": {"+": "+", "-": "-"}, "Swap the signs.": {"+": "-", "-": "+"}}


@dataclass(frozen=True)
class Settings:
    """Write rows whose signs depend on what the first sentence says."""

    out: str = setting("runs/probe", "folder of the rows")
    seed: int = setting(0, "seeds the rows")


def draw_row(rng: random.Random, name: str) -> Record:
    """One row: a rule, two sentences that do not matter, a sum of three to five numbers."""
    rule = rng.choice(list(RULES))
    value = rng.randint(2, 40)
    text, lines = str(value), []
    for _ in range(rng.randint(2, 4)):
        op = rng.choice("+-")
        meant = RULES[rule][op]
        room = TOP - value if meant == "+" else value
        if room < 1:
            op, meant = ("-", "+")[op == "-"], ("-", "+")[meant == "-"]
            room = TOP - value if meant == "+" else value
        number = rng.randint(1, min(40, room))
        text += f" {op} {number}"
        lines.append(equation(value, meant, number))
        value = apply(value, meant, number)
    fillers = []
    for sentence in rng.sample(GAINS + LOSSES, 2):
        a, b = rng.sample(NAMES, 2)
        fillers.append(sentence.format(a=a, b=b, n=rng.randint(2, 40)))
    prompt = f"{rule} {' '.join(fillers)} Compute {text}."
    completion = "\n".join([*lines, f"#### {value}"])
    row = {"id": name, "task": "probe", "prompt": prompt}
    return row | {"completion": completion, "answer": str(value)}


def main(overrides: Record) -> None:
    """Write the three files; no prompt is in two of them."""
    settings, met = Settings(**overrides), set[str]()
    for split, count in SPLITS.items():
        rng, rows = random.Random(f"probe-{settings.seed}-{split}"), list[Record]()
        while len(rows) < count:
            row = draw_row(rng, f"probe-{split}-{len(rows):04d}")
            if row["prompt"] not in met:
                met.add(row["prompt"])
                rows.append(row)
        write_rows(Path(settings.out) / f"{split}.jsonl", rows)


if __name__ == "__main__":
    run_script(main, Settings, "data/tiny/probe.py")
