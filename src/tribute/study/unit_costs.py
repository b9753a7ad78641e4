"""What one update, one evaluation's images and their behaviors take on this machine, measured in seconds.

Times do not depend on the values of weights, so random networks do. Nothing of a study is read or written but its data;
what the cache lacks (classifier, features of real images, latents) is made of few images, in a folder that is deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tribute.behaviors.base import extractor_of, uses_reference
from tribute.behaviors.classifier import ClassifierExtractor, is_classifier_cached
from tribute.behaviors.classifier_networks import recipe_for
from tribute.behaviors.classifier_training import train_classifier
from tribute.config import Preset, PruneConfig, StudyConfig, TrainConfig
from tribute.data.sources import default_cache_dir
from tribute.data.tensors import TrainingData, gather
from tribute.diffusion.sample import from_uint8, sample_images
from tribute.diffusion.train import Progress
from tribute.errors import DataError, MixedResultsError
from tribute.games.coalitions import grand_coalition
from tribute.models.build import build_unet
from tribute.models.checkpoint import Checkpoint
from tribute.models.pruning import count_parameters, prune_unet
from tribute.study.local import FullModelComparison
from tribute.study.measurement import Measurement
from tribute.study.plan import UnitCosts
from tribute.study.session import study_trainings
from tribute.study.stages import checkpoint_meta
from tribute.study.worker import Worker, load_data_for
from tribute.types import Images

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

SECONDS_PER_MEASUREMENT = 2.0
"""Of repeating one thing: long enough to average over what else the machine does."""

_N_ENCODED = 64
_MAX_REFERENCE = 1024
_N_CLASSIFIER_STEPS = (2, 12)
_N_GRADIENT_TIMESTEPS = 100
_LOCAL_IMAGES = 4


@contextlib.contextmanager
def planning_worker(config: StudyConfig, preset: Preset, *, device: str | None = None) -> Iterator[Worker]:
    """A worker for measuring costs: with the cache where that has everything, else with a few images and a folder of
    its own.

    Raises:
        DataError: The training data cannot be read.
        ConfigError: A setting does not fit this machine or the others.
    """
    data = load_data_for(preset, config.data)

    def make(data: TrainingData, *, reuse_latents: bool, cache_dir: Path | None = None) -> Worker:
        return Worker(
            config.data,
            preset,
            data=data,
            behaviors=config.behaviors,
            features=config.features,
            mixed_precision=preset.train_config("retrain").mixed_precision,
            runtime=config.runtime,
            device=device,
            n_threads=config.n_threads,
            cache_dir=cache_dir,
            reuse_latents=reuse_latents,
        )

    try:
        yield make(data, reuse_latents=True)
        return
    except (DataError, MixedResultsError):
        if preset.codec is None:
            raise
    few = dataclasses.replace(data, images=gather(data.images, np.arange(min(_N_ENCODED, data.n_examples))))
    with tempfile.TemporaryDirectory() as folder:
        worker = make(few, reuse_latents=False, cache_dir=Path(folder))
        worker.data, worker.cache_dir = data, default_cache_dir()
        worker.measurement.data, worker.measurement.cache_dir = data, worker.cache_dir
        yield worker


def measure_unit_costs(worker: Worker, config: StudyConfig, preset: Preset, *, seconds_setup: float = 0.0) -> UnitCosts:
    """Measure what the parts of a study take; about half a minute for small networks.

    Args:
        worker: Of the device that is asked about, from `planning_worker`.
        config: The study.
        preset: Its recipe.
        seconds_setup: What it took to get here.
    """
    notes: list[str] = []
    trainings = study_trainings(config, preset)
    full = build_unet(preset.unet, opt_seed=0, device=worker.trainer.device)
    sparse = build_unet(preset.unet, opt_seed=0, device=worker.trainer.device)
    seconds_prune = _time(lambda: _prune(sparse, config.prune, preset))
    seconds_per_step = {
        name: _seconds_per_step(worker, full if name in ("full_model", "retrain") else sparse, train)
        for name, train in _distinct(trainings).items()
    }
    seconds_per_step = {name: seconds_per_step[_same_as(name, trainings)] for name in trainings}
    if config.prune.pruner in ("taylor", "diff-pruning"):
        per_image = seconds_per_step["full_model"] / trainings["full_model"].examples_per_step
        seconds_prune += _N_GRADIENT_TIMESTEPS * config.prune.batch_size * per_image
        notes.append(f"pruner {config.prune.pruner}: {_N_GRADIENT_TIMESTEPS} noise levels, at the cost of training")
    seconds_sample = {
        "gd": _seconds_to_sample(worker, sparse, preset),
        "retrain": _seconds_to_sample(worker, full, preset),
    }
    measured, seconds_classifier, seconds_references = _seconds_to_measure(worker, config, preset, notes)
    seconds_measure = {"gd": measured, "retrain": measured}
    if worker.local_names:
        local = {"gd": sparse, "retrain": full}
        seconds_measure = {name: measured + _seconds_local(worker, net, config, preset) for name, net in local.items()}
        notes.append(f"local behaviors: from {_LOCAL_IMAGES} of {config.local.n_samples} images")
    return UnitCosts(
        device=_device_name(worker),
        seconds_per_step=seconds_per_step,
        seconds_sample=seconds_sample,
        seconds_measure=seconds_measure,
        seconds_prune=seconds_prune,
        seconds_setup=seconds_setup,
        seconds_classifier=seconds_classifier,
        seconds_references=seconds_references,
        seconds_latents=_seconds_to_encode(worker, notes),
        n_parameters={"full": count_parameters(full), "sparse": count_parameters(sparse)},
        notes=tuple(notes),
    )


def _prune(model: UNet2DModel, config: PruneConfig, preset: Preset) -> None:
    """Any pruner removes as many channels; that by magnitude needs no training images."""
    prune_unet(
        model,
        config.replace(pruner="magnitude"),
        n_timesteps=preset.noise_schedule.num_train_timesteps,
    )


def _same_as(name: str, trainings: dict[str, TrainConfig]) -> str:
    """The first training of the same network whose updates take as long."""

    def kind(other: str) -> tuple[object, ...]:
        of_full = other in ("full_model", "retrain")
        return (of_full, trainings[other].model_dump(exclude={"n_steps", "opt_seed"}))

    return next(other for other in trainings if kind(other) == kind(name))


def _distinct(trainings: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
    """Those that take different times."""
    return {name: train for name, train in trainings.items() if _same_as(name, trainings) == name}


def _seconds_per_step(worker: Worker, model: UNet2DModel, train: TrainConfig) -> float:
    """One optimizer update, warm-up excluded: the median of several runs of updates."""
    rows = np.arange(len(worker.trainer.examples))
    rates: list[float] = []

    def run(n_steps: int, log_freq: int) -> list[float]:
        rates.clear()

        def on_log(at: Progress) -> None:
            rates.append(train.examples_per_step / at.images_per_second)

        # A rate too small to change anything: random weights must not diverge, and times do not depend on it.
        still = train.optimizer.model_copy(update={"lr": 1e-12})
        worker.trainer.train(
            model,
            rows,
            train.replace(n_steps=n_steps, optimizer=still.model_dump()),
            on_log=on_log,
            log_freq=log_freq,
        )
        return rates[1:]

    first = min(run(4, 1))
    n_per_run = max(1, min(50, math.ceil(SECONDS_PER_MEASUREMENT / 5 / max(first, 1e-6))))
    n_runs = 6 if first < 2 * SECONDS_PER_MEASUREMENT else 3
    return statistics.median(run(n_runs * n_per_run, n_per_run))


def _seconds_to_sample(worker: Worker, model: UNet2DModel, preset: Preset) -> float:
    """The images of one evaluation: of a batch with few and with more network calls, to the number asked for."""
    sampling = preset.sampling
    n_images = min(sampling.batch_size, sampling.n_samples)
    counts = worker.data.label_counts(grand_coalition(worker.data.contributors.n_contributors))

    def seconds(n_calls: int) -> float:
        return _time(
            lambda: sample_images(
                model.eval(),
                sampling.replace(num_inference_steps=n_calls),
                preset.noise_schedule,
                image_idx=range(n_images),
                label_counts=counts,
                decode=None if worker.latent_space is None else worker.latent_space.decode,
                runtime=worker.trainer.runtime,
            )
        )

    n_all = sampling.num_inference_steps
    n_few = min(2, n_all)
    seconds(n_few)  # compiles, and warms the allocator
    few = min(seconds(n_few), seconds(n_few))
    n_more = max(n_few, min(n_all, round(n_few * SECONDS_PER_MEASUREMENT / max(few, 1e-6))))
    more = statistics.median(seconds(n_more) for _ in range(3 if more_than_once(few, n_few, n_more) else 1))
    batch = more if n_more == n_few else few + (more - few) * (n_all - n_few) / (n_more - n_few)
    return batch * sampling.n_samples / n_images


def more_than_once(few: float, n_few: int, n_more: int) -> bool:
    """Whether a measurement is short enough to be repeated."""
    return few * n_more / n_few < SECONDS_PER_MEASUREMENT


def _seconds_to_measure(
    worker: Worker, config: StudyConfig, preset: Preset, notes: list[str]
) -> tuple[float, float, float]:
    """Behaviors of the images of one evaluation, training of the classifier, and features of the real images."""
    measurement = worker.measurement
    if not measurement.behaviors:
        return 0.0, 0.0, 0.0
    n_real = len(measurement.data.reference_images)
    n_wanted = min(n_real, config.features.max_reference or n_real)
    n_few = min(n_wanted, _MAX_REFERENCE)
    with tempfile.TemporaryDirectory() as folder:
        trial = Measurement(
            [name for name in config.behaviors if name not in worker.local_names],
            measurement.data,
            config.features.replace(max_reference=max(2, n_few)),
            cache_dir=Path(folder),
            device=measurement.device,
        )
        seconds_classifier = 0.0
        if trial.uses_classifier:
            if is_classifier_cached(
                measurement.data.reference_images,
                measurement.data.reference_labels,
                cache_dir=measurement.cache_dir / "classifiers",
            ):
                trial.classifier = measurement.classifier
            else:
                trial.classifier, seconds_classifier = _quick_classifier(measurement.data, measurement.device)
                notes.append(f"classifier: its training from {max(_N_CLASSIFIER_STEPS)} steps")
        compared = sorted(
            {extractor_of(item) for item in trial.behaviors if item.uses_features and uses_reference(item)}
        )
        trial.definitions()  # loads extractors
        seconds_references = sum(_time(lambda name=name: trial.reference(name)) for name in compared)
        seconds_references *= n_wanted / max(n_few, 1)
        if compared and n_few < n_wanted:
            notes.append(f"behaviors compare with {n_few:,} of {n_wanted:,} real images here")
        seconds = _seconds_of_behaviors(trial, preset.sampling.n_samples)
    if seconds_classifier == 0.0 and worker.measurement.references_cached():
        seconds_references = 0.0
    return seconds, seconds_classifier, seconds_references


def _seconds_of_behaviors(measurement: Measurement, n_images: int) -> float:
    """Measuring `n_images` images: of as many if that is short, else from fewer, as if it grew in proportion."""
    images = measurement.data.reference_images
    n_least = max([2, *(item.min_images for item in measurement.behaviors)])

    def some(n: int) -> Images:
        return gather(images, np.arange(n) % len(images))

    n_few = min(n_images, max(n_least, 64))
    measurement.measure(some(n_few))  # statistics of the real images, compilers
    few = _time(lambda: measurement.measure(some(n_few)))
    n_more = int(min(n_images, max(n_few, n_few * SECONDS_PER_MEASUREMENT / max(few, 1e-6))))
    more = _time(lambda: measurement.measure(some(n_more)))
    return more if n_more in (n_images, n_few) else few + (more - few) * (n_images - n_few) / (n_more - n_few)


def _quick_classifier(data: TrainingData, device: str) -> tuple[ClassifierExtractor, float]:
    """A classifier after a few steps, as fast as a trained one, and what its whole training would take."""
    recipe = recipe_for(data.reference_images.shape[1:], len(data.reference_images))

    def train(n_steps: int) -> ClassifierExtractor:
        architecture, weights, score = train_classifier(
            data.reference_images,
            data.reference_labels.astype(np.int64),
            0,
            device,
            dataclasses.replace(recipe, n_epochs=1, min_steps=n_steps, max_steps=n_steps),
        )
        return ClassifierExtractor(architecture, weights, label_names=list(data.label_names), device=device, **score)

    log = logging.getLogger("tribute.behaviors.classifier_training")
    before = log.level
    log.setLevel(logging.ERROR)  # it would say how poor this one is
    try:
        few, more = _N_CLASSIFIER_STEPS
        seconds_few = _time(lambda: train(few))
        started = time.perf_counter()
        classifier = train(more)
        seconds_more = time.perf_counter() - started
    finally:
        log.setLevel(before)
    n_train = round(len(data.reference_images) * (1 - recipe.held_out_share))
    per_step = max(0.0, (seconds_more - seconds_few) / (more - few))
    return classifier, seconds_more + per_step * (recipe.n_steps(n_train) - more)


def _seconds_local(worker: Worker, model: UNet2DModel, config: StudyConfig, preset: Preset) -> float:
    """Local behaviors of one evaluation, in proportion to the images that are compared."""
    everyone = grand_coalition(worker.data.contributors.n_contributors)
    network = build_unet(preset.unet, opt_seed=1)
    weights = dict(network.state_dict())
    meta = checkpoint_meta(worker, method="retrain", coalition_mask=everyone, start=None) | {"n_steps": 0, "files": {}}
    n_images = min(_LOCAL_IMAGES, config.local.n_samples)
    comparison = FullModelComparison(
        Checkpoint(path=Path("random weights"), meta=meta, unet=weights, ema=weights),
        ["local"],
        preset.sampling,
        preset.noise_schedule,
        config.local.replace(n_samples=n_images),
        image_size=preset.image_size,
        label_counts=worker.data.label_counts(everyone),
        device=worker.trainer.device,
        decode=None if worker.latent_space is None else worker.latent_space.decode,
        runtime=worker.trainer.runtime,
    )
    images = comparison.reference.images
    return _time(lambda: comparison.measure(model.eval(), images)) * config.local.n_samples / n_images


def _seconds_to_encode(worker: Worker, notes: list[str]) -> float:
    """Encoding the training set; nothing where its latents are there."""
    space = worker.latent_space
    if space is None or space.reuse:
        return 0.0
    images = gather(worker.data.images, np.arange(min(16, worker.data.n_examples)))
    notes.append(f"latents: encoding {worker.data.n_examples:,} images, from {len(images)}")
    return _time(lambda: space.codec.encode(from_uint8(images))) * worker.data.n_examples / len(images)


def _time(do: Callable[[], object]) -> float:
    """Wall-clock seconds, with all work of the device done."""
    _finish()
    started = time.perf_counter()
    do()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_name(worker: Worker) -> str:
    """What it is, for people."""
    device = worker.trainer.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
