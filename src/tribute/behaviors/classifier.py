"""The in-domain feature extractor: a small CNN trained once on a dataset's real images and labels.

For domains where an ImageNet network means nothing, and where nothing can be downloaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tribute.behaviors.features import Features, check_images, content_hash, read_artifact, write_artifact
from tribute.errors import BehaviorError, DataError
from tribute.seeding import numpy_stream, stream_seed, torch_stream
from tribute.types import Images

if TYPE_CHECKING:
    import torch
    from torch import nn

_log = logging.getLogger(__name__)


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
        weight_decay: Of AdamW.
        held_out_share: Share of each class that is kept for `held_out_accuracy`.
        version: Raised when the code of the network or of its training changes.
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

    def n_steps(self, n_train: int) -> int:
        """Optimizer updates for `n_train` images."""
        n_batches = max(1, n_train // self.batch_size)
        return min(max(self.n_epochs * n_batches, self.min_steps), self.max_steps)


DEFAULT_RECIPE = ClassifierRecipe()


@dataclass(frozen=True)
class _Architecture:
    """All that is needed, besides weights, to rebuild the classifier."""

    image_shape: tuple[int, int, int]
    n_classes: int
    embedding_width: int
    pixel_mean: tuple[float, ...]
    pixel_sd: tuple[float, ...]

    def build(self) -> nn.ModuleDict:
        """Pairs of 3x3 convolutions, halving the image down to 4..7 pixels; then the mean over pixels."""
        from torch import nn

        height, width, channels = self.image_shape
        side = min(height, width)
        layers: list[nn.Module] = []
        if side >= 64:  # averaged down to 32..63 pixels: enough to tell classes apart, and affordable on a CPU
            factor = 2 ** ((side // 32).bit_length() - 1)
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
        trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.ModuleDict({"trunk": trunk, "head": nn.Linear(self.embedding_width, self.n_classes)})

    def pixels(self, images: Images, device: str) -> torch.Tensor:
        """float32 `(n_images, channels, height, width)` with mean 0 and standard deviation 1 per channel."""
        import torch

        pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
        mean, sd = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.pixel_mean, self.pixel_sd))
        return (pixels - mean) / sd


class ClassifierExtractor:
    """In-domain features: pooled activations and class probabilities of a small CNN.

    Made by `train_or_load_classifier`.

    Attributes:
        name: `classifier`.
        fingerprint: SHA-256 of the weights and the architecture. Floating-point sums differ between machines
            and thread counts, so two trainings of one recipe need not agree: share the cache to share the
            network.
        label_names: Name of each class, in the order of the columns of `Features.probabilities`.
        held_out_accuracy: Share of `n_held_out` images, never trained on, that this very network labels
            rightly.
        n_held_out: Number of those images.
    """

    name = "classifier"

    def __init__(
        self,
        architecture: _Architecture,
        weights: Mapping[str, npt.NDArray[Any]],
        *,
        label_names: Sequence[str],
        held_out_accuracy: float,
        n_held_out: int,
        device: str,
    ) -> None:
        import torch

        self.label_names = tuple(label_names)
        self.held_out_accuracy = held_out_accuracy
        self.n_held_out = n_held_out
        parts = [part for name in sorted(weights) for part in (name, weights[name])]
        self.fingerprint = content_hash(json.dumps(asdict(architecture)), *parts)
        self._architecture = architecture
        self._device = device
        with torch.device("meta"):  # no initialisation, which would draw from the global generator
            self._network = architecture.build()
        state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        self._network.load_state_dict(state, assign=True)
        self._network.to(device).eval()

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        """Features of `images` `(n_images, *image_shape)`: embeddings `(n_images, 64)` and probabilities.

        Raises:
            BehaviorError: The images are not of the size that the classifier was trained on.
        """
        check_images(images)
        if images.shape[1:] != self._architecture.image_shape:
            raise BehaviorError(
                f"The classifier was trained on images of shape {self._architecture.image_shape}; found "
                f"{images.shape[1:]}. Measure images of the size of the training set, or train another "
                "classifier."
            )
        return Features(images, *self._forward(images, batch_size))

    def _forward(
        self, images: Images, batch_size: int = 512
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Embeddings and probabilities."""
        import torch

        embeddings = np.empty((len(images), self._architecture.embedding_width), np.float32)
        probabilities = np.empty((len(images), self._architecture.n_classes), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                embedded = self._network["trunk"](self._architecture.pixels(images[batch], self._device))
                embeddings[batch] = embedded.cpu().numpy()
                probabilities[batch] = self._network["head"](embedded).softmax(dim=1).cpu().numpy()
        return embeddings, probabilities


def train_or_load_classifier(
    images: Images,
    labels: npt.NDArray[np.integer[Any]],
    *,
    label_names: Sequence[str],
    cache_dir: Path | None,
    seed: int = 0,
    device: str = "cpu",
    recipe: ClassifierRecipe = DEFAULT_RECIPE,
) -> ClassifierExtractor:
    """Train the in-domain classifier on real images, or load it if it was trained before.

    A part of each class (`recipe.held_out_share`) is held out, and the network returned is the one whose
    accuracy was measured there. Everything random comes from named streams: on one machine, with one number
    of threads, the result is the same bit by bit, and the global random state is left alone.

    Args:
        images: `(n_images, height, width, 1 or 3)`, real and as the contributors' models should draw them;
            pass images that occur twice only once, or copies may leak into the held-out part.
        labels: `(n_images,)`, in `0..len(label_names) - 1`, each of them present.
        label_names: Name of each class.
        cache_dir: Trained networks are kept in `cache_dir/SHA-256 of images, labels, recipe and seed`; None
            keeps nothing. A damaged one is logged, moved aside and trained again.
        seed: Root seed of the held-out part, the initial weights, the order and the augmentation.
        device: Any torch device.
        recipe: How to train.

    Raises:
        BehaviorError: `images` is not uint8 of shape `(n_images, height, width, 1 or 3)`.
        DataError: The labels do not fit the images or the names, or there is too little to learn from.
    """
    check_images(images)
    labels = np.asarray(labels)
    _check_labels(images, labels, label_names)
    if cache_dir is None:
        architecture, weights, score = _train(images, labels.astype(np.int64), seed, device, recipe)
        return ClassifierExtractor(architecture, weights, label_names=label_names, device=device, **score)

    key = content_hash(images, labels.astype(np.int64), json.dumps(asdict(recipe)), str(seed))
    folder = cache_dir / key
    if folder.exists():
        try:
            return _load_classifier(folder, label_names, device)
        except BehaviorError as error:
            aside = folder.with_name(f"{key}.damaged-{uuid.uuid4().hex[:8]}")
            folder.rename(aside)
            _log.warning("%s It was moved to %s, and the classifier is trained again.", error, aside)
    architecture, weights, score = _train(images, labels.astype(np.int64), seed, device, recipe)
    write_artifact(folder, weights, {"architecture": asdict(architecture), **score})
    # Read back rather than used as trained: if another process was faster, all use its network.
    return _load_classifier(folder, label_names, device)


def _check_labels(images: Images, labels: npt.NDArray[Any], label_names: Sequence[str]) -> None:
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"The classifier needs one integer label for each of {len(images)} images; found {labels.dtype} "
            f"of shape {labels.shape}. Pass the labels of exactly these images."
        )
    counts = np.bincount(labels[labels >= 0].astype(np.int64), minlength=len(label_names))
    if (labels < 0).any() or len(counts) > len(label_names):
        raise DataError(
            f"Labels must lie in 0..{len(label_names) - 1}, the positions in label_names; found "
            f"{labels.min()}..{labels.max()}. Renumber the labels."
        )
    if len(label_names) < 2 or counts.min() < 2:
        scarce = [name for name, count in zip(label_names, counts, strict=True) if count < 2]
        raise DataError(
            f"The classifier needs at least 2 classes with at least 2 images each; found {len(label_names)} "
            f"classes, too few images of {scarce[:10]}. Drop those classes, or choose another feature "
            "extractor."
        )


def _load_classifier(folder: Path, label_names: Sequence[str], device: str) -> ClassifierExtractor:
    weights, facts = read_artifact(folder)
    stored = facts.pop("architecture")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    return ClassifierExtractor(_Architecture(**fields), weights, label_names=label_names, device=device, **facts)


def _train(
    images: Images, labels: npt.NDArray[np.int64], seed: int, device: str, recipe: ClassifierRecipe
) -> tuple[_Architecture, dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Train on all but the held-out part; returns architecture, weights, and the score on that part."""
    import torch
    from torch.nn import functional

    held_out = _held_out_mask(labels, recipe.held_out_share, seed)
    train_rows = np.flatnonzero(~held_out)
    mean, sd = _pixel_moments(images, train_rows)
    n_classes = int(labels.max()) + 1
    height, width, channels = images.shape[1:]
    architecture = _Architecture((height, width, channels), n_classes, recipe.embedding_width, mean, sd)
    with _forked_initialisation(stream_seed(seed, "behaviors/classifier/weights")):
        network = architecture.build().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    n_steps, batch_size = recipe.n_steps(len(train_rows)), min(recipe.batch_size, len(train_rows))
    n_batches, n_warm_up = len(train_rows) // batch_size, max(1, n_steps // 5)
    order = np.empty(0, np.int64)
    for step in range(n_steps):
        epoch, batch_idx = divmod(step, n_batches)
        if batch_idx == 0:
            order = numpy_stream(seed, "behaviors/classifier/order", epoch).permutation(train_rows)
        rows = np.sort(order[batch_idx * batch_size : (batch_idx + 1) * batch_size])
        pixels = _augment(architecture.pixels(images[rows], device), seed, step)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(
            (step + 1) / n_warm_up, (n_steps - step) / (n_steps - n_warm_up + 1)
        )
        logits = network["head"](network["trunk"](pixels))
        loss = functional.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    weights = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    held_rows = np.flatnonzero(held_out)
    scored = ClassifierExtractor(
        architecture, weights, label_names=(), held_out_accuracy=0.0, n_held_out=0, device=device
    )
    _, probabilities = scored._forward(images[held_rows])
    accuracy = float((probabilities.argmax(axis=1) == labels[held_rows]).mean())
    _log.info("Classifier trained in %d steps: accuracy %.4f on %d held out", n_steps, accuracy, len(held_rows))
    return architecture, weights, {"held_out_accuracy": accuracy, "n_held_out": len(held_rows)}


def _held_out_mask(labels: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """`(n_images,)`; True for `share` of each class, at least one image and never all."""
    held_out = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        n_held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
        stream = numpy_stream(seed, "behaviors/classifier/held_out", int(label))
        held_out[stream.permutation(rows)[:n_held_out]] = True
    return held_out


def _pixel_moments(images: Images, rows: npt.NDArray[np.intp]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over `rows`, read in blocks."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for block in np.array_split(rows, len(rows) // 1024 + 1):
        for channel in range(images.shape[3]):
            counts[channel] += np.bincount(images[block, :, :, channel].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ np.arange(256.0)
    variance = (shares * (np.arange(256.0) - mean[:, None]) ** 2).sum(axis=1)
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(variance, 1.0)).tolist())


def _augment(pixels: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Shift each image by up to an eighth of its size, repeating its edge; mirror half of the colour images.

    One channel usually means writing or scans, which have a handedness.
    """
    import torch
    from torch.nn import functional

    n_images, n_channels, height, width = pixels.shape
    stream = torch_stream(seed, "behaviors/classifier/augmentation", step)
    reach = (height // 8, width // 8)
    padded = functional.pad(pixels, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    top, left = (torch.randint(2 * r + 1, (n_images, 1), generator=stream) for r in reach)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (b, h), (b, w)
    if n_channels == 3:
        mirrored = torch.rand(n_images, 1, generator=stream) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(n_images)[:, None, None]
    shifted = padded[image, :, rows[:, :, None], columns[:, None, :]]  # (b, h, w, c)
    return shifted.permute(0, 3, 1, 2).contiguous()


@contextlib.contextmanager
def _forked_initialisation(seed: int) -> Iterator[None]:
    """Seed the initialisation of layers, which takes no generator; the global state is restored after."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also reseed every GPU
        yield
