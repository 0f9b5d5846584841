"""The KV of a prompt, or of a part of it, as it comes together from the streams that carry it (the pure receiver)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import numpy as np

from headstart.errors import HeadstartDataLoss, HeadstartError
from headstart.kv_memory import KvPlanes, KvShape
from headstart.prefix import AskedPrefix, check_cached_prefix, check_prefix
from headstart.result import duration_s
from headstart.sink import KV_DTYPES, KvSink, dtype_of_values
from headstart.v1 import prefill_pb2 as pb

MAX_LAYERS = 1024
MAX_KV_HEADS = 1024
MAX_HEAD_DIM = 1 << 16
MAX_TOKENS = (1 << 31) - 1


class KvAssembly:
    """Thread-safe: streams write to different places at the same time, and meet here. Of every stream on_manifest comes first.

    `part` says which layers and heads the streams carry together. `asked` is what the request said of the prompt's start.
    """

    def __init__(self, sink: KvSink, part: pb.KvPart, asked: AskedPrefix = AskedPrefix()) -> None:
        self.sink = sink
        self.part = pb.KvPart()  # its layers and heads, once the manifest has come as ranges that are not empty
        self.part.CopyFrom(part)
        self.shape: KvShape | None = None
        self.planes: KvPlanes | None = None  # where no KV comes
        self.completed: pb.Completed | None = None
        self.times: dict[str, float] = {}  # of manifest, first_chunk, last_chunk, completed
        self.num_chunks = 0
        self.kv_bytes = 0
        self._asked = asked
        self._lock = threading.Lock()
        self._failure: Exception | None = None  # of a callback: none is called again
        self._manifest: pb.KvManifest | None = None
        self._claimed = np.empty((0, 0), bool)  # [layers][pages of the wire]
        self._layer_tokens = np.empty(0, np.int64)  # in place

    def on_manifest(self, manifest: pb.KvManifest) -> None:
        with self._lock:
            self._check_failure()
            if self._manifest is None:
                self._call_back(lambda: self._take_manifest(manifest))
            check(manifest == self._manifest, "manifest: not the one of another stream of the same prompt")

    def _take_manifest(self, manifest: pb.KvManifest) -> None:
        _check_layout(manifest)
        dense = manifest.attention.algorithm == pb.AttentionProvenance.ALGORITHM_DENSE
        check(dense or not self._asked.dense, "manifest: attention algorithm is not dense, which the request asked for")
        self._fill_part(manifest.layout)
        check_prefix(manifest, self._asked)
        shape = KvShape(
            num_layers=self.part.layer_count,
            num_kv_heads=self.part.kv_head_count,
            num_tokens=manifest.num_tokens - manifest.skip_tokens,
            head_dim=manifest.layout.head_dim,
            dtype=dtype_of_values(manifest.layout),
            token_begin=manifest.skip_tokens,
            block_tokens=manifest.layout.block_tokens,
            is_fp8=manifest.layout.dtype == pb.KV_DTYPE_FP8_E4M3,
        )
        self.planes = self.sink.on_manifest(manifest, shape, self.part.layer_begin)
        self._claimed = np.zeros((shape.num_layers, self._page_of(shape, shape.token_end - 1) + 1), bool)
        self._layer_tokens = np.zeros(shape.num_layers, np.int64)
        self.shape = shape
        self._manifest = manifest
        self.times["manifest"] = time.monotonic()

    def _fill_part(self, layout: pb.KvLayout) -> None:
        """Counts of 0 become what they mean."""
        part = self.part
        part.layer_count = part.layer_count or max(0, layout.num_layers - part.layer_begin)
        part.kv_head_count = part.kv_head_count or max(0, layout.num_kv_heads - part.kv_head_begin)
        layer_end, head_end = part.layer_begin + part.layer_count, part.kv_head_begin + part.kv_head_count
        if not (part.layer_begin < layer_end <= layout.num_layers and part.kv_head_begin < head_end <= layout.num_kv_heads):
            what = f"part: layers up to {layer_end} of {layout.num_layers}, heads up to {head_end} of {layout.num_kv_heads}"
            raise HeadstartError(grpc.StatusCode.INVALID_ARGUMENT, what)

    @staticmethod
    def _page_of(shape: KvShape, token: int) -> int:
        return token // shape.block_tokens - shape.token_begin // shape.block_tokens

    def claim(self, layer: int, token_begin: int, token_end: int) -> None:
        """Before a chunk is written: its tokens, whole pages, must not have come on any stream."""
        pages = slice(self._page_of(self.shape, token_begin), self._page_of(self.shape, token_end - 1) + 1)
        with self._lock:
            claimed = self._claimed[layer, pages]
            check(not claimed.any(), f"some of its tokens, to {token_end}, came before")
            claimed[:] = True

    def commit(self, layer: int, token_count: int, num_bytes: int) -> None:
        """A chunk was written, and its checksum is right."""
        with self._lock:
            self.times["last_chunk"] = time.monotonic()
            self.times.setdefault("first_chunk", self.times["last_chunk"])
            self.num_chunks += 1
            self.kv_bytes += num_bytes
            self._layer_tokens[layer] += token_count
            if self._layer_tokens[layer] == self.shape.num_tokens:
                self._call_back(lambda: self.sink.on_layer(self.part.layer_begin + layer))

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _call_back(self, call: Callable[[], None]) -> None:
        self._check_failure()
        try:
            call()
        except Exception as error:
            self._failure = error
            raise

    def on_completed(self, completed: pb.Completed) -> None:
        """The first completion is checked against the manifest; all others must say the same of the prompt."""
        with self._lock:
            check(completed.HasField("first_token"), "completed: no first_token")
            self._check_final_manifest(completed.manifest)
            before = self.completed
            if before is not None:
                same = completed.first_token == before.first_token and completed.manifest == before.manifest
                check(same, "completed: not what another stream of the same prompt says")
            if before is None or _total_s(completed) > _total_s(before):
                self.completed = completed
            self.times["completed"] = time.monotonic()

    def _check_final_manifest(self, manifest: pb.KvManifest) -> None:
        density, num_layers = manifest.layer_density, manifest.layout.num_layers
        check(len(density) == num_layers, f"completed: layer_density has {len(density)} values for {num_layers} layers")
        check(all(0 < d <= 1 for d in density), "completed: layer_density is not in (0, 1]")
        check_cached_prefix(manifest, self._asked)
        before = pb.KvManifest()
        before.CopyFrom(manifest)
        for name in ("layer_density", "cached_tokens", "cached_algorithm", "page_hashes"):
            before.ClearField(name)
        check(before == self._manifest, "completed: the manifest is not the one that the stream began with")

    def check_whole(self) -> None:
        """After all streams ended well: nothing is missing."""
        check(self.completed is not None, "all streams ended, none with `completed`")
        wanted = self.shape.num_layers * self.shape.wire_bytes(self.shape.token_begin, self.shape.token_end)
        check(self.kv_bytes == wanted, f"completed after {self.kv_bytes} of {wanted} KV bytes")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise HeadstartDataLoss(message)


def after_chunks(error: HeadstartError, num_chunks: int) -> HeadstartError:
    """A stream that had begun to deliver and was then ended by anything but the server's own word, the caller or the clock is
    broken: what came is incomplete, and nobody vouches for it."""
    vouched = error.reason or error.code.name in ("CANCELLED", "DEADLINE_EXCEEDED")
    if vouched or num_chunks == 0:
        return error
    return HeadstartDataLoss(f"the stream broke after {num_chunks} chunks: {error}")


def _total_s(completed: pb.Completed) -> float:
    return duration_s(completed.statistics.total)


def _check_layout(manifest: pb.KvManifest) -> None:
    layout = manifest.layout
    for name, value, limit in (
        ("num_layers", layout.num_layers, MAX_LAYERS),
        ("num_kv_heads", layout.num_kv_heads, MAX_KV_HEADS),
        ("head_dim", layout.head_dim, MAX_HEAD_DIM),
        ("block_tokens", layout.block_tokens, MAX_TOKENS),
        ("num_tokens", manifest.num_tokens, MAX_TOKENS),
    ):
        check(1 <= value <= limit, f"manifest: {name}={value} is not in [1, {limit}]")
    check(layout.dtype in KV_DTYPES, f"manifest: dtype={layout.dtype} is unknown")
