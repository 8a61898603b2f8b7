"""The label cases' material: a byte-level tokenizer, four chat templates, and chats with their rendered text written by hand.

In the texts, what stands between ⟦ and ⟧ is supervised: an assistant's text and the stop token after it.
"""

from __future__ import annotations

import json
from typing import Any

# Whole words by their prefixes, and the pairs that the traps need: two newlines, newline + first byte of an emoji, " yo".
WORDS = ("user", "assistant", "system", "Question", "Answer", "Date", "yo", "hi", "why", "so")
MERGES = list(dict.fromkeys([(w[:i], w[i]) for w in WORDS for i in range(1, len(w))] + [("Ċ", "Ċ"), ("Ġ", "yo"), ("Ċ", "ð")]))

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

# Qwen3's rules: turns before the last user turn lose their thoughts, the last one gets a block, empty without thoughts.
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
        {%- set thoughts = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
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
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nDate: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# For a base model without a template.
PLAIN = ("{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
         "Question: {{ m.content }}\n{% else %}Answer:\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}Answer:\n{% endif %}")

ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
# Name -> special tokens, other added tokens, template, stop tokens of generation_config.json, tokenizer_config.json.
TOKENIZERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, tuple[str, ...], dict[str, str]]] = {
    "chatml": (ENDS, (), CHATML, ("<|im_end|>",), {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}),
    "qwen3": (ENDS, ("<think>", "</think>"), QWEN3, ("<|im_end|>",), {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "llama3": (HEADERS, (), LLAMA3, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
               {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "plain": (("<|endoftext|>",), (), PLAIN, (), {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
}

U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
NO_THOUGHTS = "<think>\n\n</think>\n\n"
DATE, EOT = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nDate: 26 Jul 2024\n\n", "<|eot_id|>"
LU, LA = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"

# Tokenizer, name, chat, rendered text, prompt: the turns before the last assistant turn, ready to be continued.
CHATS: list[tuple[str, str, str, str, str]] = [
    ("chatml", "stop-token-is-pad", "s:so|u:hi|a:yo|u:why|a:so",
     f"<|im_start|>system\nso{E}\n{U}hi{E}\n{A}⟦yo{E}⟧\n{U}why{E}\n{A}⟦so{E}⟧\n",
     f"<|im_start|>system\nso{E}\n{U}hi{E}\n{A}yo{E}\n{U}why{E}\n{A}"),
    ("chatml", "merge-over-the-border", "u:hi|a:\nyo", f"{U}hi{E}\n{A}⟦\nyo{E}⟧\n", f"{U}hi{E}\n{A}"),
    ("chatml", "merge-with-part-of-a-character", "u:é|a:😀 yo", f"{U}é{E}\n{A}⟦😀 yo{E}⟧\n", f"{U}é{E}\n{A}"),
    ("chatml", "template-text-inside", "u:assistant\nyo|a:assistant\nyo\n\n", f"{U}assistant\nyo{E}\n{A}⟦assistant\nyo\n\n{E}⟧\n",
     f"{U}assistant\nyo{E}\n{A}"),
    ("chatml", "empty-answer", "u:hi|a:", f"{U}hi{E}\n{A}⟦{E}⟧\n", f"{U}hi{E}\n{A}"),
    ("qwen3", "empty-block-in-the-last-turn-only", "u:hi|a:yo|u:why|a:so",
     f"{U}hi{E}\n{A}⟦yo{E}⟧\n{U}why{E}\n{A}{NO_THOUGHTS}⟦so{E}⟧\n", f"{U}hi{E}\n{A}yo{E}\n{U}why{E}\n{A}{NO_THOUGHTS}"),
    ("qwen3", "earlier-thoughts-are-gone", "u:hi|a:<think>\nwhy\n</think>\n\nyo|u:why|a:so",
     f"{U}hi{E}\n{A}⟦yo{E}⟧\n{U}why{E}\n{A}{NO_THOUGHTS}⟦so{E}⟧\n", f"{U}hi{E}\n{A}yo{E}\n{U}why{E}\n{A}{NO_THOUGHTS}"),
    ("qwen3", "last-thoughts-are-labelled", "u:hi|a:<think>\nwhy\n</think>\n\nyo",
     f"{U}hi{E}\n{A}⟦<think>\nwhy\n</think>\n\nyo{E}⟧\n", f"{U}hi{E}\n{A}{NO_THOUGHTS}"),
    ("llama3", "one-bos-and-a-pinned-date", "u:hi|a:yo", f"{DATE}{EOT}{LU}hi{EOT}{LA}⟦yo{EOT}⟧", f"{DATE}{EOT}{LU}hi{EOT}{LA}"),
    ("llama3", "every-turn-is-trimmed", "s: so|u:hi |a:\n yo \n|u:why|a:so ",
     f"{DATE}so{EOT}{LU}hi{EOT}{LA}⟦yo{EOT}⟧{LU}why{EOT}{LA}⟦so{EOT}⟧", f"{DATE}so{EOT}{LU}hi{EOT}{LA}yo{EOT}{LU}why{EOT}{LA}"),
    ("plain", "two-turns-and-system", "s:so|u:hi|a:yo|u:why|a: so",
     "so\n\nQuestion: hi\nAnswer:\n⟦yo<|endoftext|>⟧\nQuestion: why\nAnswer:\n⟦ so<|endoftext|>⟧\n",
     "so\n\nQuestion: hi\nAnswer:\nyo<|endoftext|>\nQuestion: why\nAnswer:\n"),
    ("plain", "merge-over-the-border", "u:yo|a:\nyo", "Question: yo\nAnswer:\n⟦\nyo<|endoftext|>⟧\n", "Question: yo\nAnswer:\n"),
]


def messages_of(chat: str) -> list[dict[str, str]]:
    """"s:be so|u:hi|a:yo" -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in chat.split("|")]


def vocabulary() -> dict[str, int]:
    """One character a byte, as GPT-2 writes bytes, then what MERGES makes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    for a, b in MERGES:
        vocab.setdefault(a + b, len(vocab))
    return vocab


def tokenizer_files(name: str) -> dict[str, str]:
    """File name -> text of one tokenizer folder: tokenizer.json, tokenizer_config.json, generation_config.json."""
    specials, tags, template, stops, config = TOKENIZERS[name]
    vocab = vocabulary()
    ids = {token: len(vocab) + n for n, token in enumerate(specials + tags)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    core = {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token, **flags, "special": token in specials} for token, i in ids.items()],
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": post_processor(config, ids), "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in MERGES]}}
    files: dict[str, Any] = {"tokenizer.json": core, "tokenizer_config.json": config | {"chat_template": template}}
    if stops:
        files["generation_config.json"] = {"eos_token_id": [ids[token] for token in stops]}
    return {file: json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n" for file, value in files.items()}


def post_processor(config: dict[str, str], ids: dict[str, int]) -> dict[str, Any] | None:
    """With a BOS: the trap that adds a second one to rendered text, unless it is encoded without special tokens."""
    if "bos_token" not in config:
        return None
    bos = config["bos_token"]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}}
