"""Adapter folders are files from strangers: opened, bounded and hashed here. Free of torch.

    library      configuration          weights, the first that is there        beside them
    peft         adapter_config.json    adapter_model.safetensors | .bin
    adapterhub   adapter_config.json    adapter.safetensors, pytorch_adapter.bin    the head's files
    plain        delta_config.json      delta.safetensors

``deltamux.json`` in any of them holds what the library does not save and serving needs to know (a
task's number, say). Each file is read with a limit that is checked beforehand. Symbolic links are
followed, because hub caches are made of them, but only to regular files. What the digest of an
adapter covers is exactly what is read to serve it.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from .errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnsupported,
    shown,
)
from .files import (
    ADAPTERHUB,
    CONFIG_FILE,
    FUSION_CONFIG_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    OPTIONS_FILE,
    PEFT,
    PLAIN,
    PLAIN_CONFIG_FILE,
    WEIGHT_FILES,
)

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 8 << 30

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The configuration of an adapter folder.

    Attributes:
        folder: The folder.
        library: Whose format it is: a key of WEIGHT_FILES.
        fields: The JSON object of the configuration.
        options: The JSON object of ``deltamux.json``, empty without one.
        interface: The JSON object of AdapterHub's ``adapter_interface.json``, None without one.
        read: Name and bytes of every file read.
    """

    folder: Path
    library: str
    fields: Mapping[str, object]
    options: Mapping[str, object]
    interface: Mapping[str, object] | None
    read: tuple[tuple[str, bytes], ...]


def open_config(folder: Path) -> ConfigFile:
    """Read the configuration of an adapter folder.

    Raises:
        AdapterNotFound: There is no such folder.
        AdapterCorrupt: The file is missing, or is not a JSON object.
        AdapterTooLarge: The file exceeds 1 MiB.
    """
    if not folder.is_dir():
        raise AdapterNotFound(f"there is no adapter folder at {folder}")
    names = [name for name in (CONFIG_FILE, PLAIN_CONFIG_FILE) if os.path.lexists(folder / name)]
    if not names:
        raise _no_config(folder)
    if len(names) > 1:
        raise AdapterCorrupt(f"{folder} holds two adapters: {' and '.join(names)}")
    read = [
        (name, raw)
        for name in (names[0], OPTIONS_FILE, INTERFACE_FILE)
        if (raw := _small(folder / name)) is not None
    ]
    parsed = {name: _parse_config(folder / name, raw) for name, raw in read}
    fields = parsed[names[0]]
    return ConfigFile(
        folder=folder,
        library=_library(names[0], fields),
        fields=fields,
        options=parsed.get(OPTIONS_FILE, {}),
        interface=parsed.get(INTERFACE_FILE),
        read=tuple(read),
    )


def covered_files(config: ConfigFile) -> tuple[str, ...]:
    """Names of the files that the adapter consists of, in the order in which they are hashed.

    Raises:
        AdapterCorrupt: There is no weight file.
    """
    names = WEIGHT_FILES[config.library]
    weights = _first(config.folder, names)
    if weights is None:
        raise no_weights(config.folder, names)
    head = _first(config.folder, HEAD_FILES) if config.library == ADAPTERHUB else None
    return (*(name for name, _ in config.read), weights, *([head] if head else []))


def no_weights(folder: Path, names: Iterable[str]) -> AdapterCorrupt:
    """The refusal of a folder with none of the weight files that its library writes."""
    return AdapterCorrupt(f"{folder} holds neither {' nor '.join(names)}")


def hash_folder(folder: Path) -> str:
    """The digest of the adapter in ``folder``, as ``digest_of`` its files, without parsing them.

    Raises:
        AdapterError: A file is missing, too large, or no regular file.
    """
    digest = hashlib.sha256()
    for name in covered_files(open_config(folder)):
        with opened_file(folder / name) as file:
            if file is None:
                raise AdapterCorrupt(f"{folder / name} vanished while it was read")
            _hash_file(digest, folder / name, file)
    return digest.hexdigest()


def _hash_file(digest: "hashlib._Hash", path: Path, file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_WEIGHT_BYTES:
        raise too_large(path, size, MAX_WEIGHT_BYTES)
    _hash_head(digest, path.name, size)
    left = size
    while left and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    if left:
        raise AdapterCorrupt(f"{path} was cut short while it was read")


def _hash_head(digest: "hashlib._Hash", name: str, size: int) -> None:
    digest.update(name.encode() + b"\0" + size.to_bytes(8, "little"))


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over name, length (8 bytes, little endian) and bytes of each file, in hex."""
    digest = hashlib.sha256()
    for name, raw in files:
        _hash_head(digest, name, len(raw))
        digest.update(raw)
    return digest.hexdigest()


def _first(folder: Path, names: Iterable[str]) -> str | None:
    return next((name for name in names if os.path.lexists(folder / name)), None)


@contextmanager
def opened_file(path: Path) -> Iterator[BinaryIO | None]:
    """The regular file of this name, None where there is none.

    Raises:
        AdapterCorrupt: It is no regular file, or cannot be opened.
    """
    descriptor = _descriptor(path)
    if descriptor is None:
        yield None
        return
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterCorrupt(f"{path} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _descriptor(path: Path) -> int | None:
    try:
        # Opened before it is looked at, so that nothing can be exchanged in between; non-blocking,
        # because opening a FIFO would wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise AdapterCorrupt(f"{path} is a link to a file that does not exist") from None
        return None
    except OSError as error:
        raise AdapterCorrupt(f"{path} cannot be opened: {error.strerror}") from error


def read_file(path: Path, file: BinaryIO, max_bytes: int) -> bytes:
    """All bytes of the file opened from ``path``.

    Raises:
        AdapterTooLarge: They are more than ``max_bytes``.
    """
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise too_large(path, size, max_bytes)
    return file.read(size)


def too_large(path: Path, size: int, max_bytes: int) -> AdapterTooLarge:
    """The refusal of a file over its limit."""
    return AdapterTooLarge(f"{path} has {size} bytes, more than the limit of {max_bytes}")


def _small(path: Path) -> bytes | None:
    """The bytes of a configuration file, None where there is none."""
    with opened_file(path) as file:
        return None if file is None else read_file(path, file, MAX_CONFIG_BYTES)


def _library(config_file: str, fields: Mapping[str, object]) -> str:
    version = fields.get("version")
    if config_file == PLAIN_CONFIG_FILE:
        return PLAIN
    by_adapterhub = "config" in fields and isinstance(version, str)
    return ADAPTERHUB if by_adapterhub and "peft_type" not in fields else PEFT


def _no_config(folder: Path) -> AdapterError:
    """PEFT saves an adapter that is not named ``default`` to a folder of that name inside."""
    if (folder / FUSION_CONFIG_FILE).exists():
        return AdapterUnsupported(
            f"{folder} holds an AdapterFusion, which mixes several adapters by attention between "
            "them: serve its adapters one by one"
        )
    inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_FILE}"))
    hint = f"; did you mean its folder {' or '.join(inside[:4])}?" if inside else ""
    return AdapterCorrupt(f"{folder} holds no {CONFIG_FILE} and no {PLAIN_CONFIG_FILE}{hint}")


def _parse_config(path: Path, raw: bytes) -> Mapping[str, object]:
    try:
        config = json.loads(
            raw, object_pairs_hook=_unique_keys, parse_constant=_refuse_json_constant
        )
    except (ValueError, RecursionError) as error:
        raise AdapterCorrupt(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterCorrupt(f"{path} holds a JSON {type(config).__name__}, not an object")
    return config


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} appears twice")
        fields[name] = value
    return fields


def _refuse_json_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
