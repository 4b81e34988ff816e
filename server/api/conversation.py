"""Conversations: what a chat template is rendered from."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from .body import Body, JsonObject

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_ARGUMENTS = 64


class TextPart(Body):
    """A part of a message; text is the only kind a language model takes."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts_are_text(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else []
        kinds = (part.get("type") for part in parts if isinstance(part, dict))
        if other := next((kind for kind in kinds if kind != "text"), None):
            message = "a content part of type {kind} is not served; only text is"
            raise PydanticCustomError("content_part", message, {"kind": repr(other)})
        return value

    def flat(self) -> dict[str, str]:
        """The turn as templates take it: one string; 'developer' is the new name of 'system'."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        role = "system" if self.role == "developer" else self.role
        turn = {"role": role, "content": "\n".join(parts)}
        return turn if self.name is None else turn | {"name": self.name}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
TemplateArguments = Annotated[JsonObject, Field(max_length=MAX_TEMPLATE_ARGUMENTS)]


class Conversation(Body):
    """What a chat template is rendered from."""

    messages: Messages
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
