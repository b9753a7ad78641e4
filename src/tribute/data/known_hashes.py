"""Hashes of large files that are computed once and trusted for as long as the file system says nothing has changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tribute.files import sha256_of_file, write_whole

# A change within the same tick of the file system's clock leaves the times as they are, so a file must be older than
# this before its hash is kept. Kernels tick every 1 to 10 ms, FAT every 2 s.
RACY_NS = 2_100_000_000


class KnownHashes:
    """Hashes by file, kept in a JSON file beside what they describe.

    A hash is trusted while the file's size, its times of modification and of change, and its inode are those of the
    moment when it was computed. Programs can set the time of modification but not that of change, so only somebody
    who goes around the file system changes content unseen.

    Args:
        memo_path: Where the hashes are kept. One that is missing, damaged or not writable costs time, nothing else.
        compute: From a file to its hash.
    """

    def __init__(self, memo_path: Path, compute: Callable[[Path], str] = sha256_of_file) -> None:
        self.memo_path = memo_path
        self.compute = compute
        self._known: dict[str, list[object]] = {}
        self._changed = False
        with suppress(OSError, ValueError, AttributeError):
            self._known = dict(json.loads(memo_path.read_text(encoding="utf-8")).items())

    def hash_of(self, path: Path) -> str:
        """The hash of a file, computed only where it is not known.

        Raises:
            OSError: The file cannot be read.
        """
        stamp = _stamp(path)
        match self._known.get(str(path)):
            case [known, str(sha256)] if known == stamp:
                return sha256
        now = time.time_ns()
        sha256 = self.compute(path)
        if stamp == _stamp(path) and max(stamp[1:3]) < now - RACY_NS:
            self._known[str(path)] = [stamp, sha256]
            self._changed = True
        return sha256

    def save(self) -> None:
        """Keep what was computed, if there is anything new."""
        if self._changed:
            with suppress(OSError):
                write_whole(self.memo_path, json.dumps(self._known))
            self._changed = False


def _stamp(path: Path) -> list[int]:
    """Size, time of modification and of change in ns, inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
