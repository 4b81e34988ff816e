"""Two lowered adapters are the same if everything they are made of is, bit by bit."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.kind import Lowered


def fingerprint(lowered: Lowered) -> object:
    """What can be compared with ``==``: types, places, scopes, shapes and bytes."""
    return _of(lowered)


def stored_tensors(lowered: Lowered) -> list[Tensor]:
    """What it lays on the device, shared tensors once."""
    found = {id(t): t for part in lowered.parts for each in part.primitives for t in each.tensors}
    prefix = () if lowered.prefix is None else lowered.prefix.tensors
    return [*found.values(), *prefix]


def _of(value: Any) -> object:
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8)
        return (tuple(value.shape), str(value.dtype), raw.numpy().tobytes())
    if is_dataclass(value):
        return (type(value), *(_of(getattr(value, each.name)) for each in fields(value)))
    return tuple(map(_of, value)) if isinstance(value, tuple | list) else value
