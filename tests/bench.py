"""Ours beside transformers + peft: training, loading, generation and the side path's cost; same weights, same batches, in turns.

    python tests/bench.py                     SmolLM2-135M in bfloat16 (python data/smollm2/prepare.py first), about 35 minutes on 2 cores
    python tests/bench.py --device cuda       the Qwen3-0.6B and Qwen3-4B shapes with random weights
    python tests/bench.py --parts train --kinds lora --lengths 256 --rounds 3 --compile none      one case, 2 minutes

Each library lives in a process of its own; the parent asks one at a time for one call, A B B A, while the other sleeps on its pipe. So both
meet the machine at the same pace, and only ratios of neighbouring calls are compared. Nothing here asserts a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; peft would ask the hub for the backbone's config

from data.settings import parse, setting

Record = dict[str, Any]
KINDS: dict[str, Record] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
PARTS = ("train", "load", "generate", "side", "profile")
SIDE_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DECODE = 64  # tokens of one row when decoding is timed alone


@dataclass(frozen=True)
class Settings:
    """Time ours and transformers + peft in turns and print the ratios, with every target marked met or not."""

    device: str = setting("cpu", "cpu or cuda")
    backbones: tuple[str, ...] = setting(("auto",), "folders, or names in data/shapes.json (random weights); auto: data/smollm2/model, "
                                         "on a GPU Qwen3-0.6B and Qwen3-4B")
    dtype: str = setting("bfloat16", "backbone dtype on both sides: bfloat16 or float32")
    parts: tuple[str, ...] = setting(PARTS, "what to run")
    kinds: tuple[str, ...] = setting(tuple(KINDS), "adapters, each without and with the side path")
    lengths: tuple[int, ...] = setting((256, 1024, 4096), "tokens a row in training; the targets are judged at the first")
    tokens: int = setting(0, "tokens of a training step, at least one row; 0: 2048, on a GPU 8192")
    supervised: float = setting(0.62, "share of the tokens with a label")
    rank: int = setting(16, "rank of the adapters, on all seven projections; alpha is twice that")
    rounds: int = setting(5, "timed rounds after one that warms up; rows n times as long get 1 / sqrt(n) of them")
    compile: tuple[str, ...] = setting(("lora",), "adapters that are also trained compiled, at the first length; none: no adapter")
    prompts: int = setting(64, "ragged prompts to generate from")
    batch_rows: int = setting(16, "rows generated at once")
    new_tokens: int = setting(128, "the longest answer; the median is a third of it")
    clock: str = setting("wall", "wall, or cpu: seconds of the process's own threads together, which neighbours disturb less")
    seed: int = setting(0, "seeds adapters, batches, prompts, lengths and random weights")
    out: str = setting("runs/bench", "folder for bench.json and for random weights")

    def __post_init__(self) -> None:
        """Lengths as numbers. Raises ValueError that lists every setting out of range."""
        known = {"device": ("cpu", "cuda"), "parts": PARTS, "kinds": tuple(KINDS), "compile": (*KINDS, "none"), "dtype": ("bfloat16", "float32"),
                 "clock": ("wall", "cpu")}
        given = {name: (value,) if isinstance(value := getattr(self, name), str) else value for name in known}
        wrong = [f"{name}: expected some of {', '.join(known[name])}, found {value!r}" for name, values in given.items() for value in values
                 if value not in known[name]]
        wrong += [f"lengths: expected whole numbers from 2, found {x}" for x in self.lengths if not str(x).isdecimal() or int(x) < 2]
        wrong += [f"{name}: expected at least {low}, found {getattr(self, name)}" for name, low in
                  (("tokens", 0), ("rank", 1), ("rounds", 1), ("prompts", 1), ("batch_rows", 1), ("new_tokens", 4)) if getattr(self, name) < low]
        wrong += ["clock: cpu would leave out what the GPU does"] * (self.clock == "cpu" and self.device != "cpu")
        if wrong or not self.lengths:
            raise ValueError("bench:\n  " + "\n  ".join(wrong or ["lengths: expected at least one"]))
        object.__setattr__(self, "lengths", tuple(map(int, self.lengths)))

    def shape(self, length: int) -> tuple[int, int]:
        """(rows, rounds) of training steps with rows of this length."""
        tokens = self.tokens or (2048 if self.device == "cpu" else 8192)
        return max(1, tokens // length), max(1, int(self.rounds * (min(self.lengths) / length) ** 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# What both sides are given
# ---------------------------------------------------------------------------------------------------------------------

def make_batch_ids(settings: Settings, vocabulary: int, length: int, n: int) -> tuple[list[list[int]], list[bool]]:
    """Batch n: rows of random ids, and which of a row's tokens are supervised: the last ones, as after a prompt."""
    rows = np.random.default_rng([settings.seed, length, n]).integers(vocabulary, size=(settings.shape(length)[0], length))
    return rows.tolist(), [t >= round((1 - settings.supervised) * length) for t in range(length)]


def make_prompts(settings: Settings, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, the shortest first (median 80 tokens, 16 to 256), and how many tokens follow each: log-normal, most short and a few long."""
    rng, n = np.random.default_rng([settings.seed, 1]), settings.prompts
    sizes = np.sort(np.clip(80 * np.exp(0.6 * rng.standard_normal(n)), 16, 256).astype(int))
    stops = np.clip(settings.new_tokens / 3 * np.exp(0.7 * rng.standard_normal(n)), 4, settings.new_tokens).astype(int)
    return [rng.integers(vocabulary, size=size).tolist() for size in sizes], stops.tolist()


def make_backbone(name: str, settings: Settings) -> str:
    """The folder of a backbone; for a name in data/shapes.json one with random weights, written once. Raises ValueError without one."""
    shapes = json.loads((ROOT / "data/shapes.json").read_text())
    if name not in shapes:
        if not (Path(name) / "config.json").exists():
            raise ValueError(f"{name}: no such folder" + ("; run: python data/smollm2/prepare.py" if "smollm2" in name else ""))
        return name
    from safetensors.torch import save_file

    from model import ModelConfig, Transformer, atomic
    folder, dtype = Path(settings.out) / f"{name}-{settings.dtype}-{settings.seed}", getattr(torch, settings.dtype)
    if not folder.exists():
        with torch.device("meta"):
            model = Transformer(ModelConfig.from_dict(shapes[name]))
        draw = torch.Generator(settings.device).manual_seed(settings.seed)
        with atomic(folder) as tmp:
            tmp.mkdir()
            (tmp / "config.json").write_text(json.dumps(shapes[name] | {"dtype": settings.dtype}))
            save_file({k: torch.ones(p.shape, dtype=dtype) if p.dim() == 1 else
                       torch.empty(p.shape, dtype=dtype, device=settings.device).normal_(0, 0.02, generator=draw).cpu()
                       for k, p in model.named_parameters()}, tmp / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def train_flops(config: Record, settings: Settings, length: int) -> float:
    """Useful FLOPs of one step with a frozen backbone, 2 a multiply-add; nothing is counted for recomputing or for a side path.

    matrices 4 P a token (forward, dx), adapters 6 r (in + out) (and dA, dB), head 4 V D a supervised token, causal attention 6 T^2 H Dh a row a layer
    """
    c, (rows, _) = {"num_key_value_heads": config["num_attention_heads"]} | config, settings.shape(length)
    D, F, L = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    Dh = c.get("head_dim") or D // c["num_attention_heads"]
    heads, groups = c["num_attention_heads"] * Dh, c["num_key_value_heads"] * Dh
    maps = [(D, heads), (D, groups), (D, groups), (heads, D), (D, F), (D, F), (F, D)]
    labels = sum(make_batch_ids(settings, 2, length, 0)[1][1:])
    per_token = L * (4 * sum(a * b for a, b in maps) + 6 * settings.rank * sum(a + b for a, b in maps))
    return float(rows * (length * per_token + labels * 4 * c["vocab_size"] * D + L * 6 * length**2 * heads))


# ---------------------------------------------------------------------------------------------------------------------
# The two sides, each in its own process
# ---------------------------------------------------------------------------------------------------------------------

class Side:
    """What both have in common: clock, peak memory, the training step, what is timed. Theirs and Ours below say how each part is done."""

    model: Any  # with trainable and optimizer: for `prepare` to set
    trainable: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    imports: Callable[[], None]
    read: Callable[[], Any]  # the backbone
    logits: Callable[[Any, Tensor], Any]  # a forward pass of (backbone, tokens), logits included
    batch: Callable[[int, int], Any]  # (length, n)
    loss: Callable[[Any, Any], Tensor]  # (model, batch), mean over supervised tokens
    answers: Callable[[list[list[int]], list[int]], list[list[int]]]  # (prompts, tokens wanted of each)

    def __init__(self, settings: Settings, backbone: str) -> None:
        self.settings, self.backbone, self.device, self.gpu = settings, backbone, torch.device(settings.device), settings.device != "cpu"
        self.dtype, self.vocabulary = getattr(torch, settings.dtype), json.loads((Path(backbone) / "config.json").read_text())["vocab_size"]
        self.import_seconds = self.timed(self.imports)[0]

    @functools.cached_property
    def compiled(self) -> Any:
        """The model compiled; torch compiles it within its first step."""
        return torch.compile(self.model)

    def switch(self, side: bool) -> None:
        """Theirs has no side path to switch."""

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, what the call returns); a GPU's queue is empty before and after."""
        clock, wait = time.process_time if self.settings.clock == "cpu" else time.perf_counter, torch.cuda.synchronize if self.gpu else int
        wait()
        began = clock()
        value = call()
        wait()
        return clock() - began, value

    def load(self) -> Record:
        """Seconds to import, to load, and to load and run one token, which reads every weight; most bytes resident."""
        load, model = self.timed(self.read)
        with torch.no_grad():
            first = self.timed(lambda: self.logits(model, torch.ones(1, 1, dtype=torch.int64, device=self.device)))[0]
        return {"import": self.import_seconds, "load": load, "seconds": load + first, "peak_bytes": resident_peak()}

    def ready(self) -> None:
        """Training mode, and the optimizer's state made by a step with zero gradients, which moves nothing: the first step is as any other."""
        self.model.train()
        for p in self.trainable:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, forward: Any, batch: Any) -> tuple[float, float]:
        """One training step; returns loss and gradient norm."""
        loss = self.loss(forward, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def step(self, n: int, length: int, side: bool = False, compiled: bool = False) -> Record:
        """One training step on batch n; peak bytes are those of the process so far, on a GPU those allocated there within the step.

        A GPU's allocator is filled by an untimed step first and emptied after, for the other process to use.
        """
        self.switch(side)
        batch, forward = self.batch(length, n), self.compiled if compiled else self.model
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        runs = [self.timed(lambda: self.update(forward, batch)) for _ in range(1 + self.gpu)]
        peak = torch.cuda.max_memory_allocated() if self.gpu else resident_peak()
        if self.gpu:
            torch.cuda.empty_cache()
        return {"seconds": runs[-1][0], "loss": runs[0][1][0], "norm": runs[0][1][1], "peak_bytes": peak}

    def generate(self, n: int) -> Record:
        """All prompts answered, each with as many tokens as it is given; n is ignored."""
        prompts, stops = make_prompts(self.settings, self.vocabulary)
        seconds, rows = self.timed(lambda: self.answers(prompts, stops))
        if [len(row) for row in rows] != stops:
            raise ValueError(f"answers of {[len(row) for row in rows]} tokens, expected {stops}")
        return {"seconds": seconds, "tokens": sum(stops), "rows": rows}

    def single(self, n: int) -> Record:
        """One row: time to the first token of 256, and seconds a token of those after the first."""
        prompt = make_batch_ids(self.settings, self.vocabulary, 256, n)[0][0]
        first = self.timed(lambda: self.answers([prompt], [1]))[0]
        whole = self.timed(lambda: self.answers([prompt], [1 + DECODE]))[0]
        return {"first": first, "decode": (whole - first) / DECODE}

    def profile(self, what: str, top: int = 9) -> list[tuple[str, float]]:
        """(operation, its share of the time) of a training step on our side, or of 32 tokens for each of `batch_rows` rows; the rest last."""
        length, prompts = self.settings.lengths[0], [[1, 2]] * self.settings.batch_rows
        call = {"decode": lambda: self.answers(prompts, [32] * len(prompts)), "eager": lambda: self.step(0, length),
                "compiled": lambda: self.step(0, length, compiled=True)}[what]
        call()
        with torch.profiler.profile() as profiler:
            call()
        spent: dict[str, float] = {}
        for e in profiler.key_averages():
            name = "elementwise, fused by the compiler" if "CompiledFxGraph" in e.key else e.key
            spent[name] = spent.get(name, 0) + (e.self_device_time_total if self.gpu else e.self_cpu_time_total)
        names = sorted(spent, key=spent.__getitem__, reverse=True)
        shares = [(name, spent[name] / sum(spent.values())) for name in names[:top]]
        return [*shares, ("the rest", 1 - sum(share for _, share in shares))]

    def machine(self) -> Record:
        """Measured FLOPs a second of a square matmul, and bytes a second read and written by a copy: the best of six."""
        n, size, times = (8192, 1 << 28, 10) if self.gpu else (2048, 1 << 25, 1)
        a, big = torch.randn(n, n, device=self.device).to(self.dtype), torch.ones(size, device=self.device)
        into = torch.empty_like(big)
        matmul = min(self.timed(lambda: [a @ a for _ in range(times)])[0] for _ in range(6)) / times
        copy = min(self.timed(lambda: [into.copy_(big) for _ in range(times)])[0] for _ in range(6)) / times
        return {"flops": 2 * n**3 / matmul, "bytes": 2 * big.nbytes / copy}


class Theirs(Side):
    """transformers + peft: sdpa attention, no cache and no dropout in training, adapters in float32 as peft makes them, fused AdamW."""

    def imports(self) -> None:
        import peft
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.peft, self.auto = peft, transformers.AutoModelForCausalLM

    def read(self) -> Any:
        model: Any = self.auto.from_pretrained(self.backbone, dtype=self.dtype, attn_implementation="sdpa")
        return model.to(self.device)

    def prepare(self, kind: str, folder: str) -> None:
        """The backbone, or (kind is no "none") with an adapter whose B has left zero, saved to `folder` for the other side."""
        self.model = self.read()
        if kind == "none":
            return
        config = self.peft.LoraConfig(r=self.settings.rank, lora_alpha=2 * self.settings.rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], **KINDS[kind])
        torch.manual_seed(self.settings.seed)
        self.model = self.peft.get_peft_model(self.model, config)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if ".lora_B." in name:
                    p.normal_(0, 0.02)
        self.model.save_pretrained(folder)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=0.0, fused=True)
        self.ready()

    def logits(self, model: Any, tokens: Tensor) -> Any:
        return model(tokens)

    def batch(self, length: int, n: int) -> tuple[Tensor, Tensor]:
        rows, supervised = make_batch_ids(self.settings, self.vocabulary, length, n)
        tokens = torch.tensor(rows, device=self.device)
        return tokens, tokens.masked_fill(~torch.tensor(supervised, device=self.device), -100)

    def loss(self, forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return forward(input_ids=batch[0], labels=batch[1], use_cache=False).loss

    def answers(self, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
        """Batches of prompts of about the same length, padded on the left, each until its last row is done; nobody knows the stops before."""
        self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id, out = None, 0, []
        for start in range(0, len(prompts), self.settings.batch_rows):
            part = slice(start, start + self.settings.batch_rows)
            longest = max(map(len, prompts[part]))
            tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts[part]], device=self.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts[part]], device=self.device)
            rows = self.model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=max(stops[part]))[:, longest:].tolist()
            out += [row[:stop] for row, stop in zip(rows, stops[part])]
        return out


class Ours(Side):
    """This repository: the adapter that peft saved, a side path with the default settings that can be switched on, train.py's step."""

    def imports(self) -> None:
        import model
        import talan
        import train
        self.lib, self.talan, self.train = model, talan, train
        model.keep_freed_memory()  # as train.py does

    def read(self) -> Any:
        return self.lib.load_model(self.backbone, self.device, self.dtype)

    def prepare(self, kind: str, folder: str) -> None:
        """The backbone with a side path, and (kind is no "none") with the adapter in `folder`."""
        side = self.lib.load_model(self.backbone)  # its weights are mapped and never read
        self.talan.attach(side, None, self.talan.TalanConfig(), seed=self.settings.seed)
        self.talan.save_adapter(side, Path(folder) / "side")
        for file in (Path(folder) / "side").iterdir():
            file.rename(Path(folder) / file.name)
        self.model = self.read()
        self.trainable = self.talan.load_adapter(self.model, folder)
        self.paths = [(block, block.side_path) for block in self.model.model.layers if block.side_path is not None]
        self.optimizer = self.train.build_optimizer(self.model, self.train.Settings(lr=1e-4))
        if kind != "none":
            self.ready()
        self.switch(False)

    def switch(self, side: bool) -> None:
        """The side path in its place, or none: without one its parameters get no gradient and AdamW leaves them out."""
        for block, path in self.paths:
            block.side_path = path if side else None

    @functools.cached_property
    def compiled(self) -> Any:
        """As train.py --compile, on a model of its own that shares the weights."""
        from data.overhead import share
        twin = share(self.model)
        self.train.compile_blocks(twin)
        return twin

    def logits(self, model: Any, tokens: Tensor) -> Any:
        return model.logits(model(tokens))

    def batch(self, length: int, n: int) -> Any:
        rows, supervised = make_batch_ids(self.settings, self.vocabulary, length, n)
        return self.train.make_batch([self.train.Row(ids, supervised) for ids in rows], self.device)

    def loss(self, forward: Any, batch: Any) -> Tensor:
        return self.train.loss_sum(forward, batch, self.model) / len(batch.targets)

    def answers(self, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
        """`generate` with rows refilled. It takes prompts from the end, the longest first: the k-th list it shows `ended` is the k-th from there."""
        limits: dict[int, int] = {}

        def ended(ids: list[int]) -> bool:
            if id(ids) not in limits:
                limits[id(ids)] = stops[-1 - len(limits)]
            return len(ids) >= limits[id(ids)]

        return self.lib.generate(self.model, prompts, max(stops), batch_rows=self.settings.batch_rows, ended=ended)

    def decode_bytes(self) -> int:
        """Bytes of weights that a decoded token reads: all, without an embedding table that is not the head as well."""
        self.switch(False)
        table = 0 if self.model.config.tie_word_embeddings else self.model.model.embed_tokens.weight.nbytes
        return sum(p.nbytes for p in self.model.parameters()) - table

    def side_inference(self, batch: int) -> dict[str, list[float]]:
        """Phase -> seconds with / without the side path, round by round, over the bare backbone (as over a merged one), 256 tokens a row."""
        from data.overhead import SIDE, measure_batch, share
        from eval import OverheadSettings
        self.switch(True)
        variants = {"backbone": share(self.model), "backbone" + SIDE: share(self.model)}
        for block in variants["backbone"].model.layers:
            block.side_path = None
        rounds = 2 * self.settings.rounds
        lines = measure_batch(variants, batch, OverheadSettings(prompt=256, steps=16, repeats=rounds, seconds=0.0, clock=self.settings.clock))
        return {phase: np.divide(line["backbone" + SIDE]["seconds"], line["backbone"]["seconds"]).tolist() for phase, line in lines.items()}

    def side_scaling(self, T: int) -> Record:
        """The side path alone, one row of T tokens: seconds forward + backward and of a token decoded after them, bytes of the state it leaves."""
        path = self.paths[0][1]
        h = torch.randn(1, T, self.model.config.hidden_size, device=self.device, dtype=self.dtype).requires_grad_()
        train = min(self.timed(lambda: path(h)[0].sum().backward())[0] for _ in range(4))
        with torch.no_grad():
            state = path(h)[1]
            token = min(self.timed(lambda: path(h[:, :1], state))[0] for _ in range(10))
            after = path(h[:, :1], state)[1]
        return {"tokens": T, "train": train, "token": token, "state_bytes": sum(s.untyped_storage().nbytes() for s in after)}


def resident_peak() -> int:
    """Most bytes this process ever had resident. Linux's ru_maxrss would start at the parent's."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def serve(kind: str, settings: Settings, backbone: str, pipe: Any) -> None:
    """The child's loop: (method, arguments) in, (True, result) or (False, traceback) out, until the pipe closes."""
    sys.stderr = open(os.devnull, "w")  # warnings and progress bars would run into the parent's table
    side: Any = None
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            method, args, options = pipe.recv()
            try:
                side = side or {"ours": Ours, "theirs": Theirs}[kind](settings, backbone)
                reply = True, getattr(side, method)(*args, **options)
            except Exception:
                reply = False, traceback.format_exc()
            if settings.device != "cpu" and not reply[0]:
                gc.collect()
                torch.cuda.empty_cache()
            pipe.send(reply)


class Failed(RuntimeError):
    """A child's traceback."""


class Worker:
    """One side in a process of its own, which sleeps between questions."""

    def __init__(self, kind: str, settings: Settings, backbone: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.kind, (self.pipe, end) = kind, context.Pipe()
        self.process = context.Process(target=serve, args=(kind, settings, backbone, end))
        self.process.start()
        end.close()

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """What the method returns there. Raises Failed."""
        try:
            self.pipe.send((method, args, options))
            done, value = self.pipe.recv()
        except (EOFError, OSError):
            raise Failed(f"{self.kind}: {method}: the process has ended: OutOfMemory?") from None
        if not done:
            raise Failed(f"{self.kind}: {method}: {value}")
        return value

    def close(self) -> None:
        """Let the process end, and wait for it."""
        self.pipe.close()
        self.process.join()


@contextlib.contextmanager
def pair(settings: Settings, backbone: str, kind: str) -> Iterator[tuple[Worker, Worker]]:
    """(theirs, ours), with the same adapter of this kind, or none."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        both = [stack.enter_context(contextlib.closing(Worker(name, settings, backbone))) for name in ("theirs", "ours")]
        for worker in both:
            worker.ask("prepare", kind, folder)
        yield both[0], both[1]


def in_turns(calls: Mapping[str, Callable[[int], Record]], rounds: int) -> dict[str, list[Record]]:
    """Name -> the records of round 0, which warms up, and of `rounds` more; every other round runs backwards.

    What runs out of memory, or does not compile, is named and left out.
    """
    records: dict[str, list[Record]] = {name: [] for name in calls}
    bar = tqdm(range(rounds + 1), unit="round", leave=False, disable=None)
    for n in bar:
        for name in list(records)[::-1] if n % 2 else list(records):
            bar.set_description(name)
            try:
                records[name].append(calls[name](n))
            except Failed as error:
                if "OutOfMemory" not in str(error) and "compiled" not in name:
                    raise
                print(f"{name} is left out: {str(error).strip().splitlines()[-1]}", flush=True)
                del records[name]
    return records


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------

def check_same(theirs: Record, ours: Record, dtype: str) -> None:
    """Raise ValueError unless the first steps' losses and gradient norms differ by no more than rounding allows."""
    for name, allowed in (("loss", 0.01), ("norm", 0.05)) if dtype == "bfloat16" else (("loss", 1e-4), ("norm", 1e-3)):
        if not abs(theirs[name] - ours[name]) <= allowed * abs(theirs[name]):
            raise ValueError(f"the first step's {name}: theirs {theirs[name]}, ours {ours[name]}: not the same computation")


def run_train(settings: Settings, backbone: str, config: Record, kind: str, length: int) -> Record:
    """Training steps of one adapter and row length: seconds by variant and round, and peak bytes of loading and one step."""
    rows, rounds = settings.shape(length)
    with pair(settings, backbone, kind) as (theirs, ours):
        step = lambda worker, **options: lambda n: worker.ask("step", n, length, **options)
        calls = {"theirs": step(theirs), "ours": step(ours), "ours + side path": step(ours, side=True)}  # in this order: peaks only rise
        if kind in settings.compile and length == settings.lengths[0]:
            calls |= {"theirs compiled": step(theirs, compiled=True), "ours compiled": step(ours, compiled=True)}
        records = in_turns(calls, rounds)
    if {"theirs", "ours"} <= set(records):
        check_same(records["theirs"][0], records["ours"][0], settings.dtype)
    seconds = {name: [r["seconds"] for r in each[1:]] for name, each in records.items()}
    return {"kind": kind, "length": length, "rows": rows, "flops": train_flops(config, settings, length), "seconds": seconds,
            "peak_bytes": {name: each[0]["peak_bytes"] for name, each in records.items() if "compiled" not in name},
            "first": {name: {key: each[0][key] for key in ("loss", "norm")} for name, each in records.items()}}


def run_load(settings: Settings, backbone: str) -> Record:
    """Fresh processes: seconds to import, to load, and to load and run one token; peak bytes resident."""
    def fresh(name: str) -> Record:
        with contextlib.closing(Worker(name, settings, backbone)) as worker:
            return worker.ask("load")

    records = in_turns({"theirs": lambda n: fresh("theirs"), "ours": lambda n: fresh("ours")}, settings.rounds)
    return {name: {key: [r[key] for r in each[1:]] for key in each[0]} for name, each in records.items()}


def run_generate(settings: Settings, backbone: str) -> Record:
    """The backbone without an adapter, as with a merged one: ragged prompts in batches, then one row alone."""
    with pair(settings, backbone, "none") as (theirs, ours):
        ask = lambda method: {w.kind: functools.partial(w.ask, method) for w in (theirs, ours)}
        batch, single = in_turns(ask("generate"), max(2, settings.rounds // 2)), in_turns(ask("single"), settings.rounds)
        bytes_read = ours.ask("decode_bytes")
    same = np.mean([a[0] == b[0] for a, b in zip(batch["theirs"][0]["rows"], batch["ours"][0]["rows"])])
    return {"tokens": batch["ours"][0]["tokens"], "same_first_token": float(same), "bytes_a_token": bytes_read,
            "seconds": {name: [r["seconds"] for r in each[1:]] for name, each in batch.items()},
            "single": {name: {key: [r[key] for r in each[1:]] for key in each[0]} for name, each in single.items()}}


def run_side(settings: Settings, backbone: str) -> Record:
    """What the side path adds to prefill and decoding, and what it costs alone as rows get longer."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Worker("ours", settings, backbone)) as ours:
        ours.ask("prepare", "none", folder)
        return {"inference": {batch: ours.ask("side_inference", batch) for batch in (1, 8)},
                "scaling": [ours.ask("side_scaling", T) for T in SIDE_LENGTHS]}


def run_profile(settings: Settings, backbone: str) -> dict[str, list[tuple[str, float]]]:
    """Where the time of ours goes: "KIND eager", "KIND compiled" and "decode" -> operations and shares."""
    found = {}
    for kind in settings.kinds:
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(Worker("theirs", settings, backbone)) as theirs:
            theirs.ask("prepare", kind, folder)
            with contextlib.closing(Worker("ours", settings, backbone)) as ours:
                ours.ask("prepare", kind, folder)
                for what in ("eager", "compiled") if kind in settings.compile else ("eager",):
                    found[f"{kind} {what}"] = ours.ask("profile", what)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Worker("ours", settings, backbone)) as ours:
        ours.ask("prepare", "none", folder)
        return found | {"decode": ours.ask("profile", "decode")}


# ---------------------------------------------------------------------------------------------------------------------
# Ratios, targets, tables
# ---------------------------------------------------------------------------------------------------------------------

class Ratio(NamedTuple):
    """Median of a ratio over rounds, and the 5-95 % spread of the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if 0.7 < self.low <= self.high < 1.3 else 2
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(above: Any, below: Any) -> Ratio:
    """Of above_n / below_n, both of round n; either may be one number."""
    each = np.atleast_1d(np.divide(above, below))
    return Ratio(float(np.median(each)), *map(float, np.percentile(each, [5, 95])))


def faster(part: Record | None, slow: Sequence[str], fast: str) -> Ratio | None:
    """How many times faster `fast` is than the best of `slow`; None when either was not timed."""
    timed = part["seconds"] if part else {}
    have = sorted((name for name in slow if name in timed), key=lambda name: np.median(timed[name]))
    return ratio(timed[have[0]], timed[fast]) if have and fast in timed else None


@dataclass(frozen=True)
class Target:
    """What is asked of a ratio: at least (>=) or at most (<=) `bound`. ratio None: it was not measured."""

    text: str
    sign: str
    bound: float
    ratio: Ratio | None

    def met(self) -> bool | None:
        """Does the median reach the bound?"""
        return None if self.ratio is None else self.ratio.value >= self.bound if self.sign == ">=" else self.ratio.value <= self.bound

    def __str__(self) -> str:
        mark = {True: f"met, {self.ratio}", False: f"not met, {self.ratio}", None: "not measured"}[self.met()]
        return f"  {self.text} {self.sign} {self.bound:g}: {mark}"


def find_targets(name: str, entry: Record, settings: Settings) -> list[Target]:
    """Every target with its ratio. Training is judged at the first row length; memory, prefill and decoding at their worst case."""
    cases = {(case["kind"], case["length"]): case for case in entry.get("train", [])}
    lora, dora = (cases.get((kind, settings.lengths[0])) for kind in ("lora", "dora"))
    memory = [ratio(peak["ours"], peak["theirs"]) for peak in (case["peak_bytes"] for case in cases.values()) if {"ours", "theirs"} <= set(peak)]
    load, generation, side = (entry.get(part) for part in ("load", "generate", "side"))
    added = {phase: max(ratio(batch[phase], 1) for batch in side["inference"].values()) if side else None for phase in ("prefill", "decode")}
    long, short = (side["scaling"][-1], side["scaling"][0]) if side else ({}, {})
    found = [Target("LoRA training, times theirs, both eager", ">=", 2, faster(lora, ["theirs"], "ours")),
             Target("LoRA training, ours compiled, times their best", ">=", 2.5, faster(lora, ["theirs", "theirs compiled"], "ours compiled")),
             Target("DoRA training, times theirs, both eager", ">=", 2.5, faster(dora, ["theirs"], "ours")),
             Target("peak training memory / theirs, worst case", "<=", 0.5, max(memory, default=None)),
             Target("generation, times theirs", ">=", 2.5, faster(generation, ["theirs"], "ours")),
             Target("loading time / theirs", "<=", 1, ratio(load["ours"]["seconds"], load["theirs"]["seconds"]) if load else None),
             Target("LoRA training step with / without side path", "<=", 1.03, faster(lora, ["ours + side path"], "ours")),
             Target("prefill with / without side path, worst batch", "<=", 1.02, added["prefill"]),
             Target("decoding with / without side path, worst batch", "<=", 1.02, added["decode"]),
             Target(f"side path, time a token at {SIDE_LENGTHS[-1]:,} / at {SIDE_LENGTHS[0]}", "<=", 1.2,
                    ratio(long["train"] / long["tokens"], short["train"] / short["tokens"]) if side else None),
             Target(f"side path, bytes kept after {SIDE_LENGTHS[-1]:,} tokens / after {SIDE_LENGTHS[0]}", "<=", 1,
                    ratio(long["state_bytes"], short["state_bytes"]) if side else None)]
    if settings.device != "cpu" and name.endswith("-4B"):
        machine, timed = entry["machine"], lora["seconds"] if lora else {}
        best = min((timed[variant] for variant in ("ours", "ours compiled") if variant in timed), key=np.median, default=None)
        peak = ratio(lora["flops"] / machine["flops"], best) if lora and best else None
        found += [Target("LoRA training, share of the matmul peak", ">=", 0.45, peak),
                  Target("decoding at batch 1, share of the bandwidth bound", ">=", 0.7, ratio(
                      generation["bytes_a_token"] / machine["bytes"], generation["single"]["ours"]["decode"]) if generation else None)]
    return found


Table = tuple[list[str], list[list[Any]]]  # head and rows


def train_table(cases: Sequence[Record], machine: Record) -> Table:
    """Speed, memory and share of the matmul peak of each variant; compiled against compiled."""
    rows: list[list[Any]] = []
    for case in cases:
        peaks, theirs = case["peak_bytes"], case["peak_bytes"].get("theirs")
        for name, seconds in case["seconds"].items():
            other, middle, peak = "theirs compiled" if name == "ours compiled" else "theirs", np.median(seconds), peaks.get(name)
            rows.append([f"{case['kind']} {case['rows']} x {case['length']}", name, f"{case['rows'] * case['length'] / middle:,.0f}", len(seconds),
                         "" if name == other else faster(case, [other], name), f"{peak / 2**20:,.0f}" if peak else "",
                         f"{peak / theirs:.2f}" if peak and theirs else "", f"{100 * case['flops'] / middle / machine['flops']:.0f}"])
    return ["training, rows x tokens", "variant", "tokens/s", "rounds", "times theirs", "peak MiB", "/ theirs", "% of matmul peak"], rows


def generate_table(entry: Record, settings: Settings, machine: Record) -> Table:
    """Generation in batches, time to the first token and decoding of one row."""
    single, rows = entry["single"], []
    for name, seconds in entry["seconds"].items():
        versus = lambda base, mine, name=name: ratio(base, mine) if name == "ours" else ""
        first, decode = (float(np.median(single[name][key])) for key in ("first", "decode"))
        rows += [[f"{settings.prompts} ragged prompts", name, f"{entry['tokens'] / np.median(seconds):,.1f} tokens/s",
                  versus(entry["seconds"]["theirs"], seconds), ""],
                 ["first token after 256", name, f"{1e3 * first:,.1f} ms", versus(single["theirs"]["first"], single[name]["first"]), ""],
                 ["decoding one row", name, f"{1 / decode:,.1f} tokens/s", versus(single["theirs"]["decode"], single[name]["decode"]),
                  f"{100 * entry['bytes_a_token'] / decode / machine['bytes']:.0f}"]]
    return ["generation", "side", "median", "times theirs", "% of bandwidth"], sorted(rows, key=lambda row: row[0])


def all_tables(entry: Record, settings: Settings) -> Iterator[Table]:
    """Those of the parts that ran."""
    if "train" in entry:
        yield train_table(entry["train"], entry["machine"])
    if load := entry.get("load"):
        rows = [[name, *(f"{np.median(each[key]):.2f}" for key in ("import", "load", "seconds")), f"{np.median(each['peak_bytes']) / 2**20:,.0f}",
                 ratio(each["seconds"], load["theirs"]["seconds"]) if name == "ours" else ""] for name, each in load.items()]
        yield ["loading, fresh process", "import s", "load s", "load + one token s", "peak resident MiB", "time / theirs"], rows
    if "generate" in entry:
        yield generate_table(entry["generate"], settings, entry["machine"])
    if side := entry.get("side"):
        added = [(f"{phase}, batch {batch}", each) for batch, phases in side["inference"].items() for phase, each in phases.items()]
        yield ["side path", "rounds", "time / without"], [[name, len(each), ratio(each, 1)] for name, each in added]
        rows = [[f"{line['tokens']:,}", f"{1e3 * line['train']:.1f}", f"{1e6 * line['train'] / line['tokens']:.2f}", f"{1e6 * line['token']:.0f}",
                 f"{line['state_bytes']:,}"] for line in side["scaling"]]
        yield ["side path alone, tokens", "forward + backward ms", "us a token", "us a decoded token", "bytes kept"], rows
    for what, shares in entry.get("profile", {}).items():
        yield [f"time of ours, {what}", "%"], [[name, f"{100 * share:.1f}"] for name, share in shares]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

NOTES = """Ratios: median over rounds of neighbouring calls, in brackets the 5-95 % spread of the rounds. A shared machine's pace changes by tens of
per cent: compare ratios and not seconds, and believe no difference smaller than its spread. Peak: load, an empty optimizer step and one step.
ours compiled stands beside theirs compiled in the tables, beside the better of their two in the targets.
"""


def run_backbone(name: str, settings: Settings) -> Record:
    """All parts on one backbone: prints what is done, then tables and targets."""
    from eval import table
    backbone, began = make_backbone(name, settings), time.perf_counter()
    config = json.loads((Path(backbone) / "config.json").read_text())
    with contextlib.closing(Worker("ours", settings, backbone)) as worker:
        machine = worker.ask("machine")
    entry: Record = {"machine": machine}
    print(f"{name} in {settings.dtype}: matmul peak {machine['flops'] / 1e9:,.0f} GFLOP/s, copy {machine['bytes'] / 1e9:,.1f} GB/s", flush=True)
    for length in settings.lengths if "train" in settings.parts else ():
        for kind in settings.kinds:
            entry.setdefault("train", []).append(run_train(settings, backbone, config, kind, length))
            print(table(*train_table(entry["train"][-1:], machine)), f"after {time.perf_counter() - began:.0f} s", sep="\n", flush=True)
    for part, call in (("load", run_load), ("generate", run_generate), ("side", run_side), ("profile", run_profile)):
        if part in settings.parts:
            entry[part] = call(settings, backbone)
            print(f"{part}: after {time.perf_counter() - began:.0f} s", flush=True)
    targets = find_targets(name, entry, settings)
    print("", *(table(*each) + "\n" for each in all_tables(entry, settings)), NOTES, f"{name}: targets", *targets, sep="\n", flush=True)
    return entry | {"targets": [asdict(target) | {"met": target.met()} for target in targets], "wall_seconds": time.perf_counter() - began}


def run(settings: Settings) -> Record:
    """Every backbone in turn; writes bench.json after each, returns what it holds. Raises ValueError."""
    from model import atomic, choose_device, header
    device = choose_device(settings.device)
    auto = ("Qwen3-0.6B", "Qwen3-4B") if device.type == "cuda" else (str(ROOT / "data/smollm2/model"),)
    result: Record = {**header(asdict(settings), device), "backbones": {}}
    for name in auto if settings.backbones == ("auto",) else settings.backbones:
        result["backbones"][name] = run_backbone(name, settings)
        with atomic(Path(settings.out) / "bench.json") as tmp:
            tmp.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {Path(settings.out) / 'bench.json'}")
    return result


if __name__ == "__main__":
    try:
        run(parse(Settings))
    except ValueError as error:
        raise SystemExit(f"bench.py: {error}") from None
