"""The proxy reward in verl (checked against 0.9.1):

    reward.custom_reward_function.path=examples/verl_reward.py reward.custom_reward_function.name=compute_score \\
    +reward.custom_reward_function.reward_kwargs.relevance_model_name=facebook/contriever \\
    +reward.custom_reward_function.reward_kwargs.max_sequence_length=512     # that of data.max_response_length

verl calls `compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=...)` once per rollout, from several
threads. A row's `ground_truth` is the reference answer; its `extra_info` must hold `query` (the raw instruction) and `qtype`.
The answer's "score" is what is maximised; the other entries are logged.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reward_model import DEFAULT_RELEVANCE, ReversedEngineeredRewardForInference

_loading = threading.Lock()
_rewards: dict[tuple[str, int], ReversedEngineeredRewardForInference] = {}


def _reward(relevance_model_name: str, max_sequence_length: int) -> ReversedEngineeredRewardForInference:
    """The full design, loaded once however many threads ask."""
    key = (relevance_model_name, max_sequence_length)
    with _loading:
        if key not in _rewards:
            _rewards[key] = ReversedEngineeredRewardForInference(
                "alpaca",
                max_sequence_length=max_sequence_length,
                repetition_penalty=True,
                relevance_scaling=True,
                reward_branching=True,
                relevance_model_name=relevance_model_name,
            )
        return _rewards[key]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    relevance_model_name: str = DEFAULT_RELEVANCE,
    max_sequence_length: int = 512,
    **unused: object,
) -> dict[str, float]:
    """{"score": the reward, and each component by name}. verl wants the same keys of every row, so both relevances are computed."""
    row = {"query": extra_info["query"], "response": solution_str, "qtype": extra_info["qtype"], "reference": ground_truth}
    table = _reward(relevance_model_name, max_sequence_length).score({name: [value] for name, value in row.items()}, every_feature=True)
    numbers = {name: column[0] for name, column in table.items() if name not in ("branch", "total")}
    return {"score": table["total"][0], **numbers}
