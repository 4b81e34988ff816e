"""Bases, their layouts and adapters on them, for every test of adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from deltamux.adapters.layout import BaseLayout

from . import peft_oracle

Save = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases() -> dict[str, PreTrainedModel]:
    """The pristine models; PEFT changes what it wraps, so wrap a copy."""
    return {name: peft_oracle.build_base(name).eval() for name in ("llama", "qwen2", "gpt2")}


@pytest.fixture(scope="session")
def layouts(bases: dict[str, PreTrainedModel]) -> dict[str, BaseLayout]:
    return {family: peft_oracle.layout_of(model) for family, model in bases.items()}


@pytest.fixture
def save_lora(bases: dict[str, PreTrainedModel], tmp_path: Path) -> Save:
    """``peft_oracle.save_lora`` on a base by its name, into ``tmp_path / name``."""

    def save(family: str, name: str = "adapter", **arguments: object) -> Path:
        return peft_oracle.save_lora(bases[family], tmp_path / name, **arguments)

    return save
