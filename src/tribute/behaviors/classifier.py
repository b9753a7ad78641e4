"""The in-domain feature extractor: a small CNN trained once on a dataset's real images and labels.

For domains where an ImageNet network means nothing, and where nothing can be downloaded.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tribute.behaviors.classifier_networks import BATCH_IMAGES, Architecture, ClassifierRecipe, forward, recipe_for
from tribute.behaviors.classifier_training import train_classifier
from tribute.behaviors.features import (
    Features,
    check_images,
    content_hash,
    features_batch,
    read_artifact,
    write_artifact,
)
from tribute.errors import BehaviorError, DataError
from tribute.files import room_sentence
from tribute.types import Images

_log = logging.getLogger(__name__)


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
        architecture: Architecture,
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
        self.fingerprint = content_hash(json.dumps(architecture.identity), *parts)
        self._architecture = architecture
        self._device = device
        self._batch = features_batch(BATCH_IMAGES)
        with torch.device("meta"):  # no initialisation, which would draw from the global generator
            self._network = architecture.build()
        state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        self._network.load_state_dict(state, assign=True)
        self._network.to(device).eval()

    def extract(self, images: Images, batch_size: int | None = None) -> Features:
        """Features of `images` `(n_images, *image_shape)`: embeddings `(n_images, n_dims)` and probabilities.

        Raises:
            BehaviorError: The images are not of the size that the classifier was trained on.
            OutOfMemory: Not even one image fits into memory.
        """
        check_images(images)
        if images.shape[1:] != self._architecture.image_shape:
            raise BehaviorError(
                f"The classifier was trained on images of shape {self._architecture.image_shape}; found "
                f"{images.shape[1:]}. Measure images of the size of the training set, or train another "
                "classifier."
            )
        batch = self._batch if batch_size is None else features_batch(batch_size)
        return Features(images, *forward(self._network, self._architecture, images, self._device, batch))


def train_or_load_classifier(
    images: Images,
    labels: npt.NDArray[np.integer[Any]],
    *,
    label_names: Sequence[str],
    cache_dir: Path | None,
    seed: int = 0,
    device: str = "cpu",
    recipe: ClassifierRecipe | None = None,
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
        recipe: How to train; `recipe_for` chooses if None.

    Raises:
        BehaviorError: `images` is not uint8 of shape `(n_images, height, width, 1 or 3)`; or the network cannot be
            written, as on a full disk.
        DataError: The labels do not fit the images or the names, or there is too little to learn from.
    """
    check_images(images)
    labels = np.asarray(labels)
    _check_labels(images, labels, label_names)
    recipe = recipe or recipe_for(images.shape[1:], len(images))
    if cache_dir is None:
        architecture, weights, score = train_classifier(images, labels.astype(np.int64), seed, device, recipe)
        return ClassifierExtractor(architecture, weights, label_names=label_names, device=device, **score)

    key = _cache_key(images, labels, recipe, seed)
    folder = cache_dir / key
    if folder.exists():
        try:
            return _load_classifier(folder, label_names, device)
        except BehaviorError as error:
            aside = folder.with_name(f"{key}.damaged-{uuid.uuid4().hex[:8]}")
            folder.rename(aside)
            _log.warning("%s It was moved to %s, and the classifier is trained again.", error, aside)
    architecture, weights, score = train_classifier(images, labels.astype(np.int64), seed, device, recipe)
    try:
        write_artifact(folder, weights, {"architecture": architecture.identity, **score})
    except OSError as error:
        room = room_sentence(folder, sum(array.nbytes for array in weights.values()))
        raise BehaviorError(
            f"The classifier cannot be kept in {folder} ({error}; {room}). Free some space, or choose another folder "
            "with the environment variable TRIBUTE_CACHE, and run the same command again."
        ) from error
    # Read back rather than used as trained: if another process was faster, all use its network.
    return _load_classifier(folder, label_names, device)


def is_classifier_cached(
    images: Images, labels: npt.NDArray[np.integer[Any]], *, cache_dir: Path, seed: int = 0
) -> bool:
    """Whether `train_or_load_classifier` would find a network for these images."""
    return (cache_dir / _cache_key(images, labels, recipe_for(images.shape[1:], len(images)), seed)).exists()


def _cache_key(images: Images, labels: npt.NDArray[np.integer[Any]], recipe: ClassifierRecipe, seed: int) -> str:
    return content_hash(images, labels.astype(np.int64), json.dumps(recipe.identity), str(seed))


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
    architecture = Architecture.from_stored(facts.pop("architecture"))
    return ClassifierExtractor(architecture, weights, label_names=label_names, device=device, **facts)
