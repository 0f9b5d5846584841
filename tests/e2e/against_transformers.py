"""What tests compare a server's answers with: transformers on the same weights."""

import numpy as np
import torch
from headstart import Attention

# f32: greatest and mean difference of a KV element, relative to the root mean square of its layer's K or V.
F32_WORST, F32_MEAN, F32_LOGPROB = 2e-4, 5e-6, 1e-4
# bf16: how far from the truth (transformers in f32, the same weights) the server may be, measured in how far transformers in
# bf16 is. Every rounding to bf16 is 0.2 % on average, and a layer has some dozen; what they add up to depends on the model.
BF16_WORST, BF16_MEAN = 1.5, 1.0


def random_prompt(vocab_size, length):
    return np.random.default_rng(length).integers(0, vocab_size, length).tolist()


@torch.inference_mode()
def transformers_prefill(model, prompt):
    """KV as [layers][2][kv_heads][tokens][head_dim] in float32, and the logarithms of the first token's probabilities."""
    output = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
    layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in output.past_key_values.layers]
    return torch.stack(layers).float().cpu().numpy(), output.logits[0, -1].float().log_softmax(-1).cpu().numpy()


def kv_error(got, wanted):
    """Greatest and mean difference, relative to the root mean square of the layer's K or V, and where the greatest is."""
    assert got.shape == wanted.shape
    scale = np.sqrt((wanted.astype(np.float64) ** 2).mean(axis=(2, 3, 4), keepdims=True))
    error = np.abs(got - wanted) / scale
    worst = np.unravel_index(error.argmax(), error.shape)
    place = dict(zip(("layer", "k_or_v", "head", "token", "element"), map(int, worst)))
    return error.max(), error.mean(), f"at {place}: got {got[worst]}, wanted {wanted[worst]}"


def assert_f32_kv_close(got, wanted):
    worst, mean, place = kv_error(got, wanted)
    assert worst < F32_WORST, f"{worst:.3g} {place}"
    assert mean < F32_MEAN, f"mean {mean:.3g}"


def assert_bf16_kv_close(got, bf16, truth, mean_limit=BF16_MEAN):
    worst, mean, place = kv_error(got, truth)
    worst_of_torch, mean_of_torch, _ = kv_error(bf16, truth)
    assert worst < BF16_WORST * worst_of_torch, f"{worst:.3g}, transformers {worst_of_torch:.3g}, {place}"
    assert mean < mean_limit * mean_of_torch, f"mean {mean:.3g}, transformers {mean_of_torch:.3g}"


def generate(model, prompt, max_new_tokens, cache=None):
    output = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), device=model.device), past_key_values=cache,
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def assert_bf16_first_token(result, bf16, truth):
    """The first token is one of the best, with its probability, as far as transformers in bf16 can tell. bf16, truth: logarithms
    of the probabilities of all tokens."""
    error = BF16_WORST * np.abs(bf16 - truth).max()
    assert abs(result.first_token_logprob - truth[result.first_token_id]) < error
    assert truth.max() - truth[result.first_token_id] < 2 * error


def assert_first_token(result, logprobs, tolerance):
    """The best token, or one that is as good within the tolerance, with its probability."""
    logprob = logprobs[result.first_token_id]
    assert abs(result.first_token_logprob - logprob) < tolerance
    assert logprobs.max() - logprob < tolerance


def assert_full_budget_is_dense(client, prompt):
    """Through a server with --dense-above-density 1: no fallback to the dense kernel, the sparse one runs over all blocks."""
    everything = Attention(preset="balanced", floor_tokens=1 << 20, dense_below_tokens=0)
    sparse = client.prefill(prompt, attention=everything)
    dense = client.prefill(prompt, attention="exact")
    assert sparse.manifest.attention.algorithm != dense.manifest.attention.algorithm
    assert sparse.statistics.dense_fallbacks == 0
    assert set(sparse.layer_density) == {1.0}
    np.testing.assert_array_equal(sparse.kv, dense.kv)
    assert sparse.first_token_id == dense.first_token_id


QUESTIONS = ("What is the capital of France?", "Name three primary colors.", "How many legs does a spider have?")


def chat_prompt(tokenizer, question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
