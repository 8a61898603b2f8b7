"""The house: imports go in one direction and stand at the top; README and CI agree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# a file imports from those before it
ORDER = ["common", "model", "talan", "data.chat", "data.sandbox", "data.code", "data.tasks"]
ORDER += ["eval", "train", "experiments"]
LATE = ("matplotlib", "torch.distributed", "huggingface_hub", "transformers", "peft")
FILES = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "experiments").glob("*.py")]


def place(module: str) -> int:
    """Where in ORDER a module stands; -1 for one that is not of this project."""
    known = [n for n, name in enumerate(ORDER) if module == name or module.startswith(name + ".")]
    return known[0] if known else -1


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
    """(module, does it stand above the first definition?) of every import."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    first = min((n.lineno for n in tree.body if isinstance(n, definitions)), default=10**9)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno < first) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "data" else []
            found += [(name, node.lineno < first) for name in names or [module]]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_in_one_direction_and_stand_at_the_top(file):
    module = str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for name, on_top in imports(ast.parse(file.read_text())):
        if place(module) >= 0 and place(name) >= 0 and not module.startswith("experiments"):
            assert place(name) < place(module), f"{module} imports {name}, which stands above it"
        assert on_top or name.startswith(LATE), f"{name}: not at the top"


def test_the_order_is_not_empty_talk():
    assert place("data.tasks") < place("train") and place("experiments.sweep") == len(ORDER) - 1
    found = imports(ast.parse("from data import code\ndef f():\n    import train"))
    assert found == [("data.code", True), ("train", False)]


def test_ci_runs_the_readmes_two_commands_and_every_check():
    script, readme = (ROOT / ".ci/run").read_text(), (ROOT / "README.md").read_text().split("\n")
    commands = [line.strip() for line in readme if line.startswith("    python -m pip install -r")]
    assert len(commands) == 2
    for command in commands:
        assert f"\n{command}\n" in script
    for check in ("ruff format --check .", "ruff check .", "mypy", "python -m pytest -q -m slow"):
        assert f"\n{check}" in script


def test_run_time_packages_are_the_five():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert names == {"torch", "numpy", "tokenizers", "safetensors", "tqdm"}
