"""The statistics of two reward curves over checkpoints: rank correlations, their uncertainty, and where gold turns.

Scores come as arrays [checkpoints, rows]: every checkpoint answers the same prompts. A curve is the mean over rows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr

EXACT_UP_TO = 10  # checkpoints: 10! orders are counted in a second
RESAMPLES = 100_000


@dataclass(frozen=True)
class ScoredRun:
    """A run's checkpoints with their responses and scores, rows being the prompts, in one order throughout.

    Args:
        name: the run's name (`--model_prefix`).
        steps: [checkpoints] PPO steps, rising.
        instructions, qtypes, references: [rows]; the last two None where a row has none.
        responses: [checkpoints][rows] texts.
        components: feature to [checkpoints, rows]; NaN where a row's branch does not use it.
        proxy: [checkpoints, rows].
        gold: gold's name to [checkpoints, rows], or [checkpoints, 1] where only means are known.
        kl: [checkpoints] mean KL from the start in nats per response; None where no log has it.
        found: gold's name to what `correlations` found.
    """

    name: str
    steps: list[int]
    instructions: list[str]
    qtypes: list[str | None]
    references: list[str | None]
    responses: list[list[str]]
    components: dict[str, np.ndarray]
    proxy: np.ndarray
    gold: dict[str, np.ndarray]
    kl: list[float | None]
    found: dict[str, dict] = field(default_factory=dict)


def spearman(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Spearman's rank correlation of two curves, ties at their mean rank; None where either is constant."""
    if len(set(np.asarray(proxy).tolist())) < 2 or len(set(np.asarray(gold).tolist())) < 2:
        return None
    return float(spearmanr(proxy, gold).statistic)


def kendall(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Kendall's tau-b of two curves; None where either is constant."""
    value = float(kendalltau(proxy, gold).statistic)
    return value if math.isfinite(value) else None


def permutation_pvalue(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Two-sided p of Spearman's correlation under all orders of the checkpoints, or `RESAMPLES` of them above `EXACT_UP_TO`.

    It assumes what a permutation assumes, that every order is equally likely; checkpoints of one run are not.
    """
    if spearman(proxy, gold) is None:
        return None
    one, other = (rankdata(curve) - np.mean(rankdata(curve)) for curve in (proxy, gold))
    observed = abs(one @ other) - 1e-9  # equal sums in another order must tie
    count = len(one)
    if count > EXACT_UP_TO:
        orders = np.random.default_rng(0).permuted(np.tile(other, (RESAMPLES, 1)), axis=1)
        return float((1 + (np.abs(orders @ one) >= observed).sum()) / (1 + RESAMPLES))
    orders = np.array(list(itertools.permutations(range(count - 1))))  # of those after the first
    extreme = 0
    for first in range(count):
        rest = np.delete(other, first)[orders]
        extreme += int((np.abs(one[0] * other[first] + rest @ one[1:]) >= observed).sum())
    return extreme / math.factorial(count)


def bootstrap_interval(proxy: np.ndarray, gold: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """A 95% percentile interval of Spearman's correlation over prompts drawn anew, the same ones for every checkpoint and both rewards.

    It says how much the correlation owes to this choice of prompts, not to this run. None where a resample's curve is constant.
    """
    rows = proxy.shape[1]
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    ranks = [rankdata(counts @ scores.T, axis=1) for scores in (proxy, gold)]
    centered = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    norms = np.sqrt((centered[0] ** 2).sum(axis=1) * (centered[1] ** 2).sum(axis=1))
    if (norms == 0).any():
        return None
    low, high = np.quantile((centered[0] * centered[1]).sum(axis=1) / norms, [0.025, 0.975])
    return float(low), float(high)


def curve_band(scores: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A 95% percentile band of a curve over prompts drawn anew: [checkpoints] low and high."""
    rows = scores.shape[1]
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    low, high = np.quantile(counts @ scores.T, [0.025, 0.975], axis=0)
    return low, high


def agreement(proxy: np.ndarray, gold: np.ndarray) -> dict[str, float | int | None]:
    """Prompt by prompt, does gold move with the proxy from the first checkpoint to the last?

    Returns:
        "share" of the prompts on which both moved that they moved on in the same direction, and "rows", their number.
    """
    moves = [np.sign(scores[-1] - scores[0]) for scores in (proxy, gold)]
    both = (moves[0] != 0) & (moves[1] != 0)
    return {"share": float((moves[0] == moves[1])[both].mean()) if both.any() else None, "rows": int(both.sum())}


def turning_point(steps: list[int], proxy: np.ndarray, gold: np.ndarray) -> int | None:
    """The step where gold peaks while the proxy still rises after it: over-optimisation. None where there is no such step."""
    peak = int(np.argmax(gold))
    return steps[peak] if peak < len(steps) - 1 and max(proxy[peak + 1 :]) > proxy[peak] else None
