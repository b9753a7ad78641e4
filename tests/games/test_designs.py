from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from tribute.errors import CoalitionError, ConfigError
from tribute.games import designs
from tribute.games.coalitions import all_coalitions, coalition_keys
from tribute.games.designs import (
    DESIGNS,
    PAIRED_DESIGNS,
    banzhaf_size_law,
    coalition_of,
    coalitions_from,
    design_rows,
    draw_design,
    sampling_weights,
    size_law_weights,
)
from tribute.games.removal import draw_coalition, draw_coalitions, shapley_size_law

# Chance that a right law fails a test here; seeds are fixed, so a failure is a change of the code.
SIGNIFICANCE = 1e-3


def proper(n):
    return all_coalitions(n, include_empty=False, include_grand=False)


def pair_probabilities(n, eta=1.0):
    """Law of the smaller half's size of a pair, from enumeration: the mass of every size is (k (n - k))^-eta."""
    sizes = np.arange(1, n)
    mass = (1.0 / (sizes * (n - sizes))) ** eta
    smaller = np.minimum(sizes, n - sizes)
    return np.array([mass[smaller == size].sum() for size in range(1, n // 2 + 1)]) / mass.sum()


def smaller_sizes(masks):
    sizes = masks[::2].sum(axis=1)
    return np.minimum(sizes, masks.shape[1] - sizes)


def posterior(masks):
    """Covariance of the contrasts after the pairs of a design, directly: prior I - J/n, noise 0.1 n / 4."""
    n = masks.shape[1]
    z = masks[::2] - masks[::2].mean(axis=1, keepdims=True)
    return np.linalg.inv(np.eye(n) + z.T @ z / (0.025 * n)) - np.ones((n, n)) / n


@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_row_does_not_depend_on_how_many_follow(design, n):
    m = min(60, 2**n - 2)
    masks = draw_design(design, n, m, seed=3)
    assert masks.shape == (m, n)
    assert masks.dtype == bool
    for fewer in {0, 1, m // 3, m - 1}:
        np.testing.assert_array_equal(draw_design(design, n, fewer, seed=3), masks[:fewer])
    sizes = masks.sum(axis=1)
    assert sizes.min() >= 1
    assert sizes.max() <= n - 1


@pytest.mark.parametrize("n", range(2, 11))
@pytest.mark.parametrize("design", PAIRED_DESIGNS)
def test_a_paired_design_goes_through_all_coalitions_once_in_pairs(design, n):
    masks = np.array(list(design_rows(design, n, seed=1)))
    np.testing.assert_array_equal(masks[::2], ~masks[1::2])
    assert sorted(coalition_keys(masks)) == sorted(coalition_keys(proper(n)))
    np.testing.assert_array_equal(masks, draw_design(design, n, 2**n - 2, seed=1))


def test_draws_are_pinned():
    golden = {
        "orthogonal": "12:0815 12:0fbb 12:0dde 12:0ffd 12:0a00 12:0cc1 12:0080 12:0787",
        "paired": "12:0201 12:0edf 12:0506 12:0c19 12:0044 12:0fde 12:0d72 12:0ff7",
        "stratified": "12:048b 12:0050 12:06f5 12:0def 12:0bbe 12:0008 12:0024 12:0800",
        "permutation": "12:0008 12:0219 12:02db 12:0aff 12:0500 12:0d24 12:0de6 12:0ff7",
    }
    for design, keys in golden.items():
        assert coalition_keys(draw_design(design, 12, 24))[::3] == keys.split(), design


@pytest.mark.parametrize("design", DESIGNS)
def test_seeds_give_other_designs(design):
    drawn = {draw_design(design, 10, 20, seed=seed).tobytes() for seed in range(5)}
    assert len(drawn) == 5


def test_kernel_rows_are_the_published_draws():
    np.testing.assert_array_equal(draw_design("kernel", 9, 30, seed=7), draw_coalitions("shapley", 9, range(7, 37)))


def test_paired_passes_over_repeats_of_the_shapley_law():
    # Of 7 pairs of 4 contributors, drawn one by one from their law until two are different.
    n = 4
    pairs = [key for key, mask in zip(coalition_keys(proper(n)), proper(n), strict=True) if mask[0]]
    of_size = {1: 1 / 4, 2: 1 / 3}
    law = pair_probabilities(n)
    p = {}
    for key, mask in zip(coalition_keys(proper(n)), proper(n), strict=True):
        size = min(mask.sum(), n - mask.sum())
        p[key] = law[size - 1] * of_size[size]
    expected = {(a, b): p[a] * p[b] / (1 - p[a]) for a in pairs for b in pairs if a != b}
    assert sum(expected.values()) == pytest.approx(1.0)
    found = Counter()
    for seed in range(5000):
        masks = draw_design("paired", n, 3, seed=seed)[[0, 2]]
        found[tuple(coalition_keys(masks ^ ~masks[:, :1]))] += 1
    counts = [found[outcome] for outcome in expected]
    assert sum(counts) == 5000
    assert chisquare(counts, 5000 * np.array(list(expected.values()))).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("design", PAIRED_DESIGNS)
def test_either_half_of_a_pair_leads(design):
    leading = np.vstack([draw_design(design, 11, 40, seed=seed)[::2] for seed in range(20)])
    small = int((leading.sum(axis=1) < 5.5).sum())
    assert chisquare([small, len(leading) - small]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("n", [40, 41])
def test_stratified_sizes_follow_the_shapley_law_at_every_length(n):
    seen = smaller_sizes(draw_design("stratified", n, 220))[:, None] == np.arange(1, n // 2 + 1)
    expected = np.arange(1, 111)[:, None] * pair_probabilities(n)
    assert np.abs(np.cumsum(seen, axis=0) - expected).max() < 2.0  # independent draws stray by 5


@pytest.mark.parametrize("n", [40, 41])
def test_orthogonal_sizes_are_uniform_for_two_n_and_then_follow_the_square_root(n):
    seen = smaller_sizes(draw_design("orthogonal", n, 5 * n))[:, None] == np.arange(1, n // 2 + 1)
    first, later = np.cumsum(seen[:n], axis=0), np.cumsum(seen[n:], axis=0)
    assert np.abs(first - np.arange(1, len(first) + 1)[:, None] * pair_probabilities(n, 0.0)).max() < 2.0
    assert np.abs(later - np.arange(1, len(later) + 1)[:, None] * pair_probabilities(n, 0.5)).max() < 2.0


@pytest.mark.parametrize("design", ["stratified", "orthogonal"])
def test_the_mass_of_a_used_up_size_goes_to_the_nearest(design):
    n = 14
    counts = np.bincount(smaller_sizes(draw_design(design, n, 300)), minlength=n // 2 + 1)[1:]
    wanted = pair_probabilities(n) if design == "stratified" else pair_probabilities(n, 0.5)
    assert counts[0] == n < 150 * wanted[0]
    if design == "stratified":  # size 1 wants 37 pairs more than there are, which go to size 2 but no other
        overflow = 150 * wanted[:2].sum() - n
        assert abs(counts[1] - overflow) < 3.0
        assert np.abs(counts[2:] - 150 * wanted[2:]).max() < 3.0


@pytest.mark.parametrize("design", PAIRED_DESIGNS)
def test_members_of_early_pairs_are_uniform_given_the_size(design):
    drawn = Counter()
    for seed in range(1500):
        mask = draw_design(design, 6, 4, seed=seed)[2]
        drawn.update(coalition_keys((mask if mask.sum() < 3 else ~mask)[None]))
    for size in (1, 2):
        keys = coalition_keys(proper(6)[proper(6).sum(axis=1) == size])
        assert chisquare([drawn[key] for key in keys]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("design", PAIRED_DESIGNS)
def test_pairs_have_nothing_in_common(design):
    masks = draw_design(design, 400, 150)[::2]
    masks = masks[smaller_sizes(masks.repeat(2, axis=0)) > 80]
    assert len(masks) > 10
    z = masks - masks.mean(axis=1, keepdims=True)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    assert np.abs(np.triu(z @ z.T, 1)).max() < 5 / np.sqrt(400)


@pytest.mark.parametrize("n", [6, 9, 10])
def test_every_orthogonal_pair_is_the_best_within_an_exchange(n):
    masks = draw_design("orthogonal", n, min(90, 2**n - 2), seed=2)
    every = proper(n)
    used = set()
    for row in range(0, len(masks), 2):
        chosen = masks[row]
        before = posterior(masks[:row]) if row else np.eye(n) - 1.0 / n
        z = every - every.mean(axis=1, keepdims=True)
        gains = ((z @ before) ** 2).sum(axis=1) / (0.025 * n + ((z @ before) * z).sum(axis=1))
        same_size = every.sum(axis=1) == chosen.sum()
        free = np.array([key not in used for key in coalition_keys(every)])
        n_left = (same_size & free).sum()
        near = (every != chosen).sum(axis=1) <= 2
        rivals = same_size & free & (near if n_left >= same_size.sum() / 2 else True)
        gain = gains[(every == chosen).all(axis=1)][0]
        assert gain >= gains[rivals].max() * (1 - 1e-6)
        used.update(coalition_keys(masks[row : row + 2]))


@pytest.mark.parametrize(("n", "multiple", "at_most"), [(20, 1, 0.97), (20, 2, 0.65), (20, 5, 0.75), (60, 2, 0.65)])
def test_orthogonal_pairs_tell_more_than_random_ones_of_the_same_sizes(n, multiple, at_most):
    masks = draw_design("orthogonal", n, multiple * n)
    rng = np.random.default_rng(0)
    random = [np.trace(posterior(rng.permuted(masks[::2], axis=1).repeat(2, axis=0))) for _ in range(10)]
    assert np.trace(posterior(masks)) < at_most * np.mean(random)


def test_rounding_does_not_change_the_orthogonal_design(monkeypatch):
    masks = draw_design("orthogonal", 20, 80)

    class Rounded(designs._Posterior):
        def __init__(self, n_contributors):
            super().__init__(n_contributors)
            error = 1e-14 * np.random.default_rng(0).standard_normal((2, n_contributors, n_contributors))
            self.covariance += error[0] + error[0].T
            self.square += error[1] + error[1].T

    monkeypatch.setattr(designs, "_Posterior", Rounded)
    np.testing.assert_array_equal(draw_design("orthogonal", 20, 80), masks)


def test_the_recursion_stays_exact_and_symmetric(monkeypatch):
    kept = []

    class Kept(designs._Posterior):
        def __init__(self, n_contributors):
            super().__init__(n_contributors)
            kept.append(self)

    monkeypatch.setattr(designs, "_Posterior", Kept)
    masks = draw_design("orthogonal", 10, 2**10 - 2)
    exact = posterior(masks)
    np.testing.assert_allclose(kept[0].covariance, exact, rtol=1e-9)
    np.testing.assert_allclose(kept[0].square, exact @ exact, rtol=1e-7)
    for matrix in (kept[0].covariance, kept[0].square):
        np.testing.assert_array_equal(matrix, matrix.T)


def test_permutation_blocks_are_nested_and_antithetic():
    n = 7
    blocks = draw_design("permutation", n, 6 * (n - 1)).reshape(3, 2, n - 1, n)
    assert (blocks.sum(axis=-1) == np.arange(1, n)).all()
    assert (blocks[:, :, :-1] <= blocks[:, :, 1:]).all()
    np.testing.assert_array_equal(blocks[:, 1], ~blocks[:, 0, ::-1])


def test_permutations_are_uniform():
    first = Counter()
    for row in islice(design_rows("permutation", 3), 0, 4 * 1500, 4):
        first.update(coalition_keys(row[None]))
    both = Counter(draw_design("permutation", 3, 2, seed=seed).tobytes() for seed in range(1200))
    assert len(first) == 3
    assert len(both) == 6
    for counts in (first, both):
        assert chisquare(list(counts.values())).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("design", DESIGNS)
def test_many_contributors(design):
    masks = draw_design(design, 1000, 24)
    assert masks.shape == (24, 1000)
    assert len({mask.tobytes() for mask in masks}) == 24
    if design in PAIRED_DESIGNS:
        np.testing.assert_array_equal(masks[::2], ~masks[1::2])


@pytest.mark.parametrize("design", PAIRED_DESIGNS)
def test_nearly_exhausted_sizes_do_not_stop_a_design(design):
    masks = draw_design(design, 11, 2000, seed=5)
    assert len({mask.tobytes() for mask in masks}) == 2000


# Weights


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("kernel", ["shapley", "banzhaf"])
def test_weighted_averages_over_all_coalitions_are_expectations_under_the_law(kernel, n):
    masks = np.array(list(design_rows("stratified", n)))
    behaviors = np.random.default_rng(0).standard_normal(len(masks))
    sizes = masks.sum(axis=1)
    if kernel == "shapley":  # one of C(n, k) coalitions of a size whose mass is 1 / (k (n - k))
        same = np.array([(sizes == size).sum() for size in sizes])
        p = 1.0 / (sizes * (n - sizes) * same)
    else:
        p = np.ones(len(masks))
    weights = sampling_weights(masks, kernel, "stratified")
    assert weights.mean() == pytest.approx(1.0)
    assert weights @ behaviors / len(masks) == pytest.approx(p @ behaviors / p.sum())


def test_measured_sizes_get_the_mass_of_those_that_were_not():
    law = np.array([0.4, 0.3, 0.2, 0.1, 0.0])  # sizes 1 to 5
    weights = size_law_weights(np.array([1, 4, 4, 1, 4]), 6, law)
    # 2 is nearer to 1, 3 and 5 to 4.
    np.testing.assert_allclose(weights, 5 * np.array([0.35, 0.1, 0.1, 0.35, 0.1]))
    halves = size_law_weights(np.array([1, 3]), 6, law)
    np.testing.assert_allclose(halves, 2 * np.array([0.4 + 0.15, 0.15 + 0.2 + 0.1]))


@pytest.mark.parametrize("design", DESIGNS)
def test_weights_are_ones_only_where_the_design_follows_the_law(design):
    masks = draw_design(design, 8, 42)
    weights = sampling_weights(masks, "shapley", design)
    by_size = size_law_weights(masks.sum(axis=1), 8, shapley_size_law(8))
    np.testing.assert_array_equal(weights, np.ones(42) if design == "kernel" else by_size)
    by_size = size_law_weights(masks.sum(axis=1), 8, banzhaf_size_law(8))
    np.testing.assert_array_equal(sampling_weights(masks, "banzhaf", design), by_size)


def test_weights_know_removal_distributions():
    masks = draw_coalitions("uniform", 6, range(30))
    np.testing.assert_array_equal(sampling_weights(masks, "banzhaf", "uniform"), np.ones(30))
    np.testing.assert_array_equal(sampling_weights(masks, "shapley", "shapley"), np.ones(30))
    elsewhere = sampling_weights(masks, "shapley", None)
    np.testing.assert_array_equal(elsewhere, sampling_weights(masks, "shapley", "uniform"))
    assert np.ptp(elsewhere) > 0


def test_the_banzhaf_law_counts_coalitions():
    counts = np.bincount(proper(9).sum(axis=1), minlength=9)[1:]
    np.testing.assert_allclose(banzhaf_size_law(9), counts / counts.sum())
    np.testing.assert_allclose(banzhaf_size_law(2000).sum(), 1.0)


# What evaluations record


@pytest.mark.parametrize("design", DESIGNS)
def test_a_coalition_is_the_row_of_its_seed(design):
    masks = draw_design(design, 7, 12)
    for row in (0, 5, 11):
        np.testing.assert_array_equal(coalition_of(design, 7, row), masks[row])
    for row, (seed, mask) in zip(range(3, 12), coalitions_from(design, 7, 3), strict=False):
        assert seed == row
        np.testing.assert_array_equal(mask, masks[row])


@pytest.mark.parametrize("law", ["shapley", "shapley_complement", "datamodel", "uniform", "loo", "empty", None])
def test_a_coalition_of_a_removal_distribution_is_its_draw(law):
    drawn = draw_coalition(law, 7, 4, datamodel_alpha=0.3)
    np.testing.assert_array_equal(coalition_of(law, 7, 4, datamodel_alpha=0.3), drawn)
    seed, mask = next(coalitions_from(law, 7, 4, datamodel_alpha=0.3))
    assert seed == 4
    np.testing.assert_array_equal(mask, drawn)


# Bad input


def test_unknown_designs_and_kernels_are_errors():
    with pytest.raises(ConfigError, match=r"one of orthogonal, paired, stratified, kernel, permutation; found 'best'"):
        draw_design("best", 5, 2)
    with pytest.raises(ConfigError, match="'best'"):
        coalition_of("best", 5, 2)
    with pytest.raises(ConfigError, match="shapley or banzhaf, found 'loo'"):
        sampling_weights(proper(3), "loo", None)


@pytest.mark.parametrize("design", DESIGNS)
def test_numbers_out_of_range_are_errors(design):
    with pytest.raises(CoalitionError, match=r"at least 2 contributors.*found 1"):
        draw_design(design, 1, 1)
    with pytest.raises(CoalitionError, match="at least 1 contributor"):
        design_rows(design, 0)
    bad: Any
    for bad in (-1, 1.5, True):
        with pytest.raises(ConfigError, match=r"n_coalitions.* >= 0"):
            draw_design(design, 5, bad)
        with pytest.raises(ConfigError, match=r"seed.* >= 0"):
            draw_design(design, 5, 2, seed=bad)
        with pytest.raises(ConfigError, match=r"removal_seed.* >= 0"):
            coalition_of(design, 5, bad)


@pytest.mark.parametrize("design", PAIRED_DESIGNS)
def test_more_coalitions_than_exist_are_an_error(design):
    with pytest.raises(CoalitionError, match=r"at most 6 coalitions.* 3 contributors.*found 7"):
        draw_design(design, 3, 7)
    with pytest.raises(CoalitionError, match="found 7"):
        coalition_of(design, 3, 6)


def test_weights_of_end_points_are_an_error():
    for masks in (all_coalitions(3, include_grand=False), all_coalitions(3, include_empty=False)):
        with pytest.raises(CoalitionError, match="empty or the grand"):
            sampling_weights(masks, "shapley", None)
