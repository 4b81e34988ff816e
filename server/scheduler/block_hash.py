"""Names for the contents of full cache blocks, so that equal prefixes can be found again.

A block's keys and values depend on every token up to its end and on the adapter, so the name of
block i is chained: ``h_i = H(h_{i-1}, tokens of block i)`` with ``h_{-1} = H(salt)``. H is BLAKE2b
with 128 bits: nobody can construct a prompt whose name equals another's, as could be done with
Python's ``hash``. The two uses of H are personalised apart, because a salt holds text that clients
choose.
"""

from array import array
from hashlib import blake2b

from .sequence import Sequence

DIGEST_BYTES = 16


def root_hash(salt: bytes) -> bytes:
    """The name before the first block, H(salt)."""
    return blake2b(salt, digest_size=DIGEST_BYTES, person=b"salt").digest()


def chain_hash(previous: bytes, token_ids: list[int]) -> bytes:
    """The name of the block that holds ``token_ids`` after what ``previous`` names."""
    packed = array("i", token_ids).tobytes()
    return blake2b(previous + packed, digest_size=DIGEST_BYTES, person=b"block").digest()


def block_hashes(sequence: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """At least the first ``num_blocks`` names of the sequence; each is computed once."""
    hashes = sequence.block_hashes
    for index in range(len(hashes), num_blocks):
        previous = hashes[-1] if hashes else root_hash(sequence.salt)
        start = index * block_size
        hashes.append(chain_hash(previous, sequence.token_ids[start : start + block_size]))
    return hashes
