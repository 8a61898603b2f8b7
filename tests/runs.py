"""Short runs of train.py for the tests: a tiny backbone and 62 rows; start, stop, compare."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import train
from common import generator, read_json, write_json
from data.chat import load_tokenizer
from model import ModelConfig, Transformer
from talan import checkpoint_folder

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SHORT = {"tasks": ("none",), "rank": 4, "slots": 2, "width": 8, "step_tokens": 512, "dev_rows": 8}
SHORT |= {"steps": 4, "device": "cpu", "log_every": 0}


def write_backbone(folder, **changes):
    """The embedded tokenizer, its config made smaller, and weights of sizes that matter."""
    shutil.copytree(ROOT / "data/tiny/model", folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | SMALL | changes)
    weights = {}
    for name, p in Transformer(ModelConfig.from_dir(folder)).named_parameters():
        mean, std = (1.0, 0.3) if "norm" in name else (0.0, 0.2)
        weights[name] = mean + std * torch.randn(p.shape, generator=generator("test", name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """model: a small backbone's folder; rows: a file of 62 embedded rows; tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    model, rows = write_backbone(folder / "model"), folder / "rows.jsonl"
    lines = (ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[::130]))
    return SimpleNamespace(model=model, rows=str(rows), tokenizer=load_tokenizer(model))


def flags(tiny, out, **changes):
    """The settings of a short run."""
    return {"backbone": tiny.model, "data": (tiny.rows,), "out": str(out), **SHORT, **changes}


def start(tiny, out, **changes):
    """Do such a run; returns its folder."""
    train.main(flags(tiny, out, **changes))
    return Path(out)


def python(*args, **options):
    """Run this Python on as many threads as this process has."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    args = [sys.executable, *map(str, args)]
    return subprocess.run(args, capture_output=True, text=True, env=environment, **options)


def metrics(run):
    """metrics.jsonl without what may differ between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        for name in ("out", "resume"):
            line.get("settings", {}).pop(name, None)
    return lines


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    """Path -> bytes of everything under a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder): p.read_bytes() for p in files}


def tensors(run):
    """Every tensor of a run's newest checkpoint."""
    files = sorted(checkpoint_folder(run).glob("*.safetensors"))
    return {f"{f.name} {name}": t for f in files for name, t in load_file(f).items()}


def assert_same_tensors(one, two):
    assert one.keys() == two.keys() and len(one) > 4
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def assert_same(run, want):
    """Two runs equal: files, tensors, metrics."""
    assert_same_tensors(tensors(run), tensors(want))
    assert metrics(run) == metrics(want)
    assert contents(run).keys() == contents(want).keys()


def perturb(patch):
    """Let build_model return what trains away from its start, where half the gradients are 0."""
    build_model = train.build_model

    def perturbed(settings, device):
        model = build_model(settings, device)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=generator("perturb", name))
        return model

    patch.setattr(train, "build_model", perturbed)


class Stopped(Exception):  # noqa: N818
    """Stands for the end of the process."""


def stop_at(patch, step, act=None):
    """Call act, or raise Stopped, when a step is logged: its weights are not yet saved."""
    write = train.Metrics.write

    def write_and_act(self, **values):
        write(self, **values)
        if (values["kind"], values["step"]) == ("step", step):
            if act is None:
                raise Stopped
            act()

    patch.setattr(train.Metrics, "write", write_and_act)
