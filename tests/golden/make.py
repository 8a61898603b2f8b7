"""Write the golden kit again from its seeds, or prove that it still holds.

    python tests/golden/make.py             write backbones, adapters, tokenizers, inputs, expected, cases.json
    python tests/golden/make.py --verify    change nothing: the seeds give the committed files, and our code passes them

Expected values are reference.py's, float64 stored as float32, and texts.py's, written by hand; no value comes from the code
under test. save_adapter writes the adapter folders, because their layout is part of what the kit holds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from model import load_model
from talan import AdapterConfig, TalanConfig, attach, save_adapter
from tests.golden import check, ours, reference, texts

Case = dict[str, Any]
Arrays = dict[str, np.ndarray]
Doubles = dict[str, Tensor]  # float64
Compute = Callable[[Doubles], Doubles]
ULP = 2.0 ** -23  # spacing of float32 numbers at 1
# A tensor's tolerance: how far it moves, at most over TRIALS, when every input is off by one ULP, times FACTOR, plus FLOOR ULP of its largest value.
TRIALS, FACTOR, FLOOR = 6, 8, 8

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 53, "hidden_size": 16, "intermediate_size": 20,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "attention_bias": False, "tie_word_embeddings": True,
         "max_position_embeddings": 512, "dtype": "float32"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 47, "hidden_size": 24, "intermediate_size": 20,
         "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                 "original_max_position_embeddings": 128},
         "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 512, "torch_dtype": "float32"}
CONFIGS = {"qwen3": QWEN3, "llama": LLAMA}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Adapter folder -> backbone, adapter, side path. Together: all kinds, mixers, writebacks, sites, one layer and several, both scales.
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("qwen3", {"kind": "lora", "rank": 2, "alpha": 6, "dropout": 0.0, "targets": ALL},
             {"layers": [1], "site": "block", "slots": 3, "width": 4, "mixer": "linear", "writeback": "add", "bound": 0.1,
              "grad_scale": 0.5, "trunk_grad_scale": 1.0}),
    "rslora": ("llama", {"kind": "rslora", "rank": 3, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]},
               {"layers": [0, 1], "site": "attention", "slots": 5, "width": 4, "mixer": "mlp", "writeback": "gate", "bound": 0.1,
                "grad_scale": 1.5, "trunk_grad_scale": 0.25}),
    "dora": ("qwen3", {"kind": "dora", "rank": 2, "alpha": 3, "dropout": 0.0, "targets": ["k_proj", "o_proj", "up_proj"]},
             {"layers": [0, 1], "site": "block", "slots": 3, "width": 5, "mixer": "attention", "writeback": "bounded", "bound": 0.6,
              "grad_scale": 1.0, "trunk_grad_scale": 0.0}),
}
# Case -> adapter folder, scope, talan_lr_scale.
TRAIN = {"train-lora": ("lora", "joint", 1.0), "train-rslora": ("rslora", "joint", 0.5), "train-dora": ("dora", "joint", 1.0),
         "train-scope-writeback": ("rslora", "writeback", 1.0), "train-scope-talan": ("dora", "talan", 1.0)}
OPTIMIZER = {"name": "AdamW", "steps": 3, "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.2, "clip": None}
LENGTHS = [9, 4, 6]


def draw(name: str, *shape: int, std: float, mean: float = 0.0) -> np.ndarray:
    """Normal numbers seeded by a name, rounded to multiples of 1/256 (so every float format of 16 bits and more is exact), none zero."""
    values = np.round((mean + std * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)) * 256) / 256
    return np.where(values == 0, 1 / 256, values).astype(np.float32)


def integers(name: str, low: int, high: int, *shape: int) -> np.ndarray:
    """Integers from low to high - 1, seeded by a name."""
    return np.asarray(np.random.RandomState(zlib.crc32(name.encode())).randint(low, high, shape), np.int64)


def padded(rows: list[Tensor]) -> Tensor:
    """Rows (t,...) of different t -> (B,T,...) with nan behind each row's end."""
    out = torch.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), math.nan, dtype=torch.float64)
    for b, row in enumerate(rows):
        out[b, :len(row)] = row
    return out


def round_up(x: float) -> float:
    """The next number of two digits, or the one after it."""
    return float(f"{x * 1.05:.1e}")


def largest(value: Tensor) -> float:
    """Largest magnitude, nan apart."""
    return float(value.detach().abs().nan_to_num(0).max())


def tolerances(compute: Compute, p: Doubles, expected: Doubles) -> dict[str, float]:
    """What float32 may do to each tensor of compute(p): see FACTOR."""
    moved = dict.fromkeys(expected, 0.0)
    for trial in range(TRIALS):
        signs = {key: torch.as_tensor(2 * integers(f"{trial}.{key}", 0, 2, *value.shape) - 1) for key, value in p.items()}
        noisy = compute({key: value * (1 + ULP * signs[key]) for key, value in p.items()})
        moved = {name: max(far, largest(noisy[name] - expected[name])) for name, far in moved.items()}
    return {name: round_up(FACTOR * far + FLOOR * ULP * largest(expected[name])) for name, far in moved.items()}


class Kit:
    """A folder that cases are written into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[Case] = []

    def write(self, file: str, tensors: Arrays) -> None:
        """One safetensors file."""
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, self.folder / file, metadata={"format": "pt"})

    def params(self, *files: str) -> Doubles:
        """Tensors of these files in float64."""
        return {name: torch.from_numpy(value).double() for file in files for name, value in load_file(self.folder / file).items()}

    def add(self, case: Case, inputs: Arrays, expected: Doubles, tolerance: dict[str, float], exact: Arrays | None = None) -> None:
        """Write the inputs and the expected values of one case: float64 ones with their tolerances, and integers."""
        if inputs:
            self.write(file := f"inputs/{case['name']}.safetensors", inputs)
            case["inputs"].append(file)
        stored = {name: value.detach().numpy().astype(np.float32) for name, value in expected.items()}
        self.write(f"expected/{case['name']}.safetensors", stored | (exact or {}))
        self.cases.append(case | {"tolerance": {name: tolerance[name] for name in expected} | dict.fromkeys(exact or {}, 0)})

    def compute(self, case: Case, inputs: Arrays, p: Doubles, compute: Compute, exact: Arrays | None = None) -> None:
        """The same, expected values and tolerances by way of compute(p)."""
        expected = compute(p)
        self.add(case, inputs, expected, tolerances(compute, p, expected), exact)


# ------------------------------------------------------------------------------------------------------ folders

def make_backbone(kit: Kit, name: str, config: dict[str, Any]) -> None:
    """A Hugging Face folder with random weights, norms included."""
    D, F, V, H = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, k = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for n in range(config["num_hidden_layers"]):
        block = {"self_attn.q_proj": (q, D), "self_attn.k_proj": (k, D), "self_attn.v_proj": (k, D), "self_attn.o_proj": (D, q),
                 "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
        block |= {"self_attn.q_norm": (H,), "self_attn.k_norm": (H,)} if config["model_type"] == "qwen3" else {}
        shapes |= {f"model.layers.{n}.{part}.weight": shape for part, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    weights = {key: draw(f"{name}.{key}", *shape, std=0.3, mean=1) if len(shape) == 1 else
               draw(f"{name}.{key}", *shape, std=0.4 if "embed" in key else shape[1] ** -0.5) for key, shape in shapes.items()}
    kit.write(f"backbones/{name}/model.safetensors", weights)
    (kit.folder / f"backbones/{name}/config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_adapter(kit: Kit, name: str) -> None:
    """adapters/NAME in PEFT's layout, the side path's two files beside it; every tensor random, nothing zero."""
    backbone, adapter, side = ADAPTERS[name]
    model = load_model(kit.folder / "backbones" / backbone)
    model.source = f"tests/golden/backbones/{backbone}"
    attach(model, AdapterConfig(**adapter), TalanConfig(**side))
    for key, p in model.named_parameters():
        if p.requires_grad:
            std = 0.5 if p.dim() < 2 or key.endswith("slots") else 0.3 if key.endswith("lora_B") else p.shape[1] ** -0.5
            value = torch.from_numpy(draw(f"{name}.{key}", *p.shape, std=std))
            p.data = p.data * (1 + value / 2) if key.endswith("magnitude_vector") else value
    save_adapter(model, kit.folder / "adapters" / name)


def make_tokenizer(kit: Kit, name: str) -> None:
    """tokenizers/NAME: the files that a checkpoint's tokenizer consists of."""
    folder = kit.folder / "tokenizers" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.tokenizer_files(name).items():
        (folder / file).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ cases

def model_case(kit: Kit, name: str, kind: str, backbone: str, folder: str | None = None) -> tuple[Case, Doubles, dict[str, Any]]:
    """A case on a backbone, bare or with an adapter folder; its parameters in float64; the reference's arguments."""
    adapter, side = ADAPTERS[folder][1:] if folder else (None, None)
    files = [f"backbones/{backbone}/model.safetensors"]
    files += [f"adapters/{folder}/{file}" for file in ("adapter_model.safetensors", "talan.safetensors")] if folder else []
    case = {"name": name, "kind": kind, "backbone": f"backbones/{backbone}", "folder": folder and f"adapters/{folder}",
            "adapter": adapter, "side_path": side, "inputs": files}
    return case, kit.params(*files), {"config": CONFIGS[backbone], "adapter": adapter, "side": side}


def make_batch(name: str, vocab: int, lengths: list[int] = LENGTHS) -> tuple[Arrays, list[list[int]]]:
    """tokens (B,T), random behind each row's end too, and lengths (B,); the rows without padding."""
    tokens = integers(name, 0, vocab, len(lengths), max(lengths))
    return {"tokens": tokens, "lengths": np.array(lengths)}, [row[:n].tolist() for row, n in zip(tokens, lengths)]


def forward_case(kit: Kit, backbone: str) -> None:
    """embedding, layer.N, hidden, logits of a ragged batch."""
    case, p, how = model_case(kit, f"forward-{backbone}", "forward", backbone)
    inputs, rows = make_batch(case["name"], CONFIGS[backbone]["vocab_size"])

    def compute(p: Doubles) -> Doubles:
        inner = [reference.forward(p, ids=row, **how)[0] for row in rows]
        return {name: padded([row[name] for row in inner]) for name in inner[0]}

    kit.compute(case, inputs, p, compute)


def side_path_case(kit: Kit, mixer: str, writeback: str) -> None:
    """One side path alone: B=2 ragged rows that go on from a given state."""
    B, T, D, M, r, lengths = 2, 7, 12, 3, 4, [7, 4]
    side = {"layers": [0], "site": "block", "slots": M, "width": r, "mixer": mixer, "writeback": writeback, "bound": 0.62,
            "grad_scale": 1.0, "trunk_grad_scale": 1.0}
    shapes = {"slots": (M, r), "w_key": (r, D), "w_value": (r, D), "w_read": (M, D), "w_query": (r, D), "w_out": (D, r), "w_gate": (D,), "b_gate": (),
              "slot_mlp_in": (2 * M, M), "slot_mlp_out": (M, 2 * M), "channel_mlp_in": (2 * r, r), "channel_mlp_out": (r, 2 * r)}
    name = f"side-path-{mixer}-{writeback}"
    weights = {key: draw(f"side-path.{key}", *shapes[key], std=0.5 if len(shapes[key]) < 2 else shapes[key][1] ** -0.5)
               for key in reference.side_names(side)}
    state = {"num": draw("side-path.num", B, M, r, std=2), "den": np.abs(draw("side-path.den", B, M, std=1)) + 1}
    floats = {"h": draw("side-path.h", B, T, D, std=1), **state, **weights}

    def compute(p: Doubles) -> Doubles:
        rows = [reference.side_path(p, side, p["h"][b, :n], p["num"][b], p["den"][b]) for b, n in enumerate(lengths)]
        return {key: torch.stack([row[key] for row in rows]) if key in state else padded([row[key] for row in rows]) for key in rows[0]}

    kit.compute({"name": name, "kind": "side_path", "side_path": side, "inputs": []}, floats | {"lengths": np.array(lengths)},
                {key: torch.from_numpy(value).double() for key, value in floats.items()}, compute)


def train_case(kit: Kit, name: str) -> None:
    """loss, gradients, parameters after AdamW; the first token of a row, marked as supervised, is nobody's target."""
    folder, scope, lr_scale = TRAIN[name]
    case, p, how = model_case(kit, name, "train", ADAPTERS[folder][0], folder)
    inputs, rows = make_batch(name, how["config"]["vocab_size"])
    inputs["supervised"] = integers(name + ".supervised", 0, 2, *inputs["tokens"].shape).astype(np.uint8)
    inputs["supervised"][:, 0] = inputs["supervised"][:, 3] = 1
    inputs["supervised"][np.arange(inputs["tokens"].shape[1]) >= inputs["lengths"][:, None]] = 0
    case |= {"scope": scope, "optimizer": OPTIMIZER | {"talan_lr_scale": lr_scale}}
    labelled = [(row, marks[:len(row)].tolist()) for row, marks in zip(rows, inputs["supervised"])]
    names, settings = reference.trainable(list(p), scope), case["optimizer"]
    loss_of = lambda q: reference.loss(q, rows=labelled, **how)

    def compute(p: Doubles) -> Doubles:
        loss, grads, _ = reference.train(p, names, settings | {"steps": 1}, loss_of)
        return {"loss": loss} | {f"grad.{key}": grads[key][0] for key in names}

    first, (_, grads, after) = compute(p), reference.train(p, names, settings, loss_of)
    tolerance = tolerances(compute, p, first)
    for key in names:
        rate = settings["lr"] * (settings["talan_lr_scale"] if ".side_path." in key else 1)
        first[f"after.{key}"], tolerance[f"after.{key}"] = settled(p[key], grads[key], after[key], tolerance[f"grad.{key}"], rate, settings)
    kit.add(case, inputs, first, tolerance)


def settled(start: Tensor, grads: list[Tensor], after: Tensor, off: float, rate: float, settings: dict[str, Any]) -> tuple[Tensor, float]:
    """(after, tolerance). AdamW divides each gradient by its own size, so the rounding of a small one is felt in full: the tolerance
    is twice the farthest that a value moves when its gradients are off by their tolerance, plus its own rounding. Values that move
    by more than a twentieth of a step are too close to a change of sign to compare: nan."""
    moved = [reference.adamw(start, [g + sign * off for g in grads], rate, settings) for sign in (-1, 1)]
    farthest = torch.maximum(*((m - after).abs() for m in moved))
    after = after.where(farthest < rate / 20, math.nan)
    return after, round_up(2 * largest(farthest.where(farthest < rate / 20, 0.0)) + FLOOR * ULP * largest(after))


def merge_case(kit: Kit, folder: str) -> None:
    """The adapted projections' effective weights."""
    case, p, how = model_case(kit, f"merge-{folder}", "merge", ADAPTERS[folder][0], folder)
    names = [key.removesuffix(".weight") for key in p if key.split(".")[-2] in case["adapter"]["targets"] and not key.startswith("base_model")]
    kit.compute(case, {}, p, lambda q: {f"merged.{name}.weight": reference.effective_weight(q, name, how["adapter"]) for name in names})


def decode_case(kit: Kit, folder: str) -> None:
    """A ragged prefill, its state, and two more tokens a row, each as if the whole row had been run at once."""
    case, p, how = model_case(kit, f"decode-{folder}", "decode", ADAPTERS[folder][0], folder)
    inputs, rows = make_batch(case["name"], how["config"]["vocab_size"])
    inputs["next"] = integers(case["name"] + ".next", 0, how["config"]["vocab_size"], len(rows), 2)

    def compute(p: Doubles) -> Doubles:
        run = lambda extra: [reference.forward(p, ids=row + more[:extra].tolist(), **how) for row, more in zip(rows, inputs["next"])]
        hidden = lambda extra: torch.stack([inner["hidden"][-1] for inner, _ in run(extra)])
        states = [state for _, state in run(0)]
        return {"prefill": hidden(0)} | {key: torch.stack([s[key] for s in states]) for key in states[0]} | {"step.0": hidden(1), "step.1": hidden(2)}

    kit.compute(case, inputs, p, compute, {"lengths": inputs["lengths"]})


def greedy_case(kit: Kit, name: str, backbone: str, folder: str | None, stop: list[int], seed: int) -> None:
    """The likeliest tokens up to a stop id; -1 behind it. Raises ValueError when two logits are too close to call."""
    case, p, how = model_case(kit, name, "greedy", backbone, folder)
    case |= {"max_new_tokens": 8, "stop_ids": stop}
    inputs, rows = make_batch(f"{name}.{seed}", how["config"]["vocab_size"], [*LENGTHS, 1, 5])
    new = [reference.greedy(p, prompt=row, limit=case["max_new_tokens"], stop=stop, **how) for row in rows]
    if min(lead for _, lead in new) < 1e-2:
        raise ValueError(f"{name}: two logits lie {min(lead for _, lead in new)} apart; choose another seed")
    kit.add(case, inputs, {}, {}, {"new_tokens": np.array([ids + [-1] * (case["max_new_tokens"] - len(ids)) for ids, _ in new])})


def labels_case(kit: Kit, tokenizer: str, name: str, chat: str, marked: str, prompt: str) -> None:
    """Texts and marks as texts.py writes them by hand. A token is supervised when all of its bytes lie in one marked span."""
    from tokenizers import Tokenizer

    folder = kit.folder / "tokenizers" / tokenizer
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encode = lambda text: core.encode(text, add_special_tokens=False)
    spans, at, text = [], 0, marked.replace("⟦", "").replace("⟧", "")
    for n, part in enumerate(marked.replace("⟧", "⟦").split("⟦")):
        spans += [(at, at + len(part.encode()))] if n % 2 else []
        at += len(part.encode())
    ends = np.cumsum([len(token) for token in encode(text).tokens])  # byte-level: a character of a token is a byte of the text
    inside = [any(a <= end - len(token) and end <= b for a, b in spans) for token, end in zip(encode(text).tokens, ends)]
    _, _, _, stops, config = texts.TOKENIZERS[tokenizer]
    case = {"name": f"labels-{tokenizer}-{name}", "kind": "labels", "tokenizer": f"tokenizers/{tokenizer}", "messages": texts.messages_of(chat),
            "rendered": text, "supervised": marked.replace("⟧", "⟦").split("⟦")[1::2], "prompt": prompt, "inputs": []}
    utf8 = lambda s: np.frombuffer(s.encode(), np.uint8)
    kit.add(case, {}, {}, {}, {"text": utf8(text), "ids": np.array(encode(text).ids), "supervised": np.array(inside, np.uint8),
                       "stop_ids": np.array(sorted({core.token_to_id(t) for t in (*stops, config["eos_token"])})),
                       "prompt_text": utf8(prompt), "prompt_ids": np.array(encode(prompt).ids)})


ABOUT = {
    "format": 1,
    "rule": "shape equal and |found - expected| <= tolerance; nothing is compared where expected is nan (padding)",
    "tolerances": f"{FACTOR} x how far the tensor moves, at most over {TRIALS} trials, when every input is multiplied by 1 +- 2^-23, plus "
                  f"{FLOOR} x 2^-23 x its largest expected magnitude; after.*: 2 x how far AdamW moves it when every gradient is off by its "
                  "tolerance, plus the same, and nan where that is more than a twentieth of a step; integers: 0",
    "labels": {"enable_thinking": False, "date_string": "26 Jul 2024", "add_special_tokens": False},
}


def make(folder: Path) -> None:
    """Write the whole kit into a folder."""
    kit = Kit(folder)
    for name, config in CONFIGS.items():
        make_backbone(kit, name, config)
        forward_case(kit, name)
    for name in texts.TOKENIZERS:
        make_tokenizer(kit, name)
    for mixer in ("linear", "mlp", "attention"):
        for writeback in ("add", "gate", "bounded"):
            side_path_case(kit, mixer, writeback)
    for name in ADAPTERS:
        make_adapter(kit, name)
        merge_case(kit, name)
        decode_case(kit, name)
    for name in TRAIN:
        train_case(kit, name)
    greedy_case(kit, "greedy-bare", "llama", None, [11, 37, 45], seed=7)
    greedy_case(kit, "greedy-side-path", "qwen3", "dora", [13, 31, 47], seed=17)
    for chat in texts.CHATS:
        labels_case(kit, *chat)
    (folder / "cases.json").write_text(json.dumps(ABOUT | {"cases": kit.cases}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ verify

DATA = ("backbones", "adapters", "tokenizers", "inputs", "expected", "cases.json")


def data_files(folder: Path) -> set[str]:
    """Relative paths of every generated file in a kit's folder."""
    return {file.relative_to(folder).as_posix() for part in DATA for file in [folder / part, *(folder / part).rglob("*")] if file.is_file()}


def differences(committed: Path, fresh: Path) -> list[str]:
    """Lines on what the seeds give and the committed kit does not hold: JSON byte by byte, tensors bit by bit, expected ones
    within one rounding, because another machine's float64 may lie on the other side of a float32's edge."""
    have, want = data_files(committed), data_files(fresh)
    lines = [f"{file}: only in {'the committed kit' if file in have else 'what the seeds give'}" for file in sorted(have ^ want)]
    for file in sorted(have & want):
        same = same_tensors(committed / file, fresh / file, 2 * ULP * file.startswith("expected")) if file.endswith("safetensors") else \
            (committed / file).read_bytes() == (fresh / file).read_bytes()
        lines += [] if same else [f"{file}: differs"]
    return lines


def same_tensors(a: Path, b: Path, rounding: float) -> bool:
    """The same metadata, names, shapes and dtypes, and values that differ by at most `rounding` of the tensor's largest?"""
    (x, x_meta), (y, y_meta) = read_with_metadata(a), read_with_metadata(b)
    if x_meta != y_meta or {k: (v.shape, v.dtype) for k, v in x.items()} != {k: (v.shape, v.dtype) for k, v in y.items()}:
        return False
    return all(np.allclose(x[k], y[k], rtol=0, atol=rounding * float(np.abs(np.nan_to_num(y[k])).max()), equal_nan=True) for k in x)


def read_with_metadata(file: Path) -> tuple[Arrays, dict[str, str] | None]:
    """Tensors and metadata; the order of the metadata in the file is not settled, so its bytes are not compared."""
    with safe_open(file, framework="np") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()


def verify() -> int:
    """Print what differs and what our code fails; 0 when nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        lines = differences(HERE, Path(folder))
    results = [result for case in check.read_cases() for result in check.run_function(ours.run, case)]
    failed = [result for result in results if not result.passed]
    if failed:
        print(check.table(failed))
    print("\n".join([*lines, f"{len(data_files(HERE))} files, {len(lines)} differ from what the seeds give",
                     f"{len(results)} tensors, {len(failed)} failed by our code"]))
    return int(bool(lines or failed))


def main() -> int:
    """Make or verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="change nothing, exit 1 if the kit no longer holds")
    if parser.parse_args().verify:
        return verify()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))  # the committed kit stays whole until the new one is
        for part in DATA[:-1]:
            shutil.rmtree(HERE / part, ignore_errors=True)
        shutil.copytree(folder, HERE, dirs_exist_ok=True)
    sizes = [(HERE / file).stat().st_size for file in data_files(HERE)]
    print(f"wrote {len(sizes)} files, {sum(sizes):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
