"""The few types of vLLM that headstart_vllm knows, for tests without vLLM. Importing this makes them `vllm`."""

import dataclasses
import enum
import logging
import pathlib
import sys
import types

import torch

from fake_server import HEAD_DIM, KV_HEADS, LAYERS, TOKENS

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "client/python/vllm/src"))


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata:
    pass


class KVConnectorBase_V1:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._metadata = None

    def bind_connector_metadata(self, metadata):
        self._metadata = metadata

    def _get_connector_metadata(self):
        return self._metadata


@dataclasses.dataclass
class KVConnectorStats:
    data: dict = dataclasses.field(default_factory=dict)


class KVConnectorPromMetrics:
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        self._counter_cls = metric_types["counter"]
        self.per_engine_labelvalues = per_engine_labelvalues


class KVConnectorFactory:
    registry = {}

    @classmethod
    def register_connector(cls, name, module_path, class_name):
        assert name not in cls.registry
        cls.registry[name] = (module_path, class_name)

    @classmethod
    def get_connector_class_by_name(cls, name):
        if name not in cls.registry:
            raise ValueError(f"Connector '{name}' is not registered.")
        return cls.registry[name]


class Rank:
    """Of the worker that is being made."""

    value = 0


def _install(name, **names):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(names)
    sys.modules[name] = module


_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
for _name in ("vllm", "vllm.distributed.kv_transfer", _CONNECTOR, f"{_CONNECTOR}.v1"):
    _install(_name)
_install("vllm.distributed", get_tensor_model_parallel_rank=lambda: Rank.value)
_install("vllm.logger", init_logger=logging.getLogger)
_install(f"{_CONNECTOR}.factory", KVConnectorFactory=KVConnectorFactory)
_install(f"{_CONNECTOR}.v1.metrics", KVConnectorStats=KVConnectorStats, KVConnectorPromMetrics=KVConnectorPromMetrics)
_install(
    f"{_CONNECTOR}.v1.base",
    KVConnectorBase_V1=KVConnectorBase_V1,
    KVConnectorMetadata=KVConnectorMetadata,
    KVConnectorRole=KVConnectorRole,
)


class Layer:
    """An attention layer whose cache lies as no other backend's does: tokens backwards, V before K, in float64."""

    def __init__(self, num_blocks, block_size, num_heads, head_dim):
        self.kv_cache = torch.full((num_blocks, num_heads, block_size, 2, head_dim), torch.nan, dtype=torch.float64)
        self.impl = self

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        assert layer is self and kv_cache is self.kv_cache
        assert key.is_contiguous() and value.is_contiguous() and slot_mapping.dtype == torch.int64
        for k, v, slot in zip(key, value, slot_mapping.tolist(), strict=True):
            block, place = divmod(slot, kv_cache.shape[2])
            kv_cache[block, :, -1 - place, 0] = v.double()
            kv_cache[block, :, -1 - place, 1] = k.double()

    def read(self, block_ids, begin, end):
        """[K, V][heads][tokens][dim] of these tokens."""
        size = self.kv_cache.shape[2]
        rows = [self.kv_cache[block_ids[t // size], :, -1 - t % size] for t in range(begin, end)]
        return torch.stack(rows, dim=1).flip(2).permute(2, 0, 1, 3)


FAKE_MODEL = (LAYERS, KV_HEADS, HEAD_DIM)


def make_config(
    extra, *, shape=FAKE_MODEL, block_size=4, num_blocks=16, ranks=1, policy="recompute", prefix_caching=True, **changes
):
    """A VllmConfig as far as it is looked at. shape: layers, KV heads, head_dim; the model of fake_server if not given."""
    num_layers, num_heads, head_dim = shape
    cache = (num_blocks, block_size, max(1, num_heads // ranks), head_dim)
    layers = {f"model.layers.{i}.self_attn.attn": Layer(*cache) for i in range(num_layers)}
    model = {
        "dtype": torch.bfloat16,
        "use_mla": False,
        "hf_text_config": types.SimpleNamespace(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
        "get_num_layers": lambda parallel: num_layers,
        "get_total_num_kv_heads": lambda: num_heads,
        "get_head_size": lambda: head_dim,
    }
    transfer = {"kv_role": "kv_consumer", "kv_load_failure_policy": policy, "kv_connector_extra_config": extra}
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(**{**model, **changes}),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1),
        cache_config=types.SimpleNamespace(block_size=block_size, enable_prefix_caching=prefix_caching),
        compilation_config=types.SimpleNamespace(static_forward_context=layers),
        kv_transfer_config=types.SimpleNamespace(**transfer),
    )


@dataclasses.dataclass
class Request:
    kv_transfer_params: dict | None = dataclasses.field(default_factory=lambda: {"headstart": {}})
    request_id: str = "cmpl-1/0"
    prompt_token_ids: list | None = dataclasses.field(default_factory=lambda: list(TOKENS))
    num_output_tokens: int = 0
    cache_salt: str | None = None
    mm_features: list = dataclasses.field(default_factory=list)
    lora_request: object = None
    pooling_params: object = None
    skip_reading_prefix_cache: bool = False

    @property
    def num_prompt_tokens(self):
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self):
        return self.num_prompt_tokens + self.num_output_tokens


@dataclasses.dataclass
class Output:
    """KVConnectorOutput, of all ranks together."""

    finished_recving: set | None
    invalid_block_ids: set


class Engine:
    """The scheduler with its workers, as far as a connector sees them. Steps where the test says so."""

    def __init__(self, extra, *, ranks=1, **options):
        from headstart_vllm.connector import HeadstartConnector

        self.scheduler = HeadstartConnector(make_config(extra, ranks=ranks, **options), KVConnectorRole.SCHEDULER, None)
        self.configs = [make_config(extra, ranks=ranks, **options) for _ in range(ranks)]
        self.workers = []
        for Rank.value, config in enumerate(self.configs):
            self.workers.append(HeadstartConnector(config, KVConnectorRole.WORKER, None))
            layers = config.compilation_config.static_forward_context
            self.workers[-1].register_kv_caches({name: layer.kv_cache for name, layer in layers.items()})
        self.finished = {}  # request id: ranks that have not reported
        self.counts = {}

    def layers(self, rank=0):
        return list(self.configs[rank].compilation_config.static_forward_context.values())

    def allocate(self, request, block_ids, num_tokens):
        blocks = types.SimpleNamespace(get_block_ids=lambda: (block_ids,))
        self.scheduler.update_state_after_alloc(request, blocks, num_tokens)

    def step(self):
        """Metadata goes to the workers; what they report goes to the scheduler side, and is returned."""
        metadata = self.scheduler.build_connector_meta(None)
        finished, invalid = set(), set()
        for worker in self.workers:
            worker.bind_connector_metadata(metadata)
            worker.start_load_kv(None)
            for request_id in worker.get_finished(set())[1] or ():
                self.finished[request_id] = self.finished.get(request_id, len(self.workers)) - 1
                if self.finished[request_id] == 0:
                    del self.finished[request_id]
                    finished.add(request_id)
            invalid |= worker.get_block_ids_with_load_errors()
        self.scheduler.update_connector_output(Output(finished or None, invalid))
        stats = self.scheduler.get_kv_connector_stats()
        for metric, outcomes in (stats.data if stats else {}).items():
            for outcome, value in outcomes.items():
                self.counts[metric, outcome] = self.counts.get((metric, outcome), 0) + value
        return finished, invalid

    def shutdown(self):
        for connector in (self.scheduler, *self.workers):
            connector.shutdown()
