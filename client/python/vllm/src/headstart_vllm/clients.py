"""Clients of the servers that are asked."""

from __future__ import annotations

import threading

from headstart import PrefillClient

from headstart_vllm.options import Options


class Clients:
    """One for each target, made when it is needed for the first time; thread-safe."""

    def __init__(self, options: Options) -> None:
        self._options = options.client_options()
        self._lock = threading.Lock()
        self._clients: dict[str, PrefillClient] = {}

    def of(self, target: str) -> PrefillClient:
        with self._lock:
            if target not in self._clients:
                self._clients[target] = PrefillClient(target, **self._options)
            return self._clients[target]

    def close(self) -> None:
        """No call may be under way."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()
