"""This checkout against another commit: the same work by each in turn, one process a commit, one thread each.

    python benchmarks/against.py c834062                                     # a PPO step and rollouts, bf16 and fp32
    python benchmarks/against.py c834062 --what step rollouts-64 --dtypes bfloat16 --turns 3

`step` is `FastPPOTrainer.step` on 16 sequences of 60 + 64 tokens, mini batches of 8, 2 epochs, LoRA of rank 8. `rollouts-N` are N prompts of
data/eval.json, up to 48 new tokens, with an adapter; `rollouts-N` in float32 of the other commit stand beside bfloat16 too, where both are
asked for. Seconds are the process's own (CPU time), so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = str(REPOSITORY / "models" / "SmolLM2-135M-Instruct")
QUERY, RESPONSE, SEQUENCES = 60, 64, 16


class Work:
    """The work itself, by the modules of the checkout that `sys.path` begins with. Only names that old commits have too."""

    def __init__(self, dtype: str) -> None:
        import torch
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig

        from parts.cpu_speed import use_onednn
        from parts.models import load_tokenizer
        from parts.ppo_trainer import FastPPOTrainer

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.tokenizer = load_tokenizer(MODEL)
        base = use_onednn(AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, dtype)).requires_grad_(False))
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora)
        config = PPOConfig(batch_size=SEQUENCES, mini_batch_size=8, gradient_accumulation_steps=1, ppo_epochs=2, learning_rate=1e-5)
        self.trainer = FastPPOTrainer(config, policy, ref_model=None, tokenizer=self.tokenizer)
        self.tokens = torch.randint(100, 40000, (SEQUENCES, QUERY + RESPONSE), generator=torch.Generator().manual_seed(0))

    def step(self) -> int:
        import numpy as np
        import torch

        np.random.seed(0)
        queries, responses = list(self.tokens[:, :QUERY]), list(self.tokens[:, QUERY:])
        self.trainer.step(queries, responses, [torch.tensor(float(row)) for row in range(SEQUENCES)])
        return SEQUENCES * RESPONSE

    def rollouts(self, rows: int) -> int:
        from parts.chat_templates import encode_prompts, load_template
        from parts.generation import Decoding, generate_responses

        template = load_template("tokenizer", self.tokenizer)
        data = json.loads((REPOSITORY / "data" / "eval.json").read_text(encoding="utf-8"))[:rows]
        prompts = encode_prompts(self.tokenizer, [template.render(row["instruction"]) for row in data])
        model = self.trainer.accelerator.unwrap_model(self.trainer.model).pretrained_model.eval()
        return sum(map(len, generate_responses(model, self.tokenizer, prompts, Decoding(48), rows, 0)))


def work(checkout: str) -> None:
    """Do what standard input asks for, a line each, and say seconds and tokens."""
    sys.path.insert(0, checkout)
    warnings.simplefilter("ignore")
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # what libraries print is no answer
    workers: dict[str, Work] = {}
    for line in sys.stdin:
        what, dtype = line.split()
        worker = workers[dtype] = workers.get(dtype) or Work(dtype)
        name, _, rows = what.partition("-")
        do: Callable[[], int] = worker.step if name == "step" else lambda: worker.rollouts(int(rows))  # noqa: B023
        start = time.process_time()
        tokens = do()
        print(json.dumps([time.process_time() - start, tokens]), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--what", nargs="+", default=["step", "rollouts-32", "rollouts-64"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.work:
        work(words.commit)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, words.commit], cwd=REPOSITORY, check=True)
        stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", folder], cwd=REPOSITORY, check=True)
        sides = []
        for checkout in (folder, str(REPOSITORY)):
            process = subprocess.Popen(
                [sys.executable, __file__, checkout, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            sides.append(process)

        def ask(side: int, what: str, dtype: str) -> tuple[float, int]:
            print(what, dtype, file=sides[side].stdin, flush=True)
            line = sides[side].stdout.readline()
            if not line:
                sys.exit(f"{(words.commit, 'this checkout')[side]}: {what} in {dtype} came to no end")
            return tuple(json.loads(line))

        for what in words.what:
            for dtype in words.dtypes:
                found = [[ask(side, what, dtype) for side in (0, 1)] for _ in range(words.turns + 1)][1:]  # the first one warms up
                speeds = [[tokens / seconds for seconds, tokens in turn] for turn in found]
                ratios = [ours / theirs for theirs, ours in speeds]
                print(
                    f"{what}, {dtype}: {statistics.median(seconds for (seconds, _), _ in found):.1f} s before, "
                    f"{statistics.median(seconds for _, (seconds, _) in found):.1f} s now; "
                    f"{statistics.median(theirs for theirs, _ in speeds):.0f} and {statistics.median(ours for _, ours in speeds):.0f} tokens/s; "
                    f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
