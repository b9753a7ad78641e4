"""A whole study: models, coalitions, attributions, proof; continued wherever it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tribute.config import StudyConfig
from tribute.errors import ConfigError, FitError, StoppedEarly, TributeError
from tribute.files import remove_leftovers
from tribute.games.stopping import looks, narrow_enough, share_half_width
from tribute.models.checkpoint import Checkpoint
from tribute.models.pipelines import is_foreign, load_model
from tribute.store.records import EvaluationSpec, Store
from tribute.study.attribution import fit_attributions
from tribute.study.budget import Budget, estimate_from_training
from tribute.study.compatibility import check_not_pruned, check_trained_on_everybody
from tribute.study.costs import ModelCosts, model_costs, read_costs
from tribute.study.end_points import EndPointsWatch
from tribute.study.evaluations import plan_evaluations
from tribute.study.executors import Executor, SerialExecutor, always, check_execution
from tribute.study.ingredients import gather_ingredients
from tribute.study.listener import Listener
from tribute.study.manifest import read_and_attest
from tribute.study.models import load_pruned_summary, train_and_prune
from tribute.study.pictures import make_pictures
from tribute.study.pilot_record import pilot_warning
from tribute.study.record import StudyRecord, by_role
from tribute.study.results import StudyResult, read_fit_evaluations
from tribute.study.run_folder import RunLock, claim_run_dir
from tribute.study.session import StudySession, check_settings, study_preset, study_trainings
from tribute.study.work import work_through
from tribute.types import Attributions


def run_study(config: StudyConfig, listener: Listener, *, wait: bool = False) -> StudyResult | None:
    """Run all stages of a study, or what is left of them.

    Args:
        config: The study.
        listener: Is told how far it is.
        wait: Wait for another process that writes into the run folder, instead of refusing.

    Returns:
        None on the processes of `accelerate launch` that only help the main one to train and sample, and where
        `max_device_hours` did not suffice for anything to be fitted; the listener was told.

    Raises:
        MixedResultsError: The run folder or the store holds a study with other settings.
        ConfigError: This machine cannot do what the settings ask for.
        StoreError: Another process writes into the run folder.
    """
    with RunLock(config.run_dir, wait=wait, on_wait=listener.message) as lock:
        try:
            prepared = prepare_study(config, listener, lock)
        except StoppedEarly as stopped:
            listener.message(str(stopped))
            return None
        if prepared is None:
            return None
        if (warning := pilot_warning(config.run_dir)) is not None:
            listener.message(warning)
        with Store.open(config.db_url) as store:
            if store.serves_many_hosts:
                lock.release()  # claims keep several processes apart; each helps the others
            stopped = _measure(config, prepared, store, listener)
            return _fit(config, prepared, store, listener, stopped)


def _measure(config: StudyConfig, prepared: PreparedStudy, store: Store, listener: Listener) -> StoppedEarly | None:
    """Measure the coalitions; returns why it ended before all were measured, where it did."""
    record, specs, budget = prepared.record, prepared.specs, prepared.budget
    study_id = open_study(store, config, record)
    listener.stage("Coalitions")
    stopped: StoppedEarly | None = None
    executor = make_executor(prepared, listener)
    tried_again: set[int] = set()

    def measure(specs: list[EvaluationSpec]) -> list[int]:
        evaluation_ids = store.add(study_id, specs)
        store.retry(study_id, evaluation_ids=[i for i in evaluation_ids if i not in tried_again])
        tried_again.update(evaluation_ids)  # once in a run: what fails in it is set aside
        within = go_on_within(budget, store, study_id, evaluation_ids)
        end_points = EndPointsWatch(store, study_id, evaluation_ids)
        work_through(
            executor,
            store,
            study_id,
            evaluation_ids,
            record.behaviors,
            listener,
            go_on=lambda: within() and end_points.can_be_had(),
        )
        if budget is not None and budget.stopped:
            raise StoppedEarly(budget.message(read_costs(config, record, store)))
        return evaluation_ids

    def credit(evaluation_ids: list[int], behavior_name: str) -> Attributions:
        fit, end_points = read_fit_evaluations(store, study_id, evaluation_ids, behavior_name)
        return fit_attributions(
            fit.masks,
            fit.behaviors,
            end_points,
            design=config.fit.design_name,
            estimator=config.estimator,
            contributor_names=record.contributor_names,
        )

    try:
        if config.fit.until_interval is not None:
            specs = measure_until_narrow(config.fit.until_interval, specs, record.behaviors, measure, credit, listener)
            replace(record, evaluations=by_role(specs)).write(config.run_dir)
        measure(specs)
    except StoppedEarly as error:
        stopped = error
    finally:
        executor.close()
    return stopped


def _fit(
    config: StudyConfig, prepared: PreparedStudy, store: Store, listener: Listener, stopped: StoppedEarly | None
) -> StudyResult | None:
    """Attributions and LDS of what was measured, with the manifest; then pictures, and the helpers are dismissed."""
    listener.stage("Attributions and LDS")
    if stopped is not None:
        listener.message(str(stopped))
    ingredients = gather_ingredients(config, prepared.session, prepared.full, prepared.sparse)
    try:
        result = read_and_attest(config, StudyRecord.read(config), store, ingredients)
    except FitError as error:
        prepared.session.team.dismiss()
        if stopped is None:
            raise
        listener.message(f"nothing can be fitted yet: {error}")
        return None
    if stopped is None and config.pictures.n_images:
        _draw_pictures(prepared, store, result, listener)
    prepared.session.team.dismiss()
    return result


def _draw_pictures(prepared: PreparedStudy, store: Store, result: StudyResult, listener: Listener) -> None:
    """Make the pictures of a study within its budget; what cannot be made costs no result."""
    listener.stage("Pictures")
    study_id = prepared.record.study_id(store)
    try:
        make_pictures(
            prepared.session,
            prepared.full,
            prepared.sparse,
            next(spec for spec in prepared.specs if spec.role == "grand"),
            store,
            study_id,
            result,
            listener,
            go_on_for=lambda evaluation_ids: go_on_within(prepared.budget, store, study_id, evaluation_ids),
        )
    except TributeError as error:
        listener.message(f"not all pictures were made: {error}")


@dataclass(frozen=True)
class PreparedStudy:
    """A study whose models are there, and whose coalitions can be measured.

    Attributes:
        session: This process's data, extractors and value functions.
        full: Trained on everybody.
        sparse: Pruned and fine-tuned on everybody.
        specs: All evaluations that the study asks for, in the order of their worth.
        record: What is known before the first of them, as written into the run folder.
        budget: Of `max_device_hours`; None without one.
    """

    session: StudySession
    full: Checkpoint
    sparse: Checkpoint
    specs: list[EvaluationSpec]
    record: StudyRecord
    budget: Budget | None = None


def prepare_study(config: StudyConfig, listener: Listener, lock: RunLock | None = None) -> PreparedStudy | None:
    """Everything before the first coalition: data, full model, sparse model, plan; what is there is not made again.

    Args:
        config: The study.
        listener: Is told how far it is.
        lock: Taken before anything is written into the run folder.

    Returns:
        None on the processes of `accelerate launch` that only help the main one, once it dismisses them.

    Raises:
        MixedResultsError: The run folder holds a study with other settings.
        ConfigError: This machine cannot do what the settings ask for.
        StoppedEarly: `max_device_hours` does not suffice for the models; the message says how to go on.
        StoreError: Another process has the lock.
    """
    check_execution(config.execution)
    if lock is not None and config.run_dir.exists() and os.environ.get("RANK", "0") == "0":
        lock.acquire()  # a second run is told at once, not after it has read the data
    loaded = None if config.full_model.load is None else load_model(config.full_model.load)
    if loaded is not None:
        check_not_pruned(loaded, setting="full_model.load")
        check_trained_on_everybody(loaded, setting="full_model.load")
    preset = study_preset(config, loaded)
    check_settings(config, preset)
    listener.stage("Data")
    session = StudySession(
        config,
        preset,
        on_block=lambda n_done, n_images: listener.progress("encoding", n_done, n_images, "images"),
    )
    worker = session.worker
    leads = worker.trainer.processes.is_main
    if leads:
        if lock is not None:
            lock.acquire()
        claim_run_dir(config)  # only now: what is wrong in the settings must not be kept as the study's
        remove_leftovers(config.run_dir)
    table = worker.data.contributors
    listener.message(f"{worker.data.n_examples:,} images of {table.n_contributors} contributors")
    if leads:
        worker.behavior_definitions()  # loads every extractor: what is missing is found before hours of training
        if worker.classifier_accuracy is not None:
            listener.message(f"classifier: held-out accuracy {worker.classifier_accuracy:.1%}")
    budget = None if config.max_device_hours is None else Budget(config, n_processes=worker.trainer.processes.n)
    try:
        full, sparse = train_and_prune(config, preset, worker, listener, loaded, budget)
    except StoppedEarly as stopped:
        raise StoppedEarly(str(stopped) if budget is None else budget.message()) from stopped
    session.use_models(full, sparse)
    if not leads:
        session.team.follow()
        return None
    specs = list(plan_evaluations(config, table.n_contributors, session.settings))
    record = StudyRecord(
        name=config.name,
        dataset=config.dataset,
        contributor_names=tuple(table.names),
        n_examples=tuple(int(n) for n in table.n_examples),
        fingerprint=worker.data.fingerprint,
        behaviors=tuple(worker.reported_behaviors()),
        evaluations=by_role(specs),
        models={
            "full": _full_model_record(full, loaded=loaded is not None),
            "sparse": {**model_costs(sparse.meta).as_record(), **load_pruned_summary(config)},
        },
        classifier_accuracy=worker.classifier_accuracy,
        provenance=worker.provenance(),
    )
    record.write(config.run_dir)
    if budget is not None:
        budget.refresh()
        budget.estimate = estimate_from_training(record.models, study_trainings(config, preset), session.sampling)
    return PreparedStudy(session, full, sparse, specs, record, budget)


def go_on_within(
    budget: Budget | None, store: Store, study_id: int, evaluation_ids: Sequence[int]
) -> Callable[[], bool]:
    """What an executor asks before each of some evaluations: whether the budget allows it."""
    if budget is None:
        return always
    return lambda: budget.allows_next(store, study_id, evaluation_ids)


def _full_model_record(full: Checkpoint, *, loaded: bool) -> dict[str, Any]:
    """What the record says of the full model; one that was loaded took this study no time."""
    costs = ModelCosts(full.n_steps) if loaded else model_costs(full.meta)
    return {**costs.as_record(), **({"origin": full.meta["origin"]} if is_foreign(full) else {})}


def make_executor(prepared: PreparedStudy, listener: Listener) -> Executor:
    """What measures the coalitions of a study, as `execution` says; to be closed.

    Raises:
        ConfigError: Workers of Ray beside the processes of `accelerate launch`.
    """
    session = prepared.session
    config, worker = session.config, session.worker
    if config.execution.executor == "ray":
        if worker.trainer.processes.n > 1:
            raise ConfigError(
                "execution.executor: a study is measured by workers of Ray or by the processes of accelerate launch; "
                f"found ray in a launch of {worker.trainer.processes.n} processes. Use one of the two"
            )
        from tribute.study.ray_executor import RayExecutor, StudyAssignment

        return RayExecutor(
            StudyAssignment.of(session, prepared.full, prepared.sparse),
            definitions=worker.behavior_definitions(),
            execution=config.execution,
            n_threads=config.n_threads,
            namespace=f"tribute-{config.name}",
            on_message=listener.message,
        )
    return SerialExecutor(
        session.measure,
        definitions=worker.behavior_definitions(),
        provenance=worker.provenance(),
        stall_seconds=config.execution.stall_seconds,
    )


def open_study(store: Store, config: StudyConfig, record: StudyRecord) -> int:
    """The number of a study in its store, made when it is new."""
    return store.open_study(
        config.name,
        dataset=config.dataset,
        contributor_names=record.contributor_names,
        n_examples=record.n_examples,
        fingerprint=record.fingerprint,
        config=config.without_password(),
    )


def measure_until_narrow(
    half_width: float,
    specs: list[EvaluationSpec],
    behavior_names: tuple[str, ...],
    measure: Callable[[list[EvaluationSpec]], list[int]],
    credit: Callable[[list[int], str], Attributions],
    listener: Listener,
) -> list[EvaluationSpec]:
    """Measure fit coalitions until the intervals of every behavior are narrow (`games.stopping`).

    Looks depend on what is in the store alone, so a study that is run again stops where it stopped.

    Args:
        half_width: Of the widest interval, as a share of |v(grand) - v(empty)|.
        specs: The plan, fit coalitions in order.
        behavior_names: All must be narrow.
        measure: Measures evaluations and returns their numbers.
        credit: Shapley values of a behavior from evaluations.
        listener: Is told of every look.

    Returns:
        The plan without the fit coalitions that were not needed.
    """
    ends = [spec for spec in specs if spec.role in ("empty", "grand")]
    fit = [spec for spec in specs if spec.role == "fit"]
    others = [spec for spec in specs if spec.role not in ("empty", "grand", "fit")]
    history: dict[str, list[Attributions]] = {name: [] for name in behavior_names}
    n_contributors = len(fit[0].coalition_mask)
    for n_coalitions in looks(n_contributors, len(fit)):
        evaluation_ids = measure(ends + fit[:n_coalitions])
        for name, found in history.items():
            found.append(credit(evaluation_ids, name))
        widths = {name: share_half_width(found[-1]) for name, found in history.items()}
        widest = ", ".join(f"{name} +- {width:.1%}" for name, width in widths.items())
        listener.message(f"{n_coalitions} coalitions: widest 95 % interval {widest}; asked for +- {half_width:.1%}")
        if all(narrow_enough(found, half_width) for found in history.values()):
            listener.message(
                f"narrow enough at two looks in a row: {len(fit) - n_coalitions} coalitions are not needed"
            )
            return ends + fit[:n_coalitions] + others
    listener.message(
        f"not narrow enough with all {len(fit)} coalitions of fit.n_coalitions; raise it, or fit.n_end_points where "
        "the noise of v(empty) and v(grand) is most of the interval"
    )
    return specs
