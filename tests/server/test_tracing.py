"""Spans of requests, as OpenTelemetry's own exporter receives them."""

import builtins
import re
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from deltamux.server.engine.errors import EngineDied, QueueFull
from deltamux.server.tracing import RequestTracer, TracingUnavailable, open_tracer

from .fake_engine import Running, serving
from .fake_store import write_adapter

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "s3cret-prompt"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def server(tokenizer, exporter) -> Iterator[Running]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(tokenizer, tracer=RequestTracer(provider)) as running:
        yield running


def post(server: Running, headers: dict[str, str] | None = None, **body) -> httpx.Response:
    body = {"model": "base", "prompt": SECRET, **body}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30)


def spans(server: Running, exporter: InMemorySpanExporter) -> tuple:
    """All so far: a span is made after its answer, so another request is made first."""
    httpx.get(f"{server.url}/health")
    return exporter.get_finished_spans()


def test_a_span_tells_what_was_asked_and_what_it_took(server, exporter):
    answer = post(server, n=2, max_tokens=2, temperature=0.5, top_p=0.9).json()
    [span] = spans(server, exporter)
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    told = dict(span.attributes)
    latencies = {
        name: told.pop(f"gen_ai.latency.{name}")
        for name in (
            "time_in_queue",
            "time_in_model_prefill",
            "time_in_model_decode",
            "time_to_first_token",
            "e2e",
        )
    }
    assert 0 < latencies["time_in_queue"] <= latencies["time_to_first_token"] <= latencies["e2e"]
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "deltamux",
        "gen_ai.request.id": answer["id"],
        "gen_ai.request.model": "base",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.n": 2,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "base",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.prompt_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.usage.cached_tokens": 2,
        "gen_ai.usage.num_sequences": 2,
        "http.response.status_code": 200,
    }
    took = (span.end_time - span.start_time) / 1e9
    assert latencies["e2e"] == pytest.approx(took, abs=0.05)
    assert span.status.status_code is StatusCode.UNSET


def test_it_belongs_to_the_clients_trace(server, exporter):
    post(server, {"traceparent": f"00-{TRACE}-{PARENT}-01"}, stream=True)
    post(server, {"traceparent": "no trace"})
    ours, other = spans(server, exporter)
    assert f"{ours.context.trace_id:032x}" == TRACE
    assert f"{ours.parent.span_id:016x}" == PARENT
    assert ours.attributes["gen_ai.request.stream"] is True
    assert other.parent is None


def test_a_trace_that_is_not_sampled_is_left_out(server, exporter):
    post(server, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert spans(server, exporter) == ()


def test_adapters_and_failures(server, exporter):
    path = write_adapter(server.state_dir / "shelf" / "poet", "poet")
    body = {"lora_name": "poet", "lora_path": str(path)}
    httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).raise_for_status()
    post(server, model="poet")
    server.engine.die_after, server.engine.death = 2, EngineDied("gone")
    post(server, stream=True)
    server.engine.refusal = QueueFull("full")
    post(server)
    good, died, refused = spans(server, exporter)
    digest = server.state.registry.catalog.get("poet").default_digest
    assert good.attributes["gen_ai.response.model"] == "poet"
    assert good.attributes["deltamux.adapter.digest"] == digest
    assert died.status.status_code is StatusCode.ERROR
    assert died.attributes["gen_ai.usage.output_tokens"] == 1
    assert refused.attributes["http.response.status_code"] == 429
    assert "gen_ai.latency.time_to_first_token" not in refused.attributes


def test_nothing_private_is_in_a_span(server, exporter):
    post(server, {"Authorization": "Bearer s3cret-key"}, user="s3cret-user", stop=SECRET)
    [span] = spans(server, exporter)
    assert "s3cret" not in span.to_json()
    assert "hello" not in span.to_json()


def test_a_start_without_opentelemetry_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name: str, *arguments, **named):
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with open_tracer(None) as tracer:
        assert tracer is None
    refused = pytest.raises(TracingUnavailable, match=re.escape("pip install 'deltamux[otel]'"))
    with refused, open_tracer("http://localhost:4317"):
        pass


@pytest.mark.parametrize(
    ("protocol", "endpoint"),
    [("grpc", "http://127.0.0.1:9"), ("http/protobuf", "http://127.0.0.1:9/v1/traces")],
)
def test_both_protocols_are_there(monkeypatch, protocol, endpoint):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    with open_tracer(endpoint) as tracer:
        assert isinstance(tracer, RequestTracer)


def test_another_protocol_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon")
    with (
        pytest.raises(TracingUnavailable, match="carrier-pigeon"),
        open_tracer("http://127.0.0.1:9"),
    ):
        pass
