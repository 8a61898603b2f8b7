"""Make the tiny model and its data from seeds: rows, tokenizer, pretraining.

    python data/tiny/prepare.py                 everything: most of an hour on two cores
    python data/tiny/prepare.py --stage data    the rows only
    python data/tiny/prepare.py --size 8m       another backbone on these rows: data/tiny/model-8m

The committed weights are of commit 61efb01. The order of pretraining rows has changed since then
(a4860c0: a step counts padding), so weights made anew differ; rows and tokenizer are the same.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from common import ROOT, Record, atomic, generator, remove, run_script, setting, write_json
from data.tiny import tasks
from model import ModelConfig, Transformer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = r"\p{N}| ?[^\s\p{L}\p{N}]+ (?=\p{N})| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODEL_CONFIG: Record = {
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


def shape(hidden: int, mlp: int, layers: int, heads: int, head_dim: int) -> Record:
    """The fields of config.json that say how large a backbone is."""
    fields = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return fields | {"num_attention_heads": heads, "head_dim": head_dim}


LLAMA: Record = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
# What differs from the committed model, which is 2m, and steps of pretraining. Millions of
# parameters: 0.9, 0.9, 1.8, 4.1, 8.1, 1.8.
SIZES: dict[str, tuple[Record, int]] = {
    "1m": (shape(128, 320, 5, 4, 32), 4_000),
    "1m-llama": (shape(128, 320, 5, 4, 32) | LLAMA, 4_000),
    "2m": ({}, 12_500),
    "4m": (shape(224, 576, 7, 6, 48), 2_000),
    "8m": (shape(288, 768, 9, 6, 48), 2_000),
    "llama": (LLAMA, 2_000),
}


@dataclass(frozen=True)
class Settings:
    """Make the tiny model and its data from seeds. Without flags: everything, with pretraining."""

    stage: str = setting("all", "data, tokenizer, pretrain or all")
    size: str = setting("2m", f"backbone: {', '.join(SIZES)}; 2m is committed")
    seed: int = setting(0, "seeds the rows, the random weights and the order of pretraining")
    out: str = setting(str(HERE), "folder of the rows and of model/")
    work: str = setting(str(ROOT / "runs/tiny-pretrain"), "scratch folder: pretraining rows, runs")
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

    @property
    def pretrain_file(self) -> Path:
        """Where the pretraining conversations lie."""
        return Path(self.work) / "pretrain.jsonl"


# ---- data ----


def post_files(seed: int) -> dict[str, list[tasks.Row]]:
    """The rows of every committed data file, by its name under the folder."""
    files: dict[str, list[tasks.Row]] = {f"test/{task}.jsonl": [] for task in tasks.TASKS}
    for row in tasks.post_rows("test", seed):
        files[f"test/{row['task']}.jsonl"].append(row)
    return files | {f"{split}.jsonl": tasks.post_rows(split, seed) for split in ("train", "dev")}


def make_data(settings: Settings) -> None:
    """Write the post-training rows and, to the scratch folder, the pretraining conversations."""
    for name, rows in post_files(settings.seed).items():
        write_rows(Path(settings.out) / name, rows)
    chats = tasks.pretrain_rows(settings.seed, settings.conversations)
    write_rows(settings.pretrain_file, chats)


def write_rows(path: Path, rows: Iterable[Record]) -> None:
    """Write JSON lines, one at a time, whole or not at all."""
    with atomic(path) as tmp, tmp.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- tokenizer ----


def tokenizer_texts(settings: Settings) -> Iterator[str]:
    """The sample of text the tokenizer is trained on: pretraining turns, then training rows."""
    for chat in tasks.pretrain_rows(settings.seed, settings.tokenizer_rows):
        for message in chat["messages"]:
            yield f"{message['role']}\n{message['content']}\n"
    for row in islice(tasks.post_rows("train", settings.seed), settings.tokenizer_rows):
        yield f"user\n{row['prompt']}\nassistant\n{row['completion']}\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE that keeps digits apart; tokenizer.json's text."""
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


def tokenizer_config() -> Record:
    """tokenizer_config.json: the special tokens and plain ChatML."""
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {}
    for i, token in enumerate(SPECIAL_TOKENS):
        added[str(i)] = {"content": token, **flags, "special": True}
    return {
        "added_tokens_decoder": added,
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
    with atomic(folder / "tokenizer.json") as tmp:
        tmp.write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    write_json(folder / "config.json", MODEL_CONFIG | SIZES[settings.size][0])
    stops = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False}
    write_json(folder / "generation_config.json", stops)


# ---- pretraining ----


def init_weights(model: Transformer, seed: int) -> None:
    """Fresh weights, each of its own generator: normal(0, 0.02), norms 1.

    Those that write to the stream (o_proj, down_proj) have 0.02 / sqrt(2 L).
    """
    for name, p in model.named_parameters():
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
        with torch.no_grad():
            if p.dim() == 1:
                p.fill_(1)
            else:
                p.copy_(torch.randn(p.shape, generator=generator(seed, name)) * std)


def make_start(settings: Settings) -> Path:
    """Write a model folder with random float32 weights to pretrain from; returns it."""
    start = Path(settings.work) / settings.size / "start"
    remove(start)
    with atomic(start) as tmp:
        tmp.mkdir()
        for file in settings.folder.glob("*.json"):
            shutil.copyfile(file, tmp / file.name)
        model = Transformer(ModelConfig.from_dir(tmp))
        init_weights(model, settings.seed)
        weights = {name: p.detach().float().contiguous() for name, p in model.named_parameters()}
        save_file(weights, tmp / "model.safetensors", metadata={"format": "pt"})
    return start


def train_command(settings: Settings, start: Path, run: Path) -> list[str]:
    """The call of the repository's own training loop, every weight trained."""
    flags: Record = {"--scope": "full", "--adapter": "none", "--backbone": start, "--out": run}
    flags |= {"--data": settings.pretrain_file, "--dtype": "float32", "--device": "cpu"}
    flags |= {"--tasks": "none", "--eval-every": 500, "--save-every": 500}
    flags["--steps"] = settings.steps or SIZES[settings.size][1]
    for name in ("step_tokens", "lr", "warmup", "weight_decay", "clip", "seed"):
        flags["--" + name.replace("_", "-")] = getattr(settings, name)
    command = [sys.executable, "train.py", "--no-talan"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    return [*command, "--resume"] if run.exists() else command


def pretrain(settings: Settings) -> None:
    """Pretrain from random weights (resuming if begun) and write the bfloat16 model."""
    if not settings.pretrain_file.exists():
        make_data(settings)
    run = Path(settings.work) / settings.size / "run"
    start = run.with_name("start") if run.exists() else make_start(settings)
    subprocess.run(train_command(settings, start, run), cwd=ROOT, check=True)
    weights = load_file(max(run.glob("step-*")) / "model.safetensors")
    weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    with atomic(settings.folder / "model.safetensors") as tmp:
        save_file(weights, tmp, metadata={"format": "pt"})


def main(overrides: Record) -> None:
    """Run the chosen stages, print how long each took. Raises ValueError on an unknown one."""
    settings = Settings(**overrides)
    stages = {"data": make_data, "tokenizer": make_tokenizer, "pretrain": pretrain}
    if settings.stage not in (*stages, "all") or settings.size not in SIZES:
        expected = f"one of {', '.join(stages)}, all, and a size of {', '.join(SIZES)}"
        raise ValueError(
            f"stage, size: expected {expected}, found {settings.stage} {settings.size}"
        )
    for name, stage in stages.items():
        if settings.stage in (name, "all"):
            began = time.perf_counter()
            stage(settings)
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    run_script(main, Settings, "data/tiny/prepare.py")
