"""What to do when the database does not answer: wait for what passes, say at once what does not.

A lock is let go, a server comes back from its restart, a deadlock is resolved by whoever tries again. A full disk, a
file that is not a database or a wrong password stay as they are. Delays double from one attempt to the next.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from tribute.errors import StoreError, printable

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Primary result codes of SQLite that pass (https://sqlite.org/rescode.html): busy, locked, a disk that does not
# answer, and a race for the locks of the write-ahead log.
_PASSING_SQLITE = frozenset([sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL])
# States of PostgreSQL that pass, by class: connection, transaction rolled back (serialization failure, deadlock) ...
_PASSING_CLASSES = ("08", "40")
# ... and one by one: too many connections, lock not available, shutdown, crash, starting up, idle session.
_PASSING_STATES = frozenset(["53300", "55P03", "57P01", "57P02", "57P03", "57P05"])
# A failed attempt to connect has no state. These texts of it tell of a mistake, not of an absence.
_LASTING_TEXTS = ("authentication", "password", "does not exist", "pg_hba.conf", "Name or service not known")


class FileGone(sqlite3.OperationalError):
    """The file of the store is not where it was: its disk may come back."""


@dataclass(frozen=True)
class Patience:
    """How long a transaction is tried again while the database does not answer.

    Attributes:
        seconds: How long in all; 0 tries once.
        first_delay: Seconds before the second attempt; each further delay is twice the one before.
        longest_delay: No delay is longer, in seconds.
        sleep: Waits for a number of seconds.
        now: A clock that never goes back, in seconds.
    """

    seconds: float = 90.0
    first_delay: float = 0.05
    longest_delay: float = 5.0
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic

    def insist(self, attempt: Callable[[int], Result], place: str) -> Result:
        """What `attempt` returns; it is called with 0, 1, 2, ... while it fails for a reason that passes.

        Args:
            attempt: One whole transaction, safe to repeat even where it happened and only the answer was lost.
            place: The store, for people.

        Raises:
            StoreError: The reason lasts, or lasted for `seconds`.
        """
        start = self.now()
        delay = self.first_delay
        number = 0
        while True:
            try:
                return attempt(number)
            except DBAPIError as error:
                waited = self.now() - start
                if not passes(error) or waited >= self.seconds:
                    raise _store_error(error, place, waited) from error
                if number == 0:
                    logger.info("The store %s does not answer: %s. Trying again", place, _found(error))
                elif delay >= self.longest_delay:
                    logger.warning(
                        "The store %s has not answered for %.0f s: %s. Trying again for up to %.0f s",
                        *(place, waited, _found(error), self.seconds),
                    )
            self.sleep(min(delay, self.seconds - waited))
            delay = min(2 * delay, self.longest_delay)
            number += 1


def passes(error: DBAPIError) -> bool:
    """Whether trying again may succeed without anybody's doing."""
    cause = error.orig
    if isinstance(cause, FileGone):
        return True
    if isinstance(cause, sqlite3.Error):
        # The low byte is the primary code; an error of the Python module itself has none.
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in _PASSING_SQLITE
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if state is not None:
        return state[:2] in _PASSING_CLASSES or state in _PASSING_STATES
    if error.connection_invalidated:
        return True
    text = str(cause)
    is_absent = isinstance(error, OperationalError | InterfaceError) and "connect" in text
    return is_absent and not any(lasting in text for lasting in _LASTING_TEXTS)


def _found(error: DBAPIError) -> str:
    """What the driver says, in one line."""
    return printable(" ".join(str(error.orig).split()))


def _store_error(error: DBAPIError, place: str, waited: float) -> StoreError:
    """The error with the name of the store and a remedy."""
    found = _found(error)
    state = getattr(error.orig, "sqlstate", None) or ""
    if "not a database" in found or "malformed" in found:
        remedy = "Give another path, or restore the file from a backup or an export."
    elif "is full" in found or state == "53100":
        remedy = (
            "Nothing of this write was stored, and what was stored before is intact. Free some space "
            "(`tribute gc` names what may go), then run again: the study goes on where it stopped."
        )
    elif "locked" in found:
        remedy = (
            f"Another process kept it for {waited:.0f} s: end that one, or run again later; use a PostgreSQL URL "
            "for many writers."
        )
    elif "readonly" in found or "read-only" in found or "unable to open" in found or state == "42501":
        remedy = "Give a place that this user may write to."
    elif passes(error):
        remedy = f"It was tried for {waited:.0f} s. Check that the database is up and within reach, then run again."
    else:
        remedy = "Check that the database is up, that it has space, and that its URL is right."
    return StoreError(f"The store {place} does not answer: {found}. {remedy}")
