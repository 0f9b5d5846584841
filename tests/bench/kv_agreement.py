#!/usr/bin/env python3
"""What another kind of KV (fp8 on the wire, a sparse preset) does to what a decode node says next.

Prompts are cut from a text, one every --step tokens; transformers is given what follows in the text, on top of each kind of KV,
and says at every token which one would be the likeliest next: all under the same past. Against dense KV as it was computed: how
often it is the same token, how far its log-probability is off, and the perplexity of the text that follows. The last kind is the
measure of all: KV that transformers computed itself, dense, in the type of the server.

usage: headstart serve --model DIR …; kv_agreement.py --target HOST:PORT --model DIR --text FILE… [--kinds fp8,balanced,fast] [--tokens 1500] [--step 375]
"""

import argparse
import math
import pathlib
import statistics

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


def compare(model, client, kinds, prompt, following):
    """{kind: (share of equal tokens, mean |difference| of the log-probability of the dense KV's token, -log p of what follows)}."""

    densities = {"transformers": 1.0}

    def shipped(kind):
        options = dict(attention="exact", kv_dtype="fp8_e4m3") if kind == "fp8" else dict(attention=kind)
        cache, result = client.prefill_to_cache(prompt, **options)
        densities[kind] = statistics.mean(result.layer_density)
        return cache

    of_dense = log_probabilities(model, shipped("exact"), following)
    likeliest = of_dense.argmax(-1, keepdim=True)
    real = torch.tensor(following[1:])

    def against_dense(kind, of_kind):
        equal = (of_kind.argmax(-1, keepdim=True) == likeliest).float().mean()
        off = (of_kind.gather(1, likeliest) - of_dense.gather(1, likeliest)).abs().mean()
        loss = -of_kind[:-1].gather(1, real[:, None]).mean()
        return float(equal), float(off), float(loss), densities[kind]

    row = {"exact": against_dense("exact", of_dense)}
    for kind in kinds:
        row[kind] = against_dense(kind, log_probabilities(model, shipped(kind), following))
    row["transformers"] = against_dense("transformers", log_probabilities(model, own_cache(model, prompt), following))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:8443")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--kinds", default="fp8", help="fp8, or presets, separated by commas")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--step", type=int, default=375)
    parser.add_argument("--following", type=int, default=128)
    options = parser.parse_args()
    text = "".join(path.read_text() for path in options.text)
    ids = AutoTokenizer.from_pretrained(options.model).encode(text, add_special_tokens=False)
    with torch.inference_mode(), PrefillClient(options.target) as client:
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[client.prefill(ids[:1]).kv_dtype]
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        rows = []
        for begin in range(0, len(ids) - options.tokens - options.following + 1, options.step):
            end = begin + options.tokens
            rows.append(compare(model, client, options.kinds.split(","), ids[begin:end], ids[end : end + options.following]))
            print(begin, *(f"{kind} {equal:.3f} {off:.4f}" for kind, (equal, off, _, _) in rows[-1].items()), sep="\t", flush=True)
    for kind in rows[0]:
        equal, off, loss, density = (sum(row[kind][i] for row in rows) / len(rows) for i in range(4))
        print(f"{kind}: {100 * equal:.1f} % of {len(rows) * options.following} tokens equal, log-probability off by {off:.4f}, "
              f"perplexity {math.exp(loss):.3f}, density {density:.3f}")


if __name__ == "__main__":
    main()
