"""Do the 95 % intervals still hold when a study stops as soon as they are narrow?

    python -m benchmarks.stopping --n_seeds 10 --n_jobs 2
    python -m benchmarks.stopping --table

Each run looks at `tribute.games.stopping.looks` and stops by `narrow_enough`. Coverage is measured then, where a rule
that favours lucky moments would show it.
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
    noisy_game,
    read_records,
    select,
)
from benchmarks.coverage import coverage_of
from benchmarks.games import GAMES, cache_dir_of_user, relative_error
from tribute.games.shapley import fit_shapley
from tribute.games.stopping import looks, narrow_enough
from tribute.types import Attributions


@dataclass(frozen=True)
class Options:
    """Measure the coverage of intervals at the moment of stopping, or show what was measured."""

    n: tuple[int, ...] = (10, 20)
    """Numbers of contributors."""
    half_width: tuple[float, ...] = (0.05, 0.02, 0.01)
    """Asked of the widest interval, as a share of |v(grand) - v(empty)|."""
    noise: tuple[float, ...] = (0.1, 0.3)
    """Noise of an evaluation, as a fraction of the spread of the behavior over half coalitions."""
    games: tuple[str, ...] = tuple(GAMES)
    """Kinds of games."""
    most: int = 15
    """Most coalitions, in multiples of n."""
    n_seeds: int = 10
    """Instances of each game."""
    n_jobs: int = 1
    """Processes."""
    out: Path = Path("results/benchmarks/stopping.jsonl")
    """Finished cells, one per line; cells that it holds are not measured again."""
    cache: Path = field(default_factory=cache_dir_of_user)
    """Folder of sampled Shapley values."""
    table: bool = False
    """Only print the table of what `out` holds."""


def measure_stopping(cell: Cell, cache_dir: Path) -> Record:
    """Look until the intervals are narrow or `cell.m` coalitions are measured; the row is the half-width."""
    game, truth = noisy_game(cell, cache_dir)
    masks = design_coalitions("orthogonal", cell.n, cell.m, cell.design_seed)
    behaviors = game.value(masks)
    v_empty, v_grand = game.game.end_points
    started = time.perf_counter()
    history: list[Attributions] = []
    stopped = False
    for n_coalitions in looks(cell.n, cell.m):
        history.append(
            fit_shapley(
                masks[:n_coalitions],
                behaviors[:n_coalitions],
                v_empty=v_empty,
                v_grand=v_grand,
                design="orthogonal",
            )
        )
        stopped = narrow_enough(history, float(cell.row))
        if stopped:
            break
    last = history[-1]
    return coverage_of(last, truth.values) | {
        "n_coalitions": last.n_coalitions,
        "stopped": stopped,
        "error": relative_error(last.values, truth.values),
        "seconds": time.perf_counter() - started,
    }


def table(records: list[Record]) -> str:
    """Coverage at the moment of stopping, by number of contributors, noise and half-width; games pooled."""
    rows = []
    for n, noise, row in sorted(
        {(r["n"], r["noise"], r["row"]) for r in records}, key=lambda x: (x[0], x[1], -float(x[2]))
    ):
        found = select(records, n=n, noise=noise, row=row)
        stopped = [r for r in found if r["stopped"]]
        if not stopped:
            rows.append([f"{n}, {noise}, {row}", f"0/{len(found)}", *["-"] * 5])
            continue
        taken = column(stopped, "n_coalitions") / n
        low, middle, high = np.quantile(taken, [0.1, 0.5, 0.9])
        rows.append(
            [
                f"{n}, {noise}, {row}",
                f"{len(stopped)}/{len(found)}",
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                *(
                    "{:.3f} ± {:.3f}".format(*mean_with_error(column(stopped, name)))
                    for name in ("contributors", "ranks")
                ),
                "{:.3f} ± {:.3f}".format(*mean_with_error(column(stopped, "all_at_once"))),
                f"{np.median(column(stopped, 'error')):.3f}",
            ]
        )
    header = [
        "n, noise, half-width",
        "stopped",
        "coalitions / n (10 to 90 %)",
        "contributors",
        "ranks",
        "all at once",
        "error",
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Measure what is missing and print the table."""
    options = tyro.cli(Options, prog="python -m benchmarks.stopping", use_underscores=True)
    check_known("games", options.games, GAMES)
    if not options.table:
        cells = [
            Cell(seed=seed, n=n, game=game, noise=noise, m=options.most * n, row=str(half_width))
            for seed in range(options.n_seeds)
            for n in options.n
            for game in options.games
            for noise in options.noise
            for half_width in options.half_width
        ]
        measure_cells(cells, measure_stopping, options.out, cache_dir=options.cache, n_jobs=options.n_jobs)
    print(table(read_records(options.out)))


if __name__ == "__main__":
    main()
