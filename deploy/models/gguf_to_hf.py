#!/usr/bin/env python3
"""Turns a GGUF model file into a Hugging Face model directory, without torch.

    gguf_to_hf.py MODEL.gguf OUT_DIR

Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.json and tokenizer_config.json.
Understands the GGUF architectures `llama` (without rope scaling) and `qwen2` with byte-level BPE; refuses everything else.
The same GGUF gives the same bytes on every machine, so callers can check a digest of the result.
"""
import argparse
import json
import pathlib
import sys

import gguf
import numpy as np

# GGUF name -> Hugging Face name; of the whole model, and of one layer.
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
QKV_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}

# Pre-tokenisers by the name that GGUF gives them, in the form of tokenizer.json.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}
NORMALIZERS = {"smollm": None, "qwen2": {"type": "NFC"}}


class UnsupportedModel(Exception):
    """The GGUF file holds something that has no exact counterpart here."""


class Metadata:
    """Key-value pairs of a GGUF file; a missing key is an error unless a default is given."""

    def __init__(self, reader):
        self._fields = reader.fields
        self.architecture = self.get("general.architecture")

    def get(self, key, *default):
        if key in self._fields:
            return self._fields[key].contents()
        if default:
            return default[0]
        raise UnsupportedModel(f"the file has no {key}")

    def of_model(self, key, *default):
        return self.get(f"{self.architecture}.{key}", *default)


def shortest_float(value):
    """The shortest decimal that rounds to the same float32: GGUF's 9.9999997e-06 is 1e-05."""
    return float(str(np.float32(value)))


def refuse_unsupported(metadata, tensors):
    if metadata.architecture not in ("llama", "qwen2"):
        raise UnsupportedModel(f"general.architecture is {metadata.architecture}, not llama or qwen2")
    for key in ("expert_count", "attention.sliding_window"):
        if metadata.of_model(key, 0):
            raise UnsupportedModel(f"{metadata.architecture}.{key} is set")
    if metadata.of_model("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise UnsupportedModel("rope scaling")


def head_output_is_tied(tensors):
    """Without an output matrix, or with one that is the embedding byte for byte."""
    output, embedding = tensors.get("output.weight"), tensors["token_embd.weight"]
    if output is None:
        return True
    return output.tensor_type == embedding.tensor_type and np.array_equal(output.data, embedding.data)


def make_config(metadata, tensors):
    """config.json in the spelling that every version of transformers reads (rope_theta, torch_dtype)."""
    num_heads = metadata.of_model("attention.head_count")
    hidden_size = metadata.of_model("embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM" if metadata.architecture == "llama" else "Qwen2ForCausalLM"],
        "model_type": metadata.architecture,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.of_model("feed_forward_length"),
        "num_hidden_layers": metadata.of_model("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.of_model("attention.head_count_kv"),
        "head_dim": metadata.of_model("attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": metadata.of_model("context_length"),
        "rms_norm_eps": shortest_float(metadata.of_model("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest_float(metadata.of_model("rope.freq_base")),
        "rope_scaling": None,
        "tie_word_embeddings": head_output_is_tied(tensors),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    if metadata.architecture == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False}
    return config | special_token_ids(metadata)


def special_token_ids(metadata):
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id", None)
        if value is not None:
            ids[f"{name}_token_id"] = value
    return ids


def tensor_names(config, tensors):
    """Hugging Face name -> GGUF name of every tensor. Fails unless the file holds exactly these."""
    names = {hf: ours for ours, hf in MODEL_TENSORS.items() if ours in tensors}
    layer_tensors = LAYER_TENSORS | (QKV_BIASES if "blk.0.attn_q.bias" in tensors else {})
    for layer in range(config["num_hidden_layers"]):
        for ours, hf in layer_tensors.items():
            names[f"model.layers.{layer}.{hf}"] = f"blk.{layer}.{ours}"
    wrong = set(names.values()) ^ set(tensors)
    if wrong:
        raise UnsupportedModel(f"unexpected or missing tensors: {', '.join(sorted(wrong)[:5])}")
    if config["tie_word_embeddings"]:
        names.pop("lm_head.weight", None)
    return names


def unpermute_rope_rows(weight, num_heads):
    """Undoes the row order of GGUF's llama: rows for interleaved RoPE [heads, d/2, 2] -> half-split [heads, 2, d/2]."""
    rows = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def dequantize(tensor, config):
    """The tensor as float32 in Hugging Face's row order."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if config["model_type"] == "llama" and ".attn_q." in tensor.name:
        return unpermute_rope_rows(values, config["num_attention_heads"])
    if config["model_type"] == "llama" and ".attn_k." in tensor.name:
        return unpermute_rope_rows(values, config["num_key_value_heads"])
    return values


def to_bf16(values):
    """Rounds float32 to bfloat16, to nearest even; the result holds the bits as uint16. Refuses NaN and infinity."""
    if not np.isfinite(values).all():
        raise UnsupportedModel("a weight is not finite")
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path, config, tensors):
    """Writes the weights one tensor after the other, in the order of their names: no more than one is in memory."""
    names = tensor_names(config, tensors)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for hf in sorted(names):
        shape = [int(n) for n in reversed(tensors[names[hf]].shape)]
        end = offset + 2 * int(np.prod(shape))
        header[hf] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for hf in sorted(names):
            file.write(to_bf16(dequantize(tensors[names[hf]], config)).data)


def make_tokenizer(metadata):
    """tokenizer.json of a byte-level BPE tokenizer, as the `tokenizers` library reads it."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedModel(f"tokenizer {kind}, pre-tokenizer {pre}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    added_types = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    added = [
        {"id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": token_type == gguf.TokenType.CONTROL}
        for index, token_type in enumerate(types) if token_type in added_types
    ]
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != gguf.TokenType.UNUSED}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZERS[pre],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": metadata.get("tokenizer.ggml.merges")},
    }


def make_tokenizer_config(metadata, config):
    tokens = metadata.get("tokenizer.ggml.tokens")
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        raise UnsupportedModel("a tokenizer that adds a token at the start")
    named = {f"{name}_token": tokens[config[f"{name}_token_id"]]
             for name in ("bos", "eos", "pad") if f"{name}_token_id" in config}
    return named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(gguf_path, out_dir):
    """Writes the model directory. `out_dir` is made when it does not exist."""
    reader = gguf.GGUFReader(gguf_path)
    metadata = Metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    refuse_unsupported(metadata, tensors)
    config = make_config(metadata, tensors)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "config.json", config)
    write_json(out_dir / "generation_config.json", special_token_ids(metadata))
    write_json(out_dir / "tokenizer.json", make_tokenizer(metadata))
    write_json(out_dir / "tokenizer_config.json", make_tokenizer_config(metadata, config))
    write_safetensors(out_dir / "model.safetensors", config, tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("out_dir", type=pathlib.Path)
    args = parser.parse_args()
    try:
        convert(args.gguf, args.out_dir)
    except (OSError, ValueError, UnsupportedModel) as error:
        sys.exit(f"gguf_to_hf: {args.gguf}: {error}")


if __name__ == "__main__":
    main()
