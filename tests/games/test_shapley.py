from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from tribute.errors import CoalitionError, ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import all_coalitions, coalition_keys, complements, mask_from_idx
from tribute.games.exact import exact_banzhaf_from_table, exact_shapley_from_table
from tribute.games.removal import draw_coalitions, shapley_size_law
from tribute.games.shapley import SHAPLEY_ESTIMATORS, contrast_basis, fit_shapley, size_mass_weights

Estimate = Callable[[np.ndarray], np.ndarray]
"""Credit `(n,)` from the table `(2**n,)` of a game."""


def enumerated(table: np.ndarray, estimator: str, weighted: bool = True) -> np.ndarray:
    """Shapley values that an estimator finds on all proper coalitions."""
    n = len(table).bit_length() - 1
    masks = all_coalitions(n, include_empty=False, include_grand=False)
    sizes = masks.sum(axis=1)
    kernel = shapley_size_law(n)[sizes - 1] / np.bincount(sizes)[sizes]
    own = estimator == "size_adjusted" or not weighted
    return fit_shapley(
        masks,
        table[1:-1],
        v_empty=table[0],
        v_grand=table[-1],
        estimator=estimator,
        weights=None if own else kernel,
    ).values


ESTIMATES: dict[str, Estimate] = {name: partial(enumerated, estimator=name) for name in SHAPLEY_ESTIMATORS}


def zeroed(table: np.ndarray) -> np.ndarray:
    """Broken: small credit is set to zero."""
    values = enumerated(table, "size_adjusted")
    return np.where(np.abs(values) < 0.5 * np.abs(values).max(), 0.0, values)


def unweighted(table: np.ndarray) -> np.ndarray:
    """Broken: all coalitions count alike, whatever their size."""
    return enumerated(table, "least_squares", weighted=False)


def by_index(table: np.ndarray) -> np.ndarray:
    """Broken: marginal contributions in one order of arrival only."""
    n = len(table).bit_length() - 1
    return np.diff(table[[2**k - 1 for k in range(n + 1)]])


def games(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(2, 2**n)) * 3 + 1


def is_exact(estimate: Estimate, n: int) -> None:
    for table in games(n):
        np.testing.assert_allclose(estimate(table), exact_shapley_from_table(table), atol=1e-8)


def is_efficient(estimate: Estimate, n: int) -> None:
    for table in games(n):
        np.testing.assert_allclose(estimate(table).sum(), table[-1] - table[0], atol=1e-9)


def is_symmetric(estimate: Estimate, n: int) -> None:
    """Contributors 0 and 1 contribute alike to every coalition."""
    masks = all_coalitions(n)
    swapped = masks.copy()
    swapped[:, [0, 1]] = masks[:, [1, 0]]
    table = games(n)[0]
    values = estimate(table + table[swapped @ (1 << np.arange(n))])
    np.testing.assert_allclose(values[0], values[1], atol=1e-9)


def gives_nothing_to_null(estimate: Estimate, n: int) -> None:
    """The last contributor changes no coalition's behavior."""
    values = estimate(np.tile(games(n)[0][: 2 ** (n - 1)], 2))
    np.testing.assert_allclose(values[-1], 0.0, atol=1e-9)


def is_linear(estimate: Estimate, n: int) -> None:
    a, b = games(n)
    np.testing.assert_allclose(estimate(2 * a - 3 * b), 2 * estimate(a) - 3 * estimate(b), atol=1e-8)


LAWS = (is_exact, is_efficient, is_symmetric, gives_nothing_to_null, is_linear)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ESTIMATES)
def test_law_on_all_coalitions(name, law, n):
    law(ESTIMATES[name], n)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (zeroed, is_exact),
        (zeroed, is_efficient),
        (zeroed, is_linear),
        (unweighted, is_exact),
        (unweighted, gives_nothing_to_null),
        (exact_banzhaf_from_table, is_exact),
        (exact_banzhaf_from_table, is_efficient),
        (by_index, is_exact),
        (by_index, is_symmetric),
    ],
)
def test_laws_catch_broken_estimators(broken, law):
    with pytest.raises(AssertionError):
        law(broken, 6)


def concave(n: int, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    worth = np.random.default_rng(seed).gamma(2.0, size=n)
    return lambda masks: 1 - np.exp(-4 * (masks @ worth) / worth.sum())


def draw(n: int, m: int, first_seed: int = 0) -> np.ndarray:
    return draw_coalitions("shapley", n, range(first_seed, first_seed + m))


@pytest.fixture(params=SHAPLEY_ESTIMATORS)
def estimator(request) -> str:
    return request.param


def test_size_adjusted_beats_least_squares_on_a_concave_game():
    n, value = 10, concave(10)
    table = value(all_coalitions(n))
    truth = exact_shapley_from_table(table)
    errors = {name: [] for name in SHAPLEY_ESTIMATORS}
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


@pytest.mark.parametrize(("slope", "offset"), [(-2.0, 5.0), (1e-9, 1e-6), (1e150, 0.0)])
def test_equivariant_to_the_unit_of_the_behavior(estimator, slope, offset):
    masks = draw(6, 30)
    y = concave(6)(masks)
    fit = partial(fit_shapley, masks, estimator=estimator, v_empty_variance=0.0)
    plain, scaled = (
        fit(y, v_empty=0.0, v_grand=1.0),
        fit(slope * y + offset, v_empty=offset, v_grand=slope + offset),
    )
    np.testing.assert_allclose(scaled.values, slope * plain.values, rtol=1e-8)
    np.testing.assert_allclose(scaled.standard_errors, abs(slope) * plain.standard_errors, rtol=1e-8)


@pytest.mark.parametrize("interval", ["analytic", "bootstrap"])
def test_constant_behavior_credits_nobody(estimator, interval):
    masks = draw(5, 40)
    found = fit_shapley(
        masks,
        np.full(40, 0.3),
        v_empty=0.3,
        v_grand=0.3,
        estimator=estimator,
        interval=interval,
        n_bootstrap=20,
    )
    np.testing.assert_array_equal(found.values, 0.0)
    np.testing.assert_array_equal(found.covariance, 0.0)


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


@pytest.mark.parametrize("interval", ["analytic", "bootstrap"])
def test_noise_of_the_end_points_enters_as_it_moves_the_values(estimator, interval):
    masks = draw(6, 40)
    y = concave(6)(masks)
    fit = partial(fit_shapley, masks, y, estimator=estimator, interval=interval, n_bootstrap=20)
    base = fit(v_empty=0.0, v_grand=1.0)
    by_empty = fit(v_empty=1.0, v_grand=1.0).values - base.values
    by_grand = fit(v_empty=0.0, v_grand=2.0).values - base.values
    noisy = fit(v_empty=0.0, v_grand=1.0, v_empty_variance=2.0, v_grand_variance=0.5)
    extra = 2.0 * np.outer(by_empty, by_empty) + 0.5 * np.outer(by_grand, by_grand)
    np.testing.assert_allclose(noisy.covariance - base.covariance, extra, atol=1e-9)


def test_wrong_end_points_only_shift_size_adjusted_values():
    masks = draw(8, 80)
    y = concave(8)(masks)
    spread = {}
    for name in SHAPLEY_ESTIMATORS:
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


def test_size_mass():
    sizes = np.array([1, 1, 2, 4])
    law = shapley_size_law(5)
    expected = np.array([law[0] / 2, law[0] / 2, law[1] + law[2] / 2, law[3] + law[2] / 2]) * 4
    np.testing.assert_allclose(size_mass_weights(sizes, 5), expected)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_contrast_basis(n):
    basis = contrast_basis(n)
    np.testing.assert_allclose(basis.T @ basis, np.eye(n - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(axis=0), 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v_empty": None}, FitError, "Expected v_empty"),
        ({"v_grand": float("nan")}, FitError, "Expected v_grand"),
        ({"estimator": "magic"}, ConfigError, "size_adjusted, least_squares; found 'magic'"),
        ({"interval": "magic"}, ConfigError, "interval"),
        ({"ridge": -1.0}, ConfigError, "ridge"),
        ({"ridge": float("inf")}, ConfigError, "ridge"),
        ({"n_bootstrap": 1}, ConfigError, "n_bootstrap"),
        ({"v_empty_variance": -1.0}, ConfigError, "v_empty_variance"),
        ({"v_grand_variance": float("nan")}, ConfigError, "v_grand_variance"),
        ({"weights": np.ones(3)}, FitError, "weights"),
        ({"weights": -np.ones(20)}, FitError, "weights"),
        ({"weights": np.zeros(20)}, FitError, "weights"),
        ({"contributor_names": ["a"]}, ConfigError, "contributor_names"),
        ({"behaviors": np.ones(3)}, FitError, "one behavior per coalition"),
        ({"behaviors": np.full(20, np.nan)}, FitError, "finite"),
        ({"masks": np.ones((20, 5))}, CoalitionError, "dtype bool"),
        ({"masks": np.eye(20, 5, dtype=bool)}, FitError, r"rows 5, 6"),
        ({"masks": ~np.eye(20, 5, dtype=bool)}, FitError, r"grand one in rows 5, 6"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"masks": draw(5, 20), "behaviors": np.ones(20), "v_empty": 0.0, "v_grand": 1.0} | change
    with pytest.raises(error, match=message):
        fit_shapley(**arguments)
