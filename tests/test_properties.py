"""Properties on random inputs (hypothesis): batching changes nothing, labels equal a slow reference, readers fail in one way only.

The examples are derived from each test's code, not from chance, so every run tries the same ones.
"""

import gzip
import io
import json
import struct
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as scoring
import train
from data.settings import given as given_settings
from data.tasks import find_tasks, load_items
from data.template import compile_template
from model import FIXED, HARMLESS, Cache, ModelConfig, Tokenizer, Transformer, generate, load_tokenizer, tensor_info
from talan import MIXERS, SITES, WRITEBACKS, AdapterConfig, SidePath, TalanConfig, attach, read_peft_config, read_talan_config

TINY = ROOT / "data/tiny/model"
CONFIG = ModelConfig("qwen3", 53, 24, 40, 3, 4, 2, 8, tie_word_embeddings=True)


def few(count):
    """The same `count` examples in each run, and no limit on time."""
    return settings(max_examples=count, derandomize=True, database=None, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


def stirred(parameters, seed=9):
    """Move every tensor away from its start, where half of them are zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p += 0.3 * torch.randn(p.shape, generator=draw)


@cache
def model_of(site, mixer, writeback, kind):
    """A small random model with an adapter and side paths in two layers."""
    model = Transformer(CONFIG)
    model.init_weights(0)
    attach(model, AdapterConfig(kind, 3), TalanConfig((0, 2), site, 3, 5, mixer, writeback))
    stirred(model.parameters())
    return model.eval()


MODELS = st.builds(model_of, st.sampled_from(SITES), st.sampled_from(MIXERS), st.sampled_from(WRITEBACKS), st.sampled_from(["lora", "dora"]))
ROW = st.lists(st.integers(0, 52), min_size=1, max_size=14)


@st.composite
def chunked(draw):
    """Rows, and how many tokens of each go in at each step; some steps are empty for some rows, none is for all."""
    rows = draw(st.lists(ROW, min_size=1, max_size=4))
    steps, left = [], [len(row) for row in rows]
    while any(left):
        step = [draw(st.integers(0, n)) for n in left]
        if any(step):
            steps.append(step)
            left = [n - taken for n, taken in zip(left, step)]
        else:
            steps.append([min(n, 1) for n in left])
            left = [max(0, n - 1) for n in left]
    return rows, steps


# ---------------------------------------------------------------------------------------------------------------------
# Batches, splits and rows alone
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@few(60)
@given(MODELS, chunked(), st.integers(0, 52))
def test_any_split_of_ragged_rows_equals_each_row_in_one_pass(model, case, pad):
    """Hidden states, cache lengths and side-path states; pads hold any token."""
    rows, steps = case
    cache = Cache(CONFIG, len(rows), max(map(len, rows)) + max(map(max, steps)))
    found, at = [[] for _ in rows], [0] * len(rows)
    for step in steps:
        tokens = torch.full((len(rows), max(step)), pad)
        for b, n in enumerate(step):
            tokens[b, :n] = torch.tensor(rows[b][at[b]:at[b] + n])
        hidden = model(tokens, cache, torch.tensor(step))
        for b, n in enumerate(step):
            found[b].append(hidden[b, :n])
            at[b] += n
    assert cache.lengths.tolist() == at == [len(row) for row in rows]
    for b, row in enumerate(rows):
        alone = Cache(CONFIG, 1, len(row))
        torch.testing.assert_close(torch.cat(found[b]), model(torch.tensor([row]), alone)[0], rtol=1e-4, atol=1e-4)
        for layer, state in alone.side.items():
            for part, whole in zip(cache.side[layer], state):
                torch.testing.assert_close(part[b], whole[0], rtol=1e-4, atol=1e-4)


@cache
def side_of(mixer, writeback):
    """A side path away from its start."""
    side = SidePath(6, TalanConfig((0,), slots=3, width=4, mixer=mixer, writeback=writeback))
    stirred(side.parameters())
    return side


@torch.no_grad()
@few(60)
@given(st.builds(side_of, st.sampled_from(MIXERS), st.sampled_from(WRITEBACKS)), st.lists(st.integers(1, 300), min_size=1, max_size=3),
       st.data())
def test_side_path_alone(side, lengths, data):
    """Any split of a padded batch, chunks of 128 crossed, equals each row by itself, the state included."""
    T = max(lengths)
    h = torch.randn(len(lengths), T, 6, generator=torch.Generator().manual_seed(T))
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(1, T), max_size=3))})
    state, parts, sizes = None, [], torch.tensor(lengths)
    for begin, end in zip(cuts, cuts[1:]):
        out, state = side(h[:, begin:end], state, (sizes - begin).clamp(0, end - begin))
        parts.append(out)
    for b, n in enumerate(lengths):
        out, alone = side(h[b:b + 1, :n])
        torch.testing.assert_close(torch.cat(parts, 1)[b, :n], out[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((state[0][b], state[1][b]), (alone[0][0], alone[1][0]), rtol=1e-4, atol=1e-4)


@few(25)
@given(MODELS, st.lists(ROW, min_size=1, max_size=6), st.integers(0, 6), st.sets(st.integers(0, 52), max_size=25), st.integers(1, 7),
       st.integers(1, 40), st.sampled_from([0.0, 1.3]))
def test_generate_gives_each_prompt_what_it_gets_alone(model, prompts, most, eos, rows, prefill, temperature):
    """However many rows run at once, and whatever ends when."""
    options = dict(eos_ids=eos, temperature=temperature, top_p=0.9)
    together = generate(model, prompts, most, batch_rows=rows, prefill_tokens=prefill, **options)
    assert together == generate(model, prompts, most, batch_rows=1, prefill_tokens=1, **options)
    for answer in together:
        assert len(answer) <= most and not set(answer[:-1]) & eos and (len(answer) == most or answer[-1] in eos)
    assert temperature or together == [generate(model, [prompt], most, **options)[0] for prompt in prompts]


@few(150)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.integers(1, 400), st.integers(0, 400), st.integers(0, 3), st.integers(0, 3))
@example([10] * 9, 40, 20, 0, 0)  # two rows fill a micro-batch to the last token
def test_every_row_once_an_epoch_and_within_the_budgets(lengths, step_tokens, micro_tokens, seed, epoch):
    plan = train.plan_epoch(lengths, step_tokens, micro_tokens, seed, epoch)
    size = lambda rows: len(rows) * max(lengths[n] for n in rows)
    assert sorted(n for step in plan for micro in step for n in micro) == list(range(len(lengths)))
    for step in plan:
        whole = [n for micro in step for n in micro]
        assert size(whole) <= step_tokens or len(whole) == 1
        assert all(micro and (size(micro) <= (micro_tokens or step_tokens) or len(micro) == 1) for micro in step)
        assert all(size([*a, b[0]]) > (micro_tokens or step_tokens) for a, b in zip(step, step[1:]))  # none is split without need
    assert [[n for micro in step for n in micro] for step in plan] == [step[0] for step in train.plan_epoch(lengths, step_tokens, 0, seed, epoch)]


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------

PIECE = st.sampled_from(["\n", " ", "7", "42", "the", "<|im_end|>", "<|im_start|>", "assistant\n", "Answer:\n", "é", "😀", "e\u0301",
                         "\r\n", "\t", "漢", "</think>"])
TEXT = st.lists(PIECE | st.characters(exclude_categories=["Cs", "Co"]), max_size=6).map("".join)
CHAT = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=5)
FORMS = {  # form -> its template (None: the model's own), and of each role what stands before a text, the stop token, and what follows it
    "chatml": (None, {role: (f"<|im_start|>{role}\n", "<|im_end|>", "\n") for role in ("system", "user", "assistant")}),
    "bare": ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}",
             {role: (f"[{role}]", "<|im_end|>", "") for role in ("system", "user", "assistant")}),
}


@cache
def tokenizer_of(form):
    """The embedded tokenizer with the form's template."""
    own, source = load_tokenizer(TINY), FORMS[form][0]
    return own if source is None else Tokenizer(own.core, compile_template(source), own.eos_ids, own.specials)


@few(200)
@given(st.sampled_from(list(FORMS)), CHAT, TEXT)
def test_labels_equal_those_of_a_character_by_character_reference(form, turns, last):
    tokenizer, turns = tokenizer_of(form), [*turns, ("assistant", last)]
    text, mine = "", []  # mine: which characters are an assistant's own, or of the stop token after them
    for role, content in turns:
        before, stop, after = FORMS[form][1][role]
        text += before + content + stop + after
        mine += [False] * len(before) + [role == "assistant"] * len(content + stop) + [False] * len(after)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.render(messages) == text
    row, encoding = train.encode_row(tokenizer, messages), tokenizer.encoding(text)
    assert row.ids == encoding.ids
    for token, (begin, end), label in zip(row.ids, encoding.offsets, row.supervised, strict=True):
        characters = mine[begin:end]
        assert label == (bool(characters) and all(characters)), (tokenizer.core.id_to_token(token), begin, end)


# ---------------------------------------------------------------------------------------------------------------------
# Readers: success, or the one ValueError that they promise
# ---------------------------------------------------------------------------------------------------------------------

NUMBER = st.integers(-3, 70) | st.integers() | st.sampled_from([10**400, 1 << 63, -(1 << 63), 2**31]) | st.floats()
JSON = st.recursive(st.none() | st.booleans() | NUMBER | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)


def changes(names, known):
    """Some fields by these names with any value, or with one that another field has."""
    return st.dictionaries(st.sampled_from(sorted(names)) | st.text(max_size=8), JSON | st.sampled_from(known), max_size=3)


def either(act, begins=""):
    """act(), or its ValueError: a plain one, not empty, that begins so."""
    try:
        return act()
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(begins) and str(error) != begins, repr(error)
        return None


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


BASE = json.loads((TINY / "config.json").read_text())
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512}


@few(400)
@given(changes(HARMLESS | set(FIXED) | {"num_experts", "scale_embeddings"}, [*BASE.values(), ROPE, {"type": "linear"}]), st.booleans(),
       st.dictionaries(st.sampled_from(sorted(ROPE)), JSON, max_size=2))
@example({}, True, {"factor": 10**400})
def test_config_fields(extra, llama, rope):
    """What is accepted can be computed: the model is built, on the meta device, and its rotary table is finite."""
    raw = BASE | {"model_type": "llama" if llama else "qwen3"} | ({"rope_parameters": ROPE | rope} if rope else {}) | extra
    config = either(lambda: ModelConfig.from_dict(raw), "config: ")
    if config is not None and config.num_hidden_layers <= 64:
        with torch.device("meta"):
            model = Transformer(config)
        assert bool(model.inverse_frequencies.isfinite().all()) and all(0 not in p.shape for p in model.parameters())


@few(300)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"a": 1, "a": 2}')
def test_config_files(folder, content):
    (folder / "config.json").write_bytes(content)
    either(lambda: ModelConfig.from_dir(folder), str(folder / "config.json"))


FIELDS = ("messages", "prompt", "completion", "question", "answer", "id", "choices", "note")
ROWS = st.fixed_dictionaries({}, optional={name: JSON | TEXT for name in FIELDS})
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "x"]) | JSON, "content": TEXT | JSON})
LINE = (st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode())
        | ROWS.map(lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "replace"))
        | st.lists(TURN, max_size=3).map(lambda v: json.dumps({"messages": v}).encode()))


@few(400)
@given(st.lists(LINE, max_size=3), st.booleans())
def test_rows(folder, lines, packed):
    file = folder / ("rows.jsonl" + ".gz" * packed)
    file.write_bytes(gzip.compress(b"\n".join(lines)) if packed else b"\n".join(lines))
    rows = either(lambda: list(train.read_rows(file)), str(file))
    if rows:
        for _, messages in rows:
            either(lambda messages=messages: train.encode_row(tokenizer_of("chatml"), messages))


@few(200)
@given(st.binary(max_size=200))
def test_gzip_of_noise(folder, content):
    (folder / "noise.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00" + content)
    either(lambda: list(train.read_rows(folder / "noise.jsonl.gz")), str(folder / "noise.jsonl.gz"))


@few(200)
@given(st.lists(LINE, min_size=1, max_size=3))
def test_items(folder, lines):
    (folder / "items.jsonl").write_bytes(b"\n".join(lines))
    either(lambda: load_items(find_tasks([str(folder / "items.jsonl")])[0]), str(folder / "items.jsonl"))


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_dora": False,
        "bias": "none"}
NAMES = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "q_proj.lora_magnitude_vector", "a.weight", "weight", "", ".", "..",
         ".weight"]


@few(400)
@given(changes([*PEFT, "use_rslora", "rank_pattern", "init_lora_weights", "task_type", "modules_to_save"], [*PEFT.values(), "all-linear", True]),
       st.lists(st.sampled_from(NAMES) | st.text(max_size=5)))
def test_adapter_configs(folder, extra, names):
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | extra))
    found = either(lambda: read_peft_config(folder / "adapter_config.json", dict.fromkeys(names)))
    assert found is None or found.rank >= 1 and 0 < found.scale < float("inf") and found.targets


SIDE = {"layers": [0, 1], "site": "block", "slots": 2, "width": 4, "mixer": "mlp", "writeback": "add", "bound": 0.1, "grad_scale": 1.0,
        "trunk_grad_scale": 1, "hidden_size": 24, "base_model_name_or_path": ""}


@few(400)
@given(changes(SIDE, list(SIDE.values())))
def test_side_path_configs(folder, extra):
    (folder / "talan_config.json").write_text(json.dumps(SIDE | extra))
    found = either(lambda: read_talan_config(folder / "talan_config.json", CONFIG))
    if found is not None and found.slots * found.width < 4096:
        layers = either(lambda: found.resolve(3))
        assert layers is None or set(layers) <= {0, 1, 2}
        SidePath(24, found)(torch.zeros(1, 2, 24))


HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}
ENTRY = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "x"]) | JSON, "shape": st.lists(NUMBER, max_size=3) | JSON,
    "data_offsets": st.lists(NUMBER, max_size=3) | JSON})


@few(400)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=4), ENTRY | JSON, max_size=3),
       st.sampled_from([0, 0, 0, 1, -1, 9]), st.sampled_from([32, 32, 32, 24, 0, 33]))
def test_safetensors_headers(folder, extra, off, size):
    header = json.dumps(HEADER | extra).encode()
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(header) + off) + header + bytes(size))
    found = either(lambda: tensor_info(folder / "x.safetensors"), str(folder / "x.safetensors"))
    assert found is None or all(isinstance(name, str) and isinstance(shape, tuple) for name, (shape, _) in found.items())


@few(400)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 250))
def test_safetensors_with_flipped_bits(folder, flips, cut):
    header = json.dumps(HEADER).encode()
    content = bytearray(struct.pack("<Q", len(header)) + header + bytes(32))
    for place, value in flips:
        content[place % len(content)] ^= value
    (folder / "x.safetensors").write_bytes(content[:len(content) - max(0, cut - 200)])
    either(lambda: tensor_info(folder / "x.safetensors"), str(folder / "x.safetensors"))


SETTINGS = json.loads((TINY / "tokenizer_config.json").read_text())


@few(200)
@given(changes([*SETTINGS, "bos_token", "unk_token", "add_bos_token"], list(SETTINGS.values())), changes(["eos_token_id", "pad_token_id"], [[2], 0]))
def test_tokenizer_configs(folder, extra, stops):
    for name, raw in (("tokenizer_config.json", SETTINGS | extra), ("generation_config.json", stops), ("config.json", BASE)):
        (folder / name).write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    found = either(lambda: load_tokenizer(folder))
    if found is not None:
        either(lambda: found.render([{"role": "user", "content": "3"}]), "the chat template")


BITS = st.sampled_from([
    "{{ ", " }}", "{% for m in messages %}", "{% endfor %}", "{% if ", " %}", "{% endif %}", "{% set x = ", "m", "messages", "x", ".content", "[0]",
    " + ", " * ", " ~ ", " | ", "length", "trim", "join", "99", "'a'", "(", ")", "loop", ".index", " if ", " else ", "{% macro f() %}", "none",
    "{% endmacro %}", "f()", "range(3)", "namespace(a=1)", ".__class__", "{#", "#}", "\n", "%", "{%- generation %}", "{% endgeneration %}",
    " is defined", "not ", "-", "{{ x }}", "{{ messages[0].content }}", "{{ 3 * 'a' }}"])


@few(600)
@given(st.lists(BITS | st.text(max_size=3), max_size=14).map("".join))
@example("{{ messages | map(attribute='content') | join * 99999999 }}")
def test_templates(source):
    found = either(lambda: compile_template(source), "the chat template does not parse")
    if found is not None:
        either(lambda: Tokenizer(None, found, ()).render([{"role": "user", "content": "3"}]), "the chat template refuses")


STORED = json.loads(json.dumps(train.asdict(train.Settings())))


@few(200)
@given(changes(STORED, list(STORED.values())))
def test_settings_of_a_run_to_resume(folder, extra):
    (folder / "settings.json").write_text(json.dumps(STORED | extra))
    explicit = {"out": str(folder), "resume": True}
    found = either(lambda: train.choose_run(train.Settings(**explicit), explicit))
    assert found is None or found[1].resume is True


@few(300)
@given(st.lists(st.sampled_from(["--rank", "--layers", "--talan", "--no-talan", "--lr", "--lr=", "--data", "--", "-x", "1", "a,b", "0.5", "nan",
                                 "--dropuot", ""]) | st.text(max_size=4), max_size=4))
def test_command_lines(words):
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        try:
            found = given_settings(train.Settings, words)
            either(lambda: train.Settings(**found), "settings:")
        except SystemExit as end:
            assert end.code == 0 or isinstance(end.code, str)


RECORD = {"task": "math", "id": "1", "sample": 0, "completion": "#### 7", "answer": "7", "tokens": 1, "truncated": False,
          "verdicts": {"answer": True}, "reference_logprob": -1.0, "reference_tokens": 2, "choices": ["a", "b"], "logprobs": [-1.0, -2.0]}


@few(200)
@given(changes(RECORD, [*RECORD.values(), "arc_easy", "mmlu_stem"]), st.sets(st.sampled_from(sorted(RECORD)), max_size=1))
def test_records(folder, extra, lost):
    record = {name: value for name, value in (RECORD | extra).items() if name not in lost}
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    with redirect_stdout(io.StringIO()):
        either(lambda: scoring.rescore(scoring.Settings(rescore=str(folder / "records.jsonl"))))
