from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, studentized_range

from tribute.errors import ConfigError, FitError
from tribute.games.removal import draw_coalitions
from tribute.games.shapley import fit_shapley
from tribute.games.uncertainty import (
    check_covariance,
    difference,
    differences,
    rank_intervals,
    separation,
    simultaneous_intervals,
)
from tribute.types import Attributions

RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(6, 6))
VALUES = RNG.normal(size=6)
NAMES = ["Ann", "Bo", "Cy", "Di", "Ed", "Flo"]


def attributions(values: Any, covariance: Any, n_coalitions: int = 100) -> Attributions:
    values, covariance = np.asarray(values, dtype=float), np.asarray(covariance, dtype=float)
    return Attributions(values, covariance, "shapley", "given", "analytic", n_coalitions, len(values), 0.0)


def contrasts(n: int) -> np.ndarray:
    """Covariance of independent errors from which the mean was taken: singular, as that of Shapley contrasts."""
    return np.eye(n) - 1.0 / n


GENERAL = attributions(VALUES, 0.2 * FACTOR @ FACTOR.T)
UNKNOWN = attributions(VALUES, np.full((6, 6), np.nan))


def test_a_difference_is_exact():
    for i, j in ((0, 1), (4, 2), (5, 0)):
        found, back = difference(GENERAL, i, j), difference(GENERAL, j, i)
        direction = np.eye(6)[i] - np.eye(6)[j]
        variance = direction @ GENERAL.covariance @ direction
        assert found.value == pytest.approx(VALUES[i] - VALUES[j])
        assert found.standard_error == pytest.approx(np.sqrt(variance))
        np.testing.assert_allclose(found.interval, found.value + np.array([-1, 1]) * 1.959964 * np.sqrt(variance))
        np.testing.assert_allclose(back.interval, -found.interval[::-1])
        assert found.separated == back.separated == (abs(found.value) > 1.959964 * found.standard_error)
    sharp = attributions(VALUES, 1e-6 * np.eye(6))
    assert difference(sharp, 0, 1).separated
    assert difference(sharp, 1, 0).separated
    narrower = difference(GENERAL, 0, 1, level=0.5)
    assert np.ptp(narrower.interval) == pytest.approx(2 * norm.ppf(0.75) * narrower.standard_error)
    same = difference(GENERAL, 3, 3)
    assert (same.value, same.standard_error, same.separated) == (0.0, 0.0, False)


def test_what_moves_all_alike_does_not_blur_differences_or_ranks():
    shifted = attributions(VALUES + 40.0, GENERAL.covariance + 25.0)
    for i in range(6):
        np.testing.assert_allclose(difference(shifted, i, 2).interval, difference(GENERAL, i, 2).interval, atol=1e-9)
    found, expected = separation(shifted), separation(GENERAL)
    assert found is not None
    assert expected is not None
    assert (found.better, found.worse, found.n_more) == (expected.better, expected.worse, expected.n_more)
    ranks = [rank_intervals(item, n_draws=20_000) for item in (shifted, GENERAL)]
    assert np.abs(ranks[0] - ranks[1]).max() <= 1  # other draws of the same law
    together = attributions([1.0, 0.0], 1e6 * np.ones((2, 2)) + np.diag([0.01, 0.01]))
    assert difference(together, 0, 1).separated
    np.testing.assert_array_equal(rank_intervals(together), [[1, 1], [2, 2]])


def test_all_differences_are_those_of_each_pair():
    values, intervals = differences(GENERAL, level=0.9)
    assert values.shape == (6, 6)
    for i in range(6):
        for j in range(6):
            one = difference(GENERAL, i, j, level=0.9)
            assert values[i, j] == pytest.approx(one.value)
            np.testing.assert_allclose(intervals[i, j], one.interval, atol=1e-12)
    wider = differences(GENERAL, level=0.9, simultaneous=True)[1]
    assert (np.ptp(wider, axis=-1) >= np.ptp(intervals, axis=-1)).all()


@pytest.mark.parametrize("n", [3, 8])
def test_simultaneous_differences_are_tukeys(n: int):
    """Of equal independent variances the largest difference has the studentized range's law, and so without mean."""
    for covariance in (np.eye(n), contrasts(n)):
        intervals = differences(attributions(np.zeros(n), covariance), simultaneous=True, n_draws=40_000)[1]
        assert intervals[0, 1, 1] == pytest.approx(studentized_range.ppf(0.95, n, np.inf), rel=0.02)


@pytest.mark.parametrize("n", [3, 20])
def test_simultaneous_intervals_are_sidaks(n: int):
    scales = np.linspace(0.1, 10, n)
    intervals = simultaneous_intervals(attributions(np.zeros(n), np.diag(scales**2)), 0.9, n_draws=40_000)
    np.testing.assert_allclose(intervals[:, 1] / scales, norm.ppf((1 + 0.9 ** (1 / n)) / 2), rtol=0.02)
    np.testing.assert_allclose(intervals.mean(axis=1), 0.0, atol=1e-12)


def test_where_all_errors_are_multiples_of_one_simultaneous_intervals_are_exact():
    direction = np.array([1.0, -2.0, 0.0, 3.0])
    item = attributions(np.arange(4.0), np.outer(direction, direction))
    np.testing.assert_allclose(simultaneous_intervals(item), item.intervals(), rtol=1e-6)
    np.testing.assert_allclose(differences(item, simultaneous=True)[1], differences(item)[1], rtol=1e-6, atol=1e-6)
    two = attributions([1.0, 2.0], contrasts(2))
    np.testing.assert_allclose(simultaneous_intervals(two), two.intervals(), rtol=1e-6)
    certain = attributions(np.arange(4.0), np.zeros((4, 4)))
    np.testing.assert_array_equal(simultaneous_intervals(certain), np.repeat(np.arange(4.0)[:, None], 2, axis=1))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """400 estimates of the same truth, with a singular covariance and two equal contributors."""
    truth = np.array([0.0, 0.0, 0.6, 1.0, 3.0])
    true_first = np.array([(truth > value).sum() + 1 for value in truth])
    true_last = np.array([(truth >= value).sum() for value in truth])
    covariance = 0.1 * contrasts(5)
    errors = np.random.default_rng(1).multivariate_normal(np.zeros(5), covariance, size=400, method="eigh")
    held = {"values": 0, "differences": 0, "ranks": 0}
    for seed, error in enumerate(errors):
        item = attributions(truth + error, covariance)
        low, high = simultaneous_intervals(item, n_draws=500, seed=seed).T
        held["values"] += bool(((low <= truth) & (truth <= high)).all())
        bounds = differences(item, simultaneous=True, n_draws=500, seed=seed)[1]
        gaps = truth[:, None] - truth
        held["differences"] += bool(((bounds[..., 0] <= gaps + 1e-9) & (gaps - 1e-9 <= bounds[..., 1])).all())
        first, last = rank_intervals(item, simultaneous=True, n_draws=500, seed=seed).T
        held["ranks"] += bool(((first <= true_first) & (true_last <= last)).all())
    shares = {name: count / 400 for name, count in held.items()}
    assert 0.92 <= shares["values"] <= 0.98, shares
    assert 0.92 <= shares["differences"] <= 0.98, shares
    assert shares["ranks"] >= shares["differences"]


@pytest.mark.parametrize(("gap", "expected"), [(1.8, [1, 2]), (2.12, [1, 1])])
def test_two_contributors_share_ranks_until_their_difference_is_certain(gap: float, expected: list[int]):
    item = attributions([gap * np.sqrt(2), 0.0], contrasts(2))  # a difference of standard error sqrt(2)
    for simultaneous in (False, True):
        ranks = rank_intervals(item, simultaneous=simultaneous, n_draws=20_000)
        assert ranks[0].tolist() == expected
        np.testing.assert_array_equal(ranks[1], 3 - ranks[0][::-1])
    assert difference(item, 0, 1).separated == (expected == [1, 1])


def test_rank_intervals_are_the_quantiles_of_simulated_ranks():
    """A naive twin: another generator, another factor of the covariance, ranks by counting."""
    draws = np.random.default_rng(3).multivariate_normal(VALUES, GENERAL.covariance, size=20_000, method="cholesky")
    ranks = 1 + (draws[:, None, :] > draws[:, :, None]).sum(axis=2)
    found = rank_intervals(GENERAL, 0.8, n_draws=20_000)
    for i, (low, high) in enumerate(found):
        assert (ranks[:, i] < low).mean() <= 0.11
        assert (ranks[:, i] <= low).mean() >= 0.09
        assert (ranks[:, i] > high).mean() <= 0.11
        assert (ranks[:, i] >= high).mean() >= 0.09


def test_ranks_turn_around_with_the_direction_and_the_sign():
    up, down = rank_intervals(GENERAL, seed=4), rank_intervals(GENERAL, higher_is_better=False, seed=4)
    assert np.abs(up - (7 - down[:, ::-1])).max() <= 1
    negated = attributions(-VALUES, GENERAL.covariance)
    assert np.abs(rank_intervals(negated, higher_is_better=False) - rank_intervals(GENERAL)).max() <= 1
    for simultaneous in (False, True):
        for sign in (1.0, -1.0):
            certain = attributions(sign * np.array([3.0, 1.0, 2.0]), 1e-9 * contrasts(3))
            found = rank_intervals(certain, higher_is_better=sign > 0, simultaneous=simultaneous)
            assert found.tolist() == [[1, 1], [3, 3], [2, 2]]


def test_equal_contributors_hold_all_the_ranks_that_they_share():
    certain = attributions([2.0, 1.0, 1.0, 1.0, 0.0], np.zeros((5, 5)))
    assert rank_intervals(certain).tolist() == [[1, 1], [2, 4], [2, 4], [2, 4], [5, 5]]
    # Three that always move together, beside one that moves by itself.
    factor = np.array([[0.3, 0.1], [0.3, 0.1], [0.3, 0.1], [0.0, 0.7]])
    for values in ([1.0, 1.0, 1.0, 0.9], [1e6, 1e6, 1e6, 1e6]):
        ranks = rank_intervals(attributions(values, factor @ factor.T))
        np.testing.assert_array_equal(ranks[:3], np.tile(ranks[0], (3, 1)))
        assert ranks[0, 1] - ranks[0, 0] >= 2


def test_rounding_separates_nobody():
    """Two that always move together, among others of all scales; sums in another order."""
    for seed in range(20):
        stream = np.random.default_rng(seed)
        factor = stream.normal(size=(7, 3)) * np.geomspace(1e-3, 1e3, 7)[:, None]
        factor[4] = factor[1]
        covariance = factor @ factor.T * (1 + 1e-16 * stream.integers(-2, 3, size=(7, 7)))
        values = np.arange(7.0)
        values[[1, 4]] = 0.3, 0.1 + 0.2
        item = attributions(values, covariance)
        assert difference(item, 1, 4).standard_error == 0.0
        ranks = rank_intervals(item, n_draws=500)
        np.testing.assert_array_equal(ranks[1], ranks[4])
        found = separation(item)
        assert found is None or {found.better, found.worse} != {1, 4}
    together = np.ones((60, 60)) * (1 + 1e-16 * np.random.default_rng(0).integers(-2, 3, size=(60, 60)))
    np.testing.assert_array_equal(rank_intervals(attributions(np.zeros(60), together)), np.tile([1, 60], (60, 1)))
    certain = attributions([0.1 + 0.2, 0.3, 5.0], np.zeros((3, 3)))
    assert rank_intervals(certain).tolist() == [[2, 3], [2, 3], [1, 1]]


def test_a_simulation_is_named_by_its_seed():
    draw = partial(simultaneous_intervals, GENERAL, n_draws=100)
    np.testing.assert_array_equal(draw(seed=1), draw(seed=1))
    assert (draw(seed=1) != draw(seed=2)).any()


def test_what_is_unknown_stays_unknown():
    assert np.isnan(difference(UNKNOWN, 0, 1).standard_error)
    assert not difference(UNKNOWN, 0, 1).separated
    for simultaneous in (False, True):
        assert np.isnan(differences(UNKNOWN, simultaneous=simultaneous)[1]).all()
        assert rank_intervals(UNKNOWN, simultaneous=simultaneous).tolist() == [[1, 6]] * 6
    assert np.isnan(simultaneous_intervals(UNKNOWN)).all()
    assert separation(UNKNOWN) is None


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_after_that_many_more_coalitions_the_neighbours_are_separated(higher_is_better: bool):
    """Exactly: one fewer does not do, if the variance falls as 1/m and the values stay."""
    covariance = contrasts(9)
    values = np.array([5.0, 4.0, 8.0, 1.0, 0.5, 20.0, 40.0, 60.0, 80.0])

    def after(n_more: int) -> Attributions:
        return attributions(values, covariance * 40 / (40 + n_more), 40 + n_more)

    found = separation(after(0), higher_is_better=higher_is_better)
    assert found is not None
    assert found.n_more is not None
    assert {found.better, found.worse} == {0, 1}  # the widest gap of those that are not separated
    assert (found.better == 0) == higher_is_better
    assert (found.n_coalitions, found.n_unseparated) == (40, 2)
    assert difference(after(found.n_more), 0, 1).separated
    assert not difference(after(found.n_more - 1), 0, 1).separated
    later = separation(after(found.n_more), higher_is_better=higher_is_better)
    assert later is not None
    assert {later.better, later.worse} == {3, 4}


def test_neighbours_are_those_of_the_ranking_and_only_what_is_not_separated_counts():
    covariance = np.diag([1.0, 1.0, 30.0, 30.0])
    found = separation(attributions([100.0, 90.0, 14.0, 0.0], covariance))
    assert found is not None
    assert (found.better, found.worse, found.n_unseparated) == (2, 3, 1)
    assert found.difference == pytest.approx(14.0)
    assert found.half_width == pytest.approx(1.959964 * np.sqrt(60))
    assert separation(attributions([100.0, 90.0, 80.0, 60.0], np.eye(4))) is None
    assert separation(attributions([3.0], np.eye(1))) is None


@pytest.mark.parametrize(
    ("variance", "n_more", "unpaired", "paired"),
    [
        (0.18, 20, "20 more coalitions", "10 more pairs of coalitions"),
        (0.1367, 3, "3 more coalitions", "2 more pairs of coalitions"),
        (0.1319, 1, "1 more coalition", "1 more pair of coalitions"),
    ],
)
def test_the_sentence_counts_pairs_where_pairs_are_measured(variance: float, n_more: int, unpaired: str, paired: str):
    # E.g. 50 (1.96 sqrt(0.36))^2 = 69.1 coalitions, and so 70, separate the first two.
    values = [1.0, 0.0, -9.0, -19.0, -29.0, -39.0, -49.0]
    found = separation(attributions(values, variance * np.eye(7), 50))
    assert found is not None
    assert found.n_more == n_more
    now = f"should separate Ann and Bo (now their difference is 1 +- {1.959964 * np.sqrt(2 * variance):.3g})"
    assert found.sentence(NAMES, paired=False) == f"{unpaired} {now}"
    assert found.sentence(NAMES, paired=True) == f"{paired} {now}"


def test_contributors_that_are_too_close_cannot_be_told_apart_in_practice():
    far = [100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0]
    for gap, reachable in ((0.0, False), (0.619, False), (0.621, True)):  # 1.96 sqrt(2) / sqrt(20) = 0.6198
        found = separation(attributions([gap, 0.0, *far], np.eye(10), 30))
        assert found is not None
        assert (found.n_more is not None) == reachable
        sentence = found.sentence(["Ann", "Bo", *"abcdefgh"], paired=True)
        too_far = "Ann and Bo cannot be told apart in practice: it would take more than 20 times the 30 coalitions"
        assert sentence.startswith(too_far) != reachable
        assert found.n_more is None or 18 * 30 < found.n_more <= 19 * 30


@pytest.mark.parametrize(("n_more", "reachable"), [(4, True), (5, False)])
def test_there_must_be_so_many_coalitions(n_more: int, reachable: bool):
    gap = 1.959964 * np.sqrt(2 * 26 / (26 + n_more - 0.5))  # of the 30 coalitions of 5 contributors 26 are measured
    found = separation(attributions([gap, 0.0, 20.0, 40.0, 60.0], np.eye(5), 26))
    assert found is not None
    assert found.n_more == (n_more if reachable else None)
    assert ("more than the 30 coalitions that there are" in found.sentence(NAMES, paired=False)) != reachable
    repeated = separation(attributions([gap, 0.0, 20.0, 40.0, 60.0], np.eye(5), 2600))
    assert repeated is not None
    assert repeated.n_more is not None  # more than there are: repeats are being measured


def test_nothing_is_to_be_measured_for_what_is_known_to_be_equal():
    assert separation(attributions([1.0, 1.0, 0.0], np.zeros((3, 3)))) is None
    together = np.array([[1.0], [1.0], [0.0]])
    assert separation(attributions([5.0, 5.0, 0.0], together @ together.T)) is None


def test_the_covariance_of_a_fit_serves():
    """Shapley contrasts sum to zero, and the end points' noise moves all alike."""
    masks = draw_coalitions("shapley", 6, range(40))
    worth = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    y = masks @ worth + np.random.default_rng(2).normal(scale=0.05, size=40)
    options = {"v_empty": 0.0, "v_grand": 15.0, "estimator": "size_adjusted"}
    quiet = fit_shapley(masks, y, **options)
    loud = fit_shapley(masks, y, v_empty_variance=9.0, v_grand_variance=9.0, **options)
    for fitted in (quiet, loud):
        assert rank_intervals(fitted).tolist() == [[i, i] for i in range(1, 7)]
        assert difference(fitted, 0, 1).interval == pytest.approx(difference(quiet, 0, 1).interval, abs=0.05)
        assert separation(fitted) is None
    assert np.ptp(simultaneous_intervals(loud), axis=1).min() > 2.0


def test_a_covariance_is_checked():
    ok = check_covariance([[2.0, 1.0], [1.0, 2.0]], 2)
    assert ok.dtype == np.float64
    for rounding in (contrasts(5), contrasts(5) - 1e-9 * np.eye(5), 1e12 * contrasts(5), np.zeros((5, 5))):
        np.testing.assert_array_equal(check_covariance(rounding, 5), rounding)
    assert np.isnan(check_covariance(np.full((3, 3), np.nan), 3)).all()
    check_covariance(-1e-18 * np.eye(2), 2, scale=1.0)
    bad = {
        r"found shape \(2, 3\)": np.zeros((2, 3)),
        "found shape": np.zeros(2),
        "found 1 others": np.array([[1.0, 0.0], [0.0, np.nan]]),
        "found 2 others": np.array([[1.0, np.inf], [np.inf, 1.0]]),
        "symmetric, found entries that differ by 0.5": np.array([[1.0, 0.5], [0.0, 1.0]]),
        "eigenvalue of -1, the largest entry being 2": np.array([[1.0, 2.0], [2.0, 1.0]]),
        "eigenvalue of -1,": -np.eye(2),
        "eigenvalue of -1e-18": -1e-18 * np.eye(2),
    }
    for message, covariance in bad.items():
        with pytest.raises(FitError, match=message):
            check_covariance(covariance, 2)


@pytest.mark.parametrize(
    "ask",
    [lambda item: difference(item, 0, 1), differences, simultaneous_intervals, rank_intervals, separation],
)
def test_a_covariance_from_outside_is_checked_everywhere(ask: Any):
    with pytest.raises(FitError, match="positive semidefinite"):
        ask(attributions([1.0, 2.0], [[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(FitError, match=r"Expected a covariance \(2, 2\)"):
        ask(attributions([1.0, 2.0], np.eye(3)))
    with pytest.raises(FitError, match="finite attributions"):
        ask(attributions([1.0, np.nan], np.eye(2)))


def test_bad_input():
    for ask in (partial(difference, GENERAL, 0, 1), partial(differences, GENERAL), partial(separation, GENERAL)):
        for level in (0.0, 1.0, 95):
            with pytest.raises(ConfigError, match="level"):
                ask(level=level)
    for ask in (simultaneous_intervals, rank_intervals, partial(differences, simultaneous=True)):
        with pytest.raises(ConfigError, match="level"):
            ask(GENERAL, level=95)
        with pytest.raises(ConfigError, match="n_draws"):
            ask(GENERAL, n_draws=5)
    for wrong in (6, -1, 1.5, True):
        with pytest.raises(ConfigError, match="contributor indices"):
            difference(GENERAL, 0, wrong)  # type: ignore[arg-type]
