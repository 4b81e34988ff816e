"""OFT (orthogonal fine-tuning, arXiv:2306.07280, arXiv:2506.19847) as PEFT stores and computes it.

    y = W x' + b,   x'_k = x_k R_k for every block k of b numbers,

with R_k orthogonal, or nearly so: the Cayley transform (I - S_k) (I + S_k)^-1 of a skew-symmetric
S_k, or the first terms of its Neumann series, the default. ``oft_R.weight`` holds the triangle of
each S_k above its diagonal; with ``block_share`` of one, which all blocks use. ``coft`` limits the
size of S_k.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt, sqrt

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.binding import cast, embedding_site, mismatch
from ..formats.config_fields import FieldRules, count_or_zero, finite_number, flag, positive_int
from ..formats.factors import cayley, skew_symmetric
from ..formats.linear_adapter import HARMLESS, LinearAdapter, PeftKind, Tensors, iter_each
from ..formats.overrides import merge
from ..kind import KindPage, Lowered, PrimitiveShape
from ..layout import BaseLayout, LinearTarget
from ..primitives.embedding import EmbeddingRows
from ..primitives.linear import InputTransform
from ..primitives.primitive import Primitive

MAX_TERMS = 16

_ROWS_AT_ONCE = 4096

_R, _EMBEDDING_R = "oft_R.weight", "oft_embedding_R.weight"
_FIRST_WITH_THIS_SERIES = (0, 18)
_OTHERS = (
    (
        ".oft_r.",
        "PEFT up to 0.15.2 saved it, and computed something else: train again with a newer PEFT",
    ),
)


@dataclass(frozen=True, slots=True)
class _Parameterization:
    """How S becomes R.

    Attributes:
        terms: Of the Neumann series; None for the whole Cayley transform.
        limit: ``eps`` of ``coft``, None without.
    """

    terms: int | None
    limit: float | None

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "_Parameterization":
        terms = positive_int("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5))
        limit = finite_number("eps", config.get("eps", 6e-5))
        is_series = flag("use_cayley_neumann", config.get("use_cayley_neumann", True))
        is_limited = flag("coft", config.get("coft", False))
        if is_series:
            _require_series_version(config.get("peft_version"))
            if terms > MAX_TERMS:
                raise AdapterUnsupported(
                    f"num_cayley_neumann_terms is {terms}, more than {MAX_TERMS}"
                )
        if limit < 0:
            raise AdapterCorrupt(f"the config field 'eps' is {limit}, less than 0")
        return cls(terms if is_series else None, limit if is_limited else None)

    def rotations(self, skew: Tensor) -> Tensor:
        """R from S, both (blocks, b, b)."""
        if self.limit is not None:
            limit = self.limit / sqrt(skew.shape[0])
            norms = skew.norm(dim=(1, 2), keepdim=True)
            skew = torch.where(norms <= limit, skew, skew * (limit / norms))
        return cayley(skew) if self.terms is None else _neumann(skew, self.terms)


@dataclass(frozen=True, slots=True)
class _Module:
    """OFT of a linear module or of an embedding, which is rotated like an input."""

    path: str
    upper: Tensor
    block: int
    is_shared: bool
    parameterization: _Parameterization
    sizes: tuple[int, int]
    out_features: None = None

    @property
    def in_features(self) -> int | None:
        return None if self.is_shared else self.upper.shape[0] * self.block

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        numbers = self.upper.shape[0] * self.block**2
        yield PrimitiveShape(InputTransform.__name__, self.path, 0, numbers)

    def rotations(self, layout: BaseLayout, width: int) -> Tensor:
        """R (blocks or 1, b, b), float64, for a place of this width."""
        blocks, size = self.sizes
        expected = _divisor(width, size) if size else width // _divisor(width, blocks)
        if self.block != expected or self.in_features not in (None, width):
            raise mismatch(
                layout,
                f"{shown(self.path)} has {width} features here, which the configuration cuts into "
                f"blocks of {expected}; there it has blocks of {self.block}",
            )
        return self.parameterization.rotations(skew_symmetric(self.upper.double(), self.block))


@dataclass(frozen=True, slots=True)
class ParsedOft:
    """An OFT adapter whose configuration and tensors agree.

    Attributes:
        linear: Its linear modules, and tensors of the base.
        embeddings: The others.
    """

    linear: LinearAdapter[_Module]
    embeddings: tuple[_Module, ...]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What they lower to."""
        rotated = (
            PrimitiveShape(EmbeddingRows.__name__, module.path, 0, 0) for module in self.embeddings
        )
        return (*self.linear.shapes, *rotated)

    def lower(self, base: Base) -> Lowered:
        """See ``kind.ParsedAdapter``."""
        (part,) = self.linear.lower(base).parts
        rotated = (_rotated_embedding(base, module) for module in self.embeddings)
        return Lowered((replace(part, primitives=merge((*part.primitives, *rotated))),))


def _read(checkpoint: Checkpoint) -> ParsedOft:
    config = checkpoint.config
    tensors = Tensors.read(config, checkpoint.tensors, (_R, _EMBEDDING_R), _OTHERS)
    sizes = _sizes(config)
    is_shared = flag("block_share", config.get("block_share", False))
    parameterization = _Parameterization.read(config)
    found: dict[str, list[_Module]] = {_R: [], _EMBEDDING_R: []}
    for path, parts in tensors.modules.items():
        if len(parts) != 1:
            raise AdapterCorrupt(f"{shown(path)} is rotated both as embedding and as linear module")
        ((name, upper),) = parts.items()
        found[name].append(_module(path, name, upper, is_shared, parameterization, sizes))
    linear = LinearAdapter(tuple(found[_R]), iter_each(_lower), tensors.saved)
    return ParsedOft(linear, tuple(found[_EMBEDDING_R]))


def _sizes(config: Mapping[str, object]) -> tuple[int, int]:
    """Number of blocks and size of a block, one of which is 0: it follows from the width."""
    if "oft_block_size" not in config:
        raise AdapterUnsupported(
            "the configuration has no 'oft_block_size': PEFT up to 0.13 saved it, and computed "
            "something else: train again with a newer PEFT"
        )
    blocks = count_or_zero("r", config.get("r", 0))
    size = count_or_zero("oft_block_size", config["oft_block_size"])
    if (blocks == 0) == (size == 0):
        raise AdapterCorrupt(f"r is {blocks} and oft_block_size {size}, and one has to be 0")
    return blocks, size


def _module(
    path: str,
    name: str,
    upper: Tensor,
    is_shared: bool,
    parameterization: _Parameterization,
    sizes: tuple[int, int],
) -> _Module:
    if upper.dim() != 2 or upper.shape[0] == 0 or (is_shared and upper.shape[0] != 1):
        raise AdapterCorrupt(f"{shown(path)} has an {name} of {list(upper.shape)}")
    block = (1 + isqrt(1 + 8 * upper.shape[1])) // 2
    if block * (block - 1) // 2 != upper.shape[1]:
        raise AdapterCorrupt(f"{shown(path)} has an {name} of {list(upper.shape)}: no triangles")
    return _Module(path, upper, block, is_shared, parameterization, sizes)


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    rotations = module.rotations(base.layout, target.in_features)
    yield InputTransform(target, rotations=cast(module.path, rotations[None], base.dtype))


def _rotated_embedding(base: Base, module: _Module) -> EmbeddingRows:
    site = embedding_site(base.layout, module.path)
    rotations = module.rotations(base.layout, site.size).float()
    own = base.embedding(site)
    rows = torch.empty_like(own)
    for start in range(0, len(own), _ROWS_AT_ONCE):
        some = own[start : start + _ROWS_AT_ONCE].float()
        blocks = some.view(len(some), -1, module.block)
        rotated = torch.einsum("tkb,kbc->tkc", blocks, rotations.expand(blocks.shape[1], -1, -1))
        rows[start : start + _ROWS_AT_ONCE] = cast(module.path, rotated.flatten(1), base.dtype)
    return EmbeddingRows(site, rows)


def _divisor(width: int, wanted: int) -> int:
    """PEFT's: the divisor of ``width`` that is nearest to ``wanted``, the smaller of two."""
    if wanted >= width:
        return width
    lower = next(size for size in range(wanted, 0, -1) if width % size == 0)
    higher = next(size for size in range(wanted, width + 1) if width % size == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2 S + 2 S² + ... + S^(terms - 1): PEFT's series, whose last term has no factor 2."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(skew.shape[0], 1, 1)
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def _require_series_version(value: object) -> None:
    """PEFT noted its version from 0.18 on, and changed the series' last term then."""
    numbers = value.partition("@")[0].split(".")[:2] if isinstance(value, str) else []
    known = len(numbers) == 2 and all(re.fullmatch("[0-9]{1,5}", number) for number in numbers)
    if known and (int(numbers[0]), int(numbers[1])) >= _FIRST_WITH_THIS_SERIES:
        return
    raise AdapterUnsupported(
        f"use_cayley_neumann is true and peft_version is {shown(value)}: before 0.18 PEFT ended "
        f"the series otherwise. Train again with a newer PEFT, or with use_cayley_neumann=False"
    )


KIND = PeftKind(
    name="oft",
    page=KindPage(
        title="OFT: orthogonal fine-tuning (arXiv:2306.07280)",
        family="reparameterisation",
        files="oft_R.weight (in / b, b (b - 1) / 2) of each module, oft_embedding_R.weight of an "
        "embedding, (1, b (b - 1) / 2) with block_share; fields r, oft_block_size, coft, eps, "
        "block_share, use_cayley_neumann, num_cayley_neumann_terms",
        equation="y = W x' + bias, x'_k = x_k R_k for each block of b numbers; R = (I - S) (I + "
        "S)^-1, or the first terms of its Neumann series; with coft S is cut to the norm eps / "
        "sqrt(blocks)",
        primitives=("InputTransform", "EmbeddingRows"),
        memory="in b a module, b² with block_share; an embedding takes all its rows, rotated "
        "when the adapter is loaded",
        limits="Linear modules and embeddings only, as in PEFT: not GPT-2's Conv1D. Adapters of "
        "PEFT up to 0.15.2 (oft_r), and of PEFT before 0.18 with use_cayley_neumann, are refused: "
        "these versions computed something else.",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {
                "r",
                "oft_block_size",
                "coft",
                "eps",
                "block_share",
                "use_cayley_neumann",
                "num_cayley_neumann_terms",
                "bias",
                "modules_to_save",
            }
        ),
        harmless={**HARMLESS, "module_dropout": "off outside training"},
        refused={},
    ),
    read=_read,
)
