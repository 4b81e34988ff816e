"""The tables of the server's database as they are now; ``migrations/`` brings older ones here."""

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData()

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("base", String, nullable=False),
    Column("name", String, nullable=False),
    Column("origin", String, nullable=False),
    Column("source", String, nullable=False),
    Column("expected", String),
    Column("owner", String),
    Column("pinned", Boolean, nullable=False),
    Column("default_digest", String),
    Column("created", Integer, nullable=False),
    Column("last_used", Float),
    Column("hits", Integer, nullable=False),
    UniqueConstraint("base", "name"),
)
"""Names of adapters.

base: The served name of the base that it is for.
origin: What keeps it registered: empty for the API, ``--adapter``, or the watched folder.
source: Where it was last asked for.
expected: The digest that was required of it, while it has no version.
owner: The tenant that may use it, null for everybody.
default_digest: The version that the bare name means, null while there is none.
"""

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
    Column("digest", String, nullable=False),
    Column("source", String, nullable=False),
    Column("fingerprint", String, nullable=False),
    Column("path", String),
    Column("file_bytes", Integer, nullable=False),
    Column("info", LargeBinary, nullable=False),
    Column("registered", Float, nullable=False),
    UniqueConstraint("adapter_id", "digest"),
)
"""Contents that a name stands or stood for.

fingerprint: Sizes and times of a local source's files when they were read, else empty.
path: The folder it is served from, null for the store's own copy.
info: What the engine found in it, ``AdapterInfo`` in JSON.
registered: Unix time it was last registered: the order of versions.
"""

tenants = Table(
    "tenants",
    metadata,
    Column("name", String, primary_key=True),
    Column("role", String, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("settings", LargeBinary, nullable=False),
    Column("created", Integer, nullable=False),
)
"""Tenants and administrators that the tenants file does not have.

role: ``user`` for a tenant, ``admin`` for an administrator of the server.
disabled: Whether all of its keys are refused.
settings: What it may use and how much, in JSON, in the form that the tenants file has.
created: Unix time.
"""

tenant_keys = Table(
    "tenant_keys",
    metadata,
    Column("hash", String, primary_key=True),
    Column("tenant", String, ForeignKey("tenants.name", ondelete="CASCADE"), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
)
"""Their keys, of which the SHA-256 alone is kept.

created: Unix time.
expires: Unix time from which it is refused, null for never.
"""

usage = Table(
    "usage",
    metadata,
    Column("day", String, primary_key=True),
    Column("base", String, primary_key=True),
    Column("tenant", String, primary_key=True),
    Column("key_id", String, primary_key=True),
    Column("adapter", String, primary_key=True),
    Column("digest", String, primary_key=True),
    Column("requests", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("undelivered_requests", Integer, nullable=False),
    Column("undelivered_prompt_tokens", Integer, nullable=False),
    Column("undelivered_completion_tokens", Integer, nullable=False),
)
"""Sums of usage, as ``usage/counts.py`` explains them; ``day`` as 2026-01-31, in UTC."""

usage_journal = Table(
    "usage_journal",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("last_record", Integer, nullable=False),
)
"""One row: the last record of the journal that is part of the sums."""
