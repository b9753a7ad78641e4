"""What the estimators share: weighted regression factorised once, clustered uncertainty, and pooling of repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tribute.errors import FitError, RankDeficientFit
from tribute.games.coalitions import check_masks, named
from tribute.types import Behaviors, CoalitionMasks

Array = npt.NDArray[np.float64]

RIDGE_PENALTIES: Array = np.logspace(-4, 6, 61)
"""Ridge penalties among which leave-one-out chooses, in units of coalitions."""

_NO_FREEDOM = 1e-8
"""Residual degrees of freedom below which rounding decides."""


@dataclass(frozen=True)
class ContrastEstimate:
    """What an estimator says of the contrasts, the credit less its mean, in the unit of the behavior.

    Attributes:
        contrasts: `(n_contributors,)`, sums to 0.
        covariance: `(n_contributors, n_contributors)`, of the contrasts with the end points as given.
        noise_sd: Effective noise of one evaluation about the fit; NaN when it cannot be told.
        loo_r2: Leave-one-out R2 of the fitted response; NaN when it does not exist.
        rank: Identified contrasts + 1: `n_contributors` when nothing is missing.
        by_empty: `(n_contributors,)`, derivative of the contrasts by `v_empty`; None where they do not depend on it.
        by_grand: `(n_contributors,)`, the same by `v_grand`.
    """

    contrasts: Array
    covariance: Array
    noise_sd: float
    loo_r2: float
    rank: int
    by_empty: Array | None = None
    by_grand: Array | None = None


def pool_repeats(
    masks: CoalitionMasks, behaviors: Behaviors, variances: Array
) -> tuple[CoalitionMasks, Behaviors, Array, npt.NDArray[np.intp]]:
    """Replace the repeats of a coalition by their inverse-variance mean, in the order of first appearance.

    Args:
        masks: `(n_rows, n_contributors)`.
        behaviors: `(n_rows,)`.
        variances: `(n_rows,)`, positive, of each row's measurement noise; only their ratios matter.

    Returns:
        Distinct masks `(n_coalitions, n_contributors)`, their behaviors, their variances 1 / sum(1 / variance),
        and for every row the coalition that it went to, `(n_rows,)`.
    """
    packed = np.packbits(check_masks(masks), axis=1)
    _, first, inverse = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    row_of = place[inverse.reshape(-1)]
    precision = np.bincount(row_of, weights=1.0 / variances)
    offset = behaviors[first[order]]  # repeats that agree keep their value to the last bit
    excess = np.bincount(row_of, weights=(behaviors - offset[row_of]) / variances) / precision
    return masks[first[order]], offset + excess, 1.0 / precision, row_of


def contrast_basis(n_contributors: int) -> Array:
    """Orthonormal basis `(n_contributors, n_contributors - 1)` of the vectors that sum to zero (Helmert)."""
    steps = np.arange(1, n_contributors)
    basis = np.triu(np.ones((n_contributors, n_contributors - 1)))
    basis[steps, steps - 1] = -steps
    return basis / np.sqrt(steps * (steps + 1.0))


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
        return self._weighted_gain(ridge) * self.root_weights

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
        pooled_sd = np.sqrt(residuals @ residuals / spare) if spare > _NO_FREEDOM else np.nan
        gain = self._weighted_gain(ridge)
        scores = []
        for rows, freedom, axes in self._blocks(ridge, clusters):
            free = freedom > _NO_FREEDOM
            turned = gain.T[rows].swapaxes(1, 2) @ axes  # (n_clusters, n_columns, size)
            left_out = _along(axes, residuals[rows]) / np.where(free, freedom, np.inf)
            scores.append(np.einsum("kna,ka->nk", turned, left_out))
            scores.append(turned.swapaxes(1, 2)[~free].T * pooled_sd)
        score = np.hstack(scores)
        return score @ score.T

    def diagnose(
        self, response: Array, ridge: float, clusters: npt.NDArray[np.intp], precision: Array
    ) -> tuple[float, float]:
        """Noise of one evaluation of precision 1 about the fit, and R2 with clusters left out; NaN where undefined.

        The noise is the root of the mean squared residual, each divided by the freedom that its leverage leaves
        it. The R2 compares the squared errors of fits without the cluster with the spread of the response about
        its mean, after the nuisance columns have been projected out of both.
        """
        residuals = self.residuals(response, ridge)
        noise = expected = missed = 0.0
        has_all = True
        for rows, freedom, axes in self._blocks(ridge, clusters):
            free = freedom > _NO_FREEDOM
            turned = _along(axes, residuals[rows])[free]
            noise += float((turned**2 / freedom[free]).sum())
            expected += float(_along(axes**2, (self.root_weights**2 / precision)[rows])[free].sum())
            missed += float(((turned / freedom[free]) ** 2).sum())
            has_all = has_all and bool(free.all())

        weighted = self.root_weights * response
        spread, mean = (x - self.nuisance @ (self.nuisance.T @ x) for x in (weighted, self.root_weights))
        if np.linalg.norm(mean) > 1e-8 * np.linalg.norm(self.root_weights):  # else the mean is a nuisance already
            spread -= mean * (mean @ spread) / (mean @ mean)
        rounding = np.finfo(np.float64).eps * np.linalg.norm(weighted) * len(weighted)
        has_spread = np.linalg.norm(spread) > rounding
        return (
            float(np.sqrt(noise / expected)) if expected > 0 else np.nan,
            1.0 - missed / float(spread @ spread) if has_all and has_spread else np.nan,
        )

    def leave_out_penalty(self, response: Array, clusters: npt.NDArray[np.intp]) -> float:
        """The one of `RIDGE_PENALTIES` whose fits predict clusters left out best; the largest of those that tie."""
        errors = []
        for ridge in RIDGE_PENALTIES:
            residuals, error = self.residuals(response, ridge), 0.0
            for rows, freedom, axes in self._blocks(ridge, clusters):
                # What only the nuisance columns explain cannot be predicted under any penalty.
                free = freedom > 1e-12
                error += float(((_along(axes, residuals[rows])[free] / freedom[free]) ** 2).sum())
            errors.append(error)
        best = np.flatnonzero(np.array(errors) <= min(errors) * (1.0 + 1e-9))
        return float(RIDGE_PENALTIES[best[-1]])

    def _weighted_gain(self, ridge: float) -> Array:
        """What turns the weighted response into coefficients, `(n_columns, n_rows)`."""
        return (self.right.T * (self.shrinkage(ridge) / self.singular)) @ self.left.T

    def _blocks(
        self, ridge: float, clusters: npt.NDArray[np.intp]
    ) -> Iterator[tuple[npt.NDArray[np.intp], Array, Array]]:
        """Per size of cluster: rows `(k, size)`, and eigenvalues and axes of I - H within each cluster."""
        factors = np.hstack([self.nuisance, self.left])
        shrinkage = np.concatenate([np.ones(self.nuisance.shape[1]), self.shrinkage(ridge)])
        groups = cluster_rows(clusters)
        for size in sorted({len(group) for group in groups}):
            rows = np.array([group for group in groups if len(group) == size])
            block = factors[rows]
            hat = (block * shrinkage) @ block.swapaxes(1, 2)
            freedom, axes = np.linalg.eigh(np.eye(size) - hat)
            yield rows, freedom, axes


def _along(axes: Array, values: Array) -> Array:
    """Coordinates `(k, size)` of values `(k, size)` along the columns of axes `(k, size, size)`."""
    return np.einsum("ksa,ks->ka", axes, values)


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
