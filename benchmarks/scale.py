"""Memory and time of the paper's run on GPUs that need not be there: counted from the models' shapes, not measured.

    python benchmarks/scale.py                          # LLaMA-7B, the paper's settings, on 1 and 8 GPUs of 80 GB
    python benchmarks/scale.py --model llama-2-70b --gpus 16 --zero_stages 2 3

Memory and operations are those of `parts/counting.py`. Time is operations over a share of the GPU's rate; a pass that samples one token a
row takes the longest of reading the weights and the cache and of its arithmetic, and besides what its many small kernels take, as a CUDA
graph or launched one by one. What is assumed is a setting.
Mini batches are counted without padding.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.models import check_model_name, loading

CONFIGS = {  # as published: LLaMA (Touvron et al. 2023a, 2023b), Yi-34B, whose trunk Starling's reward model has, SmolLM2
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                    "num_key_value_heads": 8, "vocab_size": 32000},
    "starling-rm-34b": {"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56,
                        "num_key_value_heads": 8, "vocab_size": 64000},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip
ZERO_BUCKET = 500_000_000  # numbers: DeepSpeed's reduce_bucket_size where the launch file does not say
ZERO3_LIVE = 1_000_000_000  # numbers: its stage3_max_live_parameters
GB = 1e9


@dataclass
class ScaleSettings(Settings):
    model: str = setting("llama-7b", f"policy: {', '.join(CONFIGS)}, a folder with a config.json, or a hub name", path=True)
    gold: str = setting("starling-rm-34b", "gold reward model, named in the same way", path=True)
    gpus: list[int] = setting([1, 8], "numbers of GPUs, a column each")
    zero_stages: list[int] = setting([2], "stages of ZeRO, a column each: 2 shards gradients and optimizer, 3 the weights too")
    batch_size: int = setting(16, "prompts per step and process", least=1)
    mini_batch_size: int = setting(2, "sequences per forward and backward pass", least=1)
    ppo_epochs: int = setting(4, "passes over each batch of rollouts", least=1)
    max_prompt_length: int = setting(512, "longest prompt, for the memory", least=1)
    output_max_length: int = setting(512, "longest response, for the memory; passes that sample a batch", least=1)
    prompt_tokens: int = setting(50, "mean prompt, for the time (AlpacaFarm's mean is 49 by SmolLM2's tokenizer)", least=1)
    response_tokens: int = setting(256, "mean response, for the time", least=1)
    lora_r: int = setting(8, "LoRA rank", least=1)
    lora_target_modules: list[str] = setting(["q_proj", "v_proj"], "modules that carry LoRA")
    eval_prompts: int = setting(805, "prompts that a checkpoint is evaluated on", least=1)
    gpu_memory: float = setting(80.0, "GB of a GPU", above=0)
    other_memory: float = setting(2.0, "GB for the CUDA context, workspaces and fragmentation", least=0)
    teraflops: float = setting(989.0, "a GPU's dense bf16 rate by its datasheet: 989 (H100 SXM), 312 (A100)", above=0)
    teraflops_fp32: float = setting(67.0, "its fp32 rate, for the relevance encoder: 67 (H100 SXM), 19.5 (A100)", above=0)
    bandwidth: float = setting(3.35, "its memory's TB/s: 3.35 (H100 SXM), 2.04 (A100 SXM, 80 GB)", above=0)
    link: float = setting(50.0, "GB/s at which a GPU receives the others' weights under ZeRO-3 (400 Gbit/s between machines)", above=0)
    training_utilisation: float = setting(0.4, "share of the rate that passes over whole sequences reach", above=0, most=1)
    decoding_utilisation: float = setting(0.6, "share of the bandwidth that passes over one token a row reach", above=0, most=1)
    launch_microseconds: float = setting(10.0, "the host's time for a kernel, from Python to its launch", least=0)
    kernel_microseconds: float = setting(2.5, "of a small kernel in a CUDA graph", least=0)
    cuda_graphs: bool = setting(True, "tokens are sampled by CUDA graphs, as all models are that can be (docs/rollouts.md)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gpus, default=0) < 1:
            raise InputError(f"--gpus is {self.gpus}, expected numbers of at least 1")
        if not set(self.zero_stages) <= {2, 3} or not self.zero_stages:
            raise InputError(f"--zero_stages is {self.zero_stages}, expected 2, 3 or both")
        for mean, longest in (("prompt_tokens", "max_prompt_length"), ("response_tokens", "output_max_length")):
            if getattr(self, mean) > getattr(self, longest):
                raise InputError(f"--{mean} is {getattr(self, mean)}, expected {longest} = {getattr(self, longest)} at most")
        for name in (self.model, self.gold):
            if name not in CONFIGS:
                check_model_name(name)


def load_config(name: str):
    from transformers import AutoConfig, LlamaConfig

    if name in CONFIGS:
        return LlamaConfig(**CONFIGS[name])
    with loading(name, "a configuration"):
        return AutoConfig.from_pretrained(name)


class Counted:
    """All that the tables are made of. The policy is in bf16, adapter and value head too, as DeepSpeed keeps it."""

    def __init__(self, settings: ScaleSettings) -> None:
        import torch
        from transformers import AutoModel, BertConfig

        from parts.counting import (
            Operations,
            cache_bytes,
            count,
            meta_policy,
            policy_operations,
            rows_per_pass,
            sampling_kernels,
            trainer_pass,
        )

        self.settings = settings
        config = load_config(settings.model)
        policy = meta_policy(config, settings, "bfloat16").to(torch.bfloat16)
        self.base, self.trained = count(policy, trained=False), count(policy, trained=True)
        self.operations = policy_operations(policy, config)
        self.cache_of_token = cache_bytes(config)

        bounds = (settings.max_prompt_length, settings.output_max_length)
        means = (settings.prompt_tokens, settings.response_tokens)
        rows = settings.mini_batch_size
        self.scoring, _ = trainer_pass(policy, rows_per_pass(settings.batch_size, *bounds), *bounds, trained=False)
        self.training, _ = trainer_pass(policy, rows, *bounds, trained=True)
        self.checkpointed, _ = trainer_pass(policy, rows, *bounds, trained=True, checkpointing=True)
        self.rows_per_pass = rows_per_pass(settings.batch_size, *means)
        _, self.scoring_kernels = trainer_pass(policy, self.rows_per_pass, *means, trained=False)
        _, self.training_kernels = trainer_pass(policy, rows, *means, trained=True)
        self.sampling_kernels = sampling_kernels(policy, settings.batch_size)

        with torch.device("meta"):
            gold_config, encoder_config = load_config(settings.gold), BertConfig()  # facebook/contriever is a BERT of the base size
            gold, encoder = AutoModel.from_config(gold_config), AutoModel.from_config(encoder_config)
        self.gold, self.gold_operations = count(gold, trained=True), Operations.of(gold, gold_config)
        self.encoder, self.encoder_operations = count(encoder, trained=True), Operations.of(encoder, encoder_config)

    def memory(self, gpus: int, stage: int) -> dict[str, float]:
        """GB of each GPU, by what fills them; those that begin with "-" are never there together."""
        settings = self.settings
        tokens = settings.batch_size * (settings.max_prompt_length + settings.output_max_length)
        apart = {
            "- keys and values while sampling": self.cache_of_token * tokens,
            "- log-probabilities, no gradients": self.scoring,
            "- mini batch, gradients": self.training,
        }
        parts = {
            "base weights (the reference's too)": 2 * (self.base if stage == 2 else self.base / gpus + min(self.base, ZERO3_LIVE)),
            "LoRA, value head, their optimizer": self.trained * (2 + 14 / gpus),
            "DeepSpeed's bucket for gradients": 2 * ZERO_BUCKET,
            "relevance encoder": 4 * self.encoder,
            "context, workspaces, fragmentation": settings.other_memory * GB,
            "largest of the next three": max(apart.values()),
        }
        together = {"**PPO: memory of a GPU, GB**": sum(parts.values())}
        alone = {"**evaluation: memory of a GPU, GB**": 2 * self.base + self.cache_of_token * tokens + settings.other_memory * GB}
        found = together | parts | apart | {"- (with --gradient_checkpointing)": self.checkpointed} | alone
        return {name: size / GB for name, size in found.items()}

    def seconds(self, gpus: int, stage: int) -> dict[str, tuple[float, str]]:
        """Seconds of a PPO step and of an evaluation, and what each part waits for."""
        settings, operations = self.settings, self.operations
        rate = settings.teraflops * 1e12 * settings.training_utilisation
        fp32_rate = settings.teraflops_fp32 * 1e12 * settings.training_utilisation
        read_rate = settings.bandwidth * 1e12 * settings.decoding_utilisation
        launch = settings.launch_microseconds * 1e-6
        gather = 2 * self.base * (1 - 1 / gpus) / (settings.link * 1e9) if stage == 3 else 0.0
        rows, prompt, response = settings.batch_size, settings.prompt_tokens, settings.response_tokens

        sampled = {  # one token a row
            "memory": (2 * self.base + self.cache_of_token * rows * (prompt + response / 2)) / read_rate,
            "arithmetic": (operations.forward(rows, prompt + response / 2) + rows * 2 * operations.head) / rate,
        }
        small = self.sampling_kernels * settings.kernel_microseconds * 1e-6
        sampled = {name: time + small for name, time in sampled.items()}
        sampled |= {} if settings.cuda_graphs else {"launches": self.sampling_kernels * launch}
        before, epochs = operations.step(rows, prompt, response, settings.ppo_epochs)
        scored = 2 * math.ceil(rows / self.rows_per_pass)
        trained = settings.ppo_epochs * math.ceil(rows / settings.mini_batch_size)
        step = {
            "- rollouts": longest(settings.output_max_length, sampled | {"network": gather}),
            "- log-probabilities, policy and reference": longest(
                scored, {"arithmetic": before / scored / rate, "launches": self.scoring_kernels * launch, "network": gather}
            ),
            "- epochs": longest(
                trained, {"arithmetic": epochs / trained / rate, "launches": self.training_kernels * launch, "network": 2 * gather}
            ),
            "- relevance encoder": (self.encoder_operations.forward(rows * response, response) / fp32_rate, "arithmetic"),
        }
        batches, tokens = math.ceil(math.ceil(settings.eval_prompts / gpus) / rows), prompt + response
        evaluation = {  # every GPU has the whole policy; gold's layers are spread over the GPUs, which take turns
            "- rollouts of one checkpoint": longest(batches * settings.output_max_length, sampled),
            "- gold": (self.gold_operations.forward(settings.eval_prompts * tokens, tokens) / rate, "arithmetic"),
        }
        return {
            f"**PPO: a step of {rows} prompts a GPU, s**": (sum(time for time, _ in step.values()), ""),
            **step,
            f"**evaluation: {settings.eval_prompts} prompts, s**": (sum(time for time, _ in evaluation.values()), ""),
            **evaluation,
        }

    def table(self) -> str:
        """Markdown: a column for each number of GPUs and stage of ZeRO."""
        settings = self.settings
        columns = [(gpus, stage) for gpus in settings.gpus for stage in settings.zero_stages]
        heads = [f"{gpus} GPU{'s' * (gpus > 1)}, ZeRO-{stage}" for gpus, stage in columns]
        lines = [f"| {' | '.join([settings.model, *heads])} |", "|---" * (len(heads) + 1) + "|"]
        memory, seconds = ([part(*column) for column in columns] for part in (self.memory, self.seconds))
        for name in memory[0]:
            too_large = [name.startswith("**") and part[name] > settings.gpu_memory for part in memory]
            cells = [f"{part[name]:.1f}" + ", does not fit" * large for part, large in zip(memory, too_large)]
            lines.append(f"| {' | '.join([name, *cells])} |")
        for name in seconds[0]:
            cells = [f"{part[name][0]:.1f}" + (f", {part[name][1]}" if part[name][1] else "") for part in seconds]
            lines.append(f"| {' | '.join([name, *cells])} |")
        return "\n".join(lines)

    def facts(self) -> str:
        """What the table's columns have in common."""
        settings = self.settings
        before, epochs = self.operations.step(settings.batch_size, settings.prompt_tokens, settings.response_tokens, settings.ppo_epochs)
        return (
            f"{settings.model}: {self.base:,} parameters; LoRA and value head {self.trained:,}. "
            f"A step's operations: {before / 1e15:.2f} PFLOP before the epochs, {epochs / 1e15:.2f} PFLOP in them; "
            f"{self.sampling_kernels:,} kernels a sampled token. "
            f"{settings.gold}: {self.gold:,} parameters, {2 * self.gold / GB:.0f} GB in bf16."
        )


def longest(passes: int, seconds: dict[str, float]) -> tuple[float, str]:
    """Seconds of so many passes, and what they wait for: of what runs side by side, the slowest."""
    name = max(seconds, key=seconds.get)
    return passes * seconds[name], name


def main() -> None:
    settings = parse_settings(ScaleSettings, description=__doc__)
    counted = Counted(settings)
    print(counted.facts(), counted.table(), sep="\n\n")


if __name__ == "__main__":
    run_main(main)
