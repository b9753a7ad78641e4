"""`lds.py` on stores whose evaluations follow a known game: what it reads, in which order, and what it prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tribute.cli import main
from tribute.cli.lds_command import (
    _END_POINTS_OF,
    Estimator,
    LdsArguments,
    chosen_estimators,
    fit_sizes,
    read_fit,
)
from tribute.config import StudyConfig
from tribute.errors import ConfigError, MixedResultsError
from tribute.games.coalitions import complements
from tribute.games.designs import DESIGNS, PAIRED_DESIGNS, coalitions_from
from tribute.games.kernels import BANZHAF_ESTIMATORS, fit_datamodel
from tribute.games.lds import compare_lds, lds
from tribute.games.removal import draw_coalition, draw_coalitions
from tribute.games.shapley import SHAPLEY_ESTIMATORS, fit_shapley
from tribute.store.records import EvaluationSpec, FinishedEvaluation, Store, Study

N = 8
WORTH = np.linspace(0.5, 4.0, N)
SETTINGS = {"data": "digits", "train": {"n_steps": 3}}
DEFINITION = {"unit": "", "higher_is_better": True}
FLAGS = "--train_db results.db --train_exp_name e --max_train_size 40 --model_behavior_key is"
SCORED = FLAGS + " --test_exp_name e"


def value(mask: np.ndarray) -> float:
    return float(10 * (1 - np.exp(-(mask @ WORTH) / 10)))


def evaluation(
    removal_dist: str | None,
    seed: int | None,
    mask: np.ndarray,
    *,
    method: str = "gd",
    opt_seed: int = 42,
    **changes: Any,
) -> FinishedEvaluation:
    noise = np.random.default_rng([0 if seed is None else seed, opt_seed, len(removal_dist or "")]).normal(scale=0.1)
    alpha = changes.get("alpha")
    spec = EvaluationSpec(
        "e", "digits", method, removal_dist, alpha, seed, mask, opt_seed, changes.get("settings", SETTINGS)
    )
    definitions = {"inception_score": changes.get("definition", DEFINITION)}
    return FinishedEvaluation(spec, {"inception_score": value(mask) + noise}, definitions=definitions)


def drawn(removal_dist: str, n: int, **changes: Any) -> list[FinishedEvaluation]:
    """The first evaluations of a law or design."""
    rows = islice(coalitions_from(removal_dist, N, 0), n)
    return [evaluation(removal_dist, seed, mask, **changes) for seed, mask in rows]


def retrained(alpha: float, n: int = 12) -> list[FinishedEvaluation]:
    masks = [draw_coalition("datamodel", N, seed, datamodel_alpha=alpha) for seed in range(n)]
    return [
        evaluation("datamodel", seed, mask, method="retrain", opt_seed=opt_seed, alpha=alpha)
        for opt_seed in (1, 2)
        for seed, mask in enumerate(masks)
    ]


END_POINTS = [
    evaluation(removal_dist, None, np.full(N, removal_dist is None), opt_seed=opt_seed)
    for removal_dist in ("empty", None)
    for opt_seed in (1, 2)
]


def record(evaluations: Iterable[FinishedEvaluation], dataset: str = "digits") -> None:
    study = Study("e", dataset, tuple(f"c{i}" for i in range(N)), (10,) * N, "data")
    with Store.open("results.db") as store:
        store.add_finished({study: list(evaluations)})


@pytest.fixture(autouse=True)
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main("lds", flags.split())
    return capsys.readouterr().out


def failing(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main("lds", flags.split())
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).split())


def cells(text: str, title: str) -> dict[str, list[str]]:
    """Rows of the table below a title, by their first cell."""
    lines = text.split(title, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("┡"))
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[start + 1 : end]]
    return {row[0]: row[1:] for row in rows}


def arguments(**changes: Any) -> LdsArguments:
    return LdsArguments(train_db="results.db", train_exp_name="e", max_train_size=40, **changes)


def fit_of(law: str = "shapley", **changes: Any) -> Any:
    return read_fit(arguments(**changes), "inception_score", law)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_rows_of_a_design_are_read_in_its_order(design: str) -> None:
    removal_dist = "shapley" if design == "kernel" else design
    record(reversed(drawn(removal_dist, 14)))
    for asked in (None, design):
        found = fit_of(design=asked)
        masks = np.array([mask for _, mask in islice(coalitions_from(removal_dist, N, 0), 14)])
        np.testing.assert_array_equal(found.masks, masks)
        assert (found.design, found.paired) == (design, design in PAIRED_DESIGNS)
        expected = [
            evaluation(removal_dist, seed, mask).behaviors["inception_score"] for seed, mask in enumerate(masks)
        ]
        np.testing.assert_array_equal(found.behaviors, expected)


def test_all_designs_of_an_experiment_are_read_one_after_the_other() -> None:
    record([*drawn("permutation", 7), *drawn("shapley", 5), *drawn("orthogonal", 6)])
    found = fit_of()
    expected = [
        mask
        for name, n in (("orthogonal", 6), ("shapley", 5), ("permutation", 7))
        for _, mask in islice(coalitions_from(name, N, 0), n)
    ]
    np.testing.assert_array_equal(found.masks, expected)
    assert (found.design, found.paired) == (None, False)
    assert fit_of(design="orthogonal").design == "orthogonal"
    np.testing.assert_array_equal(fit_of(design="kernel").masks, expected[6:11])


def test_pairs_of_two_designs_are_pairs() -> None:
    record([*drawn("stratified", 6), *drawn("paired", 4)])
    found = fit_of()
    np.testing.assert_array_equal(found.masks[1::2], complements(found.masks[::2]))
    assert (found.design, found.paired) == (None, True)


@pytest.mark.parametrize(("n_complements", "design"), [(6, "paired"), (5, None)])
def test_complements_of_older_stores_follow_their_draws(n_complements: int, design: str | None) -> None:
    record([*drawn("shapley", 6), *drawn("shapley_complement", n_complements)])
    found = fit_of()
    np.testing.assert_array_equal(found.masks[1 : 2 * n_complements : 2], ~found.masks[: 2 * n_complements : 2])
    np.testing.assert_array_equal(found.masks[:10:2], draw_coalitions("shapley", N, range(5)))
    assert (found.design, found.paired) == (design, design is not None)
    assert len(fit_of(design="kernel").masks) == 6


def test_evaluations_that_do_not_belong_together_are_refused() -> None:
    record([*drawn("paired", 4), *drawn("shapley", 2, settings=SETTINGS | {"train": {"n_steps": 4}})])
    with pytest.raises(
        MixedResultsError, match="--train_exp_name: evaluations were made with different settings: train"
    ):
        fit_of()
    assert len(fit_of(design="paired").masks) == 4


def test_sizes_are_as_published_or_doublings_and_pairs_stay_whole() -> None:
    assert fit_sizes(12, 100, 100) == [10, 12, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert fit_sizes(12, 230, 1000) == [12, 50, 100, 230]  # 200 would say what 230 says
    assert fit_sizes(20, 876, 1000) == [20, 50, 100, 200, 400, 876]
    assert fit_sizes(20, 5000, 1000) == [20, 50, 100, 200, 400, 1000]
    assert fit_sizes(20, 15, 1000) == [15]
    assert fit_sizes(7, 33, 100, paired=True) == [6, 10, 20, 30, 32]
    assert fit_sizes(7, 33, 15, paired=True) == [6, 10, 14]
    assert fit_sizes(7, 1, 15) == [1]
    assert fit_sizes(7, 1, 15, paired=True) == [1]  # half a pair is all there is


def test_every_estimator_of_games_can_be_chosen() -> None:
    assert set(get_args(Estimator)) == {*SHAPLEY_ESTIMATORS, *BANZHAF_ESTIMATORS, *_END_POINTS_OF} - {"shapley"}
    annotation = StudyConfig.model_fields["estimator"].annotation
    assert get_args(annotation) == SHAPLEY_ESTIMATORS
    chosen = chosen_estimators(arguments(estimator=get_args(Estimator)), "shapley")
    assert chosen["auto"] == ("shapley", "auto")
    assert chosen["gp"] == ("shapley", "gp")
    assert chosen["msr"] == ("banzhaf", "msr")
    assert chosen["loo"] == ("loo", None)
    assert chosen_estimators(arguments(), "uniform") == {"banzhaf": ("banzhaf", None)}
    assert chosen_estimators(arguments(kernel="datamodel"), "shapley") == {"datamodel": ("datamodel", None)}
    with pytest.raises(ConfigError, match="gp is of shapley values, not of --kernel datamodel"):
        chosen_estimators(arguments(estimator=("gp",)), "datamodel")


def test_estimators_stand_side_by_side_at_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    tested_too = evaluation("shapley", 17, draw_coalition("datamodel", N, 3), opt_seed=7)
    record([*END_POINTS, *drawn("shapley", 40), tested_too, *drawn("loo", N), *retrained(0.5)])
    text = printed(SCORED + " --estimator size_adjusted datamodel loo", capsys)
    table = cells(text, "LDS x 100 of is against")
    assert list(table) == ["8", "10", "20", "30", "40"]
    evaluations = fit_of()
    test_masks = draw_coalitions("datamodel", N, range(12))
    test_behaviors = np.array([e.behaviors["inception_score"] for e in retrained(0.5)]).reshape(2, 12)
    tested = {mask.tobytes() for mask in test_masks}
    keep = np.array([mask.tobytes() not in tested for mask in evaluations.masks])
    masks, behaviors = evaluations.masks[keep], evaluations.behaviors[keep]
    assert (keep.sum(), len(keep)) == (40, 41)
    assert text.count("1 fit coalitions are test coalitions, and were left out of the fit") == 1
    end = [float(np.mean([e.behaviors["inception_score"] for e in END_POINTS[i : i + 2]])) for i in (0, 2)]
    score = lds(fit_datamodel(masks[:20], behaviors[:20]), test_masks, test_behaviors)
    low, high = 100 * score.interval
    assert table["20"][1] == f"{100 * score.mean:.1f} ({low:.0f} to {high:.0f})"
    assert table["20"][2] == "-"
    assert table["8"][2] != "-"  # as many as there are contributors to leave out
    shapley = fit_shapley(masks, behaviors, v_empty=end[0], v_grand=end[1], estimator="size_adjusted", design="kernel")
    datamodel = fit_datamodel(masks, behaviors)
    difference = compare_lds(datamodel, shapley, test_masks, test_behaviors)
    low, high = 100 * difference.interval
    row = cells(text, "LDS x 100 with all coalitions, less that of size_adjusted")["datamodel"]
    assert row[0] == f"{100 * lds(datamodel, test_masks, test_behaviors).mean:.1f}"
    assert row[2:] == [
        f"{100 * difference.difference:+.1f} ({low:+.1f} to {high:+.1f})",
        f"{difference.probability:.0%}",
    ]
    assert cells(text, "inception_score: shapley (size_adjusted)").keys() == {f"c{i}" for i in range(N)}
    assert "ceiling" in text


def test_one_estimator_is_printed_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("shapley", 40), *retrained(0.5)])
    table = cells(printed(SCORED + " --estimator size_adjusted", capsys), "LDS x 100 of is against")
    mean, interval, per_seed = table["30"]
    assert float(mean) == pytest.approx(np.mean([float(x) for x in per_seed.split()]), abs=0.1)
    low, high = map(float, interval.split(" to "))
    assert low < float(mean) < high


def test_auto_says_what_it_chose_and_what_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("orthogonal", 16)])
    text = printed(FLAGS, capsys)
    assert "design orthogonal, estimator gp, 16 coalitions, effective noise of one evaluation" in text
    assert "leave-one-out R2 of the fit" in text
    assert "auto chose gp" in text
    assert "LDS" not in text
    ranks = [row[3] for row in cells(text, "inception_score: shapley (gp)").values()]
    assert all(1 <= int(rank.split("-")[0]) <= int(rank.split("-")[-1]) <= N for rank in ranks)


def test_several_alphas_give_a_table_each_on_the_same_fits(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("paired", 40), *retrained(0.25, n=40), *retrained(0.5), *retrained(0.75)])
    flags = SCORED + " --estimator size_adjusted --datamodel_alpha"
    text = printed(flags + " 0.25 0.75", capsys)
    tables = [cells(text, f"fit coalitions, alpha {alpha}") for alpha in ("0.25", "0.75")]
    tested = {e.spec.coalition_mask.tobytes() for alpha, n in ((0.25, 40), (0.75, 12)) for e in retrained(alpha, n)}
    n_left = sum(tested.isdisjoint({m.tobytes(), (~m).tobytes()}) for m in fit_of().masks)
    assert n_left < 40
    assert max(map(int, tables[0])) == n_left
    assert tables[0].keys() == tables[1].keys()
    assert tables[0] != tables[1]
    alone = printed(flags + " 0.5", capsys)
    assert "alpha" not in alone.splitlines()[1]
    assert "alpha 0.1" in failing(flags + " 0.5 0.1", capsys).replace("datamodel_", "")


def test_a_pair_is_dropped_whole_when_half_of_it_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    fit = drawn("paired", 40)
    tested = [
        evaluation("datamodel", seed, np.array(fit[row].spec.coalition_mask), method="retrain", alpha=0.5)
        for seed, row in enumerate((3, 10, 21, 22))
    ]
    record([*END_POINTS, *fit, *tested])
    text = printed(SCORED + " --estimator size_adjusted", capsys)
    assert "8 fit coalitions are test coalitions or their complements, and were left out" in text
    assert max(map(int, cells(text, "LDS x 100 of is against"))) == 32


def test_an_estimator_that_cannot_be_fitted_says_why_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("orthogonal", 30), *retrained(0.5)])
    text = printed(SCORED + " --estimator size_adjusted permutation", capsys)
    assert {row[1] for row in cells(text, "LDS x 100 of is against").values()} == {"-"}
    assert "permutation: 8, 10, 20" in text
    assert "cannot be fitted:" in text
    assert "permutation" not in cells(text, "less that of size_adjusted")
    message = failing(SCORED + " --estimator permutation size_adjusted", capsys)
    assert "permutation" in message


def test_without_convergence_the_last_row_and_the_attributions_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("orthogonal", 30), *retrained(0.5)])
    title = "LDS x 100 of is against"
    whole = printed(SCORED + " --estimator size_adjusted", capsys)
    last = printed(SCORED + " --estimator size_adjusted --no_convergence", capsys)
    assert len(cells(whole, title)) > 1
    assert list(cells(last, title).items()) == list(cells(whole, title).items())[-1:]
    attributions = [text.partition(": shapley (size_adjusted)")[2] for text in (last, whole)]
    assert attributions[0] == attributions[1] != ""


def test_one_at_a_time_kernels_use_all_coalitions_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("orthogonal", 30), *drawn("loo", N), *drawn("loo", N, opt_seed=43), *retrained(0.5)])
    text = printed(SCORED.replace("_size 40", "_size 10") + " --estimator datamodel loo", capsys)
    table = cells(text, "LDS x 100 of is against")
    assert [size for size, row in table.items() if row[1] != "-"] == [str(2 * N)]


def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    record([*END_POINTS, *drawn("orthogonal", 30), *retrained(0.5, n=2)])
    assert "--design" in failing(FLAGS + " --removal_dist datamodel --design paired", capsys)
    assert "design paired" in failing(FLAGS + " --design paired", capsys)
    assert "removal_dist loo" in failing(FLAGS + " --estimator auto loo", capsys)
    assert "expected at least 3 of alpha 0.5, found 2" in failing(SCORED, capsys)
    assert "--estimator" in failing(FLAGS + " --estimator best", capsys)
    record(drawn("loo", N, definition=DEFINITION | {"variant": "other"}))
    assert "another definition" in failing(FLAGS + " --estimator auto loo", capsys)


def test_the_command_does_not_wait_for_pytorch() -> None:
    """Attributions need no network: a second of imports less for every call."""
    code = "import sys, tribute.cli.lds_command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
