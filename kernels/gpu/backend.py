"""The operations on an NVIDIA GPU, or on the CPU under Triton's interpreter, which proves them."""

from dataclasses import replace

import torch
import triton

from ..affine.gpu import CORRECT_AFFINE
from ..backend import Backend, reference_backend
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
from ..spectral.gpu import SpectralCorrection
from .tuning import Measured, read_measured, tuning_file


def triton_backend(measured: Measured) -> Backend:
    """Our Triton kernels, in the configurations that were measured best on the device."""
    base = reference_backend()
    return replace(
        base,
        name="triton",
        deltas=replace(
            base.deltas,
            correct_affine=CORRECT_AFFINE.tuned(measured),
            add_dense=ADD_DENSE.tuned(measured),
            add_sparse=ADD_SPARSE.tuned(measured),
            add_spectral=SpectralCorrection(ADD_SPARSE.tuned(measured)),
            add_kronecker=ADD_KRONECKER.tuned(measured),
            add_circulant=ADD_CIRCULANT.tuned(measured),
            replace_outputs=REPLACE_OUTPUTS.tuned(measured),
            transform_inputs=input_transform.transform_inputs,
            replace_rows=embedding.replace_rows,
            correct_embedding=embedding.correct_embedding,
            override_norm=norm_override.override_norm,
            add_bottleneck=bottleneck.tuned(measured),
            add_side_attention=side_attention.add_side_attention,
        ),
        write_kv=paged_attention.write_kv,
        paged_attention=paged_attention.tuned(measured),
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        rotary=rotary.rotary,
        silu_mul=silu_mul.silu_mul,
        pads_decode=True,
    )


def measured_on_this_device() -> Measured:
    """What ``deltamux bench kernels --tune`` found on the current GPU; nothing where it never ran.

    Raises:
        ValueError: The file is no such thing.
    """
    return read_measured(tuning_file(torch.cuda.get_device_name()))


def interpreted_backend() -> Backend:
    """The GPU's kernels on the CPU, by Triton's interpreter: slow, and the same computation.

    Raises:
        ValueError: Triton was imported without TRITON_INTERPRET, and compiles.
    """
    if not triton.knobs.runtime.interpret:
        raise ValueError("set TRITON_INTERPRET=1 before anything imports triton")
    return replace(triton_backend({}), name="interpret")
