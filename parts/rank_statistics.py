"""The statistics of two reward curves over checkpoints: rank correlations, their uncertainty, and where gold turns.

Scores come as arrays [checkpoints, rows]: every checkpoint answers the same prompts. A curve is the mean over rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy  # its parts load when they are used

from parts.rows import QTYPES

EXACT_UP_TO = 10  # checkpoints: 10! orders are counted in five seconds, 9! in half a second
RESAMPLES = 100_000


@dataclass(frozen=True)
class ScoredRun:
    """A run's checkpoints with their responses and scores, rows being the prompts, in one order throughout.

    Args:
        name: the run's name (`--model_prefix`).
        steps: [checkpoints] PPO steps, rising.
        instructions, qtypes, references: [rows]; the last two None where a row has none.
        responses: [checkpoints][rows] texts.
        tokens: [checkpoints, rows] length of each response up to its first stop string, in `parts.features.tokens_of`'s tokens.
        components: feature to [checkpoints, rows]; NaN where a row's branch does not use it.
        proxy: [checkpoints, rows].
        gold: gold's name to [checkpoints, rows], or [checkpoints, 1] where only means are known.
        kl: [checkpoints] mean KL from the start in nats per response; None where no log has it.
        kl_of: the rollouts that the KL is of, as `runs.read_kl` says.
        found: gold's name to what `correlations` found.
        design: the reward in symbols, "LI * RP" for example: runs of one design are seeds of it.
        own: whether the run is known to have been trained on this proxy.
    """

    name: str
    steps: list[int]
    instructions: list[str]
    qtypes: list[str | None]
    references: list[str | None]
    responses: list[list[str]]
    tokens: np.ndarray
    components: dict[str, np.ndarray]
    proxy: np.ndarray
    gold: dict[str, np.ndarray]
    kl: list[float | None]
    found: dict[str, dict] = field(default_factory=dict)
    design: str = ""
    own: bool = False
    kl_of: str = ""


def ranked(curve: np.ndarray) -> np.ndarray:
    """The ranks of a curve's values, ties at their mean rank. Values that agree in twelve digits are ties: means of equal sums may not."""
    return scipy.stats.rankdata([float(f"{value:.12g}") for value in np.asarray(curve).tolist()])


def spearman(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Spearman's rank correlation of two curves, ties at their mean rank; None where either is constant."""
    ranks = ranked(proxy), ranked(gold)
    if any(np.ptp(own) == 0 for own in ranks):
        return None
    return float(scipy.stats.spearmanr(*ranks).statistic)


def kendall(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Kendall's tau-b of two curves; None where either is constant."""
    value = float(scipy.stats.kendalltau(ranked(proxy), ranked(gold)).statistic)
    return value if math.isfinite(value) else None


def permutation_pvalue(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Two-sided p of Spearman's correlation under all orders of the checkpoints, or `RESAMPLES` of them above `EXACT_UP_TO`.

    It assumes what a permutation assumes, that every order is equally likely; checkpoints of one run are not.
    """
    if spearman(proxy, gold) is None:
        return None
    one, other = (ranked(curve) - np.mean(ranked(curve)) for curve in (proxy, gold))
    if len(one) <= EXACT_UP_TO:
        found = scipy.stats.permutation_test(
            [one],
            lambda orders, axis: np.abs((orders * other).sum(axis=axis)),
            permutation_type="pairings",
            n_resamples=np.inf,
            alternative="greater",  # of the absolute value, hence two-sided
            vectorized=True,
            batch=100_000,
        )
        return float(found.pvalue)
    orders = np.random.default_rng(0).permuted(np.tile(other, (RESAMPLES, 1)), axis=1)
    extreme = np.abs(orders @ one) >= abs(one @ other) - 1e-9  # equal sums in another order must tie
    return float((1 + extreme.sum()) / (1 + RESAMPLES))


def bootstrap_interval(proxy: np.ndarray, gold: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """A 95% percentile interval of Spearman's correlation over resampled prompts, the same ones for every checkpoint and both rewards.

    `gold` may be [checkpoints, 1], means that stay as they are. The interval says how much the correlation owes to this choice of prompts,
    not to this run. None where a resample's curve is constant.
    """
    rows = proxy.shape[1]
    gold = np.broadcast_to(gold, proxy.shape)
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    ranks = [scipy.stats.rankdata(counts @ scores.T, axis=1) for scores in (proxy, gold)]
    centered = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    norms = np.sqrt((centered[0] ** 2).sum(axis=1) * (centered[1] ** 2).sum(axis=1))
    if (norms == 0).any():
        return None
    low, high = np.quantile((centered[0] * centered[1]).sum(axis=1) / norms, [0.025, 0.975])
    return float(low), float(high)


def curve_band(scores: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A 95% percentile band of a curve over resampled prompts: [checkpoints] low and high."""
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
    """The step where gold peaks while the proxy still rises after it: over-optimisation. None where there is no such step.

    Args:
        steps: of the checkpoints.
        proxy: [checkpoints, rows].
        gold: [checkpoints, rows]: gold must then fall from its peak by more standard errors over the rows than `chance_fall`. Or
            [checkpoints, 1], means, of which nothing tells a fall from chance.
    """
    curve, means = proxy.mean(axis=1), gold.mean(axis=1)
    peak = int(np.argmax(means))
    beyond = [place for place in range(peak + 1, len(steps)) if curve[place] > curve[peak] and means[place] < means[peak]]
    if beyond and gold.shape[1] > 1:
        most = chance_fall(gold)
        beyond = [place for place in beyond if _fall(gold[peak], gold[place]) > most]
    return steps[peak] if beyond else None


def _fall(first: np.ndarray, last: np.ndarray) -> float:
    """Mean of first - last over the rows in its standard errors; infinite where every row falls alike."""
    found = paired_difference(last, first)
    if found["standard_error"] <= 1e-9 * abs(found["difference"]):
        return np.inf if found["difference"] > 0 else 0.0
    return found["difference"] / found["standard_error"]


def chance_fall(gold: np.ndarray, draws: int = 1000, seed: int = 0) -> float:
    """How many standard errors gold falls from its peak to a later checkpoint, the lowest, in one of twenty curves that do not move.

    The peak is chosen for being highest and any later checkpoint may be the lowest, so that a single difference's 1.96 would be passed often.
    Each prompt's scores are put in random orders over the checkpoints: 95% of the largest falls are below what is returned.

    Args:
        gold: [checkpoints, rows].
    """
    rng, largest = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.permuted(gold, axis=0)
        peak = int(drawn.mean(axis=1).argmax())
        falls = drawn[peak] - drawn[peak + 1 :]
        errors = falls.std(axis=1, ddof=1) / np.sqrt(falls.shape[1])
        largest.append(max((falls.mean(axis=1)[errors > 0] / errors[errors > 0]).tolist(), default=0.0))
    return float(np.quantile(largest, 0.95))


def paired_difference(first: np.ndarray, last: np.ndarray) -> dict[str, float | None]:
    """Mean of last - first over the rows, and its standard error (sample standard deviation / sqrt(rows)), None for a lone row."""
    differences = last - first
    return {
        "difference": float(differences.mean()),
        "standard_error": float(scipy.stats.sem(differences)) if len(differences) > 1 else None,
    }


def correlations(steps: list[int], proxy: np.ndarray, gold: np.ndarray, qtypes: Sequence[str | None]) -> dict:
    """All that is said of one run's two curves.

    Args:
        steps: of the checkpoints.
        proxy: [checkpoints, rows].
        gold: [checkpoints, rows], or [checkpoints, 1] where only means are known.
        qtypes: of the rows, where they have any.
    """
    curves = proxy.mean(axis=1), gold.mean(axis=1)
    rho = spearman(*curves)
    found = {
        "n": len(steps),
        "spearman": rho,
        "pvalue": float(scipy.stats.spearmanr(*map(ranked, curves)).pvalue) if rho is not None else None,
        "exact_pvalue": permutation_pvalue(*curves),
        "kendall": kendall(*curves),
        "turning_point": turning_point(steps, proxy, gold),
    }
    if gold.shape == proxy.shape and proxy.shape[1] > 1:
        found["interval"] = bootstrap_interval(proxy, gold)
        found["agreement"] = agreement(proxy, gold)
        found["by_qtype"] = {}
        for qtype in QTYPES:
            rows = [row for row, own in enumerate(qtypes) if own == qtype]
            if rows:
                part = spearman(proxy[:, rows].mean(axis=1), gold[:, rows].mean(axis=1))
                found["by_qtype"][qtype] = {"spearman": part, "rows": len(rows)}
    return found


def together(runs: Sequence[ScoredRun]) -> dict[str, dict]:
    """Several runs as one answer, gold by gold: the mean of their correlations, how far they scatter, and a p of that mean.

    Returns:
        By gold: "runs" (name to SpearmanR), "mean", "standard_error" over runs (None of one), "pvalue" of the mean where each run's checkpoints are
        put in random orders independently (two-sided, `RESAMPLES` draws), and "mean_curves", SpearmanR of the curves
        averaged over runs where all have the same steps. None where a correlation is undefined.
    """
    result = {}
    for gold in runs[0].gold:
        rhos = {run.name: run.found[gold]["spearman"] for run in runs}
        entry: dict = {"runs": rhos, "mean": None, "standard_error": None, "pvalue": None, "mean_curves": None}
        if None not in rhos.values():
            values = np.array(list(rhos.values()))
            entry["mean"] = float(values.mean())
            entry["standard_error"] = float(scipy.stats.sem(values)) if len(values) > 1 else None
            rng = np.random.default_rng(0)
            drawn = np.zeros(RESAMPLES)
            for run in runs:
                one, other = (ranked(scores.mean(axis=1)) for scores in (run.proxy, run.gold[gold]))
                one, other = ((ranks - ranks.mean()) / ranks.std() for ranks in (one, other))
                drawn += rng.permuted(np.tile(other, (RESAMPLES, 1)), axis=1) @ one / len(one)
            entry["pvalue"] = float((1 + (np.abs(drawn / len(runs)) >= abs(entry["mean"]) - 1e-9).sum()) / (1 + RESAMPLES))
        if all(run.steps == runs[0].steps for run in runs):
            curves = (
                np.mean([scores.mean(axis=1) for scores in both], axis=0) for both in zip(*((run.proxy, run.gold[gold]) for run in runs))
            )
            entry["mean_curves"] = spearman(*curves)
        result[gold] = entry
    return result


COLUMNS = ("step", "proxy", "tokens", "kl", "rows")  # of a run's table; golds and components have the others


def curve(run: ScoredRun) -> list[dict]:
    """One row a checkpoint: step, proxy, each gold, the mean of each component over the rows that have it, KL where known, rows."""
    rows = []
    for place, step in enumerate(run.steps):
        row = {"step": step, "proxy": float(run.proxy[place].mean())}
        row |= {name: float(scores[place].mean()) for name, scores in run.gold.items()}
        row |= {name: float(np.nanmean(scores[place])) for name, scores in run.components.items() if not np.isnan(scores[place]).all()}
        row["tokens"] = float(run.tokens[place].mean())
        if None not in run.kl:
            row["kl"] = run.kl[place]
        rows.append({**row, "rows": run.proxy.shape[1]})
    return rows


def gains(run: ScoredRun) -> dict[str, dict[str, float]]:
    """What the proxy and each gold known by row gain from the first checkpoint to the last, by `paired_difference`; none for a lone row."""
    return {name: paired_difference(scores[0], scores[-1]) for name, scores in _by_row(run).items()}


def _by_row(run: ScoredRun) -> dict[str, np.ndarray]:
    """The proxy and each gold known by row, [checkpoints, rows] each; none of a lone row, which has no standard error."""
    tables = {"proxy": run.proxy, **{name: scores for name, scores in run.gold.items() if scores.shape == run.proxy.shape}}
    return {name: scores for name, scores in tables.items() if scores.shape[1] > 1}


def compare(runs: Sequence[ScoredRun]) -> dict[str, list]:
    """Runs of several designs side by side, and by how much their golds moved apart.

    Returns:
        "runs": one entry a run. "proxy" and each of "golds" hold what is gained from the first checkpoint to the last ("difference") and
            its "standard_error" over prompts (None where means alone are known, or a lone prompt); a gold also "spearman", its
            "interval", and "peak", the step of its highest mean. "tokens", "repetition" and "kl" are pairs of means at the first and the
            last checkpoint (None where not known), as "steps" are; "rows" is the number of prompts.
        "pairs": one entry for each two runs that answered the same prompts: "runs", their names, and by gold known by prompt the
            `paired_difference` of their gains, the second run's less the first's.
        "unpaired": the names of each two runs that answered other prompts.
    """
    found: dict[str, list] = {"runs": [_ends(run) for run in runs], "pairs": [], "unpaired": []}
    for first, second in itertools.combinations(runs, 2):
        names = [first.name, second.name]
        if first.instructions != second.instructions:
            found["unpaired"].append(names)
            continue
        gained = [{name: scores[-1] - scores[0] for name, scores in _by_row(run).items() if name in run.gold} for run in (first, second)]
        golds = {name: paired_difference(gained[0][name], gained[1][name]) for name in gained[0] if name in gained[1]}
        found["pairs"].append({"runs": names, "golds": golds})
    return found


def _ends(run: ScoredRun) -> dict:
    """A run's entry in `compare`."""
    by_row = gains(run)
    repetition = run.components.get("repetition")

    def gain(name: str, scores: np.ndarray) -> dict[str, float | None]:
        return by_row.get(name) or {"difference": float(scores[-1].mean() - scores[0].mean()), "standard_error": None}

    return {
        "name": run.name,
        "design": run.design,
        "own": run.own,
        "steps": [run.steps[0], run.steps[-1]],
        "rows": len(run.instructions),
        "proxy": gain("proxy", run.proxy),
        "golds": {
            name: {
                **gain(name, scores),
                "spearman": run.found[name]["spearman"],
                "interval": run.found[name].get("interval"),
                "peak": run.steps[int(np.argmax(scores.mean(axis=1)))],
            }
            for name, scores in run.gold.items()
        },
        "tokens": [float(run.tokens[end].mean()) for end in (0, -1)],
        "repetition": None if repetition is None or np.isnan(repetition).any() else [float(repetition[end].mean()) for end in (0, -1)],
        "kl": [run.kl[0], run.kl[-1]],
    }


def standard_gains(scores: np.ndarray) -> np.ndarray | None:
    """What each row gained since the first checkpoint, in standard deviations of the first checkpoint's scores.

    Rewards of different scales can share an axis so. Returns [checkpoints, rows]; None where `start_spread` is.
    """
    spread = start_spread(scores)
    return None if spread is None else (scores - scores[0]) / spread


def start_spread(scores: np.ndarray) -> float | None:
    """The standard deviation of the first checkpoint's scores; None where they are all the same, or a lone one."""
    spread = scores[0].std(ddof=1) if scores.shape[1] > 1 else 0.0
    return float(spread) if spread > 1e-12 * max(1.0, np.abs(scores[0]).max()) else None


def table_text(rows: Sequence[Mapping], whole: Sequence[str] = ()) -> str:
    """Rows of numbers and names as aligned lines; the columns of `whole` without decimals."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(name: str, value: object) -> str:
        if value is None:
            return "-"
        return str(value) if isinstance(value, str) or name in whole else f"{value:.4f}"

    cells = [[cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[place]) for row in cells)) for place, name in enumerate(names)]
    left = [isinstance(rows[0].get(name), str) for name in names]
    return "\n".join(
        "  ".join(text.ljust(width) if is_left else text.rjust(width) for text, width, is_left in zip(line, widths, left)).rstrip()
        for line in ([*names], *cells)
    )
