"""One memory for cache blocks and adapters, and one rule for what goes when it is full.

The memory is a row of pages, each of which holds a cache block of all layers. Blocks have the pages
from the beginning on, adapters lie packed before the end, and the border between them moves: blocks
that lie where adapters are to be are moved into free pages, and adapters are moved together. So
nothing that is free is ever lost to the other side.

What is idle stays until its room is needed: blocks that can still be found, and adapters that
nothing holds. What has not been used for a time t is used again soon with a chance that falls about
as 1/t (popularities have long tails), so that keeping it is worth its cost to bring back, per byte,
over t; the least goes first. A block's bytes must be computed again, an adapter's only copied.

Each side has a minimum that the other never takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .block_manager import BlockManager
from .errors import KVAccountingError

BLOCK_COST = 4
"""What a byte of a block costs to bring back, over one of an adapter."""

_STEPS = 64
"""Part of the memory, at least a page, that blocks get at once: every time, adapters may move."""

MoveBlocks = Callable[[Sequence[tuple[int, int]]], None]
"""Copies cache blocks, now: pairs of from and to, none of which is both."""


class Region(Protocol):
    """The adapters' part of the memory; ``AdapterPool`` is one."""

    limit_bytes: int

    @property
    def free_bytes(self) -> int:
        """What of it no adapter takes."""
        ...

    def resize(self, limit_bytes: int) -> None:
        """Have all adapters lie within this distance of the memory's end."""
        ...


class Adapters(Protocol):
    """The adapters on the device; ``Residency`` is one."""

    @property
    def staying_bytes(self) -> int:
        """What those take that are held or pinned."""
        ...

    @property
    def oldest(self) -> int | None:
        """The step in which the idle one that would go next was last used."""
        ...

    def evict(self) -> None:
        """Take that one off the device."""
        ...


@dataclass(frozen=True, slots=True)
class Pages:
    """How the memory is divided.

    Attributes:
        count: All pages.
        num_bytes: Of a page.
        least_blocks: Pages that adapters never take.
        least_adapters: Pages that blocks never take.
    """

    count: int
    num_bytes: int
    least_blocks: int
    least_adapters: int

    @property
    def most_blocks(self) -> int:
        """Blocks at most."""
        return self.count - self.least_adapters

    @property
    def most_adapter_bytes(self) -> int:
        """What the adapters of one sequence may take beside pinned ones."""
        return (self.most_blocks - self.least_blocks) * self.num_bytes

    def holding(self, num_bytes: int) -> int:
        """Pages that so many bytes of adapters take."""
        return -(-num_bytes // self.num_bytes)


class SharedMemory:
    """Moves the border between blocks and adapters, and drops what is worth least.

    Attributes:
        now: The number of the step, by which ages are told.
    """

    def __init__(
        self,
        pages: Pages,
        blocks: BlockManager,
        region: Region,
        adapters: Adapters,
        move_blocks: MoveBlocks,
    ) -> None:
        """Give the adapters their minimum, and all other pages, which ``blocks`` has, to blocks."""
        self.now = 0
        self._pages = pages
        self._blocks = blocks
        self._region = region
        self._adapters = adapters
        self._move_blocks = move_blocks
        region.resize(pages.least_adapters * pages.num_bytes)
        blocks.share_with(self)

    # --- what adapters ask of it

    @property
    def lendable_bytes(self) -> int:
        """What adapters could get at most beyond what they have."""
        kept = max(self._pages.least_blocks, self._blocks.num_used)
        return (self._blocks.num_blocks - kept) * self._pages.num_bytes

    def lend(self, num_bytes: int, rival: int | None) -> bool:
        """Come nearer to giving adapters so many bytes more: see ``Neighbour``."""
        wanted = min(self._pages.holding(num_bytes), self.lendable_bytes // self._pages.num_bytes)
        if wanted <= 0:
            return False
        if self._blocks.num_empty >= wanted:
            self._set_border(self._blocks.num_blocks - wanted)
            return True
        oldest = self._blocks.oldest
        if oldest is None or (rival is not None and not self._is_worth_less(oldest, rival)):
            return False
        self._blocks.evict()
        return True

    def blocks_for(self, num_bytes: int) -> int:
        """Blocks that are lost to the cache if so many bytes more must stay on the device."""
        return self._floor(self._adapters.staying_bytes + num_bytes) - self._floor_now

    def blocks_of(self, num_bytes: int) -> int:
        """Blocks in whose place so many bytes lie."""
        return self._pages.holding(num_bytes)

    # --- what blocks ask of it

    @property
    def obtainable(self) -> int:
        """Blocks that could be had from adapters."""
        return self._pages.count - self._floor_now - self._blocks.num_blocks

    def give(self, rival: int | None) -> bool:
        """Give the cache some empty blocks.

        False if none can be had, or only in the place of adapters that are worth more than a block
        that was last used in the step ``rival``; there is none if that is None.
        """
        while self.obtainable > 0:
            spare = min(self._region.free_bytes // self._pages.num_bytes, self._above_least)
            if spare > 0:
                some = min(spare, max(self._pages.count // _STEPS, 1))
                self._set_border(self._blocks.num_blocks + some)
                return True
            oldest = self._adapters.oldest
            if oldest is None:
                raise KVAccountingError("adapters that nothing holds cannot go")
            if rival is not None and self._is_worth_less(rival, oldest):
                return False
            self._adapters.evict()
        return False

    def check_integrity(self) -> None:
        """Balance the books of the border.

        Raises:
            KVAccountingError: A page is on both sides or on none, or a minimum is not kept.
        """
        pages, blocks = self._pages, self._blocks.num_blocks
        if (pages.count - blocks) * pages.num_bytes != self._region.limit_bytes:
            raise KVAccountingError(
                f"of {pages.count} pages {blocks} are blocks, and adapters have"
                f" {self._region.limit_bytes} bytes"
            )
        if not pages.least_blocks <= blocks <= pages.most_blocks:
            raise KVAccountingError(f"{blocks} blocks leave one side less than its minimum")

    @property
    def _floor_now(self) -> int:
        return self._floor(self._adapters.staying_bytes)

    def _floor(self, staying_bytes: int) -> int:
        """Pages that blocks cannot have."""
        return max(self._pages.least_adapters, self._pages.holding(staying_bytes))

    @property
    def _above_least(self) -> int:
        return self._pages.most_blocks - self._blocks.num_blocks

    def _is_worth_less(self, block: int, adapter: int) -> bool:
        """Whether a block is worth less per byte than an adapter, by their last uses."""
        return self.now - block + 1 > BLOCK_COST * (self.now - adapter + 1)

    def _set_border(self, num_blocks: int) -> None:
        moves = self._blocks.resize(num_blocks)
        if moves:
            self._move_blocks(moves)
        self._region.resize((self._pages.count - num_blocks) * self._pages.num_bytes)
