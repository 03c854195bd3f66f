"""Alembic's entry point. Only `controlplane.history.schema` runs it, and hands it an open connection."""

from __future__ import annotations

from alembic import context

from controlplane.history.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
    # The caller holds one transaction, and in it the lock, around the whole upgrade.
    transaction_per_migration=False,
)
context.run_migrations()
