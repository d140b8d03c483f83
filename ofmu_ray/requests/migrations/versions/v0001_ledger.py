"""The ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ofmu_ray.requests.schema import Moment

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ofmu_requests",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("content_hash", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("deadline", Moment, nullable=False),
        sa.Column("row_count", sa.Integer, nullable=False),
        sa.Column("rows_digest", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("accepted", Moment),
        sa.Column("ended", Moment),
        sa.Column("batch", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_ofmu_requests"),
        sa.UniqueConstraint("key", name="uq_ofmu_requests_key"),
    )
    op.create_index("ix_ofmu_requests_state", "ofmu_requests", ["state"])
    op.create_table(
        "ofmu_rows",
        sa.Column("request_id", sa.Text, sa.ForeignKey("ofmu_requests.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("request_id", "number", name="pk_ofmu_rows"),
    )
    op.create_table(
        "ofmu_payloads",
        sa.Column("request_id", sa.Text, sa.ForeignKey("ofmu_requests.id"), nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary),
        sa.Column("ciphertext", sa.LargeBinary),
        sa.Column("destroyed", Moment),
        sa.PrimaryKeyConstraint("request_id", name="pk_ofmu_payloads"),
    )
    op.create_table(
        "ofmu_events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False, autoincrement=False),
        sa.Column("request_id", sa.Text),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_ofmu_events"),
        sa.UniqueConstraint("hash", name="uq_ofmu_events_hash"),
    )
    op.create_index("ix_ofmu_events_request_id", "ofmu_events", ["request_id"])
    op.create_table(
        "ofmu_lease",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("taken", Moment, nullable=False),
        sa.Column("expires", Moment, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_ofmu_lease"),
    )
    op.create_table(
        "ofmu_secrets",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("wrapped", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_ofmu_secrets"),
    )
    op.create_table(
        "ofmu_certificates",
        sa.Column("request_id", sa.Text, sa.ForeignKey("ofmu_requests.id"), nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_ofmu_certificates"),
    )
    op.create_table(
        "ofmu_tokens",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("expires", Moment, nullable=False),
        sa.Column("revoked", Moment),
        sa.PrimaryKeyConstraint("id", name="pk_ofmu_tokens"),
        sa.UniqueConstraint("hash", name="uq_ofmu_tokens_hash"),
    )


def downgrade() -> None:
    for name in ("tokens", "certificates", "secrets", "lease", "events", "payloads", "rows", "requests"):
        op.drop_table(f"ofmu_{name}")
