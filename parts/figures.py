"""The figures of scored runs, for a paper: proxy and gold by PPO step and by the square root of KL, with `scaling_fits` in the latter.

The report's page draws the same `Line`s.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parts.comparison import last_parts
from parts.files import atomic_path
from parts.rank_statistics import ScoredRun, curve_band, paired_difference, standard_gains, start_spread
from parts.scaling_fits import FORMULAS, fit_gains, fit_golds, fitted_line, root_kl

PROXY_STYLE = ("o-", "#0b6fb8")
GOLD_STYLES = (("s--", "#c2570c"), ("^-.", "#1f6f4f"))
DESIGN_COLORS = ("#6a3fb5", "#0a7f83", "#b0305c", "#7a6a00", "#3c5a80", "#8a4b1a")
LINE_STYLES = ("o-", "s--", "^-.")
FIT_STYLE = {"linewidth": 0.9, "linestyle": "-."}
COLUMN_WIDTH = 3.4  # inches: a column of a two-column paper
FIGURE_STYLE = {"font.size": 7, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}
ROOT_KL = "√KL from the start (KL in nats)"


# ------------------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class BestOfN:
    """What best-of-n makes of one policy's samples by one design, to be drawn beside PPO on that design.

    Args:
        design: in symbols, as the runs' are.
        kl: [sizes] log n - (n - 1) / n, n = 1 first.
        proxy: [sizes, rows].
        gold: gold's name to [sizes, rows].
        sizes: the values of n.
    """

    design: str
    kl: list[float]
    proxy: np.ndarray
    gold: dict[str, np.ndarray]
    sizes: list[int]

    @property
    def ends(self) -> dict:
        """What each gold gains from n = 1 to the largest n, as `rank_statistics.paired_difference` says."""
        golds = {name: paired_difference(scores[0], scores[-1]) for name, scores in self.gold.items()}
        return {"design": self.design, "n": self.sizes[-1], "golds": golds}


@dataclass(frozen=True)
class Line:
    """One line in the charts of several runs.

    Args:
        kind: "run"; "seed", a run among several of its design, and "mean", theirs; or "best-of-n".
        name: what the line is of.
        label: what the legend says; None for a seed whose mean is drawn.
        steps: [points] PPO steps; None for best-of-n.
        kl: [points] in nats per response; None where it is not known.
        proxy: [points, rows] as `standard_gains`; None where a run has none.
        gold: gold's name to [points, rows], or [points, 1] where only means are known.
        fits: gold's name to what `scaling_fits.fit_gains` found; empty for a seed.
        color, turn: the design's place among the colors, and how often these have started again.
    """

    kind: str
    name: str
    label: str | None
    steps: list[int] | None
    kl: list[float | None]
    proxy: np.ndarray | None
    gold: dict[str, np.ndarray]
    fits: dict[str, dict]
    color: int
    turn: int

    @property
    def has_band(self) -> bool:
        """Whether prompts drawn again are shown: the spread of seeds is in their own lines."""
        return self.kind in ("run", "best-of-n")


def lines_of(runs: Sequence[ScoredRun], best_of_n: Sequence[BestOfN] = ()) -> list[Line]:
    """The lines of runs, design by design: a lone run, or seeds and their mean; then best-of-n.

    Args:
        runs: at least one, with the same golds.
        best_of_n: of the same golds, and of designs that some run has; others are left out. Their proxies are in the first such run's
            standard deviations.
    """
    lines = []
    for place, design in enumerate(dict.fromkeys(run.design for run in runs)):
        turn, color = divmod(place, len(DESIGN_COLORS))
        own = [run for run in runs if run.design == design]
        styled = {"color": color, "turn": turn % len(LINE_STYLES)}
        mean = _mean_of(own, styled) if len(own) > 1 else None
        for run in own:
            kind, label = ("run" if len(own) == 1 else "seed"), (f"{run.name}: {design}" if mean is None else None)
            fits = fit_golds(run.steps, run.kl, run.gold) if len(own) == 1 else {}
            gains = standard_gains(run.proxy)
            lines.append(Line(kind, run.name, label, run.steps, run.kl, gains, run.gold, fits, **styled))
        lines += [mean] if mean else []
        for choice in best_of_n:
            if choice.design == design and set(choice.gold) >= set(own[0].gold):
                spread = start_spread(own[0].proxy)
                gains = None if spread is None else (choice.proxy - choice.proxy[0]) / spread
                gold = {name: choice.gold[name] for name in own[0].gold}
                fits = {name: fit_gains("best-of-n", choice.kl, scores - scores[0]) for name, scores in gold.items()}
                lines.append(Line("best-of-n", "best of n", f"best of n: {design}", None, choice.kl, gains, gold, fits, **styled))
    return lines


def _mean_of(runs: Sequence[ScoredRun], styled: Mapping[str, int]) -> Line | None:
    """The mean of a design's seeds over the steps that all have, row by row where their prompts are the same; None for fewer than two."""
    steps = [step for step in runs[0].steps if all(step in run.steps for run in runs)]
    if len(steps) < 2:
        return None
    places = [[run.steps.index(step) for step in steps] for run in runs]
    by_row = all(run.instructions == runs[0].instructions for run in runs)

    def mean(tables: Sequence[np.ndarray | None]) -> np.ndarray | None:
        if any(table is None for table in tables):
            return None
        shared = [table[place] for table, place in zip(tables, places)]
        return np.mean(shared if by_row else [table.mean(axis=1, keepdims=True) for table in shared], axis=0)

    kl = [None if None in each else float(np.mean(each)) for each in zip(*([run.kl[at] for at in own] for run, own in zip(runs, places)))]
    gold = {name: mean([run.gold[name] for run in runs]) for name in runs[0].gold}
    name = f"mean of {len(runs)} seeds"
    gains = mean([standard_gains(run.proxy) for run in runs])
    return Line("mean", name, f"{name}: {runs[0].design}", steps, kl, gains, gold, fit_golds(steps, kl, gold), **styled)


def without_kl(run: ScoredRun | Line) -> list[int]:
    """The steps that cannot be drawn against the square root of KL: theirs is unknown or below 0."""
    return [step for step, root in zip(run.steps or (), root_kl(run.kl)) if np.isnan(root)]


# ---------------------------------------------------------------------------------------------------------------- drawing


def draw(target: Path, run: ScoredRun, record: dict) -> None:
    """Draw the mean proxy and mean gold scores of a run as a PNG of one paper column's width.

    A row of panels for the proxy and for each gold, which have scales of their own and share the axis below: the PPO step and, where
    the run's log has it, the square root of KL. Bands are `curve_band`'s, where scores are known by row. `scaling_fits` are drawn where
    they are better than a straight line.

    Args:
        target: the file.
        run: with `found` for SpearmanR and the step where gold turns.
        record: goes into the PNG's metadata, as JSON under "Description".
    """
    labels = last_parts(run.gold)
    rows = [("", "proxy reward", run.proxy, PROXY_STYLE)]
    for (name, scores), style in zip(run.gold.items(), itertools.cycle(GOLD_STYLES)):
        rows.append((name, "gold reward" if len(labels) == 1 else f"gold reward, {labels[name]}", scores, style))
    axes: dict[str, Sequence[float]] = {"PPO step": run.steps}
    without = without_kl(run)
    if len(without) < len(run.steps) - 1:
        axes[ROOT_KL + (f"\nwithout step {', '.join(map(str, without))}: KL unknown or below 0" if without else "")] = root_kl(run.kl)
    fits = fit_golds(run.steps, run.kl, run.gold)
    with _figure(target, record, (COLUMN_WIDTH, 0.5 + 1.05 * len(rows)), len(rows), len(axes), sharey="row") as (figure, grid):
        for panels, (name, label, scores, (line, color)) in zip(grid, rows):
            mean, band = scores.mean(axis=1), curve_band(scores) if scores.shape[1] > 1 else None
            turn = run.found.get(name, {}).get("turning_point")
            panels[0].set_title(f"mean {label}" + (", its peak dotted" if turn is not None else ""), color=color, loc="left", fontsize=7)
            for panel, positions in zip(panels, axes.values()):
                draw_line(panel, positions, mean, band, line, color)
                if turn is not None and np.isfinite(positions[run.steps.index(turn)]):
                    panel.axvline(positions[run.steps.index(turn)], color="0.35", linewidth=0.7, linestyle=":")
            if len(panels) > 1 and name in fits:
                draw_fit(panels[1], fitted_line(fits[name], run.kl, mean[0]), "0.35", f"fit {_formula('RL')}")
                if fits[name].get("better"):
                    panels[1].legend(frameon=False)
        for panel, label in zip(grid[-1], axes):
            panel.set_xlabel(label)
        figure.suptitle(_title(run, labels), fontsize=8)


def draw_comparison(target: Path, runs: Sequence[ScoredRun], record: dict, best_of_n: Sequence[BestOfN] = ()) -> None:
    """Draw the proxy and the golds of several runs as a PNG of a paper's full width: `lines_of`, one legend.

    Columns are the PPO step and, where a run's log has it, the square root of KL. The proxy is shown as `standard_gains`, since designs
    have scales of their own. Gold is its mean by step, and by KL what it gained since the first checkpoint, beside `scaling_fits` where
    these are better than a straight line. A design has a color; seeds are thin lines about their mean. Bands are `curve_band`'s.

    Args:
        target: the file.
        runs: at least two, with the same golds.
        record: goes into the PNG's metadata, as JSON under "Description".
        best_of_n: drawn against the square root of KL, beside the runs of the same design.
    """
    from matplotlib.lines import Line2D

    lines, labels = lines_of(runs, best_of_n), last_parts(runs[0].gold)
    known = [line for line in lines if np.isfinite(root_kl(line.kl)).sum() > 1]
    forms = dict.fromkeys(fit["form"] for line in known for fit in line.fits.values() if fit.get("better"))
    columns = 2 if known else 1
    size = (2 * COLUMN_WIDTH, 0.6 + 0.14 * (sum(line.label is not None for line in lines) + len(forms)) + 1.5 * (1 + len(labels)))
    with _figure(target, record, size, 1 + len(labels), columns, sharey=False) as (figure, grid):
        of_gold = ["" if len(labels) == 1 else f", {label}" for label in labels.values()]
        for panels, name, which in zip(grid, [None, *labels], ["", *of_gold]):
            titles = ("mean gold reward", "gold gain since the first checkpoint") if name else ("proxy gain (standard deviations)",) * 2
            for panel, title, by_kl in zip(panels, titles, (False, True)):
                panel.set_title(title + which, loc="left", fontsize=7)
                for line in lines:
                    _draw_one(panel, line, name, by_kl)
        grid[-1, 0].set_xlabel("PPO step")
        if known:
            without = [f"{line.name}{_these(without_kl(line), line.steps)}" for line in lines if line.kind != "mean" and without_kl(line)]
            grid[-1, 1].set_xlabel(ROOT_KL + (f"\nKL unknown or below 0: {', '.join(without)}" if without else ""))
        entries = {label: handle for panel in grid[1] for handle, label in zip(*panel.get_legend_handles_labels())}
        entries |= {f"fit {_formula(form)}, where better than a straight line": Line2D([], [], **FIT_STYLE, color="0.35") for form in forms}
        figure.legend(entries.values(), entries, loc="outside lower left", frameon=False)


def _these(some: Sequence[int], steps: Sequence[int]) -> str:
    """Which of a run's steps, if not all."""
    return "" if len(some) == len(steps) else f" at step {', '.join(map(str, some))}"


def _draw_one(panel, line: Line, gold: str | None, by_kl: bool) -> None:
    """A line's proxy, or one of its golds, in one panel of a comparison."""
    scores, positions = line.gold[gold] if gold else line.proxy, root_kl(line.kl) if by_kl else line.steps
    if scores is None or positions is None:
        return
    if gold and by_kl:
        scores = scores - scores[0]
    band = curve_band(scores) if line.has_band and scores.shape[1] > 1 else None
    color, style = DESIGN_COLORS[line.color], LINE_STYLES[line.turn]
    more: dict[str, Any] = {"label": line.label or ""}
    if line.kind == "seed" and not line.label:
        style, more = style.lstrip("os^"), {"linewidth": 0.5, "alpha": 0.7}
    elif line.kind == "best-of-n":
        style, more["markerfacecolor"] = style[0] + ":", "white"
    draw_line(panel, positions, scores.mean(axis=1), band, style, color, **more)
    if gold and by_kl and gold in line.fits:
        draw_fit(panel, fitted_line(line.fits[gold], line.kl), color)


def _formula(form: str) -> str:
    return FORMULAS[form].replace("alpha", "α").replace("beta", "β").replace("-", "−")


@contextmanager
def _figure(target: Path, record: Mapping, size: tuple[float, float], rows: int, columns: int, sharey: bool | str) -> Iterator[tuple]:
    """A figure and its panels [rows, columns], written and closed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(FIGURE_STYLE):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, sharex="col", sharey=sharey, squeeze=False, layout="constrained")
        for panel in grid.flat:
            quieten(panel)
        yield figure, grid
        with atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=300, metadata={"Description": json.dumps(record)})
        pyplot.close(figure)


def draw_line(
    panel, positions: Sequence[float], mean: np.ndarray, band: tuple | None, line: str, color: str, label: str = "", **more: Any
) -> None:
    """A curve with its band, in the order given, which is that of steps, without positions that are NaN; `label` is its name in a legend."""
    x = np.asarray(positions, dtype=float)
    known = np.isfinite(x)
    if band:
        panel.fill_between(x[known], band[0][known], band[1][known], color=color, alpha=0.16, linewidth=0)
    panel.plot(x[known], mean[known], line, color=color, label=label, **{"linewidth": 1.2, "markersize": 3.2, **more})


def draw_fit(panel, line: np.ndarray | None, color: str, label: str = "") -> None:
    """What `scaling_fits.fitted_line` gives, as a thin broken line."""
    if line is not None:
        panel.plot(*line, **FIT_STYLE, color=color, label=label)


def quieten(panel) -> None:
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _title(run: ScoredRun, labels: dict[str, str]) -> str:
    def rho(name: str) -> str:
        value = run.found.get(name, {}).get("spearman")
        return "undefined" if value is None else f"{value:.2f}".replace("-", "−")

    checkpoints = f"over {len(run.steps)} checkpoints"
    if len(labels) == 1:
        return f"{run.name}: SpearmanR {rho(*labels)} {checkpoints}"
    return f"{run.name}, SpearmanR {checkpoints}\n" + ", ".join(f"{label} {rho(name)}" for name, label in labels.items())
