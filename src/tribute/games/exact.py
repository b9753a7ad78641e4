"""Shapley and Banzhaf values by enumeration of all coalitions: a user's tool and the tests' oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import comb

from tribute.errors import CoalitionError, FitError
from tribute.games.coalitions import all_coalitions, check_finite, check_n_contributors
from tribute.types import CoalitionMask

MAX_CONTRIBUTORS = 16
"""Most contributors that are enumerated: 65,536 values."""

ValueFunction = Callable[[CoalitionMask], float]


def exact_shapley(value_function: ValueFunction, n_contributors: int) -> npt.NDArray[np.float64]:
    """Compute Shapley values `(n_contributors,)` from the values of all coalitions.

    Args:
        value_function: Behavior of a coalition, called once for each of the `2**n_contributors` masks.
        n_contributors: At most `MAX_CONTRIBUTORS`.

    Raises:
        CoalitionError: Too many contributors.
        FitError: A value is not finite.
    """
    return exact_shapley_from_table(value_table(value_function, n_contributors))


def exact_banzhaf(value_function: ValueFunction, n_contributors: int) -> npt.NDArray[np.float64]:
    """Compute Banzhaf values `(n_contributors,)`; arguments and errors as in `exact_shapley`."""
    return exact_banzhaf_from_table(value_table(value_function, n_contributors))


def exact_shapley_from_table(table: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute Shapley values from `(2**n_contributors,)` values in the order of `all_coalitions`.

    References:
        Shapley (1953): phi_i is the sum over S without i of (v(S + i) - v(S)) / (n C(n-1, |S|)).
    """
    table, n = _checked_table(table)
    sizes = all_coalitions(n - 1).sum(axis=1) if n > 1 else np.zeros(1, dtype=np.intp)
    weights = 1.0 / (n * comb(n - 1, sizes))
    return np.array([weights @ _marginals(table, i) for i in range(n)])


def exact_banzhaf_from_table(table: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute Banzhaf values, mean marginal contributions, from values in the order of `all_coalitions`."""
    table, n = _checked_table(table)
    return np.array([_marginals(table, i).mean() for i in range(n)])


def value_table(value_function: ValueFunction, n_contributors: int) -> npt.NDArray[np.float64]:
    """Values `(2**n_contributors,)` of all coalitions, in the order of `all_coalitions`."""
    if check_n_contributors(n_contributors) > MAX_CONTRIBUTORS:
        raise CoalitionError(
            f"Expected at most {MAX_CONTRIBUTORS} contributors to enumerate, found {n_contributors}. "
            "Estimate with fit_shapley instead."
        )
    return np.array([float(value_function(mask)) for mask in all_coalitions(n_contributors)])


def _checked_table(table: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], int]:
    """The table in float64 and its number of contributors."""
    values = np.asarray(table, dtype=np.float64)
    n = values.size.bit_length() - 1
    if values.ndim != 1 or values.size != 2**n or not 1 <= n <= MAX_CONTRIBUTORS:
        raise FitError(
            f"Expected 2**n values, n from 1 to {MAX_CONTRIBUTORS}, found shape {values.shape}. "
            "Pass one value per row of all_coalitions(n)."
        )
    check_finite(values)
    return values, n


def _marginals(table: npt.NDArray[np.float64], contributor_idx: int) -> npt.NDArray[np.float64]:
    """v(S + i) - v(S) for all S without i, in the order of `all_coalitions` of the others."""
    pairs = table.reshape(-1, 2, 2**contributor_idx)
    return (pairs[:, 1] - pairs[:, 0]).ravel()
