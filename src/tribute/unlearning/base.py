"""How a model for a coalition is obtained: one protocol, one file per method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tribute.errors import ConfigError, NotImplementedYet
from tribute.types import CoalitionMask

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

METHODS = ("gd", "retrain")
"""Methods that this version provides."""

PLANNED_METHODS = ("ga", "lora", "iu")
"""Published methods that a later version provides."""


@dataclass(frozen=True)
class CoalitionModel:
    """A model for a coalition, ready to sample from.

    Attributes:
        model: On its device, in evaluation mode. A warm method reuses it for the next coalition.
        n_steps: Optimizer updates done to obtain it.
        seconds_train: Wall-clock seconds that they took.
    """

    model: UNet2DModel
    n_steps: int
    seconds_train: float


class UnlearningMethod(Protocol):
    """Turns a coalition of contributors into a model."""

    @property
    def name(self) -> str:
        """The published name, e.g. `gd`."""
        ...

    def obtain(self, coalition_mask: CoalitionMask, *, opt_seed: int) -> CoalitionModel:
        """The model of a coalition.

        Args:
            coalition_mask: `(n_contributors,)`. The empty coalition yields the untrained network.
            opt_seed: Root seed of initial weights, data order and training noise.
        """
        ...


def check_method(name: str) -> str:
    """`name` if this version provides it.

    Raises:
        NotImplementedYet: A published method that is still to come.
        ConfigError: Not a method at all.
    """
    if name in METHODS:
        return name
    if name in PLANNED_METHODS:
        raise NotImplementedYet(
            f"--method {name} is part of the published commands but not of this version; "
            f"use one of {', '.join(METHODS)}"
        )
    raise ConfigError(f"--method: expected one of {', '.join(METHODS + PLANNED_METHODS)}; found {name!r}")
