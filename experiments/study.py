"""The small-adapter study of RESULTS.md: side paths with other memories, and the map.

    python -m experiments.sweep --vary memory=token     trains and scores the side path of that name
    python -m experiments.study --out FOLDER            prints the map, draws it where --out says

Shapes: B rows, T tokens, C tokens of a chunk, D hidden size, M memory slots, r memory width.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import talan
from common import ROOT, Record, run_script, setting
from data.chat import load_tokenizer
from eval import TINY, table
from experiments import compare
from model import ModelConfig, Transformer
from talan import SidePath, TalanConfig

# ---- other memories ----


class Marked(SidePath):
    """SidePath with one more parameter, without which nothing loads what it saves."""

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


@cache
def answer_token() -> int:
    """The id of `assistant`, which opens the answer, in the embedded tokenizer."""
    return load_tokenizer(TINY).encode("assistant")[0]


class PromptMemory(Marked):
    """w_tm = 0 from the assistant's turn on: what is remembered is the prompt alone."""

    tokens: Tensor  # (B,T) of the pass that goes on, see replaced_memory

    def forward(self, h: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        """As SidePath, whose padding begins where the prompt ends; after a state all is answer."""
        prompt = ((self.tokens == answer_token()).cumsum(1) == 0).sum(1)  # (B,)
        prompt = prompt if lengths is None else prompt.minimum(lengths)
        return super().forward(h, state, prompt if state is None else 0 * prompt)


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


MEMORIES = {"token": TokenMemory, "other": OtherMemory, "none": NoMemory, "prompt": PromptMemory}
MEMORIES |= {"decay": DecayMemory, "gate": GatedMemory, "sharp": SharpMemory}


@contextlib.contextmanager
def replaced_memory(name: str) -> Iterator[None]:
    """While this lasts, talan.attach attaches the side path of that name; "": talan.py's own.

    PromptMemory is told the tokens of each pass.
    """
    before, run = talan.SidePath, Transformer.run

    def run_and_tell(model: Transformer, tokens: Tensor, *more: Any) -> Tensor:
        PromptMemory.tokens = tokens
        return run(model, tokens, *more)

    try:
        talan.SidePath = MEMORIES[name] if name else before  # type: ignore[misc]
        Transformer.run = run_and_tell  # type: ignore[assignment]
        yield
    finally:
        talan.SidePath, Transformer.run = before, run  # type: ignore[misc,method-assign]


def memory_of(side: str) -> str:
    """The NAME of memory=NAME in a sweep's variation; "" without one. Raises ValueError."""
    name = "".join(part[7:] for part in side.split("&") if part.startswith("memory="))
    if name not in ("", *MEMORIES):
        raise ValueError(f"{side}: expected a memory of {', '.join(MEMORIES)}")
    return name


def each_side(sides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The sides of a sweep, each while attach gives it the memory that it names."""
    for side, wanted in sides.items():
        with replaced_memory(memory_of(side)):
            yield side, wanted


# ---- the map ----

MAP = str(ROOT / "experiments/records/map-*.jsonl.gz")


@dataclass(frozen=True)
class Settings:
    """Gain of side paths over the adapter alone, and over more rank, by the adapter's size."""

    records: tuple[str, ...] = setting((MAP,), "sweeps' records; wildcards")
    out: str = setting("", "folder for map.png, which needs matplotlib; empty: print alone")


def count_backbone(folder: str) -> int:
    """Parameters of a backbone, counted without weights."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dir(ROOT / folder))
    return sum(p.numel() for p in model.parameters())


def map_lines(file: str) -> list[Record]:
    """Of each side path of a sweep: sizes, and what it gains over adapter and control.

    Its control: of the sides without side path the smallest that has as many parameters.
    """
    header, sides = compare.read_sweep(file)
    sizes = {side: of["trainable"][0] for side, of in header["sides"].items()}
    bare = [side for side in sides if side in ("baseline", "control") or "no-talan" in side]
    lines, total = [], count_backbone(header["settings"]["backbone"])
    for side in [side for side in sides if side not in bare]:
        enough = [other for other in bare if sizes[other] >= sizes[side]]
        if not enough:
            raise ValueError(f"{file}: expected a side without side path as large as {side}")
        control = min(enough, key=lambda other: sizes[other])
        line = {"share": 100 * sizes["baseline"] / total}
        line["added"] = 100 * (sizes[side] - sizes["baseline"]) / total
        line["targets"] = " and ".join(header["settings"]["targets"])
        for name, other in (("adapter", "baseline"), ("control", control)):
            result = compare.compare_runs(sides[other], sides[side], compare.Settings())
            whole = [*result["pooled"].values(), *result["tasks"].values()][0]
            line[name] = [*whole.values()]
        if side == "candidate":
            side = "slots={slots}&width={width}".format(**header["settings"])
        lines.append(line | {"sweep": Path(file).name.removesuffix(".jsonl.gz"), "side": side})
    return lines


def cells(line: Record) -> list[str]:
    """A difference and its interval, in the digits of its unit."""
    spec = "+.4f" if abs(line["baseline"]) < 5 else "+.2f"  # nats, or per cent
    low, high = (format(end, spec) for end in line["interval95"])
    return [format(line["difference"], spec), f"{low} to {high}"]


def map_table(lines: list[Record]) -> str:
    """A line a side path: what it gains in points and in nats per token."""
    rows = []
    for line in lines:
        row = [line["sweep"], line["side"], f"{line['share']:.2f}", f"{line['added']:.2f}"]
        for entries in (line["adapter"], line["control"]):
            row += cells(entries[0]) + cells(entries[-1])
        rows.append(row)
    head = ["sweep", "side path", "adapter %", "added %"]
    for other in ("adapter", "more rank"):
        head += [f"points over {other}", "95 % interval", "nats", "95 % interval"]
    return table(head, rows)


def draw(lines: list[Record], file: Path) -> None:
    """Points and nats gained over the adapter alone and over more rank, by the adapter's share.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--out: the picture needs matplotlib, which is not installed") from None
    figure = Figure((10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    groups = list(dict.fromkeys((line["side"], line["targets"]) for line in lines))
    shapes = list(dict.fromkeys(side for side, _ in groups))
    for column, other in enumerate(("adapter", "control")):
        for row, unit in enumerate(("points", "nats per token")):
            axis = axes[row, column]
            axis.axhline(0, color="0.6", linewidth=1)
            axis.set(xscale="log", ylabel=unit, xlabel="adapter, % of the backbone")
            for group in groups:
                chosen = [line for line in lines if (line["side"], line["targets"]) == group]
                n, style = shapes.index(group[0]), "o-" if group[1] == "all" else "o--"
                x = [line["share"] * 1.06**n for line in chosen]  # side by side
                entries = [line[other][0 if unit == "points" else -1] for line in chosen]
                middle = [entry["difference"] for entry in entries]
                ends = [entry["interval95"] for entry in entries]
                axis.plot(x, middle, style, color=f"C{n}", label=", ".join(group))
                axis.vlines(x, *zip(*ends), color=f"C{n}", alpha=0.5)
    axes[0, 0].set_title("gain over the adapter alone")
    axes[0, 1].set_title("gain over more rank, at least as many parameters")
    axes[1, 0].legend(fontsize="small")
    figure.savefig(file, dpi=90)


def main(overrides: Record) -> None:
    """Print the map, draw it. Raises ValueError when there are no such records."""
    settings = Settings(**overrides)
    files = [file for word in settings.records for file in sorted(glob.glob(word))]
    if not files:
        raise ValueError(f"expected records of sweeps, found none as {settings.records}")
    lines = [line for file in files for line in map_lines(file)]
    lines.sort(key=lambda line: line["share"])
    print(map_table(lines))
    if settings.out:
        draw(lines, Path(settings.out) / "map.png")


if __name__ == "__main__":
    run_script(main, Settings, "python -m experiments.study")
