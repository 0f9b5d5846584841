"""The conversion of GGUF files against transformers' own, tensor by tensor, and the tokenizer that it writes."""

import os
import pathlib
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

CONVERTER = pathlib.Path(__file__).parents[2] / "deploy/models/gguf_to_hf.py"
CACHE = pathlib.Path(os.environ.get("HEADSTART_CACHE", pathlib.Path.home() / ".cache/headstart"))
SMOLLM2 = CACHE / "gguf/SmolLM2-135M-Instruct.gguf"
GPL_3 = pathlib.Path("/usr/share/common-licenses/GPL-3")

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 300


def convert(source, out_dir):
    subprocess.run([sys.executable, CONVERTER, source, out_dir], check=True, capture_output=True, text=True)


def conversion_error(source, out_dir):
    done = subprocess.run([sys.executable, CONVERTER, source, out_dir], capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def bytes_to_unicode():
    """GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(256 + i) for i, b in enumerate(moved)}}


def add_tokenizer(writer, pre):
    tokens = [*bytes_to_unicode().values(), "he", "ll", "hell", "hello", "<|im_start|>", "<|im_end|>"]
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2
    padding = VOCAB - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(padding)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * padding)
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_chat_template("{{ messages[0]['content'] }}")


def add_tensors(writer, rng, biases, output):
    def add(name, *shape, quantization):
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, quantization), raw_dtype=quantization)

    q8_0, q4_1, f32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "Q4_1", "F32"))
    head_dim = HIDDEN // HEADS
    add("token_embd.weight", VOCAB, HIDDEN, quantization=q8_0)
    add("output_norm.weight", HIDDEN, quantization=f32)
    if output:
        add("output.weight", VOCAB, HIDDEN, quantization=q8_0)
    for layer in range(LAYERS):
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            add(f"blk.{layer}.attn_{name}.weight", rows * head_dim, HIDDEN, quantization=q4_1)
            if biases:
                add(f"blk.{layer}.attn_{name}.bias", rows * head_dim, quantization=f32)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN, quantization=q4_1)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN, quantization=f32)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN, quantization=f32)
        add(f"blk.{layer}.ffn_gate.weight", FFN, HIDDEN, quantization=q4_1)
        add(f"blk.{layer}.ffn_up.weight", FFN, HIDDEN, quantization=q4_1)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FFN, quantization=q4_1)


def write_tiny_gguf(path, architecture, pre, output=False, more=lambda writer: None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    add_tokenizer(writer, pre)
    add_tensors(writer, np.random.default_rng(7), biases=architecture == "qwen2", output=output)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_as_transformers(source, converted):
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    ours = load_file(converted / "model.safetensors")
    state = theirs.state_dict()
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert set(ours) == set(state) - tied
    different = [name for name in ours if not torch.equal(ours[name], state[name].to(torch.bfloat16))]
    assert different == []
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    assert loaded.dtype == torch.bfloat16
    for name in ("rope_parameters", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(loaded.config, name) == pytest.approx(getattr(theirs.config, name)), name
    return loaded


@pytest.mark.parametrize(
    "architecture, pre, output", [("llama", "smollm", False), ("llama", "smollm", True), ("qwen2", "qwen2", False)]
)
def test_tiny_models_equal_transformers(tmp_path, architecture, pre, output):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture, pre, output)
    convert(source, tmp_path / "out")
    assert_same_as_transformers(source, tmp_path / "out")


def test_the_real_model_equals_transformers_and_answers(tmp_path):
    convert(SMOLLM2, tmp_path)
    model = assert_same_as_transformers(SMOLLM2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


# transformers' reader of GGUF does not know that this tokenizer takes digits one by one, apart from the spaces before
# them; so the two agree where no more than one space comes before a digit.
@pytest.fixture(scope="module")
def transformers_smollm_tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)


@pytest.mark.parametrize(
    "text", ["Hello world 123\n\nx", "déjà vu 東京 🎉", "<|im_start|>user\nhi<|im_end|>", "I'll don't\t\ttab", " 1 22 333", ""]
)
def test_smollm_tokenizer_equals_transformers(text, transformers_smollm_tokenizer):
    ours = Tokenizer.from_file(str(CACHE / "models/SmolLM2-135M-Instruct/tokenizer.json"))
    assert ours.encode(text).ids == transformers_smollm_tokenizer(text).input_ids


def test_smollm_tokenizer_splits_digits_and_restores_the_text():
    tokenizer = Tokenizer.from_file(str(CACHE / "models/SmolLM2-135M-Instruct/tokenizer.json"))
    assert tokenizer.encode("  12").tokens == ["ĠĠ", "1", "2"]
    text = GPL_3.read_text()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_written_tokenizer_is_what_auto_tokenizer_loads(tmp_path):
    convert(write_tiny_gguf(tmp_path / "tiny.gguf", "qwen2", "qwen2"), tmp_path / "out")
    plain = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "hello <|im_start|>héllo 42"
    assert plain.encode(text).ids == auto(text).input_ids
    assert "hello" in plain.encode(text).tokens
    assert auto.eos_token == "<|im_end|>"
    assert auto.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_the_same_file_gives_the_same_bytes(tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", "smollm")
    for name in ("a", "b"):
        convert(source, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def extra_tensor(writer):
    writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))


def not_finite(writer):
    writer.add_tensor("output.weight", np.full((VOCAB, HIDDEN), np.inf, np.float32))


@pytest.mark.parametrize(
    "architecture, pre, more, message",
    [
        ("gemma", "smollm", lambda w: None, "general.architecture is gemma"),
        ("llama", "llama-bpe", lambda w: None, "pre-tokenizer llama-bpe"),
        ("llama", "smollm", lambda w: w.add_expert_count(8), "expert_count"),
        ("llama", "smollm", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope scaling"),
        ("llama", "smollm", extra_tensor, "blk.0.attn_q_norm.weight"),
        ("llama", "smollm", not_finite, "not finite"),
        ("llama", "smollm", lambda w: w.add_add_bos_token(True), "adds a token at the start"),
    ],
)
def test_refuses_what_it_can_not_convert_exactly(tmp_path, architecture, pre, more, message):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture, pre, more=more)
    assert message in conversion_error(source, tmp_path / "out")


def test_refuses_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    assert "gguf_to_hf" in conversion_error(tmp_path / "x.gguf", tmp_path / "out")
