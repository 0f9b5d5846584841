"""Traces against a receiver of OTLP that is not ours: the service and the messages of the package opentelemetry-proto, as
OpenTelemetry generates them."""

import concurrent.futures
import pathlib
import sys
import threading
import urllib.request

import grpc
import pytest
from google.protobuf.unknown_fields import UnknownFieldSet
from headstart import PrefillClient
from headstart.v1 import prefill_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

sys.path.append(str(pathlib.Path(__file__).parents[1] / "deploy"))
from load import code_of, prompt, raw_call, raw_fetch, raw_release  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402

LIMIT_S = 60
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets, by the trace."""

    def __init__(self, port=0):
        self._changed = threading.Condition()
        self.spans, self.resources = [], []
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def Export(self, request, _):
        with self._changed:
            for of_resource in request.resource_spans:
                self.resources.append({a.key: a.value.string_value for a in of_resource.resource.attributes})
                for of_scope in of_resource.scope_spans:
                    assert of_scope.scope.name == "headstart"
                    self.spans.extend(of_scope.spans)
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, request_id, name="Prefill"):
        """The spans of the trace that has this request, the call first, once one of them has the name."""
        def find():
            calls = [s for s in self.spans if values(s).get("headstart.request_id") == request_id]
            trace = calls and [calls[0], *(s for s in self.spans if s.trace_id == calls[0].trace_id and s is not calls[0])]
            return trace if any(s.name == name for s in trace) else []

        with self._changed:
            assert self._changed.wait_for(find, LIMIT_S), f"no trace of {request_id}"
            return find()

    def stop(self):
        self._server.stop(None).wait()


def values(span):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def server(serve, collector, tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with serve(model, "--piece-tokens", "512", "--otlp-endpoint", f"127.0.0.1:{collector.port}") as running:
        yield running


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def traceparent(flags="01"):
    return (("traceparent", f"00-{TRACE}-{PARENT}-{flags}"),)


def test_a_prompt_is_a_trace(channel, collector):
    request = pb.PrefillRequest(token_ids=prompt(1200), request_id="whole")
    assert code_of(raw_call(channel, request, metadata=traceparent())) == "OK"
    call, *parts = collector.wait_for("whole")
    assert call.trace_id.hex() == TRACE and call.parent_span_id.hex() == PARENT
    assert call.name == "Prefill" and call.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert call.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    seen = values(call)
    assert seen["rpc.service"] == "headstart.v1.PrefillService" and seen["rpc.grpc.status_code"] == 0
    assert seen["headstart.prompt_tokens"] == 1200 and seen["headstart.kv_bytes"] > 0 and seen["headstart.density"] == 1
    assert [event.name for event in call.events] == ["accepted", "computed"]
    names = [part.name for part in parts if part.name != "gave way"]
    assert names == ["queue", "piece", "piece", "piece", "copy out"]
    pieces = [values(part) for part in parts if part.name == "piece"]
    assert [piece["headstart.tokens"] for piece in pieces] == [512, 512, 176]
    assert [piece["headstart.first_position"] for piece in pieces] == [0, 512, 1024]
    for part in parts:
        assert part.parent_span_id == call.span_id and len(part.span_id) == 8
        assert call.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano <= call.end_time_unix_nano
    assert len({part.span_id for part in [call, *parts]}) == 1 + len(parts)
    resource = collector.resources[0]
    assert resource["service.name"] == "headstart" and resource["headstart.model"] == "tiny"


def test_the_official_messages_know_every_field(channel, collector):
    assert code_of(raw_call(channel, pb.PrefillRequest(token_ids=[7, 7, 7], request_id="known"))) == "OK"
    for span in collector.wait_for("known"):
        for message in (span, span.status, *span.events, *span.attributes, *(a.value for a in span.attributes)):
            assert len(UnknownFieldSet(message)) == 0


def test_without_a_parent_it_is_a_root(channel, collector):
    assert code_of(raw_call(channel, pb.PrefillRequest(token_ids=[1], request_id="root"))) == "OK"
    call = collector.wait_for("root")[0]
    assert call.parent_span_id == b"" and len(call.trace_id) == 16 and call.trace_id.hex() != TRACE


def test_a_parent_that_is_not_sampled_is_obeyed(channel, collector):
    quiet = pb.PrefillRequest(token_ids=[1], request_id="quiet")
    assert code_of(raw_call(channel, quiet, metadata=traceparent("00"))) == "OK"
    assert code_of(raw_call(channel, pb.PrefillRequest(token_ids=[1], request_id="after-quiet"))) == "OK"
    collector.wait_for("after-quiet")
    assert all(values(span).get("headstart.request_id") != "quiet" for span in collector.spans)


def test_errors_have_their_reason(channel, collector):
    bad = pb.PrefillRequest(token_ids=[1, 99999], request_id="bad")
    assert code_of(raw_call(channel, bad)) == "INVALID_ARGUMENT"
    call, *parts = collector.wait_for("bad")
    assert call.status.code == trace_pb2.Status.STATUS_CODE_ERROR and not parts
    assert values(call)["headstart.reason"] == "INVALID_FIELD" and values(call)["rpc.grpc.status_code"] == 3
    assert "99999" not in str(call)


def test_a_fetch_is_part_of_its_prompts_trace(channel, collector):
    request = pb.PrefillRequest(token_ids=prompt(600), request_id="kept", detached=pb.DetachedKv())
    call = raw_call(channel, request)
    fetch_id = next(call).accepted.fetch_id
    assert code_of(call) == "OK"
    assert code_of(raw_fetch(channel, fetch_id)) == "OK"
    raw_release(channel, fetch_id)
    spans = collector.wait_for("kept", "FetchKv")
    fetch = next(s for s in spans if s.name == "FetchKv")
    assert fetch.parent_span_id == spans[0].span_id
    assert fetch.kind == trace_pb2.Span.SPAN_KIND_SERVER and values(fetch)["headstart.kv_bytes"] > 0


def test_what_waits_is_sent_at_the_end(serve, tmp_path_factory):
    collector = Collector()
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with serve(model, "--otlp-endpoint", f"http://127.0.0.1:{collector.port}") as running, \
            grpc.insecure_channel(running.target) as channel:
        assert code_of(raw_call(channel, pb.PrefillRequest(token_ids=[1], request_id="last"))) == "OK"
    assert any(values(span).get("headstart.request_id") == "last" for span in collector.spans)
    collector.stop()


def test_a_collector_that_is_not_there_stops_nobody(serve, tmp_path_factory):
    """Requests are served, and the server stops as asked. What finds no room is tested in span_exporter_test."""
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with serve(model, "--otlp-endpoint", "127.0.0.1:1") as running, PrefillClient(running.target) as client:
        for turn in range(20):
            client.prefill([turn])
        assert metric(running, "headstart_trace_spans_exported_total") == 0


def test_the_ratio_is_for_calls_without_a_parent(serve, tmp_path_factory):
    collector = Collector()
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with serve(model, "--otlp-endpoint", f"127.0.0.1:{collector.port}", "--otlp-sample-ratio", "0") as running, \
            grpc.insecure_channel(running.target) as channel:
        assert code_of(raw_call(channel, pb.PrefillRequest(token_ids=[1], request_id="a"))) == "OK"
        assert code_of(raw_call(channel, pb.PrefillRequest(token_ids=[1], request_id="b"), metadata=traceparent())) == "OK"
    assert {values(s)["headstart.request_id"] for s in collector.spans if s.name == "Prefill"} == {"b"}
    collector.stop()


def metric(server, name):
    with urllib.request.urlopen(f"{server.admin_url}/metrics", timeout=10) as answer:
        return next(float(line.split()[1]) for line in answer.read().decode().splitlines() if line.startswith(name + " "))
