"""SAID: structure-aware intrinsic dimension (arXiv:2012.13255), in the format of ``plain_delta``.

    ΔW_i = λ_i p_i(θ),   reshaped to the tensor as the state_dict has it,

with one trained θ ``theta_d`` (d,) for all tensors, one λ_i for each (ones for the plain intrinsic
dimension), and p_i a projection of ``fastfood``. The papers' code leaves its random numbers in
memory. Here they are drawn from the field ``seed``, or stored: see ``Fastfood.draw``, called once
for each name of ``tensors`` in their order, on one generator of torch for the CPU.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import FLOAT_DTYPES, INTEGER_DTYPES, Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.binding import cast, mismatch
from ..formats.fastfood import Fastfood, padded_length
from ..formats.linear_adapter import require_shape
from ..formats.overrides import override_primitives, tensor_shape
from ..formats.plain_delta import PlainKind, state_name
from ..kind import KindPage, Lowered, PrimitiveShape
from ..primitives.linear import Affine, Dense
from ..primitives.lowered import Part
from ..scope import EveryPosition

MAX_NUMBERS = 1 << 27
"""Numbers of one tensor: its projection takes about twenty bytes for each, for a moment."""

_THETA, _LAMBDA = "theta_d", "lambda"
_MAX_SEED = 1 << 63


@dataclass(frozen=True, slots=True)
class _ParsedSaid:
    """One θ, and for each tensor λ and its projection, drawn from ``seed`` if none is stored."""

    theta: Tensor
    scales: Mapping[str, Tensor]
    stored: Mapping[str, Fastfood]
    seed: int

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """How large they are is known with the base."""
        split = (name.rpartition(".") for name in self.scales)
        return tuple(
            PrimitiveShape((Affine if part == "bias" else Dense).__name__, path, 0, 0)
            for path, _, part in split
        )

    def lower(self, base: Base) -> Lowered:
        primitives = override_primitives(base, self._deltas(base), "add")
        return Lowered((Part(EveryPosition(), primitives),))

    def _deltas(self, base: Base) -> dict[str, Tensor]:
        """ΔW by tensor name; a tensor that the base has under two names changes under both."""
        layout = base.layout
        embedding, head = f"{layout.token_embedding.path}.weight", f"{layout.head_path}.weight"
        if layout.tied_head and head in self.scales:
            raise AdapterUnsupported(f"in this base {head} is {embedding}: name that one alone")
        generator = torch.Generator().manual_seed(self.seed)
        deltas = {name: self._delta(base, name, generator) for name in self.scales}
        if layout.tied_head and embedding in deltas:
            deltas[head] = deltas[embedding]
        return deltas

    def _delta(self, base: Base, name: str, generator: torch.Generator) -> Tensor:
        shape = torch.Size(tensor_shape(base.layout, name))
        _require_bounded(name, shape.numel())
        length = padded_length(shape.numel())
        projection = self.stored.get(name)
        if projection is None:
            projection = Fastfood.draw(length, generator)
        elif len(projection.signs) != length:
            raise mismatch(
                base.layout,
                f"the projection of {shown(name)} has {len(projection.signs)} numbers, and "
                f"{list(shape)} needs {length}",
            )
        delta = projection.project(self.theta.float(), shape.numel()) * self.scales[name].float()
        is_linear = name.rpartition(".")[0] in base.layout.targets
        # What is not added to the base's values before it is cast can be so now, to take less.
        return cast(name, delta.view(shape), base.dtype if is_linear else torch.float32)


def _require_bounded(name: str, count: int) -> None:
    if count > MAX_NUMBERS:
        raise AdapterUnsupported(
            f"{shown(name)} has {count} numbers, more than the {MAX_NUMBERS} that are projected"
        )


def _read(checkpoint: Checkpoint) -> _ParsedSaid:
    config = checkpoint.config
    if config.get("projection") != "fastfood" or config.get("mode", "add") != "add":
        raise AdapterUnsupported(
            "a delta of 'said' has the config fields 'projection': 'fastfood', and 'mode': 'add' "
            "or none"
        )
    names = _names(config.get("tensors"))
    rest = dict(checkpoint.tensors)
    theta, scales = (_taken(rest, name) for name in (_THETA, _LAMBDA))
    require_shape("the delta", _THETA, theta, None)
    require_shape("the delta", _LAMBDA, scales, len(names))
    stored = {state_name(name): _projection(rest, name) for name in names} if rest else {}
    if rest:
        raise AdapterUnsupported(f"the tensor {shown(min(rest))} is not one of a 'said' delta")
    seed = 0 if stored else _seed(config.get("seed"))
    by_name = dict(zip(map(state_name, names), scales, strict=True))
    return _ParsedSaid(theta, by_name, stored, seed)


def _names(value: object) -> list[str]:
    named = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if not isinstance(value, list) or not named or not value:
        raise AdapterCorrupt(
            f"the config field 'tensors' is {shown(value)}, not a list of tensor names"
        )
    if len(set(map(state_name, value))) < len(value):
        raise AdapterCorrupt("the config field 'tensors' holds a name twice")
    return value


def _seed(value: object) -> int:
    if value is None:
        raise AdapterUnsupported(
            "the projections are neither stored nor given by a 'seed', and cannot be guessed"
        )
    if type(value) is not int or not 0 <= value < _MAX_SEED:
        raise AdapterCorrupt(f"the config field 'seed' is {shown(value)}, not a seed")
    return value


def _projection(rest: dict[str, Tensor], name: str) -> Fastfood:
    """What is stored for one tensor, if anything is stored for any."""
    signs = _taken(rest, f"{name}.B", (*FLOAT_DTYPES, *INTEGER_DTYPES))
    permutation = _taken(rest, f"{name}.Pi", INTEGER_DTYPES)
    gaussian = _taken(rest, f"{name}.G")
    for part, tensor in (("B", signs), ("Pi", permutation), ("G", gaussian)):
        require_shape(name, part, tensor, signs.numel())
    count = signs.numel()
    sound = (
        padded_length(count) == count
        and bool((signs.abs() == 1).all())
        and torch.equal(permutation.long().sort().values, torch.arange(count))
        and bool(gaussian.any())
    )
    if not sound:
        raise AdapterCorrupt(
            f"the projection of {shown(name)} is none: B must be signs, Pi a permutation, and G "
            f"not zero, of a power of two of numbers"
        )
    return Fastfood(signs, permutation.long(), gaussian)


def _taken(
    rest: dict[str, Tensor], name: str, dtypes: Collection[torch.dtype] = FLOAT_DTYPES
) -> Tensor:
    """The tensor of this name, taken out."""
    tensor = rest.pop(name, None)
    if tensor is None:
        raise AdapterCorrupt(f"the weight file has no tensor {shown(name)}")
    if tensor.dtype not in dtypes:
        raise AdapterUnsupported(f"the tensor {shown(name)} is {tensor.dtype}")
    return tensor


KIND = PlainKind(
    name="said",
    page=KindPage(
        title="SAID: structure-aware intrinsic dimension (arXiv:2012.13255), with Fastfood",
        family="specification",
        files="theta_d (d,) and lambda (tensors,); fields delta_type 'said', projection "
        "'fastfood', tensors (names in the model's state_dict, in order) and seed. Instead of a "
        "seed the file may hold B, Pi and G (L,) of every tensor, as <name>.B and so on",
        equation="W += lambda_i [H G Pi H B pad(theta_d)]_{:D} / sqrt(D sum(G²)), "
        "L = 2^ceil(log2 D), D the numbers of W, (Pi x)_i = x_{Pi_i}, H of ±1 (Sylvester). With a "
        "seed: g = torch.Generator().manual_seed(seed); then for each tensor in order B = 2 "
        "torch.randint(0, 2, (L,), dtype=int8, generator=g) - 1, Pi = torch.randperm(L, "
        "dtype=int32, generator=g), G = torch.randn(L, generator=g)",
        primitives=("Dense", "Affine", "NormOverride", "EmbeddingRows"),
        memory="as many numbers as each changed tensor has: the projection is of full rank",
        limits=f"Tensors of up to {MAX_NUMBERS} numbers. Where head and embedding are one weight, "
        "it is named as the embedding, and both change.",
    ),
    read=_read,
    implemented=frozenset({"mode", "projection", "tensors", "seed"}),
)
