"""The tables of tenants and their keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "tenants",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("settings", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.Integer, nullable=False),
    )
    op.create_table(
        "tenant_keys",
        sa.Column("hash", sa.String, primary_key=True),
        sa.Column(
            "tenant", sa.String, sa.ForeignKey("tenants.name", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("tenant_keys")
    op.drop_table("tenants")
