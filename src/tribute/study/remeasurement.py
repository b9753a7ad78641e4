"""The strongest check of a run: its models loaded, and coalitions measured again from the sparse model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tribute.config import StudyConfig, fingerprint
from tribute.errors import TributeError
from tribute.models.checkpoint import Checkpoint, load_checkpoint
from tribute.models.pipelines import load_model
from tribute.seeding import numpy_stream
from tribute.store.records import StoredEvaluation
from tribute.study.evaluations import plan_evaluations
from tribute.study.findings import Verification, fingerprint_difference
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.manifest import settings_of_results
from tribute.study.record import StudyRecord
from tribute.study.session import StudySession, study_preset

_WHAT_ROUNDS = ("device", "platform", "versions", "n_threads", "n_processes", "runtime")
"""Provenance under which a measurement is the same to the last bit."""


def remeasure(
    found: Verification,
    config: StudyConfig,
    record: StudyRecord,
    evaluations: Sequence[StoredEvaluation],
    *,
    n_evaluations: int = 1,
    seed: int = 0,
) -> None:
    """Load data, extractors and models, compare what identifies them, and measure fit coalitions again.

    Args:
        found: Is told what agrees, what differs and what could not be checked.
        config: The study.
        record: What belongs to it.
        evaluations: Of the study, as stored.
        n_evaluations: How many finished fit coalitions to measure again.
        seed: Which ones; whoever makes a run should not be able to foresee it.
    """
    chosen = draw_evaluations(evaluations, n_evaluations, seed)
    if not chosen:
        found.unchecked.append("measurements: no fit coalition is finished that could be measured again")
        return
    # As many threads as then, so that sums have the same order.
    n_threads = chosen[0].provenance.get("n_threads", config.n_threads)
    try:
        session = open_session(found.run_dir, config.replace(n_threads=n_threads))
    except TributeError as error:
        found.unchecked.append(f"measurements: the study cannot be set up on this machine ({error})")
        return
    if not _compare_ingredients(found, config, record, session, chosen[0].provenance):
        session.team.dismiss()
        return
    try:
        for item in chosen:
            _measure_again(found, item, session)
    except TributeError as error:
        found.differences.append(f"measurements: a coalition cannot be measured again ({error})")
    finally:
        session.team.dismiss()


def draw_evaluations(evaluations: Sequence[StoredEvaluation], n_evaluations: int, seed: int) -> list[StoredEvaluation]:
    """Some finished fit coalitions, by identity and seed alone."""
    candidates = [item for item in evaluations if item.status == "finished" and item.spec.role == "fit"]
    candidates.sort(key=lambda item: item.spec.identity)
    order = numpy_stream(seed, "verify/evaluations").permutation(len(candidates))
    return [candidates[i] for i in order[:n_evaluations]]


def open_session(run_dir: Path, config: StudyConfig) -> StudySession:
    """A process's part in a study whose models are in a run folder, wherever that lies.

    Raises:
        TributeError: Data, a model, an extractor or a codec is not here.
    """
    dataset, pruning = dataset_folder(config.dataset), pruning_name(config.prune)
    loaded: Checkpoint | None = None
    if config.full_model.load is not None:
        loaded = load_model(config.full_model.load)
    full = loaded or load_checkpoint(models_dir(run_dir, dataset, "retrain", "full"))
    sparse = load_checkpoint(models_dir(run_dir, dataset, "prune_fine_tune", pruning, "full"))
    session = StudySession(config, study_preset(config, loaded))
    session.worker.behavior_definitions()
    session.use_models(full, sparse)
    return session


def _compare_ingredients(
    found: Verification,
    config: StudyConfig,
    record: StudyRecord,
    session: StudySession,
    measured_on: Mapping[str, Any],
) -> bool:
    """Data, settings, extractors and codec of this process against those recorded, and the plan that they give.

    Returns:
        Whether measuring again would tell anything.
    """
    worker = session.worker
    differences = []
    if worker.data.fingerprint != record.fingerprint:
        differences.append(fingerprint_difference("data", record.fingerprint, worker.data.fingerprint))
    if found.manifest is not None:
        values = found.manifest.values
        now = settings_of_results(config, session.preset.model_dump(mode="json"))
        differences += _compare("settings", {"study": values["result"]["settings"]}, {"study": fingerprint(now)})
        codec = {} if values["codec"] is None else {"of the data": values["codec"]["fingerprint"]}
        here = {} if worker.latent_space is None else {"of the data": worker.latent_space.fingerprint}
        differences += _compare("codec", codec, here)
        recorded = {name: item["fingerprint"] for name, item in values["extractors"].items()}
        others = _compare("extractor", recorded, worker.measurement.fingerprints())
        was_trained = any("seed" in item for item in values["extractors"].values())
        if others and was_trained and (machine := _other_machine(measured_on, session)):
            found.differences += differences
            found.unchecked.append(
                f"measurements: {'; '.join(others)}: it was trained anew, with another {machine}, which may change "
                "digits. Verify with the cache of the run (TRIBUTE_CACHE), where the trained classifier is"
            )
            return False
        differences += others
    planned = {spec.identity for spec in plan_evaluations(config, record.n_contributors, session.settings)}
    recorded_plan = [identity for identities in record.evaluations.values() for identity in identities]
    n_other = sum(identity not in planned for identity in recorded_plan)
    if n_other:
        differences.append(
            f"plan: {n_other} of {len(recorded_plan)} evaluations in study.json do not follow from these settings, "
            "data, models and extractors"
        )
    found.conclude(
        differences,
        f"data, extractors, settings and models, loaded anew, give the {len(recorded_plan)} recorded evaluations",
    )
    return True


def _other_machine(measured_on: Mapping[str, Any], session: StudySession) -> str:
    """In what this process differs from the one that measured, of what may change digits; empty where in nothing."""
    here = session.worker.provenance()
    return ", ".join(what for what in _WHAT_ROUNDS if measured_on.get(what) != here.get(what))


def _compare(what: str, recorded: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Fingerprints that differ, by name."""
    return [
        fingerprint_difference(f"{what} {name}", recorded.get(name, "none"), here.get(name, "none"))
        for name in dict.fromkeys([*recorded, *here])
        if recorded.get(name) != here.get(name)
    ]


def _measure_again(found: Verification, item: StoredEvaluation, session: StudySession) -> None:
    """One coalition by its method, against the stored values."""
    spec = item.spec
    now = session.measure(spec.method, np.array(spec.coalition_mask), opt_seed=spec.opt_seed).behaviors
    title = f"measured again: evaluation {item.evaluation_id} ({spec})"
    if now == item.behaviors:
        found.agreed.append(f"{title}: {len(now)} behaviors are identical to the last bit")
        return
    name = max(
        dict.fromkeys([*item.behaviors, *now]),
        key=lambda name: (
            abs(now.get(name, np.inf) - item.behaviors.get(name, np.inf))
            / max(abs(item.behaviors.get(name, np.inf)), 1e-300)
        ),
    )
    values = f"{name} stored {item.behaviors.get(name)}, now {now.get(name)}"
    if machine := _other_machine(item.provenance, session):
        found.unchecked.append(
            f"{title}: it was measured with another {machine}, which may change digits: {values}. Compare on "
            "the machine and with the versions of the run"
        )
    else:
        found.differences.append(f"{title}: {values}, on the same device with the same versions and threads")
