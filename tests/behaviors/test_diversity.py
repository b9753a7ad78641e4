"""Entropy over reference clusters: bounds, the published definition as a naive twin, and freezing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tribute.behaviors.base import Reference
from tribute.behaviors.classifier import ClassifierExtractor
from tribute.behaviors.diversity import ClusterEntropy, entropy_bits, reference_clusters
from tribute.behaviors.features import Features
from tribute.errors import BehaviorError
from tribute.types import Images

MakeFeatures = Callable[..., Features]
MakeReference = Callable[[np.ndarray], Reference]


@pytest.fixture
def blobs() -> np.ndarray:
    """`(200, 32)`: 10 points around each of 20 perpendicular directions."""
    noise = np.random.default_rng(0).normal(scale=0.05, size=(200, 32))
    return np.repeat(3 * np.eye(20, 32), 10, axis=0) + noise


def test_one_cluster_has_no_entropy(blobs, make_features: MakeFeatures, make_reference) -> None:
    assert ClusterEntropy().measure(make_features(blobs[:10].repeat(3, axis=0)), make_reference(blobs)) == 0.0


@pytest.mark.parametrize("n_covered", [2, 5, 20])
def test_even_shares_have_log2_of_the_clusters(blobs, make_features, make_reference, n_covered: int) -> None:
    generated = make_features(blobs[: 10 * n_covered])
    found = ClusterEntropy().measure(generated, make_reference(blobs))
    assert found == pytest.approx(np.log2(n_covered), abs=1e-12)


def test_entropy_of_known_shares() -> None:
    assert entropy_bits(np.array([2, 1, 1, 0])) == pytest.approx(1.5)


def test_clusters_are_the_blobs(blobs, make_reference: MakeReference) -> None:
    clusters = reference_clusters(make_reference(blobs))
    groups = clusters["labels"].reshape(20, 10)
    assert (groups == groups[:, :1]).all() and len(np.unique(groups)) == 20


@pytest.mark.parametrize("unit_length", [True, False])
def test_assignment_is_the_published_one(
    digits: tuple[Images, np.ndarray],
    classifier: ClassifierExtractor,
    reference: Reference,
    unit_length: bool,
) -> None:
    generated = classifier.extract(255 - digits[0][:300])
    clusters = reference_clusters(reference, unit_length=unit_length)
    a, b = (f.embeddings.astype(np.float64) for f in (generated, reference.features))
    if unit_length:
        a, b = (points / np.linalg.norm(points, axis=1, keepdims=True) for points in (a, b))
    similarity = a @ b.T
    distance = similarity.max() - similarity
    to_cluster = np.stack([distance[:, clusters["labels"] == c].mean(axis=1) for c in range(20)], axis=1)
    shares = np.bincount(to_cluster.argmin(axis=1), minlength=20) / 300
    expected = -sum(p * np.log2(p) for p in shares if p > 0)
    assert ClusterEntropy(unit_length=unit_length).measure(generated, reference) == pytest.approx(expected)


def test_order_does_not_matter(blobs, make_features: MakeFeatures, make_reference) -> None:
    reference, generated = make_reference(blobs), blobs[::3]
    expected = ClusterEntropy().measure(make_features(generated), reference)
    assert ClusterEntropy().measure(make_features(generated[::-1]), reference) == expected


def test_real_images_fill_every_cluster(reference: Reference) -> None:
    everything = ClusterEntropy().measure(reference.features, reference)
    assert 3.8 < everything < np.log2(20)


def test_large_references_are_subsampled(blobs, make_reference: MakeReference) -> None:
    clusters = reference_clusters(make_reference(blobs), 5, max_reference=60)
    assert np.array_equal(clusters["rows"], make_reference(blobs).rows(60))
    assert clusters["labels"].shape == (60,) and clusters["means"].shape == (5, 32)


def test_blank_embeddings_are_measured(make_features: MakeFeatures, make_reference, blobs) -> None:
    assert ClusterEntropy().measure(make_features(np.zeros((20, 32))), make_reference(blobs)) == 0.0


def test_too_few_different_real_images(make_features: MakeFeatures, make_reference) -> None:
    repeated = np.repeat(np.eye(7), 10, axis=0)
    with pytest.raises(BehaviorError, match=r"20 clusters.*different real images; found 7"):
        ClusterEntropy().measure(make_features(repeated), make_reference(repeated))
