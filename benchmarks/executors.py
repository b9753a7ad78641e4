"""What an executor adds to each coalition, beside a bare loop over the same value function.

The value function does nothing, so all that is measured is claiming, handing out, recording and extending leases on a
SQLite store. A worker's overhead is the time from one of its coalitions to the next: with two workers, twice the time
per coalition. Prints a Markdown table; docs/performance.md holds one. With `--targets` it fails beyond them.

    python -m benchmarks.executors --targets
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tribute.config import ExecutionConfig
from tribute.seeding import numpy_stream
from tribute.store.records import EvaluationSpec, Store
from tribute.study.executors import Executor, Measure, SerialExecutor
from tribute.study.value_function import Evaluation
from tribute.types import CoalitionMask

N_CONTRIBUTORS = 20
TARGETS = {"serial": 0.05, "ray": 0.2}
"""Seconds per coalition and worker."""


def nothing(method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
    """A value function that costs nothing."""
    return Evaluation({"size": float(coalition_mask.sum())}, {"train": 0.0}, 0, np.zeros((0, 8, 8, 1), np.uint8))


@dataclass(frozen=True)
class Nothing:
    """What workers are told."""

    def set_up(self) -> tuple[Measure, dict[str, Any]]:
        """The value function that costs nothing."""
        return nothing, {"n_threads": 1}


def make_specs(n: int, exp_name: str) -> list[EvaluationSpec]:
    """Evaluations to be claimed."""
    return [
        EvaluationSpec(
            exp_name=exp_name,
            dataset="digits",
            method="gd",
            removal_dist="shapley",
            datamodel_alpha=None,
            removal_seed=seed,
            coalition_mask=numpy_stream(0, "benchmark-mask", seed).random(N_CONTRIBUTORS) < 0.5,
            opt_seed=0,
            settings={"n_steps": 0},
        )
        for seed in range(n)
    ]


def seconds_per_coalition(executor: Executor, store: Store, study_id: int, n: int, exp_name: str) -> float:
    """Of a warm executor, the median of four parts."""
    executor.run(
        store, study_id, evaluation_ids=store.add(study_id, make_specs(4, f"{exp_name}-warm")), on_done=lambda *_: None
    )
    spent = []
    for part in range(4):
        ids = store.add(study_id, make_specs(n // 4, f"{exp_name}-{part}"))
        started = time.perf_counter()
        n_done = executor.run(store, study_id, evaluation_ids=ids, on_done=lambda *_: None)
        spent.append((time.perf_counter() - started) / n_done)
        assert n_done == len(ids)
    return float(np.median(spent))


def bare_loop(n: int) -> float:
    """Seconds per coalition of the value function alone."""
    masks = [spec.coalition_mask for spec in make_specs(n, "bare")]
    started = time.perf_counter()
    for mask in masks:
        nothing("gd", mask, opt_seed=0)
    return (time.perf_counter() - started) / n


def main() -> None:
    """Measure both executors and print what they add."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400, help="coalitions of each executor")
    parser.add_argument("--workers", type=int, default=2, help="of Ray")
    parser.add_argument("--targets", action="store_true", help="fail where an executor is slower than promised")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    def serial() -> Executor:
        return SerialExecutor(nothing, definitions={}, provenance={})

    def ray() -> Executor:
        from tribute.study.ray_executor import RayExecutor

        execution = ExecutionConfig(executor="ray", workers=arguments.workers)
        return RayExecutor(Nothing(), definitions={}, execution=execution, n_threads=1)

    makers: dict[str, tuple[Callable[[], Executor], int]] = {"serial": (serial, 1), "ray": (ray, arguments.workers)}
    bare = bare_loop(arguments.n)
    print("| executor | workers | coalitions per second | overhead per coalition and worker, ms | bare loop, ms |")
    print("| --- | --- | --- | --- | --- |")
    found: dict[str, float] = {}
    for name, (make, n_workers) in makers.items():
        with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "results.db") as store:
            study_id = store.open_study(
                "benchmark",
                dataset="digits",
                contributor_names=[f"c{i}" for i in range(N_CONTRIBUTORS)],
                n_examples=[1] * N_CONTRIBUTORS,
                fingerprint="f",
            )
            executor = make()
            try:
                seconds = seconds_per_coalition(executor, store, study_id, arguments.n, name)
            finally:
                executor.close()
        found[name] = seconds * n_workers - bare
        print(
            f"| {name} | {n_workers} | {1 / seconds:.0f} | {1000 * found[name]:.1f} | {1000 * bare:.3f} |", flush=True
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"overhead_seconds": found, "bare_seconds": bare}))
    slow = [f"{name}: {1000 * value:.0f} ms" for name, value in found.items() if value > TARGETS[name]]
    if arguments.targets and slow:
        sys.exit(f"slower than promised: {', '.join(slow)}")


if __name__ == "__main__":
    main()
