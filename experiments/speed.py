"""Time, memory and parameters, ours beside transformers + peft: python -m experiments.speed --help.

Each library lives in a process of its own. The parent asks one at a time for one call, A B B A,
while the other sleeps on its pipe: both meet the machine at the same pace, and only neighbouring
calls are compared. A ratio is the median over the rounds, in brackets their 5-95 % spread.

Shapes: B rows, T tokens of a row, D hidden size, F MLP width, H query heads, K key/value heads,
        Dh head size, L layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from common import ROOT, Record, check_numbers, choose_device, choose_dtype, generator, read_json
from common import keep_freed_memory, read_lines, run_header, run_script, setting, write_json
from eval import recorded_backbone, table
from model import ModelConfig, Transformer, generate, load_model
from talan import TARGETS, AdapterConfig, TalanConfig, attach, group_of, load_adapter, merge_adapter

COLUMNS = (
    "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " intermediate_size vocab_size tie_word_embeddings rope_theta"
).split()
SHAPES = {
    "Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 1e6),
    "Qwen3-1.7B": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True, 1e6),
    "Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True, 1e6),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, 1e6),
    "Qwen3-14B": ("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False, 1e6),
    "Qwen3-32B": ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 1e6),
    "Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 5e5),
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 1e5),
}
TINY = dict(zip(COLUMNS[1:8], (64, 2, 4, 2, 16, 96, 512)))  # --tiny makes this of every shape
SMOLLM2, EMBEDDED = ROOT / "data/smollm2/model", ROOT / "data/tiny/model"
KINDS: dict[str, Record] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
PARTS = "count memory train load generate side losses compile profile".split()  # in this order
SIDE, ALONE = " + side path", "side path alone"
RANK, LABELLED = 16, 0.62  # on all seven projections; share of the tokens that have a label
PROMPT, DECODED = 160, 64  # with 8 more these stay within 256 positions: one CUDA graph
SIDE_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BEGAN = time.monotonic()


@dataclass(frozen=True)
class Settings:
    """Time ours and theirs in turns, each target marked met or not. A GPU has other defaults."""

    device: str = setting("cpu", "cpu or cuda")
    backbones: tuple[str, ...] = setting((str(SMOLLM2),), "folders, or shapes with random weights")
    tiny: bool = setting(False, "make every shape tiny, to try the command itself")
    dtype: str = setting("auto", "of the backbone: float32, bfloat16; auto: bfloat16 on a GPU")
    parts: tuple[str, ...] = setting(tuple(PARTS[:6]), f"some of {', '.join(PARTS)}")
    before: str = setting("", "train: compare with this checkout of the project, not with theirs")
    kinds: tuple[str, ...] = setting(tuple(KINDS), "adapters, without and with the side path")
    lengths: tuple[int, ...] = setting((256, 1024, 4096), "tokens a row; targets are for the first")
    tokens: int = setting(2048, "tokens of a step, at least one row; of DoRA on a GPU the half")
    rounds: int = setting(5, "timed rounds; rows n times as long get 1 / sqrt(n) of them")
    batch_rows: int = setting(16, "rows generated at once; four times as many ragged prompts")
    new_tokens: int = setting(128, "the longest answer; the median is a third of it")
    clock: str = setting("wall", "wall, or cpu: seconds of the process's own threads together")
    run: str = setting("", "count: a run folder too")
    steps: int = setting(200, "losses: steps of train.py, on the device and once on the CPU")
    minutes: float = setting(0.0, "leave out what is not done by then; 0: no limit")
    out: str = setting("runs/speed", "folder for speed.json")

    def __post_init__(self) -> None:
        if not all(str(length).isdecimal() and int(length) > 1 for length in self.lengths):
            raise ValueError(f"lengths: expected whole numbers from 2, found {self.lengths}")
        object.__setattr__(self, "lengths", tuple(map(int, self.lengths)))
        for name, allowed in (("parts", PARTS), ("kinds", tuple(KINDS))):
            if not set(getattr(self, name)) <= set(allowed):
                found = ", ".join(getattr(self, name))
                raise ValueError(f"{name}: expected some of {', '.join(allowed)}, found {found}")
        check_numbers(self, tokens=1, rounds=1, batch_rows=1, new_tokens=4, steps=1, minutes=0)
        if self.clock not in ("wall", "cpu") or self.clock == "cpu" and self.device != "cpu":
            raise ValueError(f"clock: expected wall, or on a CPU cpu, found {self.clock}")


ON_GPU: Record = {
    "backbones": ("Qwen3-0.6B", "Qwen3-4B"),
    "kinds": ("lora", "dora"),
    "minutes": 8.5,
}
ON_GPU |= {"lengths": (1024,), "tokens": 4096, "batch_rows": 64, "rounds": 3, "parts": PARTS[2:]}


def read_config(name: str, tiny: bool) -> Record:
    """config.json of a folder, or of a name in SHAPES. Raises ValueError."""
    if name in SHAPES:
        return dict(zip(COLUMNS, SHAPES[name])) | (TINY if tiny else {})
    if not (Path(name) / "config.json").exists():
        wanted = f"a folder with config.json, or one of {', '.join(SHAPES)}"
        raise ValueError(f"backbones: expected {wanted}, found {name}")
    return read_json(Path(name) / "config.json")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random weights, drawn on their device by their names: the same in both libraries."""
    for name, p in model.named_parameters():
        g = torch.Generator(p.device).manual_seed(generator(name).initial_seed())
        p.normal_(0, 0.02, generator=g).add_(1 if p.dim() == 1 else 0)


def random_rows(vocabulary: int, rows: int, length: int, n: int) -> list[list[int]]:
    """Ids of batch n (rows,length)."""
    return np.random.default_rng([length, n]).integers(vocabulary, size=(rows, length)).tolist()


def ragged_prompts(vocabulary: int, n: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """n prompts of 16 to 256 tokens, shortest first; log-normal numbers of tokens to answer."""
    rng = np.random.default_rng(1)
    sizes = np.sort(np.clip(80 * np.exp(0.6 * rng.standard_normal(n)), 16, 256).astype(int))
    stops = np.clip(longest / 3 * np.exp(0.7 * rng.standard_normal(n)), 4, longest).astype(int)
    return [rng.integers(vocabulary, size=size).tolist() for size in sizes], stops.tolist()


# ---- the two sides, each in its own process ----


class Side:
    """One library: clock, peak memory, a training step, answers. Theirs and Ours say how."""

    model: Any  # with trainable and optimizer: for `prepare` to set
    trainable: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    read: Callable[[], Any]  # -> backbone
    switch: Callable[[str], Any]  # variant -> model
    loss: Callable[[Any, list[list[int]], list[bool]], Tensor]  # (model, rows, which are labels)
    answers: Callable[[Any, list[list[int]], list[int]], list[list[int]]]  # (.., prompts, tokens)

    def __init__(self, settings: Settings, backbone: str) -> None:
        self.settings, self.backbone = settings, backbone
        self.config = read_config(backbone, settings.tiny)
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        self.on_gpu = self.device.type == "cuda"

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, what the call returns); on a GPU between two events in its queue."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            value = call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3, value
        clock = time.process_time if self.settings.clock == "cpu" else time.perf_counter
        began = clock()
        value = call()
        return clock() - began, value

    def ready(self) -> None:
        """A step with zero gradients makes the optimizer's state and moves nothing."""
        for p in self.trainable:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.model.train()

    def update(self, model: Any, ids: list[list[int]]) -> tuple[float, float]:
        """One training step; returns loss and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        first = round((1 - LABELLED) * len(ids[0]))  # the last tokens are labels, as after a prompt
        loss = self.loss(model, ids, [t >= first for t in range(len(ids[0]))])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        return loss.item(), norm.item()

    def step(self, n: int, rows: int, length: int, variant: str) -> Record:
        """Seconds, loss, gradient norm and peak bytes of a training step on batch n.

        Bytes are those resident in this process so far; on a GPU those allocated in the step, and
        an untimed step fills the allocator before, which is emptied for the other process.
        """
        model = self.switch(variant)
        ids = random_rows(self.config["vocab_size"], rows, length, n)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        runs = [self.timed(partial(self.update, model, ids)) for _ in range(1 + self.on_gpu)]
        self.optimizer.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resident_peak()
        if self.on_gpu:
            torch.cuda.empty_cache()
        (loss, norm), seconds = runs[0][1], runs[-1][0]
        return {"seconds": seconds, "loss": loss, "norm": norm, "peak": peak}

    def load(self, n: int) -> Record:
        """Seconds to load and answer with one token, which reads every weight."""
        seconds, _ = self.timed(lambda: self.answers(self.read(), [[1]], [1]))
        return {"seconds": seconds, "peak": resident_peak()}

    def ragged(self, n: int, variant: str) -> Record:
        """Seconds to answer all ragged prompts, each with as many tokens as it is given."""
        count, model = 4 * self.settings.batch_rows, self.switch(variant)
        asked = ragged_prompts(self.config["vocab_size"], count, self.settings.new_tokens)
        seconds, rows = self.timed(lambda: self.answers(model, *asked))
        if [len(row) for row in rows] != asked[1]:
            raise ValueError(f"expected answers of {asked[1]} tokens, found {rows}")
        return {"seconds": seconds, "rows": rows}

    def inference(self, n: int, rows: int, length: int, variant: str) -> Record:
        """Seconds of a prefill (rows,length), and of a token decoded in each row after it."""
        model, spent = self.switch(variant), []
        ids = random_rows(self.config["vocab_size"], rows, length, n)
        for tokens in (1, 8, 8 + DECODED):
            spent.append(self.timed(partial(self.answers, model, ids, [tokens] * rows))[0])
        return {"prefill": spent[0], "decode": (spent[2] - spent[1]) / DECODED}

    def observe(self, rows: int, length: int, variant: str, tokens: int = 0) -> Record:
        """Kernels, waits of the host, shares of the time by operation: a step, or tokens decoded.

        On a GPU of its kernels' time alone; on a CPU operations are counted, and no waits.
        """
        call = partial(self.step, 0, rows, length, variant)
        if tokens:
            ids = random_rows(self.config["vocab_size"], rows, length, 0)
            call = partial(self.answers, self.switch(variant), ids, [tokens] * rows)
        call()
        with torch.profiler.profile() as profiler:
            call()
        events, spent = list(profiler.events()), {}
        waits = sum(bool(re.match("cuda.*Synchronize", e.name)) for e in events)
        work = [e for e in events if (e.device_type.name == "CPU") != self.on_gpu]
        work = [e for e in work if not e.cpu_children]
        for e in work:
            own = e.device_time_total if self.on_gpu else e.self_cpu_time_total
            spent[e.name[:60]] = spent.get(e.name[:60], 0) + own
        names = sorted(spent, key=spent.__getitem__, reverse=True)[:10]
        shares = {name: spent[name] / sum(spent.values()) for name in names}
        return {"kernels": len(work), "waits": waits, "shares": shares}

    def machine(self) -> Record:
        """FLOPs a second of a matrix product, bytes a second that a copy reads and writes."""
        n, size, times = (8192, 1 << 28, 10) if self.on_gpu else (2048, 1 << 25, 1)
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        source = torch.ones(size, device=self.device)
        calls = partial(torch.mm, a, a), partial(torch.empty_like(source).copy_, source)
        best = []
        for call in calls:
            runs = [self.timed(partial(repeat, call, times))[0] for _ in range(6)]
            best.append(min(runs) / times)
        return {"flops": 2 * n**3 / best[0], "bytes": 2 * source.nbytes / best[1]}


class Theirs(Side):
    """transformers + peft: sdpa, no cache and no dropout in training, fused AdamW."""

    def read(self) -> Any:
        """The backbone."""
        from transformers import AutoConfig, AutoModelForCausalLM

        options = {"dtype": self.dtype, "attn_implementation": "sdpa"}
        if self.backbone not in SHAPES:
            model: Any = AutoModelForCausalLM.from_pretrained(self.backbone, **options)
            return model.to(self.device)
        with self.device:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config), **options)
        randomize(model)
        return model.eval()

    def prepare(self, kind: str, folder: str) -> None:
        """The backbone, and unless kind is none an adapter, saved for the other side."""
        self.model = self.read()
        if kind == "none":
            return
        from peft import LoraConfig, get_peft_model

        options = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, **KINDS[kind]}
        options |= {"task_type": "CAUSAL_LM", "target_modules": list(TARGETS)}
        torch.manual_seed(0)
        self.model = get_peft_model(self.model, LoraConfig(**options))
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        for name, p in self.model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(p, 0, 0.02)  # left zero, as after a step
        self.model.save_pretrained(folder)
        self.optimizer = torch.optim.AdamW(self.trainable, 1e-4, weight_decay=0.0, fused=True)
        self.compiled = torch.compile(self.model)  # torch compiles it within its first step
        self.ready()

    def switch(self, variant: str) -> Any:
        """The model, compiled or not."""
        return self.compiled if "compiled" in variant else self.model

    def loss(self, model: Any, rows: list[list[int]], labelled: list[bool]) -> Tensor:
        """Mean over the labelled tokens, as transformers computes it."""
        tokens = torch.tensor(rows, device=self.device)
        labels = tokens.masked_fill(~torch.tensor(labelled, device=self.device), -100)
        return model(input_ids=tokens, labels=labels, use_cache=False).loss

    def answers(self, model: Any, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
        """Batches in order, padded on the left, each until its last row is done."""
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        out, size = [], self.settings.batch_rows
        for start in range(0, len(prompts), size):
            rows, wanted = prompts[start : start + size], stops[start : start + size]
            longest = max(map(len, rows))
            tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[t >= longest - len(row) for t in range(longest)] for row in rows])
            options = {"do_sample": False, "max_new_tokens": max(wanted)}
            options |= {"attention_mask": mask.long().to(self.device)}
            found = model.generate(tokens.to(self.device), **options)[:, longest:].tolist()
            out += [row[:stop] for row, stop in zip(found, wanted)]
        return out
