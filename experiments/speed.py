"""Time, memory and parameters, ours beside transformers + peft: python -m experiments.speed --help.

Each library lives in a process of its own. The parent asks one at a time for one call, A B B A,
while the other sleeps: both meet the machine at the same pace, and only neighbouring calls are
compared. speed.json has the shapes, what is compared with what, and the targets.

Shapes: B rows, T tokens, D hidden size, H query and K key/value heads of size Dh, L layers.
"""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import ROOT, Record, check_numbers, choose_device, choose_dtype, generator, read_json
from common import keep_freed_memory, read_lines, run_header, run_script, setting, write_json
from eval import table
from model import ModelConfig, Transformer, load_model
from talan import TARGETS, AdapterConfig, TalanConfig, attach, group_of, load_adapter
from talan import recorded_backbone

DATA = read_json(Path(__file__).with_suffix(".json"))
SHAPES = {name: dict(zip(DATA["columns"], values)) for name, values in DATA["shapes"].items()}
SMOLLM2, EMBEDDED = ROOT / "data/smollm2/model", ROOT / "data/tiny/model"
KINDS = tuple(DATA["kinds"])
DEVICES = ("cpu", "cuda")
PARTS = "count memory train load generate side losses profile".split()  # in this order
RANK, LABELLED = 16, 0.62  # on all seven projections; share of the tokens that have a label
PROMPT, DECODED = 160, 64  # with 8 more these stay within 256 positions: one CUDA graph
BEGAN = time.monotonic()
SPAWN = multiprocessing.get_context("spawn")
CHILD: Record = {}  # in a child: "side"
Ids = list[list[int]]


@dataclass(frozen=True)
class Settings:
    """Time ours and theirs in turns, each target marked met or not. A GPU has other defaults."""

    device: str = setting("cpu", "cpu or cuda")
    backbones: tuple[str, ...] = setting((str(SMOLLM2),), "folders or shapes; count: or runs")
    dtype: str = setting("auto", "of the backbone: float32, bfloat16; auto: bfloat16 on a GPU")
    parts: tuple[str, ...] = setting(tuple(PARTS[:6]), f"some of {', '.join(PARTS)}")
    before: str = setting("", "train: compare with this checkout of the project, not with theirs")
    kinds: tuple[str, ...] = setting(KINDS, "adapters, without and with the side path")
    compile: bool = setting(False, "train: LoRA on the first backbone compiled, too")
    length: int = setting(256, "tokens of a row in training")
    tokens: int = setting(2048, "tokens of a step, at least one row; of DoRA on a GPU the half")
    batch_rows: int = setting(16, "rows generated at once")
    rounds: int = setting(5, "timed rounds, after one that warms up")
    clock: str = setting("wall", "wall, or cpu: seconds of the process's own threads together")
    steps: int = setting(200, "losses: steps of train.py, on the device and once on the CPU")
    minutes: float = setting(0.0, "begin no part on a backbone after so many; 0: no limit")
    out: str = setting("runs/speed", "folder for speed.json")

    def __post_init__(self) -> None:
        choices = {"parts": PARTS, "kinds": KINDS, "device": DEVICES, "clock": ("wall", "cpu")}
        for name, allowed in choices.items():
            found = np.atleast_1d(getattr(self, name)).tolist()
            if not set(found) <= set(allowed):
                raise ValueError(f"{name}: expected some of {', '.join(allowed)}, found {found}")
        check_numbers(self, length=2, tokens=1, rounds=1, batch_rows=1, steps=1, minutes=0)


@torch.no_grad()
def randomize(model: Any) -> Any:
    """The model with weights drawn on their device by their names: the same in both libraries."""
    for name, p in model.named_parameters():
        g = torch.Generator(p.device).manual_seed(generator(name).initial_seed())
        p.normal_(0, 0.02, generator=g).add_(1 if p.dim() == 1 else 0)
    return model.eval()


# ---- the two sides, each in its own process: settings, backbone, kind of adapter, folder ----


class Theirs(SimpleNamespace):
    """transformers + peft: sdpa, no cache and no dropout in training, fused AdamW."""

    def read(self) -> Any:
        """The backbone."""
        from transformers import AutoConfig, AutoModelForCausalLM

        options = {"dtype": self.settings.dtype, "attn_implementation": "sdpa"}
        if self.backbone not in SHAPES:
            model: Any = AutoModelForCausalLM.from_pretrained(self.backbone, **options)
            return model.to(self.settings.device)
        with torch.device(self.settings.device):
            config = AutoConfig.for_model(**SHAPES[self.backbone])
            return randomize(AutoModelForCausalLM.from_config(config, **options))

    def build(self) -> None:
        """The backbone with an adapter, which is saved in the folder for the other side."""
        from peft import LoraConfig, get_peft_model

        options = {"r": RANK, "lora_alpha": 2 * RANK} | DATA["kinds"][self.kind]
        options |= {"task_type": "CAUSAL_LM", "target_modules": list(TARGETS)}
        torch.manual_seed(0)
        self.model: Any = get_peft_model(self.read(), LoraConfig(**options))
        for name, p in self.model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(p, 0, 0.02)  # left zero, as after a step
        self.model.save_pretrained(self.folder)
        base: Any = self.model.get_base_model()
        for block in base.model.layers if self.settings.compile else ():
            block.compile()  # within the first step; the whole model at once takes minutes
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, 1e-4, weight_decay=0.0, fused=True)

    def switch(self, variant: str) -> Any:
        """The model, from the first merged variant on merged."""
        if "merged" in variant and hasattr(self.model, "merge_and_unload"):
            self.model = self.model.merge_and_unload()
        return self.model

    def loss(self, model: Any, rows: Ids, labelled: list[bool]) -> Tensor:
        """Mean over the labelled tokens, as transformers computes it."""
        tokens = torch.tensor(rows, device=self.settings.device)
        labels = tokens.masked_fill(~torch.tensor(labelled, device=tokens.device), -100)
        return model(input_ids=tokens, labels=labels, use_cache=False).loss

    def answers(self, model: Any, prompts: Ids, stops: list[int]) -> Ids:
        """Batches in order, padded with 0 on the left, each until its last row is done."""
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        out, size, device = [], self.settings.batch_rows, self.settings.device
        for start in range(0, len(prompts), size):
            rows, wanted = map(torch.tensor, prompts[start:][:size]), stops[start:][:size]
            tokens = pad_sequence(list(rows), True, padding_side="left").to(device)  # (B,T)
            options = {"attention_mask": (tokens > 0).long(), "max_new_tokens": max(wanted)}
            found = model.generate(tokens, do_sample=False, **options)[:, tokens.shape[1] :]
            out += [row[:stop] for row, stop in zip(found.tolist(), wanted)]
        return out


class Ours(SimpleNamespace):
    """A checkout of this project, by its public names alone: also one from before."""

    def read(self) -> Any:
        """The backbone."""
        self.lib, self.talan, self.train = map(importlib.import_module, ("model", "talan", "train"))
        keep_freed_memory()  # as train.py does
        dtype, device = getattr(torch, self.settings.dtype), self.settings.device
        if self.backbone not in SHAPES:
            return self.lib.load_model(self.backbone, device, dtype)
        with torch.device("meta"):
            model = self.lib.Transformer(self.lib.ModelConfig.from_dict(SHAPES[self.backbone]))
        return randomize(model.to(dtype).to_empty(device=device))

    def build(self) -> None:
        """The backbone with a side path and an adapter, theirs if there is one."""
        self.model = self.read()
        adapter = self.talan.AdapterConfig(self.kind, RANK, 2 * RANK)
        self.trainable = self.talan.attach(self.model, adapter, self.talan.TalanConfig())
        named = dict(self.model.named_parameters())
        file = Path(self.folder) / "adapter_model.safetensors"
        for name, tensor in load_file(file).items() if file.exists() else ():
            name = name.removeprefix("base_model.model.").removesuffix(".weight")
            named[name].data.copy_(tensor)
        self.paths = [block.side_path for block in self.model.model.layers]
        for block in self.model.model.layers if self.settings.compile else ():
            block.compile(dynamic=True)  # as train.py --compile
        self.optimizer = self.train.build_optimizer(self.model, self.train.Settings(lr=1e-4))

    def switch(self, variant: str) -> Any:
        """The model, from the first merged variant on merged, with or without its side path."""
        if "merged" in variant and self.model.adapter_config.kind != "none":
            self.talan.merge_adapter(self.model)
        for block, path in zip(self.model.model.layers, self.paths):
            block.side_path = path if "+ side path" in variant else None
        return self.model

    def loss(self, model: Any, rows: Ids, labelled: list[bool]) -> Tensor:
        """train.py's batch and loss."""
        found = [self.train.Row(ids, labelled) for ids in rows]
        batch = self.train.make_batch(found, self.settings.device)
        return self.train.loss_sum(model, batch, model) / len(batch.targets)

    def answers(self, model: Any, prompts: Ids, stops: list[int]) -> Ids:
        """`generate` takes the longest prompt first, and of those as long the last: the k-th list
        of ids that it shows to `ended` is that of the k-th prompt from the end."""
        stops_left, rows = iter(stops[::-1]), self.settings.batch_rows
        stop: dict[int, int] = defaultdict(lambda: next(stops_left))
        options = {"batch_rows": rows, "ended": lambda ids: len(ids) >= stop[id(ids)]}
        return self.lib.generate(model, prompts, max(stops), **options)

    def alone(self, lengths: list[int], stops: list[int]) -> Callable[[], None]:
        """The side path by itself: forward + backward; or forward, then a token at a time, each
        with a copy of its own: in a step, too, the caches hold nothing of it."""
        path = next(filter(None, self.paths))
        path, *copies = (copy.deepcopy(path) for _ in range(max([1, *stops])))
        h = torch.randn(len(lengths), max(lengths), path.w_out.shape[0])  # (B,T,D)
        h = h.to(self.settings.device, self.model.head_weight.dtype).requires_grad_(not stops)
        real = torch.tensor(lengths, device=h.device)

        def run() -> None:
            with torch.set_grad_enabled(not stops):
                out, state = path(h, None, real)
                for each in copies:
                    state = each(h[:, :1], state, real.clamp(max=1))[1]
                if not stops:
                    out.sum().backward()

        return run


def task(side: Any, n: int, variant: str, lengths: list[int], stops: list[int]) -> Any:
    """What is timed: a training step on batch n of rows of these lengths; with stops, answering
    prompts of these lengths with so many tokens; with no lengths, loading and one token."""
    if not lengths:
        return lambda: side.answers(side.read(), [[1]], [1])
    if not hasattr(side, "model"):
        side.build()
    if variant.endswith("alone"):
        return side.alone(lengths, stops)
    torch.compiler.set_stance("default" if "compiled" in variant else "force_eager")
    model, rng = side.switch(variant), np.random.default_rng([n, *lengths])
    ids = [rng.integers(1, model.config.vocab_size, size=length).tolist() for length in lengths]
    return partial(side.answers, model, ids, stops) if stops else partial(update, side, model, ids)


def update(side: Any, model: Any, ids: Ids) -> list[float]:
    """One training step; returns loss and gradient norm."""
    first = round((1 - LABELLED) * len(ids[0]))  # the last tokens are labels, as after a prompt
    loss = side.loss(model, ids, [t >= first for t in range(len(ids[0]))])
    loss.backward()
    norm = nn.utils.clip_grad_norm_(side.trainable, 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    return torch.stack((loss.detach(), norm)).tolist()


def timed(call: Callable[[], Any], settings: Settings) -> tuple[float, Any]:
    """(seconds, what the call returns); on a GPU between two events in its queue."""
    if settings.device == "cpu":
        clock = time.process_time if settings.clock == "cpu" else time.perf_counter
        began, value = clock(), call()
        return clock() - began, value
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    value = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, value


def measure(side: Any, n: int, variant: str, lengths: list[int], runs: Ids) -> Record:
    """Phase -> seconds of the task with these stops; what the first returned; most bytes: resident
    in this process so far, on a GPU allocated within. Training that warms up, and a GPU's, where
    each process empties its allocator for the other, is done twice and timed once."""
    on_gpu = side.settings.device == "cuda"
    twice = not runs[0] and (n == 0 or on_gpu)
    calls = [task(side, n, variant, lengths, stops) for stops in runs * (1 + twice)]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = [timed(call, side.settings) for call in calls]
    resident = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * int(resident[0])
    torch.cuda.empty_cache()
    spent, phases = [seconds for seconds, _ in found[-len(runs) :]], {"": found[-1][0]}
    if len(runs) > 1:
        phases = {"prefill ": spent[0], "decode ": (spent[2] - spent[1]) / DECODED}
    return {"phases": phases, "value": None if runs[0] else found[0][1], "peak": peak}


def observe(side: Any, n: int, variant: str, lengths: list[int], runs: Ids) -> Record:
    """Kernels (on a CPU operations) and waits of the host in each run; the last one's time."""
    device, counts = "CPU" if side.settings.device == "cpu" else "CUDA", []
    for stops in runs:
        task(side, n, variant, lengths, stops)()
        call = task(side, n, variant, lengths, stops)
        with torch.profiler.profile() as profiler:
            call()
        events = profiler.key_averages()
        kernels = sum(e.count for e in events if e.device_type.name == device)
        counts.append([kernels, sum(e.count for e in events if "Synchronize" in e.key)])
    where = events.table(f"self_{device.lower()}_time_total", row_limit=12)
    return {"phases": {"": 0}, "text": f"kernels, waits in each run: {counts}\n{where}"}


def run_call(name: str, given: Record, call: Callable[..., Any], *args: Any) -> Any:
    """In a child: what the call returns for its side, which is made first; `before` has the other
    checkout's modules. Raises RuntimeError, which, unlike some, can be sent."""
    try:
        if not CHILD:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - till the end
            for module in list(sys.modules) if name == "before" else ():
                if module.split(".")[0] in ("common", "data", "eval", "model", "talan", "train"):
                    del sys.modules[module]
            sys.path.insert(0, given["settings"].before if name == "before" else str(ROOT))
            CHILD["side"] = Theirs(**given) if name == "theirs" else Ours(**given)
        return call(CHILD["side"], *args)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def in_turns(settings: Settings, part: str, backbone: str) -> dict[str, Record]:
    """what: variant -> seconds of each round, what the first call returned, most bytes after it.
    A B B A, after a round that warms up; a variant's first word names its process. What fails, as
    for lack of memory or of a compiler, is named and left out."""
    records: dict[str, Record] = {}
    call, rounds = (observe, 0) if part == "profile" else (measure, settings.rounds)
    for kind in settings.kinds if part in ("train", "profile") else ("lora",):
        tasks = plan(settings, part, kind)
        pools: Record = defaultdict(lambda: ProcessPoolExecutor(1, SPAWN))
        with tempfile.TemporaryDirectory() as folder:
            given = {"settings": settings, "backbone": backbone, "kind": kind, "folder": folder}
            for variant, *_ in tasks.values():
                pools[variant.split()[0]].submit(int)  # all start now
            for n in tqdm(range(rounds + 1), unit="round", leave=False, disable=None):
                for key in list(tasks)[::-1] if n % 2 else list(tasks):
                    name = tasks[key][0].split()[0]
                    try:
                        future = pools[name].submit(run_call, name, given, call, n, *tasks[key])
                        record = future.result()
                    except RuntimeError as error:
                        reason = str(error).strip().splitlines()[-1]
                        print(f"{key} is left out: {reason}", flush=True)
                        del tasks[key]
                        continue
                    for phase, seconds in record.pop("phases").items():
                        entry = records.setdefault(phase + key, {**record, "seconds": []})
                        entry["seconds"] += [seconds] if n else []
            for pool in pools.values():
                pool.shutdown()
    return {key: record for key, record in records.items() if len(record["seconds"]) == rounds}


def plan(settings: Settings, part: str, kind: str) -> dict[str, Any]:
    """what: variant -> variant, lengths, stops of each run; none: training, or loading."""
    T, named, cases = settings.length, DATA["variants"], dict[str, Any](load=[[], [[]]])
    variants = named["before" if settings.before and part == "train" else part]
    if part in ("train", "profile"):
        part_of = 2 if kind == "dora" and settings.device == "cuda" else 1
        B = max(1, settings.tokens // part_of // T)
        cases = {f"train {kind} {B} x {T}": [[T] * B, [[]]]}
        variants = variants + (named["compiled"] if settings.compile and kind == "lora" else [])
    if part == "profile":
        cases["8, then 24 tokens"] = [[PROMPT], [[8], [24]]]
    if part in ("generate", "side"):  # ragged: lengths, and log-normal numbers of tokens
        cases = {"64 ragged prompts": DATA["ragged"]} if part == "generate" else {}
        for B in (1, settings.batch_rows):
            cases[f"{B} x {PROMPT}"] = [[PROMPT] * B, [[1] * B, [8] * B, [8 + DECODED] * B]]
    tasks = {f"{what}: {v}": [v, *case] for what, case in cases.items() for v in variants}
    for length in DATA["side lengths"] if part == "side" else ():
        tasks[f"train 1 x {length}: {variants[-1]}"] = [variants[-1], [length], [[]]]
    return tasks


def machine(settings: Settings) -> Record:
    """FLOPs a second of a matrix product, bytes a second that a copy reads and writes."""
    n, size = (8192, 1 << 29) if settings.device == "cuda" else (2048, 1 << 26)
    options: Record = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
    a, source, best = torch.ones(n, n, **options), torch.ones(size, **options), []
    for call in (partial(torch.mm, a, a), partial(torch.empty_like(source).copy_, source)):
        best.append(min(timed(call, settings)[0] for _ in range(9)))
    return {"matmul": 2 * n**3 / best[0], "bandwidth": 2 * source.nbytes / best[1]}


def run_losses(settings: Settings) -> str:
    """The losses of one run of train.py on the device beside those on the CPU, kept in --out."""
    backbone, losses = str(SMOLLM2 if SMOLLM2.exists() else EMBEDDED), []
    for device in ("cpu", settings.device):
        run = Path(settings.out) / f"losses-{device}-{settings.steps}"
        flags = f"--tasks none --dtype float32 --step-tokens 512 --steps {settings.steps}".split()
        flags += ["--backbone", backbone, "--device", device, "--out", str(run)]
        if not run.exists():
            subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)
        lines = [json.loads(line) for _, line in read_lines(run / "metrics.jsonl")]
        losses.append(np.array([line["loss"] for line in lines if line["kind"] == "step"]))
    apart, ends = 100 * np.abs(losses[1] / losses[0] - 1).max(), losses[0][[0, -1]]
    return f"{backbone}: loss {ends} on the CPU, {settings.device} at most {apart:.3f} % away"


def count(name: str, positions: int = 1024) -> Record:
    """Of a shape, folder or run: parameters; FLOPs a token, 2 a multiply-add of a matrix product,
    attention at so many positions; float32 bytes kept, of the side path 4 M (r + 1) for a row."""
    if (Path(name) / "settings.json").exists():
        model = load_model(recorded_backbone(name))
        load_adapter(model, name)
    else:
        with torch.device("meta"):
            raw = SHAPES.get(name) or read_json(Path(name) / "config.json")
            model = Transformer(ModelConfig.from_dict(raw))
            attach(model, AdapterConfig(rank=RANK), TalanConfig())
    c, sizes = model.config, Counter[str]()
    for key, p in model.named_parameters():
        sizes[group_of(key)] += p.numel()
        sizes[group_of(key) + " matrices"] += p.numel() if p.dim() == 2 and ".layers." in key else 0
    paths = [block.side_path for block in model.model.layers if block.side_path is not None]
    with FlopCounterMode(display=False) as counter:
        for path in paths:
            path(torch.empty(1, 1, c.hidden_size, device=path.slots.device))
    found = {group: sizes[group] for group in ("backbone", "adapter", "side path")}
    found |= {"blocks": 2 * sizes["backbone matrices"], "head": 2 * model.head_weight.numel()}
    width = 4 * c.num_hidden_layers * c.head_dim
    found |= {"attention": positions * width * c.num_attention_heads}
    found |= {"live adapter": 2 * sizes["adapter matrices"], "live path": counter.get_total_flops()}
    kept = sum(4 * path.slots.shape[0] * (path.slots.shape[1] + 1) for path in paths)
    return found | {"bytes a row": kept, "a token": 2 * width * c.num_key_value_heads}


def memory(name: str, tokens: int = 8192) -> Record:
    """Mode -> GiB a card of LoRA training in bfloat16, so many tokens a micro-batch: weights (cut,
    but two blocks, embedding and head); 16 bytes a trainable parameter; what autograd keeps of
    every block, or of one and all inputs; a chunk of logits, hidden states and their gradient."""
    c, sizes, found = ModelConfig.from_dict(SHAPES[name]), count(name), {}
    D, L, Dh = c.hidden_size, c.num_hidden_layers, c.head_dim
    H, K = c.num_attention_heads, c.num_key_value_heads
    kept = 2 * (4 * D + (2 * H + 2 * K) * Dh + 3 * c.intermediate_size + 7 * RANK) + 4 * (2 + H)
    kept += 2 * (H + K) * Dh + 4 * (H + K) if c.model_type == "qwen3" else 0
    for cards in (1, 2, 4, 8):
        whole = 2 * sizes["backbone"] - (1 - 2 / L) * sizes["blocks"] if cards > 1 else 0
        fixed = 2 * sizes["backbone"] / cards + whole + (8 << 26) + 4 * tokens * D
        fixed += 16 * (sizes["adapter"] + sizes["side path"])
        mode = f"FSDP over {cards}" if cards > 1 else "one card, or DDP"
        found[mode] = round((fixed + tokens * L * kept) / 2**30, 1)
        fixed += tokens * (2 * D * L + kept)
        found[mode + ", checkpointing"] = round(fixed / 2**30, 1)
    return found


def cell(settings: Settings, name: str, column: str, above: Any, below: Any) -> str:
    """above / below: median over the rounds, 5-95 % spread; alone, the whole must meet a target."""
    low, middle, high = np.percentile(np.divide(above, below), [5, 50, 95])
    text = f"{middle:.3f} ({low:.3f} to {high:.3f})" if np.size(above) > 1 else f"{middle:.3f}"
    for pattern, where, most in DATA["targets"]["before" if settings.before else settings.device]:
        if where == column and re.fullmatch(pattern, name):
            met = (high if "alone" in name else middle) <= most
            text += f" <= {most}: {'met' if met else 'NOT MET'}"
    return text


def show(settings: Settings, records: Record, sizes: Record, peaks: Record) -> str:
    """Time and memory of each variant; their ratios to those of what it is compared with, and of
    the time to its bound: FLOPs / matmul peak in training, bytes read / bandwidth in decoding."""
    rows = []
    for name, record in records.items():
        (what, variant), seconds, peak = name.split(": "), record["seconds"], record["peak"]
        row = [name, f"{1e3 * np.median(seconds):,.2f}", f"{peak / 2**20:,.0f}", "", "", ""]
        bases = [f"{what}: {base}" for base in DATA["bases"].get(variant, ())]
        for other in [records[base] for base in bases if base in records][:1]:
            row[3] = cell(settings, name, "time", seconds, other["seconds"])
            row[4] = cell(settings, name, "memory", peak, other["peak"])
            apart = np.divide(record["value"], other["value"]) - 1 if variant == "ours" else 0
            if np.any(np.abs(apart) > (1e-3 if settings.dtype == "float32" else 0.05)):
                row[3] += " NOT THE SAME COMPUTATION"
        if re.match("train|decode", what) and "alone" not in variant:
            B, T = map(int, re.findall(r"(\d+) x (\d+)", what)[0])
            flops = 2 * sizes["blocks"] + 3 * sizes["attention"] * T / 2048
            flops += 3 * sizes["live adapter"] + LABELLED * 2 * sizes["head"]
            bound = B * T * flops / peaks["matmul"]
            if what.startswith("decode"):
                numbers = sizes["blocks"] / 2 + sizes["head"] / 2
                numbers += B * (PROMPT + DECODED / 2) * sizes["a token"] / 4
                bound = numbers * getattr(torch, settings.dtype).itemsize / peaks["bandwidth"]
            row[5] = cell(settings, name, "bound", seconds, bound)
        rows.append(row)
    return table(["", "ms", "peak MiB", "time / other", "peak / other", "time / bound"], rows)


def main(overrides: Record) -> None:
    """Run the parts in order, print their tables, write speed.json. Raises ValueError."""
    settings = Settings(**(DATA["cuda"] if overrides.get("device") == "cuda" else {}) | overrides)
    device = choose_device(settings.device)
    settings = replace(settings, dtype=str(choose_dtype(settings.dtype, device))[6:])  # no "torch."
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local
    result: Record = run_header(settings, device) | {"peaks": machine(settings)}
    torch.cuda.empty_cache()  # the memory is for the two sides
    print(result["hardware"], settings.dtype, result["peaks"])
    names = {"count": [*SHAPES, *settings.backbones], "memory": DATA["large"]}
    for part in filter(settings.parts.__contains__, PARTS):
        if part in names:
            call = count if part == "count" else memory
            found = {name: call(name) for name in names[part]}
            rows = [[name, *map("{:,}".format, each.values())] for name, each in found.items()]
            print(table([part, *found["Qwen3-8B"]], rows), flush=True)
        if part == "losses":
            print(run_losses(settings), flush=True)
        for name in settings.backbones if part in DATA["variants"] else ():
            if settings.minutes and time.monotonic() - BEGAN > 60 * settings.minutes:
                raise ValueError(f"out of time: {part} of {name} and what follows are left out")
            asked = replace(settings, compile=settings.compile and name == settings.backbones[0])
            sizes, records = count(name), in_turns(asked, part, name)
            texts = [f"{key}: {x['text']}" for key, x in records.items() if "text" in x]
            texts = texts or [show(settings, records, sizes, result["peaks"])]
            seconds = f"{time.monotonic() - BEGAN:.0f} s"
            print(f"\n{name}, {part}, {seconds}", *texts, sep="\n", flush=True)
            result[f"{part} {name}"] = records
            write_json(Path(settings.out) / "speed.json", result)


if __name__ == "__main__":
    run_script(main, Settings, "python -m experiments.speed")
