#!/usr/bin/env python3
"""Draws deploy/grafana/dashboard.png: a real server under the tests' mixed load, scraped by a real Prometheus.

usage: draw_live_dashboard.py [--model DIR --text FILE] [--seconds N] [--pace N] OUTPUT [-- SERVE_FLAG…]

Needs what tests/run.sh installs.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

from tokenizers import Tokenizer

from live import Prometheus, Server
from load import LIMITS, LONG, Load
from manifests import REPO
from tiny_model import write_tiny_model


def ids_of(text, model):
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text()).ids
    assert len(ids) >= LONG, f"{text} has {len(ids)} tokens, less than {LONG}"
    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="model directory; without it a tiny one with random weights")
    parser.add_argument("--text", type=pathlib.Path, help="what the prompts are cut from; random ids without it")
    parser.add_argument("--seconds", type=int, default=120, help="how long the load runs")
    parser.add_argument("--pace", type=float, default=1, help="how many times longer clients wait between two calls")
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("flags", nargs="*", help="more flags of the server, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = options.model or write_tiny_model(folder / "tiny-random-model", layers=8)
        with Server(model, folder, "server", *LIMITS, *options.flags) as server, \
                Prometheus([server.admin], folder) as prometheus:
            load = Load(server.target, ids_of(options.text, model) if options.text else None, options.pace)
            time.sleep(options.seconds)
            title = f"Headstart, {model.name}, mixed load with errors, cancels and slow readers, {options.seconds} s"
            subprocess.run([sys.executable, REPO / "deploy/grafana/draw_dashboard.py", "--prometheus", prometheus.url,
                            "--range", str(options.seconds), "--window", "30", "--title", title, options.output],
                           check=True)
            load.stop()


if __name__ == "__main__":
    main()
