"""What every attribution kernel is given, checked: the options, and the evaluations with their repeats pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, TypedDict

import numpy as np
import numpy.typing as npt

from tribute.errors import ConfigError, FitError
from tribute.games.coalitions import check_evaluations, complement_clusters
from tribute.games.designs import DESIGNS, sampling_weights
from tribute.games.regression import Array, pool_repeats
from tribute.games.removal import REMOVAL_DISTS
from tribute.types import Behaviors, CoalitionMasks


class FitKeywords(TypedDict, total=False):
    """The keywords of every `fit_*` function; `FitOptions` holds their meaning and defaults."""

    v_empty: float | None
    v_grand: float | None
    estimator: str | None
    design: str | None
    prior: npt.ArrayLike | None
    ridge: float
    interval: str
    n_bootstrap: int
    seed: int
    v_empty_variance: float
    v_grand_variance: float
    weights: npt.ArrayLike | None
    behavior_variance: npt.ArrayLike | None
    contributor_names: Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of an attribution kernel; each kernel states which do not apply to it and are ignored.

    Attributes:
        v_empty: Behavior of the empty coalition.
        v_grand: Behavior of the grand coalition.
        estimator: How to compute it, where there is a choice; None is the default.
        design: What the coalitions came from, one of `games.designs.DESIGNS` or a removal distribution; None when
            not known.
        prior: `(n_contributors,)`, a cheap guess of the credit; only its direction about its mean counts.
        ridge: Penalty on the sum of squares of the fitted coefficients, in units of coalitions (the weights have
            mean 1); 0 lets the estimator decide.
        interval: Covariance from the formula (`analytic`) or from resampled coalitions (`bootstrap`).
        n_bootstrap: Number of bootstrap draws.
        seed: Root seed of the bootstrap and of random starts.
        v_empty_variance: Variance of `v_empty` as measured.
        v_grand_variance: Variance of `v_grand` as measured.
        weights: `(n_coalitions,)`, not negative, in place of the estimator's own; 0 leaves a row out.
        behavior_variance: Known variance of the measurement noise of each evaluation, one for all or
            `(n_coalitions,)`.
        contributor_names: `(n_contributors,)`, for messages.
    """

    v_empty: float | None = None
    v_grand: float | None = None
    estimator: str | None = None
    design: str | None = None
    prior: npt.ArrayLike | None = None
    ridge: float = 0.0
    interval: str = "analytic"
    n_bootstrap: int = 200
    seed: int = 0
    v_empty_variance: float = 0.0
    v_grand_variance: float = 0.0
    weights: npt.ArrayLike | None = None
    behavior_variance: npt.ArrayLike | None = None
    contributor_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.interval not in ("analytic", "bootstrap"):
            raise ConfigError(f"Expected interval to be analytic or bootstrap, found {self.interval!r}. Choose one.")
        if self.n_bootstrap < 2:
            raise ConfigError(f"Expected n_bootstrap >= 2, found {self.n_bootstrap}. 200 is usual.")
        for name in ("ridge", "v_empty_variance", "v_grand_variance"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0.0):
                raise ConfigError(f"Expected {name} to be a finite number >= 0, found {value}. Correct it.")
        known = (*DESIGNS, *REMOVAL_DISTS)
        if self.design is not None and self.design not in known:
            raise ConfigError(
                f"Expected design to be one of {', '.join(known)}; found {self.design!r}. Choose one, or pass None "
                "if it is not known."
            )

    def chosen(self, estimators: Sequence[str]) -> str:
        """The estimator's name, the first one for None; ConfigError unless it is one of `estimators`."""
        if self.estimator is None:
            return estimators[0]
        if self.estimator not in estimators:
            known = ", ".join(estimators)
            raise ConfigError(f"Expected estimator to be one of {known}; found {self.estimator!r}. Choose one.")
        return self.estimator


@dataclass(frozen=True)
class Evaluations:
    """Checked evaluations of distinct coalitions.

    Attributes:
        masks: `(n_coalitions, n_contributors)`.
        behaviors: `(n_coalitions,)`, the inverse-variance mean where a coalition was measured repeatedly.
        n_repeats: `(n_coalitions,)`, how often it was measured, at least 1.
        precision: `(n_coalitions,)`, 1 / variance of the behavior's measurement noise, in units in which a typical
            single evaluation has 1; the sum of the weights where the user gave weights.
        has_weights: Whether the user gave weights.
        prior: `(n_contributors,)`, centred, or None.
    """

    masks: CoalitionMasks
    behaviors: Behaviors
    n_repeats: npt.NDArray[np.intp]
    precision: Array
    has_weights: bool
    prior: Array | None

    @property
    def n_contributors(self) -> int:
        return self.masks.shape[1]

    @property
    def n_evaluations(self) -> int:
        return int(self.n_repeats.sum())

    @property
    def sizes(self) -> npt.NDArray[np.intp]:
        """`(n_coalitions,)`."""
        return self.masks.sum(axis=1)

    @property
    def clusters(self) -> npt.NDArray[np.intp]:
        """`(n_coalitions,)`, the same number for a coalition and its complement."""
        return complement_clusters(self.masks)

    def take(self, rows: npt.NDArray[np.intp]) -> Self:
        """The evaluations in `rows`, which may repeat."""
        return replace(
            self,
            masks=self.masks[rows],
            behaviors=self.behaviors[rows],
            n_repeats=self.n_repeats[rows],
            precision=self.precision[rows],
        )

    def in_units(self, origin: float, unit: float) -> Self:
        """The same with behaviors counted from `origin` in multiples of `unit`."""
        return replace(self, behaviors=(self.behaviors - origin) / unit)


def check_fit(masks: CoalitionMasks, behaviors: Behaviors, options: FitOptions, *, pool: bool = True) -> Evaluations:
    """Check evaluations against each other and the options, and pool the repeats of a coalition unless told not to.

    Raises:
        CoalitionError: The masks are not boolean rows.
        FitError: Not one finite behavior per coalition, or weights, variances or a prior that do not fit.
        ConfigError: Not one name per contributor, or a negative variance.
    """
    masks, behaviors = check_evaluations(masks, behaviors)
    n_rows, n_contributors = masks.shape
    names = options.contributor_names
    if names is not None and len(names) != n_contributors:
        raise ConfigError(f"Expected {n_contributors} contributor_names, found {len(names)}. Pass one per contributor.")
    variances = _relative_variances(options.behavior_variance, n_rows)
    prior = _centred_prior(options.prior, n_contributors)
    has_weights = options.weights is not None
    if has_weights:
        weights = _checked_rows(options.weights, n_rows, "weights", "not negative and not all zero")
        if (weights < 0).any() or not weights.any():
            raise FitError(
                f"Expected weights that are not negative and not all zero, found {weights.min()} to {weights.max()}. "
                "Pass one weight per coalition."
            )
        kept = weights > 0
        masks, behaviors, variances = masks[kept], behaviors[kept], 1.0 / weights[kept]
    if not pool:
        return Evaluations(masks, behaviors, np.ones(len(masks), np.intp), 1.0 / variances, has_weights, prior)
    masks, behaviors, variances, coalition_idx = pool_repeats(masks, behaviors, variances)
    return Evaluations(masks, behaviors, np.bincount(coalition_idx), 1.0 / variances, has_weights, prior)


def law_weights(evaluations: Evaluations, kernel: str, design: str | None, *, by_precision: bool = True) -> Array:
    """Weights `(n_coalitions,)` under which the coalitions of a design stand for all, as a kernel needs.

    Every evaluation has its sampling weight (`sampling_weights`), so a coalition drawn twice counts twice. With
    `by_precision` it is divided by the relative variance of the evaluation's noise. Weights from the user stand
    as they are.
    """
    if evaluations.has_weights:
        return evaluations.precision
    n_repeats = evaluations.n_repeats
    rows = np.repeat(np.arange(len(n_repeats)), n_repeats)
    per_evaluation = sampling_weights(evaluations.masks[rows], kernel, design)
    weights = np.bincount(rows, per_evaluation).astype(np.float64, copy=False)
    return weights * evaluations.precision / n_repeats if by_precision else weights


def banzhaf_weights(evaluations: Evaluations, design: str | None, *, by_precision: bool = True) -> Array:
    """`law_weights` for Banzhaf values, where coalitions of no known design count as drawn uniformly from all."""
    if design is None and not evaluations.has_weights:
        return evaluations.precision if by_precision else evaluations.n_repeats.astype(np.float64)
    return law_weights(evaluations, "banzhaf", design, by_precision=by_precision)


def require_value(value: float | None, name: str) -> float:
    """Return the behavior of an end point, or raise FitError if it is missing or not finite."""
    if value is None or not np.isfinite(value):
        coalition = name.removeprefix("v_")
        raise FitError(
            f"Expected {name}, the behavior of the {coalition} coalition, to be a finite number, found "
            f"{value}. Measure the {coalition} coalition."
        )
    return float(value)


def _checked_rows(values: npt.ArrayLike | None, n_rows: int, name: str, wanted: str) -> Array:
    """Finite values `(n_rows,)` in float64, or FitError."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n_rows,) or not np.isfinite(array).all():
        raise FitError(
            f"Expected {name} ({n_rows},), finite, {wanted}, found shape {array.shape} with "
            f"{np.count_nonzero(~np.isfinite(array))} values NaN or infinite. Pass one per coalition."
        )
    return array


def _relative_variances(behavior_variance: npt.ArrayLike | None, n_rows: int) -> Array:
    """Variances `(n_rows,)` of the measurement noise in units of their mean; ones where they are equal or unknown."""
    if behavior_variance is None:
        return np.ones(n_rows)
    shared = np.asarray(behavior_variance, dtype=np.float64)
    if shared.ndim == 0:
        if not (np.isfinite(shared) and shared >= 0.0):
            raise ConfigError(f"Expected behavior_variance to be a finite number >= 0, found {shared}. Correct it.")
        return np.ones(n_rows)
    variances = _checked_rows(behavior_variance, n_rows, "behavior_variance", "a number > 0 or one per coalition")
    if variances.min() <= 0.0:
        raise FitError(
            f"Expected every behavior_variance > 0, found {variances.min()}. No evaluation is free of noise: "
            "estimate its variance, or pass None if it is not known."
        )
    return variances / variances.mean()


def _centred_prior(prior: npt.ArrayLike | None, n_contributors: int) -> Array | None:
    """The prior less its mean; None when there is none or it tells nobody apart."""
    if prior is None:
        return None
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (n_contributors,) or not np.isfinite(values).all():
        raise FitError(
            f"Expected a prior ({n_contributors},) of finite numbers, found shape {values.shape} with "
            f"{np.count_nonzero(~np.isfinite(values))} values NaN or infinite. Pass one number per contributor."
        )
    return None if np.ptp(values) == 0.0 else values - values.mean()
