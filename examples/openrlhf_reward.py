"""The proxy reward in OpenRLHF (checked against 0.11.2):

    python -m openrlhf.cli.train_ppo_ray ... --reward.remote_url examples/openrlhf_reward.py

OpenRLHF calls `reward_func(queries, prompts, labels)` from worker threads: `queries` are prompts with their responses, special tokens
and all; `labels` come from the dataset's label column, here a JSON text {"query": ..., "qtype": ..., "reference": ...}.
It wants rewards to train on, scores to show, and numbers to log. The environment variable RELEVANCE_MODEL names the encoder,
MAX_LENGTH the longest response in tokens (512), which is that of the command's --rollout.max_new_tokens, and END_TOKEN the tokenizer's end
of a response where SPECIAL_TOKENS below lacks it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reward_model import DEFAULT_RELEVANCE, ReversedEngineeredRewardForInference

SPECIAL_TOKENS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<end_of_turn>", "<|end|>")
LAST_CHARACTERS = (256, 128, 64, 32)  # of a prompt, by which its end is known

_loading = threading.Lock()
_loaded: list[ReversedEngineeredRewardForInference] = []


def _reward() -> ReversedEngineeredRewardForInference:
    """The full design, loaded once however many threads ask."""
    with _loading:
        if not _loaded:
            _loaded.append(
                ReversedEngineeredRewardForInference(
                    "alpaca",
                    int(os.environ.get("MAX_LENGTH", "512")),
                    repetition_penalty=True,
                    relevance_scaling=True,
                    reward_branching=True,
                    relevance_model_name=os.environ.get("RELEVANCE_MODEL", DEFAULT_RELEVANCE),
                )
            )
        return _loaded[0]


def response_of(query: str, prompt: str) -> str:
    """What follows the prompt, without the special tokens at its end. A tokenizer may have put its own token before the prompt.

    A prompt that OpenRLHF cut on the left, or whose letters the tokenizer writes otherwise, is known by its last characters.

    Raises:
        ValueError: these are not in the query either, so that nothing says where the response begins.
    """
    ends = [prompt, *(prompt[-count:] for count in LAST_CHARACTERS if count < len(prompt))]
    end = next((end for end in ends if end in query), None)
    if end is None:
        raise ValueError(f"the prompt's end {ends[-1]!r} is not in the query {query[:60]!r}")
    response = query.partition(end)[2].rstrip()
    specials = {*SPECIAL_TOKENS, os.environ.get("END_TOKEN", "")} - {""}
    while token := next((token for token in specials if response.endswith(token)), None):
        response = response.removesuffix(token).rstrip()
    return response


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    """{"rewards": [rows], "scores": [rows], "extra_logs": {component: [rows]}}."""
    rows = [json.loads(label) for label in labels]
    batch = {name: [row[name] for row in rows] for name in ("query", "qtype", "reference")}
    batch["response"] = [response_of(query, prompt) for query, prompt in zip(queries, prompts)]
    table = _reward().score(batch, every_feature=True)  # of every row: a mean over zeros for the other branch's would say nothing
    total = torch.tensor(table["total"])
    logs = {name: torch.tensor(column) for name, column in table.items() if name not in ("branch", "total")}
    return {"rewards": total, "scores": total, "extra_logs": logs}
