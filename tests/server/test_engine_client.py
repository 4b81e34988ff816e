"""The engine process, from the HTTP process's side: cancellation, death, rebirth, bounds."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest
from peft import LoraConfig

from deltamux.adapters.errors import AdapterNotFound
from deltamux.server.engine.client import EngineClient, EngineListener
from deltamux.server.engine.errors import (
    EngineDied,
    EngineStartFailed,
    EngineUnavailable,
    QueueFull,
)
from deltamux.server.generation import FinishReason
from deltamux.server.text.reader import read_tokenizer

from .harness import engine_config, make_request
from .peft_oracle import Oracle


@asynccontextmanager
async def running_client(model, max_waiting=100, engines=1, **changes):
    reports, ready, down = [], [], []
    client = EngineClient(engine_config(model, **changes), max_waiting)
    client.start(
        EngineListener(
            reports.append, lambda _: None, lambda: ready.append(1), lambda: down.append(1)
        )
    )
    try:
        await client.ready()
        yield client
        assert reports
        assert (len(ready), len(down)) == (engines, engines - 1)
    finally:
        await client.stop()


async def until(condition, what: str) -> None:
    """Poll: the other side is another process."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


async def collect(client, request) -> tuple[list[int], FinishReason]:
    token_ids = []
    async for update in client.generate(request):
        token_ids += update.token_ids
    return token_ids, update.finish_reason


@pytest.fixture
def adapter(tiny_model, tmp_path):
    oracle = Oracle(tiny_model("llama"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return oracle, oracle.save_adapter(config, tmp_path / "adapter", 0, size=0.2)


def test_life_death_and_rebirth(tiny_model, adapter):
    """One engine for the whole story, since each costs seconds to start."""
    oracle, path = adapter
    prompt = [7, 8, 9, 10, 11]
    wanted = oracle.generate(prompt, 12, path).token_ids

    async def story():
        async with running_client(
            tiny_model("llama"),
            max_waiting=0,
            max_num_seqs=2,
            engines=2,
        ) as client:
            assert await client.tokenizer() == read_tokenizer(tiny_model("llama"))
            info = await client.load_adapter(1, str(path), None)
            assert (info.kind, info.rank) == ("lora", 4)
            request = make_request("adapted", prompt, adapter_id=1)
            assert await collect(client, request) == (wanted, FinishReason.LENGTH)
            with pytest.raises(AdapterNotFound):
                await client.load_adapter(2, str(path / "nothing"), None)

            await the_queue_is_bounded(client)
            await leaving_the_iterator_aborts(client)
            await an_engine_that_dies_is_replaced(client)

            assert await collect(client, request) == ([], FinishReason.ERROR)
            await client.load_adapter(1, str(path), info.digest)
            assert await collect(client, request) == (wanted, FinishReason.LENGTH)
            await client.unload_adapter(1)
            tokens, reason = await collect(client, request)
            assert (tokens, reason) == ([], FinishReason.ERROR)

    asyncio.run(story())


async def the_queue_is_bounded(client):
    endless = [client.generate(make_request(f"e{i}", [5], max_tokens=250)) for i in range(2)]
    for each in endless:
        await anext(each)
    with pytest.raises(QueueFull):
        await anext(client.generate(make_request("one too many", [5])))
    for each in endless:
        await each.aclose()


async def leaving_the_iterator_aborts(client):
    stream = client.generate(make_request("left", [5, 6], max_tokens=250))
    update = await anext(stream)
    assert update.finish_reason is None
    await stream.aclose()
    await until(lambda: client.stats.running == 0, "the sequence was aborted")


async def an_engine_that_dies_is_replaced(client):
    stream = client.generate(make_request("cut short", [5, 6], max_tokens=250))
    await anext(stream)
    killed = client.pid
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(EngineDied):
        async for _ in stream:
            pass
    await until(lambda: client.info is None, "the death was noticed")
    with pytest.raises(EngineUnavailable):
        await anext(client.generate(make_request("too early", [5])))
    await until(lambda: client.info is not None, "another engine is ready")
    assert client.pid != killed


def test_an_engine_that_cannot_start_says_why(tmp_path):
    async def start():
        async with running_client(tmp_path / "nothing"):
            pass

    with pytest.raises(EngineStartFailed, match="nothing"):
        asyncio.run(start())


def test_a_base_without_a_tokenizer_is_told_to_who_waits_for_one(tmp_path):
    async def start():
        client = EngineClient(engine_config(tmp_path), max_waiting=0)
        client.start(EngineListener(print, print, lambda: None, lambda: None))
        try:
            await client.tokenizer()
        finally:
            await client.stop()

    with pytest.raises(EngineStartFailed, match=f"No tokenizer can be read from {tmp_path}"):
        asyncio.run(start())


def test_a_failing_engine_ends_at_once_whatever_it_still_has_to_load(tiny_model, adapter):
    """Its requests are told and another is started; no load queued in the old is waited for."""
    _, path = adapter

    async def story():
        async with running_client(tiny_model("llama"), engines=2) as client:
            loads = [
                asyncio.create_task(client.load_adapter(number, str(path), None))
                for number in range(2000)
            ]
            stream = client.generate(make_request("bystander", [5], max_tokens=250))
            await anext(stream)
            client._connection._commands.send(b"no message at all")
            with pytest.raises(EngineDied, match="ValidationError"):
                async for _ in stream:
                    pass
            outcomes = await asyncio.gather(*loads, return_exceptions=True)
            assert any(isinstance(outcome, EngineDied) for outcome in outcomes)
            await until(lambda: client.info is not None, "another engine is ready")

    asyncio.run(story())


def test_a_client_that_cannot_take_events_in_replaces_the_engine(tiny_model):
    def broken(stats):
        raise ZeroDivisionError("planted")

    async def story():
        client = EngineClient(engine_config(tiny_model("llama")), 10)
        client.start(EngineListener(broken, lambda _: None, lambda: None, lambda: None))
        try:
            await client.ready()
            with pytest.raises(EngineDied, match="planted"):
                await anext(client.generate(make_request("any", [5])))
        finally:
            await client.stop()

    asyncio.run(story())


def test_a_socket_path_that_is_too_long_is_an_error(tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    async def start():
        async with running_client(tiny_model("llama")):
            pass

    with pytest.raises(EngineStartFailed, match="longer than"):
        asyncio.run(start())
