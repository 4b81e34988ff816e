"""Adapter folders are files from strangers: this is the only place that reads them.

    library      configuration          weights, the first that is there        beside them
    peft         adapter_config.json    adapter_model.safetensors | .bin
    adapterhub   adapter_config.json    adapter.safetensors, pytorch_adapter.bin    the head's files
    plain        delta_config.json      delta.safetensors

``.bin`` is the pickle format of ``torch.save``, of which only what builds plain tensors is ever
executed. ``deltamux.json`` in any of them holds what the library does not save and serving needs
to know (a task's number, say). Each file is read with a limit that is checked beforehand, and the
bytes that are hashed are the bytes that are parsed, so that a digest stands for the tensors that
came with it even if the file changes meanwhile. Symbolic links are followed, because hub caches are
made of them, but only to regular files.
"""

import hashlib
import io
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
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
    SAFETENSORS_FILE,
    WEIGHT_FILES,
)

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 8 << 30
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
        raise AdapterCorrupt(f"{config.folder} holds neither {' nor '.join(names)}")
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


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over name, length (8 bytes, little endian) and bytes of each file, in hex."""
    digest = hashlib.sha256()
    for name, raw in files:
        digest.update(name.encode() + b"\0" + len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _WeightFile:
    name: str
    raw: bytes
    tensors: Mapping[str, Tensor]


def _first_weights(folder: Path, names: Iterable[str], max_numbers: int) -> _WeightFile | None:
    for name in names:
        path = folder / name
        with _opened(path) as file:
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


def _small(path: Path) -> bytes | None:
    """The bytes of a configuration file, None where there is none."""
    with _opened(path) as file:
        return None if file is None else _read(path, file, MAX_CONFIG_BYTES)


def _library(config_file: str, fields: Mapping[str, object]) -> str:
    version = fields.get("version")
    if config_file == PLAIN_CONFIG_FILE:
        return PLAIN
    by_adapterhub = "config" in fields and isinstance(version, str)
    return ADAPTERHUB if by_adapterhub and "peft_type" not in fields else PEFT


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
    if _is_safetensors(path) and os.fstat(file.fileno()).st_size <= max_bytes:
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
    if not bool(numbers.isfinite().all()):
        raise AdapterCorrupt(f"{path}: tensor {shown(name)} holds NaN or Inf, as float32")
