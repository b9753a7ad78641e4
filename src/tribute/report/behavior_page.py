"""What a report says about one behavior: credit, how sure it is, its proof, convergence, the status quo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tribute.config import StudyConfig
from tribute.games.designs import PAIRED_DESIGNS
from tribute.games.lds import LDSResult, LDSTestSet, fit_at_sizes, rank_correlation
from tribute.games.stopping import share_half_width
from tribute.games.uncertainty import differences, rank_intervals
from tribute.report import charts
from tribute.report.charts import Chart, Series, Whisker, WhiskerAxis
from tribute.report.glossary import KERNEL_NAMES, behavior_words
from tribute.report.names import Label, visible, without_places
from tribute.report.numbers import between, counted, decimals_for, fixed, percent, significant
from tribute.report.sentences import (
    Measured,
    Sentence,
    answer,
    context,
    names_in_words,
    number,
    question,
    say,
    term,
    who,
)
from tribute.study.attribution import Validation, fit_attributions
from tribute.study.outputs import credit_order, direction, fit_warning, separation_sentence, shares
from tribute.study.results import BehaviorResult
from tribute.types import Attributions

Array = npt.NDArray[np.float64]

MAX_CHART_ROWS = 40
"""Contributors in one chart; those in the middle of a longer ranking are in the table only."""

MAX_LINES = 5
"""Contributors in the chart of convergence."""

PREFIXES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
FEW_PREFIXES = (1 / 4, 1 / 2, 1.0)
"""Parts of the fit coalitions to which credit is fitted again; fewer where a fit takes long."""

MANY_COALITIONS = 600


@dataclass(frozen=True)
class CreditRow:
    """One contributor in the ranked table; texts as shown, numbers to sort by."""

    contributor_idx: int
    rank: int
    name: Label
    n_examples: int
    value: float
    value_text: str
    interval_text: str
    half_width: float
    share: float
    share_text: str
    rank_low: int
    rank_high: int
    whisker: Whisker
    verdict: str

    @property
    def rank_text(self) -> str:
        return f"{self.rank_low}" if self.rank_low == self.rank_high else f"{self.rank_low}\u2013{self.rank_high}"


@dataclass(frozen=True)
class NeighborRow:
    """Two contributors that follow each other in the ranking."""

    better: Label
    worse: Label
    better_rank: int
    difference: float
    difference_text: str
    interval_text: str
    are_apart: bool


@dataclass(frozen=True)
class KernelRow:
    """LDS of one attribution kernel, times 100, as text."""

    name: str
    estimator: str
    n_coalitions: int
    lds: float
    lds_text: str
    interval_text: str
    averaged_text: str
    less_shapley_text: str


@dataclass(frozen=True)
class TestRow:
    """One test coalition."""

    __test__ = False  # not a pytest class

    number: int
    n_present: int
    predicted: float
    predicted_text: str
    measured: float
    measured_text: str
    per_seed_text: str


@dataclass(frozen=True)
class Proof:
    """How well credit predicts models that were retrained."""

    summary: Sentence
    notes: list[Sentence]
    lds_chart: Chart
    scatter: Chart
    kernels: list[KernelRow]
    tests: list[TestRow]


@dataclass(frozen=True)
class ConvergenceRow:
    """Credit fitted to the first `n_coalitions`."""

    n_coalitions: int
    widest_text: str
    lds_text: str
    estimates: list[str]


@dataclass(frozen=True)
class Convergence:
    """What more coalitions changed."""

    summary: Sentence
    note: str
    shown: list[Label]
    rows: list[ConvergenceRow]
    charts: list[tuple[Chart, str]]
    has_lds: bool


@dataclass(frozen=True)
class ShareRow:
    """Credit beside the number of examples."""

    rank: int
    name: Label
    n_examples: int
    share: float
    share_text: str
    interval_text: str
    by_examples: float
    by_examples_text: str
    difference: float
    difference_text: str
    is_outside: bool


@dataclass(frozen=True)
class ProRata:
    """The status quo beside the credit."""

    summary: list[Sentence]
    chart: Chart
    rows: list[ShareRow]


@dataclass(frozen=True)
class Credit:
    """Everything that needs fitted attributions."""

    question: Sentence
    answer: Sentence
    context: list[Sentence]
    cautions: list[Sentence]
    rows: list[CreditRow]
    axis: WhiskerAxis
    rank_chart: Chart
    n_left_out: int
    certainty: list[Sentence]
    neighbors: list[NeighborRow]
    runs: list[Sentence]
    remedy: str
    facts: list[tuple[str, str, str]]
    proof: Proof | None
    convergence: Convergence | None
    pro_rata: ProRata | None
    unfitted: list[tuple[str, str]]


@dataclass(frozen=True)
class BehaviorPage:
    """What a report says about one behavior.

    Attributes:
        key: Its anchor.
        name: As the study calls it.
        title: As people call it.
        meaning: What it says of images; empty where that is not known.
        unit: Empty if it has none.
        direction_text: `higher is better` or `lower is better`.
        variant: By which network and settings it is measured.
        credit: None while too little is measured.
        missing: Why there is no credit yet.
        attributions: Those of the credit, for a payout.
        higher_is_better: The direction.
    """

    key: str
    name: str
    title: str
    meaning: str
    unit: str
    direction_text: str
    variant: str
    higher_is_better: bool
    credit: Credit | None
    missing: str = ""
    attributions: Attributions | None = field(default=None, repr=False)


def page_without_credit(key: str, name: str, reason: str) -> BehaviorPage:
    """The page of a behavior of which too little is measured."""
    title, meaning = behavior_words(visible(name))
    return BehaviorPage(
        key, visible(name), title, meaning, "", "", "", True, None, missing=visible(without_places(reason))
    )


def behavior_page(
    key: str,
    result: BehaviorResult,
    config: StudyConfig,
    names: Sequence[Label],
    raw_names: Sequence[str],
    n_examples: Sequence[int],
) -> BehaviorPage:
    """The page of a behavior with credit.

    Args:
        key: Its anchor.
        result: What the study found.
        config: The study.
        names: `(n_contributors,)`, as shown.
        raw_names: `(n_contributors,)`, as the study has them.
        n_examples: `(n_contributors,)`.
    """
    fitted = result.attributions["shapley"]
    name = visible(result.name)
    title, meaning = behavior_words(name)
    half_widths = 1.96 * fitted.standard_errors
    about = Measured(
        title=title,
        unit=visible(result.definition["unit"]) if result.definition.get("unit") else "",
        direction=direction(result),
        fitted=fitted,
        names=names,
        n_examples=n_examples,
        shares=shares(fitted),
        order=credit_order(result),
        ranks=rank_intervals(fitted, higher_is_better=direction(result) > 0),
        decimals=decimals_for(fitted.values, half_widths),
        v_empty=float(result.end_points.empty.mean()),
        v_grand=float(result.end_points.grand.mean()),
        shares_mean_something=_sum_is_clear(fitted, direction(result)),
    )
    validation = result.validations.get("shapley")
    neighbors = _neighbors(about)
    certainty, runs = _certainty(about, neighbors)
    remedy = separation_sentence(fitted, [item.isolated for item in names], higher_is_better=about.direction > 0)
    axis, rows = _credit_rows(about)
    shown = _chart_rows(len(names))
    in_chart = about.order[shown]
    credit = Credit(
        question=question(about, meaning, visible(config.dataset)),
        answer=answer(about),
        context=context(about),
        cautions=_cautions(about, validation),
        rows=rows,
        axis=axis,
        rank_chart=charts.rank_chart(f"{key}-ranks", [names[i] for i in in_chart], about.ranks[in_chart], len(names)),
        n_left_out=len(names) - len(shown),
        certainty=certainty,
        neighbors=neighbors,
        runs=runs,
        remedy="" if remedy is None else remedy.replace("+-", "\u00b1"),
        facts=_facts(about, result),
        proof=None if validation is None else _proof(key, about, result, validation),
        convergence=_convergence(key, about, result, config, raw_names),
        pro_rata=_pro_rata(key, about),
        unfitted=[
            (KERNEL_NAMES.get(kernel, kernel), visible(without_places(reason)))
            for kernel, reason in result.unfitted.items()
        ],
    )
    return BehaviorPage(
        key=key,
        name=name,
        title=title,
        meaning=meaning,
        unit=about.unit,
        direction_text="higher is better" if about.direction > 0 else "lower is better",
        variant=visible(without_places(result.definition["variant"])) if result.definition.get("variant") else "",
        higher_is_better=about.direction > 0,
        credit=credit,
        attributions=fitted,
    )


def _sum_is_clear(fitted: Attributions, sign: int) -> bool:
    """Whether the sum of all credit is good and exceeds the half width of its interval, where that is known."""
    total = float(fitted.values.sum())
    variance = float(fitted.covariance.sum())
    noise = 1.96 * math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else 0.0
    return total * sign > noise


def _chart_rows(n_contributors: int) -> npt.NDArray[np.int64]:
    """Places in the ranking that a chart shows: all, or the first three quarters of its rows and the last."""
    if n_contributors <= MAX_CHART_ROWS:
        return np.arange(n_contributors)
    n_last = MAX_CHART_ROWS // 4
    return np.concatenate([np.arange(MAX_CHART_ROWS - n_last), np.arange(n_contributors - n_last, n_contributors)])


def _credit_rows(about: Measured) -> tuple[WhiskerAxis, list[CreditRow]]:
    """The ranked table."""
    fitted, intervals = about.fitted, about.fitted.intervals()
    axis, whiskers = charts.whiskers(fitted.values, intervals, about.direction)
    rows = []
    for place, i in enumerate(about.order.tolist()):
        low, high = intervals[i]
        verdict = "helps" if about.is_clear(int(i), 1) else "harms" if about.is_clear(int(i), -1) else "unclear"
        rows.append(
            CreditRow(
                contributor_idx=int(i),
                rank=place + 1,
                name=about.names[i],
                n_examples=about.n_examples[i],
                value=float(fitted.values[i]),
                value_text=fixed(float(fitted.values[i]), about.decimals, signed=True),
                interval_text=between((low, high), about.decimals, signed=True),
                half_width=float((high - low) / 2) if math.isfinite(low) else math.inf,
                share=float(about.shares[i]) if math.isfinite(about.shares[i]) else 0.0,
                share_text=percent(float(about.shares[i])),
                rank_low=int(about.ranks[i, 0]),
                rank_high=int(about.ranks[i, 1]),
                whisker=whiskers[i],
                verdict=verdict if math.isfinite(low) else "unknown",
            )
        )
    return axis, rows


def _neighbors(about: Measured) -> list[NeighborRow]:
    """Every pair of neighbours in the ranking, the best first."""
    estimates, intervals = differences(about.fitted)
    rows = []
    for place, (i, j) in enumerate(zip(about.order[:-1].tolist(), about.order[1:].tolist(), strict=True)):
        value, bounds = about.direction * estimates[i, j], np.sort(about.direction * intervals[i, j])
        rows.append(
            NeighborRow(
                about.names[i],
                about.names[j],
                place + 1,
                float(value),
                fixed(float(value), about.decimals),
                between(bounds, about.decimals),
                bool(bounds[0] > 0),
            )
        )
    return rows


def _certainty(about: Measured, neighbors: Sequence[NeighborRow]) -> tuple[list[Sentence], list[Sentence]]:
    """How many ranks are certain, and the runs of neighbours that cannot be told apart."""
    n = len(about.names)
    n_sure, n_apart = int((about.ranks[:, 0] == about.ranks[:, 1]).sum()), sum(row.are_apart for row in neighbors)
    sentences = [
        say(
            "{n_sure} of {n} contributors have only one {possible_rank}; {n_apart} of {n_pairs} pairs of neighbours in "
            "the ranking can be told apart.",
            n_sure=number(f"{n_sure:,}", "rank-interval"),
            n=f"{n:,}",
            possible_rank=term("possible rank", "rank-interval"),
            n_apart=number(f"{n_apart:,}", "difference"),
            n_pairs=f"{len(neighbors):,}",
        )
    ]
    if n > 2:
        sentences.append(
            say(
                "Every contributor and every pair is judged by itself at the 95\u00a0% level: among {many} such "
                "statements, about one in twenty may be wrong.",
                many="many",
            )
        )
    runs: list[Sentence] = []
    start = 0
    for place in range(n):
        if place < len(neighbors) and not neighbors[place].are_apart:
            continue
        if place > start:
            runs.append(
                say(
                    "Ranks {first} to {last}: {names}",
                    first=f"{start + 1}",
                    last=f"{place + 1}",
                    names=names_in_words([about.names[i] for i in about.order[start : place + 1]]),
                )
            )
        start = place + 1
    return sentences, runs


def _cautions(about: Measured, validation: Validation | None) -> list[Sentence]:
    """What speaks against relying on the answer; the first things to read after it."""
    found: list[Sentence] = []
    if (warning := fit_warning(about.fitted)) is not None:
        found.append(say("{warning}.", warning=warning[0].upper() + warning[1:]))
    if validation is None:
        found.append(
            say(
                "Nothing proves this credit yet: there are no finished {tests}, so nobody knows how well it predicts "
                "retrained models.",
                tests=term("test coalitions", "test-coalition"),
            )
        )
    elif not np.isfinite(validation.score.interval).all():
        found.append(
            say(
                "The proof says nothing: the {lds} is not known{reason}.",
                lds=term("LDS", "lds"),
                reason=f" ({validation.score.undefined_reason})" if validation.score.undefined_reason else "",
            )
        )
    elif not validation.score.interval[0] > 0:
        found.append(
            say(
                "The proof fails: the {lds} interval, {interval}, does not lie above zero, so this credit is not shown "
                "to predict retrained models better than chance.",
                lds=term("LDS", "lds"),
                interval=number(between(100 * validation.score.interval, 0), "lds"),
            )
        )
    if not about.shares_mean_something:
        found.append(
            say(
                "{shares} mean little here: all credit together, by which they are divided, cannot be told from zero "
                "or makes the behavior worse.",
                shares=term("Shares", "share"),
            )
        )
    elif (about.fitted.values * about.direction < 0).any() and np.nanmax(np.abs(about.shares)) > 1:
        found.append(
            say(
                "Good and bad credit nearly cancel, so {shares} exceed 100\u00a0% and change much when estimates "
                "change a little.",
                shares=term("shares", "share"),
            )
        )
    return found


def _facts(about: Measured, result: BehaviorResult) -> list[tuple[str, str, str]]:
    """Technical facts of the fit: name, value, key of the glossary."""
    fitted = about.fitted
    facts = [
        ("Fit coalitions", f"{fitted.n_coalitions:,}", "fit-coalition"),
        ("Design", fitted.design or "not known", "fit-coalition"),
        ("Estimator", fitted.estimator, "kernel"),
        ("v(nobody)", fixed(about.v_empty, about.decimals) + about.unit_words, "empty"),
        ("v(everybody)", fixed(about.v_grand, about.decimals) + about.unit_words, "grand"),
        ("Measurements of each", f"{len(result.end_points.empty)} and {len(result.end_points.grand)}", "grand"),
    ]
    if math.isfinite(fitted.noise_sd):
        facts.append(("Effective noise", significant(fitted.noise_sd) + about.unit_words, "noise"))
    if math.isfinite(fitted.loo_r2):
        facts.append(("Leave-one-out R\u00b2", fixed(fitted.loo_r2, 2), "loo-r2"))
    return facts


def _proof(key: str, about: Measured, result: BehaviorResult, validation: Validation) -> Proof:
    """LDS, ceiling, scatter."""
    assert result.test_masks is not None
    score, ceiling = validation.score, validation.ceiling
    predicted, measured = about.fitted.predict(result.test_masks), np.asarray(result.test_behaviors)
    low, high = 100 * score.interval
    repeated: Sentence = say(" Each was trained with {seeds}.", seeds=counted(score.n_seeds, "training seed"))
    if ceiling is not None:
        repeated = say(
            " Retraining the same models once more, with other random numbers, predicts them with {ceiling} "
            "({interval}): the {word}.",
            ceiling=number(fixed(100 * ceiling.value, 0), "ceiling"),
            interval=number(between(100 * ceiling.interval, 0), "ceiling"),
            word=term("ceiling", "ceiling"),
        )
    summary = say(
        "Models were retrained from scratch for {n} groups of contributors that the credit had not seen. The credit "
        "ranks them with an {lds} of {score} out of 100 ({interval_term} {interval}).{repeated}",
        n=number(f"{score.n_test:,}", "test-coalition"),
        lds=term("LDS", "lds"),
        score=number(fixed(100 * score.mean, 0), "lds"),
        interval_term=term("95\u00a0% interval", "interval"),
        interval=number(between((low, high), 0), "lds"),
        repeated=repeated,
    )
    notes = [say("{reason}.", reason=score.undefined_reason)] if score.undefined_reason else []
    kernels = [_kernel_row(kernel, result.attributions[kernel], found) for kernel, found in result.validations.items()]
    scores = [
        (KERNEL_NAMES.get(kernel, kernel), 100 * found.score.mean, *(100 * found.score.interval))
        for kernel, found in result.validations.items()
    ]
    decimals = decimals_for(measured, [measured.std() / 3])
    return Proof(
        summary=summary,
        notes=notes,
        lds_chart=charts.lds_chart(
            f"{key}-lds", scores, None if ceiling is None else (100 * ceiling.value, *(100 * ceiling.interval))
        ),
        scatter=charts.scatter_chart(f"{key}-scatter", predicted, measured, behavior=about.title),
        kernels=kernels,
        tests=[
            TestRow(
                number=i + 1,
                n_present=int(result.test_masks[i].sum()),
                predicted=float(predicted[i]),
                predicted_text=fixed(float(predicted[i]), decimals),
                measured=float(measured[:, i].mean()),
                measured_text=fixed(measured[:, i].mean(), decimals),
                per_seed_text=", ".join(fixed(value, decimals) for value in measured[:, i]),
            )
            for i in np.argsort(-predicted, kind="stable")
        ],
    )


def _kernel_row(kernel: str, fitted: Attributions, found: Validation) -> KernelRow:
    score, comparison = found.score, found.comparison
    return KernelRow(
        name=KERNEL_NAMES.get(kernel, kernel),
        estimator=fitted.estimator,
        n_coalitions=fitted.n_coalitions,
        lds=float(score.mean),
        lds_text=fixed(100 * score.mean, 1),
        interval_text=between(100 * score.interval, 1),
        averaged_text=fixed(100 * score.averaged, 1),
        less_shapley_text="\u2013"
        if comparison is None
        else f"{fixed(100 * comparison.difference, 1, signed=True)} "
        f"({between(100 * comparison.interval, 1, signed=True)})",
    )


def prefix_sizes(n_coalitions: int, *, paired: bool) -> list[int]:
    """Numbers of coalitions to which credit is fitted again, the last being all; pairs, where none lacks its other
    half, are kept together."""
    parts = PREFIXES if n_coalitions <= MANY_COALITIONS else FEW_PREFIXES
    step = 2 if paired else 1
    sizes = {max(4, step * round(part * n_coalitions / step)) for part in parts if part < 1}
    return sorted(size for size in sizes if size < n_coalitions) + [n_coalitions]


def with_whole_pairs(sizes: Sequence[int], masks: npt.NDArray[np.bool_]) -> list[int]:
    """Sizes that part no pair: one that lacks its half, as it failed, shifts all pairs after it by one.

    Args:
        sizes: Of the first coalitions, the last being all.
        masks: `(n_fit, n_contributors)`.
    """
    ends, at = {len(masks)}, 0
    while at < len(masks):
        at += 2 if at + 1 < len(masks) and (masks[at] != masks[at + 1]).all() else 1
        ends.add(at)
    return sorted({size if size in ends else size + 1 for size in sizes})


def _convergence(
    key: str, about: Measured, result: BehaviorResult, config: StudyConfig, raw_names: Sequence[str]
) -> Convergence | None:
    """Credit from the first coalitions alone; None where there are too few to tell anything."""
    n_fit = len(result.fit_behaviors)
    paired = about.fitted.design in PAIRED_DESIGNS
    sizes = prefix_sizes(n_fit, paired=paired)
    if paired:
        sizes = with_whole_pairs(sizes, result.fit_masks)
    fits = fit_at_sizes(
        result.fit_masks,
        result.fit_behaviors,
        sizes=sizes[:-1],
        fit=lambda masks, behaviors: fit_attributions(
            masks,
            behaviors,
            result.end_points,
            design=config.fit.design_name,
            estimator=config.estimator,
            contributor_names=raw_names,
        ),
    )
    found = [(at.n_fit, at.attributions) for at in fits if at.attributions is not None] + [(n_fit, about.fitted)]
    if len(found) < 2:
        return None
    validation, scores = result.validations.get("shapley"), list[LDSResult | None]()
    if validation is not None and result.test_masks is not None:
        test_set = LDSTestSet.prepare(result.test_masks, result.test_behaviors)
        scores = [test_set.score(fitted) for _, fitted in found[:-1]] + [validation.score]
    widths = [100 * share_half_width(fitted) for _, fitted in found]
    shown = about.order[: min(MAX_LINES, len(about.order))]
    if len(about.order) > MAX_LINES:
        shown = np.append(about.order[: MAX_LINES - 1], about.order[-1])
    places = shown.tolist()
    x = [float(size) for size, _ in found]
    series = []
    for i in places:
        bounds = np.array([fitted.intervals()[i] for _, fitted in found])
        series.append(
            Series(about.names[i], x, [float(f.values[i]) for _, f in found], list(bounds[:, 0]), list(bounds[:, 1]))
        )
    across = "fit coalitions"
    pictures = [
        (
            charts.line_chart(f"{key}-estimates", f"Credit for {about.title}", series, across=across, up="attribution"),
            "Credit of the first contributors and the last, with 95 % intervals.",
        )
    ]
    if np.isfinite(widths).all():
        line = Series(Label("widest", "widest", "widest"), x, widths)
        pictures.append(
            (
                charts.line_chart(f"{key}-widths", "Widest interval", [line], across=across, up="percent", zero=True),
                "Half the widest 95 % interval, percent of what all contributors add together.",
            )
        )
    if scores:
        known = [(size, score) for size, score in zip(x, scores, strict=True) if score is not None]
        line = Series(
            Label("LDS", "LDS", "LDS"),
            [size for size, _ in known],
            [100 * score.mean for _, score in known],
            [float(100 * score.interval[0]) for _, score in known],
            [float(100 * score.interval[1]) for _, score in known],
        )
        if np.isfinite(line.y).all():
            pictures.append(
                (
                    charts.line_chart(
                        f"{key}-lds-growth", "LDS", [line], across=across, up="LDS \u00d7 100", zero=True
                    ),
                    "LDS times 100, with 95 % intervals.",
                )
            )
    changes = rank_correlation(found[-2][1].values, found[-1][1].values)
    summary = say(
        "From {half} to all {all} {coalitions} the widest {interval} went from {before} to {after} of what everybody "
        "adds together; the two rankings agree with a correlation of {correlation}.",
        half=f"{found[-2][0]:,}",
        all=f"{n_fit:,}",
        coalitions=term("fit coalitions", "fit-coalition"),
        interval=term("interval", "widest"),
        before=number(f"\u00b1{percent(widths[-2] / 100)}", "widest"),
        after=number(f"\u00b1{percent(widths[-1] / 100)}", "widest"),
        correlation=fixed(float(changes), 2),
    )
    estimators = sorted({fitted.estimator for _, fitted in found})
    note = f"Estimator {' and '.join(estimators)}, fitted again to the first coalitions in the order of the plan"
    note += (
        f"; at {len(found)} sizes only, as {n_fit:,} coalitions take long to fit." if n_fit > MANY_COALITIONS else "."
    )
    return Convergence(
        summary=summary,
        note=note,
        shown=[about.names[i] for i in places],
        rows=[
            ConvergenceRow(
                size,
                f"\u00b1{percent(width / 100)}",
                f"{fixed(100 * score.mean, 1)} ({between(100 * score.interval, 1)})" if score is not None else "\u2013",
                [fixed(fitted.values[i], about.decimals, signed=True) for i in places],
            )
            for (size, fitted), width, score in zip(found, widths, scores or [None] * len(found), strict=True)
        ],
        charts=pictures,
        has_lds=bool(scores),
    )


def _pro_rata(key: str, about: Measured) -> ProRata | None:
    """Shares by credit beside shares by number of examples; None where there are no shares.

    Where all together made the behavior worse, those who harmed most would have the largest shares.
    """
    total, n_all = float(about.fitted.values.sum()), sum(about.n_examples)
    if not np.isfinite(about.shares).all() or n_all == 0 or total * about.direction <= 0:
        return None
    by_examples = np.asarray(about.n_examples, dtype=np.float64) / n_all
    bounds = np.sort(about.fitted.intervals() / total, axis=1)
    gaps = about.shares - by_examples
    outside = (by_examples < bounds[:, 0]) | (by_examples > bounds[:, 1])
    rows = [
        ShareRow(
            rank=place + 1,
            name=about.names[i],
            n_examples=about.n_examples[i],
            share=float(about.shares[i]),
            share_text=percent(float(about.shares[i])),
            interval_text=f"{between(100 * bounds[i], 1)} %" if np.isfinite(bounds[i]).all() else "unknown",
            by_examples=float(by_examples[i]),
            by_examples_text=percent(float(by_examples[i])),
            difference=float(gaps[i]),
            difference_text=fixed(100 * float(gaps[i]), 1, signed=True),
            is_outside=bool(outside[i]),
        )
        for place, i in enumerate(about.order.tolist())
    ]
    correlation = float(rank_correlation(by_examples, about.fitted.values * about.direction))
    summary = [
        say(
            "If only the number of examples counted, everybody would get a {share} {word}. By credit, {n_outside} of "
            "{n} contributors get another one, as far as the {interval} can tell.",
            share="share",
            word=term("pro rata", "pro-rata"),
            n_outside=number(f"{int(outside.sum()):,}", "share"),
            n=f"{len(about.names):,}",
            interval=term("95\u00a0% interval", "interval"),
        )
    ]
    if math.isfinite(correlation):
        summary.append(
            say(
                "Number of examples and credit agree with a rank correlation of {correlation}.",
                correlation=number(fixed(correlation, 2), "pro-rata"),
            )
        )
    for sign, what in ((1, "gain most by credit"), (-1, "lose most by credit")):
        largest = [int(i) for i in np.argsort(-sign * gaps, kind="stable")[:3] if sign * gaps[i] > 0.0005]
        if largest:
            parts = []
            for position, i in enumerate(largest):
                if position:
                    parts += say(" and " if position == len(largest) - 1 else ", ")
                parts += say(
                    "{name} ({difference} points)",
                    name=who(about.names[i]),
                    difference=number(fixed(100 * gaps[i], 1, signed=True), "share"),
                )
            summary.append(say("Those who {what}: {parts}.", what=what, parts=parts))
    shown = about.order[_chart_rows(len(about.names))]
    chart = charts.share_chart(
        f"{key}-shares", [about.names[i] for i in shown], about.shares[shown], by_examples[shown]
    )
    return ProRata(summary, chart, rows)
