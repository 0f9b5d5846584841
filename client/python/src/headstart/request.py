"""Makes requests of plain values; the server checks them against its model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from headstart.attention import Attention, Sampling, attention_proto
from headstart.options import Expectation
from headstart.prefix import join_names
from headstart.sink import KV_DTYPES
from headstart.v1 import prefill_pb2 as pb

TokenIds = Sequence[int] | np.ndarray

_MAX_PRIORITY = 100
_PREFIX_REUSES = {"same": pb.PREFIX_REUSE_SAME_ATTENTION, "dense": pb.PREFIX_REUSE_DENSE, "none": pb.PREFIX_REUSE_NONE}


def make_request(
    token_ids: TokenIds,
    *,
    attention: Attention | str | None = None,
    sampling: Sampling | None = None,
    skip_tokens: int = 0,
    model: str = "",
    request_id: str = "",
    kv_dtype: str = "",
    transfer_params: bytes = b"",
    priority: int = 0,
    cache_salt: bytes | str = b"",
    prefix_reuse: str = "same",
    held_pages: Iterable[bytes] = (),
) -> tuple[pb.PrefillRequest, Expectation]:
    """A request, and what it makes certain about the answer. ValueError for values that no server can mean."""
    ids = _as_uint32(token_ids)
    if not 0 <= skip_tokens <= 0xFFFFFFFF:
        raise ValueError(f"skip_tokens={skip_tokens} does not fit in 32 bits")
    if abs(priority) > _MAX_PRIORITY:
        raise ValueError(f"priority={priority} is not in [-{_MAX_PRIORITY}, {_MAX_PRIORITY}]")
    if prefix_reuse not in _PREFIX_REUSES:
        raise ValueError(f"prefix_reuse={prefix_reuse!r} is not one of {', '.join(_PREFIX_REUSES)}")
    request = pb.PrefillRequest(
        model=model,
        request_id=request_id,
        token_ids=ids.tolist(),
        attention=None if attention is None else attention_proto(attention),
        sampling=None if sampling is None else sampling.to_proto(),
        kv_dtype=_dtype_value(kv_dtype),
        transfer_params=transfer_params,
        skip_tokens=skip_tokens,
        priority=priority,
        cache_salt=cache_salt.encode() if isinstance(cache_salt, str) else cache_salt,
        prefix_reuse=_PREFIX_REUSES[prefix_reuse],
        held_pages=join_names(held_pages),
    )
    return request, Expectation(model=model, token_hash=hash_tokens(ids), num_tokens=ids.size, kv_dtype=kv_dtype)


def hash_tokens(ids: np.ndarray) -> bytes:
    """As KvManifest.token_hash."""
    return hashlib.sha256(ids.astype("<u4").tobytes()).digest()


def _as_uint32(token_ids: TokenIds) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.ndim != 1:
        raise ValueError(f"token_ids has {ids.ndim} dimensions, not 1")
    if ids.size == 0:
        return ids.astype(np.uint32)  # the server says what is wrong with an empty prompt
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids are {ids.dtype}, not integers")
    if ids.min() < 0 or ids.max() > 0xFFFFFFFF:
        raise ValueError("token_ids do not fit in 32 bits")
    return ids.astype(np.uint32)


def _dtype_value(name: str) -> int:
    if name and name not in KV_DTYPES.values():
        raise ValueError(f"kv_dtype={name!r} is not one of {', '.join(KV_DTYPES.values())}")
    return next((value for value, known in KV_DTYPES.items() if known == name), pb.KV_DTYPE_UNSPECIFIED)
