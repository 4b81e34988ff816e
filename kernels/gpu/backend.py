"""The operations on an NVIDIA GPU, or on the CPU under Triton's interpreter, which proves them."""

from dataclasses import replace

from ..affine.gpu import CORRECT_AFFINE
from ..backend import Backend, reference_backend
from .tuning import Measured


def triton_backend(measured: Measured) -> Backend:
    """Our Triton kernels, in the configurations that were measured best on the device."""
    base = reference_backend()
    return replace(
        base,
        name="triton",
        deltas=replace(base.deltas, correct_affine=CORRECT_AFFINE.tuned(measured)),
    )
