"""Fine-tuning on the coalition's examples: on a pruned model, sparsified fine-tuning (sFT)."""

from __future__ import annotations

from tribute.config import TrainConfig
from tribute.data.contributors import ContributorTable
from tribute.diffusion.train import CheckpointPolicy, Trainer
from tribute.models.build import reset_weights
from tribute.models.checkpoint import Checkpoint, build_model
from tribute.types import CoalitionMask
from tribute.unlearning.base import CoalitionModel


class FineTuning:
    """Gradient descent on the coalition's examples, from the weights of a trained model.

    The model is built once; every coalition starts from the same weights again.

    Args:
        trainer: Holds the training images.
        contributors: Who owns which image.
        checkpoint: The sparse (or full) model to start from.
        config: Steps, batch and optimizer; its `opt_seed` is replaced for each coalition.
        use_ema: Start from, and return, the moving average of the weights.
        checkpoints: Where to save the coalition's model and resume it; None keeps it in memory.

    References:
        Lin et al. (2025), arXiv 2407.03153, section 4.
    """

    name = "gd"

    def __init__(
        self,
        trainer: Trainer,
        contributors: ContributorTable,
        checkpoint: Checkpoint,
        config: TrainConfig,
        *,
        use_ema: bool = True,
        checkpoints: CheckpointPolicy | None = None,
    ) -> None:
        self.trainer = trainer
        self.contributors = contributors
        self.config = config
        self.use_ema = use_ema
        self.checkpoints = checkpoints
        self._model = build_model(checkpoint, use_ema=use_ema, device=trainer.device)
        self._start = {name: value.clone() for name, value in self._model.state_dict().items()}

    def obtain(self, coalition_mask: CoalitionMask, *, opt_seed: int) -> CoalitionModel:
        """The start model after `config.n_steps` updates on the coalition's examples."""
        if not coalition_mask.any():
            reset_weights(self._model, opt_seed)
            return CoalitionModel(self._model.eval(), 0, 0.0)
        self._model.load_state_dict(self._start)
        result = self.trainer.train(
            self._model,
            self.contributors.examples_of(coalition_mask),
            self.config.replace(opt_seed=opt_seed),
            checkpoints=self.checkpoints,
        )
        if self.use_ema:
            self._model.load_state_dict(result.ema)
        return CoalitionModel(self._model.eval(), result.n_steps, result.seconds)
