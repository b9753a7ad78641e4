"""Names of contributors and of other people's things as text of a page: they are untrusted.

Markup is not dealt with here, the templates escape it. What is dealt with is text that would not be seen, or would
change how the text around it is read: control characters, directions, and names that are empty or without end.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHOWN = 48
"""Characters of a name in tables and sentences; the rest is one click away."""

MAX_IN_CHART = 22
"""Characters of a name in a chart."""

NO_NAME = "(no name)"

_JOINERS = "\u200c\u200d"  # without them Persian words and composed emoji fall apart
_ISOLATE, _POP_ISOLATE = "\u2068", "\u2069"


@dataclass(frozen=True)
class Label:
    """A name as a page shows it.

    Attributes:
        short: At most `MAX_SHOWN` characters, unlike that of any other contributor.
        full: The whole name.
        in_chart: At most `MAX_IN_CHART` characters.
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


def shortened(text: str, at_most: int) -> str:
    """The beginning of a text, with an ellipsis where it is cut; never within a composed character."""
    if len(text) <= at_most:
        return text
    cut = at_most - 1
    while cut > at_most // 2 and (unicodedata.category(text[cut])[0] == "M" or text[cut - 1] == "\u200d"):
        cut -= 1
    return text[:cut].rstrip() + "\u2026"


def label(name: str) -> Label:
    """One name, with nobody to be confused with."""
    return labels([name])[0]


def labels(names: Sequence[str]) -> list[Label]:
    """Names of contributors as a page shows them; where two look alike, their numbers tell them apart."""
    full = [visible(name) for name in names]
    found = {}
    for what, at_most in (("short", MAX_SHOWN), ("in_chart", MAX_IN_CHART)):
        cut = [shortened(name, at_most) for name in full]
        times = Counter(cut)
        found[what] = [
            text if times[text] == 1 else f"{shortened(text, at_most - 6)} #{i + 1}" for i, text in enumerate(cut)
        ]
    times = Counter(full)
    full = [text if times[text] == 1 else f"{text} #{i + 1}" for i, text in enumerate(full)]
    return [Label(*parts) for parts in zip(found["short"], full, found["in_chart"], strict=True)]
