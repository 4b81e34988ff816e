"""Compiles launches for GPUs that are not there, and reads from the machine code what it costs.

Triton needs no GPU to compile: its wheel carries ptxas. What comes out is the very code that a
machine with that GPU would run, with its registers, spills, shared memory and matrix instructions.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .device import COUNTS
from .launch import Argument, Launch

_POINTERS: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = [["tt.divisibility", 16]]
_MATRIX = {"mma.sync": "mma.sync", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05.mma"}
_WARP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Target:
    """A compute capability.

    Attributes:
        capability: 80 is an A100, 90 an H100 or H200, 100 a B200.
        shared_bytes: What one program may use of shared memory.
    """

    capability: int
    shared_bytes: int

    @property
    def name(self) -> str:
        """As NVIDIA's tools call it."""
        return f"sm_{self.capability}"


TARGETS = (Target(80, 163 * 1024), Target(90, 227 * 1024), Target(100, 227 * 1024))


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a launch is on a target.

    Attributes:
        kernel: Its name.
        target: As ``Target.name``.
        registers: Of a thread.
        spilled_bytes: Of a thread, in local memory: none is what is wanted.
        shared_bytes: Of a program.
        matrix: The matrix instruction it uses, empty without any.
    """

    kernel: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: str


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile the kernel as this launch would have it specialised.

    Raises:
        RuntimeError: Kernels are interpreted in this process, so that there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels can be interpreted, not compiled")
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", target.capability, _WARP_SIZE),
        options=launch.options,
    )
    registers, stack = _resources(compiled.asm["cubin"])
    found = [name for text, name in _MATRIX.items() if text in compiled.asm["ptx"]]
    return Compiled(
        kernel=launch.name,
        target=target.name,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        matrix=", ".join(found),
    )


def faults_of(compiled: Compiled, target: Target, matrix: bool) -> list[str]:
    """Why it should not run there as it is.

    Args:
        compiled: For ``target``.
        target: Its bounds.
        matrix: Whether matrix units are expected to do its products.
    """
    faults = []
    if compiled.spilled_bytes:
        faults.append(f"spills {compiled.spilled_bytes} bytes of each thread's registers")
    if compiled.shared_bytes > target.shared_bytes:
        faults.append(
            f"needs {compiled.shared_bytes} bytes of shared memory; there are {target.shared_bytes}"
        )
    if matrix and not compiled.matrix:
        faults.append("multiplies without matrix instructions")
    return faults


def specialisation(launch: Launch) -> str:
    """What its machine code depends on: launches of which this is equal are compiled once."""
    module = launch.kernel.fn.__module__
    return repr((module, launch.name, *_specialise(launch), launch.options))


def _source(launch: Launch) -> ASTSource:
    return ASTSource(launch.kernel, *_specialise(launch))


def _specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and attributes as a call would have them.

    Ones are constants, multiples of 16 are known as such.
    """
    names = launch.kernel.arg_names
    # An interpreted function has forgotten what it was declared with.
    counts = set(getattr(launch.kernel, "do_not_specialize", COUNTS))
    constants = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(names):
        value = launch.arguments.get(name)
        if name in constants or (isinstance(value, int) and value == 1 and name not in counts):
            constants.setdefault(name, value)
            signature[name] = "constexpr"
        elif value is None:
            raise TypeError(f"{launch.name}: argument {name} is missing")
        else:
            signature[name] = _type_of(value)
            if _is_aligned(value) and name not in counts:
                attributes[(position,)] = _ALIGNED
    return signature, constants, attributes


def _type_of(value: Argument) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Argument) -> bool:
    """Tensors begin where the allocator lets them, at multiples of 512 bytes."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; Triton has no local arrays, so that is spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    text = done.stdout + done.stderr
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
