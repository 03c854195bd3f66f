"""The audit tells who, from where, why, and in which epoch; its rows can neither be changed nor deleted."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLE = "operations_audit"
REFUSAL = "the audit is append-only"


def columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("who", sa.String(200), nullable=False, server_default=""),
        sa.Column("role", sa.String(40), nullable=False, server_default=""),
        sa.Column("address", sa.String(200), nullable=False, server_default=""),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
    ]


def upgrade() -> None:
    for column in columns():
        op.add_column(TABLE, column)
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE FUNCTION {TABLE}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}'; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {TABLE}_append_only BEFORE UPDATE OR DELETE ON {TABLE} "
            f"FOR EACH ROW EXECUTE FUNCTION {TABLE}_refuse()"
        )
        return
    for change in ("update", "delete"):
        op.execute(
            f"CREATE TRIGGER {TABLE}_no_{change} BEFORE {change.upper()} ON {TABLE} "
            f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"DROP TRIGGER {TABLE}_append_only ON {TABLE}")
        op.execute(f"DROP FUNCTION {TABLE}_refuse()")
    else:
        for change in ("update", "delete"):
            op.execute(f"DROP TRIGGER {TABLE}_no_{change}")
    for column in columns():
        op.drop_column(TABLE, column.name)
