"""The tables of adapters and their versions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("origin", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("expected", sa.String),
        sa.Column("owner", sa.String),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("default_digest", sa.String),
        sa.Column("created", sa.Integer, nullable=False),
        sa.Column("last_used", sa.Float),
        sa.Column("hits", sa.Integer, nullable=False),
        sa.UniqueConstraint("base", "name"),
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "adapter_id",
            sa.Integer,
            sa.ForeignKey("adapters.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("path", sa.String),
        sa.Column("file_bytes", sa.Integer, nullable=False),
        sa.Column("info", sa.LargeBinary, nullable=False),
        sa.Column("registered", sa.Float, nullable=False),
        sa.UniqueConstraint("adapter_id", "digest"),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("versions")
    op.drop_table("adapters")
