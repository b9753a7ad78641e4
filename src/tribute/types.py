"""The nouns of the library, with their shapes.

These aliases carry no run-time check; functions that take data from outside validate it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

CoalitionMask = npt.NDArray[np.bool_]
"""`(n_contributors,)`; True where the contributor is present."""

CoalitionMasks = npt.NDArray[np.bool_]
"""`(n_coalitions, n_contributors)`; True where the contributor is present."""

Behaviors = npt.NDArray[np.float64]
"""`(n_coalitions,)`; one model behavior per coalition, raw (never negated)."""

Images = npt.NDArray[np.uint8]
"""`(n_images, height, width, channels)`; 0 to 255, 1 or 3 channels."""

Latents = npt.NDArray[np.float32]
"""`(n_images, channels, height, width)`, scaled to about unit variance; of a codec with a posterior, its means and then
its log-variances along the channels."""


@dataclass(frozen=True)
class Attributions:
    """Credit of each contributor, with its uncertainty.

    Attributes:
        values: `(n_contributors,)`, in the unit of the behavior.
        covariance: `(n_contributors, n_contributors)`, of `values`.
        kernel: Which credit this is: `shapley`, `datamodel`, `banzhaf`, `loo`, `add_one_in`.
        estimator: How it was computed, e.g. `least_squares`.
        interval: Where the covariance comes from: `analytic` or `bootstrap`.
        n_coalitions: Number of fit coalitions used.
        rank: Rank of the design matrix; less than needed only with a ridge.
        intercept: Predicted behavior of the empty coalition.
        fit_keys: Keys of the fit coalitions (`games.coalitions.coalition_key`), so that a
            test on the same coalitions can be refused.
        design: How the fit coalitions were chosen (`games.designs`), None when not known.
        noise_sd: Effective noise of one evaluation about the fitted model, measurement noise and misfit
            together, in the unit of the behavior; NaN when it cannot be told.
        loo_r2: Leave-one-out R2: the share of the variance of the fitted response that the fit predicts when
            that coalition is left out (with its complement, where pairs were fitted); negative is worse than
            their mean, NaN when it does not exist.
        explanation: Why `auto` chose this estimator, in a sentence; empty when the user chose.
    """

    values: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    kernel: str
    estimator: str
    interval: str
    n_coalitions: int
    rank: int
    intercept: float
    fit_keys: frozenset[str] = field(default_factory=frozenset, repr=False)
    design: str | None = None
    noise_sd: float = float("nan")
    loo_r2: float = float("nan")
    explanation: str = ""

    @property
    def n_contributors(self) -> int:
        return len(self.values)

    @property
    def standard_errors(self) -> npt.NDArray[np.float64]:
        """`(n_contributors,)`, square roots of the variances."""
        return np.sqrt(np.clip(np.diag(self.covariance), 0.0, None))

    def intervals(self, level: float = 0.95) -> npt.NDArray[np.float64]:
        """Normal intervals, `(n_contributors, 2)`, that hold each value with probability `level`."""
        from scipy.special import ndtri

        half_width = ndtri(0.5 + level / 2) * self.standard_errors
        return np.stack([self.values - half_width, self.values + half_width], axis=1)

    def predict(self, masks: CoalitionMasks) -> Behaviors:
        """Additive prediction `(n_coalitions,)`: intercept plus the credit of those present."""
        return self.intercept + masks.astype(np.float64) @ self.values
