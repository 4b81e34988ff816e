"""Excludes what the grammars of some rows do not allow next.

The masks are computed when the model's step has been launched: on a GPU it runs meanwhile. They
travel as bits. Rows without a grammar are neither read nor written.
"""

from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor
from torch.nn import functional

from ..scheduler.sequence import Sequence
from .stage import Stage

_BITS = np.arange(256)[:, None] >> np.arange(8) & 1
_ADDED = np.where(_BITS, 0, -np.inf).astype(np.float32)
"""(256, 8), to the logits of eight tokens, by the byte that says which of them may come."""


def exclude_tokens(logits: Tensor, sequences: Seq[Sequence], stage: Stage) -> None:
    """Add -inf to the logits (rows, vocab) of what may not come; NaN stays NaN."""
    matchers = {row: each.matcher for row, each in enumerate(sequences) if each.matcher is not None}
    if not matchers:
        return
    masks = [np.frombuffer(each.mask(), dtype=np.uint8) for each in matchers.values()]
    rows = stage.place(np.array(list(matchers), dtype=np.int64))
    allowed = stage.place(np.stack(masks))
    added = stage.place(_ADDED)
    stage.flush()
    bias = functional.embedding(allowed.int(), added).flatten(1)
    logits.index_add_(0, rows, bias[:, : logits.shape[1]])
