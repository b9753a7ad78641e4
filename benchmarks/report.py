"""How long `tribute report` takes, and how large its page is, on studies that no network measured.

Every command runs in a process of its own, start-up included. Beside it stands the least that any page with these
numbers costs: a process that reads the same study and fits its credit and LDS (`read_result`), and writes nothing.
Seconds are those of the processor, which other programs on the machine disturb less than the clock's; the clock's are
printed, too. Prints a Markdown table; docs/performance.md holds one.

    python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.synthetic_study import two_behaviors, write_synthetic_study

REPORT = "import sys; from tribute.cli import main; main('report', sys.argv[1:])"
BASELINE = """
import sys
from pathlib import Path
from tribute.config import StudyConfig
from tribute.store.records import Store
from tribute.study.record import StudyRecord
from tribute.study.results import read_result
config = StudyConfig.from_yaml(Path(sys.argv[1]))
with Store.open(config.db_url, create=False) as store:
    read_result(config, StudyRecord.read(config), store)
"""


@dataclass(frozen=True)
class Taken:
    """What a command took.

    Attributes:
        seconds_processor: User and system time of its process, the least of the repeats.
        seconds_clock: From start to end, the least of the repeats.
    """

    seconds_processor: float
    seconds_clock: float


def measure(code: str, study: Path, n_repeats: int) -> Taken:
    """Run Python code on a study, each time in a fresh process with one thread."""
    processor, clock = [], []
    for _ in range(n_repeats):
        before, started = _children(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code, str(study)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        clock.append(time.perf_counter() - started)
        processor.append(_children() - before)
    return Taken(min(processor), min(clock))


def _children() -> float:
    """Processor seconds of all processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure every size, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--size",
        nargs="*",
        default=["12x48x24x2", "100x400x40x2", "300x1000x40x1", "300x1000x40x2"],
        help="CONTRIBUTORSxFITxTESTxBEHAVIORS; fit coalitions, and test coalitions with two training seeds.",
    )
    parser.add_argument("--n_repeats", type=int, default=3)
    arguments = parser.parse_args()
    print("| contributors | coalitions | behaviors | processor s | clock s | fit alone, processor s | ratio | MB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for size in arguments.size:
        n_contributors, n_fit, n_test, n_behaviors = (int(part) for part in size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            behaviors = two_behaviors(n_contributors)[:n_behaviors]
            study = write_synthetic_study(Path(folder), behaviors, n_fit=n_fit, n_test=n_test)
            report = measure(REPORT, study, arguments.n_repeats)
            alone = measure(BASELINE, study, arguments.n_repeats)
            (page,) = Path(folder).rglob("report.html")
            print(
                f"| {n_contributors} | {n_fit + 2 * n_test} | {n_behaviors} | {report.seconds_processor:.2f} "
                f"| {report.seconds_clock:.2f} | {alone.seconds_processor:.2f} "
                f"| {report.seconds_processor / alone.seconds_processor:.2f} | {page.stat().st_size / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
