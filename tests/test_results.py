"""RESULTS.md: every comparison in it is what its command prints from the committed records, and these are whole and small."""

import glob
import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
from data import keep  # noqa: E402
from data.settings import given  # noqa: E402

TEXT = (ROOT / "RESULTS.md").read_text()
BLOCKS = re.findall(r"```\n\$ python eval\.py compare (.*?)\n(.*?)```", TEXT, re.S)
RECORDS = ROOT / "data/records"


def spread(words):
    """What a shell makes of the wildcards, in the project's folder."""
    return [name for word in words for name in (sorted(glob.glob(word)) if "*" in word or "?" in word else [word])]


@pytest.mark.parametrize("command, printed", BLOCKS, ids=range(len(BLOCKS)))
def test_a_comparison_is_what_its_command_prints(command, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluation, "draw_comparison", lambda result, file: False)
    words = spread(shlex.split(command.replace("\\\n", " ")))
    assert len(words) > 6
    evaluation.compare(evaluation.CompareSettings(**given(evaluation.CompareSettings, words) | {"out": str(tmp_path)}))
    found = [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote ")]
    assert found == [line.rstrip() for line in printed.splitlines()]


def test_the_list_of_what_is_kept(capsys):
    printed, = re.findall(r"```\n\$ python data/keep\.py\n(.*?)```", TEXT, re.S)
    keep.main({})
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [line.rstrip() for line in printed.splitlines()]


def test_the_time_of_the_miniature_is_the_sum_of_its_parts():
    """Seconds of pretraining as they stand in the text, and the minutes of its sweeps from the last table."""
    seconds = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) s \(?(?:1m|4m|8m|llama)\)", TEXT)]
    lines = re.findall(r"^mini/(?!1m-dora-rates)\S+ .* ([\d.]+) +([\d.]+) +([\d.]+)$", TEXT, re.M)
    parts = round(sum(seconds) / 60), round(sum(float(minutes) for line in lines for minutes in line))
    assert len(seconds) == 4 and len(lines) == 19 and sum(parts) < 2 * 180
    assert f"{parts[0]} + {parts[1]} core-minutes, {round(sum(parts) / 2)} minutes for two processes" in TEXT


def test_every_kept_sweep_is_in_the_text():
    sweeps = [file.parent.relative_to(ROOT).as_posix() for file in sorted(RECORDS.rglob("sweep.json"))]
    shown = {Path(name).parents[1].relative_to(ROOT).as_posix() for command, _ in BLOCKS
             for name in spread([str(ROOT / word) for word in shlex.split(command.replace("\\\n", " ")) if "/" in word])
             if "seed-" in name}
    assert BLOCKS and sweeps and set(sweeps) == shown


def test_the_headline_in_readme_is_in_the_tables():
    """Each line of README's answer stands in one comparison here: both mean differences with their intervals, and how many cells are ahead."""
    answer, = re.findall(r"\*\*Is there a gain\?.*?\n\nTrain and score", (ROOT / "README.md").read_text(), re.S)
    rows = [line for line in answer.splitlines() if re.search(r"\| [+-]\d", line)]
    assert len(rows) >= 5 and len(re.findall(r"[+-]\d+\.\d", answer)) == 6 * len(rows)  # and no difference outside the table
    for row in rows:
        (points, points_in), (nats, nats_in) = re.findall(r"([+-]\d+\.\d+) \((.*?)\)", row)
        ahead = " in per cent, ".join(re.findall(r"\d+ of \d+", row))
        lines = [rf"^mean of tasks .* {re.escape(points)} +{re.escape(points_in)} ", rf"^mean of tasks .* {re.escape(nats)} +{re.escape(nats_in)} ",
                 rf"^differences of at least 0: {ahead} in log-likelihood$"]
        assert any(all(re.search(line, printed, re.M) for line in lines) for _, printed in BLOCKS), row


def test_the_records_are_small_and_whole():
    files = [file for file in RECORDS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5_000_000
    for file in files:
        if file.name == "records.jsonl.gz":
            rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
            tasks = json.loads((file.parent / "results.json").read_text())["tasks"]
            assert {row["task"] for row in rows} == set(tasks) and len(rows) == sum(task["n"] for task in tasks.values())
            assert all(set(row) <= set(keep.COLUMNS) for row in rows)
            for task, summary in tasks.items():
                right = [next(iter(row["verdicts"].values())) for row in rows if row["task"] == task]
                assert 100 * sum(right) / len(right) == pytest.approx(summary["score"])


def test_no_machine_in_the_records():
    for file in RECORDS.rglob("*.json"):
        assert not re.search(r'"/|\\\\|/home/|/tmp/|/root/', file.read_text()), file
