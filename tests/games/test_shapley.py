from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tribute.errors import CoalitionError, ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import all_coalitions, coalition_keys, complements, mask_from_idx
from tribute.games.designs import draw_design
from tribute.games.exact import exact_shapley_from_table
from tribute.games.removal import draw_coalitions
from tribute.games.shapley import fit_shapley

REGRESSIONS = ("size_adjusted", "least_squares")


def concave(n: int, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    worth = np.random.default_rng(seed).gamma(2.0, size=n)
    return lambda masks: 1 - np.exp(-4 * (masks @ worth) / worth.sum())


def draw(n: int, m: int, first_seed: int = 0) -> np.ndarray:
    return draw_coalitions("shapley", n, range(first_seed, first_seed + m))


@pytest.fixture(params=REGRESSIONS)
def estimator(request) -> str:
    return request.param


def test_size_adjusted_beats_least_squares_on_a_concave_game():
    n, value = 10, concave(10)
    table = value(all_coalitions(n))
    truth = exact_shapley_from_table(table)
    errors = {name: [] for name in REGRESSIONS}
    for repeat in range(20):
        masks = draw(n, 5 * n, 1000 * repeat)
        for name, found in errors.items():
            values = fit_shapley(masks, value(masks), v_empty=0.0, v_grand=table[-1], estimator=name).values
            found.append(np.linalg.norm(values - truth))
    assert np.median(errors["size_adjusted"]) < 0.6 * np.median(errors["least_squares"])


def test_sampled_estimates_are_efficient_linear_and_blind_to_order(estimator):
    n, m = 7, 40
    masks, rng = draw(n, m), np.random.default_rng(0)
    a, b = rng.normal(size=(2, m))
    fit = partial(fit_shapley, estimator=estimator)
    first, second = fit(masks, a, v_empty=1.0, v_grand=4.0), fit(masks, b, v_empty=0.0, v_grand=-1.0)
    np.testing.assert_allclose(first.values.sum(), 3.0)
    both = fit(masks, 2 * a + b, v_empty=2.0, v_grand=7.0)
    np.testing.assert_allclose(both.values, 2 * first.values + second.values, atol=1e-10)
    rows, columns = rng.permutation(m), rng.permutation(n)
    shuffled = fit(masks[rows][:, columns], a[rows], v_empty=1.0, v_grand=4.0)
    np.testing.assert_allclose(shuffled.values, first.values[columns], atol=1e-10)
    np.testing.assert_allclose(shuffled.covariance, first.covariance[np.ix_(columns, columns)], atol=1e-10)


def test_result_says_how_it_was_made(estimator):
    masks = draw(6, 30)
    found = fit_shapley(masks, concave(6)(masks), v_empty=0.1, v_grand=1.0, estimator=estimator)
    assert (found.kernel, found.estimator, found.interval) == ("shapley", estimator, "analytic")
    assert (found.n_coalitions, found.rank, found.intercept) == (30, 6, 0.1)
    assert found.fit_keys == set(coalition_keys(masks))
    np.testing.assert_allclose(found.covariance, found.covariance.T)
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-12


@pytest.mark.parametrize("paired", [False, True])
def test_analytic_intervals_cover(estimator, paired):
    n, value = 8, concave(8)
    table = value(all_coalitions(n))
    truth, covered = exact_shapley_from_table(table), []
    for repeat in range(60):
        masks = draw(n, 5 * n if paired else 10 * n, 1000 * repeat)
        masks = np.vstack([masks, complements(masks)]) if paired else masks
        noise = np.random.default_rng(repeat).normal(scale=0.02, size=len(masks))
        found = fit_shapley(masks, value(masks) + noise, v_empty=0.0, v_grand=table[-1], estimator=estimator)
        low, high = found.intervals(0.9).T
        covered.append((low <= truth) & (truth <= high))
    assert 0.85 < np.mean(covered) <= 0.99


@pytest.mark.parametrize("paired", [False, True])
def test_bootstrap_agrees_with_the_analytic_interval(estimator, paired):
    masks = draw(6, 60)
    masks = np.vstack([masks, complements(masks)]) if paired else masks
    y = concave(6)(masks) + np.random.default_rng(0).normal(scale=0.05, size=len(masks))
    fit = partial(fit_shapley, masks, y, v_empty=0.0, v_grand=1.0, estimator=estimator)
    ratio = fit(interval="bootstrap").standard_errors / fit().standard_errors
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()
    again = fit(interval="bootstrap")
    np.testing.assert_array_equal(again.covariance, fit(interval="bootstrap").covariance)
    assert (again.covariance != fit(interval="bootstrap", seed=1).covariance).any()


def test_wrong_end_points_only_shift_size_adjusted_values():
    masks = draw(8, 80)
    y = concave(8)(masks)
    spread = {}
    for name in REGRESSIONS:
        right, wrong = (fit_shapley(masks, y, v_empty=v0, v_grand=1.0, estimator=name).values for v0 in (0.0, 0.2))
        spread[name] = np.ptp(wrong - right)
    assert spread["size_adjusted"] < 0.002
    assert spread["least_squares"] > 0.02


def test_missing_contributors_are_named(estimator):
    masks = draw(6, 40)
    masks[:, 4] = masks[:, 2]
    masks = masks[masks.any(axis=1) & ~masks.all(axis=1)]
    names = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo"]
    fit = partial(fit_shapley, masks, np.arange(float(len(masks))), v_empty=0.0, v_grand=1.0, estimator=estimator)
    with pytest.raises(RankDeficientFit, match=r"contributors 2 \(Cy\), 4 \(Ed\)\. Measure at least 1 more"):
        fit(contributor_names=names)
    shrunk = fit(ridge=1e-3)
    assert shrunk.rank == 5
    np.testing.assert_allclose(shrunk.values[2], shrunk.values[4])
    np.testing.assert_allclose(shrunk.values.sum(), 1.0)


def test_repeats_and_complements_are_not_independent(estimator):
    masks = np.array([mask_from_idx(idx, 6) for idx in ([0], [0, 1], [0, 1, 2], [1, 4])])
    masks = np.vstack([masks, masks, complements(masks)])
    fit = partial(fit_shapley, masks, np.ones(12), v_empty=0.0, v_grand=1.0, estimator=estimator)
    with pytest.raises(RankDeficientFit, match=r"at least 5 independent .*found 4"):
        fit()
    assert np.isfinite(fit(ridge=0.1).covariance).all()


def test_no_spare_coalition_means_no_known_covariance(estimator):
    masks = np.array([mask_from_idx([i], 5) for i in range(4)])
    fit = partial(fit_shapley, masks, np.arange(4.0), v_empty=0.0, v_grand=9.0, estimator=estimator)
    found = fit()
    assert np.isfinite(found.values).all()
    assert np.isnan(found.covariance).all()
    assert np.isnan([found.noise_sd, found.loo_r2]).all()
    more = fit_shapley(np.vstack([masks, ~masks[:1]]), np.arange(5.0), v_empty=0.0, v_grand=9.0, estimator=estimator)
    assert np.isfinite(more.noise_sd)  # one spare row tells the noise, but no fit goes without the others
    assert np.isnan(more.loo_r2)
    with pytest.raises(FitError, match="bootstrap draws"):
        fit(interval="bootstrap")


def test_large_ridge_means_equal_credit(estimator):
    masks = draw(5, 20)
    found = fit_shapley(masks, concave(5)(masks), v_empty=0.0, v_grand=1.0, estimator=estimator, ridge=1e12)
    np.testing.assert_allclose(found.values, 0.2, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_zero_weight_is_absence_and_the_unit_of_weights_is_free(ridge):
    masks, rng = draw(5, 40), np.random.default_rng(0)
    y, weights = rng.normal(size=40), rng.random(40)
    weights[30:] = 0.0
    fit = partial(fit_shapley, v_empty=0.0, v_grand=1.0, estimator="least_squares", ridge=ridge)
    whole, part = fit(masks, y, weights=weights), fit(masks[:30], y[:30], weights=7 * weights[:30])
    np.testing.assert_allclose(whole.values, part.values)
    np.testing.assert_allclose(whole.covariance, part.covariance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v_empty": None}, FitError, "Expected v_empty"),
        ({"v_grand": float("nan")}, FitError, "Expected v_grand"),
        ({"estimator": "magic"}, ConfigError, "unbiased, permutation; found 'magic'"),
        ({"interval": "magic"}, ConfigError, "interval"),
        ({"design": "magic"}, ConfigError, "orthogonal, paired, .* found 'magic'"),
        ({"ridge": -1.0}, ConfigError, "ridge"),
        ({"ridge": float("inf")}, ConfigError, "ridge"),
        ({"n_bootstrap": 1}, ConfigError, "n_bootstrap"),
        ({"v_empty_variance": -1.0}, ConfigError, "v_empty_variance"),
        ({"v_grand_variance": float("nan")}, ConfigError, "v_grand_variance"),
        ({"behavior_variance": -1.0}, ConfigError, "behavior_variance"),
        ({"behavior_variance": np.ones(3)}, FitError, "behavior_variance"),
        ({"behavior_variance": np.zeros(20)}, FitError, "behavior_variance > 0"),
        ({"behavior_variance": np.full(20, np.nan)}, FitError, "behavior_variance .* 20 values NaN"),
        ({"weights": np.ones(3)}, FitError, "weights"),
        ({"weights": -np.ones(20)}, FitError, "weights"),
        ({"weights": np.zeros(20)}, FitError, "weights"),
        ({"prior": np.ones(4)}, FitError, r"prior \(5,\) .* found shape \(4,\)"),
        ({"prior": np.array([0.0, 1.0, np.nan, 2.0, 3.0])}, FitError, "prior .* 1 values NaN"),
        ({"contributor_names": ["a"]}, ConfigError, "contributor_names"),
        ({"behaviors": np.ones(3)}, FitError, "one behavior per coalition"),
        ({"behaviors": np.where(np.arange(20) == 7, np.nan, 1.0)}, FitError, "finite behaviors, found NaN .* at 7"),
        ({"masks": np.ones((20, 5))}, CoalitionError, "dtype bool"),
        ({"masks": np.ones(20, dtype=bool)}, CoalitionError, "found shape"),
        ({"masks": np.ones((20, 1), dtype=bool)}, FitError, "at least 2 contributors, found 1"),
        ({"masks": np.eye(20, 5, dtype=bool)}, FitError, r"rows 5, 6"),
        ({"masks": ~np.eye(20, 5, dtype=bool)}, FitError, r"grand one in rows 5, 6"),
    ],
)
@pytest.mark.parametrize("estimator", [None, "gp", "size_adjusted", "ridge", "unbiased", "permutation"])
def test_bad_input(estimator, change, error, message):
    masks = draw_design("permutation", 5, 20)
    arguments = {"masks": masks, "behaviors": np.ones(20), "v_empty": 0.0, "v_grand": 1.0, "estimator": estimator}
    with pytest.raises(error, match=message):
        fit_shapley(**arguments | change)


def test_an_unknown_option_is_an_error():
    options: dict[str, Any] = {"v_empty": 0.0, "v_grand": 1.0, "penalty": 2.0}
    with pytest.raises(TypeError, match="penalty"):
        fit_shapley(draw(5, 20), np.ones(20), **options)
