#!/usr/bin/env python3
"""How often a decode node that got its KV as fp8 says the same next token as one that got it as it was computed.

Prompts are cut from a text, one every --step tokens; transformers is given what follows in the text, on top of either KV, and says
at every token which one would be the likeliest next: all under the same past. The last column is the measure of that: KV that
transformers computed itself, in the type of the server.

usage: headstart serve --model DIR …; fp8_agreement.py --target HOST:PORT --model DIR --text FILE [--tokens 1500] [--step 375]
"""

import argparse
import pathlib

import torch
from headstart import PrefillClient
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def own_cache(model, prompt):
    cache = DynamicCache()
    model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
    return cache


def log_probabilities(model, cache, tokens):
    """[len(tokens)][vocabulary]: of what follows each."""
    return model(torch.tensor([tokens]), past_key_values=cache).logits[0].float().log_softmax(-1)


def compare(model, client, prompt, following):
    """{kind: (share of equal tokens, mean |difference| of the log-probability of the full KV's token)}."""
    shipped = lambda dtype="": client.prefill_to_cache(prompt, attention="exact", kv_dtype=dtype)[0]
    full = log_probabilities(model, shipped(), following)
    likeliest = full.argmax(-1, keepdim=True)

    def against_full(cache):
        other = log_probabilities(model, cache, following)
        equal = (other.argmax(-1, keepdim=True) == likeliest).float().mean()
        return float(equal), float((other.gather(1, likeliest) - full.gather(1, likeliest)).abs().mean())

    return {"fp8_e4m3": against_full(shipped("fp8_e4m3")), "transformers": against_full(own_cache(model, prompt))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:8443")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--step", type=int, default=375)
    parser.add_argument("--following", type=int, default=128)
    options = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(options.model).encode(options.text.read_text(), add_special_tokens=False)
    with torch.inference_mode(), PrefillClient(options.target) as client:
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[client.prefill(ids[:1]).kv_dtype]
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        rows = []
        for begin in range(0, len(ids) - options.tokens - options.following + 1, options.step):
            end = begin + options.tokens
            rows.append(compare(model, client, ids[begin:end], ids[end : end + options.following]))
            print(begin, *(f"{kind} {equal:.3f} {off:.4f}" for kind, (equal, off) in rows[-1].items()), sep="\t", flush=True)
    for kind in rows[0]:
        equal, off = (sum(row[kind][i] for row in rows) / len(rows) for i in (0, 1))
        print(f"{kind}: {100 * equal:.1f} % of {len(rows) * options.following} tokens equal, log-probability off by {off:.4f}")


if __name__ == "__main__":
    main()
