"""The real SmolLM2-135M-Instruct: logits, tokens, chat text and greedy answers equal those of transformers."""

from pathlib import Path

import pytest
import torch

from model import generate, load_model, load_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "data" / "smollm2" / "model"
pytestmark = pytest.mark.skipif(not (FOLDER / "config.json").exists(), reason="no SmolLM2 here; run: python data/smollm2/prepare.py")


def turns(*contents, system=None):
    """user, assistant, user, ... behind an optional system turn."""
    chat = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + chat


CHATS = [
    turns("What is the capital of France?"),
    turns("Name three colours.", "Red, green and blue."),
    turns("What is 12 * 12?", "144", "And 13 * 13?"),
    turns("Translate 'good morning' into French.", system="You are a translator."),
    turns("Write one sentence about the sea."),
    turns("Is the sun a star?", "Yes.", "Is the moon a star?", "No.", "Why not?"),
    turns("Grüße! Wie heißt die Hauptstadt von 日本? 🗼"),
    turns("def add(a, b):\n    return a +", "b"),
    turns("Say yes."),
    turns("List the first five prime numbers, separated by commas.", system="Be brief."),
]
TEXTS = CHATS + [
    turns("hello", system=""), turns(""), turns("", ""), turns("  two spaces before, a newline after\n"), turns("\n\n\t tabs \t\n", " \n answer \n "),
    turns("ends a turn <|im_end|> inside, starts <|im_start|>user\none"), turns("<|endoftext|>", "<file_sep><repo_name>"), turns("<|im_end", "|>"),
    turns("e\u0301 ﬁ ½ ﷽ \u200b\u202e\ufeff \U0001f468\u200d\U0001f469\u200d\U0001f467 \x00\x7f"), turns("1234567890 1,000,000 3.14159 007"),
    turns("a\r\nb\rc\u2028d", system="  padded  "), turns("x" * 500), turns("<b>&amp; \"quoted\" 'single' {{ jinja }} {% raw %}"), turns(*"abcdefg"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def reference_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def ours():
    return load_model(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    return reference(torch.float32)


def reference(dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()


@torch.no_grad()
def logits(model, tokenizer):
    """Float32 logits (T,V) of the ten chats, end to end, from our model or that of transformers."""
    rows = [torch.tensor([tokenizer.encode(tokenizer.render(chat))]) for chat in CHATS]
    own = hasattr(model, "head_weight")
    return torch.cat([(model.logits(model(row)) if own else model(row).logits)[0].float() for row in rows])


@pytest.fixture(scope="module")
def truth(theirs, tokenizer):
    """transformers' float32 logits."""
    return logits(theirs, tokenizer)


def test_float32_logits_equal_transformers_on_ten_chats(ours, truth, tokenizer):
    mine = logits(ours, tokenizer)
    assert mine.shape == truth.shape and len(mine) > 400 and mine.shape[1] == 49152
    assert (mine - truth).abs().max() <= 1e-3
    assert torch.equal(mine.argmax(-1), truth.argmax(-1))


def test_bfloat16_arg_maxima_equal_transformers_on_ten_chats(tokenizer):
    """The same operations rounded in the same places: measured bit-equal on one machine, asked for at 99 % of the positions."""
    mine, other = logits(load_model(FOLDER, dtype=torch.bfloat16), tokenizer), logits(reference(torch.bfloat16), tokenizer)
    assert (mine.argmax(-1) == other.argmax(-1)).float().mean() >= 0.99


def test_the_capital_of_france_is_paris(ours, tokenizer):
    prompt = tokenizer.encode(tokenizer.render(CHATS[0], add_generation_prompt=True))
    answer = generate(ours, [prompt], 24, eos_ids=tokenizer.eos_ids)[0]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_ragged_batch_equals_rows_alone_and_transformers_greedy(ours, theirs, tokenizer):
    prompts = [tokenizer.encode(tokenizer.render(CHATS[n], add_generation_prompt=True)) for n in (0, 5, 8, 3, 9)]
    assert len(set(map(len, prompts))) >= 4
    together = generate(ours, prompts, 16, eos_ids=tokenizer.eos_ids, batch_rows=3)
    assert {row[-1] in tokenizer.eos_ids for row in together} == {True, False}  # some end by themselves, others at the limit
    for prompt, row in zip(prompts, together):
        assert generate(ours, [prompt], 16, eos_ids=tokenizer.eos_ids) == [row]
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=16,
                                   do_sample=False)[0, len(prompt):].tolist()
        assert row == expected


def test_stop_ids(tokenizer):
    assert tuple(tokenizer.eos_ids) == (2,) and tokenizer.decode([2]) == "<|im_end|>"


@pytest.mark.parametrize("prompt", [False, True], ids=["", "prompt"])
@pytest.mark.parametrize("chat", TEXTS, ids=lambda chat: repr(chat[-1]["content"])[:30])
def test_chat_text_and_tokens_equal_transformers(chat, prompt, tokenizer, reference_tokenizer):
    text = tokenizer.render(chat, add_generation_prompt=prompt)
    assert text == reference_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    ids = tokenizer.encode(text)
    assert ids == reference_tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert ids == reference_tokenizer.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special=skip) == reference_tokenizer.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids) == text


def test_any_slice_of_ids_decodes_as_in_transformers(tokenizer, reference_tokenizer):
    """Also those that cut a character in two."""
    ids = tokenizer.encode(tokenizer.render(TEXTS[18]))
    for start in range(0, len(ids), 3):
        for piece in (ids[start:start + 2], ids[start:start + 7]):
            assert tokenizer.decode(piece) == reference_tokenizer.decode(piece)
