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
import shutil
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
from data.ranks import Ranks, close_ranks, open_ranks  # noqa: E402

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
MICRO = {"micro_tokens": 300}
DROPOUT = {"dropout": 0.3, **MICRO}
ITEMS = [{"id": f"q{n}", "prompt": f"Compute {n} + 1.", "answer": str(n)} for n in range(7)]
SCORE = {"tasks": ("math", "science"), "limit": 5, "max_new_tokens": 12, "device": "cpu", "batch_rows": 3}
SCORES = {"greedy": {}, "sampled": {"samples": 3, "temperature": 0.8, "tasks": ("math",)}, "few": {"limit": 1}}
LIMIT = 60  # seconds after which a command hangs


# ---------------------------------------------------------------- within torchrun


def do(job, folder):
    """One job: {name, settings: of train.py or eval.py (score: true), and what shall happen}. Returns what this process saw.

    perturb: weights away from their start; stop: [signal, step] sent to torchrun by process 0, after which steps take a while, and
    deaf: the process that does not hear of it;
    die: [how, process, step]; limit: bytes that no file of process 0 may exceed from step 3 on; poison: step whose loss in process 1 is nan;
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
    if job.get("deaf") == rank:
        signal.signal(getattr(signal, job["stop"][0]), signal.SIG_IGN)
    if job.get("die", [None, None, None])[1:] == [rank, step]:
        if job["die"][0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this process fails")
    if job.get("limit") and rank == 0 and step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))


def serve(file):
    """Do the jobs; NAME.RANK.json beside their file says what this process saw of each."""
    torch.set_num_threads(1)
    for job in json.loads(file.read_text()):
        seen = do(job, file.parent)
        with contextlib.suppress(OSError):  # a full disk
            (file.parent / f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))
        if "stop" in job or "limit" in job:
            raise SystemExit(seen["ended"])
    close_ranks()


# ---------------------------------------------------------------- around it


def torchrun(world, *command, cwd=None, limit=LIMIT):
    """Start it; (exit code, stdout, stderr, seconds). A command that hangs is stopped, with all its processes, and fails."""
    began, start = time.perf_counter(), [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    process = subprocess.Popen([*start, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment | {"OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, the stubborn ones after 30 seconds
        out, err = process.communicate()
        pytest.fail(f"hangs: {out}\n{err}")
    return process.returncode, out, err, time.perf_counter() - began


def run_jobs(folder, world, jobs, limit=LIMIT):
    """Jobs in one start of torchrun -> (what torchrun returned, {name: what each process saw})."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ended = torchrun(world, __file__, folder / "jobs.json", limit=limit)
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


def assert_close(run, want, atol=1e-5, norm=1e-6):
    """Losses and weights of two runs to atol, gradient norms to the share `norm` at first, and everything else the same."""
    mine, other = test_train.metrics(run), test_train.metrics(want)
    assert [(line["kind"], line["step"]) for line in mine] == [(line["kind"], line["step"]) for line in other]
    for a, b in zip(mine[1:], other[1:]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0, abs=atol)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=norm if a["step"] == 1 else 1e-3)  # a rough loss: it grows
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
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    untie(Path(tiny.model), folder / "untied")
    ones = {}

    def one(name, changes):
        if name not in ones:
            with pytest.MonkeyPatch.context() as patch:
                test_train.perturb(patch)
                train.main(settings_of(tiny, folder / f"one-{name}", changes | {"fsdp": False}))
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


def interrupted(folder, settings):
    """A run of one process that a Ctrl-C ends after its third step."""
    rate = train.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        test_train.perturb(patch)
        patch.setattr(train, "learning_rate", lambda step, *args: (step == 3 and os.kill(os.getpid(), signal.SIGINT), rate(step, *args))[1])
        with pytest.raises(SystemExit) as end:
            train.main(settings | {"out": str(folder)})
    assert end.value.code == 130 and (folder / "step-0000003").exists()


def resume(lab, folder, name, changes):
    """Go on in this process with a copy of a run that was stopped; it ends like the one that was not."""
    copy = shutil.copytree(folder, folder.with_name("copy"))
    train.main(settings_of(lab, copy, {**changes, "resume": True}))
    assert_close(copy, lab.one(name, changes))


@pytest.fixture(scope="module")
def two(lab):
    """One start with two processes: the runs of SAME, with dropout, not finite, resumed, and the scores."""
    folder = lab.root / "two"
    job = lambda name, changes, **more: {"name": name, "settings": settings_of(lab, folder / "runs" / name, changes), **more}  # noqa: E731
    jobs = [job(name, changes, perturb=True) for name, changes in SAME.items()]
    jobs += [job(name, DROPOUT | more) for name, more in (("dropout", {}), ("dropout-again", {}), ("dropout-fsdp", {"fsdp": True}))]
    jobs += [job(name, MICRO | more, poison=4) for name, more in (("nonfinite", {}), ("nonfinite-fsdp", {"fsdp": True}))]
    interrupted(folder / "runs" / "resumed", settings_of(lab, "", {}))
    jobs += [job("resumed", {"resume": True})]
    score = lambda name, task="": {"name": name, "score": True, "break_task": task,  # noqa: E731
                                   "settings": score_of(lab, folder / "runs" / name, SCORES[name])}
    jobs += [score("greedy", "science") | {"name": "broken"}, score("greedy"), score("sampled"), score("few")]
    ended, seen = run_jobs(folder, 2, jobs)
    assert ended[0] == 0, ended[2]
    return folder / "runs", seen


@pytest.fixture(scope="module")
def stopped(lab):
    """By signal: the folder of a run that two processes began and torchrun was told to stop, and what became of the command."""
    folder = lab.root / "stopped"
    done = {}
    for name, deaf, more in (("SIGINT", None, {}), ("SIGTERM", 0, {"fsdp": True})):
        job = {"name": name, "settings": settings_of(lab, folder / name / "run", {**MICRO, **more}), "perturb": True, "stop": [name, 2], "deaf": deaf}
        (folder / name).mkdir(parents=True)
        done[name] = (folder / name / "run", *run_jobs(folder / name, 2, [job]))
    return done


@pytest.fixture(scope="module")
def three(lab, stopped):
    """One start with three processes: two runs, one resumed from two processes under FSDP, and scores of fewer items."""
    folder = lab.root / "three"
    jobs = [{"name": name, "settings": settings_of(lab, folder / "runs" / name, changes), "perturb": True} for name, changes in THREE.items()]
    shutil.copytree(stopped["SIGTERM"][0], folder / "runs/resumed")
    jobs += [{"name": "resumed", "settings": settings_of(lab, folder / "runs/resumed", {**MICRO, "fsdp": True, "resume": True})},
             {"name": "few", "score": True, "settings": score_of(lab, folder / "runs" / "few", {"limit": 2})}]
    ended, seen = run_jobs(folder, 3, jobs)
    assert ended[0] == 0, ended[2]
    return folder / "runs", seen


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", range(8))
def test_what_is_shared_is_joined_in_order(monkeypatch, world, length):
    items, ranks = list(range(length)), [Ranks(rank, world) for rank in range(world)]
    shares = [each.share(items, "filler") for each in ranks]
    assert len({len(share) for share in shares}) == 1 and sum(map(len, shares)) < length + world  # no more fillers than needed
    assert all(share[-1] != "filler" or share.count("filler") == 1 for share in shares if share)
    parts = [[item for item in share if item != "filler"] for share in shares]
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, mine: out.__setitem__(slice(None), parts))
    assert [each.join(part) for each, part in zip(ranks, parts)] == [items] * world


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """As many processes as GPUs: NCCL between them and gloo beside it, and none but its own GPU for any; more processes: no NCCL."""
    calls = []
    for name, value in (("is_torchelastic_launched", True), ("is_initialized", False), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **kwargs: calls.append((*args, kwargs["device_id"])))
    monkeypatch.setattr("torch.cuda.set_device", calls.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for gpus, want in ((2, [torch.device("cuda:1"), ("cpu:gloo,cuda:nccl", torch.device("cuda:1"))]), (1, [("gloo", None)])):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        calls.clear()
        assert open_ranks() == Ranks(0, 2) and calls == want
    assert [Ranks(1, 2).device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert [Ranks().device(name) for name in ("auto", "cuda:3", "cpu")] == ["auto", "cuda:3", "cpu"]
    with pytest.raises(ValueError, match="each of 2 processes has a GPU of its own; expected auto, cuda or cpu, found 'cuda:0'"):
        Ranks(1, 2).device("cuda:0")


def test_scores_after_training_name_the_device_as_the_settings_do(lab, tmp_path, monkeypatch):
    """Else each process would ask for the same GPU, which is refused, and the base of a sweep be scored again on another one."""
    from data import sweep

    found = []
    for module in (train, sweep):
        monkeypatch.setattr(module, "score", lambda settings: found.append(settings.device) or sys.exit(9))
    items = {"tasks": (str(lab.root / "items.jsonl"),), "steps": 1, "device": "auto"}
    for name, changes in (("run", items), ("sweep", {**items, "paired": True, "seeds": ("0",)})):
        with pytest.raises(SystemExit):
            train.main(settings_of(lab, tmp_path / name, changes))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [Ranks(1, 2).device(name) for name in found] == ["cuda:1"] * 2
    stored = {"settings": json.loads(json.dumps(train.asdict(sweep.scoring(train.Settings(), tmp_path)))), "device": "cuda:0", "tasks": {"a": {}}}
    for name in ("cuda:0", "auto"):  # the first as the version before wrote it
        stored["settings"]["device"] = name
        (tmp_path / "results.json").write_text(json.dumps(stored))
        assert sweep.score_base(train.Settings(), tmp_path, Ranks(), torch.device("cuda:0")) == {"a": {}}
    with pytest.raises(SystemExit):
        sweep.score_base(train.Settings(), tmp_path, Ranks(), torch.device("cpu"))


def test_the_first_process_alone_draws_a_bar(lab, monkeypatch):
    bars = []
    monkeypatch.setattr(train, "tqdm", lambda rows, **how: bars.append(how["disable"]) or rows)
    monkeypatch.setattr(Ranks, "from_first", lambda self, call: call())
    for ranks in (Ranks(1, 2), Ranks(0, 1)):
        monkeypatch.setattr(train, "open_ranks", lambda ranks=ranks: ranks)
        train.main(settings_of(lab, "", {"dry_run": True}))
    assert bars == [True, None]


def test_another_number_of_processes_is_a_warning(lab, capsys):
    record = train.read_record(lab.one("lora", SAME["lora"]))
    assert record["world"] == 1
    train.check_record("run", record, {**record, "world": 2})
    assert "warning: run: world: recorded 1, found 2" in capsys.readouterr().err
    for one, two in (({}, record), (record, {})):  # a record that does not say
        train.check_record("run", {k: v for k, v in record.items() if k != "world"} | one, {k: v for k, v in record.items() if k != "world"} | two)
        assert "world" not in capsys.readouterr().err


def test_optimizer_and_checkpoint_meet_the_parameters_where_they_stay(lab, tmp_path, monkeypatch):
    """FSDP loads on the CPU and trains on GPUs: what AdamW keeps has to be made after the move."""
    order = []
    for call in (train.spread, train.build_optimizer, train.load_checkpoint):
        monkeypatch.setattr(train, call.__name__, lambda *args, call=call: (order.append(call.__name__), call(*args))[1])
    train.main(settings_of(lab, tmp_path / "run", {"steps": 1}))
    assert order == ["spread", "build_optimizer", "load_checkpoint"]


def test_fsdp_is_refused_where_it_is_of_no_use(lab, tmp_path):
    with pytest.raises(ValueError, match="--fsdp cuts the backbone over several processes; start them with: torchrun"):
        train.main(settings_of(lab, tmp_path / "run", {"fsdp": True}))
    with pytest.raises(ValueError, match="--fsdp cuts frozen weights only"):
        train.build_model(train.Settings(**settings_of(lab, "", {**SAME["full"], "fsdp": True})), torch.device("cpu"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", SAME)
def test_two_processes_equal_one(lab, two, name):
    runs, seen = two
    assert [each["ended"] for each in seen[name]] == ["well", "well"], seen[name]
    assert_close(runs / name, lab.one(name, SAME[name]))
    assert len({each["trained"] for each in seen[name]}) == 1  # bit for bit


@pytest.mark.parametrize("name", THREE)
def test_three_processes_equal_one(lab, three, name):
    runs, seen = three
    assert_close(runs / name, lab.one(name, THREE[name]))
    share = 1.0 if name == "lora" else sum(-(-p.shape[0] // 3) * p[0].numel() for p in frozen(lab)) / sum(p.numel() for p in frozen(lab))
    assert set(seen[name][0]["frozen"]) == {share} and all(each["whole"] for each in seen[name])  # process 0 has the larger parts


def frozen(lab):
    """The blocks' weights in the backbone's file."""
    return [p for name, p in load_file(Path(lab.model) / "model.safetensors").items() if ".layers." in name]


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
    assert set(seeds[0]) == {train.dropout_seed(0, step, Ranks()) for step in range(1, RUN["steps"] + 1)}  # process 0 as one alone
    assert_close(runs / "dropout-fsdp", runs / "dropout")  # the same masks, wherever the backbone is


@pytest.mark.slow
def test_compiled_blocks_in_two_processes_equal_one(lab):
    """With DDP and with FSDP2; minutes, as each process compiles."""
    for name, more in (("ddp", {}), ("fsdp", {"fsdp": True})):
        folder = lab.root / f"compiled-{name}"
        settings = settings_of(lab, folder / "run", {**MICRO, "compile": True, **more})
        ended, seen = run_jobs(folder, 2, [{"name": name, "settings": settings, "perturb": True}], limit=900)
        assert ended[0] == 0, ended[2]
        assert_close(folder / "run", lab.one("lora-300", MICRO), norm=1e-5)  # other kernels, other roundings
        assert set(seen[name][1]["frozen"]) == {0.5 if more else 1.0}


# ---------------------------------------------------------------- one writer, one word


def test_the_command_speaks_and_writes_once(lab, tmp_path, monkeypatch, capfd):
    """train.py as it is started, scores and all, without --out: lines and files of one process. Once more into its folder: one error."""
    values = settings_of(lab, "", {"tasks": (str(lab.root / "items.jsonl"),), "log_every": 2, "steps": 3})
    values.pop("out")
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    train.main(values)
    want = capfd.readouterr().out.splitlines()
    code, out, err, _ = torchrun(2, ROOT / "train.py", *test_train.command(values), cwd=tmp_path / "many")
    assert (code, err) == (0, "")
    words = lambda lines: [line.split()[:2] for line in lines]  # noqa: E731
    assert words(out.splitlines()) == words(want) and "run folder: runs/1, 2 processes" in out and len(want) > 12
    names = [sorted(path.relative_to(tmp_path / folder) for path in (tmp_path / folder).rglob("*")) for folder in ("one", "many")]
    assert names[0] == names[1] and Path("runs/1/eval-adapted/records.jsonl") in names[0]
    for kind in ("eval-base", "eval-adapted"):
        assert_same_records(tmp_path / "many/runs/1" / kind, tmp_path / "one/runs/1" / kind)
    before = test_train.contents(tmp_path / "many")
    code, out, err, seconds = torchrun(2, ROOT / "train.py", *test_train.command(values | {"out": "runs/1"}), cwd=tmp_path / "many")
    assert code == 1 and out == "" and "train.py: runs/1: exists; --resume goes on with it" in err
    assert err.count("train.py: ") == 1 and "Traceback" not in err.split(" failed (exitcode: ")[0]  # then torchrun's own
    assert seconds < 30 and test_train.contents(tmp_path / "many") == before


# ---------------------------------------------------------------- stopped, failing


@pytest.mark.parametrize("name", ["nonfinite", "nonfinite-fsdp"])
def test_a_step_that_is_not_finite_stops_all(lab, two, name):
    runs, seen = two
    folder = runs / name / "nonfinite-step-0000004"
    assert [each["ended"] for each in seen[name]] == [f"ValueError: step 4: loss nan, gradient norm nan: stopped before the weights changed; "
                                                      f"its rows and gradients are in {folder}; the last checkpoint is as it was"] * 2
    assert sorted(path.name for path in (runs / name).iterdir()) == ["metrics.jsonl", folder.name, "settings.json", "step-0000002"]
    settings = train.Settings(**settings_of(lab, "", MICRO))
    rows = train.split_dev(train.load_rows((lab.rows,), lab.tokenizer, settings)[0], settings)[0]
    plan = train.plan_steps([row.width for row in rows], settings, settings.micro_tokens)
    micros = [next(plan) for _ in range(4)][3]
    info = json.loads((folder / "step.json").read_text())
    assert [(r["row"], r["ids"]) for r in info["rows"]] == [(n, rows[n].ids) for micro in micros for n in micro] and len(micros) > 1
    assert all(0 < float(r["loss"]) < 100 for r in info["rows"])  # each row by itself is well
    assert len(load_file(folder / "gradients.safetensors")) > 10
    assert [line["step"] for line in test_train.metrics(runs / name) if line["kind"] == "step"] == [1, 2, 3]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_torchrun_ends_all_at_one_step(stopped, name):
    run, (code, _, err, seconds), seen = stopped[name]
    assert code == 1 and seconds < 30 and f"got signal: {signal.Signals[name].value}" in err  # torchrun's own exit code and words
    assert err.count("finishing the step and saving") == (2 if name == "SIGINT" else 1)  # one of each process that hears
    assert [each["ended"] for each in seen[name]] == ["SystemExit: 130"] * 2 and len({each["step"] for each in seen[name]}) == 1
    last = seen[name][0]["step"]
    assert 2 <= last < RUN["steps"] and test_train.metrics(run)[-1]["step"] == last
    assert [path.name for path in run.glob("step-*")] == [f"step-{last:07d}"] and len({each["trained"] for each in seen[name]}) == 1


def test_two_processes_go_on_as_one_three_and_from_one(lab, stopped, two, three):
    resume(lab, stopped["SIGINT"][0], "lora-300", MICRO)
    assert_close(two[0] / "resumed", lab.one("lora", {}))
    assert_close(three[0] / "resumed", lab.one("lora-300", MICRO))
    assert {each["ended"] for seen in (two, three) for each in seen[1]["resumed"]} == {"well"}


@pytest.mark.parametrize("how, process", [pytest.param("kill", 0, marks=pytest.mark.slow), ("raise", 1)])
def test_a_process_that_dies_ends_the_command(lab, tmp_path, how, process):
    """At once, with what torchrun says; the run goes on from its last checkpoint in one process."""
    settings = settings_of(lab, tmp_path / "run", MICRO)
    (code, _, err, seconds), seen = run_jobs(tmp_path, 2, [{"name": how, "settings": settings, "perturb": True, "die": [how, process, 3]}])
    assert code == 1 and seconds < 30 and seen[how] == []
    assert ("exitcode  : -9" if how == "kill" else "RuntimeError: this process fails") in err
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-0000002"]
    resume(lab, tmp_path / "run", "lora-300", MICRO)


@pytest.mark.slow
def test_a_full_disk_at_the_writer_ends_the_command(lab, tmp_path):
    settings = settings_of(lab, tmp_path / "run", MICRO)
    (code, _, err, seconds), _ = run_jobs(tmp_path, 2, [{"name": "full", "settings": settings, "perturb": True, "limit": 4000}])
    assert code == 1 and seconds < 30 and f"{tmp_path / 'run'}: cannot be written: " in err
    resume(lab, tmp_path / "run", "lora-300", MICRO)


# ---------------------------------------------------------------- scores


def score_of(lab, out, changes):
    """Settings of a score of the tiny backbone."""
    return {**SCORE, "backbone": lab.model, "out": str(out), **changes}


def assert_same_records(found, want):
    """The same records in the same order, log-likelihoods to float32's digits, and the same table."""
    mine, other = ([json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()] for folder in (found, want))
    loose = lambda record: [record["reference_logprob"] or 0, *record.get("logprobs", [])]  # noqa: E731
    fixed = lambda record: {k: v for k, v in record.items() if k not in ("reference_logprob", "logprobs")}  # noqa: E731
    assert [fixed(record) for record in mine] == [fixed(record) for record in other] and mine
    assert [loose(record) for record in mine] == [pytest.approx(loose(record), rel=1e-5) for record in other]
    tasks = [json.loads((folder / "results.json").read_text())["tasks"] for folder in (found, want)]
    plain = lambda each: {name: {k: v for k, v in task.items() if not isinstance(v, float)} for name, task in each.items()}  # noqa: E731
    assert plain(tasks[0]) == plain(tasks[1])
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in want.iterdir()) == ["records.jsonl", "results.json"]


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_two_processes_equal_one(lab, two, tmp_path, name):
    evaluation.score(evaluation.Settings(**score_of(lab, tmp_path / "one", SCORES[name])))
    assert_same_records(two[0] / name, tmp_path / "one")
    if name == "sampled":
        records = [json.loads(line) for line in (tmp_path / "one/records.jsonl").read_text().splitlines()]
        assert [r["sample"] for r in records] == [0, 1, 2] * 5 and len({r["completion"] for r in records}) > 5


def test_scores_of_fewer_items_than_processes(lab, three, tmp_path):
    evaluation.score(evaluation.Settings(**score_of(lab, tmp_path / "one", {"limit": 2})))
    assert_same_records(three[0] / "few", tmp_path / "one")


def test_a_score_that_broke_off_keeps_its_finished_task(two):
    seen = two[1]
    assert [each["ended"] for each in seen["broken"]] == ["ValueError: broken"] * 2 and [each["tasks"] for each in seen["broken"]] == [2, 2]
    assert [each["tasks"] for each in seen["greedy"]] == [1, 1]  # the other came from the file


def test_eval_py_speaks_once(lab, tmp_path, capfd):
    """As it is started, programs in the sandbox too; a bad word ends it."""
    values = score_of(lab, tmp_path / "one", {"tasks": ("code", str(lab.root / "items.jsonl")), "limit": 3, "allow_code_execution": True})
    evaluation.say_protections.cache_clear()
    evaluation.score(evaluation.Settings(**values))
    want = capfd.readouterr().out.splitlines()
    code, out, err, _ = torchrun(2, ROOT / "eval.py", *test_train.command(values | {"out": str(tmp_path / "many")}))
    assert (code, err) == (0, "")
    assert [line.split()[:1] for line in out.splitlines()] == [line.split()[:1] for line in want]
    assert_same_records(tmp_path / "many", tmp_path / "one")
    code, out, err, seconds = torchrun(2, ROOT / "eval.py", "--tasks", "nosuch", "--out", tmp_path / "bad")
    assert code == 1 and out == "" and "eval.py: " in err and "nosuch" in err and seconds < 30 and not (tmp_path / "bad").exists()


if __name__ == "__main__":
    with contextlib.suppress(IndexError):
        serve(Path(sys.argv[1]))
