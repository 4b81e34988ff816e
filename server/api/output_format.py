"""Fields that say what an output must be: OpenAI's ``response_format`` and vLLM's two spellings."""

import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..grammar.constraint import (
    ANY_OBJECT,
    WHITESPACE,
    Choice,
    Constraint,
    ContextFree,
    JsonSchema,
    Regex,
)
from .body import Body, JsonObject, Text, refuse

MAX_CHOICE_TEXTS = 1024

Asked = tuple[str, Constraint]
"""A constraint, and the field it came in."""


def _parsed(value: object) -> object:
    """vLLM takes a schema as JSON or as the text of it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("json", "no JSON text: {why}", {"why": str(error)}) from error


Schema = Annotated[JsonObject, BeforeValidator(_parsed)]
ChoiceTexts = Annotated[
    list[Text], Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)
]


class NamedSchema(Body):
    """What OpenAI's ``json_schema`` holds; a schema is enforced, ``strict`` or not."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    json_schema: JsonObject = Field(alias="schema")
    description: str | None = None
    strict: bool = False


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """A JSON text that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: one of the first five, and how JSON is spaced."""

    json_schema: Schema | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: Text | None = None
    choice: ChoiceTexts | None = None
    grammar: Text | None = None
    whitespace_pattern: Text | None = None
    disable_any_whitespace: bool = False

    @property
    def whitespace(self) -> str:
        """What may stand between the parts of a JSON text."""
        return "" if self.disable_any_whitespace else self.whitespace_pattern or WHITESPACE


class ConstrainedBody(Body):
    """A body whose output may be constrained."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: Text | None = None
    guided_whitespace_pattern: Text | None = None

    @property
    def constraint(self) -> Asked | None:
        """What the output must be, None for any text."""
        return next(self._constraints(), None)

    @model_validator(mode="after")
    def _one_constraint(self) -> "ConstrainedBody":
        asked = [name for name, _ in self._constraints()]
        if len(asked) > 1:
            param = asked[1].partition(".")[0]
            raise refuse(param, f"{asked[0]!r} and {asked[1]!r}: an output can be only one.")
        return self

    def _constraints(self) -> Iterator[Asked]:
        yield from self._of_response_format()
        yield from self._of_structured_outputs()
        if self.guided_json is not None:
            whitespace = self.guided_whitespace_pattern or WHITESPACE
            yield "guided_json", JsonSchema(self.guided_json, whitespace)
        if self.guided_regex is not None:
            yield "guided_regex", Regex(self.guided_regex)
        if self.guided_choice is not None:
            yield "guided_choice", Choice(tuple(self.guided_choice))
        if self.guided_grammar is not None:
            yield "guided_grammar", ContextFree(self.guided_grammar)

    def _of_response_format(self) -> Iterator[Asked]:
        match self.response_format:
            case JsonObjectFormat():
                yield "response_format", ANY_OBJECT
            case JsonSchemaFormat(json_schema=named):
                yield "response_format", JsonSchema(named.json_schema)

    def _of_structured_outputs(self) -> Iterator[Asked]:
        asked = self.structured_outputs
        if asked is None:
            return
        where = "structured_outputs"
        if asked.json_schema is not None:
            yield f"{where}.json", JsonSchema(asked.json_schema, asked.whitespace)
        if asked.json_object:
            yield f"{where}.json_object", JsonSchema(ANY_OBJECT.schema, asked.whitespace)
        if asked.regex is not None:
            yield f"{where}.regex", Regex(asked.regex)
        if asked.choice is not None:
            yield f"{where}.choice", Choice(tuple(asked.choice))
        if asked.grammar is not None:
            yield f"{where}.grammar", ContextFree(asked.grammar)
