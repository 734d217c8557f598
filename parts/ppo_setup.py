"""A run's settings into TRL's trainer: configuration, policy, optimizer.

`settings` are `PPOSettings` of `run_ppo.py` everywhere here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from trl import AutoModelForCausalLMWithValueHead, PPOConfig

from parts.cli import did_you_mean
from parts.cpu_speed import use_onednn
from parts.errors import InputError
from parts.models import loading
from parts.ppo_trainer import FastPPOTrainer
from parts.processes import join_processes


def make_trainer(settings, tokenizer: PreTrainedTokenizerBase) -> FastPPOTrainer:
    """Join the run's processes and set the trainer up, with the same new weights on each. Its `accelerator` is the run's.

    Raises:
        InputError: the model cannot be loaded, or cannot carry such an adapter.
        RuntimeError: not as many processes came together as were launched.
    """
    accelerator = join_processes(settings.mini_batch_size, settings.gradient_accumulation_steps)
    policy = load_policy(settings, accelerator)
    optimization = optimizer_setup(settings, policy, accelerator.num_processes)
    return FastPPOTrainer(ppo_config(settings), policy, ref_model=None, tokenizer=tokenizer, **optimization)


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


def check_lora_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Raises InputError for a plain name that no module has: PEFT leaves it out where another name has one."""
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    whole = [name for name, _ in model.named_modules()]
    for name in names:
        if name.replace(".", "").isidentifier() and not any(own == name or own.endswith(f".{name}") for own in whole):
            raise InputError(f"--lora_target_modules: the model has no module '{name}'{did_you_mean(name, last)}")


def load_policy(settings, accelerator: Accelerator) -> AutoModelForCausalLMWithValueHead:
    """The policy with LoRA and a value head. The reference model is the same weights with the adapter disabled."""
    set_seed(settings.seed)  # the same new weights on every rank
    # LoRA and the value head stay in fp32 on bf16 weights; DeepSpeed keeps fp32 masters of its own.
    deepspeed_bf16 = accelerator.state.deepspeed_plugin is not None and accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if settings.bf16 or deepspeed_bf16 else torch.float32
    with loading(settings.model_name, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(settings.model_name, cache_dir=settings.cache_dir or None, dtype=dtype)
    check_lora_modules(model, settings.lora_target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        target_modules=settings.lora_target_modules,
    )
    with loading(settings.model_name, f"a policy with LoRA on {', '.join(settings.lora_target_modules)}"):
        return AutoModelForCausalLMWithValueHead.from_pretrained(use_onednn(model.requires_grad_(False)), peft_config=lora)


def optimizer_setup(settings, policy: AutoModelForCausalLMWithValueHead, world_size: int) -> dict:
    """AdamW and its schedule as arguments of `PPOTrainer`; nothing, that is TRL's constant Adam, without the flag."""
    if not settings.use_optimizer_setup:
        return {}
    optimizer = torch.optim.AdamW((weight for weight in policy.parameters() if weight.requires_grad), lr=settings.learning_rate)
    steps = settings.overall_steps * world_size  # a prepared scheduler moves once per process
    return {"optimizer": optimizer, "lr_scheduler": get_linear_schedule_with_warmup(optimizer, round(settings.warmup_ratio * steps), steps)}
