"""A whole study in one warm process, through the store, continued wherever it stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tribute.config import Preset, StudyConfig, StudyModelConfig, TrainConfig
from tribute.diffusion.preflight import check_precision, check_training
from tribute.diffusion.train import Progress
from tribute.errors import ConfigError, FitError, MixedResultsError, StoreError
from tribute.files import write_whole
from tribute.games.coalitions import empty_coalition, grand_coalition, mask_from_idx
from tribute.games.designs import PAIRED_DESIGNS, coalitions_from
from tribute.games.lds import MIN_TEST_COALITIONS, LDSTestSet
from tribute.games.stopping import looks, narrow_enough, share_half_width
from tribute.models.checkpoint import Checkpoint
from tribute.models.pipelines import adopt_model, is_foreign, load_model
from tribute.store.records import ClaimedEvaluation, EvaluationSpec, EvaluationTable, Store
from tribute.study.attribution import (
    EndPoints,
    Validation,
    fit_attributions,
    split_by_seed,
    validate,
    without_tested,
)
from tribute.study.compatibility import check_not_pruned, check_same_data, check_trained_on_everybody
from tribute.study.executors import SerialExecutor
from tribute.study.layout import dataset_folder, models_dir, pruning_name
from tribute.study.stages import Saving, prune_model, train_model
from tribute.study.team import Team
from tribute.study.value_function import Evaluation
from tribute.study.worker import Worker
from tribute.types import Attributions, Behaviors, CoalitionMask, CoalitionMasks

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    "outdir",
    "codec",
    "n_threads",
    "estimator",
    "features.weights",
    "features.models",
    "features.revisions",
    "features.aesthetic_head",
    "features.batch_size",
    "fit.n_coalitions",
    "fit.until_interval",
    "fit.leave_one_out",
    "fit.n_end_points",
} | {
    "runtime.compile",
    "runtime.compile_backend",
    "runtime.channels_last",
    "runtime.gradient_checkpointing",
    "test.n_coalitions",
    "test.opt_seeds",
}
"""Settings under which a study can be continued: they add evaluations, or change how results are computed or read."""


class Listener(Protocol):
    """What a study reports while it runs."""

    def stage(self, title: str) -> None:
        """A stage begins."""
        ...

    def message(self, text: str) -> None:
        """A fact worth a line."""
        ...

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None:
        """A stage advances; `text` says what was just done."""
        ...


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
    """

    config: StudyConfig
    contributor_names: tuple[str, ...]
    n_examples: tuple[int, ...]
    behaviors: list[BehaviorResult]
    timings: dict[str, dict[str, float]]
    models: dict[str, Any]
    classifier_accuracy: float | None
    provenance: dict[str, Any]


def run_study(config: StudyConfig, listener: Listener) -> StudyResult | None:
    """Run all stages of a study, or what is left of them.

    Returns:
        None on the processes of `accelerate launch` that only help the main one to train and sample.

    Raises:
        MixedResultsError: The run folder or the store holds a study with other settings.
        ConfigError: This machine cannot do what the settings ask for.
    """
    loaded = None if config.full_model.load is None else load_model(config.full_model.load)
    if loaded is not None:
        check_not_pruned(loaded, setting="full_model.load")
        check_trained_on_everybody(loaded, setting="full_model.load")
    preset = study_preset(config, loaded)
    check_settings(config, preset)
    listener.stage("Data")
    worker = Worker(
        config.data,
        preset,
        behaviors=config.behaviors,
        features=config.features,
        mixed_precision=preset.train_config("retrain").mixed_precision,
        runtime=config.runtime,
        n_threads=config.n_threads,
        on_block=lambda n_done, n_images: listener.progress("encoding", n_done, n_images, "images"),
    )
    worker.check_measurement(preset.sampling, config.local)
    leads = worker.trainer.processes.is_main
    if leads:
        claim_run_dir(config)  # only now: what is wrong in the settings must not be kept as the study's
    data, table = worker.data, worker.data.contributors
    listener.message(f"{data.n_examples:,} images of {table.n_contributors} contributors")
    if leads:
        worker.behavior_definitions()  # loads every extractor: what is missing is found before hours of training
        if worker.classifier_accuracy is not None:
            listener.message(f"classifier: held-out accuracy {worker.classifier_accuracy:.1%}")
    full, sparse = _train_and_prune(config, preset, worker, listener, loaded)
    sft = train_settings(preset, config.gd, "gd", config.opt_seed)
    retrain = train_settings(preset, config.retrained_model, "retrain", config.opt_seed)
    sampling = worker.compare_with(full, preset.sampling, config.local)
    value_functions = {
        "gd": worker.value_function(worker.fine_tuning(sparse, sft, use_ema=sampling.use_ema), sampling),
        "retrain": worker.value_function(worker.retraining(retrain, use_ema=sampling.use_ema), sampling),
    }
    team = Team(worker.trainer.processes, value_functions, table.n_contributors)
    if not leads:
        team.follow()
        return None
    settings = {
        "gd": worker.settings(sampling, train=sft, start=sparse.model_hash, use_ema=sampling.use_ema),
        "retrain": worker.settings(sampling, train=retrain, start=preset.unet.fingerprint(), use_ema=sampling.use_ema),
    }
    models = {
        "full": {"n_steps": full.n_steps, **({"origin": full.meta["origin"]} if is_foreign(full) else {})},
        "sparse": {"n_steps": sparse.n_steps, **_pruning_summary(config, worker)},
    }
    del loaded, full, sparse  # their tensors; coalitions are measured for hours
    specs = list(plan_evaluations(config, table.n_contributors, settings))
    with Store.open(config.db_url) as store:
        study_id = store.open_study(
            config.name,
            dataset=config.dataset,
            contributor_names=table.names,
            n_examples=[int(n) for n in table.n_examples],
            fingerprint=data.fingerprint,
            config=config.model_dump(mode="json"),
        )
        listener.stage("Coalitions")

        def measure(specs: list[EvaluationSpec]) -> list[int]:
            evaluation_ids = store.add(study_id, specs)
            _evaluate(worker, store, study_id, evaluation_ids, team, listener)
            return evaluation_ids

        if config.fit.until_interval is not None:

            def credit(evaluation_ids: list[int], behavior_name: str) -> Attributions:
                fit, end_points = read_fit_evaluations(store, study_id, evaluation_ids, behavior_name)
                return fit_attributions(
                    fit.masks,
                    fit.behaviors,
                    end_points,
                    design=config.fit.design_name,
                    estimator=config.estimator,
                    contributor_names=table.names,
                )

            names = tuple(worker.reported_behaviors())
            specs = measure_until_narrow(config.fit.until_interval, specs, names, measure, credit, listener)
        evaluation_ids = measure(specs)
        team.dismiss()
        listener.stage("Attributions and LDS")
        results = [
            summarise_behavior(config, store, study_id, evaluation_ids, name, table.names)
            for name in worker.reported_behaviors()
        ]
        timings = median_seconds(store, study_id, evaluation_ids)
    return StudyResult(
        config=config,
        contributor_names=table.names,
        n_examples=tuple(int(n) for n in table.n_examples),
        behaviors=results,
        timings=timings,
        models=models,
        classifier_accuracy=worker.classifier_accuracy,
        provenance=worker.provenance(),
    )


def study_preset(config: StudyConfig, loaded: Checkpoint | None) -> Preset:
    """The recipe of a study: its preset, for the full model that is loaded where one is, with the study's codec.

    Raises:
        ConfigError: The study names a codec, and neither the preset nor the model has one.
    """
    preset = config.load_preset()
    return (preset if loaded is None else adopt_model(preset, loaded)).with_codec(config.codec)


def check_settings(config: StudyConfig, preset: Preset) -> None:
    """Refuse a study that this machine cannot run, before anything is read.

    Raises:
        ConfigError: A batch, precision, optimizer or compiler that cannot be had, or more than one precision; the
            message names the setting.
    """
    stages = {"full_model": "retrain", "sparse_model": "prune_fine_tune", "gd": "gd", "retrained_model": "retrain"}
    precisions: dict[str, str] = {}
    for stage, method in stages.items():
        train = train_settings(preset, getattr(config, stage), method, config.opt_seed)
        check_training(train, runtime=config.runtime)
        precisions[stage] = train.mixed_precision
    if len(set(precisions.values())) > 1:
        found = ", ".join(f"{stage} {precision}" for stage, precision in precisions.items())
        raise ConfigError(
            f"mixed_precision: one process trains all models of a study, in one precision; found {found}. Set "
            "mixed_precision in the study, or the same for every method of the preset"
        )
    check_precision(preset.sampling.mixed_precision, None)


def claim_run_dir(config: StudyConfig) -> None:
    """Write the resolved settings into the run folder, or compare them with those that are there."""
    path = config.run_dir / "config.yaml"
    if path.exists():
        saved = _flat(StudyConfig.from_yaml(path).model_dump(mode="json"))
        asked = _flat(config.model_dump(mode="json"))
        differing = [key for key in asked if key not in _MAY_CHANGE and saved.get(key) != asked[key]]
        if differing:
            lines = "; ".join(f"{key}: saved {saved.get(key)!r}, asked {asked[key]!r}" for key in differing)
            raise MixedResultsError(
                f"{config.run_dir} holds a study with other settings: {lines}. "
                "Restore them, or give the study another name to start afresh"
            )
    try:
        write_whole(path, config.to_yaml())
    except OSError as error:
        raise StoreError(f"the run folder {config.run_dir} is not writable ({error}); set another outdir") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names; a mapping with free keys stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("sampling", "weights", "models", "revisions"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def train_settings(preset: Preset, changes: StudyModelConfig, method: str, opt_seed: int) -> TrainConfig:
    """Training settings of a stage: the preset's, with the study's changes."""
    return preset.train_config(method, opt_seed=opt_seed, **changes.model_dump(exclude={"load"}))


def _train_and_prune(
    config: StudyConfig, preset: Preset, worker: Worker, listener: Listener, loaded: Checkpoint | None
) -> tuple[Checkpoint, Checkpoint]:
    """The full model, trained unless it was loaded, and the sparse model fine-tuned on everyone."""
    everyone = grand_coalition(worker.data.contributors.n_contributors)

    def saving(method: str, *parts: str) -> Saving:
        freq = config.ckpt_freq or preset.ckpt_freq.get(method, 1000)
        return Saving(models_dir(config.run_dir, dataset_folder(config.dataset), method, *parts), freq)

    def report(title: str) -> Any:
        def on_log(at: Progress) -> None:
            text = f"loss {at.loss:.4f}, {at.images_per_second:,.0f} images/s"
            listener.progress(title, at.step, at.n_steps, text)

        return on_log

    listener.stage("Full model")
    if loaded is not None:
        check_same_data(loaded, worker)
        full = loaded
        listener.message(f"loaded from {config.full_model.load}")
    else:
        full = train_model(
            worker,
            train_settings(preset, config.full_model, "retrain", config.opt_seed),
            saving("retrain", "full"),
            method="retrain",
            coalition_mask=everyone,
            on_log=report("training"),
        )
    listener.stage("Sparse model")
    with worker.trainer.processes.main_first():
        pruned, result = prune_model(worker, full, config.prune, _pruned_dir(config))
    summary = pruned.meta["pruning"] if result is None else result.summary()
    parameters, macs = summary["n_parameters"], summary["n_macs"]
    listener.message(
        f"{config.prune.pruner} pruning: parameters {parameters['before']:,} -> {parameters['after']:,}, "
        f"multiply-accumulates {macs['before']:,} -> {macs['after']:,}"
    )
    sparse = train_model(
        worker,
        train_settings(preset, config.sparse_model, "prune_fine_tune", config.opt_seed),
        saving("prune_fine_tune", pruning_name(config.prune), "full"),
        method="prune_fine_tune",
        coalition_mask=everyone,
        start=pruned,
        on_log=report("fine-tuning"),
    )
    return full, sparse


def _pruned_dir(config: StudyConfig) -> Path:
    return models_dir(config.run_dir, dataset_folder(config.dataset), "pruned", pruning_name(config.prune))


def _pruning_summary(config: StudyConfig, worker: Worker) -> dict[str, Any]:
    """Figures of the pruning stage, read back from its checkpoint."""
    from tribute.models.checkpoint import load_checkpoint

    return dict(load_checkpoint(_pruned_dir(config)).meta["pruning"])


def plan_evaluations(
    config: StudyConfig, n_contributors: int, settings: dict[str, dict[str, Any]]
) -> Iterator[EvaluationSpec]:
    """All evaluations of a study: end points first, then fit coalitions, then test coalitions seed by seed.

    Fit and test coalitions are distinct, and no coalition is both: a draw that was seen before is passed
    over, so seed j, or row j of a design, names the same coalition in every study of as many contributors.

    Raises:
        FitError: There are fewer such coalitions than asked for.
    """

    def spec(method: str, role: str, mask: Any, opt_seed: int, **draw: Any) -> EvaluationSpec:
        return EvaluationSpec(
            exp_name=config.name,
            dataset=config.dataset,
            method=method,
            removal_dist=draw.get("removal_dist"),
            datamodel_alpha=draw.get("datamodel_alpha"),
            removal_seed=draw.get("removal_seed"),
            coalition_mask=mask,
            opt_seed=opt_seed,
            settings=settings[method],
            role=role,
            priority=("empty", "grand", "fit", "loo", "test").index(role),
        )

    for repeat in range(config.fit.n_end_points):
        opt_seed = config.opt_seed + repeat
        yield spec("gd", "empty", empty_coalition(n_contributors), opt_seed, removal_dist="empty")
        yield spec("gd", "grand", grand_coalition(n_contributors), opt_seed)
    test = _distinct_draws(
        "datamodel",
        n_contributors,
        config.test.n_coalitions,
        config.test.first_removal_seed,
        config.test.datamodel_alpha,
        seen=set(),
    )
    fit = _distinct_draws(
        config.fit.drawn_from,
        n_contributors,
        config.fit.n_coalitions,
        config.fit.first_removal_seed,
        config.fit.datamodel_alpha,
        seen={mask.tobytes() for _, mask in test},
    )
    for removal_seed, mask in fit:
        yield spec(
            "gd",
            "fit",
            mask,
            config.opt_seed,
            removal_dist=config.fit.drawn_from,
            datamodel_alpha=config.fit.datamodel_alpha if config.fit.drawn_from == "datamodel" else None,
            removal_seed=removal_seed,
        )
    if config.fit.leave_one_out:
        for contributor_idx in range(n_contributors):
            mask = ~mask_from_idx([contributor_idx], n_contributors)
            yield spec("gd", "loo", mask, config.opt_seed, removal_dist="loo", removal_seed=contributor_idx)
    for opt_seed in config.test.opt_seeds:
        for removal_seed, mask in test:
            yield spec(
                "retrain",
                "test",
                mask,
                opt_seed,
                removal_dist="datamodel",
                datamodel_alpha=config.test.datamodel_alpha,
                removal_seed=removal_seed,
            )


def _distinct_draws(
    removal_dist: str, n_contributors: int, n_coalitions: int, first_seed: int, alpha: float, *, seen: set[bytes]
) -> list[tuple[int, CoalitionMask]]:
    """The first distinct coalitions of a removal distribution or design, with their seeds.

    Of complement pairs both must be new, or neither is taken.
    """
    together = 2 if removal_dist in PAIRED_DESIGNS else 1
    n_tries = first_seed + 1000 + 100 * n_coalitions
    rows = coalitions_from(removal_dist, n_contributors, first_seed - first_seed % together, datamodel_alpha=alpha)
    seen = set(seen)
    draws: list[tuple[int, CoalitionMask]] = []
    while len(draws) < n_coalitions:
        group = list(islice(rows, together))
        if not group or group[0][0] > n_tries:
            raise FitError(
                f"{removal_dist}: expected {n_coalitions} distinct coalitions of {n_contributors} contributors, "
                f"found only {len(draws)} that are not test coalitions; ask for fewer"
            )
        keys = {mask.tobytes() for _, mask in group}
        if not keys & seen:
            seen |= keys
            draws += group
    return draws[:n_coalitions]


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


def _evaluate(
    worker: Worker,
    store: Store,
    study_id: int,
    evaluation_ids: list[int],
    team: Team,
    listener: Listener,
) -> None:
    """Measure every evaluation that is still to be measured."""
    store.retry(study_id, evaluation_ids=evaluation_ids)
    n_total = len(evaluation_ids)
    n_before = store.counts(study_id, evaluation_ids=evaluation_ids)["finished"]
    if n_before:
        listener.message(f"{n_before} of {n_total} evaluations are done already")
    remaining = {
        method: sum(
            store.counts(
                study_id, method=method, statuses=("pending", "running"), evaluation_ids=evaluation_ids
            ).values()
        )
        for method in team.value_functions
    }
    spent: dict[str, list[float]] = {method: [] for method in team.value_functions}
    reported = worker.reported_behaviors()
    titles = {
        "empty": "end points",
        "grand": "end points",
        "fit": "fit",
        "loo": "leave one out",
        "test": "test",
    }

    def evaluate(claimed: ClaimedEvaluation) -> Evaluation:
        started = time.perf_counter()
        spec = claimed.spec
        evaluation = team.measure(spec.method, np.array(spec.coalition_mask), opt_seed=spec.opt_seed)
        if spec.coalition_mask.any():
            spent[spec.method].append(time.perf_counter() - started)
        return evaluation

    def on_done(claimed: ClaimedEvaluation, evaluation: Evaluation) -> None:
        remaining[claimed.spec.method] -= 1
        rates = {method: float(np.mean(values)) if values else 0.0 for method, values in spent.items()}
        fallback = max(rates.values())
        left = sum(count * (rates[method] or fallback) for method, count in remaining.items())
        values = ", ".join(f"{name} {evaluation.behaviors[name]:.3f}" for name in reported)
        title = titles[claimed.spec.role or "fit"]
        text = f"{title}: {values}; about {_duration(left)} left"
        listener.progress("coalitions", n_total - sum(remaining.values()), n_total, text)

    executor = SerialExecutor(
        evaluate,
        definitions=worker.behavior_definitions(),
        provenance=worker.provenance(),
        evaluation_ids=evaluation_ids,
    )
    executor.run(store, study_id, on_done=on_done)
    failed = store.find(study_id, statuses=("failed",), evaluation_ids=evaluation_ids)
    if failed:
        listener.message(f"{len(failed)} evaluations failed, e.g. {failed[0].error}")


def _duration(seconds: float) -> str:
    """Seconds as text for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
