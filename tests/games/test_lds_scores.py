from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from tribute.errors import CoalitionError, ConfigError, FitError
from tribute.games.coalitions import coalition_keys
from tribute.games.kernels import fit_datamodel
from tribute.games.lds import (
    LDSTestSet,
    _ranks,
    compare_lds,
    disjoint_from,
    fit_at_sizes,
    lds,
    lds_ceiling,
    lds_convergence,
    rank_correlation,
)
from tribute.games.removal import draw_coalitions
from tribute.games.shapley import fit_shapley
from tribute.types import Attributions

N = 12
WORTH = np.random.default_rng(0).normal(size=N)
TEST_MASKS = draw_coalitions("datamodel", N, range(60))


def attributions(values=WORTH, fit_keys=frozenset()) -> Attributions:
    values = np.asarray(values, dtype=float)
    covariance = np.zeros((len(values), len(values)))
    return Attributions(values, covariance, "shapley", "given", "analytic", 1, len(values), 3.0, fit_keys)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = spearmanr(a, b)
    return result.statistic


def noisy(scale: float, n_seeds: int = 3) -> np.ndarray:
    return TEST_MASKS @ WORTH + np.random.default_rng(1).normal(scale=scale, size=(n_seeds, len(TEST_MASKS)))


def test_known_answers():
    y = np.exp(TEST_MASKS @ WORTH)  # any rising function keeps the ranks
    right, wrong = lds(attributions(), TEST_MASKS, y), lds(attributions(-WORTH), TEST_MASKS, y)
    np.testing.assert_allclose([right.mean, right.averaged, *right.interval], 1.0)
    np.testing.assert_allclose([wrong.mean, wrong.averaged, *wrong.interval], -1.0)
    assert (right.n_seeds, right.n_test, right.undefined_reason) == (1, 60, "")


def test_agrees_with_scipy_per_seed_and_averaged():
    y = noisy(2.0)
    predictions = TEST_MASKS @ WORTH
    found = lds(attributions(), TEST_MASKS, y)
    expected = [spearman(predictions, row) for row in y]
    np.testing.assert_allclose(found.per_seed, expected)
    np.testing.assert_allclose(found.mean, np.mean(expected))
    np.testing.assert_allclose(found.averaged, spearman(predictions, y.mean(axis=0)))
    assert found.averaged > found.mean


def test_rank_correlation_shares_ranks_between_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(4, size=(2, 5, 30))
    expected = [spearman(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4)))


def test_interval_is_the_bootstrap_over_coalitions_jointly_for_seeds():
    y = np.tile(noisy(2.0, 1), (3, 1))
    one, three = lds(attributions(), TEST_MASKS, y[0]), lds(attributions(), TEST_MASKS, y)
    np.testing.assert_allclose(three.interval, one.interval)
    assert one.interval[0] < one.mean < one.interval[1]
    np.testing.assert_allclose(three.per_seed_intervals, np.tile(one.interval, (3, 1)))
    wider = lds(attributions(), TEST_MASKS, y[0], level=0.99)
    assert np.ptp(wider.interval) > np.ptp(one.interval)
    other = lds(attributions(), TEST_MASKS, y[0], seed=1)
    assert (other.interval != one.interval).any()
    assert -1 <= one.interval[0] <= one.interval[1] <= 1


def test_intervals_agree_with_a_naive_bootstrap_over_coalitions_and_seeds():
    y = noisy(2.0)
    test_set = LDSTestSet.prepare(TEST_MASKS, y, n_bootstrap=40, level=0.8)
    predictions = TEST_MASKS @ WORTH
    means, averaged, second = [], [], []
    for rows, seeds in zip(test_set.coalition_draws, test_set.seed_draws, strict=True):
        means.append(np.mean([spearman(predictions[rows], y[seed][rows]) for seed in seeds]))
        averaged.append(spearman(predictions[rows], y[seeds].mean(axis=0)[rows]))
        second.append(spearman(predictions[rows], y[1][rows]))
    found = test_set.score(attributions())
    np.testing.assert_allclose(found.interval, np.quantile(means, [0.1, 0.9]))
    np.testing.assert_allclose(found.averaged_interval, np.quantile(averaged, [0.1, 0.9]))
    np.testing.assert_allclose(found.per_seed_intervals[1], np.quantile(second, [0.1, 0.9]))
    assert len({tuple(sorted(seeds)) for seeds in test_set.seed_draws.tolist()}) > 5
    direct = lds(attributions(), TEST_MASKS, y, n_bootstrap=40, level=0.8)
    np.testing.assert_array_equal(direct.interval, found.interval)


def test_the_interval_holds_the_score_with_other_training_seeds():
    """Every training seed shifts the worth of contributors: with few of them, the seeds matter most."""
    stream = np.random.default_rng(5)
    masks = draw_coalitions("datamodel", N, range(150))
    n_seeds, n_studies = 8, 60

    def behaviors(n: int) -> np.ndarray:
        return (WORTH + stream.normal(scale=1.5, size=(n, N))) @ masks.T

    truth = lds(attributions(), masks, behaviors(2000), n_bootstrap=2).mean
    both, coalitions = 0, 0
    for _ in range(n_studies):
        test_set = LDSTestSet.prepare(masks, behaviors(n_seeds), n_bootstrap=150)
        low, high = test_set.score(attributions()).interval
        both += low <= truth <= high
        fixed = LDSTestSet(**{**vars(test_set), "seed_draws": np.tile(np.arange(n_seeds), (150, 1))})
        low, high = fixed.score(attributions()).interval
        coalitions += low <= truth <= high
    assert both / n_studies >= 0.85
    assert coalitions / n_studies < both / n_studies - 0.1


def test_bootstrap_interval_covers_the_correlation_of_the_law():
    """Bivariate normal with correlation rho has Spearman correlation 6/pi asin(rho/2)."""
    rho, covered = 0.6, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, e = rng.normal(size=(2, 80))
        found = lds_ceiling(np.stack([x, rho * x + np.sqrt(1 - rho**2) * e]), n_bootstrap=200, level=0.9)
        covered.append(found.interval[0] <= 6 / np.pi * np.arcsin(rho / 2) <= found.interval[1])
    assert np.mean(covered) > 0.8


def other_attributions(scale: float = 1.0) -> Attributions:
    return attributions(WORTH + np.random.default_rng(9).normal(scale=scale, size=N))


def test_a_comparison_is_the_difference_on_the_same_draws():
    y, first, second = noisy(2.0), attributions(), other_attributions()
    found = compare_lds(first, second, TEST_MASKS, y, n_bootstrap=40, level=0.8)
    scores = [lds(item, TEST_MASKS, y).mean for item in (first, second)]
    np.testing.assert_allclose(found.difference, scores[0] - scores[1])
    test_set = LDSTestSet.prepare(TEST_MASKS, y, n_bootstrap=40, level=0.8)
    naive = [
        np.mean([spearman(TEST_MASKS[rows] @ first.values, y[seed][rows]) for seed in seeds])
        - np.mean([spearman(TEST_MASKS[rows] @ second.values, y[seed][rows]) for seed in seeds])
        for rows, seeds in zip(test_set.coalition_draws, test_set.seed_draws, strict=True)
    ]
    np.testing.assert_allclose(found.interval, np.quantile(naive, [0.1, 0.9]))
    np.testing.assert_allclose(found.probability, np.mean(np.array(naive) > 0))
    assert (found.n_test, found.level, found.undefined_reason) == (60, 0.8, "")
    back = test_set.compare(second, first)
    np.testing.assert_allclose(back.difference, -found.difference)
    np.testing.assert_allclose(back.interval, -found.interval[::-1])
    np.testing.assert_allclose(back.probability, 1 - found.probability)


def test_a_comparison_of_equals_is_even():
    same = compare_lds(attributions(), attributions(2 * WORTH + 1), TEST_MASKS, noisy(2.0))  # alpha fixes the size
    assert (same.difference, same.probability) == (0.0, 0.5)
    np.testing.assert_array_equal(same.interval, [0.0, 0.0])


def test_a_comparison_is_sharper_than_two_intervals():
    y, close = noisy(3.0), other_attributions(0.3)
    found = compare_lds(attributions(), close, TEST_MASKS, y)
    alone = [float(np.ptp(lds(item, TEST_MASKS, y).interval)) for item in (attributions(), close)]
    assert np.ptp(found.interval) < 0.5 * np.linalg.norm(alone)


def test_a_comparison_that_does_not_exist_says_why():
    equal = compare_lds(attributions(), attributions(np.zeros(N)), TEST_MASKS, noisy(1.0))
    assert np.isnan([equal.difference, equal.probability, *equal.interval]).all()
    assert "predictions of all 60 test coalitions are equal" in equal.undefined_reason
    keys = frozenset(coalition_keys(TEST_MASKS[7:8]))
    for pair in ((attributions(), attributions(fit_keys=keys)), (attributions(fit_keys=keys), attributions())):
        with pytest.raises(FitError, match="not fitted to, found 1"):
            compare_lds(*pair, TEST_MASKS, noisy(1.0))
    with pytest.raises(CoalitionError, match="5 contributors"):
        compare_lds(attributions(), attributions(WORTH[:5]), TEST_MASKS, noisy(1.0))


def test_test_coalitions_of_several_sizes_are_scored_together():
    masks = np.vstack([draw_coalitions("datamodel", N, range(20), datamodel_alpha=a) for a in (0.25, 0.5, 0.75)])
    found = lds(attributions(), masks, masks @ WORTH)
    np.testing.assert_allclose([found.mean, *found.interval], 1.0)


def test_fit_coalitions_cannot_be_tested():
    keys = frozenset(coalition_keys(TEST_MASKS[7:8]))
    with pytest.raises(FitError, match=f"found 1 that were, such as {next(iter(keys))}"):
        lds(attributions(fit_keys=keys), TEST_MASKS, noisy(1.0))


def test_disjoint_from_keeps_what_can_be_fitted():
    fit_masks = np.vstack([TEST_MASKS[:5], ~TEST_MASKS[:1], draw_coalitions("shapley", N, range(50))])
    keep = disjoint_from(fit_masks, TEST_MASKS)
    assert not keep[:5].any()
    tested = {tuple(mask) for mask in TEST_MASKS}
    np.testing.assert_array_equal(keep, [tuple(mask) not in tested for mask in fit_masks])
    with pytest.raises(CoalitionError, match="contributors"):
        disjoint_from(fit_masks, TEST_MASKS[:, :3])


def test_undefined_scores_say_why():
    equal = lds(attributions(np.full(N, 0.1)), TEST_MASKS, noisy(1.0))
    assert np.isnan([equal.mean, equal.averaged, *equal.interval]).all()
    assert "predictions of all 60 test coalitions are equal" in equal.undefined_reason
    nothing = lds(attributions(np.zeros(N)), TEST_MASKS, noisy(1.0))
    assert "predictions" in nothing.undefined_reason
    y = noisy(1.0)
    y[1] = 4.0
    flat = lds(attributions(), TEST_MASKS, y)
    assert np.isnan([flat.mean, flat.per_seed[1], *flat.interval]).all()
    assert np.isfinite([flat.per_seed[0], flat.averaged]).all()
    assert "behaviors of all 60 test coalitions are equal" in flat.undefined_reason
    assert "behaviors" in lds_ceiling(y).undefined_reason
    rare = lds(attributions(), TEST_MASKS, (np.arange(60) == 0).astype(float), n_bootstrap=50)
    assert np.isfinite(rare.mean)


def test_ceiling_tells_noise():
    quiet, loud = lds_ceiling(noisy(0.1)), lds_ceiling(noisy(20.0))
    assert quiet.value > 0.95
    assert abs(loud.value) < 0.3
    y = noisy(2.0)
    found = lds_ceiling(y)
    expected = [spearman(y[i], y[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(found.per_pair, expected)
    np.testing.assert_allclose(found.value, np.mean(expected))
    assert found.interval[0] < found.value < found.interval[1]
    # True attributions have no noise of their own: they beat a retraining, up to about the square root.
    score = lds(attributions(), TEST_MASKS, y).mean
    assert found.value < score
    assert abs(score - found.noise_free) < 0.1


def test_convergence_reports_every_size():
    masks = draw_coalitions("shapley", N, range(150))
    keep = disjoint_from(masks, TEST_MASKS)
    masks = masks[keep]
    y = masks @ WORTH + np.random.default_rng(2).normal(scale=0.5, size=len(masks))
    fit = partial(fit_shapley, estimator="size_adjusted", v_empty=0.0, v_grand=float(WORTH.sum()))
    curve = lds_convergence(masks, y, TEST_MASKS, noisy(0.5), sizes=[5, 20, 100, 1000], fit=fit, n_bootstrap=50)
    assert [entry.n_fit for entry in curve] == [5, 20, 100, 1000]
    assert curve[0].result is None
    assert "independent coalitions" in curve[0].missing_reason
    assert curve[3].result is None
    assert "Expected 1000 fit coalitions" in curve[3].missing_reason
    assert curve[1].result is not None
    assert curve[2].result is not None
    assert curve[2].result.mean > curve[1].result.mean - 0.05
    assert curve[2].result.mean > 0.9
    direct = lds(fit(masks[:100], y[:100]), TEST_MASKS, noisy(0.5), n_bootstrap=50)
    np.testing.assert_array_equal(curve[2].result.interval, direct.interval)


def test_fits_at_sizes_are_those_of_the_first_coalitions():
    masks = draw_coalitions("shapley", N, range(60))
    y = masks @ WORTH
    fits = fit_at_sizes(masks, y, sizes=[30, 60, 61], fit=fit_datamodel)
    assert [at.n_fit for at in fits] == [30, 60, 61]
    for at in fits[:2]:
        assert at.attributions is not None
        np.testing.assert_array_equal(at.attributions.values, fit_datamodel(masks[: at.n_fit], y[: at.n_fit]).values)
    assert fits[2].attributions is None
    assert "found 60" in fits[2].missing_reason
    with pytest.raises(FitError, match="finite"):
        fit_at_sizes(masks, np.where(y == y[3], np.nan, y), sizes=[10], fit=fit_datamodel)


def test_convergence_does_not_hide_an_overlap():
    with pytest.raises(FitError, match="not fitted to"):
        lds_convergence(TEST_MASKS, noisy(1.0)[0], TEST_MASKS, noisy(1.0), sizes=[30], fit=fit_datamodel)
    with pytest.raises(FitError, match="at least 1 fit coalition"):
        lds_convergence(TEST_MASKS, noisy(1.0)[0], TEST_MASKS, noisy(1.0), sizes=[0], fit=fit_datamodel)


def test_bad_input():
    y = noisy(1.0)
    score = partial(lds, attributions())
    with pytest.raises(FitError, match="at least 3 test coalitions"):
        score(TEST_MASKS[:2], y[:, :2])
    with pytest.raises(FitError, match="Expected test behaviors"):
        score(TEST_MASKS, y[:, :5])
    with pytest.raises(FitError, match="Expected test behaviors"):
        score(TEST_MASKS, y[None])
    with pytest.raises(FitError, match="finite"):
        score(TEST_MASKS, np.where(y == y[0, 0], np.nan, y))
    with pytest.raises(CoalitionError, match="12 contributors"):
        score(TEST_MASKS[:, :5], y)
    with pytest.raises(FitError, match="finite attributions"):
        lds(attributions(np.full(N, np.nan)), TEST_MASKS, y)
    with pytest.raises(ConfigError, match="n_bootstrap"):
        score(TEST_MASKS, y, n_bootstrap=0)
    with pytest.raises(ConfigError, match="level"):
        score(TEST_MASKS, y, level=95)
    for behaviors in (y[0], y[:1]):
        with pytest.raises(FitError, match="at least 2 training seeds"):
            lds_ceiling(behaviors)
    with pytest.raises(FitError, match="at least 3 test coalitions"):
        lds_ceiling(y[:, :2])


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [2.0, 1.0, 2.0, 2.0, 0.0], [1.0], [1.0, np.nan, 2.0]])
def test_ranks_are_those_of_scipy(values: list[float]) -> None:
    rows = np.array([values, values[::-1]])
    assert np.array_equal(_ranks(rows), rankdata(rows, axis=-1), equal_nan=True)
