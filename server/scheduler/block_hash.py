"""Names for the contents of full cache blocks, so that equal prefixes can be found again.

A block's keys and values depend on every token up to its end and on what adapters did to them, so
the name of block i is chained: ``h_i = H(h_{i-1}, salts that begin in block i, tokens of block i)``
with ``h_{-1} = H(the request's cache salt)``. An adapter that leaves a prompt's beginning alone
thus shares the base's blocks there. The blocks of an adapter's prefix have names of their own. H is
BLAKE2b with 128 bits: nobody can construct a prompt whose name equals another's, as could be done
with Python's ``hash``. The uses of H are personalised apart, because a salt holds text that clients
choose.
"""

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from .sequence import Sequence

DIGEST_BYTES = 16


def root_hash(salt: bytes) -> bytes:
    """The name before the first block, H(salt)."""
    return blake2b(salt, digest_size=DIGEST_BYTES, person=b"salt").digest()


def chain_hash(previous: bytes, token_ids: list[int], salts: Iterable[bytes] = ()) -> bytes:
    """The name of the block that holds ``token_ids`` after what ``previous`` names."""
    digest = blake2b(previous, digest_size=DIGEST_BYTES, person=b"block")
    for salt in salts:
        digest.update(blake2b(salt, digest_size=DIGEST_BYTES, person=b"adapter").digest())
    digest.update(array("i", token_ids).tobytes())
    return digest.digest()


def prefix_hash(name: bytes, index: int) -> bytes:
    """The name of one block of an adapters' prefix."""
    part = name + index.to_bytes(8, "little")
    return blake2b(part, digest_size=DIGEST_BYTES, person=b"prefix").digest()


def block_hashes(sequence: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """At least the first ``num_blocks`` names of the sequence; each is computed once."""
    hashes = sequence.block_hashes
    for index in range(len(hashes), num_blocks):
        salt = sequence.request.cache_salt or ""
        previous = hashes[-1] if hashes else root_hash(salt.encode())
        start, end = index * block_size, (index + 1) * block_size
        salts = [each.value for each in sequence.adapters.salts if start <= each.position < end]
        hashes.append(chain_hash(previous, sequence.token_ids[start:end], salts))
    return hashes
