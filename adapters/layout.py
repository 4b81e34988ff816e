"""What an adapter needs to know of the base: its linear modules, by the names adapters use.

An adapter names Hugging Face module paths (``model.layers.3.self_attn.q_proj``); our decoder runs
fused GEMMs (q, k and v in one). A *target* is a linear module as the adapter's author knows it, a
*site* is one GEMM of ours: one or more targets side by side in its output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """One linear module, y (rows, out_features) = x (rows, in_features) Wᵀ + b.

    Attributes:
        path: Module path in the Hugging Face model.
        index: Its row in every per-target table; targets of one site are consecutive.
        in_features: Width of the input.
        out_features: Width of the output.
    """

    path: str
    index: int
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One GEMM of the decoder: its targets' outputs are the consecutive column ranges of y."""

    targets: tuple[LinearTarget, ...]

    @property
    def in_features(self) -> int:
        """Width of the input that all targets of the site share."""
        return self.targets[0].in_features

    @property
    def out_features(self) -> int:
        """Width of the site's whole output."""
        return sum(target.out_features for target in self.targets)

    @property
    def out_starts(self) -> tuple[int, ...]:
        """First output column of each target."""
        starts, column = [], 0
        for target in self.targets:
            starts.append(column)
            column += target.out_features
        return tuple(starts)


@dataclass(frozen=True)
class BaseLayout:
    """The adaptable modules of one base model.

    Attributes:
        model_type: Hugging Face ``model_type``, for messages.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding.
        sites: Every GEMM that adapters may change, in the order of execution.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    sites: tuple[LinearSite, ...]

    @cached_property
    def targets(self) -> Mapping[str, LinearTarget]:
        """Every target by its module path."""
        return {target.path: target for target in self.iter_targets()}

    def iter_targets(self) -> Iterator[LinearTarget]:
        """Targets in the order of their index."""
        for site in self.sites:
            yield from site.targets
