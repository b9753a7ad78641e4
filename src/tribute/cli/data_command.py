"""`tribute data check`: what is wrong with the training data, before anything expensive."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import SourceArguments, parse
from tribute.cli.console import StudyReport, print_line, print_table
from tribute.config import DataConfig, Preset, default_preset, preset_names
from tribute.data.check import Finding, Report, check_data
from tribute.data.sources import DataRequest
from tribute.errors import ConfigError


class DataArguments(SourceArguments):
    """Flags of `tribute data`."""

    action: Annotated[Literal["check"], tyro.conf.Positional] = Field(description="What to do.")
    batch_size: int | None = Field(
        default=None, gt=0, description="Report contributors with fewer images; None: the preset's batch, else 64."
    )
    max_hash_distance: int = Field(
        default=9, ge=0, le=9, description="Bits of 128 in which near duplicates may differ."
    )
    n_workers: int | None = Field(default=None, gt=0, description="Processes that decode; None: by the processors.")
    examples: int = Field(default=5, ge=0, description="Examples printed of each finding.")


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, check, print the report; status 1 if there are errors."""
    arguments = parse(DataArguments, argv, prog=prog, description="Check training data.")
    if arguments.codec is not None:
        raise ConfigError(f"--codec {arguments.codec}: images are checked as they are, before a codec; leave it out")
    source = arguments.source()
    preset = _preset(arguments, source)
    progress = StudyReport()
    report = check_data(
        _request(source, preset, arguments.n_workers),
        batch_size=arguments.batch_size or (preset.training["retrain"].batch_size if preset else 64),
        max_hash_distance=arguments.max_hash_distance,
        on_progress=lambda n_done, n_total: progress.progress("images", n_done, n_total, ""),
    )
    print_report(report, n_shown=arguments.examples)
    if report.n_errors:
        sys.exit(1)


def _preset(arguments: DataArguments, source: DataConfig) -> Preset | None:
    """The recipe that the data is meant for, if there is one."""
    if arguments.preset or default_preset(source.dataset) in preset_names():
        return arguments.load_preset(source.dataset)
    return None


def _request(source: DataConfig, preset: Preset | None, n_workers: int | None) -> DataRequest:
    """The data as a run with this recipe would ask for it."""
    values = dict(source)
    if preset is not None:
        values["image_size"] = source.image_size or preset.image_size
        values["image_channels"] = preset.image_channels
    return DataRequest(**values, n_workers=n_workers)


def print_report(report: Report, *, n_shown: int) -> None:
    """Counts, formats and sizes, then findings with some examples each, then what it comes to."""
    n_readable = sum(report.n_per_contributor.values())
    print_table(
        f"{report.n_examples:,} images, {len(report.n_per_contributor):,} contributors",
        ["contributor", "images", "share"],
        [[name, f"{count:,}", f"{count / max(1, n_readable):.1%}"] for name, count in report.n_per_contributor.items()],
    )
    print_line("formats: " + ", ".join(f"{name} {count:,}" for name, count in report.n_per_format.items()))
    sizes = ", ".join(f"{name} {width}x{height}" for name, (width, height) in report.sizes.items())
    print_line(f"sizes: {sizes} ({report.n_sizes:,} different)")
    print_line(
        f"a run needs {_megabytes(report.cache_bytes)} of disk for the tensor cache "
        f"({_megabytes(report.free_bytes)} free) and about {_megabytes(report.memory_bytes)} of memory besides the "
        "model and its batches"
    )
    for finding in report.findings:
        _print_finding(finding, n_shown)
    n_warnings = sum(finding.severity == "warning" for finding in report.findings)
    print_line(f"{report.n_errors:,} errors, {n_warnings} kinds of warnings")


def _print_finding(finding: Finding, n_shown: int) -> None:
    print_line(f"{finding.severity}: {finding.title}: {len(finding.items):,}. What to do: {finding.advice}")
    # Errors are all shown: each has to be repaired.
    items = finding.items if finding.severity == "error" else finding.items[:n_shown]
    for item in items:
        print_line(f"  {item}")
    if len(items) < len(finding.items):
        print_line(f"  ... and {len(finding.items) - len(items):,} more")


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
