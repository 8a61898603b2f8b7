"""experiments/speed.py: the two sides, counts, turns, targets, the command; no duration."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import speed
from experiments.speed import DATA, SHAPES, Settings, count, measure, memory
from model import ModelConfig, Transformer
from talan import AdapterConfig, attach

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {"Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096}
PUBLISHED |= {"Qwen3-8B": 8_190_735_360, "Llama-3.2-1B": 1_235_814_400}  # as the hub counts them


@pytest.fixture(autouse=True)
def stance():
    """A task sets whether its process compiles; here the other tests share it."""
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def sides(tiny_checkpoint, tmp_path):
    """make(kind, backbone) -> theirs, ours in this process; ours has the adapter of theirs."""

    def make(kind, backbone="qwen3"):
        folder = backbone if backbone in SHAPES else str(tiny_checkpoint(backbone))
        settings = Settings(dtype="float32", batch_rows=3)
        given = {"settings": settings, "backbone": folder, "kind": kind, "folder": str(tmp_path)}
        return speed.Theirs(**given), speed.Ours(**given)

    return make


@pytest.mark.parametrize("kind, model", [("lora", "qwen3"), ("dora", "tiny"), ("rslora", "llama")])
def test_both_sides_take_the_same_steps(kind, model, sides):
    """Weights that both optimizers moved alike; of a shape, the same random weights at first."""
    theirs, ours = sides(kind, model)
    for n in range(3):
        a, b = (measure(side, n, "ours", [24] * 3, [[]]) for side in (theirs, ours))
        np.testing.assert_allclose(a["value"], b["value"], rtol=1e-4)


def test_the_side_path_learns_where_it_is_switched_on(sides):
    ours, before = sides("lora")[1], []
    for variant in ("ours", "ours + side path", "ours", "ours side path alone"):
        measure(ours, 1, variant, [24], [[]])
        before.append(next(filter(None, ours.paths)).w_out.clone())
    assert not before[0].any() and before[1].any() and torch.equal(before[1], before[3])


def test_answers_are_the_same_and_as_long_as_asked(sides):
    """Seven prompts, three rows at once: rows are refilled, each stops at its own number."""
    lengths, stops = [2, 3, 5, 5, 5, 9, 14], [4, 9, 1, 2, 6, 3, 11]
    rows = [speed.task(side, 0, "x merged", lengths, stops)() for side in sides("dora")]
    assert rows[0] == rows[1] and [len(row) for row in rows[0]] == stops


def test_phases_and_operations(sides):
    ours = sides("lora")[1]
    for variant in ("merged", "merged + side path", "merged side path alone"):
        found = measure(ours, 1, variant, [6, 6], [[1] * 2, [2] * 2, [3] * 2])
        assert list(found["phases"]) == ["prefill ", "decode "] and found["value"] is None
    text = speed.observe(ours, 0, "merged", [6], [[2], [4]])["text"]
    few, many = json.loads(text.splitlines()[0].split(": ")[1])
    assert 0 < few[0] < many[0] and few[1] == many[1] == 0 and "aten::mm" in text
    assert measure(ours, 0, "ours", [], [[]])["peak"] > 0  # loading


def test_decoding_is_what_comes_after_the_first_tokens(monkeypatch):
    """A second a token and ten for the prompts."""
    monkeypatch.setattr(speed, "task", lambda side, n, variant, lengths, stops: 10 + stops[0])
    monkeypatch.setattr(speed, "timed", lambda seconds, settings: (seconds, None))
    side, runs = speed.Ours(settings=Settings()), [[1], [8], [8 + speed.DECODED]]
    found = speed.measure(side, 1, "ours", [6], runs)["phases"]
    assert found == {"prefill ": 11, "decode ": 1.0}


@pytest.mark.parametrize("name", SHAPES)
def test_counts_by_hand(name):
    """r (in + out) a projection; side path: w_key, w_value, w_out (r D), slots, w_read, gate."""
    family, D, L, H, K, Dh, F, V, tied, _ = SHAPES[name].values()
    pairs = [(D, H * Dh), (D, K * Dh), (D, K * Dh), (H * Dh, D), (D, F), (D, F), (F, D)]
    matrices, adapter = L * sum(map(np.prod, pairs)), L * 16 * sum(map(sum, pairs))
    norms = L * (2 * D + (2 * Dh if family == "qwen3" else 0)) + D
    found = count(name, positions=100)
    assert found["backbone"] == matrices + V * D * (1 if tied else 2) + norms
    assert found["backbone"] == PUBLISHED.get(name, found["backbone"])
    assert found["adapter"] == adapter and found["live adapter"] == 2 * adapter
    assert found["side path"] == 3 * 64 * D + 8 * 64 + 8 * D + D + 1
    assert found["live path"] == 2 * (3 * 64 * D + 8 * D + 8 * 64)
    assert (found["blocks"], found["head"]) == (2 * matrices, 2 * V * D)
    assert found["attention"] == 4 * 100 * H * Dh * L
    assert (found["bytes a row"], found["a token"]) == (4 * 8 * 65, 4 * 2 * L * K * Dh)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_memory_counts_what_autograd_keeps(family, monkeypatch):
    """A layer more keeps so much more a token, and what CPUs alone keep: attention's output in two
    layouts, the rotation's tables. The rest are the adapter's casts."""
    rows, length, kept, counted = 8, 128, [], []
    for layers in (2, 3):
        shape = [family, 64, layers, 4, 2, 32, 160, 50, True, 1e4]
        monkeypatch.setitem(SHAPES, "small", dict(zip(DATA["columns"], shape)))
        model = Transformer(ModelConfig.from_dict(SHAPES["small"])).bfloat16()
        attach(speed.randomize(model), AdapterConfig(rank=16))
        own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda x, to=saved: to.append(x.untyped_storage()) or x, lambda x: x):
            model.train()(torch.arange(rows * length).view(rows, length) % 50).sum()
        found = {storage.data_ptr(): storage.nbytes() for storage in saved}  # each once
        kept.append(sum(n for p, n in found.items() if p not in own) / (rows * length))
        counted.append(memory("small", tokens=2**30)["one card, or DDP"])  # GiB of 2^30 tokens
    cpu = 2 * 4 * 32 + 4 * 32 / rows
    assert kept[1] - kept[0] == pytest.approx(counted[1] - counted[0] + cpu, rel=0.02)


def test_memory_of_qwen3_8b():
    """As counted by hand: 15.3 of weights (6.9 over four cards), 0.7, 37.8 (3.3), 0.6."""
    found = [memory("Qwen3-8B")[f"one card, or DDP{end}"] for end in ("", ", checkpointing")]
    assert found == [54.4, 19.8] and memory("Qwen3-8B")["FSDP over 4"] == 46.0


def test_turns_alternate_and_what_fails_is_left_out(monkeypatch, capsys):
    asked = []

    class Pool:
        def __init__(self, *_):
            self.shutdown = list

        def submit(self, call, *words):
            self.words = words
            return self

        def result(self):
            n, variant = self.words[3:5]
            asked.append((n, variant))
            if variant == "ours + side path":
                raise RuntimeError("traceback\n3 GiB are missing")
            return {"phases": {"": float(n)}, "value": [1.0, 2.0], "peak": 7}

    monkeypatch.setattr(speed, "ProcessPoolExecutor", Pool)
    records = speed.in_turns(Settings(kinds=("lora",), rounds=2), "train", "tiny")
    names = ["theirs", "ours", "ours side path alone"]
    first = [(0, v) for v in (*names[:2], "ours + side path", names[2])]
    assert asked == first + [(1, v) for v in names[::-1]] + [(2, v) for v in names]
    assert [record["seconds"] for record in records.values()] == 3 * [[1.0, 2.0]]
    assert "ours + side path is left out: 3 GiB are missing" in capsys.readouterr().out


def test_what_is_asked_of_a_gpu():
    settings = Settings(**DATA["cuda"] | {"device": "cuda"})
    keys = {*speed.plan(settings, "train", "lora"), *speed.plan(settings, "train", "dora")}
    assert {"train lora 4 x 1024: ours compiled", "train dora 2 x 1024: theirs"} < keys
    assert "64 x 160: live" in speed.plan(settings, "generate", "lora")


def test_ratios_bounds_and_targets():
    """Ratios of neighbouring rounds; the bound of 2 x 8 tokens by hand; alone, all rounds count."""
    flops = 16 * (2 * 122_880 + 3 * 59_392 + 3 * 4 * 2 * 64 * 4 + 0.62 * 2 * 65_536)
    read, same = 4 * (61_440 + 32_768 + 192 * 2 * 2 * 2 * 16), {"value": [1.0, 1.0], "peak": 4}
    train, decode = "train lora 2 x 8: ", "decode 1 x 160: "
    records = {f"{train}theirs": same | {"seconds": [2 * flops, 4 * flops]}}
    records[f"{train}ours"] = {"value": [1.0, 1.1], "peak": 2, "seconds": [flops, flops]}
    records[f"{decode}merged"] = same | {"seconds": [read, read]}
    records[f"{decode}merged side path alone"] = same | {"seconds": [0.01 * read, 0.03 * read]}
    peaks, settings = {"matmul": 1, "bandwidth": 1}, Settings(dtype="float32")
    lines = speed.show(settings, records, count("tiny"), peaks).splitlines()
    assert "3.000 (2.100 to 3.900)" in lines[1]
    assert "0.375 (0.263 to 0.487) <= 0.5: met NOT THE SAME COMPUTATION" in lines[2]
    assert "0.500 <= 0.5: met" in lines[2] and "1.000 (1.000 to 1.000)" in lines[2]
    assert lines[3].endswith("1.000 (1.000 to 1.000)")
    assert "0.020 (0.011 to 0.029) <= 0.02: NOT MET" in lines[4]


def test_losses_of_two_devices(tmp_path):
    """Runs that are there are not made again."""
    for device, losses in (("cpu", [4, 2]), ("cuda", [4, 2.1])):
        (tmp_path / f"losses-{device}-2").mkdir()
        lines = [f'{{"kind": "step", "loss": {loss}}}' for loss in losses]
        (tmp_path / f"losses-{device}-2/metrics.jsonl").write_text("\n".join(lines))
    text = speed.run_losses(Settings(device="cuda", steps=2, out=str(tmp_path)))
    assert "cuda at most 5.000 % away" in text


def command(*flags):
    words = [sys.executable, "-m", "experiments.speed", *map(str, flags)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("other, flags", [("theirs", []), ("before", ["--before", ROOT])])
def test_the_command(other, flags, tmp_path):
    words = "--backbones tiny --parts count train --kinds lora --rounds 1 --length 16 --tokens 32"
    done = command(*words.split(), "--out", tmp_path, *flags)
    assert done.returncode == 0 and "596,049,920" in done.stdout, done.stderr
    assert "left out" not in done.stdout and "NOT THE SAME" not in done.stdout
    records = json.loads((tmp_path / "speed.json").read_text())["train tiny"]
    assert {f"train lora 2 x 16: {v}" for v in (other, "ours", "ours + side path")} < set(records)
    assert all(len(r["seconds"]) == 1 and r["peak"] > 2**26 for r in records.values())


REFUSED = {"--parts x": "parts: expected some of", "--kinds none": "kinds: expected some of lora"}
REFUSED |= {"--device cuda:1": "device: expected some of cpu, cuda", "--length 1": "length"}
REFUSED["--parts load --backbones nowhere"] = "nowhere/config.json: expected a JSON file"


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_settings_are_named(flags, tmp_path):
    done = command("--out", tmp_path, *flags.split())
    assert done.returncode == 1 and REFUSED[flags] in done.stderr and done.stderr.count("\n") == 1
