"""Tensor names as PEFT writes them: ``base_model.model.<module path>.<tensor>``."""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from .peft_patterns import MAX_PATH_LENGTH

PREFIX = "base_model.model."

Reasons = Sequence[tuple[str, str]]
"""Fragments of names of tensors that are not served, and why; the first that is found counts."""


def by_module(
    tensors: Mapping[str, Tensor], suffixes: Collection[str], others: Reasons = ()
) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors by module: path -> {suffix: tensor}, in the order of the paths.

    Args:
        tensors: By their names in the file.
        suffixes: What may stand behind the path: ``lora_A.weight``.
        others: Why known other tensors are not served.

    Raises:
        AdapterUnsupported: A tensor has another name, or does not hold floats.
        AdapterCorrupt: There are no tensors.
    """
    names = "|".join(re.escape(suffix) for suffix in sorted(suffixes, key=len, reverse=True))
    pattern = re.compile(rf"{re.escape(PREFIX)}(.{{1,{MAX_PATH_LENGTH}}}?)\.({names})")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = pattern.fullmatch(name)
        if match is None:
            raise unserved_tensor(name, others)
        require_float(name, tensor)
        modules.setdefault(match[1], {})[match[2]] = tensor
    if not modules:
        raise no_tensor()
    return modules


def no_tensor() -> AdapterCorrupt:
    """The refusal of a file without a tensor of its kind's own."""
    return AdapterCorrupt("the weight file holds no tensor at all of the adapter's own")


def unserved_tensor(name: str, others: Reasons = ()) -> AdapterUnsupported:
    """The refusal of a tensor by its name."""
    reason = next(
        (reason for fragment, reason in others if fragment in name),
        "its name is not one that PEFT gives a tensor of this kind",
    )
    return AdapterUnsupported(f"the tensor {shown(name)} is not served: {reason}")


def require_float(name: str, tensor: Tensor) -> None:
    """Raise AdapterUnsupported unless the tensor holds floats."""
    if not tensor.is_floating_point():
        raise AdapterUnsupported(f"the tensor {shown(name)} is {tensor.dtype}, not a float")


def required(path: str, parts: Mapping[str, Tensor], *suffixes: str) -> tuple[Tensor, ...]:
    """The module's tensors of these suffixes.

    Raises:
        AdapterCorrupt: One is missing.
    """
    for suffix in suffixes:
        if suffix not in parts:
            raise AdapterCorrupt(f"{shown(path)} has no {suffix}: the weight file is incomplete")
    return tuple(parts[suffix] for suffix in suffixes)
