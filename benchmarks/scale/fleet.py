"""The adapters of a measurement: random LoRAs, made once and found again."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ..errors import BenchmarkError
from ..make_adapters import B_STD, write_adapters

TARGETS = ["q_proj", "v_proj"]
"""PEFT's own choice for Llama's build."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Adapters as folders.

    Attributes:
        folder: That holds them all and nothing else.
        names: Of the adapters and of their folders, in order.
        rank: Of each.
        file_bytes: Size of one; its tensors take a little less in memory.
    """

    folder: Path
    names: tuple[str, ...]
    rank: int
    file_bytes: int

    def path(self, name: str) -> Path:
        """Of one adapter."""
        return self.folder / name


def make_fleet(
    base: Path,
    work_dir: Path,
    count: int,
    rank: int,
    seed: int,
    *,
    b_std: float = B_STD,
    name: str = "lora",
) -> Fleet:
    """Write adapters called ``name`` and a number below ``work_dir``, or find an earlier run's.

    Raises:
        BenchmarkError: The base has none of the modules, or the disk has too little room for the
            adapters and for the copies that a server makes of them.
    """
    told = json.dumps([str(base.resolve()), count, rank, TARGETS, seed, b_std, name])
    folder = work_dir / f"adapters-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    names = tuple(f"{name}-{index:05}" for index in range(count))
    try:
        one = _size_of_one(base, work_dir, rank)
        there = folder.is_dir()
        require_disk(work_dir, count * one * (1 if there else 2))
        if not there:
            _make(base, folder, names, rank, seed, b_std)
    except ValueError as error:
        raise BenchmarkError(f"--base {base}: {error}") from error
    return Fleet(folder, names, rank, one)


def require_disk(folder: Path, num_bytes: int) -> None:
    """Check that the disk has room for so much, and a tenth more.

    Raises:
        BenchmarkError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes * 1.1 > free:
        raise BenchmarkError(
            f"--work-dir {folder}: the adapters and their copies take {num_bytes / 1e9:.1f} GB, and"
            f" {free / 1e9:.1f} GB are free: ask for fewer --adapters or a lower --rank"
        )


def _make(
    base: Path, folder: Path, names: Sequence[str], rank: int, seed: int, b_std: float
) -> None:
    """Under another name until all are there."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    folders = [partial / name for name in names]
    shown = track(folders, f"making {len(names):,} adapters", console=Console(stderr=True))
    write_adapters(base, shown, [rank], targets=TARGETS, seed=seed, b_std=b_std)
    partial.rename(folder)


def _size_of_one(base: Path, work_dir: Path, rank: int) -> int:
    """Bytes of a folder of this rank, which is written to see."""
    trial = work_dir / "one.partial"
    write_adapters(base, [trial], [rank], targets=TARGETS)
    size = sum(file.stat().st_size for file in trial.iterdir())
    shutil.rmtree(trial)
    return size
