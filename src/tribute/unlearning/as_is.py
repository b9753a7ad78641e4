"""A model that was trained for its coalition beforehand, measured as it is."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from tribute.errors import MixedResultsError
from tribute.models.build import reset_weights
from tribute.models.checkpoint import Checkpoint, build_model
from tribute.types import CoalitionMask
from tribute.unlearning.base import CoalitionModel

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel


class AsIs:
    """The model of a checkpoint, which must be the one of the coalition asked for.

    Args:
        checkpoint: A retrained model; `meta["coalition"]` holds its coalition as 0/1 text. One without, made by
            others, counts as trained on everyone.
        use_ema: Measure the moving average of the weights.
        device: Where it goes, when it is first asked for.
        counts_training: The seconds of its training are seconds of the evaluation; False where they are counted
            elsewhere.
    """

    name = "retrain"

    def __init__(
        self, checkpoint: Checkpoint, *, use_ema: bool = True, device: str = "cpu", counts_training: bool = True
    ) -> None:
        self.checkpoint = checkpoint
        self.use_ema = use_ema
        self.device = device
        self.counts_training = counts_training

    @cached_property
    def _model(self) -> UNet2DModel:
        return build_model(self.checkpoint, use_ema=self.use_ema, device=self.device)

    def obtain(self, coalition_mask: CoalitionMask, *, opt_seed: int) -> CoalitionModel:
        """The checkpoint's model; the empty coalition yields the untrained network of its architecture."""
        if not coalition_mask.any():
            untrained = build_model(self.checkpoint, device=self._model.device)
            reset_weights(untrained, opt_seed)
            return CoalitionModel(untrained, 0, 0.0)
        asked = mask_to_text(coalition_mask)
        trained = self.checkpoint.meta.get("coalition", "1" * len(coalition_mask))
        if trained != asked:
            raise MixedResultsError(
                f"--load: {self.checkpoint.path} was trained on the coalition {trained}, --removal_dist and "
                f"--removal_seed ask for {asked} (1: present). Load the model that main.py trained with the same "
                "--removal_dist, --datamodel_alpha and --removal_seed"
            )
        seconds = float(self.checkpoint.meta.get("seconds_train", 0.0)) if self.counts_training else 0.0
        return CoalitionModel(self._model, self.checkpoint.n_steps, seconds)


def mask_to_text(coalition_mask: CoalitionMask) -> str:
    """A coalition as text, one character per contributor: 1 present, 0 absent."""
    return "".join("1" if present else "0" for present in coalition_mask)
