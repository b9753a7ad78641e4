"""Improved precision and recall: how much of the generated looks real, how much of the real is generated.

Each set is thought of as the union of balls around its embeddings that reach to the k-th nearest neighbour of
the same set; precision is the share of generated images inside the real balls, recall the share of real ones
inside the generated balls (Kynkäänniemi et al. 2019, eq. 1 and 2). Distances are float64 in blocks of bounded
memory; the published code used fp16, in which near neighbours tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tribute import pulse
from tribute.behaviors.features import Features
from tribute.behaviors.reference import Reference
from tribute.errors import BehaviorError

_BLOCK_ENTRIES = 2**22
"""Entries of a block of the distance matrix: 32 MB in float64."""

_RELATIVE_ZERO = 1e-12
"""Squared distances below this share of the squared norms are rounding: the two embeddings are the same."""


@dataclass(frozen=True)
class Precision:
    """Share of generated images that lie in the neighbourhood of a real one.

    At most `max_reference` real images count, always the same ones.
    """

    k: int = 3
    max_reference: int = 10_000
    name: ClassVar[str] = "precision"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True
    min_images: ClassVar[int] = 1

    @property
    def variant(self) -> str:
        return f"k = {self.k}; at most {self.max_reference} real images"

    def measure(self, generated: Features, reference: Reference) -> float:
        real = reference.features.embeddings[reference.rows(self.max_reference)]
        radii = reference.statistic(
            f"radii/{self.k}/{self.max_reference}", lambda: {"squared": squared_radii(real, self.k)}
        )
        return _share_covered(generated.embeddings, real, radii["squared"])


@dataclass(frozen=True)
class Recall:
    """Share of real images that lie in the neighbourhood of a generated one.

    At most `max_reference` real images count, always the same ones.
    """

    k: int = 3
    max_reference: int = 10_000
    name: ClassVar[str] = "recall"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True

    @property
    def min_images(self) -> int:
        return self.k + 1

    @property
    def variant(self) -> str:
        return f"k = {self.k}; at most {self.max_reference} real images"

    def measure(self, generated: Features, reference: Reference) -> float:
        real = reference.features.embeddings[reference.rows(self.max_reference)]
        return _share_covered(real, generated.embeddings, squared_radii(generated.embeddings, self.k))


def squared_radii(embeddings: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float64]:
    """`(n_images,)`: squared distance to the k-th nearest other image.

    Raises:
        BehaviorError: There are not more than `k` images.
    """
    if len(embeddings) <= k:
        raise BehaviorError(
            f"Neighbourhoods with k = {k} need more than {k} images; found {len(embeddings)}. Give more images."
        )
    radii = np.empty(len(embeddings))
    for rows, distances in _squared_distances(embeddings, embeddings):
        radii[rows] = np.partition(distances, k, axis=1)[:, k]  # place 0 is the image itself
    return radii


def _share_covered(
    queries: npt.NDArray[np.float32], centres: npt.NDArray[np.float32], radii: npt.NDArray[np.float64]
) -> float:
    """Share of `queries` inside a ball around any of `centres`."""
    n_covered = sum(
        int((distances <= radii).any(axis=1).sum()) for _, distances in _squared_distances(queries, centres)
    )
    return n_covered / len(queries)


def _squared_distances(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """Blocks of rows of the squared distances between `a` and `b`, exactly 0 between equal embeddings."""
    b64 = b.astype(np.float64)
    norms_b = (b64**2).sum(axis=1)
    step = max(1, _BLOCK_ENTRIES // max(1, len(b)))
    for start in range(0, len(a), step):
        pulse.beat()
        rows = slice(start, start + step)
        a64 = a[rows].astype(np.float64)
        norms = (a64**2).sum(axis=1)[:, None] + norms_b
        distances = norms - 2 * (a64 @ b64.T)
        distances[distances < _RELATIVE_ZERO * norms] = 0.0
        yield rows, distances
