"""The label cases: a byte-level tokenizer, four chat templates, chats and their text by hand.

What stands between ⟦ and ⟧ is supervised: an assistant's text and the stop token after it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

# Whole words by their prefixes, and the pairs that the traps need: two newlines, newline and first
# byte of an emoji, " yo".
WORDS = "user assistant system Question Answer Date yo hi why so".split()
PREFIXES = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
MERGES = list(dict.fromkeys([*PREFIXES, ("Ċ", "Ċ"), ("Ġ", "yo"), ("Ċ", "ð")]))

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Qwen3's rules: turns before the last user turn lose their thoughts, the last one gets a block,
# empty without thoughts.
QWEN3 = """
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.open and m.role == 'user' %}
        {%- set ns.open = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- set thoughts = '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set thoughts = text.split('</think>')[0].rstrip('\\n')\
.split('<think>')[-1].lstrip('\\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thoughts) %}
        {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
    {%- else %}
        {{- text }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# Llama 3's rules: one BOS, a system turn with a date, every text trimmed.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}\
{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nDate: ' + date_string + '\\n\\n'\
 + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'\
 + (m.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}\
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# For a base model without a template.
PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}Question: {{ m.content }}\n"
    "{% else %}Answer:\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)


class Folder(NamedTuple):
    """What a tokenizer's folder says."""

    specials: str
    tags: str  # added tokens that are not special
    template: str
    stops: str  # of generation_config.json; "": there is none
    config: dict[str, str]  # tokenizer_config.json


ENDS, END = "<|endoftext|> <|im_start|> <|im_end|>", "<|endoftext|>"
HEADERS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|>"
HEADERS += " <|eom_id|> <|eot_id|>"
LLAMA3_STOPS = "<|end_of_text|> <|eom_id|> <|eot_id|>"
LLAMA3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
IM_END_IS_PAD = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
END_IS_PAD = {"eos_token": END, "pad_token": END}
TOKENIZERS = {
    "chatml": Folder(ENDS, "", CHATML, "<|im_end|>", IM_END_IS_PAD),
    "qwen3": Folder(ENDS, "<think> </think>", QWEN3, "<|im_end|>", END_IS_PAD),
    "llama3": Folder(HEADERS, "", LLAMA3, LLAMA3_STOPS, LLAMA3_TOKENS),
    "plain": Folder(END, "", PLAIN, "", END_IS_PAD),
}

U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
NO_THOUGHTS, THOUGHTS = "<think>\n\n</think>\n\n", "<think>\nwhy\n</think>\n\n"
DATE = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nDate: 26 Jul 2024\n\n"
LU = "<|start_header_id|>user<|end_header_id|>\n\n"
LA, EOT = "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"
CHATML_TURNS = f"<|im_start|>system\nso{E}\n{U}hi{E}\n{A}⟦yo{E}⟧\n{U}why{E}\n{A}⟦so{E}⟧\n"
CHATML_TEXT = f"{U}assistant\nyo{E}\n{A}⟦assistant\nyo\n\n{E}⟧\n"
QWEN3_TURNS = f"{U}hi{E}\n{A}⟦yo{E}⟧\n{U}why{E}\n{A}{NO_THOUGHTS}⟦so{E}⟧\n"
QWEN3_THOUGHTS = f"{U}hi{E}\n{A}⟦{THOUGHTS}yo{E}⟧\n"
LLAMA3_TURNS = f"{DATE}so{EOT}{LU}hi{EOT}{LA}⟦yo{EOT}⟧{LU}why{EOT}{LA}⟦so{EOT}⟧"
PLAIN_TURNS = f"so\n\nQuestion: hi\nAnswer:\n⟦yo{END}⟧\nQuestion: why\nAnswer:\n⟦ so{END}⟧\n"
# Tokenizer, name, chat, rendered text.
CHATS = [
    ("chatml", "stop-token-is-pad", "s:so|u:hi|a:yo|u:why|a:so", CHATML_TURNS),
    ("chatml", "merge-over-the-border", "u:hi|a:\nyo", f"{U}hi{E}\n{A}⟦\nyo{E}⟧\n"),
    ("chatml", "merge-with-part-of-a-character", "u:é|a:😀 yo", f"{U}é{E}\n{A}⟦😀 yo{E}⟧\n"),
    ("chatml", "template-text-inside", "u:assistant\nyo|a:assistant\nyo\n\n", CHATML_TEXT),
    ("chatml", "empty-answer", "u:hi|a:", f"{U}hi{E}\n{A}⟦{E}⟧\n"),
    ("qwen3", "empty-block-in-the-last-turn-only", "u:hi|a:yo|u:why|a:so", QWEN3_TURNS),
    ("qwen3", "earlier-thoughts-are-gone", f"u:hi|a:{THOUGHTS}yo|u:why|a:so", QWEN3_TURNS),
    ("qwen3", "last-thoughts-are-labelled", f"u:hi|a:{THOUGHTS}yo", QWEN3_THOUGHTS),
    ("llama3", "one-bos-and-a-pinned-date", "u:hi|a:yo", f"{DATE}{EOT}{LU}hi{EOT}{LA}⟦yo{EOT}⟧"),
    ("llama3", "every-turn-is-trimmed", "s: so|u:hi |a:\n yo \n|u:why|a:so ", LLAMA3_TURNS),
    ("plain", "two-turns-and-system", "s:so|u:hi|a:yo|u:why|a: so", PLAIN_TURNS),
    ("plain", "merge-over-the-border", "u:yo|a:\nyo", f"Question: yo\nAnswer:\n⟦\nyo{END}⟧\n"),
]
# Where a prompt is not the text before the last mark: the answer brings a block of its own.
PROMPTS = {"last-thoughts-are-labelled": f"{U}hi{E}\n{A}{NO_THOUGHTS}"}


def prompt_of(name: str, marked: str) -> str:
    """The turns before the last assistant turn, ready to be continued."""
    before = marked.rpartition("⟦")[0].replace("⟦", "").replace("⟧", "")
    return PROMPTS.get(name, before)


def messages_of(chat: str) -> list[dict[str, str]]:
    """ "s:be so|u:hi|a:yo" -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in chat.split("|")]


def vocabulary() -> dict[str, int]:
    """One character a byte, as GPT-2 writes bytes, then what MERGES makes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256, 512 - len(printable))
    vocab = {c: i for i, c in enumerate(sorted(map(chr, (*printable, *others))))}
    for a, b in MERGES:
        vocab.setdefault(a + b, len(vocab))
    return vocab


def tokenizer_files(name: str) -> dict[str, str]:
    """File name -> text: tokenizer.json, tokenizer_config.json, generation_config.json."""
    folder, vocab = TOKENIZERS[name], vocabulary()
    specials = folder.specials.split()
    added = [*specials, *folder.tags.split()]
    ids = {token: len(vocab) + n for n, token in enumerate(added)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": i, "content": t, **flags, "special": t in specials} for t, i in ids.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    byte_level |= {"trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    model |= {"byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": MERGES}
    core: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    core |= {"added_tokens": tokens, "normalizer": None, "pre_tokenizer": byte_level}
    core |= {"post_processor": post_processor(folder.config.get("bos_token"), ids)}
    core |= {"decoder": byte_level, "model": model}
    config = folder.config | {"chat_template": folder.template}
    files: dict[str, Any] = {"tokenizer.json": core, "tokenizer_config.json": config}
    if folder.stops:
        stops = [ids[token] for token in folder.stops.split()]
        files["generation_config.json"] = {"eos_token_id": stops}
    options: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":")}
    return {file: json.dumps(value, **options) + "\n" for file, value in files.items()}


def post_processor(bos: str | None, ids: dict[str, int]) -> dict[str, Any] | None:
    """With a BOS, the trap: a second one before rendered text, unless encoding adds no specials."""
    if bos is None:
        return None
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return processor | {"special_tokens": tokens}
