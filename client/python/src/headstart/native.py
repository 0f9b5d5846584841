"""Receives KV with the C++ client library (the native receiver): in parallel, on threads that need no Python."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
import os
import pathlib
import threading
import warnings
from collections.abc import Callable

import numpy as np

from headstart import _native_abi as abi
from headstart.cancel import CancelToken
from headstart.errors import from_status
from headstart.kv_memory import KvPlanes, KvShape
from headstart.options import ConnectionOptions, KvLocation, Part
from headstart.result import KvResult, PrefillResult, Timing
from headstart.sink import KvSink, dtype_of_values
from headstart.v1 import prefill_pb2 as pb

_BESIDE_THE_PACKAGE = pathlib.Path(__file__).with_name("libheadstart_receiver.so")


def available() -> bool:
    """Whether the native library is there, and HEADSTART_NATIVE is not 0. It is the file that HEADSTART_RECEIVER_LIBRARY names
    (OSError when it can't be loaded), else the one beside this package."""
    if os.environ.get("HEADSTART_NATIVE") == "0":
        return False
    named = "HEADSTART_RECEIVER_LIBRARY" in os.environ
    if not named and not _BESIDE_THE_PACKAGE.exists():
        return False
    try:
        _library()
        return True
    except OSError as error:
        if named:
            raise
        warnings.warn(f"KV is received without the native library: {error}", RuntimeWarning, stacklevel=2)
        return False


@functools.cache
def _library() -> ctypes.CDLL:
    return abi.load(os.environ.get("HEADSTART_RECEIVER_LIBRARY") or str(_BESIDE_THE_PACKAGE))


class NativeReceiver:
    """Thread-safe. Has the same methods, results and errors as grpc_receiver.GrpcReceiver."""

    def __init__(self, options: ConnectionOptions, connections: int) -> None:
        self._library = _library()
        tls = options.tls
        c_options = abi.ClientOptions(
            target=options.target.encode(),
            tls=tls is not None,
            max_attempts=options.max_attempts,
            connections=connections,
            allowed_fetch_hosts=",".join(options.allowed_fetch_hosts).encode(),
        )
        for name in ("ca_file", "cert_file", "key_file", "server_name") if tls else ():
            setattr(c_options, name, getattr(tls, name).encode())
        pointer = ctypes.c_void_p()
        _Reply(self._library, self._library.headstart_client_new(c_options, pointer)).check()
        self._client: _Owned | None = _Owned(pointer, self._library.headstart_client_free)

    def prefill(self, request: pb.PrefillRequest, sink: KvSink, timeout_s: float, cancel: CancelToken) -> PrefillResult:
        """Sends the prompt and receives its KV, on several connections as detached KV. One with `detached` is only sent."""
        message = abi.Bytes.of(request.SerializeToString())
        callbacks = _Callbacks(sink, first_layer=0)
        reply = self._call("headstart_prefill", message, timeout_s, callbacks, cancel)
        fields = reply.fields
        return PrefillResult(
            kv=sink.kv,
            completed=pb.Completed.FromString(fields.completed.read()),
            resumes=fields.resumes,
            accepted=pb.Accepted.FromString(fields.accepted.read()),
            timing=Timing(*(getattr(fields, field.name) for field in dataclasses.fields(Timing))),
            attempts=fields.attempts,
            connections=fields.connections,
        )

    def fetch(
        self, location: KvLocation, part: Part, num_stripes: int, sink: KvSink, timeout_s: float, cancel: CancelToken
    ) -> KvResult:
        """Receives a part of detached KV."""
        fetch_id, message = abi.Bytes.of(location.fetch_id), abi.Bytes.of(part.stripes(1)[0].SerializeToString())
        held_pages, token_ids = abi.Bytes.of(location.held_pages), abi.Bytes.of(location.token_ids)
        fetch = abi.Fetch(
            fetch_id=fetch_id,
            fetch_address=location.fetch_address.encode(),
            part=message,
            num_stripes=num_stripes,
            skip_tokens=location.skip_tokens,
            held_pages=held_pages,
            token_ids=token_ids,
        )
        callbacks = _Callbacks(sink, part.layer_begin)
        reply = self._call("headstart_fetch", fetch, timeout_s, callbacks, cancel)
        return KvResult(sink.kv, pb.Completed.FromString(reply.fields.completed.read()), reply.fields.resumes)

    def close(self) -> None:
        """Calls that are under way go on."""
        self._client = None

    def _call(self, name: str, what, timeout_s: float, callbacks: _Callbacks, cancel: CancelToken) -> _Reply:
        """Raises the call's error, or what a callback raised."""
        library, client = self._library, self._client
        if client is None:
            raise ValueError("the client is closed")
        handle = _Owned(library.headstart_cancel_new(), library.headstart_cancel_free)
        end = lambda: library.headstart_cancel(handle.pointer)
        function = getattr(library, name)
        call = lambda: _Reply(library, function(client.pointer, what, timeout_s, callbacks.struct, handle.pointer))
        with cancel.ending(end):
            reply = _run_interruptibly(call, end)
        if callbacks.error is not None:
            raise callbacks.error
        reply.check()
        return reply


class _Owned:
    """Frees what a pointer points to, once nobody uses it."""

    def __init__(self, pointer, free: Callable[[object], None]) -> None:
        self.pointer = pointer
        self._free = free

    def __del__(self) -> None:
        self._free(self.pointer)


class _Reply(_Owned):
    """Of the library; its fields are there as long as this object."""

    def __init__(self, library: ctypes.CDLL, pointer) -> None:
        super().__init__(pointer, library.headstart_reply_free)
        self.fields: abi.Reply = pointer.contents

    def check(self) -> None:
        """Raises the error that it is, if it is one."""
        if self.fields.status.size > 0:
            raise from_status(self.fields.status.read())


def _run_interruptibly(call: Callable[[], _Reply], cancel: Callable[[], object]) -> _Reply:
    """call(). Ctrl-C reaches the main thread between its Python instructions only: there the call runs beside it,
    is cancelled, and waited for."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    with concurrent.futures.ThreadPoolExecutor(1, "headstart-receiver") as pool:
        future = pool.submit(call)
        try:
            return future.result()
        except BaseException:
            cancel()
            raise


class _Callbacks:
    """Of one call. What they raise is kept in `error`, and ends the call."""

    def __init__(self, sink: KvSink, first_layer: int) -> None:
        self.error: BaseException | None = None
        self._sink = sink
        self._first_layer = first_layer
        self._memory: list = []  # that C++ writes to or reads, until the call has ended
        self.struct = abi.Callbacks(
            on_accepted=abi.OnAccepted(self._guard(self._on_accepted)) if sink.on_accepted else abi.OnAccepted(),
            on_manifest=abi.OnManifest(self._guard(self._on_manifest)),
            on_layer=abi.OnLayer(self._guard(lambda _, layer: sink.on_layer(layer))) if sink.wants_layers else abi.OnLayer(),
        )

    def _guard(self, function: Callable) -> Callable:
        def run(*arguments) -> int:
            try:
                function(*arguments)
                return 0
            except BaseException as error:  # raised again by the call
                self.error = error
                return 1

        return run

    def _on_accepted(self, _, accepted: abi.Bytes) -> None:
        self._sink.on_accepted(pb.Accepted.FromString(accepted.read()))

    def _on_manifest(self, _, manifest_bytes: abi.Bytes, shape_pointer, destination_pointer) -> None:
        manifest = pb.KvManifest.FromString(manifest_bytes.read())
        names = ("num_layers", "num_kv_heads", "num_tokens", "head_dim", "token_begin", "block_tokens")
        values = {name: getattr(shape_pointer.contents, name) for name in names}
        is_fp8 = manifest.layout.dtype == pb.KV_DTYPE_FP8_E4M3
        shape = KvShape(**values, dtype=dtype_of_values(manifest.layout), is_fp8=is_fp8)
        planes = self._sink.on_manifest(manifest, shape, self._first_layer)
        self._fill_in(destination_pointer.contents, planes)

    def _fill_in(self, destination: abi.KvDestination, planes: KvPlanes) -> None:
        addresses = [plane.__array_interface__["data"][0] for layer in planes.layers for plane in layer]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        table = (ctypes.c_int32 * len(planes.page_table))(*planes.page_table)
        self._memory = [planes, pointers, table]
        first = planes.layers[0][0]
        destination.planes, destination.num_planes = pointers, len(addresses)
        destination.page_table, destination.num_pages = table, len(planes.page_table)
        destination.page_tokens, destination.token_begin = planes.page_tokens, planes.token_begin
        destination.page_stride, destination.head_stride, destination.token_stride, _ = first.strides
        destination.plane_bytes = _reach(first)
        if planes.shape.is_fp8:
            destination.values = abi.VALUES_BF16 if first.itemsize == 2 else abi.VALUES_F32
        if planes.arrived is not None:
            destination.arrived, destination.num_arrived = planes.arrived.ctypes.data, planes.arrived.size
        if planes.page_tokens == 1:
            destination.token_stride = first.shape[3] * first.itemsize  # NumPy's means nothing


def _reach(plane: np.ndarray) -> int:
    """Bytes from the first element to the end of the furthest one."""
    return plane.itemsize + sum((size - 1) * stride for size, stride in zip(plane.shape, plane.strides))
