"""Keeps KV of sparse attention apart from exact KV in vLLM's own prefix cache.

vLLM keeps loaded pages in its prefix cache, under the tokens and the request's `cache_salt`, and gives them to every later
request that has both. A connector can't change the salt, so that the request has to carry one that says how its KV is made.
"""

from __future__ import annotations

import hashlib
import json

EXACT = "exact"


def cache_salt(attention: str | dict, salt: str = "") -> str:
    """The `cache_salt` of a request to vLLM whose prompt is computed with this attention (a preset's name, or the fields of
    headstart.Attention). salt: the tenant's own. Exact attention needs none."""
    return salt if attention == EXACT else f"{_prefix(attention)}{salt}"


def may_be_cached(attention: str | dict, salt: str | None) -> bool:
    """Whether pages of this attention may enter vLLM's prefix cache under this salt."""
    return attention == EXACT or (salt or "").startswith(_prefix(attention))


def _prefix(attention: str | dict) -> str:
    if isinstance(attention, str):
        return f"headstart-{attention}:"
    fields = json.dumps(attention, sort_keys=True).encode()
    return f"headstart-{hashlib.sha256(fields).hexdigest()[:16]}:"
