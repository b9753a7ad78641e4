"""Evaluations as flat files: JSON lines in the published layout, and CSV.

The published layout has one object per line, with the keys of the reference implementation (Lin, Lu, Kim
and Lee 2025). Its `remaining_idx` and `removed_idx` number training examples. What it has no key for is
written under one further key, `tribute`, so that both can read a line and nothing is lost on the way back.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, TextIO, Unpack

import numpy as np
import numpy.typing as npt

from tribute.errors import MixedResultsError, StoreError, TributeError
from tribute.store.records import EvaluationSpec, Filters, FinishedEvaluation, Store, StoredEvaluation, Study

PUBLISHED_BEHAVIOR_KEYS: Mapping[str, str] = {
    "inception_score": "is",
    "fid": "fid_value",
    "kid": "kid",
    "precision": "precision",
    "recall": "recall",
    "entropy": "entropy",
}
"""Behavior name here -> key of a published line. `kid` is ours; the reference implementation ignores it."""

_LOCAL_KEY = re.compile(
    r"avg_(?:mse|nrmse|ssim|total_loss)|generated_image_(?:0|[1-9]\d*)_(?:mse|nrmse|ssim|diffusion_loss)"
)
"""Keys of published lines for local behaviors; those have the same names here."""

_SECONDS_KEYS = {"train": "total_steps_time", "sample": "total_sampling_time"}
_OTHER_KEYS = (
    "dataset",
    "method",
    "exp_name",
    "removal_dist",
    "datamodel_alpha",
    "removal_seed",
    "opt_seed",
    "gd_steps",
    "remaining_idx",
    "removed_idx",
    "tribute",
)
_KNOWN_KEYS = frozenset([*_OTHER_KEYS, *PUBLISHED_BEHAVIOR_KEYS.values(), *_SECONDS_KEYS.values()])
_REMOVAL_SYNONYMS: dict[str | None, str | None] = {"datashapley": "shapley", "None": None}
_FOREIGN = "published"  # where the provenance keeps the keys of a line that are not ours

ExampleOwners = npt.NDArray[np.int64]
"""`(n_examples,)`; index of the contributor that owns each example."""


def export_jsonl(
    store: Store,
    path: str | Path,
    *,
    contributor_of_example: Sequence[int] | npt.NDArray[np.integer] | None = None,
    study_id: int | None = None,
    **filters: Unpack[Filters],
) -> int:
    """Write the finished evaluations that match as JSON lines in the published layout.

    Args:
        store: Where from.
        path: The file; it appears whole or not at all.
        contributor_of_example: `(n_examples,)`, contributor index of each example. `remaining_idx` and
            `removed_idx` then number examples; without it they number contributors.
        study_id: Only this study.
        **filters: See `Filters`.

    Returns:
        Number of lines.

    Raises:
        StoreError: The examples are not those of a study, or the file cannot be written.
    """
    studies = {study.study_id: study for study in store.studies()}
    owners = None if contributor_of_example is None else _example_owners(contributor_of_example)
    found = store.find(study_id, **{**filters, "statuses": ["finished"]})
    with _written_beside(Path(path)) as file:
        for stored in found:
            study = studies[stored.study_id]
            if owners is not None:
                _check_owners(owners, study.contributor_names, study.n_examples)
            line = _published_line(stored, study, owners)
            file.write(json.dumps(line, allow_nan=False) + "\n")
    return len(found)


def import_jsonl(
    store: Store,
    path: str | Path,
    *,
    dataset: str | None = None,
    contributor_names: Sequence[str] | None = None,
    contributor_of_example: Sequence[int] | npt.NDArray[np.integer] | None = None,
    study_name: str = "imported",
) -> int:
    """Record the evaluations of a file in the published layout, all or none.

    Lines that Tribute wrote go back to their study. Other lines go to the study `study_name` on their
    dataset; unknown keys are kept in the provenance. What is stored already is not recorded again.

    Args:
        store: Where to.
        path: The file.
        dataset: Only the lines of this dataset.
        contributor_names: `(n_contributors,)`; by default those of the lines or the study, else the numbers.
        contributor_of_example: `(n_examples,)`, contributor index of each example; the indices of the lines
            then number examples. Without it every index of a line that Tribute did not write is a
            contributor of its own.
        study_name: Study for the lines that Tribute did not write.

    Returns:
        Number of evaluations that are new.

    Raises:
        StoreError: The file cannot be read, or a line is broken or has a contributor only partly present; the
            message names the line and the contributor.
        MixedResultsError: A line contradicts another one, the store, or the arguments.
    """
    owners = None if contributor_of_example is None else _example_owners(contributor_of_example)
    reader = _LineReader(store, study_name, None if contributor_names is None else tuple(contributor_names), owners)
    results: dict[Study, list[FinishedEvaluation]] = {}
    seen: dict[tuple[Study, str], tuple[int, Mapping[str, float]]] = {}
    for number, text in _lines(Path(path)):
        with _at_line(Path(path), number):
            record = _parsed(text)
            if dataset is not None and record.get("dataset") != dataset:
                continue
            study, result = reader.read(record)
            first, behaviors = seen.setdefault((study, result.spec.identity), (number, result.behaviors))
            if behaviors != result.behaviors:
                raise MixedResultsError(
                    f"one result per evaluation was expected; line {first} has the same evaluation "
                    f"({result.spec}) with other behaviors. Remove one, or give one another exp_name"
                )
            if first == number:
                results.setdefault(study, []).append(result)
    return store.add_finished(results)


def export_csv(store: Store, path: str | Path, *, study_id: int | None = None, **filters: Unpack[Filters]) -> int:
    """Write the finished evaluations that match as a flat table, one row per evaluation.

    `present_idx` lists the contributors that are present, separated by spaces; behaviors have one column
    each, empty where not measured; `settings` is JSON.

    Returns:
        Number of rows.
    """
    names = {study.study_id: study.name for study in store.studies()}
    found = store.find(study_id, **{**filters, "statuses": ["finished"]})
    behavior_names = sorted({name for stored in found for name in stored.behaviors})
    stages = sorted({stage for stored in found for stage in stored.seconds})
    plain = (
        "dataset",
        "exp_name",
        "method",
        "removal_dist",
        "datamodel_alpha",
        "removal_seed",
        "opt_seed",
        "role",
    )
    with _written_beside(Path(path)) as file:
        table = csv.writer(file, lineterminator="\n")
        counted = ("n_contributors", "n_present", "present_idx")
        table.writerow(
            [
                "study",
                *plain,
                *counted,
                *behavior_names,
                *(f"seconds_{stage}" for stage in stages),
                "settings",
            ]
        )
        for stored in found:
            present = np.flatnonzero(stored.spec.coalition_mask).tolist()
            table.writerow(
                [
                    names[stored.study_id],
                    *(getattr(stored.spec, name) for name in plain),
                    len(stored.spec.coalition_mask),
                    len(present),
                    " ".join(map(str, present)),
                    *(stored.behaviors.get(name) for name in behavior_names),
                    *(stored.seconds.get(stage) for stage in stages),
                    json.dumps(stored.spec.settings, sort_keys=True),
                ]
            )
    return len(found)


def _published_line(stored: StoredEvaluation, study: Study, owners: ExampleOwners | None) -> dict[str, Any]:
    """One evaluation in the published layout, with the rest under `tribute`."""
    spec = stored.spec
    present = spec.coalition_mask if owners is None else spec.coalition_mask[owners]
    provenance = dict(stored.provenance)
    foreign = provenance.pop(_FOREIGN, {})
    seconds = dict(stored.seconds)
    local = {k: v for k, v in stored.behaviors.items() if _LOCAL_KEY.fullmatch(k)}
    others = {k: v for k, v in stored.behaviors.items() if k not in PUBLISHED_BEHAVIOR_KEYS and k not in local}
    return {
        "dataset": spec.dataset,
        "method": spec.method,
        "exp_name": spec.exp_name,
        "removal_dist": spec.removal_dist,
        "datamodel_alpha": spec.datamodel_alpha,
        "removal_seed": spec.removal_seed,
        "opt_seed": spec.opt_seed,
        "gd_steps": spec.settings.get("gd_steps", _steps_of(spec)),
        **{key: seconds.pop(stage, None) for stage, key in _SECONDS_KEYS.items()},
        **{key: stored.behaviors.get(name) for name, key in PUBLISHED_BEHAVIOR_KEYS.items()},
        **local,
        "remaining_idx": np.flatnonzero(present).tolist(),
        "removed_idx": np.flatnonzero(~present).tolist(),
        "tribute": {
            "study": study.name,
            "fingerprint": study.fingerprint,
            "contributor_names": study.contributor_names,
            "n_examples": study.n_examples,
            "present_idx": np.flatnonzero(spec.coalition_mask).tolist(),
            "role": spec.role,
            "priority": spec.priority,
            "settings": spec.settings,
            "behaviors": others,
            "definitions": stored.definitions,
            "seconds": seconds,
            "provenance": provenance,
        },
        **{key: value for key, value in foreign.items() if key not in _KNOWN_KEYS and key not in local},
    }


def _steps_of(spec: EvaluationSpec) -> int | None:
    """Updates of the fine-tuning that Tribute's own settings name, for the method `gd` only."""
    train = spec.settings.get("train")
    return train.get("n_steps") if spec.method == "gd" and isinstance(train, Mapping) else None


@dataclass
class _LineReader:
    """Turns lines into studies and results; remembers the study of lines that do not name theirs."""

    store: Store
    study_name: str
    contributor_names: tuple[str, ...] | None
    owners: ExampleOwners | None

    def __post_init__(self) -> None:
        self.studies: dict[str, Study] = {}

    def read(self, record: Mapping[str, Any]) -> tuple[Study, FinishedEvaluation]:
        """The study and the result of one line."""
        dataset = _get(record, "dataset", str)
        extra = _get(record, "tribute", dict, optional=True)
        indices = {key: _indices(record, key) for key in ("remaining_idx", "removed_idx")}
        if extra is not None:
            study = self._own_study(dataset, extra)
        else:
            study = self._foreign_study(dataset, indices)
        if extra is not None and self.owners is None:
            mask = _membership(_indices(extra, "present_idx"), None, study.n_contributors)
        else:
            mask = self._coalition(indices, study)
        return study, self._result(record, extra, study, mask)

    def _own_study(self, dataset: str, extra: Mapping[str, Any]) -> Study:
        """The study that a line of ours names."""
        names = [
            _get({"contributor_names": name}, "contributor_names", str)
            for name in _get(extra, "contributor_names", list)
        ]
        numbers = _indices(extra, "n_examples") or []
        study = Study(_get(extra, "study", str), dataset, tuple(names), tuple(numbers), _get(extra, "fingerprint", str))
        if self.contributor_names not in (None, study.contributor_names):
            raise MixedResultsError(
                f"the contributors given are {list(self.contributor_names or ())[:5]}; the line has "
                f"{names[:5]}. Import without contributor names, or give those of the file"
            )
        if self.owners is not None:
            _check_owners(self.owners, study.contributor_names, study.n_examples)
        return study

    def _foreign_study(self, dataset: str, indices: Mapping[str, list[int] | None]) -> Study:
        """The study for lines that name none: the stored one, else one from the arguments or the line."""
        if dataset not in self.studies:
            known = self.store.studies(name=self.study_name, dataset=dataset)
            self.studies[dataset] = known[0] if known else self._new_study(dataset, indices)
            study = self.studies[dataset]
            if self.contributor_names not in (None, study.contributor_names):
                raise MixedResultsError(
                    f"study {study.name!r} has the contributors {list(study.contributor_names[:5])}; given "
                    f"are {list(self.contributor_names or ())[:5]}. Give the same, or another study_name"
                )
            if self.owners is not None:
                _check_owners(self.owners, study.contributor_names, study.n_examples)
        return self.studies[dataset]

    def _new_study(self, dataset: str, indices: Mapping[str, list[int] | None]) -> Study:
        if self.owners is not None:
            n_examples = np.bincount(self.owners).tolist()
        elif self.contributor_names is not None:
            n_examples = [1] * len(self.contributor_names)
        else:
            remaining, removed = indices["remaining_idx"], indices["removed_idx"]
            if remaining is None or removed is None:
                raise StoreError(
                    "both remaining_idx and removed_idx are needed to number the contributors. Give "
                    "contributor_names or contributor_of_example"
                )
            n_examples = [1] * (max([*remaining, *removed], default=-1) + 1)
        names = self.contributor_names or tuple(str(idx) for idx in range(len(n_examples)))
        content = json.dumps([names, n_examples]).encode()
        return Study(self.study_name, dataset, names, tuple(n_examples), sha256(content).hexdigest())

    def _coalition(self, indices: Mapping[str, list[int] | None], study: Study) -> npt.NDArray[np.bool_]:
        """Mask over contributors from the indices of a line; every contributor is wholly in or out."""
        if self.owners is None:
            return _membership(indices["remaining_idx"], indices["removed_idx"], study.n_contributors)
        present = _membership(indices["remaining_idx"], indices["removed_idx"], len(self.owners))
        n_present = np.bincount(self.owners[present], minlength=study.n_contributors)
        partly = np.flatnonzero((n_present > 0) & (n_present < study.n_examples))
        if len(partly):
            idx = partly[0]
            raise StoreError(
                "a contributor must be present with all its examples or with none; "
                f"{study.contributor_names[idx]!r} (contributor {idx}) is present with {n_present[idx]} of "
                f"{study.n_examples[idx]}. Check that "
                "contributor_of_example is the division by which the coalitions were drawn"
            )
        return n_present > 0

    def _result(
        self,
        record: Mapping[str, Any],
        extra: Mapping[str, Any] | None,
        study: Study,
        mask: npt.NDArray[np.bool_],
    ) -> FinishedEvaluation:
        extra = extra or {}
        removal_dist = _get(record, "removal_dist", str, optional=True)
        gd_steps = _get(record, "gd_steps", int, optional=True)
        settings = _get(extra, "settings", dict, optional=True)
        if settings is None:
            settings = {} if gd_steps is None else {"gd_steps": gd_steps}
        spec = EvaluationSpec(
            exp_name=_get(record, "exp_name", str, optional=True) or self.study_name,
            dataset=study.dataset,
            method=_get(record, "method", str),
            removal_dist=_REMOVAL_SYNONYMS.get(removal_dist, removal_dist),
            datamodel_alpha=_number(record, "datamodel_alpha"),
            removal_seed=_get(record, "removal_seed", int, optional=True),
            coalition_mask=mask,
            opt_seed=_get(record, "opt_seed", int, optional=True) or 0,
            settings=settings,
            role=_get(extra, "role", str, optional=True),
            priority=_get(extra, "priority", int, optional=True) or 0,
        )
        others = _get(extra, "behaviors", dict, optional=True) or {}
        behaviors = {name: _number(record, key) for name, key in PUBLISHED_BEHAVIOR_KEYS.items()}
        behaviors |= {key: _number(record, key) for key in record if _LOCAL_KEY.fullmatch(key)}
        behaviors |= {name: _number(others, name) for name in others}
        behaviors = {name: value for name, value in behaviors.items() if value is not None}
        if not behaviors:
            raise StoreError(
                f"at least one behavior was expected, under {', '.join(PUBLISHED_BEHAVIOR_KEYS.values())}, avg_mse or "
                "the like; found none. Remove the line, or measure its model"
            )
        seconds = {stage: _number(record, key) for stage, key in _SECONDS_KEYS.items()}
        more_seconds = _get(extra, "seconds", dict, optional=True) or {}
        seconds |= {stage: _number(more_seconds, stage) for stage in more_seconds}
        provenance = dict(_get(extra, "provenance", dict, optional=True) or {})
        foreign = {
            key: value for key, value in record.items() if key not in _KNOWN_KEYS and not _LOCAL_KEY.fullmatch(key)
        }
        if foreign:
            provenance[_FOREIGN] = foreign
        return FinishedEvaluation(
            spec=spec,
            behaviors=behaviors,
            seconds={stage: value for stage, value in seconds.items() if value is not None},
            provenance=provenance,
            definitions=_get(extra, "definitions", dict, optional=True) or {},
        )


def _example_owners(contributor_of_example: Sequence[int] | npt.NDArray[np.integer]) -> ExampleOwners:
    """The map from examples to contributors as an array, checked."""
    owners = np.asarray(contributor_of_example)
    if owners.ndim != 1 or not np.issubdtype(owners.dtype, np.integer) or not owners.size or owners.min() < 0:
        raise StoreError(
            "contributor_of_example needs one contributor index (0, 1, ...) per example; found shape "
            f"{owners.shape} of {owners.dtype}. Give the map by which the coalitions were drawn."
        )
    return owners.astype(np.int64)


def _check_owners(owners: ExampleOwners, names: Sequence[str], n_examples: Sequence[int]) -> None:
    """Refuse a map of examples that does not give every contributor what the study says."""
    found = np.bincount(owners).tolist()
    if found != list(n_examples) or 0 in found:
        raise MixedResultsError(
            f"The {len(names)} contributors own {list(n_examples)[:8]} examples (first 8 shown), at least "
            f"one each; contributor_of_example gives {found[:8]} to {len(found)} contributors. Give the map "
            "of this study."
        )


def _membership(present: list[int] | None, absent: list[int] | None, n_items: int) -> npt.NDArray[np.bool_]:
    """`(n_items,)` bool from the indices present and absent; where one list is missing it is the rest."""
    if present is None and absent is None:
        raise StoreError("remaining_idx or removed_idx was expected; found neither. Add one of them")
    for name, idx in (("remaining_idx", present or []), ("removed_idx", absent or [])):
        wrong = next((i for i in idx if not 0 <= i < n_items), None)
        if wrong is not None:
            raise StoreError(
                f"{name} must be within 0 and {n_items - 1}; found {wrong}. Give the contributor_of_example "
                "or contributor_names that the file was written with"
            )
        if len(set(idx)) != len(idx):
            raise StoreError(f"{name} must name every index once; found repeated ones. Remove them")
    mask = np.zeros(n_items, dtype=np.bool_)
    if present is None:
        mask[absent] = True
        return ~mask
    mask[present] = True
    if absent is None:
        return mask
    if len(present) + len(absent) != n_items or mask[absent].any():
        raise StoreError(
            f"remaining_idx and removed_idx must divide the {n_items} indices between them; found "
            f"{len(present)} and {len(absent)}, {int(mask[absent].sum())} of them in both. Give the "
            "contributor_of_example or contributor_names that the file was written with"
        )
    return mask


def _get(record: Mapping[str, Any], key: str, kind: type, *, optional: bool = False) -> Any:
    """The value of a key, of the type that is expected; None only where that is optional."""
    value = record.get(key)
    if value is None and optional:
        return None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StoreError(f"{key!r} must be {_JSON_NAMES[kind]}; found {value!r}. Correct the line")
    return value


_JSON_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


def _indices(record: Mapping[str, Any], key: str) -> list[int] | None:
    """A list of whole numbers; None where the key is missing."""
    values = _get(record, key, list, optional=True)
    return None if values is None else [_get({key: value}, key, int) for value in values]


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """A number, also one that is written as text; None where the key is missing."""
    value = record.get(key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise StoreError(f"{key!r} must be a finite number; found {value!r}. Remove the line, or measure it again")
    return number


def _parsed(text: str) -> dict[str, Any]:
    """The object on a line."""
    try:
        record = json.loads(text, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"a JSON object was expected; found {text[:60]!r}: {error}. Correct it") from error
    return _get({"the line": record}, "the line", dict)


def _not_finite(constant: str) -> NoReturn:
    raise StoreError(f"finite numbers were expected; found {constant}. Remove the line, or measure it again")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"A file of JSON lines in UTF-8 was expected; {path} cannot be read: {error}. Check the path."
        ) from error


@contextmanager
def _at_line(path: Path, number: int) -> Iterator[None]:
    """Say in which line of which file an error is."""
    try:
        yield
    except TributeError as error:
        raise type(error)(f"{path}, line {number}: {str(error).rstrip('.')}. Nothing was imported.") from error


@contextmanager
def _written_beside(path: Path) -> Iterator[TextIO]:
    """A text file that takes its place when it is whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("w", encoding="utf-8", newline="") as file:
                yield file
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"A file that can be written was expected; {path} cannot: {error}. Give another path."
        ) from error
