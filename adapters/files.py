"""The files of an adapter folder, by the library that writes them. Free of torch."""

from collections.abc import Mapping
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
PLAIN_CONFIG_FILE = "delta_config.json"
FUSION_CONFIG_FILE = "adapter_fusion_config.json"
INTERFACE_FILE = "adapter_interface.json"
OPTIONS_FILE = "deltamux.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

PEFT, ADAPTERHUB, PLAIN = "peft", "adapterhub", "plain"

WEIGHT_FILES: Mapping[str, tuple[str, ...]] = {
    PEFT: (SAFETENSORS_FILE, PICKLE_FILE),
    ADAPTERHUB: ("adapter.safetensors", "pytorch_adapter.bin"),
    PLAIN: ("delta.safetensors",),
}
"""By library, in the order in which the library itself looks for them."""

HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
"""AdapterHub saves the head of the model that was trained beside the adapter."""

_TELLING = (
    CONFIG_FILE,
    PLAIN_CONFIG_FILE,
    FUSION_CONFIG_FILE,
    *(name for names in WEIGHT_FILES.values() for name in names),
)

ADAPTER_FILES = frozenset(
    {
        CONFIG_FILE,
        PLAIN_CONFIG_FILE,
        INTERFACE_FILE,
        OPTIONS_FILE,
        *(name for names in WEIGHT_FILES.values() for name in names),
        *HEAD_FILES,
    }
)
"""Every file that an adapter may consist of."""


def is_adapter_folder(path: Path) -> bool:
    """Whether the folder holds any file that makes it an adapter, complete or not."""
    return any((path / name).exists() for name in _TELLING)
