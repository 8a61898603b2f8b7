"""Run untrusted programs (HumanEval, MBPP completions) and say whether all of their tests truly ran to the end.

    run_program() --> supervisor: own session, namespaces --fork--> worker: confined, execs program, then tests
        ^                 kills the worker when told to, or late                   |
        +------------- one pipe for its output, one for the verdict ---------------+

A program has passed when a random token came back after its tests; exit codes and printed text count for nothing. The tests
see the program's names, over builtins copied before it ran. A program may start no process or thread, gets no environment,
no input, and one temporary folder. Protections: resource limits everywhere; on Linux, Landlock (files, TCP, signals) and
namespaces (processes, network, read-only mounts) where the system allows them; as root, an unused user id without
capabilities. missing_protections() tries each and names those that do not hold here; on macOS that is most of them.

Not defended: program and tests share one interpreter. A program written against this very file can find the token or change
the tests (ctypes, trace functions, the frames of a running test), patch modules that the tests import, define a name of
its own that they use (a function called sum is what MBPP's tests of it want), or return objects equal to everything.
Nor are socket files outside /run, nor the kernel: this holds off what models write, not an attacker with an exploit. Standard
library only, and tqdm.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import functools
import gc
import itertools
import linecache
import marshal
import os
import resource
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass

PROBES = {  # sentence: what must fail in a confined program; ELSEWHERE is a file that any user may write
    "no network namespace: a program can open sockets": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))",
    "no process namespace: a program can signal other processes of its user, this one included": "os.kill(os.getppid() or 9**9, 0)",
    "no process limit: a program can start processes, which may outlive it": "os.fork() or os._exit(0)",
    "no memory limit: a program can use all of the memory": "bytearray(LIMIT * 2**21)",
    "no Landlock: a program can write and delete files elsewhere": "open(ELSEWHERE, 'a')",
    "no Landlock: a program can read files elsewhere": "open(ELSEWHERE)",
    "no mount namespace: a program can fill the disk, and change modes and times of its user's files": "os.chmod(ELSEWHERE, 0o666)",
}
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
READABLE = (
    sys.prefix,
    sys.base_prefix,
    *sys.path,
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
EXECUTE, WRITE, READ, LIST, TRUNCATE = 1, 2, 4, 8, 1 << 14  # Landlock's rights
LIBC = ctypes.CDLL(None)  # for the calls that Python has no name for


@dataclass(frozen=True)
class Limits:
    """Of one program: wall-clock seconds, memory, bytes it may print, size of its files, processes and threads it may start."""

    seconds: float = 10.0
    memory_mb: int = 1024
    output_bytes: int = 65536
    file_mb: int = 16
    processes: int = 0  # no more than this, but where its user runs other processes, they count too


@dataclass(frozen=True)
class Verdict:
    """Whether the tests ran to the end, and one line: "passed", "AssertionError: ...", "time limit of 10 s", ..."""

    passed: bool
    why: str


def run_program(program: str, tests: str, limits: Limits = Limits()) -> Verdict:  # noqa: B008 - frozen
    """The verdict on one program. A program can do nothing that raises here."""
    return run(program, tests, limits, threading.Event())[0]


def run_programs(
    jobs: Sequence[tuple[str, str]], limits: Limits = Limits(), workers: int = 0
) -> list[Verdict]:  # noqa: B008
    """Verdicts of (program, tests) pairs, in their order; 0 workers: one a usable core, torchrun's processes share them.

    Ctrl-C ends all programs, then raises.
    """
    from tqdm import tqdm  # not at the top: every child imports this file

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    stop = threading.Event()
    with ThreadPoolExecutor(
        workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    ) as pool:
        futures = [pool.submit(run, program, tests, limits, stop) for program, tests in jobs]
        try:
            for _ in tqdm(
                as_completed(futures), "programs", len(futures), disable=None, leave=False
            ):
                pass
            return [future.result()[0] for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@functools.cache
def missing_protections() -> list[str]:
    """One sentence a protection that does not hold on this system, found by trying to break each from inside."""
    with tempfile.NamedTemporaryFile() as elsewhere:
        os.chmod(elsewhere.name, 0o666)
        program = f"import os\nLIMIT, ELSEWHERE = {Limits.memory_mb}, {elsewhere.name!r}\n"
        for number, attempt in enumerate(PROBES.values()):
            program += f"try:\n {attempt}\nexcept BaseException:\n pass\nelse:\n print({number}, flush=True)\n"
        verdict, output = run(program, "", Limits(), threading.Event())
    if not verdict.passed:
        return [f"the sandbox does not work here, every program will fail: {verdict.why}"]
    return [
        sentence for number, sentence in enumerate(PROBES) if str(number) in output.decode().split()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Outside: one child a program
# ---------------------------------------------------------------------------------------------------------------------


def run(program: str, tests: str, limits: Limits, stop: threading.Event) -> tuple[Verdict, bytes]:
    """Verdict and output; afterwards no process and no folder is left. `stop` ends it early."""
    token = secrets.token_hex(32).encode()
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-B", __file__, *map(str, astuple(limits))],
            cwd=folder,
            start_new_session=True,
            env={
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },  # numpy's threads would count as processes
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            try:
                why, output, channel = collect(
                    child, marshal.dumps((token, program, tests)), token, limits, stop
                )
            finally:
                end(child)
    finally:
        remove(folder)
    if not why and token in channel:
        return Verdict(True, "passed"), output
    said = "".join(
        c if c.isprintable() else " "
        for c in channel.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
    )
    return Verdict(
        False, why or said or f"ended before its tests did (exit code {child.returncode})"
    ), output


def collect(
    child: subprocess.Popen[bytes], job: bytes, token: bytes, limits: Limits, stop: threading.Event
) -> tuple[str, bytes, bytes]:
    """Hand the job over and read until the child ends, its token comes or a limit is met: (limit or "", output, verdict pipe)."""
    assert child.stdin and child.stdout and child.stderr
    output, channel = bytearray(), bytearray()
    deadline = time.monotonic() + limits.seconds
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(job)
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ, output)
        ready.register(child.stderr, selectors.EVENT_READ, channel)
        why = ""
        while ready.get_map() and token not in channel and not why:
            for key, _ in ready.select(max(0.0, min(0.2, deadline - time.monotonic()))):
                piece = os.read(key.fd, 65536)
                key.data.extend(piece)
                if not piece:
                    ready.unregister(key.fd)
            too_much, late = (
                len(output) + len(channel) > limits.output_bytes,
                time.monotonic() > deadline,
            )
            why = (
                "output limit"
                if too_much
                else f"time limit of {limits.seconds:g} s"
                if late
                else "interrupted"
                if stop.is_set()
                else ""
            )
    return why, bytes(output), bytes(channel)


def end(child: subprocess.Popen[bytes]) -> None:
    """Have the supervisor kill the worker; then kill what is left of their session's group."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def remove(folder: str) -> None:
    """The folder and all in it, whatever its modes and however deep."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
            )


# ---------------------------------------------------------------------------------------------------------------------
# Inside: `python -I sandbox.py LIMITS` with (token, program, tests) on stdin, output on stdout, the verdict on stderr
# ---------------------------------------------------------------------------------------------------------------------


def supervise(limits: Limits) -> None:
    """Start the worker, and kill it when it ends, on SIGTERM, or after the time limit should nobody send one."""
    user = (
        os.getuid() or 50000 + os.getpid() % 10000
    )  # for root: a user without processes that it could signal
    alone = enter_namespaces()
    stops = (signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM)
    signal.signal(
        signal.SIGCHLD, lambda *_: None
    )  # ignored otherwise, which sigwait would not see on every system
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    worker = os.fork()
    if not worker:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        confine(limits, user, alone)
        work()
    signal.setitimer(signal.ITIMER_REAL, limits.seconds + 2)
    signal.sigwait(stops)
    os.kill(worker, signal.SIGKILL)  # if it has ended its number is still its own, until waitpid
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def enter_namespaces() -> bool:
    """Whether this process has mounts, network and IPC of its own now, and its next child has a process namespace."""
    if sys.platform != "linux":
        return False
    user, group, flags = os.getuid(), os.getgid(), NEWNS | NEWIPC | NEWPID | NEWNET
    if LIBC.unshare(flags if user == 0 else flags | NEWUSER) != 0:
        return False
    for file, text in (
        (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"))
        if user
        else ()
    ):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/self/{file}", "w") as ids,
        ):  # refused where AppArmor limits user namespaces
            ids.write(text)
    return True


def confine(limits: Limits, user: int, alone: bool) -> None:
    """Give up all rights of this process but those that a program needs. Each step does what the system allows."""
    if sys.platform == "linux":
        if alone:
            mount_folder(user, limits.file_mb)
        LIBC.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS: drop_capabilities may need one
    if user != os.getuid():
        for drop in (
            lambda: os.chown(".", user, user),
            lambda: os.setgroups([]),
            lambda: os.setgid(user),
            lambda: os.setuid(user),
        ):
            with contextlib.suppress(OSError):
                drop()
    if sys.platform == "linux":
        drop_capabilities()
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: not without its supervisor
        LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: nothing that it executes gains rights
        landlock()
    set_limits(limits)


def mount_folder(user: int, megabytes: int) -> None:
    """Every mount read-only, services' sockets in /run hidden, the working folder in memory. Only in a mount namespace of our own!"""
    read_only = struct.pack(
        "=4Q", 1, 0, 1 << 18, 0
    )  # MOUNT_ATTR_RDONLY, MS_PRIVATE: nothing travels back
    if (
        LIBC.syscall(442, -100, b"/", 0x8000, read_only, 32) == 0
    ):  # mount_setattr, all below; Linux >= 5.12
        folder = os.getcwd()
        if not folder.startswith("/run/"):
            LIBC.mount(b"sandbox", b"/run", b"tmpfs", 7, None)
        LIBC.mount(
            b"sandbox",
            os.fsencode(folder),
            b"tmpfs",
            6,
            f"size={megabytes}m,nr_inodes=10k,mode=700,uid={user},gid={os.getgid()}".encode(),
        )
        os.chdir(folder)


def drop_capabilities() -> None:
    """All of them; but where root's interpreter lies in a folder closed to others, one to read it stays. Landlock bounds that one."""
    closed = not all(os.access(path, os.R_OK) for path in (os.__file__, sys.prefix))
    for keep in (4, 2, 0) if closed else (0,):  # CAP_DAC_READ_SEARCH, else CAP_DAC_OVERRIDE
        if (
            LIBC.capset(
                struct.pack("=2I", 0x20080522, 0), struct.pack("=6I", keep, keep, 0, 0, 0, 0)
            )
            == 0
        ):
            return


def landlock() -> None:
    """Writes in the working folder only, reads there and of the interpreter; no TCP, no signals to the outside. Linux >= 5.13."""
    version = LIBC.syscall(444, None, 0, 1)
    if version < 1:
        return
    every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    rules = struct.pack("=3Q", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    ruleset = LIBC.syscall(444, rules, len(rules), 0)
    for rights, paths in (
        (every, ["."]),
        (EXECUTE | READ | LIST, READABLE),
        (READ | WRITE, DEVICES),
    ):
        for path in filter(os.path.exists, paths):
            allowed = (
                rights if os.path.isdir(path) else rights & (EXECUTE | WRITE | READ | TRUNCATE)
            )
            file = os.open(path, os.O_PATH)
            LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", allowed & every, file), 0)
            os.close(file)
    LIBC.syscall(446, ruleset, 0)
    os.close(ruleset)


def set_limits(limits: Limits) -> None:
    """Hard resource limits, none above what this process has already."""
    wanted = {
        "CPU": int(limits.seconds) + 2,
        "FSIZE": limits.file_mb * 2**20,
        "CORE": 0,
        "NOFILE": 64,
        "AS": limits.memory_mb * 2**20,
        "NPROC": limits.processes and limits.processes + 1,
    }  # itself is one; 0 forbids all even where the user has others
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
            resource.setrlimit(kind, (value, value))


def work() -> None:
    """Exec program and tests, then leave with the token written, or else with a line on what went wrong."""
    channel, leave, anything = (
        os.dup(2),
        os._exit,
        BaseException,
    )  # as names, which the program cannot replace
    os.dup2(1, 2)
    table, spare = vars(builtins), dict(vars(builtins))
    try:
        any(
            itertools.starmap(exec, steps(channel))
        )  # in C: no frame that the program can walk to holds the token
    except anything as error:
        table.update(spare)
        os.write(channel, b"\n" + reason(error))
    leave(1)


def steps(channel: int) -> Iterator[tuple[types.CodeType, dict[str, object]]]:
    """Yield the program, then its tests, each with its globals; resumed after that, write the token."""
    with open(0, "rb", closefd=False) as job:
        token, program, tests = marshal.loads(job.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    linecache.cache["<tests>"] = (
        len(tests),
        None,
        [line + "\n" for line in tests.split("\n")],
        "<tests>",
    )
    body, checks = (
        compile(program, "<program>", "exec", dont_inherit=True),
        compile(tests, "<tests>", "exec", dont_inherit=True),
    )
    module = types.ModuleType(
        "program"
    )  # not "__main__": as in HumanEval's own harness, `if __name__ == "__main__":` is false
    sys.modules.update(__main__=module, program=module)
    sys.argv = ["program"]
    names, pristine, write, leave = vars(module), dict(vars(builtins)), os.write, os._exit
    names["__builtins__"] = builtins
    gc.freeze()  # gc.get_objects() leaves this generator out now
    yield body, names
    yield checks, {**names, "__builtins__": pristine}
    write(channel, token)
    leave(0)


def reason(error: BaseException) -> bytes:
    """One line on what ended the run; an assertion without text is named by its line of the tests."""
    if isinstance(error, MemoryError):
        return b"memory limit"
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<tests>" else line
        trace = trace.tb_next
    text = (str(error).strip() or linecache.getline("<tests>", line)).strip()[:200].split("\n")[0]
    return f"{type(error).__name__}: {text}".rstrip(": ").encode("utf-8", "backslashreplace")


if __name__ == "__main__":
    supervise(Limits(float(sys.argv[1]), *map(int, sys.argv[2:])))
