"""From received KV to the cache of Hugging Face transformers. Imports torch and transformers only when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headstart.result import PrefillResult

if TYPE_CHECKING:
    from transformers import DynamicCache


def to_dynamic_cache(result: PrefillResult, device: str = "cpu") -> DynamicCache:
    """A DynamicCache of batch 1 with the prompt's KV, in the dtype that came over the wire, on `device` ("cpu", "cuda", …).

    Continue with model.generate(prompt ids + first token, past_key_values=cache): only the first token is computed. The cache
    holds copies.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, kv in enumerate(result.kv):
        if result.kv_dtype == "bf16":
            tensor = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(kv)
        tensor = tensor.to(device)
        cache.update(tensor[0].unsqueeze(0), tensor[1].unsqueeze(0), layer)
    return cache
