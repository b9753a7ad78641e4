"""A whole study: continued after any interruption, never mixed, and complete in what it writes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from tiny_study import SilentListener

from tribute.config import FitCoalitionsConfig, StudyConfig
from tribute.errors import ConfigError, FitError, MixedResultsError
from tribute.games.coalitions import coalition_key, coalition_keys
from tribute.games.designs import DESIGNS, PAIRED_DESIGNS, draw_design
from tribute.games.removal import draw_coalitions
from tribute.store.records import Store
from tribute.study.evaluations import plan_evaluations
from tribute.study.outputs import attributions_csv, credit_order, shares, summary, write_outputs
from tribute.study.results import StudyResult
from tribute.study.run import run_study

MakeStudy = Callable[..., StudyConfig]
SETTINGS = {"gd": {"steps": 1}, "retrain": {"steps": 2}}


def stored_values(config: StudyConfig) -> dict[str, dict[str, float]]:
    """Behaviors of every finished evaluation, by its identity."""
    with Store.open(config.db_url, create=False) as store:
        return {item.spec.identity: dict(item.behaviors) for item in store.find(statuses=("finished",))}


def test_every_stage_leaves_what_the_next_one_needs(make_study: MakeStudy) -> None:
    config = make_study()
    listener = SilentListener()
    result = run_study(config, listener)
    n_expected = 2 * 2 + 24 + 10 + 4 * 2
    assert listener.n_evaluations == n_expected
    assert len(stored_values(config)) == n_expected
    for item in result.behaviors:
        assert set(item.attributions) == {"shapley", "shapley (least_squares)", "datamodel", "banzhaf", "loo"} - set(
            item.unfitted
        )
        shapley = item.attributions["shapley"]
        options = item.end_points.options()
        np.testing.assert_allclose(shapley.values.sum(), options["v_grand"] - options["v_empty"], rtol=1e-9)
        assert item.test_behaviors is not None
        assert item.test_behaviors.shape == (2, 4)
        assert -1 <= item.validations["shapley"].score.mean <= 1
    assert result.behaviors[1].definition["higher_is_better"] is False


def test_a_second_run_measures_nothing_and_says_the_same(make_study: MakeStudy) -> None:
    config = make_study(test={"n_coalitions": 0})
    first = run_study(config, SilentListener())
    again = SilentListener()
    second = run_study(config, again)
    assert again.n_evaluations == 0
    assert attributions_csv(first) == attributions_csv(second)


@pytest.mark.parametrize("interrupt_after", [1, 7])
def test_an_interrupted_study_continues_to_the_same_values(make_study: MakeStudy, interrupt_after: int) -> None:
    small = {"fit": {"n_coalitions": 24, "n_end_points": 1, "first_removal_seed": 300}, "test": {"n_coalitions": 0}}
    undisturbed = make_study(name="undisturbed", **small)
    run_study(undisturbed, SilentListener())
    config = make_study(name="interrupted", **small)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, SilentListener(interrupt_after))
    with Store.open(config.db_url, create=False) as store:
        assert store.counts()["running"] == 0
    rest = SilentListener()
    run_study(config, rest)
    assert rest.n_evaluations == 26 - interrupt_after

    def without_name(values: dict[str, dict[str, float]]) -> list[tuple[float, ...]]:
        return sorted(tuple(item.values()) for item in values.values())

    assert without_name(stored_values(config)) == without_name(stored_values(undisturbed))


def test_other_settings_under_the_same_name_are_refused_and_more_coalitions_are_not(make_study: MakeStudy) -> None:
    fit = {"n_coalitions": 24, "n_end_points": 1, "first_removal_seed": 300}
    run_study(make_study(fit=fit, test={"n_coalitions": 0}), SilentListener())
    with pytest.raises(MixedResultsError, match=r"prune\.pruning_ratio: saved 0\.3, asked 0\.5"):
        run_study(
            make_study(fit=fit, test={"n_coalitions": 0}, prune={"pruning_ratio": 0.5}),
            SilentListener(),
        )
    more = SilentListener()
    run_study(make_study(fit=fit | {"n_coalitions": 27}, test={"n_coalitions": 0}), more)
    assert more.n_evaluations == 3


def test_a_study_stops_when_its_intervals_are_narrow(make_study: MakeStudy) -> None:
    """Looks are at 30, 34, 38, ... of ten contributors' coalitions; two in a row must be narrow."""
    fit = {"n_coalitions": 44, "n_end_points": 1, "until_interval": 1e6}
    config = make_study(fit=fit, test={"n_coalitions": 0})
    listener = SilentListener()
    result = run_study(config, listener)
    assert result.behaviors[0].attributions["shapley"].n_coalitions == 34
    assert listener.n_evaluations == 36
    assert any("10 coalitions are not needed" in text for text in listener.messages)
    again = SilentListener()
    run_study(config, again)
    assert again.n_evaluations == 0
    to_the_end = SilentListener()
    result = run_study(make_study(fit=fit | {"until_interval": 1e-9}, test={"n_coalitions": 0}), to_the_end)
    assert result.behaviors[0].attributions["shapley"].n_coalitions == 44
    assert to_the_end.n_evaluations == 10
    assert any("not narrow enough with all 44" in text for text in to_the_end.messages)


def test_a_mistyped_setting_does_not_lock_the_name_of_the_study(make_study: MakeStudy) -> None:
    with pytest.raises(ConfigError, match="brightnes"):
        run_study(make_study(behaviors=["brightnes"]), SilentListener())
    assert not make_study().run_dir.exists()


def test_a_behavior_that_is_not_a_number_fails_the_evaluation_not_the_store(make_study: MakeStudy) -> None:
    config = make_study(
        behaviors=["ink_behaviors:broken"],
        fit={"n_coalitions": 12, "n_end_points": 1},
        test={"n_coalitions": 0},
    )
    listener = SilentListener()
    with pytest.raises(FitError, match=r"the empty coalition could not be measured.*broken"):
        run_study(config, listener)
    assert any("evaluations failed" in text and "broken" in text for text in listener.messages)
    with Store.open(config.db_url, create=False) as store:
        failed = store.find(statuses=("failed",))
    assert [item.attempts for item in failed] == [3]  # without an end point, nothing else is worth a try


def test_fewer_coalitions_than_contributors_is_an_error_that_says_how_many(make_study: MakeStudy) -> None:
    few = {"fit": {"n_coalitions": 3, "n_end_points": 1}, "test": {"n_coalitions": 0}}
    with pytest.raises(FitError, match=r"brightness.*Measure at least"):
        run_study(make_study(estimator="size_adjusted", **few), SilentListener())
    fitted = run_study(make_study(**few), SilentListener()).behaviors[0].attributions["shapley"]
    assert fitted.estimator == "gp"  # which shrinks to equal credit, and says so


def test_the_outputs_hold_the_numbers_and_no_formula(make_study: MakeStudy) -> None:
    config = make_study()
    result = run_study(config, SilentListener())
    paths = {path.name: path for path in write_outputs(result)}
    assert set(paths) == {"attributions.csv", "attributions.parquet", "summary.json", "attributions.png", "lds.png"}
    for name in ("attributions.png", "lds.png"):
        assert paths[name].read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(paths["attributions.csv"].read_text().splitlines()))
    shapley = result.behaviors[0].attributions["shapley"]
    found = [
        float(row["attribution"])
        for row in rows
        if row["kernel"] == "shapley" and row["behavior"] == result.behaviors[0].name
    ]
    np.testing.assert_allclose(found, shapley.values, rtol=1e-6)
    content = json.loads(paths["summary.json"].read_text())
    assert content["behaviors"][result.behaviors[0].name]["lds"]["shapley"]["n_test"] == 4
    assert summary(result)["provenance"]["versions"]["torch"]
    hostile = StudyResult(**{**vars(result), "contributor_names": ("=cmd()", *result.contributor_names[1:])})
    assert "'=cmd()" in attributions_csv(hostile)


def test_credit_goes_in_the_direction_of_the_behavior(make_study: MakeStudy) -> None:
    result = run_study(make_study(test={"n_coalitions": 0}), SilentListener())
    higher, lower = result.behaviors
    assert np.all(np.diff(higher.attributions["shapley"].values[credit_order(higher)]) <= 0)
    assert np.all(np.diff(lower.attributions["shapley"].values[credit_order(lower)]) >= 0)
    np.testing.assert_allclose(shares(lower.attributions["shapley"]).sum(), 1.0)


def test_planned_coalitions_are_distinct_disjoint_and_extendable(make_study: MakeStudy) -> None:
    def draws(**fit: int) -> dict[str, list[str]]:
        config = make_study(fit={"n_coalitions": 100, "n_end_points": 1} | fit, test={"n_coalitions": 40})
        keys: dict[str, list[str]] = {}
        for spec in plan_evaluations(config, 10, SETTINGS):
            if spec.opt_seed == 42:
                keys.setdefault(spec.role or "", []).append(coalition_key(np.array(spec.coalition_mask)))
        return keys

    planned = draws()
    assert len(set(planned["fit"])) == 100
    config = make_study(fit={"n_coalitions": 100, "n_end_points": 1}, test={"n_coalitions": 40})
    tested = {
        coalition_key(np.array(spec.coalition_mask))
        for spec in plan_evaluations(config, 10, SETTINGS)
        if spec.role == "test"
    }
    assert len(tested) == 40
    assert not tested & set(planned["fit"])
    assert draws(n_coalitions=60)["fit"] == planned["fit"][:60]


def planned_fit(config: StudyConfig, n_contributors: int) -> list[tuple[str | None, int | None, str]]:
    """Law, seed and coalition of every fit evaluation."""
    return [
        (spec.removal_dist, spec.removal_seed, coalition_key(np.array(spec.coalition_mask)))
        for spec in plan_evaluations(config, n_contributors, SETTINGS)
        if spec.role == "fit"
    ]


@pytest.mark.parametrize("design", DESIGNS)
def test_a_design_is_measured_in_order_without_repeats_or_what_is_tested(make_study: MakeStudy, design: str) -> None:
    config = make_study(fit={"n_coalitions": 30, "design": design}, test={"n_coalitions": 6})
    plan = list(plan_evaluations(config, 6, SETTINGS))
    tested = {coalition_key(np.array(spec.coalition_mask)) for spec in plan if spec.role == "test"}
    together = 2 if design in PAIRED_DESIGNS else 1
    expected, seen = [], set(tested)
    keys = coalition_keys(draw_design(design, 6, 62 if together == 2 else 300))
    for row in range(0, len(keys), together):
        group = keys[row : row + together]
        if not seen & set(group):
            expected += [("shapley" if design == "kernel" else design, row + i, key) for i, key in enumerate(group)]
            seen |= set(group)
    assert planned_fit(config, 6) == expected[:30]
    assert len(expected) < len(keys)  # something was passed over


def test_a_pair_is_begun_with_its_first_row(make_study: MakeStudy) -> None:
    def rows(first: int) -> list[tuple[str | None, int | None, str]]:
        fit = {"n_coalitions": 4, "first_removal_seed": first}
        return planned_fit(make_study(fit=fit, test={"n_coalitions": 0}), 8)

    assert [seed for _, seed, _ in rows(6)] == [6, 7, 8, 9]
    assert rows(7) == rows(6)


def test_other_laws_have_no_design(make_study: MakeStudy) -> None:
    fit = {"n_coalitions": 6, "removal_dist": "uniform", "design": "paired"}
    plan = planned_fit(make_study(fit=fit, test={"n_coalitions": 0}), 8)
    assert plan == [
        ("uniform", seed, key) for seed, key in enumerate(coalition_keys(draw_coalitions("uniform", 8, range(6))))
    ]


def test_designs_of_settings_are_those_of_games() -> None:
    annotation = FitCoalitionsConfig.model_fields["design"].annotation
    assert get_args(annotation) == DESIGNS
    assert FitCoalitionsConfig().design == DESIGNS[0]
    with pytest.raises(ConfigError, match="paired"):
        FitCoalitionsConfig.parse({"paired": False}, where="fit")


@pytest.mark.parametrize("design", DESIGNS)
def test_more_coalitions_than_exist_is_an_error(make_study: MakeStudy, design: str) -> None:
    config = make_study(fit={"n_coalitions": 7, "design": design}, test={"n_coalitions": 0})
    with pytest.raises(FitError, match="expected 7 distinct coalitions of 3 contributors, found only 6 "):
        list(plan_evaluations(config, 3, SETTINGS))
    config = make_study(fit={"n_coalitions": 5, "design": design}, test={"n_coalitions": 2})  # of one contributor each
    n_left = 2 if design in PAIRED_DESIGNS else 4
    with pytest.raises(FitError, match=f"found only {n_left} that are not test coalitions; ask for fewer"):
        list(plan_evaluations(config, 3, SETTINGS))
