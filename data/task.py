"""What a benchmark is: where its rows come from, how it asks, and how an answer is read and judged. Standard library only.

One row of data/NAME/SPLIT.jsonl, whatever the benchmark (`python data/prepare.py NAME` writes them):
    id           text, unique in its file
    prompt       what the model is asked, without examples and without chat markup
    completion   the reference solution as an assistant's reply: what training learns and few-shot turns show
    answer       what an answer is compared with: a number, an expression, a choice's letter; empty for code
    subject      where the source has one; few-shot examples are of the same subject
    choices      (kind choose) the replies whose likelihoods are compared, in the order A, B, C, ...
    code, entry_point, tests, plus_tests    (kind code) the solution alone, its function's name, the programs that test it
train.py reads the same rows: it needs prompt and completion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]


def json_lines(content: bytes) -> list[Row]:
    """The objects of a JSONL file; only a line feed ends a line."""
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]


def same(row: Row) -> tuple[str, str]:
    """Ask the row's prompt as it is; the reply begins with nothing in particular."""
    return row["prompt"], ""


@dataclass(frozen=True)
class Rule:
    """One way to judge a completion: find the answer (None: there is none), then compare it with the row's."""

    extract: Callable[[str], str | None]
    grade: Callable[[str, str], bool]


@dataclass(frozen=True)
class Task:
    """One benchmark. The score is the first of `rules`; those of kind choose are acc and acc_norm, of kind code base and plus."""

    name: str
    kind: str = "generate"  # or "choose": compare likelihoods, or "code": run what was written
    file: str = ""  # rows to score, below data/; empty: NAME/test.jsonl
    shots: str = ""  # rows to take few-shot examples from, in their order, below data/; empty: there are none
    convert: Callable[[dict[str, bytes]], dict[str, list[Row]]] | None = None  # downloaded files -> rows of each split
    rules: dict[str, Rule] = field(default_factory=dict)
    header: Callable[[Row], str] = lambda row: ""  # said once, before the examples
    chat: Callable[[Row], tuple[str, str]] = same  # the user's message, and how the assistant's reply begins
    plain: Callable[[Row], tuple[str, str]] = same  # the same as text without markup
    between: str = " "  # in plain text: what stands between prompt and reply,
    end: str = ""  # what ends an example's reply,
    stops: tuple[str, ...] = ()  # and before which of these texts a completion is cut
    program: Callable[[Row, str, str], str] | None = None  # (row, completion, "chat" or "plain") -> what is run before its tests
    max_new_tokens: int = 512

    @property
    def path(self) -> Path:
        """The rows to score."""
        return HERE / (self.file or f"{self.name}/test.jsonl")  # a path of one's own is absolute


def choose(logprobs: Sequence[float], choices: Sequence[str], rule: str) -> int:
    """acc: the likeliest choice; acc_norm: the largest log p(choice) / characters. The first one on ties."""
    scores = [p / len(c) if rule == "acc_norm" else p for p, c in zip(logprobs, choices)]
    return scores.index(max(scores))


def cut(text: str, stops: Sequence[str]) -> str:
    """What comes before the first of the stops."""
    return text[:min([i for stop in stops if (i := text.find(stop)) >= 0], default=len(text))]


def opened(text: str) -> str:
    """What goes on from an opened block of code: the text, without a fence that opens the block once more."""
    return text.lstrip().partition("\n")[2] if text.lstrip().startswith("```") else text


def fenced(text: str) -> str:
    """The rest of a block of code that was opened before: up to the next ```."""
    return cut(opened(text), ["```"])
