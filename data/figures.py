"""Pictures of what eval.py computes, from the dictionaries that it writes as JSON. matplotlib is optional: False without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def shown(result: Record) -> Record:
    """The tasks and, when there are several, their pooled lines."""
    return result["tasks"] | (result["pooled"] if len(result["tasks"]) > 1 else {})


def draw_comparison(result: Record, file: Path) -> bool:
    """A forest plot: each difference with its interval, a grey dot a seed. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    entries, tasks = shown(result), len(result["tasks"])
    panels = {"points": [next(iter(entry["rules"].values())) for entry in entries.values()]}
    if any(entry["reference"] for entry in entries.values()):
        panels["nats per token of the reference solution"] = [entry["reference"] for entry in entries.values()]
    figure = Figure(figsize=(2 + 4 * len(panels), 1.4 + 0.45 * len(entries)), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        axis.axvline(0, color="0.6", linewidth=1)
        for y, line in enumerate(lines):
            if line:
                axis.plot(line["by_seed"], [y + 0.2] * len(line["by_seed"]), "o", color="0.7", markersize=3)
                axis.plot(line["interval95"], [y, y], color="C0" if y < tasks else "k", linewidth=2)
                axis.plot(line["difference"], y, "s", color="C0" if y < tasks else "k", markersize=6)
        axis.set(xlabel=title, ylim=(len(entries) - 0.5, -0.5))
        axis.set_yticks(range(len(entries)), [f"{name}\nn = {line['n']}" for name, line in zip(entries, panels["points"])], fontsize=8)
        axis.locator_params(axis="x", nbins=5)
    figure.suptitle(f"candidate - baseline, 95 % intervals, seeds: {len(result['seeds'])} (dots)", fontsize=10)
    figure.savefig(file, dpi=150)
    return True


def draw_points(axis: Any, entries: Mapping[str, Record], name: str, title: str) -> None:
    """Of each entry: the number, its interval (thick) and, where it has them, the 5 and 95 % points of the tokens (thin)."""
    axis.set_title(title, fontsize=9)
    axis.set(xticks=range(len(entries)), xlim=(-0.5, max(len(entries), 1) - 0.5))
    axis.set_xticklabels(list(entries), fontsize=8)
    for x, entry in enumerate(entries.values()):
        if name in entry:
            axis.plot([x, x], [entry.get("p5", entry[name]), entry.get("p95", entry[name])], color="0.6", linewidth=1)
            axis.plot([x, x], entry[f"{name}_interval95"], color="C0", linewidth=5, alpha=0.5, solid_capstyle="butt")
            axis.plot(x, entry[name], "s", color="C0", markersize=4)


def draw_depth(axis: Any, depth: Sequence[Record]) -> None:
    """The adapter's update and what the side path adds to it, relative to the stream; bands: 5 to 95 % of the tokens."""
    axis.set_title("(c) change of the stream after each layer", fontsize=9)
    for name, label in (("update", "(adapter - backbone) / backbone"), ("difference", "(both - adapter) / adapter")):
        if lines := [entry for entry in depth if name in entry and entry[name]["median"] > 0]:
            layers, medians = [entry["layer"] for entry in lines], [entry[name]["median"] for entry in lines]
            axis.plot(layers, medians, "o-", markersize=3, label=label)
            axis.fill_between(layers, *([max(entry[name][p], min(medians) / 100) for entry in lines] for p in ("p5", "p95")), alpha=0.2)
            axis.set_yscale("log")
            axis.legend(fontsize=7)


def draw_internals(result: Record, file: Path) -> bool:
    """Five panels. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    picture, places, band = Figure(figsize=(20, 4), layout="constrained"), result["insertions"], result["random_cosine"]["band95"]
    ratio, cosine, depth, slots, lost = picture.subplots(1, 5)
    draw_points(ratio, {f"layer {layer}": entry["ratio"] for layer, entry in places.items()}, "median", "(a) adapter update / perturbation")
    if ratio.lines:
        ratio.set_yscale("log")
    draw_points(cosine, {f"layer {layer}": entry["cosine"] for layer, entry in places.items()}, "median", "(b) their cosine; grey: random directions")
    cosine.axhspan(-band, band, color="0.85", zorder=0)
    draw_depth(depth, result["depth"])
    slots.set_title("(d) mean weight of each memory slot", fontsize=9)
    for n, (layer, entry) in enumerate(places.items()):
        weights, gate = entry["slot_weights"], f", gate {entry['gate']['median']:.2g}" if "gate" in entry else ""
        slots.bar(np.arange(len(weights)) + 0.8 * (n + 0.5) / len(places) - 0.4, weights, 0.8 / len(places),
                  label=f"layer {layer}: {entry['slots read']['median']:.2g} of {len(weights)} read{gate}")
        slots.legend(fontsize=7)
        slots.margins(y=0.2)
    shares = {name: f"\n{100 * entry['share']:.2g} %" if entry["share"] is not None else "" for name, entry in result["lost"].items()}
    draw_points(lost, {name + shares[name]: entry for name, entry in result["lost"].items()}, "nats",
                f"(e) lost of an improvement of {result['improvement']['nats']:.3g} nats a token")
    lost.axhline(0, color="0.6", linewidth=1, zorder=0)
    picture.savefig(file, dpi=100)
    return True
