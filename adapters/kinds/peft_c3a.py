"""C3A (arXiv:2407.19342) as PEFT stores and computes it.

    y_m[p] += 1 / in  sum_n sum_q K[m, n, (q - p) mod b] x_n[q],

with ``c3a_kernel`` K (out / b, in / b, b) and x and y in blocks of b: a matrix of circulant blocks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..formats.binding import cast
from ..formats.config_fields import FieldRules
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    iter_each,
    require_listed,
    require_shape,
)
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Circulant
from ..primitives.primitive import Primitive

_KERNEL = "c3a_kernel"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    kernel: Tensor

    @property
    def in_features(self) -> int:
        return self.kernel.shape[1] * self.kernel.shape[2]

    @property
    def out_features(self) -> int:
        return self.kernel.shape[0] * self.kernel.shape[2]

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield PrimitiveShape(Circulant.__name__, self.path, 0, self.kernel.numel())


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    tensors = Tensors.read(config, checkpoint.tensors, (_KERNEL,))
    modules = tuple(_module(path, parts, config) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _module(path: str, parts: Mapping[str, Tensor], config: Mapping[str, object]) -> _Module:
    (kernel,) = required(path, parts, _KERNEL)
    require_shape(path, _KERNEL, kernel, None, None, None)
    require_listed(path, config, "block_size", 256, kernel.shape[2])
    return _Module(path, kernel)


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    kernel = module.kernel.float() / target.in_features
    yield Circulant(target, cast(module.path, kernel, base.dtype))


KIND = PeftKind(
    name="c3a",
    page=KindPage(
        title="C3A: circular convolution adaptation (arXiv:2407.19342)",
        family="reparameterisation",
        files="c3a_kernel (out / b, in / b, b) of each module; fields block_size, "
        "block_size_pattern",
        equation="y_m[p] += 1 / in sum_n sum_q K[m, n, (q - p) mod b] x_n[q]",
        primitives=("Circulant",),
        memory="in out / b a module",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D.",
    ),
    rules=FieldRules(
        implemented=frozenset({"block_size", "block_size_pattern", "bias", "modules_to_save"}),
        harmless=HARMLESS,
        refused={},
    ),
    read=_read,
)
