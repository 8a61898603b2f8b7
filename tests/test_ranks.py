"""Several processes give what one gives: train.py with DDP and --fsdp, eval.py.

A start of torchrun costs seconds, so one start does many runs, and this file is its program: it
does a list of jobs (see `do`) and writes what each process saw beside that list.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from conftest import ROOT
from runs import Stopped, assert_same, contents, metrics, names, perturb, stop_at, tensors

import eval as evaluation
import train
from common import Ranks, choose_device, generator, open_ranks, parse_cli, read_json, write_json
from talan import group_of

tiny = runs.tiny
RUN = {"steps": 3, "step_tokens": 1000, "micro_tokens": 300, "eval_every": 2, "save_every": 2}
RUN |= {"lr": 1e-3, "warmup": 0.0, "clip": 0.0}
DORA = {"adapter": "dora", "mixer": "mlp", "writeback": "bounded", "checkpointing": True}
SAME = {  # each in one and two, some in three processes
    "lora": {},
    "dora": DORA,
    "whole": {"micro_tokens": 1000},  # all but process 0 are without rows
    "full": {"scope": "full", "adapter": "none", "talan": False},
    "idle": {"grad_scale": 0.0},  # the side path has no gradients
    "fsdp lora": {"fsdp": True, "untied": True},
    "fsdp dora": {"fsdp": True, **DORA},
    "fsdp adapter": {"fsdp": True, "scope": "adapter", "micro_tokens": 1000},
    "fsdp talan": {"fsdp": True, "scope": "talan", "adapter": "dora"},
}
THREE = ("lora", "fsdp dora")
SCORES = {"greedy": {"batch_rows": 3}, "few": {"limit": 1}}
SCORES["sampled"] = {"samples": 3, "temperature": 0.8, "tasks": ("math",)}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


# ---- within torchrun ----


def sgd(model, settings):
    """A gradient's scale changes its steps; Adam would hide it, and blow up noise around 0."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)


def do(job):
    """One job: {name, settings, score: of eval.py; and what `watch` does}. Returns what it saw."""
    seen = {"held": [], "seeds": [], "ended": "well"}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in job["settings"].items()}
    with pytest.MonkeyPatch.context() as patch:
        perturb(patch)
        watch(patch, job, seen)
        try:
            if job.get("score"):
                evaluation.score(evaluation.Settings(**settings))
            else:
                train.main(settings)
        except (ValueError, SystemExit) as error:
            seen["ended"] = f"{type(error).__name__}: {error}"
    model = seen.pop("model", torch.nn.Module())
    trained = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    return seen | {"trained": hashlib.sha256(b"".join(trained)).hexdigest()}


def watch(patch, job, seen):
    """Note what a run does. nan: in step 3 of this process; signal: SIGTERM in step 2."""
    add, rank = train.add_gradients, int(os.environ.get("RANK", "0"))

    def add_and_note(ddp_model, model, *args):
        seen["seeds"].append(torch.initial_seed())
        step, seen["model"] = len(seen["seeds"]), model
        if job.get("signal") and step == 2 - rank:
            interrupt(rank)
        total = add(ddp_model, model, *args)
        named = [(n, p) for n, p in model.model.layers.named_parameters() if not p.requires_grad]
        weights = [p for n, p in named if group_of("." + n) == "backbone"]
        held = [p.to_local() if hasattr(p, "to_local") else p for p in weights]
        seen["held"].append(sum(p.numel() for p in held))
        return total * float("nan") if step == 3 and job.get("nan") == rank else total

    patch.setattr(train, "build_optimizer", sgd)
    patch.setattr(train, "add_gradients", add_and_note)


def interrupt(rank):
    """Process 1 is deaf to SIGTERM; process 0 sends it to torchrun and waits until it hears it."""
    handler = signal.getsignal(signal.SIGTERM)
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    os.kill(os.getppid(), signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) == handler:
        time.sleep(0.01)


def serve(file):
    """Do the jobs; NAME.RANK.json beside their file says what this process saw of each."""
    torch.set_num_threads(1)
    for job in json.loads(file.read_text()):
        write_json(file.parent / f"{job['name']}.{os.environ['RANK']}.json", do(job))


# ---- around it ----


class Lab:
    """The folder of all runs; makes jobs, and does them."""

    def __init__(self, tiny, folder):
        self.tiny, self.folder, self.items = tiny, folder, folder / "items.jsonl"
        self.untied = runs.write_backbone(folder / "untied", tie_word_embeddings=False)
        items = [{"id": n, "prompt": f"Compute {n} + 1.", "answer": str(n)} for n in "1234567"]
        self.items.write_text("".join(json.dumps(item) + "\n" for item in items))

    def job(self, out, more=None, **changes):
        """Of train.py; more: what happens to it."""
        backbone = self.untied if changes.pop("untied", False) else self.tiny.model
        settings = runs.flags(self.tiny, out, **{**RUN, "backbone": backbone, **changes})
        return {"name": out.name, "settings": settings, **(more or {})}

    def score(self, out, **changes):
        """Of eval.py."""
        settings = {"tasks": ("math", "science"), "limit": 5, "max_new_tokens": 12} | changes
        settings |= {"device": "cpu", "backbone": self.tiny.model, "out": str(out)}
        return {"name": out.name, "settings": settings, "score": True}

    def one(self, name):
        """The folder of a run or score in this process, done when first asked for."""
        out = self.folder / "one" / name
        run = self.job(out, **SAME.get(name, {}) | {"fsdp": False})
        job = self.score(out, **SCORES[name]) if name in SCORES else run
        assert out.exists() or do(job)["ended"] == "well"
        return out

    def torchrun(self, world, folder, jobs):
        """Jobs in one start -> (what torchrun returned, {name: what each process saw})."""
        write_json(folder / "jobs.json", jobs)
        ended, seen = runs.python(*TORCHRUN, world, __file__, folder / "jobs.json"), {}
        for job in jobs:
            files = sorted(folder.glob(f"{job['name']}.?.json"))
            seen[job["name"]] = [read_json(file) for file in files]
        return ended, seen


@pytest.fixture(scope="module")
def lab(tiny, tmp_path_factory):
    return Lab(tiny, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def two(lab):
    """One start with two processes: all runs, one begun by one process, and the scores."""
    folder = lab.folder / "two"
    jobs = [lab.job(folder / name, **changes) for name, changes in SAME.items()]
    jobs += [lab.job(folder / name, dropout=0.3) for name in ("dropout", "again")]
    jobs += [lab.job(folder / "nan", {"nan": 1}), lab.job(folder / "refused")]
    shutil.copytree(lab.one("lora"), folder / "refused")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        do(lab.job(folder / "resumed"))
    jobs.append(lab.job(folder / "resumed", resume=True))
    jobs += [lab.score(folder / name, **changes) for name, changes in SCORES.items()]
    ended, seen = lab.torchrun(2, folder, jobs)
    assert ended.returncode == 0, ended.stderr
    return folder, seen


@pytest.fixture(scope="module")
def stopped(lab):
    """A run under FSDP of two processes, whose torchrun gets SIGTERM in its second step."""
    out = lab.folder / "stopped" / "run"
    return out, *lab.torchrun(2, out.parent, [lab.job(out, {"signal": True}, fsdp=True)])


@pytest.fixture(scope="module")
def three(lab, stopped):
    """One start with three processes: two runs, the stopped one resumed, scores of one item."""
    folder = lab.folder / "three"
    jobs = [lab.job(folder / name, **SAME[name]) for name in THREE]
    out = shutil.copytree(stopped[0], folder / "resumed")
    jobs += [lab.job(out, fsdp=True, resume=True), lab.score(folder / "few", limit=1)]
    ended, seen = lab.torchrun(3, folder, jobs)
    assert ended.returncode == 0, ended.stderr
    return folder, seen


# ---- the parts ----


def test_what_is_sharded_is_gathered_in_order(monkeypatch):
    for world, n in itertools.product(range(1, 5), range(8)):
        parts = [list(range(n))[rank::world] for rank in range(world)]
        for rank, mine in enumerate(parts):
            fillers = ["filler"] * (-(-n // world) - len(mine))
            assert Ranks(rank, world).shard(range(n), "filler") == mine + fillers

        def all_gather(out, mine, parts=parts):
            out[:] = parts

        monkeypatch.setattr(dist, "all_gather_object", all_gather)
        assert Ranks(0, world).gather(parts[0]) == list(range(n))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """NCCL, and gloo beside it, when there are enough; one GPU for two processes: gloo alone."""
    calls, own = [], torch.device("cuda:1")
    answers = {"is_torchelastic_launched": True, "is_initialized": False, "get_rank": 0}
    for name, answer in (answers | {"get_world_size": 2}).items():
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(
        dist, "init_process_group", lambda b, **k: calls.append((b, k["device_id"]))
    )
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for gpus, want in ((1, [("gloo", None)]), (2, [own, ("cpu:gloo,cuda:nccl", own)])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        calls.clear()
        assert open_ranks() == Ranks(0, 2) and calls == want
    assert choose_device("auto") == choose_device("cuda") == own


# ---- the same numbers ----


def assert_close(run, want):
    """To 1e-4: a sum of 500 terms in another order is off by up to 500 u = 3e-5, three add up."""
    mine, other = metrics(run), metrics(want)
    assert [line.pop("kind") for line in mine] == [line.pop("kind") for line in other]
    assert mine[1:] == [pytest.approx(line, rel=1e-4) for line in other[1:]] and len(mine) == 7
    mine, other = tensors(run), tensors(want)
    assert mine.keys() == other.keys() and any("momentum_buffer" in name for name in mine)
    far = {name: (mine[name] - other[name]).norm() / (other[name].norm() + 1e-6) for name in mine}
    assert max(far.values()) <= 1e-4, max(far, key=far.get)
    assert names(run) == names(want)


@pytest.mark.parametrize("world, name", [*((2, name) for name in SAME), *((3, n) for n in THREE)])
def test_processes_equal_one(request, lab, world, name):
    """And each other, bit for bit; FSDP cuts the frozen weights of the blocks between them."""
    folder, seen = request.getfixturevalue("two" if world == 2 else "three")
    assert [each["ended"] for each in seen[name]] == ["well"] * world
    assert_close(folder / name, lab.one(name))
    assert len({each["trained"] for each in seen[name]}) == 1
    held = torch.tensor([each["held"] for each in seen[name]]).sum(0).tolist()
    whole = 0 if name == "full" else seen["lora"][0]["held"][0]
    assert held == [whole if "fsdp" in name else whole * world] * 3


def test_dropout_repeats_and_differs_between_steps_and_processes(two):
    folder, seen = two
    assert_same(folder / "dropout", folder / "again")
    first = [generator(0, "dropout", step).initial_seed() for step in (1, 2, 3)]
    assert [each["seeds"] for each in seen["dropout"]] == [first, [seed + 1 for seed in first]]


def test_a_run_resumes_with_another_number_of_processes(lab, stopped, two, three):
    """From one to two; from two under FSDP, which SIGTERM stops at one step, to three and one."""
    out, ended, seen = stopped
    assert ended.returncode == 1 and ended.stderr.count("finishing the step and saving") == 1
    assert [each["ended"] for each in seen["run"]] == ["SystemExit: 130"] * 2
    assert names(out) == {"step-0000002", "metrics.jsonl", "settings.json"}
    write_json(out / "settings.json", read_json(out / "settings.json") | {"fsdp": False})
    assert do(lab.job(out, resume=True))["ended"] == "well"
    for run in (two[0] / "resumed", three[0] / "resumed", out):
        assert_close(run, lab.one("lora"))


def test_what_ends_one_process_ends_all(two):
    """A step that is not finite in one of them; a run folder that exists."""
    folder, seen = two
    for each in seen["nan"]:
        assert each["ended"].startswith("NonFiniteError: step 3: loss nan, gradient norm ")
    assert names(folder / "nan") == {"step-0000002", "metrics.jsonl", "settings.json"}
    first, second = (each["ended"] for each in seen["refused"])
    assert "refused: exists; --resume" in first and second == "SystemExit: 1"


# ---- scores and the command ----


def assert_same_records(found, want):
    """The same records; log-likelihoods, sums of some tens of numbers, to 1e-4."""
    assert names(found) == names(want) == {"records.jsonl", "results.json"}
    mine, other = ((folder / "records.jsonl").read_text().splitlines() for folder in (found, want))
    assert len(mine) == len(other) > 1
    for a, b in zip(map(json.loads, mine), map(json.loads, other)):
        for key in ("reference_logprob", "logprobs"):
            assert (a.pop(key, 0) or 0) == pytest.approx(b.pop(key, 0) or 0, rel=1e-4)
        assert a == b


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_processes_equal_one(lab, two, three, name):
    assert_same_records(two[0] / name, lab.one(name))
    if name == "few":
        assert_same_records(three[0] / name, lab.one(name))


def test_the_command_speaks_and_writes_once(lab, tmp_path, capfd):
    """train.py, its scores too, as one process does it."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = f"--backbone {lab.tiny.model} --data {lab.tiny.rows} --tasks {lab.items} --device cpu"
    words = [*words.split(), "--dev-rows", "8", "--steps", "2", "--step-tokens", "512", "--out"]
    train.main(parse_cli(train.Settings, "train.py", [*words, str(one)]))
    want = [line.split()[:1] for line in capfd.readouterr().out.splitlines()]
    done = runs.python(*TORCHRUN, 2, ROOT / "train.py", *words, two)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:1] for line in done.stdout.splitlines()] == want and len(want) > 12
    assert contents(two).keys() == contents(one).keys()
    for kind in ("eval-base", "eval-adapted"):
        assert_same_records(two / kind, one / kind)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
