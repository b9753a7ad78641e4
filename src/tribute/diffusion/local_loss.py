"""Denoising losses of single images, on noise that is the same for every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tribute import pulse
from tribute.diffusion.loss import predict
from tribute.errors import ConfigError
from tribute.memory import FittingBatch
from tribute.seeding import torch_stream

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


@dataclass(frozen=True)
class ImageLosses:
    """What a model loses on each of some images.

    Attributes:
        simple: `(n_images,)`; squared error of the predicted noise, the mean over dimensions and draws.
        elbo: `(n_images,)`; the part of the variational bound that depends on the model, in nats per dimension.
    """

    simple: npt.NDArray[np.float64]
    elbo: npt.NDArray[np.float64]


@torch.inference_mode()
def image_losses(
    model: torch.nn.Module,
    noise_schedule: DDPMScheduler,
    clean: torch.Tensor,
    *,
    n_noises: int,
    noise_seed: int,
    labels: torch.Tensor | None = None,
    batch_size: int = 128,
    fill_up: bool = False,
    batch: FittingBatch | None = None,
) -> ImageLosses:
    """Denoising losses of images, estimated at `n_noises` noise levels each.

    Draw j of image i comes from the stream `(noise_seed, i, j)`, whatever the model, the batch size and the other
    images. The noise levels of an image are stratified: draw j is uniform in the j-th of `n_noises` equal parts of all
    levels, so their mean estimates the mean over all levels, with less noise than independent draws.

    The simple loss is that of Ho et al. (2020), eq. 14, on the noise whatever the network predicts: its prediction is
    converted first. The other one weighs each level by `elbo_weights` and sums over levels: eq. 12 there.

    Args:
        model: Predicts what `noise_schedule.config.prediction_type` says; in evaluation mode here, its mode is
            restored.
        noise_schedule: The forward process.
        clean: `(n_images, channels, height, width)` in [-1, 1], or latents.
        n_noises: Draws for each image.
        noise_seed: Root seed of the draws.
        labels: `(n_images,)` int64, for a class-conditional model.
        batch_size: Draws per forward pass.
        fill_up: Fill up a last batch that is smaller, for a network that is compiled for one batch size.
        batch: As `batch_size`, remembered from one call to the next: halved where the draws do not fit into memory.

    Raises:
        ConfigError: There are no draws.
        OutOfMemory: Not even one draw fits into memory.
    """
    if n_noises < 1:
        raise ConfigError(f"n_noises: expected at least 1 draw of noise for each image, found {n_noises}")
    n_levels = int(noise_schedule.config["num_train_timesteps"])
    device = next(model.parameters()).device
    weights = elbo_weights(noise_schedule).to(device)
    n_images = len(clean)
    image_idx = np.repeat(np.arange(n_images), n_noises)
    draw_idx = np.tile(np.arange(n_noises), n_images)
    fitting = batch or losses_batch(batch_size)

    def losses_of(items: range) -> tuple[torch.Tensor, torch.Tensor]:
        pulse.beat()
        rows, draws = image_idx[items.start : items.stop], draw_idx[items.start : items.stop]
        n_rows = len(rows)
        if fill_up:
            n_missing = min(fitting.size, len(image_idx)) - n_rows
            rows, draws = (np.pad(idx, (0, n_missing), mode="edge") for idx in (rows, draws))
        timesteps, noise = image_draws(rows, draws, n_noises, n_levels, noise_seed, clean)
        timesteps, noise = timesteps.to(device), noise.to(device)
        images = clean[torch.from_numpy(rows)].to(device)
        noisy = noise_schedule.add_noise(images, noise, timesteps)  # pyright: ignore[reportArgumentType]
        row_labels = None if labels is None else labels[torch.from_numpy(rows)].to(device)
        prediction = predict(model, noisy, timesteps, row_labels).float()
        predicted_noise = noise_of_prediction(noise_schedule, prediction, noisy, timesteps)
        error = (predicted_noise - noise).double().square().flatten(1).mean(1)
        return error[:n_rows].cpu(), (weights[timesteps] * error)[:n_rows].cpu()

    was_training = model.training
    model.eval()
    try:
        parts = fitting.map(len(image_idx), losses_of)
    finally:
        model.train(was_training)

    def per_image(losses: list[torch.Tensor]) -> npt.NDArray[np.float64]:
        return torch.cat(losses).reshape(n_images, n_noises).mean(1).numpy()

    return ImageLosses(
        simple=per_image([simple for simple, _ in parts]), elbo=n_levels * per_image([elbo for _, elbo in parts])
    )


def losses_batch(batch_size: int) -> FittingBatch:
    """How many draws are computed at once: as many as asked for while they fit into memory."""
    return FittingBatch(
        batch_size, "denoising losses of images", setting="Use a device with more memory, or a smaller network"
    )


def noise_of_prediction(
    noise_schedule: DDPMScheduler, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The noise that a prediction implies, in the shape of `noisy`.

    With `noisy = a clean + s noise`: the prediction itself, or `a v + s noisy` of a velocity `v = a noise - s clean`
    (Salimans and Ho 2022, appendix D), or `(noisy - a clean) / s` of a clean image.
    """
    signal, spread = _signal_and_spread(noise_schedule, timesteps)
    prediction_type = noise_schedule.config["prediction_type"]
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return signal * prediction + spread * noisy
    return (noisy - signal * prediction) / spread


def elbo_weights(noise_schedule: DDPMScheduler) -> torch.Tensor:
    """Weights `(num_train_timesteps,)` float64 of the squared error of the noise in the variational bound.

    `beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t))` with `sigma_t^2 = beta_t`, the larger of the two usual choices of
    the reverse variance: with the smaller one the first level would weigh infinitely much. The terms of the bound
    that no model can change are left out. A last level that is noise alone (variance 1) weighs infinitely much.

    References:
        Ho, Jain and Abbeel (2020), eq. 12; Kingma et al. (2021) for the bound as a weighted denoising loss.
    """
    betas = noise_schedule.betas.double()
    cumulative = torch.cumprod(1 - betas, dim=0)  # float32 loses three digits of 1 - abar at the first levels
    return betas / (2 * (1 - betas) * (1 - cumulative))


def image_draws(
    image_idx: npt.NDArray[np.int64],
    draw_idx: npt.NDArray[np.int64],
    n_noises: int,
    n_levels: int,
    noise_seed: int,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels `(n,)` and noise `(n, *like.shape[1:])` of some draws of some images."""
    timesteps, noise = [], []
    for image, draw in zip(image_idx, draw_idx, strict=True):
        stream = torch_stream(noise_seed, "local loss", image, draw)
        within = float(torch.rand((), generator=stream, dtype=torch.float64))
        timesteps.append(min(int((draw + within) / n_noises * n_levels), n_levels - 1))
        noise.append(torch.randn(like.shape[1:], generator=stream))
    return torch.tensor(timesteps, dtype=torch.long), torch.stack(noise)


def _signal_and_spread(noise_schedule: DDPMScheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the clean image and of the noise at some levels, `(n, 1, 1, 1)`."""
    cumulative = noise_schedule.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return cumulative.sqrt(), (1 - cumulative).sqrt()
