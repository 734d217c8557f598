"""The proxy reward in TRL's GRPO, for trl>=1.16 in an environment of its own.

    python -m venv .venv-adapters && .venv-adapters/bin/pip install -r examples/requirements.txt
    .venv-adapters/bin/python examples/trl_grpo.py --model models/SmolLM2-135M-Instruct --data data/train.json --max_steps 2

TRL calls a reward function as `f(prompts=..., completions=..., completion_ids=..., <dataset columns>, trainer_state=..., log_extra=...,
log_metric=..., ...)` and expects one float a completion; prompts and completions are texts, or lists of messages.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parts.errors import run_main
from parts.rewards import column_mean
from parts.rows import QTYPES, read_rows
from reward_model import ReversedEngineeredRewardForInference


def last_message(text_or_messages: str | list[dict]) -> str:
    """The text of a prompt or completion in either of TRL's forms."""
    return text_or_messages if isinstance(text_or_messages, str) else text_or_messages[-1]["content"]


class ProxyReward:
    """A TRL reward function: the total to maximise, and each component's mean in the log."""

    __name__ = "proxy_reward"  # TRL logs it as rewards/proxy_reward/mean

    def __init__(self, **settings: object) -> None:
        self.reward = ReversedEngineeredRewardForInference(**settings)

    def __call__(self, prompts, completions, qtype=None, reference=None, log_metric=None, **columns) -> list[float]:
        batch = {
            "query": [last_message(prompt) for prompt in prompts],
            "response": [last_message(completion) for completion in completions],
            "qtype": qtype,
            "reference": reference,
        }
        table = self.reward.score(batch)
        if log_metric is not None:
            for name, column in table.items():
                if (mean := column_mean(column)) is not None:
                    log_metric(f"proxy/{name}", mean)
        return table["total"]


def main() -> None:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="data/train.json")
    parser.add_argument("--relevance_model", default="models/all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", default="outputs/grpo")
    parser.add_argument("--max_steps", type=int, default=2)
    parser.add_argument("--max_completion_length", type=int, default=48)
    words = parser.parse_args()

    rows = read_rows(words.data, {"input": None, "output": None, "qtype": QTYPES})
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["input"]}], "qtype": row["qtype"], "reference": row["output"]} for row in rows]
    )
    reward = ProxyReward(
        template="alpaca",
        max_sequence_length=words.max_completion_length,
        repetition_penalty=True,
        relevance_scaling=True,
        reward_branching=True,
        relevance_model_name=words.relevance_model,
    )
    config = GRPOConfig(
        output_dir=words.output_dir,
        max_steps=words.max_steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=words.max_completion_length,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(model=words.model, reward_funcs=reward, args=config, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    path = Path(words.output_dir) / "log_history.json"
    path.write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    run_main(main)
