"""The README holds: recipes are applied to a copy and run, what it names is there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = dict(
    zip(
        ("mixer", "optimizer", "family", "benchmark"),
        re.findall(r"```diff\n(.*?)```", README, re.S),
    )
)
SMALL = ["--steps", "4", "--step-tokens", "256", "--tasks", "none", "--dev-rows", "4"]


def copy_tree(folder: Path) -> Path:
    """What a run needs of the repository, to be changed."""
    shutil.copytree(
        ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("smollm2", "__py*")
    )
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def apply(recipe: str, folder: Path) -> None:
    """The - and unmarked lines of a hunk stand once in the file; put the + and unmarked there."""
    head, *lines = recipe.rstrip("\n").split("\n")
    file = folder / head.removeprefix("--- ")
    for hunk in "\n".join(lines).split("\n@@\n"):
        marks = [(line[:1], line[1:]) for line in hunk.split("\n")]
        old = "\n".join(text for mark, text in marks if mark != "+") + "\n"
        new = "\n".join(text for mark, text in marks if mark != "-") + "\n"
        assert file.read_text().count(old) == 1, f"{file.name}: {old}"
        file.write_text(file.read_text().replace(old, new))


def run(folder: Path, *command: object, code: int = 0) -> str:
    """What `python COMMAND` in this folder prints."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path, request):
    """A copy with the recipe of this name applied."""
    folder = copy_tree(tmp_path)
    apply(RECIPES[request.param], folder)
    return folder


CACHED = """
import torch
from model import Cache, load_model
from talan import TalanConfig, attach, load_adapter
model = load_model("data/tiny/model", dtype=torch.float32)
load_adapter(model, "run")
path = model.model.layers[4].side_path
assert path.config.mixer == "sigmoid" and path.w_out.abs().max() > 0
tokens = torch.randint(600, (2, 12), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    whole, cache = model(tokens), Cache(model.config, 2, 12)
    parts = [model(part, cache) for part in tokens.split([5, 1, 6], 1)]
torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("tree", ["mixer"], indirect=True)
def test_another_mixer_trains_and_decodes(tree):
    run(tree, "train.py", *SMALL, "--mixer", "sigmoid", "--lr", "0.01", "--out", "run")
    run(tree, "-c", CACHED)


@pytest.mark.parametrize("tree", ["optimizer"], indirect=True)
def test_another_optimizer_resumes_to_the_same_bits(tree):
    """Stopped after its second step by an error in its third, and resumed."""
    flags = [*SMALL, "--save-every", "1", "--lr", "0.1"]
    run(tree, "train.py", *flags, "--out", "whole")
    stop = "import train\nkept, n = train.save_checkpoint, []\n"
    stop += "def save(*given):\n    n.append(kept(*given))\n    assert len(n) < 2\n"
    stop += "train.save_checkpoint = save\n"
    values = {"steps": 4, "step_tokens": 256, "tasks": ("none",), "dev_rows": 4, "save_every": 1}
    run(tree, "-c", f"{stop}train.main({ {**values, 'lr': 0.1, 'out': 'cut'} })", code=1)
    assert [folder.name for folder in (tree / "cut").glob("step-*")] == ["step-0000002"]
    run(tree, "train.py", "--out", "cut", "--resume")
    state = "step-0000004/train_state.safetensors"
    assert (tree / "cut" / state).read_bytes() == (tree / "whole" / state).read_bytes()
    assert b"momentum_buffer" in (tree / "cut" / state).read_bytes()


FAMILY = """
import sys, torch
from model import load_model
from talan import load_adapter, merge_adapter
model = load_model("backbone")
load_adapter(model, "adapter")
tokens = torch.load("tokens.pt", weights_only=True)
with torch.no_grad():
    live = model.logits(model(tokens))
    merge_adapter(model)
    torch.save([live, model.logits(model(tokens))], "ours.pt")
"""


@pytest.mark.parametrize("tree", ["family"], indirect=True)
def test_another_family_equals_transformers_with_its_biases(tree):
    """Qwen2 on random weights, with PEFT's LoRA: theirs, ours live, ours merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    theirs = AutoModelForCausalLM.from_config(config)
    for p in theirs.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    theirs.save_pretrained(tree / "backbone")
    peft = get_peft_model(
        theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    for name, p in peft.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape)
    peft.save_pretrained(tree / "adapter")
    tokens = torch.randint(97, (2, 9))
    torch.save(tokens, tree / "tokens.pt")
    run(tree, "-c", FAMILY)
    with torch.no_grad():
        want = peft.eval()(tokens).logits
    for found in torch.load(tree / "ours.pt", weights_only=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tree", ["benchmark"], indirect=True)
def test_a_new_benchmark_is_scored_and_scored_again(tree):
    rows = []
    for n, choices in enumerate((["1", "two"], ["yes", "no", "maybe"], ["a b", "c"])):
        row = {"id": str(n), "prompt": f"Question: {n}?\nAnswer:", "choices": choices}
        rows.append(row | {"answer": "B", "completion": choices[1]})
    (tree / "data/piqa").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tree / "data/piqa/test.jsonl").write_text(text)
    printed = run(tree, "eval.py", "--tasks", "piqa", "--format", "plain", "--out", "scores")
    assert re.search(r"piqa acc +3 ", printed) and re.search(r"acc_norm +3 ", printed)
    again = run(tree, "eval.py", "--rescore", "scores/records.jsonl")
    assert "3 records, 0 verdicts changed" in again
    assert again.split("\n")[1:4] == printed.split("\n")[1:4]


def test_the_side_path_runs_in_a_folder_of_its_own(tmp_path):
    (command,) = re.findall(r"^    (sed -n .*)$", README, re.M)
    subprocess.run(command.replace("> ", f"> {tmp_path}/"), shell=True, cwd=ROOT, check=True)
    program = "import torch, side\n"
    program += "path = side.SidePath(8, side.TalanConfig(mixer='mlp'))\n"
    program += (
        "h, (num, den) = path(torch.ones(2, 3, 8))\nassert torch.equal(h, torch.ones(2, 3, 8))\n"
    )
    program += "assert num.shape == (2, 8, 64) and den.shape == (2, 8)"
    run(tmp_path, "-c", program)


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert run(ROOT, "-c", example).strip()


def test_every_flag_file_and_function_that_it_names_is_there():
    helps = run(ROOT, "train.py", "--help") + run(ROOT, "eval.py", "--help")
    helps += run(ROOT, "talan.py", "merge", "--help")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc-per-node"}
    assert not [
        flag for flag in flags if flag not in helps and flag.replace("--no-", "--") not in helps
    ]
    for file in set(re.findall(r"`((?:data/|tests/|experiments/)?\w+(?:/\w+)*\.py)`", README)):
        assert (ROOT / file).exists(), file
    sources = "".join(file.read_text() for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
    for name in set(re.findall(r"`(?:train|chat|Transformer|Block)\.((?!py\b)\w+)`", README)):
        assert f"def {name}(" in sources, name


def test_it_is_short():
    assert len(README.encode()) <= 14_000
    wide = [line for line in README.split("\n") if len(line) > 100]
    assert not wide
