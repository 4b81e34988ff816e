"""Whether every live sequence is in exactly one place, and has its blocks there."""

from collections.abc import Collection

from .beam_group import rows_of
from .block_manager import BlockManager
from .errors import AccountingError
from .limits import SchedulerLimits
from .running import RunningSequences
from .sequence import Sequence
from .waiting import WaitingQueue


def check_books(
    live: Collection[Sequence],
    running: RunningSequences,
    waiting: WaitingQueue,
    limits: SchedulerLimits,
    blocks: BlockManager,
) -> None:
    """Balance the books of sequences and of blocks.

    Raises:
        AccountingError: A sequence is in two places or none, is out of order, or runs without its
            blocks; or rows are miscounted.
        KVAccountingError: The block manager's books do not balance.
    """
    blocks.check_integrity()
    queued = list(waiting)
    located = [*running.values(), *queued]
    if len(located) != len(live) or set(located) != set(live) or len(queued) != len(waiting):
        raise AccountingError("a live sequence does not either run or wait")
    for tenant in {each.tenant for each in queued}:
        orders = [each.order for each in queued if each.tenant == tenant]
        if orders != sorted(orders):
            raise AccountingError("the waiting queue is out of order")
    if any(sequence.block_table or sequence.num_computed_tokens for sequence in queued):
        raise AccountingError("a waiting sequence holds blocks")
    if running.num_rows != sum(map(rows_of, running.values())):
        raise AccountingError("the rows of running sequences are miscounted")
    if running.num_rows > limits.max_num_seqs:
        raise AccountingError("more sequences run than max_num_seqs")
    for sequence in running.values():
        covered = len(sequence.block_table) * blocks.block_size
        if not sequence.num_computed_tokens < len(sequence.token_ids) <= covered + 1:
            raise AccountingError(f"{sequence.request.request_id} runs without its blocks")
