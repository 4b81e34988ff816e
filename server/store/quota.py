"""How many adapters of its own a tenant may have, and how large they may be together."""

from collections.abc import Iterable

from ..tenants.tenant import TenantLimits
from .entries import Adapter
from .errors import QuotaExceeded


def check_quota(adapter: Adapter, owned: Iterable[Adapter], limits: TenantLimits) -> None:
    """Check that a tenant may have ``adapter`` among those it ``owned``.

    Every version counts, and equal files once.

    Raises:
        QuotaExceeded: It may not.
    """
    kept = [adapter, *(each for each in owned if each.name != adapter.name)]
    if limits.adapters is not None and len(kept) > limits.adapters:
        raise QuotaExceeded(
            f"You may have {limits.adapters} adapters of your own; remove one, or replace one."
        )
    sizes = {each.digest: each.file_bytes for one in kept for each in one.versions}
    total = sum(sizes.values())
    if limits.adapter_bytes is not None and total > limits.adapter_bytes:
        raise QuotaExceeded(
            f"Your adapters would take {total} bytes with all their versions, and may take "
            f"{limits.adapter_bytes}; remove some."
        )
