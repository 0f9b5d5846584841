"""The connector's half in a worker of vLLM: fetches the rank's part of the KV, and writes it to the cache."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import threading
import time

import torch
from headstart import CancelToken, KvResult
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from headstart_vllm.cache_writer import CacheWriter
from headstart_vllm.clients import Clients
from headstart_vllm.host_memory import HostMemory
from headstart_vllm.metadata import Load, Metadata
from headstart_vllm.model import Model
from headstart_vllm.options import Options

logger = init_logger("vllm.headstart")

_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
_POLL_S = 0.002


class WorkerSide:
    """Loads run on threads of their own; the other methods are called by the worker's thread, and do not wait."""

    def __init__(self, vllm_config, options: Options) -> None:
        self._options = options
        self._vllm_config = vllm_config
        self._model = Model.of_vllm(vllm_config, options.model_hash, options.kv_dtype)
        self._block_size = vllm_config.cache_config.block_size
        self._clients = Clients(options)
        self._layers: list[tuple[torch.nn.Module, torch.Tensor]] = []  # with their caches
        self._rank = 0
        self._memory = HostMemory(options.host_memory_bytes, pin=False)
        self._loaders = concurrent.futures.ThreadPoolExecutor(options.max_loads, "headstart-load")
        self._fetchers = concurrent.futures.ThreadPoolExecutor(options.max_loads, "headstart-fetch")
        self._lock = threading.Lock()
        self._cancels: dict[str, CancelToken] = {}
        self._finished: set[str] = set()
        self._invalid_blocks: set[int] = set()

    def find_layers(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """ValueError: the model is not built of attention layers that Headstart has KV for."""
        modules = self._vllm_config.compilation_config.static_forward_context
        named = [(_LAYER_NUMBER.search(name), modules[name], cache) for name, cache in kv_caches.items()]
        numbered = {int(match[1]): (layer, cache) for match, layer, cache in named if match}
        if sorted(numbered) != list(range(self._model.num_layers)) or len(kv_caches) != len(numbered):
            raise ValueError(f"caches of {sorted(kv_caches)}, expected one for each of {self._model.num_layers} layers")
        self._layers = [numbered[i] for i in range(len(numbered))]
        lacking = [type(layer.impl).__name__ for layer, _ in self._layers if not hasattr(layer.impl, "do_kv_cache_update")]
        if lacking:
            raise ValueError(f"attention backend {lacking[0]} has no do_kv_cache_update")
        self._rank = get_tensor_model_parallel_rank()
        self._memory = HostMemory(self._options.host_memory_bytes, pin=self._device.type == "cuda")

    def start(self, metadata: Metadata) -> None:
        for load in metadata.loads:
            cancel = self._cancels[load.request_id] = CancelToken()
            self._loaders.submit(self._run, load, cancel, self._event())
        for request_id in metadata.aborted:
            if request_id in self._cancels:
                self._cancels[request_id].cancel()

    def take_finished(self) -> set[str] | None:
        """Each load once, whatever came of it."""
        with self._lock:
            finished, self._finished = self._finished, set()
        for request_id in finished:
            del self._cancels[request_id]
        return finished or None

    def take_invalid_blocks(self) -> set[int]:
        # Called after take_finished(): of a load that ends in between the blocks come early, as they may, never late.
        with self._lock:
            invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def shutdown(self) -> None:
        for cancel in list(self._cancels.values()):
            cancel.cancel()
        self._loaders.shutdown(wait=True)
        self._fetchers.shutdown(wait=True)
        self._clients.close()
        self._memory.close()

    @property
    def _device(self) -> torch.device:
        return self._layers[0][1].device

    def _event(self) -> torch.cuda.Event | None:
        """Of what runs on the GPU until now."""
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

    def _run(self, load: Load, cancel: CancelToken, after: torch.cuda.Event | None) -> None:
        record = {"request": load.request_id, "rank": self._rank, "begin": load.begin, "end": load.end}
        error = None
        try:
            record |= self._load(load, cancel, after)
        except Exception as exception:  # whatever it was: vLLM must hear of it, or the request waits for ever
            error = exception
        with self._lock:
            if error is not None:
                self._invalid_blocks.update(load.own_blocks(self._block_size))
            self._finished.add(load.request_id)
        if error is not None and not cancel.cancelled:
            logger.error("%s: no KV from %s: %s: %s", load.request_id, load.target, type(error).__name__, error)
        self._log({**record, "aborted": cancel.cancelled, "error": error and f"{type(error).__name__}: {error}"})

    def _load(self, load: Load, cancel: CancelToken, after: torch.cuda.Event | None) -> dict:
        if load.location is None:
            raise RuntimeError(load.error)
        start_s = time.monotonic()
        writer = CacheWriter(self._layers, load, self._block_size, self._model.dtype, after)
        ended = threading.Event()
        fetch = self._fetchers.submit(self._fetch, load, cancel, writer)
        fetch.add_done_callback(lambda _: (ended.set(), writer.begun.set()))
        try:
            writer.begun.wait()
            while not ended.wait(_POLL_S):
                writer.write_arrived()
            result = fetch.result()
            fetched_s = time.monotonic()
            writer.write_arrived()
            writer.check_all_written()
            self._model.check_manifest(result.manifest)
        finally:
            _end(fetch, cancel)
            writer.close()
        end_s = time.monotonic()
        return {"load_s": end_s - start_s, "behind_s": end_s - fetched_s, **_numbers(result)}

    def _fetch(self, load: Load, cancel: CancelToken, writer: CacheWriter) -> KvResult:
        return self._clients.of(load.target).fetch(
            load.location,
            self._model.part(self._rank),
            num_stripes=load.num_stripes,
            into=writer.into(self._memory),
            expected=self._model.expectation(load.num_prompt_tokens, load.token_hash),
            cancel=cancel,
        )

    def _log(self, record: dict) -> None:
        if self._options.log:
            with self._lock, open(self._options.log, "a") as file:
                file.write(json.dumps({**record, "pid": os.getpid()}) + "\n")


def _end(fetch: concurrent.futures.Future, cancel: CancelToken) -> None:
    """Nothing is received any more."""
    if not fetch.done():
        cancel.cancel()
    concurrent.futures.wait([fetch])


def _numbers(result: KvResult) -> dict:
    density = result.layer_density
    return {
        "kv_bytes": result.completed.kv_bytes,
        "skipped": result.skip_tokens,
        "resumes": result.resumes,
        "server_ttft_s": result.statistics.total_s,
        "density": sum(density) / len(density),
    }
