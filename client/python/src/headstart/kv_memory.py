"""Memory for the KV of one prompt: contiguous or paged, NumPy or torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from headstart import fp8

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

NUMPY_DTYPES = {"bf16": np.dtype("<u2"), "f16": np.dtype("<f2"), "f32": np.dtype("<f4")}


@dataclasses.dataclass(frozen=True)
class KvShape:
    """The KV that comes: of all layers and heads or of a part's, of the tokens from token_begin on."""

    num_layers: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    dtype: str  # "bf16", "f16" or "f32"; of fp8 the one that it is multiplied out to by default
    token_begin: int
    block_tokens: int  # of a page on the wire
    is_fp8: bool = False  # on the wire

    @property
    def dims(self) -> tuple[int, ...]:
        """[layers][K, V][kv_heads][tokens][head_dim]."""
        return (self.num_layers, 2, self.num_kv_heads, self.num_tokens, self.head_dim)

    @property
    def numpy_dtype(self) -> np.dtype:
        return NUMPY_DTYPES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.numpy_dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.num_layers * self.num_tokens * self.token_bytes

    def wire_bytes(self, token_begin: int, token_end: int) -> int:
        """Of these tokens in one layer, whole pages but for the ends of the KV."""
        count = token_end - token_begin
        if not self.is_fp8:
            return count * self.token_bytes
        pages = (token_end - 1) // self.block_tokens - token_begin // self.block_tokens + 1
        return 2 * self.num_kv_heads * (count * self.head_dim + pages * fp8.SCALE_BYTES)

    @property
    def arrived_dims(self) -> tuple[int, int]:
        """Of KvDestination.arrived; the last page holds token_end - 1."""
        return (self.num_layers, (self.token_end - 1) // self.block_tokens - self.token_begin // self.block_tokens + 1)

    @property
    def token_end(self) -> int:
        return self.token_begin + self.num_tokens


@dataclasses.dataclass(frozen=True)
class KvDestination:
    """Where KV goes. The memory is the caller's; it is written until the call returns, also when that fails.

    layers: K and V of each layer of the shape, each a NumPy array or torch CPU tensor [pages][kv_heads][page_tokens][head_dim]
    with elements of the KV's size; of fp8 KV, which is multiplied out, float32, or bfloat16 (NumPy: its bits in uint16). Views are welcome, such as `cache[:, 0]`, or `cache.transpose(1, 2)` where heads lie within
    tokens; all of the same shape and strides, head_dim contiguous.
    page_table: token t lies in page page_table[(t - token_begin) // page_tokens]. token_begin: the token in the first slot; not
    behind the first token that comes. Pages that hold only tokens before that are not looked at. arrived: uint8
    [layers][pages of the wire] (KvShape.arrived_dims), where 1 is put as soon as a page is in its place with all its heads and
    its checksum was right; for readers that go along with the call. No lock of Python is taken for it.
    """

    layers: Sequence[tuple[Array, Array]]
    page_table: Sequence[int]
    token_begin: int = 0
    arrived: np.ndarray | None = None


# Gives memory for KV of this shape. An exception ends the call with it.
IntoMemory = Callable[[KvShape], KvDestination]


def contiguous(array: Array, token_begin: int = 0) -> KvDestination:
    """The destination that an array or tensor [layers][2][kv_heads][tokens][head_dim] is, `token_begin` in its first slot."""
    return KvDestination([(layer[:1], layer[1:]) for layer in array], (0,), token_begin)


class KvPlanes:
    """A destination, checked: `layers` are NumPy arrays of `numpy_dtype`, the KV's, or of fp8 KV "<u2" (the bits of bfloat16) or
    "<f4". ValueError says what does not fit."""

    def __init__(self, destination: KvDestination, shape: KvShape) -> None:
        self.shape = shape
        self.token_begin = destination.token_begin
        self.page_table = [int(page) for page in destination.page_table]
        self.layers = [tuple(_as_numpy(plane, shape) for plane in layer) for layer in destination.layers]
        _check(len(self.layers) == shape.num_layers, f"destination has {len(self.layers)} layers, the KV {shape.num_layers}")
        first = self.layers[0][0]
        self.numpy_dtype = first.dtype
        for plane in (plane for layer in self.layers for plane in layer):
            _check_plane(plane, first, shape)
        self.num_pages, _, self.page_tokens, _ = first.shape
        self._check_page_table()
        self.arrived = destination.arrived
        if self.arrived is not None:
            _check_arrived(self.arrived, shape)

    def _check_page_table(self) -> None:
        shape, begin = self.shape, self.token_begin
        _check(0 <= begin <= shape.token_begin, f"destination begins at token {begin}, the KV at {shape.token_begin}")
        first = (shape.token_begin - begin) // self.page_tokens
        end = (shape.token_end - 1 - begin) // self.page_tokens + 1
        pages = self.page_table[first:end]
        _check(len(pages) == end - first, f"page_table has {len(self.page_table)} pages, the prompt needs {end}")
        _check(len(set(pages)) == len(pages), "a page is in page_table twice")
        _check(all(0 <= page < self.num_pages for page in pages), f"a page of page_table is not in [0, {self.num_pages})")

    def write(self, layer: int, token_begin: int, token_count: int, data: np.ndarray) -> None:
        """Puts the bytes of a chunk, pages of the wire one after the other, into their place. The chunk was checked."""
        shape = self.shape
        end = token_begin + token_count
        while token_begin < end:
            page_end = min((token_begin // shape.block_tokens + 1) * shape.block_tokens, end)
            num_bytes = shape.wire_bytes(token_begin, page_end)
            self._write_page(layer, token_begin, self._read_page(data[:num_bytes], page_end - token_begin))
            data = data[num_bytes:]
            token_begin = page_end

    def mark_arrived(self, layer: int, token_begin: int, token_count: int) -> None:
        """These tokens are in place and checked."""
        if self.arrived is not None:
            first = self.shape.token_begin // self.shape.block_tokens
            begin, last = (token // self.shape.block_tokens - first for token in (token_begin, token_begin + token_count - 1))
            self.arrived[layer, begin : last + 1] = 1

    def _read_page(self, data: np.ndarray, tokens: int) -> np.ndarray:
        """[K, V][kv_heads][tokens][head_dim] of the destination's dtype."""
        shape = self.shape
        dims = (2, shape.num_kv_heads, tokens, shape.head_dim)
        return fp8.multiply_out(data, dims, self.numpy_dtype) if shape.is_fp8 else data.view(self.numpy_dtype).reshape(dims)

    def _write_page(self, layer: int, token_begin: int, page: np.ndarray) -> None:
        k, v = self.layers[layer]
        done, tokens = 0, page.shape[2]
        while done < tokens:
            index, slot = divmod(token_begin + done - self.token_begin, self.page_tokens)
            run = min(tokens - done, self.page_tokens - slot)
            to, source = (self.page_table[index], slice(None), slice(slot, slot + run)), slice(done, done + run)
            k[to] = page[0, :, source]
            v[to] = page[1, :, source]
            done += run


def _as_numpy(plane: Array, shape: KvShape) -> np.ndarray:
    """A view with the dtype that is written."""
    name = str(plane.dtype).removeprefix("torch.")
    fits_fp8 = name in ("float32", "bfloat16", "uint16")
    _check(fits_fp8 or not shape.is_fp8, f"destination is {name}, and fp8 is multiplied out to float32 or bfloat16")
    if not isinstance(plane, np.ndarray):
        import torch

        _check(plane.device.type == "cpu", f"destination is on {plane.device}, not in host memory")
        same_size = {2: torch.int16, 4: torch.int32}.get(plane.element_size())
        _check(same_size is not None, f"destination is {plane.dtype}, the KV {shape.dtype}")
        plane = plane.detach().view(same_size).numpy()
    if shape.is_fp8:
        return plane.view("<f4" if plane.itemsize == 4 else "<u2")
    _check(plane.itemsize == shape.numpy_dtype.itemsize, f"destination is {plane.dtype}, the KV {shape.dtype}")
    return plane.view(shape.numpy_dtype)


def _check_plane(plane: np.ndarray, first: np.ndarray, shape: KvShape) -> None:
    wanted = f"[pages][{shape.num_kv_heads}][page_tokens][{shape.head_dim}]"
    fits = plane.ndim == 4 and plane.shape[1] == shape.num_kv_heads and plane.shape[3] == shape.head_dim and plane.size > 0
    _check(fits, f"destination has shape {plane.shape}, not {wanted}")
    alike = (plane.shape, plane.strides, plane.dtype) == (first.shape, first.strides, first.dtype)
    _check(alike, "the planes of the destination have several shapes or strides, or several dtypes")
    rows_are_packed = plane.strides[3] == plane.itemsize or shape.head_dim == 1
    _check(rows_are_packed and min(plane.strides) >= 0, f"destination has strides {plane.strides}: head_dim is not contiguous")
    _check(plane.flags.writeable, "destination is read-only")


def _check_arrived(arrived: np.ndarray, shape: KvShape) -> None:
    fits = arrived.dtype == np.uint8 and arrived.shape == shape.arrived_dims
    what = f"arrived is {arrived.dtype} {arrived.shape}, not uint8 {shape.arrived_dims}"
    _check(fits and arrived.flags.c_contiguous and arrived.flags.writeable, what)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
