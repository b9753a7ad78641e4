from __future__ import annotations

import numpy as np
import pytest

from tribute.games.regression import Regression, bootstrap_covariance, contrast_basis, pool_repeats, size_profile


def test_pool_repeats_in_order_of_appearance():
    masks = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], dtype=bool)
    y = np.array([1.0, 2.0, 4.0, 9.0, 2.0, 7.0])
    variances = np.array([1.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    pooled, behaviors, pooled_variances, coalition_idx = pool_repeats(masks, y, variances)
    np.testing.assert_array_equal(pooled, masks[[0, 1, 3]])
    np.testing.assert_allclose(behaviors, [(1.0 + 2.0 + 3.5) / 2.0, 2.0, 9.0])
    np.testing.assert_allclose(pooled_variances, [0.5, 0.5, 3.0])
    np.testing.assert_array_equal(coalition_idx, [0, 1, 0, 2, 1, 0])


def test_repeats_that_agree_keep_their_value_to_the_last_bit():
    masks = np.ones((7, 2), dtype=bool)
    assert pool_repeats(masks, np.full(7, 0.1), np.linspace(0.3, 3, 7))[1].tolist() == [0.1]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_contrast_basis(n):
    basis = contrast_basis(n)
    np.testing.assert_allclose(basis.T @ basis, np.eye(n - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(axis=0), 0.0, atol=1e-12)


def test_size_profile_is_odd_and_even_in_turn():
    profile = size_profile(np.arange(1, 10), 10, 4)
    np.testing.assert_allclose(profile[::-1], profile * [1, -1, 1, -1], atol=1e-12)
    assert size_profile(np.arange(1, 10), 10, 0).shape == (9, 0)


@pytest.mark.parametrize("ridge", [0.0, 1.5])
def test_covariance_is_hc3_with_clusters_left_out(ridge):
    """The naive twin refits without every cluster."""
    rng = np.random.default_rng(0)
    design, nuisance, weights = rng.normal(size=(20, 4)), rng.normal(size=(20, 2)), rng.uniform(0.5, 2.0, size=20)
    weights /= weights.mean()
    response, clusters = (
        rng.normal(size=20),
        np.repeat([3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10], [2, 2, 3, 1, 2] + [2] * 4 + [1, 1]),
    )
    regression = Regression.factorise(design, nuisance, weights)
    both = np.hstack([design, nuisance]) * np.sqrt(weights)[:, None]
    target = response * np.sqrt(weights)
    penalty = np.diag([ridge] * 4 + [0.0] * 2)
    gain = np.linalg.solve(both.T @ both + penalty, both.T)
    np.testing.assert_allclose(regression.coefficients(response, ridge), (gain @ target)[:4])
    np.testing.assert_allclose(regression.gain(ridge), gain[:4] * np.sqrt(weights), atol=1e-12)
    expected = np.zeros((4, 4))
    for cluster in np.unique(clusters):
        out = clusters == cluster
        x = both[~out]
        missed = (target - both @ np.linalg.solve(x.T @ x + penalty, x.T @ target[~out]))[out]
        score = gain[:4, out] @ missed
        expected += np.outer(score, score)
    np.testing.assert_allclose(regression.covariance(response, ridge, clusters), expected, atol=1e-12)


def test_bootstrap_draws_whole_clusters():
    clusters = np.array([0, 1, 0, 2, 1])
    seen = []

    def refit(rows: np.ndarray) -> np.ndarray:
        seen.append(np.bincount(rows, minlength=5))
        return rows[:1].astype(float)

    bootstrap_covariance(refit, clusters, 30, np.random.default_rng(0))
    counts = np.array(seen)
    np.testing.assert_array_equal(counts[:, [0, 1]], counts[:, [2, 4]])
    np.testing.assert_array_equal(counts[:, [0, 1, 3]].sum(axis=1), 3)
