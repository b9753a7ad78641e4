"""The stopping rule: when it looks, and when it stops."""

from __future__ import annotations

import numpy as np
import pytest

from tribute.errors import ConfigError
from tribute.games.stopping import looks, narrow_enough, share_half_width
from tribute.types import Attributions


def credit(standard_errors: list[float], values: tuple[float, ...] = (3.0, 1.0)) -> Attributions:
    covariance = np.diag(np.square(standard_errors))
    return Attributions(np.array(values), covariance, "shapley", "gp", "analytic", 10, 2, 0.0)


@pytest.mark.parametrize("n", [2, 3, 7, 10, 31, 300])
def test_looks_are_whole_pairs_up_to_the_most(n: int) -> None:
    found = list(looks(n, 10 * n))
    assert found[-1] == 10 * n
    assert found == sorted(set(found))
    assert all(m % 2 == 0 for m in found[:-1])
    assert found[0] >= 3 * n
    steps = np.diff(found[:-1])
    assert (steps >= 2).all()
    assert (steps <= max(2, n / 2 + 1)).all()


def test_a_small_study_is_looked_at_once() -> None:
    assert list(looks(10, 20)) == [20]


def test_the_width_is_that_of_the_widest_interval_over_the_total() -> None:
    assert share_half_width(credit([0.1, 0.2])) == pytest.approx(1.959964 * 0.2 / 4.0)
    assert share_half_width(credit([0.1, 0.2], (-3.0, -1.0))) == pytest.approx(1.959964 * 0.2 / 4.0)


def test_two_looks_in_a_row_must_be_narrow() -> None:
    wide, narrow = credit([0.1, 0.2]), credit([0.01, 0.02])
    assert not narrow_enough([narrow], 0.05)
    assert not narrow_enough([narrow, wide], 0.05)
    assert not narrow_enough([narrow, wide, narrow], 0.05)
    assert narrow_enough([wide, narrow, narrow], 0.05)
    assert not narrow_enough([], 0.05)


def test_unknown_intervals_and_a_total_of_zero_never_stop() -> None:
    unknown = credit([np.nan, np.nan])
    nothing = credit([0.0, 0.0], (1.0, -1.0))
    assert not narrow_enough([unknown, unknown], 10.0)
    assert not narrow_enough([nothing, nothing], 10.0)


@pytest.mark.parametrize("half_width", [0.0, -1.0, float("nan")])
def test_a_width_that_is_no_width_is_refused(half_width: float) -> None:
    with pytest.raises(ConfigError, match="positive half-width"):
        narrow_enough([], half_width)
