"""KV in torch memory, and as the cache of Hugging Face transformers. Imports torch and transformers only when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headstart.kv_memory import KvDestination, KvShape, contiguous
from headstart.result import KvResult

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache


class TorchMemory:
    """Memory for prefill(into=…): a tensor [layers][2][kv_heads][tokens][head_dim] of bfloat16, float16 or float32.

    pin_memory: page-locked, so that a GPU copies it at its full speed; None is where torch has a GPU. For one call at a time;
    `tensor` is set once the prompt's manifest has come, and whole once the call has returned.
    """

    def __init__(self, pin_memory: bool | None = None) -> None:
        import torch

        self.tensor: torch.Tensor | None = None
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    def __call__(self, shape: KvShape) -> KvDestination:
        import torch

        dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[shape.dtype]
        self.tensor = torch.empty(shape.dims, dtype=dtype, pin_memory=self._pin_memory)
        return contiguous(self.tensor, shape.token_begin)

    def numpy(self) -> np.ndarray:
        """The same memory as KvResult.kv has it: bfloat16 as its bits in uint16."""
        import torch

        tensor = self.tensor
        return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_dynamic_cache(result: KvResult, device: str = "cpu") -> DynamicCache:
    """A DynamicCache of batch 1 with the prompt's KV, in the dtype that came over the wire, on `device` ("cpu", "cuda", …).

    Continue with model.generate(prompt ids + first token, past_key_values=cache): only the first token is computed. The cache
    holds copies.
    """
    import torch
    from transformers import DynamicCache

    kv = torch.from_numpy(result.kv.view(np.int16) if result.kv_dtype == "bf16" else result.kv)
    kv = kv.view(torch.bfloat16) if result.kv_dtype == "bf16" else kv
    cache = DynamicCache()
    for layer, tensors in enumerate(kv):
        k, v = tensors.to(device, copy=True)
        cache.update(k.unsqueeze(0), v.unsqueeze(0), layer)
    return cache
