"""What a client waits for: `headstart serve` and `headstart bench` on one machine, over loopback, beside the engine alone.

    python3 serve_bench.py BIN MODEL_DIR [--case TOKENS:ATTENTION ...] [--connections N] [--piece N] [--host-bytes N] [--fetch-alone] [--json FILE]

BIN holds headstart and prefill_bench. ATTENTION is `dense`, or the gamma of `balanced`. For every case the engine alone
(prefill_bench: all KV in host memory, nobody reads it), then a client that has all KV in its memory, every chunk checked. A row
is one case: the engine's median, the first of its length and the median of the rest at the client, their ratio, what shipping
added, the rate, and the cores that server and client kept busy while the requests ran.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request


def engine_times(arguments, cases):
    """Median ms to the first token and density by case, from the engine alone."""
    times = {}
    for attention in dict.fromkeys(attention for _, attention in cases):
        lengths = [tokens for tokens, other in cases if other == attention]
        command = [f"{arguments.bin}/prefill_bench", arguments.model, "--piece", str(arguments.piece), "--repeat", str(arguments.runs + 1),
                   "--host-bytes", str(arguments.host_bytes), "--device", arguments.device]
        command += ["--density", "0"] if attention == "dense" else ["--gamma", attention]
        for tokens in lengths:
            command += ["--tokens", str(tokens)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows = [json.loads(line) for line in output.splitlines()]
        for tokens in lengths:
            of_length = [row for row in rows if row["tokens"] == tokens][1:]
            times[tokens, attention] = (statistics.median(row["ttft_ms"] for row in of_length), of_length[0]["density"])
    return times


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    def __init__(self, arguments, longest):
        self.folder = tempfile.TemporaryDirectory()
        ports = f"{self.folder.name}/ports"
        self.log = open(f"{self.folder.name}/log", "w+")
        command = [f"{arguments.bin}/headstart", "serve", "--model", arguments.model, "--device", arguments.device, "--max-prompt-tokens",
                   str(longest), "--piece-tokens", str(arguments.piece), "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--port-file", ports]
        if arguments.host_bytes:
            command += ["--host-kv-bytes", str(arguments.host_bytes)]
        command += shlex.split(arguments.serve)
        self.process = subprocess.Popen(command, stderr=self.log)
        began = time.time()
        while not os.path.exists(ports):
            self.check_alive()
            time.sleep(0.05)
        named = json.load(open(ports))
        self.port, self.admin_port = named["port"], named["admin_port"]
        while not self.ready():
            self.check_alive()
            time.sleep(0.2)
        print(f"server ready after {time.time() - began:.1f} s", flush=True)

    def check_alive(self):
        if self.process.poll() is not None:
            self.log.seek(0)
            sys.exit(f"the server ended with {self.process.returncode}:\n{self.log.read()[-4000:]}")

    def ready(self):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/readyz", timeout=5).status == 200
        except OSError:
            return False

    def metrics(self):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=10).read().decode()

    def stop(self):
        self.process.terminate()
        code = self.process.wait(60)
        self.log.seek(0)
        return code, self.log.read()


def client_row(arguments, server, tokens, attention, connections):
    """The results of `headstart bench` for one case. Prompts of another length open its connections."""
    other = min(tokens - 128, 4096)
    command = [f"{arguments.bin}/headstart", "bench", "--target", f"127.0.0.1:{server.port}", "--lengths", f"{other},{tokens}", "--warmup", "0",
               "--requests", str(arguments.runs + 1), "--into-memory", "--json", "--connections", str(connections), "--timeout", "300s"]
    if arguments.fetch_alone:
        command.append("--fetch-alone")
    command += ["--presets", "exact"] if attention == "dense" else ["--presets", "balanced", "--gamma", attention]
    server_cpu, began = cpu_seconds(server.process.pid), time.time()
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = client.stdout.read()
    _, status, usage = os.wait4(client.pid, 0)
    wall = time.time() - began
    if status != 0:
        sys.exit(f"{' '.join(command)} ended with status {status}:\n{output}")
    results = json.loads(output)["results"]
    if any(result["errors"] for result in results):
        sys.exit(f"{' '.join(command)}: {results}")
    result = results[-1]
    result["kv_bytes_per_token"] = json.loads(output)["server"]["kv_bytes_per_token"]
    result["server_cores"] = (cpu_seconds(server.process.pid) - server_cpu) / wall
    result["client_cores"] = (usage.ru_utime + usage.ru_stime) / wall
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin")
    parser.add_argument("model")
    parser.add_argument("--case", action="append", dest="cases", metavar="TOKENS:ATTENTION", help="default: 1K, 8K dense; 32K, 128K sparse")
    parser.add_argument("--connections", action="append", type=int, help="default: 0, the client's own choice")
    parser.add_argument("--piece", type=int, default=8192)
    parser.add_argument("--host-bytes", type=int, default=0)
    parser.add_argument("--fetch-alone", action="store_true", help="fetch when all is computed: ms and GB/s of the fetch, no engine")
    parser.add_argument("--runs", type=int, default=4, help="of every case, behind the first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--serve", default="", metavar="FLAGS", help="more flags of headstart serve")
    parser.add_argument("--json", help="file for all results")
    arguments = parser.parse_args()
    named = arguments.cases or ["1024:dense", "8192:dense", "32768:0.1", "131072:0.1"]
    cases = [(int(case.split(":")[0]), case.split(":")[1]) for case in named]

    alone = {} if arguments.fetch_alone else engine_times(arguments, cases)
    server = Server(arguments, max(tokens for tokens, _ in cases))
    print("| tokens | attention | density | connections | engine, ms | client, ms | ratio | first, ms | first / rest | exposed, ms | KV GB/s | server cores | client cores |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for tokens, attention in cases:
        for connections in arguments.connections or [0]:
            result = client_row(arguments, server, tokens, attention, connections)
            first, rest = result["all_kv_seconds"]["all"][0] * 1e3, result["all_kv_seconds"]["all"][1:]
            client = statistics.median(rest) * 1e3
            engine, density = alone.get((tokens, attention), (float("nan"), result["density"]))
            # Of the fetch alone: KV of the prompt over its time; else what the whole run moved.
            rate = tokens * result["kv_bytes_per_token"] / client / 1e6 if arguments.fetch_alone else result["kv_gigabytes_per_second"]
            rows.append(dict(tokens=tokens, attention=attention, engine_ms=engine, client_ms=client, first_ms=first, **result))
            print(f"| {tokens} | {attention} | {density:.3f} | {result['connections']} | {engine:.1f} | {client:.1f} | {client / engine:.3f} | {first:.1f} "
                  f"| {first / client:.3f} | {result['exposed_transfer_seconds']['p50'] * 1e3:.1f} | {rate:.2f} "
                  f"| {result['server_cores']:.1f} | {result['client_cores']:.1f} |", flush=True)
    wanted = ("headstart_host_kv_bytes", "headstart_kv_leases", "headstart_tickets", "headstart_kv_pool_blocks")
    print("\n".join(line for line in server.metrics().splitlines() if line.startswith(wanted)))
    code, log = server.stop()
    print(f"server ended with {code}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(dict(rows=rows, log=log[-20000:]), file, indent=1)


if __name__ == "__main__":
    main()
