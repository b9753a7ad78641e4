"""Designs: which coalitions to measure for an estimate, one after the other.

A design is a sequence of coalitions that a seed determines. Row j never depends on how many rows will follow, so
a design can be extended at any time and all that was measured stays part of it. Three of the designs are made of
complement pairs (s, everyone else): the contrasts of Shapley values depend only on the difference of a coalition's
behavior and its complement's, from which most of the curvature in the size of the coalition drops out. What
distinguishes the three is how the size of a pair and then its members are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, count, islice
from math import comb

import numpy as np
import numpy.typing as npt

from tribute.errors import CoalitionError, ConfigError
from tribute.games.coalitions import check_masks, check_n_contributors
from tribute.games.removal import draw_coalition, draw_members, shapley_size_law
from tribute.seeding import numpy_stream
from tribute.types import CoalitionMask, CoalitionMasks

Array = npt.NDArray[np.float64]

DESIGNS = ("orthogonal", "paired", "stratified", "kernel", "permutation")
"""Names of the designs; the first is the default."""

PAIRED_DESIGNS = ("orthogonal", "paired", "stratified")
"""Designs whose rows 2j and 2j + 1 are complements, without repeats."""

_GOLDEN_RATIO = 0.6180339887498949
_NOISE = 0.025
"""Variance of an evaluation per contributor that the orthogonal design supposes, for contrasts of variance 1."""
_TIE = 1e-9
"""Gains closer than this are equal: the choice must not hang on rounding, which differs between machines."""
_MAX_COMPARED = 256
"""Most coalitions of an almost exhausted size that the orthogonal design compares."""


def draw_design(design: str, n_contributors: int, n_coalitions: int, *, seed: int = 0) -> CoalitionMasks:
    """Draw the first coalitions of a design.

    Args:
        design: `kernel` (row j is the coalition of the Shapley removal distribution at seed `seed + j`, as published;
            repeats occur), `paired` (a draw of the Shapley law, then its complement; repeats are passed over),
            `stratified` (complement pairs whose sizes follow the Shapley law with low discrepancy; members uniform),
            `orthogonal` (complement pairs, each the most informative about the contrasts given those before it),
            `permutation` (everybody joins in random order, then in the reverse of it: blocks of n - 1 nested
            coalitions; repeats occur).
        n_contributors: At least 2.
        n_coalitions: Number of rows, at least 0.
        seed: Which design of this name, at least 0.

    Returns:
        Masks `(n_coalitions, n_contributors)`, none empty or grand.

    Raises:
        ConfigError: Unknown design, or a negative seed or number.
        CoalitionError: One contributor has no coalitions to measure, or there are fewer than asked for.

    References:
        Lundberg and Lee (2017), theorem 2 (the law); Covert and Lee (2021), section 3.3 (pairs); Mitchell et al.
        (2022) (antithetic permutations). The orthogonal design is this project's own.
    """
    rows = design_rows(design, n_contributors, seed=seed)
    _check_count("n_coalitions", n_coalitions)
    if design in PAIRED_DESIGNS and n_coalitions > 2**n_contributors - 2:
        raise CoalitionError(
            f"Expected at most {2**n_contributors - 2} coalitions, all that {n_contributors} contributors form "
            f"besides the empty and the grand one, found {n_coalitions}. Ask for fewer."
        )
    return np.array(list(islice(rows, n_coalitions)), dtype=bool).reshape(n_coalitions, n_contributors)


def design_rows(design: str, n_contributors: int, *, seed: int = 0) -> Iterator[CoalitionMask]:
    """Iterate over the coalitions of a design (`draw_design`); a paired one ends when all have occurred.

    Raises:
        ConfigError: Unknown design or negative seed.
        CoalitionError: Fewer than two contributors.
    """
    if design not in DESIGNS:
        raise ConfigError(f"Expected design to be one of {', '.join(DESIGNS)}; found {design!r}. Choose one.")
    n_contributors = check_n_contributors(n_contributors)
    _check_count("seed", seed)
    if n_contributors == 1:
        raise CoalitionError(
            f"Expected at least 2 contributors for design {design!r}, found 1, whose only coalitions are the empty "
            "and the grand one. Split the data among more contributors."
        )
    return _ROWS[design](n_contributors, int(seed))


def coalition_of(
    removal_dist: str | None, n_contributors: int, removal_seed: int, *, datamodel_alpha: float = 0.5
) -> CoalitionMask:
    """Coalition `(n_contributors,)` that the removal distribution, or design, and the seed of an evaluation mean.

    For `orthogonal`, `paired`, `stratified` and `permutation` that is row `removal_seed` of the design of seed 0;
    `kernel` is the removal distribution `shapley`; for anything else see `games.removal.draw_coalition`.

    Raises:
        ConfigError: Unknown name, or a seed that is out of range.
        CoalitionError: Fewer than two contributors, or the design has no such row.
    """
    if removal_dist in DESIGNS and removal_dist != "kernel":
        _check_count("removal_seed", removal_seed)
        return draw_design(removal_dist, n_contributors, int(removal_seed) + 1)[-1]
    law = "shapley" if removal_dist == "kernel" else removal_dist
    return draw_coalition(law, n_contributors, removal_seed, datamodel_alpha=datamodel_alpha)


def coalitions_from(
    removal_dist: str | None, n_contributors: int, first_seed: int, *, datamodel_alpha: float = 0.5
) -> Iterator[tuple[int, CoalitionMask]]:
    """Iterate over `(removal_seed, coalition)` of a removal distribution or design (`coalition_of`), in order.

    A paired design ends when all coalitions have occurred; where `coalition_of` raises, so does this.
    """
    if removal_dist in DESIGNS and removal_dist != "kernel":
        yield from islice(enumerate(design_rows(removal_dist, n_contributors)), first_seed, None)
        return
    for removal_seed in count(first_seed):
        yield removal_seed, coalition_of(removal_dist, n_contributors, removal_seed, datamodel_alpha=datamodel_alpha)


def banzhaf_size_law(n_contributors: int) -> Array:
    """Probabilities `(n_contributors - 1,)` of the sizes 1 to n - 1 when all proper coalitions are equally likely.

    References:
        Wang and Jia (2023), Data Banzhaf.
    """
    n_proper = 2**n_contributors - 2
    return np.array([comb(n_contributors, size) / n_proper for size in range(1, n_contributors)])


def size_law_weights(sizes: npt.NDArray[np.integer], n_contributors: int, size_law: Array) -> Array:
    """Weights `(n_coalitions,)`, mean 1, that give every coalition size its mass under a law.

    The mass of a size is shared over its coalitions; the mass of a size that was not measured goes to the
    nearest ones that were, in halves when two are equally near.

    Args:
        sizes: `(n_coalitions,)`, each in 1 to n - 1.
        n_contributors: At least 2.
        size_law: `(n_contributors - 1,)`, the probabilities of the sizes 1 to n - 1.
    """
    measured, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    distance = np.abs(np.arange(1, n_contributors)[:, None] - measured)
    nearest = distance == distance.min(axis=1, keepdims=True)
    mass = size_law @ (nearest / nearest.sum(axis=1, keepdims=True))
    return (len(sizes) * mass / counts)[inverse]


def sampling_weights(masks: CoalitionMasks, kernel: str, design: str | None) -> Array:
    """Weights that an estimator of a kernel needs for the coalitions of a design, so that it is consistent.

    Args:
        masks: `(n_coalitions, n_contributors)`, none empty or grand.
        kernel: `shapley` or `banzhaf`.
        design: One of `DESIGNS`, a removal distribution, or None if the coalitions come from elsewhere. `kernel`
            (`shapley`) and `uniform` mean independent draws with every repeat among the rows; pass None where
            repeats were passed over.

    Returns:
        Weights `(n_coalitions,)`, mean 1: ones where the design draws from the kernel's own law; otherwise every
        size gets its mass under that law (`size_law_weights`).

    Raises:
        ConfigError: Unknown kernel.
        CoalitionError: The masks are not boolean rows, or the empty or the grand coalition is among them.
    """
    if kernel not in ("shapley", "banzhaf"):
        raise ConfigError(f"Expected kernel to be shapley or banzhaf, found {kernel!r}. Choose one.")
    masks = check_masks(masks)
    n_contributors = masks.shape[1]
    sizes = masks.sum(axis=1)
    if sizes.min() == 0 or sizes.max() == n_contributors:
        raise CoalitionError(
            "Expected proper coalitions, found the empty or the grand one. Leave these out: they are end points."
        )
    if design in (("kernel", "shapley") if kernel == "shapley" else ("uniform",)):
        return np.ones(len(masks))
    law = shapley_size_law(n_contributors) if kernel == "shapley" else banzhaf_size_law(n_contributors)
    return size_law_weights(sizes, n_contributors, law)


class _UnusedPairs:
    """The complement pairs that a design has not used yet, by the size of their smaller half.

    Attributes:
        n_left: Unused pairs of the sizes 1 to n // 2, as exact integers.
        share_left: The same as fractions of all pairs of the size.
    """

    def __init__(self, n_contributors: int) -> None:
        self.n_contributors = n_contributors
        half = [comb(n_contributors, size) for size in range(1, n_contributors // 2 + 1)]
        if n_contributors % 2 == 0:
            half[-1] //= 2  # both halves of these pairs are of this size
        self._n_pairs = half
        self.n_left = list(half)
        self.share_left = np.ones(len(half))
        self._used: set[bytes] = set()
        self._listed: dict[int, CoalitionMasks] = {}

    def nearest_size(self, size: int) -> int:
        """The size closest to `size` that has unused pairs, the smaller of two; there must be one."""
        free = np.flatnonzero(self.share_left > 0) + 1
        return int(free[np.argmin(np.abs(free - size))])

    def listed(self, size: int) -> CoalitionMasks | None:
        """All unused coalitions of a size of which less than half is left, else None: a random one is new often."""
        if size not in self._listed and self.share_left[size - 1] < 0.5:
            first = (0,) if 2 * size == self.n_contributors else ()
            others = range(len(first), self.n_contributors)
            members = np.array([first + rest for rest in combinations(others, size - len(first))])
            masks = np.zeros((len(members), self.n_contributors), dtype=bool)
            np.put_along_axis(masks, members, True, axis=1)
            self._listed[size] = masks[[self.is_unused(mask) for mask in masks]]
        return self._listed.get(size)

    def draw(self, stream: np.random.Generator, size: int) -> CoalitionMask:
        """A uniformly drawn unused coalition of the size, of which there must be one."""
        listed = self.listed(size)
        if listed is not None:
            return listed[int(stream.random() * len(listed))]
        mask = draw_members(stream, size, self.n_contributors)
        while not self.is_unused(mask):
            mask = draw_members(stream, size, self.n_contributors)
        return mask

    def is_unused(self, mask: CoalitionMask) -> bool:
        """Whether neither the coalition nor its complement was used."""
        return _pair_key(mask) not in self._used

    def use(self, mask: CoalitionMask) -> None:
        """Count a coalition and its complement as used."""
        size = int(min(mask.sum(), (~mask).sum()))
        self._used.add(_pair_key(mask))
        self.n_left[size - 1] -= 1
        self.share_left[size - 1] = self.n_left[size - 1] / self._n_pairs[size - 1]
        if size in self._listed:
            listed = self._listed[size]
            overlap = (listed == mask).sum(axis=1)
            self._listed[size] = listed[(overlap > 0) & (overlap < self.n_contributors)]


def _pair_key(mask: CoalitionMask) -> bytes:
    """The same for a coalition and its complement."""
    return np.packbits(mask if mask[0] else ~mask).tobytes()


def _folded_law(n_contributors: int, eta: float) -> Array:
    """Probabilities of the sizes 1 to n // 2 of a pair's smaller half, if size k has mass (k (n - k))^(-eta)."""
    sizes = np.arange(1, n_contributors // 2 + 1)
    mass = (sizes * (n_contributors - sizes)) ** -eta * np.where(2 * sizes == n_contributors, 1.0, 2.0)
    return mass / mass.sum()


def _pick_size(law: Array, uniform: float) -> int:
    """The size at a uniform number in [0, 1) of a law over 1, 2, ... that need not sum to 1."""
    cumulative = np.cumsum(law)
    return 1 + int(np.searchsorted(cumulative / cumulative[-1], uniform, side="right"))


def _kernel_rows(n_contributors: int, seed: int) -> Iterator[CoalitionMask]:
    for removal_seed in count(seed):
        yield draw_coalition("shapley", n_contributors, removal_seed)


def _permutation_rows(n_contributors: int, seed: int) -> Iterator[CoalitionMask]:
    for block in count():
        order = np.argsort(numpy_stream(seed, "design", "permutation", n_contributors, block).random(n_contributors))
        for joined in (order, order[::-1]):
            for size in range(1, n_contributors):
                mask = np.zeros(n_contributors, dtype=bool)
                mask[joined[:size]] = True
                yield mask


def _pairs(
    design: str,
    n_contributors: int,
    seed: int,
    choose: Callable[[_UnusedPairs, int, np.random.Generator], CoalitionMask],
) -> Iterator[CoalitionMask]:
    """Rows of a paired design, whose `choose` finds an unused coalition for pair j; which half leads is random."""
    unused = _UnusedPairs(n_contributors)
    for pair in count():
        if not unused.share_left.any():
            return
        stream = numpy_stream(seed, "design", design, n_contributors, pair)
        mask = choose(unused, pair, stream)
        unused.use(mask)
        if stream.random() < 0.5:
            mask = ~mask
        yield mask
        yield ~mask


def _paired_rows(n_contributors: int, seed: int) -> Iterator[CoalitionMask]:
    law = _folded_law(n_contributors, 1.0)

    def choose(unused: _UnusedPairs, pair: int, stream: np.random.Generator) -> CoalitionMask:
        # Passing over repeats gives every size its mass times the share of it that is left.
        return unused.draw(stream, _pick_size(law * unused.share_left, stream.random()))

    return _pairs("paired", n_contributors, seed, choose)


def _stratified_rows(n_contributors: int, seed: int) -> Iterator[CoalitionMask]:
    law = _folded_law(n_contributors, 1.0)
    start = numpy_stream(seed, "design", "stratified", n_contributors).random()

    def choose(unused: _UnusedPairs, pair: int, stream: np.random.Generator) -> CoalitionMask:
        size = _pick_size(law, (start + pair * _GOLDEN_RATIO) % 1.0)
        return unused.draw(stream, unused.nearest_size(size))

    return _pairs("stratified", n_contributors, seed, choose)


def _orthogonal_rows(n_contributors: int, seed: int) -> Iterator[CoalitionMask]:
    first_law, later_law = _folded_law(n_contributors, 0.0), _folded_law(n_contributors, 0.5)
    start = numpy_stream(seed, "design", "orthogonal", n_contributors).random()
    posterior = _Posterior(n_contributors)

    def choose(unused: _UnusedPairs, pair: int, stream: np.random.Generator) -> CoalitionMask:
        law = first_law if pair < n_contributors else later_law  # the first 2n evaluations are n pairs
        size = unused.nearest_size(_pick_size(law, (start + pair * _GOLDEN_RATIO) % 1.0))
        listed = unused.listed(size)
        if listed is None:
            mask = posterior.improved(unused.draw(stream, size), unused, stream)
        else:
            mask = posterior.best(listed, stream)
        posterior.observe(mask)
        return mask

    return _pairs("orthogonal", n_contributors, seed, choose)


class _Posterior:
    """Covariance of the contrasts of a linear game given the pairs observed so far, P, and its square, Q.

    With z = s - |s| / n the gain of a pair (s, 1 - s) is |P z|^2 / (noise + z' P z), by which observing it lowers
    the trace of P (A-optimality; Sherman and Morrison 1950). The rows of P sum to zero, so s may stand for z.
    """

    def __init__(self, n_contributors: int) -> None:
        self.covariance = np.eye(n_contributors) - 1.0 / n_contributors
        self.square = self.covariance.copy()
        self.noise = _NOISE * n_contributors
        self.max_swaps = n_contributors

    def observe(self, mask: CoalitionMask) -> None:
        """Condition on a pair; both matrices stay exactly symmetric."""
        p_z = self.covariance[:, mask].sum(axis=1)
        factor = 1.0 / (self.noise + p_z[mask].sum())
        outer = factor * np.outer(p_z, p_z)
        cross = factor * np.outer(p_z, self.covariance @ p_z)
        self.covariance -= outer
        self.square += factor * (p_z @ p_z) * outer - (cross + cross.T)

    def best(self, masks: CoalitionMasks, stream: np.random.Generator) -> CoalitionMask:
        """The coalition of the highest gain, of at most `_MAX_COMPARED` random ones."""
        if len(masks) > _MAX_COMPARED:
            masks = masks[np.argsort(stream.random(len(masks)), kind="stable")[:_MAX_COMPARED]]
        present = masks.astype(np.float64)
        projected = present @ self.covariance
        gains = (projected**2).sum(axis=1) / (self.noise + (projected * present).sum(axis=1))
        return masks[_pick_best(gains, stream)]

    def improved(self, mask: CoalitionMask, unused: _UnusedPairs, stream: np.random.Generator) -> CoalitionMask:
        """Exchange a member and a non-member as long as that raises the gain, the best exchange first."""
        mask = mask.copy()
        ins, outs = np.flatnonzero(mask), np.flatnonzero(~mask)
        p, q = self.covariance, self.square
        p_diag, q_diag = np.diag(p), np.diag(q)
        p_cross, q_cross = 2.0 * p[np.ix_(ins, outs)], 2.0 * q[np.ix_(ins, outs)]
        p_sum, q_sum = p[:, ins].sum(axis=1), q[:, ins].sum(axis=1)  # P s and P P s
        for _ in range(self.max_swaps):
            numerator, denominator = q_sum[ins].sum(), self.noise + p_sum[ins].sum()
            gains = (numerator - 2.0 * q_sum[ins] + q_diag[ins])[:, None] + (2.0 * q_sum[outs] + q_diag[outs])
            gains -= q_cross
            after = (denominator - 2.0 * p_sum[ins] + p_diag[ins])[:, None] + (2.0 * p_sum[outs] + p_diag[outs])
            after -= p_cross
            gains /= after
            least = numerator / denominator * (1.0 + _TIE)
            while True:
                row, column = divmod(_pick_best(gains.ravel(), stream), len(outs))
                if gains[row, column] <= least:
                    return mask
                leaving, joining = ins[row], outs[column]
                mask[[leaving, joining]] = False, True
                if unused.is_unused(mask):
                    break
                mask[[leaving, joining]] = True, False
                gains[row, column] = -np.inf
            ins[row], outs[column] = joining, leaving
            p_sum += p[joining] - p[leaving]
            q_sum += q[joining] - q[leaving]
            p_cross[row], q_cross[row] = 2.0 * p[joining, outs], 2.0 * q[joining, outs]
            p_cross[:, column], q_cross[:, column] = 2.0 * p[ins, leaving], 2.0 * q[ins, leaving]
        return mask


def _pick_best(gains: Array, stream: np.random.Generator) -> int:
    """Index of the highest gain; one at random of those that tie."""
    best = gains.max()
    tied = np.flatnonzero(gains >= best - _TIE * abs(best))
    return int(tied[int(stream.random() * len(tied))])


_ROWS = {
    "orthogonal": _orthogonal_rows,
    "paired": _paired_rows,
    "stratified": _stratified_rows,
    "kernel": _kernel_rows,
    "permutation": _permutation_rows,
}


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ConfigError(f"Expected {name} to be an integer >= 0, found {value!r}. Pass 0, 1, ...")
