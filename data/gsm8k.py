"""GSM8K: school arithmetic in words, the answer a whole number. Rules and prompt of lm-evaluation-harness (tasks/gsm8k)."""

from __future__ import annotations

import re

from data.task import Row, Rule, Task, json_lines

FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict(text: str) -> str | None:
    """The number after the first `#### `, None without one."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found and found[1]


def flexible(text: str) -> str | None:
    """The last thing that looks like a number."""
    found = list(FLEXIBLE.finditer(text))
    return found[-1][0] if found else None


def plain_number(text: str) -> str:
    """Without commas, dollar signs, all up to the last `#### ` and a final full stop: "$1,000." -> "1000"."""
    return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", "")))


def equal(found: str, answer: str) -> bool:
    """The same characters once both are plain: "18.00" is not "18"."""
    return plain_number(found).lower() == plain_number(answer).lower()


def ask(question: str) -> str:
    """The zero-shot prompt; the solution follows."""
    return f"Question: {question}\nAnswer:"


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{"question", "answer": "steps with marks <<48/2=24>> ... #### 24"} -> rows; the marks are not for reading."""
    rows: dict[str, list[Row]] = {}
    for split, content in files.items():
        for i, source in enumerate(json_lines(content)):
            solution = re.sub(r"<<[^<>]*>>", "", source["answer"])
            rows.setdefault(split, []).append({"id": f"{split}-{i}", "prompt": ask(source["question"]), "completion": solution,
                                               "answer": solution.rpartition("#### ")[2].strip()})
    return rows


TASK = Task("gsm8k", convert=convert, shots="gsm8k/train.jsonl", rules={"flexible": Rule(flexible, equal), "strict": Rule(strict, equal)},
            stops=("Question:", "</s>", "<|im_end|>"), max_new_tokens=1024)
