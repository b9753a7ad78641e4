"""Inception Score, Fréchet and kernel distance against torchmetrics, closed forms and naive twins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tribute.behaviors import inception
from tribute.behaviors.base import Reference
from tribute.behaviors.classifier import ClassifierExtractor
from tribute.behaviors.features import Features
from tribute.behaviors.inception import FrechetDistance, InceptionScore, KernelDistance, frechet_distance
from tribute.errors import BehaviorError
from tribute.types import Images

MakeFeatures = Callable[..., Features]
MakeReference = Callable[[np.ndarray], Reference]
RNG_SEED = 7


class Identity(torch.nn.Module):
    """Lets torchmetrics take features as if they were images."""

    num_features = 12

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture
def generated(make_features: MakeFeatures) -> Features:
    rng = np.random.default_rng(RNG_SEED)
    embeddings = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + 0.3
    return make_features(embeddings, rng.dirichlet(np.full(10, 0.2), 150))


@pytest.fixture
def real(make_reference: MakeReference) -> Reference:
    rng = np.random.default_rng(RNG_SEED + 1)
    return make_reference(rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)))


def test_inception_score_of_constant_predictions_is_1(make_features, real: Reference) -> None:
    constant = make_features(probabilities=np.tile(np.random.default_rng(0).dirichlet(np.ones(10)), (30, 1)))
    assert InceptionScore().measure(constant, real) == pytest.approx(1.0, abs=1e-12)


def test_inception_score_of_certain_even_predictions_is_the_number_of_classes(make_features, real) -> None:
    certain = make_features(probabilities=np.tile(np.eye(10), (3, 1)))
    assert InceptionScore().measure(certain, real) == pytest.approx(10.0, rel=1e-12)
    assert InceptionScore(n_splits=3).measure(certain, real) == pytest.approx(10.0, rel=1e-12)


def test_inception_score_does_not_depend_on_order(make_features, generated: Features, real) -> None:
    assert generated.probabilities is not None
    shuffled = np.random.default_rng(0).permutation(generated.probabilities)
    expected = InceptionScore().measure(generated, real)
    assert InceptionScore().measure(make_features(probabilities=shuffled), real) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")
@pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom:UserWarning")
@pytest.mark.parametrize("n_splits", [1, 10])
def test_inception_score_agrees_with_torchmetrics(make_features, generated: Features, real, n_splits) -> None:
    from torchmetrics.image.inception import InceptionScore as Oracle

    assert generated.probabilities is not None
    oracle = Oracle(feature=Identity(), splits=n_splits)
    oracle.update(torch.from_numpy(generated.probabilities).double().log())
    with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles before it splits
        torch.default_generator.manual_seed(0)
        order = torch.randperm(len(generated)).numpy()
        torch.default_generator.manual_seed(0)
        expected = float(oracle.compute()[0])
    shuffled = make_features(probabilities=generated.probabilities[order])
    assert InceptionScore(n_splits).measure(shuffled, real) == pytest.approx(expected, rel=1e-4)


def test_inception_score_needs_probabilities(make_features: MakeFeatures, real: Reference) -> None:
    with pytest.raises(BehaviorError, match="class probabilities"):
        InceptionScore().measure(make_features(np.zeros((4, 12))), real)


def test_variants_name_the_splits() -> None:
    assert (InceptionScore().variant, InceptionScore(10).variant) == ("1 split", "10 splits")
    assert InceptionScore(10).min_images == 20


def with_moments(mean: np.ndarray, covariance: np.ndarray, n_images: int, seed: int) -> np.ndarray:
    """Points whose sample moments are exactly the given ones."""
    points = np.random.default_rng(seed).normal(size=(n_images, len(mean)))
    points -= points.mean(axis=0)
    whitened = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_gaussians(make_features: MakeFeatures, make_reference) -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    variances, real_variances = np.array([1.0, 2, 3, 4, 5]), np.array([4.0, 0.5, 3, 1, 9])
    mean, real_mean = np.arange(5.0), np.ones(5)
    points = with_moments(mean, rotation @ np.diag(variances) @ rotation.T, 60, seed=1)
    real_points = with_moments(real_mean, rotation @ np.diag(real_variances) @ rotation.T, 80, seed=2)
    expected = ((mean - real_mean) ** 2).sum() + ((variances**0.5 - real_variances**0.5) ** 2).sum()
    found = FrechetDistance().measure(make_features(points), make_reference(real_points))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n_images", [150, 8])  # 8 images in 12 dimensions: a singular covariance
def test_frechet_distance_agrees_with_torchmetrics(make_features, generated, real, n_images: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    few = make_features(generated.embeddings[:n_images])
    oracle = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    oracle.update(torch.from_numpy(real.features.embeddings).double(), real=True)
    oracle.update(torch.from_numpy(few.embeddings).double(), real=False)
    assert FrechetDistance().measure(few, real) == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_frechet_distance_to_itself_is_0(reference: Reference, make_features, make_reference) -> None:
    assert FrechetDistance().measure(reference.features, reference) == pytest.approx(0.0, abs=1e-6)
    flat = np.outer(np.arange(9.0), np.ones(12))  # rank 1
    assert FrechetDistance().measure(make_features(flat), make_reference(flat)) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_constant_images(make_features: MakeFeatures, real: Reference) -> None:
    mean = real.features.embeddings.mean(axis=0, dtype=np.float64)
    covariance = np.cov(real.features.embeddings.T.astype(np.float64))
    constant = make_features(np.tile(mean, (5, 1)))
    assert FrechetDistance().measure(constant, real) == pytest.approx(np.trace(covariance), rel=1e-6)


def test_frechet_distance_is_symmetric() -> None:
    rng = np.random.default_rng(0)
    roots = [factor @ factor.T for factor in rng.normal(size=(2, 6, 6))]
    covariances = [root @ root for root in roots]
    zero = np.zeros(6)
    there = frechet_distance(zero, covariances[0], zero, covariances[1], roots[1])
    back = frechet_distance(zero, covariances[1], zero, covariances[0], roots[0])
    assert there == pytest.approx(back, rel=1e-9) and there > 0


def naive_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    within = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return float(sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def test_kernel_distance_is_the_u_statistic(make_features, make_reference, generated, real) -> None:
    few, few_real = generated.embeddings[:20], real.features.embeddings[:31]
    found = KernelDistance().measure(make_features(few), make_reference(few_real))
    assert found == pytest.approx(naive_kernel_distance(few, few_real), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")
def test_kernel_distance_agrees_with_torchmetrics(generated: Features, real: Reference) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    oracle = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=150)
    oracle.update(torch.from_numpy(real.features.embeddings).double(), real=True)
    oracle.update(torch.from_numpy(generated.embeddings).double(), real=False)
    with torch.random.fork_rng(devices=[]):
        expected = float(oracle.compute()[0])
    assert KernelDistance().measure(generated, real) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_unbiased(make_features: MakeFeatures, make_reference: MakeReference) -> None:
    rng = np.random.default_rng(0)
    draws = [
        KernelDistance().measure(make_features(rng.normal(size=(20, 4))), make_reference(rng.normal(size=(30, 4))))
        for _ in range(200)
    ]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))


def test_blocks_do_not_matter(generated: Features, real: Reference, make_reference, monkeypatch) -> None:
    behaviors = (FrechetDistance(), KernelDistance())
    expected = [behavior.measure(generated, real) for behavior in behaviors]
    monkeypatch.setattr(inception, "_BLOCK_ENTRIES", 1000)
    fresh = make_reference(real.features.embeddings)
    assert [b.measure(generated, fresh) for b in behaviors] == pytest.approx(expected, rel=1e-9)


def test_a_reference_of_one_image_is_refused(make_features, make_reference, generated: Features) -> None:
    for behavior in (FrechetDistance(), KernelDistance()):
        with pytest.raises(BehaviorError, match="at least 2 images; found 1"):
            behavior.measure(generated, make_reference(np.zeros((1, 12))))


def test_missing_classes_show(
    digits: tuple[Images, np.ndarray], classifier: ClassifierExtractor, reference: Reference
) -> None:
    images, labels = digits
    scores = {n: classifier.extract(images[labels < n]) for n in (3, 6, 10)}
    for n_classes, features in scores.items():
        assert InceptionScore().measure(features, reference) == pytest.approx(n_classes, rel=0.05)
    distances = [FrechetDistance().measure(scores[n], reference) for n in (3, 6, 10)]
    assert distances[0] > 1.5 * distances[1] > 10 * distances[2]


def test_splits_are_in_name_variant_and_images_needed() -> None:
    assert (InceptionScore().name, InceptionScore().variant) == ("inception_score", "1 split")
    ten = InceptionScore(10)
    assert (ten.name, ten.variant, ten.min_images) == ("inception_score_10", "10 splits", 20)
