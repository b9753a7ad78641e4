"""`tribute import`: read evaluations of the published layout, or a backup, into a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from tribute.cli.arguments import SOURCE_FLAGS, Arguments, parse, source_options
from tribute.cli.console import print_line
from tribute.data.sources import load_contributors
from tribute.errors import ConfigError
from tribute.store.backup import import_parquet
from tribute.store.interchange import import_jsonl
from tribute.store.records import Store


class ImportArguments(Arguments):
    """Flags of `tribute import`."""

    db: str = Field(description="Store: a file, or a SQLAlchemy URL.")
    file: Path = Field(description="JSONL file in the published layout, or the folder of a Parquet backup.")
    exp_name: str = Field(default="imported", description="Study for lines that Tribute did not write.")
    dataset: str | None = Field(
        default=None, description="The lines hold example indices of this dataset; None: contributor indices."
    )
    contributors: str | None = Field(default=None, description="With --dataset: how it is divided; None: class.")
    data_dir: Path | None = Field(default=None, description="With --dataset: where it is.")
    max_examples: int | None = Field(default=None, gt=0, description="With --dataset: only the first rows.")
    contributor_column: str | None = Field(default=None, description="With --dataset: column of the owners.")
    label_column: str | None = Field(default=None, description="With --dataset: column of the classes.")
    image_column: str | None = Field(default=None, description="With --dataset: column of the images.")
    split: str | None = Field(default=None, description="With --dataset: part of it; None: train.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, read the file, print how many evaluations are new."""
    arguments = parse(ImportArguments, argv, prog=prog, description="Read the published layout, or a backup.")
    if arguments.file.is_dir():
        _restore(arguments)
        return
    options = source_options(arguments.dataset, arguments)
    table = None if options is None else load_contributors(**options)
    with Store.open(arguments.db) as store:
        n_new = import_jsonl(
            store,
            arguments.file,
            dataset=arguments.dataset,
            contributor_names=None if table is None else table.names,
            contributor_of_example=None if table is None else table.contributor_of_example,
            study_name=arguments.exp_name,
        )
    print_line(f"{n_new:,} new evaluations in {arguments.db}")


def _restore(arguments: ImportArguments) -> None:
    """Read a backup, print how many evaluations are new."""
    others = [f"--{name}" for name in ("dataset", *SOURCE_FLAGS) if getattr(arguments, name) is not None]
    if others:
        raise ConfigError(f"{', '.join(others)}: a backup says itself whose coalitions it holds; leave it out")
    with Store.open(arguments.db) as store:
        n_new = import_parquet(store, arguments.file)
    print_line(f"{n_new:,} new evaluations in {arguments.db}")
