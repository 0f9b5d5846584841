#!/usr/bin/env python3
"""How fast the Python client receives KV, checks it and puts it into memory that is used again.

A prompt of random tokens is computed once, its KV kept by the server, and fetched over and over: with both receivers, as several
stripes on a connection each. CPU is what this process took, system calls included.

usage: headstart serve --model DIR …; python_receiver.py --target HOST:PORT [--tokens 8192] [--stripes 1,2,4] [--repeats 5]
"""

import argparse
import contextlib
import itertools
import time

import numpy as np
import torch
from headstart import PrefillClient, contiguous, native

TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class ReusedMemory:
    """The same tensor for every call; pinned where torch has a GPU."""

    def __init__(self):
        self.tensor = None

    def __call__(self, shape):
        if self.tensor is None:
            dtype = TORCH_DTYPES[shape.dtype]
            self.tensor = torch.empty(shape.dims, dtype=dtype, pin_memory=torch.cuda.is_available())
            self.tensor.zero_()  # so that no call pays for the first touch of a page
        return contiguous(self.tensor, shape.token_begin)


@contextlib.contextmanager
def kept_kv(client, num_tokens, timeout_s):
    """The location of the KV of a prompt of random tokens, computed."""
    ids = np.random.default_rng(1).integers(0, client.model_info().vocab_size, num_tokens)
    locations = []
    client.prefill_detached(ids, locations.append, lease_s=timeout_s, timeout_s=timeout_s, attention="fast")
    try:
        yield locations[0]
    finally:
        client.release_kv(locations[0])


def measure(run, repeats):
    """Of the calls after the first, which opens the connections: KV bytes, seconds of each, CPU seconds of all."""
    num_bytes = run().completed.kv_bytes
    seconds, cpu = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return num_bytes, sorted(seconds), time.process_time() - cpu


def main():
    integers = lambda text: [int(number) for number in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--stripes", type=integers, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600, help="seconds, of a call")
    args = parser.parse_args()
    receivers = ["pure", "native"] if native.available() else ["pure"]
    memory = ReusedMemory()
    with PrefillClient(args.target) as client, kept_kv(client, args.tokens, args.timeout) as location:
        for receiver, stripes in itertools.product(receivers, args.stripes):
            with PrefillClient(args.target, use_native=receiver == "native", timeout_s=args.timeout) as reader:
                num_bytes, seconds, cpu = measure(
                    lambda: reader.fetch(location, num_stripes=stripes, into=memory), args.repeats
                )
            rates = [num_bytes / s / 1e9 for s in seconds]
            print(
                f"{receiver}, {stripes} connections, {num_bytes / 1e6:.0f} MB: median {rates[len(rates) // 2]:.2f} GB/s, "
                f"best {rates[0]:.2f}; CPU {cpu / args.repeats / num_bytes * 1e9:.2f} s/GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
