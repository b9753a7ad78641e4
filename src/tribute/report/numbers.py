"""Numbers as text: one number of decimals per column, a true minus sign, and no more digits than are known."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MINUS, DASH = "\u2212", "\u2013"
PERCENT_SPACE = "\u202f"
"""Narrow space that does not break, before %."""


def decimals_for(values: npt.ArrayLike, errors: npt.ArrayLike | None = None) -> int:
    """Decimals with which numbers of one column are shown: two digits of their typical error, at most three of theirs.

    Args:
        values: The numbers.
        errors: Their half widths; NaN where unknown.
    """
    sizes = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    known = np.abs(np.asarray([] if errors is None else errors, dtype=np.float64)).ravel()
    known = known[np.isfinite(known) & (known > 0)]
    typical = float(np.median(known)) if len(known) else float(np.median(sizes)) / 10 if len(sizes) else 1.0
    return int(np.clip(1 - math.floor(math.log10(typical)), 0, 8))


def fixed(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """A number with so many decimals; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):,.{decimals}f}"
    is_zero = not text.strip("0.,")
    sign = "" if is_zero else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def between(bounds: npt.ArrayLike, decimals: int, *, signed: bool = False) -> str:
    """An interval `(2,)` as text: `0.1 to 0.3`; unknown where an end is."""
    low, high = (float(bound) for bound in np.asarray(bounds, dtype=np.float64))
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unknown"
    return f"{fixed(low, decimals, signed=signed)} to {fixed(high, decimals, signed=signed)}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A fraction as a percentage."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{fixed(100 * value, decimals)}{PERCENT_SPACE}%"


def significant(value: float, digits: int = 3) -> str:
    """A number by itself."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    return fixed(value, int(np.clip(digits - 1 - math.floor(math.log10(abs(value))), 0, 10)))


def duration(seconds: float) -> str:
    """Seconds as text for people."""
    if not math.isfinite(seconds):
        return DASH
    for size, unit in ((86400.0 * 2, "days"), (5400.0, "h"), (90.0, "min")):
        if seconds >= size:
            divisor = {"days": 86400.0, "h": 3600.0, "min": 60.0}[unit]
            return f"{significant(seconds / divisor, 2 if seconds / divisor < 10 else 3)} {unit}"
    return f"{significant(seconds, 2)} s"


def counted(n: int, one: str, many: str | None = None) -> str:
    """`1 coalition`, `2 coalitions`, `no coalitions`."""
    noun = one if n == 1 else many or f"{one}s"
    return f"{n:,} {noun}" if n else f"no {noun}"


def listed(items: Iterable[str], at_most: int = 5) -> str:
    """`A, B and C`; what is beyond is counted."""
    items = list(items)
    if len(items) > at_most:
        items = [*items[: at_most - 1], f"{len(items) - at_most + 1} others"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
