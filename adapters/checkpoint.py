"""Adapter folders are files from strangers: this is the only place that reads them.

A folder is ``adapter_config.json`` and ``adapter_model.safetensors``, or ``adapter_model.bin`` in
the pickle format of ``torch.save``, of which only what builds plain tensors is ever executed. Each
file is read with a limit that is checked beforehand, and the bytes that are hashed are the bytes
that are parsed, so that a digest stands for the tensors that came with it even if the file changes
meanwhile. Symbolic links are followed, because hub caches are made of them, but only to regular
files.
"""

import hashlib
import io
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnsupported,
    shown,
)

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 8 << 30
OVERHEAD_BYTES = 16 << 20
"""What a weight file may have beside its numbers: names, shapes and padding."""

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_MAX_HEADER_BYTES = 1 << 20
_WIDEST = 8
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The configuration of an adapter folder.

    Attributes:
        folder: The folder.
        raw: The file's bytes.
        fields: The JSON object in it.
    """

    folder: Path
    raw: bytes
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Configuration and weights of an adapter folder.

    Floating-point tensors are finite and of one of FLOAT_DTYPES.

    Attributes:
        config: The JSON object of the configuration.
        tensors: Every tensor of the weight file by its name, on the CPU.
        digest: SHA-256 (hex) over both files.
    """

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    digest: str


def open_config(folder: Path) -> ConfigFile:
    """Read the configuration of an adapter folder.

    Raises:
        AdapterNotFound: There is no such folder.
        AdapterCorrupt: The file is missing, or is not a JSON object.
        AdapterTooLarge: The file exceeds 1 MiB.
    """
    if not folder.is_dir():
        raise AdapterNotFound(f"there is no adapter folder at {folder}")
    path = folder / CONFIG_FILE
    with _opened(path) as file:
        if file is None:
            raise AdapterCorrupt(f"{folder} holds no {CONFIG_FILE}{_where_else(folder)}")
        raw = _read(path, file, MAX_CONFIG_BYTES)
    return ConfigFile(folder, raw, _parse_config(path, raw))


def open_checkpoint(config: ConfigFile, max_numbers: int = MAX_WEIGHT_BYTES) -> Checkpoint:
    """Read the weights beside a configuration; safetensors first, as PEFT does.

    Args:
        config: The configuration.
        max_numbers: Numbers that the weight file may hold. What its size, or the header of a
            safetensors file, shows to hold more is refused unread.

    Raises:
        AdapterCorrupt: No weight file, an unreadable one, or NaN or Inf in a tensor.
        AdapterUnsupported: A pickle that holds more than plain tensors, or an unknown dtype.
        AdapterTooLarge: The file exceeds 8 GiB, or holds more than ``max_numbers``.
    """
    for name, parse in ((SAFETENSORS_FILE, _parse_safetensors), (PICKLE_FILE, _parse_pickle)):
        path = config.folder / name
        with _opened(path) as file:
            if file is None:
                continue
            raw = _read_weights(path, file, max_numbers)
        tensors = parse(path, raw)
        for tensor_name, tensor in tensors.items():
            _require_finite(path, tensor_name, tensor)
        return Checkpoint(config.fields, tensors, digest_of(config.raw, raw))
    raise AdapterCorrupt(f"{config.folder} holds neither {SAFETENSORS_FILE} nor {PICKLE_FILE}")


def digest_of(config: bytes, weights: bytes) -> str:
    """SHA-256(len(config) as 8 bytes, little endian | config | weights), in hex."""
    digest = hashlib.sha256(len(config).to_bytes(8, "little"))
    digest.update(config)
    digest.update(weights)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """The regular file of this name, None where there is none."""
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


def _read(path: Path, file: BinaryIO, max_bytes: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise AdapterTooLarge(f"{path} has {size} bytes, more than the limit of {max_bytes}")
    return file.read(size)


def _read_weights(path: Path, file: BinaryIO, max_numbers: int) -> bytes:
    max_bytes = min(MAX_WEIGHT_BYTES, max_numbers * _WIDEST + OVERHEAD_BYTES)
    if path.name == SAFETENSORS_FILE and os.fstat(file.fileno()).st_size <= max_bytes:
        numbers = _declared_numbers(file)
        if numbers > max_numbers:
            raise AdapterTooLarge(
                f"{path} holds {numbers} numbers, more than the {max_numbers} there is room for"
            )
    return _read(path, file, max_bytes)


def _declared_numbers(file: BinaryIO) -> int:
    """How many numbers the header of a safetensors file declares, 0 where it has no sound one.

    The format: 8 bytes with the header's length, little endian, and the header in JSON. What is
    wrong with it, or with one of over 1 MiB, is told by the parser, which reads the whole file.
    """
    raw = file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES))
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        tensors = [entry for name, entry in json.loads(raw).items() if name != "__metadata__"]
        spans = [(entry["dtype"], *entry["data_offsets"]) for entry in tensors]
        if sum(end - start for _, start, end in spans) > size:
            return 0
        return sum(
            (end - start) // _STORED_BYTES.get(dtype, _WIDEST) for dtype, start, end in spans
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0


def _where_else(folder: Path) -> str:
    """PEFT saves an adapter that is not named ``default`` to a folder of that name inside."""
    inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_FILE}"))
    return f"; did you mean its folder {' or '.join(inside[:4])}?" if inside else ""


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


def _parse_safetensors(path: Path, raw: bytes) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load(raw)  # type: ignore[no-any-return]  # untyped library
    except SafetensorError as error:
        raise AdapterCorrupt(f"{path} is not a complete safetensors file: {error}") from error
    except KeyError as error:
        raise AdapterUnsupported(f"{path} holds a tensor of the unknown dtype {error}") from error


def _parse_pickle(path: Path, raw: bytes) -> Mapping[str, Tensor]:
    _require_plain_zip(path, raw)
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterUnsupported(
            f"{path} is a pickle that holds more than plain tensors, and reading it could run its "
            f"code: save the adapter as {SAFETENSORS_FILE}"
        ) from error
    except Exception as error:  # hostile bytes make this decoder fail in any way there is
        raise AdapterCorrupt(f"{path} cannot be read: {type(error).__name__}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise AdapterUnsupported(f"{path} is not a mapping from names to tensors")
    for name, value in content.items():
        _require_plain_tensor(path, name, value, len(raw))
    return {name: value.detach() for name, value in content.items()}


def _require_plain_zip(path: Path, raw: bytes) -> None:
    """``torch.save`` writes zip archives of uncompressed members; refuse what would inflate."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise AdapterCorrupt(
            f"{path} is not a complete torch archive ({error}): save it as {SAFETENSORS_FILE}"
        ) from error
    if inflated > len(raw):
        raise AdapterUnsupported(f"{path} is a compressed archive, which torch.save never writes")


def _require_plain_tensor(path: Path, name: str, value: object, max_bytes: int) -> None:
    """Dense, on the CPU, and no larger than the file: strides can make an element a petabyte."""
    plain = (
        isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= max_bytes
    )
    if not plain:
        raise AdapterUnsupported(f"{path}: {shown(name)} is not a plain dense tensor")


def _require_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in FLOAT_DTYPES:
        raise AdapterUnsupported(
            f"{path}: tensor {shown(name)} is {tensor.dtype}: save it as bfloat16"
        )
    if not bool(tensor.isfinite().all()):
        raise AdapterCorrupt(f"{path}: tensor {shown(name)} holds NaN or Inf")
