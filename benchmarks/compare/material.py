"""The base and the adapters as files that every system reads."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...server.model.errors import ModelError
from ...server.model.source import resolve_model
from ..errors import BenchmarkError
from ..make_adapters import write_adapters

RANK = 16
_STRENGTH = 0.1
"""Standard deviation of B.

Every adapter then says what no other says. With half of it, some answers could be another's; with
half as much again, a base of 135M parameters is so unsettled that rounding changes its answers."""


@dataclass(frozen=True, slots=True)
class Material:
    """What is served.

    Attributes:
        folder: Of its own, where systems may keep what they make of it.
        base: A Hugging Face folder in bfloat16.
        adapters: Folder by name: LoRAs of rank ``RANK`` on all linear modules, in bfloat16.
    """

    folder: Path
    base: Path
    adapters: Mapping[str, Path]


def make_material(base: str, folder: Path, count: int, seed: int) -> Material:
    """Write it below ``folder``, or find what was made of the same before.

    Raises:
        BenchmarkError: The base cannot be had, or has none of the modules.
    """
    try:
        source = resolve_model(base, folder / "state")
        made = _described(source, folder, count, seed)
        if not made.folder.is_dir():
            _make(source, made, seed)
    except (ModelError, ValueError) as error:
        raise BenchmarkError(f"--base {base}: {error}") from error
    return made


def _described(source: Path, folder: Path, count: int, seed: int) -> Material:
    """Where it is, named after what it is made of."""
    told = json.dumps([str(source.resolve()), count, RANK, _STRENGTH, seed])
    own = folder / f"material-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    names = [f"lora-{index:02}" for index in range(count)]
    return Material(own, own / "base", {name: own / "adapters" / name for name in names})


def _make(source: Path, made: Material, seed: int) -> None:
    """Under another name until it is whole."""
    partial = made.folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_bfloat16(source, partial / made.base.name)
    folders = [partial / path.relative_to(made.folder) for path in made.adapters.values()]
    write_adapters(source, folders, [RANK], seed=seed, b_std=_STRENGTH)
    partial.rename(made.folder)


def _write_bfloat16(source: Path, folder: Path) -> None:
    """A copy in which every system finds the numbers that it computes with, rounded once."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: t.to(torch.bfloat16) for name, t in load_file(file).items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        elif file.is_file():
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))
