"""One prompt at a server: asked for, accepted, released."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from headstart import CancelToken, Estimate, HeadstartError, KvLocation, PrefillClient

from headstart_vllm.options import Wish


class State(enum.Enum):
    ASKED = "the server has not answered"
    DECLINED = "it is to be computed here"  # what was asked for may be had, but not soon enough
    FAILED = "the server refused, or can't be reached"
    ACCEPTED = "its KV can be fetched"


class RemotePrefill:
    """run() on a thread of its own sends the prompt, and returns when it is computed; the other methods are called by the
    scheduler meanwhile."""

    def __init__(self, wish: Wish, skip_tokens: int) -> None:
        self.wish = wish
        self.skip_tokens = skip_tokens  # whose KV is here
        self.token_hash = b""  # of the prompt, set before it is sent
        self.location: KvLocation | None = None
        self.error: Exception | None = None
        self.declined = ""  # why
        self.cancel = CancelToken()
        self._lock = threading.Lock()
        self._state = State.ASKED

    @property
    def state(self) -> State:
        with self._lock:
            return self._state

    def run(self, send: Callable[[], object]) -> None:
        """send: has the prompt computed, and tells on_accepted(); unless declines()."""
        try:
            send()
        except Exception as error:  # whatever it was: the request waits for a word
            with self._lock:
                self.error = error
                self._state = State.FAILED

    def declines(self, estimate: Estimate, max_wait_s: float) -> bool:
        """Whether it had better be computed here."""
        wait_s = estimate.predicted_ttft_s
        too_long = wait_s is not None and wait_s > max_wait_s
        if estimate.accepted and not too_long:
            return False
        with self._lock:
            self.declined = f"would_be_refused_{estimate.refusal.lower()}" if estimate.refusal else "wait_too_long"
            self._state = State.DECLINED
        return True

    def on_accepted(self, location: KvLocation) -> None:
        """Of PrefillClient.prefill_detached."""
        with self._lock:
            if self.location is not None:  # another attempt of the client: the ranks fetch what the first one promised
                raise RuntimeError("the prompt was accepted before")
            self.location = location
            self._state = State.ACCEPTED

    def release(self, client: Callable[[str], PrefillClient]) -> None:
        """Nothing of it is left on the server. Where it can't be reached, the lease ends by itself."""
        with self._lock:
            location = self.location
        if location is None:
            return
        try:
            client(self.wish.target).release_kv(location)
        except HeadstartError:
            pass
