"""Embeddings: the library's own hidden states, in mixed batches, and how they are told."""

import base64
import random

import httpx
import numpy as np
import openai
import pytest
import torch

from deltamux.server.engine.messages import AdapterLoaded
from deltamux.server.generation import FinishReason

from ..kinds import variants
from ..peft_zoo import PeftOracle
from .harness import EngineHarness, Received, engine_config, make_request

TOLERANCE = 1e-4
LENGTHS = (1, 4, 17, 33, 70)


@pytest.fixture
def harness():
    made = []

    def make(model, **changes) -> EngineHarness:
        room = {"memory_budget": 64 << 20, "host_memory_budget": 1 << 30}
        made.append(EngineHarness(engine_config(model, **{**room, **changes})))
        return made[-1]

    yield make
    for each in made:
        each.close()


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def distance(received: Received, wanted: torch.Tensor) -> float:
    """Largest difference of a component; what was asked for must be all that came."""
    assert (received.error, received.finish_reason) == (None, FinishReason.STOP)
    assert (received.token_ids, received.logprobs) == ([], [])
    found = np.frombuffer(received.hidden, dtype="<f4")
    return float(np.abs(found - wanted.numpy()).max())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_the_base_gives_transformers_hidden_states(family, harness, tiny_model):
    """Of prompts of any length, in chunks, beside rows that generate, found in the cache or not."""
    model = tiny_model(family)
    oracle = PeftOracle(model)
    engine = harness(model, max_num_batched_tokens=33)
    prompts = {f"{length}": prompt_of(length, length) for length in LENGTHS}
    for again in ("", "again-"):
        for name, prompt in prompts.items():
            engine.submit(make_request(f"{again}{name}", prompt, embeds=True))
            engine.submit(make_request(f"{again}generate-{name}", prompt, max_tokens=5))
    received = engine.run()
    for again in ("", "again-"):
        for name, prompt in prompts.items():
            assert distance(received[f"{again}{name}"], oracle.hidden(prompt)) < TOLERANCE
            assert received[f"{again}generate-{name}"].finish_reason is FinishReason.LENGTH
    assert received["again-70"].num_cached_tokens >= 64


def test_every_kind_of_adapter_embeds(harness, tiny_model, tmp_path):
    """One of each of PEFT's kinds, all in one batch."""
    model = tiny_model("llama")
    oracle, engine = PeftOracle(model), harness(model)
    kinds = {each.kind: each for each in reversed(variants("llama"))}
    wanted = {}
    for adapter_id, variant in enumerate(kinds.values(), start=1):
        folder = oracle.save(variant, tmp_path / variant.name, adapter_id)
        assert isinstance(engine.load(adapter_id, folder), AdapterLoaded), variant.name
        prompt = variant.prompt(prompt_of(21, adapter_id))
        engine.submit(make_request(variant.name, prompt, adapter_id=adapter_id, embeds=True))
        wanted[variant.name] = oracle.hidden(prompt, folder)
    received = engine.run()
    far = {name: distance(received[name], vector) for name, vector in wanted.items()}
    assert {name: found for name, found in far.items() if found >= TOLERANCE} == {}
    assert len(wanted) > 20


def test_preempted_and_aborted_ones_leave_nothing(harness, tiny_model):
    """In a cache that holds few of them."""
    model = tiny_model("llama")
    oracle, engine = PeftOracle(model), harness(model, memory_budget=3 << 17)
    prompts = {str(number): prompt_of(40 + number, number) for number in range(12)}
    for name, prompt in prompts.items():
        engine.submit(make_request(name, prompt, embeds=True))
        engine.submit(make_request(f"generate-{name}", prompt, max_tokens=30))
    engine.step()
    engine.abort("7")
    received = engine.run()
    assert engine.preemptions
    assert received["7"].finish_reason is None
    for name, prompt in prompts.items():
        if name != "7":
            assert distance(received[name], oracle.hidden(prompt)) < TOLERANCE


def test_inputs_come_in_every_form(server, client, tokenizer):
    ids = tokenizer.encode("one two")
    for given, numbers in (
        ("one two", [len(ids)]),
        (["one two", "x"], [len(ids), 1]),
        (ids, [len(ids)]),
        ([ids, [5, 6, 7]], [len(ids), 3]),
    ):
        answer = client.embeddings.create(model="base", input=given)
        assert [each.index for each in answer.data] == [*range(len(numbers))]
        for each, number in zip(answer.data, numbers, strict=True):
            vector = np.array([3, 4, 0, number])
            assert each.embedding == pytest.approx(vector / np.linalg.norm(vector))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(numbers)
    assert all(request.embeds for request in server.engine.submitted)
    assert {*server.engine.finished} == {each.request_id for each in server.engine.submitted}


def test_numbers_and_base64_are_the_same(server):
    ask = {"model": "base", "input": "hello"}
    found = [
        httpx.post(f"{server.url}/v1/embeddings", json={**ask, "encoding_format": form}).json()
        for form in ("float", "base64")
    ]
    plain, packed = (each["data"][0]["embedding"] for each in found)
    assert np.frombuffer(base64.b64decode(packed), dtype="<f4").tolist() == plain
    assert sum(value**2 for value in plain) == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": [1, 999]}, 400, "input"),
        ({"input": "x " * 200}, 400, "input"),
        ({"input": ["x"] * 1025}, 400, "input"),
        ({"dimensions": 2}, 400, "dimensions"),
        ({"encoding_format": "int8"}, 400, "encoding_format"),
        ({"temperature": 0}, 400, "temperature"),
        ({"model": "nobody"}, 404, "model"),
    ],
)
def test_what_cannot_be_embedded_is_refused(server, fields, status, param):
    answer = httpx.post(
        f"{server.url}/v1/embeddings", json={"model": "base", "input": "x", **fields}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert server.engine.submitted == []


def test_an_engine_that_dies_is_told(server, client):
    server.engine.die_after, server.engine.death = 0, RuntimeError("a defect")
    with pytest.raises(openai.InternalServerError):
        client.embeddings.create(model="base", input=["a", "b"])
