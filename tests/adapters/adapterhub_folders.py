"""Adapters that AdapterHub's library saved, and what it computed with them: ``tests/golden``."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltamux.adapters.base import Base
from deltamux.adapters.checkpoint import Checkpoint, open_checkpoint
from deltamux.adapters.folder import open_config
from deltamux.adapters.kind import Lowered
from deltamux.adapters.lower import find_kind

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
ADAPTER = "foo"


@dataclass(frozen=True)
class Golden:
    """One prompt, and the library's greedy tokens and log-probabilities after it."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def folder(name: str) -> Path:
    """``llama/seq_bn`` -> where it is."""
    return GOLDEN / "adapterhub" / name


def every_name() -> list[str]:
    """Of the adapters on tiny bases."""
    found = (path for family in FAMILIES for path in folder(family).iterdir())
    return sorted(f"{path.parent.name}/{path.name}" for path in found)


def goldens(name: str) -> Iterator[Golden]:
    """What the library computed."""
    expected = json.loads((folder(name) / "expected.json").read_text())
    fields = ("prompts", "tokens", "logprobs", "prompt_logprobs")
    for values in zip(*(expected[field] for field in fields), strict=True):
        yield Golden(*values)


def checkpoint_of(path: Path) -> Checkpoint:
    """The adapter of a folder, read."""
    return open_checkpoint(open_config(path))


def lower_checkpoint(checkpoint: Checkpoint, path: Path, base: Base) -> Lowered:
    """By the kind of the folder that the checkpoint was made from, whatever was changed in it."""
    config = replace(open_config(path), fields=checkpoint.config, options=checkpoint.options)
    lowered = find_kind(config).parse(checkpoint).lower(base)
    return Lowered(lowered.parts, lowered.prefix)


def with_fields(checkpoint: Checkpoint, **fields: Any) -> Checkpoint:
    """The checkpoint with other fields in its method's configuration."""
    inner = checkpoint.config["config"]
    assert isinstance(inner, dict)
    return replace(checkpoint, config={**checkpoint.config, "config": {**inner, **fields}})


def with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Tensor | None]) -> Checkpoint:
    """The checkpoint with other tensors, or without those that are None."""
    changed = {**checkpoint.tensors, **tensors}
    return replace(
        checkpoint, tensors={name: each for name, each in changed.items() if each is not None}
    )
