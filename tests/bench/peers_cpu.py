#!/usr/bin/env python3
"""Prefill speed of Headstart on the CPU beside transformers and llama.cpp: same model, prompt, threads and machine.

    peers_cpu.py [--peers NAMES] [--lengths 1024,4096,8128] [--threads 2] [--repeats 3] [--results FILE]

Runs with the Python of tests/run.sh (torch, transformers, headstart-client). llama.cpp is measured where that Python has
llama-cpp-python. Every peer runs in a process of its own, one after the other; the table says the median of the repeats after
one run to warm up. With --results measurements are kept in the file and added to those that are in it.
"""
import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

REPO = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path(os.environ.get("HEADSTART_CACHE", pathlib.Path.home() / ".cache/headstart"))
MODEL = "SmolLM2-135M-Instruct"
TEXTS = [pathlib.Path("/usr/share/common-licenses") / name for name in ("GPL-3", "GPL-2")]


def make_prompt(num_tokens):
    """Real text: the selection of sparse attention depends on it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CACHE / "models" / MODEL / "tokenizer.json"))
    ids = tokenizer.encode("\n\n".join(path.read_text() for path in TEXTS)).ids
    if len(ids) < num_tokens:
        sys.exit(f"the texts have {len(ids)} tokens, not {num_tokens}")
    return ids[:num_tokens]


def median_seconds(run, repeats):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Every peer yields {"tokens", "seconds", …} for each length.


def measure_transformers(args, dtype_name):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(CACHE / "models" / MODEL, dtype=getattr(torch, dtype_name))
    for length in args.lengths:
        ids = torch.tensor([make_prompt(length)])
        with torch.inference_mode():
            seconds = median_seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), args.repeats)
        yield {"tokens": length, "seconds": seconds}


def measure_llama_cpp(args):
    try:
        import llama_cpp
    except ImportError:
        sys.exit("llama-cpp-python is not installed here")
    model = llama_cpp.Llama(
        str(CACHE / "gguf" / f"{MODEL}.gguf"), n_ctx=max(args.lengths), n_batch=512, n_threads=args.threads,
        n_threads_batch=args.threads, flash_attn=True, verbose=False,
    )
    for length in args.lengths:
        ids = make_prompt(length)

        def run():
            model.reset()
            model.eval(ids)

        yield {"tokens": length, "seconds": median_seconds(run, args.repeats)}


def start_server(args, scratch):
    """A `headstart serve` that is ready, and its address."""
    port_file = pathlib.Path(scratch) / "ports.json"
    server = subprocess.Popen(
        [args.bin_dir / "headstart", "serve", "--model", CACHE / "models" / MODEL, "--threads", str(args.threads),
         "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--port-file", port_file, "--log-level", "warn"]
    )
    wait = [sys.executable, REPO / "deploy/quickstart/wait_ready.py", port_file, str(server.pid)]
    return server, subprocess.check_output(wait, text=True).split()[0]


def measure_headstart(args, preset):
    from headstart import PrefillClient

    with tempfile.TemporaryDirectory() as scratch:
        server, target = start_server(args, scratch)
        try:
            with PrefillClient(target) as client:
                for length in args.lengths:
                    results = []
                    ids = make_prompt(length)
                    seconds = median_seconds(lambda: results.append(client.prefill(ids, attention=preset)), args.repeats)
                    counts = results[-1].statistics
                    yield {"tokens": length, "seconds": seconds, "density": counts.executed_blocks / counts.causal_blocks}
        finally:
            server.terminate()
            server.wait()


PEERS = {
    "transformers bf16": lambda args: measure_transformers(args, "bfloat16"),
    "transformers f32": lambda args: measure_transformers(args, "float32"),
    "llama.cpp Q4_1": measure_llama_cpp,
    "Headstart exact": lambda args: measure_headstart(args, "exact"),
    "Headstart balanced": lambda args: measure_headstart(args, "balanced"),
    "Headstart fast": lambda args: measure_headstart(args, "fast"),
}


def measure_in_a_process(name, arguments):
    """Runs this script for one peer; its results, or None when it can't run here."""
    done = subprocess.run([sys.executable, __file__, "--only", name, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(f"{name}: could not be measured (exit code {done.returncode})", file=sys.stderr)
        return None
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def describe_machine(threads):
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    flags = next(line for line in open("/proc/cpuinfo") if line.startswith("flags")).split()
    isa = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{datetime.date.today()}, {cpu} ({', '.join(isa)}), {threads} threads, {MODEL}"


def print_table(results, lengths, threads):
    baseline = {run["tokens"]: run["seconds"] for run in results.get("transformers bf16", [])}
    print(f"\n{describe_machine(threads)}. Tokens/s; in brackets: times transformers bf16, density.\n")
    print("| |" + "".join(f" {length} tokens |" for length in lengths))
    print("|---|" + "---|" * len(lengths))
    for name in (name for name in PEERS if results.get(name)):
        cells = {run["tokens"]: run for run in results[name]}
        row = [format_cell(cells.get(length), baseline.get(length)) for length in lengths]
        print(f"| {name} | " + " | ".join(row) + " |")


def format_cell(run, baseline_seconds):
    if run is None:
        return ""
    extra = []
    if baseline_seconds:
        extra.append(f"{baseline_seconds / run['seconds']:.2f}x")
    if run.get("density", 1.0) < 1.0:
        extra.append(f"density {run['density']:.2f}")
    return f"{run['tokens'] / run['seconds']:.0f}" + (f" ({', '.join(extra)})" if extra else "")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated: " + ", ".join(PEERS))
    parser.add_argument("--lengths", default="1024,4096,8128")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--bin-dir", type=pathlib.Path, default=REPO / "build/cpu/bin")
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)  # one peer in this process
    args = parser.parse_args()
    args.lengths = [int(length) for length in args.lengths.split(",")]
    return args


def main():
    args = parse_arguments()
    if args.only:
        for run in PEERS[args.only](args):
            print(json.dumps(run), flush=True)
        return
    results = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    for name in args.peers.split(","):
        print(f"measuring {name}", file=sys.stderr)
        lengths = ",".join(map(str, args.lengths))
        same = ["--lengths", lengths, "--threads", str(args.threads), "--repeats", str(args.repeats), "--bin-dir", str(args.bin_dir)]
        runs = measure_in_a_process(name, same)
        if runs is not None:
            kept = [run for run in results.get(name, []) if run["tokens"] not in args.lengths]
            results[name] = sorted(kept + runs, key=lambda run: run["tokens"])
    if args.results:
        args.results.write_text(json.dumps(results, indent=1))
    print_table(results, sorted({run["tokens"] for runs in results.values() for run in runs}), args.threads)


if __name__ == "__main__":
    main()
