"""Our code on the kit's cases: python tests/golden/check.py tests.golden.ours:run."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import talan
import train
from data.chat import Row, encode_row, load_tokenizer
from model import Cache, Transformer, generate, load_model
from talan import SidePath, TalanConfig, load_adapter, merge_adapter

Case = dict[str, Any]
Tensors = dict[str, np.ndarray]


def run(case: Case, inputs: Tensors) -> Tensors:
    """The tensors that our code computes for one case."""
    out = {}
    for name, value in KINDS[case["kind"]](case, inputs).items():
        out[name] = np.asarray(value.detach() if isinstance(value, Tensor) else value)
    return out


def load(case: Case) -> Transformer:
    """The case's backbone with its adapter folder attached, if it has one."""
    model = load_model(HERE / case["backbone"])
    if case.get("folder"):
        load_adapter(model, HERE / case["folder"], case.get("scope", "joint"))
    return model


def batch_of(inputs: Tensors) -> tuple[Tensor, Tensor]:
    """tokens (B,T) and lengths (B,)."""
    return torch.from_numpy(inputs["tokens"]), torch.from_numpy(inputs["lengths"])


@torch.no_grad()
def forward_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """embedding, layer.N, hidden (B,T,D), logits (B,T,V); read by forward hooks, as a user may."""
    model, out = load(case), {}
    modules = {f"layer.{n}": block for n, block in enumerate(model.model.layers)}
    modules["embedding"] = model.model.embed_tokens
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, result, name=name: out.update({name: result}))
    out["hidden"] = model(batch_of(inputs)[0])
    return out | {"logits": model.logits(out["hidden"])}


class Recorder(SidePath):
    """A side path that keeps what passes between its stages."""

    def compress(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep x, k (the first root-mean-square taken in here), v, e = log w."""
        rms, calls = talan.rms, []

        def record(s: Tensor) -> Tensor:
            calls.append(rms(s))
            return calls[-1]

        with mock.patch.object(talan, "rms", record):
            w, v = super().compress(x, lengths)
        self.kept = {"x": x, "k": calls[0], "v": v, "e": w.log()}
        self.memory: list[Tensor] = []
        return w, v

    def remix(self, z: Tensor, x: Tensor) -> Tensor:
        """Keep the memory z, chunk by chunk."""
        self.memory.append(z)
        return super().remix(z, x)

    def write(self, y: Tensor, x: Tensor, stream: Tensor) -> Tensor:
        """Keep y and delta."""
        self.kept |= {"z": torch.cat(self.memory, 1), "y": y, "delta": super().write(y, x, stream)}
        return self.kept["delta"]


@torch.no_grad()
def side_path_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """Every intermediate (B,T,...), h_out (B,T,D), and the state num (B,M,r), den (B,M)."""
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    h, lengths, state = given.pop("h"), given.pop("lengths"), (given.pop("num"), given.pop("den"))
    path = Recorder(h.shape[2], TalanConfig(**case["side_path"]))
    path.load_state_dict(given)
    h_out, (num, den) = path(h, state, lengths)
    return path.kept | {"h_out": h_out, "num": num, "den": den}


def train_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """loss, grad.NAME of the first step, after.NAME of the last, named as in an adapter's files."""
    model, settings = load(case).train(), case["optimizer"]
    names = {p: talan.peft_name(name) for name, p in model.named_parameters()}
    names |= {p: n for n, p in model.named_parameters() if talan.group_of(n) != "adapter"}
    learning = {name: p for p, name in names.items() if p.requires_grad}
    rows = []
    for ids, marks, n in zip(inputs["tokens"], inputs["supervised"], inputs["lengths"]):
        rows.append(Row(ids[:n].tolist(), marks[:n].astype(bool).tolist()))
    batch, out = train.make_batch(rows, "cpu"), {}
    chosen = {key: settings[key] for key in ("lr", "weight_decay", "talan_lr_scale")}
    optimizer = train.build_optimizer(model, train.Settings(**chosen))
    for step in range(settings["steps"]):
        loss = train.loss_sum(model, batch, model) / len(batch.targets)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            grads: Any = {f"grad.{name}": p.grad for name, p in learning.items()}
            out = {"loss": loss} | copy.deepcopy(grads)
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * group["lr_scale"]
        optimizer.step()
    return out | {f"after.{name}": p for name, p in learning.items()}


def merge_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """merged.NAME (out,in) of every adapted projection."""
    model = load(case)
    merge_adapter(model)
    merged = {name: p for name, p in model.named_parameters() if "_proj." in name}
    targets = tuple(f"{name}.weight" for name in case["adapter"]["targets"])
    return {f"merged.{name}": p for name, p in merged.items() if name.endswith(targets)}


@torch.no_grad()
def decode_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """State and hidden (B,D) after a ragged prefill, then hidden (B,D) of one more token each."""
    model, (tokens, lengths) = load(case), batch_of(inputs)
    rows, steps = torch.arange(len(tokens)), torch.from_numpy(inputs["next"])
    cache = Cache(model.config, len(tokens), tokens.shape[1] + steps.shape[1])
    out: dict[str, Any] = {"prefill": model(tokens, cache, lengths)[rows, lengths - 1]}
    out["lengths"] = cache.lengths.clone()
    for layer, (num, den) in cache.side.items():
        out |= {f"num.{layer}": num.clone(), f"den.{layer}": den.clone()}
    for n in range(steps.shape[1]):
        out[f"step.{n}"] = model(steps[:, n : n + 1], cache)[:, 0]
    return out


def greedy_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """New ids (B,max_new_tokens), -1 behind a row's end; two rows at once, so they are refilled."""
    tokens, lengths = batch_of(inputs)
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    limit = case["max_new_tokens"]
    new = generate(load(case), prompts, limit, eos_ids=case["stop_ids"], batch_rows=2)
    return {"new_tokens": np.array([row + [-1] * (limit - len(row)) for row in new])}


def labels_case(case: Case, inputs: Tensors) -> dict[str, Any]:
    """UTF-8 bytes and ids of the rendered text and of the prompt, the text's marks, stop ids."""
    tokenizer, messages = load_tokenizer(HERE / case["tokenizer"]), case["messages"]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    row, text = encode_row(tokenizer, messages), tokenizer.render(messages)
    prompt = tokenizer.render(messages[:last], add_generation_prompt=True)
    out = {"text": np.frombuffer(text.encode(), np.uint8), "ids": row.ids}
    out |= {"supervised": row.supervised, "stop_ids": tokenizer.eos_ids}
    out["prompt_text"] = np.frombuffer(prompt.encode(), np.uint8)
    return out | {"prompt_ids": tokenizer.encode(prompt)}


KINDS = {"forward": forward_case, "side_path": side_path_case, "train": train_case}
KINDS |= {"merge": merge_case, "decode": decode_case, "greedy": greedy_case, "labels": labels_case}
