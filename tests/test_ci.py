"""What the workflow, the pinned requirements, pyproject.toml and the README say of versions and commands is the same."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
PINNED = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements.txt").read_text(), re.M))
MATRIX = WORKFLOW["jobs"]["suite"]["strategy"]["matrix"]
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_versions_agree():
    """The newest torch is the pinned one; the README names the first and last Python and both torches; the oldest Python is the linters'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert MATRIX["torch"][-1] == PINNED["torch"] and len(MATRIX["torch"]) == 2
    oldest, newest = MATRIX["python"][0], MATRIX["python"][-1]
    short = [version.rpartition(".")[0] for version in MATRIX["torch"]]
    assert f"Python {oldest} to {newest}, torch {short[0]} and {short[1]}, Linux and macOS" in " ".join(README.split())
    assert project["mypy"]["python_version"] == oldest and project["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert {step["with"]["python-version"] for step in WORKFLOW["jobs"]["lint"]["steps"] if "with" in step} == {oldest}
    assert {name.split("-")[0] for name in MATRIX["os"]} == {"ubuntu", "macos"}


def test_commands_are_those_of_the_repository():
    """Each check of .ci/run is a step here, and the suite is run by the README's command."""
    commands = {line for step in STEPS for line in step.get("run", "").splitlines()}
    assert {"ruff check .", "mypy", "python -m pytest -q"} <= commands
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-2:] == ["ruff check .", "mypy"] and any(line.endswith("&& python -m pytest -q") for line in script)
    assert "python -m pytest -q" in README


def test_rights_and_pins():
    """Read-only, and every action by its major version."""
    assert WORKFLOW["permissions"] == {"contents": "read"} and not any("permissions" in job for job in WORKFLOW["jobs"].values())
    uses = [step["uses"] for step in STEPS if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in uses)
    assert all(job["timeout-minutes"] <= 120 for job in WORKFLOW["jobs"].values())


@pytest.mark.parametrize("torch", MATRIX["torch"])
def test_the_requirements_that_the_suite_installs(torch, tmp_path):
    """All lines of both files, once each, with this torch: by the step's own command."""
    step = next(step for step in STEPS if "all.txt" in step.get("run", ""))
    command = step["run"].splitlines()[0].replace("${{ matrix.torch }}", torch).replace("$RUNNER_TEMP", str(tmp_path))
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    found = (tmp_path / "all.txt").read_text().splitlines()
    lines = itertools.chain(*((ROOT / name).read_text().splitlines() for name in ("requirements.txt", "requirements-dev.txt")))
    assert found == [f"torch=={torch}" if line.startswith("torch==") else line for line in lines if not line.startswith("-r")]
    assert f"torch=={torch}" in found and "python" in Path(sys.executable).name
