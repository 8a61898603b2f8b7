"""Chat templates: programs that come with a model's weights, compiled in a sandbox that ends."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.sandbox

LIMIT = 1 << 24  # the largest number, and most characters or items, in a template
TODAY = datetime.date(2024, 7, 26)  # templates that print a date get this one, so that no run depends on the day


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which some templates put around assistant text: rendered as its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Counted(jinja2.compiler.CodeGenerator):
    """Compiles into each block (loop, macro, branch) a look at the clock, and around each call, filter and a ~ b one at the result."""

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit(self, node: Any, *args: Any, **options: Any) -> None:
        sized = isinstance(node, (jinja2.nodes.Call, jinja2.nodes.Filter, jinja2.nodes.Concat))
        self.write("environment.fit(" * sized)
        super().visit(node, *args, **options)
        self.write(")" * sized)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox that also ends: after SECONDS of this thread's processor time, and at a number, text or list beyond LIMIT.

    It needs no signal and no second thread. Not caught: a width in a format string, and one replace that multiplies two long texts.
    """

    SECONDS = 2.0  # templates take about a millisecond
    end = math.inf  # on the thread's clock
    code_generator_class = Counted
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def step(self) -> None:
        """Raises SecurityError when the time is over."""
        if time.thread_time() > self.end:
            raise jinja2.sandbox.SecurityError(f"no end after {self.SECONDS:g} s")

    def fit(self, value: Any) -> Any:
        """The value. Raises SecurityError when it is too large."""
        if (abs(value) if type(value) is int else len(value) if isinstance(value, (str, list, tuple)) else 0) > LIMIT:
            raise jinja2.sandbox.SecurityError(f"a number, or characters or items, beyond {LIMIT:,}")
        return value

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]  # jinja2's own is "".join
        """What a macro, a block or the whole template wrote. Raises SecurityError when it is too long."""
        kept, room = [], LIMIT
        for part in parts:
            kept.append(part)
            if (room := room - len(part)) < 0:
                raise jinja2.sandbox.SecurityError(f"characters beyond {LIMIT:,}")
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """left operator right. Raises SecurityError on powers and on too large a result."""
        size = lambda x: len(x) if hasattr(x, "__len__") else abs(x)
        if operator == "**" or operator == "*" and size(left) * size(right) > LIMIT:
            raise jinja2.sandbox.SecurityError(f"too large a result of {operator}")
        return self.fit(super().call_binop(context, operator, left, right))


def compile_template(source: str) -> jinja2.Template:
    """A chat template in the sandbox, with the helpers that templates expect."""
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals.pop("lipsum")
    env.globals.update(raise_exception=raise_exception, strftime_now=TODAY.strftime)
    try:
        for constant in env.parse(source).find_all(jinja2.nodes.Const):
            env.fit(constant.value)
        return env.from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:  # Python's own parser has limits too
        raise ValueError(f"the chat template does not parse: {error}") from None


def render(template: jinja2.Template, **values: Any) -> str:
    """What the template writes, within its time, which starts now. Raises whatever the template does."""
    environment: Any = template.environment
    environment.end = time.thread_time() + Sandbox.SECONDS
    return template.render(**values)
