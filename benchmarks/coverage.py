"""Do the 95 % intervals hold? Coverage of credit, of differences and of ranks, on games with known Shapley values.

    python -m benchmarks.coverage --n_seeds 20 --n_jobs 2
    python -m benchmarks.coverage --table

A row is a design and an estimator, such as `orthogonal+gp`. The end points are measured without noise; in a row such
as `orthogonal+gp+noisy_ends`, with the noise of an evaluation, whose variance the estimator is then told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from benchmarks.cells import (
    Cell,
    Record,
    check_known,
    column,
    design_coalitions,
    markdown_table,
    mean_with_error,
    measure_cells,
    median,
    noisy_game,
    read_records,
    select,
)
from benchmarks.games import GAMES, cache_dir_of_user, contrasts, relative_error
from tribute.errors import ConfigError, FitError
from tribute.games.designs import DESIGNS
from tribute.games.shapley import SHAPLEY_ESTIMATORS, fit_shapley
from tribute.games.uncertainty import differences, rank_intervals, simultaneous_intervals
from tribute.seeding import numpy_stream
from tribute.types import Attributions, Behaviors

LEVEL = 0.95
COVERED = ("contributors", "differences", "ranks", "all_at_once")


@dataclass(frozen=True)
class Options:
    """Measure the coverage of intervals, or show what was measured."""

    rows: tuple[str, ...] = ("orthogonal+auto",)
    """Designs and estimators, as DESIGN+ESTIMATOR or DESIGN+ESTIMATOR+noisy_ends."""
    n: tuple[int, ...] = (10, 20, 50)
    """Numbers of contributors."""
    m: tuple[int, ...] = (2, 5, 10)
    """Numbers of coalitions, in multiples of n."""
    noise: tuple[float, ...] = (0.1, 0.3)
    """Noise of an evaluation, as a fraction of the spread of the behavior over half coalitions."""
    games: tuple[str, ...] = tuple(GAMES)
    """Kinds of games."""
    n_seeds: int = 20
    """Instances of each game."""
    first_seed: int = 0
    """First of these instances."""
    n_jobs: int = 1
    """Processes."""
    out: Path = Path("results/benchmarks/coverage.jsonl")
    """Finished cells, one per line; cells that it holds are not measured again."""
    cache: Path = field(default_factory=cache_dir_of_user)
    """Folder of sampled Shapley values."""
    table: bool = False
    """Only print the tables of what `out` holds."""


def measure_coverage(cell: Cell, cache_dir: Path) -> Record:
    """Fit one cell and compare its intervals with the truth."""
    game, truth = noisy_game(cell, cache_dir)
    design, estimator, *noisy_ends = cell.row.split("+")
    masks = design_coalitions(design, cell.n, cell.m, cell.design_seed)
    behaviors = game.value(masks)
    v_empty, v_grand = game.game.end_points
    end_point_variance = 0.0
    if noisy_ends:
        stream = numpy_stream(cell.seed, "benchmark_end_points", cell.game, cell.n)
        v_empty, v_grand = np.array([v_empty, v_grand]) + game.noise_sd * stream.standard_normal(2)
        end_point_variance = game.noise_sd**2
    started = time.perf_counter()
    try:
        attributions = fit_shapley(
            masks,
            behaviors,
            v_empty=float(v_empty),
            v_grand=float(v_grand),
            v_empty_variance=end_point_variance,
            v_grand_variance=end_point_variance,
            estimator=estimator,
            design=design,
        )
    except FitError as error:
        return {"failed": str(error)}
    seconds = time.perf_counter() - started
    error_of_contrasts = contrasts(attributions.values - truth.values)
    covariance = attributions.covariance
    predicted = float(np.trace(covariance) - covariance.mean() * cell.n)  # of the contrasts
    return coverage_of(attributions, truth.values) | {
        "error": relative_error(attributions.values, truth.values),
        "predicted_square": predicted,
        "actual_square": float(error_of_contrasts @ error_of_contrasts),
        "loo_r2": None if np.isnan(attributions.loo_r2) else attributions.loo_r2,
        "noise_sd": None if np.isnan(attributions.noise_sd) else attributions.noise_sd,
        "seconds": seconds,
    }


def coverage_of(attributions: Attributions, truth: Behaviors) -> Record:
    """Shares of the contributors, pairs and ranks whose intervals hold the truth; none where there is no interval."""
    if not np.isfinite(attributions.covariance).all():
        return dict.fromkeys(COVERED)
    # Where all coalitions were measured an interval has no width: rounding must not count against it.
    slack = 1e-9 * np.abs(truth).max()
    low, high = attributions.intervals(LEVEL).T
    of_pairs = differences(attributions, level=LEVEL)[1]
    true_differences = truth[:, None] - truth
    pairs = (of_pairs[..., 0] - slack <= true_differences) & (true_differences <= of_pairs[..., 1] + slack)
    first, last = rank_intervals(attributions, LEVEL).T
    # Contributors of equal credit share their ranks.
    best = 1 + np.count_nonzero(true_differences > slack, axis=0)
    worst = np.count_nonzero(true_differences >= -slack, axis=0)
    at_once = simultaneous_intervals(attributions, LEVEL)
    return {
        "contributors": float(((low - slack <= truth) & (truth <= high + slack)).mean()),
        "differences": float(pairs[np.triu_indices(len(truth), 1)].mean()),
        "ranks": float(((first <= worst) & (best <= last)).mean()),
        "all_at_once": float(((at_once[:, 0] - slack <= truth) & (truth <= at_once[:, 1] + slack)).all()),
    }


def tables(records: list[Record]) -> str:
    """Coverage per cell pooled over games, then per game, with the diagnostics beside it."""
    parts = []
    for row in sorted({r["row"] for r in records}):
        of_row = select(records, row=row)
        cells = sorted({(r["n"], r["m"] // r["n"], r["noise"]) for r in of_row})
        header = ["n, m, noise", *COVERED, "predicted / actual", "error", "LOO R2", "fits"]
        pooled = [
            [f"{n}, {m}n, {noise}", *_summary(select(of_row, n=n, m=m * n, noise=noise))] for n, m, noise in cells
        ]
        parts.append(f"### {row}: pooled over games\n\n{markdown_table(header, pooled)}")
        names = [name for name in GAMES if select(of_row, game=name)]
        by_game = [[name, *_summary(select(of_row, game=name))] for name in names]
        parts.append(f"### {row}: per game, all cells\n\n{markdown_table(['game', *header[1:]], by_game)}")
        grid = [
            [f"{n}, {m}n, {noise}"]
            + [
                f"{mean_with_error(column(found, 'contributors'))[0]:.2f}"
                for found in (select(of_row, n=n, m=m * n, noise=noise, game=name) for name in names)
            ]
            for n, m, noise in cells
        ]
        parts.append(f"### {row}: contributors, per cell and game\n\n{markdown_table(['n, m, noise', *names], grid)}")
    return "\n\n".join(parts)


def _summary(records: list[Record]) -> list[str]:
    """Coverages with standard errors, predicted over actual error, error, median leave-one-out R2, number of fits."""
    covered = ["{:.3f} ± {:.3f}".format(*mean_with_error(column(records, name))) for name in COVERED]
    # Per fit, then the median: games have different units, and one fit must not outweigh the others.
    squares = column(records, "predicted_square") / column(records, "actual_square")
    fits = np.isfinite(column(records, "error"))
    return [
        *covered,
        f"{np.sqrt(median(squares)):.2f}",
        f"{mean_with_error(column(records, 'error'))[0]:.3f}",
        f"{median(column(records, 'loo_r2')):.2f}",
        f"{fits.sum()}/{len(fits)}",
    ]


def main() -> None:
    """Measure what is missing and print the tables."""
    options = tyro.cli(Options, prog="python -m benchmarks.coverage", use_underscores=True)
    check_known("games", options.games, GAMES)
    for row in options.rows:
        parts = row.split("+")
        if len(parts) not in (2, 3):
            raise ConfigError(f"Expected a row DESIGN+ESTIMATOR, found {row!r}. Write it like orthogonal+gp.")
        check_known("designs", parts[:1], DESIGNS)
        check_known("estimators", parts[1:2], SHAPLEY_ESTIMATORS)
        check_known("endings of a row", parts[2:], ["noisy_ends"])
    if not options.table:
        cells = [
            Cell(seed=seed, n=n, game=game, noise=noise, m=m * n, row=row)
            for seed in range(options.first_seed, options.first_seed + options.n_seeds)
            for n in options.n
            for game in options.games
            for noise in options.noise
            for m in options.m
            for row in options.rows
        ]
        measure_cells(cells, measure_coverage, options.out, cache_dir=options.cache, n_jobs=options.n_jobs)
    print(tables(read_records(options.out)))


if __name__ == "__main__":
    main()
