"""Diversity: how evenly generated images spread over clusters of real ones, and how many different ones there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tribute.behaviors.features import Features, content_hash
from tribute.behaviors.reference import Reference, Statistic
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
    unit length, none stays empty, and 90 % do. So unit length is the default, and part of the variant;
    `published_diversity` takes raw embeddings of the network that the published code used.

    References:
        Lin, Lu, Kim and Lee (2025), arXiv 2407.03153, for the use as a behavior; Ward (1963).
    """

    n_clusters: int = 20
    max_reference: int = 5_000
    unit_length: bool = True
    name: str = "entropy"
    extractor: str | None = None
    names_clusters: bool = False
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
        clusters = self._clusters(reference)
        joined = (_points(generated.embeddings, self.unit_length) @ clusters["means"].T).argmax(axis=1)
        return entropy_bits(np.bincount(joined, minlength=self.n_clusters))

    @property
    def frozen(self) -> Callable[[Reference], str] | None:
        """Names the clustering by a hash; None where the variant does not name it."""
        if not self.names_clusters:
            return None
        return lambda reference: f"clustering {partition_hash(self._clusters(reference))[:12]}"

    def _clusters(self, reference: Reference) -> Statistic:
        return reference_clusters(
            reference, self.n_clusters, max_reference=self.max_reference, unit_length=self.unit_length
        )


def published_diversity() -> ClusterEntropy:
    """`diversity`: the published measure, with BLIP embeddings as they are and a clustering that the variant names."""
    return ClusterEntropy(unit_length=False, name="diversity", extractor="blip", names_clusters=True)


def partition_hash(clusters: Statistic) -> str:
    """SHA-256 of which real images were clustered and which cluster each is in.

    The numbers of the clusters do not count, nor does rounding in their means: two machines that part the images alike
    agree.
    """
    numbers = {label: number for number, label in enumerate(dict.fromkeys(clusters["labels"].tolist()))}
    labels = np.array([numbers[label] for label in clusters["labels"].tolist()], np.int64)
    return content_hash(clusters["rows"].astype(np.int64), labels)


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
    return _entropy(counts) / np.log(2)


def _entropy(weights: npt.NDArray[Any]) -> float:
    """Entropy in nats of the shares given by `weights`."""
    from scipy.special import entr

    return float(entr(weights / weights.sum()).sum())


@dataclass(frozen=True)
class VendiScore:
    """exp of the Shannon entropy of the eigenvalues of the similarity matrix over its trace: effective images.

    From 1 (all images alike) to the number of images (all different). The similarity of two images is the cosine of
    their embeddings. The eigenvalues of the n x n matrix that are not 0 are those of the n_dims x n_dims second moment
    of the embeddings, so the smaller of the two is decomposed, in float64. No real image is looked at.

    References:
        Friedman and Dieng (2023), definition 3.1 and section 3.3.
    """

    name: ClassVar[str] = "vendi"
    unit: ClassVar[str] = "effective images"
    higher_is_better: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False
    min_images: ClassVar[int] = 1
    variant: ClassVar[str] = "cosine similarity"

    def measure(self, generated: Features, reference: Reference) -> float:
        lengths = np.linalg.norm(generated.embeddings.astype(np.float64), axis=1)
        if not lengths.all():
            raise BehaviorError(
                f"The Vendi score needs embeddings with a direction; image {int(lengths.argmin())} has zeros only. "
                "Look at that image, or choose another feature extractor."
            )
        points = _points(generated.embeddings, unit_length=True)
        gram = points @ points.T if len(points) <= points.shape[1] else points.T @ points
        eigenvalues = np.clip(np.linalg.eigvalsh(gram / len(points)), 0.0, None)
        return float(np.exp(_entropy(eigenvalues)))
