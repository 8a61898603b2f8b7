"""The evaluator's kit: our rules pass it, a second implementation agrees on it and on random completions, and a flipped verdict is red."""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

from data.tasks import TASKS  # noqa: E402
from tests.golden import check_verdicts, judge, rules  # noqa: E402

CASES = check_verdicts.read_cases()
RULES = list(dict.fromkeys(case["rule"] for case in CASES))
ANSWERS = [rule for rule in RULES if rule in rules.ANSWERS]
ours = judge.judge
many = settings(max_examples=400, derandomize=True, database=None, deadline=None)


def python(*arguments, cwd=ROOT):
    """The checker's command line in a process of its own."""
    return subprocess.run([sys.executable, KIT / "check_verdicts.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def of(rule):
    """A rule's cases."""
    return [case for case in CASES if case["rule"] == rule]


def shown(results):
    """What failed, as the checker prints it."""
    return check_verdicts.table([r for r in results if r.notes])


def write(file, answers):
    """Answers as a program in another language would leave them."""
    file.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return file


# ------------------------------------------------------------------------------------------ the kit holds
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", [ours, rules.judge], ids=["ours", "independent"])
def test_verdicts(rule, function):
    results = [check_verdicts.run_function(function, case) for case in of(rule)]
    assert not any(r.notes for r in results), shown(results)


def test_our_code_passes_through_the_command_line():
    done = python("tests.golden.judge:judge")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(CASES)} cases, 0 failed" and done.stdout.count("\n") == len(RULES) + 2


def test_every_rule_of_ours_is_in_the_kit():
    named = {f"{'tiny' if task.rules == TASKS['math'].rules else task.name}.{rule}" for task in TASKS.values() for rule in task.rules}
    programs = {task.program: task.name for task in reversed(TASKS.values()) if task.program}  # mbpp_plus has mbpp's
    named |= {f"{name}.{form}" for name in programs.values() for form in ("chat", "plain")}
    assert named | {"choice.acc", "choice.acc_norm"} == set(RULES)


def test_the_independent_rules_import_nothing_of_ours():
    lines = [line for line in (KIT / "rules.py").read_text().splitlines() if line.startswith(("import", "from"))]
    assert {line.split()[1].split(".")[0] for line in lines} == {"__future__", "collections", "typing"}


def test_every_case_is_well_formed_and_there_once():
    fields = {"answer": {"completion", "answer", "extracted", "correct"}, "program": {"prompt", "entry_point", "completion", "program"},
              "choice": {"choices", "logprobs", "chosen"}}
    for case in CASES:
        kind = "answer" if case["rule"] in rules.ANSWERS else "choice" if "choices" in case else "program"
        assert set(case) == fields[kind] | {"rule", "why"} and case["why"], case
        assert kind != "answer" or case["extracted"] is not None or not case["correct"], case
    keys = [json.dumps(check_verdicts.inputs(case)) for case in CASES]
    assert len(set(keys)) == len(keys) >= 150, Counter(keys).most_common(1)
    assert (KIT / "verdicts.jsonl").read_bytes().isascii() and b"\r" not in (KIT / "verdicts.jsonl").read_bytes()


def outcome(case):
    """Right or wrong; something cut or nothing; the first choice or another."""
    if "program" in case:
        return case["program"].endswith(case["completion"])
    return case["correct"] if "correct" in case else case["chosen"] == 0


@pytest.mark.parametrize("rule", RULES)
def test_both_outcomes_of_every_rule(rule):
    counts = Counter(outcome(case) for case in of(rule))
    least = 8 if rule in ANSWERS else 2
    assert len(of(rule)) >= 8 and min(counts[True], counts[False]) >= least, counts


def test_programs_compile_but_for_those_said_not_to():
    """Wrong indents stay wrong: nothing is repaired. (Compiled only, never run.)"""
    broken = 0
    for case in CASES:
        if "does not compile" in case.get("why", ""):
            with pytest.raises(SyntaxError):
                compile(case["program"], case["rule"], "exec")
            broken += 1
    assert broken == 3
    compile(next(case["program"] for case in of("humaneval.chat") if "starts over" in case["why"]), "later def wins", "exec")


# ------------------------------------------------------------------------------------------ the checker goes red
def flipped(case):
    """The case with another verdict."""
    case = copy.deepcopy(case)
    for field, change in {"correct": lambda x: not x, "program": lambda x: x + " ", "chosen": lambda x: 1 - min(x, 1)}.items():
        if field in case:
            case[field] = change(case[field])
    return case


@pytest.mark.parametrize("rule", RULES)
def test_a_flipped_verdict_is_red(rule):
    for case in of(rule):
        assert check_verdicts.run_function(ours, flipped(case)).notes, case
        if "extracted" in case:
            other = case | {"extracted": None if case["extracted"] is not None else ""}
            assert [note.split(":")[0] for note in check_verdicts.run_function(rules.judge, other).notes] == ["extracted"]


def test_the_function_does_not_see_what_is_expected():
    seen = []
    for case in CASES:
        check_verdicts.run_function(lambda given: seen.append(given) or {}, case)
    assert not {key for case in seen for key in case} & {*check_verdicts.EXPECTED, "why"}


@pytest.mark.parametrize("found, note", [
    ({"extracted": "18"}, "correct: missing"), ({"extracted": "18", "correct": 1}, "correct: expected true, found 1"),
    ({"extracted": None, "correct": True}, 'extracted: expected "18", found null'), (None, "expected an object, found null"),
    ({"extracted": "18", "correct": True, "more": 0}, None)])
def test_an_answer_is_compared_exactly(found, note):
    case = next(case for case in CASES if case["correct"])
    assert check_verdicts.run_function(lambda given: found, case).notes == ([note] if note else [])


def test_what_raises_fails(capsys):
    def broken(case):
        raise KeyError("rule")

    def left_out(case):
        raise NotImplementedError("code")

    assert check_verdicts.run_function(broken, CASES[0]).notes == ["raised KeyError: 'rule'"] and "Traceback" in capsys.readouterr().err
    assert check_verdicts.run_function(left_out, CASES[0]).notes == ["raised NotImplementedError: code"] and capsys.readouterr().err == ""


def test_a_file_of_answers(tmp_path):
    answers = [rules.judge(case) for case in CASES]
    assert python(write(tmp_path / "a.jsonl", answers)).returncode == 0
    wrong = next(n for n, case in enumerate(CASES) if case["rule"] == "humaneval.plain")
    answers[wrong]["program"] += "\n"
    done = python(write(tmp_path / "a.jsonl", answers))
    assert done.returncode == 1 and done.stderr == "" and done.stdout.endswith(f"{len(CASES)} cases, 1 failed\n")
    assert "FAIL" in done.stdout and CASES[wrong]["why"] in done.stdout and "-> program: expected" in done.stdout
    done = python(tmp_path / "a.jsonl", "--rule", "choice.*", "mbpp.chat")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5


@pytest.mark.parametrize("arguments, said", [
    (["missing.jsonl"], "missing.jsonl: unreadable"), (["short.jsonl"], "short.jsonl: 1 lines for"), (["bad.jsonl"], "bad.jsonl:1: not JSON"),
    (["no_such_module:f"], "No module named"), (["json:no_such_function"], "has no 'no_such_function'"),
    (["json:loads", "--rule", "gsm9k.*"], "no rule matches")])
def test_a_bad_call(arguments, said, tmp_path):
    write(tmp_path / "short.jsonl", [{}])
    (tmp_path / "bad.jsonl").write_text("{\n")
    done = python(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


# ------------------------------------------------------------------------------------------ on random completions
def texts(*pieces, most=12):
    """Pieces in any order."""
    return st.lists(st.sampled_from(pieces), max_size=most).map("".join)


NUMBERS = ("#### ", "####", "#", " ", "\n", "\r\n", "$", ",", ".", "-", "\u2212", "0", "1", "18", "1,000", "18.00", "x", "%", "\u0661")
BOXES = ("\\boxed{", "\\boxed ", "\\boxed", "}", "{", "$", " ", "\n", "5", ".", "-", "\\frac", "{1}{2}", "12", "x", "\\text{ cm}", "\\boxed{5}")
TERMS = ("1", "2", "12", "0.5", ".5", "5.0", "1,234", "1234", "1{,}234", "-", "1/2", "\\frac{1}{2}", "\\dfrac12", "\\tfrac{1}2", "\\frac1{2}",
         "\\sqrt3", "\\sqrt{3}", "x", "x = ", "=", "\\text{East}", "East", "\\mathrm{East}", "\\text{ cm}", "%", "\\%", "^\\circ", "\\$", "$", "\\!")
MARKS = (",", ", ", " ", "(", ")", "[", "]", "\\{", "\\}", "\\left(", "\\right)", ".", "/", "\n")
CODE = ("```", "```python", "\n", "    return 1", "\ndef f(x):", "\nclass A:", "\n# ", "\nif x:", "\nprint(1)", " ", "x", "[DONE]", "[BEGIN]", "\r\n")


@pytest.mark.parametrize("rule", ["gsm8k.strict", "gsm8k.flexible", "svamp.number", "tiny.answer"])
def test_number_rules_agree(rule):
    @many
    @given(texts(*NUMBERS), st.sampled_from(["18", "0", "1000", "1,000", "-1", "18.0", "text\n#### 18", "0.1"]))
    def agree(completion, answer):
        case = {"rule": rule, "completion": completion, "answer": answer}
        assert ours(case) == rules.judge(case)
    agree()


@many
@given(texts(*BOXES), st.sampled_from(["5", "\\frac{1}{2}", "12", "x"]))
def test_boxes_agree(completion, answer):
    case = {"rule": "math500.boxed", "completion": completion, "answer": answer}
    assert ours(case) == rules.judge(case)


def answers(most):
    """An expression, or several of them in brackets."""
    return st.tuples(texts("(", "[", "\\{", "", most=1), st.lists(texts(*TERMS, most=2), min_size=1, max_size=most).map(", ".join),
                     texts(")", "]", "\\}", "", most=1)).map("".join)


@settings(many, max_examples=1500)
@given(st.one_of(st.tuples(answers(1), answers(1)), st.tuples(answers(2), answers(2)), st.tuples(texts(*TERMS, *MARKS, most=6), answers(2))))
def test_answers_agree(pair):
    a, b = pair
    grade = TASKS["math500"].rules["boxed"].grade
    assert grade(a, b) == rules.same_answer(a, b) == grade(b, a) and grade(a, a)


@pytest.mark.parametrize("rule", sorted(rules.PROGRAMS))
def test_programs_agree(rule):
    @many
    @given(st.sampled_from(["def f(x):\n", "def f(x):\n    ''' '''"]), texts(*CODE))
    def agree(prompt, completion):
        case = {"rule": rule, "prompt": prompt, "entry_point": "f", "completion": completion}
        assert ours(case) == rules.judge(case)
    agree()


@pytest.mark.parametrize("rule", ["choice.acc", "choice.acc_norm"])
def test_choices_agree(rule):
    @many
    @given(st.lists(st.tuples(st.sampled_from(["a", "bc", "def", "\u00e9\u00e9"]), st.sampled_from([-1.0, -2.0, -3.0])), min_size=1, max_size=6))
    def agree(rows):
        case = {"rule": rule, "choices": [choice for choice, _ in rows], "logprobs": [p for _, p in rows]}
        assert ours(case) == rules.judge(case)
    agree()
