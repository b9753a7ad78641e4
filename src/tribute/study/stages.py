"""The stages of a study, each a function that the commands and `tribute run` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tribute.config import DataConfig, Preset, PruneConfig, TrainConfig
from tribute.diffusion.loss import denoising_loss
from tribute.diffusion.train import CheckpointPolicy, Progress
from tribute.errors import CheckpointError, MixedResultsError
from tribute.models.build import build_unet
from tribute.models.checkpoint import Checkpoint, build_model, load_checkpoint, load_last_intact, save_checkpoint
from tribute.models.pruning import PruningResult, prune_unet
from tribute.seeding import numpy_stream, torch_stream
from tribute.study.compatibility import check_same_data
from tribute.study.latents import LatentSpace
from tribute.study.worker import Worker, check_images_fit, load_data_for
from tribute.types import CoalitionMask
from tribute.unlearning.as_is import mask_to_text


@dataclass(frozen=True)
class Saving:
    """Where and how often a training stage saves.

    Attributes:
        folder: Parent of the `ckpt_steps_*` folders.
        ckpt_freq: Steps between checkpoints.
        keep_all: Keep every checkpoint, not only the last.
        stop_early: As `CheckpointPolicy.stop_early`.
    """

    folder: Path
    ckpt_freq: int
    keep_all: bool = False
    stop_early: Callable[[int, float], bool] | None = None


def encode_training_set(
    source: DataConfig,
    preset: Preset,
    *,
    device: str | None = None,
    n_threads: int | None = None,
    cache_dir: Path | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> LatentSpace:
    """Encode the images of a dataset into the cache, or those that are missing, without setting up any training.

    Returns:
        The latent space, with its cache open.
    """
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    data = load_data_for(preset, source)
    check_images_fit(preset, data)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    space = LatentSpace(preset, data, cache_dir=cache_dir, device=where, on_block=on_block)
    space.examples()
    return space


def train_model(
    worker: Worker,
    config: TrainConfig,
    saving: Saving,
    *,
    method: str,
    coalition_mask: CoalitionMask,
    start: Checkpoint | None = None,
    removal: Mapping[str, Any] | None = None,
    on_log: Callable[[Progress], None] | None = None,
    log_freq: int = 100,
) -> Checkpoint:
    """Train a model on a coalition's examples and save it; resumes what is there.

    Args:
        worker: Data and trainer.
        config: Steps, batch, optimizer, seed.
        saving: Where to save.
        method: `retrain`, `prune_fine_tune` or `gd`, for the record.
        coalition_mask: `(n_contributors,)`; whose examples to train on.
        start: Begin with the moving average of this checkpoint; None begins with random weights.
        removal: How the coalition was drawn, for the record.
        on_log: Called every `log_freq` steps.
        log_freq: Steps between reports.

    Returns:
        The last checkpoint, read back from disk.
    """
    if start is None:
        model = build_unet(worker.preset.unet, opt_seed=config.opt_seed)
    else:
        check_same_data(start, worker)
        model = build_model(start)
    policy = checkpoint_policy(
        worker, saving, method=method, coalition_mask=coalition_mask, start=start, removal=removal
    )
    worker.trainer.train(
        model,
        worker.data.contributors.examples_of(coalition_mask),
        config,
        checkpoints=policy,
        on_log=on_log,
        log_freq=log_freq,
    )
    return load_checkpoint(saving.folder)


def checkpoint_policy(
    worker: Worker,
    saving: Saving,
    *,
    method: str,
    coalition_mask: CoalitionMask,
    start: Checkpoint | None,
    removal: Mapping[str, Any] | None = None,
) -> CheckpointPolicy:
    """How a run is saved, and what must agree for it to be resumed.

    Raises:
        CheckpointError: The folder cannot be made; better said now than after the first hours.
    """
    try:
        saving.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--outdir: {saving.folder} cannot be made ({error}); choose a writable folder"
        raise CheckpointError(message) from error
    identity = {
        "data": worker.data.fingerprint,
        "method": method,
        "coalition": mask_to_text(coalition_mask),
        "start": "random weights" if start is None else start.model_hash,
        **worker.codec_identity(),
    }
    meta = checkpoint_meta(worker, method=method, coalition_mask=coalition_mask, start=start)
    return CheckpointPolicy(
        folder=saving.folder,
        meta=meta | {"identity": identity, "removal": dict(removal or {})},
        ckpt_freq=saving.ckpt_freq,
        keep_all=saving.keep_all,
        pruning=None if start is None else start.pruning,
        stop_early=saving.stop_early,
    )


def prune_model(
    worker: Worker, full: Checkpoint, config: PruneConfig, folder: Path
) -> tuple[Checkpoint, PruningResult | None]:
    """Prune the moving average of a full model and save it at step 0.

    Returns:
        The pruned checkpoint, and what pruning did; None when it was there already.

    Raises:
        MixedResultsError: The folder holds a model pruned differently.
    """
    identity = {
        "start": full.model_hash,
        "prune": config.model_dump(mode="json"),
        "data": worker.data.fingerprint,
        **worker.codec_identity(),
    }
    found = load_last_intact(folder)  # a damaged one is kept aside: it takes seconds to prune again
    if found is not None:
        if found.meta.get("identity") != identity:
            raise MixedResultsError(
                f"{folder} holds a model pruned from another model or by other settings: saved "
                f"{found.meta.get('identity')}, asked {identity}. Use another --outdir"
            )
        return found, None
    model = build_model(full, device=worker.trainer.device)
    result = prune_unet(
        model,
        config,
        loss_at=_pruning_loss(worker, model, config),
        n_timesteps=worker.preset.noise_schedule.num_train_timesteps,
    )
    grand = np.ones(worker.data.contributors.n_contributors, dtype=np.bool_)
    path = save_checkpoint(
        folder,
        n_steps=0,
        unet=model.state_dict(),
        ema=model.state_dict(),
        meta=checkpoint_meta(worker, method="pruned", coalition_mask=grand, start=full)
        | {"identity": identity, "pruning": result.summary(), "seconds_train": 0.0},
        pruning=result.recipe,
    )
    return load_checkpoint(path), result


def _pruning_loss(worker: Worker, model: torch.nn.Module, config: PruneConfig) -> Callable[[int], torch.Tensor]:
    """Mean loss on fixed training images and noise at one timestep."""
    n_images = min(config.batch_size, worker.data.n_examples)
    rows = np.sort(numpy_stream(config.seed, "pruning images").permutation(worker.data.n_examples)[:n_images])
    examples = worker.trainer.examples
    clean = examples.batch(rows, torch_stream(config.seed, "pruning latents")).to(worker.trainer.device)
    labels = worker.trainer.labels_for(model, rows)
    noise = torch.randn(clean.shape, generator=torch_stream(config.seed, "pruning noise")).to(clean.device)

    def loss_at(timestep: int) -> torch.Tensor:
        timesteps = torch.full((len(clean),), timestep, dtype=torch.long, device=clean.device)
        return denoising_loss(model, worker.trainer.noise_schedule, clean, noise, timesteps, labels)

    return loss_at


def checkpoint_meta(
    worker: Worker, *, method: str, coalition_mask: CoalitionMask, start: Checkpoint | None
) -> dict[str, Any]:
    """What `config.json` of a checkpoint says, besides what the training loop adds."""
    return {
        "dataset": worker.data.dataset,
        "source": worker.source.model_dump(mode="json"),
        "preset": worker.preset.model_dump(mode="json"),
        "method": method,
        "unet": worker.preset.unet.model_dump(mode="json") if start is None else start.meta["unet"],
        "noise_schedule": worker.preset.noise_schedule.model_dump(mode="json"),
        "data": {"fingerprint": worker.data.fingerprint, "origin": worker.data.manifest.get("origin", {})},
        "codec": None if worker.latent_space is None else worker.latent_space.record(),
        "contributor_names": list(worker.data.contributors.names),
        "coalition": mask_to_text(coalition_mask),
        "start": None if start is None else {"path": start.path.name, "hash": start.model_hash, **_origin(start)},
        "provenance": worker.provenance(),
    }


def _origin(start: Checkpoint) -> dict[str, Any]:
    """Where a model that others made comes from, through all stages that began with it."""
    origin = start.meta.get("origin") or (start.meta.get("start") or {}).get("origin")
    return {} if origin is None else {"origin": origin}
