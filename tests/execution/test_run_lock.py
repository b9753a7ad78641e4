"""Two runs of one study: the second one refuses or waits, and a run that was killed leaves no lock."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_study import SilentListener
from workshop import n_calls, start_run, undisturbed, values_of, wait_until_held

from tribute.config import StudyConfig
from tribute.errors import StoreError
from tribute.store.records import Store
from tribute.study import work
from tribute.study.run import run_study
from tribute.study.run_folder import RunLock

MakeStudy = Callable[..., StudyConfig]


def test_a_second_run_is_refused_and_changes_nothing_and_a_killed_one_leaves_no_lock(
    make_study: MakeStudy, workshop: Path
) -> None:
    config = make_study(behaviors=["counted:held", "counted:contrast"])
    (workshop / "hold_at").write_text("3")
    first = start_run(config, workshop)
    wait_until_held(first)
    files = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*") if path.suffix in (".json", ".yaml")}
    assert {path.name for path in files} >= {"config.yaml", "study.json", "run.owner.json"}

    more = config.replace(fit=config.fit.replace(n_coalitions=8))  # which an own run would write into config.yaml
    second = start_run(more, workshop)
    _, error = second.communicate(timeout=120)
    assert second.returncode == 1
    assert re.search(rf"in use by process {first.pid} on \S+ since \S+ UTC.*--wait", " ".join(error.split()))
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with Store.open(config.db_url, create=False) as store:
        assert store.counts() == {"pending": 5, "running": 1, "finished": 2, "failed": 0}

    first.kill()
    first.communicate()
    run_study(config, SilentListener())
    with Store.open(config.db_url, create=False) as store:
        assert store.counts()["finished"] == 8
    assert n_calls(workshop) == 8 + 1


def test_runs_on_a_server_share_the_measuring_and_double_nothing(
    make_study: MakeStudy, workshop: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run stands still in its third coalition; the second one does all the others, and waits for that one."""
    values, _ = undisturbed(workshop, make_study)
    monkeypatch.setattr(work, "SECONDS_BETWEEN_LOOKS", 0.1)
    config = make_study(behaviors=["counted:held", "counted:contrast"], db=postgres_url)
    (workshop / "hold_at").write_text("3")
    first = start_run(config, workshop)
    wait_until_held(first)

    class GoesOn(SilentListener):
        def message(self, text: str) -> None:
            super().message(text)
            if text == "waiting for 1 evaluations that other processes have in hand":
                with Store.open(config.db_url) as store:
                    assert store.counts() == {"pending": 0, "running": 1, "finished": 7, "failed": 0}
                assert first.stdin is not None
                first.stdin.write("\n")
                first.stdin.flush()

    listener = GoesOn()
    run_study(config, listener)
    _, error = first.communicate(timeout=120)
    assert first.returncode == 0, error
    assert listener.n_evaluations == 5
    assert n_calls(workshop) == 8
    assert values_of(config) == values


def test_waiting_says_for_whom_and_gets_the_lock(tmp_path: Path) -> None:
    said: list[str] = []
    with RunLock(tmp_path / "study") as first:
        first.acquire()
        first.acquire()  # which it has

        def let_go(text: str) -> None:
            said.append(text)
            first.release()

        with RunLock(tmp_path / "study", wait=True, on_wait=let_go) as second:
            second.acquire()
            assert "in use by process" in said[0]
            with pytest.raises(StoreError, match="in use"):
                first.acquire()
    with RunLock(tmp_path / "study") as third:
        third.acquire()


def test_a_lock_that_was_not_taken_makes_no_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "study"):
        pass
    assert not (tmp_path / "study").exists()


def test_a_folder_that_cannot_be_made_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with RunLock(tmp_path / "file" / "study") as lock, pytest.raises(StoreError, match="set another outdir"):
        lock.acquire()
