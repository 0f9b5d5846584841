"""Model folders as people have them: each is served, or hashed, as transformers reads it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from against_transformers import F32_LOGPROB, assert_f32_kv_close, assert_first_token, random_prompt, transformers_prefill
from headstart.model_hash import model_hash
from safetensors.torch import load_file, save_file
from server_process import program
from tiny_models import SIZES, save_random_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL = SIZES | {"num_hidden_layers": 2}


def llama(**changes):
    return LlamaConfig(**SMALL | changes)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is ... else config.update({key: value})
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def other_head(tensors):
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(5))


def equal_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_head(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def bare_names(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def old_inv_freq(tensors):
    inv_freq = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq.clone()


TIED = {"tie_word_embeddings": True}
ODDITIES = {
    "tied, another head stored": (llama(**TIED), {}, other_head),
    "tied, the same head stored": (llama(**TIED), {}, equal_head),
    "tied, only the head stored": (llama(**TIED), {}, only_head),
    "names without model.": (llama(), {}, bare_names),
    "tied names without model.": (llama(**TIED), {}, bare_names),
    "inverse frequencies stored": (llama(), {}, old_inv_freq),
    "config": (llama(), {"rms_norm_eps": ..., "pretraining_tp": 2, "hidden_act": "swish", "eos_token_id": -1, "dtype": "auto"}, None),
    "no dtype": (llama(), {"dtype": ...}, None),
    "a window behind the last layer": (
        Qwen2Config(**SMALL), {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "layer_types": ...}, None,
    ),
    "a window of no layer": (Qwen2Config(**SMALL), {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, None),
}


def make(config, changes, edit, path):
    save_random_model(config, path, torch.float32)
    edit_config(path, **changes)
    if edit is not None:
        edit_tensors(path, edit)
    return path


def hash_of(path):
    done = subprocess.run([program("headstart"), "model-hash", path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("oddity", ODDITIES)
def test_reads_a_folder_as_transformers_does(serve, tmp_path, oddity):
    path = make(*ODDITIES[oddity], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = random_prompt(model.config.vocab_size, 200)
    kv, logprobs = transformers_prefill(model, prompt)
    with serve(path, "--dtype", "f32") as server, server.client() as client:
        result = client.prefill(prompt, attention="exact")
    assert_f32_kv_close(result.kv, kv)
    assert_first_token(result, logprobs, F32_LOGPROB)
    assert result.manifest.model_hash == hash_of(path) == model_hash(path)


def test_a_window_of_a_layer_is_refused(tmp_path):
    changes = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": ...}
    path = make(Qwen2Config(**SMALL), changes, None, tmp_path / "model")
    done = subprocess.run([program("headstart"), "inspect", "--model", path], capture_output=True, text=True)
    assert done.returncode == 3
    assert "sliding_window=64 (sliding-window attention is not supported)" in done.stderr


ROPES = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "original_max_position_embeddings": 1024, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "truncate": False},
)


def test_client_and_server_hash_alike_and_see_every_change(tmp_path):
    path = make(llama(), {}, None, tmp_path / "model")
    seen = {hash_of(path)}
    assert seen == {model_hash(path)}

    def changed():
        found = model_hash(path)
        assert found == hash_of(path)
        assert found not in seen
        seen.add(found)

    edit_config(path, rope_parameters=...)
    assert model_hash(path) in seen  # the default
    for rope in ROPES:
        edit_config(path, rope_scaling=rope)
        changed()
    edit_config(path, rope_scaling=..., rope_theta=5e5)
    changed()
    edit_config(path, rms_norm_eps=1e-5)
    changed()
    edit_config(path, num_attention_heads=8, num_key_value_heads=4, head_dim=16)  # the shapes stay
    changed()
    weights = path / "model.safetensors"
    for at in (-1, -100_000):
        data = bytearray(weights.read_bytes())
        data[at] ^= 1
        weights.write_bytes(data)
        changed()


def test_the_hash_is_that_of_the_shards(tmp_path):
    path = make(llama(), {}, None, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    assert model_hash(tmp_path / "shards") == hash_of(tmp_path / "shards") == hash_of(path)


def test_the_clients_program_prints_the_hash(tmp_path):
    path = make(llama(), {}, None, tmp_path / "model")
    command = [sys.executable, "-m", "headstart.model_hash", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == hash_of(path)


def test_links_out_of_the_folder_are_followed_when_asked_to(serve, tmp_path):
    path = make(llama(), {}, None, tmp_path / "model")
    (tmp_path / "volume").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "volume" / name).symlink_to(path / name)
    command = [program("headstart"), "inspect", "--model", tmp_path / "volume"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 3
    assert "outside of" in refused.stderr and "--follow-links" in refused.stderr
    assert subprocess.run([*command, "--follow-links=true"], capture_output=True).returncode == 0
    with serve(tmp_path / "volume", "--follow-links=true") as server, server.client() as client:
        assert client.prefill([1, 2, 3]).manifest.model_hash == hash_of(path)
