"""Small Llama, Qwen2.5 and Qwen3 models with random weights, made by transformers: every feature, no download."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}

CONFIGS = {
    "llama31": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "qwen25": lambda: Qwen2Config(**SIZES | {"tie_word_embeddings": True}, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    # head_dim is not hidden_size / num_attention_heads
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
}


def save_tiny_model(name, path, dtype):
    """Writes the directory as `save_pretrained` does, biases and norms random too, and returns it."""
    return save_random_model(CONFIGS[name](), path, dtype)


def save_random_model(config, path, dtype, device="cpu"):
    """The same for any config; `device` makes the numbers."""
    torch.manual_seed(11)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                # Large enough that attention is far from uniform and logits are far apart.
                parameter.normal_(0.0, 2.0 / parameter.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(path)
    return path
