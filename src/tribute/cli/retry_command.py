"""`tribute retry STUDY.yaml`: failed evaluations can be claimed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse, read_study
from tribute.cli.console import print_line
from tribute.errors import StoreError
from tribute.study.record import StudyRecord
from tribute.study.upkeep import existing_store

MAX_SHOWN = 20


class RetryArguments(Arguments):
    """Flags of `tribute retry`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    role: tuple[Literal["empty", "grand", "fit", "loo", "test"], ...] = Field(
        default=(), description="Only evaluations of these roles; none: of all."
    )


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, say what failed and why, and make it pending."""
    arguments = parse(RetryArguments, argv, prog=prog, description="Make failed evaluations claimable again.")
    config = read_study(arguments.study, arguments.outdir)
    record = StudyRecord.read(config)
    store = existing_store(config)
    if store is None:
        raise StoreError(f"{config.db_url} is not there: expected the store of the study. Run tribute run first")
    with store:
        study_id = record.study_id(store)
        ids = record.evaluation_ids(store, roles=arguments.role or None)
        failed = store.find(study_id, statuses=("failed",), evaluation_ids=ids)
        if not failed:
            print_line("no evaluation has failed" + (f" of role {', '.join(arguments.role)}" if arguments.role else ""))
            return
        # One that another process retries in the meantime is no longer failed, and is left alone.
        n_again = store.retry(study_id, evaluation_ids=[item.evaluation_id for item in failed])
    for item in failed[:MAX_SHOWN]:
        tries = "once" if item.attempts == 1 else f"{item.attempts} times"
        print_line(f"  {item.spec.role or 'fit'}: {item.spec} failed {tries}: {item.error or 'reason not recorded'}")
    if len(failed) > MAX_SHOWN:
        print_line(f"  and {len(failed) - MAX_SHOWN} more, with the reasons:")
        reasons = Counter(item.error or "not recorded" for item in failed[MAX_SHOWN:])
        for reason, n in reasons.most_common():
            print_line(f"    {n} times: {reason}")
    print_line(f"{n_again} evaluations are pending again; tribute run measures them")
