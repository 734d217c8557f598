"""A run's layout on disk, and what every output records of how it was made.

A run is named by `--output_dir`, `outputs/full` for example. It leaves

    outputs/full_step_<k>/                           a checkpoint: an adapter (or all weights) and training_record.json (`parts.ppo_state`)
        alpaca-eval-full_step_<k>.json               its rollouts, from evaluation.py
        samples-full_step_<k>.jsonl                  several rollouts of each row, from evaluation.py --num_samples
        superni-full_step_<k>.json                   its answers to Super-NaturalInstructions, from evaluation.py
        <any of them>.meta.json                      how they were made
        <any of them>.partial/                       the rows that an unfinished evaluation has so far, a file for each process
        alpaca-eval-full_step_<k>.scores.jsonl       the rollouts' scores, from eval_monotonicity.py
    outputs/<base model>/                            the rollouts of a base model itself, named as a checkpoint's
    outputs/full_interrupted/                        the state of a run that was stopped between two checkpoints

No other module spells one of these names.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from parts.errors import InputError
from parts.files import REPOSITORY, JsonLines, read_json
from parts.rows import read_rows

RECORD = "training_record.json"
ADAPTER = "adapter_config.json"  # what makes a folder a PEFT adapter's
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "sentence-transformers", "datasets", "huggingface_hub", "openai",
    "scikit-learn", "nltk", "numpy", "scipy",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- names


def step_path(output_dir: str | Path, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return Path(f"{Path(output_dir)}_step_{step}")


def interrupted_path(output_dir: str | Path) -> Path:
    """The folder of the state of a run that was stopped between two checkpoints."""
    return Path(f"{Path(output_dir)}_interrupted")


def rollouts_path(checkpoint: str | Path) -> Path:
    """The file of a checkpoint's AlpacaEval rollouts."""
    return _output_path(checkpoint, "alpaca-eval")


def samples_path(checkpoint: str | Path) -> Path:
    """The file of several rollouts of each of AlpacaEval's rows."""
    return _output_path(checkpoint, "samples").with_suffix(".jsonl")


def superni_path(checkpoint: str | Path) -> Path:
    """The file of a checkpoint's answers to Super-NaturalInstructions."""
    return _output_path(checkpoint, "superni")


def _output_path(checkpoint: str | Path, kind: str) -> Path:
    folder = Path(os.path.abspath(checkpoint))
    return folder / f"{kind}-{folder.name}.json"


def meta_path(output: str | Path) -> Path:
    """The file that records how an output was made."""
    return Path(output).with_suffix(".meta.json")


def without_records(files: Sequence[str]) -> list[str]:
    """The files of a pattern such as `alpaca-eval-*.json` that are no records of others (`.meta.json`)."""
    return [file for file in files if not file.endswith(".meta.json")] or list(files)


def scores_path(rollouts: str | Path) -> Path:
    """The file of the scores of a file of rollouts."""
    return Path(rollouts).with_suffix(".scores.jsonl")


def partial_path(output: str | Path) -> Path:
    """The folder of what an unfinished evaluation has so far of an output."""
    return Path(f"{output}.partial")


# ----------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, or any PEFT adapter's: what is in it is read when it is asked for."""

    folder: Path

    @property
    def adapter(self) -> str | None:
        """What the base model is loaded with, or what takes its place."""
        return str(self.folder)

    @property
    def is_whole(self) -> bool:
        """Whether it is a checkpoint of a run that trained all weights, and so a model that needs no base."""
        return self.trained.get("use_peft") is False and (self.folder / "config.json").is_file()

    @property
    def can_be_loaded(self) -> bool:
        """Whether it is an adapter or a whole model."""
        return (self.folder / ADAPTER).is_file() or self.is_whole

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.folder)).name

    @property
    def run(self) -> str | None:
        """The `full` of `full_step_<k>`; None for a folder of another name."""
        return match[1] if (match := _STEP.fullmatch(self.name)) else None

    @property
    def step(self) -> int | None:
        """The `<k>` of `full_step_<k>`; None for a folder of another name."""
        return int(match[2]) if (match := _STEP.fullmatch(self.name)) else None

    @property
    def record(self) -> dict:
        """The record of the training run; empty for a folder that `run_ppo.py` did not write."""
        path = self.folder / RECORD
        return read_json(path) if path.is_file() else {}

    @property
    def trained(self) -> dict:
        """The settings of the training run; empty where there is no record of them. Raises InputError for a broken record."""
        settings = self.record.get("settings", {})
        if not isinstance(settings, dict):
            raise InputError(f"{self.folder / RECORD}: 'settings' is {type(settings).__name__}, expected the settings of a run by name")
        return settings

    @property
    def rollouts(self) -> Path:
        return rollouts_path(self.folder)

    @property
    def scores(self) -> Path:
        return scores_path(self.rollouts)

    @property
    def meta(self) -> dict:
        """How the rollouts were made; empty for rollouts that `evaluation.py` did not write."""
        path = meta_path(self.rollouts)
        return read_json(path) if path.is_file() else {}

    @cached_property
    def rows(self) -> list[dict]:
        """The rollouts in file order, read once. Raises InputError where they cannot be used."""
        return read_rows(self.rollouts, {"instruction": None, "output": None})


@dataclass(frozen=True)
class BaseModel(Checkpoint):
    """A base model itself, without an adapter: its rollouts are in `folder`, its record (`train_sft.py`'s) is where the model is."""

    model: str

    @property
    def adapter(self) -> None:
        return None

    @property
    def record(self) -> dict:
        return Checkpoint(Path(self.model)).record


_STEP = re.compile(r"(.+)_step_(\d+)", re.DOTALL)


def find_checkpoints(pattern: str) -> list[Checkpoint]:
    """The folders that a glob pattern stands for. Numbers in names sort as numbers, so that step 500 stands before step 1000."""

    def order(path: str) -> list[str | int]:  # texts and numbers in turn, so that like is compared with like
        return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", path))]

    paths = [Path(path) for path in sorted(glob.glob(pattern), key=order)]  # noqa: PTH207 - absolute patterns too
    return [Checkpoint(path) for path in paths if path.is_dir()]


def checkpoints_of(output_dir: str | Path) -> list[Checkpoint]:
    """The folders <output_dir>_step_<k>, by step."""
    found = find_checkpoints(glob.escape(f"{Path(output_dir)}_step_") + "*")
    return [point for point in found if point.run == Path(output_dir).name]


def find_adapters(patterns: Sequence[str]) -> list[Checkpoint]:
    """The folders of adapters, or of checkpoints of whole models, that names and patterns stand for, each once, in order (of steps, within
    a pattern).

    Raises:
        InputError: a name that is neither, or a pattern that matches none.
    """
    adapters: list[Checkpoint] = []
    for pattern in patterns:
        matches = [Checkpoint(Path(pattern))]
        if glob.has_magic(pattern) and not Path(pattern).is_dir():  # a name is a name first
            matches = [point for point in find_checkpoints(pattern) if point.can_be_loaded]
            if not matches:
                raise InputError(f"{pattern}: matches no checkpoint folder")
        for point in matches:
            if not point.can_be_loaded:
                raise InputError(f"{point.folder}: no {ADAPTER}, expected a checkpoint folder")
            if not any(point.folder.samefile(other.folder) for other in adapters):
                adapters.append(point)
    return adapters


def require_comparable(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises InputError for rollouts that were made otherwise than the first's: on other instructions, or with other settings."""
    first = checkpoints[0]
    for point in checkpoints[1:]:
        if len(point.rows) != len(first.rows):
            raise InputError(f"{point.rollouts}: {len(point.rows)} rows, expected {len(first.rows)} as at step {first.step}")
        for number, (row, other) in enumerate(zip(point.rows, first.rows), start=1):
            if row["instruction"] != other["instruction"]:
                raise InputError(f"{point.rollouts}: row {number}: another instruction than at step {first.step}")
        for name in ("decoding", "template", "engine", "dtype", "common_draws"):
            own, other = point.meta.get(name), first.meta.get(name)
            if own != other:
                raise InputError(f"{point.rollouts}: {name} is {own}, expected {other} as at step {first.step}")


def choose_checkpoints(settings, prefix: str) -> list[Checkpoint]:
    """The checkpoints of a run to compare, by step, as `--output_dir`, `--steps` and `--include_start` choose them.

    Raises:
        InputError: none found, a wanted one lacks its folder or rollouts, fewer than three, or rollouts that were made otherwise: on
            other instructions, or with other decoding settings.
    """
    parent = Path(settings.output_dir)
    if not parent.is_dir():
        raise InputError(f"{parent}: no such folder, expected the one that holds the checkpoints")
    by_step: dict[int, Checkpoint] = {}
    for point in checkpoints_of(parent / prefix):
        if by_step.setdefault(point.step, point) is not point:
            raise InputError(f"{parent}: {by_step[point.step].name} and {point.name} are both step {point.step} of {prefix}, expected one")
    if not by_step:
        raise InputError(f"{parent}: no folder {prefix}_step_<k>")
    if settings.steps:
        steps = sorted({*settings.steps, *([0] if settings.include_start else [])})
        for step in steps:
            if step not in by_step or not by_step[step].rollouts.is_file():
                raise InputError(f"{parent}/{prefix}_step_{step}: no rollouts, expected them from evaluation.py")
    else:
        candidates = [step for step in by_step if step > 0 or settings.include_start]
        steps = [step for step in candidates if by_step[step].rollouts.is_file()]
        if without := [step for step in candidates if step not in steps]:
            print(f"without rollouts, left out: {prefix}, steps {', '.join(map(str, without))}")
    if len(steps) < 3:
        start = not settings.include_start and not settings.steps and 0 in by_step and by_step[0].rollouts.is_file()
        hint = " (--include_start=true counts step 0, which has rollouts)" if start else ""
        raise InputError(f"{parent}: {len(steps)} checkpoints of {prefix} with rollouts, expected at least 3 for a correlation{hint}")
    checkpoints = [by_step[step] for step in steps]
    require_comparable(checkpoints)
    return checkpoints


def resumable_training(unfinished: Path, fingerprint: str, overwrite: bool) -> Path | None:
    """The newest whole checkpoint of a Trainer that was begun with this fingerprint (it writes its state last); None where there is none.

    Raises:
        InputError: the training in the folder was begun otherwise, and may not be removed.
    """
    whole = [path for path in unfinished.glob("checkpoint-*") if _has_state(path)]
    newest = max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    marker = unfinished / "fingerprint"
    if marker.is_file() and marker.read_text(encoding="utf-8") == fingerprint:
        return newest
    if newest and not overwrite:
        raise InputError(f"{unfinished}: a training with other settings, rows or processes (--overwrite=true removes it)")
    return None


def _has_state(folder: Path) -> bool:
    """Whether a Trainer's checkpoint has its state, and not the beginning of it alone, as a kill leaves it."""
    try:
        return bool(read_json(folder / "trainer_state.json"))
    except InputError:
        return False


def begin_training(unfinished: Path, fingerprint: str, resumed: Path | None) -> None:
    """Make a Trainer's folder ready: as it is for one that goes on, else empty."""
    if resumed is None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "fingerprint").write_text(fingerprint, encoding="utf-8")


DEVELOPMENT, TRAINING = "development rollouts", "training rollouts"
KL_WINDOW = 2  # steps before and after the one whose rollouts a checkpoint drew, over which the logged KL is averaged


def read_kl(checkpoints: Sequence[Checkpoint]) -> tuple[list[float | None], str]:
    """Mean KL from the start at each of a run's checkpoints, in nats per response; and of which rollouts it is.

    It is that of the development rollouts, which checkpoints record. Runs that did not measure it have the KL of training rollouts in their
    metrics: of those drawn before a step's update, so that checkpoint k's stand at step k + 1. A batch is small, so the mean over
    `KL_WINDOW` steps on either side is taken.

    Returns:
        [checkpoints], None where neither says; and `DEVELOPMENT`, `TRAINING`, or nothing where there are no metrics of the run.
    """
    steps = [point.step for point in checkpoints]
    measured = [0.0 if point.step == 0 else _number(point.record.get("development"), "dev/objective/kl") for point in checkpoints]
    if None not in measured:
        return measured, DEVELOPMENT
    lines = _own_metrics(checkpoints)
    logged = {step: value for step, line in lines.items() if (value := _number(line, "objective/kl")) is not None}
    if not logged:
        return [None] * len(steps), ""
    kl: list[float | None] = []
    for step in steps:
        near = [logged[other] for other in range(step + 1 - KL_WINDOW, step + 2 + KL_WINDOW) if other in logged]
        kl.append(0.0 if step == 0 else sum(near) / len(near) if near else None)
    return kl, TRAINING


def _number(table: object, name: str) -> float | None:
    value = table.get(name) if isinstance(table, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _own_metrics(checkpoints: Sequence[Checkpoint]) -> dict[int, dict]:
    """The lines of a run's metrics by step: of the file in the place where the checkpoints are now, or where their record says.

    Either may be another run's by now. A run's own has the development rewards that its checkpoints record; another's is said and left out.
    """
    last = checkpoints[-1]
    if not isinstance(last.trained.get("logging_dir"), str):
        return {}
    recorded, output = Path(last.trained["logging_dir"]), Path(last.trained.get("output_dir", ""))
    beside = [last.folder.parent / last.run / recorded.relative_to(output)] if last.run and recorded.is_relative_to(output) else []
    known = {point.step: _number(point.record.get("development"), "dev/total") for point in checkpoints}
    for path in dict.fromkeys(folder / "metrics.jsonl" for folder in [*beside, recorded]):
        if path.is_file():
            lines = {line["step"]: line for line in JsonLines(path).read() if isinstance(line, dict) and "step" in line}
            both = [(_number(lines.get(step), "dev/total"), value) for step, value in known.items() if value is not None]
            if all(found in (value, None) for found, value in both):
                return lines
            print(f"warning: {path} is of another run than {last.folder}, and says nothing of its KL")
    return {}


# ------------------------------------------------------------------------------------------------------------ provenance


def provenance(**facts: object) -> dict:
    """What every output records: commit, package versions and command line, plus the facts given (seed, dtype, model ...)."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(REPOSITORY)) if script.is_relative_to(REPOSITORY) else sys.argv[0]
    return {"commit": _commit(), "packages": _package_versions(), "command": [name, *sys.argv[1:]], **facts}


def _commit() -> str:
    """The commit of this checkout, with `-dirty` where tracked files differ from it; "unknown" outside a git checkout."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def _package_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
