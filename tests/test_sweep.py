"""experiments/sweep.py: sweeps of two steps of a random two-layer backbone on embedded rows."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import common
import pytest
import talan
import train
from experiments import compare, sweep
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHORT = "--rank 4 --slots 2 --width 8 --step-tokens 512 --dev-rows 8 --steps 2 --save-every 1"
SHORT += " --eval-every 0 --log-every 0 --device cpu --seeds 0-1"
SIDES = ("baseline", "candidate", "control", "mixer=mlp&memory=gate")
FULL = "--lrs 1e-2,1e29,1e-3 --control rank --vary mixer=mlp&memory=gate"  # at 1e29 the loss is nan
KILLED = """if True:
    import os, sys; sys.path.insert(0, sys.argv[1])
    import common, train; from experiments import sweep; write = train.Metrics.write
    def stop(self, **values):
        write(self, **values)
        if "seed-1/candidate" in str(self.file) and values["step"] == 2: os.kill(os.getpid(), 9)
    train.Metrics.write = stop
    common.run_script(sweep.main, sweep.Settings, "sweep", sys.argv[2:])"""


@pytest.fixture(scope="module")
def base(tiny_checkpoint, tmp_path_factory):
    """Flags of a backbone, 62 embedded rows and a task of eight items."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_checkpoint("qwen3", **SMALL), folder / "model")
    for file in (ROOT / "data/tiny/model").glob("*token*.json"):
        shutil.copy(file, folder / "model")
    lines = (ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[::130]))
    item = {"choices": ["one", "two"], "answer": "A"}
    items = [json.dumps(item | {"prompt": f"{n} + 1"}) + "\n" for n in range(8)]
    (folder / "sums.jsonl").write_text("".join(items))
    flags = f"--backbone {folder}/model --data {folder}/rows.jsonl --tasks {folder}/sums.jsonl"
    return [*flags.split(), *SHORT.split()]


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "done"
    words = [sys.executable, "-m", "experiments.sweep", *base, "--out", str(out), *FULL.split()]
    return out, subprocess.check_output(words, text=True, cwd=ROOT)


@pytest.fixture
def trained(monkeypatch):
    found, main = [], train.main

    def record(overrides, in_sweep):
        found.append("/".join(Path(overrides["out"]).parts[-2:]))
        main(overrides, in_sweep)

    monkeypatch.setattr(train, "main", record)
    return found


def go(base, out, more=""):
    words = [*base, "--out", str(out), *more.split()]
    common.run_script(sweep.main, sweep.Settings, "sweep", words)
    return out


def metrics(run):
    return [json.loads(line) for _, line in common.read_lines(run / "metrics.jsonl")]


def weights(run):
    files = talan.checkpoint_folder(run).glob("*.safetensors")
    return {(f.name, k): v.tolist() for f in files for k, v in load_file(f).items()}


def test_layout_settings_and_rates(done):
    """Each side takes the rate with its lowest held-out loss on the first seed."""
    out, text = done
    header, _ = compare.read_sweep(out / "records.jsonl.gz")
    runs = {run.relative_to(out).as_posix() for run in out.glob("seed-*/*")}
    settings = []
    for side in SIDES:
        found, taken = header["rates"][side], header["sides"][side]["lr"]
        losses = [metrics(out / f"seed-0/{side}@{rate}")[-1]["loss"] for rate in (0.001, 0.01)]
        assert found["lr"] == [0.001, 0.01, 1e29]
        assert found["held_out_loss"] == [*losses, math.inf] and f"{min(losses):.5f}*" in text
        assert taken == [found["lr"][losses.index(min(losses))]] * 2
        runs -= {f"seed-0/{side}@{rate}" for rate in found["lr"]} | {f"seed-1/{side}@{taken[0]}"}
        settings.append(common.read_json(out / f"seed-1/{side}@{taken[0]}/settings.json"))
        files = (out / f"seed-1/{side}@{taken[0]}").glob("step-*/talan.safetensors")
        names = " ".join(name for file in files for name in load_file(file))
        assert (".extra" in names) == ("memory=" in side)  # trained with the memory it names
    assert not runs and f"{out}/seed-0/control@1e+29: step " in text
    a, b, c, d = [found | {"out": "", "lr": 0} for found in settings]
    assert (b["seed"], b["talan"], b["rank"], b["mixer"]) == (1, True, 4, "linear")
    assert a == b | {"talan": False} and d == b | {"mixer": "mlp"} and c == a | {"rank": 5}


def test_a_pair_differs_by_the_side_path_alone(base, tmp_path):
    """Until the side path has learnt something the two do the same, bit for bit."""
    run, alone = tmp_path / "out/seed-1/candidate", tmp_path / "alone"
    go(base, tmp_path / "out", "--seeds 1 --steps 3")
    a, b = metrics(run.with_name("baseline")), metrics(run)
    assert [line["loss"] for line in a[1:3]] == [line["loss"] for line in b[1:3]]
    assert a[4]["loss"] != b[4]["loss"]
    settings = common.read_json(run / "settings.json") | {"out": str(alone)}
    train.main({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}, True)
    assert weights(alone) == weights(run)


def test_the_best_rate(tmp_path):
    rates = {"a": {"lr": [0.1, 0.2, 0.3], "held_out_loss": [math.inf, 1.0, 1.0]}}
    shown = sweep.rate_table(rates).split("\n")
    assert len(shown) == 2 and shown[1].split() == ["a", "inf", "1.00000*", "1.00000"]
    rates["b"] = {"lr": [0.1, 0.2, 0.3], "held_out_loss": [1.0, 2.0, 2.0]}
    assert "at an end of the grid: b;" in sweep.rate_table(rates)
    begin = {"step": 0, "steps": 1, "trainable": 1, "settings": {"lr": 1, "rank": 1}}
    lines = [begin, {"kind": "dev", "step": 1, "loss": math.nan}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sweep.add_run(rates, tmp_path)
    assert rates["held_out_loss"] == [math.inf]


def test_records_hold_what_the_runs_scored(done, tmp_path, capsys):
    """Verdicts as they are, log-likelihoods to 1e-5; the project's folder is in no path."""
    out, text = done
    header, sides = compare.read_sweep(out / "records.jsonl.gz")
    for side, seed in [(side, seed) for side in SIDES for seed in (0, 1)]:
        run = out / f"seed-{seed}/{side}@{header['sides'][side]['lr'][0]}"
        found, want = sides[side][seed], compare.read_runs(str(run))[0]
        assert (found.seed, found.sizes, found.conditions) == (seed, want.sizes, want.conditions)
        for key, values in want.values.items():
            for name, value in values.items():
                assert abs(found.values[key][name] - value) < 5.1e-6
        tokens = sum(line.get("tokens", 0) for line in metrics(run))
        assert header["sides"][side]["tokens"][seed] == tokens
    for other, side in (("baseline", "candidate"), ("control", SIDES[3])):
        result = compare.compare_runs(sides[other], sides[side], compare.Settings())
        assert f"\n{side} against {other}\n{compare.comparison_table(result)}\n" in text
    header["settings"]["backbone"] = f"{ROOT}/some/model"
    header["sides"]["baseline"]["lr"], found = [0.01, 0.01], header["rates"]["baseline"]
    found["seconds"] = [45, 600, 75]  # at 1e-3, 1e-2 and 1e29
    for name in ("a", "b"):
        sweep.write_records(tmp_path / f"{name}.jsonl.gz", header, sides)
    assert compare.read_runs(f"{tmp_path}/?.jsonl.gz:control")[3].backbone == "some/model"
    sweep.main({"show": str(tmp_path)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:9]] == [[n, s] for n in "ab" for s in SIDES]
    assert lines[1].split()[2:5:2] == ["2", "2"] and lines[1].split()[8] == "2.0"
    assert {"a: first seed, by learning rate, * taken", "b: against its controls"} < {*lines}


def test_what_is_finished_is_reused(base, done, tmp_path, trained, monkeypatch):
    copy = shutil.copytree(done[0], tmp_path / "copy")
    before = {file: file.read_bytes() for file in done[0].rglob("*.*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.delattr(sweep, "score")
        go(base, done[0], FULL)
    assert trained == [f"seed-0/{side}@1e+29" for side in SIDES]
    assert before == {file: file.read_bytes() for file in done[0].rglob("*.*") if file.is_file()}
    go(base, copy, f"{FULL} --seeds 0,4")
    assert [run.split("@")[0] for run in trained[8:]] == [f"seed-4/{side}" for side in SIDES]
    runs = compare.read_sweep(copy / "records.jsonl.gz")[1]["control"]
    assert [run.seed for run in runs] == [0, 4]


def test_a_killed_sweep_ends_as_if_it_had_not_been(base, tmp_path):
    """kill -9 in the middle of the last run, then the same command."""
    outs = tmp_path / "killed", tmp_path / "whole"
    words = [sys.executable, "-c", KILLED, str(ROOT), *base, "--out", str(outs[0])]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    assert (outs[0] / "seed-1/candidate/step-0000001").is_dir()
    a, b = [compare.read_sweep(go(base, out) / "records.jsonl.gz")[1] for out in outs]
    for seed, side in ((0, "baseline"), (1, "baseline"), (1, "candidate")):
        assert a[side][seed].values == b[side][seed].values
        assert weights(outs[0] / f"seed-{seed}/{side}") == weights(outs[1] / f"seed-{seed}/{side}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("scoring", [True, False])
def test_an_interrupt_ends_the_sweep_with_130(base, tmp_path, monkeypatch, number, scoring):
    out, write = tmp_path / "out", train.Metrics.write

    def interrupt(self, **values):
        write(self, **values)
        if values["kind"] == "step" and "candidate" in str(self.file):
            signal.raise_signal(number)

    monkeypatch.setattr(train.Metrics, "write", interrupt)
    if scoring:
        monkeypatch.setattr(sweep, "score", lambda settings: signal.raise_signal(number))
    with pytest.raises(SystemExit) as end:
        go(base, out, "--steps 3 --seeds 0")
    assert end.value.code == 130 and not (out / "records.jsonl.gz").exists()
    found = sorted(run.name for run in out.glob("seed-0/*/step-*"))
    assert found == ([] if scoring else ["step-0000001", "step-0000003"])


def test_other_settings_and_commits_are_refused_at_first(base, done, tmp_path, trained):
    copy = shutil.copytree(done[0], tmp_path / "copy")
    run = next(copy.glob("seed-1/candidate@*"))
    want = common.read_json(run / "settings.json")
    (run / "settings.json").write_text(json.dumps(want | {"width": 4, "warmup": 0.5}))
    with pytest.raises(SystemExit, match="seed-1/candidate@(?=.*width 4)(?=.*warmup 0.5)"):
        go(base, copy, FULL)
    go(base, copy, f"{FULL} --overwrite")
    assert [run for run in trained if "1e+29" not in run] == [f"seed-1/{run.name}"]
    assert common.read_json(run / "settings.json") == want | {"out": str(run)}
    file = run / "eval-adapted/results.json"
    results = common.read_json(file)
    results["conditions"]["commit"] = "other"
    file.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="commit: .*other"):
        go(base, copy, FULL)
    go(base, copy, f"{FULL} --ignore commit --records {copy}/kept.gz")
    (note,) = compare.read_sweep(copy / "kept.gz")[0]["notes"]
    assert note.startswith("ignored: commit: ") and "other" in note


REFUSED = """--seed 3: instead of --seed; --no-talan: --talan; --control width: none or rank
--adapter none: scope; --scope talan: scope; --tasks none: none; --seeds 1-x: invalid literal
--lrs fast,1: could not convert; --lrs 1,-1: lr; --vary mixer=rnn: rnn; --vary slot=3: --slot
--vary slots=x: int; --vary slots: argument; --vary seed=3: expected flags of adapter, alpha
--vary layers=0+7: layers; --rank 31 --control rank --width 64: rank"""


@pytest.mark.parametrize("case", REFUSED.replace("\n", "; ").split("; "))
def test_flags_that_are_refused_before_anything_is_trained(base, tmp_path, case):
    words, message = case.split(": ")
    with pytest.raises(SystemExit, match=message):
        go(base, tmp_path / "out", words)
    assert not list(tmp_path.glob("out/seed-*/*/step-*"))


def test_seeds_and_variations():
    assert sweep.parse_seeds(("8", "0-2", "1", "4-4")) == [8, 0, 1, 2, 4]
    parse = sweep.parse_variation
    assert parse("layers=0+1&slots=4") == {"layers": ("0", "1"), "slots": 4}
    assert parse("no-talan&targets=q+k") == {"talan": False, "targets": ("q", "k")}
    assert parse("talan_lr_scale=0.3&adapter=dora") == {"talan_lr_scale": 0.3, "adapter": "dora"}


CONTROLS = ["--adapter dora --width 16", "--adapter rslora --targets q_proj,v_proj --rank 1"]
CONTROLS += ["--scope full --mixer mlp", "--scope writeback --layers 0,1"]


@pytest.mark.parametrize("words", CONTROLS)
def test_the_control_has_the_smallest_rank_with_as_many_parameters(base, words):
    parsed = common.parse_cli(sweep.Settings, "", [*base, "--control", "rank", *words.split()])
    sides = sweep.make_sides(sweep.Settings(**parsed))
    control, wanted = sides["control"], sweep.count_trainable(sides["candidate"])
    smaller = sweep.count_trainable(replace(control, rank=control.rank - 1))
    assert smaller < wanted <= sweep.count_trainable(control)
    assert control == replace(sides["baseline"], rank=control.rank)
