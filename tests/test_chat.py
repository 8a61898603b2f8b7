"""Rows, chat templates, tokenizer files: which tokens are learnt, what is refused, in what words.

A label table is one line of tokens, a supervised one in [ ]. There, ⏎ is a newline, ␣ a blank,
⟨ and ⟩ are <|im_start|> and <|im_end|>, { } and | Llama 3's header and eot tokens; bytes of a
split character stand as the byte-level alphabet writes them. Traps are numbered as in TRAPS.md.
"""

import gzip
import itertools
import json
import random
import re

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils.chat_template_utils import render_jinja_template

from data.chat import Row, encode_row, load_tokenizer
from tests.golden.texts import CHATML, MERGES, QWEN3, vocabulary
from train import Settings, load_rows, make_batch, padded_width

PIECES = [("y", "o"), ("▁", "yo"), ("s", "o"), ("▁", "so"), ("h", "i"), ("▁", "hi")]
BARE = CHATML.partition("{% if add")[0]
SAYS, TEXT = "m.role == 'assistant'", "m['content']"
TAGGED = CHATML.replace(TEXT, f"('<think>\\n' if {SAYS} else '') + {TEXT}")
OPENS = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")  # the prompt opens a thought
TOOLS = "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
CALLS = "{%- for call in m.tool_calls or [] %}{{ '(' + call.function | tojson + ')' }}{% endfor %}"
QWEN3 = TOOLS + QWEN3.replace("= m.content %}", "= m.content or '' %}")
QWEN3 = QWEN3.replace("set thoughts = '' %}", "set thoughts = m.reasoning_content or '' %}")
QWEN3 = QWEN3.replace("{{- '<|im_end|>", CALLS + "{{- '<|im_end|>")
TIGHT = QWEN3.replace("<think>\\n'", "<think>'").replace("'\\n</think>", "'</think>")
TIGHT = TIGHT.replace("<think>\\n\\n</think>", "<think></think>")
JSONS = f"{TEXT} | tojson if m.role == 'tool' else {TEXT}"
STRICT = CHATML.replace(TEXT, f"(m.tool_calls | tojson if m.tool_calls else {JSONS})")
STRICT = STRICT.replace("%}", "%}{{ 1 / 0 if m.role == 'tool' and not m.tool_call_id else '' }}", 1)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (  # no generation prompt: the question's end is one
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[Q] ' + m.content + ' [/Q]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '# Ask:\\n' + m.content + '\\n\\n' }}"
    "{% else %}{{ '# Say: ' + m.content + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# Say:' }}{% endif %}"
)
END, IM = "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADER = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SP = {"specials": ("<s>", "</s>"), "bos": "<s>", "pieces": True}
MERGING = VICUNA.replace("ASSISTANT:{% endif", "ASSISTANT: {% endif")
KINDS = {  # name -> template, what build takes
    "chatml": (CHATML, {"pad_token": END}),
    "nfc": (CHATML, {"normalizer": normalizers.NFC()}),
    "rstrip": (CHATML, {"flags": {"rstrip": True}}),
    "strip": (CHATML, {"flags": {"lstrip": True, "rstrip": True}}),
    "named": (CHATML.replace("m['role']", "(m.name or m.role)"), {}),
    "llama3": (LLAMA3, {"specials": HEADER, "bos": HEADER[0]}),
    "plain": ("", {"specials": IM[:1]}),
}
KINDS |= {"bare": (BARE, {}), "qwen3": (QWEN3, {}), "thinker": (OPENS, {}), "tagged": (TAGGED, {})}
KINDS |= {"llama2": (LLAMA2, SP), "vicuna": (VICUNA, SP), "alpaca": (ALPACA, SP), "base": ("", SP)}
KINDS |= {"merging": (MERGING, SP), "strict": (STRICT, {}), "tight": (TIGHT, {})}
KINDS |= {"thoughtless": (CHATML.replace(TEXT, f"{TEXT}.split('</think>')[-1]"), {})}


def build(folder, template, specials=IM, bos="", pieces=False, flags=(), **config):
    """A byte-level tokenizer (pieces: like sentencepiece's), its files as a checkpoint has them."""
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary(), merges=MERGES))
    core.normalizer = config.pop("normalizer", None)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if pieces:
        names = ["<unk>", *map("<0x{:02X}>".format, range(256)), "▁", *map(chr, range(33, 127))]
        vocab = {w: i for i, w in enumerate(dict.fromkeys([*names, *map("".join, PIECES)]))}
        options = {"unk_token": "<unk>", "byte_fallback": True}
        core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=PIECES, **options))
        blanks = normalizers.Replace(" ", "▁")
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    core.add_special_tokens([AddedToken(s, normalized=False) for s in specials[:-1]])
    core.add_special_tokens([AddedToken(specials[-1], normalized=False, **dict(flags))])
    core.add_tokens([AddedToken(s, normalized=False) for s in ("<think>", "</think>")])
    core.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's: moves offsets
    if bos:  # trap 5: a second one, where the template writes one, too
        single = {"single": f"{bos} $A", "special_tokens": [(bos, core.token_to_id(bos))]}
        core.post_processor = processors.TemplateProcessing(**single)
        config["bos_token"] = bos
    folder.mkdir(exist_ok=True)
    config = {"chat_template": template, "eos_token": specials[-1], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    core.save(f"{folder}/tokenizer.json")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):  # kind -> tokenizer
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: build(folder / name, kind[0], **kind[1]) for name, kind in KINDS.items()}.get


def chat(text):
    """s:be␣so|u:hi|a:yo -> messages; ⏎ and ␣ as in a table."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = re.split(r"\|(?=[suat]:)", text.replace("␣", " ").replace("⏎", "\n"))
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


SIGNS = {"<|im_start|>": "⟨", "<|im_end|>": "⟩", "Ċ": "⏎", "<0x0A>": "⏎", "Ġ": "␣", "▁": "␣"}
SIGNS |= {"<|start_header_id|>": "{", "<|end_header_id|>": "}", "<|eot_id|>": "|"}


def mark(tokenizer, row):
    """The row as a table writes it."""
    tokens = [tokenizer.core.id_to_token(i) for i in row.ids]
    for token, sign in SIGNS.items():
        tokens = [t.replace(token, sign) for t in tokens]
    return " ".join(f"[{t}]" if s else t for t, s in zip(tokens, row.supervised, strict=True))


def learnt(tokenizer, row):
    """The supervised stretches of a row, as texts."""
    groups = itertools.groupby(range(len(row.ids)), key=row.supervised.__getitem__)
    texts = [tokenizer.decode(map(row.ids.__getitem__, each)) for label, each in groups if label]
    return [text.replace(END, "⟩") for text in texts]


# kind (where row and prompt differ): name: chat, and below it the tokens
TABLE = """
chatml: one turn: u:hi|a:yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎
chatml: trap 2, every turn ends with a labelled stop token though it pads: s:so|u:hi|a:yo|u:why|a:so
    ⟨ system ⏎ so ⟩ ⏎ ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ user ⏎ why ⟩ ⏎ ⟨ assistant ⏎ [so]
    [⟩] ⏎
chatml: a user turn at the end has no label: u:hi|a:yo|u:why
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ user ⏎ why ⟩ ⏎
chatml: two assistant turns in a row: u:hi|a:yo|a:so
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ assistant ⏎ [so] [⟩] ⏎
chatml: the same text in every turn: s:yo|u:yo|a:yo
    ⟨ system ⏎ yo ⟩ ⏎ ⟨ user ⏎ yo ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎
chatml: empty answer: u:hi|a:
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [⟩] ⏎
chatml: blanks around: u:␣hi␣|a:␣yo␣
    ⟨ user ⏎ ␣ hi ␣ ⟩ ⏎ ⟨ assistant ⏎ [␣yo] [␣] [⟩] ⏎
chatml: newlines inside and behind: u:hi|a:yo⏎⏎so⏎
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⏎⏎] [so] [⏎] [⟩] ⏎
chatml 52: trap 4, a merge over the border has no label: u:hi|a:⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎⏎ [yo] [⟩] ⏎
chatml 52: trap 4, three newlines: u:hi|a:⏎⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎⏎ [⏎] [yo] [⟩] ⏎
chatml 52: trap 4, a merge with a part of a character: u:hi|a:😀
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ð [Ł] [ĺ] [Ģ] [⟩] ⏎
nfc: a normalizer that joins e and its accent moves no label: u:e\u0301|a:e\u0301yo
    ⟨ user ⏎ Ã © ⟩ ⏎ ⟨ assistant ⏎ [Ã] [©] [yo] [⟩] ⏎
thoughtless: an empty block that the template drops: u:hi|a:<think>⏎</think>yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎
tight 59: trap 6, thoughts behind a tag without a newline: u:hi|a:<think>why</think>yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [<think>] [why] [</think>] [⏎⏎] [yo] [⟩] ⏎
rstrip: trap 2, a stop token that takes a newline along is learnt: u:hi|a:yo|u:why|a:
    ⟨ user ⏎ hi ⟩ ⟨ assistant ⏎ [yo] [⟩] ⟨ user ⏎ why ⟩ ⟨ assistant ⏎ [⟩]
strip 119: trap 2, one that takes blanks of both sides along: u:hi|a:yo␣|u:why|a:
    ⟨ user ⏎ hi ⟩ ⟨ assistant ⏎ [yo] [⟩] ⟨ user ⏎ why ⟩ ⟨ assistant [⟩]
chatml: characters of several tokens: u:é|a:yo😀é
    ⟨ user ⏎ Ã © ⟩ ⏎ ⟨ assistant ⏎ [yo] [ð] [Ł] [ĺ] [Ģ] [Ã] [©] [⟩] ⏎
chatml: text of special tokens in an answer: u:hi|a:yo<|im_end|>so
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] [so] [⟩] ⏎
chatml: text of the template in a question: u:<|im_start|>assistant⏎yo<|im_end|>⏎|a:so
    ⟨ user ⏎ ⟨ assistant ⏎ yo ⟩ ⏎ ⟩ ⏎ ⟨ assistant ⏎ [so] [⟩] ⏎
chatml: text of the template in an answer: u:hi|a:assistant⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [assistant] [⏎] [yo] [⟩] ⏎
bare none: without a generation prompt, the answer's own text: u:hi|a:yo|u:so|a:⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ user ⏎ so ⟩ ⏎ ⟨ assistant ⏎⏎ [yo] [⟩] ⏎
qwen3: trap 6, the empty think block has no label: u:hi|a:yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [yo] [⟩] ⏎
qwen3 52: trap 6, the empty block is in the last turn only: u:hi|a:yo|u:why|a:so
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ user ⏎ why ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎⏎ </think> ⏎⏎
    [so] [⟩] ⏎
qwen3: trap 6, an empty block that the row brings has no label: u:hi|a:<think>⏎⏎</think>⏎⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [yo] [⟩] ⏎
qwen3 60: trap 6, thoughts of the last turn: u:hi|a:<think>⏎why⏎</think>⏎⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [<think>] [⏎] [why] [⏎] [</think>] [⏎⏎] [yo] [⟩] ⏎
qwen3 60: trap 6, thoughts in another layout: u:hi|a:<think>why</think>yo⏎
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [<think>] [⏎] [why] [⏎] [</think>] [⏎⏎] [yo] [⏎] [⟩] ⏎
qwen3 60: trap 6, a closing tag alone: u:hi|a:why</think>yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [<think>] [⏎] [why] [⏎] [</think>] [⏎⏎] [yo] [⟩] ⏎
qwen3 52: trap 6, earlier ones are gone: u:hi|a:<think>why</think>yo|u:so|a:<think>hi</think>so
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ user ⏎ so ⟩ ⏎ ⟨ assistant ⏎ [<think>] [⏎] [hi] [⏎]
    [</think>] [⏎⏎] [so] [⟩] ⏎
qwen3 52: trap 6, none in the last turn: u:hi|a:<think>⏎why⏎</think>⏎⏎yo|u:so|a:so
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎ ⟨ user ⏎ so ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎⏎ </think> ⏎⏎
    [so] [⟩] ⏎
qwen3: it drops newlines before the last answer: s:so|u:hi|a:⏎⏎yo
    ⟨ system ⏎ so ⟩ ⏎ ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [yo] [⟩] ⏎
qwen3: trap 6, an empty answer: u:hi|a:
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎⏎ </think> ⏎⏎ [⟩] ⏎
thinker: the prompt opens the thought: u:hi|a:<think>⏎why⏎</think>⏎⏎yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ <think> ⏎ [why] [⏎] [</think>] [⏎⏎] [yo] [⟩] ⏎
thinker 52: without thoughts, row and prompt differ: u:hi|a:yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [yo] [⟩] ⏎
tagged: a tag that the row's template opens behind the prompt is learnt: u:hi|a:yo
    ⟨ user ⏎ hi ⟩ ⏎ ⟨ assistant ⏎ [<think>] [⏎] [yo] [⟩] ⏎
llama3: trap 5, one BOS: u:hi|a:yo
    <|begin_of_text|> { user } ⏎⏎ hi | { assistant } ⏎⏎ [yo] [|]
llama3: it trims every turn: s:␣so|u:hi␣|a:⏎␣yo␣⏎|u:why|a:so
    <|begin_of_text|> { system } ⏎⏎ so | { user } ⏎⏎ hi | { assistant } ⏎⏎ [yo] [|] { user } ⏎⏎ why
    | { assistant } ⏎⏎ [so] [|]
llama3: an answer of blanks: u:hi|a:␣⏎␣
    <|begin_of_text|> { user } ⏎⏎ hi | { assistant } ⏎⏎ [|]
llama2: one-word answers behind a blank: u:hi|a:yo|u:so|a:hi
    <s> ␣ [ Q ] ␣hi ␣ [ / Q ] [␣yo] [␣] [</s>] <s> ␣ [ Q ] ␣so ␣ [ / Q ] [␣hi] [␣] [</s>]
vicuna: one-word answers behind a blank: u:hi|a:yo|u:so|a:hi
    <s> ␣ U S E R : ␣hi ␣ A S S I S T A N T : [␣yo] [</s>] ␣ U S E R : ␣so ␣ A S S I S T A N T :
    [␣hi] [</s>]
alpaca: a blank before the answer: u:hi|a:yo␣so
    ␣ # ␣ A s k : ⏎ hi ⏎ ⏎ # ␣ S a y : [␣yo] [␣so] [</s>] ␣ ⏎ ⏎
merging 23: trap 4, the prompt's last blank belongs to the answer's token: u:hi|a:yo␣hi
    <s> ␣ U S E R : ␣hi ␣ A S S I S T A N T : ␣yo [␣hi] [</s>]
plain: one turn: u:hi|a:yo
    Question : ␣ hi ⏎ Answer : ⏎ [yo] [<|endoftext|>] ⏎
plain: two turns and system: s:so|u:hi|a:yo|u:why|a:␣so
    so ⏎⏎ Question : ␣ hi ⏎ Answer : ⏎ [yo] [<|endoftext|>] ⏎ Question : ␣ why ⏎ Answer : ⏎ [␣] [so]
    [<|endoftext|>] ⏎
plain 21: trap 4: u:yo|a:⏎yo
    Question : ␣yo ⏎ Answer : ⏎⏎ [yo] [<|endoftext|>] ⏎
base: a base without a template gets its BOS: u:hi|a:yo
    <s> ␣ Q u e s t i o n : ␣hi ⏎ A n s w e r : ⏎ [yo] [</s>] ␣ ⏎
"""
ENTRIES = [entry.partition("\n") for entry in re.split(r"\n(?=\w)", TABLE.strip())]
ENTRIES = [(*head.split(": "), " ".join(tokens.split())) for head, _, tokens in ENTRIES]


@pytest.mark.parametrize("kind, name, text, tokens", ENTRIES, ids=[e[1] for e in ENTRIES])
def test_labels_equal_the_table(tokenizer_of, kind, name, text, tokens, capsys):
    """They begin where the prompt ends, or it is said where the two differ. Trap 4: segments."""
    kind, _, differ = kind.partition(" ")
    tokenizer, messages = tokenizer_of(kind), chat(text)
    tokenizer.said.clear()
    row = encode_row(tokenizer, messages)
    note = capsys.readouterr().err
    assert mark(tokenizer, row) == tokens
    start = f"note: rows differ from prompts at character {differ}: "
    if differ == "none":
        start = "note: the chat template has no generation prompt\n"
    assert note.startswith(start) if differ else not note
    prompt = tokenizer.encode(tokenizer.render(messages[:-1], add_generation_prompt=True))
    if not differ and messages[-1]["role"] == "assistant":
        assert row.ids[: len(prompt)] == prompt
        assert row.supervised[len(prompt) - 1 : len(prompt) + 1] in ([False, True], [True])
    if kind in ("chatml", "bare", "qwen3", "llama3", "plain"):
        segments = re.split(r"(<\|\w+\|>|</?think>)", tokenizer.render(messages))
        assert row.ids == [i for part in segments if part for i in tokenizer.encode(part)]
    encode_row(tokenizer, messages)
    assert not capsys.readouterr().err  # once


def test_labels_of_random_chats_equal_those_counted_in_bytes(tokenizer_of):
    """Each token's bytes, laid end to end, against the bytes of the turns as ChatML has them."""
    tokenizer, rng = tokenizer_of("chatml"), random.Random(0)
    parts = "\n¦ ¦yo¦hi¦😀¦é¦<|im_end|>¦<|im_start|>¦assistant\n¦</think>¦\t¦\r\n¦<think>\n"
    for _ in range(200):
        roles, mask = [*rng.choices(("user", "assistant"), k=rng.randint(1, 4)), "assistant"], []
        texts = ["".join(rng.choices(parts.split("¦"), k=rng.randint(0, 5))) for _ in roles]
        for role, text in zip(roles, texts):
            mask += [False] * len(f"<|im_start|>{role}\n")
            mask += [role == "assistant"] * len(f"{text}<|im_end|>".encode()) + [False]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        row = encode_row(tokenizer, messages)
        sizes = [len(tokenizer.core.id_to_token(i)) for i in row.ids]  # a character a byte
        ends = list(itertools.accumulate(sizes))
        want = [all(mask[end - size : end]) for size, end in zip(sizes, ends)]
        assert row.supervised == want and ends[-1] == len(mask), messages


LOST = [  # the test of a turn, what stands for its m.content, a chat, what the error says
    ("m.role == 'system'", "''", "s:yo|u:yo so|a:so", "drops or changes text of system turn 0"),
    ("loop.index0 == 2", "''", "u:so|a:yo|u:yo|a:yo", "drops or changes text of user turn 2"),
    ("m.role == 'tool'", "''", "u:so|a:yo|t:yo|a:yo", "drops or changes text of tool turn 2"),
    ("true", "m.content[:9]", "u:0123456789|a:yo", "drops or changes text of user turn 0"),
    ("true", "m.content | e", "u:hi|a:1 < 2", "drops or changes text of assistant turn 1"),
    (SAYS, "''", "u:yo|a:yo", "drops or changes text of assistant turn 1"),
    (SAYS, "m.content.split('>')[-1]", "u:hi|a:<think>why</think>yo", "text of assistant turn 1"),
    (SAYS, "m.content[1:]", "u:hi|a:yo", "drops or changes text of assistant turn 1"),
    (SAYS, "m.content | upper", "u:hi|a:yo", "drops or changes text of assistant turn 1"),
    (SAYS, "m.content * 2", "u:hi|a:yo", "changes assistant turn 1: it is not found"),
    ("false", "''", "u:hi \ue0f0|a:yo", "changes assistant turn 1: it is not found"),
]


@pytest.mark.parametrize("test, instead, text, words", LOST)
def test_a_template_that_loses_text_is_refused(tmp_path, test, instead, text, words):
    template = CHATML.replace(TEXT, f"({instead} if {test} else m.content)")
    with pytest.raises(ValueError, match=words):
        encode_row(build(tmp_path, template), chat(text))


@pytest.mark.parametrize("end, eos", [("?", END), ("!<|im_end|>", END), ("yo", "yo")])
def test_trap_2_a_turn_without_its_stop_token_is_refused(tmp_path, end, eos):
    """yo: it has an id, but is no added token: the tokenizer merges it with the blank before it."""
    tokenizer = build(tmp_path, CHATML.replace(END, end), eos_token=eos)
    with pytest.raises(ValueError, match="(no|splits the) stop token .*assistant turn 1"):
        encode_row(tokenizer, chat("u:hi|a:so␣"))


S, U, A = chat("s:so|u:hi|a:yo")
QUOTED = {"role": "tool", "content": 'a"b', "tool_call_id": "c1"}
ONE, TRL = {"prompt": "hi", "completion": "yo"}, {"prompt": [U], "completion": [A]}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"at": "é"}}}
CALL = {"id": "c1", "function": {"name": "look", "arguments": {"at": "é"}}}
JSON = f"[{json.dumps(CALL, ensure_ascii=False)}]⟩"
CALLED = '({"name": "look", "arguments": {"at": "é"}})⟩'
WHY = "<think>\nwhy\n</think>\n\n"


def a(text="yo", role="assistant", **fields):  # a message
    return {"role": role, "content": text, **fields}


def m(*messages, **columns):  # a row
    return {"messages": messages, **columns}


def read(folder, tokenizer, *rows, **options):
    """What train.py makes of these rows, behind a plain one: rows, counts."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, (m(U, A), *rows))))
    found, counts = load_rows([f"{folder}/rows.jsonl"], tokenizer, Settings(**options))
    return found[1:], counts


HONOURED = [  # a row, and what is learnt of it
    ("chatml", m(U, a("so", weight=0), U, A), ["yo⟩"]),
    ("chatml", m(U, a("so", train=False), U, A), ["yo⟩"]),
    ("chatml", m(U, a("so", loss_mask=0, weight=1), U, A), ["yo⟩"]),
    ("bare", m(U, A, U, a("so", loss_mask=False)), ["yo⟩"]),
    ("chatml", m(U, a("so", step_loss_mask=0), U, A), ["yo⟩"]),
    ("chatml", m(U, a("so", weight=None), U, a(train=1)), ["so⟩", "yo⟩"]),
    ("chatml", m(a("hi", "user", weight=0), A), ["yo⟩"]),
    ("chatml", {"prompt": [S, U, a("so"), U], "completion": [A]}, ["yo⟩"]),
    ("llama2", {"prompt": [U], "completion": [A, U, a("so")]}, [" yo </s>", " so </s>"]),
    ("qwen3", {"prompt": [U], "completion": [A, U, a("so")]}, ["yo⟩", "so⟩"]),
    ("qwen3", {"prompt": [U], "completion": [a(WHY + "yo")]}, [WHY + "yo⟩"]),
    ("qwen3", m(U, a(reasoning_content="why")), [WHY + "yo⟩"]),
    ("qwen3", m(U, a("", tool_calls=[CALL]), tools=[LOOK]), [CALLED]),
    ("qwen3", m(U, a(None, tool_calls=[CALL]), a("3", "tool"), A), [CALLED, "yo⟩"]),
    ("qwen3", m(U, a("so", tool_calls=[CALL, CALL])), ["so" + CALLED[:-1] + CALLED]),
    ("strict", m(U, a("", tool_calls=[CALL]), QUOTED, A), [JSON, "yo⟩"]),
    ("named", m(a("hi", "user", name="Bo"), A), ["yo⟩"]),
]
MARKS = {"question": "hi <<1>>", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
SAME = [  # a row, and messages with the same ids and labels
    (m(U, a(reasoning_content="why")), [U, a(WHY + "yo")]),
    (m(U, a(reasoning_content="why"), U, A), [U, a(WHY + "yo"), U, A]),
    (m(U, a(reasoning_content="", tool_calls=[], name=None)), [U, A]),
    (m(U, a(id=3, model="x"), id="a", source="b", date=1, tools=[]), [U, A]),
    (m(U, A, tools=None, score=2.5, best=True, note=""), [U, A]),
    (ONE | {"answer": "4", "choices": ["4"], "tests": "x", "code": "y"}, [U, A]),
    (m(U, a(tool_calls=None, thinking=None)) | {"prompt": None}, [U, A]),
    (ONE | {"system": "so", "messages": None}, [S, U, A]),
    (TRL | {"system": "so"}, [S, U, A]),
    ({"question": "hi", "answer": "yo", "system": "so"}, [S, U, A]),
    (ONE | {"completion": "<<1>>"}, [U, a("<<1>>")]),
    (MARKS, chat("u:hi <<1>>|a:1 + 1 = 2⏎#### 2")),
]


@pytest.mark.parametrize("kind, row, texts", HONOURED)
def test_what_is_learnt_of_a_row(tokenizer_of, tmp_path, kind, row, texts):
    assert learnt(tokenizer_of(kind), read(tmp_path, tokenizer_of(kind), row)[0][0]) == texts


@pytest.mark.parametrize("row, messages", SAME)
def test_rows_that_say_the_same(tokenizer_of, tmp_path, row, messages):
    rows, _ = read(tmp_path, tokenizer_of("qwen3"), row, m(*messages))
    assert rows[0] == rows[1]


FORM = "expected messages with a role of .*, content in text"
REFUSED = [  # a row, what the error says behind file and line
    (ONE | {"input": "3"}, "found the column 'input', which is not read"),
    (ONE | {"context": ["3"]}, "found the column 'context'"),
    (TRL | {"chat_template_kwargs": {"a": 1}}, "found the column 'chat_template_kwargs'"),
    (m(U, A, system="so"), "found the column 'system'"),
    (m(U, A, documents=[{"text": "so"}]), "found the column 'documents'"),
    (m(U, A, answer="so"), "found the column 'answer'"),
    ({"question": "hi", "answer": "yo", "choices": ["yo"]}, "found the column 'choices'"),
    (m(U, A, tools=[LOOK]), "the chat template drops the column 'tools'"),
    (m(U, A, tools="look"), "expected tools as objects, found 'look'"),
    (m(U, A, tools=["look"]), r"expected tools as objects, found \['look'\]"),
    (m(U, a(reasoning_content="why")), "'reasoning_content' of assistant turn 1: .* drops it"),
    (m(U, a(thinking="why")), "'thinking' of assistant turn 1: the chat template drops it"),
    (m(U, a(tool_calls=[CALL])), "'tool_calls' of assistant turn 1: the chat template drops it"),
    (m(U, a(tool_calls="look()")), FORM),
    (m(U, a(name="Bo")), "field 'name' of assistant turn 1: the chat template drops it"),
    (m(a("hi", "user", name="Bo"), A), "field 'name' of user turn 0: the chat template drops it"),
    (m(U, a(loss="no")), "the field 'loss' of assistant turn 1"),
    (m(U, a(prefix=True), U, A), "the field 'prefix' of assistant turn 1"),
    (m(U, a(training=False), U, A), "the field 'training' of assistant turn 1"),
    (m(U, a(loss_scale=0)), "the field 'loss_scale' of assistant turn 1"),
    (m(U, a(weight=0.5)), "expected messages.*'weight'.* 0 or 1, found .*0.5"),
    (m(U, a(train="no")), "expected messages.*'train'.* 0 or 1, found .*'no'"),
    (m(U, a([{"type": "text", "text": "yo"}])), FORM),
    (m(U, a("yo", "function"), A), FORM),
    (m(a(None, "user"), A), FORM),
    (m(U), r"expected a message of the assistant, found \['user'\]"),
    (m(), FORM),
    (TRL | {"completion": "yo"}, FORM + ".*found 'yo'"),
    (TRL | {"prompt": "hi"}, FORM),
    ({"question": "hi", "answer": ["yo"]}, FORM),
    ({"prompt": "hi", "chosen": "yo", "rejected": "so"}, r"one of .*, found \['chosen', 'prompt'"),
    ({"conversations": [{"from": "gpt", "value": "yo"}]}, r"one of .*, found \['conversations'\]"),
    ({"instruction": "hi", "output": "yo"}, r"one of .*, found \['instruction', 'output'\]"),
]


REFUSED = [("chatml", *case) for case in REFUSED] + [
    ("named", m(U, a(name="Bo")), "field 'name' of assistant turn 1: it would have no label"),
    ("strict", m(U, a("ook", tool_calls=[CALL])), "drops or changes text of assistant turn 1"),
    ("bare", TRL, "expected a chat template whose generation prompt names the role"),
    ("plain", m(U, A, a("3", "tool"), A), "drops or changes text of tool turn 2"),
]


@pytest.mark.parametrize("kind, row, words", REFUSED)
def test_a_row_that_would_lose_something_is_refused(tokenizer_of, tmp_path, kind, row, words):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/rows.jsonl:2: ") + ".*" + words):
        read(tmp_path, tokenizer_of(kind), row)
    assert [f.name for f in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_is_counted_and_noted(tokenizer_of, tmp_path, capsys):
    """A plain row has 12 tokens; the long question leaves no room for its answer."""
    rows = [m(U, A, score=3, turns=None), m(U, A, score=True), m(a("hi" * 9, "user"), A)]
    rows += [m(U, a("yo" * 9)), m(U, a(weight=0)), m(U, a("so"))]
    columns = {"column score not read": 2, "column turns not read": 1}
    for truncate, lost in ((False, (2, 0, 1)), (True, (0, 2, 2))):
        options = {"truncate": truncate, "max_tokens": 12}
        found, counts = read(tmp_path, tokenizer_of("chatml"), *rows, **options)
        want = dict(zip(("too long", "truncated", "unlabelled"), lost)) | columns
        assert counts == {"read": 7, **want} and {len(row.ids) for row in found} == {12}
        assert len(found) == 3 + truncate
    with pytest.raises(ValueError, match="no usable row; counts: {'read': 2, 'too long': 2,"):
        read(tmp_path, tokenizer_of("chatml"), m(U, A), max_tokens=5)
    read(tmp_path, tokenizer_of("qwen3"), *[m(U, A, a("3", "tool", name="look"), A)] * 2)
    assert capsys.readouterr().err.count("does not use 'name' of tool turns") == 1


GOOD, OBJECT = json.dumps(ONE).encode(), "expected a JSON object"
FILES = {  # what a file holds -> how many rows it has, or what the error says behind its name
    b"\xef\xbb\xbf" + GOOD + b"\r\n\n \t\r\n" + GOOD: 2,
    GOOD[:-1] + b', "prompt": "so"}': 1,
    b'{"prompt": "\\ud83d\\ude00\\u0000", "completion": "7"}': 1,
    b"": ": no usable row",
    b"PAR1\x15\x04\xff": f":1: {OBJECT} in UTF-8",
    GOOD + b"\n\n[" + GOOD + b"]": f":3: {OBJECT}, found",
    GOOD + b"\n" + GOOD[:-3]: f":2: {OBJECT} in UTF-8",
    (GOOD + b"\n" + GOOD).decode().encode("utf-16"): f":1: {OBJECT} in UTF-8",
    b'{"prompt": "\xff", "completion": "7"}': f":1: {OBJECT} in UTF-8",
    b'{"prompt": "\\ud800", "completion": "7"}': ":1: the tokenizer refuses this text",
    b'{"messages": ' + b"[" * 10**5 + b"]" * 10**5 + b"}": f":1: {OBJECT} in UTF-8",
    b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}": f":1: {FORM}",
    b'{"prompt": "1", "completion": ' + b"1" * 5000 + b"}": f":1: {OBJECT} in UTF-8",
}
PACKED = {gzip.compress(content): want for content, want in FILES.items()}
CUT, UNREADABLE = gzip.compress(GOOD * 99), ": expected a readable JSONL file"
PACKED |= {CUT[:-5]: UNREADABLE, CUT[:20]: UNREADABLE, CUT[:2]: UNREADABLE, GOOD: UNREADABLE}
FILES = [(".jsonl", *case) for case in FILES.items()]
FILES += [(".gz", *case) for case in PACKED.items()]


@pytest.mark.parametrize("ending, content, want", FILES, ids=range(len(FILES)))
def test_files_as_they_come(tokenizer_of, tmp_path, ending, content, want):
    file = tmp_path / f"rows{ending}"
    file.write_bytes(content)
    try:
        assert load_rows([str(file)], tokenizer_of("chatml"), Settings())[1]["read"] == want
    except ValueError as error:
        assert re.match(f"{re.escape(str(file))}{want}", str(error)) and type(error) is ValueError
        assert len(str(error)) < 2000


BOTH = IM[:1] + IM[2:]
ENDS = f"note: {END} ends the chat template's turns, so it is a stop token\n"
STOPS = [  # eos of generation_config.json, of config.json, eos_token, --stop-token -> stops, a note
    ([END], ["&"], END, "", [END], ""),
    ([], [END], END, "", [END], ""),
    ([], ["&"], END, "", [END], ""),
    (None, BOTH, END, "", BOTH, ""),
    (["&"], None, END, "", ["&", END], "note: stop id 5 is '&', no added token\n"),
    (None, None, IM[0], "", BOTH, ENDS),
    (IM[:1], IM[1:2], IM[0], "", BOTH, ENDS),
    (IM[:1], IM[:1], IM[0], IM[1], IM, ENDS),
]


@pytest.mark.parametrize("generation, config, eos, stop, want, note", STOPS)
def test_trap_2_stop_ids_are_a_set(tmp_path, capsys, generation, config, eos, stop, want, note):
    core = build(tmp_path, CHATML, eos_token=eos).core
    for name, tokens in (("generation_config.json", generation), ("config.json", config)):
        ids = tokens and [core.token_to_id(token) for token in tokens]
        ids = {"eos_token_id": ids[0] if ids and len(ids) == 1 else ids}
        (tmp_path / name).write_text(json.dumps(ids))
    capsys.readouterr()
    assert load_tokenizer(tmp_path, stop).eos_ids == tuple(sorted(map(core.token_to_id, want)))
    assert capsys.readouterr().err == note
    with pytest.raises(ValueError, match="stop token '<no>' is not in tokenizer.json"):
        load_tokenizer(tmp_path, "<no>")


NEXT = len(vocabulary())  # the first special token's id
NEW = {"content": "<new>", "special": False, "normalized": False}
STRIPS = {str(NEXT + 1): NEW | {"content": "</s>", "rstrip": True}}
NAMED = [{"name": "default", "template": "d"}, {"name": "x", "template": "x"}]
BESIDE = [  # changes of tokenizer_config.json, special_tokens_map.json, chat_template.jinja
    ({}, {"bos_token": "<s>"}, ""),
    ({"bos_token": None}, {"bos_token": {"content": "<s>", "lstrip": False}}, ""),
    ({"bos_token": "</s>"}, {"bos_token": "<s>"}, ""),
    ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "</s>"}, ""),
    ({"bos_token": {"__type": "AddedToken", "content": "<s>"}}, {}, "!{{ bos_token }}\n"),
    ({"added_tokens_decoder": {str(NEXT + 4): NEW}}, {}, ""),
    ({"added_tokens_decoder": {str(NEXT + 4): NEW | {"special": True, "lstrip": True}}}, {}, ""),
    ({"added_tokens_decoder": STRIPS}, {}, ""),
    ({"chat_template": NAMED}, {}, ""),
]


@pytest.mark.parametrize("config, special, jinja", BESIDE)
def test_files_beside_each_other_are_read_as_transformers_does(tmp_path, config, special, jinja):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }} <new> </s> {% endfor %}"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.jinja").write_text(jinja) if jinja else None
    ours = build(tmp_path, config.pop("chat_template", template), ("<s>", "</s>"), **config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = ours.render([U, A])
    assert text == theirs.apply_chat_template([U, A], tokenize=False)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("key, text", [("5", "<new>"), ("999", "<new>"), ("5", END), ("x", "a")])
def test_an_added_token_of_another_id_is_refused(tmp_path, key, text):
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer: "):
        build(tmp_path, CHATML, added_tokens_decoder={key: NEW | {"content": text}})


LACKED = [{"extra_special_tokens": {"a": "<a>"}}, {"extra_special_tokens": ["<a>"]}]
LACKED += [{"additional_special_tokens": [END, "<a>"]}]


@pytest.mark.parametrize("changes", LACKED, ids=str)
def test_a_named_token_that_would_be_split_is_refused(tmp_path, changes):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (tmp_path / "b/added_tokens.json").write_text('{"<a>": 262}')
    for folder, given in (("a", changes), ("b", {})):
        with pytest.raises(ValueError, match="tokenizer.json lacks the token '<a>'"):
            build(tmp_path / folder, CHATML, **given)


CHATS = [[S, U, A], [U, a("1 < 'é' & \"so\""), U], [U, a("", tool_calls=[CALL]), a("{}", "tool")]]
TEMPLATES = [  # LOOP: for all messages
    QWEN3,
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ messages[1:] | length }}",
    "{{ messages | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "{{ messages | tojson(true) }}{{ messages | tojson(false, 2) }}",
    "LOOP{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}[{{ x }}]{% endfor %}",
    "{% set n = namespace(i=0) %}LOOP{%- generation %}{% set n.i = n.i + 1 %}{{ n.i }}"
    "{% if m.role == 'tool' %}!{% endif %}{% endgeneration -%} {% endfor %}",
    "LOOP{% if m.role == 'tool' %}{% break %}{% endif %}\n    {% if loop.last %}\n"
    "{{ m.content | trim }}\n    {% endif %}\n{% endfor %}\n",
    "{% macro say(m) %}{{ m.role | upper }}: {{ m.content }}{% endmacro %}"
    "LOOP{{ say(m) ~ eos_token }}{% if not loop.last %}{% continue %}{% endif %}.{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}",
    "{{ date_string }}{{ documents is none }}{{ tools[0].function.name }}{{ nothing }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_transformers_has_it(tmp_path, template):
    template = template.replace("LOOP", "{% for m in messages %}")
    tokenizer = build(tmp_path, template)
    more = {"enable_thinking": False, "date_string": "26 Jul 2024", "eos_token": END}
    more |= {"tools": [LOOK], "chat_template": template}
    for prompt, messages in itertools.product((False, True), CHATS):
        want = render_jinja_template([messages], add_generation_prompt=prompt, **more)[0][0]
        assert tokenizer.render(messages, prompt, [LOOK]) == want


def test_trap_7_dates_are_pinned(tmp_path):
    template = "{{ strftime_now('%d %b %Y, %A') }} {{ date_string }}"
    assert build(tmp_path, template).render([]) == "26 Jul 2024, Friday 26 Jul 2024"


BROKEN = [
    ("{% if true %}", "does not parse: "),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not parse: "),
    ("{{ raise_exception('no roles') }}", "the chat template refuses these messages: no roles"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses .* recursion"),
    ("{{ ''.__class__.__mro__ }}", "refuses .* unsafe"),
    ("{{ messages.append(1) }}", "refuses .* unsafe"),
    ("{{ messages[0].update(role='x') }}", "refuses .* unsafe"),
    ("{% include '/etc/passwd' %}", "refuses .* loader"),
]


@pytest.mark.parametrize("template, words", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_or_hostile_template_ends_in_one_line(tmp_path, template, words):
    with pytest.raises(ValueError, match=words) as error:
        build(tmp_path, template).render([U])
    assert "\n" not in str(error.value)


def test_trap_3_a_hand_written_batch():
    """hi yo <end> and hi so so <end>: a position is one before its target, no pad is a target."""
    rows = [Row([10, 20, 1, 9], [0, 1, 1, 0]), Row([10, 30, 30, 1, 9], [0, 1, 1, 1, 0])]
    batch = make_batch(rows, "cpu")
    assert batch.tokens.tolist() == [[10, 20, 1] + 13 * [0], [10, 30, 30, 1] + 12 * [0]]
    assert batch.target_positions.tolist() == [0, 1, 16, 17, 18]
    assert batch.targets.tolist() == [20, 1, 30, 30, 1]


@pytest.mark.parametrize("length, width", [(2, 16), (16, 16), (17, 16), (18, 32), (34, 48)])
def test_trap_3_ragged_rows_equal_a_slow_reference(length, width):
    """Id 0, which also pads, among the supervised; a row of one token; widths around 16."""
    rng, rows, want = random.Random(3), [Row([7], [1]), Row([0, 0], [1, 1])], []
    rows += [Row(rng.choices(range(9), k=n), rng.choices((0, 1), k=n)) for n in (2, 2, length)]
    batch = make_batch(rows, "cpu")
    for b, row in enumerate(rows):
        assert batch.tokens[b].tolist() == (row.ids[:-1] + [0] * width)[:width]
        following = enumerate(zip(row.ids[1:], row.supervised[1:]))
        want += [(b * width + t, token) for t, (token, label) in following if label]
    assert list(zip(batch.target_positions.tolist(), batch.targets.tolist())) == want
    assert padded_width(rows[-1]) == width
