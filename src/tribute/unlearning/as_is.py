"""A model that was trained for its coalition beforehand, measured as it is."""

from __future__ import annotations

from tribute.errors import MixedResultsError
from tribute.models.build import reset_weights
from tribute.models.checkpoint import Checkpoint, build_model
from tribute.types import CoalitionMask
from tribute.unlearning.base import CoalitionModel


class AsIs:
    """The model of a checkpoint, which must be the one of the coalition asked for.

    Args:
        checkpoint: A retrained model; `meta["coalition"]` holds its coalition as 0/1 text. One without, made by
            others, counts as trained on everyone.
        use_ema: Measure the moving average of the weights.
    """

    name = "retrain"

    def __init__(self, checkpoint: Checkpoint, *, use_ema: bool = True, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self._model = build_model(checkpoint, use_ema=use_ema, device=device)

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
        return CoalitionModel(
            self._model, self.checkpoint.n_steps, float(self.checkpoint.meta.get("seconds_train", 0.0))
        )


def mask_to_text(coalition_mask: CoalitionMask) -> str:
    """A coalition as text, one character per contributor: 1 present, 0 absent."""
    return "".join("1" if present else "0" for present in coalition_mask)
