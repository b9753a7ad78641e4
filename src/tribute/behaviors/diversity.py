"""Diversity: how evenly generated images spread over clusters of the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tribute.behaviors.base import Reference, Statistic
from tribute.behaviors.features import Features
from tribute.errors import BehaviorError


@dataclass(frozen=True)
class ClusterEntropy:
    """Entropy in bits of the shares of generated images among clusters of real ones, 0 to log2(n_clusters).

    The real images, or a fixed subset of `max_reference` of them, are clustered once by Ward linkage of their
    embeddings (`reference_clusters`). A generated image joins the cluster to which its mean distance is
    smallest, where distance is the largest similarity minus the similarity, and similarity is the dot product
    of embeddings. That is the cluster whose mean embedding has the largest dot product with it.

    The published code takes embeddings as they are, of a network whose last layer normalises them. Where
    lengths vary, a long cluster mean wins every dot product: on digits, with the in-domain classifier, 10 of
    20 clusters got not one of the real images, and 59 % of these joined the cluster they were from. Scaled to
    unit length, none stays empty, and 90 % do. So unit length is the default, and part of the variant.

    References:
        Lin, Lu, Kim and Lee (2025), arXiv 2407.03153, for the use as a behavior; Ward (1963).
    """

    n_clusters: int = 20
    max_reference: int = 5_000
    unit_length: bool = True
    name: ClassVar[str] = "entropy"
    unit: ClassVar[str] = "bits"
    higher_is_better: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True

    @property
    def min_images(self) -> int:
        return self.n_clusters

    @property
    def variant(self) -> str:
        scaling = "; embeddings of unit length" if self.unit_length else ""
        return f"{self.n_clusters} Ward clusters of at most {self.max_reference} real images{scaling}"

    def measure(self, generated: Features, reference: Reference) -> float:
        clusters = reference_clusters(
            reference, self.n_clusters, max_reference=self.max_reference, unit_length=self.unit_length
        )
        joined = (_points(generated.embeddings, self.unit_length) @ clusters["means"].T).argmax(axis=1)
        return entropy_bits(np.bincount(joined, minlength=self.n_clusters))


def reference_clusters(
    reference: Reference, n_clusters: int = 20, *, max_reference: int = 5_000, unit_length: bool = True
) -> Statistic:
    """Ward clusters of the real images, computed once and frozen with `Reference.save`.

    Returns:
        `rows` `(n_rows,)`: which reference images were clustered; `labels` `(n_rows,)`: the cluster of each,
        from 0; `means` `(n_clusters, n_dims)`.

    Raises:
        BehaviorError: There are fewer real images than clusters, or too many of them are the same.
    """
    rows = reference.rows(max_reference)
    return reference.statistic(
        f"ward/{n_clusters}/{max_reference}/{'unit' if unit_length else 'raw'}",
        lambda: {
            "rows": rows,
            **_ward(_points(reference.features.embeddings[rows], unit_length), n_clusters),
        },
    )


def _points(embeddings: npt.NDArray[np.float32], unit_length: bool) -> npt.NDArray[np.float64]:
    points = embeddings.astype(np.float64)
    if unit_length:
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return points


def _ward(points: npt.NDArray[np.float64], n_clusters: int) -> Statistic:
    from scipy.cluster.hierarchy import fcluster, linkage

    n_different = len(np.unique(points, axis=0))
    if n_different < n_clusters:
        raise BehaviorError(
            f"{n_clusters} clusters need at least as many different real images; found {n_different}. "
            f"Give more real images, or ask for fewer clusters."
        )
    labels = fcluster(linkage(points, "ward"), n_clusters, "maxclust") - 1
    means = np.stack([points[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return {"labels": labels.astype(np.int64), "means": means}


def entropy_bits(counts: npt.NDArray[np.integer]) -> float:
    """Entropy in bits of the shares given by `counts`; empty places count nothing."""
    from scipy.special import entr

    return float(entr(counts / counts.sum()).sum() / np.log(2))
