"""tests/bench.py: both sides compute the same, turns, ratios, targets, FLOPs, the command. No test asserts a duration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench
from bench import Failed, Ours, Ratio, Settings, Target, Theirs, Worker
from bench import check_same, find_targets, in_turns, make_batch_ids, make_prompts, ratio, train_flops

needs_peft = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.lora_bias=True")
SMALL = dict(lengths=(24,), tokens=96, prompts=9, batch_rows=4, new_tokens=12, rank=4, rounds=1)


@pytest.fixture
def sides(tiny_checkpoint):
    """make(kind, **settings) -> (theirs, ours), prepared in this process."""
    pytest.importorskip("peft")

    def make(kind, tmp_path, family="qwen3", **changes):
        settings, folder = Settings(**SMALL | changes), str(tiny_checkpoint(family))
        both = Theirs(settings, folder), Ours(settings, folder)
        for side in both:
            side.prepare(kind, str(tmp_path))
        return both
    return make


@needs_peft
@pytest.mark.parametrize("family, kind", [("qwen3", "lora"), ("qwen3", "dora"), ("llama", "rslora")])
def test_both_sides_take_the_same_steps(family, kind, sides, tmp_path):
    theirs, ours = sides(kind, tmp_path, family, dtype="float32")
    for n in range(3):  # after a step the weights are equal only if both optimizers moved them alike
        a, b = theirs.step(n, 24), ours.step(n, 24)
        check_same(a, b, "float32")
    assert {p.dtype for p in theirs.trainable} == {torch.float32}
    with pytest.raises(ValueError, match="not the same computation"):
        check_same(a, ours.step(0, 24), "float32")


@needs_peft
def test_bfloat16_sides_agree_and_the_side_path_is_switched(sides, tmp_path):
    theirs, ours = sides("lora", tmp_path)
    check_same(theirs.step(0, 24), ours.step(0, 24), "bfloat16")
    path = ours.paths[0][1]
    assert not path.w_out.any()  # no step moved it while it was off
    ours.step(1, 24, side=True)
    moved = path.w_out.clone()
    assert moved.any()
    ours.step(2, 24)
    assert torch.equal(path.w_out, moved)


@needs_peft
def test_the_prepared_step_moves_nothing(sides, tmp_path):
    theirs, ours = sides("dora", tmp_path, dtype="float32")
    before = [p.clone() for p in ours.trainable]
    ours.ready()
    assert all(map(torch.equal, before, ours.trainable)) and all(ours.optimizer.state[p]["exp_avg"].any() == 0 for p in ours.trainable)
    assert sum(p.numel() for p in theirs.trainable) == sum(p.numel() for p in ours.trainable) - sum(p.numel() for p in ours.paths[0][1].parameters())


@needs_peft
def test_answers_are_the_same_and_as_long_as_asked(sides, tmp_path):
    theirs, ours = sides("none", tmp_path, dtype="float32")
    a, b = theirs.generate(0), ours.generate(0)
    assert a["rows"] == b["rows"] and len(set(map(len, a["rows"]))) > 2
    assert ours.decode_bytes() == 4 * (sum(p.numel() for p in theirs.model.parameters()) - theirs.model.model.embed_tokens.weight.numel())


def test_what_is_asked_of_both():
    settings = Settings(**SMALL)
    rows, supervised = make_batch_ids(settings, 97, 24, 0)
    assert len(rows) == 4 and {len(row) for row in rows} == {24} and supervised == [False] * 9 + [True] * 15
    assert make_batch_ids(settings, 97, 24, 0)[0] == rows != make_batch_ids(settings, 97, 24, 1)[0]
    prompts, stops = make_prompts(settings, 97)
    assert [len(p) for p in prompts] == sorted(len(p) for p in prompts) and len(stops) == 9 and 4 <= min(stops) and max(stops) <= 12
    assert [Settings().shape(T) for T in (256, 1024, 4096)] == [(8, 5), (2, 2), (1, 1)] and Settings(rounds=1).shape(4096) == (1, 1)


def test_flops_are_those_that_torch_counts(tiny_checkpoint):
    """Without an adapter, every token but the first supervised; the causal half of what the MATH kernel multiplies is taken off."""
    from model import ModelConfig, Transformer
    from talan import AdapterConfig, attach

    model, T, ids = Transformer(ModelConfig.from_dir(tiny_checkpoint("qwen3"))), 24, torch.zeros(1, 24, dtype=torch.int64)
    model.requires_grad_(False)
    h = model.model.embed_tokens(ids).requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = h
        for block in model.model.layers:
            y = block(y, model.context(ids, None, None))
        model.logits(model.model.norm(y)[:, 1:]).sum().backward()
    attach(model, AdapterConfig(rank=4))
    adapter = 6 * T * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    causal = 3 * 6 * T * T * 4 * 16  # layers, 12 T^2 H Dh halved
    config = json.loads((tiny_checkpoint("qwen3") / "config.json").read_text())
    assert counter.get_total_flops() - causal + adapter == train_flops(config, Settings(**SMALL | {"tokens": T, "supervised": 1.0}), T)


def test_turns_alternate_and_failures_of_memory_or_compiling_are_left_out(capsys):
    asked = []

    def call(name, error=None):
        def answer(n):
            asked.append((n, name))
            if error:
                raise Failed(error)
            return {"n": n}
        return answer

    records = in_turns({"a": call("a"), "b": call("b", "torch.OutOfMemoryError: 3 GiB"), "b compiled": call("c", "no compiler"), "d": call("d")}, 2)
    assert asked == [(0, "a"), (0, "b"), (0, "c"), (0, "d"), (1, "d"), (1, "a"), (2, "a"), (2, "d")]
    assert records == {"a": [{"n": 0}, {"n": 1}, {"n": 2}], "d": [{"n": 0}, {"n": 1}, {"n": 2}]} and "b is left out" in capsys.readouterr().out
    with pytest.raises(Failed):
        in_turns({"a": call("a", "ValueError: wrong")}, 1)


def test_ratios_are_paired():
    assert ratio([2, 40, 6], [1, 10, 3]) == Ratio(2, 2, pytest.approx(3.8))
    assert ratio(3, 2) == (1.5, 1.5, 1.5) and str(ratio(3, 2)) == "1.50 (1.50 to 1.50)" and str(ratio(1.01, 1)) == "1.010 (1.010 to 1.010)"


@pytest.mark.parametrize("sign, value, met", [(">=", 2.0, True), (">=", 1.99, False), ("<=", 2.0, True), ("<=", 2.01, False)])
def test_marks(sign, value, met):
    target = Target("speed", sign, 2, ratio(value, 1))
    assert target.met() is met and (": met, " if met else ": not met, ") in str(target)


def test_targets_are_judged_by_what_was_measured():
    settings = Settings()
    assert {t.met() for t in find_targets("x", {}, settings)} == {None} and len(find_targets("x", {}, settings)) == 11
    case = lambda kind, ours, **more: {"kind": kind, "length": 256, "peak_bytes": {"theirs": 10, "ours": 4}, "flops": 1e12,
                                       "seconds": {"theirs": [9, 9], "ours": [ours, ours], "ours + side path": [1.02 * ours] * 2, **more}}
    side = {"inference": {1: {"prefill": [1.01, 1.01], "decode": [1.05, 1.03]}, 8: {"prefill": [1.0, 1.0], "decode": [1.0, 1.0]}},
            "scaling": [{"tokens": 512, "train": 1.0, "state_bytes": 8}, {"tokens": 16384, "train": 64.0, "state_bytes": 8}]}
    entry = {"train": [case("lora", 4, **{"theirs compiled": [6, 6], "ours compiled": [3, 3]}), case("dora", 3)], "side": side,
             "load": {"theirs": {"seconds": [2]}, "ours": {"seconds": [1]}},
             "generate": {"seconds": {"theirs": [10], "ours": [5]}, "bytes_a_token": 8e9, "single": {"ours": {"decode": [0.0025]}}},
             "machine": {"flops": 0.5e12, "bytes": 4e12}}
    values = lambda name, settings: [(round(t.ratio.value, 2), t.met()) for t in find_targets(name, entry, settings)]
    expected = [(2.25, True), (2.0, False), (3.0, True), (0.4, True), (2.0, False), (0.5, True), (1.02, True), (1.01, True), (1.04, False),
                (2.0, False), (1.0, True)]
    assert values("Qwen3-4B", settings) == expected and values("Qwen3-0.6B", Settings(device="cuda")) == expected
    assert values("Qwen3-4B", Settings(device="cuda")) == expected + [(0.67, True), (0.8, True)]


def test_a_worker_answers_and_names_its_errors(tiny_checkpoint):
    worker = Worker("ours", Settings(**SMALL), str(tiny_checkpoint("qwen3")))
    try:
        assert worker.ask("load")["peak_bytes"] > 0
        with pytest.raises(Failed, match="(?s)ours: generate: .*AttributeError"):  # nothing is prepared
            worker.ask("generate", 0)
        assert worker.ask("load")["seconds"] > 0
    finally:
        worker.close()
    assert worker.process.exitcode == 0


def command(*flags):
    return subprocess.run([sys.executable, "tests/bench.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


def test_the_command(tiny_checkpoint, tmp_path):
    done = command("--backbones", tiny_checkpoint("qwen3"), "--parts", "side", "--rounds", "1", "--out", tmp_path)
    assert done.returncode == 0 and "bytes kept" in done.stdout and done.stdout.count("not measured") == 7, done.stderr
    (entry,) = json.loads((tmp_path / "bench.json").read_text())["backbones"].values()
    assert [line["tokens"] for line in entry["side"]["scaling"]] == list(bench.SIDE_LENGTHS) and len(entry["targets"]) == 11


@pytest.mark.parametrize("flags, message", [
    ("--parts nothing", "parts: expected some of"), ("--lengths x", "lengths: expected whole"), ("--device cuda --clock cpu", "clock: cpu would"),
    ("--backbones nowhere", "nowhere: no such folder")])
def test_wrong_settings_are_named(flags, message, tmp_path):
    done = command("--out", tmp_path, *flags.split())
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_shape_becomes_a_folder_that_loads(tmp_path, monkeypatch):
    from model import load_model

    shapes = tmp_path / "data"
    shapes.mkdir()
    small = dict(model_type="qwen3", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                 intermediate_size=48, vocab_size=64, tie_word_embeddings=True)
    (shapes / "shapes.json").write_text(json.dumps({"small": small}))
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    folder = bench.make_backbone("small", Settings(out=str(tmp_path)))
    model = load_model(folder)
    assert model.head_weight.dtype == torch.bfloat16 and model.head_weight.detach().float().std() == pytest.approx(0.02, rel=0.1)
    assert bench.make_backbone("small", Settings(out=str(tmp_path))) == folder
