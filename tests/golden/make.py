"""Write the golden kit again from its seeds, or prove that it still holds.

    python tests/golden/make.py             write backbones, adapters, tokenizers, inputs, expected
    python tests/golden/make.py --verify    change nothing: the seeds give these files, and our
                                            code passes them

Expected values are reference.py's, float64 stored as float32, and texts.py's, written by hand; none
comes from the code under test. save_adapter writes the adapter folders: their layout is tested too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Encoding
from tokenizers import Tokenizer as Core
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from model import load_model
from talan import AdapterConfig, TalanConfig, attach, save_adapter
from tests.golden import check, ours, reference, texts

Case = dict[str, Any]
Arrays = dict[str, np.ndarray]
Doubles = dict[str, Tensor]  # float64
Shapes = dict[str, tuple[int, ...]]
Compute = Callable[[Doubles], Doubles]
ULP = 2.0**-23  # spacing of float32 numbers at 1
# A tensor's tolerance: FACTOR times how far it moves, at most over TRIALS, when every input is off
# by one ULP, plus FLOOR ULP of its largest value.
TRIALS, FACTOR, FLOOR = 6, 8, 8
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    " num_key_value_heads head_dim"
).split()
SIDE = "layers site slots width mixer writeback bound grad_scale trunk_grad_scale".split()


def backbone(name: str, kind: str, eps: float, *sizes: int) -> Case:
    """The beginning of a config.json."""
    numbers = dict(zip(SIZES, sizes)) | {"hidden_act": "silu", "rms_norm_eps": eps}
    return {"architectures": [name], "model_type": kind, **numbers}


def adapter(kind: str, rank: int, alpha: int, targets: str) -> Case:
    """Fields of an AdapterConfig."""
    low_rank = {"kind": kind, "rank": rank, "alpha": alpha, "dropout": 0.0}
    return low_rank | {"targets": [f"{name}_proj" for name in targets.split()]}


def side(*values: Any) -> Case:
    """Fields of a TalanConfig."""
    return dict(zip(SIDE, values))


QWEN3 = backbone("Qwen3ForCausalLM", "qwen3", 1e-6, 53, 16, 20, 2, 4, 2, 6)
QWEN3 |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
QWEN3 |= {"attention_bias": False, "tie_word_embeddings": True}
QWEN3 |= {"max_position_embeddings": 512, "dtype": "float32"}
LLAMA = backbone("LlamaForCausalLM", "llama", 1e-5, 47, 24, 20, 2, 3, 1, 8)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
LLAMA |= {"rope_theta": 10000.0, "rope_scaling": LLAMA3, "attention_bias": False}
LLAMA |= {"mlp_bias": False, "tie_word_embeddings": False}
LLAMA |= {"max_position_embeddings": 512, "torch_dtype": "float32"}
CONFIGS = {"qwen3": QWEN3, "llama": LLAMA}

# Adapter folder -> backbone, adapter, side path. Together: all kinds, mixers, writebacks and sites,
# one layer and several, both gradient scales.
ADAPTERS: dict[str, tuple[str, Case, Case]] = {
    "lora": (
        "qwen3",
        adapter("lora", 2, 6, "q k v o gate up down"),
        side([1], "block", 3, 4, "linear", "add", 0.1, 0.5, 1.0),
    ),
    "rslora": (
        "llama",
        adapter("rslora", 3, 4, "q v down"),
        side([0, 1], "attention", 5, 4, "mlp", "gate", 0.1, 1.5, 0.25),
    ),
    "dora": (
        "qwen3",
        adapter("dora", 2, 3, "k o up"),
        side([0, 1], "block", 3, 5, "attention", "bounded", 0.6, 1.0, 0.0),
    ),
}
# Case -> adapter folder, scope, talan_lr_scale.
TRAIN = {
    "train-lora": ("lora", "joint", 1.0),
    "train-rslora": ("rslora", "joint", 0.5),
    "train-dora": ("dora", "joint", 1.0),
    "train-scope-writeback": ("rslora", "writeback", 1.0),
    "train-scope-talan": ("dora", "talan", 1.0),
}
OPTIMIZER = {"name": "AdamW", "steps": 3, "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}
OPTIMIZER |= {"weight_decay": 0.2, "clip": None}
LENGTHS = [9, 4, 6]


def draw(name: str, *shape: int, std: float, mean: float = 0.0) -> np.ndarray:
    """Normal numbers seeded by a name, as multiples of 1/256 that are not zero.

    So every float format of 16 bits and more holds them exactly.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    values = np.round((mean + std * normal) * 256) / 256
    return np.where(values == 0, 1 / 256, values).astype(np.float32)


def integers(name: str, low: int, high: int, *shape: int) -> np.ndarray:
    """Integers from low to high - 1, seeded by a name."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).randint(low, high, shape)
    return np.asarray(drawn, np.int64)


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows (t,...) of different t -> (B,T,...) with nan behind each row's end."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=math.nan)


def doubles(arrays: Arrays) -> Doubles:
    """The same numbers as float64 tensors."""
    return {name: torch.from_numpy(value).double() for name, value in arrays.items()}


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
        noisy = {}
        for key, value in p.items():
            signs = 2 * integers(f"{trial}.{key}", 0, 2, *value.shape) - 1
            noisy[key] = value * (1 + ULP * torch.as_tensor(signs))
        for name, value in compute(noisy).items():
            moved[name] = max(moved[name], largest(value - expected[name]))
    floor = {name: FLOOR * ULP * largest(value) for name, value in expected.items()}
    return {name: round_up(FACTOR * far + floor[name]) for name, far in moved.items()}


class Kit:
    """A folder that cases are written into; their parameters are read from `source`."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.cases: list[Case] = []

    def write(self, file: str, tensors: Arrays) -> None:
        """One safetensors file."""
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        plain = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        save_file(plain, self.folder / file, metadata={"format": "pt"})

    def params(self, files: Sequence[str]) -> Doubles:
        """Tensors of these files in float64."""
        found: Doubles = {}
        for file in files:
            found |= doubles(load_file(self.source / file))
        return found

    def add(
        self, case: Case, inputs: Arrays, expected: Doubles, tolerance: Case, exact: Arrays
    ) -> None:
        """Write one case: inputs, float64 values with their tolerances, and integers."""
        if inputs:
            case["inputs"].append(f"inputs/{case['name']}.safetensors")
            self.write(case["inputs"][-1], inputs)
        stored = {key: value.detach().float().numpy() for key, value in expected.items()}
        self.write(f"expected/{case['name']}.safetensors", stored | exact)
        ordered = {name: tolerance[name] for name in expected} | dict.fromkeys(exact, 0)
        self.cases.append(case | {"tolerance": ordered})

    def compute(
        self, case: Case, inputs: Arrays, p: Doubles, compute: Compute, exact: Arrays | None = None
    ) -> None:
        """The same, expected values and tolerances by way of compute(p)."""
        expected = compute(p)
        self.add(case, inputs, expected, tolerances(compute, p, expected), exact or {})


# ---------------------------------------------------------------------------------------- folders


def make_backbone(kit: Kit, name: str, config: Case) -> None:
    """A Hugging Face folder with random weights, norms included."""
    D, F, V, H = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, k = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    block: Shapes = {
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (k, D),
        "self_attn.v_proj": (k, D),
    }
    block |= {"self_attn.o_proj": (D, q), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D)}
    block |= {"mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    if config["model_type"] == "qwen3":
        block |= {"self_attn.q_norm": (H,), "self_attn.k_norm": (H,)}
    shapes: Shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{part}": shape for part, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (V, D)
    weights = {}
    for key, shape in shapes.items():
        std = 0.4 if "embed" in key else 0.3 if len(shape) == 1 else shape[1] ** -0.5
        mean = 1 if len(shape) == 1 else 0
        weights[f"{key}.weight"] = draw(f"{name}.{key}.weight", *shape, std=std, mean=mean)
    kit.write(f"backbones/{name}/model.safetensors", weights)
    file = kit.folder / f"backbones/{name}/config.json"
    file.write_text(json.dumps(config, indent=2) + "\n")


def make_adapter(kit: Kit, name: str) -> None:
    """adapters/NAME: PEFT's two files and the side path's two; random, nothing in them is zero."""
    source, low_rank, side_path = ADAPTERS[name]
    model = load_model(kit.folder / "backbones" / source)
    model.source = f"tests/golden/backbones/{source}"
    attach(model, AdapterConfig(**low_rank), TalanConfig(**side_path))
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        std = 0.3 if key.endswith("lora_B") else p.shape[-1] ** -0.5 if p.dim() else 0.5
        std = 0.5 if p.dim() < 2 or key.endswith("slots") else std
        value = torch.from_numpy(draw(f"{name}.{key}", *p.shape, std=std))
        p.data = p.data * (1 + value / 2) if key.endswith("magnitude_vector") else value
    save_adapter(model, kit.folder / "adapters" / name)


def make_tokenizer(kit: Kit, name: str) -> None:
    """tokenizers/NAME: the files that a checkpoint's tokenizer consists of."""
    folder = kit.folder / "tokenizers" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.tokenizer_files(name).items():
        (folder / file).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------ cases


def model_case(
    kit: Kit, name: str, kind: str, source: str, folder: str = ""
) -> tuple[Case, Doubles, Case]:
    """A case on a backbone, bare or with an adapter; its parameters; the reference's arguments."""
    low_rank, side_path = ADAPTERS[folder][1:] if folder else (None, None)
    files = [f"backbones/{source}/model.safetensors"]
    if folder:
        files.append(f"adapters/{folder}/adapter_model.safetensors")
        files.append(f"adapters/{folder}/talan.safetensors")
    case: Case = {"name": name, "kind": kind, "backbone": f"backbones/{source}"}
    case |= {"folder": f"adapters/{folder}" if folder else None}
    case |= {"adapter": low_rank, "side_path": side_path, "inputs": files}
    how = {"config": CONFIGS[source], "adapter": low_rank, "side": side_path}
    return case, kit.params(files), how


def adapter_case(kit: Kit, name: str, kind: str, folder: str) -> tuple[Case, Doubles, Case]:
    """The same with an adapter folder, on that adapter's backbone."""
    return model_case(kit, name, kind, ADAPTERS[folder][0], folder)


def make_batch(
    name: str, vocab: int, lengths: Sequence[int] = LENGTHS
) -> tuple[Arrays, list[list[int]]]:
    """tokens (B,T), random behind each row's end too, and lengths (B,); the rows unpadded."""
    tokens = integers(name, 0, vocab, len(lengths), max(lengths))
    rows = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    return {"tokens": tokens, "lengths": np.array(lengths)}, rows


def forward_case(kit: Kit, source: str) -> None:
    """embedding, layer.N, hidden, logits of a ragged batch."""
    case, p, how = model_case(kit, f"forward-{source}", "forward", source)
    inputs, rows = make_batch(case["name"], CONFIGS[source]["vocab_size"])

    def compute(p: Doubles) -> Doubles:
        inner = [reference.forward(p, ids=row, **how)[0] for row in rows]
        return {name: padded([row[name] for row in inner]) for name in inner[0]}

    kit.compute(case, inputs, p, compute)


def side_path_case(kit: Kit, mixer: str, writeback: str) -> None:
    """One side path alone: B=2 ragged rows that go on from a given state."""
    B, T, D, M, r, lengths = 2, 7, 12, 3, 4, [7, 4]
    config = side([0], "block", M, r, mixer, writeback, 0.62, 1.0, 1.0)
    shapes: Shapes = {"slots": (M, r), "w_key": (r, D), "w_value": (r, D)}
    shapes |= {"w_read": (M, D), "w_query": (r, D), "w_out": (D, r), "w_gate": (D,), "b_gate": ()}
    shapes |= {"slot_mlp_in": (2 * M, M), "slot_mlp_out": (M, 2 * M)}
    shapes |= {"channel_mlp_in": (2 * r, r), "channel_mlp_out": (r, 2 * r)}
    floats = {"h": draw("side-path.h", B, T, D, std=1)}
    floats["num"] = draw("side-path.num", B, M, r, std=2)
    floats["den"] = np.abs(draw("side-path.den", B, M, std=1)) + 1
    for key in reference.side_names(config):
        std = 0.5 if len(shapes[key]) < 2 else shapes[key][1] ** -0.5
        floats[key] = draw(f"side-path.{key}", *shapes[key], std=std)

    def compute(p: Doubles) -> Doubles:
        given = zip(p["h"], lengths, p["num"], p["den"])
        rows = [reference.side_path(p, config, h[:n], num, den) for h, n, num, den in given]
        found = {key: [row[key] for row in rows] for key in rows[0]}
        state = {key: torch.stack(found.pop(key)) for key in ("num", "den")}
        return {key: padded(values) for key, values in found.items()} | state

    case: Case = {"name": f"side-path-{mixer}-{writeback}", "kind": "side_path"}
    case |= {"side_path": config, "inputs": []}
    kit.compute(case, floats | {"lengths": np.array(lengths)}, doubles(floats), compute)


def train_case(kit: Kit, name: str) -> None:
    """loss, gradients, parameters after AdamW; a row's first token, though marked, is no target."""
    folder, scope, lr_scale = TRAIN[name]
    case, p, how = adapter_case(kit, name, "train", folder)
    inputs, rows = make_batch(name, how["config"]["vocab_size"])
    shape = inputs["tokens"].shape
    marks = integers(name + ".supervised", 0, 2, *shape).astype(np.uint8)
    marks[:, 0] = marks[:, 3] = 1
    marks[np.arange(shape[1]) >= inputs["lengths"][:, None]] = 0
    inputs["supervised"] = marks
    case |= {"scope": scope, "optimizer": OPTIMIZER | {"talan_lr_scale": lr_scale}}
    labelled = [(row, mark[: len(row)].tolist()) for row, mark in zip(rows, marks)]
    names, settings = reference.trainable(list(p), scope), case["optimizer"]

    def loss_of(q: Doubles) -> Tensor:
        return reference.loss(q, rows=labelled, **how)

    def compute(q: Doubles) -> Doubles:
        loss, grads, _ = reference.train(q, names, settings | {"steps": 1}, loss_of)
        return {"loss": loss} | {f"grad.{key}": grads[key][0] for key in names}

    expected = compute(p)
    tolerance = tolerances(compute, p, expected)
    _, grads, after = reference.train(p, names, settings, loss_of)
    for key in names:
        rate = settings["lr"] * (lr_scale if ".side_path." in key else 1)
        moved = settled(p[key], grads[key], after[key], tolerance[f"grad.{key}"], rate, settings)
        expected[f"after.{key}"], tolerance[f"after.{key}"] = moved
    kit.add(case, inputs, expected, tolerance, {})


def settled(
    start: Tensor, grads: list[Tensor], after: Tensor, off: float, rate: float, settings: Case
) -> tuple[Tensor, float]:
    """(after, tolerance): AdamW's step feels the rounding of a small gradient in full.

    The tolerance is twice the farthest that a value moves when its gradients are off by theirs,
    plus its own rounding. Values that move by more than a twentieth of a step are too close to a
    change of sign to compare: nan.
    """
    farthest = torch.zeros_like(start)
    for sign in (-1, 1):
        moved = reference.adamw(start, [g + sign * off for g in grads], rate, settings)
        farthest = torch.maximum(farthest, (moved - after).abs())
    fits = farthest < rate / 20
    after = after.where(fits, math.nan)
    rounding = FLOOR * ULP * largest(after)
    return after, round_up(2 * largest(farthest.where(fits, 0.0)) + rounding)


def merge_case(kit: Kit, folder: str) -> None:
    """The adapted projections' effective weights."""
    case, p, how = adapter_case(kit, f"merge-{folder}", "merge", folder)
    own = [key.removesuffix(".weight") for key in p if not key.startswith(reference.PEFT)]
    names = [name for name in own if name.split(".")[-1] in case["adapter"]["targets"]]

    def compute(p: Doubles) -> Doubles:
        merged = {name: reference.effective_weight(p, name, how["adapter"]) for name in names}
        return {f"merged.{name}.weight": weight for name, weight in merged.items()}

    kit.compute(case, {}, p, compute)


def decode_case(kit: Kit, folder: str) -> None:
    """A ragged prefill, its state, and two more tokens a row, each as if the row were run whole."""
    case, p, how = adapter_case(kit, f"decode-{folder}", "decode", folder)
    vocab = how["config"]["vocab_size"]
    inputs, rows = make_batch(case["name"], vocab)
    inputs["next"] = integers(case["name"] + ".next", 0, vocab, len(rows), 2)

    def compute(p: Doubles) -> Doubles:
        found: list[Doubles] = []
        for row, more in zip(rows, inputs["next"].tolist()):
            runs = [reference.forward(p, ids=row + more[:n], **how) for n in range(3)]
            hidden = [inner["hidden"][-1] for inner, _ in runs]
            steps = {"step.0": hidden[1], "step.1": hidden[2]}
            found.append({"prefill": hidden[0]} | runs[0][1] | steps)
        return {key: torch.stack([row[key] for row in found]) for key in found[0]}

    kit.compute(case, inputs, p, compute, {"lengths": inputs["lengths"]})


def greedy_case(kit: Kit, name: str, source: str, folder: str, stop: list[int], seed: int) -> None:
    """The likeliest tokens up to a stop id; -1 behind it. Raises ValueError on a close call."""
    case, p, how = model_case(kit, name, "greedy", source, folder)
    limit = 8
    case |= {"max_new_tokens": limit, "stop_ids": stop}
    vocab = how["config"]["vocab_size"]
    inputs, rows = make_batch(f"{name}.{seed}", vocab, [*LENGTHS, 1, 5])
    new = np.full((len(rows), limit), -1)
    for b, row in enumerate(rows):
        ids, lead = reference.greedy(p, prompt=row, limit=limit, stop=stop, **how)
        if lead < 1e-2:
            raise ValueError(f"{name}: two logits lie {lead} apart; choose another seed")
        new[b, : len(ids)] = ids
    kit.add(case, inputs, {}, {}, {"new_tokens": new})


def labels_case(kit: Kit, tokenizer: str, name: str, chat: str, marked: str) -> None:
    """Texts and marks that texts.py writes by hand; supervised is a token within one marked span.

    The tokenizers are byte-level: a character of a token is a byte of the text.
    """
    core = Core.from_file(str(kit.folder / "tokenizers" / tokenizer / "tokenizer.json"))

    def encode(text: str) -> Encoding:
        return core.encode(text, add_special_tokens=False)

    def utf8(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    prompt = texts.prompt_of(name, marked)
    parts = marked.replace("⟧", "⟦").split("⟦")  # every second one is marked
    spans = [np.full(len(part.encode()), n) for n, part in enumerate(parts)]
    part_of, encoding = np.concatenate(spans), encode("".join(parts))
    ends = np.cumsum([len(token) for token in encoding.tokens])
    pieces = [set(piece) for piece in np.split(part_of, ends[:-1])]
    inside = [len(piece) == 1 and min(piece) % 2 == 1 for piece in pieces]
    folder = texts.TOKENIZERS[tokenizer]
    stops = {*folder.stops.split(), folder.config["eos_token"]}
    case: Case = {"name": f"labels-{tokenizer}-{name}", "kind": "labels"}
    case |= {"tokenizer": f"tokenizers/{tokenizer}", "messages": texts.messages_of(chat)}
    case |= {"rendered": "".join(parts), "supervised": parts[1::2], "prompt": prompt, "inputs": []}
    exact = {"text": utf8("".join(parts)), "ids": np.array(encoding.ids)}
    exact["supervised"] = np.array(inside, np.uint8)
    exact["stop_ids"] = np.sort([core.token_to_id(token) for token in stops])
    exact |= {"prompt_text": utf8(prompt), "prompt_ids": np.array(encode(prompt).ids)}
    kit.add(case, {}, {}, {}, exact)


ABOUT = {
    "format": 1,
    "rule": "shape equal and |found - expected| <= tolerance; nothing is compared where expected is"
    " nan (padding)",
    "tolerances": f"{FACTOR} x how far the tensor moves, at most over {TRIALS} trials, when every"
    f" input is multiplied by 1 +- 2^-23, plus {FLOOR} x 2^-23 x its largest expected magnitude;"
    " after.*: 2 x how far AdamW moves it when every gradient is off by its tolerance, plus the"
    " same, and nan where that is more than a twentieth of a step; integers: 0",
    "labels": {
        "enable_thinking": False,
        "date_string": "26 Jul 2024",
        "add_special_tokens": False,
    },
}


def make(folder: Path, source: Path) -> None:
    """Write the whole kit into a folder, cases on the backbones and adapters of `source`."""
    kit = Kit(folder, source)
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
    greedy_case(kit, "greedy-bare", "llama", "", [11, 37, 45], seed=7)
    greedy_case(kit, "greedy-side-path", "qwen3", "dora", [13, 31, 47], seed=17)
    for chat in texts.CHATS:
        labels_case(kit, *chat)
    text = json.dumps(ABOUT | {"cases": kit.cases}, indent=1, ensure_ascii=False) + "\n"
    (folder / "cases.json").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------- verify

DATA = ("backbones", "adapters", "tokenizers", "inputs", "expected", "cases.json")


def data_files(folder: Path) -> set[str]:
    """Relative paths of every generated file in a kit's folder."""
    files = [file for part in DATA for file in (folder / part, *(folder / part).rglob("*"))]
    return {file.relative_to(folder).as_posix() for file in files if file.is_file()}


def differences(committed: Path, fresh: Path) -> list[str]:
    """Lines on what the seeds give and the committed kit does not hold."""
    have, want = data_files(committed), data_files(fresh)
    where = {True: "the committed kit", False: "what the seeds give"}
    lines = [f"{file}: only in {where[file in have]}" for file in sorted(have ^ want)]
    for file in sorted(have & want):
        if file.endswith("json"):
            same = read_json(committed / file) == read_json(fresh / file)
        else:
            same = same_tensors(file, committed, fresh)
        lines += [] if same else [f"{file}: differs"]
    return lines


def read_json(file: Path) -> Any:
    """What a JSON file says; the order of names in it says nothing."""
    return json.loads(file.read_text(encoding="utf-8"))


def same_tensors(file: str, committed: Path, fresh: Path) -> bool:
    """The same metadata, names, shapes and dtypes, and values within what may_differ says?"""
    (x, x_meta), (y, y_meta) = (
        read_with_metadata(committed / file),
        read_with_metadata(fresh / file),
    )
    if x_meta != y_meta or x.keys() != y.keys():
        return False
    for name, a in x.items():
        b, ulps = y[name], may_differ(file, name)
        close = ulps * ULP * np.abs(np.nan_to_num(b)).max()
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if not np.allclose(a, b, rtol=0, atol=close, equal_nan=True):
            return False
    return True


def may_differ(file: str, name: str) -> int:
    """By how many ULP of the largest value a tensor may differ where another machine made it.

    Expected values are float64, which may lie on the other side of a float32's edge there. DoRA's
    magnitudes start from a float32 norm of n <= 24 numbers: n / 2 + 3 roundings of half an ULP.
    """
    if file.startswith("expected"):
        return 2
    return 8 if name.endswith("magnitude_vector") else 0


def read_with_metadata(file: Path) -> tuple[Arrays, dict[str, str] | None]:
    """Tensors and metadata; the order of the metadata in the file is not settled."""
    with safe_open(file, framework="np") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


def verify() -> int:
    """Print what differs and what our code fails; 0 when nothing does.

    Expected values are computed again from the committed parameters, which are compared first.
    """
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), HERE)
        lines = differences(HERE, Path(folder))
    results = []
    for case in check.read_cases():
        results += check.run_function(ours.run, case)
    failed = [result for result in results if not result.passed]
    if failed:
        print(check.table(failed))
    lines.append(f"{len(data_files(HERE))} files, {len(lines)} differ from what the seeds give")
    print(*lines, f"{len(results)} tensors, {len(failed)} failed by our code", sep="\n")
    return int(len(lines) > 1 or bool(failed))


def main() -> int:
    """Make or verify."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verify", action="store_true", help="change nothing, 1 if it differs")
    if parser.parse_args().verify:
        return verify()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, folder)  # the committed kit stays whole until the new one is
        for part in DATA[:-1]:
            shutil.rmtree(HERE / part, ignore_errors=True)
        shutil.copytree(folder, HERE, dirs_exist_ok=True)
    sizes = [(HERE / file).stat().st_size for file in data_files(HERE)]
    print(f"wrote {len(sizes)} files, {sum(sizes):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
