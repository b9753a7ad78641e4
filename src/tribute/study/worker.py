"""A warm worker: what is set up once in a process and then serves every coalition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tribute.behaviors.base import Reference, behavior_variant, get_behavior, measure_behaviors
from tribute.config import DataConfig, Preset, SampleConfig, TrainConfig
from tribute.data.sources import default_cache_dir, load_training_data
from tribute.data.tensors import TrainingData
from tribute.diffusion.examples import PixelExamples
from tribute.diffusion.sample import check_guidance
from tribute.diffusion.train import CheckpointPolicy, Trainer
from tribute.errors import DataError
from tribute.games.coalitions import grand_coalition
from tribute.models.checkpoint import Checkpoint
from tribute.study.value_function import ValueFunction
from tribute.types import Images
from tribute.unlearning.as_is import AsIs
from tribute.unlearning.base import UnlearningMethod
from tribute.unlearning.gd import FineTuning
from tribute.unlearning.retrain import Retraining

if TYPE_CHECKING:
    from tribute.behaviors.features import ClassifierExtractor


class Worker:
    """Data, trainer, feature extractor and reference statistics of one process.

    Args:
        source: Where the training set comes from.
        preset: Recipe of the dataset.
        data: The training set; None loads `source`.
        behaviors: Names of the behaviors to measure.
        mixed_precision: `no`, `fp16` or `bf16`.
        device: Where to train; None lets Accelerate choose.
        n_threads: Threads of this process; None leaves PyTorch's choice.
        cache_dir: Where the classifier is kept.
        log_with: Trackers of Accelerate.
        project_dir: Where trackers write.
    """

    def __init__(
        self,
        source: DataConfig,
        preset: Preset,
        *,
        data: TrainingData | None = None,
        behaviors: Sequence[str] = (),
        mixed_precision: str = "no",
        device: str | None = None,
        n_threads: int | None = None,
        cache_dir: Path | None = None,
        log_with: Sequence[str] = (),
        project_dir: Path | None = None,
    ) -> None:
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        data = data or load_training_data(**dict(source))
        height, width, n_channels = data.image_shape
        expected = (preset.unet.sample_size, preset.unet.sample_size, preset.unet.in_channels)
        if (height, width, n_channels) != expected:
            raise DataError(
                f"the preset, or the model that was loaded, expects images of {expected[0]}x{expected[1]} pixels and "
                f"{expected[2]} channels; found {height}x{width} and {n_channels}. Choose another --preset, --load or "
                "--dataset"
            )
        everyone = grand_coalition(data.contributors.n_contributors)
        check_guidance(preset.unet.num_class_embeds, data.label_counts(everyone), preset.sampling.guidance_scale)
        self.source = source
        self.data = data
        self.preset = preset
        self.behaviors = [get_behavior(name) for name in behaviors]
        self.cache_dir = cache_dir or default_cache_dir()
        self.trainer = Trainer(
            PixelExamples(data.images, data.labels, len(data.label_names)),
            preset.noise_schedule,
            mixed_precision=mixed_precision,
            device=device,
            log_with=log_with,
            project_dir=project_dir,
        )

    @cached_property
    def extractor(self) -> ClassifierExtractor:
        """The in-domain classifier, trained on the dataset's real images once and cached."""
        from tribute.behaviors.features import train_or_load_classifier

        return train_or_load_classifier(
            self.data.reference_images,
            self.data.reference_labels,
            label_names=list(self.data.label_names),
            cache_dir=self.cache_dir / "classifiers",
            device=str(self.trainer.device),
        )

    @cached_property
    def reference(self) -> Reference:
        """Features and statistics of the dataset's real images."""
        return Reference.from_images(self.data.reference_images, self.extractor)

    @property
    def uses_features(self) -> bool:
        """Whether any behavior needs the feature extractor."""
        return any(behavior.uses_features for behavior in self.behaviors)

    def measure(self, images: Images) -> dict[str, float]:
        """Behaviors of generated images, by name."""
        if not self.uses_features:
            return measure_behaviors(images, self.behaviors)
        return measure_behaviors(images, self.behaviors, extractor=self.extractor, reference=self.reference)

    def behavior_definitions(self) -> dict[str, dict[str, Any]]:
        """Unit, direction and variant of every behavior, to be stored with its values."""
        extractor = self.extractor if self.uses_features else None
        return {
            behavior.name: {
                "unit": behavior.unit,
                "higher_is_better": behavior.higher_is_better,
                "variant": behavior_variant(behavior, extractor),
            }
            for behavior in self.behaviors
        }

    def value_function(self, method: UnlearningMethod, sampling: SampleConfig) -> ValueFunction:
        """v(S) with this worker's behaviors."""
        return ValueFunction(
            method, sampling, self.preset.noise_schedule, self.measure, label_counts=self.data.label_counts
        )

    def fine_tuning(
        self,
        checkpoint: Checkpoint,
        config: TrainConfig,
        *,
        use_ema: bool = True,
        checkpoints: CheckpointPolicy | None = None,
    ) -> FineTuning:
        """The method `gd`: from a checkpoint, on the coalition's examples."""
        return FineTuning(
            self.trainer, self.data.contributors, checkpoint, config, use_ema=use_ema, checkpoints=checkpoints
        )

    def retraining(self, config: TrainConfig, *, use_ema: bool = True) -> Retraining:
        """The method `retrain`, from scratch."""
        return Retraining(self.trainer, self.data.contributors, self.preset.unet, config, use_ema=use_ema)

    def as_is(self, checkpoint: Checkpoint, *, use_ema: bool = True) -> AsIs:
        """The method `retrain` for a model that was trained beforehand."""
        return AsIs(checkpoint, use_ema=use_ema, device=str(self.trainer.device))

    def settings(
        self, sampling: SampleConfig, *, train: TrainConfig | None, start: str, use_ema: bool = True
    ) -> dict[str, Any]:
        """All that determines an evaluation besides coalition, seeds and method, as plain JSON.

        Args:
            sampling: Its batch size does not count: it never changes an image.
            train: Its `opt_seed` is part of the evaluation itself.
            start: Hash of the model that training starts from, or of the architecture.
            use_ema: Whether the moving average is measured.
        """
        return {
            "data": self.data.fingerprint,
            "start": start,
            "train": None if train is None else train.model_dump(mode="json", exclude={"opt_seed"}),
            "sampling": sampling.model_dump(mode="json", exclude={"batch_size", "use_ema"}),
            "use_ema": use_ema,
            "noise_schedule": self.preset.noise_schedule.model_dump(mode="json"),
            "behaviors": {name: item["variant"] for name, item in self.behavior_definitions().items()},
        }
