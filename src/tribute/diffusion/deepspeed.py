"""Training through DeepSpeed, where `accelerate launch` was told to use it.

DeepSpeed divides optimizer state (ZeRO stage 1) and gradients (stage 2) among the processes. It takes over part of the
loop: its engine clips gradients and steps inside `accelerator.backward`, and turns the weights into half precision
where the precision is mixed. Stages 1 and 2 leave whole weights on every process, which is what the moving average and
checkpoints need. The optimizer's state can only be saved as pickles, which this library neither writes nor reads, so
checkpoints of unfinished runs cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tribute.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed does the steps."""
    return accelerator.state.deepspeed_plugin is not None


def prepare_engine(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[torch.nn.Module, Any]:
    """DeepSpeed's engine around a model, and its optimizer; batch and clipping are those of the settings."""
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None  # for the type checker: `uses_deepspeed`
    plugin.deepspeed_config |= {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // accelerator.num_processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
    }
    return accelerator.prepare(model, optimizer)


def in_full_precision(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as checkpoints hold them: float32, whatever the engine computes in."""
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
