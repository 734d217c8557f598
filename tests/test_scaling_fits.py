"""Gao et al.'s forms on curves whose alpha and beta are known."""

from __future__ import annotations

import numpy as np
import pytest

from parts.scaling_fits import describe_fit, fit_gains, fit_golds, predicted, root_kl

D = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
ALPHAS, BETAS = np.array([0.5, 1.0, 1.5]), np.array([0.2, 0.3, 0.4])  # by prompt


def curve(form: str, alpha, beta) -> np.ndarray:
    """[points, prompts], written out apart from the module."""
    d = D[:, None]
    bend = d if form == "best-of-n" else np.log(np.where(d == 0, 1, d))
    return d * (alpha - beta * bend)


@pytest.mark.parametrize(("form", "peak"), [("best-of-n", 1.0 / 0.6), ("RL", np.exp(1.0 / 0.3 - 1))])
def test_what_a_curve_was_made_of_is_found(form, peak):
    fit = fit_gains(form, D**2, curve(form, ALPHAS, BETAS))
    assert (fit["alpha"], fit["beta"], fit["points"]) == (pytest.approx(1.0), pytest.approx(0.3), 4)
    assert (fit["alpha_standard_error"], fit["beta_standard_error"]) == (pytest.approx(0.5 / 3**0.5), pytest.approx(0.1 / 3**0.5))
    assert fit["better"] and (fit["unknown_kl"], fit["negative_kl"]) == (0, 0)
    np.testing.assert_allclose(predicted(fit, D), curve(form, 1.0, 0.3)[:, 0], atol=1e-12)
    if form == "best-of-n":
        assert fit["peak"] == pytest.approx(peak)
    else:
        assert peak > 10 and fit["peak"] is None  # far beyond d = 3


def test_the_peak_of_rl_and_its_interval():
    """With one beta for all, the peak is exp(alpha / 0.5 - 1): d = 1 for alpha 0.5, e for alpha 1."""
    fit = fit_gains("RL", D**2, curve("RL", np.array([0.5] * 50 + [1.0] * 50), np.full(100, 0.5)))
    assert fit["peak"] == pytest.approx(np.exp(0.5))
    low, high = fit["peak_interval"]
    # the mean alpha is 0.75 with a standard error of 0.025
    assert low == pytest.approx(np.exp(0.5 - 2 * 1.96 * 0.025), abs=0.02) and high == pytest.approx(
        np.exp(0.5 + 2 * 1.96 * 0.025), abs=0.03
    )
    assert fit_gains("RL", D**2, curve("RL", np.array([0.5] * 50 + [1.0] * 50), np.full(100, 0.5))) == fit


def test_a_peak_is_given_only_where_gold_was_measured_or_near():
    assert fit_gains("best-of-n", D**2, curve("best-of-n", [[0.9]], [[0.1]]))["peak"] == pytest.approx(4.5)  # 1.5 times 3
    assert fit_gains("best-of-n", D**2, curve("best-of-n", [[0.92]], [[0.1]]))["peak"] is None
    assert fit_gains("best-of-n", D**2, curve("best-of-n", [[-0.5]], [[0.1]]))["peak"] is None  # gold falls from the start
    upwards = fit_gains("best-of-n", D**2, curve("best-of-n", [[0.5]], [[-0.1]]))
    assert upwards["better"] and upwards["peak"] is None and "no peak in or near these points" in describe_fit(upwards)
    # Of two prompts one alone has a peak: resampled, gold may rise without end.
    fit = fit_gains("best-of-n", D**2, curve("best-of-n", np.array([1.0, 1.0]), np.array([0.7, -0.1])))
    assert fit["peak"] == pytest.approx(1 / 0.6) and fit["peak_interval"] == [pytest.approx(1 / 1.4), None]
    assert describe_fit(fit).endswith("gold is predicted to peak at d = 1.67 (95% over prompts: 0.71 to never)")


def test_the_form_has_to_be_better_than_a_line():
    """n log(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) by hand: d = 1, 2, 3, 4 and gains of 1, 1.5, 1.5, 1.1.

    Line: its slope is sum(d y) / sum(d d) = 12.9 / 30, its RSS 6.71 - 12.9 * 12.9 / 30 = 1.163. Parabola: d^2, d^3 and d^4 sum to 30, 100
    and 354, d y and d^2 y to 12.9 and 38.1, so that Cramer's rule gives (12.9 * 354 - 100 * 38.1) / 620 and (12.9 * 100 - 30 * 38.1) / 620.
    """
    kl = [1.0, 4.0, 9.0, 16.0]
    fit = fit_gains("best-of-n", kl, np.array([[1.0], [1.5], [1.5], [1.1]]))
    alpha, beta = 756.6 / 620, 147 / 620
    squares = sum((y - d * (alpha - beta * d)) ** 2 for d, y in zip((1, 2, 3, 4), (1, 1.5, 1.5, 1.1)))
    assert (fit["alpha"], fit["beta"]) == (pytest.approx(alpha), pytest.approx(beta))
    assert fit["aicc_line"] == pytest.approx(4 * np.log(1.163 / 4) + 2 + 2) and fit["aicc"] == pytest.approx(
        4 * np.log(squares / 4) + 4 + 12
    )
    assert fit["better"] and fit["alpha_standard_error"] is None and fit["peak_interval"] is None  # means alone
    bent = fit_gains("best-of-n", kl, np.array([[1.0], [2.2], [2.8], [4.0]]))
    assert not bent["better"] and bent["peak"] is None and bent["aicc"] > bent["aicc_line"]
    assert "no better than a straight line by AICc" in describe_fit(bent)
    for form in ("best-of-n", "RL"):  # an exact line needs no second parameter, whatever rounding leaves
        assert not fit_gains(form, D**2, D[:, None] * np.array([0.1, 0.7]))["better"]


def test_no_fit_without_points():
    np.testing.assert_array_equal(root_kl([0.0, None, -0.1, 4.0]), [0.0, np.nan, np.nan, 2.0])
    gains = curve("RL", ALPHAS, BETAS)
    fit = fit_gains("RL", [0.0, None, -0.2, 4.0, 9.0], gains)
    assert fit == {
        "form": "RL", "points": 2, "unknown_kl": 1, "negative_kl": 1,
        "reason": "2 points of a KL above 0, expected at least 4, each of its own KL",
    }  # fmt: skip
    assert describe_fit(fit) == (
        "gold against d = sqrt(KL), d (alpha - beta log d): no fit, 2 points of a KL above 0, expected at least 4, each of its own KL "
        "(1 of unknown KL left out, 1 of negative KL left out)"
    )
    assert "each of its own KL" in fit_gains("RL", [0.0, 1.0, 1.0, 4.0, 9.0], gains)["reason"]
    assert fit_gains("RL", D**2, np.zeros((5, 3)))["reason"] == "gold is the same at every point"
    one_more = fit_gains("RL", [*D**2, -0.2], np.vstack([gains, [[9.0, 9.0, 9.0]]]))
    assert one_more == {**fit_gains("RL", D**2, gains), "negative_kl": 1}


def test_the_fits_of_checkpoints():
    gold = {"rm": curve("RL", ALPHAS, BETAS) + 7, "human": curve("RL", [[1.0]], [[0.3]]) - 1}
    fits = fit_golds([0, 4, 8, 12, 16], list(D**2), gold)
    assert list(fits) == ["rm", "human"] and fits["rm"] == pytest.approx(fit_gains("RL", D**2, curve("RL", ALPHAS, BETAS)))
    assert fits["human"]["alpha"] == pytest.approx(1.0) and fits["human"]["alpha_standard_error"] is None
    fits = fit_golds([2, 4, 8, 12, 16], list(D**2), gold)
    assert fits["rm"] == {"form": "RL", "reason": "the start is not among the checkpoints (--include_start=true)"}
