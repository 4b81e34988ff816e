"""Conversations: what a chat template is rendered from."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .body import Body, JsonObject
from .tool_fields import MAX_TOOLS, CalledTool, Tool

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_ARGUMENTS = 64


class TextPart(Body):
    """A part of a message; text is the only kind a language model takes."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation.

    A turn of the assistant may have calls beside or instead of text, one of a tool answers a call.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] = ""
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS)] = Field(
        default_factory=list
    )
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts_are_text(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else []
        kinds = (part.get("type") for part in parts if isinstance(part, dict))
        if other := next((kind for kind in kinds if kind != "text"), None):
            message = "a content part of type {kind} is not served; only text is"
            raise PydanticCustomError("content_part", message, {"kind": repr(other)})
        return value

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only a turn of the assistant has 'tool_calls'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError(
                "tool_call_id", "a turn of a tool has 'tool_call_id', and no other turn does"
            )
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise PydanticCustomError("content", "the turn has no 'content'")
        return self

    def flat(self) -> dict[str, Any]:
        """The turn as templates take it: one string; 'developer' is the new name of 'system'."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": "\n".join(parts)}
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return turn | {name: value for name, value in named.items() if value is not None}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
TemplateArguments = Annotated[JsonObject, Field(max_length=MAX_TEMPLATE_ARGUMENTS)]


class Conversation(Body):
    """What a chat template is rendered from."""

    messages: Messages
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)

    @property
    def offered_tools(self) -> list[Tool]:
        """What the model is told that it may call."""
        return []
