"""`tribute verify`: whether a run is what its manifest says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse
from tribute.cli.console import print_line


class VerifyArguments(Arguments):
    """Flags of `tribute verify`."""

    run: Annotated[Path, tyro.conf.Positional] = Field(description="A run folder, or the YAML file of its study.")
    hash: str | None = Field(
        default=None, description="A hash of the manifest that was published before, or its first 12 digits or more."
    )
    db: str | None = Field(
        default=None, description="The store; None: results.db in the run folder, or the db of its settings."
    )
    deep: bool = Field(default=False, description="Also load the models, and measure fit coalitions again.")
    n_evaluations: int = Field(default=1, gt=0, description="--deep: how many fit coalitions.")
    seed: int = Field(default=0, ge=0, description="--deep: which ones; choose one that nobody could foresee.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, compare, print; status 1 if something differs."""
    arguments = parse(VerifyArguments, argv, prog=prog, description="Compare a run with its manifest.")
    from tribute.study.verification import find_run_dir, verify_run

    found = verify_run(
        find_run_dir(arguments.run),
        db=arguments.db,
        published_hash=arguments.hash,
        deep=arguments.deep,
        n_evaluations=arguments.n_evaluations,
        seed=arguments.seed,
    )
    manifest = found.manifest
    if manifest is None:
        print_line(f"{found.run_dir}: no manifest")
    else:
        print_line(f"{found.run_dir}: manifest of {manifest.written}, written by tribute {manifest.version}")
    for title, lines in (
        ("agrees", found.agreed),
        ("not checked", found.unchecked),
        ("DIFFERS", found.differences),
    ):
        for line in lines:
            print_line(f"  {title:<12} {line}")
    if manifest is not None:
        print_line(f"hash         {manifest.hash}")
        print_line(f"result hash  {manifest.result_hash}")
    if found.is_sound:
        print_line("nothing differs")
        return
    n = len(found.differences)
    print_line(f"{n} difference{'' if n == 1 else 's'}")
    sys.exit(1)
