"""Response bodies, field for field as OpenAI's and vLLM's clients read them.

msgspec structs, because a stream encodes one of them per token. UNSET leaves a field out.
"""

from msgspec import UNSET, Struct, UnsetType


class CachedTokens(Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class EmbeddingUsage(Struct, frozen=True):
    """Tokens that were embedded."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True):
    """One vector: numbers, or their bytes (float32, little-endian) in base64."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(Struct, frozen=True):
    """``/v1/embeddings``."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class CompletionLogprobs(Struct, frozen=True):
    """Log-probabilities in the dialect of completions; the lists have an item per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Struct, frozen=True):
    """An alternative at one position of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, frozen=True):
    """One position of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Log-probabilities in the dialect of chat."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class PromptLogprob(Struct, frozen=True):
    """vLLM's description of a token at a prompt position."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Struct, frozen=True):
    """A choice of a completion, whole or the part a chunk adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Completion(Struct, frozen=True):
    """``/v1/completions``: the answer, or one chunk of it."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class CalledFunction(Struct, frozen=True):
    """A function and the text of a JSON object, its arguments."""

    name: str
    arguments: str


class CalledTool(Struct, frozen=True):
    """A call that the model makes."""

    id: str
    function: CalledFunction
    type: str = "function"


class CalledFunctionDelta(Struct, frozen=True):
    """More of a call: its name comes first, then its arguments in pieces."""

    arguments: str
    name: str | UnsetType = UNSET


class CalledToolDelta(Struct, frozen=True):
    """What a chunk adds to a call; what does not change comes with its first."""

    index: int
    function: CalledFunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChatMessage(Struct, frozen=True):
    """The turn the model adds: text, calls, or both."""

    content: str | None
    tool_calls: list[CalledTool] | UnsetType = UNSET
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    """A choice of a chat answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True):
    """``/v1/chat/completions``."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: str = "chat.completion"


class ChatDelta(Struct, frozen=True):
    """What a chunk adds to the model's turn."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CalledToolDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """The part of a choice that a chunk adds."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, frozen=True):
    """One chunk of a streamed chat answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: str = "chat.completion.chunk"
