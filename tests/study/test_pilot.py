"""The pilot: it shares its retrained coalitions with the study, measures nothing twice, and is never fitted to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tiny_study import SilentListener

from tribute.config import StudyConfig
from tribute.errors import FitError, StoppedEarly
from tribute.store.records import Store, StoredEvaluation
from tribute.study.costs import read_costs
from tribute.study.evaluations import plan_evaluations
from tribute.study.outputs import attributions_csv
from tribute.study.pilot import plan_pilot, run_pilot
from tribute.study.pilot_record import PilotResult, read_pilot
from tribute.study.record import StudyRecord
from tribute.study.run import run_study

MakeStudy = Callable[..., StudyConfig]

STUDY: dict[str, Any] = {
    "fit": {"n_coalitions": 14, "n_end_points": 1, "first_removal_seed": 300},
    "test": {"n_coalitions": 4, "opt_seeds": [1, 2]},
    "pilot": {"n_coalitions": 5},
}


def stored(config: StudyConfig) -> list[StoredEvaluation]:
    with Store.open(config.db_url, create=False) as store:
        return store.find()


def by_role(config: StudyConfig) -> Counter[tuple[str | None, str]]:
    return Counter((item.spec.role, item.spec.method) for item in stored(config))


def test_a_study_with_a_pilot_gives_what_it_gives_without(make_study: MakeStudy) -> None:
    """And later, larger tests and fits by the law of the tests take nothing from it."""
    plain = run_study(make_study(name="plain", **STUDY), SilentListener())
    config = make_study(**STUDY)
    found = run_pilot(config, SilentListener())
    assert isinstance(found, PilotResult)
    # Four of the five retrained coalitions are the study's first tests; the fifth, and the sFT ones, are its own.
    assert by_role(config) == {
        ("test", "retrain"): 4 + 1,  # and the first of them with its second seed
        ("pilot", "retrain"): 1,
        ("pilot", "gd"): 5 + 1,
        ("pilot", "full"): 1,
        ("pilot", "sparse"): 1,
    }
    listener = SilentListener()
    result = run_study(config, listener)
    assert plain is not None and result is not None
    assert attributions_csv(result) == attributions_csv(plain)
    scores = [item.behaviors[0].validations["shapley"].score for item in (plain, result)]
    assert scores[0].per_seed.tolist() == scores[1].per_seed.tolist()
    assert any("pilot" in text and "warning" in text for text in listener.messages) != found.passed
    assert listener.n_evaluations == 2 + 14 + 8 - 5  # what the pilot measured is not measured again
    assert {item.attempts for item in stored(config)} == {1}
    larger = make_study(**STUDY | {"test": {"n_coalitions": 6, "opt_seeds": [1, 2, 3]}})
    again = SilentListener()
    assert run_study(larger, again) is not None
    assert again.n_evaluations == 6 * 3 - 8  # no conflict of roles with the fifth coalition or with other seeds


def test_a_pilot_that_was_interrupted_goes_on_and_a_second_one_measures_nothing(make_study: MakeStudy) -> None:
    undisturbed = run_pilot(make_study(name="undisturbed", **STUDY), SilentListener())
    config = make_study(**STUDY)
    with pytest.raises(KeyboardInterrupt):
        run_pilot(config, SilentListener(interrupt_after=4))
    assert read_pilot(config.run_dir) is None
    rest = SilentListener()
    found = run_pilot(config, rest)
    assert rest.n_evaluations == 14 - 4
    assert undisturbed is not None and found is not None
    assert found.behaviors == undisturbed.behaviors
    assert read_pilot(config.run_dir) == found
    again = SilentListener()
    second = run_pilot(config, again)
    assert again.n_evaluations == 0 and second == found
    more = SilentListener()
    run_pilot(make_study(**STUDY | {"pilot": {"n_coalitions": 7}}), more)
    assert more.n_evaluations == 2 * 2  # those that are measured are kept


def test_what_a_pilot_says_is_what_was_measured(make_study: MakeStudy) -> None:
    config = make_study(**STUDY)
    found = run_pilot(config, SilentListener())
    assert found is not None
    assert [item.name for item in found.behaviors] == list(StudyRecord.read(config).behaviors)
    evaluations = stored(config)
    for item in found.behaviors:

        def value(method: str, mask: str, seed: int, name: str = item.name) -> float:
            matching = [
                one.behaviors[name]
                for one in evaluations
                if one.spec.method == method
                and one.spec.opt_seed == seed
                and "".join("01"[int(x)] for x in one.spec.coalition_mask) == mask
            ]
            assert len(matching) == 1
            return matching[0]

        masks = found.coalition_masks
        assert item.sft == tuple(value("gd", mask, 42) for mask in masks)
        assert item.retrain == tuple(value("retrain", mask, 1) for mask in masks)
        assert item.full == value("full", "1" * 10, 42)
        assert item.sparse == value("sparse", "1" * 10, 42)
        assert item.sft_noise == pytest.approx(abs(item.sft[0] - value("gd", masks[0], 43)) / 2**0.5)
        assert item.retrain_noise == pytest.approx(abs(item.retrain[0] - value("retrain", masks[0], 2)) / 2**0.5)
    assert [item.higher_is_better for item in found.behaviors] == [True, False]


def test_models_as_they_are_cost_no_training(make_study: MakeStudy) -> None:
    """Theirs is counted with the models."""
    config = make_study(**STUDY)
    run_pilot(config, SilentListener())
    as_they_are = [item for item in stored(config) if item.spec.method in ("full", "sparse")]
    assert [item.seconds["train"] for item in as_they_are] == [0.0, 0.0]
    with Store.open(config.db_url, create=False) as store:
        costs = read_costs(config, StudyRecord.read(config), store)
    assert costs.stages["pilot"].n_done == 9
    assert costs.stages["test"].n_done == 5
    assert costs.stages["full_model"].seconds > 0


def test_a_pilot_keeps_to_the_budget(make_study: MakeStudy) -> None:
    run_study(make_study(**STUDY), SilentListener())
    with pytest.raises(StoppedEarly, match=r"evaluations of the pilot.*raise max_device_hours"):
        run_pilot(make_study(**STUDY, max_device_hours=1e-5), SilentListener())


def test_a_pilot_leaves_a_study_that_stopped_early_as_it_is(make_study: MakeStudy) -> None:
    """Its record names the evaluations that counted, not all of its plan. A pilot that comes first makes one."""
    fit = {"n_coalitions": 44, "n_end_points": 1, "until_interval": 1e6}
    config = make_study(fit=fit, test={"n_coalitions": 0}, pilot={"n_coalitions": 3})
    run_study(config, SilentListener())
    stopped = StudyRecord.read(config)
    assert len(stopped.evaluations["fit"]) == 34
    run_pilot(config, SilentListener())
    assert StudyRecord.read(config) == stopped
    new = make_study(name="new", fit=fit, test={"n_coalitions": 0}, pilot={"n_coalitions": 3})
    run_pilot(new, SilentListener())
    assert len(StudyRecord.read(new).evaluations["fit"]) == 44


def test_a_pilot_without_tests_draws_its_own_coalitions(make_study: MakeStudy) -> None:
    config = make_study(**STUDY | {"test": {"n_coalitions": 0, "opt_seeds": []}})
    specs = plan_pilot(config, list(plan_evaluations(config, 10, SETTINGS)), 10, SETTINGS)
    assert {spec.role for spec in specs.all} == {"pilot"}
    assert len({spec.identity for spec in specs.all}) == 14
    with_tests = make_study(**STUDY | {"test": {"n_coalitions": 40}})
    shared = plan_pilot(with_tests, list(plan_evaluations(with_tests, 10, SETTINGS)), 10, SETTINGS)
    assert {spec.role for spec in shared.retrain} == {"test"}
    assert [spec.coalition_mask.tobytes() for spec in shared.sft] == [
        spec.coalition_mask.tobytes() for spec in specs.sft
    ]


def test_a_pilot_s_identities_are_nobody_else_s(make_study: MakeStudy) -> None:
    """Also where the fit draws by the law of the tests, and whatever number of tests there are later."""
    fit = {"n_coalitions": 30, "removal_dist": "datamodel"}
    small = make_study(fit=fit, test={"n_coalitions": 3})
    pilot = plan_pilot(small, list(plan_evaluations(small, 10, SETTINGS)), 10, SETTINGS)
    own = {spec.identity for spec in pilot.all if spec.role == "pilot"}
    for n_tests in (0, 3, 20):
        later = make_study(fit=fit, test={"n_coalitions": n_tests, "opt_seeds": [42, 43, 44, 45]})
        assert not own & {spec.identity for spec in plan_evaluations(later, 10, SETTINGS)}


def test_too_few_coalitions_for_a_pilot_is_an_error(make_study: MakeStudy) -> None:
    config = make_study(test={"n_coalitions": 0}, pilot={"n_coalitions": 8})
    with pytest.raises(FitError, match="ask for fewer"):
        plan_pilot(config, [], 3, SETTINGS)


SETTINGS: dict[str, dict[str, Any]] = {"gd": {"a": 1}, "retrain": {"b": 2}, "full": {"c": 3}, "sparse": {"d": 4}}
