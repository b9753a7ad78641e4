"""`tribute plan STUDY.yaml`: what a study will cost, measured on this machine before it starts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse, read_study
from tribute.cli.console import print_line, print_table
from tribute.config import StudyConfig
from tribute.errors import ConfigError, StoreError
from tribute.files import write_whole
from tribute.study.listener import duration_text

if TYPE_CHECKING:
    from tribute.study.plan import StagePlan, StudyPlan

TITLES = {
    "classifier": "classifier",
    "references": "real images",
    "latents": "latents",
    "full_model": "full model",
    "pruning": "pruning",
    "sparse_model": "sparse model",
    "end_points": "end points",
    "fit": "fit",
    "loo": "leave one out",
    "test": "test",
    "pictures": "pictures",
}


class PlanArguments(Arguments):
    """Flags of `tribute plan`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    device: str | None = Field(default=None, description="cpu or cuda; None: a GPU if there is one.")
    n_threads: int | None = Field(default=None, gt=0, description="CPU threads; None: the study's.")
    workers: tuple[int, ...] = Field(default=(1, 4, 16), description="Numbers of workers to give times for.")
    json_file: Path | None = Field(default=None, description="Also write the plan to this file, as JSON.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, measure, print the plan."""
    started = time.perf_counter()
    arguments = parse(PlanArguments, argv, prog=prog, description="Say what a study will cost, before it starts.")
    config = read_study(arguments.study, arguments.outdir, n_threads=arguments.n_threads)
    if not arguments.workers or min(arguments.workers) < 1:
        raise ConfigError(f"--workers: expected numbers of at least 1, found {list(arguments.workers)}")
    from tribute.study.planning import make_plan  # PyTorch: its import is part of what a process takes to set up

    plan = make_plan(config, device=arguments.device, started=started)
    print_plan(config, plan, arguments.workers)
    if arguments.json_file is not None:
        try:
            write_whole(arguments.json_file, json.dumps(plan.as_json(arguments.workers), indent=1))
        except OSError as error:
            raise StoreError(
                f"--json_file {arguments.json_file} cannot be written ({error}); choose another file"
            ) from error
        print_line(f"wrote {arguments.json_file}")


def print_plan(config: StudyConfig, plan: StudyPlan, workers: Sequence[int]) -> None:
    """The stages, then the times with several workers."""
    units = plan.units
    print_table(
        f"{config.name}: one device ({units.device})",
        ["stage", "number", "steps", "images", "s each", "hours", "left", "disk"],
        [stage_row(stage) for stage in plan.stages]
        + [
            [
                "in all",
                str(sum(stage.n_coalitions for stage in plan.stages)),
                f"{sum(stage.n_steps for stage in plan.stages):,}",
                f"{sum(stage.n_images for stage in plan.stages):,}",
                "",
                hours(3600 * plan.device_hours()),
                hours(3600 * plan.device_hours(left=True)),
                size(plan.disk_bytes()),
            ]
        ],
        note=f"number of coalitions, optimizer updates, generated images (none is kept), device hours; in all with "
        f"{units.seconds_setup:.0f} s that a process takes to set up. Left: without what the run folder and the store "
        "have",
    )
    print_table(
        "Time on the clock, each worker on a device like this one",
        ["workers", "in all", "left", "of it one process alone"],
        [
            [
                str(n),
                duration_text(plan.wall_seconds(n)),
                duration_text(plan.wall_seconds(n, left=True)),
                duration_text(plan.alone_seconds(left=True)),
            ]
            for n in workers
        ],
    )
    for note in units.notes:
        print_line(f"  estimated: {note}")
    if plan.until_interval is not None:
        print_line(f"  fit coalitions are the most: measuring stops at intervals of +- {plan.until_interval:.1%}")
    if config.max_device_hours is not None:
        left = plan.device_hours(left=True)
        fits = "is enough for all of it" if plan.device_hours() <= config.max_device_hours else "is not enough for it"
        print_line(f"  max_device_hours {config.max_device_hours:g} {fits}: {left:.3g} device hours are left to do")


def stage_row(stage: StagePlan) -> list[str]:
    """A stage as table cells."""
    return [
        TITLES[stage.name],
        str(stage.n_coalitions) if stage.n_coalitions else "",
        f"{stage.n_steps:,}" if stage.n_steps else "",
        f"{stage.n_images:,}" if stage.n_images else "",
        f"{stage.seconds_each:.3g}",
        hours(stage.seconds),
        hours(stage.seconds_left),
        size(stage.bytes) if stage.bytes else "",
    ]


def hours(seconds: float) -> str:
    """Hours with three digits."""
    return f"{seconds / 3600:.3g}" if seconds >= 3.6 or seconds == 0 else "<0.001"


def size(n_bytes: int) -> str:
    """Bytes as text for people."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
