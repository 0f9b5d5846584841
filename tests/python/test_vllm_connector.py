"""headstart_vllm: what becomes of a prompt, with fakes of vLLM and of the server."""

import hashlib
import threading

import grpc
import pytest
from headstart.v1 import prefill_pb2 as pb

from fake_server import LAYERS, TOKENS, headstart_error, wait_until
from fake_vllm import Request
from vllm_testing import LAST, Keeper, ask, expect_kv, load, make_engine, num_written, receiver, step_until_finished


@pytest.mark.parametrize("connections", [1, 2])
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_loads_a_prompt_into_any_blocks(receiver, make_engine, block_size, connections):
    block_ids = [9, 2, 5, 14, 1, 3, 8, 13, 7, 4, 11][: -(-LAST // block_size)]
    keeper, request = Keeper(), Request()
    with keeper.running() as target:
        engine = make_engine(target, {"connections": connections}, block_size=block_size)
        assert load(engine, request, block_ids) == set()
        expect_kv(engine, keeper.kv, block_ids)
        assert num_written(engine) == [LAST] * LAYERS
        wait_until(lambda: not keeper.kept)
        sent = keeper.requests[0]
        assert list(sent.token_ids) == TOKENS and sent.kv_dtype == pb.KV_DTYPE_BF16
        assert sent.attention.preset == pb.ATTENTION_PRESET_EXACT
        assert len(sent.detached.readers) == connections == len(keeper.fetches)
        assert engine.counts["requests", "loaded"] == 1 and engine.counts["tokens", "loaded"] == LAST
        engine.scheduler.request_finished(request, block_ids)
        assert engine.step() == (set(), set())


def test_ranks_fetch_their_heads_of_one_prefill(receiver, make_engine):
    keeper = Keeper()
    with keeper.running() as target:
        engine = make_engine(target, ranks=2)
        assert load(engine, Request(), [3, 1, 2]) == set()
        expect_kv(engine, keeper.kv, [3, 1, 2], ranks=2)
        wait_until(lambda: not keeper.kept)
    assert len(keeper.requests) == 1
    parts = [(reader.kv_head_begin, reader.kv_head_count) for reader in keeper.requests[0].detached.readers]
    assert parts == [(0, 1), (1, 1)] == sorted((f.part.kv_head_begin, f.part.kv_head_count) for f in keeper.fetches)


def test_ranks_that_share_a_head_are_not_announced(receiver, make_engine):
    keeper = Keeper()
    with keeper.running() as target:
        engine = make_engine(target, ranks=4)
        assert load(engine, Request(), [3, 1, 2]) == set()
    assert not keeper.requests[0].detached.readers
    assert sorted(fetch.part.kv_head_begin for fetch in keeper.fetches) == [0, 0, 1, 1]


def test_pages_are_written_before_all_have_come(receiver, make_engine):
    """The last chunk is held back until the first page of all layers is in the cache."""
    seen = threading.Event()

    def hold(fetch, chunk, context):
        if chunk.index == 2 * LAYERS - 1:
            assert seen.wait(10)

    keeper, request = Keeper(on_chunk=hold), Request()
    with keeper.running() as target:
        engine = make_engine(target, block_size=4)
        engine.allocate(request, [3, 1, 2], ask(engine, request)[0])
        wait_until(lambda: engine.step() == (set(), set()) and num_written(engine) == [LAST, LAST, 8])
        seen.set()
        assert step_until_finished(engine) == set()
        expect_kv(engine, keeper.kv, [3, 1, 2])


@pytest.mark.parametrize("here", [4, 8])
def test_tokens_that_are_here_do_not_travel(receiver, make_engine, here):
    keeper = Keeper()
    with keeper.running() as target:
        engine = make_engine(target)
        assert load(engine, Request(), [3, 1, 2], num_computed=here) == set()
        expect_kv(engine, keeper.kv, [3, 1, 2], begin=here)
    assert keeper.requests[0].skip_tokens == here
    assert num_written(engine) == [LAST - here] * LAYERS
    assert engine.counts["tokens", "skipped"] == here


def test_asks_again_when_pages_that_were_skipped_have_gone(receiver, make_engine):
    keeper = Keeper()
    with keeper.running() as target:
        engine, request = make_engine(target), Request()
        assert ask(engine, request, 8) == (LAST - 8, True)
        keeper.manifest.skip_tokens = 0
        assert load(engine, request, [3, 1, 2], num_computed=4) == set()
        expect_kv(engine, keeper.kv, [3, 1, 2], begin=4)
    assert [sent.skip_tokens for sent in keeper.requests] == [8, 4]


def test_more_pages_here_than_when_it_was_asked_are_left_alone(receiver, make_engine):
    keeper = Keeper()
    with keeper.running() as target:
        engine, request = make_engine(target), Request()
        ask(engine, request, 4)
        assert load(engine, request, [3, 1, 2], num_computed=8) == set()
    assert num_written(engine) == [LAST - 8] * LAYERS
    assert len(keeper.requests) == 1


def test_loads_again_after_preemption(receiver, make_engine):
    keeper, request = Keeper(), Request()
    with keeper.running() as target:
        engine = make_engine(target)
        assert load(engine, request, [3, 1, 2]) == set()
        request.num_output_tokens = 5
        count, _ = ask(engine, request)
        assert count == len(TOKENS)  # one of the sequence stays for vLLM
        engine.allocate(request, [4, 5, 6], count)
        assert step_until_finished(engine) == set()
        wait_until(lambda: not keeper.kept)
    assert len(keeper.requests) == 2
    assert keeper.requests[0].request_id != keeper.requests[1].request_id


@pytest.mark.parametrize(
    "what, change",
    [
        ("token_hash", lambda m: setattr(m, "token_hash", hashlib.sha256(b"others").digest())),
        ("layers", lambda m: setattr(m.layout, "num_layers", LAYERS + 1)),
        ("model_hash", lambda m: setattr(m, "model_hash", "cd" * 32)),
        ("theta", lambda m: setattr(m.layout.rope, "theta", 500000.0)),
        ("llama3", lambda m: setattr(m.layout.rope, "type", "llama3")),
    ],
)
def test_refuses_kv_of_something_else(receiver, make_engine, caplog, what, change):
    keeper, request = Keeper(), Request()
    change(keeper.manifest)
    with keeper.running() as target:
        # With this policy it does not matter whether the stream of Prefill or that of the fetch finds it first.
        engine = make_engine(target, {"model_hash": "ab" * 32}, policy="fail")
        assert load(engine, request, [3, 1, 2]) == {3, 1, 2}
        assert what in caplog.text
        assert ask(engine, request) == (0, False)  # no second load
        wait_until(lambda: not keeper.kept)
    assert engine.counts["requests", "failed"] == 1


def test_a_flipped_bit_fails_the_load_and_leaves_shared_blocks_alone(receiver, make_engine, caplog):
    keeper = Keeper(on_chunk=lambda fetch, chunk, context: setattr(chunk, "crc32c", chunk.crc32c ^ 1))
    with keeper.running() as target:
        engine = make_engine(target)
        assert load(engine, Request(), [3, 1, 2], num_computed=4) == {1, 2}
    assert "crc32c" in caplog.text


REFUSALS = [
    headstart_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "queue full", retry_delay_s=1),
    headstart_error(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", "too late"),
    headstart_error(grpc.StatusCode.FAILED_PRECONDITION, "KV_DTYPE_UNAVAILABLE", "no bf16 here"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_is_refused_is_computed_here_without_having_had_blocks(receiver, make_engine, refusal):
    keeper, request = Keeper(), Request()
    keeper.refusal = refusal
    with keeper.running() as target:
        engine = make_engine(target)
        assert ask(engine, request) == ask(engine, request) == (0, False)
        engine.allocate(request, [3, 1, 2], 0)
        assert engine.step() == (set(), set())
    assert engine.counts == {("requests", "here_refused"): 1}


def test_what_is_refused_fails_where_that_is_the_policy(receiver, make_engine, caplog):
    keeper = Keeper()
    keeper.refusal = REFUSALS[0]
    with keeper.running() as target:
        engine = make_engine(target, policy="fail")
        assert load(engine, Request(), [3, 1, 2]) == {3, 1, 2}
    assert "QUEUE_FULL" in caplog.text
    assert engine.counts == {("requests", "failed"): 1}


def test_a_server_that_is_not_there_is_done_without(receiver, make_engine):
    with Keeper().running() as target:
        pass
    assert ask(make_engine(target, {"timeout_s": 5}), Request()) == (0, False)


def test_a_client_that_can_not_be_made_is_no_hang(receiver, make_engine):
    engine = make_engine("127.0.0.1:1", {"tls": {"ca_file": "/there/is/none"}})
    assert ask(engine, Request()) == (0, False)


@pytest.mark.parametrize(
    "response, reason",
    [
        (pb.EstimateResponse(refusal=pb.ERROR_REASON_QUEUE_FULL), "here_would_be_refused_queue_full"),
        ({"predicted_ttft": 3000}, "here_wait_too_long"),
        ({"predicted_ttft": 1000}, None),
        (pb.EstimateResponse(), None),  # the server has not learned how fast it is
    ],
)
def test_an_estimate_decides_where_a_prompt_is_computed(receiver, make_engine, response, reason):
    keeper, request = Keeper(), Request()
    if isinstance(response, dict):
        keeper.estimate_response.predicted_ttft.FromMilliseconds(response["predicted_ttft"])
    else:
        keeper.estimate_response = response
    with keeper.running() as target:
        engine = make_engine(target, {"max_wait_s": 2})
        assert ask(engine, request) == ((LAST, True) if reason is None else (0, False))
        engine.step()
    assert engine.counts == ({} if reason is None else {("requests", reason): 1})
    assert len(keeper.requests) == (reason is None)


def test_an_abort_before_the_answer_ends_the_prefill(receiver, make_engine):
    keeper, request = Keeper(), Request()
    keeper.hold.clear()
    with keeper.running() as target:
        engine = make_engine(target)
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
        assert keeper.entered.wait(10)
        engine.scheduler.request_finished(request, [])
        assert keeper.ended.wait(10)
        engine.step()
    assert engine.counts == {("requests", "aborted"): 1}


def test_an_abort_while_kv_comes_is_reported_once_and_releases_it(receiver, make_engine):
    aborted = threading.Event()
    keeper = Keeper(on_chunk=lambda fetch, chunk, context: aborted.wait(10) if chunk.index == 4 else None)
    request = Request()
    with keeper.running() as target:
        engine = make_engine(target)
        engine.allocate(request, [3, 1, 2], ask(engine, request)[0])
        wait_until(lambda: engine.step() and num_written(engine)[0] > 0)
        engine.scheduler.request_finished(request, [3, 1, 2])
        step_until_finished(engine)
        assert engine.step() == (set(), set())
        aborted.set()
        wait_until(lambda: not keeper.kept)
    assert engine.counts["requests", "aborted"] == 1


def test_loads_at_the_same_time(receiver, make_engine):
    keeper = Keeper()
    requests = {f"r{i}": Request(request_id=f"r{i}") for i in range(5)}
    with keeper.running() as target:
        engine, finished = make_engine(target, num_blocks=32), set()
        for i, request in enumerate(requests.values()):
            engine.allocate(request, [3 * i + 3, 3 * i + 1, 3 * i + 2], ask(engine, request)[0])
        wait_until(lambda: finished.update(engine.step()[0]) or finished == set(requests))
        for i in range(5):
            expect_kv(engine, keeper.kv, [3 * i + 3, 3 * i + 1, 3 * i + 2])
