"""What ``deltamux serve`` was asked to do, checked; and the sizes a person may write."""

import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The options of ``deltamux serve``; their meaning stands in the command's help."""

    model: str
    served_model_name: str
    adapters: tuple[tuple[str, str], ...]
    adapter_dirs: tuple[Path, ...]
    adapter_sources: tuple[str, ...]
    adapter_versions: int
    store_budget: int | None
    max_adapter_size: int
    max_upload_size: int
    copy_adapters: bool
    tenants: Path | None
    state_dir: Path
    host: str
    port: int
    allow_open: bool
    device: str
    dtype: str
    kernels: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    block_size: int
    memory_budget: int
    host_memory_budget: int
    prefix_caching: bool
    cuda_graphs: bool
    tool_call_parser: str
    cors_origins: tuple[str, ...]
    log_format: str
    otlp_traces_endpoint: str | None


def default_state_dir() -> Path:
    """The user's state folder."""
    return Path(platformdirs.user_state_dir("deltamux"))


def parse_bytes(text: str) -> int:
    """``4GiB``, ``512MB``, ``1.5G`` or plain bytes -> bytes; a lone letter counts in 1024s.

    Raises:
        ValueError: The text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or like 512MiB or 4GB")
    number, letter, binary = match.groups()
    decimal = text.strip().lower().endswith("b") and letter and not binary
    return int(float(number) * (1000 if decimal else 1024) ** _POWERS[letter.lower()])
