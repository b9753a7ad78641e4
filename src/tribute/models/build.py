"""Networks and noise schedules from settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tribute.config import NoiseScheduleConfig, UNetConfig
from tribute.errors import ConfigError
from tribute.seeding import stream_seed

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def build_unet(config: UNetConfig, *, opt_seed: int = 0, device: torch.device | str = "cpu") -> UNet2DModel:
    """Build a UNet with random weights; the process's own random state is left alone.

    Args:
        config: The architecture.
        opt_seed: Root seed of the initial weights.
        device: Where the model ends; the weights are drawn on the CPU.

    Raises:
        ConfigError: diffusers refuses the architecture.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(opt_seed, "initial weights"))
        try:
            model = UNet2DModel(**config.model_dump())
        except (ValueError, TypeError) as error:
            raise ConfigError(f"unet: diffusers refuses this architecture: {error}") from error
    torch.nn.Module.to(model, device)
    return model


def build_noise_schedule(config: NoiseScheduleConfig) -> DDPMScheduler:
    """The forward process of training, as a diffusers scheduler."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(**config.model_dump(exclude={"timestep_spacing", "set_alpha_to_one"}))


def build_ddim_scheduler(config: NoiseScheduleConfig) -> DDIMScheduler:
    """The deterministic sampler of Song et al. (2021), as a diffusers scheduler."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(**config.replace(timestep_spacing=config.timestep_spacing or "leading").model_dump())


def null_label(num_class_embeds: int, n_labels: int) -> int | None:
    """The class that stands for no label: the last one, where there is one more than labels; None elsewhere."""
    return num_class_embeds - 1 if num_class_embeds > n_labels else None


def check_classes(num_class_embeds: int, n_labels: int, *, guided: bool, setting: str) -> None:
    """Refuse a class-conditional network that lacks a class for a label, or for no label where it is guided.

    Args:
        num_class_embeds: Classes of the network.
        n_labels: Labels of the data.
        guided: Whether a class for no label is needed.
        setting: The setting that asks for guidance, for the message.

    Raises:
        ConfigError: There are fewer classes than needed.
    """
    if n_labels > num_class_embeds:
        raise ConfigError(
            f"unet.num_class_embeds: expected at least the {n_labels} labels of the data, found {num_class_embeds}"
        )
    if guided and null_label(num_class_embeds, n_labels) is None:
        raise ConfigError(
            f"{setting}: guidance needs a class for no label; expected unet.num_class_embeds {n_labels + 1}, "
            f"one more than labels, found {num_class_embeds}"
        )


def count_parameters(model: torch.nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def reset_weights(model: torch.nn.Module, opt_seed: int) -> None:
    """Give a network, pruned or not, fresh random weights in place: the untrained network of its architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(opt_seed, "initial weights"))
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
