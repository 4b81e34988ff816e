"""Adapters that correct linear modules one by one, as most of PEFT's kinds do.

What such a kind says itself is small: how the tensors of one module are checked, and what
primitives they are on a target. The rest is the same for all of them and stands here: which tensors
there are, where the modules lie in the base, and the tensors that replace the base's own beside
them (PEFT's ``modules_to_save``, and biases of ``bias="all"`` and ``bias="..._only"``).
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
from ..primitives.embedding import EmbeddingRows
from ..primitives.layer import NormOverride
from ..primitives.linear import Affine, Dense
from ..primitives.lowered import Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition
from .binding import cast, mismatch, named_target
from .config_fields import PEFT_HARMLESS, FieldRules, positive_int
from .overrides import merge, override_primitives
from .peft_tensors import PREFIX, Reasons, by_module, unserved_tensor

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

_BASE_LAYER = ".base_layer."
_EMBEDDINGS = ("embed_tokens", "wte", "wpe")
_OTHERS: Reasons = (
    (".trainable_tokens_delta", "it replaces rows of the embedding: train without new tokens"),
    (".bias", "the config field 'bias' is 'none', and modules_to_save is empty"),
    (".weight", "the config field modules_to_save is empty"),
)


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
class BaseTensors:
    """Tensors of the base in an adapter's file, by their names in the base's ``state_dict``.

    Attributes:
        replaced: Trained ones, which take the place of the base's.
        copies: Weights of adapted modules, which PEFT saves in case that the vocabulary was
            resized; they must be the base's own.
    """

    replaced: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        """What the replaced ones lower to; the others take nothing."""
        for name, tensor in self.replaced.items():
            path, _, part = name.rpartition(".")
            matrix = EmbeddingRows if path.endswith(_EMBEDDINGS) else Dense
            kind = Affine if part == "bias" else matrix if tensor.dim() == 2 else NormOverride
            yield PrimitiveShape(kind.__name__, path, 0, tensor.numel())


@dataclass(frozen=True, slots=True)
class LinearAdapter(Generic[M]):
    """An adapter of linear modules whose configuration and tensors agree.

    Attributes:
        modules: In any order, with different paths.
        lower_modules: The kind's own part of lowering.
        of_base: Tensors of the base.
        on_conv1d: Whether the library has the kind for GPT-2's ``Conv1D``.
    """

    modules: tuple[M, ...]
    lower_modules: LowerModules[M]
    of_base: BaseTensors
    on_conv1d: bool = False

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What the modules and the replaced tensors lower to."""
        return (
            *(shape for module in self.modules for shape in module.shapes),
            *self.of_base.shapes,
        )

    def lower(self, base: Base) -> Lowered:
        """Bind the modules to the base's targets of their paths; see ``kind.ParsedAdapter``."""
        bound = [(self._target(base, module), module) for module in self.modules]
        bound.sort(key=lambda pair: pair[0].index)
        overrides = override_primitives(base, {**self.of_base.replaced, **self.of_base.copies})
        _require_same_weights(overrides, {module.path for module in self.modules})
        primitives = merge((*self.lower_modules(base, bound), *overrides))
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
        of_base: Tensors of the base.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    of_base: BaseTensors

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
            config: Its ``bias`` and ``modules_to_save`` say whether tensors may be replaced.
            tensors: By their names in the file.
            suffixes: What may stand behind a module's path.
            others: Why known other tensors are not served.

        Raises:
            AdapterUnsupported: A tensor of another name, or that does not hold floats.
            AdapterCorrupt: No module has a tensor of these suffixes.
        """
        ours = {n: t for n, t in tensors.items() if n.endswith(tuple(f".{s}" for s in suffixes))}
        rest = {name: tensor for name, tensor in tensors.items() if name not in ours}
        # First what is refused by its name: a file of such tensors alone is not an empty one.
        of_base = _of_base(config, rest, others)
        return cls(by_module(ours, suffixes), of_base)


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


def _of_base(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], others: Reasons
) -> BaseTensors:
    biases, modules = _saves_biases(config), bool(config.get("modules_to_save"))
    replaced: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        is_copy = name.endswith(f"{_BASE_LAYER}weight")
        is_bias, is_weight = name.endswith(".bias"), name.endswith(".weight")
        served = is_copy or (modules and (is_bias or is_weight)) or (biases and is_bias)
        if not (name.startswith(PREFIX) and served):
            raise unserved_tensor(name, (*others, *_OTHERS))
        of_base = name.removeprefix(PREFIX).replace(_BASE_LAYER, ".")
        (copies if is_copy else replaced)[of_base] = tensor
    if len(replaced.keys() | copies.keys()) < len(tensors):
        raise AdapterCorrupt("the file holds a weight or bias of the base twice")
    return BaseTensors(replaced, copies)


def _saves_biases(config: Mapping[str, object]) -> bool:
    value = config.get("bias", "none")
    if not isinstance(value, str) or not (value in ("none", "all") or value.endswith("_only")):
        raise AdapterUnsupported(f"the config field 'bias' has the unknown value {shown(value)}")
    return value != "none"


def _require_same_weights(overrides: Iterable[Primitive], adapted: set[str]) -> None:
    for primitive in overrides:
        replaces = isinstance(primitive, Affine) and primitive.scale is not None
        if replaces and primitive.path in adapted:
            raise AdapterUnsupported(
                f"the weight of {shown(primitive.path)} is not the base's, and the module is "
                f"adapted as well: train with one of both"
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
