"""Stores of schema 1, by the statements and with the rows that the version of that schema wrote."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.engine import Connection

from tribute.errors import StoreError
from tribute.store import migrations
from tribute.store.patience import Patience
from tribute.store.records import Store
from tribute.store.tables import SCHEMA_VERSION, metadata

SCHEMA_1 = Path(__file__).parent / "schema_1"
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def old_location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of schema 1 with rows of every kind."""
    is_file = request.param == "sqlite"
    location = str(tmp_path / "old.db") if is_file else request.getfixturevalue("postgres_url")
    statements = [
        statement
        for name in (request.param, "data")
        for statement in (SCHEMA_1 / f"{name}.sql").read_text().split(";\n")
        if statement.strip()
    ]
    engine = create_engine(url_of(location))
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement.replace("%", "%%"))
        if not is_file:
            for table in ("study", "evaluation", "artifact"):
                connection.exec_driver_sql(f"SELECT setval('{table}_id_seq', (SELECT max(id) FROM {table}))")
    engine.dispose()
    return location


def url_of(location: str) -> str:
    return location if "://" in location else f"sqlite:///{location}"


def look(location: str, what: Callable[[Engine], Any]) -> Any:
    """What a program that knows nothing of stores sees."""
    engine = create_engine(url_of(location))
    try:
        return what(engine)
    finally:
        engine.dispose()


def rows(engine: Engine) -> Rows:
    with engine.connect() as connection:
        return {
            table: sorted((dict(row._mapping) for row in connection.execute(text(f"SELECT * FROM {table}"))), key=str)
            for table in metadata.tables
        }


def schema_of(engine: Engine) -> dict[str, Any]:
    inspector = inspect(engine)
    return {
        table: (
            {c["name"]: (c["type"].python_type, c["nullable"]) for c in inspector.get_columns(table)},
            sorted((i["name"], i["column_names"]) for i in inspector.get_indexes(table) if not i.get("unique")),
        )
        for table in inspector.get_table_names()
    }


def without_what_is_new(found: Rows) -> Rows:
    return {
        table: [{name: value for name, value in row.items() if name not in ("heartbeat", "version")} for row in some]
        for table, some in found.items()
    }


def test_an_old_store_reads_the_same_after_its_migration(old_location: str, tmp_path: Path) -> None:
    before = look(old_location, rows)
    with Store.open(old_location, create=False) as store:
        after = look(old_location, rows)
        assert without_what_is_new(after) == without_what_is_new(before)
        assert {row["heartbeat"] for row in after["evaluation"]} == {None}
        assert [row["version"] for row in after["tribute_schema"]] == [SCHEMA_VERSION]
        assert store.check() == []
        assert store.counts() == {"pending": 2, "running": 1, "finished": 3, "failed": 1}
        table = store.read(behavior_name="fid", removal_dist="shapley")
        assert table.behaviors.tolist() == [1 / 3, 1 / 5] and table.definition == {
            "unit": "1",
            "variant": "classifier:01",
        }
        assert [s.contributor_names for s in store.studies(name="main")] == [
            ("ann", "=bob", "chlöe's", "<b>dan</b>", "")
        ]
        (running,) = store.running()
        assert running.heartbeat is None and running.lease_left > 0
        # And it is a store like any other.
        claim = store.claim(1, statuses=["pending"])
        assert claim is not None and store.heartbeat(claim)
        store.finish(claim, {"fid": 1.0}, seconds={}, provenance={})
        assert store.add(1, [claim.spec]) == [claim.evaluation_id]
    look(old_location, lambda engine: Store.open(old_location).close())  # a second time there is nothing to do


def test_a_migrated_store_has_the_schema_of_a_new_one(old_location: str, tmp_path: Path) -> None:
    with Store.open(old_location):
        migrated = look(old_location, schema_of)
    with Store.open(tmp_path / "new.db"):
        new = look(str(tmp_path / "new.db"), schema_of)
    assert migrated == new


def test_a_file_is_copied_before(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for name in ("sqlite", "data"):
            connection.executescript((SCHEMA_1 / f"{name}.sql").read_text())
        before = look(str(path), rows)
        with Store.open(path):  # while what is in the log is not in the file yet
            pass
    copy = tmp_path / "old.db.schema-1.bak"
    assert look(str(copy), rows) == before
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert {file.name for file in tmp_path.iterdir()} == {"old.db", copy.name}


def test_a_migration_that_ends_halfway_leaves_the_old_store(old_location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, schema = look(old_location, rows), look(old_location, schema_of)

    def crash(connection: Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE evaluation ADD COLUMN heartbeat DOUBLE PRECISION")
        connection.exec_driver_sql("UPDATE evaluation SET status = 'failed'")
        raise RuntimeError("the lights went out")

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", {1: crash})
        with pytest.raises(RuntimeError, match="lights"):
            Store.open(old_location)
    assert look(old_location, rows) == before and look(old_location, schema_of) == schema
    with Store.open(old_location) as store:
        assert store.check() == []


def test_of_several_that_open_it_at_once_one_migrates(old_location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, at_once = migrations.STEPS[1], threading.Barrier(4, timeout=60)
    migrated: list[int] = []
    errors: list[BaseException] = []

    def counted(connection: Connection) -> None:
        step(connection)
        migrated.append(1)

    def migrate(*args: Any) -> int:
        at_once.wait()  # all have seen schema 1
        return migrations.migrate(*args)

    def open_it() -> None:
        try:
            Store.open(old_location).close()
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(migrations, "STEPS", {1: counted})
    monkeypatch.setattr("tribute.store.database.migrate", migrate)
    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and migrated == [1]


def test_an_old_store_that_may_only_be_read_is_refused_with_the_remedy(
    old_location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "://" in old_location:
        for statement in (
            "CREATE ROLE reader LOGIN",
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
        ):
            execute(old_location, statement)
        location = old_location.replace("tribute@", "reader@")
    else:
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere, so say that we may not
        location = old_location
    try:
        with pytest.raises(StoreError, match=r"older schema than 2.*Open it once as a user who may write"):
            Store.open(location, create=False, patience=Patience(0))
    finally:
        if "://" in old_location:
            execute(old_location, "DROP OWNED BY reader; DROP ROLE reader")
    assert look(old_location, rows)["tribute_schema"] == [{"version": 1}]


def execute(location: str, statement: str) -> None:
    engine = create_engine(url_of(location))
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def test_a_copy_that_cannot_be_made_leaves_the_old_store(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        for name in ("sqlite", "data"):
            connection.executescript((SCHEMA_1 / f"{name}.sql").read_text())
    (tmp_path / "old.db.schema-1.bak").mkdir()
    with pytest.raises(StoreError, match=r"copied to old\.db\.schema-1\.bak.*Nothing was changed"):
        Store.open(path)
    assert look(str(path), rows)["tribute_schema"] == [{"version": 1}]


def test_a_schema_that_no_version_wrote_is_refused(old_location: str) -> None:
    execute(old_location, "UPDATE tribute_schema SET version = 0")
    with pytest.raises(StoreError, match=r"schema 1 to 2 was expected.*schema 0"):
        Store.open(old_location)
