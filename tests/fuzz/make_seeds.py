#!/usr/bin/env python3
"""Writes the seed corpora of the fuzz targets: corpus/{config,header,index}/. No packages needed.

Inputs that a fuzzer finds worth keeping lie beside them under the names that libFuzzer gives.
"""
import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).parent / "corpus"

BASE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": [2, 3],
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, "attention_factor": 1.1}  # fmt: skip

CONFIGS = {
    "llama": BASE,
    "llama31": BASE | {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "qwen2_yarn": BASE | {"model_type": "qwen2", "rope_scaling": YARN, "use_sliding_window": False},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 32, "dtype": "bfloat16", "attention_bias": True,
                     "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "linear": BASE | {"rope_scaling": {"type": "linear", "factor": 2}, "mlp_bias": True},
    "dual_chunk": BASE | {"model_type": "qwen2", "dual_chunk_attention_config": {
        "chunk_size": 512, "local_size": 64, "original_max_position_embeddings": 512}},
    "moe": BASE | {"num_local_experts": 8},
    "window": BASE | {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
}  # fmt: skip

TENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
}
HEADERS = {
    "good": TENSORS,
    "empty": {},
    "overlap": TENSORS | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [6, 10]}},
    "hole": TENSORS | {"b": {"dtype": "F16", "shape": [1], "data_offsets": [10, 12]}},
    "huge": TENSORS | {"b": {"dtype": "F64", "shape": [1 << 40, 1 << 40], "data_offsets": [8, 12]}},
    "bits": {"a": {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}},
    "scalar": {"a": {"dtype": "C64", "shape": [], "data_offsets": [0, 8]},
               "b": {"dtype": "BOOL", "shape": [4], "data_offsets": [8, 12]}},
}  # fmt: skip

SHARD = "model-00001-of-00002.safetensors"
INDEXES = {
    "good": {"metadata": {"total_size": 12}, "weight_map": {"a": SHARD, "b": SHARD}},
    "parent": {"weight_map": {"a": "../" + SHARD}},
    "number": {"weight_map": {"a": 1}},
    "empty": {"weight_map": {}},
}


def main():
    for kind, seeds in (("config", CONFIGS), ("header", HEADERS), ("index", INDEXES)):
        folder = ROOT / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in seeds.items():
            text = json.dumps(value).encode()
            if kind == "header":
                data = b"" if name == "empty" else bytes(12)
                text = struct.pack("<Q", len(text)) + text + data
            (folder / name).write_bytes(text)


if __name__ == "__main__":
    main()
