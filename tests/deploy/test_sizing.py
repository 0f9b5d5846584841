"""The resources of the pods follow from what `headstart inspect` plans for their model and options."""

import json
import struct
import subprocess

import pytest

from live import headstart
from manifests import container_of, render, server_config

GIB = 1 << 30
# The model that each overlay names: what its config.json says.
MODELS = {
    "cpu-demo": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                 "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
                 "tie_word_embeddings": True},
    "h100": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
             "tie_word_embeddings": False},
}


def write_shape(folder, model):
    """A model directory with the right tensors and no data: the file is a hole of the right size."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
              "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16", **model}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, heads, width = model["hidden_size"], model["head_dim"], model["intermediate_size"]
    queries, keys = model["num_attention_heads"] * heads, model["num_key_value_heads"] * heads
    shapes = {"model.embed_tokens": [model["vocab_size"], hidden], "model.norm": [hidden]}
    if not model["tie_word_embeddings"]:
        shapes["lm_head"] = [model["vocab_size"], hidden]
    for layer in range(model["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.input_layernorm": [hidden], f"{name}.post_attention_layernorm": [hidden],
                   f"{name}.self_attn.q_proj": [queries, hidden], f"{name}.self_attn.k_proj": [keys, hidden],
                   f"{name}.self_attn.v_proj": [keys, hidden], f"{name}.self_attn.o_proj": [hidden, queries],
                   f"{name}.mlp.gate_proj": [width, hidden], f"{name}.mlp.up_proj": [width, hidden],
                   f"{name}.mlp.down_proj": [hidden, width]}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


@pytest.fixture(params=sorted(MODELS))
def planned(request, tmp_path):
    """(overlay's container, what inspect prints for it)."""
    write_shape(tmp_path, MODELS[request.param])
    config = server_config(render(request.param))
    flags = [f"--{name}={config[name]}" for name in ("device", "max-prompt-tokens", "kv-pool-tokens") if name in config]
    done = subprocess.run([headstart(), "inspect", f"--model={tmp_path}", "--json", *flags], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return config, container_of(render(request.param)), json.loads(done.stdout)


def bytes_of(quantity):
    """Of a Kubernetes quantity like 512Mi or 2Gi."""
    return int(quantity[:-2]) * {"Mi": GIB >> 10, "Gi": GIB}[quantity[-2:]]


def test_memory_holds_what_is_planned(planned):
    config, container, plan = planned
    total, limit = plan["memory_bytes"]["total"], bytes_of(container["resources"]["limits"]["memory"])
    print(f"planned {total / GIB:.2f} GiB {plan['memory_bytes']}")
    if config["device"] == "cuda":
        assert total < 0.9 * 80e9, "an H100 has 80 GB"
        assert plan["stored_weight_bytes"] < limit, "the files pass through the page cache of the pod"
    else:
        # Beside the plan: the process, requests that are received, KV that waits for its clients.
        assert 1.25 * total < limit < 3 * total
