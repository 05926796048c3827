"""SQLite keeps the results in the order of their arrival, with the primary key in an index beside them.

A table that is its primary key's tree scatters each batch over as many places as it has devices, and splits whole rows
there: a commit wrote twice the pages.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    _rebuild(with_rowid=True)


def downgrade() -> None:
    _rebuild(with_rowid=False)


def _rebuild(*, with_rowid: bool) -> None:
    """Only SQLite knows the difference, and decides on it when a table is made."""
    if op.get_bind().dialect.name == "sqlite":
        options = {"sqlite_with_rowid": with_rowid}
        with op.batch_alter_table("results", recreate="always", table_kwargs=options):
            pass
