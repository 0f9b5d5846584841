#!/usr/bin/env python3
"""Draws server/ops/status.png: the status page of a real server under the tests' mixed load, in a headless Chromium.

usage: draw_live_status.py [--model DIR --text FILE] [--seconds N] [--pace N] OUTPUT [-- SERVE_FLAG…]

Needs what tests/run.sh installs.
"""

import pathlib
import tempfile
import time

from chromium import Page
from drawing import load_arguments, load_of, model_of
from live import Server

SIZE = 1280, 800
FLAGS = ("--max-queue-requests=16", "--piece-tokens=512")


def main():
    parser = load_arguments(__doc__, seconds=60)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("flags", nargs="*", help="more flags of the server, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = model_of(options, folder)
        with Server(model, folder, "server", *FLAGS, *options.flags) as server, Page(folder, *SIZE) as page:
            page.prefer("light")
            page.open(f"http://{server.admin}/")
            load = load_of(options, server.target, model)
            time.sleep(options.seconds)
            options.output.write_bytes(page.screenshot())
            load.stop()


if __name__ == "__main__":
    main()
