"""IA3 (arXiv:2205.05638) as PEFT stores and computes it.

y = l * (W x + b)      ia3_l (out, 1)
y = W (l * x) + b      ia3_l (1, in), of the modules that PEFT calls feed-forward
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.binding import cast
from ..formats.config_fields import FieldRules, name_list
from ..formats.linear_adapter import HARMLESS, LinearAdapter, PeftKind, Tensors, iter_each
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine, InputTransform
from ..primitives.primitive import Primitive

_NAME, _FIELD = "ia3_l", "feedforward_modules"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    vector: Tensor
    scales_input: bool

    @property
    def in_features(self) -> int | None:
        return self.vector.numel() if self.scales_input else None

    @property
    def out_features(self) -> int | None:
        return None if self.scales_input else self.vector.numel()

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        primitive = InputTransform if self.scales_input else Affine
        yield PrimitiveShape(primitive.__name__, self.path, 0, self.vector.numel())


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    tensors = Tensors.read(checkpoint.config, checkpoint.tensors, (_NAME,))
    modules = tuple(_module(path, parts[_NAME]) for path, parts in tensors.modules.items())
    _require_sides(checkpoint.config, modules)
    return LinearAdapter(modules, iter_each(_lower), tensors.saved, on_conv1d=True)


def _module(path: str, tensor: Tensor) -> _Module:
    """The shape tells which side is scaled; a module as wide as 1 would leave it open."""
    if tensor.dim() != 2 or 1 not in tensor.shape or tensor.numel() < 2:
        raise AdapterCorrupt(
            f"{shown(path)} has an {_NAME} of {list(tensor.shape)}: it is (out, 1) or (1, in)"
        )
    return _Module(path, tensor.flatten(), scales_input=tensor.shape[0] == 1)


def _require_sides(config: Mapping[str, object], modules: Iterable[_Module]) -> None:
    """Check what a list of names says of the sides; of an expression the shapes alone tell."""
    value = config.get(_FIELD)
    if value is None or isinstance(value, str):
        return
    named = name_list(_FIELD, value)
    for module in modules:
        if module.path.endswith(named) is not module.scales_input:
            side = "input" if module.scales_input else "output"
            raise AdapterCorrupt(
                f"{shown(module.path)} has an {_NAME} of its {side}, and the config field "
                f"{_FIELD!r} says otherwise"
            )


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    scale = cast(module.path, module.vector, base.dtype)
    if module.scales_input:
        yield InputTransform(target, scale=scale)
    else:
        yield Affine(target, scale=scale)


KIND = PeftKind(
    name="ia3",
    page=KindPage(
        title="IA3 (arXiv:2205.05638)",
        family="addition",
        files="ia3_l of each module: (out, 1), or (1, in) for feed-forward modules",
        equation="y = l * (W x + b), the bias scaled too; feed-forward: y = W (l * x) + b",
        primitives=("Affine", "InputTransform"),
        memory="out numbers a module, in for feed-forward ones",
        limits="A module that is adapted and replaced by modules_to_save as well is refused.",
    ),
    rules=FieldRules(
        implemented=frozenset({"feedforward_modules", "modules_to_save"}),
        harmless={
            **HARMLESS,
            "init_ia3_weights": "initialization only",
        },
        refused={},
    ),
    read=_read,
)
