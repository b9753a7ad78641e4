"""`tribute gc`: list what a study, or the cache, no longer needs, and delete it when asked to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse, read_study
from tribute.cli.console import confirm, print_line, print_table, size_text
from tribute.data.sources import default_cache_dir
from tribute.errors import ConfigError
from tribute.store.records import Store
from tribute.study.listener import duration_text
from tribute.study.run_folder import WAIT_OR_STOP_IT, RunLock
from tribute.study.upkeep import (
    KINDS,
    Waste,
    clean,
    existing_store,
    find_cache_waste,
    find_waste,
    only,
)


class GcArguments(Arguments):
    """Flags of `tribute gc`."""

    study: Annotated[Path | None, tyro.conf.Positional] = Field(
        default=None, description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    cache: bool = Field(default=False, description="Look through the cache ($TRIBUTE_CACHE) instead of a study.")
    what: tuple[Literal["checkpoints", "damaged", "leftovers", "evaluations", "backups", "images", "cache"], ...] = (
        Field(default=(), description="Only these kinds; none: all of them.")
    )
    yes: bool = Field(default=False, description="Do not ask.")
    dry_run: bool = Field(default=False, description="Say what would go and stop.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, list what may go, ask, delete."""
    arguments = parse(GcArguments, argv, prog=prog, description="Delete what is no longer needed.")
    if arguments.cache == (arguments.study is not None):
        found = "both" if arguments.cache else "neither"
        raise ConfigError(f"expected a study (STUDY.yaml, or its run folder) or --cache; found {found}")
    with ExitStack() as stack:
        store: Store | None = None
        if arguments.study is None:
            place = default_cache_dir()
            waste = find_cache_waste(place)
        else:
            config = read_study(arguments.study, arguments.outdir)
            place = config.run_dir
            if place.is_dir() and not arguments.dry_run:
                stack.enter_context(RunLock(place, remedy=WAIT_OR_STOP_IT)).acquire()
            store = existing_store(config)
            if store is not None:
                stack.enter_context(store)
            waste = find_waste(config, store, of_server="evaluations" in arguments.what)
        waste = only(waste, arguments.what or KINDS)
        for line in waste.kept:
            print_line(f"  kept: {line}")
        if not waste:
            print_line(f"there is nothing to delete in {place}")
            return
        print_waste(waste)
        if arguments.dry_run:
            print_line("nothing was deleted (--dry_run)")
        elif confirm("Delete all of this? It cannot be undone.", yes=arguments.yes):
            clean(waste, store)
            print_line(f"done; {size_text(waste.n_bytes)} are free")
        else:
            print_line("nothing was deleted")


def print_waste(waste: Waste) -> None:
    """What may go, kind by kind, with sizes."""
    now = time.time()
    for kind in KINDS:
        items = [item for item in waste.files if item.kind == kind]
        if items:
            print_table(
                f"{kind}: {size_text(sum(item.n_bytes for item in items))}",
                ["path", "what", "size", "last used"],
                [
                    [str(item.path), item.reason, size_text(item.n_bytes), f"{duration_text(now - item.last_used)} ago"]
                    for item in items
                ],
            )
    if waste.evaluations:
        by_role: dict[str, int] = {}
        for item in waste.evaluations:
            by_role[item.spec.role or "fit"] = by_role.get(item.spec.role or "fit", 0) + 1
        roles = ", ".join(f"{n} {role}" for role, n in by_role.items())
        print_line(
            f"evaluations: {len(waste.evaluations)} that the study no longer asks for ({roles}), "
            f"{duration_text(waste.seconds)} of work"
        )
    print_line(f"{size_text(waste.n_bytes)} of files in all")
