"""Attribution kernels: the kinds of credit, all fitted from (masks, behaviors) by one signature.

`shapley` shares out the whole behavior and is what payouts need. `banzhaf` and `datamodel` predict coalitions
of about half the contributors best. `loo` and `add_one_in` look at one contributor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tribute.errors import FitError, RankDeficientFit
from tribute.games.coalitions import (
    check_evaluations,
    coalition_keys,
    complement_clusters,
    named,
)
from tribute.games.shapley import (
    Array,
    Regression,
    bootstrap_covariance,
    check_fit_options,
    check_names,
    check_weights,
    fit_shapley,
    require_identified,
    require_value,
)
from tribute.seeding import numpy_stream
from tribute.types import Attributions, Behaviors, CoalitionMasks

DATAMODEL_PENALTIES: Array = np.logspace(-4, 6, 61)
"""Ridge penalties among which `fit_datamodel` chooses, in units of coalitions."""


class AttributionKernel(Protocol):
    """What every `fit_*` function accepts; each states which options do not apply to it and are ignored."""

    def __call__(
        self,
        masks: CoalitionMasks,
        behaviors: Behaviors,
        *,
        v_empty: float | None = None,
        v_grand: float | None = None,
        estimator: str | None = None,
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
        """Fit attributions to measured coalitions.

        Args:
            masks: `(n_coalitions, n_contributors)`; True where the contributor is present.
            behaviors: `(n_coalitions,)`, raw (not negated).
            v_empty: Behavior of the empty coalition.
            v_grand: Behavior of the grand coalition.
            estimator: How to compute it, where there is a choice.
            ridge: Penalty on the sum of squares of the fitted coefficients.
            interval: Covariance from the formula (`analytic`) or from resampled coalitions (`bootstrap`).
            n_bootstrap: Number of bootstrap draws.
            seed: Root seed of the bootstrap.
            v_empty_variance: Variance of `v_empty` as measured.
            v_grand_variance: Variance of `v_grand` as measured.
            weights: `(n_coalitions,)`, not negative; of the squared errors.
            behavior_variance: Variance of one evaluation's measurement noise, where known.
            contributor_names: `(n_contributors,)`, for messages.
        """
        ...


def fit_datamodel(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    *,
    v_empty: float | None = None,
    v_grand: float | None = None,
    estimator: str | None = None,
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
    """Fit datamodel weights: ridge regression of the behavior on who is present, with a free intercept.

    The penalty is the one of `DATAMODEL_PENALTIES` with the smallest mean squared leave-one-out error, in
    closed form; with `ridge > 0`, that one. The covariance is of the shrunken values (the bias is not in it),
    and both intervals hold the penalty fixed.

    Options as in `AttributionKernel`; `v_empty`, `v_grand`, their variances, `estimator` and
    `behavior_variance` are ignored, and no number of coalitions is too small, though the interval may be NaN.

    Raises:
        FitError: Not one finite behavior per coalition.
        ConfigError: An option is out of range.

    References:
        Ilyas et al. (2022); Hastie, Tibshirani and Friedman (2009), section 7.10 (leave-one-out).
    """
    masks, behaviors = check_evaluations(masks, behaviors)
    check_fit_options(ridge, interval, n_bootstrap, v_empty_variance, v_grand_variance, behavior_variance)
    check_names(contributor_names, masks.shape[1])
    row_weights = check_weights(weights, len(masks))
    if ridge == 0.0:
        ridge = _leave_one_out_penalty(masks, behaviors, row_weights)
    return _fit_additive("datamodel", "ridge", masks, behaviors, row_weights, ridge, interval, n_bootstrap, seed)


def fit_banzhaf(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    *,
    v_empty: float | None = None,
    v_grand: float | None = None,
    estimator: str | None = None,
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
    """Fit Banzhaf values: least squares of the behavior on presence (+1/2, -1/2), with an intercept.

    Consistent for coalitions of the `uniform` removal distribution; for those of another law pass as
    `weights` the ratio of the two probabilities, or read the result as the best additive prediction under
    that law.

    Options as in `AttributionKernel`; `v_empty`, `v_grand`, their variances, `estimator` and
    `behavior_variance` are ignored. The empty and the grand coalition may be among `masks`.

    Raises:
        RankDeficientFit: The coalitions do not identify every contributor and `ridge` is 0; the message names
            those. Coalitions of one size never do.
        FitError: Not one finite behavior per coalition, or too few usable bootstrap draws.
        ConfigError: An option is out of range.

    References:
        Hammer and Holzman (1992); Wang and Jia (2023).
    """
    masks, behaviors = check_evaluations(masks, behaviors)
    check_fit_options(ridge, interval, n_bootstrap, v_empty_variance, v_grand_variance, behavior_variance)
    names = check_names(contributor_names, masks.shape[1])
    row_weights = check_weights(weights, len(masks))
    if ridge == 0.0:
        if len(np.unique(masks.sum(axis=1))) == 1:
            raise RankDeficientFit(
                f"Expected coalitions of at least two sizes to fit Banzhaf values, found {masks[0].sum()} "
                f"contributors in each, which leaves the common level of all {masks.shape[1]} open. Measure "
                "coalitions of removal_dist 'uniform', use fit_datamodel, or pass ridge > 0."
            )
        require_identified(_additive_regression(masks, row_weights), np.eye(masks.shape[1]), names)
    return _fit_additive("banzhaf", "least_squares", masks, behaviors, row_weights, ridge, interval, n_bootstrap, seed)


def fit_loo(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    *,
    v_empty: float | None = None,
    v_grand: float | None = None,
    estimator: str | None = None,
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
    """Leave-one-out credit: the grand coalition's behavior less that without the contributor.

    Repeats are averaged. The noise of one evaluation is `behavior_variance`, or else pooled over the repeats;
    with neither the covariance is unknown: NaN.

    Options as in `AttributionKernel`; `v_grand` is required; `v_empty`, its variance, `estimator`, `ridge`,
    `interval` (always analytic), `n_bootstrap`, `seed` and `weights` are ignored.

    Raises:
        RankDeficientFit: A contributor was never left out; the message names those.
        FitError: A row leaves out nobody or more than one, `v_grand` is missing, or a behavior is not finite.
        ConfigError: An option is out of range.
    """
    masks, behaviors = check_evaluations(masks, behaviors)
    check_fit_options(ridge, interval, n_bootstrap, v_empty_variance, v_grand_variance, behavior_variance)
    v1 = require_value(v_grand, "v_grand")
    means, covariance = _one_at_a_time(
        ~masks, behaviors, "leave out", behavior_variance, check_names(contributor_names, masks.shape[1])
    )
    values = v1 - means
    # The intercept that makes the additive prediction pass through every coalition measured.
    return _single_attributions("loo", masks, values, covariance + v_grand_variance, v1 - values.sum())


def fit_add_one_in(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    *,
    v_empty: float | None = None,
    v_grand: float | None = None,
    estimator: str | None = None,
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
    """Add-one-in credit: the contributor's behavior alone less the empty coalition's.

    Repeats, noise, ignored options and errors as in `fit_loo`, with `v_empty` in place of `v_grand`.

    Raises:
        RankDeficientFit: A contributor was never alone; the message names those.
        FitError: A row keeps nobody or more than one, `v_empty` is missing, or a behavior is not finite.
        ConfigError: An option is out of range.
    """
    masks, behaviors = check_evaluations(masks, behaviors)
    check_fit_options(ridge, interval, n_bootstrap, v_empty_variance, v_grand_variance, behavior_variance)
    v0 = require_value(v_empty, "v_empty")
    means, covariance = _one_at_a_time(
        masks, behaviors, "keep", behavior_variance, check_names(contributor_names, masks.shape[1])
    )
    return _single_attributions("add_one_in", masks, means - v0, covariance + v_empty_variance, v0)


ATTRIBUTION_KERNELS: dict[str, AttributionKernel] = {
    "shapley": fit_shapley,
    "datamodel": fit_datamodel,
    "banzhaf": fit_banzhaf,
    "loo": fit_loo,
    "add_one_in": fit_add_one_in,
}


def _additive_regression(
    masks: CoalitionMasks, row_weights: Array | None, rows: npt.NDArray[np.intp] | slice = slice(None)
) -> Regression:
    """Regression on presence, coded as +-1/2, beside an intercept."""
    weights = np.ones(len(masks)) if row_weights is None else row_weights
    return Regression.factorise(np.where(masks[rows], 0.5, -0.5), np.ones((len(masks), 1))[rows], weights[rows])


def _standardised(behaviors: Behaviors) -> tuple[Array, float]:
    """Behaviors less the first, in units of the largest difference, and that unit."""
    differences = behaviors - behaviors[0]
    scale = float(np.abs(differences).max()) or 1.0
    return differences / scale, scale


def _leave_one_out_penalty(masks: CoalitionMasks, behaviors: Behaviors, row_weights: Array | None) -> float:
    """The penalty with the smallest mean squared leave-one-out error."""
    regression = _additive_regression(masks, row_weights)
    response = _standardised(behaviors)[0]
    tiny = np.finfo(np.float64).tiny
    errors = [
        regression.residuals(response, ridge) / np.maximum(1.0 - regression.leverages(ridge), tiny)
        for ridge in DATAMODEL_PENALTIES
    ]
    return float(DATAMODEL_PENALTIES[np.argmin((np.array(errors) ** 2).mean(axis=1))])


def _fit_additive(
    kernel: str,
    estimator: str,
    masks: CoalitionMasks,
    behaviors: Behaviors,
    row_weights: Array | None,
    ridge: float,
    interval: str,
    n_bootstrap: int,
    seed: int,
) -> Attributions:
    """Additive regression with a free intercept and its covariance."""
    regression = _additive_regression(masks, row_weights)
    response, scale = _standardised(behaviors)
    clusters = complement_clusters(masks)
    if interval == "analytic":
        covariance = regression.covariance(response, ridge, clusters)
    else:

        def refit(rows: npt.NDArray[np.intp]) -> Array | None:
            if row_weights is not None and not row_weights[rows].any():
                return None
            drawn = _additive_regression(masks, row_weights, rows)
            if ridge == 0.0 and drawn.rank < masks.shape[1]:
                return None
            return drawn.coefficients(response[rows], ridge)

        stream = numpy_stream(seed, "bootstrap", kernel, estimator)
        covariance = bootstrap_covariance(refit, clusters, n_bootstrap, stream)
    values = scale * regression.coefficients(response, ridge)
    return Attributions(
        values=values,
        covariance=scale**2 * covariance,
        kernel=kernel,
        estimator=estimator,
        interval=interval,
        n_coalitions=len(masks),
        rank=regression.rank,
        intercept=float(np.average(behaviors - masks @ values, weights=row_weights)),
        fit_keys=frozenset(coalition_keys(masks)),
    )


def _one_at_a_time(
    chosen: CoalitionMasks,
    behaviors: Behaviors,
    verb: str,
    behavior_variance: float | None,
    names: Sequence[str] | None,
) -> tuple[Array, Array]:
    """Mean behavior per chosen contributor `(n,)` and its covariance `(n, n)`, NaN where unknown."""
    wrong = np.flatnonzero(chosen.sum(axis=1) != 1)
    if len(wrong):
        raise FitError(
            f"Expected every coalition to {verb} exactly one contributor, found another number in rows "
            f"{named(wrong, None)}. Leave those rows out."
        )
    repeats = chosen.sum(axis=0)
    missing = np.flatnonzero(repeats == 0)
    if len(missing):
        raise RankDeficientFit(
            f"Expected coalitions that {verb} each of {chosen.shape[1]} contributors, found none for "
            f"contributors {named(missing, names)}. Measure those {len(missing)} coalitions."
        )
    means = behaviors @ chosen / repeats
    spare = len(chosen) - chosen.shape[1]
    if behavior_variance is None and spare:
        behavior_variance = float(((behaviors - chosen @ means) ** 2).sum() / spare)
    if behavior_variance is None:
        return means, np.full((len(means), len(means)), np.nan)
    return means, np.diag(behavior_variance / repeats)


def _single_attributions(
    kernel: str, masks: CoalitionMasks, values: Array, covariance: Array, intercept: float
) -> Attributions:
    return Attributions(
        values=values,
        covariance=covariance,
        kernel=kernel,
        estimator="difference",
        interval="analytic",
        n_coalitions=len(masks),
        rank=len(values),
        intercept=float(intercept),
        fit_keys=frozenset(coalition_keys(masks)),
    )
