"""Runs migrations on the connection, and in the transaction, that `database.upgrade` gives."""

from __future__ import annotations

from alembic import context

from ofmu_ray.requests.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table="ofmu_ledger_version",
    render_as_batch=True,
    compare_type=False,
)
context.run_migrations()
