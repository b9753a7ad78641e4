"""The autoencoder of a latent diffusion model: images to latents and back, frozen.

A codec is a folder in the diffusers format: `config.json` and `diffusion_pytorch_model.safetensors` of a `VQModel` or
an `AutoencoderKL`. What a network is trained on are its latents before quantisation, or draws from its posterior,
times a scaling factor (Rombach et al. 2022, sections 3.2 and D.1).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tribute.config import CodecConfig, UNetConfig, fingerprint
from tribute.errors import CheckpointError, ConfigError
from tribute.files import sha256_of_file
from tribute.memory import FittingBatch
from tribute.models.hub import WEIGHTS_NAME, NotOnTheHub, download_snapshot, find_pickle, parse_hub_id

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel

_DEFAULT_SCALING = {"VQModel": 1.0, "AutoencoderKL": 0.18215}
"""Where `config.json` names none. Codecs of the KL kind that are older than the setting mean 0.18215; VQ codecs mean
1, although diffusers then assumes 0.18215 for them, too (https://github.com/huggingface/diffusers/issues/6725)."""


@dataclass(frozen=True)
class CodecFiles:
    """A codec on the disk, before anything heavy is loaded.

    Attributes:
        folder: With `config.json` and the weights.
        settings: `config.json`.
        scaling_factor: Latents are multiplied by it.
    """

    folder: Path
    settings: dict[str, Any] = field(repr=False)
    scaling_factor: float

    @property
    def kind(self) -> str:
        """`VQModel` or `AutoencoderKL`."""
        return self.settings["_class_name"]

    @property
    def has_posterior(self) -> bool:
        """Whether an image has a distribution of latents rather than one."""
        return self.kind == "AutoencoderKL"

    @property
    def shift(self) -> float:
        """Subtracted from latents before they are scaled."""
        return float(self.settings.get("shift_factor") or 0.0)

    @property
    def factor(self) -> int:
        """Side of an image over the side of its latent."""
        return 2 ** (len(self.settings.get("block_out_channels", (64,))) - 1)

    @property
    def image_channels(self) -> int:
        return int(self.settings.get("in_channels", 3))

    @property
    def latent_channels(self) -> int:
        """Channels that the diffusion model sees."""
        channels = int(self.settings.get("latent_channels", 4 if self.has_posterior else 3))
        return channels if self.has_posterior else int(self.settings.get("vq_embed_dim") or channels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, architecture and scaling: two codecs with the same are the same."""
        architecture = {name: value for name, value in self.settings.items() if name not in _NOT_IDENTITY}
        weights = sha256_of_file(self.folder / WEIGHTS_NAME)
        return fingerprint({"weights": weights, "architecture": architecture, "scaling_factor": self.scaling_factor})

    def stored_shape(self, image_size: int) -> tuple[int, int, int]:
        """Channels, height and width of what `Codec.encode` gives for an image of that size."""
        side = image_size // self.factor
        return self.latent_channels * (2 if self.has_posterior else 1), side, side


_NOT_IDENTITY = {"_diffusers_version", "_name_or_path", "scaling_factor"}


def find_codec(config: CodecConfig, *, download: bool = True) -> CodecFiles:
    """Find a codec on this machine, or fetch it from the hub if it is not there.

    Args:
        config: Where it is.
        download: Whether the hub may be asked.

    Raises:
        CheckpointError: There is none, it is not readable, or its weights are a pickle.
        ConfigError: It is of a kind that is not supported.
    """
    folder = _codec_folder(config, download)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"codec {folder}: expected a folder in the diffusers format, found a config.json that is missing or "
            f"damaged ({type(error).__name__}: {error})"
        ) from error
    if kind not in _DEFAULT_SCALING:
        raise ConfigError(f"codec {folder}: expected a {' or a '.join(_DEFAULT_SCALING)}, found {kind!r}")
    if settings.get("latents_mean") is not None or settings.get("latents_std") is not None:
        raise ConfigError(
            f"codec {folder}: expected one scaling factor for all channels, found latents_mean or latents_std, which "
            "this version does not apply"
        )
    _refuse_pickles(folder, kind)
    scaling = config.scaling_factor or settings.get("scaling_factor") or _DEFAULT_SCALING[kind]
    return CodecFiles(folder, settings, float(scaling))


def check_codec_fits(files: CodecFiles, config: CodecConfig, unet: UNetConfig) -> None:
    """Refuse a codec whose latents are not what the network takes.

    Raises:
        ConfigError: Channels or size differ; the message shows both.
    """
    image_size = unet.sample_size * config.factor
    latent = (files.latent_channels, image_size / files.factor)
    if latent != (unet.in_channels, unet.sample_size):
        raise ConfigError(
            f"codec {files.folder}: the latent of an image of {image_size}x{image_size} pixels has {latent[0]} "
            f"channels and {latent[1]:g}x{latent[1]:g} pixels (factor {files.factor}); the UNet takes "
            f"{unet.in_channels} channels and {unet.sample_size}x{unet.sample_size} (codec.factor {config.factor}). "
            "Choose another --codec, or set unet and codec.factor in a --preset file"
        )
    if files.image_channels != config.image_channels:
        raise ConfigError(
            f"codec {files.folder}: it is for images of {files.image_channels} channels; the preset says "
            f"codec.image_channels {config.image_channels}"
        )


class Codec:
    """A frozen autoencoder; without gradients, in float32, in batches that bound its memory.

    Args:
        model: The autoencoder.
        files: What it was loaded from.
        batch_size: Images per pass.
    """

    def __init__(self, model: VQModel | AutoencoderKL, files: CodecFiles, batch_size: int) -> None:
        self.model = model
        self.files = files
        self._encoding = _codec_batch(batch_size, "encoding images")
        self._decoding = _codec_batch(batch_size, "decoding latents")

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled latents of images, on the CPU.

        Args:
            images: `(n, channels, height, width)` in [-1, 1].

        Returns:
            `(n, stored_channels, height / factor, width / factor)`: of a VQ codec the latents before
            quantisation, of a KL codec the means and then the log-variances of the posterior.
        """

        def encoded(rows: range) -> torch.Tensor:
            return self._encode(images[rows.start : rows.stop].to(self.model.device)).cpu()

        return torch.cat(self._encoding.map(len(images), encoded))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, height, width)`, about in [-1, 1], of scaled latents, on their device."""
        scale, shift = self.files.scaling_factor, self.files.shift
        model: Any = self.model  # diffusers annotates latents as a type that tensors do not have
        unscaled = latents / scale + shift

        def decoded(rows: range) -> torch.Tensor:
            return model.decode(unscaled[rows.start : rows.stop].to(model.device), return_dict=False)[0]

        return torch.cat(self._decoding.map(len(latents), decoded)).to(latents.device)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        scale, shift = self.files.scaling_factor, self.files.shift
        encoded: Any = self.model.encode(images, return_dict=False)[0]
        if not self.files.has_posterior:
            return (encoded - shift) * scale
        return torch.cat([(encoded.mean - shift) * scale, encoded.logvar + 2 * math.log(scale)], dim=1)


def _codec_batch(batch_size: int, what: str) -> FittingBatch:
    return FittingBatch(batch_size, what, setting="Use a device with more memory")


def load_codec(files: CodecFiles, *, batch_size: int = 8, device: torch.device | str = "cpu") -> Codec:
    """Load the weights of a codec.

    Raises:
        CheckpointError: They are damaged, or not those of the architecture in `config.json`.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from safetensors import SafetensorError

    codec_class = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[files.kind]
    try:
        # Not load_state_dict: from_pretrained knows the older names of attention layers.
        model, report = codec_class.from_pretrained(
            files.folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"codec {files.folder}: its weights cannot be read: {error}") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"codec {files.folder}: {len(wrong)} tensors of its weights are not those of its config.json, "
            f"e.g. {wrong[0]}"
        )
    model.requires_grad_(False).eval()
    torch.nn.Module.to(model, device)
    return Codec(model, files, batch_size)


def _codec_folder(config: CodecConfig, download: bool) -> Path:
    """The folder with the codec's `config.json`."""
    local = Path(config.path).expanduser()
    root = local if local.exists() else _from_hub(config, download)
    subfolders = ("vqvae", "vae", ".") if config.subfolder is None else (config.subfolder,)
    for name in subfolders:
        if (root / name / "config.json").is_file():
            return root / name
    found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "a file"
    raise CheckpointError(
        f"codec {config.path}: expected a config.json of the diffusers format in {' or '.join(subfolders)}, found "
        f"{found}; give the folder of a VQModel or AutoencoderKL by --codec PATH"
    )


def _from_hub(config: CodecConfig, download: bool) -> Path:
    """The folder of a hub id: the copy in the hub's cache, or else downloaded, without pickles."""
    hub_id = parse_hub_id(config.path)
    if hub_id is None:
        raise CheckpointError(
            f"codec {config.path}: expected a folder in the diffusers format, found nothing there; give one by "
            "--codec PATH"
        )
    name, revision = hub_id
    patterns = ["config.json", "*/config.json", WEIGHTS_NAME, f"*/{WEIGHTS_NAME}"]
    if config.subfolder is not None:
        patterns = [f"{config.subfolder}/config.json", f"{config.subfolder}/{WEIGHTS_NAME}"]
    try:
        return download_snapshot(name, revision or config.revision, patterns, local_files_only=not download)
    except NotOnTheHub as error:
        raise CheckpointError(
            f"codec {config.path}: there is no such folder here, and the hub could not be asked for it "
            f"({error}). Copy it from a machine with network, and give the folder by --codec PATH"
        ) from error


def _refuse_pickles(folder: Path, kind: str) -> None:
    """Only safetensors are loaded; say how to come by them."""
    if (folder / WEIGHTS_NAME).is_file():
        return
    if pickle := find_pickle(folder):
        raise CheckpointError(
            f"codec {folder}: {pickle} is a pickle, which can run code when it is loaded; expected {WEIGHTS_NAME}. "
            f'If you trust it, convert it once: python -c "from diffusers import {kind}; {kind}.from_pretrained('
            f"'{folder}', use_safetensors=False).save_pretrained('NEW_FOLDER')\", and give --codec NEW_FOLDER"
        )
    raise CheckpointError(
        f"codec {folder}: expected {WEIGHTS_NAME} beside config.json, found none; give another --codec PATH"
    )
