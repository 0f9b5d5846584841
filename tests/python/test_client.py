"""The Python client against streams that are right, damaged, refused or cut."""

import threading

import grpc
import numpy as np
import pytest
from headstart import Attention, Expectation, HeadstartDataLoss, HeadstartError, PrefillClient, Sampling
from headstart.receiver import chunk_crc32c
from headstart.v1 import prefill_pb2 as pb

import fake_server as fake
from fake_server import FakeServer, TOKENS, headstart_error, make_kv, make_stream

UNAVAILABLE = headstart_error(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_delay_s=0.01)


def prefill(*scripts, client_options=None, **options):
    """Result and server of one call against a server that plays the scripts."""
    server = FakeServer(*scripts)
    with server.running() as target, PrefillClient(target, timeout_s=20, **(client_options or {})) as client:
        return client.prefill(TOKENS, **options), server


def damaged(change, kv=None):
    """A right stream with `change(stream)` applied to it."""
    stream = make_stream(kv)
    return change(stream) or stream


def chunks_of(stream):
    return [message.chunk for message in stream if message.HasField("chunk")]


# ------------------------------------------------------------------------------------------------- what must work


@pytest.mark.parametrize(
    "numpy_dtype, wire_dtype, name",
    [(np.uint16, pb.KV_DTYPE_BF16, "bf16"), (np.float16, pb.KV_DTYPE_F16, "f16"), (np.float32, pb.KV_DTYPE_F32, "f32")],
)
def test_assembles_kv_of_two_passes_bit_for_bit(numpy_dtype, wire_dtype, name):
    kv = make_kv(numpy_dtype)
    result, _ = prefill(make_stream(kv, wire_dtype))
    assert result.kv_dtype == name
    assert result.kv.dtype == numpy_dtype
    np.testing.assert_array_equal(result.kv, kv)


def test_reports_token_manifest_statistics_and_timing():
    result, _ = prefill(make_stream())
    assert (result.first_token_id, result.first_token_logprob) == (42, -0.5)
    assert result.layer_density == (1.0, 0.5, 0.25)
    assert result.manifest.model_hash == "ab" * 32
    assert (result.request_id, result.transfer_params, result.attempts) == ("r1", b"opaque", 1)
    assert result.statistics.attention_s == pytest.approx(0.020)
    assert result.statistics.total_s == pytest.approx(0.051)
    assert (result.statistics.executed_blocks, result.statistics.causal_blocks) == (30, 60)
    timing = result.timing
    assert 0 < timing.accepted_s <= timing.manifest_s <= timing.first_chunk_s <= timing.last_chunk_s <= timing.completed_s


def test_widens_bf16_exactly():
    result, _ = prefill(make_stream())
    assert (result.kv_float32().view(np.uint32) == result.kv.astype(np.uint32) << 16).all()


def test_accepts_layers_split_by_heads():
    kv = make_kv()

    def split(stream):
        chunks = [
            fake.make_chunk(kv, 2 * layer + head, layer, 0, len(TOKENS), (head, head + 1))
            for layer in range(fake.LAYERS)
            for head in range(2)
        ]
        completed = pb.PrefillResponse(completed=fake.make_completed(kv, chunks, fake.make_manifest()))
        return [*stream[:2], *(pb.PrefillResponse(chunk=chunk) for chunk in chunks), completed]

    result, _ = prefill(damaged(split))
    np.testing.assert_array_equal(result.kv, kv)


def test_calls_back_once_per_layer_while_the_stream_runs():
    kv = make_kv()
    release = threading.Event()
    stream = make_stream(kv)
    stream.insert(-1, lambda _: release.wait(10))  # before `completed`
    seen = []

    def on_layer(layer, layer_kv):
        seen.append(layer)
        np.testing.assert_array_equal(layer_kv, kv[layer])
        if len(seen) == fake.LAYERS:
            release.set()

    prefill(stream, on_layer=on_layer)
    assert seen == [0, 1, 2]


def test_sends_what_it_was_asked_for():
    attention = Attention(preset="balanced", gamma=0.5, sink_blocks=0, budget="row")
    _, server = prefill(
        make_stream(), attention=attention, sampling=Sampling(temperature=0.7, seed=3), request_id="r1", kv_dtype="bf16"
    )
    request = server.requests[0]
    assert list(request.token_ids) == TOKENS
    assert request.attention.preset == pb.ATTENTION_PRESET_BALANCED
    assert request.attention.budget == pb.BUDGET_RULE_ROW
    assert request.attention.gamma == 0.5
    assert request.attention.HasField("sink_blocks") and request.attention.sink_blocks == 0
    assert not request.attention.HasField("stride")
    assert request.sampling.temperature == pytest.approx(0.7)
    assert request.kv_dtype == pb.KV_DTYPE_BF16


@pytest.mark.parametrize("tokens", [[[1, 2]], [-1], [1 << 32], [0.5]])
def test_refuses_token_ids_that_no_server_can_mean(tokens):
    with PrefillClient("127.0.0.1:1") as client, pytest.raises(ValueError, match="token_ids"):
        client.prefill(tokens)


@pytest.mark.parametrize("options", [{"attention": "sparse"}, {"kv_dtype": "fp8"}, {"attention": Attention(budget="x")}])
def test_refuses_unknown_names(options):
    with PrefillClient("127.0.0.1:1") as client, pytest.raises(ValueError, match="is not one of"):
        client.prefill(TOKENS, **options)


# ------------------------------------------------------------------------------------------------- damage


def flip_a_byte(stream):
    chunk = chunks_of(stream)[2]
    data = bytearray(chunk.data)
    data[17] ^= 0x40
    chunk.data = bytes(data)


def flip_a_header_field(stream):
    first, second = chunks_of(stream)[:2]
    first.layer, second.layer = second.layer, first.layer  # right bytes, wrong place


def resign(chunk):
    chunk.crc32c = chunk_crc32c(chunk)


def set_in_chunk(position, **fields):
    def change(stream):
        chunk = chunks_of(stream)[position]
        for name, value in fields.items():
            setattr(chunk, name, value)
        resign(chunk)

    return change


def shorten_data(stream):
    chunk = chunks_of(stream)[0]
    chunk.data = chunk.data[:-2]
    resign(chunk)


def repeat_a_chunk(stream):
    again = pb.KvChunk()
    again.CopyFrom(chunks_of(stream)[0])
    again.index = 1
    resign(again)
    for chunk in chunks_of(stream)[1:]:
        chunk.index += 1
        resign(chunk)
    return [*stream[:3], pb.PrefillResponse(chunk=again), *stream[3:]]


def drop_last_chunk_honestly(stream):
    del stream[-2]
    stream[-1].completed.num_chunks -= 1


def in_manifest(**fields):
    def change(stream):
        for manifest in (stream[1].manifest, stream[-1].completed.manifest):
            for name, value in fields.items():
                setattr(manifest.layout if hasattr(manifest.layout, name) else manifest, name, value)

    return change


def in_completed(**fields):
    def change(stream):
        for name, value in fields.items():
            setattr(stream[-1].completed, name, value)

    return change


def density(values):
    def change(stream):
        del stream[-1].completed.manifest.layer_density[:]
        stream[-1].completed.manifest.layer_density.extend(values)

    return change


def other_final_manifest(stream):
    stream[-1].completed.manifest.model_hash = "cd" * 32


DAMAGE = {
    "flipped byte": (flip_a_byte, "crc32c"),
    "flipped header": (flip_a_header_field, "crc32c"),
    "wrong checksum": (lambda s: setattr(chunks_of(s)[4], "crc32c", chunks_of(s)[4].crc32c ^ 1), "crc32c"),
    "index gap": (set_in_chunk(1, index=2), "index"),
    "lost chunk": (lambda s: s[:3] + s[4:], "index"),
    "repeated chunk": (repeat_a_chunk, "goes on at token"),
    "swapped chunks": (lambda s: [*s[:2], s[3], s[2], *s[4:]], "index"),
    "layer too high": (set_in_chunk(0, layer=3), "only 3 layers"),
    "heads too many": (set_in_chunk(0, kv_head_count=3), "heads up to 3 of 2"),
    "no heads": (set_in_chunk(0, kv_head_count=0), "heads up to"),
    "no tokens": (set_in_chunk(0, token_count=0), "tokens up to"),
    "tokens beyond the prompt": (set_in_chunk(3, token_count=4), "tokens up to 12 of 11"),
    "huge token count": (set_in_chunk(0, token_count=0xFFFFFFFF), "tokens up to"),
    "not whole blocks": (set_in_chunk(0, token_count=7), "whole blocks"),
    "begins inside a block": (set_in_chunk(0, token_begin=2, token_count=6), "whole blocks"),
    "gap in a layer": (set_in_chunk(0, token_begin=4, token_count=4), "goes on at token"),
    "short data": (shorten_data, "bytes of data"),
    "truncated": (lambda s: s[:-1], "without `completed`"),
    "nothing": (lambda s: [pb.PrefillResponse()], "without an event"),
    "completed too early": (drop_last_chunk_honestly, "do not cover"),
    "completed without manifest": (lambda s: [s[0], s[-1]], "`completed` came out of order"),
    "chunk before manifest": (lambda s: [s[0], s[2]], "`chunk` came out of order"),
    "manifest before accepted": (lambda s: s[1:], "`manifest` came out of order"),
    "accepted twice": (lambda s: [s[0], *s], "`accepted` came twice"),
    "manifest twice": (lambda s: [*s[:2], *s[1:]], "`manifest` came out of order"),
    "goes on after completed": (lambda s: [*s, s[-1]], "after `completed`"),
    "wrong chunk total": (in_completed(num_chunks=99), "num_chunks"),
    "wrong byte total": (in_completed(kv_bytes=1), "kv_bytes"),
    "other first token": (lambda s: s[-1].completed.first_token.MergeFrom(pb.FirstToken(id=43)), "completed: crc32c"),
    "other logprob": (lambda s: s[-1].completed.first_token.MergeFrom(pb.FirstToken(logprob=-0.25)), "completed: crc32c"),
    "other density": (density([1.0, 0.5, 0.5]), "completed: crc32c"),
    "other counts": (lambda s: s[-1].completed.statistics.MergeFrom(pb.PrefillStatistics(executed_blocks=31)), "completed: crc32c"),
    "no first token": (lambda s: s[-1].completed.ClearField("first_token"), "first_token"),
    "other final manifest": (other_final_manifest, "not the one"),
    "too few densities": (density([1.0]), "layer_density"),
    "density of zero": (density([1.0, 0.0, 1.0]), "layer_density"),
    "density not a number": (density([1.0, float("nan"), 1.0]), "layer_density"),
    "other token hash": (in_manifest(token_hash=b"x" * 32), "token_hash"),
    "other prompt length": (in_manifest(num_tokens=10), "num_tokens"),
    "no layers": (in_manifest(num_layers=0), "num_layers"),
    "too many layers": (in_manifest(num_layers=1 << 20), "num_layers"),
    "absurd head_dim": (in_manifest(head_dim=1 << 31), "head_dim"),
    "unknown dtype": (in_manifest(dtype=9), "dtype"),
    "no block size": (in_manifest(block_tokens=0), "block_tokens"),
}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_data_loss(change, message):
    with pytest.raises(HeadstartDataLoss, match=message) as caught:
        prefill(damaged(change))
    assert caught.value.code == grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"request_id": "r2"}, "request_id=r1, expected r2"),
        ({"model": "other"}, "model=fake, expected other"),
        ({"kv_dtype": "f32"}, "dtype"),
        ({"attention": "exact"}, "attention algorithm"),
        ({"expected": Expectation(model_hash="00" * 32)}, "model_hash"),
        ({"expected": Expectation(num_layers=4)}, "num_layers=3, expected 4"),
        ({"expected": Expectation(num_kv_heads=4)}, "num_kv_heads"),
        ({"expected": Expectation(head_dim=64)}, "head_dim"),
    ],
)
def test_answer_to_another_question_is_data_loss(options, message):
    with pytest.raises(HeadstartDataLoss, match=message):
        prefill(make_stream(), **options)


def test_kv_beyond_the_limit_is_refused_before_it_is_allocated():
    with pytest.raises(HeadstartError, match="max_kv_bytes=1000") as caught:
        prefill(make_stream(), client_options={"max_kv_bytes": 1000})
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_damage_cancels_the_call():
    gone = threading.Event()

    def watch(context):
        assert context.add_callback(gone.set)

    stream = make_stream()
    flip_a_byte(stream)
    with pytest.raises(HeadstartDataLoss):
        prefill([watch, *stream[:-1], lambda _: gone.wait(10)])
    assert gone.is_set()


# ------------------------------------------------------------------------------------------------- errors and retries


def test_error_carries_reason_fields_and_retry_delay():
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


def test_unavailable_before_the_first_chunk_is_tried_again():
    result, server = prefill([UNAVAILABLE], [*make_stream()[:2], UNAVAILABLE], make_stream())
    assert result.attempts == 3
    assert len(server.requests) == 3
    np.testing.assert_array_equal(result.kv, make_kv())


def test_gives_up_after_max_attempts():
    server = FakeServer([UNAVAILABLE])
    with server.running() as target, PrefillClient(target, max_attempts=2) as client:
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS)
    assert caught.value.reason == "DRAINING"
    assert len(server.requests) == 2


def test_unavailable_after_the_first_chunk_is_final():
    server = FakeServer([*make_stream()[:3], UNAVAILABLE], make_stream())
    with server.running() as target, PrefillClient(target) as client:
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS)
    assert caught.value.reason == "DRAINING"
    assert len(server.requests) == 1


def test_a_stream_that_the_network_cuts_is_data_loss():
    cut = fake.Abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")  # without ErrorInfo: not the server's word
    with pytest.raises(HeadstartDataLoss, match="broke after 2 chunks"):
        prefill([*make_stream()[:4], cut])


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED])
def test_other_codes_are_not_tried_again(code):
    server = FakeServer([headstart_error(code, "X", retry_delay_s=0.0)], make_stream())
    with server.running() as target, PrefillClient(target) as client:
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS)
    assert caught.value.code == code
    assert len(server.requests) == 1


def test_a_retry_never_passes_the_deadline():
    slow = headstart_error(grpc.StatusCode.UNAVAILABLE, "LOADING", retry_delay_s=3600)
    with pytest.raises(HeadstartError) as caught:
        prefill([slow])
    assert caught.value.reason == "LOADING"


def test_deadline_ends_a_call_that_hangs():
    server = FakeServer([*make_stream()[:3], lambda context: fake.wait_until(lambda: not context.is_active())])
    with server.running() as target, PrefillClient(target) as client:
        with pytest.raises(HeadstartError) as caught:
            client.prefill(TOKENS, timeout_s=0.3)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
