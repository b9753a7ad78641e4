"""Evaluations as records: what is to be measured, who measures it, and what came out.

An evaluation goes from `pending` to `running` (claimed by one process, for the time of a lease) to
`finished` or `failed`. Its identity is unique in its study, so asking for it twice measures it once. All
queries are here; what leaves this file are dataclasses and arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Engine,
    Integer,
    LargeBinary,
    Row,
    Select,
    String,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    false,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.engine import Connection

from tribute.errors import BehaviorError, CoalitionError, MixedResultsError, StoreError
from tribute.store import database, tables
from tribute.store.patience import Patience
from tribute.store.tables import artifact, behavior, contributor, evaluation, study
from tribute.types import Behaviors, CoalitionMask, CoalitionMasks

Status = Literal["pending", "running", "finished", "failed"]

Result = TypeVar("Result")

LEASE_SECONDS = 900.0
"""How long a claim lasts without a heartbeat."""

_IDENTIFYING = (
    "exp_name",
    "dataset",
    "method",
    "removal_dist",
    "datamodel_alpha",
    "removal_seed",
    "opt_seed",
    "settings",
)
_SPEC_COLUMNS = (*_IDENTIFYING, "role", "priority")  # with the coalition, all that makes a specification
_SINGLE_IMAGE = "generated_image_"  # behaviors of single images begin so
_CHUNK = 500  # identities per query, far below the 32,766 variables that SQLite allows
_FEW = 50  # numbers, or runs of numbers, that a condition lists one by one
_SPARSE = 64  # one number in so many is sent as that many bits; of rarer ones the decimal digits are shorter
# Statements of every evaluation, built once. Their parameters `at_...` are keys, the others are columns.
_AT_ID = evaluation.c.id == bindparam("at_id")
_CLAIM = (
    update(evaluation)
    .where(_AT_ID)
    .values(
        status="running",
        error=None,
        **{
            name: bindparam(name)
            for name in ("attempts", "owner", "owner_token", "lease_expires", "heartbeat", "started")
        },
    )
)
_RESULT = {name: bindparam(name) for name in ("finished", "seconds", "provenance")}
_FINISH = (
    update(evaluation)
    .where(_AT_ID, evaluation.c.owner_token == bindparam("at_token"), evaluation.c.status == "running")
    .values(status="finished", error=None, lease_expires=None, **_RESULT)
)
_FINISH_ANY = (
    update(evaluation)
    .where(_AT_ID)
    .values(status="finished", error=None, lease_expires=None, owner=None, owner_token=None, **_RESULT)
)
_UNCLAIMED: Mapping[str, Any] = {
    "status": "pending",
    "owner": None,
    "owner_token": None,
    "lease_expires": None,
    "heartbeat": None,
}


class Unfiltered(Enum):
    """Says that a filter is off, where None is itself a value to filter by."""

    ANY = "any"


ANY = Unfiltered.ANY


class Filters(TypedDict, total=False):
    """Which evaluations are meant; a filter that is missing, or None but for `removal_dist`, is off.

    Attributes:
        dataset: On this dataset.
        exp_name: Of this experiment.
        method: Measured by this method.
        removal_dist: Drawn from this distribution; None: not drawn at all; `ANY`: off.
        datamodel_alpha: With this fraction of contributors.
        opt_seed: With this training seed.
        role: With this role.
        roles: With one of these roles.
        statuses: With one of these statuses.
        evaluation_ids: With one of these numbers.
    """

    dataset: str | None
    exp_name: str | None
    method: str | None
    removal_dist: str | Unfiltered | None
    datamodel_alpha: float | None
    opt_seed: int | None
    role: str | None
    roles: Sequence[str] | None
    statuses: Sequence[Status] | None
    evaluation_ids: Sequence[int] | None


@dataclass(frozen=True)
class Study:
    """A dataset divided among contributors; evaluations of one study can be fitted together.

    Attributes:
        name: Chosen by the user; unique together with `dataset`.
        dataset: Name of the training data.
        contributor_names: `(n_contributors,)`, by contributor index.
        n_examples: `(n_contributors,)`, training examples that each contributor owns.
        fingerprint: Of the data and of who owns which example.
        config: The resolved configuration, where one was given.
        study_id: Its number in the store; None before it is stored.
    """

    name: str
    dataset: str
    contributor_names: tuple[str, ...]
    n_examples: tuple[int, ...]
    fingerprint: str
    config: Mapping[str, Any] | None = field(default=None, compare=False)
    study_id: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.contributor_names or len(self.contributor_names) != len(self.n_examples):
            raise StoreError(
                f"Study {self.name!r} needs one name and one number of examples for each contributor; found "
                f"{len(self.contributor_names)} names and {len(self.n_examples)} numbers."
            )
        for name in self.contributor_names:
            try:
                name.encode()
            except UnicodeEncodeError as error:  # e.g. a folder whose name is not UTF-8
                raise StoreError(
                    f"Contributor names must be Unicode text; found {name!r}. Rename the contributor."
                ) from error

    @property
    def n_contributors(self) -> int:
        return len(self.contributor_names)


@dataclass(frozen=True)
class Contributor:
    """A contributor of a study, with the number of training examples it owns."""

    contributor_idx: int
    contributor_name: str
    n_examples: int


@dataclass(frozen=True, eq=False)
class EvaluationSpec:
    """One coalition to be measured, with all that determines the result.

    Two specifications are equal when their identities are; role and priority do not count.

    Attributes:
        exp_name: The user's name for the experiment.
        dataset: Name of the training data.
        method: How the coalition's model is obtained, e.g. `gd` or `retrain`.
        removal_dist: Law from which the coalition was drawn; None where it was chosen, e.g. everybody.
        datamodel_alpha: Fraction of contributors kept, for the `datamodel` distribution.
        removal_seed: Which draw it is. In the identity, so that a coalition drawn twice is measured twice.
        coalition_mask: `(n_contributors,)` bool; True where the contributor is present. May be empty.
        opt_seed: Seed of training.
        settings: All else that determines the result (model hash, steps, sampler, number of images, ...), as
            plain JSON values.
        role: What the evaluation is for: `fit`, `test`, `empty`, `grand`, `loo`, ...
        priority: Lower is claimed first.

    Raises:
        CoalitionError: The mask is not a bool vector.
        StoreError: The settings are not plain JSON values.
    """

    exp_name: str
    dataset: str
    method: str
    removal_dist: str | None
    datamodel_alpha: float | None
    removal_seed: int | None
    coalition_mask: CoalitionMask
    opt_seed: int
    settings: Mapping[str, Any]
    role: str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        mask = np.array(self.coalition_mask)
        if mask.ndim != 1 or mask.size == 0 or mask.dtype != np.bool_:
            raise CoalitionError(
                "A coalition mask is a bool vector with one element per contributor; found shape "
                f"{mask.shape} of {mask.dtype}."
            )
        mask.setflags(write=False)
        plain = {
            "coalition_mask": mask,
            "datamodel_alpha": None if self.datamodel_alpha is None else float(self.datamodel_alpha),
            "removal_seed": None if self.removal_seed is None else int(self.removal_seed),
            "opt_seed": int(self.opt_seed),
            "priority": int(self.priority),
            "settings": _plain(self.settings, "settings"),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all fields but role and priority, as canonical JSON."""
        content = {name: getattr(self, name) for name in _IDENTIFYING}
        content["coalition"] = _mask_to_text(self.coalition_mask)
        return hashlib.sha256(_canonical_json(content, "settings").encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EvaluationSpec) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        drawn = "" if self.removal_dist is None else f", {self.removal_dist} seed {self.removal_seed}"
        return f"{self.exp_name}/{self.method}{drawn}, training seed {self.opt_seed}"


@dataclass(frozen=True)
class ClaimedEvaluation:
    """An evaluation that this process may measure until its lease ends; `Store.heartbeat` extends it."""

    evaluation_id: int
    study_id: int
    spec: EvaluationSpec
    attempts: int
    lease_seconds: float
    token: str = field(repr=False)


@dataclass(frozen=True)
class FinishedEvaluation:
    """An evaluation with its result.

    Attributes:
        spec: What was measured.
        behaviors: Value by behavior name, raw and finite.
        seconds: Seconds by stage; `train` and `sample` are the ones that are exchanged and tabulated.
        provenance: Where the result comes from, e.g. versions and device: plain JSON values.
        definitions: By behavior name: unit, direction and variant.
    """

    spec: EvaluationSpec
    behaviors: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    definitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredEvaluation(FinishedEvaluation):
    """An evaluation as the store has it, whatever its status.

    Attributes:
        evaluation_id: Its number in the store.
        study_id: The study it belongs to.
        status: `pending`, `running`, `finished` or `failed`.
        attempts: How often it was claimed and not released.
        error: Why it failed.
        owner: The process that claimed it last, for people.
        created: Seconds since the epoch, as `started`, `heartbeat` and `finished`.
        heartbeat: When the last claim gave its last sign of life.
    """

    evaluation_id: int = field(kw_only=True)
    study_id: int = field(kw_only=True)
    status: Status = field(kw_only=True)
    attempts: int = field(kw_only=True)
    error: str | None = field(kw_only=True)
    owner: str | None = field(kw_only=True)
    created: float = field(kw_only=True)
    started: float | None = field(kw_only=True)
    heartbeat: float | None = field(kw_only=True)
    finished: float | None = field(kw_only=True)


@dataclass(frozen=True)
class RunningEvaluation:
    """An evaluation in hand, and what is known of the process that has it.

    Attributes:
        evaluation_id: Its number in the store.
        study_id: The study it belongs to.
        spec: What is measured.
        attempts: How often it was claimed and not released.
        owner: The process that claimed it, for people.
        started: When it was claimed, seconds since the epoch.
        heartbeat: Last sign of life, seconds since the epoch; None where a version before heartbeats claimed it.
        lease_left: Seconds until others may claim it; negative where they may already.
        is_owner_gone: The process is known to have ended. False also where this host cannot know.
    """

    evaluation_id: int
    study_id: int
    spec: EvaluationSpec
    attempts: int
    owner: str
    started: float
    heartbeat: float | None
    lease_left: float
    is_owner_gone: bool

    @property
    def is_alive(self) -> bool:
        """Whether nobody else may claim it yet."""
        return self.lease_left > 0 and not self.is_owner_gone


@dataclass(frozen=True, eq=False)
class EvaluationTable:
    """One behavior of many finished evaluations, ordered by removal seed, training seed and number.

    Attributes:
        behavior_name: Which behavior.
        definition: Its unit, direction and variant, where stored; the same for all rows.
        study_id: The study of all rows; None when there are none.
        masks: `(n_evaluations, n_contributors)` bool.
        behaviors: `(n_evaluations,)`, raw.
        removal_seeds: `(n_evaluations,)` int; -1 where the coalition was not drawn.
        opt_seeds: `(n_evaluations,)` int.
        seconds_train: `(n_evaluations,)`; NaN where not recorded.
        seconds_sample: `(n_evaluations,)`; NaN where not recorded.
        evaluation_ids: `(n_evaluations,)` int.
        settings: Settings of each evaluation.
    """

    behavior_name: str
    definition: Mapping[str, Any] | None
    study_id: int | None
    masks: CoalitionMasks
    behaviors: Behaviors
    removal_seeds: npt.NDArray[np.int64]
    opt_seeds: npt.NDArray[np.int64]
    seconds_train: npt.NDArray[np.float64]
    seconds_sample: npt.NDArray[np.float64]
    evaluation_ids: npt.NDArray[np.int64]
    settings: list[dict[str, Any]]
    contents: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.behaviors)

    def describe(self) -> str:
        """What the table holds or, when nothing matched, what the store holds instead."""
        if len(self):
            return f"{len(self)} evaluations of {self.behavior_name} with {self.masks.shape[1]} contributors"
        return self.contents


@dataclass(frozen=True)
class Effort:
    """What an evaluation has taken, whatever its status; `Store.efforts` reads it without the behaviors.

    Attributes:
        evaluation_id: Its number in the store.
        role: What it is for.
        method: How the coalition's model is obtained.
        is_empty: Whether nobody is in its coalition.
        priority: Lower is claimed first.
        status: `pending`, `running`, `finished` or `failed`.
        attempts: How often it was claimed and not released.
        seconds: Seconds by stage, once it is finished.
        seconds_failed: Wall-clock seconds of the last attempt, where that failed.
        n_devices: Devices that measured it together: processes, times the share of a device that each takes.
    """

    evaluation_id: int
    role: str | None
    method: str
    is_empty: bool
    priority: int
    status: Status
    attempts: int
    seconds: Mapping[str, float]
    seconds_failed: float | None = None
    n_devices: float = 1.0


@dataclass(frozen=True)
class Artifact:
    """A file that a study made."""

    kind: str
    path: str
    sha256: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class _Search:
    """What is to be claimed, for one set of filters."""

    filters: Mapping[str, Any]
    pending: Select[Any]
    owners: Select[Any, Any]  # of what is running, with the end of the first lease
    abandoned: Select[Any]  # parameters: now, gone


class Store:
    """Studies and their evaluations in a database; a context manager.

    Safe for many processes at once, on one host with SQLite and on many with PostgreSQL. Every write is one
    short transaction: after a crash it has happened or it has not. While the database is locked or does not answer,
    every method tries again for as long as `patience` says, and then raises `StoreError`; so it does at once where
    waiting cannot help, as on a full disk. Threads may share a store.
    """

    def __init__(self, engine: Engine, *, patience: Patience | None = None) -> None:
        self._engine = engine
        self._writing_engine = database.writer(engine)
        self._patience = patience or Patience()
        self._last_search: _Search | None = None
        self._is_file = database.database_file(engine.url) is not None

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        create: bool = True,
        patience: Patience | None = None,
        read_only: bool = False,
    ) -> Store:
        """Open the store at `location`; one of an older schema is migrated.

        Args:
            location: Path of a SQLite file (its folders are made), or an SQLAlchemy URL.
            create: Make what is missing. False also opens a file that may only be read.
            patience: With a database that is locked or does not answer; 90 s by default.
            read_only: Migrate nothing, and let a server refuse whatever writes. For a SQLite file see
                `study.status.open_to_read`.

        Raises:
            StoreError: `location` is a directory, not writable, on a network file system, not a database, of
                something else, of a newer schema, of an older one that may not be written, or missing with
                `create=False`.
        """
        patience = patience or Patience()
        engine = database.open_database(location, create=create, patience=patience, read_only=read_only)
        return cls(engine, patience=patience)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def location(self) -> str:
        """The path of the file, or the URL without its password."""
        return database.shown(self._engine.url)

    @property
    def serves_many_hosts(self) -> bool:
        """Whether it is a server's database, which processes on several hosts may share; SQLite is not."""
        return self._engine.url.get_backend_name() != "sqlite"

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def in_transaction(self, work: Callable[[Connection, int], Result], *, writes: bool) -> Result:
        """What `work` returns, called within one transaction; again while the database does not answer.

        Args:
            work: Called with the connection and the number of the attempt, from 0. An earlier attempt either did not
                happen or happened without its answer arriving: `work` must give the same result after both.
            writes: Whether it changes anything.
        """
        engine = self._writing_engine if writes else self._engine

        def attempt(number: int) -> Result:
            with engine.begin() as connection:
                return work(connection, number)

        return self._patience.insist(attempt, self.location)

    def _read(self, work: Callable[[Connection], Result]) -> Result:
        return self.in_transaction(lambda connection, _number: work(connection), writes=False)

    def _write(self, work: Callable[[Connection], Result]) -> Result:
        return self.in_transaction(lambda connection, _number: work(connection), writes=True)

    # Studies

    def open_study(
        self,
        name: str,
        *,
        dataset: str,
        contributor_names: Sequence[str],
        n_examples: Sequence[int],
        fingerprint: str,
        config: Mapping[str, Any] | None = None,
    ) -> int:
        """Return the number of the study, which is made when it is new.

        The configuration is kept from the first call that gives one; `studies` returns it for comparison.

        Raises:
            MixedResultsError: The study exists with other contributors.
        """
        asked = Study(name, dataset, tuple(contributor_names), tuple(int(n) for n in n_examples), fingerprint, config)
        return self._write(lambda connection: open_study_in(connection, asked))

    def studies(self, *, name: str | None = None, dataset: str | None = None) -> list[Study]:
        """The studies with this name and dataset, all by default, in the order they were made."""
        return self._read(
            lambda connection: [
                Study(
                    name=row.name,
                    dataset=row.dataset,
                    contributor_names=tuple(c.contributor_name for c in members),
                    n_examples=tuple(c.n_examples for c in members),
                    fingerprint=row.fingerprint,
                    config=row.config,
                    study_id=row.id,
                )
                for row in connection.execute(select(study).order_by(study.c.id)).all()
                if name in (None, row.name) and dataset in (None, row.dataset)
                for members in [_contributors(connection, row.id)]
            ]
        )

    def contributors(self, study_id: int) -> list[Contributor]:
        """The contributors of a study, by index."""
        members = self._read(lambda connection: _contributors(connection, study_id))
        if not members:
            raise _unknown_study(study_id)
        return members

    # Evaluations: what is to be done

    def add(self, study_id: int, specs: Iterable[EvaluationSpec]) -> list[int]:
        """Ask for evaluations; those that the study has already are left as they are.

        Returns:
            Their numbers, in the order of `specs`.

        Raises:
            CoalitionError: A coalition has not one element per contributor.
            MixedResultsError: One is of another dataset, or is stored with another role.
        """
        asked = list(specs)
        return self._write(lambda connection: _add(connection, study_id, asked))

    def ids_of(self, study_id: int, identities: Sequence[str]) -> dict[str, int]:
        """Numbers of those evaluations that the study has, by identity, in the order asked for."""
        wanted = list(dict.fromkeys(identities))
        found = self._read(lambda connection: _by_identity(connection, study_id, wanted))
        return {identity: found[identity].id for identity in identities if identity in found}

    def claim(
        self,
        study_id: int | None = None,
        *,
        lease_seconds: float = LEASE_SECONDS,
        **filters: Unpack[Filters],
    ) -> ClaimedEvaluation | None:
        """Take the next evaluation to be measured, by priority and number.

        Next is one that is pending, or one whose owner is gone: its process on this host has ended, or its
        lease has run out.

        Returns:
            The evaluation, which nobody else gets while the lease lasts; None when there is nothing to do.
        """
        token = uuid.uuid4().hex
        search = self._search(study_id, filters)

        def take(connection: Connection, number: int) -> Row | None:
            now = time.time()
            # An attempt before this one may have claimed, and only its answer was lost.
            mine = evaluation.c.status == "running", evaluation.c.owner_token == token
            if number and (row := connection.execute(select(evaluation).where(*mine)).one_or_none()) is not None:
                return row
            row = self._next(connection, search, now)
            if row is not None:
                claim = {
                    "at_id": row.id,
                    "attempts": row.attempts + 1,
                    "owner": _process(os.getpid()),
                    "owner_token": token,
                    "lease_expires": now + lease_seconds,
                    "heartbeat": now,
                    "started": now,
                }
                connection.execute(_CLAIM, claim)
            return row

        row = self.in_transaction(take, writes=True)
        if row is None:
            return None
        n_attempts = row.attempts + (row.owner_token != token)
        return ClaimedEvaluation(row.id, row.study_id, _spec(row), n_attempts, lease_seconds, token)

    def _search(self, study_id: int | None, filters: Filters) -> _Search:
        """The statements that find what is to be claimed; those of the last call again where nothing changed.

        To build them takes longer than to execute them.
        """
        ids = filters.get("evaluation_ids")
        given = {**filters, "study_id": study_id, "evaluation_ids": None if ids is None else tuple(ids)}
        last = self._last_search
        if last is None or last.filters != given:
            where = self._where(study_id, filters)
            owner = cast(evaluation.c.owner, String)
            is_running = evaluation.c.status == "running"
            ordered = select(evaluation).where(*where).order_by(evaluation.c.priority, evaluation.c.id).limit(1)
            ordered = ordered.with_for_update(skip_locked=True)
            is_free = or_(evaluation.c.lease_expires <= bindparam("now"), owner.in_(bindparam("gone", expanding=True)))
            last = _Search(
                filters=given,
                pending=ordered.where(evaluation.c.status == "pending"),
                owners=select(owner.label("owner"), func.min(evaluation.c.lease_expires).label("first"))
                .where(is_running, *self._where(study_id, {}))  # of more than is asked for, for that takes no time
                .group_by(owner),
                abandoned=ordered.where(is_running, is_free),
            )
            self._last_search = last
        return last

    def _next(self, connection: Connection, search: _Search, now: float) -> Row | None:
        """The evaluation to be claimed next, locked where the database locks rows."""
        pending = connection.execute(search.pending).one_or_none()
        owners = connection.execute(search.owners).all()
        gone = [row.owner for row in owners if _is_gone(json.loads(row.owner), is_file=self._is_file)]
        if not gone and all(row.first > now for row in owners):
            return pending
        abandoned = connection.execute(search.abandoned, {"now": now, "gone": gone}).one_or_none()
        found = [row for row in (pending, abandoned) if row is not None]
        return min(found, key=lambda row: (row.priority, row.id), default=None)

    def heartbeat(self, claimed: ClaimedEvaluation) -> bool:
        """Give a sign of life: the lease lasts `lease_seconds` from now. False when this claim has lost it."""
        return not self.heartbeat_all([claimed])

    def heartbeat_all(self, claims: Iterable[ClaimedEvaluation]) -> set[int]:
        """Give a sign of life for many claims at once, from any thread.

        Returns:
            Numbers of the evaluations that are no longer these claims'.
        """
        # In one order everywhere, so that two of these cannot wait for each other.
        claims = sorted(claims, key=lambda claimed: claimed.evaluation_id)

        def beat(connection: Connection) -> set[int]:
            now = time.time()
            return {
                claimed.evaluation_id
                for claimed in claims
                if not _update_claimed(connection, claimed, lease_expires=now + claimed.lease_seconds, heartbeat=now)
            }

        return self._write(beat) if claims else set()

    def finish(
        self,
        claimed: ClaimedEvaluation,
        behaviors: Mapping[str, float],
        *,
        seconds: Mapping[str, float],
        provenance: Mapping[str, Any],
        definitions: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Record the result of a claimed evaluation; a second time with the same values changes nothing.

        Args:
            claimed: What `claim` returned.
            behaviors: Value by behavior name, raw.
            seconds: Seconds by stage: `train`, `sample`, ...
            provenance: Versions, device and the like: plain JSON values.
            definitions: By behavior name: unit, direction and variant.

        Raises:
            BehaviorError: There is no behavior, or one is not a finite number. Nothing was written.
            StoreError: Another process has the evaluation now. Nothing was written.
            MixedResultsError: This claim was finished before with other values.
        """
        result = FinishedEvaluation(
            claimed.spec,
            _finite(behaviors, claimed.spec),
            _plain(seconds, "seconds"),
            _plain(provenance, "provenance"),
            _plain(definitions or {}, "definitions"),
        )

        def record(connection: Connection) -> None:
            if _write_result(connection, claimed.evaluation_id, result, of_claim=claimed.token):
                return
            row = _locked(connection, claimed.evaluation_id)
            if row is None or row.owner_token != claimed.token or row.status != "finished":
                raise _lost(claimed, row)
            _check_same_values(connection, row.id, result)

        self._write(record)

    def fail(self, claimed: ClaimedEvaluation, error: str, *, max_attempts: int = 1) -> None:
        """Count a failed attempt at a claimed evaluation.

        Args:
            claimed: What `claim` returned.
            error: The reason.
            max_attempts: After fewer attempts it can be claimed again, at once; else it is set aside with the reason,
                and `retry` brings it back.

        Raises:
            StoreError: Another process has the evaluation now.
        """
        # Databases refuse half characters, as names of files may have them, and PostgreSQL refuses NUL.
        text = error.encode(errors="backslashreplace").decode().replace("\0", "\\0")

        is_last = claimed.attempts >= max_attempts

        def set_aside(connection: Connection, number: int) -> None:
            values = {"status": "failed", "finished": time.time()} if is_last else _UNCLAIMED
            if _update_claimed(connection, claimed, error=text, **values):
                return
            row = _locked(connection, claimed.evaluation_id)
            # An attempt before this one may have happened, and only its answer was lost.
            done = ("failed", claimed.token) if is_last else ("pending", None)
            if not (number and row is not None and (row.status, row.owner_token) == done):
                raise _lost(claimed, row)

        self.in_transaction(set_aside, writes=True)

    def release(self, claimed: ClaimedEvaluation) -> bool:
        """Give a claimed evaluation back unmeasured, uncounted; False when it was no longer this claim's."""

        def give_back(connection: Connection, number: int) -> bool:
            values = {**_UNCLAIMED, "attempts": evaluation.c.attempts - 1}
            if _update_claimed(connection, claimed, **values):
                return True
            row = _locked(connection, claimed.evaluation_id)
            return number > 0 and row is not None and row.status == "pending"

        return self.in_transaction(give_back, writes=True)

    def retry(
        self,
        study_id: int | None = None,
        *,
        max_attempts: int | None = None,
        **filters: Unpack[Filters],
    ) -> int:
        """Make failed evaluations pending again and return how many.

        Those attempted `max_attempts` times or more stay failed.
        """
        where = self._where(study_id, filters)
        if max_attempts is not None:
            where.append(evaluation.c.attempts < max_attempts)
        again = update(evaluation).where(evaluation.c.status == "failed", *where).values(**_UNCLAIMED, finished=None)
        return self._write(lambda connection: connection.execute(again).rowcount)

    def reset(self, study_id: int, **filters: Unpack[Filters]) -> int:
        """Make evaluations pending again, as if they had never been measured; results are deleted.

        Finished and failed ones are meant, and running ones whose claim is over.

        Returns:
            How many; those that were pending do not count.

        Raises:
            StoreError: One is being measured. Nothing was changed.
        """

        def forget(connection: Connection) -> int:
            ids = self._at_rest(connection, study_id, filters, "reset", evaluation.c.status != "pending")
            for chunk in _chunks(ids):
                connection.execute(delete(behavior).where(behavior.c.evaluation_id.in_(chunk)))
                values = {**_UNCLAIMED, "attempts": 0, "error": None, "started": None, "finished": None}
                values |= {"seconds": None, "provenance": None}
                connection.execute(update(evaluation).where(evaluation.c.id.in_(chunk)).values(**values))
            return len(ids)

        return self._write(forget)

    def delete(self, study_id: int, **filters: Unpack[Filters]) -> int:
        """Delete evaluations of any status, with their results, and return how many.

        Raises:
            StoreError: One is being measured. Nothing was changed.
        """

        def remove(connection: Connection) -> int:
            ids = self._at_rest(connection, study_id, filters, "deleted")
            _delete_evaluations(connection, ids)
            return len(ids)

        return self._write(remove)

    def delete_study(self, study_id: int) -> None:
        """Delete a study with its contributors, evaluations, results and the records of its files.

        A study that is not there (any more) is no error.

        Raises:
            StoreError: One of its evaluations is being measured. Nothing was changed.
        """

        def remove(connection: Connection) -> None:
            _delete_evaluations(connection, self._at_rest(connection, study_id, {}, "deleted"))
            for table in (artifact, contributor):
                connection.execute(delete(table).where(table.c.study_id == study_id))
            connection.execute(delete(study).where(study.c.id == study_id))

        self._write(remove)

    def _at_rest(
        self, connection: Connection, study_id: int, filters: Filters, to_be: str, *where: ColumnElement[bool]
    ) -> list[int]:
        """Numbers of the evaluations that match, locked; refuses those that are being measured."""
        columns = (evaluation.c[name] for name in ("id", "status", "owner", "lease_expires"))
        query = select(*columns).where(*self._where(study_id, filters), *where)
        now = time.time()
        rows = connection.execute(query.order_by(evaluation.c.id).with_for_update()).all()
        alive = [
            row
            for row in rows
            if row.status == "running" and row.lease_expires > now and not _is_gone(row.owner, is_file=self._is_file)
        ]
        if alive:
            first = alive[0]
            raise StoreError(
                f"Evaluations at rest were expected to be {to_be}; {len(alive)} of them are being measured, e.g. "
                f"{first.id} by {_shown_owner(first.owner)}. Nothing was changed: end that process, or leave them "
                "out by their status."
            )
        return [row.id for row in rows]

    def add_finished(self, results: Mapping[Study, Sequence[FinishedEvaluation]]) -> int:
        """Record results that were measured elsewhere, all or none; studies that are new are made.

        An evaluation that was still to be measured here becomes finished.

        Returns:
            How many were new.

        Raises:
            MixedResultsError: One is stored with other values, or a study has other contributors.
            BehaviorError: One has no behavior, or one that is not a finite number.
        """

        def record(connection: Connection) -> int:
            n_new = 0
            for asked, finished in results.items():
                study_id = open_study_in(connection, asked)
                ids = _add(connection, study_id, [result.spec for result in finished])
                for evaluation_id, result in zip(ids, finished, strict=True):
                    plain = FinishedEvaluation(
                        result.spec,
                        _finite(result.behaviors, result.spec),
                        _plain(result.seconds, "seconds"),
                        _plain(result.provenance, "provenance"),
                        _plain(result.definitions, "definitions"),
                    )
                    row = _locked(connection, evaluation_id)
                    if row is not None and row.status == "finished":
                        _check_same_values(connection, evaluation_id, plain)
                        continue
                    _write_result(connection, evaluation_id, plain)
                    n_new += 1
            return n_new

        return self._write(record)

    # Evaluations: what is there

    def counts(self, study_id: int | None = None, **filters: Unpack[Filters]) -> dict[Status, int]:
        """Number of evaluations by status; every status occurs."""
        where = self._where(study_id, filters)
        query = select(evaluation.c.status, func.count().label("n")).where(*where).group_by(evaluation.c.status)
        found = self._read(lambda connection: {row.status: row.n for row in connection.execute(query)})
        return {status: found.get(status, 0) for status in get_args(Status)}

    def find(self, study_id: int | None = None, **filters: Unpack[Filters]) -> list[StoredEvaluation]:
        """The evaluations that match, of any status, by number."""
        where = self._where(study_id, filters)
        measured = select(behavior).join(evaluation, evaluation.c.id == behavior.c.evaluation_id).where(*where)
        rows, behaviors = self._read(
            lambda connection: (
                connection.execute(select(evaluation).where(*where).order_by(evaluation.c.id)).all(),
                connection.execute(measured.order_by(behavior.c.name)).all(),
            )
        )
        values: dict[int, dict[str, float]] = {}
        definitions: dict[int, dict[str, Any]] = {}
        for row in behaviors:
            values.setdefault(row.evaluation_id, {})[row.name] = row.value
            if row.definition is not None:
                definitions.setdefault(row.evaluation_id, {})[row.name] = row.definition
        return [
            StoredEvaluation(
                spec=_spec(row),
                behaviors=values.get(row.id, {}),
                seconds=row.seconds or {},
                provenance=row.provenance or {},
                definitions=definitions.get(row.id, {}),
                evaluation_id=row.id,
                study_id=row.study_id,
                status=row.status,
                attempts=row.attempts,
                error=row.error,
                owner=None if row.owner is None else _shown_owner(row.owner),
                created=row.created,
                started=row.started,
                heartbeat=row.heartbeat,
                finished=row.finished,
            )
            for row in rows
        ]

    def running(self, study_id: int | None = None) -> list[RunningEvaluation]:
        """The evaluations that are in hand, by number, and what is known of the processes that have them."""
        query = select(evaluation).where(evaluation.c.status == "running", *self._where(study_id, {}))
        rows = self._read(lambda connection: connection.execute(query.order_by(evaluation.c.id)).all())
        now = time.time()
        return [
            RunningEvaluation(
                evaluation_id=row.id,
                study_id=row.study_id,
                spec=_spec(row),
                attempts=row.attempts,
                owner=_shown_owner(row.owner),
                started=row.started,
                heartbeat=row.heartbeat,
                lease_left=row.lease_expires - now,
                is_owner_gone=_is_gone(row.owner, is_file=self._is_file),
            )
            for row in rows
        ]

    def read(self, *, behavior_name: str, study_id: int | None = None, **filters: Unpack[Filters]) -> EvaluationTable:
        """One behavior of the finished evaluations that match, as arrays.

        Returns:
            The table; when nothing matches it is empty, and its `describe()` tells what the store holds.

        Raises:
            MixedResultsError: The evaluations are of several studies, or measured by different definitions.
        """
        where = self._where(study_id, {**filters, "statuses": ["finished"]})
        # Few of the columns: those that hold JSON take longer to decode than to fetch.
        names = ("id", "study_id", "removal_seed", "opt_seed", "coalition", "seconds", "settings")
        query = (
            select(*(evaluation.c[name] for name in names), behavior.c.value, behavior.c.definition)
            .join(behavior, evaluation.c.id == behavior.c.evaluation_id)
            .where(behavior.c.name == behavior_name, *where)
        )

        def select_rows(connection: Connection) -> tuple[list[Row], str]:
            found = list(connection.execute(query))
            return found, "" if found else _contents(connection)

        rows, contents = self._read(select_rows)
        # Sorted here, because databases disagree on where NULL goes.
        rows.sort(key=lambda row: (-1 if row.removal_seed is None else row.removal_seed, row.opt_seed, row.id))
        studies = sorted({row.study_id for row in rows})
        if len(studies) > 1:
            raise MixedResultsError(
                "Evaluations of one study were expected, for contributors are numbered within it; found "
                f"studies {', '.join(map(str, studies))}. Choose one by study_id, dataset or exp_name."
            )
        return EvaluationTable(
            behavior_name=behavior_name,
            definition=_one_definition(behavior_name, rows),
            study_id=studies[0] if studies else None,
            masks=np.array([_text_to_mask(row.coalition) for row in rows], dtype=bool).reshape(
                len(rows), -1 if rows else 0
            ),
            behaviors=np.array([row.value for row in rows], dtype=np.float64),
            removal_seeds=np.array(
                [-1 if row.removal_seed is None else row.removal_seed for row in rows], dtype=np.int64
            ),
            opt_seeds=np.array([row.opt_seed for row in rows], dtype=np.int64),
            seconds_train=_stage_seconds(rows, "train"),
            seconds_sample=_stage_seconds(rows, "sample"),
            evaluation_ids=np.array([row.id for row in rows], dtype=np.int64),
            settings=[row.settings for row in rows],
            contents=contents,
        )

    def efforts(self, study_id: int | None = None, **filters: Unpack[Filters]) -> list[Effort]:
        """What the evaluations that match have taken, by number; far less is read than by `find`."""
        names = ("id", "role", "method", "coalition", "priority", "status", "attempts", "started", "finished")
        columns = [evaluation.c[name] for name in (*names, "seconds", "provenance")]
        query = select(*columns).where(*self._where(study_id, filters)).order_by(evaluation.c.id)
        rows = self._read(lambda connection: connection.execute(query).all())
        return [
            Effort(
                evaluation_id=row.id,
                role=row.role,
                method=row.method,
                is_empty=not _text_to_mask(row.coalition).any(),
                priority=row.priority,
                status=row.status,
                attempts=row.attempts,
                seconds=row.seconds or {},
                seconds_failed=row.finished - row.started
                if row.status == "failed" and row.finished and row.started
                else None,
                n_devices=_n_devices(row.provenance or {}),
            )
            for row in rows
        ]

    def describe(self) -> str:
        """What the store holds, in lines for people: experiments with their status and behaviors."""
        return self._read(_contents)

    def check(self) -> list[str]:
        """What is wrong with the store, one line each; nothing where all is well.

        Looks at the file itself (SQLite), at the rules that every write keeps, and computes all identities anew.
        """
        return self._read(_faults)

    # Artifacts

    def record_artifact(
        self,
        study_id: int,
        kind: str,
        path: str | Path,
        *,
        sha256: str,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a file that the study made; the same kind and path again replaces the record."""
        key = {"study_id": study_id, "kind": kind, "path": str(path)}
        content = {"sha256": sha256, "meta": _plain(meta or {}, "meta")}

        def record(connection: Connection) -> None:
            _lock_study(connection, study_id)
            replaced = connection.execute(
                update(artifact).where(*(artifact.c[name] == value for name, value in key.items())).values(content)
            )
            if not replaced.rowcount:
                connection.execute(insert(artifact).values(**key, **content))

        self._write(record)

    def artifacts(self, study_id: int, *, kind: str | None = None) -> list[Artifact]:
        """The recorded files of a study, of one kind or of all, in the order they were first recorded."""
        query = select(artifact).where(artifact.c.study_id == study_id).order_by(artifact.c.id)
        return self._read(
            lambda connection: [
                Artifact(row.kind, row.path, row.sha256, row.meta or {})
                for row in connection.execute(query)
                if kind in (None, row.kind)
            ]
        )

    def _where(self, study_id: int | None, filters: Filters) -> list[ColumnElement[bool]]:
        """The filters as SQL conditions."""
        equal = ("dataset", "exp_name", "method", "datamodel_alpha", "opt_seed", "role")
        where = [] if study_id is None else [evaluation.c.study_id == _bindable(study_id)]
        for name in equal:
            value = filters.get(name)
            if value is not None:
                where.append(evaluation.c[name] == _bindable(value))
        for name, column in {"roles": "role", "statuses": "status"}.items():
            allowed = filters.get(name)
            if allowed is not None:
                where.append(evaluation.c[column].in_([_bindable(value) for value in allowed]))
        evaluation_ids = filters.get("evaluation_ids")
        if evaluation_ids is not None:
            where.append(_among(evaluation_ids, is_sqlite=self._engine.dialect.name == "sqlite"))
        removal_dist = filters.get("removal_dist", ANY)
        if removal_dist is not ANY:
            where.append(evaluation.c.removal_dist == removal_dist)  # SQLAlchemy turns None into IS NULL
        return where


def _update_claimed(connection: Connection, claimed: ClaimedEvaluation, **values: Any) -> bool:
    """Change an evaluation that this claim still has; False when it has it no longer."""
    changed = connection.execute(
        update(evaluation)
        .where(
            evaluation.c.id == claimed.evaluation_id,
            evaluation.c.owner_token == claimed.token,
            evaluation.c.status == "running",
        )
        .values(**values)
    )
    return changed.rowcount == 1


def _delete_evaluations(connection: Connection, ids: Sequence[int]) -> None:
    """Delete evaluations and their behaviors."""
    for chunk in _chunks(ids):
        connection.execute(delete(behavior).where(behavior.c.evaluation_id.in_(chunk)))
        connection.execute(delete(evaluation).where(evaluation.c.id.in_(chunk)))


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    """The items in parts of at most `_CHUNK`."""
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]


def open_study_in(connection: Connection, asked: Study) -> int:
    """Number of the study, made when it is new; refuses other contributors under its name."""
    # PostgreSQL would let two processes both find the study missing: they queue on this row.
    connection.execute(select(tables.schema).with_for_update())
    same_name = select(study).where(study.c.name == asked.name, study.c.dataset == asked.dataset)
    row = connection.execute(same_name).one_or_none()
    config = None if asked.config is None else _plain(asked.config, "config")
    if row is None:
        new = {"name": asked.name, "dataset": asked.dataset, "fingerprint": asked.fingerprint}
        connection.execute(insert(study).values(**new, config=config, created=time.time()))
        study_id = connection.execute(same_name).one().id
        connection.execute(
            insert(contributor),
            [
                {"study_id": study_id, "contributor_idx": idx, "contributor_name": name, "n_examples": n}
                for idx, (name, n) in enumerate(zip(asked.contributor_names, asked.n_examples, strict=True))
            ],
        )
        return study_id
    stored = _contributors(connection, row.id)
    given = [
        Contributor(idx, name, n)
        for idx, (name, n) in enumerate(zip(asked.contributor_names, asked.n_examples, strict=True))
    ]
    if row.fingerprint != asked.fingerprint or stored != given:
        raise MixedResultsError(
            f"Study {asked.name!r} on {asked.dataset!r} was made with {_shown_contributors(stored)}, "
            f"fingerprint {row.fingerprint}; asked for are {_shown_contributors(given)}, fingerprint "
            f"{asked.fingerprint}. Their results cannot be fitted together: use another study name or "
            "store, or go back to the data settings of the stored one."
        )
    if row.config is None and config is not None:
        connection.execute(update(study).where(study.c.id == row.id).values(config=config))
    return row.id


def _contributors(connection: Connection, study_id: int) -> list[Contributor]:
    query = select(contributor).where(contributor.c.study_id == study_id).order_by(contributor.c.contributor_idx)
    return [Contributor(r.contributor_idx, r.contributor_name, r.n_examples) for r in connection.execute(query)]


def _shown_contributors(members: Sequence[Contributor]) -> str:
    """The contributors in a few words."""
    some = ", ".join(f"{member.contributor_name!r} ({member.n_examples})" for member in members[:3])
    return f"{len(members)} contributors [{some}{', ...' if len(members) > 3 else ''}]"


def _lock_study(connection: Connection, study_id: int) -> Row:
    """The study's row, locked where the database locks rows, so that what is new in it is added once."""
    row = connection.execute(select(study).where(study.c.id == study_id).with_for_update()).one_or_none()
    if row is None:
        raise _unknown_study(study_id)
    return row


def _unknown_study(study_id: int) -> StoreError:
    return StoreError(f"Study {study_id} was expected in the store; there is none. Make it with open_study.")


def _add(connection: Connection, study_id: int, specs: Sequence[EvaluationSpec]) -> list[int]:
    """Numbers of the evaluations, those that are new inserted as pending."""
    dataset = _lock_study(connection, study_id).dataset
    n_contributors = len(_contributors(connection, study_id))
    for spec in specs:
        if spec.dataset != dataset:
            raise MixedResultsError(
                f"Study {study_id} is on dataset {dataset!r}; the evaluation {spec} is on {spec.dataset!r}. "
                "Add it to a study on that dataset."
            )
        if len(spec.coalition_mask) != n_contributors:
            raise CoalitionError(
                f"Study {study_id} has {n_contributors} contributors; the coalition of {spec} has "
                f"{len(spec.coalition_mask)} elements. Draw it for the contributors of the study."
            )
    wanted = {spec.identity: spec for spec in reversed(specs)}
    stored = _by_identity(connection, study_id, list(wanted))
    for identity, row in stored.items():
        role = wanted[identity].role
        if row.role is None and role is not None:
            connection.execute(update(evaluation).where(evaluation.c.id == row.id).values(role=role))
        elif role not in (None, row.role):
            raise MixedResultsError(
                f"Evaluation {row.id} ({wanted[identity]}) is stored with the role {row.role!r}; asked for "
                f"is {role!r}. Use another exp_name or removal seed, to measure it for that purpose."
            )
    now = time.time()
    new = [_new_row(study_id, spec, now) for spec in dict.fromkeys(specs) if spec.identity not in stored]
    if new:
        connection.execute(insert(evaluation), new)
        stored |= _by_identity(connection, study_id, [row["identity"] for row in new])
    return [stored[spec.identity].id for spec in specs]


def _by_identity(connection: Connection, study_id: int, identities: Sequence[str]) -> dict[str, Row]:
    """Number and role of those evaluations that the study has, by identity."""
    found: dict[str, Row] = {}
    query = select(evaluation.c.identity, evaluation.c.id, evaluation.c.role)
    for chunk in _chunks(identities):
        rows = connection.execute(query.where(evaluation.c.study_id == study_id, evaluation.c.identity.in_(chunk)))
        found |= {row.identity: row for row in rows}
    return found


def _new_row(study_id: int, spec: EvaluationSpec, now: float) -> dict[str, Any]:
    return {
        "study_id": study_id,
        "identity": spec.identity,
        "coalition": _mask_to_text(spec.coalition_mask),
        **{name: getattr(spec, name) for name in _SPEC_COLUMNS},
        "status": "pending",
        "attempts": 0,
        "created": now,
    }


def _spec(row: Row) -> EvaluationSpec:
    columns = {name: getattr(row, name) for name in _SPEC_COLUMNS}
    return EvaluationSpec(coalition_mask=_text_to_mask(row.coalition), **columns)


def _among(ids: Sequence[int], *, is_sqlite: bool) -> ColumnElement[bool]:
    """Whether an evaluation's number is one of `ids`, in SQL that stays short for thousands of them.

    A plan's evaluations are mostly added together, so that their numbers are a few runs without gaps.
    """
    numbers = np.unique(np.asarray(ids, dtype=np.int64))
    if not numbers.size:
        return false()
    if numbers.size <= _FEW:
        return evaluation.c.id.in_(numbers.tolist())
    # Not the plain column: a search by number would beat the index that has the evaluations in the order of claims.
    number = evaluation.c.id + literal(0)
    gaps = np.flatnonzero(np.diff(numbers) > 1)
    firsts, lasts = numbers[[0, *(gaps + 1)]], numbers[[*gaps, -1]]
    if len(firsts) <= _FEW:
        runs = zip(firsts.tolist(), lasts.tolist(), strict=True)
        return or_(*(number.between(first, last) for first, last in runs))
    if is_sqlite:
        listed = func.json_each(json.dumps(numbers.tolist())).table_valued("value")
        return number.in_(select(listed.c.value))
    first, span = int(numbers[0]), int(numbers[-1] - numbers[0]) + 1
    if span <= _SPARSE * numbers.size:
        # One bit for every number in between: read without a table of hashes, which every statement would make anew.
        is_listed = np.zeros(span, dtype=np.bool_)
        is_listed[numbers - first] = True
        bits = np.packbits(is_listed, bitorder="little").tobytes()
        bit = func.get_bit(bindparam("evaluation_bits", bits, type_=LargeBinary, unique=True), number - first)
        return case((number.between(first, first + span - 1), bit == 1), else_=false())
    # As text, which is made once: the driver would turn a list into it for every statement, for longer than that takes.
    text = "{" + ",".join(map(str, numbers.tolist())) + "}"
    listed = func.unnest(cast(bindparam("evaluation_ids", text, type_=String, unique=True), ARRAY(Integer)))
    # Within CASE the list stays a table of hashes; as an array it is gone through for every row.
    return case((number.in_(select(listed)), true()), else_=false())


def _bindable(value: Any) -> Any:
    """The value as plain Python: SQLite would bind NumPy numbers as bytes, which equal nothing."""
    return value.item() if isinstance(value, np.generic) else value


def _locked(connection: Connection, evaluation_id: int) -> Row | None:
    """Number, status and owner of an evaluation, locked where the database locks rows."""
    query = select(evaluation.c.id, evaluation.c.status, evaluation.c.owner, evaluation.c.owner_token)
    return connection.execute(query.where(evaluation.c.id == evaluation_id).with_for_update()).one_or_none()


def _lost(claimed: ClaimedEvaluation, row: Row | None) -> StoreError:
    """Error for writing to an evaluation that the claim has no longer."""
    if row is None:
        state = "is not in the store any more"
    else:
        state = f"is {row.status}" + ("" if row.owner is None else f", last claimed by {_shown_owner(row.owner)}")
    return StoreError(
        f"Evaluation {claimed.evaluation_id} was expected to be running under this claim; it {state}. "
        f"Its lease of {claimed.lease_seconds:.0f} s ran out, or it was given back: nothing was written. "
        "Drop this result and claim again; send heartbeats, or claim with a longer lease."
    )


def _finite(behaviors: Mapping[str, float], spec: EvaluationSpec) -> dict[str, float]:
    """The behaviors as floats; refuses none at all and those that are not finite."""
    if not behaviors:
        raise BehaviorError(f"The evaluation {spec} needs at least one behavior to finish; found none.")
    values: dict[str, float] = {}
    for name, value in behaviors.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise BehaviorError(
                f"The behavior {name!r} of {spec} must be a finite number; found {value!r}. Nothing was "
                "recorded: look at the generated images and at the loss."
            )
    return values


def _check_same_values(connection: Connection, evaluation_id: int, result: FinishedEvaluation) -> None:
    """Refuse other values for an evaluation that is finished."""
    query = select(behavior.c.name, behavior.c.value).where(behavior.c.evaluation_id == evaluation_id)
    stored = {row.name: row.value for row in connection.execute(query)}
    if stored != result.behaviors:
        raise MixedResultsError(
            f"Evaluation {evaluation_id} ({result.spec}) is finished with {stored}; found "
            f"{dict(result.behaviors)}. Use another exp_name, or add what differs to its settings."
        )


def _write_result(
    connection: Connection, evaluation_id: int, result: FinishedEvaluation, *, of_claim: str | None = None
) -> bool:
    """Finish an evaluation with its behaviors, whoever claimed it, or only while the claim with this token has it.

    Returns:
        Whether it was written.
    """
    values = {"finished": time.time(), "seconds": result.seconds, "provenance": result.provenance}
    if of_claim is None:
        connection.execute(_FINISH_ANY, {"at_id": evaluation_id, **values})
    elif connection.execute(_FINISH, {"at_id": evaluation_id, "at_token": of_claim, **values}).rowcount != 1:
        return False
    connection.execute(
        insert(behavior),
        [
            {
                "evaluation_id": evaluation_id,
                "name": name,
                "value": value,
                "definition": result.definitions.get(name),
            }
            for name, value in result.behaviors.items()
        ],
    )
    return True


def _one_definition(behavior_name: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The definition that all rows share; those without one are taken to agree."""
    found = {
        _canonical_json(row.definition, "definition"): row.definition for row in rows if row.definition is not None
    }
    if len(found) > 1:
        first, second = list(found)[:2]
        raise MixedResultsError(
            f"The evaluations of {behavior_name!r} must share one definition to be compared; found {first} "
            f"and {second}. Choose by exp_name or method."
        )
    return next(iter(found.values()), None)


def _n_devices(provenance: Mapping[str, Any]) -> float:
    """Devices that an evaluation took: of each process a whole one, unless it says which share of a GPU it has."""
    share = provenance.get("gpus_per_worker")
    return float(provenance.get("n_processes") or 1) * (1.0 if not share else float(share))


def _stage_seconds(rows: Sequence[Row], stage: str) -> npt.NDArray[np.float64]:
    return np.array([(row.seconds or {}).get(stage, math.nan) for row in rows], dtype=np.float64)


def _contents(connection: Connection) -> str:
    """Experiments with their numbers by status and their behaviors, one per line."""
    names = ("dataset", "exp_name", "method", "removal_dist", "datamodel_alpha")
    columns = [evaluation.c[name] for name in names]
    experiments: dict[tuple[Any, ...], tuple[dict[str, int], set[str]]] = {}
    counted = select(*columns, evaluation.c.status, func.count()).group_by(*columns, evaluation.c.status)
    for row in connection.execute(counted):
        *key, status, n = tuple(row)
        experiments.setdefault(tuple(key), ({}, set()))[0][status] = n
    measured = select(*columns, behavior.c.name).join(behavior, evaluation.c.id == behavior.c.evaluation_id)
    for row in connection.execute(measured.distinct()):
        *key, name = tuple(row)
        experiments.setdefault(tuple(key), ({}, set()))[1].add(name)
    if not experiments:
        return "The store holds no evaluations."
    lines = ["The store holds:"]
    for key, (by_status, behaviors) in sorted(experiments.items(), key=lambda item: str(item[0])):
        what = ", ".join(f"{name} {value}" for name, value in zip(names, key, strict=True))
        how_many = ", ".join(f"{by_status[s]} {s}" for s in get_args(Status) if s in by_status)
        lines.append(f"  {what}: {how_many}; behaviors: {_shown_behaviors(behaviors)}")
    return "\n".join(lines)


def _shown_behaviors(names: set[str]) -> str:
    """Names of behaviors; of single images, of which there may be hundreds, the first one and how many."""
    single = sorted(name for name in names if name.startswith(_SINGLE_IMAGE))
    shown = sorted(names - set(single)) + single[:1]
    more = [f"and {len(single) - 1} more of single images"] if len(single) > 1 else []
    return ", ".join([*shown, *more]) or "none"


def _faults(connection: Connection) -> list[str]:
    """What is wrong with the store, one line each."""
    faults = []
    if connection.dialect.name == "sqlite":
        found = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        faults += [f"SQLite's integrity check: {text}" for text in found if text != "ok"]
        n_broken = len(connection.exec_driver_sql("PRAGMA foreign_key_check").all())
        if n_broken:
            faults.append(f"SQLite's foreign key check: {n_broken} rows belong to rows that are missing")
    has_result = exists().where(behavior.c.evaluation_id == evaluation.c.id)
    is_finished, is_running = evaluation.c.status == "finished", evaluation.c.status == "running"
    is_claimed = and_(*(evaluation.c[name].is_not(None) for name in ("owner", "owner_token", "lease_expires")))
    rules = {
        "finished without behaviors": and_(is_finished, not_(has_result)),
        "not finished, but with behaviors": and_(not_(is_finished), has_result),
        "finished without a time": and_(is_finished, evaluation.c.finished.is_(None)),
        "running without a claim": and_(is_running, not_(is_claimed)),
        "pending with a claim": and_(evaluation.c.status == "pending", evaluation.c.owner_token.is_not(None)),
        "failed without a reason": and_(evaluation.c.status == "failed", evaluation.c.error.is_(None)),
    }
    for what, rule in rules.items():
        ids = connection.execute(select(evaluation.c.id).where(rule).order_by(evaluation.c.id)).scalars().all()
        faults += _fault(ids, what)
    values = connection.execute(select(behavior.c.evaluation_id, behavior.c.value)).all()
    faults += _fault(sorted({row.evaluation_id for row in values if not math.isfinite(row.value)}), "not finite")
    counted = select(contributor.c.study_id, func.count().label("n")).group_by(contributor.c.study_id)
    n_contributors = {row.study_id: row.n for row in connection.execute(counted)}
    wrong_size, wrong_identity = [], []
    for row in connection.execute(select(evaluation).order_by(evaluation.c.id)):
        spec = _spec(row)
        if len(spec.coalition_mask) != n_contributors.get(row.study_id, 0):
            wrong_size.append(row.id)
        if spec.identity != row.identity:
            wrong_identity.append(row.id)
    faults += _fault(wrong_size, "with a coalition of another number of contributors than their study")
    return faults + _fault(wrong_identity, "with an identity that is not that of their settings")


def _fault(ids: Sequence[int], what: str) -> list[str]:
    """A line on the evaluations with these numbers; none where there are none."""
    some = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return [f"{len(ids)} evaluations {what}: {some}"] if ids else []


def _mask_to_text(mask: CoalitionMask) -> str:
    """A mask as `n:hex`; bit i of the bytes is contributor i."""
    return f"{len(mask)}:{np.packbits(mask, bitorder='little').tobytes().hex()}"


def _text_to_mask(text: str) -> CoalitionMask:
    n_contributors, _, digits = text.partition(":")
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    return np.unpackbits(packed, count=int(n_contributors), bitorder="little").astype(np.bool_)


def _canonical_json(value: Any, what: str) -> str:
    """The one JSON text of a value, whatever the order of its keys."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_from_numpy)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"The {what} must be plain JSON values (text, finite numbers, true, false, null, lists, mappings "
            f"with text as keys); found one that is not: {error}. Convert it first."
        ) from error


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The mapping as it will be read back from the database."""
    return json.loads(_canonical_json(dict(value), what))


@cache
def _process(pid: int) -> dict[str, Any]:
    """What tells this process, which has the number `pid`, from every other one here and elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return {
        "host": platform.node(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": namespace,  # process numbers mean something only within it: containers
        "pid": pid,
        "start": (_process_stat(pid) or (None, None))[1],
    }


def _shown_owner(owner: Mapping[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}"


def _process_stat(pid: int) -> tuple[str, int] | None:
    """State and start (clock ticks since boot) of a process; None where /proc does not tell."""
    try:
        # The command is in parentheses and may hold spaces; see proc(5), fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _is_gone(owner: Mapping[str, Any], *, is_file: bool) -> bool:
    """Whether the process that claimed has certainly ended; False where this host cannot know."""
    here = _process(os.getpid())
    if owner["boot"] and here["boot"] and owner["boot"] != here["boot"]:
        # A local file was left by an earlier boot; a server may well have this client elsewhere.
        return is_file
    if os.name != "posix" or any(owner[key] != here[key] for key in ("host", "boot", "namespace")):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, under another user; or its number does
    stat = _process_stat(owner["pid"])
    # A zombie has ended; another start means that the number was given to a new process.
    return stat is not None and (stat[0] in "ZX" or stat[1] != owner["start"])
