"""For all tests: the repository root on sys.path, no network, and a factory of tiny random Hugging Face checkpoints."""

import os
import signal
import sys
import zlib
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may need the network
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it: programs under test would never hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TINY = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """make("qwen3" or "llama", shards=False, **config fields) -> folder, written by transformers once a session.

    Every tensor is random and of a size that matters, the norms' weights too: a checkpoint of ones hides wiring bugs.
    """
    made: dict[str, Path] = {}

    def make(kind: str = "qwen3", shards: bool = False, **fields) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        key = repr((kind, shards, sorted(fields.items())))
        if key not in made:
            extra = {"head_dim": 16} if kind == "qwen3" else {}
            reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **extra, **fields}))
            draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            with torch.no_grad():
                for name, p in reference.named_parameters():
                    mean, std = (1, 0.3) if p.dim() == 1 else (0, 0.5 if "embed" in name else 1.5 * p.shape[1] ** -0.5)
                    p.copy_(mean + std * torch.randn(p.shape, generator=draw))
            folder = tmp_path_factory.mktemp(kind)
            reference.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
            made[key] = folder
        return made[key]

    return make


COUNTED = {"test_hostile.py": "hostile or broken inputs, each with one clear error and nothing left behind",
           "test_properties.py": "properties and fuzzers, each over many random inputs",
           "test_sandbox.py": "attacks and awkward programs in the sandbox"}


def pytest_terminal_summary(terminalreporter):
    """Say how many of these were tried, and how many failed."""
    for file, what in COUNTED.items():
        passed, failed = (sum(report.nodeid.split("::")[0].endswith(file) for report in terminalreporter.stats.get(outcome, ()))
                          for outcome in ("passed", "failed"))
        if passed or failed:
            terminalreporter.write_line(f"{passed + failed} {what}: {failed} failed")
