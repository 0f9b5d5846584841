#!/usr/bin/env python3
"""Writes corpus/stream/, the seeds of stream_fuzz. Needs the Python client (client/python).

A seed is the number of the message that it takes the place of (128 more: in the second of two stripes), and the message:
the kinds of a response stream, with every field set.
"""
import pathlib

from google.protobuf.duration_pb2 import Duration
from headstart.v1 import prefill_pb2 as pb

ROOT = pathlib.Path(__file__).parent / "corpus/stream"

LAYOUT = pb.KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype=pb.KV_DTYPE_BF16, block_tokens=4,
                     rope=pb.RopeInfo(theta=1e4, type="default", factor=1))  # fmt: skip
ATTENTION = pb.AttentionProvenance(
    algorithm=pb.AttentionProvenance.ALGORITHM_PROXY_ATTN, 
    dense_reason=pb.AttentionProvenance.DENSE_REASON_BELOW_DENSE_LIMIT,
    options=pb.AttentionOptions(preset=pb.ATTENTION_PRESET_FAST, num_proxies=2, stride=8, budget=pb.BUDGET_RULE_ROW,
                                gamma=0.5, floor_tokens=128, sink_blocks=1, local_blocks=1, dense_tail_blocks=2,
                                dense_below_tokens=1))  # fmt: skip
MANIFEST = pb.KvManifest(model="tiny", model_hash="aa", token_hash=bytes(32), num_tokens=21, layout=LAYOUT,
                         attention=ATTENTION)  # fmt: skip

COMPLETED = pb.Completed(
    first_token=pb.FirstToken(id=42, logprob=-0.5), num_chunks=9, kv_bytes=1008, manifest=MANIFEST,
    statistics=pb.PrefillStatistics(executed_blocks=3, causal_blocks=4, dense_fallbacks=1))  # fmt: skip
STRIPE = 128


def crc32c(data):
    """Castagnoli, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checked(completed):
    data = completed.SerializeToString()
    return pb.PrefillResponse(completed=pb.CheckedCompletion(completed=data, crc32c=crc32c(data)))


# Message 2 of the stream is the first chunk: layer 0, tokens 0 to 8, both heads; the last is the completion.
SEEDS = {
    "accepted": (0, pb.PrefillResponse(accepted=pb.Accepted(
        request_id="r-1", queue_requests=2, queue_tokens=300, transfer_params=b"xyz", fetch_id=bytes(16),
        lease=Duration(seconds=30), fetch_address="127.0.0.1:8443"))),
    "manifest": (1, pb.PrefillResponse(manifest=MANIFEST)),
    "chunk": (2, pb.PrefillResponse(chunk=pb.KvChunk(
        index=0, layer=0, token_begin=0, token_count=8, kv_head_begin=0, kv_head_count=2, crc32c=1, data=bytes(256)))),
    "later_chunk": (5, pb.PrefillResponse(chunk=pb.KvChunk(
        index=3, layer=1, token_begin=8, token_count=8, kv_head_begin=0, kv_head_count=2, crc32c=1, data=bytes(256)))),
    "half_the_heads": (2, pb.PrefillResponse(chunk=pb.KvChunk(
        index=0, layer=0, token_begin=0, token_count=4, kv_head_begin=1, kv_head_count=1, crc32c=1, data=bytes(64)))),
    "completed": (11, checked(COMPLETED)),
    "no_completion": (11, pb.PrefillResponse(completed=pb.CheckedCompletion(completed=b"\xff", crc32c=1))),
    "stripe_manifest": (STRIPE + 0, pb.PrefillResponse(manifest=MANIFEST)),
    "stripe_chunk": (STRIPE + 1, pb.PrefillResponse(chunk=pb.KvChunk(
        index=0, layer=0, token_begin=8, token_count=8, kv_head_begin=0, kv_head_count=2, crc32c=1, data=bytes(256)))),
    "chunk_of_the_other_stripe": (STRIPE + 1, pb.PrefillResponse(chunk=pb.KvChunk(
        index=0, layer=0, token_begin=0, token_count=8, kv_head_begin=0, kv_head_count=2, crc32c=1, data=bytes(256)))),
    "stripe_completed": (STRIPE + 5, checked(COMPLETED)),
}  # fmt: skip


def main():
    ROOT.mkdir(parents=True, exist_ok=True)
    for name, (number, message) in SEEDS.items():
        (ROOT / name).write_bytes(bytes([number]) + message.SerializeToString())


if __name__ == "__main__":
    main()
