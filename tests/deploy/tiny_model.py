"""A Llama with random weights, small enough that a server with it starts in a moment."""

import json

import numpy as np
from safetensors.numpy import save_file

VOCAB = 256


def write_tiny_model(directory, max_positions=16384, layers=4, hidden=64, heads=4, kv_heads=2, head_dim=32,
                     intermediate=96, seed=1):
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "intermediate_size": intermediate, "vocab_size": VOCAB,
        "max_position_embeddings": max_positions, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (VOCAB, hidden), "lm_head": (VOCAB, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm": (hidden,), f"{name}.post_attention_layernorm": (hidden,),
            f"{name}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{name}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{name}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{name}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{name}.mlp.gate_proj": (intermediate, hidden), f"{name}.mlp.up_proj": (intermediate, hidden),
            f"{name}.mlp.down_proj": (hidden, intermediate),
        }
    random = np.random.default_rng(seed)
    save_file({f"{name}.weight": np.ones(shape, np.float32) if len(shape) == 1
               else random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
               for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory
