"""transformers + torch as the decode node of a real server: KV, first token and text, against transformers alone."""

import pytest
import torch
from against_transformers import (
    F32_LOGPROB,
    QUESTIONS,
    assert_bf16_kv_close,
    assert_f32_kv_close,
    assert_first_token,
    assert_full_budget_is_dense,
    chat_prompt,
    generate,
    random_prompt,
    transformers_prefill,
)
from headstart import Attention
from tiny_models import CONFIGS, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

# One token, less than a block, a block, a ragged block more, several, ragged.
LENGTHS = (1, 77, 128, 300, 1000)

@pytest.mark.parametrize("name", CONFIGS)
def test_f32_equals_transformers(serve, tmp_path, name):
    path = save_tiny_model(name, tmp_path / name, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path)
    with serve(path, "--dtype", "f32") as server, server.client() as client:
        for length in LENGTHS:
            prompt = random_prompt(model.config.vocab_size, length)
            result = client.prefill(prompt, attention="exact")
            kv, logprobs = transformers_prefill(model, prompt)
            assert_f32_kv_close(result.kv, kv)
            assert_first_token(result, logprobs, F32_LOGPROB)
            assert set(result.layer_density) == {1.0}


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_as_close_to_the_truth_as_transformers_in_bf16(serve, tmp_path, name):
    path = save_tiny_model(name, tmp_path / name, torch.bfloat16)
    model, truth = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    with serve(path, "--dtype", "bf16") as server, server.client() as client:
        for length in LENGTHS:
            prompt = random_prompt(model.config.vocab_size, length)
            result = client.prefill(prompt, attention="exact")
            assert result.kv_dtype == "bf16"
            assert_bf16_kv_close(result.kv_float32(), *(transformers_prefill(m, prompt)[0] for m in (model, truth)))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_continues_from_the_kv_as_from_its_own(serve, tmp_path, name):
    path = save_tiny_model(name, tmp_path / name, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path)
    with serve(path, "--dtype", "f32") as server, server.client() as client:
        for length in LENGTHS:
            prompt = random_prompt(model.config.vocab_size, length)
            cache, result = client.prefill_to_cache(prompt, attention="exact")
            assert cache.get_seq_length() == length
            first = result.first_token_id
            assert [first, *generate(model, [*prompt, first], 23, cache)] == generate(model, prompt, 24)


def test_a_prompt_of_several_prefill_chunks_gives_the_same_kv(serve, tmp_path):
    path = save_tiny_model("qwen3", tmp_path / "qwen3", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path)
    prompt = random_prompt(model.config.vocab_size, 1000)
    with serve(path, "--dtype", "f32", "--piece-tokens", "256") as server, server.client() as client:
        result = client.prefill(prompt, attention="exact")
    assert result.num_chunks >= 4 * model.config.num_hidden_layers
    assert_f32_kv_close(result.kv, transformers_prefill(model, prompt)[0])


def test_proxy_attention_with_full_budget_is_dense(serve, tmp_path):
    path = save_tiny_model("llama31", tmp_path / "llama31", torch.float32)
    with serve(path, "--dtype", "f32", "--dense-above-density", "1") as server, server.client() as client:
        assert_full_budget_is_dense(client, random_prompt(512, 1000))


def test_proxy_attention_leaves_blocks_out_and_says_so(serve, tmp_path):
    path = save_tiny_model("llama31", tmp_path / "llama31", torch.float32)
    options = Attention(preset="balanced", gamma=0.05, floor_tokens=128, dense_tail_blocks=0, dense_below_tokens=0)
    with serve(path, "--dtype", "f32") as server, server.client() as client:
        result = client.prefill(random_prompt(512, 2000), attention=options)
    assert max(result.layer_density) < 0.6
    assert 0 < result.statistics.executed_blocks < 0.6 * result.statistics.causal_blocks


# ---------------------------------------------------------------------------------------------- the real model

@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_smollm2_text_equals_transformers_alone(serve, smollm2, smollm2_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with serve(smollm2, "--dtype", "f32") as server, server.client() as client:
        for question in QUESTIONS:
            prompt = chat_prompt(smollm2_tokenizer, question)
            cache, result = client.prefill_to_cache(prompt, attention="exact")
            first = result.first_token_id
            text = smollm2_tokenizer.decode([first, *generate(model, [*prompt, first], 31, cache)])
            assert text == smollm2_tokenizer.decode(generate(model, prompt, 32))


def test_smollm2_kv_equals_transformers(serve, smollm2, smollm2_tokenizer):
    prompt = smollm2_tokenizer(open("/usr/share/common-licenses/GPL-3").read()).input_ids[:1000]
    kv = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
        kv[name], logprobs = transformers_prefill(model, prompt)
        with serve(smollm2, "--dtype", name) as server, server.client() as client:
            result = client.prefill(prompt, attention="exact")
        if name == "f32":
            assert_f32_kv_close(result.kv, kv["f32"])
            assert_first_token(result, logprobs, F32_LOGPROB)
        else:
            assert_bf16_kv_close(result.kv_float32(), kv["bf16"], kv["f32"])
