"""A Python gRPC server that plays back prepared streams, for tests of the Python client."""

import concurrent.futures
import contextlib
import hashlib
import time

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from headstart.receiver import chunk_crc32c, completed_crc32c
from headstart.v1 import prefill_pb2 as pb

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 3, 2, 8, 4
TOKENS = list(range(10, 21))  # 11 tokens: two whole blocks and a ragged one


def make_kv(dtype=np.uint16, seed=1):
    """Random bits: [layers][2][kv_heads][tokens][head_dim]."""
    shape = (LAYERS, 2, KV_HEADS, len(TOKENS), HEAD_DIM)
    if dtype == np.uint16:
        return np.random.default_rng(seed).integers(0, 0x7F80, shape, dtype=np.uint16)
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make_manifest(dtype=pb.KV_DTYPE_BF16):
    return pb.KvManifest(
        model="fake",
        model_hash="ab" * 32,
        token_hash=hashlib.sha256(np.asarray(TOKENS, "<u4").tobytes()).digest(),
        num_tokens=len(TOKENS),
        layout=pb.KvLayout(
            num_layers=LAYERS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            block_tokens=BLOCK,
            rope=pb.RopeInfo(theta=10000.0, type="default", factor=1.0),
        ),
        attention=pb.AttentionProvenance(algorithm=pb.AttentionProvenance.ALGORITHM_PROXY_ATTN),
    )


def make_chunk(kv, index, layer, token_begin, token_count, heads=(0, KV_HEADS)):
    part = kv[layer, :, heads[0] : heads[1], token_begin : token_begin + token_count]
    chunk = pb.KvChunk(
        index=index,
        layer=layer,
        token_begin=token_begin,
        token_count=token_count,
        kv_head_begin=heads[0],
        kv_head_count=heads[1] - heads[0],
        data=np.ascontiguousarray(part).tobytes(),
    )
    chunk.crc32c = chunk_crc32c(chunk)
    return chunk


def make_chunks(kv, prefill_chunk=8):
    """All layers of tokens [0, prefill_chunk), then of the rest: two passes."""
    spans = [(begin, min(prefill_chunk, len(TOKENS) - begin)) for begin in range(0, len(TOKENS), prefill_chunk)]
    places = [(layer, *span) for span in spans for layer in range(LAYERS)]
    return [make_chunk(kv, index, *place) for index, place in enumerate(places)]


def make_completed(kv, chunks, manifest):
    final = pb.KvManifest()
    final.CopyFrom(manifest)
    final.layer_density.extend([1.0, 0.5, 0.25])
    completed = pb.Completed(
        first_token=pb.FirstToken(id=42, logprob=-0.5),
        manifest=final,
        num_chunks=len(chunks),
        kv_bytes=kv.nbytes,
    )
    completed.statistics.queue.FromMilliseconds(1)
    completed.statistics.attention.FromMilliseconds(20)
    completed.statistics.other_compute.FromMilliseconds(30)
    completed.statistics.total.FromMilliseconds(51)
    completed.statistics.executed_blocks = 30
    completed.statistics.causal_blocks = 60
    completed.crc32c = completed_crc32c(completed)
    return completed


def make_stream(kv=None, dtype=pb.KV_DTYPE_BF16):
    """A whole stream that is right: what the damage tests start from."""
    kv = make_kv() if kv is None else kv
    manifest = make_manifest(dtype)
    chunks = make_chunks(kv)
    return [
        pb.PrefillResponse(accepted=pb.Accepted(request_id="r1", transfer_params=b"opaque")),
        pb.PrefillResponse(manifest=manifest),
        *(pb.PrefillResponse(chunk=chunk) for chunk in chunks),
        pb.PrefillResponse(completed=make_completed(kv, chunks, manifest)),
    ]


class Abort:
    """In a script: ends the call with this status and these google.rpc details."""

    def __init__(self, code, message, details=()):
        self.code, self.message, self.details = code, message, details

    def end(self, context):
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        if self.details:
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(self.code, self.message)


def headstart_error(code, reason, message="no", *, retry_delay_s=None, violations=()):
    """As Headstart's server makes it."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="headstart.v1")]
    if retry_delay_s is not None:
        details.append(error_details_pb2.RetryInfo())
        details[-1].retry_delay.FromNanoseconds(int(retry_delay_s * 1e9))
    if violations:
        details.append(error_details_pb2.BadRequest())
        for field, description in violations:
            details[-1].field_violations.add(field=field, description=description)
    return Abort(code, message, details)


class FakeServer:
    """Answers the n-th Prefill with the n-th script: PrefillResponses, or an Abort. The last script repeats."""

    def __init__(self, *scripts):
        self.scripts = scripts
        self.requests = []

    def prefill(self, request, context):
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        for step in script:
            if isinstance(step, Abort):
                step.end(context)
            elif callable(step):
                step(context)
            else:
                yield step

    @contextlib.contextmanager
    def running(self):
        """Yields the address."""
        handler = grpc.method_handlers_generic_handler(
            "headstart.v1.PrefillService",
            {
                "Prefill": grpc.unary_stream_rpc_method_handler(
                    self.prefill, pb.PrefillRequest.FromString, pb.PrefillResponse.SerializeToString
                )
            },
        )
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


def wait_until(condition, timeout_s=10.0):
    """Polls; fails loudly."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "condition never came true"
        time.sleep(0.005)
