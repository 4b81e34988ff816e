"""How models write tool calls, told by the chat template that taught them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """JSON objects of a name and arguments, with something around them.

    Attributes:
        name: As ``--tool-call-parser`` and vLLM call it.
        begin: What a call, or the first of several, begins with.
        end: What ends it, where something does.
        arguments: The key of the arguments.
        bare: Whether calls may also begin without ``begin``, as the first thing of an output.
        forced: What stands before, between and behind calls that are forced.
    """

    name: str
    begin: str
    end: str
    arguments: str
    bare: bool
    forced: tuple[str, str, str]


HERMES = ToolFormat(
    name="hermes",
    begin="<tool_call>",
    end="</tool_call>",
    arguments="arguments",
    bare=False,
    forced=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
)
"""Hermes, Qwen 2.5 and 3: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, repeated."""

MISTRAL = ToolFormat(
    name="mistral",
    begin="[TOOL_CALLS]",
    end="",
    arguments="arguments",
    bare=False,
    forced=("[TOOL_CALLS][", ", ", "]"),
)
"""Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]``, or ``[TOOL_CALLS]name{...}``."""

LLAMA3_JSON = ToolFormat(
    name="llama3_json",
    begin="<|python_tag|>",
    end="",
    arguments="parameters",
    bare=True,
    forced=("", "; ", ""),
)
"""Llama 3: ``{"name": ..., "parameters": ...}``, several with semicolons between them."""

FORMATS = {each.name: each for each in (HERMES, MISTRAL, LLAMA3_JSON)}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it is none of these."""
    if "tools" not in template:
        return None
    if MISTRAL.begin in template:
        return MISTRAL
    if HERMES.begin in template:
        return HERMES
    return LLAMA3_JSON if f'"{LLAMA3_JSON.arguments}"' in template else None
