"""Break the sources on purpose, one small realistic fault at a time, and show that the suite goes red for each.

    python tests/mutants.py                 all of them, two at a time; exit code 1 when one survives
    python tests/mutants.py --only dora     those with "dora" in the name

Each mutant is a copy of the repository in a temporary folder with one passage replaced; the working tree is never touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.settings import parse, setting


@dataclass(frozen=True)
class Settings:
    """Run the mutants and report which survive."""

    only: str = setting("", "only mutants with this in their name")
    workers: int = setting(2, "mutants tried at once")


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, `old` (found exactly once) becomes `new`; `tests` are expected to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MODEL, TALAN, TRAIN, EVAL = (
    "test_model.py",
    "test_oracle.py test_talan.py test_peft.py",
    "test_train.py test_labels.py",
    "test_eval.py",
)
HOSTILE, RANDOM = "test_hostile.py", "test_properties.py"
BENCH, COMPARE, RULES, PREPARE, SANDBOX, INSIDE, COST = (
    "test_benchmarks.py",
    "test_compare.py",
    "test_verdicts.py",
    "test_prepare.py",
    "test_sandbox.py",
    "test_internals.py",
    "test_overhead.py",
)
CRASH, NUMBERS, REPEAT, SWEEP, RANKS = (
    "test_crash.py",
    "test_numbers.py",
    "test_repeat.py",
    "test_sweep.py",
    "test_ranks.py",
)
MUTANTS = [
    Mutant("mask off by one", "model.py", "+ 1) <= positions[", "+ 1) < positions[", MODEL),
    Mutant(
        "mask sees one token ahead",
        "model.py",
        "+ 1) <= positions[:, None, :, None]",
        "+ 1) <= positions[:, None, :, None] + 1",
        MODEL,
    ),
    Mutant(
        "rope position off after the cache",
        "model.py",
        "positions = cache.lengths[:, None] + positions",
        "positions = cache.lengths[:, None] + positions + 1",
        MODEL,
    ),
    Mutant(
        "rope halves swapped sign",
        "model.py",
        "a * cos - b * sin, b * cos + a * sin",
        "a * cos + b * sin, b * cos - a * sin",
        MODEL,
    ),
    Mutant(
        "llama3 blend inverted",
        "model.py",
        "(1 - blend) * freq / s.factor + blend * freq",
        "blend * freq / s.factor + (1 - blend) * freq",
        MODEL,
    ),
    Mutant(
        "old rope spelling ignored",
        "model.py",
        'for name in ("rope_scaling", "rope_parameters")]',
        'for name in ("rope_parameters",)]',
        MODEL,
    ),
    Mutant(
        "qk norm on the wrong eps",
        "model.py",
        "self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)",
        "self.k_norm = RMSNorm(self.head_dim, 0.1)",
        MODEL,
    ),
    Mutant(
        "cache counts the pads",
        "model.py",
        '(tokens if lengths is None else lengths.to("cpu", torch.int64))',
        "tokens",
        MODEL,
    ),
    Mutant(
        "last token of the batch, not of the row",
        "model.py",
        "hidden[torch.arange(len(free)), lengths - 1]",
        "hidden[torch.arange(len(free)), -1]",
        MODEL,
    ),
    Mutant(
        "refilled row keeps the old side state",
        "model.py",
        "                mine[index] = theirs\n",
        "                pass\n",
        MODEL,
    ),
    Mutant(
        "draws depend on the batch",
        "model.py",
        "draws[i][len(out[i])] for i in ids",
        "draws[b][len(out[i])] for b, i in enumerate(ids)",
        MODEL,
    ),
    Mutant(
        "top-p drops the likeliest token",
        "model.py",
        "p.masked_fill(before >= top_p, 0)",
        "p.masked_fill(before + p >= top_p, 0)",
        MODEL,
    ),
    Mutant(
        "unexpected tensors ignored",
        "model.py",
        "for name in sorted(found - set(want))]",
        "for name in ()]",
        MODEL,
    ),
    Mutant(
        "second bos from the post-processor",
        "model.py",
        "return self.encoding(text).ids",
        "return [1] + self.encoding(text).ids",
        MODEL,
    ),
    Mutant(
        "lora scale without alpha",
        "talan.py",
        "return self.alpha / (math.sqrt(self.rank)",
        "return 1 / (math.sqrt(self.rank)",
        TALAN,
    ),
    Mutant(
        "rslora scaled as lora",
        "talan.py",
        'math.sqrt(self.rank) if self.kind == "rslora" else self.rank',
        "self.rank",
        TALAN,
    ),
    Mutant(
        "alpha lost on save",
        "talan.py",
        '"lora_alpha": config.alpha',
        '"lora_alpha": config.rank',
        TALAN,
    ),
    Mutant(
        "A started at the wrong width",
        "talan.py",
        "- 1) / math.sqrt(cols)",
        "- 1) / math.sqrt(config.rank)",
        TALAN,
    ),
    Mutant(
        "dora norm in the graph",
        "talan.py",
        "    @torch.no_grad()\n    def row_norm",
        "    def row_norm",
        TALAN,
    ),
    Mutant(
        "dora norm without its cross term",
        "talan.py",
        "squared + 2 * s * (B * WA).sum(1) + ",
        "squared + ",
        TALAN,
    ),
    Mutant(
        "dora zero row gives nan",
        "talan.py",
        "torch.where(norm > 0, self.lora_magnitude_vector / torch.where(norm > 0, norm, 1), 1)",
        "self.lora_magnitude_vector / norm",
        TALAN,
    ),
    Mutant(
        "dora dropout on the whole of W x",
        "talan.py",
        "y + (g - 1) * F.linear(dropped, self.weight) + g * update",
        "g * (y + update)",
        TALAN,
    ),
    Mutant(
        "magnitude merged as a column",
        "talan.py",
        "self.gain()[:, None] * merged",
        "self.gain().mean() * merged",
        TALAN,
    ),
    Mutant("memory sees the pads", "talan.py", "            w = w * real[..., None]\n", "", TALAN),
    Mutant(
        "memory sees the next token",
        "talan.py",
        "y, num, den = self.read(xs, ws, vs, num, den)\n            ys",
        "y, num, den = self.read(xs, ws, vs, *self.read(xs, ws, vs, num, den)[1:])\n            ys",
        TALAN,
    ),
    Mutant(
        "softmax over the wrong axis",
        "talan.py",
        "(x @ self.w_read.T).softmax(-1)",
        "(x @ self.w_read.T).softmax(1)",
        TALAN,
    ),
    Mutant(
        "key not normalised",
        "talan.py",
        "k, v = rms(x @ self.w_key.T)",
        "k, v = (x @ self.w_key.T)",
        TALAN,
    ),
    Mutant(
        "score without sqrt(r)",
        "talan.py",
        "e = k @ rms(self.slots).T / math.sqrt(self.config.width)",
        "e = k @ rms(self.slots).T / 8",
        TALAN,
    ),
    Mutant(
        "gate sign",
        "talan.py",
        "torch.sigmoid(x @ self.w_gate + self.b_gate)",
        "torch.sigmoid(-(x @ self.w_gate) + self.b_gate)",
        TALAN,
    ),
    Mutant(
        "gate starts open",
        "talan.py",
        "nn.Parameter(torch.tensor(-1.0))",
        "nn.Parameter(torch.tensor(1.0))",
        TALAN,
    ),
    Mutant(
        "bound inverted",
        "talan.py",
        "torch.where(norm > limit, limit / torch",
        "torch.where(norm < limit, limit / torch",
        TALAN,
    ),
    Mutant(
        "trunk gradient not scaled",
        "talan.py",
        "stream = scale_grad(h, self.config.trunk_grad_scale).float()",
        "stream = h.float()",
        TALAN,
    ),
    Mutant(
        "grad_scale on the forward pass",
        "talan.py",
        "scale_grad(delta, self.config.grad_scale)",
        "delta * self.config.grad_scale",
        TALAN,
    ),
    Mutant(
        "writeback scope trains the mixer",
        "talan.py",
        '".side_path.w_out", ".side_path.w_gate"',
        '".side_path.w_read", ".side_path.w_out", ".side_path.w_gate"',
        TALAN,
    ),
    Mutant(
        "starts share one stream",
        "talan.py",
        'generator=generator(seed, name + ".lora_A")',
        "generator=generator(seed)",
        TALAN,
    ),
    Mutant(
        "another backbone accepted",
        "talan.py",
        "if saved and mine and saved != mine:",
        "if False:",
        TALAN,
    ),
    Mutant(
        "side path in bf16",
        "talan.py",
        "self.config.trunk_grad_scale).float()",
        "self.config.trunk_grad_scale)",
        TALAN,
    ),
    Mutant(
        "first token's target is itself",
        "train.py",
        "following, _ = pad_rows([row.ids[1:]",
        "following, _ = pad_rows([row.ids[:-1]",
        TRAIN,
    ),
    Mutant(
        "one pad trained a row",
        "train.py",
        "[int(s) for s in row.supervised[1:]]",
        "[*map(int, row.supervised[1:]), 1]",
        TRAIN,
    ),
    Mutant(
        "batches of any width",
        "train.py",
        "return -(-(len(self.ids) - 1) // MULTIPLE) * MULTIPLE",
        "return len(self.ids) - 1",
        TRAIN,
    ),
    Mutant(
        "mean of micro-batch means",
        "train.py",
        "(ranks.world / count)).backward()",
        "(ranks.world / len(batch.targets) / len(batches))).backward()",
        TRAIN,
    ),
    Mutant("stop token unlabelled", "train.py", "return after + len(token)", "return end", TRAIN),
    Mutant(
        "token across the border labelled",
        "train.py",
        "supervised.append(begin <= a < b <= end)",
        "supervised.append(begin < b <= end)",
        TRAIN,
    ),
    Mutant(
        "every epoch in the same order",
        "train.py",
        'generator(seed, "order", epoch)',
        'generator(seed, "order")',
        TRAIN,
    ),
    Mutant(
        "resume replays the first batches",
        "train.py",
        "    for _ in range(first):\n        next(plan)\n",
        "",
        TRAIN,
    ),
    Mutant("moments lost on resume", "train.py", "if name in moved:", "if False:", TRAIN),
    Mutant(
        "dropout follows the global stream",
        "train.py",
        "        torch.manual_seed(dropout_seed(settings.seed, step, ranks))",
        "        torch.rand(1)",
        TRAIN,
    ),
    Mutant(
        "budget without padding",
        "train.py",
        "longest * (len(groups[-1]) + 1) > budget",
        "sum(lengths[i] for i in groups[-1]) + lengths[n] > budget",
        TRAIN,
    ),
    Mutant(
        "side path rate not scaled",
        "train.py",
        'group["lr"] = rate * group["lr_scale"]',
        'group["lr"] = rate',
        TRAIN,
    ),
    Mutant(
        "truncated answers counted as stopped",
        "eval.py",
        '"truncated": not stopped and not',
        '"truncated": False and not',
        EVAL,
    ),
    Mutant("interval of the wrong z", "eval.py", "1.959963984540054", "1.6448536269514722", EVAL),
    Mutant(
        "likelihood of the first token dropped",
        "eval.py",
        "hidden = torch.cat([hidden, model(targets[:, :-1], cache, sizes - 1)], 1)",
        "hidden = torch.cat([hidden * 0, model(targets[:, :-1], cache, sizes - 1)], 1)",
        BENCH,
    ),
    Mutant(
        "replies share another prompt's prefix",
        "eval.py",
        "cache.keep(owner)",
        "cache.keep(owner[::-1])",
        BENCH,
    ),
    Mutant(
        "likelihood read at the batch's last column",
        "eval.py",
        "[torch.arange(len(items)), lengths - 1]",
        "[torch.arange(len(items)), -1]",
        BENCH,
    ),
    Mutant(
        "a merge at the join cut at the prompt's length",
        "eval.py",
        "    return alone[:same], [ids[same:] for ids in whole]",
        "    return alone, [ids[len(alone):] for ids in whole]",
        BENCH,
    ),
    Mutant(
        "pass@k with replacement",
        "eval.py",
        "1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))",
        "1 - (1 - c / n) ** k",
        BENCH,
    ),
    Mutant(
        "samples counted as items",
        "eval.py",
        'right.setdefault(r["id"], [])',
        'right.setdefault(r["id"] + str(r["sample"]), [])',
        BENCH,
    ),
    Mutant(
        "examples of another subject",
        "data/tasks.py",
        'if row.get("subject") == item.get("subject")]',
        "]",
        BENCH,
    ),
    Mutant("mmlu header lost", "data/tasks.py", "text = task.header(item) + ", "text = ", BENCH),
    Mutant("programs run unasked", "eval.py", " and not allowed:", " and False:", BENCH),
    Mutant(
        "plus alone",
        "eval.py",
        "for i, r in enumerate(records) if base[i].passed and ",
        "for i, r in enumerate(records) if ",
        BENCH,
    ),
    Mutant(
        "items drawn anew for each task order",
        "eval.py",
        'zlib.crc32(task.rpartition("/")[2].encode())])',
        "list(grids).index(task)])",
        COMPARE,
    ),
    Mutant(
        "seeds not resampled",
        "eval.py",
        "    draws = rng.integers(n, size=(rows, n)) + n",
        "    draws = np.arange(n) + n",
        COMPARE,
    ),
    Mutant(
        "tokens of a solution not weighted",
        "eval.py",
        "sizes[-1, n] += cells[0][0].tokens",
        "sizes[-1, n] += 1",
        COMPARE,
    ),
    Mutant(
        "one-sided mcnemar",
        "eval.py",
        "min(1.0, 2 * sum(chosen) / 2**n)",
        "min(1.0, sum(chosen) / 2**n)",
        COMPARE,
    ),
    Mutant("90 % interval", "eval.py", "[2.5, 97.5]", "[5, 95]", COMPARE),
    Mutant(
        "different settings pass",
        "eval.py",
        "return [*problems, *wrong, *check_cells",
        "return [*problems, *check_cells",
        COMPARE,
    ),
    Mutant(
        "items of one side only pass",
        "eval.py",
        "*wrong, *check_cells(together[0] + together[1])]",
        "*wrong]",
        COMPARE,
    ),
    Mutant(
        "strict takes the last mark",
        "data/gsm8k.py",
        r'found = re.search(r"#### (\-?[0-9\.\,]+)", text)',
        r'found = re.search(r"(?s).*#### (\-?[0-9\.\,]+)", text)',
        RULES,
    ),
    Mutant(
        "flexible takes the first number",
        "data/gsm8k.py",
        "found[-1][0] if found",
        "found[0][0] if found",
        RULES,
    ),
    Mutant(
        "an unclosed box counts",
        "data/math500.py",
        "return None if end is None else group[1:end]",
        "return group[1:end]",
        RULES,
    ),
    Mutant("tuples in any brackets", "data/math500.py", "p[0] == q[0] and ", "", RULES),
    Mutant(
        "acc_norm by tokens, not characters",
        "data/task.py",
        "p / len(c)",
        "p / len(c.split())",
        RULES,
    ),
    Mutant(
        "a download is not verified",
        "data/prepare.py",
        "    if found != expected:\n",
        "    if False:\n",
        PREPARE,
    ),
    Mutant(
        "a broken download starts over",
        "data/prepare.py",
        "if have else {})\n    with urllib",
        "if False else {})\n    with urllib",
        PREPARE,
    ),
    Mutant(
        "exit code believed",
        "data/sandbox.py",
        "if not why and token in channel:",
        "if not why and child.returncode == 0:",
        SANDBOX,
    ),
    Mutant(
        "tests under the program's builtins",
        "data/sandbox.py",
        '{**names, "__builtins__": pristine}',
        "names",
        SANDBOX,
    ),
    Mutant(
        "a late program is left alone",
        "data/sandbox.py",
        "late = len(output) + len(channel) > limits.output_bytes, time.monotonic() > deadline",
        "late = len(output) + len(channel) > limits.output_bytes, time.monotonic() > deadline + 99",
        SANDBOX,
    ),
    Mutant(
        "internals count a pad a row",
        "data/internals.py",
        "    real = (torch.arange(batch.tokens.shape[1]) < lengths[:, None])",
        "    real = (torch.arange(batch.tokens.shape[1]) <= lengths[:, None])",
        INSIDE,
    ),
    Mutant(
        "swapped memory is the row's own",
        "data/internals.py",
        "np.roll(circle, -1)",
        "circle",
        INSIDE,
    ),
    Mutant(
        "divergence the other way round",
        "data/internals.py",
        "(p.exp() * (p - q))",
        "(q.exp() * (q - p))",
        INSIDE,
    ),
    Mutant(
        "improvement counted from the adapter on",
        "data/internals.py",
        'gain = found.nll["backbone"] - ',
        'gain = found.nll["adapter"] - ',
        INSIDE,
    ),
    Mutant(
        "adapter never off",
        "talan.py",
        "linear.active = linear.active and adapter",
        "linear.active = True",
        INSIDE,
    ),
    Mutant(
        "nothing switched back",
        "talan.py",
        "            setattr(owner, name, value)\n",
        "            pass\n",
        INSIDE,
    ),
    Mutant(
        "low-rank gradient of A unscaled",
        "talan.py",
        "[ctx.s * (dy @ b) for",
        "[(dy @ b) for",
        TALAN,
    ),
    Mutant(
        "one map reads another's z",
        "talan.py",
        "zip(W, B, z.chunk(count, -1))",
        "zip(W, B, z.chunk(count, -1)[::-1])",
        TALAN,
    ),
    Mutant(
        "kept gains are never let go",
        "talan.py",
        "            linear.kept = None\n",
        "            pass\n",
        TALAN,
    ),
    Mutant(
        "gradient passes DoRA's gain by",
        "talan.py",
        "return torch.addcmul(dy, dy, rest), ",
        "return dy, ",
        TALAN,
    ),
    Mutant(
        "DoRA's magnitude without a gradient",
        "talan.py",
        "(dy * y).reshape",
        "(dy * 0).reshape",
        TALAN,
    ),
    Mutant(
        "gradient of up without silu",
        "model.py",
        "F.silu(g).mul_(dy)",
        "g.mul(dy)",
        MODEL + " " + TALAN,
    ),
    Mutant(
        "low-rank part of dx lost",
        "talan.py",
        "= dz @ A if need_x else None",
        "= 0 * dz @ A if need_x else None",
        TALAN,
    ),
    Mutant(
        "adapter counted on its input side only",
        "data/overhead.py",
        "m.lora_A.numel() + m.lora_B.numel()",
        "m.lora_A.numel()",
        COST,
    ),
    Mutant(
        "warm-up counted",
        "data/overhead.py",
        "                if n:\n",
        "                if True:\n",
        COST,
    ),
    Mutant(
        "ratios unpaired",
        "data/overhead.py",
        "ratios = np.divide(times, base)",
        "ratios = np.divide(times, np.median(base))",
        COST,
    ),
    Mutant(
        "a field twice, the last counts",
        "model.py",
        "object_pairs_hook=unique",
        "object_pairs_hook=dict",
        HOSTILE,
    ),
    Mutant(
        "two factors, the last counts",
        "model.py",
        "sorted(key for key in parts[0] if rope",
        "sorted(key for key in {} if rope",
        HOSTILE,
    ),
    Mutant("heads beyond all bounds", "model.py", "if heads * size > LIMIT:", "if False:", HOSTILE),
    Mutant(
        "odd heads where head_dim is absent",
        "model.py",
        '(raw["hidden_size"] // heads if raw["model_type"] == "llama" else 128)',
        "2",
        MODEL,
    ),
    Mutant(
        "a cache read twice in recompute",
        "model.py",
        "self.checkpointing and cache is None and",
        "self.checkpointing and",
        MODEL,
    ),
    Mutant("more real tokens than tokens", "model.py", "int(lengths.max()) <= T)", "True)", MODEL),
    Mutant(
        "rotary frequencies cast with the weights",
        "model.py",
        "        super()._apply(fn, recurse)\n        self",
        "        return super()._apply(fn, recurse)\n        self",
        MODEL,
    ),
    Mutant(
        "no BOS before plain text",
        "model.py",
        "return tuple(found.ids[:found.special_tokens_mask.index(0)])",
        "return ()",
        MODEL,
    ),
    Mutant(
        "a file is taken for a checkpoint",
        "talan.py",
        "if p.name[5:].isdigit() and p.is_dir()]",
        "if p.name[5:].isdigit()]",
        TALAN,
    ),
    Mutant(
        "nothing to learn beside no adapter",
        "talan.py",
        '(scope == "talan" or adapter.kind == "none" and scope in ("joint", "writeback"))',
        'scope == "talan"',
        TALAN,
    ),
    Mutant(
        "compare: other weights pass",
        "eval.py",
        'for name in (*FOUND, "backbone_sha256") if name in row',
        "for name in FOUND if name in row",
        EVAL,
    ),
    Mutant(
        "weights known by their files' names",
        "eval.py",
        "sorted(pair for pair in hashes.items()",
        "sorted(pair[:1] for pair in hashes.items()",
        EVAL,
    ),
    Mutant(
        "the answer among the messages passes",
        "data/tasks.py",
        'if messages[-1]["role"] == "assistant":',
        "if False:",
        EVAL,
    ),
    Mutant(
        "scores on the device of one process",
        "train.py",
        '"device": settings.device,',
        '"device": "cpu",',
        RANKS,
    ),
    Mutant(
        "two starts share a folder",
        "train.py",
        "            os.link(tmp, file)",
        "            pass",
        TRAIN,
    ),
    Mutant(
        "sweep: the rates' runs not looked at before",
        "data/sweep.py",
        "check_runs(grid or plan()",
        "check_runs({} if grid else plan()",
        SWEEP,
    ),
    Mutant("token ids unchecked", "model.py", "except IndexError:", "except KeyError:", HOSTILE),
    Mutant(
        "a device that is no place to compute",
        "model.py",
        'if device.type not in ("cpu", "cuda"):',
        "if False:",
        HOSTILE,
    ),
    Mutant(
        "a head in four bits is read",
        "model.py",
        " and info[head][1] in DTYPES and ",
        " and ",
        HOSTILE,
    ),
    Mutant(
        "sizes in templates unchecked",
        "data/template.py",
        "sized = isinstance(node, (jinja2.nodes.Call, jinja2.nodes.Filter, jinja2.nodes.Concat))",
        "sized = False",
        HOSTILE,
    ),
    Mutant(
        "time of the first render counts on",
        "data/template.py",
        "environment.end = time.thread_time() + Sandbox.SECONDS",
        "environment.end = min(environment.end, time.thread_time() + Sandbox.SECONDS)",
        HOSTILE,
    ),
    Mutant(
        "end token of another kind passed over",
        "model.py",
        "if not isinstance(token, (str, bool, type(None)))]:",
        "if False]:",
        HOSTILE,
    ),
    Mutant(
        "integers as adapter weights", "talan.py", "if dtype not in DTYPES]", "if False]", HOSTILE
    ),
    Mutant(
        "NaN in an adapter",
        "talan.py",
        "if not read_tensor(folder / FILES[part][1], name).isfinite().all()]",
        "if False]",
        HOSTILE,
    ),
    Mutant(
        "dora as text",
        "talan.py",
        "if raw.get(k) not in (None, False, True)]",
        "if False]",
        HOSTILE,
    ),
    Mutant(
        "state read from its first chunk on",
        "talan.py",
        "num, den = state or (v.new_zeros(B, M, r), v.new_zeros(B, M))",
        "num, den = v.new_zeros(B, M, r), v.new_zeros(B, M)",
        RANDOM,
    ),
    Mutant(
        "moments broadcast on resume",
        "train.py",
        'raise_all(f"{folder}: train_state does not fit these settings", tensor_problems(want, found))',
        "pass",
        HOSTILE,
    ),
    Mutant(
        "settings of another kind",
        "train.py",
        "if k not in usual or not same_kind(v, usual[k])]",
        "if k not in usual]",
        HOSTILE,
    ),
    Mutant(
        "full batches split",
        "train.py",
        "longest * (len(groups[-1]) + 1) > budget",
        "longest * (len(groups[-1]) + 1) >= budget",
        RANDOM,
    ),
    Mutant(
        "a tensor's name without a dot",
        "talan.py",
        'for n in tensors) if "." in name',
        "for n in tensors) if True",
        RANDOM,
    ),
    Mutant(
        "an absurd scale of rope", "model.py", "0 < value < 1e12", "0 < value < math.inf", RANDOM
    ),
    Mutant(
        "added tokens of another kind",
        "model.py",
        "if not isinstance(added, dict) or not all(",
        "if False and not all(",
        RANDOM,
    ),
    Mutant(
        "records without a field",
        "eval.py",
        "json.JSONDecodeError, LookupError, TypeError",
        "json.JSONDecodeError, TypeError",
        RANDOM,
    ),
    Mutant(
        "a template that Python cannot read",
        "data/template.py",
        "(jinja2.TemplateError, SyntaxError, RecursionError, MemoryError)",
        "(jinja2.TemplateError, RecursionError)",
        HOSTILE,
    ),
    Mutant("a bomb of one line", "data/rows.py", "if len(line) == LONGEST:", "if False:", HOSTILE),
    Mutant("two rows of one id", "data/tasks.py", "if count > 1]", "if count > 9]", HOSTILE),
    Mutant(
        "live adapter merged too",
        "data/overhead.py",
        'merge_adapter(forms["merged"])',
        '[merge_adapter(forms[f]) for f in ("merged", "live")]',
        COST,
    ),
    Mutant(
        "renamed before it is on the disk",
        "model.py",
        '        for part in (*tmp.rglob("*"), tmp):\n            sync(part)\n',
        "",
        CRASH,
    ),
    Mutant(
        "files of a folder not synced",
        "model.py",
        'for part in (*tmp.rglob("*"), tmp):',
        "for part in (tmp,):",
        CRASH,
    ),
    Mutant("rename not on the disk", "model.py", "        sync(path.parent)\n", "", CRASH),
    Mutant(
        "checkpoint older than the metrics lost",
        "train.py",
        '    sync(run / "metrics.jsonl")  # a checkpoint never knows more steps than the metrics\n',
        "",
        CRASH,
    ),
    Mutant(
        "half a line stays", "train.py", "            os.truncate(self.file, before)\n", "", CRASH
    ),
    Mutant(
        "a start killed early is an obstacle",
        "train.py",
        'any(not file.match(".settings.json.*.tmp") for file in run.iterdir())',
        "any(run.iterdir())",
        CRASH,
    ),
    Mutant(
        "a full disk is a traceback",
        "train.py",
        "except (OSError, SafetensorError) as error:",
        "except ZeroDivisionError as error:",
        CRASH,
    ),
    Mutant(
        "weights that do not fit are a traceback",
        "train.py",
        "except (OSError, SafetensorError) as error:",
        "except OSError as error:",
        CRASH,
    ),
    Mutant(
        "a step logged twice",
        "train.py",
        '.get("step", 0) <= step',
        '.get("step", 0) <= step + 1',
        CRASH,
    ),
    Mutant(
        "checkpoint written in place",
        "train.py",
        'with atomic(run / f"step-{step:07d}") as tmp:',
        'with contextlib.nullcontext(run / f"step-{step:07d}") as tmp:',
        CRASH,
    ),
    Mutant(
        "folder seen half deleted",
        "train.py",
        "    folder.rename(hidden)\n    shutil.rmtree(hidden)\n",
        "    shutil.rmtree(folder)\n",
        CRASH,
    ),
    Mutant(
        "folder moved aside stays",
        "train.py",
        ', *run.parent.glob(f".{run.name}.*.old")]',
        "]",
        CRASH,
    ),
    Mutant(
        "half a checkpoint stays",
        "train.py",
        'for leftover in [*run.glob(".*.tmp"), ',
        "for leftover in [",
        CRASH,
    ),
    Mutant(
        "second signal waits too",
        "train.py",
        "signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)",
        "pass",
        CRASH,
    ),
    Mutant(
        "a gradient that is not finite is stepped on",
        "train.py",
        "if not math.isfinite(mean) or not math.isfinite(norm):",
        "if not math.isfinite(mean):",
        NUMBERS,
    ),
    Mutant(
        "gradients kept after clipping",
        "train.py",
        "size = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])",
        "size = nn.utils.clip_grad_norm_(trainable, settings.clip)",
        NUMBERS,
    ),
    Mutant(
        "a gradient of infinite norm not kept",
        "train.py",
        "not p.grad.norm().isfinite()}",
        "not p.grad.isfinite().all()}",
        NUMBERS,
    ),
    Mutant(
        "host waits twice a step",
        "train.py",
        "mean, asked, norm = torch.cat((sums, size[None])).tolist()",
        "mean, asked, norm = *sums.tolist(), size.item()",
        NUMBERS,
    ),
    Mutant(
        "infinite rate accepted",
        "train.py",
        "if not 0 < getattr(self, n) < 1e30]",
        "if not 0 < getattr(self, n)]",
        NUMBERS,
    ),
    Mutant(
        "kept over an old step in vain",
        "train.py",
        "    if folder.exists() and ranks.first:\n        remove_folder(folder)\n",
        "",
        NUMBERS,
    ),
    Mutant(
        "rows of the step without a label kept",
        "train.py",
        "            if any(row.supervised[1:]):\n                rows.append(row)\n",
        "            rows.append(row)\n",
        NUMBERS,
    ),
    Mutant("running sum sees the next token", "talan.py", ".tril()", ".tril(1)", NUMBERS),
    Mutant(
        "weights of the memory in bfloat16",
        "talan.py",
        "w = e.exp()\n",
        "w = e.exp().bfloat16().float()\n",
        NUMBERS,
    ),
    Mutant(
        "changed backbone accepted",
        "data/record.py",
        'HASHED = ("data_sha256", "backbone_sha256")',
        'HASHED = ("data_sha256",)',
        REPEAT,
    ),
    Mutant(
        "held-out rows not in the record",
        "train.py",
        "settings.data + settings.dev_data, model",
        "settings.data, model",
        REPEAT,
    ),
    Mutant(
        "chat template not in the record",
        "data/record.py",
        "for pattern in WANTED for",
        "for pattern in WANTED[:4] + WANTED[5:] for",
        REPEAT,
    ),
    Mutant(
        "resume does not look at the record",
        "train.py",
        "if settings.repeat or read_record(run) and settings.resume:",
        "if settings.repeat:",
        REPEAT,
    ),
    Mutant("repeat into the old folder", "train.py", '{"out": ""} | explicit', "explicit", REPEAT),
    Mutant(
        "flags beside repeat ignored", "train.py", "    if others:\n", "    if False:\n", REPEAT
    ),
    Mutant(
        "repeat goes into the record",
        "train.py",
        'overwrite=False, repeat="")',
        "overwrite=False)",
        REPEAT,
    ),
    Mutant(
        "another commit passes in silence",
        "data/record.py",
        '(*HASHED, "commit", ',
        "(*HASHED, ",
        REPEAT,
    ),
    Mutant(
        "deterministic algorithms never on",
        "train.py",
        "torch.use_deterministic_algorithms(True)",
        "pass",
        REPEAT,
    ),
    Mutant(
        "cuBLAS without its workspace",
        "train.py",
        'os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")',
        "pass",
        REPEAT,
    ),
    Mutant("any name is near", "data/settings.py", "list(names), 1)", "list(names), 1, 0)", REPEAT),
    Mutant("no git is a crash", "model.py", ' if shutil.which("git") else ""', "", REPEAT),
    Mutant(
        "compare: other items for each backbone",
        "eval.py",
        'task.rpartition("/")[2].encode()',
        "task.encode()",
        COMPARE,
    ),
    Mutant(
        "compare: seeds of the backbones not compared",
        "eval.py",
        "    if len(set(map(str, seeds.values()))) > 1:\n",
        "    if False:\n",
        COMPARE,
    ),
    Mutant(
        "compare: backbones of the sides mixed",
        "eval.py",
        "if len(prints[0]) == 1 or set(prints[0]) != set(prints[1]):",
        "if len(prints[0]) == 1:",
        COMPARE,
    ),
    Mutant(
        "compare: a loss counts as at least 0",
        "eval.py",
        "sum(x >= 0 for x in found)",
        "sum(x <= 0 for x in found)",
        COMPARE,
    ),
    Mutant(
        "sweep: baseline with the side path",
        "data/sweep.py",
        "replace(candidate, talan=False, scope=",
        "replace(candidate, scope=",
        SWEEP,
    ),
    Mutant(
        "sweep: rank of the control rounded down",
        "data/sweep.py",
        'math.ceil(count["side path"] /',
        'math.floor(count["side path"] /',
        SWEEP,
    ),
    Mutant(
        "sweep: other settings reused",
        "data/sweep.py",
        " for name, value in stored.items() if value != want[name]]",
        ' for name, value in stored.items() if name == "seed" and value != want[name]]',
        SWEEP,
    ),
    Mutant(
        "sweep: highest held-out loss taken",
        "data/sweep.py",
        "return min(losses, key=",
        "return max(losses, key=",
        SWEEP,
    ),
    Mutant(
        "sweep: loss at the start decides",
        "data/sweep.py",
        'if line["kind"] == "dev"][-1]',
        'if line["kind"] == "dev"][0]',
        SWEEP,
    ),
    Mutant(
        "sweep: an unfinished run of the grid taken over",
        "data/sweep.py",
        "if trained(found) and not run.exists():",
        "if found.exists() and not run.exists():",
        SWEEP,
    ),
    Mutant(
        "sweep: a run of the first seed replaced by the grid's",
        "data/sweep.py",
        "if trained(found) and not run.exists():",
        "if trained(found) and not shutil.rmtree(run, ignore_errors=True):",
        SWEEP,
    ),
    Mutant(
        "sweep: the first seed trained twice",
        "data/sweep.py",
        "                    take_over(",
        "                    (lambda *given: None)(",
        SWEEP,
    ),
    Mutant(
        "sweep: one rate for all sides",
        "data/sweep.py",
        "replace(wanted, lr=lowest(losses[side]))",
        'replace(wanted, lr=lowest(losses["baseline"]))',
        SWEEP,
    ),
    Mutant(
        "sweep: every seed is the first",
        "data/sweep.py",
        "replace(wanted, seed=seed) for seed in seeds",
        "wanted for seed in seeds",
        SWEEP,
    ),
    Mutant(
        "sweep: interrupt in a last step forgotten",
        "train.py",
        "if not finished or part and interrupt.asked:",
        "if not finished:",
        SWEEP,
    ),
    Mutant(
        "sweep: a variation of the baseline",
        "data/sweep.py",
        "word: replace(candidate, **changes)",
        "word: replace(baseline, **changes)",
        SWEEP,
    ),
    Mutant(
        "sweep: variations add up",
        "data/sweep.py",
        "word: replace(candidate, **changes)",
        "word: (candidate := replace(candidate, **changes))",
        SWEEP,
    ),
    Mutant(
        "sweep: variations against the candidate",
        "data/sweep.py",
        'against("baseline", word, f"',
        'against("candidate", word, f"',
        SWEEP,
    ),
    Mutant(
        "sweep: the overview takes one task for the mean",
        "data/sweep.py",
        'if len(result["tasks"]) == 1 else',
        "if result else",
        SWEEP,
    ),
    Mutant(
        "sweep: limit not handed on",
        "train.py",
        '"limit": settings.limit, "device"',
        '"device"',
        SWEEP,
    ),
    Mutant(
        "permission to run programs asked after training",
        "train.py",
        "        check_permission(tasks, settings.allow_code_execution)\n",
        "",
        SWEEP,
    ),
    Mutant(
        "keep: training seconds of a backbone's folder",
        "data/keep.py",
        'if line["kind"] == "dev"][-1]',
        'if line["kind"] == "dev"][0]',
        SWEEP,
    ),
    Mutant(
        "keep: log-likelihood of one digit",
        "data/keep.py",
        "round(logprob, 5)",
        "round(logprob, 1)",
        SWEEP,
    ),
    Mutant(
        "sweep: data of the runs not compared",
        "data/sweep.py",
        "                check_files(run, next(iter(plan())))\n",
        "",
        SWEEP,
    ),
    Mutant(
        "gradients: the mean over the processes",
        "train.py",
        "(loss * (ranks.world / count))",
        "(loss / count)",
        RANKS,
    ),
    Mutant(
        "gradients: added up at the first micro-batch",
        "train.py",
        "summing(forward, batch is batches[-1])",
        "summing(forward, batch is batches[0])",
        RANKS,
    ),
    Mutant(
        "gradients: no process waits for another",
        "data/ranks.py",
        "if last or not isinstance",
        "if not isinstance",
        RANKS,
    ),
    Mutant(
        "gradients: waiting for those that never come",
        "data/ranks.py",
        "        p.requires_grad_(False)  #",
        "        pass  #",
        RANKS,
    ),
    Mutant(
        "processes: each stops where it hears of it",
        "train.py",
        "stop = bool(asked) or ",
        "stop = interrupt.asked or ",
        RANKS,
    ),
    Mutant(
        "processes: all speak",
        "data/ranks.py",
        "        if dist.get_rank():\n",
        "        if False:\n",
        RANKS,
    ),
    Mutant("processes: all save", "train.py", "if ranks.first and (last or", "if (last or", RANKS),
    Mutant(
        "processes: an error of the first is one of all",
        "data/ranks.py",
        "            raise SystemExit(1)\n",
        "            raise ValueError(self.rank)\n",
        RANKS,
    ),
    Mutant(
        "processes: one dropout for all",
        "train.py",
        ", step, *[ranks.rank] * (not ranks.first))",
        ", step)",
        RANKS,
    ),
    Mutant(
        "processes: held-out rows of the first alone",
        "train.py",
        "ranks.sum(found.to(device)).tolist()",
        "found.tolist()",
        RANKS,
    ),
    Mutant(
        "processes: seeds of answers by place",
        "eval.py",
        "range(len(items[task.name]))[mine]",
        "range(len(items[task.name]))",
        RANKS,
    ),
    Mutant(
        "fsdp: what trains is cut too",
        "data/ranks.py",
        "ignored_params=whole)",
        "ignored_params=set())",
        RANKS,
    ),
    Mutant(
        "fsdp: blocks stay whole",
        "data/ranks.py",
        "reshard_after_forward=module is not model",
        "reshard_after_forward=False",
        RANKS,
    ),
    Mutant(
        "fsdp: AdamW's numbers left behind",
        "train.py",
        "    forward = spread(model, model.model.layers, ranks, device, settings.fsdp, idle)\n    optimizer = build_optimizer(model, settings)\n",
        "    optimizer = build_optimizer(model, settings)\n    forward = spread(model, model.model.layers, ranks, device, settings.fsdp, idle)\n",
        RANKS,
    ),
    Mutant(
        "ctrl-c is a traceback",
        "train.py",
        "    except KeyboardInterrupt:\n",
        "    except ZeroDivisionError:\n",
        CRASH,
    ),
]


def run_mutant(mutant: Mutant) -> tuple[Mutant, bool, float]:
    """(mutant, did the suite go red, seconds). Raises ValueError when the passage to replace is not there exactly once."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "talan"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(".git", "runs", "smollm2", "__pycache__", ".venv"),
        )
        source = (copy / mutant.file).read_text()
        if source.count(mutant.old) != 1:
            raise ValueError(
                f"{mutant.name}: expected the passage once in {mutant.file}, found it {source.count(mutant.old)} times"
            )
        (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(f"tests/{t}" for t in mutant.tests.split()),
        ]
        done = subprocess.run(
            command, cwd=copy, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    if done.returncode not in (0, 1):
        raise ValueError(
            f"{mutant.name}: pytest ended with {done.returncode}: {done.stdout.decode()[-500:]}{done.stderr.decode()[-500:]}"
        )
    return mutant, done.returncode == 1, time.perf_counter() - began


def main(settings: Settings) -> None:
    """Try every mutant; exit with 1 when one survives."""
    chosen = [m for m in MUTANTS if settings.only in m.name]
    survivors = []
    with ThreadPoolExecutor(settings.workers) as pool:
        for mutant, red, seconds in pool.map(run_mutant, chosen):
            print(
                f"{'killed  ' if red else 'SURVIVED'}  {mutant.file:9} {mutant.name}  ({seconds:.0f} s)",
                flush=True,
            )
            survivors += [] if red else [mutant.name]
    print(
        f"{len(chosen)} mutants, {len(survivors)} survivors{': ' + ', '.join(survivors) if survivors else ''}"
    )
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main(parse(Settings))
