"""train.py --paired: what is trained and where it lies, that pairs differ by the side path alone, reuse, resuming, rates, the control."""

import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval as evaluation  # noqa: E402
import test_train  # noqa: E402
import train  # noqa: E402
from data import keep, sweep  # noqa: E402
from data.ranks import Ranks  # noqa: E402

tiny, signals, contents, metrics, start = test_train.tiny, test_train.signals, test_train.contents, test_train.metrics, test_train.start
SWEEP = {"paired": True, "seeds": ("0-1",), "steps": 3, "save_every": 2, "eval_every": 0}
SIDES = ("baseline", "candidate", "control")


@pytest.fixture(scope="module")
def items(tiny):
    """A task of three embedded items."""
    lines = (ROOT / "data/tiny/test/math.jsonl").read_text().splitlines(keepends=True)
    (tiny.folder / "sums.jsonl").write_text("".join(lines[:3]))
    return str(tiny.folder / "sums.jsonl")


@pytest.fixture
def go(tiny, items, monkeypatch):
    """Do a sweep, drawing no picture; returns its folder."""
    monkeypatch.setattr(evaluation, "draw_comparison", lambda result, file: False)

    def run(out, **changes):
        return start(tiny, out, **SWEEP | {"tasks": (items,)} | changes)

    return run


@pytest.fixture(scope="module")
def done(tiny, items, tmp_path_factory):
    """Two seeds, three sides, in one go."""
    return start(tiny, tmp_path_factory.mktemp("sweep") / "done", **SWEEP, tasks=(items,), paired_control="rank")


@pytest.fixture
def copy(done, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


def stored(file):
    return json.loads(Path(file).read_text())


def refused(go, out, **changes):
    """What the error says, and that the folder is as it was."""
    before = contents(out)
    with pytest.raises(ValueError) as caught:
        go(out, **changes)
    assert contents(out) == before
    return str(caught.value)


def count_trainings(monkeypatch):
    """The run folders that a training loop was started in."""
    found, loop = [], train.train
    monkeypatch.setattr(train, "train", lambda settings, run, *rest: found.append("/".join(run.parts[-2:])) or loop(settings, run, *rest))
    return found


# ---------------------------------------------------------------- what is there at the end


def test_layout(done):
    assert {p.name for p in done.iterdir()} - {"comparison.png", "comparison-control.png"} == {
        "sweep.json", "base", "seed-0", "seed-1", "comparison.json", "comparison-control.json"}
    assert {p.name for p in (done / "base").iterdir()} == {"records.jsonl", "results.json"}
    ordinary = {"settings.json", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors", "train_state.json", "train_state.safetensors",
                "eval-adapted"}
    for seed in (0, 1):
        assert {p.name for p in (done / f"seed-{seed}").iterdir()} == set(SIDES)
        for side in SIDES:
            extra = {"talan_config.json", "talan.safetensors"} if side == "candidate" else set()
            assert {p.name for p in (done / f"seed-{seed}" / side).iterdir()} == ordinary | extra
    told = stored(done / "sweep.json")
    assert told["settings"]["seeds"] == ["0-1"] and told["settings"]["paired_control"] == "rank" and len(told["settings_sha256"]) == 64
    assert set(told["runs"]) == {f"seed-{seed}/{side}" for seed in (0, 1) for side in SIDES} and len(set(told["runs"].values())) == 6
    for run, digest in told["runs"].items():
        assert digest == sweep.settings_hash(train.restore(stored(done / run / "settings.json"), run))


def test_pictures(done):
    pytest.importorskip("matplotlib")
    assert all((done / name).read_bytes().startswith(b"\x89PNG") for name in ("comparison.png", "comparison-control.png"))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_pair_differs_by_the_side_path_alone(done, seed):
    """Settings, files, row order and starts: until the side path has learnt something the two do the same, bit for bit."""
    one, two, three = (done / f"seed-{seed}" / side for side in SIDES)
    a, b, c = (stored(run / "settings.json") | {"out": ""} for run in (one, two, three))
    assert a["seed"] == seed and b == a | {"talan": True} and not a["talan"] and c == a | {"rank": 5} and a["rank"] == 4
    assert all(a[name] == train.Settings.__dataclass_fields__[name].default or a[name] == [] for name in sweep.OWN)
    first, second = metrics(one), metrics(two)
    for kind in ("data_sha256", "backbone_sha256", "fingerprint", "commit", "steps"):
        assert first[0][kind] == second[0][kind]
    assert [line["loss"] for line in first[1:3]] == [line["loss"] for line in second[1:3]]  # held out at step 0, then step 1
    assert [line["loss"] for line in first[3:]] != [line["loss"] for line in second[3:]]
    assert [line.get("supervised") for line in first] == [line.get("supervised") for line in second]
    asked = [[(r["id"], r["prompt"]) for r in map(json.loads, (run / "eval-adapted/records.jsonl").read_text().splitlines())] for run in (one, two)]
    assert asked[0] == asked[1] and len(asked[0]) == 3


def test_both_sides_see_the_same_rows_in_the_same_order(go, tmp_path, monkeypatch):
    caught = test_train.record(monkeypatch)
    go(tmp_path / "out", seeds=("7",))
    half = len(caught.batches) // 2
    assert half == 3 and caught.batches[:half] == caught.batches[half:]


def test_runs_equal_those_of_single_commands(tiny, done, tmp_path):
    for side, changes in (("baseline", {"talan": False}), ("candidate", {}), ("control", {"talan": False, "rank": 5})):
        alone = start(tiny, tmp_path / side, seed=1, **{k: SWEEP[k] for k in ("steps", "save_every", "eval_every")}, **changes)
        run = done / "seed-1" / side
        test_train.assert_same_weights(run, alone, [p.name for p in alone.glob("*.safetensors")])
        assert metrics(run)[1:] == metrics(alone)[1:]


@pytest.mark.parametrize("other, name", [("baseline", "comparison"), ("control", "comparison-control")])
def test_the_comparison_is_that_of_eval_compare(done, tmp_path, monkeypatch, other, name):
    monkeypatch.setattr(evaluation, "draw_comparison", lambda result, file: False)
    runs = [tuple(str(done / f"seed-{seed}" / side) for seed in (0, 1)) for side in (other, "candidate")]
    by_hand, found = evaluation.compare(evaluation.CompareSettings(*runs, out=str(tmp_path))), stored(done / f"{name}.json")
    assert all(found[part] == by_hand[part] for part in ("tasks", "pooled", "seeds", "facts"))
    assert found["tasks"]["sums"]["reference"]["difference"] != 0 and found["seeds"] == [0, 1]
    assert [tuple(str(Path(pair[key]).parent) for pair in found["runs"]) for key in ("baseline", "candidate")] == runs


def test_the_backbone_is_scored_once(go, tmp_path, monkeypatch):
    scored, score = [], sweep.score
    monkeypatch.setattr(sweep, "score", lambda settings: scored.append(settings.adapter) or score(settings))
    monkeypatch.setattr(train, "score", lambda settings: pytest.fail("train.py scored a run of a sweep"))
    out = go(tmp_path / "out", steps=1, seeds=("0", "2"))
    assert scored == ["", *(str(out / f"seed-{seed}" / side) for seed in (0, 2) for side in SIDES[:2])]
    assert stored(out / "base/results.json")["adapter_sha256"] is None


def test_without_out_it_takes_the_next_free_folder(go, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/1").mkdir(parents=True)
    go("", seeds=("4",), steps=1)
    assert (tmp_path / "runs/2/seed-4/candidate/train_state.json").exists() and not list((tmp_path / "runs/1").iterdir())


def test_scope_writeback_has_the_adapter_alone_as_baseline():
    sides = sweep.sides_of(train.Settings(scope="writeback", rank=4))
    assert (sides["baseline"].scope, sides["candidate"].scope, sides["baseline"].talan) == ("joint", "writeback", False)


# ---------------------------------------------------------------- the same again


def test_what_is_finished_is_reused(go, done, monkeypatch, capsys):
    found, before = count_trainings(monkeypatch), contents(done)
    monkeypatch.setattr(sweep, "score", lambda settings: pytest.fail("scored again"))
    go(done, paired_control="rank")
    after = contents(done)
    assert found == [] and capsys.readouterr().out.count("reused") == 7
    assert {name for name in after if after[name] != before[name]} == set()


def test_more_seeds_train_only_what_is_new(go, copy, monkeypatch):
    found, before = count_trainings(monkeypatch), contents(copy / "seed-1")
    go(copy, seeds=("1", "5"))
    assert found == ["seed-5/baseline", "seed-5/candidate"] and contents(copy / "seed-1") == before
    assert stored(copy / "comparison.json")["seeds"] == [1, 5]


def test_a_run_without_scores_is_only_scored(go, copy, monkeypatch):
    before = contents(copy / "seed-0/candidate/eval-adapted")
    shutil.rmtree(copy / "seed-0/candidate/eval-adapted")
    found = count_trainings(monkeypatch)
    go(copy)
    records = Path("records.jsonl")
    assert found == [] and contents(copy / "seed-0/candidate/eval-adapted")[records] == before[records]


def assert_equal_sweeps(a, b):
    """Weights, moments, metrics and the comparison bit-equal."""
    for run in (f"seed-{seed}/{side}" for seed in (0, 1) for side in SIDES[:2]):
        test_train.assert_same_weights(a / run, b / run, [p.name for p in (b / run).glob("*.safetensors")])
        assert metrics(a / run) == metrics(b / run) and not list((a / run).glob("step-*"))
    one, two = stored(a / "comparison.json"), stored(b / "comparison.json")
    assert one["tasks"] == two["tasks"] and one["pooled"] == two["pooled"]


DRIVER = test_train.DRIVER.replace('values["step"] == 5', 'values["step"] == 3 and "seed-1/candidate" in str(self.file)')


def test_a_killed_sweep_goes_on_to_the_same_result(tiny, items, done, tmp_path):
    """kill -9 in the middle of the last run, then the same command in a process of its own."""
    out = tmp_path / "out"
    words = test_train.command(test_train.flags(tiny, out, **SWEEP, tasks=(items,)))
    killed = test_train.python("-c", DRIVER, str(ROOT), "SIGKILL", *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "seed-1/candidate/step-0000002").is_dir() and not (out / "comparison.json").exists()
    again = test_train.python(str(ROOT / "train.py"), *words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") == 4 and "seed-1/candidate: goes on" in again.stdout
    assert_equal_sweeps(out, done)


@pytest.mark.parametrize("name, step", [("SIGINT", 2), ("SIGTERM", 3)])  # 3: its last, so that training is finished all the same
def test_one_interrupt_ends_the_sweep_with_130(go, done, tmp_path, monkeypatch, name, step):
    out, write, before = tmp_path / "out", train.Metrics.write, signal.getsignal(signal.SIGTERM)

    def write_and_ask(self, **values):
        write(self, **values)
        if "seed-0/candidate" in str(self.file) and (values["kind"], values["step"]) == ("step", step):
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train.Metrics, "write", write_and_ask)
        go(out)
    assert end.value.code == 130 and not (out / "seed-1").exists() and not (out / "seed-0/candidate/eval-adapted").exists()
    assert sweep.trained(out / "seed-0/candidate") == (step == 3) and signal.getsignal(signal.SIGTERM) is before
    assert_equal_sweeps(go(out), done)


def test_sigterm_while_scoring_ends_with_130_too(go, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "score", lambda settings: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        go(tmp_path / "out")
    assert end.value.code == 130


# ---------------------------------------------------------------- what is refused


def test_other_settings_are_refused_with_every_difference(go, done):
    message = refused(go, done, width=4, lr=0.5)
    for seed in (0, 1):
        for side in SIDES[:2]:
            assert f"{done}/seed-{seed}/{side}: lr: this command says 0.5, the run has 0.001" in message
            assert f"{done}/seed-{seed}/{side}: width: this command says 4, the run has 8" in message
    assert message.count("the run has") == 8 and "--overwrite" in message


def test_overwrite_deletes_only_runs_with_other_settings(go, copy, monkeypatch):
    file = copy / "seed-0/candidate/settings.json"
    file.write_text(json.dumps(stored(file) | {"width": 4}))
    assert "seed-0/candidate: width" in refused(go, copy)
    found = count_trainings(monkeypatch)
    go(copy, overwrite=True)
    assert found == ["seed-0/candidate"] and stored(file)["width"] == 8 and not stored(file)["overwrite"]


def test_a_folder_with_something_else_is_refused(go, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/settings.json").write_text("{}")
    assert "holds no sweep" in refused(go, tmp_path / "other")
    assert "holds no sweep" in refused(go, tmp_path / "other", overwrite=True)


def test_a_run_of_another_commit_gets_the_message_of_compare(go, copy):
    file = copy / "seed-1/baseline/eval-adapted/results.json"
    file.write_text(json.dumps(stored(file) | {"commit": "0123456789ab"}))
    with pytest.raises(ValueError, match=r"(?s)compare: these runs cannot be compared.*commit: .*0123456789ab"):
        go(copy)


def test_a_run_from_other_data_is_refused(go, copy):
    file = copy / "seed-1/candidate/metrics.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["data_sha256"] = dict.fromkeys(row["data_sha256"], "0" * 64)
    file.write_text(json.dumps(row) + "\n" + "".join(rest))
    with pytest.raises(ValueError, match=r"(?s)seed-1/candidate: its files are not those.*data: .*rows.jsonl: recorded 0{64}"):
        go(copy)


RATES = {"seeds": ("0",), "lrs": ("1e-3", "2e-3"), "steps": 1}


def test_a_sweep_of_rates_that_is_refused_or_stopped_loses_nothing(go, tmp_path, monkeypatch):
    out = go(tmp_path / "out", **RATES)
    assert stored(out / "sweep.json")["held_out_losses"]
    message = refused(go, out, **RATES, width=4)
    assert f"{out}/lr-0.001/candidate: width: this command says 4, the run has 8" in message
    before = contents(out)
    monkeypatch.setattr(sweep, "score_base", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        go(out, **RATES)
    assert contents(out) == before


def test_of_two_sweeps_without_out_the_slower_is_refused(go, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "check_runs", lambda *_: Path("runs/1").mkdir(parents=True))  # the other one, just now
    with pytest.raises(FileExistsError):
        go("")
    assert not list(Path("runs/1").iterdir())


def test_the_backbone_is_scored_by_deterministic_algorithms_too(go, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(sweep, "score", lambda settings: sys.exit(7 + torch.are_deterministic_algorithms_enabled()))
    try:
        with pytest.raises(SystemExit) as end:
            go(tmp_path / "out", deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert end.value.code == 8


@pytest.mark.parametrize("changes, message", [
    ({"paired": False}, "--seeds, --lrs, --paired-control and --vary go with --paired"), ({"seed": 3}, "--seed: --seeds names them"),
    ({"lr": 0.1, "lrs": ("0.1", "0.2")}, "--lr: --lrs tries several"), ({"talan": False}, "--no-talan"), ({"adapter": "none"}, "--adapter none"),
    ({"scope": "talan"}, "--scope talan"), ({"tasks": ("none",)}, "--tasks none"), ({"dry_run": True}, "--dry-run"),
    ({"paired_control": "width"}, "expected none or rank, found 'width'"), ({"seeds": ()}, "--seeds: expected .* found none"),
    ({"seeds": ("3-1", "x", "4")}, "--seeds: expected .* found 3-1, x$"), ({"seeds": ("0-2", "1", "2")}, "each once, found 1, 2 more often"),
    ({"lrs": ("0.1",)}, "--lrs: expected at least two .* found 0.1"), ({"lrs": ("0.1", "fast")}, "--lrs: .* found 0.1, fast"),
    ({"lrs": ("0.1", "1e-1", "2")}, "--lrs: .*different"), ({"lrs": ("0.1", "0.1000000001", "2")}, "--lrs: .*different in their first six digits"),
    ({"resume": True}, "--resume: the same command without it goes on"), ({"lrs": ("0.1", "-1")}, "--lrs: .*above 0"),
    ({"rank": 14, "width": 64, "paired_control": "rank"}, "rank .* is larger than"), ({"repeat": "x"}, "leave out .*--paired"),
])
def test_flags_that_are_refused(go, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_several_wrong_flags_are_all_named(go, tmp_path):
    with pytest.raises(ValueError) as caught:
        go(tmp_path / "out", seed=1, talan=False)
    assert "--seed:" in str(caught.value) and "--no-talan:" in str(caught.value)


def test_seeds_without_paired_on_the_command_line():
    ended = test_train.python(str(ROOT / "train.py"), "--seeds", "0-1")
    assert ended.returncode == 1 and ended.stderr.startswith("train.py: these flags do not go together") and "Traceback" not in ended.stderr


@pytest.mark.parametrize("words, seeds", [(("0-6",), list(range(7))), (("0", "1", "5"), [0, 1, 5]), (("8", "2-3"), [8, 2, 3]), (("4-4",), [4])])
def test_seeds(words, seeds):
    assert sweep.parse_seeds(words) == seeds


# ---------------------------------------------------------------- variations

VARIED = ("mixer=mlp", "layers=0+1", "scope=talan", "talan_lr_scale=3")


@pytest.fixture(scope="module")
def varied(tiny, items, tmp_path_factory):
    return start(tiny, tmp_path_factory.mktemp("varied") / "done", **SWEEP, tasks=(items,), vary=VARIED)


def test_a_variation_is_the_candidate_with_one_setting_changed(varied, done):
    settings = lambda run: {k: v for k, v in stored(run / "settings.json").items() if k != "out"}
    want = ({"mixer": "mlp"}, {"layers": ["0", "1"]}, {"scope": "talan"}, {"talan_lr_scale": 3.0})
    for seed in (0, 1):
        candidate = settings(varied / f"seed-{seed}/candidate")
        for word, changes in zip(VARIED, want):
            assert settings(varied / f"seed-{seed}" / word) == candidate | changes
        assert candidate == settings(done / f"seed-{seed}/candidate") and candidate["vary"] == []
    assert list(stored(varied / "sweep.json")["sides"]) == ["baseline", "candidate", *VARIED]


def test_each_variation_is_compared_with_the_baseline(varied, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "draw_comparison", lambda result, file: False)
    together = stored(varied / "variations.json")["tasks"]
    assert list(together) == ["candidate", *VARIED]
    for word in VARIED:
        runs = [tuple(str(varied / f"seed-{seed}" / side) for seed in (0, 1)) for side in ("baseline", word)]
        by_hand = evaluation.compare(evaluation.CompareSettings(*runs, out=str(tmp_path)))
        assert stored(varied / f"comparison-{word}.json")["tasks"] == by_hand["tasks"] and together[word] == by_hand["tasks"]["sums"]
    assert together["candidate"] == stored(varied / "comparison.json")["tasks"]["sums"]
    assert len({json.dumps(entry["reference"]) for entry in together.values()}) == 5  # no two points are one run


def test_several_tasks_are_shown_by_their_mean(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "draw_comparison", lambda result, file: False)
    line = lambda x: {"rules": {"score": {"n": 1, "baseline": 1.0, "candidate": 1.0 + x, "difference": x, "interval95": [x, x], "seeds_won": 1,
                                          "seeds_tied": 0}}, "reference": None}
    two = {"tasks": {"a": line(1), "b": line(2)}, "pooled": {"mean of tasks": line(1.5), "all items": line(9)}, "seeds": [0]}
    sweep.overview(tmp_path, {"candidate": two, "slots=2": {**two, "tasks": {"a": line(4)}}})
    assert {name: entry["rules"]["score"]["difference"] for name, entry in stored(tmp_path / "variations.json")["tasks"].items()} == {
        "candidate": 1.5, "slots=2": 4}
    assert "candidate" in capsys.readouterr().out


@pytest.mark.parametrize("words, messages", [
    (("mixer=rnn", "slot=3", "slots", "slots=x"), ("'mixer=rnn': .*linear, mlp, attention", "did you mean slots", "'slots': .*", "'slots=x': ")),
    (("slots=2", "slots=2"), ("'slots=2' comes twice",)), (("slots=0",), ("slots: expected an integer of at least 1",)),
    (("rank=2",), ("expected AXIS=VALUE with an axis of layers, site",)), (("layers=0.5+x",), ("layers",)), (("layers=0+7",), ("layers",)),
    (("scope=all",), ("joint, adapter, talan",)), (("talan_lr_scale=-1",), ("talan-lr-scale",)), (("grad_scale=nan",), ("grad_scale",))])
def test_variations_that_are_refused(go, tmp_path, words, messages):
    for message in messages:
        with pytest.raises(ValueError, match="(?s)" + message):
            go(tmp_path / "out", vary=words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- how runs of a sweep are scored


def test_limit_and_permission_reach_every_scoring(tiny, items, tmp_path):
    out = start(tiny, tmp_path / "out", **SWEEP | {"seeds": ("0",), "steps": 1}, tasks=(items,), limit=2, allow_code_execution=True)
    for folder in (out / "base", out / "seed-0/baseline/eval-adapted", out / "seed-0/candidate/eval-adapted"):
        results = stored(folder / "results.json")
        assert results["settings"]["limit"] == 2 and results["settings"]["allow_code_execution"] and results["tasks"]["sums"]["n"] == 2


@pytest.mark.parametrize("changes", [SWEEP, {"steps": 1}], ids=["sweep", "run"])
def test_code_tasks_without_permission_are_refused_before_training(tiny, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *rest: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match="mbpp: .*--allow-code-execution"):
        start(tiny, tmp_path / "out", **changes | {"tasks": ("mbpp",)})
    assert not (tmp_path / "out" / "seed-0").exists()


# ---------------------------------------------------------------- keeping a sweep


def test_what_is_kept_compares_alike(varied, tmp_path, monkeypatch, capsys):
    """The same table from the kept folder, to the 1e-5 nats that are kept; nothing of this machine's paths in the project."""
    monkeypatch.setattr(evaluation, "draw_comparison", lambda result, file: False)
    (varied / "variations.png").write_bytes(b"a picture")
    keep.main({"sweep": str(varied), "out": str(tmp_path / "kept")})
    assert (tmp_path / "kept/variations.png").read_bytes() == b"a picture"
    tables = []
    for folder in (varied, tmp_path / "kept"):
        sides = [tuple(str(folder / f"seed-{seed}" / side) for seed in (0, 1)) for side in ("baseline", "scope=talan")]
        tables.append(evaluation.compare(evaluation.CompareSettings(*sides, out=str(tmp_path / "out"))))
    for part in ("rules", "reference"):
        one, two = (table["tasks"]["sums"][part] for table in tables)
        assert one == two if part == "rules" else one["difference"] == pytest.approx(two["difference"], abs=1e-6) and one["size"] == two["size"]
    assert tables[0]["facts"] == tables[1]["facts"] and tables[0]["seeds"] == tables[1]["seeds"] == [0, 1]
    run = tmp_path / "kept/seed-0/candidate"
    assert {file.name for file in run.iterdir()} == {"records.jsonl.gz", "results.json"} and (tmp_path / "kept/base/results.json").exists()
    lines = metrics(varied / "seed-0/candidate")
    assert stored(run / "results.json")["training"] | {"seconds": 0} == {
        "steps": 3, "seconds": 0, "tokens": sum(line.get("tokens", 0) for line in lines), "trainable": lines[0]["trainable"],
        "held_out_loss": lines[-1]["loss"]}
    assert "training" not in stored(tmp_path / "kept/base/results.json")


def test_keeping_again_gives_the_same_bytes_and_nothing_else_is_replaced(done, tmp_path):
    for out in ("one", "two", "one"):
        keep.main({"sweep": str(done), "out": str(tmp_path / out)})
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "one")) > 10
    (tmp_path / "mine").mkdir()
    for sweep_folder, out, message in ((done, "mine", "exists, and holds no sweep"), (tmp_path / "mine", "new", "expected a folder of train.py")):
        with pytest.raises(ValueError, match=message):
            keep.main({"sweep": str(sweep_folder), "out": str(tmp_path / out)})
    assert not (tmp_path / "new").exists() and not any((tmp_path / "mine").iterdir())


def test_half_a_sweep_is_not_kept(copy, tmp_path):
    """All that sweep.json names has scores; runs of seeds that it does not name are kept beside them."""
    told = stored(copy / "sweep.json")
    told["runs"] = {run: digest for run, digest in told["runs"].items() if "seed-1" in run}
    (copy / "sweep.json").write_text(json.dumps(told))
    shutil.rmtree(copy / "seed-0/control/eval-adapted")
    assert len(list(keep.keep(copy, tmp_path / "kept"))) == 13 and (tmp_path / "kept/seed-0/baseline").exists()
    shutil.rmtree(copy / "seed-1/candidate/eval-adapted")
    shutil.rmtree(copy / "base")
    with pytest.raises(ValueError, match="copy: not finished, without scores: seed-1/candidate, base$"):
        keep.keep(copy, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_the_list_of_what_is_kept(varied, tmp_path, capsys):
    keep.main({"sweep": str(varied), "out": str(tmp_path / "records/one")})
    told = stored(tmp_path / "records/one/sweep.json")
    told["held_out_losses"] = {"baseline": {"0.001": 0.5, "0.01": None}}
    told["sides"]["baseline"]["lr"] = 0.001
    assert set(told["grid_seconds"].values()) == {0}
    told["grid_seconds"] |= {"baseline": 60, "candidate": 90}
    (tmp_path / "records/one/sweep.json").write_text(json.dumps(told))
    capsys.readouterr()
    keep.main({"out": str(tmp_path / "records")})
    text = capsys.readouterr().out
    lines = {line.split()[1]: line.split() for line in text.splitlines()[1:7]}
    assert list(lines) == ["baseline", "candidate", *VARIED] and lines["baseline"][:5] == ["one", "baseline", "2", "3,712", "3"]
    assert [line[8] for line in lines.values()] == ["1.0", "1.5"] + ["0.0"] * 4 and text.splitlines()[7].split()[::2] == ["all", "2.5"]
    losses = [metrics(varied / f"seed-{seed}/mixer=mlp")[-1]["loss"] for seed in (0, 1)]
    assert float(lines["mixer=mlp"][6]) == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert "one: first seed, by learning rate" in text and re.search(r"\nbaseline +0\.50000\* +inf\n", text)
    table = evaluation.comparison_table(stored(varied / "variations.json")).splitlines()
    shown = text.splitlines()[-len(table):]
    same = lambda line: [word for word in line.split() if not re.search(r"\d\.\d{5}", word)]  # likelihoods are kept to 1e-5 nats an item
    assert [same(line) for line in shown] == [same(line) for line in table] and len(shown) == 15
    with pytest.raises(ValueError, match="no kept sweeps"):
        keep.main({"out": str(tmp_path / "none")})


def test_paths_in_the_project_become_relative():
    assert keep.relative({"a": [f"{ROOT}/data/x", "/elsewhere", 3], "b": {"c": f"{ROOT}/y"}}) == {"a": ["data/x", "/elsewhere", 3], "b": {"c": "y"}}


# ---------------------------------------------------------------- the control


@pytest.mark.parametrize("changes, side, rank", [
    ({}, 2 * 8 + 3 * 8 * 32 + 2 * 32 + 33, 5),  # slots, three matrices, w_read, gate: 881 numbers, 928 a rank
    ({"width": 16}, 2 * 16 + 3 * 16 * 32 + 2 * 32 + 33, 6),
    ({"slots": 4, "writeback": "add"}, 928, 5),  # exactly one rank's
    ({"slots": 4}, 928 + 33, 6),
    ({"scope": "writeback"}, 8 * 32 + 33, 5)])
def test_the_rank_of_the_control_by_hand(tiny, changes, side, rank):
    """A and B of q, k, v, o, gate, up, down have rows + columns = 64, 48, 48, 64, 80, 80, 80 numbers a rank, in two layers."""
    settings = train.Settings(**test_train.flags(tiny, "", **changes))
    assert sweep.trainable(settings) == {"matrices": 4 * 928, "side path": side, "all": 4 * 928 + side}
    assert sweep.control_rank(settings) == rank == 4 + math.ceil(side / 928)


@pytest.mark.parametrize("changes", [{"adapter": "dora", "width": 16}, {"adapter": "rslora", "targets": ("q_proj", "v_proj"), "rank": 2},
                                     {"scope": "full", "dtype": "float32", "mixer": "mlp"}, {"layers": ("0", "1"), "adapter": "dora"}], ids=str)
def test_the_control_has_the_smallest_rank_with_as_many_parameters(tiny, changes):
    def total(settings):
        return sum(p.numel() for p in train.build_model(settings, torch.device("cpu")).parameters() if p.requires_grad)

    sides = sweep.sides_of(train.Settings(**test_train.flags(tiny, "", **changes), paired_control="rank"))
    control, candidate = sides["control"], total(sides["candidate"])
    smaller = train.replace(control, rank=control.rank - 1)
    assert total(smaller) < candidate <= total(control) == sweep.trainable(control)["all"] and not control.talan
    assert control.alpha == sides["baseline"].alpha and candidate == sweep.trainable(sides["candidate"])["all"]


# ---------------------------------------------------------------- learning rates


def test_each_side_takes_the_rate_with_its_lowest_held_out_loss(go, tmp_path, capsys, monkeypatch):
    """On the first seed; test items are not read before all rates are chosen, but for the bare backbone's scores."""
    events, score, choose, trainings = [], sweep.score, sweep.choose_rates, count_trainings(monkeypatch)
    monkeypatch.setattr(sweep, "score", lambda settings: events.append(settings.out) or score(settings))
    monkeypatch.setattr(sweep, "choose_rates", lambda *given: (choose(*given), events.append("chosen"))[0])
    out = go(tmp_path / "out", seeds=("3", "0"), lrs=("1e-2", "1e-1", "1e-4"), paired_control="rank", steps=2)
    assert events[:2] == [str(out / "base"), "chosen"] and len(events) == 8
    assert {p.name for p in out.glob("lr-*")} == {"lr-0.0001", "lr-0.01", "lr-0.1"} and not list(out.glob("lr-*/*/eval*"))
    told, text = stored(out / "sweep.json"), capsys.readouterr().out
    for side in SIDES:
        losses = {rate: metrics(out / f"lr-{rate}" / side)[-1]["loss"] for rate in ("0.0001", "0.01", "0.1")}
        assert told["held_out_losses"][side] == losses and len(set(losses.values())) == 3
        best = min(losses, key=losses.get)
        assert told["sides"][side]["lr"] == float(best) and f"{losses[best]:.5f}*" in text
        assert {stored(out / f"lr-{rate}" / side / "settings.json")["seed"] for rate in losses} == {3}
        assert [stored(out / f"seed-{seed}" / side / "settings.json")["lr"] for seed in (3, 0)] == [float(best)] * 2
        test_train.assert_same_weights(out / "seed-3" / side, out / f"lr-{best}" / side, ["adapter_model.safetensors"])
        keep.main({"sweep": str(out), "out": str(tmp_path / "kept")})
        others = [(out / f"lr-{rate}" / side / "metrics.jsonl").read_text().splitlines() for rate in losses if rate != best]
        seconds = sum(line["seconds"] for lines in others for line in map(json.loads, lines) if line["kind"] == "step")
        assert stored(tmp_path / "kept/sweep.json")["grid_seconds"][side] == pytest.approx(seconds, abs=0.11) and seconds > 0
    assert trainings[:9] == [f"lr-{rate}/{side}" for rate in ("0.0001", "0.01", "0.1") for side in SIDES]
    assert trainings[9:] == [f"seed-0/{side}" for side in SIDES]  # those of seed 3 are there already


def test_the_first_seed_takes_the_run_of_the_rate_and_keeps_its_own(tmp_path):
    found, run = tmp_path / "lr-0.1/baseline", tmp_path / "seed-3/baseline"
    sweep.take_over(found, run)
    assert not run.exists()  # nothing to take
    (found / "step-2").mkdir(parents=True)
    (found / "train_state.json").write_text("{}")
    sweep.take_over(found, run)
    assert not run.exists()  # its training is not finished
    (found / "step-2").rmdir()
    (tmp_path / "lr-0.1/.baseline.tmp").mkdir()  # left by a copy that was killed
    (tmp_path / "lr-0.1/.baseline.tmp/half").write_text("")
    sweep.take_over(found, run)
    assert {path.name: content for path, content in contents(run).items()} == {"train_state.json": b"{}"} and not list(tmp_path.glob("*/.*"))
    (run / "train_state.json").write_text("its own")
    sweep.take_over(found, run)
    assert (run / "train_state.json").read_text() == "its own" and (found / "train_state.json").exists()


def test_sides_with_different_rates_are_compared_and_it_is_said(go, tmp_path, monkeypatch, capsys):
    wish = {"baseline": 1e-3, "candidate": 2e-3}
    monkeypatch.setattr(sweep, "held_out_loss", lambda settings, run, ranks: abs(settings.lr - wish[run.name]))
    out = go(tmp_path / "out", seeds=("0",), lrs=("5e-4", "1e-3", "2e-3"), steps=1)
    for side, rate in wish.items():
        assert stored(out / f"seed-0/{side}/settings.json")["lr"] == rate == stored(out / "sweep.json")["sides"][side]["lr"]
    text = capsys.readouterr().out
    assert "as they are meant to: talan False | True, lr 0.001 | 0.002" in text
    assert "lowest at an end of the grid: candidate;" in text


def test_a_rate_that_diverges_is_not_taken(tiny, tmp_path, capsys, monkeypatch):
    settings = train.Settings(**test_train.flags(tiny, "", steps=3, talan=False, clip=0.0))
    losses = sweep.choose_rates(sweep.grid_of({"baseline": settings}, [1e-3, 1e29], tmp_path), Ranks())
    assert losses["baseline"][1e29] == math.inf and math.isfinite(losses["baseline"][1e-3]) and sweep.lowest(losses["baseline"]) == 1e-3
    assert "nonfinite-step-" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no finite loss at any of 1, 2"):
        sweep.lowest({1.0: math.inf, 2.0: math.inf})
    with pytest.raises(ValueError, match="dev_rows"):  # any other error is one
        sweep.held_out_loss(train.replace(settings, dev_rows=10_000), tmp_path / "bad", Ranks())
    monkeypatch.setattr(sweep, "do_run", lambda *_: None)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "dev", "loss": 1.0}\n{"kind": "dev", "loss": NaN}\n')
    assert sweep.held_out_loss(settings, tmp_path, Ranks()) == math.inf
    assert sweep.lowest({1.0: math.nan, 2.0: 0.5, 3.0: math.nan}) == 2.0 and sweep.lowest({1.0: 0.5, 2.0: math.nan}) == 1.0


def test_of_equal_losses_the_smallest_rate():
    assert sweep.lowest({3.0: 0.5, 1.0: 0.5, 2.0: 0.7}) == 1.0


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_under_torchrun(tiny, items, done, tmp_path):
    """The same sweep, up to sums in another order; started again, everything is reused."""
    words = test_train.command(test_train.flags(tiny, tmp_path / "out", **SWEEP, tasks=(items,)))
    for reused in (0, 5):
        ended = test_train.python("-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py"), *words)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("reused") == reused and ended.stdout.count("sweep folder") == 1
    for one, two in zip(metrics(tmp_path / "out/seed-1/candidate")[2:], metrics(done / "seed-1/candidate")[2:], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
