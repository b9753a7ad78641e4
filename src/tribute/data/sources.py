"""From the name of a dataset to a training set: listed, divided among contributors, decoded once into a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tribute.data.columns import read_contributors, read_labels, select_classes
from tribute.data.contributors import PLANTED_VENDORS, ContributorTable, contributors_by_class, vendors
from tribute.data.decoding import ImageRule, Resize
from tribute.data.embedded import read_digits
from tribute.data.folder import list_folder
from tribute.data.hub import list_hub
from tribute.data.image_workers import process_images
from tribute.data.listing import Listing, Request, Rows, find_column
from tribute.data.parquet import list_parquet
from tribute.data.registry import HUB_PREFIX, SOURCES, Source, find_source
from tribute.data.tensors import TrainingData, open_or_build_tensor_cache, write_tensor_cache
from tribute.errors import ConfigError, DataError
from tribute.types import Images

__all__ = ["SOURCES", "DataRequest", "default_cache_dir", "list_examples", "load_contributors", "load_training_data"]

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class DataRequest:
    """Which data, and what its images become.

    Attributes:
        dataset: A key of `SOURCES`, or `hub:OWNER/NAME`.
        contributors: `class`: the dataset's own column of owners, or one contributor per class that occurs.
            `vendors` (digits): see that function.
        data_dir: A Parquet file, a folder with Parquet files, or a folder of images; None is for what is embedded or
            comes from the hub.
        cache_dir: Where tensor caches are kept; `default_cache_dir()` if None. Embedded sources need none.
        max_examples: Take the first rows only, at most this many; None takes all.
        image_size: Height and width that images are brought to (`tribute.data.decoding`); None: the dataset's.
        image_channels: 3 for RGB, 1 for grey; None: the dataset's.
        resize: `center_crop` or `squash`.
        contributor_column: Column that names the owners; None: the dataset's.
        label_column: Column of the classes; None: the dataset's. Data without classes has one, `image`.
        image_column: Column of the images; None: the dataset's.
        split: Part of the dataset.
        n_workers: Processes that decode; None: as many as there are processors, up to 8. Never changes a pixel.
    """

    dataset: str
    contributors: str = "class"
    data_dir: Path | None = None
    cache_dir: Path | None = None
    max_examples: int | None = None
    image_size: int | None = None
    image_channels: int | None = None
    resize: Resize = "center_crop"
    contributor_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    split: str = "train"
    n_workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself or the dataset.

        Raises:
            ConfigError: The dataset or the partition is unknown, or an option does not suit the dataset.
        """
        partitions = self.source.partitions
        if self.contributors not in partitions:
            raise ConfigError(
                f"--contributors {self.contributors!r} is unknown for {self.dataset}; expected one of "
                f"{', '.join(partitions)}, or a column of owners by --contributor_column"
            )
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"--max_examples: expected at least 1, found {self.max_examples}")
        if self.max_examples is not None and self.contributors == "vendors":
            raise ConfigError(f"--max_examples {self.max_examples}: vendors divide all examples; leave it out")
        if self.source.layout == "embedded":
            self._refuse_what_reads_files()
        if self.source.layout == "hub" and self.data_dir is not None:
            raise ConfigError(
                f"--data_dir {self.data_dir}: {self.dataset} comes from the hub; leave it out, or read the folder by "
                "--dataset parquet or folder"
            )

    def _refuse_what_reads_files(self) -> None:
        for name in ("data_dir", "contributor_column", "label_column", "image_column"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"--{name} {getattr(self, name)}: this dataset is embedded and reads no files; leave it out"
                )
        if self.split != "train":
            raise ConfigError(f"--split {self.split}: this dataset is embedded and has no parts; leave it out")
        shape = self.source.image_shape
        if shape and self.rule.shape != shape:
            height, width, n_channels = shape
            raise ConfigError(
                f"{self.dataset} has images of {height}x{width} pixels and {n_channels} channel, and is not resized; "
                f"found {self.rule.image_size}x{self.rule.image_size} and {self.rule.n_channels}. "
                "Choose another --preset, or leave --image_size out"
            )

    @property
    def source(self) -> Source:
        return find_source(self.dataset)

    @property
    def owner_column(self) -> str | None:
        """The column of owners that is asked for or the dataset has; None: contributors are classes or vendors."""
        return self.contributor_column or (self.source.contributor_column if self.contributors == "class" else None)

    @property
    def rule(self) -> ImageRule:
        """What every image becomes.

        Raises:
            ConfigError: The images are the user's, and nobody said how large they shall be.
        """
        shape = self.source.image_shape
        if self.image_size is None and shape is None:
            raise ConfigError(f"--image_size: expected the size in pixels that images of {self.dataset} shall have")
        return ImageRule(
            self.image_size or (shape[0] if shape else 0),
            self.image_channels or (shape[2] if shape else 3),
            self.resize,
        )

    @property
    def place_of_cache(self) -> Path:
        return default_cache_dir() if self.cache_dir is None else Path(self.cache_dir).expanduser()


@dataclass(frozen=True, eq=False)
class Examples:
    """Which rows of a listing are the training set, and what is known of them.

    Attributes:
        listing: All rows.
        rows: `(n_examples,)`, sorted.
        labels: `(n_examples,)`, indices into `label_names`.
        label_names: Name of each class.
    """

    listing: Listing
    rows: Rows
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]


def default_cache_dir() -> Path:
    """`$TRIBUTE_CACHE`, or else `tribute` in the user's cache folder."""
    if chosen := os.environ.get("TRIBUTE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tribute"


def load_training_data(dataset: str, **options: Any) -> TrainingData:
    """Load a dataset and divide it among its contributors.

    Args:
        dataset: A key of `SOURCES`, or `hub:OWNER/NAME`.
        **options: The other attributes of `DataRequest`.

    Raises:
        ConfigError: The dataset or the partition is unknown, or an option does not suit the dataset.
        DataError: The files are missing or not what the dataset says; a broken image is named by its row.
    """
    request = DataRequest(dataset, **options)
    if request.source.layout == "embedded":
        return _load_digits(request)
    examples = list_examples(request)
    contributors = divide(request, examples)
    cache_dir = request.place_of_cache / "tensors" / _cache_key(request, examples)
    cache = open_or_build_tensor_cache(cache_dir, lambda _: _build(request, examples, cache_dir))
    return TrainingData.from_arrays(
        dataset,
        cache.images,
        examples.labels,
        examples.label_names,
        contributors,
        images_sha256=cache.images_sha256,
        origin={**cache.source, "partition": request.owner_column or request.contributors},
    )


def load_contributors(dataset: str, **options: Any) -> ContributorTable:
    """Who owns which example, without decoding an image; arguments and errors as of `load_training_data`."""
    request = DataRequest(dataset, **options)
    if request.source.layout == "embedded":
        return _load_digits(request).contributors
    return divide(request, list_examples(request))


def list_examples(request: DataRequest, *, strict: bool = True) -> Examples:
    """Find the training set's rows and their classes.

    Args:
        request: Which data; not the embedded.
        strict: Whether a file that is missing is an error now, or only when it is read.

    Raises:
        DataError: Files or columns are missing or not what the dataset says.
    """
    listing = _list(request, strict=strict)
    candidates = (request.label_column,) if request.label_column else request.source.label_columns
    required = request.label_column or request.source.classes or request.owner_column is None
    if required or set(candidates) & set(listing.column_names):
        remedy = "name another with --label_column"
        if not request.label_column:
            remedy += ", or the owners with --contributor_column"
        column = find_column(request.dataset, "label", candidates, listing.column_names, remedy=remedy)
        labels, label_names = read_labels(listing, column)
    else:
        labels, label_names = np.zeros(listing.n_examples, dtype=np.int64), ("image",)
    rows = np.arange(listing.n_examples)
    if request.source.classes:
        rows, labels, label_names = select_classes(labels, label_names, request.source.classes)
    rows, labels = rows[: request.max_examples], labels[: request.max_examples]
    return Examples(listing, rows, labels, label_names)


def divide(request: DataRequest, examples: Examples) -> ContributorTable:
    """The owner of every example."""
    if request.owner_column:
        return read_contributors(examples.listing, request.owner_column, examples.rows)
    return contributors_by_class(examples.labels, examples.label_names)


def _list(request: DataRequest, *, strict: bool) -> Listing:
    """The listing of the source, from where the request says."""
    source = request.source
    data_dir = None if request.data_dir is None else Path(request.data_dir).expanduser()
    where = Request(
        data_dir=data_dir,
        cache_dir=request.place_of_cache,
        image_columns=(request.image_column,) if request.image_column else source.image_columns,
        metadata_files=source.metadata_files,
        file_columns=source.file_columns,
        split=request.split,
        strict=strict,
        max_rows=None if source.classes else request.max_examples,
    )
    _refuse_what_is_not_read(request, data_dir)
    match source.layout:
        case "hub":
            return list_hub(request.dataset.removeprefix(HUB_PREFIX), where, dataset="parquet (or folder)")
        case "folder":
            return list_folder(where)
        case "parquet":
            return list_parquet(where)
    if data_dir is not None:
        return list_folder(where) if _is_folder_of_images(data_dir, source) else list_parquet(where)
    if source.hub is None:
        raise DataError(
            f"--data_dir is missing: {request.dataset} is {source.description}. Get it ({source.origin}) and give a "
            f"Parquet file or folder with the columns {source.image_columns[0]} and {source.contributor_column}, or a "
            f"folder of images with {(*source.metadata_files, 'metadata.csv')[0]}"
        )
    return list_hub(source.hub, where, dataset=request.dataset)


def _refuse_what_is_not_read(request: DataRequest, data_dir: Path | None) -> None:
    """Refuse options that would be ignored, and with them the wish behind them.

    Raises:
        ConfigError: A part or an image column is named for a folder of images, or a part for a single file.
    """
    if data_dir is None:
        return
    layout = request.source.layout
    is_folder = layout == "folder" or (layout == "any" and _is_folder_of_images(data_dir, request.source))
    if is_folder and request.image_column is not None:
        raise ConfigError(
            f"--image_column {request.image_column}: a folder of images has files, named by its table or found in its "
            "sub-folders; leave it out"
        )
    if request.split != "train" and (is_folder or data_dir.is_file()):
        kind = "a folder of images" if is_folder else "a single file"
        raise ConfigError(f"--split {request.split}: {kind} has no parts; leave it out, or name the part as --data_dir")


def _is_folder_of_images(data_dir: Path, source: Source) -> bool:
    """Whether a folder is one of image files rather than of Parquet files."""
    if not data_dir.is_dir():
        return False
    tables = (*source.metadata_files, "metadata.csv", "metadata.jsonl", "metadata.parquet")
    if any((data_dir / name).is_file() for name in tables):
        return True
    if any(data_dir.glob("*.parquet")) or any(data_dir.glob("*/*.parquet")):
        return False
    return any(path.is_dir() and not path.name.startswith(".") for path in data_dir.iterdir())


def _cache_key(request: DataRequest, examples: Examples) -> str:
    """A name that follows from the content of the files, the rows taken, and what pixels become."""
    content = {
        "content": dict(examples.listing.content),
        "image_rule": request.rule.describe(),
        "rows": hashlib.sha256(examples.rows.astype("<i8").tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _build(request: DataRequest, examples: Examples, cache_dir: Path) -> None:
    """Decode the images into a tensor cache, in the order of the rows."""
    import PIL

    origin: Mapping[str, Any] = {
        **examples.listing.origin,
        **examples.listing.content,
        "image_rule": request.rule.describe(),
        "decoder": f"Pillow {PIL.__version__}",
    }
    n_examples = len(examples.rows)
    logger.info("decoding %s images of %s once, into %s", f"{n_examples:,}", request.dataset, cache_dir)
    write_tensor_cache(
        cache_dir, _decoded(request, examples), shape=(n_examples, *request.rule.shape), columns={}, source=origin
    )


def _decoded(request: DataRequest, examples: Examples) -> Iterator[Images]:
    """Batches of pixels `(n_rows, height, width, channels)`, with a report now and then."""
    encoded = examples.listing.read_images(examples.rows)
    n_done, n_examples = 0, len(examples.rows)
    started = reported = time.monotonic()
    for answer in process_images(encoded, n_examples, request.rule, n_workers=request.n_workers):
        if answer.failures:
            position, message = min(answer.failures.items())
            raise DataError(f"{examples.listing.place(int(examples.rows[n_done + position]))}: {message}")
        n_done += len(answer.array)
        now = time.monotonic()
        if now - reported >= SECONDS_BETWEEN_REPORTS:
            reported, rate = now, n_done / (now - started)
            logger.info("decoded %s of %s images, %.0f images/s", f"{n_done:,}", f"{n_examples:,}", rate)
        yield answer.array


def _load_digits(request: DataRequest) -> TrainingData:
    """The embedded digits, by class or as the planted vendors deliver them."""
    digits = read_digits(request.max_examples)
    origin = {"embedded": "scikit-learn", "partition": request.contributors}
    if request.contributors == "vendors":
        delivered = vendors(digits.images, digits.labels)
        return TrainingData.from_arrays(
            request.dataset,
            delivered.images,
            delivered.labels,
            digits.label_names,
            delivered.contributors,
            reference_images=digits.images,
            reference_labels=digits.labels,
            origin={**origin, "planted": asdict(PLANTED_VENDORS)},
        )
    return TrainingData.from_arrays(
        request.dataset,
        digits.images,
        digits.labels,
        digits.label_names,
        contributors_by_class(digits.labels, digits.label_names),
        origin=origin,
    )
