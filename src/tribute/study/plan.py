"""What a study will cost, before it starts: stages, device hours, disk, and time with several workers.

Arithmetic only: `unit_costs` measures what one update, an evaluation's images and their behaviors take on this machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tribute.config import StudyConfig, TrainConfig
from tribute.store.records import EvaluationSpec
from tribute.study.costs import MODEL_STAGES, STAGE_OF_ROLE, read_model_costs
from tribute.study.pictures import ROLE as PICTURE_ROLE
from tribute.study.record import FILE_NAME, StudyRecord
from tribute.study.status import open_to_read, store_exists

PREPARATION_STAGES = ("classifier", "references", "latents", "full_model", "pruning", "sparse_model")
"""One after the other, by one process: more workers do not shorten them."""
COALITION_STAGES = ("end_points", "fit", "loo", "test")
FINAL_STAGES = ("pictures",)
"""After the coalitions, by one process, too."""

BYTES_PER_EVALUATION = 8192
"""In the store, with its settings and provenance; studies of the examples took 5 to 7 kB."""
BYTES_PER_BEHAVIOR = 400
"""In the store, with its definition."""


@dataclass(frozen=True)
class UnitCosts:
    """What the parts of a study take on one device.

    Attributes:
        device: On which they were measured.
        seconds_per_step: One optimizer update, by training: `full_model`, `sparse_model`, `gd`, `retrain`.
        seconds_sample: Images of one evaluation, by method: `gd` (sparse network) or `retrain` (full network).
        seconds_measure: Behaviors of those images, by method.
        seconds_prune: Pruning once.
        seconds_setup: What a process takes before it can begin: imports, data, networks.
        seconds_classifier: Training the in-domain classifier; 0 where it is in the cache, or none is used.
        seconds_references: Features of the real images; 0 where they are in the cache, or none are used.
        seconds_latents: Encoding the training set; 0 where it is in the cache, or there is no codec.
        n_parameters: By model: `full` and `sparse`.
        n_devices: That work together on one model.
        notes: What was estimated rather than measured, in sentences.
    """

    device: str
    seconds_per_step: Mapping[str, float]
    seconds_sample: Mapping[str, float]
    seconds_measure: Mapping[str, float]
    seconds_prune: float
    seconds_setup: float
    seconds_classifier: float
    seconds_references: float
    seconds_latents: float
    n_parameters: Mapping[str, int]
    n_devices: int = 1
    notes: tuple[str, ...] = ()

    def evaluation_seconds(self, method: str, n_steps: int, *, is_empty: bool) -> float:
        """One evaluation; that of the empty coalition is not trained."""
        train = 0.0 if is_empty else n_steps * self.seconds_per_step[method]
        return train + self.seconds_sample[method] + self.seconds_measure[method]


@dataclass(frozen=True)
class Done:
    """What a study has already.

    Attributes:
        n_steps: Optimizer updates of the `full` and the `sparse` model.
        n_finished: Finished evaluations, by role.
    """

    n_steps: Mapping[str, int] = field(default_factory=dict)
    n_finished: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        name: Of the stage.
        n_coalitions: Evaluations; 0 for stages that have none.
        n_steps: Optimizer updates in all.
        n_images: Generated images in all.
        seconds_each: One evaluation that is trained, or the whole stage where it has none.
        seconds: All of it, on one device.
        seconds_left: Without what is done already.
        n_left: Evaluations that are not done; 0 for stages that have none.
        bytes: On the disk, when it is done.
        units_left: Seconds of each evaluation that is not done.
    """

    name: str
    n_coalitions: int
    n_steps: int
    n_images: int
    seconds_each: float
    seconds: float
    seconds_left: float
    n_left: int
    bytes: int
    units: tuple[float, ...] = field(default=(), repr=False)
    units_left: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class StudyPlan:
    """What a study takes, stage by stage.

    Attributes:
        stages: In order.
        units: What the figures rest on.
        until_interval: The study stops earlier where this is reached; its fit coalitions are the most.
    """

    stages: tuple[StagePlan, ...]
    units: UnitCosts
    until_interval: float | None = None

    def device_hours(self, *, left: bool = False) -> float:
        """Of all stages, with the set-up of one process; only of what is left where asked."""
        seconds = sum(stage.seconds_left if left else stage.seconds for stage in self.stages)
        return self.units.n_devices * (seconds + self.units.seconds_setup) / 3600

    def alone_seconds(self, *, left: bool = False) -> float:
        """Seconds of the stages before and after the coalitions, which one process does."""
        return sum(
            stage.seconds_left if left else stage.seconds
            for stage in self.stages
            if stage.name in (*PREPARATION_STAGES, *FINAL_STAGES)
        )

    def wall_seconds(self, n_workers: int, *, left: bool = False) -> float:
        """Time until everything is there.

        The stages before and after the coalitions are one process's. Coalitions are not divided: each worker takes the
        next one when it has finished one. One worker is the process itself; several are set up beside it.
        """
        units = [seconds for stage in self.stages for seconds in (stage.units_left if left else stage.units)]
        workers_setup = self.units.seconds_setup if n_workers > 1 and units else 0.0
        return self.units.seconds_setup + self.alone_seconds(left=left) + workers_setup + makespan(units, n_workers)

    def disk_bytes(self) -> int:
        """Run folder and store, when the study is done."""
        return sum(stage.bytes for stage in self.stages)

    def as_json(self, workers: Sequence[int]) -> dict[str, Any]:
        """The plan as plain JSON, for other programs."""
        return {
            "stages": [
                {key: value for key, value in asdict(stage).items() if key not in ("units", "units_left")}
                for stage in self.stages
            ],
            "device_hours": {"in_all": self.device_hours(), "left": self.device_hours(left=True)},
            "wall_seconds": {
                str(n): {"in_all": self.wall_seconds(n), "left": self.wall_seconds(n, left=True)} for n in workers
            },
            "disk_bytes": self.disk_bytes(),
            "unit_costs": asdict(self.units),
        }


def makespan(seconds: Sequence[float], n_workers: int) -> float:
    """When the last of some tasks ends that workers take in order, each when it is free."""
    free_at = [0.0] * max(1, min(n_workers, len(seconds)))
    for task in seconds:
        heapq.heapreplace(free_at, free_at[0] + task)
    return max(free_at)


def plan_study(
    config: StudyConfig,
    trainings: Mapping[str, TrainConfig],
    n_samples: int,
    specs: Sequence[EvaluationSpec],
    units: UnitCosts,
    done: Done | None = None,
    *,
    n_behaviors: int = 1,
    n_pictured_behaviors: int = 0,
) -> StudyPlan:
    """What a study takes.

    Args:
        config: The study.
        trainings: Settings of `full_model`, `sparse_model`, `gd` and `retrain`.
        n_samples: Images of one evaluation.
        specs: All evaluations that the study asks for.
        units: What its parts take.
        done: What is there already.
        n_behaviors: Values of one evaluation.
        n_pictured_behaviors: Whose top contributors are left out of a picture.
    """
    done = done or Done()
    stages = [
        _preparation("classifier", units.seconds_classifier),
        _preparation("references", units.seconds_references),
        _preparation("latents", units.seconds_latents),
    ]
    stages = [stage for stage in stages if stage.seconds]
    if config.full_model.load is None:
        stages.append(_model("full_model", trainings, units, done))
    n_sparse = units.n_parameters["sparse"]
    is_pruned = done.n_steps.get("sparse", 0) > 0
    stages.append(_preparation("pruning", units.seconds_prune, is_done=is_pruned, n_bytes=2 * 4 * n_sparse))
    stages.append(_model("sparse_model", trainings, units, done))
    by_stage: dict[str, list[EvaluationSpec]] = {}
    for spec in specs:
        by_stage.setdefault(STAGE_OF_ROLE[spec.role or "fit"], []).append(spec)
    for name in COALITION_STAGES:
        if name in by_stage:
            stages.append(_coalitions(name, by_stage[name], trainings, n_samples, units, done, n_behaviors))
    if config.pictures.n_images:
        stages.append(_pictures(1 + n_pictured_behaviors, trainings, n_samples, units, done, n_behaviors))
    return StudyPlan(tuple(stages), units, config.fit.until_interval)


def read_done(config: StudyConfig) -> Done:
    """What a study has in its run folder and its store; nothing is written or made.

    Raises:
        StoreError: The store that the run folder belongs to cannot be read.
    """
    n_steps = {name: costs.n_steps for name, costs in read_model_costs(config).items()}
    if not (config.run_dir / FILE_NAME).exists():
        return Done(n_steps)
    record = StudyRecord.read(config)
    n_finished: dict[str, int] = {}
    if not store_exists(config):  # interrupted before the first coalition
        return Done(n_steps)
    with open_to_read(config) as store:
        if store.studies(name=record.name, dataset=record.dataset):
            pictures = store.counts(record.study_id(store), role=PICTURE_ROLE)["finished"]
            n_finished[PICTURE_ROLE] = pictures
            for role in record.evaluations:
                ids = record.evaluation_ids(store, roles=[role])
                n_finished[role] = store.counts(record.study_id(store), evaluation_ids=ids)["finished"] if ids else 0
    return Done(n_steps, n_finished)


def _preparation(name: str, seconds: float, *, is_done: bool = False, n_bytes: int = 0) -> StagePlan:
    """A stage that is done in one go."""
    return StagePlan(name, 0, 0, 0, seconds, seconds, 0.0 if is_done else seconds, 0, n_bytes)


def _model(name: str, trainings: Mapping[str, TrainConfig], units: UnitCosts, done: Done) -> StagePlan:
    """The training of the full or the sparse model."""
    train = trainings[name]
    key = next(key for key, stage in MODEL_STAGES.items() if stage == name)
    n_left = max(0, train.n_steps - done.n_steps.get(key, 0))
    seconds = train.n_steps * units.seconds_per_step[name]
    # Weights, their moving average, and two statistics of the optimizer: of four bytes, or of one.
    bytes_per_parameter = 4 + 4 + (2 if train.optimizer.is_8bit else 8)
    return StagePlan(
        name,
        n_coalitions=0,
        n_steps=train.n_steps,
        n_images=0,
        seconds_each=seconds,
        seconds=seconds,
        seconds_left=n_left * units.seconds_per_step[name],
        n_left=0,
        bytes=bytes_per_parameter * units.n_parameters[key],
    )


def _pictures(
    n_models: int,
    trainings: Mapping[str, TrainConfig],
    n_samples: int,
    units: UnitCosts,
    done: Done,
    n_behaviors: int,
) -> StagePlan:
    """Models that are fine-tuned and measured for pictures: everybody's, and one per behavior at the most."""
    steps = trainings["gd"].n_steps
    each = units.evaluation_seconds("gd", steps, is_empty=False)
    n_left = max(0, n_models - done.n_finished.get(PICTURE_ROLE, 0))
    return StagePlan(
        "pictures",
        n_coalitions=n_models,
        n_steps=n_models * steps,
        n_images=n_models * n_samples,
        seconds_each=each,
        seconds=n_models * each,
        seconds_left=n_left * each,
        n_left=n_left,
        bytes=n_models * (BYTES_PER_EVALUATION + n_behaviors * BYTES_PER_BEHAVIOR),
    )


def _coalitions(
    name: str,
    specs: Sequence[EvaluationSpec],
    trainings: Mapping[str, TrainConfig],
    n_samples: int,
    units: UnitCosts,
    done: Done,
    n_behaviors: int,
) -> StagePlan:
    """Evaluations of one stage; the first ones of each role are those that are done."""
    n_steps, seconds, left = [], [], []
    n_finished = dict(done.n_finished)
    for spec in specs:
        is_empty = not spec.coalition_mask.any()
        steps = trainings[spec.method].n_steps
        n_steps.append(0 if is_empty else steps)
        seconds.append(units.evaluation_seconds(spec.method, steps, is_empty=is_empty))
        role = spec.role or "fit"
        if n_finished.get(role, 0) > 0:
            n_finished[role] -= 1
        else:
            left.append(seconds[-1])
    return StagePlan(
        name,
        n_coalitions=len(specs),
        n_steps=sum(n_steps),
        n_images=len(specs) * n_samples,
        seconds_each=max(seconds),
        seconds=sum(seconds),
        seconds_left=sum(left),
        n_left=len(left),
        bytes=len(specs) * (BYTES_PER_EVALUATION + n_behaviors * BYTES_PER_BEHAVIOR),
        units=tuple(seconds),
        units_left=tuple(left),
    )
