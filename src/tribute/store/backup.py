"""A store as a folder of Parquet files, one per table: a backup that any data frame library can read.

Nothing is lost: contributors, settings, masks, behaviors bit by bit, seconds, provenance, definitions, statuses and the
records of files. Numbers of rows (`id`, `study_id`, `evaluation_id`) hold within the folder; a store that reads it
gives its own. What was running when the backup was made is pending in the store that reads it, for no process of that
store measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Double, Integer, Table, insert, select, update
from sqlalchemy.engine import Connection

from tribute.errors import MixedResultsError, StoreError
from tribute.files import write_whole_dir
from tribute.store.records import Store, Study, open_study_in
from tribute.store.tables import SCHEMA_VERSION, artifact, behavior, contributor, evaluation, study

if TYPE_CHECKING:
    import pyarrow

FORMAT_VERSION = 1
TABLES = (study, contributor, evaluation, behavior, artifact)
"""In the order in which rows refer to each other."""

_KEY = b"tribute"  # of the metadata of every file
_CLAIM = ("owner_token", "lease_expires")  # means nothing in another store

Row = dict[str, Any]


def export_parquet(store: Store, folder: str | Path, *, study_ids: Sequence[int] | None = None) -> int:
    """Write studies with all that belongs to them, at one moment, as a new folder.

    Args:
        store: Where from; other processes may go on writing to it.
        folder: It appears whole or not at all; an older backup is replaced.
        study_ids: Only these studies; None: all.

    Returns:
        Number of evaluations.

    Raises:
        StoreError: The folder holds something else, or cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    folder = Path(folder)
    if folder.exists() and not _is_backup(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            f"A backup is a folder that is new, empty or an older backup; {folder} is something else. "
            "Give another place."
        )

    def read(connection: Connection) -> dict[str, list[Row]]:
        chosen = select(study.c.id) if study_ids is None else select(study.c.id).where(study.c.id.in_(study_ids))
        theirs = select(evaluation.c.id).where(evaluation.c.study_id.in_(chosen))
        belongs = {
            study.name: study.c.id.in_(chosen),
            contributor.name: contributor.c.study_id.in_(chosen),
            evaluation.name: evaluation.c.study_id.in_(chosen),
            behavior.name: behavior.c.evaluation_id.in_(theirs),
            artifact.name: artifact.c.study_id.in_(chosen),
        }
        return {
            table.name: [
                dict(row._mapping)
                for row in connection.execute(
                    select(table).where(belongs[table.name]).order_by(*table.primary_key.columns)
                )
            ]
            for table in TABLES
        }

    rows = store.in_transaction(lambda connection, _number: read(connection), writes=False)
    about = {_KEY: json.dumps({"format": FORMAT_VERSION, "schema": SCHEMA_VERSION}).encode()}

    def write(partial: Path) -> None:
        for table in TABLES:
            schema = _arrow_schema(table).with_metadata(about)
            columns = {
                name: [_to_file(table, name, row[name]) for row in rows[table.name]]
                for name in schema.names
                if name != "coalition_mask"
            }
            if table is evaluation:
                columns["coalition_mask"] = [_mask(row["coalition"]) for row in rows[table.name]]
            content = pyarrow.table(columns, schema=schema)
            pyarrow.parquet.write_table(content, partial / f"{table.name}.parquet", compression="zstd")

    try:
        write_whole_dir(folder, write)
    except OSError as error:
        raise StoreError(
            f"A backup was to be written to {folder}; that failed: {error}. Nothing is left of it. Make space, or "
            "give another place."
        ) from error
    return len(rows[evaluation.name])


def import_parquet(store: Store, folder: str | Path) -> int:
    """Read a backup into a store, all or nothing; what the store has already is left as it is.

    An evaluation that is still to be measured in the store becomes finished where it is in the backup.

    Returns:
        Number of evaluations that are new or became finished.

    Raises:
        StoreError: The folder is no backup, is of a newer version, or is damaged.
        MixedResultsError: The store has a study with other contributors under the same name, or an evaluation with
            other values. Nothing was written.
    """
    folder = Path(folder)
    rows = _read_folder(folder)
    return store.in_transaction(lambda connection, _number: _restore(connection, rows, folder), writes=True)


def _is_backup(folder: Path) -> bool:
    return all((folder / f"{table.name}.parquet").is_file() for table in TABLES)


def _arrow_schema(table: Table) -> pyarrow.Schema:
    """Columns of the file: those of the table, with the coalition as a list of bool beside its text."""
    import pyarrow

    fields = []
    for column in table.columns:
        if column.name in _CLAIM:
            continue
        kind = pyarrow.string()
        if isinstance(column.type, Double):
            kind = pyarrow.float64()
        elif isinstance(column.type, Integer) or column.foreign_keys:
            kind = pyarrow.int64()
        fields.append(pyarrow.field(column.name, kind, nullable=bool(column.nullable)))
    if table is evaluation:
        fields.append(pyarrow.field("coalition_mask", pyarrow.list_(pyarrow.bool_()), nullable=False))
    return pyarrow.schema(fields)


def _to_file(table: Table, name: str, value: Any) -> Any:
    """JSON columns as text; it keeps the order of keys and every digit."""
    return json.dumps(value) if isinstance(table.c[name].type, JSON) and value is not None else value


def _mask(coalition: str) -> list[bool]:
    """`(n_contributors,)` of a coalition's text `n:hex`."""
    n_contributors, _, digits = coalition.partition(":")
    number = int.from_bytes(bytes.fromhex(digits), "little")
    return [bool(number >> idx & 1) for idx in range(int(n_contributors))]


def _read_folder(folder: Path) -> dict[str, list[Row]]:
    """The rows of every table, as they go into a database."""
    import pyarrow
    import pyarrow.parquet

    expected = f"A backup by `tribute export --format parquet` was expected; {folder}"
    if not _is_backup(folder):
        missing = next(t.name for t in TABLES if not (folder / f"{t.name}.parquet").is_file())
        raise StoreError(f"{expected} has no {missing}.parquet. Check the path.")
    rows = {}
    for table in TABLES:
        path = folder / f"{table.name}.parquet"
        try:
            content = pyarrow.parquet.ParquetFile(path).read()
            about = json.loads((content.schema.metadata or {}).get(_KEY, b"{}"))
            if about.get("format") is None:
                raise StoreError(f"{expected} has a {path.name} that Tribute did not write. Check the path.")
            if about["format"] > FORMAT_VERSION:
                raise StoreError(
                    f"This version of Tribute reads backups of format {FORMAT_VERSION}; {folder} has format "
                    f"{about['format']}, written by a newer version. Upgrade it (pip install --upgrade tribute)."
                )
            # A backup of an older schema lacks columns that came later; they may all be empty.
            names = [column.name for column in table.columns if column.name in content.column_names]
            rows[table.name] = [
                {name: _from_file(table, name, value) for name, value in row.items()}
                for row in content.select(names).to_pylist()
            ]
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise StoreError(
                f"{expected} has a {path.name} that cannot be read: {error}. Take another backup."
            ) from error
    return rows


def _from_file(table: Table, name: str, value: Any) -> Any:
    return json.loads(value) if isinstance(table.c[name].type, JSON) and value is not None else value


def _restore(connection: Connection, rows: Mapping[str, Sequence[Row]], folder: Path) -> int:
    """Write what is new of a backup."""
    n_new = 0
    behaviors: dict[int, list[Row]] = {}
    for row in rows[behavior.name]:
        behaviors.setdefault(row["evaluation_id"], []).append(row)
    for row in rows[study.name]:
        members = sorted(
            (c for c in rows[contributor.name] if c["study_id"] == row["id"]), key=lambda c: c["contributor_idx"]
        )
        same_name = select(study.c.id).where(study.c.name == row["name"], study.c.dataset == row["dataset"])
        is_new = connection.execute(same_name).one_or_none() is None
        study_id = open_study_in(
            connection,
            Study(
                row["name"],
                row["dataset"],
                tuple(c["contributor_name"] for c in members),
                tuple(c["n_examples"] for c in members),
                row["fingerprint"],
                row["config"],
            ),
        )
        if is_new:
            connection.execute(update(study).where(study.c.id == study_id).values(created=row["created"]))
        theirs = [e for e in rows[evaluation.name] if e["study_id"] == row["id"]]
        n_new += _restore_evaluations(connection, study_id, theirs, behaviors, folder)
        known = {(a.kind, a.path) for a in connection.execute(select(artifact).where(artifact.c.study_id == study_id))}
        new = [a for a in rows[artifact.name] if a["study_id"] == row["id"] and (a["kind"], a["path"]) not in known]
        if new:
            connection.execute(insert(artifact), [{**_without_id(a), "study_id": study_id} for a in new])
    return n_new


def _restore_evaluations(
    connection: Connection, study_id: int, theirs: Sequence[Row], behaviors: Mapping[int, Sequence[Row]], folder: Path
) -> int:
    """Write the evaluations of one study that are new, or finished in the backup only."""
    columns = (evaluation.c.identity, evaluation.c.id, evaluation.c.status)
    in_study = evaluation.c.study_id == study_id
    known = {row.identity: row for row in connection.execute(select(*columns).where(in_study).with_for_update())}
    new, finished = [], []
    for row in theirs:
        stored = known.get(row["identity"])
        if stored is None:
            new.append({**_without_id(row), **_unclaimed(row), "study_id": study_id})
        elif row["status"] == "finished" and stored.status == "finished":
            _check_same(connection, stored.id, behaviors.get(row["id"], ()), folder)
        elif row["status"] == "finished":
            finished.append((stored.id, row))
    if new:
        connection.execute(insert(evaluation), new)
    for number, row in finished:
        result = {name: row[name] for name in ("status", "error", "finished", "seconds", "provenance")}
        connection.execute(update(evaluation).where(evaluation.c.id == number).values(**result, **_unclaimed(row)))
    ids = {row.identity: row.id for row in connection.execute(select(*columns).where(in_study))}
    written = {row["identity"] for row in new} | {row["identity"] for _, row in finished}
    measured = [
        {**one, "evaluation_id": ids[row["identity"]]}
        for row in theirs
        if row["identity"] in written
        for one in behaviors.get(row["id"], ())
    ]
    if measured:
        connection.execute(insert(behavior), measured)
    return len(written)


def _unclaimed(row: Row) -> Row:
    """What a claim of the other store leaves behind: who measured, but no lease."""
    nobody = {"owner_token": None, "lease_expires": None}
    if row["status"] != "running":
        return nobody
    return {**nobody, "status": "pending", "owner": None, "heartbeat": None}


def _without_id(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "id"}


def _check_same(connection: Connection, number: int, given: Sequence[Row], folder: Path) -> None:
    """Refuse other values for an evaluation that is finished in the store, too."""
    query = select(behavior.c.name, behavior.c.value).where(behavior.c.evaluation_id == number)
    stored = {row.name: row.value for row in connection.execute(query)}
    values = {row["name"]: row["value"] for row in given}
    if stored != values:
        raise MixedResultsError(
            f"Evaluation {number} is finished with {stored}; {folder} has {values} for it. Nothing was imported: read "
            "the backup into another store."
        )
