"""Host memory that KV comes to: used again, and pinned where there is a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_GRAIN = 16 << 20


class HostMemory:
    """Thread-safe. keep_bytes: of memory that nobody uses, kept for later; to pin memory, or to touch new memory for the first
    time, takes longer than to receive KV."""

    def __init__(self, keep_bytes: int, pin: bool) -> None:
        self._keep_bytes = keep_bytes
        self._pin = pin
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []

    @contextlib.contextmanager
    def lend(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """At least so many bytes (uint8), until it is left."""
        memory = self._take(num_bytes)
        try:
            yield memory
        finally:
            self._give_back(memory)

    def _take(self, num_bytes: int) -> torch.Tensor:
        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if num_bytes <= memory.numel()]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        memory = torch.empty(-(-num_bytes // _GRAIN) * _GRAIN, dtype=torch.uint8)
        if self._pin:
            _check(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0), "cudaHostRegister")
        return memory

    def _give_back(self, memory: torch.Tensor) -> None:
        with self._lock:
            self._free.append(memory)
            kept = sum(free.numel() for free in self._free)
            while kept > self._keep_bytes:
                kept -= self._drop(self._free.pop(0))

    def close(self) -> None:
        """Nothing is lent."""
        with self._lock:
            while self._free:
                self._drop(self._free.pop())

    def _drop(self, memory: torch.Tensor) -> int:
        if self._pin:
            _check(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()), "cudaHostUnregister")
        return memory.numel()


def _check(error, what: str) -> None:
    if int(error) != 0:
        raise RuntimeError(f"{what}: CUDA error {int(error)}")
