"""Registries over real files and a real database, and adapter folders that only look like some."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from sqlalchemy import Engine

from deltamux.adapters.files import CONFIG_FILE, SAFETENSORS_FILE
from deltamux.server.state.database import open_database
from deltamux.server.store.archives import ArchiveLimits
from deltamux.server.store.contents import ContentStore
from deltamux.server.store.intake import Intake
from deltamux.server.store.records import Records
from deltamux.server.store.registry import AdapterRegistry
from deltamux.server.store.residents import AdapterPort


def write_adapter(folder: Path, label: str, size: int = 1000) -> Path:
    """A folder whose configuration says what it is; its weights are no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps({"label": label}))
    (folder / SAFETENSORS_FILE).write_bytes((label.encode() or b"-") * size)
    return folder


def label_of(path: str | Path) -> str:
    """What the folder's configuration says; ``path`` itself where there is none."""
    file = Path(path) / CONFIG_FILE
    return json.loads(file.read_text() or "{}").get("label", str(path))


def files_in(folder: Path) -> list[str]:
    """Every file and folder inside, for telling that nothing was left behind.

    What is being removed meanwhile may or may not be among them.
    """
    inside = (Path(at) / name for at, *names in os.walk(folder) for name in chain(*names))
    return sorted(str(path.relative_to(folder)) for path in inside)


@contextmanager
def open_registry(
    state_dir: Path,
    engine: AdapterPort,
    *,
    base: str = "base",
    keep_versions: int = 5,
    copy_local: bool = True,
    archives: ArchiveLimits | None = None,
    store_budget: int | None = None,
) -> Iterator[AdapterRegistry]:
    """A registry as the server makes it; ``open`` has not been called."""
    with open_database(state_dir) as database:
        yield make_registry(
            database,
            state_dir,
            engine,
            base=base,
            keep_versions=keep_versions,
            copy_local=copy_local,
            archives=archives,
            store_budget=store_budget,
        )


def make_registry(
    database: Engine,
    state_dir: Path,
    engine: AdapterPort,
    *,
    base: str = "base",
    keep_versions: int = 5,
    copy_local: bool = True,
    archives: ArchiveLimits | None = None,
    store_budget: int | None = None,
) -> AdapterRegistry:
    contents = ContentStore(state_dir / "adapters")
    intake = Intake(contents, archives or ArchiveLimits(), copy_local)
    records = Records(database, base, contents)
    return AdapterRegistry(base, engine, records, intake, keep_versions, store_budget)
