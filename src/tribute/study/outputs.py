"""What a study leaves in its run folder for people and programs: a table, a summary, two plots."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tribute.errors import StoreError
from tribute.files import room_sentence, write_whole
from tribute.games.designs import PAIRED_DESIGNS
from tribute.games.uncertainty import rank_intervals, separation
from tribute.store.columns import Kind, parquet_bytes
from tribute.study.manifest import update_outputs
from tribute.types import Attributions, Images

if TYPE_CHECKING:
    from tribute.study.attribution import Validation
    from tribute.study.results import BehaviorResult, StudyResult

MIN_LOO_R2 = 0.2
"""Below this leave-one-out R2 the fit says little about coalitions that it has not seen, and intervals rest on it."""

SUMMARY_SCHEMA = "tribute.summary/1"
ATTRIBUTIONS_SCHEMA = "tribute.attributions/1"
"""Layouts of the files (`docs/outputs.md`). A key or a column may be added; any other change gets another number."""

ATTRIBUTION_COLUMNS: dict[str, Kind] = {
    "behavior": "text",
    "kernel": "text",
    "estimator": "text",
    "contributor": "text",
    "n_examples": "integer",
    "attribution": "number",
    "standard_error": "number",
    "low_95": "number",
    "high_95": "number",
    "share": "number",
    "rank_low": "integer",
    "rank_high": "integer",
}

_INK, _MUTED, _ACCENT, _GRID = "#1f2430", "#6b7280", "#2563a8", "#e5e7eb"


def credit_order(result: BehaviorResult) -> npt.NDArray[np.int64]:
    """Contributors from the one that improves the behavior most to the one that improves it least."""
    values = result.attributions["shapley"].values
    return np.argsort(-values * direction(result), kind="stable")


def direction(result: BehaviorResult) -> int:
    """1 where a higher behavior is better, -1 where a lower one is."""
    return 1 if result.definition.get("higher_is_better", True) else -1


def shares(attributions: Attributions) -> npt.NDArray[np.float64]:
    """Attributions as fractions of their sum, for Shapley values v(grand) - v(empty); NaN where the sum is 0.

    A sum that is rounding beside what it is the sum of counts as 0, whatever the unit of the behavior.
    """
    total = attributions.values.sum()
    if abs(total) <= 1e-12 * np.abs(attributions.values).sum():
        return np.full(attributions.n_contributors, np.nan)
    return attributions.values / total


def separation_sentence(fitted: Attributions, names: Sequence[str], *, higher_is_better: bool) -> str | None:
    """How many more coalitions should separate two neighbours; None when all are separated, or nothing is known."""
    found = separation(fitted, higher_is_better=higher_is_better)
    return None if found is None else found.sentence(names, paired=fitted.design in PAIRED_DESIGNS)


def fit_warning(fitted: Attributions) -> str | None:
    """A sentence where the fit is too poor for its intervals to be relied on; None where it is not, or unknown."""
    if not fitted.loo_r2 < MIN_LOO_R2:
        return None
    return (
        f"intervals rest on a poor fit: it predicts little of a coalition that it has not seen (leave-one-out R2 "
        f"{fitted.loo_r2:.2f}); measure more coalitions, or each with more images"
    )


def fit_notes(fitted: Attributions, names: Sequence[str], *, higher_is_better: bool) -> list[str]:
    """What to know beside a table of attributions, in sentences: the fit, why this estimator, what to measure next.

    Args:
        fitted: Attributions of one behavior.
        names: `(n_contributors,)`.
        higher_is_better: Direction of the behavior.
    """
    facts = [f"design {fitted.design or 'not known'}", f"estimator {fitted.estimator}"]
    facts.append(f"{fitted.n_coalitions} coalitions")
    if math.isfinite(fitted.noise_sd):
        facts.append(f"effective noise of one evaluation {fitted.noise_sd:.3g}")
    if math.isfinite(fitted.loo_r2):
        facts.append(f"leave-one-out R2 of the fit {fitted.loo_r2:.2f}")
    warning = fit_warning(fitted)
    notes = [
        ", ".join(facts),
        fitted.explanation,
        separation_sentence(fitted, names, higher_is_better=higher_is_better),
        None if warning is None else f"warning: {warning}",
    ]
    return [note for note in notes if note]


def rank_texts(fitted: Attributions, *, higher_is_better: bool) -> list[str]:
    """95 % intervals of the ranks as text, `2-4` or `1`; 1 is the best."""
    bounds = rank_intervals(fitted, higher_is_better=higher_is_better)
    return [f"{low}" if low == high else f"{low}-{high}" for low, high in bounds]


def write_outputs(result: StudyResult) -> list[Path]:
    """Write `attributions.csv` and `.parquet`, `summary.json`, `attributions.png` and `lds.png`; returns their paths.

    Their hashes go into the manifest of the run, where there is one.
    """
    folder = result.config.run_dir
    files: dict[Path, str | bytes] = {
        folder / "attributions.csv": attributions_csv(result),
        folder / "attributions.parquet": attributions_parquet(result),
        folder / "summary.json": json.dumps(summary(result), indent=1, allow_nan=False),
        folder / "attributions.png": _plot_attributions(result),
    }
    if any(item.validations for item in result.behaviors):
        files[folder / "lds.png"] = _plot_lds(result)
    try:
        for path, content in files.items():
            write_whole(path, content)
        update_outputs(folder)
    except OSError as error:
        raise StoreError(
            f"the results could not be written to {folder} ({error}; {room_sentence(folder)}); they are safe in the "
            "store: make room and run the same command again"
        ) from error
    return list(files)


def attributions_csv(result: StudyResult) -> str:
    """One row per behavior, attribution kernel and contributor; names are safe in a spreadsheet, unknown is empty."""
    columns = attribution_columns(result)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    cells = [[_csv_cell(kind, value) for value in values] for kind, values in columns.values()]
    writer.writerows(zip(*cells, strict=True))
    return text.getvalue()


def attributions_parquet(result: StudyResult) -> bytes:
    """The same rows as Parquet; names are as they are, unknown is null."""
    return parquet_bytes(attribution_columns(result), schema=ATTRIBUTIONS_SCHEMA)


def attribution_columns(result: StudyResult) -> dict[str, tuple[Kind, list[Any]]]:
    """The table of attributions by column, one row per behavior, kernel and contributor; None is unknown."""
    rows: list[tuple[Any, ...]] = []
    for item in result.behaviors:
        for kernel, fitted in item.attributions.items():
            intervals, share = fitted.intervals(), shares(fitted)
            ranks = rank_intervals(fitted, higher_is_better=direction(item) > 0)
            for i, name in enumerate(result.contributor_names):
                numbers = [fitted.values[i], fitted.standard_errors[i], *intervals[i], share[i]]
                known = [float(x) if math.isfinite(x) else None for x in numbers]
                labels = (item.name, kernel, fitted.estimator, name, int(result.n_examples[i]))
                rows.append((*labels, *known, *(int(rank) for rank in ranks[i])))
    return {
        name: (kind, [row[column] for row in rows]) for column, (name, kind) in enumerate(ATTRIBUTION_COLUMNS.items())
    }


def _csv_cell(kind: Kind, value: Any) -> str:
    if value is None:
        return ""
    return spreadsheet_text(value) if kind == "text" else f"{value:.8g}" if kind == "number" else str(value)


def spreadsheet_text(name: str) -> str:
    """A name that no spreadsheet takes for a formula: preceded by `'` where one would, as it is otherwise.

    Spaces before the sign do not make a formula harmless everywhere, nor do the wide forms of East Asian keyboards.
    """
    begins_formula = name[:1] in ("\t", "\r", "\n") or name.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20")
    return f"'{name}" if begins_formula else name


def summary(result: StudyResult) -> dict[str, Any]:
    """The study as plain JSON of the layout `SUMMARY_SCHEMA`; NaN and infinities become null.

    `report/summary.schema.json` describes it for programs, `docs/outputs.md` for people.
    """
    behaviors = {}
    for item in result.behaviors:
        behaviors[item.name] = {
            **item.definition,
            "v_empty": item.end_points.empty.tolist(),
            "v_grand": item.end_points.grand.tolist(),
            "n_fit_coalitions": len(item.fit_behaviors),
            "n_test_coalitions": 0 if item.test_masks is None else len(item.test_masks),
            "attributions": {
                kernel: _attributions_json(fitted, result.contributor_names, direction(item) > 0)
                for kernel, fitted in item.attributions.items()
            },
            "not_fitted": item.unfitted,
            "lds": {kernel: _lds_json(validation) for kernel, validation in item.validations.items()},
        }
    return _without_nan(
        {
            "schema": SUMMARY_SCHEMA,
            "name": result.config.name,
            "config": result.config.without_password(),
            "config_fingerprint": result.config.fingerprint(),
            "contributors": [
                {"name": name, "n_examples": n}
                for name, n in zip(result.contributor_names, result.n_examples, strict=True)
            ],
            "behaviors": behaviors,
            "evaluations": result.counts,
            "classifier_held_out_accuracy": result.classifier_accuracy,
            "models": result.models,
            "median_seconds_per_coalition": result.timings,
            "provenance": result.provenance,
        }
    )


def _attributions_json(fitted: Attributions, names: Sequence[str], higher_is_better: bool) -> dict[str, Any]:
    return {
        "design": fitted.design,
        "estimator": fitted.estimator,
        "explanation": fitted.explanation or None,
        "interval": fitted.interval,
        "n_coalitions": fitted.n_coalitions,
        "rank": fitted.rank,
        "noise_sd": fitted.noise_sd,
        "loo_r2": fitted.loo_r2,
        "warning": fit_warning(fitted),
        "separation": separation_sentence(fitted, names, higher_is_better=higher_is_better),
        "values": fitted.values.tolist(),
        "standard_errors": fitted.standard_errors.tolist(),
        "intervals_95": fitted.intervals().tolist(),
        "rank_intervals_95": rank_intervals(fitted, higher_is_better=higher_is_better).tolist(),
        "shares": shares(fitted).tolist(),
    }


def _lds_json(validation: Validation) -> dict[str, Any]:
    score, ceiling, comparison = validation.score, validation.ceiling, validation.comparison
    return {
        "mean": score.mean,
        "interval_95": score.interval.tolist(),
        "per_seed": score.per_seed.tolist(),
        "averaged": score.averaged,
        "averaged_interval_95": score.averaged_interval.tolist(),
        "n_test": score.n_test,
        "ceiling": None if ceiling is None else ceiling.value,
        "ceiling_interval_95": None if ceiling is None else ceiling.interval.tolist(),
        "undefined_reason": score.undefined_reason,
        "less_shapley": None
        if comparison is None
        else {
            "difference": comparison.difference,
            "interval_95": comparison.interval.tolist(),
            "probability": comparison.probability,
        },
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(n_rows: int, n_columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure without a display, in the project's plain style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_MUTED)
        axis.tick_params(colors=_INK, labelsize=9)
        axis.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the table has it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def write_image_grid(images: Images, path: Path, *, n_columns: int = 8, zoom: int | None = None) -> None:
    """Write images side by side as a PNG; the file appears whole or not at all.

    Args:
        images: `(n_images, height, width, channels)` uint8.
        path: The file.
        n_columns: Images per row.
        zoom: Each pixel becomes zoom x zoom pixels; None makes images about 64 pixels wide.
    """
    write_whole(path, image_grid_png(images, n_columns=n_columns, zoom=zoom))


def image_grid_png(images: Images, *, n_columns: int = 8, zoom: int | None = None) -> bytes:
    """Images side by side, as the content of a PNG file.

    Args:
        images: `(n_images, height, width, channels)` uint8, 1 or 3 channels.
        n_columns: Images per row.
        zoom: Each pixel becomes zoom x zoom pixels; None makes small images about 64 pixels wide, and leaves others.
    """
    n_images, height, width, n_channels = images.shape
    zoom = zoom or max(1, 64 // width)
    n_rows = math.ceil(n_images / n_columns)
    padded = np.full((n_rows * n_columns, height + 1, width + 1, n_channels), 255, dtype=np.uint8)
    padded[:n_images, :height, :width] = images
    tiled = padded.reshape(n_rows, n_columns, height + 1, width + 1, n_channels)
    grid = tiled.transpose(0, 2, 1, 3, 4).reshape(n_rows * (height + 1), n_columns * (width + 1), n_channels)
    return png_bytes(grid.repeat(zoom, axis=0).repeat(zoom, axis=1))


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels `(height, width, channels)`, 1 or 3 channels of 8 bits, as the content of a PNG file.

    Written here, as the same pixels then give the same bytes whatever the versions of plotting libraries.

    References:
        W3C (2003), Portable Network Graphics (PNG) Specification, second edition; filter type 2 (up).
    """
    height, width, n_channels = pixels.shape
    color_type = {1: 0, 3: 2}[n_channels]
    rows = pixels.reshape(height, width * n_channels)
    filtered = np.empty((height, 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = 2  # each row less the one above, modulo 256: repeated rows of a zoomed grid cost nothing
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    data = zlib.compress(filtered.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _label(name: str, at_most: int = 28) -> str:
    """A contributor's name as plain text of bounded length; `$` would start a formula."""
    shortened = name if len(name) <= at_most else name[: at_most - 1] + "\u2026"
    return shortened.replace("$", r"\$") or "(no name)"


def _plot_attributions(result: StudyResult) -> bytes:
    """Attributions with 95 % intervals, the best contributor at the top, one panel per behavior."""
    n_contributors = len(result.contributor_names)
    n_panels = len(result.behaviors)
    figure, axes = _figure(1, n_panels, 1.2 + 4.6 * n_panels, 1.4 + 0.3 * n_contributors)
    for axis, item in zip(axes[0], result.behaviors, strict=True):
        fitted = item.attributions["shapley"]
        order = credit_order(item)[::-1]
        rows = np.arange(n_contributors)
        half_width = (fitted.intervals()[:, 1] - fitted.values)[order]
        helps = fitted.values[order] * direction(item) > 0
        for mask, color in ((helps, _ACCENT), (~helps, "#b4472e")):
            axis.errorbar(
                fitted.values[order][mask],
                rows[mask],
                xerr=np.nan_to_num(half_width[mask]),
                fmt="o",
                color=color,
                markersize=5,
                capsize=2.5,
                linewidth=1.4,
            )
        axis.axvline(0, color=_MUTED, linewidth=0.8)
        axis.set_yticks(rows, [_label(result.contributor_names[i]) for i in order])
        axis.grid(axis="x", color=_GRID, linewidth=0.8)
        better = "higher is better" if direction(item) > 0 else "lower is better: credit is negative"
        axis.set_xlabel(f"attribution to {item.name} ({better})", color=_INK, fontsize=9)
        axis.set_title(f"{item.name}: Shapley value, 95 % interval", color=_INK, fontsize=10, loc="left")
    return _png(figure)


def _plot_lds(result: StudyResult) -> bytes:
    """Predicted against measured behavior of the retrained test models, one panel per behavior."""
    shown = [item for item in result.behaviors if "shapley" in item.validations and item.test_masks is not None]
    figure, axes = _figure(1, max(1, len(shown)), 1.0 + 4.4 * max(1, len(shown)), 4.4)
    for axis, item in zip(axes[0], shown, strict=False):
        fitted, score = item.attributions["shapley"], item.validations["shapley"].score
        assert item.test_masks is not None
        predicted = fitted.predict(item.test_masks)
        for behaviors in item.test_behaviors:
            axis.scatter(predicted, behaviors, s=14, color=_ACCENT, alpha=0.35, linewidths=0)
        axis.scatter(predicted, item.test_behaviors.mean(axis=0), s=24, color=_ACCENT, linewidths=0)
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_xlabel(f"predicted {item.name} of the coalition", color=_INK, fontsize=9)
        axis.set_ylabel(f"{item.name} of the retrained model", color=_INK, fontsize=9)
        low, high = score.interval
        axis.set_title(
            f"{item.name}: LDS {100 * score.mean:.0f} ({100 * low:.0f} to {100 * high:.0f})",
            color=_INK,
            fontsize=10,
            loc="left",
        )
    return _png(figure)
