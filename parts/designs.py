"""Proxy designs on outputs that exist already: which of the sixteen on/off settings ranks systems as a leaderboard does?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parts.errors import InputError
from parts.rank_statistics import bootstrap_interval, kendall, permutation_pvalue, spearman
from parts.rows import read_rows

SWITCHES = {
    "LI": "length_incentive",
    "RP": "repetition_penalty",
    "relevance": "relevance_scaling",
    "branching": "reward_branching",
}


def read_systems(paths: Sequence[str]) -> dict[str, dict[str, str]]:
    """Outputs of systems: {system: {instruction: output}}; a system is its rows' `generator`, or the file's name where they have none.

    Raises:
        InputError: an unusable file, or a system twice.
    """
    systems = {}
    for path in paths:
        rows = read_rows(path, {"instruction": None, "output": None})
        name = rows[0].get("generator") or Path(path).name.split(".")[0]
        if name in systems:
            raise InputError(f"{path}: system {name!r} comes twice, expected one file for each")
        systems[name] = {row["instruction"]: row["output"] for row in rows}
    return systems


def all_designs() -> dict[str, dict[str, bool]]:
    """The sixteen on/off settings of the four switches, by name: "LI * RP * relevance, branching" and so on."""
    designs = {}
    for values in itertools.product((True, False), repeat=len(SWITCHES)):
        on = [name for name, value in zip(SWITCHES, values) if value]
        parts = " * ".join(name for name in on if name != "branching") or "1"
        designs[parts + (", branching" if "branching" in on else "")] = dict(zip(SWITCHES.values(), values))
    return designs


def design_totals(reward, design: Mapping[str, bool], tables: Sequence[Mapping[str, list]]) -> np.ndarray:
    """[systems, rows] rewards under a design, from components that `score(..., every_feature=True)` of the full design gave."""
    variant = reward.variant(**design)
    return np.array([[variant.compose(dict(zip(table, row))) for row in zip(*table.values())] for table in tables])


def rank_correlation(totals: np.ndarray, scores: Sequence[float]) -> dict:
    """What is said of [systems, rows] rewards beside [systems] gold scores: correlations of the systems' means, a p, an interval over prompts."""
    means = totals.mean(axis=1)
    return {
        "systems": len(means),
        "spearman": spearman(means, scores),
        "kendall": kendall(means, scores),
        "exact_pvalue": permutation_pvalue(means, scores),
        "interval": bootstrap_interval(totals, np.array(scores)[:, None]),
    }
