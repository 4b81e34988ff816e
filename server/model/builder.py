"""Turns a checkpoint's tensors into blocks, and lists the places that adapters may change.

Tensors are copied one by one into their place in the fused weights, so that beside the model itself
no copy of it is ever held.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...adapters.layout import (
    BaseLayout,
    EmbeddingSite,
    LayerSite,
    LinearSite,
    LinearTarget,
    NormSite,
)
from ...kernels.backend import Backend
from ...kernels.tables import SiteTargets
from .blocks import Embedding, Linear
from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import ModelCorrupt

_HEAD = "lm_head"


class ModelBuilder:
    """Reads blocks in the order of execution, and notes each as a place of the layout."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        """Weights become ``dtype`` on ``device``, as the backend keeps them."""
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._backend = backend
        self._sites: list[LinearSite] = []
        self._norms: list[NormSite] = []
        self._embeddings: list[EmbeddingSite] = []
        self._layers: list[LayerSite] = []
        self._num_targets = 0

    @property
    def device(self) -> torch.device:
        """Where weights go."""
        return self._device

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A copy of one tensor."""
        return self._stack([name], [shape], shape)

    def linear(self, in_features: int, outs: Mapping[str, int], *, bias: bool) -> Linear:
        """Several ``nn.Linear`` that share their input, as one.

        Args:
            in_features: Width of the input.
            outs: Output width by module path.
            bias: Whether each has one.
        """
        sizes, total = list(outs.values()), sum(outs.values())
        weights, biases = ([f"{path}.{kind}" for path in outs] for kind in ("weight", "bias"))
        return Linear(
            self._backend.prepare_linear(
                self._stack(weights, [(size, in_features) for size in sizes], (total, in_features)),
                self._stack(biases, [(size,) for size in sizes], (total,)) if bias else None,
            ),
            self._add_site(in_features, outs, has_bias=bias),
        )

    def conv1d(self, path: str, in_features: int, out_features: int) -> Linear:
        """GPT-2's ``Conv1D``: y = x W + b with W stored (in, out)."""
        stored = self.tensor(f"{path}.weight", in_features, out_features)
        bias = self.tensor(f"{path}.bias", out_features)
        return Linear(
            self._backend.prepare_linear(stored.t().contiguous(), bias),
            self._add_site(in_features, {path: out_features}, has_bias=True, is_transposed=True),
        )

    def head(self, config: ModelConfig, embedding: Tensor) -> Linear:
        """The ``lm_head``, on the embedding's weight where the two are tied.

        Raises:
            ModelCorrupt: Tied by the config, yet stored with another value than the embedding's.
        """
        outs = {_HEAD: config.vocab_size}
        if not config.tie_word_embeddings:
            return self.linear(config.hidden_size, outs, bias=False)
        if "lm_head.weight" in self._checkpoint:
            self._check_tied(embedding)
        return Linear(
            self._backend.prepare_linear(embedding, None),
            self._add_site(config.hidden_size, outs, has_bias=False),
        )

    def norm(self, path: str, size: int, *, has_bias: bool) -> NormSite:
        """Note a norm, whose tensors the caller reads."""
        site = NormSite(path, len(self._norms), size, has_bias)
        self._norms.append(site)
        return site

    def embedding(self, path: str, num_embeddings: int, size: int) -> Embedding:
        """One ``nn.Embedding``."""
        index = len(self._embeddings)
        self._embeddings.append(EmbeddingSite(path, index, num_embeddings, size))
        return Embedding(self.tensor(f"{path}.weight", num_embeddings, size), index, self._backend)

    def layer(self, path: str, attention_path: str) -> LayerSite:
        """Note a layer, whose blocks the caller builds."""
        site = LayerSite(path, len(self._layers), attention_path)
        self._layers.append(site)
        return site

    def finish(self, config: ModelConfig) -> BaseLayout:
        """The layout of everything built.

        Raises:
            ModelCorrupt: The checkpoint holds tensors that nothing has read.
        """
        self._checkpoint.check_all_read()
        return BaseLayout(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position=config.max_position,
            has_windows=any(window is not None for window in config.windows),
            tied_head=config.tie_word_embeddings,
            head_path=_HEAD,
            sites=tuple(self._sites),
            norms=tuple(self._norms),
            embeddings=tuple(self._embeddings),
            layers=tuple(self._layers),
        )

    def _stack(
        self, names: list[str], shapes: list[tuple[int, ...]], total: tuple[int, ...]
    ) -> Tensor:
        """Tensors one below the other in a new one of shape ``total``."""
        # Views of the file, read first: shapes are checked before anything is allocated for them.
        stored = [
            self._checkpoint.read(name, shape) for name, shape in zip(names, shapes, strict=True)
        ]
        out = torch.empty(total, dtype=self._dtype, device=self._device)
        parts = torch.split(out, [shape[0] for shape in shapes])
        for name, part, tensor in zip(names, parts, stored, strict=True):
            part.copy_(tensor)
            if not _is_finite(part):
                raise ModelCorrupt(f"tensor {name} holds NaN or Inf as {self._dtype}")
        return out

    def _check_tied(self, embedding: Tensor) -> None:
        if not torch.equal(self.tensor("lm_head.weight", *embedding.shape), embedding):
            raise ModelCorrupt(
                "the config ties lm_head to the embedding, but lm_head.weight differs from it; "
                "set tie_word_embeddings to false in config.json"
            )

    def _add_site(
        self,
        in_features: int,
        outs: Mapping[str, int],
        *,
        has_bias: bool,
        is_transposed: bool = False,
    ) -> SiteTargets:
        first = self._num_targets
        site = LinearSite(
            tuple(
                LinearTarget(path, first + position, in_features, size, has_bias, is_transposed)
                for position, (path, size) in enumerate(outs.items())
            )
        )
        self._sites.append(site)
        self._num_targets += len(outs)
        return SiteTargets(first, site.out_starts, tuple(outs.values()))


def _is_finite(tensor: Tensor) -> bool:
    # NaN and Inf outlive a sum, which unlike isfinite needs no mask as large as the weight.
    return bool(tensor.sum(dtype=torch.float32).isfinite())
