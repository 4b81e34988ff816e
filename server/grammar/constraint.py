"""What a request's output must be, and how that is written as a grammar of llguidance.

llguidance reads JSON schemas, regular expressions and context-free grammars, and refuses by name
what it does not enforce of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r"\n?[ \t]{0,32}"
"""Between the parts of a JSON text: what pretty-printing needs. More than that could go on for
ever, which is what small models like to do."""


JSON_OPTIONS: "JsonCompileOptions" = {
    "lenient": False,
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
}
"""How llguidance reads schemas; ``x-guidance`` in a schema says the same to it."""


class GrammarRefused(Exception):
    """No grammar can be made of a constraint. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON text that the schema accepts, its properties in the schema's order.

    Attributes:
        schema: A schema of any draft from 4 on.
        whitespace: A regular expression, for what may stand between the parts of the text.
    """

    schema: Mapping[str, object]
    whitespace: str = WHITESPACE


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that the regular expression matches as a whole, in the syntax of Rust's regex."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContextFree:
    """A text of the grammar, which is written as Lark (llguidance's dialect) or as GBNF."""

    text: str


Constraint = JsonSchema | Regex | Choice | ContextFree

ANY_OBJECT = JsonSchema({"type": "object"})


def grammar_of(constraint: Constraint) -> str:
    """The constraint as llguidance takes it; whether that is well-formed is seen when compiled.

    Raises:
        GrammarRefused: It cannot even be written as one.
    """
    match constraint:
        case JsonSchema():
            return _json_grammar(constraint)
        case Regex():
            return str(LLMatcher.grammar_from_regex(constraint.pattern))
        case Choice():
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in constraint.texts)
            return str(LLMatcher.grammar_from_lark(f"start: {texts}"))
        case ContextFree():
            return str(LLMatcher.grammar_from_lark(_as_lark(constraint.text)))


def _json_grammar(constraint: JsonSchema) -> str:
    options: JsonCompileOptions = {**JSON_OPTIONS, "whitespace_pattern": constraint.whitespace}
    schema = json.dumps(constraint.schema)
    try:
        # Overrides, so that no schema can ask for keywords to be ignored.
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=options))
    except ValueError as error:
        raise GrammarRefused(str(error)) from error


def _as_lark(text: str) -> str:
    try:
        return str(any_to_lark(text))
    except GbnfToLarkError as error:
        raise GrammarRefused(f"as GBNF it cannot be read: {error}") from error
