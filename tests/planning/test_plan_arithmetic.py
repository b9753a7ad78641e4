"""The plan's arithmetic, by hand: synthetic costs, a small study, and what is done already."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tribute.config import StudyConfig, TrainConfig
from tribute.store.records import Effort
from tribute.study.costs import add_up
from tribute.study.evaluations import plan_evaluations
from tribute.study.plan import Done, StudyPlan, UnitCosts, makespan, plan_study

SETTINGS: dict[str, dict[str, Any]] = {"gd": {}, "retrain": {}}
UNITS = UnitCosts(
    device="a calculator",
    seconds_per_step={"full_model": 2.0, "sparse_model": 1.0, "gd": 0.5, "retrain": 3.0},
    seconds_sample={"gd": 10.0, "retrain": 20.0},
    seconds_measure={"gd": 1.0, "retrain": 1.0},
    seconds_prune=7.0,
    seconds_setup=30.0,
    seconds_classifier=100.0,
    seconds_references=0.0,
    seconds_latents=0.0,
    n_parameters={"full": 1000, "sparse": 500},
)
TRAININGS = {
    name: TrainConfig(n_steps=n_steps)
    for name, n_steps in {"full_model": 100, "sparse_model": 50, "gd": 20, "retrain": 40}.items()
}
# Seconds of an evaluation: nobody's is not trained.
EMPTY, GD, RETRAIN = 11.0, 20 * 0.5 + 11.0, 40 * 3.0 + 21.0


def planned(done: Done | None = None, *, n_pictured_behaviors: int = 0, **changes: Any) -> StudyPlan:
    values: dict[str, Any] = {
        "name": "by_hand",
        "pictures": {"n_images": 0},
        "fit": {"n_coalitions": 6, "n_end_points": 2, "leave_one_out": True},
        "test": {"n_coalitions": 3, "opt_seeds": [1, 2]},
    }
    config = StudyConfig.parse(values | changes, where="test")
    specs = list(plan_evaluations(config, 5, SETTINGS))
    return plan_study(config, TRAININGS, 100, specs, UNITS, done, n_pictured_behaviors=n_pictured_behaviors)


def test_every_stage_is_what_a_hand_computes() -> None:
    stages = {stage.name: stage for stage in planned().stages}
    assert {name: (stage.n_coalitions, stage.n_steps, stage.n_images) for name, stage in stages.items()} == {
        "classifier": (0, 0, 0),
        "full_model": (0, 100, 0),
        "pruning": (0, 0, 0),
        "sparse_model": (0, 50, 0),
        "end_points": (4, 2 * 20, 400),
        "fit": (6, 120, 600),
        "loo": (5, 100, 500),
        "test": (6, 240, 600),
    }
    assert {name: stage.seconds for name, stage in stages.items()} == {
        "classifier": 100,
        "full_model": 200,
        "pruning": 7,
        "sparse_model": 50,
        "end_points": 2 * EMPTY + 2 * GD,
        "fit": 6 * GD,
        "loo": 5 * GD,
        "test": 6 * RETRAIN,
    }
    # Weights, average and two statistics of four bytes; the pruned model has no optimizer.
    assert (stages["full_model"].bytes, stages["pruning"].bytes) == (16 * 1000, 8 * 500)


def test_hours_and_the_clock_are_what_a_hand_computes() -> None:
    plan = planned()
    preparation = 100 + 200 + 7 + 50
    coalitions = 2 * EMPTY + 13 * GD + 6 * RETRAIN
    assert plan.device_hours() == pytest.approx((30 + preparation + coalitions) / 3600)
    assert plan.wall_seconds(1) == pytest.approx(30 + preparation + coalitions)
    # With a worker for each of 21 coalitions the longest decides; the process itself and the workers are set up.
    assert plan.wall_seconds(21) == pytest.approx(30 + preparation + 30 + RETRAIN)
    assert plan.wall_seconds(64) == plan.wall_seconds(21)


def test_coalitions_are_not_divided() -> None:
    plan = planned(fit={"n_coalitions": 8, "n_end_points": 1}, test={"n_coalitions": 0})
    rest = 30 + 357 + 30
    # 10 coalitions, nobody's among them, of 4 workers: three rounds, however short nobody's is.
    assert plan.wall_seconds(4) == pytest.approx(rest + 3 * GD)
    assert makespan([5.0] * 9, 4) == 3 * 5.0
    assert makespan([], 4) == 0.0


@given(st.lists(st.floats(0.1, 100), max_size=30), st.integers(1, 20))
def test_a_schedule_is_neither_better_than_possible_nor_worse_than_greedy(tasks: list[float], n_workers: int) -> None:
    found = makespan(tasks, n_workers)
    least = max([sum(tasks) / n_workers, *tasks], default=0.0) if tasks else 0.0
    assert least * (1 - 1e-9) <= found <= (2 * least) * (1 + 1e-9)


def test_what_is_done_is_subtracted() -> None:
    done = Done({"full": 100, "sparse": 20}, {"empty": 2, "grand": 1, "fit": 4, "test": 1})
    plan = planned(done)
    left = {stage.name: (stage.n_left, stage.seconds_left) for stage in plan.stages}
    assert left == {
        "classifier": (0, 100),
        "full_model": (0, 0),
        "pruning": (0, 0),
        "sparse_model": (0, 30),
        "end_points": (1, GD),
        "fit": (2, 2 * GD),
        "loo": (5, 5 * GD),
        "test": (5, 5 * RETRAIN),
    }
    assert plan.device_hours() == planned().device_hours()
    assert plan.wall_seconds(1, left=True) == pytest.approx(30 + 100 + 30 + 8 * GD + 5 * RETRAIN)


def test_more_done_than_asked_for_leaves_nothing() -> None:
    plan = planned(Done({"full": 900, "sparse": 900}, dict.fromkeys(("empty", "grand", "fit", "loo", "test"), 99)))
    assert sum(stage.seconds_left for stage in plan.stages) == 100  # the classifier, of which the units speak
    assert plan.wall_seconds(4, left=True) == 30 + 100


def test_pictures_are_made_after_the_coalitions_by_one_process() -> None:
    without, plan = planned(), planned(n_pictured_behaviors=2, pictures={"n_images": 64})
    stage = plan.stages[-1]
    assert (stage.name, stage.n_coalitions, stage.n_steps, stage.n_images) == ("pictures", 3, 60, 300)
    assert plan.device_hours() == pytest.approx(without.device_hours() + 3 * GD / 3600)
    assert plan.wall_seconds(21) == pytest.approx(without.wall_seconds(21) + 3 * GD)
    left = planned(Done(n_finished={"picture": 1}), n_pictured_behaviors=2, pictures={"n_images": 64})
    assert (left.stages[-1].n_left, left.stages[-1].seconds_left) == (2, 2 * GD)


def test_what_pictures_took_has_a_name() -> None:
    effort = Effort(1, "picture", "gd", False, 100, "finished", 1, {"train": 2.0})
    stages = add_up({}, [effort]).stages
    assert {name: (stage.n_done, stage.n_planned, stage.seconds) for name, stage in stages.items()} == {
        "pictures": (1, 1, 2.0)
    }


def test_a_full_model_that_is_loaded_costs_nothing() -> None:
    assert "full_model" not in {stage.name for stage in planned(full_model={"load": "elsewhere"}).stages}


def test_the_json_of_a_plan_has_the_figures_of_the_table() -> None:
    plan = planned()
    content = plan.as_json([1, 4])
    assert content["device_hours"] == {"in_all": plan.device_hours(), "left": plan.device_hours(left=True)}
    assert content["wall_seconds"]["4"]["in_all"] == plan.wall_seconds(4)
    assert [stage["name"] for stage in content["stages"]] == [stage.name for stage in plan.stages]
