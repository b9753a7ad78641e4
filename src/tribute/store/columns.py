"""Tables of named columns as Parquet, for whoever above has a table to write or to read.

What is in a column and what it means is the business of the one who writes it; which library writes it is that of this
file alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tribute.errors import StoreError

Kind = Literal["text", "integer", "number"]
"""UTF-8 text, 64-bit integers, 64-bit floats."""


def parquet_bytes(columns: Mapping[str, tuple[Kind, Sequence[Any]]], *, schema: str) -> bytes:
    """A table as the content of a Parquet file, compressed by zstd.

    Args:
        columns: By name, the kind and the values; None is null, in any kind.
        schema: Name and version of the table's layout, kept in the file's metadata under `schema`.

    Raises:
        StoreError: Columns differ in length, or a value is not of its column's kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}
    lengths = {name: len(values) for name, (_, values) in columns.items()}
    if len(set(lengths.values())) > 1:
        raise StoreError(f"columns of one table: expected as many values in each, found {lengths}")
    try:
        arrays = []
        for kind, values in columns.values():
            if kind == "integer" and any(isinstance(value, float) for value in values):
                raise ValueError("a float among integers")  # which would be cut to one without a word
            arrays.append(pa.array(values, type=types[kind], from_pandas=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        kinds = ", ".join(f"{name} {kind}" for name, (kind, _) in columns.items())
        raise StoreError(f"columns of a table: expected {kinds}; found other values ({error})") from error
    table = pa.table(dict(zip(columns, arrays, strict=True)), metadata={"schema": schema})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_columns(path: Path) -> dict[str, list[Any]]:
    """The values of a Parquet file by column; null is None.

    Raises:
        StoreError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(pa.BufferReader(path.read_bytes())).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} cannot be read as a table ({error})") from error
