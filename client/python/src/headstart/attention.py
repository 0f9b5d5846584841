"""Options of a request, as plain values; the server checks them against its model."""

from __future__ import annotations

import dataclasses

from headstart.v1 import prefill_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Attention:
    """How attention picks key blocks: a preset, single values overridden. None leaves the preset's value.

    preset: "exact" (dense), "paper", "balanced", "fast", or "" for the server's default.
    budget: "own", "shared", "row", or "" for the preset's. The other fields are those of AttentionOptions in the proto.
    """

    preset: str = ""
    num_proxies: int | None = None
    stride: int | None = None
    budget: str = ""
    gamma: float | None = None
    floor_tokens: int | None = None
    sink_blocks: int | None = None
    local_blocks: int | None = None
    dense_tail_blocks: int | None = None
    dense_below_tokens: int | None = None

    def to_proto(self) -> pb.AttentionOptions:
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("preset", "budget") and v is not None}
        return pb.AttentionOptions(
            preset=_enum_value(pb.AttentionPreset, "ATTENTION_PRESET_", "preset", self.preset),
            budget=_enum_value(pb.BudgetRule, "BUDGET_RULE_", "budget", self.budget),
            **values,
        )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the first token is drawn; temperature 0 is greedy, top_k 0 and top_p 0 mean all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0

    def to_proto(self) -> pb.SamplingOptions:
        return pb.SamplingOptions(**dataclasses.asdict(self))


def attention_proto(attention: Attention | str) -> pb.AttentionOptions:
    """Of an Attention, or of the name of a preset."""
    return (Attention(preset=attention) if isinstance(attention, str) else attention).to_proto()


def _enum_value(enum, prefix: str, field: str, name: str) -> int:
    known = {key.removeprefix(prefix).lower(): value for key, value in enum.items() if value != 0}
    if name and name not in known:
        raise ValueError(f"{field}={name!r} is not one of {', '.join(sorted(known))}")
    return known[name] if name else 0
