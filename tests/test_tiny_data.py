"""The tiny data set: no leaks, right answers, true steps, files as the seed gives them, a sound tokenizer."""

import contextlib
import io
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.tiny import prepare, tasks  # noqa: E402

TINY = ROOT / "data" / "tiny"
SETTINGS = prepare.Settings()
NUMBER_LINE = re.compile(r"(?:\w+ = )?(\d+ [-+*/] \d+(?: = .+)?)")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tasks.Row]]:
    return {name: tasks.post_rows(name, SETTINGS.seed) for name in tasks.SPLIT_ROWS}


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(TINY / "model" / "tokenizer.json"))


def samples(task: str, count: int = 1500) -> list[tasks.Row]:
    rng = random.Random(7)
    return [tasks.generate(task, rng, level, worked=True) for level in ("easy", "hard") for _ in range(count // 2)]


def jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- splits


def test_splits_have_their_sizes_and_share_no_prompt(splits) -> None:
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == len(tasks.TASKS) * (256 + 128 + 2000)
    assert len({row["id"] for rows in splits.values() for row in rows}) == len(prompts)


def test_no_held_out_prompt_in_the_pretraining_stream(splits) -> None:
    held_out = {row["prompt"] for name in ("test", "dev") for row in splits[name]}
    conversations = 0
    for conversation in tasks.pretrain_rows(SETTINGS.seed, SETTINGS.conversations):
        turns = conversation["messages"]
        assert held_out.isdisjoint(turn["content"] for turn in turns)
        conversations += 1
    assert conversations == SETTINGS.conversations


def test_exclusion_is_what_keeps_held_out_prompts_away() -> None:
    drawn = [(seed, tasks.pretrain_turn(random.Random(seed), set())) for seed in range(50)]
    seed, row = next((seed, row) for seed, row in drawn if row["task"] != "drill")
    assert tasks.pretrain_turn(random.Random(seed), {row["prompt"]})["prompt"] != row["prompt"]


def test_conversations_are_independent_question_answer_turns() -> None:
    for conversation in tasks.pretrain_rows(3, 200):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 1 <= len(roles) // 2 <= 3


@pytest.mark.parametrize("name", ["train.jsonl", "dev.jsonl", *(f"test/{task}.jsonl" for task in tasks.TASKS)])
def test_committed_rows_are_what_the_seed_gives(name: str) -> None:
    assert jsonl(name) == prepare.post_files(SETTINGS.seed)[name]


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    first, again, other = (list(tasks.pretrain_rows(seed, 20)) for seed in (1, 1, 2))
    assert first == again != other
    assert tasks.task_rows("math", "dev", 1) == tasks.task_rows("math", "dev", 1) != tasks.task_rows("math", "dev", 2)


def test_unknown_level_and_split_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown level"):
        tasks.generate("math", random.Random(0), "medium", True)
    with pytest.raises(ValueError, match="unknown split"):
        tasks.task_rows("math", "validation", 0)


# ---------------------------------------------------------------- answers


def test_math_answers_are_what_python_computes() -> None:
    for row in samples("math"):
        assert re.fullmatch(r"Compute [-+*() \d]+\.", row["prompt"])
        assert str(eval(row["prompt"][len("Compute ") : -1])) == row["answer"]


def test_code_answers_are_what_python_prints() -> None:
    for row in samples("code"):
        program, printed = row["prompt"].split("\n", 1)[1], io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, {})
        assert printed.getvalue() == row["answer"] + "\n"
        assert 2 <= len(program.splitlines()) <= 9


def test_science_answers_follow_from_the_formula_and_carry_the_unit() -> None:
    for row in samples("science"):
        values = {name: int(value) for name, value in re.findall(r"([a-z]+) (\d+) ", row["prompt"])}
        for target, left, op, right in re.findall(r"^(\w+) = (\w+) ([*/]) (\w+)$", row["completion"], re.M):
            assert (target, left, op, right) in tasks.rules()
            values[target] = values[left] * values[right] if op == "*" else values[left] // values[right]
            assert op == "*" or values[target] * values[right] == values[left]
        target = row["prompt"].removesuffix(".").split()[-1]
        assert row["answer"] == f"{values[target]} {tasks.UNITS[target]}"


def retell(prompt: str) -> int:
    """Solve a word problem from its sentences alone."""
    *told, question = re.findall(r"[^.?]+[.?]", prompt)
    hero, held = told[0].split()[0], {}
    for sentence in (s.strip() for s in told):
        who, numbers = sentence.split()[0], [int(n) for n in re.findall(r"\d+", sentence)]
        amount = numbers[0] * (numbers[1] if len(numbers) > 1 else 1)
        if "times as many" in sentence:
            held[who] = held[hero] * amount
        elif " splits " in sentence:
            return held[hero] // amount
        elif " has " in sentence:
            held[who] = amount
        elif f" gives {hero} " in sentence or " buys " in sentence or " finds " in sentence:
            held[hero] += amount
        else:
            held[hero] -= amount
    if "together" in question:
        return sum(held.values())
    return held[next(name for name in question.removesuffix("?").split() if name in tasks.NAMES)]


def test_word_answers_follow_from_the_sentences() -> None:
    for row in samples("word"):
        assert str(retell(row["prompt"])) == row["answer"], row["prompt"]


def assert_true_equation(line: str) -> None:
    values = [eval(part.replace("/", "//")) for part in line.split(" = ")]
    assert len(values) >= 2 and len(set(values)) == 1, line
    divided = re.match(r"(\d+) / (\d+)", line)
    assert not divided or int(divided[1]) % int(divided[2]) == 0, line


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_worked_step_is_true_and_ends_in_the_answer(task: str) -> None:
    for row in samples(task):
        *lines, last = row["completion"].split("\n")
        assert last == f"#### {row['answer']}"
        equations = [found[1] for line in lines if (found := NUMBER_LINE.fullmatch(line))]
        for line in equations:
            assert_true_equation(line)
        for line in (line for line in lines if not NUMBER_LINE.fullmatch(line)):
            comparison = re.fullmatch(r"(\d+ [<>] \d+) (True|False)", line)
            assert str(eval(comparison[1])) == comparison[2] if comparison else task == "science"
        assert not equations or task == "code" or equations[-1].split()[-1] == row["answer"].split()[0]


def test_drills_state_true_facts_in_the_order_asked() -> None:
    rng = random.Random(1)
    for _ in range(500):
        row = tasks.drill(rng)
        lines = row["completion"].split("\n")
        asked = "Solve " + ", ".join(line.split(" = ")[0] for line in lines) + "."
        assert row["prompt"] in (asked, f"Write {len(lines)} facts.") and 1 <= len(lines) <= 8
        for line in lines:
            assert_true_equation(line)


def test_numbers_stay_modest_and_non_negative() -> None:
    for task in tasks.TASKS:
        for row in samples(task):
            assert "-" not in row["answer"]
            assert max(int(n) for n in re.findall(r"\d+", row["prompt"] + row["completion"])) <= tasks.TOP


def test_direct_rows_hold_the_answer_alone() -> None:
    for task in tasks.TASKS:
        worked = tasks.generate(task, random.Random(5), "hard", worked=True)
        direct = tasks.generate(task, random.Random(5), "hard", worked=False)
        assert direct["prompt"] == worked["prompt"] and direct["completion"] == f"#### {worked['answer']}"


# ---------------------------------------------------------------- grading


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1 + 1 = 2\n#### 2", "2"),
        ("#### 36 V\n", "36 V"),
        ("#### 1\n#### 2\nand more", "2"),
        ("####7", "7"),
        ("####", ""),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_extract(text: str, found: str | None) -> None:
    assert tasks.extract(text) == found


@pytest.mark.parametrize(
    ("extracted", "answer", "right"),
    [
        ("36 V", "36 V", True),
        (" 36  V ", "36 V", True),
        ("36", "36 V", False),
        ("36 v", "36 V", False),
        ("036", "36", False),
        ("", "36", False),
        (None, "36", False),
    ],
)
def test_grade(extracted: str | None, answer: str, right: bool) -> None:
    assert tasks.grade(extracted, answer) is right


def test_every_completion_grades_as_right(splits) -> None:
    for row in splits["test"]:
        assert tasks.grade(tasks.extract(row["completion"]), row["answer"])


# ---------------------------------------------------------------- tokenizer


def test_digits_are_single_tokens(tokenizer) -> None:
    digits = set("0123456789")
    for token in tokenizer.get_vocab():
        assert len(token) == 1 or not digits & set(token), token
    assert tokenizer.encode(" 17").tokens == ["Ġ", "1", "7"]


@pytest.mark.parametrize("text", ["Grüße, 漢字 17 🙂", "a = 3\n\tb\r\n  c", "½ ٣ é e\u0301", "", "  17 * 6 =  102 \n\n"])
def test_unicode_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_ids_the_configs_name(tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in prepare.SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= prepare.MODEL_CONFIG["vocab_size"]
    assert prepare.MODEL_CONFIG["eos_token_id"] == 2 and prepare.MODEL_CONFIG["pad_token_id"] == 0


def test_two_trainings_give_the_committed_tokenizer() -> None:
    pytest.importorskip("tokenizers")
    size = prepare.MODEL_CONFIG["vocab_size"]
    texts = [prepare.train_tokenizer(prepare.tokenizer_texts(SETTINGS), size) for _ in range(2)]
    assert texts[0] == texts[1] == (TINY / "model" / "tokenizer.json").read_text(encoding="utf-8")


def test_committed_configs_are_what_prepare_writes(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    prepare.make_tokenizer(replace(SETTINGS, out=str(tmp_path), tokenizer_rows=50))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_text() == (TINY / "model" / name).read_text(), name


def test_chat_template_is_plain_chatml() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "model")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 17"}], tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi 17<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(rendered)) == rendered


def test_pretraining_is_the_repository_s_own_loop(tmp_path: Path) -> None:
    settings = replace(SETTINGS, work=str(tmp_path), steps=7)
    command = prepare.train_command(settings, tmp_path / "start", tmp_path / "run")
    assert command[1] == "train.py" and command[command.index("--steps") + 1] == "7" and "--resume" not in command
    (tmp_path / "run").mkdir()
    assert prepare.train_command(settings, tmp_path / "start", tmp_path / "run")[-1] == "--resume"


def test_unknown_stage_is_an_error() -> None:
    with pytest.raises(ValueError, match="stage: expected one of"):
        prepare.main(replace(SETTINGS, stage="model"))
