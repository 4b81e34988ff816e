"""The fields of tool calling: what may be called, what must be, and calls in a conversation."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from .body import Body, JsonObject, Text, is_json

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Body):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class Tool(Body):
    """A tool; functions are the only kind there is."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": function}


class NamedFunction(Body):
    """The function that must be called."""

    name: Text


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def _is_object(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError(
            "arguments", "no JSON text: {why}", {"why": str(error)}
        ) from error
    if not isinstance(value, dict):
        raise PydanticCustomError("arguments", "arguments are the text of a JSON object")
    is_json(value)
    return text


class CalledFunction(Body):
    """A function that was called, and the text of its arguments."""

    name: Text
    arguments: Annotated[str, AfterValidator(_is_object)]


class CalledTool(Body):
    """A call in an earlier turn of the model."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: with arguments as an object."""
        arguments = json.loads(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
