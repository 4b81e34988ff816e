"""What an adapter needs to know of the base: the places it may change, by the names adapters use.

An adapter names Hugging Face module paths (``model.layers.3.self_attn.q_proj``); our decoder runs
fused GEMMs (q, k and v in one). A *target* is a linear module as the adapter's author knows it, a
*site* is one GEMM of ours: one or more targets side by side in its output. The ``index`` of a place
is its row in the tables of every primitive that can be there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """One linear module, y (rows, out_features) = x (rows, in_features) Wᵀ + b.

    Attributes:
        path: Module path in the Hugging Face model.
        index: Its row in every per-target table; targets of one site are consecutive.
        in_features: Width of the input.
        out_features: Width of the output.
        has_bias: Whether the base has a b.
        is_transposed: Whether the base's checkpoint stores W as (in, out): GPT-2's ``Conv1D``.
    """

    path: str
    index: int
    in_features: int
    out_features: int
    has_bias: bool
    is_transposed: bool = False


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


@dataclass(frozen=True, slots=True)
class NormSite:
    """One norm: of the residual stream, or of the heads of query or key (Qwen3).

    Attributes:
        path: Module path in the Hugging Face model.
        index: Its row in per-norm tables.
        size: Width that is normalised.
        has_bias: Whether it has a bias: a LayerNorm, not an RMSNorm.
    """

    path: str
    index: int
    size: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class EmbeddingSite:
    """One embedding, of tokens or of positions.

    Attributes:
        path: Module path in the Hugging Face model.
        index: Its row in per-embedding tables.
        num_embeddings: Its rows.
        size: Width of a row.
    """

    path: str
    index: int
    num_embeddings: int
    size: int


class Half(IntEnum):
    """The two halves of a layer; each adds its output to the residual stream."""

    ATTENTION = 0
    MLP = 1


@dataclass(frozen=True, slots=True)
class LayerSite:
    """One decoder layer.

    Attributes:
        path: Module path in the Hugging Face model.
        index: Its number from 0.
        attention_path: Module path of its attention.
    """

    path: str
    index: int
    attention_path: str

    def half_index(self, half: Half) -> int:
        """Row of one half in per-half tables."""
        return 2 * self.index + half


@dataclass(frozen=True)
class BaseLayout:
    """The places of one base model that adapters may change.

    Attributes:
        model_type: Hugging Face ``model_type``, for messages.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        max_position: Longest sequence.
        has_windows: Whether any layer attends in a sliding window.
        tied_head: Whether the head's weight is the token embedding's.
        head_path: Module path of the head, one of the targets.
        sites: Every GEMM, in the order of execution.
        norms: Every norm, in the order of execution.
        embeddings: Of tokens, then of positions where these are learned.
        layers: In order.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    has_windows: bool
    tied_head: bool
    head_path: str
    sites: tuple[LinearSite, ...]
    norms: tuple[NormSite, ...]
    embeddings: tuple[EmbeddingSite, ...]
    layers: tuple[LayerSite, ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @cached_property
    def num_targets(self) -> int:
        """Rows of per-target tables."""
        return sum(len(site.targets) for site in self.sites)

    @cached_property
    def targets(self) -> Mapping[str, LinearTarget]:
        """Every linear target by its module path."""
        return {target.path: target for target in self.iter_targets()}

    @cached_property
    def norms_by_path(self) -> Mapping[str, NormSite]:
        """Every norm by its module path."""
        return {norm.path: norm for norm in self.norms}

    @cached_property
    def embeddings_by_path(self) -> Mapping[str, EmbeddingSite]:
        """Every embedding by its module path."""
        return {embedding.path: embedding for embedding in self.embeddings}

    @cached_property
    def layers_by_path(self) -> Mapping[str, LayerSite]:
        """Every layer by its module path."""
        return {layer.path: layer for layer in self.layers}

    @property
    def head(self) -> LinearTarget:
        """The language-model head."""
        return self.targets[self.head_path]

    @property
    def token_embedding(self) -> EmbeddingSite:
        """The embedding of tokens."""
        return self.embeddings[0]

    def iter_targets(self) -> Iterator[LinearTarget]:
        """Targets in the order of their index."""
        for site in self.sites:
            yield from site.targets
