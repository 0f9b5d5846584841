"""The resources of the pods follow from what `headstart inspect` plans for their model and options."""

import json
import re
import struct
import subprocess

import pytest

from live import headstart
from manifests import REPO, container_of, render, seconds, server_config

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


PLANNED = ("device", "max-prompt-tokens", "piece-tokens", "batch-tokens", "kv-pool-tokens", "host-kv-bytes")


def plan_of(overlay, folder, **changed):
    """What inspect prints for an overlay's model and options, some of them changed."""
    write_shape(folder, MODELS[overlay])
    config = server_config(render(overlay)) | changed
    flags = [f"--{name}={config[name]}" for name in PLANNED if name in config]
    done = subprocess.run([headstart(), "inspect", f"--model={folder}", "--json", *flags], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=sorted(MODELS))
def planned(request, tmp_path):
    """(overlay's config, its container, what inspect prints for it)."""
    objects = render(request.param)
    return server_config(objects), container_of(objects), plan_of(request.param, tmp_path)


def bytes_of(quantity):
    """Of a Kubernetes quantity like 512Mi or 2Gi."""
    return int(quantity[:-2]) * {"Mi": GIB >> 10, "Gi": GIB}[quantity[-2:]]


def test_memory_holds_what_is_planned(planned):
    config, container, plan = planned
    total, limit = plan["memory_bytes"]["total"], bytes_of(container["resources"]["limits"]["memory"])
    print(f"planned {total / GIB:.2f} GiB {plan['memory_bytes']}, {plan['host_kv_bytes'] / GIB:.2f} GiB for KV on its way out")
    if config["device"] == "cuda":
        assert total < 0.9 * 80e9, "an H100 has 80 GB"
        in_pod = plan["stored_weight_bytes"] + plan["host_kv_bytes"]
        assert in_pod < limit, "the files pass through the page cache of the pod"
    else:
        # Beside the plan: the process, and requests that are received.
        in_pod = total + plan["host_kv_bytes"]
        assert 1.25 * in_pod < limit < 3 * in_pod


# Piece, GPU memory, window, the pod's memory.
SIZE = re.compile(r"^\| `piece-tokens = (\d+)` \| ([\d.]+) GiB \| (\d+) GiB \| (\d+)Gi \|$", flags=re.MULTILINE)


@pytest.mark.parametrize("piece, device_gib, window_gib, pod_gib", SIZE.findall((REPO / "deploy/README.md").read_text()))
def test_sizes_in_the_readme_are_those_of_the_h100_overlay(tmp_path, piece, device_gib, window_gib, pod_gib):
    plan = plan_of("h100", tmp_path, **{"piece-tokens": piece})
    assert f"{plan['memory_bytes']['total'] / GIB:.1f}" == device_gib
    assert plan["host_kv_bytes"] == int(window_gib) * GIB
    assert f"{pod_gib}Gi" == container_of(render("h100"))["resources"]["limits"]["memory"]
    # Beside the window: files in the page cache, the process, and requests that are received.
    assert plan["stored_weight_bytes"] + plan["host_kv_bytes"] + 2 * GIB < int(pod_gib) * GIB


# Overlay, pool, longest prompt, four batches, rest, bytes of the pool.
POOL = re.compile(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) (MiB|GiB) \|$", flags=re.MULTILINE)
POOLS = POOL.findall((REPO / "deploy/README.md").read_text())


@pytest.mark.parametrize("overlay, pool, prompt, batches, cache, size, unit", POOLS)
def test_pools_in_the_readme_are_those_of_the_overlays(tmp_path, overlay, pool, prompt, batches, cache, size, unit):
    config, plan = server_config(render(overlay)), plan_of(overlay, tmp_path)
    assert config["kv-pool-tokens"] == plan["kv_pool_tokens"] == int(pool)
    assert plan["max_prompt_tokens"] == int(prompt)
    assert 4 * plan["batch_tokens"] == int(batches)
    assert int(pool) - int(prompt) - int(batches) == int(cache) > 0, "a long prompt leaves something of the prefix cache"
    assert plan["memory_bytes"]["kv_pool"] == int(size) * {"MiB": 1 << 20, "GiB": GIB}[unit]


def test_the_default_pool_is_what_the_readme_says(tmp_path):
    write_shape(tmp_path, MODELS["cpu-demo"])
    done = subprocess.run([headstart(), "inspect", f"--model={tmp_path}", "--json"], capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["batch_tokens"] == 2048
    assert plan["kv_pool_tokens"] == plan["max_prompt_tokens"] + 4 * plan["batch_tokens"]


# Overlay, tokens a second, limit, seconds to compute, drain timeout.
DRAIN = re.compile(r"^\| `([\w-]+)` \| (\d+) \([^|]*\) \| (\d+) \| (\d+) s \| (\d+) s \|$", flags=re.MULTILINE)
DRAINS = DRAIN.findall((REPO / "deploy/README.md").read_text())


@pytest.mark.parametrize("overlay, rate, limit, compute, drain", DRAINS)
def test_what_is_accepted_can_be_computed_while_the_server_drains(overlay, rate, limit, compute, drain):
    config = server_config(render(overlay))
    assert (config["max-queue-tokens"], seconds(config["drain-timeout"])) == (int(limit), int(drain))
    assert round(int(limit) / int(rate)) == int(compute)
    # A fifth to spare: predictions are off by that much.
    assert int(limit) / int(rate) < 0.8 * int(drain)


def test_every_overlay_says_what_it_can_compute_in_a_drain():
    assert sorted(row[0] for row in DRAINS) == sorted(MODELS)


def test_the_readme_has_sizes():
    assert sorted(row[0] for row in POOLS) == sorted(MODELS)
    assert len(SIZE.findall((REPO / "deploy/README.md").read_text())) >= 2
