"""Entropy over reference clusters: bounds, the published definition as a naive twin, freezing; the Vendi score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tribute.behaviors.base import Reference, behavior_variant, get_behavior
from tribute.behaviors.classifier import ClassifierExtractor
from tribute.behaviors.diversity import (
    ClusterEntropy,
    VendiScore,
    entropy_bits,
    partition_hash,
    published_diversity,
    reference_clusters,
)
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


def test_diversity_is_the_published_one_with_a_frozen_clustering(blobs, make_features, make_reference) -> None:
    diversity, reference = get_behavior("diversity"), make_reference(blobs)
    assert diversity == published_diversity() and diversity.name == "diversity"
    assert diversity.measure(make_features(blobs), reference) == pytest.approx(np.log2(20))
    blip = Extractor("blip", "f" * 64)
    hashed = partition_hash(reference_clusters(reference, unit_length=False))[:12]
    expected = f"blip ffffffffffff; 20 Ward clusters of at most 5000 real images; clustering {hashed}"
    assert behavior_variant(diversity, blip, reference) == expected
    assert "clustering" not in behavior_variant(get_behavior("entropy@blip"), blip, reference)
    other = make_reference(np.roll(blobs, 7, axis=0))
    assert behavior_variant(diversity, blip, other) != expected


class Extractor:
    """A name and a fingerprint."""

    def __init__(self, name: str, fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        raise NotImplementedError


def test_a_clusterings_hash_ignores_numbering_and_rounding(blobs, make_reference: MakeReference) -> None:
    clusters = reference_clusters(make_reference(blobs))
    expected = partition_hash(clusters)
    assert partition_hash({**clusters, "labels": 19 - clusters["labels"]}) == expected
    assert partition_hash(reference_clusters(make_reference(blobs * (1 + 1e-6)))) == expected
    moved = clusters["labels"].copy()
    moved[0] = moved[-1]
    assert partition_hash({**clusters, "labels": moved}) != expected


@pytest.fixture
def nothing(make_reference: MakeReference) -> Reference:
    return make_reference(np.empty((0, 4)))


@pytest.mark.parametrize(("n_images", "n_dims"), [(7, 3), (7, 40)])
def test_vendi_of_one_image_repeated_is_1(make_features, nothing, n_images: int, n_dims: int) -> None:
    image = np.random.default_rng(0).normal(size=(1, n_dims))
    scales = np.arange(1, n_images + 1)[:, None]
    assert VendiScore().measure(make_features(image * scales), nothing) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("n_dims", [6, 9])
def test_vendi_of_perpendicular_images_is_their_number(make_features, nothing, n_dims: int) -> None:
    assert VendiScore().measure(make_features(3 * np.eye(6, n_dims)), nothing) == pytest.approx(6.0, rel=1e-12)


def test_vendi_is_the_published_definition_either_way(make_features, nothing) -> None:
    for shape in ((30, 8), (8, 30)):
        points = np.random.default_rng(1).normal(size=shape).astype(np.float32).astype(np.float64)
        unit = points / np.linalg.norm(points, axis=1, keepdims=True)
        eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit))
        expected = np.exp(-sum(value * np.log(value) for value in eigenvalues if value > 1e-12))
        assert VendiScore().measure(make_features(points), nothing) == pytest.approx(expected, rel=1e-9)


def test_vendi_does_not_count_copies_or_see_order(make_features, nothing) -> None:
    points = np.random.default_rng(2).normal(size=(12, 5))
    once = VendiScore().measure(make_features(points), nothing)
    assert VendiScore().measure(make_features(np.tile(points, (3, 1))[::-1]), nothing) == pytest.approx(once, rel=1e-9)
    assert 1 < once < 5


def test_vendi_needs_directions(make_features, nothing) -> None:
    points = np.ones((4, 3))
    points[2] = 0
    with pytest.raises(BehaviorError, match="image 2 has zeros only"):
        VendiScore().measure(make_features(points), nothing)
