"""The TALAN side path, and low-rank adapters: attach, report, save, load, merge.

Shapes: B rows, T tokens, C tokens of a chunk, D hidden size, M memory slots,
        r memory width (side path) or rank (adapter), N tokens of all rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import Record, atomic, checkpoint_folder, generator, read_json, run_script, setting
from common import write_json
from model import Transformer, compare_tensors, load_model, save_model, tensor_info

# ---- side path: up to the next such line it needs torch alone, and can be copied elsewhere ----

SITES = ("block", "attention")
MIXERS = ("linear", "mlp", "attention")
WRITEBACKS = ("add", "gate", "bounded")
CHUNK = 128  # tokens whose memory (B,C,M,r) exists at once; backward computes it again
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class TalanConfig:
    """The side path's axes; layers: indices, or fractions of the depth. Raises ValueError."""

    layers: tuple[int | float, ...] = (0.75,)
    site: str = "block"
    slots: int = 8
    width: int = 64
    mixer: str = "linear"
    writeback: str = "gate"
    bound: float = 0.1
    grad_scale: float = 1.0
    trunk_grad_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        names = self.site in SITES and self.mixer in MIXERS and self.writeback in WRITEBACKS
        sizes = 0 < self.slots <= 4096 and 0 < self.width <= 4096 and 0 < self.bound < math.inf
        scales = 0 <= self.grad_scale < math.inf and 0 <= self.trunk_grad_scale < math.inf
        if not (names and sizes and scales and self.layers and min(self.layers) >= 0):
            raise ValueError(f"side path: an axis has no such value: {self}")

    def resolve(self, depth: int) -> tuple[int, ...]:
        """Layer indices in a model of `depth` layers. Raises ValueError on one too deep."""
        layers = tuple(int(x * depth) if isinstance(x, float) else x for x in self.layers)
        if max(layers) >= depth or len(set(layers)) < len(layers):
            raise ValueError(f"layers: expected distinct ones below {depth}, found {layers}")
        return layers


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2, last axis) + 1e-6)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def running_sum(x: Tensor) -> Tensor:
    """sum_{u<=t} x_u of x (B,C,...); on GPUs cumsum is not deterministic, a product is."""
    if torch.are_deterministic_algorithms_enabled():
        return (x.new_ones(x.shape[1], x.shape[1]).tril() @ x.flatten(2)).view_as(x)
    return x.cumsum(1)


def scale_grad(x: Tensor, g: float) -> Tensor:
    """x, its gradient multiplied by g; 0 detaches.

    Under Adam a constant factor on a parameter's gradient cancels in m / sqrt(v), save through
    norm clipping and eps; train.py's talan_lr_scale changes the side path's pace visibly.
    """
    if g == 0:
        return x.detach()
    if g != 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: g * gradient)
    return x


class SidePath(nn.Module):
    """h (B,T,D) -> h' = h + scale_grad(delta, grad_scale), computed in float32.

    compress    x = rms(h)   k = rms(w_key x)   v = w_value x   e_m = k . rms(slots_m) / sqrt(r)
                z_tm = sum_{u<=t} exp(e_um) v_u / sum_{u<=t} exp(e_um)
    remix       linear     y = sum_m softmax_m(w_read x) z_m
                mlp        z += slot_mlp(z) across slots, z += channel_mlp(z), then as linear
                attention  y = sum_m softmax_m(rms(w_query x) . rms(z_m) / sqrt(r)) z_m
    write back  d = w_out y;  add: delta = d;  gate: delta = sigmoid(w_gate . x + b_gate) d;
                bounded: delta = d min(1, bound ||h|| / ||d||)
    """

    def __init__(self, hidden_size: int, config: TalanConfig, make_generator: Any = None) -> None:
        """Weights from normal(0, 1 / sqrt(fan_in)), each from make_generator(its name)."""
        super().__init__()
        self.config, D, M, r = config, hidden_size, config.slots, config.width

        def init(name: str, rows: int, columns: int) -> nn.Parameter:
            g = make_generator(name) if make_generator else None
            return nn.Parameter(torch.randn(rows, columns, generator=g) / math.sqrt(columns))

        self.slots = init("slots", M, r)
        self.w_key = init("w_key", r, D)
        self.w_value = init("w_value", r, D)
        if config.mixer == "attention":
            self.w_query = init("w_query", r, D)
        else:
            self.w_read = init("w_read", M, D)
        if config.mixer == "mlp":
            self.slot_mlp_in = init("slot_mlp_in", 2 * M, M)
            self.channel_mlp_in = init("channel_mlp_in", 2 * r, r)
            self.slot_mlp_out = nn.Parameter(torch.zeros(M, 2 * M))
            self.channel_mlp_out = nn.Parameter(torch.zeros(r, 2 * r))
        self.w_out = nn.Parameter(torch.zeros(D, r))  # so step 0 changes nothing
        if config.writeback == "gate":
            self.w_gate = nn.Parameter(torch.zeros(D))
            self.b_gate = nn.Parameter(torch.tensor(-1.0))

    @torch.compiler.disable  # else each number of chunks is a graph, and after eight it gives up
    def forward(self, h: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        """h (B,T,D), state, lengths (B,) of the real tokens (None: all T) -> (h', state).

        state: the sums num (B,M,r) and den (B,M) after each row's last real token, None at the
        start. Raises ValueError on other shapes.
        """
        B, D, (M, r) = len(h), self.w_out.shape[0], self.slots.shape
        num, den = state or (self.slots.new_zeros(B, M, r), self.slots.new_zeros(B, M))
        fits = h.dim() == 3 and h.shape[2] == D and num.shape == (B, M, r) and den.shape == (B, M)
        if not fits or (lengths is not None and lengths.shape != (B,)):
            raise ValueError(f"side path: expected h (B,T,{D}), lengths (B,), found {h.shape}")
        h32 = scale_grad(h, self.config.trunk_grad_scale).float()
        x = rms(h32)  # (B,T,D)
        w, v = self.compress(x, lengths)
        ys = []
        for chunk in zip(x.split(CHUNK, 1), w.split(CHUNK, 1), v.split(CHUNK, 1)):
            y, num, den = recompute(self.read, *chunk, num, den)
            ys.append(y)
        delta = self.write(torch.cat(ys, dim=1), x, h32)  # (B,T,D)
        return (h.float() + scale_grad(delta, self.config.grad_scale)).to(h.dtype), (num, den)

    def compress(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B,T,D) -> w = exp(e) (B,T,M), zero for padding, and v (B,T,r).

        |e| <= sqrt(r), so no running maximum is needed: exp(sqrt(4096)) is far inside float32.
        """
        k, v = rms(x @ self.w_key.T), x @ self.w_value.T  # (B,T,r)
        w = (k @ rms(self.slots).T / math.sqrt(self.config.width)).exp()  # (B,T,M)
        if lengths is not None:
            real = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
            w = w * real[..., None]
        return w, v

    def read(self, x: Tensor, w: Tensor, v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        """x (B,C,D), w (B,C,M), v (B,C,r), num, den before -> y (B,C,r), num, den after."""
        z, num, den = self.remember(w, v, *sums)
        return self.remix(z, x), num, den

    def remember(self, w: Tensor, v: Tensor, num: Tensor, den: Tensor) -> tuple[Tensor, ...]:
        """Memory z = num / den (B,C,M,r) after each token of a chunk, num and den after it."""
        nums = num[:, None] + running_sum(w[..., None] * v[:, :, None])  # (B,C,M,r)
        dens = den[:, None] + running_sum(w)  # (B,C,M)
        z = nums / dens.clamp_min(1e-30)[..., None]  # less than any real token adds
        return z, nums[:, -1].clone(), dens[:, -1].clone()  # clones let the chunk go

    def remix(self, z: Tensor, x: Tensor) -> Tensor:
        """Memory z (B,C,M,r) and tokens x (B,C,D) -> y (B,C,r)."""
        a = self.attend(z, x)  # (B,C,M)
        if self.config.mixer == "mlp":
            z = z + self.slot_mlp_out @ F.silu(self.slot_mlp_in @ z)
            z = z + F.silu(z @ self.channel_mlp_in.T) @ self.channel_mlp_out.T
        return (a[..., None] * z).sum(2)

    def attend(self, z: Tensor, x: Tensor) -> Tensor:
        """The weights (B,C,M) with which each token reads the slots."""
        if self.config.mixer != "attention":
            return (x @ self.w_read.T).softmax(-1)
        q = rms(x @ self.w_query.T)[..., None]  # (B,C,r,1)
        return ((rms(z) @ q)[..., 0] / math.sqrt(self.config.width)).softmax(-1)

    def write(self, y: Tensor, x: Tensor, h32: Tensor) -> Tensor:
        """y (B,T,r) -> delta (B,T,D)."""
        d = y @ self.w_out.T  # (B,T,D)
        if self.config.writeback == "gate":
            return torch.sigmoid(x @ self.w_gate + self.b_gate)[..., None] * d
        if self.config.writeback == "bounded":
            limit = self.config.bound * h32.norm(dim=-1, keepdim=True)
            norm = d.norm(dim=-1, keepdim=True)
            norm_or_1 = torch.where(norm > limit, norm, 1)  # else backward meets 0 / 0
            return torch.where(norm > limit, limit / norm_or_1, 1) * d
        return d


# ---- adapters ----

KINDS = ("none", "lora", "dora", "rslora")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter; targets: some of TARGETS, or "all". Raises ValueError."""

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        targets = TARGETS if "all" in self.targets else self.targets
        fits = self.kind in KINDS and set(targets) <= set(TARGETS) and 0 <= self.dropout < 1
        if not fits or not targets or self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"adapter: a setting has no such value: {self}")
        object.__setattr__(self, "targets", tuple(t for t in TARGETS if t in targets))

    @property
    def scale(self) -> float:
        """s in W x + s B A x: alpha / rank, of rsLoRA alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


class LowRank(torch.autograd.Function):
    """y = W x + s B z, z = A x, added up within the products; only x and z are kept.

    dz = s B^T dy;  dx = W^T dy + A^T dz;  dA = dz x^T;  dB = s dy z^T;  dW = dy x^T if W learns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """x (...,in), W (out,in), A (r,in), B (out,r) -> (...,out)."""
        flat = x.reshape(-1, x.shape[-1])  # (N,in)
        z = flat @ A.T  # (N,r)
        ctx.save_for_backward(flat, z, W, A, B)
        ctx.s, ctx.shape = s, x.shape
        return (flat @ W.T).addmm_(z, B.T, alpha=s).view(*x.shape[:-1], -1)  # (...,out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy (...,out) -> dx (...,in), dW, dA, dB."""
        x, z, W, A, B = ctx.saved_tensors
        need_x, need_W, need_A, need_B, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])  # (N,out)
        dz = ctx.s * (dy @ B)  # (N,r)
        dx = (dz @ A).addmm_(dy, W).view(ctx.shape) if need_x else None
        dW = dy.T @ x if need_W else None
        dA = dz.T @ x if need_A else None
        dB = ctx.s * (dy.T @ z) if need_B else None
        return dx, dW, dA, dB, None


class AdapterLinear(nn.Module):
    """A frozen linear map (W, bias b) with a low-rank update; d is dropout.

    LoRA, rsLoRA  y = W x + b + s B A d(x)                              Hu et al. 2021
    DoRA          y = W x + b + (g - 1) W d(x) + g s B A d(x),          Liu et al. 2024
                  g = m / ||W + s B A||_row, as peft/tuners/lora/dora.py
    x (...,in) -> y (...,out); A (r,in), B (out,r), m (out,) are float32, cast to x's dtype.
    """

    weight_squared: Tensor  # ||W||^2 of each row (out,), DoRA alone

    def __init__(self, linear: nn.Linear, config: AdapterConfig, g: torch.Generator) -> None:
        super().__init__()
        (rows, cols), device = linear.weight.shape, linear.weight.device
        self.linear, self.scale, self.dropout = linear, config.scale, config.dropout
        self.is_dora = config.kind == "dora"
        self.caching = False  # see cached_dora_norms
        self.cached_norm: Tensor | None = None
        # kaiming-uniform with a = sqrt(5), as peft/tuners/lora/layer.py
        A = (2 * torch.rand(config.rank, cols, generator=g) - 1) / math.sqrt(cols)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(rows, config.rank, device=device))
        if self.is_dora:
            squared = row_squares(linear.weight)  # constant while W is frozen
            self.register_buffer("weight_squared", squared, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(squared.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        W, b = self.linear.weight, self.linear.bias
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        # g - 1 is cast, not g: bfloat16 is coarse near 1
        g_minus_1 = (self.gain() - 1).to(x.dtype) if self.is_dora else None
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout)
            update = self.scale * F.linear(F.linear(dropped, A), B)
            if g_minus_1 is not None:
                update = update + g_minus_1 * (F.linear(dropped, W) + update)
            y = F.linear(x, W) + update
        else:
            y = LowRank.apply(x, W, A, B, self.scale)
            y = y if g_minus_1 is None else torch.addcmul(y, y, g_minus_1)
        return y if b is None else y + b

    def gain(self) -> Tensor:
        """g = m / ||W + s B A||_row (out,), the norm outside the graph; 1 where it is zero."""
        norm = self.row_norm() if self.cached_norm is None else self.cached_norm
        self.cached_norm = norm if self.caching else None
        return torch.where(norm > 0, self.lora_magnitude_vector / norm.clamp_min(1e-30), 1)

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """||W + s B A||_row (out,): sqrt(||W||^2 + 2 s B.(W A^T) + s^2 (B A A^T).B), float32."""
        A, B, s, W = self.lora_A, self.lora_B, self.scale, self.linear.weight
        squared = row_squares(W) if W.requires_grad else self.weight_squared
        WA = torch.cat([part.float() @ A.T for part in row_parts(W)])  # (out,r)
        squared = squared + 2 * s * (B * WA).sum(1) + s * s * (B @ (A @ A.T) * B).sum(1)
        return squared.clamp_min(0).sqrt()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s B A (out,in) in float32, of DoRA g (W + s B A); changes nothing."""
        merged = self.linear.weight.float() + self.scale * self.lora_B @ self.lora_A
        return self.gain()[:, None] * merged if self.is_dora else merged


def row_squares(weight: Tensor) -> Tensor:
    """||W||^2 of each row (out,), float32."""
    return torch.cat([part.detach().float().square().sum(1) for part in row_parts(weight)])


def row_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows that are cast to float32 at once: what a CPU's cache holds; on a GPU all."""
    return weight.split(len(weight) if weight.is_cuda else 1024)


@contextlib.contextmanager
def cached_dora_norms(model: nn.Module) -> Iterator[None]:
    """While no weight changes, in one optimizer step or scoring: compute DoRA's norms once."""
    layers = [m for m in model.modules() if isinstance(m, AdapterLinear)]
    try:
        for layer in layers:
            layer.caching = True
        yield
    finally:
        for layer in layers:
            layer.caching, layer.cached_norm = False, None


SCOPES = {  # the groups that learn; of the side path, writeback means w_out and the gate alone
    "joint": ("adapter", "side path"),
    "adapter": ("adapter",),
    "talan": ("side path",),
    "writeback": ("adapter", "side path"),
    "full": ("adapter", "side path", "backbone"),
}


def attach(
    model: Any, adapter: Any, talan: Any = None, scope: str = "joint", seed: int = 0
) -> list[nn.Parameter]:
    """Add adapter (AdapterConfig or None) and side path (TalanConfig or None) to the model.

    In place; returns the trainable parameters. Each new tensor is drawn from a generator of its
    own, seeded by (seed, its name): what else is attached changes no start. Raises ValueError
    with the model untouched.
    """
    adapter = adapter or AdapterConfig(kind="none")
    layers = talan.resolve(model.config.num_hidden_layers) if talan else ()
    can_learn = {"adapter": adapter.kind != "none", "backbone": True}
    can_learn["side path"] = bool(layers) and talan.grad_scale > 0
    if hasattr(model, "adapter_config"):
        raise ValueError("the model has an adapter or a side path already: load it afresh")
    if scope not in SCOPES or not any(can_learn[group] for group in SCOPES[scope]):
        raise ValueError(f"scope {scope!r}: expected one of {[*SCOPES]}, with a part that learns")
    if scope == "writeback" and not layers:
        raise ValueError("scope writeback: expected a side path")
    D, width = model.config.hidden_size, model.config.intermediate_size
    if can_learn["adapter"] and adapter.rank > min(D, width):
        raise ValueError(f"rank: expected at most {min(D, width)}, found {adapter.rank}")
    for name, parent, key in adapted(model, adapter):
        g = generator(seed, name + ".lora_A")
        setattr(parent, key, AdapterLinear(getattr(parent, key), adapter, g))
    for layer in layers:
        block, name = model.model.layers[layer], f"model.layers.{layer}.side_path."
        side_path = SidePath(D, talan, lambda key, name=name: generator(seed, name + key))
        block.side_path, block.side_site = side_path.to(model.head_weight.device), talan.site
    model.adapter_config, model.talan_config = adapter, talan
    model.train(model.training)  # the new modules too
    for name, p in model.named_parameters():
        group, writes = group_of(name), name.endswith(("w_out", "w_gate", "b_gate"))
        frozen = scope == "writeback" and group == "side path" and not writes
        p.requires_grad_(group in SCOPES[scope] and can_learn[group] and not frozen)
    return [p for p in model.parameters() if p.requires_grad]


def adapted(model: Any, adapter: AdapterConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, parent module, attribute) of every projection that the adapter is for."""
    targets = adapter.targets if adapter.kind != "none" else ()
    for layer, block in enumerate(model.model.layers):
        for key in targets:
            part = "mlp" if hasattr(block.mlp, key) else "self_attn"
            yield f"model.layers.{layer}.{part}.{key}", getattr(block, part), key


def group_of(name: str) -> str:
    """Which group a parameter belongs to: "side path", "adapter" or "backbone"."""
    if ".side_path." in name:
        return "side path"
    return "adapter" if ".lora_" in name else "backbone"


def backbone_weights(model: Any) -> dict[str, Tensor]:
    """The backbone's parameters by the names that they have in a checkpoint."""
    named = model.named_parameters()
    return {n.replace(".linear.", "."): p for n, p in named if group_of(n) == "backbone"}


def report(model: Any) -> str:
    """What trains, by group: tensors, parameters, share of the backbone in per cent."""
    whole = sum(p.numel() for p in backbone_weights(model).values())
    lines, total = [], 0
    for group in ("adapter", "side path", "backbone"):
        named = model.named_parameters()
        sizes = [p.numel() for name, p in named if p.requires_grad and group_of(name) == group]
        count = sum(sizes)
        total += count
        counts = f"{len(sizes):5} tensors {count:13,} parameters {100 * count / whole:8.3f} %"
        lines += [f"trainable {group:10} {counts} of the backbone"] if sizes else []
    share = f"{100 * total / whole:8.3f} % of {whole:,}"
    return "\n".join([*lines, f"trainable total {'':18} {total:13,} parameters {share}"])


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TALAN_FILES = ("talan_config.json", "talan.safetensors")
# Of PEFT's LoraConfig: read below, told by the tensors, or without effect on a saved adapter.
PEFT_HARMLESS = set(
    "peft_type r lora_alpha lora_dropout use_dora use_rslora init_lora_weights target_modules bias"
    " base_model_name_or_path revision task_type inference_mode auto_mapping peft_version"
    " exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern loftq_config"
    " runtime_config megatron_core qalora_group_size ensure_weight_tying enable_lora".split()
)


def state_by_file(model: Any) -> dict[tuple[str, str], tuple[Record, dict[str, Tensor]]]:
    """(JSON file, tensor file) -> the settings and the tensors that belong there."""
    adapter, talan, states = model.adapter_config, model.talan_config, {}
    base = {"base_model_name_or_path": model.source}
    groups: Record = {"adapter": {}, "side path": {}, "backbone": {}}
    for name, p in model.named_parameters():
        groups[group_of(name)][name] = p
    if adapter.kind != "none":
        named = {peft_name(name): p for name, p in groups["adapter"].items()}
        states[ADAPTER_FILES] = peft_config(adapter) | base, named
    if talan:
        config = base | dataclasses.asdict(talan) | {"hidden_size": model.config.hidden_size}
        config["layers"] = talan.resolve(model.config.num_hidden_layers)
        states[TALAN_FILES] = config, groups["side path"]
    return states


def peft_name(name: str) -> str:
    """PEFT's name of an adapter's parameter: lora_A and lora_B get .weight, the vector does not."""
    return f"base_model.model.{name}" + ("" if name.endswith("_vector") else ".weight")


def peft_config(config: AdapterConfig) -> Record:
    """adapter_config.json as PEFT writes it."""
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False}
    raw |= {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    raw |= {"use_dora": config.kind == "dora", "use_rslora": config.kind == "rslora"}
    raw |= {"init_lora_weights": True, "inference_mode": True}
    return raw | {"target_modules": sorted(config.targets)}


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter in PEFT's layout, the side path beside it; float32, each file atomic.

    Raises ValueError when nothing is attached, or the folder has files that this would leave.
    """
    folder = Path(folder)
    states = state_by_file(model) if hasattr(model, "adapter_config") else {}
    left = {file[1] for file in (ADAPTER_FILES, TALAN_FILES) if file not in states}
    if not states or any((folder / name).exists() for name in left):
        raise ValueError(f"{folder}: nothing to save, or beside another model's {left}")
    folder.mkdir(parents=True, exist_ok=True)
    for (config_file, tensor_file), (config, named) in states.items():
        tensors = {name: p.detach().float().cpu().contiguous() for name, p in named.items()}
        with atomic(folder / tensor_file) as tmp:
            save_file(tensors, tmp, metadata={"backbone": model.fingerprint})
        write_json(folder / config_file, config)


def load_adapter(
    model: Transformer, folder: str | Path, scope: str = "joint"
) -> list[nn.Parameter]:
    """Attach what a run or a PEFT folder holds to a bare model; returns what trains.

    Raises ValueError with the model untouched: tensors missing, unexpected, misshapen or not
    finite, settings not computed here, another backbone (by config and tokenizer).
    """
    folder, adapter, talan = checkpoint_folder(folder), None, None
    own = folder / "model.safetensors"  # of a run of scope full
    if own.exists() and not (model.folder and own.samefile(model.folder / own.name)):
        raise ValueError(f"{folder}: was trained together with the backbone in it: load that one")
    found: dict[str, Tensor] = {}
    if (folder / ADAPTER_FILES[1]).exists():
        found |= read_tensors(folder / ADAPTER_FILES[1], model.fingerprint)
        try:
            adapter = read_peft_config(folder / ADAPTER_FILES[0], list(found))
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ValueError(f"{folder / ADAPTER_FILES[0]}: {error}") from None
    if (folder / TALAN_FILES[1]).exists():
        found |= read_tensors(folder / TALAN_FILES[1], model.fingerprint)
        talan = read_talan_config(folder / TALAN_FILES[0], model.config.hidden_size)
    if not found:
        raise ValueError(f"{folder}: expected {ADAPTER_FILES[1]} or {TALAN_FILES[1]}")
    with torch.device("meta"):
        shadow = Transformer(model.config)
    attach(shadow, adapter, talan, scope)
    want = {name: p for _, named in state_by_file(shadow).values() for name, p in named.items()}
    info = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
    problems = compare_tensors(want, info)
    problems += [f"not finite: {name}" for name, t in found.items() if not t.isfinite().all()]
    if problems:
        raise ValueError("\n  ".join([f"{folder}: no adapter of this backbone:", *problems]))
    trainable = attach(model, adapter, talan, scope)
    for _, named in state_by_file(model).values():
        for name, p in named.items():
            p.data.copy_(found[name])
    return trainable


def recorded_backbone(folder: str | Path) -> str:
    """The backbone that an adapter's folder names; "" without one."""
    for file, _ in (ADAPTER_FILES, TALAN_FILES):
        file_of_run = checkpoint_folder(folder) / file
        raw = read_json(file_of_run) if folder and file_of_run.exists() else {}
        if raw.get("base_model_name_or_path"):
            return str(raw["base_model_name_or_path"])
    return ""


def read_tensors(file: Path, fingerprint: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file by name. Raises ValueError when it has another backbone."""
    tensor_info(file)  # raises ValueError where it cannot be read
    with safe_open(file, framework="pt") as f:
        backbone = (f.metadata() or {}).get("backbone")
    if backbone and fingerprint and backbone != fingerprint:
        raise ValueError(f"{file}: trained on a backbone with another config or tokenizer")
    return {name.replace("_vector.weight", "_vector"): w for name, w in load_file(file).items()}


def read_peft_config(file: Path, names: list[str]) -> AdapterConfig:
    """PEFT's adapter_config.json; the tensors' names tell the targets. Raises ValueError."""
    raw = read_json(file)
    wrong = [name for name in raw if raw[name] and name not in PEFT_HARMLESS]
    if raw.get("peft_type", "LORA") != "LORA":
        wrong.append("peft_type")
    if raw.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        wrong.append("init_lora_weights")  # others, as pissa, change the backbone
    if wrong or not isinstance(raw.get("r"), int) or not raw.get("lora_alpha"):
        found = {name: raw[name] for name in wrong}
        raise ValueError(f"expected r, lora_alpha and nothing like {found}")
    maps = [name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name]
    targets = tuple({name.split(".")[-1] for name in maps})
    rank = pattern_value(raw, "rank_pattern", raw["r"], maps)
    alpha = pattern_value(raw, "alpha_pattern", raw["lora_alpha"], maps)
    kind = "rslora" if raw.get("use_rslora") else "lora"
    if raw.get("use_dora"):
        alpha *= math.sqrt(rank) if kind == "rslora" else 1  # the same scale
        kind = "dora"
    return AdapterConfig(kind, rank, alpha, raw.get("lora_dropout", 0.0), targets)


def pattern_value(raw: Record, field: str, default: Any, maps: list[str]) -> Any:
    """What PEFT's {pattern: value} gives to every adapted map. Raises ValueError on two values."""
    patterns, found = raw.get(field) or {}, {}
    for name in maps:
        name = name.removeprefix("base_model.model.")  # as PEFT names them
        fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        found[next(fits, default)] = name
    if len(found) > 1:
        raise ValueError(f"{field}: expected one value for all maps, found {found}")
    return next(iter(found), default)


def read_talan_config(file: Path, hidden_size: int) -> TalanConfig:
    """talan_config.json. Raises ValueError on other fields, or for another hidden size."""
    raw = read_json(file)
    axes: Record = {f.name: raw.get(f.name) for f in dataclasses.fields(TalanConfig)}
    meant = axes | {"hidden_size": hidden_size, "base_model_name_or_path": None}
    if set(raw) - set(meant) or None in axes.values() or raw.get("hidden_size") != hidden_size:
        raise ValueError(f"{file}: expected {[*meant]}, hidden size {hidden_size}, found {raw}")
    return TalanConfig(**axes)


def merge_adapter(model: Any) -> None:
    """Give each adapted map W' = merged_weight(), computed in float32 and cast once.

    An export, not to be undone. A side path stays: it depends on the sequence and has no merged
    form. Raises ValueError when there is no adapter.
    """
    adapter = getattr(model, "adapter_config", None)
    if adapter is None or adapter.kind == "none":
        raise ValueError("merge: the model has no adapter")
    for _, parent, key in adapted(model, adapter):
        layer = getattr(parent, key)
        merged = layer.merged_weight().to(layer.linear.weight.dtype)
        layer.linear.weight = nn.Parameter(merged, layer.linear.weight.requires_grad)
        setattr(parent, key, layer.linear)
    model.adapter_config = AdapterConfig(kind="none")


@dataclass(frozen=True)
class MergeSettings:
    """python talan.py merge: write a backbone with its adapter merged as a Hugging Face folder."""

    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's")
    adapter: str = setting("", "run folder or PEFT folder")
    out: str = setting("", "a new folder to write")
    drop_side_path: bool = setting(False, "write the adapter alone, without its side path")


def merge_command(overrides: Record) -> None:
    """Load, merge, write, and print how far the logits moved. Raises ValueError."""
    settings = MergeSettings(**overrides)
    if not settings.out or Path(settings.out).exists():
        raise ValueError(f"--out: expected a new folder, found {settings.out!r}")
    model = load_model(settings.backbone or recorded_backbone(settings.adapter))
    load_adapter(model, settings.adapter)
    if model.talan_config and not settings.drop_side_path:
        raise ValueError(f"{settings.adapter}: a side path has no merged form; --drop-side-path")
    for block in model.model.layers:
        block.side_path = None
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=generator(0, "merge"))
    with torch.no_grad():
        before = model.logits(model(tokens)).float()
        merge_adapter(model)
        after = model.logits(model(tokens)).float()
    save_model(model, settings.out, backbone_weights(model))
    moved, largest = (after - before).abs().max(), before.abs().max()
    print(f"wrote {settings.out}; 128 random tokens: logits up to {largest:.2f}, moved {moved:.2e}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["merge"]:
        raise SystemExit("usage: python talan.py merge --help")
    run_script(merge_command, MergeSettings, "talan.py merge", sys.argv[2:])
