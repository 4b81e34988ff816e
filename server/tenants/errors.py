"""Why a caller is refused, or a tenant cannot be made as asked; the messages say it all.

TenantError
├── KeyRefused        no key, or none that is good
├── TenantsRefused    a tenants file, or what a tenant is to be, is wrong
├── UnknownTenant     no tenant or key of that name
├── TenantConflict    the name is taken, or the change would leave nobody to manage the server
└── LimitExceeded     the tenant asks for more than its limits allow
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .limits import Allowance


class TenantError(Exception):
    """What is refused; the message says why and what to do."""


class KeyRefused(TenantError):
    """No key, or none that is good."""


class TenantsRefused(TenantError):
    """A tenants file, or what a tenant is to be, is wrong; the message names the place."""


class UnknownTenant(TenantError):
    """No tenant, or no key of it, has that name."""


class TenantConflict(TenantError):
    """It cannot be done as things stand."""


class LimitExceeded(TenantError):
    """The tenant asks for more than its limits allow now."""

    def __init__(
        self, message: str, retry_after: float | None, allowances: "Sequence[Allowance]" = ()
    ) -> None:
        """Hold the reason, when it may be otherwise, and what is left of the limits.

        Args:
            message: The reason.
            retry_after: Seconds; None for never.
            allowances: Of the tenant, now.
        """
        super().__init__(message)
        self.retry_after = retry_after
        self.allowances = allowances
