"""The linear datamodeling score (LDS): do attributions rank coalitions that they never saw?

The score is the Spearman correlation, over test coalitions, between the additive prediction and the behavior
of a model retrained from scratch on each (Ilyas et al. 2022; Park et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

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
        interval: `(2,)`, bootstrap interval of `mean` over the test coalitions.
        per_seed: `(n_seeds,)`, LDS against the behaviors of each training seed.
        per_seed_intervals: `(n_seeds, 2)`.
        averaged: LDS against the behavior averaged over training seeds, which holds less noise.
        averaged_interval: `(2,)`, of `averaged`.
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

    Args:
        attributions: Their `fit_keys` name the coalitions that may not be tested.
        test_masks: `(n_test, n_contributors)`, at least 3.
        test_behaviors: `(n_test,)`, or `(n_seeds, n_test)` for several training seeds; raw.
        n_bootstrap: Number of bootstrap draws of test coalitions; all seeds share a draw.
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
    test_masks = check_masks(test_masks, n_contributors=attributions.n_contributors)
    behaviors = _checked_test_behaviors(np.atleast_2d(np.asarray(test_behaviors, dtype=np.float64)), len(test_masks))
    _check_bootstrap(n_bootstrap, level)
    seen = sorted(attributions.fit_keys.intersection(coalition_keys(test_masks)))
    if seen:
        raise FitError(
            f"Expected test coalitions that were not fitted to, found {len(seen)} that were, such as "
            f"{seen[0]}. Drop those fit coalitions with disjoint_from and fit again."
        )
    if not np.isfinite(attributions.values).all():
        raise FitError("Expected finite attributions, found NaN or infinity. Fit them again on finite behaviors.")

    # The intercept has no rank; rounding keeps equal predictions equal whatever the order of summation.
    credit = np.abs(attributions.values).sum() or 1.0
    predictions = np.round(test_masks @ (attributions.values / credit), 12)
    targets = np.vstack([behaviors, behaviors.mean(axis=0)])  # (n_seeds + 1, n_test)
    scores = rank_correlation(predictions, targets)
    draws = _bootstrap_rows(len(test_masks), n_bootstrap, seed)
    resampled = rank_correlation(predictions[draws], targets[:, draws])  # (n_seeds + 1, n_bootstrap)
    interval = _interval(resampled[:-1].mean(axis=0), level)
    return LDSResult(
        mean=float(scores[:-1].mean()),
        interval=interval,
        per_seed=scores[:-1],
        per_seed_intervals=np.array([_interval(row, level) for row in resampled[:-1]]),
        averaged=float(scores[-1]),
        averaged_interval=_interval(resampled[-1], level),
        n_test=len(test_masks),
        level=level,
        undefined_reason=_undefined_reason({"predictions": predictions[None], "behaviors": targets}, interval),
    )


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
    fit_masks, fit_behaviors = check_evaluations(fit_masks, fit_behaviors)
    if any(size < 1 for size in sizes):
        raise FitError(f"Expected sizes of at least 1 fit coalition, found {min(sizes)}. Remove it.")
    entries = []
    for size in sizes:
        if size > len(fit_masks):
            reason = f"Expected {size} fit coalitions, found {len(fit_masks)}. Measure the others first."
            entries.append(LDSAtSize(size, None, reason))
            continue
        try:
            attributions = fit(fit_masks[:size], fit_behaviors[:size])
        except FitError as error:
            entries.append(LDSAtSize(size, None, str(error)))
            continue
        result = lds(attributions, test_masks, test_behaviors, n_bootstrap=n_bootstrap, seed=seed, level=level)
        entries.append(LDSAtSize(size, result))
    return entries


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> Array:
    """Spearman correlation along the last axis, broadcast; ties share a rank; NaN where all are equal."""
    a, b = (rankdata(x, axis=-1) for x in (first, second))
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    together = (a * b).sum(axis=-1)
    undefined = np.full(together.shape, np.nan)
    return np.clip(np.divide(together, spread, out=undefined, where=spread > 0), -1.0, 1.0)


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
