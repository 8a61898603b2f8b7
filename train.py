"""Fine-tune an adapter and a TALAN side path on conversations: python train.py --help.

rows -> ids and labels -> steps of micro-batches -> the loop -> checkpoints -> scores.

Shapes: B rows, T tokens, N supervised tokens of a micro-batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common import ROOT, Ranks, Record, atomic, check_numbers, checkpoint_folder, choose_device
from common import choose_dtype, distribute, file_hash, folder_hash, fsync, generator
from common import keep_freed_memory, no_sync, open_ranks, read_json, read_record, remove
from common import run_header, run_script, setting, write_json
from data.chat import Row, Tokenizer, encode_row, load_tokenizer, read_rows
from data.tasks import find_tasks, load_items
from eval import Settings as EvalSettings
from eval import check_permission, compare_table, score
from model import Transformer, compare_tensors, load_model, pad_rows, save_model, tensor_info
from talan import AdapterConfig, TalanConfig, attach, backbone_weights, cached_dora_norms
from talan import group_of, report, save_adapter

TINY = ROOT / "data/tiny"
MULTIPLE = 16  # batches are padded to a multiple of this: whole tiles for the kernels


@dataclass(frozen=True)
class Settings:
    """Fine-tune a backbone with an adapter and a TALAN side path; without flags, a tiny one."""

    backbone: str = setting(str(TINY / "model"), "Hugging Face folder or hub id")
    data: tuple[str, ...] = setting((str(TINY / "train.jsonl"),), "rows: JSONL, .gz allowed")
    dev_data: tuple[str, ...] = setting((), "held-out rows; empty: --dev-rows of --data are")
    dev_rows: int = setting(64, "rows held out from --data for the loss during training")
    tasks: tuple[str, ...] = setting(("math", "word", "science", "code"), "scored before and after")
    limit: int = setting(0, "items of a task that are scored; 0: all")
    allow_code_execution: bool = setting(False, "tasks of code: run what the model writes")
    out: str = setting("", "run folder; empty: the next free runs/NUMBER")
    stop_token: str = setting("", "one more token that ends an assistant's turn")
    adapter: str = setting("lora", "none, lora, dora or rslora")
    rank: int = setting(16, "adapter: rank")
    alpha: float = setting(32.0, "adapter: its scale is alpha / rank, of rslora alpha / sqrt(rank)")
    dropout: float = setting(0.0, "adapter: dropout on its input")
    targets: tuple[str, ...] = setting(("all",), "adapter: projections that have one")
    talan: bool = setting(True, "attach the side path")
    layers: tuple[str, ...] = setting(("0.75",), "side path: layers, or fractions of the depth")
    site: str = setting("block", "side path: after the block or after the attention")
    slots: int = setting(8, "side path: memory slots")
    width: int = setting(64, "side path: memory width")
    mixer: str = setting("linear", "side path: linear, mlp or attention")
    writeback: str = setting("gate", "side path: add, gate or bounded")
    bound: float = setting(0.1, "side path: the bounded writeback's share of the stream's norm")
    grad_scale: float = setting(1.0, "side path: factor on all gradients that it receives")
    trunk_grad_scale: float = setting(1.0, "side path: factor on those it sends back; 0 detaches")
    talan_lr_scale: float = setting(1.0, "side path: factor on the learning rate")
    scope: str = setting("joint", "what trains: joint, adapter, talan, writeback or full")
    seed: int = setting(0, "seeds starts, order of the rows and dropout, each by itself")
    steps: int = setting(0, "optimizer steps; 0: as --epochs says")
    epochs: float = setting(1.0, "passes over the data when --steps is 0")
    step_tokens: int = setting(4096, "tokens of an optimizer step, padding included")
    micro_tokens: int = setting(0, "tokens of a micro-batch, padding included; 0: the whole step")
    max_tokens: int = setting(1024, "longer rows are dropped, or cut with --truncate")
    truncate: bool = setting(False, "cut rows longer than --max-tokens")
    lr: float = setting(1e-3, "peak learning rate")
    min_lr: float = setting(0.1, "share of the peak that the cosine ends at")
    warmup: float = setting(0.05, "share of the steps with a linearly rising rate")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = setting("auto", "the backbone's: float32, bfloat16; auto: bfloat16 on a GPU")
    compile: bool = setting(False, "torch.compile the blocks")
    fsdp: bool = setting(False, "torchrun: cut the frozen backbone over the GPUs (else DDP)")
    checkpointing: bool = setting(False, "recompute blocks in backward: less memory, more time")
    log_every: int = setting(10, "steps between printed lines (metrics.jsonl has every step)")
    eval_every: int = setting(50, "steps between losses on the held-out rows; 0: at the end")
    save_every: int = setting(50, "steps between checkpoints; 0: at the end")
    dry_run: bool = setting(False, "print settings, parameters, counts and a marked batch; stop")
    deterministic: bool = setting(False, "refuse GPU kernels whose results vary")
    resume: bool = setting(False, "resume the run in --out by its settings; none there: start it")
    overwrite: bool = setting(False, "delete the run in --out first")

    def __post_init__(self) -> None:
        names = "dev_rows limit steps micro_tokens min_lr warmup weight_decay clip talan_lr_scale"
        check_numbers(self, **dict.fromkeys(names.split(), 0))
        check_numbers(self, log_every=0, eval_every=0, save_every=0, max_tokens=1, step_tokens=1)
        check_numbers(self, epochs=1e-9, lr=1e-12)
        if self.min_lr > 1 or self.warmup > 1:
            raise ValueError("min-lr, warmup: expected shares, at most 1")


# ---- rows ----


def load_rows(
    files: Sequence[str], tokenizer: Tokenizer, settings: Settings, disable_bar: bool | None = None
) -> tuple[list[Row], dict[str, int]]:
    """Every usable row, and counts: read, too long (dropped), truncated, unlabelled (dropped), ...

    disable_bar: None disables it when stderr is no terminal. Raises ValueError with file:line.
    """
    rows: list[Row] = []
    counts = {"read": 0, "too long": 0, "truncated": 0, "unlabelled": 0}
    micro = settings.micro_tokens or settings.step_tokens
    limit = min(settings.max_tokens, settings.step_tokens, micro)
    for file in files:
        name = f"encode {Path(file).name}"
        for where, chat in tqdm(read_rows(file, counts), name, unit="row", disable=disable_bar):
            try:
                row = encode_row(tokenizer, chat.messages, chat.tools, chat.apart)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            counts["read"] += 1
            too_long = len(row.ids) > limit
            counts["truncated" if settings.truncate else "too long"] += too_long
            if too_long and not settings.truncate:
                continue
            row = Row(row.ids[:limit], row.supervised[:limit])
            if any(row.supervised[1:]):
                rows.append(row)
            else:
                counts["unlabelled"] += 1
    if not rows:
        raise ValueError(f"{', '.join(files)}: no usable row; counts: {counts}")
    return rows, counts


def load_data(settings: Settings, tokenizer: Tokenizer, ranks: Ranks) -> list[list[Row]]:
    """[training rows, held-out rows]; prints the counts. Raises ValueError."""
    found = []
    for what, files in (("rows", settings.data), ("held-out rows", settings.dev_data)):
        if files:
            rows, counts = load_rows(files, tokenizer, settings, None if ranks.is_main else True)
            print(f"{what}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
            found.append(rows)
    if settings.dev_data:
        return found
    if not 0 < settings.dev_rows < len(rows):
        raise ValueError(f"dev-rows: expected 1 to {len(rows) - 1}, found {settings.dev_rows}")
    order = torch.randperm(len(rows), generator=generator(settings.seed, "dev")).tolist()
    held = set(order[: settings.dev_rows])
    kept = [row for n, row in enumerate(rows) if n not in held]
    return [kept, [row for n, row in enumerate(rows) if n in held]]


# ---- batches ----

Step = list[list[int]]  # an optimizer step: micro-batches of row numbers


def padded_width(row: Row) -> int:
    """Tokens that are fed for this row, all but its last, rounded up as a batch is."""
    return -(-(len(row.ids) - 1) // MULTIPLE) * MULTIPLE


def plan_epoch(widths: Sequence[int], settings: Settings, micro: int, epoch: int) -> list[Step]:
    """Every row once: shuffled, sorted by width within windows, packed into steps.

    A step has the same rows whether it runs as one micro-batch (micro 0) or as several.
    """
    g, step_tokens = generator(settings.seed, "order", epoch), settings.step_tokens
    order = torch.randperm(len(widths), generator=g).tolist()
    window = max(1, 50 * step_tokens * len(widths) // max(1, sum(widths)))  # rows of fifty steps
    steps = []
    for start in range(0, len(order), window):
        ordered = sorted(order[start : start + window], key=lambda n: widths[n])
        steps += pack(ordered, widths, step_tokens)
    shuffled = torch.randperm(len(steps), generator=g).tolist()
    return [pack(steps[i], widths, micro or step_tokens) for i in shuffled]


def pack(rows: Sequence[int], widths: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive groups of a padded size, rows x widest, within budget (one row always fits)."""
    groups: list[list[int]] = [[]]
    widest = 0
    for n in rows:
        widest = max(widest, widths[n])
        if groups[-1] and widest * (len(groups[-1]) + 1) > budget:
            groups.append([])
            widest = widths[n]
        groups[-1].append(n)
    return groups


def padded_size(micros: Step, widths: Sequence[int]) -> int:
    """Tokens of a step, padding included."""
    return sum(len(micro) * widths[micro[-1]] for micro in micros)  # sorted: the last is the widest


def plan_steps(widths: Sequence[int], settings: Settings, micro: int, done: int) -> Iterator[Step]:
    """Steps of epoch after epoch, without end, but the `done` first; the seed alone decides."""
    epoch = 0
    while True:
        steps = plan_epoch(widths, settings, micro, epoch)
        yield from steps[done:]
        done, epoch = max(0, done - len(steps)), epoch + 1


@dataclass(frozen=True)
class Batch:
    """tokens (B,T) padded on the right; which of the B*T hidden states predict targets (N,)."""

    tokens: Tensor
    target_positions: Tensor  # (N,)
    targets: Tensor


def make_batch(rows: Sequence[Row], device: Any) -> Batch:
    """Position t predicts token t + 1. No rows: padding, for a process that must take part."""
    rows = rows or [Row([0, 0], [False, False])]
    tokens, _ = pad_rows([row.ids[:-1] for row in rows], multiple=MULTIPLE)  # (B,T)
    following, _ = pad_rows([row.ids[1:] for row in rows], multiple=MULTIPLE)  # (B,T)
    labels, _ = pad_rows([row.supervised[1:] for row in rows], multiple=MULTIPLE)  # (B,T)
    positions = labels.view(-1).nonzero()[:, 0]  # (N,)
    targets = following.view(-1)[positions]  # (N,)
    return Batch(*(t.to(device, non_blocking=True) for t in (tokens, positions, targets)))


# ---- loss ----


class CrossEntropySum(torch.autograd.Function):
    """sum_n (logsumexp(l_n) - l_n[target_n]), l = hidden weight^T, a chunk of rows at a time.

    The gradient softmax(l) - onehot(target) is multiplied out in forward: no (N,V) lives on.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        """hidden (N,D), weight (V,D), targets (N,) -> scalar float32."""
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if learn else None
        d_weight = torch.zeros_like(weight) if learn and weight.requires_grad else None
        numbers = 1 << (26 if hidden.is_cuda else 23)  # of a chunk of logits
        size = max(1, numbers // weight.shape[0])
        for start in range(0, len(hidden), size):
            h, target = hidden[start : start + size], targets[start : start + size, None]
            log_p = (h @ weight.T).log_softmax(-1, dtype=torch.float32)  # (chunk,V)
            total -= log_p.gather(-1, target).sum()
            if d_hidden is None:
                continue
            p = log_p.exp_()
            p.scatter_add_(-1, target, p.new_full((1, 1), -1.0).expand_as(target))
            p = p.to(weight.dtype)
            d_hidden[start : start + size] = p @ weight
            if d_weight is not None:
                d_weight += p.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad () -> d_hidden (N,D), d_weight (V,D) where the head learns."""
        return *(None if d is None else d * grad for d in ctx.saved_tensors), None, None


def loss_sum(ddp_model: Any, batch: Batch, model: Transformer) -> Tensor:
    """Cross-entropy summed over the batch's N supervised tokens; logits exist only there."""
    hidden = ddp_model(batch.tokens).flatten(0, 1)[batch.target_positions]  # (N,D)
    return CrossEntropySum.apply(hidden, model.head_weight, batch.targets, torch.is_grad_enabled())


def add_gradients(
    ddp_model: Any, model: Transformer, batches: Sequence[Batch], count: int, ranks: Ranks
) -> Tensor:
    """Gradients of (all losses of all processes) / count; returns the sum of this one's losses."""
    total = torch.zeros((), device=batches[0].tokens.device)
    for batch in batches:
        with no_sync(ddp_model, batch is batches[-1]):
            loss = loss_sum(ddp_model, batch, model)
            (loss * (ranks.world / count)).backward()  # DDP takes the mean over the processes
        total += loss.detach()
    return total


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], budget: int, device: Any, ranks: Ranks) -> float:
    """Mean cross-entropy over the supervised tokens of rows, in eval mode; draws nothing."""
    was_training, widths = model.training, [padded_width(row) for row in rows]
    sums = torch.zeros(2, dtype=torch.float64)  # losses, tokens
    model.eval()
    order = sorted(range(len(rows)), key=lambda n: widths[n])
    for group in ranks.shard(pack(order, widths, budget), []):
        batch = make_batch([rows[n] for n in group], device)
        sums += torch.tensor([loss_sum(model, batch, model).item(), len(batch.targets)])
    model.train(was_training)
    total, count = ranks.sum(sums.to(device)).tolist()
    return total / count


# ---- model and optimizer ----


def build_configs(settings: Settings) -> tuple[AdapterConfig, TalanConfig | None]:
    """Adapter and side path as the settings say. Raises ValueError."""
    s, layers = settings, settings.layers
    if not all(re.fullmatch(r"\d+|0?\.\d+", word) for word in layers):
        raise ValueError(f"layers: expected indices or fractions such as 0.5, found {layers}")
    axes = {field.name: getattr(s, field.name) for field in dataclasses.fields(TalanConfig)}
    axes["layers"] = tuple(float(word) if "." in word else int(word) for word in layers)
    adapter = AdapterConfig(s.adapter, s.rank, s.alpha, s.dropout, s.targets)
    return adapter, TalanConfig(**axes) if s.talan else None


def build_model(settings: Settings, device: torch.device) -> Transformer:
    """The backbone with adapter and side path attached. Raises ValueError."""
    dtype = choose_dtype(settings.dtype, device)
    if settings.scope == "full" and (settings.fsdp or dtype != torch.float32):
        raise ValueError("scope full trains the backbone: expected --dtype float32 and no --fsdp")
    # FSDP moves it block by block
    model = load_model(settings.backbone, "cpu" if settings.fsdp else device, dtype)
    attach(model, *build_configs(settings), settings.scope, settings.seed)
    model.checkpointing = settings.checkpointing
    if settings.compile:
        torch.compiler.reset()  # of another run in this process
        for block in model.model.layers:
            block.compile(dynamic=True)  # all run the first one's code
    return model


def build_optimizer(model: Transformer, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; the side path is a group of its own, at talan_lr_scale times the rate."""
    rest: Record = {"params": [], "lr_scale": 1.0}
    side_path: Record = {"params": [], "lr_scale": settings.talan_lr_scale}
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = side_path if group_of(name) == "side path" else rest
            group["params"].append(p)
    groups = [group for group in (rest, side_path) if group["params"]]
    decay = settings.weight_decay
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=decay, fused=True)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Of step 1..steps: linear over warmup * steps, then a half cosine from lr to min_lr * lr."""
    rise = max(1, round(settings.warmup * steps))
    if step <= rise:
        return settings.lr * step / rise
    cosine = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * cosine)


# ---- the run on disk ----


def save_checkpoint(run: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """RUN/step-N, whole or absent: adapter, side path, parameters, the optimizer's state."""
    fsync(run / "metrics.jsonl")  # a checkpoint never knows more steps than the metrics
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[f"parameter.{name}"] = p.detach().cpu()
            for key, value in optimizer.state[p].items():
                state[f"optimizer.{key}.{name}"] = value.cpu()
    with atomic(run / f"step-{step:07d}") as tmp:
        if model.head_weight.requires_grad:  # scope full
            save_model(model, tmp, backbone_weights(model))
            model.source = str(run.resolve())  # what the adapter beside it is of
        if model.adapter_config.kind != "none" or model.talan_config:
            save_adapter(model, tmp)
        save_file(state, tmp / "train_state.safetensors")
        write_json(tmp / "train_state.json", {"format": 2, "step": step})
    remove_leftovers(run)


def remove_leftovers(run: Path) -> None:
    """Delete all checkpoints but the newest, and what a killed process had half written."""
    for old in (*sorted(run.glob("step-*"))[:-1], *run.glob(".*.tmp")):
        remove(old)


def load_checkpoint(run: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint into model and optimizer; returns its step, 0 without one.

    The optimizer's state is kept by parameter name, whatever its keys. Raises ValueError, with
    both untouched, when the parameters are not this run's.
    """
    folder = checkpoint_folder(run)
    if folder == run:
        return 0
    info, file = read_json(folder / "train_state.json"), folder / "train_state.safetensors"
    named = {f"parameter.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    found = {k: v for k, v in tensor_info(file).items() if k.startswith("parameter.")}
    problems = compare_tensors(named, found)
    if info.get("format") != 2 or problems:
        raise ValueError("\n  ".join([f"{folder}: of other settings or format:", *problems]))
    for key, tensor in load_file(file).items():
        kind, _, name = key.partition(".")
        if kind == "parameter":
            named[key].data.copy_(tensor)
        else:
            kind, _, name = name.partition(".")
            p = named[f"parameter.{name}"]
            optimizer.state[p][kind] = tensor.to(p.device)
    return info["step"]


class NonFiniteError(ValueError):
    """A loss or a gradient that is not finite."""


class Metrics:
    """metrics.jsonl: an object a line; a resumed run drops the lines after its checkpoint."""

    def __init__(self, run: Path, step: int, writes: bool) -> None:
        self.file, self.writes = run / "metrics.jsonl", writes
        kept, lines = [], self.file.read_text().splitlines() if step else []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line half written
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        if writes:
            with atomic(self.file) as tmp:
                tmp.write_text("".join(kept))

    def write(self, **values: Any) -> None:
        """Append a line."""
        if self.writes:
            with open(self.file, "a") as file:
                file.write(json.dumps(values) + "\n")


class Interrupt:
    """Ctrl-C or SIGTERM: once, finish the step and save; twice, stop now."""

    def __enter__(self) -> Interrupt:
        self.asked, numbers = False, (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, *_: Any) -> None:
        """Remember it, and let the next one through."""
        self.asked = True
        print("\nfinishing the step and saving; once more stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def choose_run(settings: Settings, overrides: Record) -> tuple[Path, Settings]:
    """The run folder, and the settings: those stored, when a run is resumed. Raises ValueError."""
    if settings.resume and not settings.out:
        raise ValueError("resume: expected the run's folder in --out")
    number = 1
    while not settings.out and Path(f"runs/{number}").exists():
        number += 1
    run = Path(settings.out or f"runs/{number}")
    stored = run / "settings.json"
    if settings.resume and stored.exists():
        saved: Any = read_json(stored)
        saved |= {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        asked = {k: v for k, v in overrides.items() if k not in ("out", "resume")}
        differ = [f"{k} {saved.get(k)}, not {v}" for k, v in asked.items() if v != saved.get(k)]
        if differ or set(saved) != set(asdict(settings)):
            raise ValueError(f"{run}: resumes by its own settings: {', '.join(differ) or saved}")
        return run, replace(Settings(**saved), resume=True, out=str(run))
    files = [file.name for file in run.glob("*")]
    taken = run.is_file() or any(not name.endswith(".tmp") for name in files)
    if taken and not settings.dry_run and not (settings.overwrite and stored.exists()):
        raise ValueError(f"{run}: exists; --resume resumes a run, --overwrite deletes it")
    return run, settings


def make_run(run: Path, settings: Settings, record: Record) -> None:
    """Make the folder, or check that its run began with this data and backbone; ValueError."""
    if settings.overwrite:
        remove(run)
    run.mkdir(parents=True, exist_ok=settings.out != "")
    remove_leftovers(run)
    old = read_record(run) if checkpoint_folder(run) != run else {}
    differ = {name: value for name, value in record.items() if old and old.get(name) != value}
    for name, value in differ.items():
        if name.endswith("sha256"):
            raise ValueError(f"{run}: began with {name} {old.get(name)}, found {value}")
        if name != "settings":
            print(f"warning: {run}: {name} was {old.get(name)}, is {value}", file=sys.stderr)
    if not (run / "settings.json").exists():
        stored = replace(settings, resume=False, overwrite=False)
        write_json(run / "settings.json", asdict(stored))


# ---- the loop ----


def train(  # noqa: PLR0915 - the loop is read as one block
    settings: Settings, run: Path, model: Any, data: Any, device: Any, record: Record, ranks: Ranks
) -> bool:
    """Train from the newest checkpoint to the last step; False when interrupted.

    A step's loss: sum / number of its supervised tokens, over all micro-batches and processes.
    Raises NonFiniteError, with the weights as they were, at a step that is not finite.
    """
    rows, dev = data
    added = {p for name, p in model.named_parameters() if group_of(name) != "backbone"}
    ddp_model = distribute(model, model.model.layers, added, ranks, device, settings.fsdp)
    optimizer = build_optimizer(model, settings)
    first = load_checkpoint(run, model, optimizer)
    widths = [padded_width(row) for row in rows]
    labels = [sum(row.supervised[1:]) for row in rows]
    budget = settings.micro_tokens or -(-settings.step_tokens // ranks.world)
    epoch = plan_epoch(widths, settings, micro=0, epoch=0)
    steps = settings.steps or max(1, round(settings.epochs * len(epoch)))
    trainable = [p for p in model.parameters() if p.requires_grad]
    metrics = Metrics(run, first, ranks.is_main)
    if first == 0:
        learning = sum(p.numel() for p in trainable)
        metrics.write(kind="run", step=0, **record, steps=steps, trainable=learning)
        metrics.write(kind="dev", step=0, loss=mean_loss(model, dev, budget, device, ranks))
    plan = plan_steps(widths, settings, budget, first)
    options: Record = {"desc": "train", "unit": "step", "disable": None if ranks.is_main else True}
    bar = tqdm(initial=first, total=steps, **options)
    model.train()
    with Interrupt() as interrupt, bar:
        for step in range(first + 1, steps + 1):
            began, micros = time.perf_counter(), next(plan)
            seed = generator(settings.seed, "dropout", step).initial_seed()
            torch.manual_seed(seed + ranks.rank)  # the global stream serves dropout alone
            count = sum(labels[n] for micro in micros for n in micro)
            mine = [list(map(rows.__getitem__, micro)) for micro in ranks.shard(micros, [])]
            batches = [make_batch(some_rows, device) for some_rows in mine]
            with cached_dora_norms(model):
                total = add_gradients(ddp_model, model, batches, count, ranks)
            norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
            sums = ranks.sum(torch.stack((total, total.new_full((), interrupt.asked))))
            loss, asked, grad_norm = torch.cat((sums, norm[None])).tolist()  # waits, once a step
            loss /= count
            if not math.isfinite(loss + grad_norm):
                found = f"loss {loss}, gradient norm {grad_norm}, rows {micros}"
                raise NonFiniteError(f"step {step}: {found}; the last checkpoint is whole")
            nn.utils.clip_grads_with_norm_(trainable, settings.clip or math.inf, norm)
            rate = learning_rate(step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            values = {"step": step, "loss": loss, "lr": rate, "grad_norm": grad_norm}
            values |= {"tokens": padded_size(micros, widths), "supervised": count}
            values["seconds"] = round(time.perf_counter() - began, 4)
            metrics.write(kind="step", **values)
            stop = bool(asked) or (ranks.world == 1 and interrupt.asked)
            last = step == steps or stop
            show_step(bar, values, last or is_due(step, settings.log_every))
            if step == steps or is_due(step, settings.eval_every):
                dev_loss = mean_loss(model, dev, budget, device, ranks)
                metrics.write(kind="dev", step=step, loss=dev_loss)
                bar.write(f"step {step}/{steps}  held-out loss {dev_loss:.4f}")
            if ranks.is_main and (last or is_due(step, settings.save_every)):
                save_checkpoint(run, step, model, optimizer)
            if stop and step < steps:
                return False
    return True


def is_due(step: int, every: int) -> bool:
    """Is it a step for what is done every so many steps (0: never)?"""
    return every > 0 and step % every == 0


def show_step(bar: tqdm, values: Record, line: bool) -> None:
    """Move the bar on, and print a line of the step's numbers (tokens: padding included)."""
    speed = f"{values['tokens'] / max(values['seconds'], 1e-4):,.0f} tokens/s"
    bar.update()
    bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed}", refresh=False)
    if line:
        numbers = "loss {loss:.4f}  lr {lr:.2e}  norm {grad_norm:.3f}".format(**values)
        bar.write(f"step {values['step']}/{bar.total}  {numbers}  {speed}")


def dry_run(settings: Settings, model: Any, tokenizer: Tokenizer, rows: list[Row]) -> None:
    """Print settings, parameters, counts and the first micro-batch, what is learnt in [[ ]]."""
    print(json.dumps(asdict(settings), indent=2))
    print(report(model))
    widths = [padded_width(row) for row in rows]
    epoch = plan_epoch(widths, settings, settings.micro_tokens, epoch=0)
    tokens = sum(len(row.ids) for row in rows)
    learnt = sum(sum(row.supervised) for row in rows)
    share = f"{learnt:,} supervised ({100 * learnt / tokens:.1f} %)"
    print(f"{len(rows):,} rows, {tokens:,} tokens, {share}, {len(epoch):,} steps an epoch")
    print(f"first of {len(epoch[0])} micro-batches of a step, supervised tokens in [[ ]]:")
    print("\n---\n".join(show_row(rows[n], tokenizer) for n in epoch[0][0]))


def show_row(row: Row, tokenizer: Tokenizer) -> str:
    """A row decoded, each run of supervised tokens between [[ and ]]."""
    text, start = "", 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or row.supervised[end] != row.supervised[start]:
            part = tokenizer.decode(row.ids[start:end])
            text += f"[[{part}]]" if row.supervised[start] else part
            start = end
    return text


def scoring(settings: Settings, out: Path, run: Path | None = None) -> EvalSettings:
    """How eval.py scores the backbone, or the run in this folder."""
    shared = ("tasks", "limit", "device", "dtype", "allow_code_execution", "stop_token")
    values = {name: getattr(settings, name) for name in shared} | {"out": str(out)}
    if run and (settings.talan or settings.adapter != "none"):
        values["adapter"] = str(run)
    full = run and settings.scope == "full"
    return EvalSettings(backbone=str(run) if full else settings.backbone, **values)


def main(overrides: Record, in_sweep: bool = False) -> None:
    """Choose the run, load, train, save, score (in a sweep: not). Raises ValueError.

    Exits with 130 when interrupted.
    """
    settings, ranks = Settings(**overrides), open_ranks()
    run, settings = ranks.run_on_main(lambda: choose_run(settings, overrides))
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
        torch.use_deterministic_algorithms(True)
    if settings.fsdp and ranks.world == 1:
        raise ValueError("fsdp: needs torchrun --nproc-per-node N train.py ...")
    tasks = find_tasks(settings.tasks) if settings.tasks != ("none",) else []
    check_permission(tasks, settings.allow_code_execution)
    for task in tasks:
        load_items(task)  # a bad file of items is found now, not after hours of training
    device = choose_device(settings.device)
    keep_freed_memory()
    tokenizer = load_tokenizer(settings.backbone, settings.stop_token)
    model = build_model(settings, device)
    print(f"backbone {settings.backbone} on {device} in {model.head_weight.dtype}\n{report(model)}")
    data = load_data(settings, tokenizer, ranks)
    if settings.dry_run:
        return dry_run(settings, model, tokenizer, data[0])
    files = (*settings.data, *settings.dev_data)
    record = {**run_header(settings, device), "world": ranks.world}
    record["data_sha256"] = {file: file_hash(file) for file in files}
    record["backbone_sha256"] = folder_hash(Path(model.folder or ""))
    ranks.run_on_main(lambda: make_run(run, settings, record))
    print(f"run folder: {run}")
    finished = train(settings, run, model, data, device, record, ranks)
    ranks.barrier()
    if not finished:
        raise SystemExit(130)
    if tasks and not in_sweep:
        del model  # scoring loads another
        base = score(scoring(settings, run / "eval-base"))
        print(compare_table(base, score(scoring(settings, run / "eval-adapted", run))))
    print(f"wrote {run}")
    return None


if __name__ == "__main__":
    run_script(main, Settings, "train.py")
