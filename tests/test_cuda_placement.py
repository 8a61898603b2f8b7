"""Which device each tensor is on and where the host waits, without a GPU.

Tensors of a pretend one say "lazy" and compute on the CPU; mixing devices raises as CUDA does, and
every wait is counted. Weights, losses, answers and scores must be those of the CPU. Not shown:
kernels, their choice, speed and rounding, memory, streams, several GPUs, torch.compile.
"""

import contextlib
import sys
import traceback
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import eval as evaluation
import train
from common import Ranks, checkpoint_folder, generator
from data.chat import Row
from experiments import internals, speed
from model import generate, load_model
from talan import KINDS, MIXERS, SCOPES, SITES, WRITEBACKS, AdapterConfig, TalanConfig, attach
from talan import cached_dora_norms, group_of, merge_adapter, save_adapter

QWEN3, LLAMA = (ROOT / "tests/golden/backbones" / name for name in ("qwen3", "llama"))
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
INDEX = (aten.index.Tensor, aten._unsafe_index.Tensor, aten._index_put_impl_.default)
INDEX += (aten.index_put.default, aten.index_put_.default)
STRICT = (aten.cat.default, aten.stack.default)  # others take a CPU tensor without dimensions


class DeviceTensor(torch.Tensor):
    """A tensor of the pretend device, around one of the CPU that has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True  # so that decoding captures its steps

    @staticmethod
    def __new__(cls, values):
        options = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        options |= {"dtype": values.dtype, "device": "lazy"}
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, **options)
        made.values_on_cpu = values
        return made

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendDevice().__torch_dispatch__(func, types, args, kwargs)


class PretendDevice(TorchDispatchMode):
    """While it is entered, device "lazy" is there; `waits`: the lines where the host waits."""

    def __init__(self):
        super().__init__()
        self.waits, self.tape = Counter(), None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_cpu = [t for t in tensors if not isinstance(t, DeviceTensor)]
        begins = len(on_cpu) < len(tensors)  # on the device
        ends, in_background = begins and func not in READS, kwargs.get("non_blocking")
        if kwargs.get("device") is not None:
            ends = torch.device(kwargs["device"]).type == "lazy"
        if not begins and not ends:
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            ends, begins = (isinstance(t, DeviceTensor) for t in args[:2])
            in_background = args[2:] == (True,)
        moves = func in MOVES and begins != ends
        self.count_waits(func, args, moves, ends and in_background, on_cpu)
        plain, options = tree_map_only(DeviceTensor, lambda t: t.values_on_cpu, (args, kwargs))
        options |= {"device": "cpu"} if ends and "device" in options else {}
        captures = ends and self.tape is not None  # and leaves what is there as it was
        found = plain[0] if captures and func._schema.is_mutable else func(*plain, **options)
        if captures:
            self.tape.append((func, plain, options, found))
        if not ends:
            return found
        found = tree_map_only(torch.Tensor, DeviceTensor, found)
        return return_and_correct_aliasing(func, args, kwargs, found)

    def count_waits(self, func, args, moves, in_background, on_cpu):
        """Of moves, reads, indices on the CPU, masks. RuntimeError on two devices, as of CUDA."""
        indices = [t for t in args[1] if t is not None] if func in INDEX else []
        strict = func in STRICT or func._schema.is_mutable and id(args[0]) in map(id, on_cpu)
        allowed = {id(t) for t in on_cpu if t.dim() == 0 and not strict} | set(map(id, indices))
        if func not in MOVES and any(id(t) not in allowed for t in on_cpu):
            raise RuntimeError(f"{func}: expected all tensors on one device")
        count = sum(not isinstance(t, DeviceTensor) or t.dtype == torch.bool for t in indices)
        count += (moves and not in_background) or func in (*READS, aten.nonzero.default)
        if self.tape is not None and (moves or count):
            raise RuntimeError(f"{func}: not permitted while a graph is captured")
        if count:
            stack = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))]
            self.waits[str([f for f in stack if f.filename != __file__][-1:])] += count

    @contextlib.contextmanager
    def capture(self, graph):
        """In the place of torch.cuda.graph."""
        self.tape = graph.tape = []
        yield
        self.tape = None


class PretendGraph:
    """In the place of torch.cuda.CUDAGraph: the captured operations again, in the same tensors."""

    def replay(self):
        for func, args, kwargs, found in self.tape:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again)):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def gpu(monkeypatch):
    """The pretend device, and what AdamW, checkpointing and the project must know of it."""
    device, optimizers = PretendDevice(), sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["lazy", "cpu"])
    monkeypatch.setattr(torch, "lazy", SimpleNamespace(_initialized=False), raising=False)
    # so large an eps that the rounding of a gradient near 0 does not become a whole step
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "graph", device.capture)
    devices = {"cpu": torch.device("cpu"), "cuda": torch.device("lazy")}
    for module in (train, evaluation, internals):
        monkeypatch.setattr(module, "choose_device", devices.get)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) is a copy
    yield device
    torch._C._set_only_lift_cpu_tensors(False)


def build(device, adapter="lora", dropout=0.0, side_path=None, scope="joint", backbone=QWEN3):
    """A model and what trains: adapter and side path, each tensor moved away from its start."""
    model = load_model(backbone, device, torch.float32)
    side_path = side_path or TalanConfig(layers=(1,), slots=3, width=8)
    trainable = attach(model, AdapterConfig(adapter, 4, 4, dropout), side_path, scope)
    for name, p in model.named_parameters():
        if group_of(name) != "backbone":
            p.data += (0.2 * torch.randn(p.shape, generator=generator(name))).to(device)
    return model, trainable


assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # float32 rounds
# 150 tokens are two chunks of a side path
ROWS = [Row([*range(30)] * n, [False] * 10 * n + [True] * 20 * n) for n in (5, 2, 1)]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [*range(20, 47)]]
SAMPLING = {"temperature": 0.8, "top_p": 0.9}
CASES = {name: {"scope": name} for name in SCOPES} | {"checkpointing": {"checkpointing": True}}
for n, (mixer, writeback) in enumerate((m, w) for m in MIXERS for w in WRITEBACKS):
    side_path = TalanConfig((0, 1), SITES[n % 2], 3, 8, mixer, writeback, 0.1, 1.0, n % 3 / 2)
    case = {"adapter": KINDS[n % 4], "side_path": side_path, "backbone": (QWEN3, LLAMA)[n % 2]}
    CASES[f"{KINDS[n % 4]}, {mixer}, {writeback}"] = case | {"dropout": 0.1 if n > 4 else 0.0}
ROW, ZERO = torch.ones(2), torch.zeros(1, 2, dtype=torch.int64)
REFUSED = [lambda x: x + ROW, lambda x: x @ ROW, lambda x: torch.arange(3) < x[:, 0]]
REFUSED += [lambda x: torch.cat((x[0], ROW)), lambda x: torch.stack((x[0, 0], ROW[0]))]
REFUSED += [lambda x: x.gather(0, ZERO), lambda x: torch.nn.functional.embedding(ZERO, x)]
REFUSED += [lambda x: x.index_put_((ZERO[0],), ROW), lambda x: ROW.sum().add_(x[0, 0])]


def two_steps(device, checkpointing=False, **parts):
    """What two optimizer steps leave, on the CPU; the second has two micro-batches."""
    model, trainable = build(device, **parts)
    model.train().checkpointing = checkpointing
    optimizer, losses = train.build_optimizer(model, train.Settings()), []
    count = sum(sum(row.supervised[1:]) for row in ROWS)
    for n, cuts in enumerate(([ROWS], [ROWS[:1], ROWS[1:]])):
        torch.manual_seed(n)
        batches = [train.make_batch(rows, device) for rows in cuts]
        with cached_dora_norms(model):
            losses.append(train.add_gradients(model, model, batches, count, Ranks()))
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert {p.device.type for p in model.parameters()} == {device}
    return [tensor.detach().cpu() for tensor in (*losses, *trainable)]


@pytest.mark.parametrize("name", CASES)
def test_training(name, gpu):
    want = two_steps("cpu", **CASES[name])
    with gpu:
        assert_close(two_steps("lazy", **CASES[name]), want)


def test_a_run_that_crashes_and_resumes_waits_once_a_step(gpu, tmp_path, monkeypatch):
    flags = {"tasks": ("none",), "rank": 4, "slots": 2, "width": 8, "dev_rows": 4, "steps": 4}
    flags |= {"data": (str(ROOT / "data/tiny/dev.jsonl"),), "dtype": "float32", "save_every": 2}
    flags |= {"step_tokens": 128, "micro_tokens": 64, "eval_every": 0, "targets": ("v_proj",)}
    counts = []  # of waits up to steps 1, 2, 3, and again 3, 4

    def count_and_crash(*_):
        counts.append(gpu.waits.total())
        if len(counts) == 3:
            raise KeyboardInterrupt

    train.main(flags | {"out": str(tmp_path / "cpu"), "device": "cpu"})
    monkeypatch.setattr(train, "show_step", count_and_crash)
    with gpu:
        with pytest.raises(KeyboardInterrupt):
            train.main(flags | {"out": str(tmp_path / "gpu"), "device": "cuda"})
        train.main({"out": str(tmp_path / "gpu"), "resume": True})
    runs = [checkpoint_folder(tmp_path / device) for device in ("gpu", "cpu")]
    for name in ("adapter_model", "talan", "train_state"):
        assert_close(*(load_file(run / f"{name}.safetensors") for run in runs))
    assert counts[1] - counts[0] == counts[4] - counts[3] == 1, gpu.waits


@pytest.mark.parametrize("form", ["none", "lora", "dora", "merged"])
def test_answers_and_likelihoods(form, gpu):
    def compute(device):
        model, _ = build(device, "dora" if form == "merged" else form)
        if form == "merged":
            merge_adapter(model)
        answers = generate(model, PROMPTS, 5, batch_rows=2, prefill_tokens=10)
        answers += generate(model, PROMPTS, 5, batch_rows=3, eos_ids=[20], **SAMPLING)
        items = [(prompt, [[3, 4], [5], [6, 7, 8]]) for prompt in PROMPTS]
        return answers, evaluation.log_likelihoods(model, items, 200)

    want = compute("cpu")
    with gpu:
        assert_close(compute("lazy"), want)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("sampling", [{}, SAMPLING])
def test_where_the_host_waits(sampling, graphs, gpu, monkeypatch):
    """Once a decoded token, a few times a prefill or a batch of likelihoods, whatever the depth."""
    monkeypatch.setattr(DeviceTensor, "is_cuda", graphs)
    counts = []
    with gpu:
        model, _ = build("lazy", "dora")
        calls = [partial(generate, model, PROMPTS[:2], n, **sampling) for n in (1, 1, 3, 9)]
        calls.append(partial(evaluation.log_likelihoods, model, [(PROMPTS[0], [[3, 4], [5]])]))
        for call in calls:
            gpu.waits.clear()
            call()
            counts.append(gpu.waits.total())
    assert counts[3] - counts[2] == 9 - 3 and counts[1] <= 7 and counts[4] <= 10, counts


def test_scores_internals_and_speed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)  # it would outlive this
    save_adapter(build("cpu", backbone=ROOT / "data/tiny/model")[0], tmp_path)
    flags = {"adapter": str(tmp_path), "dtype": "float32"}

    def compute(device):
        out = flags | {"device": device, "out": str(tmp_path / device)}
        asked = {"tasks": ("math", "science"), "limit": 2, "max_new_tokens": 4}
        scores = evaluation.score(evaluation.Settings(**out, **asked))
        numbers = [each["reference_logprob_per_token"] for each in scores.values()]
        figures = internals.main(out | {"rows": 3, "max_tokens": 60, "resamples": 100})["figures"]
        numbers += [entry["value"] for entry in figures["loss"].values()]
        asked = {"device": device.replace("cuda", "lazy"), "dtype": "float32", "compile": False}
        given = {"settings": SimpleNamespace(**asked, batch_rows=2), "folder": str(tmp_path / "no")}
        side = speed.Ours(**given, backbone=QWEN3, kind="dora")
        numbers += speed.task(side, 0, "ours + side path", [12, 12], [])()
        for stops in ([], [3, 3]):
            speed.task(side, 0, "ours side path alone", [4, 4], stops)()
        return numbers, speed.task(side, 0, "merged + side path", [4, 5, 6], [3, 2, 4])()

    want = compute("cpu")
    with gpu:
        assert_close(compute("cuda"), want)


def test_the_pretend_device_refuses_what_cuda_refuses(gpu):
    with gpu:
        x = torch.ones(3, 2, device="lazy")
        assert (x * torch.tensor(2.0)).device.type == "lazy" and not gpu.waits
        assert x[torch.arange(2)].tolist() == [[1, 1], [1, 1]] and gpu.waits.total() == 2
        for wrong in REFUSED:
            with pytest.raises(RuntimeError, match="one device"):
                wrong(x)
        with pytest.raises(RuntimeError, match="captured"), gpu.capture(PretendGraph()):
            x.copy_(ROW, non_blocking=True)
