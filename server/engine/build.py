"""Puts the engine's parts together. Imports torch, so only the engine process imports this."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...adapters.device.pool import AdapterPool, Placement
from ...adapters.device.residency import PoolSize, Residency
from ...adapters.errors import AdapterTooLarge
from ...adapters.lower import lower
from ...adapters.primitives.lowered import KVPrefix, LoweredAdapter
from ...adapters.primitives.primitive import ALIGNMENT_BYTES
from ...kernels.backend import Backend, select_backend
from ...kernels.build import CompilerError
from ...kernels.memory import allocator
from ..composition import Room
from ..grammar.vocabulary import VocabularySource
from ..model.base import ServedBase, load_base
from ..model.decoder import Decoder
from ..runner.graphs import CudaCapture, PromptPrograms, StepGraphs, decode_buckets
from ..runner.runner import Runner
from ..runner.stage import make_stage
from ..scheduler.block_manager import BlockManager
from ..scheduler.limits import SchedulerLimits, longest_sequence
from ..scheduler.scheduler import Scheduler
from ..scheduler.shared_memory import Pages, SharedMemory
from ..text.tokenizer_source import TokenizerSource
from .config import LEAST_SHARE, PINNED_HOST_SHARE, EngineConfig
from .core import Engine
from .errors import EngineMisconfigured
from .grammars import GrammarCompiler
from .host_tier import HostTier, Lower
from .messages import EngineInfo

_LEAST_CAPABILITY = (8, 0)

_ADAPTER_SLOTS_PER_SEQUENCE = 4
"""Parts of adapters that may be on the device, per sequence that may run: some are kept warm."""

_STEP_OVERHEAD = {"cpu": 16, "cuda": 256}
"""Rows that take as long as a decode step's fixed cost: measured on the first, where a step with
prompts has a larger one; the operations per byte of the second."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    decoder: Decoder
    scheduler: Scheduler
    blocks: BlockManager
    runner: Runner
    host: HostTier
    residency: Residency[LoweredAdapter, Placement]
    shared: SharedMemory
    grammars: GrammarCompiler
    room: Room
    info: EngineInfo

    def engine(self) -> Engine:
        """The engine of these parts; it is the only one to touch them from now on."""
        return Engine(
            self.scheduler,
            self.blocks,
            self.runner,
            self.host,
            self.residency,
            self.shared,
            self.grammars,
            self.decoder.layout,
            self.room,
        )


def build_engine(
    config: EngineConfig, tokenizer: TokenizerSource
) -> tuple[Engine, HostTier, EngineInfo]:
    """Load the base, allocate the device memory and put the parts together.

    Raises:
        EngineMisconfigured: The options do not go together with each other or with the base.
        ModelError: The base is refused.
    """
    parts = build_parts(config, tokenizer)
    return parts.engine(), parts.host, parts.info


def build_parts(
    config: EngineConfig,
    tokenizer: TokenizerSource,
    instrument: Callable[[Backend], Backend] | None = None,
) -> EngineParts:
    """The parts of an engine, on device operations that ``instrument`` may put others around.

    Raises:
        EngineMisconfigured: The options do not go together with each other or with the base.
        ModelError: The base is refused.
    """
    device = _resolve_device(config.device)
    dtype = _resolve_dtype(config.dtype, device)
    backend = _backend(config.kernels, dtype, device)
    if device.type == "cuda":
        # The first launch builds Triton's driver: what it lacks is to be said before any request.
        ones = torch.ones(1, 16, dtype=dtype, device=device)
        backend.rms_norm(ones, ones[0], 1e-5)
    if instrument is not None:
        backend = instrument(backend)
    base = load_base(Path(config.model_folder), dtype, device, backend)
    decoder = base.decoder
    _require_memory(config, device)
    pages = _pages(config, decoder)
    limits = _limits(config, decoder, pages)

    memory_bytes = pages.count * pages.num_bytes
    memory = allocator(device, memory_bytes)((memory_bytes,), torch.uint8)
    kv_cache = decoder.kv_cache_in(memory, config.block_size)
    num_slots = _ADAPTER_SLOTS_PER_SEQUENCE * config.max_num_seqs
    pool = AdapterPool(decoder.layout, num_slots, memory, dtype)
    room = Room(config.host_memory_budget, pages.most_adapter_bytes, num_slots)
    lowering = _lowering(base, room, pages, limits.max_model_len, config.block_size)
    host = HostTier(lowering, config.host_memory_budget)
    pin_room = PoolSize(pages.least_adapters * pages.num_bytes, num_slots // 2)
    residency = Residency(pool, host.lowered, pin_room)
    blocks = BlockManager(pages.most_blocks, config.block_size, config.prefix_caching)
    shared = SharedMemory(pages, blocks, pool, residency, kv_cache.move)
    residency.share_with(shared)
    runner = Runner(
        decoder,
        kv_cache,
        pool,
        backend.deltas,
        backend.largest,
        residency.place,
        host.lowered,
        make_stage(device, _stage_bytes(limits, config.block_size)),
        _buckets(config, backend),
        _graphs(config, decoder, backend),
        _prompts(limits, dtype, backend),
    )
    scheduler = Scheduler(limits, blocks, residency)
    info = _info(config, decoder, backend, limits, pages, room, pin_room)
    vocabulary = VocabularySource.of(tokenizer, limits.vocab_size)
    grammars = GrammarCompiler(vocabulary.load, host.wakeup)
    return EngineParts(
        decoder, scheduler, blocks, runner, host, residency, shared, grammars, room, info
    )


def _backend(name: str, dtype: torch.dtype, device: torch.device) -> Backend:
    try:
        return select_backend(name, dtype, device)
    except (CompilerError, ValueError) as error:
        raise EngineMisconfigured(f"--kernels {name}: {error}") from error


def _buckets(config: EngineConfig, backend: Backend) -> Sequence[int]:
    if backend.programs is not None:
        return range(1, config.max_num_seqs + 1)
    return decode_buckets(config.max_num_seqs) if backend.pads_decode else ()


def _graphs(config: EngineConfig, decoder: Decoder, backend: Backend) -> StepGraphs | None:
    if backend.programs is not None:
        return StepGraphs(backend.programs)
    device = decoder.tokens.weight.device
    if device.type != "cuda" or not config.cuda_graphs:
        return None
    most = decode_buckets(config.max_num_seqs)[-1]
    return StepGraphs(CudaCapture(most, decoder.config.vocab_size, device))


def _prompts(
    limits: SchedulerLimits, dtype: torch.dtype, backend: Backend
) -> PromptPrograms | None:
    if backend.programs is None or not backend.leaves_out_rows or dtype is not torch.bfloat16:
        return None
    return PromptPrograms(backend.programs, limits.max_num_batched_tokens)


def _stage_bytes(limits: SchedulerLimits, block_size: int) -> int:
    """What the arrays of the largest step take, and as much again for those of the sampler."""
    tables = limits.max_num_seqs * 4 * -(-limits.max_model_len // block_size)
    rows = 256 * (limits.max_num_batched_tokens + limits.max_num_seqs)
    masks = limits.max_num_seqs * (limits.vocab_size // 8 + 64)
    return 2 * (2 * tables + rows) + masks + (1 << 20)


def _limits(config: EngineConfig, decoder: Decoder, pages: Pages) -> SchedulerLimits:
    """The scheduler's bounds."""
    cache_tokens = pages.most_blocks * config.block_size
    try:
        return SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=_max_model_len(config, decoder, cache_tokens),
            vocab_size=decoder.config.vocab_size,
            step_overhead=_STEP_OVERHEAD[decoder.tokens.weight.device.type],
        )
    except ValueError as error:
        raise EngineMisconfigured(str(error)) from error


def _lowering(
    base: ServedBase, room: Room, pages: Pages, max_model_len: int, block_size: int
) -> Lower:
    """How the host tier reads an adapter for this base, what it has room for, and its limits."""
    on_gpu = base.decoder.tokens.weight.device.type == "cuda"
    max_bytes = min(pages.count * pages.num_bytes, room.host_bytes)

    def lower_to_fit(path: Path) -> LoweredAdapter:
        adapter = lower(path, base, max_bytes)
        if adapter.num_device_bytes > room.device_bytes or len(adapter.parts) > room.parts:
            raise AdapterTooLarge(
                f"the adapter at {path} needs {adapter.num_device_bytes} bytes on the device and"
                f" {len(adapter.parts)} slots; one adapter may take {room.device_bytes} bytes of"
                f" --memory-budget and {room.parts} slots; raise that, or --max-num-seqs"
            )
        blocks = pages.most_blocks - pages.holding(adapter.num_device_bytes)
        _require_room_for_a_sequence(adapter.prefix, blocks, block_size, max_model_len)
        return pinned(adapter) if on_gpu else adapter

    return lower_to_fit


def pinned(adapter: LoweredAdapter) -> LoweredAdapter:
    """The adapter in page-locked memory, all of its tensors in one piece of it."""
    prefix = () if adapter.prefix is None else adapter.prefix.tensors
    sizes = (_aligned(each.nbytes) for each in (*adapter.tensors, *prefix))
    memory = torch.empty(sum(sizes), dtype=torch.uint8).pin_memory()
    end = 0

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal end
        to = memory[end : end + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        end += _aligned(tensor.nbytes)
        return to.copy_(tensor)

    return adapter.map_tensors(moved)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _require_memory(config: EngineConfig, device: torch.device) -> None:
    """Of a GPU, with the base on it: what is asked for must be there."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if config.memory_budget > free:
        raise EngineMisconfigured(
            f"--memory-budget {config.memory_budget}: the GPU has {free} bytes left by the base;"
            " ask for less, and leave a few hundred megabytes for what steps compute"
        )


def _require_room_for_a_sequence(
    prefix: KVPrefix | None, num_blocks: int, block_size: int, max_model_len: int
) -> None:
    """Of an adapter beside which there are so many blocks."""
    length, shift = (0, 0) if prefix is None else (prefix.length, prefix.position_offset)
    if longest_sequence(max_model_len, num_blocks, block_size, length, shift) < 2:
        raise AdapterTooLarge(
            f"the adapter puts {length} keys and values before each request, which leaves no"
            f" room for a prompt and an answer: a sequence has at most {max_model_len} positions"
            f" and the KV cache {num_blocks} blocks of {block_size} beside it; serve with a"
            " larger --max-model-len or --memory-budget"
        )


def _info(
    config: EngineConfig,
    decoder: Decoder,
    backend: Backend,
    limits: SchedulerLimits,
    pages: Pages,
    adapter_room: Room,
    pin_room: PoolSize,
) -> EngineInfo:
    return EngineInfo(
        model_type=decoder.config.model_type,
        dtype=str(decoder.tokens.weight.dtype).removeprefix("torch."),
        device=decoder.tokens.weight.device.type,
        kernels=backend.name,
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        num_blocks=pages.most_blocks,
        block_size=config.block_size,
        block_bytes=pages.num_bytes,
        max_num_seqs=limits.max_num_seqs,
        adapter_slots=adapter_room.parts,
        adapter_room=adapter_room,
        pin_room=Room(int(PINNED_HOST_SHARE * config.host_memory_budget), *pin_room),
    )


def _resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineMisconfigured(
            "--device cuda: torch finds no NVIDIA GPU here; check nvidia-smi, and that torch was"
            " installed with CUDA (torch.version.cuda), or serve with --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        raise EngineMisconfigured(
            f"the GPU {torch.cuda.get_device_name()} is older than the kernels are for (compute"
            " capability 8.0, an A100); serve with --device cpu"
        )
    return torch.device(name)


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies in it, else float32."""
    if name == "float16" and device.type == "cpu":
        raise EngineMisconfigured(
            "--dtype float16: there are no float16 kernels for the CPU; serve in bfloat16 or"
            " float32, or on a GPU"
        )
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16
    if name == "auto":
        features = torch.cpu.get_capabilities()
        fast = features.get("avx512_bf16") or features.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def _max_model_len(config: EngineConfig, decoder: Decoder, cache_tokens: int) -> int:
    """The longest sequence that model and cache hold, or the one asked for if they do."""
    longest = decoder.config.max_position
    if config.max_model_len is None:
        return min(longest, cache_tokens)
    if config.max_model_len > longest:
        raise EngineMisconfigured(
            f"--max-model-len {config.max_model_len} exceeds the base model's {longest} positions"
        )
    if config.max_model_len > cache_tokens:
        raise EngineMisconfigured(
            f"--max-model-len {config.max_model_len} exceeds the {cache_tokens} tokens that the KV "
            f"cache holds; raise --memory-budget {config.memory_budget}"
        )
    return config.max_model_len


def _pages(config: EngineConfig, decoder: Decoder) -> Pages:
    """What the memory budget holds, and how much of it each side always has."""
    num_bytes = decoder.page_bytes(config.block_size)
    count = config.memory_budget // num_bytes
    least = max(int(LEAST_SHARE * count), 1)
    if count <= 2 * least:
        raise EngineMisconfigured(
            f"--memory-budget {config.memory_budget} holds {count} KV blocks of {config.block_size}"
            f" tokens ({num_bytes} bytes each), too few for requests and adapters; raise it"
        )
    return Pages(count, num_bytes, least_blocks=least, least_adapters=least)
