"""Where training images come from: a registry of sources, all read by the same machinery.

A source is described, not programmed: a shape, the columns of its files, its partitions, and a reader.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tribute.data.contributors import PLANTED_VENDORS, contributors_by_class, vendors
from tribute.data.decoding import ImageRule, Resize, decode_image
from tribute.data.tensors import TrainingData, open_or_build_tensor_cache, write_tensor_cache
from tribute.errors import ConfigError, DataError
from tribute.files import sha256_of_file
from tribute.types import Images

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

DECODE_BATCH = 256


@dataclass(frozen=True, eq=False)
class Examples:
    """What a reader returns: labelled images before anybody owns them, with their hash where it is known."""

    images: Images
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    origin: Mapping[str, Any]
    images_sha256: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """Where a reader may look and write, how many rows it takes (all if None), and what images become."""

    data_dir: Path | None
    cache_dir: Path
    max_examples: int | None
    rule: ImageRule


@dataclass(frozen=True)
class Source:
    """A dataset that can be named.

    Attributes:
        description: What the images are and where they come from, in one line.
        image_shape: Height, width, channels.
        read: The reader.
        partitions: Ways to divide it among contributors; the first is the usual one.
        image_columns: Columns that may hold the images, in the order in which they are looked for.
        label_columns: The same for the class.
    """

    description: str
    image_shape: tuple[int, int, int]
    read: Callable[[Source, ReadOptions], Examples]
    partitions: tuple[str, ...] = ("class",)
    image_columns: tuple[str, ...] = ("img", "image")
    label_columns: tuple[str, ...] = ("label",)


def load_training_data(
    dataset: str,
    *,
    contributors: str = "class",
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    max_examples: int | None = None,
    image_size: int | None = None,
    image_channels: int | None = None,
    resize: Resize = "center_crop",
    contributor_column: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    split: str = "train",
) -> TrainingData:
    """Load a dataset and divide it among its contributors.

    Args:
        dataset: A key of `SOURCES`.
        contributors: `class` (one per class that occurs) or, for `digits`, `vendors` (see that function).
        data_dir: A Parquet file, or a folder with `train*.parquet`; for sources that are not embedded.
        cache_dir: Where tensor caches are kept; `default_cache_dir()` if None. Embedded sources need none.
        max_examples: Take the first rows only, at most this many; None takes all.
        image_size: Height and width that images are brought to (`tribute.data.decoding`); None: the dataset's.
        image_channels: 3 for RGB, 1 for grey; None: the dataset's.
        resize: `center_crop` or `squash`.
        contributor_column: Not yet.
        label_column: Not yet.
        image_column: Not yet.
        split: Not yet.

    Raises:
        ConfigError: The dataset or the partition is unknown, or an option does not suit the dataset.
        DataError: The files are missing or not what the dataset says; a broken image is named by its row.
    """
    source = SOURCES.get(dataset)
    if not source:
        raise ConfigError(f"--dataset {dataset!r} is unknown; expected one of {', '.join(SOURCES)}")
    if contributors not in source.partitions:
        raise ConfigError(
            f"--contributors {contributors!r} is unknown for {dataset}; expected one of {', '.join(source.partitions)}"
        )
    if max_examples is not None and max_examples < 1:
        raise ConfigError(f"--max_examples: expected at least 1, found {max_examples}")
    if max_examples is not None and contributors == "vendors":
        raise ConfigError(f"--max_examples {max_examples}: vendors divide all examples; leave it out")

    options = ReadOptions(
        data_dir=None if data_dir is None else Path(data_dir).expanduser(),
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser(),
        max_examples=max_examples,
        rule=ImageRule(image_size or source.image_shape[0], image_channels or source.image_shape[2], resize),
    )
    examples = source.read(source, options)
    origin = {**examples.origin, "partition": contributors}
    if contributors == "vendors":
        delivered = vendors(examples.images, examples.labels)
        return TrainingData.from_arrays(
            dataset,
            delivered.images,
            delivered.labels,
            examples.label_names,
            delivered.contributors,
            reference_images=examples.images,
            reference_labels=examples.labels,
            origin={**origin, "planted": asdict(PLANTED_VENDORS)},
        )
    return TrainingData.from_arrays(
        dataset,
        examples.images,
        examples.labels,
        examples.label_names,
        contributors_by_class(examples.labels, examples.label_names),
        images_sha256=examples.images_sha256,
        origin=origin,
    )


def default_cache_dir() -> Path:
    """`$TRIBUTE_CACHE`, or else `tribute` in the user's cache folder."""
    if chosen := os.environ.get("TRIBUTE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tribute"


def read_digits(source: Source, options: ReadOptions) -> Examples:
    """Read the 8x8 scans that scikit-learn ships; their 17 grey levels 0 to 16 become 0 to 255, rounded.

    Raises:
        ConfigError: A `data_dir` was given, which nothing would read.
    """
    if options.data_dir is not None:
        raise ConfigError(f"--data_dir {options.data_dir}: this dataset is embedded and reads no files; leave it out")
    if options.rule.shape != source.image_shape:
        height, width, n_channels = source.image_shape
        raise ConfigError(
            f"this dataset has images of {height}x{width} pixels and {n_channels} channel, and is not resized; found "
            f"{options.rule.image_size}x{options.rule.image_size} and {options.rule.n_channels}. "
            "Choose another --preset, or leave --image_size out"
        )
    from sklearn.datasets import load_digits

    levels, classes = load_digits(return_X_y=True)
    images = np.round(np.asarray(levels) * (255 / 16)).astype(np.uint8).reshape(-1, *source.image_shape)
    labels = np.asarray(classes, dtype=np.int64)
    label_names = tuple(str(digit) for digit in range(10))
    n_rows = options.max_examples
    return Examples(images[:n_rows], labels[:n_rows], label_names, {"embedded": "scikit-learn"})


def read_parquet(source: Source, options: ReadOptions) -> Examples:
    """Read local Parquet files in the Hugging Face layout; the pixels are decoded once, into a tensor cache.

    The cache is named after the content of the files, the source's columns and shape, and `max_examples`.

    Raises:
        DataError: There is no such file or no `data_dir`, a column is missing or of another type, or an image
            is broken or of another size; the message names file and row (from 0).
    """
    files = _find_parquet_files(source, options.data_dir)
    try:
        hashes = [sha256_of_file(path) for path in files]
    except OSError as error:
        raise DataError(f"--data_dir {options.data_dir}: a file cannot be read ({error})") from error
    origin = {
        "files": [{"name": path.name, "sha256": sha256} for path, sha256 in zip(files, hashes, strict=True)],
        "image_rule": options.rule.describe(),
        "columns": [list(source.image_columns), list(source.label_columns)],
        "max_examples": options.max_examples,
    }
    content = json.dumps({**origin, "files": hashes}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    cache_dir = options.cache_dir / "tensors" / key
    build = partial(_build_from_parquet, source, files, cache_dir, options, origin)
    cache = open_or_build_tensor_cache(cache_dir, build)
    label_names = tuple(cache.source["label_names"])
    return Examples(cache.images, cache.columns["labels"], label_names, cache.source, cache.images_sha256)


@dataclass(frozen=True, eq=False)
class _Shard:
    """One opened Parquet file."""

    path: Path
    rows: datasets.Dataset = field(repr=False)
    image_column: str
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]


def _find_parquet_files(source: Source, data_dir: Path | None) -> list[Path]:
    """The file itself, or the training shards of the folder in the order of their names."""
    expected = "expected a Parquet file in the Hugging Face layout, or a folder with train*.parquet"
    if data_dir is None:
        raise DataError(f"--data_dir is missing: {expected}; the dataset is {source.description}")
    if data_dir.is_file():
        return [data_dir]
    # Copies from the hub keep their shards one folder down (data/, plain_text/, ...).
    files = sorted(data_dir.glob("train*.parquet")) or sorted(data_dir.glob("*/train*.parquet"))
    if not files:
        found = sorted(path.name for path in data_dir.iterdir())[:8] if data_dir.is_dir() else "nothing there"
        raise DataError(f"--data_dir {data_dir}: {expected}, found {found or 'an empty folder'}")
    return files


def _build_from_parquet(
    source: Source,
    files: Sequence[Path],
    cache_dir: Path,
    options: ReadOptions,
    origin: Mapping[str, Any],
    scratch: Path,
) -> None:
    """Decode the files into a tensor cache, in the order of files and rows."""
    import PIL

    shards: list[_Shard] = []
    for path in files:
        shards.append(_open_shard(source, path, scratch))
        if shards[-1].label_names != shards[0].label_names:
            raise DataError(
                f"{path}: expected the class names {list(shards[0].label_names)} of {shards[0].path.name}, "
                f"found {list(shards[-1].label_names)}"
            )
        n_found = sum(len(shard.labels) for shard in shards)
        if options.max_examples is not None and n_found >= options.max_examples:
            break
    labels = np.concatenate([shard.labels for shard in shards])[: options.max_examples]
    logger.info("decoding %d images of %s once, into %s", len(labels), files[0].parent, cache_dir)
    write_tensor_cache(
        cache_dir,
        _decoded_batches(options.rule, shards, len(labels)),
        shape=(len(labels), *options.rule.shape),
        columns={"labels": labels},
        source={**origin, "label_names": list(shards[0].label_names), "decoder": f"Pillow {PIL.__version__}"},
    )


def _open_shard(source: Source, path: Path, scratch: Path) -> _Shard:
    """Open one file through `datasets`, which maps it from disk, and read its label column whole."""
    import datasets
    import pyarrow.parquet
    from datasets.exceptions import DatasetsError
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if not pyarrow.parquet.read_metadata(path).num_rows:
            raise DataError(f"{path}: expected images, found no rows")
        # Not load_dataset: that looks at the network even for local files.
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(scratch))
    except (DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{path}: expected a Parquet file, found one that cannot be read ({reason})") from error
    finally:
        if shown:
            enable_progress_bars()

    image_column = _find_column(path, "image", source.image_columns, rows.column_names)
    label_column = _find_column(path, "label", source.label_columns, rows.column_names)
    storage = rows.data.column(image_column).type
    if "bytes" not in {storage.field(i).name for i in range(storage.num_fields)}:
        raise DataError(f"{path}: column {image_column!r}: expected images as {{bytes, path}}, found {storage}")

    column = rows.data.column(label_column)
    if column.null_count or str(column.type) not in {
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
    }:
        raise DataError(
            f"{path}: column {label_column!r}: expected an integer class in every row, "
            f"found {column.type} with {column.null_count} missing"
        )
    labels = column.to_numpy().astype(np.int64)
    feature = rows.features[label_column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else map(str, range(labels.max() + 1))
    label_names = tuple(names)
    outside = np.flatnonzero((labels < 0) | (labels >= len(label_names)))
    if len(outside):
        raise DataError(
            f"{path}: row {outside[0]}: expected a class from 0 to {len(label_names) - 1}, found {labels[outside[0]]}"
        )
    return _Shard(path, rows, image_column, labels, label_names)


def _find_column(path: Path, meaning: str, candidates: Sequence[str], found: Sequence[str]) -> str:
    for candidate in candidates:
        if candidate in found:
            return candidate
    raise DataError(
        f"{path}: expected the {meaning} in a column named {' or '.join(candidates)}, found columns {list(found)}"
    )


def _decoded_batches(rule: ImageRule, shards: Sequence[_Shard], n_examples: int) -> Iterator[Images]:
    """Yield `(n_rows, height, width, channels)`: the first `n_examples` rows of the shards, in order."""
    for shard in shards:
        encoded = shard.rows.data.column(shard.image_column)
        n_rows = min(n_examples, len(encoded))
        n_examples -= n_rows
        for start in range(0, n_rows, DECODE_BATCH):
            batch = encoded.slice(start, min(DECODE_BATCH, n_rows - start)).to_pylist()
            yield _decode(batch, rule, shard.path, start)


def _decode(encoded: Sequence[Any], rule: ImageRule, path: Path, first_row: int) -> Images:
    """Decode `{bytes, path}` records into `(n_rows, *shape)`."""
    images = np.empty((len(encoded), *rule.shape), dtype=np.uint8)
    for i, record in enumerate(encoded):
        place = f"{path}: row {first_row + i}"
        if record is None or record["bytes"] is None:
            raise DataError(f"{place}: expected the bytes of an image, found none")
        try:
            images[i] = decode_image(record["bytes"], rule)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    return images


SOURCES: dict[str, Source] = {
    "digits": Source(
        description="1,797 scans of handwritten digits, 8x8, one channel, shipped with scikit-learn",
        image_shape=(8, 8, 1),
        read=read_digits,
        partitions=("class", "vendors"),
    ),
    "cifar": Source(
        description="CIFAR-10 (Krizhevsky 2009): photographs of ten classes, 32x32, RGB",
        image_shape=(32, 32, 3),
        read=read_parquet,
    ),
}
"""The datasets that can be named. One more is a description here, not a copy of the code above."""
