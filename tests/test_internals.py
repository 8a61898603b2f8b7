"""eval.py internals: every quantity against float64 loops on a two-layer model, the statistics against pooled brute force, the command line.

The oracle is a transformer in numpy, one row at a time and without padding, around the side path and the adapters of tests/oracle.py.
"""

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data.internals as evaluation  # noqa: E402
import oracle  # noqa: E402
import talan  # noqa: E402
import train  # noqa: E402
from model import load_model  # noqa: E402
from talan import AdapterConfig, TalanConfig, attach, save_adapter, switched  # noqa: E402

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
BOUND = 0.2
COMBINATIONS = [("linear", "gate", "block"), ("attention", "bounded", "attention"), ("mlp", "add", "block")]


@pytest.fixture(scope="session")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3", num_hidden_layers=2, hidden_size=24, intermediate_size=40, head_dim=8)


def build(folder, mixer="linear", writeback="gate", site="block", layers=(0, 1), kind="lora", dtype=None):
    """The two-layer model with adapter and side paths, each tensor moved from its start by its own name's numbers."""
    model = load_model(folder, "cpu", dtype)
    config = TalanConfig(layers, site=site, slots=3, width=4, mixer=mixer, writeback=writeback, bound=BOUND) if layers else None
    attach(model, AdapterConfig(kind, 2, 3.0, targets=TARGETS) if kind != "none" else None, config)
    for name, p in model.named_parameters():
        if talan.group_of(name) != "backbone":
            p.data += 0.3 * torch.randn(p.shape, generator=talan.generator("stir", name))
    return model


def make_rows(lengths=(6, 11, 4, 8, 3), seed=0):
    draw = np.random.default_rng(seed)
    return [train.Row(draw.integers(97, size=n).tolist(), [False, *(draw.random(n - 2) < 0.6).tolist(), True]) for n in lengths]


def settings(**values):
    return evaluation.InternalsSettings(**{"adapter": "A", "batch_tokens": 18, "resamples": 100, **values})


def measured(model, rows, **values):
    """Found, and each quantity as a list of rows of token values."""
    found = evaluation.measure_rows(model, rows, settings(**values))
    owner = np.concatenate(found.owner)
    tokens = {key: np.concatenate(parts) for key, parts in found.tokens.items()}
    return found, {key: [values[owner == n] for n in range(len(rows))] for key, values in tokens.items()}


def near(found, want, rel=2e-4, abs=2e-6):
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(want, float), rtol=rel, atol=abs)


# ------------------------------------------------------------------------------------------ the oracle
def normed(weight, x):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def turn(x, theta):
    """x (T,H,Dh), rotary positions"""
    half, out = x.shape[2] // 2, np.zeros_like(x)
    for t, i in itertools.product(range(len(x)), range(half)):
        angle = t * theta ** (-i / half)
        c, s = math.cos(angle), math.sin(angle)
        out[t, :, i], out[t, :, i + half] = x[t, :, i] * c - x[t, :, i + half] * s, x[t, :, i + half] * c + x[t, :, i] * s
    return out


class Plain:
    """One row through the model: streams after each block, and at each insertion h, z, a, delta, strength."""

    def __init__(self, model):
        self.p = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.c, self.t, self.scale = model.config, model.talan_config, model.adapter_config.scale

    def linear(self, name, x):
        a = self.p.get(f"{name}.lora_A")
        if a is None or not self.adapter:
            return x @ self.p[f"{name}.weight"].T
        return oracle.lora_linear(self.p[f"{name}.weight"], a, self.p[f"{name}.lora_B"], x, self.scale, 1)

    def attend(self, name, x):
        c, T = self.c, len(x)
        heads = lambda key: self.linear(f"{name}.{key}_proj", x).reshape(T, -1, c.head_dim)
        q, k = (turn(normed(self.p[f"{name}.{key}_norm.weight"], heads(key)), c.rope_theta) for key in "qk")
        v, group, y = heads("v"), c.num_attention_heads // c.num_key_value_heads, np.zeros((T, c.num_attention_heads, c.head_dim))
        for t, head in itertools.product(range(T), range(c.num_attention_heads)):
            weights = oracle.softmax([oracle.dot(q[t, head], k[u, head // group]) / math.sqrt(c.head_dim) for u in range(t + 1)])
            y[t, head] = sum(weight * v[u, head // group] for u, weight in enumerate(weights))
        return self.linear(f"{name}.o_proj", y.reshape(T, -1))

    def side(self, layer, site, h):
        if not self.t or site != self.t.site or layer not in self.t.layers:
            return h
        kept = self.inner[layer] = {"h": h.copy()}
        if self.memory is None:
            return h
        prefix = f"model.layers.{layer}.side_path."
        w = {name.removeprefix(prefix): value for name, value in self.p.items() if name.startswith(prefix)}
        own = oracle.side_path(w, h[None], self.t.mixer, self.t.writeback, BOUND)[2]["z"][0]
        z = own if self.memory == "own" else self.memory[layer]
        kept |= {"z": own, "a": [], "delta": [], "strength": []}
        for t in range(len(h)):
            x = oracle.rms(h[t])
            y, a, _ = oracle.remix(w, self.t.mixer, x, z[min(t, len(z) - 1)])
            d = oracle.matvec(w["w_out"], y)
            kept["a"].append(a)
            kept["delta"].append(oracle.write_back(w, self.t.writeback, BOUND, h[t], x, y))
            kept["strength"].append(oracle.norm(kept["delta"][-1]) / oracle.norm(d))
        return h + np.array(kept["delta"])

    def run(self, ids, adapter, memory):
        """memory: None (off), "own", or z (T',M,r) by layer"""
        self.adapter, self.memory, self.inner = adapter, memory, {}
        h, streams = self.p["model.embed_tokens.weight"][ids], []
        for layer in range(self.c.num_hidden_layers):
            name = f"model.layers.{layer}"
            h = h + self.attend(f"{name}.self_attn", normed(self.p[f"{name}.input_layernorm.weight"], h))
            h = self.side(layer, "attention", h)
            x = normed(self.p[f"{name}.post_attention_layernorm.weight"], h)
            gate, up = self.linear(f"{name}.mlp.gate_proj", x), self.linear(f"{name}.mlp.up_proj", x)
            h = h + self.linear(f"{name}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
            h = self.side(layer, "block", h)
            streams.append(h)
        head = self.p.get("lm_head.weight", self.p["model.embed_tokens.weight"])
        return streams, normed(self.p["model.norm.weight"], h) @ head.T, self.inner


def nll_of(logits, row):
    return sum(math.log(np.exp(logits[t] - logits[t].max()).sum()) + logits[t].max() - logits[t][row.ids[t + 1]]
               for t in range(len(logits)) if row.supervised[t + 1])


def lengths_of(xs):
    return np.array([oracle.norm(x) for x in xs])


def insertion_oracle(update, one, writeback):
    """The quantities of one row at one insertion, token by token"""
    out = {}
    for t, u in enumerate(update):
        d, a = one["delta"][t], one["a"][t]
        cosine = oracle.dot(u, d) / oracle.norm(u) / oracle.norm(d)
        entropy = -sum(w * math.log(w) for w in a)
        line = {"ratio": oracle.norm(u) / oracle.norm(d), "cosine": cosine, "in band": abs(cosine) < 1.96 / math.sqrt(len(u)),
                "size": oracle.norm(d) / oracle.norm(one["h"][t]), "entropy": entropy, "slots read": math.exp(entropy)}
        if writeback == "gate":
            line["gate"] = one["strength"][t]
        if writeback == "bounded":
            line |= {"bound factor": one["strength"][t], "bound active": one["strength"][t] < 1 - 1e-9}
        for name, value in line.items():
            out.setdefault(name, []).append(value)
    return out


@pytest.mark.parametrize("mixer, writeback, site", COMBINATIONS)
def test_every_quantity_against_the_oracle(folder, mixer, writeback, site):
    model, rows = build(folder, mixer, writeback, site), make_rows()
    found, tokens = measured(model, rows)
    plain, other = Plain(model), evaluation.partners(len(rows), 0)
    ids = [row.ids[:-1] for row in rows]
    runs = {name: [plain.run(one, *how) for one in ids] for name, how in {
        "backbone": (False, None), "adapter": (True, None), "side path": (False, "own"), "both": (True, "own")}.items()}
    z = {layer: [run[2][layer]["z"] for run in runs["both"]] for layer in (0, 1)}
    mean = {layer: np.concatenate(z[layer]).mean(0)[None] for layer in z}
    runs["swapped memory"] = [plain.run(one, True, {layer: z[layer][other[n]] for layer in z}) for n, one in enumerate(ids)]
    runs["mean memory"] = [plain.run(one, True, mean) for one in ids]
    for name, each in runs.items():
        near(found.nll[name], [nll_of(run[1], row) for run, row in zip(each, rows)])
    assert found.nll.keys() == runs.keys() and found.sizes.tolist() == [sum(row.supervised) for row in rows]
    seen = {("kl", -1), ("changed", -1)}
    for n in range(len(rows)):
        base, adapter, both = (runs[name][n] for name in ("backbone", "adapter", "both"))
        for layer in (0, 1):
            near(tokens["update", layer][n], lengths_of(adapter[0][layer] - base[0][layer]) / lengths_of(base[0][layer]))
            near(tokens["difference norm", layer][n], lengths_of(both[0][layer] - adapter[0][layer]))
            near(tokens["difference", layer][n], lengths_of(both[0][layer] - adapter[0][layer]) / lengths_of(adapter[0][layer]))
            want = insertion_oracle(adapter[2][layer]["h"] - base[2][layer]["h"], both[2][layer], writeback)
            for name, values in want.items():
                near(tokens[name, layer][n], values, rel=2e-3, abs=1e-5)
            seen |= {(name, layer) for name in (*want, "update", "difference", "difference norm", "rounding")}
            assert (tokens["rounding", layer][n] < 1e-4).all()
        p, q = (np.array([oracle.softmax(line) for line in run[1]]) for run in (adapter, both))
        near(tokens["kl", -1][n], (p * (np.log(p) - np.log(q))).sum(-1), rel=1e-3)
        assert tokens["changed", -1][n].tolist() == (p.argmax(-1) != q.argmax(-1)).tolist()
    assert tokens.keys() == seen
    for layer in (0, 1):
        near(found.total[layer] / sum(map(len, ids)), mean[layer][0])
        near(found.read[layer], np.concatenate([run[2][layer]["a"] for run in runs["both"]]).sum(0))


# ------------------------------------------------------------------------------------------ identities
ALL = list(itertools.product(talan.MIXERS, talan.WRITEBACKS, talan.SITES, ("lora", "dora", "rslora", "none")))


@pytest.mark.parametrize("mixer, writeback, site, kind", ALL)
def test_each_pass_is_the_models_own(folder, mixer, writeback, site, kind):
    """Bit for bit: both = the model; without the side path, = one never given any; without both, the bare backbone."""
    model, tokens = build(folder, mixer, writeback, site, kind=kind), torch.tensor([make_rows((9,))[0].ids, make_rows((9,), 1)[0].ids])
    lengths = torch.tensor([9, 9])
    go = lambda *how: evaluation.run_pass(model, tokens, lengths, *how).hidden
    with torch.no_grad():
        assert torch.equal(go(True, True), model(tokens))
        assert torch.equal(go(True, False), build(folder, layers=(), kind=kind)(tokens)) if kind != "none" else True
        assert torch.equal(go(False, False), load_model(folder)(tokens))
        assert torch.equal(go(False, True), build(folder, mixer, writeback, site, kind="none")(tokens))


def test_longer_than_a_chunk(folder):
    model, tokens = build(folder), torch.randint(0, 97, (1, 300))
    with torch.no_grad():
        assert torch.equal(evaluation.run_pass(model, tokens, torch.tensor([300]), True, True).hidden, model(tokens))


def test_the_loss_is_the_training_loss(folder):
    model, rows = build(folder), make_rows()
    found = measured(model, rows)[0]
    assert found.nll["both"].sum() / found.sizes.sum() == pytest.approx(train.mean_loss(model, rows, 18, "cpu"), rel=1e-6)


def test_padding_never_counts(folder):
    """One row a batch, or all in one, makes no difference; nor does a row's last token, which is not fed."""
    model, rows = build(folder), make_rows()
    alone, together = measured(model, rows, batch_tokens=1), measured(model, rows, batch_tokens=10_000)
    assert len(alone[0].owner) == 5 and len(together[0].owner) == 1
    assert len(np.concatenate(together[0].owner)) == sum(len(row.ids) - 1 for row in rows)
    for key in alone[1]:
        for a, b in zip(alone[1][key], together[1][key]):
            near(a, b, rel=1e-3, abs=1e-5)
    for name in alone[0].nll:
        near(alone[0].nll[name], together[0].nll[name])
    near(alone[0].total[1], together[0].total[1])
    assert set(map(len, (m[0] for m in together[0].sums[1].values()))) == {len(row.ids) - 1 for row in rows}


def test_first_difference_is_the_perturbation(folder):
    """After the first insertion's block both streams came from the same h, so they differ by delta alone."""
    tokens = measured(build(folder, layers=(1,)), make_rows())[1]
    assert ("difference", 0) not in tokens and ("ratio", 0) not in tokens
    near(np.concatenate(tokens["difference", 1]), np.concatenate(tokens["size", 1]), rel=1e-4)


def test_own_memory_in_exchange_changes_nothing(folder):
    """Equal rows have equal memories; and of one row there is no other."""
    row = make_rows((9,))[0]
    found = measured(build(folder), [row] * 4)[0]
    np.testing.assert_allclose(found.nll["swapped memory"], found.nll["both"], rtol=1e-6)
    assert "swapped memory" not in measured(build(folder), [row])[0].nll


def test_mean_memory_of_one_token_is_its_own(folder):
    found = measured(build(folder), [train.Row([5, 6], [False, True])] * 3)[0]
    np.testing.assert_allclose(found.nll["mean memory"], found.nll["both"], rtol=1e-6)
    assert found.sizes.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rows, seed", [*itertools.product((2, 3, 17), (0, 1))])
def test_partners_are_one_circle(rows, seed):
    other, place, seen = evaluation.partners(rows, seed), 0, []
    for _ in range(rows):
        seen.append(place := int(other[place]))
    assert sorted(seen) == list(range(rows)) and seen[-1] == 0  # back only after every other row, so never at itself


def test_the_model_is_left_as_it_was(folder):
    model = build(folder, kind="dora").train()
    state = lambda: ([(name, id(p), p.requires_grad) for name, p in model.named_parameters()], [id(block.side_path) for block in model.model.layers],
                     [(m.training, getattr(m, "active", None)) for m in model.modules()], list(model.state_dict()))
    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, make_rows())
    with pytest.raises(ZeroDivisionError), switched(model, False, lambda *args: args[2]):
        assert not any(m.active for m in model.modules() if hasattr(m, "active"))
        raise ZeroDivisionError
    assert state() == before and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_bfloat16_reports_what_rounding_does(folder):
    model = build(folder, dtype=torch.bfloat16)
    for block in model.model.layers:
        block.side_path.w_out.data *= 1e-3
    found, tokens = measured(model, make_rows())
    rounding = np.concatenate(tokens["rounding", 0])
    assert (rounding > 0.05).all() and (np.concatenate(tokens["size", 0]) > 0).all()  # delta itself is not rounded, h' is
    assert all(np.isfinite(values).all() for values in found.nll.values())
    for block in model.model.layers:
        block.side_path.w_out.data *= 1e-2  # now many tokens' delta vanishes and the streams are equal: no infinite growth in the JSON
    assert "bfloat16: differences" in everything(model, make_rows())[1]


# ------------------------------------------------------------------------------------------ parts that are absent
def everything(model, rows):
    found = evaluation.measure_rows(model, rows, settings())
    result = evaluation.internals_statistics(model, found, settings())
    result["dtype"] = str(model.head_weight.dtype).removeprefix("torch.")
    result["notes"] = evaluation.internals_notes(result, model.adapter_config.kind != "none")
    json.dumps(result, allow_nan=False)
    return result, evaluation.internals_table(result)


def test_a_side_path_at_its_start(folder):
    """w_out = 0: delta is 0, everywhere left out of the ratio, and nothing is lost without it."""
    model = build(folder)
    for block in model.model.layers:
        block.side_path.w_out.data.zero_()
    result, text = everything(model, make_rows())
    n = result["tokens"]
    for entry in result["insertions"].values():
        assert entry["ratio"] == entry["cosine"] == {"n": 0, "left_out": n} and entry["size"]["median"] == 0
    assert result["growth"]["difference"] == {"factor": None} and result["logits"]["kl"]["p95"] == 0
    assert all(entry["nats"] == 0 for entry in result["lost"].values())
    assert f"{2 * n} tokens left out" in text


def test_adapter_alone(folder):
    result, text = everything(build(folder, layers=()), make_rows())
    assert result["insertions"] == result["growth"] == result["logits"] == result["lost"] == {}
    assert result["loss"]["both"] == result["loss"]["adapter"] and result["loss"]["side path"] == result["loss"]["backbone"]
    assert result["improvement"]["nats"] == pytest.approx(result["loss"]["backbone"]["nats"] - result["loss"]["both"]["nats"])
    assert result["depth"][1]["update"]["median"] > 0 and "no side path" in text


def test_side_path_alone(folder):
    result, text = everything(build(folder, kind="none"), make_rows())
    assert result["insertions"]["0"]["ratio"]["n"] == 0 and result["insertions"]["1"]["size"]["median"] > 0
    assert result["loss"]["adapter"] == result["loss"]["backbone"] and result["loss"]["both"] == result["loss"]["side path"]
    assert result["depth"][0]["update"]["p95"] == 0 and "no adapter" in text


# ------------------------------------------------------------------------------------------ statistics
@pytest.mark.parametrize("n, rows, ties", [(1, 1, False), (2, 3, False), (50, 6, True), (513, 9, False), (1000, 4, True)])
def test_medians_of_resamples_against_pooling(n, rows, ties):
    draw = np.random.default_rng(n)
    values = draw.integers(5, size=n).astype(float) if ties else draw.normal(size=n)
    owner = draw.integers(max(1, rows - 1), size=n)  # with several rows the last has no token
    counts = np.vstack([evaluation.draw_counts(draw, 60, rows), np.eye(rows)])
    want = [np.median(pooled) if len(pooled := np.repeat(values, count[owner].astype(int))) else np.nan for count in counts]
    np.testing.assert_array_equal(evaluation.draw_medians(values, owner, counts), want)


def test_medians_of_many_tokens():
    """1,000 resamples of 30,000 tokens take a fraction of a second; a naive pooling takes minutes."""
    draw = np.random.default_rng(0)
    values, owner, counts = draw.normal(size=30_000), draw.integers(64, size=30_000), evaluation.draw_counts(draw, 1000, 64)
    began = time.perf_counter()
    medians = evaluation.draw_medians(values, owner, counts)
    assert time.perf_counter() - began < 5
    assert all(medians[r] == np.median(np.repeat(values, counts[r][owner].astype(int))) for r in range(0, 1000, 50))
    assert evaluation.spread(values, owner, counts)["median_interval95"] == np.percentile(medians, [2.5, 97.5]).tolist()


def test_spread_leaves_nan_out():
    values, owner = np.array([1.0, np.nan, 3.0, 10.0, np.nan]), np.array([0, 0, 1, 1, 2])
    counts = np.array([[2.0, 1, 0], [0, 0, 3], [1, 1, 1]])
    result = evaluation.spread(values, owner, counts)
    assert (result["n"], result["left_out"], result["median"], result["mean"]) == (3, 2, 3.0, 14 / 3)
    assert (result["p5"], result["p95"]) == (pytest.approx(1.2), pytest.approx(9.3))
    assert result["median_interval95"] == np.percentile([2.0, 3.0], [2.5, 97.5]).tolist()  # 1 1 3 10 and 1 3 10; the second drew none
    assert result["mean_interval95"] == np.percentile([15 / 4, 14 / 3], [2.5, 97.5]).tolist()
    assert evaluation.spread(np.array([np.nan]), np.array([0]), counts) == {"n": 0, "left_out": 1}


def random_found(gain, rows=12, seed=3):
    """Two insertions of a three-layer model, by random numbers"""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 9, rows).astype(float)
    nll = {name: sizes * (mean + 0.2 * draw.random(rows)) for name, mean in
           {"backbone": 2 + gain, "adapter": 2.3, "side path": 2.8, "both": 2.0, "swapped memory": 2.1, "mean memory": 2.2}.items()}
    owner = [np.repeat([n], 3 + n) for n in range(rows)]
    names = [("ratio", 0), ("update", 0), ("update", 1), ("update", 2), ("difference", 1), ("difference", 2), ("difference norm", 1),
             ("difference norm", 2), ("kl", -1), ("ratio", 1)]
    tokens = {key: [draw.gamma(2.0, size=len(each)) for each in owner] for key in names}
    return evaluation.Found(sizes, nll, owner, tokens, {1: {}}, {1: torch.zeros(3, 2)}, {1: torch.tensor([20.0, 30.0, 52.0])})


class Shape:
    class config:
        num_hidden_layers, hidden_size = 3, 24


@pytest.mark.parametrize("gain", [1.0, 0.0, -1.0])
def test_statistics_by_brute_force(gain):
    found = random_found(gain)
    result = evaluation.internals_statistics(Shape, found, settings(seed=4, resamples=200))
    counts = evaluation.draw_counts(np.random.default_rng([4, 2]), 200, 12)
    assert counts.sum(1).tolist() == [12.0] * 200
    pooled = lambda key, count: np.concatenate([np.tile(part, int(c)) for part, c in zip(found.tokens[key], count)])
    ends = lambda values: pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())
    assert result["insertions"]["1"]["ratio"]["median_interval95"] == ends([np.median(pooled(("ratio", 1), count)) for count in counts])
    assert result["logits"]["kl"]["mean_interval95"] == ends([pooled(("kl", -1), count).mean() for count in counts])
    for name in ("difference", "difference norm"):
        factors = [np.median(pooled((name, 2), count)) / np.median(pooled((name, 1), count)) for count in [np.ones(12), *counts]]
        assert result["growth"][name] == {"factor": pytest.approx(factors[0]), "factor_interval95": ends(factors[1:])}
    loss = lambda name, count: (count * found.nll[name]).sum() / (count * found.sizes).sum()
    lost = lambda name, count: loss(name, count) - loss("both", count)
    for name, key in (("off", "adapter"), ("swapped memory", "swapped memory"), ("mean memory", "mean memory")):
        entry = result["lost"][name]
        assert entry["nats"] == pytest.approx(lost(key, np.ones(12))) and entry["nats_interval95"] == ends([lost(key, c) for c in counts])
        if gain == 1:
            shares = [lost(key, c) / lost("backbone", c) for c in [np.ones(12), *counts]]
            assert entry["share"] == pytest.approx(shares[0]) and entry["share_interval95"] == ends(shares[1:])
        else:
            assert entry["share"] is None and "share_interval95" not in entry
    assert result["improvement"]["nats"] == pytest.approx(lost("backbone", np.ones(12)))
    weights = [20 / 102, 30 / 102, 52 / 102]
    assert sum(map(len, found.owner)) == 102 and result["insertions"]["1"]["slot_weights"] == pytest.approx(weights)
    assert result["insertions"]["1"]["slots_used"] == pytest.approx(math.exp(-sum(w * math.log(w) for w in weights)))
    assert [list(entry) for entry in result["depth"]] == [["layer", "update"]] + [["layer", "update", "difference", "difference norm"]] * 2
    assert list(result["insertions"]["1"]) == ["ratio", "slot_weights", "slots_used"]


def test_random_directions_have_the_cosine_that_is_said():
    draw, zero = torch.Generator().manual_seed(0), torch.zeros(1, 1, 64)
    u, delta = torch.randn(2, 1, 20_000, 64, generator=draw)
    one = evaluation.Reading(torch.ones(1, 20_000, 64), torch.ones(1, 20_000, 64) + delta, delta, torch.full((1, 20_000, 2), 0.5))
    values = evaluation.insertion_values(u, one, "add")
    assert values["cosine"].std().item() == pytest.approx(1 / 8, rel=0.02) and values["in band"].mean().item() == pytest.approx(0.95, abs=0.005)
    assert values["slots read"].unique().tolist() == pytest.approx([2.0])
    hand = evaluation.Reading(torch.tensor([[[0.0, 4.0]]]), torch.tensor([[[3.0, 5.0]]]), torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]))
    values = evaluation.insertion_values(torch.tensor([[[6.0, 8.0]]]), hand, "add")
    assert {name: round(value.item(), 4) for name, value in values.items()} == {
        "ratio": 3.3333, "cosine": 0.6, "in band": 1.0, "size": 0.75, "rounding": 0.3333, "entropy": 0.0, "slots read": 1.0}
    for u, delta in ((zero, zero + 1), (zero + 1, zero)):
        values = evaluation.insertion_values(u, evaluation.Reading(zero + 1, zero + 1 + delta, delta, torch.ones(1, 1, 1)), "add")
        assert all(values[name].isnan().all() for name in ("ratio", "cosine", "in band")) and values["size"].isfinite().all()


# ------------------------------------------------------------------------------------------ rows, settings, command line
@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """A saved adapter and side path of the embedded backbone, as if trained."""
    run = tmp_path_factory.mktemp("internals") / "run"
    model = load_model(ROOT / "data/tiny/model")
    attach(model, AdapterConfig("lora", 4, 8.0, targets=TARGETS), TalanConfig((1, 0.5), slots=3, width=4, writeback="bounded"))
    for name, p in model.named_parameters():
        if talan.group_of(name) != "backbone":
            p.data += 0.02 * torch.randn(p.shape, generator=talan.generator("stir", name))
    save_adapter(model, run)
    return run


def command(*words):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "internals", *map(str, words)], capture_output=True, text=True)


def test_command_line(embedded, tmp_path):
    out = tmp_path / "out"
    done = command("--adapter", embedded, "--rows", 6, "--resamples", 100, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "internals.json").read_text())
    assert result["rows"] == {"used": 6, "in_file": 512, "cut": 0, "unlabelled": 0} and result["dtype"] == "float32"
    assert list(result["insertions"]) == ["1", "3"] and result["data"].endswith("data/tiny/dev.jsonl")
    assert {"settings", "commit", "versions", "fingerprint", "adapter_sha256", "data_sha256", "run_seed", "tokens", "supervised", "random_cosine",
            "depth", "growth", "logits", "loss", "improvement", "lost", "notes"} <= result.keys()
    assert set(result["lost"]) == {"off", "swapped memory", "mean memory"} and {"bound factor", "bound active"} < result["insertions"]["1"].keys()
    for text in ("layer 3: adapter update / perturbation", "after layer 5: (both - adapter) / adapter", "lost: mean memory", "wrote"):
        assert text in done.stdout
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed" in done.stdout
    else:
        assert (out / "internals.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_again_and_another_seed(embedded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "draw_internals", lambda result, file: False)
    go = lambda **values: evaluation.internals(settings(adapter=str(embedded), rows=4, out=str(tmp_path), **values))
    first, again, other = go(), go(), go(seed=1)
    assert first == again and first["loss"] != other["loss"] and "matplotlib is not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "internals.json").read_text()) == json.loads(json.dumps(other))
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("kind, layers", [("lora", (0, 1)), ("none", (1,)), ("lora", ())])
def test_a_picture_of_whatever_there_is(folder, tmp_path, kind, layers):
    pytest.importorskip("matplotlib")
    result, _ = everything(build(folder, layers=layers, kind=kind), make_rows())
    assert evaluation.draw_internals(result, tmp_path / "x.png") and (tmp_path / "x.png").stat().st_size > 10_000


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluation.draw_internals({}, tmp_path / "x.png") is False and not list(tmp_path.iterdir())


def test_bad_input_is_refused(embedded, tmp_path):
    with pytest.raises(ValueError) as error:
        evaluation.InternalsSettings(rows=-1, max_tokens=1, batch_tokens=0, resamples=9, seed=-1)
    assert all(name in str(error.value) for name in ("rows", "max_tokens", "batch_tokens", "resamples", "seed", "adapter"))
    done = command("--adapter", embedded, "--backbone", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("eval.py: data: name a JSONL file") and "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="adapter_config.json"):
        evaluation.internals(settings(adapter=str(tmp_path)))


def test_rows_are_drawn_cut_and_counted(tmp_path):
    tokenizer, file = evaluation_tokenizer(), tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Compute {n} + 1.", "completion": f"{n + 1} " * (40 if n == 3 else 1) + f"#### {n + 1}"} for n in range(9)]
    lines.append({"prompt": "Compute 2 + 1. " * 40, "completion": "3"})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    take = lambda **values: evaluation.draw_rows(file, tokenizer, settings(**values))
    rows, counts = take(rows=0, max_tokens=60)
    assert len(rows) == 9 and counts == {"in_file": 10, "cut": 1, "unlabelled": 1} and max(len(row.ids) for row in rows) == 60
    every = {tuple(row.ids) for row in take(rows=0)[0]}
    assert len(every) == 10 and all(tuple(row.ids) in every for row in take(rows=4)[0]) and len(take(rows=4)[0]) == 4
    assert take(rows=4)[0] != take(rows=4, seed=1)[0] and take(rows=4)[0] == take(rows=4)[0]
    with pytest.raises(ValueError, match="no row with a supervised token"):
        take(max_tokens=2)
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1"):
        take()


def evaluation_tokenizer():
    from model import load_tokenizer

    return load_tokenizer(ROOT / "data/tiny/model")
