"""How much memory pinned adapters may take."""

from collections.abc import Sequence

from ..composition import Room
from .entries import Adapter, Version
from .errors import PinRefused


def check_pins(adapter: Adapter, pinned: Sequence[Version], room: Room) -> None:
    """Check that an adapter can be pinned beside those that are, in the room for pinned ones.

    Raises:
        PinRefused: It has nothing to pin, or together they would take more than their share.
    """
    if adapter.default is None:
        raise PinRefused(
            f"The adapter {adapter.plain_name!r} has no version yet that could be pinned."
        )
    infos = {each.digest: each.info for each in (*pinned, adapter.default)}.values()
    takes = [each.composable.takes for each in infos]
    for total, there, what in (
        (sum(each.num_bytes for each in infos), room.host_bytes, "bytes of --host-memory-budget"),
        (sum(each.device_bytes for each in takes), room.device_bytes, "bytes of --memory-budget"),
        (sum(each.parts for each in takes), room.parts, "adapter slots (see --max-num-seqs)"),
    ):
        if total > there:
            raise PinRefused(
                f"The adapter {adapter.plain_name!r} cannot be pinned: pinned adapters would take"
                f" {total} and may take {there} {what}."
            )
