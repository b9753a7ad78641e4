"""How a network computes: compiled, with activations in another layout, or computed twice instead of kept."""

from __future__ import annotations

import shutil
import sysconfig
from typing import TYPE_CHECKING, Any

import torch

from tribute.config import RuntimeConfig
from tribute.errors import ConfigError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

_COMPILERS = ("g++", "clang++", "c++")


def prepare_network(model: UNet2DModel | torch.nn.Module, runtime: RuntimeConfig) -> None:
    """Make a network compute as `runtime` says, in place; a second call changes nothing.

    The names, shapes and memory layout of its weights stay as they are, so checkpoints, moving averages and optimizers
    know nothing of it. A network whose weights are loaded in place keeps what was compiled for it.
    """
    if runtime.gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", False):
        model.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    if runtime.channels_last and not getattr(model, "_tribute_channels_last", False):
        # Layers pass the layout of their input on. conv_in's own input may have one channel, whose layout says nothing.
        model.conv_in.register_forward_hook(_to_channels_last)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        model._tribute_channels_last = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if runtime.compile and model._compiled_call_impl is None:
        # Shapes are fixed: with symbolic ones, every first change of a batch would compile once more.
        model.compile(backend=runtime.compile_backend, dynamic=False)


def _to_channels_last(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def check_runtime(runtime: RuntimeConfig, device: str) -> None:
    """Refuse what cannot be compiled here.

    Raises:
        ConfigError: No C++ compiler, or an unknown backend.
    """
    if not runtime.compile:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if runtime.compile_backend not in known:
        raise ConfigError(
            f"runtime.compile_backend: expected one of {', '.join(known)}; found {runtime.compile_backend!r}"
        )
    if device == "cpu" and runtime.compile_backend == "inductor" and find_compiler() is None:
        raise ConfigError(
            f"--compile: needs a C++ compiler on the CPU; looked for {', '.join(_COMPILERS)} and found none. Install "
            "one (e.g. g++), name it in the environment variable CXX, or leave --compile out"
        )


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile can use on the CPU; None where there is none."""
    import os

    candidates = (os.environ.get("CXX", ""), *_COMPILERS, (sysconfig.get_config_var("CXX") or "").split(" ")[0])
    return next((found for name in candidates if name and (found := shutil.which(name))), None)
