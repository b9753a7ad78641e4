"""`lds.py`, `tribute lds`: attributions from a store, and their proof on retrained models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits

from tribute.cli.arguments import Arguments, Design, RemovalDist, parse, print_settings
from tribute.cli.console import console, interval_text, print_line, print_table
from tribute.errors import ConfigError, FitError, MixedResultsError, StoreError
from tribute.games.designs import DESIGNS, PAIRED_DESIGNS
from tribute.games.kernels import BANZHAF_ESTIMATORS
from tribute.games.lds import (
    MIN_TEST_COALITIONS,
    FitAtSize,
    LDSComparison,
    LDSResult,
    LDSTestSet,
    fit_at_sizes,
    lds_ceiling,
)
from tribute.games.removal import canonical_removal_dist
from tribute.games.shapley import SHAPLEY_ESTIMATORS
from tribute.store.interchange import PUBLISHED_BEHAVIOR_KEYS
from tribute.store.records import Contributor, EvaluationTable, Store
from tribute.study.attribution import EndPoints, fit_attributions, split_by_seed, without_tested
from tribute.study.outputs import fit_notes, rank_texts
from tribute.types import Attributions, Behaviors, CoalitionMasks
from tribute.unlearning.base import check_method

MAX_SINGLE_THREADED = 2000
"""Most fit coalitions for which attributions are fitted by one thread."""

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

_KERNEL_OF_ESTIMATOR = dict.fromkeys(SHAPLEY_ESTIMATORS, "shapley") | dict.fromkeys(BANZHAF_ESTIMATORS, "banzhaf")
"""Estimators that name their kernel; `auto` is the kernel's own choice."""

_ONE_AT_A_TIME = ("loo", "add_one_in")
"""Kernels with coalitions of their own, one per contributor."""

Estimator = Literal[
    "auto",
    "gp",
    "size_adjusted",
    "ridge",
    "least_squares",
    "unbiased",
    "permutation",
    "datamodel",
    "banzhaf",
    "kernel_banzhaf",
    "msr",
    "loo",
    "add_one_in",
]


class LdsArguments(Arguments):
    """Flags of `lds.py`."""

    train_db: str = Field(description="Store with the fit coalitions.")
    train_exp_name: str = Field(description="Their experiment.")
    max_train_size: int = Field(description="Most fit coalitions to use.", gt=0)
    dataset: str = Field(default="digits", description="Dataset of all experiments.")
    removal_dist: RemovalDist = Field(
        default="shapley", description="Law of the fit coalitions; it chooses the kernel."
    )
    design: Design | None = Field(
        default=None, description="Only the fit coalitions of this design; None: all that serve Shapley values."
    )
    datamodel_alpha: tuple[float, ...] = Field(
        default=(0.5,), description="Fraction of contributors in the test coalitions; several give a table each."
    )
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
    estimator: tuple[Estimator, ...] = Field(
        default=("auto",),
        description="Estimators, side by side: auto, one of Shapley values, or another kernel; the first is compared "
        "with the others, and its attributions are printed.",
    )
    ridge: float = Field(default=0.0, ge=0, description="Penalty; above 0 allows fewer coalitions than contributors.")
    interval: Literal["analytic", "bootstrap"] = Field(default="analytic", description="Of the attributions.")
    by_class: bool = Field(default=True, description="By contributor (the published name); the only way here.")
    bootstrapped: bool = Field(
        default=True, description="LDS intervals by bootstrap over test coalitions and training seeds (always)."
    )
    num_bootstrap_iters: int = Field(default=1000, gt=1, description="Bootstrap draws.")
    convergence: bool = Field(
        default=True, description="LDS against the number of fit coalitions; off: with all of them only, sooner."
    )
    dry_run: bool = Field(default=False, description="Print the resolved settings and stop.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, fit, score, print."""
    arguments = parse(LdsArguments, argv, prog=prog, description="Fit attributions and score them on retrained models.")
    check_method(arguments.method)
    law = check_other_flags(arguments)
    chosen = chosen_estimators(arguments, law)
    behavior_name = behavior_of_key(arguments.model_behavior_key)
    if arguments.dry_run:
        kernel = next(iter(chosen.values()))[0]
        print_settings({**arguments.model_dump(), "kernel": kernel, "model_behavior_key": behavior_name})
        return
    evaluations = read_fit(arguments, behavior_name, law)
    end_points = read_end_points(arguments, [kernel for kernel, _ in chosen.values()], behavior_name, evaluations)
    tests = read_tests(arguments, behavior_name, evaluations)
    usable = {law: leave_out_tested(evaluations, tests)}
    fits: dict[str, list[FitAtSize]] = {}
    for label, (kernel, estimator) in chosen.items():
        fit_law = kernel if kernel in _ONE_AT_A_TIME else law
        if fit_law not in usable:
            others = read_fit(arguments, behavior_name, fit_law)
            check_same_settings("--estimator", evaluations, others, keys=None)
            usable[fit_law] = leave_out_tested(others, tests)
        # Below some thousand coalitions a second thread of linear algebra costs more than it brings.
        threads = 1 if arguments.max_train_size <= MAX_SINGLE_THREADED else None
        with threadpool_limits(threads, user_api="blas"):
            fits[label] = fit_at_each_size(
                arguments, usable[fit_law], end_points, kernel, estimator, every=bool(tests) and arguments.convergence
            )
    for alpha, test_set in tests.items():
        _print_lds(arguments, alpha, test_set, fits)
    last = next(iter(fits.values()))[-1]
    if last.attributions is None:
        raise FitError(last.missing_reason)
    _print_attributions(behavior_name, evaluations, last.attributions)


def check_other_flags(arguments: LdsArguments) -> str:
    """The law of the fit coalitions; flags whose other value would mean what this version does not do are errors."""
    if not arguments.by_class:
        raise ConfigError("--no-by_class: coalitions are of contributors here; leave the flag out or use --by_class")
    law = canonical_removal_dist(arguments.removal_dist)
    if law not in _KERNEL_OF_LAW:
        raise ConfigError(
            f"--removal_dist: expected a law of fit coalitions ({', '.join(_KERNEL_OF_LAW)}); "
            f"found {arguments.removal_dist}"
        )
    if arguments.design is not None and law != "shapley":
        raise ConfigError(f"--design: expected --removal_dist shapley, found {law}; leave --design out")
    if not arguments.datamodel_alpha:
        raise ConfigError("--datamodel_alpha: expected at least one fraction, e.g. 0.5; found none")
    return law


def chosen_estimators(arguments: LdsArguments, law: str) -> dict[str, tuple[str, str | None]]:
    """Kernel and its estimator (None: the kernel's own choice) of every estimator asked for, by label."""
    if not arguments.estimator:
        raise ConfigError("--estimator: expected at least one, e.g. auto; found none")
    main_kernel = arguments.kernel or _KERNEL_OF_LAW[law]
    chosen: dict[str, tuple[str, str | None]] = {}
    for name in arguments.estimator:
        if name == "auto":
            label = name if main_kernel == "shapley" else main_kernel
            chosen[label] = main_kernel, name if main_kernel == "shapley" else None
        elif name in _KERNEL_OF_ESTIMATOR:
            kernel = _KERNEL_OF_ESTIMATOR[name]
            if kernel != main_kernel and main_kernel not in ("shapley", "banzhaf"):
                raise ConfigError(f"--estimator: {name} is of {kernel} values, not of --kernel {main_kernel}; use auto")
            chosen[name] = kernel, name
        else:
            chosen[name] = name, None
    return chosen


def behavior_of_key(key: str) -> str:
    """Our name of a published behavior key; other names stay as they are."""
    for name, published in PUBLISHED_BEHAVIOR_KEYS.items():
        if key == published:
            return name
    return key


def _read(db: str, behavior_name: str, flag: str, remedy: str, **filters: Any) -> EvaluationTable:
    """Evaluations that match, or an error that says what the store holds instead."""
    with Store.open(db, create=False) as store:
        table = store.read(behavior_name=behavior_name, **filters)
    _require(table, db, flag, remedy, filters)
    return table


def _require(table: EvaluationTable, db: str, flag: str, remedy: str, filters: Mapping[str, Any]) -> None:
    if not len(table):
        wanted = ", ".join(f"{name} {value}" for name, value in filters.items() if value is not None)
        raise StoreError(
            f"{flag}: no finished evaluation of {table.behavior_name} with {wanted} in {db}. {remedy} "
            f"{table.describe()}"
        )


@dataclass(frozen=True)
class FitEvaluations:
    """What attributions are fitted to.

    Attributes:
        masks: `(n_fit, n_contributors)`, design by design, in the order in which they were drawn.
        behaviors: `(n_fit,)`.
        design: What they came from, if that is one.
        paired: Whether all of them are complement pairs.
        definition: Of the behavior: unit, direction, variant.
        contributors: Names and numbers of examples.
        settings: Of every evaluation.
    """

    masks: CoalitionMasks
    behaviors: Behaviors
    design: str | None
    paired: bool
    definition: dict[str, Any]
    contributors: list[Contributor]
    settings: list[dict[str, Any]]


def read_fit(arguments: LdsArguments, behavior_name: str, law: str) -> FitEvaluations:
    """Fit evaluations of a law; of `shapley`, those of `--design`, or of every design in the experiment.

    Designs follow each other in the order of `DESIGNS`. Complements that an older version measured beside the draws
    of the Shapley law stand after their draws, so that an even number of rows is whole pairs.
    """
    places = {law: 0}  # removal distribution: where its design stands
    if law == "shapley":
        designs = DESIGNS if arguments.design is None else (arguments.design,)
        places = {"shapley" if design == "kernel" else design: i for i, design in enumerate(designs)}
        if arguments.design is None:
            places["shapley_complement"] = places["shapley"]
    with Store.open(arguments.train_db, create=False) as store:
        found = {
            removal_dist: store.read(
                behavior_name=behavior_name,
                dataset=arguments.dataset,
                exp_name=arguments.train_exp_name,
                method=arguments.method,
                removal_dist=removal_dist,
            )
            for removal_dist in places
        }
        tables = {removal_dist: table for removal_dist, table in found.items() if len(table)}
        if not tables:
            asked = {name: getattr(arguments, name) for name in ("dataset", "train_exp_name", "method", "design")}
            remedy = "Measure coalitions with unlearn.py first."
            empty = next(iter(found.values()))
            _require(empty, arguments.train_db, "--train_db", remedy, {**asked, "removal_dist": law})
        study_ids = {item.study_id for item in tables.values()}
        if len(study_ids) > 1:
            raise MixedResultsError(
                f"--train_exp_name: evaluations of one study were expected, for contributors are numbered within it; "
                f"found {len(study_ids)} studies. Choose other experiment names"
            )
        contributors = store.contributors(next(iter(study_ids)) or 0)
    place = np.concatenate([np.full(len(item), places[name]) for name, item in tables.items()])
    is_complement = np.concatenate([np.full(len(item), name.endswith("complement")) for name, item in tables.items()])
    removal_seeds = np.concatenate([item.removal_seeds for item in tables.values()])
    order = np.lexsort((is_complement, removal_seeds, place))
    first = next(iter(tables.values()))
    design: str | None = None
    if len(tables) == 1:
        design = "kernel" if "shapley" in tables else next(iter(tables))
    elif set(tables) == {"shapley", "shapley_complement"}:
        seeds_of = [set(item.removal_seeds.tolist()) for item in tables.values()]
        design = "paired" if seeds_of[0] == seeds_of[1] else None
    evaluations = FitEvaluations(
        masks=np.concatenate([item.masks for item in tables.values()])[order],
        behaviors=np.concatenate([item.behaviors for item in tables.values()])[order],
        design=design,
        paired=design in PAIRED_DESIGNS or set(tables) <= set(PAIRED_DESIGNS),
        definition=dict(first.definition or {}),
        contributors=contributors,
        settings=[settings for item in tables.values() for settings in item.settings],
    )
    for item in tables.values():
        check_same_settings("--train_exp_name", evaluations, item, keys=None)
    return evaluations


def check_same_settings(
    flag: str,
    evaluations: FitEvaluations,
    other: EvaluationTable | FitEvaluations,
    *,
    keys: tuple[str, ...] | None,
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
            f"{flag}: the behavior was measured by another definition: {definition}; in the fit coalitions by "
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


def read_end_points(
    arguments: LdsArguments, kernels: Sequence[str], behavior_name: str, evaluations: FitEvaluations
) -> EndPoints:
    """Every measurement of v(empty) and v(grand), as far as the kernels need them."""
    values: dict[str, Behaviors] = {"empty": np.empty(0), "grand": np.empty(0)}
    for flag, name, db, exp_name, removal_dist in (
        ("--null_db", "empty", arguments.null_db, arguments.null_exp_name, "empty"),
        ("--full_db", "grand", arguments.full_db, arguments.full_exp_name, None),
    ):
        if not any(name in _END_POINTS_OF[kernel] for kernel in kernels):
            continue
        exp_name = exp_name or arguments.train_exp_name
        table = _read(
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
        check_same_settings(flag, evaluations, table, keys=None)
        values[name] = table.behaviors
    return EndPoints(**values)


def read_tests(arguments: LdsArguments, behavior_name: str, evaluations: FitEvaluations) -> dict[float, LDSTestSet]:
    """Retrained test coalitions by alpha; none without an experiment."""
    tests: dict[float, LDSTestSet] = {}
    for alpha in arguments.datamodel_alpha if arguments.test_exp_name is not None else ():
        table = _read(
            arguments.test_db or arguments.train_db,
            behavior_name,
            "--test_db",
            "Retrain test coalitions with main.py --removal_dist datamodel and measure them with unlearn.py "
            "--method retrain first.",
            dataset=arguments.dataset,
            exp_name=arguments.test_exp_name,
            method="retrain",
            removal_dist="datamodel",
            datamodel_alpha=alpha,
        )
        check_same_settings("--test_db", evaluations, table, keys=("data",))
        masks, behaviors = split_by_seed(table.masks, table.behaviors, table.opt_seeds)
        masks, behaviors = masks[: arguments.num_test_subset], behaviors[:, : arguments.num_test_subset]
        if len(masks) < MIN_TEST_COALITIONS:
            raise FitError(
                f"--test_exp_name: the LDS ranks test coalitions; expected at least {MIN_TEST_COALITIONS} of alpha "
                f"{alpha}, found {len(masks)}. Retrain and measure more of them"
            )
        tests[alpha] = LDSTestSet.prepare(masks, behaviors, n_bootstrap=arguments.num_bootstrap_iters)
    return tests


def fit_sizes(n_contributors: int, n_available: int, max_train_size: int, *, paired: bool = False) -> list[int]:
    """Numbers of fit coalitions to report: n, then tens as published, and the last.

    Above 100, where the score changes ever more slowly and a fit costs ever more, 50 and its doublings up to three
    quarters of the last. Complement pairs stay whole.
    """
    most = min(n_available, max_train_size)
    if max_train_size > 100:
        steps = [50 * 2**k for k in range(most.bit_length()) if 4 * 50 * 2**k <= 3 * most]
    else:
        steps = list(range(10, most + 1, 10))
    sizes = {n_contributors, *steps, most}
    return sorted({size - size % 2 if paired else size for size in sizes if 1 + paired <= size <= most}) or [most]


def leave_out_tested(evaluations: FitEvaluations, tests: Mapping[float, LDSTestSet]) -> FitEvaluations:
    """The fit evaluations whose coalitions, and partners where all are pairs, are no test coalitions."""
    if not tests:
        return evaluations
    tested = np.concatenate([test_set.masks for test_set in tests.values()])
    masks, behaviors, n_dropped = without_tested(
        evaluations.masks, evaluations.behaviors, tested, paired=evaluations.paired
    )
    if n_dropped:
        partners = " or their complements" if evaluations.paired else ""
        print_line(f"{n_dropped} fit coalitions are test coalitions{partners}, and were left out of the fit")
    if not len(masks):
        raise FitError("--test_exp_name: every fit coalition is a test coalition, too; measure other fit coalitions")
    return replace(evaluations, masks=masks, behaviors=behaviors)


def fit_at_each_size(
    arguments: LdsArguments,
    evaluations: FitEvaluations,
    end_points: EndPoints,
    kernel: str,
    estimator: str | None,
    *,
    every: bool,
) -> list[FitAtSize]:
    """Fits of one estimator to growing numbers of coalitions, or (not `every`) only to the largest."""
    n_fit, n_contributors = evaluations.masks.shape
    sizes = fit_sizes(n_contributors, n_fit, arguments.max_train_size, paired=evaluations.paired)
    if kernel in _ONE_AT_A_TIME:
        sizes = [n_fit]
    fit = partial(
        fit_attributions,
        end_points=end_points,
        kernel=kernel,
        estimator=estimator,
        design=evaluations.design,
        contributor_names=[item.contributor_name for item in evaluations.contributors],
        ridge=arguments.ridge,
        interval=arguments.interval,
    )
    return fit_at_sizes(evaluations.masks, evaluations.behaviors, sizes=sizes if every else sizes[-1:], fit=fit)


def _print_lds(
    arguments: LdsArguments, alpha: float, test_set: LDSTestSet, fits: Mapping[str, list[FitAtSize]]
) -> None:
    """LDS of every estimator against the number of fit coalitions, how they compare in the end, and the ceiling."""
    n_seeds, n_test = test_set.behaviors.shape
    scores = {
        label: {at.n_fit: test_set.score(at.attributions) for at in entries if at.attributions is not None}
        for label, entries in fits.items()
    }
    sizes = sorted({at.n_fit for entries in fits.values() for at in entries})
    title = f"LDS x 100 of {arguments.model_behavior_key} against the number of fit coalitions"
    if len(arguments.datamodel_alpha) > 1:
        title += f", alpha {alpha:g}"
    note = f"{n_test} test coalitions, {n_seeds} training seeds; bootstrap over both"
    if len(scores) == 1:
        columns = ["fit coalitions", "LDS", "95 % interval", "per training seed"]
        rows = [[str(size), *_score_cells(next(iter(scores.values())).get(size))] for size in sizes]
    else:
        columns = ["fit", *scores]
        with_intervals = 8 + 18 * len(scores) <= console.width
        rows = [
            [str(size), *(_score_text(by_size.get(size), with_intervals) for by_size in scores.values())]
            for size in sizes
        ]
    print_table(title, columns, rows, note=note)
    for label, entries in fits.items():
        missing = [at for at in entries if at.attributions is None]
        if missing:
            listed = ", ".join(str(at.n_fit) for at in missing)
            print_line(f"{label}: {listed} coalitions cannot be fitted: {missing[-1].missing_reason}")
    final = {label: entries[-1].attributions for label, entries in fits.items()}
    reference, reference_fit = next(iter(final.items()))
    if len(final) > 1 and reference_fit is not None:
        others = {label: fitted for label, fitted in final.items() if fitted is not None and label != reference}
        print_comparisons(
            f"LDS x 100 with all coalitions, less that of {reference} on the same draws",
            {label: test_set.score(fitted) for label, fitted in {reference: reference_fit, **others}.items()},
            {label: test_set.compare(fitted, reference_fit) for label, fitted in others.items()},
        )
    if n_seeds > 1:
        ceiling = lds_ceiling(test_set.behaviors, n_bootstrap=arguments.num_bootstrap_iters)
        low, high = 100 * ceiling.interval
        print_line(
            "ceiling, retrainings with other seeds as the prediction: "
            f"{100 * ceiling.value:.1f} ({low:.1f} to {high:.1f})"
        )


def _score_cells(score: LDSResult | None) -> list[str]:
    """LDS, interval and LDS per training seed."""
    if score is None:
        return ["-", "-", "-"]
    low, high = 100 * score.interval
    per_seed = " ".join(f"{100 * value:.1f}" for value in score.per_seed)
    return [f"{100 * score.mean:.1f}", f"{low:.1f} to {high:.1f}", per_seed]


def _score_text(score: LDSResult | None, with_interval: bool) -> str:
    """LDS and interval in one cell."""
    if score is None:
        return "-"
    low, high = 100 * score.interval
    return f"{100 * score.mean:.1f}" + (f" ({low:.0f} to {high:.0f})" if with_interval else "")


def print_comparisons(title: str, scores: Mapping[str, LDSResult], comparisons: Mapping[str, LDSComparison]) -> None:
    """LDS of several attributions, and how those with a comparison differ from the reference."""
    rows = []
    for label, score in scores.items():
        cells = [label, *_score_cells(score)[:2], "", ""]
        if label in comparisons:
            found = comparisons[label]
            low, high = 100 * found.interval
            cells[3:] = [f"{100 * found.difference:+.1f} ({low:+.1f} to {high:+.1f})", f"{found.probability:.0%}"]
        rows.append(cells)
    note = "difference with its 95 % interval; higher: share of the draws in which it scores higher"
    print_table(title, ["attribution", "LDS", "95 % interval", "difference", "higher"], rows, note=note)


def print_attributions(
    title: str,
    fitted: Attributions,
    contributor_names: Sequence[str],
    n_examples: Sequence[int],
    *,
    higher_is_better: bool,
    shares: Sequence[str] | None = None,
    note: str,
) -> None:
    """Attributions by contributor with intervals and ranks, the best first, and what to know about the fit.

    Args:
        title: Above the table.
        fitted: Attributions.
        contributor_names: `(n_contributors,)`.
        n_examples: `(n_contributors,)`.
        higher_is_better: Direction of the behavior.
        shares: `(n_contributors,)` cells of a last column; None: no such column.
        note: First line below the table.
    """
    order = np.argsort(-fitted.values * (1 if higher_is_better else -1), kind="stable")
    intervals, ranks = fitted.intervals(), rank_texts(fitted, higher_is_better=higher_is_better)
    columns = ["contributor", "examples", "attribution", "95 % interval", "rank"]
    rows = [
        [contributor_names[i], f"{n_examples[i]:,}", f"{fitted.values[i]:+.4f}", interval_text(*intervals[i]), ranks[i]]
        for i in order
    ]
    if shares is not None:
        columns.append("share")
        rows = [[*row, shares[i]] for row, i in zip(rows, order, strict=True)]
    print_table(title, columns, rows, note=note)
    for line in fit_notes(fitted, contributor_names, higher_is_better=higher_is_better):
        print_line(line)


def _print_attributions(behavior_name: str, evaluations: FitEvaluations, attributions: Attributions) -> None:
    """Attributions of the first estimator."""
    higher = bool(evaluations.definition.get("higher_is_better", True))
    print_attributions(
        f"{behavior_name}: {attributions.kernel} ({attributions.estimator}), {attributions.n_coalitions} coalitions",
        attributions,
        [item.contributor_name for item in evaluations.contributors],
        [item.n_examples for item in evaluations.contributors],
        higher_is_better=higher,
        note=f"{'higher' if higher else 'lower'} is better; {attributions.interval} intervals; ranks with 95 %",
    )
