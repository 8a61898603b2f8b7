"""data/memory.py: the bytes that autograd keeps are counted on a real forward pass, the rest by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.memory import Settings, account, kept_bytes
from model import ModelConfig, Transformer
from talan import AdapterConfig, TalanConfig, attach


def config(kind, layers=2, **values):
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 50}
    return ModelConfig.from_dict({"model_type": kind, "num_hidden_layers": layers, **shape, **values})


def saved_bytes(model, tokens):
    """Bytes of the distinct storages that a forward pass keeps for backward, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # so that no freed storage's address comes again
        storage = tensor.untyped_storage()
        found.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens).sum()
    return sum(n for at, n in found.items() if at not in own)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_a_block_keeps_is_what_autograd_keeps(kind):
    """One more layer keeps kept_bytes more a token, and what CPUs alone keep: norms' inputs in float32, the attention's output in two layouts,
    the rotation's tables. What is left, below 1.5 %, are the casts of the adapter's own weights."""
    B, T, bytes_kept, c = 8, 128, [], config(kind)
    for layers in (2, 3):
        model = Transformer(config(kind, layers)).bfloat16()
        model.init_weights(0)
        attach(model, AdapterConfig(rank=4))
        bytes_kept.append(saved_bytes(model.train(), torch.arange(B * T).view(B, T) % 50))
    cpu = 2 * (2 * c.hidden_size + 4 * 32) + 4 * 32 / B + (2 * 6 * 32 if kind == "qwen3" else 0)
    assert (bytes_kept[1] - bytes_kept[0]) / (B * T) == pytest.approx(kept_bytes(c, 4) + cpu, rel=0.015)


def test_account_by_hand():
    """Two layers, untied: 16 bytes a trainable parameter, 2 a frozen one; cut over two cards a half of it and what is put together."""
    c = config("llama")
    block = 64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 160 + 2 * 64
    rest = 2 * 50 * 64 + 64
    lora = 2 * 16 * sum(map(sum, [(64, 128), (64, 64), (64, 64), (128, 64), (64, 160), (64, 160), (160, 64)]))  # r (in + out)
    side = sum(p.numel() for p in attach(Transformer(c), None, TalanConfig()))
    weights, training, activations, loss = account(c, Settings(tokens=100, rank=16), 1, False)
    assert weights == 2 * (2 * block + rest) and training == 16 * (lora + side)
    assert activations == 2 * 100 * kept_bytes(c, 16) and loss == 8 * 2**26 + 4 * 100 * 64
    assert account(c, Settings(tokens=100), 2, False)[0] == 2 * (2 * block + rest) / 2 + 2 * (rest + 2 * block)
    assert account(c, Settings(tokens=100), 2, True)[2] == 100 * (2 * 64 * 2 + kept_bytes(c, 16))


def test_the_command_prints_the_table_and_names_what_it_does_not_know():
    run = lambda *flags: subprocess.run([sys.executable, "data/memory.py", *flags], cwd=ROOT, capture_output=True, text=True)
    lines = run("--cards", "4").stdout.splitlines()
    assert len(lines) == 1 + 3 * 4 and lines[0].endswith("GiB a card")
    assert "Qwen3-99B" in run("--models", "Qwen3-99B").stderr and "expected whole numbers" in run("--cards", "0").stderr
