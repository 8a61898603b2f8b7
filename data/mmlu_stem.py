"""MMLU-STEM: 18 subjects, 3,018 items (lm-evaluation-harness counts anatomy in), likelihood of the letters after "Answer:"."""

from __future__ import annotations

import csv
import io

from data.task import Row, Task


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """Files SPLIT/SUBJECT of lines question, A, B, C, D, letter -> rows; every item weighs the same, whatever its subject's size."""
    rows: dict[str, list[Row]] = {}
    for name, content in files.items():
        split, subject = name.split("/")
        lines = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
        rows.setdefault(split, []).extend(convert_row(line, f"{subject}/{i}", subject) for i, line in enumerate(lines))
    return rows


def convert_row(line: list[str], name: str, subject: str) -> Row:
    """One row. Raises ValueError on a line of another shape."""
    if len(line) != 6 or line[5] not in tuple("ABCD"):
        raise ValueError(f"{name}: expected question, four choices and a letter, found {line}")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", line[1:5]))
    return {"id": name, "prompt": f"{line[0].strip()}{listed}\nAnswer:", "completion": line[5], "answer": line[5], "choices": list("ABCD"),
            "subject": subject}


def header(row: Row) -> str:
    """Names the subject, once."""
    return f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n\n"


TASK = Task("mmlu_stem", "choose", convert=convert, shots="mmlu_stem/dev.jsonl", header=header)
