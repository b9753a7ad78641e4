"""The linear datamodeling score (LDS): do attributions rank coalitions that they never saw?

The score is the Spearman correlation, over test coalitions, between the additive prediction and the behavior
of a model retrained from scratch on each (Ilyas et al. 2022; Park et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Self

import numpy as np
import numpy.typing as npt

from tribute.errors import ConfigError, FitError
from tribute.games.coalitions import check_evaluations, check_finite, check_masks, coalition_keys
from tribute.seeding import numpy_stream
from tribute.types import Attributions, Behaviors, CoalitionMasks

Array = npt.NDArray[np.float64]

MIN_TEST_COALITIONS = 3


@dataclass(frozen=True)
class LDSResult:
    """How well attributions rank the behaviors of test coalitions; every score is in [-1, 1] or NaN.

    Attributes:
        mean: Mean of `per_seed`.
        interval: `(2,)`, bootstrap interval of `mean` over the test coalitions and the training seeds together.
        per_seed: `(n_seeds,)`, LDS against the behaviors of each training seed.
        per_seed_intervals: `(n_seeds, 2)`, over the test coalitions.
        averaged: LDS against the behavior averaged over training seeds, which holds less noise.
        averaged_interval: `(2,)`, of `averaged`, over both.
        n_test: Number of test coalitions.
        level: Probability with which an interval holds its score.
        undefined_reason: Why a score or an interval is NaN; empty when none is.
    """

    mean: float
    interval: Array
    per_seed: Array
    per_seed_intervals: Array
    averaged: float
    averaged_interval: Array
    n_test: int
    level: float
    undefined_reason: str = ""

    @property
    def n_seeds(self) -> int:
        return len(self.per_seed)


@dataclass(frozen=True)
class LDSCeiling:
    """How well independently seeded retrainings of the same coalitions rank each other.

    Attributes:
        value: Mean of `per_pair`: about the LDS of attributions that are as good as one more retraining.
        interval: `(2,)`, bootstrap interval of `value` over the test coalitions.
        per_pair: `(n_seeds * (n_seeds - 1) / 2,)`, Spearman correlation of each pair of seeds.
        n_seeds: Number of training seeds.
        n_test: Number of test coalitions.
        level: Probability with which the interval holds `value`.
        undefined_reason: Why `value` or its interval is NaN; empty when neither is.
    """

    value: float
    interval: Array
    per_pair: Array
    n_seeds: int
    n_test: int
    level: float
    undefined_reason: str = ""

    @property
    def noise_free(self) -> float:
        """About the LDS per seed of a prediction without noise: the square root of `value` (Spearman
        1904)."""
        return float(np.sqrt(max(self.value, 0.0)))


@dataclass(frozen=True)
class LDSComparison:
    """LDS of one attribution less that of another, on the same test coalitions and the same bootstrap draws.

    Attributes:
        difference: Mean LDS of the first less that of the second, in [-2, 2] or NaN.
        interval: `(2,)`, bootstrap interval over the test coalitions and the training seeds together.
        probability: Share of the draws in which the first scores higher; equal scores count half.
        n_test: Number of test coalitions.
        level: Probability with which the interval holds the difference.
        undefined_reason: Why a number is NaN; empty when none is.
    """

    difference: float
    interval: Array
    probability: float
    n_test: int
    level: float
    undefined_reason: str = ""


@dataclass(frozen=True)
class FitAtSize:
    """Attributions fitted to the first `n_fit` fit coalitions, or why there are none.

    Attributes:
        n_fit: Number of fit coalitions.
        attributions: None when they cannot be fitted.
        missing_reason: Why `attributions` is None; empty when it is not.
    """

    n_fit: int
    attributions: Attributions | None
    missing_reason: str = ""


@dataclass(frozen=True)
class LDSAtSize:
    """LDS after the first `n_fit` fit coalitions, or why there is none.

    Attributes:
        n_fit: Number of fit coalitions.
        result: The score, None when the attributions cannot be fitted.
        missing_reason: Why `result` is None; empty when it is not.
    """

    n_fit: int
    result: LDSResult | None
    missing_reason: str = ""


@dataclass(frozen=True, eq=False)
class LDSTestSet:
    """Retrained test coalitions with the bootstrap draws that all attributions scored on them share.

    A draw takes as many test coalitions as there are, and as many training seeds, both with replacement. The
    seeds are drawn because the score is meant for retrainings with any seed: those at hand are a few out of
    many, and others would have given other behaviors. Drawing coalitions alone would take them for all there
    are. With k seeds a draw shows only (k - 1)/k of the variance that they cause, and none with one seed, so two
    or three say little about it. The noise of a single retraining, on the other hand, counts in both drawings,
    which makes intervals somewhat too long rather than too short (Owen 2007, The pigeonhole bootstrap).

    Attributes:
        masks: `(n_test, n_contributors)`.
        behaviors: `(n_seeds, n_test)`, raw.
        level: Probability with which an interval holds its score.
        coalition_draws: `(n_bootstrap, n_test)`, rows of `masks`.
        seed_draws: `(n_bootstrap, n_seeds)`, rows of `behaviors`.
        ranks: `(n_seeds + 1, n_bootstrap, n_test)`, standardised ranks of the drawn coalitions by the behaviors of
            each seed, and by the mean behavior of the drawn seeds; NaN where all are equal.
    """

    masks: CoalitionMasks
    behaviors: Array
    level: float
    coalition_draws: npt.NDArray[np.int64] = field(repr=False)
    seed_draws: npt.NDArray[np.int64] = field(repr=False)
    ranks: Array = field(repr=False)

    @classmethod
    def prepare(
        cls,
        test_masks: CoalitionMasks,
        test_behaviors: npt.ArrayLike,
        *,
        n_bootstrap: int = 1000,
        seed: int = 0,
        level: float = 0.95,
    ) -> Self:
        """Draw and rank the test coalitions; arguments and errors as in `lds`."""
        masks = check_masks(test_masks)
        behaviors = np.atleast_2d(np.asarray(test_behaviors, dtype=np.float64))
        behaviors = _checked_test_behaviors(behaviors, len(masks))
        _check_bootstrap(n_bootstrap, level)
        draws = _bootstrap_rows(len(masks), n_bootstrap, seed)
        seed_draws = numpy_stream(seed, "lds_bootstrap_seeds").integers(
            len(behaviors), size=(n_bootstrap, len(behaviors))
        )
        averaged = np.take_along_axis(behaviors[seed_draws].mean(axis=1), draws, axis=1)  # (n_bootstrap, n_test)
        ranks = _standardised_ranks(np.concatenate([behaviors[:, draws], averaged[None]]))
        return cls(masks, behaviors, level, draws, seed_draws, ranks)

    def score(self, attributions: Attributions) -> LDSResult:
        """LDS of attributions; errors as in `lds`."""
        predictions = self._predictions(attributions)
        targets = np.vstack([self.behaviors, self.behaviors.mean(axis=0)])  # (n_seeds + 1, n_test)
        scores = rank_correlation(predictions, targets)
        resampled, means = self._resampled(predictions)
        interval = _interval(means, self.level)
        return LDSResult(
            mean=float(scores[:-1].mean()),
            interval=interval,
            per_seed=scores[:-1],
            per_seed_intervals=np.array([_interval(row, self.level) for row in resampled[:-1]]),
            averaged=float(scores[-1]),
            averaged_interval=_interval(resampled[-1], self.level),
            n_test=len(self.masks),
            level=self.level,
            undefined_reason=_undefined_reason({"predictions": predictions[None], "behaviors": targets}, interval),
        )

    def compare(self, first: Attributions, second: Attributions) -> LDSComparison:
        """LDS of `first` less that of `second`; errors as in `lds`."""
        predictions = np.array([self._predictions(item) for item in (first, second)])
        scores = [rank_correlation(row, self.behaviors).mean() for row in predictions]
        draws = np.array([self._resampled(row)[1] for row in predictions])
        differences = draws[0] - draws[1]
        interval = _interval(differences, self.level)
        known = differences[np.isfinite(differences)]
        return LDSComparison(
            difference=float(scores[0] - scores[1]),
            interval=interval,
            probability=float(((1 + np.sign(known)) / 2).mean()) if np.isfinite(interval).all() else float("nan"),
            n_test=len(self.masks),
            level=self.level,
            undefined_reason=_undefined_reason({"predictions": predictions, "behaviors": self.behaviors}, interval),
        )

    def _predictions(self, attributions: Attributions) -> Array:
        """Additive predictions `(n_test,)` up to shift and scale, for coalitions that were not fitted to."""
        masks = check_masks(self.masks, n_contributors=attributions.n_contributors)
        seen = sorted(attributions.fit_keys.intersection(coalition_keys(masks)))
        if seen:
            raise FitError(
                f"Expected test coalitions that were not fitted to, found {len(seen)} that were, such as "
                f"{seen[0]}. Drop those fit coalitions with disjoint_from and fit again."
            )
        if not np.isfinite(attributions.values).all():
            raise FitError("Expected finite attributions, found NaN or infinity. Fit them again on finite behaviors.")
        # The intercept has no rank; rounding keeps equal predictions equal whatever the order of summation.
        credit = np.abs(attributions.values).sum() or 1.0
        return np.round(masks @ (attributions.values / credit), 12)

    def _resampled(self, predictions: Array) -> tuple[Array, Array]:
        """Scores `(n_seeds + 1, n_bootstrap)` of every draw, and their means `(n_bootstrap,)` over drawn seeds."""
        drawn = _standardised_ranks(predictions[self.coalition_draws])
        scores = np.clip(np.einsum("sbt,bt->sb", self.ranks, drawn), -1.0, 1.0)
        return scores, np.take_along_axis(scores[:-1].T, self.seed_draws, axis=1).mean(axis=1)


def lds(
    attributions: Attributions,
    test_masks: CoalitionMasks,
    test_behaviors: npt.ArrayLike,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> LDSResult:
    """Score attributions on coalitions that they were not fitted to.

    The test coalitions may be of one size or of several (alpha 0.25, 0.5, 0.75): the score answers for the ones
    given. Intervals are by bootstrap over test coalitions and training seeds together; `LDSTestSet` says why, and
    serves to score many attributions on the same draws.

    Args:
        attributions: Their `fit_keys` name the coalitions that may not be tested.
        test_masks: `(n_test, n_contributors)`, at least 3.
        test_behaviors: `(n_test,)`, or `(n_seeds, n_test)` for several training seeds; raw.
        n_bootstrap: Number of bootstrap draws.
        seed: Root seed of the bootstrap.
        level: Probability with which an interval holds its score.

    Returns:
        Scores per training seed, their mean, and the score against the mean behavior. A score that does not
        exist, because predictions or behaviors are all equal, is NaN and `undefined_reason` says why.

    Raises:
        FitError: A test coalition was fitted to, there are fewer than 3, the shapes disagree, or a number is
            not finite.
        CoalitionError: The masks are not those of the same contributors.
        ConfigError: `n_bootstrap` or `level` is out of range.
    """
    masks = check_masks(test_masks, n_contributors=attributions.n_contributors)
    test_set = LDSTestSet.prepare(masks, test_behaviors, n_bootstrap=n_bootstrap, seed=seed, level=level)
    return test_set.score(attributions)


def compare_lds(
    first: Attributions,
    second: Attributions,
    test_masks: CoalitionMasks,
    test_behaviors: npt.ArrayLike,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> LDSComparison:
    """Compare two attributions on the same test coalitions: LDS of `first` less that of `second`.

    Both are scored on the same bootstrap draws, so what makes a draw easy or hard for both drops out, and the
    interval is far shorter than two intervals side by side suggest. Arguments and errors as in `lds`.
    """
    masks = check_masks(test_masks, n_contributors=first.n_contributors)
    test_set = LDSTestSet.prepare(masks, test_behaviors, n_bootstrap=n_bootstrap, seed=seed, level=level)
    return test_set.compare(first, second)


def lds_ceiling(
    test_behaviors: npt.ArrayLike, *, n_bootstrap: int = 1000, seed: int = 0, level: float = 0.95
) -> LDSCeiling:
    """Correlate the behaviors of independently seeded retrainings of the same coalitions.

    It tells a low LDS from noisy behaviors: attributions can exceed it, up to about `LDSCeiling.noise_free`,
    only by being less noisy than a retraining.

    Args:
        test_behaviors: `(n_seeds, n_test)`, at least 2 seeds and 3 test coalitions.
        n_bootstrap: Number of bootstrap draws of test coalitions.
        seed: Root seed of the bootstrap.
        level: Probability with which the interval holds the value.

    Raises:
        FitError: Too few seeds or coalitions, or a behavior is not finite.
        ConfigError: `n_bootstrap` or `level` is out of range.
    """
    array = np.asarray(test_behaviors, dtype=np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise FitError(
            f"Expected behaviors (n_seeds, n_test) of at least 2 training seeds, found shape {array.shape}. "
            "Retrain the test coalitions with another seed."
        )
    behaviors = _checked_test_behaviors(array, array.shape[1])
    _check_bootstrap(n_bootstrap, level)
    first, second = np.array(list(combinations(range(len(behaviors)), 2))).T
    per_pair = rank_correlation(behaviors[first], behaviors[second])
    resampled = behaviors[:, _bootstrap_rows(behaviors.shape[1], n_bootstrap, seed)]
    pairs = np.array([rank_correlation(resampled[i], resampled[j]) for i, j in zip(first, second, strict=True)])
    interval = _interval(pairs.mean(axis=0), level)
    return LDSCeiling(
        value=float(per_pair.mean()),
        interval=interval,
        per_pair=per_pair,
        n_seeds=len(behaviors),
        n_test=behaviors.shape[1],
        level=level,
        undefined_reason=_undefined_reason({"behaviors": behaviors}, interval),
    )


def disjoint_from(fit_masks: CoalitionMasks, test_masks: CoalitionMasks) -> npt.NDArray[np.bool_]:
    """Mark `(n_fit,)` the fit coalitions that are no test coalition.

    Raises:
        CoalitionError: The masks are not those of equally many contributors.
    """
    fit_masks = check_masks(fit_masks)
    tested = set(coalition_keys(check_masks(test_masks, n_contributors=fit_masks.shape[1])))
    return np.array([key not in tested for key in coalition_keys(fit_masks)])


def lds_convergence(
    fit_masks: CoalitionMasks,
    fit_behaviors: Behaviors,
    test_masks: CoalitionMasks,
    test_behaviors: npt.ArrayLike,
    *,
    sizes: Sequence[int],
    fit: Callable[[CoalitionMasks, Behaviors], Attributions],
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[LDSAtSize]:
    """Score attributions fitted to the first 1, 2, ... of the fit coalitions.

    Args:
        fit_masks: `(n_fit, n_contributors)`, in the order in which they were drawn.
        fit_behaviors: `(n_fit,)`.
        test_masks: As in `lds`; none may be a fit coalition.
        test_behaviors: As in `lds`.
        sizes: Numbers of fit coalitions to try.
        fit: Attributions from (masks, behaviors), e.g. `functools.partial(fit_shapley, v_empty=...,
            v_grand=...)`.
        n_bootstrap: As in `lds`; all sizes share the draws.
        seed: As in `lds`.
        level: As in `lds`.

    Returns:
        One entry per size, in order. A size with more coalitions than there are, or to which nothing can be
        fitted, has no result and states the reason.

    Raises:
        FitError: As in `lds`, or a size is less than 1.
    """
    fits = fit_at_sizes(fit_masks, fit_behaviors, sizes=sizes, fit=fit)
    test_set = LDSTestSet.prepare(test_masks, test_behaviors, n_bootstrap=n_bootstrap, seed=seed, level=level)
    return [
        LDSAtSize(at.n_fit, None if at.attributions is None else test_set.score(at.attributions), at.missing_reason)
        for at in fits
    ]


def fit_at_sizes(
    fit_masks: CoalitionMasks,
    fit_behaviors: Behaviors,
    *,
    sizes: Sequence[int],
    fit: Callable[[CoalitionMasks, Behaviors], Attributions],
) -> list[FitAtSize]:
    """Fit attributions to the first 1, 2, ... of the fit coalitions; arguments as in `lds_convergence`.

    Returns:
        One entry per size, in order. A size with more coalitions than there are, or to which nothing can be
        fitted, has no attributions and states the reason.

    Raises:
        FitError: A size is less than 1, or a behavior is not finite.
    """
    fit_masks, fit_behaviors = check_evaluations(fit_masks, fit_behaviors)
    if any(size < 1 for size in sizes):
        raise FitError(f"Expected sizes of at least 1 fit coalition, found {min(sizes)}. Remove it.")
    entries = []
    for size in sizes:
        if size > len(fit_masks):
            reason = f"Expected {size} fit coalitions, found {len(fit_masks)}. Measure the others first."
            entries.append(FitAtSize(size, None, reason))
            continue
        try:
            entries.append(FitAtSize(size, fit(fit_masks[:size], fit_behaviors[:size])))
        except FitError as error:
            entries.append(FitAtSize(size, None, str(error)))
    return entries


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> Array:
    """Spearman correlation along the last axis, broadcast; ties share a rank; NaN where all are equal."""
    return np.clip((_standardised_ranks(first) * _standardised_ranks(second)).sum(axis=-1), -1.0, 1.0)


def _standardised_ranks(values: npt.ArrayLike) -> Array:
    """Ranks along the last axis with mean 0 and sum of squares 1; ties share a rank; NaN where all are equal."""
    ranks = _ranks(np.asarray(values, dtype=np.float64))
    ranks -= ranks.mean(axis=-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(axis=-1, keepdims=True))
    return np.divide(ranks, norm, out=np.full(ranks.shape, np.nan), where=norm > 0)


def _ranks(values: Array) -> Array:
    """Ranks along the last axis from 1, ties sharing their mean; all NaN where a value is NaN.

    Those of `scipy.stats.rankdata(values, axis=-1)`, without the third of a second that importing it takes.
    """
    order = np.argsort(values, axis=-1)
    ascending = np.take_along_axis(values, order, axis=-1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    is_new = np.ones(values.shape, dtype=np.bool_)
    is_new[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    is_last = np.ones(values.shape, dtype=np.bool_)
    is_last[..., :-1] = is_new[..., 1:]
    first = np.maximum.accumulate(np.where(is_new, place, 0), axis=-1)
    last = np.minimum.accumulate(np.where(is_last, place, values.shape[-1])[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2.0 + 1.0, axis=-1)
    ranks[np.isnan(values).any(axis=-1)] = np.nan
    return ranks


def _checked_test_behaviors(behaviors: Array, n_test: int) -> Array:
    """Behaviors `(n_seeds, n_test)`, finite and enough."""
    if behaviors.ndim != 2 or behaviors.shape[1] != n_test or len(behaviors) == 0:
        raise FitError(
            f"Expected test behaviors ({n_test},) or (n_seeds, {n_test}), found shape {behaviors.shape}. "
            "Pass one behavior per test coalition and training seed."
        )
    if n_test < MIN_TEST_COALITIONS:
        raise FitError(
            f"Expected at least {MIN_TEST_COALITIONS} test coalitions, found {n_test}. Retrain on more coalitions."
        )
    check_finite(behaviors)
    return behaviors


def _check_bootstrap(n_bootstrap: int, level: float) -> None:
    if n_bootstrap < 2:
        raise ConfigError(f"Expected n_bootstrap >= 2, found {n_bootstrap}. 1000 is usual.")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"Expected level in (0, 1), found {level}. 0.95 is usual.")


def _bootstrap_rows(n_test: int, n_bootstrap: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows `(n_bootstrap, n_test)` of test coalitions drawn with replacement."""
    return numpy_stream(seed, "lds_bootstrap").integers(n_test, size=(n_bootstrap, n_test))


def _interval(draws: Array, level: float) -> Array:
    """Percentile interval `(2,)` of the draws that exist; NaN when fewer than half do."""
    finite = draws[np.isfinite(draws)]
    if 2 * len(finite) < len(draws):
        return np.full(2, np.nan)
    return np.quantile(finite, [0.5 - level / 2, 0.5 + level / 2])


def _undefined_reason(inputs: dict[str, Array], interval: Array) -> str:
    """Say which inputs `(n, n_test)` are all equal, or why there is no interval; empty when all is
    defined."""
    for name, rows in inputs.items():
        if (np.ptp(rows, axis=1) == 0).any():
            return f"the {name} of all {rows.shape[1]} test coalitions are equal, so they have no ranks"
    if np.isnan(interval).any():
        return "most bootstrap draws of the test coalitions hold only equal predictions or behaviors"
    return ""
