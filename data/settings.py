"""Command lines of all scripts: one frozen dataclass of settings each, its parser built from the fields. Standard library only."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def setting(default: Any, help: str, nargs: str = "+") -> Any:
    """A dataclass field with its line of help; nargs "*": a tuple's flag may also come without a value, which gives ()."""
    return dataclasses.field(default=default, metadata={"help": help, "nargs": nargs})


def nearest(word: Any, names: Iterable[str]) -> str:
    """"; did you mean NAME?" with the one of the names that is most like the word; "" when none is."""
    near = difflib.get_close_matches(str(word), list(names), 1)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, which names the nearest flag for one that does not exist."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        words = [word.split("=")[0].rstrip(":") for word in message.split() if word.startswith("--")]
        hints = "".join(nearest(word, flags) for word in words if word not in flags)
        raise SystemExit(f"{self.prog}: {message}{hints} (--help lists every flag)")


def build_parser(kind: type, prog: str | None = None) -> Parser:
    """Field a_b of type bool -> --a-b / --no-a-b; of a tuple type -> --a-b X Y or X,Y; else one value of the default's type."""
    parser = Parser(prog=prog, description=(kind.__doc__ or "").strip(), allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120))
    for field in dataclasses.fields(kind):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata.get("help", "").replace("%", "%%")
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{text} (default: {shown})"}
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif isinstance(field.default, tuple):
            parser.add_argument(flag, nargs=field.metadata.get("nargs", "+"), metavar="X", **options)
        else:
            parser.add_argument(flag, type=type(field.default), metavar=type(field.default).__name__.upper(), **options)
    return parser


def given(kind: type, argv: Sequence[str], prog: str | None = None) -> dict[str, Any]:
    """The settings that this command line names, and no others. Raises SystemExit on a bad one."""
    values = vars(build_parser(kind, prog).parse_args(list(argv)))
    return {k: tuple(x for item in v for x in item.split(",") if x) if isinstance(v, list) else v for k, v in values.items()}


def parse(kind: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """The whole dataclass: what the command line names over the defaults."""
    return kind(**given(kind, sys.argv[1:] if argv is None else argv, prog))
