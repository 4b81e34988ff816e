"""What ``/metrics`` shows, parsed by the Prometheus client's own parser."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deltamux.server.engine.errors import EngineDied
from deltamux.server.engine.messages import HostChanges

from .fake_engine import Running, leave_when_stalled
from .fake_store import write_adapter

LABELS = {"model_name": "base", "engine": "0"}


def scrape(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples, name: str, **labels: str) -> float:
    return samples["vllm:" + name, frozenset((LABELS | labels).items())]


def labels_of(samples, name: str) -> list[dict[str, str]]:
    return [dict(labels) for found, labels in samples if found == "vllm:" + name]


def complete(server: Running, model: str = "base", **fields) -> httpx.Response:
    body = {"model": model, "prompt": "one two", **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=10)


def load(server: Running, name: str) -> None:
    path = write_adapter(server.state_dir / "shelf" / name, name)
    body = {"lora_name": name, "lora_path": str(path)}
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == 200


def test_requests_are_counted(server, tokenizer):
    usage = complete(server, n=2).json()["usage"]
    complete(server, max_tokens=1)
    samples = scrape(server)
    prompt = len(tokenizer.encode("one two"))
    assert value(samples, "generation_tokens_total") == usage["completion_tokens"] + 1
    assert value(samples, "prompt_tokens_total") == 3 * prompt
    assert value(samples, "request_success_total", finished_reason="stop") == 2
    assert value(samples, "request_success_total", finished_reason="length") == 1
    assert value(samples, "request_success_total", finished_reason="abort") == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert value(samples, name + "_count") == 3
    assert value(samples, "inter_token_latency_seconds_count") == usage["completion_tokens"] - 2
    assert value(samples, "request_prompt_tokens_sum") == 3 * prompt
    assert value(samples, "request_generation_tokens_sum") == usage["completion_tokens"] + 1


def test_where_a_requests_time_goes(server):
    """Queue, prefill and decode are parts of the whole, from the moment the engine tells."""
    complete(server, n=2)
    samples = scrape(server)
    names = ("queue", "prefill", "decode")
    for name in names:
        assert value(samples, f"request_{name}_time_seconds_count") == 2
    parts = sum(value(samples, f"request_{name}_time_seconds_sum") for name in names)
    assert 0 < parts <= value(samples, "e2e_request_latency_seconds_sum")
    first = sum(value(samples, f"request_{name}_time_seconds_sum") for name in names[:2])
    assert first == pytest.approx(value(samples, "time_to_first_token_seconds_sum"))


def by_name(samples, kind: str, name: str) -> dict[str, float]:
    return {
        dict(labels)[kind]: number
        for (found, labels), number in samples.items()
        if found == f"deltamux:{kind}_{name}"
    }


def test_tenants_and_adapters_have_series_of_their_own(server, tokenizer):
    load(server, "poet")
    tokens = complete(server, "poet").json()["usage"]["completion_tokens"]
    complete(server, max_tokens=1)
    samples = scrape(server)
    prompt = len(tokenizer.encode("one two"))
    assert by_name(samples, "adapter", "requests_total") == {"(other)": 0, "base": 1, "poet": 1}
    assert by_name(samples, "adapter", "prompt_tokens_total")["poet"] == prompt
    assert by_name(samples, "adapter", "generation_tokens_total")["poet"] == tokens
    assert by_name(samples, "adapter", "time_to_first_token_seconds_count")["base"] == 1
    assert by_name(samples, "tenant", "requests_total") == {"(other)": 0, "(none)": 2}
    assert by_name(samples, "tenant", "generation_tokens_total")["(none)"] == tokens + 1


def test_answers_are_counted_by_status(server):
    complete(server)
    complete(server, "nope")
    complete(server, "nope")
    found = {
        dict(labels)["status"]: number
        for (name, labels), number in scrape(server).items()
        if name == "deltamux:http_responses_total"
    }
    assert found == {"200": 1, "404": 2}


def test_a_stop_string_is_a_stop_and_a_death_an_error(server):
    complete(server, stop="wor")
    server.engine.die_after, server.engine.death = 2, EngineDied("gone")
    assert complete(server).status_code == 503
    samples = scrape(server)
    expected = {"stop": 1, "length": 0, "abort": 0, "error": 1}
    for reason, number in expected.items():
        assert value(samples, "request_success_total", finished_reason=reason) == number


def test_the_engines_gauges_and_counts(server):
    server.state.metrics.step(server.engine.stats)
    server.state.metrics.step(server.engine.stats)
    samples = scrape(server)
    assert value(samples, "num_requests_running") == 2
    assert value(samples, "num_requests_waiting") == 1
    assert value(samples, "kv_cache_usage_perc") == 0.25
    assert value(samples, "prefix_cache_queries_total") == 20
    assert value(samples, "prefix_cache_hits_total") == 8
    assert value(samples, "num_preemptions_total") == 2
    assert value(samples, "iteration_tokens_total_sum") == 14
    [config] = labels_of(samples, "cache_config_info")
    assert config == {"engine": "0", "block_size": "16", "num_gpu_blocks": "128"}


def test_adapters_on_the_device_and_waited_for(server):
    load(server, "resident")
    load(server, "wanted")
    server.engine.stall_after = 1
    body = {"model": "wanted", "prompt": "x", "stream": True}
    url = f"{server.url}/v1/completions"
    leave_when_stalled(server, "/v1/completions", body, 1)
    assert server.engine.on_abort.acquire(timeout=30)
    server.engine.stall_after = 2
    with httpx.stream("POST", url, json=body, timeout=10) as answer:
        chunks = answer.iter_text()  # kept: dropping it closes the connection
        next(chunks)
        samples = scrape(server)
    [info] = labels_of(samples, "lora_requests_info")
    assert info == {
        "max_lora": "4",
        "running_lora_adapters": "resident",
        "waiting_lora_adapters": "wanted",
    }
    assert value(samples, "request_success_total", finished_reason="abort") == 1


def test_where_adapters_are_is_told_also_while_they_are_idle(server):
    for name in ("resident", "warm", "cold"):
        load(server, name)
    server.state.registry.residents.host_changed(HostChanges([1, 2, 3], [3]))
    url = f"{server.url}/v1/adapters"
    httpx.patch(f"{url}/warm", json={"pinned": True}).raise_for_status()
    found = labels_of(scrape(server), "lora_adapter_loaded")
    expected = [("resident", "gpu", "false"), ("resident", "cpu", "false"), ("warm", "cpu", "true")]
    assert found == [
        {"adapter_name": name, "level": level, "pinned": pinned} for name, level, pinned in expected
    ]
    states = {each["name"]: each["state"] for each in httpx.get(url).json()["data"]}
    assert states == {"resident": "on_device", "warm": "on_host", "cold": "registered"}
    server.state.registry.residents.engine_down()
    server.engine.stats = None
    states = {each["name"]: each["state"] for each in httpx.get(url).json()["data"]}
    assert set(states.values()) == {"registered"}


def test_a_scrape_while_the_engine_is_down(server):
    server.engine.info = server.engine.stats = None
    samples = scrape(server)
    assert value(samples, "prompt_tokens_total") == 0
    assert labels_of(samples, "num_requests_running") == []


def test_liveness_and_version(server):
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]
