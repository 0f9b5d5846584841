"""What fp8 KV stands for: OCP E4M3 numbers times float32 scales."""

from __future__ import annotations

import numpy as np

SCALE_BYTES = 4


def _numbers() -> np.ndarray:
    """What each of the 256 bytes means, float32."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    magnitude[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte < 128, magnitude, -magnitude).astype(np.float32)


_NUMBERS = _numbers()


def multiply_out(data: np.ndarray, dims: tuple[int, ...], numpy_dtype: np.dtype) -> np.ndarray:
    """A page of the wire, bytes: scales float32 [K, V][kv_heads], then numbers [K, V][kv_heads][tokens][head_dim] (`dims`). The
    float32 products, or the bits of these rounded to bfloat16 (nearest, ties to even) where numpy_dtype has two bytes."""
    scale_bytes = dims[0] * dims[1] * SCALE_BYTES
    scales = data[:scale_bytes].view("<f4").reshape(*dims[:2], 1, 1)
    products = _NUMBERS[data[scale_bytes:].reshape(dims)] * scales
    if numpy_dtype.itemsize == 4:
        return products
    bits = products.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
