"""Every launch that a served base needs of a GPU, in all configurations."""

from collections.abc import Callable, Iterator, Mapping

import torch

from ..affine.gpu import CORRECT_AFFINE
from .launch import Launch
from .shapes import Shapes

Production = Callable[[Shapes, torch.dtype], Iterator[Launch]]

OPERATIONS: Mapping[str, Production] = {
    "correct_affine": CORRECT_AFFINE.production,
}
"""By operation: the launches of each of its configurations, on tensors without memory."""
