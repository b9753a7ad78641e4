"""What a report says, gathered from the run folder and the store of a study at any moment, without PyTorch."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from tribute.config import StudyConfig
from tribute.errors import ConfigError, FitError
from tribute.report.behavior_page import BehaviorPage, behavior_page, page_without_credit
from tribute.report.glossary import GLOSSARY, Term, glossary
from tribute.report.names import Label, labels, visible, without_places
from tribute.report.numbers import between, counted, duration, fixed, significant
from tribute.report.payout import NegativePolicy, Payout, money, pay_out
from tribute.report.sentences import Sentence, say, term
from tribute.store.records import Store
from tribute.study.costs import read_costs
from tribute.study.manifest import read_manifest
from tribute.study.pictures import Picture, read_pictures
from tribute.study.pilot_record import PilotResult, read_pilot
from tribute.study.record import StudyRecord
from tribute.study.results import summarise_behavior

MAX_PICTURE_BYTES = 400_000
MAX_PICTURES_BYTES = 2_500_000
"""Of one picture and of all of them, as files: a page stays small enough to be sent by mail."""

_PNG = b"\x89PNG\r\n\x1a\n"

_ROLES = {
    "empty": "Nobody: untrained network",
    "grand": "Everybody",
    "fit": "Fit coalitions",
    "loo": "Leave-one-out coalitions",
    "test": "Test coalitions, retrained",
    "pilot": "Pilot",
}

_STAGES = {
    "full_model": "Training the full model",
    "sparse_model": "Making the sparse model",
    "end_points": "Nobody and everybody",
    "fit": "Fit coalitions",
    "loo": "Leave-one-out coalitions",
    "test": "Test coalitions, retrained",
    "pilot": "Pilot",
    "pictures": "Models for pictures",
    "other": "Other measurements",
}

_MODEL_STAGES = ("full_model", "sparse_model")


@dataclass(frozen=True)
class PayoutRequest:
    """A budget that is to be shared.

    Attributes:
        budget: Positive, e.g. `10000`.
        currency: Three letters.
        negative: Policy for negative credit.
    """

    budget: Decimal | str
    currency: str = "EUR"
    negative: NegativePolicy = "zero"


@dataclass(frozen=True)
class ProgressRow:
    """Evaluations of one kind."""

    title: str
    n_finished: int
    n_planned: int
    n_failed: int


@dataclass(frozen=True)
class Progress:
    """How much of a study is done."""

    rows: list[ProgressRow]
    failures: list[str]

    @property
    def n_finished(self) -> int:
        return sum(row.n_finished for row in self.rows)

    @property
    def n_planned(self) -> int:
        return sum(row.n_planned for row in self.rows)

    @property
    def n_failed(self) -> int:
        return sum(row.n_failed for row in self.rows)

    @property
    def is_complete(self) -> bool:
        return self.n_finished == self.n_planned

    @property
    def sentence(self) -> str:
        """For the first lines of the page."""
        text = f"{self.n_finished:,} of {counted(self.n_planned, 'planned measurement')} are finished"
        if self.n_failed:
            text += f", {self.n_failed:,} failed"
        return text + (
            "." if self.is_complete else ". What follows is what is known so far; it will change as the study goes on."
        )


@dataclass(frozen=True)
class PictureFigure:
    """Generated images, as part of the page.

    Attributes:
        title: Heading.
        caption: What one sees.
        alt: For those who do not see it.
        source: Data URI.
        removed: Contributors that the model has not seen.
        values: Behaviors of the model: name, value, key of the glossary.
    """

    title: str
    caption: str
    alt: str
    source: str
    removed: list[Label]
    values: list[tuple[str, str]]


@dataclass(frozen=True)
class PilotRow:
    """What the pilot found for one behavior, as text."""

    title: str
    correlation_text: str
    interval_text: str
    retrain_noise_text: str
    sft_noise_text: str
    verdict: str
    sentences: list[str]


@dataclass(frozen=True)
class PilotPage:
    """A few coalitions that were measured in both ways before the study."""

    n_coalitions: int
    passed: bool
    rows: list[PilotRow]


@dataclass(frozen=True)
class CostRow:
    """One stage; texts, and numbers to sort by."""

    title: str
    done_text: str
    each_seconds: float
    each_text: str
    device_seconds: float
    device_text: str
    parts_text: str


@dataclass(frozen=True)
class Costs:
    """What the study has taken."""

    rows: list[CostRow]
    total_text: str
    lost_text: str


@dataclass(frozen=True)
class PayoutRow:
    """What one contributor gets."""

    name: Label
    share_text: str
    share: float
    amount: float
    amount_text: str
    interval_text: str
    includes_zero: bool


@dataclass(frozen=True)
class PayoutPage:
    """A budget shared by credit for one behavior; or why it cannot be."""

    behavior: BehaviorPage
    budget_text: str
    policy: str
    notes: list[str]
    rows: list[PayoutRow]
    total_text: str
    missing: str = ""
    payout: Payout | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Fact:
    """A line of the provenance."""

    name: str
    value: str


@dataclass(frozen=True)
class ReportPage:
    """What a report says.

    Attributes:
        study: Name of the study.
        dataset: Its training data.
        written: When the report was made, UTC.
        n_contributors: Of the study.
        n_examples: Of all of them.
        progress: How much is done.
        behaviors: One page each.
        pictures: Generated images; empty where there are none.
        pictures_left_out: Pictures that are too large for the page.
        pilot: None where there was none.
        costs: What the study has taken.
        models: Sentences about the models.
        provenance: Versions, device, fingerprints.
        payouts: One per behavior where a budget was given.
        terms: The glossary.
    """

    study: str
    dataset: str
    written: str
    n_contributors: int
    n_examples: int
    progress: Progress
    behaviors: list[BehaviorPage]
    pictures: list[PictureFigure]
    pictures_left_out: int
    pilot: PilotPage | None
    costs: Costs
    models: list[Sentence]
    provenance: list[Fact]
    payouts: list[PayoutPage]
    terms: list[Term]

    @property
    def has_credit(self) -> bool:
        return any(page.credit is not None for page in self.behaviors)


def gather_page(
    config: StudyConfig,
    record: StudyRecord,
    store: Store,
    *,
    behavior_names: Sequence[str] = (),
    payout: PayoutRequest | None = None,
    written: float | None = None,
) -> ReportPage:
    """Read everything that a report says.

    Args:
        config: The study.
        record: What is known of it.
        store: Holds its evaluations.
        behavior_names: Only these; all that the study reports by default.
        payout: A budget to be shared.
        written: Seconds since the epoch; by default now.

    Raises:
        ConfigError: A behavior is not one of the study, or the budget, currency or policy is not one.
        StoreError: The study is not in the store, or a file of the run folder cannot be read.
    """
    unknown = [name for name in behavior_names if name not in record.behaviors]
    if unknown:
        raise ConfigError(
            f"behavior: expected behaviors of the study ({', '.join(record.behaviors)}); found {', '.join(unknown)}"
        )
    study_id, evaluation_ids = record.study_id(store), record.evaluation_ids(store)
    names = labels(record.contributor_names)
    pages = []
    for place, name in enumerate(behavior_names or record.behaviors):
        key = f"behavior-{place + 1}"
        try:
            found = summarise_behavior(config, store, study_id, evaluation_ids, name, record.contributor_names)
            pages.append(behavior_page(key, found, config, names, record.contributor_names, record.n_examples))
        except FitError as error:
            pages.append(page_without_credit(key, name, str(error)))
    figures, n_left_out = _figures(read_pictures(config.run_dir), names, pages)
    pilot = _pilot_page(read_pilot(config.run_dir), pages)
    payouts = [] if payout is None else [_payout_page(payout, page, names) for page in pages]
    moment = time.gmtime(written)
    return ReportPage(
        study=visible(record.name),
        dataset=visible(record.dataset),
        written=time.strftime("%-d %B %Y, %H:%M UTC", moment),
        n_contributors=record.n_contributors,
        n_examples=sum(record.n_examples),
        progress=_progress(record, store, study_id),
        behaviors=pages,
        pictures=figures,
        pictures_left_out=n_left_out,
        pilot=pilot,
        costs=_costs(config, record, store),
        models=_models(record),
        provenance=_provenance(config, record),
        payouts=payouts,
        terms=glossary(_used_terms(pages, payouts, pilot)),
    )


def _used_terms(pages: Sequence[BehaviorPage], payouts: Sequence[PayoutPage], pilot: PilotPage | None) -> set[str]:
    """Keys of the terms that the page uses."""
    left_out = set() if payouts else {"payout"}
    credits = [page.credit for page in pages if page.credit is not None]
    if not any(credit.proof for credit in credits):
        left_out |= {"ceiling"}
    if pilot is None:
        left_out |= {"pilot"}
    return set(GLOSSARY) - left_out


def _progress(record: StudyRecord, store: Store, study_id: int) -> Progress:
    rows, failures = [], dict[str, None]()
    for role, identities in record.evaluations.items():
        ids = list(store.ids_of(study_id, list(identities)).values())
        counts = store.counts(study_id, evaluation_ids=ids)
        rows.append(ProgressRow(_ROLES.get(role, visible(role)), counts["finished"], len(identities), counts["failed"]))
        if counts["failed"]:
            found = store.find(study_id, statuses=("failed",), evaluation_ids=ids)
            failures |= dict.fromkeys(
                visible(without_places(item.error or "no reason recorded")[:300]) for item in found
            )
    return Progress(rows, list(failures)[:5])


def _figures(
    pictures: Sequence[Picture], names: Sequence[Label], pages: Sequence[BehaviorPage]
) -> tuple[list[PictureFigure], int]:
    """Pictures as data URIs, and how many are left out for their size."""
    titles = {page.name: page.title for page in pages}
    figures, n_left_out, left = [], 0, MAX_PICTURES_BYTES
    for picture in sorted(pictures, key=lambda item: ("full", "sparse", "without_top").index(item.kind)):
        if picture.behavior is not None and visible(picture.behavior) not in titles:
            continue
        content = _png_bytes(picture.path)
        if content is None or len(content) > left:
            n_left_out += 1
            continue
        left -= len(content)
        removed = [names[i] for i in picture.removed_idx if i < len(names)]
        title = {"full": "By the full model", "sparse": "By the sparse model, with everybody"}.get(picture.kind)
        if title is None:
            about = titles.get(visible(picture.behavior or ""), "")
            title = "Without the top contributors" + (f" to {about}" if about else "")
        figures.append(
            PictureFigure(
                title=title,
                caption=visible(picture.caption),
                alt=f"{title}: {counted(picture.n_images, 'generated image')} in rows of {picture.columns}.",
                source=f"data:image/png;base64,{base64.b64encode(content).decode()}",
                removed=removed,
                values=[
                    (titles[visible(name)], fixed(value, 3))
                    for name, value in picture.behaviors.items()
                    if visible(name) in titles
                ],
            )
        )
    return figures, n_left_out


def _png_bytes(path: Path) -> bytes | None:
    """The content of a PNG that is small enough for the page."""
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(_PNG) else None


def _pilot_page(found: PilotResult | None, pages: Sequence[BehaviorPage]) -> PilotPage | None:
    if found is None:
        return None
    titles = {page.name: page.title for page in pages}
    rows = [
        PilotRow(
            title=titles[visible(item.name)],
            correlation_text=fixed(item.correlation, 2),
            interval_text=between(item.interval, 2),
            retrain_noise_text=f"{significant(item.retrain_noise)} of {significant(item.retrain_spread)}",
            sft_noise_text=f"{significant(item.sft_noise)} of {significant(item.sft_spread)}",
            verdict="passed" if item.passed else "not passed",
            sentences=[visible(sentence) for sentence in item.sentences],
        )
        for item in found.behaviors
        if visible(item.name) in titles
    ]
    return PilotPage(found.n_coalitions, found.passed, rows) if rows else None


def _costs(config: StudyConfig, record: StudyRecord, store: Store) -> Costs:
    found = read_costs(config, record, store)
    rows = []
    for stage, costs in found.stages.items():
        is_model = stage in _MODEL_STAGES
        each = math.nan if is_model or not costs.n_done else costs.device_seconds / costs.n_done
        done = f"{costs.n_done:,}" if costs.n_done >= costs.n_planned else f"{costs.n_done:,} of {costs.n_planned:,}"
        rows.append(
            CostRow(
                title=_STAGES.get(stage, visible(stage)),
                done_text=f"{done} {'steps' if is_model else 'models'}",
                each_seconds=each if math.isfinite(each) else 0.0,
                each_text=duration(each),
                device_seconds=costs.device_seconds,
                device_text=duration(costs.device_seconds),
                parts_text=", ".join(f"{part} {duration(took)}" for part, took in costs.seconds_by_part.items()),
            )
        )
    lost = found.lost_device_seconds
    return Costs(rows, duration(found.device_seconds), duration(lost) if lost else "")


def _models(record: StudyRecord) -> list[Sentence]:
    """What is known of the models, in sentences."""
    sentences = []
    full, sparse = record.models.get("full", {}), record.models.get("sparse", {})
    if "origin" in full:
        sentences.append(say("The full model was made elsewhere and loaded."))
    elif "n_steps" in full:
        sentences.append(say("The full model was trained for {n} steps on everybody.", n=f"{int(full['n_steps']):,}"))
    if "n_steps" in sparse:
        smaller = ""
        sizes = sparse.get("n_parameters", {})
        if sizes.get("before"):
            smaller = f" It has {100 * sizes['after'] / sizes['before']:.0f} % of the full model\u2019s parameters."
        sentences.append(
            say(
                "The {sparse} was trained for {n} more steps.{smaller}",
                sparse=term("sparse model", "sparse"),
                n=f"{int(sparse['n_steps']):,}",
                smaller=smaller,
            )
        )
    if record.classifier_accuracy is not None:
        sentences.append(
            say(
                "Images are looked at by a classifier that recognises {accuracy} of images that it was not trained on.",
                accuracy=f"{100 * record.classifier_accuracy:.1f} %",
            )
        )
    return sentences


def _provenance(config: StudyConfig, record: StudyRecord) -> list[Fact]:
    manifest, known = read_manifest(config.run_dir), record.provenance
    facts = []
    if manifest is not None:
        facts += [
            Fact("Hash of the manifest (SHA-256), over all of the following", manifest.hash),
            Fact("Hash of the results, the same for equal runs", manifest.result_hash),
            Fact("Manifest written", manifest.written),
        ]
    facts += [
        Fact("Training data (fingerprint)", record.fingerprint),
        Fact("Settings (fingerprint)", config.fingerprint()),
        Fact("Tribute", f"{known.get('tribute', 'not known')}, commit {known.get('commit') or 'not known'}"),
        Fact("Python", f"{known.get('python', 'not known')} on {known.get('platform', 'not known')}"),
    ]
    devices = [str(known.get("device", "not known"))] if manifest is None else manifest.devices
    facts.append(Fact("Measured on", "; ".join(devices) or "not known"))
    versions = known.get("versions")
    if isinstance(versions, dict):
        facts.append(Fact("Packages", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [Fact(fact.name, visible(fact.value)) for fact in facts]


def _payout_page(request: PayoutRequest, page: BehaviorPage, names: Sequence[Label]) -> PayoutPage:
    if page.credit is None or page.attributions is None:
        missing = "There is no credit yet that a budget could be shared by."
        return PayoutPage(page, "", "", [], [], "", missing)
    try:
        found = pay_out(
            page.attributions,
            higher_is_better=page.higher_is_better,
            budget=request.budget,
            currency=request.currency,
            behavior_name=page.name,
            negative=request.negative,
        )
    except FitError as error:
        return PayoutPage(page, "", "", [], [], "", visible(without_places(str(error))))
    rows = [_payout_row(found, row.contributor_idx, names[row.contributor_idx]) for row in page.credit.rows]
    budget = money(found.budget, found.currency)
    return PayoutPage(page, budget, found.policy, [visible(note) for note in found.notes], rows, budget, payout=found)


def _payout_row(found: Payout, i: int, name: Label) -> PayoutRow:
    low, high = (float(x) for x in found.intervals[i])
    decimals = max(0, -int(found.unit.as_tuple().exponent))
    return PayoutRow(
        name=name,
        share=float(found.shares[i]),
        share_text=f"{fixed(100 * float(found.shares[i]), 2)}\u202f%",
        amount=float(found.amounts[i]),
        amount_text=f"{found.amounts[i]:,f}".replace("-", "\u2212"),
        interval_text=f"{fixed(low, decimals)} to {fixed(high, decimals)}" if math.isfinite(low) else "unknown",
        includes_zero=bool(found.includes_zero[i]),
    )
