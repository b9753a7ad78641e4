"""Estimators of Shapley values from measured coalitions, with their covariance.

Both estimators are regressions in *contrast form*: phi_i = c_i + (v1 - v0) / n with sum c = 0, where v0 and
v1 are the behaviors of the empty and the grand coalition. The contrasts c are fitted to
t = y - v0 - (v1 - v0) |s| / n on the coalitions s, so the credit sums to v1 - v0 by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tribute.errors import ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import (
    check_evaluations,
    coalition_keys,
    complement_clusters,
    named,
)
from tribute.games.removal import shapley_size_law
from tribute.seeding import numpy_stream
from tribute.types import Attributions, Behaviors, CoalitionMasks

Array = npt.NDArray[np.float64]

SHAPLEY_ESTIMATORS = ("size_adjusted", "least_squares")

MAX_PROFILE_TERMS = 5
COALITIONS_PER_PROFILE_TERM = 8
"""Limits of the size profile: at most 5 terms, one for every 8 coalitions (this project's simulations)."""


def fit_shapley(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    *,
    v_empty: float | None = None,
    v_grand: float | None = None,
    estimator: str | None = "size_adjusted",
    ridge: float = 0.0,
    interval: str = "analytic",
    n_bootstrap: int = 200,
    seed: int = 0,
    v_empty_variance: float = 0.0,
    v_grand_variance: float = 0.0,
    weights: npt.ArrayLike | None = None,
    behavior_variance: float | None = None,
    contributor_names: Sequence[str] | None = None,
) -> Attributions:
    """Estimate Shapley values by least squares on measured coalitions.

    `least_squares`, as published, fits one additive model to all coalitions alike, which is consistent for
    coalitions drawn from the Shapley removal distribution. Any curvature of the behavior in the coalition's
    size acts on it as noise. `size_adjusted` first projects out a smooth profile in the size and weighs every
    size by its mass under the Shapley law, so it serves coalitions of any design and needs several times
    fewer.

    The analytic covariance is a sandwich with leverage-corrected residuals (HC3), clustered where a coalition
    and its complement, or a repeat, were measured. It holds measurement noise and misfit of the additive
    model alike, and is on the safe side from about five coalitions per contributor on. With no spare
    coalitions it is NaN. The bootstrap draws the same clusters with replacement and skips draws that do not
    identify every contributor.

    Args:
        masks: `(n_coalitions, n_contributors)`; True where the contributor is present. Neither the empty nor
            the grand coalition may occur.
        behaviors: `(n_coalitions,)`, raw (not negated).
        v_empty: Behavior of the empty coalition; required.
        v_grand: Behavior of the grand coalition; required.
        estimator: `size_adjusted` (also for None) or `least_squares`.
        ridge: Penalty on the sum of squared contrasts, in units of coalitions (the weights have mean 1).
            Shrinks towards equal credit; above 0 it allows fewer coalitions than contributors.
        interval: `analytic` or `bootstrap`.
        n_bootstrap: Number of bootstrap draws.
        seed: Root seed of the bootstrap.
        v_empty_variance: Variance of `v_empty` as measured; it moves every contributor alike.
        v_grand_variance: Variance of `v_grand` as measured.
        weights: `(n_coalitions,)`, not negative, in place of the estimator's own (1 for `least_squares`).
        behavior_variance: Ignored: the residuals hold the measurement noise.
        contributor_names: `(n_contributors,)`, for messages.

    Returns:
        Values that sum to `v_grand - v_empty`, in the unit of `behaviors`. `rank` counts the identified
        contrasts and their sum: `n_contributors` when nothing is missing.

    Raises:
        RankDeficientFit: The coalitions do not identify every contributor and `ridge` is 0; the message names
            those.
        FitError: Not one finite behavior per coalition, an empty or grand coalition, a missing end point, or
            too few usable bootstrap draws.
        ConfigError: An option is unknown or out of range.

    References:
        Covert and Lee (2021), eq. 7 (`least_squares`); Lundberg and Lee (2017), theorem 2 (the size law);
        MacKinnon and White (1985) (HC3).
    """
    masks, behaviors = check_evaluations(masks, behaviors)
    n_coalitions, n_contributors = masks.shape
    check_fit_options(ridge, interval, n_bootstrap, v_empty_variance, v_grand_variance, behavior_variance)
    names = check_names(contributor_names, n_contributors)
    given_weights = check_weights(weights, n_coalitions)
    v0, v1 = require_value(v_empty, "v_empty"), require_value(v_grand, "v_grand")
    if estimator is None:
        estimator = SHAPLEY_ESTIMATORS[0]
    if estimator not in SHAPLEY_ESTIMATORS:
        known = ", ".join(SHAPLEY_ESTIMATORS)
        raise ConfigError(f"Expected estimator to be one of {known}; found {estimator!r}. Choose one.")
    sizes = masks.sum(axis=1)
    improper = np.flatnonzero((sizes == 0) | (sizes == n_contributors))
    if len(improper):
        raise FitError(
            f"Expected proper coalitions, found the empty or the grand one in rows {named(improper, None)}. "
            "Pass those as v_empty and v_grand."
        )

    # Unit scale, so that ranks and rounding do not depend on the unit of the behavior.
    scale = float(max(np.abs(behaviors - v0).max(), abs(v1 - v0))) or 1.0
    response = (behaviors - v0 - (v1 - v0) * sizes / n_contributors) / scale
    basis = contrast_basis(n_contributors)  # (n_contributors, n_contributors - 1)
    design = masks @ basis

    def regress(rows: npt.NDArray[np.intp], n_profile_terms: int) -> Regression:
        if given_weights is not None:
            row_weights = given_weights[rows]
        elif estimator == "size_adjusted":
            row_weights = size_mass_weights(sizes[rows], n_contributors)
        else:
            row_weights = np.ones(len(rows))
        profile = size_profile(sizes[rows], n_contributors, n_profile_terms)
        return Regression.factorise(design[rows], profile, row_weights)

    # The richest size profile that leaves every contrast identified.
    all_rows = np.arange(n_coalitions)
    n_profile_terms = 0
    if estimator == "size_adjusted":
        richest = n_coalitions // COALITIONS_PER_PROFILE_TERM
        n_profile_terms = min(MAX_PROFILE_TERMS, richest, len(np.unique(sizes)))
    regression = regress(all_rows, n_profile_terms)
    while regression.rank < n_contributors - 1 and n_profile_terms and ridge == 0.0:
        n_profile_terms -= 1
        regression = regress(all_rows, n_profile_terms)
    if ridge == 0.0:
        require_identified(regression, basis, names)

    clusters = complement_clusters(masks)
    if interval == "analytic":
        spread = regression.covariance(response, ridge, clusters)
    else:

        def refit(rows: npt.NDArray[np.intp]) -> Array | None:
            drawn = regress(rows, min(n_profile_terms, len(np.unique(sizes[rows]))))
            if ridge == 0.0 and drawn.rank < n_contributors - 1:
                return None
            return drawn.coefficients(response[rows], ridge)

        stream = numpy_stream(seed, "bootstrap", "shapley", estimator)
        spread = bootstrap_covariance(refit, clusters, n_bootstrap, stream)

    # The estimate is linear in v0 and v1 too: d phi / d v0 and d phi / d v1.
    gain = regression.gain(ridge)
    by_empty = -basis @ (gain @ (1.0 - sizes / n_contributors)) - 1.0 / n_contributors
    by_grand = -basis @ (gain @ (sizes / n_contributors)) + 1.0 / n_contributors
    return Attributions(
        values=scale * (basis @ regression.coefficients(response, ridge)) + (v1 - v0) / n_contributors,
        covariance=scale**2 * (basis @ spread @ basis.T)
        + v_empty_variance * np.outer(by_empty, by_empty)
        + v_grand_variance * np.outer(by_grand, by_grand),
        kernel="shapley",
        estimator=estimator,
        interval=interval,
        n_coalitions=n_coalitions,
        rank=regression.rank + 1,
        intercept=v0,
        fit_keys=frozenset(coalition_keys(masks)),
    )


def contrast_basis(n_contributors: int) -> Array:
    """Orthonormal basis `(n_contributors, n_contributors - 1)` of the vectors that sum to zero (Helmert)."""
    steps = np.arange(1, n_contributors)
    basis = np.triu(np.ones((n_contributors, n_contributors - 1)))
    basis[steps, steps - 1] = -steps
    return basis / np.sqrt(steps * (steps + 1.0))


def size_mass_weights(sizes: npt.NDArray[np.integer], n_contributors: int) -> Array:
    """Weights `(n_coalitions,)`, mean 1, that give every coalition size its mass under the Shapley law.

    The mass of a size is shared over its coalitions; the mass of a size that was not measured goes to the
    nearest ones that were, in halves when two are equally near.
    """
    measured, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    distance = np.abs(np.arange(1, n_contributors)[:, None] - measured)
    nearest = distance == distance.min(axis=1, keepdims=True)
    mass = shapley_size_law(n_contributors) @ (nearest / nearest.sum(axis=1, keepdims=True))
    return (len(sizes) * mass / counts)[inverse]


def size_profile(sizes: npt.NDArray[np.integer], n_contributors: int, n_terms: int) -> Array:
    """Legendre polynomials `(n_coalitions, n_terms)` in the scaled log-odds of being present."""
    log_odds = np.log((sizes + 0.5) / (n_contributors - sizes + 0.5)) / np.log(2.0 * n_contributors)
    return np.polynomial.legendre.legvander(log_odds, max(n_terms - 1, 0))[:, :n_terms]


@dataclass(frozen=True)
class Regression:
    """A weighted linear regression, factorised once for any response and any ridge penalty.

    With W the weights, the singular value decomposition U diag(d) V' is that of W^(1/2) X after W^(1/2) times
    the nuisance columns has been projected out. Coefficients of the nuisance columns are not penalised.

    Attributes:
        root_weights: `(n_rows,)`, square roots of the weights, whose mean over the positive ones is 1.
        nuisance: `(n_rows, n_nuisance)`, orthonormal basis of the weighted nuisance columns.
        left: `(n_rows, rank)`, U.
        singular: `(rank,)`, d, in falling order.
        right: `(rank, n_columns)`, V'.
    """

    root_weights: Array
    nuisance: Array
    left: Array
    singular: Array
    right: Array

    @classmethod
    def factorise(cls, design: Array, nuisance: Array, weights: Array) -> Self:
        """Factorise design `(n_rows, n_columns)` beside nuisance columns `(n_rows, n_nuisance)`."""
        root_weights = np.sqrt(weights / weights[weights > 0].mean())
        weighted = root_weights[:, None] * design
        basis = np.linalg.qr(root_weights[:, None] * nuisance)[0]
        # Rounding is relative to the columns before the projection, which may leave nothing of them.
        tolerance = np.linalg.norm(weighted) * max(design.shape) * np.finfo(np.float64).eps
        left, singular, right = np.linalg.svd(weighted - basis @ (basis.T @ weighted), full_matrices=False)
        rank = int((singular > tolerance).sum())
        return cls(root_weights, basis, left[:, :rank], singular[:rank], right[:rank])

    @property
    def rank(self) -> int:
        return len(self.singular)

    def shrinkage(self, ridge: float) -> Array:
        """Factors `(rank,)` d^2 / (d^2 + ridge)."""
        return self.singular**2 / (self.singular**2 + ridge)

    def gain(self, ridge: float) -> Array:
        """The matrix `(n_columns, n_rows)` that turns a response into coefficients."""
        scaled = self.right.T * (self.shrinkage(ridge) / self.singular)
        return (scaled @ self.left.T) * self.root_weights

    def coefficients(self, response: Array, ridge: float) -> Array:
        """Coefficients `(n_columns,)` of the design columns."""
        weighted = self.root_weights * response
        return self.right.T @ (self.shrinkage(ridge) / self.singular * (self.left.T @ weighted))

    def residuals(self, response: Array, ridge: float) -> Array:
        """Residuals `(n_rows,)` of the weighted response."""
        weighted = self.root_weights * response
        fitted = self.left @ (self.shrinkage(ridge) * (self.left.T @ weighted))
        return weighted - self.nuisance @ (self.nuisance.T @ weighted) - fitted

    def leverages(self, ridge: float) -> Array:
        """Diagonal `(n_rows,)` of the hat matrix."""
        return (self.nuisance**2).sum(axis=1) + self.left**2 @ self.shrinkage(ridge)

    def covariance(self, response: Array, ridge: float, clusters: npt.NDArray[np.intp]) -> Array:
        """Sandwich covariance `(n_columns, n_columns)` of the coefficients, clustered, in the manner of HC3.

        Residuals of a cluster are replaced by those of a fit without it. Where that fit does not exist the
        pooled residual variance stands in, and NaN where there are no spare rows to pool.
        """
        residuals = self.residuals(response, ridge)
        spare = np.count_nonzero(self.root_weights) - self.leverages(ridge).sum()
        pooled_sd = np.sqrt(residuals @ residuals / spare) if spare > 1e-6 else np.nan
        weighted_gain = self.right.T * (self.shrinkage(ridge) / self.singular)
        factors = np.hstack([self.nuisance, self.left])
        shrinkage = np.concatenate([np.ones(self.nuisance.shape[1]), self.shrinkage(ridge)])

        scores = []
        for rows in cluster_rows(clusters):
            hat = (factors[rows] * shrinkage) @ factors[rows].T
            freedom, axes = np.linalg.eigh(np.eye(len(rows)) - hat)
            free = freedom > 1e-8
            gain = weighted_gain @ (self.left[rows].T @ axes)
            scores.append(gain[:, free] @ (axes[:, free].T @ residuals[rows] / freedom[free])[:, None])
            scores.append(gain[:, ~free] * pooled_sd)
        score = np.hstack(scores)
        return score @ score.T


def cluster_rows(clusters: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Row numbers of each cluster."""
    order = np.argsort(clusters, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)


def bootstrap_covariance(
    refit: Callable[[npt.NDArray[np.intp]], Array | None],
    clusters: npt.NDArray[np.intp],
    n_bootstrap: int,
    stream: np.random.Generator,
) -> Array:
    """Covariance of `refit(rows)` over clusters drawn with replacement; draws that give None are skipped.

    Raises:
        FitError: More than half of the draws were skipped: what is left would not be a fair sample.
    """
    groups = cluster_rows(clusters)
    draws = []
    for _ in range(n_bootstrap):
        drawn = stream.integers(len(groups), size=len(groups))
        estimate = refit(np.concatenate([groups[g] for g in drawn]))
        if estimate is not None:
            draws.append(estimate)
    if len(draws) < max(2, n_bootstrap / 2):
        raise FitError(
            f"Expected at least half of {n_bootstrap} bootstrap draws to identify every contributor, found "
            f"{len(draws)}. Measure more coalitions, use interval='analytic', or pass ridge > 0."
        )
    return np.atleast_2d(np.cov(np.array(draws), rowvar=False))


def require_identified(regression: Regression, basis: Array, names: Sequence[str] | None) -> None:
    """Raise RankDeficientFit, naming contributors, unless every column of `basis` is identified."""
    n_contributors, needed = basis.shape
    if regression.rank == needed:
        return
    unseen = np.eye(needed) - regression.right.T @ regression.right
    missing = np.flatnonzero(((basis @ unseen) * basis).sum(axis=1) > 1e-9)
    raise RankDeficientFit(
        f"Expected at least {needed} independent coalitions (a coalition and its complement count once) to "
        f"identify {n_contributors} contributors, found {regression.rank}. Not identified: contributors "
        f"{named(missing, names)}. Measure at least {needed - regression.rank} more coalitions that tell "
        "these apart, or pass ridge > 0."
    )


def require_value(value: float | None, name: str) -> float:
    """Return the behavior of an end point, or raise FitError if it is missing or not finite."""
    if value is None or not np.isfinite(value):
        coalition = name.removeprefix("v_")
        raise FitError(
            f"Expected {name}, the behavior of the {coalition} coalition, to be a finite number, found "
            f"{value}. Measure the {coalition} coalition."
        )
    return float(value)


def check_fit_options(
    ridge: float,
    interval: str,
    n_bootstrap: int,
    v_empty_variance: float,
    v_grand_variance: float,
    behavior_variance: float | None,
) -> None:
    """Raise ConfigError for an option that no attribution kernel accepts."""
    if interval not in ("analytic", "bootstrap"):
        raise ConfigError(f"Expected interval to be analytic or bootstrap, found {interval!r}. Choose one.")
    if n_bootstrap < 2:
        raise ConfigError(f"Expected n_bootstrap >= 2, found {n_bootstrap}. 200 is usual.")
    limits = {
        "ridge": ridge,
        "v_empty_variance": v_empty_variance,
        "v_grand_variance": v_grand_variance,
        "behavior_variance": behavior_variance,
    }
    for name, value in limits.items():
        if value is not None and not (np.isfinite(value) and value >= 0.0):
            raise ConfigError(f"Expected {name} to be a finite number >= 0, found {value}. Correct it.")


def check_names(contributor_names: Sequence[str] | None, n_contributors: int) -> Sequence[str] | None:
    """Return the names, or raise ConfigError unless there is one per contributor."""
    if contributor_names is not None and len(contributor_names) != n_contributors:
        raise ConfigError(
            f"Expected {n_contributors} contributor_names, found {len(contributor_names)}. Pass one per contributor."
        )
    return contributor_names


def check_weights(weights: npt.ArrayLike | None, n_coalitions: int) -> Array | None:
    """Return weights in float64, or raise FitError unless one per coalition, none negative, not all 0."""
    if weights is None:
        return None
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (n_coalitions,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        raise FitError(
            f"Expected weights ({n_coalitions},), finite, not negative and not all zero, found shape "
            f"{array.shape} from {array.min(initial=np.inf)} to {array.max(initial=-np.inf)}. Pass one "
            "weight per coalition."
        )
    return array
