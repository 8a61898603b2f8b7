r"""Benchmarks: where rows come from, how each is asked, how an answer is read and judged.

A row of data/NAME/SPLIT.jsonl, written by `python data/prepare.py NAME`, is an object of
    id           text, unique in its file
    prompt       what the model is asked, without examples and without chat markup
    completion   the reference solution as an assistant's reply
    answer       what an answer is compared with: a number, an expression, a letter; "" for code
    subject      where the source has one: few-shot examples are of the same subject
    choices      (kind choice) the replies whose likelihoods are compared: A, B, C, ...
    code, entry_point, tests, plus_tests    (kind code) solution, its function, programs that test it
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

import csv
import io
import json
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
from data.chat import Tokenizer, check_messages
from data.code import Row, cut, json_lines

try:
    import math_verify
except ImportError:  # an extra: without it, the rule symbolic is not reported
    math_verify = None

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
    convert: Callable[[dict[str, bytes]], dict[str, list[Row]]] | None = None  # files -> splits
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


def ask_question(text: str) -> str:
    """lm-evaluation-harness' zero-shot prompt; the solution follows."""
    return f"Question: {text}\nAnswer:"


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


def convert_gsm8k(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{question, answer: "steps with marks <<48/2=24>> #### 24"}; the marks are not for reading."""
    rows: dict[str, list[Row]] = {split: [] for split in files}
    for split, content in files.items():
        for i, source in enumerate(json_lines(content)):
            solution = re.sub(r"<<[^<>]*>>", "", source["answer"])
            row = {"id": f"{split}-{i}", "prompt": ask_question(source["question"])}
            row |= {"completion": solution, "answer": solution.rpartition("#### ")[2].strip()}
            rows[split].append(row)
    return rows


def convert_svamp(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{ID, Body, Question, Equation, Answer: 51.0}: one file without splits, all of it is test."""
    rows = []
    for source in json.loads(files["test"]):
        body = source["Body"].strip()
        body += "" if body[-1] in ".?!" else "."
        equation = source["Equation"].strip().removeprefix("(").removesuffix(")").strip()
        equation, answer = (
            re.sub(r"(\d)\.0\b", r"\1", str(s)) for s in (equation, source["Answer"])
        )
        row = {"id": source["ID"], "prompt": ask_question(f"{body} {source['Question'].strip()}")}
        row |= {"completion": f"{equation} = {answer}\n#### {answer}", "answer": answer}
        rows.append(row | {"subject": source["Type"]})
    return {"test": rows}


# ---- expressions: MATH-500. No algebra in the score: a parser of it would run what a model wrote ----

ASK_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
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
    r"""What the last \boxed holds, None when its brace is not closed; of `\boxed 5` the next word."""
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
    r"""One spelling of an answer: `\dfrac12` and `0.5` are `\frac{1}{2}`, `x = 3\text{ cm}` is `3`."""
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
    above, below = (exact_number(parts[2]), exact_number(parts[3])) if parts else (None, None)
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
    """The same normalised text, else the same number, else the same brackets around equal elements."""
    a, b = normalize(found), normalize(answer)
    x, y = exact_number(a), exact_number(b)
    if a == b or x is not None or y is not None:
        return a == b or x == y
    (kind, left), (other, right) = elements(a), elements(b)
    if kind != other or len(left) != len(right) or not kind and len(left) == 1:
        return False
    return all(len(u) < len(a) and same_expression(u, v) for u, v in zip(left, right))


def same_symbolically(found: str, answer: str) -> bool:
    """math-verify's verdict on the two as LaTeX."""
    gold, mine = (math_verify.parse(f"\\boxed{{{text}}}") for text in (answer, found))
    return math_verify.verify(gold, mine)


def convert_math500(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{problem, solution, answer, subject, unique_id}."""
    rows = []
    for source in json_lines(files["test"]):
        row = {"id": source["unique_id"], "prompt": f"{source['problem']}\n{ASK_BOXED}"}
        row |= {"completion": source["solution"], "answer": source["answer"]}
        rows.append(row | {"subject": source["subject"]})
    return {"test": rows}


# ---- choices: ARC, MMLU ----


def best_choice(logprobs: Sequence[float], choices: Sequence[str], rule: str) -> int:
    """acc: the likeliest; acc_norm: the largest log p / characters. The first one on ties."""
    scores = [p / len(c) if rule == "acc_norm" else p for p, c in zip(logprobs, choices)]
    return scores.index(max(scores))


def convert_arc(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """{id, question: {stem, choices: [{text, label}]}, answerKey}; labels 1, 2 become A, B."""
    rows: dict[str, list[Row]] = {split: [] for split in files}
    for split, content in files.items():
        for source in json_lines(content):
            labels = [choice["label"] for choice in source["question"]["choices"]]
            choices = [choice["text"] for choice in source["question"]["choices"]]
            right = labels.index(source["answerKey"])
            row = {"id": source["id"], "prompt": ask_question(source["question"]["stem"])}
            row |= {"completion": choices[right], "answer": LETTERS[right], "choices": choices}
            rows[split].append(row)
    return rows


def convert_mmlu(files: dict[str, bytes]) -> dict[str, list[Row]]:
    """Files SPLIT/SUBJECT of lines question, A, B, C, D, letter. Raises ValueError on another line."""
    rows: dict[str, list[Row]] = {}
    for name, content in files.items():
        split, subject = name.split("/")
        lines = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
        for i, line in enumerate(lines):
            if len(line) != 6 or line[5] not in tuple("ABCD"):
                raise ValueError(f"{name}: expected question, four choices, letter, found {line}")
            listed = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", line[1:5]))
            row = {"id": f"{subject}/{i}", "prompt": f"{line[0].strip()}{listed}\nAnswer:"}
            row |= {"completion": line[5], "answer": line[5], "choices": list("ABCD")}
            rows.setdefault(split, []).append(row | {"subject": subject})
    return rows


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


CHAT_STOPS = ("Question:", "</s>", "<|im_end|>")
BOXED_RULES = {"boxed": Rule(boxed, same_expression)}
if math_verify:
    BOXED_RULES["symbolic"] = Rule(boxed, same_symbolically)
OWN = Task("own", rules={"answer": Rule(after_hashes, same_words)}, stops=("Question:",))
OWN = replace(OWN, between="\n", max_new_tokens=128)
MBPP = Task("mbpp", "code", convert=code.convert_mbpp, shots="mbpp/shots.jsonl", between="")
MBPP = replace(MBPP, chat=lambda row: (row["prompt"], "```python\n"), program=code.mbpp_program)
MBPP = replace(MBPP, plain=lambda row: (row["prompt"], "\n[BEGIN]\n"), stops=code.MBPP_STOPS)
ALL = [
    replace(OWN, name=n, file=f"tiny/test/{n}.jsonl") for n in ("math", "word", "science", "code")
]
ALL += [
    Task(
        "gsm8k",
        convert=convert_gsm8k,
        shots="gsm8k/train.jsonl",
        rules={
            "flexible": Rule(last_number, same_digits),
            "strict": Rule(strict_number, same_digits),
        },
        stops=CHAT_STOPS,
        max_new_tokens=1024,
    ),
    Task(
        "math500",
        convert=convert_math500,
        rules=BOXED_RULES,
        between="\n",
        stops=("<|im_end|>", "</s>"),
        max_new_tokens=2048,
    ),
    Task(
        "svamp",
        convert=convert_svamp,
        rules={"number": Rule(last_number, same_decimal)},
        stops=CHAT_STOPS,
    ),
    Task(
        "mmlu_stem", "choice", convert=convert_mmlu, shots="mmlu_stem/dev.jsonl", header=mmlu_header
    ),
    Task("arc_challenge", "choice", convert=convert_arc, shots="arc_challenge/train.jsonl"),
    Task("arc_easy", "choice", convert=convert_arc, shots="arc_easy/train.jsonl"),
    Task(
        "humaneval",
        "code",
        convert=code.convert_humaneval,
        chat=code.humaneval_chat,
        program=code.humaneval_program,
        between="",
        stops=code.HUMANEVAL_STOPS,
    ),
    replace(MBPP, end="\n[DONE]"),
    replace(MBPP, name="mbpp_plus", file="mbpp/plus.jsonl", convert=None, end="\n[DONE]"),
]
TASKS = {task.name: task for task in ALL}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, or a .jsonl file of one's own. Raises ValueError on unknown and repeated names."""
    tasks = []
    for name in names:
        if name not in TASKS and not name.endswith(".jsonl"):
            raise ValueError(
                f"tasks: expected some of {', '.join(TASKS)} or .jsonl files, found {name!r}"
            )
        tasks.append(TASKS.get(name) or own_task(Path(name)))
    found = [task.name for task in tasks]
    if len(set(found)) < len(found) or any(t.name in TASKS and t != TASKS[t.name] for t in tasks):
        raise ValueError(f"tasks: expected different names, and files not named as a task: {found}")
    return tasks


def own_task(file: Path) -> Task:
    """A file of one's own: of kind choice when its first row has choices."""
    row = parse_object(next(read_lines(file), ("", b"{}"))[1], str(file))
    kind = "choice" if "choices" in row else "text"
    return replace(OWN, name=file.stem, file=str(file.resolve()), kind=kind)


def load_items(task: Task, limit: int = 0) -> list[Row]:
    """The rows to score. Raises ValueError with file and line, or naming what prepares the file."""
    if not task.path.exists() and task.name in TASKS:
        raise ValueError(f"{task.path}: run python data/prepare.py {task.path.parent.name} first")
    items = [parse_item(line, where, task.kind) for where, line in read_lines(task.path)]
    twice = [name for name, n in Counter(item["id"] for item in items).items() if n > 1]
    if not items or twice:
        raise ValueError(f"{task.path}: expected items with different ids, found twice: {twice}")
    return items[: limit or None]


def load_pool(task: Task) -> list[Row]:
    """The rows that examples are taken from. Raises ValueError when there are none."""
    if not task.shots:
        raise ValueError(f"{task.name}: there are no rows to take examples from; --shots 0")
    return load_items(replace(task, file=task.shots))


def parse_item(line: bytes, where: str, kind: str) -> Row:
    """{prompt or messages, answer, id (else the line's number), ...}, see above. Raises ValueError."""
    row = parse_object(line, where)
    asked = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    messages = check_messages(asked, where)
    fits = {
        "messages up to the assistant's answer": messages[-1]["role"] != "assistant",
        "answer, a text": isinstance(row.get("answer"), str),
        "completion, a text": isinstance(row.get("completion", "-"), str)
        and row.get("completion", "-"),
        "prompt, code and tests, texts": kind != "code"
        or all(isinstance(row.get(key), str) for key in ("prompt", "code", "tests")),
        "choices, texts, and the right one's letter": (kind == "choice") == ("choices" in row)
        and (kind != "choice" or has_choices(row)),
    }
    for expected, fine in fits.items():
        if not fine:
            raise ValueError(f"{where}: expected {expected}, found {repr(row)}")
    return {**row, "id": str(row.get("id", where.rpartition(":")[2]))}


def has_choices(row: Row) -> bool:
    """At least two choices in text, and an answer that is one's letter?"""
    choices = row["choices"]
    fits = (
        isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)
    )
    return fits and all(choices) and row["answer"] in tuple(LETTERS[: len(choices)])


def choose_shots(task: Task, item: Row, pool: Sequence[Row], count: int) -> list[Row]:
    """The first `count` rows of the pool with the item's subject. Raises ValueError when too few."""
    shots = [row for row in pool if row.get("subject") == item.get("subject")][:count]
    if len(shots) < count:
        raise ValueError(
            f"{task.name}: expected {count} examples for {item['id']}, found {len(shots)}"
        )
    return shots


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and the replies whose likelihood is asked: choices, or the solution."""

    text: str
    replies: list[str]


def ask(task: Task, item: Row, shots: Sequence[Row], form: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt of one item in chat or plain form. Raises ValueError on messages in plain form."""
    replies = item.get("choices") or ([item["completion"]] if "completion" in item else [])
    if form == "chat":
        turns, begun = [], ""
        for shot in shots:
            turns.append({"role": "user", "content": task.chat(shot)[0]})
            turns.append({"role": "assistant", "content": shot["completion"]})
        if "messages" in item:
            turns += item["messages"]
        else:
            user, begun = task.chat(item)
            turns.append({"role": "user", "content": user})
        turns[0] = {**turns[0], "content": task.header(item) + turns[0]["content"]}
        text = tokenizer.render(turns, add_generation_prompt=True) + begun
        return Prompt(text, [reply.removeprefix(begun) for reply in replies])
    if "messages" in item:
        raise ValueError(f"{task.name}: {item['id']}: messages have no plain form; --format chat")
    text = task.header(item)
    for shot in shots:
        reply = shot.get("code", shot.get("completion", ""))
        text += "".join(task.plain(shot)) + task.between + reply + task.end + "\n\n"
    text += "".join(task.plain(item))
    if task.kind == "code":
        replies = [item["code"]]
    return Prompt(text, [task.between + reply for reply in replies])


def judge(task: Task, record: Row) -> Row:
    """The record with what each rule extracted and its verdict; `correct` is the first rule's."""
    extracted: dict[str, str | None] = {}
    verdicts = {}
    if task.kind == "choice":
        for rule in ("acc", "acc_norm"):
            best = LETTERS[best_choice(record["logprobs"], record["choices"], rule)]
            extracted[rule], verdicts[rule] = best, best == record["answer"]
    else:
        for name, rule in task.rules.items():
            found = rule.extract(record["completion"])
            extracted[name] = found
            verdicts[name] = found is not None and rule.equal(found, record["answer"])
    correct = next(iter(verdicts.values()))
    return {**record, "extracted": extracted, "verdicts": verdicts, "correct": correct}
