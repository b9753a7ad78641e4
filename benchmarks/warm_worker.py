"""Seconds per coalition in a warm worker, against one `unlearn.py` process per coalition, on the same work.

A warm worker is set up once; a process per coalition imports, reads data, model and classifier, and is gone. Both
measure the same coalitions of the digits by sparsified fine-tuning, turn and turn about, so that other work on the
machine falls on both, and their behaviors are compared: they must be the same numbers. Several amounts of work per
coalition are tried: the shorter the fine-tuning, the more a warm worker gains. Processor seconds are those of the
process, on which other work has less influence than on the clock's.

    python -m benchmarks.warm_worker
    python -m benchmarks.warm_worker --gd_steps 0 25 100 --n_coalitions 8
    python -m benchmarks.warm_worker --where               # what a process per coalition spends its seconds on
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEHAVIORS = ("fid", "inception_score")
FULL_STEPS, SPARSE_STEPS = 60, 30
"""Of the models that coalitions begin with: how well they are trained makes no difference to the seconds."""


def main() -> None:
    """Prepare a sparse model, measure both ways, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gd_steps", type=int, nargs="+", default=[25, 50, 100], help="100 is the preset's")
    parser.add_argument("--n_samples", type=int, default=500, help="images per coalition; 500 is the preset's")
    parser.add_argument("--n_coalitions", type=int, default=8)
    parser.add_argument("--where", action="store_true", help="what one process per coalition spends its seconds on")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        prepare(arguments.prepare)
    elif arguments.serve is not None:
        serve(arguments.serve)
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["TRIBUTE_CACHE"] = str(folder / "cache")
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            subprocess.run([sys.executable, "-m", "benchmarks.warm_worker", "--prepare", name], cwd=ROOT, check=True)
            if arguments.where:
                where(folder, arguments.gd_steps[-1], arguments.n_samples)
            else:
                compare(folder, arguments.gd_steps, arguments.n_samples, arguments.n_coalitions)


def prepare(folder: Path) -> None:
    """Train, prune and fine-tune a small model, and fill the cache, so that neither way pays for it."""
    from tribute.config import PruneConfig
    from tribute.games.coalitions import grand_coalition
    from tribute.study.stages import Saving, prune_model, train_model

    worker = make_worker()
    worker.behavior_definitions()
    worker.measurement.measure_real(500)
    everyone = grand_coalition(worker.data.contributors.n_contributors)
    config = worker.preset.train_config("retrain", n_steps=FULL_STEPS)
    full = train_model(worker, config, Saving(folder / "full", 1000), method="retrain", coalition_mask=everyone)
    pruned, _ = prune_model(worker, full, PruneConfig(), folder / "pruned")
    train_model(
        worker,
        worker.preset.train_config("prune_fine_tune", n_steps=SPARSE_STEPS),
        Saving(folder / "sparse", 1000),
        method="prune_fine_tune",
        coalition_mask=everyone,
        start=pruned,
    )


def make_worker() -> Any:
    """A worker on the digits, with one thread."""
    from tribute.config import DataConfig, load_preset
    from tribute.study.worker import Worker

    return Worker(
        DataConfig(dataset="digits", contributors="vendors"), load_preset("digits"), behaviors=BEHAVIORS, n_threads=1
    )


def serve(folder: Path) -> None:
    """Measure the coalitions that lines of standard input ask for; a line of JSON each."""
    from tribute.games.designs import coalition_of
    from tribute.models.checkpoint import load_checkpoint

    started = time.perf_counter()
    worker = make_worker()
    sparse = load_checkpoint(folder / "sparse")
    value_functions: dict[tuple[int, int], Any] = {}
    n_contributors = worker.data.contributors.n_contributors
    worker.behavior_definitions()
    print(json.dumps({"seconds_setup": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        work = (asked["gd_steps"], asked["n_samples"])
        started, cpu_started = time.perf_counter(), time.process_time()
        if work not in value_functions:
            train = worker.preset.train_config("gd", n_steps=work[0])
            sampling = worker.preset.sampling.replace(n_samples=work[1])
            value_functions[work] = worker.value_function(worker.fine_tuning(sparse, train), sampling)
        mask = coalition_of("shapley", n_contributors, asked["removal_seed"])
        evaluation = value_functions[work](mask, opt_seed=42)
        result = {"behaviors": evaluation.behaviors, "parts": evaluation.seconds}
        result |= {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu_started}
        print(json.dumps(result), flush=True)


@contextmanager
def warm_worker(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has been set up and waits for coalitions."""
    command = [sys.executable, "-m", "benchmarks.warm_worker", "--serve", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            read_line(process)  # it is set up
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()


def read_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next answer of a warm worker."""
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise SystemExit("the warm worker has ended; its error stands above")
    return json.loads(line)


def ask(process: subprocess.Popen[str], **work: int) -> dict[str, Any]:
    """Let a warm worker measure a coalition."""
    if process.stdin is None:
        raise SystemExit("the warm worker has no standard input")
    process.stdin.write(json.dumps(work) + "\n")
    process.stdin.flush()
    return read_line(process)


def measure_cold(folder: Path, *, removal_seed: int, gd_steps: int, n_samples: int) -> dict[str, Any]:
    """Measure a coalition in a process of its own, by the published command."""
    from tribute.store.records import Store

    db = folder / "cold.db"
    flags = {
        "load": folder / "sparse",
        "db": db,
        "exp_name": f"cold_{gd_steps}_{n_samples}",
        "method": "gd",
        "model_behavior": ",".join(BEHAVIORS),
        "gd_steps": gd_steps,
        "n_samples": n_samples,
        "removal_dist": "shapley",
        "removal_seed": removal_seed,
        "n_threads": 1,
    }
    command = [sys.executable, "unlearn.py", *(text for name, x in flags.items() for text in (f"--{name}", str(x)))]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"unlearn.py failed: {done.stderr}")
    with Store.open(db, create=False) as store:
        (found,) = [item for item in store.find(exp_name=flags["exp_name"]) if item.spec.removal_seed == removal_seed]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"behaviors": dict(found.behaviors), "parts": dict(found.seconds), "seconds": seconds, "cpu": cpu}


def compare(folder: Path, all_gd_steps: list[int], n_samples: int, n_coalitions: int) -> None:
    """Both ways, coalition by coalition, for every amount of work; a Markdown table."""
    head = "| steps | coalitions | process each, s | warm, s | ratio | process each, CPU s | warm, CPU s | ratio |"
    print(f"{head}\n|{'---|' * 8}", flush=True)
    with warm_worker(folder) as process:
        for gd_steps in all_gd_steps:
            work = {"gd_steps": gd_steps, "n_samples": n_samples}
            ask(process, removal_seed=0, **work)  # the first one of a kind makes its model
            warm, cold = [], []
            for removal_seed in range(n_coalitions):
                warm.append(ask(process, removal_seed=removal_seed, **work))
                cold.append(measure_cold(folder, removal_seed=removal_seed, **work))
                if warm[-1]["behaviors"] != cold[-1]["behaviors"]:
                    raise SystemExit(f"the two ways differ: {warm[-1]['behaviors']} and {cold[-1]['behaviors']}")
            cells = []
            for key in ("seconds", "cpu"):
                each, at_once = (statistics.median(item[key] for item in items) for items in (cold, warm))
                cells += [f"{each:.2f}", f"{at_once:.2f}", f"{each / at_once:.1f}"]
            print(f"| {gd_steps} | {n_coalitions} | {' | '.join(cells)} |", flush=True)
    print("all behaviors were the same both ways")


def where(folder: Path, gd_steps: int, n_samples: int) -> None:
    """What a process per coalition spends its processor seconds on."""
    source = f"""
import time
marks = [("start", time.process_time())]
def mark(name): marks.append((name, time.process_time()))
import torch; mark("import torch")
from benchmarks.warm_worker import make_worker
from tribute.study.worker import Worker; mark("import the rest")
worker = make_worker(); mark("data and trainer")
worker.behavior_definitions(); mark("classifier, from the cache")
from pathlib import Path
from tribute.models.checkpoint import load_checkpoint
from tribute.games.designs import coalition_of
sparse = load_checkpoint(Path({str(folder / "sparse")!r}))
method = worker.fine_tuning(sparse, worker.preset.train_config("gd", n_steps={gd_steps})); mark("model")
measure = worker.value_function(method, worker.preset.sampling.replace(n_samples={n_samples}))
mask = coalition_of("shapley", worker.data.contributors.n_contributors, 1)
measure(mask, opt_seed=42); mark("first coalition")
measure(mask, opt_seed=42); mark("second coalition")
import cProfile, pstats
profiler = cProfile.Profile()
profiler.runcall(measure, mask, opt_seed=42); mark("profiled coalition")
for (_, before), (name, after) in zip(marks, marks[1:]):
    print(f"{{name:<28}} {{after - before:6.2f}} s")
pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
"""
    subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
