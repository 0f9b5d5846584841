"""A Python gRPC server that plays back prepared streams, for tests of the Python client."""

import concurrent.futures
import contextlib
import hashlib
import threading
import time

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from headstart.wire import check_completion, chunk_crc32c, read_completion
from headstart.v1 import prefill_pb2 as pb

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 3, 2, 8, 4
TOKENS = list(range(10, 21))  # 11 tokens: two whole blocks and a ragged one


def make_kv(dtype=np.uint16, seed=1):
    """Random bits: [layers][2][kv_heads][tokens][head_dim]."""
    shape = (LAYERS, 2, KV_HEADS, len(TOKENS), HEAD_DIM)
    if dtype == np.uint16:
        return np.random.default_rng(seed).integers(0, 0x7F80, shape, dtype=np.uint16)
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Fp8Kv:
    """Random numbers but NaN, [layers][2][kv_heads][tokens][head_dim] uint8, and scales [layers][pages][2][kv_heads]."""

    def __init__(self, seed=1):
        random = np.random.default_rng(seed)
        magnitudes = random.integers(0, 0x7F, (LAYERS, 2, KV_HEADS, len(TOKENS), HEAD_DIM), dtype=np.uint8)
        self.numbers = magnitudes | random.integers(0, 2, magnitudes.shape, dtype=np.uint8) << 7
        self.scales = random.random((LAYERS, -(-len(TOKENS) // BLOCK), 2, KV_HEADS), dtype=np.float32)

    def page(self, layer, heads, begin, end):
        """Bytes of tokens of one page."""
        scales = self.scales[layer, begin // BLOCK, :, slice(*heads)]
        return scales.tobytes() + np.ascontiguousarray(self.numbers[layer, :, slice(*heads), begin:end]).tobytes()

    def values(self, skip_tokens=0):
        """What it stands for, by torch: a float32 tensor."""
        import torch

        scales = torch.from_numpy(self.scales).permute(0, 2, 3, 1).repeat_interleave(BLOCK, -1)[..., : len(TOKENS)]
        numbers = torch.from_numpy(self.numbers).view(torch.float8_e4m3fn).float()
        return (numbers * scales.unsqueeze(-1))[..., skip_tokens:, :]


def make_page_names(manifest):
    """Of the prompt's whole pages, as the wire format says."""
    root = b"headstart.v1.page\0" + manifest.model_hash.encode() + b"\0" + manifest.cache_root.SerializeToString()
    names = [hashlib.sha256(root).digest()[:16]]
    for begin in range(0, len(TOKENS) - BLOCK + 1, BLOCK):
        page = np.asarray(TOKENS[begin : begin + BLOCK], "<u4").tobytes()
        names.append(hashlib.sha256(names[-1] + page).digest()[:16])
    return names[1:]


def make_manifest(dtype=pb.KV_DTYPE_BF16, skip_tokens=0):
    return pb.KvManifest(
        model="fake",
        model_hash="ab" * 32,
        token_hash=hashlib.sha256(np.asarray(TOKENS, "<u4").tobytes()).digest(),
        num_tokens=len(TOKENS),
        skip_tokens=skip_tokens,
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


def chunk_data(kv, layer, token_begin, token_end, heads=(0, KV_HEADS)):
    """Page after page of the wire, each [K, V][kv_heads][tokens of the page][head_dim]."""
    borders = [token_begin, *(t for t in range(token_begin + 1, token_end) if t % BLOCK == 0), token_end]
    pages = zip(borders, borders[1:])
    if isinstance(kv, Fp8Kv):
        return b"".join(kv.page(layer, heads, begin, end) for begin, end in pages)
    return b"".join(np.ascontiguousarray(kv[layer, :, slice(*heads), begin:end]).tobytes() for begin, end in pages)


def make_chunk(kv, index, layer, token_begin, token_count, heads=(0, KV_HEADS)):
    """Of the KV of a whole prompt."""
    chunk = pb.KvChunk(
        index=index,
        layer=layer,
        token_begin=token_begin,
        token_count=token_count,
        kv_head_begin=heads[0],
        kv_head_count=heads[1] - heads[0],
        data=chunk_data(kv, layer, token_begin, token_begin + token_count, heads),
    )
    chunk.crc32c = chunk_crc32c(chunk, chunk.data)
    return chunk


def make_chunks(kv, part=pb.KvPart(), skip_tokens=0, piece=8):
    """Of a part: all layers of tokens [skip, piece), then of the rest, and of these chunks those of the stripe."""
    starts = [skip_tokens, *range(skip_tokens // piece * piece + piece, len(TOKENS), piece)]
    spans = [(begin, end - begin) for begin, end in zip(starts, [*starts[1:], len(TOKENS)])]
    layers = range(part.layer_begin, part.layer_begin + part.layer_count if part.layer_count else LAYERS)
    heads = (part.kv_head_begin, part.kv_head_begin + part.kv_head_count if part.kv_head_count else KV_HEADS)
    places = [(layer, *span) for span in spans for layer in layers]
    mine = places[part.stripe_index :: part.stripe_count or 1]
    return [make_chunk(kv, index, *place, heads) for index, place in enumerate(mine)]


def make_completed(chunks, manifest):
    final = pb.KvManifest()
    final.CopyFrom(manifest)
    final.layer_density.extend([1.0, 0.5, 0.25])
    completed = pb.Completed(
        first_token=pb.FirstToken(id=42, logprob=-0.5),
        manifest=final,
        num_chunks=len(chunks),
        kv_bytes=sum(len(chunk.data) for chunk in chunks),
    )
    completed.statistics.queue.FromMilliseconds(1)
    completed.statistics.attention.FromMilliseconds(20)
    completed.statistics.other_compute.FromMilliseconds(30)
    completed.statistics.total.FromMilliseconds(51)
    completed.statistics.executed_blocks = 30
    completed.statistics.causal_blocks = 60
    return completed


def make_stream(kv=None, dtype=pb.KV_DTYPE_BF16, skip_tokens=0):
    """A whole stream that is right: what the damage tests start from."""
    kv = make_kv() if kv is None else kv
    chunks = make_chunks(kv, skip_tokens=skip_tokens)
    accepted = pb.Accepted(request_id="r1", transfer_params=b"opaque")
    return [pb.PrefillResponse(accepted=accepted), *make_part_stream(chunks, make_manifest(dtype, skip_tokens))]


def make_part_stream(chunks, manifest=None):
    """From the manifest on."""
    manifest = manifest or make_manifest()
    return [
        pb.PrefillResponse(manifest=manifest),
        *(pb.PrefillResponse(chunk=chunk) for chunk in chunks),
        pb.PrefillResponse(completed=check_completion(make_completed(chunks, manifest))),
    ]


def change_completed(stream, change):
    """Changes the completion, whose checksum is right again."""
    completed = read_completion(stream[-1].completed)
    change(completed)
    stream[-1].completed.CopyFrom(check_completion(completed))
    return stream


class Abort:
    """In a script: ends the call with this status and these google.rpc details, or raw bytes in their place."""

    def __init__(self, code, message, details=(), raw_details=b""):
        self.code, self.message, self.details, self.raw_details = code, message, details, raw_details

    def end(self, context):
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        trailer = self.raw_details or (status.SerializeToString() if self.details else b"")
        if trailer:
            context.set_trailing_metadata((("grpc-status-details-bin", trailer),))
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


def play(script, context):
    """PrefillResponses, Aborts, bytes, and what is called with the context."""
    for step in script:
        if isinstance(step, Abort):
            step.end(context)
        elif callable(step):
            step(context)
        else:
            yield step


def serialize(response):
    """Scripts may hold bytes that are no message."""
    return response if isinstance(response, bytes) else response.SerializeToString()


class FakeServer:
    """Answers the n-th Prefill with the n-th script, the last one repeats."""

    def __init__(self, *scripts):
        self.scripts = scripts
        self.requests = []

    def prefill(self, request, context):
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        yield from play(script, context)

    def handlers(self):
        return {
            "Prefill": grpc.unary_stream_rpc_method_handler(self.prefill, pb.PrefillRequest.FromString, serialize)
        }

    @contextlib.contextmanager
    def running(self, address="127.0.0.1:0", credentials=None):
        """Yields the address."""
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(16))
        service = grpc.method_handlers_generic_handler("headstart.v1.PrefillService", self.handlers())
        server.add_generic_rpc_handlers((service,))
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


class FakeKeeper(FakeServer):
    """Keeps the KV of the last prompt, and ships the parts that are asked for.

    on_chunk(fetch, chunk, context): called before a chunk leaves; may abort. Counts acknowledged chunks by stripe.
    """

    FETCH_ID = b"0123456789abcdef"  # of the first prompt; the others count on

    def __init__(self, kv=None, on_chunk=None, fetch_address=""):
        super().__init__()
        self.kv = make_kv() if kv is None else kv
        self.on_chunk = on_chunk or (lambda fetch, chunk, context: None)
        self.fetch_address = fetch_address
        self.part_of = lambda part: part  # what is sent for a part that is asked for
        self.manifest = make_manifest()
        self.fetches = []
        self.acknowledged = {}
        self.peers = set()
        self.kept = {self.FETCH_ID}  # also where another server says that it is here
        self.released = threading.Event()  # the last prompt's KV

    def prefill(self, request, context):
        self.requests.append(request)
        self.manifest.skip_tokens = max(self.manifest.skip_tokens, request.skip_tokens)
        self.released.clear()
        fetch_id = self.FETCH_ID if len(self.requests) == 1 else b"%016d" % len(self.requests)
        self.kept.add(fetch_id)
        accepted = pb.Accepted(request_id=request.request_id, fetch_id=fetch_id, fetch_address=self.fetch_address)
        yield pb.PrefillResponse(accepted=accepted)
        yield from make_part_stream([], self.manifest)

    def fetch_kv(self, requests, context):
        fetch = next(requests).fetch
        if fetch.fetch_id not in self.kept:
            headstart_error(grpc.StatusCode.NOT_FOUND, "UNKNOWN_FETCH_ID").end(context)
        self.fetches.append(fetch)
        self.peers.add(context.peer())
        sent = make_chunks(self.kv, self.part_of(fetch.part), self.manifest.skip_tokens)
        manifest, *chunks, completed = make_part_stream(sent, self.manifest)
        yield manifest
        for response in chunks[fetch.from_chunk :]:
            self.on_chunk(fetch, response.chunk, context)
            yield response
        acknowledged = 0
        while acknowledged < len(chunks):
            acknowledged = next(requests).ack.num_chunks
        self.acknowledged[fetch.part.stripe_index] = acknowledged
        yield completed

    def release_kv(self, request, context):
        self.kept.discard(request.fetch_id)
        if not self.kept:
            self.released.set()
        return pb.ReleaseKvResponse()

    def renew_lease(self, request, context):
        response = pb.RenewLeaseResponse()
        response.lease.FromMilliseconds(1500)
        return response

    def handlers(self):
        unary = grpc.unary_unary_rpc_method_handler
        return {
            **super().handlers(),
            "FetchKv": grpc.stream_stream_rpc_method_handler(self.fetch_kv, pb.FetchKvRequest.FromString, serialize),
            "ReleaseKv": unary(self.release_kv, pb.ReleaseKvRequest.FromString, serialize),
            "RenewLease": unary(self.renew_lease, pb.RenewLeaseRequest.FromString, serialize),
        }


def wait_until(condition, timeout_s=10.0):
    """Polls; fails loudly."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "condition never came true"
        time.sleep(0.005)
