"""Side paths with another memory than talan.py's, which RESULTS.md compares: sweep --memory NAME.

Each takes SidePath's place in talan.py while its run is trained and scored. Nothing else loads
what it saves: every one has a parameter that talan.py's side path has not.

Shapes: B rows, C tokens of a chunk, D hidden size, M memory slots, r memory width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import talan
from talan import SidePath, TalanConfig


class Marked(SidePath):
    """SidePath and one more parameter, at first the numbers of `start`."""

    start: Any = ()

    def __init__(self, hidden_size: int, config: TalanConfig, make_generator: Any = None) -> None:
        super().__init__(hidden_size, config, make_generator)
        self.extra = nn.Parameter(self.first(hidden_size, config))

    def first(self, hidden_size: int, config: TalanConfig) -> Tensor:
        """What the parameter is at first: by itself nothing at all."""
        return torch.zeros(0)


class TokenMemory(Marked):
    """z_tm = v_t: what is remembered is the token alone."""

    def remember(self, w: Tensor, v: Tensor, num: Tensor, den: Tensor) -> tuple[Tensor, ...]:
        """As SidePath: w (B,C,M), v (B,C,r) -> z (B,C,M,r), num, den."""
        return v[:, :, None].expand(*w.shape, -1), num, den


class OtherMemory(Marked):
    """z_tm of the row before it in the batch: another text's memory."""

    def remember(self, w: Tensor, v: Tensor, num: Tensor, den: Tensor) -> tuple[Tensor, ...]:
        """As SidePath."""
        z, num, den = super().remember(w, v, num, den)
        return z.roll(1, 0), num, den


class NoMemory(Marked):
    """y = silu(w_value x), a low-rank map: neither slots nor a sequence."""

    def read(self, x: Tensor, w: Tensor, v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        """As SidePath: v (B,C,r) -> y (B,C,r), num, den."""
        return F.silu(v), *sums


class DecayMemory(Marked):
    """num_t = f num_{t-1} + w_t v_t, den_t = f den_{t-1} + w_t, f learned for each slot.

    At first the slots forget half in 1, 2, 4, ... tokens, the last one in 2^(M-1).
    """

    def first(self, hidden_size: int, config: TalanConfig) -> Tensor:
        """logit(f) with f = 2^(-1 / 2^m), (M,)."""
        return torch.logit(0.5 ** (0.5 ** torch.arange(config.slots)))

    def remember(self, w: Tensor, v: Tensor, num: Tensor, den: Tensor) -> tuple[Tensor, ...]:
        """As SidePath; |f^(t-u)| <= 1, so nothing overflows."""
        t = torch.arange(w.shape[1], device=w.device)
        age = (t[:, None] - t).clamp_min(0)  # (C,C)
        log_f = F.logsigmoid(self.extra)[:, None]  # (M,1)
        left = (log_f[..., None] * age).exp().tril()  # (M,C,C)
        wv = w.transpose(1, 2)[..., None] * v[:, None]  # (B,M,C,r)
        before = (log_f * (t + 1)).exp()[..., None]  # (M,C,1)
        nums = (left @ wv + before * num[:, :, None]).transpose(1, 2)  # (B,C,M,r)
        dens = left @ w.transpose(1, 2)[..., None] + before * den[:, :, None, None]  # (B,M,C,1)
        dens = dens[..., 0].transpose(1, 2)  # (B,C,M)
        z = nums / dens.clamp_min(1e-30)[..., None]
        return z, nums[:, -1].clone(), dens[:, -1].clone()


class GatedMemory(Marked):
    """w_tm = sigmoid(extra_m . x_t) exp(e_tm): a learned gate says what is written."""

    def first(self, hidden_size: int, config: TalanConfig) -> Tensor:
        """(M,D), zero."""
        return torch.zeros(config.slots, hidden_size)

    def compress(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """As SidePath: x (B,T,D) -> w (B,T,M), v (B,T,r)."""
        w, v = super().compress(x, lengths)
        return torch.sigmoid(x @ self.extra.T) * w, v


class SharpMemory(Marked):
    """w_tm = exp(s_m e_tm), s learned for each slot, 4 at first: a slot can hold a single token."""

    def first(self, hidden_size: int, config: TalanConfig) -> Tensor:
        """(M,)."""
        return torch.full((config.slots,), 4.0)

    def compress(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """As SidePath; exp's argument is kept within +-60, where sums of it are finite."""
        w, v = super().compress(x, lengths)
        sharp = (self.extra * w.clamp_min(1e-30).log()).clamp(-60, 60).exp()
        return torch.where(w > 0, sharp, 0), v


MEMORIES = {"token": TokenMemory, "other": OtherMemory, "none": NoMemory}
MEMORIES |= {"decay": DecayMemory, "gate": GatedMemory, "sharp": SharpMemory}


@contextlib.contextmanager
def replaced_memory(name: str) -> Iterator[None]:
    """While this lasts, talan.attach attaches the side path of that name; "": talan.py's own."""
    before = talan.SidePath
    try:
        talan.SidePath = MEMORIES[name] if name else before  # type: ignore[misc]
        yield
    finally:
        talan.SidePath = before  # type: ignore[misc]
