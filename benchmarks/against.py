"""This checkout against another commit: the same work by each in turn, one process a commit, one thread each.

    python benchmarks/against.py c834062                                     # a PPO step and rollouts, bf16 and fp32
    python benchmarks/against.py c834062 --what step rollouts-64 --dtypes bfloat16 --turns 3

`step` is `FastPPOTrainer.step` on 16 rollouts: prompts of data/train.json under 80 tokens, 20 to 95 tokens after each, mini batches of 8,
2 epochs, LoRA of rank 8. `equal` is a step on 16 sequences of 60 + 64 tokens. `rollouts-N` are N prompts of data/eval.json, up to 48 new
tokens, with an adapter. Seconds are the process's own (CPU time), so that other work on the machine counts little.
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
from contextlib import ExitStack
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = str(REPOSITORY / "models" / "SmolLM2-135M-Instruct")
ROWS = 16


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
        config = PPOConfig(batch_size=ROWS, mini_batch_size=8, gradient_accumulation_steps=1, ppo_epochs=2, learning_rate=1e-5)
        self.trainer = FastPPOTrainer(config, policy, ref_model=None, tokenizer=self.tokenizer)
        self.prompts = {file: self._prompts(file, field) for file, field in (("train.json", "input"), ("eval.json", "instruction"))}

    def _prompts(self, file: str, field: str) -> list[list[int]]:
        from parts.chat_templates import encode_prompts, load_template

        template = load_template("tokenizer", self.tokenizer)
        rows = json.loads((REPOSITORY / "data" / file).read_text(encoding="utf-8"))
        return encode_prompts(self.tokenizer, [template.render(row[field]) for row in rows])

    def step(self, equal: bool) -> int:
        import numpy as np
        import torch

        draw = torch.Generator().manual_seed(0)
        np.random.seed(0)  # of TRL's mini batches
        prompts = [ids for ids in self.prompts["train.json"] if len(ids) < 80][:ROWS]
        queries = [torch.randint(100, 40000, (60,), generator=draw) if equal else torch.tensor(ids) for ids in prompts]
        lengths = [64 if equal else 20 + 5 * row for row in range(ROWS)]
        responses = [torch.randint(100, 40000, (length,), generator=draw) for length in lengths]
        self.trainer.step(queries, responses, [torch.tensor(float(row)) for row in range(ROWS)])
        return sum(lengths)

    def rollouts(self, rows: int) -> int:
        from parts.generation import Decoding, generate_responses

        prompts = self.prompts["eval.json"][:rows]
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
        worker = workers[dtype] = workers.get(dtype) or Work(dtype)  # before the clock starts
        name, _, rows = what.partition("-")
        start = time.process_time()
        tokens = worker.rollouts(int(rows)) if name == "rollouts" else worker.step(equal=name == "equal")
        print(json.dumps([time.process_time() - start, tokens]), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--what", nargs="+", default=["step", "equal", "rollouts-32", "rollouts-64"])
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
