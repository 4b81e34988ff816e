"""From a model folder to a decoder ready to run."""

from pathlib import Path

import torch

from ...kernels.backend import Backend
from .builder import ModelBuilder
from .checkpoint import Checkpoint
from .decoder import Decoder
from .families import read_config


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, backend: Backend) -> Decoder:
    """Read ``config.json`` and the safetensors files of ``folder``.

    Args:
        folder: From ``resolve_model``.
        dtype: Of weights, activations and KV cache.
        device: Where they live.
        backend: Device operations.

    Raises:
        ModelNotFound: There is no configuration or no weights.
        ModelCorrupt: Files are unreadable, or tensors and configuration disagree.
        ModelUnsupported: An architecture, field or file format that is not served.
    """
    family, config = read_config(folder)
    checkpoint = Checkpoint(folder, family.base_prefix)
    builder = ModelBuilder(checkpoint, dtype, device, backend)
    return family.assemble(config, builder, backend)
