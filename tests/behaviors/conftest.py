"""Real digits, their classifier trained once per session, and small made-up features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tribute.behaviors.base import Reference
from tribute.behaviors.classifier import ClassifierExtractor, train_or_load_classifier
from tribute.behaviors.features import Features
from tribute.types import Images


@pytest.fixture(scope="session")
def digits() -> tuple[Images, np.ndarray]:
    """1,797 real scans `(n, 8, 8, 1)` and their labels."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    return np.round(np.asarray(flat) * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1), np.asarray(labels)


@pytest.fixture(scope="session")
def classifier_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="session")
def classifier(digits: tuple[Images, np.ndarray], classifier_cache: Path) -> ClassifierExtractor:
    images, labels = digits
    names = [str(digit) for digit in range(10)]
    return train_or_load_classifier(images, labels, label_names=names, cache_dir=classifier_cache)


@pytest.fixture(scope="session")
def reference(digits: tuple[Images, np.ndarray], classifier: ClassifierExtractor) -> Reference:
    return Reference.from_images(digits[0], classifier)


@pytest.fixture
def make_features() -> Callable[..., Features]:
    """Features with given embeddings or probabilities, and blank images."""

    def make(embeddings: np.ndarray | None = None, probabilities: np.ndarray | None = None) -> Features:
        if embeddings is None:
            assert probabilities is not None
            embeddings = np.zeros((len(probabilities), 1))
        blank = np.zeros((len(embeddings), 8, 8, 1), np.uint8)
        if probabilities is not None:
            probabilities = probabilities.astype(np.float32)
        return Features(blank, embeddings.astype(np.float32), probabilities)

    return make


@pytest.fixture
def make_reference(make_features: Callable[..., Features]) -> Callable[[np.ndarray], Reference]:
    """A reference with given embeddings."""
    return lambda embeddings: Reference(make_features(embeddings), extractor_fingerprint="made up")
