"""The benchmarks' games, against enumeration; and what the benchmarks report, against made-up results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cells import Cell, cell_of, design_coalitions, measure_cells, read_records
from benchmarks.coverage import COVERED, coverage_of, measure_coverage, tables
from benchmarks.estimators import BASELINE, DEFAULT, ROWS, check_targets, held_out_coalitions, measure_row
from benchmarks.games import (
    GAMES,
    Game,
    NoisyGame,
    contrasts,
    enumerated_shapley,
    half_coalitions,
    make_game,
    relative_error,
    sampled_truth,
)
from tribute.errors import ConfigError
from tribute.games.coalitions import all_coalitions, coalition_keys
from tribute.games.exact import exact_shapley_from_table
from tribute.games.shapley import fit_shapley
from tribute.seeding import numpy_stream
from tribute.types import Attributions


def exact(game: Game) -> np.ndarray:
    """Shapley values by the package's own enumeration."""
    return exact_shapley_from_table(game.value(all_coalitions(game.n_contributors)))


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("n", [2, 7, 10])
def test_truth_is_what_enumeration_finds(name: str, n: int) -> None:
    game = make_game(name, n, seed=n)
    truth, oracle = game.truth(), exact(game)
    assert truth.source == ("formula" if game.formula else "enumeration")
    np.testing.assert_allclose(truth.values, oracle, rtol=0, atol=1e-12 * max(1.0, np.abs(oracle).max()))
    np.testing.assert_allclose(enumerated_shapley(game), oracle, rtol=0, atol=1e-12 * max(1.0, np.abs(oracle).max()))


@pytest.mark.parametrize("name", GAMES)
def test_sampled_truth_has_the_error_that_it_states(name: str) -> None:
    game = make_game(name, 8, seed=1)
    sampled, oracle = sampled_truth(game, tolerance=0.01), exact(game)
    assert 0 < sampled.relative_error <= 0.01
    assert relative_error(sampled.values, oracle) < 3 * sampled.relative_error
    np.testing.assert_allclose(sampled.values.sum(), oracle.sum(), rtol=1e-10)


@pytest.mark.parametrize("name", GAMES)
def test_games_are_finite_reproducible_and_differ_between_seeds(name: str) -> None:
    game, again, other = make_game(name, 30, seed=0), make_game(name, 30, seed=0), make_game(name, 30, seed=1)
    masks = np.vstack([np.zeros(30, bool), np.ones(30, bool), half_coalitions(30, 20, 0, "test")])
    values = game.value(masks)
    assert np.isfinite(values).all()
    assert game.spread > 0
    np.testing.assert_array_equal(values, again.value(masks))
    assert not np.allclose(values[2:], other.value(masks)[2:])
    one_by_one = np.concatenate([game.value(mask[None]) for mask in masks])
    np.testing.assert_allclose(values, one_by_one, rtol=1e-10)
    np.testing.assert_allclose(game.end_points, values[:2], rtol=1e-10)


def test_games_mean_what_their_names_say() -> None:
    assert make_game("inception_score", 12, 0).end_points[0] == pytest.approx(1.0)
    assert make_game("entropy", 12, 0).end_points[0] == pytest.approx(0.0)
    for name in ("inception_score", "frechet", "diversity", "learning_curve", "entropy", "coverage"):
        for seed in range(3):
            credit = make_game(name, 12, seed).truth().values * (-1.0 if name == "frechet" else 1.0)
            useless, harmful = numpy_stream(seed, "benchmark_game", name, 12).permutation(12).argsort()[:2]
            assert credit.sum() > 0, name
            assert credit[[useless, harmful]].max() < 0.5 * np.abs(credit).mean(), name
            assert name == "frechet" or credit[harmful] < 0, name


def test_frechet_distance_of_the_reference_to_itself_is_zero() -> None:
    game = make_game("frechet", 20, seed=3)
    order = numpy_stream(3, "benchmark_game", "frechet", 20).permutation(20)
    harmful = (order >= 2) & (order < 4)
    reference = game.contributions[~harmful].sum(axis=0)
    assert game.behavior(reference) == pytest.approx(0.0, abs=1e-10)
    assert game.behavior(reference + game.contributions[harmful].sum(axis=0)) > 0.01


def test_half_coalitions_have_half_the_contributors() -> None:
    assert (half_coalitions(11, 50, 0, "test").sum(axis=1) == 5).all()


def test_noise_belongs_to_the_coalition() -> None:
    game = make_game("saturation", 12, 0)
    masks = all_coalitions(12)
    noisy = NoisyGame(game, 0.5, seed=4).value(masks)
    noise = noisy - game.value(masks)
    assert noise[0] == noise[-1] == 0.0
    assert noise[1:-1].std() == pytest.approx(0.5 * game.spread, rel=0.05)
    np.testing.assert_array_equal(NoisyGame(game, 0.5, seed=4).value(masks[::-7]), noisy[::-7])
    np.testing.assert_allclose(NoisyGame(game, 0.1, seed=4).value(masks) - game.value(masks), noise / 5, atol=1e-12)
    assert abs(np.corrcoef(noise, NoisyGame(game, 0.5, seed=5).value(masks) - game.value(masks))[0, 1]) < 0.1


def test_sampled_truth_is_kept_and_kept_truth_of_another_game_is_not_believed(tmp_path: Path) -> None:
    game = make_game("emergence", 17, 0)
    truth = game.truth(tmp_path)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"values": [1.0] * 17}))
    assert game.truth(tmp_path).values.tolist() == [1.0] * 17
    path.write_text(json.dumps(kept | {"values": [1.0] * 17, "fingerprint": "another"}))
    np.testing.assert_array_equal(game.truth(tmp_path).values, truth.values)
    assert json.loads(path.read_text()) == kept


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    cells = [Cell(seed=0, n=6, game="saturation", noise=0.1, m=12, row=row) for row in (BASELINE, "exact", DEFAULT)]
    first = asdict(cells[0]) | {"error": 7.0}
    out.write_text(json.dumps(first) + "\n" + json.dumps(asdict(cells[1]))[:20])
    measure_cells(cells, measure_row, out, cache_dir=tmp_path, n_jobs=1)
    records = read_records(out)
    assert records[0] == first
    assert sorted(cell_of(r) for r in records) == sorted(cells)
    by_row = {r["row"]: r for r in records}
    assert by_row["exact"]["error"] == 0.0
    assert by_row[DEFAULT]["estimator"] == "gp"


@pytest.mark.parametrize("row", ROWS)
def test_every_row_fits_with_its_budget(row: str, tmp_path: Path) -> None:
    cell = Cell(seed=2, n=8, game="coverage", noise=0.1, m=40, row=row)
    record = measure_row(cell, tmp_path)
    assert "failed" not in record
    assert record["lds"] > 0.2
    assert ("error" in record) == ROWS[row].is_shapley
    assert record.get("n_distinct", 0) <= 40


def test_a_row_is_the_estimator_on_the_noisy_game(tmp_path: Path) -> None:
    cell = Cell(seed=1, n=7, game="entropy", noise=0.3, m=28, row="orthogonal+size_adjusted")
    game = make_game("entropy", 7, 1)
    masks = design_coalitions("orthogonal", 7, 28, cell.design_seed)
    v_empty, v_grand = game.end_points
    noisy = NoisyGame(game, 0.3, 1).value(masks)
    fitted = fit_shapley(masks, noisy, v_empty=v_empty, v_grand=v_grand, estimator="size_adjusted")
    assert measure_row(cell, tmp_path)["error"] == pytest.approx(relative_error(fitted.values, exact(game)), rel=1e-9)


def test_held_out_coalitions_were_not_fitted() -> None:
    cell = Cell(seed=0, n=10, game="entropy", noise=0.1, m=100, row=BASELINE)
    everything = held_out_coalitions(cell, np.zeros((0, 10), dtype=bool))
    rest = held_out_coalitions(cell, everything[::2])
    assert len(everything) == len(set(coalition_keys(everything))) == 200
    assert not set(coalition_keys(rest)) & set(coalition_keys(everything[::2]))
    assert set(coalition_keys(everything[1::2])) <= set(coalition_keys(rest))


def test_relative_error_is_of_the_contrasts() -> None:
    truth = np.array([1.0, 2.0, 4.0])
    assert relative_error(truth + 5.0, truth) == pytest.approx(0.0)
    assert relative_error(np.full(3, 9.0), truth) == pytest.approx(1.0)
    assert contrasts(truth).sum() == pytest.approx(0.0)


def test_coverage_of_correct_intervals_is_their_level() -> None:
    stream = np.random.default_rng(0)
    truth = np.array([0.0, 0.0, 1.0, 2.0, 5.0])
    root = np.tril(stream.normal(size=(5, 5))) + np.eye(5)
    found = []
    for _ in range(400):
        values = truth + root @ stream.normal(size=5)
        found.append(coverage_of(attributions(values, root @ root.T), truth))
    means = {name: np.mean([record[name] for record in found]) for name in COVERED}
    for name in ("contributors", "differences", "all_at_once"):
        assert means[name] == pytest.approx(0.95, abs=0.02)
    assert means["ranks"] > 0.95
    exactly = coverage_of(attributions(truth, np.zeros((5, 5))), truth)
    assert set(exactly.values()) == {1.0}
    # Whoever comes first of two with equal credit is not wrong.
    apart = coverage_of(attributions(truth + np.array([1e-3, 0.0, 0.0, 0.0, 0.0]), np.eye(5) * 1e-12), truth)
    assert apart["ranks"] == 1.0
    wrong = coverage_of(attributions(truth + np.array([0.0, 0.0, 0.0, 0.0, -4.5]), np.eye(5) * 1e-6), truth)
    assert wrong == {"contributors": 0.8, "differences": 0.6, "ranks": 0.4, "all_at_once": 0.0}
    assert set(coverage_of(attributions(truth, np.full((5, 5), np.nan)), truth).values()) == {None}


def test_coverage_knows_noisy_end_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def fit(*args: Any, **options: Any) -> Attributions:
        told.append(options)
        return fit_shapley(*args, **options)

    monkeypatch.setattr("benchmarks.coverage.fit_shapley", fit)
    records = []
    for row in ("orthogonal+gp", "orthogonal+gp+noisy_ends"):
        cell = Cell(seed=0, n=6, game="learning_curve", noise=0.3, m=30, row=row)
        records.append(asdict(cell) | measure_coverage(cell, tmp_path))
    without, noisy = records
    # The ends move every contributor alike: the contrasts and their predicted error stay.
    assert noisy["predicted_square"] == pytest.approx(without["predicted_square"])
    assert noisy["error"] == pytest.approx(without["error"])
    assert told[0]["v_grand_variance"] == 0.0
    assert told[1]["v_grand_variance"] == pytest.approx((0.3 * make_game("learning_curve", 6, 0).spread) ** 2)
    assert told[0]["v_grand"] != told[1]["v_grand"]
    assert "noisy_ends: per game" in tables(records)


def test_targets_are_read_off_the_records() -> None:
    def records(error: float, lds: float, harm: float = 0.0) -> list[dict[str, object]]:
        found = []
        for seed in range(4):
            for m in (20, 50, 100):
                for row, e, fit in ((DEFAULT, error, lds), (BASELINE, 0.6 + 0.01 * seed, 0.5)):
                    cell = Cell(seed=seed, n=10, game="entropy", noise=0.1, m=m, row=row)
                    worse = harm if row == DEFAULT and m == 20 else 0.0
                    found.append(asdict(cell) | {"error": e + worse, "lds": fit, "spearman": 1.0})
        return found

    assert check_targets(records(0.1, 0.5))[1]
    assert not check_targets(records(0.11, 0.6))[1]
    text, met = check_targets(records(0.1, 0.49))
    assert not met
    assert "0.500 (MISSED)" in text
    text, met = check_targets(records(0.1, 0.6, harm=0.6))
    assert not met
    assert "n = 10, m = 2n, noise 0.1: error by 0.085" in text
    failed = records(0.1, 0.5)
    failed[0] = {**failed[0], "failed": "no fit"}
    assert not check_targets(failed)[1]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import coverage, estimators

    monkeypatch.setattr("sys.argv", ["coverage", "--rows", "orthogonal+gpp", "--table"])
    with pytest.raises(ConfigError, match=r"estimators to be among.*'gpp'"):
        coverage.main()
    monkeypatch.setattr("sys.argv", ["estimators", "--games", "chess", "--table"])
    with pytest.raises(ConfigError, match=r"games to be among.*'chess'"):
        estimators.main()


def attributions(values: np.ndarray, covariance: np.ndarray) -> Attributions:
    return Attributions(
        values, covariance, "shapley", "gp", "analytic", n_coalitions=1, rank=len(values), intercept=0.0
    )
