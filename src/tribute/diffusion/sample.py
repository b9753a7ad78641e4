"""Images from a model, one noise per image, the same for every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tribute import pulse
from tribute.config import NoiseScheduleConfig, RuntimeConfig, SampleConfig
from tribute.diffusion.loss import predict
from tribute.diffusion.preflight import check_precision
from tribute.errors import ConfigError
from tribute.memory import FittingBatch
from tribute.models.build import build_ddim_scheduler, check_classes
from tribute.models.runtime import prepare_network
from tribute.seeding import torch_stream
from tribute.types import Images

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

_GOLDEN = (5**0.5 - 1) / 2

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MIN_BATCH = 16
"""Smaller batches are padded: matrix products of 1 to 15 rows round differently from longer ones (MKL, measured)."""


def sampling_batch(batch_size: int) -> FittingBatch:
    """How many images are generated at once: as many as asked for while they fit into memory."""
    return FittingBatch(
        batch_size,
        "generating images",
        setting="Use a device with more memory, or a smaller network",
        exact_from=MIN_BATCH,
    )


def initial_noise(noise_seed: int, image_idx: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Initial noise `(len(image_idx), *shape)`; image i always gets the same."""
    return torch.stack(
        [torch.randn(shape, generator=torch_stream(noise_seed, "initial noise", int(i))) for i in image_idx]
    )


def build_sampler(config: SampleConfig, noise_schedule: NoiseScheduleConfig) -> Any:
    """A deterministic diffusers sampler: DDIM (Song et al. 2021) or DPM-Solver++ 2M (Lu et al. 2022)."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    check_inference_steps(config, noise_schedule)
    if config.sampler == "ddim":
        return build_ddim_scheduler(noise_schedule)
    schedule = noise_schedule.replace(timestep_spacing=noise_schedule.timestep_spacing or "trailing")
    of_ddim_alone = {"clip_sample", "clip_sample_range", "set_alpha_to_one"}
    return DPMSolverMultistepScheduler(
        **schedule.model_dump(exclude=of_ddim_alone), algorithm_type="dpmsolver++", solver_order=2
    )


@torch.inference_mode()
def sample_images(
    model: UNet2DModel,
    config: SampleConfig,
    noise_schedule: NoiseScheduleConfig,
    *,
    image_idx: Sequence[int] | None = None,
    label_counts: npt.NDArray[np.int64] | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_batch: Callable[[int], None] | None = None,
    runtime: RuntimeConfig | None = None,
    batch: FittingBatch | None = None,
) -> Images:
    """Generate images from a model.

    Image i depends on the model, the sampler and the stream `(noise_seed, i)` only, so every
    model sees the same noise and the batch size does not matter: not at all on one CPU thread; with
    several, or on a GPU, float32 rounding may move a pixel by one grey level here and there.

    Args:
        model: In evaluation mode while sampling; its mode is restored.
        config: Sampler, steps, number of images; `use_ema` is the caller's business.
        noise_schedule: The forward process that the model was trained with.
        image_idx: Which images; None for the first `config.n_samples`.
        label_counts: `(n_labels,)`, for a class-conditional model: how often each label is asked for, in proportion.
        decode: From latents `(n, *latent_shape)` to images `(n, channels, height, width)` in [-1, 1]; None for a
            model of pixels.
        on_batch: Called with the number of images done, after each batch.
        runtime: How the model computes.
        batch: How many images at once, remembered from one call to the next; None begins with `config.batch_size`.
            Where they do not fit into memory, half as many are tried, down to 1.

    Returns:
        `(n_images, height, width, channels)` uint8.

    Raises:
        ConfigError: The device does not have the precision asked for.
        OutOfMemory: Not even one image fits.
    """
    runtime = runtime or RuntimeConfig()
    image_idx = range(config.n_samples) if image_idx is None else image_idx
    check_guidance(model.config.get("num_class_embeds"), label_counts, config.guidance_scale)
    device = next(model.parameters()).device
    unet_config = model.config
    shape = (unet_config["in_channels"], unet_config["sample_size"], unet_config["sample_size"])
    check_precision(config.mixed_precision, device.type)
    prepare_network(model, runtime)
    fitting = batch or sampling_batch(config.batch_size)
    autocast = torch.autocast(device.type, _DTYPES[config.mixed_precision], enabled=config.mixed_precision != "no")

    def generate(positions: range) -> Images:
        idx = image_idx[positions.start : positions.stop]
        # A compiled network is compiled for one batch size, so a last batch that is smaller is filled up.
        min_batch = max(MIN_BATCH, min(fitting.size, len(image_idx)) if runtime.compile else 0)
        if fitting.was_halved:
            min_batch = min(min_batch, fitting.size)  # what does not fit must not be filled up to its old size
        sampler = build_sampler(config, noise_schedule)
        sampler.set_timesteps(config.num_inference_steps)
        padded_idx = [*idx, *[idx[0]] * (min_batch - len(idx))]
        images = initial_noise(config.noise_seed, padded_idx, shape).to(device)
        labels = None
        if label_counts is not None and unet_config.get("num_class_embeds"):
            labels = torch.from_numpy(draw_labels(label_counts, padded_idx)).to(device)
        for timestep in sampler.timesteps:
            pulse.beat()
            with autocast:
                prediction = guided_prediction(model, images, timestep, labels, config.guidance_scale)
            images = sampler.step(prediction.float(), timestep, images, return_dict=False)[0]
        generated = to_uint8((decode or _identity)(images)[: len(idx)])
        if on_batch is not None:
            on_batch(positions.stop)
        return generated

    was_training = model.training
    model.eval()
    try:
        return np.concatenate(fitting.map(len(image_idx), generate))
    finally:
        model.train(was_training)


def check_inference_steps(config: SampleConfig, noise_schedule: NoiseScheduleConfig) -> None:
    """Refuse more denoising steps than there are noise levels.

    Raises:
        ConfigError: There are more.
    """
    if config.num_inference_steps > noise_schedule.num_train_timesteps:
        raise ConfigError(
            f"num_inference_steps: expected at most the {noise_schedule.num_train_timesteps} noise levels "
            f"of training, found {config.num_inference_steps}"
        )


def check_guidance(
    num_class_embeds: int | None, label_counts: npt.NDArray[np.int64] | None, guidance_scale: float
) -> None:
    """Refuse to ask a network for what it cannot do: labels, or guidance by them.

    Raises:
        ConfigError: A class-conditional network without labels, with too few classes for them, or guided without a
            class for no label; or an unconditional one that is to be guided.
    """
    if not num_class_embeds:
        if guidance_scale != 1.0:
            raise ConfigError(
                f"guidance_scale: guidance needs a class-conditional network; found an unconditional one and "
                f"{guidance_scale}. Leave guidance_scale at 1"
            )
        return
    if label_counts is None:
        raise ConfigError("a class-conditional network needs label_counts to sample from; found none")
    check_classes(num_class_embeds, len(label_counts), guided=guidance_scale != 1.0, setting="guidance_scale")


def draw_labels(label_counts: npt.NDArray[np.int64], image_idx: Sequence[int]) -> npt.NDArray[np.int64]:
    """Labels `(len(image_idx),)` of generated images, in the proportions of `label_counts` `(n_labels,)`.

    Image i takes the quantile `frac(1/2 + i * golden ratio)` of the labels: the same for every coalition, so that
    labels differ between coalitions only where their proportions do, and evenly spread over any run of images.
    """
    quantiles = (0.5 + np.asarray(image_idx, dtype=np.float64) * _GOLDEN) % 1.0
    bounds = np.cumsum(label_counts) / np.sum(label_counts)
    return np.searchsorted(bounds, quantiles, side="right").clip(max=np.flatnonzero(label_counts)[-1]).astype(np.int64)


def guided_prediction(
    model: UNet2DModel,
    images: torch.Tensor,
    timestep: torch.Tensor,
    labels: torch.Tensor | None,
    guidance_scale: float,
) -> torch.Tensor:
    """Prediction at one noise level, by classifier-free guidance where there are labels and the scale is not 1.

    References:
        Ho and Salimans (2022), eq. 6, with their w = guidance_scale - 1.
    """
    if labels is None or guidance_scale == 1.0:
        return predict(model, images, timestep, labels)
    unlabelled = torch.full_like(labels, model.config["num_class_embeds"] - 1)
    both = predict(model, torch.cat([images, images]), timestep, torch.cat([labels, unlabelled]))
    with_label, without_label = both.chunk(2)
    return without_label + guidance_scale * (with_label - without_label)


def _identity(images: torch.Tensor) -> torch.Tensor:
    return images


def to_uint8(images: torch.Tensor) -> Images:
    """`(n, c, h, w)` in [-1, 1] to `(n, h, w, c)` uint8; values outside are clipped."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())


def from_uint8(images: Images, device: torch.device | str = "cpu") -> torch.Tensor:
    """`(n, h, w, c)` uint8 to `(n, c, h, w)` float32 in [-1, 1]; the inverse of `to_uint8`."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
