"""Text for a model: tokenizer files, chat templates, conversations as token ids with labels."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from common import Record, parse_object, read_json, read_lines
from model import resolve_folder

TODAY = datetime.date(2024, 7, 26)  # templates that print a date get this one
ROLES = ("system", "user", "assistant", "tool")
# Columns of a row that are not read: bookkeeping, and what data/tasks.py reads of the same rows.
UNREAD_COLUMNS = set(
    "id idx index uid uuid source dataset subset split category subject topic type url title author"
    " task license language lang level difficulty timestamp created_at date model answer choices code"
    " entry_point tests plus_tests".split()
)
MARK = "\ue0f0"  # a private-use character in the place of an assistant's turn, see find_turn
LABEL_FIELDS = ("weight", "train", "loss_mask")  # of a message; 0 or false: it is not learnt
IGNORED_FIELDS = ("id", "index", "timestamp", "source", "date", "created_at")
Message = dict[str, Any]

# For a model without a template.
PLAIN_TEMPLATE = (
    "{{ begin }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}Question: {{ m.content }}\n"
    "{% else %}Answer:\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: its body, with a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The block as a call that renders its body, as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja2's immutable sandbox, with transformers' helpers. Raises ValueError."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [GenerationTag, jinja2.ext.loopcontrols]
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment
    env = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=TODAY.strftime)
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template does not parse: {error}") from None


@dataclass
class Tokenizer:
    """Text <-> token ids, and messages -> text by the model's own chat template."""

    core: tokenizers.Tokenizer
    template: jinja2.Template
    specials: dict[str, str]  # bos_token, eos_token, ... as the template sees them
    begin: list[int]  # what goes before a text without a template: Llama's BOS
    eos_ids: tuple[int, ...] = ()  # every id that ends a turn, sorted
    said: set[str] = field(default_factory=set)

    def encode(self, text: str) -> list[int]:
        """Token ids of text; nothing is added, a template writes its own BOS. Raises ValueError."""
        return self.encoding(text).ids

    def encoding(self, text: str) -> tokenizers.Encoding:
        """Token ids with each token's place in the text. Raises ValueError."""
        try:
            return self.core.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"the tokenizer refuses this text: {error}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids."""
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None
    ) -> str:
        """Messages as text, thinking off, dates pinned. Raises ValueError where the template does."""
        values = {"messages": list(messages), "tools": tools, "documents": None, **self.specials}
        values |= {"enable_thinking": False, "date_string": TODAY.strftime("%d %b %Y")}
        try:
            return self.template.render(add_generation_prompt=add_generation_prompt, **values)
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def say_once(self, note: str, key: str = "") -> None:
        """Print a note to stderr, once for each key."""
        if (key or note) not in self.said:
            print(f"note: {note}", file=sys.stderr)
            self.said.add(key or note)


def load_tokenizer(path: str | Path, stop_token: str = "") -> Tokenizer:
    """tokenizer.json, chat template and stop ids of a folder or hub id. Raises ValueError.

    stop_token: one more token that ends a turn.
    """
    folder = resolve_folder(path)
    try:
        core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{folder / 'tokenizer.json'}: expected a tokenizer: {error}") from None
    core.no_padding()
    core.no_truncation()
    config = optional_json(folder / "tokenizer_config.json")
    for key, token in sorted(
        (config.get("added_tokens_decoder") or {}).items(), key=lambda t: int(t[0])
    ):
        if core.token_to_id(token["content"]) is None:  # transformers adds it
            core.add_tokens([tokenizers.AddedToken(**token)])
        if core.token_to_id(token["content"]) != int(key):
            raise ValueError(f"{folder}: tokenizer.json has {token['content']!r} not as id {key}")
    probe = core.encode("a")
    begin = (
        probe.ids[: probe.special_tokens_mask.index(0)] if 0 in probe.special_tokens_mask else []
    )
    core.post_processor = tokenizers.processors.Sequence([])  # no BOS, exact offsets
    specials = {"begin": core.decode(begin, skip_special_tokens=False)}
    for name, token in (optional_json(folder / "special_tokens_map.json") | config).items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            specials[name] = text
    template = compile_template(template_source(folder, config))
    tokenizer = Tokenizer(core, template, specials, begin)
    tokenizer.eos_ids = stop_ids(tokenizer, folder, stop_token)
    return tokenizer


def optional_json(file: Path) -> Record:
    """What a JSON file holds; {} when there is none."""
    return read_json(file) if file.exists() else {}


def template_source(folder: Path, config: Record) -> str:
    """chat_template.jinja, else tokenizer_config.json's (of several, default), else the plain one."""
    file = folder / "chat_template.jinja"
    source = config.get("chat_template") or PLAIN_TEMPLATE
    if file.exists():
        source = file.read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    if not isinstance(source, str):
        raise ValueError(f"{folder}: chat_template: expected text, or a list with a default")
    return source


def stop_ids(tokenizer: Tokenizer, folder: Path, stop_token: str) -> tuple[int, ...]:
    """generation_config.json's, else config.json's; eos_token's; the one that ends the template's turns."""
    core = tokenizer.core
    named = optional_json(folder / "generation_config.json").get("eos_token_id")
    if named is None:
        named = optional_json(folder / "config.json").get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    for token in (tokenizer.specials.get("eos_token"), stop_token):
        if token and core.token_to_id(token) is None:
            raise ValueError(f"{folder}: stop token {token!r} is not in tokenizer.json")
        ids = [*ids, core.token_to_id(token) if token else None]
    added = {str(token.content): i for i, token in core.get_added_tokens_decoder().items()}
    end = turn_end(tokenizer, added)
    if end is not None and end not in ids:
        token = core.id_to_token(end)
        tokenizer.say_once(f"{token} ends the chat template's turns, so it is a stop token")
    ids = sorted({i for i in (*ids, end) if i is not None})
    for i in ids:
        if i not in added.values():
            tokenizer.say_once(f"stop id {i} is {core.id_to_token(i)!r}, no added token")
    return tuple(ids)


def turn_end(tokenizer: Tokenizer, added: dict[str, int]) -> int | None:
    """The added token that the template writes after every assistant turn."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        ends = [part.lstrip() for part in tokenizer.render(turns * 2).split(MARK)[1:]]
    except ValueError:
        return None
    for token in sorted(added, key=len, reverse=True):
        if len(ends) == 2 and all(end.startswith(token) for end in ends):
            return added[token]
    return None


@dataclass(frozen=True)
class Row:
    """One conversation: its token ids, and which of them are learnt."""

    ids: list[int]
    supervised: list[bool]


def encode_row(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None, apart: bool = False
) -> Row:
    """Ids of the rendered conversation; supervised: the assistant's turns and their stop tokens.

    A turn is learnt from where the prompt ends that generation would be given, if that prompt's ids
    begin the row (apart: they must); else, every token that lies wholly in the assistant's text.
    Raises ValueError when a turn, its stop token or a part of it cannot be found.
    """
    messages = [{k: v for k, v in m.items() if k not in IGNORED_FIELDS} for m in messages]
    text = tokenizer.render(messages, tools=tools)
    encoding = tokenizer.encoding(text)
    ids, supervised = encoding.ids, [False] * len(encoding.ids)
    for turn, message in enumerate(messages):
        check_turn(tokenizer, messages, turn, tools, text)
        if message["role"] != "assistant":
            continue
        begin, end = find_turn(tokenizer, messages, turn, tools, text)
        stop = stop_end(tokenizer, text, end)
        first = prompt_size(tokenizer, messages[:turn], tools, text, ids, begin)
        if first is None and apart:
            raise ValueError("expected a chat template whose generation prompt names the role")
        learnt = all(message.get(name, True) for name in LABEL_FIELDS)
        stopped = False
        for i, (a, b) in enumerate(encoding.offsets):
            is_stop = a < stop <= b and ids[i] in tokenizer.eos_ids  # it may take blanks along
            inside = begin <= a < b <= stop if first is None else i >= first and a < b <= stop
            supervised[i] |= learnt and (inside or is_stop)
            stopped |= is_stop
        if not stopped:
            raise ValueError(f"the tokenizer splits the stop token of assistant turn {turn}")
    return Row(ids, supervised)


def check_turn(
    tokenizer: Tokenizer, messages: list[Message], turn: int, tools: Any, text: str
) -> None:
    """Raise ValueError when a turn's text or field is lost, or enters the text without a label."""
    message = messages[turn]
    role, content = message["role"], message.get("content") or ""
    upto = messages[
        : turn + 1
    ]  # thoughts of earlier turns may go: is all of it there in a last one?
    content = re.sub(r"<think>\s*</think>|\s", "", content)
    if role != "tool" and content not in re.sub(r"\s", "", text):
        if content not in re.sub(r"\s", "", tokenizer.render(upto, tools=tools)):
            raise ValueError(f"the chat template drops or changes the text of {role} turn {turn}")
    for name in set(message) - {"role", "content", *LABEL_FIELDS}:
        bare = {key: value for key, value in message.items() if key != name}
        lost = tokenizer.render([*upto[:-1], bare], tools=tools) == tokenizer.render(
            upto, tools=tools
        )
        if lost and role == "tool":
            tokenizer.say_once(f"the chat template does not use {name!r} of tool turns")
        elif lost:
            raise ValueError(f"the chat template drops the field {name!r} of {role} turn {turn}")
        elif role == "assistant" and name not in ("reasoning_content", "tool_calls"):
            raise ValueError(f"the field {name!r} of assistant turn {turn} would carry no label")


def find_turn(
    tokenizer: Tokenizer, messages: list[Message], turn: int, tools: Any, text: str
) -> tuple[int, int]:
    """[begin, end) of an assistant's turn in the text, its thoughts included. Raises ValueError.

    The same conversation with MARK for the whole turn is the same text before and behind it.
    """
    changed = [*messages]
    changed[turn] = {"role": "assistant", "content": MARK}
    marked = tokenizer.render(changed, tools=tools)
    before, _, behind = marked.partition(MARK)
    begin = len(os.path.commonprefix([text, before]))
    end = len(text) - len(behind)
    if marked.count(MARK) != 1 or not text.endswith(behind) or end < begin:
        raise ValueError(f"the chat template changes assistant turn {turn} so that it is not found")
    if text[:begin].endswith("<think>\n") and "</think>" in text[begin:end]:
        begin -= len("<think>\n")
    return begin, end


def stop_end(tokenizer: Tokenizer, text: str, end: int) -> int:
    """Where the stop token after an assistant's text ends. Raises ValueError when none follows."""
    after = len(text) - len(text[end:].lstrip())
    for token in (tokenizer.core.id_to_token(i) for i in tokenizer.eos_ids):
        if token and text.startswith(token, after):
            return after + len(token)
    found = text[end : end + 20]
    raise ValueError(
        f"no stop token follows an assistant turn but {found!r}; --stop-token names one"
    )


def prompt_size(
    tokenizer: Tokenizer, before: list[Message], tools: Any, text: str, ids: list[int], begin: int
) -> int | None:
    """How many ids the generation prompt has, when the row begins with them; else None, and a note."""
    try:
        prompt = tokenizer.render(before, add_generation_prompt=True, tools=tools)
        header = text[len(prompt) : begin].strip()
        if header and prompt == tokenizer.render(before, tools=tools):
            tokenizer.say_once("the chat template has no generation prompt", "prompt")
            return None
        start = tokenizer.encode(prompt)
    except ValueError:  # some templates refuse to begin with the assistant
        return None
    if text.startswith(prompt) and ids[: len(start)] == start:
        return len(start)
    place = len(os.path.commonprefix([text, prompt]))
    parts = f"{text[place - 9 : place + 9]!r} against {prompt[place - 9 : place + 9]!r}"
    tokenizer.say_once(f"rows differ from prompts at character {place}: {parts}", "prompt")
    return None


@dataclass(frozen=True)
class Conversation:
    """What a row says; apart: which of it is prompt and which is completion, too."""

    messages: list[Message]
    tools: Any = None
    apart: bool = False


def read_rows(file: str | Path, counts: dict[str, int]) -> Iterator[tuple[str, Conversation]]:
    """("file:line", conversation) of each line of a JSONL file; counts columns that are not read.

    {messages}; {prompt, completion} as texts or as lists of messages; GSM8K's {question, answer};
    beside them tools and, before prompt and completion, system. Raises ValueError with file:line.
    """
    for where, line in read_lines(file):
        row = parse_object(line, where)
        keys = {"tools"}
        if "messages" in row:
            messages, apart = row["messages"], False
            keys |= {"messages"}
        elif {"prompt", "completion"} <= set(row):
            messages, apart = join_turns(row["prompt"], row["completion"])
            keys |= {"prompt", "completion", "system"}
        elif {"question", "answer"} <= set(
            row
        ):  # the answer's marks <<48/2=24>> are not for reading
            answer = row["answer"]
            if isinstance(answer, str):
                answer = re.sub(r"<<[^<>]*>>", "", answer)
            messages, apart = join_turns(row["question"], answer)
            keys |= {"question", "answer", "system"}
        else:
            known = "messages, or prompt and completion, or question and answer"
            raise ValueError(f"{where}: expected {known}, found {sorted(row)}")
        if row.get("system") and "system" in keys:
            messages = [{"role": "system", "content": row["system"]}, *messages]
        if not any(m["role"] == "assistant" for m in check_messages(messages, where)):
            raise ValueError(f"{where}: expected a message of the assistant, found none")
        for name in set(row) - keys - UNREAD_COLUMNS:
            if isinstance(row[name], (str, list, dict)) and row[name]:
                text = f"found the column {name!r}, which is not read: put it into the prompt"
                raise ValueError(f"{where}: {text}, or take it out of the file")
            counts[f"with a column {name}, not read"] = (
                counts.get(f"with a column {name}, not read", 0) + 1
            )
        yield where, Conversation(messages, row.get("tools"), apart)


def join_turns(prompt: Any, completion: Any) -> tuple[Any, bool]:
    """Prompt and completion as messages, and whether they were messages: then the prompt has no label."""
    if not isinstance(prompt, list) or not isinstance(completion, list):
        user = {"role": "user", "content": prompt}
        return [user, {"role": "assistant", "content": completion}], False
    return [{**m, "train": False} if isinstance(m, dict) else m for m in prompt] + completion, True


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages, when they are {role, content} in text. Raises ValueError that begins with `where`."""
    fits = isinstance(messages, list) and len(messages) > 0
    for m in messages if fits else ():
        known = isinstance(m, dict) and m.get("role") in ROLES
        calls = known and m["role"] == "assistant" and m.get("tool_calls")  # content may be absent
        text = known and (m.get("content") or "" if calls else m.get("content"))
        fits = fits and isinstance(text, str)
    if not fits:
        expected = f"messages of role ({', '.join(ROLES)}) and content, a text"
        raise ValueError(f"{where}: expected {expected}, found {repr(messages)}")
    return messages
