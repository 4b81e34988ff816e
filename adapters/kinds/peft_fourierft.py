"""FourierFT (arXiv:2405.03003) as PEFT stores and computes it.

    y += s Re(ifft2(S)) x,

with S (out, in) zero but for the trained n numbers ``fourierft_spectrum``. Where they stand is not
stored: the first n places of a random permutation of all, drawn from the configuration's seed, and
so the same for all modules of one size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import shown
from ..formats.binding import cast, mismatch
from ..formats.config_fields import FieldRules, finite_number
from ..formats.factors import csr
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    require_listed,
    require_shape,
)
from ..formats.peft_tensors import required
from ..formats.projections import seeded
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Spectral
from ..primitives.primitive import Primitive

_SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    spectrum: Tensor
    in_features: None = None
    out_features: None = None

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield PrimitiveShape(Spectral.__name__, self.path, 0, 2 * self.spectrum.numel())


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Places by rows and columns.

    All modules of one size have these very tensors, so that the device holds them once.

    Attributes:
        row_starts: As in ``Sparse``.
        columns: As in ``Sparse``.
        order: (places,) which of the places stands there.
    """

    row_starts: Tensor
    columns: Tensor
    order: Tensor

    @classmethod
    def of(cls, places: Tensor, out_features: int, in_features: int) -> "_Ordered":
        """Of distinct places."""
        numbers = torch.arange(len(places))
        rows, columns = places // in_features, places % in_features
        return cls(*csr(rows, columns, numbers, out_features))


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the frequencies of every module stand."""

    seed: object
    scale: float

    def lower(
        self, base: Base, bound: Sequence[tuple[LinearTarget, _Module]]
    ) -> Iterator[Primitive]:
        longest = max(module.spectrum.numel() for _, module in bound)
        drawn: dict[int, Tensor] = {}
        ordered: dict[tuple[int, int, int], _Ordered] = {}
        for target, module in bound:
            size, count = target.in_features * target.out_features, module.spectrum.numel()
            if count > size:
                raise mismatch(
                    base.layout,
                    f"{shown(module.path)} has {count} frequencies there, {size} numbers here",
                )
            if size not in drawn:
                order = torch.randperm(size, generator=seeded("random_loc_seed", self.seed))
                drawn[size] = order[:longest].clone()
            shape = (target.out_features, target.in_features, count)
            if shape not in ordered:
                ordered[shape] = _Ordered.of(drawn[size][:count], *shape[:2])
            yield self.spectral(base, target, module, ordered[shape])

    def spectral(
        self, base: Base, target: LinearTarget, module: _Module, places: _Ordered
    ) -> Spectral:
        values = (module.spectrum.float() * self.scale)[places.order]
        values = cast(module.path, values, base.dtype)
        return Spectral(target, places.row_starts, places.columns, values)


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    tensors = Tensors.read(config, checkpoint.tensors, (_SPECTRUM,))
    seed = config.get("random_loc_seed", 777)
    seeded("random_loc_seed", seed)
    places = _Places(seed, finite_number("scaling", config.get("scaling", 150.0)))
    modules = tuple(_module(path, parts, config) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, places.lower, tensors.saved, on_conv1d=True)


def _module(path: str, parts: Mapping[str, Tensor], config: Mapping[str, object]) -> _Module:
    (spectrum,) = required(path, parts, _SPECTRUM)
    require_shape(path, _SPECTRUM, spectrum, None)
    require_listed(path, config, "n_frequency", 1000, spectrum.numel())
    return _Module(path, spectrum)


KIND = PeftKind(
    name="fourierft",
    page=KindPage(
        title="FourierFT: sparse updates in the frequency domain (arXiv:2405.03003)",
        family="reparameterisation",
        files="fourierft_spectrum (n,) of each module; fields n_frequency, n_frequency_pattern, "
        "scaling, random_loc_seed",
        equation="y += scaling Re(ifft2(S)) x; the spectrum stands at the first n places of "
        "torch's randperm(out in) with random_loc_seed, which is drawn again as PEFT does",
        primitives=("Spectral",),
        memory="n numbers a module, and n + out + 1 indices for all of one size: the difference is "
        "never formed",
        limits="The places are the trained ones only where torch permutes as it did there, as in "
        "PEFT.",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {
                "n_frequency",
                "n_frequency_pattern",
                "scaling",
                "random_loc_seed",
                "bias",
                "modules_to_save",
            }
        ),
        harmless=HARMLESS,
        refused={},
    ),
    read=_read,
)
