"""experiments/study.py: each memory against float64 loops, and the map; data/tiny/probe.py."""

import math
import re

import pytest
import torch
from common import read_lines, parse_object
from data.chat import load_tokenizer
from data.tiny import probe
from experiments import study, sweep
from model import Cache, load_model, pad_rows
from talan import AdapterConfig, SidePath, TalanConfig, attach, load_adapter, save_adapter
from train import TINY

B, T, D, M, R = 3, 150, 12, 4, 6  # more tokens than a chunk


def side_path(name, mixer="attention"):
    torch.manual_seed(0)
    config = TalanConfig(slots=M, width=R, mixer=mixer, writeback="add")
    path = study.MEMORIES[name](D, config)
    with torch.no_grad():
        for p in path.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1] if p.dim() else 1))
    return path


def rms(x):
    return x / (x.square().mean() + 1e-6).sqrt()


def loops(path, name, h):
    """h (T,D) -> h' (T,D), a token at a time, every sum from the start."""
    p = {key: value.detach().double() for key, value in path.named_parameters()}
    out, history = [], []
    for x in map(rms, h):
        k, v = rms(p["w_key"] @ x), p["w_value"] @ x
        history.append((k, v, x))
        if name == "none":
            y = v * torch.sigmoid(v)
        else:
            z = torch.stack([memory(p, name, history, m) for m in range(M)])  # (M,R)
            q = rms(p["w_query"] @ x)
            a = torch.stack([q @ rms(z_m) / math.sqrt(R) for z_m in z]).softmax(0)
            y = a @ z
        out.append(p["w_out"] @ y)
    return h + torch.stack(out)


def memory(p, name, history, m):
    if name == "token":
        return history[-1][1]
    num, den = 0, 0
    for age, (k, v, x) in enumerate(reversed(history)):
        e = k @ rms(p["slots"][m]) / math.sqrt(R)
        w = torch.exp(e * (p["extra"][m] if name == "sharp" else 1))
        w = w * torch.sigmoid(p["extra"][m] @ x) if name == "gate" else w
        w = w * torch.sigmoid(p["extra"][m]) ** age if name == "decay" else w
        num, den = num + w * v, den + w
    return num / den


@pytest.mark.parametrize("name", sorted(study.MEMORIES.keys() - {"other", "prompt"}))
def test_a_memory_is_what_loops_in_float64_say_however_the_text_is_cut(name):
    path, h = side_path(name), torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
    whole, _ = path(h, lengths=torch.tensor([T, T, 9]))
    for b, length in ((0, T), (2, 9)):
        expected = loops(path, name, h[b, :length].double())
        torch.testing.assert_close(whole[b, :length].double(), expected, rtol=2e-4, atol=2e-5)
    state, parts = None, []
    for part in h.split([140, 1, 9], 1):
        out, state = path(part, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1)[:2], whole[:2], rtol=1e-5, atol=1e-5)


def test_the_other_memory_is_that_of_the_row_before():
    path, h = side_path("other", "linear"), torch.randn(B, T, D)
    w, v = path.compress(study.talan.rms(h), None)
    sums = torch.zeros(B, M, R), torch.zeros(B, M)
    own = study.SidePath.remember(path, w, v, *sums)[0]
    assert torch.equal(path.remember(w, v, *sums)[0], own[[2, 0, 1]])


def test_the_prompts_memory_is_written_up_to_the_answer_and_no_further():
    """Its sums after the whole text are SidePath's after the prompt, in a cache and without."""
    tokenizer, config = load_tokenizer(TINY / "model"), TalanConfig(slots=M, width=R)
    prompts = [[{"role": "user", "content": text}] for text in ("2 + 3?", "Compute 4 * 5 + 6.")]
    heads = [tokenizer.encode(tokenizer.render(p, add_generation_prompt=True)) for p in prompts]
    tails = [tokenizer.encode(text) for text in ("12\n", "assistant 1\n#### 2\n")]
    cut = [head.index(study.answer_token()) for head in heads]
    assert [tokenizer.decode(h[n:]) for h, n in zip(heads, cut)] == ["assistant\n"] * 2
    with study.replaced_memory("prompt"), torch.no_grad():
        model = load_model(TINY / "model", dtype="float32")
        attach(model, AdapterConfig(rank=1), config)
        path = next(b.side_path for b in model.model.layers if b.side_path)
        path.w_out.normal_()
        seen = []
        path.register_forward_hook(lambda path, args, result: seen.append((args, result)))
        whole = model(pad_rows([h + t for h, t in zip(heads, tails)])[0])
        (h, *_), (_, state) = seen[-1]
        cache = Cache(model.config, 2, 64)
        tokens, lengths = pad_rows(heads)
        first = model(tokens, cache, lengths)
        tokens, sizes = pad_rows(tails)
        second = model(tokens, cache, sizes)
    plain = SidePath(model.config.hidden_size, config)
    plain.load_state_dict({k: v for k, v in path.state_dict().items() if k != "extra"})
    _, expected = plain(h, lengths=torch.tensor(cut))
    cached = next(iter(cache.side.values()))
    for found, in_cache, want in zip(state, cached, expected):
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(in_cache, want)
    for b, (head, tail) in enumerate(zip(heads, tails)):
        pieces = torch.cat([first[b, : len(head)], second[b, : len(tail)]])
        torch.testing.assert_close(pieces, whole[b, : len(pieces)], rtol=1e-4, atol=1e-4)


def test_what_a_variation_saved_is_loaded_as_that_variation_alone(tmp_path):
    with study.replaced_memory("token"):
        model = load_model(TINY / "model")
        attach(model, AdapterConfig(rank=1), TalanConfig(slots=2, width=4))
        save_adapter(model, tmp_path)
        load_adapter(load_model(TINY / "model"), tmp_path)
    with pytest.raises(ValueError, match="extra"):
        load_adapter(load_model(TINY / "model"), tmp_path)
    with study.replaced_memory("gate"), pytest.raises(ValueError, match="extra"):
        load_adapter(load_model(TINY / "model"), tmp_path)


def test_a_variation_names_a_memory_and_flags():
    assert study.memory_of("slots=4&memory=token") == "token"
    assert study.memory_of("no-talan&rank=2") == study.memory_of("candidate") == ""
    assert sweep.parse_variation("slots=4&memory=token") == {"slots": 4}
    with pytest.raises(ValueError, match="a memory of token"):
        study.memory_of("memory=tokens")


def test_probe_rows_have_the_unit_of_who_asks(tmp_path):
    """The answer is the sum, its unit that of the first name; no prompt is in two files."""
    probe.main({"out": str(tmp_path)})
    prompts, askers = set(), set()
    for split, count in probe.SPLITS.items():
        rows = [parse_object(line, at) for at, line in read_lines(tmp_path / f"{split}.jsonl")]
        assert len(rows) == count
        for row in rows:
            prompts.add(row["prompt"])
            asker = re.match(r"(\w+) asks\. ", row["prompt"])[1]
            askers.add(asker)
            value = eval(re.search(r"Compute ([\d +-]+)\.", row["prompt"])[1])
            unit = probe.UNIT_OF[asker]
            *lines, last = row["completion"].split("\n")
            assert last == f"#### {row['answer']}" and row["answer"] == f"{value} {unit}"
            assert 0 <= value < 100 and all(line.endswith(f" {unit}") for line in lines)
            assert not set(re.findall(r"\w+", row["prompt"])[1:]) & set(probe.UNIT_OF)
            assert unit not in re.findall(r"\w+", row["prompt"])
    assert len(prompts) == sum(probe.SPLITS.values()) and askers == set(probe.UNIT_OF)


def test_the_map_compares_with_the_adapter_and_with_as_many_parameters(capsys, tmp_path):
    file = "experiments/records/mini-2m-lora.jsonl.gz"
    study.main({"records": (str(study.ROOT / file),), "out": str(tmp_path)})
    line = capsys.readouterr().out.splitlines()[-1]
    assert "slots=8&width=64      15.50     1.85" in line  # 273,408 and 32,673 of 1,763,936
    assert "-0.01  -0.94 to +0.95" in line  # over more rank, as compare prints it in RESULTS.md
    assert (tmp_path / "map.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="as large as"):
        study.map_lines(str(study.ROOT / "experiments/records/mini-2m-dora.jsonl.gz"))
