"""Weights of pretrained networks from a file, without running what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tribute.errors import BehaviorError

if TYPE_CHECKING:
    import torch


def brief(error: Exception) -> str:
    """What an error says, on one line and not for pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, from a safetensors file or from a PyTorch file (`.pt`, `.pth`, `.bin`) that holds only tensors.

    Raises:
        BehaviorError: The file is missing, damaged, or holds anything else.
    """
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise BehaviorError(f"No weights at {path}; expected a .safetensors, .pth or .pt file. Correct the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise BehaviorError(
            f"The weights {path} cannot be read without running code that they might hold "
            f"({brief(error)}). Give a .safetensors file, or one that torch.load reads with "
            "weights_only=True."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise BehaviorError(
            f"The weights {path} must be tensors by name, a state dict; found {type(weights).__name__}. "
            "Save network.state_dict() in place of the network."
        )
    return dict(weights)
