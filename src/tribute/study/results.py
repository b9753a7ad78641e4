"""What a study found, read from its store: attributions, their proof, what it took. No network is needed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from tribute.config import StudyConfig
from tribute.errors import FitError
from tribute.games.designs import PAIRED_DESIGNS
from tribute.games.lds import MIN_TEST_COALITIONS, LDSTestSet
from tribute.store.records import EvaluationTable, Store
from tribute.study.attribution import (
    EndPoints,
    Validation,
    fit_attributions,
    split_by_seed,
    validate,
    without_tested,
)
from tribute.study.end_points import failure_of
from tribute.study.record import StudyRecord
from tribute.types import Attributions, Behaviors, CoalitionMasks


@dataclass(frozen=True)
class BehaviorResult:
    """What a study says about one behavior.

    Attributes:
        name: Of the behavior.
        definition: Unit, direction, variant.
        end_points: v(empty) and v(grand).
        attributions: By attribution kernel; `shapley` uses the study's estimator.
        unfitted: Kernels that could not be fitted, with the reason.
        validations: LDS by attribution kernel, compared with that of `shapley`; empty without test coalitions.
        fit_masks: Coalitions that were fitted to.
        fit_behaviors: Their behaviors.
        test_masks: Test coalitions.
        test_behaviors: `(n_training_seeds, n_test)`.
    """

    name: str
    definition: dict[str, Any]
    end_points: EndPoints
    attributions: dict[str, Attributions]
    unfitted: dict[str, str]
    validations: dict[str, Validation]
    fit_masks: CoalitionMasks = field(repr=False)
    fit_behaviors: Behaviors = field(repr=False)
    test_masks: CoalitionMasks | None = field(default=None, repr=False)
    test_behaviors: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        config: Its settings.
        contributor_names: `(n_contributors,)`.
        n_examples: `(n_contributors,)`.
        behaviors: One result per behavior.
        timings: Median seconds per coalition, by method: `gd`, `retrain`.
        models: Steps of the full and the sparse model; what pruning removed.
        classifier_accuracy: Held-out accuracy of the feature extractor, or None.
        provenance: Versions, commit, device of this process.
        counts: Planned evaluations by role: how many there are, and how many are `pending`, `running`, `finished` or
            `failed` (set aside, after they were tried several times).
    """

    config: StudyConfig
    contributor_names: tuple[str, ...]
    n_examples: tuple[int, ...]
    behaviors: list[BehaviorResult]
    timings: dict[str, dict[str, float]]
    models: dict[str, Any]
    classifier_accuracy: float | None
    provenance: dict[str, Any]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def set_aside(self) -> dict[str, int]:
        """Evaluations that failed and are not among the results, by role; only roles that have some."""
        return {role: found["failed"] for role, found in self.counts.items() if found.get("failed")}


def read_result(config: StudyConfig, record: StudyRecord, store: Store) -> StudyResult:
    """What a study has found so far, from the finished ones of its planned evaluations.

    Linear algebra is done by one thread: on one machine the same evaluations then give the same attributions to the
    last bit, whichever command fits them and however many threads it was started with.

    Raises:
        FitError: Too little is measured; the message says what is missing.
    """
    study_id = record.study_id(store)
    evaluation_ids = record.evaluation_ids(store)
    with threadpool_limits(1, user_api="blas"):
        behaviors = [
            summarise_behavior(config, store, study_id, evaluation_ids, name, record.contributor_names)
            for name in record.behaviors
        ]
    return StudyResult(
        config=config,
        contributor_names=record.contributor_names,
        n_examples=record.n_examples,
        behaviors=behaviors,
        timings=median_seconds(store, study_id, evaluation_ids),
        models=dict(record.models),
        classifier_accuracy=record.classifier_accuracy,
        provenance=dict(record.provenance),
        counts=count_by_role(record, store),
    )


def count_by_role(record: StudyRecord, store: Store) -> dict[str, dict[str, int]]:
    """Planned evaluations by role: `planned`, and by status; what the store does not have yet is pending."""
    study_id = record.study_id(store)
    found: dict[str, dict[str, int]] = {}
    for role, identities in record.evaluations.items():
        stored = store.counts(study_id, evaluation_ids=record.evaluation_ids(store, roles=[role]))
        missing = len(identities) - sum(stored.values())
        found[role] = {"planned": len(identities), **stored, "pending": stored["pending"] + missing}
    return found


def read_fit_evaluations(
    store: Store, study_id: int, evaluation_ids: list[int], behavior_name: str
) -> tuple[EvaluationTable, EndPoints]:
    """The finished fit coalitions and end points among some evaluations.

    Raises:
        FitError: Some of them are missing.
    """
    empty, grand, fit = (
        store.read(behavior_name=behavior_name, study_id=study_id, role=role, evaluation_ids=evaluation_ids)
        for role in ("empty", "grand", "fit")
    )
    for role, found in (("empty", empty), ("grand", grand)):
        counts = store.counts(study_id, role=role, evaluation_ids=evaluation_ids)
        if not len(found) and counts["failed"]:
            raise FitError(failure_of(store, study_id, role, evaluation_ids))
    if not (len(empty) and len(grand) and len(fit)):
        raise FitError(
            f"{behavior_name}: expected finished evaluations of the empty coalition, the grand coalition and fit "
            f"coalitions; found {len(empty)}, {len(grand)} and {len(fit)}. Run the study again"
        )
    return fit, EndPoints(empty.behaviors, grand.behaviors)


def summarise_behavior(
    config: StudyConfig,
    store: Store,
    study_id: int,
    evaluation_ids: list[int],
    behavior_name: str,
    contributor_names: tuple[str, ...],
) -> BehaviorResult:
    """Attributions by every kernel and their LDS, from the store."""
    fit, end_points = read_fit_evaluations(store, study_id, evaluation_ids, behavior_name)
    design = config.fit.design_name
    loo, test = (
        store.read(behavior_name=behavior_name, study_id=study_id, role=role, evaluation_ids=evaluation_ids)
        for role in ("loo", "test")
    )
    test_masks, test_behaviors, test_set = None, None, None
    fit_masks, fit_behaviors = fit.masks, fit.behaviors
    if len(test):
        test_masks, test_behaviors = split_by_seed(test.masks, test.behaviors, test.opt_seeds)
        fit_masks, fit_behaviors, _ = without_tested(
            fit_masks, fit_behaviors, test_masks, paired=design in PAIRED_DESIGNS
        )
        if len(test_masks) >= MIN_TEST_COALITIONS:
            test_set = LDSTestSet.prepare(test_masks, test_behaviors)
    attributions: dict[str, Attributions] = {}
    unfitted: dict[str, str] = {}
    validations: dict[str, Validation] = {}
    names = {"shapley": config.estimator, "shapley (least_squares)": "least_squares", "datamodel": None}
    names |= {"banzhaf": None, "loo": None}
    for name, estimator in names.items():
        if name == "shapley (least_squares)" and config.estimator == "least_squares":
            continue
        kernel = name.split(" ")[0]
        if kernel == "loo" and not len(loo):
            continue
        masks, behaviors, drawn_from = fit_masks, fit_behaviors, design
        if kernel == "loo":
            masks, behaviors, drawn_from = loo.masks, loo.behaviors, "loo"
        try:
            attributions[name] = fit_attributions(
                masks,
                behaviors,
                end_points,
                kernel=kernel,
                design=drawn_from,
                estimator=estimator,
                contributor_names=contributor_names,
            )
        except FitError as error:
            unfitted[name] = str(error)
            continue
        if test_set is not None:
            reference = None if name == "shapley" else attributions.get("shapley")
            try:
                validations[name] = validate(attributions[name], test_set, reference=reference)
            except FitError as error:  # e.g. a leave-one-out coalition is a test coalition, too
                unfitted[f"LDS of {name}"] = str(error)
    if "shapley" not in attributions:
        raise FitError(f"{behavior_name}: {unfitted['shapley']}")
    return BehaviorResult(
        name=behavior_name,
        definition=dict(fit.definition or {}),
        end_points=end_points,
        attributions=attributions,
        unfitted=unfitted,
        validations=validations,
        fit_masks=fit_masks,
        fit_behaviors=fit_behaviors,
        test_masks=test_masks,
        test_behaviors=test_behaviors,
    )


def median_seconds(store: Store, study_id: int, evaluation_ids: list[int]) -> dict[str, dict[str, float]]:
    """Median seconds of one coalition by method and stage; the empty coalition does not count."""
    seconds: dict[str, list[dict[str, float]]] = {}
    for item in store.find(study_id, statuses=("finished",), evaluation_ids=evaluation_ids):
        if item.spec.coalition_mask.any():
            seconds.setdefault(item.spec.method, []).append(dict(item.seconds))
    return {
        method: {
            "n_evaluations": len(items),
            "total": float(np.median([sum(item.values()) for item in items])),
            **{key: float(np.median([item.get(key, np.nan) for item in items])) for key in items[0]},
        }
        for method, items in seconds.items()
    }
