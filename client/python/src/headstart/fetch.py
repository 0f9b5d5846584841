"""Fetches detached KV on several streams at a time (the pure receiver)."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc

from headstart.assembly import KvAssembly, after_chunks
from headstart.cancel import CancelToken
from headstart.channels import SERVICE, Channels
from headstart.errors import HeadstartError, from_rpc_error
from headstart.receiver import KvReceiver, StreamKind
from headstart.retry import pause_before_retry
from headstart.v1 import prefill_pb2 as pb

# The server keeps chunks until they are acknowledged: what came is acknowledged when it is this much, or when nothing
# follows it, so that a server without room does not wait for us.
_ACKNOWLEDGE_BYTES = 8 << 20
_ACKNOWLEDGE_PAUSE_S = 0.01


@dataclasses.dataclass(frozen=True)
class FetchCall:
    """What all streams of one fetch share."""

    fetch_id: bytes
    target: str
    deadline: float  # of time.monotonic
    max_attempts: int
    assembly: KvAssembly
    cancel: CancelToken


def read_stream(call, receiver: KvReceiver, on_event: Callable[[str], None]) -> HeadstartError | None:
    """Reads a call to its end, whose status is returned, None for OK. Raises what the receiver finds wrong."""
    try:
        while True:
            try:
                message = next(call)
            except StopIteration:
                receiver.on_end()
                return None
            except grpc.RpcError as error:
                return from_rpc_error(error)
            on_event(receiver.on_message(message))
    finally:
        call.cancel()  # without effect on a call that ended


class PartFetch:
    """Every stripe comes on a connection and a thread of its own. `cancel` ends all streams at the first error."""

    def __init__(self, cancel: CancelToken) -> None:
        self.resumes = 0
        self._cancel = cancel
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    @property
    def started(self) -> bool:
        return bool(self._threads)

    def start(self, call: FetchCall, stripes: Sequence[pb.KvPart], channels: Channels) -> None:
        """Once at most. join() raises what goes wrong."""
        try:
            for index, stripe in enumerate(stripes):
                stream = _FetchStream(call, stripe, channels.for_fetch(call.target, index))
                thread = threading.Thread(target=self._run, args=(stream,), name=f"headstart-fetch-{index}")
                thread.start()
                self._threads.append(thread)
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends all streams; the first error is the one that counts."""
        with self._lock:
            self._error = self._error or error
        self._cancel.cancel()

    def join(self) -> None:
        """Waits for all streams, also when it is interrupted: nothing is written to the caller's memory afterwards. Raises the
        first error."""
        try:
            self._wait()
        except BaseException as error:
            self.fail(error)
            self._wait()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self, stream: _FetchStream) -> None:
        try:
            stream.run()
        except BaseException as error:
            self.fail(error)
        finally:
            with self._lock:
                self.resumes += stream.resumes


class _FetchStream:
    """One stripe, over as many calls as it takes."""

    def __init__(self, call: FetchCall, part: pb.KvPart, channel: grpc.Channel) -> None:
        self.resumes = 0
        self._call = call
        self._part = part
        self._fetch_kv = channel.stream_stream(f"/{SERVICE}/FetchKv", pb.FetchKvRequest.SerializeToString, None)
        self._receiver = KvReceiver(StreamKind.FETCH, call.assembly)

    def run(self) -> None:
        failures = 0
        while True:
            before = self._receiver.num_chunks
            error = self._run_call()
            if error is None:
                return
            failures = 1 if self._receiver.num_chunks > before else failures + 1
            self._prepare_to_resume(error, failures)

    def _prepare_to_resume(self, error: HeadstartError, failures: int) -> None:
        """A stream that broke goes on after its last chunk; other errors are final."""
        call = self._call
        try:
            pause_before_retry(error, failures, call.max_attempts, call.deadline, call.cancel)
        except HeadstartError as end:
            raise after_chunks(end, call.assembly.num_chunks) from end
        self._receiver.on_resume()
        self.resumes += 1

    def _run_call(self) -> HeadstartError | None:
        """The status that the call ended with."""
        requests = _Requests(self._call.fetch_id, self._part, self._receiver)
        rpc = self._fetch_kv(iter(requests), timeout=max(0.0, self._call.deadline - time.monotonic()))
        try:
            with self._call.cancel.ending(rpc.cancel):
                return read_stream(rpc, self._receiver, requests.note)
        finally:
            requests.note("completed")


class _Requests:
    """What a call of FetchKv sends: the fetch, then acknowledgements. gRPC iterates on a thread of its own."""

    def __init__(self, fetch_id: bytes, part: pb.KvPart, receiver: KvReceiver) -> None:
        self._fetch = pb.KvFetch(fetch_id=fetch_id, part=part, from_chunk=receiver.num_chunks)
        self._receiver = receiver
        self._changed = threading.Condition()
        self._last = False

    def note(self, event: str) -> None:
        """The receiver has taken a message. Nothing is sent after `completed`."""
        with self._changed:
            self._last = self._last or event == "completed"
            self._changed.notify()

    def __iter__(self) -> Iterator[pb.FetchKvRequest]:
        receiver, chunks, kv_bytes = self._receiver, self._fetch.from_chunk, self._receiver.kv_bytes
        yield pb.FetchKvRequest(fetch=self._fetch)
        last = False
        while not last:
            with self._changed:
                self._changed.wait_for(lambda: self._last or receiver.num_chunks > chunks)
                enough = lambda: self._last or receiver.kv_bytes - kv_bytes >= _ACKNOWLEDGE_BYTES
                self._changed.wait_for(enough, _ACKNOWLEDGE_PAUSE_S)
                last, chunks, kv_bytes = self._last, receiver.num_chunks, receiver.kv_bytes
            yield pb.FetchKvRequest(ack=pb.KvAck(num_chunks=chunks))
