"""The adapters of ``golden/``: saved by AdapterHub's library, with what the library computes.

``golden/make_adapterhub.py`` made them and says under which conditions.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Expected:
    """A list per prompt.

    Attributes:
        prompts: Token ids.
        tokens: Greedy ones, the end token ignored; as many as to ask for.
        logprobs: Of ``tokens``.
        prompt_logprobs: Of the prompt's tokens, from the second on.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    prompt_logprobs: list[list[float]]


@dataclass(frozen=True)
class Golden:
    """One adapter and its base: a family of ``tiny_models``, or ``smollm2``, the demo base."""

    name: str
    family: str
    folder: Path

    @cached_property
    def expected(self) -> Expected:
        return self._read("expected.json")

    @cached_property
    def expected_live(self) -> Expected:
        """DiReFT only: before saving, which drops ``subtract_projection=False``."""
        return self._read("expected_live.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        return config

    def _read(self, name: str) -> Expected:
        return Expected(**json.loads((self.folder / name).read_text()))

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def _goldens() -> tuple[Golden, ...]:
    folders = sorted(path.parent for path in GOLDEN.glob("adapterhub/*/*/expected.json"))
    return tuple(Golden(folder.name, folder.parent.name, folder) for folder in folders)


GOLDENS: tuple[Golden, ...] = _goldens()
REFUSED: tuple[Path, ...] = tuple(sorted((GOLDEN / "adapterhub_refused").iterdir()))
"""Folders that the library saved and that must be refused by name."""
