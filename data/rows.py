"""JSONL files as conversations, for training and scoring alike. Standard library only."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr  # of the outer levels alone: a value may be nested as deeply as Python can read
from typing import Any

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
LONGEST = 1 << 26  # bytes of a line: a longer one is no text, but perhaps a small .gz that unpacks to all of the memory


def read_lines(file: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("file:line", the line) of each line that is not blank; .gz is unpacked, a byte-order mark dropped. Raises ValueError."""
    try:
        with (gzip.open(file) if str(file).endswith(".gz") else open(file, "rb")) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST), b""), 1):
                if len(line) == LONGEST:
                    raise OSError(f"line {number} is longer than {LONGEST:,} bytes")
                if line.strip():
                    yield f"{file}:{number}", line.removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: expected a readable JSONL file: {error}") from None


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object in UTF-8. Raises ValueError that begins with `where`."""
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # an escape may be half of a surrogate pair, which is no character
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, an integer of thousands of digits, endless nesting
        raise ValueError(f"{where}: expected one JSON object in UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line[:200].decode(errors='replace')}")
    return row


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages, when they are a list of {role, content} in text. Raises ValueError that begins with `where`."""
    fits = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages)
    if not fits:
        raise ValueError(f"{where}: expected messages of {{role, content}} with a role of {', '.join(ROLES)} and text, found {repr(messages)}")
    return messages
