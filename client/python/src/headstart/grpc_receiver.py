"""Receives KV with grpcio and NumPy alone (the pure receiver)."""

from __future__ import annotations

import secrets
import time

import grpc

from headstart.assembly import KvAssembly, after_chunks
from headstart.cancel import CancelToken
from headstart.channels import SERVICE, Channels
from headstart.errors import HeadstartError
from headstart.fetch import FetchCall, PartFetch, read_stream
from headstart.options import ConnectionOptions, KvLocation, Part
from headstart.prefix import AskedPrefix
from headstart.receiver import KvReceiver, StreamKind
from headstart.result import KvResult, PrefillResult, Timing
from headstart.retry import pause_before_retry
from headstart.sink import KvSink
from headstart.v1 import prefill_pb2 as pb

_RELEASE_TIMEOUT_S = 5.0


class GrpcReceiver:
    """Thread-safe. Has the same methods, results and errors as native.NativeReceiver."""

    def __init__(self, options: ConnectionOptions, connections: int, channels: Channels) -> None:
        # One thread at a time runs Python: more connections gain little, so that 0 means one.
        self._connections = connections or 1
        self._max_attempts = options.max_attempts
        self._channels = channels

    def prefill(self, request: pb.PrefillRequest, sink: KvSink, timeout_s: float, cancel: CancelToken) -> PrefillResult:
        """Sends the prompt and receives its KV, on several connections as detached KV. One with `detached` is only sent."""
        deadline = time.monotonic() + timeout_s
        request.attempt_key = secrets.token_bytes(16)  # so that a second attempt does not meet the first as a stranger
        attempts = 0
        while True:
            attempts += 1
            attempt = _Attempt(self._channels, request, sink, deadline, self._max_attempts)
            try:
                with cancel.ending(attempt.cancel.cancel):
                    attempt.run(self._connections)
                return attempt.result(attempts)
            except HeadstartError as error:
                if attempt.assembly.num_chunks > 0:
                    raise
                pause_before_retry(error, attempts, self._max_attempts, deadline, cancel)

    def fetch(
        self, location: KvLocation, part: Part, num_stripes: int, sink: KvSink, timeout_s: float, cancel: CancelToken
    ) -> KvResult:
        """Receives a part of detached KV."""
        stripes = part.stripes(num_stripes)
        own_cancel = CancelToken()
        assembly = KvAssembly(sink, stripes[0], AskedPrefix.of_location(location))
        target = self._channels.fetch_target(location.fetch_address)
        deadline = time.monotonic() + timeout_s
        call = FetchCall(location.fetch_id, target, deadline, self._max_attempts, assembly, own_cancel)
        fetch = PartFetch(own_cancel)
        with cancel.ending(own_cancel.cancel):
            fetch.start(call, stripes, self._channels)
            fetch.join()
        assembly.check_whole()
        return KvResult(sink.kv, _totals(assembly), fetch.resumes)

    def close(self) -> None:
        """The channels are the client's."""


class _Attempt:
    """One attempt at a prompt: the call of Prefill, and the fetches of its KV where that is detached."""

    def __init__(
        self, channels: Channels, request: pb.PrefillRequest, sink: KvSink, deadline: float, max_attempts: int
    ) -> None:
        self.cancel = CancelToken()  # the first error ends all streams
        self.assembly = KvAssembly(sink, pb.KvPart(), AskedPrefix.of_request(request))
        self._channels = channels
        self._request = request
        self._sink = sink
        self._deadline = deadline
        self._max_attempts = max_attempts
        self._start = time.monotonic()
        self._timing = Timing()
        self._receiver: KvReceiver | None = None
        self._connections = 1
        self._fetch = PartFetch(self.cancel)
        self._fetch_target = ""

    def run(self, connections: int) -> None:
        if self._request.HasField("detached"):
            self._receive(self._request, StreamKind.DETACHED)
        elif connections == 1:
            self._receive(self._request, StreamKind.PREFILL)
            self.assembly.check_whole()
        else:
            self._run_fetched(connections)

    def result(self, attempts: int) -> PrefillResult:
        times = self.assembly.times
        for event, at in times.items():
            setattr(self._timing, f"{event}_s", at - self._start)
        return PrefillResult(
            kv=self._sink.kv,
            completed=_totals(self.assembly),
            resumes=self._fetch.resumes,
            accepted=self._receiver.accepted,
            timing=self._timing,
            attempts=attempts,
            connections=self._connections,
        )

    def _run_fetched(self, connections: int) -> None:
        self._connections = connections
        request = pb.PrefillRequest()
        request.CopyFrom(self._request)
        request.detached.readers.extend(Part().stripes(connections))
        try:
            try:
                self._receive(request, StreamKind.DETACHED)
            except BaseException as error:  # join() raises it
                if not self._only_broke(error):
                    self._fetch.fail(error)
            self._fetch.join()
            self.assembly.check_whole()
        finally:
            self._release()

    def _only_broke(self, error: BaseException) -> bool:
        """The fetches bring everything that Prefill's stream does: where only its connection broke, nothing is lost."""
        broke = isinstance(error, HeadstartError) and error.code is grpc.StatusCode.UNAVAILABLE and not error.reason
        return broke and self._fetch.started

    def _receive(self, request: pb.PrefillRequest, kind: StreamKind) -> None:
        """Reads the stream of Prefill to its end."""
        self._receiver = KvReceiver(kind, self.assembly, request.request_id)
        prefill = self._channels.main.unary_stream(
            f"/{SERVICE}/Prefill", pb.PrefillRequest.SerializeToString, None
        )
        call = prefill(request, timeout=max(0.0, self._deadline - time.monotonic()))
        with self.cancel.ending(call.cancel):
            error = read_stream(call, self._receiver, lambda event: self._on_event(event, request))
        if error is not None:
            fetches = self._connections > 1
            raise error if fetches else after_chunks(error, self.assembly.num_chunks)

    def _on_event(self, event: str, request: pb.PrefillRequest) -> None:
        if event != "accepted":
            return
        self._timing.accepted_s = time.monotonic() - self._start
        if self._connections > 1:
            accepted = self._receiver.accepted
            self._fetch_target = self._channels.fetch_target(accepted.fetch_address)
            call = FetchCall(
                accepted.fetch_id, self._fetch_target, self._deadline, self._max_attempts, self.assembly, self.cancel
            )
            self._fetch.start(call, request.detached.readers, self._channels)

    def _release(self) -> None:
        """Nothing of the request is left on the server. Where it can't be reached, the lease ends by itself."""
        if not self._fetch_target:
            return
        request = pb.ReleaseKvRequest(fetch_id=self._receiver.accepted.fetch_id)
        channel = self._channels.for_fetch(self._fetch_target, 0)
        try:
            self._channels.unary(channel, "ReleaseKv", request, pb.ReleaseKvResponse, _RELEASE_TIMEOUT_S)
        except HeadstartError:
            pass


def _totals(assembly: KvAssembly) -> pb.Completed:
    completed = pb.Completed()
    completed.CopyFrom(assembly.completed)
    completed.num_chunks, completed.kv_bytes = assembly.num_chunks, assembly.kv_bytes
    return completed
