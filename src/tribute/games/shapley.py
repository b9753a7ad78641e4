"""Estimators of Shapley values from measured coalitions, with their covariance.

All of them work in *contrast form*: phi_i = c_i + (v1 - v0) / n with sum c = 0, where v0 and v1 are the behaviors of
the empty and the grand coalition. An estimator finds the contrasts c and their covariance; the credit then sums to
v1 - v0 by construction, and noise of v0 and v1 moves every contributor alike, besides what it does to c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import numpy as np
import numpy.typing as npt

from tribute.errors import ConfigError, FitError
from tribute.games.coalitions import check_masks, coalition_keys, named
from tribute.games.fitting import Evaluations, FitKeywords, FitOptions, check_fit, law_weights, require_value
from tribute.games.gaussian_process import MAX_ROWS, gaussian_process_contrasts
from tribute.games.monte_carlo import permutation_contrasts, unbiased_contrasts
from tribute.games.regression import (
    Array,
    ContrastEstimate,
    Regression,
    bootstrap_covariance,
    contrast_basis,
    require_identified,
    size_profile,
)
from tribute.seeding import numpy_stream
from tribute.types import Attributions, Behaviors, CoalitionMasks

SHAPLEY_ESTIMATORS = ("auto", "gp", "size_adjusted", "ridge", "least_squares", "unbiased", "permutation")

MAX_PROFILE_TERMS = 5
COALITIONS_PER_PROFILE_TERM = 8
"""Limits of the size profile: at most 5 terms, one for every 8 coalitions (this project's simulations)."""


def fit_shapley(masks: CoalitionMasks, behaviors: Behaviors, **options: Unpack[FitKeywords]) -> Attributions:
    """Estimate Shapley values from measured coalitions.

    Estimators, of which all but the last three serve coalitions of any design:

    - `gp`: a Gaussian process over coalitions (`games.gaussian_process`); needs the fewest coalitions and is the only
      one that says something sensible with fewer coalitions than contributors. Uses `prior`.
    - `size_adjusted`: least squares after a smooth profile in the coalition's size has been projected out, every size
      weighing its mass under the Shapley law.
    - `ridge`: `least_squares` with a penalty on the contrasts that shrinks towards equal credit; the one with the
      smallest error when coalitions, or complement pairs, are left out, or the one given. Its intervals are about the
      shrunken values and leave out the bias.
    - `least_squares`: as published, one additive model for all coalitions alike. Any curvature of the behavior in the
      size acts on it as noise. Weighs by the design (`design=None` counts as `kernel`).
    - `unbiased`: the published one with the exact second moments of the Shapley law; members must be drawn at random,
      so not with design `orthogonal`.
    - `permutation`: mean marginal contributions along walks; for the rows of design `permutation` only.
    - `auto`: `gp` for up to 4,000 distinct coalitions, or complement pairs, `size_adjusted` beyond, and where the
      options ask for what `gp` does not have. The result says which and why.

    Repeats of a coalition are pooled first, except by `unbiased` and `permutation`, which take every row as a draw.
    Known noise, and so the number of repeats, weighs in the regressions: the weight of an evaluation is the one that
    its design needs, divided by the relative variance of its noise. As that variance has nothing to do with who is in
    the coalition the estimators stay consistent. What is gained is precision, as long as the noise exceeds the misfit
    of the additive model; `gp` tells these apart.

    The analytic covariance of the regressions is a sandwich with leverage-corrected residuals (HC3), clustered where a
    coalition and its complement were measured. It holds measurement noise and misfit alike, and is on the safe side
    from about five coalitions per contributor on; with no spare coalitions it is NaN. The bootstrap draws the same
    clusters with replacement, holds the penalty, and skips draws that do not identify every contributor.

    Args:
        masks: `(n_coalitions, n_contributors)`; True where the contributor is present. Neither the empty nor
            the grand coalition may occur.
        behaviors: `(n_coalitions,)`, raw (not negated).
        **options: As in `FitOptions`. `v_empty` and `v_grand` are required. An option for which the estimator
            has no use is refused, but for `behavior_variance`, which `unbiased` and `permutation` leave aside.

    Returns:
        Values that sum to `v_grand - v_empty`, in the unit of `behaviors`. `rank` counts the identified
        contrasts and their sum: `n_contributors` when nothing is missing. `n_coalitions` counts repeats.

    Raises:
        RankDeficientFit: A regression without a penalty, and coalitions that do not identify every contributor;
            the message names those.
        FitError: Evaluations that do not fit together, an empty or grand coalition, a missing end point,
            coalitions that the estimator cannot use, or too few usable bootstrap draws.
        ConfigError: An option is unknown, out of range, or of no use to the estimator.

    References:
        Covert and Lee (2021), eq. 7 (`least_squares`); Lundberg and Lee (2017), theorem 2 (the size law);
        MacKinnon and White (1985) (HC3).
    """
    given = FitOptions(**options)
    estimator = given.chosen(SHAPLEY_ESTIMATORS)
    v0, v1 = require_value(given.v_empty, "v_empty"), require_value(given.v_grand, "v_grand")
    _check_proper(check_masks(masks))
    evaluations = check_fit(masks, behaviors, given, pool=estimator not in ("unbiased", "permutation"))
    explanation = ""
    if estimator == "auto":
        estimator, explanation = _automatic(evaluations, given)
    else:
        _refuse_useless(estimator, given)

    # Unit scale, so that ranks and rounding do not depend on the unit of the behavior.
    scale = float(max(np.abs(evaluations.behaviors - v0).max(), abs(v1 - v0))) or 1.0
    found = _ESTIMATORS[estimator][0](evaluations.in_units(v0, scale), (v1 - v0) / scale, given)
    n_contributors = evaluations.n_contributors
    by_empty = (0.0 if found.by_empty is None else found.by_empty) - np.full(n_contributors, 1.0 / n_contributors)
    by_grand = (0.0 if found.by_grand is None else found.by_grand) + np.full(n_contributors, 1.0 / n_contributors)
    return Attributions(
        values=scale * found.contrasts + (v1 - v0) / n_contributors,
        covariance=scale**2 * found.covariance
        + given.v_empty_variance * np.outer(by_empty, by_empty)
        + given.v_grand_variance * np.outer(by_grand, by_grand),
        kernel="shapley",
        estimator=estimator,
        interval=given.interval,
        n_coalitions=evaluations.n_evaluations,
        rank=found.rank,
        intercept=v0,
        fit_keys=frozenset(coalition_keys(evaluations.masks)),
        design=given.design,
        noise_sd=scale * found.noise_sd,
        loo_r2=found.loo_r2,
        explanation=explanation,
    )


def least_squares_contrasts(evaluations: Evaluations, v_grand: float, options: FitOptions) -> ContrastEstimate:
    """Contrasts of the published estimator: one additive model, weighted as the design needs."""
    design = options.design or "kernel"
    return _regression_contrasts("least_squares", evaluations, v_grand, options, design)


def ridge_contrasts(evaluations: Evaluations, v_grand: float, options: FitOptions) -> ContrastEstimate:
    """Contrasts of the published estimator with a penalty, chosen by leaving out coalitions unless given."""
    design = options.design or "kernel"
    return _regression_contrasts("ridge", evaluations, v_grand, options, design, choose_ridge=True)


def size_adjusted_contrasts(evaluations: Evaluations, v_grand: float, options: FitOptions) -> ContrastEstimate:
    """Contrasts after projecting out a smooth profile in the size, sizes weighing as under the Shapley law."""
    richest = len(evaluations.masks) // COALITIONS_PER_PROFILE_TERM
    n_profile_terms = min(MAX_PROFILE_TERMS, richest, len(np.unique(evaluations.sizes)))
    return _regression_contrasts("size_adjusted", evaluations, v_grand, options, None, n_profile_terms=n_profile_terms)


def _gp_contrasts(evaluations: Evaluations, v_grand: float, options: FitOptions) -> ContrastEstimate:
    del v_grand, options  # the contrasts do not depend on the end points
    relative_variances = 1.0 / evaluations.precision
    return gaussian_process_contrasts(
        evaluations.masks,
        evaluations.behaviors,
        relative_variances=relative_variances if np.ptp(relative_variances) else None,
        prior=evaluations.prior,
    )


_ESTIMATORS: dict[str, tuple[Callable[[Evaluations, float, FitOptions], ContrastEstimate], tuple[str, ...]]] = {
    "gp": (_gp_contrasts, ("prior",)),
    "size_adjusted": (size_adjusted_contrasts, ("ridge", "weights", "interval='bootstrap'")),
    "ridge": (ridge_contrasts, ("ridge", "weights", "interval='bootstrap'")),
    "least_squares": (least_squares_contrasts, ("ridge", "weights", "interval='bootstrap'")),
    "unbiased": (unbiased_contrasts, ("weights", "interval='bootstrap'")),
    "permutation": (permutation_contrasts, ("interval='bootstrap'",)),
}
"""Every estimator, on behaviors counted from `v_empty`, and which of the optional options it has a use for."""


def _useless(estimator: str, options: FitOptions) -> list[str]:
    """Options that were given and for which the estimator has no use."""
    is_given = {
        "prior": options.prior is not None,
        "ridge": options.ridge > 0.0,
        "weights": options.weights is not None,
        "interval='bootstrap'": options.interval == "bootstrap",
    }
    return [name for name, given in is_given.items() if given and name not in _ESTIMATORS[estimator][1]]


def _refuse_useless(estimator: str, options: FitOptions) -> None:
    """Raise ConfigError for an option that the estimator would have to ignore."""
    for name in _useless(estimator, options):
        serving = ", ".join(other for other, (_, uses) in _ESTIMATORS.items() if name in uses)
        hint = " (the analytic interval)" if name.startswith("interval") else ""
        raise ConfigError(
            f"Expected no {name} with estimator={estimator!r}, which has no use for it. Leave it out{hint}, or choose "
            f"an estimator that has: {serving}."
        )


def _automatic(evaluations: Evaluations, options: FitOptions) -> tuple[str, str]:
    """The estimator for the case, and why."""
    cluster_sizes = np.bincount(evaluations.clusters)
    is_paired = bool((cluster_sizes == 2).all())
    n_rows = len(cluster_sizes) if is_paired else len(evaluations.masks)
    found = f"{n_rows:,} {'complement pairs' if is_paired else 'coalitions'}"
    useless = _useless("gp", options)
    if not useless and n_rows <= MAX_ROWS:
        return "gp", f"auto chose gp: the most accurate for up to {MAX_ROWS:,} coalitions or pairs, here {found}."
    reason = (
        f"gp has no use for {' and '.join(useless)}" if useless else f"gp takes {MAX_ROWS:,}, and there are {found}"
    )
    unused = "; the prior is not used" if options.prior is not None else ""
    return "size_adjusted", f"auto chose size_adjusted: {reason}{unused}."


def _check_proper(masks: CoalitionMasks) -> None:
    """Raise FitError unless there are two contributors and every coalition has some of them but not all."""
    n_contributors = masks.shape[1]
    if n_contributors == 1:
        raise FitError(
            "Expected at least 2 contributors, found 1, whose credit is v_grand - v_empty: there is nothing to "
            "estimate. Split the data among more contributors."
        )
    sizes = masks.sum(axis=1)
    improper = np.flatnonzero((sizes == 0) | (sizes == n_contributors))
    if len(improper):
        raise FitError(
            f"Expected proper coalitions, found the empty or the grand one in rows {named(improper, None)}. "
            "Pass those as v_empty and v_grand."
        )


def _regression_contrasts(
    name: str,
    evaluations: Evaluations,
    v_grand: float,
    options: FitOptions,
    design: str | None,
    *,
    n_profile_terms: int = 0,
    choose_ridge: bool = False,
) -> ContrastEstimate:
    """Regress y - (v1 - v0) |s| / n, with y counted from v0, on the contrasts, beside a profile in the size.

    `design` is the one by which coalitions weigh; None gives every size its mass.
    """
    n_contributors, sizes = evaluations.n_contributors, evaluations.sizes
    share = sizes / n_contributors
    response = evaluations.behaviors - v_grand * share
    basis = contrast_basis(n_contributors)  # (n_contributors, n_contributors - 1)
    columns = evaluations.masks @ basis

    def regress(rows: npt.NDArray[np.intp], n_terms: int) -> Regression:
        weights = law_weights(evaluations.take(rows), "shapley", design)
        return Regression.factorise(columns[rows], size_profile(sizes[rows], n_contributors, n_terms), weights)

    # The richest size profile that leaves every contrast identified.
    all_rows = np.arange(len(sizes))
    regression = regress(all_rows, n_profile_terms)
    while regression.rank < n_contributors - 1 and n_profile_terms and options.ridge == 0.0:
        n_profile_terms -= 1
        regression = regress(all_rows, n_profile_terms)

    clusters = evaluations.clusters
    ridge = options.ridge
    if ridge == 0.0 and choose_ridge:
        ridge = regression.leave_out_penalty(response, clusters)
    elif ridge == 0.0:
        require_identified(regression, basis, options.contributor_names)

    if options.interval == "analytic":
        spread = regression.covariance(response, ridge, clusters)
    else:

        def refit(rows: npt.NDArray[np.intp]) -> Array | None:
            drawn = regress(rows, min(n_profile_terms, len(np.unique(sizes[rows]))))
            if ridge == 0.0 and drawn.rank < n_contributors - 1:
                return None
            return drawn.coefficients(response[rows], ridge)

        stream = numpy_stream(options.seed, "bootstrap", "shapley", name)
        spread = bootstrap_covariance(refit, clusters, options.n_bootstrap, stream)

    noise_sd, loo_r2 = regression.diagnose(response, ridge, clusters, evaluations.precision)
    gain = regression.gain(ridge)  # the estimate is linear in the end points, too
    return ContrastEstimate(
        contrasts=basis @ regression.coefficients(response, ridge),
        covariance=basis @ spread @ basis.T,
        noise_sd=noise_sd,
        loo_r2=loo_r2,
        rank=regression.rank + 1,
        by_empty=-basis @ (gain @ (1.0 - share)),
        by_grand=-basis @ (gain @ share),
    )
