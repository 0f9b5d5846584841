#!/usr/bin/env python3
"""Draws server/ops/status.png: the status page of a real server under the tests' mixed load, in a headless Chromium.

usage: draw_live_status.py [--model DIR --text FILE] [--seconds N] [--pace N] OUTPUT [-- SERVE_FLAG…]

Needs what tests/run.sh installs.
"""

import argparse
import pathlib
import tempfile
import time

from chromium import Page
from draw_live_dashboard import ids_of
from live import Server
from load import Load
from tiny_model import write_tiny_model

SIZE = 1280, 800
FLAGS = ("--max-queue-requests=16", "--piece-tokens=512")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="model directory; without it a tiny one with random weights")
    parser.add_argument("--text", type=pathlib.Path, help="what the prompts are cut from; random ids without it")
    parser.add_argument("--seconds", type=int, default=60, help="how long the load runs")
    parser.add_argument("--pace", type=float, default=1, help="how many times longer clients wait between two calls")
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("flags", nargs="*", help="more flags of the server, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = options.model or write_tiny_model(folder / "tiny-random-model", layers=8)
        with Server(model, folder, "server", *FLAGS, *options.flags) as server, Page(folder, *SIZE) as page:
            page.prefer("light")
            page.open(f"http://{server.admin}/")
            load = Load(server.target, ids_of(options.text, model) if options.text else None, options.pace)
            time.sleep(options.seconds)
            options.output.write_bytes(page.screenshot())
            load.stop()


if __name__ == "__main__":
    main()
