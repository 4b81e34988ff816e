"""A span for every request for text, sent to an OpenTelemetry collector.

Attributes have the names that the semantic conventions for generative AI give them, and beside
them those of vLLM. OpenTelemetry is an optional part of the installation, ``deltamux[otel]``, and
is imported only where traces are asked for.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import time_ns
from typing import TYPE_CHECKING

from .metrics.request import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue

_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_NANOSECONDS = 1_000_000_000


class TracingUnavailable(Exception):
    """Traces cannot be sent; the message says why and what to do."""


class RequestTracer:
    """Makes the spans."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Send them where the provider does."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("deltamux")
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, record: RequestRecord, headers: Mapping[str, str], status: int) -> None:
        """Make the span of a request that has just ended, within the trace its headers name."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=int(record.begun_at * _NANOSECONDS),
            attributes=attributes(record, status),
        )
        if status >= 500 or "error" in record.finish_reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(time_ns())


def attributes(record: RequestRecord, status: int) -> "dict[str, AttributeValue]":
    """What a span tells of its request; what is not known is left out."""
    asked, consumer, counts = record.asked, record.consumer, record.counts
    known = {
        "gen_ai.operation.name": asked.operation,
        "gen_ai.provider.name": "deltamux",
        "gen_ai.request.id": asked.id,
        "gen_ai.request.model": consumer.adapter or consumer.base,
        "gen_ai.request.max_tokens": asked.max_tokens,
        "gen_ai.request.temperature": asked.temperature,
        "gen_ai.request.top_p": asked.top_p,
        "gen_ai.request.n": asked.n,
        "gen_ai.request.stream": asked.stream,
        "gen_ai.response.id": asked.id,
        "gen_ai.response.model": consumer.adapter or consumer.base,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": counts.prompt_tokens,
        "gen_ai.usage.output_tokens": counts.completion_tokens,
        "gen_ai.usage.prompt_tokens": counts.prompt_tokens,
        "gen_ai.usage.completion_tokens": counts.completion_tokens,
        "gen_ai.usage.cached_tokens": counts.cached_tokens,
        "gen_ai.usage.num_sequences": len(record.sequences),
        "gen_ai.latency.time_in_queue": record.queue_seconds,
        "gen_ai.latency.time_to_first_token": record.first_token_seconds,
        "gen_ai.latency.time_in_model_prefill": record.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": record.decode_seconds,
        "gen_ai.latency.e2e": record.seconds,
        "deltamux.adapter.digest": consumer.digest or None,
        "deltamux.tenant": consumer.tenant or None,
        "deltamux.key_id": consumer.key_id or None,
        "http.response.status_code": status,
    }
    return {name: value for name, value in known.items() if value is not None}


@contextmanager
def open_tracer(endpoint: str | None) -> Iterator[RequestTracer | None]:
    """A tracer that sends to the endpoint, all of it when the block is left; None for none.

    Raises:
        TracingUnavailable: OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        provider = _provider(endpoint)
    except ImportError as error:
        raise TracingUnavailable(
            f"--otlp-traces-endpoint needs OpenTelemetry, which is not installed ({error}); "
            "run: pip install 'deltamux[otel]'"
        ) from error
    try:
        yield RequestTracer(provider)
    finally:
        provider.shutdown()


def _provider(endpoint: str) -> "TracerProvider":
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = os.environ.get("OTEL_SERVICE_NAME", "deltamux")
    provider = TracerProvider(
        resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
    return provider


def _exporter(endpoint: str) -> "SpanExporter":
    """By gRPC, or by HTTP where the environment asks for it, as in vLLM."""
    protocol = os.environ.get(_PROTOCOL, "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        return Http(endpoint=endpoint)
    raise TracingUnavailable(f"{_PROTOCOL}={protocol!r} is not served: use grpc or http/protobuf")
