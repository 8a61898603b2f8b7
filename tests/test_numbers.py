"""Numbers that are not finite stop a run before they reach the weights, and the side path's long sums keep their digits."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_train  # noqa: E402
import train  # noqa: E402
from model import generator, load_model  # noqa: E402
from talan import MIXERS, SidePath, TalanConfig, load_adapter, running_sum  # noqa: E402

tiny, signals = test_train.tiny, test_train.signals
RUN = {"steps": 6, "save_every": 3, "eval_every": 0, "dropout": 0.1, "step_tokens": 1000, "micro_tokens": 300}
BAD = "model.layers.0.self_attn.v_proj.lora_B"


# ---------------------------------------------------------------- a step that is not finite


def poison(monkeypatch, step, what, value):
    """Let `step` meet this value, in the loss of its second micro-batch or in one element of one gradient."""
    seen, loss_sum, total_norm = [0], train.loss_sum, torch.nn.utils.get_total_norm
    rate = train.learning_rate

    def spoilt_loss(model, batch, weight):
        loss = loss_sum(model, batch, weight)
        if torch.is_grad_enabled() and seen[0] == step - 1 and what == "loss":
            return loss * value
        return loss

    def spoilt_norm(gradients):
        if seen[0] == step - 1 and what == "gradient":
            gradients[3].view(-1)[1] = value
        return total_norm(gradients)

    def count(*args):  # asked for the rate: the step is taken
        seen[0] += 1
        return rate(*args)

    for owner, name, call in ((train, "loss_sum", spoilt_loss), (torch.nn.utils, "get_total_norm", spoilt_norm), (train, "learning_rate", count)):
        monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return test_train.start(tiny, tmp_path_factory.mktemp("numbers") / "run", **RUN)


@pytest.mark.parametrize("what, value", [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan), ("gradient", -math.inf),
                                         ("gradient", 1e30)])  # whose square is infinite
def test_a_step_that_is_not_finite_changes_nothing_and_is_kept(tiny, tmp_path, monkeypatch, whole, what, value):
    run, folder = tmp_path / "run", tmp_path / "run/nonfinite-step-0000004"
    before, save = {}, train.save_checkpoint

    def save_and_read(run, step, *args):
        save(run, step, *args)
        before.update(test_train.contents(run / f"step-{step:07d}"))

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_read)
        poison(patch, 4, what, value)
        with pytest.raises(ValueError, match=r"^step 4: loss .*, gradient norm .*nonfinite-step-0000004"):
            test_train.start(tiny, run, **RUN)
    assert [path.name for path in sorted(run.iterdir()) if path.is_dir()] == [folder.name, "step-0000003"]
    assert test_train.contents(run / "step-0000003") == before
    assert test_train.metrics(run) == test_train.metrics(whole)[:-4]  # steps 4 to 6 and the last held-out loss are not there
    check_kept(tiny, folder, what, value)
    test_train.start(tiny, run, resume=True, **RUN)  # what was wrong has passed
    assert test_train.metrics(run) == test_train.metrics(whole)
    test_train.assert_same_weights(run, whole)


def check_kept(tiny, folder, what, value):
    """step.json names the rows of step 4 with their ids and losses; gradients.safetensors holds the spoilt tensors, unclipped."""
    info, gradients = json.loads((folder / "step.json").read_text()), load_file(folder / "gradients.safetensors")
    settings = train.Settings(**test_train.flags(tiny, "", **RUN))
    rows = train.split_dev(train.load_rows((tiny.rows,), tiny.tokenizer, settings)[0], settings)[0]
    plan = train.plan_steps([row.width for row in rows], settings, settings.micro_tokens)
    micros = [next(plan) for _ in range(4)][3]
    assert [(r["row"], r["ids"]) for r in info["rows"]] == [(n, rows[n].ids) for micro in micros for n in micro] and len(micros) > 1
    assert info["step"] == 4 and info["gradients"] == sorted(gradients) and not all(math.isfinite(float(info[k])) for k in ("loss", "grad_norm"))
    model = load_model(tiny.model)
    load_adapter(model, folder.parent)  # of step 3
    losses = [float(r["loss"]) for r in info["rows"]]
    assert losses == pytest.approx([test_train.slow_loss(model.eval(), [rows[r["row"]]]) for r in info["rows"]], rel=1e-5)
    if what == "loss":
        assert len(gradients) > 10 and not math.isfinite(float(info["loss"]))
    else:
        (tensor,), finite = gradients.values(), math.isfinite(float(info["loss"]))
        assert finite and torch.equal(tensor.view(-1)[1:2].nan_to_num(7.0), torch.tensor([value]).nan_to_num(7.0))
        assert tensor.isfinite().sum() >= tensor.numel() - 1 and tensor.view(-1)[2:].abs().max() < 1e3  # not clipped by a norm of inf or nan


def test_weights_that_are_not_finite_stop_the_first_step(tiny, tmp_path, monkeypatch):
    """Every tensor that the error reaches is named, and each row's own loss."""
    build = train.build_model

    def broken(*args):
        model = build(*args)
        model.get_parameter("model.layers.1.mlp.up_proj.lora_B").data[3, 1] = math.nan
        return model

    monkeypatch.setattr(train, "build_model", broken)
    with pytest.raises(ValueError, match="step 1: loss nan, gradient norm nan"):
        test_train.start(tiny, tmp_path / "run", **RUN)
    info = json.loads((tmp_path / "run/nonfinite-step-0000001/step.json").read_text())
    assert {r["loss"] for r in info["rows"]} == {"nan"} and "model.layers.1.mlp.up_proj.lora_B" in info["gradients"]
    with pytest.raises(ValueError, match="step 1"):  # and once more, over the folder that is there
        test_train.start(tiny, tmp_path / "run", resume=True, **RUN)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["nonfinite-step-0000001"]


def test_the_host_waits_for_the_device_once_a_step(tiny, tmp_path, monkeypatch):
    """One transfer brings loss and norm; none of the other ways to read a number is used in a step."""
    counts, tolist = [0], torch.Tensor.tolist

    def counted(self):
        counts[0] += self.dtype.is_floating_point
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(train, "mean_loss", lambda *_: 0.0)  # held-out losses are no steps
    for name in ("item", "__float__", "__bool__", "__int__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, how=name: pytest.fail(f"read by {how}"))
    test_train.start(tiny, tmp_path / "run", steps=3, log_every=1)
    assert counts == [3]


@pytest.mark.parametrize("name", ["lr", "epochs", "warmup", "min_lr", "weight_decay", "clip", "talan_lr_scale"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_settings_are_finite(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected a finite number"):
        train.Settings(**{name: value})


# ---------------------------------------------------------------- rows without a label


def test_a_file_of_rows_without_labels_is_refused(tiny, tmp_path):
    """Cut before their answers, no row has anything to learn: counted, and an error as training rows or as held-out ones."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "7 " * 60, "completion": str(n)}) + "\n" for n in range(5)))
    for more in ({"data": (str(tmp_path / "rows.jsonl"),)}, {"dev_data": (str(tmp_path / "rows.jsonl"),)}):
        with pytest.raises(ValueError, match=r"rows\.jsonl: no usable row.*'truncated': 5, 'unlabelled': 5"):
            test_train.start(tiny, tmp_path / "run", max_tokens=100, truncate=True, **more)
    assert not (tmp_path / "run").exists()


def test_rows_without_labels_among_others_change_nothing(tiny, tmp_path, capsys):
    """They are counted, and what is trained is what the file without them trains."""
    long = json.dumps({"prompt": "7 " * 600, "completion": "7"}) + "\n"
    lines = Path(tiny.rows).read_text().splitlines(keepends=True)
    runs = []
    for name, text in (("without", "".join(lines)), ("with", "".join(line + (long if n % 20 == 5 else "") for n, line in enumerate(lines)))):
        (tmp_path / f"{name}.jsonl").write_text(text)
        runs.append(test_train.start(tiny, tmp_path / name, truncate=True, data=(str(tmp_path / f"{name}.jsonl"),), steps=2))
    assert "3 unlabelled" in capsys.readouterr().out
    assert test_train.metrics(runs[0])[1:] == test_train.metrics(runs[1])[1:]
    test_train.assert_same_weights(*runs)


# ---------------------------------------------------------------- the side path's sums over long sequences


T, D, SLOTS = 16_384, 48, 2
READ = [*range(64), *range(64, T, 61), T - 1]  # the tokens whose y is compared; the sums run over all


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(side, h):
    """y (READ,r) and the weights (T,M), all in float64: the equations of the README, sums one token after another."""
    w = {name: p.detach().double().numpy() for name, p in side.named_parameters()}
    r, x = side.config.width, rms(h.double().numpy()[0])
    k, v = rms(x @ w["w_key"].T), x @ w["w_value"].T
    weights = np.exp(k @ rms(w["slots"]).T / math.sqrt(r))  # (T,M)
    if side.config.mixer == "attention":
        q = rms(x @ w["w_query"].T)
    num, den, y, read = np.zeros((SLOTS, r)), np.zeros(SLOTS), [], set(READ)
    for t in range(len(x)):
        num, den = num + weights[t][:, None] * v[t], den + weights[t]
        if t not in read:
            continue
        z = num / den[:, None]
        a = softmax(rms(z) @ q[t] / math.sqrt(r)) if side.config.mixer == "attention" else softmax(w["w_read"] @ x[t])
        if side.config.mixer == "mlp":
            z = z + w["slot_mlp_out"] @ silu(w["slot_mlp_in"] @ z)
            z = z + silu(z @ w["channel_mlp_in"].T) @ w["channel_mlp_out"].T
        y.append(a @ z)
    return np.array(y), weights


def build(mixer, width, case):
    """A side path with no weight at zero, and h (1,T,D): at random, or with keys that lie along a slot (the largest weight there is), against
    it (the smallest), or first the one for a token and then the other for all the rest."""
    side = SidePath(D, TalanConfig(slots=SLOTS, width=width, mixer=mixer, writeback="add"))
    for name in ("w_out", "slot_mlp_out", "channel_mlp_out"):
        if hasattr(side, name):
            p = getattr(side, name)
            p.data = torch.randn(p.shape, generator=generator("long", name)) / math.sqrt(p.shape[1])
    h = torch.randn(1, T, D, generator=generator("long", case))
    if case != "random":
        h = h * 1e-3 + h[:, :1]  # all tokens near one, whose key the slots are made of
        key = (h[0, 0] / h[0, 0].square().mean().sqrt()) @ side.w_key.data.T
        side.slots.data = torch.stack([key, -key])
        if case == "first":
            h[:, 1:] *= -1
    return side, h


@pytest.mark.parametrize("mixer, width, case", [
    *((mixer, 64, case) for mixer in MIXERS for case in ("random", "aligned", "first")),
    *((mixer, 512 if mixer == "mlp" else 1024, case) for mixer in MIXERS for case in ("aligned", "first"))])
def test_sums_over_16k_tokens_keep_four_digits(mixer, width, case):
    """d = w_out y in float32 against float64: each token's within 1e-4 of its largest element, whatever the weights."""
    side, h = build(mixer, width, case)
    y, weights = reference(side, h)
    if case != "random":
        assert weights.max() > 0.9 * math.exp(math.sqrt(width)) and weights.min() < 1.1 * math.exp(-math.sqrt(width))
    with torch.no_grad():
        out, (num, den) = side(torch.cat([h]))
    got = (out - h)[0, READ].double().numpy()
    want = y @ side.w_out.detach().double().numpy().T
    error = np.abs(got - want).max(-1) / np.abs(want).max(-1)
    print(f"{mixer} {width} {case}: weights {weights.min():.1e} to {weights.max():.1e}, worst relative error {error.max():.1e}")
    assert np.isfinite(got).all() and error.max() < 1e-4
    assert den[0].numpy() == pytest.approx(weights.sum(0), rel=1e-4)


def test_the_running_sum_of_deterministic_algorithms():
    """A triangle of ones gives cumsum, and the gradient of one."""
    x = torch.randn(2, 9, 3, 4, generator=generator("sum"), dtype=torch.float64, requires_grad=True)
    want = x.cumsum(1)
    torch.use_deterministic_algorithms(True)
    try:
        got = running_sum(x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, want)
    g = torch.randn(x.shape, generator=generator("gradient"), dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (got, want)))
    assert got.grad_fn.name() != want.grad_fn.name()
