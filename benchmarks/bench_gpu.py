"""A policy with LoRA on a GPU, of a large model's shape and with random weights: a PPO step, and rollouts as CUDA graphs, beside stock.

    python benchmarks/bench_gpu.py                                   # LLaMA-7B, bf16
    python benchmarks/bench_gpu.py --model smollm2-135m --turns 2

Prompts are random tokens of 20 to 80. Stock is `model.generate` and `trl.PPOTrainer`, on the same model and on a copy of it. A step's memory
is what its peak adds; `parts/counting.py` says how many operations it takes, and the share is of --teraflops. In the first rollouts no token
ends a response; in the second some do, and rows that have ended leave or make place.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.scale import load_config
from parts import cuda_graphs
from parts.counting import policy_operations
from parts.ppo_trainer import FastPPOTrainer
from parts.sampling import Decoding, ready_to_sample, row_draws, sample

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"</s>": 0}, "</s>")), eos_token="</s>", pad_token="</s>")


def make_policy(words: argparse.Namespace) -> AutoModelForCausalLMWithValueHead:
    config = load_config(words.model)
    torch.manual_seed(0)
    with torch.device(words.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, words.dtype)).requires_grad_(False)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora).to(words.device)


def make_trainer(cls: type, policy: AutoModelForCausalLMWithValueHead, words: argparse.Namespace) -> PPOTrainer:
    config = PPOConfig(batch_size=words.batch_size, mini_batch_size=2, gradient_accumulation_steps=words.batch_size // 2, ppo_epochs=4)
    return cls(config, policy, ref_model=None, tokenizer=TOKENIZER)


def random_prompts(count: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocabulary) for _ in range(draw.randint(20, 80))] for _ in range(count)]


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds, with all work done, and the result."""
    wait()
    start = time.perf_counter()
    found = work()
    wait()
    return time.perf_counter() - start, found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(model, prompts: list[list[int]], tokens: int, ends: set[int], at_a_time: int, graphs: bool) -> list[list[int]]:
    devices, cuda_graphs.DEVICES = cuda_graphs.DEVICES, cuda_graphs.DEVICES if graphs else ()
    try:
        with ready_to_sample(model, at_a_time):
            return sample(model, prompts, Decoding(tokens), row_draws(0, range(len(prompts)), tokens), ends, at_a_time)
    finally:
        cuda_graphs.DEVICES = devices


@torch.no_grad()
def stock(model, prompts: list[list[int]], tokens: int, ends: set[int], at_a_time: int) -> list[list[int]]:
    """`model.generate` on prompts of about one length."""
    found = []
    for start in range(0, len(prompts), at_a_time):
        part = sorted(prompts, key=len)[start : start + at_a_time]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        drawn = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0,
                               eos_token_id=sorted(ends) or None, pad_token_id=0)[:, longest:].tolist()  # fmt: skip
        found += [row[: next((place + 1 for place, token in enumerate(row) if token in ends), tokens)] for row in drawn]
    return found


def rollouts(model, words: argparse.Namespace) -> None:
    vocabulary = model.config.vocab_size
    some = set(random.Random(1).sample(range(1, vocabulary), max(1, vocabulary // words.response_tokens)))  # random weights draw each alike
    for name, count, at_a_time, ends in (
        ("no response ends early", words.batch_size, words.batch_size, set()),
        (f"responses of {words.response_tokens} tokens on average", 3 * words.at_a_time, words.at_a_time, some),
    ):
        prompts = random_prompts(count, vocabulary)
        ways = {
            "as graphs": lambda tokens: ours(model, prompts, tokens, ends, at_a_time, True),  # noqa: B023
            "kernel by kernel": lambda tokens: ours(model, prompts, tokens, ends, at_a_time, False),  # noqa: B023
            "model.generate": lambda tokens: stock(model, prompts, tokens, ends, at_a_time),  # noqa: B023
        }
        if ends:
            del ways["kernel by kernel"]  # minutes, and the first rollouts tell it
        most = words.response_tokens * (2 if ends else 1)
        for turn in range(words.turns):
            for way, work in ways.items():
                if turn == 0:
                    work(4)
                spent, found = seconds(lambda: work(most))  # noqa: B023
                tokens = sum(map(len, found))
                print(f"{name}, {count} prompts, {at_a_time} at a time, {way}: {tokens / spent:,.0f} tokens/s "
                      f"({tokens:,} tokens, {spent:.2f} s; longest {max(map(len, found))})", flush=True)  # fmt: skip


def steps(words: argparse.Namespace, trainers: dict[str, PPOTrainer]) -> None:
    policy = next(iter(trainers.values())).model
    vocabulary, rows, draw = policy.pretrained_model.config.vocab_size, words.batch_size, random.Random(2)
    prompts = [torch.tensor(prompt, device=words.device) for prompt in random_prompts(rows, vocabulary)]
    lengths = [draw.randint(words.response_tokens // 2, words.response_tokens * 3 // 2) for _ in range(rows)]
    responses = [torch.randint(vocabulary, (length,), device=words.device) for length in lengths]
    counted = policy_operations(policy, policy.pretrained_model.config)
    done = sum(counted.step(rows, sum(map(len, prompts)) / rows, sum(lengths) / rows, 4))
    for turn in range(1 + words.turns):
        for name, trainer in trainers.items():
            np.random.seed(turn)
            if words.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            spent, stats = seconds(lambda: trainer.step(prompts, responses, [torch.tensor(len(row) / 100) for row in responses]))  # noqa: B023
            added = f", {(torch.cuda.max_memory_allocated() - before) / 1e9:.1f} GB" if words.device == "cuda" else ""
            parts = ", ".join(f"{part} {stats[f'time/ppo/{part}']:.2f}" for part in ("forward_pass", "optimize_step"))
            print(f"step {turn} (0 warms up), {name}: {spent:.2f} s{added} ({parts}); {done / spent / words.teraflops / 1e12:.0%} of the rate",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="a name of benchmarks/scale.py, a folder with a config.json, or a hub name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--at_a_time", type=int, default=64, help="rows of a batch in the second rollouts")
    parser.add_argument("--response_tokens", type=int, default=256)
    parser.add_argument("--teraflops", type=float, default=989.0)
    parser.add_argument("--device", default="cuda")
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    if words.device == "cuda":
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(words)}))
    policy = make_policy(words)
    trainers = {"ours": make_trainer(FastPPOTrainer, policy, words)}
    trainers["TRL"] = make_trainer(PPOTrainer, make_policy(words), words)
    steps(words, trainers)
    rollouts(policy.pretrained_model, words)
    if words.device == "cuda":
        print(f"peak of all: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
