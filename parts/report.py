"""What is said of a scored run: lines on the console, one figure for a paper, and one page that holds everything, the rollouts included.

The page (assets/report.html.jinja) asks the network for nothing. Its data are JSON inside it: one block of curves and statistics, and
one block of rollouts per run, which is read only when that run is looked at.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from parts.files import REPOSITORY, atomic_path, write_json
from parts.rank_statistics import EXACT_UP_TO, ScoredRun, curve, curve_band, gains, spearman, table_text

PROXY_STYLE = ("o-", "#0b6fb8")
GOLD_STYLES = (("s--", "#c2570c"), ("^-.", "#1f6f4f"))
COLUMN_WIDTH = 3.4  # inches: a column of a two-column paper


# ------------------------------------------------------------------------------------------------------------ the console


def print_run(run: ScoredRun) -> None:
    """The curve of a run as a table, what it gained, and its correlations."""
    print(f"\n{run.name}")
    print(table_text(curve(run), whole=("step", "rows")))
    steps = run.steps
    for name, gain in gains(run).items():
        print(f"{name}: step {steps[-1]} minus step {steps[0]}: {gain['difference']:+.4f}, standard error {gain['standard_error']:.4f} "
              f"(paired over {run.proxy.shape[1]} rows)")  # fmt: skip
    for name, found in run.found.items():
        if len(run.gold) > 1:
            print(f"-- gold {name}")
        print(describe(found, steps))
    if len(run.gold) > 1:
        names, curves = list(run.gold), [scores.mean(axis=1) for scores in run.gold.values()]
        print(f"the golds among themselves: SpearmanR {_shown(spearman(*curves[:2]))} between {names[0]} and {names[1]}")


def print_together(both: dict[str, dict], count: int) -> None:
    """What `rank_statistics.together` says of `count` runs, one line a gold."""
    print("\ntogether")
    for name, entry in both.items():
        if entry["mean"] is None:
            print(f"gold {name}: SpearmanR of a run is undefined, and so is their mean")
            continue
        print(f"gold {name}: mean SpearmanR {entry['mean']:.3f} over {count} runs, standard error {entry['standard_error']:.3f}, "
              f"p over drawn orders {entry['pvalue']:.4g}; SpearmanR of the mean curves {_shown(entry['mean_curves'])}")  # fmt: skip


def describe(found: dict, steps: list[int]) -> str:
    """The correlations in words, the published line first."""
    if found["spearman"] is None:
        return "SpearmanR is undefined: every checkpoint has the same mean proxy or the same mean gold score"
    orders = "all" if found["n"] <= EXACT_UP_TO else "drawn"
    lines = [
        f"SignificanceResult(statistic={found['spearman']}, pvalue={found['pvalue']})",
        f"n = {found['n']} checkpoints of one run; p over {orders} orders of them {found['exact_pvalue']:.4g}, "
        f"Kendall's tau {found['kendall']:.3f}; they are not independent, so that either p claims too much",
    ]
    if found.get("interval"):
        lines.append("95% interval of SpearmanR over prompts drawn anew: {:.3f} to {:.3f}".format(*found["interval"]))
    if found.get("by_qtype"):
        parts = (f"{qtype} {_shown(part['spearman'])} ({part['rows']} rows)" for qtype, part in found["by_qtype"].items())
        lines.append(f"SpearmanR by query type: {', '.join(parts)}")
    if found.get("agreement") and found["agreement"]["share"] is not None:
        share, rows = found["agreement"]["share"], found["agreement"]["rows"]
        lines.append(f"prompt by prompt, gold moved with the proxy from step {steps[0]} to {steps[-1]} in {share:.1%} of {rows}")
    if found["turning_point"] is not None:
        lines.append(f"gold peaks at step {found['turning_point']} while the proxy rises beyond it, a sign of over-optimisation")
    return "\n".join(lines)


def _shown(rho: float | None) -> str:
    """A correlation with three digits, or "undefined"."""
    return "undefined" if rho is None else f"{rho:.3f}"


# -------------------------------------------------------------------------------------------------------------- the files


def write_run(folder: Path, run: ScoredRun, record: dict) -> None:
    """Write monotonicity.json, monotonicity.png and report.html of one run, and print where the page is."""
    per_row = {
        "proxy": {step: scores.tolist() for step, scores in zip(run.steps, run.proxy)},
        "gold": {
            name: {step: scores.tolist() for step, scores in zip(run.steps, table)}
            for name, table in run.gold.items()
            if table.shape == run.proxy.shape
        },
    }
    content = {"name": run.name, "spearman": run.found, "gains": gains(run), "curve": curve(run), "per_row": per_row, "provenance": record}
    write_json(folder / "monotonicity.json", content)
    draw(folder / "monotonicity.png", run, record)
    write_report(folder / "report.html", [run], None, record)
    print(folder / "report.html")


def write_together(folder: Path, runs: Sequence[ScoredRun], both: dict[str, dict], record: dict) -> None:
    """Write monotonicity.json and report.html of several runs, and print where the page is."""
    write_json(folder / "monotonicity.json", {"together": both, "provenance": record})
    write_report(folder / "report.html", runs, both, record)
    print(folder / "report.html")


# ------------------------------------------------------------------------------------------------------------- the figure


def draw(target: Path, run: ScoredRun, record: dict) -> None:
    """Draw the mean proxy and mean gold scores of a run as a PNG of one paper column's width.

    A row of panels for the proxy and for each gold, which have scales of their own and share the axis below: the PPO step and, where
    `run.kl` is known for all checkpoints, the KL. Bands are `curve_band`'s, where scores are known by row.

    Args:
        target: the file.
        run: with `found` for SpearmanR and the step where gold turns.
        record: goes into the PNG's metadata, as JSON under "Description".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = _labels(run)
    rows = [("", "proxy reward", run.proxy, PROXY_STYLE)]
    for (name, scores), style in zip(run.gold.items(), itertools.cycle(GOLD_STYLES)):
        rows.append((name, "gold reward" if len(labels) == 1 else f"gold reward, {labels[name]}", scores, style))
    axes = {"PPO step": run.steps}
    if None not in run.kl:
        axes["KL from the start (nats)"] = run.kl
    style = {"font.size": 7, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}
    with pyplot.rc_context(style):
        size = (COLUMN_WIDTH, 0.5 + 1.05 * len(rows))
        figure, grid = pyplot.subplots(len(rows), len(axes), figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained")
        for panels, (name, label, scores, (line, color)) in zip(grid, rows):
            mean, band = scores.mean(axis=1), curve_band(scores) if scores.shape[1] > 1 else None
            turn = run.found.get(name, {}).get("turning_point")
            panels[0].set_title(f"mean {label}" + (", its peak dotted" if turn is not None else ""), color=color, loc="left", fontsize=7)
            for panel, positions in zip(panels, axes.values()):
                order = np.argsort(positions, kind="stable")
                x = np.asarray(positions)[order]
                if band:
                    panel.fill_between(x, band[0][order], band[1][order], color=color, alpha=0.16, linewidth=0)
                panel.plot(x, mean[order], line, color=color, linewidth=1.2, markersize=3.2)
                if turn is not None:
                    panel.axvline(positions[run.steps.index(turn)], color="0.35", linewidth=0.7, linestyle=":")
                panel.grid(alpha=0.25, linewidth=0.5)
                panel.spines[["top", "right"]].set_visible(False)
        for panel, label in zip(grid[-1], axes):
            panel.set_xlabel(label)
        figure.suptitle(_title(run, labels), fontsize=8)
        with atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=300, metadata={"Description": json.dumps(record)})
        pyplot.close(figure)


def _title(run: ScoredRun, labels: dict[str, str]) -> str:
    def rho(name: str) -> str:
        value = run.found.get(name, {}).get("spearman")
        return "undefined" if value is None else f"{value:.2f}".replace("-", "−")

    checkpoints = f"over {len(run.steps)} checkpoints"
    if len(labels) == 1:
        return f"{run.name}: SpearmanR {rho(*labels)} {checkpoints}"
    return f"{run.name}, SpearmanR {checkpoints}\n" + ", ".join(f"{label} {rho(name)}" for name, label in labels.items())


def _labels(run: ScoredRun) -> dict[str, str]:
    """What golds are called where room is short: the last part of their names, if that tells them apart."""
    short = {name: name.rstrip("/").rsplit("/", 1)[-1] for name in run.gold}
    return short if len(set(short.values())) == len(short) else {name: name for name in run.gold}


# --------------------------------------------------------------------------------------------------------------- the page


def write_report(target: Path, runs: Sequence[ScoredRun], together: dict | None, record: dict) -> None:
    """Write one self-contained HTML page on one run or several.

    Args:
        target: the file.
        runs: at least one; the page switches between them by name.
        together: what `rank_statistics.together` says of several runs; None for one.
        record: shown as provenance, whatever it holds.
    """
    environment = Environment(
        loader=FileSystemLoader(REPOSITORY / "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shell"] = shlex.join
    golds = {gold: {name: value for name, value in entry.items() if name != "runs"} for gold, entry in (together or {}).items()}
    summary = {"runs": [_summary(run) for run in runs], "together": _plain(golds)}
    page = environment.get_template("report.html.jinja").stream(
        names=[run.name for run in runs],
        summary=embedded_json(summary),
        rollouts=(embedded_json(_rollouts(run)) for run in runs),
        record=record,
    )
    with atomic_path(target) as temporary:
        page.dump(str(temporary), encoding="utf-8")


def embedded_json(content: object) -> Markup:
    """JSON that may stand in an HTML script element: no text in it can end the element, and lone surrogates can be written as UTF-8."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _summary(run: ScoredRun) -> dict:
    labels = _labels(run)
    return {
        "name": run.name,
        "steps": _plain(run.steps),
        "rows": len(run.instructions),
        "kl": _plain(run.kl),
        "exact": len(run.steps) <= EXACT_UP_TO,
        "proxy": _curve(run.proxy),
        "golds": [
            {"name": name, "label": labels[name], "found": _plain(run.found.get(name, {})), **_curve(scores)}
            for name, scores in run.gold.items()
        ],
        "components": {name: _curve(scores) for name, scores in run.components.items()},
        "length": _curve(run.tokens),
    }


def _rollouts(run: ScoredRun) -> dict:
    return {
        "instructions": run.instructions,
        "qtypes": run.qtypes,
        "references": run.references,
        "responses": run.responses,
        "proxy": _plain(run.proxy),
        "golds": [_plain(scores) if scores.shape[1] == len(run.instructions) else None for scores in run.gold.values()],
        "components": {name: _plain(scores) for name, scores in run.components.items()},
        "length": run.tokens.tolist(),
    }


def _curve(scores: np.ndarray) -> dict[str, list]:
    """The means of [checkpoints, rows] over the rows that have a value, and their band where these are the same rows throughout."""
    known = np.isfinite(scores)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # a component that no row uses has no mean
        curve = {"mean": _plain(np.nanmean(np.where(known, scores, np.nan), axis=1))}
    if (known == known[0]).all() and known[0].sum() > 1:
        low, high = curve_band(scores[:, known[0]])
        curve |= {"low": _plain(low), "high": _plain(high)}
    return curve


def _plain(value: object) -> object:
    """What JSON can hold: arrays and tuples as lists, numbers at six significant digits (the page rounds further), None for NaN."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
