"""`tribute status STUDY.yaml`: where a study stands and what its attributions are by now, at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse, read_study
from tribute.cli.console import console, print_line, print_table
from tribute.cli.lds_command import print_attributions
from tribute.config import StudyConfig
from tribute.study.listener import duration_text
from tribute.study.outputs import shares
from tribute.study.status import STATES, Credit, ModelStatus, StudyStatus, read_status

MAX_FAILURES_SHOWN = 5

_STAGES = {
    "not begun": "not begun; tribute run begins it",
    "full_model": "training the full model",
    "pruned_model": "pruning",
    "sparse_model": "fine-tuning the sparse model",
    "plan": "the models are there, and which coalitions to measure is not written yet; tribute run goes on",
    "coalitions": "measuring coalitions",
    "complete": "complete",
}

_SPENT = {"models": "full and sparse model", "gd": "sparsified fine-tuning", "retrain": "retraining"}


class StatusArguments(Arguments):
    """Flags of `tribute status`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    watch: bool = Field(default=False, description="Look again and again until the study is complete, or Ctrl-C.")
    interval: float = Field(default=10.0, gt=0, description="Seconds between two looks of --watch.")
    format: Literal["text", "json"] = Field(
        default="text", description="text for people, or one JSON object per look, on a line of its own."
    )


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, look, print."""
    arguments = parse(StatusArguments, argv, prog=prog, description="Where a study stands.")
    config = read_study(arguments.study, arguments.outdir)
    if not arguments.watch:
        show(read_status(config), arguments.format)
        return
    try:
        watch(config, arguments)
    except KeyboardInterrupt:  # the way to end watching, and no failure
        print_line("")


def watch(config: StudyConfig, arguments: StatusArguments) -> None:
    """Show the status anew until nothing is left to do; on a terminal each look replaces the one before."""
    while True:
        status = read_status(config)
        if console.is_terminal and arguments.format == "text":
            console.clear()
        show(status, arguments.format)
        if status.stage == "complete":
            return
        time.sleep(arguments.interval)


def show(status: StudyStatus, form: str) -> None:
    """Print a status for people or for programs."""
    if form == "json":
        print_line(json.dumps(status.as_json(), allow_nan=False))
    else:
        print_status(status)


def print_status(status: StudyStatus) -> None:
    """Stage, models, evaluations, who is at work, what failed, attributions."""
    print_line(f"{status.name}: {_STAGES[status.stage]}")
    print_line(f"  run folder {status.run_dir}, looked at {_clock(status.at)}")
    print_line(f"  run: {status.run or 'none is known to be at work'}")
    for model in status.models:
        print_line(f"  {model_line(model, status.at)}")
    if not status.counts:
        return
    print_evaluations(status)
    for item in status.credits:
        print_credit(item, status)


def model_line(model: ModelStatus, at: float) -> str:
    """How far a model is, in a line."""
    title = f"{model.name} model"
    if model.loaded is not None:
        return f"{title}: loaded from {model.loaded}"
    if model.n_steps is None:
        return f"{title}: not there" + (f", 0 of {model.n_steps_planned:,} steps" if model.n_steps_planned else "")
    if not model.n_steps_planned:
        return f"{title}: done"
    steps = f"{model.n_steps:,} of {model.n_steps_planned:,} steps"
    if model.is_done or model.saved is None:
        return f"{title}: {steps}"
    return f"{title}: {steps} at its last checkpoint, {duration_text(at - model.saved)} ago"


def print_evaluations(status: StudyStatus) -> None:
    """What is done and what is left, by role; the rate; who has what in hand; what failed."""
    columns = ["evaluations", "finished", "running", "pending", "failed", "in all"]
    order = ("finished", "running", "pending", "failed")
    rows = [
        [role, *(f"{by_state[state]:,}" for state in order), f"{sum(by_state.values()):,}"]
        for role, by_state in status.counts.items()
    ]
    rows.append(["all", *(f"{status.n(state):,}" for state in order), f"{status.n(*STATES):,}"])
    print_table("Evaluations", columns, rows)
    if status.until_interval is not None:
        print_line(
            f"  the study stops earlier once every 95 % interval is within +- {status.until_interval:.1%} of the whole "
            "credit (until_interval)"
        )
    if status.per_hour is not None:
        left = "" if not status.seconds_left else f", about {duration_text(status.seconds_left)} left at that rate"
        print_line(f"  {status.per_hour:,.1f} evaluations per hour{left}")
    spent = [f"{_SPENT.get(name, name)} {duration_text(seconds)}" for name, seconds in status.seconds_spent.items()]
    print_line(f"  spent {duration_text(sum(status.seconds_spent.values()))} of work: {', '.join(spent)}")
    for item in status.in_hand:
        line = f"  {item.owner} has had {item.what} in hand for {duration_text(item.seconds)}"
        if item.is_owner_gone:
            line += "; the process has ended, and the evaluation will be measured again"
        elif item.seconds_silent is not None:
            line += f", last sign of life {duration_text(item.seconds_silent)} ago"
        if item.is_silent and not item.is_owner_gone:
            line += "; warning: silent for long, it may hang. Once it is ended, its evaluation can be claimed again"
        print_line(line)
    for failure in status.failures[:MAX_FAILURES_SHOWN]:
        tries = "once" if failure.attempts == 1 else f"{failure.attempts} times"
        print_line(f"  failed {tries}: {failure.what}: {failure.reason}")
    if len(status.failures) > MAX_FAILURES_SHOWN:
        print_line(f"  and {len(status.failures) - MAX_FAILURES_SHOWN} more failed")
    if status.failures:
        print_line("  tribute retry makes failed evaluations claimable again; tribute run tries them again, too")


def print_credit(item: Credit, status: StudyStatus) -> None:
    """Attributions of a behavior by now, or why there are none."""
    fitted = item.attributions
    if fitted is None:
        print_line(f"{item.behavior_name}: no attributions yet. {item.missing_reason}")
        return
    n_planned = sum(status.counts.get("fit", {}).values())
    better = "higher" if item.higher_is_better else "lower"
    print_attributions(
        f"{item.behavior_name} ({better} is better), by now: Shapley values, {fitted.estimator}, "
        f"{fitted.n_coalitions} of {n_planned} coalitions",
        fitted,
        status.contributor_names,
        status.n_examples,
        higher_is_better=item.higher_is_better,
        shares=["-" if math.isnan(share) else f"{share:.1%}" for share in shares(fitted)],
        note=f"v(nobody) = {item.v_empty:.3f}, v(everyone) = {item.v_grand:.3f}; shares are of their difference",
    )
    print_line(widths_line(item, status.until_interval))


def widths_line(item: Credit, until_interval: float | None) -> str:
    """The narrowest and the widest interval, beside the one at which the study stops."""
    if not math.isfinite(item.widest):
        return "  95 % intervals: not known yet"
    line = f"  95 % intervals, of the whole credit: narrowest +- {item.narrowest:.1%}, widest +- {item.widest:.1%}"
    if until_interval is not None:
        line += f"; asked for +- {until_interval:.1%}, " + ("reached" if item.widest <= until_interval else "not yet")
    return line


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
