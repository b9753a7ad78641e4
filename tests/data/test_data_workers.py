"""Decoding in several processes gives what one gives, in order, and says what went wrong."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from tribute.data import image_workers
from tribute.data.decoding import ImageRule
from tribute.data.image_workers import Encoded, process_images
from tribute.errors import DataError
from tribute.seeding import numpy_stream

N_IMAGES = 40
PIXELS = numpy_stream(0, "test.workers").integers(0, 256, (N_IMAGES, 12, 9, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> list[Encoded]:
    """Images, a broken one and one that could not be read, in many small batches."""
    monkeypatch.setattr(image_workers, "MAX_BATCH_IMAGES", 3)
    monkeypatch.setattr(image_workers, "MIN_IMAGES_TO_START", 0)
    items: list[Encoded] = [encoded(pixels) for pixels in PIXELS]
    items[7], items[11] = b"broken", DataError("no such file")
    return items


@pytest.mark.parametrize("rule", [ImageRule(8), None])
def test_the_number_of_processes_changes_nothing(images: list[Encoded], rule: ImageRule | None) -> None:
    def results(n_workers: int) -> tuple[bytes, list[dict[int, str]]]:
        answers = list(process_images(images, N_IMAGES, rule, n_workers=n_workers))
        return np.concatenate([answer.array for answer in answers]).tobytes(), [answer.failures for answer in answers]

    one, three = results(1), results(3)
    assert one == three
    assert "cannot be decoded" in one[1][2][1] and one[1][3] == {2: "no such file"}
    assert sum(map(len, one[1])) == 2


def test_reading_stays_a_few_batches_ahead(images: list[Encoded]) -> None:
    read: list[int] = []
    answers = process_images(
        (read.append(i) or item for i, item in enumerate(images)), N_IMAGES, ImageRule(8), n_workers=2
    )
    next(answers)
    assert len(read) <= 3 * (2 * 2 + 2)
    answers.close()


def test_a_process_that_dies_is_an_error(images: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(DataError, match="ended early"):
        list(process_images(images, N_IMAGES, ImageRule(8), n_workers=2))
