"""Chat templates, rendered by transformers and by the HTTP process, which has no transformers."""

import inspect
import itertools
from collections.abc import Callable

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from deltamux.server.text.chat_template import _RESERVED, ChatTemplateError
from deltamux.server.text.reader import describe
from deltamux.server.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2's: one line, and strings that are added."""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

{% if tools is not none %}
Environment: ipython
{% endif %}
Today Date: {{ date_string }}

{% if tools is not none %}
    Respond in the format {"name": function name, "parameters": dictionary}.

    {% for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {% endfor %}
{% endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}}<|eot_id|>
    {%- else %}
        {{- message.content | tojson if message.content is mapping else message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
"""As Llama 3's: dates, tools at length, messages cut short, indented blocks."""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.get("tool_calls")) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate: " + message.role) }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == (loop_messages | last) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val | tojson }}
                    {%- endif %}
                    {{- ", " if not loop.last }}
                {%- endfor %}
                {{- "}}, " if not loop.last else "}}]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] + ', "id": "' + tool_call.id + '"}' + (eos_token if loop.last else ", ") }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
"""As Mistral's: refusals, namespaces and special tokens."""

QWEN = """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- "<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson(ensure_ascii=False, separators=(",", ":"), sort_keys=True) }}
    {%- endfor %}
    {{- "\n</tools>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- elif message.content is iterable %}
        {%- set content = message.content | map(attribute='text') | join('\n') %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last_query_index %}
        {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- content.split('</think>')[-1].lstrip('\n') }}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' ~ tool_call.function.name ~ '", "arguments": ' }}
        {{- tool_call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
"""As Qwen 3's: loop controls, contents in parts, reasoning, tojson with options."""

GENERATION = """\
{% set said = 'nothing' %}
{% for message in messages %}
  {% if message.role == 'assistant' %}
    {% generation %}
      {% set said = message.content %}
{{ said }}{{ eos_token }}
    {% endgeneration %}
  {% else %}
{{ message.role }}: {{ message.content }}
  {% endif %}
{% endfor %}
{{ said }}
"""
"""As templates for training: what is set in the block does not leave it."""

SHOWS_EVERYTHING = """\
{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ documents }}{{ pad_token }}
{{ additional_special_tokens }}{{ eos_token }}{{ enable_thinking }}
{{ dict(a=1, **{'b': 2}).items() | list }}
{{ dict.fromkeys([1, 2], 0) }}{{ namespace(a=1).a }}{{ namespace({'a': 2}, b=3).b }}
{% set joined = joiner(', ') %}{% for _ in range(3) %}{{ joined() }}x{% endfor %}
{% for message in messages %}{{ message.thinking }}{{ message.name }}{% endfor %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "generation": GENERATION,
    "everything": SHOWS_EVERYTHING,
    "by name": {"default": CHATML, "tool_use": QWEN, "rag": "{{ 1 / 0 }}"},
    "without a name for tools": {"default": LLAMA},
    "sums": "{{ messages + 1 }}",
    "values": "{{ 'x' | int(base=99) }}",
    "no syntax": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "changes what it was given": "{{ messages.append(1) }}",
    "changes a turn": "{{ messages[0].update({'a': 1}) }}",
    "ranges": "{{ range(3) | list }}{{ strftime_now(1) }}",
}

CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Åre <&> \"'", "days": [1, 2.5, None]}},
}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "hi <there> & 'you' \"too\"\n"}],
    "system": [
        {"role": "system", "content": "  Be terse. "},
        {"role": "user", "content": "日本"},
        {"role": "assistant", "content": "<think>hm</think>\n\nyes"},
        {"role": "user", "content": ""},
    ],
    "no turns": [],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sun": true}', "tool_call_id": CALL["id"]},
        {"role": "assistant", "content": "Sun.", "tool_calls": None},
    ],
    "two calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    ],
    "out of turn": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "reasoning": [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "reasoning_content": "\nc\n"},
        {"role": "assistant", "content": "b", "reasoning": "d", "thinking": "e"},
        {"role": "assistant", "reasoning": "f", "thinking": None, "content": "b"},
        {"role": "assistant", "content": "b", "reasoning": None},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells <b>the weather</b> & more: ü",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "climate")
]
ARGUMENTS = [
    {},
    {"enable_thinking": False, "date_string": "26 Jul 2024"},
    {"eos_token": "<another>", "strftime_now": None},
]
NO_TURNS = "The conversation has no turns."
"""Our own words; transformers calls it by an argument of its own."""


def tokenizer_with(template: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.WordLevel({"x": 0}, unk_token="x")),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<more>"],
        chat_template=template,
    )


def text_or_refusal(render: Callable[..., str], *args: object, **kwargs: object) -> str:
    try:
        return render(*args, **kwargs)
    except ChatTemplateError as error:
        return f"refused: {error}"
    except (TemplateError, TypeError, ValueError) as error:
        return f"refused: The chat template refuses this: {error}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    oracle = tokenizer_with(TEMPLATES[name])
    ours = Tokenizer(describe(oracle))
    for case in itertools.product(CONVERSATIONS.values(), (None, TOOLS), ARGUMENTS, (True, False)):
        turns, tools, arguments, prompt = case
        made = text_or_refusal(ours.render_chat, turns, prompt, arguments, tools)
        options = {"tokenize": False, "add_generation_prompt": prompt, **arguments}
        wanted = text_or_refusal(oracle.apply_chat_template, turns, tools, **options)
        if made.endswith(NO_TURNS):
            assert wanted.startswith("refused: ")
        else:
            assert made == wanted, case


def test_the_templates_are_tried_on_what_they_are_for():
    """Not all of the cases above are refusals."""
    rendered = {
        name: Tokenizer(describe(tokenizer_with(TEMPLATES[name]))).render_chat(
            CONVERSATIONS[conversation], tools=TOOLS
        )
        for name, conversation in [
            ("chatml", "system"),
            ("llama", "tools"),
            ("mistral", "one turn"),
            ("qwen", "reasoning"),
            ("generation", "system"),
            ("everything", "reasoning"),
        ]
    }
    assert "Today Date: 20" in rendered["llama"]
    assert '{"type": "function", "function": {"name": "weather"' in rendered["mistral"]
    assert "<think>\nc\n</think>" in rendered["qwen"]
    assert rendered["generation"].endswith("nothing")
    assert '"thinking": "e"' in rendered["everything"]


@pytest.mark.parametrize(
    "template",
    ["{{ namespace(_a=1) }}", "{{ namespace({'__a': 1}) }}", "{{ dict.__class__.mro() }}"],
)
def test_internals_are_out_of_reach(template):
    """Refused in words that name our own classes."""
    oracle = tokenizer_with(template)
    turns = CONVERSATIONS["one turn"]
    with pytest.raises(TemplateError, match=r"underscore|unsafe"):
        oracle.apply_chat_template(turns, tokenize=False)
    with pytest.raises(ChatTemplateError, match=r"may not hold '_|unsafe"):
        Tokenizer(describe(oracle)).render_chat(turns)


def test_a_base_of_several_templates_without_a_default_says_so():
    tokenizer = Tokenizer(describe(tokenizer_with({"tool_use": QWEN, "rag": CHATML})))
    assert tokenizer.has_chat_template
    assert tokenizer.chat_template == QWEN
    assert "weather" in tokenizer.render_chat(CONVERSATIONS["one turn"], tools=TOOLS)
    with pytest.raises(ChatTemplateError, match=r"several chat templates \(rag, tool_use\)"):
        tokenizer.render_chat(CONVERSATIONS["one turn"])


def test_no_argument_of_transformers_is_taken_for_the_templates():
    theirs = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
    assert theirs.keys() <= _RESERVED
