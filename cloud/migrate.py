"""Brings a database's tables up to date by Alembic; `python -m cloud migrate` does it apart from a start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import make_url

from cloud.errors import StoreError

FOLDER = Path(__file__).with_name("migrations")
FIRST = "0001"
WAIT_S = 3600.0
"""Workers that start together take turns, and a large store takes its time."""
_LOCK = 0x53575244  # "SWRD": PostgreSQL's advisory lock


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database at the (asynchronous) `url` to `revision`, in one transaction: wholly or not at all.

    A database of the form before migrations, which has tables and no mark, is taken for revision 0001.

    Raises
    ------
    StoreError
        A newer release has been here.
    """
    with transaction(url) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        _upgrade(connection, revision)


def current_revision(connection: Connection) -> str | None:
    """Revision of the database's tables; None of an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def transaction(url: str) -> Iterator[Connection]:
    """One transaction of a connection to the database at `url`; on SQLite too, where Python commits at each table."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        engine = create_engine(parsed)
    else:
        options = {"timeout": WAIT_S, "isolation_level": None}
        engine = create_engine(parsed.set(drivername="sqlite"), connect_args=options)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _upgrade(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["connection"] = connection
    found = current_revision(connection)
    known = {one.revision for one in ScriptDirectory.from_config(config).walk_revisions()}
    if found is None and inspect(connection).has_table("results"):
        command.stamp(config, FIRST)
    elif found is not None and found not in known:
        raise StoreError(
            f"the database is of revision {found}, which a newer release made, and this one does not know it. Run "
            "the newer release, or bring back the copy of the database from before it."
        )
    command.upgrade(config, revision)
