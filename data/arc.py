"""ARC (AI2 Reasoning Challenge), Easy and Challenge: grade-school science, likelihood of each choice's text after "Answer:"."""

from __future__ import annotations

from data.gsm8k import ask
from data.task import Row, Task, json_lines


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{"id", "question": {"stem", "choices": [{"text", "label"}]}, "answerKey"} -> rows; labels 1, 2, ... become A, B, ..."""
    return {split: [convert_row(source) for source in json_lines(content)] for split, content in files.items()}


def convert_row(source: Row) -> Row:
    """One row: 3 to 5 choices."""
    labels = [choice["label"] for choice in source["question"]["choices"]]
    choices = [choice["text"] for choice in source["question"]["choices"]]
    right = labels.index(source["answerKey"])
    return {"id": source["id"], "prompt": ask(source["question"]["stem"]), "completion": choices[right], "answer": "ABCDE"[right],
            "choices": choices}


EASY, CHALLENGE = (Task(name, "choose", convert=convert, shots=f"{name}/train.jsonl") for name in ("arc_easy", "arc_challenge"))
