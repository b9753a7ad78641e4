"""`tribute export`: write a store for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from tribute.cli.arguments import SOURCE_FLAGS, Arguments, parse
from tribute.cli.console import print_line
from tribute.data.sources import load_contributors
from tribute.store.interchange import export_csv, export_jsonl
from tribute.store.records import Store


class ExportArguments(Arguments):
    """Flags of `tribute export`."""

    db: str = Field(description="Store: a file, or a SQLAlchemy URL.")
    out: Path = Field(description="File to write.")
    format: Literal["jsonl", "csv"] = Field(default="jsonl", description="jsonl: the published layout.")
    exp_name: str | None = Field(default=None, description="Only this experiment.")
    dataset: str | None = Field(
        default=None, description="Write example indices of this dataset, as published; None: contributor indices."
    )
    contributors: str = Field(default="class", description="With --dataset: how it is divided.")
    data_dir: Path | None = Field(default=None, description="With --dataset: where it is.")
    max_examples: int | None = Field(default=None, gt=0, description="With --dataset: only the first rows.")
    contributor_column: str | None = Field(default=None, description="With --dataset: column of the owners.")
    label_column: str | None = Field(default=None, description="With --dataset: column of the classes.")
    split: str = Field(default="train", description="With --dataset: part of it.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, write the file, print how many evaluations it holds."""
    arguments = parse(ExportArguments, argv, prog=prog, description="Write a store for other programs.")
    with Store.open(arguments.db, create=False) as store:
        if arguments.format == "csv":
            n_lines = export_csv(store, arguments.out, exp_name=arguments.exp_name)
        else:
            owners = None
            if arguments.dataset is not None:
                source = {name: getattr(arguments, name) for name in SOURCE_FLAGS}
                owners = load_contributors(**source).contributor_of_example
            n_lines = export_jsonl(store, arguments.out, contributor_of_example=owners, exp_name=arguments.exp_name)
    print_line(f"wrote {n_lines:,} evaluations to {arguments.out}")
