"""What an adapter kind is to the rest: a module in ``kinds/`` with one object ``KIND`` like this.

A kind works in two halves. *Parsing* checks the configuration and the tensors by themselves and
needs no base model; *lowering* binds what was parsed to one base. Describing an adapter needs the
first half only. Nothing else names a kind: the module is found, documented and tested by being
there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .base import Base
from .checkpoint import Checkpoint
from .primitives.lowered import KVPrefix, Part


@dataclass(frozen=True, slots=True)
class PrimitiveShape:
    """A primitive before it is bound to a base.

    Attributes:
        primitive: Name of the class in ``primitives``.
        path: Module path that the adapter names, empty where it names none.
        rank: Rank of a low-rank primitive, 0 for others.
        num_elements: Numbers it will store, as far as they follow from the adapter alone.
    """

    primitive: str
    path: str
    rank: int
    num_elements: int


@dataclass(frozen=True, slots=True)
class Lowered:
    """What an adapter is on one base; see ``primitives.lowered.LoweredAdapter`` for the fields."""

    parts: tuple[Part, ...]
    prefix: KVPrefix | None = None


@dataclass(frozen=True, slots=True)
class KindPage:
    """What ``docs/adapters.md`` says of a kind; plain text, formulas as in the docstrings.

    Attributes:
        title: As people call it, with the paper: ``LoRA (arXiv:2106.09685)``.
        family: ``reparameterisation``, ``addition`` or ``specification``.
        files: What the folder holds, and the names of the tensors.
        equation: What it computes.
        primitives: Names of the classes in ``primitives`` that it lowers to.
        memory: Numbers it stores on the device.
        limits: What is refused, and why.
        options: What ``deltamux.json`` beside it may hold, and what it means.
    """

    title: str
    family: str
    files: str
    equation: str
    primitives: tuple[str, ...]
    memory: str
    limits: str
    options: Mapping[str, str] = field(default_factory=dict)


class ParsedAdapter(Protocol):
    """An adapter whose configuration and tensors agree with each other."""

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What it lowers to, on whatever base it was made for."""
        ...

    def lower(self, base: Base) -> Lowered:
        """Its primitives in the base's dtype, in the order of the base's places.

        Raises:
            AdapterMismatch: The adapter was made for another base.
            AdapterUnsupported: It cannot be served on this one.
        """
        ...


class AdapterKind(Protocol):
    """One way of fine-tuning, as one library stores it."""

    @property
    def name(self) -> str:
        """``lora``, ...; unique within the library."""
        ...

    @property
    def library(self) -> str:
        """``peft``, ``adapterhub`` or ``plain``."""
        ...

    @property
    def page(self) -> KindPage:
        """Its documentation."""
        ...

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether a folder of this library with this configuration is of this kind."""
        ...

    def parse(self, checkpoint: Checkpoint) -> ParsedAdapter:
        """Check the checkpoint and take it apart.

        Raises:
            AdapterUnsupported: A field, a value or a tensor that is not served; names it.
            AdapterCorrupt: Configuration and tensors contradict each other.
        """
        ...
