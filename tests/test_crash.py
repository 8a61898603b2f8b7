"""A run that is killed, interrupted, or out of disk space: its folder always holds a checkpoint that loads, and --resume ends as if nothing had been.

"As if nothing had been" is equality of every file of the run, bit for bit, `seconds` in metrics.jsonl alone left out. Children of a warm server
(crashes.py) do the runs: twelve steps, a checkpoint every second, a held-out loss every third, dropout on. The slow test prints what it did:

    python -m pytest -q -s -m slow tests/test_crash.py
"""

import collections
import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model  # noqa: E402
import test_train  # noqa: E402
import train  # noqa: E402
from crashes import PHASES, Server  # noqa: E402

tiny, signals = test_train.tiny, test_train.signals


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def settings(tiny):
    return {"backbone": tiny.model, "data": [tiny.rows], "out": "run", **test_train.SHORT, "steps": 12, "save_every": 2, "eval_every": 3,
            "dropout": 0.1}


@pytest.fixture(scope="module")
def whole(server, settings, tmp_path_factory):
    """The folder of the uninterrupted run, all its checkpoints kept; and how such a run ends that keeps only the newest."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.run(folder, settings, keep=True).status == 0 and len(steps_of(folder / "run")) == 6, (folder / "output").read_text()
    return folder / "run", server.run(folder / "again", settings)


def steps_of(run):
    """Checkpoint folders by step."""
    return {int(folder.name[5:]): folder for folder in sorted(run.glob("step-*"))}


def assert_same_files(found, want):
    """Every file of two folders equal, tensors bit for bit."""
    names = [sorted(file.name for file in folder.iterdir() if file.is_file()) for folder in (found, want)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            a, b = load_file(found / name), load_file(want / name)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        elif name != "metrics.jsonl":
            assert (found / name).read_bytes() == (want / name).read_bytes(), name


def lines_of(run):
    """metrics.jsonl without `seconds`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_usable(run, whole):
    """Whatever has happened: each checkpoint there is the whole run's at that step; returns the newest one's step, 0 without one."""
    found, want = steps_of(run), steps_of(whole)
    for step, folder in found.items():
        assert_same_files(folder, want[step])
    if not found and (run / "train_state.json").exists():  # all that was left to do was deleting them
        assert_same_files(run, whole)
        return 12
    return max(found, default=0)


def assert_finished(run, whole):
    """The run is complete, and equal to the one that nothing stopped; no step is logged twice, nothing is left over."""
    assert_same_files(run, whole)
    assert [path.name for path in run.iterdir() if path.is_dir() or path.name.startswith(".")] == []
    assert lines_of(run) == lines_of(whole)
    assert [line["step"] for line in lines_of(run) if line["kind"] == "step"] == list(range(1, 13))


# ---------------------------------------------------------------- kill -9


def test_killed_at_operations_on_the_file_system_and_resumed(server, settings, whole, tmp_path):
    """At every 37th of them, from the first, each in a run of its own; the slow tests take hundreds of moments, and several a run."""
    reference, ended = whole
    for at in range(1, ended.operations, 37):
        stopped = server.run(tmp_path / str(at), settings, at=at)
        assert stopped.status == -signal.SIGKILL and stopped.operations == at
        assert_usable(tmp_path / str(at) / "run", reference)
        assert server.run(tmp_path / str(at), settings | {"resume": True}).status == 0, (tmp_path / str(at) / "output").read_text()
        assert_finished(tmp_path / str(at) / "run", reference)


def test_killed_before_its_settings_are_there_is_no_obstacle(server, settings, whole, tmp_path):
    """The folder then holds a temporary file at most, and counts as empty, with --resume and without."""
    resume = {"resume": True}
    for at, before, more in ((2, False, {}), (2, False, resume), (3, True, {}), (3, True, resume), (3, False, resume)):
        folder, few = tmp_path / f"{at}{before}{len(more)}", settings | {"steps": 1}
        assert server.run(folder, few, at=at).status == -signal.SIGKILL
        assert sorted(path.name[:15] for path in (folder / "run").iterdir()) == [".settings.json.", "settings.json"][:2 * (at - 2)]
        if before:  # the moment before: it got its second name without an operation that is counted
            (folder / "run/settings.json").unlink()
        assert server.run(folder, few | more).status == 0, (folder / "output").read_text()
        assert sorted(path.name for path in (folder / "run").iterdir()) == sorted(path.name for path in whole[0].iterdir() if path.is_file())


def test_killed_while_it_overwrites_an_old_run(server, settings, whole, tmp_path):
    """Before, between and after: the old folder moved aside, its files deleted, the new settings written."""
    for at in (1, 2, 30, 54, 56, 58):
        folder, few = tmp_path / str(at), settings | {"steps": 1, "overwrite": True}
        shutil.copytree(whole[0], folder / "run")
        assert server.run(folder, few, at=at).status == -signal.SIGKILL
        assert server.run(folder, few).status == 0, (folder / "output").read_text()
        assert len(lines_of(folder / "run")) == 4  # record, held-out loss, step 1, held-out loss
        assert sorted(path.name for path in folder.iterdir()) == ["output", "run"]  # what was moved aside is deleted


def kill_until_finished(server, settings, whole, folder, draw, most):
    """One run: killed up to `most` times, each within half a run's time or operations of its last start, and resumed each time.

    Returns the phases it was killed in, and the number of resumes.
    """
    reference, ended = whole
    killed, resumes, saved = [], 0, 0
    for attempt in range(most + 1):
        moment = {"at": draw.randint(1, ended.operations // 2)} if draw.random() < 0.5 else {"after": draw.uniform(0.05, ended.seconds / 2)}
        last = server.run(folder, settings | {"resume": attempt > 0}, **(moment if attempt < most else {}))
        resumes += attempt > 0
        assert last.status in (0, -signal.SIGKILL), (folder / "output").read_text()
        newest = assert_usable(folder / "run", reference)
        assert newest >= saved
        saved = newest
        if last.status == 0:
            break
        killed.append(last.phase)
    assert_finished(folder / "run", reference)
    return killed, resumes


@pytest.mark.slow
def test_two_hundred_kills(server, settings, whole, tmp_path):
    """kill -9 at random moments: half of them at random times, half just before a random operation on the file system."""
    draw, killed, runs, resumes, began = random.Random(6), [], 0, 0, time.perf_counter()
    while len(killed) < 200:
        phases, again = kill_until_finished(server, settings, whole, tmp_path / "run", draw, draw.randint(3, 12))
        killed, runs, resumes = killed + phases, runs + 1, resumes + again
        shutil.rmtree(tmp_path / "run")
    counts = collections.Counter(killed)
    assert counts.keys() == set(PHASES)  # each kind of moment was hit
    print(f"\n{len(killed)} kills ({', '.join(f'{name} {counts[name]}' for name in PHASES)}), {resumes} resumes, {runs} runs, all ended bit-equal to "
          f"the uninterrupted one; no checkpoint was lost; {time.perf_counter() - began:.0f} s")


@pytest.mark.slow
def test_killed_at_every_operation_of_the_first_checkpoint_and_of_the_end(server, settings, whole, tmp_path):
    """In order, each as a run of its own: nothing between two renames or removals is left to chance."""
    reference, ended = whole
    moments = [*range(11, 35), *range(ended.operations - 24, ended.operations + 1)]
    for at in moments:
        assert server.run(tmp_path / "run", settings, at=at).status == -signal.SIGKILL
        assert_usable(tmp_path / "run/run", reference)
        assert server.run(tmp_path / "run", settings | {"resume": True}).status == 0
        assert_finished(tmp_path / "run/run", reference)
        shutil.rmtree(tmp_path / "run")
    print(f"\n{len(moments)} kills, at the operations 11 to 34 and the last 25 of {ended.operations}, one a run: all ended bit-equal")


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("name, at", [("SIGINT", 14), ("SIGINT", 66), ("SIGTERM", 61)])
def test_a_signal_finishes_the_step_and_saves(server, settings, whole, tmp_path, name, at):
    """Between steps and at operations of a checkpoint: the last step logged is the one saved, and the exit code is 130."""
    stopped = server.run(tmp_path / "a", settings, at=at, signal=name)
    assert stopped.status == 130 and "finishing the step" in (tmp_path / "a/output").read_text()
    run = tmp_path / "a/run"
    last = max(line["step"] for line in lines_of(run))
    assert 0 < last < 12 and list(steps_of(run)) == [last]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert server.run(tmp_path / "a", settings | {"resume": True}).status == 0
    assert_finished(run, whole[0])


@pytest.mark.parametrize("name, status, at", [("SIGINT", 130, 30), ("SIGINT", 130, 66), ("SIGTERM", -signal.SIGTERM, 66)])
def test_a_second_signal_stops_at_once(server, settings, whole, tmp_path, name, status, at):
    """Nothing more is logged or saved, and what was saved is whole."""
    stopped = server.run(tmp_path / "a", settings, at=at, signal=name, times=2)
    assert stopped.status == status and stopped.operations <= at + 8  # Ctrl-C clears up its temporary files
    assert assert_usable(tmp_path / "a/run", whole[0]) == (0 if at == 30 else 2)
    assert server.run(tmp_path / "a", settings | {"resume": True}).status == 0
    assert_finished(tmp_path / "a/run", whole[0])


# ---------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of so many KiB on the folder; call what it gives with another size or "ro". Skips where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "talan-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"needs a tmpfs, and mounting is not allowed here: {done.stderr.strip() if done else 'no mount command'}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_refused(folder, run, why):
    """The child printed one line on what the matter is, which names the run folder."""
    message = (folder / "output").read_text().splitlines()[-1]
    assert message.startswith(f"train.py: {run}: cannot be written: ") and why in message
    assert "Traceback" not in (folder / "output").read_text()


def assert_tidy(run):
    """Nothing is half written: no temporary files, only whole lines."""
    assert [path for path in run.rglob(".*")] == []
    if (run / "metrics.jsonl").exists():
        assert (run / "metrics.jsonl").read_text()[-1:] in ("", "\n") and lines_of(run) is not None


@pytest.mark.parametrize("size", [4, 40, 90, 180])
def test_disk_full(server, settings, whole, tmp_path, size):
    """At the metrics, the first checkpoint's first and last file, the second checkpoint: one line, exit code 1; with space, --resume."""
    with small_disk(tmp_path / "disk", size) as remount:
        run = tmp_path / "disk/run"
        there = settings | {"out": str(run)}
        assert server.run(tmp_path / "a", there).status == 1
        assert_refused(tmp_path / "a", run, "No space left on device")
        assert_tidy(run)
        saved = assert_usable(run, whole[0])
        assert saved < 12 and saved >= (2 if size == 180 else 0)
        remount("size=9m")
        assert server.run(tmp_path / "a", there | {"resume": True}).status == 0, (tmp_path / "a/output").read_text()
        shutil.copytree(run, tmp_path / "copy")
    assert_same_run(tmp_path / "copy", whole[0])


def assert_same_run(run, whole):
    """assert_finished, but that `out` may differ."""
    assert test_train.metrics(run) == test_train.metrics(whole)
    test_train.assert_same_weights(run, whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir() if path.is_file()}


@pytest.mark.parametrize("limit", [800, 1500, 20_000])
def test_no_file_may_grow(server, settings, whole, tmp_path, limit):
    """The same without a mount: a limit on the size of files fails at the settings, the metrics, the weights."""
    assert server.run(tmp_path / "a", settings, limit=limit).status == 1
    assert_refused(tmp_path / "a", "run", "File too large")
    assert_tidy(tmp_path / "a/run")
    assert assert_usable(tmp_path / "a/run", whole[0]) == 0
    assert server.run(tmp_path / "a", settings | {"resume": True}).status == 0, (tmp_path / "a/output").read_text()
    assert_finished(tmp_path / "a/run", whole[0])


def test_read_only_disk(server, settings, whole, tmp_path):
    with small_disk(tmp_path / "disk", 9000) as remount:
        run = tmp_path / "disk/run"
        there = settings | {"out": str(run)}
        remount("ro")
        assert server.run(tmp_path / "a", there).status == 1
        assert_refused(tmp_path / "a", run, "Read-only file system")
        remount("rw")
        assert server.run(tmp_path / "a", there, limit=30_000).status == 1  # no room for the first checkpoint
        before = test_train.contents(run)
        remount("ro")
        assert server.run(tmp_path / "a", there | {"resume": True}).status == 1
        assert_refused(tmp_path / "a", run, "Read-only file system")
        assert test_train.contents(run) == before
        remount("rw")
        assert server.run(tmp_path / "a", there | {"resume": True}).status == 0
        shutil.copytree(run, tmp_path / "copy")
    assert_same_run(tmp_path / "copy", whole[0])


def as_command(monkeypatch, tiny, out):
    """train.py as a script, here; returns what it exits with: a number, or one line for the standard error and exit code 1."""
    monkeypatch.setattr(sys, "argv", ["train.py", *test_train.command(test_train.flags(tiny, out))])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return end.value.code


def test_a_folder_that_cannot_be_made(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    message = as_command(monkeypatch, tiny, tmp_path / "file/run")
    assert message.startswith(f"train.py: {tmp_path}/file/run: cannot be written: [Errno 20]") and "\n" not in message
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_ctrl_c_while_it_loads_is_130_without_a_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load_tokenizer", lambda _: signal.raise_signal(signal.SIGINT))
    assert as_command(monkeypatch, tiny, tmp_path / "run") == 130
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- power cuts: what is on the disk before what


@pytest.fixture
def calls(monkeypatch):
    """What is synced and renamed, in order, by name ("*" for the process id in it)."""
    found, replace, fsync = [], os.replace, os.fsync

    def name(path):
        return Path(path).name.replace(str(os.getpid()), "*")

    monkeypatch.setattr(os, "fsync", lambda opened: (found.append(name(os.readlink(f"/proc/self/fd/{opened}"))), fsync(opened)))
    monkeypatch.setattr(os, "replace", lambda a, b: (found.append((name(a), name(b))), replace(a, b)))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, calls):
    with model.atomic(tmp_path / "a") as tmp:
        tmp.write_text("text")
    assert calls == [".a.*.tmp", (".a.*.tmp", "a"), tmp_path.name]
    calls.clear()
    with model.atomic(tmp_path / "b") as tmp:
        (tmp / "inner").mkdir(parents=True)
        (tmp / "inner/file").write_text("text")
    assert sorted(calls[:3]) == [".b.*.tmp", "file", "inner"] and calls[3:] == [(".b.*.tmp", "b"), tmp_path.name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_metrics_are_on_the_disk_before_the_checkpoint(tiny, tmp_path, calls):
    test_train.start(tiny, tmp_path / "run", steps=2, save_every=1)
    for step in ("step-0000001", "step-0000002"):
        renamed = calls.index((f".{step}.*.tmp", step))
        assert "metrics.jsonl" in calls[:renamed] and calls[renamed + 1] == "run"
        del calls[:renamed]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    """An error at any point of an atomic write: the old file is there, and no other."""
    (tmp_path / "a").write_text("old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"), model.atomic(tmp_path / "a") as tmp:
            tmp.write_text("new")
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert test_train.contents(tmp_path) == {Path("a"): b"old"}


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    """As when a disk takes the half of it."""
    metrics = train.Metrics(tmp_path, -1)
    metrics.write(kind="step", step=1)
    before = metrics.file.read_text()

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, text):
            with metrics.file.open("a") as f:
                f.write(text[:7])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda *_: Full())
    with pytest.raises(OSError, match="No space"):
        metrics.write(kind="step", step=2)
    monkeypatch.undo()
    assert metrics.file.read_text() == before
