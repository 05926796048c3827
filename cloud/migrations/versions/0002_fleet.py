"""Checksums and labels of results, the audit trail, tokens, certificates, bundles and roll-outs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
_OLD = (
    "device, boot, sequence, site, model, class_index, class_name, scores, streams, captured_at_ns, "
    "received_at_ns, stored_at_ns"
)


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_results()
    else:
        op.add_column("results", sa.Column("checksum", sa.BigInteger, nullable=False, server_default="0"))
    _create_people()
    _create_fleet()


def downgrade() -> None:
    raise NotImplementedError("the audit trail is not thrown away: restore a copy of the database instead.")


def _rebuild_results() -> None:
    """SQLite decides whether a table has row numbers when it is made."""
    op.drop_index("results_in_order", "results")
    op.rename_table("results", "results_0001")
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
        sa.Column("checksum", sa.BigInteger, nullable=False, server_default="0"),
        sqlite_with_rowid=False,
    )
    op.create_index("results_in_order", "results", ["stored_at_ns", "device", "boot", "sequence"])
    op.execute(f"INSERT INTO results ({_OLD}) SELECT {_OLD} FROM results_0001")  # noqa: S608  # a constant
    op.drop_table("results_0001")


def _create_people() -> None:
    op.create_table(
        "labels",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("boot", sa.String(32), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("class_index", sa.Integer, nullable=False),
        sa.Column("at_ns", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at_ns", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("created_at_ns", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ns", sa.BigInteger),
        sa.Column("revoked_at_ns", sa.BigInteger),
    )
    op.create_table(
        "enrolment_tokens",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("site", sa.String(64), nullable=False),
        sa.Column("device", sa.String(64)),
        sa.Column("created_at_ns", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ns", sa.BigInteger, nullable=False),
        sa.Column("used_at_ns", sa.BigInteger),
        sa.Column("used_by", sa.String(64)),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(40), primary_key=True),
        sa.Column("site", sa.String(64), nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("issued_at_ns", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ns", sa.BigInteger, nullable=False),
        sa.Column("revoked_at_ns", sa.BigInteger),
        sa.Column("reason", sa.Text),
    )
    op.create_index("ix_certificates_device", "certificates", ["device"])
    op.create_table(
        "enrolled",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("site", sa.String(64), nullable=False),
        sa.Column("at_ns", sa.BigInteger, nullable=False),
    )


def _create_fleet() -> None:
    op.create_table(
        "bundles",
        sa.Column("model", sa.String(32), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("added_at_ns", sa.BigInteger, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
    )
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("model", sa.String(32), nullable=False),
        sa.Column("site", sa.String(64)),
        sa.Column("canary_share", sa.Float, nullable=False),
        sa.Column("max_failure_rate", sa.Float, nullable=False),
        sa.Column("min_outcomes", sa.Integer, nullable=False),
        sa.Column("patience_s", sa.Float, nullable=False),
        sa.Column("allow_older", sa.Boolean, nullable=False),
        sa.Column("roll_back", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created_at_ns", sa.BigInteger, nullable=False),
        sa.Column("changed_at_ns", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("site", sa.String(64), nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("serial", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("model", sa.String(32), nullable=False),
        sa.Column("previous", sa.String(32), nullable=False),
        sa.Column("rollout", sa.String(32)),
        sa.Column("canary", sa.Boolean, nullable=False),
        sa.Column("arguments", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("sent_at_ns", sa.BigInteger, nullable=False),
        sa.Column("answered_at_ns", sa.BigInteger),
        sa.UniqueConstraint("device", "serial", name="order_of_device"),
    )
    op.create_index("ix_orders_rollout", "orders", ["rollout"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("holder", sa.String(128), nullable=False),
        sa.Column("until_ns", sa.BigInteger, nullable=False),
    )
