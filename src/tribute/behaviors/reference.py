"""Real images as behaviors see them: features and statistics, computed once, kept on disk by content."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tribute.behaviors.features import (
    FeatureExtractor,
    Features,
    check_images,
    content_hash,
    read_artifact,
    write_artifact,
)
from tribute.data.tensors import array_sha256
from tribute.errors import BehaviorError, MixedResultsError
from tribute.files import remove_leftovers, room_sentence, sha256_of_file, write_whole_dir
from tribute.seeding import numpy_stream
from tribute.types import Images

_log = logging.getLogger(__name__)

Statistic = Mapping[str, npt.NDArray[Any]]
"""Named arrays that a behavior needs of the reference images."""

_BLOCK_IMAGES = 4096
"""Images whose features are in memory at a time while a cache is written."""


class Reference:
    """Features of the real images, and what behaviors computed from them once.

    Attributes:
        features: Of the real images.
        extractor_fingerprint: Of the extractor that made them.
        fingerprint: SHA-256 of the extractor's fingerprint and the images.
    """

    def __init__(
        self,
        features: Features,
        *,
        extractor_fingerprint: str,
        images_sha256: str | None = None,
        statistics_dir: Path | None = None,
    ) -> None:
        """Take features that are computed.

        Args:
            features: Of the real images.
            extractor_fingerprint: Of the extractor that made them.
            images_sha256: `array_sha256` of the images where it is known, to save reading them again.
            statistics_dir: Where statistics are kept for other processes; None keeps them in memory only.
        """
        self.features = features
        self.extractor_fingerprint = extractor_fingerprint
        self.fingerprint = content_hash(extractor_fingerprint, images_sha256 or array_sha256(features.images))
        self._statistics: dict[str, Statistic] = {}
        self._statistics_dir = statistics_dir

    @classmethod
    def from_images(cls, images: Images, extractor: FeatureExtractor, batch_size: int = 512) -> Reference:
        """Extract the features of the real `images`."""
        return cls(extractor.extract(images, batch_size), extractor_fingerprint=extractor.fingerprint)

    @classmethod
    def empty(cls, images: Images) -> Reference:
        """What behaviors get that compare with no real images; shapes are those of `images`."""
        return cls(Features(images[:0], np.empty((0, 0), np.float32)), extractor_fingerprint="")

    @classmethod
    def cached(
        cls, images: Images, extractor: FeatureExtractor, *, cache_dir: Path, images_sha256: str | None = None
    ) -> Reference:
        """Extract the features of the real `images`, or read those that an earlier process extracted.

        `cache_dir` gets one folder per extractor and images. It holds the embeddings, which are read as a memory map,
        and one folder per statistic. Of several processes one extracts and the others wait for it; what is damaged is
        logged, moved aside and made again.

        Args:
            images: `(n_images, height, width, channels)`.
            extractor: Called block by block, and only if nothing is found.
            cache_dir: Folder of all cached references.
            images_sha256: `array_sha256(images)` where it is known.

        Raises:
            BehaviorError: The features cannot be written, as on a full disk. Nothing is left behind.
        """
        check_images(images)
        images_sha256 = images_sha256 or array_sha256(images)
        folder = cache_dir / content_hash(extractor.fingerprint, images_sha256)
        return cls(
            Features(images, _open_or_extract(folder, images, extractor)),
            extractor_fingerprint=extractor.fingerprint,
            images_sha256=images_sha256,
            statistics_dir=folder / "statistics",
        )

    def statistic(self, name: str, compute: Callable[[], Statistic]) -> Statistic:
        """Named arrays, computed on the first call; `name` states every setting that they depend on."""
        if name not in self._statistics:
            self._statistics[name] = self._read_or_write(name, compute)
        return self._statistics[name]

    def _read_or_write(self, name: str, compute: Callable[[], Statistic]) -> Statistic:
        if self._statistics_dir is None:
            return {key: np.asarray(array) for key, array in compute().items()}
        folder = self._statistics_dir / content_hash(name)[:32]
        if folder.exists():
            try:
                return read_artifact(folder)[0]
            except BehaviorError as damage:
                _move_aside(folder, damage)
        arrays = {key: np.asarray(array) for key, array in compute().items()}
        try:
            write_artifact(folder, arrays, {"statistic": name})
            return read_artifact(folder)[0]  # if another process was faster, all use what it wrote
        except OSError as error:
            _log.warning("%s is not kept for later processes: %s", folder, error)
            return arrays

    def rows(self, max_rows: int) -> npt.NDArray[np.intp]:
        """Indices of at most `max_rows` reference images: all, or a subset that is always the same."""
        return fixed_rows(len(self.features), max_rows)

    def save(self, folder: Path) -> str:
        """Freeze features (without the images) and all statistics computed so far in a new folder.

        Returns:
            SHA-256 of what is frozen.

        Raises:
            BehaviorError: `folder` exists.
        """
        arrays = {"embeddings": self.features.embeddings}
        if self.features.probabilities is not None:
            arrays["probabilities"] = self.features.probabilities
        for name, statistic in self._statistics.items():
            arrays |= {f"{name}:{key}": array for key, array in statistic.items()}
        frozen = content_hash(*(part for name in sorted(arrays) for part in (name, arrays[name])))
        facts = {"fingerprint": self.fingerprint, "extractor": self.extractor_fingerprint, "frozen": frozen}
        if not write_artifact(folder, arrays, facts):
            raise BehaviorError(f"{folder} exists; a frozen reference is never overwritten. Choose another folder.")
        return frozen

    @classmethod
    def load(cls, folder: Path, images: Images) -> Reference:
        """Read what `save` froze; `images` are the real images that it was made of.

        Raises:
            BehaviorError: The folder is missing or damaged.
            MixedResultsError: It was made of other images.
        """
        arrays, facts = read_artifact(folder)
        if "embeddings" not in arrays:
            raise BehaviorError(f"{folder} is no frozen reference. Name a folder that Reference.save wrote.")
        embeddings, probabilities = arrays.pop("embeddings"), arrays.pop("probabilities", None)
        if len(embeddings) != len(images):
            found = f"{len(images)} images, frozen with {len(embeddings)}"
        else:
            reference = cls(Features(images, embeddings, probabilities), extractor_fingerprint=facts["extractor"])
            found = f"fingerprint {reference.fingerprint[:12]}, frozen with {facts['fingerprint'][:12]}"
            if reference.fingerprint == facts["fingerprint"]:
                statistics: dict[str, dict[str, npt.NDArray[Any]]] = {}
                for name, array in arrays.items():
                    statistic, _, key = name.rpartition(":")
                    statistics.setdefault(statistic, {})[key] = array
                reference._statistics.update(statistics)
                return reference
        raise MixedResultsError(
            f"The reference in {folder} was frozen for other real images: found {found}. "
            f"Give the same images in the same order, or another folder."
        )


def is_reference_cached(extractor: FeatureExtractor, *, cache_dir: Path, images_sha256: str) -> bool:
    """Whether `Reference.cached` would find the features of these real images."""
    return (cache_dir / content_hash(extractor.fingerprint, images_sha256)).exists()


def fixed_rows(n_images: int, max_rows: int) -> npt.NDArray[np.intp]:
    """Indices of at most `max_rows` of `n_images` images, sorted: all, or a draw that is always the same."""
    if n_images <= max_rows:
        return np.arange(n_images)
    stream = numpy_stream(0, "behaviors/reference/rows", n_images, max_rows)
    return np.sort(stream.choice(n_images, max_rows, replace=False))


def _open_or_extract(folder: Path, images: Images, extractor: FeatureExtractor) -> npt.NDArray[np.float32]:
    """Memory map of the embeddings in `folder`, extracted first if they are not there or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _read_embeddings(folder, len(images))  # needs neither the lock nor a writable folder

    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.exists():
                try:
                    return _read_embeddings(folder, len(images))  # another process made them meanwhile
                except (OSError, ValueError, KeyError, TypeError) as damage:
                    _move_aside(folder, damage)
            remove_leftovers(folder.parent, of=folder)
            write_whole_dir(folder, lambda partial: _write_embeddings(partial, images, extractor))
            return _read_embeddings(folder, len(images))
    except OSError as error:
        raise BehaviorError(
            f"Features of the real images cannot be kept in {folder} ({error}; {room_sentence(folder)}). Free some "
            "space, or choose another folder with the environment variable TRIBUTE_CACHE."
        ) from error


def _write_embeddings(folder: Path, images: Images, extractor: FeatureExtractor) -> None:
    """Extract block by block into `embeddings.safetensors`, so that memory holds one block."""
    path = folder / "embeddings.safetensors"
    with path.open("wb") as file:
        for block in _embedded_blocks(images, extractor):
            if not file.tell():
                file.write(_safetensors_header((len(images), block.shape[1])))
            file.write(np.ascontiguousarray(block, np.float32).data)
    (folder / "facts.json").write_text(json.dumps({"embeddings_sha256": sha256_of_file(path)}), encoding="utf-8")


def _embedded_blocks(images: Images, extractor: FeatureExtractor) -> Iterator[npt.NDArray[np.float32]]:
    return (
        extractor.extract(images[start : start + _BLOCK_IMAGES]).embeddings
        for start in range(0, len(images), _BLOCK_IMAGES)
    )


def _safetensors_header(shape: tuple[int, int]) -> bytes:
    """Start of a safetensors file with one float32 array, `embeddings`; its length is a multiple of 8."""
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * shape[0] * shape[1]]}
    text = json.dumps({"embeddings": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_embeddings(folder: Path, n_images: int) -> npt.NDArray[np.float32]:
    """Memory map of what `_write_embeddings` wrote, checked against its hash.

    Raises:
        ValueError, OSError, KeyError: It is damaged.
    """
    path = folder / "embeddings.safetensors"
    expected = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["embeddings_sha256"]
    if (found := sha256_of_file(path)) != expected:
        raise ValueError(f"{path.name} should have SHA-256 {expected[:12]}, found {found[:12]}")
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        shape = tuple(json.loads(file.read(n_header))["embeddings"]["shape"])
    if shape[0] != n_images:
        raise ValueError(f"{path.name} holds {shape[0]} rows for {n_images} images")
    return np.memmap(path, np.float32, mode="r", offset=8 + n_header, shape=shape)


def _move_aside(folder: Path, damage: Exception) -> None:
    aside = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}")
    folder.rename(aside)
    _log.warning("%s: %s It was moved to %s, and is made again.", folder, damage, aside)
