"""What a prompt's prefill gives."""

from __future__ import annotations

import dataclasses

import numpy as np

from headstart.prefix import split_names
from headstart.sink import KV_DTYPES, dtype_of_values
from headstart.v1 import prefill_pb2 as pb

_ALGORITHMS = {
    pb.AttentionProvenance.ALGORITHM_UNSPECIFIED: "",
    pb.AttentionProvenance.ALGORITHM_DENSE: "dense",
    pb.AttentionProvenance.ALGORITHM_PROXY_ATTN: "proxy_attn",
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Where the time to first token went, in seconds; the first six add up to total_s. gave_way_s: others ran meanwhile. Blocks are query-key blocks of all
    heads and layers: run, and run by dense attention."""

    queue_s: float
    selection_s: float
    attention_s: float
    other_compute_s: float
    exposed_transfer_s: float
    gave_way_s: float
    total_s: float
    executed_blocks: int
    causal_blocks: int
    dense_fallbacks: int

    @classmethod
    def from_proto(cls, message: pb.PrefillStatistics) -> Statistics:
        names = ("queue", "selection", "attention", "other_compute", "exposed_transfer", "gave_way", "total")
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


def _seconds_or_none(message, field: str) -> float | None:
    return duration_s(getattr(message, field)) if message.HasField(field) else None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What would become of a request. refusal: the reason, "QUEUE_FULL" and so on; empty: it would be accepted.
    retry_after_s: when a refused one is worth another try. Times are None before the server has learned how fast it is."""

    refusal: str
    retry_after_s: float | None
    predicted_ttft_s: float | None  # the sum of the next two
    predicted_queue_s: float | None
    predicted_compute_s: float | None
    cached_tokens: int
    queue_requests: int  # that would be ahead, as are these tokens
    queue_tokens: int

    @property
    def accepted(self) -> bool:
        return not self.refusal

    @classmethod
    def from_proto(cls, message: pb.EstimateResponse) -> Estimate:
        times = ("retry_after", "predicted_ttft", "predicted_queue", "predicted_compute")
        counts = ("cached_tokens", "queue_requests", "queue_tokens")
        return cls(
            refusal=_reason_name(message.refusal),
            **{f"{name}_s": _seconds_or_none(message, name) for name in times},
            **{name: getattr(message, name) for name in counts},
        )


def _reason_name(reason: int) -> str:
    """Also of a reason that this version does not know."""
    if reason == pb.ERROR_REASON_UNSPECIFIED:
        return ""
    known = pb.ErrorReason.DESCRIPTOR.values_by_number.get(reason)
    return known.name.removeprefix("ERROR_REASON_") if known else str(reason)


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
        """Of kv: "bf16", "f16" or "f32"."""
        return dtype_of_values(self.manifest.layout)

    @property
    def wire_dtype(self) -> str:
        """In which it was sent: one of these or "fp8_e4m3"."""
        return KV_DTYPES[self.manifest.layout.dtype]

    @property
    def layer_density(self) -> tuple[float, ...]:
        """Executed share of the causal attention blocks of each layer; 1 is dense."""
        return tuple(self.manifest.layer_density)

    @property
    def skip_tokens(self) -> int:
        """Tokens in front whose KV did not come: as asked for, or more by held pages."""
        return self.manifest.skip_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens in front whose KV came from the server's prefix cache."""
        return self.manifest.cached_tokens

    @property
    def cached_algorithm(self) -> str:
        """How the KV of these was computed: "dense" or "proxy_attn"; empty where there are none."""
        return _ALGORITHMS[self.manifest.cached_algorithm]

    @property
    def page_names(self) -> list[bytes]:
        """Of the prompt's first pages of manifest.layout.block_tokens tokens, as far as they have one: what to keep with the
        pages, and to send as held_pages."""
        return split_names(self.manifest.page_hashes)

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
    def predicted_ttft_s(self) -> float | None:
        """When the request was accepted; None: the server did not know yet."""
        return _seconds_or_none(self.accepted, "predicted_ttft")

    @property
    def transfer_params(self) -> bytes:
        return self.accepted.transfer_params
