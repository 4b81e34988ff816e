"""From an adapter folder to primitives: find its kind, and let the kind do the rest.

The kinds are the modules in ``kinds/``; a new one is a new file there and nothing here.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from . import kinds
from .base import Base
from .checkpoint import Checkpoint, open_checkpoint
from .errors import AdapterTooLarge, AdapterUnsupported, shown
from .files import ADAPTERHUB, PLAIN
from .folder import ConfigFile, open_config
from .kind import AdapterKind, ParsedAdapter, PrimitiveShape
from .layout import BaseLayout
from .primitives.embedding import EmbeddingRows
from .primitives.linear import Dense
from .primitives.lowered import LoweredAdapter

REFUSED_PEFT_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "XLORA": "PEFT 0.21.2 leaves out parts of its router when it saves it, so that what was "
        "trained cannot be read back: serve its experts as LoRA adapters",
    }
)
"""Kinds of PEFT that are refused for a reason of their own."""


def lower(path: Path, base: Base, max_bytes: int) -> LoweredAdapter:
    """Read the adapter folder at ``path`` and lower it for one base.

    Args:
        path: The folder.
        base: What it is lowered for.
        max_bytes: The most that the lowered adapter may take. A weight file that declares more
            numbers than fit is refused before it is read, and one that stands for more before it
            is lowered.

    Raises:
        AdapterError: The adapter is refused; see ``errors`` for the reasons.
    """
    config = open_config(path)
    kind = find_kind(config)
    max_numbers = max_bytes // base.dtype.itemsize
    checkpoint = open_checkpoint(config, max_numbers)
    parsed = kind.parse(checkpoint)
    _require_room(path, parsed, base.layout, checkpoint, max_numbers)
    lowered = parsed.lower(base)
    adapter = LoweredAdapter(
        digest=checkpoint.digest,
        kind=kind.name,
        library=kind.library,
        parts=lowered.parts,
        prefix=lowered.prefix,
    )
    if adapter.num_bytes > max_bytes:
        raise AdapterTooLarge(
            f"the adapter at {path} takes {adapter.num_bytes} bytes in {base.dtype}, more than the "
            f"{max_bytes} there is room for"
        )
    return adapter


def _require_room(
    path: Path, parsed: ParsedAdapter, layout: BaseLayout, checkpoint: Checkpoint, max_numbers: int
) -> None:
    """Refuse what is sure to take more than there is room for before any of it is made.

    A few numbers of a file may stand for a whole weight of the base. What the file itself holds is
    left out of the sum, because tensors that equal the base's own are not stored.
    """
    stored = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    numbers = sum(_numbers(shape, layout) for shape in parsed.shapes) - stored
    if numbers > max_numbers:
        raise AdapterTooLarge(
            f"the adapter at {path} would take {numbers} numbers or more on this base, and there "
            f"is room for {max_numbers}"
        )


def _numbers(shape: PrimitiveShape, layout: BaseLayout) -> int:
    """What a primitive stores: those of a size that the adapter does not tell, a whole weight."""
    if shape.num_elements or shape.primitive not in (Dense.__name__, EmbeddingRows.__name__):
        return shape.num_elements
    target = layout.targets.get(shape.path)
    if target is not None:
        return target.in_features * target.out_features
    embedding = layout.embeddings_by_path.get(shape.path)
    return 0 if embedding is None else embedding.num_embeddings * embedding.size


def find_kind(config: ConfigFile) -> AdapterKind:
    """The kind that serves folders with this configuration.

    Raises:
        AdapterUnsupported: None does, or ``deltamux.json`` holds an option that it does not know.
    """
    for kind in all_kinds():
        if kind.library == config.library and kind.matches(config.fields):
            _check_options(kind, config)
            return kind
    reason = REFUSED_PEFT_TYPES.get(str(config.fields.get("peft_type")))
    if reason is not None:
        raise AdapterUnsupported(f"{_described(config)} is not served: {reason}")
    names = ", ".join(kind.name for kind in all_kinds() if kind.library == config.library)
    raise AdapterUnsupported(f"{_described(config)} is not served; served kinds: {names}")


@cache
def all_kinds() -> tuple[AdapterKind, ...]:
    """Every kind there is, by library and name; looked for once."""
    return tuple(sorted(_kinds(), key=lambda kind: (kind.library, kind.name)))


def _kinds() -> Iterator[AdapterKind]:
    for module in pkgutil.iter_modules(kinds.__path__):
        kind: AdapterKind = importlib.import_module(f"{kinds.__name__}.{module.name}").KIND
        yield kind


def _check_options(kind: AdapterKind, config: ConfigFile) -> None:
    for name in config.options:
        if name not in kind.page.options:
            known = ", ".join(kind.page.options) or "none"
            raise AdapterUnsupported(
                f"{config.folder}: deltamux.json holds the option {shown(name)}, and a "
                f"{kind.library} {kind.name} adapter knows: {known}"
            )


def _described(config: ConfigFile) -> str:
    fields = config.fields
    match config.library:
        case library if library == ADAPTERHUB:
            return (
                f"an adapter saved by AdapterHub with the configuration {shown(fields['config'])}"
            )
        case library if library == PLAIN:
            return f"a delta of delta_type {shown(fields.get('delta_type'))}"
    if "peft_type" in fields:
        return f"an adapter of peft_type {shown(fields['peft_type'])}"
    return "an adapter whose configuration has no peft_type"
