"""MiSS (matrix shard sharing, arXiv:2409.15371), which PEFT called Bone at first.

    y += M fold(x),   fold(x)_j = sum of x_i over i mod r = j,

with M (out, r) the transposed tensor ``miss_block`` or ``bone_block`` (r, out). That is a low-rank
correction whose A is a fixed pattern of ones, the same for all modules of one input width. Of its
variants, ``mini`` stores (r, mini_r) and repeats it along the output; ``bat`` stores blocks M_a
(out / r, r, r) and adds, to every r by r block W_ab of the base's weight, W_ab M_a + M_a.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterUnsupported, shown
from ..kind import PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine, Dense
from ..primitives.primitive import Primitive
from .binding import cast, mismatch
from .config_fields import positive_int
from .linear_adapter import HARMLESS, LinearAdapter, Tensors, bounded_rank, require_shape
from .peft_tensors import required

_FORM = "init_weights"

SHARD_HARMLESS: Mapping[str, str] = {
    name: reason for name, reason in HARMLESS.items() if name != _FORM
}
"""As ``HARMLESS``, but for the field that says what is computed."""


class Variant(Enum):
    """What ``init_weights`` says; in spite of its name it decides what is computed."""

    PLAIN = "plain"
    MINI = "mini"
    BAT = "bat"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    block: Tensor
    variant: Variant
    in_features: None = None

    @property
    def rank(self) -> int:
        return self.block.shape[0] if self.variant is not Variant.BAT else self.block.shape[1]

    @property
    def out_features(self) -> int | None:
        match self.variant:
            case Variant.PLAIN:
                return self.block.shape[1]
            case Variant.MINI:
                return None
            case Variant.BAT:
                return self.block.shape[0] * self.rank

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        if self.variant is Variant.BAT:
            yield PrimitiveShape(Dense.__name__, self.path, 0, 0)
        else:
            yield PrimitiveShape(Affine.__name__, self.path, self.rank, self.block.numel())


def shard_sharing_reader(
    tensor: str, variants: Sequence[Variant]
) -> Callable[[Checkpoint], LinearAdapter[_Module]]:
    """The reader of a kind that stores one block a module under this name.

    Args:
        tensor: ``miss_block`` or ``bone_block``.
        variants: Those that the kind has.
    """

    def read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
        config = checkpoint.config
        rank = bounded_rank("r", config.get("r", 64))
        variant = _variant(config.get(_FORM, True), variants)
        mini = positive_int("mini_r", config.get("mini_r", 1))
        shape = {
            Variant.PLAIN: (rank, None),
            Variant.MINI: (rank, mini),
            Variant.BAT: (None, rank, rank),
        }[variant]
        tensors = Tensors.read(config, checkpoint.tensors, (tensor,))
        modules = tuple(
            _module(path, parts, tensor, variant, shape) for path, parts in tensors.modules.items()
        )
        return LinearAdapter(modules, _lower, tensors.saved)

    return read


def _variant(value: object, variants: Sequence[Variant]) -> Variant:
    if isinstance(value, bool):
        return Variant.PLAIN
    for variant in variants:
        if value == variant.value and variant is not Variant.PLAIN:
            return variant
    raise AdapterUnsupported(f"the config field {_FORM!r} is {shown(value)}, which is unknown")


def _module(
    path: str,
    parts: Mapping[str, Tensor],
    tensor: str,
    variant: Variant,
    shape: tuple[int | None, ...],
) -> _Module:
    (block,) = required(path, parts, tensor)
    require_shape(path, tensor, block, *shape)
    return _Module(path, block, variant)


def _lower(base: Base, bound: Sequence[tuple[LinearTarget, _Module]]) -> Iterator[Primitive]:
    folds: dict[tuple[int, int], Tensor] = {}
    for target, module in bound:
        _check_widths(base, target, module)
        if module.variant is Variant.BAT:
            yield Dense(target, cast(module.path, _bat(base, target, module), base.dtype))
            continue
        size = module.rank, target.in_features
        if size not in folds:
            folds[size] = cast(module.path, _fold(*size), base.dtype)
        block = module.block.repeat(1, target.out_features // module.block.shape[1])
        yield Affine(target, a=folds[size], b=cast(module.path, block, base.dtype))


def _check_widths(base: Base, target: LinearTarget, module: _Module) -> None:
    width, out, rank = target.in_features, target.out_features, module.rank
    match module.variant:
        case Variant.PLAIN:
            fits = rank <= width
        case Variant.MINI:
            fits = rank <= width and out % module.block.shape[1] == 0
        case Variant.BAT:
            fits = width % rank == 0
    if not fits:
        raise mismatch(
            base.layout,
            f"{shown(module.path)} maps {width} to {out} features here, and its block is "
            f"{list(module.block.shape)}",
        )


def _fold(rank: int, width: int) -> Tensor:
    """(rank, width): 1 where column mod rank is the row."""
    columns = torch.arange(width)
    fold = torch.zeros(rank, width)
    fold[columns % rank, columns] = 1
    return fold


def _bat(base: Base, target: LinearTarget, module: _Module) -> Tensor:
    """(out, in): W_ab M_a + M_a for every block of the base's weight."""
    rank, blocks = module.rank, module.block.float()
    weight = base.linear(target).weight.float()
    shape = (target.out_features // rank, rank, target.in_features // rank, rank)
    grid = weight.reshape(shape).transpose(1, 2)
    changed = grid @ blocks[:, None] + blocks[:, None]
    return changed.transpose(1, 2).reshape(weight.shape)
