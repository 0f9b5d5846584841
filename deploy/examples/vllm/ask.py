#!/usr/bin/env python3
"""Asks vLLM's OpenAI server about a text twice, alone and with Headstart, and prints answers and times.

    ask.py VLLM_URL PROMPT_FILE ATTENTION       the prompt: a JSON array of token ids
"""

import json
import pathlib
import sys
import time
import urllib.request

from headstart_vllm import cache_salt

TOKENS = 64


def complete(url, prompt, **more):
    """(text, seconds to the first token)."""
    body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True, **more}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    start, first_s, text = time.monotonic(), None, ""
    for line in urllib.request.urlopen(request, timeout=600):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            sys.exit(f"vLLM: {event['error']}")
        first_s = first_s or time.monotonic() - start
        text += event["choices"][0]["text"]
    return text, first_s


def counter(url, name, label):
    lines = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and label in line)


def main():
    url, prompt, attention = sys.argv[1], json.loads(pathlib.Path(sys.argv[2]).read_text()), sys.argv[3]
    salt = {"cache_salt": salt} if (salt := cache_salt(attention)) else {}
    computed = lambda: counter(url, "vllm:prompt_tokens_by_source_total", 'source="local_compute"')
    # Headstart first: what vLLM computes itself would be a hit in its prefix cache.
    for name, more in (
        (f"Headstart ({attention}), vLLM decodes", {"kv_transfer_params": {"headstart": {"attention": attention}}, **salt}),
        ("vLLM alone", {"cache_salt": "alone", "kv_transfer_params": {"headstart": False}}),
    ):
        before = computed()
        text, first_s = complete(url, prompt, **more)
        print(f"    {name}: first token after {first_s:.2f} s; vLLM computed {computed() - before:.0f} of {len(prompt)} prompt tokens")
        print("      " + text.strip().replace("\n", "\n      "))


main()
