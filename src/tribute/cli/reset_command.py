"""`tribute reset STUDY.yaml --stage STAGE`: throw away the results of a stage, and of all that depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse, read_study
from tribute.cli.console import confirm, print_line, print_table, size_text
from tribute.study.listener import duration_text
from tribute.study.run_folder import WAIT_OR_STOP_IT, RunLock
from tribute.study.upkeep import Reset, apply_reset, existing_store, plan_reset, size_of


class ResetArguments(Arguments):
    """Flags of `tribute reset`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    stage: Literal[
        "full_model", "pruned_model", "sparse_model", "coalitions", "empty", "grand", "fit", "loo", "test"
    ] = Field(description="A model, with those made from it; all coalitions, or those of a role.")
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    yes: bool = Field(default=False, description="Do not ask.")
    dry_run: bool = Field(default=False, description="Say what would go and stop.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, list what goes, ask, do it."""
    arguments = parse(ResetArguments, argv, prog=prog, description="Throw away the results of a stage.")
    config = read_study(arguments.study, arguments.outdir)
    with ExitStack() as stack:
        if config.run_dir.is_dir() and not arguments.dry_run:
            # From the list to the deed, so that what was listed is what goes.
            stack.enter_context(RunLock(config.run_dir, remedy=WAIT_OR_STOP_IT)).acquire()
        store = existing_store(config)
        if store is not None:
            stack.enter_context(store)
        found = plan_reset(config, arguments.stage, store)
        if not found:
            print_line(f"{arguments.stage}: there is nothing to throw away in {config.run_dir}")
            return
        print_reset(found)
        if arguments.dry_run:
            print_line("nothing was deleted (--dry_run)")
        elif confirm("Throw this away? It cannot be undone.", yes=arguments.yes):
            apply_reset(found, store)
            print_line("done; tribute run makes it again")
        else:
            print_line("nothing was deleted")


def print_reset(found: Reset) -> None:
    """What goes, with numbers and sizes."""
    if found.evaluations:
        rows = [
            [role, *(f"{by_status.get(status, 0):,}" for status in ("finished", "failed", "running", "pending"))]
            for role, by_status in found.counts().items()
        ]
        what = "to become pending again" if found.forgotten else "to be deleted, as they name a model that goes"
        print_table(
            f"{found.stage}: {len(found.evaluations):,} evaluations {what}",
            ["role", "finished", "failed", "running", "pending"],
            rows,
            note=f"{duration_text(found.seconds)} of work",
        )
    for path in (*found.models, *found.outputs):
        print_line(f"  delete {path}, {size_text(size_of(path))}")
    print_line(f"{size_text(found.n_bytes)} of files in all")
