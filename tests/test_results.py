"""RESULTS.md: tables are what their commands print, commands parse, what it names is there."""

import contextlib
import glob
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path
from string import Template

import pytest
from common import parse_cli, read_json
from experiments import sweep

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "RESULTS.md").read_text().replace("\\\n", " ")
BLOCKS = re.findall(r"^```\n\$ python (.*)\n((?:.*\n)*?)```$", TEXT, re.M)
COMMANDS, VALUES = re.findall(r"`python ([^`]*)`", TEXT), {"size": "8m"}
for line in re.findall(r"^(?:    |\$ )(.*)$", TEXT, re.M):  # the shell's variables filled in
    line = Template(line).safe_substitute(VALUES)
    VALUES |= dict(re.findall(r'^(\w+)="(.*)"$', line))
    COMMANDS += re.findall(r"\bpython ((?:'[^']*'|[^;&#])*)", line)


def parse(command):
    """What the command runs, and what its flags say; only data/prepare.py has no Settings."""
    name, *flags = shlex.split(command.removeprefix("-m "))
    if name == "data/prepare.py":
        assert set(flags) <= read_json(ROOT / "data/sources.json").keys()
        return None, {}
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    return module, parse_cli(module.Settings, name, flags)


@cache
def run(command):
    module, overrides = parse(command)
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as out:
        module.main(overrides)
    return [line.split() for line in out.getvalue().split("\n") if line]


def near(x, y):
    """The same word, or a number with a point at most one unit of its last digit away."""
    a, b = (re.fullmatch(r"[+-]?\d+\.(\d+)", word) for word in (x, y))
    return x == y or a and b and abs(float(x) - float(y)) < 1.01 * 10 ** -len(b[1])


@pytest.mark.parametrize("command, table", BLOCKS, ids=range(len(BLOCKS)))
def test_a_table_is_what_its_command_prints(command, table):
    """Line by line, from the first to the last; `...` stands for lines that are left out."""
    left, gap = run(command), False
    for shown in [line.split() for line in table.split("\n") if line]:
        same = [len(x) == len(shown) and all(map(near, x, shown)) for x in left]
        if shown != ["..."]:
            assert any(same if gap else same[:1]), shown
            left = left[same.index(True) + 1 :]
        gap = shown == ["..."]
    assert gap or not left


def test_its_flags_and_files_exist_and_every_sweep_is_in_it():
    for command in COMMANDS:
        for word in parse(command)[1].get("vary", ()):
            sweep.parse_variation(word)
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"`(\w+/[^\s`]*)`", TEXT)
    assert links and all((ROOT / link).exists() for link in links), links
    names = re.findall(r"experiments/records/\S+?\.jsonl\.gz", TEXT)
    used = {file for name in names for file in glob.glob(name, root_dir=ROOT)}
    assert used == set(glob.glob("experiments/records/*", root_dir=ROOT))


def test_each_line_of_the_headline_stands_in_one_table():
    rows = re.findall(r"^\|.* \| ([+-].*) \((.*)\) \| ([+-].*) \((.*)\) \|$", TEXT, re.M)
    tables = [" ".join(table.split()) for _, table in BLOCKS]
    for row in rows:
        assert any(" ".join(row[:2]) in t and " ".join(row[2:]) in t for t in tables), row
    assert len(rows) == 16
