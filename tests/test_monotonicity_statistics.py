"""The statistics of two curves, with literal numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from parts.rank_statistics import (
    ScoredRun,
    agreement,
    bootstrap_interval,
    chance_fall,
    compare,
    curve_band,
    kendall,
    permutation_pvalue,
    spearman,
    standard_gains,
    turning_point,
)


def test_correlations():
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # five pairs agree, one does not
    assert spearman([1, 1, 1], [1, 2, 3]) is None and kendall([1, 1, 1], [1, 2, 3]) is None
    tie = [0.4934375, 0.49343750000000003, 0.5034375]  # means of equal sums, whose last bits differ
    assert spearman(tie, [1, 2, 3]) == spearman(tie, [2, 1, 3]) == pytest.approx(3**0.5 / 2)
    assert spearman(tie[:2], [1, 2]) is None


@pytest.mark.parametrize(
    ("proxy", "gold"), [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]), ([1.0, 2.0, 2.0, 3.0, 9.0, 7.0], [5, 4, 6, 6, 8, 7])]
)
def test_the_exact_p_counts_the_orders(proxy, gold):
    observed = abs(spearmanr(proxy, gold).statistic)
    orders = list(itertools.permutations(gold))
    extreme = sum(abs(spearmanr(proxy, order).statistic) >= observed - 1e-9 for order in orders)
    assert permutation_pvalue(proxy, gold) == pytest.approx(extreme / len(orders))


def test_known_p_values():
    assert permutation_pvalue([1, 2, 3], [1, 2, 3]) == pytest.approx(2 / 6)  # the smallest that three checkpoints can give
    assert permutation_pvalue(range(7), range(7)) == pytest.approx(2 / 5040)
    many = permutation_pvalue(np.arange(15), np.arange(15))
    assert 0 < many < 1e-4  # drawn, not counted: never 0
    assert permutation_pvalue([1, 1, 1], [1, 2, 3]) is None


def test_the_bootstrap_over_prompts():
    rows = np.arange(40) / 40
    proxy = np.stack([rows, rows + 1, rows + 2, rows + 3])
    assert bootstrap_interval(proxy, 2 * proxy) == (1.0, 1.0)
    assert bootstrap_interval(proxy, -proxy) == (-1.0, -1.0)
    noise = np.random.default_rng(1).normal(size=(4, 40))
    low, high = bootstrap_interval(proxy, noise)
    assert -1 <= low < spearman(proxy.mean(axis=1), noise.mean(axis=1)) < high <= 1
    assert bootstrap_interval(proxy, noise) == (low, high)  # seeded
    assert bootstrap_interval(np.zeros((4, 40)), noise) is None
    low, high = curve_band(noise)
    error = noise.std(axis=1) / np.sqrt(40)
    np.testing.assert_allclose(low, noise.mean(axis=1) - 1.96 * error, atol=0.06)
    np.testing.assert_allclose(high, noise.mean(axis=1) + 1.96 * error, atol=0.06)


def test_agreement_prompt_by_prompt():
    proxy = np.array([[0.0, 0.0, 0.0, 0.0], [9, 9, 9, 9], [1.0, -1.0, 1.0, 0.0]])
    gold = np.array([[0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], [2.0, -3.0, -1.0, 5.0]])
    assert agreement(proxy, gold) == {"share": pytest.approx(2 / 3), "rows": 3}


@pytest.mark.parametrize(
    ("proxy", "gold", "step"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 1], 20),
        ([1, 2, 3, 4], [1, 2, 3, 4], None),
        ([1, 9, 3, 4], [1, 3, 2, 1], None),
        ([1, 2, 3, 4], [5, 3, 2, 1], 10),
        ([1, 2, 3, 4], [1, 2, 2, 2], None),  # never falls
    ],
)
def test_where_gold_turns(proxy, gold, step):
    proxy, gold = np.array(proxy, dtype=float)[:, None], np.array(gold, dtype=float)[:, None]
    noise = np.array([[-1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])
    assert turning_point([10, 20, 30, 40], proxy, gold) == step  # means alone
    assert turning_point([10, 20, 30, 40], proxy + noise, gold + 0.01 * noise) == step
    assert turning_point([10, 20, 30, 40], proxy + noise, gold * 1e-3 + noise) is None  # within what prompts scatter


def test_a_gold_that_does_not_move_rarely_peaks():
    """One in twenty curves, for any number of checkpoints; 1.96 standard errors of a chosen peak would be two in five of ten."""
    rng, found = np.random.default_rng(5), {3: 0, 10: 0}
    for count in found:
        for _ in range(100):
            gold, proxy = rng.normal(size=(count, 40)), np.linspace(0, 1, count)[:, None] + np.zeros((1, 40))
            found[count] += turning_point(list(range(count)), proxy, gold) is not None
    assert all(number <= 10 for number in found.values()), found
    limits = [chance_fall(rng.normal(size=(count, 400))) for count in (2, 10)]
    assert 1.5 < limits[0] < 2.1 < limits[1] < 3.6  # two checkpoints: 1.96 of half the orders


def run_of(name, design, gold, instructions=("a", "b", "c"), kl=(0.0, 1.0, 2.5)):
    proxy = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [2.0, 4.0, 6.0]])
    return ScoredRun(
        name=name, design=design, own=True, steps=[0, 4, 8], instructions=list(instructions), qtypes=[None] * 3, references=[None] * 3,
        responses=[["x"] * 3] * 3, tokens=np.array([[10, 20, 30], [20, 20, 20], [40, 50, 60]]), kl=list(kl), proxy=proxy,
        components={"repetition": np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.25, 0.5, 0.75]])},
        gold={"rm": np.array(gold, dtype=float), "human": np.array([[1.0], [3.0], [2.0]])},
        found={"rm": {"spearman": 0.5, "interval": (0.0, 1.0)}, "human": {"spearman": 0.5}},
    )  # fmt: skip


def test_runs_of_two_designs_side_by_side():
    falls = run_of("one", "LI", [[1, 1, 1], [2, 2, 2], [0, -1, -2]])
    rises = run_of("two", "LI * RP", [[1, 1, 1], [2, 2, 2], [2, 4, 6]], kl=(0.0, None, None))
    other = run_of("three", "LI * RP", [[1, 1, 1], [2, 2, 2], [2, 4, 6]], instructions=("a", "b", "z"))
    found = compare([falls, rises, other])
    # the proxy gains 1, 2, 3 and gold -1, -2, -3: means of 2 and standard errors of 1 / sqrt(3)
    assert found["runs"][0] == {
        "name": "one", "design": "LI", "own": True, "steps": [0, 8], "rows": 3,
        "proxy": {"difference": 2.0, "standard_error": pytest.approx(3**-0.5)},
        "golds": {
            "rm": {"difference": -2.0, "standard_error": pytest.approx(3**-0.5), "spearman": 0.5, "interval": (0.0, 1.0), "peak": 4},
            "human": {"difference": 1.0, "standard_error": None, "spearman": 0.5, "interval": None, "peak": 4},
        },
        "tokens": [20.0, 50.0], "repetition": [1.0, 0.5], "kl": [0.0, 2.5],
    }  # fmt: skip
    assert found["runs"][1]["golds"]["rm"]["peak"] == 8 and found["runs"][1]["kl"] == [0.0, None]
    # by prompt gold gains 1, 3, 5 under "two" and -1, -2, -3 under "one": 2, 5, 8 apart
    apart = {"difference": 5.0, "standard_error": pytest.approx(3 / 3**0.5)}
    assert found["pairs"] == [{"runs": ["one", "two"], "golds": {"rm": apart}}]
    assert found["unpaired"] == [["one", "three"], ["two", "three"]]


def test_gains_in_standard_deviations_of_the_start():
    np.testing.assert_allclose(standard_gains(np.array([[1.0, 3.0], [2.0, 7.0]])), [[0, 0], [1 / 2**0.5, 4 / 2**0.5]])
    assert standard_gains(np.array([[1.0, 1.0], [2.0, 7.0]])) is None and standard_gains(np.array([[1.0], [2.0]])) is None
