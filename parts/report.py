"""What is said of scored runs: lines on the console, files, and one page that holds everything, the rollouts included.

The page (assets/report.html.jinja) asks the network for nothing. Its data are JSON inside it: one block of curves and statistics, and
one block of rollouts per run, which is read only when that run is looked at.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from parts.comparison import comparison_table, last_parts, sentences
from parts.figures import BestOfN, Line, draw, draw_comparison, lines_of, without_kl
from parts.files import REPOSITORY, atomic_path, write_json
from parts.rank_statistics import EXACT_UP_TO, ScoredRun, curve, curve_band, gains, spearman, table_text
from parts.scaling_fits import describe_fit, fit_golds, fitted_line, root_kl

# ------------------------------------------------------------------------------------------------------------ the console


def print_run(run: ScoredRun) -> None:
    """The curve of a run as a table, what it gained, and its correlations."""
    print(f"\n{run.name}")
    print(table_text(curve(run), whole=("step", "rows")))
    steps, fits = run.steps, fit_golds(run.steps, run.kl, run.gold)
    for name, gain in gains(run).items():
        print(f"{name}: step {steps[-1]} minus step {steps[0]}: {gain['difference']:+.4f}, standard error {gain['standard_error']:.4f} "
              f"(paired over {run.proxy.shape[1]} rows)")  # fmt: skip
    for name, found in run.found.items():
        if len(run.gold) > 1:
            print(f"-- gold {name}")
        print(describe(found, steps))
        print(describe_fit(fits[name]))
    if len(run.gold) > 1:
        curves = {name: scores.mean(axis=1) for name, scores in run.gold.items()}
        pairs = [f"{_shown(spearman(curves[one], curves[other]))} between {one} and {other}" for one, other in combinations(curves, 2)]
        print(f"the golds among themselves: SpearmanR {', '.join(pairs)}")


def print_together(both: dict[str, dict], count: int, design: str = "") -> None:
    """What `rank_statistics.together` says of `count` runs, of a `design` among others, one line a gold."""
    print("\ntogether" + (f": {design}" if design else ""))
    for name, entry in both.items():
        if entry["mean"] is None:
            print(f"gold {name}: SpearmanR of a run is undefined, and so is their mean")
            continue
        print(f"gold {name}: mean SpearmanR {entry['mean']:.3f} over {count} runs, standard error {entry['standard_error']:.3f}, "
              f"p over drawn orders {entry['pvalue']:.4g}; SpearmanR of the mean curves {_shown(entry['mean_curves'])}")  # fmt: skip


def print_comparison(compared: Mapping[str, list]) -> None:
    """What `rank_statistics.compare` found: a table of one row a run, then `sentences`."""
    print("\nwhat each reward did to gold, from the first checkpoint to the last (SE: standard error over prompts)")
    print(table_text(comparison_table(compared)))
    print("\n".join(sentences(compared)))


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
    if "interval" in found and not found["interval"]:
        lines.append(
            "no interval of SpearmanR over resampled prompts: of some the mean proxy or the mean gold score is the same everywhere"
        )
    if found.get("interval"):
        lines.append("95% interval of SpearmanR over resampled prompts: {:.3f} to {:.3f}".format(*found["interval"]))
    if found.get("by_qtype"):
        parts = (f"{qtype} {_shown(part['spearman'])} ({part['rows']} rows)" for qtype, part in found["by_qtype"].items())
        lines.append(f"SpearmanR by query type: {', '.join(parts)}")
    if found.get("agreement") and found["agreement"]["share"] is not None:
        share, rows = found["agreement"]["share"], found["agreement"]["rows"]
        lines.append(f"prompt by prompt, gold moved with the proxy from step {steps[0]} to {steps[-1]} in {share:.1%} of {rows}")
    if found["turning_point"] is not None:
        sign = "a sign of over-optimisation" if "interval" in found else "which may be chance"
        lines.append(f"gold peaks at step {found['turning_point']} while the proxy rises beyond it, {sign}")
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
    content = {
        "name": run.name,
        "spearman": run.found,
        "gains": gains(run),
        "scaling": fit_golds(run.steps, run.kl, run.gold),
        "curve": curve(run),
        "kl_of": run.kl_of,
        "per_row": per_row,
        "provenance": record,
    }
    write_json(folder / "monotonicity.json", content)
    draw(folder / "monotonicity.png", run, record)
    write_report(folder / "report.html", [run], None, record)
    print(folder / "report.html")


def write_together(folder: Path, runs: Sequence[ScoredRun], both: dict[str, dict], record: dict) -> None:
    """Write monotonicity.json, monotonicity.png and report.html of several runs of one design, and print where the page is."""
    write_json(folder / "monotonicity.json", {"together": both, "scaling": _fits(lines_of(runs)), "provenance": record})
    draw_comparison(folder / "monotonicity.png", runs, record)
    write_report(folder / "report.html", runs, both, record)
    print(folder / "report.html")


def write_comparison(
    folder: Path,
    runs: Sequence[ScoredRun],
    compared: dict[str, list],
    agreed: dict[str, dict[str, dict]],
    record: dict,
    best_of_n: Sequence[BestOfN] = (),
) -> None:
    """Write monotonicity.json, monotonicity.png and report.html of runs of different designs, and print where the page is.

    Args:
        folder: receives the files.
        runs: at least two.
        compared: what `rank_statistics.compare` found.
        agreed: what `rank_statistics.together` says of each design that several runs have.
        record: the provenance.
        best_of_n: curves of the same designs, to stand beside the runs'.
    """
    content = {
        "comparison": {**compared, "sentences": sentences(compared)},
        "together": agreed,
        "scaling": _fits(lines_of(runs, best_of_n)),
        "provenance": record,
    }
    write_json(folder / "monotonicity.json", content)
    draw_comparison(folder / "monotonicity.png", runs, record, best_of_n)
    write_report(folder / "report.html", runs, None, record, compared, best_of_n)
    print(folder / "report.html")


def _fits(lines: Sequence[Line]) -> dict[str, dict[str, dict]]:
    """By the legend's label, then by gold, the fits of the lines that have one."""
    return {line.label: line.fits for line in lines if line.label and line.fits}


# --------------------------------------------------------------------------------------------------------------- the page


def write_report(
    target: Path,
    runs: Sequence[ScoredRun],
    together: dict | None,
    record: dict,
    compared: dict | None = None,
    best_of_n: Sequence[BestOfN] = (),
) -> None:
    """Write one self-contained HTML page on one run or several.

    Args:
        target: the file.
        runs: at least one; the page switches between them by name.
        together: what `rank_statistics.together` says of several runs; None for one.
        record: shown as provenance, whatever it holds.
        compared: what `rank_statistics.compare` found of runs of different designs, which then comes first; None for others.
        best_of_n: curves of the same designs, beside what is compared.
    """
    environment = Environment(
        loader=FileSystemLoader(REPOSITORY / "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shell"] = shlex.join
    golds = {gold: {name: value for name, value in entry.items() if name != "runs"} for gold, entry in (together or {}).items()}
    summary = {"runs": [_summary(run) for run in runs], "together": _plain(golds)}
    if compared:
        table = comparison_table(compared)
        summary["comparison"] = {
            "heads": list(table[0]),
            "rows": [list(row.values()) for row in table],
            "sentences": sentences(compared),
            "designs": [run.design for run in runs],
            "lines": [_line(line) for line in lines_of(runs, best_of_n)],
        }
    page = environment.get_template("report.html.jinja").stream(
        names=[run.name for run in runs],
        is_comparison=compared is not None,
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
    labels, fits = last_parts(run.gold), fit_golds(run.steps, run.kl, run.gold)
    return {
        "name": run.name,
        "steps": _plain(run.steps),
        "rows": len(run.instructions),
        "kl": _plain(run.kl),
        "rootKl": _plain(root_kl(run.kl)),
        "withoutKl": without_kl(run),
        "exact": len(run.steps) <= EXACT_UP_TO,
        "proxy": _curve(run.proxy),
        "golds": [
            {
                "name": name,
                "label": labels[name],
                "found": _plain(run.found.get(name, {})),
                "says": describe_fit(fits[name]),
                "fit": _plain(fitted_line(fits[name], run.kl, scores[0].mean())),
                **_curve(scores),
            }
            for name, scores in run.gold.items()
        ],
        "components": {name: _curve(scores) for name, scores in run.components.items()},
        "length": _curve(run.tokens),
    }


def _line(line: Line) -> dict:
    """A line of the comparison's charts: gold by step as it is, and by KL as what it gained."""

    def shown(scores: np.ndarray) -> dict[str, list]:
        curve = _curve(scores)
        return curve if line.has_band else {"mean": curve["mean"]}

    return {
        **{name: getattr(line, name) for name in ("kind", "name", "label", "color", "turn")},
        "steps": line.steps,
        "kl": _plain(line.kl),
        "rootKl": _plain(root_kl(line.kl)),
        "proxy": None if line.proxy is None else shown(line.proxy),
        "golds": [
            {**shown(scores), "gains": {**shown(scores - scores[0]), "fit": _plain(fitted_line(line.fits.get(name, {}), line.kl))}}
            for name, scores in line.gold.items()
        ],
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
