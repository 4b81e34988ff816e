"""The served base as adapters are lowered against it: ``adapters.base.Base``.

Weights are read again from the model's files when an adapter asks for them: the decoder keeps its
own fused and packed, and a second copy of each would double the memory of the model.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...adapters.base import Affine, PrefixKV
from ...adapters.layout import BaseLayout, EmbeddingSite, LinearTarget, NormSite
from ...kernels.backend import Backend, reference_backend
from .checkpoint import Checkpoint
from .decoder import Decoder
from .families import read_config
from .loader import load_model

_CPU = torch.device("cpu")


class ServedBase:
    """Layout, weights and forward pass of one decoder.

    Attributes:
        decoder: The model that is served.
        dtype: What it is served in.
    """

    def __init__(self, decoder: Decoder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Read weights from ``checkpoint``, the one that ``decoder`` was made of."""
        self.decoder = decoder
        self.dtype = dtype
        self._checkpoint = checkpoint

    @property
    def layout(self) -> BaseLayout:
        """Its places."""
        return self.decoder.layout

    def linear(self, target: LinearTarget) -> Affine:
        """Weight (out, in) and bias (out,), None without one."""
        if target.path == self.layout.head_path and self.layout.tied_head:
            return Affine(self.embedding(self.layout.token_embedding), None)
        shape = (target.out_features, target.in_features)
        if target.is_transposed:
            weight = self._read(f"{target.path}.weight", *reversed(shape)).t().contiguous()
        else:
            weight = self._read(f"{target.path}.weight", *shape)
        return Affine(weight, self._bias(target.path, target.out_features, target.has_bias))

    def embedding(self, site: EmbeddingSite) -> Tensor:
        """Rows (num_embeddings, size)."""
        return self._read(f"{site.path}.weight", site.num_embeddings, site.size)

    def norm(self, site: NormSite) -> Affine:
        """Weight (size,) and bias (size,), None without one."""
        weight = self._read(f"{site.path}.weight", site.size)
        return Affine(weight, self._bias(site.path, site.size, site.has_bias))

    def encode(self, embeddings: Tensor) -> PrefixKV:
        """Keys and values for rows (length, hidden) in the place of token embeddings."""
        return PrefixKV(*(tensor.cpu() for tensor in self.decoder.encode(embeddings)))

    def _bias(self, path: str, size: int, has_bias: bool) -> Tensor | None:
        return self._read(f"{path}.bias", size) if has_bias else None

    def _read(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.read(name, shape).to(self.dtype)


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    backend: Backend | None = None,
) -> ServedBase:
    """Load the model of a folder, by ``load_model``, and keep its files at hand.

    Args:
        folder: From ``resolve_model``.
        dtype: Of weights, activations and KV cache.
        device: Where they live.
        backend: Device operations; the reference ones by default.

    Raises:
        ModelError: As ``load_model``.
    """
    decoder = load_model(folder, dtype, device, backend or reference_backend())
    family, _ = read_config(folder)
    return ServedBase(decoder, Checkpoint(folder, family.base_prefix), dtype)
