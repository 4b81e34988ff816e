"""Request bodies, and the bounds every field must keep."""

from abc import abstractmethod
from time import monotonic
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .body import INT32_MAX, INT64_MAX, Body, Text, refuse
from .conversation import Conversation, Messages, TemplateArguments
from .search_fields import SearchedBody
from .tool_fields import NamedTool, Tool, ToolChoice, Tools

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIASES = 1024
MAX_ADAPTERS = 16

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


def _kind_of_prompt(value: object) -> str | None:
    """Which of the four forms a prompt has, told by its first item."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "texts"
    return "token_lists" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Field(fail_fast=True), Tag("tokens")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("token_lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="a prompt is text, a list of texts, token ids, or lists of token ids",
    ),
]


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _few_biases(value: object) -> object:
    """Checked here, because pydantic counts the items of a dict after it has judged each."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIASES:
        raise PydanticCustomError("biases", "more than {n} entries", {"n": MAX_LOGIT_BIASES})
    return value


class WeightedAdapter(Body):
    """One of the adapters that a request sums beside the base."""

    name: Text
    weight: float = Field(default=1.0, ge=-100, le=100)


class ModelBody(Body):
    """What a request runs on, and beside whom."""

    model: Text
    adapters: list[WeightedAdapter] = Field(default_factory=list, max_length=MAX_ADAPTERS)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    priority: int = Field(default=0, ge=-INT32_MAX, le=INT32_MAX)
    deadline_ms: int | None = Field(default=None, ge=1, le=INT32_MAX)
    user: Text | None = None
    _arrived: float = PrivateAttr(default_factory=monotonic)

    @property
    def deadline(self) -> float | None:
        """When it must have begun to run, by the machine's monotonic clock."""
        return None if self.deadline_ms is None else self._arrived + self.deadline_ms / 1000


class GenerationBody(ModelBody, SearchedBody):
    """The fields that completions and chat completions share."""

    default_max_tokens: ClassVar[int | None] = None
    prompt_field: ClassVar[str]

    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    min_tokens: int = Field(default=0, ge=0, le=INT32_MAX)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=INT32_MAX)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)
    ] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    # The bounds come before the validator, so that they hold before any item is looked at.
    stop: Annotated[
        list[StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_one_as_list)
    ] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_LOGIT_BIASES)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise PydanticCustomError("token_id", "the key {key} is no token id", {"key": key})
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "'stream_options' needs 'stream': true.")
        if self.stream and self.prompt_logprobs is not None:
            raise refuse("prompt_logprobs", "'prompt_logprobs' is not available in a stream.")
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise refuse("min_tokens", "'min_tokens' is larger than 'max_tokens'.")
        return self

    @property
    def token_limit(self) -> int | None:
        """Tokens asked for at most; None where the request does not say."""
        return self.max_tokens

    @property
    def says_length(self) -> bool:
        """Whether it says, by itself or by default, how many tokens it takes at most."""
        return self.token_limit is not None or self.default_max_tokens is not None

    @property
    def token_limit_field(self) -> str:
        """The field ``token_limit`` came in."""
        return "max_tokens"

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token; None for no log-probabilities."""


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's
    prompt_field: ClassVar[str] = "prompt"

    prompt: Prompt
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token; None for no log-probabilities."""
        return self.logprobs


class ChatBody(GenerationBody, Conversation):
    """``POST /v1/chat/completions``."""

    prompt_field: ClassVar[str] = "messages"

    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise refuse("max_tokens", "'max_tokens' and 'max_completion_tokens' differ.")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise refuse("tool_choice", "'tool_choice' needs 'tools'.")
        if isinstance(self.tool_choice, NamedTool) and not self.forced_tools:
            raise refuse("tool_choice", "'tool_choice' names a function that is not in 'tools'.")
        if self.offered_tools and self.constraint is not None:
            raise refuse(
                self.constraint[0].partition(".")[0],
                f"{self.constraint[0]!r} does not go together with tools that may be called.",
            )
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """What the model is told that it may call: nothing, where it may call nothing."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[Tool]:
        """Those of which one must be called; none where the model may answer with text."""
        if isinstance(self.tool_choice, NamedTool):
            named = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == named]
        return self.tools if self.tool_choice == "required" else []

    @property
    def token_limit(self) -> int | None:
        """Tokens asked for at most; None where the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def token_limit_field(self) -> str:
        """The field ``token_limit`` came in."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(ModelBody):
    """``POST /v1/embeddings``."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _whole_vectors(self) -> "EmbeddingBody":
        if self.dimensions is not None:
            raise refuse(
                "dimensions",
                "'dimensions' is not served: the base was not trained to be cut short (Matryoshka);"
                " leave it out, and take the whole vector.",
            )
        return self


class TokenizeBody(Body):
    """``POST /tokenize`` of a text or of a conversation.

    Special tokens are added to a text unless told otherwise; a chat template writes its own.
    """

    model: Text | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise refuse("prompt", "Send either 'prompt' or 'messages'.")
        return self

    @property
    def conversation(self) -> Conversation | None:
        """The conversation, if it is one."""
        if self.messages is None:
            return None
        return Conversation.model_construct(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
