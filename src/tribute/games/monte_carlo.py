"""Estimators that average over coalitions without a regression: unbiased, but in need of many.

They are here for comparison, and for coalitions that were drawn for them: their error does not shrink where the
behavior is nearly additive, as that of a regression does. Known noise does not weigh in them, since what varies is
mostly which coalitions were drawn; nor are repeats pooled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tribute.errors import FitError, RankDeficientFit
from tribute.games.coalitions import complement_clusters, named
from tribute.games.fitting import Evaluations, FitOptions, banzhaf_weights, law_weights
from tribute.games.regression import Array, ContrastEstimate, bootstrap_covariance
from tribute.seeding import numpy_stream
from tribute.types import CoalitionMasks


def unbiased_contrasts(evaluations: Evaluations, v_grand: float, options: FitOptions) -> ContrastEstimate:
    """Contrasts by the published least squares with the exact second moments of its law in place of empirical ones.

    With p the Shapley law of the sizes, the matrix A = E[s s'] has 1/2 on its diagonal and the same number a
    everywhere else, with 1/2 - a = E[k (n - k)] / (n (n - 1)) = 1 / (2 H), H = 1 + 1/2 + ... + 1/(n-1). Solving the
    constrained normal equations leaves c = 2 H E[(s - k/n) (y - v0)], a mean over coalitions. The covariance is that of
    a mean over independent draws (`draw_numbers`), on the safe side where the design balances the sizes.

    Args:
        evaluations: Rows as drawn, with behaviors counted from `v_empty`.
        v_grand: Not needed.
        options: `design` (see `law_weights`), `interval`, `n_bootstrap`, `seed`.

    Raises:
        FitError: The design does not choose members at random, or too few coalitions for the bootstrap.

    References:
        Covert and Lee (2021), section 3.2.
    """
    del v_grand
    _require_random_members("unbiased", "gp, size_adjusted, ridge or least_squares", options.design)
    n_contributors = evaluations.n_contributors
    factor = 2.0 * (1.0 / np.arange(1, n_contributors)).sum()
    centred = factor * (evaluations.masks - evaluations.sizes[:, None] / n_contributors)

    def weigh(part: Evaluations) -> Array:
        weights = law_weights(part, "shapley", options.design, by_precision=False)
        return weights / weights.sum()

    def refit(rows: npt.NDArray[np.intp]) -> Array:
        part = evaluations.take(rows)
        return (weigh(part) * part.behaviors) @ centred[rows]

    weights, draws = weigh(evaluations), draw_numbers(evaluations.masks, options.design)
    contrasts = refit(np.arange(len(weights)))
    deviations = weights[:, None] * (centred * evaluations.behaviors[:, None] - contrasts)
    return ContrastEstimate(
        contrasts,
        _spread(deviations, draws, refit, options, "unbiased"),
        noise_sd=np.nan,
        loo_r2=np.nan,
        rank=int(np.linalg.matrix_rank(centred)) + 1,
        by_empty=-weights @ centred,
    )


def permutation_contrasts(evaluations: Evaluations, v_grand: float, options: FitOptions) -> ContrastEstimate:
    """Contrasts by mean marginal contributions along walks from nobody to everybody.

    Args:
        evaluations: Rows as drawn, not pooled: blocks of n - 1 nested coalitions of sizes 1 to n - 1, as
            `draw_design("permutation", ...)` makes them. A walk and the reverse that follows it are one draw for the
            covariance.
        v_grand: Behavior of the grand coalition, counted from `v_empty`.
        options: `interval`, `n_bootstrap`, `seed`.

    Raises:
        FitError: The rows are not complete walks.

    References:
        Castro, Gomez and Tejada (2009); Mitchell et al. (2022) (antithetic permutations).
    """
    positions = walk_positions(evaluations.masks)  # (n_walks, n_contributors)
    n_walks, n_contributors = positions.shape
    path = np.empty((n_walks, n_contributors + 1))
    path[:, 0], path[:, -1] = 0.0, v_grand
    path[:, 1:-1] = evaluations.behaviors.reshape(n_walks, -1)
    marginals = np.take_along_axis(np.diff(path), positions, axis=1) - v_grand / n_contributors

    draws = _walk_numbers(positions)
    contrasts = marginals.mean(axis=0)
    deviations = (marginals - contrasts) / n_walks
    return ContrastEstimate(
        contrasts,
        _spread(deviations, draws, lambda walks: marginals[walks].mean(axis=0), options, "permutation"),
        noise_sd=np.nan,
        loo_r2=np.nan,
        rank=n_contributors,
        by_empty=1.0 / n_contributors - (positions == 0).mean(axis=0),
        by_grand=(positions == n_contributors - 1).mean(axis=0) - 1.0 / n_contributors,
    )


def walk_positions(masks: CoalitionMasks) -> npt.NDArray[np.intp]:
    """Position `(n_walks, n_contributors)`, 0 to n - 1, at which every contributor joins each walk.

    Raises:
        FitError: The rows are not blocks of n - 1 nested coalitions of sizes 1 to n - 1.
    """
    n_rows, n_contributors = masks.shape
    length = n_contributors - 1
    n_walks, spare = divmod(n_rows, length)
    expected = (
        f"Expected complete walks of design 'permutation', blocks of {length} rows each of which adds one contributor "
        "to the row before"
    )
    remedy = "Pass whole walks in the order of the design, or use gp or size_adjusted."
    if spare:
        raise FitError(f"{expected}, found {n_rows} rows: the last walk has {spare} of {length}. {remedy}")
    walks = masks.reshape(n_walks, length, n_contributors)
    is_step = walks.sum(axis=2) == np.arange(1, n_contributors)
    is_step[:, 1:] &= ~(walks[:, :-1] & ~walks[:, 1:]).any(axis=2)
    wrong = np.flatnonzero(~is_step.reshape(-1))
    if len(wrong):
        raise FitError(f"{expected}, found that rows {named(wrong, None)} do not. {remedy}")
    return (~walks).sum(axis=1)


def maximum_sample_reuse(evaluations: Evaluations, options: FitOptions) -> tuple[Array, Array]:
    """Banzhaf values by the mean behavior with a contributor less the mean without, and their covariance.

    The covariance is that of the linearised means over independent draws (`draw_numbers`).

    Args:
        evaluations: Rows as drawn.
        options: `design` (see `banzhaf_weights`), `interval`, `n_bootstrap`, `seed`, `contributor_names`.

    Raises:
        RankDeficientFit: A contributor is in all coalitions or in none; the message names those.
        FitError: The design does not choose members at random, or too few coalitions for the bootstrap.

    References:
        Wang and Jia (2023), section 4.
    """
    _require_random_members("msr", "kernel_banzhaf", options.design)
    always, never = evaluations.masks.all(axis=0), ~evaluations.masks.any(axis=0)
    if (always | never).any():
        missing = named(np.flatnonzero(always | never), options.contributor_names)
        raise RankDeficientFit(
            f"Expected coalitions with and without each of {evaluations.n_contributors} contributors, found only one "
            f"of these for contributors {missing}. Measure coalitions of removal_dist 'uniform'."
        )

    def sides(part: Evaluations) -> tuple[Array, Array]:
        """Weights `(n_coalitions, n_contributors)` of the means with and without each contributor."""
        weights = banzhaf_weights(part, options.design, by_precision=False)
        present, absent = weights[:, None] * part.masks, weights[:, None] * ~part.masks
        with np.errstate(invalid="ignore"):  # a bootstrap draw without one of the sides: NaN, skipped below
            return present / present.sum(axis=0), absent / absent.sum(axis=0)

    def refit(rows: npt.NDArray[np.intp]) -> Array | None:
        part = evaluations.take(rows)
        present, absent = sides(part)
        values = part.behaviors @ present - part.behaviors @ absent
        return values if np.isfinite(values).all() else None

    present, absent = sides(evaluations)
    behaviors = evaluations.behaviors
    deviations = present * (behaviors[:, None] - behaviors @ present) - absent * (
        behaviors[:, None] - behaviors @ absent
    )
    values = behaviors @ present - behaviors @ absent
    draws = draw_numbers(evaluations.masks, options.design or "uniform")
    return values, _spread(deviations, draws, refit, options, "msr")


def draw_numbers(masks: CoalitionMasks, design: str | None) -> npt.NDArray[np.intp]:
    """Number rows `(n_coalitions,)` so that those that were not drawn independently share a number.

    Where the design draws with replacement every row is a draw; of walks one with the reverse that follows it;
    elsewhere a coalition, its repeats, which are taken for repeated measurements, and its complement.

    Raises:
        FitError: Rows of design `permutation` that are not complete walks.
    """
    if design == "permutation":
        return np.repeat(_walk_numbers(walk_positions(masks)), masks.shape[1] - 1)
    if design in ("kernel", "shapley", "uniform"):
        return np.arange(len(masks))
    return complement_clusters(masks)


def _walk_numbers(positions: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Number walks `(n_walks,)` so that one and its reverse share a number where they follow each other."""
    is_reversed = (positions[1:] + positions[:-1] == positions.shape[1] - 1).all(axis=1)
    numbers = np.zeros(len(positions), dtype=np.intp)
    is_second = False
    for walk, reverses in enumerate(is_reversed, start=1):
        is_second = bool(reverses) and not is_second
        numbers[walk] = numbers[walk - 1] + (not is_second)
    return numbers


def _spread(
    deviations: Array,
    draws: npt.NDArray[np.intp],
    refit: Callable[[npt.NDArray[np.intp]], Array | None],
    options: FitOptions,
    estimator: str,
) -> Array:
    """Covariance of a sum of deviations `(n_rows, n_contributors)`, independent between draws, as options ask."""
    if options.interval == "bootstrap":
        stream = numpy_stream(options.seed, "bootstrap", estimator)
        return bootstrap_covariance(refit, draws, options.n_bootstrap, stream)
    n_draws = int(draws.max()) + 1
    if n_draws == 1:
        return np.full((deviations.shape[1],) * 2, np.nan)
    sums = np.zeros((n_draws, deviations.shape[1]))
    np.add.at(sums, draws, deviations)
    return sums.T @ sums * (n_draws / (n_draws - 1))


def _require_random_members(estimator: str, serving: str, design: str | None) -> None:
    """Raise FitError for a design whose coalitions of one size are not equally likely."""
    if design in ("orthogonal", "loo", "add_one_in"):
        raise FitError(
            f"Expected coalitions whose members were drawn at random for estimator={estimator!r}, found design "
            f"{design!r}, which chooses them. Use {serving}, or measure design 'stratified', 'paired' or 'kernel'."
        )
