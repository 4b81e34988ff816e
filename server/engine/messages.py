"""What crosses between the HTTP process and the engine process, msgpack on two sockets."""

import msgspec

from ..composition import Composable, Room
from ..generation import GenerationRequest, SequenceUpdate
from ..text.tokenizer_source import TokenizerSource


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a sequence."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these sequences within one step; unknown ids have ended already."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read, check and lower the folder at ``path``; answered by AdapterLoaded or AdapterRefused.

    ``digest`` is what the files must hash to, None where they are seen for the first time.
    """

    adapter_id: int
    path: str
    digest: str | None = None


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Free the adapter once its last sequence has ended; answered by AdapterUnloaded."""

    adapter_id: int


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Keep the adapter in memory also while no request uses it, or stop to; loaded if need be."""

    adapter_id: int
    pinned: bool


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


Command = Submit | Abort | LoadAdapter | UnloadAdapter | PinAdapter | Shutdown


class TokenizerRead(msgspec.Struct, frozen=True, tag=True):
    """The base's tokenizer. The engine process reads it before all else, and says so at once."""

    source: TokenizerSource


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """The engine is ready; what it runs, and the room in it.

    ``num_blocks`` is what the KV cache has at most, ``block_bytes`` what a block takes;
    ``adapter_room`` is that of one request's adapters, ``pin_room`` that of all pinned ones.
    """

    model_type: str
    dtype: str
    device: str
    kernels: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    block_bytes: int
    max_num_seqs: int
    adapter_slots: int
    adapter_room: Room
    pin_room: Room


class AdapterInfo(msgspec.Struct, frozen=True):
    """What a loaded adapter is."""

    digest: str
    kind: str
    library: str
    rank: int
    num_parameters: int
    num_bytes: int
    targets: list[str]
    composable: Composable = Composable()


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """The adapter is in host memory and can be used."""

    adapter_id: int
    info: AdapterInfo


class AdapterRefused(msgspec.Struct, frozen=True, tag=True):
    """The adapter cannot be served: ``error`` is the AdapterError's class name."""

    adapter_id: int
    error: str
    message: str


class AdapterUnloaded(msgspec.Struct, frozen=True, tag=True):
    """Nothing of the adapter is left in the engine."""

    adapter_id: int


class HostChanges(msgspec.Struct, frozen=True, tag=True):
    """Adapters that came to host memory and that left it, since the last of these."""

    added: list[int]
    dropped: list[int]


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges (the first four and the last two), and counts since the last report."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    step_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    device_adapters: list[int]
    adapter_bytes: int = 0


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """What one step produced."""

    updates: list[SequenceUpdate]
    stats: EngineStats


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or a step raised; the process ends after this."""

    message: str


Event = (
    TokenizerRead
    | EngineInfo
    | AdapterLoaded
    | AdapterRefused
    | AdapterUnloaded
    | HostChanges
    | StepOutputs
    | EngineFailed
)
