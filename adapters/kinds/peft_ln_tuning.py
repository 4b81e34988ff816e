"""LayerNorm tuning (arXiv:2312.11420) as PEFT stores and computes it: norms with new weights.

PEFT puts a trained copy of a module in its place, which need not be a norm. Its tensors are
``<path>.ln_tuning_layers.weight`` and, where the module has one, ``.bias``.
"""

from dataclasses import dataclass, replace

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.config_fields import FieldRules
from ..formats.linear_adapter import HARMLESS, PeftKind, Tensors
from ..formats.peft_saved import SavedTensors
from ..formats.peft_tensors import required
from ..kind import KindPage, Lowered, PrimitiveShape
from ..primitives.lowered import Part
from ..scope import EveryPosition

_MARK = "ln_tuning_layers."
_WEIGHT, _BIAS = f"{_MARK}weight", f"{_MARK}bias"


@dataclass(frozen=True, slots=True)
class _ParsedNorms:
    """The copies, and what else is replaced, by the names of the base's tensors."""

    tensors: SavedTensors

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return self.tensors.shapes

    def lower(self, base: Base) -> Lowered:
        norms, replaced = base.layout.norms_by_path, self.tensors.replaced
        for name in replaced:
            path = name.rpartition(".")[0]
            if path in norms and norms[path].has_bias and f"{path}.bias" not in replaced:
                raise AdapterCorrupt(f"{shown(path)} has no bias: the weight file is incomplete")
        return Lowered((Part(EveryPosition(), self.tensors.lower(base)),))


def _read(checkpoint: Checkpoint) -> _ParsedNorms:
    found = Tensors.read(checkpoint.config, checkpoint.tensors, (_WEIGHT, _BIAS))
    copies = {
        f"{path}.{suffix.removeprefix(_MARK)}": tensor
        for path, parts in found.modules.items()
        for suffix, tensor in parts.items()
    }
    for path, parts in found.modules.items():
        required(path, parts, _WEIGHT)
    others = found.saved.replaced
    for name in copies.keys() & (others.keys() | found.saved.copies.keys()):
        raise AdapterCorrupt(f"{shown(name)} is in the weight file twice")
    return _ParsedNorms(replace(found.saved, replaced={**copies, **others}))


KIND = PeftKind(
    name="ln_tuning",
    page=KindPage(
        title="LN tuning (arXiv:2312.11420)",
        family="specification",
        files="ln_tuning_layers.weight (size,) of each norm, and ln_tuning_layers.bias where it "
        "has one; the new values, not differences",
        equation="y = g' normalized(x) + b'",
        primitives=("NormOverride",),
        memory="size numbers a norm, twice that with a bias",
        limits="None: a target that is no norm is replaced as modules_to_save would replace it.",
    ),
    rules=FieldRules(implemented=frozenset({"modules_to_save"}), harmless=HARMLESS, refused={}),
    read=_read,
)
