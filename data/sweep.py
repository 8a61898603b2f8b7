"""`python train.py --paired --seeds 0-6`: the adapter with and without the side path, all else identical, trained, scored and compared.

OUT/sweep.json                 settings, hashes of them and of each run's, trainable parameters, what --lrs found
OUT/base                       the bare backbone's scores
OUT/lr-RATE/SIDE               --lrs: the first seed at each rate, trained and not scored; that of the rate taken is copied to its seed-N
OUT/seed-N/SIDE                ordinary run folders with scores in eval-adapted; SIDE is baseline, candidate and, where asked for, control
                               and mixer=mlp, ... of --vary
OUT/comparison.json, .png      candidate against baseline; comparison-control.json, .png: against the control
OUT/comparison-mixer=mlp.json  --vary: that variation against the baseline; variations.json, .png: the candidate and all of them

What is finished in OUT is taken as it is, what is not goes on, so the same command finishes a sweep that was stopped. Under torchrun
process 0 decides what is done.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data.figures import draw_comparison
from data.ranks import Ranks, open_ranks
from data.record import check_record, read_record
from data.settings import nearest
from eval import CompareSettings, Record, compare, compare_table, comparison_table, score, table
from model import ModelConfig, Transformer, atomic, choose_device, read_json, resolve_folder
from talan import SCOPES, attach, group_of
from train import Settings, free_folder, kept, main, parts, restore, scoring, set_deterministic

OWN = ("paired", "seeds", "lrs", "paired_control", "vary")  # settings of a sweep that its runs do not have
AXES = ("layers", "site", "slots", "width", "mixer", "writeback", "bound", "scope", "grad_scale", "trunk_grad_scale", "talan_lr_scale")

# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------

def parse_seeds(words: Sequence[str]) -> list[int]:
    """("0-2", "5") -> [0, 1, 2, 5]. Raises ValueError that lists every word which is no range, and seeds that come twice."""
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", word) for word in words]
    ends = [(int(m[1]), int(m[2] or m[1])) if m else (1, 0) for m in ranges]
    wrong = [word for word, (first, last) in zip(words, ends) if first > last]
    if wrong or not words:
        raise ValueError(f"--seeds: expected numbers and rising ranges such as 0-6, found {', '.join(wrong) or 'none'}")
    seeds = [seed for first, last in ends for seed in range(first, last + 1)]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"--seeds: each once, found {', '.join(map(str, twice))} more often")
    return seeds


def parse_rates(words: Sequence[str]) -> list[float]:
    """Rising learning rates. Raises ValueError on what is none, and on a single one."""
    rates = []
    for word in words:
        with contextlib.suppress(ValueError):
            rates.append(float(word))
    names = {f"{rate:g}" for rate in rates}  # those of their folders
    if words and (len(names) < 2 or len(names) < len(words) or not all(0 < rate < math.inf for rate in rates)):
        raise ValueError(f"--lrs: expected at least two learning rates above 0, different in their first six digits, found {', '.join(words)}")
    return sorted(rates)


def parse_variation(word: str) -> dict[str, Any]:
    """"slots=32" -> {"slots": 32}; several layers are joined by +. Raises ValueError on what is no axis of the side path, or not its kind."""
    name, _, text = word.partition("=")
    if name not in AXES:
        raise ValueError(f"{word!r}: expected AXIS=VALUE with an axis of {', '.join(AXES)}{nearest(name, AXES)}")
    usual = getattr(Settings(), name)
    try:
        value: Any = tuple(text.split("+")) if isinstance(usual, tuple) else type(usual)(text)
        parts(replace(Settings(), **{name: value}))
        if name == "scope" and value not in SCOPES:
            raise ValueError(f"expected one of {', '.join(SCOPES)}{nearest(value, SCOPES)}")
    except ValueError as error:
        raise ValueError(f"{word!r}: {' '.join(str(error).split())}") from None
    return {name: value}


def parse_variations(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each variation changes, by its word. Raises ValueError that lists every word which is none, and those that come twice."""
    found, wrong = {}, [f"{word!r} comes twice" for n, word in enumerate(words) if word in words[:n]]
    for word in words:
        try:
            found[word] = parse_variation(word)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n  ".join(["--vary:", *wrong]))
    return found


def check_asked(settings: Settings, explicit: dict[str, Any]) -> None:
    """Raises ValueError that lists every flag which a sweep cannot go by."""
    problems = [text for text, holds in (
        ("--seeds, --lrs, --paired-control and --vary go with --paired", not settings.paired),
        ("--seed: --seeds names them", "seed" in explicit),
        ("--resume: the same command without it goes on", settings.resume),
        ("--lr: --lrs tries several, name it among them", settings.lrs and "lr" in explicit),
        ("--no-talan: the candidates have the side path", not settings.talan),
        ("--adapter none: the baselines need one", settings.adapter == "none"),
        ("--scope talan: the baselines would have nothing to train", settings.scope == "talan"),
        ("--tasks none: nothing would be compared", settings.tasks == ("none",)),
        ("--dry-run: shows one run, leave out --paired", settings.dry_run),
        (f"--paired-control: expected none or rank, found {settings.paired_control!r}", settings.paired_control not in ("none", "rank"))) if holds]
    if problems:
        raise ValueError("\n  ".join(["these flags do not go together:", *problems]))


def sides_of(settings: Settings) -> dict[str, Settings]:
    """Settings by side. The baseline's are the candidate's without the side path, the control's the baseline's with another rank.

    Scope writeback trains the adapter and a part of the side path: without one, it is scope joint.
    """
    candidate = replace(settings, out="", paired=False, seeds=(), lrs=(), paired_control="none", vary=())
    baseline = replace(candidate, talan=False, scope="joint" if candidate.scope == "writeback" else candidate.scope)
    sides = {"baseline": baseline, "candidate": candidate}
    sides |= {"control": replace(baseline, rank=control_rank(candidate))} if settings.paired_control == "rank" else {}
    return sides | {word: replace(candidate, **changes) for word, changes in parse_variations(settings.vary).items()}


def trainable(settings: Settings) -> dict[str, int]:
    """Trainable parameters: the adapter's matrices A and B, the side path's, and all. Counted without weights. Raises ValueError."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dir(resolve_folder(settings.backbone)))
        attach(model, *parts(settings), settings.scope)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {"matrices": sum(n for name, n in sizes.items() if name.endswith((".lora_A", ".lora_B"))),
            "side path": sum(n for name, n in sizes.items() if group_of(name) == "side path"), "all": sum(sizes.values())}


def control_rank(settings: Settings) -> int:
    """The smallest rank with which the adapter alone has as many trainable parameters as adapter and side path: the matrices A and B
    have (rows + columns) x rank. Alpha stays, so the scale alpha / rank falls as it does with any other rank."""
    count = trainable(settings)
    return settings.rank + math.ceil(count["side path"] / (count["matrices"] // settings.rank))


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------

def settings_hash(settings: Settings) -> str:
    """sha256 of the settings but for those that say where and how a command came to a run."""
    return hashlib.sha256(json.dumps(asdict(kept(replace(settings, out=""))), sort_keys=True).encode()).hexdigest()


def differences(run: Path, wanted: Settings) -> list[str]:
    """How the settings stored in a run folder differ from those wanted; none where there is no run."""
    file = run / "settings.json"
    stored = asdict(kept(replace(restore(read_json(file), file), out=""))) if file.exists() else {}
    want = asdict(kept(replace(wanted, out="")))
    return [f"{run}: {name}: this command says {want[name]}, the run has {value}" for name, value in stored.items() if value != want[name]]


def check_runs(runs: dict[Path, Settings], overwrite: bool) -> None:
    """Raises ValueError that lists every difference between runs that exist and those wanted, unless such runs may be deleted."""
    if (differ := [text for run, wanted in runs.items() for text in differences(run, wanted)]) and not overwrite:
        raise ValueError("\n  ".join(["runs with other settings are there; --overwrite deletes them, --out names another folder:", *differ]))


def trained(run: Path) -> bool:
    """Is its training finished? While a step folder exists, it is not."""
    return (run / "train_state.json").exists() and not any(run.glob("step-*"))


def do_run(settings: Settings, run: Path, ranks: Ranks, scored: bool = False) -> None:
    """Train the run, and score it where asked for; what of this is done already, by these settings, stays."""
    gc.collect()  # the model of the run before
    if settings.compile:
        torch.compiler.reset()  # else a few models reach its limit of recompilations
    look = lambda: (bool(differences(run, settings)), trained(run), (run / "eval-adapted/results.json").exists(), (run / "settings.json").exists())
    other, ready, scores, there = ranks.from_first(look)
    if ready and not other and (scores or not scored):
        return print(f"{run}: finished, with these settings: reused")
    if not ready or other:
        print(f"\n{run}: {'overwritten' if other else 'goes on' if there else 'starts'}")
        values = asdict(replace(settings, out=str(run), resume=there and not other, overwrite=other))
        main({name: value for name, value in values.items() if name not in OWN}, part=True)
    if scored:
        score(scoring(settings, run / "eval-adapted", run))


def check_files(run: Path, first: Path) -> None:
    """Both were trained from the same data and backbone; another commit or device is a warning here. Raises ValueError."""
    check_record(run, read_record(run), read_record(first))


def score_base(settings: Settings, out: Path, ranks: Ranks, device: Any) -> Record:
    """The bare backbone's summaries by task, as they are stored when they were made with these settings, on this device."""
    wanted, file = scoring(settings, out), out / "results.json"

    def look() -> Record | None:
        stored, want = read_json(file) if file.exists() else {}, json.loads(json.dumps(asdict(wanted)))
        return stored["tasks"] if {**stored.get("settings", {}), "device": stored.get("device")} == {**want, "device": str(device)} else None

    if found := ranks.from_first(look):
        print(f"{out}: scored, with these settings: reused")
    return found or score(wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates
# ---------------------------------------------------------------------------------------------------------------------

def held_out_loss(settings: Settings, run: Path, ranks: Ranks) -> float:
    """Do this run; its loss on the held-out rows after the last step, infinite when this or a loss that stopped the run is not finite."""
    try:
        do_run(settings, run, ranks)
    except ValueError as error:
        if f"{run}/nonfinite-step-" not in str(error):
            raise
        print(error)
        return math.inf
    lines = (run / "metrics.jsonl").read_text().splitlines()
    loss = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "dev"][-1]
    return loss if math.isfinite(loss) else math.inf


def lowest(losses: dict[float, float]) -> float:
    """The rate with the lowest loss, the smallest of equals. Raises ValueError when none has a finite one."""
    if not any(map(math.isfinite, losses.values())):
        raise ValueError(f"--lrs: no finite loss at any of {', '.join(f'{rate:g}' for rate in losses)}")
    return min(losses, key=lambda rate: (not math.isfinite(losses[rate]), losses[rate], rate))


def rate_table(losses: dict[str, dict[float, float]]) -> str:
    """A line a side, the lowest loss marked, and a note when it lies at an end of the grid."""
    rows = [[side, *(f"{loss:.5f}{'*' * (rate == lowest(line))}" for rate, loss in line.items())] for side, line in losses.items()]
    rates = list(next(iter(losses.values())))
    ends = [side for side, line in losses.items() if lowest(line) in (rates[0], rates[-1])]
    note = f"\nlowest at an end of the grid: {', '.join(ends)}; a better rate may lie beyond" if ends else ""
    return table(["held-out loss", *(f"{rate:g}" for rate in rates)], rows) + note


def grid_of(sides: dict[str, Settings], rates: Sequence[float], out: Path) -> dict[Path, Settings]:
    """The first seed's run of each side at each rate."""
    return {out / f"lr-{rate:g}" / side: replace(settings, lr=rate) for rate in rates for side, settings in sides.items()}


def choose_rates(grid: dict[Path, Settings], ranks: Ranks) -> dict[str, dict[float, float]]:
    """Losses on held-out rows by side and rate. The test items have no part in it."""
    losses: dict[str, dict[float, float]] = {}
    for run, settings in grid.items():
        losses.setdefault(run.name, {})[settings.lr] = held_out_loss(settings, run, ranks)
    print(f"\nfirst seed, after the last step; the rate with the lowest is taken (*), for each side by itself\n{rate_table(losses)}")
    return losses


def take_over(found: Path, run: Path) -> None:
    """The first seed's run at the rate that was taken is trained already: its folder is copied, whole or not at all, unless one is there.
    Its settings.json and metrics.jsonl go on naming the folder that it was trained in."""
    if trained(found) and not run.exists():
        tmp = found.with_name(f".{found.name}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.copytree(found, tmp)
        run.parent.mkdir(exist_ok=True)
        tmp.rename(run)


# ---------------------------------------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------------------------------------

def choose_folder(settings: Settings) -> Path:
    """The sweep's folder. Raises ValueError when something else is in it."""
    out = Path(settings.out or free_folder())
    if out.exists() and not (out / "sweep.json").exists() and (not out.is_dir() or any(not f.match(".sweep.json.*.tmp") for f in out.iterdir())):
        raise ValueError(f"{out}: exists, and holds no sweep")
    return out


def write_sweep(out: Path, settings: Settings, sides: dict[str, Settings], runs: dict[Path, Settings], losses: dict[str, Any]) -> None:
    """sweep.json. Infinite losses are null."""
    told = {side: {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in line.items()} for side, line in losses.items()}
    content = {"settings": asdict(kept(settings)), "settings_sha256": settings_hash(settings),
               "sides": {side: {"rank": s.rank, "lr": s.lr, "trainable": trainable(s)["all"]} for side, s in sides.items()},
               "held_out_losses": told, "runs": {str(run.relative_to(out)): settings_hash(wanted) for run, wanted in runs.items()}}
    with atomic(out / "sweep.json") as tmp:
        tmp.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """SIGTERM between the runs and while they are scored is what Ctrl-C is: an end with 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def compare_sides(out: Path, sides: dict[str, Settings], seeds: Sequence[int], rest: Sequence[str]) -> None:
    """Print and write the comparison of the candidates with the baselines and with the controls; then of each variation in `rest` with the
    baselines, and these together."""
    def against(other: str, side: str, name: str) -> Record:
        a, b = asdict(sides[other]), asdict(sides[side])
        differ = ", ".join(f"{key} {a[key]} | {b[key]}" for key in a if a[key] != b[key])
        print(f"\n{other} against {side}, {len(seeds)} seeds; of their settings in training these differ, as they are meant to: {differ}")
        scores = lambda one: tuple(str(out / f"seed-{seed}" / one / "eval-adapted") for seed in seeds)
        return compare(CompareSettings(scores(other), scores(side), out=str(out)), name)

    found = {"candidate": against("baseline", "candidate", "comparison")}
    if "control" in sides:
        against("control", "candidate", "comparison-control")
    found |= {word: against("baseline", word, f"comparison-{word}") for word in rest}
    if rest:
        overview(out, found)


def together(found: dict[str, Record]) -> Record:
    """Comparisons with the same baselines as one, a line each: its task, or the mean of its tasks."""
    line = lambda result: (result["tasks"] if len(result["tasks"]) == 1 else {"": result["pooled"]["mean of tasks"]}).values()
    lines = {name: next(iter(line(result))) for name, result in found.items()}
    return {"tasks": lines, "pooled": {}, "seeds": found["candidate"]["seeds"], "notes": []}


def overview(out: Path, found: dict[str, Record]) -> None:
    """One table and one figure of comparisons with the same baselines: variations.json, .png."""
    result = together(found)
    with atomic(out / "variations.json") as tmp:
        tmp.write_text(json.dumps(result, indent=2) + "\n")
    draw_comparison(result, out / "variations.png")
    print(f"\nagainst the baseline: the candidate, and with one setting changed\n{comparison_table(result)}\nwrote {out / 'variations.json'}")


def sweep(explicit: dict[str, Any]) -> None:
    """All runs, their scores and the comparison. Raises ValueError on bad input, SystemExit(130) when interrupted."""
    settings = Settings(**explicit)
    check_asked(settings, explicit)
    seeds, rates, ranks = parse_seeds(settings.seeds), parse_rates(settings.lrs), open_ranks()
    set_deterministic(settings)
    out, device = ranks.from_first(lambda: choose_folder(settings)), choose_device(ranks.device(settings.device))
    sides = sides_of(replace(settings, seed=seeds[0]))
    plan = lambda: {out / f"seed-{seed}" / side: replace(wanted, seed=seed) for seed in seeds for side, wanted in sides.items()}
    grid = grid_of(sides, rates, out)
    ranks.from_first(lambda: check_runs(grid or plan(), settings.overwrite))
    if ranks.first:
        if not settings.out:
            out.mkdir(parents=True)  # fails where another start was faster
        if not rates or not (out / "sweep.json").exists():  # what --lrs found stays until it is found again
            write_sweep(out, settings, sides, plan(), {})
        print(f"sweep folder: {out}; when stopped, the same command with --out {out} goes on")
        print(", ".join(f"{side}: {trainable(wanted)['all']:,} trainable, rank {wanted.rank}" for side, wanted in sides.items()))
    with ending():
        base = score_base(settings, out / "base", ranks, device)
        if rates:
            losses = choose_rates(grid, ranks)
            sides = {side: replace(wanted, lr=lowest(losses[side])) for side, wanted in sides.items()}
            ranks.from_first(lambda: check_runs(plan(), settings.overwrite))
            if ranks.first:
                write_sweep(out, settings, sides, plan(), losses)
                for side, wanted in sides.items():
                    take_over(out / f"lr-{wanted.lr:g}" / side, out / f"seed-{seeds[0]}" / side)
            ranks.wait()
        for run, wanted in plan().items():
            do_run(wanted, run, ranks, scored=True)
            if ranks.first:
                check_files(run, next(iter(plan())))
                print(compare_table(base, read_json(run / "eval-adapted/results.json")["tasks"]))
        if ranks.first:
            compare_sides(out, sides, seeds, settings.vary)
        ranks.wait()
