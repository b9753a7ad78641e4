"""What tests of execution share: behaviors that count, wait and fail on request, and evaluations that cost nothing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tiny_study import SilentListener

from tribute import pulse
from tribute.config import StudyConfig
from tribute.errors import BehaviorError, MixedResultsError
from tribute.seeding import numpy_stream
from tribute.store.records import EvaluationSpec, Store
from tribute.study.executors import Measure
from tribute.study.results import StudyResult
from tribute.study.run import run_study
from tribute.study.value_function import Evaluation
from tribute.types import CoalitionMask

N_CONTRIBUTORS = 5

BEHAVIOR_MODULE = '''
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def count():
    """One more measurement, of all processes; how many there were."""
    with (FOLDER / "calls").open("ab") as file:
        file.write(b".")
        return file.tell()


def brightness(images):
    count()
    return float(images.mean())


def contrast(images):
    return float(images.std(axis=(1, 2, 3)).mean())


def held(images):
    """Waits for a line of standard input in the call whose number the file `hold_at` has."""
    n = count()
    at = FOLDER / "hold_at"
    if at.exists() and n == int(at.read_text()):
        at.unlink()
        os.write(1, b"\\nHELD\\n")
        sys.stdin.readline()
    return float(images.mean())


def held_apart(images):
    """The same in a process whose standard input is nobody's: says so in the pipe `held`, and waits for ever."""
    import threading

    n = count()
    at = FOLDER / "hold_at"
    if at.exists() and n == int(at.read_text()):
        at.unlink()
        with (FOLDER / "held").open("w") as pipe:
            pipe.write(f"{os.getpid()}\\n")
        threading.Event().wait()
    return float(images.mean())
'''


def n_calls(folder: Path) -> int:
    """How often a behavior was measured in the workshop."""
    file = folder / "calls"
    return file.stat().st_size if file.exists() else 0


def start_run(config: StudyConfig, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """`tribute run` in a process of its own."""
    path = folder / "study.yaml"
    path.write_text(config.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-c", "from tribute.cli import main; main()", "run", str(path), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_until_held(process: subprocess.Popen[str]) -> None:
    """Until a behavior of that process waits."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "HELD\n":
            return
    raise AssertionError(f"it ended: {''.join(lines)} {process.communicate()[1]}")


def wait_for_line(pipe: Path, process: subprocess.Popen[str]) -> str:
    """A line from a named pipe, into which a descendant of the process writes."""
    handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for _ in range(120):
            if select.select([handle], [], [], 1.0)[0] and (line := os.read(handle, 100)):
                return line.decode()
            if process.poll() is not None:
                break
    finally:
        os.close(handle)
    process.kill()
    raise AssertionError(f"nothing came: {process.communicate()}")


def values_of(config: StudyConfig) -> list[tuple[float, ...]]:
    """Values of every finished evaluation, in an order of their own, without names of studies and behaviors."""
    with Store.open(config.db_url, create=False) as store:
        found = store.find(statuses=("finished",))
    return sorted(tuple(sorted(item.behaviors.values())) for item in found)


def credit_of(result: StudyResult | None) -> list[list[float]]:
    """Shapley values of every behavior."""
    assert result is not None
    return [item.attributions["shapley"].values.tolist() for item in result.behaviors]


@cache
def _undisturbed(folder: Path) -> tuple[list[tuple[float, ...]], list[list[float]]]:
    config = StudyConfig.from_yaml(folder / "undisturbed.yaml")
    credit = credit_of(run_study(config, SilentListener()))
    (folder / "calls").unlink()
    return values_of(config), credit


_first: list[Path] = []


def undisturbed(folder: Path, make_study: Callable[..., StudyConfig]) -> tuple[list[Any], list[list[float]]]:
    """Values and credit of the study of `make_study` that nothing disturbed, measured once for all tests."""
    if not _first:
        (folder / "undisturbed.yaml").write_text(make_study(name="undisturbed").to_yaml())
        _first.append(folder)
    return _undisturbed(_first[0])


def make_specs(n: int) -> list[EvaluationSpec]:
    """Evaluations whose priority falls as their seed grows."""
    return [
        EvaluationSpec(
            exp_name="e1",
            dataset="digits",
            method="gd",
            removal_dist="shapley",
            datamodel_alpha=None,
            removal_seed=seed,
            coalition_mask=numpy_stream(0, "test-mask", seed).random(N_CONTRIBUTORS) < 0.5,
            opt_seed=seed,
            settings={"gd_steps": 1},
            role="fit",
            priority=n - seed,
        )
        for seed in range(n)
    ]


def open_study(store: Store) -> int:
    return store.open_study(
        "main", dataset="digits", contributor_names=list("abcde"), n_examples=[1] * N_CONTRIBUTORS, fingerprint="f"
    )


@dataclass(frozen=True)
class Scripted:
    """What workers are told: v(S) = |S|, and something else in the evaluation with one training seed.

    Attributes:
        folder: Of the mark that it was done.
        what: `die`, `hang` and `raise` happen once, `fail` always; `refuse` in the set-up.
        seed: Training seed of the evaluation.
    """

    folder: Path
    what: str = ""
    seed: int = -1

    def set_up(self) -> tuple[Measure, dict[str, Any]]:
        if self.what == "refuse":
            raise MixedResultsError("other data on this machine")
        return self.measure, {"n_threads": 1}

    def measure(self, method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        pulse.beat()
        mark = self.folder / "done"
        if opt_seed == self.seed and not mark.exists():
            if self.what == "fail":
                raise BehaviorError("no such luck")
            mark.touch()
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "hang":
                pulse._last_beat -= 1e6  # as if it had made no step for days
                threading.Event().wait()
            if self.what == "raise":
                raise ZeroDivisionError("a mistake")
        images = np.zeros((9, 8, 8, 1), np.uint8)
        return Evaluation({"size": float(coalition_mask.sum())}, {"train": 1.0}, 1, images)
