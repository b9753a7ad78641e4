"""The cache of latents: whole whenever it is believed, continued after any death, and never another's."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tribute.data import latents as latents_module
from tribute.data.latents import LatentCache, LatentSource, encode_or_open, find_latents, open_latents
from tribute.data.tensors import array_sha256
from tribute.errors import DataError, MixedResultsError
from tribute.types import Images, Latents

SHAPE = (2, 4, 4)


def encode(images: Images) -> Latents:
    """Stands for a codec: numbers that depend on each image alone."""
    sums = images.reshape(len(images), -1).astype(np.float32).sum(axis=1)
    return np.linspace(0, 1, 32, dtype=np.float32).reshape(1, *SHAPE) * sums[:, None, None, None]


@pytest.fixture
def images() -> Images:
    rows = np.arange(150, dtype=np.uint8)
    return np.broadcast_to(rows[:, None, None, None], (150, 4, 4, 3)).copy()


@pytest.fixture
def source(images: Images) -> LatentSource:
    codec = {"fingerprint": "c" * 64, "kind": "VQModel", "path": "somewhere", "scaling_factor": 1.0}
    return LatentSource("photos", array_sha256(images), (4, 4, 3), codec)


def build(folder: Path, source: LatentSource, images: Images, **options: Any) -> LatentCache:
    return encode_or_open(folder, source, images, options.pop("encode", encode), SHAPE, **options)


def refuse(images: Images) -> Latents:
    raise AssertionError("encoded again")


def test_latents_are_those_of_each_image_and_stay_on_the_disk(
    tmp_path: Path, source: LatentSource, images: Images
) -> None:
    done: list[tuple[int, int]] = []
    cache = build(tmp_path, source, images, on_block=lambda *at: done.append(at))
    np.testing.assert_array_equal(cache.latents, encode(images))
    assert isinstance(cache.latents, np.memmap) and not cache.latents.flags.writeable
    assert cache.source == source.describe()
    assert done == [(0, 150), (64, 150), (128, 150), (150, 150)]
    again = build(tmp_path, source, images, encode=refuse)
    np.testing.assert_array_equal(again.latents, cache.latents)
    assert sorted(path.name for path in cache.path.iterdir()) == ["latents.npy", "manifest.json"]


# Death


def build_and_die(folder: Path, source: LatentSource, images: Images, moment: str) -> None:
    """Encode, but be killed after the first block, within the second one, or before its record."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write_record, as_bytes, calls = latents_module._record, latents_module._as_bytes, iter(range(100))

    def record(*arguments: Any) -> None:
        if next(calls) == 1 and moment == "before the record":
            die()
        write_record(*arguments)
        if moment == "after the first block":
            die()
        if moment == "within a record":
            progress = arguments[0]
            progress.write_bytes(progress.read_bytes()[:-20])
            die()

    def half(*arguments: Any) -> bytes:
        content = as_bytes(*arguments)
        if moment == "within the second block" and next(calls) == 1:
            with next(folder.glob(".*.unfinished/latents.npy")).open("ab") as file:
                file.write(content[:100])
            die()
        return content

    if moment == "within the second block":
        latents_module._as_bytes = half
    else:
        latents_module._record = record
    build(folder, source, images)


@pytest.mark.parametrize(
    ("moment", "n_kept"),
    [
        ("after the first block", 64),
        ("within the second block", 64),
        ("before the record", 64),
        ("within a record", 0),
    ],
)
def test_a_killed_process_is_continued_to_the_same_bytes(
    tmp_path: Path,
    source: LatentSource,
    images: Images,
    in_new_process: Callable[..., Any],
    moment: str,
    n_kept: int,
) -> None:
    with pytest.raises(BrokenProcessPool):
        in_new_process(build_and_die, tmp_path, source, images, moment)
    with pytest.raises(DataError, match="found none"):
        find_latents(tmp_path, source)  # what is half-written is no cache
    done: list[int] = []
    continued = build(tmp_path, source, images, on_block=lambda n_done, _: done.append(n_done))
    assert done[0] == n_kept
    whole = build(tmp_path / "undisturbed", source, images)
    assert (continued.path / "latents.npy").read_bytes() == (whole.path / "latents.npy").read_bytes()
    assert not list(tmp_path.glob(".*unfinished"))


def test_recorded_blocks_that_changed_on_the_disk_are_encoded_again(
    tmp_path: Path, source: LatentSource, images: Images, in_new_process: Callable[..., Any]
) -> None:
    with pytest.raises(BrokenProcessPool):
        in_new_process(build_and_die, tmp_path, source, images, "after the first block")
    file = next(tmp_path.glob(".*.unfinished/latents.npy"))
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    done: list[int] = []
    cache = build(tmp_path, source, images, on_block=lambda n_done, _: done.append(n_done))
    assert done[0] == 0
    np.testing.assert_array_equal(cache.latents, encode(images))


def test_a_damaged_cache_is_kept_aside_and_built_again(tmp_path: Path, source: LatentSource, images: Images) -> None:
    file = build(tmp_path, source, images).path / "latents.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"latents\.npy is not what its manifest says"):
        open_latents(file.parent)
    np.testing.assert_array_equal(build(tmp_path, source, images).latents, encode(images))
    assert len(list(tmp_path.glob("*.damaged-0"))) == 1


def test_an_encoder_that_fails_leaves_what_was_encoded_before(
    tmp_path: Path, source: LatentSource, images: Images
) -> None:
    calls = iter(range(10))

    def broken(block: Images) -> Latents:
        return encode(block) * (np.float32("nan") if next(calls) == 1 else 1)

    with pytest.raises(DataError, match="finite latents"):
        build(tmp_path, source, images, encode=broken)
    done: list[int] = []
    build(tmp_path, source, images, on_block=lambda n_done, _: done.append(n_done))
    assert done[0] == 64


# Several processes


def build_slowly(folder: Path, source: LatentSource, images: Images) -> tuple[int, str]:
    """How many images this process encoded, and what it then read."""
    n_encoded = 0

    def counted(block: Images) -> Latents:
        nonlocal n_encoded
        n_encoded += len(block)
        return encode(block)

    cache = build(folder, source, images, encode=counted)
    return n_encoded, array_sha256(cache.latents)


def test_of_several_processes_one_encodes(
    tmp_path: Path, source: LatentSource, images: Images, process_server: Any
) -> None:
    with ProcessPoolExecutor(3, mp_context=process_server) as pool:
        results = [job.result() for job in [pool.submit(build_slowly, tmp_path, source, images) for _ in range(3)]]
    assert sorted(n for n, _ in results) == [0, 0, 150]
    assert len({content for _, content in results}) == 1


# Reuse


def test_reuse_finds_the_latents_with_and_without_the_codec(
    tmp_path: Path, source: LatentSource, images: Images
) -> None:
    path = build(tmp_path, source, images).path
    assert find_latents(tmp_path, source).path == path
    by_name = replace(source, codec={"fingerprint": None, "path": "somewhere"})
    assert find_latents(tmp_path, by_name).path == path


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"codec": {"fingerprint": "d" * 64}}, ["codec fingerprint", "cccccc", "dddddd"]),
        ({"codec": {"fingerprint": None, "path": "elsewhere"}}, ["codec path", "somewhere", "elsewhere"]),
        (
            {"codec": {"fingerprint": None, "path": "somewhere", "scaling_factor": 2.0}},
            ["scaling_factor", "1.0", "2.0"],
        ),
        ({"images_sha256": "e" * 64}, ["images_sha256", "eeeeee"]),
        ({"image_shape": (8, 8, 3), "images_sha256": "e" * 64}, ["image_shape", "[4, 4, 3]", "[8, 8, 3]"]),
        ({"dataset": "paintings", "images_sha256": "e" * 64}, ["dataset", "photos", "paintings"]),
    ],
)
def test_reuse_refuses_other_latents_and_shows_both(
    tmp_path: Path, source: LatentSource, images: Images, changes: dict[str, Any], shown: list[str]
) -> None:
    build(tmp_path, source, images)
    with pytest.raises(MixedResultsError) as error:
        find_latents(tmp_path, replace(source, **changes))
    assert [text for text in [*shown, "--precompute_stage save"] if text not in str(error.value)] == []


def test_reuse_without_any_latents_says_how_to_make_them(tmp_path: Path, source: LatentSource) -> None:
    with pytest.raises(DataError, match="--precompute_stage save"):
        find_latents(tmp_path / "nowhere", source)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match="found none"):
        find_latents(tmp_path, source)


def test_reuse_by_name_refuses_to_guess_between_two_codecs_of_that_name(
    tmp_path: Path, source: LatentSource, images: Images
) -> None:
    for fingerprint in ("c" * 64, "d" * 64):
        build(tmp_path, replace(source, codec={**source.codec, "fingerprint": fingerprint}), images)
    with pytest.raises(MixedResultsError, match="expected one cache for the codec somewhere, found 2"):
        find_latents(tmp_path, replace(source, codec={"fingerprint": None, "path": "somewhere"}))
