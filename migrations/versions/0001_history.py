"""Events and the audit of operations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out rather than taken from controlplane.history.tables: a migration must not change when they do.
ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("cluster", sa.String(200), nullable=False),
        sa.Column("unix_s", sa.Double, nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("recorded_by", sa.String(200), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("events_by_cluster", "events", ["cluster", "id"])
    op.create_table(
        "operations_audit",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("cluster", sa.String(200), nullable=False),
        sa.Column("unix_s", sa.Double, nullable=False),
        sa.Column("operation_id", sa.String(200), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("node", sa.String(200), nullable=False),
        sa.Column("substitute", sa.String(200), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("recorded_by", sa.String(200), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("operations_audit_by_operation", "operations_audit", ["cluster", "operation_id"])


def downgrade() -> None:
    op.drop_table("operations_audit")
    op.drop_table("events")
