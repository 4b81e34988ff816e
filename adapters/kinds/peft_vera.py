"""VeRA (arXiv:2310.11454) as PEFT stores and computes it.

    y += diag(d') B diag(d) A x,

with A (r, in) and B (out, r) cut out of two matrices that all modules share, ``vera_A`` and
``vera_B``, and the trained d (r,) ``vera_lambda_d`` and d' (out,) ``vera_lambda_b``. The shared
matrices are in the file, or are drawn again from the configuration's seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt
from ..formats.binding import cast, mismatch
from ..formats.config_fields import FieldRules, flag
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    bounded_rank,
    require_shape,
)
from ..formats.peft_tensors import require_float, required
from ..formats.projections import draw_vera, require_drawable, seeded
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine, Dense
from ..primitives.primitive import Primitive

_A, _B = "base_model.vera_A", "base_model.vera_B"
_D, _B_SCALE = "vera_lambda_d", "vera_lambda_b"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    d: Tensor
    b: Tensor
    in_features: None = None

    @property
    def out_features(self) -> int:
        return self.b.numel()

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        rank = self.d.numel()
        yield PrimitiveShape(Affine.__name__, self.path, rank, rank * self.out_features)


@dataclass(frozen=True, slots=True)
class _Projections:
    """A (r, widest in) and B (widest out, r), or the seed that they are drawn from."""

    rank: int
    stored: tuple[Tensor, Tensor] | None
    seed: object

    def get(self, base: Base, targets: Sequence[LinearTarget]) -> tuple[Tensor, Tensor]:
        width = max(target.in_features for target in targets)
        out = max(target.out_features for target in targets)
        if self.stored is None:
            require_drawable(self.rank, width, out)
            return draw_vera(seeded("projection_prng_key", self.seed), self.rank, width, out)
        a, b = self.stored
        if (a.shape[1], b.shape[0]) != (width, out):
            raise mismatch(
                base.layout,
                f"its modules read up to {a.shape[1]} and give up to {b.shape[0]} features there, "
                f"{width} and {out} here",
            )
        return a, b

    def lower(
        self, base: Base, bound: Sequence[tuple[LinearTarget, _Module]]
    ) -> Iterator[Primitive]:
        a, b = self.get(base, [target for target, _ in bound])
        shared: dict[int, Tensor] = {}
        for target, module in bound:
            width, out = target.in_features, target.out_features
            scaled = module.b.float()[:, None] * b[:out].float() * module.d.float()
            if self.rank >= width:
                delta = scaled @ a[:, :width].float()
                yield Dense(target, cast(module.path, delta, base.dtype))
                continue
            if width not in shared:
                shared[width] = cast(_A, a[:, :width], base.dtype)
            yield Affine(target, a=shared[width], b=cast(module.path, scaled.T, base.dtype))


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    rank = bounded_rank("r", checkpoint.config.get("r", 256))
    names = {name: tensor for name, tensor in checkpoint.tensors.items() if name in (_A, _B)}
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in names}
    tensors = Tensors.read(checkpoint.config, rest, (_D, _B_SCALE))
    modules = tuple(_module(path, parts, rank) for path, parts in tensors.modules.items())
    projections = _projections(checkpoint.config, names, rank)
    return LinearAdapter(modules, projections.lower, tensors.saved, on_conv1d=True)


def _module(path: str, parts: Mapping[str, Tensor], rank: int) -> _Module:
    d, b = required(path, parts, _D, _B_SCALE)
    require_shape(path, _D, d, rank)
    require_shape(path, _B_SCALE, b, None)
    return _Module(path, d, b)


def _projections(
    config: Mapping[str, object], stored: Mapping[str, Tensor], rank: int
) -> _Projections:
    seed = config.get("projection_prng_key", 0)
    seeded("projection_prng_key", seed)
    if not flag("save_projection", config.get("save_projection", True)):
        if stored:
            raise AdapterCorrupt("save_projection is false, and vera_A or vera_B is in the file")
        return _Projections(rank, None, seed)
    if set(stored) != {_A, _B}:
        raise AdapterCorrupt("save_projection is true, and vera_A or vera_B is not in the file")
    for name, tensor in stored.items():
        require_float(name, tensor)
    require_shape(_A, "tensor", stored[_A], rank, None)
    require_shape(_B, "tensor", stored[_B], None, rank)
    return _Projections(rank, (stored[_A], stored[_B]), seed)


KIND = PeftKind(
    name="vera",
    page=KindPage(
        title="VeRA: vector-based random matrix adaptation (arXiv:2310.11454)",
        family="reparameterisation",
        files="vera_lambda_d (r,) and vera_lambda_b (out,) of each module, and once vera_A (r, "
        "widest in) and vera_B (widest out, r); fields r, projection_prng_key, save_projection",
        equation="y += diag(lambda_b) B diag(lambda_d) A x, A and B cut to the module's widths. "
        "With save_projection=false A and B are drawn again from projection_prng_key as PEFT does",
        primitives=("Affine", "Dense"),
        memory="r out a module, and r in once for each width of input: modules share A; in out a "
        "module where r is at least in",
        limits="A file with save_projection=false gives the trained answer only where torch draws "
        "the same numbers, as in PEFT; matrices of more than four times the largest module are "
        "not drawn.",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {"r", "projection_prng_key", "save_projection", "bias", "modules_to_save"}
        ),
        harmless={
            **HARMLESS,
            "vera_dropout": "off outside training",
            "d_initial": "initialization only",
        },
        refused={},
    ),
    read=_read,
)
