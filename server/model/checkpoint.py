"""A folder of safetensors files, one or sharded, read tensor by tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelCorrupt, ModelNotFound, ModelUnsupported

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
)  # computed, yet saved by some


class Checkpoint:
    """The tensors of one model; each is expected to be read once.

    Files saved from the bare decoder lack the ``base_prefix`` in their names; they read the same.
    """

    def __init__(self, folder: Path, base_prefix: str) -> None:
        """Open the files and list their tensors.

        Raises:
            ModelNotFound: The folder has no weights.
            ModelUnsupported: It has weights, but none as safetensors.
            ModelCorrupt: A file is missing or unreadable, or two have a tensor of one name.
        """
        files = _weight_files(folder)
        self._folder = folder
        self._files: dict[str, Any] = {}
        for path in files:
            handle = _open(path)
            twice = sorted(self._files.keys() & handle.keys())
            if twice:
                raise ModelCorrupt(f"{path}: tensor {twice[0]} is in another file as well")
            self._files.update(dict.fromkeys(handle.keys(), handle))
        bare = not any(name.startswith(base_prefix) for name in self._files)
        self._hidden_prefix = base_prefix if bare else ""
        self._unread = {name for name in self._files if not name.endswith(_BUFFERS)}

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return self._stored_name(name) in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as stored, on the CPU; it may be a view of the file.

        Raises:
            ModelCorrupt: It is missing, unreadable, or of another shape.
            ModelUnsupported: Its dtype is not a floating-point one.
        """
        stored_name = self._stored_name(name)
        handle = self._files.get(stored_name)
        if handle is None:
            raise ModelCorrupt(f"{self._folder}: tensor {name} is missing")
        self._unread.discard(stored_name)
        try:
            tensor: Tensor = handle.get_tensor(stored_name)
        except SafetensorError as error:
            raise ModelCorrupt(f"{self._folder}: tensor {name}: {error}") from error
        if tensor.dtype not in _STORED_DTYPES:
            raise ModelUnsupported(
                f"{self._folder}: tensor {name} is stored as {tensor.dtype}; "
                "only floating-point weights are read: use the unquantised checkpoint"
            )
        if tensor.shape != shape:
            raise ModelCorrupt(
                f"{self._folder}: tensor {name} is {tuple(tensor.shape)}, the config says {shape}"
            )
        return tensor

    def check_all_read(self) -> None:
        """Refuse what the architecture has no place for.

        Raises:
            ModelCorrupt: Tensors are left over; names them.
        """
        if self._unread:
            names = sorted(self._unread)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelCorrupt(
                f"{self._folder}: unexpected tensors {', '.join(names[:5])}{more}; "
                "the config describes a model without them"
            )

    def _stored_name(self, name: str) -> str:
        return name.removeprefix(self._hidden_prefix)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if any(folder.glob("pytorch_model*.bin")):
        raise ModelUnsupported(
            f"{folder}: weights are pickled (pytorch_model.bin); pickles can run code and are not "
            "read: convert them to safetensors with save_pretrained"
        )
    raise ModelNotFound(f"{folder}: there is no {SINGLE} and no {INDEX}")


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelCorrupt(f"{index}: not an index of safetensors files: {error!r}") from error
    for file in names.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelCorrupt(f"{index}: {file!r} is not a safetensors file of the folder")
    return names


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ModelCorrupt(f"{path}: the index names this file, it is missing") from error
    except (SafetensorError, OSError) as error:
        raise ModelCorrupt(f"{path}: not a readable safetensors file: {error}") from error
