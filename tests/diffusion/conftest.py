"""A training run of every kind of draw: flips, dropout, accumulation, a schedule, attention."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tribute.config import NoiseScheduleConfig, OptimizerConfig, TrainConfig, UNetConfig
from tribute.diffusion.train import Trainer
from tribute.types import Images


@pytest.fixture(scope="session")
def train_config() -> TrainConfig:
    return TrainConfig(
        n_steps=8,
        batch_size=4,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(name="AdamW", lr=3e-3, weight_decay=0.01, lr_schedule="cosine", n_warmup_steps=2),
        ema_max_decay=0.9,
        random_flip=True,
        opt_seed=7,
    )


@pytest.fixture(scope="session")
def dropout_unet(unet_config: UNetConfig) -> UNetConfig:
    return unet_config.replace(dropout=0.2)


@pytest.fixture(scope="session")
def rows() -> npt.NDArray[np.int64]:
    """Few enough that 8 steps go through several epochs."""
    return np.arange(3, 30, 2)


@pytest.fixture
def trainer(digit_images: Images, noise_schedule: NoiseScheduleConfig) -> Trainer:
    return Trainer(digit_images, noise_schedule, device="cpu")
