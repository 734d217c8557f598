"""Super-NaturalInstructions, the alignment tax: reading the benchmark's folder, its prompts, and its scores.

The folder is a clone of allenai/natural-instructions: `splits/default/test_tasks.txt` names the tasks, `tasks/<task>.json` holds each.
Scores follow the benchmark (Wang et al. 2022): ROUGE-L F1 with stemming and exact match of normalised text, each against the best of an
instance's references; and against the first reference alone, as the published script compared.
"""

from __future__ import annotations

import math
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.chat_templates import ChatTemplate, encode_instructions
from parts.errors import InputError
from parts.files import read_json, read_text
from parts.overlap import rouge_l
from parts.processes import is_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS = 512  # the longest prompt

# The categories whose answers are labels: the benchmark reports exact match on these.
CLASSIFICATION = {
    "Textual Entailment",
    "Cause Effect Classification",
    "Coreference Resolution",
    "Dialogue Act Recognition",
    "Answerability Classification",
    "Word Analogy",
}


@dataclass(frozen=True)
class Instance:
    """One instance of a task. `definition` and `text` make the instruction."""

    task: str
    category: str
    number: str
    definition: str
    text: str
    references: tuple[str, ...]

    @property
    def instruction(self) -> str:
        return f"{self.definition}\n\n{self.text}"


def read_instances(folder: str, tasks: Sequence[str], limit: int) -> list[Instance]:
    """The first `limit` instances of each task; of the default track's test tasks where none is named.

    Raises:
        InputError: no such folder, an unknown task, or a task file that lacks something.
    """
    root = Path(folder)
    split = root / "splits" / "default" / "test_tasks.txt"
    if not split.is_file():
        raise InputError(f"{split}: no such file, expected a clone of allenai/natural-instructions in {root}")
    names = list(tasks) or [line.strip() for line in read_text(split).splitlines() if line.strip()]
    instances = []
    for name in names:
        path = root / "tasks" / f"{name}.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected the task {name!r}")
        instances += _instances(path, name, limit)
    return instances


def _instances(path: Path, name: str, limit: int) -> list[Instance]:
    task = read_json(path)
    for field, kind in (("Definition", str), ("Categories", str), ("Instances", dict)):
        value = task.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            raise InputError(f"{path}: field '{field}' is {type(value).__name__}, expected a list of {kind.__name__}, not empty")
    found = []
    for number, row in enumerate(task["Instances"][:limit], start=1):
        if not isinstance(row.get("input"), str):
            raise InputError(f"{path}: instance {number}: field 'input' is {type(row.get('input')).__name__}, expected text")
        outputs = row.get("output")
        if not isinstance(outputs, list) or not outputs or not all(isinstance(output, str) for output in outputs):
            raise InputError(f"{path}: instance {number}: field 'output' is {type(outputs).__name__}, expected a list of texts, not empty")
        identity = str(row.get("id", f"{name}-{number}"))
        found.append(Instance(name, task["Categories"][0], identity, task["Definition"][0], row["input"], tuple(outputs)))
    return found


def superni_prompts(instances: Sequence[Instance], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts' tokens, `PROMPT_TOKENS` at most: what is too much is cut off the end of the instance's input, then of the definition.

    How many are cut is said, and of which tasks nothing of the input is left: the default track has a definition that alone is longer.

    Raises:
        InputError: the template alone is too long.
    """
    found = [_prompt(instance, template, tokenizer) for instance in instances]
    cut, bare = (Counter(instance.task for instance, (_, how) in zip(instances, found) if how >= least) for least in (1, 2))
    if cut and is_first_process():
        print(f"SuperNI, {template.name}: {cut.total()} of {len(found)} prompts are cut to {PROMPT_TOKENS} tokens")
    for task, count in bare.items() if is_first_process() else ():
        print(f"SuperNI, {template.name}: {task}: its definition is so long that nothing is left of the input of {count} instances")
    return [tokens for tokens, _ in found]


def _prompt(instance: Instance, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """A prompt's tokens, and how it was cut: 0 not at all, 1 in part of its input, 2 so far that nothing is left of it."""
    (tokens,) = encode_instructions(tokenizer, template, [instance.instruction])
    if len(tokens) <= PROMPT_TOKENS:
        return tokens, 0
    kept = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (instance.definition, instance.text)]
    while (excess := len(tokens) - PROMPT_TOKENS) > 0:
        last = 1 if kept[1] else 0
        if not kept[last]:
            raise InputError(f"chat template '{template.name}': alone it has {len(tokens)} tokens, expected {PROMPT_TOKENS} at most")
        kept[last] = kept[last][: max(0, len(kept[last]) - excess)]
        definition = instance.definition if last else tokenizer.decode(kept[0])
        (tokens,) = encode_instructions(tokenizer, template, [f"{definition}\n\n{tokenizer.decode(kept[1])}"])
    return tokens, 1 if kept[1] else 2


def superni_rows(instances: Sequence[Instance], predictions: Sequence[str]) -> list[dict]:
    """One row an instance: what it is, the prediction, and its scores."""
    return [
        {"task": instance.task, "id": instance.number, "prediction": prediction, "references": list(instance.references),
         **score(instance, prediction)}
        for instance, prediction in zip(instances, predictions)
    ]  # fmt: skip


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces: what exact match compares."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def score(instance: Instance, prediction: str) -> dict[str, float]:
    """ROUGE-L against the best and the first reference, exact match against the best; each in [0, 1]."""
    rouge = [rouge_l(reference, prediction) for reference in instance.references]
    exact = any(normalise(reference) == normalise(prediction) for reference in instance.references)
    return {"rouge_l": max(rouge), "rouge_l_first": rouge[0], "exact_match": float(exact)}


def summarise(instances: Sequence[Instance], scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Means over instances in percent, as the benchmark reports them, overall, by category and by task.

    The standard error of a task is over its instances. Those of a category and overall are over tasks, because instances of one task are
    alike: the mean's error by the sums of each task's deviations. Exact match is over classification tasks alone.
    """
    by_task: dict[str, list[dict[str, float]]] = {}
    category = {}
    for instance, row in zip(instances, scores):
        by_task.setdefault(instance.task, []).append(row)
        category[instance.task] = instance.category
    tasks = {}
    for name, rows in by_task.items():
        tasks[name] = {"category": category[name], "instances": len(rows)}
        for metric in ("rouge_l", "rouge_l_first", "exact_match"):
            if metric != "exact_match" or category[name] in CLASSIFICATION:
                tasks[name][metric] = _mean_and_error(row[metric] for row in rows)
    groups = {name: [task for task in tasks.values() if task["category"] == name] for name in sorted(set(category.values()))}
    return {
        "overall": _over_tasks(tasks.values()),
        "by_category": {name: _over_tasks(members) for name, members in groups.items()},
        "by_task": tasks,
    }


def describe_superni(summary: dict) -> str:
    """The overall scores of `summarise`, one line each."""
    overall = summary["overall"]
    names = {
        "rouge_l": "ROUGE-L, best reference",
        "rouge_l_first": "ROUGE-L, first reference",
        "exact_match": "exact match, classification",
    }
    lines = [f"SuperNI: {overall['tasks']} tasks, {overall['instances']} instances"]
    for metric, label in names.items():
        if metric in overall:
            error = overall[metric]["standard_error"]
            lines.append(f"  {label}: {overall[metric]['mean']:.2f}" + (f" +- {error:.2f}" if error is not None else ""))
    return "\n".join(lines)


def _over_tasks(tasks: Iterable[dict]) -> dict:
    tasks = list(tasks)
    found = {"tasks": len(tasks), "instances": sum(task["instances"] for task in tasks)}
    for metric in ("rouge_l", "rouge_l_first", "exact_match"):
        counted = [task for task in tasks if metric in task]
        if not counted:
            continue
        instances, several = sum(task["instances"] for task in counted), len(counted)
        mean = sum(task["instances"] * task[metric]["mean"] for task in counted) / instances
        squares = sum((task["instances"] * (task[metric]["mean"] - mean)) ** 2 for task in counted)
        error = math.sqrt(squares * several / (several - 1)) / instances if several > 1 else None
        found[metric] = {"mean": mean, "standard_error": error}
    return found


def _mean_and_error(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and its standard error (None for a single value), in percent."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) * 100 if len(values) > 1 else None
    return {"mean": statistics.fmean(values) * 100, "standard_error": error}
