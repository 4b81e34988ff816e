"""One set of device operations, chosen once when the engine starts and passed down explicitly."""

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from .build import CompilerError, build_library, find_compiler
from .cpu.library import DTYPES
from .linear import packed as packed_linear
from .linear import reference as linear_reference
from .linear.op import PrepareLinear
from .low_rank import reference as low_rank_reference
from .low_rank.compiled import CompiledLowRank
from .low_rank.op import AddLowRank
from .paged_attention import reference as attention_reference
from .paged_attention.compiled import CompiledAttention
from .paged_attention.op import PagedAttention, WriteKV
from .rms_norm import reference as rms_norm_reference
from .rms_norm.compiled import CompiledRMSNorm
from .rms_norm.op import AddRMSNorm, RMSNorm
from .rotary import reference as rotary_reference
from .rotary.compiled import CompiledRotary
from .rotary.op import Rotary
from .silu_mul import reference as silu_mul_reference
from .silu_mul.compiled import CompiledSiluMul
from .silu_mul.op import SiluMul

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """The operations the model calls; each field's contract stands in its ``op`` module.

    Attributes:
        name: ``compiled`` or ``reference``, shown at start-up and by ``/version``.
    """

    name: str
    prepare_linear: PrepareLinear
    add_low_rank: AddLowRank
    write_kv: WriteKV
    paged_attention: PagedAttention
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rotary: Rotary
    silu_mul: SiluMul


def reference_backend() -> Backend:
    """Plain torch: the oracle, and the fallback where there is no C++ compiler."""
    return Backend(
        name="reference",
        prepare_linear=linear_reference.prepare_linear,
        add_low_rank=low_rank_reference.add_low_rank,
        write_kv=attention_reference.write_kv,
        paged_attention=attention_reference.paged_attention,
        rms_norm=rms_norm_reference.rms_norm,
        add_rms_norm=rms_norm_reference.add_rms_norm,
        rotary=rotary_reference.rotary,
        silu_mul=silu_mul_reference.silu_mul,
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
    return Backend(
        name="compiled",
        prepare_linear=packed_linear.prepare_linear,
        add_low_rank=CompiledLowRank(library).add_low_rank,
        write_kv=attention.write_kv,
        paged_attention=attention.paged_attention,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rotary=CompiledRotary(library).rotary,
        silu_mul=CompiledSiluMul(library).silu_mul,
    )


def select_backend(name: str, dtype: torch.dtype, cache_dir: Path | None = None) -> Backend:
    """The backend of this name for a model in ``dtype``; ``auto`` is the fastest that works here.

    Raises:
        CompilerError: ``compiled`` was asked for and cannot be built.
        ValueError: There is no backend of this name, or ``compiled`` has no kernels for ``dtype``.
    """
    match name:
        case "auto":
            return _fastest_backend(dtype, cache_dir)
        case "compiled":
            if dtype not in DTYPES:
                raise ValueError(_no_kernels(dtype))
            return compiled_backend(cache_dir)
        case "reference":
            return reference_backend()
    raise ValueError(f"unknown backend {name!r}: choose auto, compiled or reference")


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


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(
            f"cannot load the compiled kernels: {error}: remove {path} to have them built again, "
            f"or choose a cache folder that programs may be loaded from (XDG_CACHE_HOME)"
        ) from error
