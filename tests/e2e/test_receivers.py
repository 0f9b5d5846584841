"""The receivers of the Python client against a real server: every way to the same bytes."""

import numpy as np
import pytest
import torch
from against_transformers import random_prompt
from headstart import CancelToken, HeadstartError, KvDestination, Part, TorchMemory
from tiny_models import save_tiny_model

# Several pieces, a ragged end.
TOKENS, PIECE = 700, 256
RECEIVERS = ["pure", "native"]


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    model = save_tiny_model("qwen3", tmp_path_factory.mktemp("model") / "qwen3", torch.bfloat16)
    with serve(model, "--piece-tokens", str(PIECE)) as running:
        yield running


@pytest.fixture(scope="module")
def prompt(server):
    with server.client(use_native=False) as client:
        return random_prompt(client.model_info().vocab_size, TOKENS)


@pytest.fixture(scope="module")
def expected(server, prompt):
    """By the simplest way: one stream, grpcio and NumPy."""
    with server.client(use_native=False, connections=1) as client:
        return client.prefill(prompt, attention="exact")


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_every_number_of_connections_gives_the_same(server, prompt, expected, receiver):
    for connections in (1, 2, 3, 8):
        with server.client(use_native=receiver == "native", connections=connections) as client:
            for skip_tokens in (0, 128, 300):
                result = client.prefill(prompt, attention="exact", skip_tokens=skip_tokens)
                np.testing.assert_array_equal(result.kv, expected.kv[:, :, :, skip_tokens:])
                assert result.first_token_id == expected.first_token_id
                assert result.connections == connections


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_parts_of_detached_kv_are_the_whole(server, prompt, expected, receiver):
    heads, layers = expected.kv.shape[2], expected.kv.shape[0]
    parts = [Part(kv_head_count=1), Part(kv_head_begin=1), Part(layer_count=1), Part(layer_begin=1), Part()]
    indices = [np.s_[:, :, :1], np.s_[:, :, 1:], np.s_[:1], np.s_[1:], np.s_[:]]
    assert heads > 1 and layers > 1
    with server.client(use_native=receiver == "native") as client:
        locations = []
        client.prefill_detached(prompt, locations.append, attention="exact")
        for part, index in zip(parts, indices):
            for num_stripes in (1, 2):
                result = client.fetch(locations[0], part, num_stripes=num_stripes)
                np.testing.assert_array_equal(result.kv, expected.kv[index])
        assert client.renew_lease(locations[0]) > 0
        client.release_kv(locations[0])
        with pytest.raises(HeadstartError) as caught:
            client.fetch(locations[0])
        assert caught.value.reason == "UNKNOWN_FETCH_ID"


@pytest.mark.parametrize("receiver", RECEIVERS)
@pytest.mark.parametrize("page_tokens", [16, 64, 128, 256])
@pytest.mark.parametrize("heads_first", [True, False])
def test_fills_paged_caches(server, prompt, expected, receiver, page_tokens, heads_first):
    layers, _, heads, tokens, dim = expected.kv.shape
    num_pages = -(-tokens // page_tokens)
    inner = (heads, page_tokens, dim) if heads_first else (page_tokens, heads, dim)
    cache = torch.zeros((layers, 2, num_pages, *inner), dtype=torch.bfloat16)
    planes = cache if heads_first else cache.transpose(3, 4)
    table = np.random.default_rng(3).permutation(num_pages)
    with server.client(use_native=receiver == "native", connections=2) as client:
        client.prefill(prompt, attention="exact", into=lambda shape: KvDestination([tuple(layer) for layer in planes], table))
    got = planes.view(torch.int16).numpy().view(np.uint16)[:, :, table]  # [layers][2][pages][heads][page_tokens][dim]
    got = got.transpose(0, 1, 3, 2, 4, 5).reshape(layers, 2, heads, -1, dim)[:, :, :, :tokens]
    np.testing.assert_array_equal(got, expected.kv)


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_the_same_errors(server, prompt, receiver):
    def error_of(call):
        with pytest.raises(HeadstartError) as caught:
            call()
        return caught.value.code.name, caught.value.reason

    cancelled = CancelToken()
    cancelled.cancel()
    with server.client(use_native=receiver == "native") as client:
        assert error_of(lambda: client.prefill([1 << 30])) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert error_of(lambda: client.prefill([1], model="another")) == ("NOT_FOUND", "UNKNOWN_MODEL")
        assert error_of(lambda: client.prefill(prompt, skip_tokens=TOKENS)) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert error_of(lambda: client.prefill(prompt, timeout_s=1e-3))[0] == "DEADLINE_EXCEEDED"
        assert error_of(lambda: client.prefill(prompt, cancel=cancelled))[0] == "CANCELLED"


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_torch_memory_is_filled(server, prompt, expected, receiver):
    memory = TorchMemory()
    with server.client(use_native=receiver == "native") as client:
        client.prefill(prompt, attention="exact", into=memory)
    np.testing.assert_array_equal(memory.numpy(), expected.kv)


def through_fp8(kv):
    """bfloat16 bits [layers][2][heads][tokens][dim], as they come when they were sent as fp8. By torch."""
    values = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).float()
    pages = []
    for page in values.split(128, dim=3):
        scales = page.abs().amax((3, 4), keepdim=True) / 448
        numbers = (page / torch.where(scales > 0, scales, torch.inf)).clamp(-448, 448).to(torch.float8_e4m3fn)
        pages.append(numbers.float() * scales)
    return torch.cat(pages, 3).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_fp8_is_what_torch_makes_of_the_kv(server, prompt, expected, receiver):
    """Of whole pages, whatever is skipped, on any number of connections; at half of the bytes."""
    wanted = through_fp8(expected.kv)
    assert (wanted != expected.kv).any()
    for connections in (1, 3):
        with server.client(use_native=receiver == "native", connections=connections) as client:
            for skip_tokens in (0, 128, 300):
                result = client.prefill(prompt, attention="exact", skip_tokens=skip_tokens, kv_dtype="fp8_e4m3")
                np.testing.assert_array_equal(result.kv, wanted[:, :, :, skip_tokens:])
                assert result.first_token_id == expected.first_token_id
                assert result.wire_dtype == "fp8_e4m3"
    layers, _, heads, tokens, dim = wanted.shape
    assert result.completed.kv_bytes == layers * 2 * heads * ((tokens - 300) * dim + 4 * 4)  # 4 pages


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_parts_of_fp8_are_the_whole(server, prompt, expected, receiver):
    wanted = through_fp8(expected.kv)
    with server.client(use_native=receiver == "native") as client:
        locations = []
        client.prefill_detached(prompt, locations.append, attention="exact", kv_dtype="fp8_e4m3")
        for part, index in ((Part(kv_head_begin=1), np.s_[:, :, 1:]), (Part(layer_count=1), np.s_[:1]), (Part(), np.s_[:])):
            for num_stripes in (1, 2):
                result = client.fetch(locations[0], part, num_stripes=num_stripes)
                np.testing.assert_array_equal(result.kv, wanted[index])
        client.release_kv(locations[0])


@pytest.mark.parametrize("receiver", RECEIVERS)
@pytest.mark.parametrize("page_tokens", [16, 128, 256])
def test_fp8_fills_paged_caches(server, prompt, expected, receiver, page_tokens):
    wanted = through_fp8(expected.kv)
    layers, _, heads, tokens, dim = wanted.shape
    num_pages = -(-tokens // page_tokens)
    cache = torch.zeros((layers, 2, num_pages, page_tokens, heads, dim), dtype=torch.bfloat16)
    table = np.random.default_rng(3).permutation(num_pages)
    planes = [tuple(layer) for layer in cache.transpose(3, 4)]
    with server.client(use_native=receiver == "native", connections=2) as client:
        client.prefill(prompt, attention="exact", kv_dtype="fp8_e4m3", into=lambda shape: KvDestination(planes, table))
    got = cache.view(torch.int16).numpy().view(np.uint16)[:, :, table].reshape(layers, 2, -1, heads, dim)
    np.testing.assert_array_equal(got.transpose(0, 1, 3, 2, 4)[:, :, :, :tokens], wanted)
