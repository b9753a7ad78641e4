from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tribute.config import NoiseScheduleConfig, OptimizerConfig, TrainConfig, UNetConfig
from tribute.diffusion import train as train_module
from tribute.diffusion.train import CheckpointPolicy, Progress, Trainer
from tribute.errors import ConfigError
from tribute.models.build import build_unet
from tribute.models.checkpoint import load_checkpoint
from tribute.types import Images

N_PROCESSES = 2


def train_in_parallel(
    rank: int,
    folder: Path,
    images: Images,
    noise_schedule: NoiseScheduleConfig,
    unet: UNetConfig,
    rows: npt.NDArray[np.int64],
    config: TrainConfig,
) -> dict[str, Any]:
    """One of two processes that train together: twice the same run, then another with the same model."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(N_PROCESSES),
        "LOCAL_WORLD_SIZE": str(N_PROCESSES),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=N_PROCESSES,
        timeout=timedelta(seconds=60),  # for the survivor, should the other fail
    )
    trainer = Trainer(images, noise_schedule, device="cpu")
    with pytest.raises(ConfigError, match="batch_size: expected a multiple of the 2 processes, found 5"):
        trainer.train(build_unet(unet), rows, config.replace(batch_size=5))
    model = build_unet(unet)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    policy = CheckpointPolicy(folder / "models", {"unet": unet.model_dump(mode="json")}, ckpt_freq=2)
    reports: list[Progress] = []
    saved: list[int] = []
    save = train_module._save
    train_module._save = lambda *args, **kwargs: (saved.append(args[4]), save(*args, **kwargs))
    trainer.train(model, rows, config, checkpoints=policy, on_log=reports.append, log_freq=1)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    again = trainer.train(model, rows, config)
    longer = trainer.train(model, rows, config.replace(n_steps=config.n_steps + 1), checkpoints=policy)
    return {
        "n_processes": trainer.accelerator.num_processes,
        "losses": [report.loss for report in reports],
        "saved": saved,
        "first": {name: value.numpy() for name, value in first.items()},
        "again": {name: value.numpy() for name, value in again.ema.items()},
        "longer": {name: value.detach().numpy() for name, value in longer.ema.items()},
    }


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    # A large eps: rounding must not decide the sign of a step where a gradient is nearly zero.
    optimizer = OptimizerConfig(lr=3e-3, eps=1e-4)
    return TrainConfig(
        n_steps=3, batch_size=8, gradient_accumulation_steps=2, optimizer=optimizer, random_flip=True, ema_max_decay=0.5
    )


def test_two_processes_train_the_model_of_one(
    tmp_path: Path,
    digit_images: Images,
    noise_schedule: NoiseScheduleConfig,
    unet_config: UNetConfig,
    rows: npt.NDArray[np.int64],
    config: TrainConfig,
    trainer: Trainer,
    process_server: ForkServerContext,
) -> None:
    arguments = (tmp_path, digit_images[:32], noise_schedule, unet_config, rows, config)
    with ProcessPoolExecutor(N_PROCESSES, mp_context=process_server) as pool:
        futures = [pool.submit(train_in_parallel, rank, *arguments) for rank in range(N_PROCESSES)]
        results = [future.result(timeout=120) for future in futures]

    alone = build_unet(unet_config)
    losses: list[float] = []
    average = trainer.train(alone, rows, config, on_log=lambda at: losses.append(at.loss), log_freq=1).ema
    longer = trainer.train(build_unet(unet_config), rows, config.replace(n_steps=4)).ema
    for result in results:
        assert result["n_processes"] == N_PROCESSES
        for name, value in alone.state_dict().items():
            np.testing.assert_allclose(result["first"][name], value.numpy(), atol=1e-5)
            np.testing.assert_allclose(result["again"][name], average[name].numpy(), atol=1e-5)
            np.testing.assert_allclose(result["longer"][name], longer[name].numpy(), atol=1e-5)
            np.testing.assert_array_equal(results[0]["first"][name], result["first"][name])
    np.testing.assert_allclose(results[0]["losses"], losses, rtol=1e-5)
    assert len(losses) == 3 and results[1]["losses"] == []
    assert [result["saved"] for result in results] == [[2, 3, 4], []]  # by the main process only
    found = load_checkpoint(tmp_path / "models")
    assert found.n_steps == 4
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["ckpt_steps_00000004"]
    np.testing.assert_array_equal(found.ema["conv_in.weight"].numpy(), results[0]["longer"]["conv_in.weight"])
