"""The tiny data set: no leaks, right answers, true steps, files as the seed gives them."""

import contextlib
import io
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from data.tasks import TASKS, judge
from data.tiny import prepare, tasks
from model import ModelConfig, Transformer

TINY = Path(__file__).resolve().parents[1] / "data/tiny"
SETTINGS = prepare.Settings()
SPLITS = {name: tasks.post_rows(name, SETTINGS.seed) for name in tasks.SPLIT_ROWS}


def test_no_prompt_is_in_two_splits_or_in_the_pretraining_stream():
    prompts = [row["prompt"] for rows in SPLITS.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == len(tasks.TASKS) * (256 + 128 + 2000)
    held_out = {row["prompt"] for name in ("test", "dev") for row in SPLITS[name]}
    for chat in tasks.pretrain_rows(SETTINGS.seed, SETTINGS.conversations):
        assert held_out.isdisjoint(turn["content"] for turn in chat["messages"])
    drawn = [tasks.pretrain_turn(random.Random(seed), set()) for seed in range(50)]
    seed = next(seed for seed, row in enumerate(drawn) if row["task"] != "drill")
    avoided = {drawn[seed]["prompt"]}  # what is held out makes the difference
    assert tasks.pretrain_turn(random.Random(seed), avoided)["prompt"] not in avoided


def test_committed_rows_are_what_the_seed_gives(tmp_path):
    small = replace(SETTINGS, out=str(tmp_path), work=str(tmp_path / "work"), conversations=20)
    prepare.make_data(small)
    assert len(small.pretrain_file.read_text().splitlines()) == 20
    for name in ("train.jsonl", "dev.jsonl", *(f"test/{task}.jsonl" for task in tasks.TASKS)):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    assert all(judge(TASKS[row["task"]], row)["correct"] for row in SPLITS["test"])


def evaluate(row):
    return str(eval(row["prompt"].removeprefix("Compute ").removesuffix(".")))


def run_program(row):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(row["prompt"].split("\n", 1)[1], {})
    return printed.getvalue().removesuffix("\n")


def solve_formulas(row):
    found = re.findall(r"([a-z]+) (\d+) ", row["prompt"])
    values = {name: int(value) for name, value in found}
    for rule in re.findall(r"(?m)^(\w+) = (\w+) ([*/]) (\w+)$", row["completion"]):
        target, left, op, right = rule
        assert rule in tasks.rules()
        values[target] = tasks.apply(values[left], op, values[right])
    target = row["prompt"].removesuffix(".").split()[-1]
    return f"{values[target]} {tasks.UNITS[target]}"


def assert_true(line):
    parts = line.split(" = ")
    assert len(parts) > 1 and len({eval(part) for part in parts}) == 1, line


SOLVERS = {"math": evaluate, "science": solve_formulas, "code": run_program}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_are_right_and_every_step_is_true(task):
    rng = random.Random(7)
    for row in [tasks.generate(task, rng, level, True) for level in ("easy", "hard") * 400]:
        *lines, last = row["completion"].split("\n")
        assert last == f"#### {row['answer']}" and "-" not in row["answer"]
        assert task not in SOLVERS or SOLVERS[task](row) == row["answer"], row
        numbers = re.findall(r"\d+", row["prompt"] + row["completion"])
        assert max(map(int, numbers)) <= tasks.TOP
        for line in lines:
            comparison = re.fullmatch(r"(\d+ [<>] \d+) (True|False)", line)
            if found := re.fullmatch(r"(?:\w+ = )?(\d+ [-+*/] \d+ = .+)", line):
                assert_true(found[1])
            elif task != "science":  # whose other lines are formulas
                assert str(eval(comparison[1])) == comparison[2]
    direct = tasks.generate(task, random.Random(5), "hard", worked=False)
    worked = tasks.generate(task, random.Random(5), "hard", worked=True)
    assert direct == worked | {"completion": f"#### {worked['answer']}"}


def test_drills_state_true_facts_in_the_order_asked():
    rng = random.Random(1)
    for row in [tasks.drill(rng) for _ in range(500)]:
        lines = row["completion"].split("\n")
        asked = f"Solve {', '.join(line.split(' = ')[0] for line in lines)}."
        assert row["prompt"] in (asked, f"Write {len(lines)} facts.") and len(lines) <= 8
        for line in lines:
            assert_true(line)


def test_the_tokenizer_s_files_are_what_prepare_writes(tmp_path):
    prepare.make_tokenizer(replace(SETTINGS, out=str(tmp_path)))
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (TINY / "model" / file.name).read_bytes(), file.name
    tokenizer = Tokenizer.from_file(str(TINY / "model/tokenizer.json"))
    assert all(len(token) == 1 for token in tokenizer.get_vocab() if re.search(r"\d", token))
    for text in ("Grüße, 漢字 17 🙂", "a = 3\n\tb\r\n  c", "½ ٣ e\u0301", "", "  1 * 6 =  6 \n\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_pretraining_begins_at_seeded_weights_and_resumes(tmp_path):
    small = replace(SETTINGS, work=str(tmp_path), steps=7)
    start, run = prepare.make_start(small), tmp_path / "run"
    command = prepare.train_command(small, start, run)
    assert command[command.index("--steps") + 1] == "7" and command[-1] != "--resume"
    run.mkdir()
    assert prepare.train_command(small, start, run) == [*command, "--resume"]
    first, again, other = (Transformer(ModelConfig.from_dir(start)) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        prepare.init_weights(model, seed)
    for name, p in first.named_parameters():
        std = 0.02 / 12**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert p.eq(1).all() if p.dim() == 1 else abs(p.std() / std - 1) < 0.05, name
        assert torch.equal(p, again.get_parameter(name))
        assert torch.equal(p, other.get_parameter(name)) == (p.dim() == 1)
    with pytest.raises(ValueError, match="stage, size: expected one of"):
        prepare.main({"stage": "model"})
