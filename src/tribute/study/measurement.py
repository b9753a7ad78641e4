"""What a study measures: behaviors, the extractors they look through, and the real images they compare with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tribute.behaviors.base import (
    DEFAULT_EXTRACTOR,
    ModelBehavior,
    behavior_variant,
    check_behaviors,
    extractor_of,
    get_behavior,
    measure_behaviors,
    uses_probabilities,
    uses_reference,
)
from tribute.behaviors.classifier import ClassifierExtractor, train_or_load_classifier
from tribute.behaviors.extractors import CLASSIFIER, check_settings, load_extractor
from tribute.behaviors.features import FeatureExtractor, Features, KnownFeatures, content_hash
from tribute.behaviors.reference import Reference, fixed_rows, is_reference_cached
from tribute.config import FeatureConfig
from tribute.data.tensors import TrainingData, gather
from tribute.errors import TributeError
from tribute.types import Images

logger = logging.getLogger(__name__)


class Measurement:
    """Behaviors with everything they need, made on first use and then kept.

    Args:
        behaviors: Names of behaviors.
        data: Holds the real images.
        features: Extractors and their weights.
        cache_dir: Where classifiers and reference features are kept.
        device: Where networks run.

    Raises:
        ConfigError: A name or a setting is unknown, repeated, or needs what its extractor does not give.
    """

    def __init__(
        self, behaviors: Sequence[str], data: TrainingData, features: FeatureConfig, *, cache_dir: Path, device: str
    ) -> None:
        check_settings(features)
        self.behaviors = [get_behavior(name, features=features) for name in behaviors]
        check_behaviors(self.behaviors, default_extractor=features.extractor)
        self.data = data
        self.features = features
        self.cache_dir = cache_dir
        self.device = device
        self._extractors: dict[str, FeatureExtractor] = {}
        self._references: dict[str, Reference] = {}

    @cached_property
    def classifier(self) -> ClassifierExtractor:
        """The in-domain classifier, trained on the dataset's real images once and cached."""
        return train_or_load_classifier(
            self.data.reference_images,
            self.data.reference_labels,
            label_names=list(self.data.label_names),
            cache_dir=self.cache_dir / "classifiers",
            device=self.device,
        )

    def extractor(self, name: str = DEFAULT_EXTRACTOR) -> FeatureExtractor:
        """An extractor by name."""
        name = self._resolve(name)
        if name == CLASSIFIER:
            return self.classifier
        if name not in self._extractors:
            self._extractors[name] = load_extractor(name, self.features, self.device)
        return self._extractors[name]

    def reference(self, name: str = DEFAULT_EXTRACTOR) -> Reference:
        """The dataset's real images, or a fixed draw of them, as an extractor sees them."""
        name = self._resolve(name)
        if name not in self._references:
            images, images_sha256 = self._real_images
            self._references[name] = Reference.cached(
                images,
                self.extractor(name),
                cache_dir=self.cache_dir / "references",
                images_sha256=images_sha256,
            )
        return self._references[name]

    def references_cached(self) -> bool:
        """Whether the features of the real images that behaviors compare with need not be extracted any more.

        It loads the extractors, and trains the classifier where one is used that is not in the cache.
        """
        names = {extractor_of(item) for item in self.behaviors if item.uses_features and uses_reference(item)}
        _, images_sha256 = self._real_images
        folder = self.cache_dir / "references"
        return all(
            is_reference_cached(self.extractor(name), cache_dir=folder, images_sha256=images_sha256) for name in names
        )

    @cached_property
    def _real_images(self) -> tuple[Images, str]:
        """Images to compare with, and what identifies them."""
        images, sha256 = self.data.reference_images, self.data.manifest["sha256"]["reference_images"]
        n_most = self.features.max_reference
        if n_most is None or len(images) <= n_most:
            return images, sha256
        return gather(images, fixed_rows(len(images), n_most)), content_hash(sha256, f"{n_most} rows")

    @property
    def uses_classifier(self) -> bool:
        """Whether any behavior looks through the in-domain classifier."""
        return CLASSIFIER in {self._resolve(extractor_of(b)) for b in self.behaviors if b.uses_features}

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights and the architecture of every extractor that a behavior looks through, by its name."""
        names = sorted({self._resolve(extractor_of(behavior)) for behavior in self.behaviors if behavior.uses_features})
        return {name: self.extractor(name).fingerprint for name in names}

    def measure(self, images: Images) -> dict[str, float]:
        """Behaviors of generated images, by name."""
        needy = [behavior for behavior in self.behaviors if behavior.uses_features]
        comparing = [behavior for behavior in needy if uses_reference(behavior)]
        return measure_behaviors(
            images,
            self.behaviors,
            extractor={name: self.extractor(name) for name in map(extractor_of, needy)},
            reference={name: self.reference(name) for name in map(extractor_of, comparing)},
        )

    def measure_real(self, n_images: int) -> dict[str, float]:
        """Behaviors of real images, a fixed draw of as many as there are generated ones, by name.

        A behavior is left out where it cannot be measured of them, and where a large network would have to look at them
        once more: features that behaviors compare with are there, and only the in-domain classifier looks again.
        """
        images, _ = self._real_images
        rows = fixed_rows(len(images), n_images)
        drawn = gather(images, rows)
        values: dict[str, float] = {}
        for behavior in self.behaviors:
            name = extractor_of(behavior)
            try:
                features = self._features_at_hand(behavior, drawn, rows)
                if behavior.uses_features and features is None:
                    continue
                extractor = {} if features is None else {name: KnownFeatures(self.extractor(name), features)}
                reference = {name: self.reference(name)} if uses_reference(behavior) else {}
                values |= measure_behaviors(drawn, [behavior], extractor=extractor, reference=reference)
            except TributeError as error:
                logger.debug("%s of real images: %s", behavior.name, error)
        return values

    def _features_at_hand(self, behavior: ModelBehavior, drawn: Images, rows: npt.NDArray[np.intp]) -> Features | None:
        """Features of some rows of the real images as a behavior sees them, where they cost little."""
        if uses_reference(behavior) and not uses_probabilities(behavior):
            return Features(drawn, self.reference(extractor_of(behavior)).features.embeddings[rows])
        if behavior.uses_features and self._resolve(extractor_of(behavior)) == CLASSIFIER:
            return self.classifier.extract(drawn)
        return None

    def definitions(self) -> dict[str, dict[str, Any]]:
        """Unit, direction and variant of every behavior, to be stored with its values."""
        return {
            behavior.name: {
                "unit": behavior.unit,
                "higher_is_better": behavior.higher_is_better,
                "variant": self._variant(behavior),
            }
            for behavior in self.behaviors
        }

    def _variant(self, behavior: ModelBehavior) -> str:
        if not behavior.uses_features:
            return behavior_variant(behavior, None)
        name = extractor_of(behavior)
        # Real images are looked at only by behaviors that freeze something of them: the variant is needed early.
        freezes = uses_reference(behavior) and getattr(behavior, "frozen", None) is not None
        variant = behavior_variant(behavior, self.extractor(name), self.reference(name) if freezes else None)
        n_all, n_most = len(self.data.reference_images), self.features.max_reference
        if uses_reference(behavior) and n_most is not None and n_most < n_all:
            variant += f"; {n_most} of {n_all} real images, a fixed draw"
        return variant

    def _resolve(self, name: str) -> str:
        return self.features.extractor if name == DEFAULT_EXTRACTOR else name
