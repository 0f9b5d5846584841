"""Checks one response stream against the wire format and puts the KV that it carries into its place.

Nothing in the stream is trusted: order, gaps, duplicates, sizes, totals, checksums, token hash. Every departure raises
HeadstartDataLoss, and no memory is taken for a size that was not checked.
"""

from __future__ import annotations

import enum

import numpy as np

from headstart.assembly import KvAssembly, check
from headstart.v1 import prefill_pb2 as pb
from headstart.wire import Chunk, chunk_crc32c, decode, read_completion


class StreamKind(enum.Enum):
    PREFILL = "accepted, manifest, chunks, completed"
    DETACHED = "of Prefill with detached KV: the same without chunks"
    FETCH = "of FetchKv: manifest, chunks, completed"


class KvReceiver:
    """Takes the messages of one stream in order. `assembly` brings the streams of one prompt together."""

    def __init__(self, kind: StreamKind, assembly: KvAssembly, request_id: str = "") -> None:
        self.accepted: pb.Accepted | None = None
        self.num_chunks = 0
        self.kv_bytes = 0
        self._kind = kind
        self._assembly = assembly
        self._request_id = request_id
        self._may_come: tuple[str, ...] = ("manifest",) if kind is StreamKind.FETCH else ("accepted",)
        self._next_token: np.ndarray | None = None  # by layer: chunks of a stream come in token order

    def on_message(self, message: bytes) -> str:
        """Takes one message and returns the name of its event."""
        event, content = decode(message)
        check(event in self._may_come, f"`{event}` came out of order")
        getattr(self, f"_on_{event}")(content)
        return event

    def on_end(self) -> None:
        """The stream ended with status OK."""
        check(not self._may_come, f"the stream ended without `completed`, after {self.num_chunks} chunks")

    def on_resume(self) -> None:
        """A stream of FetchKv broke: its chunks from num_chunks on come on another one, from the manifest on."""
        self._may_come = ("manifest",)

    def _on_accepted(self, accepted: pb.Accepted) -> None:
        wanted = self._request_id or accepted.request_id
        check(accepted.request_id == wanted, f"accepted: request_id={accepted.request_id}, expected {wanted}")
        if self._kind is StreamKind.DETACHED:
            size = len(accepted.fetch_id)
            check(size == 16, f"accepted: fetch_id has {size} bytes, not 16")
        self.accepted = accepted
        self._may_come = ("manifest",)
        if self._assembly.sink.on_accepted is not None:
            self._assembly.sink.on_accepted(accepted)

    def _on_manifest(self, manifest: pb.KvManifest) -> None:
        self._assembly.on_manifest(manifest)
        shape = self._assembly.shape
        if self._next_token is None:
            self._next_token = np.full(shape.num_layers, shape.token_begin, np.int64)
        self._may_come = ("completed",) if self._kind is StreamKind.DETACHED else ("chunk", "completed")

    def _on_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        where = f"chunk {header.index} (layer {header.layer}, tokens from {header.token_begin}): "
        self._check_place(header, where)
        self._check_tokens(header, where)
        num_bytes = self._assembly.shape.wire_bytes(header.token_begin, header.token_begin + header.token_count)
        check(len(chunk.data) == num_bytes, f"{where}data has {len(chunk.data)} bytes, not {num_bytes}")
        crc = chunk_crc32c(header, chunk.data)
        check(crc == header.crc32c, f"{where}crc32c is {crc:08x}, the sender's was {header.crc32c:08x}")
        layer, token_end = header.layer - self._assembly.part.layer_begin, header.token_begin + header.token_count
        self._assembly.claim(layer, header.token_begin, token_end)
        self._assembly.planes.write(layer, header.token_begin, header.token_count, chunk.data)
        self._next_token[layer] = token_end
        self.kv_bytes += num_bytes
        self.num_chunks += 1
        self._assembly.planes.mark_arrived(layer, header.token_begin, header.token_count)
        self._assembly.commit(layer, header.token_count, num_bytes)

    def _check_place(self, header: pb.KvChunk, where: str) -> None:
        part = self._assembly.part
        check(header.index == self.num_chunks, f"{where}expected index {self.num_chunks}")
        layers = range(part.layer_begin, part.layer_begin + part.layer_count)
        check(header.layer in layers, f"{where}only {part.layer_count} layers from {part.layer_begin} on")
        heads = (header.kv_head_count, header.kv_head_begin)
        wanted = (part.kv_head_count, part.kv_head_begin)
        check(heads == wanted, f"{where}{heads[0]} heads from {heads[1]} on, not {wanted[0]} from {wanted[1]} on")

    def _check_tokens(self, header: pb.KvChunk, where: str) -> None:
        """Whole pages, cut only where the KV begins and ends, that go on behind those before."""
        shape = self._assembly.shape
        begin, end, block = header.token_begin, header.token_begin + header.token_count, shape.block_tokens
        whole_pages = begin % block == 0 or begin == shape.token_begin
        whole_pages = whole_pages and (end % block == 0 or end == shape.token_end)
        check(
            begin < end <= shape.token_end and whole_pages,
            f"{where}ends at token {end}; tokens {shape.token_begin} to {shape.token_end} come, in blocks of {block}",
        )
        next_token = self._next_token[header.layer - self._assembly.part.layer_begin]
        check(begin >= next_token, f"{where}goes back behind token {next_token}")

    def _on_completed(self, checked: pb.CheckedCompletion) -> None:
        completed = read_completion(checked)
        check(
            (completed.num_chunks, completed.kv_bytes) == (self.num_chunks, self.kv_bytes),
            f"completed: {completed.num_chunks} chunks, {completed.kv_bytes} bytes; "
            f"received {self.num_chunks} and {self.kv_bytes}",
        )
        self._assembly.on_completed(completed)
        self._may_come = ()
