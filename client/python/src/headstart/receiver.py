"""Checks the response stream of one prompt against the wire format and puts its KV into one array.

Nothing in the stream is trusted: order, gaps, duplicates, sizes, totals, checksums, token hash. Every departure raises
HeadstartDataLoss, and no memory is taken for a size that was not checked.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import google_crc32c
import grpc
import numpy as np

from headstart.errors import HeadstartDataLoss, HeadstartError
from headstart.v1 import prefill_pb2 as pb

MAX_LAYERS = 1024
MAX_KV_HEADS = 1024
MAX_HEAD_DIM = 1 << 16
MAX_TOKENS = (1 << 31) - 1

KV_DTYPES = {
    pb.KV_DTYPE_BF16: ("bf16", np.dtype("<u2")),
    pb.KV_DTYPE_F16: ("f16", np.dtype("<f2")),
    pb.KV_DTYPE_F32: ("f32", np.dtype("<f4")),
}

# Called when all heads and tokens of a layer have arrived: layer number, its [2][kv_heads][tokens][head_dim].
OnLayer = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What the receiver knows of its own model. Empty and zero: anything will do."""

    model: str = ""
    model_hash: str = ""
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0


class KvReceiver:
    """Takes the messages of one stream in order; `completed` is set after the last."""

    def __init__(
        self,
        request: pb.PrefillRequest,
        token_hash: bytes,
        expected: Expectation,
        max_kv_bytes: int,
        on_layer: OnLayer | None,
    ) -> None:
        self._request = request
        self._token_hash = token_hash
        self._expected = expected
        self._max_kv_bytes = max_kv_bytes
        self._on_layer = on_layer
        self.accepted: pb.Accepted | None = None
        self.manifest: pb.KvManifest | None = None
        self.completed: pb.Completed | None = None
        self.num_chunks = 0
        self.kv = np.empty(0)
        self._next_token = np.empty(0)  # [layers][kv_heads]: where a head's KV goes on

    def on_message(self, response: pb.PrefillResponse) -> str:
        """Takes one message and returns the name of its event."""
        event = response.WhichOneof("event")
        if event is None:
            raise HeadstartDataLoss("a message without an event that is known here")
        _check(self.completed is None, f"{event} came after `completed`")
        getattr(self, f"_on_{event}")(getattr(response, event))
        return event

    def on_end(self) -> None:
        """The stream ended with status OK."""
        _check(self.completed is not None, f"the stream ended without `completed`, after {self.num_chunks} chunks")

    def _on_accepted(self, accepted: pb.Accepted) -> None:
        _check(self.accepted is None, "`accepted` came twice")
        wanted = self._request.request_id
        _check_equal("accepted: request_id", accepted.request_id, wanted or accepted.request_id)
        self.accepted = accepted

    def _on_manifest(self, manifest: pb.KvManifest) -> None:
        _check(self.accepted is not None and self.manifest is None, "`manifest` came out of order")
        _check_layout(manifest)
        self._check_expectation(manifest)
        layout = manifest.layout
        shape = (layout.num_layers, 2, layout.num_kv_heads, manifest.num_tokens, layout.head_dim)
        dtype = KV_DTYPES[layout.dtype][1]
        kv_bytes = dtype.itemsize * int(np.prod(shape, dtype=object))
        if kv_bytes > self._max_kv_bytes:
            raise HeadstartError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"KV of {kv_bytes} bytes is more than max_kv_bytes={self._max_kv_bytes}"
            )
        self.manifest = manifest
        self.kv = np.empty(shape, dtype)
        self._next_token = np.zeros((layout.num_layers, layout.num_kv_heads), np.int64)

    def _check_expectation(self, manifest: pb.KvManifest) -> None:
        layout, expected = manifest.layout, self._expected
        _check_equal("manifest: num_tokens", manifest.num_tokens, len(self._request.token_ids))
        _check_equal("manifest: token_hash", manifest.token_hash.hex(), self._token_hash.hex())
        for name, got, wanted in (
            ("model", manifest.model, expected.model or self._request.model),
            ("model_hash", manifest.model_hash, expected.model_hash),
            ("num_layers", layout.num_layers, expected.num_layers),
            ("num_kv_heads", layout.num_kv_heads, expected.num_kv_heads),
            ("head_dim", layout.head_dim, expected.head_dim),
            ("dtype", layout.dtype, self._request.kv_dtype),
        ):
            if wanted:
                _check_equal(f"manifest: {name}", got, wanted)
        if self._request.attention.preset == pb.ATTENTION_PRESET_EXACT:
            dense = pb.AttentionProvenance.ALGORITHM_DENSE
            _check_equal("manifest: attention algorithm", manifest.attention.algorithm, dense)

    def _on_chunk(self, chunk: pb.KvChunk) -> None:
        _check(self.manifest is not None, "`chunk` came out of order")
        self._check_chunk(chunk)
        heads = slice(chunk.kv_head_begin, chunk.kv_head_begin + chunk.kv_head_count)
        tokens = slice(chunk.token_begin, chunk.token_begin + chunk.token_count)
        target = self.kv[chunk.layer, :, heads, tokens]
        target[...] = np.frombuffer(chunk.data, self.kv.dtype).reshape(target.shape)
        self.num_chunks += 1
        next_token = self._next_token[chunk.layer]
        next_token[heads] = tokens.stop
        if self._on_layer is not None and (next_token == self.kv.shape[3]).all():
            self._on_layer(chunk.layer, self.kv[chunk.layer])

    def _check_chunk(self, chunk: pb.KvChunk) -> None:
        num_layers, _, num_heads, num_tokens, head_dim = self.kv.shape
        where = f"chunk {chunk.index} (layer {chunk.layer}, tokens from {chunk.token_begin}): "
        token_end = chunk.token_begin + chunk.token_count
        head_end = chunk.kv_head_begin + chunk.kv_head_count
        block = self.manifest.layout.block_tokens
        _check_equal(where + "index", chunk.index, self.num_chunks)
        _check(chunk.layer < num_layers, f"{where}only {num_layers} layers")
        _check(chunk.kv_head_count > 0 and head_end <= num_heads, f"{where}heads up to {head_end} of {num_heads}")
        _check(chunk.token_count > 0 and token_end <= num_tokens, f"{where}tokens up to {token_end} of {num_tokens}")
        in_blocks = chunk.token_begin % block == 0 and (token_end % block == 0 or token_end == num_tokens)
        _check(in_blocks, f"{where}tokens up to {token_end} are not whole blocks of {block}")
        next_token = self._next_token[chunk.layer, chunk.kv_head_begin : head_end]
        _check((next_token == chunk.token_begin).all(), f"{where}the layer goes on at token {next_token.tolist()}")
        num_bytes = 2 * chunk.kv_head_count * chunk.token_count * head_dim * self.kv.itemsize
        _check_equal(where + "bytes of data", len(chunk.data), num_bytes)
        _check_equal(where + "crc32c", chunk.crc32c, chunk_crc32c(chunk))

    def _on_completed(self, completed: pb.Completed) -> None:
        _check(self.manifest is not None, "`completed` came out of order")
        whole = bool((self._next_token == self.kv.shape[3]).all())
        _check(whole, f"completed after {self.num_chunks} chunks, which do not cover the prompt")
        _check_equal("completed: num_chunks", completed.num_chunks, self.num_chunks)
        _check_equal("completed: kv_bytes", completed.kv_bytes, self.kv.nbytes)
        _check(completed.HasField("first_token"), "completed: no first_token")
        self._check_final_manifest(completed.manifest)
        _check_equal("completed: crc32c", completed.crc32c, completed_crc32c(completed))
        self.manifest = completed.manifest
        self.completed = completed

    def _check_final_manifest(self, manifest: pb.KvManifest) -> None:
        density = manifest.layer_density
        _check_equal("completed: values of layer_density", len(density), self.kv.shape[0])
        _check(all(0 < d <= 1 for d in density), "completed: layer_density is not in (0, 1]")
        same = pb.KvManifest()
        same.CopyFrom(self.manifest)
        del same.layer_density[:]
        same.layer_density.extend(density)
        _check(same == manifest, "completed: the manifest is not the one that the stream began with")


def chunk_crc32c(chunk: pb.KvChunk) -> int:
    """The checksum of a chunk: CRC-32C of six little-endian uint32 and the data."""
    header = struct.pack(
        "<6I",
        chunk.index,
        chunk.layer,
        chunk.token_begin,
        chunk.token_count,
        chunk.kv_head_begin,
        chunk.kv_head_count,
    )
    return google_crc32c.extend(google_crc32c.value(header), chunk.data)


def completed_crc32c(completed: pb.Completed) -> int:
    """The checksum of the completion: CRC-32C of the first token, the counts and the densities."""
    density = completed.manifest.layer_density
    numbers = struct.pack(
        f"<IfIIQQQ{len(density)}f",
        completed.first_token.id,
        completed.first_token.logprob,
        completed.num_chunks,
        completed.statistics.dense_fallbacks,
        completed.kv_bytes,
        completed.statistics.executed_blocks,
        completed.statistics.causal_blocks,
        *density,
    )
    return google_crc32c.value(numbers)


def _check_layout(manifest: pb.KvManifest) -> None:
    layout = manifest.layout
    for name, value, limit in (
        ("num_layers", layout.num_layers, MAX_LAYERS),
        ("num_kv_heads", layout.num_kv_heads, MAX_KV_HEADS),
        ("head_dim", layout.head_dim, MAX_HEAD_DIM),
        ("block_tokens", layout.block_tokens, MAX_TOKENS),
        ("num_tokens", manifest.num_tokens, MAX_TOKENS),
    ):
        _check(1 <= value <= limit, f"manifest: {name}={value} is not in [1, {limit}]")
    _check(layout.dtype in KV_DTYPES, f"manifest: dtype={layout.dtype} is unknown")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise HeadstartDataLoss(message)


def _check_equal(what: str, got: object, expected: object) -> None:
    _check(got == expected, f"{what}={got}, expected {expected}")
