"""experiments/internals.py: every quantity against the kit's float64 reference, row by row."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import talan
import train
from experiments import internals
from model import load_model
from tests.golden import reference

BACKBONE = ROOT / "tests/golden/backbones/qwen3"  # 2 layers, 16 wide
IS_ON = {"backbone": (0, 0), "side path": (0, 1), "adapter": (1, 0), "both": (1, 1)}
OWN = reference.side_path


def build(mixer="linear", writeback="gate", site="block", kind="lora", layers=(0, 1), **more):
    """Adapter and side paths on a backbone, each tensor moved from its start."""
    model = load_model(more.get("backbone", BACKBONE), "cpu", more.get("dtype"))
    axes = talan.TalanConfig(layers, site, 3, 4, mixer, writeback, bound=0.2) if layers else None
    talan.attach(model, talan.AdapterConfig(kind, 2, 3.0, 0.0, ("v_proj", "down_proj")), axes)
    for name, p in model.named_parameters():
        if talan.group_of(name) != "backbone":
            p.data += 0.3 * torch.randn(p.shape, generator=common.generator("stir", name))
    return model


def make_rows(*lengths):
    draw, rows = np.random.default_rng(0), []
    for n in lengths or (6, 11, 4, 8, 20):
        rows.append(train.Row(draw.integers(53, size=n).tolist(), [t % 3 > 0 for t in range(n)]))
    return rows


class Reference:
    """Passes of one row through reference.forward; parts: what each side path did, by layer."""

    def __init__(self, model, monkeypatch):
        self.p, self.config = {}, json.loads((BACKBONE / "config.json").read_text())
        for name, p in model.named_parameters():
            key = talan.peft_name(name) if ".lora_" in name else name.replace(".linear.", ".")
            self.p[key] = p.detach().double()
        configs = model.adapter_config, model.talan_config
        self.adapter, self.side = map(dataclasses.asdict, configs)
        monkeypatch.setattr(reference, "side_path", self.side_path)

    def side_path(self, w, side, h):
        out, x = OWN(w, side, h), reference.rms(h)
        z = self.memory[len(self.parts)] if self.memory else out["z"]
        query = reference.rms(x @ w.get("w_query", w["w_key"]).T)
        scores = (query[:, None] * reference.rms(z)).sum(-1) / z.shape[-1] ** 0.5
        scores = x @ w["w_read"].T if "w_read" in w else scores
        y = reference.remix(w, side["mixer"], x, z)
        part = {"h": h, "z": z, "a": scores.softmax(-1), "d": y @ w["w_out"].T}
        part["delta"] = reference.write_back(w, side, h, x, y) * self.is_on
        self.parts.append(part)
        return out | {"h_out": h + part["delta"]}

    def run(self, ids, adapter, is_on, memory=None):
        self.is_on, self.memory, self.parts = is_on, memory, []
        given = self.adapter if adapter else None
        return reference.forward(self.p, self.config, ids, given, self.side)[0], self.parts


def expected_values(base, tuned, both):
    """{(place, quantity): value of each token} of one row's passes, each (streams, parts)."""
    want = {}
    for n in range(2):
        bare, middle, last = (streams[f"layer.{n}"] for streams, _ in (base, tuned, both))
        after, place, part = f"after layer {n}", f"layer {n}", both[1][n]
        want[after, "update"] = (middle - bare).norm(dim=-1) / bare.norm(dim=-1)
        want[after, "difference norm"] = (last - middle).norm(dim=-1)
        want[after, "difference"] = (last - middle).norm(dim=-1) / middle.norm(dim=-1)
        u, size = tuned[1][n]["h"] - base[1][n]["h"], part["delta"].norm(dim=-1)
        want[place, "update / perturbation"] = u.norm(dim=-1) / size
        want[place, "cosine"] = torch.cosine_similarity(u, part["delta"], dim=-1)
        want[place, "perturbation / stream"] = size / part["h"].norm(dim=-1)
        want[place, "slots read"] = (-(part["a"] * part["a"].log()).sum(-1)).exp()
        want[place, "gate or bound's factor"] = size / part["d"].norm(dim=-1)
    p, q = (streams["logits"].softmax(-1) for streams, _ in (tuned, both))
    want["logits", "KL(adapter || both)"] = (p * (p / q).log()).sum(-1)
    want["logits", "another arg max"] = p.argmax(-1) != q.argmax(-1)
    return want


CASES = [("linear", "gate", "block", "lora"), ("attention", "bounded", "attention", "dora")]


@pytest.mark.parametrize("axes", [*CASES, ("mlp", "add", "block", "rslora")], ids="-".join)
def test_every_quantity_against_the_reference(axes, monkeypatch):
    """In float32, of differences between passes: hence the tolerance."""
    model, rows = build(*axes), make_rows()
    plain, ids = Reference(model, monkeypatch), [row.ids[:-1] for row in rows]
    runs = [{name: plain.run(each, *on) for name, on in IS_ON.items()} for each in ids]
    z = [[part["z"] for part in run["both"][1]] for run in runs]
    mean = [torch.cat([each[n] for each in z]).mean(0)[None] for n in range(2)]
    found = internals.measure_rows(model, rows, 40)
    for n, (row, run) in enumerate(zip(rows, runs)):
        size, other, want = len(ids[n]), z[(n + 1) % len(rows)], {}
        at = torch.arange(size).clamp_max(len(other[0]) - 1)
        run["another row's memory"] = plain.run(ids[n], True, True, [m[at] for m in other])
        run["mean memory"] = plain.run(ids[n], True, True, mean)
        for name, (streams, _) in run.items():
            loss = -streams["logits"].log_softmax(-1)[range(size), row.ids[1:]]
            want["loss", name] = torch.where(torch.tensor(row.supervised[1:]), loss, math.nan)
        want |= expected_values(run["backbone"], run["adapter"], run["both"])
        assert {place for place, _ in want} == set(found)
        for place, name in want if axes[1] != "add" else [k for k in want if "factor" not in k[1]]:
            got = found[place][name][n]
            assert np.isnan(got[size:]).all()
            np.testing.assert_allclose(got[:size], want[place, name].numpy(), 2e-3, 2e-5)


AXES = itertools.product(talan.MIXERS, talan.WRITEBACKS, talan.SITES)
IDENTITIES = [(*axes, talan.KINDS[n % 4]) for n, axes in enumerate(AXES)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", IDENTITIES, ids="-".join)
@torch.no_grad()
def test_a_pass_is_the_models_own_bit_for_bit(axes, dtype):
    model, tokens = build(*axes, dtype=dtype), torch.randint(53, (2, 9))
    own = internals.run_pass(model, tokens, True, True)
    memory = {layer: part.z for layer, part in own.side_paths.items()}
    other = {layer: z.flip(0) for layer, z in memory.items()}
    plain = {(True, True): model, (False, False): load_model(BACKBONE, "cpu", dtype)}
    plain[False, True] = build(*axes[:3], kind="none", dtype=dtype)
    if axes[3] != "none":
        plain[True, False] = build(kind=axes[3], layers=(), dtype=dtype)
    for is_on, alone in plain.items():
        assert torch.equal(internals.run_pass(model, tokens, *is_on).hidden, alone(tokens))
    again = internals.run_pass(model, tokens, True, True, memory).hidden
    swapped = internals.run_pass(model, tokens, True, True, other).hidden
    assert torch.equal(again, own.hidden) and (swapped - again).abs().max() > 1e-3
    assert len(own.streams) == 2 and torch.equal(model.model.norm(own.streams[1]), again)


def test_the_loss_is_that_of_training_and_batches_do_not_matter():
    model, rows = build(), make_rows(6, 4, talan.CHUNK + 20)
    alone, together = (internals.measure_rows(model, rows, size) for size in (1, 9999))
    for place, entries in together.items():
        for name, values in entries.items():
            np.testing.assert_allclose(alone[place][name], values, 1e-3, 1e-5, err_msg=name)
    loss = train.mean_loss(model, rows, 9999, "cpu", common.Ranks())
    assert np.nanmean(alone["loss"]["both"]) == pytest.approx(loss, rel=1e-5)


def test_the_model_is_restored_even_after_an_error(monkeypatch):
    model, tokens = build(kind="dora"), torch.randint(53, (1, 5))
    before, hidden = list(model.named_modules()), model(tokens)
    monkeypatch.setattr(talan.SidePath, "write", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        internals.run_pass(model, tokens, False, True)
    monkeypatch.undo()
    with pytest.raises(KeyError), internals.override_adapters(model, False, {}):
        assert not any(isinstance(m, talan.AdapterLinear) for m in model.modules())
        raise KeyError
    assert list(model.named_modules()) == before and torch.equal(model(tokens), hidden)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_absent_has_no_value():
    start, figures, none = build(), [], {"value": None}
    for block in start.model.layers:
        block.side_path.w_out.data.zero_()
    for model in (start, build(layers=()), build(kind="none")):
        found = internals.measure_rows(model, make_rows(), 40)
        figures.append(internals.compute_figures(found, 100, 0))
        json.dumps(figures, allow_nan=False)
        assert "loss: both" in internals.figure_table(figures[-1])
    start, adapter, side_path = figures
    assert start["layer 0"]["cosine"] == start["growth"]["difference"] == none
    assert adapter["loss"]["both"] == adapter["loss"]["adapter"] != adapter["loss"]["backbone"]
    assert not {"layer 0", "growth", "logits"} & set(adapter)
    assert side_path["layer 1"]["cosine"] == none != side_path["layer 1"]["slots read"]


@pytest.mark.parametrize("divided", [False, True])
def test_an_interval_pools_the_tokens_of_the_drawn_rows(divided):
    draw, want = np.random.default_rng(3), []
    values, draws = draw.gamma(2.0, size=(2, 9, 12)), draw.integers(9, size=(150, 9))
    values[:, draw.random((9, 12)) < 0.3] = math.nan
    for rows in (range(9), *draws):
        a, b = (np.concatenate([array[n] for n in rows]) for array in values)
        want.append(np.nanmedian(a) / (np.nanmedian(b) if divided else 1))
    entry = internals.figure(np.nanmedian, draws, values[0], values[1] if divided else None)
    ends = np.percentile(want[1:], [2.5, 97.5]).tolist()
    assert entry == {"value": pytest.approx(want[0]), "interval95": pytest.approx(ends)}


@pytest.mark.parametrize("gain", [0.5, -0.5])
def test_growth_losses_and_shares(gain):
    two, three, six = (np.tile([x, x, 4 * x], (4, 1)) for x in (2.0, 3.0, 6.0))
    found = {"loss": {"backbone": two + gain, "adapter": two + 0.25, "both": two}}
    found["after layer 1"] = {"difference": two, "difference norm": three}
    found["after layer 2"] = {"difference": three, "difference norm": six}
    figures = internals.compute_figures(found, 100, 0)
    want = {"growth": {"difference": 1.5, "difference norm": 2.0}}
    want["after layer 1"] = {"difference": 2.0, "difference norm": 3.0}
    want["loss"] = {"backbone": 4 + gain, "adapter": 4.25, "both": 4.0}
    want["loss above both"] = {"backbone": gain, "adapter": 0.25}
    want["share of the improvement"] = {"backbone": 1.0, "adapter": 0.5} if gain > 0 else {}
    for place, entries in want.items():
        assert {name: entry["value"] for name, entry in figures[place].items()} == entries


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    talan.save_adapter(build(backbone=ROOT / "data/tiny/model", layers=(1, 3)), folder)
    return f"--adapter {folder} --rows 6 --resamples 100 --max-tokens 40 --out {folder}/out".split()


def test_the_command(words, capsys, monkeypatch):
    done = [sys.executable, "-m", "experiments.internals", *words]
    out = subprocess.run(done, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = json.loads((ROOT / words[-1] / "internals.json").read_text())
    assert result["rows"] == 6 and result["counts"]["truncated"] > 0
    assert {"layer 1", "layer 3", "growth", "logits", "loss"} < set(result["figures"])
    assert 6 * 20 < result["figures"]["after layer 0"]["update"]["tokens"] <= 6 * 39
    assert "layer 3: cosine" in out and "after layer" not in out
    if "and internals.png" in out:
        assert (ROOT / words[-1] / "internals.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    values = common.parse_cli(internals.Settings, "internals", words)
    first, again, other = (internals.main(values | {"seed": n})["figures"] for n in (0, 0, 1))
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert first == again and first["loss"]["both"]["value"] != other["loss"]["both"]["value"]


REFUSED = {"--adapter=": "name the run", "--adapter=nowhere": "nowhere: expected"}
REFUSED |= {"--rows=1": "two rows or more, found 1", "--max-tokens=2": "no usable row"}
REFUSED |= {"--data=none.jsonl": "none.jsonl", "--resamples=9": "resamples"}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refusals_in_one_line(wrong, words):
    with pytest.raises(SystemExit, match=REFUSED[wrong]) as stop:
        common.run_script(internals.main, internals.Settings, "internals", [*words, wrong])
    assert str(stop.value).startswith("internals: ") and "\n" not in str(stop.value)
