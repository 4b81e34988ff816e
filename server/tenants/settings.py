"""What a tenant is to be, as people and programs write it: in the tenants file, over HTTP, on disk.

One form for all three, so that what one of them takes the others do.
"""

from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from .errors import TenantsRefused
from .routing import DEFAULT
from .tenant import Alias, Role, Tenant, TenantLimits

_INT64_MAX = 2**63 - 1
_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"

TenantName = Annotated[str, Field(pattern=_NAME)]
AdapterPattern = Annotated[str, Field(min_length=1, max_length=256)]
Target = Annotated[str, Field(min_length=1, max_length=256)]
Weight = Annotated[float, Field(gt=0, le=1_000_000)]

Targets = Annotated[
    dict[Target, Weight],
    Field(min_length=1),
    BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
]
"""Adapters with weights; one may be written plainly."""


class Form(BaseModel):
    """What every form shares: a key that nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_Limit = Annotated[int, Field(ge=1, le=_INT64_MAX)] | None


class LimitsForm(Form):
    """The fields of ``TenantLimits``, each at least 1."""

    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    concurrency: _Limit = None
    queue: _Limit = None
    max_tokens: _Limit = None
    adapters: _Limit = None
    adapter_bytes: _Limit = None


class TenantSettings(Form):
    """What a tenant may use and how much; the fields are those of ``Tenant``.

    ``aliases`` maps each name to an adapter, or to several with weights.
    """

    adapters: list[AdapterPattern] = Field(default_factory=list)
    default: Target | None = None
    aliases: dict[TenantName, Targets] = Field(default_factory=dict)
    weight: Weight = 1.0
    limits: LimitsForm = Field(default_factory=LimitsForm)
    shares_cache: bool = False

    @field_validator("aliases")
    @classmethod
    def _not_the_default(cls, aliases: dict[str, Any]) -> dict[str, Any]:
        if DEFAULT in aliases:
            raise ValueError(f"{DEFAULT!r} is no alias: set 'default' to an adapter or an alias")
        return aliases

    def tenant(self, name: str, disabled: bool = False) -> Tenant:
        """The tenant of that name."""
        return Tenant(
            name=name,
            adapters=tuple(self.adapters),
            default=self.default,
            aliases={name: Alias(tuple(targets.items())) for name, targets in self.aliases.items()},
            weight=self.weight,
            limits=TenantLimits(**self.limits.model_dump()),
            shares_cache=self.shares_cache,
            disabled=disabled,
        )

    @classmethod
    def of(cls, tenant: Tenant) -> Self:
        """The form that makes this tenant."""
        return cls(
            adapters=list(tenant.adapters),
            default=tenant.default,
            aliases={name: dict(alias.targets) for name, alias in tenant.aliases.items()},
            weight=tenant.weight,
            limits=LimitsForm(**asdict(tenant.limits)),
            shares_cache=tenant.shares_cache,
        )


class NewTenant(TenantSettings):
    """A tenant or an administrator that is to be made.

    Attributes:
        name: Unique.
        role: ``user`` for a tenant; ``admin`` for an administrator, which has no settings.
    """

    name: TenantName
    role: Annotated[Role, Field(strict=False)] = Role.USER


class TenantChange(TenantSettings):
    """What is to change: what is left out stays; of ``limits`` each for itself.

    Attributes:
        disabled: Whether all keys are refused.
    """

    disabled: bool = False

    def applied(self, tenant: Tenant) -> Tenant:
        """The tenant as it is to be."""
        news = self.model_dump(exclude_unset=True)
        disabled: bool = news.pop("disabled", tenant.disabled)
        known = TenantSettings.of(tenant).model_dump()
        limits = {**known["limits"], **news.pop("limits", {})}
        settings = TenantSettings.model_validate({**known, **news, "limits": limits})
        return settings.tenant(tenant.name, disabled)


def refusal(where: str, error: ValidationError) -> TenantsRefused:
    """The first thing that is wrong, and its place as ``tenants[0].limits.concurrency``."""
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    says = "unknown key" if first["type"] == "extra_forbidden" else str(first["msg"])
    return TenantsRefused(f"{where}: {place.lstrip('.') or 'top level'}: {says}")
