from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from tribute.errors import ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import all_coalitions, coalition_keys
from tribute.games.exact import exact_banzhaf_from_table
from tribute.games.kernels import (
    ATTRIBUTION_KERNELS,
    DATAMODEL_PENALTIES,
    fit_add_one_in,
    fit_banzhaf,
    fit_datamodel,
    fit_loo,
)
from tribute.games.removal import draw_coalitions


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
    found = ATTRIBUTION_KERNELS[kernel](
        masks,
        masks.astype(np.float64) @ worth + 2.0,
        v_empty=2.0,
        v_grand=2.0 + worth.sum(),
        behavior_variance=0.01,
    )
    if kernel == "datamodel":  # fixed-size coalitions leave the common level to the intercept
        np.testing.assert_allclose(np.diff(found.values), np.diff(worth), atol=1e-4)
        np.testing.assert_allclose(found.predict(masks), masks @ worth + 2.0, atol=1e-4)
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
    oracle: Any = RidgeCV(alphas=DATAMODEL_PENALTIES).fit(masks.astype(float), y)
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
    alone = np.eye(3, dtype=bool)[[2, 0, 1, 0]]
    masks, sign, fit = (~alone, -1, fit_loo) if kernel == "loo" else (alone, 1, fit_add_one_in)
    ends: dict[str, Any] = {"v_empty": 1.0, "v_grand": 10.0}
    base = 10.0 if kernel == "loo" else 1.0
    y = np.array([7.0, 4.0, 8.0, 6.0])
    found = fit(masks, y, **ends, v_empty_variance=0.5, v_grand_variance=0.5)
    np.testing.assert_allclose(found.values, sign * (np.array([5.0, 8.0, 7.0]) - base))
    # One contributor was measured twice, 1 off its mean each time: variance 2 with one degree of freedom.
    np.testing.assert_allclose(found.covariance, np.diag([1.0, 2.0, 2.0]) + 0.5)
    known = fit(masks, y, **ends, behavior_variance=4.0)
    np.testing.assert_allclose(known.covariance, np.diag([2.0, 4.0, 4.0]))
    np.testing.assert_allclose(found.predict(masks)[[0, 2]], y[[0, 2]])
    assert np.isnan(fit(masks[:3], y[:3], **ends).covariance).all()


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
    ]
    for option in options:
        with pytest.raises(ConfigError, match=next(iter(option))):
            ATTRIBUTION_KERNELS[kernel](masks, np.ones(4), v_empty=0.0, v_grand=1.0, **option)
    with pytest.raises(FitError, match="finite"):
        ATTRIBUTION_KERNELS[kernel](masks, np.full(4, np.inf), v_empty=0.0, v_grand=1.0)
