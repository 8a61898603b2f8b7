"""eval.py compare: pairing, differences, flips, McNemar, the bootstrap, the reference log-likelihood, the table and the picture.

The oracle is plain Python: loops over the JSON lines of the runs, sums by math.fsum, draws written out item by item.
"""

import gzip
import json
import math
import os
import random
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402

SIZES = {"gsm8k": 23, "arc": 9, "code": 14}
RULES = {"gsm8k": ("flexible", "strict"), "arc": ("acc", "acc_norm"), "code": ("base",)}
RESULTS = {
    "settings": {"backbone": "B", "adapter": "A", "out": "", "rescore": "", "tasks": list(SIZES), "format": "chat", "shots": 0, "samples": 1,
                 "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 128, "batch_rows": 64, "limit": 0, "seed": 0, "device": "auto", "dtype": "auto"},
    "run_seed": 0, "commit": "f21aa75", "python": "3.11.7", "versions": {"torch": "2.13.0", "numpy": "2.4.6"}, "device": "cpu", "hardware": "x",
    "backbone": "B", "fingerprint": "f00d", "dtype": "float32",
    "tasks": {task: {"n": n, "score": 50.0, "data_sha256": f"data of {task}", "prompt_sha256": f"prompts of {task}"} for task, n in SIZES.items()},
}


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Drawing takes most of the time: only where a test's name speaks of it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(evaluation, "draw_comparison", lambda result, file: False)


def make_records(seed, chance, tasks=SIZES, samples=1, shift=0.0):
    """Random records: verdicts right with this chance, reference log-likelihoods moved by `shift` nats a token, none for code."""
    draw, records = random.Random(f"{seed} {chance}"), []
    for task, n, sample in ((name, n, k) for name in tasks for n in range(SIZES[name]) for k in range(samples)):
        verdicts = {rule: draw.random() < chance for rule in RULES[task]}
        tokens = 5 + 37 * n % 60
        logprob = None if task == "code" else -tokens * (0.5 + n % 7 / 9 + draw.gauss(0, 0.05) - shift)
        records.append({"task": task, "id": f"test-{n}", "sample": sample, "verdicts": verdicts, "correct": next(iter(verdicts.values())),
                        "reference_logprob": logprob, "reference_tokens": None if logprob is None else tokens, "completion": "x", "tokens": 1,
                        "truncated": False, "extracted": "x", "answer": "x"})
    return records


def make_run(folder, records, run_seed=0, results=None, packed=False):
    """A scored run: records.jsonl and results.json, with the given values over those of RESULTS. Returns the folder."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / ("records.jsonl.gz" if packed else "records.jsonl")).write_bytes(gzip.compress(text) if packed else text)
    (folder / "results.json").write_text(json.dumps(RESULTS | {"run_seed": run_seed} | (results or {})))
    return str(folder)


def make_lab(folder, seeds=(0, 1, 2), chances=(0.4, 0.6), **options):
    """A baseline and a candidate run of each seed -> the two settings that name them."""
    sides = {}
    for side, chance in zip(("baseline", "candidate"), chances):
        records = {seed: make_records(f"{side} {seed}", chance, shift=0.02 * (side == "candidate"), **options) for seed in seeds}
        sides[side] = tuple(make_run(folder / f"{side}{seed}", records[seed], seed) for seed in seeds)
    return sides


def compare(lab, **values):
    return evaluation.compare(evaluation.CompareSettings(**{"resamples": 200, **lab, **values}))


def refused(lab, **values):
    """What the error says, and that nothing was written."""
    before = sorted(Path(lab["candidate"][0]).rglob("*"))
    with pytest.raises(ValueError) as caught:
        compare(lab, **values)
    assert sorted(Path(lab["candidate"][0]).rglob("*")) == before
    return str(caught.value)


def change(run, edit):
    """Rewrite the records of a run: edit(list) in place."""
    file = Path(run) / "records.jsonl"
    records = read(run)
    edit(records)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(run):
    return [json.loads(line) for line in (Path(run) / "records.jsonl").read_text().splitlines()]


def rewrite(run, **values):
    """Change values of results.json."""
    file = Path(run) / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---------------------------------------------------------------- the oracle


def slow_cells(lab, task, rule):
    """side -> seed -> item -> (value, size) of a rule (in per cent of its samples) or of the reference solution."""
    sides = []
    for side in ("baseline", "candidate"):
        seeds = []
        for run in sorted(lab[side], key=lambda run: json.loads((Path(run) / "results.json").read_text())["run_seed"] or 0):
            items = {}
            for record in read(run):
                if record["task"] == task:
                    items.setdefault(record["id"], []).append(record)
            if rule == "reference":
                seeds.append({i: tuple(sum(r[f"reference_{part}"] or 0 for r in rs) for part in ("logprob", "tokens")) for i, rs in items.items()})
            else:
                seeds.append({i: (100 * sum(r["verdicts"][rule] for r in rs) / len(rs), 1) for i, rs in items.items()})
        sides.append(seeds)
    return sides


def slow_gap(cells, seeds, items):
    """Candidate - baseline over these seeds and items, each as often as it is in the list."""
    pairs = list(product(seeds, items))
    sums = [math.fsum(side[s][i][0] for s, i in pairs) for side in cells]
    size = sum(cells[0][s][i][1] for s, i in pairs)
    return (sums[1] - sums[0]) / size if size else math.nan


def slow_interval(draws):
    """2.5 and 97.5 % of the draws that are numbers, linear between neighbours."""
    draws = sorted(x for x in draws if x == x)
    ends = []
    for share in (0.025, 0.975):
        place = share * (len(draws) - 1)
        low, part = int(place), place - int(place)
        ends.append(draws[low] + part * (draws[min(low + 1, len(draws) - 1)] - draws[low]))
    return ends


def slow_draws(lab, tasks, resamples, seed):
    """The seeds drawn in each resample, and of each task the items drawn, written out as lists."""
    n_seeds = len(lab["baseline"])
    seeds = np.random.default_rng(seed).integers(n_seeds, size=(resamples, n_seeds)).tolist()
    items = {}
    for task in tasks:
        ids = sorted({r["id"] for r in read(lab["baseline"][0]) if r["task"] == task})
        drawn = np.random.default_rng([seed, zlib.crc32(task.encode())]).integers(len(ids), size=(resamples, len(ids))).tolist()
        items[task] = [[ids[n] for n in row] for row in drawn]
    return seeds, items


# ---------------------------------------------------------------- differences, flips, intervals


@pytest.mark.parametrize("samples", [1, 3])
def test_every_figure_against_plain_loops(tmp_path, samples):
    lab = make_lab(tmp_path, samples=samples)
    result = compare(lab, seed=5)
    seeds, items = slow_draws(lab, SIZES, 200, 5)
    assert result["seeds"] == [0, 1, 2] and list(result["tasks"]) == list(SIZES)
    for task in SIZES:
        entry = result["tasks"][task]
        assert list(entry["rules"]) == list(RULES[task]) and (entry["reference"] is None) == (task == "code")
        for rule in (*RULES[task], *(["reference"] if task != "code" else [])):
            line, cells = entry["reference"] if rule == "reference" else entry["rules"][rule], slow_cells(lab, task, rule)
            every = sorted(cells[0][0])
            for side, name in enumerate(("baseline", "candidate")):
                values = [cells[side][s][i] for s in range(3) for i in every]
                assert line[name] == pytest.approx(math.fsum(v for v, _ in values) / sum(n for _, n in values), abs=1e-10)
            assert line["difference"] == pytest.approx(slow_gap(cells, range(3), every), abs=1e-10)
            by_seed = [slow_gap(cells, [s], every) for s in range(3)]
            assert line["by_seed"] == pytest.approx(by_seed, abs=1e-10)
            assert (line["seeds_won"], line["seeds_tied"]) == (sum(g > 1e-9 for g in by_seed), sum(abs(g) < 1e-9 for g in by_seed))
            draws = [slow_gap(cells, *drawn) for drawn in zip(seeds, items[task])]
            assert line["interval95"] == pytest.approx(slow_interval(draws), abs=1e-9)
            if rule != "reference":
                assert line["n"] == line["size"] == SIZES[task]
                pairs = [(cells[0][s][i][0], cells[1][s][i][0]) for s in range(3) for i in every]
                assert (line["gained"], line["lost"]) == (sum(b < c for b, c in pairs), sum(b > c for b, c in pairs))
                assert line["mcnemar_p"] == evaluation.mcnemar(line["gained"], line["lost"])
        if task != "code":
            tokens = samples * sum(5 + 37 * n % 60 for n in range(SIZES[task]))
            assert (entry["reference"]["n"], entry["reference"]["size"]) == (SIZES[task], tokens)


def test_the_pooled_lines_against_plain_loops(tmp_path):
    lab = make_lab(tmp_path)
    result = compare(lab, seed=3)["pooled"]
    seeds, items = slow_draws(lab, SIZES, 200, 3)
    for name, weights in (("mean of tasks", dict.fromkeys(SIZES, 1)), ("all items", SIZES)):
        line = result[name]["rules"]["first"]
        cells = {task: slow_cells(lab, task, RULES[task][0]) for task in SIZES}

        def pooled(seeds, chosen, cells=cells, weights=weights):
            return sum(weights[task] * slow_gap(cells[task], seeds, chosen[task]) for task in SIZES) / sum(weights.values())

        every = {task: sorted(cells[task][0][0]) for task in SIZES}
        assert line["difference"] == pytest.approx(pooled(range(3), every), abs=1e-10)
        assert line["by_seed"] == pytest.approx([pooled([s], every) for s in range(3)], abs=1e-10)
        draws = [pooled(seeds[r], {task: items[task][r] for task in SIZES}) for r in range(200)]
        assert line["interval95"] == pytest.approx(slow_interval(draws), abs=1e-9) and line["n"] == sum(SIZES.values())
        assert ("gained" in line) == (name == "all items")
    tasks = compare(lab, seed=3)["tasks"]
    assert line["gained"] == sum(t["rules"][RULES[name][0]]["gained"] for name, t in tasks.items())
    assert line["lost"] == sum(t["rules"][RULES[name][0]]["lost"] for name, t in tasks.items())
    assert line["mcnemar_p"] == evaluation.mcnemar(line["gained"], line["lost"])


def test_the_pooled_log_likelihoods_against_plain_loops(tmp_path):
    lab, told = make_lab(tmp_path), ("gsm8k", "arc")  # code has no reference
    result = compare(lab)["pooled"]
    seeds, items = slow_draws(lab, SIZES, 200, 0)
    cells = {task: slow_cells(lab, task, "reference") for task in told}

    def mean_of_tasks(seeds, chosen):
        return sum(slow_gap(cells[task], seeds, chosen[task]) for task in told) / 2

    def all_items(seeds, chosen):
        pairs = [(task, s, i) for task in told for s in seeds for i in chosen[task]]
        gap = math.fsum(cells[t][1][s][i][0] - cells[t][0][s][i][0] for t, s, i in pairs)
        return gap / sum(cells[t][0][s][i][1] for t, s, i in pairs)

    every = {task: sorted(cells[task][0][0]) for task in told}
    for name, pooled in (("mean of tasks", mean_of_tasks), ("all items", all_items)):
        line = result[name]["reference"]
        assert line["difference"] == pytest.approx(pooled(range(3), every), abs=1e-10)
        draws = [pooled(seeds[r], {task: items[task][r] for task in told}) for r in range(200)]
        assert line["interval95"] == pytest.approx(slow_interval(draws), abs=1e-10) and line["n"] == SIZES["gsm8k"] + SIZES["arc"]


# ---------------------------------------------------------------- several backbones


def make_labs(folder, **options):
    """Runs of three seeds on two backbones; the lab of both, and that of each alone."""
    alone = {name: make_lab(folder / name, chances=chances, **options) for name, chances in (("small", (0.4, 0.6)), ("large", (0.7, 0.6)))}
    for name, lab in alone.items():
        for run in (*lab["baseline"], *lab["candidate"]):
            rewrite(run, backbone=f"somewhere/{name}", fingerprint=f"print of {name}")
    return {side: tuple(run for lab in alone.values() for run in lab[side]) for side in ("baseline", "candidate")}, alone


def test_several_backbones_have_a_line_each_and_one_mean(tmp_path, capsys):
    """Each line is that of its backbone compared by itself, interval included; the mean counts every line alike and draws an item for all
    backbones at once."""
    lab, alone = make_labs(tmp_path)
    result = compare(lab, seed=2)
    parts = {name: compare(each, seed=2) for name, each in alone.items()}
    assert result["tasks"] == {f"{name}/{task}": entry for name, part in parts.items() for task, entry in part["tasks"].items()}
    lines = [next(iter(entry["rules"].values())) for entry in result["tasks"].values()]
    mean = result["pooled"]["mean of tasks"]["rules"]["first"]
    assert mean["difference"] == pytest.approx(math.fsum(line["difference"] for line in lines) / 6, abs=1e-10)
    assert mean["by_seed"] == pytest.approx([math.fsum(line["by_seed"][s] for line in lines) / 6 for s in range(3)], abs=1e-10)
    seeds, items = slow_draws(alone["small"], SIZES, 200, 2)
    cells = [(task, slow_cells(each, task, RULES[task][0])) for each in alone.values() for task in SIZES]
    draws = [math.fsum(slow_gap(cell, seeds[r], items[task][r]) for task, cell in cells) / 6 for r in range(200)]
    assert mean["interval95"] == pytest.approx(slow_interval(draws), abs=1e-9)
    assert result["facts"]["fingerprint"] == {"small": "print of small", "large": "print of large"} and len(result["runs"]) == 6
    least = sum(line["difference"] >= 0 for line in lines)
    assert 0 < least < 6 and f"differences of at least 0: {least} of 6 in per cent, " in capsys.readouterr().out


def test_backbones_of_one_name_are_told_apart(tmp_path):
    lab, _ = make_labs(tmp_path)
    for run in (*lab["baseline"], *lab["candidate"]):
        rewrite(run, backbone="model", fingerprint="aaaa00001" if "/small/" in run else "bbbb00001")
    assert {name.split("/")[0] for name in compare(lab)["tasks"]} == {"model-aaaa00", "model-bbbb00"}


def test_backbones_of_one_config_are_told_apart_by_their_weights(tmp_path):
    lab, _ = make_labs(tmp_path)
    for run in (*lab["baseline"], *lab["candidate"]):
        rewrite(run, fingerprint="aaaa00001", backbone_sha256="cccc00001" if "/small/" in run else "dddd00001")
    found = compare(lab)
    assert {name.split("/")[0] for name in found["tasks"]} == {"small", "large"} and found["facts"]["backbone_sha256"]["large"] == "dddd00001"
    for run in (*lab["baseline"], *lab["candidate"]):
        rewrite(run, backbone="model")
    assert {name.split("/")[0] for name in compare(lab)["tasks"]} == {"model-aaaa00+cccc00", "model-aaaa00+dddd00"}


def test_backbones_must_have_the_same_seeds_settings_and_items(tmp_path):
    lab, _ = make_labs(tmp_path)
    large = [run for side in lab.values() for run in side if "/large/" in run]
    for run in large:
        rewrite(run, run_seed=json.loads((Path(run) / "results.json").read_text())["run_seed"] + 1, commit="another")
    change(large[0], lambda records: records.pop())
    text = refused(lab)
    assert "expected the same seeds for each backbone, found small 0, 1, 2; large 1, 2, 3" in text and "commit: " in text and "lacks items" in text
    lab["candidate"] = lab["candidate"][:-1]
    assert "large: seed 3: expected one run a side" in refused(lab)


def test_other_backbones_on_the_two_sides_are_refused(tmp_path):
    lab, alone = make_labs(tmp_path)
    assert "fingerprint: " in refused({"baseline": alone["small"]["baseline"], "candidate": alone["large"]["candidate"]})
    assert "fingerprint: " in refused({"baseline": lab["baseline"], "candidate": alone["large"]["candidate"]})


def test_a_worked_example(tmp_path):
    """Two seeds, four items by hand: 1 2 right of 4 become 3 2, flips +3 -1; log-likelihood (-1 + 0) / (10 + 30) tokens a seed."""
    def run(name, seed, right, first):
        rows = [{"task": "code", "id": str(n), "verdicts": {"base": bool(r)}, "correct": bool(r), "reference_logprob": p, "reference_tokens": t}
                for n, (r, p, t) in enumerate(zip(right, (first, -60, None, None), (10, 30, None, None)))]
        return make_run(tmp_path / f"{name}{seed}", rows, seed)

    lab = {"baseline": (run("b", 0, (1, 0, 0, 0), -9), run("b", 1, (1, 1, 0, 0), -9)),
           "candidate": (run("c", 0, (1, 1, 1, 0), -10), run("c", 1, (1, 0, 1, 0), -10))}
    entry = compare(lab)["tasks"]["code"]
    line = entry["rules"]["base"]
    assert (line["baseline"], line["candidate"], line["difference"], line["by_seed"]) == (37.5, 62.5, 25.0, [50.0, 0.0])
    assert (line["gained"], line["lost"], line["mcnemar_p"]) == (3, 1, 2 * (1 + 4) / 16) and (line["seeds_won"], line["seeds_tied"]) == (1, 1)
    reference = entry["reference"]
    assert (reference["n"], reference["size"], reference["seeds_won"], reference["seeds_tied"]) == (2, 40, 0, 0)
    assert (reference["baseline"], reference["candidate"]) == (pytest.approx(-69 / 40), pytest.approx(-70 / 40))
    assert reference["difference"] == pytest.approx(-1 / 40) and -0.1 <= reference["interval95"][0] <= reference["interval95"][1] <= 0


@pytest.mark.parametrize("gained, lost, p", [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (0, 10, 2 / 1024), (8, 2, 0.109375),
                                            (12, 2, 0.012939453125), (15, 6, 0.07835388183593750)])
def test_mcnemar_of_known_examples(gained, lost, p):
    assert evaluation.mcnemar(gained, lost) == evaluation.mcnemar(lost, gained) == p


def test_mcnemar_is_the_share_of_sign_patterns_as_lopsided():
    for gained, lost in product(range(7), range(5)):
        n = gained + lost
        lopsided = sum(abs(2 * sum(signs) - n) >= abs(gained - lost) for signs in product((0, 1), repeat=n))
        assert evaluation.mcnemar(gained, lost) == pytest.approx(lopsided / 2**n, abs=1e-15)


def test_mcnemar_of_thousands_of_pairs():
    for gained, lost in ((5100, 4900), (5400, 4600)):
        z = (gained - lost - 1) / math.sqrt(gained + lost)  # normal, with continuity correction
        assert evaluation.mcnemar(gained, lost) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert evaluation.mcnemar(5000, 5000) == 1 and evaluation.mcnemar(0, 1074) == 2.0**-1073 and evaluation.mcnemar(20000, 3) == 0


def make_grid(draw, seeds, n, seed_sd=4.0, item_sd=30.0, noise=10.0):
    """A Grid of one rule whose difference is 0 + a seed's part + an item's part + noise, and no reference solution."""
    gaps = draw.normal(0, seed_sd, (seeds, 1)) + draw.normal(0, item_sd, (1, n)) + draw.normal(0, noise, (seeds, n))
    values, sizes = np.zeros((2, 2, seeds, n)), np.zeros((2, n))
    values[0, 1], sizes[0] = gaps, 1
    return evaluation.Grid(["rule"], values, sizes, 0)


def test_the_interval_covers_as_often_as_it_says():
    draw, hits = np.random.default_rng(0), 0
    for _ in range(200):
        grid = make_grid(draw, 10, 50)
        part = evaluation.resample(grid, evaluation.draw_counts(draw, 400, 10), draw)[0]
        low, high = evaluation.estimate([part])["interval95"]
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.99, hits  # 184 to 190 expected; items drawn anew for each seed give about 100


def test_the_variance_is_that_of_seeds_plus_items():
    draw = np.random.default_rng(1)
    for seed_sd, item_sd in ((0, 30.0), (10.0, 0)):
        grid = make_grid(draw, 8, 60, seed_sd, item_sd, noise=0)
        part = evaluation.resample(grid, evaluation.draw_counts(draw, 4000, 8), draw)[0]
        gaps = grid.values[0, 1]
        want = gaps.mean(1).var() / 8 + gaps.mean(0).var() / 60
        assert (part[2] / 60).var() == pytest.approx(want, rel=0.1)


def test_resamples_are_drawn_in_chunks_without_a_trace():
    grid = make_grid(np.random.default_rng(2), 3, 31)
    seeds = evaluation.draw_counts(np.random.default_rng(3), 100, 3)
    whole, chunks = (evaluation.resample(grid, seeds, np.random.default_rng(4), cells) for cells in (1 << 20, 31 * 7))
    assert all(np.allclose(a, b, atol=1e-9) for one, other in zip(whole, chunks) for a, b in zip(one, other))
    assert whole[0][2].shape == (100,) and np.all(whole[0][3] == 31)


def test_draws_are_counts_of_draws_with_replacement():
    counts = evaluation.draw_counts(np.random.default_rng(0), 500, 6)
    assert counts.shape == (500, 6) and np.all(counts.sum(1) == 6)
    assert np.allclose(counts.mean(0), 1, atol=0.15) and np.allclose(counts.var(0), 5 / 6, atol=0.2)


def test_the_seed_alone_decides_the_intervals(tmp_path):
    lab = make_lab(tmp_path)
    one, same, other = compare(lab), compare(lab), compare(lab, seed=1)
    assert one == same and one["tasks"]["gsm8k"]["rules"]["flexible"]["interval95"] != other["tasks"]["gsm8k"]["rules"]["flexible"]["interval95"]
    assert one["tasks"]["gsm8k"]["rules"]["flexible"]["difference"] == other["tasks"]["gsm8k"]["rules"]["flexible"]["difference"]


def test_a_tie_is_a_tie_in_rounded_arithmetic_too():
    part = (np.array([[0.3, 0.3], [0.1 + 0.2, 0.4]]), 1, np.zeros(100), np.ones(100), np.array([1, 1]))
    line = evaluation.estimate([part])
    assert line["by_seed"][0] != 0 and (line["seeds_won"], line["seeds_tied"]) == (1, 1)


def test_a_tie_is_no_loss_in_the_count_of_differences():
    line = {"rules": {"base": {"difference": 0.3 - (0.1 + 0.2)}}, "reference": {"difference": -1e-17}}
    assert line["rules"]["base"]["difference"] < 0
    assert evaluation.least_zero({"code": line}) == "differences of at least 0: 1 of 1 in per cent, 1 of 1 in log-likelihood"


def test_no_order_matters(tmp_path):
    """Not that of the runs, nor that of their records; and a task's figures do not depend on the tasks beside it."""
    lab = make_lab(tmp_path)
    want = compare(lab)
    for run in (lab["baseline"][1], lab["candidate"][2]):
        change(run, lambda records: random.Random(0).shuffle(records))
    shuffled = {"baseline": tuple(reversed(lab["baseline"])), "candidate": (*lab["candidate"][1:], lab["candidate"][0])}
    got = compare(shuffled, out=str(tmp_path / "out"))
    assert got["seeds"] == [0, 1, 2] and got["runs"] == want["runs"]
    assert got["tasks"] == want["tasks"] and got["pooled"] == want["pooled"]
    for run in (*lab["baseline"], *lab["candidate"]):
        change(run, lambda records: records.__setitem__(slice(None), [r for r in records if r["task"] == "arc"]))
    alone = compare(lab)
    assert alone["tasks"] == {"arc": want["tasks"]["arc"]}
    assert alone["pooled"]["all items"]["rules"]["first"] == alone["tasks"]["arc"]["rules"]["acc"]


def test_one_seed(tmp_path, capsys):
    lab = make_lab(tmp_path, seeds=(4,))
    result = compare(lab)
    assert result["seeds"] == [4] and "one seed: the intervals hold the variation over items alone" in capsys.readouterr().out
    line, cells = result["tasks"]["gsm8k"]["rules"]["flexible"], slow_cells(lab, "gsm8k", "flexible")
    seeds, items = slow_draws(lab, ["gsm8k"], 200, 0)
    assert seeds == [[0]] * 200
    assert line["interval95"] == pytest.approx(slow_interval([slow_gap(cells, *drawn) for drawn in zip(seeds, items["gsm8k"])]), abs=1e-9)


def test_a_bare_backbone_beside_one_adapter(tmp_path):
    lab = make_lab(tmp_path, seeds=(4,))
    rewrite(lab["baseline"][0], run_seed=None)
    assert compare(lab)["seeds"] == [4]
    rewrite(lab["candidate"][0], run_seed=None)
    assert compare(lab)["seeds"] == [None]


def test_old_records_have_one_rule_and_no_reference(tmp_path):
    lab, new = make_lab(tmp_path / "old"), make_lab(tmp_path / "new")
    for run in (*lab["baseline"], *lab["candidate"]):
        change(run, lambda records: [r.pop(name) for r in records for name in ("verdicts", "sample", "reference_logprob", "reference_tokens")])
    old, want = compare(lab)["tasks"], compare(new)["tasks"]
    for task in SIZES:
        assert old[task]["reference"] is None and old[task]["rules"] == {"score": want[task]["rules"][RULES[task][0]]}


def test_a_reference_that_some_runs_lack_is_left_out_and_said(tmp_path, capsys):
    lab, plain = make_lab(tmp_path / "some"), make_lab(tmp_path / "none")
    change(lab["candidate"][1], lambda records: records[3].update(reference_logprob=None, reference_tokens=None))
    for run in (*plain["baseline"], *plain["candidate"]):
        change(run, lambda records: records[3].update(reference_logprob=None, reference_tokens=None))
    result = compare(lab)
    assert "gsm8k: a reference log-likelihood is missing in some of the runs for 1 items" in capsys.readouterr().out
    assert result["tasks"] == compare(plain)["tasks"] and result["tasks"]["gsm8k"]["reference"]["n"] == SIZES["gsm8k"] - 1
    assert "missing" not in capsys.readouterr().out


def test_a_rule_that_only_some_items_have(tmp_path):
    """As plus tests are there for some of the programs: the others are no part of its n, and no flips."""
    lab, odd = make_lab(tmp_path, samples=2), [f"test-{n}" for n in range(1, 14, 2)]
    for run in (*lab["baseline"], *lab["candidate"]):
        change(run, lambda records: [r["verdicts"].update(plus=len(r["id"]) % 2 == 0 and r["verdicts"]["base"]) for r in records
                                     if r["task"] == "code" and r["id"] in odd])
    result = compare(lab)["tasks"]["code"]["rules"]
    line, whole = result["plus"], result["base"]
    cells = [[{f"test-{n}": (0, 0) for n in range(14)} | {i: None for i in odd} for _ in range(3)] for _ in range(2)]
    for side, name in enumerate(("baseline", "candidate")):
        for s, i in product(range(3), odd):
            verdicts = [r["verdicts"]["plus"] for r in read(lab[name][s]) if r["task"] == "code" and r["id"] == i]
            cells[side][s][i] = (50 * sum(verdicts), 1)
    seeds, items = slow_draws(lab, ["code"], 200, 0)
    assert (line["n"], whole["n"]) == (7, 14) and line["difference"] == pytest.approx(slow_gap(cells, range(3), odd), abs=1e-10)
    assert line["interval95"] == pytest.approx(slow_interval([slow_gap(cells, *drawn) for drawn in zip(seeds, items["code"])]), abs=1e-9)
    assert (line["gained"], line["lost"]) == tuple(sum(sign * (cells[1][s][i][0] - cells[0][s][i][0]) > 0 for s, i in product(range(3), odd))
                                                   for sign in (1, -1))


def test_resamples_without_any_reference_solution_are_left_out(tmp_path):
    lab = make_lab(tmp_path)
    for run in (*lab["baseline"], *lab["candidate"]):  # arc keeps one of nine: a resample holds none with probability 0.35
        change(run, lambda records: [r.update(reference_logprob=None) for r in records if r["task"] == "arc" and r["id"] != "test-4"])
    result = compare(lab)
    line, cells = result["tasks"]["arc"]["reference"], slow_cells(lab, "arc", "reference")
    cells = [[{i: v if i == "test-4" else (0, 0) for i, v in seed.items()} for seed in side] for side in cells]
    seeds, items = slow_draws(lab, ["arc"], 200, 0)
    draws = [slow_gap(cells, *drawn) for drawn in zip(seeds, items["arc"])]
    assert 40 < sum(x != x for x in draws) < 100 and line["interval95"] == pytest.approx(slow_interval(draws), abs=1e-10)
    assert line["n"] == 1 and all(map(math.isfinite, result["pooled"]["mean of tasks"]["reference"]["interval95"]))


# ---------------------------------------------------------------- what cannot be compared


def test_runs_are_found_where_training_left_them(tmp_path):
    lab = make_lab(tmp_path / "plain")
    want = compare(lab)
    nested = {side: tuple(make_run(tmp_path / f"{side}{n}" / place, read(run), n, packed=n == 1).removesuffix(f"/{place}")
                          for (n, run), place in zip(enumerate(lab[side]), ("eval", "eval-adapted", "eval"))) for side in lab}
    got = compare(nested)
    assert got["tasks"] == want["tasks"] and got["runs"][1]["candidate"] == nested["candidate"][1]
    assert (Path(nested["candidate"][0]) / "comparison/comparison.json").exists()
    first = Path(nested["baseline"][0])
    make_run(first / "eval-adapted", [])
    text = refused(nested)
    assert f"{first}: expected" in text and f"found them in {first}/eval-adapted and {first}/eval" in text.replace(
        f"{first}/eval and {first}/eval-adapted", f"{first}/eval-adapted and {first}/eval")
    make_run(tmp_path / "whole", read(lab["baseline"][0]))
    for file in (tmp_path / "whole").iterdir():
        file.rename(first / file.name)
    assert compare(nested)["tasks"] == want["tasks"]  # RUN itself comes first


def test_missing_runs_and_bad_numbers_are_listed_together(tmp_path):
    lab = make_lab(tmp_path / "lab")
    (tmp_path / "empty").mkdir()
    text = refused({**lab, "baseline": (str(tmp_path / "absent"), str(tmp_path / "empty"))}, resamples=7, seed=-1)
    for part in (f"{tmp_path}/absent: expected records.jsonl", f"{tmp_path}/empty: expected", "found them in none",
                 "resamples: expected at least 100, found 7", "seed: expected at least 0, found -1"):
        assert part in text
    assert "baseline runs: expected at least 1, found 0" in refused({**lab, "baseline": ()})


def test_bad_records_are_listed_with_their_lines(tmp_path):
    lab = make_lab(tmp_path)
    file = Path(lab["baseline"][1]) / "records.jsonl"
    good = file.read_text().splitlines()
    whole, rest = json.loads(good[0]), good[1:]
    bad = ["{", "[]", json.dumps(whole | {"id": 7, "task": None}), json.dumps(whole | {"verdicts": {}}), json.dumps(whole | {"verdicts": {"a": 1}}),
           json.dumps({"task": "gsm8k", "id": "q"}), json.dumps(whole | {"reference_logprob": math.nan}),
           json.dumps(whole | {"reference_tokens": -1}), json.dumps(whole | {"sample": True}), rest[0]]
    file.write_text("\n".join([*rest, *bad]) + "\n")
    (Path(lab["candidate"][0]) / "records.jsonl").write_text("")
    (Path(lab["candidate"][2]) / "results.json").write_text('{"settings": {}, "versions": {}, "tasks": {"a": 3}}')
    text = refused(lab)
    parts = ("JSON object", "JSON object", "task None, id 7", "verdicts {}", "verdicts {'a': 1}", "correct absent", "reference_logprob nan",
             "reference_tokens -1", "sample True", "gsm8k/test-1/0 came before")
    for n, part in enumerate(parts, len(rest) + 1):
        assert any(f"{file}:{n}: " in line and part in line for line in text.splitlines()), part
    assert f"{lab['candidate'][0]}/records.jsonl: no records" in text and f"{lab['candidate'][2]}/results.json: expected settings" in text
    for value in ([], {"run_seed": "3"}, {"run_seed": True}, {"settings": None}, {"tasks": []}):
        (Path(lab["candidate"][2]) / "results.json").write_text(json.dumps(RESULTS | value if value else value))
        assert f"{lab['candidate'][2]}/results.json: expected" in refused(lab)


def test_seeds_without_a_partner_are_listed(tmp_path):
    lab = make_lab(tmp_path, seeds=(0, 1, 2, 3))
    rewrite(lab["baseline"][1], run_seed=0)
    rewrite(lab["candidate"][3], run_seed=None)
    b, c = lab["baseline"], lab["candidate"]
    lines = refused(lab).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        f"seed 0: expected one run a side, found {b[0]}, {b[1]} | {c[0]}", f"seed 3: expected one run a side, found {b[3]} | none",
        f"seed 1: expected one run a side, found none | {c[1]}", f"seed not recorded: expected one run a side, found none | {c[3]}"]
    assert "seed 2" in refused({"baseline": b[2:3], "candidate": c[:1]})  # one run a side, of different seeds
    assert "seed not recorded" in refused({"baseline": b[:1], "candidate": (c[0], c[3])})
    rewrite(b[3], run_seed=None)  # several a side: two without a seed need not belong together
    assert f"seed not recorded: expected one run a side, found {b[3]} | {c[3]}" in refused({"baseline": b[2:], "candidate": c[2:]})


def test_items_that_a_run_lacks_are_listed_and_counted(tmp_path):
    lab = make_lab(tmp_path)
    change(lab["candidate"][1], lambda records: records.pop(0))
    change(lab["baseline"][2], lambda records: records.__delitem__(slice(0, SIZES["gsm8k"])))
    _, many, one = refused(lab).splitlines()
    assert many.startswith(f"  {lab['baseline'][2]}: lacks items of other runs, 23: gsm8k/test-0/0, gsm8k/test-1/0, ") and many.endswith(", ...")
    assert many.count("gsm8k/test-") == 10 and one == f"  {lab['candidate'][1]}: lacks items of other runs, 1: gsm8k/test-0/0"


def test_other_rules_and_other_reference_lengths_are_listed(tmp_path):
    lab = make_lab(tmp_path)
    change(lab["candidate"][0], lambda records: [record["verdicts"].update(extra=True) for record in records[:2]])
    change(lab["candidate"][2], lambda records: records[5].update(reference_tokens=9999))
    text = refused(lab)
    assert f"{lab['candidate'][0]}: verdicts by other rules, 2: gsm8k/test-0/0, gsm8k/test-1/0" in text
    assert f"{lab['candidate'][2]}: another reference_tokens, 1: gsm8k/test-5/0" in text


def test_settings_that_differ_are_listed_by_name(tmp_path):
    lab = make_lab(tmp_path)
    b, c = lab["baseline"], lab["candidate"]
    tasks = json.loads(json.dumps(RESULTS["tasks"]))
    tasks["arc"]["data_sha256"] = tasks["code"]["prompt_sha256"] = "other"
    for run in c:
        own = {"out": run, "adapter": run, "backbone": run, "rescore": run}  # may differ
        rewrite(run, dtype="bfloat16", tasks=tasks, settings=RESULTS["settings"] | {"max_new_tokens": 256, "allow_code_execution": True} | own)
    rewrite(c[1], commit="abc-dirty", versions={"torch": "2.0"}, fingerprint="beef", device="cuda", settings=RESULTS["settings"] | {"seed": 9})
    lines = [line.strip() for line in refused(lab).splitlines()[1:]]
    every, two = ", ".join(b), f"{c[0]}, {c[2]}"
    assert f'dtype: "float32" ({every}) | "bfloat16" ({", ".join(c)})' in lines
    assert f"max_new_tokens: 128 ({every}) | 256 ({two}), 128 ({c[1]})" in lines
    assert f"allow_code_execution: absent ({every}) | true ({two}), absent ({c[1]})" in lines
    assert sorted(line.split(":")[0] for line in lines) == ["allow_code_execution", "commit", "data_sha256.arc", "device", "dtype", "fingerprint",
                                                            "max_new_tokens", "prompt_sha256.code", "seed", "torch"]


def test_differences_across_seeds_alone_are_found_and_resolved_values_count(tmp_path):
    lab = make_lab(tmp_path)
    for side in lab.values():  # alike on both sides
        rewrite(side[1], settings=RESULTS["settings"] | {"limit": 5})
        rewrite(side[2], settings=RESULTS["settings"] | {"device": "cpu", "dtype": "float32"})  # what "auto" came to
    lines = refused(lab).splitlines()[1:]
    assert len(lines) == 1 and "limit: 0 (" in lines[0] and "5 (" in lines[0]


def test_weights_and_the_kind_of_device_must_be_the_same(tmp_path, capsys):
    """A GPU's number is no difference, nor how many processes shared the items; old records have no hash of the weights."""
    lab = make_lab(tmp_path)
    for n, run in enumerate((*lab["baseline"], *lab["candidate"])):
        rewrite(run, device="cuda:1" if n % 2 else "cuda", world=1 + n % 2)
    assert compare(lab)["facts"]["device"] == "cuda" and "not recorded" not in capsys.readouterr().out
    for run in lab["candidate"]:
        rewrite(run, backbone_sha256="other", device="cpu")
    lines = [line.strip() for line in refused(lab).splitlines()[1:]]
    assert sorted(line.split(":")[0] for line in lines) == ["backbone_sha256", "device"]
    compare(lab, ignore=("backbone_sha256", "device"))


def test_ignored_settings_pass_and_are_named(tmp_path, capsys):
    lab = make_lab(tmp_path)
    tasks = json.loads(json.dumps(RESULTS["tasks"]))
    tasks["arc"]["data_sha256"] = tasks["code"]["data_sha256"] = "other"
    for run in lab["candidate"]:
        rewrite(run, commit="abc", tasks=tasks, settings=RESULTS["settings"] | {"batch_rows": 1})
    text = refused(lab, ignore=("commit", "data_sha256.arc"))
    assert "batch_rows: 64 (" in text and "data_sha256.code" in text and "commit" not in text and "data_sha256.arc" not in text
    capsys.readouterr()
    compare(lab, ignore=("commit", "batch_rows", "data_sha256", "top_p"))
    said = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("ignored: ")]
    assert sorted(said) == ["batch_rows", "commit", "data_sha256.arc", "data_sha256.code"]
    text = refused(lab, ignore=("comit", "batch-rows"))
    assert "--ignore comit: the nearest name is commit" in text and "--ignore batch-rows: the nearest name is batch_rows" in text


def test_uncommitted_code_and_unrecorded_facts_are_said(tmp_path, capsys):
    lab = make_lab(tmp_path)
    for run in (*lab["baseline"], *lab["candidate"]):
        rewrite(run, commit="abc-dirty", fingerprint=None)
    compare(lab)
    out = capsys.readouterr().out.splitlines()
    assert "warning: scored with uncommitted changes, perhaps not the same ones: abc-dirty" in out
    assert "warning: not recorded, so not compared: fingerprint" in out
    rewrite(lab["candidate"][0], commit="abd-dirty")
    assert "commit: " in refused(lab)


# ---------------------------------------------------------------- table, JSON, picture, command line


def test_the_table_and_the_json(tmp_path, capsys):
    lab = make_lab(tmp_path)
    result = compare(lab, out=str(tmp_path / "out"))
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == "task n baseline % candidate % difference 95 % interval flips McNemar p seeds won".split()
    names = [line[:16].strip() for line in out[1:9]]
    assert names == ["gsm8k flexible", "strict", "arc acc", "acc_norm", "code", "mean of tasks", "all items", ""]
    line = result["tasks"]["gsm8k"]["rules"]["strict"]
    low, high = line["interval95"]
    sides = f"{line['baseline']:.2f} {line['candidate']:.2f}"
    won = f"{line['seeds_won']} of 3" + (f" ({line['seeds_tied']} tied)" if line["seeds_tied"] else "")
    assert " ".join(out[2].split()) == (f"strict 23 {sides} {line['difference']:+.2f} {low:+.2f} to {high:+.2f} "
                                        f"+{line['gained']} -{line['lost']} {line['mcnemar_p']:.3g} {won}")
    assert out[9] == "log-likelihood of the reference solution, nats per token"
    assert [row.split("  ")[0] for row in out[10:15]] == ["task", "gsm8k", "arc", "mean of tasks", "all items"]
    stored = json.loads((tmp_path / "out/comparison.json").read_text())
    assert stored == json.loads(json.dumps(result)) and stored["settings"]["resamples"] == 200 and stored["settings"]["seed"] == 0
    assert stored["runs"] == [{"baseline": b, "candidate": c} for b, c in zip(lab["baseline"], lab["candidate"])]
    facts = stored["facts"]
    assert (facts["commit"], facts["dtype"], facts["data_sha256.arc"]) == ("f21aa75", "float32", "data of arc") and "backbone" not in facts


def test_one_task_has_no_pooled_lines(tmp_path, capsys):
    compare(make_lab(tmp_path, tasks=("code",)))
    out = capsys.readouterr().out
    assert "all items" not in out and "log-likelihood" not in out and "base " not in out


def test_without_matplotlib_everything_but_the_picture(tmp_path, capsys, monkeypatch):
    lab = make_lab(tmp_path)
    folder = Path(lab["candidate"][0]) / "comparison"
    folder.mkdir()
    (folder / "comparison.png").write_bytes(b"of an earlier comparison")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    compare(lab)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {folder}/comparison.json; no picture: matplotlib is not installed"
    assert [file.name for file in folder.iterdir()] == ["comparison.json"]


@pytest.mark.parametrize("tasks", [tuple(SIZES), ("code",)])
def test_the_picture(tmp_path, tasks, capsys):
    pytest.importorskip("matplotlib")
    lab = make_lab(tmp_path, tasks=tasks)
    compare(lab)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {lab['candidate'][0]}/comparison/comparison.json and comparison.png"
    assert (Path(lab["candidate"][0]) / "comparison/comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_line(tmp_path):
    lab = make_lab(tmp_path)
    words = ["compare", "--baseline", *lab["baseline"], "--candidate", *lab["candidate"], "--resamples", "100", "--ignore", "commit,top_p",
             "--out", "both"]

    def python(*words):
        return subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "eval.py"), *words], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    done = python(*words)
    assert done.returncode == 0 and done.stdout.startswith("task ") and (tmp_path / "both/comparison.json").exists()
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
    done = python(*words, "--seed", "-1")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "  seed: expected at least 0, found -1" and "Traceback" not in done.stderr
    shown = python("compare", "--help").stdout
    assert [name for name in evaluation.CompareSettings.__dataclass_fields__ if f"--{name}" not in shown] == []
