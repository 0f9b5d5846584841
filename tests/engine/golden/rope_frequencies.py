#!/usr/bin/env python3
"""Golden inverse frequencies of RoPE: writes rope_frequencies.json beside this file.

Written from the formulas alone, in double precision, and independent of engine/:
  default  f_i = theta^(-2 i / d)
  linear   f_i / factor                                                   (position interpolation, arXiv 2306.15595)
  llama3   by wavelength 2 pi / f_i: long ones / factor, short ones kept, between them blended linearly in
           original / wavelength                                          (Llama 3.1, Meta's reference code)
  yarn     f_i and f_i / factor blended by a ramp over i between the dimensions that turn beta_fast and beta_slow
           times within the original context; attention factor 0.1 ln(factor) + 1, or the quotient of two of them
           with mscale                                                    (arXiv 2309.00071; DeepSeek's mscale)

Usage: rope_frequencies.py      (no packages needed; made with Python 3.11)
"""
import json
import math
import pathlib


def default(rope, dim):
    return [rope["theta"] ** (-2.0 * i / dim) for i in range(dim // 2)]


def linear(rope, dim):
    return [f / rope["factor"] for f in default(rope, dim)]


def llama3(rope, dim):
    original, factor = rope["original"], rope["factor"]
    low, high = rope["low"], rope["high"]
    out = []
    for f in default(rope, dim):
        turns = original * f / (2.0 * math.pi)  # within the original context
        if turns < low:
            out.append(f / factor)
        elif turns > high:
            out.append(f)
        else:
            blend = (turns - low) / (high - low)
            out.append((1.0 - blend) * f / factor + blend * f)
    return out


def yarn(rope, dim):
    def dimension(turns):
        return dim * math.log(rope["original"] / (turns * 2.0 * math.pi)) / (2.0 * math.log(rope["theta"]))

    low, high = dimension(rope.get("beta_fast", 32.0)), dimension(rope.get("beta_slow", 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    out = []
    for i, f in enumerate(default(rope, dim)):
        stretched = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(stretched * f / rope["factor"] + (1.0 - stretched) * f)
    return out


def attention_factor(rope):
    def scale(mscale):
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope["type"] != "yarn":
        return 1.0
    if "attention_factor" in rope:
        return rope["attention_factor"]
    if "mscale" in rope:
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


CASES = [
    ("SmolLM2", 64, {"type": "default", "theta": 1e5}),
    ("Qwen2.5", 128, {"type": "default", "theta": 1e6}),
    ("Vicuna16k", 128, {"type": "linear", "theta": 1e4, "factor": 4.0}),
    ("Llama3.1", 128, {"type": "llama3", "theta": 5e5, "factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}),
    ("Llama3.2", 64, {"type": "llama3", "theta": 5e5, "factor": 32.0, "low": 1.0, "high": 4.0, "original": 8192}),
    ("Qwen2.5Yarn", 128, {"type": "yarn", "theta": 1e6, "factor": 4.0, "original": 32768}),
    ("YarnLlama2", 128, {"type": "yarn", "theta": 1e4, "factor": 16.0, "original": 4096}),
    ("YarnBetas", 96, {"type": "yarn", "theta": 1e5, "factor": 8.0, "original": 4096, "beta_fast": 16.0,
                       "beta_slow": 2.0}),
    ("YarnNotTruncated", 64, {"type": "yarn", "theta": 15e4, "factor": 32.0, "original": 4096, "truncate": False}),
    ("YarnMscale", 64, {"type": "yarn", "theta": 1e4, "factor": 40.0, "original": 4096, "mscale": 0.707,
                        "mscale_all_dim": 1.0}),
    ("YarnAttentionFactor", 64, {"type": "yarn", "theta": 1e4, "factor": 2.0, "original": 2048,
                                 "attention_factor": 0.8}),
]

if __name__ == "__main__":
    rules = {"default": default, "linear": linear, "llama3": llama3, "yarn": yarn}
    out = [
        {
            "name": name,
            "head_dim": dim,
            "rope": rope,
            "attention_factor": attention_factor(rope),
            "inv_freq": rules[rope["type"]](rope, dim),
        }
        for name, dim, rope in CASES
    ]
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(out, indent=1) + "\n")
