"""What pretrained extractors share: images to network and back, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tribute import pulse
from tribute.behaviors.features import Features, check_images, features_batch
from tribute.data.tensors import release_pages
from tribute.errors import BehaviorError
from tribute.memory import FittingBatch
from tribute.types import Images

if TYPE_CHECKING:
    import torch

Forward = Callable[["torch.Tensor"], "tuple[torch.Tensor, torch.Tensor | None]"]
"""Embeddings `(b, n_dims)` and class probabilities `(b, n_classes)`, or None, of RGB images `(b, 3, h, w)` uint8."""


@dataclass(frozen=True)
class NetworkExtractor:
    """Features from a frozen network; it takes images of any size.

    Attributes:
        name: Which network it is.
        fingerprint: SHA-256 of its weights.
        preparation: How images are made to fit the network; a part of the variant.
        forward: The network, in evaluation mode, with its preparation.
        batch_size: Images per pass. It changes features by rounding at most.
        device: Where `forward` wants images.
    """

    name: str
    fingerprint: str
    preparation: str
    forward: Forward
    batch_size: int
    device: str

    def extract(self, images: Images, batch_size: int | None = None) -> Features:
        """Features of `images` `(n_images, height, width, 1 or 3)`; one channel is taken for grey.

        Raises:
            BehaviorError: They are no images, or the network gives NaN or infinity.
            OutOfMemory: Not even one image fits into memory.
        """
        import torch

        check_images(images)
        if not len(images):
            raise BehaviorError(f"The extractor {self.name} needs at least 1 image; found none.")

        def features_of(rows: range) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
            pulse.beat()
            batch = torch.from_numpy(np.array(images[rows.start : rows.stop])).to(self.device)
            release_pages(images)
            pixels = batch.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()  # (b, 3, h, w)
            embedded, classes = self.forward(pixels)
            return embedded.float().cpu().numpy(), None if classes is None else classes.float().cpu().numpy()

        fitting = self._fitting if batch_size is None else features_batch(batch_size)
        with torch.inference_mode():
            parts = fitting.map(len(images), features_of)
        probabilities = [classes for _, classes in parts if classes is not None]
        embeddings = np.concatenate([embedded for embedded, _ in parts])
        return Features(images, embeddings, np.concatenate(probabilities) if probabilities else None)

    @cached_property
    def _fitting(self) -> FittingBatch:
        return features_batch(self.batch_size)
