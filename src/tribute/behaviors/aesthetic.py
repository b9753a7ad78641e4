"""Aesthetic score: what a linear head on CLIP embeddings predicts that people would rate an image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from tribute.behaviors.extractors.weights import read_weights
from tribute.behaviors.features import Features
from tribute.behaviors.reference import Reference
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError, ConfigError
from tribute.files import sha256_of_file


@dataclass(frozen=True)
class AestheticScore:
    """Mean, or a percentile over images, of `weight . embedding / |embedding| + bias`.

    The head (LAION's aesthetic predictor v1, for ViT-L/14) was fitted to embeddings of unit length; without scaling
    the scores come out between 20 and 30 in place of 1 to 10.

    References:
        LAION-AI/aesthetic-predictor (2022); its use as a behavior is that of Lin, Lu, Kim and Lee (2025).
    """

    percentile: int | None = None
    head: Path | None = None
    unit: ClassVar[str] = "predicted rating"
    extractor: ClassVar[str] = "clip"
    higher_is_better: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False
    min_images: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise ConfigError(f"aesthetic_score_pNN: expected a percentile from 0 to 100; found {self.percentile}")

    @property
    def name(self) -> str:
        return "aesthetic_score" if self.percentile is None else f"aesthetic_score_p{self.percentile}"

    @property
    def variant(self) -> str:
        what = "mean" if self.percentile is None else f"percentile {self.percentile}"
        return f"head {self._head.sha256[:12]}; {what}"

    def with_settings(self, features: FeatureConfig) -> AestheticScore:
        """With the head that the settings name."""
        return replace(self, head=features.aesthetic_head)

    def measure(self, generated: Features, reference: Reference) -> float:
        embeddings = generated.embeddings.astype(np.float64)
        head = self._head
        if embeddings.shape[1] != len(head.weight):
            raise BehaviorError(
                f"The aesthetic head {self.head} is for embeddings of width {len(head.weight)}; the extractor's are "
                f"{embeddings.shape[1]} wide. Use the head of this network: for ViT-L/14 the width is 768."
            )
        lengths = np.maximum(np.linalg.norm(embeddings, axis=1), np.finfo(np.float64).tiny)
        scores = embeddings @ head.weight / lengths + head.bias
        return float(scores.mean() if self.percentile is None else np.percentile(scores, self.percentile))

    @cached_property
    def _head(self) -> _LinearHead:
        if self.head is None:
            raise BehaviorError(
                f"Behavior {self.name!r} needs the linear head of LAION's aesthetic predictor; found none. Download "
                "sa_0_4_vit_l_14_linear.pth from github.com/LAION-AI/aesthetic-predictor and name it with "
                "--aesthetic_head PATH, or features: {aesthetic_head: PATH} in a study."
            )
        return _LinearHead.read(self.head)


@dataclass(frozen=True)
class _LinearHead:
    """`weight` `(n_dims,)`, `bias` and the hash of the file that they come from."""

    weight: np.ndarray
    bias: float
    sha256: str

    @classmethod
    def read(cls, path: Path) -> _LinearHead:
        arrays = {name: tensor.double().numpy() for name, tensor in read_weights(path).items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["weight"][0] != 1:
            raise BehaviorError(
                f"The aesthetic head {path} must hold `weight` of shape (1, width) and `bias` of shape (1,); found "
                f"{shapes}. Give LAION's sa_0_4_vit_l_14_linear.pth, or the same as safetensors."
            )
        return cls(arrays["weight"][0], float(arrays["bias"].reshape(-1)[0]), sha256_of_file(path))
