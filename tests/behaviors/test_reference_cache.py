"""Reference features on disk: found again by content, frozen statistics, damage, several processes, bounded memory."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tribute.behaviors import reference as module
from tribute.behaviors.base import GLOBAL_BEHAVIORS, Reference, get_behavior, measure_behaviors
from tribute.behaviors.features import Features
from tribute.data.tensors import array_sha256
from tribute.errors import BehaviorError
from tribute.types import Images


class Pixels:
    """Embeddings are pixels; counts the images that it saw."""

    name = "pixels"

    def __init__(self, fingerprint: str = "1" * 64) -> None:
        self.fingerprint = fingerprint
        self.seen: list[int] = []

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        self.seen.append(len(images))
        return Features(images, images.reshape(len(images), -1).astype(np.float32))


@pytest.fixture
def images(digits: tuple[Images, np.ndarray]) -> Images:
    return digits[0][:300]


def test_a_second_process_reads_and_measures_the_same(digits, classifier, images: Images, tmp_path: Path) -> None:
    behaviors = [get_behavior(name) for name in GLOBAL_BEHAVIORS]
    generated = digits[0][300:500]
    fresh = Reference.from_images(images, classifier)
    expected = measure_behaviors(generated, behaviors, extractor=classifier, reference=fresh)
    for _ in range(2):
        cached = Reference.cached(images, classifier, cache_dir=tmp_path)
        assert cached.fingerprint == fresh.fingerprint
        assert measure_behaviors(generated, behaviors, extractor=classifier, reference=cached) == expected


def test_features_are_extracted_once_per_extractor_and_images(images: Images, tmp_path: Path) -> None:
    first, again, other = Pixels(), Pixels(), Pixels("2" * 64)
    Reference.cached(images, first, cache_dir=tmp_path)
    found = Reference.cached(images, again, cache_dir=tmp_path, images_sha256=array_sha256(images))
    Reference.cached(images, other, cache_dir=tmp_path)
    Reference.cached(images[::-1], again, cache_dir=tmp_path)
    assert (first.seen, again.seen, other.seen) == ([300], [300], [300])
    np.testing.assert_array_equal(found.features.embeddings, images.reshape(300, -1))
    assert isinstance(found.features.embeddings, np.memmap) and not found.features.embeddings.flags.writeable


def test_the_file_is_one_that_safetensors_reads(images: Images, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    Reference.cached(images, Pixels(), cache_dir=tmp_path)
    (path,) = tmp_path.glob("*/embeddings.safetensors")
    np.testing.assert_array_equal(load_file(path)["embeddings"], images.reshape(300, -1))


def test_extraction_goes_block_by_block(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_IMAGES", 128)
    extractor = Pixels()
    found = Reference.cached(images, extractor, cache_dir=tmp_path)
    assert extractor.seen == [128, 128, 44]
    np.testing.assert_array_equal(found.features.embeddings, images.reshape(300, -1))


def test_statistics_are_frozen(images: Images, tmp_path: Path) -> None:
    def compute() -> dict[str, np.ndarray]:
        return {"sum": np.arange(3.0), "scalar": np.asarray(2.5)}

    first = Reference.cached(images, Pixels(), cache_dir=tmp_path).statistic("sums/3", compute)
    again = Reference.cached(images, Pixels(), cache_dir=tmp_path)
    for name, array in again.statistic("sums/3", lambda: pytest.fail("computed again")).items():
        np.testing.assert_array_equal(array, first[name])
    again.statistic("sums/4", compute)
    assert len(list(tmp_path.glob("*/statistics/*"))) == 2


@pytest.mark.parametrize("damaged", ["embeddings.safetensors", "facts.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_told_kept_aside_and_repaired(
    images: Images, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str, how: str
) -> None:
    Reference.cached(images, Pixels(), cache_dir=tmp_path)
    (path,) = tmp_path.glob(f"*/{damaged}")
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(content[:-9] if how == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    extractor = Pixels()
    with caplog.at_level(logging.WARNING):
        found = Reference.cached(images, extractor, cache_dir=tmp_path)
    assert extractor.seen == [300] and "made again" in caplog.text
    np.testing.assert_array_equal(found.features.embeddings, images.reshape(300, -1))
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_a_damaged_statistic_is_computed_again(images: Images, tmp_path: Path, caplog) -> None:
    reference = Reference.cached(images, Pixels(), cache_dir=tmp_path)
    reference.statistic("one", lambda: {"value": np.ones(1)})
    (path,) = tmp_path.glob("*/statistics/*/arrays.safetensors")
    path.write_bytes(b"")
    again = Reference.cached(images, Pixels(), cache_dir=tmp_path)
    assert again.statistic("one", lambda: {"value": np.full(1, 2.0)})["value"] == 2
    assert "made again" in caplog.text


def test_an_extractor_that_fails_leaves_nothing(images: Images, tmp_path: Path) -> None:
    class Failing(Pixels):
        def extract(self, images: Images, batch_size: int = 512) -> Features:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Reference.cached(images, Failing(), cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(Reference.cached(images, Pixels(), cache_dir=tmp_path).features) == 300


def test_a_folder_that_cannot_be_written_is_named(images: Images, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BehaviorError, match=r"cannot be kept in .*TRIBUTE_CACHE"):
        Reference.cached(images, Pixels(), cache_dir=tmp_path / "file" / "cache")


def test_statistics_that_cannot_be_written_stay_in_memory(images, tmp_path: Path, monkeypatch, caplog) -> None:
    def full(*_: object) -> bool:
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_artifact", full)
    reference = Reference.cached(images, Pixels(), cache_dir=tmp_path)
    assert reference.statistic("one", lambda: {"value": np.ones(1)})["value"] == 1
    assert reference.statistic("one", lambda: pytest.fail("computed again"))["value"] == 1
    assert "no space left" in caplog.text
