#!/usr/bin/env python3
"""Draws deploy/grafana/dashboard.png: a real server under the tests' mixed load, scraped by a real Prometheus.

usage: draw_live_dashboard.py [--model DIR --text FILE] [--seconds N] [--pace N] OUTPUT [-- SERVE_FLAG…]

Needs what tests/run.sh installs.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

from drawing import load_arguments, load_of, model_of
from live import Prometheus, Server
from load import LIMITS
from manifests import REPO


def main():
    parser = load_arguments(__doc__, seconds=120)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("flags", nargs="*", help="more flags of the server, --name=value, behind --; before those of the load")
    options = parser.parse_args()
    given = {flag.partition("=")[0] for flag in options.flags}
    limits = [limit for limit in LIMITS if limit.partition("=")[0] not in given]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = model_of(options, folder)
        with Server(model, folder, "server", *limits, *options.flags) as server, \
                Prometheus({"headstart": server.admin}, folder) as prometheus:
            load = load_of(options, server.target, model)
            time.sleep(options.seconds)
            title = f"Headstart, {model.name}, mixed load with errors, cancels and slow readers, {options.seconds} s"
            subprocess.run([sys.executable, REPO / "deploy/grafana/draw_dashboard.py", "--prometheus", prometheus.url,
                            "--range", str(options.seconds), "--window", "30", "--title", title, options.output],
                           check=True)
            load.stop()


if __name__ == "__main__":
    main()
