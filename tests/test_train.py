"""train.py: rows, steps, loss, resuming, the command line. Traps are those of TRAPS.md, by their numbers.

All runs are a few steps of a random two-layer backbone with the embedded tokenizer and rows, mostly within this process.
"""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data.settings import given  # noqa: E402
from model import ModelConfig, Transformer, generator, load_model, load_tokenizer  # noqa: E402
from talan import group_of, load_adapter  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SHORT = {"tasks": ("none",), "rank": 4, "slots": 2, "width": 8, "step_tokens": 512, "dev_rows": 8, "steps": 4, "device": "cpu", "log_every": 0}
FILES = ("adapter_model.safetensors", "talan.safetensors", "train_state.safetensors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """model: a folder with the embedded config (made smaller) and tokenizer and random weights; rows: 62 embedded rows."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "model").mkdir()
    for file in (ROOT / "data/tiny/model").glob("*.json"):
        shutil.copy(file, folder / "model")
    config = json.loads((folder / "model/config.json").read_text()) | SMALL
    (folder / "model/config.json").write_text(json.dumps(config))
    model = Transformer(ModelConfig.from_dir(folder / "model"))
    model.init_weights(0)
    weights = {name: p.detach() * 3 + 0.1 * torch.randn(p.shape, generator=generator("test", name)) for name, p in model.named_parameters()}
    save_file(weights, folder / "model/model.safetensors", metadata={"format": "pt"})
    lines = (ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[::130]))
    return SimpleNamespace(folder=folder, model=str(folder / "model"), rows=str(folder / "rows.jsonl"), tokenizer=load_tokenizer(folder / "model"))


@pytest.fixture(autouse=True)
def signals():
    """A run takes over Ctrl-C: give it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def flags(tiny, out, **changes):
    """The settings of a short run."""
    return {"backbone": tiny.model, "data": (tiny.rows,), "out": str(out), **SHORT, **changes}


def start(tiny, out, **changes):
    """Do such a run; returns its folder."""
    train.main(flags(tiny, out, **changes))
    return Path(out)


def command(values):
    """Settings as a command line."""
    texts = {"--" + k.replace("_", "-"): v for k, v in values.items()}
    parts = [[flag] if v is True else [flag, ",".join(v) if isinstance(v, tuple) else str(v)] for flag, v in texts.items()]
    return [word for part in parts for word in part]


def python(*args, **options):
    """Run this Python on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, **options)


def metrics(run):
    """metrics.jsonl without what may differ between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        for name in ("out", "resume"):
            line.get("settings", {}).pop(name, None)
    return lines


def assert_same_weights(a, b, files=FILES):
    """Every tensor of these files bit-equal in two run folders."""
    for file in files:
        one, two = load_file(a / file), load_file(b / file)
        assert set(one) == set(two)
        assert [name for name in one if not torch.equal(one[name], two[name])] == [], file


def contents(folder):
    """Path -> bytes of everything under a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def perturb(monkeypatch):
    """Let build_model return trainable parameters away from their start, where half the gradients are zero."""
    build = train.build_model

    def shaken(settings, device):
        model = build(settings, device)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=generator("perturb", name))
        return model

    monkeypatch.setattr(train, "build_model", shaken)


def record(monkeypatch):
    """Catch the gradients of every step, before clipping, and the ids of every micro-batch that is trained on."""
    caught, norm, make = SimpleNamespace(gradients=[], batches=[]), torch.nn.utils.get_total_norm, train.make_batch

    def norm_and_keep(gradients, *args):
        caught.gradients.append([g.clone() for g in gradients])
        return norm(gradients, *args)

    def make_and_keep(rows, device):
        if torch.is_grad_enabled():  # else it is a held-out one
            caught.batches.append([row.ids for row in rows])
        return make(rows, device)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm_and_keep)
    monkeypatch.setattr(train, "make_batch", make_and_keep)
    return caught


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("changes", [{}, {"adapter": "dora", "mixer": "mlp", "writeback": "bounded"},
                                     {"scope": "full", "adapter": "none", "talan": False, "dtype": "float32"}])
def test_trap_1_micro_batches_give_the_gradients_of_the_whole_step(tiny, tmp_path, monkeypatch, changes):
    perturb(monkeypatch)
    caught = record(monkeypatch)
    whole = start(tiny, tmp_path / "whole", steps=1, step_tokens=1600, clip=0.0, **changes)
    assert len(caught.batches) == 1
    parts = start(tiny, tmp_path / "parts", steps=1, step_tokens=1600, micro_tokens=400, clip=0.0, **changes)
    assert len(caught.batches) >= 4 and len({sum(map(len, rows)) for rows in caught.batches}) > 2  # micro-batches of different sizes
    assert metrics(whole)[2]["supervised"] == metrics(parts)[2]["supervised"]
    assert metrics(whole)[2]["loss"] == pytest.approx(metrics(parts)[2]["loss"], rel=3e-7)  # a float32 sum
    for one, two in zip(*caught.gradients, strict=True):
        assert one.norm() > 0 and (one - two).norm() <= 3e-6 * one.norm().clamp_min(1)  # float32 summed in another order


def test_trap_1_eight_rows_equal_four_times_two(tiny, monkeypatch):
    """The same by hand, on the functions and all in float64: sum of the losses over the number of labels in all four."""
    settings = train.Settings(**flags(tiny, ""))
    perturb(monkeypatch)
    model = train.build_model(settings, torch.device("cpu")).double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    rows = sorted(train.load_rows((tiny.rows,), tiny.tokenizer, settings)[0], key=lambda row: len(row.ids))[::8]
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for size in (8, 2):
        batches = [train.make_batch(rows[i:i + size], "cpu") for i in range(0, 8, size)]
        total = sum(train.loss_sum(model, batch, model) for batch in batches)
        gradients.append(torch.autograd.grad(total / sum(len(batch.targets) for batch in batches), trainable))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows, vocabulary", [(1, 3), (7, 11), (5000, 4096)])  # the last in two chunks
def test_cross_entropy_and_its_gradients_equal_pytorch(rows, vocabulary):
    g = generator("cross-entropy")
    hidden, weight = torch.randn(rows, 4, generator=g), torch.randn(vocabulary, 4, generator=g)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = train.CrossEntropySum.apply(a, b, targets, True)
    (0.25 * loss).backward()
    x, y = hidden.double().requires_grad_(), weight.double().requires_grad_()
    want = F.cross_entropy(x @ y.T, targets, reduction="sum")
    (0.25 * want).backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(a.grad.double(), x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_a_frozen_head_and_without_gradients():
    hidden, weight, targets = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.arange(5)
    train.CrossEntropySum.apply(hidden, weight, targets, True).backward()
    assert hidden.grad.abs().max() > 0 and weight.grad is None
    with torch.no_grad():
        assert train.CrossEntropySum.apply(hidden, weight, targets, False).item() == pytest.approx(
            F.cross_entropy(hidden @ weight.T, targets, reduction="sum").item(), rel=1e-5)


def test_cross_entropy_in_bfloat16_is_summed_in_float32():
    g = generator("bf16")
    hidden, weight = (torch.randn(n, 16, generator=g).bfloat16() for n in (300, 50))
    targets = torch.randint(0, 50, (300,), generator=g)
    a, x = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    loss, want = train.CrossEntropySum.apply(a, weight, targets, True), F.cross_entropy(x @ weight.float().T, targets, reduction="sum")
    loss.backward()
    want.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=1e-3)  # a bfloat16 sum would be off by 4e-3
    assert a.grad.dtype == torch.bfloat16 and F.cosine_similarity(a.grad.float().flatten(), x.grad.flatten(), dim=0) > 0.9999


# ---------------------------------------------------------------- the order of the rows


LENGTHS = torch.randint(5, 120, (400,), generator=generator("lengths")).tolist()


@pytest.mark.parametrize("step, micro", [(512, 0), (512, 130), (120, 120), (10_000, 777)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_once_an_epoch_within_the_budgets(step, micro, epoch):
    plan = train.plan_epoch(LENGTHS, step, micro, 0, epoch)
    assert sorted(n for groups in plan for rows in groups for n in rows) == list(range(len(LENGTHS)))
    for groups in plan:
        assert all(rows and len(rows) * max(LENGTHS[n] for n in rows) <= (micro or step) for rows in groups)
        assert sum(map(len, groups)) * max(LENGTHS[n] for rows in groups for n in rows) <= step
    assert [[n for rows in groups for n in rows] for groups in plan] == [groups[0] for groups in train.plan_epoch(LENGTHS, step, 0, 0, epoch)]


def test_trap_15_the_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    plans = [train.plan_epoch(LENGTHS, 512, 128, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    torch.manual_seed(2)
    assert plans == [train.plan_epoch(LENGTHS, 512, 128, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    settings = train.Settings(step_tokens=512, micro_tokens=128)
    steps = train.plan_steps(LENGTHS, settings, 128)
    assert [next(steps) for _ in range(len(plans[0]) + len(plans[1]))] == plans[0] + plans[1]


def test_a_row_longer_than_the_budget_goes_alone():
    assert train.pack([0, 1, 2, 3], [3, 9, 4, 4], 8) == [[0], [1], [2, 3]]


def test_epochs_count_steps(tiny, tmp_path):
    run = start(tiny, tmp_path / "run", steps=0, epochs=1.5, eval_every=0)
    rows = train.split_dev(train.load_rows((tiny.rows,), tiny.tokenizer, train.Settings(**SHORT))[0], train.Settings(**SHORT))[0]
    epoch = len(train.plan_epoch([len(row.ids) for row in rows], 512, 0, 0, 0))
    assert metrics(run)[-1]["step"] == round(1.5 * epoch) > epoch


# ---------------------------------------------------------------- resuming


RESUMED = {"steps": 8, "save_every": 2, "eval_every": 4, "dropout": 0.1}
DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train
write = train.Metrics.write
def write_and_stop(self, **values):
    write(self, **values)
    if values["kind"] == "step" and values["step"] == 5:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
train.Metrics.write = write_and_stop
train.main(train.given(train.Settings, sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """Eight steps in one go."""
    return start(tiny, tmp_path_factory.mktemp("resume") / "whole", **RESUMED)


@pytest.mark.parametrize("name, code, kept", [("SIGKILL", -9, 4), ("SIGINT", 130, 5)])
def test_resuming_a_stopped_run_gives_the_uninterrupted_one(tiny, tmp_path, uninterrupted, name, code, kept):
    run, words = tmp_path / "run", command(flags(tiny, tmp_path / "run", **RESUMED))
    stopped = python("-c", DRIVER, str(ROOT), name, *words)
    assert stopped.returncode == code, stopped.stderr
    assert [p.name for p in run.glob("step-*")] == [f"step-{kept:07d}"]
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"kind": "step", "st')  # a line that the end cut short
    if name == "SIGKILL":
        (run / ".step-0000006.99.tmp").mkdir()  # and a checkpoint
        again = python(str(ROOT / "train.py"), *words, "--resume")
        assert again.returncode == 0, again.stderr
    else:
        start(tiny, run, resume=True, **RESUMED)
    assert_finished(run, uninterrupted)


def assert_finished(run, whole):
    """The run is complete and equal to one that was never stopped."""
    assert_same_weights(run, whole)
    assert metrics(run) == metrics(whole)
    assert [line["step"] for line in metrics(run) if line["kind"] == "step"] == list(range(1, 9))
    assert contents(run).keys() == contents(whole).keys()


def test_resuming_a_finished_run_changes_nothing(tiny, uninterrupted):
    before = contents(uninterrupted)
    start(tiny, uninterrupted, resume=True, **RESUMED)
    assert contents(uninterrupted) == before


class Stopped(Exception):
    """Stands for the end of the process."""


def stop(*_):
    raise Stopped


def stop_at(monkeypatch, step):
    """Raise Stopped once metrics.jsonl has this step."""
    write = train.Metrics.write

    def write_and_stop(self, **values):
        write(self, **values)
        if values["kind"] == "step" and values["step"] == step:
            stop()

    monkeypatch.setattr(train.Metrics, "write", write_and_stop)


def interrupted(tiny, monkeypatch, run, step, **changes):
    """A run that ends after `step` and is resumed."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        start(tiny, run, **changes)
    return start(tiny, run, resume=True, **changes)


def test_resuming_a_run_stopped_before_its_first_checkpoint(tiny, tmp_path, monkeypatch, uninterrupted):
    run = interrupted(tiny, monkeypatch, tmp_path / "run", 1, **RESUMED)
    assert_finished(run, uninterrupted)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("step", [1, 8])
def test_a_signal_saves_and_ends_with_130_unless_all_is_done(tiny, tmp_path, monkeypatch, uninterrupted, name, step):
    run, write = tmp_path / "run", train.Metrics.write
    with monkeypatch.context() as patch:
        patch.setattr(train.Metrics, "write", lambda self, **values: (
            write(self, **values), values["kind"] == "step" and values["step"] == step and signal.raise_signal(getattr(signal, name))))
        try:
            start(tiny, run, **RESUMED)
            assert step == 8
        except SystemExit as end:
            assert (end.code, step) == (130, 1)
            assert (run / "step-0000001").is_dir()
    assert_finished(start(tiny, run, resume=True, **RESUMED), uninterrupted)


@pytest.mark.parametrize("changes", [
    {"grad_scale": 0.0}, {"scope": "talan", "adapter": "none"}, {"scope": "writeback", "mixer": "mlp", "site": "attention", "layers": ("0", "1")},
    {"scope": "adapter", "talan": False, "adapter": "dora"}, {"scope": "full", "adapter": "none", "talan": False, "dtype": "float32"},
    {"dtype": "bfloat16", "micro_tokens": 200, "weight_decay": 0.1},
], ids=lambda changes: " ".join(map(str, changes.values())))
def test_every_kind_of_run_resumes(tiny, tmp_path, monkeypatch, changes):
    whole = start(tiny, tmp_path / "whole", save_every=2, **changes)
    run = interrupted(tiny, monkeypatch, tmp_path / "run", 3, save_every=2, **changes)
    assert metrics(run) == metrics(whole)
    assert_same_weights(run, whole, [p.name for p in whole.glob("*.safetensors")])


def test_a_run_killed_between_its_last_checkpoint_and_the_removal_of_the_one_before(tiny, tmp_path, monkeypatch):
    whole, run = start(tiny, tmp_path / "whole", save_every=2), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "remove_folder", stop)
        start(tiny, run, save_every=2)
    assert len(list(run.glob("step-*"))) == 2
    start(tiny, run, save_every=2, resume=True)
    assert contents(run).keys() == contents(whole).keys()  # no step folder is left, which would count as the newest state
    assert_same_weights(run, whole)


def test_trap_resuming_does_not_replay_the_first_batches(tiny, tmp_path, monkeypatch):
    caught = record(monkeypatch)
    interrupted(tiny, monkeypatch, tmp_path / "run", 3, save_every=2)
    one, two, three, again, four = caught.batches  # step 3 was lost, and done again
    assert three == again and len({str(rows) for rows in (one, two, three, four)}) == 4


def test_a_second_interrupt_stops_at_once(capsys):
    interrupt = train.Interrupt()
    signal.raise_signal(signal.SIGINT)
    assert interrupt.asked and "saving" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_after_training_an_interrupt_is_an_interrupt_again(tiny, tmp_path):
    """Scoring follows: Ctrl-C must end it, not wait for a step that never comes."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    start(tiny, tmp_path / "run", steps=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_checkpoint_of_another_format_or_model_is_refused(tiny, tmp_path):
    run = start(tiny, tmp_path / "run", steps=1)
    (run / "train_state.json").write_text('{"format": 9, "step": 1}')
    with pytest.raises(ValueError, match="format 9"):
        start(tiny, run, steps=1, resume=True)
    (run / "train_state.json").write_text('{"format": 1, "step": 1}')
    state = load_file(run / "train_state.safetensors")
    state.pop("exp_avg.model.layers.0.mlp.up_proj.lora_B")
    save_file(state, run / "train_state.safetensors")
    with pytest.raises(ValueError, match=r"exp_avg.model.layers.0.mlp.up_proj.lora_B"):
        start(tiny, run, steps=1, resume=True)


# ---------------------------------------------------------------- what must change nothing


def test_trap_15_evaluation_during_training_changes_nothing(tiny, tmp_path):
    torch.manual_seed(5)
    often = start(tiny, tmp_path / "often", eval_every=1, dropout=0.2)
    torch.manual_seed(6)
    never = start(tiny, tmp_path / "never", eval_every=0, dropout=0.2)
    assert_same_weights(often, never)
    assert [m for m in metrics(often) if m["kind"] == "step"] == [m for m in metrics(never) if m["kind"] == "step"]
    assert [m["step"] for m in metrics(often) if m["kind"] == "dev"] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in metrics(never) if m["kind"] == "dev"] == [0, 4]


def test_matched_pair_with_and_without_side_path_starts_alike(tiny, tmp_path, monkeypatch):
    """Same start of the adapter, same rows in the same order, same dropout: losses bit-equal until the side path has moved."""
    caught, starts, halves = record(monkeypatch), [], []
    build = train.build_model

    def build_and_keep(settings, device):
        model = build(settings, device)
        starts.append({name: p.clone() for name, p in model.named_parameters() if group_of(name) == "adapter"})
        return model

    monkeypatch.setattr(train, "build_model", build_and_keep)
    for name in ("talan", "plain"):
        run = start(tiny, tmp_path / name, dropout=0.2, talan=name == "talan")
        halves.append((caught.batches.copy(), metrics(run)))
        caught.batches.clear()
    assert starts[0].keys() == starts[1].keys() and all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    (with_batches, with_metrics), (without_batches, without_metrics) = halves
    assert with_batches == without_batches
    assert [m["loss"] for m in with_metrics[1:3]] == [m["loss"] for m in without_metrics[1:3]]  # held-out loss at 0, loss of step 1
    assert with_metrics[3]["loss"] != without_metrics[3]["loss"]


def test_a_side_path_that_does_not_learn_changes_no_adapter(tiny, tmp_path):
    """Four steps with dropout: its zero w_out adds nothing and its forward draws nothing."""
    beside = start(tiny, tmp_path / "beside", scope="adapter", dropout=0.2)
    alone = start(tiny, tmp_path / "alone", scope="adapter", dropout=0.2, talan=False)
    assert_same_weights(beside, alone, ["adapter_model.safetensors", "train_state.safetensors"])


def test_dropout_differs_between_steps_and_seeds_and_is_off_without(tiny, tmp_path, monkeypatch):
    masks, drop = [], F.dropout

    def drop_and_keep(x, p, training):
        out = drop(x, p, training)
        if training and p:
            masks.append(tuple((out[0, 0] != 0).tolist()))
        return out

    monkeypatch.setattr(F, "dropout", drop_and_keep)
    start(tiny, tmp_path / "a", dropout=0.5, targets=("q_proj",), layers=("0",), steps=3)
    first, masks[:] = masks[::2], []  # of layer 0
    start(tiny, tmp_path / "b", dropout=0.5, targets=("q_proj",), layers=("0",), steps=3, seed=1)
    assert len(set(first + masks[::2])) == 6


def test_trap_15_checkpointing_of_blocks_changes_nothing(tiny, tmp_path):
    runs = [start(tiny, tmp_path / str(on), checkpointing=on, dropout=0.2, steps=2) for on in (True, False)]
    assert_same_weights(*runs)


def test_seeds_differ(tiny, tmp_path):
    one, two = (load_file(start(tiny, tmp_path / str(seed), steps=1, seed=seed) / "talan.safetensors") for seed in (0, 1))
    assert all(not torch.equal(one[name], two[name]) for name in one if not name.endswith("gate"))


# ---------------------------------------------------------------- rows


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
GOOD = json.dumps({"messages": CHAT}).encode()


@pytest.mark.parametrize("line", [
    {"messages": CHAT}, {"prompt": "hi", "completion": "yo"}, {"question": "hi", "answer": "yo"},
    {"question": "hi", "answer": "<<2+2=4>>yo<<a/b=c>>", "id": 3}, {"prompt": "hi", "completion": "yo", "answer": "4", "task": "math"},
])
def test_three_formats(line):
    assert train.parse_row(json.dumps(line).encode(), "here:1") == CHAT


def test_calculator_marks_go_from_gsm8k_alone():
    gsm8k = {"question": "How many? <<1>>", "answer": "48/2 = <<48/2=24>>24 clips. 1 << 2 < 3 >> 1\n#### 24"}
    assert train.parse_row(json.dumps(gsm8k).encode(), "")[1]["content"] == "48/2 = 24 clips. 1 << 2 < 3 >> 1\n#### 24"
    assert train.parse_row(json.dumps(gsm8k).encode(), "")[0]["content"] == "How many? <<1>>"
    assert train.parse_row(b'{"prompt": "a", "completion": "1 <<2>> 3"}', "")[1]["content"] == "1 <<2>> 3"


@pytest.mark.parametrize("text", [
    GOOD + b"\n" + GOOD, b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n", b"\n \n" + GOOD + b"\n\n\t\n" + GOOD + b"\n\n",
    GOOD + b"\r\n\r\n" + GOOD + b"\r\n", GOOD + b"\n" + json.dumps({"messages": CHAT, "note": "a\u2028b\x0cc"}, ensure_ascii=False).encode(),
], ids=["no_newline_at_the_end", "bom", "blank_lines", "crlf", "unicode_line_separators"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_as_they_come(tmp_path, text, ending):
    file = tmp_path / f"rows.jsonl{ending}"
    file.write_bytes(gzip.compress(text) if ending else text)
    rows = list(train.read_rows(file))
    assert [messages for _, messages in rows] == [CHAT, CHAT]
    for where, _ in rows:  # the line is the file's own, blank ones counted
        assert json.loads(text.split(b"\n")[int(where.removeprefix(f"{file}:")) - 1].decode("utf-8-sig"))["messages"] == CHAT


BAD = {
    "bad_json": b'{"messages": [', "two_objects": GOOD + GOOD, "not_utf8": b'{"prompt": "\xff", "completion": "b"}', "list": b'["messages"]',
    "text": b'"messages"', "null": b"null", "number": b"7", "no_keys": b"{}", "half_the_keys": b'{"prompt": "a"}',
    "other_half": b'{"answer": "a", "completion": "b"}', "no_messages": b'{"messages": []}', "messages_null": b'{"messages": null}',
    "message_is_text": b'{"messages": ["a"]}', "no_role": b'{"messages": [{"content": "a"}]}', "no_content": b'{"messages": [{"role": "assistant"}]}',
    "content_null": b'{"messages": [{"role": "assistant", "content": null}]}',
    "role_list": b'{"messages": [{"role": ["assistant"], "content": "a"}]}',
    "content_list": b'{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}',
    "no_assistant": b'{"messages": [{"role": "user", "content": "a"}]}', "unknown_role": GOOD.replace(b"user", b"human"),
    "number_as_completion": b'{"prompt": "a", "completion": 3}', "number_as_answer": b'{"question": "a", "answer": 3}',
    "too_deep": b"[" * 100_000, "endless_integer": b'{"prompt": ' + b"1" * 5000 + b"}",
    "half_a_character": b'{"prompt": "\\ud800", "completion": "b"}', "marking_character": '{"prompt": "a", "completion": "\ue0f0"}'.encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_by_file_and_line(tiny, tmp_path, name):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"\n\n" + BAD[name] + b"\n" + GOOD)
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: "):
        train.load_rows((str(tmp_path / "rows.jsonl"),), tiny.tokenizer, train.Settings())


@pytest.mark.parametrize("kind", ["absent", "folder", "plain text", "cut", "corrupt"])
def test_unreadable_files_are_named(tmp_path, kind):
    file, data = tmp_path / "rows.jsonl.gz", bytearray(gzip.compress(GOOD * 50))
    data[20] ^= 255
    {"absent": lambda: None, "folder": file.mkdir, "plain text": lambda: file.write_bytes(GOOD),
     "cut": lambda: file.write_bytes(gzip.compress(GOOD * 50)[:-9]), "corrupt": lambda: file.write_bytes(data)}[kind]()
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: expected a readable"):
        list(train.read_rows(file))


def test_long_rows_are_dropped_or_cut_and_counted(tiny, tmp_path):
    lines = [{"prompt": "hi", "completion": "7"}, {"prompt": "hi", "completion": "7 " * 60}, {"prompt": "7 " * 60, "completion": "7"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load(**changes):
        return train.load_rows((str(tmp_path / "rows.jsonl"),), tiny.tokenizer, train.Settings(**changes))

    rows, counts = load()
    assert len(rows) == 3 and counts == {"read": 3, "too_long": 0, "truncated": 0, "unlabelled": 0}
    kept, counts = load(max_tokens=50)
    assert kept == rows[:1] and counts == {"read": 3, "too_long": 2, "truncated": 0, "unlabelled": 0}
    cut, counts = load(max_tokens=50, truncate=True)  # the third has nothing left to learn
    assert cut == [rows[0], train.Row(rows[1].ids[:50], rows[1].supervised[:50])]
    assert counts == {"read": 3, "too_long": 0, "truncated": 2, "unlabelled": 1}
    assert load(max_tokens=len(rows[0].ids))[0] == rows[:1]  # just fits
    for budget in ({"step_tokens": 50}, {"micro_tokens": 50}, {"step_tokens": 50, "micro_tokens": 500}):
        assert load(**budget)[0] == rows[:1]  # a row must fit into a micro-batch, and into a step
    with pytest.raises(ValueError, match="no usable row.*'too_long': 3"):
        load(max_tokens=3)


def test_held_out_rows_are_drawn_once_and_not_trained_on(tiny, tmp_path, monkeypatch):
    rows = train.load_rows((tiny.rows,), tiny.tokenizer, train.Settings())[0]
    kept, dev = train.split_dev(rows, train.Settings(dev_rows=8))
    assert len(dev) == 8 and len(kept) == len(rows) - 8 and {tuple(r.ids) for r in kept}.isdisjoint(tuple(r.ids) for r in dev)
    assert train.split_dev(rows, train.Settings(dev_rows=8, adapter="dora", steps=9)) == (kept, dev)
    for count in (0, len(rows)):
        with pytest.raises(ValueError, match="dev_rows"):
            train.split_dev(rows, train.Settings(dev_rows=count))
    losses = [start(tiny, tmp_path / name, steps=1, **more) for name, more in (("all", {"dev_data": (tiny.rows,)}), ("held", {}))]
    model = load_model(tiny.model)
    for run, part in zip(losses, (rows, dev)):
        assert metrics(run)[1]["loss"] == pytest.approx(slow_loss(model, part), rel=1e-5)


@torch.no_grad()
def slow_loss(model, rows):
    """Mean cross-entropy over the supervised tokens, a row and a token at a time."""
    losses = []
    for row in rows:
        scores = model.logits(model(torch.tensor([row.ids])))[0].log_softmax(-1)
        losses += [-scores[t - 1, row.ids[t]].item() for t in range(1, len(row.ids)) if row.supervised[t]]
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- the command line and the run folder


def test_dry_run_prints_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(tiny.folder)
    train.main(flags(tiny, "", dry_run=True))
    train.main(flags(tiny, tmp_path / "run", dry_run=True))
    assert list(tmp_path.iterdir()) == [] and contents(tiny.folder) == before
    out = capsys.readouterr().out
    for text in ('"rank": 4', "trainable adapter", "trainable side path", "rows: 62 read, 0 too long", "supervised (", "steps an epoch"):
        assert text in out
    batch = out.split("supervised tokens in [[ ]]:\n")[1].split("\nbackbone ")[0].strip().split("\n---\n")
    assert len(batch) > 1
    for text in batch:
        assert text.count("[[") == text.count("]]") == 1
        assert "<|im_start|>assistant\n[[" in text and text.rstrip().endswith("<|im_end|>]]")


def test_counts_of_both_kinds_of_rows_are_printed(tiny, tmp_path, capsys):
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps({"prompt": "hi", "completion": "7 " * n}) + "\n" for n in (1, 60)))
    train.main(flags(tiny, "", dry_run=True, dev_data=(str(tmp_path / "dev.jsonl"),), max_tokens=100))
    out = capsys.readouterr().out
    assert "\nrows: 62 read, " in out and "\nheld-out rows: 2 read, 1 too long, 0 truncated, 0 unlabelled\n" in out


def test_a_misspelt_flag_names_the_nearest():
    with pytest.raises(SystemExit, match="--dropuot.*did you mean --dropout"):
        given(train.Settings, ["--dropuot", "0.1"])
    with pytest.raises(SystemExit, match="argument --rank"):
        given(train.Settings, ["--rank", "four"])
    with pytest.raises(SystemExit):
        given(train.Settings, ["--drop", "0.1"])  # no abbreviations
    assert given(train.Settings, ["--layers", "0,1", "--no-talan", "--lr", "1e-4"]) == {"layers": ("0", "1"), "talan": False, "lr": 1e-4}


def test_help_names_every_flag_and_needs_no_torch():
    done = python("-X", "importtime", str(ROOT / "train.py"), "--help")
    assert done.returncode == 0 and not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
    assert [name for name in train.Settings.__dataclass_fields__ if "--" + name.replace("_", "-") not in done.stdout] == []


def test_an_existing_run_folder_is_refused(tiny, tmp_path):
    run = start(tiny, tmp_path / "run", steps=1)
    before = contents(run)
    with pytest.raises(ValueError, match="exists; --resume goes on with it"):
        start(tiny, run, steps=1)
    with pytest.raises(ValueError, match="cannot resume with other settings") as error:
        start(tiny, run, steps=2, seed=7, resume=True)
    assert "steps: this command says 2, the run has 1" in str(error.value) and "seed: this command says 7, the run has 0" in str(error.value)
    assert "rank" not in str(error.value) and contents(run) == before
    start(tiny, run, steps=1, seed=7, overwrite=True)
    assert contents(run).keys() == before.keys() and json.loads((run / "settings.json").read_text())["seed"] == 7
    assert metrics(run)[0]["settings"]["seed"] == 7


def test_overwrite_refuses_what_is_no_run(tiny, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    before = contents(tmp_path)
    for name in ("thesis", "file"):
        for more in ({}, {"overwrite": True}):
            with pytest.raises(ValueError, match=name):
                start(tiny, tmp_path / name, **more)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mistake", [{"site": "nowhere"}, {"data": ("absent.jsonl",)}, {"backbone": "absent"}, {"dev_rows": 62}, {"rank": 999},
                                     {"layers": ("first",)}, {"dtype": "float8"}, {"mixer": "bogus", "talan": False}, {"slots": -3, "talan": False},
                                     {"alpha": 0.0, "adapter": "none"}], ids=lambda m: next(iter(m)))
def test_a_mistake_on_the_command_line_costs_nothing(tiny, tmp_path, mistake):
    """It makes no run folder, and with --overwrite it leaves the old run as it was."""
    with pytest.raises(ValueError):
        start(tiny, tmp_path / "new", **mistake)
    assert not (tmp_path / "new").exists()
    run = tmp_path / "old"
    run.mkdir()
    (run / "settings.json").write_text(json.dumps(train.asdict(train.Settings())))
    with pytest.raises(ValueError):
        start(tiny, run, overwrite=True, **mistake)
    assert (run / "settings.json").exists()


@pytest.mark.parametrize("wrong, message", [
    ({"warmup": 1.5}, "--warmup: expected a share, at most 1, found 1.5"), ({"min_lr": 1.01}, "--min-lr: expected a share, at most 1, found 1.01"),
    ({"resume": True, "overwrite": True}, "--resume goes on with the run that --overwrite deletes")], ids=lambda value: str(value)[:12])
def test_settings_that_are_refused(wrong, message):
    assert train.Settings(warmup=1.0, min_lr=1.0).warmup == 1
    with pytest.raises(ValueError, match=message):
        train.Settings(**wrong)


@pytest.fixture
def raced(tiny, monkeypatch):
    """Start a run while another start into the same folder, with seed 1, loads its model; what that one raises is raised."""
    build = train.build_model

    def race(out):
        def other_first(*args):
            monkeypatch.setattr(train, "build_model", build)
            start(tiny, out, steps=1)
            return build(*args)

        monkeypatch.setattr(train, "build_model", other_first)
        start(tiny, out, steps=1, seed=1)

    return race


def test_of_two_starts_into_one_folder_the_slower_is_refused(raced, tmp_path):
    with pytest.raises(ValueError, match="run: exists; --resume goes on with it"):
        raced(tmp_path / "run")
    assert [line["kind"] for line in metrics(tmp_path / "run")] == ["run", "dev", "step", "dev"] and not list((tmp_path / "run").glob(".*"))
    assert json.loads((tmp_path / "run/settings.json").read_text())["seed"] == 0 == metrics(tmp_path / "run")[0]["settings"]["seed"]


def test_of_two_starts_without_out_the_slower_takes_another_number(raced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raced("")
    assert [metrics(tmp_path / "runs" / name)[0]["settings"]["seed"] for name in ("1", "2")] == [0, 1]


def test_a_file_system_without_links_will_do(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    assert (start(tiny, tmp_path / "run", steps=1) / "train_state.json").exists()


def test_scoring_begins_without_the_trained_model_and_its_errors_are_its_own(tiny, tmp_path, monkeypatch):
    built, left, build = [], [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: (model := build(*args), built.append(weakref.ref(model)))[0])

    def fail(settings):
        left.append(built[0]())
        raise OSError("no answer")

    monkeypatch.setattr(train, "score", fail)
    with pytest.raises(OSError, match="^no answer$"):
        start(tiny, tmp_path / "run", steps=1, tasks=("math",))
    assert left == [None] and (tmp_path / "run/train_state.json").exists()


def test_without_out_the_next_free_number_is_taken(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2"):
        start(tiny, "", steps=1)
        assert (tmp_path / "runs" / name / "metrics.jsonl").exists()


# ---------------------------------------------------------------- optimizer and precision


@pytest.mark.parametrize("warmup, steps, table", [
    (0.2, 10, {1: 0.5, 2: 1.0, 3: 0.96574579, 4: 0.86819805, 6: 0.55, 8: 0.23180195, 10: 0.1}),  # 0.1 + 0.45 (1 + cos(pi (step - 2) / 8))
    (0.0, 3, {1: 1.0, 2: 0.55, 3: 0.1}), (0.5, 1, {1: 1.0}), (1.0, 4, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}),
])
def test_learning_rate_table(warmup, steps, table):
    settings = train.Settings(lr=2.0, min_lr=0.1, warmup=warmup)
    assert {step: train.learning_rate(step, steps, settings) / 2 for step in table} == pytest.approx(table)


def test_the_side_path_has_its_own_rate(tiny, tmp_path, monkeypatch):
    made, build = [], train.build_optimizer
    monkeypatch.setattr(train, "build_optimizer", lambda model, settings: made.append((model, build(model, settings))) or made[-1][1])
    run = start(tiny, tmp_path / "run", talan_lr_scale=3.0, steps=2)
    model, optimizer = made[0]
    names = {id(p): group_of(name) for name, p in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    rate = [m["lr"] for m in metrics(run) if m["kind"] == "step"][-1]
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx({"adapter": rate, "side path": 3 * rate})
    members = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert len(members) == 2 and sum(members) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_gradients_are_clipped_to_the_global_norm(tiny, tmp_path, monkeypatch):
    """With clip far below the norm, Adam's first moment after one step is 0.1 times the clipped gradient."""
    run = start(tiny, tmp_path / "run", steps=1, clip=1e-3)
    moments = [v for k, v in load_file(run / "train_state.safetensors").items() if k.startswith("exp_avg.")]
    assert metrics(run)[2]["grad_norm"] > 0.01
    assert math.sqrt(sum(m.square().sum().item() for m in moments)) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_trap_10_adapters_over_a_bfloat16_backbone_are_float32_and_move(tiny, tmp_path, monkeypatch):
    made, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: made.append(build(*args)) or made[-1])
    run = start(tiny, tmp_path / "run", dtype="bfloat16", lr=1e-4, warmup=0.0, steps=4)
    model = made[0]
    assert {group_of(n): p.dtype for n, p in model.named_parameters()} == {
        "backbone": torch.bfloat16, "adapter": torch.float32, "side path": torch.float32}
    state = load_file(run / "train_state.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float32}
    fresh = dict(build(train.Settings(**flags(tiny, "", dtype="bfloat16")), torch.device("cpu")).named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, fresh[name]) != p.requires_grad, name  # what trains has moved, the backbone has not
    A = "model.layers.0.mlp.up_proj.lora_A"
    moved = state[f"parameter.{A}"] != fresh[A]
    kept = state[f"parameter.{A}"].bfloat16() == fresh[A].bfloat16()
    assert moved.float().mean() > 0.9 and kept.float().mean() > 0.5  # most of these steps would be lost in bfloat16


# ---------------------------------------------------------------- scope full


FULL = {"scope": "full", "adapter": "none", "talan": False, "dtype": "float32"}


def test_scope_full_writes_a_hugging_face_folder(tiny, tmp_path):
    run = start(tiny, tmp_path / "run", **FULL)
    tokens = torch.randint(0, 640, (2, 30), generator=generator("tokens"))
    ours = load_model(run)
    with torch.no_grad():
        logits = ours.logits(ours(tokens))
        assert (logits - (base := load_model(tiny.model)).logits(base(tokens))).abs().max() > 1e-3
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(run)(tokens).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(run).encode("7 * 8") == tiny.tokenizer.encode("7 * 8")
    again = start(tiny, tmp_path / "again", backbone=str(run), steps=1)  # and it is a backbone like any other
    assert metrics(again)[1]["loss"] == pytest.approx(metrics(run)[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("change", [{"adapter": "lora"}, {"adapter": "dora", "talan": True}], ids=str)
def test_scope_full_with_an_adapter_saves_both(tiny, tmp_path, change):
    """The folder is a backbone and, beside it, what was trained with it; scored from the folder alone it is one model."""
    run = start(tiny, tmp_path / "run", **FULL | change)
    model = load_model(run)
    assert not torch.equal(model.head_weight, load_model(tiny.model).head_weight)
    load_adapter(model, run)
    state = load_file(run / "train_state.safetensors")
    assert all(torch.equal(p, state[f"parameter.{name}"]) for name, p in model.named_parameters())
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(run)


def test_scope_full_in_bf16_is_refused_before_the_first_step(tiny, tmp_path):
    with pytest.raises(ValueError, match="scope full"):
        start(tiny, tmp_path / "run", **FULL | {"dtype": "bfloat16"})
    assert not (tmp_path / "run/metrics.jsonl").exists()


# ---------------------------------------------------------------- compile


@pytest.mark.slow
def test_compile_agrees_with_eager(tiny, tmp_path, monkeypatch):
    perturb(monkeypatch)
    compiled, eager = (start(tiny, tmp_path / str(on), compile=on, steps=2) for on in (True, False))
    for a, b in zip(metrics(compiled)[2:], metrics(eager)[2:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    a, b = load_file(compiled / "talan.safetensors"), load_file(eager / "talan.safetensors")
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4
