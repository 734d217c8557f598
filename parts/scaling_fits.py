"""Gold against the square root of KL: the forms of Gao et al. 2022, fitted where they say more than a straight line.

Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization": with d the square root of the KL from the
policy at the start and R(0) = 0, what gold gains is

    best-of-n   R(d) = d (alpha - beta d)         highest at d = alpha / (2 beta)
    RL          R(d) = d (alpha - beta log d)     highest at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so least squares has one answer, and that answer is the mean over prompts of the prompts' own alpha and
beta. KL is in nats per response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # its parts load when they are used

FORMULAS = {"best-of-n": "d (alpha - beta d)", "RL": "d (alpha - beta log d)"}
FEWEST_POINTS = 4  # of different KL above 0: two parameters, and as many points to say whether they were needed
NEAR = 1.5  # a predicted peak counts between the smallest d / NEAR and the largest d * NEAR: beyond, nothing was measured


def root_kl(kl: Sequence[float | None]) -> np.ndarray:
    """The square roots of KL; NaN where it is not known or below 0, as a mean over few samples, TRL's estimate, can be."""
    known = np.array([np.nan if value is None else value for value in kl], dtype=float)
    return np.sqrt(np.where(known < 0, np.nan, known))


def fit_gains(form: str, kl: Sequence[float | None], gains: np.ndarray) -> dict:
    """Least squares of a form over the points whose KL is above 0, all of one weight, beside a straight line through the origin.

    Args:
        form: "best-of-n" or "RL".
        kl: [points] in nats per response.
        gains: [points, rows] gold less gold at KL 0, the rows being prompts; [points, 1] where only means are known.

    Returns:
        "form"; "points", the number of those used; "unknown_kl" and "negative_kl", the numbers of those left out for it. Then "reason", why
        there is no fit, or: "alpha" and "beta", each with its "_standard_error" over prompts (None of means); "aicc" and "aicc_line",
        n log(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) with k = 2 coefficients and 1 (Hurvich and Tsai 1989 count the variance too, with
        which four points would allow no form with two); "better", whether the form's is lower; "peak", the d where gold is predicted to be
        highest, if the form is better, beta above 0 and d within a factor `NEAR` of what was measured, else None; "peak_interval", its 95%
        percentile interval over resampled prompts, with None for an end at which gold rises without end.
    """
    d = root_kl(kl)
    used = d > 0
    found: dict = {
        "form": form,
        "points": int(used.sum()),
        "unknown_kl": sum(value is None for value in kl),
        "negative_kl": sum(value is not None and value < 0 for value in kl),
    }
    if len(set(d[used])) < FEWEST_POINTS:
        return {**found, "reason": f"{found['points']} points of a KL above 0, expected at least {FEWEST_POINTS}, each of its own KL"}
    d, gains = d[used], gains[used]
    means = gains.mean(axis=1)
    if not means.any():
        return {**found, "reason": "gold is the same at every point"}
    by_row = scipy.linalg.lstsq(_terms(form, d), gains)[0]  # [2, rows]
    alpha, beta = by_row.mean(axis=1)
    errors = scipy.stats.sem(by_row, axis=1).tolist() if gains.shape[1] > 1 else [None, None]
    aicc = _aicc(means, _terms(form, d)), _aicc(means, d[:, None])
    peak = float(_peaks(form, alpha, beta)) if aicc[0] < aicc[1] else np.inf
    within = d.min() / NEAR <= peak <= d.max() * NEAR
    return {
        **found,
        "alpha": float(alpha),
        "alpha_standard_error": errors[0],
        "beta": float(beta),
        "beta_standard_error": errors[1],
        "aicc": aicc[0],
        "aicc_line": aicc[1],
        "better": aicc[0] < aicc[1],
        "peak": peak if within else None,
        "peak_interval": _peak_interval(form, by_row) if within and gains.shape[1] > 1 else None,
    }


def fit_golds(steps: Sequence[int], kl: Sequence[float | None], gold: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """By gold, `fit_gains` of PPO checkpoints, with what gold, [checkpoints, rows] each, gained since the start."""
    if steps[0] != 0:
        reason = "the start is not among the checkpoints (--include_start=true)"
        return {name: {"form": "RL", "reason": reason} for name in gold}
    return {name: fit_gains("RL", kl, scores - scores[0]) for name, scores in gold.items()}


def predicted(fit: Mapping, d: np.ndarray) -> np.ndarray:
    """What gold gains at each d of [points], by a fit."""
    return _terms(fit["form"], d) @ [fit["alpha"], fit["beta"]]


def fitted_line(fit: Mapping, kl: Sequence[float | None], start: float = 0.0) -> np.ndarray | None:
    """A fit as [2, 100], d and `start` plus what gold gains there, from 0 to the largest d of `kl` or the predicted peak beyond it.

    None where it is not to be drawn: there is no fit, or a straight line says as much.
    """
    if not fit.get("better"):
        return None
    d = np.linspace(0, max(np.nanmax(root_kl(kl)), fit["peak"] or 0), 100)
    return np.stack([d, start + predicted(fit, d)])


def describe_fit(fit: dict) -> str:
    """A fit in one line."""
    head = f"gold against d = sqrt(KL), {FORMULAS[fit['form']]}"
    without = [
        f"{fit[name]} of {what} KL left out" for name, what in (("unknown_kl", "unknown"), ("negative_kl", "negative")) if fit.get(name)
    ]
    left = f" ({', '.join(without)})" if without else ""
    if "reason" in fit:
        return f"{head}: no fit, {fit['reason']}{left}"

    def number(name: str) -> str:
        error = fit[f"{name}_standard_error"]
        return f"{name} {fit[name]:.3f}" + ("" if error is None else f" (SE {error:.3f})")

    against = f"by AICc, {fit['aicc']:.1f} against {fit['aicc_line']:.1f}"
    line = f"{head}: {number('alpha')}, {number('beta')}, {fit['points']} points{left}"
    if not fit["better"]:
        return f"{line}; no better than a straight line {against}"
    line += f"; better than a straight line {against}"
    if fit["peak"] is None:
        return f"{line}; no peak in or near these points"
    ends = ["never" if end is None else f"{end:.2f}" for end in fit["peak_interval"] or ()]
    return f"{line}; gold is predicted to peak at d = {fit['peak']:.2f}" + (f" (95% over prompts: {ends[0]} to {ends[1]})" if ends else "")


def _terms(form: str, d: np.ndarray) -> np.ndarray:
    """[points, 2]: what alpha and beta are multiplied by."""
    return np.stack([d, -scipy.special.xlogy(d, d) if form == "RL" else -d * d], axis=1)


def _peaks(form: str, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Where gold is highest: infinity where it rises without end, 0 where it falls from the start."""
    with np.errstate(all="ignore"):
        peaks = np.exp(alpha / beta - 1) if form == "RL" else np.maximum(alpha / (2 * beta), 0)
    return np.where(beta > 0, peaks, np.inf)


def _peak_interval(form: str, by_row: np.ndarray, resamples: int = 2000, seed: int = 0) -> list[float | None]:
    rows = by_row.shape[1]
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    ends = np.quantile(_peaks(form, *(by_row @ counts.T)), [0.025, 0.975], method="inverted_cdf")  # picks values: some are infinite
    return [float(end) if np.isfinite(end) else None for end in ends]


def _aicc(means: np.ndarray, terms: np.ndarray) -> float:
    """n log(RSS / n) + 2 k of least squares, with the correction for few points.

    What rounding leaves of an exact fit counts as exact, so that of two the simpler is lower.
    """
    count, parameters = terms.shape
    residuals = means - terms @ scipy.linalg.lstsq(terms, means)[0]
    squares = max(float(residuals @ residuals), 1e-24 * float(means @ means))
    return count * float(np.log(squares / count)) + 2 * parameters + 2 * parameters * (parameters + 1) / (count - parameters - 1)
