"""Compare scored runs with scored runs: python -m experiments.compare --help.

Runs are paired by training seed, and by backbone where there are several; items by task, id and
sample. A RUN is a folder that eval.py wrote (or one with eval or eval-adapted in it), or FILE:SIDE:
every seed of one side in the records of a sweep; FILE may hold wildcards.

Shapes: S seeds, N items of a task, K measures (rules, then the reference solution), R resamples.
"""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Record, parse_object, read_json, read_lines, run_script, setting, write_json
from eval import table

REFERENCE = "reference"  # the measure that is the reference solution's log-likelihood
Key = tuple[str, str, int]  # task, id, sample


@dataclass(frozen=True)
class Settings:
    """Compare scored runs with scored runs: differences, 95 % intervals, flips, seeds won."""

    baseline: tuple[str, ...] = setting((), "runs: folders, or FILE:SIDE of a sweep's records")
    candidate: tuple[str, ...] = setting((), "runs of the same seeds, scored on the same items")
    out: str = setting("", "folder for comparison.json and comparison.png; empty: print alone")
    ignore: tuple[str, ...] = setting((), "conditions that may differ, by the names in the error")
    resamples: int = setting(10_000, "draws of the bootstrap")
    seed: int = setting(0, "seeds the bootstrap")


# ---- reading ----


@dataclass(frozen=True)
class Run:
    """One scored run: of each record the measures' values and sizes."""

    name: str
    seed: int | None
    backbone: str
    conditions: Record  # what must be equal in all runs that are compared
    values: dict[Key, dict[str, float]] = field(default_factory=dict)  # 1: right; of REFERENCE nats
    sizes: dict[Key, dict[str, int]] = field(default_factory=dict)  # 1; of REFERENCE tokens


def read_runs(word: str) -> list[Run]:
    """The run in a folder, or every seed of FILE:SIDE. Raises ValueError when there is none."""
    if Path(word).is_dir():
        return [read_folder(Path(word))]
    pattern, _, side = word.rpartition(":")
    runs = []
    for file in sorted(glob.glob(pattern)):
        runs += read_sweep(file)[1].get(side, [])
    if not runs:
        raise ValueError(f"{word}: expected a folder of a scored run, or FILE:SIDE, found neither")
    return runs


def read_folder(folder: Path) -> Run:
    """The scores in this folder, else in its eval or eval-adapted. Raises ValueError."""
    places = [folder / name for name in ("", "eval", "eval-adapted")]
    found = [place for place in places if (place / "records.jsonl").exists()]
    if not found or len(found) > 1 and folder not in found:
        raise ValueError(f"{folder}: expected one records.jsonl, found {len(found)} in its folders")
    results = read_json(found[0] / "results.json")
    run = Run(str(folder), results["run_seed"], results["backbone"], results["conditions"])
    for where, line in read_lines(found[0] / "records.jsonl"):
        row = parse_object(line, where)
        key = row["task"], row["id"], row["sample"]
        if key in run.values:
            raise ValueError(f"{where}: {key} came before")
        run.values[key], run.sizes[key] = row["verdicts"], dict.fromkeys(row["verdicts"], 1)
        if row.get("reference_logprob") is not None:
            run.values[key][REFERENCE] = row["reference_logprob"]
            run.sizes[key][REFERENCE] = row["reference_tokens"]
    return run


def read_sweep(file: str | Path) -> tuple[Record, dict[str, list[Run]]]:
    """The records of a sweep: their header, and by side a run of each seed. Raises ValueError."""
    header, *rows = [parse_object(line, where) for where, line in read_lines(file)]
    sides: dict[str, list[Run]] = {side: [] for side in header["sides"]}
    for side, runs in sides.items():
        for j, seed in enumerate(header["seeds"]):
            name, backbone = f"{file}:{side}, seed {seed}", header["settings"]["backbone"]
            runs.append(Run(name, seed, backbone, header["conditions"]))
            for row in rows:
                key = row["task"], row["id"], row["sample"]
                runs[-1].values[key] = {name: values[j] for name, values in row[side].items()}
                runs[-1].sizes[key] = row["sizes"]
    return header, sides


# ---- pairing ----


def check_conditions(runs: Sequence[Run], ignore: Sequence[str] = (), skip: str = "") -> list[str]:
    """A note for each condition that differs and whose name, or a word of it, is in ignore.

    Raises ValueError that lists the others that differ, with their values.
    """
    wrong, notes = list[str](), list[str]()
    for name in dict.fromkeys(name for run in runs for name in run.conditions):
        values = dict.fromkeys(json.dumps(run.conditions.get(name, "absent")) for run in runs)
        if len(values) > 1 and name != skip:
            ignored = not {name, *name.split()}.isdisjoint(ignore)
            (notes if ignored else wrong).append(f"{name}: {' | '.join(values)}")
    if wrong:
        head = "these runs cannot be compared (--ignore NAMES lets conditions differ):"
        raise ValueError("\n  ".join([head, *wrong]))
    return [f"ignored: {text}" for text in notes]


def merge_backbones(runs: Sequence[Run]) -> list[Run]:
    """A run of each seed, with the tasks of every backbone as BACKBONE/TASK. Raises ValueError."""
    merged: dict[int | None, Run] = {}
    for run in runs:
        whole = merged.setdefault(run.seed, replace(run, values={}, sizes={}))
        for (task, item, sample), sizes in run.sizes.items():
            key = (f"{Path(run.backbone).name}/{task}", item, sample)
            if key in whole.sizes:
                raise ValueError(f"{whole.name} | {run.name}: of one seed and backbone")
            whole.sizes[key], whole.values[key] = sizes, run.values[task, item, sample]
    return list(merged.values())


def pair_runs(baseline: Sequence[Run], candidate: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(baseline, candidate) of each seed, ascending. Raises ValueError on what has no pair."""
    sides = [sorted(side, key=lambda run: run.seed or 0) for side in (baseline, candidate)]
    pairs, first = list(zip(*sides)), sides[0][0]
    seeds, others = [run.seed for run in sides[0]], [run.seed for run in sides[1]]
    bare = seeds == [None] and len(others) == 1  # a backbone beside what was trained from it
    if not bare and seeds != others or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected each seed once on both sides, found {seeds} | {others}")
    for run in sides[0] + sides[1]:
        if not run.sizes or run.sizes != first.sizes:
            raise ValueError(f"{run.name}: other items, rules or references than {first.name}")
    return pairs


# ---- statistics ----


class Grid(NamedTuple):
    """One task's items; a rule's value: per cent of the item's samples that are right."""

    measures: list[str]
    values: np.ndarray  # (K, 2, S, N), baseline and candidate
    sizes: np.ndarray  # (K, N), 0 where an item has no such measure


class Sums(NamedTuple):
    """One measure summed over items. A figure is values / sizes: per cent, or nats per token."""

    values: np.ndarray  # (2, S)
    gaps: np.ndarray  # (R,) candidate - baseline, as each resample drew the items
    sizes: np.ndarray  # (R,)
    n: int
    size: int
    gained: int  # item-seed pairs that became right, or right more often
    lost: int


def build_grid(pairs: Sequence[tuple[Run, Run]], task: str) -> Grid:
    """The paired values of one task, items in the order of their ids."""
    runs = [baseline for baseline, _ in pairs] + [candidate for _, candidate in pairs]
    keys = sorted(key for key in runs[0].sizes if key[0] == task)
    ids = list(dict.fromkeys(key[1] for key in keys))
    column = {name: n for n, name in enumerate(ids)}
    measures = list(dict.fromkeys(name for key in keys for name in runs[0].sizes[key]))
    measures.sort(key=lambda name: name == REFERENCE)
    values = np.zeros((len(measures), len(runs), len(ids)))  # (K,2S,N)
    sizes = np.zeros((len(measures), len(ids)))
    for key in keys:
        for name, size in runs[0].sizes[key].items():
            k, n = measures.index(name), column[key[1]]
            values[k, :, n] += [run.values[key][name] for run in runs]
            sizes[k, n] += size
    for k, name in enumerate(measures):
        if name != REFERENCE:
            values[k] *= 100 / np.maximum(sizes[k], 1)
            sizes[k] = sizes[k] > 0
    return Grid(measures, values.reshape(len(measures), 2, len(pairs), len(ids)), sizes)


def draw_counts(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """(rows, n): in each row, how often each of n things comes up in n draws with replacement."""
    draws = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def resample(grid: Grid, seeds: np.ndarray, rng: np.random.Generator) -> list[Sums]:
    """Hierarchical bootstrap: seeds (R,S) say how often resample r has seed s, w (R,N) item i.

    gap_r = sum_s seeds_rs / S sum_i w_ri (candidate_si - baseline_si), size_r = sum_i w_ri size_i:
    items are drawn once for all seeds. With few seeds the interval is too narrow: the variance
    between seeds comes out (S - 1) / S of what it is.
    """
    K, _, S, N = grid.values.shape
    flat = (grid.values[:, 1] - grid.values[:, 0]).reshape(K, S * N)
    gaps, sizes, rows = [], [], max(1, (1 << 20) // N)
    for start in range(0, len(seeds), rows):
        chosen = seeds[start : start + rows] / S  # (r,S)
        w = draw_counts(rng, len(chosen), N)  # (r,N)
        by_seed = (w @ flat.reshape(K * S, N).T).reshape(len(w), K, S)
        gaps.append(np.einsum("rks,rs->kr", by_seed, chosen))
        sizes.append(grid.sizes @ w.T)
    counts = [grid.sizes > 0, grid.sizes, flat > 0, flat < 0]
    totals = [count.sum(-1).astype(int).tolist() for count in counts]
    drawn = np.concatenate(gaps, 1), np.concatenate(sizes, 1)  # (K,R)
    return [Sums(*columns) for columns in zip(grid.values.sum(-1), *drawn, *totals)]


def estimate(parts: Sequence[Sums], alike: bool = False) -> Record:
    """Both sides and their difference over all items of the parts, or (alike) the parts' mean."""
    whole = Sums(*[sum(column[1:], column[0]) for column in zip(*parts)])
    pooled = parts if alike else [whole]
    rates = np.mean([part.values / part.size for part in pooled], 0)  # (2,S)
    # nan: a resample may hold no reference solution at all
    drawn = [part.gaps / np.where(part.sizes > 0, part.sizes, np.nan) for part in pooled]
    by_seed = rates[1] - rates[0]
    ahead = np.sign(np.round(by_seed, 10)).tolist()
    line: Record = {"n": whole.n, "size": whole.size, "by_seed": by_seed.tolist()}
    line["baseline"], line["candidate"] = rates.mean(1).tolist()
    line["difference"] = float(by_seed.mean())
    line["interval95"] = np.nanpercentile(np.mean(drawn, 0), [2.5, 97.5]).tolist()
    line |= {"seeds_won": ahead.count(1), "seeds_tied": ahead.count(0)}
    if not alike:
        line |= {"gained": whole.gained, "lost": whole.lost}
        line["mcnemar_p"] = mcnemar(whole.gained, whole.lost)
    return line


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p = min(1, 2 P(X <= min(gained, lost))), X ~ Binomial(gained + lost, 1/2).

    It takes pairs as independent. Over several seeds an item comes again: go by the interval then.
    """
    n, fewer = gained + lost, min(gained, lost)
    chosen = accumulate(range(fewer), lambda c, k: c * (n - k) // (k + 1), initial=1)  # C(n, k)
    return min(1.0, 2 * sum(chosen) / 2**n)


def statistics(pairs: Sequence[tuple[Run, Run]], settings: Settings) -> Record:
    """Every measure of each task; pooled, the first rules and the reference solutions.

    A resample draws its seeds once for all tasks, and items within each task: the same ones for
    every backbone, whose tasks are named BACKBONE/TASK.
    """
    seeds = draw_counts(np.random.default_rng(settings.seed), settings.resamples, len(pairs))
    tasks: dict[str, Record] = {}
    first, references = [], []
    for task in dict.fromkeys(key[0] for key in pairs[0][0].sizes):
        grid = build_grid(pairs, task)
        stream = [settings.seed, zlib.crc32(task.rpartition("/")[2].encode())]
        sums = resample(grid, seeds, np.random.default_rng(stream))
        tasks[task] = {name: estimate([part]) for name, part in zip(grid.measures, sums)}
        first.append(sums[0])
        references += sums[-1:] if REFERENCE in grid.measures else []
    pooled: dict[str, Record] = {}
    for name in ("mean of tasks", "all items") if len(tasks) > 1 else ():
        pooled[name] = {"first": estimate(first, name == "mean of tasks")}
        if references:
            pooled[name][REFERENCE] = estimate(references, name == "mean of tasks")
    return {"tasks": tasks, "pooled": pooled}


def compare_runs(baseline: Sequence[Run], candidate: Sequence[Run], settings: Settings) -> Record:
    """Pair and compare; returns what comparison.json holds. Raises ValueError."""
    runs, several = [*baseline, *candidate], len({r.conditions["backbone"] for r in baseline}) > 1
    notes = check_conditions(runs, settings.ignore, "backbone" if several else "")
    if several:
        baseline, candidate = merge_backbones(baseline), merge_backbones(candidate)
    pairs = pair_runs(baseline, candidate)
    seeds, conditions = [run.seed for _, run in pairs], runs[0].conditions
    if str(conditions["commit"]).endswith("-dirty"):
        notes.append("warning: scored with uncommitted changes, perhaps not the same ones")
    if len(seeds) == 1:
        notes.append("one seed: the intervals hold the variation over items alone, none over seeds")
    about = {"settings": asdict(settings), "runs": [run.name for run in runs], "seeds": seeds}
    return about | {"notes": notes, "conditions": conditions} | statistics(pairs, settings)


# ---- table and picture ----


def comparison_table(result: Record) -> str:
    """A line a rule, and the pooled lines; the same for the reference solutions; notes."""
    rules, references = [], []
    for task, entry in (result["tasks"] | result["pooled"]).items():
        several = len(entry.keys() - {REFERENCE}) > 1
        for k, (name, line) in enumerate(entry.items()):
            spec = ".5f" if name == REFERENCE else ".2f"
            low, high = (format(end, "+" + spec) for end in line["interval95"])
            shown = [format(line[side], spec) for side in ("baseline", "candidate")]
            shown += [format(line["difference"], "+" + spec), f"{low} to {high}"]
            tied = f" ({line['seeds_tied']} tied)" if line["seeds_tied"] else ""
            won = f"{line['seeds_won']} of {len(result['seeds'])}{tied}"
            flips = ["", ""]
            if "gained" in line:
                flips = [f"+{line['gained']} -{line['lost']}", f"{line['mcnemar_p']:.3g}"]
            if name == REFERENCE:
                references.append([task, line["n"], *shown, line["size"], won])
            else:
                label = f"  {name}" if k else f"{task} {name}" if several else task
                rules.append([label, line["n"], *shown, *flips, won])
    columns = ["task", "n", "baseline %", "candidate %", "difference", "95 % interval"]
    text = table([*columns, "flips", "McNemar p", "seeds won"], rules)
    if references:
        columns[2:4] = "baseline", "candidate"
        text += "\n\nlog-likelihood of the reference solution, nats per token\n"
        text += table([*columns, "tokens", "seeds won"], references)
    if len(result["tasks"]) > 1:
        text += "\n" + at_least_zero(result["tasks"])
    return "\n".join([text, *result["notes"]])


def at_least_zero(tasks: Mapping[str, Record]) -> str:
    """How many tasks have a difference of at least 0, in per cent and in log-likelihood."""
    first = [next(iter(entry.values())) for entry in tasks.values()]
    last = [entry[REFERENCE] for entry in tasks.values() if REFERENCE in entry]
    shown = []
    for lines, what in ((first, "in per cent"), (last, "in log-likelihood")):
        ahead = sum(round(line["difference"], 10) >= 0 for line in lines)
        shown += [f"{ahead} of {len(lines)} {what}"] if lines else []
    return f"differences of at least 0: {', '.join(shown)}"


def write_comparison(result: Record, out: Path, name: str = "comparison") -> None:
    """NAME.json and, with matplotlib, NAME.png: differences, intervals, a grey dot a seed."""
    write_json(out / f"{name}.json", result)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    entries = result["tasks"] | result["pooled"]
    panels = {"points": [next(iter(entry.values())) for entry in entries.values()]}
    panels["nats per token"] = [entry.get(REFERENCE) for entry in entries.values()]
    figure = Figure((10, 1.4 + 0.45 * len(entries)), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set(xlabel=title, ylim=(len(entries) - 0.5, -0.5))
        axis.set_yticks(range(len(entries)), list(entries), fontsize=8)
        for y, line in enumerate(lines):
            if line:
                color, dots = "C0" if y < len(result["tasks"]) else "k", line["by_seed"]
                axis.plot(dots, [y + 0.2] * len(dots), "o", color="0.7", markersize=3)
                axis.plot(line["interval95"], [y, y], color=color, linewidth=2)
                axis.plot(line["difference"], y, "s", color=color, markersize=6)
    figure.suptitle(f"candidate - baseline, 95 % intervals, {len(result['seeds'])} seeds (dots)")
    figure.savefig(out / f"{name}.png", dpi=150)


def main(overrides: Record) -> None:
    """Compare, print the table, write JSON and picture. Raises ValueError."""
    settings = Settings(**overrides)
    sides: list[list[Run]] = []
    for words in (settings.baseline, settings.candidate):
        sides.append([run for word in words for run in read_runs(word)])
    if not all(sides):
        raise ValueError("expected --baseline RUN... and --candidate RUN...")
    result = compare_runs(sides[0], sides[1], settings)
    print(comparison_table(result))
    if settings.out:
        write_comparison(result, Path(settings.out))


if __name__ == "__main__":
    run_script(main, Settings, "python -m experiments.compare")
