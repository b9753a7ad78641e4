"""Removal distributions: the laws by which coalitions are drawn, one coalition per seed.

A coalition is drawn from the stream named by its law, its seed and the number of contributors, so seed j
gives the same coalition whatever was drawn before it. Only uniform doubles are taken from the stream: the
least likely part of NumPy's generators to change between versions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tribute.errors import CoalitionError, ConfigError
from tribute.games.coalitions import check_n_contributors, empty_coalition, grand_coalition
from tribute.seeding import numpy_stream
from tribute.types import CoalitionMask, CoalitionMasks

REMOVAL_DISTS = ("shapley", "shapley_complement", "datamodel", "uniform", "loo", "add_one_in", "empty")
"""Canonical names; None is the grand coalition, from which nobody is removed."""

REMOVAL_DIST_ALIASES: dict[str, str | None] = {
    "datashapley": "shapley",
    "leave_one_out": "loo",
    "grand": None,
    "None": None,
    "none": None,
}


def canonical_removal_dist(removal_dist: str | None) -> str | None:
    """Return the one name of a removal distribution, None for the grand coalition.

    Raises:
        ConfigError: The name is unknown; the message lists the known ones.
    """
    if removal_dist is None or removal_dist in REMOVAL_DISTS:
        return removal_dist
    if removal_dist not in REMOVAL_DIST_ALIASES:
        known = ", ".join((*REMOVAL_DISTS, *REMOVAL_DIST_ALIASES))
        raise ConfigError(f"Expected removal_dist to be one of {known}; found {removal_dist!r}. Choose one.")
    return REMOVAL_DIST_ALIASES[removal_dist]


def shapley_size_law(n_contributors: int) -> npt.NDArray[np.float64]:
    """Probabilities `(n_contributors - 1,)` of the sizes 1 to n - 1 under the Shapley removal distribution.

    Proportional to (n - 1) / (s (n - s)): the Shapley kernel of all coalitions of size s together.

    References:
        Lundberg and Lee (2017), theorem 2.
    """
    sizes = np.arange(1, n_contributors)
    mass = 1.0 / (sizes * (n_contributors - sizes))
    return mass / mass.sum()


def draw_coalition(
    removal_dist: str | None, n_contributors: int, removal_seed: int, *, datamodel_alpha: float = 0.5
) -> CoalitionMask:
    """Draw the coalition that a removal distribution and a seed stand for.

    Args:
        removal_dist: `shapley` (size s in 1..n-1 with probability proportional to 1 / (s (n - s)), then
            members uniform), `shapley_complement` (everyone whom `shapley` removes at the same seed: the other
            half of a complement pair, of the same law), `datamodel` (uniform of size
            `int(datamodel_alpha * n)`), `uniform` (each
            present with probability 1/2, drawn again when nobody or everybody is), `loo` (seed j removes
            contributor j), `add_one_in` (seed j keeps contributor j only), `empty`, or None for the grand
            coalition. `datashapley`, `leave_one_out`, `grand` and "None" are other spellings.
        n_contributors: At least 2, except for `empty` and None.
        removal_seed: Which draw, at least 0.
        datamodel_alpha: Fraction of contributors present, in (0, 1); only `datamodel` uses it.

    Returns:
        Mask `(n_contributors,)`.

    Raises:
        ConfigError: Unknown name, negative seed, a seed that is no contributor, or an alpha that keeps
            nobody.
        CoalitionError: One contributor has no coalitions but the empty and the grand one.
    """
    dist = canonical_removal_dist(removal_dist)
    if dist == "shapley_complement":
        return ~draw_coalition("shapley", n_contributors, removal_seed)
    n_contributors = check_n_contributors(n_contributors)
    if isinstance(removal_seed, bool) or not isinstance(removal_seed, int | np.integer) or removal_seed < 0:
        raise ConfigError(f"Expected removal_seed to be an integer >= 0, found {removal_seed!r}. Pass 0, 1, ...")
    if dist is None:
        return grand_coalition(n_contributors)
    if dist == "empty":
        return empty_coalition(n_contributors)
    if n_contributors == 1:
        raise CoalitionError(
            f"Expected at least 2 contributors for removal_dist {dist!r}, found 1, whose only coalitions are "
            "the empty and the grand one. Split the data among more contributors."
        )

    if dist in ("loo", "add_one_in"):
        if removal_seed >= n_contributors:
            raise ConfigError(
                f"Expected removal_seed to be a contributor for {dist!r}, 0 to {n_contributors - 1}, found "
                f"{removal_seed}. Use one seed per contributor."
            )
        chosen = np.arange(n_contributors) == removal_seed
        return ~chosen if dist == "loo" else chosen

    if dist == "datamodel":
        size = _datamodel_size(datamodel_alpha, n_contributors)
        stream = numpy_stream(removal_seed, "removal", dist, n_contributors, float(datamodel_alpha))
        return draw_members(stream, size, n_contributors)
    stream = numpy_stream(removal_seed, "removal", dist, n_contributors)
    if dist == "shapley":
        cumulative = np.cumsum(shapley_size_law(n_contributors))
        size = 1 + int(np.searchsorted(cumulative / cumulative[-1], stream.random(), side="right"))
        return draw_members(stream, size, n_contributors)
    mask = stream.random(n_contributors) < 0.5
    while mask.all() or not mask.any():
        mask = stream.random(n_contributors) < 0.5
    return mask


def draw_coalitions(
    removal_dist: str | None,
    n_contributors: int,
    removal_seeds: Iterable[int],
    *,
    datamodel_alpha: float = 0.5,
) -> CoalitionMasks:
    """Draw one coalition per seed, `(n_seeds, n_contributors)`; see `draw_coalition`."""
    masks = [
        draw_coalition(removal_dist, n_contributors, seed, datamodel_alpha=datamodel_alpha) for seed in removal_seeds
    ]
    return np.array(masks, dtype=bool).reshape(len(masks), n_contributors)


def _datamodel_size(datamodel_alpha: float, n_contributors: int) -> int:
    if not 0.0 < datamodel_alpha < 1.0:
        raise ConfigError(
            f"Expected datamodel_alpha in (0, 1), found {datamodel_alpha}. It is the fraction of contributors kept."
        )
    size = int(datamodel_alpha * n_contributors)
    if size == 0:
        raise ConfigError(
            f"Expected datamodel_alpha to keep somebody, found {datamodel_alpha} of {n_contributors} "
            f"contributors, which is nobody. Use at least 1/{n_contributors}."
        )
    return size


def draw_members(stream: np.random.Generator, size: int, n_contributors: int) -> CoalitionMask:
    """Draw a coalition of the given size uniformly from a random stream."""
    mask = empty_coalition(n_contributors)
    mask[np.argsort(stream.random(n_contributors), kind="stable")[:size]] = True
    return mask
