"""SVAMP: one-step arithmetic in words, varied so that shortcuts fail. GSM8K's prompt; the last number must be the answer's value."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation

from data.gsm8k import ask, flexible, plain_number
from data.task import Row, Rule, Task


def same_number(found: str, answer: str) -> bool:
    """Equal as exact decimals: "51.0" is "51"; what is no number is not equal to one."""
    try:
        return Decimal(plain_number(found)) == Decimal(plain_number(answer))
    except InvalidOperation:
        return False


def bare(text: str) -> str:
    """Whole numbers without their .0."""
    return re.sub(r"(\d)\.0\b", r"\1", text)


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{"ID", "Body", "Question", "Equation", "Answer": 51.0} -> rows. The source is one file without splits: all of it is test."""
    return {"test": [convert_row(source) for source in json.loads(files["test"])]}


def convert_row(source: Row) -> Row:
    """One row; its reference solution is the equation, its answer a number without a needless .0."""
    body, answer = source["Body"].strip(), bare(str(source["Answer"]))
    body += "" if body[-1] in ".?!" else "."
    equation = bare(source["Equation"].strip().removeprefix("(").removesuffix(")").strip())
    return {"id": source["ID"], "prompt": ask(f"{body} {source['Question'].strip()}"),
            "completion": f"{equation} = {answer}\n#### {answer}", "answer": answer, "subject": source["Type"]}


TASK = Task("svamp", convert=convert, rules={"number": Rule(flexible, same_number)}, stops=("Question:", "</s>", "<|im_end|>"), max_new_tokens=512)
