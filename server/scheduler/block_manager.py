"""The books of the paged KV cache: which block is whose, and which contents can be found again.

Every block is in exactly one state:

    free          holds nothing
    cached-free   held by nobody, but its contents can still be found; reused in LRU order
    in use        held by one or more sequences (several only for a shared, full prefix block)

Only full blocks are shared, and a sequence writes behind its full blocks. So nothing is written to
a block that two sequences hold, with one exception: a block that a step fills may be shared in that
very step, because in each layer all of a step's keys and values are written before any is read.

The keys and values that adapters put before a sequence lie in blocks like any other: all sequences
of an adapter hold the same ones, and when none does they stay findable until their room is needed.
They are given by the adapter, not by tokens, so they are shared with prefix caching off as well.

The memory may be shared with adapters (``shared_memory.py``): then the number of blocks changes,
and a block that is in the way gets another number.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType
from typing import Protocol

from .block_hash import block_hashes, prefix_hash
from .errors import KVAccountingError
from .plan import PrefixLoad
from .sequence import Sequence

_NONE: Mapping[bytes, int] = MappingProxyType({})


class Lender(Protocol):
    """Who has the memory that blocks do not have: adapters."""

    @property
    def now(self) -> int:
        """The number of the step, by which ages are told."""
        ...

    @property
    def obtainable(self) -> int:
        """Blocks that could be had."""
        ...

    def give(self, rival: int | None, /) -> bool:
        """Give the cache some empty blocks.

        False if none can be had, or only in the place of what is worth more than a block that was
        last used in the step ``rival``; there is none if that is None.
        """
        ...


class _NoLender:
    """A memory of its own."""

    now = 0
    obtainable = 0

    def give(self, _rival: int | None) -> bool:
        """There is nothing to give."""
        return False


class BlockManager:
    """Gives cache blocks to sequences, takes them back, and finds cached prefixes.

    Attributes:
        num_blocks: Blocks of the cache, at present.
        most_blocks: Blocks that it can have.
        version: Changes when a block that was found before may be another one now.
        block_size: Tokens of a block.
        prefix_queries: Tokens looked up in the prefix cache by admitted sequences.
        prefix_hits: Tokens of these that were found.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        """Start with every block free."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a KV cache needs at least one block of one token, not {num_blocks} blocks of"
                f" {block_size} tokens"
            )
        self.num_blocks = num_blocks
        self.most_blocks = num_blocks
        self.version = 0
        self.block_size = block_size
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached_free: OrderedDict[int, int] = OrderedDict()
        """The step in which each was last used, in this order."""
        self._lender: Lender = _NoLender()
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._holders: set[Sequence] = set()

    def share_with(self, lender: Lender) -> None:
        """Share the memory from now on."""
        self._lender = lender

    @property
    def num_free(self) -> int:
        """Blocks that can be given out, cached-free ones and those to be had included."""
        return len(self._free) + len(self._cached_free) + self._lender.obtainable

    @property
    def num_empty(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - len(self._free) - len(self._cached_free)

    @property
    def oldest(self) -> int | None:
        """The step in which the cached-free block that would go next was last used."""
        return next(iter(self._cached_free.values()), None)

    def evict(self) -> None:
        """Empty that block."""
        block, _ = self._cached_free.popitem(last=False)
        self._unpublish(block)
        self._free.append(block)

    def resize(self, num_blocks: int) -> Seq[tuple[int, int]]:
        """Have so many blocks; what lies behind goes to empty ones, as given: from and to.

        Raises:
            KVAccountingError: There are not enough empty ones.
        """
        behind = range(num_blocks, self.num_blocks)
        free = [block for block in self._free if block < num_blocks]
        occupied = [one for one in behind if self._ref_counts[one] or one in self._cached_free]
        if len(free) < len(occupied) or not 0 < num_blocks <= self.most_blocks:
            raise KVAccountingError(f"{self.num_blocks} blocks cannot become {num_blocks}")
        free += range(num_blocks - 1, self.num_blocks - 1, -1)
        self._free, self.num_blocks = free, num_blocks
        moves = [(block, self._free.pop()) for block in occupied]
        self._renumber(dict(moves))
        return moves

    def find_cached(
        self, sequence: Sequence, limit: int, coming: Mapping[bytes, int] = _NONE
    ) -> list[int]:
        """Blocks with the longest cached prefix of at most ``limit`` tokens; changes nothing.

        ``coming`` are blocks, in use, that the step about to run fills, by name.
        """
        if not self._prefix_caching:
            return []
        found: list[int] = []
        num_full = min(limit, len(sequence.token_ids)) // self.block_size
        for name in block_hashes(sequence, num_full, self.block_size)[:num_full]:
            block = self._block_of.get(name, coming.get(name))
            if block is None:
                break
            found.append(block)
        return found

    def num_prefix_blocks(self, sequence: Sequence) -> int:
        """Blocks that the prefix of the sequence's adapters fills, the first perhaps in part."""
        prefix = sequence.adapters.prefix
        return 0 if prefix is None else self._blocks_for(prefix.length)

    def num_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that its prefix and ``num_tokens`` tokens fill, shared ones among them."""
        return self.num_prefix_blocks(sequence) + self._blocks_for(num_tokens)

    def can_allocate(
        self, sequence: Sequence, cached: list[int], num_tokens: int, spare: int = 0
    ) -> bool:
        """Whether its prefix and ``num_tokens`` tokens, ``cached`` among them, fit.

        ``spare`` more blocks must stay free.
        """
        held = [*cached, *(block for block in self._found_prefix(sequence) if block is not None)]
        num_shared = sum(1 for block in held if self._ref_counts[block])
        return self.num_needed(sequence, num_tokens) - num_shared + spare <= self.num_free

    def allocate(self, sequence: Sequence, cached: list[int], num_tokens: int) -> PrefixLoad | None:
        """Give the sequence its prefix, the ``cached`` blocks and new ones up to ``num_tokens``.

        Returns:
            What of the prefix is not in the cache and must be written there before the sequence
            runs; None if nothing.

        Raises:
            KVAccountingError: The sequence holds blocks already, or ``can_allocate`` would say no.
        """
        if sequence in self._holders or not self.can_allocate(sequence, cached, num_tokens):
            raise KVAccountingError(
                f"cannot allocate {num_tokens} tokens to {sequence.request.request_id}:"
                f" it holds {len(sequence.block_table)} blocks and {self.num_free} are free"
            )
        self._holders.add(sequence)
        found = self._found_prefix(sequence)
        # What is there is held before anything is taken, or taking could evict it.
        for block in (*cached, *(block for block in found if block is not None)):
            self._hold(block)
        sequence.block_table = list(cached)
        load = self._take_prefix(sequence, found)
        self.extend(sequence, num_tokens)
        return load

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the table cover ``num_tokens`` tokens; False, with nothing done, if it cannot."""
        missing = self._blocks_for(num_tokens) - len(sequence.block_table)
        if missing > len(self._free) and missing > self.num_free:
            return False
        for _ in range(missing):
            sequence.block_table.append(self._take())
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give ``child`` the parent's full blocks, and one for a copy of what is in a partial one.

        ``child.block_copy`` says what must be copied before the child goes on. One block must be
        free.
        """
        num_full = parent.num_computed_tokens // self.block_size
        shared = parent.block_table[:num_full]
        for block in (*parent.prefix_blocks, *shared):
            self._hold(block)
        self._holders.add(child)
        child.prefix_blocks, child.block_table = list(parent.prefix_blocks), list(shared)
        child.block_hashes = parent.block_hashes[:num_full]
        if parent.num_computed_tokens % self.block_size:
            child.block_table.append(self._take())
            child.block_copy = parent.block_table[num_full], child.block_table[num_full]

    def filled(self, sequence: Sequence, start: int, end: int) -> dict[bytes, int]:
        """The blocks that become full as tokens ``start .. end`` are computed, by name."""
        first, last = start // self.block_size, end // self.block_size
        if first == last or not self._prefix_caching:
            return {}
        names = block_hashes(sequence, last, self.block_size)
        return dict(zip(names[first:last], sequence.block_table[first:last], strict=True))

    def is_shared(self, block: int) -> bool:
        """Whether several sequences hold it."""
        return self._ref_counts[block] > 1

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Make the blocks that became full as tokens ``start .. end`` were computed findable.

        Where equal contents are findable already, they stay so and the duplicate stays private.
        """
        for name, block in self.filled(sequence, start, end).items():
            if self._block_of.setdefault(name, block) == block:
                self._hash_of[block] = name

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the sequence's blocks any more: what they hold is not to be trusted."""
        for block in sequence.block_table:
            self._unpublish(block)

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back; the end of a prefix is reused before its beginning.

        Raises:
            KVAccountingError: The sequence holds none.
        """
        if sequence not in self._holders:
            raise KVAccountingError(f"{sequence.request.request_id} holds no blocks to free")
        self._holders.remove(sequence)
        for block in (*reversed(sequence.block_table), *reversed(sequence.prefix_blocks)):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached_free[block] = self._lender.now
        sequence.block_table = []
        sequence.prefix_blocks = []

    def record_lookup(self, num_tokens: int, num_found: int) -> None:
        """Count one lookup of an admitted sequence in the statistics."""
        if self._prefix_caching:
            self.prefix_queries += num_tokens
            self.prefix_hits += num_found

    def check_integrity(self) -> None:
        """Balance the books.

        Raises:
            KVAccountingError: A block is not in exactly one state, its reference count is not the
                number of tables that name it, or hashes and blocks do not map to each other.
        """
        self._check_references()
        self._check_states()
        self._check_hashes()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _found_prefix(self, sequence: Sequence) -> list[int | None]:
        """The blocks of its prefix, None for those that are not in the cache."""
        prefix = sequence.adapters.prefix
        if prefix is None:
            return []
        names = (prefix_hash(prefix.name, i) for i in range(self.num_prefix_blocks(sequence)))
        return [self._block_of.get(name) for name in names]

    def _take_prefix(self, sequence: Sequence, found: list[int | None]) -> PrefixLoad | None:
        """Complete the sequence's prefix with new blocks, findable from now on."""
        prefix = sequence.adapters.prefix
        missing: dict[int, int] = {}
        for index, block in enumerate(found):
            if prefix is not None and block is None:
                block = missing[index] = self._take()
                name = prefix_hash(prefix.name, index)
                self._hash_of[block], self._block_of[name] = name, block
            if block is not None:
                sequence.prefix_blocks.append(block)
        return PrefixLoad(prefix, missing) if prefix is not None and missing else None

    def _hold(self, block: int) -> None:
        if not self._ref_counts[block]:
            del self._cached_free[block]
        self._ref_counts[block] += 1

    def _take(self) -> int:
        if not self._free and not self._lender.give(self.oldest):
            self.evict()
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def _unpublish(self, block: int) -> None:
        name = self._hash_of[block]
        if name is not None:
            self.version += 1
            del self._block_of[name]
            self._hash_of[block] = None

    def _renumber(self, new: Mapping[int, int]) -> None:
        """Call blocks by new numbers, which nothing has."""
        if not new:
            return
        self.version += 1
        for block, other in new.items():
            self._ref_counts[other], self._ref_counts[block] = self._ref_counts[block], 0
            name = self._hash_of[other] = self._hash_of[block]
            self._hash_of[block] = None
            if name is not None:
                self._block_of[name] = other
        renamed = ((new.get(block, block), step) for block, step in self._cached_free.items())
        self._cached_free = OrderedDict(renamed)
        for holder in self._holders:
            holder.renumber_blocks(new)

    def _check_references(self) -> None:
        tables = Counter(
            block
            for holder in self._holders
            for block in (*holder.prefix_blocks, *holder.block_table)
        )
        counted = {block: count for block, count in enumerate(self._ref_counts) if count}
        if counted != tables:
            raise KVAccountingError(f"reference counts {counted} but block tables {dict(tables)}")

    def _check_states(self) -> None:
        behind = [*self._ref_counts[self.num_blocks :], *self._hash_of[self.num_blocks :]]
        if any(behind):
            raise KVAccountingError(
                f"blocks behind the {self.num_blocks} that there are hold something"
            )
        in_use = [block for block, count in enumerate(self._ref_counts) if count]
        if sorted([*self._free, *self._cached_free, *in_use]) != list(range(self.num_blocks)):
            raise KVAccountingError(
                f"blocks not in exactly one state: free {self._free},"
                f" cached-free {list(self._cached_free)}, in use {in_use}"
            )

    def _check_hashes(self) -> None:
        named = {name: block for block, name in enumerate(self._hash_of) if name is not None}
        if named != self._block_of:
            raise KVAccountingError("block hashes and the index of findable blocks differ")
        for block in self._free:
            if self._hash_of[block] is not None:
                raise KVAccountingError(f"free block {block} is findable")
        for block in self._cached_free:
            if self._hash_of[block] is None:
                raise KVAccountingError(f"cached-free block {block} cannot be found")
