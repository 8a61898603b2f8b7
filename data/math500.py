r"""MATH-500: competition mathematics, the answer inside \boxed{}. Compared as Hendrycks' normalised text, then as exact numbers and tuples.

No computer algebra: sympy's parser would run code that the model wrote.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from data.task import Row, Rule, Task, json_lines

ASK = "Please reason step by step, and put your final answer within \\boxed{}."


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed, None without one or when its brace is never closed. `\boxed 5` has the next word."""
    start = text.rfind("\\boxed")
    rest = text[start + len("\\boxed"):] if start >= 0 else ""
    if (group := rest.lstrip(" "))[:1] == "{":
        end = closing(group)
        return None if end is None else group[1:end]
    word = re.match(r" +([^\s$]+)", rest)
    return word and word[1]


def closing(text: str) -> int | None:
    """Where the brace that opens the text is closed."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return i
    return None


SPELLINGS = (  # what is written in two ways, and the one that is kept; in this order
    (r"\n", ""), (r"\\!", ""), (r"\\\\", r"\\"), (r"\\[td]frac", r"\\frac"), (r"\\left|\\right", ""), (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$", ""), (r"\\text\{ .*$", ""), (r"\\?%", ""), (r" \.", " 0."), (r"\{\.", "{0."), (r"^\.(?=\d)", "0."), (r"\.$", ""),
    (r"^[^=]{1,2}=(?=[^=]*$)", ""), (r"\s", ""), (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r"\\frac([^{}\\])([^{}\\])", r"\\frac{\1}{\2}"), (r"\\frac([^{}\\])\{", r"\\frac{\1}{"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([^{}\\])", r"\1{\2}"), (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}"),
)


def normalize(text: str) -> str:
    r"""One spelling of an answer: `\dfrac12`, `1/2` and `0.5` are `\frac{1}{2}`; `x = 3\text{ cm}` is `3`."""
    text = text.strip()
    while whole := re.fullmatch(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}\.?", text):
        text = whole[1].strip()
    for pattern, kept in SPELLINGS:
        text = re.sub(pattern, kept, text).strip()
    return text


def number(text: str) -> Fraction | None:
    r"""The exact value of an integer (also 1,234 and 1{,}234), a decimal, a/b or \frac{a}{b}; None for anything else."""
    text = text.replace("{,}", ",").replace("$", "")
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)", text):
        return Fraction(Decimal(text))  # through Decimal: int(text) refuses more than 4300 digits
    parts = re.fullmatch(r"(-?)\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}", text) or re.fullmatch(r"()(-?[0-9.]+)/(-?[0-9.]+)", text)
    if not parts:
        return None
    above, below = number(parts[2]), number(parts[3])
    return None if above is None or not below else (-above if parts[1] else above) / below


def elements(text: str) -> tuple[str, list[str]] | None:
    """The outer brackets ("" without) and what the top-level commas separate; None for a single element without brackets."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    kind = text[:1] + text[-1:] if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" else ""
    parts, depth = [""], 0
    for c in text[1:-1] if kind else text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return (kind, parts) if kind or len(parts) > 1 else None


def equal(found: str, answer: str) -> bool:
    """The same normalised text, else the same number, else the same brackets around equal elements in the same order."""
    a, b = normalize(found), normalize(answer)
    if a == b:
        return True
    x, y = number(a), number(b)
    if x is not None or y is not None:
        return x == y
    p, q = elements(a), elements(b)
    return p is not None and q is not None and p[0] == q[0] and len(p[1]) == len(q[1]) and all(
        len(u) < len(a) and equal(u, v) for u, v in zip(p[1], q[1]))


def convert(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{"problem", "solution", "answer", "subject", "unique_id"} -> rows."""
    return {"test": [{"id": s["unique_id"], "prompt": f"{s['problem']}\n{ASK}", "completion": s["solution"], "answer": s["answer"],
                      "subject": s["subject"]} for s in json_lines(files["test"])]}


TASK = Task("math500", convert=convert, rules={"boxed": Rule(boxed, equal)}, between="\n", stops=("<|im_end|>", "</s>"), max_new_tokens=2048)
