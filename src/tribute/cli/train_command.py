"""`main.py`, `tribute train`: train, retrain or fine-tune a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from tribute.cli.arguments import (
    DataArguments,
    Pruner,
    PublishedTrainingArguments,
    RemovalArguments,
    RuntimeArguments,
    parse,
    print_settings,
)
from tribute.cli.console import EncodingReport, TrainingReport, print_line
from tribute.config import DataConfig, Preset, PruneConfig
from tribute.errors import CheckpointError, ConfigError
from tribute.games.designs import coalition_of
from tribute.models.checkpoint import Checkpoint, list_checkpoints
from tribute.models.pipelines import adopt_model, load_model
from tribute.study.layout import dataset_name, models_dir, pruning_name, removal_name
from tribute.unlearning.base import METHODS, PLANNED_METHODS, check_method

TRAIN_METHODS = (*METHODS, "prune_fine_tune", *PLANNED_METHODS)


class TrainArguments(DataArguments, RemovalArguments, PublishedTrainingArguments, RuntimeArguments):
    """Flags of `main.py`."""

    method: str = Field(description="retrain, prune_fine_tune or gd; ga, lora and iu are not in this version.")
    load: Path | None = Field(
        default=None,
        description="Model to start from: a checkpoint, a diffusers folder or a hub id. Needed by gd; prune_fine_tune "
        "finds what prune.py wrote.",
    )
    pruning_ratio: float = Field(default=0.3, description="Fraction of channels REMOVED per layer.")
    pruner: Pruner = "magnitude"
    thr: float = Field(default=0.05, description="Loss threshold of --pruner diff-pruning.")
    n_steps: int | None = Field(default=None, ge=0, description="Optimizer updates; None: the preset's for the method.")
    batch_size: int | None = Field(default=None, gt=0, description="None: the preset's.")
    lr: float | None = Field(default=None, gt=0, description="Learning rate; None: the preset's.")
    ema_inv_gamma: float | None = Field(default=None, gt=0, description="EMA warm-up; None: the preset's.")
    ema_power: float | None = Field(default=None, gt=0, description="EMA warm-up; None: the preset's.")
    ema_max_decay: float | None = Field(default=None, ge=0, lt=1, description="Largest EMA decay; None: the preset's.")
    ckpt_freq: int | None = Field(default=None, gt=0, description="Steps between checkpoints; None: the preset's.")
    log_freq: int = Field(default=100, gt=0, description="Steps between lines of progress.")
    report_to: str | None = Field(default=None, description="Tracker of Accelerate: tensorboard, wandb, ...")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, train, print where the model is."""
    arguments = parse(TrainArguments, argv, prog=prog, description="Train, retrain or fine-tune a model.")
    if arguments.method not in TRAIN_METHODS:
        raise ConfigError(f"--method: expected one of {', '.join(TRAIN_METHODS)}; found {arguments.method!r}")
    if arguments.method != "prune_fine_tune":
        check_method(arguments.method)
    prune = prune_settings(arguments)
    start_path = find_start(arguments, prune)
    start = None if start_path is None or (arguments.dry_run and not start_path.exists()) else load_model(start_path)
    source = arguments.source(None if start is None else start.meta.get("source"))
    preset = training_preset(arguments, source.dataset, start).with_codec(arguments.codec)
    arguments.check_precompute_stage(preset)
    config = preset.train_config(
        arguments.method,
        n_steps=arguments.n_steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        use_8bit_optimizer=arguments.use_8bit_optimizer,
        ema_inv_gamma=arguments.ema_inv_gamma,
        ema_power=arguments.ema_power,
        ema_max_decay=arguments.ema_max_decay,
        opt_seed=arguments.opt_seed,
    )
    parts = [pruning_name(prune)] if arguments.method == "prune_fine_tune" else []
    removal = removal_name(arguments.canonical_removal_dist(), arguments.datamodel_alpha, arguments.removal_seed)
    folder = models_dir(
        arguments.outdir, dataset_name(source.dataset, source.contributors), arguments.method, *parts, removal
    )
    if arguments.dry_run:
        print_settings(
            {
                "source": source,
                "codec": preset.codec,
                "train": config,
                "runtime": arguments.runtime(),
                "start": start_path,
                "removal": arguments.removal(),
                "folder": folder,
            }
        )
        return
    if arguments.precompute_stage == "save":
        save_latents(arguments, source, preset)
        return

    from tribute.diffusion.preflight import check_training
    from tribute.study.stages import Saving, train_model
    from tribute.study.worker import Worker

    check_training(config, device=arguments.device, runtime=arguments.runtime())
    worker = Worker(
        source,
        preset,
        mixed_precision=config.mixed_precision,
        runtime=arguments.runtime(),
        device=arguments.device,
        n_threads=arguments.n_threads,
        reuse_latents=arguments.precompute_stage == "reuse",
        on_block=EncodingReport(),
        log_with=[arguments.report_to] if arguments.report_to else (),
        project_dir=folder,
    )
    if arguments.report_to:
        worker.trainer.accelerator.init_trackers("tribute")
    mask = coalition_of(
        arguments.canonical_removal_dist(),
        worker.data.contributors.n_contributors,
        arguments.removal_seed,
        datamodel_alpha=arguments.datamodel_alpha,
    )
    freq = arguments.ckpt_freq or preset.ckpt_freq.get(arguments.method, 1000)
    checkpoint = train_model(
        worker,
        config,
        Saving(folder, freq, arguments.keep_all_ckpts),
        method=arguments.method,
        coalition_mask=mask,
        start=start,
        removal=arguments.removal(),
        on_log=TrainingReport(arguments.method),
        log_freq=arguments.log_freq,
    )
    worker.trainer.accelerator.end_training()
    present = [name for name, is_in in zip(worker.data.contributors.names, mask, strict=True) if is_in]
    print_line(f"trained on {len(present)} of {len(mask)} contributors: {', '.join(present)}")
    print_line(f"{checkpoint.n_steps:,} steps in {float(checkpoint.meta['seconds_train']):.1f} s")
    print_line(f"model: {checkpoint.path}")


def save_latents(arguments: TrainArguments, source: DataConfig, preset: Preset) -> None:
    """Encode every training image into the cache, or what is left of them, and say where it is."""
    from tribute.study.stages import encode_training_set

    space = encode_training_set(
        source, preset, device=arguments.device, n_threads=arguments.n_threads, on_block=EncodingReport()
    )
    latents = space.cache.latents
    print_line(f"{len(latents):,} latents of shape {latents.shape[1:]}, {latents.nbytes / 2**20:,.1f} MiB")
    print_line(f"latents: {space.cache.path}")
    print_line("train on them next: the same command with --precompute_stage reuse")


def prune_settings(arguments: Any) -> PruneConfig:
    """Pruning flags, checked; the error names the flag."""
    if not 0 <= arguments.pruning_ratio < 1:
        raise ConfigError(
            "--pruning_ratio: expected the fraction of channels to remove, at least 0 and below 1; "
            f"found {arguments.pruning_ratio}"
        )
    return PruneConfig.parse(
        {"pruning_ratio": arguments.pruning_ratio, "pruner": arguments.pruner, "thr": arguments.thr},
        where="pruning flags",
    )


def find_start(arguments: TrainArguments, prune: PruneConfig) -> Path | None:
    """The checkpoint that training starts from, if any."""
    if arguments.method == "retrain":
        if arguments.load is not None:
            raise ConfigError("--load: --method retrain starts from random weights; leave --load out, or use gd")
        return None
    if arguments.load is not None:
        return arguments.load
    if arguments.method == "gd":
        raise ConfigError("--load: --method gd fine-tunes a trained model; expected its folder, found none")
    source = arguments.source()
    folder = models_dir(
        arguments.outdir, dataset_name(source.dataset, source.contributors), "pruned", pruning_name(prune)
    )
    if not list_checkpoints(folder) and not arguments.dry_run:
        raise CheckpointError(
            f"no pruned model at {folder}; first run: prune.py --load FULL_MODEL --outdir {arguments.outdir} "
            f"--pruning_ratio {prune.pruning_ratio} --pruner {prune.pruner} --thr {prune.thr}"
        )
    return folder


def training_preset(arguments: DataArguments, dataset: str, start: Checkpoint | None) -> Preset:
    """The preset of the flags; a model that is loaded keeps its own network, noise schedule and codec."""
    if start is None:
        return arguments.load_preset(dataset)
    if arguments.preset is None and "preset" in start.meta:
        return Preset.parse(start.meta["preset"], where=f"{start.path}/config.json")
    return adopt_model(arguments.load_preset(dataset), start)
