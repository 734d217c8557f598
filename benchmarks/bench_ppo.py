"""PPO against stock TRL 0.9.6: `step` and `generate` on the same batch, in turn in one process.

    python benchmarks/bench_ppo.py                 # SmolLM2-135M, 16 prompts of data/train.json, 64 new tokens, mini batch 2, 4 epochs
    python benchmarks/bench_ppo.py --turns 3

Stock TRL is `trl.PPOTrainer` with the same policy, untouched: fp32, its own `generate`. All runs on the GPU where there is one. Memory is what the
tensors of one more step, of one epoch, take at their peak beside the model's own, without the holes of a heap. The share of the machine's rate is what the model's arithmetic alone would take at the speed of the policy's own frozen
layers run one after another, over the time taken. It counts every sequence by itself, without padding (`parts/counting.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.products import products_rate
from parts.chat_templates import encode_prompts, load_template
from parts.counting import Follower, policy_operations
from parts.cpu_speed import onednn_is_faster, use_onednn
from parts.files import REPOSITORY
from parts.models import load_tokenizer
from parts.ppo_trainer import FastPPOTrainer

MODEL = str(REPOSITORY / "models" / "SmolLM2-135M-Instruct")
BATCH, NEW_TOKENS, EPOCHS = 16, 64, 4
GPU = torch.cuda.is_available()


def make_trainer(cls: type, dtype: torch.dtype = torch.float32) -> PPOTrainer:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).requires_grad_(False)
    if cls is FastPPOTrainer:
        use_onednn(model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora)
    config = PPOConfig(batch_size=BATCH, mini_batch_size=2, gradient_accumulation_steps=4, ppo_epochs=EPOCHS, learning_rate=1e-5)
    return cls(config, policy, ref_model=None, tokenizer=load_tokenizer(MODEL))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds and the result."""
    start = now()
    result = work()
    return now() - start, result


def memory(trainer: PPOTrainer, work: Callable[[], object]) -> int:
    """Bytes of the tensors that `work` adds at its peak."""
    if not GPU:
        with Follower(trainer.model) as alive:
            work()
        return alive.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def now() -> float:
    """Seconds, with all work done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def operations(policy: nn.Module, prompts: list[int], responses: list[int]) -> dict[str, float]:
    """Floating-point operations of drawing `responses` after `prompts`, lengths in tokens, and of a step on them."""
    counted = policy_operations(policy, policy.pretrained_model.config)
    prompt, response = statistics.fmean(prompts), statistics.fmean(responses)
    passes = counted.forward(sum(prompts), prompt) + counted.forward(sum(responses), prompt + response / 2)
    return {
        "generate": passes + 2 * counted.head * sum(responses),
        "step": sum(counted.step(len(prompts), prompt, response, EPOCHS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = load_tokenizer(MODEL)
    template = load_template("tokenizer", tokenizer)
    rows = json.loads((REPOSITORY / "data" / "train.json").read_text(encoding="utf-8"))[:BATCH]
    device = "cuda" if GPU else "cpu"
    queries = [torch.tensor(ids, device=device) for ids in encode_prompts(tokenizer, [template.render(row["input"]) for row in rows])]
    trainers = {
        "stock": make_trainer(PPOTrainer),
        "fp32": make_trainer(FastPPOTrainer),
        "bf16": make_trainer(FastPPOTrainer, torch.bfloat16),
    }
    speeds: dict[str, dict[str, list[float]]] = {"generate": {}, "step": {}}
    responses, shares = None, {"generate": {}, "step": {}}
    for turn in range(words.turns):
        for name, trainer in trainers.items():
            stock = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id} if name == "stock" else {}
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0, "top_p": 1.0, **stock}
            torch.manual_seed(turn)
            seconds, drawn = timed(lambda: trainer.generate(queries, batch_size=BATCH, return_prompt=False, **options))  # noqa: B023
            speeds["generate"].setdefault(name, []).append(sum(map(len, drawn)) / seconds)
            responses = responses or drawn  # every trainer learns from the first one's
            spent = {"generate": seconds}
            np.random.seed(turn)
            scores = [torch.tensor(float(len(response)) / 100) for response in responses]
            seconds, _ = timed(lambda: trainer.step(queries, responses, scores))  # noqa: B023
            speeds["step"].setdefault(name, []).append(1 / seconds)
            spent["step"] = seconds
            policy = trainer.accelerator.unwrap_model(trainers["bf16" if name == "bf16" else "fp32"].model)
            for part, texts in (("generate", drawn), ("step", responses)):
                done = operations(policy, [len(query) for query in queries], [len(text) for text in texts])[part]
                shares[part].setdefault(name, []).append(done / spent[part] / products_rate(policy, 256, now))
            print(f"  turn {turn + 1} {name}: generate {speeds['generate'][name][-1]:.0f} tokens/s, step {seconds:.1f} s", flush=True)
    peaks = {}
    for name, trainer in trainers.items():
        trainer.config.ppo_epochs = 1
        peaks[name] = memory(trainer, lambda: trainer.step(queries, responses, scores))  # noqa: B023
    tokens = [len(query) + len(response) for query, response in zip(queries, responses)]
    print(f"sequences of {min(tokens)} to {max(tokens)} tokens, mean {statistics.fmean(tokens):.0f}; "
          f"{torch.get_num_threads()} threads; oneDNN for fp32: {onednn_is_faster()}")  # fmt: skip
    for part, found in speeds.items():
        for name in ("fp32", "bf16"):
            ratios = [ours / theirs for ours, theirs in zip(found[name], found["stock"])]
            print(f"{part}, {name}: {statistics.median(ratios):.2f} times as fast as stock ({min(ratios):.2f} to {max(ratios):.2f})")
    for part, found in shares.items():
        print(
            f"{part}, share of the machine's product rate: "
            + ", ".join(f"{name} {statistics.median(by):.0%}" for name, by in found.items())
        )
    for name in ("fp32", "bf16"):
        print(f"step, {name}: extra memory {peaks[name] / 1e6:.0f} MB, {peaks[name] / peaks['stock']:.2f} of stock's")


if __name__ == "__main__":
    main()
