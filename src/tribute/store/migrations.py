"""From the tables of an older version to those of this one.

Opening a store of an older schema migrates it: one step per version, each in one transaction together with the new
version number, so that a crash leaves the store at the version before or after a step. A SQLite file is first copied to
`NAME.schema-1.bak` beside it (the number is that of the older schema). Of several processes that open the store at
once, one migrates and the others wait. Steps only add: a process of the older version that has the store open goes on
working.

A change of `tables` that older stores lack needs a step here, and `SCHEMA_VERSION` one more.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, update
from sqlalchemy.engine import Connection

from tribute.errors import StoreError
from tribute.store import tables
from tribute.store.patience import Patience

logger = logging.getLogger(__name__)


def _add_heartbeats(connection: Connection) -> None:
    """Schema 2: the last sign of life of a claim, and an index in the order of claims."""
    connection.exec_driver_sql("ALTER TABLE evaluation ADD COLUMN heartbeat DOUBLE PRECISION")
    connection.exec_driver_sql("CREATE INDEX evaluation_to_claim ON evaluation (study_id, status, priority, id)")


STEPS: Mapping[int, Callable[[Connection], None]] = {1: _add_heartbeats}
"""By schema version: what turns it into the next one. SQL in full, for `tables` shows the newest schema only."""


def migrate(engine: Engine, patience: Patience, place: str, file: Path | None) -> int:
    """Bring the tables to the schema of this version and return its number.

    Args:
        engine: For transactions that write.
        patience: With a database that is locked or does not answer.
        place: The store, for people.
        file: The file of a SQLite store.

    Raises:
        StoreError: The store may not be written, there is no space for the copy, or its schema is unknown.
    """
    if file is not None and not os.access(file, os.W_OK):
        raise not_writable(place)

    def step(_number: int) -> int:
        with engine.begin() as connection:
            tables.lock_schema(connection)
            version = tables.stored_version(connection) or 0
            if version >= tables.SCHEMA_VERSION:  # another process was faster
                return version
            if version not in STEPS:
                raise StoreError(
                    f"A store of schema {min(STEPS)} to {tables.SCHEMA_VERSION} was expected; {place} has schema "
                    f"{version}. Restore it from a backup."
                )
            if file is not None:
                _copy(file, file.with_name(f"{file.name}.schema-{version}.bak"))
            STEPS[version](connection)
            connection.execute(update(tables.schema).values(version=version + 1))
        logger.info("The store %s was migrated from schema %d to %d", place, version, version + 1)
        return version + 1

    version = 0
    while version < tables.SCHEMA_VERSION:
        try:
            version = patience.insist(step, place)
        except StoreError as error:
            if "readonly" in str(error) or "permission" in str(error) or "must be owner" in str(error):
                raise not_writable(place) from error
            raise
    return version


def not_writable(place: str) -> StoreError:
    """Of an older store that is not, or cannot be, migrated now."""
    return StoreError(
        f"The store {place} has an older schema than {tables.SCHEMA_VERSION}, which this version of Tribute reads, and "
        "may not be written, so that it cannot be migrated. Open it once as a user who may write to it (any command "
        "does it), or copy it to a place of your own."
    )


def _copy(file: Path, copy: Path) -> None:
    """Copy a database whole, with what is in its log, while nobody can write to it."""
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
    try:
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        partial.replace(copy)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            f"The store {file} is copied to {copy.name} before its schema is migrated; that failed: {error}. Nothing "
            "was changed. Make space, or let this user write to the folder."
        ) from error
    finally:
        for name in (partial, partial.with_name(f"{partial.name}-journal")):
            name.unlink(missing_ok=True)
