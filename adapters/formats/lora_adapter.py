"""An adapter of the LoRA family: low-rank corrections, and tensors that PEFT saves beside them."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..base import Base
from ..errors import AdapterUnsupported, shown
from ..kind import Lowered, PrimitiveShape
from ..primitives.lowered import Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition, FromInvocation
from .lora_modules import LoraModule
from .overrides import merge
from .peft_saved import SavedTensors, replaced_weights, require_whole_rows


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """Configuration and tensors agree.

    Attributes:
        modules: Adapted modules, with different paths.
        saved: Everything else in the file.
        invocation: aLoRA's tokens: the modules are corrected from their last occurrence on.
    """

    modules: tuple[LoraModule, ...]
    saved: SavedTensors
    invocation: tuple[int, ...] = ()

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """See ``kind.ParsedAdapter``."""
        return (*(module.shape for module in self.modules), *self.saved.shapes)

    def lower(self, base: Base) -> Lowered:
        """See ``kind.ParsedAdapter``. What is replaced is so everywhere, as in PEFT."""
        saved = self.saved.lower(base)
        self._require_own_weights(replaced_weights(saved))
        corrections = tuple(module.lower(base) for module in self.modules)
        require_whole_rows((*saved, *corrections))
        return Lowered(self._parts(saved, corrections))

    def _parts(
        self, saved: tuple[Primitive, ...], corrections: tuple[Primitive, ...]
    ) -> tuple[Part, ...]:
        if not self.invocation:
            return (Part(EveryPosition(), merge((*saved, *corrections))),)
        invoked = Part(FromInvocation(self.invocation), merge(corrections))
        return (Part(EveryPosition(), saved), invoked) if saved else (invoked,)

    def _require_own_weights(self, replaced: frozenset[str]) -> None:
        """Only a plain sum can stand beside a weight that is not the base's."""
        for module in self.modules:
            if module.path in replaced and (module.reads_base or self.invocation):
                raise AdapterUnsupported(
                    f"the weight of {shown(module.path)} in the file is not the base's, and what "
                    f"the adapter computes depends on it: train it on the base that is served"
                )


def require_apart(modules: Mapping[str, object], saved: SavedTensors) -> None:
    """Raise AdapterUnsupported if an adapted module has rows of trained tokens as well."""
    for path in saved.tokens:
        if path in modules:
            raise AdapterUnsupported(
                f"{shown(path)} has rows of trained tokens and is adapted as well: PEFT does one"
            )
