"""What an adapter kind is to the rest: a module in ``kinds/`` with one object ``KIND`` like this.

A kind works in two halves. *Parsing* checks the configuration and the tensors by themselves and
needs no base model; *lowering* binds what was parsed to the modules of one base. Describing an
adapter needs the first half only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .checkpoint import Checkpoint
from .layout import BaseLayout
from .primitives import Primitive


@dataclass(frozen=True, slots=True)
class PrimitiveShape:
    """A primitive before it is bound to a base.

    Attributes:
        primitive: Name of the class in ``primitives``.
        path: Module path that the adapter names.
        rank: Rank of a low-rank primitive, 0 for others.
        num_elements: Numbers it will store.
    """

    primitive: str
    path: str
    rank: int
    num_elements: int


class ParsedAdapter(Protocol):
    """An adapter whose configuration and tensors agree with each other."""

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What it lowers to, on whatever base it was made for."""
        ...

    def lower(self, layout: BaseLayout, dtype: torch.dtype) -> tuple[Primitive, ...]:
        """Its primitives in ``dtype`` on one base, in the order of the base's targets.

        Raises:
            AdapterMismatch: The adapter was made for another base.
        """
        ...


class AdapterKind(Protocol):
    """One way of fine-tuning, as one library stores it."""

    @property
    def name(self) -> str:
        """``lora``, ..."""
        ...

    @property
    def library(self) -> str:
        """``peft``, ..."""
        ...

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether a folder with this configuration is of this kind."""
        ...

    def parse(self, checkpoint: Checkpoint) -> ParsedAdapter:
        """Check the checkpoint and take it apart.

        Raises:
            AdapterUnsupported: A field, a value or a tensor that is not served; names it.
            AdapterCorrupt: Configuration and tensors contradict each other.
        """
        ...
