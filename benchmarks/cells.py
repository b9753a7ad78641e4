"""What the benchmarks share: cells of an experiment, measured in processes, kept one per line, and read as tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.games import Game, NoisyGame, Truth, make_game
from tribute.errors import ConfigError
from tribute.games.designs import design_rows
from tribute.types import CoalitionMasks

Record = dict[str, Any]


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement: a row of the tables on one instance of a game.

    Attributes:
        seed: Of the instance, its noise and the design; the same numbers for every row.
        n: Number of contributors.
        game: Kind of game.
        noise: Noise of one evaluation as a fraction of the spread over half coalitions.
        m: Number of coalitions.
        row: What is measured, e.g. a design and an estimator.
    """

    seed: int
    n: int
    game: str
    noise: float
    m: int
    row: str

    @property
    def design_seed(self) -> int:
        """Root seed of the design: far apart, as the kernel design takes consecutive ones."""
        return 1_000_000 * (self.seed + 1)


@lru_cache(maxsize=64)
def game_with_truth(name: str, n: int, seed: int, cache_dir: Path) -> tuple[Game, Truth]:
    """A game and its Shapley values, made once per process."""
    game = make_game(name, n, seed)
    return game, game.truth(cache_dir)


def noisy_game(cell: Cell, cache_dir: Path) -> tuple[NoisyGame, Truth]:
    """The game of a cell as it is measured, and its Shapley values without noise."""
    game, truth = game_with_truth(cell.game, cell.n, cell.seed, cache_dir)
    return NoisyGame(game, cell.noise, cell.seed), truth


@lru_cache(maxsize=64)
def _drawn(design: str, n: int, seed: int) -> tuple[Any, list[npt.NDArray[np.bool_]]]:
    return design_rows(design, n, seed=seed), []


def design_coalitions(design: str, n: int, m: int, seed: int) -> CoalitionMasks:
    """The first m coalitions of a design `(m, n)`; drawn once per process, as no row depends on later ones."""
    rows, drawn = _drawn(design, n, seed)
    drawn.extend(islice(rows, max(0, m - len(drawn))))
    return np.array(drawn[:m])


def measure_cells(
    cells: Iterable[Cell], measure: Callable[[Cell, Path], Record], out: Path, *, cache_dir: Path, n_jobs: int
) -> None:
    """Measure the cells that `out` does not hold, in `n_jobs` processes, and append one line for each that finishes."""
    done = {cell_of(record) for record in read_records(out)}
    missing = sorted(set(cells) - done)
    print(f"{len(missing)} cells to measure, {len(done)} present in {out}", file=sys.stderr)
    if not missing:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pool = ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(measure, cell, cache_dir): cell for cell in missing}
        for n_finished, future in enumerate(as_completed(futures), start=1):
            record = asdict(futures[future]) | future.result()
            with out.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            if n_finished % 100 == 0 or n_finished == len(missing):
                seconds = time.monotonic() - started
                print(f"{n_finished}/{len(missing)} cells in {seconds:.0f} s", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)


def read_records(path: Path) -> list[Record]:
    """The finished cells of a file, none if it does not exist; a last line cut short is left out and removed."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def cell_of(record: Record) -> Cell:
    """The cell that a record belongs to."""
    return Cell(**{name: record[name] for name in Cell.__dataclass_fields__})


def select(records: Iterable[Record], **wanted: object) -> list[Record]:
    """Records whose fields have the wanted values."""
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def column(records: Iterable[Record], field: str) -> npt.NDArray[np.float64]:
    """A field of the records, NaN where it is missing."""
    return np.array([np.nan if r.get(field) is None else r[field] for r in records], dtype=np.float64)


def mean_with_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean of the numbers that exist, and its standard error; NaN where there are none, or not two."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def median(values: npt.NDArray[np.float64]) -> float:
    """Median of the numbers that exist, NaN where there are none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError unless every name is a known one."""
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"Expected {what} to be among {', '.join(known)}; found {name!r}. Choose from these.")
