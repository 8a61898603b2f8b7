"""The golden kit: our code passes it, other libraries agree with it, it is what its seeds give, and it catches wrong implementations."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "tests" / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle  # noqa: E402
import talan  # noqa: E402
import train  # noqa: E402
from tests.golden import check, make, ours  # noqa: E402

CASES = {case["name"]: case for case in check.read_cases()}


def python(*arguments, cwd=ROOT):
    """A command in a process of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def failures(results):
    """Names of the tensors that failed, in the table's order."""
    return [r.tensor for r in results if not r.passed]


def on(name, function=ours.run):
    """Results of one case."""
    return check.run_function(function, CASES[name])


# ------------------------------------------------------------------------------------------ the kit holds
def test_our_code_passes_through_the_command_line():
    done = python("tests/golden/check.py", "tests.golden.ours:run")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    tensors = sum(len(case["tolerance"]) for case in CASES.values())
    assert done.stdout.splitlines()[-1] == f"{len(CASES)} cases, {tensors} tensors, 0 failed"


def test_our_code_has_room_to_the_tolerances():
    """Another framework rounds elsewhere: what passes here by a hair would fail there."""
    results = [r for name in CASES for r in on(name) if r.tolerance]
    assert max(r.error / r.tolerance for r in results) < 0.4


def digest():
    """A hash of every file of the kit."""
    files = sorted(f for f in KIT.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return hashlib.sha256(b"".join(str(f).encode() + f.read_bytes() for f in files)).hexdigest()


def test_verify_passes_and_changes_nothing():
    before = digest()
    done = python("tests/golden/make.py", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differ from what the seeds give" in done.stdout and "0 failed by our code" in done.stdout and digest() == before


def damage_value(folder):
    file = folder / "expected" / "train-lora.safetensors"
    tensors = load_file(file)
    tensors["loss"] *= np.float32(1 + 1e-6)
    save_file(tensors, file, metadata={"format": "pt"})
    return "expected/train-lora.safetensors: differs"


def damage_input(folder):
    file = folder / "inputs" / "forward-llama.safetensors"
    tensors = load_file(file)
    tensors["tokens"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return "inputs/forward-llama.safetensors: differs"


def damage_tolerance(folder):
    text = (folder / "cases.json").read_text()
    (folder / "cases.json").write_text(text.replace('"loss": ', '"loss": 1', 1))
    return "cases.json: differs"


def damage_list(folder):
    (folder / "expected" / "merge-dora.safetensors").unlink()
    return "expected/merge-dora.safetensors: only in what the seeds give"


@pytest.mark.parametrize("damage", [damage_value, damage_input, damage_tolerance, damage_list])
def test_verify_names_what_was_changed(damage, tmp_path):
    shutil.copytree(KIT, tmp_path / "kit")
    assert make.differences(KIT, tmp_path / "kit") == []
    line = damage(tmp_path / "kit")
    assert make.differences(tmp_path / "kit", KIT) == [line]


def test_the_kit_is_small():
    sizes = [f.stat().st_size for f in KIT.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(sizes) < 650_000


def test_every_axis_occurs_and_nothing_is_zero():
    training = [CASES[name] for name in make.TRAIN]
    for axis, values in {"mixer": talan.MIXERS, "writeback": talan.WRITEBACKS, "site": talan.SITES}.items():
        assert {case["side_path"][axis] for case in training} == set(values)
    assert {case["adapter"]["kind"] for case in training} == set(talan.KINDS) - {"none"}
    assert {case["side_path"]["trunk_grad_scale"] for case in training} >= {0.0, 1.0} and any(
        case["side_path"]["grad_scale"] != 1 for case in training)
    assert {(c["side_path"]["mixer"], c["side_path"]["writeback"]) for c in CASES.values() if c["kind"] == "side_path"} == {
        (m, w) for m in talan.MIXERS for w in talan.WRITEBACKS}
    for file in [*KIT.glob("backbones/*/*.safetensors"), *KIT.glob("adapters/*/*.safetensors")]:
        assert all((tensor != 0).all() for tensor in load_file(file).values())


def test_expected_values_are_telling():
    """Gradients and moves are not zero, few values are left out, both sides of the bound occur, rows stop at different places."""
    for name in make.TRAIN:
        expected, start = check.read_expected(CASES[name]), check.read_inputs(CASES[name])
        for tensor, value in expected.items():
            if tensor.startswith("grad."):
                assert np.abs(value).max() > 20 * CASES[name]["tolerance"][tensor]
            elif tensor.startswith("after."):
                assert np.isnan(value).mean() < 0.1
                assert np.nanmax(np.abs(value - start[tensor.removeprefix("after.")])) > 20 * CASES[name]["tolerance"][tensor]
    for mixer in talan.MIXERS:
        expected, h = check.read_expected(CASES[f"side-path-{mixer}-bounded"]), check.read_inputs(CASES[f"side-path-{mixer}-bounded"])["h"]
        share = np.linalg.norm(expected["delta"], axis=-1) / np.linalg.norm(h, axis=-1)
        share = share[~np.isnan(share)] / CASES[f"side-path-{mixer}-bounded"]["side_path"]["bound"]
        assert (share > 1 - 1e-6).any() and (share < 0.99).any() and share.max() < 1 + 1e-6
    for name in ("greedy-bare", "greedy-side-path"):
        new = check.read_expected(CASES[name])["new_tokens"]
        ends = (new >= 0).sum(1)
        assert 1 in ends and new.shape[1] in ends and len(set(ends)) >= 4


# ------------------------------------------------------------------------------------------ others agree
@pytest.mark.parametrize("backbone", make.CONFIGS)
def test_transformers_computes_the_same_hidden_states(backbone):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(KIT / "backbones" / backbone, dtype=torch.float32).eval()

    def run(case, inputs):
        with torch.no_grad():
            out = reference(torch.from_numpy(inputs["tokens"]), output_hidden_states=True)
        states = [h.numpy() for h in out.hidden_states]
        named = {f"layer.{n}": h for n, h in enumerate(states[1:-1])}
        return {"embedding": states[0], **named, "hidden": states[-1], "logits": out.logits.numpy()}

    last = f"layer.{make.CONFIGS[backbone]['num_hidden_layers'] - 1}"  # transformers keeps the last one only after the norm
    assert failures(on(f"forward-{backbone}", run)) == [last]


@pytest.mark.parametrize("folder", make.ADAPTERS)
def test_peft_merges_to_the_same_weights(folder):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(KIT / "backbones" / make.ADAPTERS[folder][0], dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, str(KIT / "adapters" / folder)).merge_and_unload()

    def run(case, inputs):
        return {f"merged.{name}": p.detach().numpy() for name, p in merged.named_parameters()
                if name.split(".")[-2] in case["adapter"]["targets"]}

    assert failures(on(f"merge-{folder}", run)) == []


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("side-path")])
def test_the_slow_oracle_computes_the_same_side_path(name):
    def run(case, inputs):
        side, w = case["side_path"], {key: value.astype(np.float64) for key, value in inputs.items()}
        out, (num, den), inner = oracle.side_path(w, w["h"], side["mixer"], side["writeback"], side["bound"], (w["num"], w["den"]), inputs["lengths"])
        return {"x": ours.talan.rms(torch.from_numpy(w["h"])).numpy(), **inner, "h_out": out, "num": num, "den": den}

    results = on(name, run)
    assert failures(results) == ["a"]  # the mixer's weights, which the kit does not hold
    assert all(r.error <= r.tolerance / 8 for r in results if r.passed)


def test_memory_split_into_chunks_passes_too(monkeypatch):
    monkeypatch.setattr(talan, "CHUNK", 3)
    assert [failures(on(name)) for name in CASES if CASES[name]["kind"] in ("side_path", "train", "decode")] == [[]] * 17


# ------------------------------------------------------------------------------------------ wrong implementations
def wrong_scale(patch):
    right = talan.AdapterConfig.scale.fget
    patch.setattr(talan.AdapterConfig, "scale", property(lambda self: right(self) / 2))


def rslora_scale_of_lora(patch):
    patch.setattr(talan.AdapterConfig, "scale", property(lambda self: self.alpha / self.rank))


def mask_off_by_one(patch):
    right = talan.SidePath.compress
    patch.setattr(talan.SidePath, "compress", lambda self, x, lengths: right(self, x, lengths + 1))


def memory_sees_pads(patch):
    right = talan.SidePath.compress
    patch.setattr(talan.SidePath, "compress", lambda self, x, lengths: right(self, x, None))


def softmax_over_tokens(patch):
    right = torch.Tensor.softmax
    patch.setattr(torch.Tensor, "softmax", lambda self, dim: right(self, 1))


def softmax_without_root(patch):
    right = talan.SidePath.compress

    def compress(self, x, lengths):
        w, v = right(self, x, lengths)
        return w ** 2, v

    patch.setattr(talan.SidePath, "compress", compress)


def missing_rms(patch):
    patch.setattr(talan, "rms", lambda x: x)


def transposed_matrix(patch):
    right = ours.load_model

    def load(path):
        model = right(path)
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.data = weight.data.T.contiguous()
        return model

    patch.setattr(ours, "load_model", load)


def gate_with_the_wrong_sign(patch):
    right = torch.sigmoid
    patch.setattr(torch, "sigmoid", lambda x: right(-x))


def loss_over_every_token(patch):
    right = train.loss_sum
    patch.setattr(train, "loss_sum", lambda model, batch, weight: right(model, batch, weight) * len(batch.targets) / batch.tokens.numel())


def norm_not_detached(patch):
    patch.setattr(talan.AdapterLinear, "row_norm", lambda self: (self.weight + self.scale * self.lora_B @ self.lora_A).norm(dim=1))


def trunk_gradient_not_scaled(patch):
    right = talan.scale_grad
    patch.setattr(talan, "scale_grad", lambda x, g: x if g == 0.25 else right(x, g))


def no_weight_decay(patch):
    right = torch.optim.AdamW
    patch.setattr(torch.optim, "AdamW", lambda groups, weight_decay, **rest: right(groups, weight_decay=0, **rest))


def row_state_at_the_last_column(patch):
    right = ours.Transformer.forward
    patch.setattr(ours.Transformer, "forward", lambda self, tokens, cache=None, lengths=None: right(self, tokens, cache, None))


def never_stops(patch):
    right = ours.generate
    patch.setattr(ours, "generate", lambda *arguments, eos_ids, **rest: right(*arguments, **rest))


def labels_shifted(patch):
    right = train.encode_row
    patch.setattr(train, "encode_row", lambda *a: train.Row((row := right(*a)).ids, [False, *row.supervised[:-1]]))


def supervised_template(patch):
    right = train.encode_row
    patch.setattr(train, "encode_row", lambda *a: train.Row((row := right(*a)).ids, [True] * len(row.ids)))


WRONG = [  # implementation, case, the first tensor that fails, one that still passes
    (wrong_scale, "merge-lora", "merged.model.layers.0.mlp.down_proj.weight", None),
    (wrong_scale, "train-dora", "loss", None),
    (rslora_scale_of_lora, "merge-rslora", "merged.model.layers.0.mlp.down_proj.weight", None),
    (mask_off_by_one, "side-path-linear-add", "num", "h_out"),
    (memory_sees_pads, "side-path-attention-gate", "num", "h_out"),
    (softmax_over_tokens, "side-path-mlp-add", "y", "z"),
    (softmax_without_root, "side-path-attention-add", "e", "v"),
    (missing_rms, "side-path-linear-bounded", "x", None),
    (transposed_matrix, "forward-llama", "layer.0", "embedding"),
    (gate_with_the_wrong_sign, "side-path-mlp-gate", "delta", "y"),
    (loss_over_every_token, "train-rslora", "loss", None),
    (norm_not_detached, "train-dora", "grad.base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "loss"),
    (trunk_gradient_not_scaled, "train-rslora", "grad.base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "loss"),
    (no_weight_decay, "train-scope-talan", "after.model.layers.0.side_path.slots", "grad.model.layers.0.side_path.slots"),
    (row_state_at_the_last_column, "decode-rslora", "num.0", "prefill"),
    (never_stops, "greedy-bare", "new_tokens", None),
    (labels_shifted, "labels-qwen3-last-thoughts-are-labelled", "supervised", "ids"),
    (supervised_template, "labels-plain-two-turns-and-system", "supervised", "text"),
]


@pytest.mark.parametrize("wrong, case, first, passes", WRONG, ids=[f"{w[0].__name__}-{w[1]}" for w in WRONG])
def test_a_wrong_implementation_fails_at_the_right_tensor(wrong, case, first, passes, monkeypatch):
    with monkeypatch.context() as patch:
        wrong(patch)
        results = on(case)
    bad = failures(results)
    assert bad and bad[0] == first and passes not in bad
    assert passes is None or passes in [r.tensor for r in results]


# ------------------------------------------------------------------------------------------ the checker
def outputs(name):
    """A copy of what is expected, to be spoiled."""
    return check.read_expected(CASES[name])


def test_the_first_place_that_deviates_is_named():
    def run(case, inputs):
        found = outputs(case["name"])
        found["y"][0, 2, 1] += 1
        found["y"][1, 0, 3] += 0.5
        return found

    [bad] = [r for r in on("side-path-linear-add", run) if not r.passed]
    value = outputs("side-path-linear-add")["y"][0, 2, 1]
    assert bad.tensor == "y" and bad.error == pytest.approx(1, abs=1e-6)
    assert bad.note == f"first at [0, 2, 1]: expected {value:.9g}, found {value + 1:.9g}; 2 of {outputs(bad.case)['y'].size} values deviate"


@pytest.mark.parametrize("spoil, note", [
    (lambda t: t.pop("z"), "missing"),
    (lambda t: t.update(z=t["z"][:, :-1]), "shape: expected (2, 7, 3, 4), found (2, 6, 3, 4)"),
    (lambda t: t.update(z=t["z"].swapaxes(2, 3)), "shape: expected (2, 7, 3, 4), found (2, 7, 4, 3)"),
    (lambda t: t.update(z=np.float32(1)), "shape: expected (2, 7, 3, 4), found ()"),
    (lambda t: t.update(z="nonsense"), "not a numeric array"),
    (lambda t: t.update(z=np.where(np.isnan(t["z"]), 0, np.nan)), "first at [0, 0, 0, 0]: expected"),
    (lambda t: t.update(z=t["z"] * np.inf), "first at [0, 0, 0, 0]: expected"),
    (lambda t: t.update(zz=t["z"]), "unexpected"),
])
def test_missing_misshapen_and_unexpected_tensors_fail(spoil, note):
    def run(case, inputs):
        found = outputs(case["name"])
        spoil(found)
        return found

    [bad] = [r for r in on("side-path-linear-add", run) if not r.passed]
    assert bad.tensor == ("zz" if note == "unexpected" else "z") and bad.note.startswith(note)


def test_padding_is_not_compared_and_values_may_be_wider():
    found = {name: np.nan_to_num(value.astype(np.float64), nan=7.0) for name, value in outputs("forward-qwen3").items()}
    assert failures(on("forward-qwen3", lambda case, inputs: found)) == []


def test_what_raises_fails_and_the_other_cases_go_on(tmp_path):
    (tmp_path / "mine.py").write_text("def run(case, inputs):\n    if case['name'] == 'merge-dora':\n        raise KeyError('w')\n    return []\n")
    done = python(KIT / "check.py", "mine:run", "--case", "merge-*", cwd=tmp_path)
    assert done.returncode == 1 and "3 cases, 3 tensors, 3 failed" in done.stdout
    assert "raised KeyError: 'w'" in done.stdout and "expected a dict of arrays, found list" in done.stdout and "Traceback" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["nowhere:run"], "neither such a module nor such a folder"),
    (["json:nothing"], "the module json has no 'nothing'"),
    (["json:loads", "--case", "nothing"], "no case matches"),
])
def test_a_bad_call_exits_with_2(arguments, message):
    done = python(KIT / "check.py", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_folder_mode_without_torch(tmp_path):
    """The expected folder itself passes, with torch made impossible to import; a spoiled copy of it fails where it was spoiled."""
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['check.py', {str(KIT / 'expected')!r}]; " \
           f"runpy.run_path({str(KIT / 'check.py')!r}, run_name='__main__')"
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout.endswith(" 0 failed\n"), done.stdout + done.stderr
    shutil.copytree(KIT / "expected", tmp_path / "theirs")
    (tmp_path / "theirs" / "merge-lora.safetensors").unlink()
    (tmp_path / "theirs" / "merge-dora.safetensors").write_bytes(b"not safetensors")
    tensors = outputs("greedy-bare")
    tensors["new_tokens"][1, 2] += 1
    save_file(tensors, tmp_path / "theirs" / "greedy-bare.safetensors")
    done = python(KIT / "check.py", tmp_path / "theirs")
    assert done.returncode == 1 and done.stdout.endswith(" 3 failed\n")
    assert [line.split()[0] for line in done.stdout.splitlines() if "FAIL" in line] == ["merge-lora", "merge-dora", "greedy-bare"]


def test_the_readme_stub_runs(tmp_path):
    [stub] = re.findall(r"```python\n(.*?)```", (KIT / "README.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(stub)
    done = python(KIT / "check.py", "mine:run", "--case", "side-path-*", cwd=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert done.returncode == 1 and len(lines) == 90
    assert {line[1] for line in lines if "pass" in line} == {"x", "k"} and all(line[-1] in ("pass", "missing") for line in lines)


def test_the_readme_describes_every_kind_and_every_tensor():
    text = (KIT / "README.md").read_text()
    words = set(re.findall(r"[\w.]+", text))
    for case in CASES.values():
        assert f"| `{case['kind']}` |" in text
        assert set(case) <= words
        for tensor in case["tolerance"]:
            stem = re.sub(r"^(grad|after|merged)\..*", r"\1.NAME", re.sub(r"^(layer|num|den)\.\d+$", r"\1.N", tensor))
            assert stem in words, tensor
    assert json.loads((KIT / "cases.json").read_text())["labels"]["date_string"] == "26 Jul 2024"
