"""The Python client against streams that are right."""

import threading

import numpy as np
import pytest
from google.protobuf.internal.encoder import _VarintBytes
from headstart import Attention, HeadstartDataLoss, KvLocation, PrefillClient, Sampling, contiguous
from headstart.v1 import prefill_pb2 as pb
from headstart.wire import chunk_crc32c, decode

import fake_server as fake
from fake_server import TOKENS, make_kv, make_stream

@pytest.mark.parametrize(
    "numpy_dtype, wire_dtype, name",
    [(np.uint16, pb.KV_DTYPE_BF16, "bf16"), (np.float16, pb.KV_DTYPE_F16, "f16"), (np.float32, pb.KV_DTYPE_F32, "f32")],
)
def test_assembles_kv_of_two_passes_bit_for_bit(prefill, numpy_dtype, wire_dtype, name):
    kv = make_kv(numpy_dtype)
    result, _ = prefill(make_stream(kv, wire_dtype))
    assert result.kv_dtype == name
    assert result.kv.dtype == numpy_dtype
    np.testing.assert_array_equal(result.kv, kv)


@pytest.mark.parametrize("skip_tokens", [0, 4, 6, 10])
def test_multiplies_fp8_out(prefill, skip_tokens):
    torch = pytest.importorskip("torch")
    kv = fake.Fp8Kv()
    stream = lambda: make_stream(kv, pb.KV_DTYPE_FP8_E4M3, skip_tokens)
    values = kv.values(skip_tokens)

    result, server = prefill(stream(), kv_dtype="fp8_e4m3", skip_tokens=skip_tokens)
    assert server.requests[0].kv_dtype == pb.KV_DTYPE_FP8_E4M3
    assert (result.kv_dtype, result.wire_dtype) == ("bf16", "fp8_e4m3")
    np.testing.assert_array_equal(result.kv, values.bfloat16().view(torch.int16).numpy().view(np.uint16))

    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.zeros(values.shape, dtype=dtype)
        prefill(stream(), skip_tokens=skip_tokens, into=lambda shape: contiguous(memory, shape.token_begin))
        assert torch.equal(memory, values.to(dtype))
    array = np.zeros(values.shape, np.float32)
    prefill(stream(), skip_tokens=skip_tokens, into=lambda shape: contiguous(array, shape.token_begin))
    np.testing.assert_array_equal(array, values.numpy())


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.int32])
def test_fp8_is_not_multiplied_out_to_what_cannot_hold_it(prefill, dtype):
    stream = make_stream(fake.Fp8Kv(), pb.KV_DTYPE_FP8_E4M3)
    with pytest.raises(ValueError, match="fp8 is multiplied out to float32 or bfloat16"):
        prefill(stream, into=lambda shape: contiguous(np.zeros(shape.dims, dtype)))


def test_fp8_with_a_scale_too_few_is_data_loss(prefill):
    stream = make_stream(fake.Fp8Kv(), pb.KV_DTYPE_FP8_E4M3)
    chunk = stream[3].chunk
    chunk.data = chunk.data[4:]
    chunk.crc32c = chunk_crc32c(chunk, chunk.data)
    with pytest.raises(HeadstartDataLoss, match="data has"):
        prefill(stream)


def test_reports_token_manifest_statistics_and_timing(prefill):
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


def test_widens_bf16_exactly(prefill):
    result, _ = prefill(make_stream())
    assert (result.kv_float32().view(np.uint32) == result.kv.astype(np.uint32) << 16).all()


def chunk_laid_out_otherwise(message):
    """The same chunk, its data before the numbers and a field of a later version of the format behind them."""
    data = pb.KvChunk(data=message.chunk.data)
    message.chunk.ClearField("data")
    content = data.SerializeToString() + message.chunk.SerializeToString() + b"\xa0\x06\x01"
    return b"\x1a" + _VarintBytes(len(content)) + content


def test_takes_chunks_whose_fields_come_in_another_order(prefill):
    stream = make_stream()
    stream[2:-1] = map(chunk_laid_out_otherwise, stream[2:-1])
    result, _ = prefill(stream)
    np.testing.assert_array_equal(result.kv, make_kv())


def test_takes_the_data_of_chunks_without_a_copy():
    message = make_stream()[2].SerializeToString()
    event, chunk = decode(message)
    assert event == "chunk"
    assert np.shares_memory(chunk.data, np.frombuffer(message, np.uint8))


def test_calls_back_once_per_layer_while_the_stream_runs(prefill):
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


def test_sends_what_it_was_asked_for(prefill):
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


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_refuses_timeouts_that_mean_nothing(timeout_s):
    with pytest.raises(ValueError, match="timeout_s"):
        PrefillClient("127.0.0.1:1", timeout_s=timeout_s)
    with PrefillClient("127.0.0.1:1") as client, pytest.raises(ValueError, match="timeout_s"):
        client.prefill(TOKENS, timeout_s=timeout_s)
    with PrefillClient("127.0.0.1:1") as client, pytest.raises(ValueError, match="lease_s"):
        client.prefill_detached(TOKENS, lambda location: None, lease_s=timeout_s)


@pytest.mark.parametrize("connections", [-1, 65])
def test_refuses_numbers_of_connections_that_mean_nothing(connections):
    with pytest.raises(ValueError, match="connections"):
        PrefillClient("127.0.0.1:1", connections=connections)
    with PrefillClient("127.0.0.1:1") as client, pytest.raises(ValueError, match="num_stripes"):
        client.fetch(KvLocation(b""), num_stripes=connections)
