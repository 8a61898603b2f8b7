"""A Qwen3 / Llama transformer written by hand: config, blocks, cache, strict loader, tokenizer, `generate`.

Parameter names equal those of the Hugging Face checkpoints, so loading is a comparison of two sets and no name map.
This file knows no adapter and no TALAN; `Block.side_path` is the one seam that talan.py fills.

Shapes: B rows, T new tokens, S positions so far (cached and new), D hidden size, H query heads, K key/value heads,
        Dh head size, F MLP width, L layers, V vocabulary.
Rows are padded on the right only. A real token never sees the pads after it, so no padding mask exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.settings import nearest
from data.template import TODAY, compile_template, render

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------

LIMIT = 1 << 24  # no dimension of a real model is larger; a larger one is a broken file
POSITIVE_INTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Fields that change the computation, with the values that mean "what this file computes". Absent counts as fine.
FIXED = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False, None),
    "pretraining_tp": (1, None), "attention_dropout": (0, 0.0, None), "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None), "is_encoder_decoder": (False, None), "quantization_config": (None,),
}
# Read elsewhere in this class, or known to leave the forward pass alone.
HARMLESS = set(POSITIVE_INTS) | set(FIXED) | {
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
    "max_position_embeddings", "dtype", "torch_dtype", "model_type", "layer_types", "sliding_window", "max_window_layers",
    "architectures", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map",
    "transformers_version", "output_attentions", "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id",
    "chunk_size_feed_forward", "is_llama_config", "transformers.js_config", "_name_or_path", "_attn_implementation_autoset",
    "attn_implementation", "unsloth_fixed", "unsloth_version", "tokenizer_class", "prefix", "task_specific_params",
}
# An unknown field with one of these in its name, and a value other than null / false, is taken to change the computation.
SUSPECT = re.compile(r"att|rope|rotary|moe|expert|router|softcap|scal|multiplier|norm|bias|quant|window|mlp|act|head|layer"
                     r"|logit|qk|embed|residual|position|dropout|hidden|conv|mamba|ssm|lora|adapter|vision|audio", re.I)


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 rotary scaling: wavelengths above original/low are stretched by `factor`, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What a Qwen3 or Llama checkpoint's config.json says about the computation; lengths in tokens or features."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    dtype: str | None = None  # what the file says its weights are

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json. Raises ValueError that lists every field which is absent, mistyped or not supported."""
        file = resolve_folder(path) / "config.json"
        return cls.from_dict(read_json(file), str(file))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config") -> ModelConfig:
        """The same from a parsed config.json, in the old spelling or that of transformers 5."""
        problems = config_problems(raw)
        theta, scaling = read_rope(raw, problems)
        if problems:
            raise ValueError(f"{source}: not a config that this code computes:\n  " + "\n  ".join(problems))
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        return cls(
            model_type=raw["model_type"], **{name: raw[name] for name in POSITIVE_INTS},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or (128 if raw["model_type"] == "qwen3" else hidden // heads),  # transformers' defaults
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=raw.get("max_position_embeddings", 2048), dtype=raw.get("dtype") or raw.get("torch_dtype"))


def config_problems(raw: dict[str, Any]) -> list[str]:
    """Every reason why this config.json cannot be computed faithfully, one line each."""
    problems = []
    if raw.get("model_type") not in ("qwen3", "llama"):
        problems.append(f"model_type: expected 'qwen3' or 'llama', found {raw.get('model_type')!r}")
    for name in POSITIVE_INTS + ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = raw.get(name, None if name in POSITIVE_INTS else 1)
        if value is None and name not in POSITIVE_INTS:
            continue  # null: the default
        most = 4096 if name == "num_hidden_layers" else LIMIT
        if type(value) is not int or not 0 < value <= most:
            problems.append(f"{name}: expected an integer from 1 to {most}, found {value!r}")
    eps, tied = raw.get("rms_norm_eps", 1e-6), raw.get("tie_word_embeddings", False)
    if type(eps) not in (float, int) or not 0 < eps < 1:
        problems.append(f"rms_norm_eps: expected a number between 0 and 1, found {eps!r}")
    if type(tied) is not bool:
        problems.append(f"tie_word_embeddings: expected true or false, found {tied!r}")
    for name, allowed in FIXED.items():
        if name in raw and not any(raw[name] == a and type(raw[name]) is type(a) for a in allowed):
            problems.append(f"{name}: only {allowed[0]!r} is supported, found {raw[name]!r}")
    if isinstance(types := raw.get("layer_types") or [], list) is False or any(t != "full_attention" for t in types):
        problems.append(f"layer_types: only 'full_attention' in every layer is supported, found {types!r}")
    for name in sorted(set(raw) - HARMLESS):
        if SUSPECT.search(name) and raw[name] not in (None, False):
            problems.append(f"{name}: unknown field that may change the computation, found {raw[name]!r}")
    return problems or head_problems(raw)


def head_problems(raw: dict[str, Any]) -> list[str]:
    """Heads that do not divide, once each number is known to be one."""
    heads, groups = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    problems = []
    if heads % groups:
        problems.append(f"num_key_value_heads: expected a divisor of num_attention_heads={heads}, found {groups}")
    if not raw.get("head_dim") and raw["model_type"] == "llama" and raw["hidden_size"] % heads:
        problems.append(f"head_dim: absent, and hidden_size={raw['hidden_size']} is no multiple of {heads} heads")
    size = raw.get("head_dim") or (raw["hidden_size"] // heads if raw["model_type"] == "llama" else 128)
    if size % 2:
        problems.append(f"head_dim: expected an even number, found {size}")
    if heads * size > LIMIT:
        problems.append(f"head_dim: expected at most {LIMIT} in all {heads} heads together, found {size} in each")
    return problems


def read_rope(raw: dict[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` + `rope_scaling` or from transformers 5's `rope_parameters`; adds to problems."""
    parts = [raw.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        problems.append(f"rope_scaling, rope_parameters: expected objects or null, found {parts}")
        parts = [{}]
    rope = {key: value for part in parts for key, value in part.items()}
    if twice := sorted(key for key in parts[0] if rope[key] != parts[0][key]):
        problems.append(f"rope_scaling, rope_parameters: expected one value each of {', '.join(twice)}, found {parts}")
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    if not is_positive(theta) or not 1 < theta < 1e12 or raw.get("rope_theta", theta) != theta:
        problems.append(f"rope_theta: expected one number above 1, found {theta!r} and {raw.get('rope_theta')!r}")
    kind = rope.pop("rope_type", rope.get("type", "default"))
    if rope.pop("type", kind) != kind:
        problems.append(f"rope_type: expected the same as type, found {kind!r}")
    wanted = set(RopeScaling.__dataclass_fields__) if kind == "llama3" else set()
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type: expected 'default' or 'llama3', found {kind!r}")
    elif set(rope) != wanted or not all(map(is_positive, rope.values())):
        problems.append(f"rope_scaling of type {kind!r}: expected positive {sorted(wanted)}, found {rope}")
    elif kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        problems.append(f"rope_scaling: expected low_freq_factor below high_freq_factor, found {rope}")
    elif kind == "llama3":
        return theta, RopeScaling(**rope)
    return theta, None


def is_positive(value: Any) -> bool:
    """Is this a number above 0, and no absurd one?"""
    return type(value) in (int, float) and 0 < value < 1e12


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError with the file's name when it is absent, not one, or names a field twice."""
    try:
        value = json.loads(read_text(file), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a readable JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text(file: Path) -> str:
    """Its text, which is UTF-8. Raises OSError or ValueError, also on a pipe or device, which would be read for ever."""
    if not file.is_file():
        raise OSError("no such file")
    return file.read_text(encoding="utf-8")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object. Raises ValueError on one that is there twice: which of the two counts?"""
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError(f"a field comes twice among {', '.join(name for name, _ in pairs)}")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Transformer
# ---------------------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """weight * round(x / sqrt(mean(x^2) + eps)) over the last axis: the norm in float32, rounded to x's dtype before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """theta^(-2i/Dh) for i < Dh/2, with Llama-3's scaling where the config asks for it; (Dh/2,) float32."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    freq = 1.0 / config.rope_theta ** steps
    if (s := config.rope_scaling) is None:
        return freq
    turns = s.original_max_position_embeddings * freq / (2 * math.pi)  # full turns within the original context
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * freq / s.factor + blend * freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B,H,T,Dh): halves (a, b) -> (a cos - b sin, b cos + a sin), in x's dtype.

    Angles and their cos and sin are float32; they, and each product, are rounded to x's dtype where transformers rounds, so
    that bfloat16 logits equal its logits bit for bit.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def project(x: Tensor, *maps: nn.Module) -> Sequence[Tensor]:
    """[map(x) for each map]; maps of one type with a method `together` share what they can (adapters do: one product for all their A)."""
    together = getattr(maps[0], "together", None)
    return together(x, maps) if together and len({type(each) for each in maps}) == 1 else [each(x) for each in maps]


@dataclass
class Context:
    """What one forward call hands to every block."""

    cos: Tensor  # (B or 1, 1, T, Dh/2)
    sin: Tensor
    mask: Tensor | None = None  # (B,1,T,S) true where a query may look; None: plain causal over the T new tokens
    positions: Tensor | None = None  # (B or 1,T) place of each new token in its row
    cache: Cache | None = None
    lengths: Tensor | None = None  # (B,) real new tokens per row; None: all T


class Attention(nn.Module):
    """softmax(q k^T / sqrt(Dh)) v with rotary positions, grouped key/value heads and, for Qwen3, RMS-normed q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, D = layer, config.head_dim, config.hidden_size
        heads, groups = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, heads, bias=False)
        self.k_proj = nn.Linear(D, groups, bias=False)
        self.v_proj = nn.Linear(D, groups, bias=False)
        self.o_proj = nn.Linear(heads, D, bias=False)
        norms = config.model_type == "qwen3"
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))  # (B,H,T,Dh), twice (B,K,T,Dh)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self.layer, k, v, ctx)  # (B,K,S,Dh)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=ctx.mask, is_causal=ctx.mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B,T,D)


class SwiGLU(torch.autograd.Function):
    """y = silu(g) u;  dg = dy u silu'(g), du = dy silu(g). Only g and u are kept."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * u, g), F.silu(g).mul_(dy)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)  # (B,T,F)
        return self.down_proj(SwiGLU.apply(gate, up))


class Block(nn.Module):
    """h + attention(norm h), then h + mlp(norm h); after one of the two, the side path if there is one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.side_path: nn.Module | None = None  # (h, state, lengths) -> (h', state)
        self.side_site = "block"  # or "attention": where the side path sits

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), ctx)
        h = self.side("attention", h, ctx)
        h = h + self.mlp(self.post_attention_layernorm(h))
        return self.side("block", h, ctx)

    def side(self, site: str, h: Tensor, ctx: Context) -> Tensor:
        """The side path's h' at its own site, with its state read from and left in the cache; h itself elsewhere."""
        if self.side_path is None or self.side_site != site:
            return h
        h, state = self.side_path(h, ctx.cache and ctx.cache.side.get(self.layer), ctx.lengths)
        if ctx.cache is not None and state is not None:  # None: of what stands in a side path's place
            ctx.cache.side[self.layer] = state
        return h


class Cache:
    """Keys, values (L x (B,K,capacity,Dh)), tokens so far per row (B,) on the CPU, and the side paths' states by layer."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self.side: dict[int, tuple[Tensor, ...]] = {}
        self.capacity = capacity

    def append(self, layer: int, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Write k, v (B,K,T,Dh) at each row's own next positions; returns what the queries look at, (B,K,S,Dh)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer][rows, :, ctx.positions] = k.transpose(1, 2)
        self.values[layer][rows, :, ctx.positions] = v.transpose(1, 2)
        if ctx.mask is None:
            return k, v  # the cache was empty: plain causal attention among the new tokens
        S = ctx.mask.shape[-1]
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Count the new real tokens of each row: `lengths` (B,), or all of them."""
        self.lengths = self.lengths + (tokens if lengths is None else lengths.to("cpu", torch.int64))

    def put(self, rows: Sequence[int], other: Cache) -> None:
        """Overwrite these rows with the rows of `other`: keys, values, lengths and side-path state."""
        index, width = torch.tensor(rows, device=self.keys[0].device), other.capacity
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values):
            mine[index, :, :width] = theirs
        self.lengths[torch.tensor(rows)] = other.lengths
        for layer, state in other.side.items():
            full = self.side.setdefault(layer, tuple(s.new_zeros(len(self.lengths), *s.shape[1:]) for s in state))
            for mine, theirs in zip(full, state):
                mine[index] = theirs

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every other row; a row named more than once is copied."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys, self.values = [k[index] for k in self.keys], [v[index] for v in self.values]
        self.lengths = self.lengths[torch.tensor(rows)]
        self.side = {layer: (num[index], den[index]) for layer, (num, den) in self.side.items()}


class Transformer(nn.Module):
    """tokens (B,T) -> hidden (B,T,D) -> logits (B,T,V). Its weights are for `load_model` or `init_weights` to fill."""

    model: Any  # embed_tokens, layers (of Block), norm: a checkpoint's names
    lm_head: nn.Linear
    inverse_frequencies: Tensor  # (Dh/2,)
    folder: Path | None  # where load_model found it,
    fingerprint: str | None  # and which backbone it is
    adapter_config: Any  # these two are what talan.attach leaves, if it was called
    talan_config: Any

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in backward
        self.source, self.folder, self.fingerprint = "", None, None
        self.model = nn.Module()
        table = torch.zeros(config.vocab_size, config.hidden_size)  # on the meta device a random start imports half of torch
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inverse_frequencies", inverse_frequencies(config), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V,D): the token embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Whatever casts the weights, as .bfloat16() does, leaves the rotary frequencies in float32."""
        super()._apply(fn, recurse)
        self.inverse_frequencies = inverse_frequencies(self.config).to(self.inverse_frequencies.device)
        return self

    def forward(self, tokens: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Final normed hidden states (B,T,D) of tokens (B,T); with a cache, the rows go on from what it holds.

        lengths (B,): real tokens per row, the rest is padding on the right; needed only with a cache (None: all T).
        Raises ValueError on a wrong shape or when the cache is too small.
        """
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64) or (lengths is not None and lengths.shape != tokens.shape[:1]):
            raise ValueError(f"expected integer tokens (B,T) and lengths (B,), found {tuple(tokens.shape)} {tokens.dtype}"
                             + ("" if lengths is None else f" and {tuple(lengths.shape)}"))
        ctx = self.context(tokens, cache, lengths)
        try:
            h = self.model.embed_tokens(tokens)  # (B,T,D)
        except IndexError:  # on a CPU; a GPU's own assertion is fatal, and a check here would have to wait for it at each call
            raise ValueError(f"expected token ids from 0 to {self.config.vocab_size - 1}, found {tokens.min()} to {tokens.max()}") from None
        for block in self.model.layers:
            recompute = self.checkpointing and cache is None and torch.is_grad_enabled()  # a second pass would read what the first left in a cache
            h = checkpoint(block, h, ctx, use_reentrant=False) if recompute else block(h, ctx)  # False: h needs no gradient of its own
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        return self.model.norm(h)

    def context(self, tokens: Tensor, cache: Cache | None, lengths: Tensor | None) -> Context:
        """Rotary tables, write positions and mask of this call."""
        B, T = tokens.shape
        positions, mask = torch.arange(T)[None], None  # (1,T)
        if cache is not None:
            if len(cache.lengths) != B or int(cache.lengths.max()) + T > cache.capacity:
                raise ValueError(f"cache of {len(cache.lengths)} rows x {cache.capacity} positions, of which "
                                 f"{int(cache.lengths.max())} are taken: cannot add {B} rows x {T} tokens")
            if lengths is not None and lengths.device.type == "cpu" and not (0 <= int(lengths.min()) and int(lengths.max()) <= T):
                raise ValueError(f"lengths: expected 0 to {T} real tokens a row, found {lengths.tolist()}")  # on a GPU the check would wait for it
            positions = cache.lengths[:, None] + positions  # (B,T)
            if int(cache.lengths.max()) > 0:
                mask = torch.arange(int(positions.max()) + 1) <= positions[:, None, :, None]  # (B,1,T,S)
                mask = mask.to(tokens.device, non_blocking=True)
        positions = positions.to(tokens.device, non_blocking=True)
        angle = positions[:, None, :, None].float() * self.inverse_frequencies  # (B,1,T,Dh/2)
        return Context(angle.cos(), angle.sin(), mask, positions, cache, lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (...,D) -> logits (...,V), in the dtype of the weights."""
        return F.linear(hidden, self.head_weight)

    def init_weights(self, seed: int) -> None:
        """Fresh weights: normal(0, 0.02), residual outputs / sqrt(2L), norms one; each from its own seeded generator."""
        for name, p in self.named_parameters():
            std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            with torch.no_grad():
                p.fill_(1) if p.dim() == 1 else p.copy_(torch.randn(p.shape, generator=generator(seed, name)) * std)


def generator(*parts: Any) -> torch.Generator:
    """A CPU random generator seeded by the text of `parts`, for example (seed, parameter name): no stream is shared."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Where a run takes place
# ---------------------------------------------------------------------------------------------------------------------

def choose_device(name: str) -> torch.device:
    """auto: the GPU when there is one. Raises ValueError on a name that torch does not know or a GPU that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}, which nothing here was tried on")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} asked for, {torch.cuda.device_count()} GPUs found")
    return device


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, up to 2 GiB, instead of returning it: on CPUs the page faults of fresh memory cost a step
    as much as its elementwise arithmetic. Linux with glibc (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD); nothing elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 2**31 - 1)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU. Raises ValueError on any other name."""
    names = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, found {name!r}{nearest(name, names)}")
    return names[name]


def header(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Settings, commit (-dirty: with changes; None: no git, or no repository), versions and hardware of this run."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"settings": settings, "commit": commit or None, "device": str(device),
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads", "python": platform.python_version(),
            "versions": {m.__name__: m.__version__ for m in (torch, numpy, tokenizers, safetensors)}}


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------

WANTED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def resolve_folder(path: str | Path) -> Path:
    """A local folder as it is, a Hugging Face id ("Qwen/Qwen3-0.6B") downloaded or from its cache. Raises ValueError."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith(".") or os.path.exists(path):
        raise ValueError(f"{path}: {'a file' if os.path.exists(path) else 'no such folder'}, and not a Hugging Face id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=WANTED))
    except Exception as error:  # offline, unknown or gated repository: the library raises a dozen types
        raise ValueError(f"{path}: no such local folder, and it could neither be downloaded from the Hugging Face hub nor "
                         f"found in its cache ({type(error).__name__}); give a local folder or connect once") from None


def load_model(path: str | Path, device: Any = "cpu", dtype: torch.dtype | str | None = None) -> Transformer:
    """The checkpoint in `path` (folder or hub id) as a Transformer in eval mode.

    dtype None keeps the file's. On the CPU and without a change of dtype the weights are the memory-mapped file itself.
    Raises ValueError on another dtype, and one that lists every tensor which is missing, unexpected, of the wrong shape or of an unknown dtype.
    """
    folder = resolve_folder(path)
    config = ModelConfig.from_dir(folder)
    with torch.device("meta"):
        model = Transformer(config)
    files = tensor_files(folder)
    check_tensors(model, files, folder)
    asked = dtype
    if dtype is None:
        dtype = DTYPES[tensor_info(files["model.embed_tokens.weight"])["model.embed_tokens.weight"][1]]
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, found {asked!r}")
    weights = {name: read_tensor(files[name], name).to(device, dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.inverse_frequencies = model.inverse_frequencies.to(device)
    model.source, model.folder, model.fingerprint = str(path), folder, fingerprint(config, folder)
    return model.eval()


def fingerprint(config: ModelConfig, folder: Path) -> str:
    """sha256 of what the config computes and of tokenizer.json: the identity that an adapter remembers its backbone by."""
    values, defaults = dataclasses.asdict(config), {f.name: f.default for f in dataclasses.fields(config)}
    computed = {k: v for k, v in values.items() if k not in ("dtype", "max_position_embeddings") and v != defaults[k]}
    digest = hashlib.sha256(json.dumps(computed, sort_keys=True).encode())
    if (folder / "tokenizer.json").is_file():
        digest.update((folder / "tokenizer.json").read_bytes())
    return digest.hexdigest()


def file_hash(file: str | Path) -> str:
    """sha256 of a file's bytes, read piece by piece."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, from model.safetensors or the index of its shards.

    An index may name files of its own folder only. They may be symbolic links to anywhere, as those of the hub's cache are.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict.fromkeys(tensor_info(folder / "model.safetensors"), folder / "model.safetensors")
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(f, str) and Path(f).name == f for f in table.values()):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names in the same folder")
    held = {name: shard for shard in sorted(set(table.values())) for name in tensor_info(folder / shard)}
    wrong = [f"{name}: index says {table.get(name)}, found in {held.get(name)}"
             for name in sorted(set(table) | set(held)) if table.get(name) != held.get(name)]
    if wrong:
        raise ValueError(f"{index}: does not match its shards:\n  " + "\n  ".join(wrong))
    return {name: folder / shard for name, shard in held.items()}


def tensor_info(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of every tensor in a safetensors file. Raises ValueError when it is not one."""
    try:
        if not file.is_file():
            raise OSError("no such file")
        with safe_open(file, framework="pt") as f:
            return {name: (tuple(f.get_slice(name).get_shape()), f.get_slice(name).get_dtype()) for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a readable safetensors file (pickled weights, such as pytorch_model.bin, are never read: "
                         f"convert them to safetensors): {error}") from None


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor, mapped from the file. The file is opened per tensor so that a converted tensor's pages are let go."""
    with safe_open(file, framework="pt") as f:
        return f.get_tensor(name)


def check_tensors(model: Transformer, files: dict[str, Path], folder: Path) -> None:
    """Compare the checkpoint's names, shapes and dtypes with the model's; raises ValueError with every offender."""
    info = {name: entry for file in set(files.values()) for name, entry in tensor_info(file).items()}
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name for name in info if not name.endswith("rotary_emb.inv_freq")}  # a buffer of old checkpoints
    if model.config.tie_word_embeddings and "lm_head.weight" in found and "model.embed_tokens.weight" in found:
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        if info[head] == info[table] and info[head][1] in DTYPES and torch.equal(read_tensor(files[head], head), read_tensor(files[table], table)):
            found.discard("lm_head.weight")  # written although tied, and equal: nothing is lost
    problems = [f"missing: {name} {want[name]}" for name in sorted(set(want) - found)]
    problems += [f"unexpected: {name} {info[name][0]}" for name in sorted(found - set(want))]
    for name in sorted(found & set(want)):
        shape, dtype = info[name]
        if shape != want[name]:
            problems.append(f"shape: {name} is {shape}, config.json says {want[name]}")
        if dtype not in DTYPES:
            problems.append(f"dtype: {name} is {dtype}, expected one of {sorted(DTYPES)}")
    if problems:
        raise ValueError(f"{folder}: the tensors do not fit config.json:\n  " + "\n  ".join(problems))


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file or folder beside `path`, renamed to it when the block ends well and removed when it does not.

    The disk has all of it before the rename, and the rename before this ends: a power cut leaves the old or the new, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        for part in (*tmp.rglob("*"), tmp):
            sync(part)
        os.replace(tmp, path)
        sync(path.parent)
    finally:
        shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return once the disk has this file's bytes, or this folder's names (fsync(2)); Windows cannot open a folder for it."""
    if os.name == "posix":
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def save_model(model: Transformer, folder: str | Path, backbone_only: bool = False) -> None:
    """Write a Transformer as a Hugging Face folder: its weights, and config and tokenizer files of where it was loaded.

    The folder appears at once and complete. Raises ValueError when the model was not loaded from a folder, or has tensors
    beyond a plain checkpoint's (backbone_only leaves those out).
    """
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    with torch.device("meta"):
        plain = set(dict(Transformer(model.config).named_parameters()))
    extra = [] if backbone_only else sorted(set(weights) - plain)
    if extra or model.folder is None:
        raise ValueError(f"{folder}: not a bare model loaded from a folder" + (f"; first extra tensor: {extra[0]}" if extra else ""))
    weights = {name: weights[name] for name in plain}
    with atomic(folder) as tmp:
        tmp.mkdir()
        save_file(weights, tmp / "model.safetensors", metadata={"format": "pt"})
        for name in WANTED:
            if "safetensors" not in name and name != "config.json" and (model.folder / name).exists():
                shutil.copyfile(model.folder / name, tmp / name)
        raw = read_json(model.folder / "config.json")
        dtype = str(model.head_weight.dtype).removeprefix("torch.")
        raw |= {key: dtype for key in ("dtype", "torch_dtype") if key in raw or key == "dtype"}
        (tmp / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and chat rendering
# ---------------------------------------------------------------------------------------------------------------------

# For a base model without a chat template: "Question: ...\nAnswer:\n...<eos>\n", a system text first on its own lines.
PLAIN_TEMPLATE = ("{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
                  "Question: {{ m.content }}\n{% else %}Answer:\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
                  "{% if add_generation_prompt %}Answer:\n{% endif %}")


@dataclass
class Tokenizer:
    """Text <-> token ids, and messages -> text by the model's own chat template."""

    core: tokenizers.Tokenizer
    template: jinja2.Template
    eos_ids: tuple[int, ...]  # every id that ends a turn, sorted
    specials: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... as the template sees them
    begin: tuple[int, ...] = ()  # what goes before a text without a template

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text. Nothing is added: a template writes its own BOS."""
        return self.encoding(text).ids

    def encoding(self, text: str) -> tokenizers.Encoding:
        """The same with each token's place in the text. Raises ValueError where the tokenizer has no token for a character."""
        try:
            return self.core.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"the tokenizer refuses this text: {error}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of token ids."""
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """messages [{role, content}] as text; thinking is off, dates are pinned. Raises ValueError when the template does."""
        try:
            return render(self.template, messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None,
                          documents=None, enable_thinking=False, date_string=TODAY.strftime("%d %b %Y"), **self.specials)
        except Exception as error:  # the template is a program: whatever it raises, it refuses these messages
            raise ValueError(f"the chat template refuses these messages: {error}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """tokenizer.json, chat template and stop ids of a checkpoint folder or hub id. Raises ValueError."""
    folder = resolve_folder(path)
    try:
        text = read_text(folder / "tokenizer.json")
        if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):  # a wrong one makes the library end the process
            raise ValueError("a continuing_subword_prefix is not supported")
        core = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{folder / 'tokenizer.json'}: expected a readable tokenizer: {error}") from None
    core.no_padding()
    core.no_truncation()
    begin = begin_ids(core)
    core.post_processor = tokenizers.processors.Sequence([])  # adds no BOS and leaves character offsets exact
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    check_vocabulary(core, settings, folder)
    named = {name: token.get("content", token) if isinstance(token, dict) else token for name, token in settings.items() if name.endswith("_token")}
    if wrong := [f"{name}: {token!r}" for name, token in named.items() if not isinstance(token, (str, bool, type(None)))]:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: expected tokens in text, found {', '.join(wrong)}")
    specials = {name: token for name, token in named.items() if isinstance(token, str)}
    eos_ids = stop_ids(core, specials, folder)
    return Tokenizer(core, compile_template(template_source(settings, folder)), eos_ids, specials, begin)


def begin_ids(core: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's own post-processor puts before a text: the BOS of Llama, nothing for Qwen."""
    with contextlib.suppress(Exception):  # the library raises plain Exception, where it has no token for the letter
        found = core.encode("a")
        if 0 in found.special_tokens_mask:
            return tuple(found.ids[:found.special_tokens_mask.index(0)])
    return ()


def check_vocabulary(core: tokenizers.Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """The added tokens that tokenizer_config.json lists must be in tokenizer.json, and all ids inside the embedding."""
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(isinstance(e, dict) and isinstance(e.get("content"), str) for e in added.values()):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: expected {{content}} by id, found {str(added)[:200]}")
    wrong = [f"{entry['content']!r}: tokenizer_config.json says id {key}, tokenizer.json says {core.token_to_id(entry['content'])}"
             for key, entry in added.items() if str(core.token_to_id(entry["content"])) != key]
    rows = ModelConfig.from_dir(folder).vocab_size if (folder / "config.json").exists() else LIMIT
    top = max(core.get_vocab().values(), default=-1)
    if top >= rows:
        wrong.append(f"highest token id {top}, but config.json has vocab_size {rows}")
    if wrong:
        raise ValueError(f"{folder}: tokenizer.json does not fit its neighbours:\n  " + "\n  ".join(wrong))


def stop_ids(core: tokenizers.Tokenizer, specials: dict[str, str], folder: Path) -> tuple[int, ...]:
    """Union of the end-of-sequence ids in generation_config.json, tokenizer_config.json and config.json."""
    token, wrong = specials.get("eos_token"), []
    ids = [] if token is None or (i := core.token_to_id(token)) is None else [i]
    if token is not None and not ids:
        wrong.append(f"tokenizer_config.json: eos_token {token!r} is not in tokenizer.json")
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or not 0 <= i < LIMIT for i in values):
            wrong.append(f"{name}: eos_token_id: expected a token id or a list of them, found {value!r}")
        ids += values
    if wrong:
        raise ValueError(f"{folder}: unusable stop tokens:\n  " + "\n  ".join(wrong))
    return tuple(sorted(set(ids)))


def template_source(settings: dict[str, Any], folder: Path) -> str:
    """chat_template.jinja, else tokenizer_config.json's chat_template (a list: the one named default), else the plain one."""
    if (file := folder / "chat_template.jinja").exists():
        try:
            return read_text(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: expected a readable template: {error}") from None
    template = settings.get("chat_template") or PLAIN_TEMPLATE
    if isinstance(template, list):
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template: expected text, or a list with one named 'default', found {settings['chat_template']!r}")
    return template


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------

def pad_rows(rows: Sequence[Sequence[int]], device: Any = "cpu", multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens (B,T), zeros on the right up to a multiple of `multiple`, and their lengths (B,)."""
    tokens = torch.zeros(len(rows), -(-max(map(len, rows)) // multiple) * multiple, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, :len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens.to(device), torch.tensor([len(row) for row in rows])


def choose(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """Next ids (B,) from logits (B,V): arg max at temperature 0, else the u-quantile (B,) of the top-p distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() - logits.max(-1, keepdim=True).values  # so that no temperature makes it infinite
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B,V)
    before = p.cumsum(-1) - p  # probability of everything likelier
    p = p.masked_fill(before >= top_p, 0)  # the likeliest token always stays: nothing comes before it
    total = p.cumsum(-1)
    pick = torch.searchsorted(total, u[:, None].to(total) * total[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return order.gather(-1, pick)[:, 0]


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0, eos_ids: Iterable[int] = (), batch_rows: int = 16, prefill_tokens: int = 8192,
             ended: Callable[[list[int]], bool] | None = None, numbers: Sequence[int] | None = None) -> list[list[int]]:
    """Continue each prompt until an id of eos_ids (kept as the last id), `ended(ids so far)` or max_new_tokens; in the prompts' order.

    `batch_rows` rows run at once and a finished row takes the next prompt; prompts are read up to `prefill_tokens` at a time,
    padding included. Prompt i's n-th draw depends on (seed, i, n) only, not on the batch; `numbers` are the i where the prompts are
    some of many. Raises ValueError on bad prompts or settings.
    """
    check_generate(model, prompts, max_new_tokens, temperature, top_p, batch_rows, numbers)
    device, stop = model.head_weight.device, set(eos_ids)
    numbers = range(len(prompts)) if numbers is None else numbers
    draws = [torch.rand(max_new_tokens, dtype=torch.float64, generator=generator(seed, int(i))) for i in numbers]
    out: list[list[int]] = [[] for _ in prompts]
    queue = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if max_new_tokens else []  # the longest first, from the end
    rows: list[Any] = [None] * min(batch_rows, len(queue))  # which prompt each row works on; None: idle
    cache = Cache(model.config, len(rows), max(map(len, prompts), default=0) + max_new_tokens, device, model.head_weight.dtype)
    last = torch.zeros(len(rows), 1, dtype=torch.int64)
    training = model.training
    model.eval()
    bar = tqdm(total=len(prompts), desc="generate", unit="prompt", disable=None)

    def take(hidden: Tensor, which: Sequence[int]) -> None:
        """Choose the next token of these rows from their last hidden states (n,D); retire rows that are done."""
        ids = [rows[b] for b in which]
        u = torch.stack([draws[i][len(out[i])] for i in ids])
        chosen = choose(model.logits(hidden), temperature, top_p, u).tolist()
        for b, i, token in zip(which, ids, chosen):
            out[i].append(token)
            last[b] = token
            if token in stop or len(out[i]) == max_new_tokens or (ended is not None and ended(out[i])):
                rows[b] = None
                bar.update()
        bar.set_postfix(tokens=sum(map(len, out)), refresh=False)

    try:
        while queue or any(i is not None for i in rows):
            while queue and None in rows:  # prefill free rows; one that ends at its first token is free again
                free = [b for b, i in enumerate(rows) if i is None][:min(len(queue), max(1, prefill_tokens // len(prompts[queue[-1]])))]
                for b in free:
                    rows[b] = queue.pop()
                tokens, lengths = pad_rows([prompts[rows[b]] for b in free], device)
                part = Cache(model.config, len(free), tokens.shape[1], device, model.head_weight.dtype)
                hidden = model(tokens, part, lengths)
                cache.put(free, part)
                take(hidden[torch.arange(len(free)), lengths - 1], free)
            live = [b for b, i in enumerate(rows) if i is not None]
            if live and 2 * len(live) <= len(rows):  # nothing left to refill with: drop the idle rows
                cache.keep(live)
                rows, last = [rows[b] for b in live], last[live]
                live = list(range(len(live)))
            if live:
                step = torch.tensor([int(i is not None) for i in rows])  # an idle row does not advance
                hidden = model(last.to(device), cache, step)
                take(hidden[live, 0], live)
    finally:
        bar.close()
        model.train(training)
    return out


def check_generate(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float,
                   batch_rows: int, numbers: Sequence[int] | None) -> None:
    """Raise ValueError that lists every prompt or setting that `generate` cannot use."""
    V = model.config.vocab_size
    wrong = [f"prompt {i}: expected at least one token id" for i, p in enumerate(prompts) if len(p) == 0]
    wrong += [f"prompt {i}: token ids must be whole numbers" for i, p in enumerate(prompts) if torch.as_tensor(p).is_floating_point() and len(p)]
    wrong += [f"prompt {i}: token ids must be from 0 to {V - 1}, found {min(p)} to {max(p)}"
              for i, p in enumerate(prompts) if len(p) and not (0 <= min(p) and max(p) < V)]
    if type(max_new_tokens) is not int or type(batch_rows) is not int or not 0 <= max_new_tokens <= LIMIT or batch_rows < 1:
        wrong.append(f"expected max_new_tokens, a whole number from 0 to {LIMIT}, and batch_rows >= 1, found {max_new_tokens!r} and {batch_rows!r}")
    if numbers is not None and len(numbers) != len(prompts):
        wrong.append(f"expected a number for each of {len(prompts)} prompts, found {len(numbers)}")
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        wrong.append(f"expected temperature >= 0 and 0 < top_p <= 1, found {temperature} and {top_p}")
    if wrong:
        raise ValueError("generate: " + "\n  ".join(wrong))
