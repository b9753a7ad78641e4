"""The training set as one uint8 tensor, in memory or memory-mapped, gathered by index.

A tensor cache is a folder: `images.npy` and one `.npy` per column beside `manifest.json`, which holds shape,
dtype and SHA-256 of each and says where they come from. It is built beside its place and renamed when whole,
by one process at a time, and believed only if its content agrees with its manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tribute.data.contributors import ContributorTable
from tribute.data.known_hashes import KnownHashes
from tribute.errors import DataError
from tribute.files import room_sentence, write_whole_dir
from tribute.types import CoalitionMask, Images

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
HASH_CHUNK_BYTES = 16 * 2**20

CacheT = TypeVar("CacheT")
RowsT = TypeVar("RowsT", bound=npt.NDArray[Any])


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A training set, its contributors, and the real images that generated ones are measured against.

    Attributes:
        dataset: Name of the source.
        images: `(n_examples, height, width, channels)` uint8, read-only; perhaps memory-mapped, so take
            rows of it with `gather`.
        labels: `(n_examples,)` int64, indices into `label_names`.
        label_names: Name of each class.
        contributors: The owner of each example.
        reference_images: `(n_reference, height, width, channels)` uint8, read-only; the dataset's real
            images. The same as `images` unless what the contributors deliver was altered.
        reference_labels: `(n_reference,)` int64.
        fingerprint: SHA-256 over all of the above but the dataset's name; it does not depend on paths.
        manifest: What was read, as JSON: counts, shapes, hashes, contributors, origin.
    """

    dataset: str
    images: Images
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    contributors: ContributorTable
    reference_images: Images
    reference_labels: npt.NDArray[np.int64]
    fingerprint: str
    manifest: dict[str, Any]

    @property
    def n_examples(self) -> int:
        return len(self.images)

    def label_counts(self, coalition_mask: CoalitionMask) -> npt.NDArray[np.int64]:
        """`(n_labels,)`; a coalition's examples of each label, everyone's for the empty coalition."""
        present = coalition_mask if coalition_mask.any() else np.ones_like(coalition_mask)
        rows = self.contributors.examples_of(present)
        return np.bincount(self.labels[rows], minlength=len(self.label_names)).astype(np.int64)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, n_channels = self.images.shape[1:]
        return height, width, n_channels

    @classmethod
    def from_arrays(
        cls,
        dataset: str,
        images: Images,
        labels: npt.NDArray[np.int64],
        label_names: tuple[str, ...],
        contributors: ContributorTable,
        *,
        reference_images: Images | None = None,
        reference_labels: npt.NDArray[np.int64] | None = None,
        images_sha256: str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> TrainingData:
        """Check that the parts fit together, hash them, and describe them in a manifest.

        Args:
            dataset: Name of the source.
            images: `(n_examples, height, width, channels)` uint8 with 1 or 3 channels.
            labels: `(n_examples,)`, indices into `label_names`.
            label_names: Name of each class.
            contributors: The owner of each example.
            reference_images: Real images to measure against, `(n_reference, ...)` alike; `images` if None.
            reference_labels: Their labels; give both or neither.
            images_sha256: `array_sha256(images)` where it is known, to save reading a large memory map again.
            origin: Where the images come from, for the manifest only.

        Raises:
            DataError: Shapes, types, counts or labels do not fit together; the message names the part.
        """
        if (reference_images is None) != (reference_labels is None):
            raise DataError("reference: expected both images and labels or neither, found one of them")
        _check_images("images", images, labels, len(label_names))
        if len(contributors.contributor_of_example) != len(images):
            raise DataError(
                f"contributors: expected an owner for each of {len(images)} images, "
                f"found {len(contributors.contributor_of_example)}"
            )
        images = _read_only(images)
        hashes = {"images": images_sha256 or array_sha256(images), "labels": array_sha256(labels)}
        if reference_images is None or reference_labels is None:
            reference_images, reference_labels = images, labels
            hashes |= {"reference_images": hashes["images"], "reference_labels": hashes["labels"]}
        else:
            _check_images("reference images", reference_images, reference_labels, len(label_names))
            if reference_images.shape[1:] != images.shape[1:]:
                raise DataError(
                    f"reference images: expected shape {images.shape[1:]} like the training images, "
                    f"found {reference_images.shape[1:]}"
                )
            reference_images = _read_only(reference_images)
            hashes |= {
                "reference_images": array_sha256(reference_images),
                "reference_labels": array_sha256(reference_labels),
            }
        content = {
            "sha256": hashes,
            "label_names": list(label_names),
            "contributors": contributors.fingerprint,
        }
        fingerprint = _json_sha256(content)
        manifest = {
            "dataset": dataset,
            "fingerprint": fingerprint,
            "n_examples": len(images),
            "n_reference": len(reference_images),
            "image_shape": list(images.shape[1:]),
            "label_names": list(label_names),
            "contributors": {
                "fingerprint": contributors.fingerprint,
                "n_examples": dict(zip(contributors.names, contributors.n_examples.tolist(), strict=True)),
            },
            "sha256": hashes,
            "origin": dict(origin or {}),
        }
        return cls(
            dataset=dataset,
            images=images,
            labels=labels,
            label_names=tuple(label_names),
            contributors=contributors,
            reference_images=reference_images,
            reference_labels=reference_labels,
            fingerprint=fingerprint,
            manifest=manifest,
        )


def gather(images: RowsT, example_idx: npt.ArrayLike) -> RowsT:
    """Copy rows into memory, in the order given and with repeats; a memory map reads those rows only.

    Args:
        images: `(n_examples, ...)`, images or latents.
        example_idx: `(n_rows,)` integers.

    Returns:
        `(n_rows, ...)`, writable.

    Raises:
        DataError: An index is not an integer (a mask is not one), or not that of an example.
    """
    idx = np.asarray(example_idx)
    if idx.ndim != 1 or (idx.size and idx.dtype.kind not in "iu"):
        raise DataError(
            f"example_idx: expected one list of integers, found dtype {idx.dtype} and shape {idx.shape}; "
            "turn a coalition mask into rows with ContributorTable.examples_of"
        )
    if idx.size and not 0 <= idx.min() <= idx.max() < len(images):
        raise DataError(f"example_idx: expected 0 to {len(images) - 1}, found {idx.min()} to {idx.max()}")
    rows = images[idx.astype(np.int64)]
    release_pages(images)
    return rows  # pyright: ignore[reportReturnType]


def release_pages(images: npt.NDArray[Any]) -> None:
    """Give back the memory that pages of a memory map take after they were read; other arrays stay as they are.

    A page that was touched counts as memory of the process until the kernel needs it, so reading a cache through its
    map would in time show the size of the cache. Only the page table is emptied: the content stays in the kernel's
    cache of the file, and the next read finds it there.
    """
    mapped: Any = images
    while isinstance(mapped, np.ndarray):
        # In a map that may be written, the pages could hold what is nowhere else.
        if isinstance(mapped, np.memmap) and mapped.mode != "r":
            return
        mapped = mapped.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def array_sha256(array: npt.NDArray[Any]) -> str:
    """SHA-256 over dtype, shape and content in C order, read in chunks of 16 MiB."""
    digest = new_array_digest(array.dtype, array.shape)
    n_rows = max(1, HASH_CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), n_rows):
        digest.update(np.ascontiguousarray(array[start : start + n_rows]).tobytes())
        release_pages(array)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class TensorCache:
    """An opened cache: memory-mapped read-only `images`, `columns` in memory, and the `manifest`."""

    images: Images
    columns: dict[str, npt.NDArray[Any]]
    manifest: dict[str, Any]

    @property
    def images_sha256(self) -> str:
        return self.manifest["arrays"]["images"]["sha256"]

    @property
    def source(self) -> dict[str, Any]:
        return self.manifest["source"]


def write_tensor_cache(
    cache_dir: Path,
    batches: Iterable[Images],
    *,
    shape: tuple[int, int, int, int],
    columns: Mapping[str, npt.NDArray[Any]],
    source: Mapping[str, Any],
) -> None:
    """Write a cache in one pass, whole or not at all; only one batch is in memory at a time.

    Args:
        cache_dir: The folder to create, or to replace once the new one is whole.
        batches: `(n_rows, height, width, channels)` uint8 each; together `shape`.
        shape: Of all images.
        columns: `(n_examples,)` arrays to keep beside them, by name.
        source: What the images were made from, as JSON.

    Raises:
        DataError: The batches are not of that shape, or the folder cannot be written (a full disk). Nothing
            is left behind.
    """

    def write(folder: Path) -> None:
        arrays = {"images": _write_images(folder / "images.npy", batches, shape)}
        for name, column in columns.items():
            np.save(folder / f"{name}.npy", column, allow_pickle=False)
            arrays[name] = _describe(column, array_sha256(column))
        manifest = {"format": CACHE_FORMAT, "arrays": arrays, "source": dict(source)}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")

    try:
        write_whole_dir(cache_dir, write)
    except OSError as error:
        raise DataError(
            f"tensor cache {cache_dir}: cannot be written ({error}; {room_sentence(cache_dir)}); free some space or "
            "choose another folder"
        ) from error


def open_tensor_cache(cache_dir: Path) -> TensorCache:
    """Open a cache and check its content against its manifest.

    Reading every byte of 8 GB takes some seconds, so that it was done is remembered in `verified.json`, and the hash
    is trusted for as long as the file's size, times and inode stay what they were (`KnownHashes`). A copied or
    touched cache is read again, once.

    Raises:
        DataError: It is missing, unreadable, or not what its manifest says; the message names the array.
    """
    manifest, arrays = read_arrays(cache_dir, mapped="images")
    return TensorCache(arrays.pop("images"), arrays, manifest)


def read_arrays(cache_dir: Path, *, mapped: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Manifest and arrays of a cache, checked against each other; the array `mapped` stays on the disk.

    Raises:
        DataError: As `open_tensor_cache`.
    """
    try:
        manifest = json.loads((cache_dir / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != CACHE_FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {CACHE_FORMAT}")
        expected = manifest["arrays"]
        columns = {n: np.load(cache_dir / f"{n}.npy", allow_pickle=False) for n in expected if n != mapped}
        rows = np.load(cache_dir / f"{mapped}.npy", mmap_mode="r", allow_pickle=False)
        verified = KnownHashes(cache_dir / "verified.json", lambda _: array_sha256(rows))
        found = {mapped: _describe(rows, verified.hash_of(cache_dir / f"{mapped}.npy"))}
        found |= {name: _describe(array, array_sha256(array)) for name, array in columns.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(
            f"tensor cache {cache_dir}: expected a whole cache, found one that cannot be read "
            f"({type(error).__name__}: {error}); move it away and it is built again"
        ) from error
    for name in found:
        if found[name] != expected.get(name):
            raise DataError(
                f"tensor cache {cache_dir}: {name}.npy is not what its manifest says: expected "
                f"{expected.get(name)}, found {found[name]}; move the folder away and it is built again"
            )
    verified.save()
    return manifest, {mapped: rows, **columns}


def open_or_build_tensor_cache(cache_dir: Path, build: Callable[[Path], None]) -> TensorCache:
    """Open a cache of images, or build it first with `write_tensor_cache`: see `open_or_build`."""
    return open_or_build(cache_dir, open_tensor_cache, build)


def open_or_build(cache_dir: Path, open_cache: Callable[[Path], CacheT], build: Callable[[Path], None]) -> CacheT:
    """Open a cache, or build it first. Of several processes one builds and the others wait for it.

    A cache that is damaged is kept aside under another name and built again. What a killed process left
    half-written is removed.

    Args:
        cache_dir: Folder of the cache; its name should follow from the content of the source.
        open_cache: Opens a whole cache, or raises `DataError`.
        build: Creates `cache_dir`; its argument is a folder for temporary files.

    Raises:
        DataError: It cannot be built.
    """
    with suppress(DataError):  # needs neither the lock nor a writable folder
        return open_cache(cache_dir)

    from filelock import FileLock

    try:
        cache_dir.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir.with_name(f"{cache_dir.name}.lock")):
            if cache_dir.exists():
                try:
                    return open_cache(cache_dir)
                except DataError as damage:
                    logger.warning("%s; kept as %s", damage, _keep_aside(cache_dir).name)
            # The lock is held, so whoever made these is gone.
            for leftover in cache_dir.parent.glob(f".{cache_dir.name}.*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            place = {"prefix": f".{cache_dir.name}.", "suffix": ".partial", "dir": cache_dir.parent}
            with tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as scratch:
                build(Path(scratch))
    except OSError as error:
        raise DataError(
            f"tensor cache {cache_dir}: cannot be written ({error}; {room_sentence(cache_dir)}); free some space or "
            "choose another cache folder"
        ) from error
    return open_cache(cache_dir)


def _check_images(part: str, images: Images, labels: npt.NDArray[np.int64], n_labels: int) -> None:
    """Refuse arrays that are not images with one label each."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3) or not len(images):
        raise DataError(
            f"{part}: expected uint8 of shape (n, height, width, 1 or 3) with n > 0, "
            f"found {images.dtype} of shape {images.shape}"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(f"{part}: expected {len(images)} integer labels, found {labels.dtype} of shape {labels.shape}")
    if not 0 <= labels.min() <= labels.max() < n_labels:
        raise DataError(f"{part}: expected labels 0 to {n_labels - 1}, found {labels.min()} to {labels.max()}")


def _read_only(images: Images) -> Images:
    """A view that cannot be written through, like a memory map opened for reading."""
    view = images.view()
    view.setflags(write=False)
    return view


def _json_sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def new_array_digest(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """What `array_sha256` starts from; the bytes of the rows follow."""
    return hashlib.sha256(f"{dtype.str} {tuple(int(n) for n in shape)}\n".encode())


def _describe(array: npt.NDArray[Any], sha256: str) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.str, "sha256": sha256}


def _write_images(path: Path, batches: Iterable[Images], shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Write an `.npy` file batch by batch and return its description."""
    # Plain writes, not a writable memory map: on a full disk they raise, while the map kills the process.
    dtype = np.dtype(np.uint8)
    digest, n_written = new_array_digest(dtype, shape), 0
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            if batch.dtype != dtype or batch.shape[1:] != shape[1:]:
                raise DataError(
                    f"tensor cache: expected uint8 images of shape {shape[1:]}, "
                    f"found {batch.dtype} of shape {batch.shape[1:]}"
                )
            content = np.ascontiguousarray(batch).tobytes()
            file.write(content)
            digest.update(content)
            n_written += len(batch)
    if n_written != shape[0]:
        raise DataError(f"tensor cache: expected {shape[0]} images, found {n_written}")
    return {"shape": list(shape), "dtype": dtype.str, "sha256": digest.hexdigest()}


def _keep_aside(cache_dir: Path) -> Path:
    """Rename a damaged cache to the first free name."""
    attempt = 0
    while (aside := cache_dir.with_name(f"{cache_dir.name}.damaged-{attempt}")).exists():
        attempt += 1
    return cache_dir.rename(aside)
