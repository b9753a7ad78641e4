"""Training data as tensors, and caches that are whole or not there."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tribute.data import known_hashes, tensors
from tribute.data.contributors import ContributorTable
from tribute.data.known_hashes import KnownHashes
from tribute.data.tensors import (
    TrainingData,
    array_sha256,
    gather,
    open_or_build_tensor_cache,
    open_tensor_cache,
    write_tensor_cache,
)
from tribute.errors import DataError
from tribute.files import sha256_of_file
from tribute.seeding import numpy_stream

IMAGES = numpy_stream(0, "test.images").integers(0, 256, (20, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 2
OWNERS = ContributorTable(("a", "b"), LABELS.astype(np.int32))


def batches(size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(IMAGES), size):
        yield IMAGES[start : start + size]


def write(cache_dir: Path, *, batch_size: int = 7) -> None:
    write_tensor_cache(
        cache_dir,
        batches(batch_size),
        shape=(20, 4, 5, 3),
        columns={"labels": LABELS},
        source={"made": "here"},
    )


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 99])
def test_a_cache_reads_back_as_it_was_written_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    write(tmp_path / "cache", batch_size=batch_size)
    cache = open_tensor_cache(tmp_path / "cache")
    assert isinstance(cache.images, np.memmap) and not cache.images.flags.writeable
    assert np.array_equal(cache.images, IMAGES) and np.array_equal(cache.columns["labels"], LABELS)
    assert cache.images_sha256 == array_sha256(IMAGES)
    assert cache.source == {"made": "here"}
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_hash_tells_content_shape_and_type_apart_but_not_memory_layout() -> None:
    same = [IMAGES, IMAGES.copy(order="F"), IMAGES[::-1][::-1]]
    other = [IMAGES.reshape(20, 5, 4, 3), IMAGES.view(np.int8), IMAGES[:19], IMAGES[::-1]]
    assert len({array_sha256(array) for array in same}) == 1
    assert len({array_sha256(array) for array in [IMAGES, *other]}) == 5


def test_gather_copies_rows_in_the_order_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    for images in (IMAGES, open_tensor_cache(tmp_path / "cache").images):
        rows = gather(images, [3, 0, 3, 19])
        assert np.array_equal(rows, np.stack([IMAGES[3], IMAGES[0], IMAGES[3], IMAGES[19]]))
        assert type(rows) is np.ndarray and rows.flags.writeable and not np.shares_memory(rows, images)
        assert gather(images, []).shape == (0, 4, 5, 3)


def test_gather_reads_only_the_rows_it_needs(tmp_path: Path) -> None:
    # A sparse file of 60 GB: to read more than a few rows of it would be noticed.
    shape = (20_000, 1024, 1024, 3)
    with (tmp_path / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)))
    images = np.load(tmp_path / "huge.npy", mmap_mode="r")
    assert gather(images, [19_999, 5]).shape == (2, 1024, 1024, 3)


@pytest.mark.parametrize("rows", [[20], [-1], [0.0], np.ones(20, dtype=bool), [[0]]])
def test_gather_refuses_what_is_no_row(rows: Any) -> None:
    with pytest.raises(DataError, match="example_idx: expected"):
        gather(IMAGES, rows)


@pytest.mark.parametrize(
    "wrong",
    [
        [IMAGES[:19]],
        [IMAGES, IMAGES[:1]],
        [IMAGES.astype(np.float32)],
        [IMAGES[:, :3]],
    ],
)
def test_batches_that_are_not_as_announced_leave_nothing_behind(tmp_path: Path, wrong: list[Any]) -> None:
    with pytest.raises(DataError, match="expected"):
        write_tensor_cache(tmp_path / "cache", wrong, shape=(20, 4, 5, 3), columns={}, source={})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def disk_fills_up() -> Iterator[np.ndarray]:
        yield IMAGES[:10]
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"No space left on device.*free some space"):
        write_tensor_cache(tmp_path / "cache", disk_fills_up(), shape=(20, 4, 5, 3), columns={}, source={})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        open_or_build_tensor_cache(tmp_path / "file" / "cache", lambda _: None)


def damage_nothing_but(cache_dir: Path, damage: str) -> None:
    manifest = json.loads((cache_dir / "manifest.json").read_text())
    if damage == "pixel":
        flip_last_byte(cache_dir / "images.npy")
    elif damage == "label":
        flip_last_byte(cache_dir / "labels.npy")
    elif damage == "truncated":
        (cache_dir / "images.npy").write_bytes((cache_dir / "images.npy").read_bytes()[:-100])
    elif damage == "empty":
        (cache_dir / "labels.npy").write_bytes(b"")
    elif damage == "pickle":
        np.save(cache_dir / "labels.npy", np.array([print], dtype=object), allow_pickle=True)
    elif damage == "no column":
        (cache_dir / "labels.npy").unlink()
    elif damage == "no manifest":
        (cache_dir / "manifest.json").unlink()
    elif damage == "half a manifest":
        (cache_dir / "manifest.json").write_text(json.dumps(manifest)[:40])
    elif damage == "no list":
        (cache_dir / "manifest.json").write_text("[]")
    else:
        manifest["format"] = 2
        (cache_dir / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = ["pixel", "label", "truncated", "empty", "pickle", "no column", "no manifest", "half a manifest"]


@pytest.mark.parametrize("damage", [*DAMAGES, "no list", "newer format"])
def test_a_damaged_cache_is_refused_kept_aside_and_built_again(tmp_path: Path, damage: str) -> None:
    cache_dir = tmp_path / "cache"
    write(cache_dir)
    damage_nothing_but(cache_dir, damage)
    remains = {path.name: path.read_bytes() for path in cache_dir.iterdir()}
    with pytest.raises(DataError, match="built again"):
        open_tensor_cache(cache_dir)

    cache = open_or_build_tensor_cache(cache_dir, lambda _: write(cache_dir))
    assert np.array_equal(cache.images, IMAGES) and np.array_equal(cache.columns["labels"], LABELS)
    aside = tmp_path / "cache.damaged-0"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == remains


def test_a_whole_cache_is_not_built_again(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    cache = open_or_build_tensor_cache(tmp_path / "cache", lambda _: pytest.fail("built a cache that is there"))
    assert np.array_equal(cache.images, IMAGES)


SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
from tribute.data.tensors import open_or_build_tensor_cache, write_tensor_cache

cache_dir, killed = Path(sys.argv[1]), sys.argv[2] == "killed"

def batches():
    yield np.zeros((2, 4, 4, 1), np.uint8)
    if killed:
        os._exit(9)
    yield np.ones((2, 4, 4, 1), np.uint8)

def build(scratch):
    (scratch / "temporary").touch()
    with open(cache_dir.parent / "builds", "a") as log:
        log.write("x")
    write_tensor_cache(cache_dir, batches(), shape=(4, 4, 4, 1), columns={}, source={})

print(open_or_build_tensor_cache(cache_dir, build).images.sum())
"""


def start(cache_dir: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(cache_dir), how], stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    with start(cache_dir, "killed") as process:
        assert process.wait() == 9
    assert not cache_dir.exists() and len(list(tmp_path.glob(".cache.*"))) == 2
    with start(cache_dir, "whole") as process:
        assert process.communicate()[0] == "32\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["builds", "cache"]


def test_of_two_processes_one_builds_and_both_read(tmp_path: Path) -> None:
    with start(tmp_path / "cache", "whole") as one, start(tmp_path / "cache", "whole") as other:
        assert one.communicate()[0] == other.communicate()[0] == "32\n"
    assert (tmp_path / "builds").read_text() == "x"


def test_training_data_describes_itself_and_is_read_only() -> None:
    data = TrainingData.from_arrays("toy", IMAGES, LABELS, ("even", "odd"), OWNERS, origin={"file": "x"})
    assert data.n_examples == 20 and data.image_shape == (4, 5, 3)
    assert data.reference_images is data.images and data.reference_labels is data.labels
    assert json.loads(json.dumps(data.manifest)) == data.manifest
    assert data.manifest["contributors"]["n_examples"] == {"a": 10, "b": 10}
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.labels = LABELS  # type: ignore[misc]
    assert IMAGES.flags.writeable


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        parts = {"images": IMAGES, "labels": LABELS, "label_names": ("even", "odd"), "contributors": OWNERS}
        return TrainingData.from_arrays("toy", **{**parts, **changes}).fingerprint

    write(tmp_path / "cache")
    cache = open_tensor_cache(tmp_path / "cache")
    plain = fingerprint()
    assert fingerprint(images=cache.images, images_sha256=cache.images_sha256, origin={"a": 1}) == plain
    assert fingerprint(reference_images=IMAGES, reference_labels=LABELS) == plain
    pixel = IMAGES.copy()
    pixel[3, 1, 1, 1] ^= 1
    changed = [
        fingerprint(images=pixel),
        fingerprint(labels=1 - LABELS),
        fingerprint(label_names=("odd", "even")),
        fingerprint(contributors=ContributorTable(("b", "a"), OWNERS.contributor_of_example)),
        fingerprint(reference_images=pixel, reference_labels=LABELS),
    ]
    assert len({plain, *changed}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, "images: expected uint8"),
        ({"images": IMAGES[..., :2]}, "1 or 3"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "n > 0"),
        ({"labels": LABELS[:19]}, "20 integer labels"),
        ({"labels": LABELS + 1}, "labels 0 to 1, found 1 to 2"),
        (
            {"contributors": ContributorTable(("a",), np.zeros(3, np.int32))},
            "owner for each of 20 images, found 3",
        ),
        ({"reference_images": IMAGES}, "both images and labels"),
        ({"reference_images": IMAGES[:, :3], "reference_labels": LABELS}, "reference images: expected shape"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    parts = {"images": IMAGES, "labels": LABELS, "label_names": ("even", "odd"), "contributors": OWNERS}
    with pytest.raises(DataError, match=message):
        TrainingData.from_arrays("toy", **{**parts, **changes})


def test_a_verified_cache_is_not_hashed_again_until_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cache")
    monkeypatch.setattr(known_hashes, "RACY_NS", -(10**12))  # as if the file were old enough to be trusted
    open_tensor_cache(tmp_path / "cache")
    monkeypatch.setattr(
        tensors, "array_sha256", lambda array: pytest.fail("hashed again") if array.ndim == 4 else array_sha256(array)
    )
    assert np.array_equal(open_tensor_cache(tmp_path / "cache").images, IMAGES)
    monkeypatch.undo()
    flip_last_byte(tmp_path / "cache" / "images.npy")
    os.utime(tmp_path / "cache" / "images.npy", ns=(0, 0))
    with pytest.raises(DataError, match=r"images\.npy is not what its manifest says"):
        open_tensor_cache(tmp_path / "cache")


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a")
    known = KnownHashes(tmp_path / "memo.json")
    known.hash_of(path)
    known.save()
    assert not (tmp_path / "memo.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', '{"FILE": [1, 2, 3]}', "\x00"])
def test_a_damaged_memo_of_hashes_costs_time_only(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a")
    (tmp_path / "memo.json").write_text(content.replace("FILE", str(path)))
    assert KnownHashes(tmp_path / "memo.json").hash_of(path) == sha256_of_file(path)


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from benchmarks.memory import measure
before = measure(Path(sys.argv[1]) / "small", 2, (64, 64, 3), 2, 1)
print(measure(Path(sys.argv[1]) / "large", 20_000, (64, 64, 3), 64, 100) - before)
"""


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system does not take pages back on request")
def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    # A cache of 246 MB; what is read at a time is 16 MB or less.
    assert int(done.stdout.splitlines()[-1]) < 110e6, done.stdout
