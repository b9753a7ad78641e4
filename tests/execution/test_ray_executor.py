"""Workers of Ray: the digits of a serial run, one attempt for every death, and nothing lost when Ray ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_study import SilentListener
from workshop import (
    Scripted,
    credit_of,
    make_specs,
    n_calls,
    open_study,
    start_run,
    undisturbed,
    values_of,
    wait_for_line,
)

from tribute.config import ExecutionConfig, StudyConfig
from tribute.errors import MixedResultsError
from tribute.store.records import Store
from tribute.study.costs import add_up
from tribute.study.executors import Ledger
from tribute.study.manifest import read_manifest
from tribute.study.run import run_study

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'tribute[cluster]')")

from tribute.study.ray_executor import (  # noqa: E402
    Measured,
    RayExecutor,
    _Worker,
    check_same,
    provide_modules,
    user_modules,
)

MakeStudy = Callable[..., StudyConfig]
TWO = ExecutionConfig(executor="ray", workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, for the tests of this file; executors join it."""
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "results.db") as store:
        yield store


@pytest.fixture
def executor_of(cluster: None) -> Iterator[Callable[..., RayExecutor]]:
    made: list[RayExecutor] = []

    def make(assignment: Scripted, **options: Any) -> RayExecutor:
        made.append(RayExecutor(assignment, definitions={}, execution=TWO, n_threads=1, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def attempts(store: Store) -> dict[int, int]:
    """By training seed."""
    return {item.spec.opt_seed: item.attempts for item in store.find()}


def test_workers_measure_by_priority_and_the_driver_records(
    store: Store, tmp_path: Path, executor_of: Callable[..., RayExecutor]
) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(12))
    n_in_hand: list[int] = []

    def go_on() -> bool:
        n_in_hand.append(store.counts()["running"])
        return True

    shapes: list[tuple[int, ...]] = []
    executor = executor_of(Scripted(tmp_path))
    n_done = executor.run(store, study_id, on_done=lambda _, found: shapes.append(found.images.shape), go_on=go_on)
    assert n_done == 12 and len(shapes) == 12
    assert {shape[0] for shape in shapes} == {0}  # images stay where they were made
    assert max(n_in_hand) < 2  # each time before another one is claimed
    table = store.read(behavior_name="size")
    np.testing.assert_array_equal(table.behaviors, table.masks.sum(axis=1))
    found = sorted(store.find(), key=lambda item: item.started or 0.0)
    assert [item.spec.opt_seed for item in found] == list(range(11, -1, -1))
    assert {item.attempts for item in found} == {1}
    assert {item.provenance["executor"] for item in found} == {"ray"}
    assert os.getpid() not in {item.provenance["pid"] for item in found}
    assert executor.run(store, study_id, on_done=lambda *_: None) == 0


@pytest.mark.parametrize(("what", "reason"), [("die", "died"), ("hang", "hangs")])
def test_a_worker_that_dies_or_hangs_costs_one_attempt(
    store: Store,
    tmp_path: Path,
    executor_of: Callable[..., RayExecutor],
    what: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(6))
    n_done = executor_of(Scripted(tmp_path, what, seed=4), seconds_between_looks=0.1).run(
        store, study_id, on_done=lambda *_: None
    )
    assert n_done == 6
    assert attempts(store) == {seed: 2 if seed == 4 else 1 for seed in range(6)}
    assert store.counts()["finished"] == 6
    assert any(reason in text and "another one takes its place" in text for text in caplog.messages)


@pytest.mark.parametrize(
    "error", [ray.exceptions.OutOfMemoryError("close to full"), ray.exceptions.ActorUnavailableError("no answer", None)]
)
def test_a_worker_that_ray_ended_for_memory_or_cannot_reach_is_one_that_died(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Neither is the end of Ray; one that is only out of reach would go on to hold its share of a GPU."""
    study_id = open_study(store)
    store.add(study_id, make_specs(1))
    ledger = Ledger(store, study_id, None, definitions={})
    executor = RayExecutor(Scripted(tmp_path), definitions={}, execution=TWO)
    worker = _Worker(1, "actor", None, 0.0, task=("result", ledger.claim() or pytest.fail("nothing to claim")))
    other = _Worker(1, "another actor", "set-up", 0.0)
    executor._workers = [worker]
    killed: list[Any] = []

    def get(_ref: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(executor, "_check_ray_lives", lambda _: None)
    monkeypatch.setattr(executor, "_new_worker", lambda _: other)
    result: Any = "result"
    assert executor._receive(result, ledger, lambda *_: None) == 0
    assert killed == ["actor"] and executor._workers == [other]
    assert [(item.status, item.attempts) for item in store.find()] == [("pending", 1)]


def test_a_result_says_which_share_of_a_gpu_it_took(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else four workers of one GPU would be counted, and budgeted, as four GPUs."""
    study_id = open_study(store)
    store.add(study_id, make_specs(1))
    ledger = Ledger(store, study_id, None, definitions={})
    executor = RayExecutor(Scripted(tmp_path), definitions={}, execution=TWO)
    executor._options = {"num_gpus": 0.25}
    worker = _Worker(1, "actor", "set-up", 0.0)
    executor._workers = [worker]
    answers: dict[Any, Any] = {"set-up": {"pid": 1, "host": "here"}, "result": Measured({"size": 1.0}, {"train": 8.0})}
    monkeypatch.setattr(ray, "get", answers.__getitem__)
    ref: Any = "set-up"
    executor._receive(ref, ledger, lambda *_: None)
    ref = "result"
    worker.task = (ref, ledger.claim() or pytest.fail("nothing to claim"))
    assert executor._receive(ref, ledger, lambda *_: None) == 1
    (effort,) = store.efforts(study_id)
    assert effort.n_devices == 0.25
    assert add_up({}, [effort]).device_seconds == 2.0


def test_three_failures_set_a_coalition_aside_and_the_rest_goes_on(
    store: Store, tmp_path: Path, executor_of: Callable[..., RayExecutor]
) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(4))
    assert executor_of(Scripted(tmp_path, "fail", seed=2)).run(store, study_id, on_done=lambda *_: None) == 3
    (failed,) = store.find(statuses=("failed",))
    assert (failed.spec.opt_seed, failed.attempts, failed.error) == (2, 3, "no such luck")


def test_an_interruption_or_a_mistake_gives_back_what_is_in_hand_and_a_second_run_goes_on(
    store: Store, tmp_path: Path, executor_of: Callable[..., RayExecutor]
) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(8))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    executor = executor_of(Scripted(tmp_path, "raise", seed=3))
    with pytest.raises(KeyboardInterrupt):
        executor.run(store, study_id, on_done=interrupt)
    assert store.counts() == {"pending": 7, "running": 0, "finished": 1, "failed": 0}
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        executor.run(store, study_id, on_done=lambda *_: None)
    assert store.counts()["running"] == 0
    answers = iter([True, False])
    before = store.counts()["finished"]
    assert executor.run(store, study_id, on_done=lambda *_: None, go_on=lambda: next(answers, False)) == 1
    assert store.counts()["finished"] == before + 1
    executor.run(store, study_id, on_done=lambda *_: None)
    assert store.counts()["finished"] == 8
    assert set(attempts(store).values()) == {1}


def test_a_worker_that_would_measure_something_else_is_shown_and_ends_the_run(
    store: Store, tmp_path: Path, executor_of: Callable[..., RayExecutor]
) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(2))
    with pytest.raises(MixedResultsError, match="other data on this machine"):
        executor_of(Scripted(tmp_path, "refuse")).run(store, study_id, on_done=lambda *_: None)
    assert store.counts()["pending"] == 2


def test_what_differs_between_driver_and_worker_is_named_with_its_remedy() -> None:
    ours = {"settings": {"gd": {"data": "a", "behaviors": {"fid": "x"}}}}
    check_same(ours, ours)
    with pytest.raises(MixedResultsError, match=r"settings\.gd\.data: 'a' here, 'b' there.*same training data"):
        check_same(ours, {"settings": {"gd": {"data": "b", "behaviors": {"fid": "x"}}}})
    with pytest.raises(MixedResultsError, match=r"gd\.behaviors\.fid: 'x' here, 'y' there.*TRIBUTE_CACHE"):
        check_same(ours, {"settings": {"gd": {"data": "a", "behaviors": {"fid": "y"}}}})


def test_modules_with_behaviors_travel_and_others_of_their_name_are_refused(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import counted

    sent = user_modules(["counted:brightness", "counted:contrast:lower", "fid", "numpy:mean"])
    assert list(sent) == ["counted"]
    provide_modules(sent)  # the same is here
    (workshop / "counted.py").write_text("other = 1\n")
    with pytest.raises(MixedResultsError, match="counted"):
        provide_modules(sent)
    (workshop / "counted.py").unlink()
    monkeypatch.delitem(sys.modules, "counted")
    monkeypatch.setattr(sys, "path", [*sys.path])
    provide_modules(sent)
    import counted as arrived

    assert arrived is not counted
    assert arrived.contrast(np.zeros((2, 8, 8, 1))) == 0.0


def test_serial_and_ray_give_the_same_bits(make_study: MakeStudy, workshop: Path, cluster: None) -> None:
    values, credit = undisturbed(workshop, make_study)
    config = make_study(execution={"executor": "ray", "workers": 2})
    assert credit_of(run_study(config, SilentListener())) == credit
    assert values_of(config) == values
    assert n_calls(workshop) == 8  # nothing was measured twice
    with Store.open(config.db_url, create=False) as store:
        processes = {item.provenance["pid"] for item in store.find()}
    assert os.getpid() not in processes
    serial = make_study(name="serial")
    run_study(serial, SilentListener())
    here, there = read_manifest(serial.run_dir), read_manifest(config.run_dir)
    assert here is not None and there is not None and here.result_hash == there.result_hash
    assert "pid" not in there.values["measured_on"][0] and "host" not in there.values["measured_on"][0]


def raylets_of(pid: int) -> list[int]:
    """Ray's node processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name == "raylet" and int(rest.split()[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("fault", ["SIGTERM", "SIGKILL of raylet"])
def test_a_signal_or_the_end_of_ray_leaves_everything_claimable(
    make_study: MakeStudy, workshop: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("RAY_health_check_period_ms", "300")  # Ray notices within seconds
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    os.mkfifo(workshop / "held")
    (workshop / "hold_at").write_text("3")
    values, credit = undisturbed(workshop, make_study)
    config = make_study(behaviors=["counted:held_apart", "counted:contrast"])
    process = start_run(config, workshop, "--executor", "ray", "--workers", "2")
    worker = int(wait_for_line(workshop / "held", process))
    (raylet,) = raylets_of(process.pid)
    if fault == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(raylet, signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, "run the same command again to continue" in error) == (
        130 if fault == "SIGTERM" else 1,
        True,
    )
    assert "Traceback" not in error
    with Store.open(config.db_url, create=False) as store:
        assert store.counts()["running"] == store.counts()["failed"] == 0
        n_before = store.counts()["finished"]
        assert n_before >= 1
    assert not Path(f"/proc/{worker}").exists()  # no worker stays behind
    n_measured = n_calls(workshop)
    assert credit_of(run_study(config, SilentListener())) == credit
    assert n_calls(workshop) - n_measured == 8 - n_before
    assert values_of(config) == values
