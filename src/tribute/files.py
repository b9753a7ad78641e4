"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it: readers see the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole_dir(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place with `write(partial)`, then rename it into place.

    A folder already at `path` is replaced only once the new one is complete; when `write` fails, it
    stays as it was and the partial folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():
            path.replace(replaced)
        try:
            partial.replace(path)
        except OSError:
            if replaced.exists():
                replaced.replace(path)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, so that the rename cannot overtake it."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
