"""What a study says about its evaluations, here of a known game: intervals, ranks, what to measure next, the LDS."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tribute.cli.run_command import print_behavior
from tribute.config import StudyConfig
from tribute.games.designs import coalitions_from
from tribute.games.lds import compare_lds
from tribute.games.removal import draw_coalitions
from tribute.games.uncertainty import rank_intervals, separation
from tribute.store.records import EvaluationSpec, FinishedEvaluation, Store, Study
from tribute.study.outputs import attributions_csv, fit_notes, fit_warning, rank_texts, summary, write_outputs
from tribute.study.results import BehaviorResult, StudyResult, summarise_behavior
from tribute.types import Attributions

N = 6
NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "=Flo")
WORTH = np.array([5.0, 0.2, 3.4, 2.0, 2.1, 1.2])
BEHAVIORS = {"rise": 1.0, "fall": -1.0}


def behaviors_of(mask: np.ndarray, stream: np.random.Generator) -> dict[str, float]:
    v = float(10 * (1 - np.exp(-(mask @ WORTH) / 8)) + stream.normal(scale=0.25))
    return {name: sign * v for name, sign in BEHAVIORS.items()}


def evaluations(config: StudyConfig) -> list[FinishedEvaluation]:
    """All evaluations of a study, as if they had been measured."""
    stream = np.random.default_rng(0)
    rows: list[tuple[str, str | None, int | None, int, np.ndarray]] = []
    for opt_seed in (1, 2):
        rows.append(("empty", "empty", None, opt_seed, np.zeros(N, bool)))
        rows.append(("grand", None, None, opt_seed, np.ones(N, bool)))
    fit = islice(coalitions_from(config.fit.drawn_from, N, 0), config.fit.n_coalitions)
    rows += [("fit", config.fit.drawn_from, seed, 42, mask) for seed, mask in fit]
    rows += [("loo", "loo", i, 42, ~np.eye(N, dtype=bool)[i]) for i in range(N)]
    test = draw_coalitions("datamodel", N, range(config.test.n_coalitions), datamodel_alpha=0.5)
    rows += [("test", "datamodel", seed, opt_seed, mask) for opt_seed in (1, 2, 3) for seed, mask in enumerate(test)]
    return [
        FinishedEvaluation(
            EvaluationSpec(
                config.name,
                "digits",
                "retrain" if role == "test" else "gd",
                removal_dist,
                0.5 if role == "test" else None,
                seed,
                mask,
                opt_seed,
                {},
                role=role,
            ),
            behaviors_of(mask, stream),
            definitions={name: {"higher_is_better": sign > 0} for name, sign in BEHAVIORS.items()},
        )
        for role, removal_dist, seed, opt_seed, mask in rows
    ]


def study(tmp_path: Path, **changes: Any) -> StudyResult:
    """The result of a study whose evaluations are those of the game."""
    values = {"name": "known", "outdir": str(tmp_path), "behaviors": ["fid"], "fit": {"n_coalitions": 40}}
    values |= {"test": {"n_coalitions": 8, "opt_seeds": [1, 2, 3]}} | changes
    config = StudyConfig.parse(values, where="test")
    with Store.open(tmp_path / "results.db") as store:
        store.add_finished({Study("known", "digits", NAMES, (10,) * N, "data"): evaluations(config)})
        found = store.find()
        ids = [item.evaluation_id for item in found]
        results = [summarise_behavior(config, store, found[0].study_id, ids, name, NAMES) for name in BEHAVIORS]
    return StudyResult(config, NAMES, (10,) * N, results, {}, {}, None, {})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return study(tmp_path_factory.mktemp("study"))


def test_a_summary_holds_what_the_fit_says_of_itself(result: StudyResult) -> None:
    content = json.loads(json.dumps(summary(result), allow_nan=False))
    for item in result.behaviors:
        found = content["behaviors"][item.name]["attributions"]
        assert found.keys() == item.attributions.keys()
        for kernel, fitted in item.attributions.items():
            entry, higher = found[kernel], BEHAVIORS[item.name] > 0
            assert entry["design"] == ("loo" if kernel == "loo" else "orthogonal")
            assert entry["estimator"] == fitted.estimator
            assert entry["rank_intervals_95"] == rank_intervals(fitted, higher_is_better=higher).tolist()
            np.testing.assert_allclose(entry["values"], fitted.values)
            expected = separation(fitted, higher_is_better=higher)
            paired = fitted.design == "orthogonal"
            assert entry["separation"] == (None if expected is None else expected.sentence(NAMES, paired=paired))
        shapley = found["shapley"]
        assert shapley["estimator"] == "gp"
        assert shapley["explanation"].startswith("auto chose gp")
        assert found["shapley (least_squares)"]["explanation"] is None
        assert shapley["noise_sd"] == pytest.approx(item.attributions["shapley"].noise_sd)
        assert shapley["loo_r2"] == pytest.approx(item.attributions["shapley"].loo_r2)
        assert shapley["warning"] is None


def test_ranks_follow_the_direction_of_the_behavior(result: StudyResult) -> None:
    """The second behavior is the negative of the first, and lower is better: the same ranks."""
    rise, fall = (item.attributions["shapley"] for item in result.behaviors)
    np.testing.assert_allclose(rise.values, -fall.values, atol=1e-6)
    texts = rank_texts(rise, higher_is_better=True)
    assert texts == rank_texts(fall, higher_is_better=False)
    assert texts[0] == "1"
    assert texts[1] == "6"
    assert "-" in texts[3]  # nearly as good as the next


def test_the_table_of_attributions_gains_ranks(result: StudyResult) -> None:
    rows = list(csv.DictReader(attributions_csv(result).splitlines()))
    fitted = result.behaviors[1].attributions["shapley"]
    chosen = [row for row in rows if (row["behavior"], row["kernel"]) == ("fall", "shapley")]
    assert [row["contributor"] for row in chosen] == [*NAMES[:5], "'=Flo"]
    found = [[int(row["rank_low"]), int(row["rank_high"])] for row in chosen]
    assert found == rank_intervals(fitted, higher_is_better=False).tolist()


def test_every_attribution_is_compared_with_shapley_on_the_same_draws(result: StudyResult) -> None:
    item = result.behaviors[0]
    assert item.test_masks is not None
    lds = summary(result)["behaviors"]["rise"]["lds"]
    assert lds["shapley"]["less_shapley"] is None
    for kernel in ("shapley (least_squares)", "datamodel", "banzhaf", "loo"):
        expected = compare_lds(
            item.attributions[kernel], item.attributions["shapley"], item.test_masks, item.test_behaviors
        )
        assert lds[kernel]["less_shapley"] == {
            "difference": expected.difference,
            "interval_95": expected.interval.tolist(),
            "probability": expected.probability,
        }
        assert lds[kernel]["mean"] - lds["shapley"]["mean"] == pytest.approx(expected.difference)


def test_what_is_printed(result: StudyResult, capsys: pytest.CaptureFixture[str]) -> None:
    for item in result.behaviors:
        capsys.readouterr()
        print_behavior(item, result)
        text = " ".join(capsys.readouterr().out.split())
        fitted = item.attributions["shapley"]
        assert "│ contributor │ examples │ attribution │ 95 % interval │ rank │ share │".replace("│", "┃") in text
        assert f"design orthogonal, estimator gp, {fitted.n_coalitions} coalitions, effective noise" in text
        assert fitted.explanation in text
        better_first = np.argsort(-np.abs(fitted.values))
        assert sorted(NAMES, key=lambda name: text.index(f"│ {name} │")) == [NAMES[i] for i in better_first]
        assert "more pairs of coalitions should separate" in text
        assert "LDS x 100 less that of shapley, on the same draws" in text
        assert "warning" not in text
        low, high = item.validations["loo"].comparison.interval * 100  # type: ignore[union-attr]
        assert f"({low:+.1f} to {high:+.1f})" in text


def test_a_poor_fit_is_a_warning(result: StudyResult) -> None:
    fitted = result.behaviors[0].attributions["shapley"]
    for loo_r2, warned in ((-1.0, True), (0.19, True), (0.2, False), (0.9, False), (float("nan"), False)):
        notes = fit_notes(replace(fitted, loo_r2=loo_r2), NAMES, higher_is_better=True)
        assert any(note.startswith("warning: intervals rest on a poor fit") for note in notes) == warned
        assert (fit_warning(replace(fitted, loo_r2=loo_r2)) is not None) == warned
    poor = replace(result.behaviors[0], attributions={"shapley": replace(fitted, loo_r2=0.1)}, validations={})
    content = summary(replace(result, behaviors=[poor]))
    assert "(leave-one-out R2 0.10)" in content["behaviors"]["rise"]["attributions"]["shapley"]["warning"]


def test_what_is_unknown_is_left_out_or_null(result: StudyResult) -> None:
    unknown = Attributions(
        values=np.arange(6.0),
        covariance=np.full((6, 6), np.nan),
        kernel="shapley",
        estimator="least_squares",
        interval="analytic",
        n_coalitions=6,
        rank=6,
        intercept=0.0,
    )
    assert fit_notes(unknown, NAMES, higher_is_better=True) == [
        "design not known, estimator least_squares, 6 coalitions"
    ]
    assert rank_texts(unknown, higher_is_better=True) == ["1-6"] * 6
    item: BehaviorResult = replace(result.behaviors[0], attributions={"shapley": unknown}, validations={})
    entry = summary(replace(result, behaviors=[item]))["behaviors"]["rise"]["attributions"]["shapley"]
    nulls = ("design", "noise_sd", "loo_r2", "warning", "separation", "explanation")
    assert [entry[name] for name in nulls] == [None] * len(nulls)
    print_behavior(item, result)


def test_other_designs_and_estimators_are_named(tmp_path: Path) -> None:
    found = study(tmp_path, fit={"n_coalitions": 40, "design": "kernel"}, estimator="size_adjusted")
    shapley = found.behaviors[0].attributions["shapley"]
    assert (shapley.design, shapley.estimator, shapley.explanation) == ("kernel", "size_adjusted", "")
    close = replace(shapley, values=np.arange(6.0), covariance=0.2 * np.eye(6), n_coalitions=40)
    assert "more coalitions should separate" in fit_notes(close, NAMES, higher_is_better=True)[-1]
    paired = replace(close, design="stratified")
    assert "more pairs of coalitions should separate" in fit_notes(paired, NAMES, higher_is_better=True)[-1]
    assert "lds.png" in {path.name for path in write_outputs(found)}


def test_least_squares_is_not_reported_twice(tmp_path: Path) -> None:
    found = study(tmp_path, estimator="least_squares", test={"n_coalitions": 2})
    assert set(found.behaviors[0].attributions) == {"shapley", "datamodel", "banzhaf", "loo"}
    assert found.behaviors[0].validations == {}
