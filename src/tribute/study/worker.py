"""A warm worker: what is set up once in a process and then serves every coalition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tribute.behaviors.base import ModelBehavior, check_enough_images
from tribute.behaviors.local import split_local
from tribute.config import DataConfig, FeatureConfig, LocalConfig, Preset, RuntimeConfig, SampleConfig, TrainConfig
from tribute.data.sources import default_cache_dir, load_training_data
from tribute.data.tensors import TrainingData
from tribute.diffusion.examples import PixelExamples
from tribute.diffusion.sample import check_guidance, check_inference_steps
from tribute.diffusion.train import CheckpointPolicy, Trainer
from tribute.errors import ConfigError, DataError
from tribute.games.coalitions import grand_coalition
from tribute.models.checkpoint import Checkpoint
from tribute.study.compatibility import check_same_data, check_same_shape
from tribute.study.latents import LatentSpace
from tribute.study.local import FullModelComparison, find_behaviors
from tribute.study.measurement import Measurement
from tribute.study.provenance import provenance
from tribute.study.value_function import ValueFunction
from tribute.types import Images
from tribute.unlearning.as_is import AsIs
from tribute.unlearning.base import UnlearningMethod
from tribute.unlearning.gd import FineTuning
from tribute.unlearning.retrain import Retraining


class Worker:
    """Data, trainer, feature extractors and reference statistics of one process.

    Args:
        source: Where the training set comes from.
        preset: Recipe of the dataset.
        data: The training set; None loads `source`.
        behaviors: Names of the behaviors to measure; local ones need `compare_with` before the first evaluation.
        features: Networks through which they see images, and where their weights are; None: the defaults.
        mixed_precision: `no`, `fp16` or `bf16`.
        runtime: How networks compute.
        device: Where to train; None lets Accelerate choose.
        n_threads: Threads of this process; None leaves PyTorch's choice.
        cache_dir: Where the classifier, latents and features of real images are kept.
        reuse_latents: Take the latents that are there, and never load the codec to train.
        on_block: Called with images encoded and images to encode, while latents are made.
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
        features: FeatureConfig | None = None,
        mixed_precision: str = "no",
        runtime: RuntimeConfig | None = None,
        device: str | None = None,
        n_threads: int | None = None,
        cache_dir: Path | None = None,
        reuse_latents: bool = False,
        on_block: Callable[[int, int], None] | None = None,
        log_with: Sequence[str] = (),
        project_dir: Path | None = None,
    ) -> None:
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        data = data or load_data_for(preset, source)
        check_images_fit(preset, data)
        self.source = source
        self.data = data
        self.preset = preset
        self.local_names, behaviors = split_local(behaviors)
        self.local: FullModelComparison | None = None
        self.cache_dir = cache_dir or default_cache_dir()
        self.trainer = Trainer(
            PixelExamples(data.images, data.labels, len(data.label_names)),
            preset.noise_schedule,
            mixed_precision=mixed_precision,
            runtime=runtime,
            device=device,
            log_with=log_with,
            project_dir=project_dir,
        )
        self.latent_space: LatentSpace | None = None
        if preset.codec is not None:
            self.latent_space = LatentSpace(
                preset,
                data,
                reuse=reuse_latents,
                cache_dir=self.cache_dir,
                device=self.trainer.device,
                on_block=on_block,
            )
            self.trainer.examples = self.latent_space.examples()
        self.measurement = Measurement(
            behaviors, data, features or FeatureConfig(), cache_dir=self.cache_dir, device=str(self.trainer.device)
        )

    @property
    def behaviors(self) -> list[ModelBehavior]:
        """The behaviors to measure."""
        return self.measurement.behaviors

    @property
    def classifier_accuracy(self) -> float | None:
        """Held-out accuracy of the in-domain classifier; None if no behavior looks through it."""
        return self.measurement.classifier.held_out_accuracy if self.measurement.uses_classifier else None

    def measure(self, images: Images) -> dict[str, float]:
        """Behaviors of generated images, by name."""
        return self.measurement.measure(images)

    def behavior_definitions(self) -> dict[str, dict[str, Any]]:
        """Unit, direction and variant of every behavior, to be stored with its values."""
        definitions = self.measurement.definitions()
        return definitions if self.local is None else definitions | self.local.definitions()

    def reported_behaviors(self) -> list[str]:
        """Names of the behaviors that are fitted and printed: all but the single images that only `local` brings."""
        local = [] if self.local is None else self.local.reported_names()
        return [*(behavior.name for behavior in self.behaviors), *local]

    def check_sampling(self, sampling: SampleConfig) -> None:
        """Refuse sampling that the preset's network, its noise schedule or a behavior cannot do with.

        Raises:
            ConfigError: Guidance that the network was not made for, or more steps than noise levels.
            BehaviorError: There are fewer images than a behavior needs.
        """
        check_guidance(self.preset.unet.num_class_embeds, self._label_counts, sampling.guidance_scale)
        check_inference_steps(sampling, self.preset.noise_schedule)
        check_enough_images(self.behaviors, sampling.n_samples)

    def check_measurement(self, sampling: SampleConfig, local: LocalConfig) -> None:
        """Refuse, before any model is trained, what could not be measured of one.

        Raises:
            ConfigError: See `check_sampling`; or local behaviors of images that are not compared or too small.
            BehaviorError: There are fewer images than a behavior needs.
        """
        self.check_sampling(sampling)
        find_behaviors(self.local_names, local, self.preset.noise_schedule, self.preset.image_size)

    @property
    def _label_counts(self) -> npt.NDArray[np.int64]:
        """`(n_labels,)` of everybody's data."""
        return self.data.label_counts(grand_coalition(self.data.contributors.n_contributors))

    def compare_with(self, full: Checkpoint, sampling: SampleConfig, config: LocalConfig) -> SampleConfig:
        """Measure local behaviors, where any are asked for, by comparing with this model from now on.

        Args:
            full: Trained on everybody.
            sampling: How images are generated; `use_ema` says which weights of `full` count.
            config: How many images and noises.

        Returns:
            `sampling`; with no more images than are compared where no behavior describes all images together.

        Raises:
            MixedResultsError: `full` has another noise schedule, codec or shape of images, or was trained on other
                data or on a part of it.
        """
        if not self.local_names:
            return sampling
        check_same_data(full, self)
        check_same_shape(full, self.preset.unet, setting="--full_model")
        if not self.behaviors:
            sampling = sampling.replace(n_samples=config.n_samples)
        self.local = FullModelComparison(
            full,
            self.local_names,
            sampling,
            self.trainer.noise_schedule_config,
            config,
            image_size=self.preset.image_size,
            label_counts=self._label_counts,
            device=self.trainer.device,
            decode=None if self.latent_space is None else self.latent_space.decode,
            runtime=self.trainer.runtime,
        )
        return sampling

    def value_function(self, method: UnlearningMethod, sampling: SampleConfig) -> ValueFunction:
        """v(S) with this worker's behaviors.

        Raises:
            ConfigError: Local behaviors are asked for, and there is no model to compare with; or see
                `check_sampling`.
            BehaviorError: There are fewer images than a behavior needs.
        """
        self.check_sampling(sampling)
        if self.local_names and self.local is None:
            raise ConfigError(
                f"{', '.join(self.local_names)}: local behaviors compare with the full model, and none was given; "
                "call compare_with first"
            )
        if self.local is not None and sampling != self.local.sampling:
            raise ConfigError("images must be generated as compare_with was told; give the settings that it returned")
        return ValueFunction(
            method,
            sampling,
            self.preset.noise_schedule,
            self.measure,
            measure_model=None if self.local is None else self.local.measure,
            label_counts=self.data.label_counts,
            decode=None if self.latent_space is None else self.latent_space.decode,
            runtime=self.trainer.runtime,
            processes=self.trainer.processes,
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

    def as_is(self, checkpoint: Checkpoint, *, use_ema: bool = True, counts_training: bool = True) -> AsIs:
        """The method `retrain` for a model that was trained beforehand."""
        return AsIs(checkpoint, use_ema=use_ema, device=str(self.trainer.device), counts_training=counts_training)

    def provenance(self) -> dict[str, Any]:
        """Where results of this worker come from: versions, commit, device, and how networks compute."""
        return {
            **provenance(str(self.trainer.device)),
            "n_processes": self.trainer.processes.n,
            "runtime": self.trainer.runtime.model_dump(mode="json"),
        }

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
            "behaviors": self._behaviors_identity(),
            **self.codec_identity(),
        }

    def codec_identity(self) -> dict[str, str]:
        """The codec's fingerprint, where there is a codec: part of the identity of models and evaluations."""
        return {} if self.latent_space is None else {"codec": self.latent_space.fingerprint}

    def _behaviors_identity(self) -> dict[str, Any]:
        """What makes behaviors comparable; the hundreds of local ones in a few words."""
        local = {} if self.local is None else self.local.definitions()
        variants = {name: item["variant"] for name, item in self.behavior_definitions().items() if name not in local}
        return variants if self.local is None else variants | {"local": self.local.settings()}


def load_data_for(preset: Preset, source: DataConfig) -> TrainingData:
    """The training set with images of the size and channels that a preset is for, where the settings leave that open.

    Raises:
        DataError: They cannot be read.
    """
    wanted = {**dict(source), "image_size": source.image_size or preset.image_size}
    return load_training_data(**wanted, image_channels=preset.image_channels)


def check_images_fit(preset: Preset, data: TrainingData) -> None:
    """Refuse images that are not of the size and channels that a preset is for.

    Raises:
        DataError: The message shows both.
    """
    height, width, n_channels = data.image_shape
    expected = (preset.image_size, preset.image_size, preset.image_channels)
    if (height, width, n_channels) != expected:
        raise DataError(
            f"the preset, or the model that was loaded, expects images of {expected[0]}x{expected[1]} pixels and "
            f"{expected[2]} channels; "
            f"found {height}x{width} and {n_channels}. Choose another --preset, --load, --image_size or --dataset"
        )
