"""A learned reward model, or an ensemble of them, as the reward that PPO trains against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from parts.gold_models import load_gold_reward_model
from parts.rewards import ensemble_total, member_columns


class LearnedReward:
    """A learned reward model, or an ensemble of them, as a reward: the gold stage's models, with `score` for the logs.

    Args:
        names: hub names, folders or adapter folders.
        device: where they score; by default what `load_gold_reward_model` chooses.
        batch_size: most rows per forward pass.
        ensemble, coefficient: how several become one, as `ensemble_total` says.
        offload: keep them in host memory, and on the device only one at a time, for its turn.
    """

    required_columns = ["query", "response"]

    def __init__(
        self,
        names: Sequence[str],
        device: str | None,
        batch_size: int,
        ensemble: str = "mean",
        coefficient: float = 0.0,
        offload: bool = False,
    ) -> None:
        self.ensemble = ensemble
        self.coefficient = coefficient
        self.offload = offload
        self.members = {}
        for column, name in member_columns(names).items():
            self.members[column] = load_gold_reward_model(name, device=device, batch_size=batch_size)
            self.device = self.members[column].model.device
            self._move(column, "cpu")

    @property
    def dtype(self) -> str:
        """That of the weights."""
        return str(next(iter(self.members.values())).model.dtype).removeprefix("torch.")

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]:
        """One float a row."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """The column "total"; of an ensemble each member's scores besides, by name, and "disagreement", their standard deviation a row."""
        scores = {}
        for column, model in self.members.items():
            self._move(column, self.device)
            scores[column] = model.get_reward(batch)
            self._move(column, "cpu")
        if len(scores) == 1:
            return {"total": next(iter(scores.values()))}
        rows = list(zip(*scores.values()))
        total = ensemble_total(list(scores.values()), self.ensemble, self.coefficient)
        return {**scores, "disagreement": [statistics.pstdev(row) for row in rows], "total": total}

    def _move(self, column: str, device: object) -> None:
        if self.offload:
            self.members[column].model.to(device)
