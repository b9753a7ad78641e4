"""Where a study stands: read from its run folder and its store at any moment, without a network and without writing.

A run that is at work is not disturbed: the file of the store is opened for reading only, and nothing is locked,
migrated or made. So a store of an older schema is reported, not brought up to date.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from tribute.config import StudyConfig, StudyModelConfig
from tribute.errors import FitError, StoreError
from tribute.games.designs import PAIRED_DESIGNS
from tribute.games.stopping import share_half_width
from tribute.store.records import LEASE_SECONDS, Store, StoredEvaluation
from tribute.study.attribution import fit_attributions, without_tested
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.record import StudyRecord
from tribute.study.results import read_fit_evaluations
from tribute.study.run_folder import OWNER_NAME
from tribute.types import Attributions

ModelName = Literal["full", "pruned", "sparse"]
State = Literal["pending", "running", "finished", "failed"]
STATES: tuple[State, ...] = ("pending", "running", "finished", "failed")

N_RECENT = 20
"""Finished evaluations that tell the present rate."""

SILENT_SECONDS = LEASE_SECONDS / 2
"""A process that gave no sign of life for so long is named; one at work gives four in the time of a lease."""

_CHECKPOINT = re.compile(r"^ckpt_steps_(\d{8})$")


@dataclass(frozen=True)
class ModelStatus:
    """How far the training of a model is.

    Attributes:
        name: `full`, `pruned` or `sparse`.
        folder: Where its checkpoints are.
        n_steps: Steps of its last checkpoint; None where there is none yet.
        n_steps_planned: Steps that it takes in all; 0 for pruning, which has none.
        saved: When the last checkpoint was written, seconds since the epoch.
        seconds_train: Seconds that its training took up to that checkpoint, where it says.
        loaded: Whence it is loaded instead of trained.
    """

    name: ModelName
    folder: Path
    n_steps: int | None
    n_steps_planned: int
    saved: float | None = None
    seconds_train: float = 0.0
    loaded: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether it is there with all its steps."""
        return self.loaded is not None or (self.n_steps is not None and self.n_steps >= self.n_steps_planned)


@dataclass(frozen=True)
class InHand:
    """An evaluation that is being measured.

    Attributes:
        what: The evaluation, for people.
        role: What it is for.
        owner: Who measures it.
        seconds: Since it was begun.
        seconds_silent: Since the last sign of life; None where none is recorded.
        is_owner_gone: The process is known to have ended: the evaluation will be measured again.
    """

    what: str
    role: str
    owner: str
    seconds: float
    seconds_silent: float | None
    is_owner_gone: bool

    @property
    def is_silent(self) -> bool:
        """Whether its process has given no sign of life for long."""
        return self.seconds_silent is not None and self.seconds_silent > SILENT_SECONDS


@dataclass(frozen=True)
class Failure:
    """An evaluation that was set aside."""

    what: str
    role: str
    attempts: int
    reason: str


@dataclass(frozen=True)
class Credit:
    """Attributions of one behavior from what is finished.

    Attributes:
        behavior_name: Which.
        higher_is_better: Its direction.
        attributions: Shapley values by the study's estimator; None where too little is measured.
        missing_reason: Why there are none.
        v_empty: Mean of the measured v(empty).
        v_grand: Mean of the measured v(grand).
        widest: Half the width of the widest 95 % interval, as a share of |v(grand) - v(empty)|; infinite if unknown.
        narrowest: The same of the narrowest.
    """

    behavior_name: str
    higher_is_better: bool = True
    attributions: Attributions | None = field(default=None, repr=False)
    missing_reason: str = ""
    v_empty: float = float("nan")
    v_grand: float = float("nan")
    widest: float = float("inf")
    narrowest: float = float("inf")


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands.

    Attributes:
        name: Of the study.
        run_dir: Its run folder.
        at: When this was read, seconds since the epoch.
        run: The `tribute run` that is at work, in words; None where none is known.
        models: Full, pruned and sparse model.
        contributor_names: `(n_contributors,)`; empty before the models are there, as what follows.
        n_examples: `(n_contributors,)`.
        counts: Number of evaluations by role and status; those that are planned and not in the store are pending.
        in_hand: What is being measured.
        failures: What was set aside.
        per_hour: Evaluations per hour, over the last ones and the time in which somebody measured; None if unknown.
        seconds_left: Of measuring what is pending, at the present rate; None if unknown.
        seconds_spent: Seconds of work so far: `models`, and by method of the evaluations.
        until_interval: Half-width at which the study stops, as a share; None: it measures everything.
        credits: Attributions by behavior.
    """

    name: str
    run_dir: Path
    at: float
    run: str | None
    models: tuple[ModelStatus, ...]
    contributor_names: tuple[str, ...] = ()
    n_examples: tuple[int, ...] = ()
    counts: Mapping[str, Mapping[State, int]] = field(default_factory=dict)
    in_hand: tuple[InHand, ...] = ()
    failures: tuple[Failure, ...] = ()
    per_hour: float | None = None
    seconds_left: float | None = None
    seconds_spent: Mapping[str, float] = field(default_factory=dict)
    until_interval: float | None = None
    credits: tuple[Credit, ...] = ()

    def n(self, *states: State) -> int:
        """Number of evaluations with one of these states, or of all."""
        return sum(by_state[state] for by_state in self.counts.values() for state in states or STATES)

    @property
    def stage(self) -> str:
        """What the study is at: `not begun`, a model such as `full_model`, `plan`, `coalitions`, or `complete`."""
        if self.counts:
            return "coalitions" if self.n("pending", "running") else "complete"
        if not (self.run_dir / "config.yaml").exists():
            return "not begun"
        unfinished = [model.name for model in self.models if not model.is_done]
        return f"{unfinished[0]}_model" if unfinished else "plan"

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON values; what is not known is null."""
        return {
            "study": self.name,
            "run_dir": str(self.run_dir),
            "at": self.at,
            "stage": self.stage,
            "run": self.run,
            "models": [
                {**asdict(model), "folder": str(model.folder), "is_done": model.is_done} for model in self.models
            ],
            "evaluations": {role: dict(by_state) for role, by_state in self.counts.items()},
            "in_hand": [{**asdict(item), "is_silent": item.is_silent} for item in self.in_hand],
            "failures": [asdict(item) for item in self.failures],
            "per_hour": self.per_hour,
            "seconds_left": self.seconds_left,
            "seconds_spent": dict(self.seconds_spent),
            "until_interval": self.until_interval,
            "behaviors": [self._credit_as_json(item) for item in self.credits],
        }

    def _credit_as_json(self, item: Credit) -> dict[str, Any]:
        values: dict[str, Any] = {
            "name": item.behavior_name,
            "higher_is_better": item.higher_is_better,
            "v_empty": _number(item.v_empty),
            "v_grand": _number(item.v_grand),
            "widest_half_width": _number(item.widest),
            "narrowest_half_width": _number(item.narrowest),
            "missing_reason": item.missing_reason or None,
            "n_coalitions": None,
            "contributors": [],
        }
        if (fitted := item.attributions) is not None:
            values["n_coalitions"] = fitted.n_coalitions
            values["contributors"] = [
                {"name": name, "n_examples": n, "attribution": _number(value), "interval": [_number(x) for x in bounds]}
                for name, n, value, bounds in zip(
                    self.contributor_names, self.n_examples, fitted.values, fitted.intervals(), strict=True
                )
            ]
        return values


def _number(value: float) -> float | None:
    """A number for JSON, which knows no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


def read_status(config: StudyConfig) -> StudyStatus:
    """Where a study stands now.

    Raises:
        StoreError: Its record or its store cannot be read, or the store is of another schema.
        MixedResultsError: The store holds the study with other data.
    """
    status = StudyStatus(
        name=config.name,
        run_dir=config.run_dir,
        at=time.time(),
        run=run_at_work(config.run_dir),
        models=model_statuses(config),
        until_interval=config.fit.until_interval,
    )
    spent = {"models": sum(model.seconds_train for model in status.models)}
    if not (config.run_dir / "study.json").exists():
        return replace(status, seconds_spent=spent)
    record = StudyRecord.read(config)
    status = replace(status, contributor_names=record.contributor_names, n_examples=record.n_examples)
    planned = {role: len(identities) for role, identities in record.evaluations.items()}
    nothing_yet = {role: {**dict.fromkeys(STATES, 0), "pending": n} for role, n in planned.items()}
    if not store_exists(config):
        return replace(status, counts=nothing_yet, seconds_spent=spent)
    with open_to_read(config) as store:
        if not store.studies(name=record.name, dataset=record.dataset):
            return replace(status, counts=nothing_yet, seconds_spent=spent)
        study_id, evaluation_ids = record.study_id(store), record.evaluation_ids(store)
        items = store.find(study_id, evaluation_ids=evaluation_ids)
        in_hand = read_in_hand(store, study_id, evaluation_ids, status.at)
        finished = [item for item in items if item.status == "finished"]
        counts = {role: dict.fromkeys(STATES, 0) for role in planned}
        for item in items:
            counts.setdefault(item.spec.role or "fit", dict.fromkeys(STATES, 0))[item.status] += 1
        for role, n in planned.items():
            counts[role]["pending"] += max(0, n - sum(counts[role].values()))
        per_hour, seconds_left = rate_and_time_left(finished, _pending(record, items))
        for item in finished:
            spent[item.spec.method] = spent.get(item.spec.method, 0.0) + sum(item.seconds.values())
        return replace(
            status,
            counts=counts,
            in_hand=in_hand,
            failures=tuple(
                Failure(str(item.spec), item.spec.role or "fit", item.attempts, item.error or "not recorded")
                for item in items
                if item.status == "failed"
            ),
            per_hour=per_hour,
            seconds_left=seconds_left,
            seconds_spent=spent,
            credits=tuple(read_credit(config, record, store, study_id, evaluation_ids, n) for n in record.behaviors),
        )


def _pending(record: StudyRecord, items: Sequence[StoredEvaluation]) -> dict[str, int]:
    """Evaluations that are still to be measured, by method: test coalitions are retrained, all others fine-tuned."""
    settled = {item.spec.identity for item in items if item.status in ("finished", "failed")}
    left: dict[str, int] = {}
    for role, identities in record.evaluations.items():
        method = "retrain" if role == "test" else "gd"
        left[method] = left.get(method, 0) + sum(identity not in settled for identity in identities)
    return {method: n for method, n in left.items() if n}


def rate_and_time_left(
    finished: Sequence[StoredEvaluation], pending: Mapping[str, int]
) -> tuple[float | None, float | None]:
    """The present rate, and how long what is pending takes at it.

    The rate is that of the last evaluations over the time in which at least one of them was being measured, so that
    a night in which nothing ran does not count, and several workers do.

    Args:
        finished: Evaluations with the times of their start and end.
        pending: Number of evaluations to measure, by method.

    Returns:
        Evaluations per hour and seconds; None where nothing finished tells.
    """
    timed = sorted(
        (item for item in finished if item.started is not None and item.finished is not None),
        key=lambda item: item.finished or 0.0,
    )
    recent = timed[-N_RECENT:]
    intervals = sorted((item.started or 0.0, item.finished or 0.0) for item in recent)
    busy, end = 0.0, -np.inf
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    if not recent or busy <= 0.0:
        return None, None
    n_at_once = sum(stop - start for start, stop in intervals) / busy
    seconds: dict[str, float] = {}
    for method in {item.spec.method for item in timed}:
        # The empty coalition trains nothing, so it tells little about the others.
        of_method = [item for item in timed if item.spec.method == method]
        telling = [item for item in of_method if item.spec.coalition_mask.any()] or of_method
        seconds[method] = float(np.median([(i.finished or 0.0) - (i.started or 0.0) for i in telling[-N_RECENT:]]))
    slowest = max(seconds.values())
    left = sum(n * seconds.get(method, slowest) for method, n in pending.items()) / n_at_once
    return 3600.0 * len(recent) / busy, left


def read_in_hand(store: Store, study_id: int, evaluation_ids: Sequence[int], now: float) -> tuple[InHand, ...]:
    """What is being measured, by whom, and when each process gave its last sign of life."""
    wanted = set(evaluation_ids)
    return tuple(
        InHand(
            what=str(item.spec),
            role=item.spec.role or "fit",
            owner=item.owner,
            seconds=max(0.0, now - item.started),
            seconds_silent=None if item.heartbeat is None else max(0.0, now - item.heartbeat),
            is_owner_gone=item.is_owner_gone,
        )
        for item in store.running(study_id)
        if item.evaluation_id in wanted
    )


def read_credit(
    config: StudyConfig,
    record: StudyRecord,
    store: Store,
    study_id: int,
    evaluation_ids: list[int],
    behavior_name: str,
) -> Credit:
    """Attributions of a behavior by the study's estimator, as `tribute run` would give them with what is finished."""
    try:
        fit, end_points = read_fit_evaluations(store, study_id, evaluation_ids, behavior_name)
        test = store.read(behavior_name=behavior_name, study_id=study_id, role="test", evaluation_ids=evaluation_ids)
        masks, behaviors = fit.masks, fit.behaviors
        design = config.fit.design_name
        if len(test):
            masks, behaviors, _ = without_tested(masks, behaviors, test.masks, paired=design in PAIRED_DESIGNS)
        fitted = fit_attributions(
            masks,
            behaviors,
            end_points,
            design=design,
            estimator=config.estimator,
            contributor_names=record.contributor_names,
        )
    except FitError as error:
        return Credit(behavior_name, missing_reason=str(error))
    low, high = fitted.intervals().T
    total = abs(float(fitted.values.sum()))
    narrowest = float(np.min(high - low)) / 2.0 / total if total > 0.0 else float("inf")
    return Credit(
        behavior_name,
        higher_is_better=bool((fit.definition or {}).get("higher_is_better", True)),
        attributions=fitted,
        v_empty=float(end_points.empty.mean()),
        v_grand=float(end_points.grand.mean()),
        widest=share_half_width(fitted),
        narrowest=narrowest,
    )


def model_folders(config: StudyConfig) -> dict[ModelName, Path]:
    """Where the checkpoints of a study's models are, in the order in which they are made."""
    dataset, pruning = dataset_folder(config.dataset), pruning_name(config.prune)
    return {
        "full": models_dir(config.run_dir, dataset, "retrain", "full"),
        "pruned": models_dir(config.run_dir, dataset, "pruned", pruning),
        "sparse": models_dir(config.run_dir, dataset, "prune_fine_tune", pruning, "full"),
    }


def model_statuses(config: StudyConfig) -> tuple[ModelStatus, ...]:
    """How far the models of a study are, by their checkpoints."""
    preset = config.load_preset()
    stages: dict[ModelName, tuple[str, StudyModelConfig]] = {
        "full": ("retrain", config.full_model),
        "sparse": ("prune_fine_tune", config.sparse_model),
    }
    found = []
    for name, folder in model_folders(config).items():
        planned = 0
        if name in stages:
            method, changes = stages[name]
            planned = preset.train_config(method, n_steps=changes.n_steps).n_steps
        loaded = config.full_model.load if name == "full" else None
        checkpoints = checkpoint_folders(folder)
        if not checkpoints:
            found.append(ModelStatus(name, folder, None, planned, loaded=loaded))
            continue
        last = checkpoints[-1]
        seconds, saved = 0.0, None
        try:
            meta = json.loads((last / "config.json").read_text(encoding="utf-8"))
            seconds, saved = float(meta.get("seconds_train") or 0.0), (last / "config.json").stat().st_mtime
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # the run will say that it is damaged
        found.append(ModelStatus(name, folder, steps_of(last), planned, saved, seconds, loaded))
    return tuple(found)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints below a folder, fewest steps first; links are not followed."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _CHECKPOINT.match(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def steps_of(checkpoint: Path) -> int:
    """Steps of a checkpoint, by its name."""
    found = _CHECKPOINT.match(checkpoint.name)
    return int(found[1]) if found else 0


def run_at_work(run_dir: Path) -> str | None:
    """The process that works in a run folder, in words; None where none is, as far as this host can tell.

    The lock itself is left alone: taking it for a moment could turn a run away that begins in that moment.
    """
    try:
        found = json.loads((run_dir / OWNER_NAME).read_text())
        host, pid, since = str(found["host"]), int(found["pid"]), str(found["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if host == platform.node() and not _lives(pid):
        return None
    return f"process {pid} on {host} since {since[:19]} UTC"


def _lives(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def store_exists(config: StudyConfig) -> bool:
    """Whether the store is there already; that of a server is taken to be."""
    return "://" in config.db_url or Path(config.db_url).expanduser().exists()


@contextmanager
def open_to_read(config: StudyConfig) -> Iterator[Store]:
    """The store of a study, opened for reading only: nothing is migrated, made or locked, in a file or on a server.

    SQLite itself may leave its two empty helper files beside one that nobody else has open.

    Raises:
        StoreError: It is missing, or of another schema.
    """
    if "://" in config.db_url:
        with Store.open(config.db_url, create=False, read_only=True) as store:
            yield store
        return
    path = Path(config.db_url).expanduser()
    if not path.exists():
        raise StoreError(f"{path} is not there: expected the store of the study. Run tribute run first")
    options = "mode=ro&uri=true"
    if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        options += "&immutable=1"  # its helper files cannot be made, and nobody of this user can write
    location = f"sqlite:///file:{quote(str(path.resolve()))}?{options}"
    try:
        with Store.open(location, create=False, read_only=True) as store:
            location = store.location
            yield store
    except StoreError as error:
        text = str(error).replace(location, str(path))
        raise StoreError(re.sub(r"sqlite:///file\S*", str(path), text)) from error
