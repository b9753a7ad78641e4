"""Attribution kernels: the kinds of credit, all fitted from (masks, behaviors) by one signature.

`shapley` shares out the whole behavior and is what payouts need. `banzhaf` and `datamodel` predict coalitions
of about half the contributors best. `loo` and `add_one_in` look at one contributor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, Unpack

import numpy as np
import numpy.typing as npt

from tribute.errors import ConfigError, FitError, RankDeficientFit
from tribute.games.coalitions import coalition_keys, named
from tribute.games.fitting import Evaluations, FitKeywords, FitOptions, banzhaf_weights, check_fit, require_value
from tribute.games.monte_carlo import maximum_sample_reuse
from tribute.games.regression import Array, Regression, bootstrap_covariance, require_identified
from tribute.games.shapley import fit_shapley
from tribute.seeding import numpy_stream
from tribute.types import Attributions, Behaviors, CoalitionMasks

BANZHAF_ESTIMATORS = ("kernel_banzhaf", "msr")


class AttributionKernel(Protocol):
    """What every `fit_*` function accepts; each states which options do not apply to it and are ignored."""

    def __call__(self, masks: CoalitionMasks, behaviors: Behaviors, **options: Unpack[FitKeywords]) -> Attributions:
        """Fit attributions to measured coalitions.

        Args:
            masks: `(n_coalitions, n_contributors)`; True where the contributor is present.
            behaviors: `(n_coalitions,)`, raw (not negated).
            **options: As in `FitOptions`.
        """
        ...


def fit_datamodel(masks: CoalitionMasks, behaviors: Behaviors, **options: Unpack[FitKeywords]) -> Attributions:
    """Fit datamodel weights: ridge regression of the behavior on who is present, with a free intercept.

    The penalty is the one of `RIDGE_PENALTIES` with the smallest mean squared leave-one-out error, in
    closed form; with `ridge > 0`, that one. The covariance is of the shrunken values (the bias is not in it),
    and both intervals hold the penalty fixed. Repeats are pooled; known noise weighs as in `fit_shapley`.

    Options as in `FitOptions`; `v_empty`, `v_grand`, their variances, `estimator` and `prior` are ignored, the design
    is only recorded, and no number of coalitions is too small, though the interval may be NaN.

    Raises:
        FitError: Not one finite behavior per coalition.
        ConfigError: An option is out of range.

    References:
        Ilyas et al. (2022); Hastie, Tibshirani and Friedman (2009), section 7.10 (leave-one-out).
    """
    given = FitOptions(**options)
    evaluations = check_fit(masks, behaviors, given)
    ridge = given.ridge
    if ridge == 0.0:
        regression = _additive_regression(evaluations.masks, evaluations.precision)
        each = np.arange(len(evaluations.masks))
        ridge = regression.leave_out_penalty(_standardised(evaluations.behaviors)[0], each)
    return _fit_additive("datamodel", "ridge", evaluations, lambda part: part.precision, ridge, given)


def fit_banzhaf(masks: CoalitionMasks, behaviors: Behaviors, **options: Unpack[FitKeywords]) -> Attributions:
    """Fit Banzhaf values, mean marginal contributions when all coalitions are equally likely.

    `kernel_banzhaf`, the default, is the least squares fit of the behavior on presence (+1/2, -1/2) with an intercept;
    `msr` the mean behavior with a contributor less the mean without. Coalitions of a known `design` are weighted so
    that sizes have the mass of that law; `design=None` takes them as drawn from the `uniform` removal distribution,
    or, for `kernel_banzhaf`, gives the best additive prediction under the law that they do come from. In
    `kernel_banzhaf` repeats are pooled and known noise weighs as in `fit_shapley`.

    Options as in `FitOptions`; `v_empty`, `v_grand`, their variances and `prior` are ignored. Without a design the
    empty and the grand coalition may be among `masks`.

    Raises:
        RankDeficientFit: The coalitions do not identify every contributor and `ridge` is 0; the message names
            those. Coalitions of one size never do.
        CoalitionError: The masks are not boolean rows, or an empty or grand one with a design.
        FitError: Not one finite behavior per coalition, too few usable bootstrap draws, or `msr` and a design that
            does not choose members at random.
        ConfigError: An option is unknown or out of range, or a ridge with `msr`.

    References:
        Hammer and Holzman (1992); Liu et al. (2024) (`kernel_banzhaf`); Wang and Jia (2023) (`msr`).
    """
    given = FitOptions(**options)
    estimator = given.chosen(BANZHAF_ESTIMATORS)
    evaluations = check_fit(masks, behaviors, given, pool=estimator != "msr")
    n_contributors = evaluations.n_contributors
    if estimator == "msr":
        if given.ridge > 0.0:
            raise ConfigError(
                f"Expected ridge 0 with estimator='msr', which is a mean, found {given.ridge}. Leave it out, or use "
                "kernel_banzhaf."
            )
        return _fit_msr(evaluations, given)

    def weigh(part: Evaluations) -> Array:
        return banzhaf_weights(part, given.design)

    if given.ridge == 0.0:
        sizes = evaluations.sizes
        if len(np.unique(sizes)) == 1:
            raise RankDeficientFit(
                f"Expected coalitions of at least two sizes to fit Banzhaf values, found {sizes[0]} "
                f"contributors in each, which leaves the common level of all {n_contributors} open. Measure "
                "coalitions of removal_dist 'uniform', use fit_datamodel, or pass ridge > 0."
            )
        regression = _additive_regression(evaluations.masks, weigh(evaluations))
        require_identified(regression, np.eye(n_contributors), given.contributor_names)
    return _fit_additive("banzhaf", estimator, evaluations, weigh, given.ridge, given)


def fit_loo(masks: CoalitionMasks, behaviors: Behaviors, **options: Unpack[FitKeywords]) -> Attributions:
    """Leave-one-out credit: the grand coalition's behavior less that without the contributor.

    Repeats are averaged by their precision. The noise of an evaluation is `behavior_variance`, or else pooled over the
    repeats; with neither the covariance is unknown: NaN.

    Options as in `FitOptions`; `v_grand` is required; `v_empty`, its variance, `estimator`, `prior`, `ridge`,
    `interval` (always analytic), `n_bootstrap`, `seed` and `weights` are ignored.

    Raises:
        RankDeficientFit: A contributor was never left out; the message names those.
        FitError: A row leaves out nobody or more than one, `v_grand` is missing, or a behavior is not finite.
        ConfigError: An option is out of range.
    """
    given = replace(FitOptions(**options), weights=None)
    evaluations = check_fit(masks, behaviors, given, pool=False)
    v1 = require_value(given.v_grand, "v_grand")
    means, covariance, noise_sd = _one_at_a_time(~evaluations.masks, evaluations, "leave out", given)
    values = v1 - means
    # The intercept that makes the additive prediction pass through every coalition measured.
    intercept = float(v1 - values.sum())
    return _single_attributions(
        "loo", evaluations, given, values, covariance + given.v_grand_variance, intercept, noise_sd
    )


def fit_add_one_in(masks: CoalitionMasks, behaviors: Behaviors, **options: Unpack[FitKeywords]) -> Attributions:
    """Add-one-in credit: the contributor's behavior alone less the empty coalition's.

    Repeats, noise, ignored options and errors as in `fit_loo`, with `v_empty` in place of `v_grand`.

    Raises:
        RankDeficientFit: A contributor was never alone; the message names those.
        FitError: A row keeps nobody or more than one, `v_empty` is missing, or a behavior is not finite.
        ConfigError: An option is out of range.
    """
    given = replace(FitOptions(**options), weights=None)
    evaluations = check_fit(masks, behaviors, given, pool=False)
    v0 = require_value(given.v_empty, "v_empty")
    means, covariance, noise_sd = _one_at_a_time(evaluations.masks, evaluations, "keep", given)
    covariance = covariance + given.v_empty_variance
    return _single_attributions("add_one_in", evaluations, given, means - v0, covariance, v0, noise_sd)


ATTRIBUTION_KERNELS: dict[str, AttributionKernel] = {
    "shapley": fit_shapley,
    "datamodel": fit_datamodel,
    "banzhaf": fit_banzhaf,
    "loo": fit_loo,
    "add_one_in": fit_add_one_in,
}


def _additive_regression(masks: CoalitionMasks, weights: Array) -> Regression:
    """Regression on presence, coded as +-1/2, beside an intercept."""
    return Regression.factorise(np.where(masks, 0.5, -0.5), np.ones((len(masks), 1)), weights)


def _standardised(behaviors: Behaviors) -> tuple[Array, float]:
    """Behaviors less the first, in units of the largest difference, and that unit."""
    differences = behaviors - behaviors[0]
    scale = float(np.abs(differences).max()) or 1.0
    return differences / scale, scale


def _fit_additive(
    kernel: str,
    estimator: str,
    evaluations: Evaluations,
    weigh: Callable[[Evaluations], Array],
    ridge: float,
    options: FitOptions,
) -> Attributions:
    """Additive regression with a free intercept and its covariance."""
    masks, weights = evaluations.masks, weigh(evaluations)
    regression = _additive_regression(masks, weights)
    response, scale = _standardised(evaluations.behaviors)
    clusters = evaluations.clusters
    if options.interval == "analytic":
        covariance = regression.covariance(response, ridge, clusters)
    else:

        def refit(rows: npt.NDArray[np.intp]) -> Array | None:
            drawn = _additive_regression(masks[rows], weigh(evaluations.take(rows)))
            if ridge == 0.0 and drawn.rank < masks.shape[1]:
                return None
            return drawn.coefficients(response[rows], ridge)

        stream = numpy_stream(options.seed, "bootstrap", kernel, estimator)
        covariance = bootstrap_covariance(refit, clusters, options.n_bootstrap, stream)
    values = scale * regression.coefficients(response, ridge)
    noise_sd, loo_r2 = regression.diagnose(response, ridge, clusters, evaluations.precision)
    return Attributions(
        values=values,
        covariance=scale**2 * covariance,
        kernel=kernel,
        estimator=estimator,
        interval=options.interval,
        n_coalitions=evaluations.n_evaluations,
        rank=regression.rank,
        intercept=float(np.average(evaluations.behaviors - masks @ values, weights=weights)),
        fit_keys=frozenset(coalition_keys(masks)),
        design=options.design,
        noise_sd=scale * noise_sd,
        loo_r2=loo_r2,
    )


def _fit_msr(evaluations: Evaluations, options: FitOptions) -> Attributions:
    """Maximum sample reuse; the intercept makes the additive prediction right on average."""
    behaviors, masks = evaluations.behaviors, evaluations.masks
    scale = _standardised(behaviors)[1]
    weights = banzhaf_weights(evaluations, options.design, by_precision=False)
    values, covariance = maximum_sample_reuse(evaluations.in_units(behaviors[0], scale), options)
    return Attributions(
        values=scale * values,
        covariance=scale**2 * covariance,
        kernel="banzhaf",
        estimator="msr",
        interval=options.interval,
        n_coalitions=evaluations.n_evaluations,
        rank=int(np.linalg.matrix_rank(masks - masks.mean(axis=0))),
        intercept=float(np.average(behaviors - masks @ (scale * values), weights=weights)),
        fit_keys=frozenset(coalition_keys(masks)),
        design=options.design,
    )


def _one_at_a_time(
    chosen: CoalitionMasks, evaluations: Evaluations, verb: str, options: FitOptions
) -> tuple[Array, Array, float]:
    """Mean behavior per chosen contributor `(n,)`, its covariance `(n, n)` and the noise; NaN where unknown."""
    wrong = np.flatnonzero(chosen.sum(axis=1) != 1)
    if len(wrong):
        raise FitError(
            f"Expected every coalition to {verb} exactly one contributor, found another number in rows "
            f"{named(wrong, None)}. Leave those rows out."
        )
    missing = np.flatnonzero(~chosen.any(axis=0))
    if len(missing):
        raise RankDeficientFit(
            f"Expected coalitions that {verb} each of {chosen.shape[1]} contributors, found none for "
            f"contributors {named(missing, options.contributor_names)}. Measure those {len(missing)} coalitions."
        )
    behaviors, precision = evaluations.behaviors, evaluations.precision
    total = precision @ chosen
    offset = behaviors[chosen.argmax(axis=0)]  # repeats that agree keep their value to the last bit
    means = offset + (precision * (behaviors - chosen @ offset)) @ chosen / total
    spare = len(chosen) - chosen.shape[1]
    if options.behavior_variance is not None:
        noise_variance = float(np.mean(np.asarray(options.behavior_variance, dtype=np.float64)))
    else:
        noise_variance = float(((behaviors - chosen @ means) ** 2).sum() / spare) if spare else np.nan
    covariance = np.full(2 * means.shape, np.nan) if np.isnan(noise_variance) else np.diag(noise_variance / total)
    return means, covariance, float(np.sqrt(noise_variance))


def _single_attributions(
    kernel: str,
    evaluations: Evaluations,
    options: FitOptions,
    values: Array,
    covariance: Array,
    intercept: float,
    noise_sd: float,
) -> Attributions:
    return Attributions(
        values=values,
        covariance=covariance,
        kernel=kernel,
        estimator="difference",
        interval="analytic",
        n_coalitions=len(evaluations.masks),
        rank=len(values),
        intercept=intercept,
        fit_keys=frozenset(coalition_keys(evaluations.masks)),
        design=options.design,
        noise_sd=noise_sd,
    )
