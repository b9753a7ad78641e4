"""One process's part in a study: set up once, it measures any coalition by any method of the study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tribute.config import Preset, StudyConfig, StudyModelConfig, TrainConfig
from tribute.diffusion.preflight import check_precision, check_training
from tribute.errors import ConfigError
from tribute.models.checkpoint import Checkpoint
from tribute.models.pipelines import adopt_model
from tribute.study.team import Team
from tribute.study.value_function import Evaluation
from tribute.study.worker import Worker
from tribute.types import CoalitionMask


class StudySession:
    """Data, trainer, extractors and value functions of one process, for the coalitions of one study.

    The process that leads a study makes one, trains the models with its `worker` and calls `use_models`; another
    process makes the same from the same settings and is given the models.

    Args:
        config: The study.
        preset: Its recipe, as `study_preset` gives it.
        on_block: Called with images encoded and images to encode, while latents are made.
    """

    def __init__(
        self, config: StudyConfig, preset: Preset, *, on_block: Callable[[int, int], None] | None = None
    ) -> None:
        self.config = config
        self.preset = preset
        self.worker = Worker(
            config.data,
            preset,
            behaviors=config.behaviors,
            features=config.features,
            mixed_precision=preset.train_config("retrain").mixed_precision,
            runtime=config.runtime,
            n_threads=config.n_threads,
            on_block=on_block,
        )
        self.worker.check_measurement(preset.sampling, config.local)
        self.sampling = preset.sampling
        self.settings: dict[str, dict[str, Any]] = {}
        """By method: all that determines an evaluation besides coalition and seeds."""
        self._team: Team | None = None

    def use_models(self, full: Checkpoint, sparse: Checkpoint) -> None:
        """Measure coalitions of these models from now on.

        Args:
            full: Trained on everybody; local behaviors compare with it.
            sparse: Where sparsified fine-tuning starts.
        """
        config, preset, worker = self.config, self.preset, self.worker
        sft = train_settings(preset, config.gd, "gd", config.opt_seed)
        retrain = train_settings(preset, config.retrained_model, "retrain", config.opt_seed)
        self.sampling = sampling = worker.compare_with(full, preset.sampling, config.local)
        value_functions = {
            "gd": worker.value_function(worker.fine_tuning(sparse, sft, use_ema=sampling.use_ema), sampling),
            "retrain": worker.value_function(worker.retraining(retrain, use_ema=sampling.use_ema), sampling),
        }
        for name, model in (("full", full), ("sparse", sparse)):  # as they are, for the pilot
            method = worker.as_is(model, use_ema=sampling.use_ema, counts_training=False)
            value_functions[name] = worker.value_function(method, sampling)
        starts = {
            "gd": (sft, sparse.model_hash),
            "retrain": (retrain, preset.unet.fingerprint()),
            "full": (None, full.model_hash),
            "sparse": (None, sparse.model_hash),
        }
        self.settings = {
            method: worker.settings(sampling, train=train, start=start, use_ema=sampling.use_ema)
            for method, (train, start) in starts.items()
        }
        self._team = Team(worker.trainer.processes, value_functions, worker.data.contributors.n_contributors)

    @property
    def team(self) -> Team:
        """The processes that measure a coalition together; `use_models` comes first."""
        if self._team is None:
            raise ConfigError("a study's coalitions are measured with its models; call use_models first")
        return self._team

    def measure(self, method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        """v(S) of a coalition `(n_contributors,)` by `gd` or `retrain`, or everybody's `full` or `sparse` model."""
        return self.team.measure(method, coalition_mask, opt_seed=opt_seed)


def study_preset(config: StudyConfig, loaded: Checkpoint | None) -> Preset:
    """The recipe of a study: its preset, for the full model that is loaded where one is, with the study's codec.

    Raises:
        ConfigError: The study names a codec, and neither the preset nor the model has one.
    """
    preset = config.load_preset()
    return (preset if loaded is None else adopt_model(preset, loaded)).with_codec(config.codec)


def check_settings(config: StudyConfig, preset: Preset) -> None:
    """Refuse a study that this machine cannot run, before anything is read.

    Raises:
        ConfigError: A batch, precision, optimizer or compiler that cannot be had, or more than one precision; the
            message names the setting.
    """
    stages = {"full_model": "retrain", "sparse_model": "prune_fine_tune", "gd": "gd", "retrained_model": "retrain"}
    precisions: dict[str, str] = {}
    for stage, method in stages.items():
        train = train_settings(preset, getattr(config, stage), method, config.opt_seed)
        check_training(train, runtime=config.runtime)
        precisions[stage] = train.mixed_precision
    if len(set(precisions.values())) > 1:
        found = ", ".join(f"{stage} {precision}" for stage, precision in precisions.items())
        raise ConfigError(
            f"mixed_precision: one process trains all models of a study, in one precision; found {found}. Set "
            "mixed_precision in the study, or the same for every method of the preset"
        )
    check_precision(preset.sampling.mixed_precision, None)


def study_trainings(config: StudyConfig, preset: Preset) -> dict[str, TrainConfig]:
    """Training settings of a study by what is trained: `full_model`, `sparse_model`, `gd` and `retrain`."""
    stages = {
        "full_model": (config.full_model, "retrain"),
        "sparse_model": (config.sparse_model, "prune_fine_tune"),
        "gd": (config.gd, "gd"),
        "retrain": (config.retrained_model, "retrain"),
    }
    return {
        name: train_settings(preset, changes, method, config.opt_seed) for name, (changes, method) in stages.items()
    }


def train_settings(preset: Preset, changes: StudyModelConfig, method: str, opt_seed: int) -> TrainConfig:
    """Training settings of a stage: the preset's, with the study's changes."""
    return preset.train_config(method, opt_seed=opt_seed, **changes.model_dump(exclude={"load"}))
