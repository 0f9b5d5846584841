"""A client of a Headstart server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from headstart import native
from headstart.cancel import CancelToken
from headstart.channels import Channels
from headstart.attention import Attention, Sampling
from headstart.grpc_receiver import GrpcReceiver
from headstart.kv_memory import IntoMemory
from headstart.options import ConnectionOptions, Expectation, KvLocation, Part, Tls
from headstart.prefix import AskedPrefix
from headstart.request import TokenIds, make_request
from headstart.result import Estimate, KvResult, PrefillResult, duration_s
from headstart.sink import KvSink, OnLayer
from headstart.transformers_cache import TorchMemory, to_dynamic_cache
from headstart.v1 import prefill_pb2 as pb

if TYPE_CHECKING:
    from transformers import DynamicCache

_MAX_CONNECTIONS = 64
_MAX_SECONDS = 1e9


class PrefillClient:
    """Sends prompts and receives their KV. Thread-safe; calls share connections.

    target: as gRPC names it, "host:port", "dns:///name:port", "unix:path". tls: None is plain text. timeout_s: of a call with
    its retries. max_attempts: a call is tried again only when it ended UNAVAILABLE before its first chunk; streams of detached
    KV that broke go on after their last chunk. max_kv_bytes: a manifest that promises more is refused.
    connections: that the KV of one prompt comes on, 0 to 64. 0: one for every 32 MiB of KV, at most half of the cores and 8;
    without the native library one. allowed_fetch_hosts: hosts that a server may name to fetch its KV from, besides the
    target's; "*" is any. use_native: with the native library; None is where it is there.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        timeout_s: float = 120.0,
        max_attempts: int = 3,
        max_kv_bytes: int = 64 << 30,
        connections: int = 0,
        allowed_fetch_hosts: Sequence[str] = (),
        use_native: bool | None = None,
    ) -> None:
        if not 0 <= connections <= _MAX_CONNECTIONS:
            raise ValueError(f"connections={connections} is not in [0, {_MAX_CONNECTIONS}]")
        options = ConnectionOptions(target, tls, max_attempts, tuple(host.lower() for host in allowed_fetch_hosts))
        self._timeout_s = _check_seconds("timeout_s", timeout_s)
        self._max_kv_bytes = max_kv_bytes
        self._channels = Channels(options)
        if native.available() if use_native is None else use_native:
            self._receiver = native.NativeReceiver(options, connections)
        else:
            self._receiver = GrpcReceiver(options, connections, self._channels)

    def close(self) -> None:
        """No call may be under way."""
        self._receiver.close()
        self._channels.close()

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
        skip_tokens: int = 0,
        into: IntoMemory | None = None,
        on_layer: OnLayer | None = None,
        model: str = "",
        request_id: str = "",
        kv_dtype: str = "",
        transfer_params: bytes = b"",
        priority: int = 0,
        cache_salt: bytes | str = b"",
        prefix_reuse: str = "same",
        held_pages: Iterable[bytes] = (),
        expected: Expectation = Expectation(),
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
    ) -> PrefillResult:
        """Runs one prompt and returns its KV cache and first token, every check of the wire format passed.

        attention: an Attention or a preset's name; None is the server's default. skip_tokens: the KV of so many tokens in front
        is here already and does not come. into: gives the memory for the KV; None makes a new NumPy array. on_layer: called as
        soon as a layer is whole, on a thread that receives, one at a time; the streams stand still meanwhile, and it must not
        use this client. kv_dtype: "bf16", "f16", "f32", or empty for what the server computes in; "fp8_e4m3" halves
        the bytes on the way, and is multiplied out to the destination's dtype (bfloat16 where there is none). priority:
        higher ones run first, [-100, 100]. cache_salt: pages of the server's prefix cache are shared only among requests
        with the same one. prefix_reuse: pages that may stand for the prompt's start, "same" (of the same attention),
        "dense" or "none". held_pages: names of pages that are here already (result.page_names of earlier prompts): their
        KV does not come, see result.skip_tokens.

        Raises HeadstartError with the server's status, HeadstartDataLoss when a stream was wrong, ValueError for values that no
        server can mean and for memory that does not fit, and what `into` and `on_layer` raise.
        """
        request, answer = make_request(
            token_ids,
            attention=attention,
            sampling=sampling,
            skip_tokens=skip_tokens,
            model=model,
            request_id=request_id,
            kv_dtype=kv_dtype,
            transfer_params=transfer_params,
            priority=priority,
            cache_salt=cache_salt,
            prefix_reuse=prefix_reuse,
            held_pages=held_pages,
        )
        sink = KvSink((answer, expected), self._max_kv_bytes, into, on_layer)
        return self._receiver.prefill(request, sink, self._timeout(timeout_s), cancel or CancelToken())

    def prefill_detached(
        self,
        token_ids: TokenIds,
        on_accepted: Callable[[KvLocation], None],
        *,
        readers: Sequence[pb.KvPart] = (),
        lease_s: float | None = None,
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
        **request_options,
    ) -> PrefillResult:
        """Runs one prompt whose KV others fetch, and release. Returns when it is computed, without KV.

        on_accepted: told where the KV can be fetched from now on. readers: the parts that will be fetched (Part.stripes), so
        that the server may give back what all have; none: it keeps all of the KV until the lease ends. lease_s: how long nobody
        need ask for it; None is the server's. request_options: attention, sampling, skip_tokens, model, request_id, kv_dtype,
        transfer_params, priority, cache_salt, prefix_reuse, held_pages of prefill(). Raises what prefill() raises.
        """
        request, answer = make_request(token_ids, **request_options)
        request.detached.readers.extend(readers)
        if lease_s is not None:
            request.detached.lease.FromNanoseconds(int(_check_seconds("lease_s", lease_s) * 1e9))
        sink = KvSink((answer,), self._max_kv_bytes, on_accepted=_tell(on_accepted, request))
        return self._receiver.prefill(request, sink, self._timeout(timeout_s), cancel or CancelToken())

    def fetch(
        self,
        location: KvLocation,
        part: Part = Part(),
        *,
        num_stripes: int = 1,
        into: IntoMemory | None = None,
        on_layer: OnLayer | None = None,
        expected: Expectation = Expectation(),
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
    ) -> KvResult:
        """Receives a part of detached KV, as stripes on a connection each. Where readers were announced, the stripes must be
        among them. Streams that break go on. into, on_layer, errors: as of prefill()."""
        if not 1 <= num_stripes <= _MAX_CONNECTIONS:
            raise ValueError(f"num_stripes={num_stripes} is not in [1, {_MAX_CONNECTIONS}]")
        sink = KvSink((expected,), self._max_kv_bytes, into, on_layer)
        timeout_s = self._timeout(timeout_s)
        return self._receiver.fetch(location, part, num_stripes, sink, timeout_s, cancel or CancelToken())

    def renew_lease(self, location: KvLocation) -> float:
        """Keeps detached KV for another lease, whose seconds are returned."""
        response = self._ask_keeper(location, "RenewLease", pb.RenewLeaseRequest, pb.RenewLeaseResponse)
        return duration_s(response.lease)

    def release_kv(self, location: KvLocation) -> None:
        """Gives detached KV back."""
        self._ask_keeper(location, "ReleaseKv", pb.ReleaseKvRequest, pb.ReleaseKvResponse)

    def prefill_to_cache(
        self, token_ids: TokenIds, *, device: str = "cpu", **options
    ) -> tuple[DynamicCache, PrefillResult]:
        """prefill(), and its KV as a transformers DynamicCache on `device` (needs torch and transformers). The KV is received
        into pinned memory where torch has a GPU."""
        memory = TorchMemory()
        result = dataclasses.replace(self.prefill(token_ids, into=memory, **options), kv=memory.numpy())
        return to_dynamic_cache(result, device), result

    def estimate(
        self, token_ids: TokenIds = (), *, num_tokens: int = 0, deadline_s: float | None = None, **request_options
    ) -> Estimate:
        """What would become of a prompt now; nothing runs. num_tokens: where only their number is known, without token_ids;
        then there is no prefix hit. deadline_s: how long the prompt would have, None is the client's timeout.
        request_options: as of prefill_detached(). A refusal is an answer; raises HeadstartError for a bad request."""
        request, _ = make_request(token_ids, **request_options)
        question = pb.EstimateRequest(request=request, num_tokens=num_tokens)
        seconds = self._timeout_s if deadline_s is None else _check_seconds("deadline_s", deadline_s)
        question.deadline.FromNanoseconds(int(seconds * 1e9))
        return Estimate.from_proto(self._unary("Estimate", question, pb.EstimateResponse))

    def loads(self) -> pb.GetLoadsResponse:
        """How busy the server is."""
        return self._unary("GetLoads", pb.GetLoadsRequest(), pb.GetLoadsResponse)

    def model_info(self, model: str = "") -> pb.GetModelInfoResponse:
        return self._unary("GetModelInfo", pb.GetModelInfoRequest(model=model), pb.GetModelInfoResponse)

    def server_info(self) -> pb.GetServerInfoResponse:
        return self._unary("GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse)

    def _timeout(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else _check_seconds("timeout_s", timeout_s)

    def _unary(self, method: str, request, response_type):
        return self._channels.unary(self._channels.main, method, request, response_type, self._timeout_s)

    def _ask_keeper(self, location: KvLocation, method: str, request_type, response_type):
        """A call about detached KV, to the server that has it."""
        channel = self._channels.for_fetch(self._channels.fetch_target(location.fetch_address), 0)
        request = request_type(fetch_id=location.fetch_id)
        return self._channels.unary(channel, method, request, response_type, self._timeout_s)


def _tell(on_accepted: Callable[[KvLocation], None], request: pb.PrefillRequest) -> Callable[[pb.Accepted], None]:
    token_ids = AskedPrefix.of_request(request).token_ids if request.held_pages else b""
    known = (request.skip_tokens, request.held_pages, token_ids)
    return lambda accepted: on_accepted(KvLocation(accepted.fetch_id, accepted.fetch_address, *known))


def _check_seconds(name: str, seconds: float) -> float:
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError(f"{name}={seconds} is not in (0, {_MAX_SECONDS:g}]")
    return seconds
