"""model.py against transformers and against itself: parity, cache, loader, config, tokenizer, generation.

Every model here starts from perturbed weights (norm weights, adapters and side path too): zeros and ones hide wiring bugs.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from model import (Cache, ModelConfig, Transformer, choose, choose_device, choose_dtype, generate, inverse_frequencies, keep_freed_memory,
                   load_model, load_tokenizer, pad_rows, resolve_folder, save_model)
from talan import AdapterConfig, TalanConfig, attach

ROOT = Path(__file__).resolve().parents[1]
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def close(a: torch.Tensor, b: torch.Tensor, absolute: float = 1e-4, relative: float = 1e-5) -> bool:
    """Within both bounds, the second one of b's largest value."""
    worst = (a - b).abs().max()
    return a.shape == b.shape and bool(worst <= absolute) and bool(worst <= relative * b.abs().max())


def edited(folder, tmp_path, edit):
    """A copy of a checkpoint folder whose config.json went through edit(dict)."""
    new = shutil.copytree(folder, tmp_path / "edited")
    raw = json.loads((new / "config.json").read_text())
    edit(raw)
    (new / "config.json").write_text(json.dumps(raw))
    return new


def old_spelling(raw, type_key="rope_type"):
    """transformers 5's config.json -> the spelling of transformers 4."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {**rope, type_key: kind}
    raw["torch_dtype"] = raw.pop("dtype")


def without(*names):
    return lambda raw: [raw.pop(name) for name in names]


def ragged(count, low=1, high=13, vocab=97, seed=0):
    """Prompts of mixed lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=draw).tolist()
    return [torch.randint(vocab, (n,), generator=draw).tolist() for n in lengths]


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 1. Parity with transformers
# ---------------------------------------------------------------------------------------------------------------------

PARITY = {  # name: (kind, config fields, edit of the config.json that ours reads; transformers reads the unedited one)
    "qwen3 tied, head_dim is not hidden / heads": ("qwen3", dict(tie_word_embeddings=True), None),
    "qwen3 untied, one group, theta 1e6": (
        "qwen3", dict(num_key_value_heads=1, head_dim=24, tie_word_embeddings=False,
                      rope_parameters=dict(rope_type="default", rope_theta=1e6)), None),
    "qwen3 as many groups as heads, eps 1e-3": ("qwen3", dict(num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-3), None),
    "qwen3 sharded": ("qwen3", dict(shards=True, tie_word_embeddings=False), None),
    "qwen3 old spelling": ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=5e4)), old_spelling),
    "llama plain, tied": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=True), None),
    "llama explicit head_dim, one group": ("llama", dict(num_key_value_heads=1, head_dim=20, rms_norm_eps=1e-5), None),
    "llama3 scaling, factor 8": ("llama", dict(rope_parameters=LLAMA3), None),
    "llama3 scaling, factor 32, explicit head_dim": (
        "llama", dict(head_dim=32, tie_word_embeddings=True,
                      rope_parameters={**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}), None),
    "llama3 old spelling, rope_type": ("llama", dict(rope_parameters=LLAMA3), old_spelling),
    "llama3 old spelling, type": ("llama", dict(rope_parameters=LLAMA3), lambda raw: old_spelling(raw, "type")),
    "llama head_dim absent": ("llama", {}, without("head_dim")),
    "llama head_dim and groups absent, old spelling": (
        "llama", dict(num_key_value_heads=4), lambda raw: (old_spelling(raw), without("head_dim", "num_key_value_heads")(raw))),
}


def layer_outputs(model, run):
    """What each layer returns during run(), and what run() returns."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        result = run()
    for hook in hooks:
        hook.remove()
    return outputs, result


@pytest.mark.parametrize("name", PARITY)
def test_hidden_states_and_logits_equal_transformers(name, tiny_checkpoint, tmp_path):
    kind, fields, edit = PARITY[name]
    folder = tiny_checkpoint(kind, **fields)
    ours, theirs = load_model(edited(folder, tmp_path, edit) if edit else folder), transformers_model(folder)
    tokens = torch.randint(97, (2, 96), generator=torch.Generator().manual_seed(1))
    layers, hidden = layer_outputs(ours, lambda: ours(tokens))
    expected, out = layer_outputs(theirs, lambda: theirs(tokens, output_hidden_states=True))
    assert len(layers) == len(expected) == 3
    for layer, (mine, other) in enumerate(zip(layers, expected)):
        assert close(mine, other), f"layer {layer}"
    assert close(hidden, out.hidden_states[-1])
    assert close(ours.logits(hidden), out.logits)


def test_sharded_checkpoint_really_has_shards(tiny_checkpoint):
    assert len(list(tiny_checkpoint("qwen3", shards=True, tie_word_embeddings=False).glob("model-*.safetensors"))) > 3


def test_llama3_scaling_bites(tiny_checkpoint, tmp_path):
    """Else the parity above would say nothing about it: the same weights without scaling give other logits."""
    folder = tiny_checkpoint("llama", rope_parameters=LLAMA3)
    plain = edited(folder, tmp_path, lambda raw: raw.update(rope_parameters=dict(rope_type="default", rope_theta=1e4)))
    tokens = torch.arange(96)[None]
    scaled, unscaled = (load_model(f) for f in (folder, plain))
    with torch.no_grad():
        assert (scaled.logits(scaled(tokens)) - unscaled.logits(unscaled(tokens))).abs().max() > 0.1
    kept, blended, stretched = ((unscaled.inverse_frequencies / scaled.inverse_frequencies).sub(x).abs() < 1e-3 for x in (1, 3.5, 8))
    assert kept.any() and stretched.any() and not (kept | stretched).all()  # all three bands occur


def test_rotary_tables_are_float32_whatever_the_weights_are(tiny_checkpoint):
    model = load_model(tiny_checkpoint(), dtype=torch.bfloat16)
    ctx = model.context(torch.zeros(1, 300, dtype=torch.int64), None, None)
    assert ctx.cos.dtype == model.inverse_frequencies.dtype == torch.float32
    assert len(ctx.cos[0, 0, :, 0].unique()) > 250  # bfloat16 positions would collide


GENERATION = {"qwen3": ("qwen3", dict(tie_word_embeddings=True)), "llama3 scaling": ("llama", dict(rope_parameters=LLAMA3))}
STEPS = 14


@pytest.fixture(scope="module", params=GENERATION)
def greedy(request, tiny_checkpoint):
    """(model, 18 ragged prompts, stop ids that end rows at different steps, transformers' answers row by row)."""
    kind, fields = GENERATION[request.param]
    folder = tiny_checkpoint(kind, **fields)
    model, theirs, prompts = load_model(folder), transformers_model(folder), ragged(18, high=40)
    free = generate(model, prompts, STEPS)
    eos = sorted({free[0][0], free[3][3], free[5][6], free[7][9]})
    expected = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64), max_new_tokens=STEPS,
                                do_sample=False, eos_token_id=eos, pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    return model, prompts, eos, expected


def test_stop_ids_end_rows_at_different_steps(greedy):
    """The next tests need it: rows that stop at once, later and never, and more prompts than rows."""
    lengths = [len(answer) for answer in greedy[3]]
    assert len(set(lengths)) >= 4 and 1 in lengths and STEPS in lengths


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_greedy_generation_equals_transformers_for_ragged_batches(greedy, rows):
    model, prompts, eos, expected = greedy
    assert generate(model, prompts, STEPS, eos_ids=eos, batch_rows=rows) == expected


def test_each_row_equals_itself_alone(greedy):
    """Short rows of a batch continue from their own last token, not from column -1."""
    model, prompts, eos, _ = greedy
    together = generate(model, prompts, STEPS, eos_ids=eos, batch_rows=5)
    assert together == [generate(model, [p], STEPS, eos_ids=eos)[0] for p in prompts]


def test_a_late_refill_outlives_the_longest_row(greedy):
    """The longest prompt ends while two late rows still run: an idle row that advanced would run out of the cache."""
    model, pool = greedy[0], ragged(150, 1, 12, seed=3)
    free = generate(model, pool, STEPS)
    eos = max(range(97), key=lambda token: sum(token in row[4:11] and token not in row[:4] for row in free))
    stopping = [p for p, row in zip(pool, free) if eos in row[4:11] and eos not in row[:4] and 5 <= len(p) < 12][:2]
    running = [p for p, row in zip(pool, free) if eos not in row]
    prompts = [next(p for p in running if len(p) == 12), *stopping, *[p for p in running if len(p) < 5][:2]]
    assert len(prompts) == 5
    expected = [generate(model, [p], STEPS, eos_ids=[eos])[0] for p in prompts]
    assert [len(row) == STEPS for row in expected] == [True, False, False, True, True]
    assert generate(model, prompts, STEPS, eos_ids=[eos], batch_rows=3) == expected


# ---------------------------------------------------------------------------------------------------------------------
# 2. Cache
# ---------------------------------------------------------------------------------------------------------------------

def perturbed(folder, site="block", mixer="mlp", writeback="gate", kind="dora"):
    """A model with an adapter and a side path at two layers, every trainable tensor moved away from its start."""
    model = load_model(folder)
    trainable = attach(model, AdapterConfig(kind=kind, rank=4, alpha=8), TalanConfig((0, 2), site, 3, 10, mixer, writeback))
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in trainable:
            p += 0.2 * torch.randn(p.shape, generator=draw)
    return model


SIDES = {"block": dict(site="block", mixer="mlp", writeback="gate", kind="dora"),
         "attention": dict(site="attention", mixer="attention", writeback="bounded", kind="lora"),
         "linear add": dict(site="block", mixer="linear", writeback="add", kind="rslora")}


@pytest.fixture(scope="module", params=[*SIDES, "bare", "bare llama"])
def cached(request, tiny_checkpoint):
    """Models to try the cache with: with a side path at either site, and without."""
    if request.param in SIDES:
        return perturbed(tiny_checkpoint("qwen3", tie_word_embeddings=True), **SIDES[request.param])
    return load_model(tiny_checkpoint(*["qwen3"] * (request.param == "bare"), **{"kind": "llama"} if "llama" in request.param else {}))


@torch.no_grad()
def fed(model, rows, chunks, cache=None, garbage=0):
    """Hidden states (n,D) of each row when chunk after chunk of it goes through the cache; pads hold random ids."""
    cache = cache or Cache(model.config, len(rows), max(map(len, rows)) + max(map(max, chunks)))
    draw, at, parts = torch.Generator().manual_seed(garbage), [0] * len(rows), [[] for _ in rows]
    for chunk in chunks:
        tokens = torch.randint(97, (len(rows), max(chunk)), generator=draw)
        for b, n in enumerate(chunk):
            tokens[b, :n] = torch.tensor(rows[b][at[b]:at[b] + n])
            at[b] += n
        hidden = model(tokens, cache, None if len(set(chunk)) == 1 else torch.tensor(chunk))
        for b, n in enumerate(chunk):
            parts[b].append(hidden[b, :n])
    return [torch.cat(part) for part in parts], cache


@torch.no_grad()
def alone(model, row):
    """Hidden states (n,D) of one row in one pass without a cache."""
    return model(torch.tensor([row]))[0]


def same(mine, model, rows, tolerance=1e-5):
    return all(torch.allclose(a, alone(model, row)[-len(a):], atol=tolerance, rtol=0) for a, row in zip(mine, rows))


@pytest.mark.parametrize("split", [[12], [11, 1], [1, 11], [5, 7], [4, 1, 1, 6], [3] * 4, [1] * 12], ids=str)
def test_any_split_equals_the_full_pass(cached, split):
    rows = ragged(3, 12, 12)
    hidden, cache = fed(cached, rows, [[n] * 3 for n in split])
    assert cache.lengths.tolist() == [12] * 3
    assert same(hidden, cached, rows)


RAGGED = {"prefill then decode": [[9, 2, 5], [1, 1, 1], [1, 1, 1]], "rows that idle": [[3, 1, 4], [0, 2, 1], [1, 0, 0], [1, 1, 1]],
          "wide later chunks": [[1, 1, 2], [7, 1, 3], [2, 6, 1]], "an empty row at first": [[0, 4, 2], [5, 1, 1], [1, 3, 0]]}


@pytest.mark.parametrize("name", RAGGED)
def test_any_ragged_split_equals_the_full_pass(cached, name):
    rows = [row[:n] for row, n in zip(ragged(3, 20, 20), map(sum, zip(*RAGGED[name])))]
    hidden, cache = fed(cached, rows, RAGGED[name])
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert same(hidden, cached, rows)


def test_a_long_row_crosses_the_side_paths_chunks(cached):
    rows = ragged(2, 150, 150)
    assert same(fed(cached, rows, [[127, 120], [2, 9], [21, 21]])[0], cached, rows)


def test_padding_is_invisible_to_cache_and_side_state(cached):
    """Other garbage in the pads, bit for bit the same answers, in the prefill and after it."""
    rows = [row[:n] for row, n in zip(ragged(3, 20, 20), (13, 5, 10))]
    runs = [fed(cached, rows, [[9, 1, 6], [3, 3, 3], [1, 1, 1]], garbage=seed) for seed in (1, 2, 3)]
    for hidden, cache in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(hidden, runs[0][0]))
        for layer, state in cache.side.items():
            assert all(torch.equal(a, b) for a, b in zip(state, runs[0][1].side[layer]))


@torch.no_grad()
def test_padding_on_the_right_is_invisible_without_a_cache(cached):
    rows = ragged(4, 2, 11)
    hidden = cached(pad_rows(rows)[0])
    assert same([h[:len(row)] for h, row in zip(hidden, rows)], cached, rows)


def test_put_overwrites_rows_and_leaves_the_others(cached):
    old, new, rest = ragged(4, 8, 8), ragged(2, 3, 6, seed=5), ragged(4, 3, 3, seed=6)
    _, cache = fed(cached, old, [[8, 3, 7, 5]], Cache(cached.config, 4, 20))
    _, other = fed(cached, new, [[len(row) for row in new]], Cache(cached.config, 2, 6))
    cache.put([3, 1], other)
    before = [old[0][:8], new[1], old[2][:7], new[0]]
    assert cache.lengths.tolist() == [len(row) for row in before]
    assert same(fed(cached, rest, [[1] * 4, [2] * 4], cache)[0], cached, [a + b for a, b in zip(before, rest)])


def test_put_into_an_empty_cache_then_keep(cached):
    old, rest = ragged(3, 2, 9), ragged(2, 3, 3, seed=6)
    cache, (_, part) = Cache(cached.config, 5, 16), fed(cached, old, [[len(row) for row in old]], Cache(cached.config, 3, 9))
    cache.put([4, 0, 2], part)
    assert cache.lengths.tolist() == [len(old[1]), 0, len(old[2]), 0, len(old[0])]
    cache.keep([2, 4])
    assert cache.lengths.tolist() == [len(old[2]), len(old[0])]
    assert same(fed(cached, rest, [[1, 1], [2, 2]], cache)[0], cached, [old[2] + rest[0], old[0] + rest[1]])


def test_too_small_a_cache_raises(cached):
    cache = Cache(cached.config, 2, 10)
    cached(torch.zeros(2, 9, dtype=torch.int64), cache, torch.tensor([9, 2]))
    for tokens in (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="2 rows x 10 positions"):
            cached(tokens, cache)
    assert cache.lengths.tolist() == [9, 2]
    cached(torch.zeros(2, 1, dtype=torch.int64), cache)


def test_wrong_shapes_raise(cached):
    for tokens, lengths in ((torch.zeros(4, dtype=torch.int64), None), (torch.zeros(2, 3), None),
                            (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 2, 3]))):
        with pytest.raises(ValueError, match=re.escape("tokens (B,T) and lengths (B,)")):
            cached(tokens, Cache(cached.config, 2, 9), lengths)
    for lengths in ([4, 1], [3, -1]):
        cache = Cache(cached.config, 2, 9)
        with pytest.raises(ValueError, match=f"expected 0 to 3 real tokens a row, found {re.escape(str(lengths))}"):
            cached(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor(lengths))
        assert cache.lengths.tolist() == [0, 0]


class Shift(torch.nn.Module):
    """A stand-in for the side path: h + 1 at every token; its state counts the real ones."""

    def forward(self, h, state, lengths):
        new = torch.full((len(h),), h.shape[1]) if lengths is None else lengths
        return h + 1, (state[0] + new if state else new, h[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("site", ["block", "attention"])
def test_the_side_path_sits_at_its_site_and_keeps_its_state(site, tiny_checkpoint):
    model = load_model(tiny_checkpoint())
    block, seen = model.model.layers[1], {}
    block.side_path, block.side_site = Shift(), site
    block.self_attn.register_forward_hook(lambda _, __, out: seen.update(attention=out))
    block.register_forward_hook(lambda _, args, out: seen.update(start=args[0], end=out))
    cache, (tokens, lengths) = Cache(model.config, 3, 20), pad_rows(ragged(3))
    model(tokens, cache, lengths)
    h = seen["start"] + seen["attention"] + (site == "attention")
    assert torch.allclose(seen["end"], h + block.mlp(block.post_attention_layernorm(h)) + (site == "block"), atol=1e-6)
    model(tokens[:, :1], cache)
    assert list(cache.side) == [1] and torch.equal(cache.side[1][0], lengths + 1)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_generation_with_a_side_path_equals_the_uncached_loop(cached, rows):
    """Rows that idle, are refilled or dropped: each answer is the arg max of full passes over that row alone."""
    prompts, expected = ragged(7, 1, 12), []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(7):
            row.append(int(cached.logits(alone(cached, row)[-1]).argmax()))
        expected.append(row[len(prompt):])
    eos = {expected[1][2], expected[4][4]}
    stopped = [answer[:next((n + 1 for n, token in enumerate(answer) if token in eos), 7)] for answer in expected]
    assert len({len(answer) for answer in stopped}) > 1
    assert generate(cached, prompts, 7, eos_ids=eos, batch_rows=rows) == stopped


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_checkpointing_changes_no_gradient(side, with_cache, tiny_checkpoint):
    """Recomputing over a frozen backbone needs use_reentrant=False: else no gradient arrives at all. A cache's state would be read twice."""
    model, tokens = perturbed(tiny_checkpoint(), **SIDES[side]), torch.tensor(ragged(2, 9, 9))
    cache = (lambda: Cache(model.config, 2, 9)) if with_cache else None
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model.logits(model(tokens, cache() if cache else None)).logsumexp(-1).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(plain is not None and plain.abs().max() > 0 and torch.allclose(plain, grads[1][name], rtol=1e-5, atol=1e-6)
               for name, plain in grads[0].items())


# ---------------------------------------------------------------------------------------------------------------------
# 3. Loader
# ---------------------------------------------------------------------------------------------------------------------

def with_tensors(folder, tmp_path, edit):
    """A copy of a one-file checkpoint whose tensors went through edit(dict)."""
    new = shutil.copytree(folder, tmp_path / "tensors")
    tensors = load_file(new / "model.safetensors")
    edit(tensors)
    save_file(tensors, new / "model.safetensors")
    return new


def test_one_error_lists_every_tensor_that_does_not_fit(tiny_checkpoint, tmp_path):
    at = "model.layers.{}.{}.weight".format

    def spoil(t):
        del t["model.norm.weight"], t[at(2, "mlp.up_proj")]
        t["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        t["model.layers.3.mlp.up_proj.weight"] = torch.zeros(80, 48)
        t[at(0, "self_attn.q_norm")] = torch.ones(1)  # copy_ would broadcast it
        t[at(1, "mlp.down_proj")] = t[at(1, "mlp.down_proj")].T.contiguous()
        t[at(1, "self_attn.k_proj")] = torch.zeros(32, 48, dtype=torch.int8)
        t[at(2, "self_attn.v_proj")] = torch.zeros(32, 48).to(torch.float8_e4m3fn)

    with pytest.raises(ValueError) as error:
        load_model(with_tensors(tiny_checkpoint(), tmp_path, spoil))
    lines = str(error.value).splitlines()[1:]
    offenders = ["missing: " + at(2, "mlp.up_proj"), "missing: model.norm.weight", "unexpected: model.layers.0.self_attn.q_proj.bias",
                 "unexpected: model.layers.3.mlp.up_proj.weight", "shape: " + at(0, "self_attn.q_norm"), "shape: " + at(1, "mlp.down_proj"),
                 "dtype: " + at(1, "self_attn.k_proj") + " is I8", "dtype: " + at(2, "self_attn.v_proj") + " is F8_E4M3"]
    assert len(lines) == len(offenders)
    for offender in offenders:
        assert sum(line.strip().startswith(offender) for line in lines) == 1, offender


INDEX = {
    "parent folder": lambda table: table.update({"model.norm.weight": "../model-00001.safetensors"}),
    "absolute path": lambda table: table.update({"model.norm.weight": "/etc/passwd"}),
    "sub folder": lambda table: table.update({"model.norm.weight": "sub/model.safetensors"}),
    "two dots": lambda table: table.update({"model.norm.weight": ".."}),
    "not a name": lambda table: table.update({"model.norm.weight": 3}),
    "missing shard": lambda table: table.update({"model.norm.weight": "model-00099-of-00099.safetensors"}),
    "tensor that no shard holds": lambda table: table.update({"ghost.weight": table["model.norm.weight"]}),
    "tensor in another shard": lambda table: table.update({"model.norm.weight": table["model.embed_tokens.weight"]}),
    "tensor that the index leaves out": lambda table: table.pop("model.norm.weight"),
}


@pytest.mark.parametrize("name", INDEX)
def test_index_that_does_not_match_its_shards(name, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen3", shards=True, tie_word_embeddings=False), tmp_path / "broken")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    assert index["weight_map"]["model.norm.weight"] != index["weight_map"]["model.embed_tokens.weight"]
    INDEX[name](index["weight_map"])
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index|model-00099|safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "{", ""])
def test_unreadable_index(text, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "broken")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        load_model(folder)


@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: os.truncate(f, 9000), lambda f: f.write_bytes(b""),
                                   lambda f: f.write_bytes(b"x" * 99)], ids=["absent", "cut", "empty", "noise"])
def test_unreadable_weights(spoil, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "broken")
    spoil(folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("path", ["./absent", "/absent/folder", "a/b/c", "absent"])
def test_no_such_folder(path):
    with pytest.raises(ValueError, match="no such folder"):
        resolve_folder(path)


def tied_head(edit):
    return lambda t: t.update({"lm_head.weight": edit(t["model.embed_tokens.weight"].clone())})


def test_tied_lm_head_that_equals_the_embedding_is_accepted(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("qwen3", tie_word_embeddings=True)
    model = load_model(with_tensors(folder, tmp_path, tied_head(lambda w: w)))
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert torch.equal(model.head_weight, load_model(folder).model.embed_tokens.weight)


@pytest.mark.parametrize("edit", [lambda w: w + 1e-3, lambda w: w[:96], lambda w: w.T.contiguous(), lambda w: w.bfloat16(),
                                  lambda w: w.to(torch.int8)], ids=["value", "rows", "transposed", "bfloat16", "int8"])
def test_tied_lm_head_that_differs_is_refused(edit, tiny_checkpoint, tmp_path):
    folder = with_tensors(tiny_checkpoint("qwen3", tie_word_embeddings=True), tmp_path, tied_head(edit))
    with pytest.raises(ValueError, match="unexpected: lm_head.weight"):
        load_model(folder)


def test_untied_without_lm_head_is_refused(tiny_checkpoint, tmp_path):
    folder = with_tensors(tiny_checkpoint("qwen3", tie_word_embeddings=False), tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        load_model(folder)


def test_rotary_buffers_of_old_checkpoints_are_accepted(tiny_checkpoint, tmp_path):
    buffers = {"model.rotary_emb.inv_freq": torch.ones(8), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    folder = with_tensors(tiny_checkpoint(), tmp_path, lambda t: t.update(buffers))
    row = ragged(1)[0]
    assert torch.equal(alone(load_model(folder), row), alone(load_model(tiny_checkpoint()), row))


@pytest.mark.parametrize("dtype", ["float31", "auto", "nn", torch.int8, "int8"])
def test_other_dtypes_are_refused(dtype, tiny_checkpoint):
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16, float16 or float64, found"):
        load_model(tiny_checkpoint(), dtype=dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, "float32", torch.bfloat16])
def test_dtype_is_the_files_unless_asked(stored, wanted, tiny_checkpoint, tmp_path):
    folder = with_tensors(tiny_checkpoint(), tmp_path, lambda t: t.update({k: v.to(stored) for k, v in t.items()}))
    model = load_model(folder, dtype=wanted)
    assert {p.dtype for p in model.parameters()} == {{None: stored, "float32": torch.float32}.get(wanted, wanted)}
    assert not model.training


def test_training_mapped_weights_in_place_leaves_the_file_alone(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "mine")
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    model = load_model(folder)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() == before
    for p, fresh in zip(model.parameters(), load_model(folder).parameters()):
        assert torch.equal(p, fresh + 1)


MEASURE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import load_model

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(key + ":"))

torch.ones(8).bfloat16().sum().item()
baseline, anonymous = status("VmRSS"), status("RssAnon")
model = load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
total = sum(p.sum().item() for p in model.parameters())
anonymous = status("RssAnon") - anonymous
print(status("VmHWM") - baseline, status("VmRSS") - baseline, anonymous, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory):
    """About 300 MB of bfloat16 in the shapes of a small Qwen3."""
    folder = tmp_path_factory.mktemp("big")
    raw = QWEN3 | dict(vocab_size=20000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=9, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(ModelConfig.from_dir(folder)).named_parameters()}
    pool = torch.randn(20000 * 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({name: pool[:shape.numel()].view(shape).clone() for name, shape in shapes.items()}, folder / "model.safetensors")
    assert 250e6 < (folder / "model.safetensors").stat().st_size < 350e6
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading_is_the_size_of_the_weights(dtype, big_checkpoint):
    run = subprocess.run([sys.executable, "-c", MEASURE, ROOT, big_checkpoint, dtype], capture_output=True, text=True, check=True)
    peak, resident, anonymous, size = map(int, run.stdout.split())
    assert resident > 0.95 * size  # all pages were touched
    assert dtype == "float32" or anonymous < 0.4 * size  # no change of dtype: the mapped file itself
    assert peak <= 1.15 * size, f"peak {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"


def test_saved_model_is_one_that_transformers_loads(tiny_checkpoint, tmp_path):
    model, row = load_model(tiny_checkpoint("llama", rope_parameters=LLAMA3), dtype="bfloat16"), ragged(1)[0]
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.head_weight.dtype == torch.bfloat16 and torch.equal(alone(again, row), alone(model, row))
    assert again.fingerprint == model.fingerprint
    with torch.no_grad():
        expected = transformers_model(tmp_path / "saved")(torch.tensor([row])).logits[0]
        model = load_model(tmp_path / "saved", dtype="float32")
        assert close(model.logits(alone(model, row)), expected)


def test_only_a_bare_model_from_a_folder_is_saved(tiny_checkpoint, tmp_path):
    for model in (perturbed(tiny_checkpoint()), Transformer(load_model(tiny_checkpoint()).config)):
        with pytest.raises(ValueError, match="not a bare model"):
            save_model(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_backbone_only_saves_the_weights_under_the_adapter(tiny_checkpoint, tmp_path):
    save_model(perturbed(tiny_checkpoint()), tmp_path / "saved", backbone_only=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint(), tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Config
# ---------------------------------------------------------------------------------------------------------------------

QWEN3 = dict(model_type="qwen3", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)
LLAMA = {**QWEN3, "model_type": "llama", "head_dim": 12}
ABSENT = object()
SCALING = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
INTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BAD = [(name, bad) for name in INTS for bad in (ABSENT, None, -1, 0, 1 << 40, True, "97", 97.5, [97])]
BAD += [("num_key_value_heads", bad) for bad in (-2, 0, True, "2", 3, 8)] + [("head_dim", bad) for bad in (-16, 0, 15, True, "16", 16.0)]
BAD += [("max_position_embeddings", bad) for bad in (0, -1, "512", True)]
BAD += [("rms_norm_eps", bad) for bad in (0, -1e-6, 1.0, "1e-6", True, None, float("nan"))]
BAD += [("rope_theta", bad) for bad in (0, 1, -1e4, "10000", True, float("nan"), float("inf"), [1e4])]
BAD += [("tie_word_embeddings", bad) for bad in (1, "true", None)]
BAD += [("model_type", bad) for bad in (ABSENT, None, "qwen2", "qwen3_moe", "mistral", ["llama"])]
BAD += [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("use_sliding_window", True), ("pretraining_tp", 2),
        ("attention_dropout", 0.1), ("partial_rotary_factor", 0.5), ("is_encoder_decoder", True), ("rope_interleaved", True),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]), ("layer_types", "sliding_attention"), ("layer_types", 3),
        ("quantization_config", {"quant_method": "gptq"}), ("quantization_config", {})]
BAD += [("rope_scaling", bad) for bad in (
    {"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"rope_type": ["llama3"]},
    {"factor": 2.0}, {**SCALING, "attention_factor": 2.0}, "llama3", 8, ["yarn"])]
BAD += [("rope_scaling", {**SCALING, key: bad}) for key, bad in (
    ("factor", -8.0), ("factor", 0), ("factor", "8"), ("factor", True), ("factor", float("nan")), ("factor", float("inf")),
    ("original_max_position_embeddings", 0), ("high_freq_factor", None), ("low_freq_factor", 4.0), ("low_freq_factor", 9.0))]
BAD += [("rope_scaling", {k: v for k, v in SCALING.items() if k != key}) for key in SCALING if key != "rope_type"]
BAD += [("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}), ("rope_parameters", {"rope_theta": "1e6"}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}), ("rope_parameters", "default")]
UNKNOWN = {"logit_scale": 0.5, "num_experts": 8, "num_experts_per_tok": 2, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
           "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "query_pre_attn_scalar": 256, "use_qk_norm": True, "clip_qkv": 8.0,
           "no_rope_layers": [1, 0, 1], "sliding_window_pattern": 6, "attention_chunk_size": 8192, "moe_intermediate_size": 64,
           "scale_embeddings": True, "layer_norm_type": "rms", "norm_after": True, "post_norm": True}
BAD += list(UNKNOWN.items())


def changed(raw, **changes):
    return {k: v for k, v in {**raw, **changes}.items() if v is not ABSENT}


@pytest.mark.parametrize("base", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_base_configs_of_the_table_are_accepted(base):
    config = ModelConfig.from_dict(base)
    assert dataclasses.asdict(config) == {**base, "rope_scaling": None, "max_position_embeddings": 2048, "dtype": None}


@pytest.mark.parametrize("base", [QWEN3, LLAMA], ids=["qwen3", "llama"])
@pytest.mark.parametrize("name, bad", BAD, ids=lambda x: "absent" if x is ABSENT else str(x))
def test_bad_config_field_is_named(base, name, bad):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(changed(base, **{name: bad}))
    first, *lines = str(error.value).splitlines()
    wanted = r"rope_(type|scaling|theta|parameters)|rope parameters" if name in ("rope_scaling", "rope_parameters") else name
    assert any(re.match(rf"\s+({wanted})\b", line) for line in lines), error.value


def test_all_bad_config_fields_are_named_at_once(tmp_path):
    bad = dict(vocab_size="97", hidden_size=True, num_hidden_layers=ABSENT, rms_norm_eps=0, model_type="gpt2", attention_bias=True,
               rope_scaling={"type": "yarn"}, num_experts=8, logit_scale=0.5, layer_types=["sliding_attention"], quantization_config={"bits": 4})
    (tmp_path / "config.json").write_text(json.dumps(changed(QWEN3, **bad)))
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dir(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    for name in {*bad, "rope_type"} - {"rope_scaling"}:
        assert f"\n  {name}: " in str(error.value), name


def test_llama_hidden_size_must_divide_when_head_dim_is_absent():
    with pytest.raises(ValueError, match="head_dim.*hidden_size=50"):
        ModelConfig.from_dict(changed(LLAMA, hidden_size=50, head_dim=ABSENT))
    heads = LLAMA["num_attention_heads"]
    with pytest.raises(ValueError, match="head_dim: expected an even number, found 5"):
        ModelConfig.from_dict(changed(LLAMA, hidden_size=5 * heads, head_dim=ABSENT))


EXTRAS = [dict(unsloth_fixed=True), dict(auto_map={"AutoConfig": "x.Y"}), dict(max_window_layers=28), dict(architectures=["Qwen3ForCausalLM"]),
          dict(use_sliding_window=False, sliding_window=None), dict(use_sliding_window=False, sliding_window=4096),
          dict(layer_types=["full_attention"] * 3), dict(attention_bias=False, mlp_bias=False, attention_dropout=0.0, hidden_act="silu"),
          dict(rope_scaling=None), dict(rope_scaling={"rope_type": "default"}), dict(rope_parameters=None), dict(num_experts=None),
          dict(quantization_config=None), dict(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None), dict(my_note="hello"),
          {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "_name_or_path": "x", "is_llama_config": True}]


@pytest.mark.parametrize("base", [QWEN3, LLAMA], ids=["qwen3", "llama"])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_fields_that_change_nothing_are_accepted(base, extra):
    assert ModelConfig.from_dict({**base, **extra}) == ModelConfig.from_dict(base)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe{}", b"[" * 100000, None])
def test_config_file_that_is_no_json_object(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json: expected a"):
        ModelConfig.from_dir(tmp_path)


def published(model_type, D, L, H, K, Dh, F, V, tied, theta, eps, **extra):
    return dict(model_type=model_type, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K, head_dim=Dh,
                intermediate_size=F, vocab_size=V, tie_word_embeddings=tied, rope_theta=theta, rms_norm_eps=eps, hidden_act="silu",
                attention_bias=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True, transformers_version="4.51.0",
                torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2, **{"rope_scaling": None, "max_position_embeddings": 40960, **extra})


def qwen3(*shape, tied=True):
    return published("qwen3", *shape, 151936, tied, 1000000, 1e-06, architectures=["Qwen3ForCausalLM"], max_window_layers=shape[1],
                     sliding_window=None, use_sliding_window=False)


LLAMA_32_SCALING = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
PUBLISHED = {  # name: (config.json, number of parameters)
    "Qwen3-0.6B": (qwen3(1024, 28, 16, 8, 128, 3072), 596_049_920),
    "Qwen3-1.7B": (qwen3(2048, 28, 16, 8, 128, 6144), 1_720_574_976),
    "Qwen3-4B": (qwen3(2560, 36, 32, 8, 128, 9728), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 36, 32, 8, 128, 12288, tied=False), 8_190_735_360),
    "Llama-3.2-1B": (published("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 500000.0, 1e-05, rope_scaling=LLAMA_32_SCALING, mlp_bias=False,
                               pretraining_tp=1, max_position_embeddings=131072), 1_235_814_400),
    "SmolLM2-135M": (changed(published("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 100000, 1e-05, is_llama_config=True, mlp_bias=False,
                                       pretraining_tp=1, rope_interleaved=False, max_position_embeddings=8192), head_dim=ABSENT), 134_515_008),
}


def new_spelling(raw):
    """What transformers 5 writes of the same config."""
    raw = dict(raw)
    scaling = raw.pop("rope_scaling") or {"rope_type": "default"}
    return raw | {"rope_parameters": {**scaling, "rope_theta": raw.pop("rope_theta")}, "dtype": raw.pop("torch_dtype")}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spell", [dict, new_spelling], ids=["old", "new"])
def test_published_configs(name, spell):
    raw, parameters = PUBLISHED[name]
    config = ModelConfig.from_dict(spell(raw))
    for field, value in {**raw, "head_dim": raw.get("head_dim", 64), "dtype": "bfloat16"}.items():
        if field in ModelConfig.__dataclass_fields__ and field != "rope_scaling":
            assert getattr(config, field) == value, field
    scaling = config.rope_scaling and {**dataclasses.asdict(config.rope_scaling), "rope_type": "llama3"}
    assert scaling == (LLAMA_32_SCALING if "Llama" in name else None)
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == parameters


def test_llama_3_2_frequencies_equal_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = PUBLISHED["Llama-3.2-1B"][0]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**new_spelling(raw))).inv_freq
    assert torch.allclose(inverse_frequencies(ModelConfig.from_dict(raw)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "", "mps:x"])
def test_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="device"):
        choose_device(name)


def test_device_and_dtype():
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_dtype("auto", d) for d in (cpu, gpu)] == [torch.float32, torch.bfloat16]
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16 and choose_dtype("float32", gpu) == torch.float32
    with pytest.raises(ValueError, match="float16"):
        choose_dtype("float16", gpu)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Tokenizer
# ---------------------------------------------------------------------------------------------------------------------

WORDS = ["<unk>", "<bos>", "<eot>", "<im_end>", "hello", "world", "system", "user", "assistant", "Question", "Answer", ":", "26", "Jul", "2024"]
SPECIALS = ["<bos>", "<eot>", "<im_end>"]
MESSAGES = [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": " hello\n"}, {"role": "assistant", "content": "world"},
            {"role": "user", "content": "ünï <b>&amp; \"quoted\" 漢字"}]


def build_core():
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.add_special_tokens(SPECIALS)
    return core


def tokenizer_folder(folder, core=None, template_file=None, generation=None, config=None, **settings):
    """A folder with tokenizer.json, tokenizer_config.json and, where given, its neighbours."""
    (core or build_core()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({**QWEN3, "vocab_size": 16, **(config or {})}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if template_file is not None:
        (folder / "chat_template.jinja").write_text(template_file, encoding="utf-8")
    return folder


STOPS = {
    "int, string, int": (dict(eos_token_id=2), dict(eos_token="<im_end>"), dict(eos_token_id=2), (2, 3)),
    "list, dict token, list": (dict(eos_token_id=[2, 9]), dict(eos_token={"content": "<im_end>", "special": True}), dict(eos_token_id=[9, 11]),
                               (2, 3, 9, 11)),
    "nulls": (dict(eos_token_id=None), dict(eos_token=None), dict(eos_token_id=None), ()),
    "generation config alone": (dict(eos_token_id=[2, 3]), {}, {}, (2, 3)),
    "tokenizer config alone": (None, dict(eos_token="<eot>"), {}, (2,)),
    "config alone": (None, {}, dict(eos_token_id=0), (0,)),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_ids_are_the_union_of_three_files(name, tmp_path):
    generation, settings, config, expected = STOPS[name]
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, generation=generation, config=config, **settings))
    assert tuple(tokenizer.eos_ids) == expected


@pytest.mark.parametrize("bad", ["2", ["<eot>"], [[2]], 2.5, True, -1], ids=str)
@pytest.mark.parametrize("where", ["generation", "config"])
def test_stop_ids_of_another_kind_are_refused(bad, where, tmp_path):
    with pytest.raises(ValueError, match="eos_token_id"):
        load_tokenizer(tokenizer_folder(tmp_path, **{where: dict(eos_token_id=bad)}))


def test_stop_token_that_the_vocabulary_lacks_is_refused(tmp_path):
    """Dropped in silence, it would leave a model that never stops."""
    with pytest.raises(ValueError, match="<end>"):
        load_tokenizer(tokenizer_folder(tmp_path, eos_token="<end>"))


FIRST, SECOND = "{{ 'first' }}", "{{ 'second' }}"


@pytest.mark.parametrize("file, setting, expected", [
    (FIRST, None, "first"), (None, SECOND, "second"), (FIRST, SECOND, "first"),
    (None, [{"name": "tool_use", "template": FIRST}, {"name": "default", "template": SECOND}], "second")])
def test_where_the_template_comes_from(file, setting, expected, tmp_path):
    settings = {} if setting is None else {"chat_template": setting}
    assert load_tokenizer(tokenizer_folder(tmp_path, template_file=file, **settings)).render(MESSAGES) == expected


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'open", [{"name": "tool_use", "template": FIRST}], 3], ids=str)
def test_template_that_cannot_be_used_is_a_value_error(template, tmp_path):
    with pytest.raises(ValueError, match="template"):
        load_tokenizer(tokenizer_folder(tmp_path, chat_template=template))


def test_plain_format_for_a_base_model_without_template(tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, eos_token="<eot>"))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert tokenizer.render(chat, add_generation_prompt=True) == "Be brief.\n\nQuestion: hello\nAnswer:\n"
    assert tokenizer.render(chat + [{"role": "assistant", "content": "world"}]) == "Be brief.\n\nQuestion: hello\nAnswer:\nworld<eot>\n"


LLAMA_LIKE = ("{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
              "{%- for m in messages %}{{- m['role'] + ' : ' + m['content'] | trim + ' <eot>' }}{%- endfor %}\n"
              "{%- if add_generation_prompt %}{{- 'assistant ' + date_string }}{%- endif %}")


def test_no_double_bos(tmp_path):
    core = build_core()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A <eot>", pair="<bos> $A $B",
                                                                   special_tokens=[("<bos>", 1), ("<eot>", 2)])
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, core, chat_template=LLAMA_LIKE, bos_token="<bos>", eos_token="<eot>"))
    text = tokenizer.render([{"role": "user", "content": "hello"}])
    assert text == "<bos>user : hello <eot>"
    assert core.encode(text).ids.count(1) == 2 and core.encode(text).ids.count(2) == 2  # the trap is there
    assert tokenizer.encode(text) == [1, 7, 11, 4, 2]
    assert tokenizer.decode([1, 7, 11, 4, 2], skip_special=True) == "user : hello"
    assert tokenizer.core.encode(text).offsets == [(0, 5), (5, 9), (10, 11), (12, 17), (18, 23)]
    assert tokenizer.begin == (1,)  # for text without a template


@pytest.mark.parametrize("name, begin", [("llama3", "<|begin_of_text|>"), ("qwen3", ""), ("chatml", "")])
def test_what_goes_before_plain_text(name, begin):
    tokenizer = load_tokenizer(ROOT / "tests/golden/tokenizers" / name)
    assert list(tokenizer.begin) == tokenizer.encode(begin) and len(tokenizer.begin) == bool(begin)


@pytest.mark.parametrize("template", [LLAMA_LIKE, "{{ strftime_now('%d %b %Y') }}", "{{ date_string }}"])
def test_dates_are_pinned(template, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, chat_template=template, bos_token="<bos>"))
    assert tokenizer.render(MESSAGES, add_generation_prompt=True).endswith("26 Jul 2024")


THINKING = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
            "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")


def test_thinking_is_off(tmp_path):
    text = load_tokenizer(tokenizer_folder(tmp_path, chat_template=THINKING)).render(MESSAGES, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


TEMPLATES = [LLAMA_LIKE, THINKING,
             "{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n{{ m.content | tojson }}\n{% endfor %}",
             "{% for m in messages %}\n    {% generation %}\n  {{ m.content }}\n    {% endgeneration %}\n{% endfor %}{{ eos_token }}",
             "{%- set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m['content'].strip() }}{% endfor %}",
             "{{ messages | tojson(indent=2) }}{% if tools %}tools{% endif %}{{ bos_token }}{% if pad_token is defined %}pad{% endif %}"]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_equals_transformers(template, prompt, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=build_core(), chat_template=template, bos_token="<bos>", eos_token="<eot>")
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt, enable_thinking=False, date_string="26 Jul 2024")
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, chat_template=template, bos_token="<bos>", eos_token="<eot>"))
    assert tokenizer.render(MESSAGES, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("template, content", [
    ("{{ raise_exception('roles must alternate') }}", "hello"), ("{{ messages[0].absent.field }}", "hello"),
    ("{{ 'a' + messages[0].content }}", None),
    ("{{ ''.__class__.__mro__ }}", "hello"), ("{{ messages.append(1) }}", "hello")])
def test_template_that_raises_is_a_value_error(template, content, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="template"):
        tokenizer.render([{"role": "user", "content": content}])


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    core = build_core()
    core.enable_truncation(3)
    core.enable_padding(length=8)
    assert len(core.encode("hello world").ids) == 8 and core.encode(" ".join(["hello"] * 9)).ids[:3] == [4] * 3
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, core))
    assert tokenizer.encode("hello world") == [4, 5]
    assert tokenizer.encode(" ".join(["hello"] * 9)) == [4] * 9


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path):
    load_tokenizer(tokenizer_folder(tmp_path, config=dict(vocab_size=15)))
    with pytest.raises(ValueError, match="highest token id 14.*vocab_size 14"):
        load_tokenizer(tokenizer_folder(tmp_path, config=dict(vocab_size=14)))


def test_added_tokens_that_disagree_are_all_named(tmp_path):
    listed = {"1": {"content": "<bos>"}, "2": {"content": "<im_end>"}, "15": {"content": "<tool>"}}
    with pytest.raises(ValueError) as error:
        load_tokenizer(tokenizer_folder(tmp_path, added_tokens_decoder=listed))
    assert "<im_end>" in str(error.value) and "<tool>" in str(error.value) and "<bos>" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_unreadable_tokenizer(content, tmp_path):
    file = tokenizer_folder(tmp_path) / "tokenizer.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Generation
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint("qwen3", tie_word_embeddings=True))


SAMPLING = dict(temperature=1.5, top_p=0.9, seed=3)


def test_sampling_depends_on_seed_prompt_index_and_step_only(model):
    prompts = ragged(11, high=20)
    expected = generate(model, prompts, 9, batch_rows=1, **SAMPLING)
    assert all(generate(model, prompts, 9, batch_rows=rows, **SAMPLING) == expected for rows in (5, 16))
    assert generate(model, prompts[:4], 9, **SAMPLING) == expected[:4]
    assert generate(model, prompts, 9, **{**SAMPLING, "seed": 4}) != expected
    repeated = generate(model, prompts[:1] * 6, 9, **SAMPLING)
    assert len(set(map(tuple, repeated))) == 6  # the same prompt at other indices draws otherwise


def test_more_new_tokens_do_not_change_the_first_ones(model):
    """A draw is tied to (seed, prompt index, step), so it cannot depend on max_new_tokens."""
    prompts = ragged(6)
    short, long = (generate(model, prompts, n, **SAMPLING) for n in (4, 9))
    assert [row[:4] for row in long] == short


def test_tiny_top_p_or_temperature_equals_greedy(model):
    prompts = ragged(8)
    greedy = generate(model, prompts, 8)
    assert generate(model, prompts, 8, temperature=1.0, top_p=1e-9) == greedy
    assert generate(model, prompts, 8, temperature=1e-6) == greedy
    assert generate(model, prompts, 8, **SAMPLING) != greedy


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (2.5, 1.0), (2.5, 0.6)])
def test_frequencies_match_softmax_by_chi_square(temperature, top_p, tiny_checkpoint):
    model, prompt, count = load_model(tiny_checkpoint("llama", vocab_size=11)), [3, 1, 4], 4000
    found = torch.tensor(generate(model, [prompt] * count, 1, temperature=temperature, top_p=top_p, batch_rows=500))[:, 0].bincount(minlength=11)
    with torch.no_grad():
        p, order = (model.logits(alone(model, prompt)[-1]).double() / temperature).softmax(-1).sort(descending=True)
    kept = int((p.cumsum(-1) < top_p).sum()) + 1 if top_p < 1 else 11
    expected, found = count * p[:kept] / p[:kept].sum(), found[order]
    assert int(found[kept:].sum()) == 0
    usable = expected > 5  # where chi-square holds; the rest is one more class
    classes = [torch.cat([x[:kept][usable], x[:kept][~usable].sum()[None]]) for x in (found.double(), expected)]
    statistic = float(((classes[0] - classes[1]) ** 2 / classes[1].clamp_min(1)).sum())
    assert int(usable.sum()) >= 3 and statistic < 29.6  # the 0.1 % point at 10 degrees of freedom


def test_choose_takes_the_quantile_of_the_nucleus():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    cases = [(0.0, 1.0, 1), (0.49, 1.0, 1), (0.51, 1.0, 3), (0.74, 1.0, 3), (0.76, 1.0, 2), (0.91, 1.0, 0), (1 - 1e-12, 1.0, 0),
             (0.99, 0.5, 1), (0.66, 0.51, 1), (0.67, 0.51, 3), (0.99, 0.76, 2), (0.99, 1e-9, 1)]
    for u, top_p, expected in cases:
        assert choose(logits[None], 1.0, top_p, torch.tensor([u], dtype=torch.float64)).tolist() == [expected], (u, top_p)


def test_eos_is_kept_as_the_last_id(greedy):
    model, prompts, eos, _ = greedy
    for row in generate(model, prompts, STEPS, eos_ids=iter(eos), batch_rows=4):  # any iterable will do
        assert row and not set(row[:-1]) & set(eos) and (row[-1] in eos or len(row) == STEPS)


def test_nothing_to_generate(model):
    assert generate(model, [[1, 2], [3]], 0) == [[], []]
    assert generate(model, [], 5) == []


def test_one_error_lists_every_bad_prompt_and_setting(model):
    with pytest.raises(ValueError) as error:
        generate(model, [[], [1], [97], [2, -1], [96], []], -1, temperature=-1.0)
    named = [int(n) for n in re.findall(r"prompt (\d+)", str(error.value))]
    assert sorted(named) == [0, 2, 3, 5] and "max_new_tokens" in str(error.value) and "temperature" in str(error.value)


@pytest.mark.parametrize("bad", [dict(batch_rows=0), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=0.0),
                                 dict(top_p=1.1)], ids=str)
def test_bad_settings_raise(model, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate(model, [[1]], 2, **bad)


def test_global_random_state_is_untouched(model):
    before = torch.get_rng_state()
    generate(model, ragged(3), 4, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_off_while_generating_and_restored(training, tiny_checkpoint):
    model, prompts = load_model(tiny_checkpoint()), ragged(4)
    trainable = attach(model, AdapterConfig(rank=4, dropout=0.5))
    with torch.no_grad():
        for p in trainable:
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    expected = generate(model.eval(), prompts, 6)
    model.train(training)
    assert generate(model, prompts, 6) == expected  # dropout was off
    assert {module.training for module in model.modules()} == {training}
    assert all(p.requires_grad for p in trainable)


def test_init_weights_draws_each_tensor_from_its_own_generator(model):
    one, two, deeper = (Transformer(dataclasses.replace(model.config, num_hidden_layers=n)) for n in (3, 3, 4))
    for fresh, seed in ((one, 1), (two, 2), (deeper, 1)):
        fresh.init_weights(seed)
    assert torch.equal(one.model.layers[1].mlp.up_proj.weight, deeper.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(one.model.layers[1].mlp.up_proj.weight, two.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(one.model.layers[1].mlp.up_proj.weight, one.model.layers[1].mlp.gate_proj.weight)
    assert 0.018 < one.model.embed_tokens.weight.std().item() < 0.022 and bool((one.model.norm.weight == 1).all())
    assert 0.007 < one.model.layers[0].mlp.down_proj.weight.std().item() < 0.0093


def test_freed_memory_is_kept_where_malloc_can(monkeypatch):
    """Its two options are accepted on glibc; elsewhere nothing is called."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        assert libc.mallopt(-3, 32 << 20) == 1 and libc.mallopt(-1, 2**31 - 1) == 1
    called = []
    monkeypatch.setattr("model.ctypes.CDLL", lambda name: SimpleNamespace(mallopt=lambda *args: called.append(args)))
    keep_freed_memory()
    assert called == ([(-3, 32 << 20), (-1, 2**31 - 1)] if platform.libc_ver()[0] == "glibc" else [])
    monkeypatch.setattr("model.platform.libc_ver", lambda: ("", ""))
    keep_freed_memory()
    assert len(called) in (0, 2)


@pytest.mark.parametrize("prompts, tokens, settings, said", [
    ([[1.7, 2.2]], 3, {}, "prompt 0: token ids must be whole numbers"), ([[1]], 2.0, {}, "max_new_tokens, a whole number"),
    ([[1]], 2, {"batch_rows": 2.0}, "batch_rows >= 1, found 2 and 2.0"),
    ([[1], [2]], 2, {"numbers": [0]}, "a number for each of 2 prompts, found 1")])
def test_generate_refuses(prompts, tokens, settings, said, tiny_checkpoint):
    with pytest.raises(ValueError, match=re.escape(said)):
        generate(load_model(tiny_checkpoint()), prompts, tokens, **settings)


def test_generation_at_the_smallest_temperature_is_greedy(tiny_checkpoint):
    model, prompts = load_model(tiny_checkpoint()), ragged(5)
    assert generate(model, prompts, 6, temperature=5e-324, seed=3) == generate(model, prompts, 6)


def test_numbers_may_be_an_array(tiny_checkpoint):
    model, prompts = load_model(tiny_checkpoint()), ragged(4)
    whole = generate(model, prompts, 6, temperature=1.0, seed=3)
    assert generate(model, prompts[2:], 6, temperature=1.0, seed=3, numbers=torch.tensor([2, 3])) == whole[2:]


def test_generation_that_fails_leaves_the_mode_as_it_was(tiny_checkpoint):
    model = load_model(tiny_checkpoint()).train()
    with pytest.raises(ZeroDivisionError):
        generate(model, [[1]], 3, ended=lambda ids: 1 / 0)
    assert model.training


def test_casting_the_weights_leaves_the_rotary_frequencies(tiny_checkpoint):
    model = load_model(tiny_checkpoint())
    before = model.inverse_frequencies.clone()
    assert model.bfloat16().inverse_frequencies.dtype == torch.float32 and torch.equal(model.float().inverse_frequencies, before)
