"""Resident memory of a worker over many coalitions: it should stay what it is.

One warm worker on the digits measures coalitions, one after the other, by sparsified fine-tuning and every tenth by
retraining, with few steps and images, since a leak does not depend on them. After each one its resident memory is
read. Prints a curve and its slope, and writes every value as CSV.

    python -m benchmarks.worker_memory
    python -m benchmarks.worker_memory --n_coalitions 1000 --csv memory.csv
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WARM_UP = 20
"""Coalitions before the slope counts: allocators keep what the first ones needed."""


def main() -> None:
    """Measure, print the curve, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_coalitions", type=int, default=200)
    parser.add_argument("--gd_steps", type=int, default=3)
    parser.add_argument("--n_samples", type=int, default=60)
    parser.add_argument("--csv", type=Path, default=None, help="where every value is written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIBUTE_CACHE"] = folder
        resident = measure(Path(folder), arguments.n_coalitions, arguments.gd_steps, arguments.n_samples)
    curve = resident / 2**20
    print("coalitions  resident, MiB")
    for n in [1, *range(10, len(curve) + 1, 10)]:
        bar = "#" * round(40 * curve[n - 1] / curve.max())
        print(f"{n:>10}  {curve[n - 1]:>8.1f}  {bar}")
    print(
        f"slope after the first {WARM_UP}: {slope(resident):+.2f} KiB per coalition; least and most since then: ",
        end="",
    )
    print(f"{curve[WARM_UP:].min():.1f} and {curve[WARM_UP:].max():.1f} MiB")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["n_coalitions", "resident_bytes"])
            writer.writerows(enumerate(resident.tolist(), start=1))


def measure(folder: Path, n_coalitions: int, gd_steps: int, n_samples: int) -> np.ndarray:
    """Resident bytes `(n_coalitions,)` after each coalition."""
    from tribute.config import DataConfig, PruneConfig, load_preset
    from tribute.games.coalitions import grand_coalition
    from tribute.games.designs import coalition_of
    from tribute.study.stages import Saving, prune_model, train_model
    from tribute.study.worker import Worker

    worker = Worker(
        DataConfig(dataset="digits", contributors="vendors"),
        load_preset("digits"),
        behaviors=("fid", "inception_score"),
        n_threads=1,
    )
    n_contributors = worker.data.contributors.n_contributors
    everyone = grand_coalition(n_contributors)
    short = worker.preset.train_config("retrain", n_steps=gd_steps)
    full = train_model(worker, short, Saving(folder / "full", 1000), method="retrain", coalition_mask=everyone)
    pruned, _ = prune_model(worker, full, PruneConfig(), folder / "pruned")
    sampling = worker.preset.sampling.replace(n_samples=n_samples, num_inference_steps=2)
    gd = worker.value_function(worker.fine_tuning(pruned, worker.preset.train_config("gd", n_steps=gd_steps)), sampling)
    retrain = worker.value_function(worker.retraining(short), sampling)
    resident = np.empty(n_coalitions, dtype=np.int64)
    for i in range(n_coalitions):
        mask = coalition_of("shapley", n_contributors, i)
        (retrain if i % 10 == 9 else gd)(mask, opt_seed=42 + i)
        gc.collect()
        resident[i] = resident_bytes()
    return resident


def slope(resident: Sequence[int] | np.ndarray) -> float:
    """KiB per coalition, by least squares, after the warm-up."""
    values = np.asarray(resident, dtype=np.float64)[WARM_UP:] / 1024
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
