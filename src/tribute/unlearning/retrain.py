"""Retraining from scratch on the coalition's examples: the truth that the other methods approximate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tribute.config import TrainConfig, UNetConfig
from tribute.data.contributors import ContributorTable
from tribute.diffusion.train import Trainer
from tribute.models.build import build_unet
from tribute.types import CoalitionMask
from tribute.unlearning.base import CoalitionModel

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel


class Retraining:
    """Trains a network from new random weights for each coalition.

    They are put into one network, so that what was compiled for it serves every coalition.

    Args:
        trainer: Holds the training images.
        contributors: Who owns which image.
        unet: Architecture of the full model.
        config: Steps, batch and optimizer; its `opt_seed` is replaced for each coalition.
        use_ema: Return the moving average of the weights.
    """

    name = "retrain"

    def __init__(
        self,
        trainer: Trainer,
        contributors: ContributorTable,
        unet: UNetConfig,
        config: TrainConfig,
        *,
        use_ema: bool = True,
    ) -> None:
        self.trainer = trainer
        self.contributors = contributors
        self.unet = unet
        self.config = config
        self.use_ema = use_ema
        self._model: UNet2DModel | None = None

    def obtain(self, coalition_mask: CoalitionMask, *, opt_seed: int) -> CoalitionModel:
        """A model trained from random weights for `config.n_steps` updates."""
        model = self._untrained(opt_seed)
        if not coalition_mask.any():
            return CoalitionModel(model.eval(), 0, 0.0)
        result = self.trainer.train(
            model, self.contributors.examples_of(coalition_mask), self.config.replace(opt_seed=opt_seed)
        )
        if self.use_ema:
            model.load_state_dict(result.ema)
        return CoalitionModel(model.eval(), result.n_steps, result.seconds)

    def _untrained(self, opt_seed: int) -> UNet2DModel:
        """The network with the random weights of a seed."""
        fresh = build_unet(self.unet, opt_seed=opt_seed, device=self.trainer.device)
        if self._model is None:
            self._model = fresh
        else:
            self._model.load_state_dict(fresh.state_dict())
        return self._model
