"""One set of device operations, chosen once when the engine starts and passed down explicitly."""

from dataclasses import dataclass

from .low_rank import reference as low_rank_reference
from .low_rank.op import AddLowRank
from .paged_attention import reference as attention_reference
from .paged_attention.op import PagedAttention, WriteKV


@dataclass(frozen=True, slots=True)
class Backend:
    """The operations the model calls; each field's contract stands in its ``op`` module.

    Attributes:
        name: ``compiled`` or ``reference``, shown at start-up and by ``/version``.
    """

    name: str
    add_low_rank: AddLowRank
    write_kv: WriteKV
    paged_attention: PagedAttention


def reference_backend() -> Backend:
    """Plain torch: the oracle, and the fallback where there is no C++ compiler."""
    return Backend(
        name="reference",
        add_low_rank=low_rank_reference.add_low_rank,
        write_kv=attention_reference.write_kv,
        paged_attention=attention_reference.paged_attention,
    )
