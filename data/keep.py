"""Keep what `eval.py compare` needs of a sweep of `train.py --paired`, small enough to commit.

    python data/keep.py --sweep runs/NAME --out data/records/NAME
    python data/keep.py                         what the kept sweeps trained and took, learning rates and variations that they tried

OUT/sweep.json                          the sweep's settings, and the seconds of each side's runs at the rates that were not taken
OUT/seed-N/SIDE/records.jsonl.gz        of each item: task, id, verdicts, log-likelihood of the reference solution (to 1e-5 nats) and its tokens
OUT/seed-N/SIDE/results.json            as it was, with what the training took; paths in the project become relative
OUT/base                                the same two files of the bare backbone
OUT/variations.png                      the figure of --vary
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.rows import parse_object, read_lines
from data.settings import given, setting

COLUMNS = ("task", "id", "sample", "verdicts", "reference_logprob", "reference_tokens")


@dataclass(frozen=True)
class Settings:
    """Keep what eval.py compare needs of a sweep of train.py --paired, compressed; without --sweep: list what is kept."""

    sweep: str = setting("", "the sweep's folder; empty: list the sweeps in --out")
    out: str = setting(str(ROOT / "data/records"), "where to; what is there is replaced")


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """The columns that a comparison reads; sample 0 is not said."""
    kept = {name: record[name] for name in COLUMNS if name != "sample" or record[name]}
    logprob = kept["reference_logprob"]
    return kept | {"reference_logprob": logprob if logprob is None else round(logprob, 5)}


def relative(value: Any) -> Any:
    """The same JSON, texts that begin with the project's root without it."""
    if isinstance(value, dict):
        return {key: relative(item) for key, item in value.items()}
    if isinstance(value, list):
        return [relative(item) for item in value]
    return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value


def training(run: Path) -> dict[str, Any]:
    """Steps, seconds in them, trainable parameters and the loss on held-out rows after the last; nothing for a backbone."""
    file = run / "metrics.jsonl"
    lines = [parse_object(line, where) for where, line in read_lines(file)] if file.exists() else []
    steps = [line for line in lines if line["kind"] == "step"]
    return {"training": {"steps": len(steps), "seconds": round(sum(line["seconds"] for line in steps), 1),
                         "tokens": sum(line["tokens"] for line in steps), "trainable": lines[0].get("trainable"),
                         "held_out_loss": [line["loss"] for line in lines if line["kind"] == "dev"][-1]}} if steps else {}


def write_json(file: Path, value: Any) -> None:
    """Indented, paths below the project's root without it."""
    file.write_text(json.dumps(relative(value), indent=1) + "\n")


def keep_run(run: Path, scores: Path, to: Path) -> None:
    """One scored run, or the scored backbone."""
    to.mkdir(parents=True)
    rows = [slim(parse_object(line, where)) for where, line in read_lines(scores / "records.jsonl")]
    text = "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows)
    (to / "records.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    write_json(to / "results.json", json.loads((scores / "results.json").read_text()) | training(run))


def grid_seconds(sweep: Path, sides: dict[str, Any]) -> dict[str, float]:
    """Seconds of training of the first seed at the rates that were tried and not taken, by side."""
    seconds = lambda run: training(run).get("training", {"seconds": 0.0})["seconds"]
    return {side: round(sum(seconds(run) for run in sweep.glob(f"lr-*/{side}") if run.parent.name != f"lr-{taken['lr']:g}"), 1)
            for side, taken in sides.items()}


def keep(sweep: Path, out: Path) -> list[Path]:
    """Write OUT anew, complete or not at all; returns its files. Raises ValueError when there is no finished sweep, naming what is missing."""
    from model import atomic
    from train import remove_folder

    found = {file.parent.parent: file.parent for file in sorted(sweep.glob("seed-*/*/eval-adapted/results.json"))}
    if not (sweep / "sweep.json").exists() or not found:
        raise ValueError(f"{sweep}: expected a folder of train.py --paired with scored runs")
    if out.exists() and not (out / "sweep.json").exists():  # data/records itself, say
        raise ValueError(f"{out}: exists, and holds no sweep")
    content = json.loads((sweep / "sweep.json").read_text())
    if missing := [run for run in content["runs"] if sweep / run not in found] + ["base"] * (not (sweep / "base/results.json").exists()):
        raise ValueError(f"{sweep}: not finished, without scores: {', '.join(missing)}")
    with atomic(out) as tmp:
        tmp.mkdir()
        write_json(tmp / "sweep.json", content | {"grid_seconds": grid_seconds(sweep, content["sides"])})
        for run, scores in (found | {sweep / "base": sweep / "base"}).items():
            keep_run(run, scores, tmp / run.relative_to(sweep))
        if (figure := sweep / "variations.png").exists():
            (tmp / figure.name).write_bytes(figure.read_bytes())
        if out.exists():
            remove_folder(out)
    return sorted(file for file in out.rglob("*") if file.is_file())


def side_line(sweep: Path, name: str, side: str, grid: float) -> tuple[list[str], list[float]]:
    """One line of the list: the runs of one side and means over them; and the seconds of all, of the grid, and of scoring."""
    runs = [json.loads(file.read_text()) for file in sorted(sweep.glob(f"seed-*/{side}/results.json"))]
    mean = lambda key: sum(run["training"][key] for run in runs) / len(runs)
    cells = [name, side, str(len(runs)), *(f"{mean(key):,.0f}" for key in ("trainable", "steps", "tokens")), f"{mean('held_out_loss'):.5f}"]
    return cells, [sum(run["training"]["seconds"] for run in runs), grid, sum(run["seconds"] for run in runs)]


def rates_table(sweep: dict[str, Any]) -> str:
    """The table that the sweep printed; a loss that was not finite is inf."""
    from data.sweep import rate_table

    return rate_table({side: {float(rate): math.inf if loss is None else loss for rate, loss in line.items()}
                       for side, line in sweep["held_out_losses"].items()})


def variations_table(folder: Path, sweep: dict[str, Any]) -> str:
    """The candidate and each variation against the baselines, a line each."""
    from data.sweep import together
    from eval import CompareSettings, compared, comparison_table

    runs = lambda side: tuple(str(file.parent) for file in sorted(folder.glob(f"seed-*/{side}/results.json")))
    return comparison_table(together({side: compared(CompareSettings(runs("baseline"), runs(side)))
                                      for side in ("candidate", *sweep["settings"]["vary"])}))


def show(folder: Path) -> str:
    """A line for each side of each kept sweep; then learning rates and variations, where there were some. Raises ValueError when none is kept."""
    from eval import table

    sweeps = {file.parent.relative_to(folder).as_posix(): json.loads(file.read_text()) for file in sorted(folder.rglob("sweep.json"))}
    if not sweeps:
        raise ValueError(f"{folder}: no kept sweeps")
    sides = [side_line(folder / name, name, side, sweep["grid_seconds"][side]) for name, sweep in sweeps.items() for side in sweep["sides"]]
    sides.append((["all"] + [""] * 6, [sum(column) for column in zip(*(seconds for _, seconds in sides))]))
    lines = [cells + [f"{time / 60:.1f}" for time in seconds] for cells, seconds in sides]
    text = table(["sweep", "side", "runs", "trainable", "steps", "tokens", "held-out loss", "training min", "other rates min", "scoring min"], lines)
    text += "".join(f"\n\n{name}: first seed, by learning rate, * taken\n{rates_table(sweep)}"
                    for name, sweep in sweeps.items() if sweep["held_out_losses"])
    return text + "".join(f"\n\n{name}: against its baselines\n{variations_table(folder / name, sweep)}"
                          for name, sweep in sweeps.items() if sweep["settings"]["vary"])


def main(explicit: dict[str, Any]) -> None:
    """Keep, and say how much it is; or list."""
    settings = Settings(**explicit)
    if not settings.sweep:
        return print(show(Path(settings.out)))
    files = keep(Path(settings.sweep), Path(settings.out))
    print(f"{settings.out}: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")


if __name__ == "__main__":
    try:
        main(given(Settings, sys.argv[1:]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"keep.py: {error}") from None
