"""What the Python client makes of calls that fail: errors, retries, deadlines, cancels."""

import copy
import pickle

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from headstart import CancelToken, FieldViolation, HeadstartDataLoss, HeadstartError

import fake_server as fake
from fake_server import TOKENS, FakeServer, headstart_error, make_kv, make_stream

UNAVAILABLE = headstart_error(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=0.01)


def test_error_carries_reason_fields_and_retry_delay(prefill):
    abort = headstart_error(
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "bad", retry_delay_s=1.5, violations=[("token_ids", "too long")]
    )
    with pytest.raises(HeadstartError) as caught:
        prefill([abort])
    error = caught.value
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "bad")
    assert [(v.field, v.description) for v in error.field_violations] == [("token_ids", "too long")]
    assert error.retry_delay_s == pytest.approx(1.5)
    assert not isinstance(error, HeadstartDataLoss)


def test_unavailable_before_the_first_chunk_is_tried_again(prefill):
    result, server = prefill([UNAVAILABLE], [*make_stream()[:2], UNAVAILABLE], make_stream())
    assert result.attempts == 3
    assert len(server.requests) == 3
    np.testing.assert_array_equal(result.kv, make_kv())


def test_attempts_of_one_call_have_a_key_in_common(make_client):
    server = FakeServer([UNAVAILABLE], make_stream(), make_stream())
    with server.running() as target:
        client = make_client(target)
        client.prefill(TOKENS, request_id="r1")
        client.prefill(TOKENS, request_id="r1")
    first, second, other = (request.attempt_key for request in server.requests)
    assert len(first) == len(other) == 16
    assert first == second != other


def test_gives_up_after_max_attempts(make_client):
    server = FakeServer([UNAVAILABLE])
    with server.running() as target:
        client = make_client(target, max_attempts=2)
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS)
    assert caught.value.reason == "DRAINING"
    assert len(server.requests) == 2


def test_unavailable_after_the_first_chunk_is_final(make_client):
    server = FakeServer([*make_stream()[:3], UNAVAILABLE], make_stream())
    with server.running() as target:
        client = make_client(target)
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS)
    assert caught.value.reason == "DRAINING"
    assert len(server.requests) == 1


def test_a_stream_that_the_network_cuts_is_data_loss(prefill):
    cut = fake.Abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")  # without ErrorInfo: not the server's word
    with pytest.raises(HeadstartDataLoss, match="broke after 2 chunks"):
        prefill([*make_stream()[:4], cut])


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED])
def test_other_codes_are_not_tried_again(make_client, code):
    server = FakeServer([headstart_error(code, "X", retry_delay_s=0.0)], make_stream())
    with server.running() as target:
        client = make_client(target)
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS)
    assert caught.value.code == code
    assert len(server.requests) == 1


def test_a_retry_never_passes_the_deadline(prefill):
    slow = headstart_error(grpc.StatusCode.UNAVAILABLE, "LOADING", retry_delay_s=3600)
    with pytest.raises(HeadstartError) as caught:
        prefill([slow])
    assert caught.value.reason == "LOADING"


def test_deadline_ends_a_call_that_hangs(make_client):
    server = FakeServer([*make_stream()[:3], lambda context: fake.wait_until(lambda: not context.is_active())])
    with server.running() as target:
        client = make_client(target)
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS, timeout_s=0.3)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_cancel_ends_the_pause_between_two_attempts(make_client):
    token = CancelToken()
    slow = headstart_error(grpc.StatusCode.UNAVAILABLE, "LOADING", retry_delay_s=15)
    server = FakeServer([lambda context: context.add_callback(token.cancel), slow])
    with server.running() as target, pytest.raises(HeadstartError) as caught:
        make_client(target).prefill(TOKENS, cancel=token)
    assert caught.value.code == grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_stream_that_breaks_with_any_code_is_data_loss(prefill, code):
    with pytest.raises(HeadstartDataLoss, match="broke after 1 chunks"):
        prefill([*make_stream()[:3], fake.Abort(code, "nobody vouches for it")])


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_the_clock_and_a_cancel_are_no_data_loss(prefill, code):
    with pytest.raises(HeadstartError) as caught:
        prefill([*make_stream()[:3], fake.Abort(code, "")])
    assert caught.value.code == code


def test_a_server_may_say_data_loss(prefill):
    with pytest.raises(HeadstartDataLoss, match="bad page") as caught:
        prefill([headstart_error(grpc.StatusCode.DATA_LOSS, "INTERNAL", "bad page")])
    assert caught.value.reason == "INTERNAL"


def _status(*details):
    return status_pb2.Status(code=8, details=details).SerializeToString()


def _packed(detail):
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


MALFORMED = {
    "no status": b"\xff\xff",
    "a detail that is none": _status(any_pb2.Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff")),
    "a delay out of range": _status(_packed(error_details_pb2.RetryInfo(retry_delay={"seconds": -(10**18)}))),
    "reasons of others": _status(_packed(error_details_pb2.ErrorInfo(reason="THEIRS", domain="example.com"))),
}


@pytest.mark.parametrize("details", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_details_leave_the_status(prefill, details):
    with pytest.raises(HeadstartError) as caught:
        prefill([fake.Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", raw_details=details)])
    assert (caught.value.code, caught.value.message, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "")
    assert not caught.value.retry_delay_s


def test_malformed_durations_are_numbers(prefill):
    def make_absurd(completed):
        completed.statistics.total.seconds = 10**18

    result, _ = prefill(fake.change_completed(make_stream(), make_absurd))
    assert result.statistics.total_s == 1e18


@pytest.mark.parametrize(
    "error",
    [
        HeadstartError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "full",
            reason="QUEUE_FULL",
            field_violations=(FieldViolation("a", "b"),),
            retry_delay_s=1.5,
        ),
        HeadstartDataLoss("chunk 3"),
    ],
)
def test_errors_survive_pickling_and_copying(error):
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
