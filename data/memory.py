"""Memory a card in training, computed from a model's shape: `python data/memory.py`, no weights and no GPU needed.

weights:     bfloat16 backbone, whole (one card, DDP) or 1/N of it (FSDP2), then with two blocks, embedding and head put together
training:    16 bytes a trainable parameter: float32 value, gradient and AdamW's two moments
activations: what autograd keeps of every block for the tokens of one micro-batch, or only each block's input (--checkpointing) and one block
loss:        a chunk of logits in float32 and bfloat16, the hidden states of the supervised tokens and their gradient

What the allocator wastes and what kernels need for themselves is not in it: leave a tenth of the card free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from data.overhead import read_configs
from data.settings import parse, setting
from eval import table
from model import ModelConfig, Transformer
from talan import AdapterConfig, TalanConfig, attach, group_of

GIB, LOGITS = 2**30, 1 << 26  # LOGITS: numbers in a chunk of the loss on a GPU


@dataclass(frozen=True)
class Settings:
    """Print the memory a card that training needs, by model and mode."""

    models: tuple[str, ...] = setting(("Qwen3-8B", "Qwen3-14B", "Qwen3-32B"), "names in data/shapes.json and data/shapes_large.json")
    cards: tuple[int, ...] = setting((2, 4, 8), "numbers of cards for --fsdp")
    tokens: int = setting(8192, "tokens of a card's micro-batch, padding included")
    rank: int = setting(16, "rank of the adapter on all seven projections")

    def __post_init__(self) -> None:
        """Raises ValueError on numbers below 1."""
        wrong = [f"{name}: expected whole numbers from 1, found {value}" for name in ("cards", "tokens", "rank")
                 for value in (getattr(self, name) if name == "cards" else [getattr(self, name)]) if not str(value).isdecimal() or int(value) < 1]
        if wrong:
            raise ValueError("\n  ".join(wrong))
        object.__setattr__(self, "cards", tuple(map(int, self.cards)))


def kept_bytes(c: ModelConfig, rank: int) -> int:
    """Bytes that autograd keeps of one block for each token, LoRA on all seven projections, bfloat16 (norms' 1/rms and logsumexp float32):
    two norms' inputs and outputs, q, k and v as attention sees them, its output, gate, up, down's input, seven z; Qwen3: q, k before their norms."""
    D, F, H, K, Dh = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    kept = 2 * (4 * D + (2 * H + 2 * K) * Dh + 3 * F + 7 * rank) + 4 * (2 + H)
    return kept + (2 * (H + K) * Dh + 4 * (H + K) if c.model_type == "qwen3" else 0)


def modes(cards: tuple[int, ...]) -> Iterator[tuple[str, int, bool]]:
    """(name, number of cards that the backbone is cut over, checkpointing?)"""
    for checkpointing in (False, True):
        end = ", checkpointing" * checkpointing
        yield "one card, or DDP" + end, 1, checkpointing
        yield from ((f"FSDP over {n}{end}", n, checkpointing) for n in cards)


def account(c: ModelConfig, settings: Settings, cards: int, checkpointing: bool) -> list[float]:
    """[weights, training, activations, loss] in bytes a card."""
    with torch.device("meta"):
        model = Transformer(c)
        attach(model, AdapterConfig(rank=settings.rank), TalanConfig())
    size = {name: p.numel() for name, p in model.named_parameters()}
    backbone = 2 * sum(n for name, n in size.items() if group_of(name) == "backbone")
    block = 2 * sum(n for name, n in size.items() if group_of(name) == "backbone" and name.startswith("model.layers.0."))
    whole = backbone - c.num_hidden_layers * block + 2 * block if cards > 1 else 0  # put together while they compute
    kept, inputs = settings.tokens * kept_bytes(c, settings.rank), settings.tokens * 2 * c.hidden_size * c.num_hidden_layers
    return [backbone / cards + whole, 16 * sum(n for name, n in size.items() if group_of(name) != "backbone"),
            inputs + kept if checkpointing else c.num_hidden_layers * kept, 8 * LOGITS + 4 * settings.tokens * c.hidden_size]


def main(settings: Settings) -> None:
    """Print the table. Raises ValueError."""
    known, rows = read_configs([str(ROOT / "data/shapes.json"), str(ROOT / "data/shapes_large.json")]), []
    if unknown := set(settings.models) - set(known):
        raise ValueError(f"models: expected some of {', '.join(known)}, found {', '.join(sorted(unknown))}")
    for name in settings.models:
        for mode, cards, checkpointing in modes(settings.cards):
            parts = account(known[name], settings, cards, checkpointing)
            rows.append([name, mode, *(f"{part / GIB:.1f}" for part in (*parts, sum(parts)))])
    print(table(["", f"{settings.tokens:,} tokens a card, rank {settings.rank}", "weights", "training", "activations", "loss", "GiB a card"], rows))


if __name__ == "__main__":
    try:
        main(parse(Settings))
    except ValueError as error:
        raise SystemExit(f"memory.py: {error}") from None
