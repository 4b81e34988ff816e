"""The tensors of an adapter as AdapterHub names them: ``<path>.<container>.<adapter>.<tensor>``.

    model.layers.0.output_adapters.adapters.foo.adapter_up.weight

Modules are found by these names; the configuration is checked against them.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..layout import BaseLayout
from .binding import mismatch
from .peft_patterns import MAX_PATH_LENGTH
from .peft_tensors import require_float

BOTTLENECKS, INVERTIBLE = "adapters", "invertible_adapters"
LORAS, REFTS, SHARED = "loras", "refts", "shared_parameters"
PREFIXES, PREFIX_GATES, PROMPTS = "prefix_tunings", "prefix_gates", "prompt_tunings"
_CONTAINERS = (
    BOTTLENECKS,
    INVERTIBLE,
    LORAS,
    REFTS,
    SHARED,
    PREFIXES,
    PREFIX_GATES,
    PROMPTS,
)

MAX_LAYER = 100_000

Modules = Mapping[str, Mapping[str, Tensor]]
"""Path -> name below the adapter's -> tensor, in the order of the paths."""

Tensors = Mapping[str, Modules]
"""Container -> modules."""


def sort_tensors(tensors: Mapping[str, Tensor], adapter: str, stem: str) -> Tensors:
    """Sort the tensors by container and module.

    Args:
        tensors: By their names in the file.
        adapter: Its name.
        stem: Path of the base model within one with a head. Paths begin with it, also where the
            adapter was saved from a model without a head.

    Raises:
        AdapterUnsupported: A tensor has another name, or does not hold floats.
        AdapterCorrupt: There are no tensors.
    """
    names = "|".join(_CONTAINERS)
    limit = MAX_PATH_LENGTH
    pattern = re.compile(
        rf"(?:(.{{1,{limit}}}?)\.)?({names})\.{re.escape(adapter)}\.(.{{1,{limit}}})"
    )
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in sorted(tensors.items()):
        match = pattern.fullmatch(name)
        if match is None:
            raise AdapterUnsupported(
                f"the tensor {shown(name)} is not served: AdapterHub gives a tensor of the adapter "
                f"{shown(adapter)} no such name"
            )
        require_float(name, tensor)
        modules = found.setdefault(match[2], {})
        modules.setdefault(_absolute(match[1] or "", stem), {})[match[3]] = tensor
    if not found:
        raise AdapterCorrupt("the weight file holds no tensor at all")
    return found


def check_names(path: str, tensors: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Require the module to hold exactly these tensors.

    Raises:
        AdapterCorrupt: One is missing.
        AdapterUnsupported: There is another.
    """
    wanted = set(expected)
    for name in sorted(wanted - tensors.keys()):
        raise AdapterCorrupt(f"{shown(path)} has no {name}: the weight file is incomplete")
    for name in sorted(tensors.keys() - wanted):
        raise AdapterUnsupported(
            f"the tensor {shown(name)} of {shown(path)} is not served: its configuration has none"
        )


def check_shape(path: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Require a shape that follows from the configuration or another tensor, or AdapterCorrupt."""
    if tuple(tensor.shape) != shape:
        raise AdapterCorrupt(
            f"{name} of {shown(path)} is {list(tensor.shape)}, and not {list(shape)}"
        )


def read_layers(name: str, value: object) -> frozenset[int]:
    """A list of layer numbers, or AdapterCorrupt."""
    if not isinstance(value, list) or not all(_is_layer(each) for each in value):
        raise AdapterCorrupt(f"the config field {name!r} is {shown(value)}, not a list of layers")
    return frozenset(value)


def check_layers(layout: BaseLayout, found: Iterable[int], left_out: frozenset[int]) -> None:
    """Require tensors in every layer of the base but those that were left out.

    Raises:
        AdapterMismatch: There are others: the adapter was made for another number of layers.
    """
    expected = {layer.index for layer in layout.layers} - left_out
    missing = sorted(expected.symmetric_difference(found))
    if missing:
        raise mismatch(
            layout,
            f"it adapts the layers {shown(sorted(found), 80)}, and its configuration leaves out "
            f"{shown(sorted(left_out), 80)}",
        )


def layer_number(path: str) -> int:
    """The number of the layer that a path leads through, or AdapterUnsupported."""
    match = re.fullmatch(r"\w{1,64}\.(?:layers|h)\.(\d{1,5})(?:\..*)?", path)
    if match is None:
        raise AdapterUnsupported(f"{shown(path)} is not in a layer of a decoder that is served")
    return int(match[1])


def _absolute(path: str, stem: str) -> str:
    if path == stem or path.startswith(f"{stem}."):
        return path
    return f"{stem}.{path}" if path else stem


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_LAYER
