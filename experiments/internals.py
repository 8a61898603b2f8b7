"""What adapter and side path do to the residual stream: python -m experiments.internals --help.

Four passes over the same tokens (backbone; + adapter; + side path; + both), then both again while
the side paths read another memory than their own. Perturbation: delta, which a side path adds to
the stream. Update: what the adapter alone has changed in the stream where delta is added.

Shapes: B rows, T tokens, D hidden size, M memory slots, r memory width, V vocabulary, N positions;
        of all batches: S rows, L tokens of the widest row, R resamples.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import ROOT, Record, check_numbers, choose_device, choose_dtype, file_hash
from common import folder_hash, run_header, run_script, setting, write_json
from data.chat import Row, load_tokenizer
from eval import TINY, log_probs, read_run, table
from model import Transformer, load_model
from talan import SidePath, adapted, checkpoint_folder, load_adapter, recorded_backbone, rms
from train import Batch, load_rows, make_batch, pack, padded_width
from train import Settings as TrainSettings


@dataclass(frozen=True)
class Settings:
    """Measure what adapter and side path of a run do to the residual stream."""

    adapter: str = setting("", "run folder or PEFT folder")
    backbone: str = setting("", "Hugging Face folder or hub id; empty: the adapter's own")
    data: str = setting(str(ROOT / "data/tiny/dev.jsonl"), "rows: JSONL, .gz allowed")
    rows: int = setting(64, "rows, drawn with --seed; 0: all")
    max_tokens: int = setting(512, "longer rows are cut")
    batch_tokens: int = setting(4096, "tokens, padding included, read at once")
    out: str = setting("", "folder for internals.json and .png; empty: ADAPTER/internals")
    resamples: int = setting(200, "draws of the bootstrap over rows")
    seed: int = setting(0, "seeds the draw of rows, who reads whose memory, and the bootstrap")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: str = setting("float32", "float32, auto or bfloat16, whose rounding moves the stream")

    def __post_init__(self) -> None:
        check_numbers(self, rows=0, max_tokens=2, batch_tokens=1, resamples=100, seed=0)
        if not self.adapter:
            raise ValueError("adapter: name the run to look into, found none")


# ---- passes ----

Memory = dict[int, Tensor]  # layer -> z (B,T,M,r); one for all tokens: (1,1,M,r)


class SidePathOverride(nn.Module):
    """Stands in a side path's place: off, or on with its own memory or another; keeps its parts."""

    h: Tensor  # (B,T,D) before delta
    z: Any  # (B,T,M,r) the memory that is read
    weights: Tensor  # (B,T,M) with which each token reads the slots
    delta: Tensor  # (B,T,D) float32
    factor: Tensor  # (B,T) ||delta|| / ||d||: the gate, or the bound's factor; nan where d = 0

    def __init__(self, side_path: SidePath, is_on: bool, memory: Tensor | None) -> None:
        super().__init__()
        self.side_path, self.is_on, self.memory = side_path, is_on, memory

    def forward(self, h: Tensor, state: Any = None, lengths: Any = None) -> tuple[Tensor, None]:
        """h (B,T,D) -> (h', None), computed as SidePath.forward does."""
        self.h = h
        if not self.is_on:
            return h, None
        side_path, stream = self.side_path, h.float()
        x = rms(stream)  # (B,T,D)
        self.z = self.memory
        if self.memory is None:
            w, v = side_path.compress(x, lengths)
            num = v.new_zeros(len(h), *side_path.slots.shape)  # (B,M,r)
            self.z = side_path.remember(w, v, num, num[..., 0])[0]
        y = side_path.remix(self.z, x)  # (B,T,r)
        self.weights = side_path.attend(self.z, x)
        self.delta = side_path.write(y, x, stream)
        self.factor = self.delta.norm(dim=-1) / (y @ side_path.w_out.T).norm(dim=-1)
        return (stream + self.delta).to(h.dtype), None


@contextlib.contextmanager
def override_adapters(model: Any, adapter: bool, side_paths: dict[int, Any]) -> Iterator[None]:
    """For a while these are the side paths, and without adapter every map is W x + b alone."""
    places = [(model.model.layers[n], "side_path", module) for n, module in side_paths.items()]
    for _, parent, key in () if adapter else adapted(model, model.adapter_config):
        places.append((parent, key, getattr(parent, key).linear))
    before = [(parent, key, getattr(parent, key)) for parent, key, _ in places]
    try:
        for place in places:
            setattr(*place)
        yield
    finally:
        for place in before:
            setattr(*place)


@dataclass
class Pass:
    """One forward pass: the stream after each block and the final hidden states, (B,T,D) each."""

    streams: list[Tensor]
    hidden: Tensor
    side_paths: dict[int, SidePathOverride]  # by layer


@torch.no_grad()
def run_pass(
    model: Transformer, tokens: Tensor, adapter: bool, side_path: bool, memory: Memory | None = None
) -> Pass:
    """tokens (B,T), adapter and side paths on or off, these with their own memory or another."""
    streams: list[Tensor] = []
    parts: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            hook = block.register_forward_hook(lambda block, inputs, h: streams.append(h))
            stack.callback(hook.remove)
            if block.side_path is not None:
                z = memory[layer] if memory else None
                parts[layer] = SidePathOverride(block.side_path, side_path, z)
        stack.enter_context(override_adapters(model, adapter, parts))
        return Pass(streams, model(tokens), parts)


# ---- what is measured of each token ----


def insertion_values(update: Tensor, part: SidePathOverride) -> dict[str, Tensor]:
    """What a side path does beside the adapter's update u (B,T,D); of each token (B,T).

    update / perturbation = ||u|| / ||delta||, cosine = u . delta / (||u|| ||delta||), both nan
    where u or delta is 0; slots read = exp(-sum_m a_m log a_m), from 1 to M.
    """
    size = part.delta.norm(dim=-1)
    u, d = (torch.where(x > 0, x, math.nan) for x in (update.norm(dim=-1), size))
    values = {"update / perturbation": u / d, "cosine": (update * part.delta).sum(-1) / (u * d)}
    values["perturbation / stream"] = size / part.h.float().norm(dim=-1)
    values["slots read"] = torch.special.entr(part.weights).sum(-1).exp()
    if part.side_path.config.writeback != "add":
        values["gate or bound's factor"] = part.factor
    return values


def compare_streams(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """||a - b|| / ||b|| and ||a - b|| of each token (B,T) of two streams (B,T,D)."""
    norm = (a.float() - b.float()).norm(dim=-1)
    return {"difference": norm / b.float().norm(dim=-1), "difference norm": norm}


def compare_logits(model: Transformer, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Of hidden states (B,T,D), p before and q after: sum_v p_v log(p_v / q_v); another arg max?"""
    kl, changed = [], []
    for h, g in zip(before.flatten(0, 1).split(128), after.flatten(0, 1).split(128)):
        p = model.logits(h).double().log_softmax(-1)  # (128,V)
        q = model.logits(g).double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        changed.append((p.argmax(-1) != q.argmax(-1)).double())
    values = {"KL(adapter || both)": torch.cat(kl), "another arg max": torch.cat(changed)}
    return {name: value.view(before.shape[:2]) for name, value in values.items()}  # (B,T)


def token_loss(model: Transformer, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each token (B,T); nan where it is not supervised."""
    log_p = log_probs(model, hidden.flatten(0, 1)[batch.target_positions], batch.targets)  # (N,)
    loss = torch.full(hidden.shape[:2], math.nan)
    loss.view(-1)[batch.target_positions.cpu()] = -log_p
    return loss


Values = dict[str, dict[str, Any]]  # place -> quantity -> (B,T) of a batch, (S,L) of all rows
PASSES = {"backbone": (False, False), "side path": (False, True)}  # adapter, side path
PASSES |= {"adapter": (True, False), "both": (True, True)}


def observe(model: Transformer, batch: Batch) -> tuple[Values, Memory]:
    """The four passes over one batch: what differs between them, and the memory of `both`."""
    values: Values = {"loss": {}}
    passes = {}
    for name, (adapter, side_path) in PASSES.items():
        passes[name] = run_pass(model, batch.tokens, adapter, side_path)
        values["loss"][name] = token_loss(model, passes[name].hidden, batch)
    base, tuned, both = passes["backbone"], passes["adapter"], passes["both"]
    first = min(both.side_paths, default=len(both.streams))
    for layer, stream in enumerate(tuned.streams):
        update = compare_streams(stream, base.streams[layer])["difference"]
        found = compare_streams(both.streams[layer], stream) if layer >= first else {}
        values[f"after layer {layer}"] = {"update": update, **found}
    for layer, part in both.side_paths.items():
        update = tuned.side_paths[layer].h.float() - base.side_paths[layer].h.float()
        values[f"layer {layer}"] = insertion_values(update, part)
    if both.side_paths:
        values["logits"] = compare_logits(model, tuned.hidden, both.hidden)
    return values, {layer: part.z for layer, part in both.side_paths.items()}


def swapped_memory(model: Transformer, others: Sequence[Row], width: int) -> Memory:
    """At every position t < width the memory z_t of the other row; after its end, its last."""
    cut = [Row(row.ids[: width + 1], row.supervised[: width + 1]) for row in others]
    parts = run_pass(model, make_batch(cut, model.head_weight.device).tokens, True, True).side_paths
    last = torch.tensor([len(row.ids) - 2 for row in cut])
    at = torch.minimum(torch.arange(width), last[:, None])  # (B,T)
    return {n: part.z[torch.arange(len(cut))[:, None], at] for n, part in parts.items()}


def measure_rows(model: Transformer, rows: Sequence[Row], batch_tokens: int) -> Values:
    """All passes over all rows, each beside the next one's memory; nan: padding, or left out."""
    widths = [padded_width(row) for row in rows]
    fed = [len(row.ids) - 1 for row in rows]
    groups = pack(sorted(range(len(rows)), key=fed.__getitem__), widths, batch_tokens)
    empty = partial(np.full, (len(rows), max(widths)), math.nan)
    found: Values = defaultdict(partial(defaultdict, empty))

    def store(group: list[int], place: str, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            for n, line in zip(group, value.double().cpu().numpy()):
                found[place][name][n, : fed[n]] = line[: fed[n]]

    mean: dict[int, Any] = {}  # layer -> z (1,1,M,r), the mean over all tokens
    for group in tqdm(groups, "four passes", unit="batch", disable=None):
        batch = make_batch([rows[n] for n in group], model.head_weight.device)
        values, memory = observe(model, batch)
        for place, entries in values.items():
            store(group, place, entries)
        for layer, z in memory.items():
            total: Any = sum(z[b, : fed[n]].double().sum(0) for b, n in enumerate(group))
            mean[layer] = mean.get(layer, 0) + (total / sum(fed)).float()[None, None]
    for group in tqdm(groups if mean else [], "other memories", unit="batch", disable=None):
        batch = make_batch([rows[n] for n in group], model.head_weight.device)
        others = [rows[(n + 1) % len(rows)] for n in group]
        swapped = swapped_memory(model, others, batch.tokens.shape[1])
        for name, memory in (("mean memory", mean), ("another row's memory", swapped)):
            hidden = run_pass(model, batch.tokens, True, True, memory).hidden
            store(group, "loss", {name: token_loss(model, hidden, batch)})
    return found


# ---- statistics ----


def figure(statistic: Any, draws: np.ndarray, a: np.ndarray, b: np.ndarray | None = None) -> Record:
    """statistic(a), or / statistic(b), of values (S,L); 95 % interval over draws (R,S) of rows."""

    def value_of(rows: Any) -> float:
        return statistic(a[rows]) / (1 if b is None else statistic(b[rows]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no token with a value, or 0 / 0
        value = value_of(slice(None))
        resampled = np.array([value_of(rows) for rows in draws])
    if not math.isfinite(value):
        return {"value": None}
    ends = np.percentile(resampled[np.isfinite(resampled)], (2.5, 97.5))
    return {"value": float(value), "interval95": ends.tolist()}


def compute_figures(found: Values, resamples: int, seed: int) -> dict[str, Record]:
    """place -> quantity -> figure: of losses and logits the mean over all tokens, else the median.

    growth: of the difference, after the last layer / after the first side path's. loss above both:
    L - L_both, for the backbone the improvement, for the adapter what is lost with the side path
    off; and its share of the improvement, if that one's interval is above 0.
    """
    both = found["loss"]["both"]
    above = {name: loss - both for name, loss in found["loss"].items() if name != "both"}
    draws = np.random.default_rng([seed, 1]).integers(len(both), size=(resamples, len(both)))
    figures: dict[str, Record] = defaultdict(dict)
    for place, entries in (found | {"loss above both": above}).items():
        for name, values in entries.items():
            is_mean = place in ("logits", "loss", "loss above both")
            entry = figure(np.nanmean if is_mean else np.nanmedian, draws, values)
            if entry["value"] is not None:
                entry["tokens"] = int((~np.isnan(values)).sum())
                entry["p5"], entry["p95"] = np.nanpercentile(values, (5, 95)).tolist()
            figures[place][name] = entry
    changed = [entries for entries in found.values() if "difference" in entries]
    for name in ("difference", "difference norm") if changed else ():
        first, last = changed[0][name], changed[-1][name]
        figures["growth"][name] = figure(np.nanmedian, draws, last, first)
    if figures["loss above both"]["backbone"]["interval95"][0] > 0:
        for name, values in above.items():
            share = figure(np.nanmean, draws, values, above["backbone"])
            figures["share of the improvement"][name] = share
    return figures


# ---- table, picture, command ----


def figure_table(figures: dict[str, Record]) -> str:
    """A line a figure, but for those by depth."""
    rows = []
    for place, entries in figures.items():
        for name, entry in entries.items() if not place.startswith("after layer") else ():
            cells = [f"{place}: {name}", "-", "", ""]
            if entry["value"] is not None:
                low, high = entry["interval95"]
                cells[1:3] = f"{entry['value']:.3g}", f"{low:.3g} to {high:.3g}"
            if "tokens" in entry:
                cells[3] = f"{entry['p5']:.3g} to {entry['p95']:.3g}"
            rows.append(cells)
    head = ["median; logits, loss: mean", "value", "95 % interval", "5 to 95 % of tokens"]
    return table(head, rows)


def draw(figures: dict[str, Record], file: Path) -> bool:
    """The change of the stream by depth, and the loss above both. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    picture = Figure(figsize=(11, 4), layout="constrained")
    change, loss = picture.subplots(1, 2)
    after = [entries for place, entries in figures.items() if place.startswith("after layer")]
    for name, label in (("update", "adapter - backbone"), ("difference", "both - adapter")):
        shown = {n: e[name] for n, e in enumerate(after) if name in e and e[name]["value"]}
        change.plot(list(shown), [e["value"] for e in shown.values()], "o-", label=label)
        low, high = [e["p5"] for e in shown.values()], [e["p95"] for e in shown.values()]
        change.fill_between(list(shown), low, high, alpha=0.2)
    scale = "log" if any(len(line.get_xdata()) for line in change.lines) else "linear"
    change.set(title="relative change of the stream", xlabel="after layer", yscale=scale)
    change.legend()
    entries = figures["loss above both"]
    for x, entry in enumerate(entries.values()):
        loss.plot([x, x], entry["interval95"], color="C0", linewidth=5, alpha=0.5)
        loss.plot(x, entry["value"], "s", color="C0")
    loss.set_title("loss above both, nats per supervised token")
    loss.set_xticks(range(len(entries)), entries, fontsize=7)
    picture.savefig(file, dpi=100)
    return True


def main(overrides: Record) -> Record:
    """Measure, print the table, write internals.json and internals.png. Raises ValueError."""
    settings = Settings(**overrides)
    device = choose_device(settings.device)
    backbone = settings.backbone or recorded_backbone(settings.adapter) or str(TINY)
    run = read_run(settings.adapter)
    tokenizer = load_tokenizer(backbone, run.get("stop_token", ""))
    model = load_model(backbone, device, choose_dtype(settings.dtype, device))
    load_adapter(model, settings.adapter)
    cut = TrainSettings(max_tokens=settings.max_tokens, step_tokens=1 << 29, truncate=True)
    rows, counts = load_rows([settings.data], tokenizer, cut)
    order = np.random.default_rng([settings.seed, 0]).permutation(len(rows))
    rows = [rows[n] for n in order[: settings.rows or None]]
    if len(rows) < 2:  # nobody else's memory, no interval
        raise ValueError(f"{settings.data}: expected two rows or more, found {len(rows)}")
    found = measure_rows(model, rows, settings.batch_tokens)
    figures = compute_figures(found, settings.resamples, settings.seed)
    result = {**run_header(settings, device), "backbone": backbone, "run_seed": run.get("seed")}
    result["adapter_sha256"] = folder_hash(checkpoint_folder(settings.adapter))
    result |= {"data_sha256": file_hash(settings.data), "counts": counts, "rows": len(rows)}
    result |= {"random_cosine95": 1.96 / model.config.hidden_size**0.5, "figures": figures}
    out = Path(settings.out or Path(settings.adapter, "internals"))
    write_json(out / "internals.json", result)
    is_drawn = draw(figures, out / "internals.png")
    picture = " and internals.png" if is_drawn else "; no picture: matplotlib is not installed"
    print(f"{backbone} + {settings.adapter}: {len(rows)} rows of {settings.data}")
    print(figure_table(figures))
    print(f"random directions: 95 % of the cosines within +-{result['random_cosine95']:.3f}")
    print(f"wrote {out / 'internals.json'}{picture}")
    return result


if __name__ == "__main__":
    run_script(main, Settings, "python -m experiments.internals")
