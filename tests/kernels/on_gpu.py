"""Operations whose operands lie on the CPU and are computed on a GPU: one set of tests for both.

A call's tensors are moved with the whole memory they are views of, so that on the device they have
the strides, the neighbours and the overlaps they have on the CPU. Then all of that memory is copied
back: what the operation changed has changed, and so has what it should not have touched.
"""

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

ON_GPU = os.environ.get("DELTAMUX_TEST_GPU") == "1"
"""Whether this process tests a real GPU instead of Triton's interpreter."""

DEVICE = torch.device("cuda")

Op = TypeVar("Op", bound=Callable[..., Any])
Bundle = TypeVar("Bundle")


def placed(operation: Op) -> Op:
    """The operation as tests call it here: as it is, or with its operands on the GPU."""
    return moved(operation, DEVICE) if ON_GPU else operation


def all_moved(operations: Bundle, device: torch.device) -> Bundle:
    """A dataclass of operations, or of such dataclasses, with every one of them ``moved``."""
    found = {field.name: getattr(operations, field.name) for field in fields(operations)}
    return replace(operations, **{name: _moved(value, device) for name, value in found.items()})


def moved(operation: Op, device: torch.device) -> Op:
    """The operation on operands of the CPU, computed on the device."""

    def run(*arguments: object) -> object:
        memory = _Memory(device)
        result = operation(*(memory.there(each) for each in arguments))
        memory.copy_back()
        # What is prepared once, a base's product, keeps its weight on the device.
        return moved(result, device) if callable(result) else _here(result)

    return run


class _Memory:
    """What one call's operands are views of, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        """Bytes here and on the device, by their address here."""

    def there(self, argument: Any) -> Any:
        """A tensor on the device; what holds tensors, with those; anything else as it is."""
        if isinstance(argument, Tensor):
            return self._view(argument)
        if is_dataclass(argument) and not isinstance(argument, type):
            values = {field.name: getattr(argument, field.name) for field in fields(argument)}
            return replace(argument, **{name: self.there(each) for name, each in values.items()})
        return argument

    def copy_back(self) -> None:
        """Everything, so that a write to the wrong place shows."""
        for here, there in self._twins.values():
            here.copy_(there)

    def _view(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._twins:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            twin = here.to(self._device, copy=True)
            self._twins[storage.data_ptr()] = here, twin
        twin = self._twins[storage.data_ptr()][1]
        view = torch.empty(0, dtype=tensor.dtype, device=self._device)
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        return view.set_(twin.untyped_storage(), *place)


def _moved(value: Any, device: torch.device) -> Any:
    if is_dataclass(value):
        return all_moved(value, device)
    return moved(value, device) if callable(value) else value


def _here(result: object) -> object:
    return result.cpu() if isinstance(result, Tensor) else result
