"""train.py: batches, loss, optimizer, runs on disk and resuming; traps as TRAPS.md numbers them.

Where sums are made in another order the tolerance is n u sum |terms|: float32 is never further off.
"""

import contextlib
import itertools
import json
import math
import re
import shutil
import signal
from dataclasses import fields
from functools import partial, partialmethod
from pathlib import Path

import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import ROOT
from runs import Stopped, assert_same, assert_same_tensors, contents, flags, metrics, names
from runs import perturb, python, start, stop_at, tensors
from safetensors.torch import load_file, save_file

import train
from common import Ranks, file_hash, folder_hash, generator, parse_cli, read_json, run_script
from data.chat import Row, load_tokenizer
from model import Block, load_model
from talan import group_of, load_adapter, recorded_backbone

tiny = runs.tiny
U = 2.0**-24  # the unit roundoff of float32
SETTINGS = train.Settings(step_tokens=512)
FULL = {"scope": "full", "adapter": "none", "talan": False}
MLP = {"adapter": "dora", "mixer": "mlp", "writeback": "bounded", "site": "attention"}


def build(tiny, **changes):
    """The model of a short run, at its start."""
    settings = train.Settings(**flags(tiny, "", **changes))
    return train.build_model(settings, torch.device("cpu"))


def split_rows(tiny, **changes):
    """[training rows, held-out rows] of such a run."""
    return train.load_data(train.Settings(**flags(tiny, "", **changes)), tiny.tokenizer, Ranks())


def losses(run, kind="step"):
    return [line["loss"] for line in metrics(run) if line["kind"] == kind]


# ---- batches ----

WIDTHS = (16 * torch.randint(1, 8, (400,), generator=generator("widths"))).tolist()


def flat(step):
    return [n for micro in step for n in micro]


def padded(rows):
    return len(rows) * max(WIDTHS[n] for n in rows)


@pytest.mark.parametrize("step, micro", [(512, 0), (512, 128), (120, 120), (10_000, 777)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_once_an_epoch_within_the_budgets(step, micro, epoch):
    settings = train.Settings(step_tokens=step)
    plan = train.plan_epoch(WIDTHS, settings, micro, epoch)
    assert sorted(n for groups in plan for n in flat(groups)) == list(range(400))
    for groups in plan:
        assert padded(flat(groups)) <= step
        assert all(padded(rows) <= (micro or step) for rows in groups)
        for rows, after in itertools.pairwise(groups):  # none is split without need
            assert padded([*rows, after[0]]) > micro
    whole = train.plan_epoch(WIDTHS, settings, 0, epoch)  # micro-batches only split a step
    assert [flat(groups) for groups in plan] == [groups[0] for groups in whole]
    assert train.pack([0, 1, 2, 3], [3, 9, 4, 4], 8) == [[0], [1], [2, 3]]  # 9 goes alone
    fed = [train.padded_width(Row([5] * n, [True] * n)) for n in (2, 17, 18, 33)]
    assert fed == [16, 16, 32, 32]  # all but the last token


def test_trap_15_the_order_is_a_function_of_seed_and_epoch():
    plans = []
    for global_seed, seed, epoch in itertools.product((1, 2), (0, 1), (0, 1)):
        torch.manual_seed(global_seed)
        settings = train.Settings(step_tokens=512, seed=seed)
        plans.append(train.plan_epoch(WIDTHS, settings, 128, epoch))
    assert plans[:4] == plans[4:]
    assert all(a != b for a, b in itertools.combinations(plans[:4], 2))
    first, second, *_ = plans
    endless = list(itertools.islice(train.plan_steps(WIDTHS, SETTINGS, 128, 0), 300))
    assert endless[: len(first + second)] == first + second
    for done in (1, len(first), len(first) + 7, len(first + second) + 1):  # in a later epoch
        resumed = train.plan_steps(WIDTHS, SETTINGS, 128, done)
        assert list(itertools.islice(resumed, 50)) == endless[done : done + 50]


def test_rows_that_are_long_or_without_a_label_are_counted(tiny, tmp_path):
    """Dropped, or cut; a cut row must have something left to learn."""
    texts = [("hi", "7"), ("hi", "7 " * 60), ("7 " * 60, "7")]
    lines = [json.dumps({"prompt": a, "completion": b}) for a, b in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    def load(**changes):
        settings = train.Settings(**changes)
        rows, counts = train.load_rows((str(tmp_path / "rows.jsonl"),), tiny.tokenizer, settings)
        return rows, [counts[name] for name in ("read", "too long", "truncated", "unlabelled")]

    rows, counts = load()
    assert len(rows) == 3 and counts == [3, 0, 0, 0]
    cut = Row(rows[1].ids[:50], rows[1].supervised[:50])
    assert load(max_tokens=50, truncate=True) == ([rows[0], cut], [3, 0, 2, 1])
    for budget in ("max_tokens", "step_tokens", "micro_tokens"):  # a row fits into a micro-batch
        assert load(**{budget: len(rows[0].ids)}) == (rows[:1], [3, 2, 0, 0])
    with pytest.raises(ValueError, match="rows.jsonl: no usable row.*'too long': 3"):
        load(max_tokens=3)


def test_held_out_rows_are_drawn_by_the_seed_alone_or_read(tiny, tmp_path):
    rows, dev = split_rows(tiny)
    (tmp_path / "dev.jsonl").write_text('{"prompt": "hi", "completion": "7"}\n')
    everything, own = split_rows(tiny, dev_data=(str(tmp_path / "dev.jsonl"),))
    assert len(own) == 1 and sorted(rows + dev, key=str) == sorted(everything, key=str)
    assert len(dev) == 8 and split_rows(tiny, adapter="dora", steps=9) == [rows, dev]
    assert split_rows(tiny, seed=1) != [rows, dev]
    with pytest.raises(ValueError, match="dev-rows: expected 1 to 61, found 62"):
        split_rows(tiny, dev_rows=62)


# ---- loss ----


@torch.no_grad()
def slow_loss(model, rows):
    """Mean cross-entropy over the supervised tokens of rows, one row at a time, in float64."""
    found = []
    for row in rows:
        scores = model.logits(model(torch.tensor([row.ids])))[0].double().log_softmax(-1)
        learnt = [t for t in range(1, len(row.ids)) if row.supervised[t]]
        found += [-scores[t - 1, row.ids[t]].item() for t in learnt]
    return sum(found) / len(found)


@pytest.mark.parametrize("changes", [{}, MLP, FULL], ids=["lora", "dora", "full"])
def test_trap_1_eight_rows_equal_four_times_two(tiny, monkeypatch, changes):
    """Sums of some 500 terms are off by at most 500 u = 3e-5 of them, a mean of means by 0.01."""
    perturb(monkeypatch)
    model = build(tiny, **changes)
    rows = sorted(split_rows(tiny)[0], key=train.padded_width)[::7]
    count = sum(sum(row.supervised[1:]) for row in rows)
    found = []
    for size in (8, 2):
        groups = [rows[i : i + size] for i in range(0, 8, size)]
        batches = [train.make_batch(group, "cpu") for group in groups]
        total = train.add_gradients(model, model, batches, count, Ranks())
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad(set_to_none=True)
        assert total.item() / count == pytest.approx(slow_loss(model, rows), rel=3e-5)
    assert len({len(batch.targets) for batch in batches}) == 4
    for name, whole in found[0].items():
        assert whole.any() and (whole - found[1][name]).norm() <= 3e-5 * whole.norm(), name


def test_trap_1_every_step_is_the_mean_over_its_tokens_also_the_short_last_one(tiny, tmp_path):
    """The rate is too small to change a float32: all steps see the model of the start."""
    changes = {"lr": 1e-12, "micro_tokens": 200, "steps": 0, "eval_every": 0}
    run = start(tiny, tmp_path / "run", **changes)
    (rows, dev), model = split_rows(tiny, **changes), load_model(tiny.model)
    plan = train.plan_epoch(list(map(train.padded_width, rows)), SETTINGS, 200, 0)
    step_rows = [list(map(rows.__getitem__, flat(step))) for step in plan]
    assert losses(run) == pytest.approx([slow_loss(model, some) for some in step_rows], rel=3e-5)
    assert losses(run, "dev") == pytest.approx([slow_loss(model, dev)] * 2, rel=3e-5)
    assert min(map(len, step_rows)) < max(map(len, step_rows)) and max(map(len, plan)) > 2


@pytest.mark.parametrize("N, V", [(1, 3), (7, 11), (2100, 4096)])  # the last in two chunks
def test_cross_entropy_and_its_gradients(N, V):
    """Against float64, within what float32 is off in a softmax of V and a sum of N or V."""
    g = generator("cross-entropy")
    hidden, weight = torch.randn(N, 4, generator=g), torch.randn(V, 4, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = train.CrossEntropySum.apply(a, b, targets, True)
    (0.25 * loss).backward()
    x, y = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = x @ y.T
    want = F.cross_entropy(logits, targets, reduction="sum")
    (0.25 * want).backward()
    error = (V + 8 * (hidden.abs() @ weight.abs().T).max().item() + 16) * U  # of exp(logit)
    assert loss.item() == pytest.approx(want.item(), rel=error + N * U)
    terms = 0.25 * (logits.detach().softmax(-1) + F.one_hot(targets, V))  # (N,V)
    sizes = [(V, terms @ weight.double().abs()), (N, terms.T @ hidden.double().abs())]
    for found, exact, (n, size) in zip((a, b), (x, y), sizes):
        bound = (error + n * U) * size
        assert ((found.grad - exact.grad).abs() <= bound).all()
        assert bound.norm() < 0.01 * exact.grad.norm()
    frozen = hidden.clone().requires_grad_()
    train.CrossEntropySum.apply(frozen, weight, targets, True).backward()  # a head that is frozen
    assert torch.equal(0.25 * frozen.grad, a.grad) and weight.grad is None
    with torch.no_grad():
        assert torch.equal(train.CrossEntropySum.apply(hidden, weight, targets, False), loss)


def test_cross_entropy_in_bfloat16_is_summed_in_float32():
    """Its logits are bfloat16's, the rest is float32's but for the last product: u is 2^-9."""
    g = generator("bf16")
    hidden, weight = (torch.randn(n, 16, generator=g).bfloat16() for n in (300, 50))
    targets = torch.randint(0, 50, (300,), generator=g)
    a = hidden.clone().requires_grad_()
    loss = train.CrossEntropySum.apply(a, weight, targets, True)
    loss.backward()
    logits = (hidden @ weight.T).double().requires_grad_()  # rounded as there
    want = F.cross_entropy(logits, targets, reduction="sum")
    want.backward()
    assert loss.dtype == torch.float32 and a.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(want.item(), rel=1000 * U)  # a bfloat16 is off by 2e-3
    exact, sizes = logits.grad @ weight.double(), logits.grad.abs() @ weight.double().abs()
    assert ((a.grad - exact).abs() <= 3 * 2**-9 * sizes).all()


# ---- optimizer ----

RATES = {  # warmup, steps: 0.1 + 0.45 (1 + cos(pi (step - rise) / (steps - rise))) of the peak
    (0.2, 10): {1: 0.5, 2: 1.0, 3: 0.96574579, 4: 0.86819805, 6: 0.55, 10: 0.1},
    (0.0, 3): {1: 1.0, 2: 0.55, 3: 0.1},
    (0.5, 1): {1: 1.0},
    (1.0, 4): {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0},
}


@pytest.mark.parametrize("warmup, steps", RATES)
def test_learning_rate(warmup, steps):
    settings, table = train.Settings(lr=2.0, min_lr=0.1, warmup=warmup), RATES[warmup, steps]
    found = {step: train.learning_rate(step, steps, settings) / 2 for step in table}
    assert found == pytest.approx(table)


def test_the_side_path_is_a_group_with_a_rate_of_its_own(tiny, tmp_path):
    """Adam's first step moves what has a gradient by the rate."""
    for talan, groups in ((True, ["adapter", "side path"]), (False, ["adapter"])):
        model = build(tiny, talan=talan)
        optimizer = train.build_optimizer(model, train.Settings(weight_decay=0.25))
        for group, what in zip(optimizer.param_groups, groups, strict=True):
            own = [p for name, p in model.named_parameters() if group_of(name) == what]
            assert list(map(id, group["params"])) == list(map(id, own))
            assert group["weight_decay"] == 0.25
    run = start(tiny, tmp_path / "run", talan_lr_scale=3.0, steps=1)
    moved, rate = tensors(run), metrics(run)[2]["lr"]
    for name, factor in (("layers.1.side_path.w_out", 3), ("layers.0.mlp.up_proj.lora_B", 1)):
        found = moved[f"train_state.safetensors parameter.model.{name}"].abs().max()
        assert found.item() == pytest.approx(factor * rate, rel=1e-3)


@pytest.mark.parametrize("clip", [1e-3, 0.0])
def test_gradients_are_clipped_to_the_global_norm(tiny, tmp_path, clip):
    """Adam's first moment after one step is 0.1 times the clipped gradient."""
    run = start(tiny, tmp_path / "run", steps=1, clip=clip)
    moments = [t for name, t in tensors(run).items() if " optimizer.exp_avg." in name]
    norm, found = torch.cat([m.flatten() for m in moments]).norm(), metrics(run)[2]["grad_norm"]
    assert found > 0.01 and norm.item() == pytest.approx(0.1 * (clip or found), rel=1e-4)


def test_trap_10_what_trains_over_a_bfloat16_backbone_is_float32_and_moves(tiny, tmp_path):
    found = tensors(start(tiny, tmp_path / "run", dtype="bfloat16", lr=1e-4, warmup=0.0))
    assert {t.dtype for t in found.values()} == {torch.float32}
    for name, p in build(tiny, dtype="bfloat16").named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        if p.requires_grad:
            assert not torch.equal(found[f"train_state.safetensors parameter.{name}"], p), name


# ---- what must change nothing ----


@pytest.mark.parametrize("change", ["evaluation", "checkpointing"])
def test_trap_15_what_changes_no_step(tiny, tmp_path, change):
    often = int(change == "evaluation")
    torch.manual_seed(1)
    one = start(tiny, tmp_path / "one", dropout=0.2, eval_every=often, checkpointing=not often)
    torch.manual_seed(2)
    two = start(tiny, tmp_path / "two", dropout=0.2, eval_every=0)
    assert_same_tensors(tensors(one), tensors(two))
    assert losses(one) == losses(two) and len(losses(two, "dev")) == 2  # at 0 and at the end
    assert len(losses(one, "dev")) == 2 + 3 * often


def test_deterministic_asks_torch_for_it(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    start(tiny, tmp_path / "run", deterministic=True, steps=1)
    assert asked == [True]


def test_a_pair_with_and_without_side_path_differs_by_it_alone(tiny, tmp_path):
    """Rows, dropout and starts are the same: while w_out is 0 losses are equal, bit for bit."""
    one, two = (start(tiny, tmp_path / str(on), dropout=0.2, talan=on) for on in (True, False))
    assert losses(one)[0] == losses(two)[0] and losses(one)[2] != losses(two)[2]
    assert losses(one, "dev")[0] == losses(two, "dev")[0]
    beside = start(tiny, tmp_path / "beside", dropout=0.2, scope="adapter")  # it never learns
    adapter = {name: t for name, t in tensors(beside).items() if "talan." not in name}
    assert_same_tensors(adapter, tensors(two))
    assert losses(beside) == losses(two)


# ---- the command line ----


def exit_line(words):
    """What train.py says on its way out: exactly one line."""
    with pytest.raises(SystemExit) as end:
        run_script(train.main, train.Settings, "train.py", words)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def test_help_lists_every_flag_and_its_default():
    done = python(ROOT / "train.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    known = {"--" + field.name.replace("_", "-") for field in fields(train.Settings)}
    assert known <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert "peak learning rate (default: 0.001)" in re.sub(r"\s+", " ", done.stdout)


PARSED = {
    "": {},
    "--layers 0,1 --no-talan --lr 1e-4": {"layers": ("0", "1"), "talan": False, "lr": 1e-4},
    "--data a b --resume --out runs/1": {"data": ("a", "b"), "resume": True, "out": "runs/1"},
    "--dropuot 0.1 --drop 0.1": "unrecognized arguments: --dropuot 0.1 --drop 0.1",
    "--rank four": "--rank: invalid int value: 'four'",
    "--lr": "--lr: expected one argument",
}


@pytest.mark.parametrize("words", PARSED)
def test_a_command_line_becomes_settings_or_one_line(words):
    if isinstance(PARSED[words], dict):
        assert parse_cli(train.Settings, "train.py", words.split()) == PARSED[words]
    else:
        assert f"{PARSED[words]} (--help lists every flag)" in exit_line(words.split())


def test_settings_are_finite_and_in_range():
    wrong = [{"warmup": 1.5}, {"min_lr": 1.01}, {"lr": 0.0}, {"epochs": 0.0}, {"max_tokens": 0}]
    real = "lr epochs warmup min_lr weight_decay clip talan_lr_scale dev_rows steps save_every"
    wrong += [{name: value} for name in real.split() for value in (math.inf, math.nan, -1)]
    accepted = []
    for changes in wrong:
        with contextlib.suppress(ValueError):
            accepted.append((changes, train.Settings(**changes)))
    assert accepted == []
    assert train.Settings(warmup=1.0, min_lr=1.0, clip=0.0, steps=0, save_every=0).warmup == 1


REFUSED = [  # a file that has changed since; words; what the line says. Nothing else happens
    ("", "", "run: exists; --resume resumes a run, --overwrite deletes it"),
    ("", "--resume --steps 9 --seed 7", "run: resumes by its own settings: steps 1, not 9, seed 0"),
    ("", "--resume --overwrite", "run: resumes by its own settings: overwrite False, not True"),
    ("rows.jsonl", "--resume", "run: began with data_sha256 {'rows.jsonl': '"),
    ("dev.jsonl", "--resume", "run: began with data_sha256 {'rows.jsonl': '"),
    ("model/model.safetensors", "--resume", "run: began with backbone_sha256 "),
    ("model/tokenizer_config.json", "--resume", "run: began with backbone_sha256 "),
    ("", "--overwrite --out model", "model: exists"),
    ("", "--overwrite --tasks mbpp", "mbpp: run what the model writes; --allow-code-execution"),
    ("", "--overwrite --tasks model.jsonl", "model.jsonl: expected a readable JSONL file"),
    ("", "--overwrite --fsdp", "fsdp: needs torchrun"),
    ("", "--overwrite --scope full --dtype bfloat16", "scope full trains the backbone: expected"),
    ("", "--overwrite --adapter none --no-talan", "scope 'joint': expected one of"),
    ("", "--overwrite --alpha 0", "adapter: a setting has no such value"),
    ("", "--overwrite --mixer conv", "side path: an axis has no such value"),
    ("", "--overwrite --layers=-1,first", "layers: expected indices or fractions"),
    ("", "--overwrite --layers 9", "layers: expected distinct ones below 2"),
]
LOCAL = "--backbone model --data rows.jsonl --dev-data dev.jsonl --out run --tasks none --steps 1"


def local(*words):
    """What a command says that begins with LOCAL."""
    return parse_cli(train.Settings, "train.py", [*LOCAL.split(), "--device", "cpu", *words])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A folder with model, rows.jsonl, dev.jsonl and a run of one step on them."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny.model, folder / "model")
    lines = Path(tiny.rows).read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[8:]))
    (folder / "dev.jsonl").write_text("".join(lines[:8]))
    with contextlib.chdir(folder):
        train.main(local())
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "here"))
    return Path()


@pytest.mark.parametrize("file, words, line", REFUSED, ids=lambda value: value[:40])
def test_a_refusal_is_one_line_and_costs_nothing(here, file, words, line):
    for name in file.split():
        weights, data = name.endswith("safetensors"), bytearray(Path(name).read_bytes())
        data[-1] ^= weights  # the last bit of the last weight
        Path(name).write_bytes(data if weights else data + b"\n")
    before = contents(here)
    assert exit_line([*LOCAL.split(), *words.split()]).startswith(f"train.py: {line}")
    assert contents(here) == before


def test_overwrite_begins_anew_and_without_out_the_next_number_is_taken(here):
    before = metrics(here / "run")
    for words in (("--overwrite", "--seed", "3"), ("--out", ""), ("--out", "")):
        train.main(local(*words))
    assert read_json(here / "run/settings.json")["seed"] == 3 and names(here / "runs") == {"1", "2"}
    assert metrics(here / "run")[2:] != before[2:] == metrics(here / "runs/2")[2:]


def test_what_is_not_as_it_was_when_the_run_began_is_named(here, capsys):
    file = here / "run/metrics.jsonl"
    file.write_text(file.read_text().replace('"world": 1', '"world": 2'))
    train.main(local("--resume"))
    assert capsys.readouterr().err.startswith("warning: run: world was 2, is 1\n")


def test_a_dry_run_prints_and_writes_nothing(here, capsys):
    before = contents(here)
    train.main(local("--dry-run", "--out", ""))
    train.main(local("--dry-run"))
    assert contents(here) == before
    out = capsys.readouterr().out
    for text in ("trainable side path", "\nrows: 54 read, 0 too long", "\nheld-out rows: 8 read"):
        assert text in out
    assert '"rank": 16' in out and " supervised (" in out and " steps an epoch\n" in out
    batch = out.split("supervised tokens in [[ ]]:\n")[1].split("\nbackbone ")[0].split("\n---\n")
    for row in batch:
        assert row.count("[[") == row.count("]]") == 1
        assert "<|im_start|>assistant\n[[" in row and row.rstrip().endswith("<|im_end|>]]")


# ---- a run ----

SAVED = {"adapter_config.json", "adapter_model.safetensors", "train_state.safetensors"}
SAVED |= {"talan_config.json", "talan.safetensors", "train_state.json"}


def test_the_command_trains_saves_and_scores(tiny, tmp_path):
    """On the embedded model, from the shell."""
    words = f"--data {tiny.rows} --tasks math,science --limit 3 --steps 3 --step-tokens 1024"
    words += " --dev-rows 8 --out run --device cpu --save-every 2"
    done = python(ROOT / "train.py", *words.split(), cwd=tmp_path)
    run, evals = tmp_path / "run", ["eval-adapted", "eval-base"]
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert names(run) == {"step-0000003", "metrics.jsonl", "settings.json", *evals}
    assert names(run / "step-0000003") == SAVED
    record, *lines = metrics(run)
    kinds = " ".join(f"{line['kind']} {line['step']}" for line in lines)
    assert kinds == "dev 0 step 1 step 2 step 3 dev 3"
    assert lines[1].keys() == set("kind step loss lr grad_norm tokens supervised".split())
    assert (record["kind"], record["step"], record["steps"], record["world"]) == ("run", 0, 3, 1)
    assert record["data_sha256"] == {tiny.rows: file_hash(tiny.rows)}
    assert record["backbone_sha256"] == folder_hash(ROOT / "data/tiny/model")
    assert read_json(run / "settings.json")["tasks"] == ["math", "science"]
    table = [line.split() for line in done.stdout.splitlines()]
    table = table[table.index("task n base adapted difference".split()) :]
    after, before = (read_json(run / name / "results.json")["tasks"] for name in evals)
    for task, row in zip(("math", "science"), table[1:]):
        a, b = before[task]["score"], after[task]["score"]
        assert row == [task, "3", f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"]
    assert table[3][0] == "mean" and table[-1] == ["wrote", "run"]


def test_a_checkpoint_holds_the_run_and_loads(tiny, tmp_path):
    run, model = start(tiny, tmp_path / "run", dropout=0.2), load_model(tiny.model)
    assert names(run) == {"step-0000004", "metrics.jsonl", "settings.json"}  # --tasks none
    load_adapter(model, run)
    learnt = {f"parameter.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    state = load_file(run / "step-0000004/train_state.safetensors")
    assert_same_tensors({k: t for k, t in state.items() if k.startswith("parameter.")}, learnt)
    own = r"base_model\.model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
    adapter = load_file(run / "step-0000004/adapter_model.safetensors")
    assert len(adapter) == 28 and all(re.fullmatch(own, name) for name in adapter)
    own_loss = slow_loss(model, split_rows(tiny)[1])
    assert losses(run, "dev")[1] == pytest.approx(own_loss, rel=3e-5)


@pytest.mark.parametrize("changes", [{}, {"adapter": "dora", "talan": True}], ids=["bare", "all"])
def test_scope_full_saves_a_backbone_that_is_scored(tiny, tmp_path, capsys, changes):
    """step-N is a Hugging Face folder and, beside it, adapter and side path if there are any."""
    run = start(tiny, tmp_path / "run", **FULL | changes, tasks=("science",), limit=2)
    model = load_model(run)
    if changes:
        with pytest.raises(ValueError, match="trained together with the backbone"):
            load_adapter(load_model(tiny.model), run)
        assert recorded_backbone(run) == str(run)
        load_adapter(model, run)
    state = load_file(run / "step-0000004/train_state.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(p, state[f"parameter.{name}"]), name
    assert not torch.equal(model.head_weight, load_model(tiny.model).head_weight)
    assert load_tokenizer(run).encode("7 * 8") == tiny.tokenizer.encode("7 * 8")
    own_loss = slow_loss(model, split_rows(tiny)[1])
    assert losses(run, "dev")[1] == pytest.approx(own_loss, rel=3e-5)
    table = capsys.readouterr().out.split("difference\n")[1].splitlines()
    assert table[0].split()[:2] == ["science", "2"] and table[1].startswith("mean")


@pytest.mark.parametrize("site", ["block", "attention"])
def test_blocks_of_any_length_stay_compiled(tiny, monkeypatch, site):
    """Rows of 1 to 1,000 tokens: few graphs, and the limit at which torch gives up is never met."""
    compiled = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(Block, "compile", compiled)
    model = build(tiny, compile=True, site=site).train()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in (1, 2, 16, 48, 127, 128, 129, 300, 500, 640, 1000):
            model(torch.ones(2, length, dtype=torch.int64)).sum().backward()
    counted = torch._dynamo.utils.counters
    assert counted["frames"]["total"] == counted["frames"]["ok"]
    assert 2 <= counted["stats"]["unique_graphs"] <= 8


@pytest.mark.slow
def test_compiled_blocks_agree_with_eager(tiny, tmp_path):
    """Its kernels sum in another order: of losses up to 10 some 100 u."""
    one, two = (start(tiny, tmp_path / str(on), compile=on, steps=2) for on in (True, False))
    assert losses(one) == pytest.approx(losses(two), abs=1e-4)


# ---- stopped and resumed ----

RESUMED = {"steps": 6, "save_every": 2, "eval_every": 3, "step_tokens": 2048, "dropout": 0.1}


def stop_and_resume(tiny, run, step, **changes):
    """A run that ends after `step` without saving it, and then goes on to the end."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        start(tiny, run, **changes)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')  # a line half written
    return start(tiny, run, resume=True, **changes)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Six steps in one go, more than an epoch."""
    return start(tiny, tmp_path_factory.mktemp("resume") / "whole", **RESUMED)


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_resumes_from_its_last_checkpoint(tiny, tmp_path, whole, step):
    """Or from the start; step 5 lies in a later epoch. A finished run stays as it is."""
    run = stop_and_resume(tiny, tmp_path / "run", step, **RESUMED)
    assert_same(run, whole)
    before = contents(run)
    start(tiny, run, resume=True, **RESUMED)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_finishes_the_step_and_saves(tiny, tmp_path, monkeypatch, whole, name, step):
    """Exit code 130, unless it was the last step."""
    run, number = tmp_path / "run", getattr(signal, name)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, step, partial(signal.raise_signal, number))
        with contextlib.nullcontext() if step == 6 else pytest.raises(SystemExit, match="130"):
            start(tiny, run, **RESUMED)
    assert names(run) == {f"step-000000{step}", "metrics.jsonl", "settings.json"}
    assert signal.getsignal(number) == handler  # scoring follows, and can be interrupted
    assert_same(start(tiny, run, resume=True, **RESUMED), whole)


OPTIMIZERS = {"SGD": {"momentum": 0.9}, "Adagrad": {}, "RMSprop": {"centered": True}}
KINDS = [*OPTIMIZERS, {"scope": "talan", "adapter": "none"}, {"scope": "writeback", **MLP}, FULL]
KINDS += [{"scope": "adapter", "talan": False, "adapter": "rslora"}, {"grad_scale": 0.0}]
KINDS += [{"dtype": "bfloat16", "micro_tokens": 200, "weight_decay": 0.1, "adapter": "dora"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_run_resumes(tiny, tmp_path, monkeypatch, kind):
    """With another optimizer, too, whatever it keeps for a parameter."""

    def build_another(model, settings):
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}]
        return getattr(torch.optim, kind)(groups, lr=settings.lr, **OPTIMIZERS[kind])

    if isinstance(kind, str):
        monkeypatch.setattr(train, "build_optimizer", build_another)
    changes = {"save_every": 2} | (kind if isinstance(kind, dict) else {})
    done = start(tiny, tmp_path / "whole", **changes)
    assert_same(stop_and_resume(tiny, tmp_path / "run", 3, **changes), done)
    assert any(" optimizer." in name for name in tensors(done))


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    run, name = start(tiny, tmp_path / "run"), "parameter.model.layers.0.mlp.up_proj.lora_B"
    file = run / "step-0000004/train_state.safetensors"
    state = load_file(file)
    save_file(state | {name: state[name][:1]}, file)  # it would be broadcast
    with pytest.raises(ValueError, match=f"step-0000004: of other settings .*\n *shape: {name} "):
        start(tiny, run, resume=True)


@pytest.mark.parametrize("what", ["loss nan", "loss inf", "gradient nan", "gradient 1e30"])
def test_a_step_that_is_not_finite_is_refused(tiny, tmp_path, monkeypatch, what):
    """The line names step and rows; the checkpoint stays, and the run resumes from it."""
    changes, run = {"save_every": 2, "micro_tokens": 200}, tmp_path / "run"
    done = start(tiny, tmp_path / "whole", **changes)
    (kind, value), calls, add = what.split(), [], train.add_gradients

    def spoil(ddp_model, model, *args):
        calls.append(contents(run))
        total = add(ddp_model, model, *args)
        if len(calls) == 4 and kind == "loss":
            return total * float(value)
        if len(calls) == 4:
            next(p for p in model.parameters() if p.requires_grad).grad[1, 0] = float(value)
        return total

    monkeypatch.setattr(train, "add_gradients", spoil)
    widths = [train.padded_width(row) for row in split_rows(tiny)[0]]
    plan = train.plan_steps(widths, SETTINGS, 200, 3)
    with pytest.raises(ValueError, match="^step 4: loss .*, gradient norm .*whole") as error:
        start(tiny, run, **changes)
    assert f"rows {next(plan)};" in str(error.value) and "\n" not in str(error.value)
    assert contents(run) == calls[3] and names(run) >= {"step-0000002"}
    assert_same(start(tiny, run, resume=True, **changes), done)
