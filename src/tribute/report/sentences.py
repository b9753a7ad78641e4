"""Sentences of a report: text with parts that are shown in their own way, and the answers in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np
import numpy.typing as npt

from tribute.report.names import Label
from tribute.report.numbers import between, counted, fixed, percent
from tribute.types import Attributions

MAX_NAMES = 4
"""Contributors that a sentence names before it counts the others."""


@dataclass(frozen=True)
class Segment:
    """A part of a sentence.

    Attributes:
        text: Plain text, untrusted.
        kind: `text`, `name`, `number` or `term`.
        term: Key of the glossary; of a number or a term.
        full: Of a name that is shortened, the whole.
    """

    text: str
    kind: str = "text"
    term: str = ""
    full: str = ""


Sentence = tuple[Segment, ...]
Part = str | Segment | Sequence[Segment]


def number(text: str, term: str) -> Segment:
    """A number, whose definition shows on hover."""
    return Segment(text, "number", term)


def term(text: str, key: str) -> Segment:
    """A word that the glossary explains."""
    return Segment(text, "term", key)


def who(name: Label) -> Segment:
    """A contributor."""
    return Segment(name.short, "name", full=name.full if name.is_shortened else "")


def say(template: str, **parts: Part) -> Sentence:
    """A sentence from a template such as `{who} contributes most`."""
    found: list[Segment] = []
    for text, field, _, _ in Formatter().parse(template):
        if text:
            found.append(Segment(text))
        if field is not None:
            part = parts[field]
            found += [Segment(part)] if isinstance(part, str) else [part] if isinstance(part, Segment) else part
    return tuple(found)


def names_in_words(names: Sequence[Label]) -> list[Segment]:
    """`A, B and C`; beyond `MAX_NAMES` they are counted."""
    shown = list(names) if len(names) <= MAX_NAMES else list(names[: MAX_NAMES - 1])
    parts: list[Segment] = []
    for i, name in enumerate(shown):
        is_last = i == len(names) - 1
        if i:
            parts.append(Segment(" and " if is_last else ", "))
        parts.append(who(name))
    if len(shown) < len(names):
        parts.append(Segment(f" and {counted(len(names) - len(shown), 'other')}"))
    return parts


@dataclass(frozen=True)
class Measured:
    """What the sentences about one behavior need.

    Attributes:
        title: What people call the behavior.
        unit: Empty if it has none.
        direction: 1 where more is better, -1 where less is.
        fitted: Its attributions.
        names: `(n_contributors,)`.
        n_examples: `(n_contributors,)`.
        shares: `(n_contributors,)` fractions; NaN where the sum is 0.
        order: Contributors, the best first.
        ranks: `(n_contributors, 2)`.
        decimals: Of attributions.
        v_empty: v(nobody).
        v_grand: v(everybody).
        shares_mean_something: Whether the sum of all credit is clear of its noise.
    """

    title: str
    unit: str
    direction: int
    fitted: Attributions
    names: Sequence[Label]
    n_examples: Sequence[int]
    shares: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int64]
    decimals: int
    v_empty: float
    v_grand: float
    shares_mean_something: bool

    @property
    def unit_words(self) -> str:
        return f" {self.unit}" if self.unit else ""

    @property
    def verb(self) -> str:
        """What good credit does to the behavior."""
        return "raise" if self.direction > 0 else "lower"

    def is_clear(self, i: int, sign: int) -> bool:
        """Whether the interval of a contributor lies wholly on the good (1) or the bad (-1) side of zero."""
        low, high = self.fitted.intervals()[i]
        return bool(min(low * self.direction * sign, high * self.direction * sign) > 0)


def question(about: Measured, meaning: str, dataset: str) -> Sentence:
    """What was asked about one behavior."""
    better = "Higher" if about.direction > 0 else "Lower"
    unit = f"It is measured in {about.unit}." if about.unit else "It has no unit."
    return say(
        "How much of the {title} of the images that the model generates is owed to each of the {n} {contributors} to "
        "its training data, {dataset}? The {title} is a {behavior}{what}. {better} is better. {unit}",
        title=about.title,
        n=f"{len(about.names):,}",
        contributors=term("contributors", "contributor"),
        dataset=dataset,
        behavior=term("behavior", "behavior"),
        what=f": it says {meaning}" if meaning else " that this study defines",
        better=better,
        unit=unit,
    )


def answer(about: Measured) -> Sentence:
    """Who leads, by how much, and whether that is certain, in one sentence."""
    leader = int(about.order[0])
    value = float(about.fitted.values[leader])
    low, high = about.fitted.intervals()[leader]
    size = number(fixed(abs(value), about.decimals), "attribution")
    unit = f", in {about.unit}" if about.unit else ", no unit"
    toward = -1.0 if value < 0 else 1.0  # the size and its interval in the direction of which the sentence speaks
    bounds = sorted((toward * low, toward * high))
    interval = [
        term("95\u00a0% interval", "interval"),
        Segment(" "),
        number(between(bounds, about.decimals), "interval"),
        Segment(unit),
    ]
    if math.isnan(low):
        interval = [term("95\u00a0% interval", "interval"), Segment(f" not known{unit}")]
    nobody_clear = not any(about.is_clear(i, sign) for i in range(len(about.names)) for sign in (1, -1))
    if nobody_clear and not math.isnan(low):
        return say(
            "Nobody\u2019s credit can be told from zero yet; the largest estimate is that of {leader}, whose "
            "{examples} {verb} the {title} by {size} on average ({interval}).",
            leader=who(about.names[leader]),
            examples=_examples(about, leader),
            verb=about.verb if value * about.direction >= 0 else _opposite(about.verb),
            title=about.title,
            size=size,
            interval=interval,
        )
    if value * about.direction <= 0:
        return say(
            "Nobody makes the {title} better: the examples of {leader} do the least harm, they {verb} it by {size} "
            "({interval}).",
            title=about.title,
            leader=who(about.names[leader]),
            verb=_opposite(about.verb),
            size=size,
            interval=interval,
        )
    share: Part = ""
    if about.shares_mean_something and math.isfinite(about.shares[leader]):
        share = say(
            ", which is {share} of what all contributors add together",
            share=number(percent(about.shares[leader]), "share"),
        )
    return say(
        "{leader} {leads}: {examples} {verb} the {title} by {size} on average ({interval}){share}; {certain}.",
        leader=who(about.names[leader]),
        leads="contributes most" if about.ranks[leader, 1] == 1 else "has the largest estimate",
        examples=_examples(about, leader, "their "),
        verb=about.verb,
        title=about.title,
        size=size,
        interval=interval,
        share=share,
        certain=_certainty(about),
    )


def _certainty(about: Measured) -> Sentence:
    """Whether the lead is certain."""
    leader = int(about.order[0])
    if math.isnan(about.fitted.standard_errors[leader]):
        return say("whether that lead is certain is not known")
    if about.ranks[leader, 1] == 1:
        return say("this lead is certain at the 95\u00a0% level")
    rivals = [about.names[i] for i in about.order[1:] if about.ranks[i, 0] == 1]
    if not rivals:
        return say(
            "this lead is not certain, {others} may be ahead", others=names_in_words([about.names[about.order[1]]])
        )
    return say("this lead is not certain, {rivals} may be ahead", rivals=names_in_words(rivals))


def context(about: Measured) -> list[Sentence]:
    """What one must know beside the answer: the whole, and who makes the behavior worse."""
    decimals = about.decimals
    better = (about.v_grand - about.v_empty) * about.direction > 0
    sentences = [
        say(
            "All contributors together {change} the {title} from {empty} (a network that learned from nobody) to "
            "{grand} (one that learned from everybody), which is {word}.",
            change="take",
            title=about.title,
            empty=number(fixed(about.v_empty, decimals), "empty"),
            grand=number(fixed(about.v_grand, decimals), "grand"),
            word="better" if better else "no better: look at the behavior and the models before the credit",
        )
    ]
    harmful = [about.names[i] for i in about.order[::-1] if about.is_clear(int(i), -1)]
    if harmful:
        sentences.append(
            say(
                "{whom} {make} it worse, with a {interval} that excludes zero.",
                whom=names_in_words(harmful),
                make="makes" if len(harmful) == 1 else "make",
                interval=term("95\u00a0% interval", "interval"),
            )
        )
    return sentences


def _examples(about: Measured, i: int, owner: str = "") -> list[Segment]:
    n = about.n_examples[i]
    return [Segment(owner), number(f"{n:,}", "examples"), Segment(" example" if n == 1 else " examples")]


def _opposite(verb: str) -> str:
    return {"raise": "lower", "lower": "raise"}[verb]
