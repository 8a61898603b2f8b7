"""Which tokens carry a label: hand-written tables for ChatML, Qwen3, Llama 3 and the plain format (TRAPS.md, 2 to 6).

A table is one line of tokens; a supervised one stands in [ ]. A newline is written as ⏎, a space as ␣, and a byte of a
character that was split as the byte-level alphabet writes it. The tokenizers are built here from explicit merges, so each
table can be checked by eye against MERGES.
"""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import Tokenizer, load_tokenizer  # noqa: E402
from train import Row, encode_row, make_batch  # noqa: E402

# Whole words by their prefixes, and the pairs that the traps need: two newlines, newline + first byte of an emoji, " yo".
WORDS = ("user", "assistant", "system", "Question", "Answer", "yo", "hi", "why", "so")
MERGES = [(w[:i], w[i]) for w in WORDS for i in range(1, len(w))] + [("Ċ", "Ċ"), ("Ġ", "yo"), ("Ċ", "ð")]

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

# Qwen3's rules for thoughts: earlier turns lose theirs, those after the last user turn get a block, empty without thoughts.
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

LLAMA3 = ("{{ bos_token }}{% for m in messages %}"
          "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")


def build(folder: Path, specials: tuple[str, ...], template: str | None, tags: tuple[str, ...] = (), stops: tuple[str, ...] = (),
          bos: str | None = None, **config: str) -> Tokenizer:
    """A byte-level BPE of MERGES with these special tokens and template, written as a checkpoint has it, then loaded."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in MERGES:
        vocab.setdefault(a + b, len(vocab))
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(MERGES))))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    core.add_tokens([AddedToken(s, special=False, normalized=False) for s in tags])
    core.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's: would move offsets off the spaces
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
        config["bos_token"] = bos
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [core.token_to_id(s) for s in stops]}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """Name -> tokenizer: chatml (pad == eos), qwen3, llama3 (BOS from template and post-processor), plain."""
    folder, ends = tmp_path_factory.mktemp("tokenizers"), ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    header = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
    made = {
        "chatml": build(folder / "chatml", ends, CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>"),
        "qwen3": build(folder / "qwen3", ends, QWEN3, ("<think>", "</think>"), ("<|im_end|>", "<|endoftext|>"),
                       eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        "llama3": build(folder / "llama3", header, LLAMA3, (), ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), "<|begin_of_text|>",
                        eos_token="<|end_of_text|>"),
        "plain": build(folder / "plain", ("<|endoftext|>",), None, eos_token="<|endoftext|>", pad_token="<|endoftext|>"),
    }
    made["llama3"].folder = folder / "llama3"
    return made.get


def chat(text: str) -> list[dict[str, str]]:
    """"s:be so|u:hi|a:yo" -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in re.split(r"\|(?=[sua]:)", text)]


def mark(tokenizer: Tokenizer, row: Row) -> str:
    """The row as a table writes it."""
    tokens = [tokenizer.core.id_to_token(i).replace("Ċ", "⏎").replace("Ġ", "␣") for i in row.ids]
    return " ".join(f"[{t}]" if s else t for t, s in zip(tokens, row.supervised, strict=True))


# The tables leave "<|" and "|>" away: im_start is <|im_start|>.
TABLES = {
    # ---- ChatML, where the pad token is the token that ends a turn
    "one_turn": ("chatml", "u:hi|a:yo", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎"),
    "trap_2_every_turn_ends_with_a_labelled_stop_token_though_it_is_the_pad": (
        "chatml", "s:so|u:hi|a:yo|u:why|a:so",
        "im_start system ⏎ so im_end ⏎ im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎ "
        "im_start user ⏎ why im_end ⏎ im_start assistant ⏎ [so] [im_end] ⏎"),
    "a_user_turn_at_the_end_has_no_label": (
        "chatml", "u:hi|a:yo|u:why", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎ im_start user ⏎ why im_end ⏎"),
    "two_assistant_turns_in_a_row": (
        "chatml", "u:hi|a:yo|a:so", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎ im_start assistant ⏎ [so] [im_end] ⏎"),
    "the_same_text_in_every_turn": (
        "chatml", "s:yo|u:yo|a:yo", "im_start system ⏎ yo im_end ⏎ im_start user ⏎ yo im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎"),
    "empty_answer": ("chatml", "u:hi|a:", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [im_end] ⏎"),
    "spaces_around": ("chatml", "u: hi |a: yo ", "im_start user ⏎ ␣ hi ␣ im_end ⏎ im_start assistant ⏎ [␣yo] [␣] [im_end] ⏎"),
    "newlines_inside_and_behind": ("chatml", "u:hi|a:yo\n\nso\n", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [⏎⏎] [so] [⏎] [im_end] ⏎"),
    "trap_4_a_merge_over_the_border_has_no_label": ("chatml", "u:hi|a:\nyo", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎⏎ [yo] [im_end] ⏎"),
    "trap_4_three_newlines": ("chatml", "u:hi|a:\n\nyo", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎⏎ [⏎] [yo] [im_end] ⏎"),
    "trap_4_a_merge_with_a_part_of_a_character": (
        "chatml", "u:hi|a:😀", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ð [Ł] [ĺ] [Ģ] [im_end] ⏎"),
    "characters_of_several_tokens": (
        "chatml", "u:é|a:yo😀é", "im_start user ⏎ Ã © im_end ⏎ im_start assistant ⏎ [yo] [ð] [Ł] [ĺ] [Ģ] [Ã] [©] [im_end] ⏎"),
    "text_of_special_tokens_in_an_answer": (
        "chatml", "u:hi|a:yo<|im_end|>so", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] [so] [im_end] ⏎"),
    "text_of_the_template_in_a_question": (
        "chatml", "u:<|im_start|>assistant\nyo<|im_end|>\n|a:so",
        "im_start user ⏎ im_start assistant ⏎ yo im_end ⏎ im_end ⏎ im_start assistant ⏎ [so] [im_end] ⏎"),
    "text_of_the_template_in_an_answer": (
        "chatml", "u:hi|a:assistant\nyo", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [assistant] [⏎] [yo] [im_end] ⏎"),
    # ---- Qwen3
    "trap_6_the_empty_think_block_has_no_label": (
        "qwen3", "u:hi|a:yo", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [yo] [im_end] ⏎"),
    "trap_6_the_empty_block_is_in_the_last_turn_only": (
        "qwen3", "u:hi|a:yo|u:why|a:so", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎ im_start user ⏎ why im_end ⏎ "
        "im_start assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [so] [im_end] ⏎"),
    "trap_6_an_empty_block_that_the_row_brings_along_has_no_label": (
        "qwen3", "u:hi|a:<think>\n\n</think>\n\nyo", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [yo] [im_end] ⏎"),
    "trap_6_thoughts_of_the_last_turn_are_labelled_with_their_tags": (
        "qwen3", "u:hi|a:<think>\nwhy\n</think>\n\nyo",
        "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [<think>] [⏎] [why] [⏎] [</think>] [⏎⏎] [yo] [im_end] ⏎"),
    "trap_6_thoughts_in_another_layout": (
        "qwen3", "u:hi|a:<think>why</think>yo\n",
        "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [<think>] [⏎] [why] [⏎] [</think>] [⏎⏎] [yo] [⏎] [im_end] ⏎"),
    "trap_6_thoughts_of_earlier_turns_are_gone": (
        "qwen3", "u:hi|a:<think>\nwhy\n</think>\n\nyo|u:why|a:<think>\nhi\n</think>\n\nso",
        "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎ im_start user ⏎ why im_end ⏎ "
        "im_start assistant ⏎ [<think>] [⏎] [hi] [⏎] [</think>] [⏎⏎] [so] [im_end] ⏎"),
    "trap_6_earlier_thoughts_and_none_in_the_last_turn": (
        "qwen3", "u:hi|a:<think>\nwhy\n</think>\n\nyo|u:why|a:so",
        "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ [yo] [im_end] ⏎ im_start user ⏎ why im_end ⏎ "
        "im_start assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [so] [im_end] ⏎"),
    "qwen3_drops_newlines_before_the_last_answer": (
        "qwen3", "s:so|u:hi|a:\n\nyo",
        "im_start system ⏎ so im_end ⏎ im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [yo] [im_end] ⏎"),
    "qwen3_empty_answer": ("qwen3", "u:hi|a:", "im_start user ⏎ hi im_end ⏎ im_start assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [im_end] ⏎"),
    # ---- Llama 3
    "trap_5_one_bos": (
        "llama3", "u:hi|a:yo",
        "begin_of_text start_header_id user end_header_id ⏎⏎ hi eot_id start_header_id assistant end_header_id ⏎⏎ [yo] [eot_id]"),
    "llama3_trims_every_turn": (
        "llama3", "s: so|u:hi |a:\n yo \n|u:why|a:so",
        "begin_of_text start_header_id system end_header_id ⏎⏎ so eot_id start_header_id user end_header_id ⏎⏎ hi eot_id "
        "start_header_id assistant end_header_id ⏎⏎ [yo] [eot_id] start_header_id user end_header_id ⏎⏎ why eot_id "
        "start_header_id assistant end_header_id ⏎⏎ [so] [eot_id]"),
    "llama3_answer_of_blanks": (
        "llama3", "u:hi|a: \n ", "begin_of_text start_header_id user end_header_id ⏎⏎ hi eot_id start_header_id assistant end_header_id ⏎⏎ [eot_id]"),
    # ---- no template
    "plain": ("plain", "u:hi|a:yo", "Question : ␣ hi ⏎ Answer : ⏎ [yo] [endoftext] ⏎"),
    "plain_two_turns_and_system": (
        "plain", "s:so|u:hi|a:yo|u:why|a: so",
        "so ⏎⏎ Question : ␣ hi ⏎ Answer : ⏎ [yo] [endoftext] ⏎ Question : ␣ why ⏎ Answer : ⏎ [␣] [so] [endoftext] ⏎"),
    "plain_trap_4": ("plain", "u:yo|a:\nyo", "Question : ␣yo ⏎ Answer : ⏎⏎ [yo] [endoftext] ⏎"),
}


@pytest.mark.parametrize("name", TABLES)
def test_labels_equal_the_table(tokenizer_of, name):
    kind, text, table = TABLES[name]
    row = encode_row(tokenizer_of(kind), chat(text))
    assert mark(tokenizer_of(kind), row).replace("<|", "").replace("|>", "") == table


@pytest.mark.parametrize("name", TABLES)
def test_trap_4_joint_encoding_equals_the_segments_between_special_tokens(tokenizer_of, name):
    kind, text, _ = TABLES[name]
    tokenizer = tokenizer_of(kind)
    segments = re.split(r"(<\|\w+\|>|</?think>)", tokenizer.render(chat(text)))
    assert encode_row(tokenizer, chat(text)).ids == [i for part in segments if part for i in tokenizer.encode(part)]


MERGED = ("trap_4", "plain_trap_4")  # here the text's first token is part of the prompt's last one: no prompt is a prefix
THOUGHTS = ("trap_6_thoughts", )  # the prompt ends in an empty think block, these rows think


@pytest.mark.parametrize("name", [n for n in TABLES if not n.startswith(MERGED + THOUGHTS) and not n.startswith("a_user")])
def test_prompt_at_generation_is_a_prefix_and_the_first_label_follows(tokenizer_of, name):
    kind, text, _ = TABLES[name]
    tokenizer, messages = tokenizer_of(kind), chat(text)
    prompt, row = tokenizer.encode(tokenizer.render(messages[:-1], add_generation_prompt=True)), encode_row(tokenizer, messages)
    assert row.ids[:len(prompt)] == prompt
    assert row.supervised[len(prompt) - 1:len(prompt) + 1] == [False, True]
    assert row.supervised[len(prompt):].index(True) == 0 and row.ids[len(row.ids) - row.supervised[::-1].index(True) - 1] in tokenizer.eos_ids


def test_trap_5_the_tokenizer_file_by_itself_would_add_a_second_bos(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    text, bos = tokenizer.render(chat("u:hi|a:yo")), tokenizer.core.token_to_id("<|begin_of_text|>")
    assert tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json")).encode(text).ids[:2] == [bos, bos]
    assert tokenizer.encode(text).count(bos) == encode_row(tokenizer, chat("u:hi|a:yo")).ids.count(bos) == 1


def test_a_normalizer_that_joins_characters_moves_no_label(tmp_path):
    """Qwen's tokenizers compose characters (NFC): e + accent, two characters of the text, become the two bytes of one."""
    tokenizer = build(tmp_path, ("<|im_start|>", "<|im_end|>"), CHATML, eos_token="<|im_end|>")
    tokenizer.core.normalizer = tokenizers.normalizers.NFC()
    row = encode_row(tokenizer, chat("u:e\u0301|a:e\u0301yo"))
    assert mark(tokenizer, row).replace("<|", "").replace("|>", "") == (
        "im_start user ⏎ Ã © im_end ⏎ im_start assistant ⏎ [Ã] [©] [yo] [im_end] ⏎")


@pytest.mark.parametrize("strips", [{"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_trap_2_a_stop_token_that_takes_blanks_along_is_labelled(tmp_path, strips):
    """The embedded tokenizer, its stop token set to swallow the newline that the template writes behind it, or the one before it too."""
    for file in (ROOT / "data/tiny/model").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    next(token for token in raw["added_tokens"] if token["content"] == "<|im_end|>").update(strips)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer, messages = load_tokenizer(tmp_path), chat("u:hi|a:yo|u:why|a:")  # an empty answer: only the newline before it
    row, stop = encode_row(tokenizer, messages), tokenizer.core.token_to_id("<|im_end|>")
    assert [s for i, s in zip(row.ids, row.supervised) if i == stop] == [False, True, False, True]
    assert sum(encode_row(load_tokenizer(ROOT / "data/tiny/model"), messages).supervised) == sum(row.supervised)


def test_labels_of_random_chats_equal_those_counted_in_bytes(tokenizer_of):
    """Another way to the same labels: each token's bytes, laid end to end, against the bytes of the turns as ChatML is defined."""
    tokenizer, rng = tokenizer_of("chatml"), random.Random(0)
    parts = ["\n", " ", "yo", "hi", "😀", "é", "<|im_end|>", "<|im_start|>", "assistant\n", "</think>", "\t", "漢", "\r\n", "<think>\n"]
    for _ in range(200):
        messages = [{"role": rng.choice(("user", "assistant")), "content": "".join(rng.choices(parts, k=rng.randint(0, 5)))}
                    for _ in range(rng.randint(1, 4))] + [{"role": "assistant", "content": rng.choice(parts)}]
        edges, at = [], 0
        for m in messages:
            at += len(f"<|im_start|>{m['role']}\n")
            size = len(f"{m['content']}<|im_end|>".encode())
            edges += [(at, at + size)] * (m["role"] == "assistant")
            at += size + 1
        row, begin, want = encode_row(tokenizer, messages), 0, []
        for token in map(tokenizer.core.id_to_token, row.ids):
            end = begin + len(token)  # one character a byte, in special tokens too
            want.append(any(a <= begin and end <= b for a, b in edges))
            begin = end
        assert begin == at and row.supervised == want, messages


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("change, message", [
    ("m['content'][1:] if 'yo' in m['content'] else m['content']", "changes assistant turn 2"),
    ("m['content'] + m['content']", "changes assistant turn 1"),
    ("''", "changes assistant turn 1"),
])
def test_a_template_that_changes_a_turn_beyond_recognition_raises(tmp_path, change, message):
    tokenizer = build(tmp_path, ("<|im_start|>", "<|im_end|>"), CHATML.replace("m['content']", f"({change})"), eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=message):
        encode_row(tokenizer, chat("u:hi|a:so|u:hi|a:yo"))


def test_a_template_that_changes_letters_is_followed(tmp_path):
    tokenizer = build(tmp_path, ("<|im_start|>", "<|im_end|>"), CHATML.replace("m['content']", "(m['content'] | upper)"), eos_token="<|im_end|>")
    assert mark(tokenizer, encode_row(tokenizer, chat("a:yo"))) == "<|im_start|> assistant ⏎ [Y] [O] [<|im_end|>] ⏎"


def test_trap_6_a_tag_that_the_template_opens_by_itself_has_no_label(tmp_path):
    template = CHATML.replace("m['content']", "('<think>\\n' if m['role'] == 'assistant' else '') + m['content']")
    tokenizer = build(tmp_path, ("<|im_start|>", "<|im_end|>"), template, ("<think>",), eos_token="<|im_end|>")
    assert mark(tokenizer, encode_row(tokenizer, chat("a:yo"))) == "<|im_start|> assistant ⏎ <think> ⏎ [yo] [<|im_end|>] ⏎"


@pytest.mark.parametrize("end", ["''", "'!<|im_end|>'", "'<|im_start|>'"])
def test_trap_2_a_turn_without_a_stop_token_raises(tmp_path, end):
    tokenizer = build(tmp_path, ("<|im_start|>", "<|im_end|>"), CHATML.replace("'<|im_end|>'", end), eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="no stop token follows"):
        encode_row(tokenizer, chat("u:hi|a:yo"))


def test_trap_2_a_stop_token_that_the_tokenizer_splits_raises(tmp_path):
    """Its text follows every turn and it has an id, but none of the added tokens is it: the model would never see it."""
    tokenizer = build(tmp_path, ("<|im_start|>",), CHATML.replace("<|im_end|>", "yo"), eos_token="yo")
    assert encode_row(tokenizer, chat("u:hi|a:why")).supervised[-2]
    with pytest.raises(ValueError, match="splits the stop token of 1 of the 2 assistant turns"):
        encode_row(tokenizer, chat("u:hi|a:why|a:so "))


@pytest.mark.parametrize("text", [f"u:hi|a:{train.OPEN}yo", f"u:{train.CLOSE}|a:yo"])
def test_a_text_with_the_marking_characters_raises(tokenizer_of, text):
    with pytest.raises(ValueError, match="U\\+E0F0"):
        encode_row(tokenizer_of("chatml"), chat(text))


# ---------------------------------------------------------------- batches


def test_trap_3_places_and_targets_equal_a_slow_reference():
    """Ragged rows, id 0 (which also pads) among the supervised ones, a row of one token, a row whose first token is supervised."""
    rng = random.Random(3)
    rows = [Row([7], [True]), Row([0, 0], [True, True]), Row([5, 0, 6], [False, False, True])]
    rows += [Row([rng.randrange(9) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]) for n in (2, 9, 4, 7, 9, 3)]
    batch = make_batch(rows, "cpu")
    assert batch.tokens.shape == (len(rows), 16) and [row.width for row in rows] == [0, *[16] * (len(rows) - 1)]
    want = [(b, t, row.ids[t + 1]) for b, row in enumerate(rows) for t in range(len(row.ids) - 1) if row.supervised[t + 1]]
    assert [(p // 16, p % 16, target) for p, target in zip(batch.places.tolist(), batch.targets.tolist(), strict=True)] == want
    assert [row[:len(r.ids) - 1] for row, r in zip(batch.tokens.tolist(), rows)] == [r.ids[:-1] for r in rows]  # the last predicts nothing
    assert not any(any(row[len(r.ids) - 1:]) for row, r in zip(batch.tokens.tolist(), rows))  # zeros behind each row


def test_trap_3_a_hand_written_batch():
    """"hi yo <end>" and "hi so so <end>", answers supervised: each place is one before its target, and no pad is a target."""
    batch = make_batch([Row([10, 20, 1, 9], [False, True, True, False]), Row([10, 30, 30, 1, 9], [False, True, True, True, False])], "cpu")
    assert batch.tokens.tolist() == [[10, 20, 1] + 13 * [0], [10, 30, 30, 1] + 12 * [0]]
    assert batch.places.tolist() == [0, 1, 16, 17, 18]
    assert batch.targets.tolist() == [20, 1, 30, 30, 1]


@pytest.mark.parametrize("length, width", [(2, 16), (16, 16), (17, 16), (18, 32), (33, 32), (34, 48)])
def test_a_batch_is_as_wide_as_its_longest_row_says(length, width):
    """All tokens but the last are fed, rounded up to a multiple of 16; plans count the same width."""
    rows = [Row([5] * length, [True] * length), Row([6, 7], [False, True])]
    assert rows[0].width == width == make_batch(rows, "cpu").tokens.shape[1]
