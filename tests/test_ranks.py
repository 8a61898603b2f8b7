"""Several processes give what one gives: torchrun with DDP and with --fsdp, train.py and eval.py, also when one of them is stopped or fails.

A start of torchrun costs seconds, so one start does many runs: this file is also the program that it starts,

    torchrun --nproc-per-node 2 tests/test_ranks.py JOBS.json

which does a list of jobs (see `do`) and writes what each process saw beside that file. One process does its runs within pytest.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval as evaluation  # noqa: E402
import test_train  # noqa: E402
import train  # noqa: E402
from data.ranks import Ranks  # noqa: E402

tiny, signals = test_train.tiny, test_train.signals
RUN = {**test_train.SHORT, "steps": 5, "step_tokens": 1000, "eval_every": 2, "save_every": 2, "lr": 3e-4}
MLP = {"adapter": "dora", "mixer": "mlp", "writeback": "bounded", "micro_tokens": 300}
SAME = {  # each in one, two, some in three processes
    "lora": {},
    "dora": MLP,
    "one-micro": {"micro_tokens": 1000},  # all but process 0 without rows
    "full": {"scope": "full", "adapter": "none", "talan": False, "dtype": "float32"},
    "idle": {"grad_scale": 0.0, "micro_tokens": 300},  # the side path has no gradients
    "idle-full": {"grad_scale": 0.0, "scope": "full", "adapter": "none", "dtype": "float32", "untied": True},
    "recompute": {"checkpointing": True, "adapter": "rslora", "mixer": "attention"},
    "fsdp-lora": {"fsdp": True},
    "fsdp-dora": {"fsdp": True, **MLP},
    "fsdp-one-micro": {"fsdp": True, "micro_tokens": 1000},
    "fsdp-idle": {"fsdp": True, "grad_scale": 0.0, "untied": True},
    "fsdp-recompute": {"fsdp": True, "checkpointing": True, "micro_tokens": 300, "untied": True},
}
THREE = {"lora": SAME["lora"], "fsdp-dora": SAME["fsdp-dora"]}
DROPOUT = {"dropout": 0.3, "micro_tokens": 300}
LIMIT = 60  # seconds after which a command hangs


# ---------------------------------------------------------------- within torchrun


def do(job, folder):
    """One job: {name, settings: of train.py or eval.py (score: true), and what shall happen}. Returns what this process saw.

    perturb: weights away from their start; stop: [signal, step] sent to torchrun by process 0, after which steps take a while;
    die: [how, process, step]; limit: bytes that no file of process 0 may exceed; poison: step whose loss in process 1 is nan;
    break_task: the task at which all processes fail.
    """
    seen, rank = {"frozen": [], "whole": True, "seeds": [], "tasks": 0}, int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        if job.get("perturb"):
            test_train.perturb(patch)
        watch(patch, job, seen, rank)
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in job["settings"].items()}
        try:
            evaluation.score(evaluation.Settings(**settings)) if job.get("score") else train.main(settings)
            seen["ended"] = "well"
        except (ValueError, SystemExit) as error:
            if job.get("stop") or job.get("limit"):
                raise
            seen["ended"] = f"{type(error).__name__}: {error}"
    if model := seen.pop("model", None):
        trained = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
        seen["trained"] = hashlib.sha256(b"".join(trained)).hexdigest()
    return seen


def watch(patch, job, seen, rank):
    """Note what a run does, and let happen to it what the job says."""
    spread, loss_sum, rate, run_task = train.spread, train.loss_sum, train.learning_rate, evaluation.run_task

    def spread_and_note(model, *args, **kwargs):
        seen["model"] = model
        return spread(model, *args, **kwargs)

    def loss_and_note(forward, batch, model):
        loss = loss_sum(forward, batch, model)
        if torch.is_grad_enabled():
            seen["seeds"].append(torch.initial_seed())
            note_shards(seen)
            if job.get("poison") == seen.get("step", 0) + 1 and rank == 1:
                loss = loss * float("nan")
        return loss

    def rate_and_note(step, *args):
        seen["step"] = step
        note_shards(seen)
        happen(job, step, rank)
        return rate(step, *args)

    def task_and_note(task, *args):
        seen["tasks"] += 1
        if task.name == job.get("break_task"):
            raise ValueError("broken")
        return run_task(task, *args)

    for owner, name, call in ((train, "spread", spread_and_note), (train, "loss_sum", loss_and_note), (train, "learning_rate", rate_and_note),
                              (evaluation, "run_task", task_and_note)):
        patch.setattr(owner, name, call)


def note_shards(seen):
    """The share of the frozen blocks' numbers that this process holds, and whether all that trains is whole."""
    blocks = [p for p in seen["model"].model.layers.parameters() if not p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in blocks]
    seen["frozen"].append(sum(p.numel() for p in local) / max(1, sum(p.numel() for p in blocks)))
    seen["whole"] &= not any(hasattr(p, "to_local") for p in seen["model"].parameters() if p.requires_grad)


def happen(job, step, rank):
    """What the job has planned for this step of this process."""
    if "stop" in job and step >= job["stop"][1]:
        if step == job["stop"][1] and rank == 0:
            os.kill(os.getppid(), getattr(signal, job["stop"][0]))
        time.sleep(0.3)
    if job.get("die", [None, None, None])[1:] == [rank, step]:
        if job["die"][0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this process fails")
    if job.get("limit") and rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))


def serve(file):
    """Do the jobs; NAME.RANK.json beside their file says what this process saw of each."""
    torch.set_num_threads(1)
    for job in json.loads(file.read_text()):
        seen = do(job, file.parent)
        (file.parent / f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


# ---------------------------------------------------------------- around it


def torchrun(world, *command, cwd=None):
    """Start it; (exit code, stdout, stderr, seconds). A command that hangs is stopped, with all its processes, and fails."""
    began, start = time.perf_counter(), [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    process = subprocess.Popen([*start, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment | {"OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, the stubborn ones after 30 seconds
        out, err = process.communicate()
        pytest.fail(f"hangs: {out}\n{err}")
    return process.returncode, out, err, time.perf_counter() - began


def run_jobs(folder, world, jobs):
    """Jobs in one start of torchrun -> (what torchrun returned, {name: what each process saw})."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ended = torchrun(world, __file__, folder / "jobs.json")
    read = lambda name: [json.loads(f.read_text()) for f in sorted(folder.glob(f"{name}.?.json"))]  # noqa: E731
    return ended, {job["name"]: read(job["name"]) for job in jobs}


def settings_of(tiny, out, changes):
    """Settings of a run from changes to RUN; untied: of the backbone with an output matrix of its own."""
    changes = dict(changes)
    model = tiny.untied if changes.pop("untied", False) else tiny.model
    return test_train.flags(tiny, out, **{**RUN, "backbone": model, **changes})


def tensors(run):
    """Every tensor that a finished run holds."""
    return {f"{file.name} {name}": t for file in sorted(run.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_close(run, want, atol=1e-5):
    """Losses, norms and weights of two runs, and everything else the same."""
    mine, other = test_train.metrics(run), test_train.metrics(want)
    assert [(line["kind"], line["step"]) for line in mine] == [(line["kind"], line["step"]) for line in other]
    for a, b in zip(mine[1:], other[1:]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0, abs=atol)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-6 if a["step"] == 1 else 1e-3)  # a rough loss: it grows
        assert [a.get(name) for name in ("lr", "supervised")] == [b.get(name) for name in ("lr", "supervised")]
    mine, other = tensors(run), tensors(want)
    assert mine.keys() == other.keys() and mine
    far = {name: (mine[name] - other[name]).abs().max().item() for name in mine if "train_state" not in name}
    assert max(far.values()) <= atol, max(far.items(), key=lambda item: item[1])
    assert sorted(file.name for file in run.iterdir()) == sorted(file.name for file in want.iterdir())


@pytest.fixture(scope="module")
def lab(tiny, tmp_path_factory):
    """The tiny backbone, one with an output matrix of its own, and the runs of one process by name, started when first asked for."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.untied = str(folder / "untied")
    untie(Path(tiny.model), folder / "untied")
    ones = {}

    def one(name, changes, perturb=True):
        if name not in ones:
            with pytest.MonkeyPatch.context() as patch:
                if perturb:
                    test_train.perturb(patch)
                train.main(settings_of(tiny, folder / f"one-{name}", changes))
            ones[name] = folder / f"one-{name}"
        return ones[name]

    tiny.one, tiny.root = one, folder
    return tiny


def untie(source, target):
    """A copy of the backbone whose output matrix is its own, and another one than the embedding."""
    from safetensors.torch import save_file

    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous() * 0.5
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def without_fsdp(changes):
    return {k: v for k, v in changes.items() if k != "fsdp"}


@pytest.fixture(scope="module")
def two(lab):
    """One start with two processes: the runs of SAME, with dropout, not finite, and the folders of its runs."""
    folder = lab.root / "two"
    jobs = [{"name": name, "settings": settings_of(lab, folder / "runs" / name, changes), "perturb": True} for name, changes in SAME.items()]
    jobs += [{"name": name, "settings": settings_of(lab, folder / "runs" / name, DROPOUT | more)}
             for name, more in (("dropout", {}), ("dropout-again", {}), ("dropout-fsdp", {"fsdp": True}))]
    jobs += [{"name": name, "settings": settings_of(lab, folder / "runs" / name, {"micro_tokens": 300, **more}), "poison": 4}
             for name, more in (("nonfinite", {}), ("nonfinite-fsdp", {"fsdp": True}))]
    ended, seen = run_jobs(folder, 2, jobs)
    assert ended[0] == 0, ended[2]
    return folder / "runs", seen


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", SAME)
def test_two_processes_equal_one(lab, two, name):
    runs, seen = two
    assert [each["ended"] for each in seen[name]] == ["well", "well"], seen[name]
    assert_close(runs / name, lab.one(name.removeprefix("fsdp-") + str(SAME[name].get("untied")), without_fsdp(SAME[name])))
    assert len({each["trained"] for each in seen[name]}) == 1  # bit for bit


@pytest.mark.parametrize("name", SAME)
def test_frozen_weights_are_cut_and_what_trains_is_whole(two, name):
    for each in two[1][name]:
        shares = each["frozen"]
        assert each["whole"] and len(shares) >= 10  # after each forward pass, and after each step's backward passes
        assert shares == ([0.0] * len(shares) if "full" in name else [0.5] * len(shares) if "fsdp" in name else [1.0] * len(shares))


def test_dropout_repeats_and_differs_between_processes(lab, two):
    runs, seen = two
    test_train.assert_same_weights(runs / "dropout", runs / "dropout-again")
    assert test_train.metrics(runs / "dropout")[1:] == test_train.metrics(runs / "dropout-again")[1:]
    seeds = [each["seeds"] for each in seen["dropout"]]
    assert not set(seeds[0]) & set(seeds[1]) and len(set(seeds[0])) == len(set(seeds[1])) == RUN["steps"]
    assert_close(runs / "dropout-fsdp", runs / "dropout")  # the same masks, whatever the backbone's place
    one, many = (test_train.metrics(run)[2]["loss"] for run in (lab.one("dropout", DROPOUT, perturb=False), runs / "dropout"))
    assert one != pytest.approx(many, abs=1e-4) or lab.one("lora", {})  # half of the rows under other masks


def test_no_two_micro_batches_of_a_step_in_one_process_are_left_out(lab, two):
    """The counts of metrics.jsonl are those of all processes, however the rows are shared."""
    runs, _ = two
    lines = [[line for line in test_train.metrics(runs / name) if line["kind"] == "step"] for name in ("lora", "one-micro", "fsdp-one-micro")]
    assert [[line["supervised"] for line in some] for some in lines] == [[line["supervised"] for line in lines[0]]] * 3


@pytest.mark.parametrize("name", ["nonfinite", "nonfinite-fsdp"])
def test_a_step_that_is_not_finite_stops_all(lab, two, name):
    runs, seen = two
    folder = runs / name / "nonfinite-step-0000004"
    assert [each["ended"] for each in seen[name]] == [f"ValueError: step 4: loss nan, gradient norm nan: stopped before the weights changed; "
                                                      f"its rows and gradients are in {folder}; the last checkpoint is as it was"] * 2
    assert sorted(path.name for path in (runs / name).iterdir()) == ["metrics.jsonl", folder.name, "settings.json", "step-0000002"]
    one = train.Settings(**settings_of(lab, "", {"micro_tokens": 300}))
    rows = train.split_dev(train.load_rows((lab.rows,), lab.tokenizer, one)[0], one)[0]
    plan = train.plan_steps([row.width for row in rows], one, 300)
    micros = [next(plan) for _ in range(4)][3]
    info = json.loads((folder / "step.json").read_text())
    assert [(r["row"], r["ids"]) for r in info["rows"]] == [(n, rows[n].ids) for micro in micros for n in micro] and len(micros) > 1
    assert all(0 < float(r["loss"]) < 100 for r in info["rows"])  # each row alone is well
    assert len(load_file(folder / "gradients.safetensors")) > 10
    assert [line["step"] for line in test_train.metrics(runs / name) if line["kind"] == "step"] == [1, 2, 3]
    train.main(settings_of(lab, runs / name, {"micro_tokens": 300, "resume": True} | ({"fsdp": True} if 0 else {})) | {"resume": True}) \
        if name == "nonfinite" else None


if __name__ == "__main__":
    with contextlib.suppress(IndexError):
        serve(Path(sys.argv[1]))
