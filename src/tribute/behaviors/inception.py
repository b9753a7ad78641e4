"""Inception Score, Fréchet distance and kernel distance of features that are already computed.

The names are those of the field, whatever the extractor; the variant stored with a value names the extractor.
The arithmetic is ours, in float64, so that a measurement needs neither a GPU nor an import of seconds; the
tests hold its agreement with torchmetrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tribute.behaviors.features import Features
from tribute.behaviors.reference import Reference, Statistic
from tribute.errors import BehaviorError

Float64s = npt.NDArray[np.float64]

_BLOCK_ENTRIES = 2**22
"""Entries of a block of a pairwise matrix: 32 MB in float64."""


@dataclass(frozen=True)
class InceptionScore:
    """exp of the mean Kullback-Leibler divergence from the mean class distribution to each image's.

    From 1 (all images alike, or no idea what they are) to the number of classes. With several splits,
    consecutive images form a split and the scores are averaged; that lowers the score of small sets. The
    default of one split is that of the published attribution code; ten are customary with 50,000 images, and
    are measured under the name `inception_score_10`.

    References:
        Salimans et al. (2016), section 4.
    """

    n_splits: int = 1
    unit: ClassVar[str] = "effective classes"
    higher_is_better: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False
    uses_probabilities: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "inception_score" if self.n_splits == 1 else f"inception_score_{self.n_splits}"

    @property
    def min_images(self) -> int:
        return 2 * self.n_splits

    @property
    def variant(self) -> str:
        return f"{self.n_splits} split{'s' if self.n_splits > 1 else ''}"

    def measure(self, generated: Features, reference: Reference) -> float:
        from scipy.special import rel_entr

        if generated.probabilities is None:
            raise BehaviorError(
                "The Inception Score needs class probabilities; this feature extractor has none. "
                "Choose one that classifies, as in inception_score@inception, or another behavior."
            )
        scores = []
        for split in np.array_split(generated.probabilities.astype(np.float64), self.n_splits):
            scores.append(np.exp(rel_entr(split, split.mean(axis=0)).sum(axis=1).mean()))
        return float(np.mean(scores))


@dataclass(frozen=True)
class FrechetDistance:
    """FID: squared Fréchet distance between Gaussians with the moments of generated and real embeddings.

    References:
        Heusel et al. (2017), eq. 6; the distance is Dowson and Landau (1982), eq. 4.
    """

    name: ClassVar[str] = "fid"
    unit: ClassVar[str] = "squared embedding distance"
    higher_is_better: ClassVar[bool] = False
    uses_features: ClassVar[bool] = True
    min_images: ClassVar[int] = 2
    variant: ClassVar[str] = "sample covariance"

    def measure(self, generated: Features, reference: Reference) -> float:
        real = reference.statistic("moments", lambda: _moments_and_root(reference.features.embeddings))
        mean, covariance = _moments(generated.embeddings)
        return frechet_distance(mean, covariance, real["mean"], real["covariance"], real["root"])


def frechet_distance(
    mean: Float64s, covariance: Float64s, real_mean: Float64s, real_covariance: Float64s, real_root: Float64s
) -> float:
    """Squared Fréchet distance between two Gaussians, at least 0.

    The trace of the square root of the product of the covariances is that of `(R C R)^(1/2)`, where R is the
    symmetric root of the real covariance: a symmetric problem, so singular covariances need neither an offset
    nor complex roots.

    Args:
        mean: `(n_dims,)`, of the generated images.
        covariance: `(n_dims, n_dims)`, of the generated images.
        real_mean: `(n_dims,)`.
        real_covariance: `(n_dims, n_dims)`.
        real_root: Symmetric square root of `real_covariance`.
    """
    eigenvalues = np.linalg.eigvalsh(real_root @ covariance @ real_root)
    root_trace = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    distance = ((mean - real_mean) ** 2).sum() + np.trace(covariance) + np.trace(real_covariance) - 2 * root_trace
    return float(max(distance, 0.0))


def _moments(embeddings: npt.NDArray[np.float32]) -> tuple[Float64s, Float64s]:
    """Mean and sample covariance, summed in blocks."""
    n_images, n_dims = embeddings.shape
    if n_images < 2:
        raise BehaviorError(f"A covariance needs at least 2 images; found {n_images}. Give more images.")
    mean = embeddings.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((n_dims, n_dims))
    for rows in _blocks(n_images, n_dims):
        centred = embeddings[rows] - mean
        scatter += centred.T @ centred
    return mean, scatter / (n_images - 1)


def _moments_and_root(embeddings: npt.NDArray[np.float32]) -> Statistic:
    mean, covariance = _moments(embeddings)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))) @ vectors.T
    return {"mean": mean, "covariance": covariance, "root": root}


@dataclass(frozen=True)
class KernelDistance:
    """KID: squared maximum mean discrepancy of embeddings under the kernel `(x . y / n_dims + 1)^3`.

    Unbiased, so it can be slightly negative. Where the field averages over random subsets, this is the one
    U-statistic of all generated and at most `max_reference` real images (then a fixed subset): less noise,
    and nothing drawn.

    References:
        Binkowski et al. (2018), section 4; Gretton et al. (2012), eq. 3.
    """

    max_reference: int = 10_000
    name: ClassVar[str] = "kid"
    unit: ClassVar[str] = "squared discrepancy"
    higher_is_better: ClassVar[bool] = False
    uses_features: ClassVar[bool] = True
    min_images: ClassVar[int] = 2

    @property
    def variant(self) -> str:
        return f"all pairs; at most {self.max_reference} real images"

    def measure(self, generated: Features, reference: Reference) -> float:
        real = reference.features.embeddings[reference.rows(self.max_reference)]
        within = reference.statistic(
            f"kernel/{self.max_reference}", lambda: {"mean": np.asarray(_mean_kernel_within(real))}
        )
        across = _kernel_sum(generated.embeddings, real) / (len(generated) * len(real))
        return float(_mean_kernel_within(generated.embeddings) + float(within["mean"]) - 2 * across)


def _mean_kernel_within(embeddings: npt.NDArray[np.float32]) -> float:
    """Mean kernel over pairs of different images."""
    n_images, n_dims = embeddings.shape
    if n_images < 2:
        raise BehaviorError(f"The kernel distance needs at least 2 images; found {n_images}. Give more images.")
    diagonal = ((embeddings.astype(np.float64) ** 2).sum(axis=1) / n_dims + 1) ** 3
    return (_kernel_sum(embeddings, embeddings) - diagonal.sum()) / (n_images * (n_images - 1))


def _kernel_sum(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Sum of the kernel over all pairs."""
    transposed = b.T.astype(np.float64) / a.shape[1]
    total = 0.0
    for rows in _blocks(len(a), len(b)):
        similarity = a[rows].astype(np.float64) @ transposed
        similarity += 1
        total += float((similarity * similarity * similarity).sum())
    return total


def _blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Slices of rows such that a block has about `_BLOCK_ENTRIES` entries."""
    step = max(1, _BLOCK_ENTRIES // max(1, n_columns))
    return (slice(start, start + step) for start in range(0, n_rows, step))
