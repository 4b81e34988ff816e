"""Bases and adapters on them, for every test of adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from . import peft_oracle
from .peft_oracle import TinyBase

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tiny_model: Callable[..., Path]) -> Callable[[str], TinyBase]:
    """A family's tiny base; the same object for the same family."""
    loaded: dict[str, TinyBase] = {}

    def load(family: str) -> TinyBase:
        if family not in loaded:
            loaded[family] = TinyBase.load(tiny_model(family))
        return loaded[family]

    return load


@pytest.fixture
def save_lora(tiny: Callable[[str], TinyBase], tmp_path: Path) -> Save:
    """``peft_oracle.save_lora`` on a family's tiny base, into ``tmp_path / name``."""

    def save(family: str, name: str = "adapter", **arguments: object) -> Path:
        return peft_oracle.save_lora(tiny(family), tmp_path / name, **arguments)

    return save
