"""Models that others made: diffusers folders and models of the hub, read as checkpoints.

What is read is JSON and safetensors, never a pickle: the network's `config.json` and weights, the scheduler's
settings and, for latent diffusion, where the codec is. The result is a `Checkpoint` in memory like any of ours, so
everything that starts from a trained model starts from one of these as well.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tribute.config import CodecConfig, NoiseScheduleConfig, Preset, UNetConfig, fingerprint
from tribute.errors import CheckpointError, ConfigError
from tribute.files import sha256_of_file
from tribute.models.build import build_unet
from tribute.models.checkpoint import FORMAT_VERSION, Checkpoint, Tensors, check_weights, load_checkpoint, read_tensors
from tribute.models.hub import WEIGHTS_NAME, NotOnTheHub, download_snapshot, find_pickle, parse_hub_id

logger = logging.getLogger(__name__)

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
"""Schedulers whose forward process is the variance-preserving one of Ho et al. (2020), in discrete steps."""

_SAMPLED_AS_SAVED = ("DDPMScheduler", "DDIMScheduler")
"""Of these the settings of sampling count, too; of others only the forward process and the prediction type."""

_FORWARD_PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type"),
)
_OTHER_PROCESSES = {"use_flow_sigmas": (False, None), "timestep_type": ("discrete",), "use_dynamic_shifting": (False,)}
"""Settings that change the forward process into another, with the values that do not."""

_KNOWN_COMPONENTS = {"unet", "scheduler", "vqvae", "vae"}
_CODECS = ("VQModel", "AutoencoderKL")

_NOT_IN_OUR_TERMS = {
    "class_embed_type": "labels are embedded by a table, whose size is num_class_embeds",
}
"""Arguments of `UNet2DModel` that `UNetConfig` lacks; None is the only value that can be read."""

_RENAMED = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
"""Attention layers had other names before diffusers 0.17 (its `_convert_deprecated_attention_blocks`)."""

_IGNORED_KEYS = {"tensor_format"}
"""Settings of early schedulers that never changed a number."""


def load_model(where: Path | str) -> Checkpoint:
    """Read a trained model: a checkpoint of ours, a local diffusers folder, or a model of the hub.

    Args:
        where: A path; or a hub id `OWNER/NAME`, `OWNER/NAME@REVISION`, where no such folder exists.

    Raises:
        CheckpointError: It is missing, damaged, unsafe, unreachable, or no model that can be read.
    """
    path = Path(where)
    if is_pipeline_folder(path):
        return read_pipeline(path, origin={"name": path.resolve().name})
    hub_id = parse_hub_id(where if isinstance(where, str) else where.as_posix())
    if not path.exists() and hub_id and not path.parent.exists():
        name, revision = hub_id
        folder = fetch_from_hub(name, revision)
        commit = folder.name if folder.parent.name == "snapshots" else None
        return read_pipeline(folder, origin={"name": name, "revision": revision, "commit": commit}, hub_name=name)
    return load_checkpoint(path)


def adopt_model(preset: Preset, checkpoint: Checkpoint) -> Preset:
    """The preset's recipe for a model that was trained before: its own network, forward process and codec.

    A folder without a scheduler leaves the preset's forward process, one that does not say whether it works on
    latents the preset's codec.
    """
    meta = checkpoint.meta
    changes: dict[str, Any] = {"unet": meta["unet"]}
    if meta["noise_schedule"] is None:
        logger.warning("%s names no scheduler; using the noise schedule of the preset", checkpoint.path)
    else:
        changes["noise_schedule"] = meta["noise_schedule"]
    return preset.replace(**changes, **_codec_change(checkpoint))


def _codec_change(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model says of its codec, as a change of a preset; nothing where it says nothing."""
    meta = checkpoint.meta
    if "preset" in meta:  # of ours; one without a codec is a model of pixels
        return {"codec": meta["preset"].get("codec")}
    if "codec" not in meta:
        return {}
    saved = meta["codec"]
    return {"codec": saved and {name: saved[name] for name in CodecConfig.model_fields if name in saved}}


def is_foreign(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a model that others made, on data that it does not name."""
    return "origin" in checkpoint.meta


def is_pipeline_folder(path: Path) -> bool:
    """Whether a folder is in the format of diffusers: a pipeline, or a network alone."""
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return True
    try:
        return "_class_name" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False


def read_pipeline(folder: Path, *, origin: Mapping[str, Any], hub_name: str | None = None) -> Checkpoint:
    """Read a pipeline folder of diffusers, or the folder of a `UNet2DModel`.

    Args:
        folder: With `unet/` and `scheduler/`, or with their files in the folder itself as in early pipelines.
        origin: Where it comes from, for the record.
        hub_name: Its name on the hub, where its codec is then read from.

    Returns:
        A checkpoint in memory; weights and moving average are the same. Its identity is the SHA-256 of the weights
        file with the settings of network and forward process.

    Raises:
        CheckpointError: A class, setting or weight that cannot be read faithfully; the message names it.
    """
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    _check_components(index, folder)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    unet = unet_settings(_read_json(unet_folder / "config.json"), where=unet_folder / "config.json")
    scheduler = _scheduler_file(folder)
    scheduler_config = None if scheduler is None else _read_json(scheduler)
    schedule = None if scheduler_config is None else schedule_settings(scheduler_config, where=Path(str(scheduler)))
    weights_sha256, tensors = _read_weights(unet_folder, unet, hub_name)
    settings = {
        "unet": unet.model_dump(mode="json"),
        "noise_schedule": None if schedule is None else schedule.model_dump(mode="json"),
    }
    meta = {
        "format_version": FORMAT_VERSION,
        "n_steps": 0,
        **settings,
        **({"codec": codec_settings(index, folder, hub_name, origin.get("commit"))} if index else {}),
        "origin": {
            **origin,
            "pipeline": index.get("_class_name"),
            "scheduler": (scheduler_config or {}).get("_class_name"),
            "weights_sha256": weights_sha256,
        },
        "files": {"unet.safetensors": weights_sha256, "settings": fingerprint(settings)},
    }
    return Checkpoint(path=folder, meta=meta, unet=tensors, ema=tensors)


def unet_settings(config: Mapping[str, Any], *, where: Path) -> UNetConfig:
    """The `config.json` of a `UNet2DModel` in our terms; what it leaves out has the default of diffusers.

    Raises:
        CheckpointError: Another class, or an argument that is unknown or has no place in our terms.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    found = config.get("_class_name")
    if found != "UNet2DModel":
        raise CheckpointError(
            f"{where}: expected a UNet2DModel, found {found!r}. Networks that are conditioned on text or images, and "
            "transformers, cannot be loaded"
        )
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, reason in _NOT_IN_OUR_TERMS.items():
        if (value := arguments.pop(name, None)) is not None:
            raise CheckpointError(f"{where}: {name}: expected null, found {value!r}: {reason}")
    known = {**_defaults(UNet2DModel), **arguments}
    for name in _NOT_IN_OUR_TERMS:
        known.pop(name, None)
    size = known["sample_size"]
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        known["sample_size"] = size[0]
    if not isinstance(known["sample_size"], int):
        raise CheckpointError(
            f"{where}: sample_size: expected the side of square images in pixels, found {size!r}; write it "
            "into the file"
        )
    try:
        unet = UNetConfig.parse(known, where=str(where))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if unet.in_channels != unet.out_channels:
        raise CheckpointError(
            f"{where}: expected as many output as input channels, found {unet.in_channels} and {unet.out_channels}; "
            "a network that also predicts variances, or is given more than the noisy image, cannot be loaded"
        )
    return unet


def schedule_settings(config: Mapping[str, Any], *, where: Path) -> NoiseScheduleConfig:
    """The `scheduler_config.json` of a pipeline in our terms; what it leaves out has the default of its class.

    Raises:
        CheckpointError: An unknown class, forward process or setting.
    """
    import diffusers

    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise CheckpointError(
            f"{where}: unknown scheduler {name!r}; expected one of {', '.join(SCHEDULERS)}, whose forward process "
            "training can follow"
        )
    scheduler_class = getattr(diffusers, name)
    _check_scheduler(config, where)
    values = {**_defaults(scheduler_class), **config}
    kept = {key: values[key] for key in _FORWARD_PROCESS if key in values}
    if config.get("predict_epsilon") is False:  # how prediction_type was written before diffusers 0.10
        kept["prediction_type"] = "sample"
    if values["beta_schedule"] not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        kept |= _betas_of(scheduler_class, values)
    if name in _SAMPLED_AS_SAVED:
        rest = NoiseScheduleConfig.model_fields.keys() - set(_FORWARD_PROCESS)
        kept |= {key: values[key] for key in rest if key in values}
    else:
        kept["clip_sample"] = bool(values.get("clip_sample", False))
    try:
        return NoiseScheduleConfig.parse(kept, where=str(where))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def codec_settings(
    index: Mapping[str, Any], folder: Path, hub_name: str | None, commit: str | None
) -> dict[str, Any] | None:
    """Where the codec of a latent pipeline is, as settings of a codec; None for a model of pixels.

    Raises:
        CheckpointError: A codec of an unknown class.
    """
    names = [name for name in ("vqvae", "vae") if _component(index, name)]
    if not names:
        return None
    config = _read_json(folder / names[0] / "config.json")
    if config.get("_class_name") not in _CODECS:
        raise CheckpointError(
            f"{folder / names[0]}: expected a codec of the classes {', '.join(_CODECS)}, "
            f"found {config.get('_class_name')!r}"
        )
    return {
        "path": hub_name or str(folder),
        "subfolder": names[0],
        "revision": commit,
        "scaling_factor": config.get("scaling_factor"),
        "factor": 2 ** (len(config.get("block_out_channels", [0])) - 1),
        "image_channels": config.get("in_channels", 3),
    }


def fetch_from_hub(name: str, revision: str | None = None) -> Path:
    """Download the settings of a model of the hub and then, if they can be read, its weights; returns the folder.

    What was downloaded before is used again, also without a network.

    Raises:
        CheckpointError: It cannot be reached, does not exist or must be asked for; the message names the local way.
    """
    folder = _snapshot(name, revision, [f"{part}*.json" for part in ("", "unet/", "scheduler/", "vqvae/", "vae/")])
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    _check_components(index, folder)
    part = "unet/" if (folder / "unet").is_dir() else ""
    unet_settings(_read_json(folder / part / "config.json"), where=folder / part / "config.json")
    return _snapshot(name, revision, [f"{part}{WEIGHTS_NAME}"])


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a hub model with the files that match."""
    try:
        return download_snapshot(name, revision, patterns)
    except NotOnTheHub as error:
        at = f" at revision {revision}" if revision else ""
        download = f"hf download {name}{f' --revision {revision}' if revision else ''} --local-dir FOLDER"
        raise CheckpointError(
            f"--load {name}: there is no such folder, and the model {name}{at} of the hub cannot be read "
            f"({error}). Without a network, fetch it where there is one by `{download}` (formerly "
            "`huggingface-cli download`), copy the folder here and use --load FOLDER"
        ) from error


def _check_components(index: Mapping[str, Any], folder: Path) -> None:
    """Refuse a pipeline that is not a `UNet2DModel` and its scheduler, perhaps with a codec."""
    if not index:
        return
    others = [name for name in index if name not in _KNOWN_COMPONENTS and _component(index, name)]
    unet = _component(index, "unet")
    if unet == "UNet2DModel" and not others:
        return
    found = f"a pipeline {index.get('_class_name')} with unet {unet!r}"
    raise CheckpointError(
        f"{folder}: expected a pipeline of a UNet2DModel and a scheduler, such as DDPMPipeline, DDIMPipeline or "
        f"LDMPipeline; found {found}{' and ' + ', '.join(others) if others else ''}. Models that are conditioned on "
        "text or images cannot be loaded"
    )


def _component(index: Mapping[str, Any], name: str) -> str | None:
    """Class of a pipeline's component; None where it has none of that name."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _scheduler_file(folder: Path) -> Path | None:
    """The scheduler's settings, where there are any."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return path
    return None


def _check_scheduler(config: Mapping[str, Any], where: Path) -> None:
    """Refuse settings of a scheduler that would be lost, or that mean another forward process."""
    import diffusers

    for key, harmless in _OTHER_PROCESSES.items():
        if key in config and config[key] not in harmless:
            raise CheckpointError(
                f"{where}: {key}: {config[key]!r} is another forward process than that of the networks which can be "
                "trained; expected the discrete variance-preserving one"
            )
    # A scheduler that was made from another keeps that one's settings, which do not concern it.
    known = {key for name in SCHEDULERS for key in _defaults(getattr(diffusers, name))}
    known |= _IGNORED_KEYS | {"predict_epsilon"}
    unknown = sorted(
        key for key, value in config.items() if key not in known and not key.startswith("_") and value is not None
    )
    if unknown:
        raise CheckpointError(
            f"{where}: unknown settings of {config['_class_name']}: {', '.join(unknown)}; remove them if they do not "
            "change the noise schedule"
        )


def _betas_of(scheduler_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The variances of a schedule that has no name in our settings, one by one."""
    arguments = {key: values[key] for key in _defaults(scheduler_class)}
    try:
        betas = scheduler_class(**arguments).betas
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"diffusers refuses the scheduler: {error}") from error
    return {
        "trained_betas": [float(value) for value in betas],
        "beta_schedule": "linear",
        "rescale_betas_zero_snr": False,  # they are rescaled already
    }


def _defaults(diffusers_class: type) -> dict[str, Any]:
    """Arguments of a diffusers class with their defaults."""
    parameters = inspect.signature(diffusers_class.__init__).parameters.values()  # pyright: ignore[reportFunctionMemberAccess]
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def _read_weights(folder: Path, unet: UNetConfig, hub_name: str | None) -> tuple[str, Tensors]:
    """SHA-256 of the weights file, and its tensors in float32 under the names of today.

    Raises:
        CheckpointError: There are none, only pickles, or they do not fit the architecture.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickle = find_pickle(folder)
        found = "no such file" if pickle is None else f"{pickle}, a pickle, which can run code when it is loaded"
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS_NAME}, found {found}. Weights that exist only as .bin are converted, without "
            f'running code from them, by: python -c "{_conversion(folder, hub_name)}"'
        )
    tensors = {_name_of_today(name): tensor.float() for name, tensor in read_tensors(path).items()}
    with torch.device("meta"):
        model = build_unet(unet, device="meta")
    check_weights(model, tensors, where=path)
    return sha256_of_file(path), tensors


def _conversion(folder: Path, hub_name: str | None) -> str:
    """Python that writes pickled weights as safetensors; diffusers unpickles tensors only (`weights_only`)."""
    if hub_name is not None:
        return (
            f"from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained({hub_name!r})"
            ".save_pretrained('FOLDER')"
        )
    return (
        f"from diffusers import UNet2DModel; UNet2DModel.from_pretrained({str(folder)!r})"
        f".save_pretrained({str(folder)!r})"
    )


def _name_of_today(name: str) -> str:
    """Name of a weight in present versions of diffusers."""
    for old, new in _RENAMED:
        name = re.sub(rf"(attentions\.\d+)\.{old}\.(weight|bias)$", rf"\1.{new}.\2", name)
    return name


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); expected a model saved by diffusers") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
