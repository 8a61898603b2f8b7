"""For all tests: the root on sys.path, no network, and a factory of tiny random checkpoints."""

import os
import signal
import sys
import zlib
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test needs the network
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs would not hear Ctrl-C
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TINY = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """make("qwen3" or "llama", shards=False, **config fields) -> folder, written by transformers.

    Every tensor is random and of a size that matters, in the norms too: ones hide wiring bugs.
    """
    made: dict[str, Path] = {}

    def make(kind: str = "qwen3", shards: bool = False, **fields) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        key = repr((kind, shards, sorted(fields.items())))
        if key not in made:
            extra = {"head_dim": 16} if kind == "qwen3" else {}
            config = AutoConfig.for_model(kind, **{**TINY, **extra, **fields})
            reference = AutoModelForCausalLM.from_config(config)
            draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            with torch.no_grad():
                for name, p in reference.named_parameters():
                    mean, std = (1, 0.3) if "norm" in name else (0, 0.5)
                    if "norm" not in name and "embed" not in name and p.dim() == 2:
                        std = 1.5 * p.shape[1] ** -0.5
                    p.copy_(mean + std * torch.randn(p.shape, generator=draw))
            folder = tmp_path_factory.mktemp(kind)
            reference.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
            made[key] = folder
        return made[key]

    return make
