"""The record of a run: what it holds, that --repeat gives the run again bit for bit, and that changed data or backbones are refused."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model  # noqa: E402
import test_train  # noqa: E402
import train  # noqa: E402
from data.settings import given, nearest  # noqa: E402
from data.tasks import find_tasks  # noqa: E402

tiny, signals, contents, start = test_train.tiny, test_train.signals, test_train.contents, test_train.start
RUN = {"steps": 5, "save_every": 2, "eval_every": 2, "dropout": 0.1, "micro_tokens": 200, "seed": 3, "mixer": "mlp", "adapter": "dora"}


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of backbone and rows that a test may change."""
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    shutil.copy(tiny.rows, tmp_path / "rows.jsonl")
    lines = Path(tiny.rows).read_text().splitlines(keepends=True)
    (tmp_path / "dev.jsonl").write_text("".join(lines[:6]))
    return {"backbone": str(tmp_path / "model"), "data": (str(tmp_path / "rows.jsonl"),), "dev_data": (str(tmp_path / "dev.jsonl"),)}


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    """A run done in this process."""
    return start(tiny, tmp_path_factory.mktemp("repeat") / "original", **RUN)


def record_of(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


def assert_equal_runs(a, b):
    """Metrics, but for seconds and folder, and every byte of the other files but the settings' own `out`."""
    assert test_train.metrics(a) == test_train.metrics(b)
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys() and len(one) == 8
    assert [name for name in one if one[name] != two[name]] == [Path("metrics.jsonl"), Path("settings.json")]


# ---------------------------------------------------------------- the record


def test_the_record_says_what_a_run_was_started_with(tiny, original):
    record, folder = record_of(original), Path(tiny.model)
    assert record["settings"] == json.loads((original / "settings.json").read_text()) and record["settings"]["seed"] == 3
    assert record["data_sha256"] == {tiny.rows: hashlib.sha256(Path(tiny.rows).read_bytes()).hexdigest()}
    assert record["backbone_sha256"] == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= record["backbone_sha256"].keys() and len(record["fingerprint"]) == 64
    assert record["python"] == platform.python_version() and record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"
    assert f"{torch.get_num_threads()} threads" in record["hardware"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_record_names_commit_and_changes(tmp_path, monkeypatch):
    """A commit, and -dirty behind it when the code has changes that are not in it."""
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    def commit():
        return model.header({}, torch.device("cpu"))["commit"]

    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    assert commit() is None  # no repository
    (tmp_path / "model.py").write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    clean = commit()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "model.py").write_text("pass")
    assert commit() == clean + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None  # no git


# ---------------------------------------------------------------- the same again


def test_repeating_a_run_in_another_process_is_bit_equal(original, tmp_path):
    """From the command line, knowing only the folder: same metrics, and the same bytes in every file of weights and moments."""
    done = test_train.python(str(ROOT / "train.py"), "--repeat", str(original), "--out", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("warning") and "not committed" not in line] == []
    assert_equal_runs(original, tmp_path / "again")
    assert record_of(tmp_path / "again")["settings"]["repeat"] == ""  # so that it is resumed and repeated like any other


def test_repeating_without_out_takes_a_new_folder(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(original)
    train.main({"repeat": str(original)})
    assert_equal_runs(original, tmp_path / "runs/1")
    assert contents(original) == before
    with pytest.raises(ValueError, match="exists"):
        train.main({"repeat": str(original), "out": "runs/1"})


def test_a_repeated_run_that_stops_is_resumed(tiny, original, tmp_path, monkeypatch):
    """And a run that was stopped before its end can be repeated to its end."""
    with monkeypatch.context() as patch, pytest.raises(test_train.Stopped):
        test_train.stop_at(patch, 3)
        train.main({"repeat": str(original), "out": str(tmp_path / "again")})
    train.main({"repeat": str(tmp_path / "again"), "out": str(tmp_path / "third")})
    train.main({"out": str(tmp_path / "again"), "resume": True})
    assert_equal_runs(original, tmp_path / "again")
    assert_equal_runs(original, tmp_path / "third")


def test_other_flags_beside_repeat_are_refused(original, tmp_path):
    values = given(train.Settings, ["--repeat", str(original), "--out", str(tmp_path / "again"), "--seed", "4", "--no-talan"])
    with pytest.raises(ValueError, match="every setting from the record.*leave out --seed, --talan$"):
        train.main(values)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", ["", "{", '{"kind": "step", "step": 1}\n', "[1]\n", '{"settings": 3}\n'])
def test_a_folder_without_a_record_is_refused(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{folder}: has no metrics.jsonl that begins with the record"):
            train.main({"repeat": str(folder)})


def test_a_record_of_settings_that_are_none_is_refused(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    record = record_of(original)
    record["settings"] |= {"momentum": 1, "batch": 2}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "run/settings.json").write_text(json.dumps(record["settings"]))
    for explicit in ({"repeat": str(tmp_path / "run")}, {"out": str(tmp_path / "run"), "resume": True}):
        with pytest.raises(ValueError, match="settings of a run of this version, found .*momentum: 1, batch: 2"):
            train.main(explicit)


# ---------------------------------------------------------------- what has changed since


def change_rows(copy):
    path = Path(copy["data"][0])
    path.write_text(path.read_text().replace("1", "2", 1))
    return [str(path)]


def change_dev(copy):
    path = Path(copy["dev_data"][0])
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0])
    return [str(path)]


def change_weights(copy):
    path = Path(copy["backbone"]) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last bit of the last weight
    path.write_bytes(data)
    return [path.name]


def change_template(copy):
    """The chat template decides the tokens, and is in no tensor and not in tokenizer.json."""
    (Path(copy["backbone"]) / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    return ["chat_template.jinja"]


def change_all(copy):
    return change_rows(copy) + change_dev(copy) + change_weights(copy) + change_template(copy)


@pytest.mark.parametrize("change", [change_rows, change_dev, change_weights, change_template, change_all])
def test_changed_files_are_refused_and_each_is_named(tiny, tmp_path, monkeypatch, copy, change):
    """By --repeat, and by --resume of a stopped run, before anything is written."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(test_train.Stopped):
        test_train.stop_at(patch, 3)
        start(tiny, run, **copy, save_every=2)
    before, names = contents(run), change(copy)
    for explicit in ({"repeat": str(run), "out": str(tmp_path / "again")}, {"out": str(run), "resume": True}):
        with pytest.raises(ValueError, match="not those that it was started with") as error:
            train.main(explicit)
        lines = str(error.value).splitlines()[1:]
        assert len(lines) == len(names) and all(any(f" {name}: recorded " in line for line in lines) for name in names)
    assert contents(run) == before and not (tmp_path / "again").exists()


def test_another_commit_or_version_is_a_warning(original, tmp_path, capsys, monkeypatch):
    shutil.copytree(original, tmp_path / "run")
    record = record_of(original)
    lines = (original / "metrics.jsonl").read_text().splitlines()[1:]
    record |= {"commit": "0123456789ab", "versions": record["versions"] | {"torch": "1.0"}, "hardware": "abacus"}
    del record["backbone_sha256"]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join([json.dumps(record), *lines]) + "\n")
    capsys.readouterr()
    train.main({"repeat": str(tmp_path / "run"), "out": str(tmp_path / "again")})
    warned = [line.removeprefix(f"warning: {tmp_path}/run: ") for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[0] for line in warned if "not committed" not in line] == ["backbone_sha256", "commit", "hardware", "versions"]
    assert "commit: recorded 0123456789ab, found " in "".join(warned)


@pytest.mark.parametrize("commit, dirty", [("0123456789ab", False), ("0123456789ab-dirty", True), (None, False)])
def test_uncommitted_changes_are_a_warning(capsys, commit, dirty):
    record = {"data_sha256": {}, "backbone_sha256": {}, "commit": commit, "device": "cpu", "hardware": "", "python": "", "versions": {}}
    train.check_record("run", record, record)
    assert ("changes that are not committed" in capsys.readouterr().err) == dirty


# ---------------------------------------------------------------- deterministic algorithms


def test_deterministic_algorithms_by_flag(tiny, tmp_path, monkeypatch):
    """They are on for the whole run, with the workspace that cuBLAS needs for it, and the run is as good as any other."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found, clip = [], torch.nn.utils.clip_grads_with_norm_

    def look(*args):
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", look)
    try:
        with_flag = start(tiny, tmp_path / "with", deterministic=True, steps=2)
        assert found == [(True, ":4096:8")] * 2
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        start(tiny, tmp_path / "own", deterministic=True, steps=1)
        assert found[2:] == [(True, ":16:8")]  # one's own choice stays
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    without = start(tiny, tmp_path / "without", steps=2)
    assert found[3:] == [(False, None)] * 2
    for a, b in zip(test_train.metrics(with_flag)[1:], test_train.metrics(without)[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_help_says_what_deterministic_needs():
    done = test_train.python(str(ROOT / "train.py"), "--help")
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in done.stdout


# ---------------------------------------------------------------- misspelt values


@pytest.mark.parametrize("changes, hint", [
    ({"adapter": "lroa"}, "kind: expected one of none, lora, dora, rslora, found 'lroa'; did you mean lora?"),
    ({"mixer": "liner"}, "mixer: expected one of linear, mlp, attention, found 'liner'; did you mean linear?"),
    ({"writeback": "gated"}, "did you mean gate?"), ({"site": "atention"}, "did you mean attention?"), ({"scope": "joinnt"}, "did you mean joint?"),
    ({"targets": ("q_porj",)}, "did you mean q_proj?"), ({"dtype": "bfloat"}, "did you mean bfloat16?"),
    ({"tasks": ("wrod",)}, "found wrod; did you mean word?"), ({"tasks": ("gsm8", "xyz")}, "found gsm8; did you mean gsm8k?, xyz"),
], ids=lambda value: str(value)[:20])
def test_a_misspelt_value_names_the_nearest(tiny, tmp_path, changes, hint):
    with pytest.raises(ValueError) as error:
        start(tiny, tmp_path / "run", **changes)
    assert hint in str(error.value) and not (tmp_path / "run").exists()


def test_a_hint_is_given_only_when_there_is_one():
    assert nearest("zzz", ("lora", "dora")) == "" and nearest(3, ("lora",)) == ""
    with pytest.raises(ValueError, match="found 'zzz'$"):
        model.choose_dtype("zzz", torch.device("cpu"))
    with pytest.raises(ValueError, match="found none$"):
        find_tasks(())
    for words, hints in ((["--rank", "four"], []), (["--dropuot=1", "--sede", "2"], ["--dropout", "--seed"]), (["--seed"], [])):
        with pytest.raises(SystemExit) as error:
            given(train.Settings, words)
        assert [part.split("?")[0] for part in str(error.value).split("did you mean ")[1:]] == hints
