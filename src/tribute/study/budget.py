"""`max_device_hours`: whether the next thing that a study wants to do fits, and what was bought when it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tribute.config import SampleConfig, StudyConfig, TrainConfig
from tribute.errors import StoppedEarly
from tribute.store.records import Effort, Store
from tribute.study.costs import (
    ModelCosts,
    StudyCosts,
    add_up,
    expected_device_seconds,
    lost_device_seconds,
    read_model_costs,
    seconds_of,
)
from tribute.study.record import FILE_NAME, StudyRecord

StopEarly = Callable[[int, float], bool]
"""Asked while a model is trained, with the updates done and the seconds they took: True ends the run."""

_TITLES = {
    "full_model": "full model",
    "sparse_model": "sparse model",
    "end_points": "end points",
    "fit": "fit coalitions",
    "loo": "leave-one-out coalitions",
    "test": "test coalitions",
    "pilot": "evaluations of the pilot",
    "pictures": "models for pictures",
    "other": "other evaluations",
}

_STEPS_IN_RESERVE = 2
"""Training stops while so many updates still fit: the next one, and as much for jitter."""


class Budget:
    """What a study may take, and what it has taken.

    Args:
        config: With `max_device_hours`.
        n_processes: That train together.

    Attributes:
        stopped: Something did not fit any more.
        estimate: Device seconds of an evaluation that none was measured like, from its method and whether its coalition
            is empty; `run` sets it once the models are there, to that of `estimate_from_training`.
    """

    def __init__(self, config: StudyConfig, *, n_processes: int = 1) -> None:
        if config.max_device_hours is None:
            raise ValueError("a budget needs max_device_hours")
        self.hours = config.max_device_hours
        self.n_processes = n_processes
        self.stopped = False
        self.estimate: Callable[[str, bool], float] = lambda method, is_empty: 0.0
        self._config = config
        self._models = read_model_costs(config)
        self._evaluations = self._read_evaluations()

    @property
    def device_seconds(self) -> float:
        """What may be taken in all."""
        return 3600 * self.hours

    def model(self, name: str, n_steps: int) -> StopEarly:
        """When to end the training of the `full` or the `sparse` model.

        Args:
            name: Which.
            n_steps: Updates that it is to have.

        Raises:
            StoppedEarly: Nothing is left to begin with.
        """
        self.refresh()
        others = self._evaluations + sum(item.device_seconds for key, item in self._models.items() if key != name)
        begun = self._models[name]
        reserve = _STEPS_IN_RESERVE * begun.device_seconds / max(begun.n_steps, 1)
        if begun.n_steps < n_steps and not others + begun.device_seconds + reserve < self.device_seconds:
            self.stopped = True
            raise StoppedEarly(self.message())

        def stop_early(done: int, seconds: float) -> bool:
            """Steps and seconds of all parts of the run."""
            self._models[name] = ModelCosts(done, seconds, self.n_processes)
            reserve = _STEPS_IN_RESERVE * seconds / max(done, 1)
            self.stopped |= others + self.n_processes * (seconds + reserve) > self.device_seconds
            return self.stopped

        return stop_early

    def allows_next(self, store: Store, study_id: int, evaluation_ids: Sequence[int]) -> bool:
        """Whether the next of some evaluations fits, beside those that others are measuring now."""
        efforts = store.efforts(study_id)
        wanted = set(evaluation_ids)
        waiting = [item for item in efforts if item.status == "pending" and item.evaluation_id in wanted]
        if not waiting:
            return True
        following = min(waiting, key=lambda item: (item.priority, item.evaluation_id))
        taken = sum(item.device_seconds for item in self._models.values())
        for item in efforts:
            taken += lost_device_seconds(item, efforts)
            if item.status == "finished":
                taken += seconds_of(item) * item.n_devices
            elif item.status == "running":
                taken += self._expected(item, efforts)
        if taken + self._expected(following, efforts) > self.device_seconds:
            self.stopped = True
        return not self.stopped

    def refresh(self) -> None:
        """Read again what the models took."""
        self._models = read_model_costs(self._config)

    def message(self, costs: StudyCosts | None = None) -> str:
        """What was bought, what is missing, and how to go on; without `costs`, while the models are trained."""
        costs = add_up(self._models, []) if costs is None else costs
        bought, missing = [], []
        for stage, item in costs.stages.items():
            hours = f"{item.device_seconds / 3600:.3g} h"
            if stage in ("full_model", "sparse_model"):
                bought.append(f"{_TITLES[stage]} {item.n_done:,} updates ({hours})")
                continue
            bought.append(f"{item.n_done} of {item.n_planned} {_TITLES[stage]} ({hours})")
            if item.n_done < item.n_planned:
                missing.append(f"{item.n_planned - item.n_done} {_TITLES[stage]}")
        lost = f", {costs.lost_device_seconds / 3600:.3g} h on what failed" if costs.lost_device_seconds else ""
        return (
            f"stopped before max_device_hours ({self.hours:g}) is exceeded: {costs.device_hours:.3g} device hours are "
            f"spent on {', '.join(bought)}{lost}. Missing: {', '.join(missing) or 'the rest of the models'}. To go on "
            "where it stopped, raise max_device_hours in the study or by --max_device_hours, and run the same command"
        )

    def _expected(self, item: Effort, efforts: Sequence[Effort]) -> float:
        """Device seconds of an evaluation that is not finished."""
        known = expected_device_seconds(efforts, item.method, is_empty=item.is_empty)
        return self.estimate(item.method, item.is_empty) if known is None else known

    def _read_evaluations(self) -> float:
        """Device seconds of evaluations that an earlier run recorded; before the first record there are none."""
        if not (self._config.run_dir / FILE_NAME).exists():
            return 0.0
        record = StudyRecord.read(self._config)
        with Store.open(self._config.db_url) as store:
            if not store.studies(name=record.name, dataset=record.dataset):
                return 0.0
            return add_up({}, store.efforts(record.study_id(store))).device_seconds


_NETWORK_CALL = 0.5
"""Of a training example's time, which is a call and twice that backwards: a third, and as much again for safety."""


def estimate_from_training(
    models: Mapping[str, Mapping[str, Any]], trainings: Mapping[str, TrainConfig], sampling: SampleConfig
) -> Callable[[str, bool], float]:
    """What an evaluation may take before any was measured, from the seconds that the models took.

    Measuring behaviors is not in it.

    Args:
        models: As `StudyRecord.models`.
        trainings: Settings of `full_model`, `sparse_model`, `gd` and `retrain`.
        sampling: How images are generated.

    Returns:
        Device seconds from the method and whether the coalition is empty.
    """
    per_example = {
        "retrain": _seconds_per_example(models.get("full", {}), trainings["full_model"]),
        "gd": _seconds_per_example(models.get("sparse", {}), trainings["sparse_model"]),
    }
    macs = models.get("sparse", {}).get("n_macs") or {"before": 1, "after": 1}
    if not per_example["retrain"]:  # the full model was loaded
        per_example["retrain"] = per_example["gd"] * macs["before"] / max(macs["after"], 1)
    if not per_example["gd"]:
        per_example["gd"] = per_example["retrain"]
    per_example |= {"full": per_example["retrain"], "sparse": per_example["gd"]}  # as they are: not trained
    calls_per_image = sampling.num_inference_steps * (1 if sampling.guidance_scale == 1.0 else 2)

    def estimate(method: str, is_empty: bool) -> float:
        """Device seconds of one evaluation."""
        train = None if is_empty else trainings.get(method)
        n_trained = 0 if train is None else train.n_steps * train.examples_per_step
        n_called = sampling.n_samples * calls_per_image
        return per_example.get(method, per_example["retrain"]) * (n_trained + _NETWORK_CALL * n_called)

    return estimate


def _seconds_per_example(model: Mapping[str, Any], train: TrainConfig) -> float:
    """Device seconds of one training example; 0 where nothing is known."""
    n_examples = int(model.get("n_steps") or 0) * train.examples_per_step
    return float(model.get("seconds_train") or 0.0) * int(model.get("n_processes") or 1) / max(n_examples, 1)
