"""The weights of an adapter folder, hostile until proven otherwise: bytes of strangers -> tensors.

``.bin`` is the pickle format of ``torch.save``, of which only what builds plain tensors is ever
executed. The bytes that are hashed are the bytes that are parsed, so that a digest stands for the
tensors that came with it even if the file changes meanwhile.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import AdapterCorrupt, AdapterTooLarge, AdapterUnsupported, shown
from .files import ADAPTERHUB, HEAD_FILES, SAFETENSORS_FILE, WEIGHT_FILES
from .finite import all_finite
from .folder import (
    MAX_WEIGHT_BYTES,
    ConfigFile,
    digest_of,
    no_weights,
    opened_file,
    read_file,
)

OVERHEAD_BYTES = 16 << 20
"""What a weight file may have beside its numbers: names, shapes and padding."""

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_MAX_HEADER_BYTES = 1 << 20
_MAX_DIMENSIONS = 8
"""No kind's tensor has more, and torch itself fails beyond 64."""
_WIDEST = 8
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Configuration and weights of an adapter folder.

    Tensors are of FLOAT_DTYPES or INTEGER_DTYPES, and those of the former are finite in float32.

    Attributes:
        library: Whose format it is.
        config: The JSON object of the configuration.
        tensors: Every tensor of the weight file by its name, on the CPU.
        digest: SHA-256 (hex) over every file.
        options: The JSON object of ``deltamux.json``, empty without one.
        head: Every tensor of AdapterHub's head file by its name, empty without one.
        interface: The JSON object of AdapterHub's ``adapter_interface.json``, None without one.
    """

    library: str
    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    digest: str
    options: Mapping[str, object]
    head: Mapping[str, Tensor]
    interface: Mapping[str, object] | None = None


def open_checkpoint(config: ConfigFile, max_numbers: int = MAX_WEIGHT_BYTES) -> Checkpoint:
    """Read the weights beside a configuration; safetensors first, as the libraries do.

    Args:
        config: The configuration.
        max_numbers: Numbers that a weight file may hold. What its size, or the header of a
            safetensors file, shows to hold more is refused unread.

    Raises:
        AdapterCorrupt: No weight file, an unreadable one, or NaN or Inf in a tensor.
        AdapterUnsupported: A pickle that holds more than plain tensors, or an unknown dtype.
        AdapterTooLarge: The file exceeds 8 GiB, or holds more than ``max_numbers``.
    """
    names = WEIGHT_FILES[config.library]
    weights = _first_weights(config.folder, names, max_numbers)
    if weights is None:
        raise no_weights(config.folder, names)
    head = None
    if config.library == ADAPTERHUB:
        head = _first_weights(config.folder, HEAD_FILES, MAX_WEIGHT_BYTES)
    read = [*config.read, *((file.name, file.raw) for file in (weights, head) if file is not None)]
    return Checkpoint(
        library=config.library,
        config=config.fields,
        tensors=weights.tensors,
        digest=digest_of(read),
        options=config.options,
        head={} if head is None else head.tensors,
        interface=config.interface,
    )


@dataclass(frozen=True, slots=True)
class _WeightFile:
    name: str
    raw: bytes
    tensors: Mapping[str, Tensor]


def _first_weights(folder: Path, names: Iterable[str], max_numbers: int) -> _WeightFile | None:
    for name in names:
        path = folder / name
        with opened_file(path) as file:
            if file is None:
                continue
            raw = _read_weights(path, file, max_numbers)
        parse = _parse_safetensors if _is_safetensors(path) else _parse_pickle
        tensors = parse(path, raw)
        for tensor_name, tensor in tensors.items():
            _require_sound(path, tensor_name, tensor)
        return _WeightFile(name, raw, tensors)
    return None


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _read_weights(path: Path, file: BinaryIO, max_numbers: int) -> bytes:
    max_bytes = min(MAX_WEIGHT_BYTES, max_numbers * _WIDEST + OVERHEAD_BYTES)
    if _is_safetensors(path) and os.fstat(file.fileno()).st_size <= max_bytes:
        numbers = _declared_numbers(file)
        if numbers > max_numbers:
            raise AdapterTooLarge(
                f"{path} holds {numbers} numbers, more than the {max_numbers} there is room for"
            )
    return read_file(path, file, max_bytes)


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


def _parse_safetensors(path: Path, raw: bytes) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load(raw)  # type: ignore[no-any-return]  # untyped library
    except SafetensorError as error:
        raise AdapterCorrupt(f"{path} is not a complete safetensors file: {error}") from error
    except KeyError as error:
        raise AdapterUnsupported(f"{path} holds a tensor of the unknown dtype {error}") from error
    except (RuntimeError, OverflowError) as error:
        raise AdapterCorrupt(f"{path} declares a shape that no tensor can have: {error}") from error


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


def _require_sound(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.dim() > _MAX_DIMENSIONS:
        raise AdapterCorrupt(f"{path}: tensor {shown(name)} has {tensor.dim()} dimensions")
    if tensor.dtype in INTEGER_DTYPES:
        return
    if tensor.dtype not in FLOAT_DTYPES:
        raise AdapterUnsupported(
            f"{path}: tensor {shown(name)} is {tensor.dtype}: save it as bfloat16"
        )
    numbers = tensor.float() if tensor.dtype is torch.float64 else tensor
    if not all_finite(numbers):
        raise AdapterCorrupt(f"{path}: tensor {shown(name)} holds NaN or Inf, as float32")
