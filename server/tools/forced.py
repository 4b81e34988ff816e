"""The grammar of an output that must be tool calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..grammar.constraint import JSON_OPTIONS, ContextFree
from ..text.tokenizer import Tokenizer
from .formats import ToolFormat

MAX_CALLS = 16
"""At once; a model could go on for ever."""


@dataclass(frozen=True, slots=True)
class Function:
    """What may be called; ``parameters`` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, object]


def forced_calls(
    functions: Sequence[Function], several: bool, form: ToolFormat, tokenizer: Tokenizer
) -> ContextFree:
    """One call of one of these functions or, with ``several``, up to ``MAX_CALLS``."""
    before, between, after = (_terminal(text, form, tokenizer) for text in form.forced)
    more = f"({between} call){{0,{MAX_CALLS - 1}}}" if several else ""
    rules = [f"start: {before} call {more} {after}", f"call: {_either(len(functions))}"]
    for index, function in enumerate(functions):
        # Each schema is a root of its own, so that references within it hold.
        schema = {**function.parameters, "x-guidance": JSON_OPTIONS}
        head = json.dumps({"name": function.name}, ensure_ascii=False)[:-1]
        opening = json.dumps(f'{head}, "{form.arguments}": ', ensure_ascii=False)
        rules.append(f'call_{index}: {opening} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    return ContextFree("\n".join(rules))


def _either(number: int) -> str:
    return " | ".join(f"call_{index}" for index in range(number))


def _terminal(text: str, form: ToolFormat, tokenizer: Tokenizer) -> str:
    """The text in a grammar; what is one special token of the base is that token."""
    token_id = tokenizer.special_id(form.begin)
    if token_id is None or not text.startswith(form.begin):
        return json.dumps(text, ensure_ascii=False) if text else '""'
    rest = text.removeprefix(form.begin)
    return f"<[{token_id}]> {json.dumps(rest, ensure_ascii=False)}"
