"""deltamux's own format for methods without one: a note of the method, and plain tensors.

    delta_config.json    {"delta_type": ..., "mode": "replace" or "add", "base_model": a note}
    delta.safetensors    tensors by their names in the base's ``state_dict``

Whoever trains such a delta has a model and its parameters, and can write these two files without
any library. Names may carry what PEFT puts into them: ``base_model.model.`` and ``.base_layer.``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..files import PLAIN
from ..kind import KindPage, Lowered, ParsedAdapter, PrimitiveShape
from ..layout import BaseLayout
from ..primitives.lowered import Part
from ..scope import EveryPosition
from .binding import mismatch
from .config_fields import FieldRules
from .overrides import Mode, override_primitives, override_shapes, tensor_shape
from .peft_tensors import PREFIX, require_float

_DELTA_TYPE = "delta_type"
_NOTES: Mapping[str, str] = {
    _DELTA_TYPE: "chose the kind",
    "base_model": "a note; whether the base fits is checked by names and shapes",
}

Restrict = Callable[[BaseLayout, Iterable[str]], None]
"""Raises an AdapterError if a kind does not allow tensors of these names on the base."""


@dataclass(frozen=True, slots=True)
class PlainKind:
    """One ``delta_type``; see ``kind.AdapterKind``.

    Attributes:
        name: The ``delta_type``.
        page: Its documentation.
        read: From a checkpoint whose fields were checked to what it holds.
        implemented: Fields of its own.
        library: The plain format.
    """

    name: str
    page: KindPage
    read: Callable[[Checkpoint], ParsedAdapter]
    implemented: frozenset[str] = frozenset({"mode"})
    library: str = PLAIN

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether the configuration's ``delta_type`` is this one."""
        return config.get(_DELTA_TYPE) == self.name

    def parse(self, checkpoint: Checkpoint) -> ParsedAdapter:
        """Check every field, then every tensor; see ``kind.AdapterKind``."""
        FieldRules(self.implemented, _NOTES, {}).check(checkpoint.config)
        return self.read(checkpoint)


def _allow_all(_layout: BaseLayout, _names: Iterable[str]) -> None:
    """Any tensor of the base."""


@dataclass(frozen=True, slots=True)
class PlainDelta:
    """Tensors that take the place of the base's, or are added to them.

    Attributes:
        tensors: By their names in the base's ``state_dict``.
        mode: What they are.
        restrict: What the kind allows.
    """

    tensors: Mapping[str, Tensor]
    mode: Mode
    restrict: Restrict = field(default=_allow_all)

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What the tensors lower to."""
        return override_shapes(self.tensors)

    def lower(self, base: Base) -> Lowered:
        """Bind the tensors to the base; see ``kind.ParsedAdapter``."""
        self.restrict(base.layout, self.tensors)
        require_both_of_tied(base.layout, self.tensors)
        primitives = override_primitives(base, self.tensors, self.mode)
        return Lowered((Part(EveryPosition(), primitives),))


def read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors by their names in the base's ``state_dict``.

    Raises:
        AdapterCorrupt: There are none, or two of one name.
        AdapterUnsupported: One does not hold floats.
    """
    named = {state_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    if len(named) < len(checkpoint.tensors):
        raise AdapterCorrupt("the weight file holds a tensor under two names")
    if not named:
        raise AdapterCorrupt("the weight file holds no tensor at all")
    for name, tensor in named.items():
        require_float(name, tensor)
    return named


def read_mode(config: Mapping[str, object]) -> Mode:
    """The field ``mode``, or AdapterCorrupt: what the tensors are cannot be guessed."""
    match config.get("mode"):
        case "replace":
            return "replace"
        case "add":
            return "add"
        case value:
            raise AdapterCorrupt(
                f"the config field 'mode' is {shown(value)}, neither 'replace' nor 'add'"
            )


def state_name(name: str) -> str:
    """The name without what PEFT puts into it."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def require_both_of_tied(layout: BaseLayout, names: Iterable[str]) -> None:
    """Embedding and head may be one tensor, and a delta of it may be meant for one or for both.

    Raises:
        AdapterUnsupported: The base is such, and only one of the two is named.
    """
    pair = {f"{layout.token_embedding.path}.weight", f"{layout.head_path}.weight"}
    present = pair & set(names)
    if layout.tied_head and len(present) == 1:
        (given,), (other,) = present, pair - present
        raise AdapterUnsupported(
            f"{given} and {other} are one weight in this base, and the delta has only the first: "
            f"give both, the same if both change; the base's own value, or zeros in the mode "
            f"'add', leaves one as it is"
        )


def require_last_layers(layout: BaseLayout, names: Iterable[str]) -> None:
    """Of a base frozen but for its last layers, only what comes from some layer on may change.

    Raises:
        AdapterMismatch: A tensor before that, or a layer without one: another depth, it seems.
    """
    changed: set[int] = set()
    for name in names:
        tensor_shape(layout, name)
        changed |= _layers_of(layout, name)
    last = set(range(min(changed, default=layout.num_layers), layout.num_layers))
    if changed != last:
        missing = ", ".join(layout.layers[index].path for index in sorted(last - changed)[:4])
        raise mismatch(layout, f"it changes {layout.layers[min(changed)].path}, but not {missing}")


def _layers_of(layout: BaseLayout, name: str) -> set[int]:
    """The layer that the tensor is in, none for what comes behind all layers."""
    found = {layer.index for layer in layout.layers if name.startswith(f"{layer.path}.")}
    path = name.rpartition(".")[0]
    if not found and path not in (layout.head_path, layout.norms[-1].path):
        raise mismatch(layout, f"{shown(name)} is before its last layers, which are frozen")
    return found
