from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.special import comb
from scipy.stats import chi2_contingency, chisquare

from tribute.errors import CoalitionError, ConfigError
from tribute.games.coalitions import all_coalitions, coalition_keys
from tribute.games.removal import (
    REMOVAL_DISTS,
    canonical_removal_dist,
    draw_coalition,
    draw_coalitions,
)

# Chance that a right law fails a test here; seeds are fixed, so a failure is a change of the code.
SIGNIFICANCE = 1e-3


def law(dist: str, n: int, alpha: float) -> dict[str, float]:
    """Probability of every coalition, by the definitions in the docs and not by the code."""
    masks = all_coalitions(n)
    sizes = masks.sum(axis=1)
    proper = (sizes > 0) & (sizes < n)
    if dist == "shapley":
        size = np.where(proper, sizes, 1)
        p = np.where(proper, (n - 1) / (size * (n - size)) / comb(n, size), 0.0)
    elif dist == "datamodel":
        p = (sizes == int(alpha * n)).astype(float)
    else:
        p = proper.astype(float)
    return dict(zip(coalition_keys(masks), p / p.sum(), strict=True))


@pytest.mark.parametrize(
    ("dist", "n", "alpha"),
    [
        ("shapley", 5, 0.5),
        ("shapley", 2, 0.5),
        ("datamodel", 6, 0.5),
        ("datamodel", 5, 0.25),
        ("uniform", 4, 0.5),
    ],
)
def test_every_coalition_has_its_probability(dist, n, alpha):
    expected = {key: p for key, p in law(dist, n, alpha).items() if p > 0}
    drawn = Counter(coalition_keys(draw_coalitions(dist, n, range(4000), datamodel_alpha=alpha)))
    assert set(drawn) == set(expected)
    if len(expected) > 1:
        observed = [drawn[key] for key in expected]
        assert chisquare(observed, 4000 * np.array(list(expected.values()))).pvalue > SIGNIFICANCE


def test_the_chi_square_test_notices_a_wrong_law():
    expected = law("shapley", 5, 0.5)
    drawn = Counter(coalition_keys(draw_coalitions("uniform", 5, range(4000))))
    keys = [key for key, p in expected.items() if p > 0]
    wrong = chisquare([drawn[key] for key in keys], [4000 * expected[key] for key in keys])
    assert wrong.pvalue < SIGNIFICANCE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("shapley", 6, 0), ("shapley", 6, 1)),
        (("shapley", 6, 0), ("shapley", 7, 0)),
        (("shapley", 6, 0), ("uniform", 6, 0)),
        (("uniform", 6, 0), ("datamodel", 6, 0)),
        (("datamodel", 6, 0), ("datamodel", 6, 1)),
    ],
)
def test_streams_are_independent(first, second):
    a, b = (draw_coalitions(d, n, range(shift, 3000 + shift))[:, :2] @ [1, 2] for d, n, shift in (first, second))
    table = np.zeros((4, 4))
    np.add.at(table, (a, b), 1)
    result: Any = chi2_contingency(table)
    assert result.pvalue > SIGNIFICANCE


def test_datamodel_streams_of_two_alphas_differ():
    half, third = (draw_coalitions("datamodel", 12, range(50), datamodel_alpha=a) for a in (0.5, 0.34))
    assert (half.sum(axis=1) == 6).all()
    assert (third.sum(axis=1) == 4).all()
    assert (third <= half).all(axis=1).mean() < 0.2  # one stream for both would make every third part of a half


@pytest.mark.parametrize("dist", ["shapley", "datamodel", "uniform"])
def test_a_seed_gives_its_coalition_whatever_was_drawn_before(dist):
    forwards = draw_coalitions(dist, 9, range(20))
    backwards = draw_coalitions(dist, 9, range(19, -1, -1))[::-1]
    np.testing.assert_array_equal(forwards, backwards)
    np.testing.assert_array_equal(forwards[7], draw_coalition(dist, 9, 7, datamodel_alpha=0.5))
    np.testing.assert_array_equal(forwards[7], draw_coalition(dist, np.int64(9), np.int64(7)))  # pyright: ignore[reportArgumentType]


def test_coalitions_never_change_between_versions():
    """Stored studies name coalitions by seed, so these are part of the format."""
    assert coalition_keys(draw_coalitions("shapley", 10, range(4))) == GOLDEN["shapley"]
    assert coalition_keys(draw_coalitions("datamodel", 10, range(4))) == GOLDEN["datamodel"]
    assert coalition_keys(draw_coalitions("uniform", 10, range(4))) == GOLDEN["uniform"]


GOLDEN = {
    "shapley": ["10:0058", "10:02af", "10:03fb", "10:0042"],
    "datamodel": ["10:0187", "10:003b", "10:02d1", "10:0346"],
    "uniform": ["10:003c", "10:0190", "10:0181", "10:03cd"],
}


def test_alpha_matters_to_datamodel_only():
    for dist in ("shapley", "uniform", "empty", None):
        np.testing.assert_array_equal(
            draw_coalition(dist, 8, 3, datamodel_alpha=0.25), draw_coalition(dist, 8, 3, datamodel_alpha=0.75)
        )


def test_deterministic_laws():
    np.testing.assert_array_equal(draw_coalitions("loo", 4, range(4)), ~np.eye(4, dtype=bool))
    np.testing.assert_array_equal(draw_coalitions("add_one_in", 4, range(4)), np.eye(4, dtype=bool))
    assert not draw_coalition("empty", 4, 0).any()
    for name in (None, "None", "none", "grand"):
        assert draw_coalition(name, 4, 5).all()
    assert draw_coalitions("shapley", 4, []).shape == (0, 4)


def test_other_spellings():
    assert canonical_removal_dist("datashapley") == "shapley"
    assert canonical_removal_dist("leave_one_out") == "loo"
    assert canonical_removal_dist("None") is None
    assert [canonical_removal_dist(name) for name in REMOVAL_DISTS] == list(REMOVAL_DISTS)
    np.testing.assert_array_equal(draw_coalition("datashapley", 9, 3), draw_coalition("shapley", 9, 3))


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"shapley, shapley_complement, datamodel, uniform, loo.*'shaply'"):
        draw_coalition("shaply", 5, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_bad_seed(seed):
    with pytest.raises(ConfigError, match="removal_seed"):
        draw_coalition("shapley", 5, seed)


@pytest.mark.parametrize("dist", ["loo", "add_one_in"])
def test_seed_that_is_no_contributor(dist):
    with pytest.raises(ConfigError, match="0 to 4"):
        draw_coalition(dist, 5, 5)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 1.5, float("nan"), 0.1])
def test_bad_alpha(alpha):
    with pytest.raises(ConfigError, match="datamodel_alpha"):
        draw_coalition("datamodel", 5, 0, datamodel_alpha=alpha)


@pytest.mark.parametrize("dist", ["shapley", "datamodel", "uniform", "loo", "add_one_in"])
def test_one_contributor_has_no_coalitions(dist):
    with pytest.raises(CoalitionError, match="at least 2 contributors"):
        draw_coalition(dist, 1, 0)
    assert draw_coalition(None, 1, 0).all()


def test_the_complement_law_completes_the_pair_of_the_same_seed():
    for removal_seed in range(20):
        drawn = draw_coalition("shapley", 7, removal_seed)
        np.testing.assert_array_equal(draw_coalition("shapley_complement", 7, removal_seed), ~drawn)
