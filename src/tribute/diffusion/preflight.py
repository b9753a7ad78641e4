"""What a training run asks of this process and this machine, checked before any work.

Nothing is loaded or built here: a run that cannot be is refused before data are read, and on every process alike.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tribute.config import RuntimeConfig, TrainConfig
from tribute.errors import ConfigError
from tribute.models.runtime import check_runtime


@dataclass(frozen=True)
class Launch:
    """How this process was started, read from the environment that `accelerate launch` and `torchrun` set.

    Attributes:
        n_processes: Processes that train together.
        mixed_precision: What the launcher's configuration asks for; `no` where it says nothing, since Accelerate
            writes that for both.
        zero_stage: Of DeepSpeed; None without DeepSpeed.
        is_main: Whether this is the process that writes.
    """

    n_processes: int = 1
    mixed_precision: str = "no"
    zero_stage: int | None = None
    is_main: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables of the launcher."""
        uses_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        return cls(
            n_processes=int(environment.get("WORLD_SIZE", "1")),
            mixed_precision=environment.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
            zero_stage=int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if uses_deepspeed else None,
            is_main=environment.get("RANK", "0") == "0",
        )


def check_training(
    config: TrainConfig,
    *,
    device: str | None = None,
    runtime: RuntimeConfig | None = None,
    launch: Launch | None = None,
) -> None:
    """Refuse a training run that this process cannot do as it was asked for.

    Args:
        config: Of the run.
        device: As asked for; None for a GPU if there is one.
        runtime: How the network computes.
        launch: How the process was started; None reads the environment.

    Raises:
        ConfigError: A batch that does not divide by the processes, a precision that the device does not have or that
            contradicts the launcher's, a missing package or compiler, or what DeepSpeed cannot do here.
    """
    launch = launch or Launch.from_environment()
    check_batch_size(config.batch_size, launch.n_processes)
    if launch.mixed_precision not in ("no", config.mixed_precision):
        raise ConfigError(
            f"mixed_precision: the configuration of accelerate launch asks for {launch.mixed_precision!r}, the "
            f"training settings for {config.mixed_precision!r}. Give --mixed_precision {launch.mixed_precision}, or "
            "remove mixed_precision from that configuration, so that the settings decide"
        )
    check_precision(config.mixed_precision, device)
    check_optimizer(config)
    if launch.zero_stage is not None:
        _check_deepspeed(config, launch.zero_stage)
    check_runtime(runtime or RuntimeConfig(), _device_type(device))


def check_batch_size(batch_size: int, n_processes: int) -> None:
    """Refuse a batch that the processes cannot share evenly."""
    if batch_size % n_processes:
        raise ConfigError(
            f"batch_size: expected a multiple of the {n_processes} processes, found {batch_size}; it is the batch of "
            f"all processes together. Use e.g. {-(-batch_size // n_processes) * n_processes}"
        )


def check_precision(mixed_precision: str, device: str | None) -> None:
    """Refuse a precision that the device does not have."""
    device_type = _device_type(device)
    if mixed_precision == "fp16" and device_type == "cpu":
        raise ConfigError("mixed_precision: fp16 needs a GPU, found none or --device cpu; use bf16 or no")
    if mixed_precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("mixed_precision: this GPU has no bf16; use fp16 or no")


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer whose package is not installed."""
    if config.optimizer.is_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer.name: {config.optimizer.name} (--use_8bit_optimizer) needs the package bitsandbytes, which is "
            "not installed; install it by: pip install 'tribute[8bit]', or leave --use_8bit_optimizer out"
        )


def _check_deepspeed(config: TrainConfig, zero_stage: int) -> None:
    """Refuse what DeepSpeed cannot do, or not here."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "accelerate launch asks for DeepSpeed, which is not installed (it needs the CUDA toolkit): install it by: "
            "pip install deepspeed, or launch without it: accelerate launch --config_file "
            "accelerate_config_2_processes.yaml"
        )
    if zero_stage > 2:
        raise ConfigError(
            f"deepspeed_config.zero_stage: expected at most 2, found {zero_stage}; stage 3 divides the weights among "
            "the processes, and checkpoints and the moving average need them whole"
        )
    if config.gradient_accumulation_steps > 1:
        raise ConfigError(
            f"gradient_accumulation_steps: expected 1 with DeepSpeed, found {config.gradient_accumulation_steps}; use "
            "more processes or a smaller batch, or launch without DeepSpeed"
        )


def _device_type(device: str | None) -> str:
    """`cpu` or `cuda`: the device asked for, or the one that there is."""
    if device is not None:
        return device.split(":")[0]
    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return "cuda" if torch.cuda.is_available() and not forced else "cpu"
