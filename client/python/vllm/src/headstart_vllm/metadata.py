"""What the scheduler side tells the worker sides. Pickled, once a step."""

from __future__ import annotations

import dataclasses

from headstart import KvLocation
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclasses.dataclass
class Load:
    """The KV of tokens [begin, end) of one prompt, for the request's blocks. Those before `begin` are shared with others.

    location: where it is; None: nowhere, for the reason that `error` tells. num_stripes: that each rank fetches.
    """

    request_id: str
    block_ids: list[int]
    begin: int
    end: int
    target: str = ""
    location: KvLocation | None = None
    num_stripes: int = 1
    num_prompt_tokens: int = 0
    token_hash: bytes = b""
    error: str = ""

    def own_blocks(self, block_size: int) -> list[int]:
        """Blocks that this load writes to."""
        return self.block_ids[self.begin // block_size : (self.end + block_size - 1) // block_size]


@dataclasses.dataclass
class Metadata(KVConnectorMetadata):
    loads: list[Load]
    aborted: list[str]  # requests that are over while their load may still run
