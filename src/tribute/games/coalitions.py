"""Coalitions as boolean masks: keys, enumeration and the checks that every estimator shares."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tribute.errors import CoalitionError, FitError
from tribute.types import Behaviors, CoalitionMask, CoalitionMasks

MAX_ENUMERATED = 20
"""Most contributors whose coalitions can be listed: 2**20 masks take 20 MiB."""

_KEY = re.compile(r"([1-9][0-9]*):((?:[0-9a-f]{2})+)")


def coalition_key(mask: CoalitionMask) -> str:
    """Name a coalition, e.g. `10:03f1`: the number of contributors, then the members in hexadecimal.

    Contributor i is bit i of the number, which has two digits for every eight contributors begun. Equal keys
    mean equal coalitions of equally many contributors.

    Raises:
        CoalitionError: `mask` is not a boolean vector.
    """
    mask = np.asarray(mask)
    if mask.ndim != 1:
        raise CoalitionError(f"Expected one mask (n_contributors,), found shape {mask.shape}. Pass one row.")
    return coalition_keys(mask[None])[0]


def coalition_keys(masks: CoalitionMasks) -> list[str]:
    """Keys of `(n_coalitions, n_contributors)` masks, in their order (`coalition_key`)."""
    masks = check_masks(masks)
    packed = np.packbits(masks, axis=1, bitorder="little")[:, ::-1]
    return [f"{masks.shape[1]}:{row.tobytes().hex()}" for row in packed]


def mask_from_key(key: str) -> CoalitionMask:
    """Mask `(n_contributors,)` of the coalition that `coalition_key` named `key`.

    Raises:
        CoalitionError: `key` is not such a name.
    """
    found = _KEY.fullmatch(key)
    if found:
        n_contributors, members = int(found[1]), bytes.fromhex(found[2])
        bits = np.unpackbits(np.frombuffer(members[::-1], np.uint8), bitorder="little").astype(bool)
        if len(members) == -(-n_contributors // 8) and not bits[n_contributors:].any():
            return bits[:n_contributors]
    raise CoalitionError(f"Expected a coalition key such as '10:03f1', found {key!r}. Use coalition_key's output.")


def mask_from_idx(contributor_idx: Iterable[int], n_contributors: int) -> CoalitionMask:
    """Mask `(n_contributors,)` of the coalition whose members have the given indices.

    Raises:
        CoalitionError: An index occurs twice, is no integer, or lies outside [0, n_contributors).
    """
    idx = list(contributor_idx)
    mask = empty_coalition(n_contributors)
    for i in idx:
        if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < n_contributors:
            raise CoalitionError(
                f"Expected contributor indices in [0, {n_contributors}), found {i!r}. Check the number of contributors."
            )
        if mask[i]:
            raise CoalitionError(f"Expected each contributor once, found index {i} again. Remove the repeat.")
        mask[i] = True
    return mask


def empty_coalition(n_contributors: int) -> CoalitionMask:
    """The coalition of nobody, `(n_contributors,)`."""
    return np.zeros(check_n_contributors(n_contributors), dtype=bool)


def grand_coalition(n_contributors: int) -> CoalitionMask:
    """The coalition of everybody, `(n_contributors,)`."""
    return np.ones(check_n_contributors(n_contributors), dtype=bool)


def all_coalitions(n_contributors: int, *, include_empty: bool = True, include_grand: bool = True) -> CoalitionMasks:
    """List the `2**n_contributors` coalitions; in row r contributor i is present where bit i of r is set.

    Args:
        n_contributors: At most `MAX_ENUMERATED`.
        include_empty: Keep the first row, nobody.
        include_grand: Keep the last row, everybody.

    Raises:
        CoalitionError: Too many contributors to list.
    """
    if check_n_contributors(n_contributors) > MAX_ENUMERATED:
        raise CoalitionError(
            f"Expected at most {MAX_ENUMERATED} contributors to list all coalitions, found {n_contributors}. "
            "Draw coalitions from a removal distribution instead."
        )
    rows = np.arange(2**n_contributors, dtype=np.uint32)[:, None]
    masks = (rows >> np.arange(n_contributors, dtype=np.uint32)) & 1 == 1
    return masks[0 if include_empty else 1 : len(masks) if include_grand else -1]


def complements(masks: CoalitionMasks) -> CoalitionMasks:
    """The coalitions of those absent, in the same shape."""
    return ~check_masks(masks)


def complement_clusters(masks: CoalitionMasks) -> npt.NDArray[np.intp]:
    """Number rows `(n_coalitions,)` so that a coalition, its repeats and its complements share a number."""
    masks = check_masks(masks)
    oriented = np.packbits(masks ^ ~masks[:, :1], axis=1)
    return np.unique(oriented, axis=0, return_inverse=True)[1].reshape(-1)


def check_n_contributors(n_contributors: int) -> int:
    """Return the number of contributors as an int, or raise CoalitionError if it is none or negative."""
    if isinstance(n_contributors, bool) or not isinstance(n_contributors, int | np.integer) or n_contributors < 1:
        raise CoalitionError(f"Expected at least 1 contributor, found {n_contributors!r}. Name the contributors.")
    return int(n_contributors)


def check_masks(masks: CoalitionMasks, *, n_contributors: int | None = None) -> CoalitionMasks:
    """Return `masks` as an array `(n_coalitions, n_contributors)`, both at least 1, of dtype bool.

    Raises:
        CoalitionError: Another dtype, another shape, or another number of contributors than asked for.
    """
    masks = np.asarray(masks)
    if masks.dtype != np.bool_:
        raise CoalitionError(
            f"Expected masks of dtype bool, found {masks.dtype}. Convert them with .astype(bool) if they are 0/1."
        )
    if masks.ndim != 2 or 0 in masks.shape:
        raise CoalitionError(
            f"Expected masks (n_coalitions, n_contributors), both at least 1, found shape {masks.shape}. "
            "Pass one row per coalition."
        )
    if n_contributors is not None and masks.shape[1] != n_contributors:
        raise CoalitionError(
            f"Expected masks over {n_contributors} contributors, found {masks.shape[1]}. "
            "Use coalitions of the same contributors."
        )
    return masks


def check_evaluations(masks: CoalitionMasks, behaviors: Behaviors) -> tuple[CoalitionMasks, Behaviors]:
    """Return checked masks `(n_coalitions, n_contributors)` and behaviors `(n_coalitions,)` in float64.

    Raises:
        CoalitionError: The masks are not boolean rows.
        FitError: Not one finite behavior per coalition; the message names the rows.
    """
    masks = check_masks(masks)
    behaviors = np.asarray(behaviors, dtype=np.float64)
    if behaviors.shape != (len(masks),):
        raise FitError(
            f"Expected one behavior per coalition, shape ({len(masks)},), found shape {behaviors.shape}. "
            "Pass masks and behaviors of the same evaluations."
        )
    check_finite(behaviors)
    return masks, behaviors


def check_finite(behaviors: npt.NDArray[np.float64]) -> None:
    """Raise FitError, naming the columns of the last axis, where a behavior is NaN or infinite."""
    bad = np.unique(np.nonzero(~np.isfinite(behaviors))[-1])
    if len(bad):
        raise FitError(
            f"Expected finite behaviors, found NaN or infinity at {named(bad, None)}. "
            "Measure those coalitions again, or leave them out."
        )


def named(indices: npt.ArrayLike, names: Sequence[str] | None, *, at_most: int = 20) -> str:
    """List indices for a message, with names where known: `3 (Ann), 7 (Bo) and 2 more`."""
    idx = [int(i) for i in np.asarray(indices)]
    listed = ", ".join(f"{i} ({names[i]})" if names else str(i) for i in idx[:at_most])
    return listed if len(idx) <= at_most else f"{listed} and {len(idx) - at_most} more"
