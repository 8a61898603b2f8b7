"""Public benchmarks as JSONL: downloads pinned files, verifies and converts them, writes data/NAME/SPLIT.jsonl.

    python data/prepare.py                          # lists the names
    python data/prepare.py gsm8k svamp              # or: all
    python data/prepare.py gsm8k --source FOLDER    # the same files from a local folder, no network

sources.json pins every file, data/downloads/ keeps it; a broken download goes on where it broke off. A data set is left
alone while its SOURCE.json still fits the pinned files, its rows and the code of this folder. Standard library and tqdm.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import json
import string
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.settings import Parser
from data.task import Row
from data.tasks import TASKS

HERE = Path(__file__).resolve().parent
ALLOWED = ("https://",)  # how a url may begin
WAITS = (1, 3, 9)  # seconds between the tries of a download
LIMIT = 256 << 20  # bytes that a .gz may unpack to
Source = dict[str, Any]  # url, local (its name in a --source folder), bytes, sha256


def sha256(content: bytes) -> str:
    """The checksum in hex."""
    return hashlib.sha256(content).hexdigest()


def transfer(source: Source, part: Path) -> None:
    """One try: append what the part file lacks, or write it anew when the server sends the whole. Raises OSError, HTTPException, ValueError."""
    if not source["url"].startswith(ALLOWED):
        raise ValueError(f"sources.json: expected https, found {source['url'][:200]}")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "talan-prepare/1"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(
        urllib.request.Request(source["url"], headers=headers), timeout=30
    ) as reply:
        if not reply.url.startswith(ALLOWED):
            raise ValueError(
                f"{source['url']}: expected https all the way, found a redirect to {reply.url[:200]}"
            )
        have = have if reply.status == 206 else 0
        bar = tqdm(
            total=source["bytes"],
            initial=have,
            desc=part.stem,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
        )
        with part.open("ab" if have else "wb") as file, bar:
            while have <= source["bytes"] and (
                chunk := reply.read1(1 << 16)
            ):  # more than pinned is wrong already
                have += file.write(chunk)
                bar.update(len(chunk))


def download(source: Source) -> Path:
    """The file in data/downloads/, fetched in a few tries of which each goes on where the last broke off. Raises ConnectionError."""
    file = HERE / "downloads" / f"{source['sha256'][:12]}-{source['url'].rsplit('/', 1)[-1]}"
    part, waits = file.with_name(file.name + ".part"), iter(WAITS)
    file.parent.mkdir(exist_ok=True)
    while not file.exists():
        try:
            if not part.exists() or part.stat().st_size < source["bytes"]:
                transfer(source, part)
            if (have := part.stat().st_size) >= source["bytes"]:
                return part.replace(file)
            problem, code = f"broke off after {have} of {source['bytes']} bytes", 0
        except (OSError, HTTPException) as error:
            problem, code = f"{type(error).__name__}: {error}", getattr(error, "code", 0)
        if code == 416:  # the server has nothing behind what is here: start over
            part.unlink(missing_ok=True)
        if code in (401, 403, 404, 410) or (wait := next(waits, None)) is None:
            raise ConnectionError(f"cannot download {source['url']}: {problem}")
        time.sleep(wait)
    return file


def unpack(packed: bytes, where: str) -> bytes:
    """What a .gz holds. Raises ValueError when it is damaged or unpacks to more than LIMIT bytes."""
    try:
        content = gzip.open(io.BytesIO(packed)).read(LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: expected a whole .gz file: {error}") from None
    if len(content) > LIMIT:
        raise ValueError(f"{where}: expected at most {LIMIT} bytes unpacked, found more")
    return content


def obtain(source: Source, folder: Path | None) -> bytes:
    """One verified file as a converter takes it, unpacked when its url is a .gz. Raises ValueError or OSError."""
    file = folder / source["local"] if folder else download(source)
    packed = file.with_name(file.name + ".gz")
    file, content = (
        (file, file.read_bytes())
        if file.is_file()
        else (packed, unpack(packed.read_bytes(), str(packed)))
    )
    expected, found = (
        f"{size} bytes, sha256 {sha}"
        for size, sha in ((source["bytes"], source["sha256"]), (len(content), sha256(content)))
    )
    if found != expected:
        hint = "another version of the file"
        if not folder:
            file.unlink()
            hint = f"deleted; run again to download {source['url']} anew"
        raise ValueError(f"{file}: expected {expected}, found {found}; {hint}")
    return unpack(content, source["url"]) if source["url"].endswith(".gz") else content


def fits(key: str, row: Row, ids: Counter[str]) -> bool:
    """Whether one field is as data/task.py has it: texts, a unique id, at least two choices and a letter that names one."""
    value, choices = row.get(key), row.get("choices")
    if key == "choices":
        return (
            isinstance(value, list)
            and len(value) > 1
            and all(isinstance(text, str) for text in value)
        )
    if key == "answer" and isinstance(choices, list):
        return value in list(string.ascii_uppercase[: len(choices)])
    return (
        isinstance(value, str)
        and (key != "id" or ids[value] == 1)
        and (key not in ("id", "prompt") or value != "")
    )


def check_splits(splits: dict[str, list[Row]]) -> None:
    """Raises ValueError that lists every split without rows and every field that does not fit."""
    wrong = [f"{split}: no rows" for split, rows in splits.items() if not rows] + (
        [] if splits else ["no splits"]
    )
    for split, rows in splits.items():
        ids = Counter(str(row.get("id")) for row in rows)
        wrong += [
            f"{split}:{number}: {key}: {str(row.get(key))[:80]!r}"
            for number, row in enumerate(rows, 1)
            for key in dict.fromkeys(["id", "prompt", "completion", "answer", *row])
            if not fits(key, row, ids)
        ]
    if wrong:
        raise ValueError(
            "\n  ".join(
                [
                    f"{len(wrong)} fields or splits do not fit the schema in data/task.py, the first of them:",
                    *wrong[:10],
                ]
            )
        )


def record(sources: dict[str, Source], files: dict[str, bytes]) -> bytes:
    """SOURCE.json: what a data set is made from (pinned files, the code of this folder), and what was made."""
    code = sha256(b"".join(file.read_bytes() for file in sorted(HERE.glob("*.py"))))
    pins = {
        key: {"url": source["url"], "sha256": source["sha256"]} for key, source in sources.items()
    }
    made = {
        file: {"rows": content.count(b"\n"), "sha256": sha256(content)}
        for file, content in files.items()
    }
    return json.dumps({"sources": pins, "code": code, "files": made}, indent=1).encode() + b"\n"


def up_to_date(name: str, sources: dict[str, Source]) -> bool:
    """Whether data/NAME/SOURCE.json is what would be recorded now."""
    try:
        note = (HERE / name / "SOURCE.json").read_bytes()
        return note == record(
            sources, {file: (HERE / name / file).read_bytes() for file in json.loads(note)["files"]}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(name: str, files: dict[str, bytes]) -> None:
    """Write data/NAME/: all files beside it first, then each renamed into it, in their order."""
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=HERE) as tmp:
        for file, content in files.items():
            Path(tmp, file).write_bytes(content)
        (HERE / name).mkdir(exist_ok=True)
        for file in files:
            Path(tmp, file).replace(HERE / name / file)


def convert(name: str, sources: dict[str, Source], folder: Path | None) -> dict[str, bytes]:
    """The files of one data set, by name. Raises ValueError that begins with the data set's name, or OSError."""
    task = TASKS[name]
    assert task.convert, name
    try:
        splits = task.convert({key: obtain(source, folder) for key, source in sources.items()})
        check_splits(splits)
        return {
            f"{split}.jsonl": "".join(
                json.dumps(row, ensure_ascii=False) + "\n" for row in rows
            ).encode()
            for split, rows in splits.items()
        }
    except ConnectionError as error:
        wanted = ", ".join(source["local"] for source in sources.values())
        raise ValueError(
            f"{name}: {error}\nrun again to go on, or without a network: --source FOLDER that holds {wanted}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError that lists every name that is no data set to prepare."""
    near = {
        name: difflib.get_close_matches(name, [*known, "all"], 1)
        for name in names
        if name not in known
    }
    folders = {name: TASKS[name].file.partition("/")[0] for name in near if name in TASKS}
    tasks = {
        name: f"is made with {folder}"
        if folder in known
        else "comes with the project, nothing to prepare"
        for name, folder in folders.items()
    }
    wrong = [
        f"{name}: "
        + tasks.get(
            name, "no such data set" + "".join(f"; did you mean {match}?" for match in matches)
        )
        for name, matches in near.items()
    ]
    if wrong:
        raise ValueError("\n  ".join([*wrong, f"names: {', '.join(known)}, or all"]))


def check_folder(files: Sequence[Source], folder: Path) -> None:
    """Raises ValueError that lists every file that the folder does not hold."""
    missing = [
        source["local"]
        for source in files
        if not any((folder / (source["local"] + end)).is_file() for end in ("", ".gz"))
    ]
    if missing:
        raise ValueError(
            "\n  ".join(
                [
                    f"{folder} lacks {len(missing)} of {len(files)} files (as named or with .gz); nothing was written",
                    *missing,
                ]
            )
        )


def prepare(names: Sequence[str], folder: Path | None = None) -> Iterator[str]:
    """Make sure that these data sets are there, a line for each; without names, list them. Raises ValueError or OSError."""
    pinned = json.loads((HERE / "sources.json").read_text(encoding="utf-8"))
    names = list(
        dict.fromkeys(item for name in names for item in (pinned if name == "all" else [name]))
    )
    check_names(names, list(pinned))
    if not names:
        sizes = {
            name: sum(source["bytes"] for source in files.values()) / 1e6
            for name, files in pinned.items()
        }
        raise ValueError(
            "\n  ".join(
                [
                    "give one or more names, or all",
                    *(f"{name:14}{size:5.1f} MB" for name, size in sizes.items()),
                ]
            )
        )
    stale = [name for name in names if not up_to_date(name, pinned[name])]
    if folder:
        check_folder([source for name in stale for source in pinned[name].values()], folder)
    for name in names:
        if name in stale:
            files = convert(name, pinned[name], folder)
            write(name, files | {"SOURCE.json": record(pinned[name], files)})
        made = json.loads((HERE / name / "SOURCE.json").read_text(encoding="utf-8"))["files"]
        yield f"{HERE / name}: {'wrote' if name in stale else 'has'} " + ", ".join(
            f"{file} ({made[file]['rows']} rows)" for file in made
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; every failure ends in one message."""
    parser = Parser(
        prog="prepare.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="data sets to prepare, or all; without any: list them",
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="FOLDER",
        help="take the files from this folder instead of the network",
    )
    asked = parser.parse_args(argv)
    try:
        for line in prepare(asked.names, asked.source and asked.source.expanduser()):
            print(line, flush=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"prepare.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("prepare.py: stopped; run the same command again to go on") from None


if __name__ == "__main__":
    main()
