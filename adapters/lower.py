"""From an adapter folder to primitives: find its kind, and let the kind do the rest.

The kinds are the modules in ``kinds/``; a new one is a new file there and nothing here.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from . import kinds
from .checkpoint import open_checkpoint, open_config
from .errors import AdapterTooLarge, AdapterUnsupported, shown
from .kind import AdapterKind
from .layout import BaseLayout
from .primitives import LoweredAdapter, LowRank


def lower(path: Path, layout: BaseLayout, dtype: torch.dtype, max_bytes: int) -> LoweredAdapter:
    """Read the adapter folder at ``path`` and lower it for one base.

    Args:
        path: The folder.
        layout: The base.
        dtype: Of the base.
        max_bytes: The most that the lowered adapter may take. No kind lowers to fewer numbers than
            it stores, so most of what takes more is refused before its weights are read.

    Raises:
        AdapterError: The adapter is refused; see ``errors`` for the reasons.
    """
    config = open_config(path)
    kind = find_kind(config.fields)
    checkpoint = open_checkpoint(config, max_bytes // dtype.itemsize)
    primitives = kind.parse(checkpoint).lower(layout, dtype)
    ranks = [primitive.rank for primitive in primitives if isinstance(primitive, LowRank)]
    adapter = LoweredAdapter(
        digest=checkpoint.digest,
        kind=kind.name,
        library=kind.library,
        rank=max(ranks, default=0),
        primitives=primitives,
    )
    if adapter.num_bytes > max_bytes:
        raise AdapterTooLarge(
            f"the adapter at {path} takes {adapter.num_bytes} bytes in {dtype}, more than the "
            f"{max_bytes} there is room for"
        )
    return adapter


def find_kind(config: Mapping[str, object]) -> AdapterKind:
    """The kind that serves folders with this configuration.

    Raises:
        AdapterUnsupported: None does; the message names the kind and those that are served.
    """
    served = list(_kinds())
    for kind in served:
        if kind.matches(config):
            return kind
    names = ", ".join(sorted(f"{kind.library} {kind.name}" for kind in served))
    raise AdapterUnsupported(f"{_described(config)} is not served; served kinds: {names}")


def _kinds() -> Iterator[AdapterKind]:
    for module in pkgutil.iter_modules(kinds.__path__):
        kind: AdapterKind = importlib.import_module(f"{kinds.__name__}.{module.name}").KIND
        yield kind


def _described(config: Mapping[str, object]) -> str:
    version = config.get("version")
    if "config" in config and isinstance(version, str) and version.startswith("adapters."):
        return f"an adapter saved by AdapterHub ({shown(version)})"
    if "peft_type" in config:
        return f"an adapter of peft_type {shown(config['peft_type'])}"
    return "an adapter whose configuration has no peft_type"
