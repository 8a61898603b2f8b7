"""Break the sources on purpose, one small realistic fault at a time, and see the tests go red.

    python tests/mutants.py                 all of them, two at a time; exit code 1 when one survives
    python tests/mutants.py --only dora     those with "dora" in the name
    python tests/mutants.py --check         only look whether every passage is there exactly once

A mutant is a copy of the repository in a temporary folder with one passage replaced; only a test
that fails kills it, not a module that cannot be imported. The working tree is never touched.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import run_script, setting

LEFT_OUT = (".*", "runs", "smollm2", "downloads", "__pycache__", "*.pyc")


@dataclass(frozen=True)
class Settings:
    """Try the mutants and say which of them no test notices."""

    only: str = setting("", "those with this in their name")
    workers: int = setting(2, "tried at once")
    check: bool = setting(False, "only look whether every passage is there exactly once")


# name, file, passage (there exactly once), what it becomes, pytest's words for the tests that notice
# fmt: off
MUTANTS = [
    ("mask hides the token itself", "model.py", "<= positions[:, None, :, None]", "< positions[:, None, :, None]", "test_model.py -k split"),
    ("mask shows one token ahead", "model.py", "torch.arange(visible, device=device) <=", "torch.arange(visible, device=device) - 1 <=", "test_model.py -k split"),
    ("rotary positions begin anew behind the cache", "model.py", "positions[:, None, :, None].float() *", "(positions - positions[:, :1])[:, None, :, None].float() *", "test_model.py -k split"),
    ("rotary halves turn the other way", "model.py", "(a * cos - b * sin, b * cos + a * sin)", "(a * cos + b * sin, b * cos - a * sin)", "test_model.py -k hidden_states"),
    ("llama3 blend inverted", "model.py", "torch.lerp(freq / s.factor, freq,", "torch.lerp(freq, freq / s.factor,", "test_model.py -k hidden_states"),
    ("old spelling of rope ignored", "model.py", 'in ("rope_scaling", "rope_parameters"):', 'in ("rope_parameters",):', "test_model.py -k hidden_states"),
    ("partial rotary factor ignored", "model.py", "if share == 1 and not kinds", "if not kinds", "test_model.py -k refused_field"),
    ("grouped heads taken in the other order", "model.py", "q = q.view(B, k.shape[1], -1, self.head_dim)", "q = q.view(B, -1, k.shape[1], self.head_dim).transpose(1, 2)", "test_model.py -k split"),
    ("gradient of up without silu", "model.py", "F.silu(g).mul_(dy)", "g.mul(dy)", "test_model.py -k swiglu"),
    ("gradient of a norm without its mean", "model.py", "dy - y * (y * dy).mean(-1, keepdim=True)", "dy", "test_model.py -k float32_copy"),
    ("norm keeps a float32 copy", "model.py", "if x.dtype == torch.bfloat16 and not x.is_cuda:", "if False:", "test_model.py -k float32_copy"),
    ("side path behind the attention whatever the site", "model.py", 'if self.side_site == "attention" else h', "if self.side_site else h", "test_talan.py -k a_model_with"),
    ("cache counts the pads", "model.py", "cache.lengths += T if lengths is None else lengths", "cache.lengths += T", "test_model.py -k split"),
    ("new row keeps the old one's side state", "model.py", "                mine[index] = theirs", "                pass", "test_model.py -k written_and_selected"),
    ("side state in a new place", "model.py", "old.copy_(new)", "self.side[layer] = state", "test_model.py -k cuda_graphs"),
    ("a cache read twice in recompute", "model.py", "self.checkpointing and cache is None and", "self.checkpointing and", "test_model.py -k checkpointing"),
    ("reentrant recompute", "model.py", "use_reentrant=False) if recompute", "use_reentrant=True) if recompute", "test_model.py -k checkpointing"),
    ("unexpected tensors ignored", "model.py", 'problems.append(f"unexpected: {name} {shape}")', "pass", "test_model.py -k one_error"),
    ("tokenizer not in the fingerprint", "model.py", 'digest.update((folder / "tokenizer.json").read_bytes())', "pass", "test_adapters.py -k broken_stale"),
    ("top-p drops the token that reaches it", "model.py", "likelier >= top_p", "likelier + p >= top_p", "test_model.py -k top_p"),
    ("last token of the batch, not of the row", "model.py", "lengths)[torch.arange(len(rows)), lengths - 1]", "lengths)[torch.arange(len(rows)), -1]", "test_model.py -k refilled"),
    ("draws by the row", "model.py", "self.draws[i][len(", "self.draws[prompts.index(i)][len(", "test_model.py -k draws"),
    ("draws by the place of a prompt", "model.py", "int(numbers[i]) if numbers else i", "i", "test_model.py -k draws"),
    ("idle rows run on", "model.py", "self.live.copy_(live, non_blocking=True)", "self.live.fill_(1)", "test_model.py -k cuda_graphs"),
    ("a graph for each length", "model.py", "min(-(-longest // 256) * 256,", "min(longest,", "test_model.py -k cuda_graphs"),
    ("dropout off behind generate", "model.py", "        model.train(was_training)\n    return decoder.out", "        pass\n    return decoder.out", "test_model.py -k generating"),
    ("lora scale without alpha", "talan.py", "return self.alpha / (", "return 1 / (", "test_talan.py -k configs_say"),
    ("alpha lost on save", "talan.py", '"lora_alpha": config.alpha', '"lora_alpha": config.rank', "test_adapters.py -k trap_14"),
    ("starts share one stream", "talan.py", 'generator(seed, name + ".lora_A")', "generator(seed)", "test_talan.py -k starts"),
    ("dora norm in the graph", "talan.py", "    @torch.no_grad()\n    def row_norm", "    def row_norm", "test_adapters.py -k trap_9_forward"),
    ("dora norm without its cross term", "talan.py", "squared + 2 * s * (B * WA).sum(1) + ", "squared + ", "test_adapters.py -k trap_9_forward"),
    ("dora zero row gives nan", "talan.py", "torch.where(norm > 0, self.lora_magnitude_vector / norm.clamp_min(1e-30), 1)", "self.lora_magnitude_vector / norm", "test_adapters.py -k trap_8"),
    ("dora dropout misses W x", "talan.py", "(F.linear(dropped, W) + update)", "(F.linear(x, W) + update)", "test_adapters.py -k trap_9_forward"),
    ("dora norms kept for ever", "talan.py", "layer.caching, layer.cached_norm = False, None", "pass", "test_adapters.py -k cached"),
    ("gradient of A without the scale", "talan.py", "dz = ctx.s * (dy @ B)", "dz = dy @ B", "test_adapters.py -k trap_9_forward"),
    ("memory sees the pads", "talan.py", "w = w * real[..., None]", "pass", "test_talan.py -k any_split"),
    ("memory sees the next token", "talan.py", "recompute(self.read, *chunk, num, den)", "recompute(self.read, *chunk, *self.read(*chunk, num, den)[1:])", "test_talan.py -k later_one"),
    ("running sum sees the next token", "talan.py", ".tril() @", ".tril(1) @", "test_talan.py -k forward_and"),
    ("memory of every token kept", "talan.py", "recompute(self.read, *chunk, num, den)", "self.read(*chunk, num, den)", "test_talan.py -k backward_keeps"),
    ("key not normalised", "talan.py", "rms(x @ self.w_key.T), x @", "(x @ self.w_key.T), x @", "test_talan.py -k forward_and"),
    ("weights of the memory in bfloat16", "talan.py", "math.sqrt(self.config.width)).exp()", "math.sqrt(self.config.width)).exp().bfloat16().float()", "test_talan.py -k 16384"),
    ("small sums held up", "talan.py", "dens.clamp_min(1e-30)", "dens.clamp_min(1e-3)", "test_talan.py -k 16384"),
    ("gate starts open", "talan.py", "torch.tensor(-1.0)", "torch.tensor(1.0)", "test_talan.py -k by_itself"),
    ("bound inverted", "talan.py", "torch.where(norm > limit, limit / norm_or_1", "torch.where(norm < limit, limit / norm_or_1", "test_talan.py -k forward_and"),
    ("trunk gradient not scaled", "talan.py", "scale_grad(h, self.config.trunk_grad_scale).float()", "h.float()", "test_talan.py -k forward_and"),
    ("grad_scale in the forward pass", "talan.py", "scale_grad(delta, self.config.grad_scale)", "delta * self.config.grad_scale", "test_talan.py -k forward_and"),
    ("side path in bfloat16", "talan.py", "self.config.trunk_grad_scale).float()", "self.config.trunk_grad_scale)", "test_talan.py -k float32_inside"),
    ("writeback scope trains the mixer", "talan.py", '("w_out", "w_gate", "b_gate")', '("w_read", "w_out", "w_gate", "b_gate")', "test_talan.py -k scope_trains"),
    ("grad_scale 0 counts as learning", "talan.py", "bool(layers) and talan.grad_scale > 0", "bool(layers)", "test_talan.py -k scope_trains"),
    ("another backbone accepted", "talan.py", "backbone != fingerprint:", 'backbone == "":', "test_adapters.py -k broken_stale"),
    ("pissa's start accepted", "talan.py", 'not in (True, False, "gaussian", "orthogonal", "eva")', "in ()", "test_adapters.py -k computes_something"),
    ("patterns of ranks not looked at", "talan.py", "found[next(fits, default)] = name", "found[default] = name", "test_adapters.py -k published"),
    ("patterns fit the middle of a name", "talan.py", 'rf"(.*\\.)?({key})$"', 'rf".*({key})$"', "test_adapters.py -k published"),
    ("two values of one pattern, the first counts", "talan.py", "if len(found) > 1:", "if len(found) > 9:", "test_adapters.py -k computes_something"),
    ("rank-stabilised dora scaled as dora", "talan.py", 'alpha *= math.sqrt(rank) if kind == "rslora" else 1', "alpha *= 1", "test_adapters.py -k published"),
    ("NaN in an adapter", "talan.py", "if not t.isfinite().all()]", "if False]", "test_adapters.py -k bad_tensors"),
    ("a token's target is itself", "train.py", "following, _ = pad_rows([row.ids[1:]", "following, _ = pad_rows([row.ids[:-1]", "test_chat.py -k trap_3"),
    ("budget without padding", "train.py", "widest * (len(groups[-1]) + 1) > budget", "sum(widths[i] for i in groups[-1]) + widths[n] > budget", "test_train.py -k every_row"),
    ("every epoch in the same order", "train.py", 'generator(settings.seed, "order", epoch)', 'generator(settings.seed, "order")', "test_train.py -k the_order"),
    ("resume replays the first steps", "train.py", "yield from steps[done:]", "yield from steps", "test_train.py -k the_order"),
    ("rows without a label kept", "train.py", "if any(row.supervised[1:]):", "if True:", "test_train.py -k rows_that_are_long"),
    ("mean of micro-batch means", "train.py", "(ranks.world / count)).backward()", "(ranks.world / len(batch.targets) / len(batches))).backward()", "test_train.py -k trap_1_eight"),
    ("softmax in bfloat16", "train.py", "log_softmax(-1, dtype=torch.float32)", "log_softmax(-1).float()", "test_train.py -k bfloat16_is_summed"),
    ("gradient of the head's last chunk alone", "train.py", "d_weight += p.T @ h", "d_weight.copy_(p.T @ h)", "test_train.py -k cross_entropy_and"),
    ("side path at the adapter's rate", "train.py", 'rate * group["lr_scale"]', "rate", "test_train.py -k side_path_is"),
    ("never clipped", "train.py", "trainable, settings.clip or math.inf", "trainable, math.inf", "test_train.py -k clipped"),
    ("held-out loss with dropout", "train.py", "    model.eval()\n", "", "test_train.py -k holds_the_run"),
    ("no dropout behind a held-out loss", "train.py", "    model.train(was_training)\n", "", "test_train.py -k changes_no_step"),
    ("dropout follows the global stream", "train.py", "torch.manual_seed(seed + ranks.rank)", "torch.rand(1)", "test_train.py -k changes_no_step"),
    ("a gradient that is not finite is stepped on", "train.py", "if not math.isfinite(loss + grad_norm):", "if not math.isfinite(loss):", "test_train.py -k not_finite"),
    ("moments lost on resume", "train.py", "optimizer.state[p][kind] = tensor.to(p.device)", "optimizer.state[p][kind] = torch.zeros_like(tensor)", "test_train.py -k killed_run"),
    ("a checkpoint of another model broadcast", "train.py", 'if info.get("format") != 2 or problems:', 'if info.get("format") != 2:', "test_train.py -k another_model"),
    ("a step logged twice", "train.py", '["step"] <= step else []', '["step"] <= step + 1 else []', "test_train.py -k killed_run"),
    ("half a line stops the resume", "train.py", "contextlib.suppress(ValueError):  # a line", "contextlib.suppress(KeyError):  # a line", "test_train.py -k killed_run"),
    ("old checkpoints stay", "train.py", 'sorted(run.glob("step-*"))[:-1]', 'sorted(run.glob("step-*"))[:0]', "test_train.py -k signal"),
    ("what was half written stays", "train.py", ', *run.glob(".*.tmp")):', ",):", "test_crash.py -k killed"),
    ("checkpoint written in place", "train.py", 'with atomic(run / f"step-{step:07d}") as tmp:', 'with contextlib.nullcontext(run / f"step-{step:07d}") as tmp:', "test_crash.py -k killed"),
    ("metrics behind the checkpoint", "train.py", 'fsync(run / "metrics.jsonl")', "pass", "test_crash.py -k power"),
    ("interrupt in the last step is not the end", "train.py", "if stop and step < steps:", "if stop:", "test_train.py -k signal"),
    ("other settings resume", "train.py", "if differ or set(saved)", "if set(saved)", "test_train.py -k refusal"),
    ("other data resumes", "train.py", 'if name.endswith("sha256"):', "if False:", "test_train.py -k refusal"),
    ("gradients are the mean over the processes", "train.py", "(loss * (ranks.world / count))", "(loss / count)", "test_ranks.py -k processes_equal"),
    ("gradients added up at the first micro-batch", "train.py", "batch is batches[-1]", "batch is batches[0]", "test_ranks.py -k processes_equal"),
    ("one dropout for all processes", "train.py", "seed + ranks.rank", "seed", "test_ranks.py -k dropout"),
    ("all processes save", "train.py", "if ranks.is_main and (last or", "if (last or", "test_ranks.py -k processes_equal"),
    ("renamed before it is on the disk", "common.py", 'for part in (*tmp.rglob("*"), tmp):', "for part in ():", "test_crash.py -k power"),
    ("files of a folder not on the disk", "common.py", 'for part in (*tmp.rglob("*"), tmp):', "for part in (tmp,):", "test_crash.py -k power"),
    ("temporary file stays after an error", "common.py", "    finally:\n        remove(tmp)", "    finally:\n        pass", "test_model.py -k atomic"),
    ("newest checkpoint by its name", "common.py", "key=lambda p: int(p.name[5:])", "key=str", "test_adapters.py -k trap_14"),
    ("generators by the seed alone", "common.py", '":".join(map(str, parts))', "str(parts[0])", "test_model.py -k generators"),
    ("every process on the first GPU", "common.py", 'number = rank or index or "0"', 'number = index or "0"', "test_ranks.py -k gpu_of_its_own"),
    ("byte order mark read as text", "common.py", '.removeprefix(b"\\xef\\xbb\\xbf")', "", "test_model.py -k lines_and_json"),
    ("infinite settings accepted", "common.py", "<= v < 1e30]", "<= v]", "test_train.py -k settings_are_finite"),
    ("a backbone known by its files' sizes", "common.py", "(f.name, file_hash(f))", "(f.name, f.stat().st_size)", "test_train.py -k refusal"),
    ("gathered process by process", "common.py", "[parts[i % self.world][i // self.world] for i in range(total)]", "[item for part in parts for item in part]", "test_ranks.py -k sharded"),
    ("an error of the first process is one of all", "common.py", "raise SystemExit(1)", "raise ValueError(self.rank)", "test_ranks.py -k ends_one"),
    ("what trains is cut too", "common.py", "ignored_params=whole", "ignored_params=set()", "test_ranks.py -k processes_equal"),
    ("cut answers counted as ended", "eval.py", "is_whole = stopped or", "is_whole = True or", "test_eval.py -k how_many_rows"),
    ("interval of 90 %", "eval.py", "1.959963984540054", "1.6448536269514722", "test_eval.py -k wilson"),
    ("likelihood of the first token dropped", "eval.py", "torch.cat([hidden, model(", "torch.cat([hidden * 0, model(", "test_eval.py -k likelihoods_equal"),
    ("replies share another prompt's prefix", "eval.py", "cache.select_rows(owner.tolist())", "cache.select_rows(owner.tolist()[::-1])", "test_eval.py -k likelihoods_equal"),
    ("a merge at the border cut in two", "eval.py", "zip(encode(prompt.text), *whole)", "zip(encode(prompt.text))", "test_eval.py -k merge"),
    ("pass@k with replacement", "eval.py", "1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))", "1 - (1 - c / n) ** k", "test_eval.py -k pass_at"),
    ("samples counted as items", "eval.py", 'right.setdefault(row["id"], [])', 'right.setdefault(row["id"] + str(row["sample"]), [])', "test_eval.py -k several_samples"),
    ("programs run unasked", "eval.py", "if names and not allowed:", "if False:", "test_eval.py -k refusals"),
    ("plus tests alone", "eval.py", 'if base[i].passed and "plus_tests"', 'if "plus_tests"', "test_eval.py -k base_and_plus"),
    ("sampling seeds by place", "eval.py", "numbers = settings.samples, [number for number, _ in items]", "numbers = settings.samples, list(range(len(items)))", "test_ranks.py -k scores_of"),
    ("prompts may differ", "eval.py", '"\\0".join(record["prompt"] for', '"\\0".join("" for', "test_eval.py -k must_be_equal"),
    ("every choice's solution is the first", "eval.py", 'LETTERS.index(item["answer"]) if task.kind == "choice" else 0', "0", "test_eval.py -k choices"),
    ("no BOS before plain text", "eval.py", 'tokenizer.begin if settings.format == "plain" else []', "[]", "test_eval.py -k llamas_bos"),
    ("stop token of the run forgotten", "eval.py", 'settings.stop_token or run.get("stop_token", "")', "settings.stop_token", "test_eval.py -k stop_token"),
    ("stop token unlabelled", "data/chat.py", "range(first or 0, stops[-1] + 1)", "range(first or 0, stops[-1])", "test_chat.py -k labels_equal"),
    ("token across the border labelled", "data/chat.py", "begin <= a < b <= end", "begin < b <= end", "test_chat.py -k labels_equal"),
    ("labels behind another prompt's ids", "data/chat.py", "elif ids[: len(start)] == start:", "elif True:", "test_chat.py -k labels_equal"),
    ("weight 0 is learnt", "data/chat.py", "0 not in [message.get(name) for name in LABEL_FIELDS]", "True", "test_chat.py -k what_is_learnt"),
    ("a prompt of messages is learnt", "data/chat.py", '{**m, "train": False}', "m", "test_chat.py -k what_is_learnt"),
    ("tools dropped in silence", "data/chat.py", "if tools and tokenizer.render(self.messages) == self.text:", "if False:", "test_chat.py -k would_lose"),
    ("rows without their tools", "data/chat.py", "add_generation_prompt=prompt, tools=self.tools)", "add_generation_prompt=prompt, tools=None)", "test_chat.py -k what_is_learnt"),
    ("text dropped in silence", "data/chat.py", "if not kept:", "if False:", "test_chat.py -k loses_text"),
    ("a field dropped in silence", "data/chat.py", 'elif lost or (role == "assistant"', 'elif (role == "assistant"', "test_chat.py -k would_lose"),
    ("prompt and completion without a border", "data/chat.py", "            if apart:\n", "            if False:\n", "test_chat.py -k would_lose"),
    ("GSM8K's marks learnt", "data/chat.py", 're.sub(r"<<[^<>]*>>", "", last)', "last", "test_chat.py -k say_the_same"),
    ("opened thoughts are prompt", "data/chat.py", 'if text[:begin].rstrip().endswith("<think>") and', "if False and", "test_chat.py -k labels_equal"),
    ("a split stop token passes", "data/chat.py", "if not stops or ids[stops[-1]] not in tokenizer.eos_ids:", "if not stops:", "test_chat.py -k stop_token"),
    ("config.json's stop ids replace others", "data/chat.py", "ids = ids or found", "ids = found", "test_chat.py -k stop_ids"),
    ("template's end of turn no stop token", "data/chat.py", "if end and added[end] not in ids:", "if False:", "test_chat.py -k stop_ids"),
    ("special_tokens_map.json always read", "data/chat.py", 'if "added_tokens_decoder" not in config:', "if True:", "test_chat.py -k beside_each_other"),
    ("blanks before a tag stay", "data/chat.py", "trim_blocks=True, lstrip_blocks=True", "trim_blocks=True", "test_chat.py -k templates_render"),
    ("names set in generation live on", "data/chat.py", "jinja2.nodes.Scope(body, lineno=line)", "body", "test_chat.py -k templates_render"),
    ("templates outside the sandbox", "data/chat.py", "jinja2.sandbox.ImmutableSandboxedEnvironment(", "jinja2.Environment(", "test_chat.py -k hostile"),
    ("templates see today", "data/chat.py", "strftime_now=TODAY.strftime", "strftime_now=datetime.datetime.now().strftime", "test_chat.py -k pinned"),
    ("thinking on", "data/chat.py", '"enable_thinking": False', '"enable_thinking": True', "test_chat.py -k labels_equal"),
    ("examples of another subject", "data/tasks.py", 'if row.get("subject") == item.get("subject")]', "]", "test_tasks.py -k subject"),
    ("no header in plain text", "data/tasks.py", "text = task.header(item)", 'text = ""', "test_tasks.py -k plain_prompts"),
    ("strict takes the last mark", "data/tasks.py", 're.search(r"#### (\\-?[0-9\\.\\,]+)", text)', 're.search(r"(?s).*#### (\\-?[0-9\\.\\,]+)", text)', "test_tasks.py -k evaluators"),
    ("decimals compared as text", "data/tasks.py", "Decimal(plain_number(found)) == Decimal(plain_number(answer))", "plain_number(found) == plain_number(answer)", "test_tasks.py -k judge_says"),
    ("an unclosed box counts", "data/tasks.py", "    return None\n\n\ndef normalize", "    return group[1:]\n\n\ndef normalize", "test_tasks.py -k evaluators"),
    ("tuples in any brackets", "data/tasks.py", "if kind != other or len(left)", "if len(left)", "test_tasks.py -k evaluators"),
    ("minus of a fraction lost", "data/tasks.py", "(-above if parts[1] else above)", "above", "test_golden.py -k evaluators_pass"),
    ("acc_norm by words", "data/tasks.py", "p / len(c) if", "p / len(c.split()) if", "test_tasks.py -k choices_are_judged"),
    ("the answer among the messages", "data/tasks.py", '[-1]["role"] != "assistant"', '[-1]["role"] != ""', "test_tasks.py -k refused"),
    ("two rows of one id", "data/tasks.py", "if count > 1]", "if count > 9]", "test_tasks.py -k refused"),
    ("cut at the last stop", "data/code.py", "text[: min((", "text[: max((", "test_tasks.py"),
    ("lists stay lists", "data/code.py", 'if name.removeprefix("Mbpp/") in numbers.split():', "if False:", "test_tasks.py -k json_lists"),
    ("integers equal within 1e-6", "data/code.py", "(1e-6 if all(isinstance(x, float) for x in values) else 0)", "1e-6", "test_tasks.py -k plus_tests"),
    ("plus tests without the base ones", "data/code.py", 'plus["base_input"] + plus["plus_input"]', 'plus["plus_input"]', "test_tasks.py -k every_row"),
    ("exit code believed", "data/sandbox.py", "if token in said:", "if child.returncode == 0:", "test_sandbox.py -k 'honest or wrong'"),
    ("tests under the program's builtins", "data/sandbox.py", '{**names, "__builtins__": pristine}', "names", "test_sandbox.py -k patched"),
    ("a late program is left alone", "data/sandbox.py", "left = deadline - time.monotonic()", "left = deadline + 99 - time.monotonic()", "test_sandbox.py -k does_not_end"),
    ("threads without bound", "data/sandbox.py", "others + limits.threads + 1", "others + limits.threads + 9999", "test_sandbox.py -k threads"),
    ("token among the collected objects", "data/sandbox.py", "    gc.freeze()", "    pass", "test_sandbox.py -k token"),
    ("memory without bound", "data/sandbox.py", '"AS": limits.memory_mb * 2**20', '"AS": limits.memory_mb * 2**40', "test_sandbox.py -k missing"),
    ("a download is not verified", "data/prepare.py", "if found != expected:", "if False:", "test_prepare.py"),
    ("a broken download starts over", "data/prepare.py", '({"Range": f"bytes={have}-"} if have else {})', "{}", "test_prepare.py -k downloads"),
    ("what is beyond the end is asked for ever", "data/prepare.py", "if code == 416:", "if False:", "test_prepare.py -k downloads"),
    ("old rows taken for new", "data/prepare.py", "return note == record(sources, files)", "return True", "test_prepare.py -k changed"),
    ("mean memory over the pads", "experiments/internals.py", "z[b, : fed[n]]", "z[b]", "test_internals.py -k every_quantity"),
    ("swapped memory is the row's own", "experiments/internals.py", "rows[(n + 1) % len(rows)]", "rows[n]", "test_internals.py -k every_quantity"),
    ("divergence the other way round", "experiments/internals.py", "(p.exp() * (p - q))", "(q.exp() * (q - p))", "test_internals.py -k every_quantity"),
    ("share of the adapter's loss", "experiments/internals.py", 'draws, values, above["backbone"])', 'draws, values, above["adapter"])', "test_internals.py -k growth"),
    ("growth upside down", "experiments/internals.py", "draws, last, first)", "draws, first, last)", "test_internals.py -k growth"),
    ("every memory is the row's own", "experiments/internals.py", "        if self.memory is None:", "        if True:", "test_internals.py -k every_quantity"),
    ("seeds not resampled", "experiments/compare.py", "seeds[start : start + rows] / S", "np.ones_like(seeds[start : start + rows]) / S", "test_compare.py -k every_line"),
    ("other items for each backbone", "experiments/compare.py", 'task.rpartition("/")[2].encode()', "task.encode()", "test_compare.py -k several_backbones"),
    ("tokens of a solution not weighted", "experiments/compare.py", "sizes[k, n] += size", "sizes[k, n] += 1", "test_compare.py -k every_line"),
    ("one-sided McNemar", "experiments/compare.py", "2 * sum(chosen)", "sum(chosen)", "test_compare.py -k mcnemar"),
    ("different conditions pass", "experiments/compare.py", "    if wrong:\n", "    if False:\n", "test_compare.py -k refusals"),
    ("other items on one side", "experiments/compare.py", "run.sizes != first.sizes", "False", "test_compare.py -k refus"),
    ("a loss counts as at least 0", "experiments/compare.py", "10) >= 0 for", "10) <= 0 for", "test_compare.py -k the_table"),
    ("baseline with the side path", "experiments/sweep.py", "replace(candidate, talan=False, scope=scope)", "replace(candidate, scope=scope)", "test_sweep.py -k pair_differs"),
    ("rank of the control rounded down", "experiments/sweep.py", "math.ceil((", "math.floor((", "test_sweep.py -k control"),
    ("loss at the start decides", "experiments/sweep.py", 'line["step"] == first["steps"]', 'line["step"] == 0', "test_sweep.py -k layout"),
    ("one side always first", "experiments/speed.py", "list(tasks)[::-1] if n % 2 else list(tasks)", "list(tasks)", "test_speed.py -k turns"),
    ("a run of scope full over another backbone", "talan.py", "if own.exists() and not (", "if False and not (", "test_train.py -k scope_full"),
    ("frozen parameters reported as trainable", "talan.py", "if p.requires_grad and group_of(name) == group]", "if group_of(name) == group]", "test_talan.py -k report"),
    ("samples share their draws", "eval.py", "numbers=[n * number + i for", "numbers=[number for", "test_eval.py -k how_many_rows"),
    ("processes start as threads do", "data/sandbox.py", "(any_bit, 2, 0, 0x00010000)", "(any_bit, 2, 2, 0x00010000)", "test_sandbox.py -k missing"),
    ("a stopped run taken for finished", "experiments/sweep.py", 'if checkpoint_folder(run).name == f"step-{read_record(run).get(\'steps\', 0):07d}":', "if checkpoint_folder(run) != run:", "test_sweep.py -k killed_sweep"),
    ("positions of a graph's step all visible", "model.py", "visible and (B > 1 or T > 1 or padded)", "visible and (B > 1 or T > 1)", "test_model.py -k cuda_graphs"),
    ("deterministic algorithms never on", "train.py", "torch.use_deterministic_algorithms(True)", "pass", "test_train.py -k deterministic"),
]
# fmt: on


def try_mutant(seconds: int, mutant: tuple[str, ...]) -> tuple[str, str, int]:
    """("killed" or "SURVIVED", name, seconds). Raises ValueError when it is no fair trial."""
    (name, file, old, new, words), began = mutant, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "talan")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (copy / file).write_text((copy / file).read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", *shlex.split(words)]
        options = {"cwd": copy / "tests", "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        try:
            done = subprocess.run(command, timeout=seconds, capture_output=True, **options)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{name}: pytest {words} took more than {seconds} s") from None
    if done.returncode not in (0, 1):
        raise ValueError(f"{name}: pytest {words}: {done.stdout.decode()[-2000:]}")
    return "killed" if done.returncode else "SURVIVED", name, round(time.monotonic() - began)


def main(overrides: dict) -> None:
    """Try those asked for. Raises ValueError on a passage that is not there exactly once."""
    settings = Settings(**overrides)
    for name, file, old, *_ in MUTANTS:
        if (ROOT / file).read_text().count(old) != 1:
            raise ValueError(f"{name}: expected the passage once in {file}: {old!r}")
    chosen = [mutant for mutant in MUTANTS if settings.only in mutant[0] and not settings.check]
    survivors = []
    with ThreadPoolExecutor(settings.workers) as pool:
        for what, name, seconds in pool.map(partial(try_mutant, 300), chosen):
            print(f"{what:8}  {seconds:3} s  {name}", flush=True)
            survivors += [name] if what == "SURVIVED" else []
    print(f"{len(chosen)} of {len(MUTANTS)} mutants tried, survivors: {survivors or 'none'}")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    run_script(main, Settings, "tests/mutants.py")
