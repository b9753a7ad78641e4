"""Local Parquet files: images in the Hugging Face layout `{bytes, path}`, as bytes, or as paths beside the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tribute.data.image_workers import Encoded
from tribute.data.listing import Listing, Request, Rows, find_column, python_values
from tribute.data.local_files import DatasetFolder, read_encoded
from tribute.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

READ_BATCH = 64


@dataclass(frozen=True, eq=False)
class _Shard:
    """One opened file: its rows are `first_row` and those after it of the dataset."""

    path: Path
    file: pq.ParquetFile
    image_column: str
    first_row: int

    @property
    def n_rows(self) -> int:
        return self.file.metadata.num_rows


def list_parquet(request: Request) -> Listing:
    """List the rows of a file, or of the shards of a folder in the order of their names.

    Shards are `SPLIT*.parquet` in the folder or one below it, as copies from the hub have them; a folder where
    nothing is named so is read whole.

    Raises:
        DataError: There is no such file, one cannot be read, or a column is missing or of another kind; the message
            names file and row (from 0).
    """
    paths = find_parquet_files(request)
    known = request.known_hashes("parquet")
    try:
        hashes = [known.hash_of(path) for path in paths]
    except OSError as error:
        raise DataError(f"--data_dir {request.data_dir}: a file cannot be read ({error})") from error
    known.save()
    shards = _open_shards(paths, request)
    n_rows = sum(shard.n_rows for shard in shards)
    named_files = _named_files(shards, request)

    def place(row: int) -> str:
        shard = next(shard for shard in reversed(shards) if shard.first_row <= row)
        return f"{shard.path}: row {row - shard.first_row}"

    def column(name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        read = [shard.file.read(columns=[name]).column(0) for shard in shards]
        return pa.chunked_array([chunk for part in read for chunk in part.chunks], type=read[0].type)

    def read_images(rows: Rows) -> Iterator[Encoded]:
        for shard in shards:
            wanted = rows[(rows >= shard.first_row) & (rows < shard.first_row + shard.n_rows)] - shard.first_row
            yield from _read_shard(shard, wanted)

    schema = shards[0].file.schema_arrow
    return Listing(
        n_examples=n_rows,
        column_names=tuple(name for name in schema.names if name != shards[0].image_column),
        column=column,
        class_names=class_names(schema),
        read_images=read_images,
        place=place,
        content={"files": hashes, "image_column": shards[0].image_column, "named_files": named_files},
        origin={"files": [{"name": p.name, "sha256": h} for p, h in zip(paths, hashes, strict=True)]},
    )


def find_parquet_files(request: Request) -> list[Path]:
    """The file itself, or the shards of the folder."""
    expected = f"expected a Parquet file, or a folder with {request.split}*.parquet or images"
    data_dir = request.data_dir
    if data_dir is None:
        raise DataError(f"--data_dir is missing: {expected}")
    if data_dir.is_file():
        return [data_dir]
    for pattern in (f"{request.split}*.parquet", f"*/{request.split}*.parquet", "*.parquet"):
        # A folder without a name for its parts has one part, unless another was asked for.
        if pattern == "*.parquet" and request.split != "train":
            continue
        if files := sorted(data_dir.glob(pattern)):
            return files
    found = sorted(path.name for path in data_dir.iterdir())[:8] if data_dir.is_dir() else "nothing there"
    raise DataError(f"--data_dir {data_dir}: {expected}, found {found or 'an empty folder'}")


def class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Names of the classes of every column that holds their numbers, from the metadata that `datasets` writes."""
    with suppress(KeyError, ValueError, TypeError, AttributeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(str(item) for item in feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    return {}


def check_image_type(where: object, column_name: str, kind: pa.DataType) -> None:
    """Refuse a column that can hold neither bytes nor paths."""
    import pyarrow as pa

    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    if not fields & {"bytes", "path"} and not _is_path(kind) and not _is_bytes(kind):
        raise DataError(
            f"{where}: column {column_name!r}: expected images as {{bytes, path}}, as bytes or as paths, found {kind}"
        )


def _open_shards(paths: Sequence[Path], request: Request) -> list[_Shard]:
    """Open files until there are rows enough; all must have the same columns and class names."""
    import pyarrow.lib
    import pyarrow.parquet as pq

    shards: list[_Shard] = []
    n_rows = 0
    for path in paths:
        try:
            file = pq.ParquetFile(path, memory_map=True)
            schema = file.schema_arrow
        except (pyarrow.lib.ArrowException, OSError) as error:
            raise DataError(f"{path}: expected a Parquet file, found one that cannot be read ({error})") from error
        if not file.metadata.num_rows:
            raise DataError(f"{path}: expected images, found no rows")
        image_column = find_column(
            path, "image", request.image_columns, schema.names, remedy="name another with --image_column"
        )
        check_image_type(path, image_column, schema.field(image_column).type)
        shards.append(_Shard(path, file, image_column, n_rows))
        n_rows += file.metadata.num_rows
        _check_alike(shards[0], shards[-1])
        if request.max_rows is not None and n_rows >= request.max_rows:
            break
    return shards


def _check_alike(first: _Shard, other: _Shard) -> None:
    """Refuse a shard with other columns or other names of classes than the first."""
    pairs = [("columns", first.file.schema_arrow.names, other.file.schema_arrow.names)]
    names, found = class_names(first.file.schema_arrow), class_names(other.file.schema_arrow)
    pairs += [("class names", list(names.get(c, ())), list(found.get(c, ()))) for c in sorted({*names, *found})]
    for what, expected, actual in pairs:
        if expected != actual:
            raise DataError(f"{other.path}: expected the {what} {expected} of {first.path.name}, found {actual}")


def _read_shard(shard: _Shard, rows: Rows) -> Iterator[Encoded]:
    """Encoded images of the given rows of one file; what lies between them is read, but not kept."""
    if not len(rows):
        return
    folder = DatasetFolder(shard.path.parent)
    start = 0
    for batch in shard.file.iter_batches(READ_BATCH, columns=[shard.image_column]):
        stop = start + batch.num_rows
        wanted = rows[slice(*np.searchsorted(rows, (start, stop)))]
        for value in python_values(batch.column(0).take(wanted - start), shard.path):
            yield _encoded(value, folder)
        start = stop
        if start > rows[-1]:
            return


def _encoded(value: Any, folder: DatasetFolder) -> Encoded:
    """The bytes of an image from what a row holds."""
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, name = None, content
    if content is not None:
        return content
    if not name:
        return DataError("expected the bytes of an image, found none")
    try:
        return read_encoded(folder.find(name))
    except DataError as error:
        return error


def _named_files(shards: Sequence[_Shard], request: Request) -> str | None:
    """One hash over the files that rows name by path, where they hold no bytes; None if there are none."""
    digest, n_named = hashlib.sha256(), 0
    known = request.known_hashes("parquet-paths")
    for shard in shards:
        folder = DatasetFolder(shard.path.parent)
        for row, name in _paths_of_images(shard):
            # A file that is missing is named when it is read, with all others that are.
            with suppress(DataError, OSError):
                digest.update(f"{row}\0{name}\0{known.hash_of(folder.find(name))}\n".encode())
            n_named += 1
    known.save()
    return digest.hexdigest() if n_named else None


def _paths_of_images(shard: _Shard) -> Iterator[tuple[int, str]]:
    """Row and path where a row names a file and holds no bytes."""
    schema = shard.file.schema_arrow
    kind = schema.field(shard.image_column).type
    if _is_bytes(kind) or (not _is_path(kind) and _has_all_bytes(shard)):
        return
    row = 0
    for batch in shard.file.iter_batches(READ_BATCH, columns=[shard.image_column]):
        for value in python_values(batch.column(0), shard.path):
            name = value if isinstance(value, str) else (value or {}).get("path")
            if name and (isinstance(value, str) or value.get("bytes") is None):
                yield row, name
            row += 1


def _has_all_bytes(shard: _Shard) -> bool:
    """Whether the file's statistics say that every row holds the bytes of its image."""
    metadata = shard.file.metadata
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            leaf = group.column(j)
            if leaf.path_in_schema == f"{shard.image_column}.bytes":
                statistics = leaf.statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count:
                    return False
    return True


def _is_path(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
