"""A Qwen3 / Llama transformer: config, blocks, cache, strict loader, `generate`.

Parameters have the names of the Hugging Face checkpoints, so loading compares two sets of names.

Shapes: B rows, T new tokens, S positions so far (cached and new), D hidden size, H query heads,
        K key/value heads, G = H / K, Dh head size, F MLP width, L layers, V vocabulary.
Rows are padded on the right: a real token never sees the pads behind it, so none are masked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import Record, atomic, checkpoint_folder, generator, read_json, write_json

MODEL_TYPES = ("qwen3", "llama")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Fields of config.json that change the computation -> the values accepted, beside null, false, 0
# and what is empty.
ALLOWED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,)}
ALLOWED |= {"layer_types": ({"full_attention"},), "partial_rotary_factor": (1,)}
ALLOWED |= dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), ())
ALLOWED |= dict.fromkeys(("attention_dropout", "quantization_config", "rope_interleaved"), ())
# Fields that leave the computation alone. One that is not known is named in a warning.
HARMLESS = (
    "architectures max_position_embeddings sliding_window max_window_layers dtype torch_dtype"
    " initializer_range use_cache bos_token_id eos_token_id pad_token_id auto_map _name_or_path"
    " transformers_version return_dict id2label label2id tokenizer_class is_llama_config"
    " transformers.js_config"
)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's: wavelengths above original / low are stretched by factor, some below blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about the computation."""

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

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """`path`/config.json. Raises ValueError on a field that is absent or not computed here."""
        file = resolve_folder(path) / "config.json"
        return cls.from_dict(read_json(file), str(file))

    @classmethod
    def from_dict(cls, raw: Record, source: str = "config.json") -> ModelConfig:
        """A parsed config.json, in the old spelling or in transformers 5's. Raises ValueError."""
        kind, names = raw.get("model_type"), [field.name for field in dataclasses.fields(cls)]
        if kind not in MODEL_TYPES:
            raise ValueError(f"{source}: model_type: expected one of {MODEL_TYPES}, not {kind!r}")
        for name in set(raw) & set(ALLOWED):
            value = set(raw[name]) if isinstance(raw[name], list) else raw[name]
            if value and value not in ALLOWED[name]:
                raise ValueError(f"{source}: {name}: not computed here, found {raw[name]!r}")
        known = {*names, *ALLOWED, *HARMLESS.split(), "rope_parameters"}
        unknown = [name for name in sorted(set(raw) - known) if raw[name]]
        if unknown:
            print(f"warning: {source}: ignored: {', '.join(unknown)}", file=sys.stderr)
        sizes: Record = {name: raw.get(name) for name in names[1:8]}
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        sizes["head_dim"] = sizes["head_dim"] or 128  # Qwen3's default; Llama's follows
        for name, size in sizes.items():
            if type(size) is not int or not 0 < size < 1 << 24:
                raise ValueError(f"{source}: {name}: expected a whole number, found {size!r}")
        if kind != "qwen3" and not raw.get("head_dim"):
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        sizes["rope_theta"], sizes["rope_scaling"] = read_rope(raw, source)
        sizes["rms_norm_eps"] = raw.get("rms_norm_eps", 1e-6)
        return cls(kind, **sizes, tie_word_embeddings=raw.get("tie_word_embeddings", False))


def read_rope(raw: Record, source: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling, of rope_theta and rope_scaling or of transformers 5's rope_parameters."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), "partial_rotary_factor": 1}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"{source}: {name}: expected an object, found {raw[name]!r}")
        rope |= raw.get(name) or {}
    theta, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor")
    kinds = {rope.pop("rope_type", "default"), rope.pop("type", "default")} - {"default"}
    if share == 1 and not kinds and not rope:
        return theta, None
    if share != 1 or kinds != {"llama3"} or set(rope) != set(RopeScaling.__dataclass_fields__):
        raise ValueError(f"{source}: rope: only default and llama3 are computed, found {raw}")
    return theta, RopeScaling(**rope)


class Normalize(torch.autograd.Function):
    """y = s x, s = 1 / sqrt(mean(x^2) + eps);  dx = s (dy - y mean(y dy)), keeping x alone.

    On a CPU F.rms_norm would keep a float32 copy of a bfloat16 x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """x (...,size) -> (...,size)."""
        ctx.save_for_backward(x)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """dy (...,size) -> dx (...,size)."""
        x = ctx.saved_tensors[0].float()
        s = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)  # (...,1)
        y = s * x
        dx = s * (dy - y * (y * dy).mean(-1, keepdim=True))
        return dx.to(dy.dtype), None


class RMSNorm(nn.Module):
    """weight * (x / sqrt(mean(x^2) + eps)) over the last axis, rounded to x's dtype in between."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (...,size) -> (...,size)."""
        if x.dtype == torch.bfloat16 and not x.is_cuda:
            return self.weight * Normalize.apply(x, self.eps)
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """theta^(-2i/Dh) for i < Dh/2, with Llama 3's scaling where asked for; (Dh/2,) float32."""
    steps = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    freq = 1.0 / config.rope_theta**steps
    s = config.rope_scaling
    if s is None:
        return freq
    turns = s.original_max_position_embeddings * freq / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return torch.lerp(freq / s.factor, freq, blend.clamp(0, 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B,H,T,Dh): halves (a, b) -> (a cos - b sin, b cos + a sin).

    In x's dtype, rounded where transformers rounds: bfloat16 logits are its logits bit for bit.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@dataclass
class Context:
    """What one forward call hands to every block."""

    cos: Tensor  # (B or 1, 1, T, Dh/2)
    sin: Tensor
    positions: Tensor  # (B or 1, T) of the new tokens in their rows
    mask: Tensor | None  # (B,1,T,S) true where a query may look
    cache: Cache | None
    visible: int  # S of the cache that queries see; 0: they see the new tokens, causally
    lengths: Tensor | None  # (B,) real new tokens of each row; None: all T


class Attention(nn.Module):
    """softmax(q k^T / sqrt(Dh)) v with rotary positions and grouped heads; Qwen3 norms q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, Dh, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        q_width, kv_width = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
        self.layer, self.head_dim = layer, Dh
        self.q_proj = nn.Linear(D, q_width, bias=False)
        self.k_proj = nn.Linear(D, kv_width, bias=False)
        self.v_proj = nn.Linear(D, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, D, bias=False)
        has_norms = config.model_type == "qwen3"
        self.q_norm = RMSNorm(Dh, eps) if has_norms else nn.Identity()
        self.k_norm = RMSNorm(Dh, eps) if has_norms else nn.Identity()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B,T,D) -> (B,T,D)."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B,H,T,Dh)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B,K,T,Dh)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B,K,T,Dh)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self.layer, k, v, ctx)  # (B,K,S,Dh)
        # A mask with enable_gqa takes the slow math kernel (aten/src/ATen/native/transformers/cuda/
        # sdp_utils.cpp): in decoding, the heads of a group become queries of one head
        grouped = T == 1 and ctx.visible > 0
        if grouped:
            q = q.view(B, k.shape[1], -1, self.head_dim)  # (B,K,G,Dh)
        causal, gqa = ctx.mask is None and not ctx.visible, not grouped
        y = F.scaled_dot_product_attention(q, k, v, ctx.mask, is_causal=causal, enable_gqa=gqa)
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2)  # (B,T,H,Dh)
        return self.o_proj(y.reshape(B, T, -1))  # (B,T,D)


class SwiGLU(torch.autograd.Function):
    """y = silu(g) u;  dg = dy u silu'(g), du = dy silu(g). Only g and u are kept for backward."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        """g, u (...,F) -> (...,F)."""
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dy (...,F) -> dg, du (...,F)."""
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * u, g), F.silu(g).mul_(dy)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D)."""
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """h + attention(norm h), then h + mlp(norm h); after one of them the side path, if any."""

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
        """h (B,T,D) -> (B,T,D)."""
        h = h + self.self_attn(self.input_layernorm(h), ctx)
        h = self.add_side_path(h, ctx) if self.side_site == "attention" else h
        h = h + self.mlp(self.post_attention_layernorm(h))
        return self.add_side_path(h, ctx) if self.side_site == "block" else h

    def add_side_path(self, h: Tensor, ctx: Context) -> Tensor:
        """The side path's h', its state read from and left in the cache; without one, h."""
        if self.side_path is None:
            return h
        if ctx.cache is None:
            return self.side_path(h, None, ctx.lengths)[0]
        h, state = self.side_path(h, ctx.cache.side.get(self.layer), ctx.lengths)
        ctx.cache.write_side(self.layer, state)
        return h


class Cache:
    """Keys and values by layer, each (rows,K,capacity,Dh), and the side paths' states by layer."""

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, device: Any = "cpu", dtype: Any = None
    ) -> None:
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # real tokens of a row,
        self.host_lengths = torch.zeros(rows, dtype=torch.int64)  # and without a wait for a GPU
        self.side: dict[int, tuple[Tensor, ...]] = {}  # what a side path keeps of each row

    def append(self, layer: int, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Write k, v (B,K,T,Dh) at their positions; returns what the queries see (B,K,S,Dh)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B,1)
        self.keys[layer][rows, :, ctx.positions] = k.transpose(1, 2)
        self.values[layer][rows, :, ctx.positions] = v.transpose(1, 2)
        if not ctx.visible:
            return k, v
        return self.keys[layer][:, :, : ctx.visible], self.values[layer][:, :, : ctx.visible]

    def write_side(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """A side path's new state, in the place of the old: a CUDA graph knows places."""
        for old, new in zip(self.side.setdefault(layer, state), state):
            old.copy_(new)

    def write_rows(self, rows: Sequence[int], other: Cache) -> None:
        """Overwrite these rows with those of `other`."""
        index, width = torch.tensor(rows), other.keys[0].shape[2]
        self.host_lengths[index] = other.host_lengths
        index = index.to(self.lengths.device)
        self.lengths[index] = other.lengths
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values):
            mine[index, :, :width] = theirs
        for layer, state in other.side.items():
            empty = tuple(s.new_zeros(len(self.lengths), *s.shape[1:]) for s in state)
            for mine, theirs in zip(self.side.setdefault(layer, empty), state):
                mine[index] = theirs

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop every other row; a row named more than once is copied."""
        index = torch.tensor(rows)
        self.host_lengths = self.host_lengths[index]
        index = index.to(self.lengths.device)
        self.lengths = self.lengths[index]
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]
        for layer, state in self.side.items():
            self.side[layer] = tuple(s[index] for s in state)


class Transformer(nn.Module):
    """tokens (B,T) -> hidden (B,T,D) -> logits (B,T,V); load_model fills the weights."""

    model: Any  # embed_tokens, layers and norm, named as in a checkpoint
    lm_head: nn.Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in backward
        self.source = ""  # what load_model was asked for
        self.folder: Path | None = None  # where it was found
        self.fingerprint = ""  # see `fingerprint`
        D, V = config.hidden_size, config.vocab_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(V, D), freeze=False)
        layers = range(config.num_hidden_layers)
        self.model.layers = nn.ModuleList(Block(config, layer) for layer in layers)
        self.model.norm = RMSNorm(D, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)
        # no buffer, as what casts the weights, .bfloat16() for one, must leave it in float32
        self.inverse_frequencies = inverse_frequencies(config)  # (Dh/2,)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V,D): the token embedding itself when tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None, lengths: Any = None) -> Tensor:
        """Final normed hidden states (B,T,D) of tokens (B,T); with a cache, rows go on from it.

        lengths (B,): real tokens of each row, needed with a cache only; the rest is padding on the
        right. Raises ValueError on a wrong shape or a full cache.
        """
        if tokens.dim() != 2 or (lengths is not None and lengths.shape != tokens.shape[:1]):
            found = f"{tokens.shape}, {lengths}"
            raise ValueError(f"expected tokens (B,T), lengths (B,), found {found}")
        visible = 0
        if cache is not None:
            (B, T), longest = tokens.shape, int(cache.host_lengths.max())
            rows, _, capacity, _ = cache.keys[0].shape
            if rows != B or longest + T > capacity:
                room = f"{rows} rows x {capacity - longest} tokens"
                raise ValueError(f"the cache has room for {room}, found {B} rows x {T} tokens")
            visible = longest + T if longest else 0
            cache.host_lengths += T if lengths is None else lengths.cpu()
        return self.run(tokens, cache, lengths, visible)

    def run(
        self, tokens: Tensor, cache: Any, lengths: Any, visible: int, padded: bool = False
    ) -> Tensor:
        """`forward` without a check or a wait for the device.

        visible: places of the cache that queries may see; padded: the last may be empty still.
        """
        (B, T), device = tokens.shape, tokens.device
        positions, mask = torch.arange(T, device=device)[None], None  # (1,T)
        if lengths is not None:
            lengths = lengths.to(device, non_blocking=True)
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B,T)
            cache.lengths += T if lengths is None else lengths
        if visible and (B > 1 or T > 1 or padded):
            mask = torch.arange(visible, device=device) <= positions[:, None, :, None]  # (B,1,T,S)
        self.inverse_frequencies = self.inverse_frequencies.to(device)
        angle = positions[:, None, :, None].float() * self.inverse_frequencies  # (B,1,T,Dh/2)
        ctx = Context(angle.cos(), angle.sin(), positions, mask, cache, visible, lengths)
        recompute = self.checkpointing and cache is None and torch.is_grad_enabled()
        h = self.model.embed_tokens(tokens)  # (B,T,D)
        for block in self.model.layers:
            # not reentrant: that drops the gradient of a block whose h needs none
            h = checkpoint(block, h, ctx, use_reentrant=False) if recompute else block(h, ctx)
        return self.model.norm(h)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (...,D) -> logits (...,V), in the dtype of the weights."""
        return F.linear(hidden, self.head_weight)


FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja"
    " special_tokens_map.json model.safetensors model.safetensors.index.json model-*.safetensors"
).split()
TensorInfo = tuple[tuple[int, ...], Any]  # shape and dtype


def resolve_folder(path: str | Path) -> Path:
    """A folder (of a run: its newest step-N), or that of a hub id, downloaded; ValueError."""
    if Path(path).is_dir():
        return checkpoint_folder(path)
    if Path(path).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)):
        raise ValueError(f"{path}: expected a folder or a Hugging Face id owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=FILES))
    except Exception as error:  # offline, unknown, gated: the library raises a dozen types
        what = f"no such folder, and not to be had from the hub ({type(error).__name__})"
        raise ValueError(f"{path}: {what}; name a local folder or connect once") from None


def load_model(path: str | Path, device: Any = "cpu", dtype: Any = None) -> Transformer:
    """The checkpoint in `path` (folder or hub id) in eval mode; dtype None keeps the file's.

    On a CPU, without a change of dtype, the weights are the memory-mapped file itself. Raises
    ValueError that lists every tensor missing, unexpected, or of another shape or kind.
    """
    folder = resolve_folder(path)
    config = ModelConfig.from_dir(folder)
    with torch.device("meta"):
        model = Transformer(config)
    files, found = {}, {}
    for file in tensor_files(folder):
        for name, info in tensor_info(file).items():
            if not name.endswith(".rotary_emb.inv_freq"):  # Llama's of old: computed here
                files[name], found[name] = file, info
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and {head, table} <= set(files):
        same = torch.equal(*(load_file(files[name])[name] for name in (head, table)))
        found = {k: v for k, v in found.items() if k != head or not same}  # tied all the same
    problems = compare_tensors(dict(model.named_parameters()), found)
    if problems:
        raise ValueError("\n  ".join([f"{folder}: the tensors do not fit config.json:", *problems]))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or found[table][1]
    weights: dict[str, Tensor] = {}
    for file in tensor_files(folder):
        read = load_file(file).items()  # mapped
        weights |= {name: w.to(device, dtype) for name, w in read if name in found}
    model.load_state_dict(weights, strict=True, assign=True)
    model.source = str(Path(path).resolve()) if Path(path).is_dir() else str(path)
    model.folder = folder
    model.fingerprint = fingerprint(config, folder)
    return model.eval()


def fingerprint(config: ModelConfig, folder: Path) -> str:
    """sha256 of config.json's computation and of tokenizer.json: tells backbones apart.

    Fields at their default are left out, so that a new one keeps the old digests.
    """
    values = dataclasses.asdict(config)
    fields = dataclasses.fields(config)
    computed = {f.name: values[f.name] for f in fields if values[f.name] != f.default}
    digest = hashlib.sha256(json.dumps(computed, sort_keys=True).encode())
    if (folder / "tokenizer.json").is_file():
        digest.update((folder / "tokenizer.json").read_bytes())
    return digest.hexdigest()


def tensor_files(folder: Path) -> list[Path]:
    """model.safetensors, else the shards of the index. Raises ValueError."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(f)).name != f for f in shards.values()):
        raise ValueError(f"{index}: expected a weight_map of names to files of this folder")
    return [folder / shard for shard in sorted(set(shards.values()))]


def tensor_info(file: Path) -> dict[str, TensorInfo]:
    """Name -> (shape, dtype) of the tensors in a safetensors file. Raises ValueError."""
    info = {}
    try:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - it is no dict
                tensor = f.get_slice(name)
                dtype = DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
                info[name] = (tuple(tensor.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        what = "expected a safetensors file (pickled weights are never read)"
        raise ValueError(f"{file}: {what}: {error}") from None
    return info


def compare_tensors(want: dict[str, Tensor], found: dict[str, TensorInfo]) -> list[str]:
    """Names, shapes and dtypes of a file against those wanted, a line an offender."""
    problems = [f"missing: {name}" for name in sorted(set(want) - set(found))]
    for name, (shape, dtype) in sorted(found.items()):
        if name not in want:
            problems.append(f"unexpected: {name} {shape}")
        elif shape != tuple(want[name].shape):
            problems.append(f"shape: {name} is {shape}, expected {tuple(want[name].shape)}")
        elif dtype not in DTYPES.values():
            problems.append(f"dtype: {name} is {dtype}, expected one of {sorted(DTYPES)}")
    return problems


def save_model(model: Transformer, folder: str | Path, weights: dict[str, Tensor]) -> None:
    """Write weights as a Hugging Face folder, beside the files of where the model was loaded."""
    if model.folder is None:
        raise ValueError(f"{folder}: expected a model that load_model loaded")
    with atomic(folder) as tmp:
        tmp.mkdir()
        tensors = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})
        for name in FILES:
            if "safetensors" not in name and (model.folder / name).exists():
                shutil.copyfile(model.folder / name, tmp / name)
        dtype = str(model.head_weight.dtype).removeprefix("torch.")
        write_json(tmp / "config.json", read_json(tmp / "config.json") | {"dtype": dtype})


def pad_rows(
    rows: Sequence[Sequence[int]], device: Any = "cpu", multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens (B,T), zeros on the right up to a multiple, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = -(-int(lengths.max()) // multiple) * multiple
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens.to(device), lengths


def sample_token(logits: Tensor, sampling: tuple[float, float], u: Tensor) -> Tensor:
    """Next ids (B,) of logits (B,V): the likeliest at temperature 0, else top-p's u-quantile."""
    temperature, top_p = sampling
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() - logits.max(-1, keepdim=True).values  # any temperature stays finite
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    likelier = p.cumsum(-1) - p  # (B,V)
    total = p.masked_fill(likelier >= top_p, 0).cumsum(-1)  # the likeliest always stays
    pick = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)  # (B,1)
    return order.gather(-1, pick.clamp(max=p.shape[-1] - 1))[:, 0]


class Decoder:
    """Rows of `generate`: each has a prompt, or is idle, and gets one token more in each step."""

    def __init__(self, model: Transformer, prompts: Any, new_tokens: int, rows: int, sampling: Any):
        self.model, self.prompts, self.sampling = model, prompts, sampling  # (temperature, top_p)
        self.out: list[list[int]] = [[] for _ in prompts]  # the answers so far
        self.draws: dict[int, list[float]] = {}  # uniform numbers of a prompt, where it is sampled
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.queue = order if new_tokens else []  # the longest is taken first, from the end
        self.rows: list[Any] = [None] * min(rows, len(self.queue))  # the prompt of each, None: idle
        B, device, dtype = len(self.rows), model.head_weight.device, model.head_weight.dtype
        capacity = max(map(len, prompts), default=0) + new_tokens
        self.cache = Cache(model.config, B, capacity, device, dtype)
        self.last = torch.zeros(B, 1, dtype=torch.int64, device=device)  # the newest token of a row
        self.live = torch.zeros(B, dtype=torch.int64, device=device)  # 0: it stands still
        self.u = torch.zeros(B, dtype=torch.float64, device=device)  # the draw of its next token
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def next_tokens(self, prefill_tokens: int) -> list[tuple[int, int]]:
        """One step -> (row, token): of idle rows that take prompts, when an eighth of all is idle
        and prompts wait; else of every row that has one."""
        idle = [b for b, i in enumerate(self.rows) if i is None]
        busy = [b for b, i in enumerate(self.rows) if i is not None]
        if self.queue and (not busy or 8 * len(idle) >= len(self.rows)):
            size = max(1, prefill_tokens // len(self.prompts[self.queue[-1]]))
            idle = idle[: min(size, len(self.queue))]
            return list(zip(idle, self.prefill(idle)))
        if 2 * len(busy) <= len(self.rows):  # only when no prompts wait
            self.select_rows(busy)
            busy = list(range(len(busy)))
        ids = self.advance(max(self.size(b) for b in busy))
        return [(b, ids[b]) for b in busy]

    def size(self, row: int) -> int:
        """Tokens of a row's prompt and answer so far."""
        return len(self.prompts[self.rows[row]]) + len(self.out[self.rows[row]])

    def next_draws(self, rows: Sequence[int]) -> Tensor:
        """The uniform number of each row's next token; 0 where none is drawn."""
        prompts = [self.rows[b] for b in rows]
        u = [self.draws[i][len(self.out[i])] if i in self.draws else 0.0 for i in prompts]
        return torch.tensor(u, dtype=torch.float64)

    def prefill(self, rows: Sequence[int]) -> list[int]:
        """Read the next prompts of the queue into these rows; returns the token after each."""
        for b in rows:
            self.rows[b] = self.queue.pop()
        device, dtype = self.last.device, self.cache.keys[0].dtype
        tokens, lengths = pad_rows([self.prompts[self.rows[b]] for b in rows], device)  # (n,T)
        part = Cache(self.model.config, len(rows), tokens.shape[1], device, dtype)
        hidden = self.model(tokens, part, lengths)[torch.arange(len(rows)), lengths - 1]  # (n,D)
        self.cache.write_rows(rows, part)
        u = self.next_draws(rows).to(device)
        ids = sample_token(self.model.logits(hidden), self.sampling, u)  # (n,)
        self.last[torch.tensor(rows, device=device), 0] = ids
        return ids.tolist()

    def step(self, visible: int, padded: bool) -> None:
        """last -> the next token of every row, on the device alone; see Transformer.run."""
        hidden = self.model.run(self.last, self.cache, self.live, visible, padded)[:, 0]  # (B,D)
        self.last[:, 0] = sample_token(self.model.logits(hidden), self.sampling, self.u)

    def advance(self, longest: int) -> list[int]:
        """The next token of every row, the longest having `longest`; the host waits once.

        On a GPU the step is a CUDA graph, one for each 256 positions that are visible.
        """
        live = torch.tensor([i is not None for i in self.rows])
        self.live.copy_(live, non_blocking=True)
        self.u.copy_(self.next_draws(range(len(self.rows))), non_blocking=True)
        if not self.last.is_cuda:
            self.step(longest, padded=False)
            return self.last[:, 0].tolist()
        visible = min(-(-longest // 256) * 256, self.cache.keys[0].shape[2])
        if visible in self.graphs:
            self.graphs[visible].replay()
            return self.last[:, 0].tolist()
        self.step(visible, padded=True)  # this token; capturing computes nothing
        ids = self.last[:, 0].tolist()
        self.graphs[visible] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[visible]):
            self.step(visible, padded=True)
        return ids

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop every other row."""
        index = torch.tensor(rows, device=self.last.device)
        self.rows, self.graphs = [self.rows[b] for b in rows], {}
        self.cache.select_rows(rows)
        self.last, self.live, self.u = self.last[index], self.live[index], self.u[index]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Iterable[int] = (),
    batch_rows: int = 16,
    prefill_tokens: int = 8192,
    ended: Callable[[list[int]], bool] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt up to an id of eos_ids (kept), `ended(ids so far)` or max_new_tokens.

    batch_rows rows run at once, finished ones take the next prompts. Prompt i's n-th draw depends
    on (seed, i, n) alone, whatever the batch; `numbers` are the i. Raises ValueError.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(f"prompt {i}: expected ids of the vocabulary, found {prompt[:9]}")
    fits = 0 <= temperature < math.inf and 0 < top_p <= 1
    if not fits or batch_rows < 1 or max_new_tokens < 0:
        found = f"{temperature}, {top_p}, {batch_rows}, {max_new_tokens}"
        raise ValueError(f"temperature, top_p, batch_rows, max_new_tokens: no such values: {found}")
    stop, was_training = set(eos_ids), model.training
    decoder = Decoder(model, prompts, max_new_tokens, batch_rows, (temperature, top_p))
    if temperature:
        for i in range(len(prompts)):
            g = generator(seed, int(numbers[i]) if numbers else i)
            u = torch.rand(max_new_tokens, dtype=torch.float64, generator=g)
            decoder.draws[i] = u.tolist()
    model.eval()
    bar = tqdm(total=len(prompts), desc="generate", unit="prompt", disable=None)
    try:
        while decoder.queue or any(i is not None for i in decoder.rows):
            for b, token in decoder.next_tokens(prefill_tokens):
                answer = decoder.out[decoder.rows[b]]
                answer.append(token)
                if token in stop or len(answer) == max_new_tokens or (ended and ended(answer)):
                    decoder.rows[b] = None
                    bar.update()
    finally:
        bar.close()
        model.train(was_training)
    return decoder.out
