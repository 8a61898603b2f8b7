"""The golden kit: our code passes it, it is what its seeds give, its checkers go red."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import talan
from data.tasks import TASKS
from tests.golden import check, check_verdicts, judge, make, ours, rules

KIT = Path(make.__file__).parent
CASES = {case["name"]: case for case in check.read_cases()}
VERDICTS = check_verdicts.read_cases()
SIDE_PATH = CASES["side-path-linear-add"]


def python(name, *arguments, cwd=KIT.parents[1]):
    """A command of the kit in a process of its own."""
    command = [sys.executable, str(KIT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def failures(name, function=ours.run):
    """The tensors of a case that fail, in the table's order."""
    return [r.tensor for r in check.run_function(function, CASES[name]) if not r.passed]


# ---- the kit holds ----


def test_our_code_passes_through_the_command_line():
    done = python("check.py", "tests.golden.ours:run")
    assert done.stdout.endswith("\n36 cases, 473 tensors, 0 failed\n"), done.stdout + done.stderr
    done = python("check_verdicts.py", "tests.golden.judge:judge")
    assert done.stdout.endswith("\n343 cases, 0 failed\n") and done.returncode == 0


def test_verify_passes_and_changes_nothing():
    before = {name: (KIT / name).read_bytes() for name in make.data_files(KIT)}
    done = python("make.py", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differ from what the seeds give\n473 tensors, 0 failed by our code" in done.stdout
    assert before == {name: (KIT / name).read_bytes() for name in make.data_files(KIT)}


MAGNITUDE = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
DAMAGE = [  # file, tensor, relative change of its largest value, is it named
    ("expected/train-lora", "loss", 1e-6, True),
    ("expected/train-lora", "loss", 2**-23, False),  # float64 rounded to the other side
    ("inputs/forward-llama", "tokens", 1.0, True),
    ("adapters/dora/adapter_model", MAGNITUDE, 1e-5, True),
    ("adapters/dora/adapter_model", MAGNITUDE, 4 * 2**-23, False),  # a float32 norm elsewhere
    ("backbones/qwen3/model", "model.norm.weight", 2**-22, True),
]


@pytest.mark.parametrize("stem, tensor, change, is_named", DAMAGE)
def test_verify_names_what_was_changed(stem, tensor, change, is_named, tmp_path):
    kit = shutil.copytree(KIT, tmp_path / "kit")
    tensors, metadata = make.read_with_metadata(kit / f"{stem}.safetensors")
    flat = tensors[tensor].reshape(-1)
    flat[np.abs(flat).argmax()] *= 1 + np.float64(change)
    save_file(tensors, kit / f"{stem}.safetensors", metadata=metadata)
    assert make.differences(kit, KIT) == [f"{stem}.safetensors: differs"] * is_named
    (kit / "expected/merge-dora.safetensors").unlink()
    (kit / "cases.json").write_text("{}")
    missing = "expected/merge-dora.safetensors: only in what the seeds give"
    assert {missing, "cases.json: differs"} <= set(make.differences(kit, KIT))


# ---- the checkers go red ----

WRONG = [  # what is wrong, the case that fails, the first tensor that does
    ((talan, "rms", lambda x: x), "side-path-linear-bounded", "x"),
    ((talan, "scale_grad", lambda x, g: x), "train-lora", "grad."),
    ((talan.AdapterConfig, "scale", 1.0), "merge-rslora", "merged."),
    ((torch, "sigmoid", lambda x: 1 - x.sigmoid()), "side-path-mlp-gate", "delta"),
    ((ours, "generate", lambda m, p, n, **_: [[0] * n] * len(p)), "greedy-bare", "new_tokens"),
]


@pytest.mark.parametrize("wrong, case, first", WRONG)
def test_a_wrong_implementation_fails_where_it_is_wrong(wrong, case, first, monkeypatch):
    assert failures(case) == []
    monkeypatch.setattr(*wrong)
    assert failures(case)[0].startswith(first)


SHAPE = "shape: expected (2, 7, 3, 4), found"
CHANGES = [  # of one tensor, and what is said
    (lambda z: z[:, :-1], f"{SHAPE} (2, 6, 3, 4)"),
    (lambda z: z.swapaxes(2, 3), f"{SHAPE} (2, 7, 4, 3)"),
    (lambda z: "nonsense", "not a numeric array"),
    (lambda z: z * np.nan, "first at [0, 0, 0, 0]: expected"),
    (lambda z: z + (np.arange(4) == 2), "first at [0, 0, 0, 2]: expected"),
]


@pytest.mark.parametrize("change, note", CHANGES)
def test_changed_misshapen_missing_and_unexpected_tensors_fail(change, note):
    found = check.read_expected(SIDE_PATH)
    found["y"] = np.nan_to_num(found["y"], nan=7.0)  # padding is not compared
    results = check.check_case(SIDE_PATH, found | {"z": change(found.pop("z")), "zz": found["y"]})
    bad = {result.tensor: result.note for result in results if not result.passed}
    assert bad.keys() == {"z", "zz"} and bad["z"].startswith(note) and bad["zz"] == "unexpected"
    assert failures(SIDE_PATH["name"], lambda *_: found) == ["z"]


def test_a_folder_of_tensors(tmp_path):
    folder = shutil.copytree(KIT / "expected", tmp_path / "theirs")
    assert python("check.py", folder).stdout.endswith(" 0 failed\n")
    (folder / "merge-lora.safetensors").unlink()
    (folder / "merge-dora.safetensors").write_bytes(b"not safetensors")
    done = python("check.py", folder)
    assert done.returncode == 1 and done.stdout.endswith(" 2 failed\n")


def test_the_readme_stub_runs(tmp_path):
    [stub] = re.findall(r"```python\n(.*?)```", (KIT / "README.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(stub)
    done = python("check.py", "mine:run", "--case", "side-path-*", "merge-dora", cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert done.returncode == 1 and len(rows) == 91 and "Traceback" not in done.stderr
    assert {row[1] for row in rows if "pass" in row} == {"x", "k"}
    assert "raised NotImplementedError: merge" in done.stdout


BAD_CALLS = {  # arguments -> message
    "check.py nowhere:run": "neither such a module nor such a folder",
    "check.py json:loads --case nothing": "no case matches",
    "check_verdicts.py short.jsonl": "short.jsonl: 1 lines for",
    "check_verdicts.py json:nothing": "the module json has no 'nothing'",
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_bad_call_exits_with_2(call, tmp_path):
    (tmp_path / "short.jsonl").write_text("{}\n")
    done = python(*call.split(), cwd=tmp_path)
    assert done.returncode == 2 and BAD_CALLS[call] in done.stderr.splitlines()[-1]


# ---- verdicts ----


def test_both_evaluators_pass_and_a_flipped_verdict_is_red():
    flips = {"correct": lambda x: not x, "chosen": lambda x: x + 1, "program": lambda x: x + " "}
    flips["extracted"] = lambda x: "" if x is None else None
    for function in (judge.judge, rules.judge):
        results = [check_verdicts.run_function(function, case) for case in VERDICTS]
        assert not [result for result in results if result.notes]
    for case in VERDICTS:
        for field in flips.keys() & case.keys():
            wrong = case | {field: flips[field](case[field])}
            [note] = check_verdicts.run_function(judge.judge, wrong).notes
            assert note.startswith(f"{field}: expected")


def test_a_file_of_answers(tmp_path):
    answers = [json.dumps(rules.judge(case)) for case in VERDICTS]
    for lines, code in ((answers, 0), ([*answers[:-1], "{}"], 1)):
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        done = python("check_verdicts.py", tmp_path / "a.jsonl")
        assert done.returncode == code and done.stdout.endswith(f"343 cases, {code} failed\n")


NUMBERS = "#### |####|#| |\n|\r\n|$|,|.|-|−|0|1|18|1,000|18.00|x|%|١"
TERMS = (
    r"1|12|0.5|.5|5.0|1,234|1{,}234|-|1/2|\frac{1}{2}|\dfrac12|\frac1{2}|\sqrt3|x|x = |\text{East}"
    r"|East|\text{ cm}|%|^\circ|$|\!|,|, | |(|)|[|]|\{|\}|\left(|.|/|\boxed{|\boxed |}|\boxed{5}"
)
CODE = "```|```python|\n|    return 1|\ndef f(x):|\nclass A:|\n# |\nif x:|\nprint(1)| |[DONE]|\r\n"
PIECES = dict.fromkeys(rules.ANSWERS, NUMBERS) | dict.fromkeys(rules.PROGRAMS, CODE)
PIECES["math500.boxed"] = TERMS
ANSWERS = ["18", "1,000", "18.0", "text\n#### 18", "5", r"\frac{1}{2}", "(1, 2)", "x"]


@pytest.mark.parametrize("rule", PIECES)
@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.data())
def test_both_evaluators_agree_on_random_completions(rule, data):
    pieces = st.sampled_from(PIECES[rule].split("|"))
    text = data.draw(st.lists(pieces, max_size=9).map("".join))
    case = {"rule": rule, "completion": text, "answer": data.draw(st.sampled_from(ANSWERS))}
    if rule in rules.PROGRAMS:
        case["prompt"] = "def f(x):\n"
    assert judge.judge(case) == rules.judge(case)
    if rule == "math500.boxed":
        equal = TASKS["math500"].rules["boxed"].equal
        assert equal(text, case["answer"]) == rules.same_answer(text, case["answer"])
