"""The record of a run, the first line of its metrics.jsonl: what it was started with, to resume and to repeat it by."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import WANTED, Transformer, file_hash, header

Record = dict[str, Any]
HASHED = ("data_sha256", "backbone_sha256")  # of the record: what must be the same when a run is resumed or repeated


def describe(settings: dict[str, Any], files: Sequence[str], model: Transformer, device: Any, world: int = 1) -> Record:
    """The record of a run: settings, commit, versions, hardware, number of processes, the sha256 of each of its data files and the backbone's."""
    assert model.folder  # it was loaded from one
    backbone = [file for pattern in WANTED for file in sorted(model.folder.glob(pattern))]
    return {**header(settings, device), "world": world, "fingerprint": model.fingerprint,
            "data_sha256": {file: file_hash(file) for file in files},
            "backbone_sha256": {file.name: file_hash(file) for file in backbone}}


def read_record(run: Path) -> Record:
    """The record in a run's metrics.jsonl, its first line; {} while there is none."""
    record = None
    with contextlib.suppress(OSError, ValueError), open(run / "metrics.jsonl") as f:
        record = json.loads(f.readline())
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else {}


def check_record(run: str | Path, record: Record, now: Record) -> None:
    """Compare the record of a run with what is there now. Raises ValueError that lists every file of the data or the backbone that
    is another one; warns of another commit, device, number of processes or version, with which results may differ in their last digits."""
    differ = [f"{kind.removesuffix('_sha256')}: {file}: recorded {record[kind].get(file)}, found {now[kind].get(file)}"
              for kind in HASHED if kind in record for file in {**record[kind], **now[kind]} if record[kind].get(file) != now[kind].get(file)]
    if differ:
        raise ValueError(f"{run}: its files are not those that it was started with (sha256):\n  " + "\n  ".join(differ))
    for name in (*HASHED, "commit", "device", "hardware", "python", "versions", *({"world"} & record.keys() & now.keys())):
        if name not in record or name not in HASHED and record[name] != now[name]:
            print(f"warning: {run}: {name}: recorded {record.get(name)}, found {now[name]}", file=sys.stderr)
    if str(now["commit"]).endswith("-dirty"):
        print(f"warning: {run}: this code has changes that are not committed", file=sys.stderr)
