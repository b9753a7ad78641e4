"""Images that occur more than once: with the same pixels, or looking the same.

Two images look the same if few bits of their perceptual hashes differ and their thumbnails have nearly the same
colours. Pairs are found without comparing all: of 10 bands of 12 or 13 bits, two hashes that differ in at most 9 bits
have one in common, so only images that share a band are compared. Neighbouring bits of a hash say much the same; spread
over the bands by a fixed permutation, they make bands that few images share.

References:
    Broder (1997) and Norouzi, Punjani and Fleet (2012), Fast search in Hamming space with multi-index hashing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tribute.seeding import numpy_stream

N_BANDS = 10
MAX_DISTANCE = N_BANDS - 1
# Of thumbnails, mean absolute difference of their values 0 to 255 after their means were made equal. On CIFAR-10 it is
# below 5.2 for 99 % of images compressed as JPEG of quality 50, and below 1.6 at quality 90, at half or twice the size.
MAX_THUMBNAIL_DIFFERENCE = 6.0
_BITS_OF_BYTE = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Which images are the same.

    Attributes:
        exact: Groups of images with the same pixels, positions in ascending order.
        near: Pairs `(n_pairs, 2)` of images that look the same and differ, each of the first of its exact group.
    """

    exact: list[npt.NDArray[np.int64]]
    near: npt.NDArray[np.int64]


def find_duplicates(
    pixels_sha256: npt.NDArray[np.uint8],
    hashes: npt.NDArray[np.uint64],
    thumbnails: npt.NDArray[np.uint8],
    *,
    max_distance: int = MAX_DISTANCE,
) -> Duplicates:
    """Find exact and near duplicates.

    Args:
        pixels_sha256: `(n_images, 16)`.
        hashes: `(n_images, 2)`, 128 bits each.
        thumbnails: `(n_images, height, width, 3)`.
        max_distance: Bits that may differ, at most `MAX_DISTANCE`. Of images with one hash, all are compared with
            the first of them.

    Raises:
        ValueError: `max_distance` is more than the bands can find.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance: expected 0 to {MAX_DISTANCE}, found {max_distance}")
    if not len(hashes):
        return Duplicates([], np.empty((0, 2), dtype=np.int64))
    exact = _groups(pixels_sha256)
    is_first = np.ones(len(hashes), dtype=bool)
    for group in exact:
        is_first[group[1:]] = False
    firsts = np.flatnonzero(is_first)
    # Filtered as they come: candidates are many, pairs that look the same are few.
    found = [_alike(firsts[pairs], hashes, thumbnails, max_distance) for pairs in _candidates(hashes[firsts])]
    near = np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), dtype=np.int64)
    return Duplicates(exact, near)


def _groups(keys: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.int64]]:
    """Positions of equal rows, for rows that occur more than once, by the first position."""
    _, group_of_row, sizes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(group_of_row.reshape(-1), kind="stable")
    groups = np.split(order, np.cumsum(sizes)[:-1])
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def _candidates(hashes: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Pairs `(n_pairs, 2)`, first the smaller: images of one hash with their first, then hashes that share a band."""
    unique, first_of_hash, hash_of_row = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    firsts = first_of_hash[hash_of_row.reshape(-1)]
    others = np.flatnonzero(firsts != np.arange(len(hashes)))
    yield np.stack([firsts[others], others], axis=1)

    order = numpy_stream(0, "data.duplicates.bands").permutation(128)
    bits = np.unpackbits(unique.view(np.uint8).reshape(len(unique), 16), axis=1)
    for columns in np.array_split(order, N_BANDS):
        band = bits[:, columns] @ (1 << np.arange(len(columns)))
        by_value = np.argsort(band, kind="stable")
        left = np.arange(len(by_value) - 1)
        for step in range(1, len(by_value)):
            left = left[left + step < len(by_value)]
            left = left[band[by_value[left]] == band[by_value[left + step]]]
            if not len(left):
                break
            pair = np.stack([first_of_hash[by_value[left]], first_of_hash[by_value[left + step]]], axis=1)
            yield np.sort(pair, axis=1)


def _alike(
    pairs: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    thumbnails: npt.NDArray[np.uint8],
    max_distance: int,
) -> npt.NDArray[np.int64]:
    """The pairs that look the same."""
    differing = (hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).view(np.uint8)
    pairs = pairs[_BITS_OF_BYTE[differing].sum(axis=1) <= max_distance]
    colours = thumbnails.reshape(len(thumbnails), -1)
    difference = colours[pairs[:, 0]].astype(np.float32) - colours[pairs[:, 1]]
    difference -= difference.mean(axis=1, keepdims=True)  # another brightness is no other image
    return pairs[np.abs(difference).mean(axis=1) <= MAX_THUMBNAIL_DIFFERENCE]
