"""eval.py overhead: counts against real modules and torch's own counter, the variants' logits, the order of rounds, the ratios, the command.

No test asserts a duration: where time passes, a fake clock says how much.
"""

import json
import math
import random
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import Cache, ModelConfig, Transformer, generator, load_model
from talan import MIXERS, TARGETS, WRITEBACKS, AdapterConfig, SidePath, TalanConfig, attach, save_adapter

import data.overhead as evaluation

IN_PLACE = {torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}  # torch counts addmm, but not this
SHAPES = {  # hidden, layers, heads, key/value heads, head size, MLP, vocabulary, tied, rope theta, eps
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True, 1e6, 1e-6), "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True, 1e6, 1e-6),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151936, True, 1e6, 1e-6), "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, False, 1e6, 1e-6),
    "Llama-3.2-1B": (2048, 16, 32, 8, 64, 8192, 128256, True, 5e5, 1e-5)}
PUBLISHED = {"Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360,
             "Llama-3.2-1B": 1_235_814_400}  # parameters, as the hub counts them
ALL = ["backbone", "backbone + side path", "merged", "merged + side path", "live", "live + side path"]
SMALL = ModelConfig("qwen3", 89, 32, 56, 4, 4, 2, 12, tie_word_embeddings=True)


def small_model(config=SMALL):
    model = Transformer(config)
    model.init_weights(3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() > 1 else 1)  # so that every part matters to the logits
    return model.eval()


def stir(model):
    """Nothing attached may be at its start: w_out and lora_B are zero there."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name or ".side_path." in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator(5, name)))


def attach_stirred(kind="lora", talan=TalanConfig(layers=(1, 2), slots=3, width=6)):  # noqa: B008
    def attach_parts(model):
        attach(model, AdapterConfig(kind, rank=4), talan)
        stir(model)
    return attach_parts


def settings(**values):
    return evaluation.OverheadSettings(**{"batches": (1, 3), "prompt": 5, "steps": 2, "repeats": 4, "seconds": 0.0, "resamples": 300, **values})


# ------------------------------------------------------------------------------------------------------------ counts

def plain_count(shape, rank=16, slots=8, width=64):
    """Parameters of backbone, adapter and one default side path, from the numbers of the shape alone."""
    D, L, H, K, Dh, F, V, tied = shape[:8]
    qwen = shape[8] == 1e6
    pairs = [(D, H * Dh), (D, K * Dh), (D, K * Dh), (H * Dh, D), (D, F), (D, F), (F, D)]
    matrices = L * sum(a * b for a, b in pairs)
    backbone = matrices + V * D * (1 if tied else 2) + L * (2 * D + 2 * Dh * qwen) + D
    return backbone, L * rank * sum(a + b for a, b in pairs), 3 * width * D + slots * (D + width) + D + 1, matrices + V * D


def test_the_built_in_shapes_are_the_published_ones():
    configs = evaluation.read_configs(())
    assert list(configs) == list(SHAPES)
    for name, c in configs.items():
        assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size, c.vocab_size,
                c.tie_word_embeddings, c.rope_theta, c.rms_norm_eps) == SHAPES[name]
        scaling = c.rope_scaling and (c.rope_scaling.factor, c.rope_scaling.low_freq_factor, c.rope_scaling.high_freq_factor,
                                      c.rope_scaling.original_max_position_embeddings)
        assert (c.model_type, scaling) == (("llama", (32, 1, 4, 8192)) if name.startswith("Llama") else ("qwen3", None))


def test_table_of_the_five_shapes(capsys):
    """Parameters and FLOPs from the shapes' numbers; the side path is far below 1 % of every backbone, the whole at rank 8 too."""
    counts = evaluation.overhead(evaluation.OverheadSettings(configs=()))["configs"]
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(SHAPES, lines[1:], strict=True):
        backbone, adapter, side, weights = plain_count(SHAPES[name])
        entry = counts[name]
        assert entry["parameters"] == {"backbone": backbone, "adapter": adapter, "side path": side} and backbone == PUBLISHED[name]
        D, L, H, _, Dh = SHAPES[name][:5]
        assert entry["flops"] == {"backbone": 2 * weights, "attention": 4 * 1024 * H * Dh * L, "adapter": 2 * adapter,
                                  "side path": 2 * (2 * 64 * D + 8 * 64) + 2 * 8 * 65 + 2 * (8 * D + 8 * 64) + 2 * 64 * D + 2 * D}
        assert entry["bytes"]["state of a row"] == 4 * (8 * 64 + 8)
        assert 100 * side / backbone < 0.04 and 100 * plain_count(SHAPES[name], rank=8)[1] / backbone + 0.04 < 1
        assert line.split()[:4] == [name, f"{backbone:,}", f"{adapter:,}", f"{side:,}"]
        assert line.split()[4:7] == [f"{100 * n / backbone:.3f}" for n in (adapter, side, adapter + side)]


def test_flags_change_the_count():
    base, changed = (evaluation.overhead(evaluation.OverheadSettings(configs=(), **flags))["configs"]["Qwen3-0.6B"]
                     for flags in ({}, dict(rank=8, layers=("0.25", "14"), slots=4, width=32, writeback="add", mixer="attention", context=2048)))
    assert changed["parameters"] == {"backbone": 596_049_920, "adapter": base["parameters"]["adapter"] // 2,
                                     "side path": 2 * (4 * 32 * 1024 + 4 * 32)}
    assert changed["flops"]["attention"] == 2 * base["flops"]["attention"] and changed["bytes"]["state of a row"] == 2 * 4 * 4 * 33


@pytest.mark.parametrize("tied", [True, False])
def test_backbone_and_adapter_flops_are_those_of_torch(tied):
    """One prefill of T tokens: the counter sees full T x T attention, so each token attends to T positions."""
    T, config = 8, ModelConfig("llama", 89, 32, 56, 4, 4, 2, 12, tie_word_embeddings=tied)
    model = small_model(config)
    tokens = torch.arange(T)[None]
    for kind, targets in (("none", TARGETS), ("lora", TARGETS), ("rslora", ("q_proj", "down_proj"))):
        variant = small_model(config)
        attach(variant, AdapterConfig(kind, rank=3, targets=targets), None, "full")
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            # the CPU's fused attention is not counted
            variant.logits(variant(tokens))
        flops = evaluation.count(variant, T)["flops"]
        assert counter.get_total_flops() == T * sum(flops.values()) and (flops["adapter"] > 0) == (kind != "none")
    assert evaluation.count(variant, T)["parameters"]["backbone"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mixer, writeback", list(product(MIXERS, WRITEBACKS)))
def test_side_path_flops_are_those_of_torch(mixer, writeback):
    """Its matrix products are counted by torch; memory, the sum over slots and the gate's x . w_gate run as elementwise sums or mat-vec."""
    D, M, r, T = 24, 5, 7, 6
    config = TalanConfig(slots=M, width=r, mixer=mixer, writeback=writeback)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        SidePath(D, config)(torch.randn(1, T, D, generator=generator(0)))
    flops = evaluation.side_flops(config, D)
    assert flops["memory"] == 2 * M * r + 2 * M
    unseen = flops["memory"] + 2 * M * r + (2 * D if writeback == "gate" else 0)
    assert counter.get_total_flops() == T * (sum(flops.values()) - unseen)


@pytest.mark.parametrize("mixer, writeback, kind", [("linear", "gate", "lora"), ("mlp", "bounded", "dora"), ("attention", "add", "none")])
def test_parameters_and_state_are_those_of_the_modules(mixer, writeback, kind):
    model, talan = small_model(), TalanConfig(layers=(0.3, 3), slots=3, width=6, mixer=mixer, writeback=writeback)
    backbone = sum(p.numel() for p in model.parameters())
    attach(model, AdapterConfig(kind, rank=4), talan)
    counts, cache = evaluation.count(model, 9), Cache(SMALL, 1, 4)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache)
    assert counts["parameters"]["backbone"] == backbone
    assert sum(counts["parameters"].values()) == sum(p.numel() for p in model.parameters())
    assert counts["parameters"]["side path"] == sum(p.numel() for b in model.model.layers if b.side_path for p in b.side_path.parameters())
    assert counts["bytes"]["state of a row"] == sum(s.numel() * s.element_size() for state in cache.side.values() for s in state)


def test_configs_of_the_user(tmp_path, capsys):
    raw = json.loads((ROOT / "data/shapes.json").read_text())["Llama-3.2-1B"] | {"num_hidden_layers": 2, "vocab_size": 100}
    for folder in ("a/mine", "b/mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(raw))
    (tmp_path / "two.json").write_text(json.dumps({"x": raw, "y": raw | {"num_hidden_layers": 4}}))
    paths = (str(tmp_path / "a/mine"), str(tmp_path / "b/mine/config.json"), str(tmp_path / "two.json"))
    counts = evaluation.overhead(evaluation.OverheadSettings(configs=paths, out=str(tmp_path / "out")))["configs"]
    assert list(counts) == ["mine", paths[1], "x", "y"] and counts["mine"] == counts["x"]
    assert counts["y"]["parameters"]["adapter"] == 2 * counts["x"]["parameters"]["adapter"]
    assert json.loads((tmp_path / "out/overhead.json").read_text())["configs"] == counts and "wrote" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- variants

def logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_variants_compute_what_their_names_say(kind):
    tokens = torch.randint(89, (2, 7), generator=generator(1))
    bare, both, alone = small_model(), small_model(), small_model()
    attach_stirred(kind)(both)
    attach_stirred(kind, None)(alone)
    variants = evaluation.make_variants(small_model(), attach_stirred(kind))
    out = {name: logits(model, tokens) for name, model in variants.items()}
    assert list(out) == ALL
    assert torch.equal(out["backbone"], logits(bare, tokens)) and torch.equal(out["live"], logits(alone, tokens))
    assert torch.equal(out["live + side path"], logits(both, tokens))
    for end in ("", " + side path"):
        torch.testing.assert_close(out["merged" + end], out["live" + end], atol=1e-4, rtol=0)
    for form in ("backbone", "merged", "live"):
        assert (out[form] - out[form + " + side path"]).abs().max() > 1e-3
    assert (out["backbone"] - out["live"]).abs().max() > 1e-3


def test_variants_share_their_weights():
    """One tensor each, but for the adapted matrices of the two merged variants, which have one copy in common; no plain one has a live adapter."""
    model = small_model()
    start = {name: p for name, p in model.named_parameters()}
    variants = evaluation.make_variants(model, attach_stirred())
    named = {name: dict(v.named_parameters()) for name, v in variants.items()}
    for key, p in start.items():
        merged = any(target in key for target in TARGETS)
        assert all((named[name][key] is p) == (not merged or not name.startswith("merged")) for name in ALL)
        assert named["merged"][key] is named["merged + side path"][key]
    for name, tensors in named.items():
        assert any(".lora_" in key for key in tensors) == name.startswith("live")
        sides = {key: p for key, p in tensors.items() if ".side_path." in key}
        assert bool(sides) == name.endswith("side path") and all(p is named["live + side path"][key] for key, p in sides.items())
    size = evaluation.count(model, 1)["bytes"]
    assert size["merged copy, held here only"] == 4 * sum(p.numel() for key, p in start.items() if any(target in key for target in TARGETS))
    assert size["adapter"] == 4 * sum(p.numel() for key, p in named["live"].items() if ".lora_" in key)
    assert size["side path"] == 4 * sum(p.numel() for key, p in named["live + side path"].items() if ".side_path." in key)
    cache = Cache(SMALL, 3, 11)
    assert size["keys and values of a token"] * 33 == sum(4 * t.numel() for t in cache.keys + cache.values)


def test_the_site_is_kept_and_buffers_are_counted():
    talan = TalanConfig(layers=(1,), site="attention", slots=3, width=6)
    model = small_model()
    variants = evaluation.make_variants(model, attach_stirred("dora", talan))
    both = small_model()
    attach_stirred("dora", talan)(both)
    tokens = torch.tensor([[4, 5, 6]])
    assert torch.equal(logits(variants["live + side path"], tokens), logits(both, tokens))
    side_alone = small_model()
    attach_stirred("none", talan)(side_alone)
    assert torch.equal(logits(variants["backbone + side path"], tokens), logits(side_alone, tokens))
    held = {key: p for key, p in model.named_parameters() if ".lora_" in key}
    rows = sum(p.numel() for key, p in held.items() if key.endswith("magnitude_vector"))  # as many as DoRA's stored squared norms
    assert evaluation.count(model, 1)["bytes"]["adapter"] == 4 * (sum(p.numel() for p in held.values()) + rows)


def test_fewer_parts_fewer_variants():
    assert list(evaluation.make_variants(small_model(), attach_stirred(talan=None))) == ["backbone", "merged", "live"]
    only = lambda model: attach(model, None, TalanConfig(layers=(1,)))
    assert list(evaluation.make_variants(small_model(), only)) == ["backbone", "backbone + side path"]


# -------------------------------------------------------------------------------------------------------------- time

def test_order_of_the_rounds():
    """Complete, the pair of a form together, its first one alternating; the forms in every order, the same for the same seed."""
    rounds = [evaluation.schedule(ALL, n, rng) for rng in [random.Random("0 1")] for n in range(60)]
    again = [evaluation.schedule(ALL, n, rng) for rng in [random.Random("0 1")] for n in range(60)]
    other = [evaluation.schedule(ALL, n, rng) for rng in [random.Random("1 1")] for n in range(60)]
    assert rounds == again != other
    for n, order in enumerate(rounds):
        assert sorted(name for form in order for name in form) == sorted(ALL)
        for form in order:
            plain = form[n % 2]
            assert "side path" not in plain and form[1 - n % 2] == plain + " + side path"
    assert len({tuple(form[n % 2] for form in order) for n, order in enumerate(rounds)}) == 6


class FakeClock:
    """Seconds that pass only in the models: for each call 1 + 100 x the variant's place + 0.01 x tokens a row, half of it in the head."""

    def __init__(self, monkeypatch):
        self.now, self.calls, self.variants = 0.0, [], evaluation.make_variants(small_model(), attach_stirred())
        for i, (name, model) in enumerate(self.variants.items()):
            model.forward, model.logits = self.costly(name, i, model.forward, True), self.costly(name, i, model.logits, False)
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(evaluation.time, name, lambda: self.now)

    def costly(self, name, i, work, first):
        def run(x, *rest):
            self.now += (1 + 100 * i) / 2 + (0.01 * x.shape[1] if first else 0)
            if first:
                self.calls.append((name, tuple(x.shape), rest[0].lengths.tolist(), rest[1].tolist(), x.flatten().tolist()))
            else:
                assert x.shape == (len(self.calls[-1][2]), 32)  # the last position alone
            return work(x, *rest)
        return run


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_every_round_times_every_variant_once(monkeypatch, clock):
    fake = FakeClock(monkeypatch)
    lines = evaluation.measure_batch(fake.variants, 3, settings(clock=clock))
    for i, name in enumerate(ALL):
        assert lines["prefill"][name] == {"seconds": pytest.approx([1 + 100 * i + 0.05] * 4), "peak_bytes": 0}
        assert lines["decode"][name] == {"seconds": pytest.approx([1 + 100 * i + 0.01] * 4), "peak_bytes": 0}
    rounds = [fake.calls[n:n + 18] for n in range(0, len(fake.calls), 18)]  # one of them warm-up
    assert len(rounds) == 5 and len({tuple(call[0] for call in each) for each in rounds}) > 2
    for each in rounds:
        for name in ALL:
            assert [call[1:4] for call in each if call[0] == name] == [
                ((3, 5), [0] * 3, [5] * 3), ((3, 1), [5] * 3, [1] * 3), ((3, 1), [6] * 3, [1] * 3)]
        for form in range(0, 18, 6):  # both prefills, then their steps in turns, A B B A
            names = [call[0] for call in each[form:form + 6]]
            assert names == [names[0], names[1], names[0], names[1], names[1], names[0]] and names[0] != names[1]
            assert names[0].removesuffix(evaluation.SIDE) == names[1].removesuffix(evaluation.SIDE)
    inputs = {tuple(tuple(call[4]) for call in each if call[0] == name) for each in rounds for name in ALL}
    assert len(inputs) == 1 and len(set(sum(inputs.pop(), ()))) > 8  # the same tokens for all, and not all alike


def test_the_warm_up_is_left_out(monkeypatch):
    fake = FakeClock(monkeypatch)
    live, slow = fake.variants["live"], iter([1000.0])
    forward = live.forward
    live.forward = lambda *args: (setattr(fake, "now", fake.now + next(slow, 0)), forward(*args))[1]
    assert max(evaluation.measure_batch(fake.variants, 1, settings())["prefill"]["live"]["seconds"]) < 500


def test_the_clock_is_the_one_asked_for(monkeypatch):
    variants, ticks = evaluation.make_variants(small_model(), attach_stirred()), {"perf_counter": 1.0, "process_time": 64.0}
    for name, step in ticks.items():
        total = [0.0]
        monkeypatch.setattr(evaluation.time, name, lambda total=total, step=step: total.__setitem__(0, total[0] + step) or total[0])
    for clock, name in (("wall", "perf_counter"), ("cpu", "process_time")):
        lines = evaluation.measure_batch(variants, 1, settings(clock=clock))
        assert lines["prefill"]["live"]["seconds"] == [ticks[name]] * 4 and lines["decode"]["live"]["seconds"] == [ticks[name]] * 4


def test_more_rounds_until_the_time_is_used(monkeypatch):
    fake = FakeClock(monkeypatch)
    lines = evaluation.measure_batch(fake.variants, 1, settings(repeats=2, seconds=20_000.0))
    one_round = sum(3 * (1 + 100 * i) for i in range(6)) + 6 * 0.07
    assert {len(line["seconds"]) for phase in lines.values() for line in phase.values()} == {math.ceil(20_000 / one_round) - 1}  # less the warm-up


def test_median_ratio_and_interval_against_plain_loops():
    draw = random.Random(4)
    times, base = [draw.uniform(1, 2) for _ in range(9)], [draw.uniform(1, 2) for _ in range(9)]
    got = evaluation.paired_ratio(times, base, settings(resamples=400, seed=7))
    ratios = [a / b for a, b in zip(times, base)]
    draws = np.random.default_rng(7).integers(9, size=(400, 9)).tolist()
    medians = sorted(statistics.median(ratios[i] for i in row) for row in draws)
    place = lambda q: medians[int(399 * q)] + (399 * q % 1) * (medians[int(399 * q) + 1] - medians[int(399 * q)])
    assert got["ratio"] == pytest.approx(statistics.median(ratios)) and got["interval95"] == pytest.approx([place(0.025), place(0.975)])
    assert evaluation.paired_ratio([3.0] * 5, [2.0] * 5, settings()) == {"ratio": 1.5, "interval95": [1.5, 1.5]}


def test_ratios_are_paired_and_against_their_own_reference():
    """A machine that slows down tenfold in some rounds changes no ratio."""
    slow = [1.0, 10.0, 1.0, 10.0, 5.0]
    cost = dict(zip(ALL, (2.0, 3.0, 4.0, 5.0, 8.0, 12.0)))
    got = {name: {"seconds": [cost[name] * s for s in slow]} for name in ALL}
    evaluation.add_ratios(got, settings())
    ratio = lambda name, key: got[name][key] and got[name][key]["ratio"]
    assert [ratio(name, "to_backbone") for name in ALL] == [None, 1.5, 2.0, 2.5, 4.0, 6.0]
    assert [ratio(name, "to_without_side_path") for name in ALL] == [None, 1.5, None, 1.25, None, 1.5]
    assert got["live"]["median_seconds"] == 40.0 and all(line["to_backbone"]["interval95"] == [line["to_backbone"]["ratio"]] * 2
                                                          for line in list(got.values())[1:])


# ----------------------------------------------------------------------------------------------------------- command

def save_run(checkpoint, folder, talan=TalanConfig(slots=3, width=6)):  # noqa: B008
    model = load_model(checkpoint, dtype="float32")
    attach(model, AdapterConfig(rank=4), talan)
    stir(model)
    save_adapter(model, folder)
    return str(folder)


def command(*words):
    return subprocess.run([sys.executable, "eval.py", "overhead", *words], cwd=ROOT, capture_output=True, text=True)


def test_command_line(tiny_checkpoint, tmp_path):
    run = save_run(tiny_checkpoint(), tmp_path / "run")
    done = command("--adapter", run, "--batches", "1,3", "--prompt", "6", "--steps", "2", "--repeats", "2", "--seconds", "0", "--resamples", "50")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/overhead/overhead.json").read_text())
    assert {"settings", "commit", "device", "hardware", "versions", "backbone", "fingerprint", "adapter_sha256", "dtype", "counts", "notes",
            "times"} <= set(result)
    assert list(result["times"]) == ["1", "3"] and result["backbone"] == str(tiny_checkpoint())
    for phases in result["times"].values():
        assert list(phases) == ["prefill", "decode"] and all(list(lines) == ALL for lines in phases.values())
        assert all(len(line["seconds"]) == 2 for lines in phases.values() for line in lines.values())
    for text in ("prefill 3 x 6", "decode 1 x 1", "time / without side path", "bytes: backbone ", "side path %", "wall clock", "wrote "):
        assert text in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith(("prefill", "decode"))]) == 2 * 2 * 6


def test_without_an_adapter_a_fresh_one_of_the_flags(tiny_checkpoint, tmp_path, capsys):
    result = evaluation.overhead(settings(backbone=str(tiny_checkpoint()), rank=2, layers=("0", "2"), width=5, batches=("1",), repeats=1,
                                          out=str(tmp_path)))
    assert list(result["times"][1]["decode"]) == ALL
    assert result["counts"]["bytes"]["state of a row"] == 2 * 4 * 8 * 6 and "fresh" in capsys.readouterr().out
    assert json.loads((tmp_path / "overhead.json").read_text())["settings"]["batches"] == [1]


def test_a_run_without_a_side_path_says_so(tiny_checkpoint, tmp_path, capsys):
    run = save_run(tiny_checkpoint(), tmp_path / "run", None)
    result = evaluation.overhead(settings(adapter=run, batches=(1,), repeats=1))
    assert list(result["times"][1]["prefill"]) == ["backbone", "merged", "live"] and "no side path" in capsys.readouterr().out
    assert not any("no adapter" in note for note in result["notes"])


def test_some_of_the_forms(tiny_checkpoint, tmp_path):
    result = evaluation.overhead(settings(backbone=str(tiny_checkpoint()), forms=("live",), batches=(1,), repeats=1, out=str(tmp_path)))
    lines = result["times"][1]["decode"]
    assert list(lines) == ALL[4:] and [line["to_backbone"] for line in lines.values()] == [None, None]
    assert lines[ALL[5]]["to_without_side_path"] and lines[ALL[4]]["to_without_side_path"] is None
    model = load_model(tiny_checkpoint(), dtype="float32")
    attach(model, None, TalanConfig())
    save_adapter(model, tmp_path / "side")
    with pytest.raises(ValueError, match="forms"):
        evaluation.overhead(settings(backbone=str(tiny_checkpoint()), adapter=str(tmp_path / "side"), forms=("live", "merged")))


def test_defaults_are_those_of_the_adapter_and_the_side_path():
    adapter, talan = evaluation.asked_parts(evaluation.OverheadSettings())
    assert adapter == AdapterConfig() and talan == TalanConfig()


@pytest.mark.parametrize("values, said", [
    (dict(batches=("1", "x")), "batches"), (dict(batches=("0",)), "batches"), (dict(batches=()), "batches"), (dict(prompt=0), "prompt"),
    (dict(steps=0, repeats=0), "repeats"), (dict(seconds=-1.0), "seconds"), (dict(seconds=math.nan), "seconds"),
    (dict(clock="sun"), "clock"), (dict(forms=("live", "dead")), "forms"), (dict(forms=()), "forms"),
    (dict(adapter="a", rank=8), "rank"), (dict(adapter="a", configs=()), "configs"), (dict(resamples=0), "resamples")])
def test_bad_settings(values, said):
    with pytest.raises(ValueError, match=said):
        evaluation.OverheadSettings(**values)


def test_bad_input(tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "empty.json").write_text("{}")
    for values, said in ((dict(configs=(str(tmp_path / "bad.json"),)), "model_type"), (dict(configs=(str(tmp_path / "no.json"),)), "no.json"),
                         (dict(configs=(str(tmp_path / "empty.json"),)), "empty.json"), (dict(configs=(), layers=("28",)), "Qwen3-0.6B.*\n.*layers"),
                         (dict(configs=(), layers=("half",)), "layers"), (dict(configs=(), mixer="x"), "mixer"),
                         (dict(configs=(), rank=5000), "rank"),
                         (dict(backbone=str(tmp_path / "none")), "none"), (dict(adapter=str(tmp_path)), "adapter_config.json")):
        with pytest.raises(ValueError, match=said):
            evaluation.overhead(evaluation.OverheadSettings(**values))
    monkeypatch.setattr(evaluation, "choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(ValueError, match="clock"):
        evaluation.overhead(evaluation.OverheadSettings(clock="cpu"))


def test_configs_flag_on_the_command_line():
    done = command("--configs", "--rank", "8")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()[1:]] == list(SHAPES), done.stderr
    refused = command("--config", "x")
    assert refused.returncode and "--configs" in refused.stderr
    assert command("--batches").returncode  # other flags still need a value
