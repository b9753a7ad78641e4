"""What `tribute status` says at every stage, and that saying it changes nothing."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paper_study import PaperStudy, files_below, write_checkpoint, write_study
from sqlalchemy import create_engine

from tribute.cli import main, status_command
from tribute.errors import StoreError
from tribute.study import status as status_module
from tribute.study.plan import read_done
from tribute.study.results import read_result
from tribute.study.run_folder import RunLock
from tribute.study.status import N_RECENT, model_folders, rate_and_time_left, read_status


@pytest.fixture
def study(tmp_path: Path) -> PaperStudy:
    return write_study(tmp_path)


def test_before_anything_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"name: later\noutdir: {tmp_path}/runs\n")
    main("status", [str(path)])
    assert "later: not begun" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_models_are_told_by_their_checkpoints(study: PaperStudy) -> None:
    (study.config.run_dir / "study.json").unlink()
    assert read_status(study.config).stage == "plan"
    folders = model_folders(study.config)
    n_planned = study.config.load_preset().train_config("prune_fine_tune").n_steps
    last = folders["sparse"] / f"ckpt_steps_{n_planned:08d}"
    last.rename(last.with_name(f"{last.name}.damaged"))
    assert read_status(study.config).stage == "sparse_model"
    write_checkpoint(folders["sparse"], 100, "sparse, on the way")
    found = read_status(study.config)
    assert found.stage == "sparse_model"
    assert [model.n_steps for model in found.models][1:] == [0, 100]
    assert found.models[2].n_steps_planned == n_planned
    assert found.seconds_spent == {"models": 15.0}


def test_evaluations_are_counted_and_credit_grows_with_them(study: PaperStudy) -> None:
    with study.store() as store:
        first = read_status(study.config)
        assert (first.stage, first.n("pending"), first.per_hour) == ("coalitions", len(study.specs), None)
        assert first.credits[0].attributions is None
        assert "found 0, 0 and 0" in first.credits[0].missing_reason
        study.finish(store, 14)
        half = read_status(study.config)
        assert (half.n("finished"), half.n("pending")) == (14, len(study.specs) - 14)
        fitted = half.credits[0].attributions
        assert fitted is not None and fitted.n_coalitions == 10
        study.finish(store)
        reported = read_result(study.config, study.record, store).behaviors[0].attributions["shapley"]
    whole = read_status(study.config)
    assert (whole.stage, whole.n("finished")) == ("complete", len(study.specs))
    credit = whole.credits[0]
    assert credit.attributions is not None
    assert np.array_equal(credit.attributions.values, reported.values), "those that tribute run prints"
    assert np.array_equal(credit.attributions.covariance, reported.covariance)
    assert whole.seconds_spent["gd"] == 3.0 * sum(spec.method == "gd" for spec in study.specs)


def test_the_widths_are_those_at_which_a_study_stops(study: PaperStudy) -> None:
    with study.store() as store:
        study.finish(store)
    credit = read_status(study.config).credits[0]
    assert credit.attributions is not None
    low, high = credit.attributions.intervals().T
    whole = abs(credit.v_grand - credit.v_empty)
    assert credit.widest == pytest.approx(max(high - low) / 2 / whole)
    assert credit.narrowest == pytest.approx(min(high - low) / 2 / whole)
    wide = replace(credit, widest=0.04, narrowest=0.01)
    assert "asked for +- 5.0%, reached" in status_command.widths_line(wide, 0.05)
    assert "asked for +- 3.0%, not yet" in status_command.widths_line(wide, 0.03)
    assert "asked" not in status_command.widths_line(wide, None)


def test_what_is_planned_and_not_in_the_store_is_pending(study: PaperStudy) -> None:
    with study.store() as store:
        store.delete(study.study_id(store), role="fit")
    assert read_status(study.config).counts["fit"] == {"pending": 20, "running": 0, "finished": 0, "failed": 0}
    Path(study.config.db_url).unlink()
    assert read_status(study.config).n("pending") == len(study.specs)


def test_who_has_what_in_hand_and_what_failed(study: PaperStudy, capsys: pytest.CaptureFixture[str]) -> None:
    with study.store() as store:
        failed = store.claim(study.study_id(store))
        assert failed is not None
        store.fail(failed, "loss is not finite at step 3")
        assert store.claim(study.study_id(store)) is not None
        found = read_status(study.config)
        assert [item.role for item in found.in_hand] == ["empty"]
        assert not found.in_hand[0].is_silent and not found.in_hand[0].is_owner_gone
        assert [(item.attempts, item.reason) for item in found.failures] == [(1, "loss is not finite at step 3")]
        # As the same moment looks to somebody who comes an hour later.
        silent = replace(found.in_hand[0], seconds_silent=status_module.SILENT_SECONDS + 1.0)
        status_command.print_status(replace(found, in_hand=(silent,)))
    out = " ".join(capsys.readouterr().out.split())
    assert "silent for long" in out
    assert "failed once" in out and "loss is not finite at step 3" in out
    assert "│ empty │ 0 │ 1 │ 0 │ 1 │ 2 │" in out


def test_a_process_that_has_ended_is_said_to_have(study: PaperStudy, tmp_path: Path) -> None:
    source = (
        "import sys; from tribute.store.records import Store\n"
        "store = Store.open(sys.argv[1]); assert store.claim() is not None"
    )
    subprocess.run([sys.executable, "-c", source, study.config.db_url], check=True)
    assert read_status(study.config).in_hand[0].is_owner_gone


def test_reading_writes_nothing_and_waits_for_nobody(study: PaperStudy) -> None:
    """A writer is in the middle of a transaction, and status says what was there before it."""
    with study.store() as store:
        study.finish(store, 5)
    before = files_below(study.config.run_dir)
    read_status(study.config)
    after = files_below(study.config.run_dir)
    helpers = {f"results.db-{name}" for name in ("wal", "shm")}
    assert {name: content for name, content in after.items() if name not in helpers} == before
    assert after.get("results.db-wal", b"") == b""
    writer = sqlite3.connect(study.config.db_url, isolation_level=None)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE evaluation SET status = 'failed'")
        assert read_status(study.config).n("finished") == 5
        writer.execute("ROLLBACK")
    finally:
        writer.close()
    with pytest.raises(StoreError, match="readonly"), status_module.open_to_read(study.config) as store:
        store.retry()
        store.open_study("new", dataset="digits", contributor_names=["a"], n_examples=[1], fingerprint="f")


def test_a_store_of_an_older_schema_is_not_migrated(study: PaperStudy) -> None:
    with closing(sqlite3.connect(study.config.db_url)) as connection:
        connection.execute("DROP INDEX evaluation_to_claim")
        connection.execute("ALTER TABLE evaluation DROP COLUMN heartbeat")
        connection.execute("UPDATE tribute_schema SET version = 1")
        connection.commit()
    before = Path(study.config.db_url).read_bytes()
    with pytest.raises(StoreError) as caught:
        read_status(study.config)
    assert f"{study.config.db_url} has an older schema" in str(caught.value)
    with pytest.raises(StoreError, match="has an older schema"):
        read_done(study.config)  # as for a plan, which writes nothing either
    assert Path(study.config.db_url).read_bytes() == before
    assert not list(study.config.run_dir.glob("*.bak"))


def test_a_server_is_only_read_and_its_older_schema_is_not_migrated(tmp_path: Path, postgres_url: str) -> None:
    study = write_study(tmp_path, db=postgres_url)
    with study.store() as store:
        study.finish(store, 5)
    assert read_status(study.config).n("finished") == 5
    with pytest.raises(StoreError, match="read-only"), status_module.open_to_read(study.config) as store:
        store.retry()
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX evaluation_to_claim")
        connection.exec_driver_sql("ALTER TABLE evaluation DROP COLUMN heartbeat")
        connection.exec_driver_sql("UPDATE tribute_schema SET version = 1")
    with pytest.raises(StoreError, match="has an older schema"):
        read_status(study.config)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT version FROM tribute_schema").scalar_one() == 1
    engine.dispose()


def test_a_run_that_ended_before_it_made_its_store_has_its_models(study: PaperStudy) -> None:
    Path(study.config.db_url).unlink()
    done = read_done(study.config)
    assert done.n_steps["full"] > 0 and not done.n_finished


def test_the_run_at_work_is_named_by_its_lock(study: PaperStudy) -> None:
    assert read_status(study.config).run is None
    with RunLock(study.config.run_dir) as lock:
        lock.acquire()
        assert "process" in (read_status(study.config).run or "")
    owner = study.config.run_dir / status_module.OWNER_NAME
    owner.write_text(json.dumps({"host": status_module.platform.node(), "pid": 2**22 + 1, "since": "2026"}))
    assert read_status(study.config).run is None, "its process has ended"


def finished(start: float, stop: float, method: str = "gd", n_present: int = 3) -> Any:
    mask = np.arange(6) < n_present
    return SimpleNamespace(started=start, finished=stop, spec=SimpleNamespace(method=method, coalition_mask=mask))


def test_the_rate_leaves_pauses_out_and_counts_workers() -> None:
    one_by_one = [finished(10.0 * i, 10.0 * i + 10.0) for i in range(8)]
    assert rate_and_time_left(one_by_one, {"gd": 6}) == (pytest.approx(360.0), pytest.approx(60.0))
    after_a_night = [*one_by_one[:4], *(finished(i.started + 1e5, i.finished + 1e5) for i in one_by_one[4:])]
    assert rate_and_time_left(after_a_night, {"gd": 6}) == (pytest.approx(360.0), pytest.approx(60.0))
    two_at_once = [item for item in one_by_one for _ in range(2)]
    assert rate_and_time_left(two_at_once, {"gd": 6}) == (pytest.approx(720.0), pytest.approx(30.0))


def test_time_left_knows_methods_and_the_last_ones() -> None:
    mixed = [finished(0.0, 10.0), finished(10.0, 40.0, "retrain"), finished(40.0, 40.5, n_present=0)]
    assert rate_and_time_left(mixed, {"gd": 2, "retrain": 3})[1] == pytest.approx(110.0)
    assert rate_and_time_left(mixed[:1], {"retrain": 3})[1] == pytest.approx(30.0), "the slowest that is known"
    sped_up = [finished(100.0 * i, 100.0 * i + 100.0) for i in range(30)]
    sped_up += [finished(3000.0 + i, 3001.0 + i) for i in range(N_RECENT)]
    assert rate_and_time_left(sped_up, {"gd": 1}) == (pytest.approx(3600.0), pytest.approx(1.0))
    assert rate_and_time_left([], {"gd": 1}) == (None, None)


def test_json_says_the_same_and_is_one_line(study: PaperStudy, capsys: pytest.CaptureFixture[str]) -> None:
    with study.store() as store:
        study.finish(store, 12)
    main("status", [str(study.path), "--format", "json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert found["evaluations"]["fit"]["finished"] == 8
    assert [item["name"] for item in found["behaviors"][0]["contributors"]] == list(study.record.contributor_names)


def test_watching_ends_with_the_study(
    study: PaperStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with study.store() as store:

        def sleep(seconds: float) -> None:
            assert seconds == 7.0
            assert study.finish(store, 20), "it looks again although nothing is left"

        monkeypatch.setattr(status_command.time, "sleep", sleep)
        main("status", [str(study.path), "--watch", "--interval", "7", "--format", "json"])
    stages = [json.loads(line)["stage"] for line in capsys.readouterr().out.splitlines()]
    assert stages == ["coalitions", "coalitions", "complete"]


def test_an_interrupt_ends_watching_without_a_failure(study: PaperStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: Iterator[None] = iter([None])

    def sleep(_: float) -> None:
        if next(looks, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr(status_command.time, "sleep", sleep)
    main("status", [str(study.path), "--watch"])


def test_names_of_contributors_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path)
    names = ("\x1b[31mred", "[bold]b[/bold]", "", "x" * 500, "\u202eright", "a")
    Path(study.config.db_url).unlink()
    study = replace(study, record=replace(study.record, contributor_names=names))
    study.record.write(study.config.run_dir)
    with study.store() as store:
        store.add(study.study_id(store), study.specs)
        study.finish(store)
    main("status", [str(study.path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "[bold]b[/bold]" in out


def test_it_does_not_wait_for_pytorch() -> None:
    source = "import sys, tribute.cli.status_command; sys.exit('torch' in sys.modules or 'scipy.stats' in sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
