"""Where the training set, its codec and the cache of its latents meet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tribute.config import Preset
from tribute.data.latents import LatentCache, LatentSource, encode_or_open, find_latents
from tribute.data.sources import default_cache_dir
from tribute.data.tensors import TrainingData
from tribute.diffusion.examples import LatentExamples
from tribute.diffusion.sample import from_uint8
from tribute.errors import CheckpointError, ConfigError, MixedResultsError
from tribute.models.codec import Codec, CodecFiles, check_codec_fits, find_codec, load_codec
from tribute.types import Images, Latents

logger = logging.getLogger(__name__)


class LatentSpace:
    """The latents of a training set; the codec itself is loaded only where something is encoded or decoded.

    Args:
        preset: With a codec, and the network that it must fit.
        data: The training set.
        reuse: Take the latents that are there, and never encode; the codec's files may then be elsewhere.
        cache_dir: Latents are kept in its folder `latents`; `default_cache_dir()` if None.
        device: Where the codec works.
        on_block: Called with images encoded and images to encode.

    Raises:
        ConfigError: The codec does not fit the network.
        CheckpointError: It is missing or cannot be read.
    """

    def __init__(
        self,
        preset: Preset,
        data: TrainingData,
        *,
        reuse: bool = False,
        cache_dir: Path | None = None,
        device: torch.device | str = "cpu",
        on_block: Callable[[int, int], None] | None = None,
    ) -> None:
        if preset.codec is None:
            raise ConfigError(f"codec: expected a preset of latent diffusion, found one of pixels ({preset.dataset})")
        self.config = preset.codec
        self.unet = preset.unet
        self.data = data
        self.reuse = reuse
        self.folder = (cache_dir or default_cache_dir()) / "latents"
        self.device = device
        self.on_block = on_block

    @cached_property
    def files(self) -> CodecFiles:
        """The codec on the disk; its weights are not read for this."""
        files = find_codec(self.config)
        check_codec_fits(files, self.config, self.unet)
        return files

    @cached_property
    def codec(self) -> Codec:
        """The codec, loaded; refused where it is not the one that the latents were made with."""
        if self.files.fingerprint != self.fingerprint:
            raise MixedResultsError(
                f"codec {self.files.folder}: the latents in {self.cache.path} were made with another codec "
                f"(fingerprint {self.fingerprint[:12]}, found {self.files.fingerprint[:12]}). Give that one by --codec"
            )
        return self._loaded

    @cached_property
    def cache(self) -> LatentCache:
        """The latents of all training images, encoded if need be."""
        if self.reuse:
            return find_latents(self.folder, self._source(self._known_codec()))
        shape = self.files.stored_shape(self.data.image_shape[0])
        source = self._source(self._describe(self.files))
        return encode_or_open(self.folder, source, self.data.images, self._encode, shape, on_block=self.on_block)

    @property
    def fingerprint(self) -> str:
        """Of the codec that the latents were made with."""
        return self.cache.source["codec"]["fingerprint"]

    def examples(self) -> LatentExamples:
        """The training set as the network sees it."""
        latents = self.cache.latents
        channels = latents.shape[1] // (2 if self._has_posterior else 1)
        if (channels, *latents.shape[2:]) != (self.unet.in_channels, self.unet.sample_size, self.unet.sample_size):
            raise ConfigError(
                f"latents in {self.cache.path}: found {channels} channels and {latents.shape[3]}x{latents.shape[2]} "
                f"pixels, the UNet takes {self.unet.in_channels} and {self.unet.sample_size}x{self.unet.sample_size}; "
                "choose another --preset"
            )
        return LatentExamples(latents, self.data.labels, len(self.data.label_names), has_posterior=self._has_posterior)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, height, width)` in about [-1, 1] of scaled latents."""
        return self.codec.decode(latents)

    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers of the codec."""
        return {**self.config.model_dump(mode="json"), "fingerprint": self.fingerprint}

    @property
    def _has_posterior(self) -> bool:
        return self.cache.source["codec"]["kind"] == "AutoencoderKL"

    def _encode(self, images: Images) -> Latents:
        if "_loaded" not in self.__dict__:
            logger.info("encoding %d images once, with %s", self.data.n_examples, self.files.folder)
        return self._loaded.encode(from_uint8(images)).numpy()

    @cached_property
    def _loaded(self) -> Codec:
        """The codec, before anybody asked whether it is the right one."""
        return load_codec(self.files, batch_size=self.config.batch_size, device=self.device)

    def _source(self, codec: dict[str, Any]) -> LatentSource:
        return LatentSource(self.data.dataset, self.data.manifest["sha256"]["images"], self.data.image_shape, codec)

    def _describe(self, files: CodecFiles) -> dict[str, Any]:
        """A codec whose files are at hand."""
        return {
            "fingerprint": files.fingerprint,
            "kind": files.kind,
            "path": self.config.path,
            "scaling_factor": files.scaling_factor,
        }

    def _known_codec(self) -> dict[str, Any]:
        """What is known of the codec without loading it: from its files where they are here, else from the settings."""
        try:
            files = find_codec(self.config, download=False)
        except CheckpointError:
            logger.info("the codec %s is not on this machine; looking for latents by its name", self.config.path)
        else:
            check_codec_fits(files, self.config, self.unet)
            return self._describe(files)
        known = {"fingerprint": None, "path": self.config.path}
        if self.config.scaling_factor is not None:
            known["scaling_factor"] = self.config.scaling_factor
        return known
