"""Attention and block selection against their peers, on one GPU, in one process.

Peers: cuDNN (PyTorch's scaled_dot_product_attention) and a block-sparse attention in Triton over the same lists of blocks.
The card is at its power limit under these kernels, so everything that is compared runs interleaved, in a fresh random order
every round; a time is the median over all rounds. Every kernel is checked before it is timed.

    python3 attention_bench.py LIBRARY [dense] [sparse] [select] [--json FILE]

LIBRARY is libheadstart_bench_kernels.so of a build with HEADSTART_ENABLE_CUDA.
"""

import argparse
import ctypes
import json
import math
import random

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 128
DEVICE = torch.device("cuda")


class Problem(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "out", "pages", "page_table", "budget_ratio")]
        + [(name, ctypes.c_int64) for name in ("rows", "q_stride", "first_position")]
        + [(name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "selected", "num_proxies", "stride",
                                               "shared_budget", "dense_tail_blocks")]
        + [(name, ctypes.c_float) for name in ("gamma", "forced_density")]
    )


def device_view(pointer, shape, typestr):
    holder = type("DeviceArray", (), {"__cuda_array_interface__": dict(shape=shape, typestr=typestr, data=(pointer, False), version=3)})
    return torch.as_tensor(holder(), device=DEVICE)


class Headstart:
    """Our kernels on one random problem: q is [tokens, H d], K and V are pages in a shuffled order."""

    def __init__(self, library, heads, kv_heads, head_dim, tokens):
        self.lib = ctypes.CDLL(library)
        self.lib.HeadstartCreate.restype = ctypes.c_void_p
        for name in ("HeadstartLists", "HeadstartCounts"):
            getattr(self.lib, name).restype = ctypes.c_void_p
        self.lib.HeadstartListStride.restype = ctypes.c_int64
        self.context = ctypes.c_void_p(self.lib.HeadstartCreate(torch.cuda.get_device_properties(0).multi_processor_count))
        torch.manual_seed(1)
        self.shape = (heads, kv_heads, head_dim, tokens)
        blocks = tokens // BLOCK
        self.q = torch.randn(tokens, heads, head_dim, device=DEVICE).bfloat16()
        self.out = torch.empty_like(self.q)
        self.q_by_head = self.q.transpose(0, 1).contiguous()
        self.k = torch.randn(kv_heads, tokens, head_dim, device=DEVICE, dtype=torch.bfloat16)
        self.v = torch.randn(kv_heads, tokens, head_dim, device=DEVICE, dtype=torch.bfloat16)
        self.table = torch.randperm(blocks, device=DEVICE).int()
        self.pages = torch.empty(blocks, 2, kv_heads, BLOCK, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for plane, source in enumerate((self.k, self.v)):
            self.pages[self.table.long(), plane] = source.view(kv_heads, blocks, BLOCK, head_dim).transpose(0, 1)
        self.ratio = torch.zeros(heads, device=DEVICE)

    def problem(self, **options):
        heads, kv_heads, head_dim, tokens = self.shape
        fields = dict(q=self.q.data_ptr(), out=self.out.data_ptr(), pages=self.pages.data_ptr(), page_table=self.table.data_ptr(),
                      budget_ratio=self.ratio.data_ptr(), rows=tokens, q_stride=heads * head_dim, num_heads=heads,
                      num_kv_heads=kv_heads, head_dim=head_dim, num_proxies=1, stride=4, shared_budget=1, gamma=0.8)
        return Problem(**{**fields, **options})

    def call(self, function, problem):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if getattr(self.lib, function)(self.context, ctypes.byref(problem), stream) != 0:
            raise RuntimeError(function)

    def attention(self, **options):
        self.call("HeadstartAttention", self.problem(**options))

    def select(self, **options):
        self.ratio.zero_()
        self.call("HeadstartSelect", self.problem(**options))

    def counts(self):
        """Kept blocks of the last selection, [heads, query blocks]: a view of device memory."""
        return device_view(self.lib.HeadstartCounts(self.context), (self.shape[0], self.shape[3] // BLOCK), "<i4")

    def lists(self):
        """Their lists, head by head and row by row (KeptBlocks in kernels/cuda/launchers.h)."""
        stride = self.lib.HeadstartListStride(self.context)
        return device_view(self.lib.HeadstartLists(self.context), (self.shape[0], stride), "<i2")

    def density(self):
        blocks = self.shape[3] // BLOCK
        return self.counts().sum().item() / (self.shape[0] * blocks * (blocks + 1) / 2)

    def cudnn(self):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(self.q_by_head[None], self.k[None], self.v[None], is_causal=True,
                                                  enable_gqa=True)


@triton.jit
def block_sparse_kernel(q, k, v, out, lists, counts, list_stride, scale_log2, tokens, heads: tl.constexpr, group: tl.constexpr,
                        dim: tl.constexpr, half: tl.constexpr, block: tl.constexpr):
    """One program: one query block of one head, over its list of key blocks in pieces of `half` keys."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    queries = row * block + tl.arange(0, block)
    dims = tl.arange(0, dim)
    key_base = (head // group).to(tl.int64) * tokens * dim
    q_tile = tl.load(q + queries[:, None].to(tl.int64) * (heads * dim) + head * dim + dims[None, :])
    highest = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    acc = tl.zeros([block, dim], tl.float32)
    first = head.to(tl.int64) * list_stride + row.to(tl.int64) * (row + 1) // 2
    count = tl.load(counts + head * tl.num_programs(0) + row)
    for i in range(count):
        begin = tl.load(lists + first + i).to(tl.int32) * block
        for piece in tl.static_range(0, block, half):
            keys = begin + piece + tl.arange(0, half)
            k_tile = tl.load(k + key_base + keys[None, :] * dim + dims[:, None])
            logits = tl.dot(q_tile, k_tile) * scale_log2
            if i == 0:
                logits = tl.where(queries[:, None] >= keys[None, :], logits, float("-inf"))
            raised = tl.maximum(highest, tl.max(logits, 1))
            p = tl.exp2(logits - raised[:, None])
            shrink = tl.exp2(highest - raised)
            v_tile = tl.load(v + key_base + keys[:, None] * dim + dims[None, :])
            acc = tl.dot(p.to(tl.bfloat16), v_tile, acc * shrink[:, None])
            total = total * shrink + tl.sum(p, 1)
            highest = raised
    target = out + queries[:, None].to(tl.int64) * (heads * dim) + head * dim + dims[None, :]
    tl.store(target, (acc / total[:, None]).to(tl.bfloat16))


def triton_attention(ours, config):
    heads, kv_heads, dim, tokens = ours.shape
    half, warps, stages = config
    lists, counts = ours.lists(), ours.counts()
    block_sparse_kernel[(tokens // BLOCK, heads)](
        ours.q, ours.k, ours.v, ours.out, lists, counts, lists.stride(0),
        1.4426950408889634 / math.sqrt(dim), tokens, heads, heads // kv_heads, dim, half, BLOCK, num_warps=warps, num_stages=stages)


def interleaved(functions, seconds=0.6, rounds=6):
    """{name: median ms}. Every round visits all functions in a new order, one untimed call first."""
    order, times = random.Random(0), {name: [] for name in functions}
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, min(30, int(seconds / rounds / max(one_time(function) / 1e3, 1e-5))))
    for _ in range(rounds):
        names = list(functions)
        order.shuffle(names)
        for name in names:
            functions[name]()
            times[name] += [one_time(functions[name]) for _ in range(calls[name])]
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def one_time(function):
    """Time on the device: all launches are queued behind a short wait before the first begins."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(500_000)  # cycles
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def check(name, error, limit=8e-3):
    if not error < limit:
        raise AssertionError(f"{name}: relative error {error:.2e} is not below {limit:.0e}")


RESULTS = []


def record(**row):
    RESULTS.append(row)
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def dense(library):
    shapes = [(32, 8, 128, n) for n in (8192, 32768, 65536, 131072)] + [(28, 4, 128, 32768)]
    shapes += [(32, 8, 64, n) for n in (8192, 32768, 131072)]
    for heads, kv_heads, dim, tokens in shapes:
        ours = Headstart(library, heads, kv_heads, dim, tokens)
        ours.out.fill_(float("nan"))
        ours.attention()
        expected = ours.cudnn()[0].transpose(0, 1)
        check("dense", relative_error(ours.out, expected))
        del expected
        ms = interleaved({"ours": ours.attention, "cudnn": ours.cudnn})
        flops = 2 * tokens * tokens * dim * heads
        record(what="dense", heads=f"{heads}/{kv_heads}", d=dim, tokens=tokens, ours_ms=ms["ours"], cudnn_ms=ms["cudnn"],
               tflops=flops / ms["ours"] / 1e9, cudnn_over_ours=ms["cudnn"] / ms["ours"])
        del ours
        torch.cuda.empty_cache()


def sparse(library):
    configs = [(64, 8, 3), (128, 8, 2), (64, 4, 3)]
    for tokens in (32768, 131072, 262144):
        ours = Headstart(library, 32, 8, 128, tokens)
        if tokens > 32768:
            shared_lists(ours)
        flops = 2 * tokens * tokens * 128 * 32
        long = tokens == 262144
        for target in (0.08, 0.3, 0.1, 0.05) if long else (0.3, 0.2, 0.1, 0.05):
            options = dict(num_proxies=32, stride=16, forced_density=target)
            ours.select(**options)
            density = ours.density()
            ours.out.fill_(float("nan"))
            ours.attention(selected=1)
            mine = ours.out.clone()
            triton_attention(ours, configs[0])
            check("sparse against Triton", relative_error(mine, ours.out))
            del mine
            functions = {"ours": lambda: ours.attention(selected=1)}
            for config in configs:
                functions[f"triton {config}"] = lambda config=config: triton_attention(ours, config)
            if not long or target == 0.08:  # a second each at 256K: once is enough
                functions["dense"] = ours.attention
            if long and target == 0.08:
                functions["with selection"] = lambda: (ours.select(**options), ours.attention(selected=1))
                functions["cudnn"] = ours.cudnn
            ms = interleaved(functions, seconds=0.4, rounds=2 if long else 4)
            dense_ms = ms.get("dense", dense_ms if long else None)
            triton_ms, best = min((ms[f"triton {c}"], c) for c in configs)
            configs = [best] if tokens > 32768 else configs
            row = dict(what="sparse", tokens=tokens, density=density, blocks_per_tile=ours.counts().float().mean().item(),
                       ours_ms=ms["ours"], tflops=flops * density / ms["ours"] / 1e9, of_dense_rate=density * dense_ms / ms["ours"],
                       triton_ms=triton_ms, triton_over_ours=triton_ms / ms["ours"])
            if "cudnn" in ms:
                row |= dict(with_selection_ms=ms["with selection"], cudnn_ms=ms["cudnn"], dense_ms=dense_ms,
                            cudnn_over_ours_with_selection=ms["cudnn"] / ms["with selection"])
            record(**row)
        del ours, functions
        torch.cuda.empty_cache()


def shared_lists(ours):
    """The same with one list for the heads that read a KV head, as in g = 8; no peer."""
    tokens = ours.shape[3]
    flops = 2 * tokens * tokens * 128 * 32
    for target in (0.1, 0.05):
        ours.select(num_proxies=8, stride=4, forced_density=target)
        density = ours.density()
        ms = interleaved({"sparse": lambda: ours.attention(selected=1), "dense": ours.attention}, seconds=0.4, rounds=2)
        record(what="sparse, g = 8, s = 4", tokens=tokens, density=density, ours_ms=ms["sparse"],
               tflops=flops * density / ms["sparse"] / 1e9, of_dense_rate=density * ms["dense"] / ms["sparse"])


def select(library):
    for tokens in (32768, 131072):
        ours = Headstart(library, 32, 8, 128, tokens)
        settings = {"g=1 s=4": (1, 4), "g=32 s=16": (32, 16), "g=8 s=4": (8, 4), "g=8 s=8": (8, 8), "g=32 s=8": (32, 8)}
        functions = {name: lambda g=g, s=s: ours.select(num_proxies=g, stride=s) for name, (g, s) in settings.items()}
        functions["g=1 s=4, fixed budget"] = lambda: ours.select(num_proxies=1, stride=4, forced_density=0.1)
        functions["g=32 s=16, fixed budget"] = lambda: ours.select(num_proxies=32, stride=16, forced_density=0.1)
        for name, ms in interleaved(functions, seconds=0.2, rounds=4).items():
            record(what="select", tokens=tokens, setting=name, ms=ms)
        del ours, functions
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("parts", nargs="*", default=["dense", "sparse", "select"])
    parser.add_argument("--json")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(0), "PyTorch", torch.__version__, "cuDNN", torch.backends.cudnn.version(), flush=True)
    for part in args.parts:
        {"dense": dense, "sparse": sparse, "select": select}[part](args.library)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(RESULTS, file, indent=1)


if __name__ == "__main__":
    main()
