"""Broken and hostile files: each ends in one ValueError that says what is wrong, soon, and leaves nothing behind.

One table a kind of file; the property tests (test_properties.py) try at random what these name.
"""

import gzip
import json
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data.tasks
import train
from data.settings import given
from data.task import Task
from eval import Settings as EvalSettings
from data.template import Sandbox, compile_template
from model import Cache, ModelConfig, Tokenizer, Transformer, generate, load_model, load_tokenizer, resolve_folder
from talan import AdapterConfig, TalanConfig, attach, attached, load_adapter, save_adapter

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SECONDS = 20  # of processor time, for anything here; all but templates without an end take far below one


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with: model (random weights), sharded (the same in two files), adapter (LoRA and side path), run (one step of training)."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(ROOT / "data/tiny/model", folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    edit_json(folder / "model/config.json", lambda raw: raw.update(SMALL))
    model = Transformer(ModelConfig.from_dir(folder / "model"))
    model.init_weights(0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, folder / "model/model.safetensors")
    shutil.copytree(folder / "model", folder / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    place = {name: f"model-0000{1 + (i % 2)}.safetensors" for i, name in enumerate(weights)}
    for file in sorted(set(place.values())):
        save_file({name: p for name, p in weights.items() if place[name] == file}, folder / "sharded" / file)
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    model = load_model(folder / "model")
    attach(model, AdapterConfig(rank=4), TalanConfig((1,), slots=2, width=4))
    save_adapter(model, folder / "adapter")
    train.main(settings(folder, steps=1, out=str(folder / "run")))
    return folder


def settings(folder, **changes):
    """Settings of a run of one small step."""
    return {"backbone": str(folder / "model"), "tasks": ("none",), "rank": 4, "slots": 2, "width": 4, "step_tokens": 256, "dev_rows": 8,
            "device": "cpu", "log_every": 0, "data": (str(ROOT / "data/tiny/dev.jsonl"),), "max_tokens": 64, **changes}


def edit_json(file, change):
    """Let change(dict) edit a JSON file in place."""
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def snapshot(folder):
    """Path -> what it is, of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.lstat().st_mode for p in sorted(folder.rglob("*"))}


def refused(act, pattern, *folders):
    """act() raises one plain ValueError that the pattern fits, of bearable length, in time, and changes nothing in the folders."""
    before, began = [snapshot(folder) for folder in folders], time.process_time()
    with pytest.raises(ValueError, match=pattern) as error:
        act()
    assert error.type is ValueError and 10 < len(str(error.value)) < 4000  # a decoding error, say, is a ValueError that names no file
    assert error.value.__suppress_context__ or error.value.__context__ is None  # one error, no chain of them
    assert time.process_time() - began < SECONDS
    assert [snapshot(folder) for folder in folders] == before


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def pickled(file, mark, kind="pickle"):
    """Write pickled weights that make the file `mark` when somebody reads them."""
    if kind == "torch":
        torch.save({"model.norm.weight": Payload(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"model.norm.weight": Payload(mark)}))


def test_the_payload_works(tmp_path):
    """Else the tests below would show nothing."""
    for kind in ("pickle", "torch"):
        pickled(tmp_path / "file", tmp_path / kind, kind)
        with open(tmp_path / "file", "rb") as f:
            pickle.load(f) if kind == "pickle" else torch.load(f, weights_only=False)
        assert (tmp_path / kind).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

def pack(header, body):
    """The bytes of a safetensors file with this header, a dict or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def header(change):
    """Bytes -> bytes: a file whose header went through change(dict, names), which may return another one, and perhaps another body."""
    def edit(raw):
        size = struct.unpack("<Q", raw[:8])[0]
        table, body = json.loads(raw[8:8 + size]), raw[8 + size:]
        new = change(table)
        return pack(*new) if isinstance(new, tuple) else pack(table if new is None else new, body)
    return edit


NORM = "model.norm.weight"  # (32,) float32


def one(**fields):
    """Set fields of one tensor's entry."""
    return header(lambda table: table[NORM].update(fields))


def twice(table):
    """The norm's entry once more, with another shape over the same bytes."""
    entry = json.dumps({NORM: table[NORM] | {"shape": [1, 32]}})
    return (json.dumps(table)[:-1] + "," + entry[1:]).encode()


def shift(by):
    """Both offsets of one tensor moved."""
    return header(lambda table: table[NORM].update(data_offsets=[x + by for x in table[NORM]["data_offsets"]]))


UNREADABLE, UNFIT = "model.safetensors: expected a readable safetensors file.*pickled weights", "do not fit config.json"
WEIGHTS = {
    "empty": (lambda raw: b"", UNREADABLE), "seven bytes": (lambda raw: raw[:7], UNREADABLE), "no header": (lambda raw: raw[:8], UNREADABLE),
    "cut in the header": (lambda raw: raw[:100], UNREADABLE), "cut in the data": (lambda raw: raw[:-1], UNREADABLE),
    "a byte too many": (lambda raw: raw + b"\0", UNREADABLE), "noise": (lambda raw: bytes(range(256)) * 9, UNREADABLE),
    "header of 2^62 bytes": (lambda raw: struct.pack("<Q", 1 << 62) + raw[8:], UNREADABLE),
    "header of 2^64 - 1 bytes": (lambda raw: b"\xff" * 8 + raw[8:], UNREADABLE),
    "header a little longer than the file": (lambda raw: struct.pack("<Q", len(raw) - 7) + raw[8:], UNREADABLE),
    "header of no bytes": (lambda raw: bytes(8) + raw[8:], UNREADABLE),
    "header one byte too short": (lambda raw: struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] - 1) + raw[8:], UNREADABLE),
    "header is a list": (header(lambda table: b"[]"), UNREADABLE), "header is empty": (header(lambda table: {}), UNREADABLE),
    "header is no JSON": (header(lambda table: b"{"), UNREADABLE), "header is not UTF-8": (header(lambda table: b'{"\xff": 1}'), UNREADABLE),
    "header nested 100,000 deep": (header(lambda table: b"[" * 100_000), UNREADABLE),
    "entry is a number": (header(lambda table: table.update({NORM: 3})), UNREADABLE),
    "entry without a dtype": (header(lambda table: table[NORM].pop("dtype") and None), UNREADABLE),
    "unknown dtype": (one(dtype="F33"), UNREADABLE), "dtype of another size": (one(dtype="F64"), UNREADABLE),
    "integers of the right size": (one(dtype="I32"), f"{UNFIT}(.|\n)*dtype: {NORM} is I32"),
    "overlapping offsets": (shift(-4), UNREADABLE), "a hole between offsets": (shift(4), UNREADABLE),
    "offsets far outside": (shift(1 << 40), UNREADABLE),
    "negative offsets": (one(data_offsets=[-128, 0]), UNREADABLE), "reversed offsets": (one(data_offsets=[128, 0]), UNREADABLE),
    "offsets of 2^70": (one(data_offsets=[1 << 70, 1 << 71]), UNREADABLE), "offsets as floats": (one(data_offsets=[0.0, 128.0]), UNREADABLE),
    "offsets as text": (one(data_offsets=["0", "128"]), UNREADABLE), "one offset": (one(data_offsets=[0]), UNREADABLE),
    "negative shape": (one(shape=[-32]), UNREADABLE), "shape whose product overflows": (one(shape=[1 << 40, 1 << 40]), UNREADABLE),
    "shape larger than the bytes": (one(shape=[33]), UNREADABLE), "shape as text": (one(shape="32"), UNREADABLE),
    "shape of the same size": (one(shape=[2, 16]), rf"{UNFIT}(.|\n)*shape: {NORM} is \(2, 16\)"),
    "a tensor twice": (header(twice), rf"{UNFIT}(.|\n)*shape: {NORM} is \(1, 32\)"),
    "a bit of a name flipped": (lambda raw: raw.replace(b'"model.norm.weight"', b'"model.oorm.weight"'), rf"{UNFIT}(.|\n)*missing: {NORM}"),
    "metadata of numbers": (header(lambda table: table.update(__metadata__={"format": 3})), UNREADABLE),
    "metadata is a list": (header(lambda table: table.update(__metadata__=[])), UNREADABLE),
    "a tied head in four bits": (header(lambda table: (
        {"lm_head.weight": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}, "model.embed_tokens.weight":
         {"dtype": "F4", "shape": [2, 2], "data_offsets": [2, 4]}}, bytes(4))), "unexpected: lm_head.weight"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(good, tmp_path, name):
    folder = shutil.copytree(good / "model", tmp_path / "model")
    edit, pattern = WEIGHTS[name]
    (folder / "model.safetensors").write_bytes(edit((folder / "model.safetensors").read_bytes()))
    refused(lambda: load_model(folder), pattern, tmp_path)


PLACES = {"absent": lambda file: None, "a folder": Path.mkdir, "a pipe": os.mkfifo, "an endless device": lambda file: file.symlink_to("/dev/zero"),
          "a link to nothing": lambda file: file.symlink_to("nowhere"), "a link to itself": lambda file: file.symlink_to(file)}
FILES = {"model.safetensors": load_model, "config.json": load_model, "tokenizer.json": load_tokenizer, "generation_config.json": load_tokenizer}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(good, tmp_path, name, place):
    if name == "generation_config.json" and place in ("absent", "a link to nothing", "a link to itself"):
        pytest.skip("this file may be absent")
    folder = shutil.copytree(good / "model", tmp_path / "model")
    (folder / name).unlink()
    PLACES[place](folder / name)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match=name) as error:
        FILES[name](folder)
    assert error.type is ValueError and sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("beside", ["pytorch_model.bin", "model.safetensors", "model.bin"])
def test_pickled_weights_are_never_read(good, tmp_path, kind, beside):
    folder = shutil.copytree(good / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    pickled(folder / beside, tmp_path / "mark", kind)
    refused(lambda: load_model(folder), "pickled weights.* never read: convert them to safetensors", tmp_path)
    assert not (tmp_path / "mark").exists()


def test_links_out_of_the_folder_work(good, tmp_path):
    """The hub's cache is made of them."""
    folder = tmp_path / "snapshots/main"
    folder.mkdir(parents=True)
    for number, file in enumerate((good / "sharded").iterdir()):
        (folder / file.name).symlink_to(shutil.copy(file, tmp_path / str(number)))
    mine, theirs = load_model(folder), load_model(good / "model")
    assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in mine.named_parameters())


INDEXES = {
    "parent folder": {NORM: "../model/model.safetensors"}, "absolute": {NORM: "/etc/passwd"}, "two dots": {NORM: ".."}, "one dot": {NORM: "."},
    "no name": {NORM: ""}, "below": {NORM: "x/model.safetensors"}, "a NUL": {NORM: "model\0.safetensors"}, "half a character": {NORM: "\ud800"},
    "a number": {NORM: 1}, "null": {NORM: None}, "a list": {NORM: ["model-00001.safetensors"]}, "missing shard": {NORM: "model-00009.safetensors"},
    "the other shard": {NORM: "model-00002.safetensors", "model.embed_tokens.weight": "model-00002.safetensors"},
    "a very long name": {NORM: "x" * 300}, "the config": {NORM: "config.json"},
}


@pytest.mark.parametrize("name", INDEXES)
def test_index(good, tmp_path, name):
    folder = shutil.copytree(good / "sharded", tmp_path / "sharded")
    edit_json(folder / "model.safetensors.index.json", lambda raw: raw["weight_map"].update(INDEXES[name]))
    refused(lambda: load_model(folder), "index.json: (expected a weight_map|does not match)|expected a readable safetensors file", tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": null}', b'{"weight_map": []}', b'{"weight_map": "a"}',
                                     b'{"weight_map": {}}', b'{"weight_map": {}, "weight_map": {}}', b"\xff", b"[" * 10**6],
                         ids=lambda b: str(b[:30]))
def test_index_file(good, tmp_path, content):
    folder = shutil.copytree(good / "sharded", tmp_path / "sharded")
    (folder / "model.safetensors.index.json").write_bytes(content)
    refused(lambda: load_model(folder), r"index.json: expected|missing: model.norm.weight", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Config: single fields are in test_model.py
# ---------------------------------------------------------------------------------------------------------------------

def text(old, new):
    """Text -> text: one replacement."""
    return lambda raw: raw.replace(old, new)


def fields(**changes):
    """Text -> text: JSON with other fields."""
    return lambda raw: json.dumps(json.loads(raw) | changes)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
CONFIGS = {
    "a field twice": (text("{", '{"hidden_size": 64,', ), "config.json: .*twice"), "a field twice, alike": (text("{", '{"hidden_size": 32,'),
    "twice"),
    "a field of a field twice": (text("{", '{"rope_scaling": {"factor": 1, "factor": 2},'), "twice"),
    "NaN": (fields(rms_norm_eps=float("nan")), "rms_norm_eps: .* found nan"), "Infinity": (fields(rope_theta=float("inf")),
    "rope_theta: .* found inf"),
    "-Infinity": (fields(rope_theta=float("-inf")), "rope_theta"), "1e999": (text('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'), "rms_norm_eps"),
    "an integer of 5,000 digits": (text("{", '{"vocab_size": ' + "9" * 5000 + ","), "config.json"),
    "an integer of 400 digits": (fields(head_dim=10**400), "head_dim"),
    "a factor of 400 digits": (fields(rope_scaling=LLAMA3 | {"factor": 10**400}), "rope_scaling"),
    "more heads than fit": (fields(num_attention_heads=1 << 20, num_key_value_heads=1, head_dim=1 << 20), "head_dim: expected at most"),
    "heads of the default size that do not fit": (fields(num_attention_heads=1 << 24, num_key_value_heads=1, head_dim=None),
    "head_dim: expected at most"),
    "heads as a list": (fields(num_attention_heads=[2]), "num_attention_heads"), "layers as text": (fields(num_hidden_layers="2"),
    "num_hidden_layers"),
    "ten million layers": (fields(num_hidden_layers=10**7), "num_hidden_layers"), "true for 1": (fields(num_key_value_heads=True),
    "num_key_value_heads"),
    "two factors": (fields(model_type="llama", rope_scaling=LLAMA3, rope_parameters=LLAMA3 | {"rope_theta": 1e4, "factor": 32.0}),
    "one value each of factor"),
    "two kinds of rope": (fields(rope_scaling={"rope_type": "default", "type": "yarn"}), "rope_type: expected the same as type"),
    "two thetas": (fields(rope_theta=1e4, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), "rope_theta"),
    "an unknown multiplier": (fields(attention_multiplier=0.5), "attention_multiplier"), "another architecture": (fields(model_type="qwen3_moe"),
    "model_type"),
    "UTF-16": (lambda raw: raw.encode("utf-16"), "config.json"), "a byte-order mark": (lambda raw: b"\xef\xbb\xbf" + raw.encode(),
    "config.json.*BOM"),
    "nested 100,000 deep": (lambda raw: "[" * 10**5, "config.json"), "two objects": (lambda raw: raw + raw, "config.json"),
    "NUL bytes": (lambda raw: "\0" * 99, "config.json"), "a list": (lambda raw: "[]", "expected a JSON object, found list"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(good, tmp_path, name):
    folder = shutil.copytree(good / "model", tmp_path / "model")
    edit, pattern = CONFIGS[name]
    new = edit((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(new if isinstance(new, bytes) else new.encode())
    refused(lambda: load_model(folder), pattern, tmp_path)


def test_both_spellings_of_rope_may_say_the_same():
    raw = json.loads((ROOT / "data/tiny/model/config.json").read_text()) | {"model_type": "llama", "rope_theta": 1e4}
    old = ModelConfig.from_dict(raw | {"rope_scaling": LLAMA3 | {"type": "llama3"}})
    both = ModelConfig.from_dict(raw | {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 1e4}})
    assert old == both and old.rope_scaling.factor == 8


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and template
# ---------------------------------------------------------------------------------------------------------------------

def tokenizer(change):
    """Edit tokenizer.json."""
    return lambda folder: edit_json(folder / "tokenizer.json", change)


def beside(name="tokenizer_config.json", **changes):
    """Set fields of a file beside it."""
    return lambda folder: edit_json(folder / name, lambda raw: raw.update(changes))


def write(name, content):
    """Write bytes in place of a file."""
    return lambda folder: (folder / name).write_bytes(content)


TOKENIZERS = {
    "cut": (lambda folder: os.truncate(folder / "tokenizer.json", 5000), "tokenizer.json: expected a readable"),
    "empty": (write("tokenizer.json", b""), "tokenizer.json: expected"), "a list": (write("tokenizer.json", b"[]"), "tokenizer.json: expected"),
    "not UTF-8": (write("tokenizer.json", b"\xff\xfe"), "tokenizer.json: expected"),
    "no model": (tokenizer(lambda raw: raw.pop("model") and None), "tokenizer.json"),
    "unknown model": (tokenizer(lambda raw: raw["model"].update(type="Magic")), "tokenizer.json"),
    "vocabulary is a list": (tokenizer(lambda raw: raw["model"].update(vocab=[])), "tokenizer.json"),
    "negative id": (tokenizer(lambda raw: raw["model"]["vocab"].update({"!": -1})), "tokenizer.json"),
    "id beyond 32 bits": (tokenizer(lambda raw: raw["model"]["vocab"].update({"!": 1 << 40})), "tokenizer.json"),
    "id beyond the embedding": (tokenizer(lambda raw: raw["model"]["vocab"].update({"!": 640})), "highest token id 640.*vocab_size 640"),
    "a merge of unknown tokens": (tokenizer(lambda raw: raw["model"]["merges"].insert(0, ["qqq", "zzz"])), "tokenizer.json"),
    "a prefix, which ends the process": (tokenizer(lambda raw: raw["model"].update(continuing_subword_prefix="x")), "continuing_subword_prefix"),
    "config is a list": (write("tokenizer_config.json", b"[]"), "tokenizer_config.json"),
    "config is no JSON": (write("tokenizer_config.json", b"{"), "tokenizer_config.json"),
    "config names a field twice": (write("tokenizer_config.json", b'{"eos_token": "a", "eos_token": "b"}'), "tokenizer_config.json.*twice"),
    "added tokens are a list": (beside(added_tokens_decoder=[1]), "added_tokens_decoder"),
    "added tokens are text": (beside(added_tokens_decoder="no"), "added_tokens_decoder"),
    "an added token is text": (beside(added_tokens_decoder={"0": "<|endoftext|>"}), "added_tokens_decoder"),
    "an added token without content": (beside(added_tokens_decoder={"0": {}}), "added_tokens_decoder"),
    "an added token's content is a number": (beside(added_tokens_decoder={"0": {"content": 3}}), "added_tokens_decoder"),
    "an added token's id is a word": (beside(added_tokens_decoder={"first": {"content": "<|endoftext|>"}}), "says id first, tokenizer.json says"),
    "an added token has another id": (beside(added_tokens_decoder={"5": {"content": "<|endoftext|>"}}), "says id 5, tokenizer.json says"),
    "an added token that is not there": (beside(added_tokens_decoder={"5": {"content": "<|nowhere|>"}}), "says id 5, tokenizer.json says None"),
    "end token is a number": (beside(eos_token=3), "eos_token: 3"), "end token is a list": (beside(eos_token=["<|im_end|>"]), "eos_token: "),
    "end token without content": (beside(eos_token={"special": True}), "eos_token: {'special': True}"),
    "end token's content is a number": (beside(eos_token={"content": 3}), "eos_token: 3"), "begin token is a number": (beside(bos_token=1.5),
    "bos_token: 1.5"),
    "end token that is not there": (beside(eos_token="<|nowhere|>"), "eos_token '<|nowhere|>' is not in tokenizer.json"),
    "stop id is a word": (beside("generation_config.json", eos_token_id="2"), "eos_token_id"),
    "stop id of 400 digits": (beside("generation_config.json", eos_token_id=10**400), "eos_token_id"),
    "stop id beyond 32 bits": (beside("config.json", eos_token_id=[1 << 40]), "eos_token_id"),
    "stop id is true": (beside("generation_config.json", eos_token_id=[True]), "eos_token_id"),
    "template is a number": (beside(chat_template=3), "chat_template: expected text"),
    "template is a list of numbers": (beside(chat_template=[3]), "chat_template: expected text"),
    "default template is a number": (beside(chat_template=[{"name": "default", "template": 3}]), "chat_template: expected text"),
    "template does not parse": (beside(chat_template="{% for %}"), "chat template does not parse"),
    "template file is not UTF-8": (write("chat_template.jinja", b"\xff"), "chat_template.jinja: expected a readable template"),
    "template file is a folder": (lambda folder: (folder / "chat_template.jinja").mkdir(), "chat_template.jinja: expected a readable template"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(good, tmp_path, name):
    folder = shutil.copytree(good / "model", tmp_path / "model")
    edit, pattern = TOKENIZERS[name]
    edit(folder)
    refused(lambda: load_tokenizer(folder), pattern, tmp_path)


def test_a_text_that_the_tokenizer_has_no_token_for(tmp_path):
    import tokenizers

    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0}, unk_token="<unk>"))  # and no <unk>
    refused(lambda: Tokenizer(core, compile_template(""), ()).encode("world"), "the tokenizer refuses this text")


def grow(how):
    """A template that doubles a text sixty times."""
    return "{% set n = namespace(s='aaaa', l=[1]) %}{% for i in range(60) %}" + how + "{% endfor %}"


END, LARGE, PARSE = "no end after", "beyond 16,777,216|too large a result", "does not parse"
TEMPLATES = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", END),
    "nested loops over one list": ("{% set r = range(99999) | list %}{% for a in r %}{% for b in r if false %}{% endfor %}{% endfor %}", END),
    "loops over the text": ("{% for a in messages[0].content %}{% for b in messages[0].content %}{% set c = 1 %}{% endfor %}{% endfor %}", END),
    "a macro that calls itself twice": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", END),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "an endless recursive loop": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    "a text times 10^10": ("{{ 'a' * 10000000000 }}", f"{LARGE}|{PARSE}"), "a text times 10^4, thrice": ("{{ 'a' * 9999 * 9999 * 9999 }}", LARGE),
    "10^10 times a text": ("{{ 99999 * 99999 * 'a' }}", LARGE), "a list times 10^7": ("{{ [1] * 9999 * 9999 }}", LARGE),
    "a power": ("{{ 9 ** 9 ** 9 }}", LARGE),
    "a long range": ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
    "doubling by ~": (grow("{% set n.s = n.s ~ n.s %}"), LARGE), "doubling by +": (grow("{% set n.s = n.s + n.s %}"), LARGE),
    "doubling by %": (grow("{% set n.s = '%s%s' % (n.s, n.s) %}"), LARGE), "doubling by join": (grow("{% set n.s = [n.s, n.s] | join %}"), LARGE),
    "doubling by replace": (grow("{% set n.s = n.s.replace('a', 'aa') %}"), LARGE), "doubling a list": (grow("{% set n.l = n.l + n.l %}"), LARGE),
    "doubling by a filter": (grow("{% set n.s = n.s | replace('a', 'aa') %}"), LARGE),
    "doubling a number": (grow("{% set n.s = (n.s | length + 9) * 99 * 99 * 99 * 99 %}"), LARGE),
    "doubling by a block": (grow("{% set b %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = b %}"), LARGE),
    "a wide centre": ("{{ 'a'.center(10000000000) }}", LARGE), "a wide filter": ("{{ 'a' | center(10000000000) }}", f"{LARGE}|{PARSE}"),
    "a thousand million slices": ("{{ [1] | slice(1000000000) | list }}", PARSE), "filler text": ("{{ lipsum(n=99999) }}", "undefined"),
    "classes": ("{{ ''.__class__.__mro__ }}", "unsafe"), "globals": ("{{ raise_exception.__globals__.os }}", "unsafe"),
    "classes by a filter": ("{{ '' | attr('__class__') }}{{ (('' | attr('__class__')).mro)() }}", "unsafe|undefined"),
    "classes by format": ("{{ '{0.__class__.__mro__}'.format('').foo.bar }}", "undefined|unsafe"),
    "frames": ("{{ self.__init__.__func__ }}", "unsafe|undefined"),
    "a function's code": ("{{ raise_exception.__code__.co_code }}", "unsafe"), "the messages changed": ("{{ messages.append(1) }}", "unsafe"),
    "a message changed": ("{{ messages[0].update(role='x') }}", "unsafe"), "a file": ("{% include '/etc/passwd' %}", "loader"),
    "an import": ("{% import 'os' as os %}", "loader"), "it raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ nowhere.at.all }}", "undefined"), "a wrong type": ("{{ 'a' + 1 }}", "refuses"),
    "a division by zero": ("{{ 1 / 0 }}", "refuses"),
    "no number minus": ("{{ [] * 'a' }}", "refuses"), "an open block": ("{% if true %}", PARSE), "an unknown tag": ("{% system 'ls' %}", PARSE),
    "5,000 brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", PARSE), "5,000 sums": ("{{ " + "1+" * 5000 + "1 }}", PARSE),
    "400 branches deep": ("{% if 1 %}" * 400 + "{% endif %}" * 400, PARSE), "30 loops deep": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, PARSE),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name, monkeypatch):
    monkeypatch.setattr(Sandbox, "SECONDS", 0.3)
    source, pattern = TEMPLATES[name]
    threads = threading.active_count()
    refused(lambda: Tokenizer(None, compile_template(source), ()).render([{"role": "user", "content": "ab" * 9999}]), pattern)
    assert threading.active_count() == threads


def test_a_template_without_an_end_ends_in_any_thread_and_the_next_one_has_its_own_time():
    template, found = Tokenizer(None, compile_template("{% if messages %}" + TEMPLATES["nested loops"][0] + "{% endif %}yes"), ()), []

    def try_both():
        for messages in ([1], []):
            try:
                found.append(template.render(messages))
            except ValueError as error:
                found.append(str(error))

    worker = threading.Thread(target=try_both)
    worker.start()
    worker.join(60 * SECONDS)
    assert len(found) == 2 and END in found[0] and found[1] == "yes"


def test_long_texts_and_chats_still_render():
    """The bounds are far above what a row needs."""
    template = Tokenizer(None, compile_template("{% for m in messages %}{{ m.role ~ ': ' + m.content | trim }}\n{% endfor %}{{ '-' * 72 }}"), ())
    assert len(template.render([{"role": "user", "content": "a" * 10**6}] * 9)) > 9 * 10**6
    assert template.render([{"role": "user", "content": "a"}] * 9999).count("user: a") == 9999


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

def line(**row):
    """A row in JSON."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def deep(depth):
    """A row whose messages are nested."""
    return b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"


GOOD = line(prompt="3 + 4", completion="7")
AT = r"rows\.jsonl:2: "
ROWS = {
    "no object": (b"7", AT), "a list": (b"[1]", AT), "null": (b"null", AT), "cut": (GOOD[:-5], AT), "two objects": (GOOD + GOOD, AT),
    "a NUL": (b"\0", AT),
    "a NUL behind": (GOOD + b"\0", AT), "invalid UTF-8": (b'{"prompt": "\xff", "completion": "7"}', AT),
    "UTF-16": (GOOD.decode().encode("utf-16"), r"rows\.jsonl:[23]: "),
    "half a character, escaped": (b'{"prompt": "\\ud800", "completion": "7"}', AT),
    "half a character, raw": (line(prompt="\ud800", completion="7"), AT),
    "half a character in a name": (b'{"prompt": "1", "completion": "7", "\\udfff": 1}', AT),
    "a mark of ours": (line(prompt="3", completion="\ue0f0"), AT),
    "100,000 deep": (deep(10**5), AT), "as deep as Python reads": (deep(900), AT), "deeper": (deep(950), AT), "still deeper": (deep(980), AT),
    "an integer of 5,000 digits": (b'{"prompt": "1", "completion": ' + b"1" * 5000 + b"}", AT),
    "completion is a number": (line(prompt="1", completion=7), AT),
    "completion is missing": (line(prompt="1"), AT), "prompt is null": (line(prompt=None, completion="7"), AT),
    "answer is a list": (line(question="1", answer=["7"]), AT),
    "messages are text": (line(messages="hello"), AT), "messages are empty": (line(messages=[]), AT),
    "messages are an object": (line(messages={"role": "user"}), AT),
    "messages of null": (line(messages=[None]), AT), "no role": (line(messages=[{"content": "a"}]), AT),
    "unknown role": (line(messages=[{"role": "root", "content": "a"}]), AT),
    "role is a list": (line(messages=[{"role": ["user"], "content": "a"}]), AT),
    "content is a number": (line(messages=[{"role": "assistant", "content": 1}]), AT),
    "content is true": (line(messages=[{"role": "assistant", "content": True}]), AT),
    "content in parts": (line(messages=[{"role": "assistant", "content": [{"text": "a"}]}]), AT),
    "no assistant": (line(messages=[{"role": "user", "content": "a"}]), AT), "a hundred thousand bad messages": (line(messages=[1] * 10**5), AT),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", ROWS)
def test_row(good, tmp_path, name, ending):
    bad, pattern = ROWS[name]
    content = b"\n".join([GOOD, bad, GOOD])
    file = tmp_path / f"rows.jsonl{ending}"
    file.write_bytes(gzip.compress(content) if ending else content)
    tokenizer, pattern = load_tokenizer(good / "model"), pattern.replace("jsonl:", rf"jsonl{ending}:")
    refused(lambda: train.load_rows([str(file)], tokenizer, train.Settings()), pattern, tmp_path)


@pytest.mark.parametrize("content", [gzip.compress(GOOD * 99)[:-5], gzip.compress(GOOD * 99)[:20], GOOD, b"", b"\x1f\x8b",
                                     gzip.compress(GOOD) + b"junk", gzip.compress(b"\0" * (1 << 27), 1), gzip.compress(b" " * (1 << 27), 1)],
                         ids=["cut at the end", "cut early", "no gzip", "empty", "header alone", "junk behind", "bomb of zeros", "bomb of blanks"])
def test_gzip(good, tmp_path, content):
    """A bomb of one long line is found out after 64 MiB."""
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    refused(lambda: train.load_rows([str(tmp_path / "rows.jsonl.gz")], load_tokenizer(good / "model"), train.Settings()),
            r"rows\.jsonl\.gz: (expected a readable JSONL file|no usable row)", tmp_path)


WORKS = {  # line -> what is counted: read, too long
    "a byte-order mark": (b"\xef\xbb\xbf" + GOOD, 1, 0), "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", 2, 0),
    "a NUL in a text": (line(prompt="\0", completion="7\0"), 1, 0),
    "a million characters": (line(prompt="3 + 4 " * 170_000, completion="7"), 1, 1),
    "a million letters without a break": (line(prompt="a" * 10**6, completion="7"), 1, 1),
    "a million characters to learn": (line(prompt="3", completion="7 \n" * 330_000), 1, 1),
    "emoji": (line(prompt="😀" * 999, completion="é漢\u0301\u200d"), 1, 1),
    "a name twice, of which the last counts": (b'{"prompt": "3 + 5", "prompt": "3 + 4", "completion": "7"}', 1, 0),
    "notes as deep as they like": (GOOD[:-1] + b', "note": ' + b"[" * 800 + b"]" * 800 + b"}", 1, 0),
    "blank lines": (b"\n\n \t\n" + GOOD + b"\n\n", 1, 0),
    "special tokens as text": (line(prompt="<|im_end|>", completion="<|im_start|>"), 1, 0),
    "a pair of halves": (b'{"prompt": "\\ud83d\\ude00", "completion": "7"}', 1, 0),
    "a thousand turns": (line(messages=[{"role": "user", "content": "3"}, {"role": "assistant", "content": "7"}] * 500), 1, 1),
}


@pytest.mark.parametrize("name", WORKS)
def test_row_that_works(good, tmp_path, name):
    """Odd, but what it says is clear: read, or dropped as too long, soon."""
    content, read, long = WORKS[name]
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"\n" + content)
    began = time.process_time()
    rows, counts = train.load_rows([str(tmp_path / "rows.jsonl")], load_tokenizer(good / "model"), train.Settings())
    assert (counts["read"], counts["too_long"], len(rows)) == (1 + read, long, 1 + read - long)
    assert time.process_time() - began < SECONDS
    if "last counts" in name:
        assert rows[0] == rows[1]


def test_a_name_twice_is_refused_where_it_would_decide_the_computation(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_type": "qwen3"}')
    refused(lambda: ModelConfig.from_dir(tmp_path), "twice", tmp_path)


ITEMS = {
    "no answer": line(prompt="1"), "answer is a number": line(prompt="1", answer=7), "prompt is a number": line(prompt=1, answer="7"),
    "completion is a number": line(prompt="1", answer="7", completion=7), "id is a list": line(prompt="1", answer="7", id=[1]),
    "id is an object": line(prompt="1", answer="7", id={}),
    "answer as deep as Python reads": b'{"prompt": "1", "answer": ' + b"[" * 950 + b"]" * 950 + b"}",
    "an id twice": line(prompt="1", answer="7", id="1"), "messages are empty": line(messages=[], answer="7"), "no object": b"[]",
}


@pytest.mark.parametrize("name", ITEMS)
def test_item(tmp_path, name):
    (tmp_path / "own.jsonl").write_bytes(line(prompt="1", answer="7", id=1) + b"\n" + ITEMS[name])
    refused(lambda: data.tasks.load_items(data.tasks.find_tasks([str(tmp_path / "own.jsonl")])[0]), r"own\.jsonl(:2)?: ", tmp_path)


@pytest.mark.parametrize("choices, answer", [(None, "A"), ([], "A"), (["x"], "A"), (["x", 3], "A"), (["x", ""], "A"), (["x", "y"], "C"), ("xy", "A"),
                                             (["x", "y"], ["A"])])
def test_choices(tmp_path, choices, answer):
    (tmp_path / "own.jsonl").write_bytes(line(prompt="1", answer=answer, choices=choices))
    refused(lambda: data.tasks.load_items(Task("own", kind="choose", file=str(tmp_path / "own.jsonl"))), r"own\.jsonl:1: ", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def tensors(part, change):
    """Edit the tensors of adapter_model or talan."""
    def edit(folder):
        table = load_file(folder / f"{part}.safetensors")
        change(table)
        save_file(table, folder / f"{part}.safetensors")
    return edit


def peft(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", lambda raw: raw.update(changes))


def side(**changes):
    return lambda folder: edit_json(folder / "talan_config.json", lambda raw: raw.update(changes))


def swap(part, content):
    return lambda folder: (folder / part).write_bytes(content)


ADAPTERS = {
    "rank 0": (peft(r=0), "rank"), "huge rank": (peft(r=1 << 60), "rank"), "rank of 400 digits": (peft(r=10**400), "rank"),
    "rank true": (peft(r=True), "rank"),
    "rank 4.0": (peft(r=4.0), "rank"), "another rank": (peft(r=8), "shape: "), "alpha NaN": (peft(lora_alpha=float("nan")), "alpha"),
    "alpha of 400 digits": (peft(lora_alpha=10**400), "alpha"), "alpha infinite": (peft(lora_alpha=float("inf")), "alpha"),
    "dropout 1": (peft(lora_dropout=1), "dropout"),
    "dora as text": (peft(use_dora="no"), "use_dora: expected true or false"), "rslora as 2": (peft(use_rslora=2),
    "use_rslora: expected true or false"),
    "dora without magnitudes": (peft(use_dora=True), "missing: .*lora_magnitude_vector"), "targets null": (peft(target_modules=None), "target"),
    "targets a number": (peft(target_modules=3), "target"), "targets nested": (peft(target_modules=[["q_proj"]]), "target"),
    "a rank pattern": (peft(rank_pattern={"q_proj": 2}), "rank_pattern"), "an alpha pattern": (peft(alpha_pattern={".*": 2}), "alpha_pattern"),
    "layers": (peft(layers_to_transform=[0]), "layers_to_transform"), "modules to save": (peft(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (peft(bias="all"), "bias"), "another method": (peft(peft_type="VERA"), "peft_type"), "an unknown field": (peft(tomorrow=1), "tomorrow"),
    "an unknown field of NaN": (peft(tomorrow=float("nan")), "tomorrow"), "config cut": (swap("adapter_config.json", b'{"r": 4'),
    "adapter_config.json"),
    "config a list": (swap("adapter_config.json", b"[]"), "adapter_config.json"), "config empty": (swap("adapter_config.json", b"{}"), "r: absent"),
    "a field twice": (swap("adapter_config.json", b'{"r": 4, "r": 8}'), "twice"), "weights empty": (swap("adapter_model.safetensors", b""),
    "adapter_model.safetensors"),
    "weights cut": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 5000), "adapter_model.safetensors"),
    "a tensor missing": (tensors("adapter_model", lambda t: t.pop(Q)), f"missing: {Q}"),
    "a tensor too many": (tensors("adapter_model", lambda t: t.update(x=torch.ones(1))), "unexpected: x"),
    "another shape": (tensors("adapter_model", lambda t: t.update({Q: torch.zeros(1, 32)})), f"shape: {Q}"),
    "integers": (tensors("adapter_model", lambda t: t.update({Q: t[Q].int()})), f"dtype: {Q}"),
    "8-bit floats": (tensors("adapter_model", lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), f"dtype: {Q}"),
    "a NaN": (tensors("adapter_model", lambda t: t[Q].view(-1)[3].fill_(float("nan"))), f"{Q}: holds infinity or NaN"),
    "an infinity": (tensors("talan", lambda t: t["model.layers.1.side_path.w_out"].view(-1)[0].fill_(float("-inf"))), "w_out: holds infinity or NaN"),
    "names without a dot": (lambda folder: (tensors("adapter_model", lambda t: [t.clear(), t.update({"weight": torch.ones(1),
    "a.weight": torch.ones(1)})])(folder),
                                            peft(target_modules="all-linear")(folder)), "target"),
    "a side path's tensor among them": (tensors("adapter_model", lambda t: t.update({"model.layers.1.side_path.w_out": torch.zeros(32, 4)})),
    "unexpected: model.layers.1.side_path"),
    "slots 0": (side(slots=0), "slots"), "huge slots": (side(slots=1 << 40), "slots"), "width as text": (side(width="4"), "width"),
    "another width": (side(width=8), "shape: "),
    "no layers": (side(layers=[]), "layers"), "layers a number": (side(layers=1), "layers"), "layer -1": (side(layers=[-1]), "layers"),
    "layer 99": (side(layers=[99]), "layers"),
    "a layer twice": (side(layers=[1, 1]), "layers"), "a layer of 400 digits": (side(layers=[10**300]), "layers"),
    "layer NaN": (side(layers=[float("nan")]), "layers"),
    "another site": (side(site="nowhere"), "site"), "mixer a list": (side(mixer=["mlp"]), "mixer"), "another mixer": (side(mixer="attention"),
    "missing: .*w_query"),
    "bound infinite": (side(bound=float("inf")), "bound"), "grad_scale negative": (side(grad_scale=-1), "grad_scale"),
    "unknown side field": (side(heads=3), "heads: unknown"),
    "another hidden size": (side(hidden_size=64), "hidden_size"), "hidden size as text": (side(hidden_size="32"), "hidden_size"),
    "side config empty": (swap("talan_config.json", b"{}"), "layers: absent"), "side config a list": (swap("talan_config.json", b"[]"),
    "talan_config.json"),
    "side weights cut": (lambda folder: os.truncate(folder / "talan.safetensors", 99), "talan.safetensors"),
    "for another backbone": (lambda folder: edit_json(folder.parent / "model/config.json", lambda raw: raw.update(rope_theta=2e4)),
    "another backbone"),
    "a gradient of nothing": (lambda folder: shutil.rmtree(folder), "adapter_config.json or talan_config.json, found neither"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(good, tmp_path, name):
    model, folder = shutil.copytree(good / "model", tmp_path / "model"), shutil.copytree(good / "adapter", tmp_path / "adapter")
    edit, pattern = ADAPTERS[name]
    edit(folder)
    bare = load_model(model)
    before = {key: p.clone() for key, p in bare.named_parameters()}
    refused(lambda: load_adapter(bare, folder), pattern, tmp_path)
    after = dict(bare.named_parameters())
    assert not attached(bare) and before.keys() == after.keys() and all(torch.equal(p, after[key]) for key, p in before.items())
    attach(bare, AdapterConfig(rank=4))  # still a bare model


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("beside", ["adapter_model.bin", "adapter_model.safetensors", "talan.safetensors"])
def test_pickled_adapters_are_never_read(good, tmp_path, kind, beside):
    folder = shutil.copytree(good / "adapter", tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    pickled(folder / beside, tmp_path / "mark", kind)
    refused(lambda: load_adapter(load_model(good / "model"), folder), "pickled weights.* never read", tmp_path)
    assert not (tmp_path / "mark").exists()


def test_many_layers_are_refused_soon(good, tmp_path):
    """Each compared with each other would take minutes."""
    folder = shutil.copytree(good / "adapter", tmp_path / "adapter")
    side(layers=list(range(200_000)))(folder)
    began = time.process_time()
    with pytest.raises(ValueError, match="layers"):
        load_adapter(load_model(good / "model"), folder)
    assert time.process_time() - began < SECONDS


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their state
# ---------------------------------------------------------------------------------------------------------------------

def state(**changes):
    return lambda run: edit_json(run / "train_state.json", lambda raw: raw.update(changes))


def moments(change):
    return tensors("train_state", change)


B = "model.layers.0.self_attn.q_proj.lora_B"
RUNS = {
    "another format": (state(format=2), "format 2"), "format missing": (swap("train_state.json", b'{"step": 1}'), "format None"),
    "step missing": (swap("train_state.json", b'{"format": 1}'), "step None"),
    "step as text": (state(step="1"), "step '1'"), "step true": (state(step=True), "step True"), "step 0": (state(step=0), "step 0"),
    "step -1": (state(step=-1), "step -1"),
    "step 1.0": (state(step=1.0), "step 1.0"), "step 10^15": (state(step=10**15), "1,000,000,000,000,000, but the run has 1 steps"),
    "state cut": (swap("train_state.json", b'{"format"'), "train_state.json"),
    "state a list": (swap("train_state.json", b"[]"), "train_state.json"),
    "moments cut": (lambda run: os.truncate(run / "train_state.safetensors", 999), "train_state.safetensors"),
    "moments empty": (swap("train_state.safetensors", b""), "train_state.safetensors"),
    "moments missing": (lambda run: (run / "train_state.safetensors").unlink(), "train_state.safetensors"),
    "a parameter missing": (moments(lambda t: t.pop(f"parameter.{B}")), f"missing: parameter.{B}"),
    "a moment missing": (moments(lambda t: t.pop(f"exp_avg.{B}")), f"missing: exp_avg.{B}"),
    "a parameter too many": (moments(lambda t: t.update(x=torch.ones(1))), "unexpected: x"),
    "a parameter that would be broadcast": (moments(lambda t: t.update({f"parameter.{B}": torch.ones(1, 4)})), f"shape: parameter.{B}"),
    "a moment of another shape": (moments(lambda t: t.update({f"exp_avg_sq.{B}": torch.ones(4)})), f"shape: exp_avg_sq.{B}"),
    "moments of integers": (moments(lambda t: t.update({f"exp_avg.{B}": t[f"exp_avg.{B}"].int()})), f"dtype: exp_avg.{B}"),
    "settings cut": (swap("settings.json", b"{"), "settings.json"), "settings a list": (swap("settings.json", b"[]"), "settings.json"),
    "an unknown setting": (lambda run: edit_json(run / "settings.json", lambda raw: raw.update(ranks=4)), "settings.json.*ranks"),
    "a setting of another kind": (lambda run: edit_json(run / "settings.json", lambda raw: raw.update(lr="fast")), "settings.json.*lr"),
    "a setting null": (lambda run: edit_json(run / "settings.json", lambda raw: raw.update(steps=None)), "settings.json.*steps"),
    "layers of numbers": (lambda run: edit_json(run / "settings.json", lambda raw: raw.update(layers=[1])), "settings.json.*layers"),
    "a setting out of range": (lambda run: edit_json(run / "settings.json", lambda raw: raw.update(steps=-1)), "--steps"),
}


@pytest.mark.parametrize("name", RUNS)
def test_resuming(good, tmp_path, name, monkeypatch):
    run = shutil.copytree(good / "run", tmp_path / "run")
    edit, pattern = RUNS[name]
    edit(run)
    refused(lambda: train.main({"out": str(run), "resume": True}), pattern, tmp_path)


def test_pickled_state_is_never_read(good, tmp_path):
    run = shutil.copytree(good / "run", tmp_path / "run")
    pickled(run / "train_state.safetensors", tmp_path / "mark")
    refused(lambda: train.main({"out": str(run), "resume": True}), "pickled weights", tmp_path)
    assert not (tmp_path / "mark").exists()


def test_strange_lines_in_the_metrics_are_dropped(good, tmp_path):
    run = shutil.copytree(good / "run", tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('5\n[]\n{"step": "x"}\n{\n' + lines)
    train.main({"out": str(run), "resume": True})
    assert (run / "metrics.jsonl").read_text() == lines


ABSENT = "absent"
RECORD = {"task": "math", "id": "1", "sample": 0, "completion": "#### 7", "answer": "7", "tokens": 1, "truncated": False,
          "verdicts": {"answer": True}}
RECORDS = {
    "no task": {"task": ABSENT}, "task a list": {"task": []}, "completion a number": {"completion": 7},
    "no completion": {"completion": ABSENT},
    "no id": {"id": ABSENT}, "no verdicts": {"verdicts": ABSENT}, "no truncated": {"truncated": ABSENT},
    "tokens as text": {"reference_tokens": "x", "reference_logprob": 1},
    "choices beyond J": {"task": "arc_easy", "logprobs": [0.0] * 11 + [1.0], "choices": ["x"] * 12},

    "an empty choice": {"task": "arc_easy", "logprobs": [1.0, 2.0], "choices": ["x", ""]}, "verdicts a list": {"verdicts": []},
    "id a list": {"id": [1]},
}


@pytest.mark.parametrize("name", RECORDS)
def test_rescoring_strange_records(tmp_path, name):
    import eval

    record = {key: value for key, value in (RECORD | RECORDS[name]).items() if value != ABSENT}
    (tmp_path / "records.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(record) + "\n")
    if name == "verdicts a list":  # what it was does not count: it is judged anew
        assert eval.rescore(EvalSettings(rescore=str(tmp_path / "records.jsonl")))["math"]["n"] == 1
        return
    refused(lambda: eval.rescore(EvalSettings(rescore=str(tmp_path / "records.jsonl"))), r"records\.jsonl: expected records", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------

def ids(*rows):
    return torch.tensor(rows)


CALLS = {
    "id too large": (lambda m: m(ids([1, 640])), "token ids from 0 to 639, found 1 to 640"), "id negative": (lambda m: m(ids([-1, 3])),
    "token ids from 0 to 639, found -1 to 3"),
    "id of 2^40": (lambda m: m(ids([1 << 40])), "token ids"), "with a cache": (lambda m: m(ids([640]), Cache(m.config, 1, 4)), "token ids"),
    "floats": (lambda m: m(torch.zeros(1, 2)), "integer tokens"), "bools": (lambda m: m(torch.zeros(1, 2, dtype=torch.bool)), "integer tokens"),
    "bytes": (lambda m: m(torch.zeros(1, 2, dtype=torch.uint8)), "integer tokens"), "one dimension": (lambda m: m(ids(1, 2)), "integer tokens"),
    "generate: an empty prompt": (lambda m: generate(m, [[1], []], 2), "prompt 1: expected at least one token"),
    "generate: id 640": (lambda m: generate(m, [[640]], 2), "prompt 0: token ids"),
    "generate: id -1": (lambda m: generate(m, [[-1]], 2), "prompt 0: token ids"), "generate: -1 tokens": (lambda m: generate(m, [[1]], -1),
    "max_new_tokens"),
    "generate: 10^12 tokens": (lambda m: generate(m, [[1]], 10**12), "max_new_tokens"),
    "generate: no rows": (lambda m: generate(m, [[1]], 2, batch_rows=0), "batch_rows"),
    "generate: temperature NaN": (lambda m: generate(m, [[1]], 2, temperature=float("nan")), "temperature"),
    "generate: top_p 0": (lambda m: generate(m, [[1]], 2, top_p=0), "top_p"),
    "a file for a folder": (lambda m: resolve_folder(__file__), "a file, and not a Hugging Face id"),
    "a NUL in a path": (lambda m: resolve_folder("a\0/b"), "no such folder"),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(good, name):
    call, pattern = CALLS[name]
    model = load_model(good / "model")
    refused(lambda: call(model), pattern)
    assert torch.equal(model(ids([1, 2])), load_model(good / "model")(ids([1, 2])))


def test_a_file_that_looks_like_a_hub_id_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").write_text("")
    refused(lambda: load_model("owner/name"), "a file, and not a Hugging Face id", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The command lines
# ---------------------------------------------------------------------------------------------------------------------

def script(name, *words):
    """Run a script in this process as `python NAME WORDS`; returns what it would end with."""
    before = sys.argv
    sys.argv = [str(ROOT / name), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before



COMMANDS = {
    "train, a folder without config": ("train.py --backbone empty", "tokenizer.json: expected a readable tokenizer"),
    "train, a file for a folder": ("train.py --backbone rows.jsonl", "rows.jsonl: a file, and not a"),
    "train, no such folder": ("train.py --backbone ./nowhere", "no such folder"),
    "train, a hub id offline": ("train.py --backbone no/where", "no such local folder.*nor"),
    "train, missing data": ("train.py --data nowhere.jsonl", "nowhere.jsonl: expected a readable JSONL file"),
    "train, empty data": ("train.py --data rows.jsonl", "rows.jsonl: no usable row"),
    "train, a folder for data": ("train.py --data empty", "empty: expected a readable JSONL file"),
    "train, missing held-out data": ("train.py --dev-data nowhere.jsonl", "nowhere.jsonl"),
    "train, one row": ("train.py --data one.jsonl", "dev_rows: expected 1 to 0 of the 1 usable rows"),
    "train, an existing folder": ("train.py --out empty/..", "exists"),
    "train, a file for a run": ("train.py --out rows.jsonl", "rows.jsonl: exists; it holds no run"),
    "train, a run in a file": ("train.py --out rows.jsonl/run --steps 1 --dev-rows 8", "rows.jsonl"),
    "train, an unknown flag": ("train.py --bakcbone x", "did you mean --backbone"),
    "train, an unknown adapter": ("train.py --adapter lroa", "kind: expected one of none, lora, dora, rslora, found 'lroa'"),
    "train, an unknown task": ("train.py --tasks mth", "tasks: expected some of math"),
    "train, an unknown target": ("train.py --targets qproj", "targets: expected one of q_proj"),
    "train, an unknown mixer": ("train.py --mixer conv", "mixer: expected one of linear, mlp, attention"),
    "train, an infinite rate": ("train.py --lr inf", "--lr: expected a finite number above 0, found inf"),
    "train, endless epochs": ("train.py --epochs inf", "--epochs"), "train, NaN": ("train.py --warmup nan", "--warmup"),
    "train, infinite warmup": ("train.py --warmup inf", "--warmup"),
    "train, a word for a number": ("train.py --rank four", "argument --rank"),
    "train, a huge rank": ("train.py --rank 1" + "0" * 30, "is larger than"), "train, huge slots": ("train.py --slots 1000000000", "slots"),
    "train, layer -1": ("train.py --layers=-1", "layers: expected indices"),
    "train, layer 99": ("train.py --layers 99", "layers: expected distinct indices from 0"),
    "train, no such device": ("train.py --device gpu", "device: expected auto"),
    "train, a device without numbers": ("train.py --device meta", "device: expected auto"),
    "train, a device that is not there": ("train.py --device mps", "device: expected auto"),
    "train, dtype float8": ("train.py --dtype float8", "dtype: expected one of"),
    "eval, a folder without config": ("eval.py --backbone empty", "config.json: expected a readable JSON file"),
    "eval, a file for a folder": ("eval.py --backbone rows.jsonl", "rows.jsonl: a file, and not a"),
    "eval, no such adapter": ("eval.py --adapter nowhere", "nowhere: expected adapter_config.json"),
    "eval, an empty adapter": ("eval.py --adapter empty", "found neither"),
    "eval, a backbone that is a number": ("eval.py --adapter numbered", "17: no such folder"),
    "eval, missing task": ("eval.py --tasks nowhere.jsonl", "nowhere.jsonl"), "eval, empty task": ("eval.py --tasks rows.jsonl", "no items"),
    "eval, an unknown task": ("eval.py --tasks maths", "tasks: expected some of math"),
    "eval, an unknown flag": ("eval.py --task math", "did you mean --tasks"),
    **{f"eval, an unprepared task, {name}": (f"eval.py --tasks {name} --allow-code-execution",
                                             f"prepare it with: python data/prepare.py {task.path.parent.name}")
       for name, task in data.tasks.TASKS.items() if not task.path.exists()},
    "eval, missing records": ("eval.py --rescore nowhere.jsonl", "nowhere.jsonl"),
    "eval, samples without temperature": ("eval.py --samples 4", "--temperature above 0"),
    "eval, a top_p of 2": ("eval.py --tasks own.jsonl --top-p 2", "top_p"),
    "eval, 10^12 tokens": ("eval.py --tasks own.jsonl --max-new-tokens 1000000000000", "max_new_tokens"),
    "eval, results in a file": ("eval.py --tasks own.jsonl --max-new-tokens 1 --out rows.jsonl/x", "rows.jsonl"),
    "compare, nothing": ("eval.py compare", "baseline runs: expected at least 1"),
    "compare, no such runs": ("eval.py compare --baseline nowhere --candidate empty", "nowhere"),
    "internals, no adapter": ("eval.py internals", "adapter: name the run"),
    "internals, no such adapter": ("eval.py internals --adapter nowhere", "nowhere"),
    "overhead, no such adapter": ("eval.py overhead --adapter nowhere", "nowhere"),
    "overhead, no such config": ("eval.py overhead --configs nowhere.json", "nowhere.json"),
    "merge, no such adapter": ("talan.py merge --backbone {good}/model --adapter nowhere --out new", "nowhere"),
    "merge, no such backbone": ("talan.py merge --backbone nowhere --adapter {good}/adapter --out new", "nowhere"),
    "merge, a folder that exists": ("talan.py merge --backbone {good}/model --adapter {good}/adapter --out empty", "empty: exists already"),
    "merge, a side path": ("talan.py merge --backbone {good}/model --adapter {good}/adapter --out new", "--drop-side-path"),
    "merge, into a file": ("talan.py merge --backbone {good}/model --adapter {good}/adapter --drop-side-path --out rows.jsonl/new", "rows.jsonl"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: an empty folder, an empty file, a file of one row, a task, an adapter whose backbone's name is a number."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_bytes(b"")
    (tmp_path / "one.jsonl").write_bytes(GOOD)
    (tmp_path / "own.jsonl").write_bytes(line(prompt="1", answer="7"))
    (tmp_path / "numbered").mkdir()
    (tmp_path / "numbered/adapter_config.json").write_text('{"base_model_name_or_path": 17}')
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_command(good, here, name, capsys):
    """Ends with a message, no traceback, and makes nothing."""
    words, pattern = COMMANDS[name]
    words = words.format(good=good).split()
    more = [] if words[0] != "train.py" or "--tasks" in words else ["--tasks", "none"]
    before = snapshot(here)
    code = script(*words, *more)
    assert isinstance(code, str) and code.startswith(words[0]), code
    assert re.search(pattern, code) and len(code) < 5000, code
    assert snapshot(here) == before


def test_a_script_that_refuses_prints_no_traceback(here):
    command = [sys.executable, ROOT / "train.py", "--backbone", "empty"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and done.stderr.startswith("train.py: empty/tokenizer.json: expected") and "Traceback" not in done.stderr


def test_settings_that_do_not_exist_name_the_nearest():
    for kind, words, near in ((train.Settings, ["--dropuot", "1"], "--dropout"), (EvalSettings, ["--max-tokens", "3"], "--max-new-tokens")):
        with pytest.raises(SystemExit, match=f"did you mean {near}"):
            given(kind, words)
