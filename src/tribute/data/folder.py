"""A folder of image files: one sub-folder per contributor, or a table that names the files and their owners."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tribute.data.decoding import image_endings
from tribute.data.image_workers import Encoded
from tribute.data.listing import Listing, Request, Rows, find_column
from tribute.data.local_files import DatasetFolder, read_encoded, refuse_same_names
from tribute.data.parquet import class_names
from tribute.errors import DataError, printable

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FOLDER_COLUMN = "folder"
"""The column that a folder without a table has: the sub-folder of each image."""


def list_folder(request: Request) -> Listing:
    """List the images of a folder.

    With `metadata.csv`, `.jsonl` or `.parquet` in it, the images are its rows, in their order; a column
    `file_name` names the file of each, from the folder on. Without, they are the image files in sub-folders, by
    name, and the column `folder` holds the sub-folder. Hidden files are left alone.

    Raises:
        DataError: There are no images, a row names a file that is missing or outside the folder, or two of them
            are called the same.
    """
    folder = request.data_dir
    if folder is None:
        raise DataError("--data_dir is missing: expected a folder with images")
    if not folder.is_dir():
        raise DataError(f"--data_dir {folder}: expected a folder with images, found {_what(folder)}")
    names = (*request.metadata_files, *METADATA_FILES)
    tables = [folder / name for name in names if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(
            f"{folder}: expected one table of the images, found {', '.join(path.name for path in tables)}; remove all "
            "but one"
        )
    return _list_table(tables[0], request) if tables else _list_sub_folders(folder, request)


def _list_table(path: Path, request: Request) -> Listing:
    """The rows of a table."""
    table = read_table(path)
    file_column = find_column(
        path, "file of each image", request.file_columns, table.column_names, remedy="rename the column"
    )
    folder = DatasetFolder(path.parent)
    names: list[str] = []
    files: list[Path | DataError] = []
    for row, name in enumerate(table.column(file_column).to_pylist()):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: row {row}: column {file_column!r}: expected the name of a file, found {name!r}")
        names.append(name)
        try:
            files.append(folder.find(name))
        except DataError as error:
            if request.strict:
                raise DataError(f"{path}: row {row}: {error}") from error
            files.append(error)
    refuse_same_names(names, lambda row: f"{path}: row {row}")
    n_others = len(
        set(_image_files(path.parent)) - {Path(os.path.normpath(file)) for file in files if isinstance(file, Path)}
    )
    return _listing(names, files, table, lambda row: printable(f"{path}: row {row} ({names[row]})"), request, n_others)


def _list_sub_folders(folder: Path, request: Request) -> Listing:
    """The image files in sub-folders."""
    import pyarrow as pa

    within = DatasetFolder(folder)
    found = _image_files(folder)
    names = [_name_in(folder, file) for file in found]
    files: list[Path | DataError] = list(found)
    expected = f"expected images in one sub-folder per contributor, or a {METADATA_FILES[0]} that names their owners"
    if not files:
        others = sorted(path.name for path in folder.iterdir())[:8]
        raise DataError(f"--data_dir {folder}: {expected}; found no images, but {others or 'an empty folder'}")
    loose = [name for name in names if "/" not in name]
    if loose:
        raise DataError(f"--data_dir {folder}: {expected}; found {len(loose)} outside sub-folders, e.g. {loose[0]!r}")
    for name in names:
        try:
            within.find(name)
        except DataError as error:
            if request.strict:
                raise DataError(f"--data_dir {folder}: {error}") from error
            files[names.index(name)] = error
    refuse_same_names(names, lambda row: str(folder))
    table = pa.table({"file_name": names, FOLDER_COLUMN: [name.split("/")[0] for name in names]})
    n_others = sum(1 for _ in _all_files(folder)) - len(files)
    return _listing(names, files, table, lambda row: printable(str(folder / names[row])), request, n_others)


def _name_in(folder: Path, file: Path) -> str:
    """The name of a file from the folder on.

    Raises:
        DataError: It is not UTF-8, so it would be another name on another machine.
    """
    name = file.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{folder}: expected names of files in UTF-8, found {name!a}; rename the file") from error
    return name


def _listing(
    names: Sequence[str],
    files: Sequence[Path | DataError],
    table: pa.Table,
    place: Callable[[int], str],
    request: Request,
    n_ignored: int,
) -> Listing:
    """The listing of files that are there; its content is their names and hashes."""
    known = request.known_hashes(hashlib.sha256(str(request.data_dir).encode()).hexdigest()[:16])
    digest = hashlib.sha256()
    for row, (name, file) in enumerate(zip(names, files, strict=True)):
        if isinstance(file, DataError):
            continue
        try:
            digest.update(f"{name}\0{known.hash_of(file)}\n".encode())
        except OSError as error:
            raise DataError(f"{place(row)}: cannot be read ({error})") from error
    known.save()

    def read_images(rows: Rows) -> Iterator[Encoded]:
        for row in rows:
            file = files[row]
            yield file if isinstance(file, DataError) else read_encoded(file)

    return Listing(
        n_examples=len(files),
        column_names=tuple(table.column_names),
        column=table.column,
        class_names=class_names(table.schema),
        read_images=read_images,
        place=place,
        content={"files_sha256": digest.hexdigest(), "n_files": len(files)},
        n_ignored=n_ignored,
    )


def read_table(path: Path) -> pa.Table:
    """Read a table of metadata: CSV with a header, JSON lines, or Parquet.

    Raises:
        DataError: It cannot be read as what its name says, or has no rows.
    """
    import pyarrow as pa
    import pyarrow.lib
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".csv":
            table = pa.table(_read_csv(path))
        elif path.suffix == ".jsonl":
            table = pa.table(_read_json_lines(path))
        else:
            table = pq.read_table(path)
        table.validate(full=True)  # a text in it may not be UTF-8
    # A number may be larger than a column holds, and objects nested deeper than the parser goes.
    except (
        *(pyarrow.lib.ArrowException, OSError, ValueError, TypeError, csv.Error),
        *(OverflowError, RecursionError),
    ) as error:
        raise DataError(
            f"{path}: cannot be read as {path.suffix.removeprefix('.')} ({printable(str(error))})"
        ) from error
    if not len(table):
        raise DataError(f"{path}: expected a row for each image, found none")
    return table


def _read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV file with a header. All is text: what looks like a number may be a name, e.g. 007."""
    # Spreadsheets write a byte order mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"expected columns of different names, found {header}")
        rows = [row for row in reader if row]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number}: expected {len(header)} values for {header}, found {len(row)}")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _read_json_lines(path: Path) -> dict[str, list[Any]]:
    """Columns of a file with one JSON object per line; what a line lacks is None."""
    records = []
    # Not splitlines: characters such as U+2028 may stand within a JSON text.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n")):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number + 1}: expected an object, found {type(record).__name__}")
            records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _all_files(folder: Path) -> Iterator[Path]:
    """Files below a folder that are not hidden, in the order of their paths."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(at) / name).is_symlink():
                raise DataError(
                    f"{Path(at) / name}: expected folders and files, found a link to a folder; its images could be "
                    "counted twice or lie elsewhere: copy it"
                )
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(at) / name


def _image_files(folder: Path) -> Sequence[Path]:
    """Files whose name ends like that of an image."""
    endings = image_endings()
    return sorted(path for path in _all_files(folder) if path.suffix.lower() in endings)


def _what(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"
