"""talan.py's arithmetic held against tests/oracle.py: forward, every intermediate, gradients, causality, precision, memory."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import oracle  # noqa: E402
import talan  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from talan import AdapterConfig, AdapterLinear, SidePath, TalanConfig, attach  # noqa: E402

D, M, R = 5, 3, 4
every = pytest.mark.parametrize("mixer, writeback", list(itertools.product(talan.MIXERS, talan.WRITEBACKS)))


@pytest.fixture
def double(monkeypatch):
    """The code computes in float32 by `.float()`. Here that word means double, so the same lines can be held to 1e-9."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(mixer, writeback, seed=1, size=(D, M, R), **axes):
    """A float64 side path with nothing at its start: a zero w_out would hide every error."""
    path = SidePath(size[0], TalanConfig(slots=size[1], width=size[2], mixer=mixer, writeback=writeback, **axes), seed).double()
    for i, p in enumerate(path.parameters()):
        p.data = randn(*p.shape, seed=100 * seed + i) * (0.15 if p is path.w_out else 0.7)
    return path


def weights_of(path):
    return {name: p.detach().double().numpy() for name, p in path.named_parameters()}


def random_state(batch, size=(M, R), seed=5):
    return randn(batch, *size, seed=seed), randn(batch, size[0], seed=seed + 1).exp()


def truth(path, h, state=None, lengths=None, h_read=None, weights=None):
    c = path.config
    state = state and tuple(s.double().numpy() for s in state)
    return oracle.side_path(weights or weights_of(path), h.detach().double().numpy(), c.mixer, c.writeback, c.bound, state,
                            None if lengths is None else lengths.tolist(), h_read)


def close(found, wanted, tol, what=""):
    """|found - wanted| <= tol * max |wanted|, over the places where the oracle is defined (it is nan at pads)."""
    found, wanted = found.detach().double().numpy(), np.asarray(wanted)
    real = ~np.isnan(wanted)
    assert found.shape == wanted.shape and real.any(), what
    np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=tol * max(np.abs(wanted[real]).max(), 1e-30), err_msg=what)


# ------------------------------------------------------------------------------------------ forward
@every
@pytest.mark.parametrize("chunk", [4, 128])
def test_forward_equals_oracle(mixer, writeback, chunk, monkeypatch, double):
    monkeypatch.setattr(talan, "CHUNK", chunk)
    path = perturbed(mixer, writeback, bound=0.12)
    moved = []
    for T, with_state in itertools.product((1, 2, 4, 5, 2 * 4 + 3), (False, True)):
        h, state = randn(3, T, D, seed=T), random_state(3) if with_state else None
        for lengths in (None, torch.tensor([T, max(1, T - 2), 1])):
            want, want_state, inner = truth(path, h, state, lengths)
            found, found_state = path(h, state, lengths)
            close(found, want, 1e-10)
            assert found.isfinite().all() and found.dtype == h.dtype
            for a, b in zip(found_state, want_state):
                close(a, b, 1e-10)
            moved.append(np.abs(inner["delta"][:, 0]).max())
    assert min(moved) > 1e-2  # the comparison is about something
    if writeback == "bounded":  # and both sides of the minimum are seen
        ratio = np.linalg.norm(inner["delta"], axis=-1) / (0.12 * h.norm(dim=-1).numpy())
        assert (ratio > 1 - 1e-9).any() and (ratio < 0.99).any()


@every
def test_forward_in_float32_over_several_real_chunks(mixer, writeback):
    path = perturbed(mixer, writeback, size=(4, 2, 3))
    h, lengths = randn(1, 2 * talan.CHUNK + 5, 4), torch.tensor([2 * talan.CHUNK + 2])
    want, want_state, _ = truth(path, h, lengths=lengths)
    found, state = path.float()(h.float(), lengths=lengths)
    assert found.dtype == state[0].dtype == state[1].dtype == torch.float32
    close(found, want, 3e-6)
    for a, b in zip(state, want_state):
        close(a, b, 3e-6)


@every
def test_bfloat16_stream_is_computed_in_float32(mixer, writeback):
    """h' is the float32 result rounded once; the state stays float32."""
    path, h = perturbed(mixer, writeback).float(), randn(2, 6, D).bfloat16()
    want, want_state, _ = truth(path, h)
    found, state = path(h)
    assert found.dtype == torch.bfloat16 and state[0].dtype == state[1].dtype == torch.float32
    assert (found.double() - torch.tensor(want)).abs().max() <= 2 ** -8 * np.abs(want).max()
    close(state[0], want_state[0], 1e-5)
    assert (found != torch.tensor(want).bfloat16()).float().mean() < 0.05


@every
def test_every_intermediate_equals_oracle(mixer, writeback, double):
    path, h, state, lengths = perturbed(mixer, writeback), randn(2, 6, D), random_state(2), torch.tensor([6, 4])
    _, _, inner = truth(path, h, state, lengths)
    x = talan.rms(h)
    close(x, np.array([[oracle.rms(t) for t in row] for row in h.numpy()]), 1e-12)
    w, v = path.compress(x, lengths)
    close(w, np.exp(inner["e"]), 1e-10, "exp(e)")
    close(v, inner["v"], 1e-10, "v")
    assert (w[1, 4:] == 0).all() and inner["e"].shape == (2, 6, M)
    assert np.nanmax(np.abs(inner["e"])) <= math.sqrt(R)  # so that exp needs no running maximum
    y, num, den = path.read(x, w, v, *state)
    close(y, inner["y"], 1e-10, "y")
    z = torch.tensor(np.nan_to_num(inner["z"]))
    close(path.remix(z, x), inner["y"], 1e-10, "remix")
    close(path.write(torch.tensor(inner["y"]), x, h), inner["delta"], 1e-10, "delta")


@pytest.mark.parametrize("mixer", ["linear", "attention"])
def test_equal_slots_are_read_as_that_slot(mixer, double):
    """The softmax runs over slots: its weights sum to one there, so a mean of equal slots is that slot."""
    path, x, z = perturbed(mixer, "add"), talan.rms(randn(2, 4, D)), randn(2, 4, 1, R, seed=3)
    close(path.remix(z.expand(2, 4, M, R), x), z[:, :, 0].numpy(), 1e-10)


# ------------------------------------------------------------------------------------------ state
@every
def test_any_split_equals_one_pass(mixer, writeback, monkeypatch, double):
    monkeypatch.setattr(talan, "CHUNK", 4)
    path, T = perturbed(mixer, writeback), 13
    h = randn(2, T, D)
    want, want_state, _ = truth(path, h)
    rng = np.random.default_rng(0)
    for cuts in ([], list(range(1, T)), *(sorted(rng.choice(range(1, T), n, replace=False)) for n in (1, 2, 5))):
        state, parts = None, []
        for a, b in zip([0, *cuts], [*cuts, T]):
            part, state = path(h[:, a:b], state)
            parts.append(part)
        close(torch.cat(parts, 1), want, 1e-10, str(cuts))
        for a, b in zip(state, want_state):
            close(a, b, 1e-10)


@every
def test_memory_and_state_do_not_see_pads(mixer, writeback, monkeypatch, double):
    """trap 12: rows of unequal length, prefilled together, each go on from their own last token."""
    monkeypatch.setattr(talan, "CHUNK", 4)
    path, lengths, more = perturbed(mixer, writeback), torch.tensor([7, 1, 4, 0]), torch.tensor([2, 3, 0, 3])
    h, tail = randn(4, 7, D), randn(4, 3, D, seed=2)
    first, state = path(h, None, lengths)
    second, last = path(tail, state, more)
    assert first.isfinite().all() and second.isfinite().all()
    for b in range(4):
        row = torch.cat([h[b, :lengths[b]], tail[b, :more[b]]])[None]
        want, want_state, _ = truth(path, row)
        close(torch.cat([first[b, :lengths[b]], second[b, :more[b]]])[None], want, 1e-10, f"row {b}")
        close(last[0][b:b + 1], want_state[0], 1e-10)
        close(last[1][b:b + 1], want_state[1], 1e-10)
    loud = h.clone()
    for b, n in enumerate(lengths):
        loud[b, n:] = 1e4 * randn(7 - n, D, seed=9)
    again, state2 = path(loud, None, lengths)
    assert all(torch.equal(a, b) for a, b in zip(state, state2))
    assert all(torch.equal(first[b, :n], again[b, :n]) for b, n in enumerate(lengths))


@pytest.mark.parametrize("grad", [True, False])
def test_state_is_new_and_of_fixed_size(grad):
    """The incoming state is left as it was, and the outgoing one holds its own (B,M,r) only, not a whole chunk's memory."""
    path, h, state = perturbed("mlp", "gate").float(), randn(2, 9, D).float(), tuple(s.float() for s in random_state(2))
    before = [s.clone() for s in state]
    with torch.set_grad_enabled(grad):
        for lengths in (None, torch.tensor([0, 9])):
            _, after = path(h, state, lengths)
            assert all(torch.equal(a, b) for a, b in zip(before, state))
            assert [tuple(s.shape) for s in after] == [(2, M, R), (2, M)]
            assert [s.untyped_storage().nbytes() for s in after] == [4 * 2 * M * R, 4 * 2 * M]
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(after, state))


@every
def test_causality(mixer, writeback, monkeypatch):
    monkeypatch.setattr(talan, "CHUNK", 3)
    path, h = perturbed(mixer, writeback).float(), randn(1, 8, D).float()
    base, _ = path(h)
    for t in range(8):
        other = h.clone()
        other[:, t] += randn(D, seed=t + 20).float()
        found, _ = path(other)
        assert torch.equal(found[:, :t], base[:, :t])
        assert (found[:, t:] != base[:, t:]).any(-1).all()  # and every token from t on does see it


def test_wrong_shapes_are_refused():
    path, h = perturbed("linear", "add").float(), randn(2, 3, D).float()
    for bad in (h[0], h[..., :4], h[:, :0]):
        with pytest.raises(ValueError, match="expected h of shape"):
            path(bad)
    with pytest.raises(ValueError, match="(?s)expected state of shapes.*expected lengths of shape"):
        path(h, random_state(3), torch.tensor([1, 2, 3]))


# ------------------------------------------------------------------------------------------ gradients
SCALES = [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0), (0.0, 1.0)]


def oracle_gradients(path, h, state, lengths, G):
    """dL/dparameter and the side path's own dL/dh (what it reads, not the residual), L = sum G h', by central differences."""
    weights, read = weights_of(path), h.detach().double().numpy().copy()

    def loss():
        out = truth(path, h, state, lengths, h_read=read, weights=weights)[0]
        return float(np.nansum(G * out))

    def all_of(array):
        return np.array([oracle.central_difference(loss, array, i) for i in np.ndindex(array.shape)]).reshape(array.shape)

    weights = {name: w.copy() for name, w in weights.items()}
    return {name: all_of(w) for name, w in weights.items()} | {"h": all_of(read)}


@every
def test_gradients_equal_oracle_with_grad_scales(mixer, writeback, monkeypatch):
    """grad_scale multiplies every parameter's gradient and the trunk's share; trunk_grad_scale the trunk's share alone; 0 detaches."""
    monkeypatch.setattr(talan, "CHUNK", 2)
    h, state, lengths = randn(2, 4, D), random_state(2), torch.tensor([4, 2])
    G = randn(2, 4, D, seed=8).numpy() * np.array([[1, 1, 1, 1], [1, 1, 0, 0]])[..., None]
    base = perturbed(mixer, writeback, bound=0.12)
    want = oracle_gradients(base, h, state, lengths, G)
    for (gs, ts), (dtype, tol) in itertools.product(SCALES, ((torch.float64, 1e-6), (torch.float32, 2e-4))):
        with monkeypatch.context() as m:
            if dtype == torch.float64:
                m.setattr(torch.Tensor, "float", torch.Tensor.double)
            path = perturbed(mixer, writeback, bound=0.12, grad_scale=gs, trunk_grad_scale=ts).to(dtype)
            leaf = h.detach().clone().to(dtype).requires_grad_()
            (path(leaf, tuple(s.to(dtype) for s in state), lengths)[0] * torch.tensor(G, dtype=dtype)).sum().backward()
        for name, p in path.named_parameters():
            assert np.abs(want[name]).max() > 1e-4, name
            if gs == 0:
                assert p.grad is None or not p.grad.any()
            else:
                close(p.grad, gs * want[name], tol, f"{name} at {gs}, {ts}, {dtype}")
        share = leaf.grad.double() - torch.tensor(G)
        if gs * ts == 0:
            assert torch.equal(leaf.grad, torch.tensor(G, dtype=dtype))
        else:
            close(share, gs * ts * want["h"], 10 * tol, f"h at {gs}, {ts}, {dtype}")


@every
def test_gradients_of_two_calls_equal_those_of_one(mixer, writeback, monkeypatch, double):
    """The state carries gradient from one call, and from one chunk, to those before it."""
    h, grads = randn(2, 9, D), []
    for chunk, cuts in ((128, [0, 9]), (128, [0, 4, 9]), (2, [0, 9])):
        monkeypatch.setattr(talan, "CHUNK", chunk)
        path, leaf, state, parts = perturbed(mixer, writeback), h.clone().requires_grad_(), None, []
        for a, b in zip(cuts, cuts[1:]):
            part, state = path(leaf[:, a:b], state)
            parts.append(part)
        (torch.cat(parts, 1) * randn(2, 9, D, seed=4)).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in path.parameters())])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            close(b, a.numpy(), 1e-9)


def scaled(x, g):
    """scale_grad, written another way."""
    return x.detach() + g * (x - x.detach())


def composed(model, tokens, side):
    """The model's forward pass written out, with side(layer, site, h) called at its site."""
    ctx = model.context(tokens, None, None)
    h = model.model.embed_tokens(tokens)
    for layer, block in enumerate(model.model.layers):
        h = h + block.self_attn(block.input_layernorm(h), ctx)
        h = side(layer, "attention", h)
        h = h + block.mlp(block.post_attention_layernorm(h))
        h = side(layer, "block", h)
    return model.model.norm(h)


def small_model(layers=2):
    model = Transformer(ModelConfig("qwen3", 23, 8, 12, layers, 2, 1, 6))
    model.init_weights(0)
    for i, p in enumerate(model.parameters()):
        p.data = p.data + randn(*p.shape, seed=i) * 0.3
    return model.double()


@pytest.mark.parametrize("gs, ts", SCALES[:3])
@pytest.mark.parametrize("site", talan.SITES)
@pytest.mark.parametrize("layers, depth", [((0,), 1), ((1,), 2), ((0, 1), 2)])
@pytest.mark.parametrize("mixer, writeback", [("linear", "gate"), ("mlp", "bounded"), ("attention", "add")])
def test_sites_and_trunk_gradients_in_a_model(gs, ts, site, layers, depth, mixer, writeback, double):
    """The side path sits at its site of its layers only; with trunk_grad_scale 0 the layers below get no gradient from it."""
    tokens, model = torch.arange(12).reshape(2, 6) % 23, small_model(depth)
    attach(model, AdapterConfig("lora", 2), TalanConfig(layers, site, M, R, mixer, writeback, 0.1, gs, ts))
    model.double()
    for i, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.data = randn(*p.shape, seed=200 + i) * 0.4
    paths = {n: model.model.layers[n].side_path for n in layers}

    def by_oracle(layer, where, h):
        return torch.tensor(truth(paths[layer], h)[0]) if where == site and layer in layers else h

    def by_hand(layer, where, h):
        if where != site or layer not in layers:
            return h
        read = scaled(h, ts)
        return h + scaled(paths[layer](read)[0] - read, gs)

    G, out = randn(2, 6, 8, seed=3), model(tokens)
    with torch.no_grad():
        close(out, composed(model, tokens, by_oracle).numpy(), 1e-9)
        assert (out - composed(model, tokens, lambda layer, where, h: h)).abs().max() > 1e-3
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((out * G).sum(), trainable)
    for path in paths.values():
        path.config = dataclasses.replace(path.config, grad_scale=1.0, trunk_grad_scale=1.0)
    want = torch.autograd.grad((composed(model, tokens, by_hand) * G).sum(), trainable)
    for a, b in zip(found, want):
        close(a, b.numpy(), 1e-8)


# ------------------------------------------------------------------------------------------ precision and memory
@pytest.mark.parametrize("mixer", talan.MIXERS)
def test_float32_sums_over_16384_tokens(mixer, monkeypatch):
    """Relative 1e-4 against float64 after 16,384 tokens, whose scores reach the ends of [-sqrt(r), sqrt(r)]."""
    T, size = 16384, (8, 2, 16)
    path, h = perturbed(mixer, "add", size=size), randn(1, T, 8) + 1
    with monkeypatch.context() as m, torch.no_grad():
        m.setattr(torch.Tensor, "float", torch.Tensor.double)
        want, want_state = path(h)
    with torch.no_grad():
        found, state = path.float()(h.float())
    assert found.dtype == torch.float32
    delta, want_delta = found.double() - h.float().double(), want - h
    close(delta, want_delta.numpy(), 1e-4)
    for a, b in zip(state, want_state):
        assert ((a.double() - b).norm() / b.norm()) < 1e-4


@pytest.mark.parametrize("width", [1, 64, 4096])
@pytest.mark.parametrize("order", ["low first", "high first", "all high", "all low"])
def test_no_overflow_at_adversarial_inputs(width, order):
    """Keys along and against the slots: e = +-sqrt(r), exp(e) from 1.6e-28 to 6.2e27 at width 4096, after a million tokens at the top."""
    path = perturbed("attention", "gate", size=(4, 2, width)).float()
    u = torch.tensor([1.0, -1.0, 1.0, -1.0])  # rms 1
    with torch.no_grad():
        path.slots.copy_(torch.ones(2, width))
        path.w_key.copy_(torch.ones(width, 1) * u)  # w_key u = 4, w_key (-u) = -4
    n = 2 * talan.CHUNK + 10
    sign = {"low first": [-1] * (n // 2) + [1] * (n - n // 2), "high first": [1] * (n // 2) + [-1] * (n - n // 2),
            "all high": [1] * n, "all low": [-1] * n}[order]
    h = (torch.tensor(sign)[None, :, None] * u).float().requires_grad_()
    w, v = path.compress(talan.rms(h), None)
    e = w.detach().log()
    assert torch.allclose(e.abs(), torch.full_like(e, math.sqrt(width)), rtol=1e-4)
    state = None
    if order == "high first":
        past = 1e6 * math.exp(math.sqrt(width))
        state = (past * v[:, :1].detach().expand(1, 2, width), torch.full((1, 2), past))
    out, after = path(h, state)
    out.square().sum().backward()
    assert out.isfinite().all() and all(s.isfinite().all() for s in after) and h.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in path.parameters())
    path.double()  # the truth in float64: the slots are equal, so y_t is the one memory z_t, and e_t is sign_t sqrt(r)
    x = talan.rms(h.detach().double())
    mass = torch.tensor(sign, dtype=torch.float64).mul(math.sqrt(width)).exp()[:, None]
    values = mass * (x[0] @ path.w_value.T)
    num, den = values.cumsum(0) + (state[0][0, 0] if state else 0), mass.cumsum(0) + (state[1][0, 0] if state else 0)
    delta = torch.sigmoid(x[0] @ path.w_gate + path.b_gate)[:, None] * (num / den @ path.w_out.T)
    close((out.double() - h)[0], delta.detach().numpy(), 1e-3)
    close(after[0][0, 1] / after[1][0, 1], (num / den)[-1].detach().numpy(), 1e-3)


@every
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-6, 1e6, 1e15])
def test_streams_of_any_size_stay_finite(mixer, writeback, size):
    path, h = perturbed(mixer, writeback).float(), (size * randn(2, 6, D)).float().requires_grad_()
    out, state = path(h)
    (out / max(size, 1)).sum().backward()
    assert out.isfinite().all() and state[0].isfinite().all() and h.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in path.parameters())


def saved_for_backward(path, h):
    """(total bytes, largest bytes) of the distinct storages that autograd keeps for backward, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in path.parameters()}, {}

    def pack(tensor):
        store = tensor.untyped_storage()
        if store.data_ptr() not in own:
            kept[store.data_ptr()] = store  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = path(h)
    sizes = [s.nbytes() for s in kept.values()]
    out.sum().backward()
    return sum(sizes), max(sizes)


@pytest.mark.parametrize("mixer, writeback", [("linear", "add"), ("mlp", "gate"), ("attention", "bounded")])
def test_backward_keeps_no_memory_tensor(mixer, writeback):
    """Nothing of size T*M*r is kept for backward: per token only D, M and r long vectors, per chunk the state (M,r)."""
    rows = []
    for T, slots, width in ((512, 8, 16), (1024, 8, 16), (1024, 32, 16), (1024, 32, 64), (2048, 32, 64)):
        path = perturbed(mixer, writeback, size=(16, slots, width)).float()
        total, largest = saved_for_backward(path, randn(1, T, 16).float().requires_grad_())
        chunks, memory = math.ceil(T / talan.CHUNK), 4 * T * slots * width
        rows.append(f"{mixer:9} {writeback:8} {T:6} {slots:3} {width:3} {total:10,} {largest:9,} {memory:11,} {total / memory:7.3f}")
        per_token, per_chunk = 4 * T * (8 * 16 + 3 * slots + 4 * width), 4 * chunks * (slots * width + slots)
        assert total <= per_token + per_chunk + 16 * (slots * width), rows[-1]
        if slots * width > 1000:
            assert largest < memory / chunks, rows[-1]  # not even one chunk's memory
    assert total < memory / 5
    print("\nmixer     writeback     T   M   r      saved   largest   T*M*r*4   ratio\n" + "\n".join(rows))  # pytest -s shows it


# ------------------------------------------------------------------------------------------ adapters
def adapter_linear(kind, dropout=0.0, alpha=6.0, seed=0, out=7, cols=5, rank=3):
    base = torch.nn.Linear(cols, out, bias=False, dtype=torch.float64)
    base.weight.data = randn(out, cols, seed=seed)
    layer = AdapterLinear(base, AdapterConfig(kind, rank, alpha, dropout), seed, "x").double()
    base.weight.requires_grad_(False)
    for i, p in enumerate(p for p in layer.parameters() if p.requires_grad):
        p.data = p.data + randn(*p.shape, seed=30 + i) * 0.5
    return layer


def adapter_truth(layer, kind, x, mask, arrays, gain=None):
    rank, alpha = 3, 6.0
    w = layer.weight.numpy()
    if kind == "dora":
        return oracle.dora_linear(w, arrays["lora_A"], arrays["lora_B"], arrays["lora_magnitude_vector"], x, alpha, rank, mask, gain)
    return oracle.lora_linear(w, arrays["lora_A"], arrays["lora_B"], x, alpha, rank, kind == "rslora", mask)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_adapter_forward_and_gradients_equal_oracle(kind, dropout, monkeypatch, double):
    """The formulas with an arbitrary dropout mask; the DoRA norm is a constant of the graph (its gradient would fail here)."""
    layer = adapter_linear(kind, dropout).train()
    x, G = randn(4, 5, seed=1), randn(4, 7, seed=2)
    mask = torch.tensor(np.random.default_rng(0).random((4, 5)) > dropout) / (1 - dropout) if dropout else None
    monkeypatch.setattr(talan.F, "dropout", lambda t, p, training: t * mask if training and p else t)
    arrays = {n: p.detach().numpy().copy() for n, p in layer.named_parameters() if n != "weight"} | {"x": x.numpy().copy()}
    m = None if mask is None else mask.numpy()
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    close(out, adapter_truth(layer, kind, arrays["x"], m, arrays), 1e-10)
    close(layer.eval()(x), adapter_truth(layer, kind, arrays["x"], None, arrays), 1e-10)  # eval: no dropout, the simple form
    gain = None
    if kind == "dora":
        gain = oracle.dora_gain(layer.weight.numpy(), arrays["lora_A"], arrays["lora_B"], arrays["lora_magnitude_vector"], 2.0)
        close(layer.gain(), gain, 1e-10)
        close(layer.row_norm(), np.linalg.norm(oracle.merged_rows(layer.weight.numpy(), arrays["lora_A"], arrays["lora_B"], 2.0), axis=1), 1e-10)
    (out * G).sum().backward()
    start = arrays["lora_magnitude_vector"].copy() if kind == "dora" else None

    def loss():
        g = gain * arrays["lora_magnitude_vector"] / start if kind == "dora" else None  # m moves, the norm does not
        return float((G.numpy() * adapter_truth(layer, kind, arrays["x"], m, arrays, g)).sum())

    grads = {n: p.grad for n, p in layer.named_parameters() if n != "weight"} | {"x": leaf.grad}
    for name, grad in grads.items():
        want = np.array([oracle.central_difference(loss, arrays[name], i) for i in np.ndindex(arrays[name].shape)])
        close(grad, want.reshape(arrays[name].shape), 1e-6, name)


@pytest.mark.parametrize("kind, s", [("lora", 2.0), ("rslora", 6 / math.sqrt(3)), ("dora", 2.0)])
def test_merged_weight_equals_oracle(kind, s, double):
    layer = adapter_linear(kind)
    a, b, w = layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy(), layer.weight.numpy()
    gain = oracle.dora_gain(w, a, b, layer.lora_magnitude_vector.detach().numpy(), s)[:, None] if kind == "dora" else 1.0
    close(layer.merged_weight(), gain * oracle.merged_rows(w, a, b, s), 1e-10)
    assert layer.scale == pytest.approx(s)
