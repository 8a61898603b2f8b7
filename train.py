"""Supervised fine-tuning of an adapter and a TALAN side path (or of every weight): `python train.py --help`.

rows -> token ids and labels -> length-bucketed steps of micro-batches -> the loop -> checkpoints -> scores of base and adapted.

Shapes: B rows, T tokens, N supervised tokens of a micro-batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from data.settings import given, setting

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """Post-train a backbone with an adapter and a TALAN side path. Without flags: the embedded backbone and data."""

    backbone: str = setting(str(HERE / "data/tiny/model"), "Hugging Face folder or hub id")
    data: tuple[str, ...] = setting((str(HERE / "data/tiny/train.jsonl"),), "training rows: JSONL files, .gz allowed")
    dev_data: tuple[str, ...] = setting((), "held-out rows; without it --dev-rows are taken from --data")
    dev_rows: int = setting(64, "rows held out from --data for the loss during training")
    tasks: tuple[str, ...] = setting(("math", "word", "science", "code"), "scored before and after, as eval.py --tasks; none: nothing")
    limit: int = setting(0, "items a task that are scored; 0: all")
    allow_code_execution: bool = setting(False, "code tasks: run the programs that the model writes")
    out: str = setting("", "run folder; empty: the next free runs/NUMBER")
    adapter: str = setting("lora", "none, lora, dora or rslora")
    rank: int = setting(16, "rank of the adapter")
    alpha: float = setting(32.0, "the adapter's scale is alpha / rank (rslora: alpha / sqrt(rank))")
    dropout: float = setting(0.0, "dropout on the adapter's input")
    targets: tuple[str, ...] = setting(("all",), "projections with an adapter")
    talan: bool = setting(True, "attach the side path")
    layers: tuple[str, ...] = setting(("0.75",), "side path: layers, as indices or fractions of the depth")
    site: str = setting("block", "side path: after the block or after the attention")
    slots: int = setting(8, "side path: memory slots")
    width: int = setting(64, "side path: memory width")
    mixer: str = setting("linear", "side path: linear, mlp or attention")
    writeback: str = setting("gate", "side path: add, gate or bounded")
    bound: float = setting(0.1, "side path: the bounded writeback's share of the stream's norm")
    grad_scale: float = setting(1.0, "side path: factor on all gradients it receives")
    trunk_grad_scale: float = setting(1.0, "side path: factor on the gradient it sends back to the trunk; 0 detaches")
    talan_lr_scale: float = setting(1.0, "side path: factor on the learning rate")
    scope: str = setting("joint", "what trains: joint, adapter, talan, writeback or full")
    seed: int = setting(0, "seeds the starts, the order of the rows and dropout, each its own stream")
    steps: int = setting(0, "optimizer steps; 0: as --epochs says")
    epochs: float = setting(1.0, "passes over the data when --steps is 0")
    step_tokens: int = setting(4096, "tokens of one optimizer step, padding included")
    micro_tokens: int = setting(0, "tokens of one micro-batch, padding included; 0: the whole step at once")
    max_tokens: int = setting(1024, "longer rows are dropped and counted, or cut with --truncate")
    truncate: bool = setting(False, "cut rows longer than --max-tokens instead of dropping them")
    lr: float = setting(1e-3, "peak learning rate")
    min_lr: float = setting(0.1, "share of the peak that the cosine ends at")
    warmup: float = setting(0.05, "share of the steps with a linearly rising rate")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = setting("auto", "backbone dtype: float32 or bfloat16; auto: bfloat16 on a GPU")
    compile: bool = setting(False, "torch.compile the blocks")
    fsdp: bool = setting(False, "several GPUs: FSDP2 cuts the frozen backbone over them; torchrun without it: a whole one on each (DDP)")
    checkpointing: bool = setting(False, "recompute each block in backward: less memory, more time")
    log_every: int = setting(10, "steps between printed lines (metrics.jsonl has every step)")
    eval_every: int = setting(50, "steps between losses on the held-out rows; 0: only at the end")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end")
    dry_run: bool = setting(False, "print settings, parameters, counts and one marked batch; train nothing")
    deterministic: bool = setting(False, "fail rather than run a GPU kernel whose result varies; sets CUBLAS_WORKSPACE_CONFIG=:4096:8 "
                                         "where the environment has none")
    paired: bool = setting(False, "for each of --seeds the adapter with and without the side path: train, score, compare; go on with --out")
    seeds: tuple[str, ...] = setting((), "with --paired: seeds and ranges of them, 0-6 or 0,1,5")
    lrs: tuple[str, ...] = setting((), "with --paired: rates tried on the first seed; each side takes its own with the lowest held-out loss")
    paired_control: str = setting("none", "with --paired: rank: a third side, the adapter alone with its rank raised to as many parameters; or none")
    vary: tuple[str, ...] = setting((), "with --paired: further candidates with one setting changed each: mixer=mlp slots=32 layers=0.25+0.75")
    repeat: str = setting("", "run folder whose recorded settings to start again with, in --out; no other flag goes with it")
    resume: bool = setting(False, "go on with the run in --out, by its own settings")
    overwrite: bool = setting(False, "delete the run in --out first")

    def __post_init__(self) -> None:
        """Raise ValueError that lists every number out of range."""
        above = [n for n in ("epochs", "step_tokens", "max_tokens", "lr") if not 0 < getattr(self, n) < 1e30]
        least = [n for n in ("steps", "dev_rows", "micro_tokens", "min_lr", "warmup", "weight_decay", "clip", "talan_lr_scale",
                             "log_every", "eval_every", "save_every", "limit") if not 0 <= getattr(self, n) < 1e30]
        wrong = [f"--{n.replace('_', '-')}: expected a finite number {'above' if n in above else 'of at least'} 0, found {getattr(self, n)}"
                 for n in above + least]
        wrong += [f"--{n.replace('_', '-')}: expected a share, at most 1, found {getattr(self, n)}" for n in ("min_lr", "warmup")
                  if getattr(self, n) > 1]
        wrong += ["--resume goes on with the run that --overwrite deletes: leave one of them out"] * (self.resume and self.overwrite)
        if wrong:
            raise ValueError("settings:\n  " + "\n  ".join(wrong))


GIVEN = given(Settings, sys.argv[1:]) if __name__ == "__main__" else {}  # before torch loads: --help answers at once

import contextlib
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from data.record import check_record, describe, read_record
from data.ranks import Ranks, close_ranks, open_ranks, spread, summing
from data.rows import Message, check_messages, parse_object, read_lines
from eval import Settings as EvalSettings, check_permission, compare_table, find_tasks, load_items, score
from model import Tokenizer, Transformer, atomic, choose_device, choose_dtype, generator, keep_freed_memory
from model import load_model, load_tokenizer, pad_rows, read_json, save_model, sync, tensor_info
from talan import AdapterConfig, TalanConfig, attach, attached, checkpoint_folder, group_of, raise_all, report, save_adapter, tensor_problems

# ---------------------------------------------------------------------------------------------------------------------
# Rows -> token ids and labels
# ---------------------------------------------------------------------------------------------------------------------

MULTIPLE = 16  # batches are padded to a multiple of this: whole tiles for the kernels
OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private-use characters that mark an assistant's text while the template is rendered


@dataclass(frozen=True)
class Row:
    """One conversation: its token ids, and which of them are supervised (assistant text and the stop token after it)."""

    ids: list[int]
    supervised: list[bool]

    @property
    def width(self) -> int:
        """Tokens fed to the model, padding included, when this row is the longest of its batch: all but the last, rounded up."""
        return -(-(len(self.ids) - 1) // MULTIPLE) * MULTIPLE


def read_rows(file: str | Path) -> Iterator[tuple[str, list[Message]]]:
    """Yield ("file:line", messages) of each JSONL line. Raises ValueError with file:line on the first unreadable row."""
    for where, line in read_lines(file):
        yield where, parse_row(line, where)


def parse_row(line: bytes, where: str) -> list[Message]:
    """{"messages": [...]}, {"prompt", "completion"} or GSM8K's {"question", "answer"} -> messages. Raises ValueError."""
    row = parse_object(line, where)
    if "messages" in row:
        messages = row["messages"]
    elif {"prompt", "completion"} <= set(row):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    elif {"question", "answer"} <= set(row):  # GSM8K: the answer's calculator marks <<48/2=24>> are not for reading
        answer = re.sub(r"<<[^<>]*>>", "", row["answer"]) if isinstance(row["answer"], str) else row["answer"]
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
    else:
        raise ValueError(f"{where}: expected messages, or prompt and completion, or question and answer; found {sorted(row)}")
    if not any(m["role"] == "assistant" for m in check_messages(messages, where)):
        raise ValueError(f"{where}: expected at least one message of the assistant, found none")
    return messages


def encode_row(tokenizer: Tokenizer, messages: Sequence[Message]) -> Row:
    """Ids of the rendered conversation; supervised: every token that lies wholly in an assistant's text or stop token.

    The text is encoded once and as a whole, so merges at the borders are those of the joint encoding, and a token that
    reaches from the template into the text carries no label. A stop token does, though it may take blanks around it along. Raises
    ValueError when the turns cannot be found, or their stop tokens are not among the ids.
    """
    text, spans = mark_turns(tokenizer, messages)
    encoding = tokenizer.encoding(text)
    supervised, rest, stops = [], iter(spans), 0
    begin, end = next(rest)
    for i, (a, b) in zip(encoding.ids, encoding.offsets):
        while a >= end:
            begin, end = next(rest, (len(text) + 1, len(text) + 1))
        stop = a < end <= b and i in tokenizer.eos_ids
        stops += stop
        supervised.append(begin <= a < b <= end)
        supervised[-1] |= stop
    if stops < len(spans):
        raise ValueError(f"the tokenizer splits the stop token of {len(spans) - stops} of the {len(spans)} assistant turns")
    return Row(encoding.ids, supervised)


def mark_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and, for each assistant turn, [begin, end) of the characters to supervise, stop token included."""
    text = tokenizer.render(messages)
    if OPEN in text or CLOSE in text:
        raise ValueError("the text holds the private-use characters U+E0F0 or U+E0F1, which mark turns here")
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    marked = try_marks(tokenizer, messages, {i: OPEN + messages[i]["content"] + CLOSE for i in turns}, text)
    if marked is None:  # the template changes some turn (strips it, moves its thoughts): find each by itself
        found = [next(filter(None, (try_marks(tokenizer, messages, {i: c}, text) for c in candidates(messages[i]["content"]))), None)
                 for i in turns]
        if None in found:
            raise ValueError(f"the chat template changes assistant turn {found.index(None) + 1} so that its text cannot be told from the template's")
        spans = [span for one in found for span in one or []]
    else:
        spans = marked
    return text, [(begin, stop_end(tokenizer, text, end)) for begin, end in spans]


def candidates(content: str) -> Iterator[str]:
    """Marked forms of an assistant's content, as templates are known to change it."""
    answer = content.split("</think>")[-1].lstrip("\n")
    for form in (content, content.strip(), content.rstrip(), content.lstrip("\n"), answer, answer.strip()):
        yield OPEN + form + CLOSE
    if "</think>" in content:  # thoughts that stay: supervised with their tags
        thoughts = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        yield f"<think>\n{OPEN}{thoughts}\n</think>\n\n{answer}{CLOSE}"


def try_marks(tokenizer: Tokenizer, messages: Sequence[Message], contents: dict[int, str], text: str) -> list[tuple[int, int]] | None:
    """Spans of the marked turns in `text`, or None when marking changes anything else about the rendered text."""
    changed = [{**m, "content": contents[i]} if i in contents else m for i, m in enumerate(messages)]
    marked = tokenizer.render(changed)
    parts = re.split(f"[{OPEN}{CLOSE}]", marked)
    if "".join(parts) != text or len(parts) != 2 * len(contents) + 1:
        return None
    edges = [0]
    for part in parts[:-1]:
        edges.append(edges[-1] + len(part))
    spans = list(zip(edges[1::2], edges[2::2]))
    return [(begin - 8 if text[:begin].endswith("<think>\n") and "</think>" in text[begin:end] else begin, end) for begin, end in spans]


def stop_end(tokenizer: Tokenizer, text: str, end: int) -> int:
    """Where the stop token after an assistant's text ends. Raises ValueError when none follows: the model would never stop."""
    after = len(text) - len(text[end:].lstrip())
    for token in (tokenizer.core.id_to_token(i) for i in tokenizer.eos_ids):
        if token and text.startswith(token, after):
            return after + len(token)
    raise ValueError(f"no stop token follows an assistant turn; found {text[end:end + 20]!r}, stop ids are {tokenizer.eos_ids}")


def load_rows(files: Sequence[str], tokenizer: Tokenizer, settings: Settings, hide: bool | None = None) -> tuple[list[Row], dict[str, int]]:
    """Every usable row, and counts: read, too_long (dropped), truncated, unlabelled (dropped). hide: the bar, None: where nobody sees it.
    Raises ValueError with file:line."""
    rows, counts = [], dict.fromkeys(("read", "too_long", "truncated", "unlabelled"), 0)
    limit = min(settings.max_tokens, settings.step_tokens, settings.micro_tokens or settings.step_tokens)
    for file in files:
        for where, messages in tqdm(read_rows(file), desc=f"encode {Path(file).name}", unit="row", disable=hide):
            try:
                row = encode_row(tokenizer, messages)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            counts["read"] += 1
            long = len(row.ids) > limit
            counts["truncated" if settings.truncate else "too_long"] += long
            row = Row(row.ids[:limit], row.supervised[:limit]) if long else row
            if long and not settings.truncate:
                continue
            counts["unlabelled"] += not any(row.supervised[1:])
            if any(row.supervised[1:]):
                rows.append(row)
    if not rows:
        raise ValueError(f"{', '.join(files)}: no usable row; counts: {counts}")
    return rows, counts


def load_data(settings: Settings, tokenizer: Tokenizer, hide: bool | None = None) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows); prints the counts of the files of each. Raises ValueError."""
    found = []
    for what, files in (("rows", settings.data), ("held-out rows", settings.dev_data)):
        if files:
            rows, counts = load_rows(files, tokenizer, settings, hide)
            print(f"{what}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
            found.append(rows)
    return (found[0], found[1]) if settings.dev_data else split_dev(found[0], settings)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

Step = list[list[int]]  # an optimizer step: micro-batches of row numbers


def plan_epoch(lengths: Sequence[int], step_tokens: int, micro_tokens: int, seed: int, epoch: int) -> list[Step]:
    """Every row once: shuffled, sorted by length within windows, packed into steps of at most step_tokens (rows x longest).

    A step's rows do not depend on micro_tokens, which only splits it: 1 x 8 rows and 4 x 2 rows are the same step.
    """
    g = generator(seed, "order", epoch)
    order = torch.randperm(len(lengths), generator=g).tolist()
    window = max(1, 50 * step_tokens * len(lengths) // max(1, sum(lengths)))  # rows of about fifty steps
    windows = [sorted(order[i:i + window], key=lambda n: lengths[n]) for i in range(0, len(order), window)]
    steps = [step for part in windows for step in pack(part, lengths, step_tokens)]
    return [pack(steps[i], lengths, micro_tokens or step_tokens) for i in torch.randperm(len(steps), generator=g).tolist()]


def pack(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into consecutive groups whose padded size, rows x longest, stays within budget (a single row always fits)."""
    groups: list[list[int]] = [[]]
    longest = 0
    for n in rows:
        longest = max(longest, lengths[n])
        if groups[-1] and longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
            longest = lengths[n]
        groups[-1].append(n)
    return groups


def plan_steps(lengths: Sequence[int], settings: Settings, micro_tokens: int) -> Iterator[Step]:
    """The steps of epoch 0, 1, 2, ... for ever: a function of the seed, so a resumed run skips to its place."""
    epoch = 0
    while True:
        yield from plan_epoch(lengths, settings.step_tokens, micro_tokens, settings.seed, epoch)
        epoch += 1


@dataclass(frozen=True)
class Batch:
    """tokens (B,T) padded on the right; places (N,) of the hidden states that predict the targets (N,), in the flattened (B*T)."""

    tokens: Tensor
    places: Tensor
    targets: Tensor


def make_batch(rows: Sequence[Row], device: Any) -> Batch:
    """Position t predicts token t + 1, so the last token of a row is fed to nobody and the first is nobody's target.

    No rows: one of padding without a target, for a process that must take part all the same.
    """
    rows = rows or [Row([0, 0], [False, False])]
    tokens, _ = pad_rows([row.ids[:-1] for row in rows], multiple=MULTIPLE)  # (B,T)
    following, _ = pad_rows([row.ids[1:] for row in rows], multiple=MULTIPLE)
    labels, _ = pad_rows([[int(s) for s in row.supervised[1:]] for row in rows], multiple=MULTIPLE)  # padding 0
    places = labels.view(-1).nonzero()[:, 0]  # (N,)
    targets = following.view(-1)[places]  # (N,)
    return Batch(*(t.to(device, non_blocking=True) for t in (tokens, places, targets)))


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------

class CrossEntropySum(torch.autograd.Function):
    """sum_n (logsumexp(l_n) - l_n[target_n]) with l = hidden weight^T, a chunk of rows at a time.

    The gradient softmax(l) - onehot(target) is multiplied out within the chunk in forward, so no (N,V) tensor lives on.
    hidden (N,D), weight (V,D), targets (N,) -> scalar float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if learn else None
        d_weight = torch.zeros_like(weight) if learn and weight.requires_grad else None
        size = max(1, (1 << (26 if hidden.is_cuda else 23)) // weight.shape[0])  # 256 MiB of float32 logits, on a CPU 32 MiB
        for start in range(0, len(hidden), size):
            h, target = hidden[start:start + size], targets[start:start + size, None]
            log_p = (h @ weight.T).log_softmax(-1, dtype=torch.float32)  # (chunk,V)
            total -= log_p.gather(-1, target).sum()
            if d_hidden is not None:
                p = log_p.exp_()
                p.scatter_add_(-1, target, p.new_full((1, 1), -1.0).expand_as(target))
                p = p.to(weight.dtype)
                d_hidden[start:start + size] = p @ weight
                if d_weight is not None:
                    d_weight += p.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else d * grad for d in ctx.saved_tensors), None, None


def loss_sum(forward: Callable[[Tensor], Tensor], batch: Batch, model: Transformer) -> Tensor:
    """Cross-entropy summed over the batch's N supervised tokens; logits exist only there. forward: the model, as it may be wrapped."""
    hidden = forward(batch.tokens).flatten(0, 1)[batch.places]  # (N,D)
    return CrossEntropySum.apply(hidden, model.head_weight, batch.targets, torch.is_grad_enabled())


def add_gradients(forward: nn.Module, model: Transformer, batches: Sequence[Batch], count: int, ranks: Ranks) -> Tensor:
    """Gradients of (losses of all batches of all processes) / count into the parameters; returns the sum of this process' losses."""
    total = torch.zeros((), device=batches[0].tokens.device)
    for batch in batches:
        with summing(forward, batch is batches[-1]):
            loss = loss_sum(forward, batch, model)
            (loss * (ranks.world / count)).backward()  # DDP takes the mean over the processes
        total += loss.detach()
    return total


@torch.no_grad()
def mean_loss(model: Transformer, rows: Sequence[Row], budget: int, device: Any, ranks: Ranks | None = None) -> float:
    """Mean cross-entropy over all supervised tokens of these rows, in eval mode, shared by the processes; draws no random number."""
    training, found, ranks = model.training, torch.zeros(2, dtype=torch.float64), ranks or Ranks()  # sum, tokens
    model.eval()
    order = sorted(range(len(rows)), key=lambda n: rows[n].width)
    for group in ranks.share(pack(order, [row.width for row in rows], budget), []):
        batch = make_batch([rows[n] for n in group], device)
        found += torch.tensor([loss_sum(model, batch, model).item(), len(batch.targets)], dtype=torch.float64)
    model.train(training)
    total, count = ranks.sum(found.to(device)).tolist()
    return total / count


# ---------------------------------------------------------------------------------------------------------------------
# The run: model, optimizer, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def parts(settings: Settings) -> tuple[AdapterConfig, TalanConfig | None]:
    """Adapter and side path as the settings say. Raises ValueError, on axes of a side path that is not wanted too."""
    axes = {field.name: getattr(settings, field.name) for field in fields(TalanConfig)}
    talan = TalanConfig(**axes | {"layers": parse_layers(settings.layers)})
    return AdapterConfig(settings.adapter, settings.rank, settings.alpha, settings.dropout, settings.targets), talan if settings.talan else None


def build_model(settings: Settings, device: torch.device) -> Transformer:
    """The backbone with adapter and side path attached as the settings say. Raises ValueError."""
    dtype = choose_dtype(settings.dtype, device)
    if settings.scope == "full" and settings.fsdp:
        raise ValueError("--fsdp cuts frozen weights only, and --scope full freezes none: leave one of them out")
    if settings.scope == "full" and dtype != torch.float32:
        raise ValueError(f"scope full trains the backbone, whose weights must then be float32, found {dtype}: use --dtype float32")
    adapter, talan = parts(settings)
    model = load_model(settings.backbone, "cpu" if settings.fsdp else device, dtype)  # FSDP moves it block by block
    attach(model, adapter, talan, settings.scope, settings.seed)
    return model


def compile_blocks(model: Transformer) -> None:
    """torch.compile each block, in place: all have the code of the first, so a deep model compiles as fast as a shallow one."""
    for block in model.model.layers:
        block.compile(dynamic=True)


def parse_layers(words: Sequence[str]) -> tuple[int | float, ...]:
    """"7" is an index, "0.5" a share of the depth. Raises ValueError that lists every word which is neither."""
    wrong = [word for word in words if not re.fullmatch(r"\d+|0?\.\d+", word)]
    if wrong:
        raise ValueError(f"layers: expected indices from 0 or fractions such as 0.5, found {', '.join(wrong)}")
    return tuple(float(word) if "." in word else int(word) for word in words)


def build_optimizer(model: Transformer, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; the side path in a group of its own, whose rate is talan_lr_scale times the other."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in named if (group_of(name) == "side path") == side], "lr_scale": scale}
              for side, scale in ((False, 1.0), (True, settings.talan_lr_scale))]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Rate of step 1..steps: linear over the first warmup * steps, then a half cosine from lr to min_lr * lr."""
    rise = max(1, round(settings.warmup * steps))
    if step <= rise:
        return settings.lr * step / rise
    progress = (step - rise) / max(1, steps - rise)
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def save_checkpoint(run: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW) -> None:
    """RUN/step-N, complete or absent: adapter and side path (scope full: the weights), optimizer state. Older ones are removed."""
    sync(run / "metrics.jsonl")  # a checkpoint never knows more steps than the metrics
    with atomic(run / f"step-{step:07d}") as tmp:
        if any(group_of(name) == "backbone" and p.requires_grad for name, p in model.named_parameters()):
            model.source = str(run)  # what the adapter beside it belongs to
            save_model(model, tmp, backbone_only=True)
        if attached(model):
            save_adapter(model, tmp)
        state = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                state[f"parameter.{name}"] = p.detach().cpu()
                state |= {f"{key}.{name}": value.cpu() for key, value in optimizer.state[p].items()}
        save_file(state, tmp / "train_state.safetensors")
        (tmp / "train_state.json").write_text(json.dumps({"format": 1, "step": step}) + "\n")
    for old in sorted(run.glob("step-*"))[:-1]:
        remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it is never seen half deleted."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def load_checkpoint(run: Path, model: Transformer, optimizer: torch.optim.AdamW) -> int:
    """Put parameters and optimizer state of the newest checkpoint into model and optimizer; returns its step, 0 without one.

    Raises ValueError, with both untouched, when it is of another format, not readable, or of other tensors.
    """
    folder = checkpoint_folder(run)
    if not (folder / "train_state.json").exists():
        return 0
    info = read_json(folder / "train_state.json")
    if info.get("format") != 1 or type(info.get("step")) is not int or info["step"] < 1:
        raise ValueError(f"{folder}: train_state of format {info.get('format')!r} at step {info.get('step')!r}, this code reads format 1 from step 1")
    found = tensor_info(folder / "train_state.safetensors")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moved = [name for name in named if f"step.{name}" in found]  # a parameter that never had a gradient has no moments
    want: dict[str, Tensor] = {f"parameter.{name}": p for name, p in named.items()}
    want |= {f"{key}.{name}": torch.zeros(()) if key == "step" else named[name] for name in moved for key in MOMENTS}
    raise_all(f"{folder}: train_state does not fit these settings", tensor_problems(want, found))
    state = load_file(folder / "train_state.safetensors")
    for name, p in named.items():
        p.data.copy_(state[f"parameter.{name}"])
        if name in moved:
            optimizer.state[p] = {key: state[f"{key}.{name}"].to(p.device) for key in MOMENTS}
    return info["step"]


def finish_run(run: Path) -> None:
    """Move the last checkpoint's files up into the run folder. While a step folder exists, it is the one that counts."""
    folder = checkpoint_folder(run)
    if folder == run:
        return
    for file in folder.iterdir():
        with atomic(run / file.name) as tmp:
            shutil.copyfile(file, tmp)
    for old in sorted(run.glob("step-*")):
        remove_folder(old)


class Metrics:
    """metrics.jsonl of a run: one JSON object a line, appended at once; a resumed run drops what lies past its checkpoint."""

    def __init__(self, run: Path, step: int, writes: bool = True) -> None:
        self.file, self.writes = run / "metrics.jsonl", writes
        if not writes:
            return
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        with atomic(self.file) as tmp:
            tmp.write_text("".join(line + "\n" for line in lines if self.keeps(line, step)))

    @staticmethod
    def keeps(line: str, step: int) -> bool:
        """Is this a whole line about a step that the checkpoint has?"""
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            return json.loads(line).get("step", 0) <= step
        return False

    def write(self, **values: Any) -> None:
        """Append a line. Raises OSError, with the file as it was, when the disk has no room for all of it."""
        if not self.writes:
            return
        before = self.file.stat().st_size
        try:
            with open(self.file, "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError:
            os.truncate(self.file, before)
            raise


class Interrupt:
    """Ctrl-C or SIGTERM: once, finish the step and save; twice, stop now. `close` puts back what was there before."""

    def __init__(self) -> None:
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        print("\nfinishing the step and saving; once more stops at once", file=sys.stderr)
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)


TAKEN = "exists; --resume goes on with it, --overwrite deletes the run in it"


def free_folder() -> str:
    """The next free runs/NUMBER."""
    return next(f"runs/{n}" for n in range(1, 1 << 30) if not Path(f"runs/{n}").exists())


def choose_run(settings: Settings, explicit: dict[str, Any]) -> tuple[Path, Settings]:
    """The run folder and the settings that hold: those stored, when a run is resumed. Writes nothing. Raises ValueError."""
    run = Path(settings.out or free_folder())
    stored = run / "settings.json"
    if not settings.resume or not stored.exists():
        taken = run.exists() and (not run.is_dir() or any(not file.match(".settings.json.*.tmp") for file in run.iterdir()))
        if taken and not settings.dry_run and not (settings.overwrite and stored.exists()):
            raise ValueError(f"{run}: {TAKEN if stored.exists() else 'exists; it holds no run, so it is neither resumed nor overwritten'}")
        return run, settings
    saved = restore(read_json(stored), stored)
    differ = [f"{k}: this command says {v}, the run has {getattr(saved, k)}" for k, v in explicit.items()
              if k not in ("out", "resume", "overwrite") and v != getattr(saved, k)]
    if differ:
        raise ValueError(f"{run}: cannot resume with other settings:\n  " + "\n  ".join(differ))
    return run, replace(saved, resume=True)


def same_kind(value: Any, usual: Any) -> bool:
    """Is this a value that the setting may have, going by its default?"""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and all(isinstance(x, str) for x in value)
    return type(value) is type(usual) or (type(value), type(usual)) == (int, float)


def make_run(run: Path, settings: Settings) -> Path:
    """Make the run folder, and clear what a killed run left half written or half deleted; returns it. When another start has made it by
    now, the next free one without --out, else raises ValueError."""
    if settings.overwrite and run.exists():
        remove_folder(run)
    if not settings.resume or not (run / "settings.json").exists():
        if settings.resume:
            print(f"{run}: nothing to resume, starting at step 0")
        try:
            write_once(run / "settings.json", json.dumps(asdict(kept(settings)), indent=2) + "\n")
        except FileExistsError:
            if settings.out:
                raise ValueError(f"{run}: {TAKEN}") from None
            return make_run(Path(free_folder()), settings)
    for leftover in [*run.glob(".*.tmp"), *run.glob(".*.old"), *run.parent.glob(f".{run.name}.*.old")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return run


def write_once(file: Path, text: str) -> None:
    """Write the file, whole or not at all. Raises FileExistsError when it is there, though another process wrote it just now."""
    with atomic(file) as tmp:
        tmp.write_text(text)
        try:
            sync(tmp)
            os.link(tmp, file)  # which refuses to replace, as the rename that follows would not
        except OSError:
            if file.exists():
                raise FileExistsError(file) from None  # else this file system has no links


def kept(settings: Settings) -> Settings:
    """The settings as a run keeps them: without those that say how this command came to it."""
    return replace(settings, resume=False, overwrite=False, repeat="")


def restore(saved: dict[str, Any], where: str | Path) -> Settings:
    """Settings from JSON, lists as tuples. Raises ValueError that lists what is no setting of this version, by name or by type."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    usual = asdict(Settings())
    if wrong := [f"{k}: {v!r}" for k, v in values.items() if k not in usual or not same_kind(v, usual[k])]:
        raise ValueError(f"{where}: expected the settings of a run of this version, found {', '.join(wrong)}")
    return Settings(**values)


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """Where the run folder is written to. Raises ValueError that names it when the disk is full, read-only, ..."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{run}: cannot be written: {error}; what it holds already is whole, and --resume goes on from there") from None


def recorded_settings(explicit: dict[str, Any]) -> Settings:
    """The settings of the run that --repeat names. Raises ValueError when it has no record, or another flag is given."""
    run, others = explicit["repeat"], sorted(set(explicit) - {"repeat", "out"})
    if others:
        raise ValueError(f"--repeat takes every setting from the record of {run}; leave out {', '.join('--' + k.replace('_', '-') for k in others)}")
    record = read_record(Path(run))
    if not record:
        raise ValueError(f"{run}: has no metrics.jsonl that begins with the record of a run")
    return replace(restore(record["settings"], run), **{"out": ""} | explicit)


def stop_nonfinite(run: Path, step: int, model: Transformer, rows: dict[int, Row], loss: float, norm: float, device: Any, ranks: Ranks) -> NoReturn:
    """Raise ValueError that names RUN/nonfinite-step-N, the only thing written. Its step.json has loss and gradient norm of the step, and
    number, token ids and loss in eval mode of each row; gradients.safetensors the gradients before clipping whose norm is not finite."""
    folder = run / f"nonfinite-step-{step:07d}"
    gradients = {name: p.grad.cpu().contiguous() for name, p in model.named_parameters() if p.grad is not None and not p.grad.norm().isfinite()}
    losses = {n: mean_loss(model, [row], len(row.ids), device) for n, row in rows.items()}
    if folder.exists() and ranks.first:
        remove_folder(folder)
    with atomic(folder) if ranks.first else contextlib.nullcontext() as tmp:
        if tmp:
            tmp.mkdir()
            save_file(gradients, tmp / "gradients.safetensors")
            info = {"step": step, "loss": str(loss), "grad_norm": str(norm), "gradients": sorted(gradients),
                    "rows": [{"row": n, "loss": str(losses[n]), "ids": row.ids} for n, row in rows.items()]}  # as text: JSON has no nan
            (tmp / "step.json").write_text(json.dumps(info) + "\n")
    ranks.wait()  # torchrun ends all processes as soon as one fails
    raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}: stopped before the weights changed; its rows and gradients are in "
                     f"{folder}; the last checkpoint is as it was")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

def train(settings: Settings, run: Path, model: Transformer, rows: list[Row], dev: list[Row], device: torch.device,
          interrupt: Interrupt, record: dict[str, Any], ranks: Ranks) -> bool:
    """Train from the newest checkpoint in `run` to the last step; False when interrupted. The loss of a step is sum over its supervised
    tokens / their number, over all its micro-batches and processes. Raises ValueError before a step that is not finite."""
    idle = [p for name, p in model.named_parameters() if settings.grad_scale == 0 and group_of(name) == "side path"]
    forward = spread(model, model.model.layers, ranks, device, settings.fsdp, idle)
    optimizer = build_optimizer(model, settings)
    first = load_checkpoint(run, model, optimizer)
    metrics = Metrics(run, first or -1, ranks.first)
    widths, labels = [row.width for row in rows], [sum(row.supervised[1:]) for row in rows]
    steps = settings.steps or max(1, round(settings.epochs * len(plan_epoch(widths, settings.step_tokens, 0, settings.seed, 0))))
    if first > steps:
        raise ValueError(f"{run}: its checkpoint is of step {first:,}, but the run has {steps:,} steps")
    budget = micro_budget(settings, ranks)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if settings.compile:
        compile_blocks(model)
    if first == 0:
        metrics.write(kind="run", step=0, **record, steps=steps, trainable=sum(p.numel() for p in trainable))
        metrics.write(kind="dev", step=0, loss=mean_loss(model, dev, budget, device, ranks))
    plan = plan_steps(widths, settings, budget)
    for _ in range(first):
        next(plan)
    bar = tqdm(initial=first, total=steps, desc="train", unit="step", disable=None if ranks.first else True)
    model.train()
    for step in range(first + 1, steps + 1):
        started, micros = time.perf_counter(), next(plan)
        torch.manual_seed(dropout_seed(settings.seed, step, ranks))  # the global stream serves dropout alone
        batches = [make_batch([rows[n] for n in micro], device) for micro in ranks.share(micros, [])]
        count, tokens = sum(labels[n] for micro in micros for n in micro), sum(len(micro) * max(widths[n] for n in micro) for micro in micros)
        total = add_gradients(forward, model, batches, count, ranks)
        size = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
        sums = ranks.sum(torch.stack((total, total.new_full((), interrupt.asked))))
        mean, asked, norm = torch.cat((sums, size[None])).tolist()  # the only wait for the device in a step
        mean /= count
        if not math.isfinite(mean) or not math.isfinite(norm):
            stop_nonfinite(run, step, model, {n: rows[n] for micro in micros for n in micro}, mean, norm, device, ranks)
        nn.utils.clip_grads_with_norm_(trainable, settings.clip or math.inf, size)
        rate = learning_rate(step, steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        metrics.write(kind="step", step=step, loss=mean, lr=rate, grad_norm=norm, tokens=tokens, supervised=count, seconds=round(seconds, 4))
        bar.update()
        bar.set_postfix_str(f"loss {mean:.4f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        stop = bool(asked) or ranks.world == 1 and interrupt.asked
        last = step == steps or stop
        if settings.log_every and (step % settings.log_every == 0 or last):
            tqdm.write(f"step {step}/{steps}  loss {mean:.4f}  lr {rate:.2e}  norm {norm:.3f}  {tokens / seconds:,.0f} tokens/s")
        if step == steps or settings.eval_every and step % settings.eval_every == 0:
            metrics.write(kind="dev", step=step, loss=(dev_loss := mean_loss(model, dev, budget, device, ranks)))
            tqdm.write(f"step {step}/{steps}  held-out loss {dev_loss:.4f}")
        if ranks.first and (last or settings.save_every and step % settings.save_every == 0):
            save_checkpoint(run, step, model, optimizer)
        if stop and step < steps:
            return False
    bar.close()
    return True


def micro_budget(settings: Settings, ranks: Ranks) -> int:
    """Tokens of a micro-batch: as asked for, else an equal part of the step for each process."""
    return settings.micro_tokens or -(-settings.step_tokens // ranks.world)


def dropout_seed(seed: int, step: int, ranks: Ranks) -> int:
    """A seed for each step and process; that of process 0 is that of a run in one process."""
    return generator(seed, "dropout", step, *[ranks.rank] * (not ranks.first)).initial_seed()


def split_dev(rows: list[Row], settings: Settings) -> tuple[list[Row], list[Row]]:
    """(training rows, --dev-rows rows held out by their own seeded draw). Raises ValueError when nothing is left."""
    if not 0 < settings.dev_rows < len(rows):
        raise ValueError(f"dev_rows: expected 1 to {len(rows) - 1} of the {len(rows)} usable rows, found {settings.dev_rows}")
    held = set(torch.randperm(len(rows), generator=generator(settings.seed, "dev"))[:settings.dev_rows].tolist())
    return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]


def show_batch(rows: Sequence[Row], tokenizer: Tokenizer) -> str:
    """Rows decoded, each run of supervised tokens between [[ and ]]."""
    lines = []
    for row in rows:
        text, start = "", 0
        for end in range(1, len(row.ids) + 1):
            if end == len(row.ids) or row.supervised[end] != row.supervised[start]:
                part = tokenizer.decode(row.ids[start:end])
                text, start = text + (f"[[{part}]]" if row.supervised[start] else part), end
        lines.append(text)
    return "\n---\n".join(lines)


def dry_run(settings: Settings, model: Transformer, tokenizer: Tokenizer, rows: list[Row]) -> None:
    """Print settings, parameters, token counts and the first step's first micro-batch with its supervised tokens marked."""
    print(json.dumps(asdict(settings), indent=2))
    print(report(model))
    tokens, supervised = sum(len(row.ids) for row in rows), sum(sum(row.supervised) for row in rows)
    epoch = plan_epoch([row.width for row in rows], settings.step_tokens, settings.micro_tokens, settings.seed, 0)
    print(f"{len(rows):,} rows, {tokens:,} tokens, {supervised:,} supervised ({100 * supervised / tokens:.1f} %), {len(epoch):,} steps an epoch")
    print(f"first micro-batch of {len(epoch[0])}, supervised tokens in [[ ]]:\n" + show_batch([rows[n] for n in epoch[0][0]], tokenizer))


def scoring(settings: Settings, out: Path, run: Path | None = None) -> EvalSettings:
    """How the backbone, or the run in this folder, is scored; each of several processes finds its own device."""
    trained = {"backbone": str(run)} if run and settings.scope == "full" else {}
    trained |= {"adapter": str(run)} if run and (settings.talan or settings.adapter != "none") else {}
    common: dict[str, Any] = {"backbone": settings.backbone, "tasks": settings.tasks, "limit": settings.limit, "device": settings.device,
                              "dtype": settings.dtype, "allow_code_execution": settings.allow_code_execution}
    return EvalSettings(**(common | trained), out=str(out))


def score_run(settings: Settings, run: Path) -> None:
    """Score the backbone and the saved run on the tasks; print and keep the table."""
    base = score(scoring(settings, run / "eval-base"))
    adapted = score(scoring(settings, run / "eval-adapted", run))
    print(compare_table(base, adapted))


def set_deterministic(settings: Settings) -> None:
    """--deterministic, for all that this process computes from now on."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first product
        torch.use_deterministic_algorithms(True)


def main(explicit: dict[str, Any], part: bool = False) -> None:
    """Open the run, load, train, save, score (a part of a sweep: not). Raises ValueError on bad input, SystemExit(130) when interrupted."""
    settings = recorded_settings(explicit) if explicit.get("repeat") else Settings(**explicit)
    if {"paired", "seeds", "lrs", "paired_control", "vary"} & set(explicit):
        from data.sweep import sweep

        return sweep(explicit)
    ranks = open_ranks()
    run, settings = ranks.from_first(lambda: choose_run(settings, explicit))
    set_deterministic(settings)
    if settings.fsdp and ranks.world == 1:
        raise ValueError("--fsdp cuts the backbone over several processes; start them with: torchrun --nproc-per-node N train.py ...")
    device = choose_device(ranks.device(settings.device))
    keep_freed_memory()
    if settings.tasks != ("none",):
        tasks = find_tasks(settings.tasks)
        check_permission(tasks, settings.allow_code_execution)
        for task in tasks:
            load_items(task)  # a bad task file must not be found out after hours of training
    tokenizer = load_tokenizer(settings.backbone)
    model = build_model(settings, device)
    print(f"backbone {settings.backbone} on {device} in {model.head_weight.dtype}\n{report(model)}")
    rows, dev = load_data(settings, tokenizer, None if ranks.first else True)
    if settings.dry_run:
        return dry_run(settings, model, tokenizer, rows)
    record = ranks.from_first(lambda: describe(asdict(kept(settings)), settings.data + settings.dev_data, model, device, ranks.world))
    if settings.repeat or read_record(run) and settings.resume:
        ranks.from_first(lambda: check_record(settings.repeat or run, read_record(Path(settings.repeat or run)), record))
    with writing(run):
        run = ranks.from_first(lambda: make_run(run, settings))
    with writing(run):
        print(f"run folder: {run}" + (f", {ranks.world} processes" if ranks.world > 1 else ""))
        model.checkpointing = settings.checkpointing
        with contextlib.closing(Interrupt()) as interrupt:
            finished = train(settings, run, model, rows, dev, device, interrupt, record, ranks)
        ranks.wait()  # none still reads a checkpoint
        if finished and ranks.first:
            finish_run(run)
        ranks.wait()
    if not finished or part and interrupt.asked:
        raise SystemExit(130)
    if settings.tasks != ("none",) and not part:
        del model  # scoring loads another
        score_run(settings, run)
    print(f"wrote {run}")


if __name__ == "__main__":
    try:
        main(GIVEN)
        close_ranks()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
