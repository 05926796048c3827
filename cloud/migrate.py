"""Brings a database's tables up to date by Alembic; `python -m cloud migrate` does it apart from a start."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.engine import make_url

FOLDER = Path(__file__).with_name("migrations")
FIRST = "0001"
_LOCK = 0x53575244  # "SWRD": PostgreSQL's advisory lock, so that workers that start together take turns


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database at the (asynchronous) `url` to `revision`.

    A database of the form before migrations, which has tables and no mark, is taken for revision 0001.
    """
    parsed = make_url(url)
    if parsed.drivername == "sqlite+aiosqlite":
        parsed = parsed.set(drivername="sqlite")
    engine = create_engine(parsed)
    try:
        with engine.connect() as connection:
            if parsed.get_backend_name() == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_lock({_LOCK})"))
                connection.commit()
            _upgrade(connection, revision)
            connection.commit()
    finally:
        engine.dispose()


def current_revision(connection: Connection) -> str | None:
    """Revision of the database's tables; None of an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["connection"] = connection
    if current_revision(connection) is None and inspect(connection).has_table("results"):
        command.stamp(config, FIRST)
    command.upgrade(config, revision)
