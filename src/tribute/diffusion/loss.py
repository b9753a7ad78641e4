"""The denoising loss and the draws that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def draw_timesteps(
    n_examples: int, n_timesteps: int, generator: torch.Generator, *, antithetic: bool = True
) -> torch.Tensor:
    """Noise levels of a batch, `(n_examples,)` int64 in [0, n_timesteps).

    Antithetic draws come in pairs t, T - 1 - t, which lowers the variance of the loss.
    """
    if not antithetic:
        return torch.randint(0, n_timesteps, (n_examples,), generator=generator)
    half = torch.randint(0, n_timesteps, ((n_examples + 1) // 2,), generator=generator)
    return torch.cat([half, n_timesteps - 1 - half])[:n_examples]


def denoising_loss(
    model: torch.nn.Module,
    noise_schedule: DDPMScheduler,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the model's prediction, a scalar.

    Args:
        model: Predicts what `noise_schedule.config.prediction_type` says.
        noise_schedule: The forward process.
        clean: `(n, channels, height, width)` in [-1, 1].
        noise: Standard normal, the shape of `clean`.
        timesteps: `(n,)` int64.
        labels: `(n,)` int64, for a class-conditional model; None for others.

    References:
        Ho et al. (2020), eq. 14; v-prediction: Salimans and Ho (2022).
    """
    noisy = noise_schedule.add_noise(clean, noise, timesteps)  # pyright: ignore[reportArgumentType]
    target = prediction_target(noise_schedule, clean, noise, timesteps)
    return F.mse_loss(predict(model, noisy, timesteps, labels).float(), target)


def predict(
    model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Prediction of a network, conditional or not, in the shape of `noisy`."""
    condition = {} if labels is None else {"class_labels": labels}
    return model(noisy, timesteps, return_dict=False, **condition)[0]


def prediction_target(
    noise_schedule: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model should predict: the noise, the velocity or the clean image."""
    prediction_type = noise_schedule.config["prediction_type"]
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_schedule.get_velocity(clean, noise, timesteps)  # pyright: ignore[reportArgumentType]
    return clean
