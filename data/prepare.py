"""Public benchmarks: download pinned files, verify and convert them, write data/NAME/SPLIT.jsonl.

    python data/prepare.py                          # lists the names
    python data/prepare.py gsm8k svamp              # or: all
    python data/prepare.py gsm8k --source FOLDER    # the same files from a folder, no network

sources.json pins every file, data/downloads/ keeps it; a broken download resumes where it broke
off. A data set is left alone while its SOURCE.json fits the pinned files, its rows and the code of
this folder. data/tasks.py describes the rows. Standard library and tqdm.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.code import Row, convert_humaneval, convert_mbpp, json_lines

HERE = Path(__file__).resolve().parent
WAITS = (1, 3, 9)  # seconds between the tries of a download
ASK_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
Files = dict[str, bytes]  # by their keys in sources.json
Splits = dict[str, list[Row]]  # rows by the name of their split
Source = dict[str, Any]  # url, local (its name in a --source folder), bytes, sha256


def ask_question(text: str) -> str:
    """lm-evaluation-harness' zero-shot prompt; the solution follows."""
    return f"Question: {text}\nAnswer:"


def gsm8k_row(source: Row, split: str, i: int) -> Row:
    """{question, answer: "steps with marks <<48/2=24>> #### 24"}; the marks are not for reading."""
    solution = re.sub(r"<<[^<>]*>>", "", source["answer"])
    row = {"id": f"{split}-{i}", "prompt": ask_question(source["question"])}
    return row | {"completion": solution, "answer": solution.rpartition("#### ")[2].strip()}


def svamp_row(source: Row, split: str, i: int) -> Row:
    """{ID, Body, Question, Equation, Answer: 51.0, Type}; the solution is the equation."""
    body = source["Body"].strip()
    body += "" if body[-1] in ".?!" else "."
    equation = source["Equation"].strip().removeprefix("(").removesuffix(")").strip()
    equation, answer = (re.sub(r"(\d)\.0\b", r"\1", str(s)) for s in (equation, source["Answer"]))
    row = {"id": source["ID"], "prompt": ask_question(f"{body} {source['Question'].strip()}")}
    row |= {"completion": f"{equation} = {answer}\n#### {answer}", "answer": answer}
    return row | {"subject": source["Type"]}


def math500_row(source: Row, split: str, i: int) -> Row:
    """{problem, solution, answer, subject, unique_id}."""
    row = {"id": source["unique_id"], "prompt": f"{source['problem']}\n{ASK_BOXED}"}
    row |= {"completion": source["solution"], "answer": source["answer"]}
    return row | {"subject": source["subject"]}


def arc_row(source: Row, split: str, i: int) -> Row:
    """{id, question: {stem, choices: [{text, label}]}, answerKey}; labels 1, 2 become A, B."""
    choices = {choice["label"]: choice["text"] for choice in source["question"]["choices"]}
    right = list(choices).index(source["answerKey"])
    row = {"id": source["id"], "prompt": ask_question(source["question"]["stem"])}
    row |= {"completion": choices[source["answerKey"]], "answer": "ABCDEFGHIJ"[right]}
    return row | {"choices": list(choices.values())}


def mmlu_row(source: Sequence[str], split: str, i: int) -> Row:
    """question, A, B, C, D, letter; `split` is SPLIT/SUBJECT."""
    question, *choices, letter = source
    subject = split.partition("/")[2]
    listed = "".join(f"\n{name}. {text}" for name, text in zip("ABCD", choices, strict=True))
    row: Row = {"id": f"{subject}/{i}", "prompt": f"{question.strip()}{listed}\nAnswer:"}
    row |= {"completion": letter, "answer": letter, "choices": list("ABCD")}
    return row | {"subject": subject}


def csv_lines(content: bytes) -> Iterable[Sequence[str]]:
    """The lines of a CSV file."""
    return csv.reader(io.StringIO(content.decode("utf-8"), newline=""))


def convert_rows(read: Callable[..., Any], convert_row: Callable[..., Row], files: Files) -> Splits:
    """One row of each object in the files SPLIT or SPLIT/SUBJECT."""
    rows: Splits = {}
    for name, content in files.items():
        made = [convert_row(source, name, i) for i, source in enumerate(read(content))]
        rows.setdefault(name.partition("/")[0], []).extend(made)
    return rows


CONVERTERS: dict[str, Callable[[Files], Splits]] = {
    "gsm8k": partial(convert_rows, json_lines, gsm8k_row),
    "math500": partial(convert_rows, json_lines, math500_row),
    "svamp": partial(convert_rows, json.loads, svamp_row),
    "mmlu_stem": partial(convert_rows, csv_lines, mmlu_row),
    "arc_easy": partial(convert_rows, json_lines, arc_row),
    "arc_challenge": partial(convert_rows, json_lines, arc_row),
    "humaneval": convert_humaneval,
    "mbpp": convert_mbpp,
}


def transfer(source: Source, part: Path) -> None:
    """One try: append what the part file lacks; the server may send the whole all the same."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "talan-prepare/1"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(source["url"], headers=headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        have = have if reply.status == 206 else 0
        bar = tqdm(desc=part.stem, total=source["bytes"], initial=have, disable=None, leave=False)
        with part.open("ab" if have else "wb") as file, bar:
            while have <= source["bytes"]:  # more than pinned is wrong already
                chunk = reply.read1(1 << 16)
                if not chunk:
                    break
                have += file.write(chunk)
                bar.update(len(chunk))


def download(source: Source) -> Path:
    """The file in data/downloads/, got in a few tries that resume. Raises ConnectionError."""
    file = HERE / "downloads" / f"{source['sha256'][:12]}-{source['url'].rpartition('/')[2]}"
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        return file
    for wait in (*WAITS, 0):
        code = 0
        try:
            if not part.exists() or part.stat().st_size < source["bytes"]:
                transfer(source, part)
            have = part.stat().st_size
            if have >= source["bytes"]:
                return part.replace(file)
            problem = f"broke off after {have} of {source['bytes']} bytes"
        except (OSError, HTTPException) as error:
            problem, code = f"{type(error).__name__}: {error}", getattr(error, "code", 0)
        if code == 416:  # the server has nothing behind what is here: start over
            part.unlink(missing_ok=True)
        if code in (401, 403, 404, 410):
            break
        time.sleep(wait)
    hint = f"run again to resume, or --source FOLDER that holds {source['local']}"
    raise ConnectionError(f"cannot download {source['url']}: {problem}; {hint}")


def obtain(source: Source, folder: Path | None) -> bytes:
    """One verified file, unpacked. Raises ValueError, OSError, or what gzip raises."""
    file = folder / source["local"] if folder else download(source)
    packed = file.with_name(file.name + ".gz")
    if not file.exists() and not packed.exists():
        raise ValueError(f"{file}: expected this file, as it is or as .gz, found none")
    content = file.read_bytes() if file.exists() else gzip.decompress(packed.read_bytes())
    expected = f"{source['bytes']} bytes, sha256 {source['sha256']}"
    found = f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    if found != expected:
        hint = "another version of the file"
        if not folder:
            file.unlink()
            hint = f"deleted; run again to download {source['url']} anew"
        raise ValueError(f"{file}: expected {expected}, found {found}; {hint}")
    return gzip.decompress(content) if source["url"].endswith(".gz") else content


def record(sources: dict[str, Source], files: dict[str, bytes]) -> bytes:
    """SOURCE.json: what rows are made from, pinned files and this folder's code; what was made."""
    code = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.py")))
    pins = {key: {"url": s["url"], "sha256": s["sha256"]} for key, s in sources.items()}
    note: Row = {"sources": pins, "code": hashlib.sha256(code).hexdigest(), "files": {}}
    for file, content in files.items():
        rows, digest = content.count(b"\n"), hashlib.sha256(content).hexdigest()
        note["files"][file] = {"rows": rows, "sha256": digest}
    return json.dumps(note, indent=1).encode() + b"\n"


def up_to_date(folder: Path, sources: dict[str, Source]) -> bool:
    """Is the folder's SOURCE.json what would be recorded now?"""
    try:
        note = (folder / "SOURCE.json").read_bytes()
        files = {file: (folder / file).read_bytes() for file in json.loads(note)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return note == record(sources, files)


def make(name: str, sources: dict[str, Source], folder: Path | None) -> None:
    """Write data/NAME/: all files beside it first, then each renamed into it. Raises ValueError."""
    try:
        splits = CONVERTERS[name]({key: obtain(source, folder) for key, source in sources.items()})
        files = {}
        for split, rows in splits.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            files[f"{split}.jsonl"] = "".join(lines).encode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{name}: {error}") from None
    files["SOURCE.json"] = record(sources, files)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=HERE) as tmp:
        for file, content in files.items():
            Path(tmp, file).write_bytes(content)
        (HERE / name).mkdir(exist_ok=True)
        for file in files:
            Path(tmp, file).replace(HERE / name / file)


def prepare(names: Sequence[str], folder: Path | None = None) -> Iterator[str]:
    """Make sure that these data sets are there, a line for each. Raises ValueError or OSError."""
    pinned = json.loads((HERE / "sources.json").read_bytes())
    wrong = [name for name in names if name not in (*pinned, "all")]
    if wrong or not names:
        lines = [f"expected names of data sets, or all; found {', '.join(wrong) or 'none'}"]
        for name, sources in pinned.items():
            lines.append(f"  {name:14}{sum(s['bytes'] for s in sources.values()) / 1e6:5.1f} MB")
        raise ValueError("\n".join(lines))
    for name in dict.fromkeys(pinned if "all" in names else names):
        there = up_to_date(HERE / name, pinned[name])
        if not there:
            make(name, pinned[name], folder)
        made = json.loads((HERE / name / "SOURCE.json").read_bytes())["files"]
        listed = ", ".join(f"{file} ({made[file]['rows']} rows)" for file in made)
        yield f"{HERE / name}: {'has' if there else 'wrote'} {listed}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; every failure ends in one message."""
    parser = argparse.ArgumentParser("prepare.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="a data set, or all")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="where the files lie already")
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
