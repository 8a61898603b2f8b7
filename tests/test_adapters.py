"""The adapters against plain float64 formulas and against PEFT; their files, both ways; merge."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_talan import SIDE, TOKENS, attached, close, logits, loss_of, randn, refused
from test_talan import same_gradients, snapshot, stir
from transformers import AutoModelForCausalLM

import talan
from model import load_model
from talan import AdapterConfig, AdapterLinear, TalanConfig, attach, load_adapter, save_adapter

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
kinds = pytest.mark.parametrize("kind", KINDS)
FIRST, PATH = "base_model.model.model.layers.0.self_attn.q_proj.", "model.layers.1.side_path."
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3")


def build(folder, kind="lora", side=None):
    """A model whose adapter, and side path if any, has moved away from its start."""
    model = load_model(folder)
    attach(model, AdapterConfig(kind, 4, 7.0), side)
    return stir(model)


def loaded(folder, place):
    model = load_model(folder)
    load_adapter(model, place)
    return model


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, AdapterLinear)]


def equal(found, want):
    return found.keys() == want.keys() and all(torch.equal(found[n], p) for n, p in want.items())


def plain(x, dropped, linear, A, B, m, s):
    """W x + b + s B A d(x), of DoRA W x + b + (g - 1) W d(x) + g s B A d(x), its norm detached."""
    W, update = linear.weight, s * dropped @ A.T @ B.T
    if m is not None:
        g = m / (W + s * B @ A).norm(dim=1).detach()
        update = (g - 1) * (dropped @ W.T) + g * update
    return linear(x) + update


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias, learn", [(False, False), (True, False), (True, True)])
def test_trap_9_forward_and_gradients(kind, dropout, bias, learn, monkeypatch):
    """In float64, with DoRA's form of dropout; W and b have moved where they learn."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    linear = torch.nn.Linear(5, 7, bias, dtype=torch.float64).requires_grad_(learn)
    config = AdapterConfig(kind, 3, 6.0, dropout)
    layer = AdapterLinear(linear, config, talan.generator(0)).double()
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    for seed, name in enumerate(named):
        named[name].data += 0.5 * randn(*named[name].shape, seed=seed)
    x = randn(2, 4, 5).requires_grad_()
    rest = layer.lora_A, layer.lora_B, named.get("lora_magnitude_vector"), config.scale
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    want = plain(x, F.dropout(x, dropout), linear, *rest)
    close(found, want, 1e-10)
    assert len(named) == 2 + (kind == "dora") + 2 * learn
    same_gradients([found], [want], named | {"x": x}, 1e-9)
    for found in (layer.eval()(x), F.linear(x, layer.merged_weight(), linear.bias)):
        close(found, plain(x, x, linear, *rest), 1e-10)
    assert torch.autograd.gradcheck(talan.LowRank.apply, (x, linear.weight, *rest[:2], 1.5))


def test_trap_8_zero_rows_of_w_stay_finite(folder):
    """511 rows of Llama-3.1-8B's o_proj are zero, and m / ||W|| is 0 / 0 there: gain 1."""
    model = load_model(folder)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data[3:7] = 0
        block.mlp.up_proj.weight.data.zero_()
    base, params = logits(model), attach(model, AdapterConfig("dora", 4, dropout=0.3))
    assert torch.equal(logits(model), base)
    assert (model.model.layers[0].mlp.up_proj.gain() == 1).all()
    for training in (True, False):
        loss_of(model.train(training).logits(model(TOKENS))).backward()
        assert all(p.grad.isfinite().all() for p in params)
        before = logits(stir(model.eval()))
        assert before.isfinite().all() and not torch.equal(before, base)
    talan.merge_adapter(model)
    close(logits(model), before, 3e-5)


@kinds
def test_trap_10_a_bfloat16_backbone_beside_traps_9_and_11(folder, kind):
    """Step 0 changes no bit; weights are float32 and move at 1e-4; W' is float32, cast once."""
    model = load_model(folder, dtype=torch.bfloat16)
    base, params = logits(model), attach(model, AdapterConfig(kind, 4), SIDE)
    assert torch.equal(logits(model), base) and torch.equal(logits(model.train()), base)
    before = [p.detach().clone() for p in attached(stir(model, 0.02)).values()]
    for layer in layers_of(model):
        W, A, B = (p.double() for p in (layer.linear.weight, layer.lora_A, layer.lora_B))
        want = W + layer.scale * B @ A
        if kind == "dora":
            want = (layer.lora_magnitude_vector / want.norm(dim=1))[:, None] * want
        close(layer.merged_weight(), want, 1e-6)
        assert layer.merged_weight().dtype == torch.float32
    loss_of(model.logits(model(TOKENS))).backward()
    torch.optim.AdamW(params, lr=1e-4, weight_decay=0).step()
    for p, start in zip(params, before):
        assert p.dtype == p.grad.dtype == torch.float32
        hit = p.grad.abs() > 1e-6
        assert hit.any() and (p != start)[hit].float().mean() > 0.99
    merged = [(layer.linear, layer.merged_weight().bfloat16()) for layer in layers_of(model)]
    talan.merge_adapter(model)
    assert all(torch.equal(linear.weight, W) for linear, W in merged)


def test_cached_dora_norms(folder, monkeypatch):
    """Each norm is computed once inside and in every pass outside; the bits are the same."""
    model, counted, row_norm = build(folder, "dora"), [], AdapterLinear.row_norm
    monkeypatch.setattr(AdapterLinear, "row_norm", lambda self: counted.append(1) or row_norm(self))
    want = logits(model)
    with pytest.raises(KeyError), talan.cached_dora_norms(model):
        assert torch.equal(logits(model), want) and torch.equal(logits(model), want)
        raise KeyError
    assert len(counted) == 2 * 21
    assert not torch.equal(logits(stir(model)), want) and len(counted) == 3 * 21


def published(folder, out, config=None, **settings):
    """Save a PEFT adapter away from its start, then edit its config; returns PEFT's model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for seed, p in enumerate(theirs(model).values()):
        p.data += 0.2 * randn(*p.shape, seed=seed)
    model.save_pretrained(out)
    edit_json(out / "adapter_config.json", config or {})
    return model.eval()


def edit_json(file, changes):
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def theirs(model):
    """PEFT's parameters by our names."""
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".default", "")
        found |= {name.removesuffix(".weight"): p} if ".lora_" in name else {}
    return found


Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
REGEX = r"(?:.*?(?:language|text).*?q_proj)|(?:\bmodel\.layers\.\d+\.self_attn\.(?:q_proj|v_proj))"
FORMS = [["q_proj"], ["self_attn.q_proj", "mlp.up_proj"], Q, r".*\.(q_proj|down_proj)", REGEX]
FORMS += ["all-linear", ["q_proj", "query_key_value"], ["k_proj", "layers.7.mlp.up_proj", "wo"]]
LOADED = [{"target_modules": targets} for targets in FORMS]
DROPOUT = {"target_modules": "all-linear", "lora_dropout": 0.3}
LOADED += [DROPOUT | options for options in KINDS.values()]
LOADED += [{"bias": "all"}, {"bias": "lora_only"}, {"layers_to_transform": [2, 0, 1]}]
LOADED += [{"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}]
LOADED += [{"rank_pattern": p} for p in ({"lm_head": 8}, {".*_proj": 2}, {"layers.9.*": 2})]
LOADED += [{"alpha_pattern": p} for p in ({"up_proj": 3}, {"q_proj": 8}, {"_proj": 5, "9.*": 1})]
LOADED += [{"alpha_pattern": {"^model.*": 3, "q_proj": 5}}]
LOADED += [{"exclude_modules": names} for names in (["v_proj"], r".*\.v_proj", ["lm_head"])]
LOADED += [{"init_lora_weights": start} for start in (False, "gaussian", "orthogonal")]
LOADED += [{"use_dora": True, "use_rslora": True}, {"lora_alpha": 0.5}]
WRITTEN = [{"target_modules": ["v_proj", "q_proj", "v_proj"]}, {"lora_dropout": 0, "revision": "a"}]
WRITTEN += [{"task_type": None, "modules_to_save": []}, {"auto_mapping": {"unsloth_fixed": True}}]
ADDED = ["target_parameters use_qalora qalora_group_size peft_version"]  # by versions after 0.15
ADDED += ["eva_config corda_config exclude_modules lora_bias trainable_token_indices"]  # 0.10
ADDED += ["use_rslora use_dora layer_replication"]  # 0.7
ADDED += ["rank_pattern alpha_pattern loftq_config megatron_config megatron_core auto_mapping"]
ADDED += ["revision layers_to_transform layers_pattern"]  # 0.3
for n in range(len(ADDED)):
    WRITTEN.append(dict.fromkeys(" ".join(ADDED[: n + 1]).split(), ...))
WRITTEN.append(WRITTEN[-1] | {"enable_lora": None, "merge_weights": False})  # 0.2
CASES = [*((settings, {}) for settings in LOADED), *(({}, config) for config in WRITTEN)]


@pytest.mark.parametrize("settings, config", CASES, ids=str)
def test_trap_9_a_published_folder_trains_as_in_peft(tiny_checkpoint, tmp_path, settings, config):
    """Logits and gradients, with PEFT's dropout masks; then what we wrote, and other spellings."""
    folder = tiny_checkpoint("llama" if "target_modules" in settings else "qwen3")
    reference, model = published(folder, tmp_path, config, **settings), loaded(folder, tmp_path)
    want, found, base = theirs(reference), attached(model), logits(model)
    assert equal(found, want)
    torch.manual_seed(1)
    ours = model.train().logits(model(TOKENS))
    torch.manual_seed(1)
    wanted = reference.train()(TOKENS).logits
    close(ours, wanted, 3e-5)
    assert torch.equal(ours, base) == (not model.adapter_config.dropout)
    (loss_of(ours) + loss_of(wanted)).backward()
    for name, p in want.items():
        assert p.grad.any()
        close(found[name].grad, p.grad, 2e-4, name)
    save_adapter(model, tmp_path / "again")
    close(logits(loaded(folder, tmp_path / "again")), base, 1e-6)
    file, end = tmp_path / "adapter_model.safetensors", "_vector.weight"
    tensors = load_file(file).items()
    save_file({name.replace("_vector", end): t.bfloat16() for name, t in tensors}, file)
    rounded = {name: p.bfloat16().float() for name, p in want.items()}
    assert equal(attached(loaded(folder, tmp_path)), rounded)


A, B, M = (f"{FIRST}lora_{end}" for end in ("A.weight", "B.weight", "magnitude_vector"))
REFUSED = [({"target_modules": n}, {}, f"missing: {A}") for n in (Q[1:], r".*[12]\..*q_proj")]
REFUSED += [({"layers_to_transform": layers}, {}, "missing: ") for layers in (0, [1, 2])]
REFUSED += [({"exclude_modules": names}, {}, f"missing: {A}") for names in (Q[:1], r".*\.0\..*")]
REFUSED += [({"rank_pattern": {key: 2}}, {}, "rank_p.*one value") for key in ("q_proj", Q[0])]
REFUSED += [({"alpha_pattern": {key: 3}}, {}, "alpha_p.*one value") for key in ("q_proj", Q[0])]
REFUSED += [({"init_lora_weights": start}, {}, f"init.*{start}") for start in ("pissa", "olora")]
REFUSED += [({}, {"init_lora_weights": start}, "init") for start in ("pissa_niter_16", "loftq")]
REFUSED += [({"target_modules": ["q_proj", "lm_head"]}, {}, "lm_head")]
REFUSED += [({"target_modules": ["q_proj", "embed_tokens"]}, {}, "unexpected: .*embed_tokens")]
SAVE, BIAS, DORA = {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"use_dora": True}
REFUSED += [(SAVE, {}, "modules_to_save"), (SAVE, {"modules_to_save": None}, "unexpected: .*head")]
REFUSED += [(BIAS, {}, "lora_bias"), (BIAS, {"lora_bias": False}, f"unexpected: {FIRST}lora_B.b")]
REFUSED += [(DORA, {"use_dora": False}, f"unexpected: {M}"), ({}, DORA, f"missing: {M}")]
REFUSED += [({}, {"r": 8}, f"shape: {B}"), ({}, {"r": None}, "expected r, lora_alpha")]
REFUSED += [({}, {"r": "4"}, "expected r, lora"), ({}, {"lora_alpha": None}, "expected r, lora")]
REFUSED += [({}, {"lora_alpha": "8"}, "json: "), ({}, {"lora_dropout": "x"}, "json: ")]
REFUSED += [({}, {"alpha_pattern": {"(": 3}}, "json: "), ({}, {"rank_pattern": ["a"]}, "json: ")]
OTHER = [{"peft_type": "LOHA"}, {"use_qalora": True}, {"alora_invocation_tokens": [3, 4]}]
OTHER += [{"target_parameters": ["q_proj.weight"]}, {"arrow_config": {"top_k": 3}}]
OTHER += [{"trainable_token_indices": [1]}, {"layer_replication": [[0, 2]]}, {"of_tomorrow": 3}]
REFUSED += [({}, config, "nothing like .*" + "".join(config)) for config in OTHER]


@pytest.mark.parametrize("settings, config, words", REFUSED, ids=str)
def test_a_published_folder_that_computes_something_else(folder, tmp_path, settings, config, words):
    published(folder, tmp_path, config, **settings)
    refused(words, load_adapter, load_model(folder), tmp_path)


OTHER_SIDE = TalanConfig((0.5, 0), "attention", 3, 4, "mlp", "bounded", 0.3, 0.5, 0.0)


@pytest.mark.parametrize("side", [None, SIDE, OTHER_SIDE], ids=str)
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_trap_14_a_round_trip_is_bit_equal_and_peft_reads_it(folder, kind, side, tmp_path):
    """Settings, and so the scale, and tensors; the side path is in files unknown to PEFT."""
    model, adapter = load_model(folder), AdapterConfig(kind, 4, 7.0, 0.25, ("v_proj", "down_proj"))
    if kind == "none" and not side:
        attach(model, None, None, "full")
        refused("nothing to save", save_adapter, model, tmp_path)
        return
    attach(model, adapter, side)
    for step in (2, 9, 10):
        save_adapter(stir(model), tmp_path / f"step-{step}")
    again = load_model(folder)
    trainable = load_adapter(again, tmp_path, "full")  # the newest: 10
    assert equal(attached(again), attached(model)) and torch.equal(logits(again), logits(model))
    assert [id(p) for p in trainable] == [id(p) for p in again.parameters()]
    assert not side or again.talan_config == dataclasses.replace(side, layers=side.resolve(3))
    assert len([*(tmp_path / "step-10").iterdir()]) == 2 * ((kind != "none") + bool(side))
    if kind != "none":
        base = AutoModelForCausalLM.from_pretrained(folder)
        reference = peft.PeftModel.from_pretrained(base, tmp_path / "step-10").eval()
        for block in model.model.layers:
            block.side_path = None
        assert again.adapter_config == adapter and equal(theirs(reference), attached(model))
        close(logits(model), reference(TOKENS).logits, 3e-5)


def test_bad_tensors_are_all_listed(folder, tmp_path):
    save_adapter(build(folder, "dora", SIDE), tmp_path)
    files = [tmp_path / name for name in ("adapter_model.safetensors", "talan.safetensors")]
    adapter, side = (load_file(file) for file in files)
    adapter |= {FIRST + "lora_E": torch.zeros(2), B: torch.zeros(1, 4)}  # copy_ would broadcast
    adapter[M][3], side[PATH + "w_gate"][0] = math.nan, -math.inf
    side |= {PATH + "slots": torch.zeros(1, 4), PATH + "w_key": side[PATH + "w_key"].int()}
    side["x"] = side.pop(PATH + "w_out")
    del adapter[A]
    for file, tensors in zip(files, (adapter, side)):
        save_file(tensors, file)
    wrong = [f"missing: {A}", f"missing: {PATH}w_out", "unexpected: x", f"dtype: {PATH}w_key"]
    wrong += [f"not finite: {M}", f"not finite: {PATH}w_gate", f"unexpected: {FIRST}lora_E"]
    wrong += [f"shape: {B} is (1, 4)", f"shape: {PATH}slots is (1, 4)"]
    lines = [f"(?=.*\n  {re.escape(line)})" for line in wrong]
    refused("(?s)^" + "".join(lines), load_adapter, load_model(folder), tmp_path)


BAD_SIDE = [{"mixer": "conv"}, {"layers": [3]}, {"hidden_size": 64}, {"heads": 3}, {"bound": None}]
BAD_SIDE += [{"slots": 5}, {"width": -1}, {"site": "mlp"}, {"layers": []}, {"grad_scale": ...}]


def test_broken_stale_and_half_written_files(folder, tiny_checkpoint, tmp_path, monkeypatch):
    model, bare = build(folder, side=SIDE), load_model(folder)
    for config in BAD_SIDE:
        save_adapter(model, tmp_path)
        edit_json(tmp_path / "talan_config.json", config)
        refused("".join(config) + "|side_path.slots", load_adapter, bare, tmp_path)
    save_adapter(model, tmp_path)
    for kind, side, stale in (("lora", None, "talan.saf"), ("none", SIDE, "adapter_model.saf")):
        refused(stale, save_adapter, build(folder, kind, side), tmp_path)
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    retold = tiny_checkpoint(pad_token_id=3)  # which leaves the computation alone
    (retold / "tokenizer.json").write_text("{}")
    others = retold, tiny_checkpoint("llama", head_dim=16), tiny_checkpoint(rope_parameters=rope)
    for other in others:
        refused("another config or tokenizer", load_adapter, load_model(other), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(talan, "save_file", lambda _, file, **options: file.write_bytes(b"half") / 0)
        save_adapter(stir(build(folder, side=SIDE)), tmp_path)
    assert equal(attached(loaded(folder, tmp_path)), attached(model))
    assert {p.name for p in tmp_path.iterdir()} == {*talan.ADAPTER_FILES, *talan.TALAN_FILES}
    for name in (talan.ADAPTER_FILES[0], talan.TALAN_FILES[0]):
        (tmp_path / name).unlink()
        refused(name, load_adapter, bare, tmp_path)
        save_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    (tmp_path / "talan.safetensors").unlink()
    refused("expected adapter_model.safetensors or talan.safe", load_adapter, bare, tmp_path)


@kinds
def test_trap_11_biases_survive_and_merge_keeps_logits_and_side_path(folder, kind, tmp_path):
    """Nor does any mode, forward pass or merged_weight() touch a weight before the merge."""
    model, again = load_model(folder), load_model(folder)
    for seed, block in enumerate([*model.model.layers, *again.model.layers]):
        linear, block.self_attn.q_proj = block.self_attn.q_proj, torch.nn.Linear(48, 64)
        block.self_attn.q_proj.weight = linear.weight
        block.self_attn.q_proj.bias.data = randn(64, seed=seed % 3).float()
    base = logits(model)
    attach(model, AdapterConfig(kind, 4, 7.0, dropout=0.5), SIDE)
    close(logits(model), base, 1e-6)  # another order of the sums with b
    save_adapter(stir(model), tmp_path)
    load_adapter(again, tmp_path)
    before, stand, want = logits(model), snapshot(model), dict(talan.backbone_weights(model))
    assert torch.equal(logits(again), before) and not torch.equal(logits(model.train()), before)
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            want[name + ".weight"] = module.merged_weight()
    assert torch.equal(logits(model.eval()), before) and snapshot(model) == stand
    talan.merge_adapter(model)
    close(logits(model), before, 3e-5)
    assert equal(talan.backbone_weights(model), want)
    assert equal(attached(model), {n: p for n, p in attached(again).items() if ".side_path." in n})
    for bare in (model, load_model(folder)):
        refused("no adapter", talan.merge_adapter, bare)


def test_trap_11_the_command(folder, tmp_path, monkeypatch):
    """transformers reads what it writes; a side path is dropped when asked; errors are a line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(folder)
    model = build(folder, "dora", SIDE)
    save_adapter(model, "a")
    save_adapter(build(folder, "none", SIDE), "side")
    model.model.layers[1].side_path = None
    flags = "--backbone m --adapter a --out out --drop-side-path".split()
    command = [sys.executable, talan.__file__, "merge", *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "wrote out" in printed and float(printed.split()[-1]) < 1e-4
    close(AutoModelForCausalLM.from_pretrained("out")(TOKENS).logits, logits(model), 3e-5)
    close(logits(load_model("out")), logits(model), 3e-5)
    wrong = {"form; --drop-side": "m a new", "found 'out'": "m a out", "nobody": "nobody a new"}
    wrong |= {"nowhere": "m nowhere new", "no adapter": "m side new --drop-side-path"}
    for words, text in wrong.items():
        flags = "--backbone {} --adapter {} --out {} {}".format(*text.split(), "").split()
        with pytest.raises(SystemExit, match=f"^merge: .*{words}.*$"):
            talan.run_script(talan.merge_command, talan.MergeSettings, "merge", flags)
    assert not (tmp_path / "new").exists()
