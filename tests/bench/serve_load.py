"""Many requests at once: `headstart serve` under the loads that it has bars for, one after the other.

    python3 serve_load.py BIN MODEL_DIR [--device cuda] [--scale 1] [--bars abcdefg] [--json FILE]

BIN holds headstart; nothing else is needed but Python. Both sides run on this machine, over loopback. Every prompt has token ids of its
own (another seed for every run of `headstart bench`), so nothing is found in the prefix cache but in (d), which asks for it.

a  tokens/s: 64 prompts of 512, 16 at once, over one at a time and over one prompt of 8K
b  TTFT of 1K prompts, one at a time, beside a prompt of 128K, over alone
c  that 128K prompt beside 20 such 1K prompts a second, over alone
d  32K of which the server has 31K, over cold; dense and sparse; all KV shipped, and only what the client lacks
e  Poisson arrivals of 0.5K to 32K at 0.8 of the capacity (measured first, as a closed loop): TTFT of prompts up to 2K
f  of (e): TTFT that the server predicted against what came
g  three times the capacity: accepted prompts that meet their deadline, time to a refusal, memory of the server

`--scale` shortens all lengths, so that a small model rehearses it. What the server does not say yet is shown as absent.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpu"))
from serve_bench import Server  # noqa: E402

METRICS = ("process_resident_memory_bytes", "process_open_fds", "process_threads", "headstart_host_kv_bytes", "headstart_kv_pool_blocks")


def percentile(values, share):
    """Nearest rank, as `headstart bench` counts it; None of nothing."""
    values = sorted(values)
    return values[max(math.ceil(share * len(values)) - 1, 0)] if values else None


class Run:
    """What one `headstart bench` saw. Times of `records` are in seconds of the wall clock."""

    def __init__(self, document, records):
        self.result = document["results"][0]
        self.records = records
        for record, name in itertools.product(records, ("planned", "sent", "accepted", "began", "first_token", "all_kv", "ended")):
            if record[name] is not None:
                record[name] += self.result["start_unix_seconds"]
        self.ok = [record for record in records if record["outcome"] == "ok"]
        self.ttft = [record["first_token"] - record["planned"] for record in self.ok]


class Load:
    """Starts the load generator against one server."""

    def __init__(self, arguments, server):
        self.arguments, self.server = arguments, server
        self.folder = tempfile.TemporaryDirectory()
        self.numbers = itertools.count(1)  # of seeds, files and hash ids: never the same again

    def tokens(self, count):
        return max(int(count * self.arguments.scale), 2)

    def start(self, *flags, lengths=None):
        """A process under way; `finish` gives its Run."""
        number = next(self.numbers)
        records = f"{self.folder.name}/{number}"
        command = [f"{self.arguments.bin}/headstart", "bench", "--target", f"127.0.0.1:{self.server.port}", "--json", "--timeout", "300s",
                   "--seed", str(self.arguments.seed * 1000 + number), "--records", records, *map(str, flags)]
        command += ["--lengths", lengths] if lengths else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return process, records, command

    def finish(self, started):
        process, records, command = started
        output, errors = process.communicate()
        if not os.path.exists(records):
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
        with open(records) as file:
            run = Run(json.loads(output), [json.loads(line) for line in file])
        if not run.ok:
            print(f"{' '.join(command)}: nothing went well: {run.result['errors']}", flush=True)
        return run

    def run(self, *flags, lengths=None):
        return self.finish(self.start(*flags, lengths=lengths))

    def one_length(self, count, *flags):
        return self.run(*flags, lengths=str(self.tokens(count)))

    def mix(self):
        """Of 0.5K to 32K, short ones more often."""
        return ",".join(f"{self.tokens(count)}:{weight}" for count, weight in ((512, 4), (1024, 3), (2048, 3), (8192, 2), (16384, 1), (32768, 1)))

    def trace(self, prompts):
        """A file of prompts, each a list of hash ids of 512 tokens."""
        path = f"{self.folder.name}/trace{next(self.numbers)}"
        with open(path, "w") as file:
            for ids in prompts:
                file.write(json.dumps(dict(timestamp=0, input_length=len(ids) * self.tokens(512), output_length=1, hash_ids=ids)) + "\n")
        return path

    def fresh_blocks(self, count):
        first = next(self.numbers) << 20
        return list(range(first, first + count))


class Table:
    def __init__(self):
        self.rows = []
        print("| | what | seen | wanted | |\n|---|---|---|---|---|", flush=True)

    def add(self, bar, what, value, form="{:.2f}", most=None, least=None):
        seen = "absent" if value is None else form.format(value)
        wanted = f"<= {form.format(most)}" if most is not None else f">= {form.format(least)}" if least is not None else ""
        bound = most is not None or least is not None
        met = None if value is None or not bound else (most is None or value <= most) and (least is None or value >= least)
        self.rows.append(dict(bar=bar, what=what, value=value, most=most, least=least, met=met))
        print(f"| {bar} | {what} | {seen} | {wanted} | {'' if met is None else 'yes' if met else 'NO'} |", flush=True)


MS = "{:.1f} ms"


def milliseconds(value):
    return None if value is None else value * 1e3


def over(value, base):
    return None if value is None or not base else value / base


def attention(name):
    """Flags of an attention: a preset, or preset:gamma."""
    preset, _, gamma = name.partition(":")
    return ["--presets", preset] + (["--gamma", gamma] if gamma else [])


def bar_a(load, table):
    runs = [load.one_length(512, "--presets", "exact", "--concurrency", at_once, "--requests", 64, "--warmup", 2) for at_once in (1, 16)]
    long = load.one_length(8192, "--presets", "exact", "--requests", 5)
    one, many, whole = (run.result["tokens_per_second"] for run in (*runs, long))
    table.add("a", "512 one at a time, tokens/s", one, "{:.0f}")
    table.add("a", "512 16 at once, tokens/s", many, "{:.0f}")
    table.add("a", "8K one at a time, tokens/s", whole, "{:.0f}")
    table.add("a", "16 at once over one at a time", over(many, one), least=2.0)
    table.add("a", "16 at once over one 8K prompt", over(many, whole), least=0.85)


def long_alone(load):
    """The 128K prompt alone: its median without the first. Measured once."""
    if not hasattr(load, "long_alone"):
        arguments = load.arguments
        run = load.one_length(131072, *attention(arguments.sparse), "--requests", arguments.runs + 1, "--warmup", 0)
        load.long_alone = statistics.median(run.ttft[1:] or run.ttft)
    return load.long_alone


def beside_long(load, *short_flags):
    """Short prompts as the flags say, and long ones in the middle: short ones sent while a long one was under way, and the long ones'
    Run."""
    arguments = load.arguments
    duration = 2 + 2 * arguments.runs * long_alone(load)
    short = load.start(*short_flags, "--duration", f"{duration}s", lengths=str(load.tokens(1024)))
    time.sleep(1)  # so that short ones are under way
    long = load.one_length(131072, *attention(arguments.sparse), "--requests", arguments.runs, "--warmup", 0)
    short = load.finish(short)
    spans = [(record["sent"], record["first_token"]) for record in long.ok]
    beside = [record for record in short.records if any(begin <= record["sent"] <= end for begin, end in spans)]
    if spans and short.records[-1]["sent"] < spans[-1][1]:
        print(f"the short ones ended {spans[-1][1] - short.records[-1]['sent']:.1f} s before the long ones", flush=True)
    return beside, long


def ttft_of(records):
    return [record["first_token"] - record["planned"] for record in records if record["outcome"] == "ok"]


def bar_b(load, table):
    alone = load.one_length(1024, "--concurrency", 1, "--requests", load.arguments.shorts, "--warmup", 5).ttft
    records, _ = beside_long(load, "--concurrency", 1)
    beside = ttft_of(records)
    table.add("b", "1K alone, p50", milliseconds(percentile(alone, 0.5)), MS)
    table.add("b", "1K alone, p95", milliseconds(percentile(alone, 0.95)), MS)
    table.add("b", "1K beside 128K, prompts", len(records), "{:d}")
    table.add("b", "not answered", len(records) - len(beside), "{:d}", most=0)
    for share in (0.5, 0.95):
        name = f"p{100 * share:.0f}"
        table.add("b", f"1K beside 128K, {name}", milliseconds(percentile(beside, share)), MS)
        table.add("b", f"beside over alone, {name}", over(percentile(beside, share), percentile(alone, share)), most=3.0 if share == 0.95 else None)
    table.add("b", "1K beside 128K, worst", milliseconds(percentile(beside, 1)), MS, most=150.0)


def bar_c(load, table):
    records, long = beside_long(load, "--rate", 20)
    beside = statistics.median(long.ttft) if long.ttft else None
    table.add("c", "128K alone", milliseconds(long_alone(load)), MS)
    table.add("c", "128K beside 20 x 1K a second", milliseconds(beside), MS)
    table.add("c", "beside over alone", over(beside, long_alone(load)), most=1.4)
    table.add("c", "those 1K, p95", milliseconds(percentile(ttft_of(records), 0.95)), MS)


def bar_d(load, table):
    for name in ("exact", load.arguments.sparse):
        for flags, what in (([], "all shipped"), (["--decode-holds-prefix"], "skip_tokens")):
            prompts = []
            for _ in range(load.arguments.runs):
                cold = load.fresh_blocks(64)
                prompts += [cold, cold[:62] + load.fresh_blocks(2)]
            run = load.run("--trace", load.trace(prompts), "--trace-block", load.tokens(512), "--concurrency", 1, *attention(name), *flags)
            cold, warm = (ttft_of(run.records[first::2]) for first in (0, 1))
            cold, warm = percentile(cold, 0.5), percentile(warm, 0.5)
            cached = percentile([record["cached_tokens"] for record in run.records[1::2]], 0.5)
            table.add("d", f"{name}, {what}: 32K cold", milliseconds(cold), MS)
            table.add("d", f"{name}, {what}: 31K of 32K cached", milliseconds(warm), MS)
            table.add("d", f"{name}, {what}: tokens from the cache", cached, "{:d}")
            table.add("d", f"{name}, {what}: over cold", over(warm, cold), "{:.3f}", most=0.08)


def capacity(load, table):
    """Prompts of the mix a second, when there is always work. Measured once."""
    if not hasattr(load, "capacity"):
        run = load.run("--concurrency", 32, "--requests", load.arguments.capacity_prompts, "--warmup", 5, lengths=load.mix())
        load.capacity = run.result["requests_per_second"]
        table.add("e", "capacity, prompts/s", load.capacity)
        table.add("e", "capacity, tokens/s", run.result["tokens_per_second"], "{:.0f}")
    return load.capacity


def bar_ef(load, table):
    rate = 0.8 * capacity(load, table)
    run = load.run("--rate", rate, "--duration", f"{load.arguments.seconds}s", "--max-outstanding", 2048, lengths=load.mix())
    short = [record for record in run.records if record["tokens"] <= load.tokens(2048)]
    ttft = ttft_of(short)
    table.add("e", "prompts up to 2K", len(short), "{:d}")
    table.add("e", "not answered", len(run.records) - len(run.ok), "{:d}", most=0)
    table.add("e", "late sends, worst", milliseconds(run.result["late"]["max_seconds"]), MS)
    for share in (0.5, 0.9, 0.95, 0.99, 1):
        table.add("e", f"TTFT up to 2K, p{100 * share:.0f}", milliseconds(percentile(ttft, share)), MS, most=250.0 if share == 0.99 else None)
    errors = []
    for record in run.ok:
        if record["predicted_ttft"] is not None:
            seen = record["first_token"] - record["accepted"]
            errors.append(abs(record["predicted_ttft"] - seen) / seen)
    table.add("f", "predicted TTFT, of prompts", len(errors), "{:d}")
    table.add("f", "error, median", percentile(errors, 0.5), "{:.3f}", most=0.10)
    table.add("f", "error, p95", percentile(errors, 0.95), "{:.3f}", most=0.30)


def metrics(server):
    """Sums by name of the METRICS that the server has."""
    sums = {}
    for line in server.metrics().splitlines():
        name = line.partition(" ")[0].partition("{")[0]
        if name in METRICS:
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return sums


def bar_g(load, table):
    rate = 3 * capacity(load, table)
    before = metrics(load.server)
    run = load.run("--rate", rate, "--duration", f"{load.arguments.seconds}s", "--deadline", load.arguments.deadline, "--max-outstanding", 2048,
                   "--warmup", 0, lengths=load.mix())
    time.sleep(1)  # what ended last is given back
    after = metrics(load.server)
    accepted = [record for record in run.records if record["accepted"] is not None]
    refusals = [record["ended"] - record["sent"] for record in run.records if record["outcome"] == "refused"]
    table.add("g", "prompts", len(run.records), "{:d}")
    table.add("g", "accepted", len(accepted), "{:d}")
    table.add("g", "refused", len(refusals), "{:d}")
    table.add("g", "neither", len(run.records) - len(accepted) - len(refusals), "{:d}", most=0)
    table.add("g", f"accepted that met {load.arguments.deadline}", over(len(run.ok), len(accepted)), "{:.3f}", least=1.0)
    table.add("g", "refusal from send, p50", milliseconds(percentile(refusals, 0.5)), MS)
    table.add("g", "refusal from send, p99", milliseconds(percentile(refusals, 0.99)), MS, most=10.0)
    table.add("g", "late sends, worst", milliseconds(run.result["late"]["max_seconds"]), MS)
    for name in METRICS:
        for when, values in (("before", before), ("after", after)):
            table.add("g", f"{name} {when}", values.get(name), "{:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin")
    parser.add_argument("model")
    parser.add_argument("--bars", default="abcdefg", help="letters of those to run; e and f are one run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--sparse", default="balanced:0.1", help="attention of the 128K prompt and of (d)'s second part: preset or preset:gamma")
    parser.add_argument("--runs", type=int, default=3, help="of long prompts")
    parser.add_argument("--shorts", type=int, default=200, help="1K prompts alone")
    parser.add_argument("--capacity-prompts", type=int, default=160, help="to measure the capacity with")
    parser.add_argument("--seconds", type=float, default=30, help="of (e) and (g)")
    parser.add_argument("--deadline", default="5s", help="of (g)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--piece", type=int, default=8192)
    parser.add_argument("--host-bytes", type=int, default=0)
    parser.add_argument("--serve", default="", metavar="FLAGS", help="more flags of headstart serve")
    parser.add_argument("--json", help="file for all rows")
    arguments = parser.parse_args()

    server = Server(arguments, max(int(131072 * arguments.scale), 2))
    load, table = Load(arguments, server), Table()
    bars = {"a": bar_a, "b": bar_b, "c": bar_c, "d": bar_d, "e": bar_ef, "f": bar_ef, "g": bar_g}
    try:
        for bar in dict.fromkeys(bars[letter] for letter in arguments.bars):
            server.check_alive()
            bar(load, table)
    finally:
        code, log = server.stop()
    print(f"server ended with {code}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(dict(arguments=vars(arguments), rows=table.rows, log=log[-20000:]), file, indent=1)


if __name__ == "__main__":
    main()
