"""The counts of `parts/counting.py` against one real PPO step: the memory that it adds, and its floating-point operations.

    python benchmarks/check_scale.py                                  # SmolLM2-135M, bf16, one mini batch of 8 sequences of 128 tokens
    python benchmarks/check_scale.py --dtype float32
    python benchmarks/check_scale.py --model_name llama-7b --mini_batch_size 2    # random weights, on a GPU

On a CPU its own paths are off, so that the step is computed as on a GPU: fused attention, PyTorch's linear layers. A first step counts
operations by `torch.utils.flop_counter`; it also makes the optimizer's moments and brings the weights into memory. What the peak of a
second one adds to the process, or to PyTorch's tensors on a GPU, is the memory. malloc is told to map every tensor by itself, so that it
gives all of them back; what its heap keeps otherwise, `--malloc_heap=true` shows.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scale import CONFIGS, load_config
from parts.cli import Settings, parse_settings, setting
from parts.errors import run_main
from parts.models import check_model_name, load_tokenizer, loading

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # glibc's malloc.h


@dataclass
class CheckSettings(Settings):
    model_name: str = setting("models/SmolLM2-135M-Instruct", "causal LM, hub name or folder, or a name of benchmarks/scale.py", path=True)
    dtype: str = setting("bfloat16", "of the base weights; LoRA and value head are fp32", choices=("bfloat16", "float32"))
    batch_size: int = setting(8, "sequences in the step", least=2)
    mini_batch_size: int = setting(8, "sequences per forward and backward pass", least=1)
    ppo_epochs: int = setting(1, "passes over them", least=1)
    prompt_tokens: int = setting(64, "of every prompt", least=1)
    response_tokens: int = setting(64, "of every response", least=1)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    malloc_heap: bool = setting(False, "leave malloc as it is: tensors below 32 MiB share a heap, whose holes count")
    lora_r: int = setting(8, "LoRA rank", least=1)
    lora_target_modules: list[str] = setting(["q_proj", "v_proj"], "modules that carry LoRA")


def make_trainer(settings: CheckSettings):
    """The trainer as `run_ppo.py` makes it."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig

    from benchmarks.bench_gpu import TOKENIZER
    from parts.ppo_trainer import FastPPOTrainer

    lora = LoraConfig(task_type="CAUSAL_LM", r=settings.lora_r, lora_dropout=0.0, target_modules=settings.lora_target_modules)
    dtype = getattr(torch, settings.dtype)
    with loading(settings.model_name, "a causal language model"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if settings.model_name in CONFIGS:
            model, tokenizer = AutoModelForCausalLM.from_config(load_config(settings.model_name), dtype=dtype), TOKENIZER
        else:
            model, tokenizer = AutoModelForCausalLM.from_pretrained(settings.model_name, dtype=dtype), load_tokenizer(settings.model_name)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model.requires_grad_(False), peft_config=lora)
    sizes = {name: getattr(settings, name) for name in ("batch_size", "mini_batch_size", "ppo_epochs", "gradient_checkpointing")}
    return FastPPOTrainer(PPOConfig(**sizes), policy, ref_model=None, tokenizer=tokenizer)


def resident(field: str) -> int:
    """Bytes of this process in memory, or of PyTorch's tensors on a GPU: VmRSS now, VmHWM at its peak."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    settings = parse_settings(CheckSettings, description=__doc__)
    if settings.model_name not in CONFIGS:
        check_model_name(settings.model_name)
    import torch

    from parts import cpu_speed
    from parts.counting import meta_policy, policy_operations, rows_per_pass, torchs_counter, trainer_pass

    # 1. Measured.
    libc = ctypes.CDLL(None)
    if not settings.malloc_heap:
        libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        libc.mallopt(M_MMAP_MAX, 2**20)
    cpu_speed.ENABLED = False
    trainer = make_trainer(settings)
    rows, lengths = settings.batch_size, (settings.prompt_tokens, settings.response_tokens)
    config = trainer.model.pretrained_model.config
    device = trainer.current_device
    batch = [list(torch.randint(config.vocab_size, (rows, length), device=device)) for length in lengths] + [list(torch.randn(rows))]
    with torchs_counter() as counter:
        trainer.step(*batch)
    operations = counter.get_total_flops()
    gc.collect()
    libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = resident("VmRSS")
    trainer.step(*batch)
    memory = resident("VmHWM") - before

    # 2. Counted.
    policy = meta_policy(config, settings, settings.dtype)
    checkpointing = settings.gradient_checkpointing
    scoring, _ = trainer_pass(policy, rows_per_pass(rows, *lengths), *lengths, trained=False)
    training, _ = trainer_pass(policy, settings.mini_batch_size, *lengths, trained=True, checkpointing=checkpointing)
    counted = sum(policy_operations(policy, config).step(rows, *lengths, settings.ppo_epochs, checkpointing, settings.mini_batch_size))
    for what, own, theirs, unit in (("memory", max(scoring, training), memory, 1e6), ("operations", counted, operations, 1e9)):
        name = {1e6: "MB", 1e9: "billion"}[unit]
        print(f"{what}: counted {own / unit:,.0f} {name}, measured {theirs / unit:,.0f} {name}, ratio {own / theirs:.3f}")


if __name__ == "__main__":
    run_main(main)
