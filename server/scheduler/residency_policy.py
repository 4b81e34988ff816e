"""Whom to admit next while not every adapter fits on the device.

An adapter that is brought to the device pushes another one off. So the waiting sequences whose
adapters are there, or find room beside all that are, go first, and batches form around what is on
the device. Nobody starves: to what was overtaken in ``PATIENCE`` steps nobody is preferred, nor
is a lower priority to a higher one.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import chain, islice

from .sequence import Sequence

WINDOW = 256
"""Waiting sequences that are looked at: enough to fill a batch, few enough for every step."""

PATIENCE = 8
"""Steps in which a sequence is overtaken by those preferred: more bring no more throughput."""

Fits = Callable[..., bool]
"""fits(*adapter_ids): whether these are on the device, or find room beside all that are."""


def admission_order(waiting: Seq[Sequence], fits: Fits, max_overtakes: int) -> Iterator[int]:
    """Positions in the queue in the order in which to admit; those behind the window keep theirs.

    ``fits`` is asked late: what was admitted meanwhile may have filled the device.
    """
    for stretch in _stretches(waiting[:WINDOW], min(PATIENCE, max_overtakes)):
        passed: list[int] = []
        for position in stretch:
            if fits(*waiting[position].adapters.adapter_ids):
                yield position
            else:
                passed.append(position)
        yield from passed
    yield from range(WINDOW, len(waiting))


def needed_adapters(waiting: Iterable[Sequence]) -> list[int]:
    """The adapters of those in the window, the one that is needed first at the beginning."""
    sequences = islice(waiting, WINDOW)
    return list(dict.fromkeys(chain.from_iterable(s.adapters.adapter_ids for s in sequences)))


def _stretches(waiting: Seq[Sequence], patience: int) -> Iterator[range]:
    """Runs of positions within which the order may change: of one priority, impatient ones last."""
    start = 0
    for position, sequence in enumerate(waiting):
        if start < position and waiting[start].request.priority != sequence.request.priority:
            yield range(start, position)
            start = position
        if sequence.num_overtaken >= patience:
            yield range(start, position + 1)
            start = position + 1
    if start < len(waiting):
        yield range(start, len(waiting))
