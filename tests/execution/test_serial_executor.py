"""One process: leases follow its pulse, three failures set a coalition aside, nothing stays claimed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from workshop import make_specs, open_study

from tribute import pulse
from tribute.config import ExecutionConfig
from tribute.errors import BehaviorError, ConfigError
from tribute.store.records import ClaimedEvaluation, Store
from tribute.study import executors
from tribute.study.executors import Heartbeat, SerialExecutor, check_execution
from tribute.study.value_function import Evaluation
from tribute.study.work import work_through
from tribute.types import CoalitionMask

NO_IMAGES = np.zeros((0, 8, 8, 1), np.uint8)
Measure = Callable[..., Evaluation]


def size_of(_method: str, mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
    """A value function that is known: the number of contributors."""
    return Evaluation({"size": float(mask.sum())}, {"train": 1.0}, 1, NO_IMAGES)


def executor_of(measure: Measure, **options: Any) -> SerialExecutor:
    return SerialExecutor(measure, definitions={}, provenance={"who": "test"}, **options)


class Listener:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.texts: list[str] = []

    def stage(self, title: str) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "results.db") as store:
        yield store


def test_evaluations_are_measured_by_priority(store: Store) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(6))
    order: list[int | None] = []
    n_done = executor_of(size_of).run(
        store, study_id, on_done=lambda claimed, _: order.append(claimed.spec.removal_seed)
    )
    assert n_done == 6
    assert order == [5, 4, 3, 2, 1, 0]
    table = store.read(behavior_name="size")
    np.testing.assert_array_equal(table.behaviors, table.masks.sum(axis=1))


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_three_failures_set_a_coalition_aside_and_the_rest_goes_on(store: Store, broken: str) -> None:
    study_id = open_study(store)
    ids = store.add(study_id, make_specs(4))
    bad = make_specs(4)[2].coalition_mask
    n_tried = 0

    def measure(method: str, mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        nonlocal n_tried
        if np.array_equal(mask, bad):
            n_tried += 1
            if broken == "raises":
                raise BehaviorError("no such luck")
            return Evaluation({"size": float("nan")}, {}, 1, NO_IMAGES)
        return size_of(method, mask, opt_seed=opt_seed)

    listener = Listener()
    for expected in (3, 3):  # a second call, as after a look at intervals, does not try it again
        work_through(executor_of(measure), store, study_id, ids, ["size"], listener)
        assert n_tried == expected
    assert store.counts()["finished"] == 3
    (failed,) = store.find(statuses=("failed",))
    assert (failed.evaluation_id, failed.attempts) == (ids[2], 3)
    assert any("1 evaluations failed" in text for text in listener.messages)


def test_an_interruption_gives_the_evaluation_back_uncounted(store: Store) -> None:
    study_id = open_study(store)
    store.add(study_id, make_specs(3))

    def measure(method: str, mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        pulse.request_stop()  # as the handler of a signal does, whose exception was lost
        pulse.beat()
        raise AssertionError("the beat did not raise")

    try:
        with pytest.raises(KeyboardInterrupt):
            executor_of(measure).run(store, study_id, on_done=lambda *_: None)
    finally:
        pulse.clear_stop()
    assert store.counts() == {"pending": 3, "running": 0, "finished": 0, "failed": 0}
    assert {item.attempts for item in store.find()} == {0}


def test_go_on_ends_the_work_before_the_next_one(store: Store) -> None:
    study_id = open_study(store)
    ids = store.add(study_id, make_specs(5))
    answers = iter([True, True, False, False])
    listener = Listener()
    work_through(
        executor_of(size_of),
        store,
        study_id,
        ids,
        ["size"],
        listener,
        go_on=lambda: next(answers),
        pause=lambda: pytest.fail("waited for what nobody has in hand"),
    )
    assert store.counts() == {"pending": 3, "running": 0, "finished": 2, "failed": 0}


def test_time_left_is_of_what_is_left_and_divided_among_workers(store: Store) -> None:
    """Nobody's model trains in no time and tells nothing; each of the others takes 60 seconds; the end has no time."""

    class TwoAtATime(SerialExecutor):
        @property
        def n_workers(self) -> int:
            return 2

    def measure(method: str, mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        return Evaluation({"size": float(mask.sum())}, {"train": 60.0 if mask.any() else 0.1}, 1, NO_IMAGES)

    study_id = open_study(store)
    *others, nobody = make_specs(5)  # the last one is measured first
    specs = [*others, replace(nobody, coalition_mask=np.zeros(5, bool))]
    assert all(item.coalition_mask.any() for item in others)
    ids = store.add(study_id, specs)
    answers = iter([True, True, False, False])
    first, second = Listener(), Listener()
    work_through(
        executor_of(measure), store, study_id, ids, ["size"], first, go_on=lambda: next(answers), pause=lambda: None
    )
    assert [text.partition("; ")[2] for text in first.texts] == ["", "about 3 min left"]
    two_at_a_time = TwoAtATime(cast(Any, measure), definitions={}, provenance={})
    work_through(two_at_a_time, store, study_id, ids, ["size"], second)
    assert [text.partition("; ")[2] for text in second.texts] == ["about 60 s left", "about 60 s left", ""]


def test_what_another_process_has_in_hand_is_waited_for(store: Store) -> None:
    study_id = open_study(store)
    ids = store.add(study_id, make_specs(3))
    elsewhere = store.claim(study_id)
    assert elsewhere is not None
    n_paused = 0

    def pause() -> None:
        nonlocal n_paused
        n_paused += 1
        assert store.counts()["finished"] == 2
        if n_paused == 2:
            store.finish(elsewhere, {"size": 1.0}, seconds={}, provenance={})

    listener = Listener()
    work_through(executor_of(size_of), store, study_id, ids, ["size"], listener, pause=pause)
    assert n_paused == 2
    assert store.counts()["finished"] == 3
    assert [text for text in listener.messages if "waiting for 1 evaluations" in text]


class Beating:
    """A store of one claim, which says when it was extended."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.n = 0

    def heartbeat(self, claimed: ClaimedEvaluation) -> bool:
        self.n += 1
        return self.answer


def test_a_lease_is_extended_only_while_the_pulse_beats(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claimed = ClaimedEvaluation(1, 1, make_specs(1)[0], 1, 600.0, "token")
    store = Beating()
    heartbeat = Heartbeat(store, claimed, stall_seconds=100.0)  # type: ignore[arg-type]
    silence = 99.0
    monkeypatch.setattr(pulse, "seconds_since_beat", lambda: silence)
    assert heartbeat.beat()
    silence = 101.0
    with caplog.at_level(logging.WARNING):
        assert not heartbeat.beat()
        assert not heartbeat.beat()
    assert store.n == 1
    assert len([text for text in caplog.messages if "hangs" in text]) == 1
    silence = 0.0
    assert heartbeat.beat()


def test_a_heartbeat_says_once_that_its_claim_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    claimed = ClaimedEvaluation(1, 1, make_specs(1)[0], 1, 600.0, "token")
    heartbeat = Heartbeat(Beating(answer=False), claimed, stall_seconds=1e9)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert not heartbeat.beat()
        assert not heartbeat.beat()
    assert len([text for text in caplog.messages if "another process has it now" in text]) == 1


def test_the_lease_of_an_evaluation_in_hand_is_extended_from_a_thread(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value function waits for three heartbeats, while this thread uses the store, too."""
    import threading

    study_id = open_study(store)
    store.add(study_id, make_specs(1))
    beaten = threading.Semaphore(0)
    answers: list[bool] = []
    beat = Heartbeat.beat

    def counted(self: Heartbeat) -> bool:
        answers.append(beat(self))
        beaten.release()
        return answers[-1]

    monkeypatch.setattr(Heartbeat, "beat", counted)
    monkeypatch.setattr(executors, "BEATS_PER_LEASE", 1e6)

    def measure(method: str, mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        for _ in range(3):
            assert store.counts()["running"] == 1
            assert beaten.acquire(timeout=60)
        return size_of(method, mask, opt_seed=opt_seed)

    assert executor_of(measure).run(store, study_id, on_done=lambda *_: None) == 1
    assert all(answers[:3])
    assert store.counts()["finished"] == 1


@pytest.mark.parametrize("changes", [{"workers": 2}, {"address": "auto"}, {"gpus_per_worker": 0.5}])
def test_settings_of_ray_without_ray_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--executor ray"):
        check_execution(ExecutionConfig(**changes))


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_cluster_that_does_not_run_is_found_before_anything_is_trained(prefix: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{prefix}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"nothing answers at .*docs/clusters\.md"):
            check_execution(ExecutionConfig(executor="ray", address=address))
        taken.listen()
        check_execution(ExecutionConfig(executor="ray", address=address))


def test_ray_that_is_not_installed_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tribute\[cluster\]'"):
        check_execution(ExecutionConfig(executor="ray"))
    check_execution(ExecutionConfig())
