r"""Benchmarks: where rows come from, how each is asked, how an answer is read and judged.

A row of data/NAME/SPLIT.jsonl, written by `python data/prepare.py NAME`, is an object of
    id           text, unique in its file
    prompt       what the model is asked, without examples and without chat markup
    completion   the reference solution as an assistant's reply
    answer       what an answer is compared with: a number, an expression, a letter; "" for code
    subject      where the source has one: few-shot examples are of the same subject
    choices      (kind choice) the replies whose likelihoods are compared: A, B, C, ...
    system, tools    as for train.py; a file of one's own may have messages for the prompt
    code, entry_point, tests, plus_tests    (kind code) solution, function, programs that test it
train.py reads prompt and completion of the same rows.

Protocol. chat: the model's own template, thinking off, examples as turns. plain: text without
markup, as lm-evaluation-harness prompts base models. Examples are the first of the training split
(MMLU: of dev and the same subject; MBPP: task ids 2 to 4).
    gsm8k         flexible (the last number), strict (behind "#### "): lm-evaluation-harness' rules
    svamp         the last number, equal as a decimal
    math500       the last \boxed: Hendrycks' normalised text, then exact numbers and tuples;
                  symbolic, where the package math-verify is installed
    arc_*         likelihood of each choice's text: acc, and acc_norm, a character
    mmlu_stem     18 subjects (lm-evaluation-harness counts anatomy in), likelihood of the letters
    humaneval     base tests, and plus: HumanEval+ (mini)
    mbpp(_plus)   task ids 11 to 510; MBPP+ has its own requests and asserts
    a file of one's own: choices by likelihood, else what follows the last ####
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from reprlib import repr
from typing import Any

from common import parse_object, read_lines
from data import code
from data.chat import FORMATS, Tokenizer, check_messages, check_rendering, unread_columns
from data.code import Row

HERE = Path(__file__).resolve().parent
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Rule:
    """One way to judge a completion: find the answer (None: none), compare it with the row's."""

    extract: Callable[[str], str | None]
    equal: Callable[[str, str], bool]


def ask_prompt(row: Row) -> tuple[str, str]:
    """The row's prompt as it is; nothing of the reply is written already."""
    return row["prompt"], ""


@dataclass(frozen=True)
class Task:
    """One benchmark. The score is the first of its rules: of kind choice acc, of kind code base."""

    name: str
    kind: str = "text"  # judge what is written; "choice": compare likelihoods; "code": run it
    file: str = ""  # rows to score, below data/; empty: NAME/test.jsonl
    shots: str = ""  # rows that examples are taken from, below data/
    rules: dict[str, Rule] = field(default_factory=dict)
    header: Callable[[Row], str] = lambda row: ""  # said once, before the examples
    chat: Callable[[Row], tuple[str, str]] = ask_prompt  # the user's message, how the reply begins
    plain: Callable[[Row], tuple[str, str]] = ask_prompt  # the same as text without markup
    between: str = " "  # in plain text: what stands between prompt and reply,
    end: str = ""  # what ends an example's reply,
    stops: tuple[str, ...] = ()  # and before which of these texts a completion is cut
    program: Callable[[Row, str, str], str] | None = None  # (row, completion, form) -> program
    max_new_tokens: int = 512

    @property
    def path(self) -> Path:
        """The file of the rows to score."""
        return HERE / (self.file or f"{self.name}/test.jsonl")  # an absolute one stays


# ---- numbers: GSM8K, SVAMP ----


def strict_number(text: str) -> str | None:
    """The number after the first `#### `."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found and found[1]


def last_number(text: str) -> str | None:
    """The last thing that looks like a number."""
    found = [match[0] for match in re.finditer(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
    return found[-1] if found else None


def plain_number(text: str) -> str:
    """Without commas, dollar signs, all up to the last `#### `, one final full stop."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def same_digits(found: str, answer: str) -> bool:
    """The same characters once both are plain: "18.00" is not "18"."""
    return plain_number(found) == plain_number(answer)


def same_decimal(found: str, answer: str) -> bool:
    """Equal as exact decimals: "51.0" is "51"; what is no number equals nothing."""
    try:
        return Decimal(plain_number(found)) == Decimal(plain_number(answer))
    except InvalidOperation:
        return False


# ---- expressions: MATH-500. The score knows no algebra ----

SPELLINGS = (  # what is written in two ways, and the one that is kept; in this order
    (r"\n", ""),
    (r"\\!", ""),
    (r"\\\\", r"\\"),
    (r"\\[td]frac", r"\\frac"),
    (r"\\left|\\right", ""),
    (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$", ""),
    (r"\\text\{ .*$", ""),
    (r"\\?%", ""),
    (r" \.", " 0."),
    (r"\{\.", "{0."),
    (r"^\.(?=\d)", "0."),
    (r"\.$", ""),
    (r"^[^=]{1,2}=(?=[^=]*$)", ""),
    (r"\s", ""),
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r"\\frac([^{}\\])([^{}\\])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{}\\])\{", r"\\frac{\1}{"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([^{}\\])", r"\1{\2}"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}"),
)


def boxed(text: str) -> str | None:
    r"""What the last \boxed holds, None when it is not closed; of `\boxed 5` the next word."""
    _, found, rest = text.rpartition("\\boxed")
    group = rest.lstrip(" ")
    if not found or not group.startswith("{"):
        word = re.match(r" +([^\s$]+)", rest) if found else None
        return word and word[1]
    depth = 0
    for i, c in enumerate(group):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return group[1:i]
    return None


def normalize(text: str) -> str:
    r"""One spelling: `\dfrac12` and `0.5` are `\frac{1}{2}`, `x = 3\text{ cm}` is `3`."""
    text = text.strip()
    while whole := re.fullmatch(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}\.?", text):
        text = whole[1].strip()
    for pattern, kept in SPELLINGS:
        text = re.sub(pattern, kept, text).strip()
    return text


def exact_number(text: str) -> Fraction | None:
    r"""The value of an integer (also 1,234 and 1{,}234), a decimal, a/b or \frac{a}{b}."""
    text = text.replace("{,}", ",").replace("$", "")
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)", text):
        return Fraction(Decimal(text))  # int(text) refuses more than 4,300 digits
    parts = re.fullmatch(r"(-?)\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}", text)
    parts = parts or re.fullmatch(r"()(-?[0-9.]+)/(-?[0-9.]+)", text)
    if not parts:
        return None
    above, below = exact_number(parts[2]), exact_number(parts[3])
    if above is None or not below:
        return None
    return (-above if parts[1] else above) / below


def elements(text: str) -> tuple[str, list[str]]:
    """The outer brackets ("" without) and what the commas outside of others separate."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    brackets = ""
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}":
        brackets, text = text[0] + text[-1], text[1:-1]
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return brackets, parts


def same_expression(found: str, answer: str) -> bool:
    """The same normalised text, number, or brackets around equal elements."""
    a, b = normalize(found), normalize(answer)
    x, y = exact_number(a), exact_number(b)
    if a == b or x is not None or y is not None:
        return a == b or x == y
    (kind, left), (other, right) = elements(a), elements(b)
    if kind != other or len(left) != len(right) or not kind and len(left) == 1:
        return False
    return all(len(u) < len(a) and same_expression(u, v) for u, v in zip(left, right))


def same_symbolically(found: str, answer: str) -> bool:
    """math-verify's verdict on the two as LaTeX. The package is an extra, and slow to import."""
    math_verify = importlib.import_module("math_verify")
    latex = [math_verify.LatexExtractionConfig()]  # the other parser evaluates what it reads
    sides = [math_verify.parse(f"\\boxed{{{text}}}", latex) for text in (answer, found)]
    return math_verify.verify(*sides)


# ---- choices: ARC, MMLU ----


def best_choice(logprobs: Sequence[float], choices: Sequence[str], rule: str) -> int:
    """acc: the likeliest; acc_norm: the largest log p / characters. The first one on ties."""
    scores = [p / len(c) if rule == "acc_norm" else p for p, c in zip(logprobs, choices)]
    return scores.index(max(scores))


def mmlu_header(row: Row) -> str:
    """Names the subject."""
    subject = row["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


# ---- every task by name ----


def after_hashes(text: str) -> str | None:
    """What follows the last line's ####."""
    found = re.findall(r"####([^\n]*)", text)
    return found[-1].strip() if found else None


def same_words(found: str, answer: str) -> bool:
    """The same words, whatever the blanks."""
    return found.split() == answer.split()


def ask_mbpp(row: Row) -> tuple[str, str]:
    """The request, and a reply that has opened a block of code."""
    return row["prompt"], "```python\n"


def ask_mbpp_plain(row: Row) -> tuple[str, str]:
    """The request, and the mark at which the code begins."""
    return row["prompt"], "\n[BEGIN]\n"


ENDS = ("Question:", "</s>", "<|im_end|>")
BOXED = {"boxed": Rule(boxed, same_expression)}
if importlib.util.find_spec("math_verify"):
    BOXED["symbolic"] = Rule(boxed, same_symbolically)
GSM8K = {"flexible": Rule(last_number, same_digits), "strict": Rule(strict_number, same_digits)}
SVAMP = {"number": Rule(last_number, same_decimal)}
OWN = Task("own", rules={"answer": Rule(after_hashes, same_words)}, stops=("Question:",))
OWN = replace(OWN, between="\n", max_new_tokens=128)
OWN_COLUMNS = {"messages", "prompt", "completion", *FORMATS["prompt", "completion"].split()}
MATH500 = Task("math500", rules=BOXED, between="\n", stops=ENDS[1:], max_new_tokens=2048)
HUMANEVAL = Task("humaneval", "code", between="", stops=code.HUMANEVAL_STOPS)
MBPP = Task("mbpp", "code", shots="mbpp/shots.jsonl", between="", stops=code.MBPP_STOPS)
MBPP = replace(MBPP, chat=ask_mbpp, plain=ask_mbpp_plain, end="\n[DONE]", program=code.mbpp_program)
ALL = [
    *(
        replace(OWN, name=n, file=f"tiny/test/{n}.jsonl")
        for n in ("math", "word", "science", "code")
    ),
    Task("gsm8k", shots="gsm8k/train.jsonl", rules=GSM8K, stops=ENDS, max_new_tokens=1024),
    MATH500,
    Task("svamp", rules=SVAMP, stops=ENDS),
    Task("mmlu_stem", "choice", shots="mmlu_stem/dev.jsonl", header=mmlu_header),
    Task("arc_challenge", "choice", shots="arc_challenge/train.jsonl"),
    Task("arc_easy", "choice", shots="arc_easy/train.jsonl"),
    replace(HUMANEVAL, chat=code.humaneval_chat, program=code.humaneval_program),
    MBPP,
    replace(MBPP, name="mbpp_plus", file="mbpp/plus.jsonl"),
]
TASKS = {task.name: task for task in ALL}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, or .jsonl files of one's own. Raises ValueError on unknown names."""
    if wrong := [name for name in names if name not in TASKS and not name.endswith(".jsonl")]:
        known = ", ".join(TASKS)
        raise ValueError(f"tasks: expected some of {known} or .jsonl files, found {wrong}")
    tasks = [TASKS.get(name) or own_task(Path(name)) for name in names]
    found = [task.name for task in tasks]
    if len(set(found)) < len(found) or any(TASKS.get(t.name, t) != t for t in tasks):
        raise ValueError(f"tasks: expected other files than named as a task, each once: {found}")
    return tasks


def own_task(file: Path) -> Task:
    """A file of one's own: of kind choice when its first row has choices. Raises ValueError."""
    where, line = next(read_lines(file), (str(file), b"{}"))
    kind = "choice" if "choices" in parse_object(line, where) else "text"
    return replace(OWN, name=file.stem, file=str(file.resolve()), kind=kind)


def load_items(task: Task, limit: int = 0) -> list[Row]:
    """The rows to score. Raises ValueError with file and line, or naming what prepares them."""
    if not task.path.exists() and task.name in TASKS:
        raise ValueError(f"{task.path}: run python data/prepare.py {task.path.parent.name} first")
    items = [parse_item(line, where, task) for where, line in read_lines(task.path)]
    counts = Counter(item["id"] for item in items)
    twice = [name for name, count in counts.items() if count > 1]
    if not items or twice:
        raise ValueError(f"{task.path}: expected items with different ids, found twice: {twice}")
    return items[: limit or None]


def load_pool(task: Task) -> list[Row]:
    """The rows that examples are taken from. Raises ValueError when there are none."""
    if not task.shots:
        raise ValueError(f"{task.name}: there are no rows to take examples from; --shots 0")
    return load_items(replace(task, file=task.shots))


def parse_item(line: bytes, where: str, task: Task) -> Row:
    """A row as described above; without an id it has its line's number. Raises ValueError."""
    row, kind = parse_object(line, where), task.kind
    if task.name not in TASKS:
        unread_columns(row, OWN_COLUMNS, where)
    asked = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    texts = ("prompt", "code", "tests") if kind == "code" else ()
    choices = row.get("choices", [])
    listed = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    letters = tuple(LETTERS[: len(choices)] if listed else "")
    fits = {
        "messages up to the answer": check_messages(asked, where)[-1]["role"] != "assistant",
        "an answer in text": isinstance(row.get("answer"), str),
        "a completion in text": isinstance(row.get("completion", "-"), str),
        f"{', '.join(texts)} in text": all(isinstance(row.get(key), str) for key in texts),
        "choices in each row or none": (kind == "choice") == bool(choices),
        "choices, a list of texts": listed,
        "a letter of the choices": not choices or row.get("answer") in letters,
    }
    for expected, fine in fits.items():
        if not fine:
            raise ValueError(f"{where}: expected {expected}, found {repr(row)}")
    return {**row, "id": str(row.get("id", where.rpartition(":")[2]))}


def choose_shots(task: Task, item: Row, pool: Sequence[Row], count: int) -> list[Row]:
    """The first `count` rows of the pool with the item's subject. Raises ValueError."""
    shots = [row for row in pool if row.get("subject") == item.get("subject")][:count]
    if len(shots) < count:
        raise ValueError(f"{task.name}: expected {count} examples for {item['id']}: {len(shots)}")
    return shots


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and the replies whose likelihood is asked: choices, or the solution."""

    text: str
    replies: list[str]


def ask(task: Task, item: Row, shots: Sequence[Row], form: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt of one item in chat or plain form. Raises ValueError on what it would lose."""
    solution: Any = item.get("completion", "")
    solution = item.get("code", solution) if form == "plain" else solution
    replies: list[Any] = item.get("choices") or ([solution] if solution else [])
    lost = [name for name in ("messages", "system", "tools") if item.get(name)]
    if form == "plain" and lost:
        raise ValueError(f"{task.name}: {item['id']}: {lost} have no plain form; --format chat")
    if form == "plain":
        text = task.header(item)
        for shot in shots:
            reply = shot.get("code") or shot["completion"]
            text += "".join(task.plain(shot)) + task.between + reply + task.end + "\n\n"
        text += "".join(task.plain(item))
        return Prompt(text, [task.between + reply for reply in replies])
    turns = []
    for shot in shots:
        turns.append({"role": "user", "content": task.chat(shot)[0]})
        turns.append({"role": "assistant", "content": shot["completion"]})
    user, begun = ("", "") if "messages" in item else task.chat(item)
    turns += item.get("messages", [{"role": "user", "content": user}])
    turns[0] = {**turns[0], "content": task.header(item) + turns[0]["content"]}
    if item.get("system"):
        turns.insert(0, {"role": "system", "content": item["system"]})
    if task.name not in TASKS:
        check_rendering(tokenizer, turns, item.get("tools"), f"{task.name}: {item['id']}")
    text = tokenizer.render(turns, add_generation_prompt=True, tools=item.get("tools")) + begun
    return Prompt(text, [reply.removeprefix(begun) for reply in replies])


def judge(task: Task, record: Row) -> Row:
    """The record with what each rule extracted and its verdict; `correct` is the first rule's."""
    extracted: dict[str, str | None] = {}
    verdicts: dict[str, bool] = {}
    for name in ("acc", "acc_norm") if task.kind == "choice" else ():
        best = LETTERS[best_choice(record["logprobs"], record["choices"], name)]
        extracted[name], verdicts[name] = best, best == record["answer"]
    for name, rule in task.rules.items() if task.kind == "text" else ():
        found = rule.extract(record["completion"])
        extracted[name] = found
        verdicts[name] = found is not None and rule.equal(found, record["answer"])
    correct = next(iter(verdicts.values()))
    return {**record, "extracted": extracted, "verdicts": verdicts, "correct": correct}
