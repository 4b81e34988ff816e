"""Tools, and what models of each format write when they call them, as their own pages show it."""

from deltamux.server.tools.formats import HERMES, LLAMA3_JSON, MISTRAL
from deltamux.server.tools.parser import ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "$defs": {"unit": {"enum": ["C", "F"]}},
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"hours": {"type": "integer", "minimum": 0, "maximum": 23}},
            "required": ["hours"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [WEATHER, CLOCK]
PARIS = ToolCall("get_weather", '{"city": "Paris", "unit": "C"}')
NOON = ToolCall("clock", '{"hours": 12}')
PARIS_JSON = '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}'
NOON_JSON = '{"name": "clock", "arguments": {"hours": 12}}'

# As the models' own pages show them.
OUTPUTS = {
    "hermes": (HERMES, f"<tool_call>\n{PARIS_JSON}\n</tool_call>", "", [PARIS]),
    "hermes, several behind text": (
        HERMES,
        f"Let me look.\n<tool_call>\n{PARIS_JSON}\n</tool_call>\n<tool_call>\n{NOON_JSON}\n"
        "</tool_call>",
        "Let me look.",
        [PARIS, NOON],
    ),
    "hermes, text behind": (
        HERMES,
        f"<tool_call>{NOON_JSON}</tool_call>That is all.",
        "That is all.",
        [NOON],
    ),
    "hermes, braces and signs in strings": (
        HERMES,
        '<tool_call>{"arguments": {"q": "a } \\" </tool_call> {"}, "name": "clock"}</tool_call>',
        "",
        [ToolCall("clock", '{"q": "a } \\" </tool_call> {"}')],
    ),
    "hermes, never finished": (
        HERMES,
        '<tool_call>\n{"name": "clo',
        '<tool_call>\n{"name": "clo',
        [],
    ),
    "hermes, spaced as the model likes": (
        HERMES,
        '<tool_call> { "name" : "clock","arguments":{"hours" :12} , "id": "}"}</tool_call>',
        "",
        [ToolCall("clock", '{"hours" :12}')],
    ),
    "hermes, cut off": (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par',
        "",
        [ToolCall("get_weather", '{"city": "Par')],
    ),
    "hermes, no JSON": (
        HERMES,
        f'<tool_call>{{"name": "f", "arguments": {{"a": [1}}}}</tool_call><tool_call>{NOON_JSON}'
        "</tool_call>",
        "",
        [ToolCall("f", '{"a": [1}}'), NOON],
    ),
    "hermes, a lone surrogate": (
        HERMES,
        '<tool_call>{"arguments": {"q": "\\ud800"}, "name": "clock"}</tool_call>',
        "",
        [ToolCall("clock", '{"q": "\\ud800"}')],
    ),
    "hermes, a name alone": (
        HERMES,
        '<tool_call>{"name": "clock"}</tool_call>',
        "",
        [ToolCall("clock", "{}")],
    ),
    "hermes, no call": (HERMES, "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    "hermes, like a call": (HERMES, "1 <tool 2 < tool_call>", "1 <tool 2 < tool_call>", []),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{PARIS_JSON}, {NOON_JSON}]", "", [PARIS, NOON]),
    "mistral, in one piece": (MISTRAL, f"[TOOL_CALLS] [{PARIS_JSON}]", "", [PARIS]),
    "mistral, new": (MISTRAL, '[TOOL_CALLS]clock{"hours": 12}', "", [NOON]),
    "mistral, newer": (
        MISTRAL,
        '[TOOL_CALLS]clock[ARGS]{"hours": 12}[TOOL_CALLS]clock[ARGS]{"hours": 12}',
        "",
        [NOON, NOON],
    ),
    "llama": (LLAMA3_JSON, '{"name": "clock", "parameters": {"hours": 12}}', "", [NOON]),
    "llama, several": (
        LLAMA3_JSON,
        '<|python_tag|>{"name": "clock", "parameters": {"hours": 12}}; '
        '{"name": "clock", "parameters": {"hours": 12}}',
        "",
        [NOON, NOON],
    ),
    "llama, text": (LLAMA3_JSON, 'It is {"name": 1}', 'It is {"name": 1}', []),
    "llama, other JSON": (LLAMA3_JSON, '{"temperature": 20}', '{"temperature": 20}', []),
    "text": (HERMES, "Hello, world. ", "Hello, world. ", []),
}
