"""Counters, which vLLM logs and shows at its /metrics."""

from __future__ import annotations

from collections import Counter

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

_METRICS = {
    "requests": ("vllm:headstart_requests", "Prompts, by what became of them: loaded, failed, aborted, or why computed here."),
    "tokens": ("vllm:headstart_tokens", "Prompt tokens: loaded, or here already and skipped."),
}


class HeadstartStats(KVConnectorStats):
    """`data`: {metric: {outcome: count since the last step}}, of numbers only."""

    def count(self, metric: str, outcome: str, value: float = 1) -> None:
        outcomes = self.data.setdefault(metric, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + value

    def take(self) -> HeadstartStats | None:
        """What was counted since the last time; None: nothing."""
        if self.is_empty():
            return None
        taken, self.data = HeadstartStats(self.data), {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> HeadstartStats:
        for metric, outcomes in other.data.items():
            self.data[metric] = dict(Counter(self.data.get(metric, {})) + Counter(outcomes))
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"Headstart {metric} {key}": value for metric, counts in self.data.items() for key, value in counts.items()}

    def is_empty(self) -> bool:
        return not self.data


class HeadstartPromMetrics(KVConnectorPromMetrics):
    """The counters for Prometheus, with one more label, "outcome"."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            key: self._counter_cls(name=name, documentation=text, labelnames=[*labelnames, "outcome"])
            for key, (name, text) in _METRICS.items()
        }

    def observe(self, transfer_stats_data: dict, engine_idx: int = 0) -> None:
        for metric, outcomes in transfer_stats_data.items():
            for outcome, value in outcomes.items():
                self._counters[metric].labels(*self.per_engine_labelvalues[engine_idx], outcome).inc(value)
