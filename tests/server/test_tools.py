"""Tool calls: found in what models write, forced by a grammar, and told to OpenAI's client."""

import json
from collections.abc import Iterator

import httpx
import jsonschema
import msgspec
import openai
import pytest

from deltamux.server.grammar.constraint import grammar_of
from deltamux.server.grammar.matcher import Matcher
from deltamux.server.grammar.vocabulary import VocabularySource
from deltamux.server.text.reader import describe
from deltamux.server.text.tokenizer import Tokenizer
from deltamux.server.tools.forced import Function, forced_calls
from deltamux.server.tools.formats import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, format_of
from deltamux.server.tools.parser import ToolParser

from ..tiny_models import make_tokenizer
from .fake_engine import Running, byte_level_tokenizer, serving
from .served import HERMES_TEMPLATE, served
from .tool_outputs import CLOCK, NOON, NOON_JSON, OUTPUTS, PARIS, TOOLS


def test_a_format_is_told_by_the_template():
    assert format_of(HERMES_TEMPLATE) is HERMES
    assert format_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") is MISTRAL
    assert format_of('{% if tools %}{"name": ..., "parameters": ...}{% endif %}') is LLAMA3_JSON
    assert format_of("{{ messages }}") is None
    assert FORMATS.keys() == {"hermes", "mistral", "llama3_json"}


ASK = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    """A server whose model writes what a test says, in Hermes' format."""
    with serving(byte_level_tokenizer(HERMES_TEMPLATE)) as running:
        info = msgspec.structs.replace(running.engine.info, max_model_len=4096)
        running.engine.info = info
        yield running


@pytest.fixture(scope="module")
def asker(scripted) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_calls_are_told_with_the_text_beside_them(scripted, asker):
    output = OUTPUTS["hermes, several behind text"][1]
    scripted.engine.reply = lambda _: output
    answer = asker.chat.completions.create(**ASK, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me look."
        functions = [call.function for call in choice.message.tool_calls]
        assert [(each.name, each.arguments) for each in functions] == [
            (PARIS.name, PARIS.arguments),
            (NOON.name, NOON.arguments),
        ]
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4


def test_calls_are_streamed_as_the_client_adds_them_up(scripted, asker):
    scripted.engine.reply = lambda _: OUTPUTS["hermes, several behind text"][1]
    with asker.chat.completions.stream(**ASK) as stream:
        answer = stream.get_final_completion()
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "clock"]
    assert json.loads(choice.message.tool_calls[1].function.arguments) == {"hours": 12}


def test_names_and_arguments_are_streamed_as_they_are_written(scripted, asker):
    """Equal in the end to what is answered whole, also where the output was cut off."""
    scripted.engine.reply = lambda _: OUTPUTS["hermes, several behind text"][1]
    for limit in (1000, 80):
        [whole] = asker.chat.completions.create(**ASK, max_tokens=limit).choices
        stream = asker.chat.completions.create(**ASK, max_tokens=limit, stream=True)
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
        pieces = [call for delta in deltas for call in delta.tool_calls or []]
        assert len(pieces) > 10
        for index, call in enumerate(whole.message.tool_calls):
            first, *rest = [piece for piece in pieces if piece.index == index]
            assert (first.function.name, first.type) == (call.function.name, "function")
            assert first.id.startswith("call_")
            assert {(each.id, each.function.name) for each in rest} == {(None, None)}
            arguments = "".join(each.function.arguments for each in (first, *rest))
            assert arguments == call.function.arguments
    assert whole.finish_reason == "length"
    assert not whole.message.tool_calls[-1].function.arguments.endswith("}")


def test_an_answer_without_calls_is_as_ever(scripted, asker):
    scripted.engine.reply = lambda _: "hello world"
    [choice] = asker.chat.completions.create(**ASK).choices
    assert (choice.message.content, choice.message.tool_calls) == ("hello world", None)
    assert choice.finish_reason == "stop"
    scripted.engine.reply = lambda _: OUTPUTS["hermes"][1]
    [choice] = asker.chat.completions.create(**ASK, tool_choice="none").choices
    assert choice.message.tool_calls is None


def test_the_template_gets_tools_calls_and_answers(scripted, asker):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "clock", "arguments": '{"hours":1}'},
    }
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
    ]
    scripted.engine.reply = lambda _: "hello"
    asker.chat.completions.create(**{**ASK, "messages": turns})
    prompt = scripted.engine.submitted[-1].prompt_token_ids
    text = scripted.engine.tokenizer.decode(prompt, skip_special_tokens=False)
    assert '"description": "The weather of a city."' in text
    assert '<tool_call>\n{"name": "clock", "arguments": {"hours": 1}}\n</tool_call>' in text
    assert "<|im_start|>tool\none<|im_end|>" in text
    asker.chat.completions.create(**{**ASK, "tool_choice": "none"})
    prompt = scripted.engine.submitted[-1].prompt_token_ids
    assert "get_weather" not in scripted.engine.tokenizer.decode(prompt)


BAD = [
    ({"tools": [{"type": "browser"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools"),
    ({"tools": TOOLS * 100}, "tools"),
    ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
    (
        {
            "tool_choice": "required",
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}},
            ],
        },
        "tools",
    ),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_makes_no_sense_is_refused(scripted, fields, param):
    body = json.dumps({**ASK, **fields})
    answer = httpx.post(
        f"{scripted.url}/v1/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_base_that_was_not_taught_tools_refuses_them(server, client):
    with pytest.raises(openai.BadRequestError, match="no tool calls") as refused:
        client.chat.completions.create(**ASK)
    assert refused.value.param == "tools"


@pytest.fixture(scope="module")
def forced(tmp_path_factory) -> Iterator[openai.OpenAI]:
    """Asks a tiny random model, which writes calls when it must: nobody taught it."""
    with (
        served(tmp_path_factory.mktemp("tools"), adapters=()) as running,
        openai.OpenAI(base_url=running.openai_url, api_key="none", max_retries=0) as client,
    ):
        yield client


def check(call: object) -> None:
    [tool] = [tool for tool in TOOLS if tool["function"]["name"] == call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])


def test_calls_can_be_forced(forced):
    """Of any function, of one, and of one function at most once."""
    seen = set()
    for seed in range(6):
        answer = forced.chat.completions.create(**ASK, tool_choice="required", seed=seed, n=2)
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            for call in choice.message.tool_calls:
                check(call)
                seen.add(call.function.name)
        once = forced.chat.completions.create(
            **ASK, tool_choice="required", parallel_tool_calls=False, seed=seed
        )
        assert len(once.choices[0].message.tool_calls) == 1
        named = {"type": "function", "function": {"name": "clock"}}
        [choice] = forced.chat.completions.create(**ASK, tool_choice=named, seed=seed).choices
        assert choice.finish_reason == "stop"
        [call] = choice.message.tool_calls
        assert call.function.name == "clock"
        check(call)
    assert seen == {"get_weather", "clock"}


def test_forced_calls_are_streamed(forced):
    with forced.chat.completions.stream(**ASK, tool_choice="required", seed=1) as stream:
        [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    for call in choice.message.tool_calls:
        check(call)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer", "maximum": 9}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


def test_the_client_gets_structured_output(forced):
    """With choices, log-probabilities, and streamed; and cut where there are too few tokens."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    chat = {"model": "base", "messages": ASK["messages"], "response_format": wanted}
    answer = forced.chat.completions.create(**chat, n=3, logprobs=True, top_logprobs=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        text = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        assert text.removesuffix(b"<|im_end|>").decode() == choice.message.content
    stream = forced.chat.completions.create(**chat, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    jsonschema.validate(json.loads("".join(pieces)), SCHEMA)
    cut = forced.chat.completions.create(**chat, max_tokens=5)
    assert cut.choices[0].finish_reason == "length"
    plain = forced.completions.create(
        model="base", prompt=["a", "b"], extra_body={"guided_choice": ["yes", "no"]}, max_tokens=9
    )
    assert {choice.text for choice in plain.choices} <= {"yes", "no"}


def test_calls_that_begin_with_a_special_token_are_forced_with_that_token():
    """As Mistral's do: it is no text, and only its id matches."""
    fast = make_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": [MISTRAL.begin]})
    tokenizer = Tokenizer(describe(fast))
    token_id = tokenizer.special_id(MISTRAL.begin)
    functions = [Function("clock", CLOCK["function"]["parameters"])]
    grammar = grammar_of(forced_calls(functions, True, MISTRAL, tokenizer))
    vocabulary = VocabularySource.of(tokenizer.source, tokenizer.vocab_size).load()
    output = [token_id, *fast.encode(f"[{NOON_JSON}, {NOON_JSON}]")]
    for token_ids, accepted in ((output, True), (fast.encode("[TOOL"), False)):
        matcher = Matcher(vocabulary.compile(grammar), vocabulary, may_end_early=True)
        assert all(map(matcher.accept, token_ids)) is accepted
    text = tokenizer.decode(output, skip_special_tokens=False)
    assert ToolParser(MISTRAL).push(text).calls == [NOON, NOON]
