from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from tribute.errors import StoreError
from tribute.seeding import numpy_stream
from tribute.store.patience import Patience
from tribute.store.records import EvaluationSpec, Store

N = 6
N_EVALUATIONS = 60
PROCESSES = multiprocessing.get_context("spawn")


def make_specs() -> list[EvaluationSpec]:
    return [
        EvaluationSpec(
            exp_name="e1",
            dataset="digits",
            method="gd",
            removal_dist="shapley",
            datamodel_alpha=None,
            removal_seed=seed,
            coalition_mask=numpy_stream(0, "test-mask", seed).random(N) < 0.5,
            opt_seed=0,
            settings={"gd_steps": 1},
        )
        for seed in range(N_EVALUATIONS)
    ]


def open_study(store: Store) -> int:
    return store.open_study(
        "main", dataset="digits", contributor_names=list("abcdef"), n_examples=[1] * N, fingerprint="f"
    )


def work(path: str | Path, worker: int, channel: Connection) -> None:
    """Open the new store, ask for everything one by one, and measure what can be had."""
    channel.recv()
    mine = []
    with Store.open(path) as store:
        study_id = open_study(store)
        specs = make_specs()
        for one in specs if worker % 2 else reversed(specs):
            store.add(study_id, [one])
        while (claim := store.claim(study_id)) is not None:
            value = float(claim.spec.removal_seed or 0)
            store.finish(claim, {"fid": value}, seconds={}, provenance={"worker": worker})
            mine.append(claim.evaluation_id)
    channel.send(mine)


def claim_and_hang(path: Path, channel: Connection) -> None:
    """Claim one evaluation, and be in the middle of a write to another one."""
    with Store.open(path) as store:
        claim = store.claim()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("PRAGMA cache_spill = 1")
            connection.execute("UPDATE evaluation SET status = 'running', error = 'half written' WHERE id > 1")
            channel.send(None if claim is None else claim.evaluation_id)
            channel.recv()


@pytest.mark.parametrize(("database", "n_processes"), [("sqlite", 3), ("postgresql", 4)])
def test_processes_that_work_at_once_lose_and_double_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, database: str, n_processes: int
) -> None:
    """From independent jobs that make the study and ask for the same evaluations, to the last result."""
    path = tmp_path / "results.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    workers, channels = [], []
    for worker in range(n_processes):
        here, there = PROCESSES.Pipe()
        workers.append(PROCESSES.Process(target=work, args=(path, worker, there)))
        channels.append(here)
    for process in workers:
        process.start()
    for channel in channels:
        channel.send("go")
    claimed = [channel.recv() for channel in channels]
    for process, channel in zip(workers, channels, strict=True):
        process.join()
        channel.close()
        assert process.exitcode == 0
    ids = [evaluation_id for mine in claimed for evaluation_id in mine]
    assert len(ids) == len(set(ids)) == N_EVALUATIONS
    with Store.open(path, create=False) as store:
        assert store.counts() == {"pending": 0, "running": 0, "finished": N_EVALUATIONS, "failed": 0}
        table = store.read(behavior_name="fid")
        np.testing.assert_array_equal(table.behaviors, np.arange(N_EVALUATIONS))
        found = store.find()
        assert all(stored.attempts == 1 for stored in found)
        assert len(store.studies()) == 1 and store.check() == []
        for worker, mine in enumerate(claimed):
            assert [s.evaluation_id for s in found if s.provenance["worker"] == worker] == sorted(mine)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the reaped process is recognised by /proc")
@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_process_leaves_its_evaluation_claimable_at_once(tmp_path: Path, is_reaped: bool) -> None:
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        ids = store.add(open_study(store), make_specs())
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=claim_and_hang, args=(path, there))
        process.start()
        there.close()
        assert here.recv() == ids[0] and process.pid is not None
        assert store.counts()["running"] == 1
        os.kill(process.pid, signal.SIGKILL)
        # An unreaped process is a zombie, which is what the child of a driver becomes.
        if is_reaped:
            process.join()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        claim = store.claim()
        assert claim is not None and (claim.evaluation_id, claim.attempts) == (ids[0], 2)
        store.finish(claim, {"fid": 1.0}, seconds={}, provenance={})
        assert store.counts() == {"pending": N_EVALUATIONS - 1, "running": 0, "finished": 1, "failed": 0}
        assert all(stored.error is None for stored in store.find())
        process.join()
        process.close()
        here.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_threads_share_a_store(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.db") as store:
        store.add(open_study(store), make_specs())
        claimed: list[int] = []

        def take() -> None:
            while (claim := store.claim()) is not None:
                if store.heartbeat(claim):
                    claimed.append(claim.evaluation_id)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(claimed) == len(set(claimed)) == N_EVALUATIONS


def test_a_store_that_stays_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tribute.store.database.BUSY_SECONDS", 0.0)
    path = tmp_path / "results.db"
    with (
        Store.open(path, patience=Patience(seconds=0)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        study_id = open_study(store)
        other.execute("BEGIN IMMEDIATE")
        assert store.counts()["pending"] == 0  # reading goes on beside a writer
        with pytest.raises(StoreError, match="locked"):
            store.add(study_id, make_specs())
        other.execute("ROLLBACK")
        assert len(store.add(study_id, make_specs())) == N_EVALUATIONS
