from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from tribute.errors import CoalitionError, ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import all_coalitions, coalition_keys
from tribute.games.designs import draw_design
from tribute.games.exact import exact_banzhaf_from_table
from tribute.games.kernels import (
    ATTRIBUTION_KERNELS,
    BANZHAF_ESTIMATORS,
    fit_add_one_in,
    fit_banzhaf,
    fit_datamodel,
    fit_loo,
)
from tribute.games.regression import RIDGE_PENALTIES
from tribute.games.removal import draw_coalitions
from tribute.games.shapley import fit_shapley


def measured(dist: str, n: int, m: int, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    masks = draw_coalitions(dist, n, range(m))
    rng = np.random.default_rng(seed)
    return masks, masks.astype(np.float64) @ np.arange(float(n)) + 5.0 + rng.normal(scale=noise, size=m)


def test_one_signature():
    keywords = [list(inspect.signature(fit).parameters) for fit in ATTRIBUTION_KERNELS.values()]
    assert all(names == keywords[0] for names in keywords)
    assert list(ATTRIBUTION_KERNELS) == ["shapley", "datamodel", "banzhaf", "loo", "add_one_in"]


COALITIONS = {
    "shapley": "shapley",
    "datamodel": "datamodel",
    "banzhaf": "uniform",
    "loo": "loo",
    "add_one_in": "add_one_in",
}


@pytest.mark.parametrize("kernel", ATTRIBUTION_KERNELS)
def test_every_kernel_finds_an_additive_game(kernel):
    n = 6
    worth = np.array([3.0, -1.0, 0.5, 2.0, 0.0, 4.0])
    masks = draw_coalitions(COALITIONS[kernel], n, range(n if kernel in ("loo", "add_one_in") else 60))
    fit = partial(fit_shapley, estimator="size_adjusted") if kernel == "shapley" else ATTRIBUTION_KERNELS[kernel]
    found = fit(
        masks,
        masks.astype(np.float64) @ worth + 2.0,
        v_empty=2.0,
        v_grand=2.0 + worth.sum(),
        behavior_variance=0.01,
    )
    if kernel == "datamodel":  # fixed-size coalitions leave the common level to the intercept
        np.testing.assert_allclose(np.diff(found.values), np.diff(worth), atol=1e-4)
        np.testing.assert_allclose(found.predict(masks), masks @ worth + 2.0, atol=3e-4)
    else:
        np.testing.assert_allclose(found.values, worth, atol=1e-9)
        np.testing.assert_allclose(found.intercept, 2.0, atol=1e-9)
    assert found.kernel == kernel
    assert found.n_coalitions == len(masks)
    assert found.fit_keys == set(coalition_keys(masks))
    assert np.isfinite(found.covariance).all()


@pytest.mark.parametrize("kernel", ATTRIBUTION_KERNELS)
def test_constant_behavior_credits_nobody(kernel):
    masks = draw_coalitions(COALITIONS[kernel], 5, range(5 if kernel in ("loo", "add_one_in") else 30))
    found = ATTRIBUTION_KERNELS[kernel](masks, np.full(len(masks), 0.7), v_empty=0.7, v_grand=0.7)
    np.testing.assert_array_equal(found.values, 0.0)


@pytest.mark.parametrize("kernel", ATTRIBUTION_KERNELS)
def test_equivariant_to_the_unit_of_the_behavior(kernel):
    masks, y = measured(COALITIONS[kernel], 5, 5 if kernel in ("loo", "add_one_in") else 40)
    fit = ATTRIBUTION_KERNELS[kernel]
    plain = fit(masks, y, v_empty=5.0, v_grand=15.0)
    scaled = fit(masks, -1e3 * y + 7.0, v_empty=-5e3 + 7, v_grand=-15e3 + 7)
    np.testing.assert_allclose(scaled.values, -1e3 * plain.values, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(scaled.predict(masks), -1e3 * plain.predict(masks) + 7.0, rtol=1e-7)


@pytest.mark.parametrize(
    ("dist", "n", "m", "noise"),
    [("uniform", 6, 40, 0.3), ("datamodel", 10, 30, 5.0), ("shapley", 20, 15, 3.0)],
)
def test_datamodel_is_ridge_cv(dist, n, m, noise):
    masks, y = measured(dist, n, m, noise)
    masks, first = np.unique(masks, axis=0, return_index=True)  # repeats are pooled, which RidgeCV does not do
    y = y[first]
    oracle: Any = RidgeCV(alphas=RIDGE_PENALTIES).fit(masks.astype(float), y)
    found = fit_datamodel(masks, y)
    np.testing.assert_allclose(found.values, oracle.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.intercept, oracle.intercept_, rtol=1e-8)
    fixed = fit_datamodel(masks, y, ridge=float(oracle.alpha_))
    np.testing.assert_allclose(fixed.values, oracle.coef_, rtol=1e-6, atol=1e-9)


def test_datamodel_needs_no_number_of_coalitions():
    found = fit_datamodel(np.array([[True, False]]), np.array([3.0]))
    np.testing.assert_array_equal(found.values, 0.0)
    assert found.intercept == 3.0
    assert np.isnan(found.covariance).all()


@pytest.mark.parametrize("n", [2, 3, 6])
def test_banzhaf_on_all_coalitions_is_exact(n):
    table = np.random.default_rng(n).normal(size=2**n)
    found = fit_banzhaf(all_coalitions(n), table)
    np.testing.assert_allclose(found.values, exact_banzhaf_from_table(table), atol=1e-10)
    assert found.rank == n


def test_banzhaf_weights_undo_another_law():
    n, table = 4, np.random.default_rng(0).normal(size=16)
    repeats = np.random.default_rng(1).integers(1, 5, size=16)
    masks = np.repeat(all_coalitions(n), repeats, axis=0)
    found = fit_banzhaf(masks, np.repeat(table, repeats), weights=np.repeat(1.0 / repeats, repeats))
    np.testing.assert_allclose(found.values, exact_banzhaf_from_table(table), atol=1e-10)


def test_banzhaf_names_what_is_missing():
    masks, y = measured("uniform", 6, 40)
    masks[:, 3] = True
    with pytest.raises(RankDeficientFit, match=r"contributors 3 \(d\)\. Measure at least 1"):
        fit_banzhaf(masks, y, contributor_names=list("abcdef"))
    assert fit_banzhaf(masks, y, ridge=0.1).rank == 5
    masks, y = measured("datamodel", 6, 40)
    with pytest.raises(RankDeficientFit, match="at least two sizes"):
        fit_banzhaf(masks, y)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_msr_on_all_coalitions_is_exact(n):
    table = np.random.default_rng(n).normal(size=2**n)
    found = fit_banzhaf(all_coalitions(n), table, estimator="msr")
    np.testing.assert_allclose(found.values, exact_banzhaf_from_table(table), atol=1e-10)
    assert (found.estimator, found.rank) == ("msr", n)
    np.testing.assert_allclose(found.predict(all_coalitions(n)).mean(), table.mean(), atol=1e-10)


@pytest.mark.parametrize("estimator", BANZHAF_ESTIMATORS)
@pytest.mark.parametrize("design", [None, "stratified", "kernel"])
def test_banzhaf_estimators_are_consistent_for_the_coalitions_of_a_design(design, estimator):
    n, errors, covered = 5, [], []
    table = np.random.default_rng(0).normal(size=2**n)
    proper = np.where(np.isin(np.arange(2**n), [0, 2**n - 1]), np.nan, table)
    pairs = [proper.reshape(-1, 2, 2**i) for i in range(n)]
    truth = np.array([np.nanmean(p[:, 1]) - np.nanmean(p[:, 0]) for p in pairs])  # among the proper coalitions
    if estimator == "kernel_banzhaf":
        every = all_coalitions(n, include_empty=False, include_grand=False)
        truth = fit_banzhaf(every, table[1:-1]).values
    for seed in range(60):
        n_rows = 20 if design == "stratified" else 100
        if design:
            masks = draw_design(design, n, n_rows, seed=1000 * seed)
        else:
            masks = draw_coalitions("uniform", n, range(1000 * seed, 1000 * seed + n_rows))
        y = table[masks @ (1 << np.arange(n))] + np.random.default_rng(seed).normal(scale=0.1, size=n_rows)
        found = fit_banzhaf(masks, y, estimator=estimator, design=design)
        low, high = found.intervals(0.9).T
        errors.append(found.values - truth)
        covered.append((low <= truth) & (truth <= high))
    bias = np.abs(np.mean(errors, axis=0))
    assert (bias < 5 * np.std(errors, axis=0) / np.sqrt(len(errors)) + 0.02).all()
    assert np.mean(covered) > 0.84


def test_msr_names_what_is_missing():
    masks, y = measured("uniform", 6, 40)
    masks[:, 3] = True
    with pytest.raises(RankDeficientFit, match=r"contributors 3 \(d\)\. Measure"):
        fit_banzhaf(masks, y, estimator="msr", contributor_names=list("abcdef"))
    with pytest.raises(ConfigError, match="ridge 0 with estimator='msr'"):
        fit_banzhaf(masks, y, estimator="msr", ridge=1.0)
    with pytest.raises(ConfigError, match="kernel_banzhaf, msr; found 'magic'"):
        fit_banzhaf(masks, y, estimator="magic")
    with pytest.raises(CoalitionError, match="empty or the grand"):
        fit_banzhaf(all_coalitions(3), np.ones(8), design="kernel")


@pytest.mark.parametrize("kernel", ["datamodel", "banzhaf"])
def test_diagnostics_find_the_noise(kernel):
    found = []
    for seed in range(20):
        masks, y = measured("uniform", 5, 40, seed=seed)
        found.append(ATTRIBUTION_KERNELS[kernel](masks, y))
    assert 0.26 < np.mean([f.noise_sd for f in found]) < 0.34
    assert min(f.loo_r2 for f in found) > 0.95


@pytest.mark.parametrize("kernel", ["datamodel", "banzhaf"])
def test_bootstrap_agrees_with_the_analytic_interval(kernel):
    masks, y = measured("uniform", 6, 80)
    fit = ATTRIBUTION_KERNELS[kernel]
    ratio = fit(masks, y, interval="bootstrap").standard_errors / fit(masks, y).standard_errors
    assert ((ratio > 0.5) & (ratio < 2)).all()


def test_banzhaf_intervals_cover():
    covered = []
    for seed in range(60):
        masks, y = measured("uniform", 5, 40, seed=seed)
        low, high = fit_banzhaf(masks, y).intervals(0.9).T
        covered.append((low <= np.arange(5)) & (np.arange(5) <= high))
    assert 0.85 < np.mean(covered) < 0.97


@pytest.mark.parametrize("kernel", ["loo", "add_one_in"])
def test_one_at_a_time(kernel):
    """Values, covariance and noise by hand."""
    alone = np.eye(3, dtype=bool)[[2, 0, 1, 0]]
    masks, sign, fit = (~alone, -1, fit_loo) if kernel == "loo" else (alone, 1, fit_add_one_in)
    ends: dict[str, Any] = {"v_empty": 1.0, "v_grand": 10.0}
    base = 10.0 if kernel == "loo" else 1.0
    y = np.array([7.0, 4.0, 8.0, 6.0])
    found = fit(masks, y, **ends, v_empty_variance=0.5, v_grand_variance=0.5)
    np.testing.assert_allclose(found.values, sign * (np.array([5.0, 8.0, 7.0]) - base))
    # One contributor was measured twice, 1 off its mean each time: variance 2 with one degree of freedom.
    np.testing.assert_allclose(found.covariance, np.diag([1.0, 2.0, 2.0]) + 0.5)
    np.testing.assert_array_equal(fit(masks, y, **ends, weights=np.arange(4.0)).values, found.values)
    known = fit(masks, y, **ends, behavior_variance=4.0)
    np.testing.assert_allclose(known.covariance, np.diag([2.0, 4.0, 4.0]))
    np.testing.assert_allclose(found.predict(masks)[[0, 2]], y[[0, 2]])
    assert np.isnan(fit(masks[:3], y[:3], **ends).covariance).all()
    np.testing.assert_allclose([found.noise_sd, known.noise_sd], [np.sqrt(2.0), 2.0])
    # Contributor 0 was measured with variances 1 and 3: weights 3/4 and 1/4, variance 3/4.
    unequal = fit(masks, y, **ends, behavior_variance=np.array([2.0, 1.0, 2.0, 3.0]))
    np.testing.assert_allclose(unequal.values[0], sign * (4.5 - base))
    np.testing.assert_allclose(unequal.covariance, np.diag([0.75, 2.0, 2.0]))


@pytest.mark.parametrize("fit", [fit_loo, fit_add_one_in])
def test_one_at_a_time_bad_input(fit):
    masks = np.eye(4, dtype=bool)
    masks = ~masks if fit is fit_loo else masks
    ends: dict[str, Any] = {"v_empty": 0.0, "v_grand": 1.0}
    with pytest.raises(RankDeficientFit, match=r"contributors 1 \(b\), 3 \(d\)\. Measure those 2"):
        fit(masks[[0, 2]], np.ones(2), **ends, contributor_names=list("abcd"))
    mixed = masks.copy()
    mixed[2, :2] = [True, False]
    mixed[2, 2:] = [True, False]
    with pytest.raises(FitError, match=r"exactly one contributor.* rows 2"):
        fit(mixed, np.ones(4), **ends)
    with pytest.raises(FitError, match="Expected v_"):
        fit(masks, np.ones(4))


@pytest.mark.parametrize("kernel", ATTRIBUTION_KERNELS)
def test_bad_options(kernel):
    masks = draw_coalitions(COALITIONS[kernel], 4, range(4))
    options: list[dict[str, Any]] = [
        {"ridge": -1.0},
        {"interval": "x"},
        {"behavior_variance": -1.0},
        {"contributor_names": ["a"]},
        {"design": "magic"},
        {"prior": np.ones(3)},
        {"behavior_variance": np.ones(3)},
    ]
    for option in options:
        with pytest.raises((ConfigError, FitError), match=next(iter(option))):
            ATTRIBUTION_KERNELS[kernel](masks, np.ones(4), v_empty=0.0, v_grand=1.0, **option)
    with pytest.raises(FitError, match="finite"):
        ATTRIBUTION_KERNELS[kernel](masks, np.full(4, np.inf), v_empty=0.0, v_grand=1.0)
