"""How much credit do m coalitions give? Every design and estimator on games with known Shapley values.

    python -m benchmarks.estimators --n 10 20 --n_seeds 10 --n_jobs 2
    python -m benchmarks.estimators --table
    python -m benchmarks.estimators --targets

Rows share the instance of a game, its noise (one number per coalition, however often it is asked for) and the test
coalitions. All get m evaluations besides the empty and the grand coalition, which have no noise; shapiq counts these
two, so its budget is m + 2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro

from benchmarks.cells import (
    Cell,
    Record,
    cell_of,
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
from benchmarks.games import GAMES, Array, NoisyGame, cache_dir_of_user, contrasts, half_coalitions, relative_error
from tribute.errors import FitError, RankDeficientFit
from tribute.games.coalitions import coalition_keys
from tribute.games.kernels import ATTRIBUTION_KERNELS
from tribute.games.lds import rank_correlation
from tribute.games.removal import draw_coalitions
from tribute.seeding import numpy_stream
from tribute.types import Behaviors, CoalitionMasks

BASELINE = "published"
DEFAULT = "default"
N_TEST = 200
RESCUE_RIDGE = 1e-6
"""Penalty of a fit whose coalitions do not identify everybody: about the solution of least norm, as by a
pseudo-inverse."""

MEASURES = ("error", "spearman", "lds")
"""Relative error of the contrasts, rank correlation of the credit, and LDS without noise at half coalitions."""


@dataclass(frozen=True)
class Fitted:
    """Credit `(n,)`, the coalitions that it is based on `(m, n)`, the seconds of the fit, and more to record."""

    values: Array
    masks: CoalitionMasks
    seconds: float = 0.0
    more: Record = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        fit: Credit from a game, the cell and the true credit (which only priors use).
        what: What it is, for the reader.
        is_shapley: Whether it estimates Shapley values; otherwise only its LDS counts.
        max_n: Most contributors that it is fit for in reasonable time.
        max_m: Most coalitions.
    """

    fit: Callable[[NoisyGame, Cell, Array], Fitted]
    what: str
    is_shapley: bool = True
    max_n: int = 1000
    max_m: int = 100_000


def _fit_own(
    game: NoisyGame,
    cell: Cell,
    truth: Array,
    *,
    design: str,
    estimator: str | None,
    kernel: str = "shapley",
    prior_quality: float | None = None,
) -> Fitted:
    """Credit by an estimator of this project."""
    options: dict[str, Any] = {}
    if design == "uniform":
        masks = draw_coalitions("uniform", cell.n, range(cell.design_seed, cell.design_seed + cell.m))
    else:
        # Permutations are whole or of no use.
        m = cell.m - cell.m % (cell.n - 1) if design == "permutation" else cell.m
        masks = design_coalitions(design, cell.n, m, cell.design_seed)
        options["design"] = design
    if prior_quality is not None:
        stream = numpy_stream(cell.seed, "benchmark_prior", cell.game, cell.n)
        direction = contrasts(truth) / np.linalg.norm(contrasts(truth))
        other = contrasts(stream.standard_normal(cell.n))
        other -= (other @ direction) * direction
        other /= np.linalg.norm(other)
        options["prior"] = prior_quality * direction + np.sqrt(1.0 - prior_quality**2) * other
    v_empty, v_grand = game.game.end_points
    behaviors = game.value(masks)
    fit = partial(
        ATTRIBUTION_KERNELS[kernel], masks, behaviors, v_empty=v_empty, v_grand=v_grand, estimator=estimator, **options
    )
    started = time.perf_counter()
    try:
        attributions, rescued = fit(), False
    except RankDeficientFit:
        attributions, rescued = fit(ridge=RESCUE_RIDGE), True
    seconds = time.perf_counter() - started
    return Fitted(attributions.values, masks, seconds, {"estimator": attributions.estimator, "rescued": rescued})


def _fit_shapiq(
    game: NoisyGame, cell: Cell, truth: Array, *, approximator: str, options: dict[str, Any] | None = None
) -> Fitted:
    """Credit by an approximator of shapiq, which chooses its own coalitions."""
    from shapiq import approximator as approximators

    asked: list[CoalitionMasks] = []

    def value(coalitions: npt.ArrayLike) -> Behaviors:
        masks = np.atleast_2d(np.asarray(coalitions)).astype(bool)
        asked.append(masks)
        return game.value(masks)

    options = dict(options or {})
    if options.pop("leverage", False):
        options["sampling_weights"] = np.ones(cell.n + 1)  # all sizes equally often (Musco and Witter 2024)
    started = time.perf_counter()
    chosen = getattr(approximators, approximator)(cell.n, random_state=cell.design_seed, **options)
    found = chosen.approximate(budget=cell.m + 2, game=value)
    seconds = time.perf_counter() - started
    masks = np.concatenate(asked)
    masks = masks[masks.any(axis=1) & ~masks.all(axis=1)]
    if len(masks) > cell.m:
        raise FitError(f"Expected at most {cell.m} evaluations by {approximator}, found {len(masks)}.")
    values = np.array([found[(i,)] for i in range(cell.n)])
    return Fitted(values, masks, seconds, {"n_distinct": len(set(coalition_keys(masks)))})


def _exact(game: NoisyGame, cell: Cell, truth: Array) -> Fitted:
    return Fitted(truth, np.zeros((0, cell.n), dtype=bool))


def _own(design: str, estimator: str | None, kernel: str = "shapley", **options: Any) -> partial[Fitted]:
    return partial(_fit_own, design=design, estimator=estimator, kernel=kernel, **options)


def _shapiq(approximator: str, **options: Any) -> partial[Fitted]:
    return partial(_fit_shapiq, approximator=approximator, options=options)


ROWS: dict[str, Row] = {
    BASELINE: Row(_own("kernel", "least_squares"), "i.i.d. Shapley kernel, constrained least squares: as published"),
    "paired+least_squares": Row(_own("paired", "least_squares"), "the published estimator on complement pairs"),
    "kernel+ridge": Row(_own("kernel", "ridge"), "the published design, ridge"),
    "kernel+unbiased": Row(_own("kernel", "unbiased"), "the published design, exact second moments"),
    "kernel+size_adjusted": Row(_own("kernel", "size_adjusted"), "the published design, size-adjusted least squares"),
    "kernel+gp": Row(_own("kernel", "gp"), "the published design, Gaussian process", max_m=2500),
    "permutation+permutation": Row(_own("permutation", "permutation"), "antithetic permutations, mean marginals"),
    "stratified+size_adjusted": Row(_own("stratified", "size_adjusted"), "stratified pairs, size-adjusted"),
    "orthogonal+size_adjusted": Row(_own("orthogonal", "size_adjusted"), "orthogonal pairs, size-adjusted"),
    DEFAULT: Row(_own("orthogonal", "auto"), "orthogonal pairs, Gaussian process: the default"),
    "default+good_prior": Row(
        _own("orthogonal", "auto", prior_quality=0.8),
        "the default, with a prior that correlates with the truth by 0.8",
        max_m=600,
    ),
    "default+useless_prior": Row(
        _own("orthogonal", "auto", prior_quality=0.0),
        "the default, with a prior that does not correlate with it",
        max_m=600,
    ),
    "shapiq:KernelSHAP": Row(_shapiq("KernelSHAP"), "shapiq: KernelSHAP"),
    "shapiq:LeverageSHAP": Row(
        _shapiq("KernelSHAP", pairing_trick=True, leverage=True), "shapiq: KernelSHAP in pairs, sizes equally often"
    ),
    "shapiq:Permutation": Row(_shapiq("PermutationSamplingSV"), "shapiq: permutation sampling"),
    "shapiq:SVARM": Row(_shapiq("SVARM", pairing_trick=True), "shapiq: SVARM in pairs", max_m=2500),
    "shapiq:kADDSHAP": Row(
        _shapiq("kADDSHAP", pairing_trick=True), "shapiq: pairwise interactions by regression, in pairs", max_n=50
    ),
    "uniform+banzhaf": Row(
        _own("uniform", None, kernel="banzhaf"), "Banzhaf values from uniform coalitions", is_shapley=False
    ),
    "uniform+datamodel": Row(
        _own("uniform", None, kernel="datamodel"), "datamodel weights from uniform coalitions", is_shapley=False
    ),
    "orthogonal+datamodel": Row(
        _own("orthogonal", None, kernel="datamodel"), "datamodel weights from orthogonal pairs", is_shapley=False
    ),
    "exact": Row(_exact, "the exact Shapley values: the ceiling of the LDS"),
}
"""Rows by name. Of shapiq's other approximators, SPEX needs more evaluations than these budgets, ProxySPEX a package
that is not among our dependencies; Owen and stratified sampling were behind permutations at every budget tried."""


@dataclass(frozen=True)
class Options:
    """Compare estimators on games with known Shapley values."""

    n: tuple[int, ...] = (10, 20, 50, 200)
    """Numbers of contributors."""
    m: tuple[int, ...] = (1, 2, 5, 10, 25)
    """Numbers of coalitions, in multiples of n."""
    noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Noise of an evaluation, as a fraction of the spread of the behavior over half coalitions."""
    games: tuple[str, ...] = tuple(GAMES)
    """Kinds of games."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows of the tables."""
    n_seeds: int = 10
    """Instances of each game."""
    n_seeds_slow: int = 1
    """Instances where n * m is at least 400,000."""
    n_jobs: int = 1
    """Processes."""
    out: Path = Path("results/benchmarks/estimators.jsonl")
    """Finished cells, one per line; cells that it holds are not measured again."""
    cache: Path = field(default_factory=cache_dir_of_user)
    """Folder of sampled Shapley values."""
    dry_run: bool = False
    """Only count the cells that are missing, with the time they take where like ones have been measured."""
    table: bool = False
    """Only print the tables of what `out` holds."""
    targets: bool = False
    """Only check the targets on what `out` holds; exit code 1 where one is missed."""

    def cells(self) -> list[Cell]:
        """All cells asked for."""
        return [
            Cell(seed=seed, n=n, game=game, noise=noise, m=m * n, row=row)
            for n in self.n
            for m in self.m
            for seed in range(self.n_seeds if n * m * n < 400_000 else min(self.n_seeds, self.n_seeds_slow))
            for game in self.games
            for noise in self.noise
            for row in self.rows
            if n <= ROWS[row].max_n and m * n <= ROWS[row].max_m
        ]


def measure_row(cell: Cell, cache_dir: Path) -> Record:
    """Fit one cell and compare the credit with the truth and with the values of test coalitions."""
    game, truth = noisy_game(cell, cache_dir)
    row = ROWS[cell.row]
    try:
        fitted = row.fit(game, cell, truth.values)
    except FitError as error:
        return {"failed": str(error)}
    record: Record = {"seconds": fitted.seconds, **fitted.more}
    tests = held_out_coalitions(cell, fitted.masks)
    record["lds"] = _number(rank_correlation(tests @ fitted.values, game.game.value(tests)))
    if row.is_shapley:
        record["error"] = relative_error(fitted.values, truth.values)
        record["spearman"] = _number(rank_correlation(fitted.values, truth.values))
    return record


def held_out_coalitions(cell: Cell, fit_masks: CoalitionMasks) -> CoalitionMasks:
    """Up to `N_TEST` different coalitions of half the contributors that were not fitted, the same for every row as far
    as these allow."""
    masks = half_coalitions(cell.n, 4 * N_TEST, cell.seed, f"test {cell.game}")
    fitted = set(coalition_keys(fit_masks)) if len(fit_masks) else set()
    fresh = {key: i for i, key in reversed(list(enumerate(coalition_keys(masks)))) if key not in fitted}
    return masks[sorted(fresh.values())[:N_TEST]]


def tables(records: list[Record]) -> str:
    """For every n and noise the three measures by row and m, and the time of a fit."""
    parts = []
    rows = [name for name in ROWS if select(records, row=name)]
    for n in sorted({r["n"] for r in records}):
        of_n = select(records, n=n)
        sizes = sorted({r["m"] for r in of_n})
        header = ["row", *(f"m = {m // n}n" for m in sizes)]
        for noise in sorted({r["noise"] for r in of_n}):
            body = [[row, *(_three_measures(select(of_n, noise=noise, row=row, m=m)) for m in sizes)] for row in rows]
            title = f"### n = {n}, noise {noise}: error / Spearman / LDS, means over games and seeds ± standard error"
            parts.append(f"{title}\n\n{markdown_table(header, body)}")
        body = [[row, *(f"{median(column(select(of_n, row=row, m=m), 'seconds')):.2g}" for m in sizes)] for row in rows]
        parts.append(
            f"### n = {n}: median seconds of a fit (shapiq: with its sampling)\n\n{markdown_table(header, body)}"
        )
    body = [[name, ROWS[name].what] for name in rows]
    return "\n\n".join([*parts, f"### Rows\n\n{markdown_table(['row', 'what it is'], body)}"])


def _three_measures(records: list[Record]) -> str:
    """`0.27±0.01 / 0.95±0.01 / 0.76±0.01`, a dash for what does not exist."""
    texts = []
    for name in MEASURES:
        mean, error = mean_with_error(column(records, name))
        digits = 3 if mean < 0.1 else 2 if mean < 10 else 1
        texts.append("-" if np.isnan(mean) else f"{mean:.{digits}f}±{error:.{digits}f}")
    return " / ".join(texts)


def check_targets(records: list[Record]) -> tuple[str, bool]:
    """The targets of the default against the published estimator, and whether all are met.

    Pooled over games: at noise 0.1 a sixth of its error at m = 5n, and at 2n its LDS at 10n; at every n, m and noise
    no larger error and no smaller LDS beyond the standard error of the paired difference.
    """
    lines, met = [], []
    sizes = sorted({r["n"] for r in records})
    body = []
    for n in [*sizes, None]:
        of_n = select(records, noise=0.1) if n is None else select(records, noise=0.1, n=n)

        def of(row: str, multiple: int, measure: str, of_n: list[Record] = of_n) -> Array:
            return column([r for r in of_n if r["row"] == row and r["m"] == multiple * r["n"]], measure)

        errors = [of(row, 5, "error") for row in (DEFAULT, BASELINE)]
        ours, theirs = (mean_with_error(values)[0] for values in errors)
        medians = [median(values) for values in errors]
        lds_ours = mean_with_error(of(DEFAULT, 2, "lds"))[0]
        lds_theirs = mean_with_error(of(BASELINE, 10, "lds"))[0]
        if np.isnan([ours, theirs, lds_ours, lds_theirs]).any():
            continue
        met += [ours <= theirs / 6, lds_ours >= lds_theirs]
        body.append(
            [
                "all" if n is None else str(n),
                f"{ours:.3f}",
                f"{theirs:.3f}",
                f"{theirs / ours:.1f} {_verdict(met[-2])}",
                f"{medians[1] / medians[0]:.1f}",
                f"{lds_ours:.3f}",
                f"{lds_theirs:.3f} {_verdict(met[-1])}",
            ]
        )
    header = ["n", "default, 5n", "published, 5n", "ratio", "of medians", "LDS default, 2n", "LDS published, 10n"]
    lines.append(f"### Noise 0.1, pooled over games\n\n{markdown_table(header, body)}")

    published = {cell_of(r): r for r in select(records, row=BASELINE)}
    paired = []
    for record in select(records, row=DEFAULT):
        other = published.get(cell_of(record | {"row": BASELINE}))
        if other is not None and "failed" not in record and "failed" not in other:
            gains = {"gain_error": other["error"] - record["error"], "gain_lds": record["lds"] - other["lds"]}
            paired.append(record | gains)
    worse, worse_by_game = [], []
    for n, m, noise in sorted({(r["n"], r["m"], r["noise"]) for r in paired}):
        found = select(paired, n=n, m=m, noise=noise)
        worse += _where_worse(found, f"n = {n}, m = {m // n}n, noise {noise}")
        for game in {r["game"]: None for r in found}:
            worse_by_game += _where_worse(select(found, game=game), f"n = {n}, m = {m // n}n, noise {noise}, {game}")
    failed = sum("failed" in r for r in select(records, row=DEFAULT))
    met += [not worse, not failed]
    lines.append(
        f"Cells pooled over games where the default is worse: {'; '.join(worse) or 'none'} {_verdict(not worse)}"
    )
    lines.append(f"Single games where it is worse (for information): {'; '.join(worse_by_game) or 'none'}")
    lines.append(f"Fits of the default that failed: {failed} {_verdict(not failed)}")
    return "\n\n".join(lines), all(met)


def _where_worse(records: list[Record], where: str) -> list[str]:
    """The measures by which the default is worse, beyond the standard error of the paired difference."""
    worse = []
    for measure in ("error", "lds"):
        gain, error = mean_with_error(column(records, f"gain_{measure}"))
        if gain < -np.nan_to_num(error):
            worse.append(f"{where}: {measure} by {-gain:.2g} ± {error:.1g}")
    return worse


def _verdict(met: bool) -> str:
    return "(met)" if met else "(MISSED)"


def _number(value: npt.ArrayLike) -> float | None:
    """A float for JSON, None for NaN."""
    return None if np.isnan(value) else float(np.asarray(value))


def _dry_run(options: Options, records: list[Record]) -> str:
    """Cells that are missing by n and m, with hours by the median seconds of like cells that are there."""
    missing = set(options.cells()) - {cell_of(r) for r in records}
    body = []
    for n, m in sorted({(cell.n, cell.m) for cell in missing}):
        of_size = [cell for cell in missing if (cell.n, cell.m) == (n, m)]
        like = select(records, n=n, m=m)
        seconds = np.nansum([median(column(select(like, row=cell.row), "seconds")) for cell in of_size])
        body.append([f"{n}", f"{m}", f"{len(of_size)}", f"{seconds / 3600:.2f}"])
    return markdown_table(["n", "m", "cells missing", "hours on one core, of rows with a time"], body)


def main() -> None:
    """Measure what is missing and print the tables and the targets."""
    options = tyro.cli(Options, prog="python -m benchmarks.estimators", use_underscores=True)
    check_known("games", options.games, GAMES)
    check_known("rows", options.rows, ROWS)
    if options.dry_run:
        print(_dry_run(options, read_records(options.out)))
        return
    if not (options.table or options.targets):
        measure_cells(options.cells(), measure_row, options.out, cache_dir=options.cache, n_jobs=options.n_jobs)
    records = read_records(options.out)
    if not options.targets:
        print(tables(records))
    if not options.table:
        text, all_met = check_targets(records)
        print(f"\n{text}")
        if options.targets and not all_met:
            sys.exit(1)


if __name__ == "__main__":
    main()
