"""Random matrices that PEFT's VeRA, RandLoRA and FourierFT draw instead of storing them.

They are drawn with the library's own calls in its own order, from torch's CPU generator, so that
the numbers are the same.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import AdapterCorrupt, AdapterUnsupported, shown

_LOWEST_SEED, _HIGHEST_SEED = -(1 << 63), (1 << 64) - 1
_SPARSITY = 3.0
"""PEFT's for RandLoRA's ``sparse``."""
_LARGEST_SHARE = 4
"""A seed costs a hostile file nothing, and what is drawn from it memory and time."""


def seeded(name: str, value: object) -> torch.Generator:
    """torch's generator with the field's value as its seed.

    Raises:
        AdapterCorrupt: The value is not one that torch takes.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not _LOWEST_SEED <= value <= _HIGHEST_SEED:  # type: ignore[operator]
        raise AdapterCorrupt(f"the config field {name!r} is {shown(value)}, not a seed")
    return torch.Generator(device="cpu").manual_seed(value)  # type: ignore[arg-type]


def require_drawable(rank: int, width: int, out: int) -> None:
    """Raise AdapterUnsupported for random matrices that are far larger than the base's own.

    Args:
        rank: r, of (r, width) and (out, r).
        width: Widest input of all adapted modules.
        out: Widest output of them.
    """
    if rank * (width + out) > _LARGEST_SHARE * width * out:
        raise AdapterUnsupported(
            f"random matrices of rank {rank} for modules of {width} to {out} features would take "
            f"more than {_LARGEST_SHARE} times the largest of them: train with a smaller r, or "
            f"with save_projection=True"
        )


def draw_vera(generator: torch.Generator, rank: int, width: int, out: int) -> tuple[Tensor, Tensor]:
    """VeRA's A (rank, width) and B (out, rank): uniform in +-sqrt(6 / columns).

    Args:
        generator: Seeded with ``projection_prng_key``.
        rank: r.
        width: Widest input of all adapted modules.
        out: Widest output of them.
    """

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return uniform(rank, width), uniform(out, rank)


def draw_randlora(
    generator: torch.Generator, rank: int, shortest: int, longest: int
) -> tuple[Tensor, Tensor]:
    """RandLoRA's A (rank, 1, shortest) and B (longest, bases, rank), bfloat16, deviation 1.

    PEFT draws them in bfloat16 wherever that is available, which it is on every CPU.

    Args:
        generator: Seeded with ``projection_prng_key``.
        rank: r.
        shortest: The smaller of the widest input and the widest output of all adapted modules.
        longest: The larger of them.
    """

    def uniform(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    a = uniform(rank, 1, shortest)
    bases = [uniform(longest, 1, rank) for _ in range(-(-shortest // rank))]
    b = torch.cat(bases, dim=1)
    return a / a.std(), b / b.std()


def draw_sparse_randlora(
    generator: torch.Generator, rank: int, shortest: int, longest: int
) -> tuple[Tensor, Tensor]:
    """RandLoRA's A and B with ``sparse``: mostly 0, else of one size and either sign, float32."""
    return _draw_signs(generator, rank, shortest, longest, _SPARSITY)


def draw_very_sparse_randlora(
    generator: torch.Generator, rank: int, shortest: int, longest: int
) -> tuple[Tensor, Tensor]:
    """As ``draw_sparse_randlora``, the sparser the wider the modules (``very_sparse``)."""
    return _draw_signs(generator, rank, shortest, longest, math.sqrt(shortest))


DrawRandLora = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor]]
"""Signature of the three variants of RandLoRA."""


def _draw_signs(
    generator: torch.Generator, rank: int, shortest: int, longest: int, sparsity: float
) -> tuple[Tensor, Tensor]:
    def signs(*shape: int) -> Tensor:
        drawn, found = torch.rand(shape, generator=generator), torch.zeros(shape)
        found[drawn < 1 / (2 * sparsity)] = -1
        found[drawn > 1 - 1 / (2 * sparsity)] = 1
        return found

    a = signs(rank, 1, shortest)
    b = signs(longest, -(-shortest // rank), rank)
    return a / a.std(), b / b.std()
