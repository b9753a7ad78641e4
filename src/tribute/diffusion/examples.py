"""Training examples as the network sees them: rows of one tensor, pixels or latents, with their labels."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tribute.data.tensors import gather
from tribute.diffusion.sample import from_uint8
from tribute.types import Images, Latents


class TrainingExamples(Protocol):
    """What the training loop draws its batches from."""

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """`(n_examples,)`, for class-conditional networks; None where there are none."""
        ...

    @property
    def n_labels(self) -> int:
        """Labels that there are, those without an example included; 0 where there are none."""
        ...

    @property
    def can_flip(self) -> bool:
        """Whether a mirrored example is the example of the mirrored image."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: npt.NDArray[np.int64], generator: torch.Generator) -> torch.Tensor:
        """Rows `(n, channels, height, width)` float32, on the CPU.

        Args:
            rows: `(n,)`, in any order, with repeats.
            generator: For what is random in an example, such as the draw from the posterior of its latent. Of the
                batch's own stream, apart from that of the loss.
        """
        ...


class PixelExamples:
    """Images in [-1, 1].

    Args:
        images: `(n_examples, height, width, channels)` uint8, in memory or memory-mapped.
        labels: `(n_examples,)`, in [0, n_labels).
        n_labels: Labels that there are; None: as many as the largest label says.
    """

    can_flip = True

    def __init__(
        self, images: Images, labels: npt.NDArray[np.int64] | None = None, n_labels: int | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.n_labels = count_labels(labels) if n_labels is None else n_labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: npt.NDArray[np.int64], generator: torch.Generator) -> torch.Tensor:
        """Rows `(n, channels, height, width)` float32 in [-1, 1]; nothing is random."""
        return from_uint8(gather(self.images, rows))


class LatentExamples:
    """Scaled latents; of a codec with a posterior, a new draw from it every time an example is used.

    Args:
        latents: `(n_examples, channels, height, width)` float32, in memory or memory-mapped; where there is a
            posterior, its means and then its log-variances along the channels.
        labels: `(n_examples,)`, in [0, n_labels).
        n_labels: Labels that there are; None: as many as the largest label says.
        has_posterior: Whether the latents are a posterior's parameters.
    """

    can_flip = False

    def __init__(
        self,
        latents: Latents,
        labels: npt.NDArray[np.int64] | None = None,
        n_labels: int | None = None,
        *,
        has_posterior: bool = False,
    ) -> None:
        self.latents = latents
        self.labels = labels
        self.n_labels = count_labels(labels) if n_labels is None else n_labels
        self.has_posterior = has_posterior

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, rows: npt.NDArray[np.int64], generator: torch.Generator) -> torch.Tensor:
        """Rows `(n, channels, height, width)`; random where there is a posterior.

        References:
            Kingma and Welling (2014), section 2.4, for drawing from the posterior.
        """
        stored = torch.from_numpy(gather(self.latents, rows))
        if not self.has_posterior:
            return stored
        mean, log_variance = stored.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=generator)


def count_labels(labels: npt.NDArray[np.int64] | None) -> int:
    """Labels up to the largest that occurs; 0 where there are none."""
    return 0 if labels is None else int(labels.max(initial=-1)) + 1
