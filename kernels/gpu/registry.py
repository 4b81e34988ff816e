"""Registers GPU operations with torch, so that a step can be traced without a GPU.

``torch.library``'s low-level interface, not its ``custom_op``: a decode step calls hundreds of
these, and the wrapper's bookkeeping would cost more host time than the launch.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("deltamux", "DEF")
_DEVICES = ("CUDA", "CPU")
"""The CPU runs them under Triton's interpreter."""


def register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A torch operation ``deltamux::<name of the schema>``.

    Args:
        schema: In torch's notation; tensors that are changed are marked ``Tensor(a!)``.
        run: Launches the kernels.
        fake: What it returns, as tensors without memory; by default it returns nothing.
    """
    name = _LIBRARY.define(schema)
    for device in _DEVICES:
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"deltamux::{name}", fake or _nothing, lib=_LIBRARY)
    return getattr(torch.ops.deltamux, name).default  # type: ignore[no-any-return]


def _nothing(*_: object) -> None:
    """What operations return that change a tensor in place."""
