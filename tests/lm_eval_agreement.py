"""Hold our records against EleutherAI's lm-evaluation-harness: its prompts, its log-likelihoods, its filters, its verdicts.

It pulls some ninety packages, so it is not in requirements-dev.txt and has an environment of its own; nothing is downloaded later:

    python -m venv lm && lm/bin/python -m pip install -r requirements.txt "lm_eval[hf]==0.4.13" transformers==5.23.0
    python eval.py --backbone B --tasks arc_easy,arc_challenge,mmlu_stem,gsm8k --limit 200 --format plain --shots 0 --dtype float32 --out RUN
    lm/bin/python tests/lm_eval_agreement.py --records RUN/records.jsonl --backbone B --source FOLDER

FOLDER holds the files as their authors published them, named as in data/sources.json ("local"). lm-eval's own task definitions,
as installed, turn them into prompts, so a wrong prompt or a wrong key of ours shows. Only the rows of a task are replaced, and
its few-shot examples are the first N in file order (what lm-eval does for MMLU; for ARC and GSM8K it would draw them at random).
Choice tasks are scored by its Hugging Face model. For gsm8k it is given our completions and extracts and judges by itself.

Prompts that differ from ours on purpose, counted under "same prompt": gsm8k with --shots (lm-eval's examples keep the calculator
marks <<...>>) and mmlu with --chat (lm-eval names the subject in a system message, we do in the user's).

Exit code 1 when a verdict of a choice task agrees on fewer than 99 % of the items, or anything extracted from a completion differs.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.rows import parse_object, read_lines
from data.settings import parse, setting

VERSION = "0.4.13"  # of lm_eval; other versions have other prompts
ARC = {"arc_easy": "Easy", "arc_challenge": "Challenge"}
FILTERS = {"strict": "strict-match", "flexible": "flexible-extract"}  # our name of a rule -> lm-eval's
MEAN = {"aggregation": "mean", "higher_is_better": True}
LEAST = 99.0  # per cent of a choice task's items
Doc = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Compare the records of an evaluation with what lm-evaluation-harness makes of the same items."""

    records: str = setting("", "records.jsonl that eval.py wrote")
    backbone: str = setting("", "Hugging Face folder of the model that wrote them")
    source: str = setting("", "folder of the published files: arc/, mmlu_stem/, gsm8k/")
    tasks: tuple[str, ...] = setting((), "some of arc_easy, arc_challenge, mmlu_stem, gsm8k; empty: all that the records have")
    shots: int = setting(0, "few-shot examples in the records' prompts")
    chat: bool = setting(False, "the records' prompts went through the chat template")
    dtype: str = setting("float32", "float32 or bfloat16, as the records were made")
    device: str = setting("cpu", "cpu or cuda")
    batch_rows: int = setting(8, "likelihoods computed at once")


@dataclass(frozen=True)
class Comparison:
    """One item under one rule: both verdicts, whether all is the same, and how far apart the log-likelihoods are."""

    task: str
    rule: str
    id: str
    ours: bool
    theirs: bool
    agrees: bool
    prompt: bool
    difference: float
    values: str


# ---------------------------------------------------------------------------------------------------------------------
# The published files, in the shape of the data sets that lm-eval would download
# ---------------------------------------------------------------------------------------------------------------------

def read_docs(file: Path) -> list[Doc]:
    """The objects of a JSONL file, or of the same file with .gz."""
    return [parse_object(line, where) for where, line in read_lines(file if file.exists() else f"{file}.gz")]


def arc_docs(source: Path, level: str, split: str) -> list[Doc]:
    """allenai/ai2_arc."""
    return [{"id": row["id"], "question": row["question"]["stem"], "answerKey": row["answerKey"],
             "choices": {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")}}
            for row in read_docs(source / f"arc/ARC-{level}-{split}.jsonl")]


def mmlu_docs(source: Path, subject: str, split: str) -> list[Doc]:
    """cais/mmlu, one subject."""
    with open(source / f"mmlu_stem/{split}/{subject}_{split}.csv", encoding="utf-8", newline="") as file:
        return [{"id": f"{subject}/{i}", "question": question, "choices": choices, "answer": "ABCD".index(letter)}
                for i, (question, *choices, letter) in enumerate(csv.reader(file))]


def gsm8k_docs(source: Path, split: str) -> list[Doc]:
    """openai/gsm8k."""
    return [{"id": f"{split}-{i}", **row} for i, row in enumerate(read_docs(source / f"gsm8k/{split}.jsonl"))]


def parts(task: str, ids: set[str], source: Path) -> Iterator[tuple[str, list[Doc], list[Doc]]]:
    """lm-eval's name of each task that makes up one of ours, its items, and where few-shot examples come from."""
    if task in ARC:
        yield task, arc_docs(source, ARC[task], "Test"), arc_docs(source, ARC[task], "Train")
    elif task == "gsm8k":
        yield task, gsm8k_docs(source, "test"), gsm8k_docs(source, "train")
    else:
        for subject in sorted({name.split("/")[0] for name in ids}):
            yield f"mmlu_{subject}", mmlu_docs(source, subject, "test"), mmlu_docs(source, subject, "dev")


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval
# ---------------------------------------------------------------------------------------------------------------------

def build_task(manager: Any, name: str, items: list[Doc], examples: list[Doc]) -> Any:
    """lm-eval's installed task with its rows replaced; few-shot examples in file order; mmlu also gets acc_norm."""
    from datasets import Dataset

    splits = {"test": Dataset.from_list(items), **dict.fromkeys(("train", "validation", "dev"), Dataset.from_list(examples))}
    changes: Doc = {"custom_dataset": lambda **_: splits, "fewshot_config": {"sampler": "first_n"}}
    if name.startswith("mmlu_"):
        changes["metric_list"] = [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}]
    return manager.load({"group": "ours", "task": [{"task": name, **changes}]})["tasks"][name]


def run_lm_eval(settings: Settings, records: Mapping[str, Mapping[str, Doc]]) -> dict[str, list[Doc]]:
    """lm-eval's logged samples of each of our tasks. Raises ValueError on an id that the published files do not have."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Model(HFLM):
        """Likelihoods by the model, completions as stored."""

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [records["gsm8k"][request.doc["id"]]["completion"] for request in requests]

    manager, tasks, owner = TaskManager(), [], {}
    for task, rows in records.items():
        missing = set(rows)
        for name, docs, examples in parts(task, missing, Path(settings.source)):
            items = [doc for doc in docs if doc["id"] in rows]
            missing -= {doc["id"] for doc in items}
            tasks.append(build_task(manager, name, items, examples))
            owner[name] = task
        if missing:
            raise ValueError(f"{task}: {settings.source} has no {', '.join(sorted(missing)[:10])}")
    model = Model(pretrained=settings.backbone, dtype=settings.dtype, device=settings.device, batch_size=settings.batch_rows)
    found = simple_evaluate(model, tasks=tasks, num_fewshot=settings.shots, apply_chat_template=settings.chat, log_samples=True,
                            bootstrap_iters=0, task_manager=manager)
    samples: dict[str, list[Doc]] = {task: [] for task in records}
    for name, logged in found["samples"].items():
        samples[owner[name]] += logged
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------

def compare_choices(sample: Doc, record: Doc) -> Iterator[Comparison]:
    """acc and acc_norm of one item."""
    theirs, ours = [responses[0][0] for responses in sample["resps"]], record["logprobs"]
    far = max(abs(a - b) for a, b in zip(ours, theirs)) if len(ours) == len(theirs) else float("inf")
    values = " ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(ours, theirs))
    for rule in ("acc", "acc_norm"):
        mine, its = record["verdicts"][rule], bool(sample[rule])
        yield Comparison(record["task"], rule, record["id"], mine, its, mine == its, record["prompt"] == sample["arguments"][0][0], far, values)


def compare_completion(sample: Doc, record: Doc) -> Iterator[Comparison]:
    """What one filter found in one completion, and the verdict on it."""
    rule = next(ours for ours, theirs in FILTERS.items() if theirs == sample["filter"])
    mine, its = record["verdicts"][rule], bool(sample["exact_match"])
    found, expected = record["extracted"][rule], sample["filtered_resps"][0]
    same, prompt = mine == its and (found or "[invalid]") == expected, record["prompt"] == sample["arguments"][0][0]
    yield Comparison(record["task"], rule, record["id"], mine, its, same, prompt, 0.0, f"{found!r}/{expected!r}")


def report(comparisons: Sequence[Comparison]) -> bool:
    """Print the table and every disagreement; whether the agreement is good enough."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for item in comparisons:
        groups.setdefault((item.task, item.rule), []).append(item)
    print(f"{'task':14} {'rule':9} {'n':>5} {'agree':>6} {'agree %':>8} {'ours %':>7} {'lm-eval %':>10} {'max |difference|':>17} {'same prompt':>12}")
    good = True
    for (task, rule), items in groups.items():
        n, agree = len(items), sum(item.agrees for item in items)
        good &= 100 * agree >= (100.0 if rule in FILTERS else LEAST) * n
        far = "" if rule in FILTERS else f"{max(item.difference for item in items):.2g}"
        print(f"{task:14} {rule:9} {n:5} {agree:6} {100 * agree / n:8.2f} {100 * sum(item.ours for item in items) / n:7.2f} "
              f"{100 * sum(item.theirs for item in items) / n:10.2f} {far:>17} {sum(item.prompt for item in items):12}")
    for item in comparisons:
        if not item.agrees:
            print(f"differs: {item.task} {item.id} {item.rule}: verdicts {item.ours}/{item.theirs}, ours/lm-eval {item.values}")
    return good


def load_records(settings: Settings) -> dict[str, dict[str, Doc]]:
    """task -> id -> record. Raises ValueError on a task that is not there or not known here."""
    records: dict[str, dict[str, Doc]] = {}
    for where, line in read_lines(settings.records):
        record = parse_object(line, where)
        records.setdefault(record["task"], {})[record["id"]] = record
    known = [*ARC, "mmlu_stem", "gsm8k"]
    tasks = settings.tasks or tuple(task for task in records if task in known)
    if not tasks or set(tasks) - set(records) or set(tasks) - set(known):
        raise ValueError(f"tasks: expected some of {', '.join(known)} that {settings.records} has, found {', '.join(tasks) or 'none'}")
    return {task: records[task] for task in tasks}


def main(settings: Settings) -> bool:
    """Run lm-eval on the records' items and compare; whether the agreement is good enough."""
    if not (settings.records and settings.backbone and settings.source):
        raise ValueError("expected --records, --backbone and --source")
    records = load_records(settings)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import lm_eval
    import torch
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    samples = run_lm_eval(settings, records)
    comparisons = [item for task, logged in samples.items() for sample in logged
                   for item in (compare_completion if task == "gsm8k" else compare_choices)(sample, records[task][sample["doc"]["id"]])]
    print(f"lm_eval {lm_eval.__version__}{'' if lm_eval.__version__ == VERSION else f' (written for {VERSION})'}, transformers "
          f"{transformers.__version__}, torch {torch.__version__}; shots {settings.shots}, {'chat' if settings.chat else 'plain'}, {settings.dtype}")
    return report(comparisons)


if __name__ == "__main__":
    try:
        raise SystemExit(0 if main(parse(Settings)) else 1)
    except (ValueError, OSError) as error:
        raise SystemExit(f"lm_eval_agreement.py: {error}") from None
