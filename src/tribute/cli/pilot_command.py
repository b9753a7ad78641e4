"""`tribute pilot STUDY.yaml`: a few coalitions in both ways, and whether the study can go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from tribute.cli.arguments import RuntimeArguments, parse, read_study
from tribute.cli.console import StudyReport, print_line, print_table
from tribute.errors import StoppedEarly
from tribute.study.pilot_record import FILE_NAME, TITLES, PilotBehavior, PilotResult


class PilotArguments(RuntimeArguments):
    """Flags of `tribute pilot`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    n_threads: int | None = Field(default=None, gt=0, description="CPU threads; None: the study's.")
    n_coalitions: int | None = Field(
        default=None, ge=3, description="Coalitions by both methods; None: the study's pilot.n_coalitions."
    )
    max_device_hours: float | None = Field(
        default=None, gt=0, description="Of the whole study; None: the study's max_device_hours."
    )
    wait: bool = Field(default=False, description="Wait for another run of the study instead of refusing.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, measure, print the verdicts."""
    arguments = parse(
        PilotArguments, argv, prog=prog, description="Do quick fine-tuning and retraining agree on a few coalitions?"
    )
    changes = {name: getattr(arguments, name) for name in ("n_threads", "max_device_hours")}
    config = read_study(arguments.study, arguments.outdir, compare=False, **changes)
    config = config.replace(runtime=arguments.runtime(config.runtime))
    from tribute.study.pilot import run_pilot, with_coalitions

    report = StudyReport()
    try:
        result = run_pilot(with_coalitions(config, arguments.n_coalitions), report, wait=arguments.wait)
    except StoppedEarly as stopped:
        report.message(str(stopped))
        return
    if result is None:  # a process of `accelerate launch` that only helps
        return
    print_pilot(result)
    print_line(f"wrote {config.run_dir / FILE_NAME}")


def print_pilot(result: PilotResult) -> None:
    """The figures of every behavior, then the verdicts in words."""
    print_table(
        f"{result.study}: {result.n_coalitions} coalitions by sparsified fine-tuning (sFT) and by retraining",
        ["behavior", "corr.", "95 %", "sFT", "retr.", "sparse", "full", "noise"],
        [behavior_row(item) for item in result.behaviors],
        note="corr.: of the ranks; sFT and retr.: means over the coalitions; noise: standard deviation between two "
        "training seeds over that between coalitions, by sFT and by retraining; with one pair each, it is rough",
    )
    for item in result.behaviors:
        print_line(f"{item.name}: {TITLES[item.verdict]}")
        for sentence in item.sentences:
            print_line(f"  {sentence}")
    seconds = ", ".join(f"{name} {value:.3g} s" for name, value in result.seconds.items())
    print_line(f"median of one evaluation: {seconds}")
    if result.passed:
        print_line("verdict: go")
    else:
        wanted = list(dict.fromkeys(TITLES[item.verdict] for item in result.behaviors if not item.passed))
        print_line(f"verdict: not yet: {'; '.join(wanted)}")


def behavior_row(item: PilotBehavior) -> list[str]:
    """A behavior as table cells."""
    means = [sum(values) / len(values) for values in (item.sft, item.retrain)]
    noises = [
        "-" if spread == 0 else f"{noise / spread:.1f}"
        for noise, spread in ((item.sft_noise, item.sft_spread), (item.retrain_noise, item.retrain_spread))
    ]
    return [
        item.name,
        f"{item.correlation:.2f}",
        f"{item.interval[0]:.1f} to {item.interval[1]:.1f}",
        *(f"{mean:.3g}" for mean in means),
        *("-" if value is None else f"{value:.3g}" for value in (item.sparse, item.full)),
        ", ".join(noises),
    ]
