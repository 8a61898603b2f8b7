"""model.py and common.py: parity with transformers, configs, loading, cache, generation, files.

Models have random weights, norms, adapters and side paths too: zeros and ones hide wiring bugs.
Equal up to rounding: within 2^-15 of the largest value, 500 float32 roundings of 2^-24.
"""

import gzip
import json
import pickle
import random
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from common import atomic, choose_device, choose_dtype, generator, parse_cli, read_json, read_lines
from common import ROOT, run_script, setting
from data.chat import load_tokenizer
from model import Cache, Decoder, ModelConfig, RMSNorm, SwiGLU, Transformer
from model import generate, load_model, resolve_folder, sample_token, save_model
from talan import AdapterConfig, TalanConfig, attach

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def close(a, b):
    """Equal up to rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 2**-15 * b.abs().max())


def refuses(message, call, *arguments, **options):
    """The call raises a ValueError of this message."""
    with pytest.raises(ValueError, match=message):
        call(*arguments, **options)


def ragged(count, low=1, high=13, seed=0):
    """Rows of low to high random ids."""
    draw = random.Random(seed)
    return [draw.choices(range(97), k=draw.randint(low, high)) for _ in range(count)]


def transformers_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def continued(theirs, prompt, steps, **options):
    """The greedy tokens of transformers behind one prompt."""
    ids, options = torch.tensor([prompt]), {"do_sample": False, "pad_token_id": 0, **options}
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, **options)
    return out[0, len(prompt) :].tolist()


# ---- parity with transformers ----


def old_spelling(raw):
    """transformers 5's config.json -> transformers 4's, without what is the default."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    raw["torch_dtype"] = raw.pop("dtype")
    if raw["head_dim"] == raw["hidden_size"] // raw["num_attention_heads"]:
        del raw["head_dim"], raw["num_key_value_heads"]


ROPE = {"rope_type": "default", "rope_theta": 5e4}
WIDE = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}
PARITY = {  # kind, fields, edit of the config.json that ours reads; transformers reads the unedited
    "tied, head_dim is not hidden / heads": ("qwen3", TIED, dict),
    "untied, one group": ("qwen3", {"num_key_value_heads": 1, "head_dim": 24, **UNTIED}, dict),
    "eps": ("qwen3", {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-3}, dict),
    "sharded": ("qwen3", {"shards": True, **UNTIED}, dict),
    "old spelling of theta": ("qwen3", {"rope_parameters": ROPE}, old_spelling),
    "llama, tied": ("llama", {"rope_parameters": ROPE, **TIED}, dict),
    "llama, explicit head_dim": ("llama", {"num_key_value_heads": 1, "head_dim": 20}, dict),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}, dict),
    "llama3 scaling, other numbers": ("llama", {"head_dim": 32, "rope_parameters": WIDE}, dict),
    "old spelling": ("llama", {"num_key_value_heads": 4, "rope_parameters": LLAMA3}, old_spelling),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PARITY)
def test_trap_13_hidden_states_and_logits_equal_transformers(name, tiny_checkpoint, tmp_path):
    """Trap 13 in the spellings; bfloat16 rounds in the same places, so arg maxima are the same."""
    kind, fields, edit = PARITY[name]
    folder = tiny_checkpoint(kind, **fields)
    mine, theirs = shutil.copytree(folder, tmp_path / "mine"), transformers_model(folder)
    assert (mine / INDEX).exists() == (name == "sharded")
    raw = json.loads((mine / "config.json").read_text())
    edit(raw)
    (mine / "config.json").write_text(json.dumps(raw))
    ours, layers = load_model(mine), []
    for layer in ours.model.layers:
        layer.register_forward_hook(lambda _, __, out: layers.append(out))
    tokens = torch.randint(97, (1, 700), generator=torch.Generator().manual_seed(1))
    hidden, out = ours(tokens), theirs(tokens, output_hidden_states=True)
    for found, expected in zip([*layers[:-1], hidden], out.hidden_states[1:], strict=True):
        assert close(found, expected)
    assert close(ours.logits(hidden), out.logits)
    ours, theirs = load_model(mine, dtype="bfloat16"), transformers_model(folder, torch.bfloat16)
    same = ours.logits(ours(tokens)).argmax(-1) == theirs(tokens).logits.argmax(-1)
    assert same.float().mean() > 0.9  # against float32 it is 0.95: kernels may round otherwise


# ---- config.json ----

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
QWEN3 = {"model_type": "qwen3", **SIZES, "rms_norm_eps": 1e-5, "rope_theta": 1e6, **TIED}
SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
YARN, LINEAR = {"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}
ROPES = ("linear", YARN, LINEAR, {"type": "llama3"}, {**SCALING, "type": "yarn"})
ROPES += ({**SCALING, "x": 2.0},)
NUMBERS = ("pretraining_tp", "attention_dropout", "partial_rotary_factor")
SWITCHES = ("attention_bias", "mlp_bias", "use_sliding_window", "rope_interleaved")
REFUSED = {  # a field of config.json -> values that the error names it for
    **dict.fromkeys(SIZES, (-1, 1 << 40, "97", 97.5, True, [97])),
    **dict.fromkeys(SWITCHES, (True,)),
    **dict.fromkeys(NUMBERS, (0.5, 2)),
    "hidden_size": (None, 0),
    "model_type": (None, "qwen2", "qwen3_moe", "mistral", ["llama"]),
    "hidden_act": ("gelu", "relu"),
    "layer_types": (["full_attention", "sliding_attention"], "sliding_attention"),
    "quantization_config": ({"quant_method": "gptq"},),
    "rope_scaling": ROPES,
    "rope_parameters": (*ROPES, {"full_attention": ROPE}, {**ROPE, "partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_named(name):
    for value in REFUSED[name]:
        said = "rope" if value in REFUSED["rope_parameters"] else name
        refuses(f"^here: {said}", ModelConfig.from_dict, QWEN3 | {name: value}, "here")


ACCEPTED = [  # fields that change nothing
    {"architectures": ["Qwen3ForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}, "dtype": "bfloat16"},
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "prefix": ""},
    {"layer_types": ["full_attention"] * 3, "hidden_act": "silu", "pretraining_tp": 1},
    {"quantization_config": {}, "layer_types": [], "rope_scaling": {}, "rope_parameters": {}},
    {"rope_scaling": {"rope_type": "default"}, "attention_bias": False, "attention_dropout": 0.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    {"eos_token_id": [2, 3], "pad_token_id": None, "num_experts": None, "is_llama_config": True},
]
UNKNOWN = {"num_experts": 8, "logit_scale": 0.5, "my_note": "x", "clip_qkv": None, "moe": []}
WARNING = "warning: here: ignored: logit_scale, my_note, num_experts\n"


@pytest.mark.parametrize("extra", [*ACCEPTED, UNKNOWN], ids=str)
def test_other_fields_change_nothing_and_unknown_ones_are_named_in_one_warning(extra, capsys):
    assert ModelConfig.from_dict(QWEN3 | extra, "here") == ModelConfig.from_dict(QWEN3)
    assert capsys.readouterr().err == (WARNING if extra is UNKNOWN else "")


def test_sizes_that_are_absent():
    raw = {key: value for key, value in QWEN3.items() if key not in ("head_dim", "rms_norm_eps")}
    assert ModelConfig.from_dict(raw).head_dim == 128  # Qwen3's default
    llama = ModelConfig.from_dict(raw | {"model_type": "llama", "num_key_value_heads": None})
    assert (llama.head_dim, llama.num_key_value_heads, llama.rms_norm_eps) == (12, 4, 1e-6)
    spelt = [{"rope_scaling": SCALING}, {"rope_parameters": LLAMA3}, {"rope_scaling": LLAMA3}]
    assert len({ModelConfig.from_dict(QWEN3 | {"rope_theta": 1e4, **each}) for each in spelt}) == 1


# ---- loading: one set of names against another ----

NORM, TABLE, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
UNFIT = {  # a tensor of a file, what it is there, what is said of it
    NORM: (None, "missing"),
    "model.layers.2.mlp.up_proj.weight": (None, "missing"),
    "model.layers.0.self_attn.q_proj.bias": (torch.zeros(64), "unexpected"),
    "model.layers.3.mlp.up_proj.weight": (torch.zeros(80, 48), "unexpected"),
    "model.layers.0.self_attn.q_norm.weight": (torch.ones(1), "shape"),  # copy_ would broadcast it
    "model.layers.1.mlp.down_proj.weight": (torch.zeros(80, 48), "shape"),
    "model.layers.1.self_attn.k_proj.weight": (torch.zeros(32, 48, dtype=torch.int8), "dtype"),
}


def test_one_error_lists_every_tensor_that_does_not_fit(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "copy")
    tensors = load_file(folder / WHOLE) | {name: tensor for name, (tensor, _) in UNFIT.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / WHOLE)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    lines = [line.split()[:2] for line in str(error.value).splitlines()[1:]]
    assert sorted(lines) == sorted([f"{said}:", name] for name, (_, said) in UNFIT.items())


OUTSIDE = ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", 3)
SHARDS = dict.fromkeys(OUTSIDE, "expected a weight_map of names to files of this folder")
SHARDS |= dict.fromkeys(("", "..", "absent", "config.json"), "expected a safetensors file")


def test_an_index_that_leads_elsewhere_and_a_stale_one(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen3", shards=True, **UNTIED), tmp_path / "copy")
    raw = json.loads((folder / INDEX).read_text())
    for shard, message in SHARDS.items():
        (folder / INDEX).write_text(json.dumps({"weight_map": raw["weight_map"] | {NORM: shard}}))
        refuses(message, load_model, folder)
    for text in ("[]", "{}", '{"weight_map": []}', "{", ""):
        (folder / INDEX).write_text(text)
        refuses("index.json: expected a", load_model, folder)
    shutil.copy(tiny_checkpoint("qwen3", **UNTIED) / WHOLE, folder)
    load_model(folder)  # the whole file counts, whatever the index beside it


def test_unreadable_and_pickled_weights_are_refused_and_never_unpickled(tiny_checkpoint, tmp_path):
    folder, mark = shutil.copytree(tiny_checkpoint(), tmp_path / "copy"), tmp_path / "mark"
    pickled = f"cbuiltins\nopen\n(V{mark}\nVw\ntR.".encode()  # unpickled, it makes that file
    content = (folder / WHOLE).read_bytes()
    (folder / "pytorch_model.bin").write_bytes(pickled)
    for other in (b"", content[:7], content[:-1], content + b"\0", b"x" * 99, pickled):
        (folder / WHOLE).write_bytes(other)
        refuses("model.safetensors: .*pickled weights are never read", load_model, folder)
    (folder / WHOLE).unlink()
    refuses("model.safetensors: .*pickled weights are never read", load_model, folder)
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists()  # so it would be there


def test_a_tied_head_must_equal_the_embedding_and_an_untied_one_be_there(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen3", **TIED), tmp_path / "copy")
    tensors = load_file(folder / WHOLE)
    table = tensors[TABLE]
    known = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # in files of old
    save_file(tensors | {HEAD: table.clone()} | known, folder / WHOLE)
    assert HEAD not in dict(load_model(folder).named_parameters())
    for other in (table + 1e-3, table[:96].clone(), table.to(torch.int8)):
        save_file(tensors | {HEAD: other}, folder / WHOLE)
        refuses(f"unexpected: {HEAD}", load_model, folder)
    save_file(tensors, folder / WHOLE)
    (folder / "config.json").write_text(json.dumps(QWEN3 | UNTIED))
    refuses(f"missing: {HEAD}", load_model, folder)


def test_no_such_folder():
    for path in ("./absent", "/absent/folder", "a/b/c", "absent", __file__):
        refuses("expected a folder or a Hugging Face id owner/name", resolve_folder, path)
    refuses("no/where: no such folder, and not to be had from the hub", resolve_folder, "no/where")


def test_a_saved_model_is_one_that_transformers_loads(tiny_checkpoint, tmp_path):
    model, tokens = load_model(tiny_checkpoint(), dtype="bfloat16"), torch.tensor(ragged(1, 9, 9))
    save_model(model, tmp_path / "saved", dict(model.named_parameters()))
    file, theirs = tmp_path / "saved" / WHOLE, transformers_model(tmp_path / "saved")
    content, again = file.read_bytes(), load_model(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint != "" and not again.training
    for name, p in again.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, model.get_parameter(name))
        p.data += 1  # the file itself, mapped
    assert file.read_bytes() == content
    again = load_model(tmp_path / "saved", dtype="float32")
    assert close(again.logits(again(tokens)), theirs(tokens).logits)
    assert torch.equal(again.inverse_frequencies, model.bfloat16().inverse_frequencies)
    refuses("expected a model", save_model, Transformer(model.config), tmp_path / "other", {})
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# ---- cache: any split of ragged rows, padded on the right, equals one full pass (trap 12) ----

SIDES = {"bare": None, "block": ("mlp", "gate"), "attention": ("attention", "bounded")}


@pytest.fixture(params=SIDES)
def either(request, tiny_checkpoint):
    """A model without, and with an adapter and two side paths, all moved from their start."""
    model, draw = load_model(tiny_checkpoint("qwen3", **TIED)), torch.Generator().manual_seed(9)
    if SIDES[request.param]:
        talan = TalanConfig((0, 2), request.param, 3, 10, *SIDES[request.param])
        for p in attach(model, AdapterConfig("dora", rank=4, alpha=8, dropout=0.5), talan):
            p.data += 0.2 * torch.randn(p.shape, generator=draw)
    return model


@torch.no_grad()
def feed(model, rows, chunks, cache, garbage=0):
    """Hidden states (n,D) of each row, chunk after chunk through the cache; pads are random ids."""
    at, parts = [0] * len(rows), [[] for _ in rows]
    for chunk in chunks:
        tokens = torch.tensor(ragged(len(rows), max(chunk), max(chunk), garbage))
        for b, n in enumerate(chunk):
            tokens[b, :n] = torch.tensor(rows[b][at[b] : at[b] + n])
            at[b] += n
        hidden = model(tokens, cache, torch.tensor(chunk) if len(set(chunk)) > 1 else None)
        for b, n in enumerate(chunk):
            parts[b].append(hidden[b, :n])
    return [torch.cat(part) for part in parts]


@torch.no_grad()
def alone(model, row):
    """Hidden states (n,D) of one row in one pass without a cache."""
    return model(torch.tensor([row]))[0]


SPLITS = [  # real tokens of each row in each call
    [[11] * 3, [1] * 3],
    [[1] * 3] * 12,
    [[3, 1, 4], [0, 2, 1], [1, 0, 0], [1, 1, 1]],
    [[0, 4, 2], [5, 1, 1], [2, 6, 1]],
    [[127, 120, 3], [2, 9, 1], [21, 21, 21]],  # over the side path's chunks of 128 tokens
]


@pytest.mark.parametrize("chunks", SPLITS, ids=str)
def test_trap_12_any_split_equals_the_full_pass(either, chunks):
    rows = [row[: sum(lengths)] for row, lengths in zip(ragged(3, 160, 160), zip(*chunks))]
    runs = []
    for garbage in (1, 2):
        cache = Cache(either.config, 3, max(map(len, rows)) + max(chunks[-1]))
        runs.append(feed(either, rows, chunks, cache, garbage))
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == [len(row) for row in rows]
        for state in cache.side.values():
            runs[-1] += state
    assert all(close(found, alone(either, row)) for found, row in zip(runs[0], rows))
    assert all(map(torch.equal, *runs))  # whatever the pads are


def test_rows_are_written_and_selected(either):
    old, new, rest = ragged(4, 8, 8), ragged(2, 3, 6, seed=5), ragged(3, 3, 3, seed=6)
    cache, part = Cache(either.config, 4, 20), Cache(either.config, 2, 6)
    feed(either, old, [[8, 3, 7, 5]], cache)
    feed(either, new, [[len(row) for row in new]], part)
    cache.write_rows([3, 1], part)
    cache.select_rows([1, 2, 3])
    rows = [new[1] + rest[0], old[2][:7] + rest[1], new[0] + rest[2]]
    found = feed(either, rest, [[1] * 3, [2] * 3], cache)
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert all(close(a, alone(either, row)[-3:]) for a, row in zip(found, rows))


def test_a_full_cache_and_wrong_shapes_raise(either):
    cache, ids = Cache(either.config, 2, 10), torch.zeros(2, 9, dtype=torch.int64)
    either(ids, cache, torch.tensor([9, 2]))
    for tokens in (ids[:, :2], ids.view(9, 2)[:3, :1]):
        refuses("the cache has room for 2 rows x 1 tokens", either, tokens, cache)
    assert cache.lengths.tolist() == [9, 2]
    for tokens, lengths in ((ids[0], None), (ids, torch.tensor([1, 2, 3]))):
        refuses("expected tokens", either, tokens, None, lengths)


def test_swiglu_and_rmsnorm_gradients():
    draw = torch.Generator().manual_seed(0)
    g, u = torch.randn(2, 3, 5, dtype=torch.float64, generator=draw).requires_grad_().unbind()
    norm = RMSNorm(5, 1e-3).double()
    norm.weight.data = g.detach()[0]
    assert close(SwiGLU.apply(g, u), g * g.sigmoid() * u)
    assert close(norm(u), g[0] * u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert torch.autograd.gradcheck(SwiGLU.apply, (g, u))
    assert torch.autograd.gradcheck(lambda x, w: functional_call(norm, {"weight": w}, x), (u, g[0]))


def test_a_bfloat16_norm_keeps_no_float32_copy():
    """Its gradient is that of float64, but for bfloat16's rounding."""
    kept, x = [], torch.randn(2, 3, 64, generator=generator("norm")).bfloat16().requires_grad_()
    x64, norm = x.detach().double().requires_grad_(), RMSNorm(64, 1e-3).bfloat16()
    dy = torch.randn(2, 3, 64, generator=generator("dy")).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x)
    (x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt()).backward(dy.double())
    y.backward(dy)
    assert torch.equal(y, torch.nn.functional.rms_norm(x, (64,), eps=1e-3))
    assert (x.grad.double() - x64.grad).abs().max() <= 2**-8 * x64.grad.abs().max()
    assert {t.dtype for t in kept} == {torch.bfloat16}


def test_checkpointing_gives_the_same_gradients(either):
    """Recomputing over a frozen backbone needs use_reentrant=False: else none arrives at all."""
    learning, grads = [p for p in either.parameters() if p.requires_grad], []
    for either.checkpointing in (True, False):
        for cache in (None, Cache(either.config, 2, 9)):
            logits = either.logits(either(torch.tensor(ragged(2, 9, 9)), cache))
            grads.append(torch.autograd.grad(logits.logsumexp(-1).sum(), learning))
    assert all(g.abs().max() > 0 for g in grads[0])
    assert all(all(map(close, grads[0], other)) for other in grads[1:])


def test_greedy_tokens_equal_transformers_whatever_the_batch(tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama", rope_parameters=LLAMA3))
    theirs, prompts = transformers_model(model.folder), ragged(14, high=40)
    free = generate(model, prompts, 12)
    eos = sorted({free[0][0], free[3][3], free[5][6]})
    answers = [continued(theirs, prompt, 12, eos_token_id=eos) for prompt in prompts]
    assert {1, 12} < {len(row) for row in answers}  # rows that stop at once, later and never
    assert all(row[-1] in eos or len(row) == 12 for row in answers)  # and keep their stop id
    for rows, budget in ((1, 8192), (3, 8192), (5, 1), (16, 60)):
        options = {"batch_rows": rows, "prefill_tokens": budget}
        assert generate(model, prompts, 12, eos_ids=iter(eos), **options) == answers


@torch.no_grad()
def test_refilled_rows_equal_one_by_one_and_the_uncached_loop(either):
    prompts, options = ragged(7, 1, 12), {"ended": lambda ids: ids[-1] % 7 == 0}
    expected = [generate(either, [prompt], 7, **options)[0] for prompt in prompts]
    assert len({len(row) for row in expected}) > 1
    for rows in (3, 16):
        assert generate(either, prompts, 7, batch_rows=rows, **options) == expected
    for prompt, row in zip(prompts, expected):
        states = alone(either, prompt + row)[len(prompt) - 1 : -1]
        assert either.logits(states).argmax(-1).tolist() == row


SAMPLING = {"temperature": 1.5, "top_p": 0.9, "seed": 3}


def test_draws_depend_on_seed_prompt_and_step_alone(tiny_checkpoint):
    model, prompts, state = load_model(tiny_checkpoint()), ragged(9, high=20), torch.get_rng_state()
    expected = generate(model, prompts, 9, **SAMPLING)
    for rows, budget in ((1, 8192), (4, 1), (16, 30)):
        options = {"batch_rows": rows, "prefill_tokens": budget, **SAMPLING}
        assert generate(model, prompts, 9, **options) == expected
    assert generate(model, prompts[5:], 9, numbers=range(5, 9), **SAMPLING) == expected[5:]
    assert generate(model, prompts, 4, **SAMPLING) == [row[:4] for row in expected]
    assert generate(model, prompts, 9, **{**SAMPLING, "seed": 4}) != expected
    repeated = generate(model, prompts[:1] * 6, 9, **SAMPLING)
    assert len(set(map(tuple, repeated))) == 6  # the same prompt at other indices draws otherwise
    for t, p in ((1e-6, 1.0), (5e-324, 1.0), (1.0, 1e-9)):
        assert generate(model, prompts, 5, temperature=t, top_p=p) == generate(model, prompts, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_p_equals_a_plain_implementation():
    draw = random.Random(0)
    for _ in range(300):
        logits = torch.tensor([[draw.gauss(0, 2) for _ in range(9)]], dtype=torch.float64)
        temperature, top_p = draw.choice((0.5, 1, 2)), draw.choice((0.1, 0.5, 0.9, 1.0))
        p, nucleus, total = (logits[0] / temperature).softmax(-1).tolist(), [], 0.0
        for i in sorted(range(9), key=lambda i: -p[i]):
            if total < top_p:  # the fewest that reach top_p
                nucleus, total = [*nucleus, i], total + p[i]
        u = torch.tensor([draw.random()], dtype=torch.float64)
        left = u.item() * total
        while left >= p[nucleus[0]]:
            left -= p[nucleus.pop(0)]
        assert sample_token(logits, (temperature, top_p), u).item() == nucleus[0]


BAD_SETTINGS = [{"temperature": bad} for bad in (-1.0, float("nan"), float("inf"))]
BAD_SETTINGS += [{"top_p": 0.0}, {"top_p": 1.1}, {"batch_rows": 0}, {"max_new_tokens": -1}]


def test_bad_prompts_and_settings_raise(tiny_checkpoint):
    model = load_model(tiny_checkpoint())
    for prompts in ([[1], []], [[1], [97]], [[1], [3, -1]]):
        refuses("prompt 1: expected ids of the vocabulary", generate, model, prompts, 2)
    for bad in BAD_SETTINGS:
        options = {"prompts": [[1]], "max_new_tokens": 2, **bad}
        refuses("no such values", generate, model, **options)
    assert generate(model, [[1, 2], [3]], 0) == [[], []] and generate(model, [], 5) == []


def test_generating_turns_dropout_off_and_leaves_the_mode_as_it_was(either):
    expected = generate(either, ragged(4), 6)
    assert generate(either.train(), ragged(4), 6) == expected and either.training
    with pytest.raises(ZeroDivisionError):
        generate(either, [[1]], 3, ended=lambda ids: 1 / 0)
    assert {module.training for module in either.modules()} == {True}


class FakeGraph:
    """Capture runs a step and takes back what it did to the device; replay has its addresses."""

    captured, run_step = [], Decoder.step

    def step(decoder, visible, padded):  # noqa: N805
        FakeGraph.decoder, FakeGraph.arguments = decoder, (visible, padded)
        FakeGraph.run_step(decoder, visible, padded)

    def tensors(self):
        cache, decoder = self.decoder.cache, self.decoder
        found = [decoder.last, decoder.live, decoder.u, cache.lengths, *cache.keys, *cache.values]
        found += [tensor for state in cache.side.values() for tensor in state]
        return {tensor.data_ptr(): tensor for tensor in found}

    @contextmanager
    def capture(self):
        self.before = {place: tensor.clone() for place, tensor in self.tensors().items()}
        host, lengths = self.decoder.cache.host_lengths, self.decoder.cache.host_lengths.tolist()
        yield
        for place, tensor in self.tensors().items():
            tensor.copy_(self.before[place])
        assert host.tolist() == lengths
        self.own = self.arguments
        self.captured.append(self.own[0])

    def replay(self):
        assert self.before.keys() == self.tensors().keys()
        assert self.decoder.live.tolist() == [i is not None for i in self.decoder.rows]
        FakeGraph.run_step(self.decoder, *self.own)


@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_cuda_graphs_give_the_tokens_of_single_steps(options, either, monkeypatch):
    """For refilled and dropped rows, and from one bucket of 256 positions to the next."""
    prompts = [row[:n] for n, row in zip((250, 3, 100, 7, 255, 1), ragged(6, 255, 255))]
    options = {"ended": lambda ids: ids[0] % 2 and len(ids) == 5, "batch_rows": 3, **options}
    expected = generate(either, prompts, 14, **options)
    FakeGraph.captured.clear()
    monkeypatch.setattr(Decoder, "step", FakeGraph.step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph.capture)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert generate(either, prompts, 14, **options) == expected
    assert {256, 269} == set(FakeGraph.captured) and len(FakeGraph.captured) < 8


# ---- common.py ----


@dataclass(frozen=True)
class Settings:
    """One of each kind."""

    steps: int = setting(3, "a number, 100 % of them")
    lr: float = setting(1e-4, "a rate")
    name: str = setting("", "a text")
    talan: bool = setting(True, "a switch")
    data: tuple[str, ...] = setting(("a", "b"), "several")


COMMANDS = {
    "": {},
    "--steps 7 --lr 1e-3 --name=x": {"steps": 7, "lr": 1e-3, "name": "x"},
    "--no-talan --data x,y": {"talan": False, "data": ("x", "y")},
    "--talan --data x y": {"talan": True, "data": ("x", "y")},
    "--stepz 7": "prog: unrecognized arguments: --stepz 7",
    "--step 7": "prog: unrecognized arguments: --step 7",
    "--steps seven": "prog: argument --steps: invalid int value: 'seven'",
    "--steps 8": "prog: found 8",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_is_read_or_ends_in_one_sentence(words, capsys):
    def main(overrides):
        raise ValueError(f"found {overrides['steps']}")

    if isinstance(COMMANDS[words], dict):
        assert parse_cli(Settings, "prog", words.split()) == COMMANDS[words]
        return
    with pytest.raises(SystemExit) as end:
        run_script(main, Settings, "prog", words.split())
    assert str(end.value).startswith(COMMANDS[words]) and "\n" not in str(end.value)


def test_atomic_leaves_the_old_or_the_new_and_nothing_else(tmp_path):
    file, folder = tmp_path / "new/file", tmp_path / "new/folder"
    for text in ("old", "new"):
        with atomic(file) as tmp:
            tmp.write_text(text)
            assert not file.exists() or file.read_text() == "old" != text
    for target, begin in ((file, Path.touch), (folder, Path.mkdir)):
        with pytest.raises(ZeroDivisionError), atomic(target) as tmp:
            begin(tmp)
            raise ZeroDivisionError
    assert list(file.parent.iterdir()) == [file] and file.read_text() == "new"
    with atomic(folder) as tmp:
        shutil.copytree(file.parent, tmp, ignore=lambda *_: [tmp.name])
    assert (folder / "file").read_text() == "new"


def test_lines_and_json_are_read_or_refused_with_the_file(tmp_path):
    content, file = b'\xef\xbb\xbf{"a": 1}\n\n \n{"b": 2}', tmp_path / "x.gz"
    (tmp_path / "x.jsonl").write_bytes(content)
    file.write_bytes(packed := gzip.compress(content))
    for path in (tmp_path / "x.jsonl", file):
        assert list(read_lines(path)) == [(f"{path}:1", content[3:12]), (f"{path}:4", content[15:])]
    for damaged in (packed[:-5], packed[:20], content, packed[:9] + b"\xff" * 20):
        file.write_bytes(damaged)
        refuses("x.gz: expected a readable JSONL file", list, read_lines(file))
    for damaged in (b"", b"{", b"[]", b"3", b"\xff\xfe{}", b"[" * 100_000, b"{}{}"):
        file.write_bytes(damaged)
        refuses("x.gz: expected a JSON object", read_json, file)
    refuses("expected a JSON file, found none", read_json, tmp_path)
    refuses("expected a readable JSONL file", list, read_lines(tmp_path / "absent"))


def test_generators_share_no_stream():
    parts = [(0, "a"), (1, "a"), (0, "b"), (0,), (0, "a", 1), ("0", "a")]
    draws = [torch.rand(3, generator=generator(*each)).tolist() for each in parts]
    assert draws[0] == draws[-1] and len(set(map(tuple, draws))) == 5


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = {"cpu": "cpu", "auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    assert {name: str(choose_device(name)) for name in names} == names
    for name in ("nonsense", "", "cuda:x", "cuda:2"):
        refuses("device: ", choose_device, name)
    monkeypatch.setenv("LOCAL_RANK", "1")  # one of torchrun's processes
    assert str(choose_device("auto")) == "cuda:1"
    refuses("device: .*one process", choose_device, "cuda:0")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (choose_dtype("auto", cpu), choose_dtype("auto", gpu)) == (torch.float32, torch.bfloat16)
    refuses("dtype: expected auto, float32 or bfloat16", choose_dtype, "float16", gpu)


SMOLLM2 = ROOT / "data/smollm2/model"
TEXTS = ["What is the capital of France?", "Grüße! 日本? 🗼", "What is 12 * 12?", "Say yes."]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_smollm2_equals_transformers(dtype):
    from transformers import AutoTokenizer

    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("no SmolLM2 here; run: python tests/smollm2.py")
    ours, theirs = load_model(SMOLLM2, dtype=dtype), transformers_model(SMOLLM2, dtype)
    tokenizer, reference = load_tokenizer(SMOLLM2), AutoTokenizer.from_pretrained(SMOLLM2)
    prompts = []
    for text in TEXTS:
        chat = [{"role": "user", "content": text}]
        prompts.append(tokenizer.encode(tokenizer.render(chat, add_generation_prompt=True)))
        ids = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ids == prompts[-1] and reference.decode(ids) == tokenizer.decode(ids)
        mine, other = (net(torch.tensor([ids])) for net in (ours, theirs))
        assert (ours.logits(mine).argmax(-1) == other.logits.argmax(-1)).float().mean() > 0.9
        assert dtype == torch.bfloat16 or close(ours.logits(mine), other.logits)
    if dtype == torch.float32:
        answers = [continued(theirs, prompt, 12) for prompt in prompts]
        assert tokenizer.decode(answers[0]) == "The capital of France is Paris.<|im_end|>"
        assert generate(ours, prompts, 12, eos_ids=tokenizer.eos_ids, batch_rows=3) == answers
