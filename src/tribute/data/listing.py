"""Examples as a source lists them: columns and encoded images, before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tribute.data.image_workers import Encoded
from tribute.data.known_hashes import KnownHashes
from tribute.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """Where a source may look and what it is asked for.

    Attributes:
        data_dir: A file or folder; None for what is embedded or comes from the hub.
        cache_dir: Where hashes are remembered and temporary files may be written.
        image_columns: Columns that may hold the images, in the order in which they are looked for.
        metadata_files: Names that the table of a folder may have.
        file_columns: Columns of that table that may name the file.
        split: Part of the dataset.
        strict: Whether a file that is missing is an error at once, or only when it is read.
        max_rows: Later files need not be opened; None if all are needed.
    """

    data_dir: Path | None
    cache_dir: Path
    image_columns: tuple[str, ...] = ("img", "image")
    metadata_files: tuple[str, ...] = ()
    file_columns: tuple[str, ...] = ("file_name",)
    split: str = "train"
    strict: bool = True
    max_rows: int | None = None

    def known_hashes(self, name: str) -> KnownHashes:
        """Hashes of the files of a dataset, remembered under its name."""
        return KnownHashes(self.cache_dir / "hashes" / f"{name}.json")


@dataclass(frozen=True, eq=False)
class Listing:
    """All examples of a source.

    Attributes:
        n_examples: How many.
        column_names: Columns besides the images.
        column: Reads a column, `n_examples` values.
        class_names: Names of the classes, for columns that hold their numbers.
        read_images: Yields the encoded images of some rows, which are sorted and unique.
        place: Says where an example stands, for messages: file, row, name.
        content: What identifies the images: hashes, as JSON.
        origin: Where they come from, for the manifest, as JSON.
        n_ignored: Files in the folder that are no example.
    """

    n_examples: int
    column_names: tuple[str, ...]
    column: Callable[[str], pa.ChunkedArray]
    class_names: Mapping[str, tuple[str, ...]]
    read_images: Callable[[Rows], Iterator[Encoded]]
    place: Callable[[int], str]
    content: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)
    n_ignored: int = 0


def python_values(column: pa.Array | pa.ChunkedArray, where: object) -> list[Any]:
    """The values of a column.

    Raises:
        DataError: A text in it is not UTF-8; nobody checks that when a file is read.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected text in UTF-8, found other bytes ({error}); write it anew") from error


def find_column(where: object, meaning: str, candidates: Sequence[str], found: Sequence[str], *, remedy: str) -> str:
    """The first candidate among the columns found.

    Args:
        where: The file or dataset.
        meaning: What the column holds.
        candidates: Names that it may have, the usual one first.
        found: Columns that are there.
        remedy: What to do where there is none.

    Raises:
        DataError: There is none; the message lists what was found.
    """
    for candidate in candidates:
        if candidate in found:
            return candidate
    raise DataError(
        f"{where}: expected the {meaning} in a column named {' or '.join(candidates)}, "
        f"found columns {list(found)}; {remedy}"
    )
