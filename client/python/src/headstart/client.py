"""A connection to a Headstart server."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import numpy as np

from headstart.attention import Attention, Sampling, attention_proto
from headstart.errors import HeadstartDataLoss, HeadstartError, from_rpc_error
from headstart.receiver import KV_DTYPES, Expectation, KvReceiver, OnLayer
from headstart.result import PrefillResult, Statistics, Timing
from headstart.transformers_cache import to_dynamic_cache
from headstart.v1 import prefill_pb2 as pb

if TYPE_CHECKING:
    from transformers import DynamicCache

_SERVICE = "headstart.v1.PrefillService"
# With several addresses calls take turns; one whose health service says NOT_SERVING gets none.
_SERVICE_CONFIG = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": _SERVICE}}
_CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    # Retries are prefill()'s: gRPC's own would keep a copy of the prompt, and know nothing of chunks.
    ("grpc.enable_retries", 0),
)
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_DTYPE_BY_NAME = {name: value for value, (name, _) in KV_DTYPES.items()}

TokenIds = Sequence[int] | np.ndarray


class PrefillClient:
    """Sends prompts and receives their KV. Thread-safe; calls share one connection.

    target: as gRPC names it, "host:port", "dns:///name:port", "unix:path". credentials: of grpc.ssl_channel_credentials;
    None is plain text. timeout_s: of a call with its retries. max_attempts: a call is tried again only when it ended
    UNAVAILABLE before its first chunk. max_kv_bytes: a manifest that promises more is refused.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 120.0,
        max_attempts: int = 3,
        max_kv_bytes: int = 64 << 30,
        channel_options: Sequence[tuple[str, object]] = (),
    ) -> None:
        options = [*_CHANNEL_OPTIONS, *channel_options]
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._max_kv_bytes = max_kv_bytes
        self._prefill = self._channel.unary_stream(
            f"/{_SERVICE}/Prefill", pb.PrefillRequest.SerializeToString, pb.PrefillResponse.FromString
        )

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> PrefillClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prefill(
        self,
        token_ids: TokenIds,
        *,
        attention: Attention | str | None = None,
        sampling: Sampling | None = None,
        on_layer: OnLayer | None = None,
        model: str = "",
        request_id: str = "",
        kv_dtype: str = "",
        transfer_params: bytes = b"",
        expected: Expectation = Expectation(),
        timeout_s: float | None = None,
    ) -> PrefillResult:
        """Runs one prompt and returns its KV cache and first token, every check of the wire format passed.

        attention: an Attention or a preset's name; None is the server's default. on_layer: called on this thread as soon as a
        layer is whole; the stream stands still meanwhile. kv_dtype: "bf16", "f16", "f32", or empty for what the server
        computes in. Raises HeadstartError with the server's status, HeadstartDataLoss when the stream was wrong, and
        ValueError for values that no server can mean.
        """
        ids = _as_uint32(token_ids)
        request = pb.PrefillRequest(
            model=model,
            request_id=request_id,
            token_ids=ids.tolist(),
            attention=None if attention is None else attention_proto(attention),
            sampling=None if sampling is None else sampling.to_proto(),
            kv_dtype=_dtype_value(kv_dtype),
            transfer_params=transfer_params,
        )
        token_hash = hashlib.sha256(ids.astype("<u4").tobytes()).digest()
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while True:
            attempt += 1
            receiver = KvReceiver(request, token_hash, expected, self._max_kv_bytes, on_layer)
            try:
                timing = self._receive(request, receiver, deadline)
            except HeadstartError as error:
                pause_s = _backoff_s(attempt, error)
                last = attempt >= self._max_attempts or time.monotonic() + pause_s >= deadline
                if error.code != grpc.StatusCode.UNAVAILABLE or receiver.num_chunks > 0 or last:
                    raise
                time.sleep(pause_s)
            else:
                return _result(receiver, timing, attempt)

    def prefill_to_cache(
        self, token_ids: TokenIds, *, device: str = "cpu", **options
    ) -> tuple[DynamicCache, PrefillResult]:
        """prefill(), and its KV as a transformers DynamicCache on `device` (needs torch and transformers)."""
        result = self.prefill(token_ids, **options)
        return to_dynamic_cache(result, device), result

    def model_info(self, model: str = "") -> pb.GetModelInfoResponse:
        return self._unary("GetModelInfo", pb.GetModelInfoRequest(model=model), pb.GetModelInfoResponse)

    def server_info(self) -> pb.GetServerInfoResponse:
        return self._unary("GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse)

    def _unary(self, method: str, request, response_type):
        call = self._channel.unary_unary(
            f"/{_SERVICE}/{method}", type(request).SerializeToString, response_type.FromString
        )
        try:
            return call(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _receive(self, request: pb.PrefillRequest, receiver: KvReceiver, deadline: float) -> Timing:
        """Reads one attempt's stream to its end."""
        timing = Timing()
        start = time.monotonic()
        call = self._prefill(request, timeout=max(0.0, deadline - start))
        try:
            for response in call:
                event = receiver.on_message(response)
                now_s = time.monotonic() - start
                if event == "chunk":
                    timing.first_chunk_s = timing.first_chunk_s or now_s
                    timing.last_chunk_s = now_s
                else:
                    setattr(timing, f"{event}_s", now_s)
            receiver.on_end()
        except grpc.RpcError as error:
            raise _stream_error(error, receiver) from error
        finally:
            call.cancel()  # without effect on a call that ended
        return timing


def _stream_error(error: grpc.RpcError, receiver: KvReceiver) -> HeadstartError:
    """A stream that was cut by the network after its first chunk is lost data; the server's own statuses stay."""
    status = from_rpc_error(error)
    if status.code == grpc.StatusCode.UNAVAILABLE and not status.reason and receiver.num_chunks > 0:
        return HeadstartDataLoss(f"the stream broke after {receiver.num_chunks} chunks: {status.message}")
    return status


def _backoff_s(attempt: int, error: HeadstartError) -> float:
    """What the server suggests, else doubling; +-20 %."""
    wanted_s = error.retry_delay_s
    if wanted_s is None:
        wanted_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (attempt - 1))
    return wanted_s * random.uniform(0.8, 1.2)


def _result(receiver: KvReceiver, timing: Timing, attempts: int) -> PrefillResult:
    completed, accepted, manifest = receiver.completed, receiver.accepted, receiver.manifest
    return PrefillResult(
        kv=receiver.kv,
        kv_dtype=KV_DTYPES[manifest.layout.dtype][0],
        first_token_id=completed.first_token.id,
        first_token_logprob=completed.first_token.logprob,
        manifest=manifest,
        statistics=Statistics.from_proto(completed.statistics),
        timing=timing,
        request_id=accepted.request_id,
        transfer_params=accepted.transfer_params,
        num_chunks=receiver.num_chunks,
        attempts=attempts,
    )


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
    if name and name not in _DTYPE_BY_NAME:
        raise ValueError(f"kv_dtype={name!r} is not one of {', '.join(_DTYPE_BY_NAME)}")
    return _DTYPE_BY_NAME[name] if name else pb.KV_DTYPE_UNSPECIFIED
