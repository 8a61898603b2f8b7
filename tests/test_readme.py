"""The README's file map, example and embedded scores are those of the repository."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file, lines", re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M))
def test_line_counts_of_the_file_map(file, lines):
    assert (ROOT / file).read_text(encoding="utf-8").count("\n") == int(lines)


def test_the_file_map_has_line_counts():
    assert len(re.findall(r"^\| `[\w/]+\.py` \| \d+ \|", README, re.M)) >= 5


def test_the_example_runs():
    code = README.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "#### " in done.stdout, done.stderr


def test_every_flag_named_is_one():
    """A flag in backticks or in a command line is a field of some settings, or of torchrun."""
    import eval as evaluation
    import train
    from data import keep

    kinds = (train.Settings, keep.Settings, *evaluation.COMMANDS.values())
    known = {"--" + name.replace("_", "-") for kind in kinds for name in kind.__dataclass_fields__}
    known |= {"--nproc-per-node", "--parts", "--rounds", "--no-talan", "--verify", "--drop-side-path", "--source"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known <= {"--out", "--help"}
