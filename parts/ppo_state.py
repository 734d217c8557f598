"""Checkpoints of a PPO run: weights that anyone can load, and beside them all that the run needs to go on bit for bit.

A checkpoint folder holds

    adapter_model.safetensors, adapter_config.json, README.md    the adapter (`PeftModel.from_pretrained`) and its card, or with
                                                                 --use_peft=false the whole model with its tokenizer
    value_head.safetensors                                       the value head
    training_record.json                                         settings, seed, commit, package versions, reward design
    development_rollouts.json                                    responses to the development prompts, with their scores
    trainer_state_rank<r>.safetensors                            of each process: optimizer, schedule, KL coefficient, moments, generators

It is written beside its place and renamed into it, so that a folder of that name is whole.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from parts.errors import InputError
from parts.files import atomic_path, clear_leftovers, file_digest, is_same_path, read_json, remove_folder, write_json
from parts.models import load_causal_lm
from parts.processes import is_first_process, launched_processes
from parts.rewards import reward_name
from parts.runs import RECORD, interrupted_path, provenance
from parts.runs import checkpoints_of as folders_of

if TYPE_CHECKING:
    from trl.trainer import RunningMoments

    from parts.ppo_metrics import Moments
    from parts.ppo_trainer import FastPPOTrainer
    from parts.sampling import Decoding

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


def interrupted(output_dir: str) -> Path:
    """Where a run that was asked to stop between two checkpoints keeps its state."""
    return interrupted_path(output_dir)


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
    for path in [*checkpoints_of(output_dir), interrupted(output_dir)]:
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
    source = settings.reward_source()
    paths = {field.name for field in fields(settings) if field.metadata["rules"]["path"]}
    code = [name for name in record["reward_source"] | source if record["reward_source"].get(name) != source.get(name)]
    changes = [f"the reward's code has changed since ({', '.join(code)})"] if code else []
    for name in ("dataset_path", "dev_prompt_path"):
        path = getattr(settings, name)
        if Path(path).is_file() and file_digest(path) != record["data"].get(name):
            changes.append(f"{path} has changed since")
    harmless = HARMLESS if settings.use_optimizer_setup else HARMLESS | {"overall_steps"}  # the schedule knows where it ends
    changes += [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in asdict(settings).items()
        if name not in harmless and not _is_same(before.get(name), value, name in paths)
    ]
    if changes and not settings.allow_changed_settings:
        raise InputError(f"{folder}: {'; '.join(changes)} (--allow_changed_settings=true resumes all the same)")
    if changes:
        print(f"{folder}: resumes although {'; '.join(changes)}")


def _is_same(recorded: object, value: object, is_path: bool) -> bool:
    """Whether a setting is what it was; a path in any spelling, and a lone text as well as a list of one."""
    if isinstance(value, list):
        recorded = [text for text in [recorded] if text] if isinstance(recorded, str) else recorded
        if isinstance(recorded, list) and len(recorded) == len(value):
            return all(_is_same(one, other, is_path) for one, other in zip(recorded, value))
    return recorded == value or (is_path and is_same_path(recorded, value))


# ---------------------------------------------------------------------------------------------------------------- writing


def save(trainer: FastPPOTrainer, folder: str | Path, record: dict, dev_rows: list[dict] | None) -> None:
    """Write a checkpoint folder; every process calls this, the main process writes.

    Raises:
        OSError: it cannot be written (a full disk ...); what was there before is still there.
    """
    from accelerate.utils import gather_object

    states = gather_object([_state(trainer)])
    error = None
    if trainer.accelerator.is_main_process:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        try:
            if len({facts["weights"] for _, facts in states}) > 1:
                raise ValueError(f"the weights of the {len(states)} processes differ, they no longer train one model")
            with atomic_path(folder) as temporary:
                policy.pretrained_model.save_pretrained(temporary)
                if not policy.is_peft_model:
                    trainer.tokenizer.save_pretrained(temporary)
                (temporary / "README.md").write_text(_card(record), encoding="utf-8")
                head = {name: weight.contiguous() for name, weight in policy.v_head.state_dict().items()}
                save_file(head, temporary / "value_head.safetensors")
                for rank, (tensors, facts) in enumerate(states):
                    save_file(tensors, temporary / f"trainer_state_rank{rank}.safetensors", metadata={"facts": json.dumps(facts)})
                write_json(temporary / RECORD, record)
                if dev_rows is not None:
                    write_json(temporary / "development_rollouts.json", dev_rows)
        except (OSError, ValueError, SafetensorError) as caught:
            error = f"{folder} could not be written ({caught}); earlier checkpoints are untouched"
    (error,) = gather_object([error])[:1]
    if error:
        raise OSError(error)


def run_record(trainer: FastPPOTrainer, step: int, settings, decoding: Decoding, start: Moments, development: Mapping[str, float]) -> dict:
    """What a checkpoint says of the run that made it.

    Args:
        settings: `PPOSettings` of `run_ppo.py`.
        start: of the scores at step 0.
        development: means of the scores now.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return provenance(
        step=step,
        seed=settings.seed,
        dtype=str(next(policy.pretrained_model.parameters()).dtype).removeprefix("torch."),
        model=settings.model_name,
        template=settings.chat_template_name,
        decoding=asdict(decoding),
        processes=trainer.accelerator.num_processes,
        kl_coef=float(trainer.kl_ctl.value),
        development=development,
        start=start,
        reward_source=settings.reward_source(),
        design=settings.design,
        functions=settings.functions,
        data={name: file_digest(getattr(settings, name)) for name in ("dataset_path", "dev_prompt_path")},
        settings=asdict(settings),
    )


def prune(output_dir: str, limit: int) -> None:
    """After a checkpoint: remove the oldest ones beyond the newest `limit`, never the start (0 keeps all), and an interrupted run's state."""
    if limit:
        for path in [point.folder for point in folders_of(output_dir) if point.step and _is_state(point.folder)][:-limit]:
            remove_folder(path)
    if _is_state(interrupted(output_dir)):
        remove_folder(interrupted(output_dir))


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
    states = [path for path in (*checkpoints_of(settings.output_dir), interrupted(settings.output_dir)) if _is_state(path)]
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


# ------------------------------------------------------------------------------------------------------------------- card


def _card(record: dict) -> str:
    settings = record["settings"]
    if settings["reward_function"]:
        design = f"`{record['functions']}`"
    elif named := reward_name(settings):
        design = f"the reward model `{named}`"
    else:
        design = f"the white-box proxy reward with {record['design']}"
    development = "".join(f"| {name.removeprefix('dev/')} | {value:.4f} |\n" for name, value in record.get("development", {}).items())
    listed = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
    library, tags, what = (
        ("peft", "ppo, lora, rlhf", "A LoRA adapter for") if settings["use_peft"] else ("transformers", "ppo, rlhf", "All weights of")
    )
    return (
        f"---\nbase_model: {json.dumps(settings['model_name'])}\nlibrary_name: {library}\ntags: [{tags}]\n---\n\n"
        f"# {settings['exp_name']}, step {record['step']}\n\n"
        f"{what} `{settings['model_name']}`, trained with PPO against {design}. Training prompts: `{settings['dataset_path']}`; "
        f"chat template: `{settings['chat_template_name']}`; commit {record['commit']}.\n\n"
        + (f"Development prompts (`{settings['dev_prompt_path']}`), mean scores:\n\n| score | mean |\n|---|---|\n{development}\n" if development else "")
        + f"| setting | value |\n|---|---|\n{listed}"
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- state


def begin_policy(trainer: FastPPOTrainer, init_kl_coef: float) -> None:
    """After the value head's warm-up the policy begins as in a new run: its optimizer's moments and the KL coefficient are the first ones."""
    optimizer, _ = _optimizer(trainer)
    for weight in optimizer.param_groups[0]["params"]:
        for value in optimizer.state[weight].values():
            value.zero_()
    trainer.kl_ctl.value = init_kl_coef


def _optimizer(trainer: FastPPOTrainer) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """The optimiser that holds this process's moments, and the fp32 masters that DeepSpeed keeps besides (none elsewhere)."""
    optimizer = trainer.optimizer.optimizer
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
    return (optimizer, []) if masters is None else (optimizer.optimizer, masters)


def _state(trainer: FastPPOTrainer) -> tuple[dict[str, torch.Tensor], dict]:
    """All of this process's state except the weights: tensors by name, and what JSON can hold."""
    optimizer, masters = _optimizer(trainer)
    tensors = {"torch_generator": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda_generator"] = torch.cuda.get_rng_state()
    for number, weight in enumerate(_weights(optimizer)):
        for name, value in optimizer.state.get(weight, {}).items():
            tensors[f"optimizer/{number}/{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
    for number, master in enumerate(masters):
        tensors[f"master/{number}"] = master.detach().cpu().clone().contiguous()
    running = {}
    for name, moments, part in _running(trainer):
        value = getattr(moments, part)
        if isinstance(value, torch.Tensor):
            tensors[f"running/{name}"] = value.detach().cpu().clone().reshape(())
        else:
            running[name] = float(value)
    digest = hashlib.sha256()
    for weight in trainer.model_params:
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    kind, keys, *rest = np.random.get_state()
    facts = {
        "weights": digest.hexdigest(),
        "kl_coef": float(trainer.kl_ctl.value),
        "running": running,
        "learning_rates": [group["lr"] for group in optimizer.param_groups],
        "schedule": trainer.lr_scheduler.scheduler.state_dict() if trainer.lr_scheduler is not None else None,
        "numpy_generator": [kind, keys.tolist(), *rest],
        "python_generator": random.getstate(),
    }
    return tensors, facts


def _running(trainer: FastPPOTrainer) -> list[tuple[str, RunningMoments, str]]:
    """The running moments of all rewards and of each query type's: the name in a state, the object, its attribute."""
    every = {"": trainer.running, **{f"{qtype}/": moments for qtype, moments in trainer.running_by_qtype.items()}}
    return [(prefix + part, moments, part) for prefix, moments in every.items() for part in ("mean", "std", "var", "count")]


def _weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def load(trainer: FastPPOTrainer, folder: Path) -> dict:
    """Bring a new trainer to where `folder` was written, and return that checkpoint's record.

    Raises:
        InputError: a file of it is missing or broken.
    """
    from peft import set_peft_model_state_dict

    accelerator = trainer.accelerator
    path = folder / f"trainer_state_rank{accelerator.process_index}.safetensors"
    policy = accelerator.unwrap_model(trainer.model)
    try:
        head = load_file(folder / "value_head.safetensors")
        adapter = load_file(folder / "adapter_model.safetensors") if policy.is_peft_model else {}
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be resumed from ({error})") from None
    if policy.is_peft_model:
        set_peft_model_state_dict(policy.pretrained_model, adapter)
    else:  # by transformers, which keeps some families' weights in files otherwise than in the model
        dtype = next(policy.pretrained_model.parameters()).dtype
        policy.pretrained_model.load_state_dict(load_causal_lm(str(folder), dtype).state_dict())
    policy.v_head.load_state_dict(head)

    optimizer, masters = _optimizer(trainer)
    for number, master in enumerate(masters):
        master.data.copy_(tensors[f"master/{number}"])
    for number, weight in enumerate(_weights(optimizer)):
        prefix = f"optimizer/{number}/"
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if found:
            optimizer.state[weight] = {name: value if value.dim() == 0 else value.to(weight.device) for name, value in found.items()}
    for group, rate in zip(optimizer.param_groups, facts["learning_rates"]):
        group["lr"] = rate
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.scheduler.load_state_dict(facts["schedule"])
    trainer.kl_ctl.value = facts["kl_coef"]
    for name, moments, part in _running(trainer):
        if f"running/{name}" in tensors:
            setattr(moments, part, tensors[f"running/{name}"].to(accelerator.device))
        elif name in facts["running"]:  # a checkpoint from before there were moments of query types has none
            setattr(moments, part, facts["running"][name])

    torch.set_rng_state(tensors["torch_generator"])
    if "cuda_generator" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda_generator"])
    kind, keys, *rest = facts["numpy_generator"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = facts["python_generator"]
    random.setstate((version, tuple(numbers), gauss))
    record = read_json(folder / RECORD)
    trainer.current_step = record["step"]  # the tracker's
    return record
