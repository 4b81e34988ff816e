"""Index tensors that adapters have alike lie on the device once, while one of them is there.

Places that are drawn from a seed are the same in every adapter of that seed. Where these lie at one
address, kernels see at once that they are the same, and read them once for a whole batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class _Held:
    extent: int
    holders: int


class AlikeExtents:
    """Extents by what lies there, and how many hold each."""

    def __init__(self) -> None:
        """Start with none."""
        self._held: dict[bytes, _Held] = {}
        self._contents: dict[int, bytes] = {}

    def __contains__(self, content: bytes | None) -> bool:
        """Whether this content lies somewhere."""
        return content in self._held

    def add(self, content: bytes, extent: int) -> None:
        """It lies there from now on, and nobody holds it yet."""
        self._held[content] = _Held(extent, 0)
        self._contents[extent] = content

    def hold(self, content: bytes) -> int:
        """Where it lies, for one holder more."""
        held = self._held[content]
        held.holders += 1
        return held.extent

    def release(self, extent: int) -> bool:
        """One holder less: whether nobody needs the extent any more, as that of no content."""
        content = self._contents.get(extent)
        if content is None:
            return True
        held = self._held[content]
        held.holders -= 1
        if held.holders:
            return False
        del self._held[content], self._contents[extent]
        return True

    def move(self, moved: Mapping[int, int]) -> None:
        """What lay at the keys lies at the values."""
        for held in self._held.values():
            held.extent = moved.get(held.extent, held.extent)
        self._contents = {held.extent: content for content, held in self._held.items()}

    def holders(self) -> Mapping[int, int]:
        """How many hold each extent."""
        return {held.extent: held.holders for held in self._held.values()}
