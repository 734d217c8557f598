"""A run's settings into TRL's trainer: configuration, policy, optimizer.

`settings` are `PPOSettings` of `run_ppo.py` everywhere here.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from trl import AutoModelForCausalLMWithValueHead, PPOConfig

from parts.adapters import is_pattern
from parts.cli import did_you_mean
from parts.cpu_speed import use_onednn
from parts.errors import InputError
from parts.models import in_bits, load_causal_lm, loading
from parts.ppo_trainer import FastPPOTrainer
from parts.processes import join_processes


def make_trainer(settings, tokenizer: PreTrainedTokenizerBase) -> FastPPOTrainer:
    """Join the run's processes and set the trainer up, with the same new weights on each. Its `accelerator` is the run's.

    Raises:
        InputError: a launch that no run resumes from, a model that cannot be loaded or carry such an adapter, or a tracker without a login.
        RuntimeError: not as many processes came together as were launched.
    """
    accelerator = join_processes(settings.mini_batch_size, settings.gradient_accumulation_steps)
    check_launch(accelerator)
    policy = load_policy(settings, accelerator)
    optimization = optimizer_setup(settings, policy, accelerator.num_processes)
    tracker_errors = ()
    if settings.log_with == "wandb":
        import wandb

        tracker_errors = wandb.errors.Error
    try:
        return FastPPOTrainer(ppo_config(settings), policy, ref_model=None, tokenizer=tokenizer, **optimization)
    except tracker_errors as error:
        raise InputError(f"--log_with wandb: {str(error).splitlines()[0]}") from None


def check_launch(accelerator: Accelerator) -> None:
    """Raises InputError for a launch whose state no checkpoint holds, or whose rollouts are drawn in another precision than they are learnt."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED):
        raise InputError(f"launched as {kind.value}, expected one process, several (MULTI_GPU, MULTI_CPU), or DeepSpeed")
    plugin, precision = accelerator.state.deepspeed_plugin, accelerator.mixed_precision
    if precision != "no" and (plugin is None or precision != "bf16"):
        raise InputError(f"mixed precision {precision}, expected none (--bf16=true is for bf16 base weights), or DeepSpeed with bf16")
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError("DeepSpeed with ZeRO stage 3, expected stage 2 as in configs/zero2-bf16.yaml")


def check_same_start(folder: Path | None, step: int) -> None:
    """Raises InputError where processes begin at different checkpoints: each has looked for its own."""
    starts = gather_object([(str(folder), step)])
    if other := next((start for start in starts if start != starts[0]), None):
        told = [f"{place}, at step {step}" if place != "None" else "the start" for place, step in (starts[0], other)]
        raise InputError(f"one process begins at {told[0]}, another at {told[1]}: expected an output_dir that all of them see")


def ppo_config(settings) -> PPOConfig:
    """TRL's configuration; what has no flag here is a constant of the paper's run."""
    return PPOConfig(
        exp_name=settings.exp_name,
        seed=settings.seed,
        log_with=None if settings.log_with == "none" else settings.log_with,
        tracker_project_name="proxy-rewards",
        tracker_kwargs={"wandb": {"name": settings.exp_name, "dir": settings.logging_dir}} if settings.log_with == "wandb" else {},
        project_kwargs={"logging_dir": settings.logging_dir},
        model_name=settings.model_name,
        steps=settings.overall_steps * settings.batch_size,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        mini_batch_size=settings.mini_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        ppo_epochs=settings.ppo_epochs,
        init_kl_coef=settings.init_kl_coef,
        adap_kl_ctrl=settings.adap_kl_ctrl,
        target=settings.adap_kl_target,
        horizon=settings.adap_kl_horizon,
        early_stopping=settings.early_stopping,
        target_kl=settings.target_kl,
        gradient_checkpointing=settings.gradient_checkpointing,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=1.0,
        use_score_scaling=True,
        use_score_norm=True,
        score_clip=10.0,
    )


def lora_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """`--lora_target_modules` as PEFT takes them: names of modules, or "all-linear" or a regular expression of whole paths alone.

    Raises:
        InputError: a name that no module has.
    """
    if len(names) == 1 and (names[0] == "all-linear" or is_pattern(names[0])):
        return names[0]
    paths = [path for path, _ in model.named_modules()]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            linear = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))})
            hint = did_you_mean(name, linear)
            raise InputError(
                f"--lora_target_modules holds {name!r}, expected modules of the model: {', '.join(linear)} ... or all-linear{hint}"
            )
    return names


def load_policy(settings, accelerator: Accelerator) -> AutoModelForCausalLMWithValueHead:
    """The policy with a value head.

    With LoRA, on whole or quantised weights, the reference model is the policy with its adapter disabled. Without, all weights are
    trained, and TRL copies them for the reference.
    """
    if not settings.use_peft and accelerator.distributed_type == DistributedType.MULTI_CPU:  # where accelerate cannot prepare a frozen copy
        raise InputError("--use_peft=false in several processes on CPUs: expected one process, GPUs, or a launch file of DeepSpeed")
    set_seed(settings.seed)  # the same new weights on every rank
    # LoRA and the value head stay in fp32 on bf16 weights; DeepSpeed keeps fp32 masters of its own.
    deepspeed_bf16 = accelerator.state.deepspeed_plugin is not None and accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if settings.bf16 or deepspeed_bf16 else torch.float32
    bits = in_bits(settings.load_in_8bit, settings.load_in_4bit, dtype, outliers=0.0)  # of other rows, which would move the ratios
    place = {"device_map": {"": accelerator.device}} if bits else {}
    model = load_causal_lm(settings.model_name, dtype, settings.cache_dir or None, quantization_config=bits, **place)
    for module in model.modules() if bits else ():
        # On a CPU 4-bit weights take another layout at the first pass without gradients, through which no gradient ever goes again.
        module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt" and accelerator.device.type == "cpu":
            # In eval mode the inputs would be rounded to 8 bits too, and a last digit would move log-probabilities by tenths of a nat.
            module.register_forward_pre_hook(lambda layer, inputs: setattr(layer, "training", True))
    if not settings.use_peft:
        return AutoModelForCausalLMWithValueHead.from_pretrained(use_onednn(model))
    targets = lora_targets(model, settings.lora_target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        target_modules=targets,
    )
    with loading(settings.model_name, f"a policy with LoRA on {', '.join(settings.lora_target_modules)}"):
        # TRL, left to put LoRA on quantised weights, would switch gradient checkpointing on.
        return AutoModelForCausalLMWithValueHead.from_pretrained(get_peft_model(use_onednn(model.requires_grad_(False)), lora), **place)


def optimizer_setup(settings, policy: AutoModelForCausalLMWithValueHead, world_size: int) -> dict:
    """Optimizer and schedule as arguments of `PPOTrainer`; nothing, that is TRL's constant Adam, where no setting asks for more.

    Where the value head has settings of its own, the policy is the first group of weights and the head the second.
    """
    own_head = settings.value_learning_rate or settings.value_warmup_steps
    if not (settings.use_optimizer_setup or own_head):
        return {}
    trained = [weight for weight in policy.pretrained_model.parameters() if weight.requires_grad]
    head = list(policy.v_head.parameters())
    head_group = {"params": head, "lr": settings.value_learning_rate or settings.learning_rate}
    groups = [{"params": trained}, head_group] if own_head else [{"params": trained + head}]
    optimizer = (torch.optim.AdamW if settings.use_optimizer_setup else torch.optim.Adam)(groups, lr=settings.learning_rate)
    factors = [functools.partial(_rate_factor, settings, world_size, begin) for begin in (settings.value_warmup_steps, 0)]
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factors[: len(groups)])}


def _rate_factor(settings, world_size: int, begin: int, count: int) -> float:
    """What multiplies a learning rate after `count` moves of the schedule: 0 before the PPO step `begin`, then 1, or with
    `use_optimizer_setup` the linear warm-up and decay of transformers' `get_linear_schedule_with_warmup` over the steps left."""
    moves = count - begin * world_size  # a prepared scheduler moves once per process
    if moves < 0 or not settings.use_optimizer_setup:
        return float(moves >= 0)
    steps = (settings.overall_steps - begin) * world_size
    rising = round(settings.warmup_ratio * steps)
    return moves / max(1, rising) if moves < rising else max(0.0, (steps - moves) / max(1, steps - rising))
