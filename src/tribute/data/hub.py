"""A dataset of the Hugging Face hub, through `datasets`, which keeps what it downloads in its own cache."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tribute.data.image_workers import Encoded
from tribute.data.listing import Listing, Request, Rows, find_column, python_values
from tribute.data.parquet import check_image_type
from tribute.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

READ_BATCH = 64


def list_hub(hub_id: str, request: Request, *, dataset: str) -> Listing:
    """List the rows of one split of `OWNER/NAME`.

    Args:
        hub_id: The dataset on the hub.
        request: Which split and columns.
        dataset: What `--dataset` would read a local copy, for messages.

    Raises:
        DataError: It cannot be fetched (the message says how to go on without network), has no such split, or no
            column of images.
    """
    import datasets as hf

    rows = _load(hub_id, request.split, dataset)
    table, names = rows.data, tuple(rows.column_names)
    where = f"hub:{hub_id}, split {request.split}"
    image_column = find_column(where, "image", request.image_columns, names, remedy="name another with --image_column")
    check_image_type(where, image_column, table.column(image_column).type)

    def place(row: int) -> str:
        return f"{where}: row {row}"

    def read_images(wanted: Rows) -> Iterator[Encoded]:
        column = table.column(image_column)
        for start in range(0, len(wanted), READ_BATCH):
            batch = wanted[start : start + READ_BATCH]
            for value in python_values(column.take(batch), where):
                content = value.get("bytes") if isinstance(value, dict) else value
                if isinstance(content, bytes):
                    yield content
                else:
                    yield DataError(f"expected the bytes of an image, found none; {_locally(hub_id, dataset)}")

    known = request.known_hashes("hub")
    hashes = [known.hash_of(Path(file["filename"])) for file in rows.cache_files]
    known.save()
    if not hashes:  # a dataset that lives in memory only
        hashes = [_content_sha256(table.select([image_column]))]
    return Listing(
        n_examples=len(rows),
        column_names=tuple(name for name in names if name != image_column),
        column=table.column,
        class_names={
            name: tuple(feature.names)
            for name, feature in rows.features.items()
            if isinstance(feature, hf.ClassLabel) and feature.names
        },
        read_images=read_images,
        place=place,
        content={"files": hashes, "image_column": image_column},
        origin={"hub": hub_id, "split": request.split},
    )


class _HashingSink(io.RawIOBase):
    """A file that keeps nothing but the hash of what is written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return len(content)


def _content_sha256(table: pa.Table) -> str:
    """SHA-256 over all values of a table, as Arrow's stream format writes them."""
    import pyarrow as pa

    sink = _HashingSink()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch)
    return sink.digest.hexdigest()


def _load(hub_id: str, split: str, dataset: str) -> datasets.Dataset:
    """The rows, from the network or from what was downloaded before."""
    import datasets as hf

    if hub_id.count("/") != 1 or hub_id.startswith(("/", ".")) or hub_id.endswith("/"):
        raise DataError(f"hub:{hub_id}: expected hub:OWNER/NAME; {_locally('OWNER/NAME', dataset)}")
    try:
        return hf.load_dataset(hub_id, split=split)  # type: ignore[return-value]
    except ValueError as error:
        if "split" in str(error).lower():
            raise DataError(f"hub:{hub_id}: --split {split!r} is not one of its parts ({error})") from error
        raise DataError(f"hub:{hub_id}: cannot be read ({error}); {_locally(hub_id, dataset)}") from error
    except (OSError, RuntimeError) as error:  # no network, offline mode, no such dataset, a script to be run
        raise DataError(
            f"hub:{hub_id}: cannot be fetched ({_first_line(error)}); {_locally(hub_id, dataset)}"
        ) from error


def _locally(hub_id: str, dataset: str) -> str:
    return (
        f"without network, fetch it elsewhere (hf download {hub_id} --repo-type dataset --local-dir DIR) and give "
        f"--dataset {dataset} --data_dir DIR"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
