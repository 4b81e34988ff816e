"""Which adapters one request may combine. Free of torch: the API asks before anything is queued.

One adapter alone, with the weight 1, may be of any kind. Several in one request, or one with
another weight, are a weighted sum beside the base: each correction is computed from what the base
computed, multiplied by its weight, and added. That has a meaning only for corrections that add.
Prefixes stand one behind the other, as one adapter with all their keys would have them.
"""

from collections.abc import Sequence

import msgspec


class CompositionRefused(ValueError):
    """The combination has no meaning; the message says why."""


class Room(msgspec.Struct, frozen=True):
    """What adapters take, or what there is for them.

    Attributes:
        host_bytes: In host memory.
        device_bytes: In the device's adapter pool.
        parts: Slots of the pool.
    """

    host_bytes: int = 0
    device_bytes: int = 0
    parts: int = 0


class Composable(msgspec.Struct, frozen=True):
    """What decides whether an adapter can be weighted and combined.

    Attributes:
        obstacle: Why it cannot be, as the end of a sentence; None where it can.
        prefix_length: Keys and values that it puts before a request's own.
        shifts_positions: Whether these shift the positions of the request's tokens.
        prefix_layers: The layers that attend to them; None for all of them.
        takes: What it needs while a request uses it.
    """

    obstacle: str | None = None
    prefix_length: int = 0
    shifts_positions: bool = False
    prefix_layers: tuple[int, ...] | None = None
    takes: Room = Room()


def check_room(adapters: Sequence[Composable], room: Room) -> None:
    """Check that the adapters of one request, each of which was loaded, can all be there at once.

    Raises:
        CompositionRefused: There is less room than they take together.
    """
    host = sum(adapter.takes.host_bytes for adapter in adapters)
    device = sum(adapter.takes.device_bytes for adapter in adapters)
    parts = sum(adapter.takes.parts for adapter in adapters)
    for needed, there, what, option in (
        (host, room.host_bytes, "bytes of host memory", "--host-memory-budget"),
        (device, room.device_bytes, "bytes on the device", "--memory-budget"),
        (parts, room.parts, "adapter slots", "--max-num-seqs"),
    ):
        if needed > there:
            raise CompositionRefused(
                f"these adapters need {needed} {what} together, and there are {there}: combine"
                f" fewer (or serve with a larger {option})"
            )


def check_composition(chosen: Sequence[tuple[str, float, Composable]]) -> None:
    """Check adapters given as (what to call it, weight, properties).

    Raises:
        CompositionRefused: They have no weighted sum.
    """
    for name, weight, adapter in chosen:
        if len(chosen) == 1 and weight == 1.0:
            return
        if adapter.obstacle is not None:
            raise CompositionRefused(
                f"{name} cannot be weighted or combined with other adapters: {adapter.obstacle}"
            )
        if adapter.prefix_length and weight != 1.0:
            raise CompositionRefused(
                f"{name} cannot have the weight {weight}: its keys and values are there or not"
            )
    prefixes = [adapter for _, _, adapter in chosen if adapter.prefix_length]
    if len({prefix.prefix_layers for prefix in prefixes}) > 1:
        raise CompositionRefused("these prefixes cannot be combined: they are for different layers")
    if len({prefix.shifts_positions for prefix in prefixes}) > 1:
        raise CompositionRefused(
            "these prefixes cannot be combined: one shifts the positions of the prompt (PEFT's) and"
            " another does not (AdapterHub's)"
        )
