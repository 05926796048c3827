"""Results, devices and dead letters: the first form, which knew no migrations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "results",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("boot", sa.String(32), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("site", sa.String(64), nullable=False),
        sa.Column("model", sa.String(32), nullable=False),
        sa.Column("class_index", sa.Integer, nullable=False),
        sa.Column("class_name", sa.Text, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("streams", sa.JSON, nullable=False),
        sa.Column("captured_at_ns", sa.BigInteger, nullable=False),
        sa.Column("received_at_ns", sa.BigInteger, nullable=False),
        sa.Column("stored_at_ns", sa.BigInteger, nullable=False),
    )
    op.create_index("results_in_order", "results", ["stored_at_ns", "device", "boot", "sequence"])
    op.create_table(
        "devices",
        sa.Column("site", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("seen_at_ns", sa.BigInteger, nullable=False),
        sa.Column("status", sa.JSON(none_as_null=True)),
    )
    op.create_table(
        "dead_letters",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at_ns", sa.BigInteger, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("head", sa.Text, nullable=False),
    )


def downgrade() -> None:
    for name in ("results", "devices", "dead_letters"):
        op.drop_table(name)
