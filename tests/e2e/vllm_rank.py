"""A rank of test_vllm_ranks in a process of its own: vLLM's worker side with a fake cache. Reads a pickle from stdin (options of
make_config, rank, block ids, metadata), writes the KV of tokens [begin, end) as [layers][2][heads][tokens][dim] to a file."""

import pickle
import sys
import time

import fake_vllm  # before what imports vllm
import numpy as np

from headstart_vllm.options import Options
from headstart_vllm.worker_side import WorkerSide


def main():
    job = pickle.load(sys.stdin.buffer)
    fake_vllm.Rank.value = job["rank"]
    config = fake_vllm.make_config(job["extra"], **job["config"])
    layers = config.compilation_config.static_forward_context
    worker = WorkerSide(config, Options.of_config(job["extra"]))
    worker.find_layers({name: layer.kv_cache for name, layer in layers.items()})
    worker.start(job["metadata"])
    while not (finished := worker.take_finished()):
        time.sleep(0.01)
    invalid = worker.take_invalid_blocks()
    worker.shutdown()
    assert finished == {job["request_id"]} and not invalid, (finished, invalid)
    (load,) = job["metadata"].loads
    np.save(job["file"], [layer.read(load.block_ids, load.begin, load.end).numpy() for layer in layers.values()])


main()
