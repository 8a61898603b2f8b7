"""Rows whose answers depend on something said once, at the start, for the whole text.

    python data/tiny/probe.py --out runs/probe      train.jsonl, dev.jsonl and test.jsonl

The first sentence says who asks: each of four people measures in a unit of their own, which no
prompt names. Then come sentences that do not matter, then a sum. Every worked line and the answer
end with the unit; all the rest is what the embedded model knows already.
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
UNIT_OF = {"Mia": "V", "Sam": "A", "Lea": "s", "Tom": "N"}
OTHERS = [name for name in NAMES if name not in UNIT_OF]


@dataclass(frozen=True)
class Settings:
    """Write rows whose units depend on who asks, which the first sentence says."""

    out: str = setting("runs/probe", "folder of the rows")
    seed: int = setting(0, "seeds the rows")


def draw_row(rng: random.Random, name: str) -> Record:
    """One row: who asks, two sentences that do not matter, a sum of three to five numbers."""
    asker, value = rng.choice(list(UNIT_OF)), rng.randint(2, 40)
    unit, text, lines = UNIT_OF[asker], str(value), []
    for _ in range(rng.randint(2, 4)):
        op = rng.choice("+-") if 0 < value < TOP else "+-"[value > 0]
        number = rng.randint(1, min(40, TOP - value if op == "+" else value))
        text += f" {op} {number}"
        lines.append(f"{equation(value, op, number)} {unit}")
        value = apply(value, op, number)
    said = [f"{asker} asks."]
    for sentence in rng.sample(GAINS + LOSSES, 2):
        a, b = rng.sample(OTHERS, 2)
        said.append(sentence.format(a=a, b=b, n=rng.randint(2, 40)))
    answer = f"{value} {unit}"
    row = {"id": name, "task": "probe", "prompt": f"{' '.join(said)} Compute {text}."}
    return row | {"completion": "\n".join([*lines, f"#### {answer}"]), "answer": answer}


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
