"""How much of the host memory pinned adapters may take."""

from collections.abc import Sequence

from .entries import Adapter, Version
from .errors import PinRefused

PINNED_SHARE = 0.5
"""Part of the host memory budget that pinned adapters may fill; the rest is for all others."""


def check_pins(adapter: Adapter, pinned: Sequence[Version], host_bytes: int) -> None:
    """Check that an adapter can be pinned beside those that are.

    Raises:
        PinRefused: It has nothing to pin, or together they would take more than their share.
    """
    if adapter.default is None:
        raise PinRefused(
            f"The adapter {adapter.plain_name!r} has no version yet that could be pinned."
        )
    others = {each.digest: each.info.num_bytes for each in pinned}
    total = sum((others | {adapter.default.digest: adapter.default.info.num_bytes}).values())
    room = int(PINNED_SHARE * host_bytes)
    if total > room:
        raise PinRefused(
            f"The adapter {adapter.plain_name!r} cannot be pinned: pinned adapters would take "
            f"{total} bytes, and may take {room} ({PINNED_SHARE:.0%} of --host-memory-budget)."
        )
