"""Compiles the C++ kernels at first use into a shared library that later starts find again.

A library is compiled for the very CPU it runs on, so it is built here rather than shipped; no
header of torch is included, which keeps that to seconds. It links the OpenMP runtime that torch has
loaded: with two of them in one process, two pools of threads would wait actively on the same cores.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from platformdirs import user_cache_path

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC"),
    *("-fno-math-errno", "-ffp-contract=fast"),
)

_FOLDER = Path(__file__).parent


class CompilerError(RuntimeError):
    """There are no compiled kernels to be had; the message holds what the compiler said, or why."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler as a command line, e.g. ``("ccache", "g++")``."""

    command: tuple[str, ...]

    def run(self, arguments: Sequence[str]) -> str:
        """Its output; raises CompilerError with it where it fails."""
        command = [*self.command, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise CompilerError(f"cannot run the C++ compiler {command[0]!r}: {error}") from error
        if done.returncode:
            raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        return done.stdout


def find_compiler() -> Compiler | None:
    """The compiler that CXX names, else the first of COMPILERS on the PATH, else None."""
    if named := os.environ.get("CXX"):
        return Compiler(tuple(named.split()))
    found = (path for name in COMPILERS if (path := shutil.which(name)))
    return next((Compiler((path,)) for path in found), None)


def build_library(compiler: Compiler, cache_dir: Path | None = None) -> Path:
    """Path of the compiled library, built unless one of the same key is in the cache.

    The key covers the sources, the flags and what the compiler predefines for this CPU (its
    version and every instruction set it will use), so a stale library is never found. Concurrent
    builds each write a file of their own, and the last rename wins.

    Raises:
        CompilerError: The compiler failed, or the cache cannot be written.
    """
    folder = cache_dir or user_cache_path("deltamux")
    link_flags = ("-shared", *_openmp_flags())
    library = folder / f"kernels-{_key(compiler, link_flags)}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _build(compiler, link_flags, library)
    except OSError as error:
        raise CompilerError(
            f"cannot keep compiled kernels in {folder}: {error}: make it writable, or choose "
            f"another cache folder (XDG_CACHE_HOME)"
        ) from error
    return library


def _build(compiler: Compiler, link_flags: Sequence[str], library: Path) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        objects = _compile(compiler, Path(folder))
        compiler.run([*objects, "-o", str(built), *link_flags])
        os.replace(built, library)
    logger.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - started, library)


def _compile(compiler: Compiler, folder: Path) -> list[str]:
    """Objects of all sources in the folder, compiled side by side."""
    sources = [path for path in _sources() if path.suffix == ".cpp"]
    objects = [str(folder / f"{number}.o") for number in range(len(sources))]

    def compile_one(source: Path, compiled: str) -> None:
        compiler.run(["-c", str(source), "-o", compiled, *FLAGS])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))  # raises what any of them raised
    return objects


def _key(compiler: Compiler, link_flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (
        *compiler.command,
        *FLAGS,
        *link_flags,
        compiler.run([*FLAGS, "-dM", "-E", "-x", "c++", os.devnull]),
    ):
        digest.update(part.encode() + b"\0")
    for path in _sources():
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _sources() -> list[Path]:
    return sorted(path for path in _FOLDER.rglob("*") if path.suffix in (".cpp", ".h"))


def _openmp_flags() -> tuple[str, ...]:
    """Link torch's own copy of libgomp where its wheel has one, else the system's."""
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for runtime in sorted(folder.glob("libgomp*.so*")):
            return (str(runtime), f"-Wl,-rpath,{folder}")
    return ("-l:libgomp.so.1",)
