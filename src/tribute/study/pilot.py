"""Before hundreds of coalitions: the same few by retraining and by sparsified fine-tuning. Do they agree?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tribute.config import StudyConfig
from tribute.errors import FitError, StoppedEarly
from tribute.games.coalitions import grand_coalition
from tribute.store.records import EvaluationSpec, Store, StoredEvaluation
from tribute.study.costs import read_costs
from tribute.study.evaluations import distinct_draws
from tribute.study.executors import check_execution
from tribute.study.listener import Listener
from tribute.study.pilot_record import PilotResult, judge
from tribute.study.run import PreparedStudy, go_on_within, make_executor, open_study, prepare_study
from tribute.study.run_folder import RunLock
from tribute.study.work import work_through

ROLE = "pilot"
DRAWN_FROM = "pilot"
"""What evaluations of the pilot record as their removal distribution: no law of a fit or a test, so that neither a fit
nor a later, larger test ever takes one of them for its own."""

_PRIORITY = 5  # after all that a study plans


@dataclass(frozen=True)
class PilotSpecs:
    """What a pilot measures.

    Attributes:
        retrain: One per coalition; those that the study tests with are its own test evaluations.
        sft: The same coalitions by sparsified fine-tuning.
        retrain_again: The first coalition with another training seed.
        sft_again: The same by sparsified fine-tuning.
        full: The full model as it is.
        sparse: The sparse model as it is.
    """

    retrain: tuple[EvaluationSpec, ...]
    sft: tuple[EvaluationSpec, ...]
    retrain_again: EvaluationSpec
    sft_again: EvaluationSpec
    full: EvaluationSpec
    sparse: EvaluationSpec

    @property
    def all(self) -> list[EvaluationSpec]:
        """Every one of them, the cheap ones first."""
        return [self.full, self.sparse, *self.sft, self.sft_again, *self.retrain, self.retrain_again]


def run_pilot(config: StudyConfig, listener: Listener, *, wait: bool = False) -> PilotResult | None:
    """Measure what of the pilot is not measured yet, judge it, and write `pilot.json` into the run folder.

    Args:
        config: The study.
        listener: Is told how far it is.
        wait: Wait for another process that writes into the run folder, instead of refusing.

    Returns:
        None on the processes of `accelerate launch` that only help the main one.

    Raises:
        StoppedEarly: `max_device_hours` does not suffice; the message says how to go on.
        FitError: There are too few coalitions, or evaluations failed.
        MixedResultsError: The run folder holds a study with other settings.
        StoreError: Another process writes into the run folder.
    """
    check_execution(config.execution)
    with RunLock(config.run_dir, wait=wait, on_wait=listener.message) as lock:
        prepared = prepare_study(config, listener, lock, writes_record=False)
        if prepared is None:
            return None
        try:
            specs = plan_pilot(config, prepared.specs, prepared.record.n_contributors, prepared.session.settings)
            with Store.open(config.db_url) as store:
                found = _measure(config, prepared, specs, store, listener)
        finally:
            prepared.session.team.dismiss()
        result = judge_pilot(prepared, specs, found)
        result.write(config.run_dir)
        return result


def _measure(
    config: StudyConfig, prepared: PreparedStudy, specs: PilotSpecs, store: Store, listener: Listener
) -> list[StoredEvaluation]:
    """The finished evaluations of a pilot, once all that can be measured is."""
    record, budget = prepared.record, prepared.budget
    study_id = open_study(store, config, record)
    evaluation_ids = store.add(study_id, specs.all)
    store.retry(study_id, evaluation_ids=evaluation_ids)
    listener.stage("Pilot")
    executor = make_executor(prepared, listener)
    try:
        go_on = go_on_within(budget, store, study_id, evaluation_ids)
        work_through(executor, store, study_id, evaluation_ids, record.behaviors, listener, go_on=go_on)
    finally:
        executor.close()
    if budget is not None and budget.stopped:
        raise StoppedEarly(budget.message(read_costs(config, record, store)))
    return store.find(study_id, statuses=("finished",), evaluation_ids=evaluation_ids)


def plan_pilot(
    config: StudyConfig, planned: Sequence[EvaluationSpec], n_contributors: int, settings: dict[str, dict[str, Any]]
) -> PilotSpecs:
    """What a pilot measures: the first test coalitions of the study, and further draws where it has too few.

    Args:
        config: The study; `pilot.n_coalitions` says how many.
        planned: All evaluations of the study.
        n_contributors: Length of a coalition.
        settings: By method: all that determines an evaluation besides coalition and seeds.

    Raises:
        FitError: There are not as many distinct coalitions.
    """
    n_coalitions = config.pilot.n_coalitions
    test_seed = config.test.opt_seeds[0] if config.test.opt_seeds else config.opt_seed
    planned_tests = {(spec.coalition_mask.tobytes(), spec.opt_seed): spec for spec in planned if spec.role == "test"}

    def spec(method: str, mask: Any, opt_seed: int, removal_seed: int | None, alpha: float | None) -> EvaluationSpec:
        return EvaluationSpec(
            exp_name=config.name,
            dataset=config.dataset,
            method=method,
            removal_dist=DRAWN_FROM,
            datamodel_alpha=alpha,
            removal_seed=removal_seed,
            coalition_mask=mask,
            opt_seed=opt_seed,
            settings=settings[method],
            role=ROLE,
            priority=_PRIORITY,
        )

    alpha = config.test.datamodel_alpha
    draws = distinct_draws("datamodel", n_contributors, n_coalitions, config.test.first_removal_seed, alpha, seen=set())

    def retrained(removal_seed: int, mask: Any, opt_seed: int) -> EvaluationSpec:
        """The study's own test evaluation, where it has it."""
        own = planned_tests.get((mask.tobytes(), opt_seed))
        return spec("retrain", mask, opt_seed, removal_seed, alpha) if own is None else own

    other_seeds = [seed for seed in config.test.opt_seeds if seed != test_seed] or [test_seed + 1]
    first_seed, first_mask = draws[0]
    everyone = grand_coalition(n_contributors)
    return PilotSpecs(
        retrain=tuple(retrained(seed, mask, test_seed) for seed, mask in draws),
        sft=tuple(spec("gd", mask, config.opt_seed, seed, alpha) for seed, mask in draws),
        retrain_again=retrained(first_seed, first_mask, other_seeds[0]),
        sft_again=spec("gd", first_mask, config.opt_seed + 1, first_seed, alpha),
        full=spec("full", everyone, config.opt_seed, None, None),
        sparse=spec("sparse", everyone, config.opt_seed, None, None),
    )


def judge_pilot(prepared: PreparedStudy, specs: PilotSpecs, found: Sequence[StoredEvaluation]) -> PilotResult:
    """What the finished evaluations of a pilot say.

    Raises:
        FitError: Some are missing.
    """
    by_identity = {item.spec.identity: item for item in found}
    missing = [spec for spec in specs.all if spec.identity not in by_identity]
    if missing:
        raise FitError(
            f"the pilot: expected {len(specs.all)} finished evaluations, found {len(specs.all) - len(missing)}; e.g. "
            f"{missing[0]} failed. The messages above and tribute status say why; run tribute pilot again"
        )
    # Compared with the full model itself, these say nothing about its quality.
    local = set() if prepared.session.worker.local is None else set(prepared.session.worker.local.definitions())

    def value(spec: EvaluationSpec, name: str) -> float:
        return float(by_identity[spec.identity].behaviors[name])

    behaviors = []
    for name in prepared.record.behaviors:
        definition = by_identity[specs.sft[0].identity].definitions.get(name, {})
        behaviors.append(
            judge(
                name,
                [value(spec, name) for spec in specs.sft],
                [value(spec, name) for spec in specs.retrain],
                higher_is_better=bool(definition.get("higher_is_better", True)),
                full=None if name in local else value(specs.full, name),
                sparse=None if name in local else value(specs.sparse, name),
                sft_pair=(value(specs.sft[0], name), value(specs.sft_again, name)),
                retrain_pair=(value(specs.retrain[0], name), value(specs.retrain_again, name)),
            )
        )
    return PilotResult(
        study=prepared.record.name,
        coalition_masks=tuple("".join("01"[int(x)] for x in spec.coalition_mask) for spec in specs.sft),
        behaviors=tuple(behaviors),
        seconds={
            method: float(np.median([sum(by_identity[spec.identity].seconds.values()) for spec in measured]))
            for method, measured in (("gd", specs.sft), ("retrain", specs.retrain))
        },
    )


def with_coalitions(config: StudyConfig, n_coalitions: int | None) -> StudyConfig:
    """The study with another number of pilot coalitions."""
    return config if n_coalitions is None else config.replace(pilot=config.pilot.replace(n_coalitions=n_coalitions))
