"""data/tasks.py, data/code.py, converters: rows, prompts, rules, verdicts, files of one's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import code, tasks
from data.chat import load_tokenizer
from data.prepare import CONVERTERS
from data.tasks import TASKS, ask, choose_shots, find_tasks, judge, load_items, load_pool
from tests.golden import check_verdicts, rules
from tests.golden import judge as kit

ROOT = Path(__file__).resolve().parents[1]
Q = "Question: {}\nAnswer:"
LETTERS = ["A", "B", "C", "D"]
MCQ = "Is it good?\nA. no\nB. yes, it is\nC. maybe\nD. never\nAnswer:"
TWICE = 'def twice(x):\n    """Two times x."""\n'


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GSM8K = [{"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 hats.\n#### 5"}]
GSM8K.append({"question": "How far?", "answer": "It is $<<1000*2=2000>>2,000.\n#### 2,000"})
SUM = {"Body": "Dan has 1200000 pens ", "Question": "How many?", "Answer": 1200008.05}
SUM |= {"ID": "chal-1", "Equation": "( ( 1200000.0 + 10.05 ) - 2.0 )", "Type": "Addition"}
SVAMP = [SUM, SUM | {"ID": "chal-2", "Body": "He sold 3.", "Equation": "8.0", "Answer": 8.0}]
CHOICES = [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]
ARC = {"id": "a", "question": {"stem": "Hot?", "choices": CHOICES}, "answerKey": "2"}
MATH = {"problem": "Halve $1$.", "solution": "\\boxed{\\frac{1}{2}}", "answer": "\\frac{1}{2}"}
MATH |= {"subject": "Algebra", "unique_id": "a/1"}
EVAL = {"task_id": "HumanEval/0", "prompt": TWICE, "entry_point": "twice"}
BASE = {"canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(3) == 6\n"}
PLUS = {"canonical_solution": "    return x + x\n", "base_input": [[3]], "atol": 0}
PLUS |= {"plus_input": [[-1], [0.1]]}
MBPP = []
for i in range(1, 975):
    row = {"task_id": i, "text": f"Write {i}.", "code": f"def f{i}(x):\r\n    return x + {i}"}
    row["test_list"] = [f"assert f{i}(y) == {i + 1}", f"assert f{i}(0) == {i}"]
    MBPP.append(row | {"test_setup_code": "y = 1\r\n"})
MORE = {"prompt": '"""\nWrite plus.\nassert g(1) == (2,)\n"""\n', "entry_point": "g", "atol": 0}
MORE |= {"canonical_solution": "\ndef g(x):\n    return (x + 1,)\n", "base_input": [[1]]}
MORE = [MORE | {"task_id": f"Mbpp/{i}", "plus_input": {}} for i in (9, 12, 601)]
MMLU = b'" Is it good?",no,"yes, it is",maybe,never,B\r\n'
SOURCES = {
    "gsm8k": {"train": lines(*GSM8K), "test": lines(*GSM8K)},
    "svamp": {"test": json.dumps(SVAMP).encode()},
    "arc_easy": {split: lines(ARC) for split in ("train", "dev", "test")},
    "arc_challenge": {split: lines(ARC) for split in ("train", "dev", "test")},
    "mmlu_stem": {f"{s}/{name}": MMLU for s in ("dev", "test") for name in ("big_sums", "stars")},
    "math500": {"test": lines(MATH)},
    "humaneval": {"test": lines(EVAL | BASE), "plus": lines(EVAL | PLUS)},
    "mbpp": {"all": lines(*MBPP), "plus": lines(*MORE)},
}
ROWS = {name: CONVERTERS[name](files) for name, files in SOURCES.items()}
DAN = Q.format("Dan has 1200000 pens. How many?")
PENS = "( 1200000 + 10.05 ) - 2 = 1200008.05\n#### 1200008.05"
ASKED = "You are an expert Python programmer, and here is your task: Write {0}. Your code should"
ASKED += " pass these tests:\n\nassert f{0}(y) == {1}\nassert f{0}(0) == {0}"
F11 = "def f11(x):\n    return x + 11"
WANT = [  # benchmark, split, row, some of its fields
    ("gsm8k", "train", 0, {"id": "train-0", "prompt": Q.format("How many?"), "answer": "5"}),
    ("gsm8k", "test", 1, {"completion": "It is $2,000.\n#### 2,000", "answer": "2,000"}),
    ("svamp", "test", 0, {"prompt": DAN, "completion": PENS, "answer": "1200008.05"}),
    ("svamp", "test", 1, {"prompt": Q.format("He sold 3. How many?"), "answer": "8"}),
    ("arc_easy", "dev", 0, {"completion": "fire", "answer": "B", "choices": ["ice", "fire"]}),
    ("mmlu_stem", "test", 1, {"id": "stars/0", "subject": "stars", "completion": "B"}),
    ("mmlu_stem", "dev", 0, {"prompt": MCQ, "choices": LETTERS, "answer": "B"}),
    ("math500", "test", 0, {"id": "a/1", "answer": "\\frac{1}{2}", "subject": "Algebra"}),
    ("humaneval", "test", 0, {"tests": BASE["test"] + "\ncheck(twice)", "entry_point": "twice"}),
    ("mbpp", "test", 0, {"prompt": ASKED.format(11, 12), "completion": f"```python\n{F11}\n```"}),
    ("mbpp", "test", 0, {"tests": "y = 1\n\nassert f11(y) == 12\nassert f11(0) == 11"}),
    ("mbpp", "plus", 0, {"id": "Mbpp/12", "entry_point": "g"}),
]


@pytest.mark.parametrize("name, split, number, fields", WANT)
def test_rows(name, split, number, fields):
    found = ROWS[name][split][number]
    assert {key: found[key] for key in fields} == fields


def test_every_row_is_loaded_and_its_solution_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "HERE", tmp_path)
    folders = {task.path.parent.name for task in TASKS.values()}
    assert set(SOURCES) == set(CONVERTERS) == folders - {"test"}  # the embedded ones have none
    sizes = [len(rows) for rows in ROWS["mbpp"].values()]
    assert sizes == [10, 500, 90, 374, 3, 1] and "\r" not in json.dumps(ROWS["mbpp"])
    assert "in [[3], [-1], [0.1]]:" in ROWS["humaneval"]["test"][0]["plus_tests"]
    for name, splits in ROWS.items():
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            task = replace(TASKS[name], file=f"{name}/{split}.jsonl")
            task.path.write_bytes(lines(*rows))
            assert load_items(task) == rows and load_items(task, 1) == rows[:1]
            for row in rows[:3]:
                assert row["completion"].startswith(task.chat(row)[1])
                assert task.kind != "text" or all(judge(task, row)["verdicts"].values())
    assert [row["id"] for row in load_pool(TASKS["mbpp_plus"])] == ["Mbpp/2", "Mbpp/3", "Mbpp/4"]
    (tmp_path / "gsm8k/test.jsonl").unlink()
    with pytest.raises(ValueError, match="run python data/prepare.py gsm8k first"):
        load_items(TASKS["gsm8k"])


def test_sources_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="zip"):
        CONVERTERS["mmlu_stem"]({"test/stars": MMLU + MMLU.replace(b"never,", b"")})
    for plus in (b"", SOURCES["humaneval"]["plus"].replace(b"l/0", b"l/1")):
        with pytest.raises(ValueError, match="zip" if not plus else "HumanEval/0.*HumanEval/1"):
            CONVERTERS["humaneval"](SOURCES["humaneval"] | {"plus": plus})


TYPES = [  # an MBPP task, its arguments from JSON, as they are meant
    (11, [[1, [2]]], [[1, [2]]]),
    (116, [[1], [2, 3]], [(1,), (2, 3)]),
    (63, [[[1, 2], [3]]], [[(1, 2), (3,)]]),
    (75, [[[1], [2]], 6], [[(1,), (2,)], 6]),
    (106, [[1], [2]], [[1], (2,)]),
    (115, [[[1, 1], [], {}]], [[{1}, {}, {}]]),
    (124, ["1.5", "2j"], [1.5, 2j]),
    (252, ["1+2j"], [1 + 2j]),
    (446, [[1, 2], [3]], [(1, 2), [3]]),
    (259, [[[1, 2], [3]]], [((1, 2), (3,))]),
]
ORACLES = [  # entry point, tolerance, arguments, the reference's answer, right answers, wrong ones
    ("f", 0, (1,), "0.1", "0.1 + 1e-8|0.1", "0.1 + 1e-3|'0.1'"),
    ("f", 0, (1,), "2", "2|2.0", "2 + 1e-8|'2'|None"),
    ("f", 0, (1,), "[1, 0.5]", "[1.0, 0.5]", "[1, 0.5 + 1e-8]"),
    ("f", 1e-4, (1,), "(1.0, [2.0])", "(1.0, [2.00001])", "[1.0, [2.00001]]|(1.0, [2.0, 3])"),
    ("f", 1e-4, (1,), "1e9", "1e9 + 50", "1e9 + 500"),
    ("Diff", 0, (1,), "[1, 2]", "[2, 1, 1]|(1, 2)", "[1]|[1, 2, 3]"),
    ("check_str", 0, (1,), "'x'", "'y'|True|object()", "None|False"),
    ("find_zero", 1e-4, ([2, 1],), "None", "-2|-2.00001", "2"),
    ("surface_Area", 0, (3, 4), "0", "0|35", "34"),
    ("digit_distance_nums", 0, (123, 89), "0", "0|1 + 6 + 6", "12"),
]


@pytest.mark.parametrize("number, args, want", TYPES)
def test_json_lists_become_the_types_of_mbpp_plus(number, args, want):
    assert repr(code.restore_types(f"Mbpp/{number}", [args])) == repr([want])


@pytest.mark.parametrize("entry, atol, args, want, right, wrong", ORACLES)
def test_plus_tests_know_right_answers(entry, atol, args, want, right, wrong):
    reference, source = f"def {entry}(*args): return {want}", {"entry_point": entry, "atol": atol}
    tests = code.plus_tests(source, reference, [list(args)])
    for answer in right.split("|"):
        exec(f"def {entry}(*args): return {answer}\n{tests}", {})
    for answer in wrong.split("|"):
        with pytest.raises(AssertionError, match=rf"{entry}\(.*: expected .*, found "):
            exec(f"def {entry}(*args): return {answer}\n{tests}", {})


TOKENIZER = load_tokenizer(ROOT / "data/tiny/model")
HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
FIVE, FAR = "2 + 3 = 5 hats.\n#### 5", "It is $2,000.\n#### 2,000"
HATS, HOT, POOLS = Q.format("How many?"), Q.format("Hot?"), {"mmlu_stem": "dev", "mbpp": "shots"}
DONE = f"{ASKED.format(2, 3)}\n[BEGIN]\ndef f2(x):\n    return x + 2\n[DONE]\n\n"
PLAIN = [  # benchmark, number of its row, of examples, the prompt, the replies
    ("gsm8k", 1, 1, f"{HATS} {FIVE}\n\n{Q.format('How far?')}", [f" {FAR}"]),
    ("arc_easy", 0, 1, f"{HOT} fire\n\n{HOT}", [" ice", " fire"]),
    ("mmlu_stem", 0, 1, f"{HEADER.format('big sums')}{MCQ} B\n\n{MCQ}", [" A", " B", " C", " D"]),
    ("humaneval", 0, 0, TWICE, ["    return 2 * x\n"]),
    ("mbpp", 0, 1, f"{DONE}{ASKED.format(11, 12)}\n[BEGIN]\n", [F11]),
]
WRITE = "Write a solution to the following problem and make sure that it passes the tests:"
WRITE += f"\n```python\n{TWICE}\n```\n"
BEGUN = f"Here is the completed function:\n```python\n{TWICE}\n"
CHAT = [  # benchmark, number of its row, the turns, how the reply is begun, the replies
    ("gsm8k", 1, [HATS, FIVE, Q.format("How far?")], "", [FAR]),
    ("mmlu_stem", 1, [HEADER.format("stars") + MCQ, "B", MCQ], "", LETTERS),
    ("mbpp", 0, [ASKED.format(11, 12)], "```python\n", [f"{F11}\n```"]),
    ("humaneval", 0, [WRITE], BEGUN, ["    return 2 * x\n```"]),
]


def ask_row(name, number, count, form):
    item, pool = ROWS[name]["test"][number], ROWS[name].get(POOLS.get(name, "train"), [])
    return ask(TASKS[name], item, choose_shots(TASKS[name], item, pool, count), form, TOKENIZER)


@pytest.mark.parametrize("name, number, shots, text, replies", PLAIN)
def test_plain_prompts(name, number, shots, text, replies):
    assert ask_row(name, number, shots, "plain") == tasks.Prompt(text, replies)


@pytest.mark.parametrize("name, number, turns, begun, replies", CHAT)
def test_chat_prompts_have_examples_as_turns(name, number, turns, begun, replies):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    text = TOKENIZER.render(messages, add_generation_prompt=True) + begun
    assert ask_row(name, number, len(turns) // 2, "chat") == tasks.Prompt(text, replies)


def test_examples_are_of_the_item_s_subject():
    task, item, pool = TASKS["mmlu_stem"], *(ROWS["mmlu_stem"][s] for s in ("test", "dev"))
    assert choose_shots(task, item[1], pool, 1) == [pool[1]]
    with pytest.raises(ValueError, match="expected 2 examples for stars/0: 1"):
        choose_shots(task, item[1], pool, 2)
    with pytest.raises(ValueError, match="svamp: there are no rows to take examples from"):
        load_pool(TASKS["svamp"])


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ASK, TALK = {"prompt": "p", "answer": "7"}, {"messages": [USER], "answer": "b"}
PICK = {"prompt": "p", "choices": ["x", "yy"], "answer": "B"}
GOOD = [  # a row, the texts of its prompt and replies
    (ASK, "p", []),
    (ASK | {"id": 4, "completion": "#### 7"}, "p", ["#### 7"]),
    (TALK, "a", []),
    (PICK, "p", ["x", "yy"]),
]
BAD = [  # rows, the error
    ([], "expected items"),
    ([ASK | {"id": 2}, ASK], r"found twice: \['2'\]"),
    ([ASK, {"prompt": "p"}], "rows.jsonl:2: expected an answer in text"),
    ([{"answer": "7"}], "rows.jsonl:1: "),
    ([ASK | {"completion": ["7"]}], "expected a completion in text"),
    ([TALK | {"messages": []}], "rows.jsonl:1: "),
    ([TALK | {"messages": [USER, BOT]}], "expected messages up to the answer"),
    ([PICK, ASK], "rows.jsonl:2: expected choices in each row or none"),
    ([ASK, PICK], "rows.jsonl:2: expected choices in each row or none"),
    ([PICK | {"choices": ["x", ""]}], "expected choices, a list of texts"),
    ([PICK | {"answer": "C"}], "expected a letter of the choices"),
    ([ASK | {"context": "so"}], "rows.jsonl:1: found the column 'context', which is not read"),
    ([ASK, TALK | {"input": ["so"]}], "rows.jsonl:2: found the column 'input'"),
    ([PICK | {"documents": [{}]}], "found the column 'documents'"),
]
NAMES = [  # what --tasks says, the error
    ("math maths", r"expected some of math, .*mbpp_plus or \.jsonl files, found \['maths'\]"),
    ("math math", "each once"),
    ("rows.jsonl ./rows.jsonl", "each once"),
    ("math.jsonl", "other files than named as a task"),
    ("absent.jsonl", "absent.jsonl"),
]


@pytest.mark.parametrize("row, text, replies", GOOD)
def test_files_of_one_s_own(tmp_path, row, text, replies):
    (tmp_path / "rows.jsonl").write_bytes(lines(row))
    [first, task] = find_tasks(["svamp", str(tmp_path / "rows.jsonl")])
    [item] = load_items(task)
    assert (first.name, task.name, item["id"]) == ("svamp", "rows", str(row.get("id", 1)))
    chat = TOKENIZER.render([USER | {"content": text}], add_generation_prompt=True)
    assert ask(task, item, [], "chat", TOKENIZER) == tasks.Prompt(chat, replies)
    if row == TALK:
        with pytest.raises(ValueError, match="rows: 1: .'messages'. have no plain form"):
            ask(task, item, [], "plain", TOKENIZER)
    else:
        want = tasks.Prompt(text, ["\n" + reply for reply in replies])
        assert ask(task, item, [], "plain", TOKENIZER) == want


BESIDE = [  # a row, what the template must say; or what is refused
    (ASK | {"system": "be brief"}, "be brief"),
    (TALK | {"system": "be brief", "source": "x", "level": 3}, "be brief"),
    (PICK | {"system": "be brief"}, "be brief"),
    (ASK | {"tools": [{"name": "look"}]}, "rows: 1: the chat template drops the column 'tools'"),
    (TALK | {"messages": [USER | {"name": "Bo"}]}, "rows: 1: the field 'name' of user turn 0"),
]


@pytest.mark.parametrize("row, text", BESIDE)
def test_what_stands_beside_a_prompt_is_asked_or_refused(tmp_path, row, text):
    (tmp_path / "rows.jsonl").write_bytes(lines(row))
    [task] = find_tasks([str(tmp_path / "rows.jsonl")])
    [item] = load_items(task)
    if "rows" in text:
        with pytest.raises(ValueError, match=text):
            ask(task, item, [], "chat", TOKENIZER)
    else:
        assert text in ask(task, item, [], "chat", TOKENIZER).text
        with pytest.raises(ValueError, match="rows: 1: .*have no plain form"):
            ask(task, item, [], "plain", TOKENIZER)


@pytest.mark.parametrize("rows, said", BAD)
def test_rows_that_are_refused(tmp_path, rows, said):
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    with pytest.raises(ValueError, match=said):
        load_items(find_tasks([str(tmp_path / "rows.jsonl")])[0])


@pytest.mark.parametrize("names, said", NAMES)
def test_names_that_are_refused(tmp_path, monkeypatch, names, said):
    monkeypatch.chdir(tmp_path)
    for file in ("rows.jsonl", "math.jsonl"):
        (tmp_path / file).write_bytes(lines(ASK))
    with pytest.raises(ValueError, match=said):
        find_tasks(names.split())


JUDGED = [  # benchmark, answer, completion, what each rule finds and says
    ("math", "36 V", "6 * 6 = 36\n#### 36  V", {"answer": ("36  V", True)}),
    ("math", "36 V", "so 36 V", {"answer": (None, False)}),
    ("gsm8k", "18", "#### 18 or 20", {"flexible": ("20", False), "strict": ("18", True)}),
    ("svamp", "51", "It is 51.0", {"number": ("51.0", True)}),
    ("math500", "x+1", "\\boxed{1+x}", {"boxed": ("1+x", False), "symbolic": ("1+x", True)}),
]


@pytest.mark.parametrize("name, answer, completion, want", JUDGED)
def test_judge_says_what_each_rule_finds(name, answer, completion, want):
    found = judge(TASKS[name], {"answer": answer, "completion": completion})
    for rule in set(want) & set(TASKS[name].rules):  # symbolic needs a package
        assert (found["extracted"][rule], found["verdicts"][rule]) == want[rule]
    assert found["correct"] == next(iter(want.values()))[1] and found["answer"] == answer


EQUAL = r"""x = 5 | 5; x=\frac{1}{2} | \frac12; n = -3 | -3; 12\text{ cm} | 12; 5 \text{ inches} | 5
    30\mbox{ square units} | 30; 1+x | x+1; 2x+3y | 3y+2x; b^2 + a^2 | a^2+b^2; 14400 | 14,\!400
    648/\pi | \frac{648}{\pi}; \frac{2\pi}{3} | 2\pi/3; 0.125 | \frac18; 3.25 | \frac{13}{4}
    6! = 720 | 720; 10 \cdot 72 = 720 | 720"""
OTHER = r"""x = 5 | 6; 12\text{ cm} | 13; 1-x | x-1; 0.33 | \frac13; 6! = 720 | 721; 648/\pi | 648
    (1,2) | (2,1); \frac{1}{0} | 1"""
PAIRS = [(pair, True) for pair in re.split("[;\n]", EQUAL)]
PAIRS += [(pair, False) for pair in re.split("[;\n]", OTHER)]


@pytest.mark.parametrize("pair, same", PAIRS)
def test_symbolic_is_reported_beside_the_published_rule(pair, same):
    pytest.importorskip("math_verify")
    found, answer = (side.strip() for side in pair.split("|"))
    judged = judge(TASKS["math500"], {"answer": answer, "completion": f"\\boxed{{{found}}}"})
    assert judged["verdicts"]["symbolic"] == same
    assert judged["correct"] == judged["verdicts"]["boxed"]  # the published rule is the score


def test_choices_are_judged_by_likelihood_and_likelihood_a_character():
    record = {"choices": ["no", "certainly"], "logprobs": [-3.0, -4.0], "answer": "B"}
    found = judge(TASKS["arc_easy"], record)
    assert found["verdicts"] == {"acc": False, "acc_norm": True} and not found["correct"]
    assert found["extracted"] == {"acc": "A", "acc_norm": "B"}


def texts(pieces, most=12):
    """Some of the pieces, which | separates, in any order."""
    return st.lists(st.sampled_from(pieces.split("|")), max_size=most).map("".join)


NUMBERS = texts("#### |####|#| |\n|\r\n|$|,|.|-|\u2212|0|1|18|1,000|18.00|x|%|\u0661")
BOXES = texts(
    "\\boxed{|\\boxed |\\boxed|}|{|$| |\n|5|.|-|\\frac|{1}{2}|12|x|\\text{ cm}|\\boxed{5}"
)
TERMS = "1|2|12|0.5|.5|5.0|1,234|1234|1{,}234|-|1/2|\\frac{1}{2}|\\dfrac12|\\tfrac{1}2|\\frac1{2}|%"
TERMS += (
    "|\\sqrt3|\\sqrt{3}|x|x = |=|\\text{East}|East|\\mathrm{East}|\\text{ cm}|\\%|^\\circ|\\$|\\!"
)
MARKS = ",|, | |(|)|[|]|\\{|\\}|\\left(|\\right)|.|/|\n|"
INSIDE = st.one_of(texts(TERMS, 2), texts(f"{TERMS}|{MARKS}", 6))
INSIDE = st.tuples(texts("(|[|\\{", 1), INSIDE, texts(",|, ", 1), INSIDE, texts(")|]|\\}", 1))
INSIDE = INSIDE.map("".join)
BOXED = st.one_of(BOXES, INSIDE.map("\\boxed{{{}}}".format))
RESULTS = st.one_of(INSIDE, st.sampled_from(["5", "12", "x"]))
ANSWERS = st.sampled_from(["18", "1000", "1,000", "-1", "18.0", "text\n#### 18"])
CODE = (
    "```|```python|\n|    return 1|\ndef f(x):|\nclass A:|\n# |\nif x:|\nprint(1)| |x|[DONE]|\r\n"
)
HEAD = {"prompt": st.just("def f(x):\n"), "entry_point": st.just("f")}
PAIR = st.tuples(st.sampled_from(["a", "bc", "def", "\u00e9\u00e9"]), st.sampled_from([-1.0, -2.0]))
FIELDS = {  # what a case holds
    "gsm8k": {"completion": NUMBERS, "answer": ANSWERS},
    "math500": {"completion": BOXED, "answer": RESULTS},
    "mbpp": {"completion": texts(CODE), **HEAD},
    "choice": {"pairs": st.lists(PAIR, min_size=1, max_size=6)},
}
FIELDS |= {"svamp": FIELDS["gsm8k"], "tiny": FIELDS["gsm8k"], "humaneval": FIELDS["mbpp"]}


@pytest.mark.parametrize("rule", [*rules.ANSWERS, *rules.PROGRAMS, "choice.acc", "choice.acc_norm"])
def test_two_evaluators_agree_on_random_completions(rule):
    @settings(max_examples=400, derandomize=True, database=None, deadline=None)
    @given(st.fixed_dictionaries(FIELDS[rule.partition(".")[0]]))
    def agree(case):
        pairs = case.pop("pairs", [])
        if pairs:
            case = dict(zip(("choices", "logprobs"), map(list, zip(*pairs))))
        assert kit.judge({"rule": rule, **case}) == rules.judge({"rule": rule, **case})

    agree()


def test_every_rule_has_fixed_and_random_cases():
    named = {"choice.acc", "choice.acc_norm", "tiny.answer"}
    for task in TASKS.values():
        names = ("chat", "plain") if task.program else task.rules
        named |= {f"{task.name}.{rule}" for rule in names if task.rules != TASKS["math"].rules}
    named -= {"math500.symbolic", "mbpp_plus.chat", "mbpp_plus.plain"}
    cases = {case["rule"] for case in check_verdicts.read_cases()}
    assert named == cases == {*rules.ANSWERS, *rules.PROGRAMS, "choice.acc", "choice.acc_norm"}
