"""Results have a number that the database gives in the order of commits: readers page by it.

The time that a worker stamps is before its commit and by its own clock, so it is no order to go on in. What is there
is numbered in the order in which it was read until now.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
_OLD = (
    "device, boot, sequence, site, model, class_index, class_name, scores, streams, captured_at_ns, "
    "received_at_ns, stored_at_ns, checksum"
)


def upgrade() -> None:
    on_postgres = op.get_bind().dialect.name == "postgresql"
    if on_postgres:
        op.drop_constraint("results_pkey", "results", type_="primary")  # the new table's has this name
    op.rename_table("results", "results_0004")
    _create_results()
    # The order of the old index, which SQLite therefore reads by: it need not sort whole rows in temporary files.
    op.execute(
        f"INSERT INTO results ({_OLD}) SELECT {_OLD} FROM results_0004 "  # noqa: S608  # a constant
        "ORDER BY stored_at_ns, device, boot, sequence"
    )
    op.drop_table("results_0004")
    op.create_index("results_by_time", "results", ["stored_at_ns"])
    if on_postgres:
        op.execute("ANALYZE results")  # until then it would look for a time by reading everything
        _number_in_turn()


def downgrade() -> None:
    raise NotImplementedError("readers stand at numbers: restore a copy of the database instead.")


def _create_results() -> None:
    """AUTOINCREMENT, or SQLite gives the number of a deleted newest row once more; a sequence never does."""
    op.create_table(
        "results",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("boot", sa.String(32), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
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
        sa.UniqueConstraint("device", "boot", "sequence", name="result_of_frame"),
        sqlite_autoincrement=True,
    )


def _number_in_turn() -> None:
    """PostgreSQL alone lets two insert at once, and the one with the higher numbers commit first.

    The trigger takes a lock before the first number is drawn; the transaction's end, commit included, gives it back.
    """
    op.execute(
        "CREATE FUNCTION number_results_in_turn() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_advisory_xact_lock(1398231620, 1); RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER number_results_in_turn BEFORE INSERT ON results "
        "FOR EACH STATEMENT EXECUTE FUNCTION number_results_in_turn()"
    )
