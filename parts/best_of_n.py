"""Best-of-n: what gold makes of the response that a proxy ranks first among n samples of one policy, without any training.

Scores come as arrays [rows, samples]; what is said of n as arrays [sizes, rows], of which a curve is the mean over rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are used

from parts.rank_statistics import bootstrap_interval, paired_difference, spearman, turning_point
from parts.rows import QTYPES
from parts.scaling_fits import fit_gains


def subset_sizes(count: int) -> list[int]:
    """1, 2, 4 ... up to `count`, which comes last whatever it is."""
    return [*(2**power for power in range((count - 1).bit_length())), count]


def divergence(n: int) -> float:
    """KL of best-of-n from the policy in nats per response: log n - (n - 1) / n.

    Stiennon et al. 2020, "Learning to summarize from human feedback", as Gao et al. 2022 use it. Exact where no two samples are alike;
    where some are, the KL is smaller.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(proxy: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The chance of each sample to be the one that the proxy ranks first in a random subset of n of a row's N samples.

    With L samples below a sample and t equal to it (itself included), it is

        (C(L + t, n) - C(L, n)) / (t C(N, n))

    since the best of the subset is one of the t equals when none is above them and not all are below, and equals share their weight. Without
    ties, the sum of weight times score is the unbiased estimator of best-of-n of Nakano et al. 2021, "WebGPT", and Gao et al. 2022,
    "Scaling Laws for Reward Model Overoptimization": sum of C(i - 1, n - 1) / C(N, n) times the score of the i-th from below.

    Args:
        proxy: [rows, samples].
        sizes: the values of n, 1 to the number of samples.

    Returns:
        [sizes, rows, samples]; each row sums to 1.
    """
    count = proxy.shape[1]
    below = scipy.stats.rankdata(proxy, method="min", axis=1).astype(int) - 1
    within = scipy.stats.rankdata(proxy, method="max", axis=1).astype(int)
    shares = np.array([[math.comb(some, n) / math.comb(count, n) for some in range(count + 1)] for n in sizes])
    return (shares[:, within] - shares[:, below]) / (within - below)


def ranked_by(proxy: np.ndarray, scores: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """[sizes, rows] expected scores of the sample that the proxy ranks first among n; `proxy` and `scores` are [rows, samples]."""
    return (best_of_n_weights(proxy, sizes) * scores).sum(axis=2)


@dataclass(frozen=True)
class Ranking:
    """What one proxy's choice does to the golds.

    Args:
        name: the design in symbols, or that of a gold that ranks by itself: the most that any proxy could do.
        proxy: [sizes, rows] expected proxy of the choice.
        gold: gold's name to [sizes, rows].
    """

    name: str
    proxy: np.ndarray
    gold: dict[str, np.ndarray]


def rank_all(totals: Mapping[str, np.ndarray], golds: Mapping[str, np.ndarray], sizes: Sequence[int]) -> list[Ranking]:
    """A ranking for each design, then one for each gold by itself; scores are [rows, samples]."""
    ceilings = {"gold itself" if len(golds) == 1 else f"gold {name} itself": scores for name, scores in golds.items()}
    return [
        Ranking(name, ranked_by(proxy, proxy, sizes), {gold: ranked_by(proxy, scores, sizes) for gold, scores in golds.items()})
        for name, proxy in [*totals.items(), *ceilings.items()]
    ]


def judge(sizes: Sequence[int], proxy: np.ndarray, gold: np.ndarray) -> dict:
    """All that is said of one ranking by one gold, of all its prompts or of some.

    Args:
        sizes: the values of n, 1 first.
        proxy, gold: [sizes, rows].

    Returns:
        "rows"; by n the means "proxy" and "gold", and "gain", what gold gains over n = 1, with its "standard_error" over prompts (None for
        a lone one); "spearman" of the two curves over n and its "interval" over prompts; "peak", the n of the highest gold;
        "turning_point", as `rank_statistics.turning_point`, that n if gold falls beyond it while the proxy rises; "fall", the `paired_difference` of gold from there to the largest n; "scaling",
        `scaling_fits.fit_gains` of what gold gains.
    """
    gains, several = gold - gold[0], gold.shape[1] > 1
    means = proxy.mean(axis=1), gold.mean(axis=1)
    rho, peak = spearman(*means), int(np.argmax(means[1]))
    return {
        "rows": gold.shape[1],
        "proxy": means[0].tolist(),
        "gold": means[1].tolist(),
        "gain": gains.mean(axis=1).tolist(),
        "standard_error": scipy.stats.sem(gains, axis=1).tolist() if several else [None] * len(sizes),
        "spearman": rho,
        "interval": bootstrap_interval(proxy, gold) if several and rho is not None else None,
        "peak": sizes[peak],
        "turning_point": turning_point(list(sizes), proxy, gold),
        "fall": paired_difference(gold[peak], gold[-1]) if several else None,
        "scaling": fit_gains("best-of-n", [divergence(n) for n in sizes], gains),
    }


def judge_all(sizes: Sequence[int], rankings: Sequence[Ranking], qtypes: Sequence[str | None]) -> dict[str, dict[str, dict]]:
    """By gold, then by ranking, what `judge` says of all prompts, and under "by_qtype" of those of each query type."""
    places = {qtype: [row for row, own in enumerate(qtypes) if own == qtype] for qtype in QTYPES}
    return {
        gold: {
            ranking.name: {
                **judge(sizes, ranking.proxy, ranking.gold[gold]),
                "by_qtype": {
                    qtype: judge(sizes, ranking.proxy[:, rows], ranking.gold[gold][:, rows]) for qtype, rows in places.items() if rows
                },
            }
            for ranking in rankings
        }
        for gold in rankings[0].gold
    }
