"""client/c_api/receiver.h in ctypes."""

from __future__ import annotations

import ctypes
import os
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p

VERSION = 3
VALUES_BF16, VALUES_F32 = 1, 2  # of KvDestination.values; 0: as sent


class Bytes(Structure):
    _fields_ = [("data", c_void_p), ("size", c_size_t)]

    @classmethod
    def of(cls, value: bytes) -> Bytes:
        """Of bytes that this object keeps alive; a structure that it is copied into does not."""
        result = cls(ctypes.cast(c_char_p(value), c_void_p), len(value))
        result.value = value
        return result

    def read(self) -> bytes:
        return ctypes.string_at(self.data, self.size)


class Reply(Structure):
    _fields_ = [
        ("status", Bytes),
        ("accepted", Bytes),
        ("completed", Bytes),
        ("accepted_s", c_double),
        ("manifest_s", c_double),
        ("first_chunk_s", c_double),
        ("last_chunk_s", c_double),
        ("completed_s", c_double),
        ("attempts", c_int32),
        ("connections", c_int32),
        ("resumes", c_int32),
    ]


class ClientOptions(Structure):
    _fields_ = [
        ("target", c_char_p),
        ("tls", c_int32),
        ("ca_file", c_char_p),
        ("cert_file", c_char_p),
        ("key_file", c_char_p),
        ("server_name", c_char_p),
        ("max_attempts", c_int32),
        ("connections", c_int32),
        ("allowed_fetch_hosts", c_char_p),
    ]


class KvShape(Structure):
    _fields_ = [
        (name, c_int64)
        for name in ("num_layers", "num_kv_heads", "num_tokens", "head_dim", "element_bytes", "token_begin", "block_tokens")
    ]


class KvDestination(Structure):
    _fields_ = [
        ("planes", POINTER(c_void_p)),
        ("num_planes", c_int64),
        ("plane_bytes", c_int64),
        ("page_table", POINTER(c_int32)),
        ("num_pages", c_int64),
        ("page_tokens", c_int64),
        ("page_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("token_begin", c_int64),
        ("values", c_int32),
        ("scales", c_void_p),
        ("num_scales", c_int64),
        ("arrived", c_void_p),
        ("num_arrived", c_int64),
    ]


OnAccepted = CFUNCTYPE(c_int32, c_void_p, Bytes)
OnManifest = CFUNCTYPE(c_int32, c_void_p, Bytes, POINTER(KvShape), POINTER(KvDestination))
OnLayer = CFUNCTYPE(c_int32, c_void_p, c_int64)


class Callbacks(Structure):
    _fields_ = [("context", c_void_p), ("on_accepted", OnAccepted), ("on_manifest", OnManifest), ("on_layer", OnLayer)]


class Fetch(Structure):
    _fields_ = [
        ("fetch_id", Bytes),
        ("fetch_address", c_char_p),
        ("part", Bytes),
        ("num_stripes", c_int32),
        ("skip_tokens", c_int64),
        ("held_pages", Bytes),
        ("token_ids", Bytes),
    ]


_FUNCTIONS = {
    "headstart_reply_free": (None, [POINTER(Reply)]),
    "headstart_client_new": (POINTER(Reply), [POINTER(ClientOptions), POINTER(c_void_p)]),
    "headstart_client_free": (None, [c_void_p]),
    "headstart_cancel_new": (c_void_p, []),
    "headstart_cancel": (None, [c_void_p]),
    "headstart_cancel_free": (None, [c_void_p]),
    "headstart_prefill": (POINTER(Reply), [c_void_p, Bytes, c_double, POINTER(Callbacks), c_void_p]),
    "headstart_fetch": (POINTER(Reply), [c_void_p, POINTER(Fetch), c_double, POINTER(Callbacks), c_void_p]),
}


def load(path: str) -> ctypes.CDLL:
    """OSError where that can't be done.

    The library's gRPC and protobuf are seen by nobody else in the process (RTLD_LOCAL), and it sees its own before those that
    others have made global (RTLD_DEEPBIND).
    """
    library = ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW | os.RTLD_DEEPBIND)
    version = library.headstart_abi_version()
    if version != VERSION:
        raise OSError(f"{path} has version {version} of the ABI, this package needs {VERSION}")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
