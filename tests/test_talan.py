"""The side path against tests/golden/reference.py in float64, its config, and `attach`.

Shapes: B rows, T tokens, D hidden size, M slots, r memory width.
"""

import dataclasses
import json
import math
import re
from itertools import product

import pytest
import torch
from golden import reference

import talan
from model import load_model
from talan import MIXERS, WRITEBACKS, AdapterConfig, SidePath, TalanConfig, attach

every = pytest.mark.parametrize("mixer, writeback", [*product(MIXERS, WRITEBACKS)])
TOKENS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
LORA, SIDE = AdapterConfig("lora", 4, 8.0), TalanConfig((1,), slots=3, width=4)
MLP = dataclasses.replace(SIDE, mixer="mlp")


@pytest.fixture
def double(monkeypatch):
    """The code computes in float32 by `.float()`; here that means double, to hold it to 1e-10."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path_of(mixer, writeback="add", D=5, M=3, r=4, **axes):
    """A float64 side path with nothing at its start: a zero w_out would hide every error."""
    path = SidePath(D, TalanConfig(slots=M, width=r, mixer=mixer, writeback=writeback, **axes))
    for seed, p in enumerate(path.double().parameters(), 100):
        p.data = randn(*p.shape, seed=seed) * (1.5 / math.sqrt(p.shape[-1]) if p.dim() == 2 else 1)
    path.w_out.data *= 0.2
    return path


def truth(path, h, state=None, lengths=None):
    """reference.side_path, differentiable, of each row's real tokens: a list of its dicts."""
    weights, rows = {name: p.double() for name, p in path.named_parameters()}, []
    for b, real in enumerate(h.double()):
        real = real if lengths is None else real[: lengths[b]]
        sums = [s[b].double() for s in state or ()]
        rows.append(reference.side_path(weights, dataclasses.asdict(path.config), real, *sums))
    return rows


def close(found, wanted, tolerance, what=""):
    """|found - wanted| <= tolerance * (max |wanted| + 0.001)."""
    error, largest = (found.double() - wanted.double()).abs().max(), wanted.abs().max()
    assert found.shape == wanted.shape and error <= tolerance * (largest + 1e-3), (what, error)


def snapshot(module):
    return {n: (id(p), p.requires_grad, p.sum().item()) for n, p in module.named_parameters()}


def refused(words, call, module, *args):
    """call(module, *args) raises ValueError, which the words fit, and changes nothing."""
    before = snapshot(module)
    with pytest.raises(ValueError, match=words):
        call(module, *args)
    assert snapshot(module) == before


def compare(found, sums, rows, tolerance):
    """h' and state against the reference's rows; returns ours and the reference's as lists."""
    ours, theirs = [], []
    for b, row in enumerate(rows):
        ours += [found[b, : len(row["y"])], sums[0][b], sums[1][b]]
        theirs += [row["h_out"], row["num"], row["den"]]
    for a, b in zip(ours, theirs):
        close(a, b, tolerance)
    return ours, theirs


def same_gradients(found, wanted, leaves, tolerance):
    """sum(G y) over the outputs y found, and over those wanted: by each leaf the same gradient."""
    gradients, options = [], {"allow_unused": True, "materialize_grads": True}
    for outputs in (found, wanted):
        loss = sum((randn(*y.shape, seed=8) * y).sum() for y in outputs)
        gradients.append(torch.autograd.grad(loss, list(leaves.values()), **options))
    for name, a, b in zip(leaves, *gradients):
        close(a, b, tolerance, name)


INPUTS = [(1, False, None), (4, True, None), (11, False, [11, 8, 1]), (11, True, [4, 11, 9])]
SCALES = [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0), (0.0, 1.0)]  # grad_scale, trunk_grad_scale


@every
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("chunk", [4, 128])
def test_forward_and_gradients(mixer, writeback, scales, chunk, double, monkeypatch):
    """Chunks recomputed in backward, or one pass: h', state and gradients are the reference's."""
    if chunk == 4:  # deterministic mode: the running sum is a product with a triangle of ones
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        monkeypatch.setattr(torch.Tensor, "cumsum", None)
    monkeypatch.setattr(talan, "CHUNK", chunk)
    path = path_of(mixer, writeback, bound=0.12, grad_scale=scales[0], trunk_grad_scale=scales[1])
    for T, has_state, lengths in INPUTS:
        leaves = {"h": randn(3, T, 5, seed=T), "num": randn(3, 3, 4), "den": randn(3, 3).exp()}
        h, *state = (tensor.requires_grad_() for tensor in leaves.values())
        state, lengths = tuple(state) if has_state else None, lengths and torch.tensor(lengths)
        rows, (found, sums) = truth(path, h, state, lengths), path(h, state, lengths)
        both = compare(found, sums, rows, 1e-10)
        assert found.isfinite().all() and min(row["delta"].abs().max() for row in rows) > 1e-2
        same_gradients(*both, leaves | dict(path.named_parameters()), 1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 0.0, 1e-6, 1e4])
def test_float32_inside_whatever_the_dtype_of_h(mixer, writeback, dtype, size):
    """h' is the float32 result, rounded once; that is right to 1e-5; all gradients are finite."""
    path, h = path_of(mixer, writeback).float(), (size * randn(2, 6, 5)).to(dtype).requires_grad_()
    (found, sums), (want, state) = path(h), path(h.float())
    assert found.dtype == dtype and torch.equal(found, want.to(dtype))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(sums, state))
    compare(want, state, truth(path, h) if size else (), 1e-5)  # at 0 the reference has 0 / 0
    want.sum().backward()
    assert all(p.grad.isfinite().all() for p in (h, *path.parameters()))


@every
@pytest.mark.parametrize("cuts", [(5,), (1, 2), (3, 4, 9), tuple(range(1, 11))], ids=str)
def test_any_split_of_ragged_rows(mixer, writeback, cuts, double, monkeypatch):
    """Each row continues from its own last token, also after a call without one; no pad is seen."""
    monkeypatch.setattr(talan, "CHUNK", 4)
    path, lengths, results = path_of(mixer, writeback), torch.tensor([11, 7, 1]), []
    h, pads = randn(3, 11, 5), torch.arange(11) >= lengths[:, None]
    for loud in (1e4, -3.0):
        h[pads] = loud
        state, parts = None, []
        for begin, end in zip((0, *cuts), (*cuts, 11)):
            real = (lengths - begin).clamp(0, end - begin)
            part, state = path(h[:, begin:end], state, real)
            parts.append(part)
        found = torch.cat(parts, 1)
        compare(found, state, truth(path, h, None, lengths), 1e-10)
        assert state[0].untyped_storage().nbytes() == 8 * 3 * 3 * 4  # not a chunk's memory
        results.append([*state, found[~pads]])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every
def test_no_token_sees_a_later_one(mixer, writeback, monkeypatch):
    """The gradient of h'_t by any later h is exactly 0, by every earlier one it is not."""
    monkeypatch.setattr(talan, "CHUNK", 3)
    path, h = path_of(mixer, writeback).float(), randn(1, 8, 5).float().requires_grad_()
    out, _ = path(h)
    for t in range(8):
        (grad,) = torch.autograd.grad(out[0, t].sum(), h, retain_graph=True)
        assert not grad[0, t + 1 :].any() and grad[0, : t + 1].any(-1).all()


@pytest.mark.parametrize("mixer, writeback", [*zip(MIXERS, WRITEBACKS)])
def test_backward_keeps_no_memory_tensor(mixer, writeback):
    """No (B,T,M,r): vectors of D, M and r per token, and the state (M,r) per chunk."""
    T, D, M, r, kept = 2048, 16, 32, 64, {}
    path = path_of(mixer, writeback, D, M, r).float()

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.detach):
        path(randn(1, T, D).float().requires_grad_())
    sizes = [storage.nbytes() // 4 for storage in kept.values()]  # the weights among them
    rest = sum(p.numel() for p in path.parameters()) + (T // talan.CHUNK + 4) * (M * r + M)
    assert sum(sizes) <= T * (8 * D + 3 * M + 4 * r) + rest < T * M * r / 3
    assert max(sizes) < talan.CHUNK * M * r


LONG = [*product(MIXERS, (64,), ("random", "aligned", "first"))]
LONG += [("linear", 1024, "aligned"), ("attention", 1024, "first")]


@pytest.mark.parametrize("mixer, r, keys", LONG)
def test_sums_over_16384_tokens(mixer, r, keys):
    """Each token's delta is within 1e-4 of its largest in float64; the worst error seen is 1.3e-5.

    Keys are random; along one slot and against the other (e = +-sqrt(r)); or first so, then not.
    """
    path, h = path_of(mixer, "add", 48, 2, r).float(), randn(1, 16384, 48)
    if keys != "random":
        h = 1e-3 * h + h[:, :1]  # all near one token, whose key the slots are made of
        key = path.w_key.detach() @ talan.rms(h[0, 0].float())
        path.slots.data = torch.stack([key, -key])
        h[:, 1:] *= -1 if keys == "first" else 1
    h, state, worst = h.float(), None, 0.0
    with torch.no_grad():
        found, sums = path(h)
        for n in range(0, 16384, 256):
            (row,) = truth(path, h[:, n : n + 256], state)
            state = row["num"][None], row["den"][None]
            error = ((found - h)[0, n : n + 256] - row["delta"]).abs().amax(-1)
            worst = max(worst, (error / row["delta"].abs().amax(-1)).max().item())
    assert worst < 1e-4, worst
    assert keys == "random" or row["e"].abs().min() > 0.98 * math.sqrt(r)
    close(sums[1], state[1], 1e-4)


def test_wrong_shapes_are_refused():
    path, h, num, den = path_of("linear"), randn(2, 3, 5), randn(2, 3, 4), randn(2, 3)
    wrong = [(h[0],), (h[..., :4],), (h[:, :, None],), (h, None, den[0]), (h, None, den[:, :1])]
    states = (num[:1], den[:1]), (num[:, :2], den), (num[..., :3], den), (num, den[:1])
    for inputs in [*wrong, *((h, state) for state in states)]:
        refused(r"side path: expected h \(B,T,5\)", SidePath.__call__, path, *inputs)


@every
def test_a_side_path_by_itself(mixer, writeback):
    """Without `attach`: the names, starts normal(0, 1 / sqrt(fan_in)) or zero, and h' = h."""
    config = TalanConfig(slots=40, width=50, mixer=mixer, writeback=writeback)
    path, h = SidePath(48, config), randn(2, 7, 48).float()
    named, want = dict(path.named_parameters()), reference.side_names(dataclasses.asdict(config))
    assert named.keys() == set(want) and torch.equal(path(h)[0], h)
    for name, p in named.items():
        if name.endswith("_out") or "gate" in name:
            assert (p == (-1 if name == "b_gate" else 0)).all(), name
        else:
            assert abs(p.std() * math.sqrt(p.shape[1]) - 1) < 0.1, name


@pytest.mark.parametrize("clip, eps, cancels", [(1e9, 0, True), (9, 0, False), (1e9, 1e-2, False)])
def test_under_adam_grad_scale_cancels_but_for_clipping_and_eps(clip, eps, cancels, double):
    """As scale_grad's docstring says, where 0 detaches; at scale 1 no norm reaches the limit."""
    assert not talan.scale_grad(torch.ones(1, requires_grad=True), 0).requires_grad
    ends = []
    for grad_scale in (1.0, 1024.0):
        path = path_of("mlp", "gate", grad_scale=grad_scale)
        optimizer = torch.optim.Adam(path.parameters(), lr=1e-2, eps=eps)
        for step, size in enumerate((0.1, 0.3, 0.2)):
            optimizer.zero_grad()
            (size * randn(2, 6, 5, seed=step) * path(randn(2, 6, 5))[0]).sum().backward()
            assert torch.nn.utils.clip_grad_norm_(path.parameters(), clip) < 9 * grad_scale
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(path.parameters()))
    moved = (ends[0] - ends[1]).abs().max()
    assert moved < 1e-9 if cancels else moved > 1e-4


NAN, INF = math.nan, math.inf
BAD = {"site": ["mlp", "", None], "mixer": ["conv", None], "writeback": ["replace", "Add"]}
BAD |= {"slots": [0, -1, 4097], "width": [0, -4, 1 << 20], "bound": [0.0, -0.1, NAN, INF]}
BAD |= {"grad_scale": [-1.0, NAN, INF], "trunk_grad_scale": [-0.5, NAN, INF]}
BAD |= {"layers": [(), (-1,), (-0.5,), (1, -1), (NAN,)]}
BAD_ADAPTER = {"kind": ["loha", "LoRA", None], "rank": [0, -4], "alpha": [0, -1.0, NAN, INF]}
BAD_ADAPTER |= {"dropout": [-0.1, 1.0, NAN], "targets": [(), ("wq",), ("q_proj", "lm_head")]}
LAYERS = [((0.5,), 3, (1,)), ((0.5,), 28, (14,)), ((0.75,), 4, (3,)), ([1], 2, (1,))]
LAYERS += [((7, 14, 21), 28, (7, 14, 21)), ((0.0, 0.99), 4, (0, 3))]
TOO_DEEP = [((3,), 3), ((1.0,), 3), ((1, 1), 3), ((0.4, 0.5), 3), ((0, 9), 9)]


def test_configs_say_what_exists_and_what_does_not():
    for kind, table in ((TalanConfig, BAD), (AdapterConfig, BAD_ADAPTER)):
        for name, value in [(field, value) for field in table for value in table[field]]:
            with pytest.raises(ValueError, match=f"no such value: .*{name}="):
                kind(**{name: value})
    for layers, depth, want in LAYERS:
        assert TalanConfig(layers).resolve(depth) == want
    for layers, depth in TOO_DEEP:
        with pytest.raises(ValueError, match=f"distinct ones below {depth}"):
            TalanConfig(layers).resolve(depth)
    for targets in ("all", ("all",), ("q_proj", "all"), talan.TARGETS[::-1]):
        assert AdapterConfig(targets=targets).targets == talan.TARGETS
    assert [AdapterConfig(kind, 4, 8).scale for kind in ("lora", "rslora", "dora")] == [2, 4, 2]


def stir(model, size=0.3, groups=("adapter", "side path")):
    """Move what was attached away from its start, each tensor by numbers of its own."""
    for name, p in model.named_parameters():
        if talan.group_of(name) in groups:
            p.data += size * torch.randn(p.shape, generator=talan.generator("stir", name))
    return model


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS)).float()


def loss_of(logits):
    """Cross-entropy of TOKENS, each from the logits before it."""
    logits, targets = logits[:, :-1].float().flatten(0, 1), TOKENS[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets)


def attached(model):
    return {n: p for n, p in model.named_parameters() if talan.group_of(n) != "backbone"}


WHOLE = [("lora", TalanConfig((0,), "block", 3, 4, "linear", "gate"))]
WHOLE += [("dora", TalanConfig((0, 2), "attention", 3, 4, "mlp", "bounded", 0.1, 0.5, 3.0))]
WHOLE += [("rslora", TalanConfig((1, 2), "block", 3, 4, "attention", "add", 0.1, 2.0, 0.0))]
WHOLE += [("none", TalanConfig((0.5,), "attention", 3, 4, "linear", "bounded", 0.05, 1.0, 0.5))]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("kind, side", WHOLE, ids=str)
def test_a_model_with_adapter_and_side_path(tiny_checkpoint, family, kind, side, double):
    """Logits and every weight's gradient are the reference's: the path sits at its site alone."""
    model = load_model(tiny_checkpoint(family))
    attach(model, AdapterConfig(kind, 4, 7.0), side, "full")
    weights = {}
    for name, p in stir(model).double().named_parameters():
        theirs = talan.peft_name(name) if ".lora_" in name else name.replace(".linear.", ".")
        weights[theirs] = p
    raw = json.loads((model.folder / "config.json").read_text())
    side = dataclasses.asdict(side) | {"layers": side.resolve(3)}
    adapter = {"kind": kind, "rank": 4, "alpha": 7.0} if kind != "none" else None
    rows = [reference.forward(weights, raw, row, adapter, side)[0] for row in TOKENS.tolist()]
    found, want = model.logits(model(TOKENS)), torch.stack([row["logits"] for row in rows])
    close(found, want, 1e-6)
    same_gradients([found], [want], weights, 1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_matched_adapter_bit_for_bit(tiny_checkpoint, mixer, writeback, dtype):
    """The same logits and adapter gradients with and without the side path, which can learn."""
    for site, kind in (("block", "lora"), ("attention", "dora")):
        side, found = TalanConfig((1,), site, 3, 4, mixer, writeback), []
        for talan_config in (None, side):
            model = load_model(tiny_checkpoint("qwen3"), dtype=dtype)
            attach(model, AdapterConfig(kind, 4), talan_config)
            y = stir(model, groups=("adapter",)).logits(model(TOKENS))
            loss_of(y).backward()
            found.append({n: p.grad for n, p in attached(model).items()} | {"": logits(model)})
        without, both = found
        assert all(g.any() and torch.equal(g, both.pop(name)) for name, g in without.items())
        assert all(g.any() == name.endswith("w_out") for name, g in both.items()) and both


def test_starts_depend_on_seed_and_name_alone(tiny_checkpoint):
    """Other targets, another kind, a side path, a scope, other layers, a dtype: no draw moves."""

    def starts(*args, dtype=None, **options):
        model, state = load_model(tiny_checkpoint("qwen3"), dtype=dtype), torch.get_rng_state()
        attach(model, *args, **options)
        assert torch.equal(state, torch.get_rng_state())  # no global generator is drawn from
        return {name: p.detach().clone() for name, p in attached(model).items()}

    side = dataclasses.replace(MLP, layers=(0, 1, 2))
    whole = starts(AdapterConfig("dora", 4), side)
    others = [
        starts(AdapterConfig("lora", 4, 1.0, 0.5, ("k_proj",))),
        starts(AdapterConfig("rslora", 4), dataclasses.replace(MLP, site="attention"), "full"),
        starts(None, TalanConfig((2,), slots=3, width=4, writeback="add")),
        starts(LORA, MLP, "talan", dtype=torch.bfloat16),
    ]
    for other in others:
        assert other and all(torch.equal(start, whole[name]) for name, start in other.items())
    fixed = ("lora_B", "magnitude_vector", "_out", "w_gate", "b_gate")
    for name, start in starts(AdapterConfig("dora", 4), side, seed=1).items():
        assert torch.equal(start, whole[name]) == name.endswith(fixed), name
    drawn = [p.flatten()[:12].argsort() for n, p in whole.items() if not n.endswith(fixed)]
    assert len(torch.stack(drawn).unique(dim=0)) == len(drawn)  # no two share a stream
    for A in (p for name, p in whole.items() if name.endswith("lora_A")):
        assert 0.9 < A.abs().max() * math.sqrt(A.shape[1]) <= 1 and A.mean().abs() < 0.03


@pytest.mark.parametrize("grad_scale", [1.0, 0.0])
@pytest.mark.parametrize("scope", talan.SCOPES)
def test_a_scope_trains_exactly_its_tensors(tiny_checkpoint, scope, grad_scale):
    """The others get no gradient; grad_scale 0 trains nothing of the side path."""
    args = AdapterConfig("dora", 4), dataclasses.replace(MLP, grad_scale=grad_scale), scope
    model = load_model(tiny_checkpoint("qwen3"))
    if scope == "talan" and not grad_scale:
        refused("with a part that learns", attach, model, *args)
        return
    trainable = attach(model, *args)
    named = dict(stir(model).named_parameters())
    adapter = {name for name in named if ".lora_" in name}
    path = {name for name in named if ".side_path." in name and grad_scale}
    written = {name for name in path if name.endswith(("w_out", "w_gate", "b_gate"))}
    rest = {name for name in named if ".side_path." not in name}
    sets = {"joint": adapter | path, "adapter": adapter, "talan": path}
    sets |= {"writeback": adapter | written, "full": rest | path}
    assert {name for name, p in named.items() if p.requires_grad} == sets[scope]
    assert [id(p) for p in trainable] == [id(p) for p in named.values() if p.requires_grad]
    loss_of(model.logits(model(TOKENS))).backward()
    assert {n for n, p in named.items() if p.grad is not None and p.grad.any()} == sets[scope]


NONE, STILL = AdapterConfig("none"), dataclasses.replace(SIDE, grad_scale=0.0)
REFUSED = [("scope 'all'", LORA, SIDE, "all"), ("scope 'joint': .*a part that learns", None, None)]
REFUSED += [("'joint'", None, STILL), ("'adapter'", NONE, SIDE, "adapter")]
REFUSED += [("'talan'", LORA, None, "talan"), ("'writeback'", None, STILL, "writeback")]
REFUSED += [("writeback: expected a side path", LORA, None, "writeback")]
REFUSED += [("rank: expected at most", AdapterConfig("lora", 49), None)]
REFUSED += [("layers: expected distinct ones below 3", LORA, TalanConfig((1, 3)))]


def test_what_cannot_be_attached(tiny_checkpoint):
    """Nor can anything to a model that has something attached."""
    model = load_model(tiny_checkpoint("qwen3"))
    for words, *args in REFUSED:
        refused(words, attach, model, *args)
    attach(model, LORA, SIDE)
    for args in ((LORA, None), (None, SIDE), (None, None, "full")):
        refused("already", attach, model, *args)


def test_the_report_counts_what_trains(tiny_checkpoint):
    model = load_model(tiny_checkpoint("qwen3"))
    backbone = sum(p.numel() for p in model.parameters())
    attach(model, AdapterConfig("dora", 4, targets=("q_proj", "down_proj")), MLP, "full")
    adapter = 3 * (4 * 48 + 64 * 4 + 64 + 4 * 80 + 48 * 4 + 48)
    path = 3 * 4 + 2 * 4 * 48 + 3 * 48 + 2 * (6 * 3) + 2 * (8 * 4) + 48 * 4 + 48 + 1
    counts = adapter, path, backbone, adapter + path + backbone
    a, b, c, d = (f"{n} {100 * n / backbone:.3f}" for n in counts)
    found = re.findall(r"[\d.]+", talan.report(model).replace(",", ""))
    assert " ".join(found) == f"18 {a} 11 {b} 36 {c} {d} {backbone}"
    attach(model := load_model(model.folder), LORA)
    assert [line.split()[1] for line in talan.report(model).split("\n")] == ["adapter", "total"]
