"""The database that holds the store: where it is, how it is opened, and what keeps its writers apart.

A plain path means a SQLite file; any other location is an SQLAlchemy URL.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, insert, inspect
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError, NoSuchModuleError

from tribute.errors import StoreError
from tribute.store.migrations import migrate, not_writable
from tribute.store.patience import FileGone, Patience
from tribute.store.tables import SCHEMA_VERSION, lock_schema, metadata, schema, stored_version

BUSY_SECONDS = 5.0
"""How long a SQLite connection waits for another writer by itself; `Patience` then tries again."""

_WRITES = "tribute_writes"
_NETWORK_FILE_SYSTEMS = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "sshfs"]
)


def open_database(location: str | Path, *, create: bool, patience: Patience, read_only: bool = False) -> Engine:
    """Open the database at `location`, with the tables of this version in it.

    Tables of an older version are migrated, see `migrations`, unless it is only read.

    Args:
        location: Path of a SQLite file, or an SQLAlchemy URL.
        create: Make the file, its folders and the tables where they are missing.
        patience: With a database that is locked or does not answer.
        read_only: Transactions of a server may not write, and nothing is migrated. A SQLite file says so in its URL.

    Raises:
        StoreError: The place cannot hold a store, or holds something else; the message says what to do.
    """
    url = _database_url(location)
    is_sqlite = url.get_backend_name() == "sqlite"
    file = database_file(url)
    if file is not None:
        _check_file(file, create=create)
    try:
        engine = create_engine(
            url,
            connect_args={"timeout": BUSY_SECONDS} if is_sqlite else {},
            execution_options={"postgresql_readonly": True} if read_only and not is_sqlite else {},
        )
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise StoreError(
            f"A store needs a database whose driver is installed; {shown(url)} gave: {error}. "
            "Install the driver (PostgreSQL: pip install 'tribute[postgresql]'), or give the path of a SQLite file."
        ) from error
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        _prepare_schema(engine, create=create, patience=patience, read_only=read_only)
        if file is not None:
            _use_write_ahead_log(engine)
            _watch_file(engine, file)
    except BaseException:
        engine.dispose()
        raise
    return engine


def writer(engine: Engine) -> Engine:
    """The same database for transactions that write: SQLite then locks at their start, not halfway."""
    return engine.execution_options(**{_WRITES: True})


def shown(url: URL) -> str:
    """The location as people know it: the path of a SQLite file, or the URL without its password."""
    file = database_file(url)
    return str(file) if file is not None else url.render_as_string(hide_password=True)


def database_file(url: URL) -> Path | None:
    """The file of a SQLite URL; None for one in memory and for servers."""
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or name in ("", ":memory:") or name.startswith("file:"):
        return None
    return Path(name)


def network_file_system(path: Path, mounts: str) -> str | None:
    """Type of the network file system that holds `path`, by the text of /proc/mounts; None if it is local."""
    holder, kind = Path("/"), ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        mount_point = Path(fields[1].replace("\\040", " "))
        # A later mount over the same place hides the earlier one.
        if path.is_relative_to(mount_point) and len(mount_point.parts) >= len(holder.parts):
            holder, kind = mount_point, fields[2].removeprefix("fuse.")
    return kind if kind in _NETWORK_FILE_SYSTEMS else None


def _database_url(location: str | Path) -> URL:
    """URL of a location; whatever has no `://` in it is a path."""
    text = str(location)
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        return make_url(text)
    except ArgumentError as error:
        raise StoreError(
            f"A store is the path of a SQLite file or a URL such as postgresql+psycopg://user@host/name; "
            f"found {text.split('://')[0]}://..., which is neither: {error}."
        ) from error


def _check_file(file: Path, *, create: bool) -> None:
    """Refuse a place that cannot hold a SQLite store, and make its folders."""
    expected = "A store is a SQLite file that this user may write to"
    if file.is_dir():
        raise StoreError(f"{expected}; {file} is a directory. Give a file in it, e.g. {file / 'results.db'}.")
    if not create and not file.exists():
        raise StoreError(f"{expected}; {file} does not exist. Check the path, or run the step that writes it.")
    try:
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
        place = file if file.exists() else file.parent
    except OSError as error:
        raise StoreError(
            f"{expected}; the folder of {file} cannot be made: {error.strerror}. Give another path."
        ) from error
    if create and not os.access(place, os.W_OK):
        raise StoreError(f"{expected}; {place} is not writable. Change its permissions, or give another path.")
    mounts = Path("/proc/self/mounts")
    kind = network_file_system(file.resolve(), mounts.read_text()) if mounts.exists() else None
    if kind is not None:
        # The write-ahead log needs memory that all of its processes share, so they must be on one host.
        raise StoreError(
            f"SQLite needs a local disk; {file} is on a network file system ({kind}), where several hosts "
            "would damage it. Put the store on a local disk, or use PostgreSQL: postgresql+psycopg://..."
        )


def _set_up_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    """Let SQLAlchemy begin the transactions, not the driver, and enforce foreign keys."""
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    # With a write-ahead log a power cut may undo the last commits (to be measured again); it damages nothing.
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at once where it will be needed: a later upgrade of a read lock cannot wait."""
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _use_write_ahead_log(engine: Engine) -> None:
    """Let readers and a writer work at once; a file where this is impossible works without."""
    with closing(engine.raw_connection()) as connection, suppress(sqlite3.OperationalError):
        connection.cursor().execute("PRAGMA journal_mode = WAL")


def _watch_file(engine: Engine, file: Path) -> None:
    """From now on refuse to use a file that is gone or was replaced, instead of writing where nobody will read.

    An open file outlives its name, and SQLite would make a missing one anew; a disk that is away for a moment must not
    end in an empty store.
    """

    def identify() -> tuple[int, int]:
        try:
            status = file.stat()
        except OSError as error:
            raise FileGone(f"the file is gone ({error.strerror})") from error
        return status.st_dev, status.st_ino

    def before_connecting(_dialect: Any, record: Any, _args: Any, _options: Any) -> None:
        identify()

    def connected(_connection: sqlite3.Connection, record: Any) -> None:
        record.info["file"] = identify()

    def checked_out(_connection: sqlite3.Connection, record: Any, _proxy: Any) -> None:
        # A connection from before this watch, or to a file that another one has replaced, is closed and made anew.
        if record.info.get("file") != identify():
            raise DisconnectionError

    event.listen(engine, "do_connect", before_connecting)
    event.listen(engine, "connect", connected)
    event.listen(engine, "checkout", checked_out)


def _prepare_schema(engine: Engine, *, create: bool, patience: Patience, read_only: bool) -> None:
    """Create the tables in an empty database, migrate older ones; refuse those of strangers and of newer versions."""
    place = shown(engine.url)

    def read_version(_number: int) -> int | None:
        with engine.begin() as connection:
            return stored_version(connection)

    def make(_number: int) -> int:
        with writer(engine).begin() as connection:
            return _create_schema(connection)

    version = patience.insist(read_version, place)
    if version is None and create:
        version = patience.insist(make, place)
    if version is None:
        raise StoreError(f"A store of Tribute was expected; {place} has none. Check the path or URL.")
    if version < SCHEMA_VERSION:
        if read_only:
            raise not_writable(place)
        version = migrate(writer(engine), patience, place, database_file(engine.url))
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"This version of Tribute reads stores of schema {SCHEMA_VERSION}; {place} has schema {version}, "
            "written by a newer version. Upgrade it (pip install --upgrade tribute), or give another store."
        )


def _create_schema(connection: Connection) -> int:
    """Create all tables, unless another process was faster, and return the version."""
    lock_schema(connection)
    version = stored_version(connection)
    if version is not None:
        return version
    strangers = sorted(inspect(connection).get_table_names())
    if strangers:
        raise StoreError(
            f"A new store needs a database of its own; {shown(connection.engine.url)} has other tables: "
            f"{', '.join(strangers[:5])}. Give another file, database or schema."
        )
    metadata.create_all(connection)
    connection.execute(insert(schema).values(version=SCHEMA_VERSION))
    return SCHEMA_VERSION
