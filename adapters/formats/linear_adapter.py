"""Adapters that correct linear modules one by one, as most of PEFT's kinds do.

What such a kind says itself is small: how the tensors of one module are checked, and what
primitives they are on a target. The rest is the same for all of them and stands here: which tensors
there are, and where the modules lie in the base. What else a file holds is ``peft_saved``'s.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..files import PEFT
from ..kind import KindPage, Lowered, ParsedAdapter, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Affine, Dense
from ..primitives.lowered import Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition
from .binding import cast, mismatch, named_target
from .config_fields import PEFT_HARMLESS, FieldRules, positive_int
from .overrides import merge
from .peft_saved import SavedTensors, replaced_weights
from .peft_tensors import PREFIX, Reasons, by_module, no_tensor

MAX_RANK = 4096
"""Largest rank, of every kind that has one."""

HARMLESS: Mapping[str, str] = {
    **PEFT_HARMLESS,
    "target_modules": "resolved into the tensors' names",
    "exclude_modules": "resolved into the tensors' names",
    "layers_to_transform": "resolved into the tensors' names",
    "layers_pattern": "resolved into the tensors' names",
    "fan_in_fan_out": "PEFT corrects it by the module's type; the tensors are the same for both",
    "init_weights": "initialization only",
}
"""Fields of these kinds' configurations that cannot change an answer, with the reason."""


class LinearModule(Protocol):
    """What an adapter stores for one linear module, checked by itself."""

    @property
    def path(self) -> str:
        """The module's path."""
        ...

    @property
    def in_features(self) -> int | None:
        """Its input's width, as far as the tensors tell."""
        ...

    @property
    def out_features(self) -> int | None:
        """Its output's width, as far as the tensors tell."""
        ...

    @property
    def shapes(self) -> Iterable[PrimitiveShape]:
        """What it lowers to, as far as the tensors tell."""
        ...


M = TypeVar("M", bound=LinearModule)

LowerModules = Callable[[Base, Sequence[tuple[LinearTarget, M]]], Iterable[Primitive]]
"""From bound modules to primitives; all at once, so that they can share tensors."""


@dataclass(frozen=True, slots=True)
class LinearAdapter(Generic[M]):
    """An adapter of linear modules whose configuration and tensors agree.

    Attributes:
        modules: In any order, with different paths.
        lower_modules: The kind's own part of lowering.
        saved: Everything else in the file.
        on_conv1d: Whether the library has the kind for GPT-2's ``Conv1D``.
    """

    modules: tuple[M, ...]
    lower_modules: LowerModules[M]
    saved: SavedTensors
    on_conv1d: bool = False

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What the modules and the replaced tensors lower to."""
        return (
            *(shape for module in self.modules for shape in module.shapes),
            *self.saved.shapes,
        )

    def lower(self, base: Base) -> Lowered:
        """Bind the modules to the base's targets of their paths; see ``kind.ParsedAdapter``."""
        bound = [(self._target(base, module), module) for module in self.modules]
        bound.sort(key=lambda pair: pair[0].index)
        saved = self.saved.lower(base)
        _require_same_weights(saved, [module.path for module in self.modules])
        primitives = merge((*self.lower_modules(base, bound), *saved))
        return Lowered((Part(EveryPosition(), primitives),))

    def _target(self, base: Base, module: M) -> LinearTarget:
        target = named_target(base.layout, module.path)
        if target.is_transposed and not self.on_conv1d:
            raise AdapterUnsupported(
                f"{shown(module.path)} is a Conv1D of GPT-2, for which PEFT has no such adapter"
            )
        for side, theirs, ours in (
            ("reads", module.in_features, target.in_features),
            ("gives", module.out_features, target.out_features),
        ):
            if theirs not in (None, ours):
                raise mismatch(
                    base.layout, f"{shown(module.path)} {side} {theirs} features there, {ours} here"
                )
        return target


@dataclass(frozen=True, slots=True)
class PeftKind:
    """One ``peft_type`` of PEFT's; see ``kind.AdapterKind``.

    Attributes:
        name: The ``peft_type``, lower-case.
        page: Its documentation.
        rules: The fields of its configuration.
        read: From a checkpoint whose fields were checked to what it holds.
        library: PEFT.
    """

    name: str
    page: KindPage
    rules: FieldRules
    read: Callable[[Checkpoint], ParsedAdapter]
    library: str = PEFT

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether the configuration's ``peft_type`` is this one."""
        return config.get("peft_type") == self.name.upper()

    def parse(self, checkpoint: Checkpoint) -> ParsedAdapter:
        """Check every field, then every tensor; see ``kind.AdapterKind``."""
        self.rules.check(checkpoint.config)
        return self.read(checkpoint)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a checkpoint, by what they are.

    Attributes:
        modules: Module path -> {suffix: tensor}.
        saved: Everything else in the file.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    saved: SavedTensors

    @classmethod
    def read(
        cls,
        config: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        suffixes: Sequence[str],
        others: Reasons = (),
    ) -> "Tensors":
        """Sort the tensors.

        Args:
            config: As for ``SavedTensors.read``.
            tensors: By their names in the file.
            suffixes: What may stand behind a module's path.
            others: Why known other tensors are not served.

        Raises:
            AdapterUnsupported: A tensor of another name, or that does not hold floats.
            AdapterCorrupt: No module has a tensor of these suffixes.
        """
        ours = {n: t for n, t in tensors.items() if n.endswith(tuple(f".{s}" for s in suffixes))}
        rest = {name: tensor for name, tensor in tensors.items() if name not in ours}
        modules = by_module(ours, suffixes) if ours else {}
        # First what is refused by its name: a file of such tensors alone is not an empty one.
        saved = SavedTensors.read(config, rest, modules, others)
        if not modules:
            raise no_tensor()
        return cls(modules, saved)


def split_off(
    tensors: Mapping[str, Tensor], suffix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with this suffix by their module's path, and all others by their names."""
    ending = f".{suffix}"
    found = {
        name.removeprefix(PREFIX).removesuffix(ending): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX) and name.endswith(ending)
    }
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith(PREFIX) and name.endswith(ending))
    }
    return found, rest


def require_shape(path: str, name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise AdapterCorrupt unless the tensor has this shape; None stands for any positive size."""
    fits = tensor.dim() == len(shape) and all(
        size > 0 and wanted in (None, size)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("?" if wanted is None else str(wanted) for wanted in shape)
        raise AdapterCorrupt(
            f"{shown(path)} has a {name} of {list(tensor.shape)}, and its configuration and other "
            f"tensors ask for [{sizes}]"
        )


def low_rank(base: Base, target: LinearTarget, a: Tensor, b: Tensor) -> Affine | Dense:
    """y += (x Aᵀ) B as factors, or as one matrix where that takes less: ranks may be hostile.

    Args:
        base: The served base.
        target: The module.
        a: (rank, in_features).
        b: (rank, out_features), every scale folded in.
    """
    if is_low_rank(a.shape[0], target.in_features, target.out_features):
        return Affine(
            target, a=cast(target.path, a, base.dtype), b=cast(target.path, b, base.dtype)
        )
    return Dense(target, cast(target.path, b.T @ a, base.dtype))


def is_low_rank(rank: int, in_features: int, out_features: int) -> bool:
    """Whether factors of this rank take less than the whole matrix."""
    return rank * (in_features + out_features) < in_features * out_features


def low_rank_shape(path: str, rank: int, in_features: int, out_features: int) -> PrimitiveShape:
    """What ``low_rank`` gives."""
    if is_low_rank(rank, in_features, out_features):
        return PrimitiveShape(Affine.__name__, path, rank, rank * (in_features + out_features))
    return PrimitiveShape(Dense.__name__, path, 0, in_features * out_features)


def bounded_rank(name: str, value: object) -> int:
    """The value of the field as a rank.

    Raises:
        AdapterCorrupt: It is not a positive integer.
        AdapterUnsupported: It exceeds MAX_RANK.
    """
    rank = positive_int(name, value)
    if rank > MAX_RANK:
        raise AdapterUnsupported(f"the config field {name!r} is {rank}, more than {MAX_RANK}")
    return rank


def _require_same_weights(saved: Iterable[Primitive], adapted: Iterable[str]) -> None:
    for path in replaced_weights(saved).intersection(adapted):
        raise AdapterUnsupported(
            f"the weight of {shown(path)} is not the base's, and the module is adapted as well: "
            f"train with one of both"
        )


def iter_each(
    lower_one: Callable[[Base, LinearTarget, M], Iterable[Primitive]],
) -> LowerModules[M]:
    """For a kind whose modules share nothing: lower them one after another."""

    def lower(base: Base, bound: Sequence[tuple[LinearTarget, M]]) -> Iterator[Primitive]:
        for target, module in bound:
            yield from lower_one(base, target, module)

    return lower


def require_listed(
    path: str, config: Mapping[str, object], name: str, default: int, found: int
) -> None:
    """Check a size that a tensor shows against the field ``name`` and its ``_pattern``.

    The tensor alone says which of the sizes the module has, so that no pattern need be matched.

    Raises:
        AdapterCorrupt: It is none of the field's sizes, or one of these is no positive integer.
    """
    pattern = config.get(f"{name}_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterCorrupt(
            f"the config field '{name}_pattern' is {shown(pattern)}, not an object"
        )
    sizes = {positive_int(name, config.get(name, default))}
    sizes |= {positive_int(f"{name}_pattern", size) for size in pattern.values()}
    if found not in sizes:
        raise AdapterCorrupt(
            f"{shown(path)} has the size {found}, and the config field {name!r} allows "
            f"{shown(sorted(sizes))}"
        )
