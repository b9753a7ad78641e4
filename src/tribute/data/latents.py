"""Latents of a training set: encoded once, block by block, into a memory-mapped cache that can be resumed.

A cache is a folder `IMAGES-CODEC` named by the hashes of what it was made from, with `latents.npy` and a
`manifest.json`. While it is being built, the folder has another name and a file `progress.jsonl` with one line per
block: its rows and the SHA-256 of their bytes. A process that continues checks those bytes, drops what follows them,
and encodes the rest; blocks always begin at the same rows, so the result is that of a process that was never stopped.

Latents are float32. In float16 they would be off by up to 2**-11 of their value, for values about 1 an eightieth of
the least noise that training on CelebA-HQ adds; but float32 latents of a codec of factor 4 take a quarter of the room
of the uint8 images that are kept beside them, and then training sees exactly what the codec gave.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tribute import pulse
from tribute.data.tensors import CACHE_FORMAT, gather, new_array_digest, open_or_build, read_arrays
from tribute.errors import DataError, MixedResultsError
from tribute.files import write_whole
from tribute.types import Images, Latents

logger = logging.getLogger(__name__)

BLOCK_ROWS = 64
"""Images per record of progress: what a killed process loses at most."""

_DTYPE = np.dtype(np.float32)


@dataclass(frozen=True)
class LatentSource:
    """What latents are made from; written into the manifest of their cache.

    Attributes:
        dataset: Its name, for messages only.
        images_sha256: `array_sha256` of the images.
        image_shape: Height, width, channels of an image.
        codec: What the codec is, as JSON; its `fingerprint` is None where its files are not at hand.
    """

    dataset: str
    images_sha256: str
    image_shape: tuple[int, int, int]
    codec: dict[str, Any]

    @property
    def folder_name(self) -> str:
        """The name that follows from the content; only for a known codec."""
        return f"{self.images_sha256[:16]}-{self.codec['fingerprint'][:16]}"

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "dataset": self.dataset,
            "images_sha256": self.images_sha256,
            "image_shape": list(self.image_shape),
            "codec": self.codec,
        }


@dataclass(frozen=True, eq=False)
class LatentCache:
    """An opened cache.

    Attributes:
        latents: `(n_images, channels, height, width)` float32, memory-mapped and read-only.
        source: What it was made from, as `LatentSource.describe` wrote it.
        path: Its folder.
    """

    latents: Latents
    source: dict[str, Any]
    path: Path


def open_latents(cache_dir: Path) -> LatentCache:
    """Open a cache and check its content against its manifest, which reads every byte once.

    Raises:
        DataError: It is missing, unreadable, or not what its manifest says.
    """
    manifest, arrays = read_arrays(cache_dir, mapped="latents")
    return LatentCache(arrays["latents"], manifest["source"], cache_dir)


def encode_or_open(
    folder: Path,
    source: LatentSource,
    images: Images,
    encode: Callable[[Images], Latents],
    latent_shape: tuple[int, int, int],
    *,
    on_block: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Open the latents of images, or encode them first. Of several processes one encodes and the others wait.

    Args:
        folder: Where caches of latents are kept.
        source: What they are made from, the fingerprint of the codec included.
        images: `(n_images, height, width, channels)`, perhaps memory-mapped.
        encode: From `(n, height, width, channels)` images to `(n, *latent_shape)`.
        latent_shape: Channels, height and width of a latent as it is stored.
        on_block: Called with the images done and the images to do, first with what an earlier process had done.

    Raises:
        DataError: They cannot be written (a full disk); what was encoded is kept and continued.
    """
    cache_dir = folder / source.folder_name

    def build(_: Path) -> None:
        _encode_into(cache_dir, source, images, encode, latent_shape, on_block)

    return open_or_build(cache_dir, open_latents, build)


def find_latents(folder: Path, source: LatentSource) -> LatentCache:
    """Open the latents of images where they must be there already, without the codec.

    Where the fingerprint of the codec is not known, its place and scaling are compared instead.

    Raises:
        DataError: There are none of this dataset.
        MixedResultsError: There are some, but of another codec, other images or another size; it shows both.
    """
    caches = [(path.parent, _source_of(path.parent)) for path in sorted(folder.glob("[!.]*/manifest.json"))]
    caches = [(path, found) for path, found in caches if found]
    fitting = [path for path, found in caches if not _differences(source, found)]
    if len(fitting) > 1:  # only where the fingerprint is not known
        raise MixedResultsError(
            f"--precompute_stage reuse: expected one cache for the codec {source.codec['path']}, found {len(fitting)}, "
            f"of different codecs: {', '.join(path.name for path in fitting)} in {folder}. Give the codec's files by "
            "--codec PATH, so that the right one can be told"
        )
    if fitting:
        return open_latents(fitting[0])
    alike = [(path, found) for path, found in caches if found.get("dataset") == source.dataset] or caches
    if not alike:
        raise DataError(
            f"--precompute_stage reuse: expected latents of {source.dataset!r} below {folder}, found none; encode the "
            "images first by the same command with --precompute_stage save"
        )
    path, found = min(alike, key=lambda item: len(_differences(source, item[1])))
    raise MixedResultsError(
        f"--precompute_stage reuse: the latents in {path} were made from something else: "
        f"{'; '.join(_differences(source, found))}. Give what they were made from, or encode these images first with "
        "--precompute_stage save"
    )


def _source_of(cache_dir: Path) -> dict[str, Any]:
    """What a cache says it was made from; empty where it cannot be read."""
    try:
        return dict(json.loads((cache_dir / "manifest.json").read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _differences(asked: LatentSource, found: dict[str, Any]) -> list[str]:
    """What keeps a cache from being the one asked for, as `name: cached X, asked Y`."""
    names = ("image_shape", "images_sha256")
    pairs = [(name, found.get(name), asked.describe()[name]) for name in names]
    cached = found.get("codec", {})
    known = asked.codec["fingerprint"] is not None
    codec_names = ("fingerprint",) if known else [name for name in asked.codec if name != "fingerprint"]
    pairs += [(f"codec {name}", cached.get(name), asked.codec[name]) for name in codec_names]
    lines = [f"{name}: cached {left!r}, asked {right!r}" for name, left, right in pairs if left != right]
    if lines and found.get("dataset") != asked.dataset:
        lines.insert(0, f"dataset: cached {found.get('dataset')!r}, asked {asked.dataset!r}")
    return lines


def _encode_into(
    cache_dir: Path,
    source: LatentSource,
    images: Images,
    encode: Callable[[Images], Latents],
    latent_shape: tuple[int, int, int],
    on_block: Callable[[int, int], None] | None,
) -> None:
    """Encode what an earlier process left, then give the folder its name. The caller holds the lock."""
    unfinished = cache_dir.with_name(f".{cache_dir.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    shape = (len(images), *latent_shape)
    digest = new_array_digest(_DTYPE, shape)
    progress = unfinished / "progress.jsonl"
    with _opened(unfinished / "latents.npy") as file:
        n_done = _keep_what_is_whole(file, progress, shape, digest.update)
        if on_block is not None:
            on_block(n_done, len(images))
        for start in range(n_done, len(images), BLOCK_ROWS):
            pulse.beat()
            block = gather(images, np.arange(start, min(start + BLOCK_ROWS, len(images))))
            content = _as_bytes(encode(block), (len(block), *latent_shape))
            file.write(content)
            _flush(file)
            _record(progress, len(block), content)
            digest.update(content)
            if on_block is not None:
                on_block(start + len(block), len(images))
    arrays = {"latents": {"shape": list(shape), "dtype": _DTYPE.str, "sha256": digest.hexdigest()}}
    manifest = {"format": CACHE_FORMAT, "arrays": arrays, "source": source.describe()}
    write_whole(unfinished / "manifest.json", json.dumps(manifest, indent=2))
    progress.unlink()
    unfinished.replace(cache_dir)


def _opened(path: Path) -> BinaryIO:
    """For reading and writing, as it was left or empty."""
    path.touch()
    return path.open("rb+")


def _keep_what_is_whole(
    file: BinaryIO, progress: Path, shape: tuple[int, ...], update_digest: Callable[[bytes], None]
) -> int:
    """Leave the file with its header and the blocks that are as recorded; returns the rows that it then has."""
    row_bytes = int(np.prod(shape[1:])) * _DTYPE.itemsize
    header = {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    end, n_done, whole = file.tell(), 0, []
    for record in _records(progress):
        content = file.read(record["rows"] * row_bytes)
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            break
        update_digest(content)
        end, n_done = end + len(content), n_done + record["rows"]
        whole.append(json.dumps(record))
    file.seek(end)
    file.truncate()
    write_whole(progress, "".join(f"{line}\n" for line in whole))
    if n_done:
        logger.info("continuing after %d of %d encoded images", n_done, shape[0])
    return n_done


def _records(progress: Path) -> Iterator[dict[str, Any]]:
    """Recorded blocks in order, up to a line that was not finished."""
    if not progress.exists():
        return
    for line in progress.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            return
        yield record


def _record(progress: Path, n_rows: int, content: bytes) -> None:
    """Add a line about a block that is on the disk."""
    sha256 = hashlib.sha256(content).hexdigest()
    with progress.open("ab") as file:
        file.write(json.dumps({"rows": n_rows, "sha256": sha256}).encode() + b"\n")
        _flush(file)


def _flush(file: BinaryIO) -> None:
    """Wait until it is on the disk: a record must not overtake what it is about."""
    file.flush()
    os.fsync(file.fileno())


def _as_bytes(latents: Latents, expected: tuple[int, ...]) -> bytes:
    if latents.shape != expected or latents.dtype != _DTYPE:
        raise DataError(f"codec: expected float32 latents of shape {expected}, found {latents.dtype} {latents.shape}")
    if not np.isfinite(latents).all():
        raise DataError("codec: expected finite latents, found infinite ones or NaN; check its weights")
    return np.ascontiguousarray(latents).tobytes()
