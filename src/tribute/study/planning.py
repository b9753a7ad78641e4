"""`tribute plan`: checks the settings, measures on this machine, and subtracts what is there."""

from __future__ import annotations

import time
from typing import Any

from tribute.config import StudyConfig
from tribute.models.pipelines import load_model
from tribute.study.evaluations import plan_evaluations
from tribute.study.pictures import MAX_BEHAVIORS
from tribute.study.plan import StudyPlan, plan_study, read_done
from tribute.study.session import check_settings, study_preset, study_trainings
from tribute.study.unit_costs import measure_unit_costs, planning_worker


def make_plan(config: StudyConfig, *, device: str | None = None, started: float | None = None) -> StudyPlan:
    """What a study takes on this machine; nothing is written into its run folder or its store.

    Args:
        config: The study.
        device: `cpu` or `cuda`; None chooses.
        started: `time.perf_counter()` when this process began; None: now.

    Raises:
        ConfigError: This machine cannot do what the settings ask for, found before anything is measured.
        FitError: There are fewer coalitions than the study asks for.
        DataError: The training data cannot be read.
    """
    started = time.perf_counter() if started is None else started
    preset = study_preset(config, None if config.full_model.load is None else load_model(config.full_model.load))
    check_settings(config, preset)
    with planning_worker(config, preset, device=device) as worker:
        worker.check_measurement(preset.sampling, config.local)
        seconds_setup = time.perf_counter() - started
        any_settings: dict[str, dict[str, Any]] = {"gd": {}, "retrain": {}}
        specs = list(plan_evaluations(config, worker.data.contributors.n_contributors, any_settings))
        done = read_done(config)
        units = measure_unit_costs(worker, config, preset, seconds_setup=seconds_setup)
    sampling = preset.sampling
    if worker.local_names and not worker.behaviors:
        sampling = sampling.replace(n_samples=config.local.n_samples)
    return plan_study(
        config,
        study_trainings(config, preset),
        sampling.n_samples,
        specs,
        units,
        done,
        n_behaviors=len(config.behaviors) + (8 * config.local.n_samples if worker.local_names else 0),
        n_pictured_behaviors=min(MAX_BEHAVIORS, len(worker.behaviors)),
    )
