"""Adapters (LoRA, rsLoRA, DoRA) and the TALAN side path: attach, report, save, load, merge.

The side path reads the residual stream h and writes a small correction back into it:

    compress:   z_tm = sum_{u<=t} exp(e_um) v_u / sum_{u<=t} exp(e_um)     latent memory of the tokens so far
    remix:      y_t = mixer(z_t, x_t)                                      one vector a token
    write back: h'_t = h_t + writeback(w_out y_t)                          w_out starts at zero: step 0 changes nothing

Shapes: B rows, T tokens, C tokens of one chunk, D hidden size, M memory slots, r memory width (side path) or rank (adapter).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.settings import nearest
from model import DTYPES, ModelConfig, Transformer, atomic, generator, load_model, read_json, read_tensor, save_model, tensor_info

KINDS = ("none", "lora", "dora", "rslora")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SITES = ("block", "attention")
MIXERS = ("linear", "mlp", "attention")
WRITEBACKS = ("add", "gate", "bounded")
SCOPES = ("joint", "adapter", "talan", "writeback", "full")
WIDEST = 4096  # of slots and width: exp(sqrt(4096)) = 6e27 is far inside float32
CHUNK = 128  # tokens whose (B,C,M,r) memory exists at once; backward recomputes it chunk by chunk
TINY = 1e-30  # below any denominator that a real token can make: exp(-sqrt(r)) >= 1e-28 at the largest width


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter: y = W x + s B A x with s = alpha / rank (LoRA, DoRA) or alpha / sqrt(rank) (rsLoRA).

    Raises ValueError that lists every bad field. targets: any of the seven projections, or "all".
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        problems = [] if self.targets else [f"targets: expected at least one of {', '.join(TARGETS)}, or all; found {self.targets!r}"]
        given = (self.targets,) if isinstance(self.targets, str) else self.targets
        given = given if isinstance(given, (tuple, list)) else (given,)
        for name in given:
            check_choice(problems, "targets", name, (*TARGETS, "all"))
        check_choice(problems, "kind", self.kind, KINDS)
        check_number(problems, "rank", self.rank, 1, whole=True)
        check_number(problems, "alpha", self.alpha, 0, above=True)
        check_number(problems, "dropout", self.dropout, 0, below=1)
        raise_all("adapter", problems)
        object.__setattr__(self, "targets", tuple(t for t in TARGETS if t in given or "all" in given))

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


@dataclass(frozen=True)
class TalanConfig:
    """The side path's axes. layers: indices from 0, or fractions of the depth (0.5); slots M, width r.

    Raises ValueError that lists every bad field.
    """

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
        problems: list[str] = []
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else None
        object.__setattr__(self, "layers", layers)
        for name, value, allowed in (("site", self.site, SITES), ("mixer", self.mixer, MIXERS), ("writeback", self.writeback, WRITEBACKS)):
            check_choice(problems, name, value, allowed)
        for name in ("slots", "width"):
            check_number(problems, name, getattr(self, name), 1, below=WIDEST + 1, whole=True)
        check_number(problems, "bound", self.bound, 0, above=True)
        for name in ("grad_scale", "trunk_grad_scale"):
            check_number(problems, name, getattr(self, name), 0)
        for layer in layers or (None,):
            if not (type(layer) is int and layer >= 0 or type(layer) is float and 0 < layer < 1):
                problems.append(f"layers: expected indices from 0, or fractions between 0 and 1, found {layer!r}")
        raise_all("side path", problems)

    def resolve(self, depth: int) -> tuple[int, ...]:
        """Layer indices in a model of `depth` layers. Raises ValueError on one out of range or named twice."""
        layers = tuple(int(x * depth) if isinstance(x, float) else x for x in self.layers)
        wrong = [x for x in layers if x >= depth] + [a for a, b in pairwise(sorted(layers)) if a == b]
        if wrong:
            raise ValueError(f"layers: expected distinct indices from 0 to {depth - 1}, found {sorted(wrong)} in {self.layers}")
        return layers


def check_choice(problems: list[str], name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Add a line to problems unless value is one of those allowed."""
    if value not in allowed:
        problems.append(f"{name}: expected one of {', '.join(allowed)}, found {value!r}{nearest(value, allowed)}")


def check_number(problems: list[str], name: str, value: Any, low: float, below: float = 1e30, above: bool = False, whole: bool = False) -> None:
    """Add a line to problems unless value is a number (whole: an integer) with low <= value < below (above: low < value)."""
    fits = type(value) is int or (type(value) is float and not whole)
    if not (fits and (low < value if above else low <= value) and value < below):
        kind, edge = "an integer" if whole else "a number", "above" if above else "of at least"
        problems.append(f"{name}: expected {kind} {edge} {low}{'' if below == 1e30 else f' and below {below}'}, found {value!r}")


def raise_all(what: str, problems: list[str]) -> None:
    """Raise one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError(f"{what}:\n  " + "\n  ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# Adapter
# ---------------------------------------------------------------------------------------------------------------------

class LowRank(torch.autograd.Function):
    """y_i = W_i x + s B_i z_i, z_i = A_i x, for maps of one input x: their A are one product.

    dz_i = s B_i^T dy_i;  dx = sum_i W_i^T dy_i + A_i^T dz_i;  dA_i = dz_i x^T, dB_i = s dy_i z_i^T, and dW_i = dy_i x^T if W_i learns.
    What autograd would do, but the sums are made inside the products and only x and z are kept. x (...,in) -> y_i (...,out_i).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: float, count: int, *weights: Tensor) -> tuple[Tensor, ...]:
        """weights: every W_i (out_i,in), then every A_i (r,in), then every B_i (out_i,r)."""
        flat, W, A, B = x.reshape(-1, x.shape[-1]), weights[:count], torch.cat(weights[count:-count]), weights[-count:]  # (N,in), A (n r,in)
        z = flat @ A.T  # (N,n r)
        ctx.save_for_backward(flat, z, A, *W, *B)
        ctx.s, ctx.shape = s, x.shape
        ys = [(flat @ w.T).addmm_(part, b.T, alpha=s) for w, b, part in zip(W, B, z.chunk(count, -1))]
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)  # (...,out_i)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, *weights = ctx.saved_tensors
        count, (need_x, _, _, *needs) = len(dys), ctx.needs_input_grad
        flat, W, B = [dy.reshape(-1, dy.shape[-1]) for dy in dys], weights[:count], weights[count:]
        dz = torch.cat([ctx.s * (dy @ b) for dy, b in zip(flat, B)], -1)  # (N,n r)
        dx: Any = dz @ A if need_x else None
        for dy, w in zip(flat, W if need_x else ()):
            dx.addmm_(dy, w)
        dW = [dy.T @ x if need else None for dy, need in zip(flat, needs)]
        dA = (dz.T @ x).chunk(count) if any(needs[count:]) else [None] * count
        dB = [ctx.s * (dy.T @ part) if need else None for dy, part, need in zip(flat, z.chunk(count, -1), needs[-count:])]
        return None if dx is None else dx.view(ctx.shape), None, None, *dW, *dA, *dB


class RowGain(torch.autograd.Function):
    """y' = g y as y + (g - 1) y, so that g = 1 changes nothing and g's rounding to y's dtype matters no more than that of y';
    dy = g dy', dg = sum dy' y. y (...,out), g (out,) float32.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        rest = (g - 1).to(y.dtype)
        ctx.save_for_backward(y, rest)
        return torch.addcmul(y, y, rest)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, rest = ctx.saved_tensors
        return torch.addcmul(dy, dy, rest), (dy * y).reshape(-1, y.shape[-1]).sum(0).float()


class AdapterLinear(nn.Module):
    """A frozen linear map with a low-rank update; d is dropout, g = m / ||W + s B A||_row (Hu et al. 2021; Liu et al. 2024).

    LoRA, rsLoRA:  y = W x + s B A d(x)
    DoRA:          y = W x + (g - 1) W d(x) + g s B A d(x);  without dropout  g (W x + s B A x)
    x (...,in) -> y (...,out); lora_A (r,in), lora_B (out,r), lora_magnitude_vector m (out), all float32, cast to x's dtype.
    """

    weight_squared: Tensor  # ||W||^2 (out,), DoRA alone

    def __init__(self, base: nn.Linear, config: AdapterConfig, seed: int, name: str) -> None:
        super().__init__()
        rows, cols = base.weight.shape
        self.weight, self.scale, self.dropout, self.kind = base.weight, config.scale, config.dropout, config.kind
        self.active = True  # False: y = W x (see switched)
        self.kept: Tensor | None = None  # g, while it is not computed anew (see gains_kept)
        device = base.weight.device
        A = (2 * torch.rand(config.rank, cols, generator=generator(seed, name + ".lora_A")) - 1) / math.sqrt(cols)
        self.lora_A = nn.Parameter(A.to(device))  # kaiming-uniform with a = sqrt(5), as peft/tuners/lora/layer.py
        self.lora_B = nn.Parameter(torch.zeros(rows, config.rank, device=device))
        if config.kind == "dora":
            self.register_buffer("weight_squared", row_squares(base.weight), persistent=False)  # ||W||^2, constant while W is frozen
            self.lora_magnitude_vector = nn.Parameter(self.weight_squared.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return F.linear(x, self.weight)
        if not (self.training and self.dropout):
            return self.together(x, [self])[0]
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        dropped, y = F.dropout(x, self.dropout, self.training), F.linear(x, self.weight)
        update = self.scale * F.linear(F.linear(dropped, A), B)
        if self.kind != "dora":
            return y + update
        g = self.gain()
        return (y + (g - 1) * F.linear(dropped, self.weight) + g * update).to(x.dtype)

    def together(self, x: Tensor, maps: Sequence[AdapterLinear]) -> Sequence[Tensor]:
        """[map(x) for each map], maps of one adapter's kind; without dropout in one step."""
        if not self.active or (self.training and self.dropout):
            return [each(x) for each in maps]
        A, B = ([getattr(each, name).to(x.dtype) for each in maps] for name in ("lora_A", "lora_B"))
        ys = LowRank.apply(x, self.scale, len(maps), *(each.weight for each in maps), *A, *B)
        return [RowGain.apply(y, each.gain()) for each, y in zip(maps, ys)] if self.kind == "dora" else ys

    def gain(self) -> Tensor:
        """g = m / ||W + s B A||_row (out,), the norm outside the graph; 1 where the norm is zero."""
        if self.kept is not None:
            return self.kept
        norm = self.row_norm()
        return torch.where(norm > 0, self.lora_magnitude_vector / torch.where(norm > 0, norm, 1), 1)

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """||W + s B A||_row (out,) by expanding the square: ||W||^2 + 2 s B.(W A^T) + s^2 (B A A^T).B, in float32."""
        A, B, s = self.lora_A, self.lora_B, self.scale
        squared = row_squares(self.weight) if self.weight.requires_grad else self.weight_squared
        WA = torch.cat([part.float() @ A.T for part in self.weight.split(1024)])  # (out,r), no float32 copy of all of W
        return (squared + 2 * s * (B * WA).sum(1) + s * s * (B @ (A @ A.T) * B).sum(1)).clamp_min(0).sqrt()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The effective weight (out,in) in float32: W + s B A, or g (W + s B A) for DoRA. A pure function: nothing is changed."""
        merged = self.weight.float() + self.scale * self.lora_B @ self.lora_A
        return self.gain()[:, None] * merged if self.kind == "dora" else merged


def row_squares(weight: Tensor) -> Tensor:
    """||W||^2 of each row (out,), in float32, 1,024 rows at a time."""
    return torch.cat([part.detach().float().square().sum(1) for part in weight.split(1024)])


# ---------------------------------------------------------------------------------------------------------------------
# Side path
# ---------------------------------------------------------------------------------------------------------------------

def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2, last axis) + 1e-6)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def running_sum(x: Tensor) -> Tensor:
    """sum_{u<=t} x_u of x (B,C,...); with deterministic algorithms a product with a triangle of ones, as torch has no such cumsum on GPUs."""
    if torch.are_deterministic_algorithms_enabled():
        return (x.new_ones(x.shape[1], x.shape[1]).tril() @ x.flatten(2)).view_as(x)
    return x.cumsum(1)


class ScaleGrad(torch.autograd.Function):
    """Identity forward; the gradient times g backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: float) -> Tensor:
        ctx.g = g
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.g, None


def scale_grad(x: Tensor, g: float) -> Tensor:
    """x, with its gradient multiplied by g; 0 detaches.

    Under Adam a constant factor on a parameter's gradient cancels in m / sqrt(v), save through global-norm clipping and
    eps. For a visible change of pace use the side path's learning-rate multiplier (`talan_lr_scale` in train.py).
    """
    return x if g == 1 else x.detach() if g == 0 else ScaleGrad.apply(x, g)


class SidePath(nn.Module):
    """h (B,T,D) -> h' = h + scale_grad(delta, grad_scale), in float32, returned in h's dtype (README, "The side path").

    compress:   x = rms(h)   k = rms(w_key x)   v = w_value x   e_m = k . rms(slots_m) / sqrt(r)
                z_tm = sum_{u<=t} exp(e_um) v_u / sum_{u<=t} exp(e_um)
    remix:      linear     y = sum_m softmax_m(w_read x) z_m
                mlp        z += slot_mlp(z) across slots, z += channel_mlp(z), then as linear
                attention  y = sum_m softmax_m(rms(w_query x) . rms(z_m) / sqrt(r)) z_m
    write back: d = w_out y;  add: d   gate: sigmoid(w_gate . x + b_gate) d   bounded: d min(1, bound ||h|| / ||d||)
    """

    slots: Tensor  # (M,r)
    w_key: Tensor  # (r,D), as w_value and the attention mixer's w_query
    w_value: Tensor
    w_query: Tensor
    w_read: Tensor  # (M,D), the other mixers'
    slot_mlp_in: Tensor  # (2M,M)
    channel_mlp_in: Tensor  # (2r,r)

    def __init__(self, hidden_size: int, config: TalanConfig, seed: int = 0, name: str = "side_path") -> None:
        super().__init__()
        self.config, D, M, r = config, hidden_size, config.slots, config.width
        shapes = {"slots": (M, r), "w_key": (r, D), "w_value": (r, D)}
        shapes |= {"w_query": (r, D)} if config.mixer == "attention" else {"w_read": (M, D)}
        if config.mixer == "mlp":
            shapes |= {"slot_mlp_in": (2 * M, M), "channel_mlp_in": (2 * r, r)}
        for key, shape in shapes.items():  # normal(0, 1/sqrt(fan_in))
            start = torch.randn(shape, generator=generator(seed, f"{name}.{key}")) / math.sqrt(shape[1])
            self.register_parameter(key, nn.Parameter(start))
        if config.mixer == "mlp":
            self.slot_mlp_out = nn.Parameter(torch.zeros(M, 2 * M))
            self.channel_mlp_out = nn.Parameter(torch.zeros(r, 2 * r))
        self.w_out = nn.Parameter(torch.zeros(D, r))
        if config.writeback == "gate":
            self.w_gate = nn.Parameter(torch.zeros(D))
            self.b_gate = nn.Parameter(torch.tensor(-1.0))

    def forward(self, h: Tensor, state: tuple[Tensor, Tensor] | None = None,
                lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h (B,T,D), state (num (B,M,r), den (B,M)) or None, lengths (B,) or None (all T) -> (h' (B,T,D), state).

        The state returned is the one after each row's last real token. Raises ValueError on a wrong shape.
        """
        self.check(h, state, lengths)
        stream = scale_grad(h, self.config.trunk_grad_scale).float()
        x = rms(stream)  # (B,T,D)
        w, v = self.compress(x, lengths)
        B, M, r = h.shape[0], self.config.slots, self.config.width
        num, den = state or (v.new_zeros(B, M, r), v.new_zeros(B, M))
        ys = []
        for xs, ws, vs in zip(*(part.split(CHUNK, dim=1) for part in (x, w, v))):
            if torch.is_grad_enabled():
                y, num, den = checkpoint(self.read, xs, ws, vs, num, den, use_reentrant=False, preserve_rng_state=False)
            else:
                y, num, den = self.read(xs, ws, vs, num, den)
            ys.append(y)
        delta = self.write(torch.cat(ys, dim=1), x, stream)  # (B,T,D)
        return (h.float() + scale_grad(delta, self.config.grad_scale)).to(h.dtype), (num, den)

    def check(self, h: Tensor, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None) -> None:
        """Raise ValueError that lists every argument of a wrong shape."""
        D, (M, r) = self.w_out.shape[0], self.slots.shape
        if h.dim() != 3 or h.shape[2] != D or h.shape[1] == 0:
            raise ValueError(f"side path: expected h of shape (B, T>=1, {D}), found {tuple(h.shape)}")
        B, problems = h.shape[0], []
        if state is not None and (tuple(state[0].shape), tuple(state[1].shape)) != ((B, M, r), (B, M)):
            problems.append(f"expected state of shapes {(B, M, r)} and {(B, M)}, found {tuple(state[0].shape)} and {tuple(state[1].shape)}")
        if lengths is not None and tuple(lengths.shape) != (B,):
            problems.append(f"expected lengths of shape ({B},), found {tuple(lengths.shape)}")
        raise_all("side path", problems)

    def compress(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights exp(e) (B,T,M), zero for padding, and values v (B,T,r) of each token; |e| <= sqrt(r), so no running maximum."""
        k, v = rms(x @ self.w_key.T), x @ self.w_value.T  # (B,T,r)
        e = k @ rms(self.slots).T / math.sqrt(self.config.width)  # (B,T,M)
        w = e.exp()
        if lengths is not None:
            real = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # (B,T)
            w = w * real[..., None]
        return w, v

    def read(self, x: Tensor, w: Tensor, v: Tensor, num: Tensor, den: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk: x (B,C,D), w (B,C,M), v (B,C,r) and the sums so far -> y (B,C,r) and the sums after it."""
        z, num, den = self.remember(w, v, num, den)
        return self.remix(z, x), num, den

    def remember(self, w: Tensor, v: Tensor, num: Tensor, den: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory z = num / den (B,C,M,r) after each token of one chunk, and the sums after it."""
        nums = num[:, None] + running_sum(w[..., None] * v[:, :, None])  # (B,C,M,r)
        dens = den[:, None] + running_sum(w)  # (B,C,M)
        z = nums / dens.clamp_min(TINY)[..., None]
        return z, nums[:, -1].clone(), dens[:, -1].clone()  # clones, so that no chunk's whole memory stays alive

    def remix(self, z: Tensor, x: Tensor) -> Tensor:
        """Memory z (B,C,M,r) and tokens x (B,C,D) -> y (B,C,r)."""
        return (self.attend(z, x)[..., None] * self.mix(z)).sum(2)

    def attend(self, z: Tensor, x: Tensor) -> Tensor:
        """The weights a (B,C,M) with which each token reads the slots."""
        if self.config.mixer == "attention":
            q = rms(x @ self.w_query.T)  # (B,C,r)
            return ((rms(z) @ q[..., None])[..., 0] / math.sqrt(self.config.width)).softmax(-1)
        return (x @ self.w_read.T).softmax(-1)

    def mix(self, z: Tensor) -> Tensor:
        """The memory (B,C,M,r) as it is read."""
        if self.config.mixer == "mlp":
            z = z + self.slot_mlp_out @ F.silu(self.slot_mlp_in @ z)
            z = z + F.silu(z @ self.channel_mlp_in.T) @ self.channel_mlp_out.T
        return z

    def write(self, y: Tensor, x: Tensor, stream: Tensor) -> Tensor:
        """y (B,T,r) -> delta (B,T,D)."""
        d = y @ self.w_out.T  # (B,T,D)
        return d if self.config.writeback == "add" else self.strength(d, x, stream) * d

    def strength(self, d: Tensor, x: Tensor, stream: Tensor) -> Tensor:
        """What delta is of d (B,T,D), as a factor (B,T,1): the gate's, or below 1 where the bound is active."""
        if self.config.writeback == "gate":
            return torch.sigmoid(x @ self.w_gate + self.b_gate)[..., None]
        limit, norm = self.config.bound * stream.norm(dim=-1, keepdim=True), d.norm(dim=-1, keepdim=True)
        return torch.where(norm > limit, limit / torch.where(norm > limit, norm, 1), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Attach and report
# ---------------------------------------------------------------------------------------------------------------------

def attach(model: Transformer, adapter: AdapterConfig | None, talan: TalanConfig | None = None, scope: str = "joint",
           seed: int = 0) -> list[nn.Parameter]:
    """Add the adapter and the side path to the model, in place; returns the trainable parameters in the model's order.

    Each new tensor is drawn from its own generator, seeded by (seed, its name): what else is attached changes no start.
    Raises ValueError, with the model untouched, on an unknown scope, a second attach, a rank or layer that does not fit.
    """
    adapter = adapter or AdapterConfig(kind="none")
    check_attach(model, adapter, talan, scope)
    for parameter in model.parameters():
        parameter.requires_grad_(scope == "full")
    for name, parent, key in adapted(model, adapter):
        setattr(parent, key, AdapterLinear(getattr(parent, key), adapter, seed, name))
    if talan:
        for layer in talan.resolve(model.config.num_hidden_layers):
            block = model.model.layers[layer]
            side_path = SidePath(model.config.hidden_size, talan, seed, f"model.layers.{layer}.side_path")
            block.side_path, block.side_site = side_path.to(model.head_weight.device), talan.site
    model.adapter_config, model.talan_config = adapter, talan
    model.train(model.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, scope))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def attached(model: Transformer) -> bool:
    """Does the model have an adapter or a side path?"""
    return any(group_of(name) != "backbone" for name, _ in model.named_parameters())


def adapted(model: Transformer, adapter: AdapterConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, parent module, attribute) of every projection that the adapter is for."""
    for layer, block in enumerate(model.model.layers):
        for part, parent in (("self_attn", block.self_attn), ("mlp", block.mlp)):
            for key in adapter.targets if adapter.kind != "none" else ():
                if hasattr(parent, key):
                    yield f"model.layers.{layer}.{part}.{key}", parent, key


def group_of(name: str) -> str:
    """Which group a parameter belongs to: "side path", "adapter" or "backbone"."""
    return "side path" if ".side_path." in name else "adapter" if ".lora_" in name else "backbone"


def trains(name: str, scope: str) -> bool:
    """Does the parameter of this name learn under this scope?"""
    groups = {"joint": ("adapter", "side path"), "adapter": ("adapter",), "talan": ("side path",), "writeback": ("adapter",),
              "full": ("adapter", "side path", "backbone")}[scope]
    written = name.endswith((".side_path.w_out", ".side_path.w_gate", ".side_path.b_gate"))
    return group_of(name) in groups or (scope == "writeback" and written)


def check_attach(model: Transformer, adapter: AdapterConfig, talan: TalanConfig | None, scope: str) -> None:
    """Raise ValueError that lists every reason why these settings cannot be attached to this model."""
    problems: list[str] = []
    check_choice(problems, "scope", scope, SCOPES)
    if getattr(model, "adapter_config", None) is not None:
        problems.append("the model has an adapter or a side path already: load it afresh")
    needs = {"joint": adapter.kind != "none" or talan, "adapter": adapter.kind != "none", "talan": talan, "writeback": talan}
    if not needs.get(scope, True):
        problems.append(f"scope {scope!r} with adapter {adapter.kind!r} and {'a' if talan else 'no'} side path: its part to train is absent")
    if talan and talan.grad_scale == 0 and (scope == "talan" or adapter.kind == "none" and scope in ("joint", "writeback")):
        problems.append(f"scope {scope!r} with adapter {adapter.kind!r} and grad_scale 0: nothing would learn")
    for name, parent, key in adapted(model, adapter):
        if adapter.rank > min(getattr(parent, key).weight.shape):
            problems.append(f"rank {adapter.rank} is larger than {name} {tuple(getattr(parent, key).weight.shape)}")
    try:
        talan and talan.resolve(model.config.num_hidden_layers)
    except ValueError as error:
        problems.append(str(error))
    raise_all("attach", problems)


def report(model: Transformer) -> str:
    """Trainable tensors by group, the total, and the share of the backbone in per cent, as printable lines."""
    lines, total = [], 0
    backbone = sum(p.numel() for name, p in model.named_parameters() if group_of(name) == "backbone")
    for group in ("adapter", "side path", "backbone"):
        members = [p for name, p in model.named_parameters() if group_of(name) == group and p.requires_grad]
        total += (count := sum(p.numel() for p in members))
        if members:
            lines.append(f"trainable {group:10} {len(members):5} tensors {count:13,} parameters {100 * count / backbone:8.3f} % of the backbone")
    return "\n".join([*lines, f"trainable total      {'':13} {total:13,} parameters {100 * total / backbone:8.3f} % of {backbone:,}"])


class Instead(nn.Module):
    """What stands in a side path's place: h' = call(h, lengths), the state left as it came."""

    def __init__(self, call: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, h: Tensor, state: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.call(h, lengths), state


@contextlib.contextmanager
def switched(model: Transformer, adapter: bool, call: Callable[[int, SidePath, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """For a while: y = W x without its adapter unless `adapter`, and h' = call(layer, side path, h, lengths) for each side path."""
    linears = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    blocks = [block for block in model.model.layers if block.side_path is not None]
    before = [(x, "active", x.active) for x in linears] + [(x, "side_path", x.side_path) for x in blocks]
    try:
        for linear in linears:
            linear.active = linear.active and adapter
        for block in blocks:
            block.side_path = Instead(partial(call, block.layer, block.side_path))
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def gains_kept(model: Transformer) -> Iterator[None]:
    """For a while DoRA's g is computed once and not in every forward: for scoring, where no weight changes."""
    linears = [module for module in model.modules() if isinstance(module, AdapterLinear) and module.kind == "dora"]
    try:
        for linear in linears:
            linear.kept = linear.gain().detach()
        yield
    finally:
        for linear in linears:
            linear.kept = None


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."  # what PEFT puts before every name
FILES = {"adapter": ("adapter_config.json", "adapter_model.safetensors"), "talan": ("talan_config.json", "talan.safetensors")}
# Fields of PEFT's LoraConfig that leave the computation of a saved adapter alone, whatever they say.
PEFT_HARMLESS = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
                 "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora", "runtime_config", "qalora_group_size",
                 "loftq_config", "layers_pattern", "ensure_weight_tying"}
PEFT_FIXED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


def save_adapter(model: Transformer, folder: str | Path) -> None:
    """Write the adapter in PEFT's layout and the side path beside it (float32 safetensors + JSON), each file atomically.

    Raises ValueError when nothing is attached, or when the folder holds a part that this model does not have.
    """
    folder, parts = Path(folder), parts_of(model)
    stale = [name for part in set(FILES) - set(parts) for name in FILES[part] if (folder / name).exists()]
    if not attached(model) or stale:
        raise ValueError(f"{folder}: cannot save {sorted(parts) or 'a bare backbone'} here" + (f", stale files: {stale}" if stale else ""))
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"backbone": model.fingerprint or ""}  # one key: safetensors writes several in a random order
    for part, (config, tensors) in parts.items():
        with atomic(folder / FILES[part][1]) as tmp:
            save_file({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}, tmp, metadata=meta)
        with atomic(folder / FILES[part][0]) as tmp:
            tmp.write_text(json.dumps(config, indent=2) + "\n")


def parts_of(model: Transformer) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Part -> (its JSON, its tensors by file name) of what is attached."""
    adapter, talan = getattr(model, "adapter_config", None), getattr(model, "talan_config", None)
    named: dict[str, Tensor] = dict(model.named_parameters())
    parts: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    if adapter and adapter.kind != "none":
        parts["adapter"] = (peft_config(adapter, model.source),
                            {peft_name(k): v for k, v in named.items() if group_of(k) == "adapter"})
    if talan:
        config = asdict(talan) | {"layers": talan.resolve(model.config.num_hidden_layers), "hidden_size": model.config.hidden_size,
                                  "base_model_name_or_path": model.source}
        parts["talan"] = (config, {k: v for k, v in named.items() if group_of(k) == "side path"})
    return parts


def peft_name(name: str) -> str:
    """Our parameter's name -> PEFT's: a prefix, and `.weight` behind lora_A and lora_B but not behind the magnitude."""
    return PREFIX + name + ("" if name.endswith("magnitude_vector") else ".weight")


def peft_config(config: AdapterConfig, base: str) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
            "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": sorted(config.targets),
            "use_dora": config.kind == "dora", "use_rslora": config.kind == "rslora", "bias": "none", "fan_in_fan_out": False,
            "init_lora_weights": True, "inference_mode": True}


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder itself, or, while a run is unfinished, the newest complete `step-*` folder in it."""
    steps = [p for p in Path(folder).glob("step-[0-9]*") if p.name[5:].isdigit() and p.is_dir()]
    return max(steps, key=lambda p: int(p.name[5:]), default=Path(folder))


def load_adapter(model: Transformer, folder: str | Path, scope: str = "joint") -> list[nn.Parameter]:
    """Attach what `folder` holds (ours or PEFT's) to a bare model; returns the trainable parameters.

    Raises ValueError, with the model untouched, that lists every tensor missing, unexpected, of a wrong shape or not finite, every
    setting that is not supported, and a backbone other than the one it was trained on, by config and tokenizer: weights are not compared.
    """
    folder = checkpoint_folder(folder)
    present = [part for part, names in FILES.items() if any((folder / name).exists() for name in names)]
    if not present:
        raise ValueError(f"{folder}: expected {' or '.join(names[0] for names in FILES.values())}, found neither")
    infos = {part: tensor_info(folder / FILES[part][1]) for part in present}
    adapter = read_peft_config(folder / FILES["adapter"][0], infos["adapter"]) if "adapter" in present else None
    talan = read_talan_config(folder / FILES["talan"][0], model.config) if "talan" in present else None
    with torch.device("meta"):
        shadow = Transformer(model.config)
    attach(shadow, adapter, talan, scope)
    check_backbone(model, [folder / FILES[part][1] for part in present])
    problems = [p for part in present for p in tensor_problems(parts_of(shadow)[part][1], infos[part])]
    problems = problems or [f"{name}: holds infinity or NaN" for part in present for name in infos[part]
                            if not read_tensor(folder / FILES[part][1], name).isfinite().all()]
    raise_all(f"{folder}: does not fit this backbone and its own settings", problems)
    trainable = attach(model, adapter, talan, scope)
    for part, (_, tensors) in parts_of(model).items():
        for name, parameter in tensors.items():
            parameter.data.copy_(read_tensor(folder / FILES[part][1], name))
    return trainable


def tensor_problems(want: dict[str, Tensor], found: dict[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """Names, shapes and dtypes in a file against those of the model, one line an offender."""
    problems = [f"missing: {name} {tuple(want[name].shape)}" for name in sorted(set(want) - set(found))]
    problems += [f"unexpected: {name} {found[name][0]}" for name in sorted(set(found) - set(want))]
    problems += [f"dtype: {name} is {dtype}, expected one of {sorted(DTYPES)}" for name, (_, dtype) in sorted(found.items()) if dtype not in DTYPES]
    return problems + [f"shape: {name} is {found[name][0]}, expected {tuple(want[name].shape)}"
                       for name in sorted(set(found) & set(want)) if found[name][0] != tuple(want[name].shape)]


def check_backbone(model: Transformer, files: list[Path]) -> None:
    """Raise ValueError when a file names another backbone than the model's (hash of config and tokenizer)."""
    for file in files:
        with safe_open(file, framework="pt") as f:
            saved = (f.metadata() or {}).get("backbone")
        mine = model.fingerprint
        if saved and mine and saved != mine:
            raise ValueError(f"{file}: trained on another backbone (config and tokenizer hash {saved[:12]}, this one has {mine[:12]})")


def read_peft_config(file: Path, tensors: dict[str, Any]) -> AdapterConfig:
    """PEFT's adapter_config.json -> AdapterConfig. Raises ValueError on every field that would change the computation."""
    raw = read_json(file)
    problems = [f"{k}: expected {' or '.join(map(repr, ok))}, found {raw.get(k)!r}" for k, ok in PEFT_FIXED.items() if raw.get(k, ok[0]) not in ok]
    problems += [f"{k}: not supported, found {v!r}" for k, v in sorted(raw.items())
                 if k not in PEFT_HARMLESS | set(PEFT_FIXED) and v not in (None, False, [], {}, "")]
    problems += [f"{k}: absent" for k in ("r", "lora_alpha", "target_modules") if k not in raw]
    problems += [f"{k}: expected true or false, found {raw[k]!r}" for k in ("use_dora", "use_rslora") if raw.get(k) not in (None, False, True)]
    targets: Any = raw.get("target_modules")
    if isinstance(targets, str) and targets not in TARGETS:  # a pattern or "all-linear": the tensors say what it matched
        targets = sorted({name.split(".")[-2] for name in (n.removesuffix(".weight") for n in tensors) if "." in name})
    raise_all(str(file), problems)
    if raw.get("use_dora") and raw.get("use_rslora"):
        raise_all(str(file), ["use_dora and use_rslora together are not supported"])
    kind = "dora" if raw.get("use_dora") else "rslora" if raw.get("use_rslora") else "lora"
    return AdapterConfig(kind, raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), targets)


def read_talan_config(file: Path, model: ModelConfig) -> TalanConfig:
    """talan_config.json -> TalanConfig. Raises ValueError on absent or unknown fields and on another hidden size."""
    raw, names = read_json(file), set(TalanConfig.__dataclass_fields__)
    problems = [f"{name}: absent" for name in sorted(names - set(raw))]
    problems += [f"{name}: unknown field" for name in sorted(set(raw) - names - {"hidden_size", "base_model_name_or_path"})]
    if raw.get("hidden_size", model.hidden_size) != model.hidden_size:
        problems.append(f"hidden_size: {raw['hidden_size']} in the file, {model.hidden_size} in this backbone")
    raise_all(str(file), problems)
    return TalanConfig(**{name: raw[name] for name in names})


# ---------------------------------------------------------------------------------------------------------------------
# Merge
# ---------------------------------------------------------------------------------------------------------------------

def merge_adapter(model: Transformer) -> None:
    """Replace each adapted projection by a plain one with W' = merged_weight(), computed in float32 and cast once.

    An export: it cannot be undone. A side path stays attached: it depends on the sequence and has no merged form.
    Raises ValueError when there is no adapter.
    """
    adapter = getattr(model, "adapter_config", None)
    if adapter is None or adapter.kind == "none":
        raise ValueError("merge: the model has no adapter")
    for _, parent, key in adapted(model, adapter):
        old, new = getattr(parent, key), nn.Linear(1, 1, bias=False, device="meta")
        new.weight = nn.Parameter(old.merged_weight().to(old.weight.dtype), requires_grad=old.weight.requires_grad)
        new.out_features, new.in_features = new.weight.shape
        setattr(parent, key, new)
    model.adapter_config = AdapterConfig(kind="none")


@dataclass(frozen=True)
class MergeSettings:
    """python talan.py merge: write the backbone with the adapter merged as an ordinary Hugging Face folder."""

    backbone: str = ""
    adapter: str = ""
    out: str = ""
    drop_side_path: bool = False


def merge_command(settings: MergeSettings) -> None:
    """Load, merge in float32, write, and report how far the logits moved. Raises ValueError."""
    if Path(settings.out).exists():
        raise ValueError(f"{settings.out}: exists already; name a new folder")
    model = load_model(settings.backbone)
    load_adapter(model, settings.adapter)
    if model.talan_config and not settings.drop_side_path:
        raise ValueError(f"{settings.adapter}: holds a side path, which depends on the sequence and cannot be merged into weights; "
                         "--drop-side-path exports the adapter without it")
    for block in model.model.layers:
        block.side_path = None
    tokens = torch.randint(0, model.config.vocab_size, (2, 64), generator=generator(0, "merge"))
    with torch.no_grad():
        before = model.logits(model(tokens)).float()
        merge_adapter(model)
        after = model.logits(model(tokens)).float()
    save_model(model, settings.out)
    print(f"wrote {settings.out} ({model.head_weight.dtype}); on 128 random tokens the logits differ from the live adapter's by at most "
          f"{(after - before).abs().max():.2e} (largest logit {before.abs().max():.2f})")


def main() -> None:
    """python talan.py merge --backbone B --adapter A --out DIR [--drop-side-path]"""
    parser = argparse.ArgumentParser(prog="talan.py", description="Adapters and the TALAN side path.")
    merge = parser.add_subparsers(dest="command", required=True).add_parser("merge", help=MergeSettings.__doc__)
    for name in ("backbone", "adapter", "out"):
        merge.add_argument(f"--{name}", required=True)
    merge.add_argument("--drop-side-path", action="store_true")
    args = vars(parser.parse_args())
    args.pop("command")
    with contextlib.suppress(BrokenPipeError):
        try:
            merge_command(MergeSettings(**args))
        except (ValueError, OSError) as error:
            raise SystemExit(f"talan.py: {error}") from None


if __name__ == "__main__":
    main()
