"""Client of the Headstart prefill server: prompt token ids in, checked KV cache and first token out."""

from headstart.attention import Attention, Sampling
from headstart.client import PrefillClient
from headstart.errors import HeadstartDataLoss, HeadstartError
from headstart.receiver import Expectation
from headstart.result import PrefillResult, Statistics, Timing
from headstart.transformers_cache import to_dynamic_cache

__all__ = [
    "Attention",
    "Expectation",
    "HeadstartDataLoss",
    "HeadstartError",
    "PrefillClient",
    "PrefillResult",
    "Sampling",
    "Statistics",
    "Timing",
    "to_dynamic_cache",
]
