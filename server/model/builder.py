"""Turns a checkpoint's tensors into blocks, and lists the modules that adapters may change.

Tensors are copied one by one into their place in the fused weights, so that beside the model itself
no copy of it is ever held.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...adapters.layout import BaseLayout, LinearSite, LinearTarget
from ...kernels.linear.op import PrepareLinear
from ...kernels.low_rank.op import SiteTargets
from .blocks import Linear
from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import ModelCorrupt


class ModelBuilder:
    """Reads blocks in the order of execution; every ``Linear`` becomes a site of the layout."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        prepare_linear: PrepareLinear,
    ) -> None:
        """Weights become ``dtype`` on ``device``; ``prepare_linear`` keeps those of GEMMs."""
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._prepare_linear = prepare_linear
        self._sites: list[LinearSite] = []
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
            self._prepare_linear(
                self._stack(weights, [(size, in_features) for size in sizes], (total, in_features)),
                self._stack(biases, [(size,) for size in sizes], (total,)) if bias else None,
            ),
            self._add_site(in_features, outs),
        )

    def conv1d(self, path: str, in_features: int, out_features: int) -> Linear:
        """GPT-2's ``Conv1D``: y = x W + b with W stored (in, out)."""
        stored = self.tensor(f"{path}.weight", in_features, out_features)
        bias = self.tensor(f"{path}.bias", out_features)
        return Linear(
            self._prepare_linear(stored.t().contiguous(), bias),
            self._add_site(in_features, {path: out_features}),
        )

    def head(self, config: ModelConfig, embedding: Tensor) -> Linear:
        """The ``lm_head``, on the embedding's weight where the two are tied.

        Raises:
            ModelCorrupt: Tied by the config, yet stored with another value than the embedding's.
        """
        outs = {"lm_head": config.vocab_size}
        if not config.tie_word_embeddings:
            return self.linear(config.hidden_size, outs, bias=False)
        if "lm_head.weight" in self._checkpoint:
            self._check_tied(embedding)
        return Linear(
            self._prepare_linear(embedding, None), self._add_site(config.hidden_size, outs)
        )

    def finish(self, config: ModelConfig) -> BaseLayout:
        """The layout of everything built.

        Raises:
            ModelCorrupt: The checkpoint holds tensors that nothing has read.
        """
        self._checkpoint.check_all_read()
        return BaseLayout(
            model_type=config.model_type,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            sites=tuple(self._sites),
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
            # NaN and Inf outlive a sum, which unlike isfinite needs no mask as large as the weight.
            if not part.sum(dtype=torch.float32).isfinite():
                raise ModelCorrupt(f"tensor {name} holds NaN or Inf as {self._dtype}")
        return out

    def _check_tied(self, embedding: Tensor) -> None:
        if not torch.equal(self.tensor("lm_head.weight", *embedding.shape), embedding):
            raise ModelCorrupt(
                "the config ties lm_head to the embedding, but lm_head.weight differs from it; "
                "set tie_word_embeddings to false in config.json"
            )

    def _add_site(self, in_features: int, outs: Mapping[str, int]) -> SiteTargets:
        first = self._num_targets
        site = LinearSite(
            tuple(
                LinearTarget(path, first + position, in_features, size)
                for position, (path, size) in enumerate(outs.items())
            )
        )
        self._sites.append(site)
        self._num_targets += len(outs)
        return SiteTargets(first, site.out_starts, tuple(outs.values()))
