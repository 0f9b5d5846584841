"""Headstart as the prefill node of an unmodified vLLM: a consumer-only KV connector.

    --kv-transfer-config '{"kv_connector": "HeadstartConnector", "kv_role": "kv_consumer",
                           "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": {"targets": ["127.0.0.1:8443"]}}'

How it goes. The scheduler side sends the prompt with detached KV, and lets vLLM wait for the answer. When the server has
accepted it, vLLM allocates blocks for all tokens but the last one, and parks the request; the metadata of the step tells all
ranks where the KV is. Each fetches its own heads, and writes pages to its blocks as they come, while the server still computes.
When a rank's stream has ended and passed every check it reports the request as received; when all have, vLLM computes the last
token itself (Headstart's own first token is not needed) and decodes, and the KV is given back to the server.

What a server refuses is computed here without having had blocks, or fails, as kv_load_failure_policy says; so does a load that
fails, whose blocks are reported as invalid.
"""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from headstart_vllm.options import Options
from headstart_vllm.scheduler_side import SchedulerSide
from headstart_vllm.stats import HeadstartPromMetrics, HeadstartStats
from headstart_vllm.worker_side import WorkerSide


class HeadstartConnector(KVConnectorBase_V1):
    """vLLM makes one in the scheduler and one in each worker; only metadata.Metadata goes across."""

    def __init__(self, vllm_config, role, kv_cache_config) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config = self._kv_transfer_config
        options = Options.of_config(config.kv_connector_extra_config)
        if config.kv_role != "kv_consumer":
            raise ValueError(f"HeadstartConnector: kv_role={config.kv_role} is not kv_consumer")
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, options, fails=config.kv_load_failure_policy == "fail")
        else:
            self._worker = WorkerSide(vllm_config, options)

    def shutdown(self) -> None:
        (self._scheduler or self._worker).shutdown()

    def get_kv_connector_stats(self) -> HeadstartStats | None:
        return self._scheduler.stats.take() if self._scheduler else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict | None = None) -> HeadstartStats:
        return HeadstartStats(data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> HeadstartPromMetrics:
        return HeadstartPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.num_tokens_to_load(request, num_computed_tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self._scheduler.on_blocks(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output):
        return self._scheduler.take_metadata()

    def update_connector_output(self, connector_output) -> None:
        self._scheduler.on_worker_output(connector_output)

    def request_finished(self, request, block_ids) -> tuple[bool, dict | None]:
        self._scheduler.on_finished(request.request_id)
        return False, None  # nothing is sent from here: the blocks are free

    # ---- worker

    def register_kv_caches(self, kv_caches) -> None:
        self._worker.find_layers(kv_caches)

    def start_load_kv(self, forward_context, **kwargs) -> None:
        self._worker.start(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid_blocks()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: vLLM runs a request when its whole load was reported."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs) -> None:
        """A consumer saves nothing."""

    def wait_for_save(self) -> None:
        """A consumer saves nothing."""
