"""What a caller says about connections, its model, and the KV that it wants."""

from __future__ import annotations

import dataclasses

from headstart.v1 import prefill_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files in PEM. ca_file: empty is the system's authorities. cert_file and key_file: both or none; the client's own (mTLS).
    server_name: expected in the server's certificate; empty is the host of the target."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""


@dataclasses.dataclass(frozen=True)
class ConnectionOptions:
    """See PrefillClient."""

    target: str
    tls: Tls | None = None
    max_attempts: int = 3
    allowed_fetch_hosts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What the receiver knows beforehand. Empty and zero: anything will do."""

    model: str = ""
    model_hash: str = ""
    num_layers: int = 0  # of the model, as are the heads
    num_kv_heads: int = 0
    head_dim: int = 0
    token_hash: bytes = b""
    num_tokens: int = 0
    kv_dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a prompt's KV: layers and KV heads from `begin` on, a count of 0 is all that follow."""

    layer_begin: int = 0
    layer_count: int = 0
    kv_head_begin: int = 0
    kv_head_count: int = 0

    def stripes(self, count: int) -> list[pb.KvPart]:
        """The part as so many streams that share its chunks."""
        return [pb.KvPart(**dataclasses.asdict(self), stripe_index=i, stripe_count=count) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class KvLocation:
    """Detached KV on its server. fetch_address: host:port, or empty for the client's own target. skip_tokens: tokens in front
    that never come, as the request said, as is held_pages: names of pages that need not come. token_ids: of the prompt, as
    little-endian uint32, where pages are held: their names are checked against it."""

    fetch_id: bytes
    fetch_address: str = ""
    skip_tokens: int = 0
    held_pages: bytes = b""
    token_ids: bytes = b""
