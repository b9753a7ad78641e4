"""`tribute run STUDY.yaml`: a whole study, continued wherever it stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import RuntimeArguments, parse, print_settings, read_study
from tribute.cli.console import StudyReport, print_line, print_table
from tribute.cli.lds_command import print_attributions, print_comparisons
from tribute.config import MixedPrecision, StudyConfig
from tribute.models.pipelines import load_model
from tribute.study.outputs import direction, shares, write_outputs
from tribute.study.results import BehaviorResult, StudyResult
from tribute.study.run import run_study
from tribute.study.session import study_preset


class RunArguments(RuntimeArguments):
    """Flags of `tribute run`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    n_threads: int | None = Field(default=None, gt=0, description="CPU threads; None: the study's.")
    until_interval: float | None = Field(
        default=None,
        gt=0,
        description="Stop measuring when every 95 % interval is at most this share of |v(grand) - v(empty)| to either "
        "side, e.g. 0.02; None: the study's fit.until_interval.",
    )
    max_device_hours: float | None = Field(
        default=None,
        gt=0,
        description="Stop before the study has taken more than this in all; None: the study's max_device_hours.",
    )
    mixed_precision: MixedPrecision | None = Field(default=None, description="Of all training; None: the study's.")
    use_8bit_optimizer: bool = Field(default=False, description="As use_8bit_optimizer: true in the study.")
    executor: Literal["serial", "ray"] | None = Field(
        default=None, description="serial: this process measures; ray: workers do; None: the study's execution."
    )
    workers: int | None = Field(default=None, gt=0, description="ray: warm workers; None: the study's.")
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="ray: share of a GPU that each worker takes, e.g. 0.25; None: the study's."
    )
    address: str | None = Field(
        default=None, description="ray: a cluster, e.g. auto, HOST:6379 or ray://HOST:10001; None: the study's."
    )
    wait: bool = Field(default=False, description="Wait for another run of the study instead of refusing.")
    dry_run: bool = Field(default=False, description="Print the resolved settings and stop.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, run the study, print tables, write files."""
    arguments = parse(RunArguments, argv, prog=prog, description="Run a whole study.")
    changes = {name: getattr(arguments, name) for name in ("n_threads", "max_device_hours", "mixed_precision")}
    changes["use_8bit_optimizer"] = arguments.use_8bit_optimizer or None
    config = read_study(arguments.study, arguments.outdir, compare=False, **changes)
    config = config.replace(runtime=arguments.runtime(config.runtime))
    execution = {name: getattr(arguments, name) for name in ("executor", "workers", "gpus_per_worker", "address")}
    execution = {name: value for name, value in execution.items() if value is not None}
    config = config.replace(execution=config.execution.replace(**execution))
    if arguments.until_interval is not None:
        config = config.replace(fit=config.fit.replace(until_interval=arguments.until_interval))
    if arguments.dry_run:
        print_dry_run(config)
        return
    result = run_study(config, StudyReport(), wait=arguments.wait)
    if result is None:  # a process of `accelerate launch` that only helps
        return
    for item in result.behaviors:
        print_behavior(item, result)
    print_timings(result)
    if result.set_aside:
        roles = ", ".join(f"{role} {n}" for role, n in sorted(result.set_aside.items()))
        n_failed = sum(result.set_aside.values())
        print_line(f"  without {n_failed} evaluations that failed ({roles}); run again to try them again")
    for path in write_outputs(result):
        print_line(f"wrote {path}")


def print_dry_run(config: StudyConfig) -> None:
    """The resolved settings; nothing is downloaded for them."""
    load = config.full_model.load
    if load is None or Path(load).exists():
        preset = study_preset(config, None if load is None else load_model(load))
        print_settings({"study": config, "preset": preset})
        return
    print_line(f"# {load} is not on this machine; its network, noise schedule and codec will replace the preset's")
    print_settings({"study": config, "preset": config.load_preset()})


def print_behavior(item: BehaviorResult, result: StudyResult) -> None:
    """The contributors ranked by credit for one behavior, and the proof."""
    fitted = item.attributions["shapley"]
    higher = direction(item) > 0
    low, high = float(item.end_points.empty.mean()), float(item.end_points.grand.mean())
    print_attributions(
        f"{item.name} ({'higher' if higher else 'lower'} is better): Shapley values, {fitted.estimator}, "
        f"{fitted.n_coalitions} coalitions",
        fitted,
        result.contributor_names,
        result.n_examples,
        higher_is_better=higher,
        shares=["-" if math.isnan(share) else f"{share:.1%}" for share in shares(fitted)],
        note=f"v(nobody) = {low:.3f}, v(everyone) = {high:.3f}; shares are of their difference",
    )
    if item.validations:
        print_table(
            f"{item.name}: LDS x 100 on {len(item.test_behaviors[0])} retrained test coalitions, "
            f"{len(item.test_behaviors)} training seeds",
            ["attribution", "coalitions", "LDS", "95 % interval", "on the seeds' mean"],
            [lds_row(name, item) for name in item.validations],
        )
        comparisons = {name: found.comparison for name, found in item.validations.items() if found.comparison}
        if comparisons:
            print_comparisons(
                f"{item.name}: LDS x 100 less that of shapley, on the same draws",
                {name: item.validations[name].score for name in comparisons},
                comparisons,
            )
        ceiling = item.validations["shapley"].ceiling if "shapley" in item.validations else None
        if ceiling is not None:
            print_line(
                f"  ceiling: one retraining predicts another with {100 * ceiling.value:.1f} "
                f"({100 * ceiling.interval[0]:.1f} to {100 * ceiling.interval[1]:.1f})"
            )
    for name, reason in item.unfitted.items():
        print_line(f"  {name} was not fitted: {reason}")


def lds_row(name: str, item: BehaviorResult) -> list[str]:
    """LDS of one attribution as table cells."""
    score = item.validations[name].score
    low, high = 100 * score.interval
    n_coalitions = item.attributions[name].n_coalitions
    averaged = f"{100 * score.averaged:.1f}"
    return [name, str(n_coalitions), f"{100 * score.mean:.1f}", f"{low:.1f} to {high:.1f}", averaged]


def print_timings(result: StudyResult) -> None:
    """Median seconds per coalition."""
    titles = {"gd": "sparsified fine-tuning", "retrain": "retraining"}
    print_table(
        "Median seconds per coalition",
        ["", "coalitions", "train", "sample", "measure", "total"],
        [
            [titles.get(method, method), f"{int(item['n_evaluations'])}"]
            + [f"{item.get(key, math.nan):.2f}" for key in ("train", "sample", "measure", "total")]
            for method, item in result.timings.items()
        ],
    )
