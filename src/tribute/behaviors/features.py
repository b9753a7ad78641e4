"""What behaviors see of images: pixels, embeddings and class probabilities, from one batched pass.

Also what extractors share: checks of images, hashes, and artifacts on disk. `classifier.py` holds the in-domain
extractor; others implement `FeatureExtractor`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tribute.data.tensors import release_pages
from tribute.errors import BehaviorError
from tribute.files import remove_leftovers, unfinished_path
from tribute.memory import FittingBatch
from tribute.types import Images


@dataclass(frozen=True)
class Features:
    """Images with what an extractor says about them.

    Attributes:
        images: `(n_images, height, width, channels)`.
        embeddings: `(n_images, n_dims)`, finite.
        probabilities: `(n_images, n_classes)`, rows sum to 1; None if the extractor is no classifier.

    Raises:
        BehaviorError: The lengths differ, or an embedding or probability is not finite.
    """

    images: Images
    embeddings: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for what in ("embeddings", "probabilities"):
            rows = getattr(self, what)
            if rows is None:
                continue
            if rows.ndim != 2 or len(rows) != len(self.images):
                raise BehaviorError(
                    f"Features need {what} of shape (n_images, width), one row for each of "
                    f"{len(self.images)} images; found {rows.shape}. Correct the feature extractor."
                )
            if not np.isfinite(rows).all():
                bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
                raise BehaviorError(
                    f"Features need finite {what}; image {bad} has NaN or infinity. "
                    f"Look at that image and at the weights of the feature extractor."
                )

    def __len__(self) -> int:
        return len(self.images)


class FeatureExtractor(Protocol):
    """Turns images into `Features`; deterministic, and row i depends on image i only."""

    @property
    def name(self) -> str:
        """Which network it is, e.g. `classifier`."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the architecture: equal values mean comparable features."""
        ...

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        """Features of `images`, computed `batch_size` at a time."""
        ...


class KnownFeatures:
    """Stands in for an extractor where the features of the images are known."""

    def __init__(self, extractor: FeatureExtractor, features: Features) -> None:
        self.name, self.fingerprint = extractor.name, extractor.fingerprint
        self.features = features

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        """The features, whatever the images."""
        return self.features


def check_images(images: Images) -> None:
    """Check that `images` is `(n_images, height, width, 1 or 3)` in uint8.

    Raises:
        BehaviorError: It is not.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise BehaviorError(
            f"Images must be uint8 of shape (n_images, height, width, 1 or 3); found {images.dtype} of shape "
            f"{images.shape}. Scale to 0..255, move the channels last and convert."
        )


def features_batch(batch_size: int) -> FittingBatch:
    """How many images an extractor looks at at once: as many as asked for while they fit into memory."""
    return FittingBatch(
        batch_size, "features of images", setting="Use a device with more memory, or another feature extractor"
    )


def content_hash(*parts: npt.NDArray[Any] | str) -> str:
    """SHA-256 of arrays and strings, with dtypes and shapes; memory-mapped arrays are read in blocks."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"\x1estr\x1f{part}\x1f".encode())
            continue
        digest.update(f"\x1e{part.dtype.str}\x1f{part.shape}\x1f".encode())
        rows = part.reshape(1) if part.ndim == 0 else part
        n_rows = max(1, 2**24 * len(rows) // max(1, rows.nbytes))
        for start in range(0, len(rows), n_rows):
            digest.update(np.ascontiguousarray(rows[start : start + n_rows]).data)
            release_pages(rows)
    return digest.hexdigest()


def write_artifact(folder: Path, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> bool:
    """Write arrays (safetensors) and facts (JSON) with their hashes into a new folder, whole or not at all.

    Returns:
        False if `folder` exists already, perhaps since another process was faster; it is left as it is.
    """
    from safetensors.numpy import save

    folder.parent.mkdir(parents=True, exist_ok=True)
    payload = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    record = {"facts": facts, "facts_sha256": _facts_hash(facts)}
    record["arrays_sha256"] = hashlib.sha256(payload).hexdigest()
    remove_leftovers(folder.parent, of=folder)
    beside = unfinished_path(folder)
    beside.mkdir()
    try:
        (beside / "arrays.safetensors").write_bytes(payload)
        (beside / "facts.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        try:
            beside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            return False
        return True
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_artifact(folder: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write_artifact` wrote; nothing is unpickled.

    Returns:
        Writable arrays by name, and the facts.

    Raises:
        BehaviorError: A file is missing, is not what it should be, or does not have its recorded hash.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        record = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        payload = (folder / "arrays.safetensors").read_bytes()
        facts = record["facts"]
        for what, expected, found in (
            ("arrays.safetensors", record["arrays_sha256"], hashlib.sha256(payload).hexdigest()),
            ("the facts in facts.json", record["facts_sha256"], _facts_hash(facts)),
        ):
            if expected != found:
                raise ValueError(f"{what} should have SHA-256 {expected[:12]}, found {found[:12]}")
        arrays = {name: array.copy() for name, array in load(payload).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BehaviorError(
            f"{folder} is damaged: {type(error).__name__}: {error}. Remove the folder, and it is made again."
        ) from error
    return arrays, facts


def _facts_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
