"""Looks at all of a dataset before anything expensive, and says what is wrong, where, and what to do."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tribute.data.columns import read_owners, twin_names
from tribute.data.duplicates import MAX_DISTANCE, find_duplicates
from tribute.data.examination import EXAMINATION
from tribute.data.image_workers import MAX_BATCH_BYTES, Encoded, default_n_workers, process_images
from tribute.data.listing import Listing, Rows
from tribute.data.sources import DataRequest, Examples, divide, list_examples, load_training_data
from tribute.data.tensors import TrainingData

OnProgress = Callable[[int, int], None]

BYTES_OF_LIBRARIES = 700 * 2**20
"""Resident memory of a process that has imported PyTorch, diffusers and the rest, measured as 0.6 to 0.7 GB."""


BYTES_PER_PIXEL = 16
"""Memory that decoding takes at most: Pillow keeps 4 bytes of a pixel, and transparency needs the image four times."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was noticed.

    Attributes:
        severity: An `error` stops a run sooner or later; a `warning` deserves a look.
        title: What it is.
        advice: What to do.
        items: Every instance, in words; for pairs, all that were found.
    """

    severity: Literal["error", "warning"]
    title: str
    advice: str
    items: Sequence[str]


@dataclass(frozen=True)
class Report:
    """What was seen.

    Attributes:
        n_examples: Rows of the training set.
        n_per_contributor: Readable images by contributor, in their order.
        n_per_format: Readable images by format and mode, the most frequent first.
        sizes: Smallest, median and largest width and height, pixels.
        n_sizes: How many different sizes there are.
        findings: Errors first.
        cache_bytes: Size of the tensor cache on the disk.
        free_bytes: What is free there.
        memory_bytes: Memory that a run takes besides the model and its batches.
    """

    n_examples: int
    n_per_contributor: dict[str, int]
    n_per_format: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    n_sizes: int
    findings: list[Finding] = field(default_factory=list)
    cache_bytes: int = 0
    free_bytes: int = 0
    memory_bytes: int = 0

    @property
    def n_errors(self) -> int:
        """Instances of errors."""
        return sum(len(finding.items) for finding in self.findings if finding.severity == "error")


def check_data(
    request: DataRequest,
    *,
    batch_size: int = 64,
    max_hash_distance: int = MAX_DISTANCE,
    on_progress: OnProgress = lambda n_done, n_total: None,
) -> Report:
    """Decode every image once and report. Nothing is written but hashes of files.

    Args:
        request: Which data.
        batch_size: Contributors with fewer images are reported.
        max_hash_distance: See `find_duplicates`.
        on_progress: Called with the number of images that are done, and of all.

    Raises:
        DataError: The dataset cannot be listed at all: no such folder, no such column.
    """
    examples, names, owners, problems = _read(request)
    listing, rows = examples.listing, examples.rows
    places = [listing.place(int(row)) for row in rows]
    records, failures = _examine(listing, rows, request.n_workers, on_progress)
    readable = np.ones(len(rows), dtype=bool)
    readable[list(failures)] = False
    counts = np.bincount(owners[readable & (owners >= 0)], minlength=len(names))
    cache_bytes = len(rows) * int(np.prod(request.rule.shape))
    free_bytes = _free_bytes(request.place_of_cache)

    findings = [
        Finding(
            "error", "unreadable images", "replace or remove them", [f"{places[i]}: {failures[i]}" for i in failures]
        ),
        Finding("error", "images without an owner", "name the owner, or leave the rows out", problems),
        *_name_findings(names),
        Finding(
            "error",
            "too little space for the tensor cache",
            "free some space, choose another folder by TRIBUTE_CACHE, or a smaller --image_size",
            [f"{cache_bytes:,} bytes needed, {free_bytes:,} free"] if cache_bytes > free_bytes else [],
        ),
        Finding(
            "warning",
            f"contributors with fewer than {batch_size} images, a batch",
            "their credit will be small and noisy: merge some, or use a smaller batch",
            [f"{name}: {count}" for name, count in zip(names, counts, strict=True) if count < batch_size],
        ),
        *_duplicate_findings(records, readable, owners, places, names, max_hash_distance),
        Finding(
            "warning",
            "files in the folder that are no example",
            "add them to the table if they should count",
            [f"{listing.n_ignored:,} files"] if listing.n_ignored else [],
        ),
    ]
    sizes, n_sizes = _sizes(records[readable])
    n_workers = request.n_workers or default_n_workers()
    n_pixels = int((records["width"].astype(np.int64) * records["height"]).max(initial=0))
    return Report(
        n_examples=len(rows),
        n_per_contributor=dict(zip(names, counts.tolist(), strict=True)),
        n_per_format=_formats(records[readable]),
        sizes=sizes,
        n_sizes=n_sizes,
        findings=[finding for finding in findings if finding.items],
        cache_bytes=cache_bytes,
        free_bytes=free_bytes,
        memory_bytes=BYTES_OF_LIBRARIES + n_workers * (4 * MAX_BATCH_BYTES + BYTES_PER_PIXEL * n_pixels),
    )


def _read(request: DataRequest) -> tuple[Examples, tuple[str, ...], npt.NDArray[np.int32], list[str]]:
    """The examples, names of contributors, the owner of each example (-1: nobody), and what is wrong with owners."""
    if request.source.layout == "embedded":
        data = load_training_data(request.dataset, contributors=request.contributors, max_examples=request.max_examples)
        examples = Examples(_listing_of(data), np.arange(data.n_examples), data.labels, data.label_names)
        return examples, data.contributors.names, data.contributors.contributor_of_example, []
    examples = list_examples(request, strict=False)
    if request.owner_column:
        owners = read_owners(examples.listing, request.owner_column, examples.rows)
        return examples, owners.names, owners.owner_of_row, list(owners.problems.values())
    table = divide(request, examples)
    return examples, table.names, table.contributor_of_example, []


def _listing_of(data: TrainingData) -> Listing:
    """Images that are in memory, as if they were files."""
    import pyarrow as pa
    from PIL import Image

    def read_images(rows: Rows) -> Iterator[Encoded]:
        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(data.images[row].squeeze()).save(buffer, "PNG")
            yield buffer.getvalue()

    return Listing(
        n_examples=data.n_examples,
        column_names=(),
        column=pa.table({}).column,
        class_names={},
        read_images=read_images,
        place=lambda row: f"{data.dataset}: row {row}",
        content={},
    )


def _examine(
    listing: Listing, rows: Rows, n_workers: int | None, on_progress: OnProgress
) -> tuple[npt.NDArray[Any], dict[int, str]]:
    """A record for every row, and what is wrong by position."""
    records = np.zeros(len(rows), dtype=EXAMINATION)
    failures: dict[int, str] = {}
    n_done = 0
    for answer in process_images(listing.read_images(rows), len(rows), None, n_workers=n_workers):
        records[n_done : n_done + len(answer.array)] = answer.array
        failures |= {n_done + position: message for position, message in answer.failures.items()}
        n_done += len(answer.array)
        on_progress(n_done, len(rows))
    return records, failures


def _name_findings(names: Sequence[str]) -> list[Finding]:
    """Names that collide: an error where no reader can tell them apart, else a warning."""
    twins = twin_names(names)
    return [
        Finding(
            "error",
            "names of contributors that look the same",
            "write each name in one way",
            [error for _, error in twins if error],
        ),
        Finding(
            "warning",
            "names of contributors that differ in case or white space only",
            "if they are one person, write the name in one way",
            [", ".join(map(ascii, group)) for group, error in twins if not error],
        ),
    ]


def _duplicate_findings(
    records: npt.NDArray[Any],
    readable: npt.NDArray[np.bool_],
    owners: npt.NDArray[np.int32],
    places: Sequence[str],
    names: Sequence[str],
    max_distance: int,
) -> list[Finding]:
    """Exact and near duplicates, apart for those within one contributor and those across."""
    positions = np.flatnonzero(readable)
    seen = records[positions]
    duplicates = find_duplicates(
        seen["pixels_sha256"], seen["perceptual_hash"], seen["thumbnail"], max_distance=max_distance
    )
    pairs = {
        "exact": [(positions[group[0]], positions[other]) for group in duplicates.exact for other in group[1:]],
        "near": [(positions[a], positions[b]) for a, b in duplicates.near],
    }
    findings = []
    for kind in ("exact", "near"):
        for across in (True, False):
            items = [
                _pair_text(int(a), int(b), owners, places, names)
                for a, b in pairs[kind]
                if (owners[a] != owners[b]) == across
            ]
            advice = (
                "who delivers a copy takes credit of the original's owner: settle whose image it is"
                if across
                else "copies weigh more in training: remove them unless that is meant"
            )
            where = "across contributors" if across else "within a contributor"
            findings.append(Finding("warning", f"{kind} duplicates {where}", advice, items))
    return findings


def _pair_text(
    first: int, second: int, owners: npt.NDArray[np.int32], places: Sequence[str], names: Sequence[str]
) -> str:
    def owned(position: int) -> str:
        owner = owners[position]
        return f"{places[position]} ({names[owner] if owner >= 0 else 'nobody'})"

    return f"{owned(first)} = {owned(second)}"


def _formats(records: npt.NDArray[Any]) -> dict[str, int]:
    counts = Counter(f"{kind} {mode}" for kind, mode in zip(records["format"], records["mode"], strict=True))
    return dict(counts.most_common())


def _sizes(records: npt.NDArray[Any]) -> tuple[dict[str, tuple[int, int]], int]:
    """Smallest, median and largest width and height, and the number of sizes."""
    if not len(records):
        return {}, 0
    sizes = np.stack([records["width"], records["height"]], axis=1)
    found = {"smallest": sizes.min(axis=0), "median": np.median(sizes, axis=0), "largest": sizes.max(axis=0)}
    return {name: (int(width), int(height)) for name, (width, height) in found.items()}, len(np.unique(sizes, axis=0))


def _free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
