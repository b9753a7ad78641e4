"""A store that is locked, away, restarted or full; and answers that are lost. Clocks are turned by hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from benchmarks.postgres import PostgresServer
from tests.store.content import claimed, finish, open_study, spec
from tribute.errors import StoreError
from tribute.store.patience import Patience
from tribute.store.records import Store


class Clock:
    """Time that passes only by sleeping; `on_sleep` gets the seconds slept so far."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.on_sleep: Callable[[float], object] = lambda _: None

    def now(self) -> float:
        return sum(self.delays)

    def sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        self.on_sleep(self.now())

    def patience(self, seconds: float = 90.0) -> Patience:
        return Patience(seconds, sleep=self.sleep, now=self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("tribute.store.database.BUSY_SECONDS", 0.0)  # SQLite's own waiting would be real
    return Clock()


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program that is writing to the file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other


# A file


def test_a_lock_that_is_let_go_after_a_minute_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "results.db"
    with Store.open(path, patience=clock.patience()) as store:
        study_id = open_study(store)
        with locked(path) as other:
            clock.on_sleep = lambda slept: other.execute("ROLLBACK") if other.in_transaction and slept >= 60 else None
            (number,) = store.add(study_id, [spec(0)])
        assert 60 <= clock.now() < 66
        assert clock.delays[:8] == [0.05 * 2**k for k in range(7)] + [5.0] and set(clock.delays[7:]) == {5.0}
        assert [s.evaluation_id for s in store.find()] == [number]


def test_a_lock_that_is_kept_is_given_up_and_nothing_is_written(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "results.db"
    with Store.open(path, patience=clock.patience()) as store:
        study_id = open_study(store)
        with locked(path), pytest.raises(StoreError, match=r"locked.*90 s.*PostgreSQL"):
            store.add(study_id, [spec(0)])
        assert clock.now() == pytest.approx(90)
        assert store.find() == []


def test_a_store_that_is_locked_when_it_is_opened_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "results.db"
    with locked(path) as other:
        clock.on_sleep = lambda _: other.execute("ROLLBACK") if len(clock.delays) == 3 else None
        with Store.open(path, patience=clock.patience()) as store:
            assert store.check() == []
    assert len(clock.delays) == 3


def test_a_file_whose_disk_is_away_is_waited_for_and_not_made_anew(tmp_path: Path, clock: Clock) -> None:
    folder, away = tmp_path / "disk", tmp_path / "away"
    path = folder / "results.db"
    with Store.open(path, patience=clock.patience()) as store:
        study_id = open_study(store)
        folder.rename(away)
        clock.on_sleep = lambda slept: away.rename(folder) if away.exists() and slept >= 30 else None
        store.add(study_id, [spec(0)])
        assert 30 <= clock.now() < 36
        folder.rename(away)
        clock.on_sleep = lambda _: None
        with pytest.raises(StoreError, match=r"the file is gone.*90 s"):
            store.find()
        assert not folder.exists()
    with Store.open(away / "results.db", create=False) as store:
        assert [s.spec for s in store.find()] == [spec(0)] and store.check() == []


def test_a_file_that_was_replaced_is_read_instead_of_the_one_that_is_still_open(tmp_path: Path, clock: Clock) -> None:
    path, restored = tmp_path / "results.db", tmp_path / "restored.db"
    for place, name in [(path, "old"), (restored, "new")]:
        with Store.open(place) as store:
            open_study(store, name=name)
    with Store.open(path, patience=clock.patience()) as store:
        assert [s.name for s in store.studies()] == ["old"]
        restored.replace(path)
        assert [s.name for s in store.studies()] == ["new"]


def test_a_full_disk_is_said_at_once_and_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "results.db"
    with Store.open(path, patience=clock.patience()) as store:
        study_id = open_study(store)
        store.add(study_id, [spec(seed) for seed in range(20)])
        finish(store, claimed(store), fid=1.0)
        claim = claimed(store)
        before = store.find()
        limits = [store.in_transaction(lambda c, _: c.execute(text("PRAGMA page_count")).scalar_one(), writes=False)]

        def limit(connection: sqlite3.Connection, _record: Any, _proxy: Any) -> None:
            connection.execute(f"PRAGMA max_page_count = {limits[-1]}")

        event.listen(store._engine, "checkout", limit)
        with pytest.raises(StoreError, match=r"database or disk is full.*intact.*Free some space"):
            store.add(study_id, [spec(seed) for seed in range(20, 2000)])
        big = {"fid": 2.0, **{f"generated_image_{idx}_mse": 0.5 for idx in range(2000)}}
        with pytest.raises(StoreError, match="full"):
            finish(store, claim, **big)
        assert clock.delays == [] and store.find() == before and store.check() == []
        limits.append(2**30)  # space was made
        finish(store, claim, **big)
        assert store.counts()["finished"] == 2 and store.check() == []


def test_a_store_that_became_read_only_is_said_at_once(tmp_path: Path, clock: Clock) -> None:
    with Store.open(tmp_path / "results.db", patience=clock.patience()) as store:
        study_id = open_study(store)
        event.listen(store._engine, "checkout", lambda connection, *_: connection.execute("PRAGMA query_only = ON"))
        with pytest.raises(StoreError, match="may write to"):
            store.add(study_id, [spec(0)])
    assert clock.delays == []


# A server


@pytest.fixture
def on_server(postgres_url: str, clock: Clock) -> Iterator[Store]:
    with Store.open(postgres_url, patience=clock.patience()) as store:
        yield store


def test_a_server_that_restarts_is_waited_for(
    postgres_server: PostgresServer, postgres_url: str, on_server: Store, clock: Clock
) -> None:
    store = on_server
    store.add(open_study(store), [spec(0), spec(1)])
    claim = claimed(store)
    started: list[float] = []

    def start(slept: float) -> None:
        if not started and slept >= 60:
            postgres_server.start()
            started.append(slept)

    clock.on_sleep = start
    for action in (
        lambda: finish(store, claim, fid=1.0),  # with a connection that broke
        lambda: finish(store, claimed(store), fid=2.0),
        lambda: Store.open(postgres_url, patience=clock.patience()).close(),
    ):
        clock.delays.clear()
        started.clear()
        postgres_server.stop()
        action()
        assert started and 60 <= clock.now() < 66
    assert [s.behaviors for s in store.find()] == [{"fid": 1.0}, {"fid": 2.0}] and store.check() == []


def test_a_server_that_stays_away_is_given_up(postgres_server: PostgresServer, on_server: Store, clock: Clock) -> None:
    postgres_server.stop()
    try:
        with pytest.raises(StoreError, match=r"does not answer.*tried for 90 s"):
            on_server.studies()
    finally:
        postgres_server.start()
    assert clock.now() == pytest.approx(90)
    assert on_server.studies() == []


@pytest.mark.parametrize(("state", "passes"), [("40001", True), ("40P01", True), ("57P03", True), ("22012", False)])
def test_conflicts_are_tried_again_and_mistakes_are_not(
    on_server: Store, clock: Clock, state: str, passes: bool
) -> None:
    def work(connection: Any, number: int) -> int:
        if number < 2:
            connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"))
        return number

    if passes:
        assert on_server.in_transaction(work, writes=True) == 2 == len(clock.delays)
    else:
        with pytest.raises(StoreError, match="no"):
            on_server.in_transaction(work, writes=True)
        assert clock.delays == []


def test_a_wrong_database_is_said_at_once(postgres_server: PostgresServer, clock: Clock) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        Store.open(postgres_server.url("nowhere"), patience=clock.patience())
    assert clock.delays == []


# Answers that are lost


@pytest.fixture
def answers_are_lost(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After it is called, the next commit happens, but the driver says that the connection broke."""
    monkeypatch.setattr(store, "_patience", clock.patience())
    dialect = store._engine.dialect
    commit = dialect.do_commit
    left = [0]

    def commit_without_answer(connection: Any) -> None:
        commit(connection)
        if left[0]:
            left[0] -= 1
            if dialect.name == "sqlite":
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            raise dialect.loaded_dbapi.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", commit_without_answer)

    def lose_one() -> None:
        left[0] = 1

    return lose_one


def test_every_write_may_happen_without_its_answer(
    store: Store, study_id: int, answers_are_lost: Callable[[], None], clock: Clock
) -> None:
    answers_are_lost()
    other = open_study(store, name="other")
    answers_are_lost()
    ids = store.add(study_id, [spec(seed) for seed in range(3)])
    assert [s.evaluation_id for s in store.find()] == ids and len(store.studies()) == 2
    answers_are_lost()
    claim = claimed(store)
    assert (claim.evaluation_id, claim.attempts) == (ids[0], 1)
    assert [(r.evaluation_id, r.attempts) for r in store.running()] == [(ids[0], 1)]  # not a second one
    answers_are_lost()
    assert store.heartbeat(claim)
    answers_are_lost()
    finish(store, claim, fid=1.0)
    claim = claimed(store)
    answers_are_lost()
    store.fail(claim, "no")
    claim = claimed(store)
    answers_are_lost()
    assert store.release(claim)
    assert [(s.status, s.attempts, s.behaviors) for s in store.find(study_id)] == [
        *(("finished", 1, {"fid": 1.0}), ("failed", 1, {}), ("pending", 0, {}))
    ]
    answers_are_lost()
    store.record_artifact(other, "model", "x", sha256="aa")
    assert len(store.artifacts(other)) == 1
    answers_are_lost()
    store.reset(study_id)
    assert store.counts(study_id)["pending"] == 3
    answers_are_lost()
    store.delete_study(study_id)
    assert [s.name for s in store.studies()] == ["other"]
    assert len(clock.delays) == 10 and store.check() == []


def test_an_error_keeps_its_cause(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "results.db"
    with Store.open(path, patience=clock.patience(0)) as store, locked(path), pytest.raises(StoreError) as caught:
        open_study(store)
    assert isinstance(caught.value.__cause__, OperationalError) and clock.delays == []
