"""Prefix cache and load in the Python client: pages that are held, pages that are cached, their names, estimates."""

import dataclasses
import hashlib
import pickle
import struct

import grpc
import numpy as np
import pytest
from headstart import Estimate, HeadstartDataLoss, HeadstartError
from headstart.v1 import prefill_pb2 as pb

from fake_server import TOKENS, FakeKeeper, FakeServer, change_completed, headstart_error, make_kv, make_page_names, make_stream

DENSE, SPARSE = pb.AttentionProvenance.ALGORITHM_DENSE, pb.AttentionProvenance.ALGORITHM_PROXY_ATTN


def named_stream(skip_tokens=0, salt=b"salt", kv=None):
    """A right stream of a server that names the prompt's two whole pages."""
    stream = make_stream(kv, skip_tokens=skip_tokens)
    stream[1].manifest.cache_root.salt = salt

    def name(completed):
        completed.manifest.cache_root.salt = salt
        completed.manifest.page_hashes = b"".join(make_page_names(stream[1].manifest))

    return change_completed(stream, name)


def change_manifests(stream, change):
    change(stream[1].manifest)
    return change_completed(stream, lambda completed: change(completed.manifest))


# ---- what is asked for


def test_sends_priority_salt_reuse_and_held_pages(prefill):
    names = make_page_names(named_stream(salt=b"t")[1].manifest)
    _, server = prefill(
        named_stream(salt=b"t"), priority=-3, cache_salt="t", held_pages=names, attention="fast"
    )
    request = server.requests[0]
    assert (request.priority, request.cache_salt, request.held_pages) == (-3, b"t", b"".join(names))
    assert request.prefix_reuse == pb.PREFIX_REUSE_SAME_ATTENTION


@pytest.mark.parametrize("name, value", [("dense", pb.PREFIX_REUSE_DENSE), ("none", pb.PREFIX_REUSE_NONE)])
def test_names_of_prefix_reuse(prefill, name, value):
    _, server = prefill(make_stream(), prefix_reuse=name)
    assert server.requests[0].prefix_reuse == value


@pytest.mark.parametrize(
    "options, what",
    [
        ({"priority": 101}, "priority=101"),
        ({"priority": -101}, "priority=-101"),
        ({"prefix_reuse": "sparse"}, "prefix_reuse='sparse'"),
        ({"held_pages": [b"short"]}, "held_pages: b'short'"),
        ({"held_pages": b"x" * 16}, "held_pages: 120"),
    ],
)
def test_refuses_what_no_server_can_mean(make_client, options, what):
    with pytest.raises(ValueError, match=what):
        make_client("127.0.0.1:1").prefill(TOKENS, **options)


# ---- what comes back


def test_tells_what_was_predicted_cached_and_named(prefill):
    stream = named_stream()
    stream[0].accepted.predicted_ttft.FromMilliseconds(750)

    def cached(completed):
        completed.manifest.cached_tokens = 8
        completed.manifest.cached_algorithm = DENSE
        completed.statistics.gave_way.FromMilliseconds(250)

    result, _ = prefill(change_completed(stream, cached))
    assert result.predicted_ttft_s == pytest.approx(0.75)
    assert (result.cached_tokens, result.cached_algorithm, result.skip_tokens) == (8, "dense", 0)
    assert result.page_names == make_page_names(stream[1].manifest)
    assert result.statistics.gave_way_s == pytest.approx(0.25)


def test_a_server_that_says_nothing_of_it(prefill):
    result, _ = prefill(make_stream())
    assert result.predicted_ttft_s is None
    assert (result.cached_tokens, result.cached_algorithm, result.page_names) == (0, "", [])


def test_names_are_those_of_the_wire_format():
    manifest = named_stream()[1].manifest
    root = b"headstart.v1.page\0" + b"ab" * 32 + b"\0" + b"\x0a\x04salt"
    first = hashlib.sha256(hashlib.sha256(root).digest()[:16] + struct.pack("<4I", *TOKENS[:4])).digest()[:16]
    second = hashlib.sha256(first + struct.pack("<4I", *TOKENS[4:8])).digest()[:16]
    assert make_page_names(manifest) == [first, second]


# ---- held pages


def test_receives_what_is_behind_held_pages(prefill):
    kv, names = make_kv(), make_page_names(named_stream()[1].manifest)
    result, _ = prefill(named_stream(skip_tokens=8, kv=kv), held_pages=reversed(names))
    assert result.skip_tokens == 8
    np.testing.assert_array_equal(result.kv, kv[:, :, :, 8:])


@pytest.mark.parametrize("skip_tokens, held", [(8, [0]), (4, [1]), (4, []), (5, [0])])
def test_refuses_to_miss_what_is_not_held(prefill, skip_tokens, held):
    names = make_page_names(named_stream()[1].manifest)
    with pytest.raises(HeadstartDataLoss, match=f"skip_tokens={skip_tokens}"):
        prefill(named_stream(skip_tokens=skip_tokens), held_pages=[names[i] for i in held])


def test_refuses_tokens_that_were_skipped(prefill):
    with pytest.raises(HeadstartDataLoss, match="skip_tokens=4, the request skips 5"):
        prefill(named_stream(skip_tokens=4), skip_tokens=5)


def test_ranks_fetch_what_is_behind_held_pages(make_client):
    names = make_page_names(named_stream()[1].manifest)
    keeper, accepted = FakeKeeper(), []
    keeper.manifest.cache_root.salt = b"salt"
    keeper.manifest.skip_tokens = 8
    with keeper.running() as target:
        client = make_client(target)
        client.prefill_detached(TOKENS, accepted.append, held_pages=names)
        location = pickle.loads(pickle.dumps(accepted[0]))  # goes to another process
        np.testing.assert_array_equal(client.fetch(location).kv, make_kv()[:, :, :, 8:])
        with pytest.raises(HeadstartDataLoss, match="held up to token 4"):
            client.fetch(dataclasses.replace(location, held_pages=names[0]))


# ---- what a server may say


@pytest.mark.parametrize(
    "options, root, what",
    [
        ({"cache_salt": b"mine"}, pb.CacheRoot(salt=b"other"), "another salt"),
        ({"prefix_reuse": "none"}, pb.CacheRoot(), "no cached prefix"),
        ({"prefix_reuse": "dense"}, pb.CacheRoot(attention=pb.AttentionOptions(stride=4)), "sparse attention"),
    ],
)
def test_refuses_a_root_that_was_not_asked_for(prefill, options, root, what):
    stream = change_manifests(make_stream(), lambda manifest: manifest.cache_root.CopyFrom(root))
    with pytest.raises(HeadstartDataLoss, match=what):
        prefill(stream, **options)


def final(**fields):
    return lambda completed: completed.manifest.MergeFrom(pb.KvManifest(**fields))


@pytest.mark.parametrize(
    "change, what",
    [
        (final(cached_tokens=len(TOKENS), cached_algorithm=DENSE), "cached_tokens=11 of num_tokens=11"),
        (final(cached_tokens=4, cached_algorithm=SPARSE), "cached_algorithm=2, expected 1"),
        (final(cached_tokens=4), "cached_algorithm=0, expected 1"),
        (final(cached_algorithm=DENSE), "cached_algorithm=1, expected 0"),
        (final(page_hashes=b"x" * 15), "page_hashes has 15 bytes"),
        (final(page_hashes=b"x" * 48), "page_hashes has 48 bytes for 2 pages"),
        (final(page_hashes=b"x" * 32), "not the names"),
        (final(skip_tokens=4), "not the one that the stream began with"),
    ],
)
def test_refuses_an_end_that_makes_no_sense(prefill, change, what):
    with pytest.raises(HeadstartDataLoss, match=what):
        prefill(change_completed(named_stream(), change))


@pytest.mark.parametrize("change", [final(cached_tokens=4, cached_algorithm=DENSE), final(page_hashes=b"x" * 16)])
def test_refuses_a_cache_without_a_root(prefill, change):
    with pytest.raises(HeadstartDataLoss, match="cached_tokens=4|page_hashes has 16 bytes"):
        prefill(change_completed(make_stream(), change))


# ---- estimates and loads


class Oracle(FakeServer):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.questions = []

    def estimate(self, request, context):
        self.questions.append(request)
        if hasattr(self.answer, "end"):
            self.answer.end(context)
        return self.answer

    def handlers(self):
        unary = grpc.unary_unary_rpc_method_handler
        loads = lambda request, context: pb.GetLoadsResponse(accepting=True, queued_tokens=7)
        return {
            **super().handlers(),
            "Estimate": unary(self.estimate, pb.EstimateRequest.FromString, pb.EstimateResponse.SerializeToString),
            "GetLoads": unary(loads, pb.GetLoadsRequest.FromString, pb.GetLoadsResponse.SerializeToString),
        }


def test_estimates(make_client):
    answer = pb.EstimateResponse(cached_tokens=4, queue_requests=2, queue_tokens=300)
    answer.predicted_ttft.FromMilliseconds(750)
    answer.predicted_queue.FromMilliseconds(500)
    answer.predicted_compute.FromMilliseconds(250)
    oracle = Oracle(answer)
    with oracle.running() as target:
        client = make_client(target)
        estimate = client.estimate(TOKENS, attention="fast", priority=5, cache_salt=b"t")
        client.estimate(num_tokens=4096, deadline_s=1.5)
    assert estimate == Estimate("", None, 0.75, 0.5, 0.25, 4, 2, 300)
    assert estimate.accepted
    asked, by_length = oracle.questions
    assert list(asked.request.token_ids) == TOKENS
    assert (asked.request.priority, asked.request.cache_salt) == (5, b"t")
    assert asked.deadline.ToMilliseconds() == 20_000, "the client's timeout"
    assert (by_length.num_tokens, by_length.deadline.ToMilliseconds()) == (4096, 1500)


def test_a_refusal_is_an_answer(make_client):
    answer = pb.EstimateResponse(refusal=pb.ERROR_REASON_QUEUE_FULL)
    answer.retry_after.FromMilliseconds(1500)
    with Oracle(answer).running() as target:
        estimate = make_client(target).estimate(num_tokens=5)
    assert (estimate.accepted, estimate.refusal, estimate.retry_after_s) == (False, "QUEUE_FULL", 1.5)
    assert (estimate.predicted_ttft_s, estimate.predicted_queue_s, estimate.predicted_compute_s) == (None, None, None)


def test_a_reason_of_a_later_version_has_a_number(make_client):
    with Oracle(pb.EstimateResponse(refusal=999)).running() as target:
        assert make_client(target).estimate(num_tokens=5).refusal == "999"


def test_an_estimate_of_a_bad_request_is_an_error(make_client):
    error = headstart_error(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    with Oracle(error).running() as target, pytest.raises(HeadstartError) as caught:
        make_client(target).estimate(num_tokens=5)
    assert caught.value.reason == "INVALID_FIELD"
    with pytest.raises(ValueError, match="deadline_s=0"):
        make_client("127.0.0.1:1").estimate(num_tokens=5, deadline_s=0)


def test_asks_for_loads(make_client):
    with Oracle(pb.EstimateResponse()).running() as target:
        loads = make_client(target).loads()
    assert (loads.accepting, loads.queued_tokens) == (True, 7)
