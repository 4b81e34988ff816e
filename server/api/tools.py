"""Tool calling in chat: what is checked before, and calls found in what the model writes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import uuid4

from msgspec.structs import replace

from ..tools.forced import Function, forced_calls
from ..tools.formats import ToolFormat
from ..tools.parser import CallPart, Parsed, ToolParser, joined
from .answers import CalledFunction, CalledFunctionDelta, CalledTool, CalledToolDelta
from .constrain import checked_grammar, output_grammar
from .errors import InvalidRequest
from .protocol import ChatBody
from .state import AppState
from .tool_fields import NamedTool


def tool_format(body: ChatBody, state: AppState) -> ToolFormat | None:
    """How calls of this request are written; None where it offers no tools.

    Raises:
        InvalidRequest: It offers tools, and the base was not taught to call any.
    """
    if not body.offered_tools:
        return None
    if "tools" not in state.tokenizer.chat_template or state.tool_format is None:
        raise InvalidRequest(
            "The base's chat template has no tool calls in a format that is served (hermes, "
            "mistral, llama3_json); leave 'tools' out, or serve with --tool-call-parser where the "
            "template renders tools.",
            "tools",
        )
    return state.tool_format


async def chat_grammar(body: ChatBody, form: ToolFormat | None, state: AppState) -> str | None:
    """The grammar of the answer: calls where they are forced, else as its fields say.

    Raises:
        InvalidRequest: There is no such grammar, or it is not served; naming the field.
    """
    if form is None or not body.forced_tools:
        return await output_grammar(body, state)
    named = isinstance(body.tool_choice, NamedTool)
    functions = [
        Function(tool.function.name, tool.function.parameters) for tool in body.forced_tools
    ]
    several = body.parallel_tool_calls and not named
    constraint = forced_calls(functions, several, form, state.tokenizer)
    return await checked_grammar("tools", constraint, state)


def shows_special_tokens(form: ToolFormat | None, state: AppState) -> bool:
    """Whether calls begin with a special token, which must then be in the text."""
    return form is not None and state.tokenizer.special_id(form.begin) is not None


@dataclass(slots=True)
class ChoiceCalls:
    """The calls of one choice, as they come.

    Attributes:
        form: How they are written; None where there are none.
        named: Whether the request named the function, which OpenAI ends with ``stop``.
    """

    form: ToolFormat | None
    named: bool
    _parser: ToolParser | None = field(init=False)
    _number: int = 0

    def __post_init__(self) -> None:
        """Start at the beginning of the output."""
        self._parser = None if self.form is None else ToolParser(self.form)

    def take(self, text: str, is_last: bool) -> tuple[str, list[CallPart]]:
        """The text that is in no call, and what is new of the calls."""
        if self._parser is None:
            return text, []
        parsed = self._parser.push(text)
        if is_last:
            parsed += Parsed(self._parser.flush())
        return parsed.text, list(parsed.parts)

    def deltas(self, parts: Iterable[CallPart]) -> list[CalledToolDelta]:
        """The parts as a stream tells them, at most one for each call."""
        found: dict[int, CalledToolDelta] = {}
        for part in parts:
            if part.name is not None:
                self._number += 1
                found[self._number] = _first(self._number - 1, part)
            else:
                before = found.get(self._number)
                found[self._number] = _more(before, self._number - 1, part.arguments)
        return [*found.values()]

    def finish_reason(self, delta_reason: str | None) -> str | None:
        """Why the choice ended, as OpenAI's API says it; what broke off is no call to be made."""
        if self._parser is None or self.named or delta_reason != "stop":
            return delta_reason
        calls = self._parser.has_calls and self._parser.is_whole
        return "tool_calls" if calls else delta_reason


def _first(index: int, part: CallPart) -> CalledToolDelta:
    function = CalledFunctionDelta(part.arguments, part.name or "")
    return CalledToolDelta(index, function, _new_id(), "function")


def _more(before: CalledToolDelta | None, index: int, arguments: str) -> CalledToolDelta:
    if before is None:
        return CalledToolDelta(index, CalledFunctionDelta(arguments))
    function = replace(before.function, arguments=before.function.arguments + arguments)
    return replace(before, function=function)


def _new_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def whole_calls(parts: Iterable[CallPart]) -> list[CalledTool]:
    """The calls of an answer that is not streamed."""
    return [
        CalledTool(_new_id(), CalledFunction(each.name, each.arguments)) for each in joined(parts)
    ]
