"""Which of its configurations a kernel runs with: measured on the device, or a rule until then.

Configurations change how work is cut into programs, never what is computed. What was measured is
kept in a file per device, written by ``deltamux bench kernels --tune``; a kernel whose sizes were
not measured there takes the configuration that its own rule names.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import platformdirs


class Key(NamedTuple):
    """Sizes that a choice depends on, each a power of two.

    Attributes:
        rows: Of the longest segment or sequence.
        inner: The rank, or another width inside an operation.
        size: The width of the rows.
    """

    rows: int
    inner: int
    size: int

    @classmethod
    def of(cls, rows: int, inner: int, size: int) -> "Key":
        """The key of any sizes: each rounded up."""
        return cls(*(1 << max(each - 1, 0).bit_length() for each in (rows, inner, size)))


ChooseConfig = Callable[[Key], int]
"""A kernel's own rule: the index of a configuration."""

Measured = Mapping[str, Mapping[Key, int]]
"""By operation and sizes, the index of the fastest configuration."""


class Choice:
    """The configuration of one operation, by its sizes.

    Raises:
        ValueError: What was measured names a configuration that there is not.
    """

    def __init__(
        self, operation: str, rule: ChooseConfig, num_configs: int, measured: Measured
    ) -> None:
        """Prefer what was measured of this operation to its rule."""
        self._rule = rule
        self._measured = measured.get(operation, {})
        for key, index in self._measured.items():
            if not 0 <= index < num_configs:
                raise ValueError(
                    f"{operation} has {num_configs} configurations, and the tuning file of this"
                    f" device names number {index} for {key}: it is of another version; run"
                    " deltamux bench kernels --tune again"
                )

    def __call__(self, key: Key) -> int:
        """An index into the operation's configurations."""
        found = self._measured.get(key)
        return self._rule(key) if found is None else found


def tuning_file(device_name: str, folder: Path | None = None) -> Path:
    """Where the measurements on a device are kept, by its name as CUDA gives it."""
    root = platformdirs.user_cache_path("deltamux") / "tuned" if folder is None else folder
    return root / (re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-") + ".json")


def read_measured(path: Path) -> Measured:
    """What ``write_measured`` wrote; nothing where there is no file.

    Raises:
        ValueError: The file holds something else.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {
            operation: {Key(*entry["key"]): int(entry["config"]) for entry in entries}
            for operation, entries in stored.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning file: {error}; remove it") from error


def write_measured(path: Path, measured: Measured) -> None:
    """Keep measurements for later starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        operation: [{"key": list(key), "config": index} for key, index in sorted(choices.items())]
        for operation, choices in measured.items()
    }
    path.write_text(json.dumps(stored, indent=1) + "\n")
