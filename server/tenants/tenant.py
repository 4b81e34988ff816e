"""Who asks: tenants, what they may use and how much, as every later stage sees them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a key may do beyond generating."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """How much a tenant may ask for; None is no limit.

    Attributes:
        requests_per_minute: Requests begun in a minute.
        tokens_per_minute: Prompt and completion tokens in a minute.
        concurrency: Requests that run or wait at one time.
        queue: Requests that wait at one time.
        max_tokens: Completion tokens of one request.
        adapters: Adapters of its own.
        adapter_bytes: Bytes these take in the store.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    queue: int | None = None
    max_tokens: int | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Alias:
    """What a tenant's alias means: one adapter, or several of which each takes a part.

    Attributes:
        targets: Adapters, or versions of them as ``name@digest``, with weights > 0.
    """

    targets: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer.

    Attributes:
        name: Unique.
        adapters: Names and globs of the adapters it may see and use, beside its own.
        default: What the base's name or ``default`` means for it; None for the base.
        aliases: Names of its own for adapters.
        weight: Its share under token-fair scheduling, > 0.
        limits: How much it may ask for.
        shares_cache: Whether it shares cached prefixes with all others that do.
        disabled: Whether all of its keys are refused.
    """

    name: str
    adapters: tuple[str, ...] = ()
    default: str | None = None
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    weight: float = 1.0
    limits: TenantLimits = TenantLimits()
    shares_cache: bool = False
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        tenant: On whose behalf; None for the operator: an admin key, or a server without tenants.
        role: What the key may do.
        key_id: Of the key, never the key itself; empty for a server without tenants.
    """

    tenant: Tenant | None
    role: Role
    key_id: str = ""

    @property
    def is_admin(self) -> bool:
        """Whether it may manage the server."""
        return self.role is Role.ADMIN


OPERATOR = Caller(None, Role.ADMIN)
"""Whoever asks a server that has no tenants."""
