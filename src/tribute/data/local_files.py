"""Files that a table names: found inside the dataset's folder or refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from tribute.data.image_workers import Encoded
from tribute.errors import DataError


class DatasetFolder:
    """A folder whose files may be read, and nothing outside it.

    Args:
        folder: The dataset's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder.resolve()

    def find(self, name: str) -> Path:
        """The file called `name`, a relative path with `/`.

        Raises:
            DataError: There is none, or it lies outside the folder: by an absolute path, by `..` or through a link.
                The message does not say which row named it: callers know.
        """
        if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"expected a path within {self.folder}, found {name!r}; name it from that folder")
        path = self.folder / name
        try:
            resolved = path.resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the file {name!r} is missing in {self.folder} ({type(error).__name__}); add it or leave the row out"
            ) from error
        if not resolved.is_relative_to(self._root):
            raise DataError(f"{name!r} is a link to {resolved}, out of {self.folder}; copy the file into the folder")
        if not resolved.is_file():
            raise DataError(f"expected a file, found that {name!r} is none")
        return path


def refuse_same_names(names: Sequence[str], place: Callable[[int], str]) -> None:
    """Refuse two rows or files of one name, also where only Unicode form or case differ.

    Such files are one file on some file systems and two on others, so the same folder would be two datasets.

    Raises:
        DataError: The message names both places.
    """
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        key = unicodedata.normalize("NFC", PurePosixPath(name).as_posix()).casefold()
        if key in first:
            other = names[first[key]]
            raise DataError(
                f"{place(row)}: expected every file once, found {name!a} after {other!a} "
                f"({place(first[key])}); remove one or rename it"
            )
        first[key] = row


def read_encoded(path: Path) -> Encoded:
    """The content of an image file, or what is wrong."""
    try:
        return path.read_bytes()
    except OSError as error:
        return DataError(f"the file cannot be read ({error.strerror or error})")
