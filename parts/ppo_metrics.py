"""The numbers that PPO logs: means of the reward's columns, TRL's statistics, and the file that both are in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parts.files import JsonLines, atomic_path
from parts.rows import QTYPES

Moments = dict[str, tuple[float, float]]  # mean and standard deviation by column


def moments(columns: Mapping[str, Sequence], qtypes: Sequence[str | None], of_all_processes: bool = False) -> Moments:
    """Mean and standard deviation of each numeric column, over all rows as "<column>" and over a type's as "<column>/<qtype>".

    Rows without a value are left out; a column without any has no entry.

    Args:
        columns: [rows] values each; processes may have other ones, in another order.
        qtypes: [rows].
        of_all_processes: whether the rows of the other processes count too; all of them must call this then.
    """
    groups = {name: values for name, values in columns.items() if not any(isinstance(value, str) for value in values)}
    for qtype in QTYPES:
        groups |= {f"{name}/{qtype}": [v for v, own in zip(columns[name], qtypes) if own == qtype] for name in columns if name in groups}
    own = {}
    for name, values in groups.items():
        numbers = [float(value) for value in values if value is not None]
        own[name] = np.array([len(numbers), sum(numbers), sum(value * value for value in numbers)])
    every = [own]
    if of_all_processes:
        from accelerate.utils import gather_object

        every = gather_object(every)
    found = {}
    for name in {name: None for sums in every for name in sums}:
        count, total, squares = sum(sums[name] for sums in every if name in sums).tolist()
        if count:
            mean = total / count
            found[name] = (mean, math.sqrt(max(squares / count - mean * mean, 0.0)))
    return found


def reward_metrics(found: Moments, start: Moments) -> dict[str, float]:
    """Means as "reward/<column>", and as "reward_normalised/<column>" in standard deviations of the same column at the start.

    Both are also there by query type, which is normalised by the moments of all rows, so that the types can be compared.
    """
    metrics = {f"reward/{name}": mean for name, (mean, _) in found.items()}
    for name, (mean, _) in found.items():
        center, spread = start.get(name.partition("/")[0], (0.0, 0.0))
        if spread > 0:
            metrics[f"reward_normalised/{name}"] = (mean - center) / spread
    return metrics


def length_columns(responses: Sequence[Sequence[int]], ended: Sequence[bool], longest: int) -> dict[str, list[float]]:
    """Columns of responses' lengths in tokens, of those that `ended` by themselves, and of those cut off at `longest` tokens."""
    lengths = [float(len(response)) for response in responses]
    truncated = [float(not end and length >= longest) for end, length in zip(ended, lengths)]
    return {"response_tokens": lengths, "eos_rate": [float(end) for end in ended], "truncation_rate": truncated}


def engine_metrics(ours: np.ndarray, theirs: Sequence[Sequence[float]], lengths: Sequence[int]) -> dict[str, float]:
    """How far an engine that drew the rollouts was from the policy that learns from them, as means over the responses of all processes.

    Args:
        ours: [responses, longest] log-probabilities by the policy, each response at the end of its row.
        theirs: by the engine, one a token; of a response that was cut afterwards, also those of the tokens that are gone.
        lengths: of the responses in tokens.

    Returns:
        "rollout/logprob_difference", the mean absolute difference in nats a token; and "rollout/kl", the KL of engine and policy in nats a
        response, as the responses themselves estimate it: the engine's log-probability minus the policy's.
    """
    differences = [
        np.asarray(own[:length]) - row[len(row) - length :] for row, own, length in zip(np.asarray(ours, dtype=float), theirs, lengths)
    ]
    columns = {"logprob_difference": [abs(row).mean() for row in differences], "kl": [row.sum() for row in differences]}
    return {f"rollout/{name}": mean for name, (mean, _) in moments(columns, [None] * len(differences), of_all_processes=True).items()}


def development_metrics(found: Moments) -> dict[str, float]:
    """The means of `moments` as "dev/<column>"."""
    return {f"dev/{name}": mean for name, (mean, _) in found.items()}


def scalars(stats: Mapping[str, object]) -> dict[str, float]:
    """The single numbers among TRL's statistics, as floats."""
    return {name: float(value) for name, value in stats.items() if np.ndim(value) == 0 and not isinstance(value, str)}


def require_finite_step(stats: Mapping[str, float], step: int) -> None:
    """Raises FloatingPointError where the step has spoilt the weights: to continue would only hide it."""
    for name in ("objective/kl", "ppo/loss/total", "ppo/loss/policy", "ppo/loss/value"):
        if not math.isfinite(stats[name]):
            raise FloatingPointError(f"{name} is {stats[name]} at step {step}; the last checkpoint is good")


class MetricsLog:
    """One line of numbers a step, as JSON; a number that is not finite is null.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines = JsonLines(path)

    def keep_until(self, step: int) -> None:
        """Drop the lines of steps after `step`: a run that resumes from there writes them again."""
        kept = [line for line in self._lines.read() if line["step"] <= step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def append(self, step: int, stats: Mapping[str, object]) -> None:
        """Add the single numbers of a step's statistics."""
        numbers = {name: value if math.isfinite(value) else None for name, value in scalars(stats).items()}
        self._lines.append({"step": step, **numbers})


def describe(means: Mapping[str, float]) -> str:
    """The means over all query types in one line."""
    names = {name: name.removeprefix("dev/") for name in means}
    return ", ".join(f"{short} {means[name]:.3f}" for name, short in names.items() if "/" not in short)


def shorten(text: str, width: int = 160) -> str:
    """`text` on one line of at most `width` characters, cut inside a word where it must be: some languages have no spaces."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
