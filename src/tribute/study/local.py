"""Local behaviors of coalition models: images compared with those of the full model, and losses on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tribute.behaviors.local import (
    LOSSES,
    PIXEL_QUANTITIES,
    SSIM_WINDOW,
    LocalBehavior,
    PerImage,
    local_behaviors,
)
from tribute.config import LocalConfig, NoiseScheduleConfig, RuntimeConfig, SampleConfig, fingerprint
from tribute.diffusion.local_loss import elbo_weights, image_losses, losses_batch
from tribute.diffusion.sample import MIN_BATCH, draw_labels, from_uint8, sample_images, sampling_batch
from tribute.errors import MixedResultsError
from tribute.models.build import build_noise_schedule
from tribute.models.checkpoint import Checkpoint, build_model
from tribute.study.compatibility import check_trained_on_everybody
from tribute.types import Images

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FullModelImages:
    """The full model's images of the first seeds.

    Attributes:
        images: `(n_images, height, width, channels)` uint8.
        clean: `(n_images, *shape)`, what a network of this kind denoises: those images in [-1, 1], or their latents.
    """

    images: Images
    clean: torch.Tensor = field(repr=False)


class FullModelComparison:
    """Local behaviors of any model, compared with one full model whose images are generated once.

    Args:
        full: The full model, trained on everybody.
        names: `local` or names of single behaviors.
        sampling: How images are generated, the same for both models; `use_ema` says which weights of `full` count.
        noise_schedule: The forward process of both models.
        config: How many images and noises.
        image_size: Height and width of the images, pixels.
        label_counts: `(n_labels,)` of everybody's data; coalition models are asked for the full model's labels.
        device: Where networks run.
        decode: From latents to images; None for models of pixels.
        runtime: How networks compute.

    Raises:
        MixedResultsError: The full model has another noise schedule, or was trained on a part of the data.
        ConfigError: An image is asked for that is not compared, or a quantity that is not defined here.
    """

    def __init__(
        self,
        full: Checkpoint,
        names: Sequence[str],
        sampling: SampleConfig,
        noise_schedule: NoiseScheduleConfig,
        config: LocalConfig,
        *,
        image_size: int,
        label_counts: npt.NDArray[np.int64],
        device: torch.device | str = "cpu",
        decode: Decode | None = None,
        runtime: RuntimeConfig | None = None,
    ) -> None:
        _check_full(full, noise_schedule)
        self.full = full
        self.names = tuple(names)
        self.behaviors = find_behaviors(names, config, noise_schedule, image_size)
        self.sampling = sampling
        self.noise_schedule = noise_schedule
        self.config = config
        self.label_counts = label_counts
        self.device = device
        self.decode = decode
        self.runtime = runtime or RuntimeConfig()
        self._images_batch = sampling_batch(max(sampling.batch_size, MIN_BATCH))
        self._losses_batch = losses_batch(sampling.batch_size)

    @cached_property
    def reference(self) -> FullModelImages:
        """The full model's images; generated on the first call, which is timed with the first evaluation."""
        model = build_model(self.full, use_ema=self.sampling.use_ema, device=self.device)
        latents: list[torch.Tensor] = []

        def keep(batch: torch.Tensor) -> torch.Tensor:
            decoded = batch if self.decode is None else self.decode(batch)
            latents.append(batch.float().cpu())  # only now: what does not fit into memory is tried in smaller batches
            return decoded

        images = self._sample(model, keep)
        clean = from_uint8(images) if self.decode is None else torch.cat(latents)[: len(images)]
        return FullModelImages(images, clean)

    def measure(self, model: UNet2DModel, images: Images) -> dict[str, float]:
        """Local behaviors of a coalition's model, by name.

        Args:
            model: Of the coalition.
            images: Its images `(n_images, height, width, channels)`, which are used where they are those to compare:
                there are enough of them, and the model knows no labels, whose proportions depend on the coalition.
        """
        quantities = {behavior.quantity for behavior in self.behaviors}
        per_image: dict[str, PerImage] = {}
        if pixel_quantities := sorted(quantities & PIXEL_QUANTITIES.keys()):
            if _knows_labels(model) or len(images) < self.config.n_samples:
                images = self._sample(model, self.decode)
            images = images[: self.config.n_samples]
            per_image |= {name: PIXEL_QUANTITIES[name](self.reference.images, images) for name in pixel_quantities}
        if quantities & set(LOSSES):
            losses = image_losses(
                model,
                build_noise_schedule(self.noise_schedule),
                self.reference.clean,
                n_noises=self.config.n_noises,
                noise_seed=self.sampling.noise_seed,
                labels=torch.from_numpy(self._labels()) if _knows_labels(model) else None,
                batch=self._losses_batch,
                fill_up=self.runtime.compile,
            )
            per_image |= {"diffusion_loss": losses.simple, "elbo_loss": losses.elbo}
        return {behavior.name: behavior.value(per_image) for behavior in self.behaviors}

    def definitions(self) -> dict[str, dict[str, Any]]:
        """Unit, direction and variant of every behavior, to be stored with its values."""
        sampler = f"{self.sampling.sampler} {self.sampling.num_inference_steps}"
        common = f"vs model {self.full.model_hash[:12]}, {sampler}, noise {self.sampling.noise_seed}"
        if self.sampling.guidance_scale != 1.0:
            common += f", guidance {self.sampling.guidance_scale:g}"
        if self.sampling.mixed_precision != "no":
            common += f", {self.sampling.mixed_precision}"
        if not self.sampling.use_ema:
            common += ", raw weights"
        return {
            behavior.name: {
                "unit": behavior.unit,
                "higher_is_better": behavior.higher_is_better,
                "variant": common
                + (f", {self.config.n_noises} noises" if behavior.quantity in LOSSES else "")
                + (f", {self.config.n_samples} images" if behavior.image_idx is None else ""),
            }
            for behavior in self.behaviors
        }

    def reported_names(self) -> list[str]:
        """Names of averages, and of single images asked for by name: not the hundreds that only `local` brings."""
        return [item.name for item in self.behaviors if item.image_idx is None or item.name in self.names]

    def settings(self) -> dict[str, Any]:
        """All that determines the values besides model and sampling, as plain JSON, for an evaluation's identity.

        The names, of which `local` brings hundreds, are told by a hash of them in order, however they were asked for.
        """
        settings = {
            "full_model": self.full.model_hash,
            "names": fingerprint(sorted(behavior.name for behavior in self.behaviors)),
            "n_samples": self.config.n_samples,
        }
        if any(behavior.quantity in LOSSES for behavior in self.behaviors):
            settings["n_noises"] = self.config.n_noises
        return settings

    def _sample(self, model: UNet2DModel, decode: Decode | None) -> Images:
        """The images to compare, of any model."""
        return sample_images(
            model,
            self.sampling,
            self.noise_schedule,
            image_idx=range(self.config.n_samples),
            label_counts=self.label_counts,
            decode=decode,
            runtime=self.runtime,
            batch=self._images_batch,
        )

    def _labels(self) -> npt.NDArray[np.int64]:
        """`(n_images,)`, as the full model's images were asked for."""
        return draw_labels(self.label_counts, range(self.config.n_samples))


def _knows_labels(model: UNet2DModel) -> bool:
    return bool(model.config.get("num_class_embeds"))


def find_behaviors(
    names: Sequence[str], config: LocalConfig, noise_schedule: NoiseScheduleConfig, image_size: int
) -> list[LocalBehavior]:
    """The local behaviors that some names mean, for models of a noise schedule and images of a size.

    `local` leaves out what is not defined for them.

    Raises:
        ConfigError: A behavior is named that is not defined for them, or an image that is not compared.
    """
    undefined: dict[str, str] = {}
    if image_size < SSIM_WINDOW:
        undefined["ssim"] = f"it compares windows of {SSIM_WINDOW}x{SSIM_WINDOW} pixels, found images of {image_size}"
    if not elbo_weights(build_noise_schedule(noise_schedule)).isfinite().all():
        undefined["elbo_loss"] = (
            "it weighs a level that is noise alone infinitely, found one (rescale_betas_zero_snr, or a variance of 1)"
        )
    return local_behaviors(names, config.n_samples, undefined=undefined)


def _check_full(full: Checkpoint, noise_schedule: NoiseScheduleConfig) -> None:
    """Refuse a full model whose images say nothing about the models that are to be compared with it."""
    check_trained_on_everybody(full, setting="--full_model")
    saved = full.meta.get("noise_schedule")
    if saved is not None and NoiseScheduleConfig.parse(saved, where=str(full.path)) != noise_schedule:
        raise MixedResultsError(
            f"--full_model: {full.path} has the noise schedule {saved}, the coalitions' models have "
            f"{noise_schedule.model_dump(mode='json')}. Compare models of one noise schedule"
        )
