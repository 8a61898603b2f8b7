"""Benchmarks: rows made from sources of our own, the exact prompts, likelihoods with a shared prefix, pass@k, and whole runs on them."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
from data.plus import mbpp_inputs  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from model import ModelConfig, Transformer, load_model, load_tokenizer  # noqa: E402
from talan import AdapterConfig, TalanConfig, attach  # noqa: E402

TINY = str(ROOT / "data/tiny/model")


TWICE = 'def twice(x):\n    """Two times x."""\n'


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SOURCES = {
    "gsm8k": {split: lines({"question": f"{name} has 2 hats and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5 hats.\n#### 5"},
                           {"question": "How far?", "answer": "It is $<<1000*2=2000>>2,000.\n#### 2,000"})
              for split, name in (("train", "Ann"), ("test", "Bea"))},
    "svamp": {"test": json.dumps([
        {"ID": "chal-1", "Body": "Dan has 1200000 pens ", "Question": "How many pens?", "Equation": "( ( 1200000.0 + 10.05 ) - 2.0 )",
         "Answer": 1200008.05, "Type": "Addition"},
        {"ID": "chal-2", "Body": "He sold 3.", "Question": "How many?", "Equation": "8.0", "Answer": 8.0, "Type": "Addition"}]).encode()},
    "arc_easy": {split: lines({"id": f"{split}-1", "question": {"stem": "Which is hot?", "choices": [
        {"text": "ice", "label": "1"}, {"text": "a fire", "label": "2"}, {"text": "snow", "label": "3"}]}, "answerKey": "2"})
        for split in ("train", "dev", "test")},
    "mmlu_stem": {f"{split}/{subject}": f'" Is {subject} good?",no,"yes, it is",maybe,never,B\r\n'.encode()
                  for split in ("dev", "test") for subject in ("high_school_sums", "stars")},
    "math500": {"test": lines({"problem": "Halve $1$.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}", "subject": "Algebra",
                               "unique_id": "a/1"})},
    "humaneval": {
        "test": lines({"task_id": "HumanEval/0", "prompt": TWICE, "canonical_solution": "    return 2 * x\n",
                       "entry_point": "twice", "test": "\ndef check(candidate):\n    assert candidate(3) == 6\n"}),
        "plus": lines({"task_id": "HumanEval/0", "prompt": TWICE, "canonical_solution": "    return x + x\n",
                       "entry_point": "twice", "base_input": [[3]], "plus_input": [[-1], [0.1]], "atol": 0})},
    "mbpp": {"all": lines(*({"task_id": i, "text": f"Write task {i}.", "code": f"def f{i}(x):\r\n    return x + {i}", "test_setup_code": "y = 1\r\n",
                             "test_list": [f"assert f{i}(y) == {i + 1}", f"assert f{i}(0) == {i}"]} for i in range(1, 975))),
             "plus": lines(*({"task_id": f"Mbpp/{i}", "prompt": f'"""\nWrite plus {i}.\nassert g(1) == (2,)\n"""\n', "entry_point": "g",
                              "canonical_solution": "\ndef g(x):\n    return (x + 1,)\n", "base_input": [[1]], "plus_input": {}, "atol": 0,
                              "assertion": "\nassert g(1) == (2,)\n"} for i in (9, 12, 601)))},
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return {name: TASKS[name].convert(files) for name, files in SOURCES.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


# ---------------------------------------------------------------- rows


def test_every_benchmark_has_a_case():
    assert set(SOURCES) | {"arc_challenge", "mbpp_plus"} | {"math", "word", "science", "code"} == set(TASKS)


def test_gsm8k_rows_lose_their_calculator_marks(rows):
    assert rows["gsm8k"]["test"] == [
        {"id": "test-0", "prompt": "Question: Bea has 2 hats and buys 3. How many?\nAnswer:", "completion": "2 + 3 = 5 hats.\n#### 5", "answer": "5"},
        {"id": "test-1", "prompt": "Question: How far?\nAnswer:", "completion": "It is $2,000.\n#### 2,000", "answer": "2,000"}]


def test_svamp_rows(rows):
    first, second = rows["svamp"]["test"]
    assert first["prompt"] == "Question: Dan has 1200000 pens. How many pens?\nAnswer:"
    assert first["completion"] == "( 1200000 + 10.05 ) - 2 = 1200008.05\n#### 1200008.05" and first["answer"] == "1200008.05"
    assert second["prompt"] == "Question: He sold 3. How many?\nAnswer:" and second["completion"] == "8 = 8\n#### 8"


def test_choice_rows(rows):
    assert rows["arc_easy"]["test"] == [{"id": "test-1", "prompt": "Question: Which is hot?\nAnswer:", "completion": "a fire", "answer": "B",
                                         "choices": ["ice", "a fire", "snow"]}]
    row = rows["mmlu_stem"]["test"][1]
    assert row["prompt"] == "Is stars good?\nA. no\nB. yes, it is\nC. maybe\nD. never\nAnswer:"
    assert (row["id"], row["answer"], row["completion"], row["choices"]) == ("stars/0", "B", "B", ["A", "B", "C", "D"])


def test_mmlu_lines_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="stars/1: expected question"):
        TASKS["mmlu_stem"].convert({"test/stars": b"q,a,b,c,d,A\nq,a,b,c,A\n"})


def test_code_rows(rows):
    row = rows["humaneval"]["test"][0]
    assert row["tests"].endswith("\ncheck(twice)") and row["completion"].endswith("Two times x.\"\"\"\n\n    return 2 * x\n```")
    sizes = {name: len(split) for name, split in rows["mbpp"].items()}
    assert sizes == {"prompt": 10, "test": 500, "validation": 90, "train": 374, "shots": 3, "plus": 1}
    assert [row["id"] for row in rows["mbpp"]["shots"]] == ["Mbpp/2", "Mbpp/3", "Mbpp/4"]
    row = rows["mbpp"]["test"][0]
    assert (row["id"], row["code"], "\r" in json.dumps(row)) == ("Mbpp/11", "def f11(x):\n    return x + 11", False)
    assert row["tests"] == "y = 1\n\nassert f11(y) == 12\nassert f11(0) == 11"
    assert rows["mbpp"]["plus"][0]["id"] == "Mbpp/12"  # 9 and 601 are no test tasks


def test_plus_tests_of_another_task_are_refused():
    wrong = SOURCES["humaneval"]["plus"].replace(b"HumanEval/0", b"HumanEval/1")
    with pytest.raises(ValueError, match="HumanEval/0.*HumanEval/1"):
        TASKS["humaneval"].convert({**SOURCES["humaneval"], "plus": wrong})


@pytest.mark.parametrize("task_id, args, want", [
    (1, [[1, [2]]], [[1, [2]]]), (2, [[1], [2, 3]], [(1,), (2, 3)]), (63, [[[1, 2], [3]]], [[(1, 2), (3,)]]),
    (75, [[[1], [2]], 6], [[(1,), (2,)], 6]),
    (106, [[1], [2]], [[1], (2,)]), (115, [[[1, 1], [], {}]], [[{1}, {}, {}]]), (124, ["1.5", "2j"], [1.5, 2j]), (252, ["1+2j"], [1 + 2j]),
    (307, [[1, [2]], 3, 4], [(1, [2]), 3, 4]), (259, [[[1, 2], [3]]], [((1, 2), (3,))]), (278, [[1, [2, 3]]], [(1, (2, 3))]),
    (580, [[1, [2, [3]]]], [(1, (2, (3,)))]), (722, [{"a": [1, 2]}, 3], [{"a": (1, 2)}, 3]),
])
def test_json_lists_become_the_tuples_of_mbpp_plus(task_id, args, want):
    assert repr(mbpp_inputs(task_id, [args])) == repr([want])


@pytest.mark.parametrize("body, right", [
    ("return 2 * x", True), ("return x + x + 1e-8 * isinstance(x, float)", True), ("return x + x + 1e-8", False), ("return str(2 * x)", False),
    ("return 2 * x if x != -1 else 0", False), ("return 2.0 * x", True), ("return x + x + 1e-3 * isinstance(x, float)", False)])
def test_plus_tests_compare_with_the_reference(rows, body, right):
    """Exact, or within 1e-6 where the reference answers in floats."""
    program = f"def twice(x):\n    {body}\n" + rows["humaneval"]["test"][0]["plus_tests"]
    if right:
        exec(program, {})
    else:
        with pytest.raises(AssertionError, match="twice"):
            exec(program, {})


# ---------------------------------------------------------------- prompts


def ask(name, item, shots=(), form="plain", tokenizer=None):
    return evaluation.ask(TASKS[name], item, shots, form, tokenizer)


def test_plain_prompts(rows):
    gsm8k = ask("gsm8k", rows["gsm8k"]["test"][0], rows["gsm8k"]["train"][:1])
    assert gsm8k.text == ("Question: Ann has 2 hats and buys 3. How many?\nAnswer: 2 + 3 = 5 hats.\n#### 5\n\n"
                          "Question: Bea has 2 hats and buys 3. How many?\nAnswer:")
    assert gsm8k.replies == [" 2 + 3 = 5 hats.\n#### 5"]
    arc = ask("arc_easy", rows["arc_easy"]["test"][0], rows["arc_easy"]["train"])
    assert arc.text == "Question: Which is hot?\nAnswer: a fire\n\nQuestion: Which is hot?\nAnswer:" and arc.replies == [" ice", " a fire", " snow"]
    mmlu = ask("mmlu_stem", rows["mmlu_stem"]["test"][0], rows["mmlu_stem"]["dev"][:1])
    question = "Is high_school_sums good?\nA. no\nB. yes, it is\nC. maybe\nD. never\nAnswer:"
    assert mmlu.text == f"The following are multiple choice questions (with answers) about high school sums.\n\n{question} B\n\n{question}"
    assert mmlu.replies == [" A", " B", " C", " D"]
    mbpp = ask("mbpp", rows["mbpp"]["test"][0], rows["mbpp"]["shots"][:1])
    tests = "Your code should pass these tests:\n\nassert f{0}({1}) == {2}\nassert f{0}(0) == {0}\n[BEGIN]\n"
    assert mbpp.text == ("You are an expert Python programmer, and here is your task: Write task 2. " + tests.format(2, "y", 3)
                         + "def f2(x):\n    return x + 2\n[DONE]\n\n"
                         "You are an expert Python programmer, and here is your task: Write task 11. " + tests.format(11, "y", 12))
    assert mbpp.replies == ["def f11(x):\n    return x + 11"]
    assert ask("humaneval", rows["humaneval"]["test"][0]).text == rows["humaneval"]["test"][0]["prompt"]


def test_chat_prompts_have_shots_as_turns(rows, tokenizer):
    found = ask("gsm8k", rows["gsm8k"]["test"][0], rows["gsm8k"]["train"][:1], "chat", tokenizer)
    question = "Question: {} has 2 hats and buys 3. How many?\nAnswer:"
    want = [{"role": "user", "content": question.format("Ann")}, {"role": "assistant", "content": "2 + 3 = 5 hats.\n#### 5"},
            {"role": "user", "content": question.format("Bea")}]
    assert found.text == tokenizer.render(want, add_generation_prompt=True) and found.replies == ["2 + 3 = 5 hats.\n#### 5"]
    mmlu = ask("mmlu_stem", rows["mmlu_stem"]["test"][1], [], "chat", tokenizer)
    assert mmlu.replies == ["A", "B", "C", "D"]
    assert "The following are multiple choice questions (with answers) about stars.\n\nIs stars good?" in mmlu.text


def test_code_replies_in_a_chat_are_begun_for_the_model(rows, tokenizer):
    row = rows["humaneval"]["test"][0]
    found = ask("humaneval", row, [], "chat", tokenizer)
    user = f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{row['prompt']}\n```\n"
    assert found.text == (tokenizer.render([{"role": "user", "content": user}], add_generation_prompt=True)
                          + f"Here is the completed function:\n```python\n{row['prompt']}\n")
    assert found.replies == ["    return 2 * x\n```"]
    found = ask("mbpp", rows["mbpp"]["test"][0], [], "chat", tokenizer)
    assert found.text.endswith("```python\n") and found.replies == ["def f11(x):\n    return x + 11\n```"]


def test_every_completion_goes_on_from_the_chat_s_beginning(rows):
    """Training rows are the replies that scoring asks for."""
    for name, splits in rows.items():
        for row in itertools.chain(*splits.values()):
            assert row["completion"].startswith(TASKS[name].chat(row)[1]), name


def test_examples_are_of_the_item_s_subject(rows):
    task, item = TASKS["mmlu_stem"], rows["mmlu_stem"]["test"][1]
    assert [shot["id"] for shot in evaluation.load_shots(task, item, rows["mmlu_stem"]["dev"], 1)] == ["stars/0"]
    with pytest.raises(ValueError, match="expected 2 examples for stars/0, found 1"):
        evaluation.load_shots(task, item, rows["mmlu_stem"]["dev"], 2)
    with pytest.raises(ValueError, match="svamp: there are no rows to take examples from"):
        evaluation.load_pool(TASKS["svamp"])


def test_messages_have_no_plain_form(tokenizer):
    item = {"id": "7", "messages": [{"role": "user", "content": "a"}], "answer": "b"}
    task = evaluation.own("mine", "mine.jsonl")
    assert evaluation.ask(task, item, [], "chat", tokenizer) == evaluation.Prompt(tokenizer.render(item["messages"], add_generation_prompt=True), [])
    with pytest.raises(ValueError, match="mine: 7 .*--format chat"):
        evaluation.ask(task, item, [], "plain", tokenizer)


def test_trap_5_plain_text_gets_the_bos_that_the_tokenizer_adds():
    """It is found once, and what is encoded has none."""
    tokenizer = load_tokenizer(ROOT / "tests/golden/tokenizers/llama3")
    bos = tokenizer.encode("<|begin_of_text|>")
    assert list(tokenizer.begin) == bos and len(bos) == 1 and bos[0] not in tokenizer.encode("a")


@pytest.mark.parametrize("form, expected", [("plain", 1), ("chat", 0)])
def test_trap_5_the_bos_is_read_in_plain_text_alone(bench, form, expected, monkeypatch):
    """A chat template writes its own."""
    import model

    read, bos, load = [], 5, model.load_tokenizer
    monkeypatch.setattr(model, "load_tokenizer", lambda path: replace(load(path), begin=(bos,)))
    spied = lambda right: lambda *a, **b: read.append(a[1]) or right(*a, **b)  # noqa: E731
    for owner, name in ((model, "generate"), (evaluation, "log_likelihoods")):
        monkeypatch.setattr(owner, name, spied(getattr(owner, name)))
    score(bench / "out", tasks=("arc_easy", "gsm8k"), format=form, max_new_tokens=2, limit=3)
    likely, asked = [prefix for parts in read[:2] for prefix, _ in parts], read[-1]
    assert len(read) == 3 and all((row[0] == bos) == expected and row.count(bos) == expected for row in [*likely, *asked])


# ---------------------------------------------------------------- likelihoods


@pytest.fixture(scope="module")
def model():
    """A random model with an adapter and a side path that both do something."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = replace(ModelConfig.from_dir(TINY), **shape)
    model = Transformer(config)
    model.init_weights(0)
    attach(model, AdapterConfig(kind="dora", rank=4), TalanConfig(layers=(1,), slots=4, width=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def slow(model, prefix, reply):
    """Token by token, each from a full forward pass of all before it; float64 sums."""
    total = 0.0
    for t, token in enumerate(reply):
        logits = model.logits(model(torch.tensor([prefix + reply[:t]]))[0, -1]).double()
        total += float(logits[token] - logits.logsumexp(0))
    return total


ITEMS = [([5, 6, 7], [[8], [9, 10, 11], [9]]), ([1], [[2, 3], [3, 2]]), (list(range(40, 70)), [[5, 6], [7] * 20]), ([3, 3], []),
         ([9, 9, 9, 9], [[4]])]


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 10_000])
def test_likelihoods_equal_those_of_full_passes(model, batch_tokens):
    found = evaluation.log_likelihoods(model, ITEMS, batch_tokens)
    with torch.no_grad():
        want = [[slow(model, prefix, reply) for reply in replies] for prefix, replies in ITEMS]
    assert [len(f) for f in found] == [len(w) for w in want]
    for f, w in zip(found, want):
        assert f == pytest.approx(w, abs=2e-5)


def test_logits_are_made_in_chunks(model, monkeypatch):
    whole = evaluation.log_likelihoods(model, ITEMS)
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    seen, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda h: seen.append(len(h)) or logits(h))
    for chunked, at_once in zip(evaluation.log_likelihoods(model, ITEMS), whole):
        assert chunked == pytest.approx(at_once, abs=1e-5)
    assert max(seen) == 3


def test_scoring_leaves_the_model_s_mode(model):
    model.train()
    evaluation.log_likelihoods(model, ITEMS[:1])
    assert model.training
    model.eval()


@pytest.mark.parametrize("item", [([], [[1]]), ([1], [[]]), ([1], [[2], []])])
def test_empty_parts_are_refused(model, item):
    with pytest.raises(ValueError, match="at least one token"):
        evaluation.log_likelihoods(model, [item])


def test_trap_4_the_prompt_s_last_tokens_may_merge_with_a_reply():
    """encode joins "b" + "c" -> one token: what all replies share ends before the b."""
    def encode(text):
        return [ord(c) for c in text.replace("bc", "X")]

    prefix, replies = evaluation.split_replies(evaluation.Prompt("aab", ["c", "d"]), encode)
    assert prefix == [97, 97] and replies == [[ord("X")], [98, 100]]
    assert evaluation.split_replies(evaluation.Prompt("aab", ["d", "de"]), encode) == ([97, 97, 98], [[100], [100, 101]])
    for prompt in (evaluation.Prompt("aab", ["", "d"]), evaluation.Prompt("b", ["c", "d"])):
        with pytest.raises(ValueError, match="at least one token"):
            evaluation.split_replies(prompt, encode)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluation.pass_at(k, n, c) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_several_samples_are_averaged_by_item():
    rows = [{"task": "t", "id": str(i), "verdicts": {"answer": i < 2 and s < 2 - i}, "extracted": {"answer": "x"}, "truncated": False}
            for i in range(4) for s in range(2)]
    found = evaluation.summarize(rows, [1, 2])["t"]  # 2, 1, 0, 0 right of 2
    means = [1, 0.5, 0, 0]
    half = 1.96 * math.sqrt(sum((m - 0.375) ** 2 for m in means) / 3 / 4)
    assert (found["n"], found["samples"], found["score"], found["pass@1"], found["pass@2"]) == (4, 2, 37.5, 37.5, 50)
    assert found["interval95"] == pytest.approx([0, 100 * (0.375 + half)], abs=0.01)


@pytest.mark.parametrize("values, message", [({"samples": 3}, "samples"), ({"format": "chatty"}, "format"), ({"pass_at": ("2",)}, "pass_at"),
                                             ({"pass_at": ("x",)}, "pass_at"), ({"limit": -1, "shots": -1}, "limit.*\n.*shots"),
                                             ({"seconds": 0}, "seconds"), ({"seconds": math.inf}, "seconds")])
def test_settings_out_of_range_are_listed(values, message):
    with pytest.raises(ValueError, match=message):
        evaluation.Settings(**values)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def bench(rows, tmp_path, monkeypatch):
    """Every benchmark's rows in a folder, and its task reading them."""
    for name, splits in rows.items():
        (tmp_path / name).mkdir()
        for split, each in splits.items():
            (tmp_path / name / f"{split}.jsonl").write_bytes(lines(*each[:5]))
    monkeypatch.setattr("data.task.HERE", tmp_path)
    return tmp_path


def score(out, **values):
    evaluation.score(evaluation.Settings(device="cpu", out=str(out), **values))
    records = [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    return records, json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_all_benchmarks_run_and_rescore(bench, form, capsys):
    names = ("gsm8k", "svamp", "arc_easy", "mmlu_stem", "math500", "humaneval", "mbpp", "mbpp_plus")
    records, results = score(bench / "out", tasks=names, format=form, max_new_tokens=24, allow_code_execution=True, limit=2)
    assert set(results["tasks"]) == set(names) and results["dtype"] == "float32" and results["run_seed"] is None
    for name, found in results["tasks"].items():
        mine = [r for r in records if r["task"] == name]
        assert found["n"] == len(mine) > 0 and all(r["reference_logprob"] < 0 < r["reference_tokens"] for r in mine)
        per_token = sum(r["reference_logprob"] for r in mine) / sum(r["reference_tokens"] for r in mine)
        assert found["reference_logprob_per_token"] == pytest.approx(per_token) and len(found["data_sha256"]) == len(found["prompt_sha256"]) == 64
    assert set(results["tasks"]["gsm8k"]["rules"]) == {"flexible", "strict"} and set(results["tasks"]["arc_easy"]["rules"]) == {"acc", "acc_norm"}
    assert set(results["tasks"]["humaneval"]["rules"]) == {"base", "plus"} and set(results["tasks"]["mbpp"]["rules"]) == {"base"}
    capsys.readouterr()
    evaluation.rescore(evaluation.Settings(rescore=str(bench / "out/records.jsonl"), allow_code_execution=True, limit=1, out="o", workers=2))
    printed = capsys.readouterr()
    assert f"{len(records)} records, 0 verdicts changed" in printed.out
    assert printed.err.endswith("without effect on --rescore, which judges all that is recorded: out, limit\n")


def test_choice_verdicts_follow_from_the_recorded_likelihoods(bench):
    records, _ = score(bench / "out", tasks=("mmlu_stem", "arc_easy"), format="plain")
    for r in records:
        best = max(range(len(r["choices"])), key=lambda i: r["logprobs"][i])
        norm = max(range(len(r["choices"])), key=lambda i: r["logprobs"][i] / len(r["choices"][i]))
        assert r["verdicts"] == {"acc": "ABCD"[best] == r["answer"], "acc_norm": "ABCD"[norm] == r["answer"]} and r["correct"] == r["verdicts"]["acc"]
        assert r["reference_logprob"] == r["logprobs"]["ABCD".index(r["answer"])]
    model, tokenizer = load_model(TINY, dtype=torch.float32), load_tokenizer(TINY)
    with torch.no_grad():
        found = slow(model, tokenizer.encode(records[0]["prompt"]), tokenizer.encode(" B"))
    assert records[0]["logprobs"][1] == pytest.approx(found, abs=1e-4)


def test_an_interrupted_run_goes_on_after_its_finished_tasks(bench, monkeypatch):
    """The same command finds them; another one, or changed rows, does not."""
    values = {"tasks": ("arc_easy", "gsm8k"), "max_new_tokens": 6}
    want, _ = score(bench / "whole", **values)
    ran, run_task = [], evaluation.run_task

    def stop(task, *args):
        ran.append(task.name)
        if task.name == "gsm8k" and len(ran) == 2:
            raise KeyboardInterrupt
        return run_task(task, *args)

    monkeypatch.setattr(evaluation, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        score(bench / "out", **values)
    assert not (bench / "out/records.jsonl").exists()
    assert score(bench / "out", **values)[0] == want and ran == ["arc_easy", "gsm8k", "gsm8k"]
    assert sorted(p.name for p in (bench / "out").iterdir()) == ["records.jsonl", "results.json"]
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        score(bench / "out", **values)
    score(bench / "out", **{**values, "shots": 1})
    assert ran == ["arc_easy", "gsm8k", "arc_easy", "gsm8k"]


def test_programs_do_not_run_unasked(bench):
    with pytest.raises(ValueError, match="humaneval, mbpp: .*--allow-code-execution"):
        score(bench / "out", tasks=("humaneval", "gsm8k", "mbpp"))
    assert not (bench / "out").exists()
    records, _ = score(bench / "out", tasks=("humaneval",), max_new_tokens=4, allow_code_execution=True)
    with pytest.raises(ValueError, match="humaneval: .*--allow-code-execution"):
        evaluation.rescore(evaluation.Settings(rescore=str(bench / "out/records.jsonl")))


def test_reference_solutions_pass_and_wrong_ones_say_why(bench, rows):
    settings = evaluation.Settings()
    for name, split in (("humaneval", "test"), ("mbpp", "test"), ("mbpp_plus", "plus")):
        items = rows["mbpp" if "mbpp" in name else name][split][:3]
        for form in ("chat", "plain"):
            good = [{"task": name, "id": row["id"], "format": form, "completion": row["code"] + "\n```" * (form == "chat")} for row in items]
            judged = evaluation.run_tests(TASKS[name], good, items, settings)
            assert all(all(r["verdicts"].values()) and r["correct"] for r in judged), judged
        bad = [{**record, "completion": record["completion"].replace("return", "return 0 *")} for record in good]
        for record in evaluation.run_tests(TASKS[name], bad, items, settings):
            assert not any(record["verdicts"].values()) and "AssertionError" in record["why"]["base"]


def test_plus_counts_on_top_of_base(rows):
    """A program that fails the base tests has not passed plus, whatever the plus tests say."""
    row = {**rows["humaneval"]["test"][0], "tests": "assert False"}
    record = {"task": "humaneval", "id": row["id"], "format": "chat", "completion": row["code"]}
    assert evaluation.run_tests(TASKS["humaneval"], [record], [row], evaluation.Settings())[0]["verdicts"] == {"base": False, "plus": False}


def test_what_the_sandbox_lacks_is_said_once(bench, monkeypatch, capsys):
    monkeypatch.setattr("data.sandbox.missing_protections", lambda: ["no moat: a program can swim"])
    evaluation.say_protections.cache_clear()
    evaluation.check_references(evaluation.Settings(tasks=("humaneval", "mbpp"), allow_code_execution=True, limit=1))
    assert capsys.readouterr().out.count("sandbox: no moat: a program can swim\n") == 1
    evaluation.say_protections.cache_clear()


def test_reference_solutions_can_be_scored_without_a_model(bench, capsys):
    names = ("gsm8k", "svamp", "math500", "humaneval", "mbpp", "mbpp_plus")
    found = evaluation.check_references(evaluation.Settings(tasks=names, allow_code_execution=True, limit=40))
    assert {name: s["score"] for name, s in found.items()} == dict.fromkeys(names, 100) and "humaneval base" in capsys.readouterr().out
    assert {rule: r["score"] for rule, r in found["humaneval"]["rules"].items()} == {"base": 100, "plus": 100}
    for tasks, message in ((("mbpp",), "--allow-code-execution"), (("arc_easy", "gsm8k", "mmlu_stem"), "arc_easy, mmlu_stem: ")):
        with pytest.raises(ValueError, match=message):
            evaluation.check_references(evaluation.Settings(tasks=tasks))


def test_an_absent_file_names_the_command_that_prepares_it(bench):
    (bench / "gsm8k/test.jsonl").unlink()
    with pytest.raises(ValueError, match="python data/prepare.py gsm8k"):
        score(bench / "out", tasks=("gsm8k",))


def test_samples_differ_and_are_seeded(bench):
    values = {"tasks": ("gsm8k",), "samples": 3, "temperature": 1.5, "max_new_tokens": 12, "pass_at": ("1", "3")}
    records, results = score(bench / "out", **values)
    assert [(r["id"], r["sample"]) for r in records] == [(i, s) for i in ("test-0", "test-1") for s in range(3)]
    assert len({r["completion"] for r in records}) > 2 and {"pass@1", "pass@3"} <= set(results["tasks"]["gsm8k"])
    assert score(bench / "out2", **values, batch_rows=2)[0] == records
    again = lambda *ks: evaluation.rescore(evaluation.Settings(rescore=str(bench / "out/records.jsonl"), pass_at=ks))["gsm8k"]  # noqa: E731
    assert again() == again("1", "3") == {k: v for k, v in results["tasks"]["gsm8k"].items() if not k.endswith("sha256")} and "pass@2" in again("2")
    with pytest.raises(ValueError, match="from 1 to the 3 samples"):
        again("4")


def test_plain_completions_end_before_the_first_stop(bench, monkeypatch, tokenizer):
    """Generation ends at a stop text, which is cut off and does not count as truncated."""
    said = tokenizer.encode("It is 5.\n#### 5\n\nQuestion: What")

    def speak(model, prompts, max_new_tokens, *, ended, **_):
        out = []
        for _ in prompts:
            ids = []
            for token in said[:max_new_tokens]:
                ids.append(token)
                if ended(ids):
                    break
            out.append(ids)
        return out

    monkeypatch.setattr("model.generate", speak)
    records, _ = score(bench / "out", tasks=("gsm8k",), format="plain")
    text = "It is 5.\n#### 5\n\n"
    assert [(r["completion"], r["truncated"], r["correct"]) for r in records] == [(text, False, True), (text, False, False)]
    assert tokenizer.decode(said[:records[0]["tokens"]]).endswith("Question:")
    records, _ = score(bench / "out", tasks=("gsm8k",), format="plain", max_new_tokens=4)
    assert all(r["truncated"] for r in records)


@pytest.mark.parametrize("form, text, ends", [
    ("chat", "    return 1\n```", True), ("chat", "\n```python\n    return 1", False), ("chat", "\n```python\n    return 1\n```", True),
    ("plain", "    return 1\n```", False), ("plain", "    return 1\n\nprint", True), ("plain", "\ndef", True)])
def test_code_ends_with_its_block(tokenizer, monkeypatch, form, text, ends):
    seen = {}
    monkeypatch.setattr("model.generate", lambda *args, ended, **_: seen.update(ended=ended) or [])
    evaluation.write_answers(TASKS["humaneval"], [], [], None, tokenizer, evaluation.Settings(format=form))
    assert seen["ended"](tokenizer.encode(text)) == ends


# ---------------------------------------------------------------- rows at once


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_answers_and_the_number_of_rows(tmp_path, dtype):
    """float32: identical whatever the batch; bfloat16: the agreement is printed (pytest -s -k number_of_rows)."""
    texts = []
    for rows, tokens in ((1, 1), (5, 300), (64, 8192)):
        found, _ = score(tmp_path / str(rows), tasks=("math", "code"), limit=24, dtype=dtype, batch_rows=rows, batch_tokens=tokens, reference=False)
        texts.append([r["completion"] for r in found])
    same = [sum(a == b for a, b in zip(texts[0], other)) for other in texts[1:]]
    print(f"\n{dtype}: of {len(texts[0])} greedy answers written one at a time, {same[0]} are the same at 5 rows and {same[1]} at 64")
    assert dtype == "bfloat16" or same == [48, 48]
