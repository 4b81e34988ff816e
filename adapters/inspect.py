"""What an adapter folder is, told without a base model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import open_checkpoint
from .folder import open_config
from .lower import find_kind


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """An adapter that is served on the base it was made for.

    Attributes:
        digest: SHA-256 (hex) over its files.
        kind: ``lora``, ...
        library: ``peft``, ...
        base_model: The base it names, if it names one.
        ranks: Its ranks, ascending.
        target_modules: Last names of the modules it changes.
        num_modules: Modules it changes.
        num_parameters: Numbers it stores, as far as they follow from the adapter alone.
        primitives: How many of each primitive it lowers to.
    """

    digest: str
    kind: str
    library: str
    base_model: str | None
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    num_modules: int
    num_parameters: int
    primitives: Mapping[str, int]

    @property
    def num_bytes_bfloat16(self) -> int:
        """Bytes it takes on the device in bfloat16."""
        return 2 * self.num_parameters


_BASE_FIELDS = ("base_model_name_or_path", "model_name", "base_model")
"""PEFT's, AdapterHub's and the plain format's name for the base."""


def _base_model(fields: Mapping[str, object]) -> str | None:
    named = (fields.get(name) for name in _BASE_FIELDS)
    return next((name for name in named if isinstance(name, str) and name), None)


def describe(path: Path) -> AdapterDescription:
    """Read and check the adapter folder at ``path`` as far as that goes without its base.

    Raises:
        AdapterError: It is refused on any base; see ``errors`` for the reasons.
    """
    config = open_config(path)
    kind = find_kind(config)
    checkpoint = open_checkpoint(config)
    shapes = kind.parse(checkpoint).shapes
    paths = {shape.path for shape in shapes if shape.path}
    return AdapterDescription(
        digest=checkpoint.digest,
        kind=kind.name,
        library=kind.library,
        base_model=_base_model(config.fields),
        ranks=tuple(sorted({shape.rank for shape in shapes if shape.rank})),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in paths})),
        num_modules=len(paths),
        num_parameters=sum(shape.num_elements for shape in shapes),
        primitives=Counter(shape.primitive for shape in shapes),
    )
