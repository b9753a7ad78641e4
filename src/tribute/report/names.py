"""Names of contributors and of other people's things as text of a page: they are untrusted.

Markup is not dealt with here, the templates escape it. What is dealt with is text that would not be seen, or would
change how the text around it is read: control characters, directions, and names that are empty or without end.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_SHOWN = 48
"""Characters of a name in tables and sentences; the rest is one click away."""

MAX_EMS_IN_CHART = 10.6
"""Width of a name in a chart, in ems, as it is estimated."""

NO_NAME = "(no name)"

_JOINERS = "\u200c\u200d"  # without them Persian words and composed emoji fall apart
_PLACE = re.compile(r"(?<![\w/\\:.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|:;,]+[/\\])+")
"""Folders of an absolute path."""
_ISOLATE, _POP_ISOLATE = "\u2068", "\u2069"


@dataclass(frozen=True)
class Label:
    """A name as a page shows it.

    Attributes:
        short: At most `MAX_SHOWN` characters, unlike that of any other contributor.
        full: The whole name.
        in_chart: At most `MAX_EMS_IN_CHART` wide.
    """

    short: str
    full: str
    in_chart: str

    @property
    def is_shortened(self) -> bool:
        return self.short != self.full

    @property
    def isolated(self) -> str:
        """For sentences of plain text: its direction of writing ends where the name ends."""
        return f"{_ISOLATE}{self.short}{_POP_ISOLATE}"


def visible(text: str) -> str:
    """Text on one line in which every character is seen; `(no name)` if there is none.

    White space becomes a space. What has no picture (control characters, marks of direction, characters that are not
    assigned, halves of characters) is escaped as in Python, so that nobody can hide behind it.
    """
    shown = []
    for char in text:
        category = unicodedata.category(char)
        if char.isspace() or category == "Zs":
            shown.append(" ")
        elif category[0] == "C" and char not in _JOINERS:
            shown.append(ascii(char)[1:-1])
        else:
            shown.append(char)
    collapsed = " ".join("".join(shown).split())
    return collapsed if collapsed.strip(_JOINERS + " ") else NO_NAME


def without_places(text: str) -> str:
    """Text in which absolute paths are cut to their last part: a page is given away, users and folders are not."""
    return _PLACE.sub("", text)


def shortened(text: str, at_most: int) -> str:
    """The beginning of a text, with an ellipsis where it is cut; never within a composed character."""
    if len(text) <= at_most:
        return text
    cut = at_most - 1
    while cut > at_most // 2 and (unicodedata.category(text[cut])[0] == "M" or text[cut - 1] == "\u200d"):
        cut -= 1
    return text[:cut].rstrip() + "\u2026"


def fitting(text: str, ems: float) -> str:
    """The beginning of a text that is so wide, by estimate: no font is at hand here, and any may be in use."""
    taken = 0.0
    for i, char in enumerate(text):
        taken += _ems(char)
        if taken > ems:
            return shortened(text, max(2, i))
    return text


def _ems(char: str) -> float:
    """About the width of a character."""
    if unicodedata.combining(char) or char in _JOINERS:
        return 0.0
    if unicodedata.east_asian_width(char) in "WF":
        return 1.0
    return 0.92 if char in "MWmw@%" else 0.72 if char.isupper() else 0.35 if char in "iljtfI.,:;'| " else 0.62


def label(name: str) -> Label:
    """One name, with nobody to be confused with."""
    return labels([name])[0]


def labels(names: Sequence[str]) -> list[Label]:
    """Names of contributors as a page shows them; where two look alike, their numbers tell them apart."""
    full = [visible(name) for name in names]
    short = _told_apart([shortened(name, MAX_SHOWN) for name in full], lambda text: shortened(text, MAX_SHOWN - 6))
    in_chart = _told_apart(
        [fitting(name, MAX_EMS_IN_CHART) for name in full], lambda text: fitting(text, MAX_EMS_IN_CHART - 3.0)
    )
    full = _told_apart(full, lambda text: text)
    return [Label(*parts) for parts in zip(short, full, in_chart, strict=True)]


def _told_apart(texts: Sequence[str], shorten: Callable[[str], str]) -> list[str]:
    """Texts with their numbers where two are the same."""
    times = Counter(texts)
    return [text if times[text] == 1 else f"{shorten(text)} #{i + 1}" for i, text in enumerate(texts)]
