"""Takes the KV of one prompt from the receiver, and writes it to vLLM's cache while more of it comes."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import torch
from headstart import KvDestination, KvShape

from headstart_vllm.host_memory import HostMemory
from headstart_vllm.metadata import Load

_TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class CacheWriter:
    """`into` is the receiver's memory for the KV; write_arrived() puts what has come there to its blocks.

    The KV lies in host memory as pages of the wire, [layers][pages][K, V][kv_heads][page_tokens][head_dim], so that pages that
    follow one another are one copy. From there it goes through the attention layer's own do_kv_cache_update, which the forward
    pass itself calls: how keys and values lie inside a block is the backend's affair. On a GPU all this runs on a stream of its
    own, behind `after`: what was under way when the blocks were handed out may still write to them.

    layers: the attention layers in the model's order, each with its cache. dtype: that vLLM computes in.
    """

    def __init__(
        self, layers: list, load: Load, block_size: int, dtype: torch.dtype, after: torch.cuda.Event | None = None
    ) -> None:
        self._layers = layers
        self._load = load
        self._dtype = dtype
        self._device = layers[0][1].device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with self._on_stream():
            if after is not None:
                self._stream.wait_event(after)
            self._slots = _slots(load, block_size).to(self._device)
        self._memory_of = contextlib.ExitStack()
        self._kv: torch.Tensor | None = None
        self._shape: KvShape | None = None
        self._arrived = self._written = np.zeros((0, 0), np.uint8)
        self.begun = threading.Event()  # there is memory, so that pages may come

    def into(self, memory: HostMemory):
        """For PrefillClient.fetch, which calls it once."""

        def give(shape: KvShape) -> KvDestination:
            first = shape.token_begin // shape.block_tokens
            num_layers, num_pages = shape.arrived_dims
            dims = (num_layers, num_pages, 2, shape.num_kv_heads, shape.block_tokens, shape.head_dim)
            dtype = _TORCH_DTYPES[shape.dtype]
            num_bytes = int(np.prod(dims)) * dtype.itemsize
            kv = self._memory_of.enter_context(memory.lend(num_bytes))[:num_bytes].view(dtype).view(dims)
            arrived, self._written = np.zeros(shape.arrived_dims, np.uint8), np.zeros(shape.arrived_dims, np.uint8)
            self._kv, self._shape, self._arrived = kv, shape, arrived
            self.begun.set()
            planes = [(layer[:, 0], layer[:, 1]) for layer in kv]
            return KvDestination(planes, range(num_pages), first * shape.block_tokens, arrived)

        return give

    def write_arrived(self) -> None:
        """All pages that are there and were not written before."""
        new = self._arrived & ~self._written & 1
        with self._on_stream():
            for layer in np.flatnonzero(new.any(axis=1)):
                for begin, end in _runs(new[layer]):
                    self._write(layer, begin, end)
        self._written |= new

    def check_all_written(self) -> None:
        """RuntimeError: pages are missing. The receiver counted them too."""
        if not self._written.size or not self._written.all():
            raise RuntimeError(f"{self._written.sum()} of {self._written.size} pages were written")

    def close(self) -> None:
        """Waits for the stream, and gives the memory back: the receiver's call has ended."""
        if self._stream is not None:
            self._stream.synchronize()
        self._memory_of.close()

    def _write(self, number: int, begin: int, end: int) -> None:
        """Pages [begin, end) of one layer, without tokens that the load does not ask for."""
        shape, load, (layer, cache) = self._shape, self._load, self._layers[number]
        first_token = (shape.token_begin // shape.block_tokens + begin) * shape.block_tokens
        token_begin = max(first_token, load.begin)
        token_end = min(first_token + (end - begin) * shape.block_tokens, load.end)
        if token_begin >= token_end:
            return
        pages = self._kv[number, begin:end].to(self._device, non_blocking=True)
        # [pages][K, V][heads][page_tokens][dim] to [K, V][tokens][heads][dim]
        kv = pages.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, token_begin - first_token : token_end - first_token]
        keys, values = kv.to(self._dtype).contiguous()
        slots = self._slots[token_begin - load.begin : token_end - load.begin]
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)

    def _on_stream(self):
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()


def _slots(load: Load, block_size: int) -> torch.Tensor:
    """Where the tokens of the load go: int64, block * block_size + place in the block."""
    positions = torch.arange(load.begin, load.end)
    blocks = torch.tensor(load.block_ids, dtype=torch.int64)
    return blocks[positions // block_size] * block_size + positions % block_size


def _runs(marks: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of the ones that lie side by side."""
    edges = np.flatnonzero(np.diff(marks, prepend=0, append=0))
    return list(zip(edges[::2], edges[1::2]))
