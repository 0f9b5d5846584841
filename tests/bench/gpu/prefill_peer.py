"""Random models for prefill_bench, and Hugging Face transformers on the same weights, prompts and GPU.

    python3 prefill_peer.py make SHAPE DIR                    writes config.json and random weights (SHAPE: see SHAPES)
    python3 prefill_peer.py time DIR TOKENS [TOKENS ...]      time to the first token, cuDNN attention
    python3 prefill_peer.py compare DIR TOKENS DUMP TOKEN LOGPROB
                                                              KV and first token of `prefill_bench --dump` against it
"""

import json
import os
import struct
import sys
import time

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

LLAMA_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SHAPES = {
    "llama-8b": dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336,
                     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
                     rope_scaling=LLAMA_ROPE),
    "qwen-7b": dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=3584, intermediate_size=18944,
                    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rope_theta=1e7),
    "llama-tiny": dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=512, intermediate_size=1536,
                       num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=64, vocab_size=4096,
                       rope_theta=500000.0, rope_scaling=LLAMA_ROPE),
    "qwen2-tiny": dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=896, intermediate_size=1536,
                       num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2, vocab_size=4096, rope_theta=1e6),
    "qwen3-tiny": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=512, intermediate_size=1536,
                       num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=128, vocab_size=4096,
                       rope_theta=1e6),
}
COMMON = dict(hidden_act="silu", max_position_embeddings=262144, rms_norm_eps=1e-5, tie_word_embeddings=False,
              torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1)

PAGE_TOKENS = 128


def make(shape, directory):
    config = {**COMMON, **SHAPES[shape]}
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/config.json", "w") as file:
        json.dump(config, file, indent=1)
    torch.manual_seed(1)
    index, total = {}, 0

    def save(name, tensors):
        nonlocal total
        file = f"{name}.safetensors"
        save_file({key: value.cpu() for key, value in tensors.items()}, f"{directory}/{file}")
        index.update({key: file for key in tensors})
        total += sum(value.numel() * 2 for value in tensors.values())

    def matrix(rows, cols):
        return torch.randn(rows, cols, device="cuda").mul_(0.02).bfloat16()

    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", hidden // heads)
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    save("outer", {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * 50, "model.norm.weight": ones,
                   "lm_head.weight": matrix(config["vocab_size"], hidden)})
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        layer = {p + "input_layernorm.weight": ones.clone(), p + "post_attention_layernorm.weight": ones.clone(),
                 p + "self_attn.q_proj.weight": matrix(heads * dim, hidden), p + "self_attn.k_proj.weight": matrix(kv_heads * dim, hidden),
                 p + "self_attn.v_proj.weight": matrix(kv_heads * dim, hidden), p + "self_attn.o_proj.weight": matrix(hidden, heads * dim),
                 p + "mlp.gate_proj.weight": matrix(ffn, hidden), p + "mlp.up_proj.weight": matrix(ffn, hidden),
                 p + "mlp.down_proj.weight": matrix(hidden, ffn)}
        if config["model_type"] == "qwen2":
            for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                layer[p + f"self_attn.{name}_proj.bias"] = matrix(1, rows * dim)[0]
        if config["model_type"] == "qwen3":
            for name in ("q", "k"):
                layer[p + f"self_attn.{name}_norm.weight"] = matrix(1, dim)[0] + 1
        save(f"layer-{i}", layer)
    with open(f"{directory}/model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": index}, file)


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda").eval()


def prompt(model, tokens):
    return ((torch.arange(tokens, device="cuda") * 7919 + 13) % model.config.vocab_size)[None]


def forward(model, ids):
    with torch.inference_mode(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return model(ids, use_cache=True, logits_to_keep=1)


def time_it(directory, lengths):
    model = load(directory)
    for tokens in map(int, lengths):
        ids = prompt(model, tokens)
        forward(model, ids)
        times = []
        for _ in range(1 if tokens > 65536 else 3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            forward(model, ids).logits[0, -1].argmax().item()
            times.append(time.perf_counter() - begin)
        print(json.dumps(dict(peer="transformers + cuDNN", tokens=tokens, ttft_ms=round(sorted(times)[len(times) // 2] * 1e3, 1))),
              flush=True)
        torch.cuda.empty_cache()


def compare(directory, tokens, dump, token, logprob):
    model = load(directory)
    out = forward(model, prompt(model, int(tokens)))
    logprobs = out.logits[0, -1].float().log_softmax(-1)
    config = model.config
    kv_heads = config.num_key_value_heads
    worst = 0.0
    layers = out.past_key_values.layers
    with open(dump, "rb") as file:
        while head := file.read(24):
            layer, begin, count = struct.unpack("qqq", head)
            expected = [layers[layer].keys, layers[layer].values]
            dim = expected[0].shape[-1]
            pages = (count + PAGE_TOKENS - 1) // PAGE_TOKENS
            data = bytearray(file.read(pages * 2 * kv_heads * PAGE_TOKENS * dim * 2))
            planes = torch.frombuffer(data, dtype=torch.bfloat16).view(pages, 2, kv_heads, PAGE_TOKENS, dim)
            planes = planes.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, pages * PAGE_TOKENS, dim)[:, :, :count]
            for ours, theirs in zip(planes.cuda().float(), expected):
                theirs = theirs[0, :, begin:begin + count].float()
                worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
    best = logprobs.max().item()
    print(json.dumps(dict(model=os.path.basename(directory), tokens=int(tokens), worst_kv_error=round(worst, 5),
                          our_token=int(token), their_token=int(logprobs.argmax()), our_logprob=float(logprob),
                          their_logprob_of_it=round(logprobs[int(token)].item(), 4), their_best=round(best, 4))), flush=True)


if __name__ == "__main__":
    {"make": lambda a: make(*a), "time": lambda a: time_it(a[0], a[1:]), "compare": lambda a: compare(*a)}[sys.argv[1]](sys.argv[2:])
