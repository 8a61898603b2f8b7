"""A run that is killed, interrupted or out of disk: checkpoints stay whole, --resume loses nothing.

A run is a child of a warm process. An audit hook counts its operations on files: one is opened for
writing, renamed, removed, a folder made; of tensors three more: before, half, written.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from conftest import ROOT
from runs import assert_same, contents, flags, metrics, names, start

import common
import talan
import train

tiny = runs.tiny
FORKS = multiprocessing.get_context("forkserver")
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def child(folder, settings, stop, count):
    """train.py in `folder`; at operation `at` it gets a signal, `times` times."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("output", "w", buffering=1)  # noqa: SIM115 - to the end
    limit, save_file = stop.get("limit", -1), talan.save_file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def operation():
        count.value += 1
        for _ in range(stop.get("times", 1) if count.value == stop.get("at") else 0):
            os.kill(os.getpid(), stop.get("number", signal.SIGKILL))

    def audit(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in EVENTS) and not str(args[0]).startswith(("/", "output")):
            operation()

    def save_in_three(tensors, file, **options):
        operation()
        save_file(tensors, file, **options)
        whole = Path(file).read_bytes()
        os.truncate(file, len(whole) // 2)
        operation()
        Path(file).absolute().write_bytes(whole)
        operation()

    talan.save_file = train.save_file = save_in_three
    sys.addaudithook(audit)
    common.run_script(lambda _: train.main(settings), train.Settings, "train.py", [])


def run(folder, settings, **stop):
    """One such run to its end -> (exit code, number of operations, last line of its output)."""
    folder.mkdir(exist_ok=True)
    count = FORKS.Value("i", 0)
    process = FORKS.Process(target=child, args=(str(folder), settings, stop, count))
    process.start()
    process.join()
    return process.exitcode, count.value, (folder / "output").read_text().rstrip().split("\n")[-1]


@pytest.fixture(scope="module")
def six(tiny):
    """Settings of a run of six steps; the warm process starts."""
    FORKS.set_forkserver_preload(["torch._dynamo", "test_crash"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        FORKS.Process(target=len, args=("",)).start()
    return flags(tiny, "run", steps=6, save_every=2, eval_every=3, dropout=0.1)


@pytest.fixture(scope="module")
def whole(six, tmp_path_factory):
    """The run that nothing stops, its number of operations, and all its checkpoints' contents."""
    folder, kept, save = tmp_path_factory.mktemp("whole"), {}, train.save_checkpoint

    def save_and_keep(path, step, *args):
        save(path, step, *args)
        kept[f"step-{step:07d}"] = contents(path / f"step-{step:07d}")

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_keep)
        train.main(six)
    code, operations, _ = run(folder / "again", six)
    assert code == 0
    return folder / "run", operations, kept


def newest_step(run):
    return max((path.name for path in run.glob("step-*")), default="")


def assert_resumes(folder, six, whole):
    """The newest checkpoint is whole, and the run ends as if nothing had been."""
    newest = newest_step(folder / "run")
    if newest in whole[2]:  # a signal saves at other steps
        assert contents(folder / "run" / newest) == whole[2][newest]
    code, _, line = run(folder, six | {"resume": True})
    assert code == 0, line
    assert_same(folder / "run", whole[0])


@pytest.mark.parametrize("at", [1, 4, 32, 60, 80, -4, 0])
def test_killed_and_resumed(six, whole, tmp_path, at):
    """kill -9 at the first operation, at the settings, in and between checkpoints, at the last."""
    at = at if at > 0 else whole[1] + at
    assert run(tmp_path / "a", six, at=at)[:2] == (-signal.SIGKILL, at)
    assert_resumes(tmp_path / "a", six, whole)


@pytest.mark.slow
def test_killed_at_every_operation(six, whole, tmp_path):
    """Each in a run of its own, then one run that is killed again and again."""
    for at in range(1, whole[1] + 1):
        assert run(tmp_path / str(at), six, at=at)[:2] == (-signal.SIGKILL, at)
        assert_resumes(tmp_path / str(at), six, whole)
    for at in range(5, 65, 6):
        run(tmp_path / "a", six | {"resume": at > 5}, at=at)
    assert_resumes(tmp_path / "a", six, whole)


@pytest.mark.parametrize("name, times, code", [("INT", 1, 130), ("TERM", 1, 130), ("INT", 2, 130)])
def test_interrupted_and_resumed(six, whole, tmp_path, name, times, code):
    """One signal finishes the step and saves it; two stop at once, here in a checkpoint."""
    at, path, number = round(0.6 * whole[1]), tmp_path / "a/run", getattr(signal, f"SIG{name}")
    ended = run(tmp_path / "a", six, at=at, number=number, times=times)
    assert ended[0] == code and (times == 1 or ended[1] <= at + 12)  # removes temporary files
    if times == 1:
        assert newest_step(path) == f"step-{metrics(path)[-1]['step']:07d}"
    assert_resumes(tmp_path / "a", six, whole)


@pytest.fixture
def remount(tmp_path):
    """Mount a small file system at a/run, with these options; skips where that is not allowed."""
    path = tmp_path / "a/run"
    path.mkdir(parents=True)

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs to mount a file system, which is not allowed here")

    yield mount
    while path.is_mount():
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("trouble", ["size=4k", "size=60k", "size=150k", "ro", 700, 1200, 20_000])
def test_no_room_to_write(six, whole, tmp_path, remount, trouble):
    """A full or read-only disk, or files that may not grow: one line, and with room it resumes."""
    if trouble == "ro":
        remount("size=9m")
        run(tmp_path / "a", six, at=whole[1] // 2)
        remount("remount,ro")
    elif isinstance(trouble, str):
        remount(trouble)
    limit = trouble if isinstance(trouble, int) else -1
    code, _, line = run(tmp_path / "a", six | {"resume": True}, limit=limit)
    assert code == 1 and line.startswith("train.py: ")
    assert re.search("No space left on device|Read-only file system|File too large", line)
    if limit < 0:
        remount("remount,rw,size=9m")
    assert_resumes(tmp_path / "a", six, whole)


def test_a_power_cut_leaves_old_or_new(tiny, tmp_path, monkeypatch):
    """What a checkpoint holds, and the metrics up to it, is on the disk before its name is."""
    synced, saved, fsync, replace = set(), [], os.fsync, os.replace

    def fsync_and_note(opened):
        synced.add(Path(os.readlink(f"/proc/self/fd/{opened}")).name)
        fsync(opened)

    def replace_and_check(old, new):
        if Path(new).name.startswith("step-"):
            assert names(old) | {old.name, "metrics.jsonl"} <= synced
            saved.append(synced.clear())
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    monkeypatch.setattr(os, "replace", replace_and_check)
    start(tiny, tmp_path / "run", steps=2, save_every=1)
    assert len(saved) == 2 and "run" in synced
