"""How a network computes: compiled, with activations in another layout, or computed twice instead of kept."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

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
        # Given explicitly: the default of diffusers looks up PyTorch's version at each call, which cannot be compiled.
        recompute = partial(checkpoint, use_reentrant=False)
        model.enable_gradient_checkpointing(recompute)  # pyright: ignore[reportCallIssue]
    if runtime.channels_last and not getattr(model, "_tribute_channels_last", False):
        # Layers pass the layout of their input on. conv_in's own input may have one channel, whose layout says nothing.
        model.conv_in.register_forward_hook(_to_channels_last)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        model._tribute_channels_last = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if runtime.compile and model._compiled_call_impl is None:
        # Shapes are fixed: with symbolic ones, every first change of a batch would compile once more.
        # Random numbers of dropout are those of the plain run.
        options = {"fallback_random": True} if runtime.compile_backend == "inductor" else None
        model.compile(backend=runtime.compile_backend, dynamic=False, options=options)


def _to_channels_last(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def check_compiled_gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor], *, tolerance: float) -> None:
    """Compare the gradients of a compiled network with its plain ones, once; a network that is not compiled passes.

    A compiler may be wrong: that of PyTorch 2.13, on the CPU, gives the networks here the right outputs and wrong
    gradients, with which a model looks as if it learned a little.

    Args:
        model: Its gradients are None afterwards.
        loss: The loss of one batch, the same at each call.
        tolerance: Largest norm of the difference, relative to that of the plain gradients.

    Raises:
        ConfigError: They differ by more.
    """
    compiled = model._compiled_call_impl
    if compiled is None or getattr(model, "_tribute_gradients_agree", False):
        return
    found = _gradients(model, loss)
    model._compiled_call_impl = None
    try:
        expected = _gradients(model, loss)
    finally:
        model._compiled_call_impl = compiled
    error = float(_norm([a - b for a, b in zip(found, expected, strict=True)]) / _norm(expected))
    if not error <= tolerance:  # NaN, too
        raise ConfigError(
            f"--compile: expected the compiled network to compute the gradients of the plain one, found them off by "
            f"{error:.0%} of their length (allowed: {tolerance:.1%}). The compiler of this version of PyTorch "
            f"({torch.__version__}) is wrong for this network and device: leave --compile out, or choose another "
            "runtime.compile_backend"
        )
    model._tribute_gradients_agree = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def _gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Of all parameters, taken away from the model."""
    loss().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


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
            f"runtime.compile_backend: expected one of {', '.join(torch.compiler.list_backends())}; "
            f"found {runtime.compile_backend!r}"
        )
    if device == "cpu" and runtime.compile_backend == "inductor" and find_compiler() is None:
        raise ConfigError(
            f"--compile: needs a C++ compiler on the CPU; looked for {', '.join(_COMPILERS)} and found none. Install "
            "one (e.g. g++), name it in the environment variable CXX, or leave --compile out"
        )


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile can use on the CPU; None where there is none."""
    candidates = (os.environ.get("CXX", ""), *_COMPILERS, (sysconfig.get_config_var("CXX") or "").split(" ")[0])
    return next((found for name in candidates if name and (found := shutil.which(name))), None)
