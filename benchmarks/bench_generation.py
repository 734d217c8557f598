"""Rollouts against plain transformers: tokens a second beside `model.generate`, and six checkpoints beside six loads of the base model.

    python benchmarks/bench_generation.py            # SmolLM2-135M with LoRA, prompts of data/train.json, 48 new tokens
    python benchmarks/bench_generation.py --dtypes bfloat16 --model outputs/demo_backbone --new_tokens 96    # responses that end
    python benchmarks/bench_generation.py --device cuda --dtypes bfloat16                                   # seconds in place of CPU seconds

Both sides draw at temperature 1 without limits, in turn in one process, after a call each that is not timed; stock is a PEFT model as
`PeftModel.from_pretrained` returns it. What our side does once for each checkpoint before it samples is told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from parts.adapters import put_on
from parts.chat_templates import encode_prompts, load_template
from parts.files import REPOSITORY
from parts.generation import HFEngine, generate_responses
from parts.models import load_tokenizer
from parts.sampling import Decoding, check_sampling

T = TypeVar("T")
MODEL = str(REPOSITORY / "models" / "SmolLM2-135M-Instruct")


def load(name: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))


def now(device: str) -> float:
    """CPU seconds of this process, or seconds where a GPU does the work; drawn tokens are read from it, so that it has done it."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def timed(device: str, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, as `now` counts them, and the result."""
    start = now(device)
    result = work()
    return now(device) - start, result


def stock_generate(model: PeftModel, prompts: list[list[int]], batch_size: int, new_tokens: int, eos: int) -> int:
    """`model.generate` on left-padded batches in the order given; the tokens up to each end of sequence are counted."""
    count = 0
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        longest = max(map(len, part))
        ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0,
                                   temperature=1.0, eos_token_id=eos, pad_token_id=eos)  # fmt: skip
        for row in found[:, longest:].tolist():
            count += row.index(eos) + 1 if eos in row else len(row)
    return count


def beside_generate(
    words: argparse.Namespace, dtype: str, prompts: list[list[int]], adapter: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokens a second of both sides."""
    device, eos = words.device, tokenizer.eos_token_id
    stock = PeftModel.from_pretrained(load(words.model, dtype).to(device), adapter).eval()
    engine = HFEngine(words.model, tokenizer, device, 16, dtype=dtype)
    loading, base = timed(device, lambda: engine.model)
    adapting, model = timed(device, lambda: put_on(base, adapter, words.model))
    checking, _ = timed(device, lambda: check_sampling(model))
    print(f"{dtype}, before the first response: base {loading:.1f} s, adapter {adapting:.1f} s, check {checking:.1f} s", flush=True)
    for batch_size in (16, 32, 64):

        def theirs(some: list[list[int]], new_tokens: int) -> int:
            return stock_generate(stock, some, batch_size, new_tokens, eos)  # noqa: B023

        def ours(some: list[list[int]], new_tokens: int, seed: int) -> int:
            return sum(map(len, generate_responses(model, tokenizer, some, Decoding(new_tokens), batch_size, seed)))  # noqa: B023

        theirs(prompts[:batch_size], 4)
        ours(prompts[:batch_size], 4, 0)
        ratios = []
        for turn in range(words.turns):
            their_seconds, their_tokens = timed(device, lambda: theirs(prompts, words.new_tokens))  # noqa: B023
            our_seconds, our_tokens = timed(device, lambda: ours(prompts, words.new_tokens, turn))  # noqa: B023
            rates = our_tokens / our_seconds, their_tokens / their_seconds
            ratios.append(rates[0] / rates[1])
            print(f"  {dtype}, batch {batch_size}: {rates[0]:.0f} tokens a second, model.generate {rates[1]:.0f}", flush=True)
        print(f"{dtype}, batch {batch_size}: {statistics.median(ratios):.2f} times model.generate "
              f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip


def six_checkpoints(
    words: argparse.Namespace, dtype: str, some: list[list[int]], adapters: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Six adapters by one engine beside a load, a merge and `model.generate` for each."""

    def one_by_one() -> None:
        for adapter in adapters:
            fresh = PeftModel.from_pretrained(load(words.model, dtype).to(words.device), adapter)
            stock_generate(fresh.merge_and_unload().eval(), some, 16, words.new_tokens, tokenizer.eos_token_id)

    def once() -> None:
        engine = HFEngine(words.model, tokenizer, words.device, 16, dtype=dtype)
        for adapter in adapters:
            engine.generate(adapter, some, Decoding(words.new_tokens), 0, range(len(some)), lambda place, tokens: None)

    their_seconds, our_seconds = timed(words.device, one_by_one)[0], timed(words.device, once)[0]
    print(f"{dtype}, six checkpoints, 16 rows each: {their_seconds / our_seconds:.2f} times as fast as a load, merge and model.generate for each "
          f"({our_seconds:.1f} seconds against {their_seconds:.1f})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="cpu")
    words = parser.parse_args()
    tokenizer = load_tokenizer(words.model)
    template = load_template("tokenizer", tokenizer)
    rows = json.loads((REPOSITORY / "data" / "train.json").read_text(encoding="utf-8"))[:64]
    prompts = encode_prompts(tokenizer, [template.render(row["input"]) for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        adapters = [f"{folder}/step_{step}" for step in range(6)]
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        get_peft_model(load(words.model, "float32"), lora).save_pretrained(adapters[0])
        for other in adapters[1:]:
            Path(other).symlink_to(adapters[0])
        for dtype in words.dtypes:
            beside_generate(words, dtype, prompts, adapters[0], tokenizer)
            six_checkpoints(words, dtype, prompts[:16], adapters, tokenizer)


if __name__ == "__main__":
    main()
