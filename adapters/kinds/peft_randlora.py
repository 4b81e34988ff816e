"""RandLoRA (arXiv:2502.00987) as PEFT stores and computes it.

    y += s U V x,   s = alpha / r,

where the one factor of size min(in, out) is the random ``randlora_A`` (r, 1, .) with the trained
scales ``randlora_lambda`` (r, n) and ``randlora_gamma`` (n, min(in, out)), flattened over r and n,
and the other the random ``randlora_B`` (., n, r), flattened over n and r. All modules share both
matrices; each uses the first n bases and cuts them to its widths. n r is at least min(in, out), by
design: a low-rank form would take more than the whole matrix, so that is what is stored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.binding import cast, mismatch
from ..formats.config_fields import FieldRules, finite_number, flag
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    bounded_rank,
    require_shape,
    split_off,
)
from ..formats.peft_tensors import require_float, required
from ..formats.projections import (
    DrawRandLora,
    draw_randlora,
    draw_sparse_randlora,
    draw_very_sparse_randlora,
    require_drawable,
    seeded,
)
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.linear import Dense
from ..primitives.primitive import Primitive

_A, _B = "randlora_A", "randlora_B"
_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    lambdas: Tensor
    gamma: Tensor
    in_features: None = None
    out_features: None = None

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield PrimitiveShape(Dense.__name__, self.path, 0, 0)


@dataclass(frozen=True, slots=True)
class _Projections:
    """A (r, 1, shortest) and B (longest, bases, r), or what they are drawn from."""

    rank: int
    scale: float
    stored: tuple[Tensor, Tensor] | None
    seed: object
    draw: DrawRandLora

    def get(self, base: Base, targets: Sequence[LinearTarget]) -> tuple[Tensor, Tensor]:
        widest = (max(t.in_features for t in targets), max(t.out_features for t in targets))
        shortest, longest = min(widest), max(widest)
        if self.stored is None:
            require_drawable(self.rank, shortest, longest)
            generator = seeded("projection_prng_key", self.seed)
            return self.draw(generator, self.rank, shortest, longest)
        a, b = self.stored
        bases = -(-shortest // self.rank)
        if a.shape[2] != shortest or b.shape[:2] != (longest, bases):
            raise mismatch(
                base.layout,
                f"its random bases are {list(a.shape)} and {list(b.shape)} there, and its modules "
                f"have up to {longest} and {shortest} features here",
            )
        return a, b

    def lower(
        self, base: Base, bound: Sequence[tuple[LinearTarget, _Module]]
    ) -> Iterator[Primitive]:
        a, b = self.get(base, [target for target, _ in bound])
        for target, module in bound:
            delta = self.delta(base, target, module, a, b)
            yield Dense(target, cast(module.path, delta, base.dtype))

    def delta(
        self, base: Base, target: LinearTarget, module: _Module, a: Tensor, b: Tensor
    ) -> Tensor:
        """(out, in)."""
        widths = target.in_features, target.out_features
        shortest, longest = min(widths), max(widths)
        bases = -(-shortest // self.rank)
        if module.gamma.shape != (bases, shortest):
            raise mismatch(
                base.layout,
                f"{shown(module.path)} has {_GAMMA} of {list(module.gamma.shape)} there, and would "
                f"have [{bases}, {shortest}] here",
            )
        scales = module.lambdas.float()[:, :, None] * module.gamma.float()
        short = (a[:, :, :shortest].float() * scales).flatten(end_dim=1)
        long = b[:longest, :bases].float().flatten(start_dim=1)
        product = torch.mm(long, short) * self.scale
        return product if shortest == target.in_features else product.T


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    rank = bounded_rank("r", config.get("r", 32))
    stored, copied, rest = _split(checkpoint.tensors)
    tensors = Tensors.read(config, rest, (_LAMBDA, _GAMMA))
    for path in sorted(copied - tensors.modules.keys()):
        raise AdapterCorrupt(f"{shown(path)} has {_A} or {_B}, and no tensor of its own")
    modules = tuple(_module(path, parts, rank) for path, parts in tensors.modules.items())
    projections = _projections(config, stored, rank)
    return LinearAdapter(modules, projections.lower, tensors.saved, on_conv1d=True)


def _module(path: str, parts: Mapping[str, Tensor], rank: int) -> _Module:
    lambdas, gamma = required(path, parts, _LAMBDA, _GAMMA)
    require_shape(path, _LAMBDA, lambdas, rank, None)
    require_shape(path, _GAMMA, gamma, lambdas.shape[1], None)
    return _Module(path, lambdas, gamma)


def _split(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], set[str], dict[str, Tensor]]:
    """The shared matrices, the modules that have a copy of them, and every other tensor.

    PEFT 0.21.2 writes them once, and once again for every module.
    """
    rest, stored = dict(tensors), {}
    copied: set[str] = set()
    for name in (_A, _B):
        shared = rest.pop(f"base_model.{name}", None)
        copies, rest = split_off(rest, name)
        if shared is None:
            if copies:
                raise AdapterCorrupt(f"base_model.{name} is not in the file, but copies of it are")
            continue
        require_float(name, shared)
        for path, copy in copies.items():
            if not torch.equal(copy, shared):
                raise AdapterCorrupt(f"{shown(path)} has another {name} than base_model.{name}")
        stored[name] = shared
        copied |= copies.keys()
    return stored, copied, rest


def _projections(
    config: Mapping[str, object], stored: Mapping[str, Tensor], rank: int
) -> _Projections:
    seed = config.get("projection_prng_key", 0)
    seeded("projection_prng_key", seed)
    draw: DrawRandLora = draw_randlora
    if flag("sparse", config.get("sparse", False)):
        draw = draw_sparse_randlora
    if flag("very_sparse", config.get("very_sparse", False)):
        draw = draw_very_sparse_randlora
    scale = finite_number("randlora_alpha", config.get("randlora_alpha", 640)) / rank
    if not flag("save_projection", config.get("save_projection", True)):
        if stored:
            raise AdapterCorrupt(f"save_projection is false, and {_A} or {_B} is in the file")
        return _Projections(rank, scale, None, seed, draw)
    if set(stored) != {_A, _B}:
        raise AdapterCorrupt(f"save_projection is true, and {_A} or {_B} is not in the file")
    require_shape(_A, "tensor", stored[_A], rank, 1, None)
    require_shape(_B, "tensor", stored[_B], None, None, rank)
    return _Projections(rank, scale, (stored[_A], stored[_B]), seed, draw)


KIND = PeftKind(
    name="randlora",
    page=KindPage(
        title="RandLoRA: full-rank updates from random bases (arXiv:2502.00987)",
        family="reparameterisation",
        files="randlora_lambda (r, n) and randlora_gamma (n, min(in, out)) of each module, and "
        "randlora_A (r, 1, .) and randlora_B (., n, r) once or once a module; fields r, "
        "randlora_alpha, projection_prng_key, save_projection, sparse, very_sparse",
        equation="y += randlora_alpha / r flat(B) flat(lambda * A * gamma) x, transposed where out "
        "is less than in. With save_projection=false A and B are drawn again from "
        "projection_prng_key as PEFT does on a CPU, in bfloat16",
        primitives=("Dense",),
        memory="in out a module: the update has full rank by design (n r is at least min(in, "
        "out)), so that its factors would take more",
        limits="A file with save_projection=false gives the trained answer only where torch draws "
        "the same numbers, as in PEFT; matrices of more than four times the largest module are "
        "not drawn.",
    ),
    rules=FieldRules(
        implemented=frozenset(
            {
                "r",
                "randlora_alpha",
                "projection_prng_key",
                "save_projection",
                "sparse",
                "very_sparse",
                "bias",
                "modules_to_save",
            }
        ),
        harmless={**HARMLESS, "randlora_dropout": "off outside training"},
        refused={},
    ),
    read=_read,
)
