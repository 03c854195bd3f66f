"""The SQL tables of the history. `migrations/` creates them; a test shows that both agree."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()
REVISION = "0004"  # the migration that leads here

# SQLite only numbers a column by itself when it is exactly INTEGER PRIMARY KEY.
RowId = BigInteger().with_variant(Integer, "sqlite")

events = Table(
    "events",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("cluster", String(200), nullable=False),
    Column("unix_s", Double, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("message", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("details", Text, nullable=False),  # a JSON object of numbers and strings
    Column("recorded_by", String(200), nullable=False),  # the controller
    Index("events_by_cluster", "cluster", "id"),
    sqlite_autoincrement=True,  # an id is never used twice, also after pruning
)

# Append-only: triggers refuse to change or delete a row.
operations = Table(
    "operations_audit",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("cluster", String(200), nullable=False),
    Column("unix_s", Double, nullable=False),
    Column("operation_id", String(200), nullable=False),
    Column("action", String(40), nullable=False),  # submitted, refused, cancelled, done, failed
    Column("kind", String(40), nullable=False),
    Column("node", String(200), nullable=False),
    Column("substitute", String(200), nullable=False),
    Column("message", Text, nullable=False),
    Column("recorded_by", String(200), nullable=False),
    Column("who", String(200), nullable=False, server_default=""),
    Column("role", String(40), nullable=False, server_default=""),
    Column("address", String(200), nullable=False, server_default=""),  # where the request came from
    Column("reason", Text, nullable=False, server_default=""),  # in the operator's words
    Column("epoch", BigInteger, nullable=False, server_default="0"),  # counter of the topology at that time
    Index("operations_audit_by_operation", "cluster", "operation_id"),
    sqlite_autoincrement=True,
)

# For charts: a row every few seconds, a day of them.
figures = Table(
    "figures",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("cluster", String(200), nullable=False),
    Column("unix_s", Double, nullable=False),
    Column("body", Text, nullable=False),  # contract/figures.py's Figures in JSON
    Index("figures_by_time", "cluster", "unix_s"),
    sqlite_autoincrement=True,
)

# The last batch that each writer has stored: a commit whose answer was lost is not done again. One row a process.
batches = Table(
    "batches",
    metadata,
    Column("cluster", String(200), primary_key=True),
    Column("writer", String(200), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("unix_s", Double, nullable=False),
)
