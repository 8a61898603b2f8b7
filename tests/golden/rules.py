"""Every rule of verdicts.jsonl again, by plain loops: no regular expression, no decimals.

README.md states the rules; this is what it says, in code:
python tests/golden/check_verdicts.py tests.golden.rules:judge
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DIGITS = "0123456789"
OPEN, CLOSE = "([{", ")]}"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
COMMANDS = [("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("\\tfrac", "\\frac"), ("\\dfrac", "\\frac")]
COMMANDS += [(old, "") for old in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")]
Ratio = tuple[int, int]


# ---------------------------------------------------------------- small parts
def run_of(text: str, start: int, letters: str) -> int:
    """Where the run of these letters that begins at `start` ends."""
    while start < len(text) and text[start] in letters:
        start += 1
    return start


def closing(text: str, start: int) -> int:
    """Where the `{` at `start` is closed; -1: never. Braces behind backslashes count too."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return -1


def whole(digits: str) -> int:
    """A whole number of any length: int() itself refuses more than 4300 digits."""
    value = 0
    for i in range(0, len(digits), 1000):
        value = value * 10 ** len(digits[i : i + 1000]) + int(digits[i : i + 1000])
    return value


def decimal(text: str) -> Ratio | None:
    """-12.50 as (-1250, 100): perhaps a minus, digits, at most one point; otherwise None."""
    sign, body = (-1, text[1:]) if text[:1] == "-" else (1, text)
    before, point, after = body.partition(".")
    if not before + after or run_of(before + after, 0, DIGITS) < len(before + after):
        return None
    return sign * whole(before + after), 10 ** len(after)


def same_ratio(a: Ratio | None, b: Ratio | None) -> bool:
    """Whether both are numbers, and the same one."""
    return a is not None and b is not None and a[0] * b[1] == b[0] * a[1]


# ---------------------------------------------------------------- gsm8k, svamp, tiny
def first_marked(text: str) -> str | None:
    """gsm8k.strict: behind the first `#### `, perhaps a minus, then at least one of 0-9 . ,"""
    for i in range(len(text)):
        if text.startswith("#### ", i):
            digits = i + 5 + text.startswith("-", i + 5)
            end = run_of(text, digits, DIGITS + ".,")
            if end > digits:
                return text[i + 5 : end]
    return None


def last_number(text: str) -> str | None:
    """gsm8k.flexible: the last run of two or more of $ 0-9 . , or one digit, with its minus."""
    found, i = None, 0
    while i < len(text):
        start = i + (text[i] == "-")
        end = run_of(text, start, "$" + DIGITS + ".,")
        if end - start >= 2 or text[start:end] and text[start] in DIGITS:
            found, i = text[i:end], end
        else:
            i += 1
    return found


def bare(text: str) -> str:
    """A number without commas, dollar signs, all up to the mark, and one full stop behind it."""
    text = "".join(c for c in text if c not in ",$").rpartition("#### ")[2]
    return (text[:-1] if text.endswith(".") else text).lower()


def same_text(found: str, answer: str) -> bool:
    """gsm8k: as texts."""
    return bare(found) == bare(answer)


def same_decimal(found: str, answer: str) -> bool:
    """svamp: as exact decimals."""
    return same_ratio(decimal(bare(found)), decimal(bare(answer)))


def marked_line(text: str) -> str | None:
    """tiny.answer: of the last line with a mark, what follows its first mark."""
    for line in reversed(text.split("\n")):
        if "####" in line:
            return line.partition("####")[2].strip()
    return None


# ---------------------------------------------------------------- math500
def last_boxed(text: str) -> str | None:
    """What is in the last \\boxed, as it is; None: there is none, it is never closed, or empty."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + 6 :]
    body = rest.lstrip(" ")
    if body.startswith("{"):
        end = closing(body, 0)
        return None if end < 0 else body[1:end]
    if body == rest or not body or body[0].isspace():
        return None
    return body.split()[0].partition("$")[0] or None


def unwrapped(text: str) -> str:
    """Without white space around, nor \\text{...} or the like around all, if no brace is in it."""
    text = text.strip()
    inner = text[:-1] if text.endswith("}.") else text
    for wrapper in ("\\text{", "\\mathrm{", "\\textbf{", "\\mathbf{"):
        body = inner.removeprefix(wrapper).removesuffix("}")
        if inner == wrapper + body + "}" and not set(body) & set("{}"):
            return unwrapped(body)
    return text


def braced(text: str, command: str, arguments: int) -> str:
    """Braces round arguments of one character: \\frac12 -> \\frac{1}{2}; others stay as is."""
    head, *parts = text.split(command)
    for part in parts:
        given: list[str] = []
        at = 0
        while len(given) < arguments and at < len(part) and part[at] not in "}\\":
            end = closing(part, at) if part[at] == "{" else at
            if end < 0:
                break
            given.append(part[at : end + 1] if part[at] == "{" else "{" + part[at] + "}")
            at = end + 1
        head += command + ("".join(given) + part[at:] if len(given) == arguments else part)
    return head


def normal(text: str) -> str:
    """Hendrycks et al.'s normal form of an answer, step by step in README.md's order."""
    text = unwrapped(text)
    for old, new in COMMANDS:
        text = text.replace(old, new).strip()
    text = text.partition("\\text{ ")[0].strip()
    for old, new in (("\\%", "%"), ("%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new).strip()
    if len(text) > 1 and text[0] == "." and text[1] in DIGITS:
        text = "0" + text
    text = text.removesuffix(".").strip()
    if text.count("=") == 1 and 1 <= text.index("=") <= 2:
        text = text.partition("=")[2]
    text = braced(braced("".join(text.split()), "\\sqrt", 1), "\\frac", 2)
    if text == "0.5":
        return "\\frac{1}{2}"
    a, slash, b = text.partition("/")
    return "\\frac{" + a + "}{" + b + "}" if integer(a) and integer(b) else text


def integer(text: str) -> bool:
    """Perhaps a minus, then digits."""
    digits = text.removeprefix("-")
    return digits != "" and run_of(digits, 0, DIGITS) == len(digits)


def ungrouped(text: str) -> str:
    """1,234.5 -> 1234.5; what has other groups than of three digits, or none, stays as it is."""
    first, *groups = text.removeprefix("-").partition(".")[0].split(",")
    threes = all(len(group) == 3 for group in groups)
    right = threes and 1 <= len(first) <= 3 and not text.endswith(".")
    return text.replace(",", "", len(groups)) if right else text


def number(text: str) -> Ratio | None:
    """A decimal, perhaps in groups of three, or a/b, \\frac{a}{b}, -\\frac{a}{b} of decimals."""
    text = text.replace("{,}", ",").replace("$", "")
    sign, body = (-1, text[1:]) if text.startswith("-\\frac{") else (1, text)
    if body.startswith("\\frac{") and body.endswith("}"):
        above, between, below = body[6:-1].partition("}{")
    else:
        above, between, below = body.partition("/")
    if not between:
        return decimal(ungrouped(text))
    a, b = decimal(above), decimal(below)
    return (sign * a[0] * b[1], a[1] * b[0]) if a and b and b[0] else None


def elements(text: str) -> tuple[str, list[str]]:
    """(1,2] -> "(]", ["1", "2"]: split at the commas outside of further brackets."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    kind, parts, depth = "", [""], 0
    if len(text) > 1 and text[0] in OPEN and text[-1] in CLOSE:
        kind, text = text[0] + text[-1], text[1:-1]
    for c in text:
        depth += (c in OPEN) - (c in CLOSE)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return kind, parts


def same_answer(found: str, answer: str) -> bool:
    """math500: the same normal form or number, or the same brackets round equal elements."""
    a, b = normal(found), normal(answer)
    if a == b:
        return True
    if number(a) is not None or number(b) is not None:
        return same_ratio(number(a), number(b))
    (kind_a, parts_a), (kind_b, parts_b) = elements(a), elements(b)
    if kind_a != kind_b or len(parts_a) != len(parts_b) or not kind_a and len(parts_a) == 1:
        return False
    return all(same_answer(x, y) for x, y in zip(parts_a, parts_b))


# ---------------------------------------------------------------- programs and choices
def before(text: str, marks: tuple[str, ...]) -> str:
    """The text up to the first of the marks."""
    return text[: min([text.find(mark) for mark in marks if mark in text], default=len(text))]


def fenced(text: str) -> str:
    """A reply's code, the fence open already: up to the next, without one that opens it again."""
    if text.lstrip().startswith("```"):
        text = text.lstrip().partition("\n")[2]
    return before(text, ("```",))


PROGRAMS: dict[str, Callable[[str, str], str]] = {
    "humaneval.chat": lambda prompt, completion: prompt + "\n" + fenced(completion),
    "humaneval.plain": lambda prompt, completion: prompt + before(completion, STOPS),
    "mbpp.chat": lambda prompt, completion: fenced(completion),
    "mbpp.plain": lambda prompt, completion: before(completion, ("[DONE]",)),
}
ANSWERS: dict[str, tuple[Callable[[str], str | None], Callable[[str, str], bool]]] = {
    "gsm8k.strict": (first_marked, same_text),
    "gsm8k.flexible": (last_number, same_text),
    "svamp.number": (last_number, same_decimal),
    "tiny.answer": (marked_line, lambda found, answer: found.split() == answer.split()),
    "math500.boxed": (last_boxed, same_answer),
}


def choose(logprobs: list[float], choices: list[str], rule: str) -> int:
    """The first of the largest log-probabilities, or of each divided by its choice's characters."""
    scores = [x / len(choice) if rule == "acc_norm" else x for x, choice in zip(logprobs, choices)]
    best = 0
    for i in range(len(scores)):
        if scores[i] > scores[best]:
            best = i
    return best


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one case of verdicts.jsonl."""
    rule = case["rule"]
    if rule in ANSWERS:
        extract, grade = ANSWERS[rule]
        found = extract(case["completion"])
        return {"extracted": found, "correct": found is not None and grade(found, case["answer"])}
    if rule in PROGRAMS:
        return {"program": PROGRAMS[rule](case["prompt"], case["completion"])}
    return {"chosen": choose(case["logprobs"], case["choices"], rule.removeprefix("choice."))}
