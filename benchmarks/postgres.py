"""A throw-away PostgreSQL server on a loopback port, from the programs of the operating system's package."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

_USER = "tribute"
_STOP_SECONDS = 60


def find_program(name: str) -> Path | None:
    """The newest program of this name in Debian's place, else on PATH; None where there is none."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: _number(path.parts[4]))
    found = str(versions[-1]) if versions else shutil.which(name)
    return None if found is None else Path(found)


def missing_programs() -> str | None:
    """Why no server can be started here; None where it can."""
    if os.name != "posix":
        return "a throw-away PostgreSQL server is started on Unix only"
    missing = [name for name in ("initdb", "pg_ctl") if find_program(name) is None]
    if missing:
        return f"PostgreSQL's {', '.join(missing)} not found: apt-get install postgresql"
    if os.geteuid() == 0 and _account() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres"
    return None


class PostgresServer:
    """A cluster in a temporary folder, removed with all its databases at the end; a context manager.

    Args:
        is_durable: Wait for the disk at every commit, as servers do by default. Tests do not need it.
    """

    def __init__(self, *, is_durable: bool = False) -> None:
        self.is_durable = is_durable
        self.port = _free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="tribute-postgres-"))
        self._n_databases = 0
        self._free_databases: list[str] = []

    def __enter__(self) -> PostgresServer:
        account = _account() if os.geteuid() == 0 else None
        if account is not None:  # initdb refuses to run as root
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        try:
            options = ["--auth=trust", f"--username={_USER}", "--encoding=UTF8", "--locale=C"]
            self._run("initdb", "-D", str(self._data), *options, *([] if self.is_durable else ["--no-sync"]))
            self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self._folder,
            **({} if self.is_durable else {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}),
        }
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self._folder / "log"), "-o", options)

    def stop(self) -> None:
        """End the server; its clients lose their connections."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self._data))

    def url(self, database: str) -> str:
        """Where a store in this database is."""
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Name of an empty database."""
        if self._free_databases:
            return self._free_databases.pop()
        self._n_databases += 1
        name = f"test_{self._n_databases}"
        self._execute("postgres", f"CREATE DATABASE {name}")
        return name

    def empty_database(self, name: str) -> None:
        """Delete all that is in a database and let it be used again, for making one takes half a second."""
        self._execute(
            name,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{name}' AND pid <> pg_backend_pid()",
            "DROP SCHEMA public CASCADE",
            "CREATE SCHEMA public",
            "GRANT USAGE ON SCHEMA public TO PUBLIC",
        )
        self._free_databases.append(name)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _execute(self, database: str, *statements: str) -> None:
        import psycopg  # an extra

        where = {"host": "127.0.0.1", "port": self.port, "user": _USER, "dbname": database}
        with psycopg.connect(**where, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def _run(self, name: str, *arguments: str) -> None:
        program = find_program(name)
        if program is None:
            raise FileNotFoundError(f"{name} was expected on PATH; found none. Install PostgreSQL.")
        account = _account() if os.geteuid() == 0 else None
        # The output goes to a file: a server would keep a pipe open for as long as it runs.
        with (self._folder / "output").open("w") as output:
            finished = subprocess.run(
                [program, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                user=None if account is None else account.pw_uid,
                group=None if account is None else account.pw_gid,
                extra_groups=None if account is None else [],
                timeout=_STOP_SECONDS,
            )
        if finished.returncode:
            raise RuntimeError(f"{name} failed with {finished.returncode}: {(self._folder / 'output').read_text()}")


def _account() -> pwd.struct_passwd | None:
    """The user that Debian's package makes."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def _number(text: str) -> float:
    """A version for comparison; what is none comes first."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def _free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
