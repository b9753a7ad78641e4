"""Charts as shapes in pixels, which a template writes as inline SVG.

They are drawn 350 pixels wide, so that a telephone shows them in their own size, and colored by the classes of the
page's style sheet, so that they follow light, dark and paper. Every number of a chart is in a table of the page, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tribute.report.names import Label, fitting
from tribute.report.numbers import fixed

Array = npt.NDArray[np.float64]
WIDTH = 350.0


@dataclass(frozen=True)
class Shape:
    """One element of a chart.

    Attributes:
        tag: Of SVG: `line`, `rect`, `circle`, `path`, `text`.
        attributes: Its geometry and class.
        text: What a `text` says.
        title: Shown on hover.
    """

    tag: str
    attributes: dict[str, str]
    text: str = ""
    title: str = ""


@dataclass
class Chart:
    """A picture of numbers.

    Attributes:
        key: Unlike that of any other chart of the page.
        title: What it shows, in a few words.
        description: What one sees in it, for those who do not see it.
        width: Pixels.
        height: Pixels.
        shapes: From back to front.
    """

    key: str
    title: str
    description: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self._add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """A bar."""
        self._add("rect", css, title=title, x=x, y=y, width=max(width, 0.0), height=height)

    def dot(self, x: float, y: float, r: float, css: str, title: str = "") -> None:
        """A disc."""
        self._add("circle", css, title=title, cx=x, cy=y, r=r)

    def polyline(self, points: Sequence[tuple[float, float]], css: str, *, closed: bool = False) -> None:
        """A line through points, or the area within."""
        if points:
            path = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points) + ("Z" if closed else "")
            self.shapes.append(Shape("path", {"d": path, "class": css}))

    def label(self, x: float, y: float, text: str, css: str = "", *, anchor: str = "start", title: str = "") -> None:
        """Text whose baseline begins, ends or is centred at a point."""
        attributes = {"x": _number(x), "y": _number(y), "text-anchor": anchor, **({"class": css} if css else {})}
        self.shapes.append(Shape("text", attributes, text, title))

    def _add(self, tag: str, css: str, *, title: str = "", **geometry: float) -> None:
        attributes = {name: _number(value) for name, value in geometry.items()}
        self.shapes.append(Shape(tag, {**attributes, "class": css}, title=title))


@dataclass(frozen=True)
class Axis:
    """From numbers to pixels.

    Attributes:
        low: Number at `start`.
        high: Number at `end`.
        start: Pixel.
        end: Pixel; below `start` for an axis that goes up.
    """

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: npt.ArrayLike, start: float, end: float, *, also: Sequence[float] = ()) -> Axis:
        """The axis that holds all finite values with a little room."""
        found = np.asarray(values, dtype=np.float64).ravel()
        found = np.concatenate([found[np.isfinite(found)], np.asarray(also, dtype=np.float64)])
        low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
        if high <= low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        room = 0.04 * (high - low)
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, n: int = 4) -> list[tuple[float, str]]:
        """About `n` round numbers, with their texts."""
        step, decimals = _round_step((self.high - self.low) / n)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(i * step, fixed(i * step, decimals)) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Whisker:
    """A value with its interval on the common axis of a table, in pixels.

    Attributes:
        width: Of the axis.
        zero: Where 0 is.
        value: Where the value is.
        low: Where the interval begins; None where it is not known.
        high: Where it ends.
        css: `good` or `bad`, by the direction of the behavior.
    """

    width: str
    zero: str
    value: str
    low: str | None
    high: str | None
    css: str


@dataclass(frozen=True)
class WhiskerAxis:
    """What the whiskers of one table share: its ticks as (pixel, text)."""

    width: str
    ticks: tuple[tuple[str, str], ...]


def whiskers(
    values: Array, intervals: Array, direction: int, width: float = 170.0
) -> tuple[WhiskerAxis, list[Whisker]]:
    """The whiskers of the ranked table, by contributor, and their axis.

    Args:
        values: `(n_contributors,)`.
        intervals: `(n_contributors, 2)`; NaN where unknown.
        direction: 1 where more is better, -1 where less is.
        width: Pixels.
    """
    axis = Axis.over(np.concatenate([values, intervals.ravel()]), 6.0, width - 6.0, also=[0.0])
    rows = []
    for value, (low, high) in zip(values, intervals, strict=True):
        known = math.isfinite(low) and math.isfinite(high)
        rows.append(
            Whisker(
                _number(width),
                _number(axis(0.0)),
                _number(axis(value)),
                _number(axis(low)) if known else None,
                _number(axis(high)) if known else None,
                "good" if value * direction >= 0 else "bad",
            )
        )
    ticks = [(axis(value), text) for value, text in axis.ticks(4)]
    return WhiskerAxis(_number(width), tuple((_number(x), text) for x, text in ticks if 12 <= x <= width - 12)), rows


def rank_chart(key: str, names: Sequence[Label], ranks: npt.NDArray[np.int64], n_contributors: int) -> Chart:
    """Which ranks each contributor may hold.

    Args:
        key: Of the chart.
        names: Contributors in the order of their credit.
        ranks: `(n, 2)`, first and last rank of those.
        n_contributors: Of the study, those that are not shown included.
    """
    row, left, top = 19.0, 142.0, 26.0
    chart = Chart(
        key,
        "Ranks that each contributor may hold",
        f"One bar per contributor, the best at the top. A bar covers the ranks that are possible at the 95 % level: "
        f"{_rank_words(ranks)}.",
        WIDTH,
        top + row * len(names) + 8,
    )
    axis = Axis(0.5, n_contributors + 0.5, left, WIDTH - 8)
    for value in _rank_ticks(n_contributors):
        chart.line(axis(value), top - 4, axis(value), top + row * len(names), "grid")
        chart.label(axis(value), top - 9, f"{value}", "tick", anchor="middle")
    chart.label(left - 12, top - 9, "rank", "tick", anchor="end")
    for i, (name, (low, high)) in enumerate(zip(names, ranks, strict=True)):
        y = top + row * (i + 0.5)
        text = f"rank {low}" if low == high else f"ranks {low} to {high}"
        chart.label(left - 12, y + 4, name.in_chart, "name", anchor="end", title=name.full)
        start, end = axis(low - 0.5), axis(high + 0.5)
        inset = min(1.5, (end - start) / 4)
        css = "range sure" if low == high else "range"
        chart.rect(start + inset, y - 5, end - start - 2 * inset, 10, css, title=f"{name.isolated}: {text}")
    return chart


def lds_chart(
    key: str, scores: Sequence[tuple[str, float, float, float]], ceiling: tuple[float, float, float] | None
) -> Chart:
    """LDS times 100 of every attribution kernel, with the ceiling.

    Args:
        key: Of the chart.
        scores: Name, LDS and its interval, times 100.
        ceiling: Its value and interval, times 100.
    """
    row, left, top = 26.0, 158.0, 30.0
    said = "; ".join(
        f"{name} {fixed(mean, 0)}, {fixed(low, 0)} to {fixed(high, 0)}" for name, mean, low, high in scores
    )
    if ceiling is not None:
        said += f"; ceiling {fixed(ceiling[0], 0)}"
    height = top + row * len(scores) + 26
    chart = Chart(key, "LDS of every attribution, with 95 % intervals", f"LDS times 100: {said}.", WIDTH, height)
    numbers = [x for _, *rest in scores for x in rest] + list(ceiling or ())
    axis = Axis.over(numbers, left, WIDTH - 12, also=[0.0, 100.0])
    bottom = top + row * len(scores)
    if ceiling is not None:
        value, low, high = ceiling
        if math.isfinite(low):
            chart.rect(axis(low), top - 6, axis(high) - axis(low), bottom - top + 6, "band")
        chart.line(axis(value), top - 6, axis(value), bottom, "ceiling")
        chart.label(min(max(axis(value), left + 24), WIDTH - 30), top - 12, "ceiling", "tick", anchor="middle")
    for value, text in axis.ticks(4):
        chart.line(axis(value), top - 2, axis(value), bottom, "axis" if value == 0 else "grid")
        chart.label(axis(value), bottom + 15, text, "tick", anchor="middle")
    for i, (name, mean, low, high) in enumerate(scores):
        y = top + row * (i + 0.5)
        chart.label(left - 12, y + 4, name, "name", anchor="end")
        if math.isfinite(low):
            _interval(chart, axis(low), axis(high), y, "whisker good")
        if math.isfinite(mean):
            chart.dot(axis(mean), y, 4.5, "mark good", title=f"{name}: {fixed(mean, 1)}")
    return chart


def scatter_chart(key: str, predicted: Array, measured: Array, *, behavior: str) -> Chart:
    """Predicted against measured behavior of the retrained models.

    Args:
        key: Of the chart.
        predicted: `(n_test,)`.
        measured: `(n_training_seeds, n_test)`.
        behavior: Its name.
    """
    left, right, top, bottom = 52.0, WIDTH - 10, 14.0, 286.0
    mean = measured.mean(axis=0)
    agreement = float(np.corrcoef(predicted, mean)[0, 1]) if np.ptp(predicted) > 0 and np.ptp(mean) > 0 else math.nan
    chart = Chart(
        key,
        f"Predicted and measured {behavior} of models that were retrained",
        f"{len(predicted)} points, one per test coalition. Across: the prediction, {_range(predicted)}. "
        f"Up: what was measured, {_range(mean)}. "
        + (f"Their correlation is {fixed(agreement, 2)}." if math.isfinite(agreement) else ""),
        WIDTH,
        bottom + 42,
    )
    across, up = Axis.over(predicted, left, right), Axis.over(measured, bottom, top)
    _frame(chart, across, up, f"predicted {behavior}", f"measured {behavior}")
    for values in measured if len(measured) > 1 else []:
        for x, y in zip(predicted, values, strict=True):
            chart.dot(across(x), up(y), 2.2, "faint")
    for i, (x, y) in enumerate(zip(predicted, mean, strict=True)):
        chart.dot(across(x), up(y), 3.6, "mark good", title=f"test coalition {i + 1}")
    return chart


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name, `(x, y)`, and the interval of every y where it has one."""

    name: Label
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_chart(
    key: str, title: str, series: Sequence[Series], *, across: str, up: str, zero: bool = False, description: str = ""
) -> Chart:
    """Lines against numbers of coalitions; names at their ends, intervals as bars.

    Args:
        key: Of the chart.
        title: What it shows.
        series: The lines, at most six: a seventh would have no look of its own.
        across: Name of the horizontal axis.
        up: Name of the vertical axis.
        zero: Whether the vertical axis holds 0.
        description: For those who do not see it; by default the first and the last numbers.
    """
    named = len(series) > 1
    left, right, top, bottom = 52.0, WIDTH - (122.0 if named else 12.0), 16.0, 216.0
    ys = [y for item in series for part in (item.y, item.low, item.high) if part is not None for y in part]
    xs = [x for item in series for x in item.x]
    horizontal = Axis.over(xs, left, right, also=[0.0])
    vertical = Axis.over(ys, bottom, top, also=[0.0] if zero else [])
    said = "; ".join(
        f"{item.name.isolated} {_short(item.y[0])} at {item.x[0]:.0f}, {_short(item.y[-1])} at {item.x[-1]:.0f}"
        for item in series
        if len(item.y)
    )
    chart = Chart(key, title, description or f"{up}, by {across}: {said}.", WIDTH, bottom + 42)
    _frame(chart, horizontal, vertical, across, up)
    if vertical.low < 0 < vertical.high:
        chart.line(left, vertical(0.0), right, vertical(0.0), "axis")
    for i, item in enumerate(series):
        points = [(horizontal(x), vertical(y)) for x, y in zip(item.x, item.y, strict=True) if math.isfinite(y)]
        shift = (i - (len(series) - 1) / 2) * 2.4
        if item.low is not None and item.high is not None:
            for x, low, high in zip(item.x, item.low, item.high, strict=True):
                if math.isfinite(low) and math.isfinite(high):
                    at = horizontal(x) + shift
                    chart.line(at, vertical(low), at, vertical(high), f"stem s{i}")
        chart.polyline([(x + shift, y) for x, y in points], f"series s{i}")
        for x, y in points:
            chart.dot(x + shift, y, 3.0, f"mark s{i}")
    if named:
        ends = [vertical(item.y[-1]) for item in series]
        for i, y in _spread(ends, 15.0, top + 4, bottom):
            chart.line(right + 4, ends[i], right + 14, y, f"lead s{i}")
            chart.label(right + 17, y + 4, fitting(series[i].name.in_chart, 8.6), "name", title=series[i].name.full)
    return chart


def share_chart(key: str, names: Sequence[Label], credit: Array, examples: Array) -> Chart:
    """Share of the credit beside the share of the examples.

    Args:
        key: Of the chart.
        names: Contributors in the order of their credit.
        credit: `(n,)`, fractions.
        examples: `(n,)`, fractions.
    """
    row, left, top = 21.0, 142.0, 44.0
    said = ", ".join(
        f"{name.isolated} {fixed(100 * a, 0)} and {fixed(100 * b, 0)}"
        for name, a, b in zip(names[:5], credit, examples, strict=False)
    )
    chart = Chart(
        key,
        "Share of the credit beside share of the examples",
        f"Two marks per contributor, percent of the credit and percent of the examples: {said}"
        f"{' and so on' if len(names) > 5 else ''}.",
        WIDTH,
        top + row * len(names) + 24,
    )
    axis = Axis.over(100 * np.concatenate([credit, examples]), left, WIDTH - 14, also=[0.0])
    bottom = top + row * len(names)
    chart.dot(left + 4, 12, 4.5, "mark good")
    chart.label(left + 13, 16, "credit", "tick")
    chart.dot(left + 68, 12, 4.0, "hollow")
    chart.label(left + 77, 16, "examples", "tick")
    for value, text in axis.ticks(4):
        chart.line(axis(value), top - 6, axis(value), bottom, "axis" if value == 0 else "grid")
        chart.label(axis(value), top - 11, f"{text} %", "tick", anchor="middle")
    for i, (name, a, b) in enumerate(zip(names, 100 * credit, 100 * examples, strict=True)):
        y = top + row * (i + 0.5)
        chart.label(left - 12, y + 4, name.in_chart, "name", anchor="end", title=name.full)
        chart.line(axis(a), y, axis(b), y, "gap")
        chart.dot(axis(b), y, 4.0, "hollow", title=f"examples: {fixed(b, 1)} %")
        chart.dot(axis(a), y, 4.5, "mark good", title=f"credit: {fixed(a, 1)} %")
    return chart


def _frame(chart: Chart, across: Axis, up: Axis, name_across: str, name_up: str) -> None:
    """Grid, ticks and names of two axes; the vertical name stands on top, where it can be read."""
    left, right, bottom, top = across.start, across.end, up.start, up.end
    for value, text in up.ticks(5):
        chart.line(left, up(value), right, up(value), "grid")
        chart.label(left - 7, up(value) + 4, text, "tick", anchor="end")
    for value, text in across.ticks(4):
        chart.line(across(value), bottom, across(value), bottom + 4, "axis")
        chart.label(across(value), bottom + 17, text, "tick", anchor="middle")
    chart.line(left, bottom, right, bottom, "axis")
    chart.label((left + right) / 2, bottom + 35, name_across, "title", anchor="middle")
    del top, name_up  # the caption says it


def _interval(chart: Chart, low: float, high: float, y: float, css: str) -> None:
    chart.line(low, y, high, y, css)
    for x in (low, high):
        chart.line(x, y - 4, x, y + 4, css)


def _spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> Iterator[tuple[int, float]]:
    """Places of labels near those wanted, none nearer to another than `gap`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap if placed else top))
    excess = placed[-1] - bottom if placed else 0.0
    if excess > 0:
        placed[-1] -= excess
        for k in range(len(placed) - 2, -1, -1):
            placed[k] = min(placed[k], placed[k + 1] - gap)
    yield from zip(order, placed, strict=True)


def _round_step(step: float) -> tuple[float, int]:
    """A round number of about this size, and the decimals that it needs."""
    power = math.floor(math.log10(step))
    leading = step / 10.0**power
    factor = 1.0 if leading < 1.5 else 2.0 if leading < 3.5 else 5.0 if leading < 7.5 else 10.0
    return factor * 10.0**power, max(0, -power - (1 if factor == 10.0 else 0))


def _rank_ticks(n: int) -> list[int]:
    step = max(1, int(_round_step(n / 5)[0]))
    return sorted({1, n, *(value for value in range(step, n, step) if 1 + 0.75 * step <= value <= n - 0.75 * step)})


def _rank_words(ranks: npt.NDArray[np.int64]) -> str:
    n_sure = int((ranks[:, 0] == ranks[:, 1]).sum())
    widest = int((ranks[:, 1] - ranks[:, 0] + 1).max(initial=0))
    return f"{n_sure} of {len(ranks)} have one possible rank, and the widest bar covers {widest}"


def _range(values: Array) -> str:
    return f"{_short(float(values.min()))} to {_short(float(values.max()))}"


def _short(value: float) -> str:
    return fixed(value, int(np.clip(2 - math.floor(math.log10(abs(value))), 0, 8))) if value else "0"


def _number(value: float) -> str:
    """A coordinate to a tenth of a pixel, as short as it gets."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"
