from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update
from sqlalchemy.engine import Connection

from tests.store.content import N, claimed, finish, open_study, spec
from tribute.errors import BehaviorError, CoalitionError, MixedResultsError, StoreError
from tribute.seeding import numpy_stream
from tribute.store.records import ANY, EvaluationSpec, FinishedEvaluation, Store, Study
from tribute.store.tables import evaluation


def edit(store: Store, change: Any) -> None:
    """Write past the store's rules."""
    store.in_transaction(lambda connection, _number: connection.execute(change), writes=True)


def edit_owner(store: Store, part: str, value: Any) -> None:
    """Change a part of what tells the processes apart that have claimed."""

    def change(connection: Connection, _number: int) -> None:
        for row in connection.execute(select(evaluation).where(evaluation.c.owner.is_not(None))).all():
            owner = {**row.owner, part: value}
            connection.execute(update(evaluation).where(evaluation.c.id == row.id).values(owner=owner))

    store.in_transaction(change, writes=True)


# Identity


@pytest.mark.parametrize(
    "change",
    [
        {"exp_name": "e2"},
        {"dataset": "cifar"},
        {"method": "retrain"},
        {"removal_dist": None},
        {"datamodel_alpha": 0.5},
        {"removal_seed": 1},
        {"coalition_mask": np.ones(N, dtype=bool)},
        {"coalition_mask": np.ones(N + 1, dtype=bool)},
        {"opt_seed": 1},
        {"settings": {"gd_steps": 201, "model": "abc"}},
    ],
)
def test_all_that_determines_the_result_is_in_the_identity(change: dict[str, Any]) -> None:
    assert replace(spec(), **change).identity != spec().identity


def test_the_purpose_and_the_spelling_are_not_in_the_identity() -> None:
    same = spec(
        role="fit",
        priority=7,
        datamodel_alpha=None,
        opt_seed=np.int64(0),
        settings={"model": "abc", "gd_steps": np.int64(200)},
    )
    assert same == spec() and len({same, spec()}) == 1
    half = spec(datamodel_alpha=1, settings={"channels": (8, 16)})
    assert half == spec(datamodel_alpha=np.float64(1.0), settings={"channels": np.array([8, 16])})


def test_a_specification_cannot_be_changed_behind_its_identity() -> None:
    mask = np.ones(N, dtype=bool)
    one = spec(mask=mask.tolist())
    with pytest.raises(ValueError, match="read-only"):
        one.coalition_mask[0] = False
    settings = {"steps": [1]}
    two = spec(settings=settings)
    before = two.identity
    settings["steps"].append(2)
    assert replace(two, role="fit").identity == before


@pytest.mark.parametrize("mask", [np.ones(3), np.ones((2, 3), dtype=bool), np.ones(0, dtype=bool), np.array([0, 1])])
def test_a_mask_that_is_none_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(CoalitionError, match="bool vector"):
        replace(spec(), coalition_mask=mask)


@pytest.mark.parametrize("settings", [{"loss": math.nan}, {"path": Path("x")}, {"f": print}])
def test_settings_that_are_not_json_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="settings must be plain JSON"):
        spec(settings=settings)


# Studies


def test_a_study_is_made_once_and_other_contributors_are_refused(store: Store, study_id: int) -> None:
    assert open_study(store) == study_id
    assert open_study(store, dataset="cifar") != study_id
    assert open_study(store, name="other", n=3) != study_id
    with pytest.raises(MixedResultsError, match=r"10 contributors.*fingerprint-10.*3 contributors.*fingerprint-3"):
        open_study(store, n=3)
    with pytest.raises(MixedResultsError, match="changed"):
        open_study(store, fingerprint="changed")
    with pytest.raises(StoreError, match="2 names and 1 numbers"):
        open_study(store, name="x", contributor_names=["a", "b"], n_examples=[1])
    with pytest.raises(StoreError, match="Unicode"):
        open_study(store, name="x", contributor_names=["\udc80"], n_examples=[1])
    assert [c.n_examples for c in store.contributors(study_id)] == [10 + i for i in range(N)]
    with pytest.raises(StoreError, match="Study 99"):
        store.contributors(99)


def test_the_first_configuration_is_kept(store: Store, study_id: int) -> None:
    assert store.studies()[0].config is None
    open_study(store, config={"lr": 1})
    open_study(store, config={"lr": 2})
    assert store.studies()[0].config == {"lr": 1}


# Adding and claiming


def test_adding_again_adds_nothing(store: Store, study_id: int) -> None:
    specs = [spec(seed) for seed in range(1200)]
    ids = store.add(study_id, specs)
    assert len(set(ids)) == 1200
    assert store.add(study_id, reversed(specs)) == ids[::-1]
    assert store.add(study_id, [specs[3], specs[3], spec(5000)])[:2] == [ids[3], ids[3]]
    assert store.counts(study_id) == {"pending": 1201, "running": 0, "finished": 0, "failed": 0}


def test_what_was_added_comes_back_as_it_was(store: Store, study_id: int) -> None:
    masks = numpy_stream(0, "test-masks").random((5, N)) < 0.5
    specs = [spec(seed, masks[seed].tolist(), role="fit", datamodel_alpha=0.1 * seed) for seed in range(4)]
    specs.append(spec(None, masks[4].tolist(), removal_dist=None, settings={"a": {"b": [1.5, None, "ü"]}}))
    store.add(study_id, specs)
    found = [stored.spec for stored in store.find(study_id)]
    assert found == specs
    assert [s.role for s in found] == ["fit"] * 4 + [None]
    np.testing.assert_array_equal([s.coalition_mask for s in found], masks)


def test_what_does_not_belong_to_the_study_is_refused_whole(store: Store, study_id: int) -> None:
    with pytest.raises(CoalitionError, match=r"10 contributors.*3 elements"):
        store.add(study_id, [spec(0), spec(1, [True, False, True])])
    with pytest.raises(MixedResultsError, match=r"'digits'.*'cifar'"):
        store.add(study_id, [spec(0), spec(1, dataset="cifar")])
    with pytest.raises(StoreError, match="Study 7"):
        store.add(7, [spec(0)])
    assert store.counts()["pending"] == 0


def test_a_role_is_given_once(store: Store, study_id: int) -> None:
    (first,) = store.add(study_id, [spec(0)])
    assert store.add(study_id, [spec(0, role="fit")]) == [first]
    assert store.add(study_id, [spec(0)]) == [first]
    assert store.find(roles=["fit"])[0].evaluation_id == first
    with pytest.raises(MixedResultsError, match=r"'fit'.*'test'"):
        store.add(study_id, [spec(0, role="test")])


def test_claims_go_by_priority_then_number(store: Store, study_id: int) -> None:
    ids = store.add(study_id, [spec(0, priority=2), spec(1), spec(2, priority=-1), spec(3)])
    order = [claimed(store).evaluation_id for _ in range(4)]
    assert order == [ids[2], ids[1], ids[3], ids[0]]
    assert store.claim() is None


def test_claims_can_be_narrowed(store: Store, study_id: int) -> None:
    other = open_study(store, name="other")
    ids = store.add(study_id, [spec(0, role="fit"), spec(1, role="test"), spec(2, exp_name="e2")])
    (elsewhere,) = store.add(other, [spec(0)])
    assert claimed(store, study_id=other).evaluation_id == elsewhere
    assert claimed(store, exp_name="e2").evaluation_id == ids[2]
    assert claimed(store, roles=["test", "loo"]).evaluation_id == ids[1]
    assert store.claim(evaluation_ids=[ids[1]]) is None
    assert claimed(store, study_id=study_id, evaluation_ids=np.array(ids)).evaluation_id == ids[0]
    assert store.claim(roles=[]) is None


@pytest.mark.parametrize("step", [1, 2, 100])
def test_claims_can_be_narrowed_to_thousands(store: Store, study_id: int, step: int) -> None:
    ids = store.add(study_id, [spec(seed, priority=seed % 3) for seed in range(400)])
    wanted = ids[10::step]
    named = [*wanted, *range(10**6, 10**6 + 40_000 * step, step)]  # more than a statement of SQLite takes
    found = store.find(study_id, evaluation_ids=named)
    assert [s.evaluation_id for s in found] == wanted
    assert store.counts(study_id, evaluation_ids=named)["pending"] == len(wanted)
    order = sorted(found, key=lambda s: (s.spec.priority, s.evaluation_id))
    assert [claimed(store, evaluation_ids=named).evaluation_id for _ in range(3)] == [
        s.evaluation_id for s in order[:3]
    ]
    assert store.delete(study_id, statuses=["pending"], evaluation_ids=named) == len(wanted) - 3


# From running to an end


def test_finishing_records_everything_once(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0, role="fit")])
    claim = claimed(store)
    definitions = {"fid": {"unit": "1", "higher_is_better": False}}
    behaviors: dict[str, Any] = {"fid": np.float32(0.5), "inception_score": 3}
    for _ in range(2):
        store.finish(
            claim,
            behaviors,
            seconds={"train": 1.5},
            provenance={"versions": {"torch": "2"}},
            definitions=definitions,
        )
    (stored,) = store.find(study_id, statuses=["finished"])
    assert stored.behaviors == {"fid": 0.5, "inception_score": 3.0}
    assert (stored.seconds, stored.provenance) == ({"train": 1.5}, {"versions": {"torch": "2"}})
    assert (stored.definitions, stored.spec, stored.attempts) == (definitions, claim.spec, 1)
    assert stored.finished is not None and stored.started is not None
    assert stored.created <= stored.started <= stored.finished
    assert store.claim() is None
    with pytest.raises(MixedResultsError, match="finished with"):
        store.finish(claim, {"fid": 0.6}, seconds={}, provenance={})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "many", None, 10**400])
def test_a_behavior_that_is_not_finite_writes_nothing(store: Store, study_id: int, value: Any) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store)
    with pytest.raises(BehaviorError, match=r"'fid'.*finite"):
        finish(store, claim, inception_score=1.0, fid=value)
    (stored,) = store.find()
    assert (stored.status, stored.behaviors) == ("running", {})
    finish(store, claim, fid=1.0)


def test_an_evaluation_without_behaviors_or_with_odd_provenance_is_not_finished(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store)
    with pytest.raises(BehaviorError, match="at least one"):
        finish(store, claim)
    with pytest.raises(StoreError, match="provenance must be plain"):
        store.finish(claim, {"fid": 1.0}, seconds={}, provenance={"loss": math.nan})
    assert store.counts()["running"] == 1


def test_an_expired_lease_goes_to_the_next_and_the_first_is_refused(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    first = claimed(store, lease_seconds=0)
    second = claimed(store)
    assert (second.evaluation_id, second.attempts) == (first.evaluation_id, 2)
    with pytest.raises(StoreError, match=r"is running, last claimed by process \d+"):
        finish(store, first, fid=1.0)
    with pytest.raises(StoreError, match="nothing was written"):
        store.fail(first, "too late")
    assert not store.heartbeat(first) and not store.release(first)
    assert store.find()[0].behaviors == {}
    finish(store, second, fid=2.0)
    with pytest.raises(StoreError, match="is finished"):
        finish(store, first, fid=2.0)
    assert store.find()[0].behaviors == {"fid": 2.0}


def test_a_late_result_that_nobody_else_took_is_welcome(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store, lease_seconds=0)
    finish(store, claim, fid=1.0)
    assert store.counts()["finished"] == 1


def test_a_heartbeat_extends_the_lease(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store, lease_seconds=1000)
    edit(store, update(evaluation).values(lease_expires=1, heartbeat=1))
    assert store.heartbeat(claim)
    assert store.claim() is None
    (running,) = store.running()
    assert 990 < running.lease_left <= 1000 and running.heartbeat is not None
    assert running.started < running.heartbeat == store.find()[0].heartbeat


def test_a_driver_learns_at_once_which_of_its_claims_are_lost(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(seed) for seed in range(4)])
    claims = [claimed(store) for _ in range(4)]
    edit(store, update(evaluation).values(lease_expires=1))
    again = claimed(store)
    store.release(claims[2])
    assert store.heartbeat_all(reversed(claims)) == {claims[0].evaluation_id, claims[2].evaluation_id}
    assert store.heartbeat_all([again]) == set() == store.heartbeat_all([])
    assert [one.evaluation_id for one in store.running() if one.lease_left > 0] == [
        *(again.evaluation_id, claims[1].evaluation_id, claims[3].evaluation_id)
    ]


def test_a_living_owner_keeps_its_evaluation(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claimed(store)
    assert store.claim() is None


@pytest.mark.parametrize(
    ("part", "value", "is_gone"),
    [
        ("start", 1, True),  # the number belongs to another process now
        ("boot", "an-earlier-boot", True),  # a file is not shared between machines
        ("host", "elsewhere", False),
        ("namespace", "another-container", False),
    ],
)
def test_who_is_gone(store: Store, study_id: int, part: str, value: Any, is_gone: bool) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are told apart by /proc, which is not here")
    store.add(study_id, [spec(0)])
    claimed(store)
    edit_owner(store, part, value)
    if part == "boot" and "://" in store.location:
        is_gone = False  # a server has clients on other machines
    assert (store.claim() is not None) == is_gone


def test_failing_and_trying_again(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(seed) for seed in range(3)])
    for _ in range(2):
        store.fail(claimed(store), "out of memory")
    assert store.counts(study_id) == {"pending": 1, "running": 0, "finished": 0, "failed": 2}
    failed = store.find(statuses=["failed"])
    assert [(s.error, s.attempts) for s in failed] == [("out of memory", 1)] * 2
    assert store.retry(study_id, max_attempts=1) == 0
    assert store.retry(study_id, evaluation_ids=[failed[1].evaluation_id]) == 1
    assert store.retry(study_id) == 1
    assert claimed(store).attempts == 2
    assert store.retry() == 0


def test_a_failed_evaluation_is_not_finished_by_the_claim_that_failed(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store)
    store.fail(claim, "no")
    with pytest.raises(StoreError, match="is failed"):
        finish(store, claim, fid=1.0)


def test_a_released_evaluation_is_pending_and_uncounted(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store)
    assert store.release(claim)
    assert [(s.status, s.attempts, s.owner) for s in store.find()] == [("pending", 0, None)]
    assert not store.release(claim)
    with pytest.raises(StoreError, match="is pending"):
        finish(store, claim, fid=1.0)


# Taking back


def test_what_is_reset_is_as_if_it_had_never_been_measured(store: Store, study_id: int) -> None:
    ids = store.add(study_id, [spec(seed, role="fit") for seed in range(4)])
    before = store.find(study_id)
    finish(store, claimed(store), fid=1.0, kid=2.0)
    finish(store, claimed(store), fid=3.0)
    store.fail(claimed(store), "no")
    assert store.reset(study_id, evaluation_ids=[ids[0]]) == 1
    assert [s.behaviors for s in store.find(study_id)] == [{}, {"fid": 3.0}, {}, {}]
    assert store.reset(study_id) == 2
    assert store.find(study_id) == before
    assert store.reset(study_id) == 0
    finish(store, claimed(store), fid=4.0)  # other values than the first time


def test_what_is_deleted_is_gone_with_its_results_and_may_be_asked_for_again(store: Store, study_id: int) -> None:
    other = open_study(store, name="other")
    store.add(study_id, [spec(seed, role="fit" if seed else "test") for seed in range(3)])
    store.add(other, [spec(0)])
    finish(store, claimed(store, study_id=study_id), fid=1.0)
    finish(store, claimed(store, study_id=other), fid=2.0)
    assert store.delete(study_id, roles=["test"]) == 1
    assert [s.spec for s in store.find()] == [spec(1), spec(2), spec(0)]
    assert store.read(behavior_name="fid").behaviors.tolist() == [2.0]
    assert store.delete(study_id) == 2 and store.counts()["finished"] == 1
    store.add(study_id, [spec(0)])
    assert store.counts(study_id) == {"pending": 1, "running": 0, "finished": 0, "failed": 0}


def test_a_study_is_deleted_with_all_that_belongs_to_it_and_nothing_else(store: Store, study_id: int) -> None:
    other = open_study(store, name="other")
    for study in (study_id, other):
        store.add(study, [spec(0)])
        finish(store, claimed(store), fid=float(study))
        store.record_artifact(study, "model", "models/full", sha256="aa")
    store.delete_study(study_id)
    store.delete_study(study_id)
    assert [s.name for s in store.studies()] == ["other"]
    assert [s.behaviors for s in store.find()] == [{"fid": float(other)}] and len(store.artifacts(other)) == 1
    assert store.artifacts(study_id) == [] and store.check() == []
    assert open_study(store, n=3) != other  # the name is free, also for other contributors


def test_what_is_being_measured_is_neither_reset_nor_deleted(store: Store, study_id: int) -> None:
    ids = store.add(study_id, [spec(seed) for seed in range(3)])
    finish(store, claimed(store), fid=1.0)
    claim = claimed(store)
    before = store.find()
    actions: list[Callable[..., Any]] = [store.reset, store.delete, store.delete_study]
    for action in actions:
        with pytest.raises(StoreError, match=rf"1 of them are being measured, e.g. {ids[1]} by process \d+ on"):
            action(study_id)
    assert store.find() == before
    assert store.reset(study_id, statuses=["finished"]) == 1
    finish(store, claim, fid=1.0)  # the claim was not touched


def test_what_an_owner_left_behind_is_reset_and_its_claim_is_void(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    claim = claimed(store, lease_seconds=0)
    assert store.reset(study_id) == 1
    assert not store.heartbeat(claim)
    with pytest.raises(StoreError, match="is pending"):
        finish(store, claim, fid=1.0)


def test_who_is_at_work(store: Store, study_id: int) -> None:
    ids = store.add(study_id, [spec(seed) for seed in range(3)])
    first, second = claimed(store, lease_seconds=100), claimed(store, lease_seconds=0)
    alive, late = store.running(study_id)
    assert (alive.evaluation_id, alive.spec, alive.attempts) == (ids[0], first.spec, 1)
    assert late.evaluation_id == second.evaluation_id
    assert 90 < alive.lease_left <= 100 and late.lease_left <= 0
    assert alive.is_alive and not late.is_alive and not alive.is_owner_gone
    assert alive.heartbeat == alive.started and alive.owner.startswith("process ")
    edit_owner(store, "start", 1)
    assert [one.is_owner_gone for one in store.running()] == [True, True]
    assert store.running(study_id + 1) == []


# Reading


@pytest.fixture
def measured(store: Store, study_id: int) -> Callable[..., float]:
    """Measure specifications, in an order that is not theirs; the behavior is a function of the seeds."""

    def measure(*specs: EvaluationSpec) -> float:
        for one in reversed(specs):
            (evaluation_id,) = store.add(study_id, [one])
            value = 100.0 * (one.removal_seed or 0) + one.opt_seed
            finish(store, claimed(store, evaluation_ids=[evaluation_id]), fid=value, kid=-value)
        return 0.0

    return measure


def test_reading_gives_arrays_in_the_order_of_the_seeds(store: Store, measured: Callable[..., float]) -> None:
    specs = [spec(seed, opt_seed=opt) for seed in (0, 1, 2) for opt in (0, 1)]
    measured(*specs, spec(None, removal_dist=None))
    store.add(1, [spec(77)])  # pending: not a result
    table = store.read(behavior_name="fid", exp_name="e1", removal_dist="shapley")
    assert len(table) == 6 and table.study_id == 1 and table.definition is None
    np.testing.assert_array_equal(table.removal_seeds, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(table.opt_seeds, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(table.behaviors, [0, 1, 100, 101, 200, 201])
    np.testing.assert_array_equal(table.masks, [s.coalition_mask for s in specs])
    assert table.masks.dtype == np.bool_ and table.behaviors.dtype == np.float64
    np.testing.assert_array_equal(table.seconds_train, [2.0] * 6)
    np.testing.assert_array_equal(table.seconds_sample, [1.0] * 6)
    assert table.settings == [dict(s.settings) for s in specs]
    assert [store.find(evaluation_ids=[i])[0].spec for i in table.evaluation_ids] == specs
    np.testing.assert_array_equal(store.read(behavior_name="kid", removal_dist="shapley").behaviors, -table.behaviors)


def test_no_filter_differs_from_not_drawn(store: Store, measured: Callable[..., float]) -> None:
    measured(spec(1), spec(None, removal_dist=None, role="grand"))
    assert store.read(behavior_name="fid").removal_seeds.tolist() == [-1, 1]
    assert store.read(behavior_name="fid", removal_dist=ANY).removal_seeds.tolist() == [-1, 1]
    assert store.read(behavior_name="fid", removal_dist=None).removal_seeds.tolist() == [-1]
    assert store.read(behavior_name="fid", role="grand").removal_seeds.tolist() == [-1]


def test_further_filters(store: Store, measured: Callable[..., float]) -> None:
    measured(spec(1, datamodel_alpha=0.5), spec(1, datamodel_alpha=0.1), spec(1, opt_seed=3), spec(1, method="ga"))
    assert len(store.read(behavior_name="fid", datamodel_alpha=0.1)) == 1
    assert len(store.read(behavior_name="fid", opt_seed=3)) == 1
    assert len(store.read(behavior_name="fid", method="ga", dataset="digits")) == 1
    assert len(store.read(behavior_name="fid", dataset="cifar")) == 0


def test_a_stage_that_was_not_timed_is_nan(store: Store, study_id: int) -> None:
    store.add(study_id, [spec(0)])
    store.finish(claimed(store), {"fid": 1.0}, seconds={}, provenance={})
    assert math.isnan(store.read(behavior_name="fid").seconds_train[0])


def test_an_empty_table_tells_what_there_is(store: Store, measured: Callable[..., float]) -> None:
    assert store.read(behavior_name="fid").describe() == "The store holds no evaluations."
    measured(
        spec(0),
        spec(1),
        spec(2, exp_name="e9", method="retrain", removal_dist="datamodel", datamodel_alpha=0.5),
    )
    store.add(1, [spec(7)])
    table = store.read(behavior_name="fid", exp_name="typo")
    assert len(table) == 0 and table.masks.shape == (0, 0)
    assert "exp_name e1, method gd, removal_dist shapley" in table.describe()
    assert "1 pending, 2 finished; behaviors: fid, kid" in table.describe()
    assert "exp_name e9, method retrain, removal_dist datamodel, datamodel_alpha 0.5: 1 finished" in table.describe()
    assert table.describe() == store.describe()


def test_results_that_cannot_be_compared_are_not_read_together(store: Store, study_id: int) -> None:
    other = open_study(store, name="other", n=3)
    for study, one, definition in [
        (study_id, spec(0), {"variant": "inception"}),
        (study_id, spec(1), {"variant": "inception"}),
        (other, spec(0, [True, False, True]), {"variant": "inception"}),
    ]:
        (evaluation_id,) = store.add(study, [one])
        claim = claimed(store, evaluation_ids=[evaluation_id])
        store.finish(claim, {"fid": 1.0}, seconds={}, provenance={}, definitions={"fid": definition})
    with pytest.raises(MixedResultsError, match="studies 1, 2"):
        store.read(behavior_name="fid")
    assert store.read(behavior_name="fid", study_id=study_id).definition == {"variant": "inception"}
    store.add(study_id, [spec(2)])
    claim = claimed(store)
    store.finish(claim, {"fid": 1.0}, seconds={}, provenance={}, definitions={"fid": {"variant": "classifier"}})
    with pytest.raises(MixedResultsError, match=r"one definition.*classifier"):
        store.read(behavior_name="fid", study_id=study_id)


# Results from elsewhere, artifacts


def test_results_from_elsewhere_are_recorded_all_or_none(store: Store, study_id: int) -> None:
    study = store.studies()[0]
    results = [FinishedEvaluation(spec(seed), {"fid": float(seed)}) for seed in range(3)]
    (pending,) = store.add(study_id, [spec(1)])
    assert store.add_finished({study: results}) == 3
    assert store.add_finished({study: results}) == 0
    assert store.counts() == {"pending": 0, "running": 0, "finished": 3, "failed": 0}
    assert store.find(evaluation_ids=[pending])[0].behaviors == {"fid": 1.0}
    new = Study("new", "cifar", ("a",), (1,), "f")
    for bad, error in [
        (replace(results[0], behaviors={"fid": 9.0}), MixedResultsError),
        (replace(results[0], spec=spec(50), behaviors={"fid": math.nan}), BehaviorError),
    ]:
        good = FinishedEvaluation(spec(0, [True], dataset="cifar"), {"fid": 1.0})
        with pytest.raises(error):
            store.add_finished({new: [good], study: [bad]})
        assert len(store.studies()) == 1 and store.counts()["finished"] == 3


def test_artifacts(store: Store, study_id: int) -> None:
    store.record_artifact(study_id, "model", Path("models/full"), sha256="aa", meta={"steps": 5})
    store.record_artifact(study_id, "plot", "lds.svg", sha256="bb")
    store.record_artifact(study_id, "model", "models/full", sha256="cc")
    found = [(a.kind, a.path, a.sha256, a.meta) for a in store.artifacts(study_id)]
    assert found == [("model", "models/full", "cc", {}), ("plot", "lds.svg", "bb", {})]
    assert [a.path for a in store.artifacts(study_id, kind="plot")] == ["lds.svg"]
    with pytest.raises(StoreError, match="Study 9"):
        store.record_artifact(9, "model", "x", sha256="aa")
