"""Exact and near duplicates, against a search that compares all pairs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tribute.data.duplicates import MAX_DISTANCE, find_duplicates
from tribute.data.examination import examine_image
from tribute.seeding import numpy_stream


def scene(seed: int) -> Image.Image:
    """Smooth colours, as photographs have them."""
    noise = numpy_stream(seed, "test.scene").integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))


def record(image: Image.Image, kind: str = "PNG", **options: Any) -> Any:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return examine_image(buffer.getvalue())


def find(records: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
    table = np.stack(records)
    found = find_duplicates(table["pixels_sha256"], table["perceptual_hash"], table["thumbnail"])
    return [group.tolist() for group in found.exact], found.near.tolist()


def test_copies_are_found_whatever_became_of_them() -> None:
    scenes = [scene(seed) for seed in range(30)]
    records = [record(image) for image in scenes]
    records.append(record(scenes[3], "TIFF"))  # 30: another format, the same pixels
    records.append(record(scenes[5], "JPEG", quality=60))
    records.append(record(scenes[7].resize((40, 40), Image.Resampling.BICUBIC)))
    records.append(record(Image.eval(scenes[9], lambda level: min(255, level + 12))))
    assert find(records) == ([[3, 30]], [[5, 31], [7, 32], [9, 33]])


def test_flat_images_of_different_colours_are_not_the_same() -> None:
    black, white = Image.new("RGB", (20, 20)), Image.new("RGB", (20, 20), "white")
    half = Image.new("RGB", (20, 20))
    half.paste("white", (0, 0, 20, 10))
    assert find([record(black), record(half), record(black)]) == ([[0, 2]], [])
    assert find([record(black), record(white)])[0] == []


def test_the_bands_find_what_comparing_all_pairs_finds() -> None:
    stream = numpy_stream(0, "test.bands")
    bits = stream.integers(0, 2, (300, 128), dtype=np.uint8)
    for i in range(150):  # every other one: a copy with 0 to 14 bits flipped
        bits[2 * i + 1] = bits[2 * i]
        bits[2 * i + 1, stream.permutation(128)[: i % 15]] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64)
    keys = np.arange(300, dtype=np.uint64).repeat(2).view(np.uint8).reshape(300, 16)
    near = find_duplicates(keys, hashes, np.zeros((300, 8, 8, 3), np.uint8)).near
    distance = (bits[:, None] != bits[None]).sum(axis=2)
    first, second = np.nonzero(np.triu(distance <= MAX_DISTANCE, k=1))
    assert near.tolist() == np.stack([first, second], axis=1).tolist() and len(near) == 100
    with pytest.raises(ValueError, match="expected 0 to 9, found 10"):
        find_duplicates(keys, hashes, np.zeros((300, 8, 8, 3), np.uint8), max_distance=10)
