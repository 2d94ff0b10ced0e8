"""The spans of OpenTelemetry, over HTTP and gRPC."""

import subprocess
import sys

import fakes
import gateways
import numpy as np
import pytest
from gateways import INFER, infer, request
from grpc import StatusCode
from grpcs import Client, message, refused
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from superserve_jax.gateway import spans

ROWS = np.uint8([[[7, 2], [3, 4]]] * 2)
CONTENT = gateways.body(ROWS)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SERVICE = "inference.GRPCInferenceService"
REPLY = {"superserve.model", "superserve.subnet", "superserve.accuracy", "superserve.queue_ms", "superserve.met_slo"}


@pytest.fixture
def exporter(monkeypatch):
    """A provider keeps the spans in this exporter."""
    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return made


def opened(*engines, **options):
    return gateways.opened(*engines, gateway_options={"grpc_port": 0}, **options)


def ended(exporter, count=1):
    """The spans so far, which are then forgotten."""
    fakes.wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    found = exporter.get_finished_spans()
    assert len(found) == count
    exporter.clear()
    return found


def parent_of(span):
    """The ids of its trace and of its parent, and the parent's tracestate."""
    assert span.parent.is_remote
    state = span.parent.trace_state.to_header()
    return trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.parent.span_id), state


def test_an_inference_over_http_has_a_span(exporter):
    with opened() as (_, door):
        answer = infer(door, CONTENT, f"{INFER}?key=secret", traceparent=TRACEPARENT, tracestate="a=1,b@c=2")
        [span] = ended(exporter)
        assert (span.name, span.kind) == ("POST /v2/models/{model}/infer", trace.SpanKind.SERVER)
        assert parent_of(span) == (TRACE, PARENT, "a=1,b@c=2")
        parameters = answer.json["parameters"]
        queue_ms = span.attributes["superserve.queue_ms"]
        assert queue_ms == pytest.approx(parameters["queue_ms"], abs=1e-3)
        assert dict(span.attributes) == {
            "http.request.method": "POST",
            "http.route": "/v2/models/{model}/infer",
            "url.path": INFER,
            "http.response.status_code": 200,
            "superserve.model": "supernet",
            "superserve.subnet": "2,2",
            "superserve.accuracy": parameters["accuracy"],
            "superserve.queue_ms": queue_ms,
            "superserve.met_slo": True,
        }
        assert span.status.status_code is trace.StatusCode.UNSET
        infer(door, CONTENT, INFER.replace("/infer", "/versions/1/infer"))
        [span] = ended(exporter)
        assert (span.name, span.parent) == ("POST /v2/models/{model}/versions/{version}/infer", None)
        request(door, "GET", "/v2")
        request(door, "GET", INFER)
        assert not exporter.get_finished_spans()


def test_only_faults_of_the_gateway_are_errors_over_http(exporter):
    with opened() as (server, door):
        for content, path, status in ((b"{}", INFER, 400), (CONTENT, "/v2/models/other/infer", 404)):
            assert infer(door, content, path).status == status
            [span] = ended(exporter)
            assert span.attributes["http.response.status_code"] == status
            assert span.status.status_code is trace.StatusCode.UNSET
            assert "superserve.subnet" not in span.attributes
        assert span.attributes["superserve.model"] == "other"
        server.close()
        assert infer(door, CONTENT).status == 503
        [span] = ended(exporter)
        assert span.status.status_code is trace.StatusCode.ERROR
        assert "closed" in span.status.description
        assert span.attributes["error.type"] == "503"


def test_an_inference_over_grpc_has_a_span(exporter):
    with opened() as (server, door), Client(door) as client:
        metadata = [("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
        client.infer(message(ROWS), metadata=metadata)
        [span] = ended(exporter)
        assert (span.name, span.kind) == (f"{SERVICE}/ModelInfer", trace.SpanKind.SERVER)
        assert parent_of(span) == (TRACE, PARENT, "a=1,b=2")
        told = {"rpc.system.name": "grpc", "rpc.method": f"{SERVICE}/ModelInfer", "rpc.response.status_code": "OK"}
        assert {*span.attributes} == {*told} | REPLY
        assert told.items() <= dict(span.attributes).items()
        assert span.attributes["superserve.subnet"] == "2,2"
        assert refused(client.infer, message(ROWS, name="other"))[0] is StatusCode.NOT_FOUND
        [span] = ended(exporter)
        assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
        assert span.attributes["superserve.model"] == "other"
        assert span.status.status_code is trace.StatusCode.UNSET
        server.close()
        assert refused(client.infer, message(ROWS))[0] is StatusCode.UNAVAILABLE
        [span] = ended(exporter)
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.attributes["error.type"] == "UNAVAILABLE"


def test_each_request_of_a_stream_has_a_span(exporter):
    with opened() as (_, door), Client(door) as client:
        requests = [message(ROWS), message(ROWS, name="other"), message(ROWS)]
        assert len([*client.stream(iter(requests), metadata=[("traceparent", TRACEPARENT)])]) == 3
        found = ended(exporter, 3)
        assert {parent_of(span) for span in found} == {(TRACE, PARENT, "")}
        assert {span.name for span in found} == {f"{SERVICE}/ModelStreamInfer"}
        assert sorted(span.attributes["rpc.response.status_code"] for span in found) == ["NOT_FOUND", "OK", "OK"]


def test_cancelled_inferences_have_spans_that_end(exporter):
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client, valve.shut(server, ROWS[0]):
        before = server.snapshot()["queries"]["arrived"]
        waiting = client.start(message(ROWS))
        fakes.wait_until(lambda: server.snapshot()["queries"]["arrived"] == before + 2)
        waiting.cancel()
        [span] = ended(exporter)
        assert span.attributes["rpc.response.status_code"] == "CANCELLED"
        assert span.status.status_code is trace.StatusCode.UNSET
        stream = client.stream(iter([message(ROWS)] * 3))
        fakes.wait_until(lambda: server.snapshot()["queries"]["arrived"] == before + 8)
        stream.cancel()
        assert {span.attributes["rpc.response.status_code"] for span in ended(exporter, 3)} == {"CANCELLED"}


def test_a_client_that_leaves_is_no_fault_of_the_gateway_over_http(exporter):
    valve = gateways.Valve()
    with opened(gateways.engine(valve), limits={"drain_s": 0.1}) as (server, door), valve.shut(server, ROWS[0]):
        head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(CONTENT))
        before = server.snapshot()["queries"]["arrived"]
        with gateways.connect(door) as leaving:
            leaving.sendall(head + CONTENT)
            fakes.wait_until(lambda: server.snapshot()["queries"]["arrived"] == before + 2)
        [span] = ended(exporter)
        assert span.attributes["http.response.status_code"] == 499
        assert span.status.status_code is trace.StatusCode.UNSET
        with gateways.connect(door) as staying:
            staying.sendall(head + CONTENT)
            fakes.wait_until(lambda: server.snapshot()["queries"]["arrived"] == before + 4)
            door.close()
            [span] = ended(exporter)
        assert span.attributes["http.response.status_code"] == 503
        assert span.status.status_code is trace.StatusCode.ERROR


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "nonsense"},
        {"traceparent": TRACEPARENT + "-" * 600},
        {"traceparent": f"00-{'0' * 32}-{PARENT}-01"},
        {"traceparent": TRACEPARENT, "tracestate": "no member"},
        {"traceparent": TRACEPARENT, "tracestate": "A=1"},
        {"traceparent": TRACEPARENT, "tracestate": "a=1," * 200},
        {"traceparent": TRACEPARENT, "tracestate": ",".join(f"k{i}=1" for i in range(33))},
        {"traceparent": TRACEPARENT, "tracestate": "\u00e4=1"},
    ],
    ids=range(8),
)
def test_wrong_headers_fill_no_log(exporter, caplog, headers):
    with opened() as (_, door):
        assert infer(door, CONTENT, **headers).status == 200
    [span] = ended(exporter)
    if "tracestate" in headers:
        assert parent_of(span) == (TRACE, PARENT, "")
    else:
        assert span.parent is None
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


def no_span(*_):
    raise AssertionError("the code of spans runs")


@pytest.mark.parametrize("provider", [trace.ProxyTracerProvider(), trace.NoOpTracerProvider()], ids=["unset", "no-op"])
def test_without_a_provider_no_code_of_spans_runs(monkeypatch, provider):
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(spans.Spans, "__init__", no_span)
    monkeypatch.setattr(spans.Span, "__init__", no_span)
    assert spans.find() is None
    with opened() as (_, door), Client(door) as client:
        assert infer(door, CONTENT, traceparent=TRACEPARENT).status == 200
        client.infer(message(ROWS))
        assert len([*client.stream(iter([message(ROWS)]))]) == 1


def test_a_disabled_sdk_makes_no_spans(monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    assert spans.find() is None


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None  # importing it fails
sys.path[:0] = ["tests/helpers"]
import gateways, numpy as np
with gateways.opened() as (_, door):
    assert gateways.infer(door, gateways.body(np.zeros((1, 2, 2), np.uint8)), traceparent="nonsense").status == 200
print("served")
"""


def test_a_gateway_works_without_the_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.stdout == "served\n", done.stderr
