"""Precision and recall: extremes, a naive twin, duplicates, and the fixed subset."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from tribute.behaviors import precision_recall
from tribute.behaviors.base import Reference
from tribute.behaviors.features import Features
from tribute.behaviors.precision_recall import Precision, Recall, squared_radii
from tribute.errors import BehaviorError

MakeFeatures = Callable[..., Features]
MakeReference = Callable[[np.ndarray], Reference]
Clouds = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def clouds() -> Clouds:
    """Two overlapping clouds, generated and real, of different sizes."""
    rng = np.random.default_rng(0)
    return rng.normal(0.8, 0.7, (60, 4)).astype(np.float32), rng.normal(size=(90, 4)).astype(np.float32)


def naive(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    def covered(queries: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]
        return float((cdist(queries, centres) <= radii).any(axis=1).mean())

    a, b = generated.astype(np.float64), real.astype(np.float64)
    return covered(a, b), covered(b, a)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_agrees_with_the_definition(clouds: Clouds, make_features, make_reference, k: int) -> None:
    generated, real = make_features(clouds[0]), make_reference(clouds[1])
    found = Precision(k).measure(generated, real), Recall(k).measure(generated, real)
    assert found == naive(*clouds, k)
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


def test_identical_sets(reference: Reference) -> None:
    assert Precision().measure(reference.features, reference) == 1.0
    assert Recall().measure(reference.features, reference) == 1.0


def test_disjoint_sets(clouds: Clouds, make_features: MakeFeatures, make_reference: MakeReference) -> None:
    generated, real = make_features(clouds[0] + 100), make_reference(clouds[1])
    assert (Precision().measure(generated, real), Recall().measure(generated, real)) == (0.0, 0.0)


def test_one_image_repeated_is_precise_but_recalls_only_itself(clouds: Clouds, make_features, make_reference) -> None:
    generated, real = make_features(np.tile(clouds[1][5], (20, 1))), make_reference(clouds[1])
    assert Precision().measure(generated, real) == 1.0
    assert Recall().measure(generated, real) == pytest.approx(1 / 90)


def test_equal_embeddings_are_at_distance_0_far_from_the_origin(make_features, make_reference) -> None:
    copies = np.repeat(1e3 + np.random.default_rng(0).normal(size=(5, 300)), 4, axis=0).astype(np.float32)
    assert squared_radii(copies, 3).tolist() == [0.0] * 20
    assert Precision().measure(make_features(copies[:7]), make_reference(copies)) == 1.0


def test_order_and_blocks_do_not_matter(clouds: Clouds, make_features, make_reference, monkeypatch) -> None:
    expected = naive(*clouds, 3)
    monkeypatch.setattr(precision_recall, "_BLOCK_ENTRIES", 700)
    generated, real = make_features(clouds[0][::-1]), make_reference(clouds[1][::-1])
    assert (Precision().measure(generated, real), Recall().measure(generated, real)) == expected


def test_large_references_are_subsampled_by_a_fixed_rule(clouds: Clouds, make_features, make_reference) -> None:
    generated, real = make_features(clouds[0]), make_reference(clouds[1])
    rows = real.rows(50)
    assert len(np.unique(rows)) == 50 and np.array_equal(rows, make_reference(clouds[1]).rows(50))
    assert real.rows(90).tolist() == list(range(90))
    assert Precision(3, 50).measure(generated, real) == naive(clouds[0], clouds[1][rows], 3)[0]
    assert Recall(3, 50).measure(generated, real) == naive(clouds[0], clouds[1][rows], 3)[1]
    assert Precision().measure(generated, real) == naive(*clouds, 3)[0]  # not the radii of the subset


def test_too_few_images(make_features: MakeFeatures, make_reference: MakeReference) -> None:
    assert (Precision().min_images, Recall().min_images) == (1, 4)
    few = np.eye(3)
    with pytest.raises(BehaviorError, match="more than 3 images; found 3"):
        Precision().measure(make_features(few), make_reference(few))
