"""Networks of the in-domain classifier, and the recipes by which they are trained.

`recipe_for` chooses by image size. Both networks are pairs of 3x3 convolutions with batch normalisation that halve
the image until few pixels are left, and the mean over these is the embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tribute import pulse
from tribute.data.tensors import release_pages
from tribute.memory import FittingBatch
from tribute.types import Images

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ClassifierRecipe:
    """How the in-domain classifier is trained; part of its cache key.

    Attributes:
        embedding_width: Width of the last convolution, and so of the embeddings.
        batch_size: Images per step.
        n_epochs: Passes over the training part, within `min_steps` and `max_steps`.
        min_steps: Least optimizer updates, for small datasets.
        max_steps: Most optimizer updates, for large ones.
        learning_rate: Peak of a triangular schedule.
        weight_decay: Of the optimizer; that of AdamW is apart from the gradient.
        held_out_share: Share of each class that is kept for `held_out_accuracy`.
        version: Raised when the code of the network or of its training changes.
        stage_widths: Channels of each stage of the network for photographs; empty for the plain network.
        label_smoothing: Probability spread evenly over all classes in the targets.
        bfloat16: Whether to train in bfloat16 where the machine multiplies it in hardware. Features are always
            computed in float32.
        beta2: Of AdamW; short trainings want a shorter memory.
        momentum: Of stochastic gradient descent, by Nesterov; 0 trains by AdamW.
    """

    embedding_width: int = 64
    batch_size: int = 128
    n_epochs: int = 40
    min_steps: int = 300
    max_steps: int = 1500
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    held_out_share: float = 0.2
    version: int = 1
    stage_widths: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    bfloat16: bool = False
    beta2: float = 0.999
    momentum: float = 0.0

    def n_steps(self, n_train: int) -> int:
        """Optimizer updates for `n_train` images."""
        n_batches = max(1, n_train // self.batch_size)
        return min(max(self.n_epochs * n_batches, self.min_steps), self.max_steps)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields by which networks are kept; see `stored_fields`."""
        return stored_fields(self, {"stage_widths", "label_smoothing", "bfloat16", "beta2", "momentum"})


PLAIN = ClassifierRecipe()
"""For writing, scans and tiny images."""

PHOTOGRAPHS = ClassifierRecipe(
    embedding_width=256,
    batch_size=512,
    n_epochs=7,
    learning_rate=0.36,
    weight_decay=2.8e-3,
    stage_widths=(64, 128, 256),
    label_smoothing=0.1,
    bfloat16=True,
    momentum=0.85,
    version=3,
)
"""For colour images of 32 pixels and more. Rates, momentum and decay are those of Jordan (2024), rounded."""

SMALL_PHOTOGRAPHS = dataclasses.replace(PHOTOGRAPHS, n_epochs=10)
"""For colour images of 16..31 pixels, which are harder to tell apart; an epoch costs a quarter."""

FEW_PHOTOGRAPHS = ClassifierRecipe(
    embedding_width=128,
    n_epochs=10,
    learning_rate=4e-3,
    stage_widths=(64, 128, 128),
    label_smoothing=0.1,
    bfloat16=True,
    beta2=0.95,
    version=2,
)
"""For less than ten thousand colour images: fewer weights, smaller batches, an optimizer that minds its rate less."""


BATCH_IMAGES = 512
"""Images that a classifier looks at at once."""


def recipe_for(image_shape: tuple[int, int, int], n_images: int) -> ClassifierRecipe:
    """How to train on `n_images` images of `image_shape` (height, width, channels)."""
    height, width, channels = image_shape
    if channels != 3 or min(height, width) < 16:
        return PLAIN
    if n_images < 10_000:
        return FEW_PHOTOGRAPHS
    return PHOTOGRAPHS if min(height, width) >= 32 else SMALL_PHOTOGRAPHS


@dataclass(frozen=True)
class Architecture:
    """All that is needed, besides weights, to rebuild the classifier.

    Attributes:
        image_shape: Height, width, channels.
        n_classes: Number of classes.
        embedding_width: Width of the embeddings.
        pixel_mean: Of each channel, in 0..255.
        pixel_sd: Of each channel, in 0..255.
        stage_widths: As in the recipe; empty for the plain network.
    """

    image_shape: tuple[int, int, int]
    n_classes: int
    embedding_width: int
    pixel_mean: tuple[float, ...]
    pixel_sd: tuple[float, ...]
    stage_widths: tuple[int, ...] = ()

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Architecture:
        """The inverse of `identity` after a detour through JSON, which knows no tuples."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        return cls(**fields)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields as they are stored; see `stored_fields`."""
        return stored_fields(self, {"stage_widths"})

    def build(self) -> nn.ModuleDict:
        """A `trunk` from pixels to embeddings, and a `head` from embeddings to logits."""
        from torch import nn

        layers = self._whitened_stages() if self.stage_widths else self._plain_stages()
        trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.ModuleDict({"trunk": trunk, "head": nn.Linear(self.embedding_width, self.n_classes)})

    def _plain_stages(self) -> list[nn.Module]:
        """Pairs of 3x3 convolutions, halving the image down to 4..7 pixels."""
        from torch import nn

        height, width, channels = self.image_shape
        side = min(height, width)
        layers: list[nn.Module] = []
        if side >= 64:  # averaged down to 32..63 pixels: enough to tell classes apart, and affordable on a CPU
            factor = averaging_factor(side)
            layers.append(nn.AvgPool2d(factor))
            side //= factor
        n_halvings = max(0, (side // 4).bit_length() - 1)
        for stage in range(n_halvings + 1):
            n_out = self.embedding_width // 2 if stage < n_halvings and stage == 0 else self.embedding_width
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, n_out, 3, padding=1, bias=False),
                    nn.BatchNorm2d(n_out),
                    nn.ReLU(),
                ]
                channels = n_out
            if stage < n_halvings:
                layers.append(nn.MaxPool2d(2))
        return layers

    def _whitened_stages(self) -> list[nn.Module]:
        """A fixed whitening of 2x2 patches, then stages that halve the image between two convolutions.

        The shape of the network is that of Jordan (2024), "94% on CIFAR-10 in 3.29 seconds on a single GPU", narrower
        and with a mean instead of a maximum at its end. The maximum before normalisation and activation spares three
        quarters of their work.
        """
        from torch import nn

        height, width, n_channels = self.image_shape
        factor = averaging_factor(min(height, width))
        n_in = 2 * 4 * n_channels
        layers: list[nn.Module] = [nn.AvgPool2d(factor)] if factor > 1 else []
        layers += [nn.ReplicationPad2d((0, 1, 0, 1)), nn.Conv2d(n_channels, n_in, 2), nn.ReLU()]
        for n_out in self.stage_widths:
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU()]
            layers += [nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            n_in = n_out
        return layers

    def pixels(self, images: Images, device: str) -> torch.Tensor:
        """float32 `(n_images, channels, height, width)` with mean 0 and standard deviation 1 per channel."""
        import torch

        pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
        release_pages(images)
        mean, sd = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.pixel_mean, self.pixel_sd))
        return (pixels - mean) / sd


def forward(
    network: nn.ModuleDict, architecture: Architecture, images: Images, device: str, batch: FittingBatch
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Embeddings `(n_images, embedding_width)` and probabilities `(n_images, n_classes)`."""
    import torch

    embeddings = np.empty((len(images), architecture.embedding_width), np.float32)
    probabilities = np.empty((len(images), architecture.n_classes), np.float32)

    def look_at(items: range) -> None:
        pulse.beat()
        rows = slice(items.start, items.stop)
        embedded = network["trunk"](architecture.pixels(images[rows], device))
        embeddings[rows] = embedded.cpu().numpy()
        probabilities[rows] = network["head"](embedded).softmax(dim=1).cpu().numpy()

    with torch.inference_mode():
        batch.map(len(images), look_at)
    return embeddings, probabilities


def averaging_factor(side: int) -> int:
    """By how much images of `side` pixels are averaged down: 1 below 64, else so that 32..63 pixels are left."""
    return 2 ** ((side // 32).bit_length() - 1) if side >= 64 else 1


def stored_fields(record: ClassifierRecipe | Architecture, later: set[str]) -> dict[str, Any]:
    """Fields of `record`; those of `later` only where they differ from their defaults.

    So a field can be added without another key, and another fingerprint, for the networks trained before it existed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(record)}
    values = dataclasses.asdict(record)
    return {name: v for name, v in values.items() if name not in later or v != defaults[name]}
