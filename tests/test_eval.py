"""eval.py: intervals, task files, records and their rescoring, and that it repeats what train.py reported.

The runs are a few steps of a random one-layer backbone that learns a single answer, so that base and adapted scores differ.
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
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data.tiny.tasks import TASKS as EMBEDDED  # noqa: E402
from model import ModelConfig, Transformer, load_model, load_tokenizer  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
ITEMS = [{"id": f"q{n}", "prompt": f"Compute {n} + 1.", "answer": "7" if n % 3 else "8"} for n in range(9)]  # 6 of 9 are 7


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A random backbone, two task files, and a finished run (adapter and side path) that learned to say "#### 7"."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "model").mkdir()
    for file in (ROOT / "data/tiny/model").glob("*.json"):
        shutil.copy(file, folder / "model")
    config = json.loads((folder / "model/config.json").read_text()) | SMALL
    (folder / "model/config.json").write_text(json.dumps(config))
    model = Transformer(ModelConfig.from_dir(folder / "model"))
    model.init_weights(0)
    save_file(dict(model.state_dict()), folder / "model/model.safetensors")
    write(folder / "sevens.jsonl", ITEMS)
    write(folder / "chats.jsonl", [{"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": i["prompt"]}],
                                    "answer": i["answer"]} for i in ITEMS[:3]])
    write(folder / "rows.jsonl", [{"prompt": f"Compute {n} + 1.", "completion": "#### 7"} for n in range(40)])
    tasks, run = (str(folder / "sevens.jsonl"), str(folder / "chats.jsonl")), folder / "run"
    train.main({"backbone": str(folder / "model"), "data": (str(folder / "rows.jsonl"),), "out": str(run), "tasks": tasks, "device": "cpu",
                "rank": 8, "slots": 2, "width": 8, "lr": 0.03, "steps": 30, "step_tokens": 512, "dev_rows": 8, "log_every": 0, "eval_every": 0})
    return SimpleNamespace(folder=folder, model=str(folder / "model"), run=run, tasks=tasks)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def score(**values):
    return evaluation.score(evaluation.Settings(device="cpu", **values))


def rescore(file):
    return evaluation.rescore(evaluation.Settings(rescore=str(file)))


def own(file):
    return evaluation.own(file.stem, str(file))


def python(*args, **options):
    """Run this Python on one thread."""
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("right, n, low, high", [  # the four examples of Newcombe 1998, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
])
def test_wilson_interval_of_known_examples(right, n, low, high):
    assert evaluation.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluation.wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("right, n", [(1, 1), (0, 1), (5, 10), (791, 1319), (3018, 3018), (1, 10**6)])
def test_wilson_bounds_are_1_96_standard_errors_away(right, n):
    """Each bound x solves |p - x| = 1.96 sqrt(x (1 - x) / n)."""
    low, high = evaluation.wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for x in (low, high):
        assert (right / n - x) ** 2 * n == pytest.approx(1.959964 ** 2 * x * (1 - x), rel=1e-5, abs=1e-9)


def test_summaries_count_wrong_unparsed_and_truncated_answers():
    ids = itertools.count()

    def record(task, correct, extracted, truncated):
        return {"task": task, "id": str(next(ids)), "verdicts": {"answer": correct}, "extracted": {"answer": extracted}, "truncated": truncated}

    records = [record("a", True, "7", False), record("a", False, None, True), record("a", False, "8", True), record("b", True, "1", True)]
    found = evaluation.summarize(records)
    assert list(found) == ["a", "b"]
    assert {k: found["a"][k] for k in ("n", "unparsed", "truncated")} == {"n": 3, "unparsed": 1, "truncated": 2}
    assert found["a"]["score"] == pytest.approx(100 / 3) and found["b"]["score"] == 100
    assert found["a"]["interval95"] == pytest.approx([100 * x for x in evaluation.wilson(1, 3)])
    assert evaluation.score_table(found).splitlines()[-1].split() == ["mean", "66.7"]
    lines = [line.split() for line in evaluation.compare_table(found, {"a": found["b"], "b": found["b"]}).splitlines()]
    assert lines[1:] == [["a", "3", "33.3", "100.0", "+66.7"], ["b", "1", "100.0", "100.0", "+0.0"], ["mean", "66.7", "100.0", "+33.3"]]


# ---------------------------------------------------------------- tasks


def test_task_names_and_files():
    assert [task.name for task in evaluation.find_tasks(["math", "a/own.jsonl"])] == ["math", "own"]
    for names, message in ((["maths"], "maths"), (["math", "own", "none"], "own, none"), ([], "none"), (["math", "math"], "once"),
                           (["math", "a/math.jsonl"], "once"),
                           (["a/gsm8k.jsonl", "a/math.jsonl", "a/mmlu_stem.jsonl"], r"rename them: a/gsm8k\.jsonl, a/mmlu_stem\.jsonl$")):
        with pytest.raises(ValueError, match=f"tasks: .*{message}"):
            evaluation.find_tasks(names)
    assert evaluation.find_tasks(["a/math.jsonl"])[0].rules == evaluation.find_tasks(["math"])[0].rules  # judged alike: no harm


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_load(name):
    items = evaluation.load_items(*evaluation.find_tasks([name]))
    assert len(items) == len({item["id"] for item in items}) > 100
    assert len(evaluation.load_items(*evaluation.find_tasks([name]), limit=5)) == 5


GOOD = b'{"prompt": "a", "answer": "b"}'
BAD = {
    "bad_json": b"{", "not_utf8": b'{"prompt": "\xff", "answer": "b"}', "list": b"[]", "text": b'"messages"', "null": b"null",
    "no_prompt": b'{"answer": "b"}',
    "no_answer": b'{"prompt": "a"}', "answer_is_a_number": b'{"prompt": "a", "answer": 7}', "prompt_is_null": b'{"prompt": null, "answer": "b"}',
    "messages_are_text": b'{"messages": ["a"], "answer": "b"}', "messages_are_a_number": b'{"messages": 7, "answer": "b"}',
    "messages_are_null": b'{"messages": null, "answer": "b"}', "no_messages": b'{"messages": [], "answer": "b"}',
    "no_role": b'{"messages": [{"content": "a"}], "answer": "b"}', "no_content": b'{"messages": [{"role": "user"}], "answer": "b"}',
    "endless_integer": b'{"prompt": ' + b"1" * 5000 + b"}", "too_deep": b"[" * 100_000,
    "half_a_character": b'{"prompt": "\\ud800", "answer": "b"}', "half_a_character_in_the_answer": b'{"prompt": "a", "answer": "\\ud800"}',
    "half_a_character_in_the_id": b'{"prompt": "a", "answer": "b", "id": "\\ud800"}',
    "completion_is_empty": b'{"prompt": "a", "answer": "b", "completion": ""}',
    "the_answer_is_among_the_messages": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "b"}',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_items_are_named_by_file_and_line(tmp_path, name):
    (tmp_path / "own.jsonl").write_bytes(GOOD + b"\n\n" + BAD[name] + b"\n" + GOOD)
    with pytest.raises(ValueError, match=r"own\.jsonl:3: "):
        evaluation.load_items(own(tmp_path / "own.jsonl"))


@pytest.mark.parametrize("text", [GOOD, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n", b"\n \n" + GOOD + b"\n"])
def test_item_files_as_they_come(tmp_path, text):
    (tmp_path / "own.jsonl").write_bytes(text)
    items = evaluation.load_items(own(tmp_path / "own.jsonl"))
    assert [(item["prompt"], item["answer"]) for item in items] == [("a", "b")]


def test_files_without_items_are_named(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b"\n")
    for file in ("own.jsonl", "absent.jsonl"):
        with pytest.raises(ValueError, match=file):
            evaluation.load_items(own(tmp_path / file))


# ---------------------------------------------------------------- scores


def test_eval_repeats_what_training_reported(lab, tmp_path, capsys):
    reported = {name: json.loads((lab.run / name / "results.json").read_text()) for name in ("eval-base", "eval-adapted")}
    adapted = score(adapter=str(lab.run), tasks=lab.tasks, out=str(tmp_path / "adapted"))
    base = score(backbone=lab.model, tasks=lab.tasks, out=str(tmp_path / "base"))
    for name, found in (("eval-adapted", adapted), ("eval-base", base)):
        assert reported[name]["tasks"] == found
        assert read(lab.run / name / "records.jsonl") == read(tmp_path / name[5:] / "records.jsonl")
    assert (adapted["sevens"]["score"], base["sevens"]["score"]) == (pytest.approx(100 * 6 / 9), 0)  # the run did learn
    assert adapted["chats"]["n"] == 3 and "sevens" in capsys.readouterr().out


def test_the_backbone_that_the_adapter_names_is_used(lab, tmp_path, monkeypatch):
    used, load = [], load_model
    monkeypatch.setattr("model.load_model", lambda path, *args: used.append(str(path)) or load(path, *args))
    one = score(adapter=str(lab.run), tasks=lab.tasks[:1], out=str(tmp_path / "one"), limit=3)
    two = score(adapter=str(lab.run), backbone=lab.model, tasks=lab.tasks[:1], out=str(tmp_path / "two"), limit=3)
    assert used == [lab.model, lab.model] and one == two and one["sevens"]["n"] == 3
    for file in ("adapter_config.json", "talan_config.json"):  # a side path alone names its backbone too
        assert json.loads((lab.run / file).read_text())["base_model_name_or_path"] == lab.model
    (tmp_path / "alone").mkdir()
    shutil.copy(lab.run / "talan_config.json", tmp_path / "alone")
    assert evaluation.recorded_backbone(str(tmp_path / "alone")) == lab.model
    assert evaluation.recorded_backbone("") == str(ROOT / "data/tiny/model")


@pytest.mark.parametrize("file, ending, factor", [("adapter_model.safetensors", "lora_B.weight", 0), ("talan.safetensors", "w_out", -1000)])
def test_adapter_and_side_path_are_both_read(lab, tmp_path, file, ending, factor):
    shutil.copytree(lab.run, tmp_path / "run", ignore=shutil.ignore_patterns("eval-*"))
    tensors = load_file(tmp_path / "run" / file)
    save_file({name: t * factor if name.endswith(ending) else t for name, t in tensors.items()}, tmp_path / "run" / file)
    assert score(adapter=str(tmp_path / "run"), tasks=lab.tasks[:1])["sevens"]["score"] == 0
    assert (tmp_path / "run/eval/records.jsonl").exists()  # where it goes without --out


def test_records_hold_what_was_asked_and_answered(lab):
    records, tokenizer = read(lab.run / "eval-adapted/records.jsonl"), load_tokenizer(lab.model)
    assert [(r["task"], r["id"]) for r in records] == [("sevens", f"q{n}") for n in range(9)] + [("chats", str(n)) for n in (1, 2, 3)]
    for record in records[:9]:
        asked = [{"role": "user", "content": ITEMS[int(record["id"][1:])]["prompt"]}]
        assert record["prompt"] == tokenizer.render(asked, add_generation_prompt=True)
        assert (record["completion"], record["extracted"], record["truncated"]) == ("#### 7", {"answer": "7"}, False)
        assert record["tokens"] == len(tokenizer.encode("#### 7")) + 1  # the stop token is no part of the text
        assert record["correct"] == (record["answer"] == "7")
    results = json.loads((lab.run / "eval-adapted/results.json").read_text())
    assert results["backbone"] == lab.model and results["settings"]["format"] == "chat" and results["versions"]["torch"] == torch.__version__


def test_truncated_and_unparsed_answers_are_counted(lab, tmp_path):
    length = len(load_tokenizer(lab.model).encode("#### 7")) + 1
    short = score(adapter=str(lab.run), tasks=lab.tasks[:1], out=str(tmp_path / "short"), max_new_tokens=length - 1)["sevens"]
    assert (short["truncated"], short["unparsed"], short["score"]) == (9, 0, pytest.approx(100 * 6 / 9))  # all is said but the stop token
    one = score(adapter=str(lab.run), tasks=lab.tasks[:1], out=str(tmp_path / "one"), max_new_tokens=1)["sevens"]
    assert one["truncated"] == 9 and one["score"] == 0
    none = score(backbone=lab.model, tasks=lab.tasks[:1], out=str(tmp_path / "none"), max_new_tokens=4)["sevens"]
    assert (none["truncated"], none["unparsed"]) == (9, 9)


def test_trap_15_the_number_of_rows_at_once_changes_no_answer(lab, tmp_path):
    for rows in (1, 4):
        score(adapter=str(lab.run), tasks=lab.tasks, out=str(tmp_path / str(rows)), batch_rows=rows)
        assert read(tmp_path / str(rows) / "records.jsonl") == read(lab.run / "eval-adapted/records.jsonl")


@pytest.mark.parametrize("beside", [{"adapter": "none", "talan": False}, {"adapter": "lora", "rank": 4, "talan": True}], ids=["bare", "with_adapter"])
def test_scope_full_is_scored_as_a_backbone(lab, tmp_path, beside):
    run = tmp_path / "run"
    train.main({"backbone": lab.model, "data": (str(lab.folder / "rows.jsonl"),), "out": str(run), "tasks": lab.tasks[:1], "device": "cpu",
                "scope": "full", "dtype": "float32", "steps": 30, "step_tokens": 512, "lr": 0.01, "dev_rows": 8, "log_every": 0, **beside})
    adapted = json.loads((run / "eval-adapted/results.json").read_text())
    assert adapted["backbone"] == str(run) and adapted["tasks"]["sevens"]["score"] == pytest.approx(100 * 6 / 9)
    flag = {"adapter": str(run)} if beside["talan"] else {"backbone": str(run)}
    assert adapted["tasks"] == score(tasks=lab.tasks[:1], out=str(tmp_path / "again"), **flag)
    base = json.loads((run / "eval-base/results.json").read_text())
    assert (base["run_seed"], adapted["run_seed"]) == (None, 0)
    assert adapted["trained_from_sha256"] == base["backbone_sha256"] != adapted["backbone_sha256"] and "trained_from_sha256" not in base
    evaluation.compare(evaluation.CompareSettings((str(run / "eval-base"),), (str(run / "eval-adapted"),), str(tmp_path), resamples=100))


def test_only_a_run_has_a_seed(lab, tmp_path):
    assert [evaluation.run_seed(name) for name in (str(lab.run), lab.model, "", "owner/name", str(tmp_path))] == [0, None, None, None, None]
    (tmp_path / "settings.json").write_text('{"seed": "of something else"}')
    assert evaluation.run_seed(str(tmp_path)) is None


def test_other_weights_are_another_backbone(lab, tmp_path, monkeypatch):
    """Where a score was interrupted, and where two are compared: config and tokenizer are the same."""
    values, ran, run_task = {"backbone": str(tmp_path / "model"), "tasks": lab.tasks, "max_new_tokens": 2}, [], evaluation.run_task
    shutil.copytree(lab.model, tmp_path / "model")
    score(**values, out=str(tmp_path / "one"))

    def stop(task, *args):
        ran.append(task.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run_task(task, *args)

    monkeypatch.setattr(evaluation, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        score(**values, out=str(tmp_path / "two"))
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file({name: 1.5 * t for name, t in weights.items()}, tmp_path / "model/model.safetensors")
    score(**values, out=str(tmp_path / "two"))
    assert ran == ["sevens", "chats", "sevens", "chats"]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["fingerprint"] == two["fingerprint"] and one["backbone_sha256"] != two["backbone_sha256"] and one["world"] == 1
    sides = ((str(tmp_path / "one"),), (str(tmp_path / "two"),), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="backbone_sha256: "):
        evaluation.compare(evaluation.CompareSettings(*sides))
    evaluation.compare(evaluation.CompareSettings(*sides, ignore=("backbone_sha256",), resamples=100))


# ---------------------------------------------------------------- rescoring


def test_rescoring_needs_no_model_and_finds_a_tampered_verdict(lab, tmp_path, capsys):
    file = lab.run / "eval-adapted/records.jsonl"
    before, want = file.read_bytes(), json.loads((file.parent / "results.json").read_text())["tasks"]
    want = {task: {k: v for k, v in s.items() if not k.endswith("sha256")} for task, s in want.items()}
    assert rescore(file) == want
    assert "12 records, 0 verdicts changed" in capsys.readouterr().out and file.read_bytes() == before
    records = read(file)
    records[0]["verdicts"] = {"answer": not records[0]["correct"]}  # a verdict
    records[1]["extracted"] = {"answer": "8"}  # what was read, which the verdict does not rest on
    write(tmp_path / "records.jsonl", records)
    assert rescore(tmp_path / "records.jsonl") == want
    assert "1 verdicts changed" in capsys.readouterr().out
    records[2]["completion"] = "#### 8"  # the answer itself
    write(tmp_path / "records.jsonl", records)
    assert rescore(tmp_path / "records.jsonl")["sevens"]["score"] == pytest.approx(100 * 5 / 9)
    assert "2 verdicts changed" in capsys.readouterr().out


def test_rows_without_a_reference_are_not_wrong_ones(lab):
    with pytest.raises(ValueError, match=r"sevens\.jsonl: expected a reference solution.* 9: q0, q1, "):
        evaluation.check_references(evaluation.Settings(tasks=lab.tasks[:1]))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"task": "math"}', '{"task": ["math"], "id": "1"}'])
def test_unreadable_records_are_refused(tmp_path, text):
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"records\.jsonl"):
        rescore(tmp_path / "records.jsonl")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("words", [("--help",), ("score", "--help")])
def test_help_needs_no_torch(words):
    done = python("-X", "importtime", str(ROOT / "eval.py"), *words)
    assert done.returncode == 0 and not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
    assert [name for name in evaluation.Settings.__dataclass_fields__ if "--" + name.replace("_", "-") not in done.stdout] == []


def test_rescoring_from_the_command_line_needs_no_torch(lab):
    done = python("-X", "importtime", str(ROOT / "eval.py"), "--rescore", str(lab.run / "eval-adapted/records.jsonl"))
    assert done.returncode == 0 and "0 verdicts changed" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


def test_mistakes_end_in_one_line(tmp_path):
    for words, message in ((["--rescore", "absent.jsonl"], "absent.jsonl"), (["--limt", "3"], "did you mean --limit")):
        done = python(str(ROOT / "eval.py"), *words, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_called_score(tmp_path):
    done = python(str(ROOT / "eval.py"), "score", "--out", "score", "--tasks", "absent.jsonl", cwd=tmp_path)
    assert f"eval.py: {tmp_path}/absent.jsonl" in done.stderr
