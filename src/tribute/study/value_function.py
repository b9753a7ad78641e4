"""The value function v(S): from a coalition of contributors to the behaviors of its model.

This is the method on one page: obtain the coalition's model, generate images from noise that is the
same for every coalition, and measure all behaviors in one pass over their features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tribute.config import NoiseScheduleConfig, RuntimeConfig, SampleConfig
from tribute.diffusion.processes import Processes
from tribute.diffusion.sample import sample_images, sampling_batch
from tribute.types import CoalitionMask, Images
from tribute.unlearning.base import CoalitionModel, UnlearningMethod

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of v(S) gave.

    Attributes:
        behaviors: Value by behavior name, raw (never negated).
        seconds: Wall-clock seconds of `train`, `sample` and `measure`.
        n_steps: Optimizer updates that the coalition's model took.
        images: The generated images.
    """

    behaviors: dict[str, float]
    seconds: dict[str, float]
    n_steps: int
    images: Images = field(repr=False)


class ValueFunction:
    """v(S) for one method of obtaining models; warm, so it serves any number of coalitions.

    Args:
        method: How a coalition's model is obtained.
        sampling: How images are generated.
        noise_schedule: Forward process of the models.
        measure: Behaviors of images, by name.
        measure_model: Further behaviors, of the model and its images.
        label_counts: Of a coalition, the proportions in which a class-conditional model is asked for labels.
        decode: From latents to images; None for models of pixels.
        runtime: How models compute.
        processes: Those that train and sample together; None for this one alone.
    """

    def __init__(
        self,
        method: UnlearningMethod,
        sampling: SampleConfig,
        noise_schedule: NoiseScheduleConfig,
        measure: Callable[[Images], dict[str, float]],
        *,
        measure_model: Callable[[UNet2DModel, Images], dict[str, float]] | None = None,
        label_counts: Callable[[CoalitionMask], npt.NDArray[np.int64]] | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        runtime: RuntimeConfig | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.method = method
        self.sampling = sampling
        self.noise_schedule = noise_schedule
        self.measure = measure
        self.measure_model = measure_model
        self.label_counts = label_counts
        self.decode = decode
        self.runtime = runtime
        self.processes = processes
        self._batch = sampling_batch(sampling.batch_size)

    def __call__(self, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        """Measure the behaviors of the model of a coalition `(n_contributors,)`."""
        obtained, images, seconds_sample = self.images(coalition_mask, opt_seed=opt_seed)
        started = time.perf_counter()
        behaviors = self.measure(images)
        if self.measure_model is not None:
            behaviors |= self.measure_model(obtained.model, images)
        seconds = {
            "train": obtained.seconds_train,
            "sample": seconds_sample,
            "measure": time.perf_counter() - started,
        }
        return Evaluation(behaviors, seconds, obtained.n_steps, images)

    def images(self, coalition_mask: CoalitionMask, *, opt_seed: int) -> tuple[CoalitionModel, Images, float]:
        """A coalition's model, its images, and the seconds of sampling; every process has them all."""
        obtained = self.method.obtain(coalition_mask, opt_seed=opt_seed)
        started = time.perf_counter()

        def make(image_idx: Sequence[int]) -> Images:
            return sample_images(
                obtained.model,
                self.sampling,
                self.noise_schedule,
                image_idx=image_idx,
                label_counts=None if self.label_counts is None else self.label_counts(coalition_mask),
                decode=self.decode,
                runtime=self.runtime,
                batch=self._batch,
            )

        n_images = self.sampling.n_samples
        images = make(range(n_images)) if self.processes is None else self.processes.divide(n_images, make)
        return obtained, images, time.perf_counter() - started
