"""The clients people use, on the running server: openai's own, langchain and litellm."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import httpx
import langchain_openai
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from deltamux.server.engine.errors import EngineUnavailable, QueueFull

from .running import RunningServer
from .served import ADAPTERS, BASE, served
from .siege import eventually, gauges

TEXTS = ["Hello there", "Hello where"]
HELLO = [{"role": "user", "content": "Hello there"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: Literal[10, 20]


TOOL = openai.pydantic_function_tool(Weather)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[RunningServer]:
    with served(tmp_path_factory.mktemp("clients")) as server:
        yield server


@pytest.fixture(scope="module")
def client(running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.openai_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(client) -> dict[str, str]:
    """What each model answers to the greeting, greedily."""
    return {name: openai_text(client, name) for name in (BASE, *ADAPTERS)}


def openai_text(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


def test_models_are_listed_and_answer_each_in_its_own_way(client, expected):
    listed = [model.id for model in client.models.list()]
    assert {BASE, *ADAPTERS} <= {*listed}
    assert client.models.retrieve("red").id == "red"
    assert len({*expected.values()}) == 3


def test_streams_and_async_calls_give_the_same(running, client, expected):
    ask = {"messages": HELLO, "max_tokens": 12, "temperature": 0}

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=running.openai_url, api_key="none") as made:
            answers = [made.chat.completions.create(model=name, **ask) for name in expected]
            whole = [each.choices[0].message.content for each in await asyncio.gather(*answers)]
            stream = await made.chat.completions.create(model="red", stream=True, **ask)
            parts = [chunk.choices[0].delta.content async for chunk in stream]
        return [*whole, "".join(part or "" for part in parts)]

    assert asyncio.run(all_at_once()) == [*expected.values(), expected["red"]]
    with client.chat.completions.stream(model="blue", **ask) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(texts) == expected["blue"]
    chunks = client.completions.create(model=BASE, prompt="Hi", max_tokens=5, stream=True)
    assert {chunk.object for chunk in chunks} == {"text_completion"}


def test_raw_answers_have_the_id_of_their_request(client):
    raw = client.chat.completions.with_raw_response.create(
        model=BASE, messages=HELLO, max_tokens=2, extra_headers={"X-Request-Id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.parse().choices[0].finish_reason in ("stop", "length")
    answer = client.completions.create(model=BASE, prompt="Hi", max_tokens=2)
    assert answer._request_id.startswith("req-")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=BASE, prompt="Hi", max_tokens=-1)
    assert refused.value.request_id.startswith("req-")


def test_errors_have_their_classes(running, client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="Hi")
    assert (unknown.value.param, unknown.value.status_code) == ("model", 404)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=BASE, messages=HELLO, temperature=9)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=BASE, messages=HELLO, response_format=Weather, max_tokens=2
        )
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=BASE,
            prompt="Hi",
            max_tokens=4000,
            extra_body={"ignore_eos": True},
            timeout=httpx.Timeout(30, read=0.05),
        )
    eventually(lambda: set(gauges(running).values()) == {0.0}, lambda: gauges(running))


@pytest.mark.parametrize(
    ("refusal", "status", "seconds"),
    [(QueueFull("full"), 429, 1.0), (EngineUnavailable("restarting"), 503, 5.0)],
)
def test_retries_wait_as_long_as_the_server_says(server, monkeypatch, refusal, status, seconds):
    """On a scripted engine that refuses once."""
    server.engine.refusal = refusal
    waits: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    statuses: list[int] = []

    def seen(answer: httpx.Response) -> None:
        statuses.append(answer.status_code)
        server.engine.refusal = None

    with (
        httpx.Client(event_hooks={"response": [seen]}) as http,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=2, http_client=http
        ) as retrying,
    ):
        answer = retrying.completions.create(model="base", prompt="x")
    assert answer.choices[0].text == "hello world"
    assert (statuses, waits) == ([status, 200], [seconds])


def test_tools_and_their_answers(client):
    answer = client.chat.completions.create(
        model="red", messages=HELLO, tools=[TOOL], tool_choice="required", seed=3
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    turns = [*HELLO, choice.message]
    for call in choice.message.tool_calls:
        Weather.model_validate_json(call.function.arguments)
        turns.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    last = client.chat.completions.create(model="red", messages=turns, tools=[TOOL], max_tokens=3)
    assert last.usage.prompt_tokens > answer.usage.prompt_tokens


def test_structured_output_is_parsed(client):
    answer = client.chat.completions.parse(
        model="blue", messages=HELLO, response_format=Weather, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)
    called = client.chat.completions.parse(
        model="blue", messages=HELLO, tools=[TOOL], tool_choice="required", seed=3
    )
    for call in called.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Weather)


def test_logprobs(client):
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    [choice] = answer.choices
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(each.logprob for each in token.top_logprobs)
    whole = client.completions.create(
        model=BASE, prompt="Hi there", max_tokens=1, logprobs=1, echo=True
    )
    assert "".join(whole.choices[0].logprobs.tokens).startswith("Hi there")


def test_embeddings(running, client):
    """Openai's client asks for base64 where nothing is said, langchain's in a way of its own."""
    own = {name: client.embeddings.create(model=name, input=TEXTS) for name in (BASE, "red")}
    vectors = {name: [each.embedding for each in answer.data] for name, answer in own.items()}
    assert vectors[BASE][0] != pytest.approx(vectors["red"][0])
    assert own[BASE].usage.total_tokens > 2
    with httpx.Client() as http:
        langchain = langchain_openai.OpenAIEmbeddings(
            model="red",
            base_url=running.openai_url,
            api_key="none",
            check_embedding_ctx_length=False,
            http_client=http,
        )
        assert langchain.embed_documents(TEXTS) == [pytest.approx(each) for each in vectors["red"]]
        assert langchain.embed_query(TEXTS[0]) == pytest.approx(vectors["red"][0])


@pytest.fixture
def chat(running) -> Iterator[Callable[..., langchain_openai.ChatOpenAI]]:
    """Makes models of langchain, whose connections are closed afterwards."""
    with httpx.Client() as http:
        yield partial(
            langchain_openai.ChatOpenAI,
            base_url=running.openai_url,
            api_key="none",
            max_retries=0,
            http_client=http,
        )


def test_langchain_invokes_streams_and_batches(chat, expected):
    models = {name: chat(model=name, max_tokens=12, temperature=0) for name in expected}
    for name, model in models.items():
        assert model.invoke("Hello there").content == expected[name]
    red = models["red"]
    streamed = [part.content for part in red.stream("Hello there")]
    assert "".join(streamed) == expected["red"]
    assert len(streamed) > 2

    async def later() -> tuple[str, str]:
        async with httpx.AsyncClient() as http:
            later = chat(model="red", max_tokens=12, temperature=0, http_async_client=http)
            invoked = await later.ainvoke([HumanMessage("Hello there")])
            parts = [part.content async for part in later.astream("Hello there")]
        return invoked.content, "".join(parts)

    assert asyncio.run(later()) == (expected["red"], expected["red"])
    assert [each.content for each in red.batch(["Hello there"] * 3)] == [expected["red"]] * 3
    usage = red.invoke("Hello there").usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_langchain_calls_tools(chat):
    model = chat(model="red", seed=3).bind_tools(
        [Weather], tool_choice="required", parallel_tool_calls=False
    )
    for answer in (model.invoke("Hello there"), streamed_whole(model)):
        for call in answer.tool_calls:
            assert call["name"] == "Weather"
            Weather.model_validate(call["args"])
        assert not answer.invalid_tool_calls
    turns = [HumanMessage("Hello there"), answer]
    turns += [ToolMessage("sunny", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert isinstance(chat(model="red", max_tokens=3).invoke(turns), AIMessage)


def streamed_whole(model: Runnable) -> AIMessage:
    first, *rest = model.stream("Hello there")
    for part in rest:
        first += part
    return first


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(chat, method):
    model = chat(model="blue", seed=5).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke("Hello there"), Weather)


def test_litellm(running, client, expected):
    """Whole, streamed and async, by both of its names for such servers; calls, vectors, errors."""
    program = Path(__file__).with_name("litellm_client.py")
    command = [sys.executable, str(program), running.openai_url, json.dumps(TOOL)]
    # Or it asks the network for prices.
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for provider in ("openai", "hosted_vllm"):
        assert found[provider] == dict.fromkeys(("whole", "streamed", "async"), expected["red"])
    assert found["calls"]
    for arguments in found["calls"]:
        Weather.model_validate_json(arguments)
    own = client.embeddings.create(model="red", input=TEXTS).data
    assert found["vectors"] == [pytest.approx(each.embedding) for each in own]
    assert found["errors"] == ["NotFoundError", "BadRequestError"]


def test_the_http_process_has_no_torch(running, client):
    """Whatever it has been asked before this: torch belongs to the engine's process."""
    assert client.embeddings.create(model=BASE, input=TEXTS).data
    mapped = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "libtorch" not in mapped
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    [resident] = re.findall(r"VmRSS:\s+(\d+) kB", status)
    assert int(resident) < 200_000
