"""`python eval.py internals`: what adapter and side path do to the residual stream, measured on one run.

Four forward passes over the same tokens (backbone; + adapter; + side path; + both), then both with other memories.
B rows, T tokens, D hidden size, M slots, r width, V vocabulary; S rows in all, R resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from data.figures import draw_internals
from eval import HERE, InternalsSettings, Record, adapter_sha256, draw_counts, log_probs, recorded_backbone, run_seed, sha256, table
from model import Tokenizer, Transformer, atomic, choose_device, choose_dtype, header, load_model, load_tokenizer
from talan import CHUNK, SidePath, load_adapter, rms, switched
from train import Batch, Row, encode_row, make_batch, pack, read_rows

# ---------------------------------------------------------------------------------------------------------------------
# Internals: forward passes
# ---------------------------------------------------------------------------------------------------------------------

Memory = tuple["Tensor", "Tensor", "Tensor", "Tensor"]  # w (B,T,M), v (B,T,r), num (B,M,r), den (B,M), see Reading


class Reading(NamedTuple):
    """What a side path did with the stream h at its place: all it wrote (tensors; None where it was off) and what that came from, in float32.

    z_t = (num + sum_{u<=t} w_u v_u) / (den + sum_{u<=t} w_u), w = exp(e), num = den = 0: its own memory (README, "The side path").
    """
    h: Tensor  # (B,T,D), before the side path
    after: Any = None  # (B,T,D) h' = h + delta, in h's dtype: in bfloat16, what of delta is below h's 8 bits is lost here
    delta: Any = None  # (B,T,D), not rounded
    weights: Any = None  # (B,T,M) a_t: how each token reads the slots
    strength: Any = None  # (B,T) the gate, or the bound's factor
    sums: Any = None  # w (B,T,M), v (B,T,r)
    total: Any = None  # (M,r) sum of z over the real tokens, float64


class Pass(NamedTuple):
    """One forward pass: the stream after each block, the final hidden states (B,T,D), and the side paths' readings by layer."""
    streams: list[Tensor]
    hidden: Tensor
    readings: dict[int, Reading]


def read_parts(side: SidePath, h: Tensor, lengths: Tensor, memory: Memory | None = None) -> Reading:
    """SidePath.forward, step by step; with `memory`, its z in place of the sequence's own."""
    stream = h.float()
    x, (B, T, _), (M, r) = rms(stream), h.shape, side.slots.shape
    w, v, num, den = memory or (*side.compress(x, lengths), x.new_zeros(B, M, r), x.new_zeros(B, M))
    real = (torch.arange(T) < lengths[:, None]).to(x)  # (B,T)
    ys, weights, total = [], [], torch.zeros(M, r, dtype=torch.float64, device=x.device)
    for xs, ws, vs, some in zip(*(part.split(CHUNK, 1) for part in (x, w, v, real))):
        z, num, den = side.remember(ws, vs, num, den)  # (B,C,M,r)
        ys.append(side.remix(z, xs))
        weights.append(side.attend(z, xs))
        total += torch.einsum("bcmr,bc->mr", z, some)
    y = torch.cat(ys, 1)  # (B,T,r)
    delta = side.write(y, x, stream)
    strength = None if side.config.writeback == "add" else side.strength(y @ side.w_out.T, x, stream)[..., 0]
    return Reading(h, (stream + delta).to(h.dtype), delta, torch.cat(weights, 1), strength, (w, v), total)


def run_pass(model: Transformer, tokens: Tensor, lengths: Tensor, adapter: bool, side: bool, memory: Mapping[int, Memory] | None = None) -> Pass:
    """tokens (B,T) through the model with its adapter and its side paths on or off, these with their own memory or that given by layer."""
    readings: dict[int, Reading] = {}

    def instead(layer: int, side_path: SidePath, h: Tensor, lengths: Any) -> Tensor:
        readings[layer] = read_parts(side_path, h, lengths, memory[layer] if memory else None) if side else Reading(h, h)
        return readings[layer].after

    with torch.no_grad(), switched(model, adapter, instead):
        h, ctx, streams = model.model.embed_tokens(tokens), model.context(tokens, None, lengths), []
        for block in model.model.layers:
            streams.append(h := block(h, ctx))
        return Pass(streams, model.model.norm(h), readings)


# ---------------------------------------------------------------------------------------------------------------------
# Internals: what is measured of each token and row
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Found:
    """What the passes over S rows left behind. A row's tokens are those that training feeds: all but its last, which predicts nothing."""
    sizes: np.ndarray  # (S,) supervised tokens
    nll: dict[str, np.ndarray]  # pass -> (S,) cross-entropy summed over them
    owner: list[np.ndarray]  # each token's row
    tokens: dict[tuple[str, int], list[np.ndarray]]  # (quantity, layer) -> one value a token, in owner's order; nan: left out
    sums: dict[int, dict[int, tuple[Tensor, Tensor]]]  # layer -> row -> w (T,M), v (T,r), of which any other memory is made
    total: dict[int, Tensor]  # layer -> (M,r) sum of z over all tokens
    read: dict[int, Tensor]  # layer -> (M,) sum of the slot weights over all tokens


def compare_streams(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """||a - b|| / ||b|| and ||a - b|| of each token (B,T), in float32. In bfloat16 two passes also differ by what each rounds, which layer by
    layer comes to more than a small perturbation: its growth is then that of the rounding, and so is most of the KL."""
    norm = (a.float() - b.float()).norm(dim=-1)
    return norm / b.float().norm(dim=-1), norm


def insertion_values(update: Tensor, one: Reading, writeback: str) -> dict[str, Tensor]:
    """Of each token (B,T), u the adapter's update (B,T,D) of the stream where the side path adds delta:

    ratio = ||u|| / ||delta||     cosine = u . delta / (||u|| ||delta||)     in band: |cosine| < 1.96 / sqrt(D); nan where u or delta is 0
    size = ||delta|| / ||h||      rounding = ||(h' - h) - delta|| / ||delta||, what the stream's dtype makes of delta
    entropy = -sum_m a_m log a_m  slots read = exp(entropy), from 1 to M
    gate = sigmoid(w_gate . x + b_gate)      bound factor = min(1, bound ||h|| / ||d||)     bound active = factor < 1
    """
    h, delta, a, D = one.h.float(), one.delta, one.weights, update.shape[-1]
    u, d = update.norm(dim=-1), delta.norm(dim=-1)
    both = lambda x: torch.where((u > 0) & (d > 0), x, math.nan)
    cosine = both((update * delta).sum(-1) / (u * d))
    entropy = torch.special.entr(a).sum(-1)
    values = {"ratio": both(u / d), "cosine": cosine, "in band": both((cosine.abs() < 1.96 / math.sqrt(D)).float()), "size": d / h.norm(dim=-1),
              "rounding": torch.where(d > 0, (one.after.float() - h - delta).norm(dim=-1) / d, math.nan), "entropy": entropy,
              "slots read": entropy.exp()}
    if writeback == "gate":
        values["gate"] = one.strength
    if writeback == "bounded":
        values |= {"bound factor": one.strength, "bound active": (one.strength < 1).float()}
    return values


def logit_change(model: Transformer, before: Tensor, after: Tensor, tokens: int = 128) -> dict[str, Tensor]:
    """Of hidden states (B,T,D), each (B,T): kl = sum_v p_v (log p_v - log q_v) in nats, p before and q after, summed in float64; changed:
    is the arg max another?"""
    parts = []
    for hidden in zip(before.flatten(0, 1).split(tokens), after.flatten(0, 1).split(tokens)):
        p, q = (model.logits(h).double().log_softmax(-1) for h in hidden)  # (tokens,V)
        parts.append(torch.stack([(p.exp() * (p - q)).sum(-1), (p.argmax(-1) != q.argmax(-1)).double()]))
    return dict(zip(("kl", "changed"), torch.cat(parts, 1).view(2, *before.shape[:2])))


def row_nll(model: Transformer, hidden: Tensor, batch: Batch) -> np.ndarray:
    """Cross-entropy of each row (B,), summed over its supervised tokens, whose labels are those of training."""
    loss = -log_probs(model, hidden.flatten(0, 1)[batch.places], batch.targets).double().numpy()  # (N,)
    return np.bincount((batch.places // hidden.shape[1]).cpu().numpy(), loss, len(hidden))


def observe(model: Transformer, group: Sequence[int], batch: Batch, lengths: Tensor, found: Found) -> None:
    """The four passes over one batch, the rows whose numbers are in `group`; at an insertion, the adapter's update is between those two
    passes in which every side path is off."""
    real = (torch.arange(batch.tokens.shape[1]) < lengths[:, None]).to(batch.tokens.device)  # (B,T)

    def run(name: str, adapter: bool, side: bool) -> Pass:
        one = run_pass(model, batch.tokens, lengths, adapter, side)
        found.nll[name][group] = row_nll(model, one.hidden, batch)
        return one

    def put(layer: int, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            found.tokens.setdefault((name, layer), []).append(value[real].double().cpu().numpy())

    found.owner.append(np.repeat(group, lengths))
    found.sizes[group] = np.bincount((batch.places // batch.tokens.shape[1]).cpu().numpy(), minlength=len(group))
    run("side path", False, True)
    base, adapted = run("backbone", False, False), run("adapter", True, False)
    for layer, (a, b) in enumerate(zip(adapted.streams, base.streams)):
        put(layer, {"update": compare_streams(a, b)[0]})
    base.streams.clear()
    both = run("both", True, True)
    for layer in range(min(both.readings, default=len(both.streams)), len(both.streams)):
        put(layer, dict(zip(("difference", "difference norm"), compare_streams(both.streams[layer], adapted.streams[layer]))))
    for layer, one in both.readings.items():
        update = adapted.readings[layer].h.float() - base.readings[layer].h.float()  # (B,T,D)
        put(layer, insertion_values(update, one, model.talan_config.writeback))
        keep_memory(found, layer, one, group, lengths, real)
    if both.readings:
        put(-1, logit_change(model, adapted.hidden, both.hidden))


def keep_memory(found: Found, layer: int, one: Reading, group: Sequence[int], lengths: Tensor, real: Tensor) -> None:
    """What the passes with another memory need of this batch, on the CPU, and its share of the sums over all tokens."""
    for b, (n, length) in enumerate(zip(group, lengths.tolist())):
        found.sums.setdefault(layer, {})[n] = tuple(part[b, :length].cpu() for part in one.sums)
    found.total[layer] = found.total.get(layer, 0) + one.total.cpu()
    found.read[layer] = found.read.get(layer, 0) + one.weights[real].double().sum(0).cpu()


def partners(rows: int, seed: int) -> np.ndarray:
    """(S,) whose memory each row gets: the next one's on a circle through all rows, in random order, so never its own (S > 1)."""
    circle, out = np.random.default_rng([seed, 1]).permutation(rows), np.empty(rows, int)
    out[circle] = np.roll(circle, -1)
    return out


def swapped_memory(found: Found, layer: int, others: Sequence[int], width: int) -> Memory:
    """At every position t the memory z_t of the row named in `others` (B,); after its end its last: w = 0 adds nothing to its sums."""
    w, v = (torch.stack([pad(part[:width], (0, 0, 0, max(0, width - len(part)))) for part in parts])  # (B,T,M), (B,T,r)
            for parts in zip(*(found.sums[layer][n] for n in others)))
    return w, v, w.new_zeros(len(others), w.shape[2], v.shape[2]), w.new_zeros(len(others), w.shape[2])


def mean_memory(found: Found, layer: int, rows: int, width: int) -> Memory:
    """The mean of z over all tokens of all rows, at every position: num = mean z, den = 1, and no token adds to them."""
    z = found.total[layer].float() / sum(map(len, found.owner))  # (M,r)
    return z.new_zeros(rows, width, len(z)), z.new_zeros(rows, width, z.shape[1]), z.expand(rows, -1, -1), z.new_ones(rows, len(z))


def ablate(model: Transformer, group: Sequence[int], batch: Batch, lengths: Tensor, found: Found, other: np.ndarray) -> None:
    """Adapter and side paths, these with the memory of another row or with the mean one: cross-entropy of each row of one batch."""
    (B, T), device = batch.tokens.shape, batch.tokens.device
    for name, memory in (("swapped memory", lambda layer: swapped_memory(found, layer, other[group].tolist(), T)),
                         ("mean memory", lambda layer: mean_memory(found, layer, B, T))):
        if name in found.nll:
            by_layer: Any = {layer: tuple(part.to(device) for part in memory(layer)) for layer in found.sums}
            found.nll[name][group] = row_nll(model, run_pass(model, batch.tokens, lengths, True, True, by_layer).hidden, batch)


def measure_rows(model: Transformer, rows: Sequence[Row], settings: InternalsSettings) -> Found:
    """All passes over all rows, in batches of about equal lengths; the model is left as it was."""
    names = ["backbone", "adapter", "side path", "both"]
    if model.talan_config:
        names += ["swapped memory"] * (len(rows) > 1) + ["mean memory"]
    found = Found(np.zeros(len(rows)), {name: np.zeros(len(rows)) for name in names}, [], {}, {}, {}, {})
    groups = pack(sorted(range(len(rows)), key=lambda n: len(rows[n].ids)), [len(row.ids) for row in rows], settings.batch_tokens)
    batches = [(group, make_batch([rows[n] for n in group], model.head_weight.device), torch.tensor([len(rows[n].ids) - 1 for n in group]))
               for group in groups]
    other, training = partners(len(rows), settings.seed), model.training
    model.eval()
    for group, batch, lengths in tqdm(batches, desc="four passes", unit="batch", disable=None):
        observe(model, group, batch, lengths, found)
    for group, batch, lengths in tqdm(batches if found.sums else [], desc="other memories", unit="batch", disable=None):
        ablate(model, group, batch, lengths, found, other)
    model.train(training)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Internals: statistics
# ---------------------------------------------------------------------------------------------------------------------

def draw_medians(values: np.ndarray, owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) median of the pooled tokens of each resample; values, owner (N,): a token's row; counts (R,S): how often each row was drawn.

    Exact, without pooling: the sorted tokens are cut into about sqrt(N) cells, the drawn rows' tokens are counted cell by cell up to the
    one with the middle token, and token by token within that. nan where the rows drawn have no token.
    """
    order, cell, rows = np.argsort(values), math.isqrt(len(values)) + 1, counts.shape[1]
    cells = np.append(owner[order], np.full(-len(values) % cell, rows)).reshape(-1, cell)  # (cells, cell), the rest: a row never drawn
    counts = np.pad(counts, ((0, 0), (0, 1)))
    ends = (counts @ np.array([np.bincount(one, minlength=rows + 1) for one in cells]).T).cumsum(1)  # (R,cells) tokens up to each cell's end
    total, middle = ends[:, -1:], []
    for k in (total - 1) // 2, total // 2:  # (R,1); the same one when their number is odd
        which = np.minimum((ends <= k).sum(1), len(cells) - 1)
        before = np.take_along_axis(np.pad(ends, ((0, 0), (1, 0))), which[:, None], 1)
        passed = before + np.take_along_axis(counts, cells[which], 1).cumsum(1) > k  # (R,cell)
        middle.append(values[order[np.minimum(which * cell + passed.argmax(1), len(order) - 1)]])
    return np.where(total[:, 0] > 0, (middle[0] + middle[1]) / 2, np.nan)


def draw_means(sums: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) sum of the drawn rows' sums / sum of their sizes; nan where the rows drawn have no token."""
    with np.errstate(invalid="ignore"):
        return (counts @ sums) / (counts @ sizes)


def figure(name: str, value: float | None, draws: np.ndarray) -> Record:
    """A number and the 95 % percentile interval of its bootstrap draws, of which those without a value are left out."""
    draws = draws[np.isfinite(draws)]
    if value is None or not len(draws):
        return {name: None}
    return {name: float(value), f"{name}_interval95": np.percentile(draws, (2.5, 97.5)).tolist()}


def spread(values: np.ndarray, owner: np.ndarray, counts: np.ndarray) -> Record:
    """Over the n tokens that are not nan: median and mean with their intervals over rows, and the 5 and 95 % points of the tokens."""
    kept = ~np.isnan(values)
    n, values, owner = int(kept.sum()), values[kept], owner[kept]
    if not n:
        return {"n": 0, "left_out": len(kept)}
    low, median, high = np.percentile(values, [5, 50, 95]).tolist()
    sums, sizes = (np.bincount(owner, weights, counts.shape[1]) for weights in (values, None))
    return {"n": n, "left_out": len(kept) - n, **figure("median", median, draw_medians(values, owner, counts)), "p5": low, "p95": high,
            **figure("mean", values.mean(), draw_means(sums, sizes, counts))}


def losses(found: Found, counts: np.ndarray) -> Record:
    """L = sum of cross-entropies / supervised tokens, of each pass; improvement = L_backbone - L_both; of it is lost, without the side path
    (off) or with another memory x:  nats = L_x - L_both,  share = nats / improvement, None unless improvement's interval lies above 0."""
    nats = lambda nll: figure("nats", nll.sum() / found.sizes.sum(), draw_means(nll, found.sizes, counts))
    gain = found.nll["backbone"] - found.nll["both"]
    improvement, lost = nats(gain), {}
    for name, key in {"off": "adapter", "swapped memory": "swapped memory", "mean memory": "mean memory"}.items() if found.sums else ():
        if key in found.nll:
            gap, sure = found.nll[key] - found.nll["both"], improvement["nats_interval95"][0] > 0
            lost[name] = nats(gap) | figure("share", gap.sum() / gain.sum() if sure else None, draw_means(gap, gain, counts) if sure else gap)
    return {"loss": {name: nats(nll) for name, nll in found.nll.items()}, "improvement": improvement, "lost": lost}


def internals_statistics(model: Transformer, found: Found, settings: InternalsSettings) -> Record:
    """Everything in numbers: by insertion, by depth, logits, losses. By depth, of the stream after each block: the adapter's update
    ||h_adapter - h_backbone|| / ||h_backbone|| and, from the first insertion on, the difference ||h_both - h_adapter|| / ||h_adapter|| and
    its norm; growth: its median after the last block / after the first insertion's. slot_weights: the mean of a_m over all tokens;
    slots_used: exp of the entropy of these, so slots in use over the data if not by one token."""
    owner, depth, D = np.concatenate(found.owner), model.config.num_hidden_layers, model.config.hidden_size
    counts = draw_counts(np.random.default_rng([settings.seed, 2]), settings.resamples, len(found.sizes))
    tokens = {key: np.concatenate(parts) for key, parts in found.tokens.items()}
    every: dict[int, Record] = {layer: {} for layer in range(-1, depth)}  # -1: the logits
    for (name, layer), values in tokens.items():
        every[layer][name] = spread(values, owner, counts)
    stream, insertions, grown = ("update", "difference", "difference norm"), {}, {}
    for layer in sorted(found.sums):
        mean = (found.read[layer] / len(owner)).numpy()  # (M,)
        insertions[str(layer)] = {name: entry for name, entry in every[layer].items() if name not in stream} | {
            "slot_weights": mean.tolist(), "slots_used": float(np.exp(-(mean * np.log(np.maximum(mean, 1e-300))).sum()))}
    for name in stream[1:] if insertions else ():
        first, last = (tokens[name, layer] for layer in (min(found.sums), depth - 1))
        factor = np.median(last) / np.median(first) if np.median(first) > 0 else None
        with np.errstate(invalid="ignore", divide="ignore"):
            grown[name] = figure("factor", factor, draw_medians(last, owner, counts) / draw_medians(first, owner, counts))
    return {"tokens": len(owner), "supervised": int(found.sizes.sum()), "hidden_size": D,
            "random_cosine": {"mean": 0.0, "sd": 1 / math.sqrt(D), "band95": 1.96 / math.sqrt(D)}, "insertions": insertions,
            "depth": [{"layer": layer, **{name: every[layer][name] for name in stream if name in every[layer]}} for layer in range(depth)],
            "growth": grown, "logits": every[-1], **losses(found, counts)}


# ---------------------------------------------------------------------------------------------------------------------
# Internals: table and picture
# ---------------------------------------------------------------------------------------------------------------------

LINES = {  # at an insertion: what is shown of which figure, times what
    "ratio": ("adapter update / perturbation", "median", 1), "cosine": ("cosine of the two", "median", 1),
    "in band": ("% of cosines in the random band", "mean", 100), "size": ("perturbation / stream", "median", 1),
    "rounding": ("rounding / perturbation", "median", 1), "slots read": ("slots that a token reads", "median", 1), "gate": ("gate", "median", 1),
    "bound factor": ("bound's factor", "median", 1), "bound active": ("% of tokens with the bound active", "mean", 100)}


def internals_table(result: Record) -> str:
    """Insertions, depth, logits, cross-entropies and what is lost: one line a figure, then the notes."""
    pair = lambda low, high, scale=1: f"{scale * low:.3g} to {scale * high:.3g}"

    def row(text: str, entry: Record, name: str = "median", scale: float = 1) -> list[str]:
        """Cells of one line; without a value, a dash."""
        if entry.get(name) is None:
            return [text, "-", "", ""]
        tokens, (low, high) = pair(entry["p5"], entry["p95"]) if name == "median" else "", entry[f"{name}_interval95"]
        return [text, f"{scale * entry[name]:.3g}", pair(low, high, scale), tokens]

    rows = [row(f"layer {layer}: {LINES[name][0]}", entry[name], *LINES[name][1:]) for layer, entry in result["insertions"].items()
            for name in LINES if name in entry]
    rows += [row(f"after layer {e['layer']}: (both - adapter) / adapter", e["difference"]) for e in result["depth"] if "difference" in e]
    rows += [row(f"growth of this from first to last: {name}", entry, "factor") for name, entry in result["growth"].items()]
    rows.append(row("after the last layer: (adapter - backbone) / backbone", result["depth"][-1]["update"]))
    if result["logits"]:
        rows += [row("logits: KL(adapter || both), nats", result["logits"]["kl"]),
                 row("logits: % of tokens with another arg max", result["logits"]["changed"], "mean", 100)]
    rows += [row(f"cross-entropy: {name}", entry, "nats") for name, entry in result["loss"].items()]
    rows.append(row("improvement: backbone - both", result["improvement"], "nats"))
    for name, entry in result["lost"].items():
        text = f"lost: {'side path off' if name == 'off' else name}"
        rows += [row(text, entry, "nats"), row(f"{text}, % of the improvement", entry, "share", 100)]
    return "\n".join([table(["median, mean % or nats a token", "value", "95 % interval", "5 to 95 % of tokens"], rows), *result["notes"]])


def internals_notes(result: Record, adapter: bool) -> list[str]:
    """How to read the table, and what could not be measured."""
    left, band = sum(entry["ratio"]["left_out"] for entry in result["insertions"].values()), result["random_cosine"]["band95"]
    return [text for text, holds in (
        (f"random directions in {result['hidden_size']} dimensions: cosine 0, 95 % within +-{band:.3f}", result["insertions"]),
        (f"ratio and cosine: {left:,} tokens left out, their update or their perturbation is exactly 0", left),
        ("no adapter: its update is 0, so there is no ratio and no cosine", not adapter),
        ("no side path: no perturbation, no memory, nothing lost without it", not result["insertions"]),
        (f"{result['dtype']}: differences between passes hold its rounding; measure them in float32", result["dtype"] != "float32"),
        ("one row: no other row's memory to swap in", result["insertions"] and "swapped memory" not in result["lost"]),
        ("improvement: its interval is not above 0, so shares of it would mean nothing", result["improvement"]["nats_interval95"][0] <= 0)) if holds]


# ---------------------------------------------------------------------------------------------------------------------
# Internals: the command
# ---------------------------------------------------------------------------------------------------------------------

def draw_rows(file: Path, tokenizer: Tokenizer, settings: InternalsSettings) -> tuple[list[Row], dict[str, int]]:
    """Labelled rows of a file, drawn with --seed and cut to --max-tokens, and counts: of the file, cut, unlabelled. Raises ValueError."""
    every = list(read_rows(file))
    rows: list[Row] = []
    counts = {"in_file": len(every), "cut": 0, "unlabelled": 0}
    for n in np.random.default_rng([settings.seed, 0]).permutation(len(every)):
        if settings.rows and len(rows) == settings.rows:
            break
        where, messages = every[n]
        try:
            row = encode_row(tokenizer, messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        short = Row(row.ids[:settings.max_tokens], row.supervised[:settings.max_tokens])
        labelled = any(short.supervised[1:])
        counts["cut"] += labelled and len(short.ids) < len(row.ids)
        counts["unlabelled"] += not labelled
        rows += [short] * labelled
    if not rows:
        raise ValueError(f"{file}: no row with a supervised token within --max-tokens {settings.max_tokens}; counts: {counts}")
    return rows, counts


def internals(settings: InternalsSettings) -> Record:
    """Four passes over the same tokens (backbone; + adapter; + side path; + both), then both with other memories; prints the tables, writes
    internals.json and internals.png, returns what the JSON holds. Raises ValueError."""
    backbone, embedded = settings.backbone or recorded_backbone(settings.adapter), HERE / "data/tiny/model"
    if not settings.data and Path(backbone).resolve() != embedded.resolve():
        raise ValueError(f"data: name a JSONL file of rows; {backbone} is not the embedded backbone, whose rows would be the default")
    file, device = Path(settings.data or HERE / "data/tiny/dev.jsonl"), choose_device(settings.device)
    model, tokenizer = load_model(backbone, device, choose_dtype(settings.dtype, device)), load_tokenizer(backbone)
    load_adapter(model, settings.adapter)
    rows, counts = draw_rows(file, tokenizer, settings)
    result = internals_statistics(model, measure_rows(model, rows, settings), settings)
    result = {**header(asdict(settings), device), "backbone": backbone, "fingerprint": model.fingerprint, "run_seed": run_seed(settings.adapter),
              "adapter_sha256": adapter_sha256(settings.adapter), "dtype": str(model.head_weight.dtype).removeprefix("torch."), "data": str(file),
              "data_sha256": sha256(file.read_bytes()), "rows": {"used": len(rows), **counts}, **result}
    result["notes"] = internals_notes(result, model.adapter_config.kind != "none")
    out = Path(settings.out or Path(settings.adapter, "internals"))
    with atomic(out / "internals.json") as tmp:
        tmp.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    (out / "internals.png").unlink(missing_ok=True)  # of an earlier look
    picture = " and internals.png" if draw_internals(result, out / "internals.png") else "; no picture: matplotlib is not installed"
    print(f"{backbone} + {settings.adapter}: {len(rows)} rows, {result['tokens']:,} tokens, {result['supervised']:,} supervised\n"
          f"{internals_table(result)}\nwrote {out / 'internals.json'}{picture}")
    return result
