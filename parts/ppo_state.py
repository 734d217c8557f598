"""A checkpoint of a PPO run: weights that anyone can load, and beside them all that the run needs to go on bit for bit.

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

import functools
import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from parts.adapters import sort_modules
from parts.chat_templates import ChatTemplate, template_digest
from parts.errors import InputError
from parts.files import atomic_path, file_digest, read_json, write_json
from parts.models import load_causal_lm
from parts.processes import launch_facts
from parts.rewards import reward_name
from parts.runs import RECORD, provenance
from parts.weight_samples import weight_sample

if TYPE_CHECKING:
    from trl.trainer import RunningMoments

    from parts.ppo_metrics import Moments
    from parts.ppo_trainer import FastPPOTrainer
    from parts.sampling import Decoding


# ---------------------------------------------------------------------------------------------------------------- writing


def save(trainer: FastPPOTrainer, folder: str | Path, record: dict, dev_rows: list[dict] | None) -> None:
    """Write a checkpoint folder; every process calls this, the main process writes.

    Raises:
        OSError: it cannot be written (a full disk ...); what was there before is still there.
    """
    from accelerate.utils import gather_object

    states = _gather_states(trainer)
    error = None
    if trainer.accelerator.is_main_process:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        try:
            if len({facts["weights"] for _, facts in states}) > 1:
                raise ValueError(f"the weights of the {len(states)} processes differ, they no longer train one model")
            with atomic_path(folder) as temporary:
                policy.pretrained_model.save_pretrained(temporary)
                if policy.is_peft_model:
                    sort_modules(temporary)
                else:
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


def _gather_states(trainer: FastPPOTrainer) -> list[tuple[dict[str, torch.Tensor], dict]]:
    """Each process's state, in the main process; none elsewhere. In host memory: with all weights trained it is too large for a GPU's rest."""
    import torch.distributed as dist

    accelerator, state = trainer.accelerator, _state(trainer)
    if accelerator.num_processes == 1:
        return [state]
    states = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(state, states, group=_host_group())
    return states or []


@functools.cache
def _host_group():
    """All processes, talking through host memory."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo")


def run_facts(settings, template: ChatTemplate) -> dict:
    """What a run's records say of the files that it reads, of its code and of its launch. Called once, when they are read: they may change.

    Args:
        settings: `PPOSettings` of `run_ppo.py`.
    """
    return provenance(
        base_sample=weight_sample(settings.model_name),
        reward_samples={name: weight_sample(name) for name in settings.models},
        template=settings.chat_template_name,
        template_digest=template_digest(template),
        launch=launch_facts(),
        reward_source=settings.reward_source(),
        data={name: file_digest(getattr(settings, name)) for name in ("dataset_path", "dev_prompt_path")},
    )


def run_record(
    trainer: FastPPOTrainer, step: int, settings, facts: Mapping, decoding: Decoding, start: Moments, development: Mapping[str, float]
) -> dict:
    """What a checkpoint says of the run that made it.

    Args:
        settings: `PPOSettings` of `run_ppo.py`.
        facts: of `run_facts`.
        start: of the scores at step 0.
        development: means of the scores now.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return {
        **facts,
        "step": step,
        "seed": settings.seed,
        "dtype": str(next(policy.pretrained_model.parameters()).dtype).removeprefix("torch."),
        "model": settings.model_name,
        "decoding": asdict(decoding),
        "processes": trainer.accelerator.num_processes,
        "kl_coef": float(trainer.kl_ctl.value),
        "development": development,
        "start": start,
        "design": settings.design,
        "functions": settings.functions,
        "settings": asdict(settings),
    }


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


def require_masters(trainer: FastPPOTrainer) -> None:
    """Raises InputError where DeepSpeed keeps fp32 masters of half-precision weights in a place that no checkpoint would hold."""
    optimizer = trainer.optimizer.optimizer
    is_half = any(weight.dtype != torch.float32 for weight in trainer.model_params)
    if type(optimizer).__module__.startswith("deepspeed.runtime") and is_half and not hasattr(optimizer, "single_partition_of_fp32_groups"):
        kind = type(optimizer).__name__
        raise InputError(
            f"DeepSpeed trains by its {kind}, whose fp32 weights no checkpoint would hold, expected ZeRO stage 2 as in configs/zero2-bf16.yaml"
        )


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
