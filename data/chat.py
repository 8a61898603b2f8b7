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

ROLES = ("system", "user", "assistant", "tool")
TODAY = datetime.date(2024, 7, 26)  # templates that print a date get this one
MARK = "\ue0f0"  # a private-use character in the place of an assistant's turn, see find_turn
LABEL_FIELDS = ("weight", "train", "loss_mask")  # of a message; 0 or false: it is not learnt
# Bookkeeping: not read in a message or a row; of a row also what data/tasks.py reads of it.
UNREAD = set(
    "id idx index uid uuid source dataset subset split category subject topic type url title author"
    " task license language lang level difficulty timestamp created_at date model".split()
)
TASK_COLUMNS = {"answer", "choices", "code", "entry_point", "tests", "plus_tests"}
Message = dict[str, Any]

# For a model without a template.
PLAIN_TEMPLATE = (
    "{{ begin }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}Question: {{ m.content }}\n"
    "{% else %}Answer:\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The block as a call that renders its body, as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja2's immutable sandbox, with transformers' helpers; ValueError."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    options: Any = {"trim_blocks": True, "lstrip_blocks": True}
    options["extensions"] = [GenerationTag, jinja2.ext.loopcontrols]
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.core.decode(list(ids), skip_special_tokens=False)

    def render(self, messages: Any, add_generation_prompt: bool = False, tools: Any = None) -> str:
        """Messages as text: thinking off, dates pinned. Raises ValueError if the template does."""
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
    listed = config.get("added_tokens_decoder") or {}
    for key in sorted(listed, key=int):
        text = listed[key]["content"]
        if core.token_to_id(text) is None:  # transformers adds it
            core.add_tokens([tokenizers.AddedToken(**listed[key])])
        if core.token_to_id(text) != int(key):
            raise ValueError(f"{folder}: {text!r} is not the token {key} in tokenizer.json")
    probe = core.encode("a")
    begin = (
        probe.ids[: probe.special_tokens_mask.index(0)] if 0 in probe.special_tokens_mask else []
    )
    core.post_processor = tokenizers.processors.Sequence([])  # no BOS, exact offsets
    specials = {"begin": core.decode(begin, skip_special_tokens=False)}
    for name, token in (optional_json(folder / "special_tokens_map.json") | config).items():
        token = token.get("content") if isinstance(token, dict) else token
        specials |= {name: token} if name.endswith("_token") and isinstance(token, str) else {}
    template = compile_template(template_source(folder, config))
    tokenizer = Tokenizer(core, template, specials, begin)
    tokenizer.eos_ids = stop_ids(tokenizer, folder, stop_token)
    return tokenizer


def optional_json(file: Path) -> Record:
    """What a JSON file holds; {} when there is none."""
    return read_json(file) if file.exists() else {}


def template_source(folder: Path, config: Record) -> str:
    """chat_template.jinja, else tokenizer_config.json's, else the plain one. Raises ValueError."""
    file = folder / "chat_template.jinja"
    source = config.get("chat_template") or PLAIN_TEMPLATE
    source = file.read_text(encoding="utf-8") if file.exists() else source
    if isinstance(source, list):
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    if not isinstance(source, str):
        raise ValueError(f"{folder}: chat_template: expected text, or a list with a default")
    return source


def stop_ids(tokenizer: Tokenizer, folder: Path, stop_token: str) -> tuple[int, ...]:
    """generation_config.json's, else config.json's; eos_token; what ends the template's turns."""
    core = tokenizer.core
    named = optional_json(folder / "generation_config.json").get("eos_token_id")
    if named is None:
        named = optional_json(folder / "config.json").get("eos_token_id")
    ids = {*named} if isinstance(named, list) else {named}
    for token in (tokenizer.specials.get("eos_token"), stop_token):
        if token and core.token_to_id(token) is None:
            raise ValueError(f"{folder}: stop token {token!r} is not in tokenizer.json")
        ids.add(core.token_to_id(token) if token else None)
    added = {str(token.content): i for i, token in core.get_added_tokens_decoder().items()}
    end = turn_end(tokenizer, added)
    if end is not None and end not in ids:
        text = core.id_to_token(end)
        tokenizer.say_once(f"{text} ends the chat template's turns, so it is a stop token")
    stops = sorted(i for i in {*ids, end} if i is not None)
    for i in set(stops) - set(added.values()):
        tokenizer.say_once(f"stop id {i} is {core.id_to_token(i)!r}, no added token")
    return tuple(stops)


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
    chat = RenderedChat(tokenizer, messages, tools)
    ids, offsets, supervised = chat.ids, chat.offsets, [False] * len(chat.ids)
    for turn, message in enumerate(chat.messages):
        chat.check_turn(turn)
        if message["role"] != "assistant":
            continue
        begin, end = chat.find_turn(turn)
        first = chat.prompt_size(turn, begin)
        if first is None and apart:
            raise ValueError("expected a chat template whose generation prompt names the role")
        learnt = all(message.get(name, True) for name in LABEL_FIELDS)
        stopped = False
        for i, (a, b) in enumerate(offsets):
            is_stop = a < end <= b and ids[i] in tokenizer.eos_ids  # it may take blanks along
            inside = begin <= a < b <= end if first is None else i >= first and a < b <= end
            supervised[i] |= learnt and (inside or is_stop)
            stopped |= is_stop
        if not stopped:
            raise ValueError(f"the tokenizer splits the stop token of assistant turn {turn}")
    return Row(ids, supervised)


class RenderedChat:
    """A conversation as text and ids, and where its turns are in them."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.messages = [{k: v for k, v in m.items() if k not in UNREAD} for m in messages]
        self.text = self.render(self.messages)
        encoding = tokenizer.encoding(self.text)
        self.ids, self.offsets = encoding.ids, encoding.offsets

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """These messages as text, with the same tools; prompt: ready for the assistant's turn."""
        return self.tokenizer.render(messages, add_generation_prompt=prompt, tools=self.tools)

    def check_turn(self, turn: int) -> None:
        """Raise ValueError when a turn's text is lost, or an assistant's would have no label."""
        message, upto = self.messages[turn], self.messages[: turn + 1]
        role = message["role"]
        # an earlier turn may lose its thoughts: is everything there when it is the last?
        content = re.sub(r"<think>\s*</think>|\s", "", message.get("content") or "")
        kept = any(content in re.sub(r"\s", "", text) for text in (self.text, self.render(upto)))
        if not kept and role != "tool":
            raise ValueError(f"the chat template drops or changes text of {role} turn {turn}")
        for name in set(message) - {"role", "content", *LABEL_FIELDS}:
            bare = {key: value for key, value in message.items() if key != name}
            lost = self.render([*upto[:-1], bare]) == self.render(upto)
            if lost and role == "tool":
                self.tokenizer.say_once(f"the chat template does not use {name!r} of tool turns")
            elif lost:
                raise ValueError(
                    f"the chat template drops the field {name!r} of {role} turn {turn}"
                )
            elif role == "assistant" and name not in ("reasoning_content", "tool_calls"):
                raise ValueError(f"the field {name!r} of assistant turn {turn} would have no label")

    def find_turn(self, turn: int) -> tuple[int, int]:
        """[begin, end) of an assistant's turn in the text, thoughts and stop token included.

        The conversation with MARK for the turn is the same before and behind it. Raises ValueError.
        """
        changed, text = [*self.messages], self.text
        changed[turn] = {"role": "assistant", "content": MARK}
        before, *behind = self.render(changed).split(MARK)
        if len(behind) != 1 or MARK in text or not text.endswith(behind[0]):
            raise ValueError(f"the chat template changes assistant turn {turn}: it is not found")
        begin, end = len(os.path.commonprefix([text, before])), len(text) - len(behind[0])
        if text[:begin].endswith("<think>\n") and "</think>" in text[begin:end]:
            begin -= len("<think>\n")
        end += len(behind[0]) - len(behind[0].lstrip())
        for token in map(self.tokenizer.core.id_to_token, self.tokenizer.eos_ids):
            if token and text.startswith(token, end):
                return begin, end + len(token)
        found = f"found {text[end : end + 20]!r}; --stop-token names one"
        raise ValueError(f"no stop token follows assistant turn {turn}, {found}")

    def prompt_size(self, turn: int, begin: int) -> int | None:
        """How many ids the turn's prompt has, if they begin the row; else None, and a note."""
        say, before, text = self.tokenizer.say_once, self.messages[:turn], self.text
        try:
            prompt, bare = self.render(before, prompt=True), self.render(before)
        except ValueError:  # some templates refuse to begin with the assistant
            return None
        if prompt == bare and text[len(prompt) : begin].strip():
            say("the chat template has no generation prompt", "prompt")
            return None
        start = self.tokenizer.encode(prompt)
        if text.startswith(prompt) and self.ids[: len(start)] == start:
            return len(start)
        place = len(os.path.commonprefix([text, prompt]))
        parts = f"{text[place - 9 : place + 9]!r} against {prompt[place - 9 : place + 9]!r}"
        say(f"rows differ from prompts at character {place}: {parts}", "prompt")
        return None


@dataclass(frozen=True)
class Conversation:
    """What a row says; apart: which of it is prompt and which is completion, too."""

    messages: list[Message]
    tools: Any = None
    apart: bool = False


def read_rows(file: str | Path, counts: dict[str, int]) -> Iterator[tuple[str, Conversation]]:
    """("file:line", conversation) of each line of a JSONL file; counts columns that are not read.

    {messages}; {prompt, completion} as texts or lists of messages; GSM8K's {question, answer};
    beside them tools and, before prompt or question, system. Raises ValueError with file:line.
    """
    formats = (("messages",), ("prompt", "completion"), ("question", "answer"))
    for where, line in read_lines(file):
        row = parse_object(line, where)
        keys: Any = next((keys for keys in formats if set(keys) <= set(row)), ())
        if not keys:
            raise ValueError(f"{where}: expected one of {formats}, found {sorted(row)}")
        read = {*keys, "tools"} if keys == ("messages",) else {*keys, "tools", "system"}
        for name in set(row) - read - UNREAD - TASK_COLUMNS:
            if row[name] and isinstance(row[name], (str, list, dict)):
                what = "which is not read: put it into the messages or take it out"
                raise ValueError(f"{where}: found the column {name!r}, {what}")
            counts[f"column {name} not read"] = counts.get(f"column {name} not read", 0) + 1
        messages: Any = row.get("messages")
        apart = False
        if keys == ("question", "answer"):  # whose marks <<48/2=24>> are not for reading
            row["answer"] = re.sub(r"<<[^<>]*>>", "", str(row["answer"]))
        if keys != ("messages",):
            messages, apart = join_turns(*(row[key] for key in keys))
        if "system" in read and row.get("system"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
        roles = [message["role"] for message in check_messages(messages, where)]
        if "assistant" not in roles:
            raise ValueError(f"{where}: expected a message of the assistant, found {roles}")
        yield where, Conversation(messages, row.get("tools"), apart)


def join_turns(prompt: Any, completion: Any) -> tuple[Any, bool]:
    """Prompt and completion as messages, and whether they were: then the prompt has no label."""
    if isinstance(prompt, list) and isinstance(completion, list):
        learnt = {"train": False}
        turns = [m | learnt if isinstance(m, dict) else m for m in prompt]
        return turns + completion, True
    user = {"role": "user", "content": prompt}
    return [user, {"role": "assistant", "content": completion}], False


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages, if they are {role, content} in text. Raises ValueError that begins `where`."""
    fits = isinstance(messages, list) and len(messages) > 0
    for m in messages if fits else ():
        known = isinstance(m, dict) and m.get("role") in ROLES
        calls = known and m["role"] == "assistant" and m.get("tool_calls")
        text = known and m.get("content", "" if calls else None)
        fits &= isinstance(text, str) or bool(calls) and text is None
    if not fits:
        expected = f"messages with a role ({', '.join(ROLES)}) and a content in text"
        raise ValueError(f"{where}: expected {expected}, found {repr(messages)}")
    return messages
