"""Folders in the format of diffusers, written by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tribute.config import UNetConfig


@pytest.fixture
def write_pipeline(tmp_path: Path, unet_config: UNetConfig) -> Callable[..., Path]:
    """Writes a pipeline of random weights; keyword arguments change its network."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    def write(scheduler: Any = None, **changes: Any) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            unet = UNet2DModel(**{**unet_config.model_dump(), **changes})
        scheduler = scheduler or DDPMScheduler(num_train_timesteps=50, beta_end=0.2)
        pipeline = DDPMPipeline(unet, scheduler)
        folder = tmp_path / "pipeline"
        pipeline.save_pretrained(folder)
        return folder

    return write
