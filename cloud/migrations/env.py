"""Run by Alembic: migrates over the connection that `cloud.migrate` hands it."""

from __future__ import annotations

from alembic import context

from cloud.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,  # SQLite's too, since `cloud.migrate` begins
)
with context.begin_transaction():
    context.run_migrations()
