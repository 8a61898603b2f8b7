"""experiments/compare.py, held against plain loops over values, the draws written out as lists."""

import json
import math
import random
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from experiments import compare

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"gsm8k": 23, "arc": 9, "code": 14}
RULES = {"gsm8k": ("flexible", "strict"), "arc": ("acc", "acc_norm"), "code": ("base", "plus")}
CONDITIONS = {"shots": 0, "commit": "f21aa75", "dtype": "float32", "backbone": "f00d"}
CONDITIONS |= {f"{task} rows": f"rows of {task}" for task in SIZES}


def make_run(side, seed, chance=0.5, samples=1, backbone="some/model", **conditions):
    """Right with this chance; plus for every other program; no reference solution for gsm8k."""
    run = compare.Run(f"{side}{seed}", seed, backbone, CONDITIONS | conditions)
    draw = random.Random(f"{side} {seed} {chance}")
    for task, size in SIZES.items():
        for n, sample in product(range(size), range(samples)):
            rules = [rule for rule in RULES[task] if rule != "plus" or n % 2]
            values = {rule: int(draw.random() < chance) for rule in rules}
            sizes = dict.fromkeys(rules, 1)
            if task == "code" or (task, n) == ("arc", 4):  # a resample of arc may hold none
                values["reference"] = -draw.random() * (5 + n)
                sizes["reference"] = 5 + n
            run.values[task, f"test-{n}", sample] = values
            run.sizes[task, f"test-{n}", sample] = sizes
    return run


def make_lab(seeds=(0, 1, 2), chances=(0.4, 0.6), **about):
    """The runs of each side."""
    lab = {}
    for side, chance in zip(("baseline", "candidate"), chances):
        lab[side] = [make_run(side, seed, chance, **about) for seed in seeds]
    return lab


def compare_lab(lab, **values):
    settings = compare.Settings(**{"resamples": 200, **values})
    return compare.compare_runs(lab["baseline"], lab["candidate"], settings)


def save(run, folder):
    """The run as eval.py writes it; returns its folder."""
    folder.mkdir(parents=True)
    lines = []
    for (task, item, sample), found in run.values.items():
        row = {"task": task, "id": item, "sample": sample}
        row["verdicts"] = {name: x == 1 for name, x in found.items() if name != "reference"}
        row["reference_logprob"] = found.get("reference")
        row["reference_tokens"] = run.sizes[task, item, sample].get("reference")
        lines.append(json.dumps(row) + "\n")
    (folder / "records.jsonl").write_text("".join(lines))
    about = {"run_seed": run.seed, "backbone": run.backbone, "conditions": run.conditions}
    (folder / "results.json").write_text(json.dumps(about))
    return str(folder)


# ---- the reference


def slow_cells(lab, task, rule):
    """side -> seed -> item -> (value, size) of a rule, or of the reference solution."""
    sides = []
    for runs in lab.values():
        sides.append([])
        for run in runs:
            items = {}
            for (name, item, sample), sizes in run.sizes.items():
                if name == task and rule in sizes:
                    value, size = items.get(item, (0, 0))
                    scale = 1 if rule == "reference" else 100
                    value += scale * run.values[task, item, sample][rule]
                    items[item] = value, size + sizes[rule]
            sides[-1].append(items)
    return sides


def slow_gap(cells, seeds, items):
    """Candidate - baseline over these seeds and items, each as often as it is in the list."""
    pairs = [(s, i) for s, i in product(seeds, items) if i in cells[0][s]]
    sums = [math.fsum(side[s][i][0] for s, i in pairs) for side in cells]
    size = sum(cells[0][s][i][1] for s, i in pairs)
    return (sums[1] - sums[0]) / size if size else math.nan


def slow_draws(seed, seeds=3, resamples=200):
    """The seeds that each resample drew, and of each task the items, written out as lists."""
    drawn = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds)).tolist()
    items = {}
    for task, size in SIZES.items():
        ids = sorted(f"test-{n}" for n in range(size))
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        items[task] = [[ids[n] for n in row] for row in rng.integers(size, size=(resamples, size))]
    return drawn, items


def interval(draws):
    return pytest.approx(np.nanpercentile(draws, [2.5, 97.5]), abs=1e-9)


# ---- statistics


@pytest.mark.parametrize("samples", [1, 3])
def test_every_line_against_plain_loops(samples):
    lab = make_lab(samples=samples)
    result, (seeds, items) = compare_lab(lab, seed=5), slow_draws(5)
    assert result["seeds"] == [0, 1, 2] and list(result["tasks"]) == list(SIZES)
    for task, entry in result["tasks"].items():
        assert list(entry) == [*RULES[task], *(["reference"] if task != "gsm8k" else [])]
        for rule, line in entry.items():
            cells = slow_cells(lab, task, rule)
            every, sizes = sorted(cells[0][0]), [size for _, size in cells[0][0].values()]
            for side, name in zip(cells, ("baseline", "candidate")):
                total = math.fsum(side[s][i][0] for s, i in product(range(3), every))
                assert line[name] == pytest.approx(total / sum(sizes) / 3, abs=1e-10)
            by_seed = [slow_gap(cells, [s], every) for s in range(3)]
            assert line["by_seed"] == pytest.approx(by_seed, abs=1e-10)
            assert line["difference"] == pytest.approx(math.fsum(by_seed) / 3, abs=1e-10)
            assert line["seeds_won"] == sum(gap > 1e-9 for gap in by_seed)
            assert line["seeds_tied"] == sum(abs(gap) < 1e-9 for gap in by_seed)
            draws = [slow_gap(cells, *drawn) for drawn in zip(seeds, items[task])]
            assert line["interval95"] == interval(draws)
            pairs = product(range(3), every)
            moves = [cells[1][s][i][0] - cells[0][s][i][0] for s, i in pairs]
            flips = sum(x > 0 for x in moves), sum(x < 0 for x in moves)
            assert (line["gained"], line["lost"]) == flips
            assert line["mcnemar_p"] == compare.mcnemar(*flips)
            size = sum(sizes) if rule == "reference" else len(every)
            assert (line["n"], line["size"]) == (len(every), size)
    assert any(
        math.isnan(slow_gap(slow_cells(lab, "arc", "reference"), [0], i)) for i in items["arc"]
    )


@pytest.mark.parametrize("measure", ["first", "reference"])
def test_pooled_lines_against_plain_loops(measure):
    lab = make_lab()
    result, (seeds, items) = compare_lab(lab, seed=3), slow_draws(3)
    cells, whole = {}, [[{}, {}, {}], [{}, {}, {}]]  # whole: all tasks as one
    for task in SIZES if measure == "first" else ("arc", "code"):
        cells[task] = slow_cells(lab, task, RULES[task][0] if measure == "first" else measure)
        for side, s in product((0, 1), range(3)):
            whole[side][s] |= {(task, i): v for i, v in cells[task][side][s].items()}

    def mean_of_tasks(seeds, chosen):
        return sum(slow_gap(cells[task], seeds, chosen[task]) for task in cells) / len(cells)

    def all_items(seeds, chosen):
        return slow_gap(whole, seeds, [(task, i) for task in cells for i in chosen[task]])

    every = {task: sorted(cells[task][0][0]) for task in cells}
    for name, gap in (("mean of tasks", mean_of_tasks), ("all items", all_items)):
        line = result["pooled"][name][measure]
        assert line["by_seed"] == pytest.approx([gap([s], every) for s in range(3)], abs=1e-10)
        chosen = [{task: items[task][r] for task in cells} for r in range(200)]
        assert line["interval95"] == interval([gap(*drawn) for drawn in zip(seeds, chosen)])
        assert line["n"] == sum(map(len, every.values()))
    assert "gained" not in result["pooled"]["mean of tasks"][measure]
    moved = [[*result["tasks"][task].values()][0 if measure == "first" else -1] for task in cells]
    assert line["gained"] == sum(line["gained"] for line in moved)


def test_several_backbones_have_a_line_each_and_one_mean():
    """A line is that of its backbone alone; a resample draws an item for all backbones at once."""
    small = make_lab(backbone="x/small")
    large = make_lab(chances=(0.7, 0.6), backbone="x/large")
    for run in large["baseline"] + large["candidate"]:
        run.conditions["backbone"] = "beef"
    both = {side: small[side] + large[side] for side in small}
    result, (seeds, items) = compare_lab(both), slow_draws(0)
    assert result["notes"] == []
    for name, lab in (("small", small), ("large", large)):
        alone = {f"{name}/{task}": line for task, line in compare_lab(lab)["tasks"].items()}
        assert alone.items() <= result["tasks"].items()
    cells = [(t, slow_cells(lab, t, RULES[t][0])) for lab in (small, large) for t in SIZES]
    draws = []
    for r in range(200):
        draws.append(sum(slow_gap(cell, seeds[r], items[task][r]) for task, cell in cells) / 6)
    assert result["pooled"]["mean of tasks"]["first"]["interval95"] == interval(draws)
    with pytest.raises(ValueError, match="other items"):
        compare_lab({"baseline": both["baseline"], "candidate": both["candidate"][1:]})
    with pytest.raises(ValueError, match='backbone: "f00d" . "beef"'):
        compare_lab({"baseline": small["baseline"], "candidate": large["candidate"]})
    with pytest.raises(ValueError, match="of one seed and backbone"):
        compare_lab({side: [*runs, runs[0]] for side, runs in both.items()})


def test_mcnemar_is_the_share_of_sign_patterns_as_lopsided():
    for gained, lost in product(range(7), range(5)):
        signs = product((0, 1), repeat=gained + lost)
        totals = [abs(2 * sum(pattern) - gained - lost) for pattern in signs]
        share = sum(total >= abs(gained - lost) for total in totals) / len(totals)
        assert compare.mcnemar(gained, lost) == pytest.approx(share, abs=1e-15)
    assert compare.mcnemar(5000, 5000) == 1 and compare.mcnemar(0, 1074) == 2.0**-1073


def test_the_interval_covers_as_often_as_it_says():
    """True difference 0, made of a seed's part, an item's part and noise."""
    draw, hits = np.random.default_rng(0), 0
    for trial in range(150):
        gaps = draw.normal(0, 4, (10, 1)) + draw.normal(0, 30, 50) + draw.normal(0, 10, (10, 50))
        values, sizes = np.stack((np.zeros((10, 50)), gaps))[None], np.ones((1, 50))
        seeds = compare.draw_counts(np.random.default_rng(trial), 300, 10)
        sums = compare.resample(compare.Grid(["r"], values, sizes), seeds, draw)
        low, high = compare.estimate(sums)["interval95"]
        hits += low <= 0 <= high
    assert 0.89 <= hits / 150 <= 0.99  # with items drawn anew for each seed about a half


def test_no_order_matters_and_the_seed_decides():
    lab = make_lab()
    want, run = compare_lab(lab), lab["candidate"][2]
    keys = random.Random(0).sample(sorted(run.sizes), len(run.sizes))
    lab["candidate"][2] = replace(run, sizes={key: run.sizes[key] for key in keys})
    lab["candidate"].reverse()
    assert compare_lab(lab)["tasks"] == want["tasks"]
    other, line = compare_lab(lab, seed=1)["tasks"]["arc"]["acc"], want["tasks"]["arc"]["acc"]
    assert other["interval95"] != line["interval95"] and other["difference"] == line["difference"]


def test_a_tie_is_a_tie_in_rounded_arithmetic_too():
    values = np.array([[0.3, 0.3], [0.1 + 0.2, 0.4]])
    line = compare.estimate([compare.Sums(values, np.zeros(100), np.ones(100), 1, 1, 1, 0)])
    assert line["by_seed"][0] != 0 and (line["seeds_won"], line["seeds_tied"]) == (1, 1)
    assert "1 of 1" in compare.at_least_zero({"t": {"r": {"difference": 0.3 - (0.1 + 0.2)}}})


# ---- what cannot be compared


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conditions": CONDITIONS | {"shots": 5}}, r"shots: 0 \| 5$"),
        ({"conditions": CONDITIONS | {"new": None}}, r'new: "absent" \| null$'),
        (
            {"conditions": CONDITIONS | {"arc rows": 1, "shots": 5}},
            r"(?s)shots: .*arc rows: .* \| 1$",
        ),
        ({"seed": 7}, r"each seed once on both sides, found \[0, 1, 2\] \| \[0, 2, 7\]"),
        ({"seed": None}, r"found \[0, 1, 2\] \| "),
        ({"seed": 0}, r"found \[0, 1, 2\] \| \[0, 0, 2\]"),
        ({"sizes": {}}, "candidate1: other items, rules or references than baseline0"),
    ],
)
def test_refusals(changes, message):
    lab = make_lab()
    lab["candidate"][1] = replace(lab["candidate"][1], **changes)
    with pytest.raises(ValueError, match=message):
        compare_lab(lab)


@pytest.mark.parametrize("change", [{"flexible": 1}, {"flexible": 1, "strict": 1, "reference": 99}])
def test_other_rules_and_reference_lengths_are_refused(change):
    lab = make_lab()
    lab["candidate"][1].sizes["gsm8k", "test-3", 0] = change
    with pytest.raises(ValueError, match="other items, rules or references"):
        compare_lab(lab)


def test_seeds_that_come_twice_are_refused():
    lab = make_lab()
    with pytest.raises(ValueError, match="each seed once"):
        compare_lab({side: [*runs, runs[0]] for side, runs in lab.items()})


def test_notes():
    lab = make_lab()
    other = CONDITIONS | {"arc rows": "x", "code rows": "x", "commit": "1-dirty"}
    lab["baseline"] = [replace(run, conditions=other) for run in lab["baseline"]]
    with pytest.raises(ValueError, match="  code rows: ") as caught:
        compare_lab(lab, ignore=("commit", "arc rows"))
    assert "commit: " not in str(caught.value) and "arc" not in str(caught.value)
    notes = compare_lab(lab, ignore=("rows", "commit"))["notes"]
    names = ["ignored: commit", "ignored: arc rows", "ignored: code rows", "warning: scored with"]
    assert all(note.startswith(name) for name, note in zip(names, notes, strict=True))
    lab = make_lab(seeds=(4,))
    result = compare_lab(lab | {"baseline": [replace(lab["baseline"][0], seed=None)]})
    assert result["seeds"] == [4] and result["notes"][0].startswith("one seed: ")


# ---- files, table, picture, command line


def test_where_runs_are_found(tmp_path):
    run, folder = make_run("b", 3, samples=2), tmp_path / "run"
    save(run, folder / "eval-adapted")
    assert compare.read_runs(str(folder)) == [replace(run, name=str(folder))]
    save(run, folder / "eval")
    for word in (str(folder), str(tmp_path), f"{tmp_path}/none.gz:baseline", "nothing"):
        with pytest.raises(ValueError, match="expected"):
            compare.read_runs(word)
    lines = (folder / "eval/records.jsonl").read_text().splitlines()
    (folder / "eval/records.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match=r"records.jsonl:93: \('gsm8k', 'test-0', 0\) came before"):
        compare.read_runs(str(folder / "eval"))


def test_the_table():
    result = compare_lab(make_lab())
    out, line = compare.comparison_table(result).splitlines(), result["tasks"]["gsm8k"]["strict"]
    shown = f"strict 23 {line['baseline']:.2f} {line['candidate']:.2f} {line['difference']:+.2f} "
    shown += "{:+.2f} to {:+.2f} ".format(*line["interval95"])
    shown += f"+{line['gained']} -{line['lost']} {line['mcnemar_p']:.3g} {line['seeds_won']} of 3"
    assert " ".join(out[2].split()).startswith(shown) and out[2].startswith("  strict ")
    rules = ["gsm8k flexible", "strict", "arc acc", "acc_norm", "code base", "plus"]
    names = [row[:14].strip() for row in out]
    assert names[1:9] == [*rules, "mean of tasks", "all items"]
    assert ("candidate %" in out[0], "candidate %" in out[11]) == (True, False)
    assert out[10] == "log-likelihood of the reference solution, nats per token"
    assert names[12:16] == ["arc", "code", "mean of tasks", "all items"]
    ahead = sum(next(iter(task.values()))["difference"] >= 0 for task in result["tasks"].values())
    counts = rf"differences of at least 0: {ahead} of 3 in per cent, \d of 2 in log-likelihood"
    assert re.fullmatch(counts, out[16])


def test_the_picture_needs_matplotlib_and_nothing_else_does(tmp_path, monkeypatch):
    result = compare_lab(make_lab())
    with monkeypatch.context() as patch:
        for name in ("matplotlib", "matplotlib.figure"):
            patch.setitem(sys.modules, name, None)
        compare.write_comparison(result, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["comparison.json"]
    pytest.importorskip("matplotlib")
    compare.write_comparison(result, tmp_path)
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_line(tmp_path):
    words = ["--resamples", "100", "--out", str(tmp_path / "out"), "--baseline"]
    for side, runs in make_lab(seeds=(0, 1)).items():
        words += ["--candidate"] if side == "candidate" else []
        words += [save(run, tmp_path / run.name) for run in runs]
    command = [sys.executable, "-m", "experiments.compare", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    stored = json.loads((tmp_path / "out/comparison.json").read_text())
    assert done.returncode == 0 and done.stdout.startswith("task ") and stored["seeds"] == [0, 1]
