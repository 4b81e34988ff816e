"""LoKr (LyCORIS, arXiv:2309.14859) as PEFT stores and computes it.

    y += s kron(W1, W2) x,   s = alpha / r,

with W1 (l, m) ``lokr_w1``, W2 (k, n) ``lokr_w2``, out = l k and in = m n. Either may be stored as a
product: W1 = ``lokr_w1_a`` (l, r) ``lokr_w1_b`` (r, m), W2 = ``lokr_w2_a`` (k, r) ``lokr_w2_b``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.binding import cast
from ..formats.config_fields import FieldRules, flag
from ..formats.linear_adapter import LinearAdapter, PeftKind, Tensors, iter_each, require_shape
from ..formats.lycoris import CONVOLUTIONS, IMPLEMENTED, LYCORIS_HARMLESS, LycorisScalars
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Kronecker
from ..primitives.primitive import Primitive

_BOTH = "decompose_both"
_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True, slots=True)
class _Factor:
    """One factor of the Kronecker product: ``up`` @ ``down``, or ``down`` alone."""

    down: Tensor
    up: Tensor | None

    @property
    def rows(self) -> int:
        return self.down.shape[0] if self.up is None else self.up.shape[0]

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    @property
    def longest(self) -> int:
        return max(self.rows, self.columns)

    @property
    def is_smaller_whole(self) -> bool:
        """Whether the product takes no more than its factors."""
        if self.up is None:
            return True
        return self.rows * self.columns <= self.up.numel() + self.down.numel()

    @property
    def num_elements(self) -> int:
        """In the smaller of both forms."""
        if self.up is None or self.is_smaller_whole:
            return self.rows * self.columns
        return self.up.numel() + self.down.numel()

    def whole(self) -> Tensor:
        """(rows, columns), float32."""
        return self.down.float() if self.up is None else self.up.float() @ self.down.float()


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    left: _Factor
    right: _Factor
    scale: float

    @property
    def in_features(self) -> int:
        return self.left.columns * self.right.columns

    @property
    def out_features(self) -> int:
        return self.left.rows * self.right.rows

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        left = self.left.rows * self.left.columns
        yield PrimitiveShape(Kronecker.__name__, self.path, 0, left + self.right.num_elements)


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    tensors = Tensors.read(
        checkpoint.config, checkpoint.tensors, _NAMES, ((".lokr_t2", CONVOLUTIONS),)
    )
    scalars = LycorisScalars.read(checkpoint.config, len(tensors.modules))
    both = flag(_BOTH, checkpoint.config.get(_BOTH, False))
    modules = tuple(_module(path, parts, scalars, both) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _module(path: str, parts: Mapping[str, Tensor], scalars: LycorisScalars, both: bool) -> _Module:
    rank = scalars.rank(path)
    left, right = (_factor(path, parts, name, rank) for name in ("lokr_w1", "lokr_w2"))
    for name, factor, may_be_product in (("lokr_w1", left, both), ("lokr_w2", right, True)):
        # PEFT's rule: without it, a rank that no tensor shows would go into the scale unseen.
        if (factor.up is not None) is not (may_be_product and 2 * rank < factor.longest):
            raise AdapterCorrupt(
                f"{shown(path)} has a {name} of {factor.rows} by {factor.columns} "
                f"{'whole' if factor.up is None else 'as a product'}, which contradicts r {rank} "
                f"and {_BOTH} {both}"
            )
    return _Module(path, left, right, scalars.scale(path))


def _factor(path: str, parts: Mapping[str, Tensor], name: str, rank: int) -> _Factor:
    up, down = f"{name}_a", f"{name}_b"
    if name in parts:
        if up in parts or down in parts:
            raise AdapterCorrupt(f"{shown(path)} has {name} both whole and as a product")
        require_shape(path, name, parts[name], None, None)
        return _Factor(parts[name], None)
    a, b = required(path, parts, up, down)
    require_shape(path, up, a, None, rank)
    require_shape(path, down, b, rank, None)
    return _Factor(b, a)


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    def stored(tensor: Tensor) -> Tensor:
        return cast(module.path, tensor, base.dtype)

    left, right = stored(module.left.whole() * module.scale), module.right
    if right.up is None or right.is_smaller_whole:
        yield Kronecker(target, left, stored(right.whole()))
    else:
        yield Kronecker(target, left, stored(right.down.float()), stored(right.up.float()))


KIND = PeftKind(
    name="lokr",
    page=KindPage(
        title="LoKr: low-rank Kronecker product (LyCORIS, arXiv:2309.14859)",
        family="reparameterisation",
        files="lokr_w1 (l, m) or lokr_w1_a (l, r) and lokr_w1_b (r, m), lokr_w2 (k, n) or "
        "lokr_w2_a (k, r) and lokr_w2_b (r, n) of each module, out = l k and in = m n; fields r, "
        "alpha, rank_pattern, alpha_pattern, decompose_both",
        equation="y += alpha / r kron(w1, w2) x, never expanded: Y += alpha / r w1 X w2ᵀ with "
        "X = x.view(m, n) and Y = y.view(l, k)",
        primitives=("Kronecker",),
        memory="l m + k n a module; l m + r (k + n) where w2 is a product and that is less",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D. Factors of convolutions "
        "(lokr_t2) are refused.",
    ),
    rules=FieldRules(
        implemented=IMPLEMENTED | {_BOTH},
        harmless={
            **LYCORIS_HARMLESS,
            "rank_dropout_scale": "off outside training",
            "decompose_factor": "decides the tensors' shapes, which are read from them",
        },
        refused={},
    ),
    read=_read,
)
