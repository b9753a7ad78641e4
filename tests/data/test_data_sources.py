"""Digits, and images in Parquet files of the Hugging Face layout."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tribute.data import sources
from tribute.data.sources import SOURCES, default_cache_dir, load_training_data
from tribute.data.tensors import TrainingData
from tribute.errors import ConfigError, DataError
from tribute.seeding import numpy_stream

NAMES = ["cat", "dog", "owl"]
PIXELS = numpy_stream(0, "test.parquet").integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
LABELS = numpy_stream(0, "test.parquet.labels").integers(0, 3, 300)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PNGS = [encode(pixels) for pixels in PIXELS]


def write_parquet(
    path: Path,
    rows: range = range(300),
    *,
    replaced: dict[int, bytes | None] | None = None,
    image_column: str = "img",
    names: list[str] = NAMES,
) -> Path:
    """The rows as one file in the layout of the hub; `replaced` puts other bytes in place of an image."""
    records = [{"bytes": (replaced or {}).get(i, PNGS[i]), "path": f"{i}.png"} for i in rows]
    features = datasets.Features({image_column: datasets.Image(), "label": datasets.ClassLabel(names=names)})
    labels = pa.array(LABELS[rows.start : rows.stop])
    images = pa.array(records, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({image_column: images, "label": labels})
    info = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(info), path, row_group_size=64)
    return path


def load(tmp_path: Path, data_dir: Path | None, **options: Any) -> TrainingData:
    return load_training_data("cifar", data_dir=data_dir, cache_dir=tmp_path / "cache", **options)


def test_digits_are_all_the_scans_with_their_grey_levels_in_order() -> None:
    digits = load_training_data("digits")
    bunch = load_digits()
    assert digits.images.shape == (1797, 8, 8, 1) and digits.images.dtype == np.uint8
    assert np.array_equal(np.round(digits.images[..., 0] * (16 / 255)), bunch.images)  # type: ignore[attr-defined]
    assert sorted(np.unique(digits.images))[::16] == [0, 255]
    assert np.array_equal(digits.labels, bunch.target)  # type: ignore[attr-defined]
    assert digits.contributors.names == digits.label_names == tuple("0123456789")
    assert np.array_equal(digits.contributors.contributor_of_example, digits.labels)
    assert digits.reference_images is digits.images


def test_digits_of_vendors_are_measured_against_the_clean_scans() -> None:
    by_class, by_vendor = load_training_data("digits"), load_training_data("digits", contributors="vendors")
    assert by_vendor.n_examples == 1887 and by_vendor.contributors.n_contributors == 12
    assert np.array_equal(by_vendor.reference_images, by_class.images)
    assert np.array_equal(by_vendor.reference_labels, by_class.labels)
    assert by_vendor.manifest["origin"]["planted"]["noise_sd"] == 0.6
    assert by_vendor.fingerprint != by_class.fingerprint
    assert load_training_data("digits", contributors="vendors").fingerprint == by_vendor.fingerprint
    assert json.loads(json.dumps(by_vendor.manifest))["n_reference"] == 1797


def test_the_first_digits_only() -> None:
    few, all_digits = load_training_data("digits", max_examples=100), load_training_data("digits")
    assert np.array_equal(few.images, all_digits.images[:100]) and len(few.labels) == 100
    assert few.fingerprint != all_digits.fingerprint
    assert load_training_data("digits", max_examples=5000).fingerprint == all_digits.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "cifar3"}, "--dataset 'cifar3' is unknown; expected one of digits, cifar"),
        ({"dataset": "cifar", "contributors": "vendors"}, "--contributors 'vendors'.*expected one of class"),
        ({"contributors": "artists"}, "expected one of class, vendors"),
        ({"max_examples": 0}, "--max_examples: expected at least 1, found 0"),
        ({"max_examples": 9, "contributors": "vendors"}, "leave it out"),
        ({"data_dir": Path("here")}, "--data_dir here.*embedded"),
    ],
)
def test_options_that_do_not_suit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_training_data(**{"dataset": "digits", **options})


def test_every_source_has_a_partition_by_class_first() -> None:
    assert {source.partitions[0] for source in SOURCES.values()} == {"class"}


def test_parquet_pixels_and_labels_arrive_as_they_were_written(tmp_path: Path) -> None:
    data = load(tmp_path, write_parquet(tmp_path / "some.parquet"))
    assert isinstance(data.images.base, np.memmap)
    assert np.array_equal(data.images, PIXELS) and np.array_equal(data.labels, LABELS)
    assert data.label_names == data.contributors.names == tuple(NAMES)
    assert data.contributors.n_examples.tolist() == np.bincount(LABELS).tolist()
    cached = sorted(path.name for path in (tmp_path / "cache" / "tensors").rglob("*") if path.is_file())
    assert [name for name in cached if not name.endswith(".lock")] == [
        "images.npy",
        "manifest.json",
    ]


@pytest.mark.parametrize("folder", [".", "data"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path, folder: str) -> None:
    write_parquet(tmp_path / "shards" / folder / "train-00001-of-00002.parquet", range(130, 300))
    write_parquet(tmp_path / "shards" / folder / "train-00000-of-00002.parquet", range(130))
    write_parquet(tmp_path / "shards" / folder / "test.parquet", range(5))
    data = load(tmp_path, tmp_path / "shards")
    assert np.array_equal(data.images, PIXELS) and np.array_equal(data.labels, LABELS)
    whole = load(tmp_path, write_parquet(tmp_path / "whole.parquet", image_column="image"))
    assert data.fingerprint == whole.fingerprint


@pytest.mark.parametrize("n_rows", [1, 64, 130, 135, 140])
def test_the_first_rows_only_and_no_later_shard(tmp_path: Path, n_rows: int) -> None:
    write_parquet(tmp_path / "shards" / "train-0.parquet", range(130))
    write_parquet(tmp_path / "shards" / "train-1.parquet", range(130, 140), replaced={139: b"broken"})
    (tmp_path / "shards" / "train-2.parquet").write_bytes(b"not a Parquet file")
    if n_rows == 140:
        with pytest.raises(DataError, match=r"train-1\.parquet: row 9: expected an image"):
            load(tmp_path, tmp_path / "shards", max_examples=n_rows)
        return
    data = load(tmp_path, tmp_path / "shards", max_examples=n_rows)
    assert np.array_equal(data.images, PIXELS[:n_rows]) and np.array_equal(data.labels, LABELS[:n_rows])


def test_files_are_decoded_once_and_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(20))
    first = load(tmp_path, path)
    other = write_parquet(tmp_path / "c.parquet", range(20), replaced={3: PNGS[99]})
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded again"))
        again = load(tmp_path, path.rename(tmp_path / "b.parquet"))
    assert again.fingerprint == first.fingerprint
    assert load(tmp_path, other).fingerprint != first.fingerprint


def test_reading_is_offline_and_quiet_and_decodes_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(20))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("used the network"))
    # Our own notice may have a handler by now; what counts is that pyarrow and Pillow say nothing.
    monkeypatch.setattr(sources.logger, "disabled", True)
    read: list[Any] = []
    for name in ("read", "iter_batches"):
        used = getattr(pq.ParquetFile, name)

        def spy(self: Any, *args: Any, used: Any = used, **options: Any) -> Any:
            read.append(options["columns"])
            return used(self, *args, **options)

        monkeypatch.setattr(pq.ParquetFile, name, spy)
    load(tmp_path, path)
    assert sorted(read) == [["img"], ["label"]]
    load(tmp_path, path)
    assert sorted(read) == [["img"], ["label"], ["label"]]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (b"", "expected an image, found bytes that cannot be decoded"),
        (b"\x00" * 100, "cannot be decoded"),
        (PNGS[0][: len(PNGS[0]) // 2], "cannot be decoded"),
        (encode(PIXELS[0], "JPEG")[:400], "cannot be decoded"),
        (None, "the file '258.png' is missing"),
        (encode(np.zeros((10_000, 10_000), np.uint8)), "at most 89,478,485 pixels, found 10000x10000"),
        (encode(np.zeros((14_000, 14_000), np.uint8)), "at most 89,478,485 pixels.*decompression bomb"),
    ],
)
def test_a_broken_image_is_named_and_leaves_no_cache(tmp_path: Path, replacement: bytes | None, message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", replaced={258: replacement})
    with pytest.raises(DataError, match=rf"a\.parquet: row 258: .*{message}"):
        load(tmp_path, path)
    assert [path for path in (tmp_path / "cache" / "tensors").iterdir() if path.suffix != ".lock"] == []


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    grey = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    opaque = np.dstack([PIXELS[1], np.full((32, 32), 255, np.uint8)])
    path = write_parquet(tmp_path / "a.parquet", range(3), replaced={0: encode(grey), 1: encode(opaque)})
    images = load(tmp_path, path).images
    assert np.array_equal(images[0], np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(images[1:], PIXELS[1:3])


def test_missing_files_are_answered_with_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data_dir is missing: celeba is .*image and celeb.*labels\.csv"):
        load_training_data("celeba", cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"train\*\.parquet or images, found nothing there"):
        load(tmp_path, tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="found an empty folder"):
        load(tmp_path, tmp_path / "folder")
    (tmp_path / "folder" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"found \['notes.txt'\]"):
        load(tmp_path, tmp_path / "folder")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"picture": [{"bytes": PNGS[0]}], "label": [0]},
            r"image in a column named img or image, found.*picture",
        ),
        ({"img": [{"bytes": PNGS[0]}], "y": [0]}, "label in a column named label or folder, found columns .'y'."),
        ({"img": [0], "label": [0]}, r"'img': expected images as \{bytes, path\}, as bytes or as paths, found int64"),
        ({"img": [{"bytes": PNGS[0]}], "label": [0.5]}, "expected classes as integers or text, found double"),
        ({"img": [{"bytes": PNGS[0]}] * 2, "label": [0, None]}, "row 1: .*a class in every row, found none"),
        ({"img": [{"bytes": PNGS[0]}] * 2, "label": [0, -1]}, "row 1: .*a class of 0 or more, found -1"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load(tmp_path, tmp_path / "a.parquet")


def test_integer_labels_without_names_are_named_by_their_number(tmp_path: Path) -> None:
    columns = {"img": [{"bytes": png} for png in PNGS[:3]], "label": [1, 0, 2]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load(tmp_path, tmp_path / "a.parquet")
    assert data.label_names == data.contributors.names == ("0", "1", "2") and data.labels.tolist() == [1, 0, 2]


def test_only_numbers_that_occur_are_classes(tmp_path: Path) -> None:
    columns = {"img": [{"bytes": png} for png in PNGS[:4]], "label": [2**60, 1, 7, 1]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load(tmp_path, tmp_path / "a.parquet")
    assert data.label_names == data.contributors.names == ("1", "7", str(2**60))
    assert data.labels.tolist() == [2, 0, 1, 0]
    # Classes 1 and 7 of CIFAR-10 are chosen by their numbers, not by their places among those that occur.
    two = load_training_data("cifar2", data_dir=tmp_path / "a.parquet", cache_dir=tmp_path)
    assert two.label_names == ("1", "7") and np.array_equal(two.images, PIXELS[1:4])


def test_names_of_classes_that_cannot_be_printed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names of classes that can be printed, found 'a\\x1b\[2J'"):
        load(tmp_path, write_parquet(tmp_path / "a.parquet", range(3), names=["cat", "a\x1b[2J", "owl"]))


def test_text_that_is_not_utf8_and_nested_metadata_are_answered(tmp_path: Path) -> None:
    table = pa.table({"img": [{"bytes": PNGS[0]}], "label": [0]})
    spoilt = pa.array([b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(table.append_column("owner", spoilt), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'owner': expected text in UTF-8"):
        load(tmp_path, tmp_path / "a.parquet", contributor_column="owner")
    pq.write_table(table.drop_columns("img").append_column("img", spoilt), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: expected text in UTF-8"):
        load(tmp_path, tmp_path / "c.parquet")
    pq.write_table(table.replace_schema_metadata({"huggingface": "[" * 100_000}), tmp_path / "b.parquet")
    assert load(tmp_path, tmp_path / "b.parquet").label_names == ("0",)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("digits", {"split": "test"}, "--split test: this dataset is embedded"),
        ("parquet", {"split": "test", "data_dir": "a.parquet"}, "--split test: a single file has no parts"),
        ("folder", {"split": "test", "data_dir": "."}, "--split test: a folder of images has no parts"),
        ("folder", {"image_column": "img", "data_dir": "."}, "--image_column img: a folder of images has files"),
        ("mnist", {"image_column": "img", "data_dir": "."}, "--image_column img: a folder of images has files"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", range(3))
    (tmp_path / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(ConfigError, match=message):
        load_training_data(dataset, cache_dir=tmp_path, **{"image_size": 8, **options})


@pytest.mark.parametrize("content", [b"", b"not a Parquet file"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: expected a Parquet file"):
        load(tmp_path, tmp_path / "a.parquet")


def test_files_without_rows_or_with_other_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no rows"):
        load(tmp_path, write_parquet(tmp_path / "a.parquet", range(0)))
    write_parquet(tmp_path / "shards" / "train-0.parquet", range(5))
    write_parquet(tmp_path / "shards" / "train-1.parquet", range(5), names=["x", "y", "z"])
    with pytest.raises(DataError, match=r"train-1.*class names \['cat', 'dog', 'owl'\].*found \['x', 'y', 'z'\]"):
        load(tmp_path, tmp_path / "shards")


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRIBUTE_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "tribute"
    monkeypatch.setenv("TRIBUTE_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"


def test_real_cifar_images_equal_those_decoded_one_by_one(tmp_path: Path) -> None:
    beside = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10"
    folder = Path(os.environ.get("TRIBUTE_CIFAR", beside))
    if not folder.exists():
        pytest.skip(f"no CIFAR-10 Parquet files at {folder}; TRIBUTE_CIFAR names another place")
    data = load(tmp_path, folder, max_examples=300)
    path = folder if folder.is_file() else sorted(folder.glob("train*.parquet"))[0]
    rows = next(pq.ParquetFile(path).iter_batches(300)).to_pylist()
    assert data.images.shape == (300, 32, 32, 3) and len(data.label_names) == 10
    assert data.labels.tolist() == [row["label"] for row in rows]
    for image, row in zip(data.images, rows, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")))
