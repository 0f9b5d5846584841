"""Ends calls from another thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class CancelToken:
    """Give it to calls; cancel() from any thread ends them with CANCELLED. Cancelled once, a token stays it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._ends: list[Callable[[], object]] = []

    def cancel(self) -> None:
        with self._lock:
            self._event.set()
            for end in self._ends:
                end()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Waits so long, or until it is cancelled. True: it is."""
        return self._event.wait(timeout_s)

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """While it is entered, cancel() calls `end`; at once when that was before. `end` must not wait for other threads."""
        with self._lock:
            self._ends.append(end)
            if self.cancelled:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)
