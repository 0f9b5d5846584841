"""For tests of headstart_vllm: a server that keeps KV, and vLLM's engine, both fakes."""

import threading

import grpc
import numpy as np
import pytest
import torch
from headstart.v1 import prefill_pb2 as pb

from conftest import HAS_NATIVE
from fake_server import HEAD_DIM, KV_HEADS, TOKENS, FakeKeeper, wait_until
from fake_vllm import Engine

LAST = len(TOKENS) - 1  # tokens that are loaded


@pytest.fixture(params=["pure", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="no library given"))])
def receiver(request, monkeypatch):
    monkeypatch.setenv("HEADSTART_NATIVE", "1" if request.param == "native" else "0")
    return request.param


class Keeper(FakeKeeper):
    """Computes densely, and gives estimates. refusal: an Abort that Prefill ends with. hold: a Prefill is accepted, or answers
    its estimate, when it is set."""

    def __init__(self, **options):
        super().__init__(**options)
        self.manifest.attention.algorithm = pb.AttentionProvenance.ALGORITHM_DENSE
        self.refusal = None
        self.estimate_response = pb.EstimateResponse()
        self.hold = threading.Event()
        self.hold.set()
        self.entered, self.ended = threading.Event(), threading.Event()

    def prefill(self, request, context):
        self.entered.set()
        context.add_callback(self.ended.set)
        while not self.hold.wait(0.01):
            if not context.is_active():
                return
        if self.refusal is not None:
            self.refusal.end(context)
        yield from super().prefill(request, context)

    def handlers(self):
        estimate = lambda request, context: self.estimate_response
        handler = grpc.unary_unary_rpc_method_handler(
            estimate, pb.EstimateRequest.FromString, pb.EstimateResponse.SerializeToString
        )
        return {**super().handlers(), "Estimate": handler}


@pytest.fixture
def make_engine():
    """make_engine(target, extra=…, **options of Engine)."""
    engines = []

    def make(target, extra=(), **options):
        engines.append(Engine({"targets": [target], "timeout_s": 20, **dict(extra)}, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


def ask(engine, request, num_computed=0):
    """The connector's answer, once it has one."""
    answers = []

    def has_answer():
        answers.append(engine.scheduler.get_num_new_matched_tokens(request, num_computed))
        return answers[-1][0] is not None

    wait_until(has_answer)
    return answers[-1]


def step_until_finished(engine, request_id="cmpl-1/0"):
    """Blocks that were reported as invalid until then."""
    blocks, finished = set(), set()

    def step():
        done, invalid = engine.step()
        blocks.update(invalid)
        finished.update(done)
        return finished

    wait_until(step)
    assert finished == {request_id}
    return blocks


def load(engine, request, block_ids, num_computed=0):
    count, is_async = ask(engine, request, num_computed)
    assert is_async
    engine.allocate(request, block_ids, count)
    return step_until_finished(engine)


def expect_kv(engine, kv, block_ids, begin=0, ranks=1):
    """All ranks have their heads of tokens [begin, LAST)."""
    values = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).double()
    heads = KV_HEADS // ranks
    for rank in range(ranks):
        for number, layer in enumerate(engine.layers(rank)):
            wanted = values[number, :, rank * heads : (rank + 1) * heads, begin:LAST]
            torch.testing.assert_close(layer.read(block_ids, begin, LAST), wanted, rtol=0, atol=0)


def num_written(engine, rank=0):
    """Tokens in the cache of each layer."""
    return [int((~layer.kv_cache.isnan()).sum()) // (2 * HEAD_DIM * KV_HEADS) for layer in engine.layers(rank)]
