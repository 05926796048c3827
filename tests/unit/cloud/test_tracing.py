"""Traces reach a collector, and say nothing of devices or frames."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cloud.config import TraceConfig
from cloud.tracing import Tracing
from splitward.errors import ConfigError

pytestmark = pytest.mark.anyio


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}/v1/traces"
        self.requests: list[ExportTraceServiceRequest] = []
        self.bodies: list[bytes] = []

    def spans(self) -> list:
        found = [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.bodies.append(body)
            found.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def attributes(span) -> dict:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


async def test_a_batch_and_a_request_are_traced(run_cloud, collector) -> None:
    async with run_cloud(trace=TraceConfig(collector.endpoint, share=1.0)) as cloud:
        await cloud.send(cloud.activation())
        answer = await cloud.http.get("/v1/results/pi-1/" + (b"b" * 16).hex() + "/0/fhir")
        assert answer.status_code == 200
    spans = collector.spans()
    by_name = {span.name: span for span in spans}
    assert [span.name for span in spans] == ["batch", "infer", "commit", "reply", "request"]
    assert attributes(by_name["batch"]) == {"model": "digits", "frames": 1}
    assert {by_name[name].parent_span_id for name in ("infer", "commit", "reply")} == {by_name["batch"].span_id}
    request = attributes(by_name["request"])
    assert request["status"] == 200
    assert request["route"] == "/v1/results/{device}/{boot}/{sequence}/fhir"
    assert request["request_id"] == answer.headers["x-request-id"]
    about = {
        one.key: one.value.string_value for one in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert about["service.name"] == "splitward-cloud"
    assert not any(b"pi-1" in body for body in collector.bodies)


async def test_a_collector_that_is_away_costs_no_result(run_cloud) -> None:
    async with run_cloud(trace=TraceConfig("http://127.0.0.1:9/v1/traces", share=1.0, timeout_s=0.1)) as cloud:
        await cloud.send(cloud.activation())
    assert len(cloud.transport.published) == 1


def test_traces_without_the_library_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"splitward\[trace\]"):
        Tracing(TraceConfig("http://127.0.0.1:4318/v1/traces"), "cloud-1")
