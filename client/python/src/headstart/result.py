"""What a prompt's prefill gives."""

from __future__ import annotations

import dataclasses

import numpy as np

from headstart.sink import KV_DTYPES
from headstart.v1 import prefill_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Where the time to first token went, in seconds; the first five add up to total_s. Blocks are query-key blocks of all
    heads and layers: run, and run by dense attention."""

    queue_s: float
    selection_s: float
    attention_s: float
    other_compute_s: float
    exposed_transfer_s: float
    total_s: float
    executed_blocks: int
    causal_blocks: int
    dense_fallbacks: int

    @classmethod
    def from_proto(cls, message: pb.PrefillStatistics) -> Statistics:
        names = ("queue", "selection", "attention", "other_compute", "exposed_transfer", "total")
        times = {f"{name}_s": duration_s(getattr(message, name)) for name in names}
        return cls(
            **times,
            executed_blocks=message.executed_blocks,
            causal_blocks=message.causal_blocks,
            dense_fallbacks=message.dense_fallbacks,
        )


def duration_s(duration) -> float:
    """Of a google.protobuf.Duration, also of one that is out of its range."""
    return duration.seconds + duration.nanos * 1e-9


@dataclasses.dataclass
class Timing:
    """When things arrived, in seconds after the (last) attempt was sent."""

    accepted_s: float = 0.0
    manifest_s: float = 0.0
    first_chunk_s: float = 0.0
    last_chunk_s: float = 0.0
    completed_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class KvResult:
    """The KV cache of a prompt, or a part of it, checked, and the prompt's first token.

    kv: [layers][2][kv_heads][tokens][head_dim], K then V, K after RoPE in Hugging Face's half-split order; float32, float16,
    or uint16 with the bits of bfloat16 (`kv.view(ml_dtypes.bfloat16)` where that package is at hand). See kv_dtype. None where
    the KV went to memory of the caller's, or where none came.
    completed: as the server sent it; num_chunks and kv_bytes are those of all streams.
    resumes: streams that broke and went on.
    """

    kv: np.ndarray | None
    completed: pb.Completed
    resumes: int = 0

    @property
    def first_token_id(self) -> int:
        return self.completed.first_token.id

    @property
    def first_token_logprob(self) -> float:
        return self.completed.first_token.logprob

    @property
    def manifest(self) -> pb.KvManifest:
        """With layer_density."""
        return self.completed.manifest

    @property
    def statistics(self) -> Statistics:
        return Statistics.from_proto(self.completed.statistics)

    @property
    def num_chunks(self) -> int:
        return self.completed.num_chunks

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return self.manifest.num_tokens

    @property
    def kv_dtype(self) -> str:
        """ "bf16", "f16" or "f32"."""
        return KV_DTYPES[self.manifest.layout.dtype]

    @property
    def layer_density(self) -> tuple[float, ...]:
        """Executed share of the causal attention blocks of each layer; 1 is dense."""
        return tuple(self.manifest.layer_density)

    def kv_float32(self) -> np.ndarray:
        """A copy of kv as float32; exact for every dtype."""
        if self.kv_dtype != "bf16":
            return self.kv.astype(np.float32)
        return (self.kv.astype(np.uint32) << 16).view(np.float32)


@dataclasses.dataclass(frozen=True)
class PrefillResult(KvResult):
    """What prefill() returns. connections: that the KV came on."""

    accepted: pb.Accepted = dataclasses.field(default_factory=pb.Accepted)
    timing: Timing = dataclasses.field(default_factory=Timing)
    attempts: int = 1
    connections: int = 1

    @property
    def request_id(self) -> str:
        return self.accepted.request_id

    @property
    def transfer_params(self) -> bytes:
        return self.accepted.transfer_params
