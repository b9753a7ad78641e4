"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

FOREIGN_SECONDS = 86_400.0
"""After this time a file that another machine or container began is taken for left behind."""

_CLOCK_SECONDS = 5.0
"""Clocks of files and processes agree within this time."""

_UNFINISHED = re.compile(r"^\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)\.(?P<kind>partial|replaced)$", re.DOTALL)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it: readers see the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished_path(path)
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
    partial, replaced = unfinished_path(path), unfinished_path(path, "replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.replace(replaced)
        partial.replace(path)
    finally:
        if replaced.exists() and not path.exists():  # it failed, or was interrupted, between the two renames
            replaced.replace(path)
        for rest in (partial, replaced):
            shutil.rmtree(rest, ignore_errors=True)


def unfinished_path(path: Path, kind: str = "partial") -> Path:
    """Where this process writes what is to become `path`: beside it, under a name that says whose it is.

    Args:
        path: The file or folder.
        kind: `partial`, or `replaced` for the old content while the new one takes its place.
    """
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{kind}")


def remove_leftovers(folder: Path, *, of: Path | None = None) -> list[Path]:
    """Remove what killed processes began below a folder, and put back what they had moved aside to replace it.

    What belongs to a process that lives is left alone. Whether one of another machine or container lives cannot be
    known here; what it began is removed when it was not touched for a day. The caller holds the lock of the folder,
    where it has one.

    Args:
        folder: Is searched, with the folders in it.
        of: Only what was to become this file or folder, in its own folder.

    Returns:
        What is gone.
    """
    gone = []
    for path in sorted(folder.rglob(".*") if of is None else of.parent.glob(".*")):
        found = _UNFINISHED.match(path.name)
        if found is None or (of is not None and found["name"] != of.name) or not _is_left(path, found):
            continue
        place = path.with_name(found["name"])
        with suppress(OSError):  # another process was faster, or the folder may only be read
            if found["kind"] == "replaced" and not place.exists():
                path.replace(place)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            gone.append(path)
    return gone


def _is_left(path: Path, found: re.Match[str]) -> bool:
    """Whether nobody is at work on an unfinished file or folder any more."""
    try:
        touched = path.lstat().st_mtime
    except OSError:
        return False
    if found["host"] != _host():
        return time.time() - touched > FOREIGN_SECONDS
    pid = int(found["pid"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # it lives under another user
    # A zombie has ended; one that started later was given the number of the one that had it before.
    state, started = _state_and_start(pid)
    return state in ("Z", "X") or (started is not None and touched < started - _CLOCK_SECONDS)


def _state_and_start(pid: int) -> tuple[str | None, float | None]:
    """State of a process, and when it started in seconds since the epoch; None where /proc does not tell."""
    try:
        # The command is in parentheses and may hold spaces; see proc(5), fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None, None
    return fields[0], time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


@cache
def _host() -> str:
    """What tells the processes that this one can see from all others: machine and container, 8 hexadecimal digits."""
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def room_sentence(path: Path, n_bytes: int | None = None) -> str:
    """How much room a disk has, and how much is needed, for the message of an error; empty where it is not known.

    Args:
        path: Where it is to be written; the folder above it need not be there.
        n_bytes: What is needed, where it is known.
    """
    needed = "" if n_bytes is None else f"about {_size(n_bytes)} needed, "
    for folder in (path, *path.parents):
        with suppress(OSError):
            return f"{needed}{_size(shutil.disk_usage(folder).free)} free"
    return needed.rstrip(", ")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the disk or the quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # libraries that are not Python have their own errors
            return True
        error = error.__cause__
    return False


def _size(n_bytes: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1024:.0f} KiB"


def _flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, so that the rename cannot overtake it."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
