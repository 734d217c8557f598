"""The checkpoints of a PPO run on disk: which there are, which one a run resumes from, what is in its way, which are removed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from parts.chat_templates import ChatTemplate, template_digest
from parts.errors import InputError
from parts.files import clear_leftovers, file_digest, is_same_path, read_json, remove_folder
from parts.processes import is_first_process, launch_facts, launched_processes
from parts.runs import RECORD, interrupted_path
from parts.runs import checkpoints_of as folders_of
from parts.weight_samples import is_same_sample, weight_sample

# Settings that a resumed run may change: they do not reach its numbers.
HARMLESS = {"resume_from_checkpoint", "allow_changed_settings", "overwrite", "log_with", "sample_freq", "save_total_limit", "cache_dir",
            "output_dir", "logging_dir", "exp_name", "embedding_cache"}  # fmt: skip
# Settings whose old values come back with the optimiser, the schedule and the KL controller, or that shape the weights.
IN_THE_STATE = ("learning_rate", "value_learning_rate", "value_warmup_steps", "use_optimizer_setup", "warmup_ratio", "init_kl_coef",
                "use_peft", "lora_r", "lora_target_modules")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- finding


def checkpoints_of(output_dir: str) -> list[Path]:
    """The run's finished checkpoints <output_dir>_step_<k>, by step."""
    return [point.folder for point in folders_of(output_dir) if (point.folder / RECORD).is_file()]


def find_resumable(output_dir: str, which: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: "auto" is the latest whole one of this run, None where there is none yet.

    Raises:
        InputError: a path without a trainer's state in it, or with a broken one.
    """
    if which != "auto":
        if not (Path(which) / "trainer_state_rank0.safetensors").is_file():
            raise InputError(
                f"--resume_from_checkpoint: {which} holds no trainer_state_rank0.safetensors, expected a checkpoint of this run"
            )
        if problem := fault(Path(which)):
            raise InputError(f"{which}: cannot be resumed from ({problem})")
        return Path(which)
    found = []
    for path in [*checkpoints_of(output_dir), interrupted_path(output_dir)]:
        if (path / "trainer_state_rank0.safetensors").is_file() or _is_state(path):
            if problem := fault(path):
                print(f"{path}: left out, it is broken ({problem})")
            else:
                found.append(path)
    return max(found, key=lambda path: read_json(path / RECORD)["step"], default=None)


def fault(folder: Path) -> str | None:
    """What keeps a run from going on from a folder, as far as its record and the files' lengths say; None: nothing."""
    try:
        record = read_json(folder / RECORD)
        for name, kind in (("step", int), ("processes", int), ("settings", dict), ("reward_source", dict), ("data", dict), ("start", dict)):
            if not isinstance(record.get(name), kind):
                return f"{folder / RECORD}: '{name}' is missing, expected the record of a training run"
        states = [f"trainer_state_rank{rank}.safetensors" for rank in range(record["processes"])]
        for name in (*_weight_files(folder, record["settings"]), "value_head.safetensors", *states):
            with safe_open(folder / name, framework="pt"):  # its header, and whether the file is as long as that says
                pass
    except (InputError, OSError, SafetensorError) as error:
        return str(error) if str(folder) in str(error) else f"{folder / name}: {error}"
    return None


def _weight_files(folder: Path, trained: Mapping) -> list[str]:
    """The names of the files of a checkpoint's weights, an adapter's or a whole model's."""
    if trained.get("use_peft", True):
        return ["adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    return sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]


def check_settings(folder: Path, settings, processes: int) -> None:
    """Compare with the run that `folder` is of, and print what `allow_changed_settings` lets change.

    Raises:
        InputError: another number of processes, or settings, data or reward code that differ and may not.
    """
    record = read_json(folder / RECORD)
    if record["processes"] != processes:
        raise InputError(f"{folder}: made by {record['processes']} processes, expected the same number to resume, found {processes}")
    # A setting that is younger than the checkpoint had its default.
    defaults = {field.name: field.default if field.default_factory is MISSING else field.default_factory() for field in fields(settings)}
    before = defaults | record["settings"]
    bound = [name for name in IN_THE_STATE if before.get(name) != getattr(settings, name)]
    if bound:
        raise InputError(f"{folder}: {', '.join(bound)} cannot change within a run: the checkpoint's state holds the old values")
    if (launch := record.get("launch", launch_facts())) != launch_facts():
        raise InputError(f"{folder}: launched with {_said(launch)}, expected the same to resume, found {_said(launch_facts())}")
    source = settings.reward_source()
    paths = {field.name for field in fields(settings) if field.metadata["rules"]["path"]}
    code = [name for name in record["reward_source"] | source if record["reward_source"].get(name) != source.get(name)]
    changes = [f"the reward's code has changed since ({', '.join(code)})"] if code else []
    for name in ("dataset_path", "dev_prompt_path"):
        path = getattr(settings, name)
        if Path(path).is_file() and file_digest(path) != record["data"].get(name):
            changes.append(f"{path} has changed since")
    samples = {record.get("model"): record.get("base_sample", {}), **record.get("reward_samples", {})}
    for name in (settings.model_name, *settings.models):  # another name is told by the settings
        sample = next((sample for own, sample in samples.items() if own == name or is_same_path(own, name)), {})
        if sample and not is_same_sample(sample, weight_sample(name)):
            changes.append(f"the weights of {name} are others now")
    harmless = HARMLESS if settings.use_optimizer_setup else HARMLESS | {"overall_steps"}  # the schedule knows where it ends
    changes += [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in asdict(settings).items()
        if name not in harmless and not is_same_setting(before.get(name), value, name in paths)
    ]
    _refuse_or_say(folder, changes, settings)


def check_template(folder: Path, settings, template: ChatTemplate) -> None:
    """As `check_settings`, for the chat template, which takes a tokenizer."""
    record = read_json(folder / RECORD)
    known = record.get("template") == settings.chat_template_name and record.get("template_digest")
    if known and known != template_digest(template):
        _refuse_or_say(folder, [f"the chat template '{settings.chat_template_name}' has changed since"], settings)


def _refuse_or_say(folder: Path, changes: Sequence[str], settings) -> None:
    if changes and not settings.allow_changed_settings:
        raise InputError(f"{folder}: {'; '.join(changes)} (--allow_changed_settings=true resumes all the same)")
    if changes:
        print(f"{folder}: resumes although {'; '.join(changes)}")


def _said(launch: Mapping) -> str:
    return f"{'DeepSpeed' if launch['deepspeed'] else 'no DeepSpeed'} and mixed precision '{launch['mixed_precision']}'"


def is_same_setting(recorded: object, value: object, is_path: bool) -> bool:
    """Whether a setting is what it was; a path in any spelling, and a lone text as well as a list of one."""
    if isinstance(value, list):
        recorded = [text for text in [recorded] if text] if isinstance(recorded, str) else recorded
        if isinstance(recorded, list) and len(recorded) == len(value):
            return all(is_same_setting(one, other, is_path) for one, other in zip(recorded, value))
    return recorded == value or (is_path and is_same_path(recorded, value))


# --------------------------------------------------------------------------------------------------------------- starting


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        folder: the checkpoint that it resumes from; None for a new run.
        step: of that checkpoint; 0 for a new run.
        in_the_way: what an earlier run left of later steps.
    """

    folder: Path | None
    step: int
    in_the_way: list[Path]


def find_start(settings) -> Start:
    """Where a run with these `PPOSettings` begins.

    Raises:
        InputError: the checkpoint to resume from is none, or one of other settings, or others are in the way and may not be removed.
    """
    if is_first_process():
        clear_saves(settings.output_dir)
    check_foreign(settings)
    resumed = find_resumable(settings.output_dir, settings.resume_from_checkpoint) if settings.resume_from_checkpoint else None
    if resumed is not None:
        check_settings(resumed, settings, launched_processes())
    else:
        check_metrics(settings)
    step = read_json(resumed / RECORD)["step"] if resumed else 0
    states = [path for path in (*checkpoints_of(settings.output_dir), interrupted_path(settings.output_dir)) if _is_state(path)]
    in_the_way = [path for path in states if resumed is None or (not is_same_path(path, resumed) and _is_after(path, step))]
    if in_the_way and not settings.overwrite:
        later = "it and those after it" if resumed else "the checkpoints of an earlier run; --resume_from_checkpoint=auto resumes it"
        raise InputError(f"{in_the_way[0]}: exists already (--overwrite=true removes {later})")
    return Start(resumed, step, in_the_way)


def _is_state(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def _is_after(folder: Path, step: int) -> bool:
    """Whether a state is one of a later step; a broken one is not, and the run that reaches its step replaces it."""
    return fault(folder) is None and read_json(folder / RECORD)["step"] > step


def clear_saves(output_dir: str) -> None:
    """Remove what was killed while it was saved or removed; a save that was whole takes its place."""
    output = Path(output_dir)
    for path in output.parent.glob(".*.unfinished"):
        if match := re.fullmatch(rf"\.({re.escape(output.name)}_(?:step_\d+|interrupted))\.\w+\.unfinished", path.name):
            clear_leftovers(output.parent / match[1])


def check_foreign(settings) -> None:
    """Raises InputError where this run would replace something that no run of this `output_dir` wrote."""
    parent, name = Path(settings.output_dir).parent, Path(settings.output_dir).name
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        is_named_so = re.fullmatch(rf"{re.escape(name)}_(step_\d+|interrupted)", path.name)
        is_empty = path.is_dir() and not any(path.iterdir())
        if is_named_so and not _is_state(path) and not is_empty:
            raise InputError(f"{path}: no checkpoint (it has no {RECORD}), and in the way of one; expected another --output_dir")


def check_metrics(settings) -> None:
    """Raises InputError where a new run would replace the metrics of another `output_dir`. (Whatever lies in its own is its own; a run may be moved.)"""
    log = run_file(settings)
    is_own = Path(settings.output_dir) in log.parents
    if log.is_file() and not is_own and not is_same_path(read_json(log).get("settings", {}).get("output_dir"), settings.output_dir):
        raise InputError(f"{log}: of another run, whose metrics are beside it; expected another --logging_dir")


def run_file(settings) -> Path:
    """The file beside a run's metrics that says how it was started."""
    return Path(settings.logging_dir) / "run.json"


def make_room(begin: Start) -> None:
    """Remove what is in the way of a run."""
    for path in begin.in_the_way:
        remove_folder(path)


def prune(output_dir: str, limit: int) -> None:
    """After a checkpoint: remove the oldest ones beyond the newest `limit`, never the start (0 keeps all), and an interrupted run's state.

    A broken one does not count: the run that reaches its step replaces it.
    """
    if limit:
        whole = [point.folder for point in folders_of(output_dir) if point.step and _is_state(point.folder) and fault(point.folder) is None]
        for path in whole[:-limit]:
            remove_folder(path)
    if _is_state(interrupted_path(output_dir)):
        remove_folder(interrupted_path(output_dir))
