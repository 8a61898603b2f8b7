"""data/prepare.py: downloads that break off, sources that are wrong, rows that do not fit; nothing is ever half-written. No network."""

import gzip
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prepare as p

ROOT = Path(__file__).resolve().parents[1]
RAW = b"".join(b'{"q": "%06d", "a": "%d \xc3\xa9"}\n' % (i, i) for i in range(8000))  # a quarter of a MB: several reads


def to_rows(files):
    """Stands in for a converter: one row a line of each file, {file key: split}."""
    return {key: [{"id": f"{key}-{i}", "prompt": row["q"], "completion": f"so {row['a']}", "answer": row["a"]}
                  for i, row in enumerate(map(json.loads, content.decode().splitlines()))] for key, content in files.items()}


def sha(content):
    return hashlib.sha256(content).hexdigest()


def pin(content, url="https://example.invalid/0/test.jsonl", local="toy/test.jsonl", **changed):
    return {"url": url, "local": local, "bytes": len(content), "sha256": sha(content), **changed}


class Server(ThreadingHTTPServer):
    """Serves `content` at every path. `modes`: one a request, the last one stays. Records (mode, Range header, bytes sent)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.modes, self.seen = RAW, ["whole"], []
        self.url = f"http://127.0.0.1:{self.server_port}/0/test.jsonl"

    def handle_error(self, request, client_address):
        """A client that left is no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        mode = server.modes.pop(0) if len(server.modes) > 1 else server.modes[0]
        first = int(wanted[len("bytes="):-1]) if wanted and mode != "no ranges" else 0
        body = server.content[first:]
        status = mode if isinstance(mode, int) else 206 if first else 200
        body = {"half": body[:len(body) // 2], "wrong": body[:-1] + b"#", "short": body[:-3], "long": body + b"##"}.get(mode, body)
        body = b"" if isinstance(mode, int) else body
        server.seen.append((mode, wanted, len(body)))
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        if status == 302:
            self.send_header("Location", server.elsewhere)
        self.send_header("Content-Length", str(len(server.content) - first if mode in ("half", "slow") else len(body)))
        self.end_headers()
        if mode == "slow":
            self.wfile.write(body[:len(body) // 2])
            time.sleep(30)
        else:
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(p, "ALLOWED", ("https://", "http://127.0.0.1"))
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A data folder of its own with the data set `toy`; the embedded task `math` has nothing to prepare."""
    home = tmp_path / "data"
    home.mkdir()
    monkeypatch.setattr(p, "HERE", home)
    monkeypatch.setattr(p, "WAITS", (0, 0))
    tasks = {name: SimpleNamespace(convert=to_rows) for name in ("toy", "other")}
    monkeypatch.setattr(p, "TASKS", tasks | {"math": SimpleNamespace(convert=None, file="tiny/test/math.jsonl")})
    return home


def pinned(home, **sets):
    (home / "sources.json").write_text(json.dumps(sets), encoding="utf-8")


def run(*names, folder=None):
    return list(p.prepare(names, folder))


def left(home):
    """Every file below the data folder, without sources.json and compiled modules."""
    return sorted(str(file.relative_to(home)) for file in home.rglob("*") if file.is_file() and file.name != "sources.json" and file.suffix != ".pyc")


def local(tmp_path, content=RAW, name="toy/test.jsonl"):
    (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "given" / name).write_bytes(content)
    return tmp_path / "given"


def prepared(home, name="toy"):
    return to_rows({"test": RAW})["test"] == [json.loads(line) for line in (home / name / "test.jsonl").read_bytes().decode().split("\n")[:-1]]


# ---- downloads

def test_download_converts_records_and_is_idempotent(home, server, monkeypatch):
    pinned(home, toy={"test": pin(RAW, server.url)})
    assert run("toy") == [f"{home / 'toy'}: wrote test.jsonl (8000 rows)"] and prepared(home)
    written = (home / "toy/test.jsonl").read_bytes()
    assert "é".encode() in written and written.endswith(b"}\n") and b"\r" not in written
    note = json.loads((home / "toy/SOURCE.json").read_text(encoding="utf-8"))
    assert note["sources"] == {"test": {"url": server.url, "sha256": sha(RAW)}}
    assert note["files"] == {"test.jsonl": {"rows": 8000, "sha256": sha(written)}}
    assert left(home) == [f"downloads/{sha(RAW)[:12]}-test.jsonl", "toy/SOURCE.json", "toy/test.jsonl"]
    monkeypatch.setitem(p.TASKS, "toy", SimpleNamespace(convert=lambda files: 1 / 0))
    assert run("toy", "all") == [f"{home / 'toy'}: has test.jsonl (8000 rows)"] and len(server.seen) == 1


@pytest.mark.parametrize("change", ["row", "note", "gone", "code", "pin"])
def test_what_changed_is_made_again_from_the_kept_download(home, server, change):
    pinned(home, toy={"test": pin(RAW, server.url)})
    run("toy")
    if change == "row":
        (home / "toy/test.jsonl").write_bytes((home / "toy/test.jsonl").read_bytes().replace(b"000001", b"000002", 1))
    elif change == "note":
        (home / "toy/SOURCE.json").write_text("[1]")
    elif change == "gone":
        (home / "toy/test.jsonl").unlink()
    elif change == "code":
        (home / "toy.py").write_text("# another converter")
    else:
        pinned(home, toy={"test": pin(RAW, server.url + "?again")})
    assert "wrote" in run("toy")[0] and prepared(home)
    assert len(server.seen) == (2 if change == "pin" else 1)  # another url is another file


def test_a_broken_download_goes_on_where_it_broke_off(home, server):
    server.modes = ["half", "half", "whole"]
    pinned(home, toy={"test": pin(RAW, server.url)})
    run("toy")
    half, quarter = len(RAW) // 2, (len(RAW) - len(RAW) // 2) // 2
    assert [seen[1] for seen in server.seen] == [None, f"bytes={half}-", f"bytes={half + quarter}-"] and prepared(home)
    assert sum(seen[2] for seen in server.seen) == len(RAW)  # no byte twice


def test_a_later_run_goes_on_too(home, server):
    server.modes = ["half", 503]
    pinned(home, toy={"test": pin(RAW, server.url)})
    with pytest.raises(ValueError, match=r"(?s)toy: cannot download .*503.*--source FOLDER that holds toy/test\.jsonl"):
        run("toy")
    assert left(home) == [f"downloads/{sha(RAW)[:12]}-test.jsonl.part"] and len(server.seen) == 3  # one try, then one after each wait
    server.modes, server.seen = ["whole"], []
    run("toy")
    assert server.seen == [("whole", f"bytes={len(RAW) // 2}-", len(RAW) - len(RAW) // 2)] and prepared(home)


@pytest.mark.parametrize("modes", [["half", "no ranges"], ["half", 416, "whole"], [500, "whole"], [429, "whole"]])
def test_servers_that_do_not_resume_or_are_busy(home, server, modes):
    server.modes = modes
    pinned(home, toy={"test": pin(RAW, server.url)})
    run("toy")
    assert prepared(home) and server.seen[-1][2] == len(RAW)


def test_a_complete_part_file_needs_no_request(home, server):
    part = home / f"downloads/{sha(RAW)[:12]}-test.jsonl.part"
    part.parent.mkdir()
    part.write_bytes(RAW)
    pinned(home, toy={"test": pin(RAW, server.url)})
    run("toy")
    assert server.seen == [] and prepared(home) and not part.exists()


@pytest.mark.parametrize("mode, count", [(404, 1), (403, 1), (500, 3), ("short", 3)])
def test_a_download_that_fails_for_good(home, server, mode, count):
    server.content = b"" if mode == "short" else RAW
    server.modes = [mode]
    pinned(home, toy={"test": pin(RAW, server.url)})
    with pytest.raises(ValueError, match=f"toy: cannot download {server.url}: .*{'broke off after 0 of' if mode == 'short' else mode}"):
        run("toy")
    assert len(server.seen) == count and not (home / "toy").exists()


def test_no_server(home, server):
    server.shutdown()
    server.server_close()
    pinned(home, toy={"test": pin(RAW, server.url)})
    with pytest.raises(ValueError, match=r"(?s)cannot download .*refused.*run again to go on.*--source FOLDER"):
        run("toy")


@pytest.mark.parametrize("mode", ["wrong", "long"])
def test_wrong_bytes_are_deleted(home, server, mode):
    server.modes = [mode, "whole"]
    pinned(home, toy={"test": pin(RAW, server.url)})
    with pytest.raises(ValueError, match=rf"toy: .*: expected {len(RAW)} bytes, sha256 {sha(RAW)}, found \d+ bytes, sha256 .*deleted; run again"):
        run("toy")
    assert left(home) == []
    run("toy")
    assert prepared(home)


def test_more_than_pinned_is_not_read_to_its_end(home, server):
    """A page of another size, or one without an end, costs no more than the pinned size and one read."""
    pinned(home, toy={"test": pin(RAW[:1000], server.url)})
    with pytest.raises(ValueError, match=r"expected 1000 bytes.* found (\d+) bytes") as caught:
        run("toy")
    assert int(re.search(r"found (\d+)", str(caught.value))[1]) <= 1000 + (1 << 16)


def test_a_kept_download_is_verified_again(home, server):
    pinned(home, toy={"test": pin(RAW, server.url)})
    run("toy")
    (home / f"downloads/{sha(RAW)[:12]}-test.jsonl").write_bytes(RAW[:-1] + b"#")
    shutil.rmtree(home / "toy")
    with pytest.raises(ValueError, match="deleted; run again"):
        run("toy")
    assert left(home) == []


@pytest.mark.parametrize("scheme", ["file", "http", "ftp"])
def test_nothing_but_https(home, server, monkeypatch, tmp_path, scheme):
    monkeypatch.setattr(p, "ALLOWED", ("https://",))
    monkeypatch.setattr("urllib.request.FTPHandler.ftp_open", lambda *_: pytest.fail("opened ftp"))
    url = {"file": (local(tmp_path) / "toy/test.jsonl").as_uri(), "http": server.url, "ftp": "ftp://127.0.0.1/x"}[scheme]
    pinned(home, toy={"test": pin(RAW, url)})
    with pytest.raises(ValueError, match="toy: .*: expected https"):
        run("toy")
    assert left(home) == [] and server.seen == []


def test_a_redirect_stays_on_https(home, server, monkeypatch, tmp_path):
    server.modes, server.elsewhere = [302, "whole"], server.url.replace("127.0.0.1", "localhost")
    pinned(home, toy={"test": pin(RAW, server.url)})
    with pytest.raises(ValueError, match="expected https all the way, found a redirect to http://localhost"):
        run("toy")
    assert left(home) == []
    server.modes, server.elsewhere = [302], (local(tmp_path) / "toy/test.jsonl").as_uri()
    with pytest.raises(ValueError, match="toy: cannot download"):
        run("toy")
    assert left(home) == []


# ---- .gz and local folders

def test_a_url_that_is_gz_is_verified_packed_and_converted_unpacked(home, server, tmp_path):
    server.content = gzip.compress(RAW)
    source = pin(server.content, server.url + ".gz", "toy/test.jsonl.gz")
    pinned(home, toy={"test": source}, other={"test": source})
    run("toy")
    assert prepared(home)
    run("other", folder=local(tmp_path, server.content, "toy/test.jsonl.gz"))
    assert prepared(home, "other")


@pytest.mark.parametrize("name, content", [("toy/test.jsonl", RAW), ("toy/test.jsonl.gz", gzip.compress(RAW)),
                                           ("toy/test.jsonl.gz", gzip.compress(RAW[:99]) + gzip.compress(RAW[99:]))])
def test_a_local_folder_holds_files_plain_or_packed(home, tmp_path, name, content):
    pinned(home, toy={"test": pin(RAW)})
    run("toy", folder=local(tmp_path, content, name))
    assert prepared(home) and left(home) == ["toy/SOURCE.json", "toy/test.jsonl"]
    assert run("toy") == [f"{home / 'toy'}: has test.jsonl (8000 rows)"]  # no network, no folder


@pytest.mark.parametrize("name, content, said", [
    ("toy/test.jsonl", RAW[:-1] + b"#", "expected .* found .*another version"), ("toy/test.jsonl", RAW[:-1], f"found {len(RAW) - 1} bytes"),
    ("toy/test.jsonl.gz", gzip.compress(RAW[1:]), "expected .* found"), ("toy/test.jsonl.gz", gzip.compress(RAW)[:-9], "whole .gz"),
    ("toy/test.jsonl.gz", RAW, "whole .gz"), ("toy/test.jsonl.gz", gzip.compress(b"\0" * (1 << 21)), "at most 1048576 bytes unpacked")])
def test_a_local_file_that_is_wrong(home, tmp_path, monkeypatch, name, content, said):
    monkeypatch.setattr(p, "LIMIT", 1 << 20)
    pinned(home, toy={"test": pin(RAW)})
    folder = local(tmp_path, content, name)
    with pytest.raises(ValueError, match=f"toy: .*{re.escape(name)}.*{said}"):
        run("toy", folder=folder)
    assert left(home) == [] and (folder / name).read_bytes() == content  # the user's own file stays


def test_every_missing_local_file_is_named_before_anything_is_written(home, tmp_path):
    pinned(home, toy={"test": pin(RAW), "dev": pin(RAW, local="toy/dev.jsonl")}, other={"test": pin(RAW, local="other/test.jsonl")})
    with pytest.raises(ValueError, match=r"(?s)lacks 2 of 3 files.*nothing was written.*toy/dev\.jsonl.*other/test\.jsonl"):
        run("all", folder=local(tmp_path))
    assert left(home) == []


# ---- rows

GOOD = {"id": "a", "prompt": "p", "completion": "c", "answer": ""}
PICK = {"choices": ["x", "y", "z"], "answer": "C"}


@pytest.mark.parametrize("extra", [{}, PICK, {"entry_point": "f", "tests": "t", "plus_tests": "t", "code": "c"}, {"subject": "s", "completion": ""}])
def test_rows_that_fit(extra):
    p.check_splits({"test": [GOOD | extra, GOOD | extra | {"id": "b"}], "dev": [GOOD | extra]})


@pytest.mark.parametrize("change, said", [
    ({"id": 1}, "id: '1'"), ({"id": ""}, "id: ''"), ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"completion": 3}, "completion"),
    ({"answer": 4}, "answer: '4'"), ({"choices": ["x"], "answer": "A"}, "choices"), ({"choices": "xy", "answer": "A"}, "choices"),
    ({"choices": ["x", 2], "answer": "A"}, "choices"), (PICK | {"answer": "D"}, "answer: 'D'"), (PICK | {"answer": "a"}, "answer"),
    (PICK | {"answer": ""}, "answer"), (PICK | {"answer": "AB"}, "answer"), ({"tests": ["t"]}, "tests"), ({"entry_point": None}, "entry_point"),
    ({"plus_tests": 1}, "plus_tests"), ({"subject": 1}, "subject")])
def test_rows_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match=f"test:2: {said}"):
        p.check_splits({"test": [GOOD | {"id": "first"}, GOOD | change]})


def test_missing_fields_same_ids_and_empty_splits():
    with pytest.raises(ValueError, match=r"(?s)^6 .*dev: no rows.*test:1: id: 'a'.*test:2: id: 'a'.*test:3: prompt.*completion.*answer: 'None'"):
        p.check_splits({"dev": [], "test": [GOOD, GOOD, {"id": "c"}]})
    with pytest.raises(ValueError, match="no splits"):
        p.check_splits({})
    with pytest.raises(ValueError, match="^99 fields") as caught:
        p.check_splits({"test": [GOOD | {"id": str(i), "answer": i} for i in range(99)]})
    assert str(caught.value).count("\n") == 10


# ---- nothing half-written

def fail_to_convert(files):
    raise ValueError("no number after ####")


@pytest.mark.parametrize("convert, said", [(fail_to_convert, "no number"), (lambda files: {"test": []}, "no rows"),
                                           (lambda files: {"dev": [GOOD], "test": [GOOD | {"answer": "\ud800"}]}, "surrogates")])
def test_a_failing_conversion_leaves_what_was_there(home, tmp_path, monkeypatch, convert, said):
    pinned(home, toy={"test": pin(RAW)}, other={"test": pin(RAW)})
    folder = local(tmp_path)
    run("toy", folder=folder)
    before = {file: (home / file).read_bytes() for file in left(home)}
    (home / "new.py").write_text("# new")  # so that it is made again
    for name in ("toy", "other"):
        monkeypatch.setitem(p.TASKS, name, SimpleNamespace(convert=convert))
        with pytest.raises(ValueError, match=f"(?s)^{name}: .*{said}"):
            run(name, folder=folder)
    assert {file: (home / file).read_bytes() for file in left(home) if file != "new.py"} == before and not (home / "other").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_while_writing_leaves_what_was_there(home, tmp_path, monkeypatch, stop):
    pinned(home, toy={"test": pin(RAW), "dev": pin(RAW)})
    folder, real = local(tmp_path), Path.write_bytes

    def write_bytes(self, content):
        real(self, content[:9])
        if self.name == "dev.jsonl":
            raise stop

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        run("toy", folder=folder)
    assert left(home) == [] and not list(home.glob(".toy*"))


# ---- the command line

@pytest.fixture
def script(tmp_path):
    """A copy of the script beside stand-in sources and tasks: command(*arguments) runs it from another folder."""
    home = tmp_path / "copy/data"
    home.mkdir(parents=True)
    for name in ("prepare.py", "settings.py", "task.py"):
        shutil.copy(ROOT / "data" / name, home)
    (home / "tasks.py").write_text(
        "import json\nfrom types import SimpleNamespace as N\n"
        "def convert(files):\n    return {k: [{'id': r['q'], 'prompt': r['q'], 'completion': r['a'], 'answer': r['a']}"
        " for r in map(json.loads, b.decode().splitlines())] for k, b in files.items()}\n"
        "TASKS = {'toy': N(convert=convert), 'toy_two': N(convert=convert), 'math': N(convert=None, file='tiny/test/math.jsonl')}\n",
        encoding="utf-8")
    pinned(home, toy={"test": pin(RAW)}, toy_two={"test": pin(RAW, local="toy_two.jsonl")})

    def command(*arguments, start=(str(home / "prepare.py"),), **options):
        return subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=20, **options)

    command.home = home
    return command


def test_command_line(script, tmp_path):
    done = script("toy", "toy", "--source", local(tmp_path))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{script.home / 'toy'}: wrote test.jsonl (8000 rows)\n"
    done = script("all", "--source", tmp_path / "given")
    assert done.returncode == 1 and done.stdout == "" and "lacks 1 of 1 files" in done.stderr and "\n  toy_two.jsonl\n" in done.stderr


@pytest.mark.parametrize("arguments, said", [
    ([], ["give one or more names, or all", "toy             0.3 MB", "toy_two "]),
    (["toi", "math", "toy", "xyzzy", "--source", "."],
     ["toi: no such data set; did you mean toy?\n",
      "math: comes with the project, nothing to prepare", "xyzzy: no such data set\n", "names: toy, toy_two, "]),
    (["toy", "--sauce", "."], ["did you mean --source?"]),
    (["toy", "--source", "nowhere"], ["nowhere lacks 1 of 1 files", "toy/test.jsonl"])])
def test_command_line_messages(script, arguments, said):
    done = script(*arguments)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("prepare.py: ") and "Traceback" not in done.stderr
    assert all(text in done.stderr for text in said) and left(script.home) == ["prepare.py", "settings.py", "task.py", "tasks.py"]


def test_ctrl_c_keeps_the_part_file(script, server):
    server.modes = ["slow", "whole"]
    pinned(script.home, toy={"test": pin(RAW, server.url)})
    code = (f"import sys; sys.path.insert(0, {str(script.home.parent)!r}); from data import prepare as p\n"
            "p.ALLOWED = ('http://127.0.0.1',); p.main(['toy'])")
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    part, deadline = script.home / f"downloads/{sha(RAW)[:12]}-test.jsonl.part", time.time() + 10
    while not (part.exists() and part.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=10)
    assert child.returncode == 1 and said.strip().endswith("prepare.py: stopped; run the same command again to go on") and "Traceback" not in said
    assert 0 < (have := part.stat().st_size) <= len(RAW) // 2 and not (script.home / "toy").exists()
    done = script(start=("-c", code))
    assert done.returncode == 0, done.stderr
    assert server.seen[-1] == ("whole", f"bytes={have}-", len(RAW) - have)


def test_torch_and_numpy_are_not_imported():
    code = "import sys; sys.path.insert(0, '.'); import data.prepare; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ---- sources.json

SOURCES = json.loads((ROOT / "data/sources.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SOURCES)
def test_pinned_sources(name):
    assert SOURCES[name]
    for key, source in SOURCES[name].items():
        assert set(source) == {"url", "local", "bytes", "sha256"}, key
        assert re.fullmatch(r"https://[\w.]+/.*/[0-9a-f]{40}/.+", source["url"]) and ".." not in source["url"], key
        assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"]) and type(source["bytes"]) is int and source["bytes"] > 0, key
        assert re.fullmatch(r"[\w-]+(/[\w-]+)*/[\w-]+(\.[a-z]+)+", source["local"]), key  # relative, no ..
        assert source["local"].endswith(".gz") == source["url"].endswith(".gz"), key


def test_every_data_set_is_a_task_with_a_converter():
    assert {name for name, task in p.TASKS.items() if task.convert} == set(SOURCES)
    files = [source["local"] for files in SOURCES.values() for source in files.values()]
    assert len(files) == len(set(files))


def test_a_task_of_another_data_set_names_it():
    with pytest.raises(ValueError, match="^mbpp_plus: is made with mbpp\n  math: comes with the project, nothing to prepare\n"):
        p.check_names(["mbpp_plus", "math"], ["gsm8k", "mbpp"])
