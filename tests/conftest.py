"""What all tests share: real digits, the smallest networks that have every kind of layer, and fresh processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

# One thread here and in every child, before torch reads it: sums then have one order everywhere.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from benchmarks.faults import PRELOAD
from benchmarks.postgres import PostgresServer, missing_programs
from tribute.config import NoiseScheduleConfig, UNetConfig
from tribute.types import Images


@pytest.fixture(scope="session")
def digit_images() -> Images:
    """1,797 real scans `(1797, 8, 8, 1)`."""
    from sklearn.datasets import load_digits

    flat = np.asarray(load_digits(return_X_y=True)[0])
    return np.round(flat * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)


@pytest.fixture(scope="session")
def unet_config() -> UNetConfig:
    """A UNet of 8x8 images with resamplers, skip connections and attention of several heads."""
    return UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
        downsample_padding=1,
    )


@pytest.fixture(scope="session")
def noise_schedule() -> NoiseScheduleConfig:
    """A short forward process that still ends in noise."""
    return NoiseScheduleConfig(num_train_timesteps=50, beta_end=0.2)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Lets a test train with another precision: Accelerate keeps the first one of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def process_server() -> ForkServerContext:
    """Where new processes come from: a server that has imported the heavy packages once and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@pytest.fixture(scope="session")
def in_new_process(process_server: ForkServerContext) -> Callable[..., Any]:
    """Calls a module-level function in a process of its own; `BrokenProcessPool` when that is killed."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=process_server) as pool:
            return pool.submit(function, *args).result()

    return call


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A throw-away server of Debian's package on a loopback port, shared by all tests."""
    missing = missing_programs()
    if missing is not None:
        pytest.skip(missing)
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of an empty database of this test's own."""
    name = postgres_server.new_database()
    yield postgres_server.url(name)
    postgres_server.empty_database(name)


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
