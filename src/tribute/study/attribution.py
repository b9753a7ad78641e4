"""From evaluations to attributions and their proof: what studies and `lds.py` share. No network is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tribute.games.coalitions import coalition_keys
from tribute.games.kernels import ATTRIBUTION_KERNELS
from tribute.games.lds import LDSCeiling, LDSComparison, LDSResult, LDSTestSet, disjoint_from, lds_ceiling
from tribute.types import Attributions, Behaviors, CoalitionMasks


@dataclass(frozen=True)
class EndPoints:
    """v(empty) and v(grand), each measured one or more times, or not at all where a kernel does not need it.

    Attributes:
        empty: `(k,)` behaviors of the untrained network.
        grand: `(k,)` behaviors of the method's own model on everyone.
    """

    empty: Behaviors
    grand: Behaviors

    def options(self) -> dict[str, float]:
        """Means and the variances of the means, as the attribution kernels take them; what is not there is left out."""
        options = {}
        for name, values in (("v_empty", self.empty), ("v_grand", self.grand)):
            if len(values):
                options[name] = float(values.mean())
                options[f"{name}_variance"] = _variance_of_mean(values)
        return options


def _variance_of_mean(values: Behaviors) -> float:
    """Unknown, and so 0, with a single measurement."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


def fit_attributions(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    end_points: EndPoints,
    *,
    kernel: str = "shapley",
    contributor_names: Sequence[str] | None = None,
    **options: Any,
) -> Attributions:
    """Fit one attribution kernel to evaluations."""
    fit = ATTRIBUTION_KERNELS[kernel]
    return fit(masks, behaviors, contributor_names=contributor_names, **end_points.options(), **options)


@dataclass(frozen=True)
class Validation:
    """The proof of attributions on retrained test coalitions.

    Attributes:
        score: LDS per training seed and pooled.
        ceiling: Agreement of independently seeded retrainings; None with one training seed.
        comparison: LDS less that of the reference, on the same draws; None without a reference.
    """

    score: LDSResult
    ceiling: LDSCeiling | None
    comparison: LDSComparison | None = None


def validate(attributions: Attributions, test_set: LDSTestSet, *, reference: Attributions | None = None) -> Validation:
    """LDS, its ceiling, and how it compares.

    Args:
        attributions: Fitted to other coalitions.
        test_set: Retrained test coalitions.
        reference: Other attributions to compare with.

    Raises:
        FitError: A test coalition was fitted to.
    """
    behaviors = test_set.behaviors
    return Validation(
        score=test_set.score(attributions),
        ceiling=lds_ceiling(behaviors) if len(behaviors) > 1 else None,
        comparison=None if reference is None else test_set.compare(attributions, reference),
    )


def split_by_seed(
    masks: CoalitionMasks, behaviors: Behaviors, opt_seeds: npt.NDArray[np.int64]
) -> tuple[CoalitionMasks, npt.NDArray[np.float64]]:
    """Arrange test evaluations as distinct coalitions by training seeds.

    Every seed is scored on the same coalitions, so what some seed lacks is left out: coalitions or whole seeds,
    whichever leaves more evaluations. (In a study that is being measured the last seed may have only begun.)
    Several evaluations of a coalition with the same seed are averaged.

    Returns:
        Masks `(n_test, n_contributors)` and behaviors `(n_training_seeds, n_test)`.
    """
    keys, first, rows = np.unique(np.array(coalition_keys(masks)), return_index=True, return_inverse=True)
    seeds, columns = np.unique(opt_seeds, return_inverse=True)
    counts = np.zeros((len(keys), len(seeds)))
    sums = np.zeros((len(keys), len(seeds)))
    np.add.at(counts, (rows, columns), 1)
    np.add.at(sums, (rows, columns), behaviors)
    by_coverage = np.argsort(-(counts > 0).sum(axis=0), kind="stable")
    common = np.logical_and.accumulate(counts[:, by_coverage] > 0, axis=1).sum(axis=0)
    n_left = common * np.arange(1, len(seeds) + 1)
    kept_seeds = np.sort(by_coverage[: len(seeds) - int(np.argmax(n_left[::-1]))])
    kept = np.flatnonzero((counts[:, kept_seeds] > 0).all(axis=1))
    kept = kept[np.argsort(first[kept])]
    return masks[first[kept]], (sums[kept][:, kept_seeds] / counts[kept][:, kept_seeds]).T


def without_tested(
    masks: CoalitionMasks, behaviors: Behaviors, test_masks: CoalitionMasks, *, paired: bool = False
) -> tuple[CoalitionMasks, Behaviors, int]:
    """Leave out the fit coalitions that are test coalitions, too.

    Args:
        masks: `(n_fit, n_contributors)`.
        behaviors: `(n_fit,)`.
        test_masks: `(n_test, n_contributors)`.
        paired: The fit coalitions are complement pairs: the other half of a pair goes with the tested one.

    Returns:
        Masks and behaviors that are left, and how many are not.
    """
    keep = disjoint_from(masks, test_masks)
    if paired:
        keep &= disjoint_from(~masks, test_masks)
    return masks[keep], behaviors[keep], int((~keep).sum())
