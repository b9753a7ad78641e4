"""A model written as a folder of diffusers, for those who do not use Tribute."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from tribute.config import NoiseScheduleConfig
from tribute.errors import CheckpointError
from tribute.files import write_whole_dir
from tribute.models.build import build_ddim_scheduler
from tribute.models.checkpoint import Checkpoint, build_model

PIPELINE = "DDIMPipeline"
"""Its scheduler says all that our deterministic sampler needs; `DDPMPipeline` loads the same folder."""


def export_model(checkpoint: Checkpoint, folder: Path, *, use_ema: bool = True, readme: str | None = None) -> None:
    """Write a model as a diffusers folder, whole or not at all: `unet/`, `scheduler/` and `model_index.json`.

    A class-conditional model, or one of latents, gets no `model_index.json`: no pipeline of diffusers asks a
    `UNet2DModel` for labels, and a pipeline of latents is not whole without its codec. Its parts load one by one.

    Args:
        checkpoint: An unpruned model.
        folder: The new folder.
        use_ema: Write the moving average of the weights.
        readme: Text of a `README.md` to go with it.

    Raises:
        CheckpointError: The model is pruned, the folder is in use, or it cannot be written.
    """
    if checkpoint.pruning is not None:
        raise CheckpointError(
            f"{checkpoint.path} is pruned: its layers have uneven widths, which the config.json of diffusers cannot "
            "describe, so from_pretrained could not load it. Export the full model instead, or share the checkpoint "
            "folder, which Tribute loads"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"--to: {folder} exists already; expected a new or empty folder")
    model = build_model(checkpoint, use_ema=use_ema)
    index = {
        "_class_name": PIPELINE,
        "_diffusers_version": metadata.version("diffusers"),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }

    def write(partial: Path) -> None:
        model.save_pretrained(partial / "unet", safe_serialization=True)
        build_ddim_scheduler(_noise_schedule(checkpoint)).save_pretrained(partial / "scheduler")
        if is_whole_pipeline(checkpoint):
            (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        if readme is not None:
            (partial / "README.md").write_text(readme, encoding="utf-8")

    try:
        write_whole_dir(folder, write)
    except OSError as error:
        raise CheckpointError(f"--to: {folder} could not be written ({error}); choose a writable folder") from error


def is_whole_pipeline(checkpoint: Checkpoint) -> bool:
    """Whether network and scheduler are all that a pipeline of diffusers needs: no labels, no codec."""
    meta = checkpoint.meta
    has_codec = meta.get("codec") or meta.get("preset", {}).get("codec")
    return not has_codec and not meta["unet"].get("num_class_embeds")


def usage(checkpoint: Checkpoint, folder: str) -> str:
    """Python that loads what `export_model` writes."""
    if is_whole_pipeline(checkpoint):
        return f"from diffusers import {PIPELINE}\n\npipeline = {PIPELINE}.from_pretrained({folder!r})"
    return (
        "from diffusers import DDIMScheduler, UNet2DModel\n\n"
        f"unet = UNet2DModel.from_pretrained({folder!r}, subfolder='unet')\n"
        f"scheduler = DDIMScheduler.from_pretrained({folder!r}, subfolder='scheduler')"
    )


def _noise_schedule(checkpoint: Checkpoint) -> NoiseScheduleConfig:
    """The forward process that a model was trained with."""
    values = checkpoint.meta.get("noise_schedule")
    if values is None:
        raise CheckpointError(
            f"{checkpoint.path} names no scheduler, so nothing says how to sample from it; add scheduler_config.json"
        )
    return NoiseScheduleConfig.parse(values, where=str(checkpoint.path))
