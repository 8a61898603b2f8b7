"""data/prepare.py: downloads that break off, sources that are wrong; nothing is half-written.

No network: a server of our own, and a toy data set.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import prepare as p

ROOT = Path(__file__).resolve().parents[1]
RAW = b"".join(b'{"q": "%06d", "a": "%d \xc3\xa9"}\n' % (i, i) for i in range(8000))
PACKED, SHA, SIZE = gzip.compress(RAW), hashlib.sha256(RAW).hexdigest(), len(RAW)  # several reads
KEPT, MADE = f"downloads/{SHA[:12]}-test.jsonl", ["toy/SOURCE.json", "toy/test.jsonl"]


def toy_row(source, split, i):
    return {"id": f"{split}-{i}", "prompt": source["q"], "answer": source["a"]}


def pin(home, content, url="https://example.invalid/test.jsonl", local="toy/test.jsonl"):
    digest = hashlib.sha256(content).hexdigest()
    source = {"url": url, "local": local, "bytes": len(content), "sha256": digest}
    (home / "sources.json").write_text(json.dumps({"toy": {"test": source}}))


class Handler(BaseHTTPRequestHandler):
    """Serves server.content as the next of server.modes says, the last of which stays."""

    log_message = print  # pytest shows it where a test fails

    def do_GET(self):  # noqa: N802 - the name is http.server's
        server, wanted = self.server, self.headers["Range"]
        mode = server.modes.pop(0) if len(server.modes) > 1 else server.modes[0]
        first = int(wanted[len("bytes=") : -1]) if wanted and mode != "no ranges" else 0
        whole = server.content[first:] if mode in ("whole", "half", "no ranges") else b""
        if mode in ("wrong", "long"):  # a byte, or much more
            whole = server.content[:-1] + b"#" * (1 if mode == "wrong" else 9 * SIZE)
        body = whole[: len(whole) // 2] if mode == "half" else whole
        server.asked.append(wanted and int(wanted[len("bytes=") : -1]))
        self.send_response(mode if isinstance(mode, int) else 206 if first else 200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "HERE", tmp_path / "data")
    monkeypatch.setattr(p, "WAITS", (0, 0))
    monkeypatch.setitem(p.CONVERTERS, "toy", p.partial(p.convert_rows, p.json_lines, toy_row))
    p.HERE.mkdir()
    return p.HERE


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.modes, server.asked = RAW, ["whole"], []
        server.url = f"http://127.0.0.1:{server.server_port}/0/test.jsonl"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        yield server
        server.shutdown()


def run(folder=None):
    return list(p.prepare(["toy"], folder))


def left(home):
    files = [file for file in home.rglob("*.*") if file.is_file() and file.name != "sources.json"]
    return sorted(str(file.relative_to(home)) for file in files)


def prepared(home):
    rows = [toy_row(json.loads(line), "test", i) for i, line in enumerate(RAW.splitlines())]
    made = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return (home / "toy/test.jsonl").read_bytes() == made.encode()


HALF = SIZE // 2
MORE = HALF + (SIZE - HALF) // 2
DOWNLOADS = [  # what the server does, the first byte that each request asks for, the error
    (["whole"], [None], ""),
    (["half", "half", "whole"], [None, HALF, MORE], ""),
    (["half", "no ranges"], [None, HALF], ""),
    (["half", 416, "whole"], [None, HALF, None], ""),
    ([500, "whole"], [None, None], ""),
    (["half", 503], [None, HALF, HALF], r"503.*resume, or --source FOLDER that holds toy/test\.js"),
    ([404], [None], "404"),
    (["empty"], [None, None, None], f"broke off after 0 of {SIZE}"),
    (["wrong"], [None], f"expected {SIZE} bytes, sha256 {SHA}, found {SIZE} .*deleted; run again"),
    (["long"], [None], r"found [23]\d{5} bytes.*deleted; run again"),  # not read to its end
]


@pytest.mark.parametrize("modes, asked, said", DOWNLOADS)
def test_downloads(home, server, modes, asked, said):
    server.modes = list(modes)
    pin(home, RAW, server.url)
    if said:
        with pytest.raises(ValueError, match=f"^toy: .*{said}"):
            run()
        assert left(home) == ([f"{KEPT}.part"] if "half" in modes or "empty" in modes else [])
    else:
        assert run() == [f"{home / 'toy'}: wrote test.jsonl (8000 rows)"]
    assert server.asked == asked
    server.modes, server.asked = ["whole"], []
    run()  # resumes, or has nothing to do
    assert prepared(home) and left(home) == [KEPT, *MADE]
    assert server.asked == ([] if not said else [HALF if "half" in modes else None])


@pytest.mark.parametrize("change", ["row", "note", "code", "pin", "download"])
def test_what_changed_is_made_again_from_the_kept_download(home, server, change):
    pin(home, RAW, server.url)
    run()
    rows, note = home / "toy/test.jsonl", home / "toy/SOURCE.json"
    if change == "row":
        rows.write_bytes(rows.read_bytes().replace(b"000001", b"000002", 1))
    elif change == "note":
        note.write_text("[1]")
    elif change == "code":
        (home / "toy.py").write_text("# another converter")
    elif change == "pin":
        pin(home, RAW, server.url + "?again")
    elif change == "download":
        note.unlink()
        (home / KEPT).write_bytes(RAW[:-1] + b"#")
        with pytest.raises(ValueError, match="deleted; run again"):
            run()
    assert "wrote" in run()[0] and prepared(home)
    assert len(server.asked) == (2 if change in ("pin", "download") else 1)
    made, digest = json.loads(note.read_bytes()), hashlib.sha256(rows.read_bytes()).hexdigest()
    assert made["files"] == {"test.jsonl": {"rows": 8000, "sha256": digest}}
    assert made["sources"]["test"]["sha256"] == SHA


FOLDERS = [  # a file, what it holds, the error
    ("test.jsonl", RAW, ""),
    ("test.jsonl.gz", PACKED, ""),
    ("test.jsonl", RAW[:-1] + b"#", "expected .* found .*another version"),
    ("test.jsonl.gz", PACKED[:-9], "ended before"),
    ("test.jsonl.gz", RAW, "gzip"),
    ("test.json", RAW, r"test\.jsonl: expected this file, as it is or as \.gz, found none"),
]


@pytest.mark.parametrize("name, content, said", FOLDERS)
def test_files_in_a_folder(home, tmp_path, name, content, said):
    pin(home, RAW)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / name).write_bytes(content)
    if said:
        with pytest.raises(ValueError, match=f"^toy: .*{said}"):
            run(tmp_path)
        assert left(home) == []
    else:
        assert "wrote" in run(tmp_path)[0] and prepared(home) and left(home) == MADE
        assert "has" in run()[0]  # no network, no folder
    assert (tmp_path / "toy" / name).read_bytes() == content  # the user's own file stays


def test_a_url_that_is_gz_is_verified_packed(home, server):
    server.content = PACKED
    pin(home, PACKED, server.url + ".gz", "toy/test.jsonl.gz")
    assert "wrote" in run()[0] and prepared(home)


def test_a_stop_while_writing_leaves_what_was_there(home, server, monkeypatch):
    pin(home, RAW, server.url)
    run()
    before = {file: (home / file).read_bytes() for file in left(home)}
    (home / "new.py").write_text("# so that it is made again")
    real = Path.write_bytes

    def write_bytes(file, content):
        real(file, content[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(KeyboardInterrupt):
        run()
    (home / "new.py").unlink()
    assert {file: (home / file).read_bytes() for file in left(home)} == before


CALLS = {
    "": "expected names of data sets, or all; found none\n  toy             0.3 MB",
    "toy toi": "expected names of data sets, or all; found toi\n  toy             0.3 MB",
    "toy --sauce .": "error: unrecognized arguments: --sauce .",
    "toy --source nowhere": "toy: nowhere/toy/test.jsonl: expected this file",
    "all": "stopped; run the same command again to go on",
}


@pytest.mark.parametrize("arguments", CALLS)
def test_command_line_messages(home, monkeypatch, capsys, arguments):
    def transfer(source, part):
        raise KeyboardInterrupt

    monkeypatch.setattr(p, "transfer", transfer)
    pin(home, RAW)
    with pytest.raises(SystemExit) as caught:
        p.main(arguments.split())
    said = capsys.readouterr()
    assert f"prepare.py: {CALLS[arguments]}" in f"{caught.value}{said.err}" and said.out == ""


def test_pinned_sources():
    sources = json.loads((ROOT / "data/sources.json").read_bytes())
    done = subprocess.run([sys.executable, ROOT / "data/prepare.py"], capture_output=True)
    listed = re.findall(r"(?m)^  (\w+) +[\d.]+ MB$", done.stderr.decode())
    assert done.returncode == 1 and listed == list(sources) and set(sources) == set(p.CONVERTERS)
    for source in [source for files in sources.values() for source in files.values()]:
        assert set(source) == {"url", "local", "bytes", "sha256"} and source["bytes"] > 0
        assert re.fullmatch(r"https://[\w.]+/.*/[0-9a-f]{40}/[^.][^?]+", source["url"])
        assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"])
        assert re.fullmatch(r"[\w-]+(/[\w-]+)*/[\w-]+(\.[a-z]+)+", source["local"])
        assert source["local"].endswith(".gz") == source["url"].endswith(".gz")
