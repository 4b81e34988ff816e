"""The tables of usage."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "usage",
        sa.Column("day", sa.String, primary_key=True),
        sa.Column("base", sa.String, primary_key=True),
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("key_id", sa.String, primary_key=True),
        sa.Column("adapter", sa.String, primary_key=True),
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("requests", sa.Integer, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("cached_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("undelivered_requests", sa.Integer, nullable=False),
        sa.Column("undelivered_prompt_tokens", sa.Integer, nullable=False),
        sa.Column("undelivered_completion_tokens", sa.Integer, nullable=False),
    )
    op.create_table(
        "usage_journal",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("last_record", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("usage_journal")
    op.drop_table("usage")
