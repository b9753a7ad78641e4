"""How fast evaluations are claimed and finished, beside the least that the database needs for it.

Every evaluation is claimed by one transaction and finished by another. The baseline does the same two writes in bare
SQL on a table of the same database: an update and a commit, an update with an insert and a commit, one evaluation after
another, one process. What is left to do after the run is counted and every result is compared with what was asked for.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.cells import markdown_table
from benchmarks.postgres import PostgresServer, missing_programs
from tribute.seeding import numpy_stream
from tribute.store.records import EvaluationSpec, Store

Ids = Literal["all", "plan", "scattered"]
TARGET = 200.0
"""Evaluations per second that every row must exceed."""

_PROCESSES = multiprocessing.get_context("spawn")
_SETTINGS = {
    "model": {"sha256": "0" * 64, "steps": 500, "pruning_ratio": 0.3, "pruner": "magnitude"},
    "train": {"n_steps": 400, "batch_size": 64, "learning_rate": 1e-4, "optimizer": "adamw", "precision": "float32"},
    "sampler": {"name": "ddim", "n_steps": 50, "n_images": 1000, "seed": 0, "eta": 0.0},
    "behaviors": ["fid", "inception_score", "entropy"],
}
_BEHAVIORS = ("fid", "inception_score", "entropy")


@dataclass
class Options:
    """What is measured.

    Attributes:
        n: Evaluations that are pending at the start.
        n_contributors: Contributors of the study.
        processes: Processes that work on PostgreSQL at once.
        ids: `all` claims whatever the study has, `plan` names the numbers of the plan with every claim, as a study
            does, `scattered` names every other number of a store twice as large.
        databases: Where.
        not_durable: Let the PostgreSQL server forget its last commits in a power cut, as in the tests.
    """

    n: int = 10_000
    n_contributors: int = 100
    processes: int = 4
    ids: tuple[Ids, ...] = ("all", "plan", "scattered")
    databases: tuple[Literal["sqlite", "postgresql"], ...] = ("sqlite", "postgresql")
    not_durable: bool = False


def make_specs(n: int, n_contributors: int) -> list[EvaluationSpec]:
    """Coalitions of half the contributors, with settings as large as those of a study."""
    masks = numpy_stream(0, "benchmark-store").random((n, n_contributors)) < 0.5
    return [
        EvaluationSpec("store", "digits", "gd", "shapley", None, seed, masks[seed], 0, _SETTINGS, "fit", priority=1)
        for seed in range(n)
    ]


def fill(location: str | Path, n: int, n_contributors: int, ids: Ids) -> tuple[int, list[int] | None]:
    """A new store with `n` evaluations to be done; the study, and the numbers that are to be claimed, if any."""
    with Store.open(location) as store:
        study_id = store.open_study(
            "store",
            dataset="digits",
            contributor_names=[f"vendor {i}" for i in range(n_contributors)],
            n_examples=[10] * n_contributors,
            fingerprint="f",
        )
        numbers = store.add(study_id, make_specs(2 * n if ids == "scattered" else n, n_contributors))
    return study_id, {"all": None, "plan": numbers, "scattered": numbers[::2]}[ids]


def claim_and_finish(location: str | Path, study_id: int, ids: Sequence[int] | None) -> list[int]:
    """Work until nothing is left; the numbers of what was finished."""
    done = []
    with Store.open(location, create=False) as store:
        while (claimed := store.claim(study_id, evaluation_ids=ids)) is not None:
            seed = float(claimed.spec.removal_seed or 0)
            store.finish(
                claimed,
                {name: seed + position for position, name in enumerate(_BEHAVIORS)},
                seconds={"train": 1.0, "sample": 1.0},
                provenance={"device": "cpu", "versions": {"torch": "2"}, "commit": "0" * 40},
                definitions={name: {"unit": "1", "variant": "classifier:0123"} for name in _BEHAVIORS},
            )
            done.append(claimed.evaluation_id)
    return done


def _work(location: str, study_id: int, ids: list[int] | None, channel: Connection) -> None:
    channel.send("ready")
    channel.recv()
    channel.send(claim_and_finish(location, study_id, ids))


def work_together(location: str, study_id: int, ids: list[int] | None, n_processes: int) -> tuple[float, list[int]]:
    """Seconds from the start of work to its end in the last process, and the numbers that all have finished."""
    channels, workers = [], []
    for _ in range(n_processes):
        here, there = _PROCESSES.Pipe()
        workers.append(_PROCESSES.Process(target=_work, args=(location, study_id, ids, there)))
        workers[-1].start()
        channels.append(here)
    for channel in channels:
        channel.recv()
    start = time.perf_counter()
    for channel in channels:
        channel.send("go")
    done = [number for channel in channels for number in channel.recv()]
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return seconds, done


def check(location: str | Path, n: int, done: Sequence[int]) -> None:
    """Nothing is lost, doubled or changed.

    Raises:
        RuntimeError: Something is.
    """
    with Store.open(location, create=False) as store:
        table = store.read(behavior_name="inception_score")
        found = {
            "finished once each": len(done) == len(set(done)) == n,
            "all are in the store": sorted(done) == sorted(table.evaluation_ids.tolist()),
            "every value is that of its coalition": np.array_equal(table.behaviors, table.removal_seeds + 1.0),
            "each was claimed once": all(s.attempts == 1 for s in store.find(statuses=["finished"])),
            "the store is sound": store.check() == [],
        }
    wrong = [rule for rule, holds in found.items() if not holds]
    if wrong:
        raise RuntimeError(f"{location}: not true that {'; '.join(wrong)}")


def sqlite_baseline(path: Path, n: int) -> float:
    """Evaluations per second of the same writes in bare SQL."""
    result = json.dumps({"device": "cpu"})
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE evaluation (id INTEGER PRIMARY KEY, status TEXT, provenance TEXT)")
        connection.execute(
            "CREATE TABLE behavior (evaluation_id INTEGER, name TEXT, value DOUBLE, PRIMARY KEY (evaluation_id, name))"
        )
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO evaluation (status) VALUES (?)", [("pending",)] * n)
        connection.execute("COMMIT")
        start = time.perf_counter()
        for number in range(1, n + 1):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE evaluation SET status = 'running' WHERE id = ?", (number,))
            connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "UPDATE evaluation SET status = 'finished', provenance = ? WHERE id = ?", (result, number)
            )
            connection.executemany(
                "INSERT INTO behavior VALUES (?, ?, ?)", [(number, name, 1.0) for name in _BEHAVIORS]
            )
            connection.execute("COMMIT")
        return n / (time.perf_counter() - start)


def postgres_baseline(url: str, n: int) -> float:
    """Evaluations per second of the same writes in bare SQL."""
    import psycopg

    result = json.dumps({"device": "cpu"})
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE TABLE bare (id SERIAL PRIMARY KEY, status TEXT, provenance JSON)")
        connection.execute("CREATE TABLE bare_behavior (id INTEGER, name TEXT, value FLOAT8, PRIMARY KEY (id, name))")
        connection.execute("INSERT INTO bare (status) SELECT 'pending' FROM generate_series(1, %s)", (n,))
        start = time.perf_counter()
        for number in range(1, n + 1):
            with connection.transaction():
                connection.execute("UPDATE bare SET status = 'running' WHERE id = %s", (number,))
            with connection.transaction(), connection.cursor() as cursor:
                cursor.execute("UPDATE bare SET status = 'finished', provenance = %s WHERE id = %s", (result, number))
                cursor.executemany(
                    "INSERT INTO bare_behavior VALUES (%s, %s, %s)", [(number, name, 1.0) for name in _BEHAVIORS]
                )
        return n / (time.perf_counter() - start)


def main() -> None:
    """Measure and print the table."""
    options = tyro.cli(Options, prog="python -m benchmarks.store", use_underscores=True)
    rows: list[list[str]] = []

    def measure(name: str, ids: Ids, n_processes: int, location: str | Path, baseline: Callable[[], float]) -> None:
        bare = baseline()
        study_id, numbers = fill(location, options.n, options.n_contributors, ids)
        if n_processes == 1:
            start = time.perf_counter()
            done = claim_and_finish(location, study_id, numbers)
            seconds = time.perf_counter() - start
        else:
            seconds, done = work_together(str(location), study_id, numbers, n_processes)
        check(location, options.n, done)
        rate = options.n / seconds
        verdict = "yes" if rate > TARGET else "no"
        rows.append([name, ids, str(n_processes), f"{rate:,.0f}", f"{bare:,.0f}", f"{rate / bare:.2f}", verdict])
        print(f"{name}, {ids}: {rate:,.0f} per second", flush=True)

    if "sqlite" in options.databases:
        for ids in options.ids:
            with tempfile.TemporaryDirectory() as folder:
                bare_path, path = Path(folder) / "bare.db", Path(folder) / "results.db"
                measure("SQLite", ids, 1, path, lambda path=bare_path: sqlite_baseline(path, options.n))
    if "postgresql" in options.databases:
        missing = missing_programs()
        if missing is not None:
            print(f"PostgreSQL is left out: {missing}")
        else:
            with PostgresServer(is_durable=not options.not_durable) as server:
                for ids in options.ids:
                    url, bare_url = (server.url(server.new_database()) for _ in range(2))
                    measure(
                        *("PostgreSQL", ids, options.processes, url),
                        lambda url=bare_url: postgres_baseline(url, min(options.n, 2_000)),
                    )
    header = [
        "database",
        "evaluation_ids",
        "processes",
        "per second",
        "bare SQL, 1 process",
        "ratio",
        f"> {TARGET:.0f}",
    ]
    print(f"\n{options.n:,} evaluations, {options.n_contributors} contributors, {platform.machine()}\n")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
