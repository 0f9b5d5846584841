"""When a call is tried again."""

from __future__ import annotations

import random
import time

import grpc

from headstart.cancel import CancelToken
from headstart.errors import HeadstartError

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0


def pause_before_retry(error: HeadstartError, failures: int, max_attempts: int, deadline: float, cancel: CancelToken) -> None:
    """Waits as long as the server suggests, else for a time that doubles, +-20 %. Raises the error where trying again makes no
    sense: it is not UNAVAILABLE, it was the last attempt, or there is no time."""
    pause_s = error.retry_delay_s
    if pause_s is None:
        pause_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (failures - 1)) * random.uniform(0.8, 1.2)
    last = failures >= max_attempts or time.monotonic() + pause_s >= deadline
    if error.code is not grpc.StatusCode.UNAVAILABLE or last:
        raise error
    if cancel.wait(pause_s):
        raise HeadstartError(grpc.StatusCode.CANCELLED, "cancelled between two attempts")
