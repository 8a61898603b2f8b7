"""Train, score and compare pairs over seeds, all else equal: python -m experiments.sweep --help.

baseline: the adapter alone; candidate: adapter and side path; control: the adapter alone, with as
many trainable parameters; variations: the candidate with flags changed, memory=NAME with study.py's
side path. What is finished is reused, what is not is resumed: so a stopped sweep is finished.

OUT/seed-N/SIDE (with --lrs SIDE@RATE): runs of train.py, scored in eval-adapted. OUT/base: the
backbone's scores. OUT/records.jsonl.gz: a header, then by item the values of each run.
"""

from __future__ import annotations

import gzip
import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean

import torch

import train
from common import ROOT, Record, atomic, parse_cli, parse_object, read_json, read_lines
from common import read_record, remove, run_script, setting
from eval import compare_table, score, table
from experiments import compare
from experiments.study import each_side
from model import ModelConfig, Transformer, resolve_folder
from talan import AdapterConfig, TalanConfig, attach, checkpoint_folder

AXES = {field.name for kind in (AdapterConfig, TalanConfig) for field in fields(kind)}
AXES |= {"adapter", "talan", "scope", "talan_lr_scale"}
MATCHED = ("baseline", "control")  # the sides that others are compared with


@dataclass(frozen=True)
class Settings(train.Settings):
    """Train, score and compare an adapter with and without side path over seeds, all else equal."""

    out: str = setting("runs/sweep", "the sweep's folder")
    seeds: tuple[str, ...] = setting(("0-2",), "seeds, and ranges of them")
    lrs: tuple[str, ...] = setting((), "learning rates; each side takes its best on the first seed")
    control: str = setting("none", "rank: also the adapter alone, with as many parameters")
    vary: tuple[str, ...] = setting((), "variations, as mixer=mlp layers=0+1 'slots=4&width=4'")
    ignore: tuple[str, ...] = setting((), "conditions of the scores that may differ, as commit")
    records: str = setting("", "FILE.jsonl.gz for all items; empty: OUT/records.jsonl.gz")
    show: str = setting("", "print what the record files in this folder hold, and stop")


def parse_seeds(words: Sequence[str]) -> list[int]:
    """("0-2", "5") -> [0, 1, 2, 5]. Raises ValueError."""
    ends = [word.split("-") for word in words]
    return list(dict.fromkeys(x for end in ends for x in range(int(end[0]), int(end[-1]) + 1)))


def parse_variation(word: str) -> Record:
    """Flags of train.py joined by &, their values by +: layers=0+1&slots=4. memory= is left out."""
    parts = [part.partition("=") for part in word.split("&") if not part.startswith("memory=")]
    flags = [f"--{name.replace('_', '-')}{x}{value.replace('+', ',')}" for name, x, value in parts]
    changes = parse_cli(train.Settings, f"--vary {word}", flags)
    if not changes.keys() <= AXES:
        raise ValueError(f"--vary {word}: expected flags of {', '.join(sorted(AXES))}")
    return changes


def make_sides(settings: Settings) -> dict[str, train.Settings]:
    """The settings of each side's runs, but for seed and rate. Raises ValueError."""
    shared = {field.name: getattr(settings, field.name) for field in fields(train.Settings)}
    candidate = train.Settings(**shared)
    scope = "joint" if settings.scope == "writeback" else settings.scope
    baseline = replace(candidate, talan=False, scope=scope)
    sides = {"baseline": baseline, "candidate": candidate}
    if settings.control == "rank":
        count = count_trainable(baseline)
        per_rank = count_trainable(replace(baseline, rank=baseline.rank + 1)) - count
        more = math.ceil((count_trainable(candidate) - count) / per_rank)
        sides["control"] = replace(baseline, rank=baseline.rank + more)
    for word in settings.vary:
        sides[word] = replace(candidate, **parse_variation(word))
    return sides


def count_trainable(settings: train.Settings) -> int:
    """Trainable parameters, counted without weights. Raises ValueError on what does not fit."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dir(resolve_folder(settings.backbone)))
        return sum(p.numel() for p in attach(model, *train.build_configs(settings), settings.scope))


def train_run(run: Path, wanted: train.Settings, may_diverge: bool = False) -> None:
    """Train, or resume, what is not finished. Raises ValueError."""
    overrides = asdict(wanted) | {"out": str(run), "resume": True, "overwrite": False}
    try:
        train.choose_run(train.Settings(**overrides), overrides)
    except ValueError:  # it has other settings
        if not wanted.overwrite:
            raise
        remove(run)
    if checkpoint_folder(run).name == f"step-{read_record(run).get('steps', 0):07d}":
        return print(f"{run}: finished, reused")
    try:
        train.main(overrides, in_sweep=True)
    except train.NonFiniteError as error:
        if not may_diverge:
            raise
        print(f"{run}: {error}")


def score_once(wanted: train.Settings, out: Path, run: Path | None = None) -> Record:
    """The scores in `out`, of a run or the backbone, made now unless they are there."""
    settings, file = train.scoring(wanted, out, run), out / "results.json"
    if not file.exists() or read_json(file)["settings"] != json.loads(json.dumps(asdict(settings))):
        score(settings)
    return read_json(file)


def add_run(columns: Record, run: Path, **more: float) -> None:
    """Append what a run trained and took; its held-out loss at the end, infinite without one."""
    first, *lines = [parse_object(line, where) for where, line in read_lines(run / "metrics.jsonl")]
    steps = [line for line in lines if line["kind"] == "step"]
    dev = [line for line in lines if line["kind"] == "dev" and line["step"] == first["steps"]]
    row = {name: first["settings"][name] for name in ("lr", "rank")} | more
    row |= {"trainable": first["trainable"], "steps": len(steps)}
    row["held_out_loss"] = dev[0]["loss"] if dev and math.isfinite(dev[0]["loss"]) else math.inf
    row["tokens"] = sum(line["tokens"] for line in steps)
    row["seconds"] = round(sum(line["seconds"] for line in steps), 1)
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


def write_records(file: Path, header: Record, sides: Mapping[str, Sequence[compare.Run]]) -> None:
    """The header, then a line an item: its sizes, and by side the values of each seed, to 1e-5."""
    lines = [header]
    for key, sizes in sides["baseline"][0].sizes.items():
        line: Record = dict(zip(("task", "id", "sample"), key)) | {"sizes": sizes}
        for side, runs in sides.items():
            line[side] = {}
            for name in sizes:
                line[side][name] = [round(run.values[key][name], 5) for run in runs]
        lines.append(line)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    with atomic(file) as tmp:
        tmp.write_bytes(gzip.compress(text.replace(f"{ROOT}/", "").encode(), mtime=0))


def rate_table(rates: Mapping[str, Record]) -> str:
    """A line a side, * at the lowest loss, and a note where that lies at an end of the grid."""
    rows, ends = [], []
    for side, found in rates.items():
        pairs = list(zip(found["held_out_loss"], found["lr"]))
        best = min(pairs)
        rows.append([side, *[f"{pair[0]:.5f}{'*' if pair == best else ''}" for pair in pairs]])
        ends += [side] if best in (pairs[0], pairs[-1]) else []
    note = f"\nlowest at an end of the grid: {', '.join(ends)}; a better rate may lie beyond"
    return table(["held-out loss", *[f"{x:g}" for x in found["lr"]]], rows) + (note if ends else "")


def show(files: Sequence[Path]) -> None:
    """Print what each sweep trained and took, its learning rates and its variations."""
    sweeps = {file.name.removesuffix(".jsonl.gz"): compare.read_sweep(file) for file in files}
    rows, minutes = [], []
    for name, (header, _) in sweeps.items():
        for side, of in header["sides"].items():
            tried = header["rates"].get(side, {"lr": [], "seconds": []})
            others = [time for lr, time in zip(tried["lr"], tried["seconds"]) if lr != of["lr"][0]]
            seconds = of["seconds"], others, of["scoring_seconds"]
            minutes.append([sum(times) / 60 for times in seconds])
            counts = [f"{mean(of[key]):,.0f}" for key in ("trainable", "steps", "tokens")]
            cells = [name, side, len(of["lr"]), *counts, f"{mean(of['held_out_loss']):.5f}"]
            rows.append([*cells, *[round(time, 1) for time in minutes[-1]]])
    total = [round(sum(times), 1) for times in zip(*minutes)]
    head = "sweep", "side", "runs", "trainable", "steps", "tokens", "held-out loss"
    times = "training min", "other rates min", "scoring min"
    print(table([*head, *times], [*rows, ["all", *[""] * 6, *total]]))
    for name, (header, _) in sweeps.items():
        if header["rates"]:
            print(f"\n{name}: first seed, by learning rate, * taken\n{rate_table(header['rates'])}")
    for name, (_, sides) in sweeps.items():
        others = [side for side in sides if side not in MATCHED]
        for matched in [side for side in MATCHED if side in sides and len(others) > 1]:
            lines = {}
            for side in others:
                result = compare.compare_runs(sides[matched], sides[side], compare.Settings())
                lines[side] = [*result["pooled"].values(), *result["tasks"].values()][0]
            whole = compare.comparison_table(result | {"tasks": lines, "pooled": {}})
            print(f"\n{name}: against its {matched}s\n{whole}")


def sweep(settings: Settings, out: Path) -> None:
    """All runs, their scores, records and comparisons. Raises ValueError."""
    seeds, sides = parse_seeds(settings.seeds), make_sides(settings)
    for side, wanted in each_side(sides):
        print(f"{side}: {count_trainable(wanted):,} trainable, rank {wanted.rank}")
    header: Record = {"settings": asdict(settings), "seeds": seeds, "rates": {}, "sides": {}}
    rates = sorted(map(float, settings.lrs))
    for side, wanted in each_side(sides) if rates else ():
        found: Record = header["rates"].setdefault(side, {})
        for rate in rates:
            run = out / f"seed-{seeds[0]}" / f"{side}@{rate}"
            train_run(run, replace(wanted, seed=seeds[0], lr=rate), may_diverge=True)
            add_run(found, run)
        sides[side] = replace(wanted, lr=min(zip(found["held_out_loss"], found["lr"]))[1])
    base = score_once(sides["baseline"], out / "base")["tasks"]
    scored: list[compare.Run] = []
    for seed in seeds:
        for side, wanted in each_side(sides):
            run = out / f"seed-{seed}" / (f"{side}@{wanted.lr}" if settings.lrs else side)
            train_run(run, replace(wanted, seed=seed))
            results = score_once(wanted, run / "eval-adapted", run)
            print(compare_table(base, results["tasks"]))
            add_run(header["sides"].setdefault(side, {}), run, scoring_seconds=results["seconds"])
            scored.append(compare.read_folder(run))
            header["notes"] = compare.check_conditions(scored, settings.ignore)
    header["conditions"], n = scored[0].conditions, len(sides)
    file = Path(settings.records or out / "records.jsonl.gz")
    write_records(file, header, {side: scored[i::n] for i, side in enumerate(sides)})
    for other in [side for side in MATCHED if side in sides]:
        for side in [side for side in sides if side not in MATCHED]:
            print(f"\n{side} against {other}")
            compare.main({"baseline": (f"{file}:{other}",), "candidate": (f"{file}:{side}",)})
    print(f"\n{file}:")
    show([file])


def main(overrides: Record) -> None:
    """Do a sweep, or show kept ones. Raises ValueError; SIGTERM is as Ctrl-C."""
    settings = Settings(**overrides)
    if settings.control not in ("none", "rank") or not settings.talan or "seed" in overrides:
        raise ValueError("expected --control none or rank, --talan, and --seeds instead of --seed")
    if settings.show:
        show(sorted(Path(settings.show).glob("*.jsonl.gz")))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sweep(settings, Path(settings.out))


if __name__ == "__main__":
    run_script(main, Settings, "python -m experiments.sweep")
