#!/usr/bin/env python3
"""Draws the main panels of the dashboard from a running Prometheus: a look at the data where there is no Grafana.

The expressions, titles and units are those of headstart.json. Needs matplotlib.
"""

import argparse
import json
import math
import pathlib
import time
import urllib.parse
import urllib.request

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, PercentFormatter

HERE = pathlib.Path(__file__).resolve().parent
MAIN_PANELS = ["Time to first token", "Where the time goes", "Requests by result", "Saturation", "Error of estimates",
               "Requests in a step", "Prefix hits", "Pages of the KV pool", "Attention density",
               "Predicted against executed", "Density by layer", "Dense fallbacks", "Blocks run and saved", "KV sent",
               "Exposed transfer", "KV sent before compute ended", "Fetches by result", "Broken streams"]
COLUMNS = 3


def api(prometheus, path, **parameters):
    with urllib.request.urlopen(f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as reply:
        return json.load(reply)["data"]["result"]


def fill_in(expr, window_s, range_s):
    for name, value in (("$__rate_interval", f"{window_s}s"), ("$__range", f"{range_s}s"), ("$cluster", ".*"),
                        ("$namespace", ".*"), ("$job", ".*"), ("$instance", ".*")):
        expr = expr.replace(name, value)
    return expr


def label_of(legend, metric):
    for name, value in metric.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend


def curves(panel, prometheus, end, range_s, window_s):
    """(label, seconds before the end, values) of every series of a panel."""
    found = []
    for target in panel["targets"]:
        expr = fill_in(target["expr"], window_s, range_s)
        for series in api(prometheus, "query_range", query=expr, start=end - range_s, end=end, step=1):
            times, values = zip(*((at - end, float(value)) for at, value in series["values"]))
            if any(math.isfinite(value) and value != 0 for value in values):
                found.append((label_of(target["legendFormat"], series["metric"]), times, values))
    return found


def bars(panel, prometheus, end, range_s):
    """(label, value) of every series of a panel that shows one number each, in order of a numeric label."""
    expr = fill_in(panel["targets"][0]["expr"], 0, range_s)
    found = [(label_of(panel["targets"][0]["legendFormat"], series["metric"]), float(series["value"][1]))
             for series in api(prometheus, "query", query=expr, time=end)]
    return sorted(found, key=lambda item: int(item[0]) if item[0].isdigit() else 0)


def scale(value, _=None):
    """1.5e6 -> 1.5 M."""
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"


def draw_panel(axes, panel, prometheus, end, range_s, window_s):
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
    if panel["type"] == "bargauge":
        labels, values = zip(*bars(panel, prometheus, end, range_s))
        axes.bar(range(len(values)), values, color="tab:blue")
        axes.set_xlabel("layer", fontsize=8)
    else:
        found = curves(panel, prometheus, end, range_s, window_s)
        if "stacking" in defaults["custom"]:
            times = max((times for _, times, _ in found), key=len)
            axes.stackplot(times, [padded(values, len(times)) for _, _, values in found],
                           labels=[label for label, _, _ in found])
        else:
            for label, times, values in found:
                axes.plot(times, values, label=label, linewidth=1.2)
        if found:
            axes.legend(fontsize=7, loc="upper left", ncols=2)
        axes.set_xlim(-range_s, 0)
        axes.set_xlabel("seconds", fontsize=8)
    percent = defaults["unit"] == "percentunit"
    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else FuncFormatter(scale))
    if percent:
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel({"percentunit": "", "s": "seconds", "reqps": "per second", "ops": "per second",
                     "Bps": "bytes per second", "bytes": "bytes"}.get(defaults["unit"], ""), fontsize=8)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def padded(values, length):
    """A stack needs series of one length; what is missing lies at the start, and counts as 0."""
    return [0.0] * (length - len(values)) + [0.0 if math.isnan(value) else value for value in values]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--range", type=int, default=3600, metavar="SECONDS", help="how far back")
    parser.add_argument("--window", type=int, default=60, metavar="SECONDS", help="window of rates; four scrapes or more")
    parser.add_argument("--title", default="Headstart")
    parser.add_argument("output", help="file to write, e.g. dashboard.png")
    options = parser.parse_args()
    panels = {panel["title"]: panel for panel in json.loads((HERE / "headstart.json").read_text())["panels"]}
    rows = math.ceil(len(MAIN_PANELS) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3 * rows), layout="constrained")
    figure.suptitle(options.title, fontsize=11)
    end = time.time()
    for name, place in zip(MAIN_PANELS, axes.flat):
        draw_panel(place, panels[name], options.prometheus.rstrip("/"), end, options.range, options.window)
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
