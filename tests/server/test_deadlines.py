"""Requests that say when they must have begun to run."""

import httpx
import pytest
from msgspec import structs

from deltamux.server.engine.deadlines import Deadlines
from deltamux.server.engine.messages import LoadAdapter
from deltamux.server.generation import FinishReason, SequenceUpdate

from .fake_engine import byte_level_tokenizer, serving
from .harness import EngineHarness, engine_config, make_request


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def harness(tiny_model, clock):
    harness = EngineHarness(engine_config(tiny_model("llama"), max_num_seqs=1))
    harness.engine.deadlines = Deadlines(clock)
    yield harness
    harness.close()


def with_deadline(request, deadline):
    return structs.replace(request, deadline=deadline)


def test_the_next_deadline_says_how_long_to_sleep(clock):
    deadlines = Deadlines(clock)
    assert deadlines.milliseconds() is None
    for name, deadline in (("b", 102.5), ("a", 101.0), ("c", None)):
        deadlines.add(with_deadline(make_request(name, [1]), deadline))
    assert deadlines.milliseconds() == 1000
    assert deadlines.passed() == []
    clock.now = 101.0
    assert deadlines.milliseconds() == 0
    assert deadlines.passed() == ["a"]
    clock.now = 110.0
    assert deadlines.passed() == ["b"]
    assert deadlines.milliseconds() is None


def test_what_has_not_begun_by_its_deadline_ends_and_what_has_goes_on(harness, clock):
    harness.submit(with_deadline(make_request("runs", [5, 6]), 101.0))
    harness.step()
    harness.submit(
        with_deadline(make_request("late", [5, 6]), 101.0),
        with_deadline(make_request("in time", [5, 6]), 900.0),
    )
    clock.now = 102.0
    harness.engine.expire()
    received = harness.run()
    late = received["late"]
    assert (late.finish_reason, late.token_ids) == (FinishReason.ERROR, [])
    assert "deadline passed" in late.error
    assert len(received["runs"].token_ids) == len(received["in time"].token_ids) == 12


def test_a_request_whose_adapter_does_not_come_in_time_ends(harness, clock, tmp_path):
    harness.engine.handle(LoadAdapter(1, str(tmp_path)))
    harness.submit(with_deadline(make_request("a", [5, 6], adapter_id=1), 101.0))
    clock.now = 101.5
    harness.engine.expire()
    harness.collect()
    assert "deadline passed" in harness.received["a"].error
    harness.wait_for_load()
    assert not harness.engine.has_work


def test_over_http_it_is_504_by_name():
    with serving(byte_level_tokenizer()) as server, httpx.Client(base_url=server.url) as client:
        body = {"model": server.state.model_name, "prompt": "x", "max_tokens": 2}
        assert client.post("/v1/completions", json={**body, "deadline_ms": 0}).status_code == 400
        assert client.post("/v1/completions", json=body).status_code == 200
        assert server.engine.submitted[-1].deadline is None
        assert client.post("/v1/completions", json={**body, "deadline_ms": 5000}).status_code == 200
        assert server.engine.submitted[-1].deadline > 0
        server.engine._updates = lambda request: [
            SequenceUpdate(
                request_id=request.request_id, finish_reason=FinishReason.ERROR, expired=True
            )
        ]
        for stream in (False, True):
            answer = client.post(
                "/v1/completions", json={**body, "deadline_ms": 1, "stream": stream}
            )
            assert answer.status_code == 504
            assert answer.json()["error"]["type"] == "DeadlineExceededError"
