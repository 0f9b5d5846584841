"""Client of the Headstart prefill server: prompt token ids in, checked KV cache and first token out."""

from headstart.attention import Attention, Sampling
from headstart.cancel import CancelToken
from headstart.client import PrefillClient
from headstart.errors import FieldViolation, HeadstartDataLoss, HeadstartError
from headstart.kv_memory import KvDestination, KvShape, contiguous
from headstart.options import Expectation, KvLocation, Part, Tls
from headstart.result import Estimate, KvResult, PrefillResult, Statistics, Timing
from headstart.transformers_cache import TorchMemory, to_dynamic_cache

__all__ = [
    "Attention",
    "CancelToken",
    "Estimate",
    "Expectation",
    "FieldViolation",
    "HeadstartDataLoss",
    "HeadstartError",
    "KvDestination",
    "KvResult",
    "KvShape",
    "Part",
    "KvLocation",
    "PrefillClient",
    "PrefillResult",
    "Sampling",
    "Statistics",
    "Timing",
    "Tls",
    "TorchMemory",
    "contiguous",
    "to_dynamic_cache",
]
