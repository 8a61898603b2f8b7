"""Text for a model: tokenizer files, chat templates, conversations as token ids with labels."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
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

ROLES = ("system", "user", "assistant", "tool")
TODAY = datetime.date(2024, 7, 26)  # templates that print a date get this one
MARK = "\ue0f0"  # a private-use character in the place of a turn's text, see find_turn
# Of a message; 0 or false: it is not learnt.
LABEL_FIELDS = ("weight", "train", "loss_mask", "step_loss_mask")
LEARNT_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_calls")  # of an assistant's
BLANKS = re.compile(r"<think>\s*</think>|\s")  # what a template may drop or add
UNREAD = set(  # bookkeeping, in a row or a message
    "id idx index uid uuid source dataset subset split category subject topic type url title author"
    " task license language lang level difficulty timestamp created_at date model".split()
)
# What a row is read from -> what else is read of it, here or by data/tasks.py.
FORMATS = {
    ("messages",): "tools",
    ("prompt", "completion"): "tools system answer choices code entry_point tests plus_tests",
    ("question", "answer"): "tools system",
}

PLAIN_TEMPLATE = (  # for a model without a template
    "{{ begin }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}Question: {{ m.content }}\n"
    "{% elif m.role == 'assistant' %}Answer:\n{{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}"
)


def to_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, **rest: Any
) -> str:
    """The filter `tojson` with the arguments that transformers gives it."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **rest
    )


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The block as a scope: what it sets ends with it, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja2's immutable sandbox, with transformers' helpers; ValueError."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.add_extension(GenerationTag)
    env.add_extension(jinja2.ext.loopcontrols)
    env.filters["tojson"] = to_json
    env.globals.update(raise_exception=raise_exception, strftime_now=TODAY.strftime)
    try:
        return env.from_string(source)
    except Exception as error:  # not all of what is too deep or too large is a TemplateError
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.core.decode(list(ids), skip_special_tokens=False)

    def render(self, messages: Any, add_generation_prompt: bool = False, tools: Any = None) -> str:
        """Records as text: thinking off, dates pinned. Raises ValueError if the template does."""
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
    """Tokenizer, template, stop ids (stop_token: one more) of a folder or hub id. ValueError."""
    folder = resolve_folder(path)
    config = optional_json(folder / "tokenizer_config.json")
    listed = config.get("added_tokens_decoder") or {}
    try:
        core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for key, token in sorted(listed.items(), key=lambda item: int(item[0])):
            core.add_tokens([tokenizers.AddedToken(**token)])  # as transformers: or other flags
            if core.token_to_id(token["content"]) != int(key):
                raise ValueError(f"{token['content']!r} is not tokenizer_config.json's {key}")
        core.no_padding()
        core.no_truncation()
        probe = core.encode("a")
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{folder}/tokenizer.json: expected a tokenizer: {error}") from None
    begin = probe.ids[: [*probe.special_tokens_mask, 0].index(0)]
    core.post_processor = tokenizers.processors.Sequence([])  # no BOS, exact offsets
    specials = {"begin": core.decode(begin, skip_special_tokens=False)}
    if "added_tokens_decoder" not in config:  # as transformers: else this file is not read
        config |= optional_json(folder / "special_tokens_map.json")
        config["added_tokens"] = list(optional_json(folder / "added_tokens.json"))
    check_added(core, config, folder)
    for name, token in config.items():
        token = token.get("content") if isinstance(token, dict) else token
        specials |= {name: token} if name.endswith("_token") and isinstance(token, str) else {}
    template = compile_template(template_source(folder, config))
    tokenizer = Tokenizer(core, template, specials, begin)
    tokenizer.eos_ids = stop_ids(tokenizer, folder, stop_token)
    return tokenizer


def check_added(core: Any, config: Record, folder: Path) -> None:
    """Raise ValueError on an added token that tokenizer.json lacks: it would be split."""
    for name in ("added_tokens", "additional_special_tokens", "extra_special_tokens"):
        named = config.get(name) or []
        for token in named.values() if isinstance(named, dict) else named:
            text = token.get("content") if isinstance(token, dict) else token
            if core.token_to_id(str(text)) is None:
                raise ValueError(f"{folder}/tokenizer.json lacks the token {text!r} of {name}")


def optional_json(file: Path) -> Record:
    """What a JSON file holds; {} when there is none."""
    return read_json(file) if file.exists() else {}


def template_source(folder: Path, config: Record) -> Any:
    """chat_template.jinja, else tokenizer_config.json's, else the plain one."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    source = config.get("chat_template") or PLAIN_TEMPLATE
    if isinstance(source, list):
        return {each.get("name"): each.get("template") for each in source}.get("default")
    return source


def stop_ids(tokenizer: Tokenizer, folder: Path, stop_token: str) -> tuple[int, ...]:
    """generation_config.json's, else config.json's; eos_token; what ends the template's turns."""
    core = tokenizer.core
    ids: set[Any] = set()
    added = {str(token.content): i for i, token in core.get_added_tokens_decoder().items()}
    for name in ("generation_config.json", "config.json"):
        named = optional_json(folder / name).get("eos_token_id")
        found = set(named if isinstance(named, list) else [named]) - {None, -1}
        if not all(type(i) is int for i in found):
            raise ValueError(f"{folder / name}: eos_token_id: expected ids, found {named!r}")
        if name == "config.json" and (folder / "generation_config.json").exists():
            found &= set(added.values())  # its default, 2, is a character of some vocabularies
        ids = ids or found
    for token in filter(None, (tokenizer.specials.get("eos_token"), stop_token)):
        if core.token_to_id(token) is None:
            raise ValueError(f"{folder}: stop token {token!r} is not in tokenizer.json")
        ids.add(core.token_to_id(token))
    end = turn_end(tokenizer, added)
    if end and added[end] not in ids:
        tokenizer.say_once(f"{end} ends the chat template's turns, so it is a stop token")
        ids.add(added[end])
    for i in ids - set(added.values()):
        tokenizer.say_once(f"stop id {i} is {core.id_to_token(i)!r}, no added token")
    return tuple(sorted(ids))


def turn_end(tokenizer: Tokenizer, added: Iterable[str]) -> str:
    """The longest added token that the template writes after every assistant turn, or ""."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        ends = [part.lstrip() for part in tokenizer.render(turns * 2).split(MARK)[1:]]
    except ValueError:
        return ""
    return max(filter(os.path.commonprefix(ends).startswith, added), key=len, default="")


@dataclass(frozen=True)
class Row:
    """One conversation: its token ids, and which of them are learnt."""

    ids: list[int]
    supervised: list[bool]


def encode_row(tokenizer: Tokenizer, messages: Any, tools: Any = None, apart: bool = False) -> Row:
    """Ids of the rendered conversation; supervised: the assistant's turns and their stop tokens.

    A turn is learnt from where the prompt ends that generation would be given, if that prompt's ids
    begin the row; else, every token that lies wholly in the assistant's text. apart: a template
    without a generation prompt is refused. Raises ValueError when text is lost or not found.
    """
    chat = RenderedChat(tokenizer, messages, tools)
    encoding = tokenizer.encoding(chat.text)
    ids, offsets = encoding.ids, encoding.offsets
    supervised = [False] * len(ids)
    for turn, message in enumerate(chat.messages):
        chat.check_turn(turn)
        if message["role"] != "assistant":
            continue
        begin, end = chat.find_turn(turn)
        learnt = 0 not in [message.get(name) for name in LABEL_FIELDS]
        first = chat.prompt_size(turn, begin, ids, apart)
        stops = [i for i, (a, b) in enumerate(offsets) if a < end <= b]  # it may take blanks along
        if not stops or ids[stops[-1]] not in tokenizer.eos_ids:
            raise ValueError(f"the tokenizer splits the stop token of assistant turn {turn}")
        for i in range(first or 0, stops[-1] + 1) if learnt else ():
            a, b = offsets[i]
            supervised[i] |= first is not None or i == stops[-1] or begin <= a < b <= end
    return Row(ids, supervised)


def without_bookkeeping(message: Record) -> Record:
    """The fields of a message that may say something; a null one says nothing."""
    names = [name for name, value in message.items() if value is not None or name == "content"]
    return {name: message[name] for name in names if name not in UNREAD}


class RenderedChat:
    """A conversation as text, and where its turns are in it. Raises ValueError: tools are lost."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Record], tools: Any) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.messages = list(map(without_bookkeeping, check_messages(messages, "messages")))
        self.text = self.render(self.messages)
        self.letters = BLANKS.sub("", self.text)
        if tools and tokenizer.render(self.messages) == self.text:
            raise ValueError("the chat template drops the column 'tools'")

    def render(self, messages: Sequence[Record], prompt: bool = False) -> str:
        """These messages as text, with the same tools; prompt: ready for the assistant's turn."""
        return self.tokenizer.render(messages, add_generation_prompt=prompt, tools=self.tools)

    def replace(self, turn: int, message: Record, stop: int | None = None) -> str:
        """The text with this message at `turn`, up to turn `stop`; "" where that is refused."""
        try:
            return self.render([*self.messages[:turn], message, *self.messages[turn + 1 : stop]])
        except ValueError:  # without an id that it wants, say
            return ""

    def check_turn(self, turn: int) -> None:
        """Raise ValueError when a turn's text is lost, or a part of it would have no label."""
        message, role = self.messages[turn], self.messages[turn]["role"]
        content = BLANKS.sub("", message.get("content") or "")
        kept = not content or self.replace(turn, {**message, "content": MARK}) != self.text
        if role != "tool" and content not in self.letters:  # a tool's may be quoted
            # an earlier turn may lose its thoughts: is everything there when it is the last?
            kept &= content in BLANKS.sub("", self.replace(turn, message, turn + 1))
        if not kept:
            raise ValueError(f"the chat template drops or changes text of {role} turn {turn}")
        for name in message:
            if name in ("role", "content", *LABEL_FIELDS) or message[name] in ("", [], {}):
                continue
            bare = {key: value for key, value in message.items() if key != name}
            lost = self.replace(turn, bare, turn + 1) == self.replace(turn, message, turn + 1)
            if lost and role == "tool":
                self.tokenizer.say_once(f"the chat template does not use {name!r} of tool turns")
            elif lost or (role == "assistant" and name not in LEARNT_FIELDS):
                why = "the chat template drops it" if lost else "it would have no label"
                raise ValueError(f"the field {name!r} of {role} turn {turn}: {why}")

    def find_turn(self, turn: int) -> tuple[int, int]:
        """[begin, end) of an assistant's turn in the text, thoughts and stop token included.

        The conversation with MARK for the turn is the same before and behind it. Raises ValueError.
        """
        text = self.text
        before, *behind = self.replace(turn, {"role": "assistant", "content": MARK}).split(MARK)
        if len(behind) != 1 or not text.endswith(behind[0]):
            raise ValueError(f"the chat template changes assistant turn {turn}: it is not found")
        begin, end = len(os.path.commonprefix([text, before])), len(text) - len(behind[0])
        if text[:begin].rstrip().endswith("<think>") and "</think>" in text[begin:end]:
            begin = text.rindex("<think>", 0, begin)
        end += len(behind[0]) - len(behind[0].lstrip())
        for token in map(self.tokenizer.core.id_to_token, self.tokenizer.eos_ids):
            if token and text.startswith(token, end):
                return begin, end + len(token)
        found = f"found {text[end : end + 20]!r}; --stop-token names one"
        raise ValueError(f"no stop token follows assistant turn {turn}, {found}")

    def prompt_size(self, turn: int, begin: int, ids: list[int], apart: bool) -> int | None:
        """How many ids the turn's prompt has, if they begin the row; else None, and a note."""
        before, text = self.messages[:turn], self.text
        try:
            prompt = self.render(before, prompt=True)
        except ValueError:  # some templates refuse to begin with the assistant
            return None
        start = self.tokenizer.encode(prompt)
        place = len(os.path.commonprefix([text, prompt]))
        around = slice(max(0, place - 9), place + 9)
        note = (
            f"rows differ from prompts at character {place}: {text[around]!r}, {prompt[around]!r}"
        )
        if text[len(prompt) : begin].strip() and self.render(before) == prompt:
            if apart:
                raise ValueError("expected a chat template whose generation prompt names the role")
            note = "the chat template has no generation prompt"
        elif ids[: len(start)] == start:
            return len(start)
        self.tokenizer.say_once(note, "prompt")
        return None


def check_rendering(tokenizer: Tokenizer, messages: Any, tools: Any, where: str) -> None:
    """Raise ValueError, beginning with `where`, when the template drops something of these."""
    try:
        chat = RenderedChat(tokenizer, messages, tools)
        for turn in range(len(chat.messages)):
            chat.check_turn(turn)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Conversation:
    """What a row says; apart: which of it is prompt and which is completion, too."""

    messages: list[Record]
    tools: Any = None
    apart: bool = False


def read_rows(file: str | Path, counts: dict[str, int]) -> Iterator[tuple[str, Conversation]]:
    """("file:line", conversation) of each line of a JSONL file; counts columns that are not read.

    {messages}; {prompt, completion} as texts or lists of messages; GSM8K's {question, answer};
    beside them tools and, before prompt or question, system. Raises ValueError with file:line.
    """
    for where, line in read_lines(file):
        row = parse_object(line, where)
        filled = {name for name in row if row[name] is not None}
        keys = next((keys for keys in FORMATS if set(keys) <= filled), ())
        if not keys:
            raise ValueError(f"{where}: expected one of {[*FORMATS]}, found {sorted(row)}")
        for name in unread_columns(row, {*keys, *FORMATS[keys].split()}, where):
            counts[f"column {name} not read"] = counts.get(f"column {name} not read", 0) + 1
        if not are_objects(row.get("tools") or []):
            raise ValueError(f"{where}: expected tools as objects, found {repr(row['tools'])}")
        apart = len(keys) == 2 and isinstance(row[keys[0]], list)
        messages = join_turns(row, keys, where)
        roles = [message["role"] for message in check_messages(messages, where)]
        if "assistant" not in roles:
            raise ValueError(f"{where}: expected a message of the assistant, found {roles}")
        yield where, Conversation(messages, row.get("tools"), apart)


def unread_columns(row: Record, read: set[str], where: str) -> set[str]:
    """Columns neither read nor bookkeeping. Raises ValueError when one has text or objects."""
    names = set(row) - read - UNREAD
    for name in names:
        if row[name] and isinstance(row[name], (str, list, dict)):
            what = "which is not read: put it into the messages or take it out"
            raise ValueError(f"{where}: found the column {name!r}, {what}")
    return names


def join_turns(row: Record, keys: tuple[str, ...], where: str) -> Any:
    """A row's messages; a prompt of messages has no label. Raises ValueError."""
    first, last = row[keys[0]], row[keys[-1]]
    if keys == ("messages",):
        return first
    if keys == ("question", "answer") and isinstance(last, str):
        last = re.sub(r"<<[^<>]*>>", "", last)  # its marks <<48/2=24>> are not for reading
    if isinstance(first, list):
        prompt = [{**m, "train": False} for m in check_messages(first, where)]
        turns = prompt + check_messages(last, where)
    else:
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": last}]
    system = row.get("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def are_objects(values: Any) -> bool:
    """Is this a list of objects?"""
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def check_messages(messages: Any, where: str) -> list[Record]:
    """The messages, if they are {role, content} in text. Raises ValueError that begins `where`."""
    fits = bool(messages) and are_objects(messages)
    for m in messages if fits else ():
        role, content, calls = m.get("role"), m.get("content"), m.get("tool_calls") or []
        calling = content is None and role == "assistant" and calls != []
        fits &= role in ROLES and (isinstance(content, str) or calling) and are_objects(calls)
        fits &= all(m.get(name) in (None, 0, 1) for name in LABEL_FIELDS)
    if not fits:
        expected = f"messages with a role of {ROLES}, content in text, {LABEL_FIELDS} 0 or 1"
        raise ValueError(f"{where}: expected {expected}, found {repr(messages)}")
    return messages
