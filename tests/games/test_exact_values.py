from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from tribute.errors import CoalitionError, FitError
from tribute.games.coalitions import all_coalitions
from tribute.games.exact import (
    exact_banzhaf,
    exact_banzhaf_from_table,
    exact_shapley,
    exact_shapley_from_table,
)


def random_table(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=2**n)


def test_shapley_is_the_mean_marginal_over_all_orders():
    n, table = 5, random_table(5)
    total = np.zeros(n)
    orders = list(permutations(range(n)))
    for order in orders:
        coalition = 0
        for i in order:
            total[i] += table[coalition | 1 << i] - table[coalition]
            coalition |= 1 << i
    np.testing.assert_allclose(exact_shapley_from_table(table), total / len(orders), atol=1e-12)


def test_banzhaf_is_the_mean_marginal_over_all_coalitions():
    n, table = 5, random_table(5)
    naive = [np.mean([table[s | 1 << i] - table[s] for s in range(2**n) if not s >> i & 1]) for i in range(n)]
    np.testing.assert_allclose(exact_banzhaf_from_table(table), naive, atol=1e-12)


def test_known_games():
    # Gloves: contributor 0 owns the left one, 1 and 2 a right one each.
    np.testing.assert_allclose(exact_shapley(lambda s: float(s[0] and s[1:].any()), 3), [4 / 6, 1 / 6, 1 / 6])
    # Majority of three votes.
    np.testing.assert_allclose(exact_banzhaf(lambda s: float(s.sum() >= 2), 3), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(exact_shapley(lambda s: 2.0 + 3.0 * s.sum(), 1), [3.0])


def test_additive_games_are_their_own_values_at_the_largest_size():
    worth = np.random.default_rng(1).normal(size=16)
    table = all_coalitions(16) @ worth
    np.testing.assert_allclose(exact_shapley_from_table(table), worth, atol=1e-10)
    np.testing.assert_allclose(exact_banzhaf_from_table(table), worth, atol=1e-10)


def test_bad_input():
    with pytest.raises(CoalitionError, match="at most 16"):
        exact_shapley(lambda s: 0.0, 17)
    for table in (np.zeros(3), np.zeros(1), np.zeros((2, 2)), np.zeros(0)):
        with pytest.raises(FitError, match=r"2\*\*n values"):
            exact_shapley_from_table(table)
    with pytest.raises(FitError, match="finite"):
        exact_banzhaf(lambda s: float("nan"), 2)
