"""One set of device operations, chosen once when the engine starts and passed down explicitly."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from .affine import reference as affine_reference
from .bottleneck import reference as bottleneck_reference
from .bottleneck.compiled import CompiledBottleneck
from .bottleneck.op import AddBottleneck
from .build import CompilerError, build_library, find_compiler
from .circulant import reference as circulant_reference
from .cpu.corrections import CompiledCorrection
from .cpu.library import DTYPES, Library
from .cpu.program import Programs
from .dense import reference as dense_reference
from .embedding import reference as embedding_reference
from .embedding.compiled import CompiledEmbedding
from .embedding.op import CorrectEmbedding
from .gather import reference as gather_reference
from .gather.compiled import CompiledGather
from .gather.op import GatherRows
from .input_transform import reference as input_transform_reference
from .input_transform.compiled import CompiledInputTransform
from .input_transform.op import TransformInputs
from .kronecker import reference as kronecker_reference
from .largest import reference as largest_reference
from .largest.compiled import CompiledLargest
from .largest.op import Largest
from .linear import reference as linear_reference
from .linear.compiled import CompiledLinear
from .linear.op import PrepareLinear
from .norm_override import reference as norm_override_reference
from .norm_override.compiled import CompiledNormOverride
from .norm_override.op import OverrideNorm
from .output_rows import reference as output_rows_reference
from .paged_attention import reference as attention_reference
from .paged_attention.compiled import CompiledAttention
from .paged_attention.op import PagedAttention, WriteKV
from .rms_norm import reference as rms_norm_reference
from .rms_norm.compiled import CompiledRMSNorm
from .rms_norm.op import AddRMSNorm, RMSNorm
from .rotary import reference as rotary_reference
from .rotary.compiled import CompiledRotary
from .rotary.op import Rotary
from .side_attention import reference as side_attention_reference
from .side_attention.compiled import CompiledSideAttention
from .side_attention.op import AddSideAttention
from .silu_mul import reference as silu_mul_reference
from .silu_mul.compiled import CompiledSiluMul
from .silu_mul.op import SiluMul
from .sparse import reference as sparse_reference
from .spectral import reference as spectral_reference
from .tables import CorrectLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeltaOps:
    """The operations of the adapters' primitives; each field's contract is its ``op`` module."""

    correct_affine: CorrectLinear
    add_dense: CorrectLinear
    add_sparse: CorrectLinear
    add_spectral: CorrectLinear
    add_kronecker: CorrectLinear
    add_circulant: CorrectLinear
    replace_outputs: CorrectLinear
    transform_inputs: TransformInputs
    replace_rows: CorrectEmbedding
    correct_embedding: CorrectEmbedding
    override_norm: OverrideNorm
    add_bottleneck: AddBottleneck
    add_side_attention: AddSideAttention


@dataclass(frozen=True, slots=True)
class Backend:
    """The operations the model calls; each field's contract stands in its ``op`` module.

    Attributes:
        name: ``compiled``, ``triton``, ``interpret`` or ``reference``, shown at start-up and by
            ``/version``.
        pads_decode: Whether steps of one row a sequence may be padded by rows without a context,
            whose slot is -1.
        programs: Records steps of these operations, so that they can run again without Python.
        leaves_out_rows: Whether recorded steps in bfloat16 do no work for rows they are padded by.
    """

    name: str
    deltas: DeltaOps
    prepare_linear: PrepareLinear
    write_kv: WriteKV
    paged_attention: PagedAttention
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rotary: Rotary
    silu_mul: SiluMul
    gather_rows: GatherRows
    largest: Largest
    pads_decode: bool = False
    programs: Programs | None = None
    leaves_out_rows: bool = False


def reference_backend() -> Backend:
    """Plain torch: the oracle, and the fallback where there is no C++ compiler."""
    return Backend(
        name="reference",
        deltas=_reference_deltas(),
        prepare_linear=linear_reference.prepare_linear,
        write_kv=attention_reference.write_kv,
        paged_attention=attention_reference.paged_attention,
        rms_norm=rms_norm_reference.rms_norm,
        add_rms_norm=rms_norm_reference.add_rms_norm,
        rotary=rotary_reference.rotary,
        silu_mul=silu_mul_reference.silu_mul,
        gather_rows=gather_reference.gather_rows,
        largest=largest_reference.largest,
    )


def compiled_backend(cache_dir: Path | None = None) -> Backend:
    """Our C++ kernels for float32 and bfloat16 on the CPU, compiled at first use.

    Args:
        cache_dir: Folder of compiled libraries; the user's cache folder by default.

    Raises:
        CompilerError: There is no C++ compiler, it failed, or its library cannot be kept or loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError("no C++ compiler found: install g++, or name one in CXX")
    library = _load(build_library(compiler, cache_dir))
    attention, norm = CompiledAttention(library), CompiledRMSNorm(library)
    linear = CompiledLinear(library)
    return Backend(
        name="compiled",
        deltas=_compiled_deltas(library),
        prepare_linear=linear.prepare_linear,
        write_kv=attention.write_kv,
        paged_attention=attention.paged_attention,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rotary=CompiledRotary(library).rotary,
        silu_mul=CompiledSiluMul(library).silu_mul,
        gather_rows=CompiledGather(library).gather_rows,
        largest=CompiledLargest(library).largest,
        programs=Programs(library),
        leaves_out_rows=linear.has_matrix_unit,
    )


def select_backend(
    name: str, dtype: torch.dtype, device: torch.device, cache_dir: Path | None = None
) -> Backend:
    """The backend of this name for a model in ``dtype``; ``auto`` is the fastest that works here.

    Raises:
        CompilerError: ``compiled`` was asked for and cannot be built.
        ValueError: There is no backend of this name, or it has no kernels for device or dtype.
    """
    on_gpu = device.type == "cuda"
    match name:
        case "auto":
            return _triton_backend() if on_gpu else _fastest_backend(dtype, cache_dir)
        case "triton" if on_gpu:
            return _triton_backend()
        case "triton":
            raise ValueError("Triton's kernels need a GPU; interpret runs them on the CPU, slowly")
        case "interpret" if not on_gpu:
            return _interpreted_backend()
        case "compiled" if dtype in DTYPES and not on_gpu:
            return compiled_backend(cache_dir)
        case "compiled":
            raise ValueError("compiled kernels are for the CPU" if on_gpu else _no_kernels(dtype))
        case "reference":
            return reference_backend()
    raise ValueError(f"there is no backend {name!r} for {device.type}")


def _reference_deltas() -> DeltaOps:
    return DeltaOps(
        correct_affine=affine_reference.correct_affine,
        add_dense=dense_reference.add_dense,
        add_sparse=sparse_reference.add_sparse,
        add_spectral=spectral_reference.add_spectral,
        add_kronecker=kronecker_reference.add_kronecker,
        add_circulant=circulant_reference.add_circulant,
        replace_outputs=output_rows_reference.replace_outputs,
        transform_inputs=input_transform_reference.transform_inputs,
        replace_rows=embedding_reference.replace_rows,
        correct_embedding=embedding_reference.correct_embedding,
        override_norm=norm_override_reference.override_norm,
        add_bottleneck=bottleneck_reference.add_bottleneck,
        add_side_attention=side_attention_reference.add_side_attention,
    )


def _compiled_deltas(library: Library) -> DeltaOps:
    embedding = CompiledEmbedding(library)
    return DeltaOps(
        correct_affine=CompiledCorrection(library, "correct_affine"),
        add_dense=CompiledCorrection(library, "add_dense"),
        add_sparse=CompiledCorrection(library, "add_sparse"),
        add_spectral=CompiledCorrection(library, "add_spectral"),
        add_kronecker=CompiledCorrection(library, "add_kronecker"),
        add_circulant=CompiledCorrection(library, "add_circulant"),
        replace_outputs=CompiledCorrection(library, "replace_outputs"),
        transform_inputs=CompiledInputTransform(library).transform_inputs,
        replace_rows=embedding.replace_rows,
        correct_embedding=embedding.correct_embedding,
        override_norm=CompiledNormOverride(library).override_norm,
        add_bottleneck=CompiledBottleneck(library).add_bottleneck,
        add_side_attention=CompiledSideAttention(library).add_side_attention,
    )


def _triton_backend() -> Backend:
    # Here and not above: triton takes a while to import, and reads TRITON_INTERPRET when it is.
    from .gpu.backend import measured_on_this_device, triton_backend

    return triton_backend(measured_on_this_device())


def _interpreted_backend() -> Backend:
    from .gpu.backend import interpreted_backend

    return interpreted_backend()


def _fastest_backend(dtype: torch.dtype, cache_dir: Path | None) -> Backend:
    if dtype not in DTYPES:
        return _slower_backend(_no_kernels(dtype))
    try:
        return compiled_backend(cache_dir)
    except CompilerError as error:
        return _slower_backend(str(error))


def _slower_backend(why: str) -> Backend:
    logger.warning("running the slower reference kernels, because %s", why)
    return reference_backend()


def _no_kernels(dtype: torch.dtype) -> str:
    return f"there are no compiled kernels for {dtype}: serve in {' or '.join(DTYPES.values())}"


def _load(path: Path) -> Library:
    try:
        return Library(path)
    except OSError as error:
        raise CompilerError(
            f"cannot load the compiled kernels: {error}: remove {path} to have them built again, "
            f"or choose a cache folder that programs may be loaded from (XDG_CACHE_HOME)"
        ) from error
