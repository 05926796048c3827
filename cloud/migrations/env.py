"""Run by Alembic: migrates over the connection that `cloud.migrate` hands it."""

from __future__ import annotations

from alembic import context

from cloud.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
