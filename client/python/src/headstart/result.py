"""What a prompt's prefill gives."""

from __future__ import annotations

import dataclasses

import numpy as np

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
        times = {f"{name}_s": getattr(message, name).ToTimedelta().total_seconds() for name in names}
        return cls(
            **times,
            executed_blocks=message.executed_blocks,
            causal_blocks=message.causal_blocks,
            dense_fallbacks=message.dense_fallbacks,
        )


@dataclasses.dataclass
class Timing:
    """When things arrived, in seconds after the (last) attempt was sent."""

    accepted_s: float = 0.0
    manifest_s: float = 0.0
    first_chunk_s: float = 0.0
    last_chunk_s: float = 0.0
    completed_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    """The KV cache of a prompt, checked, and its first token.

    kv: [layers][2][kv_heads][tokens][head_dim], K then V, K after RoPE in Hugging Face's half-split order; float32, float16,
    or uint16 with the bits of bfloat16 (`kv.view(ml_dtypes.bfloat16)` where that package is at hand). See kv_dtype.
    """

    kv: np.ndarray
    kv_dtype: str  # "bf16", "f16" or "f32"
    first_token_id: int
    first_token_logprob: float
    manifest: pb.KvManifest  # with layer_density
    statistics: Statistics
    timing: Timing
    request_id: str
    transfer_params: bytes
    num_chunks: int
    attempts: int

    @property
    def num_tokens(self) -> int:
        return self.kv.shape[3]

    @property
    def layer_density(self) -> tuple[float, ...]:
        """Executed share of the causal attention blocks of each layer; 1 is dense."""
        return tuple(self.manifest.layer_density)

    def kv_float32(self) -> np.ndarray:
        """A copy of kv as float32; exact for every dtype."""
        if self.kv_dtype != "bf16":
            return self.kv.astype(np.float32)
        return (self.kv.astype(np.uint32) << 16).view(np.float32)
