"""What a call does with what comes: the same for both receivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
import numpy as np

from headstart.errors import HeadstartDataLoss, HeadstartError
from headstart.kv_memory import IntoMemory, KvPlanes, KvShape, contiguous
from headstart.options import Expectation
from headstart.v1 import prefill_pb2 as pb

# On the wire.
KV_DTYPES = {pb.KV_DTYPE_BF16: "bf16", pb.KV_DTYPE_F16: "f16", pb.KV_DTYPE_F32: "f32", pb.KV_DTYPE_FP8_E4M3: "fp8_e4m3"}


def dtype_of_values(layout: pb.KvLayout) -> str:
    """In which the KV comes to memory that nobody says the dtype of: fp8 is multiplied out to bfloat16."""
    name = KV_DTYPES[layout.dtype]
    return "bf16" if name == "fp8_e4m3" else name


# Called when all heads and tokens of a layer that come have arrived: the model's number of the layer, and its
# [2][kv_heads][tokens][head_dim] (None where the caller gave memory of its own).
OnLayer = Callable[[int, np.ndarray | None], None]


class KvSink:
    """Gives memory and tells the caller. Its methods are called by one thread at a time; what they raise ends the call.

    on_accepted: of a prompt whose KV others fetch; no memory is taken. kv: the KV where it came and the caller gave no memory,
    else None.
    """

    def __init__(
        self,
        expected: Sequence[Expectation],
        max_kv_bytes: int,
        into: IntoMemory | None = None,
        on_layer: OnLayer | None = None,
        on_accepted: Callable[[pb.Accepted], None] | None = None,
    ) -> None:
        self.on_accepted = on_accepted
        self.wants_layers = on_layer is not None
        self.kv: np.ndarray | None = None
        self._expected = expected
        self._max_kv_bytes = max_kv_bytes
        self._into = into
        self._on_layer = on_layer
        self._first_layer = 0

    def on_manifest(self, manifest: pb.KvManifest, shape: KvShape, first_layer: int) -> KvPlanes | None:
        """Memory for the KV of this shape, whose layer 0 is the model's first_layer; None where no KV comes."""
        for expected in self._expected:
            _check_expectation(manifest, expected)
        if self.on_accepted is not None:
            return None
        if shape.nbytes > self._max_kv_bytes:
            raise HeadstartError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"KV of {shape.nbytes} bytes is more than max_kv_bytes={self._max_kv_bytes}"
            )
        self._first_layer = first_layer
        if self._into is not None:
            return KvPlanes(self._into(shape), shape)
        self.kv = np.empty(shape.dims, shape.numpy_dtype)
        return KvPlanes(contiguous(self.kv, shape.token_begin), shape)

    def on_layer(self, layer: int) -> None:
        """All of the model's layer has come."""
        if self._on_layer is not None:
            self._on_layer(layer, None if self.kv is None else self.kv[layer - self._first_layer])


def _check_expectation(manifest: pb.KvManifest, expected: Expectation) -> None:
    layout = manifest.layout
    for name, got, wanted in (
        ("model", manifest.model, expected.model),
        ("model_hash", manifest.model_hash, expected.model_hash),
        ("num_tokens", manifest.num_tokens, expected.num_tokens),
        ("token_hash", manifest.token_hash.hex(), expected.token_hash.hex()),
        ("num_layers", layout.num_layers, expected.num_layers),
        ("num_kv_heads", layout.num_kv_heads, expected.num_kv_heads),
        ("head_dim", layout.head_dim, expected.head_dim),
        ("dtype", KV_DTYPES.get(layout.dtype), expected.kv_dtype),
    ):
        if wanted and got != wanted:
            raise HeadstartDataLoss(f"manifest: {name}={got}, expected {wanted}")
