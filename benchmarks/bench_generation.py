"""Rollouts against plain transformers: tokens a second beside `model.generate`, and six checkpoints beside six loads of the base model.

    python benchmarks/bench_generation.py            # SmolLM2-135M with LoRA, prompts of data/train.json, 48 new tokens
    python benchmarks/bench_generation.py --dtypes bfloat16 --model outputs/demo_backbone --new_tokens 96    # responses that end
    python benchmarks/bench_generation.py --device cuda --dtypes bfloat16                                   # seconds in place of CPU seconds

Both sides draw at temperature 1 without limits, in turn in one process; stock is a PEFT model as `PeftModel.from_pretrained` returns it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from parts.chat_templates import encode_prompts, load_template
from parts.files import REPOSITORY
from parts.generation import HFEngine
from parts.models import load_tokenizer
from parts.sampling import Decoding

MODEL = str(REPOSITORY / "models" / "SmolLM2-135M-Instruct")


def load(name: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))


def now(device: str) -> float:
    """CPU seconds of this process, or seconds where a GPU does the work; drawn tokens are read from it, so that it has done it."""
    return time.process_time() if device == "cpu" else time.perf_counter()


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
    decoding, eos = Decoding(words.new_tokens), tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        adapters = [f"{folder}/step_{step}" for step in range(6)]
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        get_peft_model(load(words.model, "float32"), lora).save_pretrained(adapters[0])
        for other in adapters[1:]:
            Path(other).symlink_to(adapters[0])

        for dtype in words.dtypes:
            stock = PeftModel.from_pretrained(load(words.model, dtype).to(words.device), adapters[0]).eval()
            for batch_size in (16, 32, 64):
                engine = HFEngine(words.model, tokenizer, words.device, batch_size, dtype=dtype)
                ratios = []
                for turn in range(words.turns):
                    start = now(words.device)
                    theirs = stock_generate(stock, prompts, batch_size, words.new_tokens, eos) / (now(words.device) - start)
                    drawn: list[int] = []
                    start = now(words.device)
                    engine.generate(adapters[0], prompts, decoding, turn, range(64), lambda place, tokens: drawn.append(len(tokens)))  # noqa: B023
                    ours = sum(drawn) / (now(words.device) - start)
                    ratios.append(ours / theirs)
                    print(f"  {dtype}, batch {batch_size}: {ours:.0f} tokens a second, model.generate {theirs:.0f}", flush=True)
                print(f"{dtype}, batch {batch_size}: {statistics.median(ratios):.2f} times model.generate "
                      f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip
            del stock

            some = prompts[:16]
            start = now(words.device)
            for adapter in adapters:
                fresh = PeftModel.from_pretrained(load(words.model, dtype).to(words.device), adapter)
                stock_generate(fresh.merge_and_unload().eval(), some, 16, words.new_tokens, eos)
            one_by_one = now(words.device) - start
            start = now(words.device)
            engine = HFEngine(words.model, tokenizer, words.device, 16, dtype=dtype)
            for adapter in adapters:
                engine.generate(adapter, some, decoding, 0, range(16), lambda place, tokens: None)
            once = now(words.device) - start
            print(f"{dtype}, six checkpoints, 16 rows each: {one_by_one / once:.2f} times as fast as a load, merge and model.generate for each "
                  f"({once:.1f} seconds against {one_by_one:.1f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
