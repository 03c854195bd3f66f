"""The last batch that each writer has stored, so that one whose commit was not confirmed is not stored twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("cluster", sa.String(200), primary_key=True),
        sa.Column("writer", sa.String(200), primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("unix_s", sa.Double, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("batches")
