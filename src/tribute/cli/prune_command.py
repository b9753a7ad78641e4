"""`prune.py`, `tribute prune`: remove channels of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from tribute.cli.arguments import DataArguments, Pruner, parse, print_settings
from tribute.cli.console import EncodingReport, print_line, print_table
from tribute.cli.train_command import prune_settings, training_preset
from tribute.models.pipelines import load_model
from tribute.study.layout import dataset_name, models_dir, pruning_name


class PruneArguments(DataArguments):
    """Flags of `prune.py`."""

    load: Path = Field(
        description="The full model: a ckpt_steps_* folder or the one above it, a diffusers folder, or a hub id."
    )
    pruning_ratio: float = Field(
        default=0.3, description="Fraction of channels REMOVED per layer (the published help says remaining)."
    )
    pruner: Pruner = "magnitude"
    thr: float = Field(
        default=0.05, description="diff-pruning: ignore noise levels whose loss is below this share of the largest."
    )


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, prune, print what was removed."""
    arguments = parse(PruneArguments, argv, prog=prog, description="Prune a trained model.")
    prune = prune_settings(arguments)
    full = load_model(arguments.load)
    source = arguments.source(full.meta.get("source"))
    preset = training_preset(arguments, source.dataset, full).with_codec(arguments.codec)
    folder = models_dir(
        arguments.outdir, dataset_name(source.dataset, source.contributors), "pruned", pruning_name(prune)
    )
    if arguments.dry_run:
        print_settings({"source": source, "prune": prune, "load": full.path, "folder": folder})
        return

    from tribute.study.compatibility import check_same_data
    from tribute.study.stages import prune_model
    from tribute.study.worker import Worker

    worker = Worker(source, preset, device=arguments.device, n_threads=arguments.n_threads, on_block=EncodingReport())
    check_same_data(full, worker)
    pruned, result = prune_model(worker, full, prune, folder)
    figures = pruned.meta["pruning"]
    rows = []
    for title, key in (("parameters", "n_parameters"), ("multiply-accumulates", "n_macs")):
        before, after = figures[key]["before"], figures[key]["after"]
        rows.append([title, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"])
    print_table(
        f"{prune.pruner} pruning of {prune.pruning_ratio:.0%} of the channels of each layer",
        ["", "before", "after", "removed"],
        rows,
    )
    if result is None:
        print_line("the model was pruned before; nothing was changed")
    print_line(f"model: {pruned.path}")
    print_line("fine-tune it next: main.py --method prune_fine_tune with the same pruning flags")
