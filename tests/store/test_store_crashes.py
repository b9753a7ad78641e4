"""A process killed in the middle of a write: it has happened or it has not, and nothing else is lost."""

from __future__ import annotations

import os
import signal
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from tests.store.content import claimed, finish, open_study, spec
from tribute.store.records import FinishedEvaluation, Store, Study

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot")


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store with a study of 40 evaluations, the first of them finished, none of them open in this process."""
    place = str(tmp_path / "r.db") if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    with Store.open(place) as store:
        store.add(open_study(store), [spec(seed) for seed in range(40)])
        finish(store, claimed(store), fid=0.0)
    return place


def killed(location: str, prepare: Callable[[Store], Any], action: Callable[[Store, Any], object], at: int) -> bool:
    """Let a process be killed after statement `at` of an action, or if it has fewer, after its commit.

    Returns:
        Whether it was killed before the commit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the child uses
        child = os.fork()
    if not child:
        try:
            store = Store.open(location, create=False)
            prepared = prepare(store)
            left = [at]

            def after(connection: Any, *_: Any) -> None:
                if store._engine.dialect.name == "sqlite" and left[0] == at:
                    connection.connection.driver_connection.execute("PRAGMA cache_size = 1")  # write before the commit
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            event.listen(store._writing_engine, "after_cursor_execute", after)
            action(store, prepared)
            os._exit(7)  # without a goodbye
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 7
    return False


def results() -> dict[str, float]:
    return {"fid": 1.0, **{f"generated_image_{idx}_mse": 0.5 for idx in range(300)}}


def add_finished(store: Store, _: Any) -> None:
    (study,) = store.studies()
    new = Study(study.name, study.dataset, study.contributor_names, study.n_examples, study.fingerprint)
    store.add_finished({new: [FinishedEvaluation(spec(seed), results()) for seed in range(1, 3)]})


ACTIONS: dict[str, tuple[Callable[[Store], Any], Callable[[Store, Any], object]]] = {
    "claim": (lambda store: None, lambda store, _: store.claim()),
    "finish": (claimed, lambda store, claim: finish(store, claim, **results())),
    "fail": (claimed, lambda store, claim: store.fail(claim, "no" * 1000)),
    "add": (lambda store: None, lambda store, _: store.add(1, [spec(seed) for seed in range(40, 600)])),
    "add_finished": (lambda store: None, add_finished),
    "reset": (lambda store: None, lambda store, _: store.reset(1)),
    "delete_study": (lambda store: None, lambda store, _: store.delete_study(1)),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_a_write_has_happened_or_it_has_not(location: str, name: str) -> None:
    prepare, action = ACTIONS[name]

    def look() -> Any:
        """All but what only tells the claims apart."""
        with Store.open(location, create=False) as store:
            assert store.check() == []
            return [(s.spec, s.status, s.behaviors, s.attempts) for s in store.find()]

    at = 0
    before: Any = None
    while True:
        at += 1
        with Store.open(location, create=False) as store:
            # What a killed process had claimed may be claimed again at once: it begins where it began.
            assert all(one.is_owner_gone for one in store.running())
            store.reset(1, statuses=["running", "failed"])
        before = before or look()
        if not killed(location, prepare, action, at):
            break
        if "://" not in location:
            with closing(sqlite3.connect(location)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        with Store.open(location, create=False) as store:
            store.reset(1, statuses=["running"])
        assert look() == before
    assert at >= 2  # it was killed at least once before the commit
    assert look() != before
