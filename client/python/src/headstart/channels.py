"""The gRPC connections of one client."""

from __future__ import annotations

import json
import os
import pathlib
import re
import ssl
import threading

import grpc

from headstart.errors import HeadstartDataLoss, HeadstartError, from_rpc_error
from headstart.options import ConnectionOptions, Tls

SERVICE = "headstart.v1.PrefillService"
# With several addresses calls take turns; one whose health service says NOT_SERVING gets none.
_SERVICE_CONFIG = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": SERVICE}}
_CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    # Retries are prefill()'s: gRPC's own would keep a copy of the prompt, and know nothing of chunks.
    ("grpc.enable_retries", 0),
)
_HOST_PORT = re.compile(r"(?:\[([^\]/,%]+)\]|([^\[\]:/,%]+)):(\d{1,5})")


class Channels:
    """Thread-safe. Channels connect when they are used for the first time; every one is a connection of its own. When certificate
    files have changed, what is asked for next gets new channels; calls on the old ones go on."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._files = _CertificateFiles(options.tls)
        self._lock = threading.Lock()
        self._fetch: dict[tuple[str, int], grpc.Channel] = {}
        self._main = self._open(options.target)

    @property
    def main(self) -> grpc.Channel:
        with self._lock:
            self._renew()
            return self._main

    def for_fetch(self, target: str, index: int) -> grpc.Channel:
        """Connection `index` of those for fetching from one server."""
        with self._lock:
            self._renew()
            if (target, index) not in self._fetch:
                self._fetch[target, index] = self._open(target)
            return self._fetch[target, index]

    def unary(self, channel: grpc.Channel, method: str, request, response_type, timeout_s: float):
        """One call; its response, or HeadstartError."""
        call = channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, response_type.FromString)
        try:
            return call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def fetch_target(self, fetch_address: str) -> str:
        """The gRPC target of the server that answered with this Accepted.fetch_address: the client's own target where that is
        empty. DATA_LOSS when it is no host:port, PERMISSION_DENIED when its host is neither the target's nor allowed."""
        options = self._options
        if not fetch_address:
            return options.target
        match = _HOST_PORT.fullmatch(fetch_address)
        if match is None or not 0 < int(match[3]) < 65536:
            raise HeadstartDataLoss(f"accepted: fetch_address={fetch_address} is no host:port")
        host = (match[1] or match[2]).lower()
        if host in _hosts(options.target) or {host, "*"} & set(options.allowed_fetch_hosts):
            return f"dns:///{fetch_address}"
        raise HeadstartError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"the server names {fetch_address} to fetch its KV from; {host} is neither the target's host nor among "
            "allowed_fetch_hosts",
        )

    def close(self) -> None:
        with self._lock:
            for channel in (self._main, *self._fetch.values()):
                channel.close()

    def _renew(self) -> None:
        if self._files.reload():
            # Not closed: that would cancel calls. A channel goes with its last call.
            self._fetch = {}
            self._main = self._open(self._options.target)

    def _name_of(self, target: str) -> str:
        """What a certificate must carry where a server names an IP address, which certificates of pods can't know: the host of
        the client's own target. Empty: as gRPC does it."""
        own = [host for host in _hosts(self._options.target) if _is_name(host)]
        return own[0] if own and not any(map(_is_name, _hosts(target))) else ""

    def _open(self, target: str) -> grpc.Channel:
        if self._files.credentials is None:
            return grpc.insecure_channel(target, _CHANNEL_OPTIONS)
        name = self._options.tls.server_name or self._name_of(target)
        options = [*_CHANNEL_OPTIONS, *([("grpc.ssl_target_name_override", name)] if name else [])]
        return grpc.secure_channel(target, self._files.credentials, options)


def _hosts(target: str) -> set[str]:
    """That a gRPC target names, in lower case."""
    addresses = re.sub(r"^(ipv4|ipv6|dns):(//[^/]*/)?", "", target)
    hosts = set()
    for address in addresses.split(","):
        match = _HOST_PORT.fullmatch(address)
        hosts.add((match[1] or match[2] if match else address).lower())
    return hosts


def _is_name(host: str) -> bool:
    """Not an IP address or a socket file."""
    return ":" not in host and not re.fullmatch(r"[0-9.]*", host)


class _CertificateFiles:
    """The client's certificate files, and credentials of the last set that was whole. None: no TLS."""

    def __init__(self, tls: Tls | None) -> None:
        self.credentials: grpc.ChannelCredentials | None = None
        self._tls = tls or Tls()
        self._names = [name for name in (self._tls.ca_file, self._tls.key_file, self._tls.cert_file) if name]
        if bool(self._tls.cert_file) != bool(self._tls.key_file):
            raise ValueError("tls: cert_file and key_file belong together")
        self._stamps = self._look() if tls else []
        if tls:
            self.credentials = self._read()

    def reload(self) -> bool:
        """Whether the files have changed and are a whole set: a certificate that came before its key is looked at again."""
        if self.credentials is None:
            return False
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return False
            credentials = self._read()
            if self._tls.cert_file:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self._tls.cert_file, self._tls.key_file)
            if stamps != self._look():
                return False
        except (OSError, ssl.SSLError):
            return False
        self.credentials, self._stamps = credentials, stamps
        return True

    def _look(self) -> list[tuple[int, int, int]]:
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, self._names)]

    def _read(self) -> grpc.ChannelCredentials:
        tls = self._tls
        ca, key, cert = (pathlib.Path(name).read_bytes() if name else None for name in (tls.ca_file, tls.key_file, tls.cert_file))
        return grpc.ssl_channel_credentials(ca, key, cert)
