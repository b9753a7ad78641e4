"""`tribute export`: write a store for other programs, or a model for those who use diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from tribute.cli.arguments import SOURCE_FLAGS, Arguments, parse, source_options
from tribute.cli.console import print_line
from tribute.errors import CheckpointError, ConfigError

_STORE_FLAGS = ("db", "out", "format", "study", "exp_name", "dataset", *SOURCE_FLAGS)
_MODEL_FLAGS = ("model", "to", "use_ema", "run")


class ExportArguments(Arguments):
    """Flags of `tribute export`: those of a store, or those of a model."""

    db: str | None = Field(default=None, description="Store: a file, or a SQLAlchemy URL.")
    out: Path | None = Field(default=None, description="With --db: file to write; for parquet a folder.")
    format: Literal["jsonl", "csv", "parquet"] | None = Field(
        default=None, description="With --db: jsonl (default), the published layout; csv; or parquet, a backup."
    )
    study: str | None = Field(default=None, description="With --format parquet: only the study of this name.")
    exp_name: str | None = Field(default=None, description="With --db: only this experiment.")
    dataset: str | None = Field(
        default=None, description="Write example indices of this dataset, as published; None: contributor indices."
    )
    contributors: str | None = Field(default=None, description="With --dataset: how it is divided; None: class.")
    data_dir: Path | None = Field(default=None, description="With --dataset: where it is.")
    max_examples: int | None = Field(default=None, gt=0, description="With --dataset: only the first rows.")
    contributor_column: str | None = Field(default=None, description="With --dataset: column of the owners.")
    label_column: str | None = Field(default=None, description="With --dataset: column of the classes.")
    image_column: str | None = Field(default=None, description="With --dataset: column of the images.")
    split: str | None = Field(default=None, description="With --dataset: part of it; None: train.")
    model: Path | None = Field(default=None, description="Model: a checkpoint that is not pruned.")
    to: Path | None = Field(default=None, description="With --model: new folder in the format of diffusers.")
    use_ema: bool = Field(default=True, description="With --model: write the moving average of the weights.")
    run: Path | None = Field(
        default=None, description="With --model: run folder of a study, whose credit goes into a model card."
    )


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, write what they name."""
    description = "Write a store for other programs (--db, --out), or a model as a diffusers folder (--model, --to)."
    arguments = parse(ExportArguments, argv, prog=prog, description=description)
    of_store, of_model = (_given(arguments, names) for names in (_STORE_FLAGS, _MODEL_FLAGS))
    if of_store and of_model:
        raise ConfigError(
            f"expected the flags of a store (--db, --out) or those of a model (--model, --to); found "
            f"{', '.join(of_store)} beside {', '.join(of_model)}"
        )
    if of_model:
        if arguments.model is None or arguments.to is None:
            raise ConfigError(f"--model, --to: expected both; found {', '.join(of_model)}")
        _export_model(arguments.model, arguments.to, use_ema=arguments.use_ema, run_dir=arguments.run)
    else:
        if arguments.db is None or arguments.out is None:
            raise ConfigError(
                f"expected --db and --out to export a store, or --model and --to to export a model; "
                f"found {', '.join(of_store) or 'none of them'}"
            )
        _export_store(arguments, arguments.db, arguments.out)


def _given(arguments: ExportArguments, names: Sequence[str]) -> list[str]:
    """The flags whose values are not the defaults, as they are written."""
    defaults = ExportArguments()
    return [f"--{name}" for name in names if getattr(arguments, name) != getattr(defaults, name)]


def _export_store(arguments: ExportArguments, db: str, out: Path) -> None:
    """Write the evaluations of a store, print how many there are."""
    from tribute.data.sources import load_contributors
    from tribute.store.interchange import export_csv, export_jsonl
    from tribute.store.records import Store

    if arguments.format == "parquet":
        _back_up(arguments, db, out)
        return
    if arguments.study is not None:
        raise ConfigError("--study: expected --format parquet; choose by --exp_name instead")
    options = source_options(arguments.dataset, arguments)
    if arguments.format == "csv" and options is not None:
        raise ConfigError("--dataset: CSV has no indices of examples; leave it out, or use --format jsonl")
    owners = None if options is None else load_contributors(**options).contributor_of_example
    with Store.open(db, create=False) as store:
        if arguments.format == "csv":
            n_lines = export_csv(store, out, exp_name=arguments.exp_name)
        else:
            n_lines = export_jsonl(store, out, contributor_of_example=owners, exp_name=arguments.exp_name)
    print_line(f"wrote {n_lines:,} evaluations to {out}")


def _back_up(arguments: ExportArguments, db: str, folder: Path) -> None:
    """Write whole studies, print how many evaluations they have."""
    from tribute.store.backup import export_parquet
    from tribute.store.records import Store

    others = [f"--{name}" for name in ("exp_name", "dataset", *SOURCE_FLAGS) if getattr(arguments, name) is not None]
    if others:
        raise ConfigError(f"{', '.join(others)}: a backup holds whole studies; leave it out, or choose by --study")
    with Store.open(db, create=False) as store:
        study_ids = None
        if arguments.study is not None:
            found = store.studies(name=arguments.study)
            if not found:
                names = ", ".join(sorted({study.name for study in store.studies()})) or "none"
                raise ConfigError(f"--study {arguments.study}: {db} has no study of this name; it has {names}")
            study_ids = [study.study_id for study in found if study.study_id is not None]
        n_evaluations = export_parquet(store, folder, study_ids=study_ids)
    print_line(f"wrote {n_evaluations:,} evaluations to {folder}")


def _export_model(model: Path, to: Path, *, use_ema: bool, run_dir: Path | None) -> None:
    """Write a model as a diffusers folder, with a model card where a study says whom to credit."""
    from tribute.models.export import codec_of, export_model, usage
    from tribute.models.pipelines import load_model
    from tribute.study.model_card import model_card

    checkpoint = load_model(model)
    codec = None
    try:
        codec = codec_of(checkpoint)
    except CheckpointError as error:
        print_line(f"the codec stays where it is: {error}")
    readme = None if run_dir is None else model_card(run_dir, title=to.name, usage=usage(checkpoint, to.name, codec))
    export_model(checkpoint, to, use_ema=use_ema, codec=codec, readme=readme)
    print_line(f"wrote {to}; load it by:")
    for line in usage(checkpoint, str(to), codec).splitlines():
        print_line(f"  {line}")
    if readme is not None:
        print_line(f"wrote {to / 'README.md'}: a model card with the section Training-data credit")
