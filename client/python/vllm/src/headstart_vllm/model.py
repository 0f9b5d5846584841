"""What vLLM knows of its model, for comparison with what a server computed."""

from __future__ import annotations

import dataclasses

from headstart import Expectation, Part

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_ELEMENT_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "fp8_e4m3": 1}
MAX_READERS = 64  # that a request may announce


@dataclasses.dataclass(frozen=True)
class Rope:
    theta: float
    type: str
    factor: float

    @classmethod
    def of_manifest(cls, info) -> Rope:
        return cls(info.theta, info.type, info.factor)

    @classmethod
    def of_config(cls, config) -> Rope:
        """Of a configuration of transformers 5 (rope_parameters), or before (rope_theta, rope_scaling)."""
        fields = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
        theta = fields.get("rope_theta", getattr(config, "rope_theta", None))
        if theta is None:
            raise ValueError("the model's configuration has no rope_theta: Headstart has no KV for it")
        kind = fields.get("rope_type", fields.get("type", "default"))
        return cls(float(theta), kind, 1.0 if kind == "default" else float(fields.get("factor", 1.0)))


@dataclasses.dataclass(frozen=True)
class Model:
    """kv_dtype: on the wire. dtype: that vLLM computes in."""

    model_hash: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: str
    dtype: object
    rope: Rope
    num_ranks: int

    @classmethod
    def of_vllm(cls, vllm_config, model_hash: str, kv_dtype: str) -> Model:
        """ValueError: a way of running that no server has KV for."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
            if getattr(parallel, name, 1) > 1:
                raise ValueError(f"HeadstartConnector: {name}={getattr(parallel, name)} is not 1")
        if model.use_mla:
            raise ValueError("HeadstartConnector: the model has latent attention (MLA), which Headstart does not compute")
        return cls(
            model_hash=model_hash,
            num_layers=model.get_num_layers(parallel),
            num_kv_heads=model.get_total_num_kv_heads(),
            head_dim=model.get_head_size(),
            kv_dtype=kv_dtype or _DTYPES[str(model.dtype).removeprefix("torch.")],
            dtype=model.dtype,
            rope=Rope.of_config(model.hf_text_config),
            num_ranks=parallel.tensor_parallel_size,
        )

    def expectation(self, num_tokens: int, token_hash: bytes) -> Expectation:
        return Expectation(
            model_hash=self.model_hash,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            token_hash=token_hash,
            num_tokens=num_tokens,
            kv_dtype=self.kv_dtype,
        )

    def check_manifest(self, manifest) -> None:
        """What an Expectation does not say. ValueError."""
        rope = Rope.of_manifest(manifest.layout.rope)
        if rope != self.rope:
            raise ValueError(f"manifest: {rope}, this model has {self.rope}")

    def part(self, rank: int) -> Part:
        """Of a tensor-parallel rank: its KV heads. Where there are fewer heads than ranks, several ranks have the same one."""
        if self.num_kv_heads % self.num_ranks and self.num_ranks % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads can't be divided among {self.num_ranks} ranks")
        count = max(1, self.num_kv_heads // self.num_ranks)
        return Part(kv_head_begin=rank * self.num_kv_heads // self.num_ranks, kv_head_count=count)

    def readers(self, num_stripes: int) -> list:
        """Announced to the server, which then gives back what all have. Ranks that share a head can't be told apart: none are
        announced, and the server keeps everything until it is released."""
        if self.num_ranks > self.num_kv_heads:
            return []
        return [stripe for rank in range(self.num_ranks) for stripe in self.part(rank).stripes(num_stripes)]

    def rank_bytes(self, num_tokens: int) -> int:
        """On the wire, without scales."""
        heads = max(1, self.num_kv_heads // self.num_ranks)
        return 2 * self.num_layers * heads * num_tokens * self.head_dim * _ELEMENT_BYTES[self.kv_dtype]
