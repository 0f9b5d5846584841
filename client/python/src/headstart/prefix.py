"""The start of a prompt: pages that the caller holds, pages from the server's cache, and their names."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from headstart.errors import HeadstartDataLoss
from headstart.options import KvLocation
from headstart.v1 import prefill_pb2 as pb

NAME_BYTES = 16


@dataclasses.dataclass(frozen=True)
class AskedPrefix:
    """What a request says about the start of its prompt. token_ids: uint32, little-endian; empty where nobody knows them."""

    skip_tokens: int = 0
    held_pages: bytes = b""
    token_ids: bytes = b""
    cache_salt: bytes = b""
    reuse: int = pb.PREFIX_REUSE_SAME_ATTENTION
    dense: bool = False  # the whole prompt

    @classmethod
    def of_request(cls, request: pb.PrefillRequest) -> AskedPrefix:
        return cls(
            skip_tokens=request.skip_tokens,
            held_pages=request.held_pages,
            token_ids=np.asarray(request.token_ids, "<u4").tobytes(),
            cache_salt=request.cache_salt,
            reuse=request.prefix_reuse,
            dense=request.attention.preset == pb.ATTENTION_PRESET_EXACT,
        )

    @classmethod
    def of_location(cls, location: KvLocation) -> AskedPrefix:
        return cls(location.skip_tokens, location.held_pages, location.token_ids)


def join_names(names: Iterable[bytes]) -> bytes:
    """One behind the other. ValueError for what is no name."""
    names = list(names)
    for name in names:
        if not isinstance(name, bytes) or len(name) != NAME_BYTES:
            raise ValueError(f"held_pages: {name!r} is no name of {NAME_BYTES} bytes")
    return b"".join(names)


def split_names(names: bytes) -> list[bytes]:
    return [names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES)]


def page_names(manifest: pb.KvManifest, token_ids: bytes) -> bytes:
    """Of the prompt's first pages, as many as have all their tokens in token_ids; see "Page hashes" in the wire format."""
    root = b"\0".join((b"headstart.v1.page", manifest.model_hash.encode(), manifest.cache_root.SerializeToString()))
    name = hashlib.sha256(root).digest()[:NAME_BYTES]
    page_bytes = 4 * manifest.layout.block_tokens
    names = []
    for begin in range(0, len(token_ids) // page_bytes * page_bytes, page_bytes):
        name = hashlib.sha256(name + token_ids[begin : begin + page_bytes]).digest()[:NAME_BYTES]
        names.append(name)
    return b"".join(names)


def check_prefix(manifest: pb.KvManifest, asked: AskedPrefix) -> None:
    """Of the first manifest, whose layout was checked: it skips what was asked for, or more of pages that are held; its pages
    are nobody else's, and of no attention that was refused."""
    _check_cache_root(manifest, asked)
    skip = manifest.skip_tokens
    _check(skip < manifest.num_tokens, f"manifest: skip_tokens={skip} leaves none of num_tokens={manifest.num_tokens}")
    if skip == asked.skip_tokens:
        return
    held = _count_held(manifest, asked) * manifest.layout.block_tokens
    _check(
        asked.skip_tokens < skip <= held,
        f"manifest: skip_tokens={skip}, the request skips {asked.skip_tokens}, and pages are held up to token {held}",
    )


def _check_cache_root(manifest: pb.KvManifest, asked: AskedPrefix) -> None:
    if not manifest.HasField("cache_root"):
        return
    root = manifest.cache_root
    _check(asked.reuse != pb.PREFIX_REUSE_NONE, "manifest: cache_root, but the request wants no cached prefix")
    same_salt = not asked.cache_salt or root.salt == asked.cache_salt
    _check(same_salt, "manifest: cache_root has another salt than the request")
    dense = asked.dense or asked.reuse == pb.PREFIX_REUSE_DENSE
    sparse = dense and root.HasField("attention")
    _check(not sparse, "manifest: cache_root has sparse attention, the request asked for dense pages")


def _count_held(manifest: pb.KvManifest, asked: AskedPrefix) -> int:
    """Pages from the first one on that the request said are held."""
    held = set(split_names(asked.held_pages))
    count = 0
    for name in split_names(page_names(manifest, asked.token_ids)):
        if name not in held:
            break
        count += 1
    return count


def check_cached_prefix(manifest: pb.KvManifest, asked: AskedPrefix) -> None:
    """Of the final manifest: cached tokens and names make sense. Names are computed again where the prompt is known."""
    cached, has_root = manifest.cached_tokens, manifest.HasField("cache_root")
    _check(
        cached < manifest.num_tokens and (has_root or not cached),
        f"completed: cached_tokens={cached} of num_tokens={manifest.num_tokens}{'' if has_root else ' without cache_root'}",
    )
    algorithm = pb.AttentionProvenance.ALGORITHM_UNSPECIFIED
    if cached:
        sparse = manifest.cache_root.HasField("attention")
        algorithm = pb.AttentionProvenance.ALGORITHM_PROXY_ATTN if sparse else pb.AttentionProvenance.ALGORITHM_DENSE
    same = manifest.cached_algorithm == algorithm
    _check(same, f"completed: cached_algorithm={manifest.cached_algorithm}, expected {algorithm}")
    hashes, pages = manifest.page_hashes, manifest.num_tokens // manifest.layout.block_tokens
    fits = len(hashes) % NAME_BYTES == 0 and len(hashes) <= (pages * NAME_BYTES if has_root else 0)
    _check(fits, f"completed: page_hashes has {len(hashes)} bytes for {pages} pages")
    if asked.token_ids and hashes:
        right = page_names(manifest, asked.token_ids).startswith(hashes)
        _check(right, "completed: page_hashes are not the names of the prompt's pages")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise HeadstartDataLoss(message)
