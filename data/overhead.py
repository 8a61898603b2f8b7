"""`python eval.py overhead`: what adapter and side path cost in time, memory and parameters, timed side by side in one process.

B rows, T tokens, D hidden size, M slots, r width of the side path or rank of the adapter.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval import HERE, OverheadSettings, Record, adapter_sha256, recorded_backbone, table
from model import Cache, ModelConfig, Transformer, atomic, choose_device, choose_dtype, generator, header, load_model, read_json
from talan import AdapterConfig, AdapterLinear, TalanConfig, attach, group_of, load_adapter, merge_adapter
from train import parse_layers

# ---------------------------------------------------------------------------------------------------------------------
# Overhead: what is added, by count
# ---------------------------------------------------------------------------------------------------------------------

def side_flops(config: TalanConfig, D: int) -> dict[str, int]:
    """FLOPs per token of one side path, 2 a multiply-add; M slots of width r. Norms, exp, softmax, sigmoid and divisions are left out.

    compress  2 (2 r D + M r): w_key, w_value, k . slots           memory  2 M (r + 1): num += w v, den += w
    remix     linear 2 (M D + M r), attention 2 (r D + 2 M r), mlp: linear + 8 M^2 r + 8 M r^2
    write     2 r D, gate: + 2 D
    """
    M, r = config.slots, config.width
    remix = 2 * (r * D + 2 * M * r) if config.mixer == "attention" else 2 * (M * D + M * r)
    remix += 8 * M * M * r + 8 * M * r * r if config.mixer == "mlp" else 0
    return {"compress": 2 * (2 * r * D + M * r), "memory": 2 * M * (r + 1), "remix": remix,
            "write": 2 * r * D + (2 * D if config.writeback == "gate" else 0)}


def count(model: Transformer, context: int) -> Record:
    """Parameters and bytes by group, and FLOPs per token, 2 a multiply-add. The model may be on the meta device.

    backbone   2 x weights of its matrices, the head among them; attention at S = context positions: 4 S H Dh L
    adapter    live: sum over projections of 2 r (in + out); merged: none (DoRA's norm, once a call and not a token, is left out)
    side path  sum of side_flops over its layers; state of a row: 4 M (r + 1) bytes a layer, however many tokens; keys and values: a token
    """
    c, talan, groups = model.config, model.talan_config, ("backbone", "adapter", "side path")
    parameters, size = dict.fromkeys(groups, 0), dict.fromkeys(groups, 0)
    for name, p in model.named_parameters():
        parameters[group_of(name)] += p.numel()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        size["adapter" if name.endswith("weight_squared") else group_of(name)] += t.nbytes
    adapted, layers = [m for m in model.modules() if isinstance(m, AdapterLinear)], len(talan.layers) if talan else 0
    matrices = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2 and name.endswith("_proj.weight")] + [model.head_weight]
    size |= {"state of a row": layers * 4 * talan.slots * (talan.width + 1) if talan else 0,
             "keys and values of a token": 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.head_weight.element_size(),
             "merged copy, held here only": sum(m.weight.nbytes for m in adapted)}
    flops = {"backbone": 2 * sum(p.numel() for p in matrices), "attention": 4 * context * c.num_attention_heads * c.head_dim * c.num_hidden_layers,
             "adapter": 2 * sum(m.lora_A.numel() + m.lora_B.numel() for m in adapted),
             "side path": layers * sum(side_flops(talan, c.hidden_size).values()) if talan else 0}
    return {"parameters": parameters, "flops": flops, "bytes": size}


def asked_parts(settings: OverheadSettings) -> tuple[AdapterConfig, TalanConfig]:
    """The adapter and the side path that the flags describe. Raises ValueError."""
    return AdapterConfig(rank=settings.rank), TalanConfig(parse_layers(settings.layers), slots=settings.slots, width=settings.width,
                                                          mixer=settings.mixer, writeback=settings.writeback)


def read_configs(paths: Sequence[str]) -> dict[str, ModelConfig]:
    """Name -> config of each folder, config.json, or file of several under their names (data/shapes.json when none is given). Raises ValueError."""
    configs: dict[str, ModelConfig] = {}
    for path in map(Path, paths or [str(HERE / "data/shapes.json")]):
        file = path / "config.json" if path.is_dir() else path
        raw, own = read_json(file), file.resolve().parent.name if file.name == "config.json" else file.stem
        several = bool(raw) and all(isinstance(value, dict) for value in raw.values())
        for name, value in (raw if several else {own: raw}).items():
            where = f"{file}: {name}" if several else str(file)
            configs[where if name in configs else name] = ModelConfig.from_dict(value, where)
    return configs


def count_config(name: str, config: ModelConfig, settings: OverheadSettings) -> Record:
    """Counts of a model of this config with adapter and side path, on the meta device: no weights are needed. Raises ValueError."""
    with torch.device("meta"):
        model = Transformer(config)
    try:
        attach(model, *asked_parts(settings))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return count(model, settings.context)


def count_table(counts: Mapping[str, Record], context: int) -> str:
    """Parameters and FLOPs per token of each model; what is added also in per cent of the backbone (FLOPs: without attention)."""
    rows = []
    for name, entry in counts.items():
        (base, *added), (work, attention, *more) = entry["parameters"].values(), entry["flops"].values()
        rows.append([name, *(f"{n:,}" for n in (base, *added)), *(f"{100 * n / base:.3f}" for n in (*added, sum(added))),
                     *(f"{n / 1e6:,.1f}" for n in (work, attention)), *(f"{100 * n / work:.3f}" for n in more)])
    return table(["", "parameters", "adapter", "side path", "adapter %", "side path %", "both %", "MFLOPs a token", f"attention at {context:,}",
                  "live adapter %", "side path %"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Overhead: time
# ---------------------------------------------------------------------------------------------------------------------

SIDE = " + side path"


def share(model: Transformer) -> Transformer:
    """A copy of the modules around the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def make_variants(model: Transformer, attach_parts: Callable[[Transformer], Any]) -> dict[str, Transformer]:
    """backbone, merged and live, each without and with the side path, as far as `attach_parts` gives the model an adapter and a side path.

    They share all weights but the adapted matrices of the two merged variants, which have one merged copy in common.
    """
    forms = {"backbone": share(model)}
    attach_parts(model)
    if model.adapter_config.kind != "none":
        forms |= {"merged": share(model), "live": share(model)}
        merge_adapter(forms["merged"])
    variants = {}
    for name, form in forms.items():
        for end in ("", SIDE) if model.talan_config else ("",):
            variants[name + end] = share(form)
            for block, source in zip(variants[name + end].model.layers, model.model.layers):
                block.side_path, block.side_site = source.side_path if end else None, source.side_site
    return variants


def schedule(names: Iterable[str], n: int, rng: random.Random) -> list[list[str]]:
    """Round n: the forms in random order, the two variants of a form together; which of the two is first alternates from round to round."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(name.removesuffix(SIDE), []).append(name)
    return [form[::-1] if n % 2 else form for form in rng.sample(list(forms.values()), len(forms))]


def timed(model: Transformer, tokens: Tensor, cache: Cache, clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds from tokens (B,T) to the logits after them, as in `generate`; on a GPU, whose queue is empty before and after, also the most bytes
    allocated at once."""
    lengths = torch.full((len(tokens),), tokens.shape[1])
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
        torch.cuda.reset_peak_memory_stats(tokens.device)
    start = clock()
    model.logits(model(tokens, cache, lengths)[:, -1])
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return clock() - start, torch.cuda.max_memory_allocated(tokens.device) if tokens.is_cuda else 0


def time_round(variants: Mapping[str, Transformer], order: Sequence[Sequence[str]], tokens: Tensor, steps: int,
               clock: Callable[[], float]) -> Iterator[tuple[str, str, float, int]]:
    """Yield phase, variant, seconds (of the prefill of all tokens (B,T+steps) but the last `steps`; of one step over those) and peak bytes.

    With and without the side path take turns call by call, A B B A, so that a change of the machine's pace meets both alike.
    """
    B, T = len(tokens), tokens.shape[1] - steps
    for form in order:
        caches = {name: Cache(variants[name].config, B, T + steps, tokens.device, variants[name].head_weight.dtype) for name in form}
        for phase, parts in (("prefill", [tokens[:, :T]]), ("decode", tokens[:, T:].split(1, dim=1))):
            calls: dict[str, list[tuple[float, int]]] = {name: [] for name in form}
            for i, part in enumerate(parts):
                for name in form[::-1] if i % 2 else form:
                    calls[name].append(timed(variants[name], part, caches[name], clock))
            for name, each in calls.items():
                yield phase, name, sum(seconds for seconds, _ in each) / len(parts), max(peak for _, peak in each)


def measure_batch(variants: Mapping[str, Transformer], batch: int, settings: OverheadSettings) -> dict[str, dict[str, Record]]:
    """Phase -> variant -> seconds of every round and peak bytes, at this batch size; round 0 warms up and is left out."""
    first, clock = next(iter(variants.values())), time.process_time if settings.clock == "cpu" else time.perf_counter
    rng, draw = random.Random(f"{settings.seed} {batch}"), generator(settings.seed, "overhead", batch)
    tokens = torch.randint(first.config.vocab_size, (batch, settings.prompt + settings.steps), generator=draw).to(first.head_weight.device)
    lines: dict[str, dict[str, Record]] = {phase: {name: {"seconds": [], "peak_bytes": 0} for name in variants} for phase in ("prefill", "decode")}
    began, bar = time.perf_counter(), tqdm(itertools.count(), desc=f"batch {batch}", unit="round", disable=None)
    with torch.no_grad():
        for n in itertools.takewhile(lambda n: n <= settings.repeats or time.perf_counter() - began < settings.seconds, bar):
            for phase, name, seconds, peak in time_round(variants, schedule(variants, n, rng), tokens, settings.steps, clock):
                if n:
                    lines[phase][name]["seconds"].append(seconds)
                    lines[phase][name]["peak_bytes"] = max(peak, lines[phase][name]["peak_bytes"])
    bar.close()
    return lines


def paired_ratio(times: Sequence[float], base: Sequence[float], settings: OverheadSettings) -> Record:
    """Median over rounds n of times_n / base_n, and the 95 % percentile interval of its bootstrap over rounds."""
    ratios = np.divide(times, base)
    draws = np.random.default_rng(settings.seed).integers(len(ratios), size=(settings.resamples, len(ratios)))
    return {"ratio": float(np.median(ratios)), "interval95": np.percentile(np.median(ratios[draws], 1), [2.5, 97.5]).tolist()}


def add_ratios(lines: Mapping[str, Record], settings: OverheadSettings) -> None:
    """Add to each variant its median, its ratio to the bare backbone and, with a side path, to the same variant without it."""
    for name, line in lines.items():
        line["median_seconds"] = float(np.median(line["seconds"]))
        for key, base in (("to_backbone", "backbone"), ("to_without_side_path", name.removesuffix(SIDE))):
            line[key] = paired_ratio(line["seconds"], lines[base]["seconds"], settings) if base != name and base in lines else None


def overhead_table(result: Record) -> str:
    """A line a batch size, phase and variant, then what is added in memory, and the notes."""
    show = lambda r: f"{r['ratio']:.3f} ({r['interval95'][0]:.3f} to {r['interval95'][1]:.3f})" if r else ""
    lines = [(f"{phase} {batch} x {result['settings']['prompt'] if phase == 'prefill' else 1}", name, line)
             for batch, phases in result["times"].items() for phase, lines in phases.items() for name, line in lines.items()]
    gpu = any(line["peak_bytes"] for _, _, line in lines)
    rows = [[what, name, f"{1e3 * line['median_seconds']:.2f}", len(line["seconds"]), show(line["to_backbone"]), show(line["to_without_side_path"]),
             *([f"{line['peak_bytes'] / 2**20:,.1f}"] if gpu else [])] for what, name, line in lines]
    head = ["rows x tokens", "variant", "median ms", "rounds", "time / backbone", "time / without side path"] + ["peak MiB"] * gpu
    size = ", ".join(f"{name} {n:,}" for name, n in result["counts"]["bytes"].items())
    return "\n".join([table(head, rows), f"bytes: {size}", *result["notes"]])


def overhead(settings: OverheadSettings) -> Record:
    """Time the variants, or only count for --configs; prints the tables, writes overhead.json, returns what it holds. Raises ValueError."""
    if settings.configs != ("none",):
        counts = {name: count_config(name, config, settings) for name, config in read_configs(settings.configs).items()}
        print(count_table(counts, settings.context))
        return write_overhead(settings.out, {"settings": asdict(settings), "configs": counts})

    device, backbone = choose_device(settings.device), settings.backbone or recorded_backbone(settings.adapter)
    if device.type != "cpu" and settings.clock == "cpu":
        raise ValueError(f"clock: cpu would leave out what {device} does; expected wall")
    parts = asked_parts(settings)
    model = load_model(backbone, device, choose_dtype(settings.dtype, device))
    variants = make_variants(model, lambda m: load_adapter(m, settings.adapter) if settings.adapter else attach(m, *parts, seed=settings.seed))
    variants = {name: variant for name, variant in variants.items() if name.removesuffix(SIDE) in settings.forms}
    if not variants:
        raise ValueError(f"forms: {', '.join(settings.forms)}: there is no adapter in {settings.adapter}")
    counts, what = count(model, settings.context), settings.adapter or "a fresh adapter and side path"
    print(f"{backbone} + {what} on {device} in {model.head_weight.dtype}", count_table({"": counts}, settings.context), sep="\n", flush=True)
    times = {batch: measure_batch(variants, batch, settings) for batch in settings.batches}
    for phases in times.values():
        for lines in phases.values():
            add_ratios(lines, settings)
    notes = ["ratios: median over rounds of both times in the same round; in brackets its 95 % bootstrap interval over rounds",
             f"seconds: {'of this process on all CPUs together' if settings.clock == 'cpu' else 'wall clock'}"]
    notes += ["no adapter: nothing to merge or to keep live"] * (model.adapter_config.kind == "none") + ["no side path"] * (not model.talan_config)
    result = {**header(asdict(settings), device), "backbone": backbone, "fingerprint": model.fingerprint, "counts": counts, "times": times,
              "adapter_sha256": adapter_sha256(settings.adapter), "dtype": str(model.head_weight.dtype).removeprefix("torch."), "notes": notes}
    print(overhead_table(result))
    return write_overhead(settings.out or (str(Path(settings.adapter) / "overhead") if settings.adapter else "runs/overhead"), result)


def write_overhead(out: str, result: Record) -> Record:
    """overhead.json in this folder, complete or as it was, nothing without one; returns the result."""
    if out:
        with atomic(Path(out) / "overhead.json") as tmp:
            tmp.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {Path(out) / 'overhead.json'}")
    return result
