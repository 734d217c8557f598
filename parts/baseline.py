"""A checkpoint's rollouts beside another model's outputs on the same instructions, row by row under one reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import scipy

from parts.rank_statistics import table_text


def compare_totals(ours: Mapping[str, Sequence], baseline: Mapping[str, Sequence]) -> dict:
    """Both sides' mean components, and the share of rows that each wins, with a 95% Wilson interval.

    Args:
        ours, baseline: columns of scores with "total" among them, as a reward's `score` returns them, equally long.

    Returns:
        "ours" and "baseline": the mean of each column that holds numbers, over its numbers. "won" and "lost": the share of the
        "rows" whose total is above and below the baseline's. "won_interval": low and high.
    """
    rows = len(ours["total"])
    won = sum(own > other for own, other in zip(ours["total"], baseline["total"]))
    lost = sum(own < other for own, other in zip(ours["total"], baseline["total"]))
    interval = scipy.stats.binomtest(won, rows).proportion_ci(method="wilson")
    return {
        "ours": _means(ours),
        "baseline": _means(baseline),
        "rows": rows,
        "won": won / rows,
        "won_interval": [float(interval.low), float(interval.high)],
        "lost": lost / rows,
    }


def _means(table: Mapping[str, Sequence]) -> dict[str, float]:
    columns = {
        name: [value for value in column if isinstance(value, int | float) and not isinstance(value, bool)]
        for name, column in table.items()
    }
    return {name: sum(numbers) / len(numbers) for name, numbers in columns.items() if numbers}


def describe_comparison(found: Mapping) -> str:
    """What `compare_totals` found: a table of the components that both sides have, and a line on the rows."""
    names = [name for name in found["ours"] if name in found["baseline"]]
    low, high = found["won_interval"]
    table = table_text([{"": side, **{name: found[side][name] for name in names}} for side in ("ours", "baseline")])
    return (
        f"{table}\nproxy above the baseline's in {found['won']:.1%} of {found['rows']} rows (95% interval {low:.1%} to {high:.1%}), "
        f"below in {found['lost']:.1%}"
    )
