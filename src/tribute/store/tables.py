"""The tables of the store, and the version of their schema.

Times are seconds since the epoch (UTC), so that hosts compare them without knowing each other's time zone.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import Connection

SCHEMA_VERSION = 2

_SCHEMA_LOCK = 0x7472_6962  # any constant: PostgreSQL serialises the making and the migration of the tables on it

metadata = MetaData()

schema = Table("tribute_schema", metadata, Column("version", Integer, nullable=False))

study = Table(
    "study",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("dataset", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),  # of the contributors and their examples
    Column("config", JSON(none_as_null=True)),
    Column("created", Double, nullable=False),
    UniqueConstraint("name", "dataset"),
)

contributor = Table(
    "contributor",
    metadata,
    Column("study_id", ForeignKey("study.id"), primary_key=True),
    Column("contributor_idx", Integer, primary_key=True, autoincrement=False),
    Column("contributor_name", Text, nullable=False),
    Column("n_examples", Integer, nullable=False),
)

evaluation = Table(
    "evaluation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("identity", String(64), nullable=False),  # SHA-256 of all that determines the result
    Column("exp_name", Text, nullable=False),
    Column("dataset", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("removal_dist", Text),
    Column("datamodel_alpha", Double),
    Column("removal_seed", Integer),
    Column("role", Text),
    Column("coalition", Text, nullable=False),  # "n:hex", see records
    Column("opt_seed", Integer, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("status", String(8), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("error", Text),
    Column("owner", JSON(none_as_null=True)),  # the process that claimed it: host, boot, namespace, pid, start
    Column("owner_token", String(32)),
    Column("lease_expires", Double),
    Column("heartbeat", Double),  # last sign of life of the claim; since schema 2
    Column("created", Double, nullable=False),
    Column("started", Double),
    Column("finished", Double),
    Column("seconds", JSON(none_as_null=True)),
    Column("provenance", JSON(none_as_null=True)),
    UniqueConstraint("study_id", "identity"),
    CheckConstraint("status IN ('pending', 'running', 'finished', 'failed')"),
    Index("evaluation_by_status", "status", "priority", "id"),
    Index("evaluation_to_claim", "study_id", "status", "priority", "id"),  # since schema 2
)

behavior = Table(
    "behavior",
    metadata,
    Column("evaluation_id", ForeignKey("evaluation.id"), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("value", Double, nullable=False),  # raw, never negated
    Column("definition", JSON(none_as_null=True)),  # unit, direction, variant
)

artifact = Table(
    "artifact",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_id", ForeignKey("study.id"), nullable=False),
    Column("kind", String(100), nullable=False),
    Column("path", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("meta", JSON(none_as_null=True)),
    UniqueConstraint("study_id", "kind", "path"),
)


def stored_version(connection: Connection) -> int | None:
    """Schema version of the store; None where there is none."""
    if not inspect(connection).has_table(schema.name):
        return None
    return connection.execute(select(func.max(schema.c.version))).scalar_one_or_none()


def lock_schema(connection: Connection) -> None:
    """Wait until no other process makes or migrates the tables; SQLite's writers are alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
