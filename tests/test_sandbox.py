"""data/sandbox.py: honest programs pass, wrong ones say why, attacks neither pass nor do harm.

Every test runs beside canaries (see `outside`), which are checked after it. What
missing_protections() says is not protected on this system is not checked.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data import sandbox
from data.sandbox import Limits, Verdict, missing_protections, run_programs

ROOT = Path(__file__).resolve().parents[1]
LINUX = sys.platform == "linux"
MARK = f"{os.getpid() / 1e8:.8f}"[1:]  # on the children's command lines: a survivor is known by it
LIMITS, SHORT = Limits(seconds=float(f"90{MARK}")), Limits(seconds=float(f"1{MARK}"))
LATE = Verdict(False, f"time limit of {SHORT.seconds:g} s")
BEGIN = "import builtins, ctypes, gc, inspect, os, re, shutil, signal, subprocess, sys\n"
BEGIN += "import threading, time\nfrom socket import *\n"
HONEST, TESTS = "def f(x):\n    return x + 1\n", "assert f(1) == 2\nassert f(2) == 3"
WRONG = "assert f(1) == 2\nassert f(2) == 5"


def run(program, tests, limits=LIMITS):
    return run_programs([(program, tests)], limits)[0]


def attack(act):
    """Why a program fails that does this before its f, which fails the tests."""
    verdict = run(f"{BEGIN}{act}\n{HONEST}", WRONG)
    assert not verdict.passed
    return verdict.why


def lacks(words):
    return any(words in sentence for sentence in missing_protections())


def alive():
    """How many processes have our mark on their command line; where there is no /proc, none."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += MARK in file.read_text(errors="replace")
    return count


def wait_until(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("not within a minute")


@pytest.fixture(autouse=True)
def outside(monkeypatch, tmp_path):
    """A file that anyone may write, a process, sockets, a secret: all as before after each test."""
    missing_protections()  # cached: not in a patched world
    folder = Path(tempfile.mkdtemp(prefix="canary-"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where programs get their folders
    monkeypatch.setenv("SANDBOX_CANARY", "a secret of ours")
    file = folder / "file"
    file.write_text("alive")
    file.chmod(0o666)
    folder.chmod(0o777)
    before = file.stat()
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    process, files = subprocess.Popen(["sleep", "9999"]), len(os.listdir("/dev/fd"))
    try:
        yield str(folder), udp.getsockname(), process.pid
        wait_until(lambda: not alive())
        assert os.listdir(tmp_path) == [] and len(os.listdir("/dev/fd")) == files
        assert os.waitpid(-1, os.WNOHANG) == (0, 0) or lacks("signal other")
        assert not select.select([tcp, udp], [], [], 0)[0] or lacks("sockets")
        assert os.listdir(folder) == ["file"] or lacks("write and delete")
        assert file.stat().st_mtime == before.st_mtime or lacks("write and delete")
        assert file.stat().st_mode == before.st_mode or lacks("change modes")
    finally:
        process.kill()
        process.wait()
        tcp.close(), udp.close()
        shutil.rmtree(folder, ignore_errors=True)


POOL = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(32) as p:\n"
POOL += "    found = list(p.map(lambda x: time.sleep(0.001) or x * x, range(200)))"
FLOOD = "while True:\n    for fd in range(3, 20):\n        try: os.write(fd, b'passed\\n' * 999)\n"
FLOOD += "        except OSError: pass"  # among them the verdict's own pipe
MANY = "gate = threading.Event()\nmany = [threading.Thread(target=gate.wait) for _ in range(100)]\n"
MANY += "for t in many: t.start()\nalive = len(many), bytearray(10**8)\ngate.set()"
GOOD = [  # before an honest f
    ("", ""),
    ("def sum(a, b):\n    return a * b", "assert sum(2, 3) == 6"),
    ("import numpy", "assert numpy.ones(3).sum() == 3"),
    ("import pickle\nclass A: pass", "assert type(pickle.loads(pickle.dumps(A()))) is A"),
    ("with open('note', 'w') as f: f.write('1')", "assert open('note').read() == '1'"),
    ("if __name__ == '__main__':\n    input()", "assert sys.stdin.read() == ''"),
    ("seen = {*os.environ, *sys.argv}", "assert not seen & {'PATH', 'HOME', 'SANDBOX_CANARY'}"),
    # what is printed is thrown away, however much
    ("print('x' * 10**7)", "print('y' * 10**7)"),
    ("for _ in range(9**5): print('some line of text', file=sys.stderr)", ""),
    ("for _ in range(400): os.write(1, b'y' * 10**5), os.write(2, b'y' * 10**5)", ""),
    ("os.close(0)\nos.close(1)\nos.close(2)", ""),
    (FLOOD.replace("while True", "for _ in range(99)"), ""),
    # source and user
    ("", f"assert inspect.getsource(f) == {HONEST!r}"),
    ("g = lambda: 3", "assert inspect.getsource(g) == 'g = lambda: 3\\n'"),
    ("class A:\n    def g(self): pass", "assert inspect.getsource(A).endswith('(self): pass\\n')"),
    ("", "def h(): return 3\nassert inspect.getsource(h) == 'def h(): return 3\\n'"),
    ("import getpass", "assert getpass.getuser() == os.environ['USER'] != ''"),
]
THREADS = [
    ("t = threading.Thread(target=print)\nt.start()", "t.join()"),
    ("threading.Thread(target=time.sleep, args=(600,)).start()", ""),
    ("threading.Thread(target=lambda: 1 / 0).start()", "time.sleep(0.1)"),
    (POOL, "assert found == [x * x for x in range(200)]"),
    (MANY, "assert alive[0] == 100"),
    ("import asyncio", "assert asyncio.run(asyncio.to_thread(abs, -3)) == 3"),
    ("import multiprocessing.dummy as m", "assert m.Pool(4).map(abs, [-1, -2]) == [1, 2]"),
]
BAD = [
    (HONEST, WRONG, "AssertionError: assert f(2) == 5"),
    (HONEST, "def g(f):\n    assert f(1) == 0\ng(f)", "AssertionError: assert f(1) == 0"),
    ("", TESTS, "NameError: name 'f' is not defined"),
    ("def f(x:\n", TESTS, "SyntaxError: "),
    (HONEST, "assert (", "SyntaxError: "),
    ("x = '\ud800'", TESTS, "UnicodeEncodeError: "),
    ("x = " + "(" * 5000, TESTS, ("SyntaxError", "MemoryError", "memory", "Recursion")),
    ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", TESTS, "ended before"),
    ("raise ValueError('\\n\\n' * 10**6 + 'end')", "", "ValueError: end"),
    ("raise ValueError(chr(0xd800) + '\\x1b[2J\\r\\u2028' + 'x' * 10**7)", "", "ValueError: "),
    ("x = []\nfor _ in range(2000): x.append(bytearray(10**6))", "", "memory limit"),
    ("open('big', 'wb').write(b'x' * 3 * 2**24)", "", "OSError"),
    # attempts to leave with a pass
    ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", "", "SystemExit: 0"),
    ("import os\nclass A:\n    def __del__(self): os._exit(0)\na = A()", WRONG, ""),
    ("import sys\nsys.settrace(lambda *a: 1 / 0)\n" + HONEST, WRONG, ""),
    ("import os, threading\nthreading.Timer(0, os._exit, [0]).start()\nwhile True: pass", "", ""),
    ("import os\nos.closerange(0, 64)", "", "ended before"),
    ("import os\nprint('passed', flush=True)\nos._exit(0)", "", "ended before"),
]


@pytest.mark.parametrize("program, tests", GOOD + THREADS)
def test_honest_programs_pass(program, tests):
    no_threads = LINUX and os.uname().machine not in sandbox.SYSCALLS
    if (program, tests) in THREADS and no_threads or "dummy" in program and lacks("fill the disk"):
        pytest.skip("no seccomp filter for this machine, or no /dev/shm for semaphores")
    assert run(f"{BEGIN}{program}\n{HONEST}", f"{tests}\n{TESTS}") == Verdict(True, "passed")


@pytest.mark.parametrize("program, tests, why", BAD)
def test_wrong_programs_fail_and_say_why(program, tests, why):
    verdict = run(program, tests)
    if why == "memory limit" and lacks("memory"):
        pytest.skip("nothing limits it")
    assert not verdict.passed and verdict.why.startswith(why), verdict
    assert len(verdict.why) < 300 and verdict.why.isprintable()


def test_many_and_large_programs_in_order():
    jobs = [(HONEST, f"assert f(0) == {n % 2}, 'number {n}'") for n in range(4)]
    jobs.append((HONEST, f"x = {'7' * 2000000!r}\nassert len(x) == 2000000\n{TESTS}"))
    found = [verdict.why for verdict in run_programs(jobs, replace(LIMITS, memory_mb=2048), 3)]
    wrong = [f"AssertionError: number {n}" for n in (0, 2)]
    assert found == [wrong[0], "passed", wrong[1], "passed", "passed"] and run_programs([]) == []


DEAF = """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
try: os.setsid(), ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
except (OSError, AttributeError): pass
while True:
    try: time.sleep(9)
    except BaseException: pass"""
FORKS = "while True:\n    try: os.fork() or os.setsid()\n    except OSError: pass"
PRINTS = ["while True: print('y' * 999)", "while True: os.write(2, b'y' * 999)"]


@pytest.mark.parametrize("program", ["while True: pass", *PRINTS, DEAF, FLOOD, FORKS])
def test_what_does_not_end_is_ended(program):
    if program != FORKS or not lacks("start processes"):
        assert run_programs([(BEGIN + program, ""), ("", BEGIN + program)], SHORT) == [LATE, LATE]


@pytest.mark.parametrize("more", [{}, {"memory_mb": 8192}, {"threads": 20}])
def test_threads_are_bounded(more):
    bomb = f"{BEGIN}count, gate = 0, threading.Event()\ntry:\n    while count < 9999:\n"
    bomb += "        threading.Thread(target=gate.wait).start()\n        count += 1\n"
    limits = replace(LIMITS, **more)
    why = run(bomb + "except RuntimeError: pass", "assert False, count", limits).why
    others = 0 if os.getuid() == 0 else 4096  # of a user, the threads of all programs count
    assert int(why.removeprefix("AssertionError: ")) <= limits.threads + others or not LINUX


CALL = "if ctypes.CDLL(None).syscall({}) == -1: raise OSError"
ATTACKS = {  # what holds them off: attempts; F is a file of others, D its folder, TO our sockets
    "start processes": f"""os.fork() or os._exit(0)|os.forkpty()[0] or os._exit(0)
subprocess.run(['true'])|os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {{}})
import multiprocessing as m; m.Process(target=print).start()|{CALL.format("56, 17, 0, 0, 0")}
{CALL.format("57")}|{CALL.format("220, 17, 0, 0, 0")}|{CALL.format("435, bytes(88), 88")}""",
    "write and delete": """os.remove(F)|open(F, 'w')|open(F, 'a').write('x')|os.truncate(F, 0)
os.rename(F, 'mine')|shutil.rmtree(D)|open(D + '/new', 'w')|os.mkdir(D + '/new')|os.rmdir(D)
os.symlink('x', D + '/new')|os.mkfifo(D + '/new')|os.link(F, 'm'); open('m', 'w')
os.symlink(F, 'm'); open('m', 'w')""",
    "change modes": "os.chmod(F, 0)|os.utime(F, (1, 1))|os.chmod(D, 0)",
    "read files": "open(F)|open('/etc/passwd')|open('/proc/self/environ')|os.listdir(D)",
    "sockets": "socket().connect(TO)|socket(type=SOCK_DGRAM).sendto(b'x', TO)",
}
PAIRS = [(words, act) for words in ATTACKS for act in ATTACKS[words].replace("\n", "|").split("|")]


@pytest.mark.parametrize("words, act", PAIRS)
def test_attacks_raise(outside, words, act):
    why = attack(f"D, TO = {outside[:2]}\nF = D + '/file'\n{act}")
    assert "Error" in why and "AssertionError" not in why or lacks(words)


TREES = ["os.makedirs('a/b')\nos.chmod('a', 0)", "os.symlink('/', 'root')\nos.mkfifo('pipe')"]
TREES += ["for _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')", "os.chmod('.', 0)"]


@pytest.mark.parametrize("act", TREES)
def test_the_folder_goes_whatever_is_in_it(act, tmp_path):
    assert "assert f(2) == 5" in attack(act)
    folder = tmp_path / "folder"
    folder.mkdir()  # and where it has no file system of its own
    subprocess.run([sys.executable, "-c", f"import os\n{act}"], cwd=folder)
    sandbox.remove(str(folder))
    assert not os.path.lexists(folder)


def test_killing_parent_and_neighbours(outside):
    targets = "" if lacks("signal other") else f"{outside[2]}, {os.getpid()}, -1"
    kill = f"{BEGIN}for pid in [os.getppid(), {targets}]:\n    try: os.kill(pid or 2, 9)\n"
    neighbour = (f"import time\ntime.sleep(1)\n{HONEST}", TESTS)
    jobs = [(f"{kill}    except OSError: pass\n{HONEST}", WRONG), neighbour, neighbour]
    assert [verdict.passed for verdict in run_programs(jobs, LIMITS, 3)] == [False, True, True]


@pytest.mark.parametrize("number, seconds", [(signal.SIGINT, "600"), (signal.SIGKILL, "2")])
def test_no_program_outlives_its_runner(number, seconds, tmp_path_factory):
    if not LINUX or number == signal.SIGKILL and lacks("signal other"):
        pytest.skip("nothing to see them by, or to end them with")
    folder, code = tmp_path_factory.mktemp("runner"), "from data.sandbox import *\n"
    code += f"run_programs([('import time; time.sleep(600)', '')] * 2, Limits({seconds}{MARK}), 2)"
    command, environment = [sys.executable, "-c", code], {**os.environ, "TMPDIR": str(folder)}
    runner = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
    wait_until(lambda: alive() > 2)  # itself and a supervisor or more
    runner.send_signal(number)
    error = runner.communicate()[1]
    wait_until(lambda: not alive())
    if number == signal.SIGINT:
        assert b"KeyboardInterrupt" in error and os.listdir(folder) == []


WAYS = """sys.exit(0) | SystemExit: 0
raise KeyboardInterrupt | KeyboardInterrupt
os._exit(0) | ended before its tests did (exit code 0)
os.kill(os.getpid(), 9) or os._exit(0) | ended before
raise StopIteration | ended before"""
LOOK = """
frame, seen = sys._getframe(), [*os.environ.values(), *sys.argv, *map(str, sys.orig_argv)]
while frame:
    seen += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
for thing in gc.get_objects():
    if getattr(thing, "gi_frame", None): seen += thing.gi_frame.f_locals.values()
for module in list(sys.modules.values()): seen += list(vars(module).values())
texts = str([v for v in seen if isinstance(v, (bytes, str)) and len(set(v)) > 9])
"""


@pytest.mark.parametrize("line", WAYS.split("\n"))
def test_leaving_early(line):
    way, _, why = line.partition(" | ")
    equal = f"class A:\n    def __eq__(self, other):\n        {way}\ndef f(x): return A()"
    programs = [f"{way}\n{HONEST}", f"def f(x):\n    {way}", equal]
    for verdict in run_programs([(BEGIN + program, TESTS) for program in programs], LIMITS):
        assert not verdict.passed and verdict.why.startswith(why)


@pytest.mark.parametrize("name", "AssertionError BaseException all isinstance exec EVERY".split())
def test_patched_builtins_do_not_decide(name):
    names = f"[n for n in dir(builtins) if {name!r} in (n, 'EVERY') and n != 'setattr']"
    patch = f"{BEGIN}for name in {names}: builtins.setattr(builtins, name, lambda *a, **k: True)\n"
    fair = "assert abs(-2) == 2 and len([1]) == 1 and not isinstance(1, str) and not all([0])\n"
    wrong = "assert all([f(1) == 7])"
    verdicts = run_programs([(patch + HONEST, fair + tests) for tests in (TESTS, wrong)], LIMITS)
    assert [verdict.why for verdict in verdicts] == ["passed", f"AssertionError: {wrong}"]


def test_the_token_is_not_lying_about():
    tests = "import __main__\nassert not hasattr(__main__, 'steps')\n"
    assert run(BEGIN + LOOK, f"{tests}assert not re.search('[0-9a-f]{{64}}', texts)").passed


def test_missing_protections_are_plain_sentences(monkeypatch):
    more = {"no locks: a program can do this": "pass", "no keys: a program can do that": "1 / 0"}
    monkeypatch.setattr(sandbox, "PROBES", sandbox.PROBES | more)
    found = missing_protections.__wrapped__()
    assert found == [*missing_protections(), "no locks: a program can do this"]
    monkeypatch.setattr(sandbox.sys, "executable", shutil.which("false"))
    assert "does not work here" in missing_protections.__wrapped__()[0]


def test_nothing_is_missing_where_everything_is_allowed():
    command = ["unshare", *["-U"][: os.getuid()], "--net", "--ipc", "--mount", "--pid", "--fork"]
    refused = not LINUX or subprocess.run([*command, "true"], capture_output=True).returncode
    if refused or sandbox.LIBC.syscall(444, None, 0, 1) < 6:
        pytest.skip("no namespaces or no Landlock that knows signals")
    program = "import os\nids = (*os.getresuid(), *os.getresgid(), *os.getgroups())"
    assert missing_protections() == [] and run(program, "assert os.getpid() == 1").passed
    assert run(program, "assert 0 not in ids").passed  # root is given up
