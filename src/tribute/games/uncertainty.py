"""What the covariance of attributions says: intervals of differences, of ranks, and of all contributors at once.

A single value, or a difference of two, is normal and its interval exact. Ranks and simultaneous statements are
simulated from the normal law with the attributions' values and covariance. That covariance may be singular, as
when Shapley contrasts sum to zero or two contributors always move together. Where it is unknown (NaN), so is
every interval, and a rank may be any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from tribute.errors import ConfigError, FitError
from tribute.seeding import numpy_stream
from tribute.types import Attributions

Array = npt.NDArray[np.float64]

MAX_GROWTH = 20.0
"""Contributors that need more than so many times the coalitions measured cannot be told apart in practice."""

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 1e-6
"""Eigenvalues down to minus this share of the largest one count as zero: a covariance is a difference of sums."""


@dataclass(frozen=True)
class Difference:
    """The credit of one contributor less that of another.

    Attributes:
        value: In the unit of the behavior.
        standard_error: Of `value`; NaN where unknown.
        interval: `(2,)`, normal; NaN where unknown.
    """

    value: float
    standard_error: float
    interval: Array

    @property
    def separated(self) -> bool:
        """Whether the interval excludes 0; an unknown one does not."""
        return bool(self.interval[0] > 0.0 or self.interval[1] < 0.0)


@dataclass(frozen=True)
class Separation:
    """The neighbours in the ranking that the fewest more coalitions should tell apart.

    Attributes:
        better: Index of the contributor that ranks higher.
        worse: Index of the one that follows it.
        difference: The size of their difference, at least 0, in the unit of the behavior.
        half_width: Half the width of its interval.
        n_coalitions: Fit coalitions so far.
        n_more: Further coalitions after which the interval should exclude 0; None when that cannot be had.
        n_unseparated: How many of the `n_contributors - 1` pairs of neighbours are not told apart.
        obstacle: Where `n_more` is None, why.
    """

    better: int
    worse: int
    difference: float
    half_width: float
    n_coalitions: int
    n_more: int | None
    n_unseparated: int
    obstacle: str = ""

    def sentence(self, contributor_names: Sequence[str], *, paired: bool) -> str:
        """Say it to people.

        Args:
            contributor_names: `(n_contributors,)`.
            paired: Count in complement pairs, as paired designs are extended.
        """
        names = f"{contributor_names[self.better]} and {contributor_names[self.worse]}"
        now = f"{self.difference:.3g} +- {self.half_width:.3g}"
        if self.n_more is None:
            return f"{names} cannot be told apart in practice: {self.obstacle} (now their difference is {now})"
        count, unit = (-(-self.n_more // 2), "pair") if paired else (self.n_more, "coalition")
        what = f"{unit}{'' if count == 1 else 's'}" + (" of coalitions" if paired else "")
        return f"{count} more {what} should separate {names} (now their difference is {now})"


def difference(attributions: Attributions, i: int, j: int, *, level: float = 0.95) -> Difference:
    """Credit of contributor `i` less that of contributor `j`, exact from the covariance.

    Args:
        attributions: Their covariance may be singular, or NaN.
        i: A contributor's index.
        j: Another's.
        level: Probability with which the interval holds the difference.

    Raises:
        ConfigError: `level` is outside (0, 1), or an index is no contributor.
        FitError: The values are not finite, or the covariance is none (`check_covariance`).
    """
    values, covariance = _checked(attributions)
    n = len(values)
    for idx in (i, j):
        if isinstance(idx, bool) or not isinstance(idx, int | np.integer) or not 0 <= idx < n:
            raise ConfigError(f"Expected contributor indices in [0, {n}), found {idx!r}. Count from 0.")
    value = float(values[i] - values[j])
    standard_error = float(_standard_errors_of_differences(covariance)[i, j])
    half_width = _normal_quantile(level) * standard_error
    return Difference(value, standard_error, np.array([value - half_width, value + half_width]))


def differences(
    attributions: Attributions,
    *,
    level: float = 0.95,
    simultaneous: bool = False,
    n_draws: int = 4000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """All pairwise differences, row less column, with their intervals.

    Args:
        attributions: As in `difference`.
        level: Probability with which an interval holds its difference.
        simultaneous: Hold all differences at once with that probability: the quantile of the largest
            standardised difference is simulated (Tukey's method for any covariance).
        n_draws: Simulations, where `simultaneous`.
        seed: Root seed of the simulations.

    Returns:
        Differences `(n_contributors, n_contributors)` and intervals `(n_contributors, n_contributors, 2)`.

    Raises:
        ConfigError: `level` or `n_draws` is out of range.
        FitError: As in `difference`.
    """
    values, covariance = _checked(attributions)
    quantile = _normal_quantile(level)
    _check_draws(n_draws)
    standard_errors = _standard_errors_of_differences(covariance)
    factor = _factor(covariance)
    if simultaneous and factor.shape[1] > 1:  # else all errors are multiples of one, and the quantile is exact
        quantile = _largest_difference_quantile(_simulated(factor, n_draws, seed), standard_errors, level)
    estimates = values[:, None] - values
    half_widths = quantile * standard_errors
    return estimates, np.stack([estimates - half_widths, estimates + half_widths], axis=-1)


def simultaneous_intervals(
    attributions: Attributions, level: float = 0.95, *, n_draws: int = 4000, seed: int = 0
) -> Array:
    """Intervals `(n_contributors, 2)` that hold the values of all contributors at once.

    The quantile of the largest standardised error is simulated from the covariance (max-t).

    Args:
        attributions: As in `difference`.
        level: Probability with which all intervals hold.
        n_draws: Simulations.
        seed: Root seed of the simulations.

    Raises:
        ConfigError: `level` or `n_draws` is out of range.
        FitError: As in `difference`.
    """
    values, covariance = _checked(attributions)
    quantile = _normal_quantile(level)
    _check_draws(n_draws)
    standard_errors = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
    factor = _factor(covariance)
    if factor.shape[1] > 1:  # else all errors are multiples of one, and the quantile is exact
        known = standard_errors > 0
        standardised = _simulated(factor, n_draws, seed)[:, known] / standard_errors[known]
        quantile = float(np.quantile(np.abs(standardised).max(axis=1), level))
    half_widths = quantile * standard_errors
    return np.stack([values - half_widths, values + half_widths], axis=1)


def rank_intervals(
    attributions: Attributions,
    level: float = 0.95,
    *,
    higher_is_better: bool = True,
    simultaneous: bool = False,
    n_draws: int = 4000,
    seed: int = 0,
) -> npt.NDArray[np.int64]:
    """Intervals of each contributor's rank, 1 for the best.

    Each by itself: quantiles of the rank over draws from the normal law of the attributions; contributors with
    equal credit hold all the ranks that they share. Simultaneous: a contributor ranks below those that it is
    worse than, and above those that it is better than, by the simultaneous intervals of all differences; this
    holds all ranks at once, and is wider.

    Args:
        attributions: As in `difference`.
        level: Probability with which an interval holds its rank, or with which all do.
        higher_is_better: Whether the largest value ranks first.
        simultaneous: Hold all ranks at once.
        n_draws: Simulations.
        seed: Root seed of the simulations.

    Returns:
        First and last rank `(n_contributors, 2)`; 1 and n where the covariance is unknown.

    Raises:
        ConfigError: `level` or `n_draws` is out of range.
        FitError: As in `difference`.

    References:
        Klein, Wright and Wieczorek (2020), theorem 1, for the simultaneous ones.
    """
    values, covariance = _checked(attributions)
    _normal_quantile(level)
    _check_draws(n_draws)
    n, sign = len(values), 1.0 if higher_is_better else -1.0
    if np.isnan(covariance).any():
        return np.tile(np.array([1, n], dtype=np.int64), (n, 1))
    if simultaneous:
        options = {"level": level, "simultaneous": True, "n_draws": n_draws, "seed": seed}
        bounds = np.sort(sign * differences(attributions, **options)[1], axis=-1)
        n_better, n_worse = (bounds[:, :, 1] < 0).sum(axis=1), (bounds[:, :, 0] > 0).sum(axis=1)
        return np.stack([1 + n_better, n - n_worse], axis=1)
    draws = values + _simulated(_factor(covariance), n_draws, seed)
    # Draws of contributors with equal credit that always move together differ by rounding only.
    tolerance = 1e-7 * math.sqrt(max(np.diag(covariance).max(), 0.0)) + 1e-12 * np.abs(values).max()
    first, last = _shared_ranks(-sign * draws, tolerance)
    tail = (1.0 - level) / 2.0
    low = np.quantile(first, tail, axis=0, method="inverted_cdf")
    high = np.quantile(last, 1.0 - tail, axis=0, method="inverted_cdf")
    return np.stack([low, high], axis=1).astype(np.int64)


def separation(attributions: Attributions, *, level: float = 0.95, higher_is_better: bool = True) -> Separation | None:
    """Tell which neighbours in the ranking the fewest more coalitions should separate.

    Neighbours are separated when the interval of their difference excludes 0. The variance of a difference
    falls as 1/m in the number m of coalitions, so an interval of half width h about a difference d < h should
    exclude 0 from m (h/d)^2 coalitions on, if the difference stays what it is.

    Args:
        attributions: As in `difference`.
        level: Of the intervals.
        higher_is_better: Whether the largest value ranks first.

    Returns:
        None when all neighbours are separated or known to be equal, or when the covariance is unknown.

    Raises:
        ConfigError: `level` is out of range.
        FitError: As in `difference`.
    """
    values, covariance = _checked(attributions)
    quantile = _normal_quantile(level)
    order = np.argsort(-values if higher_is_better else values, kind="stable")
    better, worse = order[:-1], order[1:]
    gaps = np.abs(values[better] - values[worse])
    half_widths = quantile * _standard_errors_of_differences(covariance)[better, worse]
    unseparated = np.flatnonzero((gaps <= half_widths) & (half_widths > 0))  # none where the half widths are NaN
    if not len(unseparated):
        return None
    growth = np.full(len(gaps), np.inf)
    np.divide(half_widths, gaps, out=growth, where=gaps > 0)
    k = unseparated[np.argmin(growth[unseparated])]
    n_coalitions, n_proper = attributions.n_coalitions, 2 ** len(values) - 2
    obstacle = ""
    if growth[k] ** 2 > MAX_GROWTH:
        obstacle = f"it would take more than {MAX_GROWTH:.0f} times the {n_coalitions} coalitions measured"
    elif n_coalitions <= n_proper <= growth[k] ** 2 * n_coalitions:  # more than that are repeats
        obstacle = f"it would take more than the {n_proper} coalitions that there are"
    return Separation(
        better=int(better[k]),
        worse=int(worse[k]),
        difference=float(gaps[k]),
        half_width=float(half_widths[k]),
        n_coalitions=n_coalitions,
        n_more=None if obstacle else math.floor(growth[k] ** 2 * n_coalitions) + 1 - n_coalitions,
        n_unseparated=len(unseparated),
        obstacle=obstacle,
    )


def check_covariance(covariance: npt.ArrayLike, n_contributors: int, *, scale: float = 0.0) -> Array:
    """Return a covariance in float64, or say why it is none.

    Args:
        covariance: `(n_contributors, n_contributors)`; all NaN where unknown.
        n_contributors: How many values it belongs to.
        scale: Size of those values: variances that are rounding of it may be negative.

    Raises:
        FitError: Another shape, NaN or infinite in part, not symmetric, or not positive semidefinite; rounding
            is allowed for.
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    expected = f"Expected a covariance ({n_contributors}, {n_contributors})"
    if matrix.shape != (n_contributors, n_contributors):
        raise FitError(f"{expected}, found shape {matrix.shape}. Pass one row and column per contributor.")
    if np.isnan(matrix).all():
        return matrix
    if not np.isfinite(matrix).all():
        bad = int((~np.isfinite(matrix)).sum())
        raise FitError(f"{expected} of finite numbers, or all NaN, found {bad} others. Use NaN throughout if unknown.")
    largest = float(np.abs(matrix).max(initial=0.0))
    asymmetry = float(np.abs(matrix - matrix.T).max(initial=0.0))
    rounding = _ROUNDING * largest + (1e-8 * scale) ** 2
    if asymmetry > rounding:
        raise FitError(
            f"{expected} that is symmetric, found entries that differ by {asymmetry:.3g} from their mirror images, "
            f"the largest being {largest:.3g}. Pass the covariance itself, not a factor of it."
        )
    symmetric = (matrix + matrix.T) / 2.0
    try:  # ten times cheaper than the eigenvalues, which only the message needs
        allowed = n_contributors * rounding + float(np.finfo(np.float64).tiny)
        np.linalg.cholesky(symmetric + allowed * np.eye(n_contributors))
    except np.linalg.LinAlgError as error:
        smallest = float(np.linalg.eigvalsh(symmetric).min())
        raise FitError(
            f"{expected} that is positive semidefinite, found an eigenvalue of {smallest:.3g}, the largest entry "
            f"being {largest:.3g}. Some combination of contributors would have a negative variance: recompute it."
        ) from error
    return matrix


def _checked(attributions: Attributions) -> tuple[Array, Array]:
    """Finite values `(n,)` and a covariance `(n, n)`."""
    values = np.asarray(attributions.values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise FitError("Expected finite attributions, found NaN or infinity. Fit them again on finite behaviors.")
    scale = float(np.abs(values).max(initial=0.0))
    return values, check_covariance(attributions.covariance, len(values), scale=scale)


def _normal_quantile(level: float) -> float:
    """How many standard errors an interval reaches to either side."""
    if not 0.0 < level < 1.0:
        raise ConfigError(f"Expected level in (0, 1), found {level}. 0.95 is usual.")
    return float(ndtri(0.5 + level / 2.0))


def _check_draws(n_draws: int) -> None:
    if n_draws < 100:
        raise ConfigError(f"Expected n_draws >= 100 to find a quantile, found {n_draws}. 4000 is usual.")


def _standard_errors_of_differences(covariance: Array) -> Array:
    """`(n, n)`; 0 where the difference is rounding of the two variances."""
    variances = np.diag(covariance)
    sums = variances[:, None] + variances
    found = sums - covariance - covariance.T
    return np.sqrt(np.where(found <= 8.0 * _EPS * sums, 0.0, found))


def _factor(covariance: Array) -> Array:
    """A matrix `(n, rank)` whose product with its transpose is the covariance; no columns where that is NaN."""
    if np.isnan(covariance).any():
        return np.empty((len(covariance), 0))
    eigenvalues, vectors = np.linalg.eigh((covariance + covariance.T) / 2.0)
    kept = eigenvalues > len(eigenvalues) * _EPS * eigenvalues.max(initial=0.0)
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def _simulated(factor: Array, n_draws: int, seed: int) -> Array:
    """Errors `(n_draws, n)` of the attributions."""
    return numpy_stream(seed, "attribution errors").standard_normal((n_draws, factor.shape[1])) @ factor.T


def _largest_difference_quantile(draws: Array, standard_errors: Array, level: float) -> float:
    """Quantile of the largest standardised difference of two errors in `(n_draws, n)` draws."""
    largest = np.zeros(len(draws))
    for i in range(draws.shape[1] - 1):
        known = i + 1 + np.flatnonzero(standard_errors[i, i + 1 :] > 0)
        if len(known):
            standardised = np.abs(draws[:, known] - draws[:, [i]]) / standard_errors[i, known]
            np.maximum(largest, standardised.max(axis=1), out=largest)
    return float(np.quantile(largest, level))


def _shared_ranks(draws: Array, tolerance: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and last rank `(n_draws, n)` of each column, the smallest first; those within `tolerance` share ranks."""
    n = draws.shape[1]
    order = np.argsort(draws, axis=1)
    gap = np.diff(np.take_along_axis(draws, order, axis=1), axis=1) > tolerance  # (n_draws, n - 1)
    position = np.arange(n)
    starts = np.maximum.accumulate(np.where(np.insert(gap, 0, True, axis=1), position, 0), axis=1)
    ends = np.where(np.insert(gap, n - 1, True, axis=1), position, n - 1)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    first, last = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(first, order, starts + 1, axis=1)
    np.put_along_axis(last, order, ends + 1, axis=1)
    return first, last
