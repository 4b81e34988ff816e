"""Conversations as text: the chat templates of a base, rendered as transformers renders them.

A chat template is a program in jinja's language that came with the base. What it may use beyond
the language is what transformers 5.23 gives it, and it is run in jinja's sandbox, which keeps it
from everything else. Only what JSON can hold is passed in, so there is no object in it whose
methods the sandbox would have to know.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

DEFAULT = "default"
_TOOL_USE = "tool_use"
"""The name of a template of its own for conversations with tools."""

_RESERVED = frozenset(
    {
        "self",
        "conversation",
        "conversations",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
    }
)
"""What a template's own arguments may not be called: what every template is given, and what asks
transformers for something that is not done here."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a turn's reasoning is called, by preference; templates read the first or the second."""


class ChatTemplateError(Exception):
    """The conversation does not fit the model's chat template, or there is none."""


class ChatTemplates:
    """The chat templates of a base; every method may be called from any thread."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compile none yet.

        Args:
            templates: By name; those called ``default`` and ``tool_use`` are used.
            special_tokens: Given to templates under these names.
        """
        self._templates = templates
        self._special_tokens = special_tokens
        self._environment = _environment()
        self._compiled: dict[str, Template] = {}

    def chosen(self, with_tools: bool) -> str:
        """The text of the template for conversations with or without tools, empty without any."""
        names = (_TOOL_USE, DEFAULT) if with_tools else (DEFAULT,)
        return next((self._templates[name] for name in names if name in self._templates), "")

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        arguments: Mapping[str, object],
    ) -> str:
        """The text of a conversation.

        Args:
            messages: Its turns, of JSON values; keys without a value are left out.
            tools: JSON schemas of functions, None where there are none.
            add_generation_prompt: Whether to end with the beginning of an answer.
            arguments: Further variables of the template.

        Raises:
            ChatTemplateError: No template, a conversation the template refuses, or an argument
                that is not the template's.
        """
        text = self.chosen(with_tools=tools is not None)
        if not text:
            raise ChatTemplateError(self._absence())
        if reserved := sorted(_RESERVED & arguments.keys()):
            raise ChatTemplateError(f"chat_template_kwargs may not set {reserved[0]!r}.")
        if not messages:
            raise ChatTemplateError("The conversation has no turns.")
        variables = {
            **self._special_tokens,
            **arguments,
            "messages": [_turn(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template(text).render(variables)
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"The chat template refuses this: {error}") from error

    def _absence(self) -> str:
        if not self._templates:
            return "The base model has no chat template; use /v1/completions with a prompt."
        names = ", ".join(sorted(self._templates))
        return f"The base model has several chat templates ({names}), and none is the default."

    def _template(self, text: str) -> Template:
        """Compiled at first use: a template that is no good refuses conversations, not the base."""
        if text not in self._compiled:
            self._compiled[text] = self._environment.from_string(text)
        return self._compiled[text]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without keys that have no value, its reasoning under both names that are read."""
    turn = {key: value for key, value in message.items() if value is not None}
    reasoning = next((turn[name] for name in _REASONING if name in turn), None)
    if reasoning is None:
        return turn
    first, second, _ = _REASONING
    return {second: reasoning, **turn, first: reasoning}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., object]] = {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks what the model said, for those who train on it; here it is text.

    The block is called like a macro: what is set in it is not seen after it.
    """

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration of it is mutable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` without being the type, from which there are ways to all other types."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace``, in which no name begins with the underscore of Python's internals."""

    # As jinja's, without a name that an attribute could not have then.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template may not hold {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models have learnt it; jinja's own filter would write it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
