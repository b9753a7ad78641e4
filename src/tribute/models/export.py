"""A model written as a folder of diffusers, for those who do not use Tribute."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

from tribute.config import CodecConfig, NoiseScheduleConfig
from tribute.errors import CheckpointError
from tribute.files import write_whole_dir
from tribute.models.build import build_ddim_scheduler
from tribute.models.checkpoint import Checkpoint, build_model
from tribute.models.codec import CodecFiles, find_codec
from tribute.models.hub import WEIGHTS_NAME

PIPELINE = "DDIMPipeline"
"""Its scheduler says all that our deterministic sampler needs; `DDPMPipeline` loads the same folder."""

LATENT_PIPELINE = "LDMPipeline"


def export_model(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    use_ema: bool = True,
    codec: CodecFiles | None = None,
    readme: str | None = None,
) -> None:
    """Write a model as a diffusers folder, whole or not at all: `unet/`, `scheduler/` and `model_index.json`.

    A model of latents takes its codec along, in `vqvae/`; without it, and for a class-conditional model, there is no
    `model_index.json`: no pipeline of diffusers asks a `UNet2DModel` for labels. The parts then load one by one.

    Args:
        checkpoint: An unpruned model.
        folder: The new folder.
        use_ema: Write the moving average of the weights.
        codec: Of a model of latents (`codec_of`); None leaves it out.
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
    pipeline = pipeline_of(checkpoint, codec)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": metadata.version("diffusers"),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        **({} if codec is None else {"vqvae": ["diffusers", codec.kind]}),
    }

    def write(partial: Path) -> None:
        model.save_pretrained(partial / "unet", safe_serialization=True)
        build_ddim_scheduler(_noise_schedule(checkpoint)).save_pretrained(partial / "scheduler")
        if codec is not None:
            (partial / "vqvae").mkdir()
            shutil.copyfile(codec.folder / WEIGHTS_NAME, partial / "vqvae" / WEIGHTS_NAME)
            # diffusers divides by what the file says, and has another default for some codecs.
            settings = {**codec.settings, "scaling_factor": codec.scaling_factor}
            (partial / "vqvae" / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if pipeline is not None:
            (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        if readme is not None:
            (partial / "README.md").write_text(readme, encoding="utf-8")

    try:
        write_whole_dir(folder, write)
    except OSError as error:
        raise CheckpointError(f"--to: {folder} could not be written ({error}); choose a writable folder") from error


def codec_of(checkpoint: Checkpoint) -> CodecFiles | None:
    """The codec of a model of latents, if it is on this machine; None for a model of pixels.

    Raises:
        CheckpointError: It is not here.
    """
    settings = _codec_settings(checkpoint)
    return None if settings is None else find_codec(settings, download=False)


def pipeline_of(checkpoint: Checkpoint, codec: CodecFiles | None) -> str | None:
    """The class of diffusers that loads the whole folder; None where it has no such class, or a part is missing."""
    if checkpoint.meta["unet"].get("num_class_embeds"):
        return None
    if _codec_settings(checkpoint) is None:
        return PIPELINE
    return LATENT_PIPELINE if codec is not None and codec.shift == 0 else None


def usage(checkpoint: Checkpoint, folder: str, codec: CodecFiles | None = None) -> str:
    """Python that loads what `export_model` writes."""
    if pipeline := pipeline_of(checkpoint, codec):
        return f"from diffusers import {pipeline}\n\npipeline = {pipeline}.from_pretrained({folder!r})"
    return (
        "from diffusers import DDIMScheduler, UNet2DModel\n\n"
        f"unet = UNet2DModel.from_pretrained({folder!r}, subfolder='unet')\n"
        f"scheduler = DDIMScheduler.from_pretrained({folder!r}, subfolder='scheduler')"
    )


def _codec_settings(checkpoint: Checkpoint) -> CodecConfig | None:
    """Where the codec of a model of latents is."""
    meta = checkpoint.meta
    saved = meta.get("preset", {}).get("codec") or meta.get("codec")
    if not saved:
        return None
    known = {name: saved[name] for name in CodecConfig.model_fields if name in saved}
    return CodecConfig.parse(known, where=str(checkpoint.path))


def _noise_schedule(checkpoint: Checkpoint) -> NoiseScheduleConfig:
    """The forward process that a model was trained with."""
    values = checkpoint.meta.get("noise_schedule")
    if values is None:
        raise CheckpointError(
            f"{checkpoint.path} names no scheduler, so nothing says how to sample from it; add scheduler_config.json"
        )
    return NoiseScheduleConfig.parse(values, where=str(checkpoint.path))
