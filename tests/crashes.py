"""Runs of train.py that end at a chosen moment, without starting a Python for each: a server forks, its child runs and is stopped.

    with Server() as server:
        server.run(folder, settings)                                  to the end: Ended(status=0, phase, operations, seconds)
        server.run(folder, settings, after=0.3)                       kill -9 after that many seconds
        server.run(folder, settings, at=17)                           kill -9 just before the 17th operation on the file system
        server.run(folder, settings, at=17, signal="SIGINT", times=2) two Ctrl-C there

The server has imported torch and train but computed nothing, so that its children start as a new process would. An operation is a
file opened for writing, a rename, a removal, a new folder, and three for each file of weights: before it, half written, written.
The child works in `folder`, and what it prints is in `folder`/output. More of `run`: keep=True removes no checkpoint, limit=N lets no
file grow above N bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal as signals
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("load", "step", "evaluate", "checkpoint", "rename", "remove", "finish")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (a signal as its negative), the phase it was in, operations done and seconds."""

    status: int
    phase: str
    operations: int
    seconds: float


class Server:
    """The warm process; `run` waits for one child."""

    def __enter__(self) -> Server:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def run(self, folder: Path, settings: dict[str, Any], after: float | None = None, at: int = 0, signal: str = "SIGKILL", times: int = 1,
            keep: bool = False, limit: int = 0) -> Ended:
        """One child in `folder`, which is made if it is not there, stopped as asked."""
        folder.mkdir(exist_ok=True)
        job = {"folder": str(folder), "settings": settings, "after": after, "at": at, "signal": signal, "times": times, "keep": keep, "limit": limit}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


# ---------------------------------------------------------------- in the server's process


class Watch:
    """What a child says about itself in memory that it shares with the server: phase and number of operations."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def read(self) -> tuple[int, int]:
        return struct.unpack("qq", self.memory[:])

    def phase(self, name: str) -> int:
        """Enter a phase; returns the one before."""
        before, operations = self.read()
        self.memory[:] = struct.pack("qq", PHASES.index(name), operations)
        return before

    def operation(self, job: dict[str, Any]) -> None:
        """Count one, and stop here if this is the one asked for."""
        phase, operations = self.read()
        self.memory[:] = struct.pack("qq", phase, operations + 1)
        if operations + 1 == job["at"]:
            for _ in range(job["times"]):
                os.kill(os.getpid(), getattr(signals, job["signal"]))

    def audit(self, job: dict[str, Any], event: str, args: tuple[Any, ...]) -> None:
        """Python's own notice before it opens, renames, removes or makes a file (sys.addaudithook); the run's paths are relative."""
        if event == "open" and not args[2] & WRITES or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if not isinstance(args[0], int) and not os.fspath(args[0]).startswith("/"):
            self.operation(job)


def in_phase(watch: Watch, owner: Any, name: str, phase: str) -> None:
    """Let owner.name say that it is that phase while it runs."""
    call = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = watch.phase(phase)
        try:
            return call(*args, **kwargs)
        finally:
            watch.phase(PHASES[before])

    setattr(owner, name, wrapped)


def in_three(watch: Watch, owner: Any, job: dict[str, Any]) -> None:
    """Let owner.save_file be stopped before it, with half of the file there, and after it."""
    save_file = owner.save_file

    def wrapped(tensors: Any, file: Path, **kwargs: Any) -> None:
        watch.operation(job)
        save_file(tensors, file, **kwargs)
        whole = Path(file).read_bytes()
        os.truncate(file, len(whole) // 2)
        watch.operation(job)
        descriptor = os.open(os.path.abspath(file), os.O_WRONLY)  # an absolute path: not counted again
        os.write(descriptor, whole)
        os.close(descriptor)
        watch.operation(job)

    owner.save_file = wrapped


def child(job: dict[str, Any], watch: Watch) -> int:
    """One run; returns its exit status."""
    import model
    import talan
    import train

    os.chdir(job["folder"])
    log = os.open(os.path.abspath("output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["keep"]:
        train.remove_folder = lambda folder: None
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    for owner, name, phase in ((train, "train", "step"), (train, "mean_loss", "evaluate"), (train, "save_checkpoint", "checkpoint"),
                               (os, "replace", "rename"), (train, "remove_folder", "remove"), (train, "finish_run", "finish")):
        in_phase(watch, owner, name, phase)
    for owner in (model, talan, train):
        in_three(watch, owner, job)
    sys.addaudithook(lambda event, args: watch.audit(job, event, args))
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in job["settings"].items()}
    try:
        train.main(settings)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"train.py: {error}")
        return 1
    return 0


def run_job(job: dict[str, Any]) -> Ended:
    """Fork a child, stop it when its time has come, and wait for its end."""
    watch, began = Watch(), time.perf_counter()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            status = child(job, watch)
        finally:
            sys.stdout.flush()
            os._exit(status)
    if job["after"] is not None:
        time.sleep(job["after"])
        os.kill(pid, signals.SIGKILL)  # a child that has ended is still ours to signal until it is waited for
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    phase, operations = watch.read()
    return Ended(status, PHASES[phase], operations, time.perf_counter() - began)


def main() -> None:
    """Serve jobs, one JSON a line, until the input ends."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch._dynamo  # noqa: F401  the optimizer's first step would, for a second
    import train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(asdict(run_job(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
