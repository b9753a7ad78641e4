"""`lds.py`, `tribute lds`: attributions from a store, and their proof on retrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tribute.cli.arguments import Arguments, RemovalDist, parse, print_settings
from tribute.cli.console import interval_text, print_line, print_table
from tribute.errors import ConfigError, FitError, MixedResultsError, StoreError
from tribute.games.lds import lds_ceiling, lds_convergence
from tribute.games.removal import canonical_removal_dist
from tribute.store.interchange import PUBLISHED_BEHAVIOR_KEYS
from tribute.store.records import Contributor, EvaluationTable, Store
from tribute.study.stages import EndPoints, fit_attributions, split_by_seed, without_tested
from tribute.types import Attributions, Behaviors, CoalitionMasks
from tribute.unlearning.base import check_method

_KERNEL_OF_LAW = {
    "shapley": "shapley",
    "datamodel": "datamodel",
    "uniform": "banzhaf",
    "loo": "loo",
    "add_one_in": "add_one_in",
}


_END_POINTS_OF = {
    "shapley": ("empty", "grand"),
    "datamodel": (),
    "banzhaf": (),
    "loo": ("grand",),
    "add_one_in": ("empty",),
}


class LdsArguments(Arguments):
    """Flags of `lds.py`."""

    train_db: str = Field(description="Store with the fit coalitions.")
    train_exp_name: str = Field(description="Their experiment.")
    max_train_size: int = Field(description="Most fit coalitions to use.", gt=0)
    dataset: str = Field(default="digits", description="Dataset of all experiments.")
    removal_dist: RemovalDist = Field(
        default="shapley", description="Law of the fit coalitions; it chooses the kernel."
    )
    datamodel_alpha: float = Field(default=0.5, description="Fraction of contributors in the test coalitions.")
    method: str = Field(default="gd", description="How the fit models were obtained.")
    model_behavior_key: str = Field(default="fid_value", description="Behavior: is, fid_value, precision, entropy, ...")
    test_db: str | None = Field(default=None, description="Store with the test coalitions; None: --train_db.")
    test_exp_name: str | None = Field(default=None, description="Their experiment; None: no LDS, attributions only.")
    num_test_subset: int = Field(default=32, gt=0, description="Most test coalitions to use.")
    full_db: str | None = Field(default=None, description="Store with v(grand); None: --train_db.")
    full_exp_name: str | None = Field(default=None, description="Its experiment; None: --train_exp_name.")
    null_db: str | None = Field(default=None, description="Store with v(empty); None: --train_db.")
    null_exp_name: str | None = Field(default=None, description="Its experiment; None: --train_exp_name.")
    kernel: Literal["shapley", "datamodel", "banzhaf", "loo", "add_one_in"] | None = Field(
        default=None, description="Attribution kernel; None: the one of --removal_dist."
    )
    estimator: Literal["least_squares", "size_adjusted"] = Field(
        default="size_adjusted", description="Of Shapley values."
    )
    ridge: float = Field(default=0.0, ge=0, description="Penalty; above 0 allows fewer coalitions than contributors.")
    interval: Literal["analytic", "bootstrap"] = Field(default="analytic", description="Of the attributions.")
    by_class: bool = Field(default=True, description="By contributor (the published name); the only way here.")
    bootstrapped: bool = Field(default=True, description="LDS intervals by bootstrap over test coalitions (always).")
    num_bootstrap_iters: int = Field(default=1000, gt=1, description="Bootstrap draws.")
    dry_run: bool = Field(default=False, description="Print the resolved settings and stop.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, fit, score, print."""
    arguments = parse(LdsArguments, argv, prog=prog, description="Fit attributions and score them on retrained models.")
    check_method(arguments.method)
    check_other_flags(arguments)
    kernel = arguments.kernel or _KERNEL_OF_LAW[canonical_removal_dist(arguments.removal_dist) or ""]
    behavior_name = behavior_of_key(arguments.model_behavior_key)
    if arguments.dry_run:
        print_settings({**arguments.model_dump(), "kernel": kernel, "model_behavior_key": behavior_name})
        return
    evaluations = read_fit(arguments, behavior_name)
    end_points = read_end_points(arguments, kernel, behavior_name, evaluations)
    test_masks, test_behaviors = read_test(arguments, behavior_name, evaluations)
    masks, behaviors, n_dropped = evaluations.masks, evaluations.behaviors, 0
    if test_masks is not None:
        masks, behaviors, n_dropped = without_tested(masks, behaviors, test_masks)
    masks, behaviors = masks[: arguments.max_train_size], behaviors[: arguments.max_train_size]
    fit = partial(
        fit_attributions,
        end_points=end_points,
        kernel=kernel,
        contributor_names=[item.contributor_name for item in evaluations.contributors],
        ridge=arguments.ridge,
        interval=arguments.interval,
        **({"estimator": arguments.estimator} if kernel == "shapley" else {}),
    )
    if n_dropped:
        print_line(f"{n_dropped} fit coalitions are test coalitions, too, and were left out of the fit")
    if test_masks is not None:
        _print_convergence(arguments, fit, masks, behaviors, test_masks, test_behaviors)
    attributions = fit(masks, behaviors)
    _print_attributions(behavior_name, evaluations, attributions)


def check_other_flags(arguments: LdsArguments) -> None:
    """Flags whose other value would mean something that this version does not do."""
    if not arguments.by_class:
        raise ConfigError("--no-by_class: coalitions are of contributors here; leave the flag out or use --by_class")
    if canonical_removal_dist(arguments.removal_dist) not in _KERNEL_OF_LAW:
        raise ConfigError(
            f"--removal_dist: expected a law of fit coalitions ({', '.join(_KERNEL_OF_LAW)}); "
            f"found {arguments.removal_dist}"
        )


def behavior_of_key(key: str) -> str:
    """Our name of a published behavior key; other names stay as they are."""
    for name, published in PUBLISHED_BEHAVIOR_KEYS.items():
        if key == published:
            return name
    return key


def _read(db: str, behavior_name: str, flag: str, remedy: str, **filters: Any) -> tuple[EvaluationTable, Store]:
    """Evaluations that match, or an error that says what the store holds instead."""
    store = Store.open(db, create=False)
    try:
        table = store.read(behavior_name=behavior_name, **filters)
        if not len(table):
            wanted = ", ".join(f"{name} {value}" for name, value in filters.items() if value is not None)
            raise StoreError(
                f"{flag}: no finished evaluation of {behavior_name} with {wanted} in {db}. {remedy} {table.describe()}"
            )
    except BaseException:
        store.close()
        raise
    return table, store


@dataclass(frozen=True)
class FitEvaluations:
    """What attributions are fitted to.

    Attributes:
        masks: `(n_fit, n_contributors)`, in the order in which they were drawn.
        behaviors: `(n_fit,)`.
        definition: Of the behavior: unit, direction, variant.
        contributors: Names and numbers of examples.
        settings: Of every evaluation.
    """

    masks: CoalitionMasks
    behaviors: Behaviors
    definition: dict[str, Any]
    contributors: list[Contributor]
    settings: list[dict[str, Any]]


def read_fit(arguments: LdsArguments, behavior_name: str) -> FitEvaluations:
    """Fit evaluations; those of `shapley` with the complements that were measured beside them."""
    law = canonical_removal_dist(arguments.removal_dist)
    table, store = _read(
        arguments.train_db,
        behavior_name,
        "--train_db",
        "Measure coalitions with unlearn.py first.",
        dataset=arguments.dataset,
        exp_name=arguments.train_exp_name,
        method=arguments.method,
        removal_dist=law,
    )
    with store:
        tables = [table]
        if law == "shapley":
            tables.append(
                store.read(
                    behavior_name=behavior_name,
                    study_id=table.study_id,
                    exp_name=arguments.train_exp_name,
                    method=arguments.method,
                    removal_dist="shapley_complement",
                )
            )
        contributors = store.contributors(table.study_id) if table.study_id is not None else []
    tables = [item for item in tables if len(item)]
    which = np.repeat(np.arange(len(tables)), [len(item) for item in tables])
    order = np.lexsort((which, np.concatenate([item.removal_seeds for item in tables])))
    evaluations = FitEvaluations(
        masks=np.concatenate([item.masks for item in tables])[order],
        behaviors=np.concatenate([item.behaviors for item in tables])[order],
        definition=dict(table.definition or {}),
        contributors=contributors,
        settings=[settings for item in tables for settings in item.settings],
    )
    for item in tables:
        check_same_settings("--train_exp_name", evaluations, item, keys=None)
    return evaluations


def check_same_settings(
    flag: str, evaluations: FitEvaluations, other: EvaluationTable, *, keys: tuple[str, ...] | None
) -> None:
    """Refuse to fit, or to test, evaluations that were made in different ways.

    Args:
        flag: The flag that named the other evaluations.
        evaluations: The fit coalitions; the first is what the others are compared with.
        other: What must agree with them.
        keys: Settings that must agree; None: all but the list of behaviors, of which only this one counts.
    """
    definition = dict(other.definition or {})
    if evaluations.definition and definition and definition != evaluations.definition:
        raise MixedResultsError(
            f"{flag}: {other.behavior_name} was measured by another definition: {definition}; the fit coalitions by "
            f"{evaluations.definition}. Measure both in the same way"
        )
    first = evaluations.settings[0]
    for settings in other.settings:
        names = (first.keys() & settings.keys()) - {"behaviors"} if keys is None else keys
        wrong = [name for name in sorted(names) if first.get(name) != settings.get(name)]
        if wrong:
            raise MixedResultsError(
                f"{flag}: evaluations were made with different settings: "
                + "; ".join(f"{name}: {first.get(name)} and {settings.get(name)}" for name in wrong)
                + ". Give each set of settings its own --exp_name"
            )


def read_end_points(arguments: LdsArguments, kernel: str, behavior_name: str, evaluations: FitEvaluations) -> EndPoints:
    """Every measurement of v(empty) and v(grand), as far as the kernel needs them."""
    values: dict[str, Behaviors] = {"empty": np.empty(0), "grand": np.empty(0)}
    for flag, name, db, exp_name, removal_dist in (
        ("--null_db", "empty", arguments.null_db, arguments.null_exp_name, "empty"),
        ("--full_db", "grand", arguments.full_db, arguments.full_exp_name, None),
    ):
        if name not in _END_POINTS_OF[kernel]:
            continue
        exp_name = exp_name or arguments.train_exp_name
        table, store = _read(
            db or arguments.train_db,
            behavior_name,
            flag,
            f"Measure it once: unlearn.py --removal_dist {removal_dist} --exp_name {exp_name} with the other flags of "
            "the fit coalitions.",
            dataset=arguments.dataset,
            exp_name=exp_name,
            method=arguments.method,
            removal_dist=removal_dist,
        )
        store.close()
        check_same_settings(flag, evaluations, table, keys=None)
        values[name] = table.behaviors
    return EndPoints(**values)


def read_test(arguments: LdsArguments, behavior_name: str, evaluations: FitEvaluations) -> tuple[Any, Any]:
    """Retrained test coalitions: masks, and behaviors by training seed; None without an experiment."""
    if arguments.test_exp_name is None:
        return None, None
    table, store = _read(
        arguments.test_db or arguments.train_db,
        behavior_name,
        "--test_db",
        "Retrain test coalitions with main.py --removal_dist datamodel and measure them with unlearn.py "
        "--method retrain first.",
        dataset=arguments.dataset,
        exp_name=arguments.test_exp_name,
        method="retrain",
        removal_dist="datamodel",
        datamodel_alpha=arguments.datamodel_alpha,
    )
    store.close()
    check_same_settings("--test_db", evaluations, table, keys=("data",))
    masks, behaviors = split_by_seed(table.masks, table.behaviors, table.opt_seeds)
    return masks[: arguments.num_test_subset], behaviors[:, : arguments.num_test_subset]


def fit_sizes(n_contributors: int, n_available: int, max_train_size: int) -> list[int]:
    """Numbers of fit coalitions to report, as published: n, then tens (fifties above 100), and the last."""
    step = 50 if max_train_size > 100 else 10
    most = min(n_available, max_train_size)
    sizes = {n_contributors, *range(step, most + 1, step), most}
    return sorted(size for size in sizes if 0 < size <= most)


def _print_convergence(
    arguments: LdsArguments, fit: Any, masks: Any, behaviors: Any, test_masks: Any, test_behaviors: Any
) -> None:
    """LDS against the number of fit coalitions, and the ceiling."""
    if len(test_masks) < 3:
        raise FitError(
            f"--test_exp_name: the LDS ranks test coalitions; expected at least 3, found {len(test_masks)}. "
            "Retrain and measure more of them"
        )
    rows, reasons = [], []
    for at in lds_convergence(
        masks,
        behaviors,
        test_masks,
        test_behaviors,
        sizes=fit_sizes(masks.shape[1], len(masks), arguments.max_train_size),
        fit=fit,
        n_bootstrap=arguments.num_bootstrap_iters,
    ):
        if at.result is None:
            rows.append([str(at.n_fit), "-", "-", "-"])
            reasons.append(f"{at.n_fit} coalitions cannot be fitted: {at.missing_reason}")
            continue
        score = at.result
        per_seed = " ".join(f"{100 * value:.1f}" for value in score.per_seed)
        low, high = 100 * score.interval
        rows.append([str(at.n_fit), f"{100 * score.mean:.1f}", f"{low:.1f} to {high:.1f}", per_seed])
    note = f"{len(test_masks)} test coalitions, {len(test_behaviors)} training seeds; bootstrap over test coalitions"
    print_table(
        f"LDS x 100 of {arguments.model_behavior_key} against the number of fit coalitions",
        ["fit coalitions", "LDS", "95 % interval", "per training seed"],
        rows,
        note=note,
    )
    for reason in reasons:
        print_line(reason)
    if len(test_behaviors) > 1:
        ceiling = lds_ceiling(test_behaviors, n_bootstrap=arguments.num_bootstrap_iters)
        low, high = 100 * ceiling.interval
        print_line(
            "ceiling, retrainings with other seeds as the prediction: "
            f"{100 * ceiling.value:.1f} ({low:.1f} to {high:.1f})"
        )


def _print_attributions(behavior_name: str, evaluations: FitEvaluations, attributions: Attributions) -> None:
    """Attributions by contributor name, the best first."""
    higher = bool(evaluations.definition.get("higher_is_better", True))
    order = np.argsort(-attributions.values * (1 if higher else -1), kind="stable")
    intervals = attributions.intervals()
    rows = [
        [
            evaluations.contributors[i].contributor_name,
            f"{evaluations.contributors[i].n_examples:,}",
            f"{attributions.values[i]:+.4f}",
            interval_text(*intervals[i]),
        ]
        for i in order
    ]
    print_table(
        f"{behavior_name}: {attributions.kernel} ({attributions.estimator}), {attributions.n_coalitions} coalitions",
        ["contributor", "examples", "attribution", "95 % interval"],
        rows,
        note=f"{'higher' if higher else 'lower'} is better; {attributions.interval} intervals",
    )
