"""Where the Python client puts KV: the caller's memory, contiguous or paged, NumPy or torch."""

import dataclasses

import numpy as np
import pytest
import torch
from headstart import KvDestination, KvShape, TorchMemory, contiguous, to_dynamic_cache
from headstart.v1 import prefill_pb2 as pb


from fake_server import HEAD_DIM, KV_HEADS, LAYERS, TOKENS, make_kv, make_stream

NUM_PAGES = 16
EMPTY = 0xAAAA

# Caches as engines have them: the whole memory, and K and V of each layer as [pages][kv_heads][page_tokens][head_dim].
LAYOUTS = {
    "K and V apart, heads before tokens": lambda p: _planes(
        (LAYERS, 2, NUM_PAGES, KV_HEADS, p, HEAD_DIM), lambda l: (l[0], l[1])
    ),
    "K and V apart, tokens before heads": lambda p: _planes(
        (LAYERS, 2, NUM_PAGES, p, KV_HEADS, HEAD_DIM), lambda l: (l[0].swapaxes(1, 2), l[1].swapaxes(1, 2))
    ),
    "K and V in a page": lambda p: _planes((LAYERS, NUM_PAGES, 2, KV_HEADS, p, HEAD_DIM), lambda l: (l[:, 0], l[:, 1])),
    "K and V in a row": lambda p: _planes(
        (LAYERS, NUM_PAGES, KV_HEADS, p, 2 * HEAD_DIM), lambda l: (l[..., :HEAD_DIM], l[..., HEAD_DIM:])
    ),
}


def _planes(shape, split):
    cache = np.full(shape, EMPTY, np.uint16)
    return cache, [split(layer) for layer in cache]


def gather(planes, page_table, page_tokens, token_begin, begin):
    """[layers][2][kv_heads][tokens from `begin` on][head_dim] out of a paged cache."""
    slots = [divmod(token - token_begin, page_tokens) for token in range(begin, len(TOKENS))]
    return np.array([[np.stack([plane[page_table[i], :, s] for i, s in slots], axis=1) for plane in kv] for kv in planes])


@pytest.mark.parametrize("page_tokens", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skip_tokens", [0, 4, 6])
def test_fills_pages_of_any_layout_and_nothing_else(prefill, layout, page_tokens, skip_tokens):
    kv = make_kv()
    cache, planes = LAYOUTS[layout](page_tokens)
    table = np.random.default_rng(7).permutation(NUM_PAGES)[: -(-len(TOKENS) // page_tokens)]
    result, _ = prefill(
        make_stream(kv, skip_tokens=skip_tokens), skip_tokens=skip_tokens, into=lambda shape: KvDestination(planes, table)
    )
    assert result.kv is None
    np.testing.assert_array_equal(gather(planes, table, page_tokens, 0, skip_tokens), kv[:, :, :, skip_tokens:])
    written = LAYERS * 2 * KV_HEADS * (len(TOKENS) - skip_tokens) * HEAD_DIM
    assert (cache != EMPTY).sum() == written


def test_a_page_table_may_begin_behind_the_first_token(prefill):
    kv = make_kv()
    _, planes = LAYOUTS["K and V in a page"](4)
    prefill(make_stream(kv, skip_tokens=6), skip_tokens=6, into=lambda shape: KvDestination(planes, [9, 3], token_begin=4))
    np.testing.assert_array_equal(gather(planes, [9, 3], 4, 4, 6), kv[:, :, :, 6:])


def test_pages_that_nothing_is_written_to_are_not_looked_at(prefill):
    kv = make_kv()
    _, planes = LAYOUTS["K and V in a page"](4)
    prefill(make_stream(kv, skip_tokens=8), skip_tokens=8, into=lambda shape: KvDestination(planes, [-1, -1, 2]))
    np.testing.assert_array_equal(gather(planes, [-1, -1, 2], 4, 0, 8), kv[:, :, :, 8:])


@pytest.mark.parametrize("skip_tokens", [0, 5])
def test_new_memory_holds_the_tokens_that_come(prefill, skip_tokens):
    kv = make_kv()
    result, server = prefill(make_stream(kv, skip_tokens=skip_tokens), skip_tokens=skip_tokens)
    np.testing.assert_array_equal(result.kv, kv[:, :, :, skip_tokens:])
    assert server.requests[0].skip_tokens == skip_tokens
    assert result.num_tokens == len(TOKENS)


@pytest.mark.parametrize(
    "torch_dtype, numpy_dtype, wire_dtype",
    [
        (torch.bfloat16, np.uint16, pb.KV_DTYPE_BF16),
        (torch.float16, np.float16, pb.KV_DTYPE_F16),
        (torch.float32, np.float32, pb.KV_DTYPE_F32),
    ],
)
def test_fills_torch_tensors(prefill, torch_dtype, numpy_dtype, wire_dtype):
    kv, memory = make_kv(numpy_dtype), TorchMemory()
    prefill(make_stream(kv, wire_dtype), into=memory)
    assert memory.tensor.dtype == torch_dtype
    assert memory.tensor.is_pinned() == torch.cuda.is_available()
    np.testing.assert_array_equal(memory.numpy(), kv)
    values = kv if numpy_dtype != np.uint16 else (kv.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(memory.tensor.float().numpy(), values.astype(np.float32))


@pytest.mark.parametrize("numpy_dtype, wire_dtype", [(np.uint16, pb.KV_DTYPE_BF16), (np.float32, pb.KV_DTYPE_F32)])
def test_a_dynamic_cache_holds_copies(prefill, monkeypatch, numpy_dtype, wire_dtype):
    class KeepsWhatItGets(list):  # as DynamicCache does in some versions of transformers
        def update(self, k, v, layer):
            self.extend((k, v))

    monkeypatch.setattr("transformers.DynamicCache", KeepsWhatItGets)
    result, _ = prefill(make_stream(make_kv(numpy_dtype), wire_dtype))
    cache = to_dynamic_cache(result)
    before = [tensor.clone() for tensor in cache]
    result.kv.fill(0)
    assert len(cache) == 2 * LAYERS
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(cache, before))


def test_fills_a_paged_torch_cache(prefill):
    kv = make_kv()
    cache = torch.zeros((LAYERS, 2, NUM_PAGES, 4, KV_HEADS, HEAD_DIM), dtype=torch.bfloat16)
    layers = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in cache]
    prefill(make_stream(kv), into=lambda shape: KvDestination(layers, torch.tensor([5, 2, 8])))
    planes = [tuple(plane.view(torch.int16).numpy().view(np.uint16) for plane in layer) for layer in layers]
    np.testing.assert_array_equal(gather(planes, [5, 2, 8], 4, 0, 0), kv)


def _array(*dims, dtype=np.uint16):
    return np.zeros((LAYERS, 2, *dims), dtype)


def _read_only():
    array = _array(KV_HEADS, len(TOKENS), HEAD_DIM)
    array.flags.writeable = False
    return contiguous(array)


def _uneven():
    planes = [np.zeros((4, KV_HEADS, 4, HEAD_DIM), np.uint16) for _ in range(2 * LAYERS - 1)]
    planes.append(np.zeros((4, 4, KV_HEADS, HEAD_DIM), np.uint16).swapaxes(1, 2))
    return KvDestination(list(zip(planes[::2], planes[1::2])), [0, 1, 2])


def _paged(table, token_begin=0):
    planes = np.zeros((LAYERS, 2, 4, KV_HEADS, 4, HEAD_DIM), np.uint16)
    return KvDestination([(k, v) for k, v in planes], table, token_begin)


MISFITS = {
    "too few layers": (lambda: contiguous(_array(KV_HEADS, 11, HEAD_DIM)[1:]), "has 2 layers, the KV 3"),
    "other heads": (lambda: contiguous(_array(3, 11, HEAD_DIM)), "has shape"),
    "other head_dim": (lambda: contiguous(_array(KV_HEADS, 11, 4)), "has shape"),
    "no pages": (lambda: contiguous(_array(KV_HEADS, 0, HEAD_DIM)), "has shape"),
    "too few tokens": (lambda: contiguous(_array(KV_HEADS, 10, HEAD_DIM)), "the prompt needs 2"),
    "other size of elements": (lambda: contiguous(_array(KV_HEADS, 11, HEAD_DIM, dtype=np.float32)), "float32, the KV bf16"),
    "torch elements of 1 byte": (lambda: contiguous(torch.zeros((LAYERS, 2, 2, 11, 8), dtype=torch.uint8)), "the KV bf16"),
    "torch device": (lambda: contiguous(torch.zeros((LAYERS, 2, 2, 11, 8), device="meta")), "not in host memory"),
    "read-only": (_read_only, "read-only"),
    "strided rows": (lambda: contiguous(_array(KV_HEADS, 11, 2 * HEAD_DIM)[..., ::2]), "not contiguous"),
    "backward rows": (lambda: contiguous(_array(KV_HEADS, 11, HEAD_DIM)[:, :, ::-1]), "strides"),
    "uneven planes": (_uneven, "several shapes or strides"),
    "short page table": (lambda: _paged([0, 1]), "page_table has 2 pages, the prompt needs 3"),
    "page twice": (lambda: _paged([0, 1, 0]), "twice"),
    "page outside": (lambda: _paged([0, 1, 4]), "not in"),
    "negative page": (lambda: _paged([0, -1, 2]), "not in"),
    "begins behind the KV": (lambda: _paged([0, 1, 2], token_begin=4), "begins at token 4, the KV at 0"),
}


@pytest.mark.parametrize("make, message", MISFITS.values(), ids=MISFITS.keys())
def test_memory_that_does_not_fit_is_refused_before_the_first_byte(prefill, make, message):
    destination = make()
    with pytest.raises(ValueError, match=message):
        prefill(make_stream(), into=lambda shape: destination)


def test_what_a_callback_raises_ends_the_call(prefill):
    class Full(Exception):
        pass

    def no_memory(shape):
        raise Full(shape.nbytes)

    with pytest.raises(Full, match=str(make_kv().nbytes)):
        prefill(make_stream(), into=no_memory)
    with pytest.raises(Full):
        prefill(make_stream(), on_layer=lambda layer, kv: no_memory(KvShape(3, 2, 11, 8, "bf16", 0, 4)))


def test_layers_in_memory_of_the_callers_are_told_without_it(prefill):
    seen = []
    _, planes = LAYOUTS["K and V in a page"](4)
    into = lambda shape: KvDestination(planes, [0, 1, 2])
    prefill(make_stream(), into=into, on_layer=lambda layer, kv: seen.append((layer, kv)))
    assert seen == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("skip_tokens", [0, 6])
def test_says_which_pages_have_arrived(prefill, skip_tokens):
    """When a layer is whole all its pages are marked, and none of later layers' last pieces."""
    kv, marks = np.zeros((LAYERS, 2, KV_HEADS, len(TOKENS) - skip_tokens, HEAD_DIM), np.uint16), []
    seen = []

    def into(shape):
        assert shape.arrived_dims == (LAYERS, 3 - skip_tokens // 4)
        marks.append(np.zeros(shape.arrived_dims, np.uint8))
        return dataclasses.replace(contiguous(kv, shape.token_begin), arrived=marks[0])

    prefill(
        make_stream(skip_tokens=skip_tokens),
        skip_tokens=skip_tokens,
        into=into,
        on_layer=lambda layer, _: seen.append(marks[0].all(axis=1).tolist()),
    )
    assert seen == [[i <= layer for i in range(LAYERS)] for layer in range(LAYERS)]


@pytest.mark.parametrize("shape, dtype", [((LAYERS, 2), np.uint8), ((LAYERS - 1, 3), np.uint8), ((LAYERS, 3), np.int16)])
def test_refuses_marks_of_other_pages(prefill, shape, dtype):
    kv = np.zeros((LAYERS, 2, KV_HEADS, len(TOKENS), HEAD_DIM), np.uint16)
    with pytest.raises(ValueError, match="arrived is"):
        prefill(make_stream(), into=lambda _: dataclasses.replace(contiguous(kv), arrived=np.zeros(shape, dtype)))
