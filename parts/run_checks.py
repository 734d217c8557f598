"""Whether runs, and the checkpoints of one, were trained and rolled out alike. What differs is said: it may be what a comparison shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from parts.errors import InputError
from parts.ppo_checkpoints import HARMLESS, is_same_setting
from parts.runs import Checkpoint
from parts.samples import Samples
from parts.weight_samples import is_same_sample, weight_sample

# What says how far a run goes and where it is looked at, and not how it is trained.
COURSE = HARMLESS | {"save_freq", "dev_prompt_path", "dev_prompts"}
PATHS = {"model_name", "tokenizer_name", "dataset_path", "relevance_model_name", "reward_model_name"}


def training_differences(one: Checkpoint, other: Checkpoint, apart: Collection[str] = ()) -> list[str]:
    """What two checkpoints were trained with otherwise, by name: settings besides `apart`, weights of the start, rows, processes.

    Nothing is known of a checkpoint without a record, and so nothing is said of it. Copies under other names are the same.
    """
    first, second = one.record, other.record
    if not (first and second):
        return []
    a_schedule = one.trained.get("use_optimizer_setup") or other.trained.get("use_optimizer_setup")
    names = one.trained.keys() & other.trained.keys() - COURSE - set(apart) - (set() if a_schedule else {"overall_steps"})
    found = {name for name in names if not is_same_setting(one.trained[name], other.trained[name], name in PATHS)}
    samples = _table(first, "base_sample"), _table(second, "base_sample")
    if all(samples):
        found = found - {"model_name"} | (set() if is_same_sample(*samples) else {"model_name"})
    rows = [_table(record, "data").get("dataset_path") for record in (first, second)]
    if all(rows):
        found = found - {"dataset_path"} | ({"dataset_path"} if rows[0] != rows[1] else set())
    if first.get("processes") != second.get("processes"):
        found.add("number of processes")
    return sorted(found)


def _table(record: Mapping, name: str) -> Mapping:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def one_training(checkpoints: Sequence[Checkpoint], reward: Collection[str]) -> bool:
    """Whether all checkpoints of a run were trained on the last one's reward; a line names each that was trained otherwise than it.

    Args:
        reward: the settings that are the reward's.
    """
    last, alike = checkpoints[-1], True
    for point in checkpoints[:-1]:
        differences = training_differences(point, last)
        code, now = (_table(checkpoint.record, "reward_source") for checkpoint in (point, last))
        if code and now and code != now:
            differences.append("code of the reward")
        if differences:
            print(f"warning: {point.name} was trained with another {', '.join(differences)} than {last.name}")
        alike &= not (set(differences) & {*reward, "code of the reward"})
    return alike


def _warn(lines: list[str]) -> list[str]:
    """The lines, once they are printed."""
    for line in lines:
        print(f"warning: {line}")
    return lines


def warn_of_changed_code(checkpoint: Checkpoint, source: dict[str, str]) -> list[str]:
    """A line where the reward's code is not what it was in training: the run would be judged by another reward than its own."""
    recorded = _table(checkpoint.record, "reward_source")
    changed = [name for name, own in source.items() if recorded.get(name, own) != own]
    told = f"has changed since {checkpoint.folder.name} was trained; its proxy is computed with the file as it is"
    return _warn([f"{name} {told}" for name in changed])


def warn_of_other_training(runs: Sequence, designs: Sequence[str], reward: Collection[str]) -> list[str]:
    """A line for each run that was trained with other settings, besides its reward, than the first run, or the first of its design.

    Args:
        reward: the settings that are the reward's, which runs of two designs differ in.
    """
    first: dict[str, object] = {}
    lines = []
    for run, design in zip(runs, designs):
        seed, one = design in first, first.get(design, runs[0])
        first.setdefault(design, run)
        differences = training_differences(run.checkpoints[-1], one.checkpoints[-1], {"seed", *(() if seed else reward)})
        if differences:
            how = "counts as another seed of" if seed else "is compared with"
            lines.append(f"{run.name} {how} {one.name}, and was trained with another {', '.join(differences)}")
    return _warn(lines)


def warn_of_other_draws(runs: Sequence) -> list[str]:
    """A line for each run whose rollouts were sampled otherwise than the first run's: part of their difference may be that."""
    first, lines = runs[0], []
    for run in runs[1:]:
        metas = run.checkpoints[0].meta, first.checkpoints[0].meta
        if names := [name for name in ("decoding", "template", "engine", "dtype") if metas[0].get(name) != metas[1].get(name)]:
            lines.append(f"the rollouts of {run.name} were made with another {', '.join(names)} than those of {first.name}")
    return _warn(lines)


def check_start(samples: Samples, runs: Sequence) -> None:
    """Whether samples are those of the model that runs start from. Lines say other prompts or templates, and what cannot be told.

    Raises:
        InputError: samples of a policy that PPO moved, or of another model: their KL is not from the runs' start.
    """
    expected = "expected those of the model that the runs start from"
    if samples.policy.step:
        raise InputError(f"{samples.path}: samples of {samples.policy.name}, {expected}")
    model = samples.meta.get("model")
    for run in runs:
        start, record = run.checkpoints[0], run.checkpoints[-1].record
        if model and model != record.get("model", model):
            sample = weight_sample(model) if Path(model).is_dir() else {}
            if not (sample and _table(record, "base_sample")):
                print(f"warning: {samples.path} is of {model}, and {run.name} started from {record['model']}: are they the same model?")
            elif not is_same_sample(sample, record["base_sample"]):
                raise InputError(f"{samples.path}: samples of {model}, and {run.name} started from {record['model']}, {expected}")
        if set(samples.instructions) != {row["instruction"] for row in start.rows}:
            print(f"warning: {samples.path} and the rollouts of {run.name} answer different prompts")
        if samples.meta and start.meta and samples.meta.get("template") != start.meta.get("template"):
            print(f"warning: {samples.path} was made with another template than the rollouts of {run.name}")
