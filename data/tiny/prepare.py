"""Regenerate the tiny model and its data from seeds: rows, tokenizer, pretraining.

    python data/tiny/prepare.py                 everything (pretraining takes most of an hour on two cores)
    python data/tiny/prepare.py --stage data    the rows only
    python data/tiny/prepare.py --size 8m       another backbone on the same rows: data/tiny/model-8m, not committed

The committed weights are of commit 61efb01. The order of pretraining rows has changed since (a4860c0: a step counts padding), so weights
made anew are not the same; rows and tokenizer are the same bytes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from data.settings import parse, setting
from data.tiny import tasks

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = r"\p{N}| ?[^\s\p{L}\p{N}]+ (?=\p{N})| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 640,
    "hidden_size": 160,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
# Size -> what differs from the committed model, which is 2m, and its pretraining steps. Millions of parameters: 0.9, 1.8, 4.1, 8.1, 1.8.
SIZES: dict[str, tuple[dict[str, object], int]] = {
    "1m": ({"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5, "head_dim": 32}, 4_000),
    "2m": ({}, 12_500),
    "4m": ({"hidden_size": 224, "intermediate_size": 576, "num_hidden_layers": 7, "num_attention_heads": 6}, 2_000),
    "8m": ({"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 9, "num_attention_heads": 6}, 2_000),
    "llama": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, 2_000),
}


@dataclass(frozen=True)
class Settings:
    """Regenerate the tiny model and its data from seeds. Without flags: everything, pretraining included."""

    stage: str = setting("all", "data, tokenizer, pretrain or all")
    size: str = setting("2m", f"which backbone: {', '.join(SIZES)}; 2m is the committed one, llama is as large")
    seed: int = setting(0, "seeds the rows, the random weights and the order of pretraining")
    out: str = setting(str(HERE), "folder of the rows and of model/")
    work: str = setting(str(ROOT / "runs" / "tiny-pretrain"), "scratch folder: pretraining rows, start and run")
    conversations: int = setting(200_000, "pretraining conversations")
    tokenizer_rows: int = setting(20_000, "conversations the tokenizer is trained on")
    steps: int = setting(0, "pretraining steps; 0: as many as SIZES says")
    step_tokens: int = setting(2_048, "tokens of one pretraining step, padding included")
    lr: float = setting(2e-3, "peak learning rate of pretraining")
    warmup: float = setting(0.02, "share of the steps with a linearly rising rate")
    weight_decay: float = setting(0.1, "AdamW's decoupled weight decay")
    clip: float = setting(1.0, "largest global gradient norm")

    @property
    def folder(self) -> Path:
        """Where the finished model goes."""
        return Path(self.out) / ("model" if self.size == "2m" else f"model-{self.size}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines atomically, one at a time."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    write_atomic(path, write)


# ---------------------------------------------------------------- stage: data


def post_files(seed: int) -> dict[str, list[tasks.Row]]:
    """Return the rows of every committed data file, by its name under the folder."""
    test = tasks.post_rows("test", seed)
    files = {f"test/{task}.jsonl": [row for row in test if row["task"] == task] for task in tasks.TASKS}
    return files | {f"{split}.jsonl": tasks.post_rows(split, seed) for split in ("train", "dev")}


def make_data(settings: Settings) -> None:
    """Write the post-training rows and, to the scratch folder, the pretraining conversations."""
    for name, rows in post_files(settings.seed).items():
        write_rows(Path(settings.out) / name, rows)
    write_rows(pretrain_file(settings), tasks.pretrain_rows(settings.seed, settings.conversations))


def pretrain_file(settings: Settings) -> Path:
    """Return where the pretraining conversations lie."""
    return Path(settings.work) / "pretrain.jsonl"


# ---------------------------------------------------------------- stage: tokenizer


def tokenizer_texts(settings: Settings) -> Iterator[str]:
    """Yield the sample of text the tokenizer is trained on: pretraining turns, then training rows."""
    for conversation in tasks.pretrain_rows(settings.seed, settings.tokenizer_rows):
        yield from (f"{message['role']}\n{message['content']}\n" for message in conversation["messages"])
    for row in islice(tasks.post_rows("train", settings.seed), settings.tokenizer_rows):
        yield f"user\n{row['prompt']}\nassistant\n{row['completion']}\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE that keeps digits apart; returns tokenizer.json's text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True) + "\n"


def tokenizer_config() -> dict[str, object]:
    """Return tokenizer_config.json: the special tokens and plain ChatML."""
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(i): {"content": token} | flags for i, token in enumerate(SPECIAL_TOKENS)},
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": end_of_turn,
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "pad_token": end_of_text,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def make_tokenizer(settings: Settings) -> None:
    """Write the tokenizer and the configuration files of the model folder."""
    folder = settings.folder
    text = train_tokenizer(tokenizer_texts(settings), MODEL_CONFIG["vocab_size"])
    write_text(folder / "tokenizer.json", text)
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    write_json(folder / "config.json", MODEL_CONFIG | SIZES[settings.size][0])
    stops = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False}
    write_json(folder / "generation_config.json", stops)


# ---------------------------------------------------------------- stage: pretrain


def make_start(settings: Settings) -> Path:
    """Write a model folder with random float32 weights to pretrain from; returns it."""
    from safetensors.torch import save_file

    from model import ModelConfig, Transformer

    start = Path(settings.work) / settings.size / "start"
    source = settings.folder
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        write_text(start / name, (source / name).read_text(encoding="utf-8"))
    model = Transformer(ModelConfig.from_dir(start))
    model.init_weights(settings.seed)
    weights = {name: value.detach().float().contiguous() for name, value in model.named_parameters()}
    write_atomic(start / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    return start


def train_command(settings: Settings, start: Path, run: Path) -> list[str]:
    """Return the call of the repository's own training loop, every weight trained."""
    flags = {
        "--scope": "full", "--adapter": "none", "--backbone": start, "--data": pretrain_file(settings), "--out": run,
        "--dtype": "float32", "--device": "cpu", "--tasks": "none", "--eval-every": 500, "--save-every": 500,
    }  # fmt: skip
    flags["--steps"] = settings.steps or SIZES[settings.size][1]
    for name in ("step_tokens", "lr", "warmup", "weight_decay", "clip", "seed"):
        flags["--" + name.replace("_", "-")] = getattr(settings, name)
    resume = ["--resume"] if run.exists() else []
    return [sys.executable, "train.py", "--no-talan", *(str(x) for pair in flags.items() for x in pair), *resume]


def pretrain(settings: Settings) -> None:
    """Pretrain from random weights (resuming if begun) and write the bfloat16 model."""
    import torch
    from safetensors.torch import load_file, save_file

    if not pretrain_file(settings).exists():
        make_data(settings)
    run = Path(settings.work) / settings.size / "run"
    start = run.with_name("start")
    start = start if run.exists() else make_start(settings)
    subprocess.run(train_command(settings, start, run), cwd=ROOT, check=True)
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(run / "model.safetensors").items()}
    target = settings.folder / "model.safetensors"
    write_atomic(target, lambda path: save_file(weights, path, metadata={"format": "pt"}))


def main(settings: Settings) -> None:
    """Run the chosen stages and print how long each took. Raises ValueError on an unknown stage or size."""
    stages = {"data": make_data, "tokenizer": make_tokenizer, "pretrain": pretrain}
    if settings.stage not in (*stages, "all"):
        raise ValueError(f"stage: expected one of {', '.join((*stages, 'all'))}, found {settings.stage!r}")
    if settings.size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, found {settings.size!r}")
    for name, stage in stages.items():
        if settings.stage in (name, "all"):
            began = time.perf_counter()
            stage(settings)
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main(parse(Settings))
    except ValueError as error:
        raise SystemExit(f"prepare.py: {error}") from None
