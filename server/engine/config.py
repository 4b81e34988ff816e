"""What the engine process is started with."""

from dataclasses import dataclass

LEAST_SHARE = 0.1
"""Part of the device memory budget that either side, KV cache and adapters, always has.

Pinned adapters may fill that of the adapters.
"""

PINNED_HOST_SHARE = 0.5
"""Part of the host memory budget that pinned adapters may fill."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine process needs to know; picklable, it crosses to the new process.

    Attributes:
        model_folder: A resolved Hugging Face folder.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU where there is one.
        kernels: ``auto``, ``compiled``, ``triton``, ``interpret`` or ``reference``.
        max_model_len: Longest sequence, prompt and output; None for the model's own limit.
        max_num_seqs: Sequences in one step at most.
        max_num_batched_tokens: Rows in one step at most.
        block_size: Tokens of one KV block.
        memory_budget: Bytes on the device for KV cache and adapters.
        host_memory_budget: Bytes of host memory for lowered adapters.
        cuda_graphs: Whether decode steps on a GPU are captured and replayed.
        prefix_caching: Whether computed blocks are shared by later sequences.
        log_format: ``text`` or ``json``.
    """

    model_folder: str
    dtype: str
    device: str
    kernels: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    memory_budget: int
    host_memory_budget: int
    prefix_caching: bool
    cuda_graphs: bool = True
    log_format: str = "text"
