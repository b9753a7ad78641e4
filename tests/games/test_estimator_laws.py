"""Laws of the estimators: exact on all coalitions, invariances, naive twins, intervals that cover."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import shapiq

from tribute.errors import ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import all_coalitions, complement_clusters, complements
from tribute.games.designs import DESIGNS, PAIRED_DESIGNS, draw_design
from tribute.games.exact import exact_banzhaf_from_table, exact_shapley_from_table, value_table
from tribute.games.gaussian_process import gaussian_process_contrasts
from tribute.games.kernels import fit_banzhaf, fit_datamodel
from tribute.games.monte_carlo import walk_positions
from tribute.games.regression import RIDGE_PENALTIES, contrast_basis
from tribute.games.shapley import SHAPLEY_ESTIMATORS, fit_shapley
from tribute.types import Attributions

Estimate = Callable[[np.ndarray], np.ndarray]
"""Credit `(n,)` from the table `(2**n,)` of a game."""

EXPLICIT = SHAPLEY_ESTIMATORS[1:]
AVERAGES = ("unbiased", "permutation")
REGRESSIONS = ("size_adjusted", "ridge", "least_squares")


def enumerated(table: np.ndarray, estimator: str, **options: Any) -> np.ndarray:
    """Shapley values that an estimator finds on all proper coalitions."""
    n = len(table).bit_length() - 1
    masks = all_coalitions(n, include_empty=False, include_grand=False)
    ends = {"v_empty": table[0], "v_grand": table[-1]}
    return fit_shapley(masks, table[1:-1], estimator=estimator, **ends, **options).values


def walked(table: np.ndarray) -> np.ndarray:
    """Shapley values by all walks from nobody to everybody."""
    n = len(table).bit_length() - 1
    members = np.array([2 ** np.array(order) for order in permutations(range(n))])
    numbers = members.cumsum(axis=1)[:, :-1].ravel()
    ends = {"v_empty": table[0], "v_grand": table[-1]}
    return fit_shapley(all_coalitions(n)[numbers], table[numbers], estimator="permutation", **ends).values


ESTIMATES: dict[str, Estimate] = {
    "size_adjusted": partial(enumerated, estimator="size_adjusted"),
    "least_squares": partial(enumerated, estimator="least_squares", design="stratified"),
    "ridge": partial(enumerated, estimator="ridge", design="paired", ridge=1e-11),
    "unbiased": partial(enumerated, estimator="unbiased"),
    "permutation": walked,
}


def zeroed(table: np.ndarray) -> np.ndarray:
    """Broken: small credit is set to zero."""
    values = enumerated(table, "size_adjusted")
    return np.where(np.abs(values) < 0.5 * np.abs(values).max(), 0.0, values)


def unweighted(table: np.ndarray) -> np.ndarray:
    """Broken: all coalitions count alike, whatever their size."""
    return enumerated(table, "least_squares", design="kernel")


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


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
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


@pytest.fixture(scope="module")
def shapiq_games() -> dict[str, shapiq.Game]:
    with warnings.catch_warnings():
        # It says that its games on real data need packages beyond shapiq's own.
        warnings.filterwarnings("ignore", "The 'shapiq_games' package requires optional", ImportWarning)
        from shapiq_games.synthetic import SOUM, DummyGame
    return {"soum": SOUM(n=6, n_basis_games=12, random_state=3), "dummy": DummyGame(n=6, interaction=(1, 4))}


@pytest.mark.parametrize("name", ["soum", "dummy"])
def test_shapiq_agrees_on_its_own_games(shapiq_games, name):
    game = shapiq_games[name]
    table = value_table(lambda mask: float(game(mask[None])[0]), 6)
    computer = shapiq.ExactComputer(game, n_players=6)
    shapley = computer("SV", order=1).get_n_order_values(1)
    np.testing.assert_allclose(exact_shapley_from_table(table), shapley, atol=1e-10)
    for estimate in ESTIMATES.values():
        np.testing.assert_allclose(estimate(table), shapley, atol=1e-8)
    banzhaf = computer("BV", order=1).get_n_order_values(1)
    for estimator in ("kernel_banzhaf", "msr"):
        found = fit_banzhaf(all_coalitions(6), table, estimator=estimator).values
        np.testing.assert_allclose(found, banzhaf, atol=1e-8)


def concave(n: int) -> Callable[[np.ndarray], np.ndarray]:
    worth = np.random.default_rng(0).gamma(2.0, size=n)
    return lambda masks: 1 - np.exp(-4 * (masks @ worth) / worth.sum())


def rows_for(estimator: str, n: int, m: int, seed: int = 0) -> np.ndarray:
    """Coalitions that an estimator can use, with repeats; `m` or a few less."""
    if estimator == "permutation":
        return draw_design("permutation", n, m // (n - 1) * (n - 1), seed=seed)
    return draw_design("kernel", n, m, seed=1000 * seed)


def measured(estimator: str, n: int = 6, m: int = 40, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    masks = rows_for(estimator, n, m)
    return masks, concave(n)(masks) + np.random.default_rng(1).normal(scale=noise, size=len(masks))


@pytest.mark.parametrize(("slope", "offset"), [(-2.0, 5.0), (-1e-12, 1e-12), (1e12, -3e12)])
@pytest.mark.parametrize("estimator", EXPLICIT)
def test_equivariant_to_the_unit_of_the_behavior(estimator, slope, offset):
    masks, y = measured(estimator)
    plain = fit_shapley(masks, y, v_empty=0.0, v_grand=1.0, estimator=estimator)
    scaled = fit_shapley(masks, slope * y + offset, v_empty=offset, v_grand=slope + offset, estimator=estimator)
    tolerance = 1e-4 if estimator == "gp" else 1e-9  # the hyper-parameters of gp are found by iteration
    for name, factor in [("values", slope), ("standard_errors", abs(slope)), ("noise_sd", abs(slope)), ("loo_r2", 1)]:
        expected = factor * np.asarray(getattr(plain, name))
        np.testing.assert_allclose(getattr(scaled, name), expected, rtol=tolerance, err_msg=name)
    assert scaled.values.dtype == np.float64


@pytest.mark.parametrize("estimator", EXPLICIT)
def test_blind_to_names_of_contributors_and_order_of_evaluations(estimator):
    masks, y = measured(estimator)
    ends: dict[str, Any] = {"v_empty": 0.0, "v_grand": 1.0}
    first = fit_shapley(masks, y, estimator=estimator, **ends)
    rng = np.random.default_rng(0)
    columns = rng.permutation(6)
    rows = rng.permutation(len(y))
    if estimator == "permutation":  # only walks, each with its reverse, may change places
        rows = rng.permutation(np.arange(len(y)).reshape(-1, 10)).ravel()
    other = fit_shapley(masks[rows][:, columns], y[rows], estimator=estimator, **ends)
    tolerance = 1e-5 if estimator == "gp" else 1e-10
    np.testing.assert_allclose(other.values, first.values[columns], atol=tolerance)
    np.testing.assert_allclose(other.covariance, first.covariance[np.ix_(columns, columns)], atol=tolerance)
    np.testing.assert_allclose(first.values.sum(), 1.0)


@pytest.mark.parametrize("interval", ["analytic", "bootstrap"])
@pytest.mark.parametrize("estimator", EXPLICIT)
def test_nothing_to_share_is_shared_exactly(estimator, interval):
    """All behaviors equal, and so v(grand) = v(empty)."""
    if estimator == "gp" and interval == "bootstrap":
        return
    masks, _ = measured(estimator)
    y = np.full(len(masks), 0.3)
    options: dict[str, Any] = {"estimator": estimator, "interval": interval, "n_bootstrap": 20}
    found = fit_shapley(masks, y, v_empty=0.3, v_grand=0.3, **options)
    np.testing.assert_array_equal(found.values, 0.0)
    np.testing.assert_array_equal(found.covariance, 0.0)
    assert np.isnan(found.loo_r2)


@pytest.mark.parametrize("estimator", EXPLICIT)
def test_equal_end_points_with_unequal_behaviors(estimator):
    masks, y = measured(estimator)
    found = fit_shapley(masks, y, v_empty=0.5, v_grand=0.5, estimator=estimator)
    np.testing.assert_allclose(found.values.sum(), 0.0, atol=1e-12)
    assert np.isfinite(found.covariance).all()
    assert found.values.std() > 0


@pytest.mark.parametrize("interval", ["analytic", "bootstrap"])
@pytest.mark.parametrize("estimator", EXPLICIT)
def test_noise_of_the_end_points_enters_as_it_moves_the_values(estimator, interval):
    if estimator == "gp" and interval == "bootstrap":
        return
    masks, y = measured(estimator)
    # A penalty chosen from the data hardly depends on the end points, and is held.
    options: dict[str, Any] = {"ridge": 0.5} if estimator == "ridge" else {}
    fit = partial(fit_shapley, masks, y, estimator=estimator, interval=interval, n_bootstrap=20, **options)
    base = fit(v_empty=0.0, v_grand=1.0)
    by_empty = fit(v_empty=1.0, v_grand=1.0).values - base.values
    by_grand = fit(v_empty=0.0, v_grand=2.0).values - base.values
    noisy = fit(v_empty=0.0, v_grand=1.0, v_empty_variance=2.0, v_grand_variance=0.5)
    extra = 2.0 * np.outer(by_empty, by_empty) + 0.5 * np.outer(by_grand, by_grand)
    np.testing.assert_allclose(noisy.covariance - base.covariance, extra, atol=1e-9)
    np.testing.assert_allclose([by_empty.sum(), by_grand.sum()], [-1.0, 1.0])


@pytest.mark.parametrize(
    ("estimator", "design"),
    [
        ("permutation", "permutation"),
        *(("unbiased", design) for design in (None, "kernel", "paired", "stratified", "permutation")),
    ],
)
def test_averages_have_no_bias_and_intervals_that_cover(estimator, design):
    n, value = 6, concave(6)
    table = value(all_coalitions(n))
    truth = exact_shapley_from_table(table)
    values, covered = [], []
    for seed in range(120):
        n_rows = 40 if design in PAIRED_DESIGNS else 120
        masks = draw_design(design or "kernel", n, n_rows, seed=1000 * seed)
        noise = np.random.default_rng(seed).normal(scale=0.05, size=len(masks))
        options: dict[str, Any] = {"estimator": estimator, "design": design}
        found = fit_shapley(masks, value(masks) + noise, v_empty=0.0, v_grand=table[-1], **options)
        low, high = found.intervals(0.9).T
        values.append(found.values)
        covered.append((low <= truth) & (truth <= high))
    error = np.mean(values, axis=0) - truth
    assert (np.abs(error) < 4.5 * np.std(values, axis=0) / np.sqrt(len(values))).all()
    assert 0.84 < np.mean(covered) <= (0.95 if design in ("kernel", "permutation") else 1.0)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("estimator", REGRESSIONS)
def test_regressions_serve_every_design(estimator, design):
    n, value = 8, concave(8)
    table = value(all_coalitions(n))
    truth = exact_shapley_from_table(table)
    masks = draw_design(design, n, 238)
    found = fit_shapley(masks, value(masks), v_empty=0.0, v_grand=table[-1], estimator=estimator, design=design)
    tolerance = 0.2 if estimator == "size_adjusted" else 0.9
    assert np.linalg.norm(found.values - truth) < tolerance * np.linalg.norm(truth - truth.mean())
    assert found.design == design


def test_design_weights_are_what_makes_the_published_estimator_consistent():
    """All pairs of n = 10 in orthogonal order but the last 22: nearly a table, of which most is of middle size."""
    n, value = 10, concave(10)
    table = value(all_coalitions(n))
    truth = exact_shapley_from_table(table)
    masks = draw_design("orthogonal", n, 1000)
    fit = partial(fit_shapley, masks, value(masks), v_empty=0.0, v_grand=table[-1], estimator="least_squares")
    weighted, as_drawn = (np.linalg.norm(fit(design=d).values - truth) for d in ("orthogonal", "kernel"))
    assert weighted < 0.2 * as_drawn


@pytest.mark.parametrize("fit", [*EXPLICIT[:5], "kernel_banzhaf", "msr", "datamodel"])
def test_pooled_repeats_are_one_more_precise_measurement(fit):
    masks, y = measured("size_adjusted", m=30)
    masks, first = np.unique(masks, axis=0, return_index=True)
    y = y[first]
    repeats = np.random.default_rng(3).integers(1, 4, size=len(y))
    swing = np.random.default_rng(4).normal(size=repeats.sum())
    rows = np.repeat(np.arange(len(y)), repeats)
    swing -= (np.bincount(rows, swing) / repeats)[rows]  # the mean of the repeats is y
    order = np.random.default_rng(5).permutation(len(rows))
    ends: dict[str, Any] = {"v_empty": 0.0, "v_grand": 1.0}
    if fit in EXPLICIT:
        ends |= {"design": "kernel"}
        call = partial(fit_shapley, estimator=fit, **ends)
    elif fit == "datamodel":
        call = partial(fit_datamodel, ridge=0.7)
    else:
        call = partial(fit_banzhaf, estimator=fit)
    repeated = call(masks[rows][order], (y[rows] + swing)[order])
    assert repeated.n_coalitions == len(rows)
    assert len(repeated.fit_keys) == len(y)
    if fit in ("unbiased", "msr"):  # where drawn twice counts twice, whatever the noise
        np.testing.assert_allclose(repeated.values, call(masks, y, weights=repeats).values, atol=1e-9)
        pooled = None
    elif fit == "size_adjusted":  # here the number of repeats also decides how the mass of a size is shared
        pooled = None
        twin = call(masks, y, weights=_size_mass(masks[rows], rows))
        np.testing.assert_allclose(repeated.values, twin.values, atol=1e-9)
    else:
        pooled = call(masks, y, behavior_variance=1.0 / repeats)
    if pooled is not None:
        tolerance = 1e-5 if fit == "gp" else 1e-9
        np.testing.assert_allclose(repeated.values, pooled.values, atol=tolerance)
        np.testing.assert_allclose(repeated.covariance, pooled.covariance, atol=tolerance)


def _size_mass(masks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sum over the rows of each coalition of the Shapley mass of its size, shared over the rows of the size."""
    sizes, n = masks.sum(axis=1), masks.shape[1]
    assert set(sizes) == set(range(1, n))
    return np.bincount(rows, 1.0 / (sizes * (n - sizes)) / np.bincount(sizes)[sizes])


def test_known_noise_weighs_by_its_inverse_variance():
    """The naive twin: normal equations of the constrained problem, row by row."""
    masks, y = measured("least_squares", m=30)
    variance = np.random.default_rng(2).uniform(0.1, 10.0, size=30)
    found = fit_shapley(masks, y, v_empty=0.1, v_grand=1.0, estimator="least_squares", behavior_variance=variance)
    x = masks.astype(float)
    normal = np.block([[x.T @ (x / variance[:, None]), np.ones((6, 1))], [np.ones((1, 6)), np.zeros((1, 1))]])
    twin = np.linalg.solve(normal, np.append(x.T @ ((y - 0.1) / variance), 0.9))[:6]
    np.testing.assert_allclose(found.values, twin, atol=1e-10)
    in_other_units = partial(fit_shapley, masks, y, v_empty=0.1, v_grand=1.0, estimator="least_squares")
    np.testing.assert_allclose(in_other_units(behavior_variance=1e6 * variance).values, twin, atol=1e-10)
    np.testing.assert_array_equal(in_other_units(behavior_variance=3.0).values, in_other_units().values)
    root = np.sqrt(variance)
    with_intercept = np.column_stack([x, np.ones(30)]) / root[:, None]
    twin = np.linalg.lstsq(with_intercept, y / root, rcond=None)[0]
    found = fit_banzhaf(masks, y, behavior_variance=variance)
    np.testing.assert_allclose([*found.values, found.intercept], twin, atol=1e-10)


def test_gp_is_told_the_prior_and_the_noise():
    masks, y = measured("gp", m=20)
    masks, first, repeats = np.unique(masks, axis=0, return_index=True, return_counts=True)
    y, prior = y[first], np.arange(6.0) ** 2
    direct = gaussian_process_contrasts(masks, y, relative_variances=1.0 / repeats, prior=prior)
    rows = np.repeat(np.arange(len(y)), repeats)
    found = fit_shapley(masks[rows], y[rows], v_empty=0.0, v_grand=1.0, estimator="gp", prior=prior)
    np.testing.assert_allclose(found.values, direct.contrasts + 1 / 6, atol=1e-5)
    np.testing.assert_allclose(found.covariance, direct.covariance, atol=1e-5)
    told: list[dict[str, Any]] = [{}, {"prior": prior}]
    for options in told:
        other = fit_shapley(masks, y, v_empty=0.0, v_grand=1.0, estimator="gp", **options)
        assert np.abs(other.values - found.values).max() > 1e-4


@pytest.mark.parametrize("estimator", REGRESSIONS)
def test_known_noise_saves_coalitions_where_noise_dominates(estimator):
    n, worth = 6, np.arange(6.0)
    errors = {True: [], False: []}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        masks = draw_design("stratified", n, 40, seed=seed)
        sd = np.exp(rng.uniform(np.log(0.2), np.log(5.0), size=40))
        y = masks @ worth + sd * rng.normal(size=40)
        for known, found in errors.items():
            options: dict[str, Any] = {"behavior_variance": sd**2} if known else {}
            credit = fit_shapley(masks, y, v_empty=0.0, v_grand=15.0, estimator=estimator, **options).values
            found.append(np.linalg.norm(credit - worth))
    assert np.mean(errors[True]) < 0.6 * np.mean(errors[False])


def pairs_and_singles() -> tuple[np.ndarray, np.ndarray]:
    """Twelve complement pairs and four coalitions without complement, of 6 contributors."""
    masks = draw_design("paired", 6, 32)
    masks = np.delete(masks, [3, 8, 17, 30], axis=0)
    return masks, concave(6)(masks) + np.random.default_rng(1).normal(scale=0.1, size=len(masks))


@pytest.mark.parametrize("estimator", REGRESSIONS)
def test_leave_out_diagnostics_are_those_of_fits_without_the_pair(estimator):
    masks, y = pairs_and_singles()
    v_grand, ridge = 0.9, 0.4 if estimator == "ridge" else 0.0
    options: dict[str, Any] = {"v_empty": 0.0, "v_grand": v_grand, "ridge": ridge, "weights": np.ones(len(y))}
    found = fit_shapley(masks, y, estimator=estimator, **options)

    sizes = masks.sum(axis=1)
    design = masks @ contrast_basis(6)
    response = y - v_grand * sizes / 6
    n_terms = 3 if estimator == "size_adjusted" else 0
    log_odds = np.log((sizes + 0.5) / (6 - sizes + 0.5))
    profile = np.vander(log_odds, n_terms) if n_terms else np.zeros((len(y), 0))  # any basis of the same polynomials
    both = np.hstack([design, profile])
    penalty = np.diag([ridge] * 5 + [0.0] * n_terms)

    def fitted(rows: np.ndarray) -> np.ndarray:
        x = both[rows]
        return both @ np.linalg.solve(x.T @ x + penalty, x.T @ response[rows])

    clusters = complement_clusters(masks)
    assert np.bincount(clusters).tolist().count(1) == 4
    missed = sum(((response - fitted(clusters != c))[clusters == c] ** 2).sum() for c in np.unique(clusters))
    null = profile if n_terms else np.ones((len(y), 1))
    spread = response - null @ np.linalg.lstsq(null, response, rcond=None)[0]
    np.testing.assert_allclose(found.loo_r2, 1 - missed / (spread @ spread), rtol=1e-9)


@pytest.mark.parametrize("estimator", REGRESSIONS)
def test_noise_is_found_where_the_model_holds(estimator):
    worth, found = np.array([3.0, 1.0, 2.0, -1.0, 0.5, 4.0]), []
    for seed in range(20):
        masks = draw_design("stratified", 6, 30, seed=seed)
        y = masks @ worth + np.random.default_rng(seed).normal(scale=0.2, size=30)
        found.append(fit_shapley(masks, y, v_empty=0.0, v_grand=worth.sum(), estimator=estimator))
    assert 0.18 < np.mean([f.noise_sd for f in found]) < 0.22
    assert min(f.loo_r2 for f in found) > 0.9


def test_ridge_leaves_out_whole_pairs_to_choose_its_penalty():
    masks, y = pairs_and_singles()
    y = y + np.random.default_rng(7).normal(scale=0.5, size=len(y))
    design, response = masks @ contrast_basis(6), y - masks.sum(axis=1) / 6
    clusters = complement_clusters(masks)

    def missed(penalty: float, groups: np.ndarray) -> float:
        total = 0.0
        for group in np.unique(groups):
            x, t = design[groups != group], response[groups != group]
            coefficients = np.linalg.solve(x.T @ x + penalty * np.eye(5), x.T @ t)
            total += ((response - design @ coefficients)[groups == group] ** 2).sum()
        return total

    best = min(RIDGE_PENALTIES, key=lambda penalty: missed(penalty, clusters))
    naive = min(RIDGE_PENALTIES, key=lambda penalty: missed(penalty, np.arange(len(y))))
    assert best != naive
    ends: dict[str, Any] = {"v_empty": 0.0, "v_grand": 1.0}
    found = fit_shapley(masks, y, estimator="ridge", **ends)
    np.testing.assert_allclose(found.values, fit_shapley(masks, y, estimator="ridge", ridge=best, **ends).values)


def test_ridge_needs_no_number_of_coalitions():
    masks = draw_design("orthogonal", 20, 2)
    found = fit_shapley(masks, np.array([0.2, 0.7]), v_empty=0.0, v_grand=1.0, estimator="ridge")
    np.testing.assert_allclose(found.values, 0.05, atol=1e-4)  # nothing predicts the only pair: equal credit
    masks = draw_design("orthogonal", 20, 12)
    found = fit_shapley(masks, concave(20)(masks), v_empty=0.0, v_grand=1.0, estimator="ridge")
    assert np.isfinite(found.covariance).all()
    assert found.rank < 20


def test_unbiased_is_the_published_estimator_with_exact_moments():
    """Covert and Lee (2021), eq. 7 with A by enumeration of the Shapley law."""
    n, (masks, y) = 5, measured("unbiased", n=5)
    every = all_coalitions(n, include_empty=False, include_grand=False).astype(float)
    sizes = every.sum(axis=1)
    mass = 1.0 / (sizes * (n - sizes) * np.bincount(sizes.astype(int))[sizes.astype(int)])
    inverse = np.linalg.inv(every.T @ (every * mass[:, None] / mass.sum()))
    v0, v1 = 0.2, 1.1
    b = (masks * (y - v0)[:, None]).mean(axis=0)
    twin = inverse @ (b - (inverse.sum(axis=0) @ b - (v1 - v0)) / inverse.sum())
    found = fit_shapley(masks, y, v_empty=v0, v_grand=v1, estimator="unbiased", design="kernel")
    np.testing.assert_allclose(found.values, twin, atol=1e-12)


def test_covariance_of_averages_by_hand():
    """Of rows drawn one by one the covariance of a mean; pairs and repeated measurements are summed first."""
    n, (masks, y) = 5, measured("unbiased", n=5)
    fit = partial(fit_shapley, v_empty=0.0, v_grand=1.0, estimator="unbiased")
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    scores = 2 * harmonic * (masks - masks.mean(axis=1, keepdims=True)) * y[:, None]
    np.testing.assert_allclose(fit(masks, y, design="kernel").covariance, np.cov(scores, rowvar=False) / 40, atol=1e-12)

    masks = draw_design("paired", n, 16)
    sizes, y = masks.sum(axis=1), y[:16]
    mass = 1 / (sizes * (n - sizes) * np.bincount(sizes)[sizes])
    mass /= mass.sum()
    assert set(sizes) == {1, 2, 3, 4}
    scores = 2 * harmonic * (masks - masks.mean(axis=1, keepdims=True)) * y[:, None]
    deviations = (mass[:, None] * (scores - mass @ scores)).reshape(8, 2, n).sum(axis=1)
    expected = deviations.T @ deviations * 8 / 7
    np.testing.assert_allclose(fit(masks, y, design="paired").covariance, expected, atol=1e-12)
    twice = fit(np.repeat(masks, 2, axis=0), np.repeat(y, 2), design="paired")
    np.testing.assert_allclose(twice.covariance, expected, atol=1e-12)

    masks, y = measured("msr", n=4, m=60)
    found = fit_banzhaf(masks, y, estimator="msr")
    with_and_without = [(y[masks[:, i]], y[~masks[:, i]]) for i in range(4)]
    np.testing.assert_allclose(found.values, [a.mean() - b.mean() for a, b in with_and_without])
    variances = [a.var() / len(a) + b.var() / len(b) for a, b in with_and_without]
    np.testing.assert_allclose(np.diag(found.covariance), np.array(variances) * 60 / 59)


def fit_walks(masks: np.ndarray, y: np.ndarray) -> Attributions:
    return fit_shapley(masks, y, v_empty=1.0, v_grand=7.0, estimator="permutation")


def test_permutation_is_the_mean_marginal_contribution():
    masks = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]], dtype=bool)  # 1, 0, 2 and 2, 1, 0
    found = fit_walks(masks, np.array([2.0, 4.0, 3.0, 4.0]))
    np.testing.assert_allclose(found.values, [(2 + 3) / 2, (1 + 1) / 2, (3 + 2) / 2])
    np.testing.assert_array_equal(walk_positions(masks), [[1, 0, 2], [2, 1, 0]])


def test_a_walk_and_its_reverse_are_one_draw():
    masks = draw_design("permutation", 5, 40, seed=0)  # its last two pairs of walks are equal, and two draws
    y = concave(5)(masks) + np.random.default_rng(0).normal(size=40)
    found = fit_walks(masks, y)
    both = np.diff(np.column_stack([np.full(10, 1.0), y.reshape(10, 4), np.full(10, 7.0)]))
    marginals = np.take_along_axis(both, walk_positions(masks), axis=1)
    pairs = marginals.reshape(5, 2, 5).mean(axis=1)
    np.testing.assert_allclose(found.covariance, np.cov(pairs, rowvar=False) / 5, atol=1e-12)
    # The reverse of a reverse begins another draw, and a walk without its reverse is one.
    masks, y = np.vstack([masks[:8], masks[:12]]), np.concatenate([y[:8], y[:12]])
    draws = np.vstack([pairs[[0, 0]] * 2, marginals[2:3]])
    deviations = draws - [[2], [2], [1]] * np.vstack([marginals[[0, 1, 0, 1, 2]]]).mean(axis=0)
    np.testing.assert_allclose(fit_walks(masks, y).covariance, deviations.T @ deviations / 25 * 1.5, atol=1e-12)
    masks, y = masks[:16], y[:16]
    assert np.isnan(fit_walks(masks[:8], y[:8]).covariance).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(0, 11), "found 11 rows: the last walk has 3 of 4"),
        ([1, 0, 2, 3], "rows 0, 1"),
        ([0, 1, 2, 7], "rows 3 do not"),
        ([0, 1, 2, 2], "rows 3 do not"),
    ],
)
def test_permutation_needs_complete_walks(rows, message):
    masks = draw_design("permutation", 5, 40)[rows]
    with pytest.raises(FitError, match=message):
        fit_walks(masks, np.ones(len(masks)))
    with pytest.raises(FitError, match="use gp or size_adjusted"):
        fit_walks(draw_design("kernel", 5, 8), np.ones(8))


def test_auto_chooses_and_says_so():
    masks, y = measured("gp")
    fit = partial(fit_shapley, masks, y, v_empty=0.0, v_grand=1.0)
    for name in ("auto", None):
        chosen = fit(estimator=name)
        assert chosen.estimator == "gp"
        assert "auto chose gp" in chosen.explanation
    np.testing.assert_array_equal(chosen.values, fit(estimator="gp").values)
    assert fit(estimator="gp").explanation == ""
    useless: list[dict[str, Any]] = [{"ridge": 0.1}, {"weights": np.ones(40)}, {"interval": "bootstrap"}]
    for options in useless:
        chosen = fit(**options)
        assert chosen.estimator == "size_adjusted"
        assert f"no use for {next(iter(options))}" in chosen.explanation


def test_auto_leaves_very_many_coalitions_to_a_regression(monkeypatch):
    monkeypatch.setattr("tribute.games.shapley.MAX_ROWS", 15)
    masks = draw_design("stratified", 6, 32)
    y = concave(6)(masks)
    fit = partial(fit_shapley, v_empty=0.0, v_grand=1.0, prior=np.arange(6.0))
    many = fit(masks, y)
    assert many.estimator == "size_adjusted"
    assert "takes 15, and there are 16 complement pairs; the prior is not used" in many.explanation
    assert fit(masks[:30], y[:30]).estimator == "gp"  # 15 pairs
    assert "29 coalitions" in fit(masks[:29], y[:29]).explanation


@pytest.mark.parametrize(
    ("estimator", "options", "serving"),
    [
        ("size_adjusted", {"prior": np.arange(5.0)}, "gp"),
        ("unbiased", {"prior": np.arange(5.0)}, "gp"),
        ("gp", {"interval": "bootstrap"}, "size_adjusted"),
        ("gp", {"weights": np.ones(20)}, "size_adjusted"),
        ("gp", {"ridge": 1.0}, "size_adjusted"),
        ("unbiased", {"ridge": 1.0}, "ridge"),
        ("permutation", {"weights": np.ones(20)}, "unbiased"),
    ],
)
def test_an_option_of_no_use_is_refused(estimator, options, serving):
    masks = draw_design("permutation", 5, 20)
    with pytest.raises(ConfigError, match=rf"no {next(iter(options))}.* with estimator='{estimator}'.*{serving}"):
        fit_shapley(masks, np.ones(20), v_empty=0.0, v_grand=1.0, estimator=estimator, **options)


@pytest.mark.parametrize("fit", ["unbiased", "msr"])
def test_averages_refuse_members_that_were_chosen(fit):
    masks, y = draw_design("orthogonal", 5, 20), np.arange(20.0)
    with pytest.raises(FitError, match=r"found design 'orthogonal', which chooses them\. Use "):
        if fit == "msr":
            fit_banzhaf(masks, y, estimator="msr", design="orthogonal")
        else:
            fit_shapley(masks, y, v_empty=0.0, v_grand=1.0, estimator="unbiased", design="orthogonal")


@pytest.mark.parametrize("estimator", [name for name in EXPLICIT if name not in ("gp", "ridge", *AVERAGES)])
@pytest.mark.parametrize("n", [2, 3])
def test_few_contributors_and_fewer_coalitions(estimator, n):
    masks = draw_design("orthogonal", n, 2)
    fit = partial(fit_shapley, masks, np.array([0.2, 0.5]), v_empty=0.0, v_grand=1.0, estimator=estimator)
    if n == 3:
        with pytest.raises(RankDeficientFit, match="Measure at least 1 more"):
            fit()
        return
    expected = 0.5 + (0.15 if masks[1, 0] else -0.15)
    np.testing.assert_allclose(fit().values, [expected, 1 - expected])


@pytest.mark.parametrize("estimator", [name for name in EXPLICIT if name != "permutation"])
def test_a_pair_may_lack_its_second_half(estimator):
    """An odd number of rows of a paired design: a run that is under way, or an evaluation that failed."""
    masks = draw_design("paired", 6, 31)
    found = fit_shapley(masks, concave(6)(masks), v_empty=0.0, v_grand=1.0, estimator=estimator, design="paired")
    assert np.isfinite(found.values).all()
    assert np.isfinite(found.covariance).all()


@pytest.mark.parametrize("estimator", ["size_adjusted", "ridge", "unbiased"])
def test_bootstrap_agrees_with_the_analytic_interval_on_pairs(estimator):
    masks = rows_for("gp", 6, 60)
    masks = np.vstack([masks, complements(masks)])
    y = concave(6)(masks) + np.random.default_rng(0).normal(scale=0.05, size=len(masks))
    fit = partial(fit_shapley, masks, y, v_empty=0.0, v_grand=1.0, estimator=estimator)
    ratio = fit(interval="bootstrap").standard_errors / fit().standard_errors
    assert ((ratio > 0.5) & (ratio < 2)).all()
