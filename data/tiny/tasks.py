"""Four small task families with worked steps: math, word, science, code.

Every function is pure: randomness comes in as a `random.Random`, so a seed names a data set.
A row is `{"id", "task", "prompt", "completion", "answer"}`; a completion ends with `#### ANSWER`.
Pretraining sees bare facts (`drill`) and easy rows, mostly without steps; post-training sees hard
rows with their steps, each of which is one of the drilled facts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TASKS = ("math", "word", "science", "code")
SPLIT_ROWS = {"test": 256, "dev": 128, "train": 2000}
TOP = 99  # no number is larger
TABLE = 9  # products of numbers up to this are known by heart
Row = dict[str, str]
Draft = tuple[str, list[str], str]  # prompt, worked lines, answer


@dataclass(frozen=True)
class Profile:
    """How difficult one question is: its operations, its largest operand, its largest value."""

    steps: int
    top: int
    cap: int


def profile(rng: random.Random, level: str) -> Profile:
    """Draw the difficulty of one question of a level ("easy" or "hard")."""
    if level == "easy":
        return Profile(rng.choices((1, 2, 3), (40, 50, 10))[0], 15, 50)
    if level != "hard":
        raise ValueError(f"unknown level {level!r}: easy or hard")
    if rng.random() < 0.3:
        return Profile(2, 15, 50)
    return Profile(rng.choices((2, 3, 4), (30, 40, 30))[0], 40, TOP)


# ---- facts ----


def apply(a: int, op: str, b: int) -> int:
    """Return `a op b` for +, -, * and exact /."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]


def equation(a: int, op: str, b: int) -> str:
    """Write one operation as the drills teach it, beyond the times table by tens and ones."""
    result = apply(a, op, b)
    middle = ""
    if op == "*" and max(a, b) > TABLE:
        tens, ones = max(a, b) // 10 * 10, max(a, b) % 10
        middle = f"{tens * min(a, b)} + {ones * min(a, b)} = "
    elif op == "/" and result > TABLE:
        middle = f"{result // 10 * 10} + {result % 10} = "
    return f"{a} {op} {b} = {middle}{result}"


def factor(rng: random.Random, value: int, cap: int) -> int | None:
    """Draw a digit by which `value` may be multiplied below `cap`, or None."""
    most = min(9, cap // max(value, 1))
    return rng.randint(2, most) if most >= 2 else None


def divisor(rng: random.Random, value: int) -> int | None:
    """Draw a digit that divides `value`, or None."""
    digits = [d for d in range(2, 10) if value >= d and value % d == 0]
    return rng.choice(digits) if digits else None


def addend(rng: random.Random, value: int, difficulty: Profile) -> int | None:
    """Draw a number that may be added to `value` below the cap, or None."""
    room = min(difficulty.top, difficulty.cap - value)
    return rng.randint(1, room) if room >= 1 else None


def subtrahend(rng: random.Random, value: int, difficulty: Profile) -> int | None:
    """Draw a number that may be taken from `value`, or None."""
    room = min(difficulty.top, value)
    return rng.randint(1, room) if room >= 1 else None


def operand(rng: random.Random, op: str, value: int, difficulty: Profile) -> int | None:
    """Draw the right operand of `value op ...`, or None where there is none."""
    if op == "*":
        return factor(rng, value, difficulty.cap)
    return (addend if op == "+" else subtrahend)(rng, value, difficulty)


def operation(rng: random.Random, value: int, difficulty: Profile) -> tuple[str, int]:
    """Draw an operator of + - * and a right operand that keep the value in range."""
    for op in rng.sample("+-*", 3):
        number = operand(rng, op, value, difficulty)
        if number is not None:
            return op, number
    raise AssertionError("some operation always fits")


# ---- math ----


def math_draft(rng: random.Random, difficulty: Profile) -> Draft:
    """An expression of + - * and brackets, built outwards from a number."""
    value = rng.randint(2, difficulty.top)
    text, last, lines = str(value), "", []
    for _ in range(difficulty.steps):
        op, number = operation(rng, value, difficulty)
        if rng.random() < 0.3:
            inner = f"({text})" if last in ("+", "-") or last == op else text
            a, b = min(difficulty.cap, value + number) if op == "-" else number, value
            text = f"{a} {op} {inner}"
        else:
            inner = f"({text})" if last in ("+", "-") and op == "*" else text
            a, b = value, number
            text = f"{inner} {op} {b}"
        lines.append(equation(a, op, b))
        value, last = apply(a, op, b), op
    return f"Compute {text}.", lines, str(value)


# ---- word problems ----

NAMES = ("Mia", "Sam", "Lea", "Tom", "Ana", "Ben", "Eva", "Max")
THINGS = ("pens", "books", "coins", "cards", "eggs", "stamps", "apples", "stones")
BOXES = ("boxes", "bags", "packs", "jars")
GAINS = ("{a} buys {n} more.", "{a} finds {n} more.", "{b} gives {a} {n} more.")
LOSSES = ("{a} gives {n} to {b}.", "{a} loses {n}.", "{a} sells {n}.")


@dataclass
class Story:
    """A word problem while it is told: what was said, the steps, how many things there are now."""

    difficulty: Profile
    names: list[str]
    thing: str
    value: int
    said: list[str]
    lines: list[str]

    def step(self, op: str, number: int) -> None:
        """Apply one operation to the running number."""
        self.lines.append(equation(self.value, op, number))
        self.value = apply(self.value, op, number)

    def say(self, sentence: str, **slots: object) -> None:
        """Tell one sentence."""
        a, b = self.names
        self.said.append(sentence.format(a=a, b=b, t=self.thing, **slots))


def open_story(rng: random.Random, difficulty: Profile) -> Story:
    """Begin with a number of things, or with boxes of them when there are steps enough."""
    names, thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    story = Story(difficulty, names, thing, rng.randint(2, difficulty.top), [], [])
    count = factor(rng, story.value, difficulty.cap)
    if count and rng.random() < 0.3:
        story.say("{a} has {k} {box} of {n} {t}.", k=count, box=rng.choice(BOXES), n=story.value)
        story.lines.append(equation(count, "*", story.value))
        story.value *= count
    else:
        story.say("{a} has {n} {t}.", n=story.value)
    return story


def tell_change(rng: random.Random, story: Story) -> None:
    """Tell one gain or loss of a plain number."""
    gain = rng.random() < 0.5
    number = operand(rng, "+" if gain else "-", story.value, story.difficulty)
    if number is None:
        gain = not gain
        number = operand(rng, "+" if gain else "-", story.value, story.difficulty)
    assert number is not None  # a value has room above it or below it
    story.say(rng.choice(GAINS if gain else LOSSES), n=number)
    story.step("+" if gain else "-", number)


def tell_groups(rng: random.Random, story: Story) -> bool:
    """Tell a gain or a loss of several equal groups (two steps), if one fits."""
    gain = rng.random() < 0.5
    room = story.difficulty.cap - story.value if gain else story.value
    each = rng.randint(2, max(2, min(story.difficulty.top, room // 2)))
    count = factor(rng, each, room)
    if count is None:
        return False
    said = "{a} buys {k} {box} of {n}." if gain else "{a} gives {n} to each of {k} friends."
    story.say(said, k=count, n=each, box=rng.choice(BOXES))
    story.lines.append(equation(count, "*", each))
    story.step("+" if gain else "-", count * each)
    return True


def share_end(rng: random.Random, story: Story) -> str | None:
    """End with an equal share."""
    count = divisor(rng, story.value)
    if count is None:
        return None
    story.say("{a} splits them among {k} friends.", k=count)
    story.step("/", count)
    return "How many does each friend get?"


def times_end(rng: random.Random, story: Story) -> str | None:
    """End with somebody who has several times as many."""
    count = factor(rng, story.value, story.difficulty.cap)
    if count is None or story.value == 0:
        return None
    story.say("{b} has {k} times as many.", k=count)
    story.step("*", count)
    return "How many does {b} have?"


def together_end(rng: random.Random, story: Story) -> str | None:
    """End with the sum of two people's things."""
    number = operand(rng, "+", story.value, story.difficulty)
    if number is None:
        return None
    story.say("{b} has {n} {t}.", n=number)
    story.step("+", number)
    return "How many do they have together?"


def word_draft(rng: random.Random, difficulty: Profile) -> Draft:
    """A story of gains and losses, then a question about its end."""
    story = open_story(rng, difficulty)
    question = None
    while len(story.lines) < difficulty.steps:
        left = difficulty.steps - len(story.lines)
        if left == 1 and rng.random() < 0.4:
            question = rng.choice((share_end, times_end, together_end))(rng, story)
            if question:
                break
        if left < 2 or rng.random() < 0.6 or not tell_groups(rng, story):
            tell_change(rng, story)
    story.say(question or "How many {t} does {a} have now?")
    return " ".join(story.said), story.lines, str(story.value)


# ---- science ----

UNITS = {
    "voltage": "V", "current": "A", "resistance": "ohm", "power": "W", "energy": "J",
    "charge": "C", "time": "s", "speed": "m/s", "distance": "m", "mass": "kg",
    "density": "kg/m^3", "volume": "m^3", "momentum": "kg m/s", "acceleration": "m/s^2",
    "force": "N", "work": "J", "pressure": "Pa", "area": "m^2", "frequency": "Hz",
    "wavelength": "m",
}  # fmt: skip
FORMULAS = (  # product, first factor, second factor
    ("voltage", "current", "resistance"),
    ("power", "voltage", "current"),
    ("energy", "power", "time"),
    ("charge", "current", "time"),
    ("distance", "speed", "time"),
    ("mass", "density", "volume"),
    ("momentum", "mass", "speed"),
    ("force", "mass", "acceleration"),
    ("work", "force", "distance"),
    ("force", "pressure", "area"),
    ("speed", "frequency", "wavelength"),
)
Rule = tuple[str, str, str, str]  # result, left, operator, right


def rules() -> list[Rule]:
    """Every formula solved for each of its three quantities."""
    forms = []
    for product, first, second in FORMULAS:
        forms.append((product, first, "*", second))
        forms.append((first, product, "/", second))
        forms.append((second, product, "/", first))
    return forms


def chains(steps: int) -> list[tuple[Rule, ...]]:
    """Every way to apply `steps` rules in a row, each using the result of the one before."""
    found: list[tuple[Rule, ...]] = [(rule,) for rule in rules()]
    for _ in range(steps - 1):
        found = [(*chain, rule) for chain in found for rule in rules() if follows(chain, rule)]
    return found


def follows(chain: tuple[Rule, ...], rule: Rule) -> bool:
    """Whether `rule` takes the chain's last result and otherwise only quantities not met before."""
    met = {name for result, left, _, right in chain for name in (result, left, right)}
    result, left, _, right = rule
    new = {result, left, right} - {chain[-1][0]}
    return chain[-1][0] in (left, right) and len(new) == 2 and not new & met


CHAINS = {steps: chains(steps) for steps in (1, 2)}


def assign(
    rng: random.Random, rule: Rule, known: dict[str, int], difficulty: Profile
) -> list[str] | None:
    """Draw the missing inputs of a rule, store all its values; returns the new names, or None."""
    result, left, op, right = rule
    new = [name for name in (left, right) if name not in known]
    drawn = draw_factors(rng, difficulty) if len(new) == 2 else None
    a: int | None
    b: int | None
    if op == "*":
        a, b = drawn or (known.get(left), known.get(right))
        a, b = a or factor(rng, b or 0, difficulty.cap), b or factor(rng, a or 0, difficulty.cap)
    elif drawn:
        a, b = drawn[0] * drawn[1], drawn[1]
    elif left in known:
        a, b = known[left], divisor(rng, known[left])
    else:
        b = known[right]
        count = factor(rng, b, difficulty.cap) if b > 1 else None
        a = b * count if count else None
    if not a or not b:
        return None
    known |= {left: a, right: b, result: apply(a, op, b)}
    return new


def draw_factors(rng: random.Random, difficulty: Profile) -> tuple[int, int]:
    """Draw two factors, the second a digit, with a product below the cap."""
    second = rng.randint(2, 9)
    first = rng.randint(2, min(difficulty.top, difficulty.cap // second))
    return (first, second) if rng.random() < 0.7 else (second, first)


def science_draft(rng: random.Random, difficulty: Profile) -> Draft:
    """One or two formulas in a row, solved for any of their quantities."""
    steps = 1 if difficulty.steps == 1 or rng.random() < 0.35 else 2
    while True:
        known: dict[str, int] = {}
        chain, given = rng.choice(CHAINS[steps]), []
        for rule in chain:
            new = assign(rng, rule, known, difficulty)
            if new is None:
                break
            given += new
        else:
            return science_text(chain, known, given)


def science_text(chain: tuple[Rule, ...], known: dict[str, int], given: list[str]) -> Draft:
    """Write the question, the steps and the answer, with units."""
    parts = [f"{name} {known[name]} {UNITS[name]}" for name in given]
    lines = []
    for result, left, op, right in chain:
        lines += [f"{result} = {left} {op} {right}", equation(known[left], op, known[right])]
    target = chain[-1][0]
    prompt = f"Given {', '.join(parts[:-1])} and {parts[-1]}, find the {target}."
    return prompt, lines, f"{known[target]} {UNITS[target]}"


# ---- code ----


@dataclass
class Program:
    """A program while it is written: its lines, its variables' values, the trace of its steps."""

    difficulty: Profile
    lines: list[str]
    values: dict[str, int]
    trace: list[str]

    def run(self, target: str, source: str, op: str, number: int) -> None:
        """Trace one assignment `target = source op number`."""
        self.trace.append(f"{target} = {equation(self.values[source], op, number)}")
        self.values[target] = apply(self.values[source], op, number)


def write_assignment(rng: random.Random, program: Program, target: str, source: str) -> None:
    """Write `target = source op number`, or the sum or difference of two variables."""
    other = rng.choice(sorted(program.values))
    a, b = program.values[source], program.values[other]
    if other != source and rng.random() < 0.4:
        op = "-" if a >= b and rng.random() < 0.5 else "+"
        if apply(a, op, b) <= program.difficulty.cap:
            program.lines.append(f"{target} = {source} {op} {other}")
            program.run(target, source, op, b)
            return
    op, number = operation(rng, a, program.difficulty)
    program.lines.append(f"{target} = {source} {op} {number}")
    program.run(target, source, op, number)


def write_loop(rng: random.Random, program: Program, name: str, left: int) -> bool:
    """Write a loop that adds or subtracts the same number a few times, if one fits."""
    turns = rng.randint(2, max(2, min(4, left)))
    op, value = rng.choice("+-"), program.values[name]
    room = (program.difficulty.cap - value if op == "+" else value) // turns
    if left < 2 or room < 2:
        return False
    number = rng.randint(2, min(room, program.difficulty.top))
    program.lines += [f"for i in range({turns}):", f"    {name} = {name} {op} {number}"]
    for _ in range(turns):
        program.run(name, name, op, number)
    return True


def write_branch(rng: random.Random, program: Program, name: str) -> None:
    """Write an `if` on a variable, with one assignment under it."""
    value = program.values[name]
    bound, sign = rng.randint(0, min(program.difficulty.top, value + 20)), rng.choice("<>")
    op, number = operation(rng, value, program.difficulty)
    holds = value > bound if sign == ">" else value < bound
    program.lines += [f"if {name} {sign} {bound}:", f"    {name} = {name} {op} {number}"]
    program.trace.append(f"{value} {sign} {bound} {holds}")
    if holds:
        program.run(name, name, op, number)


def code_draft(rng: random.Random, difficulty: Profile) -> Draft:
    """A short Python program; the question is what it prints."""
    first, second = rng.sample("abcdnxyz", 2)
    program = Program(difficulty, [], {first: rng.randint(2, difficulty.top)}, [])
    if rng.random() < 0.5:
        program.values[second] = rng.randint(2, difficulty.top)
    program.lines = [f"{name} = {value}" for name, value in program.values.items()]
    name = first
    while len(program.trace) < difficulty.steps:
        left, kind = difficulty.steps - len(program.trace), rng.random()
        block = len(program.lines) < 4
        if block and kind < 0.2:
            write_branch(rng, program, name)
        elif not block or kind >= 0.4 or not write_loop(rng, program, name, left):
            source, name = name, rng.choice((first, second))
            write_assignment(rng, program, name, source)
    text = "\n".join([*program.lines, f"print({name})"])
    return f"What does this print?\n{text}", program.trace, str(program.values[name])


# ---- rows ----

DRAFTS: dict[str, Callable[[random.Random, Profile], Draft]] = {
    "math": math_draft,
    "word": word_draft,
    "science": science_draft,
    "code": code_draft,
}


def generate(task: str, rng: random.Random, level: str, worked: bool) -> Row:
    """Draw one row of a task; `worked` puts the steps before the answer."""
    prompt, lines, answer = DRAFTS[task](rng, profile(rng, level))
    completion = "\n".join([*(lines if worked else []), f"#### {answer}"])
    row = {"id": f"{task}-{level}", "task": task, "prompt": prompt}
    return row | {"completion": completion, "answer": answer}


def draw_sum(rng: random.Random) -> tuple[int, int]:
    """Draw two numbers with a sum in range."""
    total = max(rng.randint(0, TOP), rng.randint(0, TOP))
    first = rng.randint(0, total)
    return first, total - first


def draw_product(rng: random.Random) -> tuple[int, int]:
    """Draw two factors of the times table, or a larger number and a digit."""
    if rng.random() < 0.6:
        return rng.randint(0, TABLE), rng.randint(1, TABLE)
    digit = rng.randint(2, 9)
    return rng.randint(TABLE + 1, TOP // digit), digit


def fact(rng: random.Random) -> tuple[int, str, int]:
    """Draw one operation, a quotient always exact: number, operator, number."""
    op = rng.choices("+-*/", (34, 33, 20, 13))[0]
    first, second = draw_sum(rng) if op in "+-" else draw_product(rng)
    if op == "-":
        first += second
    elif op == "/":
        product = first * second
        first, second = product, first if first and rng.random() < 0.3 else second
    elif rng.random() < 0.5:
        first, second = second, first
    return first, op, second


def drill(rng: random.Random) -> Row:
    """A batch of bare facts, either listed in the prompt or left to the answer to choose."""
    listed = rng.random() < 0.7
    count = rng.choices(range(1, 7), (25, 20, 15, 15, 15, 10))[0] if listed else rng.randint(4, 8)
    facts = [fact(rng) for _ in range(count)]
    prompt = f"Write {count} facts."
    if listed:
        prompt = f"Solve {', '.join(f'{a} {op} {b}' for a, op, b in facts)}."
    completion = "\n".join(equation(*each) for each in facts)
    row = {"id": "drill", "task": "drill", "prompt": prompt}
    return row | {"completion": completion, "answer": str(apply(*facts[-1]))}


def post_rows(split: str, seed: int) -> list[Row]:
    """The hard worked rows of a split, of every task; no prompt is there twice or in two splits."""
    return [row for task in TASKS for row in task_rows(task, split, seed)]


def task_rows(task: str, split: str, seed: int) -> list[Row]:
    """The rows of one task and split; test is drawn first, then dev, then train."""
    rng, seen = random.Random(f"{task}-{seed}"), set()
    for name, count in SPLIT_ROWS.items():
        rows: list[Row] = []
        while len(rows) < count:
            row = generate(task, rng, "hard", worked=True)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row | {"id": f"{task}-{name}-{len(rows):04d}"})
        if name == split:
            return rows
    raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLIT_ROWS)}")


def held_out_prompts(seed: int) -> set[str]:
    """The prompts of every test and dev row, which no training row may have."""
    return {row["prompt"] for split in ("test", "dev") for row in post_rows(split, seed)}


def pretrain_turn(rng: random.Random, held_out: set[str]) -> Row:
    """Draw one pretraining question: a drill, or an easy row, seldom with its steps."""
    while True:
        if rng.random() < 0.5:
            return drill(rng)
        row = generate(rng.choice(TASKS), rng, "easy", worked=rng.random() < 0.3)
        if row["prompt"] not in held_out:
            return row


def pretrain_rows(seed: int, count: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield `count` conversations of one to three independent questions, none of them held out."""
    rng, held_out = random.Random(f"pretrain-{seed}"), held_out_prompts(seed)
    for _ in range(count):
        messages = []
        for _ in range(rng.choices((1, 2, 3), (60, 25, 15))[0]):
            row = pretrain_turn(rng, held_out)
            messages.append({"role": "user", "content": row["prompt"]})
            messages.append({"role": "assistant", "content": row["completion"]})
        yield {"messages": messages}
