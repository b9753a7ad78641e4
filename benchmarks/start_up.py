"""Seconds of the commands that only read, from start to end, beside what their libraries alone cost to import.

Makes a store of 1,000 evaluations (two measurements of each end point, fit coalitions of the orthogonal design, and
40 test coalitions retrained with three seeds) whose settings are as long as those of a real study, then runs every
command in a process of its own. A command is run several times, turn and turn about with the others, and the least
and the median of its seconds are printed: on a machine that does other work the ratio to the baseline says more than
the seconds.

    python -m benchmarks.start_up
    python -m benchmarks.start_up --n_contributors 100
    python -m benchmarks.start_up --profile              # lds in this process, function by function
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tribute.config import StudyConfig, load_preset
from tribute.games.coalitions import empty_coalition, grand_coalition
from tribute.games.designs import coalitions_from
from tribute.seeding import numpy_stream
from tribute.store.records import EvaluationSpec, FinishedEvaluation, Store, Study
from tribute.study.record import StudyRecord, by_role
from tribute.types import CoalitionMask

BASELINE = [sys.executable, "-c", "import numpy, scipy, sqlalchemy"]
N_TEST, TEST_SEEDS, N_END_POINTS = 40, (42, 43, 44), 2


def main() -> None:
    """Make the store, run the commands, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_evaluations", type=int, default=1000)
    parser.add_argument("--n_contributors", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="where lds spends its seconds, in this process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "results.db"
        n_fit = write_study(Path(folder), store, arguments.n_contributors, arguments.n_evaluations)
        print(f"{arguments.n_evaluations} evaluations, {n_fit} of them fit coalitions of {arguments.n_contributors}")
        flags = lds_flags(store)
        if arguments.profile:
            profile(flags)
            return
        program = [sys.executable, "-c", "from tribute.cli import main; main()"]
        commands = {
            "import numpy, scipy, sqlalchemy": BASELINE,
            "tribute --help": [*program, "--help"],
            "tribute status": [*program, "status", str(Path(folder) / "study.yaml")],
            "tribute lds": [*program, "lds", *flags, "--test_exp_name", "study"],
            "tribute lds --no_convergence": [*program, "lds", *flags, "--test_exp_name", "study", "--no_convergence"],
            "tribute lds, no test coalitions": [*program, "lds", *flags],
        }
        seconds = time_commands(commands, arguments.repeats)
    baseline = statistics.median(seconds["import numpy, scipy, sqlalchemy"])
    print("| command | least s | median s | times the imports alone |\n|---|---|---|---|")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"| `{name}` | {min(found):.2f} | {median:.2f} | {median / baseline:.1f} |")


def time_commands(commands: dict[str, list[str]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run of every command, one round of all commands after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds[name].append(time.perf_counter() - started)
            if done.returncode:
                raise SystemExit(f"{name} failed: {done.stderr}")
    return seconds


def lds_flags(store: Path) -> list[str]:
    """The flags that all runs of `lds` share; without `--test_exp_name` they give attributions only."""
    flags = {
        "train_db": store,
        "train_exp_name": "study",
        "max_train_size": 1000,
        "dataset": "digits",
        "model_behavior_key": "fid",
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def profile(flags: list[str]) -> None:
    """Print where `lds` spends its seconds once everything is imported, and how many it takes in all."""
    import cProfile
    import pstats

    from tribute.cli import lds_command

    profiler = cProfile.Profile()
    with contextlib.redirect_stdout(io.StringIO()):
        profiler.runcall(lds_command.run, [*flags, "--test_exp_name", "study"], "lds")
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def write_study(folder: Path, path: Path, n_contributors: int, n_evaluations: int) -> int:
    """The store and the run folder of a finished study; the number of its fit coalitions."""
    stream = numpy_stream(0, "benchmark.start_up")
    credit = stream.normal(size=n_contributors)
    settings = {method: real_settings(method) for method in ("gd", "retrain")}
    definition = {"unit": "squared embedding distance", "higher_is_better": False, "variant": "classifier 43ebeb881661"}
    provenance = {"commit": "0" * 40, "device": "cpu", "versions": dict.fromkeys(("torch", "numpy", "scipy"), "1.0")}

    def finished(mask: CoalitionMask, method: str, role: str, opt_seed: int, **draw: Any) -> FinishedEvaluation:
        spec = EvaluationSpec(
            exp_name="study",
            dataset="digits",
            method=method,
            removal_dist=draw.get("removal_dist"),
            datamodel_alpha=draw.get("alpha"),
            removal_seed=draw.get("removal_seed"),
            coalition_mask=mask,
            opt_seed=opt_seed,
            settings=settings[method],
            role=role,
        )
        value = 40 - float(mask @ credit) + 0.3 * float(stream.normal())
        return FinishedEvaluation(
            spec,
            {"fid": value, "inception_score": 1 / (1 + np.exp(-value / 10))},
            {"train": 2.0, "sample": 1.0, "measure": 0.1},
            provenance,
            {"fid": definition, "inception_score": {**definition, "higher_is_better": True}},
        )

    results = []
    for repeat in range(N_END_POINTS):
        results.append(finished(empty_coalition(n_contributors), "gd", "empty", repeat, removal_dist="empty"))
        results.append(finished(grand_coalition(n_contributors), "gd", "grand", repeat))
    tests = list(islice(coalitions_from("datamodel", n_contributors, 0, datamodel_alpha=0.5), N_TEST))
    for opt_seed in TEST_SEEDS:
        for removal_seed, mask in tests:
            draw = {"removal_dist": "datamodel", "alpha": 0.5, "removal_seed": removal_seed}
            results.append(finished(mask, "retrain", "test", opt_seed, **draw))
    n_fit = n_evaluations - len(results)
    for removal_seed, mask in islice(coalitions_from("orthogonal", n_contributors, 0), n_fit):
        results.append(finished(mask, "gd", "fit", 42, removal_dist="orthogonal", removal_seed=removal_seed))
    study = Study(
        name="study",
        dataset="digits",
        contributor_names=tuple(f"contributor {i}" for i in range(n_contributors)),
        n_examples=(90,) * n_contributors,
        fingerprint="f" * 64,
    )
    with Store.open(path) as store:
        store.add_finished({study: results})
    values = {"name": "study", "outdir": str(folder), "db": str(path), "fit": {"n_coalitions": n_fit}}
    config = StudyConfig.parse(values, where="benchmark")
    (folder / "study.yaml").write_text(config.to_yaml())
    StudyRecord(
        name=study.name,
        dataset=study.dataset,
        contributor_names=study.contributor_names,
        n_examples=study.n_examples,
        fingerprint=study.fingerprint,
        behaviors=("fid", "inception_score"),
        evaluations=by_role([result.spec for result in results]),
        models={},
        classifier_accuracy=None,
        provenance={},
    ).write(config.run_dir)
    return n_fit


def real_settings(method: str) -> dict[str, Any]:
    """Settings of an evaluation, as long as those that a study of the digits stores."""
    preset = load_preset("digits")
    return {
        "data": "1" * 64,
        "start": "2" * 64,
        "train": preset.train_config(method).model_dump(mode="json", exclude={"opt_seed"}),
        "sampling": preset.sampling.model_dump(mode="json", exclude={"batch_size", "use_ema"}),
        "use_ema": True,
        "noise_schedule": preset.noise_schedule.model_dump(mode="json"),
        "behaviors": dict.fromkeys(("fid", "inception_score"), "classifier 43ebeb881661; sample covariance"),
    }


if __name__ == "__main__":
    main()
