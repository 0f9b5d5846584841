"""The Python client and detached KV: several connections, parts, streams that break, leases."""

import itertools
import signal
import threading

import grpc
import numpy as np
import pytest
from headstart import CancelToken, HeadstartDataLoss, HeadstartError, KvLocation, Part

from fake_server import KV_HEADS, LAYERS, TOKENS, Abort, FakeKeeper, headstart_error, make_kv, wait_until

BROKEN = Abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")


class BreakOnce:
    """Ends every fetch once, before it ships the chunk of this index."""

    def __init__(self, index, how=BROKEN):
        self.index, self.how, self.broken = index, how, set()

    def __call__(self, fetch, chunk, context):
        stripe = fetch.part.stripe_index
        if chunk.index == self.index and stripe not in self.broken:
            self.broken.add(stripe)
            self.how.end(context)


@pytest.mark.parametrize("connections", [2, 3, 8])
@pytest.mark.parametrize("skip_tokens", [0, 5])
def test_receives_on_several_connections(make_client, connections, skip_tokens):
    kv, keeper = make_kv(), FakeKeeper()
    with keeper.running() as target:
        result = make_client(target, connections=connections).prefill(TOKENS, skip_tokens=skip_tokens)
    np.testing.assert_array_equal(result.kv, kv[:, :, :, skip_tokens:])
    assert result.connections == connections
    assert len(keeper.peers) == connections
    stripes = [(reader.stripe_index, reader.stripe_count) for reader in keeper.requests[0].detached.readers]
    assert stripes == [(i, connections) for i in range(connections)]
    assert result.num_chunks == 2 * LAYERS
    assert result.completed.kv_bytes == result.kv.nbytes
    assert sum(keeper.acknowledged.values()) == 2 * LAYERS
    assert keeper.released.is_set()


def test_streams_that_break_go_on(make_client):
    keeper = FakeKeeper(on_chunk=BreakOnce(1))
    with keeper.running() as target:
        result = make_client(target, connections=2).prefill(TOKENS)
    np.testing.assert_array_equal(result.kv, make_kv())
    assert result.resumes == 2
    assert sorted((fetch.part.stripe_index, fetch.from_chunk) for fetch in keeper.fetches) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_nothing_is_lost_where_only_the_stream_of_prefill_breaks(make_client):
    broke = threading.Event()

    class Breaking(FakeKeeper):
        def prefill(self, request, context):
            yield from itertools.islice(super().prefill(request, context), 2)
            wait_until(lambda: len(self.fetches) == 2)
            context.add_callback(broke.set)
            BROKEN.end(context)

    keeper = Breaking(on_chunk=lambda fetch, chunk, context: broke.wait(10))
    with keeper.running() as target:
        result = make_client(target, connections=2).prefill(TOKENS)
    np.testing.assert_array_equal(result.kv, make_kv())


@pytest.mark.parametrize(
    "how, error, code",
    [
        (headstart_error(grpc.StatusCode.ABORTED, "KV_RELEASED"), HeadstartError, grpc.StatusCode.ABORTED),
        (Abort(grpc.StatusCode.INTERNAL, "what"), HeadstartDataLoss, grpc.StatusCode.DATA_LOSS),
    ],
)
def test_the_first_error_ends_all_streams_and_nothing_stays(make_client, how, error, code):
    keeper = FakeKeeper(on_chunk=BreakOnce(2, how))
    with keeper.running() as target:
        with pytest.raises(error) as caught:
            make_client(target, connections=2).prefill(TOKENS)
        assert caught.value.code == code
        assert keeper.released.is_set()


def test_a_wrong_chunk_on_one_stream_is_data_loss(make_client):
    def damage(fetch, chunk, context):
        chunk.crc32c ^= fetch.part.stripe_index

    keeper = FakeKeeper(on_chunk=damage)
    with keeper.running() as target, pytest.raises(HeadstartDataLoss, match="crc32c"):
        make_client(target, connections=3).prefill(TOKENS)
    assert keeper.released.is_set()


def test_the_same_tokens_on_two_streams_are_data_loss(make_client):
    keeper = FakeKeeper()
    keeper.part_of = lambda part: type(part)(stripe_count=part.stripe_count)
    with keeper.running() as target, pytest.raises(HeadstartDataLoss, match="came before"):
        make_client(target, connections=2).prefill(TOKENS)


def test_layers_are_told_one_at_a_time_on_any_number_of_connections(make_client):
    kv, seen, inside = make_kv(), [], threading.Lock()

    def on_layer(layer, layer_kv):
        assert inside.acquire(blocking=False)
        np.testing.assert_array_equal(layer_kv, kv[layer])
        seen.append(layer)
        inside.release()

    with FakeKeeper().running() as target:
        make_client(target, connections=4).prefill(TOKENS, on_layer=on_layer)
    assert sorted(seen) == list(range(LAYERS))


PARTS = {
    "layers": (Part(layer_begin=1, layer_count=2), np.s_[1:3]),
    "the last layers": (Part(layer_begin=2), np.s_[2:]),
    "a head": (Part(kv_head_begin=1, kv_head_count=1), np.s_[:, :, 1:2]),
    "a head of a layer": (Part(0, 1, 0, 1), np.s_[:1, :, :1]),
    "everything": (Part(), np.s_[:]),
}


@pytest.mark.parametrize("num_stripes", [1, 2])
@pytest.mark.parametrize("part, index", PARTS.values(), ids=PARTS.keys())
def test_fetches_parts_of_what_another_call_prefilled(make_client, part, index, num_stripes):
    kv, keeper, accepted = make_kv(), FakeKeeper(), []
    with keeper.running() as target:
        client = make_client(target)
        whole = client.prefill_detached(TOKENS, accepted.append, readers=part.stripes(num_stripes), lease_s=2.5)
        assert whole.kv is None and whole.first_token_id == 42
        layers = []
        result = client.fetch(accepted[0], part, num_stripes=num_stripes, on_layer=lambda layer, _: layers.append(layer))
        np.testing.assert_array_equal(result.kv, kv[index])
        assert sorted(layers) == list(range(LAYERS))[part.layer_begin :][: part.layer_count or None]
        assert result.first_token_id == 42
        assert not keeper.released.is_set()
        assert client.renew_lease(accepted[0]) == 1.5
        client.release_kv(accepted[0])
        assert keeper.released.is_set()
    assert keeper.requests[0].detached.lease.ToMilliseconds() == 2500
    assert len(keeper.requests[0].detached.readers) == num_stripes


def test_fetch_knows_what_was_skipped(make_client):
    keeper, accepted = FakeKeeper(), []
    with keeper.running() as target:
        client = make_client(target)
        client.prefill_detached(TOKENS, accepted.append, skip_tokens=5)
        result = client.fetch(accepted[0])
    np.testing.assert_array_equal(result.kv, make_kv()[:, :, :, 5:])


def test_a_part_outside_of_the_model_is_refused(make_client):
    keeper, accepted = FakeKeeper(), []
    with keeper.running() as target:
        client = make_client(target)
        client.prefill_detached(TOKENS, accepted.append)
        with pytest.raises(HeadstartError, match="part") as caught:
            client.fetch(accepted[0], Part(kv_head_begin=KV_HEADS))
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_id_is_not_found(make_client):
    with FakeKeeper().running() as target, pytest.raises(HeadstartError) as caught:
        make_client(target).fetch(KvLocation(b"x" * 16))
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_FETCH_ID")


@pytest.mark.parametrize("connections", [1, 2])
def test_cancel_from_another_thread_ends_the_call_and_nothing_stays(make_client, connections):
    token, hangs = CancelToken(), threading.Event()

    def hang(fetch, chunk, context):
        hangs.set()
        wait_until(lambda: not context.is_active())

    keeper = FakeKeeper(on_chunk=hang)
    with keeper.running() as target:
        canceller = threading.Thread(target=lambda: hangs.wait(10) and token.cancel())
        canceller.start()
        client = make_client(target, connections=connections)
        with pytest.raises(HeadstartError) as caught:
            if connections > 1:
                client.prefill(TOKENS, cancel=token)
            else:
                client.prefill_detached(TOKENS, lambda location: None)
                client.fetch(KvLocation(FakeKeeper.FETCH_ID), cancel=token)
        canceller.join()
        assert caught.value.code == grpc.StatusCode.CANCELLED
        assert keeper.released.is_set() == (connections > 1)
        with pytest.raises(HeadstartError, match="CANCELLED"):
            client.prefill(TOKENS, cancel=token)


@pytest.mark.parametrize("connections", [1, 3])
def test_ctrl_c_ends_a_call_and_all_that_writes(make_client, connections):
    interrupted = threading.Event()

    def interrupt_main(fetch, chunk, context):
        if not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        wait_until(lambda: not context.is_active())

    keeper = FakeKeeper(on_chunk=interrupt_main)
    with keeper.running() as target, pytest.raises(KeyboardInterrupt):
        client = make_client(target, connections=connections)
        client.prefill_detached(TOKENS, lambda location: None)
        client.fetch(KvLocation(FakeKeeper.FETCH_ID), num_stripes=connections)
    # A thread that has written its last is in this list a moment longer.
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("headstart")])


# ------------------------------------------------------------------------------------------------- where it is fetched from


def test_fetches_where_the_server_says(make_client):
    front, back = FakeKeeper(), FakeKeeper()
    with back.running() as back_target, front.running() as target:
        front.fetch_address = back_target
        result = make_client(target, connections=2).prefill(TOKENS)
    np.testing.assert_array_equal(result.kv, make_kv())
    assert len(back.peers) == 2 and not front.peers
    assert back.released.is_set()


@pytest.mark.parametrize(
    "address, error, code",
    [
        ("example.com:1", HeadstartError, grpc.StatusCode.PERMISSION_DENIED),
        ("127.0.0.1", HeadstartDataLoss, grpc.StatusCode.DATA_LOSS),
        ("127.0.0.1:0", HeadstartDataLoss, grpc.StatusCode.DATA_LOSS),
        ("unix:/tmp/x", HeadstartDataLoss, grpc.StatusCode.DATA_LOSS),
    ],
)
def test_other_hosts_and_what_is_no_address_are_refused(make_client, address, error, code):
    keeper = FakeKeeper(fetch_address=address)
    with keeper.running() as target, pytest.raises(error, match="fetch") as caught:
        make_client(target, connections=2).prefill(TOKENS)
    assert caught.value.code == code


def test_other_hosts_may_be_allowed(make_client):
    front, back = FakeKeeper(), FakeKeeper()
    with back.running() as back_target, front.running() as target:
        front.fetch_address = back_target.replace("127.0.0.1", "localhost")
        client = make_client(target, connections=2, allowed_fetch_hosts=["LocalHost"])
        np.testing.assert_array_equal(client.prefill(TOKENS).kv, make_kv())
