"""Folders of images and their tables, and all that may be wrong with them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tribute.cli import main
from tribute.data.check import check_data
from tribute.data.sources import DataRequest, load_contributors, load_training_data
from tribute.data.tensors import TrainingData
from tribute.errors import ConfigError, DataError
from tribute.seeding import numpy_stream

PIXELS = numpy_stream(0, "test.folder").integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
OWNERS = ["ann", "bob", "ann", "cid", "bob", "ann", "cid", "bob"]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(folder: Path, kind: str, columns: dict[str, list[Any]]) -> None:
    path = folder / f"metadata.{kind}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "csv":
        lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images in two sub-folders."""
    for i, pixels in enumerate(PIXELS):
        path = tmp_path / "images" / ("a" if i < 5 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return tmp_path / "images"


def names() -> list[str]:
    return [f"{'a' if i < 5 else 'b'}/{i}.png" for i in range(8)]


def load(folder: Path, **options: Any) -> TrainingData:
    options = {"image_size": 8, "cache_dir": folder.parent / "cache", **options}
    return load_training_data(options.pop("dataset", "folder"), data_dir=folder, **options)


def test_sub_folders_are_the_contributors(folder: Path) -> None:
    data = load(folder)
    assert data.contributors.names == data.label_names == ("a", "b")
    assert data.contributors.n_examples.tolist() == [5, 3]
    assert np.array_equal(data.images, PIXELS)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_names_owners_and_gives_the_order(folder: Path, kind: str) -> None:
    write_table(folder, kind, {"file_name": names()[::-1], "artist": OWNERS[::-1], "style": [*"xyxyxyxy"][::-1]})
    data = load(folder, contributor_column="artist", label_column="style")
    assert np.array_equal(data.images, PIXELS[::-1])
    assert data.contributors.names == ("ann", "bob", "cid")
    assert [data.contributors.names[i] for i in data.contributors.contributor_of_example] == OWNERS[::-1]
    assert data.label_names == ("x", "y") and data.labels.tolist() == [1, 0] * 4
    without_classes = load(folder, contributor_column="artist")
    assert without_classes.label_names == ("image",) and not without_classes.labels.any()
    owners = load_contributors("folder", data_dir=folder, cache_dir=folder.parent, contributor_column="artist")
    assert owners.fingerprint == data.contributors.fingerprint


def test_numbers_in_a_csv_are_names(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": names(), "id": ["007", "10", "9", "9", "9", "9", "9", "9"]})
    assert load(folder, contributor_column="id").contributors.names == ("007", "9", "10")


def test_images_are_known_by_content_and_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded again"))
        assert load(folder).fingerprint == first.fingerprint
    (folder / "a" / "0.png").write_bytes(png(PIXELS[7]))
    assert load(folder).fingerprint != first.fingerprint
    assert load(folder, image_size=4).image_shape == (4, 4, 3)


def without_images(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".txt"))


def missing_file(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": [*names()[:7], "b/gone.png"], "artist": OWNERS})


def absent_column(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": names(), "painter": OWNERS})


def nan_owner(folder: Path) -> None:
    write_table(folder, "parquet", {"file_name": names(), "artist": [1.0, 2.0, float("nan"), *[1.0] * 5]})


def nan_text(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": names(), "artist": [*OWNERS[:6], "NaN", "bob"]})


def empty_owner(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": names(), "artist": [*OWNERS[:6], None, "bob"]})


def odd_name(folder: Path) -> None:
    write_table(folder, "jsonl", {"file_name": names(), "artist": [*OWNERS[:6], "\x1b[2J", "bob"]})


def same_looking_names(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": names(), "artist": [*OWNERS[:6], "Zoe\u0301", "Zo\u00e9"]})


def truncated(folder: Path) -> None:
    table(folder)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(PIXELS[0], np.ones((9, 9, 1), np.uint8))).save(buffer, "JPEG")
    (folder / "b" / "6.png").write_bytes(buffer.getvalue()[:2000])


def bomb(folder: Path) -> None:
    table(folder)
    (folder / "b" / "6.png").write_bytes(png(np.zeros((10_000, 9_000), np.uint8)))


def link_out(folder: Path) -> None:
    table(folder)
    (folder.parent / "secret.png").write_bytes(png(PIXELS[0]))
    (folder / "b" / "6.png").unlink()
    (folder / "b" / "6.png").symlink_to(folder.parent / "secret.png")


def absolute_path(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": [*names()[:6], "/etc/passwd", "b/7.png"], "artist": OWNERS})


def way_up(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": [*names()[:6], "../x.png", "b/7.png"], "artist": OWNERS})


def same_name(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": [*names()[:6], "./a/1.png", "b/7.png"], "artist": OWNERS})


def same_but_for_case(folder: Path) -> None:
    (folder / "a" / "X.png").write_bytes(png(PIXELS[0]))
    (folder / "a" / "x.png").write_bytes(png(PIXELS[1]))
    write_table(folder, "csv", {"file_name": [*names()[:6], "a/X.png", "a/x.png"], "artist": OWNERS})


def two_tables(folder: Path) -> None:
    table(folder)
    write_table(folder, "jsonl", {"file_name": names(), "artist": OWNERS})


def ragged(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,artist\na/0.png,ann\na/1.png\n")


def huge_number(folder: Path) -> None:
    write_table(folder, "jsonl", {"file_name": names(), "artist": [*OWNERS[:7], 2**70]})


def deep_nesting(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("[" * 100_000)


def not_utf8(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes(b"file_name,artist\na/0.png,\xff\n")


def other_column_of_files(folder: Path) -> None:
    write_table(folder, "csv", {"path": names(), "artist": OWNERS})


def table(folder: Path) -> None:
    write_table(folder, "csv", {"file_name": names(), "artist": OWNERS})


BAD = {
    without_images: r"one sub-folder per contributor, or a metadata.csv.*found no images, but \['a', 'b'\]",
    missing_file: r"metadata\.csv: row 7: the file 'b/gone\.png' is missing",
    absent_column: r"named artist, found columns \['file_name', 'painter'\]; name another with --contributor_column",
    nan_owner: r"metadata\.parquet: row 2 \(a/2\.png\): column 'artist': expected a name, found nan",
    nan_text: r"row 6 \(b/6\.png\).*expected a name, found 'NaN'",
    empty_owner: r"row 6 \(b/6\.png\).*expected a name, found ''",
    odd_name: r"row 6 .*expected a printable name.*found '\\x1b\[2J'",
    same_looking_names: r"tell apart, found .*Zoe\\u0301.*Unicode form only",
    truncated: r"metadata\.csv: row 6 \(b/6\.png\): .*cannot be decoded.*truncated",
    bomb: r"row 6 \(b/6\.png\): .*at most 89,478,485 pixels, found 9000x10000",
    link_out: r"row 6: 'b/6\.png' is a link to .*secret\.png, out of",
    absolute_path: r"row 6: expected a path within .*found '/etc/passwd'",
    way_up: r"row 6: expected a path within .*found '\.\./x\.png'",
    same_name: r"row 6: expected every file once, found '\./a/1\.png' after 'a/1\.png' .*row 1",
    same_but_for_case: r"row 7: expected every file once, found 'a/x.png' after 'a/X.png'",
    two_tables: r"expected one table of the images, found metadata\.csv, metadata\.jsonl",
    huge_number: r"metadata\.jsonl: cannot be read as jsonl",
    deep_nesting: r"metadata\.jsonl: cannot be read as jsonl",
    not_utf8: r"metadata\.csv: cannot be read as csv .*decode",
    other_column_of_files: r"column named file_name, found columns \['path', 'artist'\]; rename the column",
    ragged: r"row 1: expected 2 values for \['file_name', 'artist'\], found 1",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_named(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=BAD[spoil]):
        load(folder, contributor_column=None if spoil is without_images else "artist")


def test_a_json_line_ends_at_a_line_feed_only(folder: Path) -> None:
    rows = [{"file_name": name, "artist": f"{owner}\u00a0x"} for name, owner in zip(names(), OWNERS, strict=True)]
    rows[0]["title"] = "one\u2028two\u0085three"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    with pytest.raises(DataError, match="printable name"):
        load(folder, contributor_column="artist")
    assert load_contributors("folder", data_dir=folder, cache_dir=folder.parent, contributor_column="file_name")


def test_numbers_of_any_length_are_names(folder: Path) -> None:
    long = "9" * 5_000
    write_table(folder, "csv", {"file_name": names(), "artist": [long, "10", *["2"] * 6]})
    assert load(folder, contributor_column="artist").contributors.names == ("10", "2", long)


def test_a_file_whose_name_is_not_utf8_is_named(folder: Path) -> None:
    try:
        (folder / "a" / os.fsdecode(b"\xff.png")).write_bytes(png(PIXELS[0]))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"in UTF-8, found 'a/\\udcff\.png'; rename"):
        load(folder)


def test_names_are_shown_and_never_obeyed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a" / "\x1b[2J:smile:.png").write_bytes(b"broken")
    with pytest.raises(SystemExit):
        main("data", ["check", "--dataset", "folder", "--data_dir", str(folder), "--image_size", "8"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "a/\\x1b[2J:smile:.png" in out
    with pytest.raises(SystemExit):
        main("data", ["check", "--dataset", "folder", "--data_dir", "\x1b[2J", "--image_size", "8"])
    assert "\x1b" not in (err := capsys.readouterr().err) and "\\x1b[2J" in err


def test_two_files_of_one_name_but_for_case_are_refused(folder: Path) -> None:
    for name in ("X.png", "x.PNG"):
        (folder / "a" / name).write_bytes(png(PIXELS[0]))
    if len(list((folder / "a").glob("[xX].*"))) < 2:
        pytest.skip("this file system does not tell the case of names apart")
    with pytest.raises(DataError, match=r"expected every file once, found 'a/x\.PNG' after 'a/X\.png'"):
        load(folder)


def test_a_link_out_of_a_sub_folder_is_refused(folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes(png(PIXELS[0]))
    (folder / "b" / "link.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(DataError, match=r"'b/link\.png' is a link to .*secret\.png, out of"):
        load(folder)


def test_loose_images_linked_folders_and_a_missing_size_are_answered(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--image_size: expected the size"):
        load(folder, image_size=None)
    (folder / "c").symlink_to(folder / "a")
    with pytest.raises(DataError, match="found a link to a folder"):
        load(folder)
    (folder / "c").unlink()
    (folder / "loose.png").write_bytes(png(PIXELS[0]))
    with pytest.raises(DataError, match=r"found 1 outside sub-folders, e.g. 'loose.png'"):
        load(folder)
    with pytest.raises(DataError, match="found nothing there"):
        load(folder / "nowhere")


def test_celeba_is_a_folder_with_labels_csv(folder: Path) -> None:
    lines = ["filename,celeb", *(f"{name},{owner}" for name, owner in zip(names(), OWNERS, strict=True))]
    (folder / "labels.csv").write_text("\n".join(lines))
    data = load(folder, dataset="celeba")
    assert data.contributors.names == data.label_names == ("ann", "bob", "cid")


def test_parquet_may_name_files_beside_it(folder: Path) -> None:
    pq.write_table(pa.table({"image": names(), "artist": OWNERS}), folder / "train-0.parquet")
    data = load(folder, dataset="parquet", contributor_column="artist")
    assert np.array_equal(data.images, PIXELS) and data.contributors.names == ("ann", "bob", "cid")
    (folder / "a" / "0.png").write_bytes(png(PIXELS[7]))
    assert np.array_equal(load(folder, dataset="parquet", contributor_column="artist").images[0], PIXELS[7])
    (folder / "a" / "0.png").unlink()
    with pytest.raises(DataError, match=r"row 0: the file 'a/0.png' is missing"):
        load(folder, dataset="parquet", contributor_column="artist")
    (folder.parent / "secret.png").write_bytes(png(PIXELS[0]))
    (folder / "a" / "0.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(DataError, match=r"row 0: 'a/0\.png' is a link to .*secret\.png, out of"):
        load(folder, dataset="parquet", contributor_column="artist")


def test_check_counts_and_names_everything(folder: Path) -> None:
    truncated(folder)
    for path, row in (("b/7.png", 0), ("a/4.png", 3)):
        (folder / path).write_bytes(png(PIXELS[row]))
    owners = [*OWNERS[:4], "Bob", *OWNERS[5:]]
    write_table(folder, "csv", {"file_name": [*names()[:5], "b/gone.png", *names()[6:]], "artist": owners})
    request = DataRequest("folder", data_dir=folder, cache_dir=folder.parent, image_size=8, contributor_column="artist")
    report = check_data(request, batch_size=2)
    found = {finding.title: list(finding.items) for finding in report.findings}
    assert [item.split(": ")[1] for item in found["unreadable images"]] == ["row 5 (b/gone.png)", "row 6 (b/6.png)"]
    assert report.n_per_contributor == {"Bob": 1, "ann": 2, "bob": 2, "cid": 1} and report.n_errors == 2
    assert found["contributors with fewer than 2 images, a batch"] == ["Bob: 1", "cid: 1"]
    assert found["names of contributors that differ in case or white space only"] == ["'Bob', 'bob'"]
    assert [item.count("/") > 0 for item in found["exact duplicates across contributors"]] == [True, True]
    assert found["files in the folder that are no example"] == ["1 files"]
    assert report.n_per_format == {"PNG RGB": 6}


def test_memory_follows_the_largest_image_and_the_processes(folder: Path) -> None:
    def needed(n_workers: int) -> int:
        request = DataRequest("folder", data_dir=folder, cache_dir=folder.parent, image_size=8, n_workers=n_workers)
        return check_data(request).memory_bytes

    before = needed(1), needed(3)
    (folder / "b" / "7.png").write_bytes(png(np.zeros((2_000, 1_000, 3), np.uint8)))
    n_more = 2_000 * 1_000 - 64
    assert (needed(1) - before[0], needed(3) - before[1]) == (16 * n_more, 48 * n_more)


@pytest.mark.parametrize("content", [b"broken", png(np.zeros((10_000, 9_000), np.uint8))], ids=["broken", "bomb"])
def test_a_folder_without_a_readable_image_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "data" / "ann").mkdir(parents=True)
    (tmp_path / "data" / "ann" / "only.png").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main("data", ["check", "--dataset", "folder", "--data_dir", str(tmp_path / "data"), "--image_size", "8"])
    out = capsys.readouterr().out
    assert end.value.code == 1 and "ann/only.png: expected an image" in out and "1 errors" in out


def test_the_command_ends_with_1_on_errors_and_0_without(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "--dataset", "folder", "--data_dir", str(folder), "--image_size", "8"]
    main("data", command)
    assert "8 images, 2 contributors" in capsys.readouterr().out
    (folder / "a" / "0.png").write_bytes(b"broken")
    (folder / "b" / "7.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as end:
        main("data", command)
    out = capsys.readouterr().out
    assert end.value.code == 1 and "a/0.png" in out and "b/7.png" in out and "replace or remove" in out
