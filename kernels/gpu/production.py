"""Every launch that a served base needs of a GPU, in all configurations."""

from collections.abc import Callable, Iterator, Mapping

import torch

from ..affine.gpu import CORRECT_AFFINE
from ..bottleneck import gpu as bottleneck
from ..circulant.gpu import ADD_CIRCULANT
from ..dense.gpu import ADD_DENSE
from ..embedding import gpu as embedding
from ..input_transform import gpu as input_transform
from ..kronecker.gpu import ADD_KRONECKER
from ..norm_override import gpu as norm_override
from ..output_rows.gpu import REPLACE_OUTPUTS
from ..paged_attention import gpu as paged_attention
from ..rms_norm import gpu as rms_norm
from ..rotary import gpu as rotary
from ..side_attention import gpu as side_attention
from ..silu_mul import gpu as silu_mul
from ..sparse.gpu import ADD_SPARSE
from ..spectral import gpu as spectral
from .launch import Launch
from .shapes import Shapes

Production = Callable[[Shapes, torch.dtype], Iterator[Launch]]

OPERATIONS: Mapping[str, Production] = {
    "correct_affine": CORRECT_AFFINE.production,
    "add_dense": ADD_DENSE.production,
    "add_sparse": ADD_SPARSE.production,
    "add_spectral": spectral.production,
    "add_kronecker": ADD_KRONECKER.production,
    "add_circulant": ADD_CIRCULANT.production,
    "replace_outputs": REPLACE_OUTPUTS.production,
    "transform_inputs": input_transform.production,
    "embedding": embedding.production,
    "override_norm": norm_override.production,
    "add_bottleneck": bottleneck.production,
    "add_side_attention": side_attention.production,
    "paged_attention": paged_attention.production,
    "rms_norm": rms_norm.production,
    "rotary": rotary.production,
    "silu_mul": silu_mul.production,
}
"""By operation: the launches of each of its configurations, on tensors without memory."""
