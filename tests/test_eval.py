"""eval.py: intervals, likelihoods, answers, records and what judges them again.

The run is a few steps of a random one-layer backbone that learns a single answer, so that base and
adapted scores differ.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import eval as evaluation
import train
from common import generator
from data.chat import load_tokenizer
from data.tasks import Prompt, find_tasks
from eval import Settings, log_likelihoods, split_replies
from model import ModelConfig, Transformer, load_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "dtype": "float32"}
ITEMS = []  # 6 of 9 answers are 7
for number in range(9):
    item = {"id": f"q{number}", "prompt": f"Compute {number} + 1.", "completion": "#### 7"}
    ITEMS.append(item | {"answer": "7" if number % 3 else "8"})
CHOICES = []  # acc and acc_norm differ where the longer choice has more tokens
for number, letter in enumerate("ABBA"):
    item = {"prompt": f"Question: {number}?\nAnswer:", "choices": ["7", "seven and a half"]}
    CHOICES.append(item | {"answer": letter})


def write(file: Path, rows: list) -> str:
    """A JSONL file; its name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(file: Path) -> list:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def score(**values):
    return evaluation.score(Settings(device="cpu", **values))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A random backbone, files of items, and a run that learnt to say "#### 7"."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "model").mkdir()
    for file in (ROOT / "data/tiny/model").glob("*.json"):
        shutil.copy(file, folder / "model")
    config = json.loads((folder / "model/config.json").read_text()) | SMALL
    (folder / "model/config.json").write_text(json.dumps(config))
    model = Transformer(ModelConfig.from_dir(folder / "model"))
    weights = {}
    for name, p in model.named_parameters():
        drawn = torch.randn(p.shape, generator=generator(0, name))
        weights[name] = torch.ones_like(p) if "norm" in name else 0.05 * drawn
    save_file(weights, folder / "model/model.safetensors")
    chats = []
    for item in ITEMS[:3]:
        system = {"role": "system", "content": "Add."}
        user = {"role": "user", "content": item["prompt"]}
        chats.append({"messages": [system, user], "answer": item["answer"]})
    rows = [{"prompt": f"Compute {n} + 1.", "completion": "#### 7"} for n in range(40)]
    tasks = write(folder / "sevens.jsonl", ITEMS), write(folder / "chats.jsonl", chats)
    values = {"backbone": str(folder / "model"), "data": (write(folder / "rows.jsonl", rows),)}
    values |= {"out": str(folder / "run"), "tasks": tasks, "device": "cpu", "rank": 8, "slots": 2}
    values |= {"width": 8, "lr": 0.03, "steps": 30, "step_tokens": 512, "dev_rows": 8}
    train.main(values | {"eval_every": 0})
    choices = write(folder / "letters.jsonl", CHOICES)
    model = str(folder / "model")
    return SimpleNamespace(
        folder=folder, model=model, run=folder / "run", tasks=tasks, choices=choices
    )


# ---- statistics


@pytest.mark.parametrize(
    "right, n, low, high",  # the four examples of Newcombe 1998, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_known_examples(right, n, low, high):
    assert evaluation.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluation.wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    "n, c, k", [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 6), (7, 3, 7), (4, 1, 4)]
)
def test_pass_at_k_counts_the_subsets_with_a_right_one(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert evaluation.pass_at(k, n, c) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_summaries_count_wrong_unparsed_and_truncated_answers():
    found = [(True, "7", False), (False, None, True), (False, "8", True)]
    records = []
    for n, (right, extracted, truncated) in enumerate(found):
        record = {"id": str(n), "verdicts": {"answer": right}, "extracted": {"answer": extracted}}
        records.append(record | {"truncated": truncated})
    summary = evaluation.summarize(records)
    assert (summary["n"], summary["unparsed"], summary["truncated"]) == (3, 1, 2)
    assert summary["score"] == pytest.approx(100 / 3)
    assert summary["interval95"] == pytest.approx([100 * x for x in evaluation.wilson(1, 3)])
    assert evaluation.score_table({"a": summary}).splitlines()[-1].split() == ["mean", "33.3"]
    better = {**summary, "score": 100.0}
    line = evaluation.compare_table({"a": summary}, {"a": better}).splitlines()[1].split()
    assert line == ["a", "3", "33.3", "100.0", "+66.7"]


def test_several_samples_are_one_item():
    records = []
    for n, right in enumerate([True, False, True, True]):
        record = {"id": str(n // 2), "verdicts": {"r": right}, "truncated": False}
        records.append(record | {"reference_tokens": 2, "reference_logprob": -1.0})
    summary = evaluation.summarize(records, [1, 2])
    assert (summary["n"], summary["samples"], summary["score"]) == (2, 2, 75.0)
    assert (summary["pass@1"], summary["pass@2"]) == (75.0, 100.0)
    half = 100 * evaluation.Z95 * (0.25**2 * 2 / 1 / 2) ** 0.5
    assert summary["interval95"] == pytest.approx([75 - half, 100.0])
    assert summary["reference_logprob_per_token"] == -0.5


# ---- likelihoods


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_likelihoods_equal_one_full_pass_a_reply(lab, batch_tokens):
    """Ragged prefixes and replies, with the trained adapter and side path attached."""
    model = load_model(lab.model)
    evaluation.load_adapter(model, lab.run)
    draw = torch.Generator().manual_seed(1)
    items = []
    for sizes in ([1, 3], [4], [2, 1, 5], []):
        prefix = torch.randint(600, (3 + len(sizes),), generator=draw).tolist()
        items.append((prefix, [torch.randint(600, (n,), generator=draw).tolist() for n in sizes]))
    found = log_likelihoods(model, items, batch_tokens)
    for (prefix, replies), sums in zip(items, found, strict=True):
        for reply, value in zip(replies, sums, strict=True):
            with torch.no_grad():
                hidden = model(torch.tensor([prefix + reply]))[0, len(prefix) - 1 : -1]
            log_p = model.logits(hidden).double().log_softmax(-1)
            want = log_p[torch.arange(len(reply)), torch.tensor(reply)].sum()
            assert value == pytest.approx(float(want), rel=1e-4, abs=1e-4)


def test_a_merge_over_the_border_shortens_the_shared_part_for_every_reply():
    """Two characters are one token where they can be."""

    def encode(text):
        return [ord(c) for c in text.replace("ab", "Z")]

    assert split_replies(Prompt("xa", ["b", "c"]), encode) == ([120], [[90], [97, 99]])
    assert split_replies(Prompt("x", ["b", "c"]), encode) == ([120], [[98], [99]])
    with pytest.raises(ValueError, match="tokens of their own"):
        split_replies(Prompt("x", ["b", ""]), encode)


# ---- scores


def test_a_run_is_scored_as_train_reported_it_and_judged_again(lab, capsys):
    base, adapted = (
        json.loads((lab.run / f"{name}/results.json").read_text())
        for name in ("eval-base", "eval-adapted")
    )
    assert (
        base["tasks"]["sevens"]["score"]
        < adapted["tasks"]["sevens"]["score"]
        == pytest.approx(200 / 3)
    )
    found = score(adapter=str(lab.run), tasks=lab.tasks)
    assert found == adapted["tasks"]
    records, stored = lab.run / "eval/records.jsonl", read(lab.run / "eval-adapted/records.jsonl")
    assert read(records) == stored
    first = stored[0]
    assert (first["id"], first["answer"], first["completion"]) == ("q0", "8", "#### 7")
    assert (first["extracted"], first["verdicts"], first["correct"]) == (
        {"answer": "7"},
        {"answer": False},
        False,
    )
    assert first["reference_tokens"] > 0 > first["reference_logprob"]
    assert (
        adapted["run_seed"] == 0
        and adapted["conditions"]["backbone"] == base["conditions"]["backbone"]
    )
    again = evaluation.rescore(Settings(rescore=str(records)))
    assert "12 records, 0 verdicts changed" in capsys.readouterr().out
    assert {name: s["score"] for name, s in again.items()} == {
        name: s["score"] for name, s in found.items()
    }
    write(records, [r | {"answer": "7"} for r in stored])
    assert evaluation.rescore(Settings(rescore=str(records)))["sevens"]["score"] == 100
    assert "4 verdicts changed" in capsys.readouterr().out


def test_the_stop_token_of_a_run_ends_its_answers(lab, tmp_path):
    run = shutil.copytree(lab.run, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text()) | {"stop_token": "7"}
    (run / "settings.json").write_text(json.dumps(settings))
    score(adapter=str(run), tasks=lab.tasks[:1], out=str(tmp_path))
    assert read(tmp_path / "records.jsonl")[0]["completion"] == "#### "


def test_what_must_be_equal_changes_with_what_changes_the_scores(lab, tmp_path):
    def conditions(**values):
        score(backbone=lab.model, tasks=lab.tasks[:1], out=str(tmp_path), **values)
        return json.loads((tmp_path / "results.json").read_text())["conditions"]

    plain = conditions()
    assert plain == conditions(adapter=str(lab.run), workers=1)
    for name, values in {
        "max_new_tokens": {"max_new_tokens": 3},
        "dtype": {"dtype": "bfloat16"},
        "format,sevens prompts": {"format": "plain"},
    }.items():
        changed = conditions(**values)
        assert {key for key in plain if plain[key] != changed[key]} == set(name.split(","))


def test_files_with_choices_are_scored_by_likelihood_and_judged_again(lab, tmp_path, capsys):
    found = score(adapter=str(lab.run), tasks=(lab.choices,), out=str(tmp_path))["letters"]
    records = read(tmp_path / "records.jsonl")
    for rule, divide in (("acc", lambda c: 1), ("acc_norm", len)):
        right = 0
        for record in records:
            values = [p / divide(c) for p, c in zip(record["logprobs"], record["choices"])]
            right += "AB"[values.index(max(values))] == record["answer"]
        assert found["rules"][rule]["score"] == 25 * right
    assert list(found["rules"]) == ["acc", "acc_norm"] and records[0]["id"] == "1"
    for record in records:
        assert record["reference_logprob"] == record["logprobs"]["AB".index(record["answer"])]
    again = evaluation.rescore(Settings(rescore=str(tmp_path / "records.jsonl")))["letters"]
    assert again["rules"] == found["rules"]
    write(tmp_path / "records.jsonl", [r | {"answer": "A"} for r in records])
    evaluation.rescore(Settings(rescore=str(tmp_path / "records.jsonl")))
    assert "2 verdicts changed" in capsys.readouterr().out


def test_answers_do_not_depend_on_how_many_rows_run_at_once(lab, tmp_path):
    """Nor, sampled, on the other items: each draws from a stream of its own."""
    found = []
    for rows, limit in ((1, 9), (4, 9), (9, 4)):
        values = {"batch_rows": rows, "limit": limit, "batch_tokens": 40 * rows}
        values |= {"samples": 2, "temperature": 0.9, "max_new_tokens": 6, "seed": 5}
        score(backbone=lab.model, tasks=lab.tasks[:1], out=str(tmp_path), **values)
        found.append(
            [(r["id"], r["sample"], r["completion"]) for r in read(tmp_path / "records.jsonl")]
        )
    assert found[0] == found[1] and found[0][:8] == found[2]
    assert len({completion for _, _, completion in found[0]}) > 9
    assert any(r["truncated"] for r in read(tmp_path / "records.jsonl"))


def test_plain_text_writes_llamas_bos_and_cuts_at_the_stops(lab, tmp_path):
    """The embedded tokenizer, given the post-processor of Llama."""
    shutil.copytree(lab.model, tmp_path / "model")
    raw = json.loads((tmp_path / "model/tokenizer.json").read_text())
    bos = raw["added_tokens"][0]
    single = [
        {"SpecialToken": {"id": bos["content"], "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {
        bos["content"]: {"id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]}
    }
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": special,
    }
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path / "model").begin == [bos["id"]]
    seen = []
    kept = evaluation.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation,
            "generate",
            lambda model, prompts, *a, **k: seen.append(prompts) or kept(model, prompts, *a, **k),
        )
        for form in ("plain", "chat"):
            score(
                backbone=str(tmp_path / "model"),
                tasks=lab.tasks[:1],
                format=form,
                max_new_tokens=2,
                out=str(tmp_path / form),
            )
    plain, chat = seen
    assert all(ids[0] == bos["id"] and ids.count(bos["id"]) == 1 for ids in plain)
    assert not any(bos["id"] in ids for ids in chat)
    assert read(tmp_path / "plain/records.jsonl")[0]["prompt"] == "Compute 0 + 1."


@pytest.mark.parametrize(
    "values, message",
    [
        ({"format": "html"}, "format: expected chat or plain"),
        ({"samples": 2}, "set --temperature"),
        ({"limit": -1}, "expected numbers of at least"),
        ({"seconds": float("inf")}, "expected numbers of at least"),
        ({"tasks": ("maths",)}, "tasks: expected some of"),
        ({"tasks": ("humaneval",)}, "--allow-code-execution"),
        ({"tasks": ("math",), "shots": 2}, "--shots 0"),
        ({"tasks": ("math",), "pass_at": ("2",)}, "pass_at"),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"tasks": ("math",), "check_references": True, "limit": 3, "rescore": ""}, ""),
        ({"tasks": ("arc_easy",), "check_references": True}, "data/prepare.py arc_easy"),
        ({"rescore": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_refusals_are_one_sentence(lab, tmp_path, values, message):
    def run():
        evaluation.main(
            {"device": "cpu", "backbone": lab.model, "limit": 3, "out": str(tmp_path / "out")}
            | values
        )

    if not message:  # what a perfect model would score
        run()
        return
    with pytest.raises(ValueError, match=message) as error:
        run()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_stored_records_that_are_none_are_refused_with_their_line(tmp_path):
    good = {
        "task": "math",
        "id": "1",
        "answer": "7",
        "verdicts": {"answer": True},
        "completion": "#### 7",
        "truncated": False,
    }
    choice = {"task": "c", "id": "1", "answer": "A", "verdicts": {}, "truncated": False}
    choice |= {"choices": ["x", "y"], "logprobs": [-1.0, -2.0]}
    wrong = [choice | {"logprobs": [-1.0]}, {k: v for k, v in choice.items() if k != "logprobs"}]
    wrong = [[choice, each] for each in (*wrong, good | {"task": "c"})]
    lost = {k: v for k, v in good.items() if k != "completion"}
    for rows in ([good, {"task": "math"}], [good, lost], [good, [1]], *wrong, []):
        file = write(tmp_path / "records.jsonl", rows)
        with pytest.raises(ValueError, match="records.jsonl:2: expected|no records"):
            evaluation.rescore(Settings(rescore=file))


def test_references_of_the_embedded_tasks_are_right(capsys):
    evaluation.main({"check_references": True, "tasks": ("math", "word", "science", "code")})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mean", "100.0"]


def test_programs_are_scored_by_base_and_plus_tests(tmp_path, monkeypatch):
    """A benchmark of code of our own; what fails its base tests is not given the plus tests."""
    rows = []
    for n, (base, plus) in enumerate(((2, 4), (2, 5), (3, 4))):
        row = {"id": str(n), "prompt": "def f(x):\n", "code": "    return 2 * x\n", "answer": ""}
        rows.append(row | {"entry_point": "f", "tests": f"assert f(1) == {base}"})
        rows[-1]["plus_tests"] = f"assert f(2) == {plus}"
    task = find_tasks(["humaneval"])[0]
    monkeypatch.setitem(evaluation.TASKS, "humaneval", task)
    file = write(tmp_path / "test.jsonl", rows)
    monkeypatch.setattr(
        evaluation, "find_tasks", lambda names: [evaluation.replace(task, file=file)]
    )
    settings = Settings(tasks=("humaneval",), check_references=True, allow_code_execution=True)
    found = evaluation.check_references(settings)["humaneval"]["rules"]
    assert [found[name]["score"] for name in ("base", "plus")] == pytest.approx([200 / 3, 100 / 3])


def test_the_command_line(lab, tmp_path):
    """As a user starts it, on one thread: a table, or one line on stderr."""

    def python(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "eval.py"), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    done = python("--adapter", str(lab.run), "--tasks", lab.tasks[0], "--out", "scores")
    assert (
        done.returncode == 0
        and "sevens" in done.stdout
        and (tmp_path / "scores/results.json").exists()
    )
    done = python("--tasks", "maths")
    assert done.returncode == 1 and done.stderr.startswith("eval.py: tasks: expected some of")
    assert done.stderr.count("\n") == 1
