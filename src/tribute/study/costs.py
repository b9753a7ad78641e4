"""What a study has taken so far: seconds of its models and evaluations, read without PyTorch.

A device second is a second of one device: a coalition that four processes measure together for a minute takes four
device minutes. What counts is what is recorded: training as checkpoints record it, and evaluations as the store does.
Setting up a process, the classifier, encoding latents, and work that was interrupted are not recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tribute.config import StudyConfig
from tribute.store.records import Effort, Store
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.record import StudyRecord

MODEL_STAGES = {"full": "full_model", "sparse": "sparse_model"}
STAGE_OF_ROLE = {
    "empty": "end_points",
    "grand": "end_points",
    "fit": "fit",
    "loo": "loo",
    "test": "test",
    "pilot": "pilot",
    "picture": "pictures",
}
STAGES = (*MODEL_STAGES.values(), "end_points", "fit", "loo", "test", "pilot", "pictures", "other")
"""In the order of a study; `other` are evaluations of the study that its plan does not ask for."""

_UNPLANNED_STAGES = ("pilot", "pictures", "other")
_CKPT_NAME = re.compile(r"ckpt_steps_(\d{8})")


@dataclass(frozen=True)
class StageCosts:
    """What one stage of a study has taken.

    Attributes:
        n_done: Finished evaluations; of a model, its optimizer updates.
        n_planned: Evaluations that the study asks for; of a model, the updates where it is trained, else 0.
        seconds: Wall-clock seconds of whoever did it.
        device_seconds: Those seconds times the devices that worked together.
        seconds_by_part: Wall-clock seconds of `train`, `sample` and `measure`.
    """

    n_done: int
    n_planned: int
    seconds: float
    device_seconds: float
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyCosts:
    """What a study has taken.

    Attributes:
        stages: By name, in the order of `STAGES`; those with nothing done and nothing planned are left out.
        lost_device_seconds: Of evaluations that failed, and of attempts whose process ended: known for the last attempt
            of a failed one, and for the others taken to be what an evaluation of that method takes.
    """

    stages: Mapping[str, StageCosts]
    lost_device_seconds: float

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def device_seconds(self) -> float:
        """Device seconds of all stages and of what was lost."""
        return sum(stage.device_seconds for stage in self.stages.values()) + self.lost_device_seconds

    @property
    def device_hours(self) -> float:
        """`device_seconds` in hours."""
        return self.device_seconds / 3600


@dataclass(frozen=True)
class ModelCosts:
    """How far a model of a study is, and what it took.

    Attributes:
        n_steps: Optimizer updates done.
        seconds: Wall-clock seconds of training, over all parts of the run that were saved.
        n_processes: That trained it together.
    """

    n_steps: int = 0
    seconds: float = 0.0
    n_processes: int = 1

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.n_processes

    def as_record(self) -> dict[str, Any]:
        """As `StudyRecord.models` holds it."""
        return {"n_steps": self.n_steps, "seconds_train": self.seconds, "n_processes": self.n_processes}


def model_costs(meta: Mapping[str, Any]) -> ModelCosts:
    """Costs of a model from the `config.json` of its checkpoint."""
    provenance = meta.get("provenance") or {}
    return ModelCosts(
        int(meta.get("n_steps", 0)), float(meta.get("seconds_train") or 0.0), int(provenance.get("n_processes") or 1)
    )


def read_costs(config: StudyConfig, record: StudyRecord, store: Store) -> StudyCosts:
    """What a study has taken so far, at any moment.

    Raises:
        StoreError: The study is not in the store.
    """
    models = {}
    for name in MODEL_STAGES:
        saved = record.models.get(name, {})
        models[name] = ModelCosts(
            int(saved.get("n_steps", 0)), float(saved.get("seconds_train") or 0.0), int(saved.get("n_processes") or 1)
        )
        if "seconds_train" not in saved:  # a study of an earlier version
            models[name] = read_model_costs(config)[name]
    planned: dict[str, int] = {}
    for role, identities in record.evaluations.items():
        stage = STAGE_OF_ROLE.get(role, "other")
        planned[stage] = planned.get(stage, 0) + len(identities)
    return add_up(models, store.efforts(record.study_id(store)), planned)


def read_model_costs(config: StudyConfig) -> dict[str, ModelCosts]:
    """How far the `full` and the `sparse` model in the run folder of a study are; zero for what is not there.

    A full model that was loaded took this study nothing.
    """
    folder = dataset_folder(config.dataset)
    places = {
        "full": models_dir(config.run_dir, folder, "retrain", "full"),
        "sparse": models_dir(config.run_dir, folder, "prune_fine_tune", pruning_name(config.prune), "full"),
    }
    found = {name: _last_checkpoint_costs(place) for name, place in places.items()}
    return found if config.full_model.load is None else {**found, "full": ModelCosts()}


def _last_checkpoint_costs(folder: Path) -> ModelCosts:
    """Of the checkpoint with the most steps that says what it took."""
    names = [path for path in folder.iterdir() if _CKPT_NAME.fullmatch(path.name)] if folder.is_dir() else []
    for path in sorted(names, reverse=True):
        try:
            return model_costs(json.loads((path / "config.json").read_text()))
        except (OSError, ValueError, TypeError, AttributeError):  # a damaged one is not continued from either
            continue
    return ModelCosts()


def add_up(
    models: Mapping[str, ModelCosts], efforts: Sequence[Effort], planned: Mapping[str, int] | None = None
) -> StudyCosts:
    """Costs by stage.

    Args:
        models: `full` and `sparse`.
        efforts: Of all evaluations of the study.
        planned: Evaluations that the study asks for, by stage.
    """
    planned = planned or {}
    stages = {
        stage: StageCosts(
            n_done=models[name].n_steps,
            n_planned=models[name].n_steps,
            seconds=models[name].seconds,
            device_seconds=models[name].device_seconds,
            seconds_by_part={"train": models[name].seconds},
        )
        for name, stage in MODEL_STAGES.items()
        if name in models
    }
    by_stage: dict[str, list[Effort]] = {}
    for effort in efforts:
        by_stage.setdefault(STAGE_OF_ROLE.get(effort.role or "", "other"), []).append(effort)
    for stage in STAGES[len(MODEL_STAGES) :]:
        done = [effort for effort in by_stage.get(stage, []) if effort.status == "finished"]
        n_planned = planned.get(stage, len(by_stage.get(stage, [])) if stage in _UNPLANNED_STAGES else 0)
        if not done and not n_planned:
            continue
        parts: dict[str, float] = {}
        for effort in done:
            for part, seconds in effort.seconds.items():
                parts[part] = parts.get(part, 0.0) + seconds
        stages[stage] = StageCosts(
            n_done=len(done),
            n_planned=n_planned,
            seconds=sum(parts.values()),
            device_seconds=sum(seconds_of(effort) * effort.n_devices for effort in done),
            seconds_by_part=parts,
        )
    return StudyCosts(stages, sum(lost_device_seconds(effort, efforts) for effort in efforts))


def seconds_of(effort: Effort) -> float:
    """Wall-clock seconds of a finished evaluation."""
    return float(sum(effort.seconds.values()))


def lost_device_seconds(effort: Effort, efforts: Sequence[Effort]) -> float:
    """Device seconds of the attempts at an evaluation that gave nothing."""
    n_lost = effort.attempts - (effort.status in ("finished", "running"))
    if n_lost <= 0:
        return 0.0
    known = 0.0
    if effort.seconds_failed is not None:
        known, n_lost = effort.seconds_failed * effort.n_devices, n_lost - 1
    return known + n_lost * (expected_device_seconds(efforts, effort.method, is_empty=effort.is_empty) or 0.0)


def expected_device_seconds(efforts: Sequence[Effort], method: str, *, is_empty: bool) -> float | None:
    """What the next evaluation of a method may take, from those that are finished; None where there are none.

    Nine of ten took no longer: a typical value would be exceeded half of the time, and the very longest may be that of
    a machine that slept.

    Args:
        efforts: Of the study.
        method: `gd` or `retrain`.
        is_empty: For the empty coalition, which is not trained.
    """
    taken = [
        seconds_of(effort) * effort.n_devices
        for effort in efforts
        if effort.status == "finished" and effort.method == method and effort.is_empty == is_empty
    ]
    return float(np.quantile(taken, 0.9, method="higher")) if taken else None
