"""`max_device_hours`: never exceeded, everything bought is kept, and a raised budget goes on to the same results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_study import SilentListener

from tribute import pulse
from tribute.config import StudyConfig, TrainConfig
from tribute.store.records import Effort, Store
from tribute.study import run as run_module
from tribute.study.budget import Budget, estimate_from_training
from tribute.study.costs import ModelCosts, add_up, read_costs, read_model_costs
from tribute.study.outputs import attributions_csv
from tribute.study.record import StudyRecord
from tribute.study.run import run_study

MakeStudy = Callable[..., StudyConfig]

SMALL = {"fit": {"n_coalitions": 10, "n_end_points": 1, "first_removal_seed": 300}, "test": {"n_coalitions": 0}}
HOUR = 3600.0


@pytest.fixture
def hour_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation says that it took an hour of training, sampling and measuring; training the models, nothing."""
    make = run_module.make_executor

    def make_slow(prepared: Any, listener: Any) -> Any:
        executor: Any = make(prepared, listener)
        measure = executor.measure

        def slow(method: str, mask: Any, *, opt_seed: int) -> Any:
            evaluation = measure(method, mask, opt_seed=opt_seed)
            evaluation.seconds.update(train=HOUR / 2, sample=HOUR / 4, measure=HOUR / 4)
            return evaluation

        executor.measure = slow
        return executor

    monkeypatch.setattr(run_module, "make_executor", make_slow)


def costs_of(config: StudyConfig) -> Any:
    record = StudyRecord.read(config)
    with Store.open(config.db_url, create=False) as store:
        return read_costs(config, record, store)


def n_done(config: StudyConfig) -> int:
    with Store.open(config.db_url, create=False) as store:
        return store.counts()["finished"]


@pytest.mark.usefixtures("hour_per_evaluation")
def test_a_study_stops_before_its_budget_is_exceeded_and_goes_on_when_it_is_raised(make_study: MakeStudy) -> None:
    unlimited = run_study(make_study(name="unlimited", **SMALL), SilentListener())
    assert unlimited is not None
    listener = SilentListener()
    # Models take seconds: eight hours and a bit buy eight evaluations of an hour.
    config = make_study(**SMALL, max_device_hours=8.5)
    part = run_study(config, listener)
    assert n_done(config) == 8
    assert 8 < costs_of(config).device_hours <= 8.5
    assert part is not None and part.behaviors[0].attributions["shapley"].n_coalitions == 6
    told = [text for text in listener.messages if "max_device_hours" in text]
    assert len(told) == 1
    for figure in (
        "(8.5)",
        "2 of 2 end points",
        "6 of 10 fit coalitions (6 h)",
        "Missing: 4 fit coalitions",
        "raise",
    ):
        assert figure in told[0]
    again = SilentListener()
    run_study(config, again)
    assert again.n_evaluations == 0  # the same budget buys nothing more
    whole = run_study(make_study(**SMALL, max_device_hours=99), SilentListener())
    assert whole is not None
    assert attributions_csv(whole) == attributions_csv(unlimited)
    assert n_done(config) == 12


@pytest.mark.usefixtures("hour_per_evaluation")
def test_too_small_a_budget_for_any_fit_says_so_instead_of_failing(make_study: MakeStudy) -> None:
    listener = SilentListener()
    assert run_study(make_study(**SMALL, max_device_hours=2.5), listener) is None
    assert any("0 of 10 fit coalitions" in text for text in listener.messages)
    assert any("nothing can be fitted yet" in text for text in listener.messages)


@pytest.mark.usefixtures("hour_per_evaluation")
def test_a_study_that_looks_at_its_intervals_stops_at_its_budget_too(make_study: MakeStudy) -> None:
    fit = {"n_coalitions": 34, "n_end_points": 1, "until_interval": 1e-9}
    config = make_study(fit=fit, test={"n_coalitions": 0}, max_device_hours=33.5)
    result = run_study(config, SilentListener())
    assert result is not None and n_done(config) == 33
    assert len(StudyRecord.read(config).evaluations["fit"]) == 34  # the rest is still planned


def test_training_stops_within_a_budget_and_continues_to_the_same_bits(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which every update takes a minute."""
    undisturbed = make_study(name="undisturbed", **SMALL)
    run_study(undisturbed, SilentListener())
    with monkeypatch.context() as patched:
        patched.setattr("tribute.diffusion.train.time.perf_counter", lambda: 60.0 * pulse.n_beats())
        listener = SilentListener()
        config = make_study(name="stopped", **SMALL, max_device_hours=6 / 60)
        assert run_study(config, listener) is None
        costs = read_model_costs(config)
        assert 0 < costs["full"].n_steps < 6 and costs["sparse"].n_steps == 0
        assert costs["full"].device_seconds <= 6 * 60
        assert any("full model" in text and "raise max_device_hours" in text for text in listener.messages)
        assert run_study(config, SilentListener()) is None
        assert read_model_costs(config)["full"].n_steps == costs["full"].n_steps  # nothing is left to train with
    run_study(make_study(name="stopped", **SMALL, max_device_hours=99), SilentListener())

    def digests(name: str) -> list[str]:
        folder = make_study(name=name).run_dir
        found = sorted(folder.glob("digits/*/models/**/ckpt_steps_*/config.json"))
        # Names of studies are in no checkpoint, so that the bits are those of the weights and the optimizer.
        return [str(json.loads(path.read_text())["files"]) for path in found if "pruned" not in path.parts]

    assert len(digests("stopped")) == 2
    assert digests("stopped") == digests("undisturbed")
    values = []
    for name in ("stopped", "undisturbed"):
        with Store.open(make_study(name=name).db_url, create=False) as store:
            values.append([dict(item.behaviors) for item in store.find(statuses=("finished",))])
    assert values[0] == values[1]


def effort(status: Any, method: str = "gd", *, number: int = 1, **changes: Any) -> Effort:
    given: dict[str, Any] = {
        "evaluation_id": number,
        "role": "fit",
        "is_empty": False,
        "priority": 2,
        "attempts": 1,
        "seconds": {"train": 8.0, "sample": 2.0} if status == "finished" else {},
    }
    return Effort(method=method, status=status, **(given | changes))


def test_costs_count_devices_and_what_was_lost() -> None:
    models = {"full": ModelCosts(100, 50.0, 2), "sparse": ModelCosts(10, 5.0, 1)}
    costs = add_up(
        models,
        [
            effort("finished"),
            effort("finished", n_devices=4.0),  # four processes
            effort("finished", n_devices=0.25),  # a quarter of a GPU
            effort("failed", attempts=2, seconds_failed=6.0),
            effort("pending", attempts=1),  # it failed, and is tried again
            effort("running", attempts=1),
            effort("pending", attempts=0),
            effort("finished", "retrain", role="test"),
            effort("finished", "full", role="pilot"),
            effort("finished", role="another"),
        ],
        {"fit": 9, "test": 4},
    )
    assert costs.stages["full_model"].device_seconds == 100
    assert (costs.stages["fit"].n_done, costs.stages["fit"].n_planned) == (3, 9)
    assert (costs.stages["fit"].seconds, costs.stages["fit"].device_seconds) == (30, 52.5)
    assert costs.stages["fit"].seconds_by_part == {"train": 24, "sample": 6}
    assert costs.stages["pilot"].n_planned == costs.stages["other"].n_done == 1
    # 6 s of the last attempt, and two attempts that took nobody knows how long: as much as nine in ten, 40.
    assert costs.lost_device_seconds == 6 + 40 + 40
    assert costs.device_seconds == 100 + 5 + 52.5 + 30 + 86


class FakeStore:
    """Holds efforts."""

    def __init__(self, *efforts: Effort) -> None:
        self.found = list(efforts)

    def efforts(self, study_id: int) -> list[Effort]:
        return self.found


def budget(seconds: float, tmp_path: Path) -> Budget:
    return Budget(StudyConfig(name="none", outdir=tmp_path, max_device_hours=seconds / 3600))


def test_what_others_measure_now_is_counted(tmp_path: Path) -> None:
    done = [effort("finished", number=i) for i in range(2)]
    waiting = effort("pending", number=9, attempts=0)
    for n_running, seconds, allowed in ((0, 30, True), (0, 29, False), (3, 60, True), (3, 59, False)):
        store: Any = FakeStore(*done, *[effort("running", number=5 + i) for i in range(n_running)], waiting)
        assert budget(seconds, tmp_path).allows_next(store, 1, [9]) is allowed
    nothing_left: Any = FakeStore(*done)
    assert budget(1, tmp_path).allows_next(nothing_left, 1, [0, 1])


def test_the_next_evaluation_is_judged_by_its_own_method(tmp_path: Path) -> None:
    done = effort("finished", number=1)
    dear = effort("finished", "retrain", number=2, seconds={"train": 1000.0}, role="test")
    nobody = effort("pending", number=3, is_empty=True, priority=0, attempts=0)
    for following, expected in (
        (effort("pending", number=4, attempts=0), 10),
        (effort("pending", "retrain", number=5, attempts=0), 1000),
    ):
        store: Any = FakeStore(done, dear, following)
        assert budget(1010 + expected, tmp_path).allows_next(store, 1, [following.evaluation_id])
        assert not budget(1010 + expected - 1, tmp_path).allows_next(store, 1, [following.evaluation_id])
    first: Any = FakeStore(done, effort("pending", "retrain", number=5, attempts=0), nobody)
    asked = []
    limited = budget(15, tmp_path)
    limited.estimate = lambda method, is_empty: asked.append((method, is_empty)) or 5.0
    assert limited.allows_next(first, 1, [3, 5])  # nobody's comes first
    assert asked == [("gd", True)]


def test_a_first_estimate_comes_from_the_training_of_the_models() -> None:
    trainings = {
        "full_model": TrainConfig(n_steps=100, batch_size=10),
        "sparse_model": TrainConfig(n_steps=50, batch_size=10),
        "gd": TrainConfig(n_steps=20, batch_size=5),
        "retrain": TrainConfig(n_steps=40, batch_size=20),
    }
    sampling = StudyConfig(name="x").load_preset().sampling.replace(n_samples=10, num_inference_steps=4)
    models: dict[str, dict[str, Any]] = {
        "full": {"n_steps": 100, "seconds_train": 1000.0, "n_processes": 2},  # 2 device seconds an example
        "sparse": {"n_steps": 50, "seconds_train": 500.0, "n_macs": {"before": 30, "after": 10}},  # 1
    }
    estimate = estimate_from_training(models, trainings, sampling)
    assert estimate("retrain", False) == 2 * (40 * 20 + 0.5 * 40)
    assert estimate("gd", False) == 1 * (20 * 5 + 0.5 * 40)
    assert estimate("gd", True) == 0.5 * 40
    loaded = estimate_from_training({**models, "full": {"n_steps": 100}}, trainings, sampling)
    assert loaded("retrain", False) == 3 * (40 * 20 + 0.5 * 40)
